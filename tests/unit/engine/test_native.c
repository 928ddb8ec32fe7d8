/*
 * Native execution against the processor: every encoding of the listed kinds that native_select accepts, from random states, over each path to memory.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "native_rig.h"

static uint8_t ram[RIG_RAM_BYTES];
static struct rig_state from;
static struct rig_result direct, interp;
static unsigned compared, accepted;

struct candidate {
    uint8_t code[16];
    unsigned length;
    struct insn insn;
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
};

static void report(const struct candidate *k, const char *what, const char *difference)
{
    fprintf(stderr, "%s: %s:", ZydisMnemonicGetString(k->zi.mnemonic), what);
    for (unsigned n = 0; n < k->length; n++)
        fprintf(stderr, " %02x", k->code[n]);
    fprintf(stderr, ": %s differs (processor %d, interpreter %d)\n", difference, direct.vector, interp.vector);
}

static unsigned failures;

static void compare(const struct candidate *k, enum rig_path path, const char *what)
{
    rig_run_interp(&k->insn, path, &from, ram, &interp);
    const char *difference = rig_compare(&direct, &interp);
    compared++;
    if (difference && ++failures <= 50)
        report(k, what, difference);
}

static bool is_random(const struct candidate *k)
{
    return k->zi.mnemonic == ZYDIS_MNEMONIC_RDRAND || k->zi.mnemonic == ZYDIS_MNEMONIC_RDSEED;
}

static const ZydisDecodedOperand *memory_of(const struct candidate *k)
{
    for (unsigned n = 0; n < k->zi.operand_count; n++)
        if (k->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
            return &k->op[n];
    return NULL;
}

static bool is_xsave_family(const struct candidate *k)
{
    return k->zi.meta.category == ZYDIS_CATEGORY_XSAVE || k->zi.meta.category == ZYDIS_CATEGORY_XSAVEOPT;
}

/* States in which the instruction has something to do. */
static void prepare(const struct candidate *k)
{
    rig_random_state(&from);
    rig_random_bytes(ram, sizeof(ram));
    if (is_xsave_family(k)) {
        from.gpr[GPR_RAX] &= XCR0_SUPPORTED;
        from.gpr[GPR_RDX] = 0;
        memset(ram + 4096, 0, 8192);
        from.gpr[GPR_RSI] &= ~63ull;
    }
}

/* Decodes and, when it is ours, runs on both sides. */
static bool try(struct candidate *k, unsigned bits)
{
    if (!rig_decode(k->code, sizeof(k->code) - 1, bits, &k->insn, &k->zi, k->op))
        return false;
    k->length = k->zi.length;
    accepted++;
    return true;
}

static bool vsib(const struct candidate *k)
{
    const ZydisDecodedOperand *m = memory_of(k);
    return m && m->mem.type == ZYDIS_MEMOP_TYPE_VSIB;
}

static void check_plain(struct candidate *k)
{
    if (!try(k, 64) || is_random(k) || vsib(k))
        return;
    for (unsigned round = 0; round < 2; round++) {
        prepare(k);
        rig_run_direct(k->code, k->length, &from, ram, &direct);
        compare(k, RIG_TLB, "directly");
        if (memory_of(k)) {
            compare(k, RIG_BOUNCE, "bounced");
            if (round == 0)
                compare(k, RIG_HOST, "through mem_host");
        }
        if (direct.vector == VECTOR_UD)
            break;
    }
}

static void fill(struct candidate *k, const uint8_t *bytes, unsigned length)
{
    rig_random_bytes(k->code, sizeof(k->code));
    memcpy(k->code, bytes, length);
}

typedef void check_fn(struct candidate *k);

/* ModRM bytes: two registers, [rsi], [rsi+disp8] */
static void for_legacy(check_fn *check)
{
    static const uint8_t prefixes[][2] = {{0}, {0x66}, {0xf3}, {0xf2}, {0x66, 0xf2}, {0xf3, 0xf2}, {0xf2, 0xf3}, {0xf3, 0x66}};
    struct candidate k;
    for (unsigned p = 0; p < sizeof(prefixes) / sizeof(prefixes[0]); p++)
        for (unsigned rex = 0; rex < 4; rex++)
            for (unsigned map = 0; map < 3; map++)
                for (unsigned opcode = 0; opcode < 256; opcode++)
                    for (unsigned modrm = 0; modrm < 16; modrm++) {
                        uint8_t bytes[8];
                        unsigned n = 0;
                        for (unsigned q = 0; q < 2 && prefixes[p][q]; q++)
                            bytes[n++] = prefixes[p][q];
                        if (rex)
                            bytes[n++] = (uint8_t[]){0, 0x48, 0x45, 0x4c}[rex];
                        bytes[n++] = 0x0f;
                        if (map)
                            bytes[n++] = map == 1 ? 0x38 : 0x3a;
                        bytes[n++] = (uint8_t)opcode;
                        bytes[n++] = (uint8_t)((modrm & 8 ? 0xc0 | (rig_random() & 7) : 6) | (modrm & 7) << 3);
                        if (rex == 2 && !(modrm & 8))
                            continue; /* r14: not a pointer */
                        if (map && modrm % 8 > 1 && p)
                            continue;
                        if (!map && (opcode == 0x38 || opcode == 0x3a))
                            continue;
                        fill(&k, bytes, n);
                        check(&k);
                    }
}

