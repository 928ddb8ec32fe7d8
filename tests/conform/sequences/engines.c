/*
 * Runs of one case: step by step in the interpreter, which says what is right, and in the translator under several circumstances.
 *
 * Disturbances happen in the hook that the translator calls on each way into translated code; what they are follows from the case's seed alone.
 * Threading: everything runs on the main thread. The watcher only kicks.
 */
#include "sequence.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "arch/host.h"
#include "arch/paging.h"

#define HANG_SECONDS 30
#define OFTEN 12 /* sites that keep faulting are translated in another way by then */

const char *const run_names[RUN_KINDS] = {
    [RUN_NATIVE] = "on the processor",
    [RUN_INTERP] = "interpreter by blocks",
    [RUN_COLD] = "translated for the first time",
    [RUN_WARM] = "once more",
    [RUN_OFTEN] = "often",
    [RUN_EMPTY] = "with empty tables",
    [RUN_FILLED] = "with tables filled at random",
    [RUN_DISTURBED] = "disturbed",
    [RUN_SHORT] = "in short blocks, disturbed",
    [RUN_KICKED] = "kicked",
};

/* ---- hangs ---- */

static _Atomic(struct tiny_vm *) watched;
static atomic_uint_fast64_t watched_case;
static atomic_uint watched_runs;

static void *watch(void *nothing)
{
    unsigned seconds = 0, runs = 0;
    for (;; sleep(1)) {
        struct tiny_vm *vm = atomic_load(&watched);
        if (!vm || runs != atomic_load(&watched_runs)) {
            runs = atomic_load(&watched_runs);
            seconds = 0;
        } else if (++seconds == HANG_SECONDS) {
            printf("case %llu hangs; the processor is kicked\n", (unsigned long long)atomic_load(&watched_case));
            fflush(stdout);
            vm->exit_wanted = true;
            vcpu_kick(vm->vcpu);
        } else if (seconds == 2 * HANG_SECONDS) {
            printf("case %llu cannot be interrupted\n", (unsigned long long)atomic_load(&watched_case));
            fflush(stdout);
            _exit(1);
        }
    }
    return nothing;
}

/* ---- kicks ---- */

static _Atomic(struct tiny_vm *) kicked;

static void *kick(void *nothing)
{
    for (unsigned idle = 0;; idle++) {
        struct tiny_vm *vm = atomic_load(&kicked);
        if (vm) {
            idle = 0;
            vcpu_kick(vm->vcpu);
        }
        for (unsigned n = 0; n < 200; n++)
            __builtin_ia32_pause();
        if (idle > 100)
            usleep(1000);
    }
    return nothing;
}

int engines_watch(void)
{
    pthread_t thread;
    return pthread_create(&thread, NULL, watch, NULL) || pthread_detach(thread) || pthread_create(&thread, NULL, kick, NULL) || pthread_detach(thread);
}

/* ---- disturbances ---- */

struct disturbance {
    struct generator g;
    const struct world *w;
    const struct sequence *s;
    unsigned odds; /* one turn in so many is disturbed */
    bool limits;
};

static gva_t some_page(struct disturbance *d)
{
    return d->w->page[encode_pick(&d->g, d->w->page_count)].gva;
}

static void some_block_drop(struct disturbance *d, struct bt_engine *e)
{
    pthread_mutex_lock(&e->lock);
    if (e->block_count)
        cache_block_drop(e, &e->blocks[encode_pick(&d->g, e->block_count)]);
    pthread_mutex_unlock(&e->lock);
}

static void page_drop(struct disturbance *d, struct bt_engine *e)
{
    pthread_mutex_lock(&e->lock);
    cache_page_drop(e, d->w->code_gpa[encode_pick(&d->g, CODE_PAGES)]);
    pthread_mutex_unlock(&e->lock);
}

/* Some instructions are translated in other ways from now on. */
static void sites_mark(struct disturbance *d, struct bt_engine *e)
{
    pthread_mutex_lock(&e->lock);
    for (uint32_t n = 0; n < e->page_count; n++)
        for (unsigned k = 0; k < d->s->lines; k++) {
            int at = d->s->line[k].at[0];
            if (at >= 0 && d->w->code_gpa[at / 4096] == e->page_store[n].gpa && !encode_pick(&d->g, 3))
                cache_mark(e, &e->page_store[n], (unsigned)at % 4096, encode_pick(&d->g, 4) ? BT_MARK_CROSSES : BT_MARK_CALLS);
        }
    pthread_mutex_unlock(&e->lock);
    page_drop(d, e);
}

static void flush(struct bt_vcpu *b)
{
    cache_exclusive_begin(b->engine, b);
    cache_flush(b->engine);
    cache_exclusive_end(b->engine, b);
}

static void limits_set(struct disturbance *d, struct bt_debug *debug)
{
    debug->block_insns = (uint16_t)(1 + encode_pick(&d->g, encode_pick(&d->g, 2) ? BT_BLOCK_INSNS_MAX : 4));
    debug->group_span = (uint16_t)(encode_pick(&d->g, 2) ? 0 : encode_pick(&d->g, BT_GROUP_SPAN_MAX + 1));
}

