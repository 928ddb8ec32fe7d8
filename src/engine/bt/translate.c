/*
 * Translation of one block: decode up to its end (analyze.c), then emit.
 *
 * A block lies in one page and goes on past conditional branches until something else transfers control. Some host registers are scratch at any time (t->free), at entries and exits
 * exactly R10 and R11. An instruction that names one of them gets it back, and another, the one that is named again last, takes its place.
 * Accesses off one base register form a group when they follow each other: one lookup, checked for the range of all of them, whose V stays in a scratch register.
 * Each instruction starts a site: host code that can be started again from there, because no guest state changes before the last access that can fault.
 * Threading: e->lock held.
 */
#include <string.h>

#include "engine/bt/emit.h"
#include "engine/bt/translate_priv.h"

#define INSNS_MAX BT_BLOCK_INSNS_MAX
#define DEFERRED_MAX (INSNS_MAX + 2)
#define SITES_MAX (INSNS_MAX * 3)

#define GROUPS 2
#define MOVED_MAX (4 * (int32_t)BT_GROUP_SPAN_MAX)
#define CANONICAL (BIT(GPR_R10) | BIT(GPR_R11))

#define BIT(r) ((uint16_t)(1u << (r)))

enum deferred_kind { DEFER_BRANCH, DEFER_EXIT };

/* Code that is put after the block's straight line. */
struct deferred {
    uint8_t kind;
    uint16_t free, clean;
    uint8_t exit;
    uint16_t offset; /* of the instruction */
    int32_t target;
    uint8_t *patch;  /* the 32-bit displacement that leads here */
};

/* Accesses at [base + low, base + high) lie in one page, whose V is in `v` from the first of them on. */
struct group {
    uint8_t base, v; /* v TI_NONE: not in use */
    bool fresh;      /* not looked up yet */
    int32_t low, high;
};

struct translation {
    struct bt_engine *e;
    struct bt_page *page;
    struct emitter out;
    uint8_t *start;
    uint8_t s[2];   /* two scratch registers for the instruction being translated */
    uint16_t free;  /* scratch registers: their guest values are in cpu.gpr[] */
    uint16_t clean; /* registers whose value in cpu.gpr[] is the current one */
    struct group group[GROUPS];
    bool poll_sti;  /* STI was translated: look for interrupts after the next instruction */
    unsigned count, at; /* instructions; the one being translated */
    unsigned sites, deferred_count;
    struct tinsn insn[INSNS_MAX];
    struct bt_site site[SITES_MAX];
    struct deferred deferred[DEFERRED_MAX];
};

static bool bitmap_has(const uint8_t *map, unsigned n)
{
    return map[n / 8] >> (n % 8) & 1;
}

/* ---- registers ---- */

static unsigned distance_to_use(const struct translation *t, unsigned reg)
{
    for (unsigned n = t->at + 1; n < t->count; n++)
        if ((t->insn[n].reads | t->insn[n].writes) & BIT(reg))
            return n;
    return t->count + (reg == 11 || reg == 10); /* at the end all but these must be back */
}

static uint16_t pinned(const struct translation *t)
{
    uint16_t mask = 0;
    for (unsigned n = 0; n < GROUPS; n++)
        if (t->group[n].v != TI_NONE)
            mask |= BIT(t->group[n].v);
    return mask;
}

/* Makes one more register scratch: of those not in `kept` the one that is named again last. */
static unsigned register_spill(struct translation *t, uint16_t kept, bool low)
{
    unsigned best = TI_NONE, best_distance = 0;
    kept |= t->free | BIT(GPR_RSP);
    for (unsigned r = 0; r < (low ? 8u : 16u); r++) {
        unsigned distance = distance_to_use(t, r) + 1;
        if (!(kept & BIT(r)) && distance > best_distance) {
            best = r;
            best_distance = distance;
        }
    }
    if (!(t->clean & BIT(best)))
        emit_store_gs(&t->out, best, BT_CTX_GPR(best));
    t->clean |= BIT(best);
    t->free |= BIT(best);
    return best;
}

/* A scratch register that is not in `taken`. */
static unsigned register_scratch(struct translation *t, uint16_t named, uint16_t taken, bool low)
{
    uint16_t usable = t->free & ~taken & (low ? 0xff : 0xffff);
    if (usable & CANONICAL)
        usable &= CANONICAL;
    return usable ? (unsigned)__builtin_ctz(usable) : register_spill(t, named | taken, low);
}

