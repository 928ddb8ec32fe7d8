/*
 * Which guest registers are in host registers, and which pages of memory are known (groups).
 *
 * t->free are scratch registers, whose guest values are in cpu.gpr[]; t->clean are those whose values there are current all the same. A group keeps V of one page in a scratch
 * register for accesses off one base register that follow each other; its range moves with the base register when that is moved by a constant.
 * Threading: e->lock held, like all of a translation.
 */
#include "engine/bt/translate_priv.h"

#define GROUP_USES_MIN 3 /* fewer do not pay for the check */

/* ---- registers ---- */

uint16_t pinned(const struct translation *t)
{
    uint16_t mask = 0;
    for (unsigned n = 0; n < GROUPS; n++)
        if (t->group[n].v != TI_NONE)
            mask |= BIT(t->group[n].v);
    return mask;
}

/* Of the candidates, a set that is not empty, the one that is named again last. Where the block ends or jumps join, all but t->canonical must be back. */
static unsigned named_last(const struct translation *t, uint16_t candidates)
{
    for (unsigned n = t->at + 1; n < t->count && !is_join(t, n); n++) {
        uint16_t left = candidates & (uint16_t)~(t->insn[n].reads | t->insn[n].writes);
        if (!left)
            return (unsigned)__builtin_ctz(candidates);
        candidates = left;
    }
    return (unsigned)__builtin_ctz(candidates & t->canonical ? candidates & t->canonical : candidates);
}

/* Makes one more register scratch, not one of those in `kept`. */
static unsigned register_spill(struct translation *t, uint16_t kept, bool low)
{
    kept |= t->free | BIT(GPR_RSP);
    unsigned best = named_last(t, (uint16_t)~kept & (low ? 0xff : 0xffff));
    if (!(t->clean & BIT(best)))
        emit_store_gs(&t->out, best, BT_CTX_GPR(best));
    t->clean |= BIT(best);
    t->free |= BIT(best);
    return best;
}

/* A scratch register that is not in `taken`. */
unsigned register_scratch(struct translation *t, uint16_t named, uint16_t taken, bool low)
{
    uint16_t usable = t->free & ~taken & (low ? 0xff : 0xffff);
    if (usable & t->canonical)
        usable &= t->canonical;
    return usable ? (unsigned)__builtin_ctz(usable) : register_spill(t, named | taken, low);
}

/* Gives the instruction the registers that it names. */
void registers_return(struct translation *t, uint16_t named)
{
    for (unsigned n = 0; n < GROUPS; n++)
        if (t->group[n].v != TI_NONE && named & BIT(t->group[n].v))
            t->group[n].v = TI_NONE;
    uint16_t back = named & t->free;
    for (unsigned left = back; left; left &= left - 1) {
        unsigned r = (unsigned)__builtin_ctz(left);
        emit_load_gs(&t->out, r, BT_CTX_GPR(r));
    }
    t->free &= (uint16_t)~back;
    t->clean |= back;
}

/* Emits what makes those scratch that are at block boundaries, from the state given. */
void canonical_emit(struct translation *t, uint16_t free, uint16_t clean)
{
    for (unsigned left = t->canonical & ~(free | clean); left; left &= left - 1) {
        unsigned r = (unsigned)__builtin_ctz(left);
        emit_store_gs(&t->out, r, BT_CTX_GPR(r));
    }
    for (unsigned left = free & ~t->canonical; left; left &= left - 1) {
        unsigned r = (unsigned)__builtin_ctz(left);
        emit_load_gs(&t->out, r, BT_CTX_GPR(r));
    }
}

void groups_forget(struct translation *t)
{
    for (unsigned n = 0; n < GROUPS; n++)
        t->group[n].v = TI_NONE;
}

void canonicalize(struct translation *t)
{
    canonical_emit(t, t->free, t->clean);
    t->free = t->canonical;
    t->s[0] = GPR_R10;
    t->s[1] = t->s[2] = GPR_R11;
    groups_forget(t);
}

/* ---- groups of accesses ---- */

