/*
 * The binary translator, inside.
 *
 * Guest code runs as translations of itself on the guest's own register values: guest registers live in the host registers of the same name, guest arithmetic flags and
 * DF in the host's flags, guest x87/SSE/AVX state in the host's. What does not translate is executed one instruction at a time by the interpreter, whose
 * `struct icpu` a translated vCPU contains, so both work on one state.
 *
 * Translated code, from the inside:
 * - GS base is the base T of a *view*: two tables and, below them, an alias of this vCPU's structure (`struct bt_vcpu`), so that gs:[BT_CTX(field)] is a field.
 *     [T - 2 GiB, T - 1 GiB)     exec table: 2^27 entries E, index = bits 63, 62 and 36..12 of the gva (PEXT with exec_mask). Its first page (512 entries) is never readable:
 *                                a kicked lookup (exec_mask 0) faults on index 0 whatever 64-bit value R11 has; no entry could be poison for all of them
 *     [T + BT_SPLIT, + 12 KiB)   a page of zeros, a page of ones, one never mapped
 *     [T + BT_CHECK, + 8 KiB)    one readable page of zeros, one never mapped
 *     [T - BT_CTX_BYTES, T)      struct bt_vcpu
 *     [T, T + 4 GiB)             data table: 2^29 entries V, index = bits 12..40 of the gva (RORX 12 and a 32-bit address)
 * - Data: host address = gva + V. Code: DT slot = E + gva * 4, which holds the TC offset of the block's dynamic entry, or 0.
 *   A V or E under a wrong tag, and poison, address memory that is never mapped (layout.c), so the access faults.
 * - R10 and R11 are scratch at block boundaries: the guest's own are in cpu.gpr[]. Inside a block any two registers may take
 *   that role (struct bt_site.spilled).
 * - A dynamic transfer (return, indirect or cross-page jump) has the target's *code address* in R11; a dynamic entry derives page_va from it. That is the linear address, in 32-bit code
 *   plus BT_CODE_BIAS, because 32-bit systems do run code in the first 2 MiB, which the exec table leaves out. Direct jumps
 *   inside a page go to chain entries and are patched in place, or to places in their own block where jumps join, whose state is that of chain entries. No direct jump ever leaves its page, so dropping a page is zeroing its DT.
 * - An access that could cross a page first reads one byte at gs:[BT_CHECK + (gva & 0xfff) + size - 1]: the page at BT_CHECK is readable, the next one is not, so it
 *   faults exactly when the access crosses. No flags, no branch. (EFLAGS.AC is not used: a site that does misalign could not be run with it at all.)
 * - 32-bit code runs in 64-bit mode like all of TC. The upper halves of RAX to RDI are zero there (interp_mode_changed clears them, and nothing that is translated sets them), so a
 *   register is a linear address; sums are cut to 32 bits before they are looked up. R8 to R15 are scratch throughout, and the guest's own are put back by who entered.
 * - C code runs with DF clear.
 * - Every host instruction that can fault belongs to a site that says how to get the precise guest state back.
 *
 * Threading: a bt_vcpu belongs to its thread, but `exec_mask`, `poll` and `poll_sti` are also written by bt_kick from any thread. bt_engine.lock guards the
 * cache (pages, blocks, TC, DT); DT slots and jump displacements are read by running translations and so are written with aligned 32-bit stores.
 */
#ifndef DOPPEL_ENGINE_BT_PRIV_H
#define DOPPEL_ENGINE_BT_PRIV_H

#include <sched.h>

#include "engine/interp/interp_core.h"

/* ---- host address space (layout.c) ---- */

#define BT_ALIAS_BITS 39u /* host addresses that agree in the bits below with one of the engine's are reserved in all of user space */
#define BT_ALIAS_BYTES (1ull << BT_ALIAS_BITS)
#define BT_EXEC_BITS 37u  /* E is found by gva bits below this, and by the two that gva * 4 loses; 37 + 2 = 39 */
#define BT_DT_POOL_BYTES (1ull << 28)
#define BT_DT_BYTES (PAGE_SIZE_BYTES * 4)
#define BT_DT_PAGES (BT_DT_POOL_BYTES / BT_DT_BYTES)
#define BT_GUARD_BYTES (1ull << 16)

/*
 * The reserved range lies at the same offset in each of the 256 aliases of user space; in one of them it holds, guard pages between: the poison area (never
 * mapped), window W (RAM, read-write, code pages read-only), window R (RAM, read-only), the DT pool.
 */
struct bt_layout {
    uint64_t offset;       /* of the reserved range, below BT_ALIAS_BYTES */
    uint64_t length_bytes;
    uint8_t *reserved_low; /* address of the alias that is used */
    uintptr_t poison;      /* a page in the poison area, guards of BT_GUARD_BYTES on both sides */
    uint8_t *window_w, *window_r;
    uint8_t *dt_pool;
    uint8_t *witness;      /* one readable page, nothing mapped for twice the DT pool's size before and after it: see struct bt_link */
    uint64_t ram_bytes;    /* of each window: physmap_space_bytes */
    uint8_t *tc_exec;      /* below 2 GiB; read and execute */
    uint8_t *tc_write;     /* the same memory, read and write */
    uint64_t tc_bytes;
    struct physmap *memory; /* knows of the windows; NULL before they are mapped */
};

