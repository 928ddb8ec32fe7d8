/*
 * The run loop of the reference interpreter, and its face towards the machine (engine_ops).
 *
 * The loop runs whole blocks; between blocks it looks at `attention` (interrupts, requests to leave) and at `activity`. Everything that needs exact instruction
 * boundaries (TF, RF, breakpoints, interrupt shadows, step()) goes through interp_run_one. Faults come back by longjmp to interp_execute, which
 * puts rip back to the instruction's start and delivers; a fault while delivering comes back to the same place.
 * Threading: run and step on the vCPU's thread; invalidate from any thread while vCPUs are paused.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine/interp/interp_core.h"
#include "util/log.h"

#define DR7_ENABLES 0xffull
#define DR6_BS (1ull << 14)
#define GUARD_BEFORE 63u /* a store of up to 64 bytes that begins before the block may reach into it */

/* ---- derived state ---- */

static uint64_t paging_key(const struct cpu_state *cpu)
{
    uint64_t cr4 = cpu->cr4 & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PKE | CR4_LA57 | CR4_PCIDE);
    return (cpu->cr0 & (CR0_PG | CR0_WP)) | (cpu->efer & (EFER_NXE | EFER_LMA)) | cr4 << 32;
}

static bool data_breakpoints_armed(const struct cpu_state *cpu)
{
    uint64_t dr7 = cpu->dr[7];
    for (unsigned n = 0; n < 4; n++)
        if ((dr7 >> (2 * n) & 3) && (dr7 >> (16 + 4 * n) & 1))
            return true;
    return false;
}

static uint32_t simd_blocked(const struct cpu_state *cpu)
{
    bool real = !(cpu->cr0 & CR0_PE) || (cpu->rflags & RFLAGS_VM);
    uint32_t blocked = 0;
    if (cpu->cr0 & (CR0_EM | CR0_TS))
        blocked |= SIMD_X87 | SIMD_SSE;
    if (!(cpu->cr4 & CR4_OSFXSR))
        blocked |= SIMD_SSE;
    uint64_t avx = XCR0_SSE | XCR0_AVX;
    if (real || (cpu->cr0 & CR0_TS) || !(cpu->cr4 & CR4_OSXSAVE) || (cpu->xcr0 & avx) != avx)
        blocked |= SIMD_AVX | SIMD_AVX512;
    if ((cpu->xcr0 & XCR0_AVX512) != XCR0_AVX512)
        blocked |= SIMD_AVX512;
    return blocked;
}

void interp_mode_changed(struct icpu *c)
{
    struct cpu_state *cpu = &c->v.cpu;
    bool bits64 = cpu_in_64bit_mode(cpu);
    c->code_bits = bits64 ? 64 : cpu->seg[SEG_CS].attributes & SEG_ATTR_DB ? 32 : 16;
    for (unsigned n = GPR_RAX; n <= GPR_RDI && !bits64; n++)
        cpu->gpr[n] = (uint32_t)cpu->gpr[n]; /* undefined outside 64-bit mode (SDM vol. 1, 3.4.1.1); translated code wants zeros */
    c->stack_mask = bits64 ? ~0ull : cpu->seg[SEG_SS].attributes & SEG_ATTR_DB ? 0xffffffffu : 0xffffu;
    c->cpl = cpu_cpl(cpu);
    for (unsigned n = 0; n < SEG_FS; n++)
        c->segment_base[n] = bits64 ? 0 : cpu->seg[n].base;
    c->segment_base[SEG_FS] = cpu->seg[SEG_FS].base;
    c->segment_base[SEG_GS] = cpu->seg[SEG_GS].base;

    uint64_t key = paging_key(cpu);
    if (unlikely(key != c->paging_key)) {
        c->paging_key = key;
        tlb_flush_all(c);
    }
    if (c->cpl == 3)
        c->view = VIEW_USER;
    else
        c->view = (cpu->cr4 & CR4_SMAP) && (cpu->rflags & RFLAGS_AC) ? VIEW_SUPERVISOR_AC : VIEW_SUPERVISOR;
    bool breakpoints = cpu->dr[7] & DR7_ENABLES;
    bool alignment = c->cpl == 3 && (cpu->cr0 & CR0_AM) && (cpu->rflags & RFLAGS_AC);
    c->careful = alignment || (breakpoints && data_breakpoints_armed(cpu));
    c->tlb = c->views[c->careful ? VIEW_COUNT : c->view];
    c->slow = breakpoints || cpu->interrupt_shadow || (cpu->rflags & (RFLAGS_TF | RFLAGS_RF));
    c->simd_blocked = simd_blocked(cpu);
}

