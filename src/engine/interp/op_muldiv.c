/*
 * MUL IMUL DIV IDIV.
 *
 * Results and flags come from the host's instruction; those that are undefined in the manual may be what they were, so the guest's are put into the host's before. Quotients are checked before that, so that #DE is the guest's.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

/* One operand: AX = AL * b, or xDX:xAX = xAX * b. */
#define MULTIPLY8(name, mnem)                                                                      \
    static void name##_do8(struct icpu *c, uint8_t b)                                              \
    {                                                                                              \
        uint32_t f = c->oszapc, product = (uint8_t)c->v.cpu.gpr[GPR_RAX];                          \
        __asm__ volatile(FLAGS_RESTORE "movl %1, %%eax\n\t" mnem "b %2\n\tmovzwl %%ax, %1" FLAGS_SAVE \
                         : "+&a"(f), "+&r"(product)                                                \
                         : "q"(b)                                                                  \
                         : "cc");                                                                  \
        reg_write(c, REG_OFFSET(GPR_RAX), 2, product);                                             \
        c->oszapc = f;                                                                             \
    }
#define MULTIPLY(bits, s, name, mnem)                                                              \
    static void name##_do##bits(struct icpu *c, uint##bits##_t b)                                  \
    {                                                                                              \
        uint64_t f_ = c->oszapc, low = c->v.cpu.gpr[GPR_RAX], high;                                \
        __asm__ volatile(FLAGS_RESTORE "movq %1, %%rax\n\t" mnem s " %3\n\tmovq %%rax, %1" FLAGS_SAVE \
                         : "+&a"(f_), "+&r"(low), "=&d"(high)                                      \
                         : "r"(b)                                                                  \
                         : "cc");                                                                  \
        reg_write(c, REG_OFFSET(GPR_RAX), bits / 8, low);                                          \
        reg_write(c, REG_OFFSET(GPR_RDX), bits / 8, high);                                         \
        c->oszapc = (uint32_t)f_;                                                                  \
    }

MULTIPLY8(mul, "mul")
MULTIPLY8(imul, "imul")
SIZES_WORD(MULTIPLY, mul, "mul")
SIZES_WORD(MULTIPLY, imul, "imul")

/* The quotient is known to fit. */
#define HOST_DIVIDE8(name, mnem)                                                                   \
    static void name##_by_host8(struct icpu *c, uint8_t b)                                         \
    {                                                                                              \
        uint32_t f = c->oszapc, both = (uint16_t)c->v.cpu.gpr[GPR_RAX];                            \
        __asm__ volatile(FLAGS_RESTORE "movl %1, %%eax\n\t" mnem "b %2\n\tmovzwl %%ax, %1" FLAGS_SAVE \
                         : "+&a"(f), "+&r"(both)                                                   \
                         : "q"(b)                                                                  \
                         : "cc");                                                                  \
        reg_write(c, REG_OFFSET(GPR_RAX), 2, both);                                                \
        c->oszapc = f;                                                                             \
    }
#define HOST_DIVIDE(bits, s, name, mnem)                                                           \
    static void name##_by_host##bits(struct icpu *c, uint##bits##_t b)                             \
    {                                                                                              \
        uint64_t f = c->oszapc, low = c->v.cpu.gpr[GPR_RAX], high = c->v.cpu.gpr[GPR_RDX];         \
        __asm__ volatile(FLAGS_RESTORE "movq %1, %%rax\n\t" mnem s " %3\n\tmovq %%rax, %1" FLAGS_SAVE \
                         : "+&a"(f), "+&r"(low), "+&d"(high)                                       \
                         : "r"(b)                                                                  \
                         : "cc");                                                                  \
        reg_write(c, REG_OFFSET(GPR_RAX), bits / 8, low);                                          \
        reg_write(c, REG_OFFSET(GPR_RDX), bits / 8, high);                                         \
        c->oszapc = (uint32_t)f;                                                                   \
    }

HOST_DIVIDE8(div, "div")
HOST_DIVIDE8(idiv, "idiv")
SIZES_WORD(HOST_DIVIDE, div, "div")
SIZES_WORD(HOST_DIVIDE, idiv, "idiv")

static void div_do64(struct icpu *c, uint64_t b)
{
    if (c->v.cpu.gpr[GPR_RDX] >= b) /* also b == 0 */
        raise_fault(c, VECTOR_DE);
    div_by_host64(c, b);
}

/* By magnitudes: the quotient's sign is the product of the signs. */
static void idiv_do64(struct icpu *c, uint64_t b)
{
    const uint64_t *gpr = c->v.cpu.gpr;
    bool negative = (int64_t)gpr[GPR_RDX] < 0, negate = negative != ((int64_t)b < 0);
    unsigned __int128 a = (unsigned __int128)gpr[GPR_RDX] << 64 | gpr[GPR_RAX];
    uint64_t divisor = (int64_t)b < 0 ? -b : b;
    if (negative)
        a = -a;
    uint64_t quotient = (uint64_t)a, high = (uint64_t)(a >> 64);
    if (high >= divisor)
        raise_fault(c, VECTOR_DE);
    __asm__("divq %2" : "+a"(quotient), "+d"(high) : "r"(divisor) : "cc");
    if (quotient > (uint64_t)INT64_MAX + negate)
        raise_fault(c, VECTOR_DE);
    idiv_by_host64(c, b);
}