/* Does this host grant what layout_create needs (for a small guest)? 0 or -errno and what to do about it. Leaves nothing behind. */
int layout_probe(struct error *err) __attribute__((warn_unused_result));
int layout_create(struct bt_layout *layout, struct physmap *memory, uint64_t tc_bytes, struct error *err) __attribute__((warn_unused_result));
void layout_destroy(struct bt_layout *layout);

/* ---- views: the tables of one address space at one privilege (tables.c) ---- */

#define BT_CTX_BYTES 65536u
#define BT_CHECK (-(int32_t)BT_CTX_BYTES - 8192) /* from T: one readable page, then one that is never mapped */
#define BT_SPLIT (BT_CHECK - 3 * 4096)           /* from T: a page of bytes 0, a page of bytes 1, one that is never mapped */
#define BT_DATA_TABLE_BYTES (4ull << 30)
#define BT_EXEC_TABLE_OFFSET (-(2ll << 30))
#define BT_EXEC_TABLE_BYTES (1ull << 30)
#define BT_CHUNK_BYTES 16384u /* tables are committed in pieces of this size */
#define BT_EXEC_LOW_ENTRIES (1ul << (BT_EXEC_BITS - 12))
#define BT_EXEC_MASK (3ul << 62 | (BT_EXEC_LOW_ENTRIES - 1) << 12)
#define BT_USER_VIEWS 8u

struct bt_vcpu;
struct bt_view; /* opaque outside tables.c but for its base */

enum bt_fill {
    BT_FILL_DONE, /* the entry is there: the access succeeds when repeated */
    BT_FILL_SLOW, /* guest fault, MMIO, ROM write, page crossing, code page written, non-canonical: the interpreter does this instruction */
};

/* ---- the cache: code pages, blocks, sites, TC memory (cache.c) ---- */

/* Everything that a translation depends on besides the code's bytes. Compared as a whole. */
struct bt_mode {
    uint8_t code_bits; /* 32 or 64 */
    uint8_t user;      /* CPL 3 */
    uint8_t simd_blocked; /* icpu.simd_blocked */
    uint8_t cr4;       /* BT_MODE_* */
    uint8_t flat;      /* 32-bit: BT_MODE_SEGMENTS of bt_flat_segments; 64-bit: 0 */
};

/* Not FS and GS, which systems load on their way in and out: segment_guard is for these. */
#define BT_MODE_SEGMENTS (1u << SEG_ES | 1u << SEG_CS | 1u << SEG_SS | 1u << SEG_DS)
#define BT_MODE_TSD 1u      /* RDTSC is not for this CPL */
#define BT_MODE_FSGSBASE 2u /* RDFSBASE and the like exist */

/* Bit n: segment n can be read and written anywhere (CS: only fetched from), and its base is 0; that of FS and GS may be any. */
static inline uint8_t bt_flat_segments(const struct cpu_state *cpu)
{
    unsigned flat = 0;
    for (unsigned n = 0; n < SEG_COUNT; n++) {
        const struct segment *s = &cpu->seg[n];
        bool based = n < SEG_FS && s->base, writable = (s->attributes & (SEG_ATTR_CODE | SEG_ATTR_DC | SEG_ATTR_RW)) == SEG_ATTR_RW;
        if (!s->unusable && s->limit == 0xffffffff && !based && (n == SEG_CS || writable))
            flat |= 1u << n;
    }
    return (uint8_t)flat;
}

/* In user mode, or at CPL 0, with the control registers as they are. */
static inline struct bt_mode bt_mode_of(const struct icpu *c, bool user, unsigned code_bits)
{
    uint64_t cr4 = c->v.cpu.cr4;
    return (struct bt_mode){
        .code_bits = (uint8_t)code_bits,
        .user = user,
        .flat = code_bits == 32 ? bt_flat_segments(&c->v.cpu) & BT_MODE_SEGMENTS : 0,
        .simd_blocked = (uint8_t)c->simd_blocked,
        .cr4 = (uint8_t)((user && cr4 & CR4_TSD ? BT_MODE_TSD : 0) | (cr4 & CR4_FSGSBASE ? BT_MODE_FSGSBASE : 0)),
    };
}

/* Linear addresses of code as translated code has them, and back. */
#define BT_CODE_BIAS (1ull << 30)
static inline uint64_t bt_code_address(const struct bt_mode *mode, gva_t rip)
{
    return mode->code_bits == 64 ? rip : rip + BT_CODE_BIAS;
}
static inline gva_t bt_code_linear(const struct bt_mode *mode, uint64_t address)
{
    return mode->code_bits == 64 ? address : (uint32_t)(address - BT_CODE_BIAS);
}

