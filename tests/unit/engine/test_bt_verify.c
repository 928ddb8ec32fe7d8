/*
 * Random guest code through the translator, and what comes out through bt_verify: every opcode map, encoding, prefix and addressing mode, ring 0 and ring 3, in every way in which blocks
 * are translated. And bt_verify itself on code that is wrong.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/host.h"
#include "bt_random.h"
#include "bt_verify.h"
#include "engine/bt/translate_priv.h"
#include "tiny_vm.h"

#define CODE 0x100000u
#define CODE_BYTES 0x8000u
#define ROUNDS 36u

static struct tiny_vm vm;

/* ---- random code ---- */

static bool narrow; /* 32-bit code */

/* The first byte may be a REX prefix, which 32-bit code does not have. */
static uint8_t *bytes_put(uint8_t *p, unsigned count, const uint8_t *bytes)
{
    unsigned skip = narrow && (bytes[0] & 0xf0) == 0x40;
    memcpy(p, bytes + skip, count - skip);
    return p + count - skip;
}

/* What makes and breaks groups: accesses off one base that is moved now and then, pushes and pops, changes of SMAP's rights. Any valid instructions may come between. */
static unsigned group_put(uint8_t *p)
{
    uint8_t *start = p;
    static const uint8_t bases[] = {GPR_RBX, GPR_RBP, GPR_RSI, GPR_RCX};
    unsigned base = bases[bt_below(sizeof(bases))];
    for (unsigned n = 3 + bt_below(10); n; n--) {
        unsigned reg = bt_below(16), size = bt_below(4), what = bt_below(24);
        uint8_t disp = (uint8_t)(bt_below(3) ? bt_below(64) : bt_random64()), rex = (uint8_t)(0x48 | (reg > 7) << 2), imm = (uint8_t)(bt_below(4) ? bt_below(16) : bt_random64());
        if (what < 12)
            p = bytes_put(p, 4, (uint8_t[]){size ? rex : rex & 0xf7, (uint8_t)((bt_below(2) ? 0x88 : 0x8a) | (size > 1)), (uint8_t)(0x40 | (reg & 7) << 3 | base), disp});
        else if (what == 12)
            p = bytes_put(p, 4, (uint8_t[]){0x48, 0x83, (uint8_t)((bt_below(2) ? 0xc0 : 0xe8) | base), imm});
        else if (what == 13)
            p = bytes_put(p, 4, (uint8_t[]){0x48, 0x8d, (uint8_t)(0x40 | base << 3 | base), imm});
        else if (what == 14)
            p = bytes_put(p, 3, (uint8_t[]){bt_below(4) ? 0x48 : 0x90, 0xff, (uint8_t)((bt_below(2) ? 0xc0 : 0xc8) | base)});
        else if (what == 15)
            p = bytes_put(p, 3, (uint8_t[]){0x0f, 0x01, (uint8_t)(0xca + bt_below(2))});
        else if (what < 18)
            p = bytes_put(p, 1, (uint8_t[]){(uint8_t)(0x50 + bt_below(16))});
        else if (what == 18)
            p = bytes_put(p, 4, (uint8_t[]){0x48, 0x83, bt_below(2) ? 0xc4 : 0xec, imm});
        else if (what == 19)
            p = bytes_put(p, 5, (uint8_t[]){rex, 0x89, (uint8_t)(0x44 | (reg & 7) << 3), 0x24, disp});
        else if (what == 20)
            p = bytes_put(p, 3, (uint8_t[]){0xff, (uint8_t)(0x70 | base), disp}); /* push m */
        else if (what == 21)
            p = bytes_put(p, 7, (uint8_t[]){0x48, 0x81, (uint8_t)((bt_below(2) ? 0xc0 : 0xe8) | base), imm, (uint8_t)bt_below(2), 0, (uint8_t)(bt_below(8) ? 0 : 0x80)});
        else if (what == 22)
            p = bytes_put(p, 5, (uint8_t[]){0x66, 0x0f, 0x6f, (uint8_t)(0x40 | base), disp});
        else
            p = bytes_put(p, 4, (uint8_t[]){0x0f, 0xb6, (uint8_t)(0x40 | (reg & 7) << 3 | base), disp});
    }
    return (unsigned)(p - start);
}

