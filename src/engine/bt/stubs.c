/*
 * The ways into and out of translated code, written at the start of TC.
 *
 * `enter` is a C function: it keeps the host's callee-saved registers on the host's stack, whose pointer stays in the context while RSP is the guest's.
 * Inside, R10 and R11 are scratch, so their guest values stay in cpu.gpr[] all the time.
 * Threading: written once, before any vCPU runs.
 */
#include "engine/bt/emit.h"

static const uint8_t callee_saved[] = {GPR_RBX, GPR_RBP, GPR_R12, GPR_R13, GPR_R14, GPR_R15};
#define CALLEE_SAVED sizeof(callee_saved)

static void emit_push(struct emitter *e, unsigned reg)
{
    emit_rex(e, reg > 7 ? 1 : 0);
    emit8(e, 0x50 | (reg & 7));
}

static void emit_pop(struct emitter *e, unsigned reg)
{
    emit_rex(e, reg > 7 ? 1 : 0);
    emit8(e, 0x58 | (reg & 7));
}

static bool is_scratch(unsigned reg)
{
    return reg == GPR_R10 || reg == GPR_R11;
}

static uint32_t here(const struct bt_engine *b, const struct emitter *e)
{
    return (uint32_t)(e->at - b->layout.tc_write);
}

static void enter_emit(struct emitter *e)
{
    for (unsigned n = 0; n < CALLEE_SAVED; n++)
        emit_push(e, callee_saved[n]);
    emit_store_gs(e, GPR_RSP, BT_CTX(host_rsp));
    emit_load_gs(e, GPR_RAX, BT_CTX(host_flags));
    emit_push(e, GPR_RAX);
    emit8(e, 0x9d); /* popfq */
    emit_load_gs(e, GPR_R11, BT_CTX_GPR(GPR_RIP));
    for (unsigned r = GPR_RAX; r <= GPR_R15; r++)
        if (!is_scratch(r))
            emit_load_gs(e, r, BT_CTX_GPR(r));
    emit8(e, 0x65), emit8(e, 0xff); /* jmp gs:[enter_target] */
    emit_address(e, 4, EMIT_NONE, EMIT_NONE, 0, BT_CTX(enter_target), false);
}

static void leave_emit(struct bt_engine *b, struct emitter *e)
{
    b->stubs.link_far = here(b, e);
    emit_lea(e, GPR_R10, GPR_R10, EMIT_NONE, 0, (int32_t)BT_LINK_FAR); /* sign-extended; the low half is what counts */
    emit_store_gs(e, GPR_R10, BT_CTX(link_site));
    emit_mov_imm32(e, GPR_R10, BT_EXIT_link);
    emit8(e, 0xeb); /* to leave: over the next one */
    uint8_t *over = e->at;
    emit8(e, 0);
    b->stubs.link = here(b, e);
    emit_store_gs(e, GPR_R10, BT_CTX(link_site));
    emit_mov_imm32(e, GPR_R10, BT_EXIT_link);
    b->stubs.leave_in_page = here(b, e);
    emit_store_gs(e, GPR_R10, BT_CTX(scratch[0]));
    emit_load_gs(e, GPR_R10, BT_CTX(page_va));
    emit_lea(e, GPR_R11, GPR_R11, GPR_R10, 0, 0);
    emit_load_gs(e, GPR_R10, BT_CTX(scratch[0]));
    *over = (uint8_t)(e->at - (over + 1));
    b->stubs.leave = here(b, e);
    for (unsigned r = GPR_RAX; r <= GPR_R15; r++)
        if (!is_scratch(r))
            emit_store_gs(e, r, BT_CTX_GPR(r));
    emit_store_gs(e, GPR_R11, BT_CTX_GPR(GPR_RIP));
    emit_load_gs(e, GPR_RSP, BT_CTX(host_rsp));
    emit8(e, 0x9c); /* pushfq */
    emit_pop(e, GPR_RAX);
    emit_store_gs(e, GPR_RAX, BT_CTX(host_flags));
    emit_op_reg(e, false, 0x89, GPR_R10, GPR_RAX);
    b->stubs.leave_saved = here(b, e);
    emit8(e, 0xfc); /* cld */
    for (unsigned n = CALLEE_SAVED; n-- > 0;)
        emit_pop(e, callee_saved[n]);
    emit8(e, 0xc3);
}

void stubs_create(struct bt_engine *b)
{
    struct emitter e = {b->layout.tc_write};
    b->stubs.miss = 0;
    emit_mov_imm32(&e, GPR_R10, BT_EXIT_miss);
    emit8(&e, 0xe9); /* to leave */
    uint8_t *displacement = e.at;
    emit32(&e, 0);
    leave_emit(b, &e);
    emit_distance(displacement, b->layout.tc_write + b->stubs.leave);
    b->stubs.lookup = here(b, &e);
    emit_transfer(&e, (uint32_t)(uintptr_t)b->layout.tc_exec);
    system_stubs_create(b, &e);
    b->stubs.enter = here(b, &e);
    enter_emit(&e);
    while (here(b, &e) % 64)
        emit8(&e, 0xcc);
    b->stubs.end = here(b, &e);
}

enum bt_exit bt_enter(struct bt_vcpu *b)
{
    typedef unsigned enter_fn(struct bt_vcpu *);
    const struct bt_engine *e = bt_engine_of(b);
    enter_fn *enter = (enter_fn *)(uintptr_t)(e->layout.tc_exec + e->stubs.enter);
    return (enum bt_exit)enter(b);
}
