/*
 * Memory operands: the host address of each access, and the guest's instruction rewritten to use it.
 *
 * Nothing here touches flags, and nothing of the guest changes before the access itself, so an instruction that faults can start again.
 * Threading: e->lock held, like all of a translation.
 */
#include <string.h>

#include "engine/bt/translate_priv.h"

/* ---- memory operands ---- */

void emit_lea_in_mode(struct translation *t, unsigned to, unsigned base, unsigned index, unsigned scale, int32_t disp)
{
    emit_op_mem(&t->out, !t->legacy, 0x8d, to, base, index, scale, disp);
}

static void emit_effective_address(struct translation *t, const struct tinsn *i, unsigned to)
{
    struct emitter *out = &t->out;
    if (i->rip_relative) {
        emit_load_gs(out, to, BT_CTX(page_va));
        emit_lea(out, to, to, EMIT_NONE, 0, i->disp + i->offset + i->length);
    } else if (i->disp_bytes == sizeof(i->absolute)) {
        emit_mov_imm64(out, to, i->absolute);
    } else if (i->base == TI_NONE && i->index == TI_NONE) {
        if (i->address32 || i->legacy)
            emit_mov_imm32(out, to, (uint32_t)i->disp);
        else
            emit_mov_simm32(out, to, i->disp);
    } else {
        emit_op_mem(out, !i->address32 && !i->legacy, 0x8d, to, i->base, i->index, i->scale, i->disp);
    }
}

static int32_t segment_base_field(const struct tinsn *i)
{
    return i->segment == TI_FS ? BT_CTX(c.segment_base[SEG_FS]) : BT_CTX(c.segment_base[SEG_GS]);
}

/* Adds the segment's base to the address in `ea`. */
static void emit_segment_base(struct translation *t, const struct tinsn *i, unsigned ea, unsigned scratch)
{
    if (i->segment == TI_FLAT)
        return;
    if (t->legacy && !t->guarded[i->segment]) {
        emit_load_gs(&t->out, scratch, i->segment == TI_FS ? BT_CTX(segment_guard[0]) : BT_CTX(segment_guard[1]));
        emit_op_mem(&t->out, false, 0x8b, scratch, scratch, EMIT_NONE, 0, 0);
        t->guarded[i->segment] = true;
    }
    emit_load_gs(&t->out, scratch, segment_base_field(i));
    emit_lea_in_mode(t, ea, ea, scratch, 0, 0);
}

/* V of the page of the address in `from` into `to`, after checking that `size` bytes do not cross into another. */
void emit_lookup(struct translation *t, unsigned to, unsigned from, unsigned size)
{
    if (size > 1) {
        emit_pext_gs(&t->out, to, from, BT_CTX(mask_low12));
        emit_check_byte(&t->out, to, to, BT_CHECK + (int32_t)size - 1);
    }
    emit_rorx(&t->out, to, from, 12);
    emit_load_v(&t->out, to, to);
}

void emit_leave_unless_zero(struct translation *t, const struct tinsn *i, unsigned reg, enum bt_exit why)
{
    struct emitter *out = &t->out;
    emit_store_gs(out, GPR_RCX, BT_CTX(scratch[1]));
    emit_mov(out, GPR_RCX, reg);
    emit8(out, 0xe3); /* jrcxz, over the load and the jump below */
    uint8_t *over = out->at;
    emit8(out, 0);
    emit_load_gs(out, GPR_RCX, BT_CTX(scratch[1]));
    emit8(out, 0xe9);
    uint8_t *displacement = out->at;
    emit32(out, 0);
    defer(t, DEFER_EXIT, i, 0, displacement);
    t->deferred[t->deferred_count - 1].exit = (uint8_t)why;
    *over = (uint8_t)(out->at - (over + 1));
    emit_load_gs(out, GPR_RCX, BT_CTX(scratch[1]));
}

