/* For the cmocka tests of a tiny_vm: code fragments, a machine for each test, and what guest code left. */
#ifndef DOPPEL_TESTS_TINY_TEST_H
#define DOPPEL_TESTS_TINY_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tiny_vm.h"

/* Guest code as bytes name_start .. name_end; in .text, because the processor executes some fragments too. */
#define FRAGMENT(name, bits, text)                                                                 \
    __asm__(".pushsection .text\n.code" #bits "\n" #name "_start:\n" text "\n" #name "_end:\n.code64\n.popsection"); \
    extern const char name##_start[], name##_end[]
#define LOAD(vm, mode, name) tiny_vm_load(vm, mode, name##_start, (uint64_t)(name##_end - name##_start))

/* *state is the struct tiny_vm. */
int setup(void **state);
int teardown(void **state);

uint64_t reg(struct tiny_vm *vm, enum gpr_index n);
uint64_t quad_at(struct tiny_vm *vm, gpa_t gpa);
uint32_t long_at(struct tiny_vm *vm, gpa_t gpa);
void quad_put(struct tiny_vm *vm, gpa_t gpa, uint64_t value);
void long_put(struct tiny_vm *vm, gpa_t gpa, uint32_t value);

void run_to_halt(struct tiny_vm *vm);
/* Runs into the handler of `vector`. */
void run_to_vector(struct tiny_vm *vm, unsigned vector);
/* In the handler in 64-bit mode: the pushed rip, and the error code unless it is -1. */
void assert_frame64(struct tiny_vm *vm, uint64_t rip, int64_t error);

#endif
