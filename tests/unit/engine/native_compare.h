/*
 * Runs one instruction twice, on the host processor and through the interpreter's decoder and handlers, from the same registers, flags and memory.
 *
 * Guest memory at COMPARE_AREA is mapped there in the test process too, with an unmapped page after it in both, so that addresses mean the same on both sides.
 * Test-only; one thread.
 */
#ifndef DOPPEL_TESTS_NATIVE_COMPARE_H
#define DOPPEL_TESTS_NATIVE_COMPARE_H

#include "engine/interp/interp_priv.h"

#define COMPARE_AREA 0x10000000ull
#define COMPARE_BYTES 0x10000ull

struct compare_state {
    uint64_t gpr[16];
    uint64_t rflags;
    bool faulted;
};

struct compare; /* one guest processor and one page of host code */

struct compare *compare_create(void);
void compare_destroy(struct compare *compare);
struct icpu *compare_cpu(struct compare *compare);

/* 64-bit code at CPL 0. `code` is a straight-line instruction of `length` bytes. */
void compare_run_native(struct compare *compare, const uint8_t *code, unsigned length, struct compare_state *state);
/* Decodes with `code_bits` and runs the handler. False when it raised a fault: c->fault tells which. */
bool compare_run_guest(struct compare *compare, const uint8_t *code, unsigned length, struct compare_state *state);

uint8_t *compare_guest_memory(struct compare *compare); /* host address of the guest's COMPARE_AREA */
/* Segment attributes, CS.L and so on for 16, 32 or 64-bit code with flat segments. */
void compare_set_mode(struct compare *compare, unsigned code_bits);

#endif