/* The narrower dividends fit in 64 bits: xDX:xAX as one value, and AX. */
#define DIVIDEND(bits, wide) \
    ((wide)((uint64_t)(uint##bits##_t)c->v.cpu.gpr[GPR_RDX] << bits | (uint##bits##_t)c->v.cpu.gpr[GPR_RAX]))

#define DIVIDE(name, bits, narrow, wide, dividend, overflows)                                      \
    static void name##_do##bits(struct icpu *c, uint##bits##_t divisor)                            \
    {                                                                                              \
        wide a = dividend;                                                                         \
        wide b = (narrow)divisor;                                                                  \
        if (b == 0 || (overflows) || a / b != (narrow)(a / b))                                     \
            raise_fault(c, VECTOR_DE);                                                             \
        name##_by_host##bits(c, divisor);                                                          \
    }

DIVIDE(div, 8, uint8_t, uint32_t, (uint16_t)c->v.cpu.gpr[GPR_RAX], false)
DIVIDE(div, 16, uint16_t, uint32_t, DIVIDEND(16, uint32_t), false)
DIVIDE(div, 32, uint32_t, uint64_t, DIVIDEND(32, uint64_t), false)
DIVIDE(idiv, 8, int8_t, int32_t, (int16_t)c->v.cpu.gpr[GPR_RAX], false)
DIVIDE(idiv, 16, int16_t, int64_t, (int32_t)DIVIDEND(16, uint32_t), false)
/* The one 64-bit quotient that the host cannot represent is out of range for the guest too. */
DIVIDE(idiv, 32, int32_t, int64_t, DIVIDEND(32, int64_t), a == INT64_MIN && b == -1)

#define ONE_OPERAND(bits, s, name, unused)                                                         \
    static void name##_r##bits(struct icpu *c, const struct insn *i)                               \
    {                                                                                              \
        name##_do##bits(c, (uint##bits##_t)reg_read(c, i->dst, bits / 8));                         \
    }                                                                                              \
    static void name##_m##bits(struct icpu *c, const struct insn *i)                               \
    {                                                                                              \
        name##_do##bits(c, mem_read##bits(c, ea_linear(c, i, bits / 8, false)));                   \
    }

SIZES(ONE_OPERAND, mul, )
SIZES(ONE_OPERAND, imul, )
SIZES(ONE_OPERAND, div, )
SIZES(ONE_OPERAND, idiv, )

/* IMUL with two and three operands: dst = a * b, truncated. */
#define IMUL_TO_REG(name, bits, s, a_value, b_value)                                               \
    static void name##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        uint##bits##_t a = (uint##bits##_t)(a_value), b = (uint##bits##_t)(b_value);               \
        uint32_t f = c->oszapc;                                                                    \
        __asm__ volatile(FLAGS_RESTORE "imul" s " %2, %0" FLAGS_SAVE : "+&r"(a), "+&a"(f) : "r"(b) : "cc"); \
        reg_write(c, i->dst, bits / 8, a);                                                         \
        c->oszapc = f;                                                                             \
    }
#define MEM_SRC(bits) mem_read##bits(c, ea_linear(c, i, bits / 8, false))
#define IMUL_FORMS(bits, s, unused)                                                                \
    IMUL_TO_REG(imul_rr, bits, s, reg_read(c, i->dst, bits / 8), reg_read(c, i->src, bits / 8))    \
    IMUL_TO_REG(imul_rm, bits, s, MEM_SRC(bits), reg_read(c, i->dst, bits / 8))                    \
    IMUL_TO_REG(imul_rri, bits, s, reg_read(c, i->src, bits / 8), i->imm)                          \
    IMUL_TO_REG(imul_rmi, bits, s, MEM_SRC(bits), i->imm)
SIZES_WORD(IMUL_FORMS, )

enum muldiv_op { MULDIV_MUL, MULDIV_IMUL, MULDIV_DIV, MULDIV_IDIV, MULDIV_OPS };

static insn_fn *const one_operand_table[MULDIV_OPS][2][4] = {
    [MULDIV_MUL] = {ROW(mul_r), ROW(mul_m)},
    [MULDIV_IMUL] = {ROW(imul_r), ROW(imul_m)},
    [MULDIV_DIV] = {ROW(div_r), ROW(div_m)},
    [MULDIV_IDIV] = {ROW(idiv_r), ROW(idiv_m)},
};

static insn_fn *const imul_table[2][2][4] = { /* [three operands][memory] */
    {ROW_WORD(imul_rr), ROW_WORD(imul_rm)},
    {ROW_WORD(imul_rri), ROW_WORD(imul_rmi)},
};

insn_fn *muldiv_select(const struct decode *d, struct insn *i)
{
    enum muldiv_op op;
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_MUL:
        op = MULDIV_MUL;
        break;
    case ZYDIS_MNEMONIC_IMUL:
        op = MULDIV_IMUL;
        break;
    case ZYDIS_MNEMONIC_DIV:
        op = MULDIV_DIV;
        break;
    case ZYDIS_MNEMONIC_IDIV:
        op = MULDIV_IDIV;
        break;
    default:
        return NULL;
    }
    unsigned operands = d->zi.operand_count_visible, size = size_index(i->op_size);
    if (operands == 1)
        return one_operand_table[op][d->op[0].type == ZYDIS_OPERAND_TYPE_MEMORY][size];
    return imul_table[operands == 3][d->op[1].type == ZYDIS_OPERAND_TYPE_MEMORY][size];
}