void flags_set(struct icpu *c, uint64_t rflags)
{
    uint64_t changed = c->v.cpu.rflags ^ rflags;
    c->v.cpu.rflags = rflags;
    flags_set_arithmetic(c, rflags);
    if (changed & (RFLAGS_TF | RFLAGS_RF | RFLAGS_VM | RFLAGS_AC))
        interp_mode_changed(c);
    if (unlikely(c->interrupt_waiting) && (rflags & RFLAGS_IF)) {
        c->interrupt_waiting = false;
        vcpu_raise_attention(&c->v);
    }
}

/* ---- self-modifying code ---- */

/* Takes the place of the instruction after the one that changed the block. */
static void op_block_changed(struct icpu *c, const struct insn *i)
{
    c->v.cpu.gpr[GPR_RIP] -= i->length;
    longjmp(c->escape, INTERP_RELOOP);
}

void interp_self_modified(struct icpu *c)
{
    struct block *b = c->block;
    if (!c->current || !b || !b->host || block_is_intact(b))
        return;
    block_drop(c, b);
    size_t next = (size_t)(c->current - b->insn) + 1;
    if (next < b->count)
        b->insn[next].fn = op_block_changed;
}

/* ---- events between instructions ---- */

/* Delivers one interrupt or NMI if it may be now. Attention is raised again first, so that the next one is looked for even if this delivery faults. */
static bool deliver_event(struct icpu *c)
{
    struct cpu_state *cpu = &c->v.cpu;
    const struct vcpu_host_ops *ops = c->v.host_ops;
    if (cpu->interrupt_shadow) { /* interp_run_one raises attention again at its end */
        c->interrupt_waiting = true;
        return false;
    }
    if (!cpu->nmi_blocked && ops->nmi_take(c->v.host)) {
        cpu->nmi_blocked = true;
        cpu->activity = CPU_RUNNING;
        vcpu_raise_attention(&c->v);
        exception_interrupt(c, VECTOR_NMI);
        return true;
    }
    if (ops->interrupt_peek(c->v.host) < 0)
        return false;
    if (!(cpu->rflags & RFLAGS_IF)) {
        c->interrupt_waiting = true;
        return false;
    }
    int vector = ops->interrupt_ack(c->v.host);
    if (vector < 0)
        return false;
    cpu->activity = CPU_RUNNING;
    vcpu_raise_attention(&c->v);
    exception_interrupt(c, (uint8_t)vector);
    return true;
}

enum attend_result interp_attend(struct icpu *c)
{
    atomic_exchange_explicit(&c->v.attention, 0, memory_order_acq_rel);
    vcpu_count(&c->v, COUNTER_attentions);
    simd_save(c);
    c->interrupt_waiting = false;
    if (atomic_exchange_explicit(&c->shootdown, 0, memory_order_acq_rel)) {
        tlb_flush_all(c);
        block_cache_flush(c);
    }
    if (c->v.host_ops->must_exit(c->v.host))
        return ATTEND_EXIT;
    return deliver_event(c) ? ATTEND_DELIVERED : ATTEND_NOTHING;
}

