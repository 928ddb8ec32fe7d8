/*
 * What the interpreter's system side shares among its own files: descriptors, stack frames on a new stack, task switches, control registers.
 * Everything that reads or checks comes before everything that changes guest state, so that a fault in between leaves the old state.
 * Threading: as interp_priv.h.
 */
#ifndef DOPPEL_ENGINE_INTERP_SYSTEM_PRIV_H
#define DOPPEL_ENGINE_INTERP_SYSTEM_PRIV_H

#include "engine/interp/interp_priv.h"

/* Error code bits (SDM vol. 3, 6.13). */
#define ERROR_EXT 1u
#define ERROR_IDT 2u

#define SELECTOR_RPL(s) ((s) & 3u)
#define SELECTOR_TI 4u
#define SELECTOR_IS_NULL(s) (((s) & 0xFFFCu) == 0)
#define SELECTOR_ERROR(s) ((s) & 0xFFFCu)

/* Types of system descriptors (SDM vol. 3, table 3-2). */
enum system_type {
    SYSTEM_TSS16 = 1, SYSTEM_LDT = 2, SYSTEM_TSS16_BUSY = 3, SYSTEM_CALL_GATE16 = 4, SYSTEM_TASK_GATE = 5,
    SYSTEM_INTERRUPT_GATE16 = 6, SYSTEM_TRAP_GATE16 = 7, SYSTEM_TSS = 9, SYSTEM_TSS_BUSY = 11, SYSTEM_CALL_GATE = 12,
    SYSTEM_INTERRUPT_GATE = 14, SYSTEM_TRAP_GATE = 15,
};
#define SYSTEM_BUSY 2u

static inline bool is_protected(const struct icpu *c) /* protected mode, virtual-8086 mode excluded */
{
    return (c->v.cpu.cr0 & CR0_PE) && !(c->v.cpu.rflags & RFLAGS_VM);
}
static inline bool is_long(const struct icpu *c)
{
    return c->v.cpu.efer & EFER_LMA;
}
static inline unsigned flags_iopl(const struct icpu *c)
{
    return (unsigned)(c->v.cpu.rflags >> 12 & 3);
}

static inline void require_cpl0(struct icpu *c)
{
    if (c->cpl != 0)
        raise_gp0(c);
}

/* ---- descriptors (segment.c) ---- */

struct descriptor {
    uint64_t base;
    uint32_t limit;
    uint16_t attributes; /* as in struct segment */
    uint16_t selector;
    gva_t address;      /* where it was read from */
    uint64_t low, high; /* raw; high only after descriptor_extend */
};

/* Adds an offset to a table's base the way the current mode does. */
gva_t table_address(const struct icpu *c, uint64_t base, uint64_t offset);
/* Accesses to descriptor tables and TSSs: supervisor rights whatever the CPL. */
static inline uint64_t table_read(struct icpu *c, gva_t address, unsigned size)
{
    return mem_read_slow(c, VIEW_SUPERVISOR, address, size);
}

/* False when the selector's entry lies outside its table. */
bool descriptor_read(struct icpu *c, uint16_t selector, struct descriptor *d);
/* Long mode: reads the second half of a 16-byte system descriptor. False: beyond the limit or malformed. */
bool descriptor_extend(struct icpu *c, struct descriptor *d);
void descriptor_set_accessed(struct icpu *c, struct descriptor *d);
void descriptor_set_busy(struct icpu *c, struct descriptor *d, bool busy);
struct segment descriptor_segment(const struct descriptor *d, uint16_t selector);

static inline bool descriptor_is_segment(const struct descriptor *d)
{
    return d->attributes & SEG_ATTR_S;
}
static inline bool descriptor_is_code(const struct descriptor *d)
{
    return (d->attributes & (SEG_ATTR_S | SEG_ATTR_CODE)) == (SEG_ATTR_S | SEG_ATTR_CODE);
}
static inline bool descriptor_is_conforming(const struct descriptor *d)
{
    return d->attributes & SEG_ATTR_DC;
}
static inline bool descriptor_is_writable_data(const struct descriptor *d)
{
    return (d->attributes & (SEG_ATTR_S | SEG_ATTR_CODE | SEG_ATTR_RW)) == (SEG_ATTR_S | SEG_ATTR_RW);
}
static inline bool descriptor_is_readable(const struct descriptor *d)
{
    return descriptor_is_segment(d) && (!(d->attributes & SEG_ATTR_CODE) || (d->attributes & SEG_ATTR_RW));
}
static inline bool descriptor_is_present(const struct descriptor *d)
{
    return d->attributes & SEG_ATTR_P;
}
static inline unsigned descriptor_dpl(const struct descriptor *d)
{
    return SEG_ATTR_DPL(d->attributes);
}
static inline unsigned descriptor_type(const struct descriptor *d)
{
    return SEG_ATTR_TYPE(d->attributes);
}
/* A code segment that runs as 64-bit code. */
static inline bool descriptor_is_64bit(const struct icpu *c, const struct descriptor *d)
{
    return is_long(c) && (d->attributes & SEG_ATTR_L);
}

