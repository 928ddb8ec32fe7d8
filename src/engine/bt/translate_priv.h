/*
 * What the translator's files share: analyze.c decodes guest instructions into `struct tinsn`; translate.c makes blocks of them, with registers.c (who is in which register), access.c
 * (memory operands), transfer.c (jumps and leaving) and system.c (flags and the like).
 *
 * Threading: pure functions of their arguments.
 */
#ifndef DOPPEL_ENGINE_BT_TRANSLATE_PRIV_H
#define DOPPEL_ENGINE_BT_TRANSLATE_PRIV_H

#include "engine/bt/emit.h"

#define TI_NONE BT_NO_REGISTER

enum tinsn_kind {
    TI_COPY,   /* runs as it is: no memory operand */
    TI_MEMORY, /* its memory operand is rewritten */
    TI_SKIP,   /* no effect: NOP, PREFETCH */
    /* Encodings that 64-bit mode does not have. */
    TI_COUNT,  /* INC or DEC (`condition` 1) of `reg` */
    TI_MOFFS,  /* MOV between rAX and memory at `disp` or `absolute` */
    TI_LEA_RIP,
    TI_PUSH_REG,
    TI_PUSH_IMM,
    TI_PUSH_MEM,
    TI_PUSH_SELECTOR, /* 32-bit code: the 16 bits at gs:[imm], zero-extended */
    TI_POP_REG,
    TI_LEAVE,
    TI_PUSHF,
    TI_CLI,
    TI_STI,
    TI_STRING,     /* `condition` is an enum string_op, `repeated` */
    TI_BIT_STRING, /* BT BTS BTR BTC of memory with the bit offset in `reg` */
    TI_RDTSC,
    TI_RDTSCP,
    TI_SWAPGS,
    TI_LOAD_SELECTOR, /* `reg` gets the 16 bits at gs:[imm] */
    TI_LOAD_SELECTOR16, /* its low half */
    TI_LOAD_STATE,    /* `reg` gets the 64 bits at gs:[imm] */
    TI_LOAD_STATE32,
    TI_SERIALIZE,
    TI_STAC,
    TI_CLAC,
    TI_WRITE_BASE,    /* WRFSBASE, WRGSBASE: `imm` is the segment's number */
    TI_JCC,     /* `target`, `condition` */
    TI_LOOP,    /* LOOPcc, JRCXZ: `target` */
    TI_JMP,     /* `target` */
    TI_JMP_REG, /* `reg` */
    TI_JMP_MEM,
    TI_CALL,
    TI_CALL_REG,
    TI_CALL_MEM,
    TI_RET, /* `imm`: bytes released */
    TI_SYSCALL,
    TI_SYSRET,
    TI_EXIT, /* left to somebody else: `exit` says why */
};

#define TI_ENDS(kind) ((kind) >= TI_JMP)

enum string_op { STRING_MOVS, STRING_STOS, STRING_LODS, STRING_SCAS, STRING_CMPS };

enum tinsn_segment { TI_FLAT, TI_FS, TI_GS };

struct tinsn {
    uint16_t offset; /* in the page */
    uint8_t length;
    uint8_t kind;
    uint16_t reads, writes; /* general registers, bit per number, partly written ones in both; address registers are read */
    /* The memory operand. */
    bool memory, rip_relative, address32, mem_read, mem_write;
    bool legacy;    /* of 32-bit code: addresses have 32 bits and the stack's slots 4 bytes, address32 is not set */
    bool high_byte; /* AH CH DH BH is an operand: no REX may be added */
    uint8_t base, index, scale, segment;
    bool plain_base;    /* it is at [base + disp], and nothing moves it */
    uint8_t implied;    /* base register of the stack_bytes that it accesses besides, at [implied + implied_disp]; TI_NONE */
    int8_t implied_disp;
    int32_t disp;
    uint64_t absolute; /* disp_bytes is 8: the address instead */
    uint16_t mem_size;
    bool repeated; /* has a REP prefix */
    bool traps;   /* may raise an exception although it has no memory operand */
    bool x87_pointers; /* sets FIP and FOP */
    bool aligned; /* raises #GP itself unless naturally aligned, so never crosses a page */
    /* Encoding, to rewrite. */
    uint8_t encoding; /* ZydisInstructionEncoding */
    uint8_t opcode_at; /* of VEX, EVEX: the escape byte; legacy: the first opcode byte */
    uint8_t modrm_at, tail_at; /* tail: what follows ModRM, SIB and displacement */
    uint8_t rex;
    uint8_t reg;
    uint8_t condition;
    uint8_t exit; /* enum bt_exit */
    int32_t imm;
    uint8_t adjusts; /* register to which it just adds the constant `adjust`: TI_NONE, none */
    int8_t adjust_sign; /* 1, -1: `adjust` is so many times the immediate; 0: the displacement, or fixed */
    int32_t adjust;
    uint8_t disp_at, disp_bytes, imm_at, imm_bytes; /* where the displacement and the first immediate are; bytes 0: none */
    int32_t target; /* offset from the start of the page; outside 0..4095: another page */
    uint32_t flags_read, flags_written; /* arithmetic, as in RFLAGS; written: surely and completely defined or left undefined by it */
};

