/*
 * Hardware task switches through 16- and 32-bit TSSs.
 *
 * Up to the commit point (everything of both TSSs touched and checked) a fault leaves the old task running. After it a fault belongs to the new task: c->current is NULL then, so
 * that the run loop does not put rip back. Not used in long mode.
 * Sources: SDM vol. 3, ch. 7, in particular 7.3 and tables 7-1 and 7-2. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

/* Where a TSS keeps things (SDM vol. 3, figures 7-2 and 7-10). */
struct tss_layout {
    unsigned limit; /* least */
    unsigned cr3;   /* 0: none */
    unsigned eip, eflags, registers, segments, segment_count, ldt, trap;
    unsigned register_bytes, segment_stride;
    unsigned saved_from, saved_bytes; /* the part that an outgoing task's state is written to */
};

static const struct tss_layout layout32 = {
    .limit = 0x67, .cr3 = 0x1C, .eip = 0x20, .eflags = 0x24, .registers = 0x28, .segments = 0x48,
    .segment_count = 6, .ldt = 0x60, .trap = 0x64, .register_bytes = 4, .segment_stride = 4,
    .saved_from = 0x20, .saved_bytes = 0x40,
};
static const struct tss_layout layout16 = {
    .limit = 0x2B, .eip = 0x0E, .eflags = 0x10, .registers = 0x12, .segments = 0x22,
    .segment_count = 4, .ldt = 0x2A, .register_bytes = 2, .segment_stride = 2,
    .saved_from = 0x0E, .saved_bytes = 0x1C,
};

/* TSS order of segment registers. */
static const uint8_t segment_order[6] = {SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS};

struct task_image {
    uint64_t cr3;
    uint32_t eip, eflags;
    uint32_t registers[8];
    uint16_t segments[6]; /* by segment_index */
    uint16_t ldt;
    bool trap;
};

static const struct tss_layout *layout_of(unsigned attributes)
{
    return attributes & 8 ? &layout32 : &layout16;
}

static void image_read(struct icpu *c, uint64_t base, const struct tss_layout *l, struct task_image *t)
{
    *t = (struct task_image){0};
    if (l->cr3)
        t->cr3 = table_read(c, table_address(c, base, l->cr3), 4);
    t->eip = (uint32_t)table_read(c, table_address(c, base, l->eip), l->register_bytes);
    t->eflags = (uint32_t)table_read(c, table_address(c, base, l->eflags), l->register_bytes);
    for (unsigned n = 0; n < 8; n++)
        t->registers[n] = (uint32_t)table_read(
            c, table_address(c, base, l->registers + n * l->register_bytes), l->register_bytes);
    for (unsigned n = 0; n < l->segment_count; n++)
        t->segments[segment_order[n]] =
            (uint16_t)table_read(c, table_address(c, base, l->segments + n * l->segment_stride), 2);
    t->ldt = (uint16_t)table_read(c, table_address(c, base, l->ldt), 2);
    if (l->trap)
        t->trap = table_read(c, table_address(c, base, l->trap), 2) & 1;
}

static void old_task_save(struct icpu *c, const struct tss_layout *l, uint64_t eflags)
{
    const struct cpu_state *s = &c->v.cpu;
    uint64_t base = s->tr.base;
    unsigned size = l->register_bytes;
    mem_write_slow(c, VIEW_SUPERVISOR, table_address(c, base, l->eip), size, s->gpr[GPR_RIP]);
    mem_write_slow(c, VIEW_SUPERVISOR, table_address(c, base, l->eflags), size, eflags);
    for (unsigned n = 0; n < 8; n++)
        mem_write_slow(c, VIEW_SUPERVISOR, table_address(c, base, l->registers + n * size), size, s->gpr[n]);
    for (unsigned n = 0; n < l->segment_count; n++)
        mem_write_slow(c, VIEW_SUPERVISOR, table_address(c, base, l->segments + n * l->segment_stride), 2,
                       s->seg[segment_order[n]].selector);
}