/* A call, interrupt or trap gate's fields. Descriptors in long mode must have been extended. */
static inline uint16_t gate_selector(const struct descriptor *d)
{
    return (uint16_t)(d->low >> 16);
}
static inline uint64_t gate_offset(const struct icpu *c, const struct descriptor *d)
{
    uint64_t offset = (d->low & 0xFFFF) | (d->low >> 48) << 16;
    if (is_long(c))
        return offset | d->high << 32;
    return descriptor_type(d) & 8 ? offset : offset & 0xFFFF;
}

/* Real and virtual-8086 mode form of a segment register. */
struct segment segment_real(const struct icpu *c, unsigned segment, uint16_t selector);
/* Null selector; `dpl` matters for SS, whose DPL is the CPL. */
struct segment segment_null(uint16_t selector, unsigned dpl);
/* True when [offset, +size) is inside the limit. */
bool segment_contains(const struct segment *s, uint64_t offset, uint64_t size);
/* Raises #GP(error) when `rip` is no address in the code segment d. */
void code_offset_check(struct icpu *c, const struct descriptor *d, uint64_t rip, uint32_t error);
/* After a change to an outer level: data segments that the new CPL may not use become null. */
void segments_drop_inner(struct icpu *c, unsigned new_cpl);

/* ---- stacks (segment.c) ---- */

#define FRAME_VALUES 40

/* Values to be pushed on a stack that may not be the current one. */
struct frame {
    struct segment ss;
    uint64_t sp, mask;
    enum tlb_view view;
    bool flat; /* 64-bit: no segment */
    unsigned size, count;
    uint64_t values[FRAME_VALUES];
};

void frame_init(struct icpu *c, struct frame *f, const struct segment *ss, uint64_t sp, bool flat, unsigned cpl, unsigned size);
static inline void frame_push(struct frame *f, uint64_t value)
{
    f->values[f->count++] = value;
}
/* Writes it all or raises a fault (#SS with ss_error, #PF). f->sp becomes the new stack pointer. */
void frame_write(struct icpu *c, struct frame *f, uint32_t ss_error);

/* SS:SP for an inner level from a 16- or 32-bit TSS, checked; #TS or #SS otherwise. */
void tss_inner_stack(struct icpu *c, unsigned cpl, uint32_t ext, struct segment *ss, uint64_t *sp);
/* A stack pointer from a 64-bit TSS, at `offset`. */
uint64_t tss_stack_pointer64(struct icpu *c, unsigned offset, uint32_t ext);
#define TSS64_RSP(cpl) (4 + 8 * (cpl))
#define TSS64_IST(n) (28 + 8 * (n))

/* ---- task switches (task_switch.c) ---- */

enum task_switch_cause { TASK_JUMP, TASK_CALL, TASK_EVENT, TASK_RETURN };

/* Checks the TSS that `selector` names (#GP, #NP, #TS with `ext`) and switches. */
void task_switch(struct icpu *c, uint16_t selector, enum task_switch_cause cause, uint32_t ext);
/* Through a task gate's selector field, with the checks that apply to it. */
void task_gate(struct icpu *c, const struct descriptor *gate, enum task_switch_cause cause, uint32_t ext);
/* #DB with these DR6 bits, after the instruction: rip is not put back. */
_Noreturn void raise_debug_trap(struct icpu *c, uint64_t dr6);
/* #DB as a fault. */
_Noreturn void raise_debug_fault(struct icpu *c, uint64_t dr6);

/* ---- control registers (op_control_register.c) ---- */

/* Raises #GP(0) when PAE's page-directory-pointer entries at cr3 have reserved bits; otherwise fills pdpte. */
void pdpte_read(struct icpu *c, uint64_t cr3, uint64_t pdpte[4]);
void control_write_cr3(struct icpu *c, uint64_t value);

/* Feature bit of CPUID as this guest sees it. */
enum cpuid_register { CPUID_EAX, CPUID_EBX, CPUID_ECX, CPUID_EDX };
bool guest_has_feature(struct icpu *c, uint32_t leaf, enum cpuid_register which, unsigned bit);

/* ---- handlers; op_system.c selects them ---- */

/* op_segment.c */
insn_fn op_mov_from_segment, op_mov_to_segment, op_push_segment, op_pop_segment, op_load_far_pointer;
insn_fn op_lar, op_lsl, op_verr, op_verw, op_arpl, op_sldt, op_str, op_lldt, op_ltr;
insn_fn op_sgdt, op_sidt, op_lgdt, op_lidt;
/* op_far.c */
insn_fn op_far_jump_direct, op_far_jump_memory, op_far_call_direct, op_far_call_memory, op_far_return, op_iret;
/* op_control_register.c */
insn_fn op_mov_from_cr, op_mov_to_cr, op_mov_from_dr, op_mov_to_dr, op_smsw, op_lmsw, op_clts;
insn_fn op_xgetbv, op_xsetbv, op_invlpg, op_invpcid;
/* op_msr.c */
insn_fn op_rdmsr, op_wrmsr;
/* op_syscall.c */
insn_fn op_syscall, op_sysret, op_sysenter, op_sysexit, op_swapgs;
insn_fn op_rdfsbase, op_rdgsbase, op_wrfsbase, op_wrgsbase;
/* op_io.c; insn.extra is the operand size and IO_DX */
#define IO_DX 0x80u
insn_fn op_in, op_out;

#endif
