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
    static const uint8_t prefixes[][2] = {{0}, {0x66}, {0xf3}, {0xf2}, {0x66, 0xf2}};
    struct candidate k;
    for (unsigned p = 0; p < 5; p++)
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
    /* A faulting x87 or MMX store may have written its first bytes, or have marked the registers used: up to the implementation, as are
     * MASKMOVDQU's faults for bytes that are masked off. */
    const struct native_code *n = k->insn.fn == native_masked || k->insn.fn == native_memory || k->insn.fn == native_x87_memory ? k->insn.native : NULL;
    bool vague = memory_of(k)->encoding == ZYDIS_OPERAND_ENCODING_NONE || !n || (n->blocked & SIMD_X87 && n->flags & NATIVE_WRITE);
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

static void indices(struct rig_state *state, unsigned size)
{
    struct icpu *c = rig.c;
    memcpy(c->v.cpu.xsave, state->xsave, sizeof(state->xsave));
    for (unsigned n = 0; n < (rig.xsave_mask & XCR0_AVX512 ? 32u : 16u); n++) {
        if (rig_random() % 2)
            continue;
        for (unsigned part = 0; part < (rig.xsave_mask & XCR0_AVX512 ? 4u : 2u); part++)
            for (unsigned at = 0; at < 16; at += size) {
                int64_t index = (int64_t)(rig_random() % 800) - 400;
                memcpy(native_vector_part(c, n, part) + at, &index, size);
            }
    }
    memcpy(state->xsave, c->v.cpu.xsave, sizeof(state->xsave));
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
        compare(k, round % RIG_PATHS, "gather or scatter");
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
    finish("gather and scatter");
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
    };
    int result = cmocka_run_group_tests_name("native", tests, NULL, NULL);
    rig_destroy();
    return result;
}
