/*
 * The stack: PUSH and POP of general registers, immediates and memory, PUSHA POPA, ENTER LEAVE, and the stack functions other files use.
 *
 * RSP changes only after the last access that can fault. ENTER and PUSHA may have written below RSP by then, as processors do; a
 * restart writes the same again. Segment registers are op_system.c's, flags op_control.c's.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

static gva_t stack_linear(struct icpu *c, uint64_t offset, unsigned size, bool write)
{
    return linear_address(c, c->code_bits != 64, SEG_SS, offset & c->stack_mask, size, write);
}

void stack_push(struct icpu *c, unsigned size, uint64_t value)
{
    uint64_t rsp = c->v.cpu.gpr[GPR_RSP] - size;
    mem_write(c, stack_linear(c, rsp, size, true), size, value);
    reg_write_masked(c, GPR_RSP, c->stack_mask, rsp);
}

uint64_t stack_peek(struct icpu *c, unsigned size, unsigned offset_bytes)
{
    return mem_read(c, stack_linear(c, c->v.cpu.gpr[GPR_RSP] + offset_bytes, size, false), size);
}

uint64_t stack_pop(struct icpu *c, unsigned size)
{
    uint64_t value = stack_peek(c, size, 0);
    reg_write_masked(c, GPR_RSP, c->stack_mask, c->v.cpu.gpr[GPR_RSP] + size);
    return value;
}

GENERAL void push_reg(struct icpu *c, const struct insn *i)
{
    stack_push(c, i->op_size, reg_read(c, i->dst, i->op_size));
}

GENERAL void push_imm(struct icpu *c, const struct insn *i)
{
    stack_push(c, i->op_size, i->imm);
}

static void push_mem(struct icpu *c, const struct insn *i)
{
    stack_push(c, i->op_size, mem_read(c, ea_linear(c, i, i->op_size, false), i->op_size));
}

GENERAL void pop_reg(struct icpu *c, const struct insn *i)
{
    uint64_t value = stack_pop(c, i->op_size);
    reg_write(c, i->dst, i->op_size, value);
}

/* Flat ones (op_priv.h): 64-bit mode's stack has no limit, no mask and base 0. */
static void push_reg_flat(struct icpu *c, const struct insn *i)
{
    FLAT_HOST(p, 64, c->v.cpu.gpr[GPR_RSP] - 8, write, push_reg);
    *p = reg64(c, i->dst);
    c->v.cpu.gpr[GPR_RSP] = gva_;
    flat_stored(c, p);
}

static void push_imm_flat(struct icpu *c, const struct insn *i)
{
    FLAT_HOST(p, 64, c->v.cpu.gpr[GPR_RSP] - 8, write, push_imm);
    *p = i->imm;
    c->v.cpu.gpr[GPR_RSP] = gva_;
    flat_stored(c, p);
}

static void pop_reg_flat(struct icpu *c, const struct insn *i)
{
    FLAT_HOST(p, 64, c->v.cpu.gpr[GPR_RSP], read, pop_reg);
    uint64_t value = *p;
    c->v.cpu.gpr[GPR_RSP] = gva_ + 8;
    reg64_set(c, i->dst, value);
}

/* The destination's address is computed with RSP as it is after the pop (SDM vol. 2, POP). */
static void pop_mem(struct icpu *c, const struct insn *i)
{
    uint64_t value = stack_peek(c, i->op_size, 0);
    uint64_t before = c->v.cpu.gpr[GPR_RSP];
    reg_write_masked(c, GPR_RSP, c->stack_mask, before + i->op_size);
    uint64_t after = c->v.cpu.gpr[GPR_RSP], offset = ea_offset(c, i);
    c->v.cpu.gpr[GPR_RSP] = before;
    mem_write(c, linear_address(c, i->flags & INSN_LEGACY, i->segment, offset, i->op_size, true), i->op_size, value);
    c->v.cpu.gpr[GPR_RSP] = after;
}

