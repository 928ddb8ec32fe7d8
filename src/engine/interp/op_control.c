/*
 * Near control transfers (JMP CALL RET Jcc JCXZ LOOP), the flags register (PUSHF POPF CLI STI CLC STC CMC CLD STD), software interrupts, BOUND, HLT, and
 * instructions that do nothing here: NOP, hints, prefetches, fences, cache-line flushes.
 *
 * Far transfers are op_system.c's. A transfer checks its target before anything changes, so that #GP leaves RSP and RCX alone.
 * Threading: the vCPU's thread.
 */
#include <sched.h>

#include "engine/interp/op_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_VCPU, sched_yield); /* PAUSE */

static uint64_t *rip(struct icpu *c)
{
    return &c->v.cpu.gpr[GPR_RIP];
}

static void jmp_rel(struct icpu *c, const struct insn *i)
{
    branch_to(c, *rip(c) + i->imm, i->op_size);
}

static void jmp_reg(struct icpu *c, const struct insn *i)
{
    branch_to(c, reg_read(c, i->dst, i->op_size), i->op_size);
}

static void jmp_mem(struct icpu *c, const struct insn *i)
{
    branch_to(c, mem_read(c, ea_linear(c, i, i->op_size, false), i->op_size), i->op_size);
}

static inline void call_to(struct icpu *c, uint64_t target, unsigned size)
{
    target = near_target(c, target, size);
    stack_push(c, size, *rip(c));
    *rip(c) = target;
}

GENERAL void call_rel(struct icpu *c, const struct insn *i)
{
    call_to(c, *rip(c) + i->imm, i->op_size);
}

GENERAL void call_reg(struct icpu *c, const struct insn *i)
{
    call_to(c, reg_read(c, i->dst, i->op_size), i->op_size);
}

static void call_mem(struct icpu *c, const struct insn *i)
{
    call_to(c, mem_read(c, ea_linear(c, i, i->op_size, false), i->op_size), i->op_size);
}

GENERAL void ret(struct icpu *c, const struct insn *i)
{
    branch_to(c, stack_peek(c, i->op_size, 0), i->op_size);
    reg_write_masked(c, GPR_RSP, c->stack_mask, c->v.cpu.gpr[GPR_RSP] + i->op_size + i->imm);
}

/* Flat ones (op_priv.h). */
#define CALL_FLAT(name, general, target_value)                                                     \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        uint64_t target = target_value, from = *rip(c);                                            \
        if (unlikely(!gva_is_canonical(target)))                                                   \
            branch_fault(c);                                                                       \
        FLAT_HOST(p, 64, c->v.cpu.gpr[GPR_RSP] - 8, write, general);                               \
        *p = from;                                                                                 \
        c->v.cpu.gpr[GPR_RSP] = gva_;                                                              \
        *rip(c) = target;                                                                          \
        flat_stored(c, p);                                                                         \
    }
CALL_FLAT(call_rel_flat, call_rel, *rip(c) + i->imm)
CALL_FLAT(call_reg_flat, call_reg, reg64(c, i->dst))

static void ret_flat(struct icpu *c, const struct insn *i)
{
    FLAT_HOST(p, 64, c->v.cpu.gpr[GPR_RSP], read, ret);
    uint64_t target = *p;
    if (unlikely(!gva_is_canonical(target)))
        branch_fault(c);
    *rip(c) = target;
    c->v.cpu.gpr[GPR_RSP] = gva_ + 8 + i->imm;
}

#define JCC(cc)                                                                                    \
    static void jcc##cc(struct icpu *c, const struct insn *i)                                      \
    {                                                                                              \
        if (condition_holds(c->oszapc, cc))                                                        \
            branch_to(c, *rip(c) + i->imm, i->op_size);                                            \
    }
CONDITIONS(JCC)
#define JCC_ENTRY(cc) jcc##cc,
static insn_fn *const jcc_table[16] = {CONDITIONS(JCC_ENTRY)};

