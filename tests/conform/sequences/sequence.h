/*
 * Random instruction sequences under the translator, the interpreter and the processor: what the program's files share.
 *
 * A world (world.c) is a layout of memory and a privilege; a case is a sequence of instructions in it, made while the interpreter executes it step by step (generate.c), so that operands
 * can be aimed. Every case then runs several times in the translator (engines.c), undisturbed and disturbed, and must end like the interpreter's every time.
 */
#ifndef DOPPEL_CONFORM_SEQUENCE_H
#define DOPPEL_CONFORM_SEQUENCE_H

#include "../../unit/engine/tiny_vm.h"
#include "../instructions/cases.h"
#include "engine/bt/bt_priv.h"

#define CASES_PER_WORLD 128
#define DATA_PAGES 16
#define CODE_PAGES 4
#define PAGES_MAX 48
#define TRACKED_MAX 96
#define LINES_WANTED 40
#define QUEUE_MAX 24 /* instructions that belong together */
#define STEPS_MAX 4000 /* of the interpreter: a case that takes longer is given up */

#define KERNEL 0xffffc9d5a3c00000ull /* linear address of what the processor needs, at an address that no guest code hits by chance */

#define INTERRUPT 0x41
#define SOFTWARE_INTERRUPT 0x80

/* ---- worlds ---- */

/* Descriptors besides tiny_vm.h's: data segments for ring 3 that 32-bit code cannot use like flat ones, but for the last: it has a base and 4 GiB. */
enum { WORLD_LIMITED = 0x53, WORLD_BASED = 0x5b, WORLD_READ_ONLY = 0x63, WORLD_DOWN = 0x6b, WORLD_THREAD = 0x73, WORLD_GDT_LIMIT = 0x77 };

enum page_kind { PAGE_ORDINARY, PAGE_READ_ONLY, PAGE_ABSENT, PAGE_OTHERS, PAGE_MMIO, PAGE_ROM, PAGE_RESERVED, PAGE_CODE };

/* As it is in the first address space before the guest changes anything. */
struct page {
    gva_t gva;
    gpa_t gpa;
    uint8_t kind; /* enum page_kind */
};

struct world {
    uint64_t number;
    bool broken; /* could not be made */
    bool user, large, smc, native;
    bool low;    /* all below 4 GiB: for 32-bit code, which begins and which 64-bit code may follow */
    bool fixing; /* handlers make absent pages present, clear CR0.TS, and return from interrupts */
    gva_t data, code[CODE_PAGES], twin_data, twin_code;
    struct page page[PAGES_MAX];
    unsigned page_count;
    gpa_t code_gpa[CODE_PAGES];
    gpa_t root[2]; /* page tables of address spaces */
    unsigned roots;
    struct cpu_state start; /* of every case, but for general and vector registers */
    /* Physical pages that are compared and put back; tables come last. */
    gpa_t tracked[TRACKED_MAX];
    unsigned tracked_count, tracked_tables;
    uint8_t snapshot[TRACKED_MAX][PAGE_SIZE_BYTES];
    uint8_t large_page[2u << 20]; /* all that is in the large page */
    bool thorough;                /* it is put back, too */
};

/* Fills *w and the memory of both machines. */
void world_make(struct world *w, struct generator *g, uint64_t seed, uint64_t number, bool low, struct tiny_vm *const vm[2]);
/* Where an access of the machine's current privilege and address space leads. False: to a fault. access: PAGING_READ, PAGING_WRITE, PAGING_FETCH. */
bool world_walk(struct tiny_vm *vm, gva_t gva, unsigned access, gpa_t *gpa);
/* Physical address of the page table entry for gva; 0: there is none. */
gpa_t world_entry(const struct world *w, struct tiny_vm *vm, gva_t gva);
/* Number of the code page and offset of a linear address there: number * 4096 + offset; -1: none. */
int world_code_offset(const struct world *w, struct tiny_vm *vm, gva_t gva);
/* Puts data back as at the start of each case; tables: page tables, too. */
void world_restore(const struct world *w, struct tiny_vm *vm, bool tables);

/* ---- cases ---- */

struct line {
    gva_t gva;
    int at[15]; /* of its bytes, see world_code_offset */
    uint8_t bytes[15], length;
    bool narrow;       /* 32-bit code */
    uint8_t constants; /* the first byte of displacement and immediate; length: none */
};

struct sequence {
    uint64_t number;
    struct line line[LINES_WANTED + QUEUE_MAX];
    unsigned lines;
    uint8_t code[CODE_PAGES][PAGE_SIZE_BYTES]; /* what is there before the first instruction */
    struct cpu_state start;
    int interrupt;      /* vector that waits for IF from the start; -1: none */
    bool tables_change; /* it writes page tables or control registers */
    /* What then happens is up to the processor: it goes on in code that was there already, perhaps without the INVLPG that was to follow; or runs in the very page that changes. */
    bool cut;
    bool copies_aliased; /* a REP MOVS from one address of a page frame to another of the same: processors copy by blocks and do not see the overlap */
};