/* The check for instructions that do cross now and then: a branch to the interpreter. `ea` is another register than s[0], which is used. */
static void emit_crossing_branch(struct translation *t, const struct tinsn *i, unsigned ea, unsigned size)
{
    struct emitter *out = &t->out;
    emit_pext_gs(out, t->s[0], ea, BT_CTX(mask_low12));
    emit_lea(out, t->s[0], t->s[0], EMIT_NONE, 0, (int32_t)size - 1);
    emit_pext_gs(out, t->s[0], t->s[0], BT_CTX(mask_bit12));
    emit_leave_unless_zero(t, i, t->s[0], BT_EXIT_crossing);
}

/* The same, if the instruction is marked. Returns how many bytes are left to be checked. */
static unsigned emit_marked_branch(struct translation *t, const struct tinsn *i, unsigned ea, unsigned size)
{
    if (size == 1 || !cache_marked(t->e, t->page, i->offset, BT_MARK_CROSSES))
        return size;
    emit_crossing_branch(t, i, ea, size);
    return 1;
}

/* To the rest of the block as a careful one when the group's range crosses a page. With JRCXZ, because flags are the guest's. */
static void emit_group_check(struct translation *t, const struct tinsn *i, unsigned from, unsigned size)
{
    struct emitter *out = &t->out;
    emit_pext_gs(out, t->s[0], from, BT_CTX(mask_low12));
    emit_check_byte(out, t->s[0], t->s[0], BT_SPLIT + (int32_t)size - 1);
    emit_store_gs(out, GPR_RCX, BT_CTX(scratch[1]));
    emit_mov(out, GPR_RCX, t->s[0]);
    emit8(out, 0xe3); /* jrcxz, over the load and the jump below */
    uint8_t *over = out->at;
    emit8(out, 0);
    emit_load_gs(out, GPR_RCX, BT_CTX(scratch[1]));
    align_displacement(out, 1);
    emit8(out, 0xe9);
    uint8_t *displacement = out->at;
    emit32(out, 0);
    defer(t, DEFER_CAREFUL, i, i->offset, displacement);
    *over = (uint8_t)(out->at - (over + 1));
    emit_load_gs(out, GPR_RCX, BT_CTX(scratch[1]));
}

/* Where [base + disp] of the group is; the first use looks V up. */
static struct address emit_group_access(struct translation *t, const struct tinsn *i, struct group *g, int32_t disp, uint8_t *v_register)
{
    if (g->fresh) {
        unsigned from = g->base;
        if (g->low) {
            from = t->s[1];
            emit_lea_in_mode(t, from, g->base, EMIT_NONE, 0, g->low);
        }
        emit_group_check(t, i, from, (unsigned)(g->high - g->low));
        emit_lookup(t, g->v, from, 1);
        if (t->legacy)
            emit_lea(&t->out, g->v, from, g->v, 0, 0);
        g->fresh = false;
    } else {
        *v_register = g->v;
    }
    if (t->legacy)
        return (struct address){g->v, EMIT_NONE, disp - g->low};
    return (struct address){g->base, g->v, disp};
}

/* The operand, addressable until s[0] or s[1] is used again. */
struct address emit_access(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    struct group *g = i->plain_base ? group_find(t, i->base, i->disp, i->mem_size) : NULL;
    if (g)
        return emit_group_access(t, i, g, i->disp, &site->v_memory);
    unsigned v = t->s[0], ea = t->s[1], size = i->aligned ? 1 : i->mem_size;
    if (i->plain_base && !i->disp) {
        ea = i->base;
    } else {
        emit_effective_address(t, i, ea);
        emit_segment_base(t, i, ea, v);
    }
    emit_lookup(t, v, ea, emit_marked_branch(t, i, ea, size));
    return (struct address){ea, v, 0};
}