/* Gives the instruction the registers that it names. */
static void registers_return(struct translation *t, uint16_t named)
{
    for (unsigned n = 0; n < GROUPS; n++)
        if (t->group[n].v != TI_NONE && named & BIT(t->group[n].v))
            t->group[n].v = TI_NONE;
    for (unsigned r = 0; r < 16; r++)
        if (named & t->free & BIT(r)) {
            emit_load_gs(&t->out, r, BT_CTX_GPR(r));
            t->free &= (uint16_t)~BIT(r);
            t->clean |= BIT(r);
        }
}

/* Emits what makes R10 and R11 the scratch registers, from the state given. */
static void canonical_emit(struct emitter *out, uint16_t free, uint16_t clean)
{
    for (unsigned r = 0; r < 16; r++) {
        if (CANONICAL & BIT(r)) {
            if (!((free | clean) & BIT(r)))
                emit_store_gs(out, r, BT_CTX_GPR(r));
        } else if (free & BIT(r)) {
            emit_load_gs(out, r, BT_CTX_GPR(r));
        }
    }
}

static void canonicalize(struct translation *t)
{
    canonical_emit(&t->out, t->free, t->clean);
    t->free = CANONICAL;
    t->s[0] = GPR_R10;
    t->s[1] = GPR_R11;
    for (unsigned n = 0; n < GROUPS; n++)
        t->group[n].v = TI_NONE;
}

/* ---- groups of accesses ---- */

static bool has_plain_base(const struct tinsn *i)
{
    return i->memory && i->base != TI_NONE && i->index == TI_NONE && !i->address32 && i->segment == TI_FLAT && !i->rip_relative;
}

/* The access that the instruction implies: its base register, or TI_NONE, and its displacement; all are 8 bytes. */
static unsigned implied_base(const struct tinsn *i, int32_t *disp)
{
    *disp = 0;
    switch (i->kind) {
    case TI_PUSH_REG:
    case TI_PUSH_IMM:
    case TI_PUSH_MEM:
    case TI_PUSHF:
    case TI_CALL:
    case TI_CALL_REG:
    case TI_CALL_MEM:
        *disp = -8;
        return GPR_RSP;
    case TI_POP_REG:
    case TI_RET:
        return GPR_RSP;
    case TI_LEAVE:
        return GPR_RBP;
    default:
        return TI_NONE;
    }
}

