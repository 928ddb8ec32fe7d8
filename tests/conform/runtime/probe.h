/*
 * Probes: one piece of code run with every register given, and every register as the trap that ended it found them. For programs that want exact states
 * of faults at any privilege, with any RSP (all traps come on a stack of their own).
 *
 * Also what such programs need around them: random numbers with a seed from the command line (seed=N), page tables that map anything anywhere, a walk of
 * them that says which fault an access must give, and an emitter of memory operands with every addressing mode. 64-bit only.
 */
#ifndef DOPPEL_PROBE_H
#define DOPPEL_PROBE_H

#include "conform.h"

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, NONE = -1 };

/* ---- random numbers ---- */

void random_seed(void);
uint64_t random64(void);
static inline unsigned random_below(unsigned n) { return (unsigned)((uint32_t)random64() * (uint64_t)n >> 32); }

/* ---- page tables ---- */

#define PG_P 1ull
#define PG_W 2ull
#define PG_U 4ull
#define PG_A 0x20ull
#define PG_D 0x40ull
#define PG_LARGE 0x80ull
#define PG_G 0x100ull
#define PG_NX (1ull << 63)
#define PG_ADDRESS 0xffffffffff000ull
#define PAGE 4096ull
enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_R = 8, PF_I = 16 };
#define CR0_WP (1ul << 16)
#define CR0_AM (1ul << 18)
#define CR4_PGE (1ul << 7)
#define CR4_PCIDE (1ul << 17)
#define CR4_OSXSAVE (1ul << 18)
#define CR4_SMEP (1ul << 20)
#define CR4_SMAP (1ul << 21)

extern uint64_t boot_pml4[512];
/* RAM that nobody uses, one to one, zeroed; never given back. */
void *pages_allocate(unsigned count);
/* The entry for va in the tables of `pml4`, whose upper levels are made (open to all) as needed. Does not invalidate. */
uint64_t *page_entry(uint64_t *pml4, uint64_t va);
void page_map(uint64_t va, uint64_t entry); /* in boot_pml4, with INVLPG */
/* Takes the first megabytes from ring 3, and everything but RAM and the local APIC from everybody; page 0 too. */
void identity_map_restrict(void);

static inline bool canonical(uint64_t va) { return (uint64_t)((int64_t)(va << 16) >> 16) == va; }

/* What an access must do: vector NO_TRAP, or the exception and what comes with it. */
struct expectation {
    int vector;
    uint64_t error, cr2;
};
struct access {
    uint64_t va;
    unsigned size;
    bool write, fetch, user, ac, stack; /* ac: EFLAGS.AC; stack: SS is the segment */
    uint8_t alignment;                  /* #GP when not a multiple of it; 0: none */
    bool checked;                       /* alignment checks apply (operand of a general or x87 instruction) */
};
struct expectation access_expect(const struct access *access);
/* Address of the byte by the tables at cr3, whatever the rights; 0: none. */
uint64_t page_physical(uint64_t va);

/* ---- running ---- */

struct probe {
    uint64_t gpr[16], ip, flags;
    bool user;
    void *simd; /* XSAVE area to start from, or NULL */
};
struct outcome {
    uint64_t gpr[16], ip, flags, cs, error, cr2;
    int vector;
};
#define SIMD_BYTES 4096
extern uint8_t simd_before[SIMD_BYTES], simd_after[SIMD_BYTES];

void probe_begin(void); /* takes all exceptions and USER_DONE */
void probe_end(void);
void probe_run(const struct probe *probe, struct outcome *outcome);
/* Random registers, flags of OSZAPC and DF as told. */
void probe_random(struct probe *probe);
bool simd_enable(void); /* XCR0 as wide as offered; false: no XSAVE */
uint64_t simd_features(void); /* XCR0 */
void simd_random(void); /* fills simd_before */
bool simd_same(const uint8_t *a, const uint8_t *b); /* but for the x87 registers */
uint8_t *simd_part(uint8_t *area, unsigned number, unsigned part); /* 16 bytes of vector register `number` */
uint64_t *simd_mask(uint8_t *area, unsigned number); /* opmask register */

/* ---- emitting ---- */

struct operand {
    int base, index; /* NONE: none; base NONE and index NONE: absolute */
    unsigned scale;
    int32_t displacement;
    uint8_t segment; /* 0, 0x64 or 0x65 prefix */
    bool narrow;     /* 32-bit address */
};
enum encoding { LEGACY, VEX, EVEX };
struct form {
    const char *name;
    uint8_t encoding;
    uint8_t prefix; /* 0, 0x66, 0xf2, 0xf3, 0xf0; of VEX and EVEX: pp */
    uint8_t map;    /* 0, 1: 0f, 2: 0f 38, 3: 0f 3a */
    uint8_t opcode;
    int8_t reg;     /* -1: any; else /digit */
    uint8_t w, length; /* VEX and EVEX L: 0, 1, 2 */
    uint8_t immediate_bytes;
    uint8_t size;
    uint8_t kind; /* the program's own */
    uint8_t alignment;
};
/* Writes the instruction; returns its length. vvvv and opmask of VEX and EVEX only. */
unsigned emit(uint8_t *at, const struct form *form, const struct operand *operand, unsigned reg, unsigned vvvv, unsigned opmask, bool zeroing);
/* Any addressing mode such that the operand is at `va`, with the registers in *probe changed accordingly. Never the registers in `keep`. */
void operand_random(struct operand *operand, struct probe *probe, uint64_t va, unsigned keep);
void put_done(uint8_t *at); /* INT USER_DONE: two bytes */

#endif