static void for_x87(check_fn *check)
{
    struct candidate k;
    for (unsigned small = 0; small < 2; small++)
        for (unsigned opcode = 0xd8; opcode < 0xe0; opcode++)
            for (unsigned modrm = 0; modrm < 256; modrm++) {
                if (modrm < 0xc0 && (modrm & 0xc7) != 6)
                    continue;
                uint8_t bytes[] = {0x66, (uint8_t)opcode, (uint8_t)modrm};
                fill(&k, bytes + !small, 2 + small);
                check(&k);
                check(&k);
            }
    fill(&k, (const uint8_t[]){0x9b, 0x90}, 2);
    check(&k);
}

static void for_vex(check_fn *check)
{
    struct candidate k;
    for (unsigned map = 1; map < 4; map++)
        for (unsigned last = 0; last < 16; last++) /* W L pp */
            for (unsigned opcode = 0; opcode < 256; opcode++)
                for (unsigned modrm = 0; modrm < 6; modrm++) {
                    bool reg = modrm & 1;
                    unsigned vvvv = modrm < 2 ? 15 : rig_random() & 15;
                    unsigned extend = reg ? rig_random() & 0xe0 : 0x60 | (rig_random() & 0x80);
                    unsigned field = rig_random() & 7;
                    uint8_t bytes[] = {0xc4, (uint8_t)(extend | map), (uint8_t)((last & 8) << 4 | vvvv << 3 | (last & 7)), (uint8_t)opcode,
                                       (uint8_t)((reg ? 0xc0 | (rig_random() & 7) : 6) | field << 3)};
                    fill(&k, bytes, 5);
                    check(&k);
                    if (map == 1 && !(last & 8) && extend >= 0x60) { /* the short form */
                        fill(&k, (const uint8_t[]){0xc5, (uint8_t)((extend & 0x80) | (bytes[2] & 0x7f)), bytes[3], bytes[4]}, 4);
                        if (extend & 0x20)
                            check(&k);
                    }
                }
}

/* masks: bit 0 without, bit 1 with a mask; registers, memory: which ModRM forms. */
static void for_evex(check_fn *check, unsigned masks, bool registers)
{
    static const uint8_t maps[] = {1, 2, 3, 5, 6};
    struct candidate k;
    for (unsigned m = 0; m < 5; m++)
        for (unsigned wpp = 0; wpp < 8; wpp++)
            for (unsigned llb = 0; llb < 8; llb++)
                for (unsigned opcode = 0; opcode < 256; opcode++)
                    for (unsigned form = 0; form < 8; form++) {
                        bool reg = form & 1, masked = form & 2, random_vvvv = form & 4;
                        if ((reg && !registers) || !(masks >> masked & 1))
                            continue;
                        bool disp = !reg && (rig_random() & 1);
                        unsigned vvvv = random_vvvv ? rig_random() & 15 : 15;
                        unsigned high = random_vvvv ? rig_random() & 8 : 8;
                        unsigned extend = reg ? rig_random() & 0xf0 : 0x60 | (rig_random() & 0x90);
                        unsigned z = masked ? rig_random() & 0x80 : 0;
                        unsigned aaa = masked ? 1 + rig_random() % 7 : 0;
                        uint8_t bytes[] = {0x62, (uint8_t)(extend | maps[m]), (uint8_t)((wpp & 4) << 5 | vvvv << 3 | 4 | (wpp & 3)),
                                           (uint8_t)(z | (llb & 6) << 4 | (llb & 1) << 4 | high | aaa), (uint8_t)opcode,
                                           (uint8_t)((reg ? 0xc0 | (rig_random() & 7) : disp ? 0x46 : 6) | (rig_random() & 7) << 3),
                                           (uint8_t)(rig_random() % 5)};
                        fill(&k, bytes, disp ? 7 : 6);
                        check(&k);
                        if (random_vvvv && !masked && opcode >= 0x20)
                            break; /* enough of those */
                    }
}

/* ---- operands at the end of memory, misaligned, across pages ---- */