/* What the instruction does to the register: true: adds *by; false: anything. */
static bool register_moves(const struct tinsn *i, unsigned reg, int32_t *by)
{
    *by = 0;
    if (!(i->writes & BIT(reg)))
        return true;
    if (reg == GPR_RSP && i->implied == GPR_RSP) {
        *by = i->implied_disp ? i->implied_disp : (int32_t)stack_bytes(i);
        return !(i->kind == TI_POP_REG && i->reg == GPR_RSP);
    }
    *by = i->adjust;
    return i->adjusts == reg && i->adjust > -(1 << 20) && i->adjust < 1 << 20;
}

static void range_add(struct group *g, int32_t low, unsigned size)
{
    if (low < g->low)
        g->low = low;
    if (low + (int32_t)size > g->high)
        g->high = low + (int32_t)size;
}

/* The range of accesses off `base` from the current instruction on. Returns their number. */
static unsigned group_look_ahead(const struct translation *t, unsigned base, struct group *g)
{
    int32_t moved = 0, by;
    unsigned uses = 0;
    *g = (struct group){.base = (uint8_t)base, .low = INT32_MAX, .high = INT32_MIN};
    for (unsigned n = t->at; n < t->count && (n == t->at || !is_join(t, n)); n++) {
        const struct tinsn *i = &t->insn[n];
        bool plain = i->plain_base && i->base == base && i->disp > -(1 << 24) && i->disp < 1 << 24, implied = i->implied == base;
        if (plain || implied) {
            struct group wider = *g;
            if (plain)
                range_add(&wider, moved + i->disp, i->mem_size);
            if (implied)
                range_add(&wider, moved + i->implied_disp, stack_bytes(i));
            if (wider.high - wider.low > t->e->debug.group_span)
                break;
            *g = wider;
            uses += (unsigned)plain + (unsigned)implied;
        }
        if (!register_moves(i, base, &by))
            break;
        moved += by;
        if (moved < -MOVED_MAX || moved > MOVED_MAX)
            break;
    }
    return uses;
}

struct group *group_find(struct translation *t, unsigned base, int32_t disp, unsigned size)
{
    for (unsigned n = 0; n < GROUPS; n++) {
        struct group *g = &t->group[n];
        if (g->v != TI_NONE && g->base == base && disp >= g->low && disp + (int32_t)size <= g->high)
            return g;
    }
    return NULL;
}

/* A group for an access of the current instruction, if there is one or one is worth while. Before the instruction's site begins, because it may spill a register. */
static void group_provide(struct translation *t, const struct tinsn *i, unsigned base, int32_t disp, unsigned size)
{
    struct group ahead;
    if (group_find(t, base, disp, size) || i->kind == TI_EXIT || cache_marked(t->e, t->page, i->offset, BT_MARK_CROSSES))
        return;
    if (group_look_ahead(t, base, &ahead) < GROUP_USES_MIN || disp < ahead.low || disp + (int32_t)size > ahead.high)
        return;
    struct group *g = NULL;
    for (unsigned n = 0; n < GROUPS; n++)
        if (t->group[n].v != TI_NONE && t->group[n].base == base)
            t->group[n].v = TI_NONE;
    for (unsigned n = 0; n < GROUPS && !g; n++)
        if (t->group[n].v == TI_NONE)
            g = &t->group[n];
    if (!g || g->fresh) {
        if (t->group[0].v != TI_NONE && t->group[0].fresh)
            return;
        g = &t->group[0];
    }
    g->v = TI_NONE;
    uint16_t named = i->reads | i->writes;
    ahead.v = (uint8_t)register_scratch(t, named, named | pinned(t), false);
    ahead.fresh = true;
    *g = ahead;
}

void groups_provide(struct translation *t, const struct tinsn *i)
{
    if (i->kind == TI_EXIT || i->high_byte || t->careful)
        return;
    if (i->plain_base)
        group_provide(t, i, i->base, i->disp, i->mem_size);
    if (i->implied != TI_NONE)
        group_provide(t, i, i->implied, i->implied_disp, stack_bytes(i));
}

/* After the instruction: the ranges follow their base registers. */
void groups_move(struct translation *t, const struct tinsn *i)
{
    int32_t by;
    for (unsigned n = 0; n < GROUPS; n++) {
        struct group *g = &t->group[n];
        if (g->v == TI_NONE)
            continue;
        if (g->fresh || !register_moves(i, g->base, &by)) {
            g->v = TI_NONE;
            continue;
        }
        g->low -= by;
        g->high -= by;
    }
}
