/* Corners of the interpreter: the ends of the address space, code that changes in odd places, alignment, odd states. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "tiny_vm.h"

static int setup(void **state)
{
    struct tiny_vm *vm = test_calloc(1, sizeof(*vm));
    *state = vm;
    return tiny_vm_create(vm);
}

static int teardown(void **state)
{
    tiny_vm_destroy(*state);
    test_free(*state);
    return 0;
}

#define CODE(...) (const uint8_t[]){__VA_ARGS__}
#define LOAD(vm, mode, ...) tiny_vm_load(vm, mode, CODE(__VA_ARGS__), sizeof(CODE(__VA_ARGS__)))

static uint64_t *gpr(struct tiny_vm *vm)
{
    return vm->vcpu->cpu.gpr;
}

static void run_to_halt(struct tiny_vm *vm)
{
    assert_int_equal(interp_engine.run(vm->vcpu), ENGINE_EXIT_HALT);
}

static void run_to_vector(struct tiny_vm *vm, unsigned vector)
{
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP], TINY_HANDLER + 16 * vector + 1);
}

static void restart(struct tiny_vm *vm)
{
    gpr(vm)[GPR_RIP] = TINY_CODE;
    vm->vcpu->cpu.activity = CPU_RUNNING;
}

/* ---- code ---- */

/* LOCK MOV becomes LOCK ADD: the byte that changes is not the first. */
static void invalid_becomes_valid(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, 0x90, 0xf0, 0x89, 0x03, 0xf4); /* nop; lock mov %eax, (%rbx); hlt */
    gpr(vm)[GPR_RAX] = 7;
    gpr(vm)[GPR_RBX] = TINY_DATA;
    run_to_vector(vm, VECTOR_UD);
    *(uint8_t *)tiny_vm_at(vm, TINY_CODE + 2) = 0x01;
    restart(vm);
    run_to_halt(vm);
    assert_int_equal(gpr(vm)[GPR_RIP], TINY_CODE + 5);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, TINY_DATA), 7);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(invalid_becomes_valid),
    };
    return cmocka_run_group_tests_name("corner", tests, NULL, NULL);
}
