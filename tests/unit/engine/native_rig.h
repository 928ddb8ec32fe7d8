/*
 * Runs one instruction twice from the same state: directly on the processor, and as the interpreter runs it. For test_native*.c.
 *
 * Guest addresses are host addresses here: a few pages of `ram` of which the last is inaccessible, to both sides. The interpreter's memory functions, faults and the
 * other select functions are replaced by small ones in native_rig.c.
 */
#ifndef DOPPEL_TEST_NATIVE_RIG_H
#define DOPPEL_TEST_NATIVE_RIG_H

#include "engine/interp/native_priv.h"

#define RIG_RAM_PAGES 3 /* accessible; one more follows */
#define RIG_RAM_BYTES (RIG_RAM_PAGES * 4096u)

enum rig_path { RIG_TLB, RIG_HOST, RIG_BOUNCE, RIG_PATHS };

struct rig_state {
    uint64_t gpr[16];
    uint64_t flags; /* arithmetic ones */
    uint64_t mxcsr_pad;
    _Alignas(64) uint8_t xsave[CPU_XSAVE_BYTES];
};

struct rig_result {
    int vector; /* fault, -1: none */
    struct rig_state state;
    uint8_t ram[RIG_RAM_BYTES];
};

struct rig {
    struct icpu *c;
    uint8_t *ram; /* also the guest's address */
    uint64_t xsave_mask;
    uint64_t code_address; /* of the instruction, as both sides see it */
    unsigned self_modified;
};

extern struct rig rig;

int rig_create(void);
void rig_destroy(void);
/* At each test's start: cmocka puts its own signal handlers in place. */
void rig_arm(void);

uint64_t rig_random(void);
void rig_random_bytes(void *data, size_t length);
/* Registers, flags, vectors with a share of ordinary numbers, x87 stack; everything masked. RSI points into ram. */
void rig_random_state(struct rig_state *state);

void rig_run_direct(const uint8_t *code, unsigned length, const struct rig_state *from, const uint8_t *ram, struct rig_result *result);
/* insn: as decode_insn made it. */
void rig_run_interp(const struct insn *insn, enum rig_path path, const struct rig_state *from, const uint8_t *ram, struct rig_result *result);
/* Name of the first difference, NULL: none. */
const char *rig_compare(const struct rig_result *a, const struct rig_result *b);

/* True when the handler is one of native.c's or op_xsave.c's, which may be executed directly too. */
bool rig_decode(const uint8_t *code, unsigned length, unsigned code_bits, struct insn *insn, ZydisDecodedInstruction *zi,
                ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT]);

#endif
