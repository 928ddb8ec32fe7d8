/*
 * The reference interpreter, inside.
 *
 * Guest code is decoded by Zydis (decode.c) into basic blocks of `struct insn` that are cached by host address of their first byte and code size (block.c). The
 * run loop (interp.c) looks a block up through the execute TLB, compares its bytes with memory, which is how self-modified, cross-modified and DMA-written code is noticed,
 * and calls each insn's handler. Handlers live in op_*.c; everything unprivileged that has no handler of its own runs natively on guest state (native.c).
 *
 * Rules:
 * - Only an instruction with INSN_ENDS_BLOCK may write `rip`, which is advanced past the instruction before its handler runs. A handler that faults calls raise_*(), which does not return (longjmp to
 *   the run loop): the loop puts rip back and delivers. So a handler changes no guest state before its last possible fault.
 * - Arithmetic flags live in c->oszapc in the form LAHF and SETO give (AH and AL), produced by the host processor executing the same operation; the other
 *   flags live in v.cpu.rflags. flags_get/flags_set convert; run() leaves rflags complete.
 * - These files are compiled with -mgeneral-regs-only: guest x87/SSE/AVX state stays live in the host's registers between native stubs
 *   (c->simd_live). Before calling anything outside this folder that may use vector registers (libc, Zydis, host_ops), call simd_save(c).
 * - Threading: a vCPU's structures belong to its thread; only `attention` and c->shootdown are shared.
 */
#ifndef DOPPEL_ENGINE_INTERP_PRIV_H
#define DOPPEL_ENGINE_INTERP_PRIV_H

#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <Zydis/Zydis.h>

#include "engine/engine.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

struct icpu;
struct insn;
typedef void insn_fn(struct icpu *c, const struct insn *i);

/* ---- decoded instructions ---- */

#define INSN_LOCK 0x01u
#define INSN_REP 0x02u    /* F3: REP, REPE */
#define INSN_REPNE 0x04u  /* F2 */
#define INSN_LEGACY 0x08u /* not 64-bit mode: segment limits and 32-bit linear addresses apply */
#define INSN_MEM_DST 0x10u /* the first explicit operand is in memory */
#define INSN_MEM_SRC 0x20u /* the second (or later) is */
#define INSN_ENDS_BLOCK 0x40u

struct native_code; /* native.c */

struct insn {
    insn_fn *fn;
    union {
        uint64_t imm; /* immediate sign-extended to 64 bits; branch displacement; moffs address; far pointer selector<<32|offset */
        const struct native_code *native;
    };
    uint64_t address_mask; /* 0xFFFF, 0xFFFFFFFF or ~0: applied to the effective address */
    int32_t displacement;
    uint8_t length;
    uint8_t flags;   /* INSN_* */
    uint8_t op_size; /* effective operand size in bytes: 1, 2, 4, 8 (of the first explicit operand) */
    uint8_t src_size; /* of the second explicit operand */
    /* Registers as byte offsets into struct cpu_state.gpr: slot * 8, plus 1 for AH CH DH BH. */
    uint8_t dst, src; /* first and second explicit operand when they are general registers */
    uint8_t base, index; /* REG_OFFSET(GPR_ZERO) when absent; base may be GPR_RIP */
    uint8_t scale;       /* 0..3 */
    uint8_t segment;     /* enum segment_index of the memory operand, override applied */
    uint8_t condition;   /* low four opcode bits for Jcc, SETcc, CMOVcc */
    uint8_t extra;       /* free for the handler */
    uint16_t mnemonic;   /* ZydisMnemonic */
};

#define REG_OFFSET(slot) ((uint8_t)((slot) * 8))

/* What a select function sees. */
struct decode {
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
    unsigned code_bits; /* 16, 32 or 64 */
    const uint8_t *bytes;
};

/*
 * A select function looks at the mnemonic and operands and, when the instruction is its own, sets i->fn (and whatever of imm, extra, flags it needs) and returns true. decode.c has
 * filled all other fields of *i from Zydis before. Tried in this order; the last one, native_select, refuses what may not run natively, and then
 * op_undefined (counts `unimplemented`, raises #UD) is used.
 */