static void place(struct candidate *k, uint64_t address)
{
    const ZydisDecodedOperand *m = memory_of(k);
    prepare(k);
    from.gpr[m->mem.base == ZYDIS_REGISTER_RDI ? GPR_RDI : GPR_RSI] = address - (uint64_t)m->mem.disp.value;
    rig_run_direct(k->code, k->length, &from, ram, &direct);
}

static bool masked(const struct candidate *k)
{
    return k->insn.fn == native_masked || memory_of(k)->encoding == ZYDIS_OPERAND_ENCODING_NONE;
}

static bool no_real_access(const struct candidate *k)
{
    return k->insn.fn == native_hint || k->insn.fn == native_touch;
}

static void check_edges(struct candidate *k)
{
    if (!try(k, 64) || !memory_of(k) || vsib(k) || is_xsave_family(k) || no_real_access(k))
        return;
    unsigned size = memory_of(k)->size / 8;
    uint64_t end = (uintptr_t)rig.ram + RIG_RAM_BYTES;
    place(k, end - size); /* the operand is no longer than we think */
    if (direct.vector == VECTOR_UD)
        return;
    if (direct.vector == VECTOR_PF && ++failures <= 50)
        report(k, "at the end of memory", "size");
    for (unsigned path = 0; path < RIG_PATHS; path++)
        compare(k, path, "at the end of memory");
    /* A faulting x87 or MMX store may have written its first bytes, or have marked the registers used, and VCVTPS2PH may have set flags: up to the
     * implementation, as are MASKMOVDQU's faults for bytes that are masked off. */
    const struct native_code *n = k->insn.fn == native_masked || k->insn.fn == native_memory || k->insn.fn == native_x87_memory ? k->insn.native : NULL;
    bool vague = memory_of(k)->encoding == ZYDIS_OPERAND_ENCODING_NONE || !n || (n->blocked & SIMD_X87 && n->flags & NATIVE_WRITE) ||
                 k->zi.mnemonic == ZYDIS_MNEMONIC_VCVTPS2PH;
    place(k, end - size + 1); /* and no shorter */
    if (!masked(k) && direct.vector != VECTOR_PF && direct.vector != VECTOR_GP && ++failures <= 50)
        report(k, "beyond the end of memory", "size");
    if (!vague) {
        compare(k, RIG_TLB, "beyond the end of memory");
        for (unsigned round = 0; round < (masked(k) ? 4 : 1); round++) {
            place(k, end - rig_random() % size);
            compare(k, RIG_TLB, "partly beyond the end of memory");
        }
    }
    for (unsigned round = 0; round < 2; round++) {
        place(k, end - 4096 - rig_random() % (size + 1));
        compare(k, RIG_TLB, "across pages");
        place(k, end - 2048 + rig_random() % 64);
        compare(k, round ? RIG_TLB : RIG_BOUNCE, "misaligned");
    }
}

/* ---- unmasked floating-point exceptions ---- */

static void check_exceptions(struct candidate *k)
{
    if (!try(k, 64) || is_random(k) || vsib(k) || is_xsave_family(k))
        return;
    for (unsigned round = 0; round < 3; round++) {
        prepare(k);
        uint8_t *image = from.xsave;
        put32(image + XSAVE_MXCSR, get32(image + XSAVE_MXCSR) & ~(rig_random() & 0x1f80));
        uint16_t fcw = (uint16_t)(get16(image + XSAVE_FCW) & ~(rig_random() & 0x3f));
        uint16_t fsw = (uint16_t)(get16(image + XSAVE_FSW) | (rig_random() & rig_random() & rig_random() & 0x3f));
        put16(image + XSAVE_FCW, fcw);
        put16(image + XSAVE_FSW, native_fsw_summary(fsw, fcw));
        rig_run_direct(k->code, k->length, &from, ram, &direct);
        compare(k, RIG_TLB, "with exceptions unmasked");
        if (direct.vector == VECTOR_UD)
            break;
    }
}

/* ---- gather and scatter ---- */

/* Small ones, or a scatter would write all over this process. */
static void indices(struct rig_state *state, unsigned size)
{
    struct icpu *c = rig.c;
    memcpy(c->v.cpu.xsave, state->xsave, sizeof(state->xsave));
    for (unsigned n = 0; n < (rig.xsave_mask & XCR0_AVX512 ? 32u : 16u); n++)
        for (unsigned part = 0; part < (rig.xsave_mask & XCR0_AVX512 ? 4u : 2u); part++)
            for (unsigned at = 0; at < 16; at += size) {
                int64_t index = (int64_t)(rig_random() % 800) - 400;
                memcpy(native_vector_part(c, n, part) + at, &index, size);
            }
    memcpy(state->xsave, c->v.cpu.xsave, sizeof(state->xsave));
}