struct bt_block;

/* One page of guest code in one mode. Lives until the cache is flushed. */
struct bt_page {
    uint64_t offset; /* of the page in guest RAM (physmap_offset) */
    gpa_t gpa;
    gva_t gva;       /* where it was when a block was last looked for, for people */
    struct bt_mode mode;
    uint32_t *dt;              /* 4096 slots: TC offset of the dynamic entry of the block that starts at this byte, 0: none */
    struct bt_block *blocks;   /* newest first, valid ones only */
    uint32_t links;            /* index + 1 of the first link into this page */
    const struct bt_page *crosses; /* the page that the last instruction of this one goes on in, when it has been translated; NULL: none */
    struct bt_page *next;      /* in its hash bucket */
    struct bt_page *same_page; /* other modes of the same physical page */
    uint8_t dt_pieces;         /* bit n: host page n of the DT has been written to */
};

/* One translated block. Ordered by tc_start in the engine's array. Lives until the cache is flushed, dropped or not. */
struct bt_block {
    struct bt_page *page;
    struct bt_block *next; /* in page->blocks */
    uint32_t tc_start;     /* TC offset of the dynamic entry */
    uint32_t tc_chain;     /* of the chain entry */
    uint32_t tc_end;
    uint32_t cold_start, cold_end; /* TC offsets of its code that runs once or seldom; away from the rest, so that this stays dense */
    uint32_t site_first;   /* index in the engine's site array */
    uint16_t site_count;
    uint16_t hot_sites; /* the first of them; the rest belongs to the cold part */
    uint16_t start;        /* byte offset in the page */
    uint16_t length;       /* guest bytes */
    uint16_t insns;
    bool valid;            /* false: dropped; vCPUs may still be inside */
    bool careful;          /* looks up each access of its own: for the rest of a block whose groups would cross a page. Has no DT slot */
};

/*
 * A linked direct jump to another page. It reads the DT slot of its target like any dynamic transfer, but with `witness - expected slot` added to the address: that is the witness page when the
 * target's linear address still leads to the page that the jump was linked to, and faults otherwise. The branch itself is direct.
 */
struct bt_link {
    uint32_t at;   /* TC offset of the branch's 32-bit displacement; the one of the slot's read lies 5 bytes before it */
    uint32_t stub; /* where the branch goes while not linked */
    uint32_t next; /* index + 1 of the next link into the same page */
};
/* A jump that waits for its branch: see cache_link_far. */
struct bt_link_wait {
    uint32_t at, witness; /* what its comparison has become */
    uint64_t turn;        /* when */
    uint32_t visits;      /* since */
};
#define BT_LINK_FAR 0x80000000u     /* in link_site: to another page */
#define BT_LINK_CAREFUL 0x40000000u /* to a careful block in the same page */

enum bt_site_kind {
    SITE_INSN, /* guest rip = page_va + page_offset: the instruction has had no effect yet */
    SITE_NEXT_PAGE, /* like SITE_INSN: checks that the page in which the instruction ends is the one that it was translated with; R10 and R11 are scratch */
    SITE_STRING, /* a repeated string instruction under way, `v_memory` bytes an element: RDI, and RSI when `v_stack` is 1, are host addresses, and what the guest's will be at its end
                  * is in scratch[]. RCX is what is left to do. The site before it is the instruction's own */
    SITE_JUMP, /* all before is done; guest rip is in R11 and R10 is scratch (dynamic transfer). When R11 is not canonical, the branch itself raises #GP: then the state
                * before it is rip = page_va + page_offset with rsp_adjust undone (BT_EXIT_interp executes the branch again) */
};

/* Host code from tc_offset up to the next site's. */
struct bt_site {
    uint16_t tc_offset; /* from the block's tc_start, or its cold_start; also where the instruction can be started again with the same `spilled` */
    uint16_t page_offset;
    uint16_t spilled;   /* host registers, bit per number, whose guest values are in cpu.gpr[] */
    int8_t rsp_adjust;  /* SITE_JUMP: what the branch has added to RSP already */
    uint8_t kind;
    /* Registers that hold V, looked up by an earlier instruction, for this one's memory operand and stack access; BT_NO_REGISTER: none. Whoever changes the table
     * entry changes them before the instruction starts again. */
    uint8_t v_memory, v_stack;
};

#define BT_NO_REGISTER 0xffu

