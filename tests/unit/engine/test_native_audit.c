/*
 * Stubs are taken apart: whatever bytes a guest gives as code, in any code size, a stub made of them contains the one instruction, which touches no register that the caller
 * wants kept and no memory but [pointer], and loads and stores of struct icpu.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "native_rig.h"

#define ROUNDS 400000u
#define KEPT_REGISTERS 0xf038u /* RBX RSP RBP R12-R15 */

static ZydisDecoder decoder;

struct finding {
    const struct native_code *native;
    ZydisMnemonic wanted;
    unsigned found; /* times the wanted instruction was there */
    const char *problem;
};

static int general_register(ZydisRegister reg)
{
    ZydisRegister wide = ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg);
    return ZydisRegisterGetClass(wide) == ZYDIS_REGCLASS_GPR64 ? ZydisRegisterGetId(wide) : -1;
}

static const char *check_operand(const struct finding *f, const ZydisDecodedOperand *op, bool context)
{
    if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
        int n = general_register(op->reg.value);
        return n >= 0 && KEPT_REGISTERS >> n & 1 ? "kept register" : NULL;
    }
    if (op->type != ZYDIS_OPERAND_TYPE_MEMORY || op->mem.type == ZYDIS_MEMOP_TYPE_AGEN)
        return NULL;
    int base = general_register(op->mem.base);
    if (base < 0 || KEPT_REGISTERS >> base & 1 || op->mem.index != ZYDIS_REGISTER_NONE)
        return "address";
    if (op->mem.segment != ZYDIS_REGISTER_DS)
        return "segment";
    if (context ? (uint64_t)op->mem.disp.value >= sizeof(struct icpu) : op->mem.disp.value != 0)
        return "displacement";
    return !context && op->size / 8u > f->native->size ? "size" : NULL;
}

static const char *check_instruction(struct finding *f, const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *op)
{
    switch (zi->mnemonic) {
    case ZYDIS_MNEMONIC_RET:
    case ZYDIS_MNEMONIC_SAHF:
    case ZYDIS_MNEMONIC_LAHF:
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_XOR:
    case ZYDIS_MNEMONIC_SETO:
        return zi->operand_count_visible && op[0].type == ZYDIS_OPERAND_TYPE_MEMORY ? "memory" : NULL;
    default:
        break;
    }
    bool context = zi->mnemonic == ZYDIS_MNEMONIC_MOV || zi->mnemonic == ZYDIS_MNEMONIC_MOVZX;
    if (!context) {
        if (zi->mnemonic != f->wanted)
            return "another instruction";
        f->found++;
    }
    for (unsigned n = 0; n < zi->operand_count; n++) {
        const char *problem = check_operand(f, &op[n], context);
        if (problem)
            return problem;
    }
    return NULL;
}

static void take_apart(struct finding *f)
{
    const struct native_code *native = f->native;
    for (unsigned at = 0; at < native->code_bytes && !f->problem;) {
        ZydisDecodedInstruction zi;
        ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
        if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, native->code + at, native->code_bytes - at, &zi, op))) {
            f->problem = "bytes";
            return;
        }
        f->problem = check_instruction(f, &zi, op);
        at += zi.length;
        if ((at == native->code_bytes) != (zi.mnemonic == ZYDIS_MNEMONIC_RET))
            f->problem = "end";
    }
    if (!f->problem && f->found != 1)
        f->problem = "number of instructions";
}

