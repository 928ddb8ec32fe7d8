/*
 * What is remembered of instructions by form (forms.c) against decoding them: random instructions in every mode, each with many values of displacement and immediate, and with as few
 * bytes as a page's end leaves.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "bt_random.h"
#include "engine/bt/translate_priv.h"
#include "tiny_vm.h"

#define COUNT 500000u
#define VALUES 3u

static struct tiny_vm vm;
static struct bt_forms *forms;
static unsigned known;

static struct bt_mode mode_random(void)
{
    struct bt_mode mode = {.code_bits = bt_below(2) ? 32 : 64, .user = (uint8_t)bt_below(2), .cr4 = (uint8_t)bt_below(4)};
    if (mode.code_bits == 32)
        mode.flat = bt_below(4) ? BT_MODE_SEGMENTS : (1u << SEG_CS | 1u << SEG_SS);
    if (!bt_below(8))
        mode.simd_blocked = (uint8_t)bt_random64();
    return mode;
}

/* What nobody looks at for its kind is made equal. */
static void unused_forget(struct tinsn *i)
{
    bool jumps = i->kind == TI_JCC || i->kind == TI_LOOP || i->kind == TI_JMP || i->kind == TI_CALL;
    if (i->kind == TI_SKIP || i->kind == TI_EXIT) {
        *i = (struct tinsn){.length = i->length, .kind = i->kind, .exit = i->exit, .implied = i->implied};
        return;
    }
    if (!i->memory && i->kind != TI_LEA_RIP)
        i->disp = 0;
    if (!jumps)
        i->target = 0;
    if (jumps || i->kind == TI_COPY || i->kind == TI_MEMORY || i->kind == TI_LEA_RIP || i->kind == TI_MOFFS)
        i->imm = 0;
    if (i->adjusts == TI_NONE)
        i->adjust = 0;
}

static void compare(const struct bt_mode *mode, const uint8_t *bytes, unsigned available)
{
    struct analyze_context a = {.c = (struct icpu *)vm.vcpu, .mode = *mode};
    struct tinsn right, wrong;
    analyze_insn(&a, bytes, available, 0, &right);
    a.forms = forms;
    known += available >= FORM_WINDOW && forms_find(forms, mode, bytes);
    analyze_insn(&a, bytes, available, 0, &wrong);
    unused_forget(&right);
    unused_forget(&wrong);
    if (!memcmp(&right, &wrong, sizeof(right)))
        return;
    print_error("%u-bit code, user %u, %u bytes:", mode->code_bits, mode->user, available);
    for (unsigned n = 0; n < available; n++)
        print_error(" %02x", bytes[n]);
    print_error("\nkind %u, remembered %u; length %u, %u; displacement %#x, %#x; immediate %#x, %#x\n", right.kind, wrong.kind, right.length, wrong.length,
                (unsigned)right.disp, (unsigned)wrong.disp, (unsigned)right.imm, (unsigned)wrong.imm);
    fail();
}

/* From the end of what is sure to be the form's on, other bytes come. */
static void values_change(uint8_t *bytes, const struct bt_mode *mode)
{
    struct analyze_context a = {.c = (struct icpu *)vm.vcpu, .mode = *mode};
    struct tinsn i;
    analyze_insn(&a, bytes, 15, 0, &i);
    unsigned from = i.disp_bytes ? i.disp_at : i.imm_bytes ? i.imm_at : i.length;
    for (unsigned n = from; n < BT_INSN_ROOM; n++)
        if (bt_below(2))
            bytes[n] = (uint8_t)(bt_below(4) ? bt_random64() : bt_below(2) ? 0 : 0xff);
}

/* Any instruction, sometimes after many prefixes, or one with a register's number in its immediate. */
static void insn_put(uint8_t bytes[BT_INSN_ROOM], bool narrow)
{
    uint8_t insn[BT_INSN_ROOM];
    unsigned what = bt_below(16), prefixes = what ? 0 : bt_below(8);
    bt_insn_put(insn, narrow);
    memset(bytes, 0x3e, BT_INSN_ROOM);
    memcpy(bytes + prefixes, insn, BT_INSN_ROOM - prefixes);
    if (what == 1) { /* VBLENDVPS, VBLENDVPD, VPBLENDVB */
        const uint8_t blend[] = {0xc4, 0xe3, 0x71, (uint8_t)(0x4a + bt_below(3))};
        memcpy(bytes, blend, sizeof(blend));
    }
}

static void forms_are_what_decoding_says(void **state)
{
    uint8_t bytes[BT_INSN_ROOM];
    for (unsigned n = 0; n < COUNT; n++) {
        struct bt_mode mode = mode_random();
        insn_put(bytes, mode.code_bits == 32);
        for (unsigned k = 0; k < VALUES; k++) {
            compare(&mode, bytes, bt_below(8) ? FORM_WINDOW : 1 + bt_below(BT_INSN_ROOM));
            values_change(bytes, &mode);
        }
    }
    print_message("%u of %u were known\n", known, COUNT * VALUES);
    assert_true(known > COUNT / 2);
}

static int setup(void **state)
{
    forms = forms_create();
    return forms ? tiny_vm_create_with(&vm, &bt_engine_ops) : -1;
}

static int teardown(void **state)
{
    forms_destroy(forms);
    tiny_vm_destroy(&vm);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(forms_are_what_decoding_says)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
