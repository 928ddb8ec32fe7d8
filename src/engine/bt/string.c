/*
 * String instructions.
 *
 * Translated code runs with DF clear (bt_usable), so everything goes upwards. Single ones become moves and compares; REP MOVS and REP STOS become the host's own when each operand stays
 * in one page, which a sum of what is beyond it tells without touching flags, and leave otherwise. While the host's instruction runs, RSI and RDI are host addresses: the site says so, and
 * scratch[STRING_RDI_END] and scratch[STRING_RSI_END] tell where the guest's will be at its end.
 * Threading: e->lock held, like all of a translation.
 */
#include "engine/bt/translate_priv.h"

static bool uses_source(enum string_op op)
{
    return op == STRING_MOVS || op == STRING_LODS || op == STRING_CMPS;
}

static bool uses_destination(enum string_op op)
{
    return op != STRING_LODS;
}

unsigned string_accesses(const struct bt_vcpu *b, const struct tinsn *i, struct bt_access *access)
{
    const uint64_t *gpr = b->c.v.cpu.gpr;
    enum string_op op = (enum string_op)i->condition;
    const struct bt_access source = {gpr[GPR_RSI], i->mem_size, false, false};
    const struct bt_access destination = {gpr[GPR_RDI], i->mem_size, op == STRING_MOVS || op == STRING_STOS, false};
    unsigned count = 0;
    if (op == STRING_CMPS)
        access[count++] = destination;
    if (uses_source(op))
        access[count++] = source;
    if (uses_destination(op) && op != STRING_CMPS)
        access[count++] = destination;
    return count;
}

/* ---- one element ---- */

/* opcode reg, [base + index] for an element; `opcode` is the one for bytes, others have the next. */
static void emit_element(struct emitter *out, unsigned size, unsigned opcode, unsigned reg, unsigned base, unsigned index)
{
    unsigned rex = emit_rex_of(size == 8, reg, base, index);
    if (size == 2)
        emit8(out, 0x66);
    if (rex || (size == 1 && reg > 3)) /* without REX, 4 to 7 are AH to BH */
        emit8(out, 0x40 | rex);
    emit8(out, size == 1 ? opcode : opcode + 1);
    emit_address(out, reg, base, index, 0, 0, true);
}

static void emit_one(struct translation *t, const struct tinsn *i)
{
    struct emitter *out = &t->out;
    unsigned size = i->mem_size, v = t->s[0], value = t->s[1];
    enum string_op op = (enum string_op)i->condition;
    if (op == STRING_CMPS) { /* processors read rDI's operand first: with both bad it is the one that faults */
        emit_lookup(t, value, GPR_RDI, size);
        emit_element(out, size, 0x8a, value, GPR_RDI, value);
        emit_lookup(t, v, GPR_RSI, size);
        emit_element(out, size, 0x38, value, GPR_RSI, v);
    } else if (uses_source(op)) {
        emit_lookup(t, v, GPR_RSI, size);
        emit_element(out, size, 0x8a, op == STRING_LODS ? GPR_RAX : value, GPR_RSI, v);
    }
    if (uses_destination(op) && op != STRING_CMPS) {
        emit_lookup(t, v, GPR_RDI, size);
        emit_element(out, size, op == STRING_SCAS ? 0x3a : 0x88, op == STRING_MOVS ? value : GPR_RAX, GPR_RDI, v);
    }
    if (uses_destination(op))
        emit_lea_in_mode(t, GPR_RDI, GPR_RDI, EMIT_NONE, 0, (int32_t)size);
    if (uses_source(op))
        emit_lea_in_mode(t, GPR_RSI, GPR_RSI, EMIT_NONE, 0, (int32_t)size);
}

/* ---- repeated ---- */

/* `to` is 0 when RCX elements at `reg` end in its page; only true when RCX itself is small. */
static void emit_beyond(struct translation *t, unsigned to, unsigned reg, unsigned shift)
{
    emit_pext_gs(&t->out, to, reg, BT_CTX(mask_low12));
    emit_lea(&t->out, to, to, GPR_RCX, shift, -1);
    emit_pext_gs(&t->out, to, to, BT_CTX(mask_page));
}

static void emit_end_note(struct translation *t, unsigned reg, unsigned shift, unsigned number)
{
    emit_lea_in_mode(t, t->s[0], reg, GPR_RCX, shift, 0);
    emit_store_gs(&t->out, t->s[0], BT_CTX(scratch) + 8 * (int32_t)number);
}

static void emit_host_address(struct translation *t, unsigned reg)
{
    emit_lookup(t, t->s[0], reg, 1);
    emit_lea(&t->out, reg, reg, t->s[0], 0, 0);
}

static void emit_repeated(struct translation *t, const struct tinsn *i)
{
    struct emitter *out = &t->out;
    unsigned size = i->mem_size, shift = (unsigned)__builtin_ctz(size);
    bool source = i->condition == STRING_MOVS;
    emit_pext_gs(out, t->s[0], GPR_RCX, BT_CTX(mask_count));
    for (unsigned n = 0; n < (source ? 2u : 1u); n++) {
        emit_beyond(t, t->s[1], n ? GPR_RSI : GPR_RDI, shift);
        emit_lea(out, t->s[0], t->s[0], t->s[1], 0, 0);
    }
    emit_leave_unless_zero(t, i, t->s[0], BT_EXIT_string);
    emit_end_note(t, GPR_RDI, shift, STRING_RDI_END);
    if (source)
        emit_end_note(t, GPR_RSI, shift, STRING_RSI_END);
    /* Both are looked up before either changes. */
    unsigned v = t->s[1];
    emit_lookup(t, v, GPR_RDI, 1);
    if (source)
        emit_host_address(t, GPR_RSI);
    emit_lea(out, GPR_RDI, GPR_RDI, v, 0, 0);
    site_string(t, i, size, source);
    emit8(out, 0xf3);
    if (size == 2)
        emit8(out, 0x66);
    if (size == 8)
        emit8(out, 0x48);
    emit8(out, (source ? 0xa4u : 0xaau) + (size > 1));
    emit_load_gs(out, GPR_RDI, BT_CTX(scratch) + 8 * STRING_RDI_END);
    if (source)
        emit_load_gs(out, GPR_RSI, BT_CTX(scratch) + 8 * STRING_RSI_END);
}

void emit_string(struct translation *t, const struct tinsn *i)
{
    if (i->repeated)
        emit_repeated(t, i);
    else
        emit_one(t, i);
}