bool op_integer_select(struct icpu *c, const struct decode *d, struct insn *i); /* op_integer.c: mov, alu, shifts, mul/div, bits, push/pop, setcc, cmov, lea, xchg, cmpxchg, xadd, bswap ... */
bool op_control_select(struct icpu *c, const struct decode *d, struct insn *i); /* op_control.c: near jmp/call/ret, jcc, loop, jcxz, enter/leave, pushf/popf, cli/sti, nop, pause, hlt, int3/int/into */
bool op_string_select(struct icpu *c, const struct decode *d, struct insn *i);  /* op_string.c: movs stos lods scas cmps ins outs with every prefix */
bool op_system_select(struct icpu *c, const struct decode *d, struct insn *i);  /* op_system.c: everything privileged, segment loads, far transfers, syscall family, cpuid, msr, xgetbv, in/out */
bool op_xsave_select(struct icpu *c, const struct decode *d, struct insn *i);   /* op_xsave.c: xsave family, fxsave, fnsave, ldmxcsr, emms ... what needs care beyond a stub */
bool native_select(struct icpu *c, const struct decode *d, struct insn *i);     /* native.c: all other unprivileged x87, MMX, SSE, AVX, AVX-512, BMI, ADX, AES, SHA ... */
insn_fn op_undefined;

/* ---- blocks (block.c) ---- */

#define BLOCK_INSNS_MAX 32
#define BLOCK_BYTES_MAX 128

struct block {
    uintptr_t host;  /* host address of the first byte; 0: dead */
    uint8_t code_bits; /* 16, 32, 64 */
    uint8_t count;     /* instructions */
    uint16_t length_bytes;
    bool crossing;       /* one instruction whose bytes go on in the next page */
    int16_t tail_offset; /* the last eight bytes compared start here, from `host`; see block_tail_set */
    uint64_t tail_mask, tail_value;
    struct block *next[2]; /* what ran after it lately: guesses, checked like any look-up */
    struct block *chain;   /* next in the hash bucket */
    uint8_t *bytes;        /* what was decoded; behind the instructions */
    struct insn insn[];
};

struct block_cache;
struct block_cache *block_cache_create(size_t arena_bytes);
/* Empties it and gives its memory back; it has no more than that from now on. */
void block_cache_shrink(struct icpu *c, size_t arena_bytes);
void block_cache_destroy(struct block_cache *cache);
void block_cache_flush(struct icpu *c);
/* The block at the current rip, decoded if need be. May raise a fault of the instruction fetch. Never ends in the middle of the page's last
 * instruction: an instruction that crosses into the next page forms a block of its own, compared in both pages. */
struct block *block_lookup(struct icpu *c);

/* decode.c: decodes one instruction at bytes[0..available). Returns its length, 0 when more bytes are needed, and for invalid ones an insn that raises #UD (or #GP when
 * over 15 bytes). */
unsigned decode_insn(struct icpu *c, const uint8_t *bytes, unsigned available, unsigned code_bits, struct insn *out);

/* ---- software TLB (tlb.c) ---- */

#define TLB_ENTRIES 1024
#define TLB_GENERATION_MASK 0xfffull
#define TLB_NEVER (~0ull) /* a tag that matches no access */

/* tag = gva of the page | generation. Direct access only: a page of MMIO or ROM (for writes) never gets a tag. */
struct tlb_entry {
    uint64_t read, write, execute;
    uintptr_t addend; /* host address = gva + addend */
};

/* Told of TLB maintenance, by an engine that keeps translations of its own beside the interpreter's. Called after the interpreter's are gone; v.cpu holds the new state. */
struct tlb_listener {
    void (*flush_all)(struct icpu *c);
    void (*flush_non_global)(struct icpu *c, unsigned asid);
    void (*load_cr3)(struct icpu *c, bool keep); /* keep: those of the address space loaded stay true */
    void (*flush_page)(struct icpu *c, gva_t gva);
};

enum tlb_view { VIEW_USER, VIEW_SUPERVISOR /* SMAP applies */, VIEW_SUPERVISOR_AC /* EFLAGS.AC or no SMAP */, VIEW_COUNT };

/* ---- the virtual processor ---- */

struct fault {
    uint8_t vector;
    bool has_error;
    uint32_t error;
    uint64_t address; /* CR2 for #PF */
    uint64_t dr6;     /* bits to set, for #DB */
};

#define INTERP_FAULT 1  /* longjmp values: c->fault is to be delivered */
#define INTERP_RELOOP 2 /* state is consistent at an instruction boundary; go round the loop */

struct icpu {
    struct vcpu v; /* first */

