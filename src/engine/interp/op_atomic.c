/*
 * XCHG with memory, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.
 *
 * Done by the host's instruction on the address that mem_rmw has checked for writing, locked when the guest's is (XCHG with memory always; the
 * wide ones are, since it costs nothing to promise more). CMPXCHG goes in and out with 64-bit registers, so that what the 32-bit form does to upper halves is
 * what the host's does.
 * Threading: the vCPU's thread.
 */
#include "engine/interp/op_priv.h"

/* Zydis names the memory operand first, whichever way the guest's assembler wrote it. */
#define XCHG(bits, s, unused)                                                                      \
    static void xchg_mr##bits(struct icpu *c, const struct insn *i)                                \
    {                                                                                              \
        uint##bits##_t *p = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, true);           \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        __asm__ volatile("xchg" s " %0, %1" : "+q"(a), "+m"(*p) : : "memory");                     \
        reg_write(c, i->src, bits / 8, a);                                                         \
        mem_rmw_end(c, p);                                                                         \
    }
SIZES(XCHG, )

#define XADD_MEM(name, prefix, bits, s, locked)                                                    \
    static void name##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        uint##bits##_t *p = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, locked);         \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        uint32_t f;                                                                                \
        __asm__ volatile(prefix "xadd" s " %0, %1" FLAGS_SAVE : "+q"(a), "+m"(*p), "=a"(f) : : "cc", "memory"); \
        reg_write(c, i->src, bits / 8, a);                                                         \
        c->oszapc = f;                                                                             \
        mem_rmw_end(c, p);                                                                         \
    }
/* The destination is written last: it wins when both are the same register. */
#define XADD(bits, s, unused)                                                                      \
    static void xadd_rr##bits(struct icpu *c, const struct insn *i)                                \
    {                                                                                              \
        uint##bits##_t a = (uint##bits##_t)reg_read(c, i->dst, bits / 8), old = a;                 \
        uint##bits##_t b = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        uint32_t f;                                                                                \
        __asm__ volatile("add" s " %2, %0" FLAGS_SAVE : "+q"(a), "=a"(f) : "q"(b) : "cc");         \
        reg_write(c, i->src, bits / 8, old);                                                       \
        reg_write(c, i->dst, bits / 8, a);                                                         \
        c->oszapc = f;                                                                             \
    }                                                                                              \
    XADD_MEM(xadd_mr, "", bits, s, false)                                                          \
    XADD_MEM(xadd_lock_mr, "lock ", bits, s, true)
SIZES(XADD, )

#define CMPXCHG_DO(prefix, bits, s, constraint, modifier, target, source)                          \
    do {                                                                                           \
        uint64_t rax_ = c->v.cpu.gpr[GPR_RAX], f_ = rax_;                                          \
        __asm__ volatile(prefix "cmpxchg" s " %3, %" modifier "0\n\tmovq %%rax, %1" FLAGS_SAVE     \
                         : constraint(target), "=&r"(rax_), "+a"(f_)                               \
                         : "q"(source)                                                             \
                         : "cc", "memory");                                                        \
        c->oszapc = (uint32_t)f_;                                                                  \
        accumulator = rax_;                                                                        \
    } while (0)

#define CMPXCHG_MEM(name, prefix, bits, s, locked)                                                 \
    static void name##bits(struct icpu *c, const struct insn *i)                                   \
    {                                                                                              \
        uint##bits##_t *p = mem_rmw(c, ea_linear(c, i, bits / 8, true), bits / 8, locked);         \
        uint##bits##_t b = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        uint64_t accumulator;                                                                      \
        CMPXCHG_DO(prefix, bits, s, "+m", "", *p, b);                                              \
        c->v.cpu.gpr[GPR_RAX] = accumulator;                                                       \
        mem_rmw_end(c, p);                                                                         \
    }

/* With a register: offset 1 (AH ...) needs the narrow write back, the others keep what the host made of all 64 bits. */
#define CMPXCHG_REG(bits, s, modifier)                                                             \
    static void cmpxchg_rr##bits(struct icpu *c, const struct insn *i)                             \
    {                                                                                              \
        uint64_t a = bits == 8 ? reg_read(c, i->dst, 1) : reg64(c, i->dst);                        \
        uint##bits##_t b = (uint##bits##_t)reg_read(c, i->src, bits / 8);                          \
        uint64_t accumulator;                                                                      \
        CMPXCHG_DO("", bits, s, "+q", modifier, a, b);                                             \
        c->v.cpu.gpr[GPR_RAX] = accumulator;                                                       \
        if (bits == 8)                                                                             \
            reg_write(c, i->dst, 1, a);                                                            \
        else if (i->dst != REG_OFFSET(GPR_RAX) || c->oszapc & OSZAPC_ZF)                           \
            reg64_set(c, i->dst, a);                                                               \
    }
