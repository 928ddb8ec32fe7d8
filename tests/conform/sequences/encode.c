/*
 * Random encodings: a mix of what compilers emit, of what they rarely do, and of anything at all (generator_case).
 *
 * Only opcodes come from tables; registers, addressing, prefixes and immediates are random bits, and the decoder says whether that is an instruction.
 */
#include "sequence.h"

#include <string.h>

#define ANY 0xffu

/* Legacy instructions with ModRM, by map: opcode and the digit in ModRM.reg, if it is one. */
struct form {
    uint8_t map;    /* 0: one byte, 1: 0F, 2: 0F 38, 3: 0F 3A */
    uint8_t prefix; /* mandatory: 0: none, 66 may be put before it */
    uint8_t opcode, last; /* ... to this one */
    uint8_t digit;
    uint8_t weight;
    bool lock;
};

static const struct form integer_forms[] = {
    {0, 0, 0x00, 0x03, ANY, 3, true},  {0, 0, 0x08, 0x0b, ANY, 2, true},  {0, 0, 0x10, 0x13, ANY, 3, true},  {0, 0, 0x18, 0x1b, ANY, 2, true},
    {0, 0, 0x20, 0x23, ANY, 2, true},  {0, 0, 0x28, 0x2b, ANY, 3, true},  {0, 0, 0x30, 0x33, ANY, 2, true},  {0, 0, 0x38, 0x3b, ANY, 4, false},
    {0, 0, 0x63, 0x63, ANY, 1, false}, {0, 0, 0x69, 0x69, ANY, 1, false}, {0, 0, 0x6b, 0x6b, ANY, 1, false}, {0, 0, 0x80, 0x81, ANY, 4, true},
    {0, 0, 0x83, 0x83, ANY, 4, true},  {0, 0, 0x84, 0x87, ANY, 4, true},  {0, 0, 0x88, 0x8b, ANY, 14, false}, {0, 0, 0x8d, 0x8d, ANY, 5, false},
    {0, 0, 0x8f, 0x8f, 0, 1, false},   {0, 0, 0xc0, 0xc1, ANY, 2, false}, {0, 0, 0xc6, 0xc7, 0, 4, false},   {0, 0, 0xd0, 0xd3, ANY, 3, false},
    {0, 0, 0xf6, 0xf7, ANY, 4, true},  {0, 0, 0xfe, 0xff, 0, 2, true},    {0, 0, 0xfe, 0xff, 1, 2, true},    {0, 0, 0xff, 0xff, 6, 3, false},
    {1, 0, 0x40, 0x4f, ANY, 4, false}, {1, 0, 0x90, 0x9f, ANY, 4, false}, {1, 0, 0xa3, 0xa5, ANY, 1, false}, {1, 0, 0xab, 0xad, ANY, 1, true},
    {1, 0, 0xaf, 0xaf, ANY, 1, false}, {1, 0, 0xb0, 0xb1, ANY, 3, true},  {1, 0, 0xb3, 0xb3, ANY, 1, true},  {1, 0, 0xb6, 0xb7, ANY, 3, false},
    {1, 0, 0xba, 0xba, ANY, 2, true},  {1, 0, 0xbb, 0xbb, ANY, 1, true},  {1, 0, 0xbc, 0xbd, ANY, 1, false}, {1, 0, 0xbe, 0xbf, ANY, 3, false},
    {1, 0, 0xc0, 0xc1, ANY, 2, true},  {1, 0, 0xc3, 0xc3, ANY, 1, false}, {1, 0, 0xc7, 0xc7, 1, 3, true},    {1, 0xf3, 0xb8, 0xb8, ANY, 1, false},
    {1, 0xf3, 0xbc, 0xbd, ANY, 1, false}, {1, 0, 0x1f, 0x1f, 0, 1, false}, {1, 0, 0x18, 0x18, 1, 1, false},  {2, 0, 0xf0, 0xf1, ANY, 1, false},
    {2, 0xf2, 0xf0, 0xf1, ANY, 1, false}, {2, 0x66, 0xf6, 0xf6, ANY, 1, false}, {2, 0xf3, 0xf6, 0xf6, ANY, 1, false},
};