static void shadow_end(struct icpu *c)
{
    c->v.cpu.interrupt_shadow = false;
    if (c->interrupt_waiting)
        vcpu_raise_attention(&c->v);
}

/* ---- single instructions ---- */

static bool code_breakpoint_hit(const struct icpu *c, uint64_t *dr6)
{
    const struct cpu_state *cpu = &c->v.cpu;
    gva_t gva = c->code_bits == 64 ? cpu->gpr[GPR_RIP] : (cpu->gpr[GPR_RIP] + cpu->seg[SEG_CS].base) & 0xffffffffu;
    *dr6 = 0;
    for (unsigned n = 0; n < 4; n++)
        if ((cpu->dr[7] >> (2 * n) & 3) && !(cpu->dr[7] >> (16 + 4 * n) & 3) && cpu->dr[n] == gva)
            *dr6 |= 1ull << n;
    return *dr6 != 0;
}

static void deliver_debug(struct icpu *c, uint64_t dr6)
{
    c->fault = (struct fault){.vector = VECTOR_DB, .dr6 = dr6};
    c->v.cpu.activity = CPU_RUNNING;
    exception_deliver(c);
}

/* Which TF counts for the trap after this instruction: INT n clears the question, SYSCALL asks after its flag mask was applied (SDM vol. 3, 17.3.1.4). */
static bool single_step_due(const struct icpu *c, unsigned mnemonic, bool tf_before)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_INT:
    case ZYDIS_MNEMONIC_INT1:
    case ZYDIS_MNEMONIC_INT3:
    case ZYDIS_MNEMONIC_INTO:
        return false;
    case ZYDIS_MNEMONIC_SYSCALL:
        return c->v.cpu.rflags & RFLAGS_TF;
    default:
        return tf_before;
    }
}

static void resume_flag_done(struct icpu *c, unsigned mnemonic, uint64_t start)
{
    bool sets_it = mnemonic == ZYDIS_MNEMONIC_IRET || mnemonic == ZYDIS_MNEMONIC_IRETD || mnemonic == ZYDIS_MNEMONIC_IRETQ;
    if (!sets_it && c->v.cpu.gpr[GPR_RIP] != start)
        c->v.cpu.rflags &= ~RFLAGS_RF;
}

static inline void tally(struct icpu *c, const struct insn *i)
{
    if (c->tally)
        c->tally[i->mnemonic]++;
}

/* Ends with the traps that follow the instruction. */
void interp_run_one(struct icpu *c)
{
    struct cpu_state *cpu = &c->v.cpu;
    uint64_t start = cpu->gpr[GPR_RIP], flags = cpu->rflags, dr6;
    bool shadow = cpu->interrupt_shadow;
    if ((cpu->dr[7] & DR7_ENABLES) && !(flags & RFLAGS_RF) && code_breakpoint_hit(c, &dr6)) {
        deliver_debug(c, dr6);
        return;
    }
    struct block *b = block_lookup(c);
    const struct insn *i = b->insn;
    unsigned mnemonic = i->mnemonic;
    c->block = b;
    c->block_guard_span = 0;
    c->current = i;
    tally(c, i);
    cpu->gpr[GPR_RIP] += i->length;
    i->fn(c, i);
    c->current = NULL;
    c->v.counters[COUNTER_instructions]++;

    bool new_shadow = cpu->interrupt_shadow && !shadow;
    if (shadow)
        shadow_end(c);
    if (flags & RFLAGS_RF)
        resume_flag_done(c, mnemonic, start);
    if (shadow || (flags & RFLAGS_RF)) /* otherwise whatever changed the mode has said so */
        interp_mode_changed(c);
    if (new_shadow && mnemonic != ZYDIS_MNEMONIC_STI)
        return; /* loading SS holds traps back for one instruction (SDM vol. 3, 6.8.3) */
    dr6 = c->debug_hits;
    c->debug_hits = 0;
    if (single_step_due(c, mnemonic, flags & RFLAGS_TF))
        dr6 |= DR6_BS;
    if (dr6)
        deliver_debug(c, dr6);
}

