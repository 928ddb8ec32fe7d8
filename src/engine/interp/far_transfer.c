/*
 * Far jumps, calls and returns: code segments, call gates, and the ways into a task switch.
 *
 * Everything is read and checked, and the new stack written, before a register changes. Parameters called `selector` and `offset` come from the guest unchecked.
 * Sources: SDM vol. 2, JMP, CALL, RET; vol. 3, 5.8. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

static uint64_t operand_mask(unsigned op_size)
{
    return op_size == 2 ? 0xFFFF : op_size == 4 ? 0xFFFFFFFF : ~0ull;
}

static void set_code(struct icpu *c, const struct descriptor *d, unsigned cpl, uint64_t rip)
{
    c->v.cpu.seg[SEG_CS] = descriptor_segment(d, (uint16_t)((d->selector & ~3u) | cpl));
    c->v.cpu.gpr[GPR_RIP] = rip;
}

static void set_real_code(struct icpu *c, uint16_t selector, uint64_t offset)
{
    struct segment cs = segment_real(c, SEG_CS, selector);
    if (offset > cs.limit)
        raise_gp0(c);
    c->v.cpu.seg[SEG_CS] = cs;
    c->v.cpu.gpr[GPR_RIP] = offset;
}

/* Reads what a far pointer's or a gate's selector names. */
static void target_read(struct icpu *c, uint16_t selector, struct descriptor *d)
{
    if (SELECTOR_IS_NULL(selector))
        raise_gp0(c);
    if (!descriptor_read(c, selector, d))
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
}

/* A code segment reached directly keeps the CPL. */
static void direct_code_check(struct icpu *c, struct descriptor *d, uint64_t offset)
{
    uint32_t error = SELECTOR_ERROR(d->selector);
    bool allowed = descriptor_is_conforming(d)
                       ? descriptor_dpl(d) <= c->cpl
                       : SELECTOR_RPL(d->selector) <= c->cpl && descriptor_dpl(d) == c->cpl;
    if (is_long(c) && (d->attributes & SEG_ATTR_L) && (d->attributes & SEG_ATTR_DB))
        allowed = false;
    if (!allowed)
        raise_error(c, VECTOR_GP, error);
    if (!descriptor_is_present(d))
        raise_error(c, VECTOR_NP, error);
    code_offset_check(c, d, offset, 0);
    descriptor_set_accessed(c, d);
}

/* Checks a call gate and the code segment behind it. `jump`: may not change the CPL. */
static void gate_code_read(struct icpu *c, struct descriptor *gate, bool jump, struct descriptor *cs)
{
    if (is_long(c) && !descriptor_extend(c, gate))
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(gate->selector));
    uint16_t selector = gate_selector(gate);
    uint32_t error = SELECTOR_ERROR(selector);
    target_read(c, selector, cs);
    bool valid = descriptor_is_code(cs) && descriptor_dpl(cs) <= c->cpl;
    if (jump && valid && !descriptor_is_conforming(cs))
        valid = descriptor_dpl(cs) == c->cpl;
    if (is_long(c) && (cs->attributes & (SEG_ATTR_L | SEG_ATTR_DB)) != SEG_ATTR_L)
        valid = false;
    if (!valid)
        raise_error(c, VECTOR_GP, error);
    if (!descriptor_is_present(cs))
        raise_error(c, VECTOR_NP, error);
    code_offset_check(c, cs, gate_offset(c, gate), 0);
}

enum far_target { FAR_CODE, FAR_CALL_GATE, FAR_TASK_GATE, FAR_TSS };