/* What one engine's cache may grow to; a full cache is flushed. Together below BT_CACHE_BYTES_MAX, whatever the guest does (cache.c checks). */
#define BT_TC_BYTES (55u << 20)
#define BT_CODE_PAGES_MAX 8192u /* the DT pool's page 0 stays zero for ever */
#define BT_DT_BYTES_MAX (42u << 20) /* that take host memory: a DT does for the parts that have blocks */
#define BT_MARKS (1u << 15)
#define BT_LANDMARK_BYTES 2048u
#define BT_BLOCKS_MAX 160000u
#define BT_SITES_MAX 1200000u
#define BT_LINKS_MAX 200000u
#define BT_CACHE_BYTES_MAX (121u << 20)
#define BT_BLOCK_TC_MAX 32768u
#define BT_BLOCK_SITES_MAX 4096u

/* ---- exits ---- */

/* Reasons for leaving translated code, BT_EXIT_x; names and help in exits.def. */
enum bt_exit {
#define EXIT(name, help) BT_EXIT_##name,
#include "engine/bt/exits.def"
#undef EXIT
    BT_EXIT_COUNT
};

/* Why the interpreter was called: left translated code, or was not there. */
enum bt_tally {
    BT_TALLY_SLOW = BT_EXIT_COUNT, /* debug traps, interrupt shadows: one instruction at a time */
    BT_TALLY_THRASH,               /* the page keeps changing */
    BT_TALLY_MODE,                 /* bt_usable says no */
    BT_TALLY_COLD,                 /* it has not run often */
    BT_TALLY_COUNT
};
#define BT_MNEMONICS (ZYDIS_MNEMONIC_MAX_VALUE + 1)

/* ---- engine and vCPU ---- */

enum bt_transition { BT_NO_TRANSITION, BT_TO_SUPERVISOR, BT_TO_USER };

struct bt_stubs { /* TC offsets; stubs.c. They survive flushes. */
    uint32_t miss;   /* 0: R11 is a linear address without a block */
    uint32_t enter;  /* C: unsigned enter(struct bt_vcpu *b), see bt_enter */
    uint32_t lookup; /* dynamic transfer to R11 */
    uint32_t leave;  /* R11: guest rip, R10D: enum bt_exit; registers in canonical state */
    uint32_t leave_in_page; /* the same with R11: offset from page_va */
    uint32_t link;     /* R11: offset of the target from page_va, R10D: link_site */
    uint32_t link_far; /* R11: guest rip, R10D: link_site without BT_LINK_FAR */
    uint32_t syscall, sysret;           /* by translated code: R11 offset of the instruction in the page, R10 (SYSCALL) its length */
    uint32_t syscall_slow, sysret_slow; /* the same by leaving */
    uint32_t leave_saved; /* from a signal handler: all guest state already saved in the context, EAX: enum bt_exit, RSP: host_rsp */
    uint32_t end;    /* first byte after the stubs */
};

/* What tests vary between what guests need and the smallest that works, and a place where they can meddle. bt_debug_set. */
#define BT_BLOCK_INSNS_MAX 64u
#define BT_GROUP_SPAN_MAX 256u /* larger groups cross pages too often */
struct bt_vcpu;
struct bt_debug {
    uint16_t block_insns; /* in one block: 1..BT_BLOCK_INSNS_MAX */
    uint16_t group_span;  /* bytes that accesses with one lookup may span, up to BT_GROUP_SPAN_MAX; 0: no groups */
    uint32_t tc_bytes;    /* translations are flushed when they fill more */
    void (*turn)(struct bt_vcpu *b, void *opaque); /* on each way into translated code, on the vCPU's thread, without locks; NULL: none */
    void *opaque;
    bool kick;            /* turn sets it: as if a kick came right after entering, once; translated code is left at its first poll or jump through the tables */
};

struct bt_engine {
    struct engine interp; /* first */
    struct bt_debug debug;
    struct bt_layout layout;
    struct bt_stubs stubs;

    pthread_mutex_t lock;   /* guards everything below; recursive: walks of guest page tables mark memory, which may call cache_memory_changed */
    uint32_t tc_used, cold_used; /* ends of the hot and of the cold code; the cold begins at cache_cold_base */
    uint64_t epoch;         /* counts flushes; read without the lock by vCPUs on their way in */
    uint64_t rewrites;      /* counts blocks made into jumps to others: whoever enters afterwards serializes first */
    struct bt_block *blocks;
    uint32_t block_count;
    uint32_t *landmarks; /* per BT_LANDMARK_BYTES of hot code, then of cold: number of the first block that begins there or later */
    uint32_t hot_landmarks, cold_landmarks; /* how many there are */
    struct bt_site *sites;
    uint32_t site_count;
    struct bt_link *links;
    uint32_t link_count;
    _Atomic uint64_t link_turn; /* of the last entry made in link_waits */
    struct bt_link_wait *link_waits; /* hash table, what collides begins again */
    struct bt_forms *forms;
    struct bt_page **pages; /* hash table */
    struct bt_page *page_store; /* page n has DT page n + 1 */
    uint32_t page_count, protected_pages;
    uint32_t dt_pieces;     /* host pages of DTs in use */
    uint64_t *marks;        /* hash set; 0: free */
    uint32_t mark_count;
    uint8_t *code_flags;    /* one byte per RAM page: BT_CODE_* */
    uint64_t *code_tells;   /* one per RAM page: what direct_space.c knows about its instructions; 0: nothing */