static const struct form vector_forms[] = {
    {1, 0, 0x10, 0x11, ANY, 4},    {1, 0, 0x12, 0x17, ANY, 2},    {1, 0, 0x28, 0x29, ANY, 3},    {1, 0, 0x2e, 0x2f, ANY, 1},    {1, 0, 0x51, 0x5f, ANY, 3},
    {1, 0, 0xc2, 0xc2, ANY, 1},    {1, 0, 0xc6, 0xc6, ANY, 1},    {1, 0x66, 0x10, 0x11, ANY, 2}, {1, 0x66, 0x28, 0x2b, ANY, 2}, {1, 0x66, 0x6e, 0x6f, ANY, 3},
    {1, 0x66, 0x7e, 0x7f, ANY, 3}, {1, 0x66, 0xd4, 0xd7, ANY, 2}, {1, 0x66, 0xe7, 0xe7, ANY, 1}, {1, 0x66, 0xef, 0xef, ANY, 2}, {1, 0x66, 0xfa, 0xfe, ANY, 2},
    {1, 0x66, 0x60, 0x6d, ANY, 2}, {1, 0x66, 0x70, 0x76, ANY, 2}, {1, 0xf3, 0x10, 0x11, ANY, 2}, {1, 0xf3, 0x6f, 0x6f, ANY, 3}, {1, 0xf3, 0x7e, 0x7f, ANY, 3},
    {1, 0xf3, 0x2a, 0x2d, ANY, 2}, {1, 0xf3, 0x58, 0x5f, ANY, 2}, {1, 0xf2, 0x10, 0x12, ANY, 2}, {1, 0xf2, 0x2a, 0x2d, ANY, 2}, {1, 0xf2, 0x58, 0x5f, ANY, 2},
    {1, 0xf2, 0xf0, 0xf0, ANY, 1}, {2, 0x66, 0x00, 0x0b, ANY, 2}, {2, 0x66, 0x18, 0x1a, ANY, 2}, {2, 0x66, 0x58, 0x5a, ANY, 2}, {2, 0x66, 0x20, 0x25, ANY, 1},
    {2, 0x66, 0x8c, 0x8e, ANY, 1}, {3, 0x66, 0x0f, 0x0f, ANY, 1}, {3, 0x66, 0x14, 0x22, ANY, 2}, {3, 0x66, 0x38, 0x39, ANY, 1},
};

static const struct form x87_forms[] = {{0, 0, 0xd8, 0xdf, ANY, 1, false}};

static const struct form bit_forms[] = { /* VEX encoded, on general registers; kmov */
    {2, 0, 0xf2, 0xf3, ANY, 2}, {2, 0, 0xf5, 0xf7, ANY, 3}, {2, 0xf2, 0xf5, 0xf7, ANY, 3}, {2, 0xf3, 0xf5, 0xf7, ANY, 2}, {2, 0x66, 0xf7, 0xf7, ANY, 1},
    {3, 0xf2, 0xf0, 0xf0, ANY, 2}, {1, 0, 0x90, 0x93, ANY, 1},
};

/* Without ModRM: first byte, last, the number drawn from them has this weight. */
struct short_form {
    uint8_t first, last, weight;
};

/* 32-bit code only. */
static const struct short_form narrow_forms[] = {
    {0x40, 0x4f, 12}, {0x06, 0x07, 1}, {0x0e, 0x0e, 1}, {0x16, 0x17, 1}, {0x1e, 0x1f, 1}, {0x60, 0x61, 2}, {0x27, 0x27, 1}, {0x2f, 0x2f, 1},
    {0x37, 0x37, 1},  {0x3f, 0x3f, 1}, {0xd4, 0xd6, 1}, {0xce, 0xce, 1}, {0xa0, 0xa3, 8},
};

