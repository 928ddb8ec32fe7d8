/*
 * Random instructions, and one executed on the processor by itself, for compare.c.
 *
 * A case is one instruction at CODE with all registers; data lies in AREA. Both addresses are the same in the guest and in this process, whose own mappings are far above, so
 * that an access which misses the area faults on both sides.
 */
#ifndef DOPPEL_CONFORM_CASES_H
#define DOPPEL_CONFORM_CASES_H

#include <Zydis/Zydis.h>

#include "arch/cpu.h"

#define AREA 0x40000000ull
#define AREA_BYTES 0x10000u
#define CODE_PAGE (AREA + AREA_BYTES) /* one page; and the next is never mapped */
#define CODE (CODE_PAGE + 0x400)

struct state {
    uint64_t gpr[16], rip, rflags;
    int vector; /* fault, -1: none */
    uint64_t error, cr2; /* of the processor's */
    _Alignas(64) uint8_t xsave[CPU_XSAVE_BYTES];
};

struct test_case {
    uint8_t code[16];
    bool decoded; /* zi and op are valid */
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
};

struct generator {
    uint64_t seed;
    uint64_t xcr0;
    uint32_t component_offset[8], component_bytes[8]; /* of XCR0's components 2..7 */
    uint32_t image_bytes;                             /* all of them end here */
    ZydisDecoder decoder;
};

void generator_init(struct generator *g, uint64_t seed, uint64_t xcr0);
uint64_t generator_random(struct generator *g);
void generator_bytes(struct generator *g, void *data, size_t length);
/* False: the instruction may not be executed here (why in cases.c); try the next. */
bool generator_case(struct generator *g, struct test_case *test);
/* May a decoded one not be executed by this process? */
bool generator_forbidden(const struct test_case *test);
/* Registers for it, most memory operands inside the area. May change test->code's displacement. */
void generator_state(struct generator *g, struct test_case *test, struct state *state);

/* On the processor (processor.c). */
int processor_init(uint64_t xcr0, uint32_t image_bytes);
void processor_run(const struct test_case *test, const struct state *from, struct state *to);
/* Without single steps, from `from->rip` to the first exception, which may be INT3's. */
void processor_run_on(const struct state *from, struct state *to);

/* Components that are in their initial state get their values, so that images compare. */
void state_normalize(const struct generator *g, struct state *state);

#endif