    /* Stop the world, for flushes: see cache_exclusive_begin. */
    pthread_cond_t world;
    atomic_uint world_wanted; /* changed with the lock held */

    /* Statistics of translation, shown by --stats. */
    uint64_t translated_insns, translated_blocks, flushes, translate_ns;
    uint64_t invalidations; /* drops of pages; read without the lock by vCPUs on their way in */

    bool avx512, fsgsbase;

    enum engine_direct direct;
    bool patient;
    bool direct_told; /* why some of it is translated all the same */
    cpu_set_t pinned; /* processors that direct execution has bound a vCPU to */
    struct perf_map *perf_map;   /* NULL: off */
    struct dump_code *dump_code;
};

#define BT_CODE_PRESENT 1u   /* window W's page is read-only: translations exist */
#define BT_CODE_CROSSED 2u   /* an instruction of another page, translated there, ends in this one */
#define BT_CODE_MARKED 4u    /* something is known about an instruction in it: enum bt_mark */
#define BT_CODE_DIRECT 8u    /* some shadow of direct execution may have it writable */
#define BT_CODE_THRASH 0xf0u /* counts drops of the page, saturating; decays at flushes */

#define BT_POLL_OK 0
#define BT_FILL_FAULT (1u << 31)

struct bt_vcpu {
    struct icpu c; /* first */

    /* Read and written by translated code through GS. */
    uint64_t page_va;      /* code address of the running block's page */
    uint64_t x87_page;     /* the same when an x87 instruction ran last that sets pointers */
    uint64_t x87_last;     /* its BT_X87_*; 0: none since translated code was entered */
    _Atomic uint64_t exec_mask;     /* BT_EXEC_MASK; 0 when kicked */
    _Atomic uintptr_t poll;         /* address that loop back-edges read 4 bytes from: &poll_word of this view-independent mapping, or layout.poison when kicked */
    _Atomic uintptr_t poll_sti;     /* the same after instructions that set IF; layout.poison also while an interrupt waits for IF */
    uint64_t poll_word;
    uintptr_t poll_quiet;  /* its address */
    uint64_t host_rsp;
    uint64_t host_flags;   /* guest arithmetic flags and DF, plus the host's fixed bits (IF and bit 1): loaded on entry, stored on exit */
    uint64_t enter_target; /* host address that bt_enter jumps to */
    uint64_t link_site;    /* BT_EXIT_link: TC offset of the 32-bit displacement to patch */
    uint8_t *table_of[VIEW_COUNT]; /* T of the views of the current address space, by enum tlb_view */
    uint64_t ac;           /* the guest's RFLAGS.AC, while cpu.rflags has it clear; says with the CPL which view is in GS */
    uint64_t transition;   /* enum bt_transition: SYSCALL or SYSRET done by translated code that bt_settle has to finish */
    uint64_t syscall_ss; /* the selector that SYSCALL gives SS */
    uint64_t syscall_stub, sysret_stub; /* host addresses that do these, or leave */
    uintptr_t segment_guard[2]; /* FS, GS: 32-bit code that is about to use one reads 4 bytes from: poll_quiet, or layout.poison when the segment is not flat. Changes outside only */
#define STRING_RDI_END 2
#define STRING_RSI_END 3
    uint64_t scratch[8];   /* spills inside one instruction's translation */
    uint64_t mask_low12;   /* constants for PEXT/PDEP: 0xfff */
    uint64_t mask_bit12;   /* 0x1000 */
    uint64_t mask_page;    /* ~0xfff */
    uint64_t mask_count;   /* ~0x1fff: counts without these bits do not overflow when multiplied by 8 */
    uint64_t mask_arith;   /* OSZAPC and DF */

    /* Not seen by translated code. */
    struct bt_engine *engine;
    struct bt_tables *tables; /* tables.c */
    struct direct *direct;    /* direct.c; NULL: none */
    struct bt_cold *cold;     /* bt.c; NULL: everything is translated at once */
    struct bt_view *view;     /* the one in GS */
    uint8_t *table;           /* its base T */
    struct bt_mode mode;
    uint64_t epoch;
    atomic_bool inside;       /* in translated code, or about to read the cache without the lock */
    _Atomic uint64_t link_turn; /* bt_engine.link_turn after it went inside */
    void *signal_stack;
    uint32_t fill_error;      /* tables_fill said BT_FILL_SLOW: the page fault's error code and BT_FILL_FAULT, 0: another reason */
    uint64_t fault_address;   /* BT_EXIT_page_fault: CR2; the error code is in fill_error */
    uint64_t retry_rip, retry_count; /* fault.c: the same site again and again goes to the interpreter */
    uint64_t fill_next;       /* linear address whose guest page fault was delivered last, to be filled on the way back; 0: none */
    uint32_t fault_tc;        /* TC offset where a signal left translated code from; 0: no signal did */
    bool fault_crossing;      /* it was the page-crossing check */
    bool fault_opaque;        /* what is accessed could not be told: such as by a segment with a limit */
    uint64_t serialized;      /* epoch + rewrites of the code that this processor surely sees */
    unsigned interp_blocks;   /* left for the interpreter before translated code is tried again */
    uint64_t thrash_visits;   /* to pages that are not translated because they keep changing */
    uint64_t (*interpreted)[BT_MNEMONICS]; /* what the interpreter was called for, by enum bt_tally */
    uint8_t site_counts[256]; /* bt.c: how often sites, hashed by TC offset, needed the interpreter for MMIO or crossing */
};