static bool part_is(unsigned number, unsigned at, const uint8_t *bytes)
{
    return !memcmp(native_vector_part(rig.c, number, at / 16) + at % 16, bytes, 4);
}

/* What the elements do not fill: the destination is zero above the operation's length once an element is there, VEX's mask extended within that length and zero above. */
static void check_gather_rest(const struct candidate *k, bool loaded)
{
    const struct native_code *n = k->insn.native;
    struct icpu *c = rig.c;
    static const uint8_t zero[4], ones[4] = {0xff, 0xff, 0xff, 0xff};
    unsigned length = n->mask_bits * (n->index_size > n->element_size ? n->index_size : n->element_size), bad = 0;
    for (unsigned at = n->vector_bytes; at < (rig.xsave_mask & XCR0_AVX512 ? 64u : 32u); at += 4) {
        uint8_t before[4], sign;
        memcpy(c->v.cpu.xsave, from.xsave, sizeof(from.xsave));
        memcpy(before, native_vector_part(c, n->vector, at / 16) + at % 16, 4);
        sign = native_vector_part(c, n->mask_register, at / 16)[at % 16 + 3];
        memcpy(c->v.cpu.xsave, interp.state.xsave, sizeof(from.xsave));
        bad += !part_is(n->vector, at, at >= length && loaded ? zero : before);
        if (!n->opmask && !c->amd) /* AMD's extend it at some time */
            bad += !part_is(n->mask_register, at, at < length && sign & 0x80 ? ones : zero);
    }
    if (bad && ++failures <= 50)
        report(k, "gather that faults", "parts above the elements");
}

/* Elements below the first whose mask bit is still set are done, it and those above are as they were. */
static void check_gather_fault(const struct candidate *k)
{
    const struct native_code *n = k->insn.native;
    struct icpu *c = rig.c;
    bool reached = false, loaded = false;
    assert_int_equal(interp.vector, VECTOR_PF);
    for (unsigned e = 0; e < n->mask_bits; e++) {
        unsigned at = e * n->element_size;
        uint8_t before[8], after[8];
        bool wanted, left;
        memcpy(c->v.cpu.xsave, from.xsave, sizeof(from.xsave));
        memcpy(before, native_vector_part(c, n->vector, at / 16) + at % 16, n->element_size);
        wanted = n->opmask ? native_opmask_get(c, n->mask_register) >> e & 1
                           : native_vector_part(c, n->mask_register, at / 16)[at % 16 + n->element_size - 1] >> 7;
        memcpy(c->v.cpu.xsave, interp.state.xsave, sizeof(from.xsave));
        memcpy(after, native_vector_part(c, n->vector, at / 16) + at % 16, n->element_size);
        left = n->opmask ? native_opmask_get(c, n->mask_register) >> e & 1
                         : native_vector_part(c, n->mask_register, at / 16)[at % 16 + n->element_size - 1] >> 7;
        reached |= left;
        loaded |= wanted && !left;
        if ((reached && left != wanted) || ((reached || !wanted) && memcmp(before, after, n->element_size)))
            if (++failures <= 50)
                report(k, "gather that faults", "element");
    }
    if (!reached)
        failures++;
    check_gather_rest(k, loaded);
}

static void check_vsib(struct candidate *k)
{
    if (!try(k, 64) || !vsib(k))
        return;
    const struct native_code *n = k->insn.native;
    for (unsigned round = 0; round < 12; round++) {
        prepare(k);
        indices(&from, n->index_size);
        from.gpr[GPR_RSI] = (uintptr_t)rig.ram + (round % 3 ? RIG_RAM_BYTES / 2 : RIG_RAM_BYTES - 1600);
        rig_run_direct(k->code, k->length, &from, ram, &direct);
        if (direct.vector == VECTOR_PF && k->insn.fn == native_gather) {
            /* How far the elements after the faulting one have got is up to the implementation. */
            rig_run_interp(&k->insn, round % RIG_PATHS, &from, ram, &interp);
            check_gather_fault(k);
        } else {
            compare(k, round % RIG_PATHS, "gather or scatter");
        }
    }
}

