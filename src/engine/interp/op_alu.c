/*
 * ADD OR ADC SBB AND SUB XOR CMP TEST, INC DEC NEG NOT, in every size and form.
 *
 * Memory destinations are operated on in place, on the host address that mem_rmw has checked for writing; LOCK is then the host's own.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

/* a, b: values of the operand's type; f: uint32_t. */
#define ALU_PLAIN(mnem, constraint, a, b, f) \
    __asm__ volatile(mnem " %2, %0" FLAGS_SAVE : constraint(a), "=a"(f) : "q"(b) : "cc")
#define ALU_CARRY(mnem, constraint, a, b, f)                                                       \
    do {                                                                                           \
        f = c->oszapc;                                                                             \
        __asm__ volatile(CARRY_RESTORE mnem " %2, %0" FLAGS_SAVE                                   \
                         : constraint(a), "+a"(f)                                                  \
                         : "q"(b)                                                                  \
                         : "cc");                                                                  \
    } while (0)

/* A function `name` whose second operand is `b` and whose first is a register (written back when `store`) ... */
#define ALU_TO_REG(name, mnem, bits, DO, store, b_value)                                           \
    GENERAL void name(struct icpu *c, const struct insn *i)                                        \
    {                                                                                              \
        uint##bits##_t b = (uint##bits##_t)(b_value);                                              \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8);                          \
        uint32_t f;                                                                                \
        DO(mnem, "+q", a, b, f);                                                                   \
        if (store)                                                                                 \
            reg_write(c, i->dst, bits / 8, a);                                                     \
        c->oszapc = f;                                                                             \
    }
/* ... or memory. */
#define ALU_TO_MEM(name, mnem, bits, DO, locked, b_value)                                          \
    GENERAL void name(struct icpu *c, const struct insn *i)                                        \
    {                                                                                              \
        uint##bits##_t b = (uint##bits##_t)(b_value);                                              \
        uint##bits##_t *a = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, locked);         \
        uint32_t f;                                                                                \
        DO(mnem, "+m", *a, b, f);                                                                  \
        c->oszapc = f;                                                                             \
        mem_rmw_end(c, a);                                                                         \
    }
#define ALU_FROM_MEM_ONLY(name, mnem, bits, b_value)                                               \
    GENERAL void name(struct icpu *c, const struct insn *i)                                        \
    {                                                                                              \
        uint##bits##_t b = (uint##bits##_t)(b_value);                                              \
        uint##bits##_t a = mem_read##bits(c, ea_linear(c, i, bits / 8, false));                    \
        uint32_t f;                                                                                \
        ALU_PLAIN(mnem, "+q", a, b, f);                                                            \
        c->oszapc = f;                                                                             \
    }

/* Flat ones (op_priv.h): like the above, on a TLB hit. */
#define ALU_FLAT_LOAD(name, general, mnem, bits, DO, store)                                        \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        FLAT_HOST(p, bits, flat_linear(c, i), read, general);                                      \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8), b = *p;                  \
        uint32_t f;                                                                                \
        DO(mnem, "+q", a, b, f);                                                                   \
        if (store)                                                                                 \
            reg_write(c, i->dst, bits / 8, a);                                                     \
        c->oszapc = f;                                                                             \
    }
#define ALU_FLAT_MODIFY(name, general, mnem, bits, DO, b_value)                                    \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        FLAT_HOST(p, bits, flat_linear(c, i), write, general);                                     \
        uint##bits##_t b = (uint##bits##_t)(b_value);                                              \
        uint32_t f;                                                                                \
        DO(mnem, "+m", *p, b, f);                                                                  \
        c->oszapc = f;                                                                             \
        flat_stored(c, p);                                                                         \
    }
#define ALU_FLAT_COMPARE(name, general, mnem, bits, b_value)                                       \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        FLAT_HOST(p, bits, flat_linear(c, i), read, general);                                      \
        uint##bits##_t a = *p, b = (uint##bits##_t)(b_value);                                      \
        uint32_t f;                                                                                \
        ALU_PLAIN(mnem, "+q", a, b, f);                                                            \
        c->oszapc = f;                                                                             \
    }

#define REG_SRC(bits) reg_read(c, i->src, bits / 8)
#define MEM_SRC(bits) mem_read##bits(c, ea_linear(c, i, bits / 8, false))