/* The same in 32-bit code, where the unit's address wraps around: the distance, of which `units` has the number of units, is taken off its host address again. */
static struct address emit_bit_string_legacy(struct translation *t, const struct tinsn *i, unsigned units)
{
    struct emitter *out = &t->out;
    unsigned kept = t->s[2], v = t->s[0], ea = t->s[1], size = i->mem_size, shift = (unsigned)__builtin_ctz(size);
    emit_mov(out, kept, units);
    emit_effective_address(t, i, ea);
    emit_lea_in_mode(t, ea, ea, kept, shift, 0);
    emit_segment_base(t, i, ea, v);
    emit_lookup(t, v, ea, emit_marked_branch(t, i, ea, size));
    emit_op_reg(out, true, 0xf7, 2, kept); /* not: -1 - units */
    emit_lea(out, ea, ea, kept, shift, (int32_t)i->mem_size);
    return (struct address){ea, v, 0};
}

/* Where BT and its like find their bit: the offset in a register reaches beyond the operand in units of its size, both ways (SDM vol. 2, BT). The host's instruction adds the
 * distance itself, so only V is looked up at the unit. */
struct address emit_bit_string_access(struct translation *t, const struct tinsn *i)
{
    struct emitter *out = &t->out;
    unsigned v = t->s[0], ea = t->s[1], size = i->mem_size, shift = (unsigned)__builtin_ctz(size);
    if (size == 8)
        emit_mov(out, v, i->reg);
    else if (size == 4)
        emit_op_reg(out, true, 0x63, v, i->reg); /* MOVSXD */
    else
        emit_movsx16(out, v, i->reg);
    emit_mov_imm32(out, ea, shift + 3);
    emit_sarx(out, v, v, ea);
    if (t->legacy)
        return emit_bit_string_legacy(t, i, v);
    emit_effective_address(t, i, ea);
    emit_lea(out, ea, ea, v, shift, 0);
    emit_segment_base(t, i, ea, v);
    emit_lookup(t, v, ea, emit_marked_branch(t, i, ea, size));
    if (i->segment == TI_FLAT) {
        emit_effective_address(t, i, ea);
    } else { /* three summands, and one register to add them in */
        emit_load_gs(out, ea, segment_base_field(i));
        emit_lea(out, ea, ea, i->index, i->scale, i->disp);
        if (i->base != TI_NONE)
            emit_lea(out, ea, i->base, ea, 0, 0); /* RSP is no index */
    }
    return (struct address){ea, v, 0};
}

const uint8_t *insn_bytes(const struct translation *t, const struct tinsn *i)
{
    if (i->offset + i->length > PAGE_SIZE_BYTES)
        return t->crossing;
    return t->code + (i->offset - t->code_offset);
}

static bool is_segment_prefix(uint8_t byte)
{
    return byte == 0x26 || byte == 0x2e || byte == 0x36 || byte == 0x3e || byte == 0x64 || byte == 0x65;
}

/* VEX, EVEX, XOP: X in bit 6 and B in bit 5 of the first payload byte, inverted. `extension` has them as in REX. */
static unsigned with_extension(unsigned payload, unsigned extension)
{
    return (payload & ~0x60u) | (~extension & 3) << 5;
}

/* The guest's instruction with its memory operand at `a`. */
void emit_rewritten(struct translation *t, const struct tinsn *i, struct address a)
{
    const uint8_t *p = insn_bytes(t, i);
    struct emitter *out = &t->out;
    unsigned extension = emit_rex_of(false, EMIT_NONE, a.base, a.index), at = i->opcode_at;
    if (i->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
        for (unsigned n = 0; n < at; n++)
            if (!is_segment_prefix(p[n]) && p[n] != 0x67 && (p[n] & 0xf0) != 0x40)
                emit8(out, p[n]);
        if (i->rex || extension)
            emit8(out, 0x40 | (i->rex & 0x0c) | extension);
    } else if (p[at] == 0xc5) { /* two-byte VEX has no X and B: make it three bytes, map 0F, W 0 */
        emit8(out, 0xc4);
        emit8(out, with_extension((p[at + 1] & 0x80u) | 1, extension));
        emit8(out, p[at + 1] & 0x7f);
        at += 2;
    } else {
        emit8(out, p[at]);
        emit8(out, with_extension(p[at + 1], extension));
        at += 2;
    }
    while (at < i->modrm_at)
        emit8(out, p[at++]);
    emit_address(out, p[i->modrm_at] >> 3 & 7, a.base, a.index, 0, a.disp, i->encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX);
    for (at = i->tail_at; at < i->length; at++)
        emit8(out, p[at]);
}