void interp_run_insn(struct icpu *c, const struct insn *i)
{
    c->block = NULL;
    c->block_guard_span = 0;
    c->current = i;
    tally(c, i);
    c->v.cpu.gpr[GPR_RIP] += i->length;
    i->fn(c, i);
    c->current = NULL;
    c->v.counters[COUNTER_instructions]++;
}

/* ---- the loop ---- */

static void trace_block(struct icpu *c)
{
    if (c->v.trace_blocks)
        TRACE(c, "block %llx\n", (unsigned long long)c->v.cpu.gpr[GPR_RIP]);
}

/* rip is kept in a register: nothing but a block's last instruction writes it. */
static inline void run_block(struct icpu *c, struct block *b)
{
    const struct insn *i = b->insn, *end = i + b->count;
    uint64_t rip = c->v.cpu.gpr[GPR_RIP];
    c->block = b;
    c->block_guard = b->host - GUARD_BEFORE;
    c->block_guard_span = b->length_bytes + GUARD_BEFORE;
    do {
        c->current = i;
        rip += i->length;
        c->v.cpu.gpr[GPR_RIP] = rip;
        i->fn(c, i);
    } while (++i < end);
    c->current = NULL;
    c->v.counters[COUNTER_instructions] += b->count;
}

static __attribute__((noinline)) struct block *successor_find(struct icpu *c, struct block *previous)
{
    struct block *b = block_lookup(c);
    if (previous && previous == c->block && previous->host && b->host && !b->crossing) {
        previous->next[1] = previous->next[0];
        previous->next[0] = b;
    }
    return b;
}

/* The block at rip: one of those that followed the last one before, if they are still true, else by look-up. */
static inline struct block *successor(struct icpu *c)
{
    struct block *previous = c->block;
    gva_t gva = c->v.cpu.gpr[GPR_RIP];
    const struct tlb_entry *e = tlb_slot(c, gva);
    if (likely(previous && c->code_bits == 64 && e->execute == tlb_tag(c, gva, 1))) {
        uintptr_t host = gva + e->addend;
        for (unsigned n = 0; n < 2; n++) {
            struct block *b = previous->next[n];
            if (b && b->host == host && b->code_bits == 64 && block_is_intact(b))
                return b;
        }
    }
    return successor_find(c, previous);
}

void interp_run_next(struct icpu *c)
{
    if (unlikely(c->v.trace != NULL))
        trace_block(c);
    struct block *b = successor(c);
    tally(c, b->insn);
    run_block(c, b);
}

/* Not running. True: leave with *exit. */
bool interp_stopped(struct icpu *c, enum engine_exit *exit)
{
    struct cpu_state *cpu = &c->v.cpu;
    if (cpu->activity == CPU_HALTED) {
        enum attend_result result = interp_attend(c);
        *exit = result == ATTEND_EXIT ? ENGINE_EXIT_ATTENTION : ENGINE_EXIT_HALT;
        return result != ATTEND_DELIVERED;
    }
    *exit = cpu->activity == CPU_SHUTDOWN ? ENGINE_EXIT_SHUTDOWN : ENGINE_EXIT_ATTENTION;
    return true;
}

static __attribute__((noinline)) enum engine_exit run_loop(struct icpu *c, bool single)
{
    enum engine_exit exit;
    for (;;) {
        if (unlikely(atomic_load_explicit(&c->v.attention, memory_order_relaxed))) {
            enum attend_result result = interp_attend(c);
            if (result == ATTEND_EXIT || (single && result == ATTEND_DELIVERED))
                return ENGINE_EXIT_ATTENTION;
        }
        if (unlikely(c->v.cpu.activity != CPU_RUNNING)) {
            if (interp_stopped(c, &exit))
                return exit;
            continue;
        }
        if (unlikely(c->v.trace != NULL))
            trace_block(c);
        if (unlikely(c->slow || single)) {
            interp_run_one(c);
            if (single && c->v.cpu.activity == CPU_RUNNING)
                return ENGINE_EXIT_ATTENTION;
            continue;
        }
        run_block(c, successor(c));
    }
}

