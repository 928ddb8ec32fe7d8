/*
 * Instructions on segment registers and descriptor tables: MOV, PUSH, POP, LDS and family, LAR LSL VERR VERW ARPL, SLDT STR LLDT LTR,
 * SGDT SIDT LGDT LIDT.
 *
 * insn.extra holds the segment_index where one is an operand.
 * Sources: SDM vol. 2 under each name. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

#include <string.h>

/* A selector operand, in a register or memory. */
static uint16_t read_rm16(struct icpu *c, const struct insn *i, bool second)
{
    if (i->flags & (second ? INSN_MEM_SRC : INSN_MEM_DST))
        return (uint16_t)mem_read(c, ea_linear(c, i, 2, false), 2);
    return (uint16_t)reg_read(c, second ? i->src : i->dst, 2);
}

/* Stores a 16-bit value: memory takes 16 bits, registers the operand size, zero-extended. */
static void write_rm16(struct icpu *c, const struct insn *i, uint16_t value)
{
    if (i->flags & INSN_MEM_DST)
        mem_write16(c, ea_linear(c, i, 2, true), value);
    else
        reg_write(c, i->dst, i->op_size, value);
}

static void zero_flag(struct icpu *c, bool set)
{
    uint64_t flags = flags_arithmetic(c);
    flags_set_arithmetic(c, set ? flags | RFLAGS_ZF : flags & ~RFLAGS_ZF);
}

static void require_protected(struct icpu *c)
{
    if (!is_protected(c))
        raise_fault(c, VECTOR_UD);
}

static void umip_check(struct icpu *c)
{
    if ((c->v.cpu.cr4 & CR4_UMIP) && c->cpl > 0)
        raise_gp0(c);
}

/* ---- moves ---- */

void op_mov_from_segment(struct icpu *c, const struct insn *i)
{
    write_rm16(c, i, c->v.cpu.seg[i->extra].selector);
}

/* SDM vol. 3, 6.8.3: no interrupt between the load of SS and that of ESP. */
static void stack_segment_loaded(struct icpu *c)
{
    c->v.cpu.interrupt_shadow = true;
    interp_mode_changed(c);
}

void op_mov_to_segment(struct icpu *c, const struct insn *i)
{
    segment_load(c, i->extra, read_rm16(c, i, true));
    if (i->extra == SEG_SS)
        stack_segment_loaded(c);
}

void op_push_segment(struct icpu *c, const struct insn *i)
{
    stack_push(c, i->op_size, c->v.cpu.seg[i->extra].selector);
}

void op_pop_segment(struct icpu *c, const struct insn *i)
{
    uint64_t mask = c->stack_mask, rsp = c->v.cpu.gpr[GPR_RSP], after = (rsp + i->op_size) & mask;
    segment_load(c, i->extra, (uint16_t)stack_peek(c, i->op_size, 0));
    c->v.cpu.gpr[GPR_RSP] = mask == 0xFFFF ? (rsp & ~0xFFFFull) | after : after;
    if (i->extra == SEG_SS)
        stack_segment_loaded(c);
}

void op_load_far_pointer(struct icpu *c, const struct insn *i)
{
    gva_t address = ea_linear(c, i, i->op_size + 2u, false);
    uint64_t offset = mem_read(c, address, i->op_size);
    segment_load(c, i->extra, (uint16_t)mem_read(c, address + i->op_size, 2));
    reg_write(c, i->dst, i->op_size, offset);
}

/* ---- questions about descriptors ---- */

/* Visible at this privilege: conforming code always, everything else when DPL >= CPL and RPL. */
static bool is_accessible(const struct icpu *c, const struct descriptor *d)
{
    if (descriptor_is_code(d) && descriptor_is_conforming(d))
        return true;
    return descriptor_dpl(d) >= c->cpl && descriptor_dpl(d) >= SELECTOR_RPL(d->selector);
}

/* Reads what LAR or LSL ask about; `types` has a bit for each system type that they answer for. */
static bool query_read(struct icpu *c, uint16_t selector, unsigned types, struct descriptor *d)
{
    if (SELECTOR_IS_NULL(selector) || !descriptor_read(c, selector, d) || !is_accessible(c, d))
        return false;
    if (descriptor_is_segment(d))
        return true;
    if (!(types >> descriptor_type(d) & 1))
        return false;
    return !is_long(c) || descriptor_extend(c, d);
}

#define TYPES_LIMIT_LEGACY                                                                         \
    (1u << SYSTEM_TSS16 | 1u << SYSTEM_LDT | 1u << SYSTEM_TSS16_BUSY | 1u << SYSTEM_TSS | 1u << SYSTEM_TSS_BUSY)
#define TYPES_LIMIT_LONG (1u << SYSTEM_LDT | 1u << SYSTEM_TSS | 1u << SYSTEM_TSS_BUSY)

void op_lar(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    unsigned types = is_long(c) ? TYPES_LIMIT_LONG | 1u << SYSTEM_CALL_GATE
                                : TYPES_LIMIT_LEGACY | 1u << SYSTEM_CALL_GATE16 | 1u << SYSTEM_TASK_GATE | 1u << SYSTEM_CALL_GATE;
    struct descriptor d;
    bool valid = query_read(c, read_rm16(c, i, true), types, &d);
    if (valid)
        reg_write(c, i->dst, i->op_size, d.low >> 32 & 0x00F0FF00);
    zero_flag(c, valid);
}

