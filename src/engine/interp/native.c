/*
 * Handlers of instructions that run natively, in stubs made by native_stub.c.
 *
 * Order in each: control-bit checks (#UD, #NM), operand address and page faults, then the guest's vector state is made live, then the stub runs. A stub's memory
 * operand is guest memory itself when the access lies in one page of RAM, otherwise `bounce`, at the same offset modulo 64 so that
 * alignment faults are the processor's own.
 * Threading: the vCPU's thread.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/interp/native_priv.h"

int native_create(struct icpu *c, size_t arena_bytes)
{
    struct native_arena *a = aligned_alloc(64, (sizeof(*a) + 63) & ~63ul);
    if (!a)
        return -ENOMEM;
    memset(a, 0, sizeof(*a));
    a->arena_bytes = arena_bytes;
    c->native = a;
    c->simd_live = false;
    int error = native_state_create(c);
    if (!error)
        error = native_code_create(a);
    if (error)
        native_destroy(c);
    return error;
}

void native_destroy(struct icpu *c)
{
    if (!c->native)
        return;
    simd_save(c);
    native_code_destroy(c->native);
    free(c->native);
    c->native = NULL;
}

void native_flush(struct icpu *c)
{
    simd_save(c);
    native_code_flush(c->native);
}

/* SDM vol. 3, tables 23-1 and 2-3 of vol. 2A (exception types): which of #UD and #NM, #UD first. */
void native_check_slow(struct icpu *c, unsigned blocked, unsigned flags)
{
    const struct cpu_state *cpu = &c->v.cpu;
    if (flags & NATIVE_NOT_REAL && (!(cpu->cr0 & CR0_PE) || cpu->rflags & RFLAGS_VM))
        raise_fault(c, VECTOR_UD);
    if (!(c->simd_blocked & blocked))
        return;
    if (blocked & SIMD_AVX) {
        uint64_t needed = XCR0_SSE | XCR0_AVX | (blocked & SIMD_AVX512 ? XCR0_AVX512 : 0);
        if (!(cpu->cr4 & CR4_OSXSAVE) || (cpu->xcr0 & needed) != needed)
            raise_fault(c, VECTOR_UD);
    } else if ((blocked & SIMD_SSE && !(cpu->cr4 & CR4_OSFXSR)) ||
               ((blocked & SIMD_SSE || flags & NATIVE_MMX) && cpu->cr0 & CR0_EM)) {
        raise_fault(c, VECTOR_UD);
    }
    if (cpu->cr0 & CR0_TS || (cpu->cr0 & CR0_EM && blocked & SIMD_X87))
        raise_fault(c, VECTOR_NM);
    raise_fault(c, VECTOR_UD);
}

static _Noreturn void raise_trap(struct icpu *c, unsigned vector)
{
    switch (vector) {
    case VECTOR_GP:
        raise_gp0(c);
    case VECTOR_AC:
        raise_error(c, VECTOR_AC, 0);
    case VECTOR_MF:
        simd_save(c); /* while the data pointer of the faulting instruction is the last one noted */
        raise_fault(c, VECTOR_MF);
    case VECTOR_XM:
        raise_fault(c, c->v.cpu.cr4 & CR4_OSXMMEXCPT ? VECTOR_XM : VECTOR_UD);
    default:
        raise_fault(c, VECTOR_UD);
    }
}

void native_run(struct icpu *c, const struct native_code *n, void *operand)
{
    if (n->blocked && unlikely(!c->simd_live))
        simd_load(c);
    unsigned trap = n->entry(c, operand);
    if (unlikely(trap))
        raise_trap(c, trap - 1);
}

/* Data pointer of an operand that has none. */
#define NO_OFFSET (~0ull)

/* After the stub, before the state can be saved: a pending exception belongs to the instruction before, whose pointers #MF keeps. */
static inline void note_pointers(struct icpu *c, const struct insn *i, const struct native_code *n, uint64_t offset)
{
    struct native_arena *a = c->native;
    a->x87_ran = true;
    if (!(n->flags & NATIVE_POINTERS))
        return;
    a->fop = n->fop & 0x7ff;
    a->fip = c->v.cpu.gpr[GPR_RIP] - i->length;
    if (offset != NO_OFFSET) {
        a->fdp = offset;
        a->fdp_known = true;
    }
}

static inline void run_at(struct icpu *c, const struct insn *i, const struct native_code *n, void *operand, bool x87, uint64_t offset)
{
    native_run(c, n, operand);
    if (x87)
        note_pointers(c, i, n, offset);
}

/* #AC for operands of up to 8 bytes, and x87's 10, whose alignment is 8; vector operands have their own rules. */
static void check_alignment(struct icpu *c, const struct native_code *n, gva_t gva)
{
    unsigned alignment = n->size == 10 ? 8 : n->size;
    if (alignment <= 8)
        mem_check_alignment(c, c->view, gva, alignment);
}