void interp_recover(struct icpu *c, int why)
{
    struct cpu_state *cpu = &c->v.cpu;
    if (c->current) {
        if (c->block) /* NULL when the instruction emptied the cache */
            c->v.counters[COUNTER_instructions] += (uint64_t)(c->current - c->block->insn);
        if (why == INTERP_FAULT)
            cpu->gpr[GPR_RIP] -= c->current->length;
        c->current = NULL;
    }
    if (c->bounce_locked) {
        c->bounce_locked = false;
        simd_save(c);
        pthread_mutex_unlock(&c->engine->split_lock);
    }
    c->debug_hits = 0;
    if (why == INTERP_FAULT && cpu->interrupt_shadow) {
        shadow_end(c);
        interp_mode_changed(c);
    }
    if (why == INTERP_FAULT)
        exception_deliver(c);
}

void interp_enter(struct icpu *c)
{
    c->v.cpu.gpr[GPR_ZERO] = 0;
    flags_set_arithmetic(c, c->v.cpu.rflags);
    interp_mode_changed(c);
    vcpu_raise_attention(&c->v); /* whatever came in while outside */
}

void interp_leave(struct icpu *c)
{
    simd_save(c);
    c->v.cpu.rflags = flags_get(c);
    if (c->code_bits != 64)
        c->v.cpu.gpr[GPR_RIP] = (uint32_t)c->v.cpu.gpr[GPR_RIP];
}

static enum engine_exit interp_execute(struct vcpu *v, bool single)
{
    struct icpu *c = (struct icpu *)v;
    enum engine_exit exit = ENGINE_EXIT_ATTENTION;
    int why = setjmp(c->escape);
    if (!why)
        interp_enter(c);
    else
        interp_recover(c, why);
    if (v->cpu.activity == CPU_SHUTDOWN)
        exit = ENGINE_EXIT_SHUTDOWN;
    else if (!why || !single)
        exit = run_loop(c, single);
    interp_leave(c);
    return exit;
}

static enum engine_exit interp_run(struct vcpu *v)
{
    return interp_execute(v, false);
}

enum engine_exit interp_step(struct vcpu *v)
{
    return interp_execute(v, true);
}

/* ---- engine and vCPUs ---- */

void interp_engine_init(struct engine *e, struct physmap *memory)
{
    e->memory = memory;
    pthread_mutex_init(&e->lock, NULL);
    pthread_mutex_init(&e->split_lock, NULL);
}

void interp_engine_fini(struct engine *e)
{
    pthread_mutex_destroy(&e->lock);
    pthread_mutex_destroy(&e->split_lock);
}

static int interp_probe(struct error *err)
{
    return 0;
}

static int interp_create(struct engine **out, struct physmap *memory, struct error *err)
{
    struct engine *e = calloc(1, sizeof(*e));
    if (!e)
        return error_set(err, -ENOMEM, "no memory for the interpreter");
    int rc = native_install_handlers();
    if (rc) {
        free(e);
        return error_set(err, rc, "cannot install fault handlers: %s", strerror(-rc));
    }
    interp_engine_init(e, memory);
    *out = e;
    return 0;
}

static void interp_destroy(struct engine *e)
{
    interp_engine_fini(e);
    free(e);
}

static int engine_add(struct engine *e, struct icpu *c)
{
    int rc = -ENOSPC;
    pthread_mutex_lock(&e->lock);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX && rc; n++) {
        if (!e->vcpus[n]) {
            e->vcpus[n] = c;
            rc = 0;
        }
    }
    pthread_mutex_unlock(&e->lock);
    return rc;
}