/* address_mask tells CX, ECX and RCX apart. */
static void jcxz(struct icpu *c, const struct insn *i)
{
    if (!(c->v.cpu.gpr[GPR_RCX] & i->address_mask))
        branch_to(c, *rip(c) + i->imm, i->op_size);
}

static inline void loop_if(struct icpu *c, const struct insn *i, bool condition)
{
    uint64_t count = (c->v.cpu.gpr[GPR_RCX] - 1) & i->address_mask;
    if (count && condition)
        branch_to(c, *rip(c) + i->imm, i->op_size);
    reg_write_masked(c, GPR_RCX, i->address_mask, count);
}

static void loop(struct icpu *c, const struct insn *i)
{
    loop_if(c, i, true);
}

static void loope(struct icpu *c, const struct insn *i)
{
    loop_if(c, i, c->oszapc & OSZAPC_ZF);
}

static void loopne(struct icpu *c, const struct insn *i)
{
    loop_if(c, i, !(c->oszapc & OSZAPC_ZF));
}

/* ---- the flags register ---- */

static unsigned iopl(const struct icpu *c)
{
    return (c->v.cpu.rflags & RFLAGS_IOPL) >> 12;
}

/* Virtual-8086 mode with IOPL below 3; its extensions (CR4.VME) are not offered. */
static void vm86_check(struct icpu *c)
{
    if (unlikely((c->v.cpu.rflags & RFLAGS_VM) && iopl(c) < 3))
        raise_gp0(c);
}

static void pushf(struct icpu *c, const struct insn *i)
{
    vm86_check(c);
    stack_push(c, i->op_size, flags_get(c) & ~(RFLAGS_VM | RFLAGS_RF));
}

/* SDM vol. 2, POPF: what may change depends on privilege and operand size. */
static void popf(struct icpu *c, const struct insn *i)
{
    vm86_check(c);
    uint64_t changeable = RFLAGS_OSZAPC | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT;
    if (i->op_size > 2)
        changeable |= RFLAGS_AC | RFLAGS_ID;
    if (c->cpl <= iopl(c))
        changeable |= RFLAGS_IF;
    if (c->cpl == 0)
        changeable |= RFLAGS_IOPL;
    uint64_t old = flags_get(c);
    uint64_t new = (stack_pop(c, i->op_size) & changeable) | (old & ~changeable & ~RFLAGS_RF);
    flags_set(c, new);
}

static void interrupt_flag_check(struct icpu *c)
{
    if (unlikely(c->cpl > iopl(c)))
        raise_gp0(c);
}

static void cli(struct icpu *c, const struct insn *i)
{
    interrupt_flag_check(c);
    c->v.cpu.rflags &= ~RFLAGS_IF;
}

static void sti(struct icpu *c, const struct insn *i)
{
    interrupt_flag_check(c);
    if (c->v.cpu.rflags & RFLAGS_IF)
        return;
    c->v.cpu.rflags |= RFLAGS_IF;
    c->v.cpu.interrupt_shadow = true;
    interp_mode_changed(c);
    if (c->interrupt_waiting)
        vcpu_raise_attention(&c->v);
}

static void clc(struct icpu *c, const struct insn *i)
{
    c->oszapc &= ~OSZAPC_CF;
}

static void stc(struct icpu *c, const struct insn *i)
{
    c->oszapc |= OSZAPC_CF;
}

static void cmc(struct icpu *c, const struct insn *i)
{
    c->oszapc ^= OSZAPC_CF;
}

static void cld(struct icpu *c, const struct insn *i)
{
    c->v.cpu.rflags &= ~RFLAGS_DF;
}

static void std(struct icpu *c, const struct insn *i)
{
    c->v.cpu.rflags |= RFLAGS_DF;
}

/* ---- software interrupts and traps ---- */

static void int_n(struct icpu *c, const struct insn *i)
{
    exception_software(c, (uint8_t)i->imm, true);
}

static void int3(struct icpu *c, const struct insn *i)
{
    exception_software(c, VECTOR_BP, false);
}

static void int1(struct icpu *c, const struct insn *i)
{
    exception_software(c, VECTOR_DB, false);
}

