/*
 * Shifts and rotates: ROL ROR RCL RCR SHL SHR SAR, SHLD SHRD.
 *
 * A count of zero leaves the flags alone and rotates keep SF, ZF, AF and PF, so the guest's flags are put into the host's before the host's own
 * instruction runs. Only SHL, SHR and SAR by a nonzero constant, which set every flag, do without. The count is masked by the host, as by the guest.
 * OF after rotates by more than one is undefined. Intel's processors leave it alone when a register is rotated by a constant; by CL, and in memory, the last step
 * of the rotation sets it. So rotates of registers by constants end with one by a constant, and what the host does agrees whichever engine asks for it.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

#define SHIFT_KEEPING(mnem, constraint, a, count)                                                  \
    do {                                                                                           \
        uint32_t f = c->oszapc;                                                                    \
        __asm__ volatile(FLAGS_RESTORE mnem " %%cl, %0" FLAGS_SAVE                                 \
                         : constraint(a), "+a"(f)                                                  \
                         : "c"(count)                                                              \
                         : "cc");                                                                  \
        c->oszapc = f;                                                                             \
    } while (0)
#define SHIFT_PLAIN(mnem, constraint, a, count)                                                    \
    do {                                                                                           \
        uint32_t f;                                                                                \
        __asm__ volatile(mnem " %%cl, %0" FLAGS_SAVE                                               \
                         : constraint(a), "=a"(f)                                                  \
                         : "c"(count)                                                              \
                         : "cc");                                                                  \
        c->oszapc = f;                                                                             \
    } while (0)

/* By two or more. */
#define ROTATE_CONSTANT(mnem, constraint, a, count)                                                \
    do {                                                                                           \
        uint32_t f = c->oszapc;                                                                    \
        __asm__ volatile(mnem " %%cl, %0" : constraint(a) : "c"((uint8_t)((count) - 2)) : "cc");   \
        __asm__ volatile(FLAGS_RESTORE mnem " $2, %0" FLAGS_SAVE : constraint(a), "+a"(f) : : "cc"); \
        c->oszapc = f;                                                                             \
    } while (0)

#define COUNT_IMM i->extra
#define COUNT_CL ((uint8_t)c->v.cpu.gpr[GPR_RCX])

#define SHIFT_REG(name, mnem, bits, DO, count)                                                     \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8);                          \
        DO(mnem, "+q", a, count);                                                                  \
        reg_write(c, i->dst, bits / 8, a);                                                         \
    }
#define SHIFT_MEM(name, mnem, bits, DO, count)                                                     \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        uint##bits##_t *a = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, false);          \
        DO(mnem, "+m", *a, count);                                                                 \
        mem_rmw_end(c, a);                                                                         \
    }