static void engine_remove(struct engine *e, const struct icpu *c)
{
    pthread_mutex_lock(&e->lock);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++)
        if (e->vcpus[n] == c)
            e->vcpus[n] = NULL;
    pthread_mutex_unlock(&e->lock);
}

void icpu_destroy(struct icpu *c)
{
    engine_remove(c->engine, c);
    if (c->native)
        native_destroy(c);
    block_cache_destroy(c->blocks);
    if (c->asids)
        tlb_destroy(c);
}

static void vcpu_configure(struct icpu *c, struct engine *e, const struct engine_ops *ops, const struct vcpu_config *config)
{
    c->v.index = config->index;
    c->v.ops = ops;
    c->v.host_ops = config->host_ops;
    c->v.host = config->host;
    c->v.memory = config->memory;
    c->v.cpuid = config->cpuid;
    c->engine = e;
    c->delivering = -1;
    c->max_phys_bits = cpuid_physical_address_bits(config->cpuid);
    cpu_reset(&c->v.cpu, CPU_RESET_POWER_ON);
    uint32_t vendor = cpuid_query(config->cpuid, &c->v.cpu, c->v.index, 0, 0).ebx;
    c->amd = vendor == 0x68747541 /* "Auth" */ || vendor == 0x6F677948 /* "Hygo" */;
}

int icpu_create(struct icpu *c, struct engine *e, const struct engine_ops *ops, const struct vcpu_config *config,
                const struct icpu_sizes *sizes)
{
    vcpu_configure(c, e, ops, config);
    int rc = tlb_create(c);
    if (!rc) {
        c->blocks = block_cache_create(sizes->blocks_bytes);
        rc = c->blocks ? native_create(c, sizes->stubs_bytes) : -ENOMEM;
    }
    if (rc)
        return rc;
    interp_mode_changed(c);
    tlb_flush_all(c);
    return engine_add(e, c);
}

static int interp_vcpu_create(struct engine *e, const struct vcpu_config *config, struct vcpu **out, struct error *err)
{
    static const struct icpu_sizes sizes = {.blocks_bytes = 24u << 20, .stubs_bytes = 8u << 20};
    struct icpu *c = aligned_alloc(_Alignof(struct icpu), sizeof(*c));
    if (!c)
        return error_set(err, -ENOMEM, "no memory for vCPU %u", config->index);
    memset(c, 0, sizeof(*c));
    int rc = icpu_create(c, e, &interp_engine, config, &sizes);
    if (rc) {
        icpu_destroy(c);
        free(c);
        return error_set(err, rc, "cannot create vCPU %u: %s", config->index, strerror(-rc));
    }
    *out = &c->v;
    return 0;
}

static void interp_vcpu_destroy(struct vcpu *v)
{
    icpu_destroy((struct icpu *)v);
    free(v);
}

void interp_state_changed(struct vcpu *v)
{
    struct icpu *c = (struct icpu *)v;
    c->delivering = -1;
    c->debug_hits = 0;
    interp_mode_changed(c);
    tlb_flush_all(c);
}

void interp_invalidate(struct engine *e, gpa_t gpa, uint64_t length_bytes)
{
    pthread_mutex_lock(&e->lock);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++) {
        if (e->vcpus[n]) {
            atomic_store_explicit(&e->vcpus[n]->shootdown, 1, memory_order_release);
            vcpu_raise_attention(&e->vcpus[n]->v);
        }
    }
    pthread_mutex_unlock(&e->lock);
}

const struct engine_ops interp_engine = {
    .name = "interp",
    .help = "reference interpreter: complete and exact, slow",
    .probe = interp_probe,
    .create = interp_create,
    .destroy = interp_destroy,
    .vcpu_create = interp_vcpu_create,
    .vcpu_destroy = interp_vcpu_destroy,
    .run = interp_run,
    .step = interp_step,
    .state_changed = interp_state_changed,
    .invalidate = interp_invalidate,
};
