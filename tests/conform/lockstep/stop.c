/*
 * Makes the interpreter look at attention right after the instruction that it executes, as the translator does after each instruction that it leaves to the interpreter: the next
 * instruction of the block gets another handler for a moment.
 *
 * Compiled like the interpreter: the handler runs with the guest's vector state in the host's registers.
 */
#include "lockstep.h"

static void op_stop(struct icpu *c, const struct insn *i)
{
    struct side *s = c->v.host;
    stop_undo(&s->stop);
    c->v.cpu.gpr[GPR_RIP] -= i->length;
    longjmp(c->escape, INTERP_RELOOP);
}

void stop_after_current(struct icpu *c, struct stop *stop)
{
    struct block *b = c->block;
    stop_undo(stop);
    if (!c->current || !b || c->current < b->insn || c->current >= b->insn + b->count)
        return;
    struct insn *next = &b->insn[c->current - b->insn + 1];
    if (next == b->insn + b->count)
        return; /* the block ends here */
    *stop = (struct stop){next, next->fn};
    next->fn = op_stop;
}

/* The arena that the block lies in may have been emptied meanwhile, but it stays mapped. */
void stop_undo(struct stop *stop)
{
    if (stop->insn && stop->insn->fn == op_stop)
        stop->insn->fn = stop->fn;
    stop->insn = NULL;
}