/* Fills the code with instructions one after another, each as long as the decoder says. */
static void code_make(uint8_t *code, unsigned bytes)
{
    ZydisDecoder decoder;
    ZydisDecodedInstruction zi;
    decoder_init(&decoder, narrow ? 32 : 64, host_is_amd());
    for (unsigned at = 0; at + 128 < bytes;) {
        if (!bt_below(12)) {
            at += group_put(code + at);
            continue;
        }
        unsigned length = bt_insn_put(code + at, narrow);
        bool valid = ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, NULL, code + at, 15, &zi));
        if (!valid && bt_below(16))
            continue;
        at += valid ? zi.length : length;
    }
}

/* ---- tests ---- */

static int setup(void **state)
{
    return tiny_vm_create_with(&vm, &bt_engine_ops);
}

static int teardown(void **state)
{
    tiny_vm_destroy(&vm);
    return 0;
}

static unsigned longest_hot, longest_cold;

static void verify(struct bt_engine *e, const struct bt_block *block)
{
    const char *why = bt_verify(e, block);
    if (block->tc_end - block->tc_start > longest_hot)
        longest_hot = block->tc_end - block->tc_start;
    if (block->cold_end - block->cold_start > longest_cold)
        longest_cold = block->cold_end - block->cold_start;
    if (!why)
        return;
    print_error("block at %#x: %s\n", block->start, why);
    const uint8_t *bytes = e->layout.window_r + block->page->offset + block->start;
    for (unsigned n = 0; n < block->length; n++)
        print_error("%02x ", bytes[n]);
    print_error("\n");
    fail();
}

static void room_make(struct bt_engine *e)
{
    if (cache_room(e))
        return;
    cache_exclusive_begin(e, NULL);
    cache_flush(e);
    cache_exclusive_end(e, NULL);
}

static void translate_one(struct bt_engine *e, const struct bt_mode *mode, unsigned offset, bool careful)
{
    room_make(e);
    struct bt_page *page = cache_page(e, CODE + (offset & ~0xfffu), CODE + (offset & ~0xfffu), mode);
    assert_non_null(page);
    uint64_t next = bt_below(4) ? CODE + (offset & ~0xfffu) + 0x1000 : ~0ull;
    if (!bt_below(3))
        for (unsigned n = 0; n < 40; n++)
            cache_mark(e, page, (offset + n) & 0xfff, bt_below(4) ? BT_MARK_CROSSES : BT_MARK_CALLS);
    verify(e, translate_block(e, page, offset & 0xfff, next, careful, NULL));
}

static void random_code(void **state)
{
    struct bt_engine *e = (struct bt_engine *)vm.engine;
    struct bt_debug debug = e->debug;
    unsigned count = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        cache_exclusive_begin(e, NULL);
        cache_flush(e);
        cache_exclusive_end(e, NULL);
        memset(e->marks, 0, BT_MARKS * sizeof(*e->marks));
        narrow = round % 3 == 2;
        code_make(tiny_vm_at(&vm, CODE), CODE_BYTES);
        struct bt_mode mode = {.code_bits = narrow ? 32 : 64, .user = (uint8_t)(round & 1), .simd_blocked = bt_below(3) ? 0 : (uint8_t)bt_below(16), .cr4 = (uint8_t)bt_below(4)};
        if (narrow)
            mode.flat = (uint8_t)(bt_below(2) ? BT_MODE_SEGMENTS : 1u << SEG_CS | 1u << SEG_SS | (bt_below(64) & BT_MODE_SEGMENTS));
        e->debug.group_span = (uint16_t)(bt_below(3) ? BT_GROUP_SPAN_MAX : bt_below(BT_GROUP_SPAN_MAX));
        e->debug.block_insns = (uint16_t)(bt_below(3) ? BT_BLOCK_INSNS_MAX : 1 + bt_below(BT_BLOCK_INSNS_MAX));
        for (unsigned offset = 0; offset < CODE_BYTES; offset += 1 + bt_below(40), count++)
            translate_one(e, &mode, offset, !bt_below(8));
    }
    e->debug = debug;
    print_message("%u blocks, up to %u and %u bytes\n", count, longest_hot, longest_cold);
}