/* Faults for the new task's segments are #TS but for "not present" (SDM vol. 3, table 7-1). */
static void load_new_ldt(struct icpu *c, uint16_t selector, uint32_t ext)
{
    struct cpu_state *s = &c->v.cpu;
    struct descriptor d;
    uint32_t error = SELECTOR_ERROR(selector) | ext;
    s->ldtr = segment_null(selector, 0);
    if (SELECTOR_IS_NULL(selector))
        return;
    if ((selector & SELECTOR_TI) || !descriptor_read(c, selector, &d) || descriptor_is_segment(&d) ||
        descriptor_type(&d) != SYSTEM_LDT || !descriptor_is_present(&d))
        raise_error(c, VECTOR_TS, error);
    s->ldtr = descriptor_segment(&d, selector);
}

static void load_new_cs(struct icpu *c, uint16_t selector, uint32_t ext)
{
    struct descriptor d;
    uint32_t error = SELECTOR_ERROR(selector) | ext;
    if (SELECTOR_IS_NULL(selector) || !descriptor_read(c, selector, &d) || !descriptor_is_code(&d) ||
        (descriptor_is_conforming(&d) ? descriptor_dpl(&d) > SELECTOR_RPL(selector)
                                      : descriptor_dpl(&d) != SELECTOR_RPL(selector)))
        raise_error(c, VECTOR_TS, error);
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_NP, error);
    descriptor_set_accessed(c, &d);
    c->v.cpu.seg[SEG_CS] = descriptor_segment(&d, selector);
}

static void load_new_ss(struct icpu *c, uint16_t selector, unsigned cpl, uint32_t ext)
{
    struct descriptor d;
    uint32_t error = SELECTOR_ERROR(selector) | ext;
    if (SELECTOR_IS_NULL(selector) || !descriptor_read(c, selector, &d) || !descriptor_is_writable_data(&d) ||
        descriptor_dpl(&d) != cpl || SELECTOR_RPL(selector) != cpl)
        raise_error(c, VECTOR_TS, error);
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_SS, error);
    descriptor_set_accessed(c, &d);
    c->v.cpu.seg[SEG_SS] = descriptor_segment(&d, selector);
}

static void load_new_data(struct icpu *c, unsigned segment, uint16_t selector, unsigned cpl, uint32_t ext)
{
    struct descriptor d;
    uint32_t error = SELECTOR_ERROR(selector) | ext;
    if (SELECTOR_IS_NULL(selector))
        return; /* null already */
    if (!descriptor_read(c, selector, &d) || !descriptor_is_readable(&d))
        raise_error(c, VECTOR_TS, error);
    bool conforming = descriptor_is_code(&d) && descriptor_is_conforming(&d);
    if (!conforming && (descriptor_dpl(&d) < cpl || descriptor_dpl(&d) < SELECTOR_RPL(selector)))
        raise_error(c, VECTOR_TS, error);
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_NP, error);
    descriptor_set_accessed(c, &d);
    c->v.cpu.seg[segment] = descriptor_segment(&d, selector);
}

static void load_new_segments(struct icpu *c, const struct task_image *t, uint32_t ext)
{
    struct cpu_state *s = &c->v.cpu;
    unsigned cpl = SELECTOR_RPL(t->segments[SEG_CS]);

    load_new_ldt(c, t->ldt, ext);
    if (s->rflags & RFLAGS_VM)
        return; /* loaded with the rest of the state */
    load_new_cs(c, t->segments[SEG_CS], ext);
    load_new_ss(c, t->segments[SEG_SS], cpl, ext);
    load_new_data(c, SEG_ES, t->segments[SEG_ES], cpl, ext);
    load_new_data(c, SEG_DS, t->segments[SEG_DS], cpl, ext);
    load_new_data(c, SEG_FS, t->segments[SEG_FS], cpl, ext);
    load_new_data(c, SEG_GS, t->segments[SEG_GS], cpl, ext);
    if (s->gpr[GPR_RIP] > s->seg[SEG_CS].limit)
        raise_error(c, VECTOR_GP, ext);
}

