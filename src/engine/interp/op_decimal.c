/*
 * Decimal adjustment: DAA DAS AAA AAS AAM AAD. Legacy modes only, so the host, in 64-bit mode, cannot execute them for us.
 *
 * Flags that the manual calls undefined come out as zero. Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

static uint8_t al(const struct icpu *c)
{
    return (uint8_t)c->v.cpu.gpr[GPR_RAX];
}

static uint8_t ah(const struct icpu *c)
{
    return (uint8_t)(c->v.cpu.gpr[GPR_RAX] >> 8);
}

static void ax_set(struct icpu *c, unsigned high, unsigned low)
{
    reg_write(c, REG_OFFSET(GPR_RAX), 2, (high & 0xff) << 8 | (low & 0xff));
}

/* SF, ZF and PF of a byte, with AF and CF as given. */
static void flags_decimal(struct icpu *c, uint8_t value, bool auxiliary, bool carry)
{
    uint32_t f = carry ? OSZAPC_CF : 0;
    f |= auxiliary ? OSZAPC_AF : 0;
    f |= value & 0x80 ? OSZAPC_SF : 0;
    f |= value == 0 ? OSZAPC_ZF : 0;
    f |= __builtin_popcount(value) & 1 ? 0 : OSZAPC_PF;
    c->oszapc = f;
}

/* SDM vol. 2, DAA and DAS: `sign` is 1 to adjust after addition, -1 after subtraction. */
static void adjust_packed(struct icpu *c, int sign)
{
    uint8_t old = al(c);
    bool old_carry = c->oszapc & OSZAPC_CF;
    bool low = (old & 0xf) > 9 || c->oszapc & OSZAPC_AF;
    bool high = old > 0x99 || old_carry;
    int value = old + (low ? sign * 6 : 0);
    bool borrow = low && sign < 0 && value < 0;
    if (high)
        value += sign * 0x60;
    ax_set(c, ah(c), (unsigned)value);
    flags_decimal(c, (uint8_t)value, low, high || borrow);
}

static void daa(struct icpu *c, const struct insn *i)
{
    adjust_packed(c, 1);
}

static void das(struct icpu *c, const struct insn *i)
{
    adjust_packed(c, -1);
}

static void aaa(struct icpu *c, const struct insn *i)
{
    bool adjust = (al(c) & 0xf) > 9 || c->oszapc & OSZAPC_AF;
    unsigned ax = (unsigned)ah(c) << 8 | al(c);
    if (adjust)
        ax += 0x106;
    ax_set(c, ax >> 8, ax & 0xf);
    flags_decimal(c, ax & 0xf, adjust, adjust);
}

static void aas(struct icpu *c, const struct insn *i)
{
    bool adjust = (al(c) & 0xf) > 9 || c->oszapc & OSZAPC_AF;
    unsigned ax = (unsigned)ah(c) << 8 | al(c);
    if (adjust)
        ax -= 0x106;
    ax_set(c, ax >> 8, ax & 0xf);
    flags_decimal(c, ax & 0xf, adjust, adjust);
}

static void aam(struct icpu *c, const struct insn *i)
{
    uint8_t base = (uint8_t)i->imm, value = al(c);
    if (!base)
        raise_fault(c, VECTOR_DE);
    ax_set(c, value / base, value % base);
    flags_decimal(c, value % base, false, false);
}

static void aad(struct icpu *c, const struct insn *i)
{
    uint8_t value = (uint8_t)(al(c) + ah(c) * (uint8_t)i->imm);
    ax_set(c, 0, value);
    flags_decimal(c, value, false, false);
}

insn_fn *decimal_select(const struct decode *d, struct insn *i)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_DAA:
        return daa;
    case ZYDIS_MNEMONIC_DAS:
        return das;
    case ZYDIS_MNEMONIC_AAA:
        return aaa;
    case ZYDIS_MNEMONIC_AAS:
        return aas;
    case ZYDIS_MNEMONIC_AAM:
        return aam;
    case ZYDIS_MNEMONIC_AAD:
        return aad;
    default:
        return NULL;
    }
}