static void for_vsib(check_fn *check)
{
    static const uint8_t opcodes[] = {0x90, 0x91, 0x92, 0x93, 0xa0, 0xa1, 0xa2, 0xa3};
    struct candidate k;
    for (unsigned op = 0; op < sizeof(opcodes); op++)
        for (unsigned wl = 0; wl < 8; wl++)
            for (unsigned round = 0; round < 8; round++) {
                unsigned sib = (rig_random() & 0xf8) | 6, reg = rig_random() & 7;
                uint8_t evex[] = {0x62, (uint8_t)(0x22 | (rig_random() & 0xd0)), (uint8_t)((wl & 1) << 7 | 0x7d),
                                  (uint8_t)((wl & 6) << 4 | (rig_random() & 8) | (1 + rig_random() % 7)), opcodes[op],
                                  (uint8_t)(0x44 | reg << 3), (uint8_t)sib, (uint8_t)(rig_random() % 9)};
                fill(&k, evex, sizeof(evex));
                check(&k);
                uint8_t vex[] = {0xc4, (uint8_t)(0x22 | (rig_random() & 0xc0)), (uint8_t)((wl & 1) << 7 | (rig_random() & 0x78) | (wl & 2) << 1 | 1),
                                 opcodes[op], (uint8_t)(4 | reg << 3), (uint8_t)sib};
                fill(&k, vex, sizeof(vex));
                check(&k);
            }
}

/* ---- every form of address ---- */

/* Instructions up to their ModRM byte's reg field, and how many immediate bytes follow. rex: its byte's index, 0: VEX or EVEX at byte 0. */
struct form {
    uint8_t bytes[8], length, immediate;
    int8_t rex;
};

static const struct form forms[] = {
    {{0x40, 0x0f, 0x10}, 3, 0, 0},             /* movups load */
    {{0x40, 0x0f, 0x11}, 3, 0, 0},             /* movups store */
    {{0x66, 0x40, 0x0f, 0x70}, 4, 1, 1},       /* pshufd, imm8 */
    {{0xf2, 0x48, 0x0f, 0x2a}, 4, 0, 1},       /* cvtsi2sd, 64 bits */
    {{0x66, 0x40, 0x0f, 0xc4}, 4, 1, 1},       /* pinsrw, imm8 */
    {{0xf2, 0x48, 0x0f, 0x38, 0xf1}, 5, 0, 1}, /* crc32 */
    {{0xf3, 0x48, 0x0f, 0xb8}, 4, 0, 1},       /* popcnt */
    {{0x48, 0x0f, 0x38, 0xf1}, 4, 0, 0},       /* movbe store */
    {{0x66, 0x48, 0x0f, 0x3a, 0x16}, 5, 1, 1}, /* pextrq, imm8 */
    {{0xc4, 0xe1, 0x7c, 0x58}, 4, 0, -1},      /* vaddps ymm */
    {{0xc4, 0xe3, 0x6d, 0x4b}, 4, 1, -1},      /* vblendvpd, is4 */
    {{0xc4, 0xe2, 0xe8, 0xf2}, 4, 0, -1},      /* andn */
    {{0xc4, 0xe2, 0xfb, 0xf6}, 4, 0, -1},      /* mulx */
    {{0x62, 0xf3, 0x7d, 0x49, 0x25}, 5, 1, -1}, /* vpternlogd zmm {k1}, imm8 */
    {{0x62, 0xf1, 0x7c, 0x48, 0x11}, 5, 0, -1}, /* vmovups zmm store */
    {{0x40, 0xdd}, 2, 0, 0},                    /* x87 group: fld, fisttp, fst, fstp, frstor, fnsave, fnstsw */
};

/* Appends the address part for `kind` and says which registers it uses. */
static unsigned put_address(uint8_t *out, unsigned kind, unsigned reg, unsigned base, unsigned index, int32_t displacement)
{
    unsigned n = 0, mod = kind % 3, low = base & 7;
    bool sib = kind >= 3 || low == 4;
    if (mod == 0 && low == 5)
        mod = 1;
    out[n++] = (uint8_t)(mod << 6 | reg << 3 | (sib ? 4 : low));
    if (sib)
        out[n++] = (uint8_t)((kind >= 3 ? (kind & 3) << 6 | (index & 7) << 3 : 0x20) | low);
    if (mod == 1)
        out[n++] = (uint8_t)displacement;
    if (mod == 2) {
        memcpy(out + n, &displacement, 4);
        n += 4;
    }
    return n;
}

