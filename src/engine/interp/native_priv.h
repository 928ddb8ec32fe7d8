/*
 * Native execution of guest instructions, shared by native*.c and op_xsave.c.
 *
 * A stub is `unsigned stub(struct icpu *c, void *operand)`: it loads the general registers and flags that the instruction uses from *c, executes the
 * instruction with its memory operand at `operand`, stores what was changed and returns 0. When the instruction faults on the host, the
 * stub returns the host's trap number + 1 and nothing but MXCSR and x87 status flags has changed. Vector and x87 registers are the host's own.
 * Threading: an arena belongs to its vCPU's thread; only the signal handler's table of arenas (native_fault.c) is shared.
 */
#ifndef DOPPEL_ENGINE_INTERP_NATIVE_PRIV_H
#define DOPPEL_ENGINE_INTERP_NATIVE_PRIV_H

#include "engine/interp/interp_priv.h"

typedef unsigned native_entry(struct icpu *c, void *operand);

#define NATIVE_READ 0x01u     /* the memory operand is read */
#define NATIVE_WRITE 0x02u    /* it is written */
#define NATIVE_MMX 0x04u      /* CR0.EM gives #UD rather than #NM */
#define NATIVE_NOT_REAL 0x08u /* VEX or EVEX outside 64-bit mode: #UD in real and virtual-8086 mode */
#define NATIVE_POINTERS 0x10u /* x87: leaves instruction and data pointers behind */

/* How a masked memory operand's elements are chosen. */
enum native_mask {
    MASK_NONE,
    MASK_OPMASK,  /* bit n of an opmask register, n modulo the number of elements in memory */
    MASK_PACKED,  /* compress, expand: as many elements from the start as the opmask has bits */
    MASK_SIGNS,   /* VMASKMOV, VPMASKMOV: sign bits of a vector register */
};

struct native_code {
    native_entry *entry; /* NULL: emulated in C (gather, scatter) */
    uint16_t fop;        /* x87 opcode as FOP reports it */
    uint8_t blocked;     /* SIMD_* classes that it belongs to; 0: none, touches no vector or x87 register */
    uint8_t flags;       /* NATIVE_* */
    uint8_t size;        /* bytes of the memory operand, 0: none */
    uint8_t align_mask;  /* address bits that must be clear, or #GP(0) */
    uint8_t mask_kind;   /* enum native_mask */
    uint8_t mask_register;
    uint8_t mask_bits;    /* elements that the mask covers */
    uint8_t element_size; /* bytes of one masked element in memory */
    /* Gather and scatter: vector registers, element sizes and count in mask_bits. */
    uint8_t vector, index;
    uint8_t index_size;
    uint8_t vector_bytes;
    bool opmask; /* the mask is an opmask register (EVEX), not a vector register (VEX) */
    uint8_t code_bytes;
    uint8_t code[]; /* the stub again, to find equal ones */
};

#define IMAGE_BYTES 512
#define HEADER_BYTES 64
#define XSAVE_FCW 0
#define XSAVE_FSW 2
#define XSAVE_FTW 4
#define XSAVE_FOP 6
#define XSAVE_FIP 8
#define XSAVE_FDP 16
#define XSAVE_MXCSR 24
#define XSAVE_MXCSR_MASK 28
#define FSW_ES 0x0080u
#define XSAVE_ST 32
#define XSAVE_XMM 160
#define XSAVE_BV 512
#define XSAVE_COMP_BV 520
#define XSAVE_DATA 576
#define XSAVE_COMPONENTS 8 /* the last one supported is Hi16_ZMM, 7 */

#define MXCSR_DEFAULT 0x1f80u
#define FCW_DEFAULT 0x37fu

struct native_component {
    uint16_t offset, size; /* in the standard form; size 0: the host lacks it */
    bool align64;          /* in the compacted form */
};

#define STUB_BYTES_MAX 128
#define STUB_BUCKETS 4096

struct native_arena {
    _Alignas(64) uint8_t idle_image[IMAGE_BYTES + HEADER_BYTES]; /* XRSTOR of it initialises everything */
    _Alignas(64) uint8_t bounce[192];

    uint64_t xsave_mask; /* components moved; 0: the host has FXSAVE only */
    bool has_xsaveopt;
    struct native_component component[XSAVE_COMPONENTS];
    uint32_t mxcsr_mask;
    uint32_t host_mxcsr;
    uint16_t host_fcw;

    /* x87 pointers: the processor's would be the stub's. */
    bool x87_ran;       /* since simd_load */
    bool translated;    /* so did others than stubs' */
    bool pointers_hidden;    /* native_pointers_hide */
    bool pointers_forgotten; /* native_pointers_forget */
    uint16_t fop, loaded_fop;
    uint64_t fip;
    uint64_t fdp, loaded_fdp;
    bool fdp_known;     /* an instruction with a memory operand has run since simd_load */

    size_t arena_bytes; /* of code, and of records */
    uint8_t *code_rw;
    const uint8_t *code_rx;
    uint32_t code_used;
    bool code_reused; /* addresses already executed are being written again */
    uint8_t *records;
    uint32_t records_used;
    uint32_t bucket[STUB_BUCKETS]; /* offset + 1 in records of the newest; chained through native_record */
};