/* What the instruction does to the register: true: adds *by; false: anything. */
static bool register_moves(const struct tinsn *i, unsigned reg, int32_t *by)
{
    *by = 0;
    if (!(i->writes & BIT(reg)))
        return true;
    int32_t disp;
    if (reg == GPR_RSP && i->kind != TI_LEAVE && implied_base(i, &disp) == GPR_RSP) {
        *by = disp ? disp : 8;
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
    int32_t moved = 0, by, disp;
    unsigned uses = 0;
    *g = (struct group){.base = (uint8_t)base, .low = INT32_MAX, .high = INT32_MIN};
    for (unsigned n = t->at; n < t->count; n++) {
        const struct tinsn *i = &t->insn[n];
        struct group wider = *g;
        unsigned more = 0;
        if (has_plain_base(i) && i->base == base && i->disp > -(1 << 24) && i->disp < 1 << 24) {
            range_add(&wider, moved + i->disp, i->mem_size);
            more++;
        }
        if (implied_base(i, &disp) == base) {
            range_add(&wider, moved + disp, 8);
            more++;
        }
        if (more && wider.high - wider.low > t->e->debug.group_span)
            break;
        if (more)
            *g = wider;
        uses += more;
        if (!register_moves(i, base, &by))
            break;
        moved += by;
        if (moved < -MOVED_MAX || moved > MOVED_MAX)
            break;
    }
    return uses;
}

static struct group *group_find(struct translation *t, unsigned base, int32_t disp, unsigned size)
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
    if (group_find(t, base, disp, size) || i->kind == TI_EXIT || bitmap_has(t->page->odd_sites, i->offset))
        return;
    if (group_look_ahead(t, base, &ahead) < 2 || disp < ahead.low || disp + (int32_t)size > ahead.high)
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

static void groups_provide(struct translation *t, const struct tinsn *i)
{
    int32_t disp;
    if (i->kind == TI_EXIT || i->high_byte)
        return;
    if (has_plain_base(i))
        group_provide(t, i, i->base, i->disp, i->mem_size);
    unsigned base = implied_base(i, &disp);
    if (base != TI_NONE)
        group_provide(t, i, base, disp, 8);
}

/* After the instruction: the ranges follow their base registers. */
static void groups_move(struct translation *t, const struct tinsn *i)
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

/* ---- sites ---- */

static struct bt_site *site_add(struct translation *t, enum bt_site_kind kind, unsigned page_offset, uint16_t free)
{
    struct bt_site *site = &t->site[t->sites++];
    *site = (struct bt_site){
        .tc_offset = (uint16_t)(t->out.at - t->start),
        .page_offset = (uint16_t)page_offset,
        .spilled = free,
        .kind = (uint8_t)kind,
        .v_memory = TI_NONE,
        .v_stack = TI_NONE,
    };
    return site;
}

static struct bt_site *site_here(struct translation *t, const struct tinsn *i)
{
    return site_add(t, SITE_INSN, i->offset, t->free);
}

/* ---- jumps ---- */

static void emit_rel32(struct emitter *out, const uint8_t *target)
{
    emit32(out, (uint32_t)(target - (out->at + 4)));
}

static const uint8_t *stub_address(const struct translation *t, uint32_t stub)
{
    return t->e->layout.tc_write + stub;
}

/* Leaves for good; R11 has the guest's rip. */
static void emit_leave(struct translation *t, enum bt_exit reason)
{
    emit_mov_imm32(&t->out, 10, reason);
    emit8(&t->out, 0xe9);
    emit_rel32(&t->out, stub_address(t, t->e->stubs.leave));
}

static void emit_rip(struct translation *t, int32_t offset)
{
    emit_load_gs(&t->out, 11, BT_CTX(page_va));
    if (offset)
        emit_lea(&t->out, 11, 11, EMIT_NONE, 0, offset);
}

/* `rsp_adjust`: what the branch at `offset` has already added to RSP. */
static void emit_transfer_from(struct translation *t, unsigned offset, int rsp_adjust)
{
    struct bt_site *site = site_add(t, SITE_JUMP, offset, CANONICAL);
    site->rsp_adjust = (int8_t)rsp_adjust;
    emit_transfer(&t->out, (uint32_t)(uintptr_t)t->e->layout.tc_exec);
}

/* So that the four bytes after `opcode_bytes` do not cross a cache line: they are patched while others may run them. */
static void align_displacement(struct emitter *out, unsigned opcode_bytes)
{
    while (((uintptr_t)out->at + opcode_bytes) % 64 > 60)
        emit8(out, 0x90);
}

static bool in_page(int32_t offset)
{
    return offset >= 0 && offset < (int32_t)PAGE_SIZE_BYTES;
}

/* First execution of a direct jump: `displacement` is patched to the target by the run loop. */
static void emit_link_exit(struct translation *t, const uint8_t *displacement, int32_t target)
{
    emit_rip(t, target);
    emit_mov_imm32(&t->out, 10, (uint32_t)(displacement - t->e->layout.tc_write));
    emit_store_gs(&t->out, 10, BT_CTX(link_site));
    emit_leave(t, BT_EXIT_link);
}

static void defer(struct translation *t, enum deferred_kind kind, const struct tinsn *i, int32_t target, uint8_t *patch)
{
    t->deferred[t->deferred_count++] = (struct deferred){
        .kind = (uint8_t)kind, .free = t->free, .clean = t->clean, .exit = i->exit, .offset = i->offset, .target = target, .patch = patch,
    };
}

static void patch_here(const struct translation *t, uint8_t *displacement)
{
    *(uint32_t *)displacement = (uint32_t)(t->out.at - (displacement + 4));
}

static void deferred_emit(struct translation *t, const struct deferred *d)
{
    patch_here(t, d->patch);
    uint8_t *before = t->out.at, *displacement = d->patch;
    canonical_emit(&t->out, d->free, d->clean);
    if (d->kind == DEFER_EXIT) {
        emit_rip(t, d->offset);
        emit_leave(t, d->exit);
    } else if (!in_page(d->target)) {
        emit_rip(t, d->target);
        emit_transfer_from(t, d->offset, 0);
    } else {
        if (t->out.at != before) { /* the jump that will be patched comes after the exchange of registers */
            align_displacement(&t->out, 1);
            emit8(&t->out, 0xe9);
            displacement = t->out.at;
            emit32(&t->out, 0);
        }
        emit_link_exit(t, displacement, d->target);
    }
}

/* Back edges look whether the host wants the processor. */
static void emit_poll(struct translation *t, int32_t field)
{
    emit_load_gs(&t->out, t->s[0], field);
    emit_op_mem(&t->out, false, 0x8b, t->s[0], t->s[0], EMIT_NONE, 0, 0);
}

/* From canonical state, to any offset. */
static void emit_goto(struct translation *t, const struct tinsn *i, int32_t target)
{
    if (!in_page(target)) {
        emit_rip(t, target);
        emit_transfer_from(t, i->offset, 0);
        return;
    }
    align_displacement(&t->out, 1);
    emit8(&t->out, 0xe9);
    uint8_t *displacement = t->out.at;
    emit32(&t->out, 0);
    defer(t, DEFER_BRANCH, i, target, displacement);
}

/* ---- memory operands ---- */

struct address {
    unsigned base, index;
    int32_t disp;
};

static void emit_effective_address(struct translation *t, const struct tinsn *i, unsigned to)
{
    struct emitter *out = &t->out;
    if (i->rip_relative) {
        emit_load_gs(out, to, BT_CTX(page_va));
        emit_lea(out, to, to, EMIT_NONE, 0, i->disp + i->offset + i->length);
    } else if (i->base == TI_NONE && i->index == TI_NONE) {
        if (i->address32)
            emit_mov_imm32(out, to, (uint32_t)i->disp);
        else
            emit_mov_simm32(out, to, i->disp);
    } else {
        emit_op_mem(out, !i->address32, 0x8d, to, i->base, i->index, i->scale, i->disp);
    }
}

/* V of the page of the address in `from` into `to`, after checking that `size` bytes do not cross into another. */
static void emit_lookup(struct translation *t, unsigned to, unsigned from, unsigned size)
{
    if (size > 1) {
        emit_pext_gs(&t->out, to, from, BT_CTX(mask_low12));
        emit_check_byte(&t->out, to, to, BT_CHECK + (int32_t)size - 1);
    }
    emit_rorx(&t->out, to, from, 12);
    emit_load_v(&t->out, to, to);
}

/* The check for instructions that do cross now and then: a branch to the interpreter, with JRCXZ because flags are the guest's. `ea` is in s[1], s[0] is used. */
static void emit_crossing_branch(struct translation *t, const struct tinsn *i, unsigned ea, unsigned size)
{
    struct emitter *out = &t->out;
    emit_pext_gs(out, t->s[0], ea, BT_CTX(mask_low12));
    emit_lea(out, t->s[0], t->s[0], EMIT_NONE, 0, (int32_t)size - 1);
    emit_pext_gs(out, t->s[0], t->s[0], BT_CTX(mask_bit12));
    emit_store_gs(out, GPR_RCX, BT_CTX(scratch[1]));
    emit_mov(out, GPR_RCX, t->s[0]);
    emit8(out, 0xe3); /* jrcxz, over the load and the jump below */
    uint8_t *over = out->at;
    emit8(out, 0);
    emit_load_gs(out, GPR_RCX, BT_CTX(scratch[1]));
    emit8(out, 0xe9);
    uint8_t *displacement = out->at;
    emit32(out, 0);
    defer(t, DEFER_EXIT, i, 0, displacement);
    t->deferred[t->deferred_count - 1].exit = BT_EXIT_crossing;
    *over = (uint8_t)(out->at - (over + 1));
    emit_load_gs(out, GPR_RCX, BT_CTX(scratch[1]));
}

/* Where [base + disp] of the group is; the first use looks V up. */
static struct address emit_group_access(struct translation *t, struct group *g, int32_t disp, uint8_t *v_register)
{
    if (g->fresh) {
        unsigned from = g->base;
        if (g->low) {
            from = t->s[1];
            emit_lea(&t->out, from, g->base, EMIT_NONE, 0, g->low);
        }
        emit_lookup(t, g->v, from, (unsigned)(g->high - g->low));
        g->fresh = false;
    } else {
        *v_register = g->v;
    }
    return (struct address){g->base, g->v, disp};
}

/* The operand, addressable until s[0] or s[1] is used again. */
static struct address emit_access(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    struct group *g = has_plain_base(i) ? group_find(t, i->base, i->disp, i->mem_size) : NULL;
    if (g)
        return emit_group_access(t, g, i->disp, &site->v_memory);
    unsigned v = t->s[0], ea = t->s[1], size = i->aligned ? 1 : i->mem_size;
    if (has_plain_base(i) && !i->disp) {
        ea = i->base;
    } else {
        emit_effective_address(t, i, ea);
        if (i->segment != TI_FLAT) {
            emit_load_gs(&t->out, v, i->segment == TI_FS ? BT_CTX(c.segment_base[SEG_FS]) : BT_CTX(c.segment_base[SEG_GS]));
            emit_lea(&t->out, ea, ea, v, 0, 0);
        }
    }
    if (size > 1 && bitmap_has(t->page->odd_sites, i->offset) && v != GPR_RCX) {
        emit_crossing_branch(t, i, ea, size);
        size = 1;
    }
    emit_lookup(t, v, ea, size);
    return (struct address){ea, v, 0};
}

static const uint8_t *insn_bytes(const struct translation *t, const struct tinsn *i)
{
    return t->e->layout.window_r + t->page->offset + i->offset;
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
static void emit_rewritten(struct translation *t, const struct tinsn *i, struct address a)
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

static void emit_copy(struct translation *t, const struct tinsn *i)
{
    memcpy(t->out.at, insn_bytes(t, i), i->length);
    t->out.at += i->length;
}

/* ---- the stack ---- */

static void emit_rsp_add(struct translation *t, int32_t by)
{
    emit_lea(&t->out, GPR_RSP, GPR_RSP, EMIT_NONE, 0, by);
}

/* The 8 bytes at [base + disp] that the instruction implies; uses s[0], and s[1] when `disp` is not zero. */
static struct address emit_stack_access(struct translation *t, struct bt_site *site, unsigned base, int32_t disp)
{
    struct group *g = group_find(t, base, disp, 8);
    if (g)
        return emit_group_access(t, g, disp, &site->v_stack);
    unsigned from = base;
    if (disp) {
        from = t->s[1];
        emit_lea(&t->out, from, base, EMIT_NONE, 0, disp);
    }
    emit_lookup(t, t->s[0], from, 8);
    return (struct address){base, t->s[0], disp};
}

static void emit_at(struct translation *t, unsigned opcode, unsigned reg, struct address a)
{
    emit_op_mem(&t->out, true, opcode, reg, a.base, a.index, 0, a.disp);
}

static void emit_push_reg(struct translation *t, struct bt_site *site, unsigned reg)
{
    emit_at(t, 0x89, reg, emit_stack_access(t, site, GPR_RSP, -8));
    emit_rsp_add(t, -8);
}

static void emit_push_rip(struct translation *t, struct bt_site *site, int32_t offset)
{
    struct address a = emit_stack_access(t, site, GPR_RSP, -8);
    emit_load_gs(&t->out, t->s[1], BT_CTX(page_va));
    emit_lea(&t->out, t->s[1], t->s[1], EMIT_NONE, 0, offset);
    emit_at(t, 0x89, t->s[1], a);
    emit_rsp_add(t, -8);
}

static void emit_pop_to(struct translation *t, struct bt_site *site, unsigned to)
{
    emit_at(t, 0x8b, to, emit_stack_access(t, site, GPR_RSP, 0));
}

static void emit_pushf(struct translation *t, struct bt_site *site)
{
    struct emitter *out = &t->out;
    emit_store_gs(out, GPR_RSP, BT_CTX(scratch[0]));
    emit_load_gs(out, GPR_RSP, BT_CTX(host_rsp));
    emit8(out, 0x9c); /* pushfq, on the host's stack */
    emit_rex(out, t->s[1] > 7 ? 1 : 0);
    emit8(out, 0x58 | (t->s[1] & 7)); /* pop */
    emit_load_gs(out, GPR_RSP, BT_CTX(scratch[0]));
    emit_pext_gs(out, t->s[1], t->s[1], BT_CTX(mask_arith));
    emit_pdep_gs(out, t->s[1], t->s[1], BT_CTX(mask_arith));
    emit_load_gs(out, t->s[0], BT_CTX(c.v.cpu.rflags));
    emit_lea(out, t->s[1], t->s[1], t->s[0], 0, 0);
    emit_store_gs(out, t->s[1], BT_CTX(scratch[0]));
    struct address a = emit_stack_access(t, site, GPR_RSP, -8);
    emit_load_gs(out, t->s[1], BT_CTX(scratch[0]));
    emit_at(t, 0x89, t->s[1], a);
    emit_rsp_add(t, -8);
}

/* ---- control transfers ---- */

/* To the address in register `reg` (scratch[0] when EMIT_NONE), which the exchange of registers may have put into cpu.gpr[]. */
static void emit_transfer_indirect(struct translation *t, const struct tinsn *i, unsigned reg, int rsp_adjust)
{
    canonicalize(t);
    if (reg == EMIT_NONE)
        emit_load_gs(&t->out, 11, BT_CTX(scratch[0]));
    else if (reg == 10 || reg == 11)
        emit_load_gs(&t->out, 11, BT_CTX_GPR(reg));
    else
        emit_mov(&t->out, 11, reg);
    emit_transfer_from(t, i->offset, rsp_adjust);
}

static void emit_target_load(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    emit_at(t, 0x8b, t->s[0], emit_access(t, i, site));
    emit_store_gs(&t->out, t->s[0], BT_CTX(scratch[0]));
}

static void emit_ret(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    int32_t release = 8 + i->imm;
    if (t->free == CANONICAL) { /* V is in one of the two, and the other is R11 or will be overwritten by V's last use */
        emit_pop_to(t, site, GPR_R11);
        emit_rsp_add(t, release);
        emit_transfer_from(t, i->offset, release);
    } else {
        emit_pop_to(t, site, t->s[1]);
        emit_rsp_add(t, release);
        emit_store_gs(&t->out, t->s[1], BT_CTX(scratch[0]));
        emit_transfer_indirect(t, i, EMIT_NONE, release);
    }
}

static void emit_call(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    if (i->kind == TI_CALL_MEM)
        emit_target_load(t, i, site);
    emit_push_rip(t, site, i->offset + i->length);
    if (i->kind == TI_CALL) {
        canonicalize(t);
        if (in_page(i->target)) {
            emit_goto(t, i, i->target);
        } else {
            emit_rip(t, i->target);
            emit_transfer_from(t, i->offset, -8);
        }
    } else {
        emit_transfer_indirect(t, i, i->kind == TI_CALL_REG ? i->reg : EMIT_NONE, -8);
    }
}

static void emit_jcc(struct translation *t, const struct tinsn *i)
{
    if (i->target <= i->offset && in_page(i->target))
        emit_poll(t, BT_CTX(poll));
    align_displacement(&t->out, 2);
    emit8(&t->out, 0x0f);
    emit8(&t->out, 0x80 | i->condition);
    uint8_t *displacement = t->out.at;
    emit32(&t->out, 0);
    defer(t, DEFER_BRANCH, i, i->target, displacement);
}

/* LOOPcc and JRCXZ have 8-bit displacements only: over a long jump. */
static void emit_loop(struct translation *t, const struct tinsn *i)
{
    emit_poll(t, BT_CTX(poll));
    const uint8_t *p = insn_bytes(t, i);
    for (unsigned n = 0; n + 1 < i->length; n++)
        emit8(&t->out, p[n]);
    emit8(&t->out, 2);
    emit8(&t->out, 0xeb);
    uint8_t *over = t->out.at;
    emit8(&t->out, 0);
    align_displacement(&t->out, 1);
    emit8(&t->out, 0xe9);
    uint8_t *displacement = t->out.at;
    emit32(&t->out, 0);
    defer(t, DEFER_BRANCH, i, i->target, displacement);
    *over = (uint8_t)(t->out.at - (over + 1));
}

static void emit_jmp(struct translation *t, const struct tinsn *i)
{
    if (i->target <= i->offset && in_page(i->target))
        emit_poll(t, BT_CTX(poll));
    canonicalize(t);
    emit_goto(t, i, i->target);
}

/* ---- instructions ---- */

static void registers_provide(struct translation *t, const struct tinsn *i)
{
    uint16_t named = i->reads | i->writes;
    bool low = i->high_byte && i->memory; /* no REX prefix */
    registers_return(t, named);
    groups_provide(t, i);
    if (low)
        for (unsigned n = 0; n < GROUPS; n++)
            if (t->group[n].v != TI_NONE && t->group[n].v > 7)
                t->group[n].v = TI_NONE;
    t->s[0] = (uint8_t)register_scratch(t, named, named | pinned(t), low);
    t->s[1] = (uint8_t)register_scratch(t, named, named | pinned(t) | BIT(t->s[0]), low);
}

static void emit_insn(struct translation *t, const struct tinsn *i)
{
    registers_provide(t, i);
    if (t->poll_sti && i->kind != TI_STI) {
        /* The instruction before this one was the first after STI. */
        site_here(t, i);
        emit_poll(t, BT_CTX(poll_sti));
        t->poll_sti = false;
    }
    struct bt_site *site = site_here(t, i);
    switch (i->kind) {
    case TI_COPY:
        emit_copy(t, i);
        break;
    case TI_MEMORY:
        emit_rewritten(t, i, emit_access(t, i, site));
        break;
    case TI_SKIP:
        break;
    case TI_LEA_RIP:
        emit_load_gs(&t->out, i->reg, BT_CTX(page_va));
        emit_lea(&t->out, i->reg, i->reg, EMIT_NONE, 0, i->disp + i->offset + i->length);
        break;
    case TI_PUSH_REG:
        emit_push_reg(t, site, i->reg);
        break;
    case TI_PUSH_IMM:
        emit_at(t, 0xc7, 0, emit_stack_access(t, site, GPR_RSP, -8));
        emit32(&t->out, (uint32_t)i->imm);
        emit_rsp_add(t, -8);
        break;
    case TI_PUSH_MEM: {
        emit_at(t, 0x8b, t->s[1], emit_access(t, i, site));
        emit_store_gs(&t->out, t->s[1], BT_CTX(scratch[0]));
        struct address a = emit_stack_access(t, site, GPR_RSP, -8);
        emit_load_gs(&t->out, t->s[1], BT_CTX(scratch[0]));
        emit_at(t, 0x89, t->s[1], a);
        emit_rsp_add(t, -8);
        break;
    }
    case TI_POP_REG:
        emit_pop_to(t, site, i->reg);
        if (i->reg != GPR_RSP)
            emit_rsp_add(t, 8);
        break;
    case TI_LEAVE:
        emit_at(t, 0x8b, t->s[1], emit_stack_access(t, site, GPR_RBP, 0));
        emit_lea(&t->out, GPR_RSP, GPR_RBP, EMIT_NONE, 0, 8);
        emit_mov(&t->out, GPR_RBP, t->s[1]);
        break;
    case TI_PUSHF:
        emit_pushf(t, site);
        break;
    case TI_CLI:
        emit_mov_gs_imm8(&t->out, BT_CTX(c.v.cpu.rflags) + 1, 0);
        break;
    case TI_STI:
        emit_mov_gs_imm8(&t->out, BT_CTX(c.v.cpu.rflags) + 1, RFLAGS_IF >> 8);
        break;
    case TI_JCC:
        emit_jcc(t, i);
        break;
    case TI_LOOP:
        emit_loop(t, i);
        break;
    case TI_JMP:
        emit_jmp(t, i);
        break;
    case TI_JMP_REG:
        emit_transfer_indirect(t, i, i->reg, 0);
        break;
    case TI_JMP_MEM:
        emit_target_load(t, i, site);
        emit_transfer_indirect(t, i, EMIT_NONE, 0);
        break;
    case TI_CALL:
    case TI_CALL_REG:
    case TI_CALL_MEM:
        emit_call(t, i, site);
        break;
    case TI_RET:
        emit_ret(t, i, site);
        break;
    case TI_EXIT:
        canonicalize(t);
        emit_rip(t, i->offset);
        emit_leave(t, i->exit);
        break;
    default:
        __builtin_unreachable();
    }
    t->clean &= (uint16_t)~i->writes;
    groups_move(t, i);
}

/* ---- blocks ---- */

/* STI is translated when what follows is an ordinary instruction, after which interrupts are looked for; else the interpreter minds the shadow. */
static void sti_settle(struct translation *t)
{
    for (unsigned n = 0; n < t->count; n++) {
        if (t->insn[n].kind != TI_STI)
            continue;
        bool follows = n + 2 < t->count && t->insn[n + 1].kind < TI_STI;
        if (!follows) {
            t->insn[n].kind = TI_EXIT;
            t->insn[n].exit = BT_EXIT_interp;
            t->count = n + 1;
        }
    }
}

static void decode_block(struct translation *t, unsigned start)
{
    struct analyze_context a = {.c = NULL, .mode = t->page->mode, .forms = t->e->forms};
    for (unsigned n = 0; !a.c; n++)
        a.c = t->e->interp.vcpus[n];
    decoder_init(&a.decoder, a.mode.code_bits);
    const uint8_t *bytes = t->e->layout.window_r + t->page->offset;
    unsigned offset = start;
    while (t->count < t->e->debug.block_insns && offset < PAGE_SIZE_BYTES) {
        struct tinsn *i = &t->insn[t->count++];
        analyze_insn(&a, bytes + offset, (unsigned)PAGE_SIZE_BYTES - offset, offset, i);
        if (bitmap_has(t->page->call_sites, offset)) {
            i->kind = TI_EXIT;
            i->exit = BT_EXIT_data;
        }
        if (TI_ENDS(i->kind))
            break;
        offset += i->length;
    }
    sti_settle(t);
}

static void translation_emit(struct translation *t)
{
    bool after_sti = false;
    for (t->at = 0; t->at < t->count; t->at++) {
        const struct tinsn *i = &t->insn[t->at];
        emit_insn(t, i);
        t->poll_sti = after_sti;
        after_sti = i->kind == TI_STI;
    }
    const struct tinsn *last = &t->insn[t->count - 1];
    if (!TI_ENDS(last->kind)) {
        canonicalize(t);
        emit_goto(t, last, last->offset + last->length);
    }
    for (unsigned n = 0; n < t->deferred_count; n++)
        deferred_emit(t, &t->deferred[n]);
}

static void emit_entry(struct translation *t, unsigned start)
{
    if (start)
        emit_lea(&t->out, 10, 11, EMIT_NONE, 0, -(int32_t)start);
    emit_store_gs(&t->out, start ? 10 : 11, BT_CTX(page_va));
}

struct bt_block *translate_block(struct bt_engine *e, struct bt_page *page, unsigned start)
{
    struct translation t;
    t.e = e;
    t.page = page;
    t.free = CANONICAL;
    t.clean = 0;
    for (unsigned n = 0; n < GROUPS; n++)
        t.group[n].v = TI_NONE;
    t.poll_sti = false;
    t.count = t.at = t.sites = t.deferred_count = 0;
    while ((uintptr_t)(e->layout.tc_write + e->tc_used) % 16)
        e->layout.tc_write[e->tc_used++] = 0xcc;
    t.start = t.out.at = e->layout.tc_write + e->tc_used;
    decode_block(&t, start);
    emit_entry(&t, start);
    struct bt_block block = {
        .page = page,
        .tc_start = e->tc_used,
        .tc_chain = (uint32_t)(t.out.at - e->layout.tc_write),
        .start = (uint16_t)start,
        .valid = true,
    };
    translation_emit(&t);
    const struct tinsn *last = &t.insn[t.count - 1];
    block.tc_end = (uint32_t)(t.out.at - e->layout.tc_write);
    block.length = (uint16_t)(last->offset + last->length - start);
    block.insns = (uint16_t)t.count;
    block.site_count = (uint16_t)t.sites;
    return cache_publish(e, &block, t.site);
}

/* ---- for fault handling ---- */

static uint64_t register_value(const struct bt_vcpu *b, unsigned reg)
{
    return reg == TI_NONE ? 0 : b->c.v.cpu.gpr[reg];
}

static gva_t operand_address(const struct bt_vcpu *b, const struct tinsn *i)
{
    uint64_t ea = register_value(b, i->base) + (register_value(b, i->index) << i->scale) + (int64_t)i->disp;
    if (i->rip_relative)
        ea += b->c.v.cpu.gpr[GPR_RIP] + i->length;
    if (i->address32)
        ea = (uint32_t)ea;
    if (i->segment != TI_FLAT)
        ea += b->c.segment_base[i->segment == TI_FS ? SEG_FS : SEG_GS];
    return ea;
}

int translate_accesses(struct bt_vcpu *b, const uint8_t *bytes, unsigned available, struct bt_access access[4])
{
    struct analyze_context a = {.c = &b->c, .mode = b->mode};
    struct tinsn i;
    int count = 0;
    gva_t rsp = b->c.v.cpu.gpr[GPR_RSP];
    decoder_init(&a.decoder, a.mode.code_bits);
    analyze_insn(&a, bytes, available, 0, &i);
    if (i.memory)
        access[count++] = (struct bt_access){operand_address(b, &i), i.mem_size, i.mem_write, false};
    switch (i.kind) {
    case TI_EXIT:
        return -1;
    case TI_PUSH_REG:
    case TI_PUSH_IMM:
    case TI_PUSH_MEM:
    case TI_PUSHF:
    case TI_CALL:
    case TI_CALL_REG:
    case TI_CALL_MEM:
        access[count++] = (struct bt_access){rsp - 8, 8, true, true};
        break;
    case TI_POP_REG:
    case TI_RET:
        access[count++] = (struct bt_access){rsp, 8, false, true};
        break;
    case TI_LEAVE:
        access[count++] = (struct bt_access){b->c.v.cpu.gpr[GPR_RBP], 8, false, true};
        break;
    default:
        break;
    }
    return count;
}
