/* See tiny_test.h. */
#include "tiny_test.h"

#include <string.h>

int setup(void **state)
{
    struct tiny_vm *vm = test_calloc(1, sizeof(*vm));
    *state = vm;
    return tiny_vm_create(vm);
}

int teardown(void **state)
{
    tiny_vm_destroy(*state);
    test_free(*state);
    return 0;
}

uint64_t reg(struct tiny_vm *vm, enum gpr_index n)
{
    return vm->vcpu->cpu.gpr[n];
}

uint64_t quad_at(struct tiny_vm *vm, gpa_t gpa)
{
    uint64_t value;
    memcpy(&value, tiny_vm_at(vm, gpa), 8);
    return value;
}

uint32_t long_at(struct tiny_vm *vm, gpa_t gpa)
{
    uint32_t value;
    memcpy(&value, tiny_vm_at(vm, gpa), 4);
    return value;
}

void quad_put(struct tiny_vm *vm, gpa_t gpa, uint64_t value)
{
    memcpy(tiny_vm_at(vm, gpa), &value, 8);
}

void long_put(struct tiny_vm *vm, gpa_t gpa, uint32_t value)
{
    memcpy(tiny_vm_at(vm, gpa), &value, 4);
}

void run_to_halt(struct tiny_vm *vm)
{
    assert_int_equal(interp_engine.run(vm->vcpu), ENGINE_EXIT_HALT);
}

void run_to_vector(struct tiny_vm *vm, unsigned vector)
{
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RIP), TINY_HANDLER + 16 * vector + 1);
}

void assert_frame64(struct tiny_vm *vm, uint64_t rip, int64_t error)
{
    gpa_t frame = reg(vm, GPR_RSP);
    if (error >= 0) {
        assert_int_equal(quad_at(vm, frame), error);
        frame += 8;
    }
    assert_int_equal(quad_at(vm, frame), rip);
}
