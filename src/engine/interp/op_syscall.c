/*
 * SYSCALL SYSRET SYSENTER SYSEXIT SWAPGS, and the FSGSBASE family.
 *
 * They do what the processor that the guest sees does: AMD's has SYSCALL outside 64-bit mode, no SYSENTER in long mode, and returns to addresses that are not canonical; about SS both are Intel's.
 * Sources: SDM vol. 2 under each name; AMD APM vol. 3, SYSCALL. Threading: as interp_priv.h.
 */
#include "engine/interp/interp_core.h"
#include "engine/interp/system_priv.h"

#define SYSRET_FLAGS 0x3C7FD7ull

enum flat_width { FLAT_16_OR_32, FLAT_64 };

/* The fixed descriptors that these instructions load instead of reading the GDT. */
static void load_flat(struct icpu *c, uint16_t cs, uint16_t ss, unsigned cpl, enum flat_width width)
{
    uint16_t common = (uint16_t)(SEG_ATTR_P | SEG_ATTR_S | SEG_ATTR_RW | SEG_ATTR_ACCESSED | SEG_ATTR_G | cpl << 5);
    c->v.cpu.seg[SEG_CS] = (struct segment){
        .limit = 0xFFFFFFFF,
        .selector = (uint16_t)((cs & ~3u) | cpl),
        .attributes = (uint16_t)(common | SEG_ATTR_CODE | (width == FLAT_64 ? SEG_ATTR_L : SEG_ATTR_DB)),
    };
    c->v.cpu.seg[SEG_SS] = (struct segment){
        .limit = 0xFFFFFFFF,
        .selector = (uint16_t)((ss & ~3u) | cpl),
        .attributes = common | SEG_ATTR_DB,
    };
}

void syscall_segments_load(struct icpu *c, bool to_user)
{
    uint64_t star = c->v.cpu.msr_star;
    uint16_t call = (uint16_t)(star >> 32), ret = (uint16_t)(star >> 48);
    if (to_user)
        load_flat(c, (uint16_t)(ret + 16), (uint16_t)(ret + 8), 3, FLAT_64);
    else
        load_flat(c, call, (uint16_t)(call + 8), 0, FLAT_64);
}

void op_syscall(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    if (!(s->efer & EFER_SCE) || !(s->cr0 & CR0_PE) || (s->rflags & RFLAGS_VM) ||
        (c->code_bits != 64 && !c->amd))
        raise_fault(c, VECTOR_UD);
    vcpu_count(&c->v, COUNTER_system_calls);
    uint64_t flags = flags_get(c) & ~RFLAGS_RF;
    uint16_t cs = (uint16_t)(s->msr_star >> 32);

    s->gpr[GPR_RCX] = s->gpr[GPR_RIP];
    if (is_long(c)) {
        s->gpr[GPR_R11] = flags;
        s->gpr[GPR_RIP] = c->code_bits == 64 ? s->msr_lstar : s->msr_cstar;
        flags &= ~s->msr_sfmask;
        syscall_segments_load(c, false);
    } else {
        s->gpr[GPR_RIP] = (uint32_t)s->msr_star;
        flags &= ~(RFLAGS_IF | RFLAGS_VM);
        load_flat(c, cs, (uint16_t)(cs + 8), 0, FLAT_16_OR_32);
    }
    flags_set(c, flags | RFLAGS_FIXED);
    interp_mode_changed(c);
}

void op_sysret(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    if (!(s->efer & EFER_SCE) || !is_protected(c) || (c->code_bits != 64 && !c->amd))
        raise_fault(c, VECTOR_UD);
    require_cpl0(c);
    uint16_t selector = (uint16_t)(s->msr_star >> 48);
    uint64_t flags = (s->gpr[GPR_R11] & SYSRET_FLAGS) | RFLAGS_FIXED;

    if (i->op_size == 8) {
        if (!c->amd && !gva_is_canonical(s->gpr[GPR_RCX]))
            raise_gp0(c); /* AMD's notice in ring 3 */
        s->gpr[GPR_RIP] = s->gpr[GPR_RCX];
        syscall_segments_load(c, true);
    } else {
        s->gpr[GPR_RIP] = (uint32_t)s->gpr[GPR_RCX];
        load_flat(c, selector, (uint16_t)(selector + 8), 3, FLAT_16_OR_32);
    }
    if (!is_long(c)) /* AMD's legacy form sets IF and leaves the other flags */
        flags = flags_get(c) | RFLAGS_IF;
    flags_set(c, flags);
    interp_mode_changed(c);
}

