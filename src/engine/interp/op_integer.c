/*
 * Entry point of the integer instructions: classifies operands and asks the file that owns the mnemonic.
 *
 * Instructions with a segment, control or debug register operand are refused here: op_system.c has them.
 * Threading: select functions run while decoding, on the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

static bool is_gpr(const ZydisDecodedOperand *op)
{
    if (op->type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    switch (ZydisRegisterGetClass(op->reg.value)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
        return true;
    default:
        return false;
    }
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

static select_fn *const selects[] = {
    move_select, alu_select, stack_select, shift_select, bit_select, muldiv_select, atomic_select, decimal_select,
};

bool op_integer_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    if (d->zi.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
        return false;
    for (unsigned k = 0; k < sizeof selects / sizeof selects[0]; k++) {
        insn_fn *fn = selects[k](d, i);
        if (fn) {
            i->fn = fn;
            return true;
        }
    }
    return false;
}