static const struct short_form short_forms[] = {
    {0x04, 0x05, 1}, {0x2c, 0x2d, 1}, {0x3c, 0x3d, 1}, {0x50, 0x57, 14}, {0x58, 0x5f, 12}, {0x68, 0x68, 2}, {0x6a, 0x6a, 2}, {0x90, 0x97, 3},
    {0x98, 0x99, 3}, {0x9c, 0x9c, 2}, {0x9e, 0x9f, 2}, {0xa0, 0xa3, 1}, {0xa8, 0xa9, 1}, {0xb0, 0xb7, 3}, {0xb8, 0xbf, 3}, {0xc8, 0xc9, 2},
    {0x9b, 0x9b, 1}, {0xd7, 0xd7, 1}, {0xf5, 0xf5, 1}, {0xf8, 0xf9, 2}, {0xfc, 0xfd, 1}, {0xa4, 0xa7, 7}, {0xaa, 0xaf, 7},
};

unsigned encode_pick(struct generator *g, unsigned limit)
{
    return (unsigned)(generator_random(g) >> 33) % limit;
}

unsigned encode_gpr(ZydisRegister reg)
{
    ZydisRegister large = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
    return large >= ZYDIS_REGISTER_RAX && large <= ZYDIS_REGISTER_R15 ? (unsigned)(large - ZYDIS_REGISTER_RAX) : 16;
}

static const struct form *form_pick(struct generator *g, const struct form *forms, unsigned count)
{
    unsigned total = 0;
    for (unsigned n = 0; n < count; n++)
        total += forms[n].weight;
    unsigned left = encode_pick(g, total), n = 0;
    while (left >= forms[n].weight)
        left -= forms[n++].weight;
    return &forms[n];
}
#define FORM(g, table) form_pick(g, table, sizeof table / sizeof *table)

static uint8_t opcode_pick(struct generator *g, const struct form *f)
{
    return (uint8_t)(f->opcode + encode_pick(g, f->last - f->opcode + 1u));
}

/* `base`: the base register's low bits if it is to be the rules' one, ANY: any. */
static void modrm_put(struct generator *g, uint8_t *p, unsigned digit, unsigned base)
{
    unsigned mod = encode_pick(g, 8);
    mod = base != ANY ? 1 + mod / 4 : mod < 3 ? 3 : mod < 6 ? 2 : mod - 6;
    *p = (uint8_t)((*p & 0x3f) | mod << 6);
    if (digit != ANY)
        *p = (uint8_t)((*p & 0xc7) | digit << 3);
    if (base == ANY)
        return;
    *p = (uint8_t)((*p & 0xf8) | base);
    if (base == 4)
        p[1] = encode_pick(g, 8) ? 0x24 : (uint8_t)((p[1] & 0xf8) | 4);
}

/* Is the rules' base to be taken? */
static bool sticks(struct generator *g)
{
    return encode_pick(g, 5) < 2;
}

static uint8_t *prefixes_put(struct generator *g, uint8_t *p, const struct encode_rules *rules)
{
    static const uint8_t segments[] = {0x64, 0x65, 0x64, 0x65, 0x2e, 0x36, 0x3e, 0x26};
    if (!encode_pick(g, 16)) {
        uint8_t segment = segments[encode_pick(g, sizeof segments)];
        *p++ = rules->native && segment < 0x66 && segment > 0x3e ? 0x3e : segment;
    }
    if (!encode_pick(g, 24))
        *p++ = 0x67;
    return p;
}

static uint8_t *map_put(uint8_t *p, unsigned map)
{
    if (map)
        *p++ = 0x0f;
    if (map == 2)
        *p++ = 0x38;
    if (map == 3)
        *p++ = 0x3a;
    return p;
}

static void legacy_put(struct generator *g, uint8_t *p, const struct form *f, const struct encode_rules *rules)
{
    p = prefixes_put(g, p, rules);
    if (f->prefix)
        *p++ = f->prefix;
    else if (!encode_pick(g, 6))
        *p++ = 0x66;
    bool lock = f->lock && !encode_pick(g, 4);
    if (lock)
        *p++ = 0xf0;
    bool stick = sticks(g);
    if (!rules->narrow && (stick || encode_pick(g, 4))) {
        *p = (uint8_t)(0x40 | (*p & 15));
        if (stick)
            *p = (uint8_t)((*p & 0xfe) | rules->base >> 3);
        p++;
    }
    p = map_put(p, f->map);
    *p++ = opcode_pick(g, f);
    modrm_put(g, p, f->digit, stick ? rules->base & 7u : ANY);
    if (lock && *p >= 0xc0)
        *p &= 0xbf;
}