/* Classifies a non-code target; checks its privilege and presence. */
static enum far_target system_target_check(struct icpu *c, const struct descriptor *d)
{
    uint32_t error = SELECTOR_ERROR(d->selector);
    enum far_target target;
    bool valid = !descriptor_is_segment(d);
    switch (descriptor_type(d)) {
    case SYSTEM_CALL_GATE:
        target = FAR_CALL_GATE;
        break;
    case SYSTEM_CALL_GATE16:
        target = FAR_CALL_GATE;
        valid = valid && !is_long(c);
        break;
    case SYSTEM_TASK_GATE:
        target = FAR_TASK_GATE;
        valid = valid && !is_long(c);
        break;
    case SYSTEM_TSS16:
    case SYSTEM_TSS:
        target = FAR_TSS;
        valid = valid && !is_long(c);
        break;
    default:
        target = FAR_TSS;
        valid = false;
    }
    if (!valid || descriptor_dpl(d) < c->cpl || descriptor_dpl(d) < SELECTOR_RPL(d->selector))
        raise_error(c, VECTOR_GP, error);
    if (!descriptor_is_present(d))
        raise_error(c, VECTOR_NP, error);
    return target;
}

void far_jump(struct icpu *c, uint16_t selector, uint64_t offset, unsigned op_size)
{
    offset &= operand_mask(op_size);
    if (!is_protected(c)) {
        set_real_code(c, selector, offset);
        interp_mode_changed(c);
        return;
    }
    struct descriptor d, cs;
    target_read(c, selector, &d);
    if (descriptor_is_code(&d)) {
        direct_code_check(c, &d, offset);
        set_code(c, &d, c->cpl, offset);
        interp_mode_changed(c);
        return;
    }
    switch (system_target_check(c, &d)) {
    case FAR_CALL_GATE:
        gate_code_read(c, &d, true, &cs);
        descriptor_set_accessed(c, &cs);
        set_code(c, &cs, c->cpl, gate_offset(c, &d));
        interp_mode_changed(c);
        break;
    case FAR_TASK_GATE:
        task_gate(c, &d, TASK_JUMP, 0);
        break;
    default:
        task_switch(c, selector, TASK_JUMP, 0);
    }
}

/* Pushes CS and RIP on the current stack. */
static void push_return_address(struct icpu *c, bool flat, unsigned size)
{
    struct cpu_state *s = &c->v.cpu;
    struct frame f;
    frame_init(c, &f, &s->seg[SEG_SS], s->gpr[GPR_RSP], flat, c->cpl, size);
    frame_push(&f, s->seg[SEG_CS].selector);
    frame_push(&f, s->gpr[GPR_RIP]);
    frame_write(c, &f, 0);
    s->gpr[GPR_RSP] = f.sp;
}

/* A call gate to an inner level: new stack from the TSS, parameters copied (not in long mode). */
static void call_inner(struct icpu *c, const struct descriptor *gate, struct descriptor *cs)
{
    struct cpu_state *s = &c->v.cpu;
    unsigned cpl = descriptor_dpl(cs), size = 8, parameters = 0;
    bool flat = is_long(c);
    struct segment ss;
    uint64_t sp;

    if (flat) {
        sp = tss_stack_pointer64(c, TSS64_RSP(cpl), 0);
        ss = segment_null((uint16_t)cpl, cpl);
    } else {
        tss_inner_stack(c, cpl, 0, &ss, &sp);
        size = descriptor_type(gate) & 8 ? 4 : 2;
        parameters = gate->low >> 32 & 0x1F;
    }
    struct frame f;
    frame_init(c, &f, &ss, sp, flat, cpl, size);
    frame_push(&f, s->seg[SEG_SS].selector);
    frame_push(&f, s->gpr[GPR_RSP]);
    for (unsigned n = parameters; n > 0; n--)
        frame_push(&f, stack_peek(c, size, (n - 1) * size));
    frame_push(&f, s->seg[SEG_CS].selector);
    frame_push(&f, s->gpr[GPR_RIP]);
    descriptor_set_accessed(c, cs);
    frame_write(c, &f, SELECTOR_ERROR(ss.selector));
    s->seg[SEG_SS] = ss;
    s->gpr[GPR_RSP] = f.sp;
    set_code(c, cs, cpl, gate_offset(c, gate));
}

