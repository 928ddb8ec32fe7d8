/*
 * Handlers of instructions that run natively, in stubs made by native_stub.c.
 *
 * Order in each: control-bit checks (#UD, #NM), operand address and page faults, then the guest's vector state is made live, then the stub runs. A stub's memory
 * operand is guest memory itself when the access lies in one page of RAM, otherwise `bounce`, at the same offset modulo 64 so that
 * alignment faults are the processor's own.
 * Known deviation: a misaligned operand on an inaccessible page gives #PF where hardware gives #GP(0).
 * Threading: the vCPU's thread.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/interp/native_priv.h"

int native_create(struct icpu *c)
{
    struct native_arena *a = aligned_alloc(64, (sizeof(*a) + 63) & ~63ul);
    if (!a)
        return -ENOMEM;
    memset(a, 0, sizeof(*a));
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

/* The operand is not plain RAM within a page, or not in the TLB. */
static __attribute__((noinline)) void run_slow(struct icpu *c, const struct native_code *n, gva_t gva)
{
    bool write = n->flags & NATIVE_WRITE;
    void *host = mem_host(c, c->view, gva, n->size, write);
    if (host) {
        native_run(c, n, host);
        if (write)
            native_stored(c, host, n->size);
        return;
    }
    uint8_t *bounce = c->native->bounce + (gva & 63);
    if (write)
        mem_probe_write(c, c->view, gva, n->size);
    if (n->flags & NATIVE_READ)
        mem_read_bytes(c, c->view, gva, bounce, n->size);
    native_run(c, n, bounce);
    if (write)
        mem_write_bytes(c, c->view, gva, bounce, n->size);
}

static inline void run_memory(struct icpu *c, const struct native_code *n, gva_t gva)
{
    bool write = n->flags & NATIVE_WRITE;
    void *host = native_host_fast(c, gva, n->size, write);
    if (unlikely(!host)) {
        run_slow(c, n, gva);
        return;
    }
    native_run(c, n, host);
    if (write)
        native_stored(c, host, n->size);
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
    run_memory(c, n, ea_linear(c, i, n->size, n->flags & NATIVE_WRITE));
}

static inline void note_pointers(struct icpu *c, const struct insn *i, const struct native_code *n)
{
    struct native_arena *a = c->native;
    a->x87_ran = true;
    a->fop = n->fop & 0x7ff;
    a->fip = c->v.cpu.gpr[GPR_RIP] - i->length;
}

/* Pointers are noted before the stub runs, but a pending exception belongs to the instruction before: #MF keeps that one's. */
void native_x87_register(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    native_check(c, n);
    native_run(c, n, NULL);
    if (n->flags & NATIVE_POINTERS)
        note_pointers(c, i, n);
}

void native_x87_memory(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    native_check(c, n);
    uint64_t offset = ea_offset(c, i);
    run_memory(c, n, linear_address(c, i->flags & INSN_LEGACY, i->segment, offset, n->size, n->flags & NATIVE_WRITE));
    if (n->flags & NATIVE_POINTERS) {
        note_pointers(c, i, n);
        c->native->fdp = offset;
        c->native->fdp_known = true;
    }
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