/* Random bytes seldom are what is wanted: prefixes and opcode maps are put in front. */
static void random_code(uint8_t code[16])
{
    static const uint8_t prefixes[] = {0x66, 0xf2, 0xf3, 0x67, 0x2e, 0x36, 0x64, 0x65, 0x40, 0x48, 0x45, 0x4f, 0x66, 0xf2, 0xf3};
    static const uint8_t starts[][2] = {{0x0f}, {0x0f}, {0x0f, 0x38}, {0x0f, 0x3a}, {0xc4}, {0xc5}, {0x62}, {0x8f}, {0xd8}, {0xdd}};
    rig_random_bytes(code, 16);
    unsigned n = 0;
    for (uint64_t count = rig_random() % 6; count > 2; count--)
        code[n++] = prefixes[rig_random() % sizeof(prefixes)];
    const uint8_t *start = starts[rig_random() % (sizeof(starts) / sizeof(starts[0]))];
    code[n++] = start[0] == 0xd8 ? (uint8_t)(0xd8 | (rig_random() & 7)) : start[0];
    if (start[1])
        code[n++] = start[1];
    if (start[0] == 0xc4 || start[0] == 0x62 || start[0] == 0x8f) {
        code[n] = (uint8_t)((code[n] & 0xe0) | (rig_random() % 10) | (start[0] == 0x8f ? 8 : 0));
        if (rig_random() & 1)
            code[n] |= 0xc0; /* else LES, LDS, BOUND outside 64-bit mode */
        if (rig_random() & 1)
            code[n + 1] |= 0x78;
    }
}

/* VEX.W = 1 outside 64-bit mode, with memory: vmovd both ways, vpinsrd, vpextrd, vcvtsi2sd. */
static void width_bit_of_legacy_modes(void **state)
{
    static const uint8_t codes[][6] = {
        {0xc4, 0xe1, 0xf9, 0x6e, 0x06}, {0xc4, 0xe1, 0xf9, 0x7e, 0x06}, {0xc4, 0xe3, 0xf9, 0x22, 0x06, 1},
        {0xc4, 0xe3, 0xf9, 0x16, 0x06, 1}, {0xc4, 0xe1, 0xfb, 0x2a, 0x06},
    };
    for (unsigned n = 0; n < sizeof(codes) / sizeof(codes[0]); n++) {
        uint8_t code[16] = {0};
        struct insn insn;
        ZydisDecodedInstruction zi;
        ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
        memcpy(code, codes[n], sizeof(codes[n]));
        assert_true(rig_decode(code, 15, 32, &insn, &zi, op));
        struct finding f = {.native = insn.native, .wanted = zi.mnemonic};
        assert_int_equal(f.native->size, 4);
        take_apart(&f);
        assert_null(f.problem);
    }
}

static void no_stub_escapes(void **state)
{
    static const unsigned sizes[] = {16, 32, 64};
    unsigned audited = 0, failures = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        uint8_t code[16];
        struct insn insn;
        ZydisDecodedInstruction zi;
        ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
        random_code(code);
        unsigned bits = sizes[rig_random() % 3];
        if (!rig_decode(code, 15, bits, &insn, &zi, op))
            continue;
        if (insn.fn == native_arena_full) {
            native_flush(rig.c);
            continue;
        }
        bool stub = insn.fn == native_register || insn.fn == native_memory || insn.fn == native_x87_register ||
                    insn.fn == native_x87_memory || insn.fn == native_masked;
        if (!stub)
            continue;
        struct finding f = {.native = insn.native, .wanted = zi.mnemonic};
        take_apart(&f);
        audited++;
        if (!f.problem || ++failures > 20)
            continue;
        fprintf(stderr, "%s in %u-bit code: %s; code", ZydisMnemonicGetString(zi.mnemonic), bits, f.problem);
        for (unsigned n = 0; n < zi.length; n++)
            fprintf(stderr, " %02x", code[n]);
        fprintf(stderr, "; stub");
        for (unsigned n = 0; n < f.native->code_bytes; n++)
            fprintf(stderr, " %02x", f.native->code[n]);
        fprintf(stderr, "\n");
    }
    print_message("%u stubs taken apart\n", audited);
    assert_true(audited > ROUNDS / 40);
    assert_int_equal(failures, 0);
}

static int setup(void **state)
{
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(&decoder, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
    return rig_create();
}

static int teardown(void **state)
{
    rig_destroy();
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(width_bit_of_legacy_modes), cmocka_unit_test(no_stub_escapes)};
    return cmocka_run_group_tests_name("native audit", tests, setup, teardown);
}