#define ALU_STORING(bits, s, name, DO)                                                             \
    ALU_TO_REG(name##_rr##bits, #name s, bits, DO, true, REG_SRC(bits))                            \
    ALU_TO_REG(name##_ri##bits, #name s, bits, DO, true, i->imm)                                   \
    ALU_TO_REG(name##_rm##bits, #name s, bits, DO, true, MEM_SRC(bits))                            \
    ALU_TO_MEM(name##_mr##bits, #name s, bits, DO, false, REG_SRC(bits))                           \
    ALU_TO_MEM(name##_mi##bits, #name s, bits, DO, false, i->imm)                                  \
    ALU_TO_MEM(name##_lock_mr##bits, "lock " #name s, bits, DO, true, REG_SRC(bits))               \
    ALU_TO_MEM(name##_lock_mi##bits, "lock " #name s, bits, DO, true, i->imm)               \
    ALU_FLAT_LOAD(name##_flat_rm##bits, name##_rm##bits, #name s, bits, DO, true)                  \
    ALU_FLAT_MODIFY(name##_flat_mr##bits, name##_mr##bits, #name s, bits, DO, REG_SRC(bits))       \
    ALU_FLAT_MODIFY(name##_flat_mi##bits, name##_mi##bits, #name s, bits, DO, i->imm)

#define ALU_COMPARING(bits, s, name, unused)                                                       \
    ALU_TO_REG(name##_rr##bits, #name s, bits, ALU_PLAIN, false, REG_SRC(bits))                    \
    ALU_TO_REG(name##_ri##bits, #name s, bits, ALU_PLAIN, false, i->imm)                           \
    ALU_TO_REG(name##_rm##bits, #name s, bits, ALU_PLAIN, false, MEM_SRC(bits))                    \
    ALU_FROM_MEM_ONLY(name##_mr##bits, #name s, bits, REG_SRC(bits))                               \
    ALU_FROM_MEM_ONLY(name##_mi##bits, #name s, bits, i->imm)                                      \
    ALU_FLAT_LOAD(name##_flat_rm##bits, name##_rm##bits, #name s, bits, ALU_PLAIN, false)          \
    ALU_FLAT_COMPARE(name##_flat_mr##bits, name##_mr##bits, #name s, bits, REG_SRC(bits))          \
    ALU_FLAT_COMPARE(name##_flat_mi##bits, name##_mi##bits, #name s, bits, i->imm)

SIZES(ALU_STORING, add, ALU_PLAIN)
SIZES(ALU_STORING, or, ALU_PLAIN)
SIZES(ALU_STORING, adc, ALU_CARRY)
SIZES(ALU_STORING, sbb, ALU_CARRY)
SIZES(ALU_STORING, and, ALU_PLAIN)
SIZES(ALU_STORING, sub, ALU_PLAIN)
SIZES(ALU_STORING, xor, ALU_PLAIN)
SIZES(ALU_COMPARING, cmp, )
SIZES(ALU_COMPARING, test, )

/* INC and DEC keep CF; NEG sets all flags; NOT none. */
#define UNARY_KEEP_CARRY(mnem, constraint, a)                                                      \
    do {                                                                                           \
        uint32_t f = c->oszapc;                                                                    \
        __asm__ volatile(CARRY_RESTORE mnem " %0" FLAGS_SAVE : constraint(a), "+a"(f) : : "cc");   \
        c->oszapc = f;                                                                             \
    } while (0)
#define UNARY_FLAGS(mnem, constraint, a)                                                           \
    do {                                                                                           \
        uint32_t f;                                                                                \
        __asm__ volatile(mnem " %0" FLAGS_SAVE : constraint(a), "=a"(f) : : "cc");                 \
        c->oszapc = f;                                                                             \
    } while (0)
#define UNARY_NO_FLAGS(mnem, constraint, a) __asm__ volatile(mnem " %0" : constraint(a))

#define UNARY_MEM(name, mnem, bits, DO, locked)                                                    \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        uint##bits##_t *a = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, locked);         \
        DO(mnem, "+m", *a);                                                                        \
        mem_rmw_end(c, a);                                                                         \
    }
#define UNARY_OP(bits, s, name, DO)                                                                \
    static void name##_r##bits(struct icpu *c, const struct insn *i)                               \
    {                                                                                              \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8);                          \
        DO(#name s, "+q", a);                                                                      \
        reg_write(c, i->dst, bits / 8, a);                                                         \
    }                                                                                              \
    UNARY_MEM(name##_m##bits, #name s, bits, DO, false)                                            \
    UNARY_MEM(name##_lock_m##bits, "lock " #name s, bits, DO, true)

SIZES(UNARY_OP, inc, UNARY_KEEP_CARRY)
SIZES(UNARY_OP, dec, UNARY_KEEP_CARRY)
SIZES(UNARY_OP, neg, UNARY_FLAGS)
SIZES(UNARY_OP, not, UNARY_NO_FLAGS)

#define FORMS_COMPARING(name) \
    [FORM_RR] = ROW(name##_rr), [FORM_RI] = ROW(name##_ri), [FORM_RM] = ROW(name##_rm), [FORM_MR] = ROW(name##_mr), \
    [FORM_MI] = ROW(name##_mi)
#define FORMS_STORING(name) \
    FORMS_COMPARING(name), [FORM_LOCK_MR] = ROW(name##_lock_mr), [FORM_LOCK_MI] = ROW(name##_lock_mi)
#define FORMS_UNARY(name) \
    [UNARY_R] = ROW(name##_r), [UNARY_M] = ROW(name##_m), [UNARY_LOCK_M] = ROW(name##_lock_m)

#define FORMS_FLAT(name) \
    [FORM_RM] = ROW(name##_flat_rm), [FORM_MR] = ROW(name##_flat_mr), [FORM_MI] = ROW(name##_flat_mi)

enum alu_op { ALU_ADD, ALU_OR, ALU_ADC, ALU_SBB, ALU_AND, ALU_SUB, ALU_XOR, ALU_CMP, ALU_TEST, ALU_OPS };
enum alu_unary { ALU_INC, ALU_DEC, ALU_NEG, ALU_NOT, ALU_UNARY_OPS };

static insn_fn *const binary_table[ALU_OPS][FORM_COUNT][4] = {
    [ALU_ADD] = {FORMS_STORING(add)},   [ALU_OR] = {FORMS_STORING(or)},   [ALU_ADC] = {FORMS_STORING(adc)},
    [ALU_SBB] = {FORMS_STORING(sbb)},   [ALU_AND] = {FORMS_STORING(and)}, [ALU_SUB] = {FORMS_STORING(sub)},
    [ALU_XOR] = {FORMS_STORING(xor)},   [ALU_CMP] = {FORMS_COMPARING(cmp)}, [ALU_TEST] = {FORMS_COMPARING(test)},
};

static insn_fn *const flat_table[ALU_OPS][FORM_COUNT][4] = {
    [ALU_ADD] = {FORMS_FLAT(add)}, [ALU_OR] = {FORMS_FLAT(or)},   [ALU_ADC] = {FORMS_FLAT(adc)},
    [ALU_SBB] = {FORMS_FLAT(sbb)}, [ALU_AND] = {FORMS_FLAT(and)}, [ALU_SUB] = {FORMS_FLAT(sub)},
    [ALU_XOR] = {FORMS_FLAT(xor)}, [ALU_CMP] = {FORMS_FLAT(cmp)}, [ALU_TEST] = {FORMS_FLAT(test)},
};

static insn_fn *const unary_table[ALU_UNARY_OPS][UNARY_COUNT][4] = {
    [ALU_INC] = {FORMS_UNARY(inc)},
    [ALU_DEC] = {FORMS_UNARY(dec)},
    [ALU_NEG] = {FORMS_UNARY(neg)},
    [ALU_NOT] = {FORMS_UNARY(not)},
};

static insn_fn *select_binary(const struct decode *d, const struct insn *i, enum alu_op op)
{
    enum operand_form form = operand_form(d);
    if (form == FORM_NONE)
        return NULL;
    unsigned size = size_index(i->op_size);
    insn_fn *flat = flat_usable(d) ? flat_table[op][form][size] : NULL;
    return flat ? flat : binary_table[op][form][size];
}

static insn_fn *select_unary(const struct decode *d, const struct insn *i, enum alu_unary op)
{
    enum unary_form form = unary_form(d);
    return form == UNARY_NONE ? NULL : unary_table[op][form][size_index(i->op_size)];
}

insn_fn *alu_select(const struct decode *d, struct insn *i)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_ADD:
        return select_binary(d, i, ALU_ADD);
    case ZYDIS_MNEMONIC_OR:
        return select_binary(d, i, ALU_OR);
    case ZYDIS_MNEMONIC_ADC:
        return select_binary(d, i, ALU_ADC);
    case ZYDIS_MNEMONIC_SBB:
        return select_binary(d, i, ALU_SBB);
    case ZYDIS_MNEMONIC_AND:
        return select_binary(d, i, ALU_AND);
    case ZYDIS_MNEMONIC_SUB:
        return select_binary(d, i, ALU_SUB);
    case ZYDIS_MNEMONIC_XOR:
        return select_binary(d, i, ALU_XOR);
    case ZYDIS_MNEMONIC_CMP:
        return select_binary(d, i, ALU_CMP);
    case ZYDIS_MNEMONIC_TEST:
        return select_binary(d, i, ALU_TEST);
    case ZYDIS_MNEMONIC_INC:
        return select_unary(d, i, ALU_INC);
    case ZYDIS_MNEMONIC_DEC:
        return select_unary(d, i, ALU_DEC);
    case ZYDIS_MNEMONIC_NEG:
        return select_unary(d, i, ALU_NEG);
    case ZYDIS_MNEMONIC_NOT:
        return select_unary(d, i, ALU_NOT);
    default:
        return NULL;
    }
}
