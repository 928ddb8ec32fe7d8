/*
 * What the files of integer instructions (op_*.c except op_system.c and op_xsave.c) share.
 *
 * Handlers are made by macros for each operation, operand size and operand form, and looked up in tables [form][size] when an instruction is decoded, so
 * that a handler itself decides nothing. Arithmetic is done by the host's instruction of the same name; FLAGS_SAVE then stores its flags.
 * Threading: handlers run on the vCPU's thread; select functions are pure apart from *i.
 */
#ifndef DOPPEL_ENGINE_INTERP_OP_PRIV_H
#define DOPPEL_ENGINE_INTERP_OP_PRIV_H

#include "engine/interp/interp_priv.h"

/* Forms of instructions with two operands. FORM_NONE: other than general registers, memory and immediates. */
enum operand_form {
    FORM_RR, FORM_RI, FORM_RM, FORM_MR, FORM_MI, FORM_LOCK_MR, FORM_LOCK_MI, FORM_COUNT,
    FORM_NONE = FORM_COUNT
};
/* Forms of instructions with one. */
enum unary_form { UNARY_R, UNARY_M, UNARY_LOCK_M, UNARY_COUNT, UNARY_NONE = UNARY_COUNT };

enum operand_form operand_form(const struct decode *d);
enum unary_form unary_form(const struct decode *d);
/* Index of an operand size in handler tables: 0..3 for 1, 2, 4, 8 bytes. */
static inline unsigned size_index(unsigned size)
{
    return (unsigned)__builtin_ctz(size) & 3;
}

/* Calls X(bits, AT&T suffix, ...) for each operand size. */
#define SIZES(X, ...) X(8, "b", __VA_ARGS__) X(16, "w", __VA_ARGS__) X(32, "l", __VA_ARGS__) X(64, "q", __VA_ARGS__)
#define SIZES_WORD(X, ...) X(16, "w", __VA_ARGS__) X(32, "l", __VA_ARGS__) X(64, "q", __VA_ARGS__)
/* Table rows. */
#define ROW(name) { name##8, name##16, name##32, name##64 }
#define ROW_WORD(name) { NULL, name##16, name##32, name##64 }

/* Ends an asm statement that has EAX as output: AH and AL become what c->oszapc holds. */
#define FLAGS_SAVE "\n\tlahf\n\tseto %%al"
/* Begin one that has oszapc in EAX: all arithmetic flags, or CF alone (the others change). */
#define FLAGS_RESTORE "addb $0x7f, %%al\n\tsahf\n\t"
#define CARRY_RESTORE "bt $8, %%eax\n\t"

#define OSZAPC_CF 0x100u
#define OSZAPC_PF 0x400u
#define OSZAPC_AF 0x1000u
#define OSZAPC_ZF 0x4000u
#define OSZAPC_SF 0x8000u
#define OSZAPC_OF 0x1u

static inline void carry_set(struct icpu *c, unsigned carry)
{
    c->oszapc = (c->oszapc & ~OSZAPC_CF) | carry << 8;
}

/* SDM vol. 1, appendix B: condition codes. Folds to a few instructions for a constant cc. */
static inline __attribute__((always_inline)) bool condition_holds(uint32_t oszapc, unsigned cc)
{
    uint32_t less = (oszapc >> 15 ^ oszapc) & 1;
    bool holds;
    switch (cc >> 1) {
    case 0:
        holds = oszapc & OSZAPC_OF;
        break;
    case 1:
        holds = oszapc & OSZAPC_CF;
        break;
    case 2:
        holds = oszapc & OSZAPC_ZF;
        break;
    case 3:
        holds = oszapc & (OSZAPC_CF | OSZAPC_ZF);
        break;
    case 4:
        holds = oszapc & OSZAPC_SF;
        break;
    case 5:
        holds = oszapc & OSZAPC_PF;
        break;
    case 6:
        holds = less;
        break;
    default:
        holds = less | (oszapc >> 14 & 1);
        break;
    }
    return holds ^ (cc & 1);
}

#define CONDITIONS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)

/*
 * Flat handlers: the common case of 64-bit code with 64-bit addresses and a TLB hit, with nothing that needs a stack frame. In every other case they
 * tail-call the general handler, which starts afresh and is GENERAL so that it does not become part of them. `flat_usable` says when they may be selected.
 */
#define GENERAL static __attribute__((noinline))
static inline bool flat_usable(const struct decode *d)
{
    return d->code_bits == 64 && d->zi.address_width == 64;
}
static inline bool has_index(const struct insn *i)
{
    return i->index != REG_OFFSET(GPR_ZERO);
}
static inline gva_t flat_linear(const struct icpu *c, const struct insn *i)
{
    return reg64(c, i->base) + (reg64(c, i->index) << i->scale) + (uint64_t)(int64_t)i->displacement + c->segment_base[i->segment];
}
static inline gva_t flat_linear_unindexed(const struct icpu *c, const struct insn *i)
{
    return reg64(c, i->base) + (uint64_t)(int64_t)i->displacement + c->segment_base[i->segment];
}
/* Declares `p`, the host address of `bits` at `linear`, or leaves for the general handler. `access` is read or write. */
#define FLAT_HOST(p, bits, linear, access, general)                                                \
    gva_t gva_ = linear;                                                                           \
    const struct tlb_entry *e_ = tlb_slot(c, gva_);                                                \
    if (unlikely(e_->access != tlb_tag(c, gva_, bits / 8))) {                                      \
        general(c, i);                                                                             \
        return;                                                                                    \
    }                                                                                              \
    volatile uint##bits##_t *p = (volatile uint##bits##_t *)(gva_ + e_->addend)
/* After a store through `p`, as the last thing a handler does. */
static inline void flat_stored(struct icpu *c, const volatile void *p)
{
    if (unlikely((uintptr_t)p - c->block_guard < c->block_guard_span))
        interp_self_modified(c);
}

/* RSP, RCX, RSI, RDI written with an address or stack size: 16-bit ones keep the rest, 32-bit ones clear the upper half. */
static inline void reg_write_masked(struct icpu *c, unsigned gpr, uint64_t mask, uint64_t value)
{
    if (unlikely(mask == 0xffff))
        *(uint16_t *)&c->v.cpu.gpr[gpr] = (uint16_t)value;
    else
        c->v.cpu.gpr[gpr] = value & mask;
}

/* One select function a file; each returns NULL, leaving *i alone, for what it does not have. */
typedef insn_fn *select_fn(const struct decode *d, struct insn *i);
select_fn alu_select;    /* op_alu.c */
select_fn shift_select;  /* op_shift.c */
select_fn muldiv_select; /* op_muldiv.c */
select_fn bit_select;    /* op_bit.c */
select_fn move_select;   /* op_move.c */
select_fn atomic_select; /* op_atomic.c */
select_fn stack_select;  /* op_stack.c */
select_fn decimal_select; /* op_decimal.c */

#endif