static void pusha(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size;
    uint64_t rsp = c->v.cpu.gpr[GPR_RSP];
    for (unsigned n = 0; n < 8; n++) {
        uint64_t slot = rsp - (n + 1) * size;
        mem_write(c, stack_linear(c, slot, size, true), size, c->v.cpu.gpr[GPR_RAX + n]);
    }
    reg_write_masked(c, GPR_RSP, c->stack_mask, rsp - 8 * size);
}

static void popa(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size;
    uint64_t value[8];
    for (unsigned n = 0; n < 8; n++)
        value[n] = stack_peek(c, size, n * size);
    reg_write_masked(c, GPR_RSP, c->stack_mask, c->v.cpu.gpr[GPR_RSP] + 8 * size);
    for (unsigned n = 0; n < 8; n++)
        if (7 - n != GPR_RSP)
            reg_write(c, REG_OFFSET(7 - n), size, value[n]);
}

/* imm: bytes of locals; extra: nesting level 0..31. */
static void enter(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size, level = i->extra;
    uint64_t rsp = c->v.cpu.gpr[GPR_RSP], rbp = c->v.cpu.gpr[GPR_RBP];
    rsp -= size;
    mem_write(c, stack_linear(c, rsp, size, true), size, rbp);
    uint64_t frame = rsp & c->stack_mask;
    for (unsigned n = 1; n < level; n++) {
        rbp -= size;
        rsp -= size;
        uint64_t outer = mem_read(c, stack_linear(c, rbp, size, false), size);
        mem_write(c, stack_linear(c, rsp, size, true), size, outer);
    }
    if (level) {
        rsp -= size;
        mem_write(c, stack_linear(c, rsp, size, true), size, frame);
    }
    rsp -= i->imm;
    /* SDM vol. 2, ENTER: faults as a write at the final RSP would. */
    mem_probe_write(c, c->view, stack_linear(c, rsp, size, true), size);
    reg_write(c, REG_OFFSET(GPR_RBP), size, frame);
    reg_write_masked(c, GPR_RSP, c->stack_mask, rsp);
}

static void leave(struct icpu *c, const struct insn *i)
{
    unsigned size = i->op_size;
    uint64_t rbp = c->v.cpu.gpr[GPR_RBP];
    uint64_t value = mem_read(c, stack_linear(c, rbp, size, false), size);
    reg_write_masked(c, GPR_RSP, c->stack_mask, rbp + size);
    reg_write(c, REG_OFFSET(GPR_RBP), size, value);
}

static insn_fn *select_push(const struct decode *d, const struct insn *i, bool flat)
{
    if (d->op[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
        return flat ? push_imm_flat : push_imm;
    switch (unary_form(d)) {
    case UNARY_R:
        return flat ? push_reg_flat : push_reg;
    case UNARY_M:
        return push_mem;
    default:
        return NULL;
    }
}

static insn_fn *select_pop(const struct decode *d, bool flat)
{
    switch (unary_form(d)) {
    case UNARY_R:
        return flat ? pop_reg_flat : pop_reg;
    case UNARY_M:
        return pop_mem;
    default:
        return NULL;
    }
}

insn_fn *stack_select(const struct decode *d, struct insn *i)
{
    uint8_t size = (uint8_t)(d->zi.operand_width / 8);
    bool flat = d->code_bits == 64 && size == 8;
    insn_fn *fn;
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
        fn = select_push(d, i, flat);
        break;
    case ZYDIS_MNEMONIC_POP:
        fn = select_pop(d, flat);
        break;
    case ZYDIS_MNEMONIC_PUSHA:
    case ZYDIS_MNEMONIC_PUSHAD:
        fn = pusha;
        break;
    case ZYDIS_MNEMONIC_POPA:
    case ZYDIS_MNEMONIC_POPAD:
        fn = popa;
        break;
    case ZYDIS_MNEMONIC_ENTER:
        i->imm = d->op[0].imm.value.u & 0xffff;
        i->extra = d->op[1].imm.value.u & 31;
        fn = enter;
        break;
    case ZYDIS_MNEMONIC_LEAVE:
        fn = leave;
        break;
    default:
        return NULL;
    }
    i->op_size = size;
    return fn;
}