_Static_assert(sizeof(struct bt_vcpu) <= BT_CTX_BYTES, "the context does not fit below the tables");

/* bt_vcpu.x87_last: an instruction's place in its page, and its opcode as FOP reports it. */
#define BT_X87_OFFSET 0xfffu
#define BT_X87_FOP_SHIFT 12
#define BT_X87_FOP 0x7ffu
#define BT_X87_RAN (1u << 23)

/* Displacement of a field from GS base. */
#define BT_CTX(field) ((int32_t)offsetof(struct bt_vcpu, field) - (int32_t)BT_CTX_BYTES)
#define BT_CTX_GPR(n) (BT_CTX(c.v.cpu.gpr) + 8 * (int32_t)(n))

static inline struct bt_engine *bt_engine_of(const struct bt_vcpu *b)
{
    return b->engine;
}

/* ---- layout helpers ---- */

static inline uint64_t bt_exec_index(gva_t gva) /* what PEXT makes of it */
{
    return gva >> 62 << (BT_EXEC_BITS - 12) | (gva >> 12 & (BT_EXEC_LOW_ENTRIES - 1));
}

static inline uintptr_t bt_poison_v(const struct bt_layout *l, gva_t gva) /* V of the slot that gva falls into, valid for every gva of the slot */
{
    return l->poison - (gva & (BT_ALIAS_BYTES - 1) & ~PAGE_MASK_BITS);
}

/* ---- tables.c ---- */

/* Allocates *b itself (in shared memory, zeroed, mapped below every view). */
int tables_create(struct bt_engine *e, struct bt_vcpu **b, struct error *err) __attribute__((warn_unused_result));
void tables_destroy(struct bt_vcpu *b); /* frees b */
/* Makes the view for the current mode, privilege and address space current: sets b->view, b->table and GS base. Called before every entry; cheap when nothing changed.
 * Also drops exec entries that belong to another bt_mode or an older epoch of the cache. */
void tables_select(struct bt_vcpu *b);
/* Are the views that were made current by that all for 64-bit code, so that translated code may change between them? */
bool tables_are_long(const struct bt_vcpu *b);
/* c.view has changed inside translated code, and GS with it: b->view and b->table follow. */
void tables_settle(struct bt_vcpu *b);
/* Walks the guest's page tables for an access at the current privilege and fills entries of the current view (and neighbours). Never raises. Page faults, MMIO: BT_FILL_SLOW.
 * [gva, +size) must not cross a page (else BT_FILL_SLOW). */
enum bt_fill tables_fill(struct bt_vcpu *b, gva_t gva, unsigned size, bool write);
/* Fills the entry of gva's page alone, for reading and for what else it allows, when it can be filled. */
void tables_fill_page(struct bt_vcpu *b, gva_t gva);
/* Walks for instruction fetch. 0 and the RAM offset of gva's page, or -EFAULT (fault, MMIO: the interpreter raises or does it). */
int tables_fetch(struct bt_vcpu *b, gva_t gva, uint64_t *ram_offset);
/* The same without accessed bits, for what may be fetched from but is not yet. */
int tables_look(const struct bt_vcpu *b, gva_t gva, uint64_t *ram_offset);
/* Sets the exec entry of gva's page in the current view, and those of neighbours that have translations. e->lock held, or inside. */
void tables_exec_set(struct bt_vcpu *b, gva_t gva, const uint32_t *dt);
/* Where the exec entry of gva's page in the current view leads: a page of that mode's DT; NULL: nowhere. e->lock held. */
const uint32_t *tables_exec_find(struct bt_vcpu *b, gva_t gva);
/* The same when there is a block at gva; true: there was. Inside. */
bool tables_exec_again(struct bt_vcpu *b, gva_t gva);
/* Called by the interpreter's TLB maintenance (struct tlb_listener). */
void tables_flush_all(struct icpu *c);
void tables_flush_non_global(struct icpu *c, unsigned asid);
void tables_load_cr3(struct icpu *c, bool keep);
void tables_flush_page(struct icpu *c, gva_t gva);
/* The pages of guest RAM at [ram_offset, +length): entries of this vCPU that allow writing must go. For dirty tracking. */
uint64_t tables_bytes(const struct bt_vcpu *b); /* memory committed */
/* V of gva as the current view has it now. */
uint64_t tables_v(const struct bt_vcpu *b, gva_t gva);
/* True when `address` lies in one of this vCPU's tables (uncommitted chunk); commits the chunk that translated code touched. False elsewhere and in the exec table's first
 * page: the lookup was kicked, or its target lies in the first 2 MiB of 512 GiB, whose pages are not cached (BT_EXIT_miss serves both). */