static void into(struct icpu *c, const struct insn *i)
{
    if (c->oszapc & OSZAPC_OF)
        exception_software(c, VECTOR_OF, false);
}

static void bound(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size;
    gva_t linear = ea_linear(c, i, 2 * size, false);
    int64_t index, lower, upper;
    if (size == 2) {
        index = (int16_t)reg_read(c, i->dst, 2);
        lower = (int16_t)mem_read16(c, linear);
        upper = (int16_t)mem_read16(c, linear + 2);
    } else {
        index = (int32_t)reg_read(c, i->dst, 4);
        lower = (int32_t)mem_read32(c, linear);
        upper = (int32_t)mem_read32(c, (uint32_t)(linear + 4));
    }
    if (index < lower || index > upper)
        raise_fault(c, VECTOR_BR);
}

/* ---- waiting, hints, fences ---- */

static void hlt(struct icpu *c, const struct insn *i)
{
    if (c->cpl)
        raise_gp0(c);
    vcpu_count(&c->v, COUNTER_halts);
    c->v.cpu.activity = CPU_HALTED;
}

#define PAUSES_BEFORE_YIELD 1024

static void pause_hint(struct icpu *c, const struct insn *i)
{
    vcpu_count(&c->v, COUNTER_pauses);
    __asm__ volatile("pause");
    /* A long wait is often for a vCPU whose thread is not running: let it. */
    if (unlikely(c->v.counters[COUNTER_pauses] % PAUSES_BEFORE_YIELD == 0)) {
        simd_save(c);
        sched_yield();
    }
}

static void nop(struct icpu *c, const struct insn *i)
{
}

static void fence(struct icpu *c, const struct insn *i)
{
    __asm__ volatile("mfence" : : : "memory");
}

/* CLFLUSH and the like: the address is checked as a byte load's; caches are coherent without help. */
static void cache_line(struct icpu *c, const struct insn *i)
{
    mem_probe_read(c, c->view, ea_linear(c, i, 1, false));
}

/* ---- selection ---- */

static const struct transfer {
    uint16_t mnemonic;
    insn_fn *relative, *reg, *memory; /* by operand */
} transfers[] = {
    {ZYDIS_MNEMONIC_JMP, jmp_rel, jmp_reg, jmp_mem}, {ZYDIS_MNEMONIC_CALL, call_rel, call_reg, call_mem},
    {ZYDIS_MNEMONIC_RET, ret, ret, ret},             {ZYDIS_MNEMONIC_JCXZ, jcxz, NULL, NULL},
    {ZYDIS_MNEMONIC_JECXZ, jcxz, NULL, NULL},        {ZYDIS_MNEMONIC_JRCXZ, jcxz, NULL, NULL},
    {ZYDIS_MNEMONIC_LOOP, loop, NULL, NULL},         {ZYDIS_MNEMONIC_LOOPE, loope, NULL, NULL},
    {ZYDIS_MNEMONIC_LOOPNE, loopne, NULL, NULL},
};
static const struct transfer flat_transfers[] = {
    {ZYDIS_MNEMONIC_CALL, call_rel_flat, call_reg_flat, call_mem},
    {ZYDIS_MNEMONIC_RET, ret_flat, ret_flat, ret_flat},
};

static insn_fn *transfer_find(const struct transfer *table, unsigned count, const struct decode *d)
{
    for (unsigned k = 0; k < count; k++) {
        if (table[k].mnemonic != d->zi.mnemonic)
            continue;
        switch (d->op[0].type) {
        case ZYDIS_OPERAND_TYPE_REGISTER:
            return table[k].reg;
        case ZYDIS_OPERAND_TYPE_MEMORY:
            return table[k].memory;
        default:
            return table[k].relative;
        }
    }
    return NULL;
}

