/*
 * Handlers of far JMP, CALL, RET and IRET: fetch the operands, then far_transfer.c.
 * Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

static uint16_t read_far_pointer(struct icpu *c, const struct insn *i, uint64_t *offset)
{
    gva_t address = ea_linear(c, i, i->op_size + 2, false);
    *offset = mem_read(c, address, i->op_size);
    return (uint16_t)mem_read(c, address + i->op_size, 2);
}

void op_far_jump_direct(struct icpu *c, const struct insn *i)
{
    far_jump(c, (uint16_t)(i->imm >> 32), (uint32_t)i->imm, i->op_size);
}

void op_far_jump_memory(struct icpu *c, const struct insn *i)
{
    uint64_t offset;
    uint16_t selector = read_far_pointer(c, i, &offset);
    far_jump(c, selector, offset, i->op_size);
}

void op_far_call_direct(struct icpu *c, const struct insn *i)
{
    far_call(c, (uint16_t)(i->imm >> 32), (uint32_t)i->imm, i->op_size);
}

void op_far_call_memory(struct icpu *c, const struct insn *i)
{
    uint64_t offset;
    uint16_t selector = read_far_pointer(c, i, &offset);
    far_call(c, selector, offset, i->op_size);
}

void op_far_return(struct icpu *c, const struct insn *i)
{
    far_return(c, i->op_size, (uint16_t)i->imm);
}

void op_iret(struct icpu *c, const struct insn *i)
{
    interrupt_return(c, i->op_size);
}