bool tables_commit(struct bt_vcpu *b, uintptr_t address, gva_t gva_hint, bool exec);

/* ---- cache.c ---- */

int cache_create(struct bt_engine *e, struct error *err) __attribute__((warn_unused_result)); /* after layout_create and stubs_create */
void cache_destroy(struct bt_engine *e); /* before layout_destroy; also after a failed cache_create */
/*
 * The way into translated code, without the lock: reset exec_mask and the polls; cache_enter; look the block up, or check that e->epoch and
 * e->invalidations are still those of the lookup; bt_enter; cache_leave. A kick is for whoever entered after a reset that came before it, so the reset may not come later. After cache_leave nothing known of
 * the cache (link_site, blocks) holds unless the epoch, compared with the lock held, is the same. A vCPU that is inside may take the lock, but waits for nothing else.
 * Both keep live vector state live. b->engine is set before the interpreter's icpu_create makes *b known to others.
 */
void cache_enter(struct bt_vcpu *b); /* waits while somebody has stopped the world */
void cache_leave(struct bt_vcpu *b);
/* All below: e->lock held. */
struct bt_page *cache_page(struct bt_engine *e, uint64_t ram_offset, gpa_t gpa, const struct bt_mode *mode); /* found or made, write-protected; NULL: full, flush */
struct bt_page *cache_page_of(const struct bt_engine *e, const uint32_t *dt);
const uint32_t *cache_dt(const struct bt_engine *e, uint64_t ram_offset, const struct bt_mode *mode); /* of the page's translations in that mode; NULL: none. Or inside */
/* What has been learnt about the instruction at page->offset + start, by physical page: it outlives the translation, and flushes. */
enum bt_mark {
    BT_MARK_CROSSES, /* crosses pages now and then: its check branches instead of faulting */
    BT_MARK_CALLS,   /* keeps reaching MMIO: goes to the interpreter without trying */
};
void cache_mark(struct bt_engine *e, const struct bt_page *page, unsigned start, enum bt_mark mark);
bool cache_marked(const struct bt_engine *e, const struct bt_page *page, unsigned start, enum bt_mark mark);
struct bt_block *cache_block_careful(struct bt_page *page, unsigned start);
struct bt_block *cache_block(const struct bt_engine *e, const struct bt_page *page, unsigned start);  /* valid block starting there, or NULL */
/* Room for one block: BT_BLOCK_TC_MAX and BT_BLOCK_SITES_MAX. False: the caller flushes. */
bool cache_room(const struct bt_engine *e);
/* Publishes a block whose code was written to tc_write + e->tc_used: appends block and sites, advances tc_used, sets the DT slot, counts it. One that was there is dropped. */
struct bt_block *cache_publish(struct bt_engine *e, const struct bt_block *block, const struct bt_site *sites);
/* Drops a single block (its DT slot is cleared; direct jumps to it inside the page are redirected to its replacement by retranslation). */
void cache_block_drop(struct bt_engine *e, struct bt_block *block);
/* Drops all translations of the RAM page and makes window W writable there again. */
void cache_page_drop(struct bt_engine *e, uint64_t ram_offset);
/* An instruction of `page` that ends in `next` is being translated: when `next` is dropped, so is `page`. */
void cache_page_cross(struct bt_engine *e, struct bt_page *page, const struct bt_page *next);
static inline uint32_t cache_cold_base(const struct bt_engine *e)
{
    return (uint32_t)(e->layout.tc_bytes / 5 * 4);
}
/*
 * Links the jump to another page whose displacement is at TC offset `at` to the block that starts there, if there is one. The other form, for a jump that may have been executed:
 * now, or on a later call for it, when nobody can be between the two instructions that change.
 */
void cache_link_far_early(struct bt_engine *e, uint32_t at, struct bt_page *page, unsigned start);
void cache_link_far(struct bt_engine *e, uint32_t at, struct bt_page *page, unsigned start);
void cache_flush(struct bt_engine *e); /* with the world stopped */
/* Without the lock: stops all other vCPUs outside translated code, takes the lock. `b` is the caller's, or NULL; it is outside, too, from then on. */
void cache_exclusive_begin(struct bt_engine *e, struct bt_vcpu *b);
void cache_exclusive_end(struct bt_engine *e, struct bt_vcpu *b); /* whoever locked once more before keeps the lock, without a gap for another's flush */
/* Block containing the TC address, or NULL. Lock not needed by the vCPU that runs in it. */
struct bt_block *cache_find(struct bt_engine *e, uintptr_t tc_address);
const struct bt_site *cache_site(const struct bt_engine *e, const struct bt_block *block, uintptr_t tc_address);
/* PhysMap says that bytes changed under translations (device DMA, loaders). Any thread. */
void cache_memory_changed(void *engine, gpa_t gpa, uint64_t length_bytes);