/* The operand is not plain RAM within a page, or not in the TLB. */
static __attribute__((noinline)) void run_slow(struct icpu *c, const struct insn *i, gva_t gva, bool x87, uint64_t offset)
{
    const struct native_code *n = i->native;
    bool write = n->flags & NATIVE_WRITE;
    if (gva & n->align_mask)
        raise_gp0(c); /* comes before page faults */
    if (unlikely(c->careful))
        check_alignment(c, n, gva);
    void *host = mem_host(c, c->view, gva, n->size, write);
    if (host) {
        run_at(c, i, n, host, x87, offset);
        if (write)
            native_stored(c, host, n->size);
        return;
    }
    uint8_t *bounce = c->native->bounce + (gva & 63);
    if (write)
        mem_probe_write(c, c->view, gva, n->size);
    if (n->flags & NATIVE_READ)
        mem_read_bytes(c, c->view, gva, bounce, n->size);
    run_at(c, i, n, bounce, x87, offset);
    if (write)
        mem_write_bytes(c, c->view, gva, bounce, n->size);
}

static inline void run_memory(struct icpu *c, const struct insn *i, gva_t gva, bool x87, uint64_t offset)
{
    const struct native_code *n = i->native;
    bool write = n->flags & NATIVE_WRITE;
    void *host = native_host_fast(c, gva, n->size, write);
    if (unlikely(!host)) {
        run_slow(c, i, gva, x87, offset);
        return;
    }
    run_at(c, i, n, host, x87, offset);
    if (write)
        native_stored(c, host, n->size);
}

#define X87_EXCEPTIONS 0x3fu
#define X87_PRECISION 0x20u

/* Exceptions that are unmasked; `raised`: and have occurred. */
static unsigned x87_unmasked(bool raised)
{
    uint16_t control, status;
    __asm__ volatile("fnstcw %0\n\tfnstsw %1" : "=m"(control), "=m"(status));
    return ~control & (raised ? status : ~0u) & X87_EXCEPTIONS;
}

void native_register(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    native_check(c, n);
    native_run(c, n, NULL);
}

void native_memory(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    native_check(c, n);
    if (n->flags & NATIVE_MMX) {
        simd_load(c);
        if (unlikely(x87_unmasked(true))) /* comes before the operand's faults */
            native_run(c, n, c->native->bounce);
    }
    run_memory(c, i, ea_linear(c, i, n->size, n->flags & NATIVE_WRITE), false, NO_OFFSET);
}

void native_x87_register(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    native_check(c, n);
    run_at(c, i, n, NULL, true, NO_OFFSET);
}

/*
 * Exceptions that keep an x87 instruction from its operand: one that is pending, and of a store its own unmasked ones but for #P (SDM vol. 1, 8.5 and 8.6). Seen by running it on
 * other memory. True: it has stored nothing, and is done.
 */
static bool x87_withheld(struct icpu *c, const struct insn *i, uint64_t offset)
{
    const struct native_code *n = i->native;
    bool waits = n->flags & NATIVE_POINTERS || i->mnemonic == ZYDIS_MNEMONIC_FLDCW;
    simd_load(c);
    if (likely(!waits || !x87_unmasked(false)) || !(n->flags & NATIVE_WRITE || x87_unmasked(true)))
        return false;
    native_state_snapshot(c);
    native_run(c, n, c->native->bounce); /* raises the pending one */
    if (!(x87_unmasked(true) & ~X87_PRECISION)) {
        native_state_reload(c);
        return false;
    }
    if (c->amd) { /* AMD's look at the operand all the same */
        native_state_reload(c);
        mem_probe_write(c, c->view, linear_address(c, i->flags & INSN_LEGACY, i->segment, offset, n->size, true), n->size);
        native_run(c, n, c->native->bounce);
    }
    note_pointers(c, i, n, offset);
    return true;
}

void native_x87_memory(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    native_check(c, n);
    uint64_t offset = ea_offset(c, i);
    bool write = n->flags & NATIVE_WRITE;
    if (x87_withheld(c, i, offset))
        return;
    gva_t gva = linear_address(c, i->flags & INSN_LEGACY, i->segment, offset, n->size, write);
    run_memory(c, i, gva, true, offset);
}

void native_hint(struct icpu *c, const struct insn *i)
{
}

void native_touch(struct icpu *c, const struct insn *i)
{
    mem_host(c, c->view, ea_linear(c, i, 1, false), 1, false);
}

/* Decoded when there was no room for its stub: makes room, which drops this block too, and decodes again. */
void native_arena_full(struct icpu *c, const struct insn *i)
{
    c->v.cpu.gpr[GPR_RIP] -= i->length;
    block_cache_flush(c);
    longjmp(c->escape, INTERP_RELOOP);
}