static void turn(struct bt_vcpu *b, void *opaque)
{
    struct disturbance *d = opaque;
    struct bt_engine *e = b->engine;
    if (encode_pick(&d->g, d->odds))
        return;
    switch (encode_pick(&d->g, 16)) {
    case 0:
        flush(b);
        break;
    case 1:
    case 2:
        page_drop(d, e);
        break;
    case 3:
    case 4:
    case 5:
        some_block_drop(d, e);
        break;
    case 6:
        sites_mark(d, e);
        break;
    case 7:
        tables_flush_all(&b->c);
        break;
    case 8:
        tables_flush_non_global(&b->c, 0);
        break;
    case 9:
        vcpu_raise_attention(&b->c.v);
        break;
    case 10:
        e->code_flags[d->w->code_gpa[encode_pick(&d->g, CODE_PAGES)] / PAGE_SIZE_BYTES] |= BT_CODE_THRASH;
        break;
    case 11:
        if (d->limits)
            limits_set(d, &e->debug);
        break;
    default:
        tables_flush_page(&b->c, some_page(d));
    }
}

static void fill_at_random(const struct world *w, struct generator *g, struct bt_vcpu *b)
{
    for (unsigned n = 0; n < w->page_count; n++)
        if (encode_pick(g, 2))
            (void)tables_fill(b, w->page[n].gva + encode_pick(g, 4096), 1, encode_pick(g, 2));
}

/* ---- runs ---- */

void engines_start(struct tiny_vm *vm, const struct sequence *s, bool cold)
{
    vm->exit_wanted = false;
    vm->pending_vector = s->interrupt;
    vm->mmio_reads = vm->mmio_writes = vm->mmio_size = 0;
    vm->port = 0;
    vm->port_writes = 0;
    vm->port_value = 0x87654321;
    vm->mmio_gpa = 0;
    vm->mmio_value = 0x123456789abcdef0;
    vm->vcpu->cpu = s->start;
    if (cold)
        vm->ops->state_changed(vm->vcpu);
}

bool engines_in_handler(const struct tiny_vm *vm)
{
    return vm->vcpu->cpu.gpr[GPR_RIP] - (KERNEL + TINY_HANDLER) < PAGE_SIZE_BYTES;
}

/* Does the instruction at RIP answer differently each time? Nobody wrote it, but jumps may lead into the middle of others. */
static bool is_unsteady(struct tiny_vm *vm)
{
    uint8_t bytes[16] = {0};
    unsigned n = 0;
    gpa_t gpa;
    for (; n < 15 && world_walk(vm, vm->vcpu->cpu.gpr[GPR_RIP] + n, PAGING_FETCH, &gpa); n++) {
        const uint8_t *byte = physmap_get(vm->memory, gpa, 1, PHYSMAP_READ);
        bytes[n] = byte ? *byte : 0;
    }
    for (unsigned k = 0; k < 13; k++)
        if (bytes[k] == 0x0f && (bytes[k + 1] == 0x31 || bytes[k + 1] == 0xa2 || bytes[k + 1] == 0x33 || (bytes[k + 1] == 0x01 && bytes[k + 2] == 0xf9) ||
                                 (bytes[k + 1] == 0xc7 && (bytes[k + 2] & 0xf0) == 0xf0))) /* RDTSC, CPUID, RDPMC, RDTSCP, RDRAND, RDSEED */
            return true;
    return false;
}

bool engines_step(struct tiny_vm *vm, const struct sequence *s, const struct generator *g, bool *safe)
{
    engines_start(vm, s, true);
    for (unsigned n = 0; n < STEPS_MAX && vm->vcpu->cpu.activity == CPU_RUNNING; n++) {
        if (safe && *safe && !engines_in_handler(vm))
            *safe = native_may_execute(g, vm);
        if (is_unsteady(vm))
            return false;
        vm->ops->step(vm->vcpu);
    }
    return vm->vcpu->cpu.activity == CPU_HALTED;
}

static void forget_thrashing(const struct world *w, struct bt_engine *e)
{
    for (unsigned n = 0; n < CODE_PAGES; n++)
        e->code_flags[w->code_gpa[n] / PAGE_SIZE_BYTES] &= (uint8_t)~BT_CODE_THRASH;
}

static void debug_prepare(struct disturbance *d, struct bt_engine *e, enum run_kind kind)
{
    struct bt_debug debug = {.block_insns = BT_BLOCK_INSNS_MAX, .group_span = BT_GROUP_SPAN_MAX, .tc_bytes = BT_TC_BYTES};
    if (kind == RUN_DISTURBED || kind == RUN_SHORT) {
        debug.turn = turn;
        debug.opaque = d;
        d->odds = 1 + encode_pick(&d->g, 6);
        d->limits = encode_pick(&d->g, 2);
    }
    if (kind == RUN_SHORT) {
        limits_set(d, &debug);
        if (!encode_pick(&d->g, 4))
            debug.tc_bytes = e->stubs.end + encode_pick(&d->g, 30000);
        page_drop(d, e);
    }
    bt_debug_set(&e->interp, &debug);
}