    uint32_t oszapc;          /* AH<<8 | AL as LAHF and SETO left them */
    uint32_t code_bits;       /* 16, 32, 64 */
    uint64_t stack_mask;      /* 0xFFFF, 0xFFFFFFFF or ~0 */
    uint64_t segment_base[SEG_COUNT]; /* added to effective addresses: zero for ES CS SS DS in 64-bit mode */
    struct tlb_entry *tlb;    /* the view in use: views[view] */
    uint64_t tlb_generation;  /* 0..4095, or'ed into tags; follows CR3/PCID */
    enum tlb_view view;
    unsigned cpl;
    bool slow; /* single instructions only: TF, RF, armed breakpoints, interrupt shadow */
    bool careful; /* alignment checks or data breakpoints: `tlb` is a view without tags, so that every access takes the slow path; mem_host gives NULL */
    uint32_t debug_hits; /* DR6.B0-3 of data breakpoints that the current instruction touched; #DB follows it */
    uint64_t paging_key; /* the control bits that TLB entries were made under */
    unsigned max_phys_bits;
    bool amd; /* the guest sees an AMD processor, which the host's then is, too */

    const struct insn *current; /* the instruction being executed; NULL between instructions */
    struct block *block;
    uintptr_t block_guard;      /* stores to host addresses in [block_guard, +block_guard_span) modify the running block */
    uintptr_t block_guard_span;

    jmp_buf escape;
    struct fault fault;
    int delivering; /* vector being delivered, -1: none; for double faults */
    bool interrupt_waiting; /* an interrupt was deliverable but IF was clear: whoever sets IF or lowers CR8 raises attention */

    /* Bounce for read-modify-write that cannot be done in place, see mem_rmw. */
    _Alignas(64) uint8_t bounce[256];
    struct bounce_part {
        void *host; /* NULL: MMIO at gpa, or ROM, whose writes are dropped */
        gpa_t gpa;
        unsigned length;
    } bounce_part[2];
    bool bounce_locked; /* the engine's lock for split locked accesses is held; the run loop frees it on a fault */

    /* native.c */
    bool simd_live;           /* guest x87/SSE/AVX state is in the host's registers, not in v.cpu.xsave */
    uint32_t simd_blocked;    /* SIMD_* classes that must raise #NM or #UD now; recomputed by interp_mode_changed */
    struct native_arena *native;

    struct block_cache *blocks;
    struct tlb_entry *views[VIEW_COUNT + 1]; /* TLB_ENTRIES each; the last never has a tag */
    struct tlb_asid *asids;              /* tlb.c: PCID -> generation */
    const struct tlb_listener *tlb_listener; /* NULL: none */
    ptrdiff_t memory_shift; /* from PhysMap's own mapping of RAM to the one that accesses go to */
    uint64_t *tally; /* NULL: off. By mnemonic, what interp_run_one and interp_run_next were called for (of a block its first instruction) */

    _Atomic uint32_t shootdown; /* another thread asks for a full TLB and block flush (engine invalidate) */
    struct engine *engine;
};

#define SIMD_X87 1u  /* x87, MMX */
#define SIMD_SSE 2u
#define SIMD_AVX 4u
#define SIMD_AVX512 8u

/* Recomputes everything above that is derived from control registers, segments, CPL and RFLAGS.AC/TF. Call after changing any of them. (interp.c) */
void interp_mode_changed(struct icpu *c);
/* The running block's own bytes were written: the rest of it must not run. (interp.c) */
void interp_self_modified(struct icpu *c);

/* ---- faults (exception.c) ---- */

_Noreturn void raise_fault(struct icpu *c, unsigned vector);                     /* no error code: #UD #DE #NM #MF #XM #BR ... */
_Noreturn void raise_error(struct icpu *c, unsigned vector, uint32_t error);     /* #GP #SS #NP #TS #AC #DF */
_Noreturn void raise_page_fault(struct icpu *c, gva_t address, uint32_t error);
_Noreturn void raise_gp0(struct icpu *c);
/* From the run loop: delivers c->fault through the IDT (or makes it #DF, or shutdown: sets cpu.activity). Nested faults longjmp back and come here again. */
void exception_deliver(struct icpu *c);
/* INT n, INT3, INTO, INT1: rip already points past the instruction. */
void exception_software(struct icpu *c, uint8_t vector, bool is_int_n);
/* External interrupt or NMI, at an instruction boundary. */
void exception_interrupt(struct icpu *c, uint8_t vector);

/* ---- flags ---- */

