/* What the translator does not translate: code that has not run often, when it is told to wait for that; only in a guest's first moments. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "tiny_vm.h"

static int create_patient(struct engine **engine, struct physmap *memory, struct error *err)
{
    const struct engine_options options = {.patient = true};
    int r = bt_engine_ops.create(engine, memory, err);
    return r ? r : bt_engine_ops.set_options(*engine, &options, err);
}

#define CODE 0x400000u /* what is below 2 MiB is the interpreter's */

static void run(struct tiny_vm *vm, const void *code, uint64_t size_bytes)
{
    tiny_vm_load(vm, TINY_LONG, code, size_bytes);
    memcpy(tiny_vm_at(vm, CODE), code, size_bytes);
    vm->vcpu->cpu.gpr[GPR_RIP] = CODE;
    vm->ops->state_changed(vm->vcpu);
    assert_int_equal(vm->ops->run(vm->vcpu), ENGINE_EXIT_HALT);
}

/* Runs a loop so often; how many blocks were translated for it. */
static uint64_t run_loop(struct tiny_vm *vm, uint32_t rounds)
{
    uint8_t code[] = {0xb9, 0, 0, 0, 0, 0xff, 0xc9, 0x75, 0xfc, 0xf4}; /* mov ecx, rounds; 1: dec ecx; jnz 1b; hlt */
    uint64_t before = vm->vcpu->counters[COUNTER_translated_blocks];
    memcpy(code + 1, &rounds, sizeof rounds);
    run(vm, code, sizeof code);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RCX], 0);
    return vm->vcpu->counters[COUNTER_translated_blocks] - before;
}

static void test_at_once(void **state)
{
    struct tiny_vm vm;
    assert_int_equal(tiny_vm_create_with(&vm, &bt_engine_ops), 0);
    assert_true(run_loop(&vm, 2) > 0);
    tiny_vm_destroy(&vm);
}

static void test_patient(void **state)
{
    struct engine_ops ops = bt_engine_ops;
    struct tiny_vm vm;
    ops.create = create_patient;
    assert_int_equal(tiny_vm_create_with(&vm, &ops), 0);
    assert_int_equal(run_loop(&vm, 20), 0);
    assert_int_equal(run_loop(&vm, 20), 0);
    assert_true(run_loop(&vm, 1000) > 0);
    tiny_vm_destroy(&vm);
}

/* After so many blocks in all, each is translated when it runs first: here thousands of small ones, a few rounds each. */
static void test_not_for_ever(void **state)
{
    enum { BLOCKS = 3000, ROUNDS = 120 };
    static uint8_t code[5 + 2 * BLOCKS + 9];
    struct engine_ops ops = bt_engine_ops;
    struct tiny_vm vm;
    ops.create = create_patient;
    assert_int_equal(tiny_vm_create_with(&vm, &ops), 0);
    code[0] = 0xb9; /* mov ecx, ROUNDS */
    code[1] = ROUNDS;
    for (unsigned n = 0; n < BLOCKS; n++) { /* jmp to the next */
        code[5 + 2 * n] = 0xeb;
        code[6 + 2 * n] = 0;
    }
    uint8_t *end = code + 5 + 2 * BLOCKS;
    int32_t back = -(2 * BLOCKS + 8);
    memcpy(end, (const uint8_t[]){0xff, 0xc9, 0x0f, 0x85}, 4); /* dec ecx; jnz to the first */
    memcpy(end + 4, &back, sizeof back);
    end[8] = 0xf4;
    run(&vm, code, sizeof code);
    assert_true(vm.vcpu->counters[COUNTER_translated_blocks] > BLOCKS / 2);
    tiny_vm_destroy(&vm);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_at_once), cmocka_unit_test(test_patient), cmocka_unit_test(test_not_for_ever)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