static void run_once(struct tiny_vm *vm, const struct world *w, const struct sequence *s, enum run_kind kind, bool warm, struct disturbance *d)
{
    struct bt_vcpu *b = (struct bt_vcpu *)vm->vcpu;
    world_restore(w, vm, !warm);
    sequence_place(s, w, vm);
    engines_start(vm, s, !warm);
    if (kind != RUN_INTERP) {
        forget_thrashing(w, b->engine);
        debug_prepare(d, b->engine, kind);
        b->interp_blocks = 0;
    }
    if (kind == RUN_FILLED)
        fill_at_random(w, &d->g, b);
    atomic_store(&watched_case, s->number);
    atomic_fetch_add(&watched_runs, 1);
    atomic_store(&watched, vm);
    atomic_store(&kicked, kind == RUN_KICKED ? vm : NULL);
    do
        vm->ops->run(vm->vcpu);
    while (vm->vcpu->cpu.activity == CPU_RUNNING && !vm->exit_wanted);
    atomic_store(&kicked, NULL);
    atomic_store(&watched, NULL);
}

void engines_run(struct tiny_vm *vm, const struct world *w, const struct sequence *s, enum run_kind kind, uint64_t seed)
{
    struct disturbance d = {.w = w, .s = s};
    d.g.seed = (seed << 32 ^ s->number << 4 ^ kind) * 0x9e3779b97f4a7c15ull | 1;
    bool warm = (kind == RUN_WARM || kind == RUN_OFTEN) && !s->tables_change && !w->fixing;
    for (unsigned n = kind == RUN_OFTEN ? OFTEN : 1; n > 0; n--)
        run_once(vm, w, s, kind, warm, &d);
}

/* ---- results ---- */

static bool has_error_code(int vector)
{
    return vector == VECTOR_DF || (vector >= VECTOR_TS && vector <= VECTOR_PF) || vector == VECTOR_AC;
}

void engines_outcome(struct tiny_vm *vm, const struct generator *g, struct outcome *to)
{
    const struct cpu_state *cpu = &vm->vcpu->cpu;
    uint64_t frame[6] = {0};
    memset(to, 0, sizeof *to);
    memcpy(to->state.gpr, cpu->gpr, sizeof to->state.gpr);
    to->state.rip = cpu->gpr[GPR_RIP];
    to->state.rflags = cpu->rflags;
    memcpy(to->state.xsave, cpu->xsave, sizeof to->state.xsave);
    state_normalize(g, &to->state);
    memset(to->state.xsave + 6, 0, 2); /* FOP is of the last instruction with an unmasked exception, on some processors; of the last one otherwise */
    if (host_is_amd())
        memset(to->state.xsave + 8, 0, 8); /* FIP is saved while an exception waits only, and FLDCW can make an old one wait */
    memset(to->state.xsave + 16, 0, 8); /* what the last x87 instruction accessed: not kept */
    to->cr2 = cpu->cr2;
    to->cs = cpu->seg[SEG_CS];
    to->ss = cpu->seg[SEG_SS];
    static const uint8_t data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    for (unsigned n = 0; n < 4; n++)
        to->data[n] = cpu->seg[data[n]];
    to->fs_base = cpu->seg[SEG_FS].base;
    to->gs_base = cpu->seg[SEG_GS].base;
    to->mmio_reads = vm->mmio_reads;
    to->mmio_writes = vm->mmio_writes;
    to->mmio_size = vm->mmio_size;
    to->mmio_gpa = vm->mmio_gpa;
    to->mmio_value = vm->mmio_value;
    to->interrupt = vm->pending_vector;
    to->vector = engines_in_handler(vm) ? (int)((to->state.rip & 0xfff) / 16) : -1;
    if (to->vector < 0)
        return;
    bool error = has_error_code(to->vector);
    for (unsigned n = 0; n < 5u + error; n++) {
        gpa_t gpa;
        gva_t gva = cpu->gpr[GPR_RSP] + 8 * n;
        const void *at = world_walk(vm, gva, PAGING_READ | PAGING_AC, &gpa) ? physmap_get(vm->memory, gpa, 1, PHYSMAP_READ) : NULL;
        if (at && (gpa & PAGE_MASK_BITS) <= PAGE_SIZE_BYTES - 8)
            memcpy(&frame[n + !error], at, 8);
    }
    to->error = frame[0];
    to->rip = frame[1];
    to->narrow = (frame[2] & 0xfffc) == (TINY_CS32 & ~3) || (frame[2] & 0xfffc) == (TINY_USER_CS32 & ~3);
    to->rflags = frame[3];
    to->rsp = frame[4];
}