static void check_address(const struct form *f, unsigned kind)
{
    struct candidate k;
    unsigned base = rig_random() & 15, index = rig_random() & 15, n = 0;
    if (index == 4 || index == base)
        return;
    if (kind < 3)
        index = 0; /* none, so no REX.X either */
    rig_random_bytes(k.code, sizeof(k.code));
    if (rig_random() % 4 == 0)
        k.code[n++] = 0x3e; /* DS, without effect */
    unsigned start = n;
    memcpy(k.code + n, f->bytes, f->length);
    if (f->rex >= 0)
        k.code[n + (unsigned)f->rex] |= (uint8_t)(base >> 3 | (index >> 3) << 1);
    else
        k.code[start + 1] ^= (uint8_t)((base >> 3) << 5 | (index >> 3) << 6);
    n += f->length;
    n += put_address(k.code + n, kind, rig_random() & 7, base, index, (int32_t)(rig_random() % 100));
    if (n + f->immediate > sizeof(k.code) || !try(&k, 64))
        return;
    const ZydisDecodedOperand *m = memory_of(&k);
    rig_random_bytes(ram, sizeof(ram));
    rig_random_state(&from);
    if (index != base)
        from.gpr[index] = rig_random() % 64;
    from.gpr[base] = (uintptr_t)rig.ram + 4096 + (rig_random() % 32) * 16 - (m->mem.disp.has_displacement ? (uint64_t)m->mem.disp.value : 0) -
                     (m->mem.index ? from.gpr[index] * m->mem.scale : 0);
    rig_run_direct(k.code, k.length, &from, ram, &direct);
    for (unsigned path = 0; path < RIG_PATHS; path++)
        compare(&k, path, "address");
}

/* ---- XRSTOR ---- */

/* A valid area at `area`, then often something wrong with it. */
static void make_area(uint8_t *area, bool compact)
{
    static struct rig_state other;
    rig_random_state(&other);
    memcpy(area, other.xsave, 2816);
    uint64_t bv = rig_random() & rig.xsave_mask;
    put64(area + XSAVE_BV, bv);
    if (compact)
        put64(area + XSAVE_COMP_BV, 1ull << 63 | bv | (rig_random() & rig.xsave_mask));
    switch (rig_random() % 8) {
    case 0:
        area[XSAVE_BV + rig_random() % 64] |= (uint8_t)(1u << (rig_random() & 7));
        break;
    case 1:
        put32(area + XSAVE_MXCSR, 1u << (rig_random() & 31));
        break;
    case 2:
        put16(area + XSAVE_FCW, (uint16_t)rig_random());
        put16(area + XSAVE_FSW, (uint16_t)rig_random());
        break;
    default:
        break;
    }
}

static void check_restore(const uint8_t *code, unsigned length)
{
    struct candidate k;
    fill(&k, code, length);
    if (!try(&k, 64))
        return;
    for (unsigned round = 0; round < 200; round++) {
        prepare(&k);
        rig_random_state(&from);
        from.gpr[GPR_RSI] = (uintptr_t)rig.ram + 64 * (rig_random() % 64) + (rig_random() % 16 ? 0 : 8);
        from.gpr[GPR_RAX] = rig_random() & XCR0_SUPPORTED;
        from.gpr[GPR_RDX] = 0;
        make_area(ram + (from.gpr[GPR_RSI] - (uintptr_t)rig.ram), round & 1);
        rig_run_direct(k.code, k.length, &from, ram, &direct);
        if (direct.vector == VECTOR_GP) { /* what was loaded before it was noticed is up to the implementation */
            rig_run_interp(&k.insn, RIG_TLB, &from, ram, &direct);
            direct.vector = VECTOR_GP;
        }
        compare(&k, RIG_TLB, "restoring");
    }
}

static void finish(const char *what)
{
    unsigned failed = failures;
    print_message("%s: %u encodings accepted, %u comparisons\n", what, accepted, compared);
    accepted = compared = failures = 0;
    assert_int_equal(failed, 0);
}

static void test_legacy(void **state)
{
    rig_arm();
    for_legacy(check_plain);
    assert_true(accepted > 1000);
    finish("SSE and general");
}

static void test_x87(void **state)
{
    rig_arm();
    for_x87(check_plain);
    finish("x87");
}

static void test_vex(void **state)
{
    rig_arm();
    for_vex(check_plain);
    finish("VEX");
}

static void test_evex(void **state)
{
    rig_arm();
    for_evex(check_plain, 3, true);
    finish("EVEX");
}

static void test_edges(void **state)
{
    rig_arm();
    for_x87(check_edges);
    for_legacy(check_edges);
    for_vex(check_edges);
    for_evex(check_edges, 3, false);
    finish("edges");
}

static void test_exceptions(void **state)
{
    rig_arm();
    for_x87(check_exceptions);
    for_legacy(check_exceptions);
    for_vex(check_exceptions);
    for_evex(check_exceptions, 1, true);
    finish("exceptions");
}

static void test_vsib(void **state)
{
    rig_arm();
    for_vsib(check_vsib);
    if (rig.xsave_mask & XCR0_AVX512)
        assert_true(accepted > 400);
    finish("gather and scatter");
}

static void test_addresses(void **state)
{
    rig_arm();
    for (unsigned n = 0; n < sizeof(forms) / sizeof(forms[0]); n++)
        for (unsigned round = 0; round < 600; round++)
            check_address(&forms[n], round % 7);
    assert_true(compared > 10000);
    finish("addresses");
}