/* forms.c. `bytes`: FORM_WINDOW that can be read, whether they belong to the instruction or not. */
#define FORM_WINDOW 16u
const struct tinsn *forms_find(struct bt_forms *forms, const struct bt_mode *mode, const uint8_t *bytes); /* NULL: not known; good until the next forms_store */
void forms_store(struct bt_forms *forms, const struct bt_mode *mode, const uint8_t *bytes, const struct tinsn *insn);

static inline unsigned stack_bytes(const struct tinsn *i)
{
    return i->legacy ? 4 : 8;
}

struct analyze_context {
    struct icpu *c; /* any vCPU of the machine: for what CPUID offers */
    struct bt_mode mode;
    struct bt_forms *forms; /* may be NULL */
};

/* Decodes the instruction at `bytes`; `offset` is its place in the page. Never fails: what is not known, and what needs more bytes than available, is TI_EXIT (length 0 then). */
void analyze_insn(const struct analyze_context *a, const uint8_t *bytes, unsigned available, unsigned offset, struct tinsn *out);

/* ---- a translation under way ---- */

#define INSN_BYTES_MAX 15u
#define INSNS_MAX BT_BLOCK_INSNS_MAX
#define DEFERRED_MAX (3 * INSNS_MAX + 2)
#define SITES_MAX (INSNS_MAX * 3)

#define CODE_PIECE 64u
#define GROUPS 2
#define MOVED_MAX (4 * (int32_t)BT_GROUP_SPAN_MAX)

#define BIT(r) ((uint16_t)(1u << (r)))

/* What is scratch at block boundaries. */
#define CANONICAL (BIT(GPR_R10) | BIT(GPR_R11))
#define CANONICAL_LEGACY 0xff00u

enum deferred_kind { DEFER_BRANCH, DEFER_EXIT, DEFER_FAR, DEFER_CAREFUL };

/* Code that is put after the block's straight line. */
struct deferred {
    uint8_t kind;
    uint16_t free, clean;
    uint8_t exit;
    uint16_t offset; /* of the instruction */
    int32_t target;
    uint8_t *patch;  /* the 32-bit displacement that leads here */
};

/* Accesses at [base + low, base + high) lie in one page, whose V is in `v` from the first of them on. In 32-bit code it is the host address of the first byte: the base may wrap around as it
 * is moved, and registers are plenty. */
struct group {
    uint8_t base, v; /* v TI_NONE: not in use */
    bool fresh;      /* not looked up yet */
    int32_t low, high;
};

struct translation {
    struct bt_engine *e;
    struct bt_vcpu *b;          /* who has the page at page->gva; NULL: nobody */
    struct bt_page *page;
    bool careful;               /* no groups */
    bool legacy;                /* 32-bit code */
    uint16_t canonical;         /* CANONICAL or CANONICAL_LEGACY */
    bool x87_page; /* bt_vcpu.x87_page is this one's on every way here */
    bool guarded[TI_GS + 1];    /* 32-bit code: the segment's guard has been looked at on every way here */
    uint64_t next_ram_offset;   /* of the page that follows in linear address space; ~0: unknown */
    const struct bt_page *next; /* the same, when the block's last instruction ends in it */
    uint8_t crossing[2 * INSN_BYTES_MAX]; /* that instruction's bytes */
    /* The block's bytes, read once: devices may write to the page meanwhile, and what is emitted must be what was analyzed. */
    unsigned code_offset, code_end; /* in the page */
    uint8_t code[INSNS_MAX * INSN_BYTES_MAX + 2 * CODE_PIECE];
    struct emitter out;
    uint8_t *start;
    const uint8_t *chain; /* the block's own chain entry */
    uint64_t joins;       /* bit per instruction: the block's jumps lead there, to join_at, in canonical state */
    const uint8_t *join_at[INSNS_MAX];
    uint8_t s[3];   /* scratch registers for the instruction being translated; the last one is another than s[1] in 32-bit code only, where s[1] may be part of a stack access */
    uint16_t free;  /* scratch registers: their guest values are in cpu.gpr[] */
    uint16_t clean; /* registers whose value in cpu.gpr[] is the current one */
    struct group group[GROUPS];
    unsigned count, at; /* instructions; the one being translated */
    unsigned sites, deferred_count;
    struct tinsn insn[INSNS_MAX];
    struct bt_site site[SITES_MAX];
    struct deferred deferred[DEFERRED_MAX];
};