#define SHIFT_BY_CL_AND_IMM(bits, s, name)                                                         \
    SHIFT_REG(name##_rc##bits, #name s, bits, SHIFT_KEEPING, COUNT_CL)                             \
    SHIFT_MEM(name##_mc##bits, #name s, bits, SHIFT_KEEPING, COUNT_CL)                             \
    SHIFT_REG(name##_ri##bits, #name s, bits, SHIFT_KEEPING, COUNT_IMM)                            \
    SHIFT_MEM(name##_mi##bits, #name s, bits, SHIFT_KEEPING, COUNT_IMM)
#define SHIFT_BY_NONZERO(bits, s, name)                                                            \
    SHIFT_REG(name##_rn##bits, #name s, bits, SHIFT_PLAIN, COUNT_IMM)                              \
    SHIFT_MEM(name##_mn##bits, #name s, bits, SHIFT_PLAIN, COUNT_IMM)

#define ROTATE_BY_CONSTANT(bits, s, name) SHIFT_REG(name##_rn##bits, #name s, bits, ROTATE_CONSTANT, COUNT_IMM)

SIZES(ROTATE_BY_CONSTANT, rol)
SIZES(ROTATE_BY_CONSTANT, ror)
SIZES(SHIFT_BY_CL_AND_IMM, rol)
SIZES(SHIFT_BY_CL_AND_IMM, ror)
SIZES(SHIFT_BY_CL_AND_IMM, rcl)
SIZES(SHIFT_BY_CL_AND_IMM, rcr)
SIZES(SHIFT_BY_CL_AND_IMM, shl)
SIZES(SHIFT_BY_CL_AND_IMM, shr)
SIZES(SHIFT_BY_CL_AND_IMM, sar)
SIZES(SHIFT_BY_NONZERO, shl)
SIZES(SHIFT_BY_NONZERO, shr)
SIZES(SHIFT_BY_NONZERO, sar)

#define DOUBLE_KEEPING(mnem, constraint, a, b, count)                                              \
    do {                                                                                           \
        uint32_t f = c->oszapc;                                                                    \
        __asm__ volatile(FLAGS_RESTORE mnem " %%cl, %3, %0" FLAGS_SAVE                             \
                         : constraint(a), "+a"(f)                                                  \
                         : "c"(count), "r"(b)                                                      \
                         : "cc");                                                                  \
        c->oszapc = f;                                                                             \
    } while (0)

#define DOUBLE_SHIFT(bits, s, name, suffix, count)                                                 \
    static void name##_r##suffix##bits(struct icpu *c, const struct insn *i)                       \
    {                                                                                              \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8);                          \
        uint##bits##_t b = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        DOUBLE_KEEPING(#name s, "+r", a, b, count);                                                \
        reg_write(c, i->dst, bits / 8, a);                                                         \
    }                                                                                              \
    static void name##_m##suffix##bits(struct icpu *c, const struct insn *i)                       \
    {                                                                                              \
        uint##bits##_t b = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        uint##bits##_t *a = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, false);          \
        DOUBLE_KEEPING(#name s, "+m", *a, b, count);                                               \
        mem_rmw_end(c, a);                                                                         \
    }

SIZES_WORD(DOUBLE_SHIFT, shld, c, COUNT_CL)
SIZES_WORD(DOUBLE_SHIFT, shld, i, COUNT_IMM)
SIZES_WORD(DOUBLE_SHIFT, shrd, c, COUNT_CL)
SIZES_WORD(DOUBLE_SHIFT, shrd, i, COUNT_IMM)

enum shift_op { SHIFT_ROL, SHIFT_ROR, SHIFT_RCL, SHIFT_RCR, SHIFT_SHL, SHIFT_SHR, SHIFT_SAR, SHIFT_SHLD, SHIFT_SHRD, SHIFT_OPS };
enum shift_form { SHIFT_RC, SHIFT_MC, SHIFT_RI, SHIFT_MI, SHIFT_RN, SHIFT_MN, SHIFT_FORMS };

#define FORMS_SHIFT(name) \
    [SHIFT_RC] = ROW(name##_rc), [SHIFT_MC] = ROW(name##_mc), [SHIFT_RI] = ROW(name##_ri), [SHIFT_MI] = ROW(name##_mi)
#define FORMS_ROTATE(name) FORMS_SHIFT(name), [SHIFT_RN] = ROW(name##_rn), [SHIFT_MN] = ROW(name##_mi)
#define FORMS_NONZERO(name) FORMS_SHIFT(name), [SHIFT_RN] = ROW(name##_rn), [SHIFT_MN] = ROW(name##_mn)
#define FORMS_DOUBLE(name)                                                                         \
    [SHIFT_RC] = ROW_WORD(name##_rc), [SHIFT_MC] = ROW_WORD(name##_mc), [SHIFT_RI] = ROW_WORD(name##_ri), \
    [SHIFT_MI] = ROW_WORD(name##_mi)

static insn_fn *const shift_table[SHIFT_OPS][SHIFT_FORMS][4] = {
    [SHIFT_ROL] = {FORMS_ROTATE(rol)}, [SHIFT_ROR] = {FORMS_ROTATE(ror)},  [SHIFT_RCL] = {FORMS_SHIFT(rcl)},
    [SHIFT_RCR] = {FORMS_SHIFT(rcr)},   [SHIFT_SHL] = {FORMS_NONZERO(shl)},  [SHIFT_SHR] = {FORMS_NONZERO(shr)},
    [SHIFT_SAR] = {FORMS_NONZERO(sar)}, [SHIFT_SHLD] = {FORMS_DOUBLE(shld)}, [SHIFT_SHRD] = {FORMS_DOUBLE(shrd)},
};

static enum shift_op shift_op(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_ROL:
        return SHIFT_ROL;
    case ZYDIS_MNEMONIC_ROR:
        return SHIFT_ROR;
    case ZYDIS_MNEMONIC_RCL:
        return SHIFT_RCL;
    case ZYDIS_MNEMONIC_RCR:
        return SHIFT_RCR;
    case ZYDIS_MNEMONIC_SHL:
        return SHIFT_SHL;
    case ZYDIS_MNEMONIC_SHR:
        return SHIFT_SHR;
    case ZYDIS_MNEMONIC_SAR:
        return SHIFT_SAR;
    case ZYDIS_MNEMONIC_SHLD:
        return SHIFT_SHLD;
    case ZYDIS_MNEMONIC_SHRD:
        return SHIFT_SHRD;
    default:
        return SHIFT_OPS;
    }
}

insn_fn *shift_select(const struct decode *d, struct insn *i)
{
    enum shift_op op = shift_op(d->zi.mnemonic);
    if (op == SHIFT_OPS)
        return NULL;
    const ZydisDecodedOperand *count = &d->op[d->zi.operand_count_visible - 1];
    bool memory = d->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY;
    enum shift_form form = SHIFT_RC;
    if (count->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        i->extra = (uint8_t)count->imm.value.u & (i->op_size == 8 ? 63 : 31);
        bool shift = i->extra && op >= SHIFT_SHL && op <= SHIFT_SAR, rotate = i->extra > 1 && op <= SHIFT_ROR;
        form = shift || rotate ? SHIFT_RN : SHIFT_RI;
    }
    return shift_table[op][form + memory][size_index(i->op_size)];
}
