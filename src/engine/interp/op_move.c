/*
 * Moves: MOV MOVZX MOVSX MOVSXD MOVBE BSWAP XCHG (registers) LEA CMOVcc SETcc, CBW and its family, XLAT, LAHF SAHF SALC.
 *
 * MOV with segment, control and debug registers is op_system.c's. XCHG with memory, always locked, is op_atomic.c's.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

#define EA(bits, write) ea_linear(c, i, bits / 8, write)
/* The offset that MOV AL/AX/EAX/RAX, moffs carries whole: 64 bits with that address size. */
#define MOFFS(bits, write) \
    linear_address(c, i->flags &INSN_LEGACY, i->segment, i->imm & i->address_mask, bits / 8, write)

#define MOV(bits, s, unused)                                                                       \
    static void mov_rr##bits(struct icpu *c, const struct insn *i)                                 \
    {                                                                                              \
        reg_write(c, i->dst, bits / 8, reg_read(c, i->src, bits / 8));                             \
    }                                                                                              \
    static void mov_ri##bits(struct icpu *c, const struct insn *i)                                 \
    {                                                                                              \
        reg_write(c, i->dst, bits / 8, i->imm);                                                    \
    }                                                                                              \
    GENERAL void mov_rm##bits(struct icpu *c, const struct insn *i)                                \
    {                                                                                              \
        reg_write(c, i->dst, bits / 8, mem_read##bits(c, EA(bits, false)));                        \
    }                                                                                              \
    GENERAL void mov_mr##bits(struct icpu *c, const struct insn *i)                                \
    {                                                                                              \
        mem_write##bits(c, EA(bits, true), (uint##bits##_t)reg_read(c, i->src, bits / 8));         \
    }                                                                                              \
    GENERAL void mov_mi##bits(struct icpu *c, const struct insn *i)                                \
    {                                                                                              \
        mem_write##bits(c, EA(bits, true), (uint##bits##_t)i->imm);                                \
    }                                                                                              \
    static void mov_from_offset##bits(struct icpu *c, const struct insn *i)                        \
    {                                                                                              \
        reg_write(c, REG_OFFSET(GPR_RAX), bits / 8, mem_read##bits(c, MOFFS(bits, false)));        \
    }                                                                                              \
    static void mov_to_offset##bits(struct icpu *c, const struct insn *i)                          \
    {                                                                                              \
        mem_write##bits(c, MOFFS(bits, true), (uint##bits##_t)c->v.cpu.gpr[GPR_RAX]);              \
    }                                                                                              \
    static void xchg_rr##bits(struct icpu *c, const struct insn *i)                                \
    {                                                                                              \
        uint64_t a = reg_read(c, i->dst, bits / 8), b = reg_read(c, i->src, bits / 8);             \
        reg_write(c, i->src, bits / 8, a);                                                         \
        reg_write(c, i->dst, bits / 8, b);                                                         \
    }
SIZES(MOV, )

static insn_fn *const mov_table[FORM_COUNT][4] = {
    [FORM_RR] = ROW(mov_rr), [FORM_RI] = ROW(mov_ri), [FORM_RM] = ROW(mov_rm), [FORM_MR] = ROW(mov_mr), [FORM_MI] = ROW(mov_mi),
};
static insn_fn *const mov_offset_table[2][4] = {ROW(mov_from_offset), ROW(mov_to_offset)};
static insn_fn *const xchg_table[4] = ROW(xchg_rr);

/* Flat ones (op_priv.h), with and without an index register. */
#define MOV_FLAT(name, bits, linear)                                                               \
    static void name##_rm##bits(struct icpu *c, const struct insn *i)                              \
    {                                                                                              \
        FLAT_HOST(p, bits, linear, read, mov_rm##bits);                                            \
        reg_write(c, i->dst, bits / 8, *p);                                                        \
    }                                                                                              \
    static void name##_mr##bits(struct icpu *c, const struct insn *i)                              \
    {                                                                                              \
        FLAT_HOST(p, bits, linear, write, mov_mr##bits);                                           \
        *p = (uint##bits##_t)reg_read(c, i->src, bits / 8);                                        \
        flat_stored(c, p);                                                                         \
    }                                                                                              \
    static void name##_mi##bits(struct icpu *c, const struct insn *i)                              \
    {                                                                                              \
        FLAT_HOST(p, bits, linear, write, mov_mi##bits);                                           \
        *p = (uint##bits##_t)i->imm;                                                               \
        flat_stored(c, p);                                                                         \
    }
#define MOV_FLATS(bits, s, unused)                                                                 \
    MOV_FLAT(mov_flat, bits, flat_linear_unindexed(c, i))                                          \
    MOV_FLAT(mov_flat_indexed, bits, flat_linear(c, i))
SIZES(MOV_FLATS, )

#define FORMS_FLAT(name) {[FORM_RM] = ROW(name##_rm), [FORM_MR] = ROW(name##_mr), [FORM_MI] = ROW(name##_mi)}
static insn_fn *const mov_flat_table[2][FORM_COUNT][4] = {FORMS_FLAT(mov_flat), FORMS_FLAT(mov_flat_indexed)};

/* Widening moves, [destination size][source size]. */
#define WIDEN(name, type, from, to)                                                                \
    static void name##_rr##from##_##to(struct icpu *c, const struct insn *i)                       \
    {                                                                                              \
        reg_write(c, i->dst, to / 8, (uint64_t)(type)reg_read(c, i->src, from / 8));               \
    }                                                                                              \
    GENERAL void name##_rm##from##_##to(struct icpu *c, const struct insn *i)                      \
    {                                                                                              \
        reg_write(c, i->dst, to / 8, (uint64_t)(type)mem_read##from(c, EA(from, false)));          \
    }                                                                                              \
    static void name##_flat##from##_##to(struct icpu *c, const struct insn *i)                     \
    {                                                                                              \
        FLAT_HOST(p, from, flat_linear(c, i), read, name##_rm##from##_##to);                       \
        reg_write(c, i->dst, to / 8, (uint64_t)(type)*p);                                          \
    }
WIDEN(movzx, uint8_t, 8, 16)
WIDEN(movzx, uint8_t, 8, 32)
WIDEN(movzx, uint16_t, 16, 32)
WIDEN(movsx, int8_t, 8, 16)
WIDEN(movsx, int8_t, 8, 32)
WIDEN(movsx, int8_t, 8, 64)
WIDEN(movsx, int16_t, 16, 32)
WIDEN(movsx, int16_t, 16, 64)
WIDEN(movsx, int32_t, 32, 64)

/* [register, memory, flat memory][source size][destination size]. Zero extension to 64 bits is that to 32. Equal sizes are odd encodings that move. */
static insn_fn *const movzx_table[3][4][4] = {
    {{NULL, movzx_rr8_16, movzx_rr8_32, movzx_rr8_32}, {NULL, mov_rr16, movzx_rr16_32, movzx_rr16_32}},
    {{NULL, movzx_rm8_16, movzx_rm8_32, movzx_rm8_32}, {NULL, mov_rm16, movzx_rm16_32, movzx_rm16_32}},
    {{NULL, movzx_flat8_16, movzx_flat8_32, movzx_flat8_32}, {NULL, mov_rm16, movzx_flat16_32, movzx_flat16_32}},
};
static insn_fn *const movsx_table[3][4][4] = {
    {{NULL, movsx_rr8_16, movsx_rr8_32, movsx_rr8_64},
     {NULL, mov_rr16, movsx_rr16_32, movsx_rr16_64},
     {NULL, mov_rr16, mov_rr32, movsx_rr32_64}},
    {{NULL, movsx_rm8_16, movsx_rm8_32, movsx_rm8_64},
     {NULL, mov_rm16, movsx_rm16_32, movsx_rm16_64},
     {NULL, mov_rm16, mov_rm32, movsx_rm32_64}},
    {{NULL, movsx_flat8_16, movsx_flat8_32, movsx_flat8_64},
     {NULL, mov_rm16, movsx_flat16_32, movsx_flat16_64},
     {NULL, mov_rm16, mov_rm32, movsx_flat32_64}},
};

/* BSWAP of a 16-bit register is undefined; what the host does with it is done. */
static void bswap16(struct icpu *c, const struct insn *i)
{
    uint64_t a = reg64(c, i->dst);
    __asm__(".byte 0x66\n\tbswapl %k0" : "+r"(a));
    reg64_set(c, i->dst, a);
}

static void bswap32(struct icpu *c, const struct insn *i)
{
    reg_write(c, i->dst, 4, __builtin_bswap32((uint32_t)reg_read(c, i->dst, 4)));
}

static void bswap64(struct icpu *c, const struct insn *i)
{
    reg64_set(c, i->dst, __builtin_bswap64(reg64(c, i->dst)));
}
static insn_fn *const bswap_table[4] = ROW_WORD(bswap);

#define MOVBE(bits, s, unused)                                                                     \
    static void movbe_rm##bits(struct icpu *c, const struct insn *i)                               \
    {                                                                                              \
        reg_write(c, i->dst, bits / 8, __builtin_bswap##bits(mem_read##bits(c, EA(bits, false)))); \
    }                                                                                              \
    static void movbe_mr##bits(struct icpu *c, const struct insn *i)                               \
    {                                                                                              \
        uint##bits##_t value = (uint##bits##_t)reg_read(c, i->src, bits / 8);                      \
        mem_write##bits(c, EA(bits, true), __builtin_bswap##bits(value));                          \
    }
SIZES_WORD(MOVBE, )
static insn_fn *const movbe_table[FORM_COUNT][4] = {[FORM_RM] = ROW_WORD(movbe_rm), [FORM_MR] = ROW_WORD(movbe_mr)};

#define LEA(bits, s, unused)                                                                       \
    static void lea##bits(struct icpu *c, const struct insn *i)                                    \
    {                                                                                              \
        reg_write(c, i->dst, bits / 8, ea_offset(c, i));                                           \
    }
SIZES_WORD(LEA, )

static void lea_flat(struct icpu *c, const struct insn *i)
{
    reg64_set(c, i->dst, reg64(c, i->base) + (uint64_t)(int64_t)i->displacement);
}
static insn_fn *const lea_table[4] = ROW_WORD(lea);

/* CMOVcc reads its source whatever the condition, and its 32-bit form clears the upper half of the destination either way. */
#define CMOV(bits, cc)                                                                             \
    static void cmov##cc##_rr##bits(struct icpu *c, const struct insn *i)                          \
    {                                                                                              \
        uint64_t a = reg_read(c, i->dst, bits / 8), b = reg_read(c, i->src, bits / 8);             \
        reg_write(c, i->dst, bits / 8, condition_holds(c->oszapc, cc) ? b : a);                    \
    }                                                                                              \
    static void cmov##cc##_rm##bits(struct icpu *c, const struct insn *i)                          \
    {                                                                                              \
        uint64_t a = reg_read(c, i->dst, bits / 8), b = mem_read##bits(c, EA(bits, false));        \
        reg_write(c, i->dst, bits / 8, condition_holds(c->oszapc, cc) ? b : a);                    \
    }
#define CONDITIONAL(cc)                                                                            \
    CMOV(16, cc)                                                                                   \
    CMOV(32, cc)                                                                                   \
    CMOV(64, cc)                                                                                   \
    static void set##cc##_r(struct icpu *c, const struct insn *i)                                  \
    {                                                                                              \
        reg_write(c, i->dst, 1, condition_holds(c->oszapc, cc));                                   \
    }                                                                                              \
    static void set##cc##_m(struct icpu *c, const struct insn *i)                                  \
    {                                                                                              \
        mem_write8(c, EA(8, true), condition_holds(c->oszapc, cc));                                \
    }
CONDITIONS(CONDITIONAL)

#define CMOV_ROWS(cc) {ROW_WORD(cmov##cc##_rr), ROW_WORD(cmov##cc##_rm)},
static insn_fn *const cmov_table[16][2][4] = {CONDITIONS(CMOV_ROWS)};
#define SET_ROW(cc) {set##cc##_r, set##cc##_m},
static insn_fn *const set_table[16][2] = {CONDITIONS(SET_ROW)};

static void cbw(struct icpu *c, const struct insn *i)
{
    reg_write(c, REG_OFFSET(GPR_RAX), 2, (uint64_t)(int8_t)c->v.cpu.gpr[GPR_RAX]);
}

static void cwde(struct icpu *c, const struct insn *i)
{
    reg_write(c, REG_OFFSET(GPR_RAX), 4, (uint64_t)(int16_t)c->v.cpu.gpr[GPR_RAX]);
}

static void cdqe(struct icpu *c, const struct insn *i)
{
    c->v.cpu.gpr[GPR_RAX] = (uint64_t)(int32_t)c->v.cpu.gpr[GPR_RAX];
}

static void cwd(struct icpu *c, const struct insn *i)
{
    reg_write(c, REG_OFFSET(GPR_RDX), 2, (uint64_t)((int16_t)c->v.cpu.gpr[GPR_RAX] >> 15));
}

static void cdq(struct icpu *c, const struct insn *i)
{
    reg_write(c, REG_OFFSET(GPR_RDX), 4, (uint64_t)((int32_t)c->v.cpu.gpr[GPR_RAX] >> 31));
}

static void cqo(struct icpu *c, const struct insn *i)
{
    c->v.cpu.gpr[GPR_RDX] = (uint64_t)((int64_t)c->v.cpu.gpr[GPR_RAX] >> 63);
}

static void xlat(struct icpu *c, const struct insn *i)
{
    uint64_t offset = (c->v.cpu.gpr[GPR_RBX] + (uint8_t)c->v.cpu.gpr[GPR_RAX]) & i->address_mask;
    gva_t linear = linear_address(c, i->flags & INSN_LEGACY, i->segment, offset, 1, false);
    reg_write(c, REG_OFFSET(GPR_RAX), 1, mem_read8(c, linear));
}

static void lahf(struct icpu *c, const struct insn *i)
{
    reg_write(c, REG_OFFSET(GPR_RAX) + 1, 1, (c->oszapc >> 8 & 0xd5) | RFLAGS_FIXED);
}

static void sahf(struct icpu *c, const struct insn *i)
{
    uint32_t ah = (uint32_t)reg_read(c, REG_OFFSET(GPR_RAX) + 1, 1);
    c->oszapc = (c->oszapc & OSZAPC_OF) | (ah & 0xd5) << 8;
}

static void salc(struct icpu *c, const struct insn *i)
{
    reg_write(c, REG_OFFSET(GPR_RAX), 1, c->oszapc & OSZAPC_CF ? 0xff : 0);
}

static insn_fn *select_mov(const struct decode *d, struct insn *i)
{
    enum operand_form form = operand_form(d);
    if (form == FORM_NONE)
        return NULL;
    if (d->zi.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (d->zi.opcode & 0xfc) == 0xa0)
        return mov_offset_table[form == FORM_MR][size_index(i->op_size)];
    insn_fn *flat = flat_usable(d) ? mov_flat_table[has_index(i)][form][size_index(i->op_size)] : NULL;
    return flat ? flat : mov_table[form][size_index(i->op_size)];
}

/* Those without visible operands. */
static insn_fn *select_fixed(const struct decode *d)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_CBW:
        return cbw;
    case ZYDIS_MNEMONIC_CWDE:
        return cwde;
    case ZYDIS_MNEMONIC_CDQE:
        return cdqe;
    case ZYDIS_MNEMONIC_CWD:
        return cwd;
    case ZYDIS_MNEMONIC_CDQ:
        return cdq;
    case ZYDIS_MNEMONIC_CQO:
        return cqo;
    case ZYDIS_MNEMONIC_XLAT:
        return xlat;
    case ZYDIS_MNEMONIC_LAHF:
        return lahf;
    case ZYDIS_MNEMONIC_SAHF:
        return sahf;
    case ZYDIS_MNEMONIC_SALC:
        return salc;
    default:
        return NULL;
    }
}

static insn_fn *select_conditional(const struct decode *d, const struct insn *i)
{
    unsigned cc = d->zi.opcode & 15, form = operand_form(d);
    if (d->zi.opcode_map != ZYDIS_OPCODE_MAP_0F)
        return NULL;
    if ((d->zi.opcode & 0xf0) == 0x40 && d->zi.meta.category == ZYDIS_CATEGORY_CMOV && form != FORM_NONE)
        return cmov_table[cc][form == FORM_RM][size_index(i->op_size)];
    if ((d->zi.opcode & 0xf0) == 0x90 && d->zi.meta.category == ZYDIS_CATEGORY_SETCC)
        return set_table[cc][unary_form(d) == UNARY_M];
    return NULL;
}

insn_fn *move_select(const struct decode *d, struct insn *i)
{
    enum operand_form form = operand_form(d);
    unsigned size = size_index(i->op_size), memory = form != FORM_RM ? 0 : flat_usable(d) ? 2 : 1;
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
        return select_mov(d, i);
    case ZYDIS_MNEMONIC_MOVZX:
        return movzx_table[memory][size_index(i->src_size)][size];
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD:
        return movsx_table[memory][size_index(i->src_size)][size];
    case ZYDIS_MNEMONIC_XCHG:
        return form == FORM_RR ? xchg_table[size] : NULL;
    case ZYDIS_MNEMONIC_LEA:
        return flat_usable(d) && size == 3 && !has_index(i) ? lea_flat : lea_table[size];
    case ZYDIS_MNEMONIC_BSWAP:
        return bswap_table[size];
    case ZYDIS_MNEMONIC_MOVBE:
        return form == FORM_NONE ? NULL : movbe_table[form][size];
    default:
        break;
    }
    insn_fn *fn = select_fixed(d);
    return fn ? fn : select_conditional(d, i);
}
