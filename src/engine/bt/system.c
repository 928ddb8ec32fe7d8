/*
 * Instructions about the processor's own state that need not leave translated code.
 *
 * Inside, the host's flags hold the arithmetic flags and DF; cpu.rflags has the rest, with these clear.
 * Threading: e->lock held, like all of a translation.
 */
#include "engine/bt/translate_priv.h"

void emit_pushf(struct translation *t, struct bt_site *site)
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