/* Single instructions in whose translation something went wrong once, or easily could. */
static void known_cases(void **state)
{
    static const struct {
        const char *name;
        uint8_t bytes[16];
    } cases[] = {
        {"bts fs:[rip + 0x10], rax", {0x64, 0x48, 0x0f, 0xab, 0x05, 0x10}},
        {"bt fs:[rsp + rbx * 8], esp", {0x64, 0x0f, 0xa3, 0x24, 0xdc}},
        {"btc gs:[rsp], rdx", {0x65, 0x48, 0x0f, 0xbb, 0x14, 0x24}},
        {"bts word [rsp + r12 * 2 + 1], r11w", {0x66, 0x46, 0x0f, 0xab, 0x5c, 0x64, 0x01}},
        {"mov eax, gs:[eax + ebx]", {0x65, 0x67, 0x8b, 0x04, 0x18}},
        {"push qword [rsp + 8]", {0xff, 0x74, 0x24, 0x08}},
        {"pop rsp", {0x5c}},
        {"leave", {0xc9}},
        {"mov ah, [rbx]", {0x8a, 0x23}},
        {"movaps xmm0, [rsp + 8]", {0x0f, 0x28, 0x44, 0x24, 0x08}},
        {"rep movsq", {0xf3, 0x48, 0xa5}},
        {"xacquire lock add [rbx], eax", {0xf2, 0xf0, 0x01, 0x03}},
        {"data16 loop", {0x66, 0xe2, 0xfe}},
        {"vmovdqu64 zmm0, [r13 + 64]", {0x62, 0xd1, 0xfe, 0x48, 0x6f, 0x45, 0x01}},
        {"inc ecx; dec di", {0x41, 0x66, 0x4f}},
        {"mov eax, [moffs]; mov [moffs], al", {0xa1, 0x78, 0x56, 0x34, 0xf2, 0xa2, 0x11, 0x22, 0x33, 0x44}},
        {"push esp; pop esp; leave", {0x54, 0x5c, 0xc9}},
        {"push ds; push eax; pop ecx; pop edx", {0x1e, 0x50, 0x59, 0x5a, 0xc3}},
        {"lea eax, [disp32]", {0x8d, 0x05, 0x78, 0x56, 0x34, 0x12}},
        {"jz over; mov eax, gs:[ecx]; over: mov eax, gs:[edx]", {0x74, 0x03, 0x65, 0x8b, 0x01, 0x65, 0x8b, 0x02}},
        {"vpgatherdd ymm0, [rax + ymm1], ymm2", {0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x08}},
    };
    struct bt_engine *e = (struct bt_engine *)vm.engine;
    for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++)
        for (unsigned kind = 0; kind < 4; kind++)
            for (unsigned crosses = 0; crosses < 2; crosses++) {
                struct bt_mode mode = {.code_bits = kind & 2 ? 32 : 64, .user = kind & 1, .flat = kind & 2 ? BT_MODE_SEGMENTS : 0};
                uint8_t *at = (uint8_t *)tiny_vm_at(&vm, CODE) + 64 * n;
                cache_memory_changed(e, CODE, 0x1000);
                memset(at, 0x90, 64);
                memcpy(at, cases[n].bytes, sizeof(cases[n].bytes));
                at[sizeof(cases[n].bytes)] = 0xc3;
                struct bt_page *page = cache_page(e, CODE, CODE, &mode);
                if (crosses)
                    cache_mark(e, page, 64 * n, BT_MARK_CROSSES);
                const char *why = bt_verify(e, translate_block(e, page, 64 * n, ~0ull, false, NULL));
                if (why)
                    print_error("%s: %s\n", cases[n].name, why);
                assert_null(why);
            }
}