/* Makes a sequence of the world by executing it in vm. */
void sequence_make(struct sequence *s, struct generator *g, const struct world *w, uint64_t seed, uint64_t number, struct tiny_vm *vm);
/* Changes a bit of one instruction's displacement or immediate. */
void sequence_mutate(struct sequence *s, struct generator *g, uint64_t seed);
/* Puts the code into the machine's memory. */
void sequence_place(const struct sequence *s, const struct world *w, struct tiny_vm *vm);

/* ---- encodings (encode.c) ---- */

struct encoded {
    uint8_t bytes[16];
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
};

struct encode_rules {
    bool user;   /* leave out what is privileged */
    bool native; /* leave out what this process must not execute */
    bool narrow; /* 32-bit code: no REX prefixes; `base` is below 8 */
    uint8_t base; /* the register that most memory operands are relative to */
};

/* A random instruction; operands anywhere. */
void encode_random(struct generator *g, const struct encode_rules *rules, struct encoded *out);
bool encode_decode(struct generator *g, struct encoded *e);
void encode_width(struct generator *g, bool narrow); /* for decoding from here on */
/* Gives the instruction a 32-bit displacement. */
void encode_widen(struct generator *g, struct encoded *e);
/* Its explicit memory operand, or NULL. */
const ZydisDecodedOperand *encode_memory(const struct encoded *e);
unsigned encode_gpr(ZydisRegister reg); /* number, 16: none */
unsigned encode_pick(struct generator *g, unsigned limit);

/* ---- making them: generate.c, system.c ---- */

struct queued {
    struct encoded e;
    bool relative; /* its displacement is to lead to `target` from RIP */
    gva_t target;
};

struct making {
    struct sequence *s;
    struct generator *g;
    const struct world *w;
    struct tiny_vm *vm;
    struct encode_rules rules;
    struct queued queue[QUEUE_MAX]; /* what comes next, whatever happens */
    unsigned queued, taken;
    bool written[CODE_PAGES][PAGE_SIZE_BYTES];
    unsigned wanted;
    gva_t loop_head; /* 0: no loop is open */
    unsigned loop_register;
    gva_t edited; /* the page whose table entry is being changed */
    gva_t rip;
    const uint64_t *gpr;
};

struct queued *queue_add(struct making *m, const void *bytes, unsigned length);
struct queued *queue_template(struct making *m, const void *bytes, unsigned length); /* in 32-bit code without the REX prefix that it may begin with */
void queue_mov(struct making *m, unsigned reg, uint64_t value);
gva_t place_pick(struct making *m);                              /* somewhere to jump to */
gva_t target_pick(struct making *m, unsigned size, bool careful); /* somewhere in data */
unsigned register_pick(struct making *m);                        /* not RSP and no loop's */
void stack_provide(struct making *m, unsigned bytes);            /* RSP will point to plain data with so much room below */
/* Instructions that change privilege, address space or translation of addresses. */
void queue_system(struct making *m);

/* ---- engines (engines.c) ---- */

struct outcome {
    struct state state; /* rip, gpr, rflags and xsave */
    uint64_t cr2;
    struct segment cs, ss, data[4]; /* ES DS FS GS */
    bool narrow;                     /* the exception came from 32-bit code */
    uint64_t fs_base, gs_base;
    unsigned mmio_reads, mmio_writes, mmio_size;
    gpa_t mmio_gpa;
    uint64_t mmio_value;
    /* The frame of the exception that ended it, and its vector. */
    int vector, interrupt;
    uint64_t error, rip, rflags, rsp;
};

/* How the translator runs a case. */
enum run_kind {
    RUN_NATIVE,    /* on the processor */
    RUN_INTERP,    /* in the interpreter, by blocks */

    RUN_COLD,      /* nothing translated yet */
    RUN_WARM,      /* everything there */
    RUN_OFTEN,     /* again and again */
    RUN_EMPTY,     /* translations but no table entries */
    RUN_FILLED,    /* some entries there from the start */
    RUN_DISTURBED, /* something happens on each way into translated code */
    RUN_SHORT,     /* tiny blocks, no groups, disturbed as well */
    RUN_KICKED,    /* by another thread, all the time */
    RUN_KINDS
};

extern const char *const run_names[RUN_KINDS];

int engines_watch(void); /* starts the thread that notices hangs */
void engines_start(struct tiny_vm *vm, const struct sequence *s, bool cold);
/* False: it did not end, or its end is not the same every time. *safe: the processor may do the same in this process; NULL: nobody asks. */
bool engines_step(struct tiny_vm *vm, const struct sequence *s, const struct generator *g, bool *safe);
void engines_run(struct tiny_vm *vm, const struct world *w, const struct sequence *s, enum run_kind kind, uint64_t seed);
void engines_outcome(struct tiny_vm *vm, const struct generator *g, struct outcome *to);
/* Has the guest reached a handler of its exceptions? */
bool engines_in_handler(const struct tiny_vm *vm);

/* ---- the processor (native.c) ---- */

int native_init(const struct generator *g); /* before the engines, whose signal handlers come first */
/* May this process execute the instruction at RIP? */
bool native_may_execute(const struct generator *g, struct tiny_vm *vm);
/* May it run into what ended the case? */
bool native_may_end(const struct outcome *right);
void native_case_run(const struct world *w, const struct sequence *s, struct outcome *to);
/* 0, or the first address where memory is not like the machine's. */
gva_t native_memory_differs(const struct world *w, struct tiny_vm *vm);

#endif