static void test_restore(void **state)
{
    rig_arm();
    check_restore((const uint8_t[]){0x0f, 0xae, 0x2e}, 3);       /* xrstor */
    check_restore((const uint8_t[]){0x48, 0x0f, 0xae, 0x2e}, 4); /* xrstor64 */
    check_restore((const uint8_t[]){0x0f, 0xae, 0x0e}, 3);       /* fxrstor */
    check_restore((const uint8_t[]){0x48, 0x0f, 0xae, 0x0e}, 4); /* fxrstor64 */
    finish("restoring");
}

/* ---- control bits, modes, the arena ---- */

static int run_plain(const char *bytes, unsigned length, unsigned bits)
{
    struct candidate k;
    fill(&k, (const uint8_t *)bytes, length);
    assert_true(try(&k, bits));
    rig_run_interp(&k.insn, RIG_TLB, &from, ram, &interp);
    return interp.vector;
}

static void test_control_bits(void **state)
{
    /* Instruction, and what it raises with EM, TS, no OSFXSR, no OSXSAVE, and XCR0 without AVX: x87, MMX, SSE, AVX, neither. */
    static const struct {
        const char *bytes;
        uint8_t length;
        int8_t vector[5];
    } table[] = {
        {"\xd9\xe8", 2, {7, 7, -1, -1, -1}},             /* fld1 */
        {"\x0f\x6f\xc1", 3, {6, 7, -1, -1, -1}},         /* movq mm */
        {"\x0f\x28\xc1", 3, {6, 7, 6, -1, -1}},          /* movaps */
        {"\xc5\xf8\x28\xc1", 4, {-1, 7, -1, 6, 6}},      /* vmovaps */
        {"\xc4\xe2\x78\xf2\xc1", 5, {-1, -1, -1, -1, -1}}, /* andn */
        {"\xf3\x0f\xb8\xc1", 4, {-1, -1, -1, -1, -1}},    /* popcnt */
        {"\x0f\xae\x06", 3, {7, 7, -1, -1, -1}},         /* fxsave */
        {"\x9b", 1, {-1, 7, -1, -1, -1}},                /* fwait, MP set */
        {"\xd9\x36", 2, {7, 7, -1, -1, -1}},             /* fnstenv */
    };
    struct icpu *c = rig.c;
    rig_arm();
    rig_random_state(&from);
    from.gpr[GPR_RSI] &= ~63ull;
    for (unsigned bit = 0; bit < 5; bit++) {
        struct cpu_state old = c->v.cpu;
        c->v.cpu.cr0 |= bit == 0 ? CR0_EM : bit == 1 ? CR0_TS : 0;
        c->v.cpu.cr4 &= ~(bit == 2 ? CR4_OSFXSR : bit == 3 ? CR4_OSXSAVE : 0);
        c->v.cpu.xcr0 = bit == 4 ? XCR0_X87 | XCR0_SSE : old.xcr0;
        c->simd_blocked = (uint32_t[]){SIMD_X87 | SIMD_SSE, 15, SIMD_SSE, SIMD_AVX | SIMD_AVX512, SIMD_AVX | SIMD_AVX512}[bit];
        for (unsigned n = 0; n < sizeof(table) / sizeof(table[0]); n++) {
            from.gpr[GPR_RAX] = (uintptr_t)rig.ram;
            from.gpr[GPR_RSI] = (uintptr_t)rig.ram;
            if (run_plain(table[n].bytes, table[n].length, 64) != table[n].vector[bit])
                fail_msg("row %u, condition %u: %d", n, bit, interp.vector);
        }
        c->v.cpu.cr0 = old.cr0, c->v.cpu.cr4 = old.cr4, c->v.cpu.xcr0 = old.xcr0;
        c->simd_blocked = 0;
    }
}

