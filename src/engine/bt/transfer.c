/*
 * Jumps, calls, returns, and the code by which blocks are left.
 *
 * Inside the page direct jumps go to other blocks' chain entries once linked; everything else goes through R11 and the exec table.
 * Threading: e->lock held, like all of a translation.
 */
#include <string.h>

#include "engine/bt/translate_priv.h"

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

struct bt_site *site_here(struct translation *t, const struct tinsn *i)
{
    return site_add(t, SITE_INSN, i->offset, t->free);
}

void site_string(struct translation *t, const struct tinsn *i, unsigned size, bool source)
{
    struct bt_site *site = site_add(t, SITE_STRING, i->offset, t->free);
    site->v_memory = (uint8_t)size;
    site->v_stack = source;
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

static void emit_rip(struct translation *t, int32_t offset)
{
    emit_load_gs(&t->out, 11, BT_CTX(page_va));
    if (offset)
        emit_lea(&t->out, 11, 11, EMIT_NONE, 0, offset);
}

/* `rsp_adjust`: what the branch at `offset` has already added to RSP. */
static void emit_transfer_from(struct translation *t, unsigned offset, int rsp_adjust)
{
    struct bt_site *site = site_add(t, SITE_JUMP, offset, t->canonical);
    site->rsp_adjust = (int8_t)rsp_adjust;
    emit_transfer(&t->out, (uint32_t)(uintptr_t)t->e->layout.tc_exec);
}

/* So that the four bytes after `opcode_bytes` do not cross a cache line: they are patched while others may run them. */
void align_displacement(struct emitter *out, unsigned opcode_bytes)
{
    while (((uintptr_t)out->at + opcode_bytes) % 64 > 60)
        emit8(out, 0x90);
}

static bool in_page(int32_t offset)
{
    return offset >= 0 && offset < (int32_t)PAGE_SIZE_BYTES;
}

static void emit_jump_stub(struct translation *t, uint32_t stub)
{
    emit8(&t->out, 0xe9);
    emit_rel32(&t->out, stub_address(t, stub));
}

/* Leaves for good, from canonical state, at the instruction at `offset`. */
void emit_leave_in_page(struct translation *t, unsigned offset, enum bt_exit reason)
{
    emit_mov_imm32(&t->out, 11, offset);
    emit_mov_imm32(&t->out, 10, reason);
    emit_jump_stub(t, t->e->stubs.leave_in_page);
}

/* First execution of a direct jump inside the page: `displacement` is patched to the target by the run loop. */
static void emit_link_exit(struct translation *t, const uint8_t *displacement, int32_t target, uint32_t flags)
{
    emit_mov_imm32(&t->out, 11, (uint32_t)target);
    emit_mov_imm32(&t->out, 10, (uint32_t)(displacement - t->e->layout.tc_write) | flags);
    emit_jump_stub(t, t->e->stubs.link);
}

void emit_next_page_check(struct translation *t, const struct tinsn *i)
{
    site_add(t, SITE_NEXT_PAGE, i->offset, t->canonical);
    emit_rip(t, (int32_t)PAGE_SIZE_BYTES);
    emit_load_e(&t->out);
    emit_op_mem(&t->out, false, 0x8b, 10, 10, 11, 2, (int32_t)(t->e->layout.witness - (const uint8_t *)t->next->dt));
}

/* Direct jump to the linear address in R11, in another page, from canonical state: struct bt_link. */
static void emit_transfer_far(struct translation *t, const struct tinsn *i, int32_t target, int rsp_adjust)
{
    struct bt_site *site = site_add(t, SITE_JUMP, i->offset, t->canonical);
    site->rsp_adjust = (int8_t)rsp_adjust;
    emit_load_e(&t->out);
    while (((uintptr_t)t->out.at + 4) % 64 > 60 || ((uintptr_t)t->out.at + 9) % 64 > 60) /* as align_displacement */
        emit8(&t->out, 0x90);
    static const uint8_t slot_read[] = {0x47, 0x8b, 0x94, 0x9a}; /* mov r10d, [r10 + r11 * 4 + disp32] */
    memcpy(t->out.at, slot_read, sizeof(slot_read));
    t->out.at += sizeof(slot_read);
    emit32(&t->out, 0);
    emit8(&t->out, 0xe9);
    uint8_t *displacement = t->out.at;
    emit32(&t->out, 0);
    defer(t, DEFER_FAR, i, target, displacement);
}

void defer(struct translation *t, enum deferred_kind kind, const struct tinsn *i, int32_t target, uint8_t *patch)
{
    t->deferred[t->deferred_count++] = (struct deferred){
        .kind = (uint8_t)kind, .free = t->free, .clean = t->clean, .exit = i->exit, .offset = i->offset, .target = target, .patch = patch,
    };
}

/* Where a jump to `offset` in this page may lead from now on: what it leads to is dropped only together with this block, or leads on itself. NULL: there is no block yet. */
static const uint8_t *chain_of(const struct translation *t, int32_t offset)
{
    int inside = t->careful ? -1 : insn_number(t, offset);
    if (inside >= 0 && (!inside || is_join(t, (unsigned)inside)))
        return inside ? t->join_at[inside] : t->chain;
    uint32_t tc_start = t->page->dt[offset];
    return tc_start ? t->e->layout.tc_write + tc_start + entry_bytes((unsigned)offset) : NULL;
}

/* Links the jump whose displacement is at `at` when there is a block already. A guess like any link: the jump checks that its target is that block's page. */
static void link_far_early(const struct translation *t, int32_t target, const uint8_t *at)
{
    gva_t gva = t->page->gva + (uint64_t)(int64_t)target;
    const uint32_t *dt = t->b ? tables_exec_find(t->b, gva) : NULL;
    if (dt)
        cache_link_far_early(t->e, (uint32_t)(at - t->e->layout.tc_write), cache_page_of(t->e, dt), gva & PAGE_MASK_BITS);
}

void deferred_emit(struct translation *t, const struct deferred *d)
{
    emit_distance(d->patch, t->out.at);
    uint8_t *before = t->out.at, *displacement = d->patch;
    if (d->kind == DEFER_FAR) {
        emit_mov_imm32(&t->out, 10, (uint32_t)(displacement - t->e->layout.tc_write));
        emit_jump_stub(t, t->e->stubs.link_far);
        link_far_early(t, d->target, displacement);
        return;
    }
    canonical_emit(t, d->free, d->clean);
    const uint8_t *chain = d->kind == DEFER_BRANCH && in_page(d->target) ? chain_of(t, d->target) : NULL;
    if (chain && t->out.at == before) {
        *(uint32_t *)displacement = (uint32_t)(chain - (displacement + 4));
    } else if (chain) {
        emit8(&t->out, 0xe9);
        emit_rel32(&t->out, chain);
    } else if (d->kind == DEFER_EXIT) {
        emit_leave_in_page(t, d->offset, d->exit);
    } else if (!in_page(d->target)) {
        const struct tinsn from = {.offset = d->offset};
        emit_rip(t, d->target);
        emit_transfer_far(t, &from, d->target, 0);
    } else {
        if (t->out.at != before) { /* the jump that will be patched comes after the exchange of registers */
            align_displacement(&t->out, 1);
            emit8(&t->out, 0xe9);
            displacement = t->out.at;
            emit32(&t->out, 0);
        }
        emit_link_exit(t, displacement, d->target, d->kind == DEFER_CAREFUL ? BT_LINK_CAREFUL : 0);
    }
}

/* Back edges look whether the host wants the processor. */
void emit_poll(struct translation *t, int32_t field)
{
    emit_load_gs(&t->out, t->s[0], field);
    emit_op_mem(&t->out, false, 0x8b, t->s[0], t->s[0], EMIT_NONE, 0, 0);
}

/* From canonical state, to any offset. */
void emit_goto(struct translation *t, const struct tinsn *i, int32_t target)
{
    if (!in_page(target)) {
        emit_rip(t, target);
        emit_transfer_far(t, i, target, 0);
        return;
    }
    align_displacement(&t->out, 1);
    emit8(&t->out, 0xe9);
    uint8_t *displacement = t->out.at;
    emit32(&t->out, 0);
    defer(t, DEFER_BRANCH, i, target, displacement);
}

/* ---- control transfers ---- */

/* To the address in register `reg` (the code address in scratch[0] when EMIT_NONE), which the exchange of registers may have put into cpu.gpr[]. */
void emit_transfer_indirect(struct translation *t, const struct tinsn *i, unsigned reg, int rsp_adjust)
{
    canonicalize(t);
    if (reg == EMIT_NONE)
        emit_load_gs(&t->out, 11, BT_CTX(scratch[0]));
    else if (reg == 10 || reg == 11)
        emit_load_gs(&t->out, 11, BT_CTX_GPR(reg));
    else if (t->legacy)
        emit_lea(&t->out, 11, reg, EMIT_NONE, 0, (int32_t)BT_CODE_BIAS);
    else
        emit_mov(&t->out, 11, reg);
    emit_transfer_from(t, i->offset, rsp_adjust);
}

/* What was read to go there becomes a code address. */
static void emit_code_address(struct translation *t, unsigned reg)
{
    if (t->legacy)
        emit_lea(&t->out, reg, reg, EMIT_NONE, 0, (int32_t)BT_CODE_BIAS);
}

void emit_target_load(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    emit_at(t, 0x8b, t->s[0], emit_access(t, i, site));
    emit_code_address(t, t->s[0]);
    emit_store_gs(&t->out, t->s[0], BT_CTX(scratch[0]));
}

void emit_ret(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    int32_t release = (int32_t)stack_bytes(i) + i->imm;
    if ((t->free & ~pinned(t)) & BIT(GPR_R11)) {
        emit_pop_to(t, site, GPR_R11);
        emit_code_address(t, GPR_R11);
        emit_rsp_add(t, release);
        canonicalize(t);
        emit_transfer_from(t, i->offset, release);
    } else {
        emit_pop_to(t, site, t->s[1]);
        emit_code_address(t, t->s[1]);
        emit_rsp_add(t, release);
        emit_store_gs(&t->out, t->s[1], BT_CTX(scratch[0]));
        emit_transfer_indirect(t, i, EMIT_NONE, release);
    }
}

void emit_call(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    if (i->kind == TI_CALL && i->target <= i->offset && in_page(i->target))
        emit_poll(t, BT_CTX(poll)); /* a loop when RSP is put back */
    if (i->kind == TI_CALL_MEM)
        emit_target_load(t, i, site);
    emit_push_rip(t, site, i->offset + i->length);
    if (i->kind == TI_CALL) {
        bool has_return = !t->legacy && t->free == CANONICAL && t->s[1] == GPR_R11; /* R11 holds the return address still */
        canonicalize(t);
        if (in_page(i->target)) {
            emit_goto(t, i, i->target);
        } else {
            if (has_return)
                emit_lea(&t->out, GPR_R11, GPR_R11, EMIT_NONE, 0, i->target - (i->offset + i->length));
            else
                emit_rip(t, i->target);
            emit_transfer_far(t, i, i->target, -(int)stack_bytes(i));
        }
    } else {
        emit_transfer_indirect(t, i, i->kind == TI_CALL_REG ? i->reg : EMIT_NONE, -(int)stack_bytes(i));
    }
}

void emit_jcc(struct translation *t, const struct tinsn *i)
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
void emit_loop(struct translation *t, const struct tinsn *i)
{
    emit_poll(t, BT_CTX(poll));
    const uint8_t *p = insn_bytes(t, i);
    if (t->legacy)
        emit8(&t->out, 0x67); /* ECX counts */
    for (unsigned n = 0; n + 2 < i->length && !t->legacy; n++)
        if (p[n] == 0x67) /* of the prefixes this one matters; on AMD's processors 66 would cut RIP to 16 bits */
            emit8(&t->out, p[n]);
    emit8(&t->out, p[i->length - 2]);
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

void emit_jmp(struct translation *t, const struct tinsn *i)
{
    if (i->target <= i->offset && in_page(i->target))
        emit_poll(t, BT_CTX(poll));
    canonicalize(t);
    emit_goto(t, i, i->target);
}