static void call_gate(struct icpu *c, struct descriptor *gate)
{
    struct descriptor cs;
    gate_code_read(c, gate, false, &cs);
    if (!descriptor_is_conforming(&cs) && descriptor_dpl(&cs) < c->cpl) {
        call_inner(c, gate, &cs);
    } else {
        descriptor_set_accessed(c, &cs);
        push_return_address(c, is_long(c), is_long(c) ? 8 : descriptor_type(gate) & 8 ? 4 : 2);
        set_code(c, &cs, c->cpl, gate_offset(c, gate));
    }
}

void far_call(struct icpu *c, uint16_t selector, uint64_t offset, unsigned op_size)
{
    offset &= operand_mask(op_size);
    if (!is_protected(c)) {
        if (offset > segment_real(c, SEG_CS, selector).limit)
            raise_gp0(c);
        push_return_address(c, false, op_size);
        set_real_code(c, selector, offset);
        interp_mode_changed(c);
        return;
    }
    struct descriptor d;
    target_read(c, selector, &d);
    if (descriptor_is_code(&d)) {
        direct_code_check(c, &d, offset);
        push_return_address(c, c->code_bits == 64, op_size);
        set_code(c, &d, c->cpl, offset);
        interp_mode_changed(c);
        return;
    }
    switch (system_target_check(c, &d)) {
    case FAR_CALL_GATE:
        call_gate(c, &d);
        interp_mode_changed(c);
        break;
    case FAR_TASK_GATE:
        task_gate(c, &d, TASK_CALL, 0);
        break;
    default:
        task_switch(c, selector, TASK_CALL, 0);
    }
}

/* ---- returns ---- */

/* The code segment that a far return or IRET goes to: its RPL becomes the CPL. */
static void return_code_read(struct icpu *c, uint16_t selector, uint64_t rip, struct descriptor *d)
{
    uint32_t error = SELECTOR_ERROR(selector);
    unsigned rpl = SELECTOR_RPL(selector);
    target_read(c, selector, d);
    bool valid = descriptor_is_code(d) && rpl >= c->cpl &&
                 (descriptor_is_conforming(d) ? descriptor_dpl(d) <= rpl : descriptor_dpl(d) == rpl);
    if (is_long(c) && (d->attributes & SEG_ATTR_L) && (d->attributes & SEG_ATTR_DB))
        valid = false;
    if (!valid)
        raise_error(c, VECTOR_GP, error);
    if (!descriptor_is_present(d))
        raise_error(c, VECTOR_NP, error);
    code_offset_check(c, d, rip, 0);
}

static struct segment return_stack_read(struct icpu *c, uint16_t selector, unsigned cpl, bool to_64bit)
{
    uint32_t error = SELECTOR_ERROR(selector);
    if (SELECTOR_IS_NULL(selector)) {
        if (!to_64bit || cpl == 3 || SELECTOR_RPL(selector) != cpl)
            raise_gp0(c);
        return segment_null(selector, cpl);
    }
    struct descriptor d;
    if (!descriptor_read(c, selector, &d) || SELECTOR_RPL(selector) != cpl || !descriptor_is_writable_data(&d) ||
        descriptor_dpl(&d) != cpl)
        raise_error(c, VECTOR_GP, error);
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_SS, error);
    descriptor_set_accessed(c, &d);
    return descriptor_segment(&d, selector);
}

/* Stack pointers wider than the stack segment's own width keep their upper bits from before. */
static uint64_t merge_sp(const struct icpu *c, const struct segment *ss, bool to_64bit, uint64_t sp)
{
    if (to_64bit)
        return sp;
    if (ss->attributes & SEG_ATTR_DB)
        return (uint32_t)sp;
    return (c->v.cpu.gpr[GPR_RSP] & 0xFFFF0000) | (sp & 0xFFFF);
}