/* Most single bits of a translation matter, and bt_verify sees that. */
static void changed_translation(void **state)
{
    static const uint8_t code[] = {0x48, 0x8b, 0x43, 0x08, 0x50, 0x64, 0x48, 0x89, 0x0a, 0xf3, 0xaa, 0xc3}; /* mov rax, [rbx + 8]; push; mov fs:[rdx], rcx; rep stosb; ret */
    struct bt_engine *e = (struct bt_engine *)vm.engine;
    struct bt_mode mode = {.code_bits = 64};
    memcpy(tiny_vm_at(&vm, CODE), code, sizeof(code));
    struct bt_block *block = translate_block(e, cache_page(e, CODE, CODE, &mode), 0, ~0ull, false, NULL);
    assert_null(bt_verify(e, block));
    unsigned seen = 0, bits = 8 * (block->tc_end - block->tc_start);
    for (unsigned n = 0; n < bits; n++) {
        uint8_t *byte = e->layout.tc_write + block->tc_start + n / 8;
        *byte ^= (uint8_t)(1u << n % 8);
        seen += bt_verify(e, block) != NULL;
        *byte ^= (uint8_t)(1u << n % 8);
    }
    assert_null(bt_verify(e, block));
    print_message("%u of %u bits\n", seen, bits);
    assert_true(seen > bits * 3 / 4);
}

/* Blocks of one instruction, or two, again and again: none comes near the room that cache_room leaves for one. */
static void largest_blocks(void **state)
{
    struct bt_engine *e = (struct bt_engine *)vm.engine;
    uint8_t *code = tiny_vm_at(&vm, CODE);
    longest_hot = longest_cold = 0;
    for (unsigned n = 0; n < 6000; n++) {
        uint8_t bytes[2][32];
        unsigned length[2], at = 0;
        narrow = n % 3 == 2;
        struct bt_mode mode = {.code_bits = narrow ? 32 : 64, .cr4 = BT_MODE_FSGSBASE, .flat = narrow ? BT_MODE_SEGMENTS : 0};
        ZydisDecoder decoder;
        ZydisDecodedInstruction zi;
        decoder_init(&decoder, mode.code_bits, host_is_amd());
        for (unsigned k = 0; k < 2; k++) {
            do
                bt_insn_put(bytes[k], narrow);
            while (!ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, NULL, bytes[k], 15, &zi)) || zi.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE);
            length[k] = zi.length;
        }
        for (unsigned k = 0; k < BT_BLOCK_INSNS_MAX; at += length[k++ & 1])
            memcpy(code + at, bytes[k & 1], length[k & 1]);
        cache_memory_changed(e, CODE, 0x1000);
        room_make(e);
        struct bt_page *page = cache_page(e, CODE, CODE, &mode);
        for (unsigned k = 0; n & 1 && k < at; k++)
            cache_mark(e, page, k, BT_MARK_CROSSES);
        verify(e, translate_block(e, page, 0, ~0ull, false, NULL));
    }
    print_message("up to %u and %u bytes\n", longest_hot, longest_cold);
    assert_true(longest_hot < BT_BLOCK_TC_MAX * 3 / 4 && longest_cold < BT_BLOCK_TC_MAX * 3 / 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(known_cases, setup, teardown),
        cmocka_unit_test_setup_teardown(changed_translation, setup, teardown),
        cmocka_unit_test_setup_teardown(largest_blocks, setup, teardown),
        cmocka_unit_test_setup_teardown(random_code, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