void op_lsl(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    struct descriptor d;
    bool valid = query_read(c, read_rm16(c, i, true), is_long(c) ? TYPES_LIMIT_LONG : TYPES_LIMIT_LEGACY, &d);
    if (valid)
        reg_write(c, i->dst, i->op_size, d.limit);
    zero_flag(c, valid);
}

void op_verr(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    struct descriptor d;
    uint16_t selector = read_rm16(c, i, false);
    zero_flag(c, !SELECTOR_IS_NULL(selector) && descriptor_read(c, selector, &d) && descriptor_is_readable(&d) &&
                     is_accessible(c, &d));
}

void op_verw(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    struct descriptor d;
    uint16_t selector = read_rm16(c, i, false);
    zero_flag(c, !SELECTOR_IS_NULL(selector) && descriptor_read(c, selector, &d) && descriptor_is_writable_data(&d) &&
                     is_accessible(c, &d));
}

void op_arpl(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    uint16_t rpl = SELECTOR_RPL(reg_read(c, i->src, 2)), value;
    bool adjust;
    if (i->flags & INSN_MEM_DST) {
        gva_t address = ea_linear(c, i, 2, true);
        value = mem_read16(c, address);
        adjust = SELECTOR_RPL(value) < rpl;
        if (adjust)
            mem_write16(c, address, (uint16_t)((value & ~3u) | rpl));
    } else {
        value = (uint16_t)reg_read(c, i->dst, 2);
        adjust = SELECTOR_RPL(value) < rpl;
        if (adjust)
            reg_write(c, i->dst, 2, (value & ~3u) | rpl);
    }
    zero_flag(c, adjust);
}

/* ---- LDTR and TR ---- */

void op_sldt(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    umip_check(c);
    write_rm16(c, i, c->v.cpu.ldtr.selector);
}

void op_str(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    umip_check(c);
    write_rm16(c, i, c->v.cpu.tr.selector);
}

/* A system descriptor in the GDT, 16 bytes long in long mode. */
static void system_descriptor_read(struct icpu *c, uint16_t selector, struct descriptor *d)
{
    if ((selector & SELECTOR_TI) || !descriptor_read(c, selector, d) || descriptor_is_segment(d))
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
}

static void system_descriptor_finish(struct icpu *c, struct descriptor *d)
{
    uint32_t error = SELECTOR_ERROR(d->selector);
    if (!descriptor_is_present(d))
        raise_error(c, VECTOR_NP, error);
    if (is_long(c) && (!descriptor_extend(c, d) || !gva_is_canonical(d->base)))
        raise_error(c, VECTOR_GP, error);
}

void op_lldt(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    require_cpl0(c);
    uint16_t selector = read_rm16(c, i, false);
    if (SELECTOR_IS_NULL(selector)) {
        c->v.cpu.ldtr = segment_null(selector, 0);
        return;
    }
    struct descriptor d;
    system_descriptor_read(c, selector, &d);
    if (descriptor_type(&d) != SYSTEM_LDT)
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
    system_descriptor_finish(c, &d);
    c->v.cpu.ldtr = descriptor_segment(&d, selector);
}

void op_ltr(struct icpu *c, const struct insn *i)
{
    require_protected(c);
    require_cpl0(c);
    uint16_t selector = read_rm16(c, i, false);
    if (SELECTOR_IS_NULL(selector))
        raise_gp0(c);
    struct descriptor d;
    system_descriptor_read(c, selector, &d);
    if (descriptor_type(&d) != SYSTEM_TSS && (is_long(c) || descriptor_type(&d) != SYSTEM_TSS16))
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
    system_descriptor_finish(c, &d);
    descriptor_set_busy(c, &d, true);
    c->v.cpu.tr = descriptor_segment(&d, selector);
}

/* ---- GDTR and IDTR ---- */

static void store_table(struct icpu *c, const struct insn *i, const struct descriptor_table *table)
{
    umip_check(c);
    uint8_t image[10];
    unsigned base_bytes = c->code_bits == 64 ? 8 : 4;
    memcpy(image, &table->limit, 2);
    memcpy(image + 2, &table->base, 8);
    gva_t address = ea_linear(c, i, 2 + base_bytes, true);
    mem_check_alignment(c, c->view, address, 2);
    mem_check_alignment(c, c->view, address + 2, base_bytes);
    mem_write_bytes(c, c->view, address, image, 2 + base_bytes);
}

void op_sgdt(struct icpu *c, const struct insn *i)
{
    store_table(c, i, &c->v.cpu.gdtr);
}

void op_sidt(struct icpu *c, const struct insn *i)
{
    store_table(c, i, &c->v.cpu.idtr);
}

/* insn.extra: bytes of the base that count (3 with a 16-bit operand size). */
static void load_table(struct icpu *c, const struct insn *i, struct descriptor_table *table)
{
    require_cpl0(c);
    unsigned base_bytes = c->code_bits == 64 ? 8 : 4;
    gva_t address = ea_linear(c, i, 2 + base_bytes, false);
    uint16_t limit = (uint16_t)mem_read(c, address, 2);
    uint64_t base = mem_read(c, address + 2, base_bytes);
    if (i->extra == 3)
        base &= 0xFFFFFF;
    if (!gva_is_canonical(base))
        raise_gp0(c);
    *table = (struct descriptor_table){.base = base, .limit = limit};
}

void op_lgdt(struct icpu *c, const struct insn *i)
{
    load_table(c, i, &c->v.cpu.gdtr);
}

void op_lidt(struct icpu *c, const struct insn *i)
{
    load_table(c, i, &c->v.cpu.idtr);
}