/* ---- forms.c ---- */

/* What decoding has found out about forms of instructions: everything but the values of displacement and immediate. Lock: e->lock. */
struct bt_forms;
struct bt_forms *forms_create(void); /* NULL: no memory */
void forms_destroy(struct bt_forms *forms);

/* ---- translate.c ---- */

/* Translates the block at page->offset + start; always makes one. lock held, cache_room true. next_ram_offset: the page that follows in linear address space, ~0 when it is not
 * known: then an instruction that goes on there is the interpreter's. b: outside, and has the page at page->gva, so that jumps to blocks that exist are linked at once; NULL: when
 * they are taken. */
struct bt_block *translate_block(struct bt_engine *e, struct bt_page *page, unsigned start, uint64_t next_ram_offset, bool careful, struct bt_vcpu *b);
/* Memory operands of the instruction at `bytes`, evaluated with the guest's registers in b->c.v.cpu: for filling after a fault. Returns their number (0..4), or -1 when it
 * cannot tell (then the interpreter does the instruction). */
struct bt_access {
    gva_t gva;
    uint16_t size;
    bool write;
    bool stack; /* implied by the instruction: its V is v_stack */
    bool exact; /* when the accesses before it succeed and it may not be made, its page fault is what the instruction raises */
};
int translate_accesses(struct bt_vcpu *b, const uint8_t *bytes, unsigned available, struct bt_access access[4]);

/* ---- system_stubs.c ---- */

struct emitter;
void system_stubs_create(struct bt_engine *e, struct emitter *out);

/* ---- stubs.c ---- */

/* Writes the stubs at the start of TC. */
void stubs_create(struct bt_engine *e);
/* Runs translated code at b->enter_target with the guest's state loaded; returns why it was left. State in b->c.v.cpu.gpr (RIP too), b->host_flags and host vector registers. */
enum bt_exit bt_enter(struct bt_vcpu *b);

/* ---- fault.c ---- */

int fault_install(struct error *err) __attribute__((warn_unused_result)); /* signal handlers, once per process */
int fault_engine_add(struct bt_engine *e);  /* its TC and windows are now known to the handlers; -ENOSPC */
void fault_engine_remove(struct bt_engine *e);
int fault_vcpu_create(struct bt_vcpu *b);   /* a signal stack for the thread that will run it; 0 or -ENOMEM */
void fault_vcpu_destroy(struct bt_vcpu *b);
/* Signal stack and mask of the calling thread for running translated code; undone by fault_thread_leave. 0 or -errno. */
int fault_thread_enter(struct bt_vcpu *b);
void fault_thread_leave(struct bt_vcpu *b);

/* ---- report.c ---- */

int report_vcpu_create(struct bt_vcpu *b); /* 0 or -ENOMEM */
void report_vcpu_destroy(struct bt_vcpu *b);
void report_print(struct engine *engine, FILE *out); /* engine_ops.report */
void report_counters(struct engine *engine, counter_fn *counter, void *ctx); /* engine_ops.counters */
int report_options_set(struct engine *engine, const struct engine_options *options, struct error *err) __attribute__((warn_unused_result));
void report_options_clear(struct bt_engine *e);
void report_published(struct bt_engine *e, uint32_t first); /* blocks from this one on are new. e->lock held */

/* ---- perf_map.c ---- */

int perf_map_create(struct bt_engine *e, struct error *err) __attribute__((warn_unused_result));
void perf_map_destroy(struct bt_engine *e);
void perf_map_add(struct bt_engine *e, const struct bt_block *block); /* e->lock held */

/* ---- dump_code.c ---- */

int dump_code_create(struct bt_engine *e, const struct code_address *address, unsigned count, struct error *err) __attribute__((warn_unused_result));
void dump_code_destroy(struct bt_engine *e);
void dump_code_add(struct bt_engine *e, const struct bt_block *block); /* e->lock held */
void dump_code_print(struct bt_engine *e, FILE *out);                  /* e->lock held */

/* ---- bt.c ---- */

/* For tests, while no vCPU runs. What is translated already stays as it is. */
void bt_debug_set(struct engine *engine, const struct bt_debug *debug);
void bt_kick(struct vcpu *v);
/* Finishes changes of privilege and of AC that translated code has made without leaving: CS, SS, CPL and the view are what they should be. Also called in the signal handler. */
void bt_settle(struct bt_vcpu *b);
/* Are the conditions met under which translated code may run now (mode, flags, segments)? */
bool bt_usable(const struct bt_vcpu *b);

#endif