/* Registers and selectors, with the hidden parts not yet valid: what a fault handler sees when a segment cannot be loaded. */
static void load_new_state(struct icpu *c, const struct task_image *t, uint64_t eflags, bool wide)
{
    struct cpu_state *s = &c->v.cpu;
    bool v86 = eflags & RFLAGS_VM;
    unsigned cpl = v86 ? 3 : SELECTOR_RPL(t->segments[SEG_CS]);
    for (unsigned n = 0; n < 8; n++)
        reg_write(c, REG_OFFSET(n), wide ? 4 : 2, t->registers[n]);
    s->gpr[GPR_RIP] = t->eip;
    flags_set(c, eflags);
    for (unsigned n = 0; n < SEG_COUNT; n++)
        s->seg[n] = v86 ? segment_real(c, n, t->segments[n]) : segment_null(t->segments[n], cpl);
    interp_mode_changed(c);
}

/* Every check that can be made before the switch is committed. */
static void new_task_check(struct icpu *c, uint16_t selector, enum task_switch_cause cause, uint32_t ext, struct descriptor *d)
{
    unsigned wrong = cause == TASK_RETURN ? VECTOR_TS : VECTOR_GP;
    uint32_t error = SELECTOR_ERROR(selector) | ext;
    if (SELECTOR_IS_NULL(selector) || (selector & SELECTOR_TI) || !descriptor_read(c, selector, d) ||
        descriptor_is_segment(d) || (descriptor_type(d) & ~(8u | SYSTEM_BUSY)) != 1 ||
        !!(descriptor_type(d) & SYSTEM_BUSY) != (cause == TASK_RETURN))
        raise_error(c, wrong, error);
    if (!descriptor_is_present(d))
        raise_error(c, VECTOR_NP, error);
    if (d->limit < layout_of(d->attributes)->limit)
        raise_error(c, VECTOR_TS, error);
}

void task_switch(struct icpu *c, uint16_t selector, enum task_switch_cause cause, uint32_t ext)
{
    struct cpu_state *s = &c->v.cpu;
    struct descriptor d, old;
    struct task_image t;
    bool nested = cause == TASK_CALL || cause == TASK_EVENT;

    new_task_check(c, selector, cause, ext, &d);
    const struct tss_layout *l = layout_of(d.attributes), *old_l = layout_of(s->tr.attributes);
    if (s->tr.unusable || s->tr.limit < old_l->limit)
        raise_error(c, VECTOR_TS, SELECTOR_ERROR(s->tr.selector) | ext);
    image_read(c, d.base, l, &t);
    mem_probe_write(c, VIEW_SUPERVISOR, table_address(c, s->tr.base, old_l->saved_from), old_l->saved_bytes);
    if (nested)
        mem_probe_write(c, VIEW_SUPERVISOR, table_address(c, d.base, 0), 2);
    bool had_old = descriptor_read(c, s->tr.selector, &old);
    if (had_old)
        mem_probe_write(c, VIEW_SUPERVISOR, table_address(c, old.address, 5), 1);
    mem_probe_write(c, VIEW_SUPERVISOR, table_address(c, d.address, 5), 1);

    uint64_t saved_flags = flags_get(c);
    if (cause == TASK_RETURN)
        saved_flags &= ~RFLAGS_NT;
    if (had_old && !nested)
        descriptor_set_busy(c, &old, false);
    old_task_save(c, old_l, saved_flags);
    if (nested)
        mem_write_slow(c, VIEW_SUPERVISOR, table_address(c, d.base, 0), 2, s->tr.selector);
    descriptor_set_busy(c, &d, true);

    /* Committed: from here on the new task runs. */
    c->current = NULL;
    s->tr = descriptor_segment(&d, selector);
    s->cr0 |= CR0_TS;
    s->dr[7] &= ~0x155ull; /* local breakpoint enables */
    uint64_t flags = ((uint64_t)t.eflags & 0x277FD7) | RFLAGS_FIXED | (nested ? RFLAGS_NT : 0);
    if (!(d.attributes & 8))
        flags &= 0xFFFF;
    load_new_state(c, &t, flags, d.attributes & 8);
    if (l->cr3 && (s->cr0 & CR0_PG))
        control_write_cr3(c, t.cr3);
    load_new_segments(c, &t, ext);
    interp_mode_changed(c);
    TRACE(c, "task switch to %04x\n", selector);
    if (t.trap)
        raise_debug_trap(c, 1u << 15); /* BT */
}

void task_gate(struct icpu *c, const struct descriptor *gate, enum task_switch_cause cause, uint32_t ext)
{
    task_switch(c, gate_selector(gate), cause, ext);
}