static void test_legacy_modes(void **state)
{
    struct icpu *c = rig.c;
    rig_arm();
    rig_random_state(&from);
    from.gpr[GPR_RAX] = 0x11223344;
    from.gpr[GPR_RCX] = 0xf0f0ffff;
    /* Operand sizes default to 16 bits in 16-bit code. */
    assert_int_equal(run_plain("\xf3\x0f\xb8\xc1", 4, 16), -1); /* popcnt ax, cx */
    assert_int_equal(interp.state.gpr[GPR_RAX], 0x11220010);
    assert_int_equal(run_plain("\x66\xf3\x0f\xb8\xc1", 5, 16), -1); /* popcnt eax, ecx */
    assert_int_equal(interp.state.gpr[GPR_RAX], 24);
    assert_int_equal(run_plain("\xf3\x0f\xb8\xc1", 4, 32), -1);
    assert_int_equal(interp.state.gpr[GPR_RAX], 24);
    /* VEX.W and the high register bit are ignored. */
    assert_int_equal(run_plain("\xc4\xe2\xb8\xf2\xd1", 5, 32), -1); /* andn edx, eax (W=1, vvvv=0111), ecx */
    assert_int_equal(interp.state.gpr[GPR_RDX], ~0x11223344u & 0xf0f0ffff);
    assert_int_equal(run_plain("\xc4\xe2\x38\xf2\xd1", 5, 32), -1);
    assert_int_equal(interp.state.gpr[GPR_RDX], ~0x11223344u & 0xf0f0ffff);
    /* VEX does not exist in real and virtual-8086 mode. */
    c->v.cpu.cr0 &= ~CR0_PE;
    assert_int_equal(run_plain("\xc4\xe2\x78\xf2\xd1", 5, 16), VECTOR_UD);
    assert_int_equal(run_plain("\xf3\x0f\xb8\xc1", 4, 16), -1);
    c->v.cpu.cr0 |= CR0_PE;
    /* FXSAVE leaves XMM8 to XMM15 alone. */
    memset(ram, 0xa5, sizeof(ram));
    from.gpr[GPR_RSI] = (uintptr_t)rig.ram;
    struct candidate k;
    fill(&k, (const uint8_t *)"\x0f\xae\x06", 3);
    assert_true(try(&k, 32));
    k.insn.address_mask = ~0ull;
    c->code_bits = 32;
    rig_run_interp(&k.insn, RIG_TLB, &from, ram, &interp);
    c->code_bits = 64;
    assert_int_equal(interp.vector, -1);
    assert_memory_equal(interp.ram + XSAVE_XMM, from.xsave + XSAVE_XMM, 128);
    assert_int_equal(interp.ram[XSAVE_XMM + 128], 0xa5);
    accepted = 0;
}

/* However many different instructions there are, decoding goes on; the one that finds no room asks to be decoded again. */
static void test_arena_full(void **state)
{
    struct icpu *c = rig.c;
    unsigned full = 0;
    rig_arm();
    for (unsigned n = 0; n < 300000 && full < 2; n++) {
        struct candidate k;
        uint8_t code[] = {0x66, (uint8_t)(0x40 | (n >> 14 & 1) << 2 | (n >> 15 & 1)), 0x0f, 0x3a, (uint8_t)(0x0c + (n >> 16 & 3)),
                          (uint8_t)(0xc0 | (n >> 8 & 63)), (uint8_t)n};
        fill(&k, code, sizeof(code));
        assert_true(try(&k, 64));
        if (k.insn.fn != native_arena_full)
            continue;
        full++;
        c->v.cpu.gpr[GPR_RIP] = 0x1000 + k.length;
        if (setjmp(c->escape) == 0) {
            k.insn.fn(c, &k.insn);
            fail();
        }
        assert_int_equal(c->v.cpu.gpr[GPR_RIP], 0x1000);
        assert_true(try(&k, 64));
        assert_true(k.insn.fn == native_register);
        prepare(&k);
        rig_run_direct(k.code, k.length, &from, ram, &direct);
        compare(&k, RIG_TLB, "after a flush");
    }
    assert_true(full);
    finish("arena");
}

static void test_self_modified(void **state)
{
    struct icpu *c = rig.c;
    rig_arm();
    rig_random_state(&from);
    from.gpr[GPR_RSI] = (uintptr_t)rig.ram + 256;
    for (int offset = -20; offset < 20; offset++) {
        c->block_guard = (uintptr_t)rig.ram + 256 + (uintptr_t)(intptr_t)offset;
        c->block_guard_span = 4;
        rig.self_modified = 0;
        assert_int_equal(run_plain("\x0f\x11\x06", 3, 64), -1); /* movups [rsi], xmm0 */
        assert_int_equal(rig.self_modified, offset > -4 && offset < 16);
    }
    c->block_guard_span = 0;
    accepted = 0;
}

int main(void)
{
    if (rig_create())
        return 77;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_x87),
        cmocka_unit_test(test_legacy),
        cmocka_unit_test(test_vex),
        cmocka_unit_test(test_evex),
        cmocka_unit_test(test_edges),
        cmocka_unit_test(test_exceptions),
        cmocka_unit_test(test_vsib),
        cmocka_unit_test(test_addresses),
        cmocka_unit_test(test_restore),
        cmocka_unit_test(test_control_bits),
        cmocka_unit_test(test_legacy_modes),
        cmocka_unit_test(test_arena_full),
        cmocka_unit_test(test_self_modified),
    };
    int result = cmocka_run_group_tests_name("native", tests, NULL, NULL);
    rig_destroy();
    return result;
}