CMPXCHG_REG(8, "b", "b")
CMPXCHG_REG(16, "w", "w")
CMPXCHG_REG(32, "l", "k")
CMPXCHG_REG(64, "q", "q")

#define CMPXCHG(bits, s, unused)                                                                   \
    CMPXCHG_MEM(cmpxchg_mr, "", bits, s, false)                                                    \
    CMPXCHG_MEM(cmpxchg_lock_mr, "lock ", bits, s, true)
SIZES(CMPXCHG, )

static void zero_set(struct icpu *c, bool zero)
{
    c->oszapc = zero ? c->oszapc | OSZAPC_ZF : c->oszapc & ~OSZAPC_ZF;
}

static void cmpxchg8b(struct icpu *c, const struct insn *i)
{
    uint64_t *gpr = c->v.cpu.gpr;
    uint64_t *p = mem_rmw(c, ea_linear(c, i, 8, true), 8, true);
    uint64_t expected = gpr[GPR_RDX] << 32 | (uint32_t)gpr[GPR_RAX], old = expected;
    uint64_t desired = gpr[GPR_RCX] << 32 | (uint32_t)gpr[GPR_RBX];
    __asm__ volatile("lock cmpxchgq %2, %1" : "+a"(old), "+m"(*p) : "r"(desired) : "cc", "memory");
    zero_set(c, old == expected);
    if (old != expected) {
        gpr[GPR_RAX] = (uint32_t)old;
        gpr[GPR_RDX] = old >> 32;
    }
    mem_rmw_end(c, p);
}

static void cmpxchg16b(struct icpu *c, const struct insn *i)
{
    uint64_t *gpr = c->v.cpu.gpr;
    gva_t linear = ea_linear(c, i, 16, true);
    if (linear & 15)
        raise_gp0(c);
    unsigned __int128 *p = mem_rmw(c, linear, 16, true);
    bool equal;
    __asm__ volatile("lock cmpxchg16b %3"
                     : "=@ccz"(equal), "+a"(gpr[GPR_RAX]), "+d"(gpr[GPR_RDX]), "+m"(*p)
                     : "b"(gpr[GPR_RBX]), "c"(gpr[GPR_RCX])
                     : "memory");
    zero_set(c, equal);
    mem_rmw_end(c, p);
}

static insn_fn *const xchg_table[4] = ROW(xchg_mr);
static insn_fn *const xadd_table[FORM_COUNT][4] = {
    [FORM_RR] = ROW(xadd_rr), [FORM_MR] = ROW(xadd_mr), [FORM_LOCK_MR] = ROW(xadd_lock_mr),
};
static insn_fn *const cmpxchg_table[FORM_COUNT][4] = {
    [FORM_RR] = ROW(cmpxchg_rr), [FORM_MR] = ROW(cmpxchg_mr), [FORM_LOCK_MR] = ROW(cmpxchg_lock_mr),
};

static insn_fn *select_xchg(const struct insn *i, enum operand_form form)
{
    return form == FORM_MR || form == FORM_LOCK_MR ? xchg_table[size_index(i->op_size)] : NULL;
}

insn_fn *atomic_select(const struct decode *d, struct insn *i)
{
    enum operand_form form = operand_form(d);
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_XCHG:
        return select_xchg(i, form);
    case ZYDIS_MNEMONIC_XADD:
        return form == FORM_NONE ? NULL : xadd_table[form][size_index(i->op_size)];
    case ZYDIS_MNEMONIC_CMPXCHG:
        return form == FORM_NONE ? NULL : cmpxchg_table[form][size_index(i->op_size)];
    case ZYDIS_MNEMONIC_CMPXCHG8B:
        return cmpxchg8b;
    case ZYDIS_MNEMONIC_CMPXCHG16B:
        return cmpxchg16b;
    default:
        return NULL;
    }
}