/* Commits a return to `cs`:rip, with ss:sp when the level (or, in long mode, always for IRET) changes. */
static void return_commit(struct icpu *c, const struct descriptor *cs, uint64_t rip, const struct segment *ss, uint64_t sp)
{
    struct cpu_state *s = &c->v.cpu;
    unsigned cpl = SELECTOR_RPL(cs->selector);
    bool outer = cpl > c->cpl;
    s->seg[SEG_CS] = descriptor_segment(cs, cs->selector);
    s->gpr[GPR_RIP] = rip;
    if (ss)
        s->seg[SEG_SS] = *ss;
    s->gpr[GPR_RSP] = sp;
    if (outer)
        segments_drop_inner(c, cpl);
}

static uint64_t advance_sp(const struct icpu *c, uint64_t bytes)
{
    uint64_t sp = c->v.cpu.gpr[GPR_RSP];
    return (sp & ~c->stack_mask) | ((sp + bytes) & c->stack_mask);
}

/* With a 32-bit stack RSP's upper half is not kept. */
static uint64_t popped_sp(const struct icpu *c, uint64_t bytes)
{
    uint64_t sp = advance_sp(c, bytes);
    return c->stack_mask == 0xFFFFFFFF ? (uint32_t)sp : sp;
}

void far_return(struct icpu *c, unsigned op_size, unsigned release_bytes)
{
    struct cpu_state *s = &c->v.cpu;
    uint64_t rip = stack_peek(c, op_size, 0);
    uint16_t selector = (uint16_t)stack_peek(c, op_size, op_size);

    if (!is_protected(c)) {
        set_real_code(c, selector, rip);
        s->gpr[GPR_RSP] = popped_sp(c, 2 * op_size + release_bytes);
        interp_mode_changed(c);
        return;
    }
    struct descriptor cs;
    return_code_read(c, selector, rip, &cs);
    if (SELECTOR_RPL(selector) == c->cpl) {
        descriptor_set_accessed(c, &cs);
        return_commit(c, &cs, rip, NULL, popped_sp(c, 2 * op_size + release_bytes));
        interp_mode_changed(c);
        return;
    }
    bool to_64bit = descriptor_is_64bit(c, &cs);
    uint64_t sp = stack_peek(c, op_size, 2 * op_size + release_bytes);
    uint16_t ss_selector = (uint16_t)stack_peek(c, op_size, 3 * op_size + release_bytes);
    struct segment ss = return_stack_read(c, ss_selector, SELECTOR_RPL(selector), to_64bit);
    descriptor_set_accessed(c, &cs);
    sp = merge_sp(c, &ss, to_64bit, sp);
    uint64_t mask = to_64bit ? ~0ull : ss.attributes & SEG_ATTR_DB ? 0xFFFFFFFFull : 0xFFFFull;
    sp = (sp & ~mask) | ((sp + release_bytes) & mask);
    return_commit(c, &cs, rip, &ss, sp);
    interp_mode_changed(c);
}

/* ---- IRET ---- */

#define IRET_FLAGS16 (RFLAGS_OSZAPC | RFLAGS_TF | RFLAGS_DF | RFLAGS_NT)
#define IRET_FLAGS32 (IRET_FLAGS16 | RFLAGS_RF | RFLAGS_AC | RFLAGS_ID)

/* Which flags IRET takes from the stack at the current CPL (SDM vol. 2, IRET, "RETURN-TO-SAME-PRIVILEGE-LEVEL"). */
static uint64_t iret_flags(const struct icpu *c, uint64_t popped, unsigned op_size)
{
    uint64_t take = op_size == 2 ? IRET_FLAGS16 : IRET_FLAGS32;
    if (!is_protected(c)) {
        take |= RFLAGS_IF | (c->v.cpu.rflags & RFLAGS_VM ? 0 : RFLAGS_IOPL);
    } else {
        if (c->cpl <= flags_iopl(c))
            take |= RFLAGS_IF;
        if (c->cpl == 0)
            take |= RFLAGS_IOPL | (op_size == 2 ? 0 : RFLAGS_VIF | RFLAGS_VIP);
    }
    return (flags_get(c) & ~take) | (popped & take);
}