static unsigned pp_of(uint8_t prefix)
{
    return prefix == 0x66 ? 1 : prefix == 0xf3 ? 2 : prefix == 0xf2 ? 3 : 0;
}

static void vex_put(struct generator *g, uint8_t *p, const struct form *f, const struct encode_rules *rules, bool scalar)
{
    p = prefixes_put(g, p, rules);
    bool two = f->map == 1 && encode_pick(g, 2), stick = sticks(g) && !(two && rules->base > 7);
    *p++ = two ? 0xc5 : 0xc4;
    if (!two) {
        *p = (uint8_t)((*p & 0xe0) | f->map);
        if (stick)
            *p = (uint8_t)((*p & 0xdf) | (rules->base > 7 ? 0 : 0x20));
        if (rules->narrow)
            *p |= 0xc0;
        p++;
    }
    *p = (uint8_t)((*p & 0xfc) | pp_of(f->prefix) | (encode_pick(g, 2) ? 0x78 : 0));
    if (scalar)
        *p &= 0xfb;
    if (rules->narrow && two)
        *p |= 0xc0;
    p++;
    *p++ = opcode_pick(g, f);
    modrm_put(g, p, f->digit, stick ? rules->base & 7u : ANY);
}

static void evex_put(struct generator *g, uint8_t *p, const struct form *f, const struct encode_rules *rules)
{
    p = prefixes_put(g, p, rules);
    *p++ = 0x62;
    bool stick = sticks(g);
    *p = (uint8_t)((*p & 0xf0) | f->map);
    if (stick)
        *p = (uint8_t)((*p & 0xdf) | (rules->base > 7 ? 0 : 0x20));
    if (rules->narrow)
        *p |= 0xc0;
    p++;
    *p = (uint8_t)((*p & 0xf8) | 4 | pp_of(f->prefix) | (encode_pick(g, 2) ? 0x78 : 0));
    p++;
    if (encode_pick(g, 6))
        *p &= 0xef;
    if (encode_pick(g, 3))
        *p |= 8;
    p++;
    *p++ = opcode_pick(g, f);
    modrm_put(g, p, f->digit, stick ? rules->base & 7u : ANY);
}

static uint8_t short_pick(struct generator *g, const struct short_form *forms, unsigned count)
{
    unsigned total = 0, n = 0;
    for (unsigned k = 0; k < count; k++)
        total += forms[k].weight;
    unsigned left = encode_pick(g, total);
    while (left >= forms[n].weight)
        left -= forms[n++].weight;
    return (uint8_t)(forms[n].first + encode_pick(g, forms[n].last - forms[n].first + 1u));
}

static void short_put(struct generator *g, uint8_t *p, const struct encode_rules *rules)
{
    uint8_t opcode = rules->narrow && !encode_pick(g, 4) ? short_pick(g, narrow_forms, sizeof narrow_forms / sizeof *narrow_forms)
                                                         : short_pick(g, short_forms, sizeof short_forms / sizeof *short_forms);
    bool string = opcode >= 0xa4 && opcode <= 0xaf && (opcode & 0xfe) != 0xa8;
    if (!encode_pick(g, 8))
        p = prefixes_put(g, p, rules);
    if (!encode_pick(g, opcode == 0x9c ? 40 : 10))
        *p++ = 0x66;
    if (string && encode_pick(g, 3))
        *p++ = encode_pick(g, 4) ? 0xf3 : 0xf2;
    if (!rules->narrow && encode_pick(g, 2)) {
        *p = (uint8_t)(0x40 | (*p & 15));
        p++;
    }
    *p++ = opcode;
    if (opcode == 0xc8) { /* ENTER: small frames, few levels */
        p[1] = 0;
        p[2] &= p[2] & 3;
    }
}