struct address {
    unsigned base, index;
    int32_t disp;
};

_Static_assert(INSNS_MAX <= 64, "joins");

static inline bool is_join(const struct translation *t, unsigned n)
{
    return t->joins >> n & 1;
}

/* Number of the block's instruction at the offset in the page, or -1. */
int insn_number(const struct translation *t, int32_t offset);

/* registers.c */
uint16_t pinned(const struct translation *t);
unsigned register_scratch(struct translation *t, uint16_t named, uint16_t taken, bool low);
void registers_return(struct translation *t, uint16_t named);
void canonical_emit(struct translation *t, uint16_t free, uint16_t clean);
void canonicalize(struct translation *t);
void groups_forget(struct translation *t);
struct group *group_find(struct translation *t, unsigned base, int32_t disp, unsigned size);
void groups_provide(struct translation *t, const struct tinsn *i);
void groups_move(struct translation *t, const struct tinsn *i);

/* access.c */
struct address emit_access(struct translation *t, const struct tinsn *i, struct bt_site *site);
void emit_lookup(struct translation *t, unsigned to, unsigned from, unsigned size);
void emit_lea_in_mode(struct translation *t, unsigned to, unsigned base, unsigned index, unsigned scale, int32_t disp); /* cut to 32 bits in 32-bit code */
/* Leaves before the instruction, flags untouched, unless the register, which is scratch, is 0. */
void emit_leave_unless_zero(struct translation *t, const struct tinsn *i, unsigned reg, enum bt_exit why);
struct address emit_bit_string_access(struct translation *t, const struct tinsn *i);
const uint8_t *insn_bytes(const struct translation *t, const struct tinsn *i);
void emit_rewritten(struct translation *t, const struct tinsn *i, struct address a);
void emit_copy(struct translation *t, const struct tinsn *i);
void emit_moffs(struct translation *t, const struct tinsn *i, struct address a);
void emit_count(struct translation *t, const struct tinsn *i);
void emit_rsp_add(struct translation *t, int32_t by);
struct address emit_stack_access(struct translation *t, struct bt_site *site, unsigned base, int32_t disp);
void emit_at(struct translation *t, unsigned opcode, unsigned reg, struct address a);
struct address emit_push_access(struct translation *t, struct bt_site *site);
void emit_push_done(struct translation *t);
void emit_push_reg(struct translation *t, struct bt_site *site, unsigned reg);
void emit_push_rip(struct translation *t, struct bt_site *site, int32_t offset);
void emit_pop_to(struct translation *t, struct bt_site *site, unsigned to);

/* transfer.c */
/* Of the dynamic entry of a block that starts at the offset in its page. */
static inline unsigned entry_bytes(unsigned start)
{
    return 9 + (!start ? 0u : start <= 128 ? 4u : 7u);
}
struct bt_site *site_here(struct translation *t, const struct tinsn *i);
void site_string(struct translation *t, const struct tinsn *i, unsigned size, bool source);
void align_displacement(struct emitter *out, unsigned opcode_bytes);
/* Faults unless the next page's linear address leads to t->next. From canonical state, which it keeps. */
void emit_next_page_check(struct translation *t, const struct tinsn *i);
void emit_leave_in_page(struct translation *t, unsigned offset, enum bt_exit reason);
void defer(struct translation *t, enum deferred_kind kind, const struct tinsn *i, int32_t target, uint8_t *patch);
void deferred_emit(struct translation *t, const struct deferred *d);
void emit_poll(struct translation *t, int32_t field);
void emit_goto(struct translation *t, const struct tinsn *i, int32_t target);
void emit_transfer_indirect(struct translation *t, const struct tinsn *i, unsigned reg, int rsp_adjust);
void emit_target_load(struct translation *t, const struct tinsn *i, struct bt_site *site);
void emit_ret(struct translation *t, const struct tinsn *i, struct bt_site *site);
void emit_call(struct translation *t, const struct tinsn *i, struct bt_site *site);
void emit_jcc(struct translation *t, const struct tinsn *i);
void emit_loop(struct translation *t, const struct tinsn *i);
void emit_jmp(struct translation *t, const struct tinsn *i);

/* string.c */
void emit_string(struct translation *t, const struct tinsn *i);
unsigned string_accesses(const struct bt_vcpu *b, const struct tinsn *i, struct bt_access *access);

/* system.c */
void emit_system(struct translation *t, const struct tinsn *i, struct bt_site *site);
int64_t bit_string_distance(const struct bt_vcpu *b, const struct tinsn *i); /* from the operand's address to the unit that is accessed */

#endif