static bool select_transfer(const struct decode *d, struct insn *i)
{
    insn_fn *fn = NULL;
    if (d->zi.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR)
        return false;
    if (d->zi.meta.category == ZYDIS_CATEGORY_COND_BR && (d->zi.opcode & 0xf0) == (d->zi.opcode_map ? 0x80 : 0x70))
        fn = jcc_table[d->zi.opcode & 15];
    if (!fn && d->code_bits == 64 && d->zi.operand_width == 64)
        fn = transfer_find(flat_transfers, sizeof flat_transfers / sizeof flat_transfers[0], d);
    if (!fn)
        fn = transfer_find(transfers, sizeof transfers / sizeof transfers[0], d);
    if (!fn)
        return false;
    i->op_size = (uint8_t)(d->zi.operand_width / 8);
    i->fn = fn;
    i->flags |= INSN_ENDS_BLOCK;
    return true;
}

#define ENDS INSN_ENDS_BLOCK

/* Without operands that matter, or with one immediate. */
static const struct simple {
    uint16_t mnemonic;
    uint8_t flags;
    insn_fn *fn;
} simples[] = {
    {ZYDIS_MNEMONIC_NOP, 0, nop},
    {ZYDIS_MNEMONIC_PAUSE, 0, pause_hint},
    {ZYDIS_MNEMONIC_PUSHF, 0, pushf},
    {ZYDIS_MNEMONIC_PUSHFD, 0, pushf},
    {ZYDIS_MNEMONIC_PUSHFQ, 0, pushf},
    {ZYDIS_MNEMONIC_POPF, ENDS, popf},
    {ZYDIS_MNEMONIC_POPFD, ENDS, popf},
    {ZYDIS_MNEMONIC_POPFQ, ENDS, popf},
    {ZYDIS_MNEMONIC_CLI, 0, cli},
    {ZYDIS_MNEMONIC_STI, ENDS, sti},
    {ZYDIS_MNEMONIC_CLC, 0, clc},
    {ZYDIS_MNEMONIC_STC, 0, stc},
    {ZYDIS_MNEMONIC_CMC, 0, cmc},
    {ZYDIS_MNEMONIC_CLD, 0, cld},
    {ZYDIS_MNEMONIC_STD, 0, std},
    {ZYDIS_MNEMONIC_HLT, ENDS, hlt},
    {ZYDIS_MNEMONIC_INT, ENDS, int_n},
    {ZYDIS_MNEMONIC_INT3, ENDS, int3},
    {ZYDIS_MNEMONIC_INT1, ENDS, int1},
    {ZYDIS_MNEMONIC_INTO, ENDS, into},
    {ZYDIS_MNEMONIC_BOUND, 0, bound},
    {ZYDIS_MNEMONIC_LFENCE, 0, fence},
    {ZYDIS_MNEMONIC_SFENCE, 0, fence},
    {ZYDIS_MNEMONIC_MFENCE, 0, fence},
    {ZYDIS_MNEMONIC_CLFLUSH, 0, cache_line},
    {ZYDIS_MNEMONIC_CLFLUSHOPT, 0, cache_line},
    {ZYDIS_MNEMONIC_CLWB, 0, cache_line},
    /* Hints: no access, no fault. */
    {ZYDIS_MNEMONIC_PREFETCH, 0, nop},
    {ZYDIS_MNEMONIC_PREFETCHNTA, 0, nop},
    {ZYDIS_MNEMONIC_PREFETCHT0, 0, nop},
    {ZYDIS_MNEMONIC_PREFETCHT1, 0, nop},
    {ZYDIS_MNEMONIC_PREFETCHT2, 0, nop},
    {ZYDIS_MNEMONIC_PREFETCHW, 0, nop},
    {ZYDIS_MNEMONIC_PREFETCHWT1, 0, nop},
};

bool op_control_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    if (d->zi.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
        return false;
    if (select_transfer(d, i))
        return true;
    for (unsigned k = 0; k < sizeof simples / sizeof simples[0]; k++) {
        if (simples[k].mnemonic != d->zi.mnemonic)
            continue;
        i->op_size = (uint8_t)(d->zi.operand_width / 8);
        i->flags |= simples[k].flags;
        i->fn = simples[k].fn;
        return true;
    }
    return false;
}