static bool is_allowed(const struct encode_rules *rules, const struct encoded *e)
{
    switch (e->zi.mnemonic) {
    case ZYDIS_MNEMONIC_FNSTENV: /* the translator does not keep all that they store: what the last x87 instruction accessed */
    case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_FRSTOR:
    case ZYDIS_MNEMONIC_FLDENV:
        return false;
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_PUSHF:
        return !rules->native;
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_JMP:
        return e->op[0].type != ZYDIS_OPERAND_TYPE_POINTER;
    default:
        break;
    }
    if (rules->user)
        return true;
    return !(e->zi.attributes & ZYDIS_ATTRIB_IS_PRIVILEGED) && e->zi.meta.category != ZYDIS_CATEGORY_IO && e->zi.meta.category != ZYDIS_CATEGORY_IOSTRINGOP;
}

void encode_width(struct generator *g, bool narrow)
{
    if (narrow)
        ZydisDecoderInit(&g->decoder, ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32);
    else
        ZydisDecoderInit(&g->decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
}

bool encode_decode(struct generator *g, struct encoded *e)
{
    return ZYAN_SUCCESS(ZydisDecoderDecodeFull(&g->decoder, e->bytes, 15, &e->zi, e->op));
}

static bool random_put(struct generator *g, struct encoded *e)
{
    struct test_case test;
    if (!generator_case(g, &test))
        return false;
    memcpy(e->bytes, test.code, sizeof e->bytes);
    return true;
}

static bool candidate_put(struct generator *g, struct encoded *e, const struct encode_rules *rules)
{
    unsigned what = encode_pick(g, 100);
    generator_bytes(g, e->bytes, sizeof e->bytes);
    if (what < 38)
        legacy_put(g, e->bytes, FORM(g, integer_forms), rules);
    else if (what < 58)
        short_put(g, e->bytes, rules);
    else if (what < 64)
        legacy_put(g, e->bytes, FORM(g, vector_forms), rules);
    else if (what < 70)
        vex_put(g, e->bytes, FORM(g, vector_forms), rules, false);
    else if (what < 74)
        evex_put(g, e->bytes, FORM(g, vector_forms), rules);
    else if (what < 78)
        vex_put(g, e->bytes, FORM(g, bit_forms), rules, true);
    else if (what < 84)
        legacy_put(g, e->bytes, FORM(g, x87_forms), rules);
    else
        return random_put(g, e);
    return true;
}

void encode_random(struct generator *g, const struct encode_rules *rules, struct encoded *out)
{
    while (!candidate_put(g, out, rules) || !encode_decode(g, out) || !is_allowed(rules, out))
        ;
}

const ZydisDecodedOperand *encode_memory(const struct encoded *e)
{
    for (unsigned n = 0; n < e->zi.operand_count; n++)
        if (e->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && e->op[n].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
            return &e->op[n];
    return NULL;
}

void encode_widen(struct generator *g, struct encoded *e)
{
    unsigned modrm = e->zi.raw.modrm.offset, sib = e->zi.attributes & ZYDIS_ATTRIB_HAS_SIB ? 1 : 0;
    unsigned disp = e->zi.raw.disp.size / 8, after = modrm + 1 + sib + disp;
    if (disp == 4 || e->zi.length + 4 - disp > 15)
        return;
    const struct encoded narrow = *e;
    uint8_t tail[16];
    unsigned count = sizeof e->bytes - after;
    memcpy(tail, e->bytes + after, count);
    e->bytes[modrm] = (uint8_t)((e->bytes[modrm] & 0x3f) | 0x80);
    unsigned to = modrm + 1 + sib + 4;
    memset(e->bytes + modrm + 1 + sib, 0, 4);
    memcpy(e->bytes + to, tail, sizeof e->bytes - to < count ? sizeof e->bytes - to : count);
    if (!encode_decode(g, e) || !encode_memory(e)) /* it means another instruction so, such as one of 3DNow!, whose opcode comes last */
        *e = narrow;
}