static inline uint64_t flags_arithmetic(const struct icpu *c) /* as RFLAGS bits */
{
    return (c->oszapc >> 8 & 0xd5) | (uint64_t)(c->oszapc & 1) << 11;
}
static inline uint64_t flags_get(const struct icpu *c)
{
    return (c->v.cpu.rflags & ~RFLAGS_OSZAPC) | flags_arithmetic(c) | RFLAGS_FIXED;
}
static inline void flags_set_arithmetic(struct icpu *c, uint64_t rflags)
{
    c->oszapc = (uint32_t)((rflags & 0xd5) << 8 | (rflags >> 11 & 1));
}
/* Sets all of RFLAGS as given (callers have merged what the instruction may not change) and recomputes the mode when needed. (interp.c) */
void flags_set(struct icpu *c, uint64_t rflags);

/* ---- registers ---- */

static inline uint64_t reg64(const struct icpu *c, unsigned offset)
{
    return *(const uint64_t *)((const char *)c->v.cpu.gpr + offset);
}
static inline void reg64_set(struct icpu *c, unsigned offset, uint64_t value)
{
    *(uint64_t *)((char *)c->v.cpu.gpr + offset) = value;
}
static inline uint64_t reg_read(const struct icpu *c, unsigned offset, unsigned size)
{
    const char *p = (const char *)c->v.cpu.gpr + offset;
    switch (size) {
    case 1:
        return *(const uint8_t *)p;
    case 2:
        return *(const uint16_t *)p;
    case 4:
        return *(const uint32_t *)p;
    default:
        return *(const uint64_t *)p;
    }
}
static inline void reg_write(struct icpu *c, unsigned offset, unsigned size, uint64_t value) /* 32-bit writes clear the upper half */
{
    char *p = (char *)c->v.cpu.gpr + offset;
    switch (size) {
    case 1:
        *(uint8_t *)p = (uint8_t)value;
        break;
    case 2:
        *(uint16_t *)p = (uint16_t)value;
        break;
    case 4:
        *(uint64_t *)p = (uint32_t)value;
        break;
    default:
        *(uint64_t *)p = value;
    }
}

/* ---- guest memory by linear address (fast paths here, the rest in tlb.c) ---- */

uint64_t mem_read_slow(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size);
void mem_write_slow(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size, uint64_t value);
void *mem_rmw_slow(struct icpu *c, gva_t gva, unsigned size, bool locked);
/* Any length up to 256 bytes, page crossing, MMIO. Write checks every page before it changes a byte. */
void mem_read_bytes(struct icpu *c, enum tlb_view view, gva_t gva, void *data, unsigned length);
void mem_write_bytes(struct icpu *c, enum tlb_view view, gva_t gva, const void *data, unsigned length);
/* Raises the fault that a write of [gva, +length) would raise; changes nothing but accessed and dirty bits. */
void mem_probe_write(struct icpu *c, enum tlb_view view, gva_t gva, unsigned length);
/* The same for reading one byte, which nobody gets: no device is asked. */
void mem_probe_read(struct icpu *c, enum tlb_view view, gva_t gva);
/* #AC when alignment is checked now: for what mem_read_bytes and mem_write_bytes move, which check none (SDM vol. 3, table 6-7). */
void mem_check_alignment(struct icpu *c, enum tlb_view view, gva_t gva, unsigned alignment);
/* Host address for direct access to all of [gva, +size) (filling the TLB, raising faults); NULL when it is MMIO, ROM for writes, or crosses a page. */
void *mem_host(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size, bool write);
/* MMIO goes out through these (they save SIMD state, count and trace). */
uint64_t mmio_read(struct icpu *c, gpa_t gpa, unsigned size);
void mmio_write(struct icpu *c, gpa_t gpa, unsigned size, uint64_t value);

/* Host address of the code byte at linear address gva, filling the TLB for execution and raising faults; NULL when it is MMIO. */
const uint8_t *mem_fetch_host(struct icpu *c, gva_t gva);

/* TLB maintenance. */
int tlb_create(struct icpu *c);
void tlb_destroy(struct icpu *c);
void tlb_flush_all(struct icpu *c);                    /* everything, global pages too */
void tlb_flush_page(struct icpu *c, gva_t gva);        /* INVLPG: all address spaces */
void tlb_flush_non_global(struct icpu *c);             /* of the current PCID */
void tlb_load_cr3(struct icpu *c, uint64_t value, bool keep); /* after v.cpu.cr3 was written; keep: bit 63 was set */
void tlb_invpcid(struct icpu *c, unsigned type, uint16_t pcid, gva_t gva);

