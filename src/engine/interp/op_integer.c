/*
 * Entry point of the integer instructions: classifies operands and asks the file that owns the mnemonic.
 *
 * Instructions with a segment, control or debug register operand are refused here: op_system.c has them.
 * Threading: select functions run while decoding, on the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

int operand_gpr_offset(ZydisRegister reg)
{
    static const struct {
        uint16_t first, last; /* ZydisRegister */
        uint8_t slot, byte;
    } ranges[] = {
        {ZYDIS_REGISTER_RAX, ZYDIS_REGISTER_R15, 0, 0},   {ZYDIS_REGISTER_EAX, ZYDIS_REGISTER_R15D, 0, 0},
        {ZYDIS_REGISTER_AX, ZYDIS_REGISTER_R15W, 0, 0},   {ZYDIS_REGISTER_AL, ZYDIS_REGISTER_BL, 0, 0},
        {ZYDIS_REGISTER_AH, ZYDIS_REGISTER_BH, 0, 1},     {ZYDIS_REGISTER_SPL, ZYDIS_REGISTER_DIL, GPR_RSP, 0},
        {ZYDIS_REGISTER_R8B, ZYDIS_REGISTER_R15B, GPR_R8, 0},
    };
    for (unsigned k = 0; k < sizeof ranges / sizeof ranges[0]; k++)
        if (reg >= ranges[k].first && reg <= ranges[k].last)
            return REG_OFFSET(ranges[k].slot + (reg - ranges[k].first)) + ranges[k].byte;
    return -1;
}

static bool is_gpr(const ZydisDecodedOperand *op)
{
    return op->type == ZYDIS_OPERAND_TYPE_REGISTER && operand_gpr_offset(op->reg.value) >= 0;
}

static bool is_memory(const ZydisDecodedOperand *op)
{
    return op->type == ZYDIS_OPERAND_TYPE_MEMORY;
}

static bool is_locked(const struct decode *d)
{
    return d->zi.attributes & ZYDIS_ATTRIB_HAS_LOCK;
}

enum operand_form operand_form(const struct decode *d)
{
    const ZydisDecodedOperand *dst = &d->op[0], *src = &d->op[1];
    if (d->zi.operand_count_visible < 2)
        return FORM_NONE;
    bool immediate = src->type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
    if (is_gpr(dst))
        return immediate ? FORM_RI : is_memory(src) ? FORM_RM : is_gpr(src) ? FORM_RR : FORM_NONE;
    if (!is_memory(dst))
        return FORM_NONE;
    if (immediate)
        return is_locked(d) ? FORM_LOCK_MI : FORM_MI;
    if (is_gpr(src))
        return is_locked(d) ? FORM_LOCK_MR : FORM_MR;
    return FORM_NONE;
}

enum unary_form unary_form(const struct decode *d)
{
    if (d->zi.operand_count_visible < 1)
        return UNARY_NONE;
    if (is_gpr(&d->op[0]))
        return UNARY_R;
    if (is_memory(&d->op[0]))
        return is_locked(d) ? UNARY_LOCK_M : UNARY_M;
    return UNARY_NONE;
}

void operands_fill(const struct decode *d, struct insn *i)
{
    for (unsigned k = 0; k < d->zi.operand_count_visible; k++) {
        const ZydisDecodedOperand *op = &d->op[k];
        int offset = op->type == ZYDIS_OPERAND_TYPE_REGISTER ? operand_gpr_offset(op->reg.value) : -1;
        if (k == 0)
            i->op_size = (uint8_t)(op->size / 8);
        else if (k == 1)
            i->src_size = (uint8_t)(op->size / 8);
        if (offset >= 0 && k == 0)
            i->dst = (uint8_t)offset;
        else if (offset >= 0 && k == 1)
            i->src = (uint8_t)offset;
        if (op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE)
            i->imm = op->imm.value.u;
    }
}

static select_fn *const selects[] = {
    move_select, alu_select, stack_select, shift_select, bit_select, muldiv_select, atomic_select, decimal_select,
};

bool op_integer_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    /* Vector instructions share some mnemonics' neighbourhood but never a file here. */
    if (d->zi.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
        return false;
    struct insn filled = *i;
    operands_fill(d, &filled);
    for (unsigned k = 0; k < sizeof selects / sizeof selects[0]; k++) {
        filled.fn = selects[k](d, &filled);
        if (filled.fn) {
            *i = filled;
            return true;
        }
    }
    return false;
}