void op_sysenter(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    uint16_t cs = (uint16_t)(s->msr_sysenter_cs & 0xFFFC);
    if (c->amd && is_long(c))
        raise_fault(c, VECTOR_UD);
    if (!(s->cr0 & CR0_PE) || !cs)
        raise_gp0(c);
    vcpu_count(&c->v, COUNTER_system_calls);
    uint64_t flags = flags_get(c) & ~(RFLAGS_VM | RFLAGS_IF | RFLAGS_RF);
    bool lm = is_long(c);
    s->gpr[GPR_RSP] = lm ? s->msr_sysenter_esp : (uint32_t)s->msr_sysenter_esp;
    s->gpr[GPR_RIP] = lm ? s->msr_sysenter_eip : (uint32_t)s->msr_sysenter_eip;
    load_flat(c, cs, (uint16_t)(cs + 8), 0, lm ? FLAT_64 : FLAT_16_OR_32);
    flags_set(c, flags);
    interp_mode_changed(c);
}

void op_sysexit(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    uint16_t cs = (uint16_t)(s->msr_sysenter_cs & 0xFFFC);
    if (c->amd && is_long(c))
        raise_fault(c, VECTOR_UD);
    if (!(s->cr0 & CR0_PE) || !cs)
        raise_gp0(c);
    require_cpl0(c);
    uint64_t rip = s->gpr[GPR_RDX], rsp = s->gpr[GPR_RCX];
    if (c->code_bits == 64 && i->op_size == 8) {
        if (!gva_is_canonical(rip) || !gva_is_canonical(rsp))
            raise_gp0(c);
        load_flat(c, (uint16_t)(cs + 32), (uint16_t)(cs + 40), 3, FLAT_64);
    } else {
        rip = (uint32_t)rip;
        rsp = (uint32_t)rsp;
        load_flat(c, (uint16_t)(cs + 16), (uint16_t)(cs + 24), 3, FLAT_16_OR_32);
    }
    s->gpr[GPR_RIP] = rip;
    s->gpr[GPR_RSP] = rsp;
    interp_mode_changed(c);
}

/* ---- FS and GS bases ---- */

void op_swapgs(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    if (c->code_bits != 64)
        raise_fault(c, VECTOR_UD);
    require_cpl0(c);
    uint64_t base = s->seg[SEG_GS].base;
    s->seg[SEG_GS].base = c->segment_base[SEG_GS] = s->msr_kernel_gs_base;
    s->msr_kernel_gs_base = base;
}

static void base_instruction_check(struct icpu *c)
{
    if (c->code_bits != 64 || !(c->v.cpu.cr4 & CR4_FSGSBASE))
        raise_fault(c, VECTOR_UD);
}

static void write_base(struct icpu *c, const struct insn *i, unsigned segment)
{
    base_instruction_check(c);
    uint64_t base = reg_read(c, i->dst, i->op_size);
    if (!gva_is_canonical(base))
        raise_gp0(c);
    c->v.cpu.seg[segment].base = c->segment_base[segment] = base;
}

void op_rdfsbase(struct icpu *c, const struct insn *i)
{
    base_instruction_check(c);
    reg_write(c, i->dst, i->op_size, c->v.cpu.seg[SEG_FS].base);
}

void op_rdgsbase(struct icpu *c, const struct insn *i)
{
    base_instruction_check(c);
    reg_write(c, i->dst, i->op_size, c->v.cpu.seg[SEG_GS].base);
}

void op_wrfsbase(struct icpu *c, const struct insn *i)
{
    write_base(c, i, SEG_FS);
}

void op_wrgsbase(struct icpu *c, const struct insn *i)
{
    write_base(c, i, SEG_GS);
}