void emit_copy(struct translation *t, const struct tinsn *i)
{
    memcpy(t->out.at, insn_bytes(t, i), i->length);
    t->out.at += i->length;
}

/* MOV between rAX and memory, as the form with ModRM. */
void emit_moffs(struct translation *t, const struct tinsn *i, struct address a)
{
    if (i->mem_size == 2)
        emit8(&t->out, 0x66);
    emit_op_mem(&t->out, i->mem_size == 8, (i->mem_write ? 0x88u : 0x8au) + (i->mem_size > 1), GPR_RAX, a.base, a.index, 0, a.disp);
}

/* INC and DEC of a register, whose short forms are REX prefixes in 64-bit mode. */
void emit_count(struct translation *t, const struct tinsn *i)
{
    if (i->mem_size == 2)
        emit8(&t->out, 0x66);
    emit_op_reg(&t->out, false, 0xff, i->condition, i->reg);
}

/* ---- the stack ---- */

void emit_rsp_add(struct translation *t, int32_t by)
{
    emit_lea_in_mode(t, GPR_RSP, GPR_RSP, EMIT_NONE, 0, by);
}

/* The slot at [base + disp] that the instruction implies; uses s[0], and s[1] when `disp` is not zero: in 32-bit code until the access is made. */
struct address emit_stack_access(struct translation *t, struct bt_site *site, unsigned base, int32_t disp)
{
    const struct tinsn *i = &t->insn[t->at];
    struct group *g = group_find(t, base, disp, stack_bytes(i));
    if (g)
        return emit_group_access(t, i, g, disp, &site->v_stack);
    unsigned from = base;
    if (disp) {
        from = t->s[1];
        emit_lea_in_mode(t, from, base, EMIT_NONE, 0, disp);
    }
    emit_lookup(t, t->s[0], from, emit_marked_branch(t, i, from, stack_bytes(i)));
    if (t->legacy) /* the very address that was looked up: base + disp may be another modulo 2^64 */
        return (struct address){from, t->s[0], 0};
    return (struct address){base, t->s[0], disp};
}

void emit_at(struct translation *t, unsigned opcode, unsigned reg, struct address a)
{
    emit_op_mem(&t->out, !t->legacy, opcode, reg, a.base, a.index, 0, a.disp);
}

/* Where a push writes. */
struct address emit_push_access(struct translation *t, struct bt_site *site)
{
    return emit_stack_access(t, site, GPR_RSP, -(int32_t)stack_bytes(&t->insn[t->at]));
}

void emit_push_done(struct translation *t)
{
    emit_rsp_add(t, -(int32_t)stack_bytes(&t->insn[t->at]));
}

void emit_push_reg(struct translation *t, struct bt_site *site, unsigned reg)
{
    emit_at(t, 0x89, reg, emit_push_access(t, site));
    emit_push_done(t);
}

void emit_push_rip(struct translation *t, struct bt_site *site, int32_t offset)
{
    struct address a = emit_push_access(t, site);
    emit_load_gs(&t->out, t->s[2], BT_CTX(page_va));
    emit_lea_in_mode(t, t->s[2], t->s[2], EMIT_NONE, 0, offset - (t->legacy ? (int32_t)BT_CODE_BIAS : 0));
    emit_at(t, 0x89, t->s[2], a);
    emit_push_done(t);
}

void emit_pop_to(struct translation *t, struct bt_site *site, unsigned to)
{
    emit_at(t, 0x8b, to, emit_stack_access(t, site, GPR_RSP, 0));
}