static inline struct tlb_entry *tlb_slot(const struct icpu *c, gva_t gva)
{
    return &c->tlb[gva >> 12 & (TLB_ENTRIES - 1)];
}
static inline uint64_t tlb_tag(const struct icpu *c, gva_t gva, unsigned size)
{
    /* The last byte's page: an access that crosses a page never matches its first page's entry. */
    return ((gva + size - 1) & ~PAGE_MASK_BITS) | c->tlb_generation;
}

#define MEM_READ_FAST(bits)                                                                        \
    static inline uint##bits##_t mem_read##bits(struct icpu *c, gva_t gva)                         \
    {                                                                                              \
        struct tlb_entry *e = tlb_slot(c, gva);                                                    \
        if (likely(e->read == tlb_tag(c, gva, bits / 8)))                                          \
            return *(volatile uint##bits##_t *)(gva + e->addend);                                  \
        return (uint##bits##_t)mem_read_slow(c, c->view, gva, bits / 8);                           \
    }
MEM_READ_FAST(8)
MEM_READ_FAST(16)
MEM_READ_FAST(32)
MEM_READ_FAST(64)

#define MEM_WRITE_FAST(bits)                                                                       \
    static inline void mem_write##bits(struct icpu *c, gva_t gva, uint##bits##_t value)            \
    {                                                                                              \
        struct tlb_entry *e = tlb_slot(c, gva);                                                    \
        if (likely(e->write == tlb_tag(c, gva, bits / 8))) {                                       \
            uintptr_t host = gva + e->addend;                                                      \
            *(volatile uint##bits##_t *)host = value;                                              \
            if (unlikely(host - c->block_guard < c->block_guard_span))                             \
                interp_self_modified(c);                                                           \
        } else {                                                                                   \
            mem_write_slow(c, c->view, gva, bits / 8, value);                                      \
        }                                                                                          \
    }
MEM_WRITE_FAST(8)
MEM_WRITE_FAST(16)
MEM_WRITE_FAST(32)
MEM_WRITE_FAST(64)

static inline uint64_t mem_read(struct icpu *c, gva_t gva, unsigned size)
{
    switch (size) {
    case 1:
        return mem_read8(c, gva);
    case 2:
        return mem_read16(c, gva);
    case 4:
        return mem_read32(c, gva);
    default:
        return mem_read64(c, gva);
    }
}
static inline void mem_write(struct icpu *c, gva_t gva, unsigned size, uint64_t value)
{
    switch (size) {
    case 1:
        mem_write8(c, gva, (uint8_t)value);
        break;
    case 2:
        mem_write16(c, gva, (uint16_t)value);
        break;
    case 4:
        mem_write32(c, gva, (uint32_t)value);
        break;
    default:
        mem_write64(c, gva, value);
    }
}

/*
 * Read-modify-write: returns a host address to operate on, with write access checked, so that nothing can fault afterwards. Usually guest memory itself (LOCK is then the
 * host's own); for MMIO and page-crossing operands c->bounce, filled, which mem_rmw_end writes back. Always call mem_rmw_end afterwards.
 */
static inline void *mem_rmw(struct icpu *c, gva_t gva, unsigned size, bool locked)
{
    struct tlb_entry *e = tlb_slot(c, gva);
    if (likely(e->write == tlb_tag(c, gva, size)))
        return (void *)(gva + e->addend);
    return mem_rmw_slow(c, gva, size, locked);
}
void mem_rmw_end_slow(struct icpu *c);
static inline void mem_rmw_end(struct icpu *c, void *host)
{
    if (unlikely(host == c->bounce))
        mem_rmw_end_slow(c);
    else if (unlikely((uintptr_t)host - c->block_guard < c->block_guard_span))
        interp_self_modified(c);
}

/* ---- effective addresses ---- */

static inline uint64_t ea_offset(const struct icpu *c, const struct insn *i)
{
    return (reg64(c, i->base) + (reg64(c, i->index) << i->scale) + (int64_t)i->displacement) & i->address_mask;
}
/* Legacy modes: checks limit and type, raises #GP or #SS, returns the 32-bit linear address. (segment.c) */
gva_t segment_linear(struct icpu *c, unsigned segment, uint64_t offset, unsigned size, bool write);
/* Linear address of segment:offset in any mode. */
static inline gva_t linear_address(struct icpu *c, bool legacy, unsigned segment, uint64_t offset, unsigned size, bool write)
{
    if (unlikely(legacy))
        return segment_linear(c, segment, offset, size, write);
    return c->segment_base[segment] + offset;
}
/* Linear address of the insn's memory operand. Non-canonical addresses need no check here: they never match the TLB and the slow path
 * raises #GP, or #SS when the insn's segment is SS. */
static inline gva_t ea_linear(struct icpu *c, const struct insn *i, unsigned size, bool write)
{
    return linear_address(c, i->flags & INSN_LEGACY, i->segment, ea_offset(c, i), size, write);
}

/* Stack: current SS, stack_mask applied. push checks the write before it changes RSP. size 2, 4, 8. (op_integer.c) */
void stack_push(struct icpu *c, unsigned size, uint64_t value);
uint64_t stack_pop(struct icpu *c, unsigned size);
/* The same without changing RSP: reads at RSP + offset. */
uint64_t stack_peek(struct icpu *c, unsigned size, unsigned offset_bytes);

/* ---- native execution (native.c) ---- */

int native_create(struct icpu *c, size_t arena_bytes); /* for code, and as much for records */
void native_destroy(struct icpu *c);
void native_flush(struct icpu *c); /* with block_cache_flush: stubs die with their blocks */
/* Moves live x87/SSE/AVX state to v.cpu.xsave. Cheap when not live. */
void simd_save_slow(struct icpu *c);
static inline void simd_save(struct icpu *c)
{
    if (unlikely(c->simd_live))
        simd_save_slow(c);
}
/* Makes it live (loads from v.cpu.xsave). */
void simd_load(struct icpu *c);
/* Process-wide fault handlers for stubs; chain to what was there. Called once by interp's create. */
int native_install_handlers(void);
/* Asked first about each SIGSEGV, SIGBUS, SIGFPE and SIGILL; true: it is dealt with. One function for the process. */
typedef bool native_fault_fn(int sig, siginfo_t *info, void *context);
void native_fault_first(native_fault_fn *fn);
/* The processor executes what was written through another address than it is executed at. */
void native_serialize(void);
/* Around code whose x87 instructions set pointers of their own: they read as zero meanwhile, and as before it afterwards unless its last x87 instruction is told. FDP is zero then. */
void native_pointers_hide(struct icpu *c);
void native_pointers_show(struct icpu *c);
void native_pointers_set(struct icpu *c, uint64_t fip, unsigned fop);
/* From now on always, for comparisons with engines that lose them now and then. */
void native_pointers_forget(struct icpu *c);

/* ---- segmentation and control transfers (segment.c) ---- */

/* MOV/POP/LDS... to a segment register other than CS, with all checks; real, virtual-8086, protected and 64-bit modes. */
void segment_load(struct icpu *c, unsigned segment, uint16_t selector);
void far_jump(struct icpu *c, uint16_t selector, uint64_t offset, unsigned op_size);
void far_call(struct icpu *c, uint16_t selector, uint64_t offset, unsigned op_size);
void far_return(struct icpu *c, unsigned op_size, unsigned release_bytes);
void interrupt_return(struct icpu *c, unsigned op_size);

/* IN, OUT, INS, OUTS: raises #GP(0) unless IOPL or the TSS's I/O permission bitmap allows the ports. (op_io.c) */
void io_check(struct icpu *c, uint16_t port, unsigned size);

/* Near transfer: checks canonical form or the CS limit, raises #GP(0) (rip unchanged) otherwise. op_size masks. */
static inline void branch_to(struct icpu *c, uint64_t target, unsigned op_size);
_Noreturn void branch_fault(struct icpu *c);
static inline bool gva_is_canonical(gva_t gva)
{
    return (uint64_t)(((int64_t)(gva << 16)) >> 16) == gva;
}
/* Where it goes, checked. */
static inline uint64_t near_target(struct icpu *c, uint64_t target, unsigned op_size)
{
    if (likely(c->code_bits == 64)) {
        if (unlikely(op_size == 2)) /* AMD's */
            return target & 0xffff;
        if (unlikely(!gva_is_canonical(target)))
            branch_fault(c);
        return target;
    }
    target &= op_size == 2 ? 0xffffu : 0xffffffffu;
    if (unlikely(target > c->v.cpu.seg[SEG_CS].limit))
        branch_fault(c);
    return target;
}
static inline void branch_to(struct icpu *c, uint64_t target, unsigned op_size)
{
    c->v.cpu.gpr[GPR_RIP] = near_target(c, target, op_size);
}

/* ---- tracing ---- */
#define TRACE(c, ...)                                                                              \
    do {                                                                                           \
        if (unlikely((c)->v.trace)) {                                                              \
            simd_save(c);                                                                          \
            fprintf((c)->v.trace, __VA_ARGS__);                                                    \
        }                                                                                          \
    } while (0)

#endif
