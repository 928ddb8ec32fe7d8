/*
 * BT BTS BTR BTC, BSF BSR, POPCNT LZCNT TZCNT.
 *
 * A bit index in a register with a memory operand addresses a string of bits: it reaches beyond the operand, in units of the operand size, both
 * ways (SDM vol. 2, BT). Only CF changes; the manual leaves OF SF AF PF undefined and processors keep them.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

/* Locked read-modify-write of one bit by the host; returns the old bit. */
#define BIT_HOST(prefix, mnem, bits, s, p, index)                                                  \
    ({                                                                                             \
        uint8_t old_;                                                                              \
        __asm__ volatile(prefix mnem s " %2, %0\n\tsetc %1"                                        \
                         : "+m"(*(p)), "=q"(old_)                                                  \
                         : "r"((uint##bits##_t)((index) & (bits - 1)))                             \
                         : "cc");                                                                  \
        old_;                                                                                      \
    })

#define BIT_CHANGED_set(value, mask) ((value) | (mask))
#define BIT_CHANGED_reset(value, mask) ((value) & ~(mask))
#define BIT_CHANGED_flip(value, mask) ((value) ^ (mask))
#define BIT_CHANGED_none(value, mask) (value)

/* Address of the operand-sized unit that holds bit `index` (signed) of the string. */
#define BIT_STRING_LINEAR(bits, index, write)                                                      \
    linear_address(c, i->flags &INSN_LEGACY, i->segment,                                           \
                   (ea_offset(c, i) + ((uint64_t)((int64_t)(index) >> __builtin_ctz(bits)) * (bits / 8))) & \
                       i->address_mask,                                                            \
                   bits / 8, write)

#define BIT_REG(name, bits, change, index)                                                         \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8);                          \
        unsigned n = (unsigned)(index) & (bits - 1);                                               \
        carry_set(c, a >> n & 1);                                                                  \
        if (BIT_CHANGED_##change(0u, 1u) != 0 || BIT_CHANGED_##change(1u, 1u) != 1)                \
            reg_write(c, i->dst, bits / 8, BIT_CHANGED_##change(a, (uint##bits##_t)1 << n));       \
    }
#define BIT_TEST_MEM(name, bits, linear, index)                                                    \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        int##bits##_t n = (int##bits##_t)(index);                                                  \
        uint##bits##_t a = mem_read##bits(c, linear);                                              \
        carry_set(c, a >> (n & (bits - 1)) & 1);                                                   \
    }
#define BIT_CHANGE_MEM(name, prefix, mnem, bits, s, locked, linear, index)                         \
    static void name(struct icpu *c, const struct insn *i)                                         \
    {                                                                                              \
        int##bits##_t n = (int##bits##_t)(index);                                                  \
        uint##bits##_t *p = mem_rmw(c, linear, bits / 8, locked);                                  \
        carry_set(c, BIT_HOST(prefix, mnem, bits, s, p, n));                                       \
        mem_rmw_end(c, p);                                                                         \
    }

#define INDEX_REG(bits) reg_read(c, i->src, bits / 8)

#define BIT_TEST(bits, s, unused)                                                                  \
    BIT_REG(bt_rr##bits, bits, none, INDEX_REG(bits))                                              \
    BIT_REG(bt_ri##bits, bits, none, i->imm)                                                       \
    BIT_TEST_MEM(bt_mr##bits, bits, BIT_STRING_LINEAR(bits, n, false), INDEX_REG(bits))            \
    BIT_TEST_MEM(bt_mi##bits, bits, ea_linear(c, i, bits / 8, false), i->imm)
#define BIT_CHANGE(bits, s, name, change)                                                          \
    BIT_REG(name##_rr##bits, bits, change, INDEX_REG(bits))                                        \
    BIT_REG(name##_ri##bits, bits, change, i->imm)                                                 \
    BIT_CHANGE_MEM(name##_mr##bits, "", #name, bits, s, false, BIT_STRING_LINEAR(bits, n, true), INDEX_REG(bits)) \
    BIT_CHANGE_MEM(name##_mi##bits, "", #name, bits, s, false, ea_linear(c, i, bits / 8, true), i->imm) \
    BIT_CHANGE_MEM(name##_lock_mr##bits, "lock ", #name, bits, s, true, BIT_STRING_LINEAR(bits, n, true), \
                   INDEX_REG(bits))                                                                \
    BIT_CHANGE_MEM(name##_lock_mi##bits, "lock ", #name, bits, s, true, ea_linear(c, i, bits / 8, true), i->imm)

SIZES_WORD(BIT_TEST, )
SIZES_WORD(BIT_CHANGE, bts, set)
SIZES_WORD(BIT_CHANGE, btr, reset)
SIZES_WORD(BIT_CHANGE, btc, flip)

/*
 * Scans and counts. The destination goes in and out with all 64 bits, so that a zero source leaves in it whatever the host's instruction leaves. Flags
 * the manual calls undefined come out as the host's do.
 */
#define SCAN(bits, s, name, modifier)                                                              \
    static inline void name##_do##bits(struct icpu *c, const struct insn *i, uint##bits##_t b)     \
    {                                                                                              \
        uint64_t a = reg64(c, i->dst);                                                             \
        uint32_t f = c->oszapc;                                                                    \
        __asm__ volatile(FLAGS_RESTORE #name s " %2, %" modifier "0" FLAGS_SAVE                    \
                         : "+r"(a), "+a"(f)                                                        \
                         : "r"(b)                                                                  \
                         : "cc");                                                                  \
        reg64_set(c, i->dst, a);                                                                   \
        c->oszapc = f;                                                                             \
    }                                                                                              \
    static void name##_rr##bits(struct icpu *c, const struct insn *i)                              \
    {                                                                                              \
        name##_do##bits(c, i, (uint##bits##_t)reg_read(c, i->src, bits / 8));                      \
    }                                                                                              \
    static void name##_rm##bits(struct icpu *c, const struct insn *i)                              \
    {                                                                                              \
        name##_do##bits(c, i, mem_read##bits(c, ea_linear(c, i, bits / 8, false)));                \
    }
#define SCANS(name) SCAN(16, "w", name, "w") SCAN(32, "l", name, "k") SCAN(64, "q", name, "q")

SCANS(bsf)
SCANS(bsr)
SCANS(popcnt)
SCANS(lzcnt)
SCANS(tzcnt)

enum bit_op { BIT_BT, BIT_BTS, BIT_BTR, BIT_BTC, BIT_BSF, BIT_BSR, BIT_POPCNT, BIT_LZCNT, BIT_TZCNT, BIT_OPS };

#define FORMS_TEST(name) \
    [FORM_RR] = ROW_WORD(name##_rr), [FORM_RI] = ROW_WORD(name##_ri), [FORM_MR] = ROW_WORD(name##_mr), [FORM_MI] = ROW_WORD(name##_mi)
#define FORMS_CHANGE(name) \
    FORMS_TEST(name), [FORM_LOCK_MR] = ROW_WORD(name##_lock_mr), [FORM_LOCK_MI] = ROW_WORD(name##_lock_mi)
#define FORMS_SCAN(name) [FORM_RR] = ROW_WORD(name##_rr), [FORM_RM] = ROW_WORD(name##_rm)

static insn_fn *const bit_table[BIT_OPS][FORM_COUNT][4] = {
    [BIT_BT] = {FORMS_TEST(bt)},         [BIT_BTS] = {FORMS_CHANGE(bts)},    [BIT_BTR] = {FORMS_CHANGE(btr)},
    [BIT_BTC] = {FORMS_CHANGE(btc)},     [BIT_BSF] = {FORMS_SCAN(bsf)},      [BIT_BSR] = {FORMS_SCAN(bsr)},
    [BIT_POPCNT] = {FORMS_SCAN(popcnt)}, [BIT_LZCNT] = {FORMS_SCAN(lzcnt)}, [BIT_TZCNT] = {FORMS_SCAN(tzcnt)},
};

static enum bit_op bit_op(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_BT:
        return BIT_BT;
    case ZYDIS_MNEMONIC_BTS:
        return BIT_BTS;
    case ZYDIS_MNEMONIC_BTR:
        return BIT_BTR;
    case ZYDIS_MNEMONIC_BTC:
        return BIT_BTC;
    case ZYDIS_MNEMONIC_BSF:
        return BIT_BSF;
    case ZYDIS_MNEMONIC_BSR:
        return BIT_BSR;
    case ZYDIS_MNEMONIC_POPCNT:
        return BIT_POPCNT;
    case ZYDIS_MNEMONIC_LZCNT:
        return BIT_LZCNT;
    case ZYDIS_MNEMONIC_TZCNT:
        return BIT_TZCNT;
    default:
        return BIT_OPS;
    }
}

insn_fn *bit_select(const struct decode *d, struct insn *i)
{
    enum bit_op op = bit_op(d->zi.mnemonic);
    enum operand_form form = operand_form(d);
    if (op == BIT_OPS || form == FORM_NONE)
        return NULL;
    return bit_table[op][form][size_index(i->op_size)];
}