/* Real and virtual-8086 mode. */
static void iret_real(struct icpu *c, unsigned op_size)
{
    if ((c->v.cpu.rflags & RFLAGS_VM) && flags_iopl(c) < 3)
        raise_gp0(c);
    uint64_t rip = stack_peek(c, op_size, 0);
    uint16_t selector = (uint16_t)stack_peek(c, op_size, op_size);
    uint64_t flags = iret_flags(c, stack_peek(c, op_size, 2 * op_size), op_size);
    set_real_code(c, selector, rip);
    c->v.cpu.gpr[GPR_RSP] = popped_sp(c, 3 * op_size);
    flags_set(c, flags);
}

/* To virtual-8086 mode, from CPL 0 only: nine 32-bit values. */
static void iret_to_v86(struct icpu *c, uint64_t rip, uint16_t cs, uint64_t flags)
{
    static const uint8_t order[] = {SEG_SS, SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    struct cpu_state *s = &c->v.cpu;
    uint16_t selectors[SEG_COUNT];
    if (rip > 0xFFFF)
        raise_gp0(c);
    selectors[SEG_CS] = cs;
    uint64_t sp = stack_peek(c, 4, 12);
    for (unsigned n = 0; n < sizeof(order); n++)
        selectors[order[n]] = (uint16_t)stack_peek(c, 4, 16 + 4 * n);

    uint64_t take = IRET_FLAGS32 | RFLAGS_IF | RFLAGS_IOPL | RFLAGS_VM | RFLAGS_VIF | RFLAGS_VIP;
    s->rflags |= RFLAGS_VM; /* first: segment_real looks at it */
    for (unsigned n = 0; n < SEG_COUNT; n++)
        s->seg[n] = segment_real(c, n, selectors[n]);
    s->gpr[GPR_RIP] = rip;
    s->gpr[GPR_RSP] = sp;
    flags_set(c, (flags & take) | RFLAGS_FIXED);
}

static void iret_from_task(struct icpu *c)
{
    if (is_long(c))
        raise_gp0(c);
    const struct segment *tr = &c->v.cpu.tr;
    uint16_t link = (uint16_t)table_read(c, table_address(c, tr->base, 0), 2);
    task_switch(c, link, TASK_RETURN, 0);
}

static void iret_protected(struct icpu *c, unsigned op_size)
{
    uint64_t rip = stack_peek(c, op_size, 0);
    uint16_t selector = (uint16_t)stack_peek(c, op_size, op_size);
    uint64_t popped = stack_peek(c, op_size, 2 * op_size);

    if (op_size == 4 && (popped & RFLAGS_VM) && c->cpl == 0 && !is_long(c)) {
        iret_to_v86(c, rip, selector, popped);
        return;
    }
    struct descriptor cs;
    return_code_read(c, selector, rip, &cs);
    unsigned cpl = SELECTOR_RPL(selector);
    uint64_t flags = iret_flags(c, popped, op_size);
    if (cpl == c->cpl && c->code_bits != 64) {
        descriptor_set_accessed(c, &cs);
        return_commit(c, &cs, rip, NULL, popped_sp(c, 3 * op_size));
    } else {
        bool to_64bit = descriptor_is_64bit(c, &cs);
        uint64_t sp = stack_peek(c, op_size, 3 * op_size);
        uint16_t ss_selector = (uint16_t)stack_peek(c, op_size, 4 * op_size);
        struct segment ss = return_stack_read(c, ss_selector, cpl, to_64bit);
        descriptor_set_accessed(c, &cs);
        return_commit(c, &cs, rip, &ss, merge_sp(c, &ss, to_64bit, sp));
    }
    flags_set(c, flags);
}

void interrupt_return(struct icpu *c, unsigned op_size)
{
    struct cpu_state *s = &c->v.cpu;
    if (s->nmi_blocked) { /* even when the IRET faults */
        s->nmi_blocked = false;
        vcpu_raise_attention(&c->v);
    }
    if (!is_protected(c))
        iret_real(c, op_size);
    else if (s->rflags & RFLAGS_NT)
        iret_from_task(c);
    else
        iret_protected(c, op_size);
    interp_mode_changed(c);
}