static inline uint16_t get16(const uint8_t *p)
{
    return *(const uint16_t *)p;
}
static inline uint32_t get32(const uint8_t *p)
{
    return *(const uint32_t *)p;
}
static inline uint64_t get64(const uint8_t *p)
{
    return *(const uint64_t *)p;
}
static inline void put16(uint8_t *p, uint16_t value)
{
    *(uint16_t *)p = value;
}
static inline void put32(uint8_t *p, uint32_t value)
{
    *(uint32_t *)p = value;
}
static inline void put64(uint8_t *p, uint64_t value)
{
    *(uint64_t *)p = value;
}

/* native_stub.c: register assignment and the rewritten instruction. */
struct stub_code {
    unsigned length;
    uint8_t bytes[STUB_BYTES_MAX];
};
/* memory: index in d->op of the memory operand, -1: none. False: some operand cannot be handled. */
bool native_stub_build(const struct decode *d, int memory, struct stub_code *out);
/* W of the VEX or EVEX prefix tells the width of what is in memory; outside 64-bit mode that is 32 bits whatever W says, as that of general registers is. */
bool native_w_is_width(ZydisMnemonic mnemonic);

/* native_select.c: for the translator, which copies such instructions with their memory operand rewritten. 0: it may not; otherwise nonzero with the SIMD_* classes in
 * the low four bits, and the alignment below which the memory operand raises #GP (1: none), and in *x87_pointers whether it sets those. */
unsigned native_classes(struct icpu *c, const struct decode *d, unsigned *alignment, bool *x87_pointers);

/* native_code.c: finds or makes the record. NULL: the arena is full. */
const struct native_code *native_code_intern(struct icpu *c, const struct native_code *wanted, const struct stub_code *stub);
int native_code_create(struct native_arena *a);
void native_code_destroy(struct native_arena *a);
void native_code_flush(struct native_arena *a);

/* native_fault.c: arenas whose faults are the guest's. -ENOSPC when there are too many. */
int native_fault_register(const void *start, size_t length_bytes);
void native_fault_unregister(const void *start);

/* native.c: raises #UD or #NM as the control bits say when the classes may not be used now. */
void native_check_slow(struct icpu *c, unsigned blocked, unsigned flags);
static inline void native_check(struct icpu *c, const struct native_code *n)
{
    if (unlikely((c->simd_blocked & n->blocked) | (n->flags & NATIVE_NOT_REAL)))
        native_check_slow(c, n->blocked, n->flags);
}
/* Executes the stub; raises the fault that the host took. */
void native_run(struct icpu *c, const struct native_code *n, void *operand);
/* After a direct store to guest memory of `size` bytes. */
static inline void native_stored(struct icpu *c, const void *host, unsigned size)
{
    if (unlikely((uintptr_t)host + size - 1 - c->block_guard < c->block_guard_span + size - 1))
        interp_self_modified(c);
}
/* Host address of the whole operand when the TLB has it, else NULL. */
static inline void *native_host_fast(const struct icpu *c, gva_t gva, unsigned size, bool write)
{
    const struct tlb_entry *e = tlb_slot(c, gva);
    uint64_t have = write ? e->write : e->read;
    return likely(have == tlb_tag(c, gva, size)) ? (void *)(gva + e->addend) : NULL;
}

/* native.c: handlers. */
insn_fn native_register;
insn_fn native_memory;
insn_fn native_x87_register;
insn_fn native_x87_memory;
insn_fn native_hint;
insn_fn native_touch;
insn_fn native_arena_full;

/* native_masked.c */
insn_fn native_masked;
insn_fn native_gather;
insn_fn native_scatter;

/* native_state.c: guest x87/SSE/AVX state while it is in v.cpu.xsave (call simd_save first). */
int native_state_create(struct icpu *c);
/* The image is true until the guest's next instruction; live registers stay live. */
void native_state_snapshot(struct icpu *c);
/* The image was changed: live registers follow it. */
void native_state_reload(struct icpu *c);
/* XINUSE, when the image is true: the components that are not in their initial state. */
uint64_t native_state_in_use(const struct icpu *c);
/* Makes the image's bytes of the components true: those in initial state get their initial values. */
void native_state_materialize(struct icpu *c, uint64_t components);
/* Address of 16 bytes of vector register `number`, part 0..3. */
uint8_t *native_vector_part(struct icpu *c, unsigned number, unsigned part);
/* Zeroes a vector register from `bytes` (16, 32) upwards. */
void native_vector_zero_above(struct icpu *c, unsigned number, unsigned bytes);
uint64_t native_opmask_get(struct icpu *c, unsigned number);
void native_opmask_set(struct icpu *c, unsigned number, uint64_t value);

/* op_x87_env.c */
bool x87_environment_select(const struct decode *d, struct insn *i);
/* FSW with its ES and B bits as the unmasked exceptions in it make them. */
uint16_t native_fsw_summary(uint16_t fsw, uint16_t fcw);

#endif
