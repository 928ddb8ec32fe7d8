/*
 * The translator's run loop and its face towards the machine (engine_ops).
 *
 * The loop is the interpreter's with one more thing to do: while bt_usable, it enters translated code and deals with the reason for which that was left. Between two turns of the
 * loop all guest state is where the interpreter has it, so whatever translated code does not do is done by it, one instruction at a time. Inside (from flags_in to
 * flags_out) arithmetic flags and DF are in the host's flags and rflags has them clear.
 * No function of the interpreter that may raise a fault (longjmp) is called inside, or with e->lock held.
 * Threading: run and step on the vCPU's thread; bt_kick and invalidate from any.
 */
#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "arch/host.h"
#include "engine/bt/direct.h"
#include "engine/interp/system_priv.h"
#include "state/inputs.h"
#include "util/log.h"

#define CROSSING_PATIENCE 2   /* times that a site may cross pages by a signal before it is translated in another way */
#define MMIO_PATIENCE 6       /* the same for MMIO, and segments that are not flat */
#define JUMP_BYTES 5u
#define DR7_ENABLES 0xffull
#define THRASH_BLOCKS 32      /* interpreted at a stretch on a page that keeps changing */
#define THRASH_FORGIVEN 256   /* after so many visits such a page gets another chance */

/* ---- may translated code run? ---- */

#define FLAGS_UNUSABLE (RFLAGS_TF | RFLAGS_NT | RFLAGS_VM | RFLAGS_RF | RFLAGS_VIF | RFLAGS_VIP | RFLAGS_IOPL | RFLAGS_DF)

/* Code and stack may be anywhere in 4 GiB. */
static bool is_flat_32bit(const struct icpu *c)
{
    unsigned needed = 1u << SEG_CS | 1u << SEG_SS;
    return c->code_bits == 32 && c->stack_mask == 0xffffffff && (bt_flat_segments(&c->v.cpu) & needed) == needed && !(c->v.cpu.gpr[GPR_RIP] >> 32);
}

bool bt_usable(const struct bt_vcpu *b)
{
    const struct icpu *c = &b->c;
    const struct cpu_state *cpu = &c->v.cpu;
    if (c->slow || c->careful || c->v.trace_blocks || !(cpu->cr0 & CR0_PE) || (cpu->rflags & FLAGS_UNUSABLE))
        return false;
    if (c->cpl != 0 && (c->cpl != 3 || (cpu->rflags & RFLAGS_AC)))
        return false;
    return c->code_bits == 64 || is_flat_32bit(c);
}

/* The exec table's first page is never readable, and a signal for each jump is slower than the interpreter. */
static bool is_dispatched(const struct icpu *c)
{
    return c->code_bits == 32 || bt_exec_index(c->v.cpu.gpr[GPR_RIP]) >= PAGE_SIZE_BYTES / 8;
}

/* ---- on the way in and out ---- */

static void flags_in(struct bt_vcpu *b)
{
    struct cpu_state *cpu = &b->c.v.cpu;
    b->host_flags = flags_arithmetic(&b->c) | (cpu->rflags & RFLAGS_DF) | RFLAGS_IF | RFLAGS_FIXED;
    b->ac = cpu->rflags & RFLAGS_AC;
    cpu->rflags &= ~(RFLAGS_OSZAPC | RFLAGS_DF | RFLAGS_AC);
}

static void flags_out(struct bt_vcpu *b)
{
    flags_set_arithmetic(&b->c, b->host_flags);
    b->c.v.cpu.rflags |= (b->host_flags & RFLAGS_DF) | b->ac;
}

void bt_settle(struct bt_vcpu *b)
{
    struct icpu *c = &b->c;
    if (b->transition) {
        bool user = b->transition == BT_TO_USER;
        b->transition = BT_NO_TRANSITION;
        syscall_segments_load(c, user);
        c->cpl = user ? 3 : 0;
        b->mode = bt_mode_of(c, user, 64);
    }
    enum tlb_view view = c->cpl ? VIEW_USER : b->ac && c->v.cpu.cr4 & CR4_SMAP ? VIEW_SUPERVISOR_AC : VIEW_SUPERVISOR;
    if (view != c->view) {
        c->view = view;
        c->tlb = c->views[view];
        tables_settle(b);
    }
}

/* Arithmetic flags and DF are clear after SYSCALL then, whatever they were. */
#define SYSCALL_CLEARS (RFLAGS_OSZAPC | RFLAGS_DF)

static void system_calls_prepare(struct bt_vcpu *b)
{
    const struct cpu_state *cpu = &b->c.v.cpu;
    const struct bt_stubs *stubs = &b->engine->stubs;
    bool possible = cpu->efer & EFER_SCE && (cpu->msr_sfmask & SYSCALL_CLEARS) == SYSCALL_CLEARS && tables_are_long(b);
    uintptr_t tc = (uintptr_t)b->engine->layout.tc_exec;
    b->syscall_ss = ((cpu->msr_star >> 32) + 8) & 0xfffc;
    b->syscall_stub = tc + (possible ? stubs->syscall : stubs->syscall_slow);
    b->sysret_stub = tc + (possible && !direct_active(b) ? stubs->sysret : stubs->sysret_slow);
}

void bt_kick(struct vcpu *v)
{
    struct bt_vcpu *b = (struct bt_vcpu *)v;
    atomic_store(&b->exec_mask, 0);
    atomic_store(&b->poll, b->engine->layout.poison);
    atomic_store(&b->poll_sti, b->engine->layout.poison);
}

static void kick_everywhere(struct vcpu *v)
{
    bt_kick(v);
    direct_kick((struct bt_vcpu *)v);
}

/* Before cache_enter, whose store is a barrier: a kick that is lost here finds its reason, attention or the wish to stop the world, looked at afterwards. */
static void polls_reset(struct bt_vcpu *b)
{
    uintptr_t quiet = b->poll_quiet;
    atomic_store_explicit(&b->exec_mask, BT_EXEC_MASK, memory_order_relaxed);
    atomic_store_explicit(&b->poll, quiet, memory_order_relaxed);
    atomic_store_explicit(&b->poll_sti, b->c.interrupt_waiting ? b->engine->layout.poison : quiet, memory_order_relaxed);
}

/* A block to be entered, while the cache is still that of `epoch` and nothing was dropped since; tc_start 0: whatever the tables lead to. */
struct entry {
    uint32_t tc_start;
    uint64_t epoch, invalidations;
};

/* After a miss, still inside: true when only the exec entry was not there. */
static bool exec_again(struct bt_vcpu *b)
{
    const struct bt_engine *e = b->engine;
    if (!atomic_load_explicit(&b->exec_mask, memory_order_relaxed) || e->debug.turn || !tables_exec_again(b, b->c.v.cpu.gpr[GPR_RIP]))
        return false;
    vcpu_count(&b->c.v, COUNTER_exit_miss);
    b->enter_target = (uintptr_t)e->layout.tc_exec + e->stubs.lookup;
    return true;
}

/* One stay inside. Of 32-bit code's registers R8 to R15 are none, and hold anything afterwards. */
static enum bt_exit stay(struct bt_vcpu *b)
{
    uint64_t *gpr = b->c.v.cpu.gpr, kept[8];
    bool legacy = b->mode.code_bits == 32;
    gpr[GPR_RIP] = bt_code_address(&b->mode, gpr[GPR_RIP]);
    for (unsigned n = 0; legacy && n < 8; n++)
        kept[n] = gpr[GPR_R8 + n];
    enum bt_exit why = bt_enter(b);
    for (unsigned n = 0; legacy && n < 8; n++)
        gpr[GPR_R8 + n] = kept[n];
    gpr[GPR_RIP] = bt_code_linear(&b->mode, gpr[GPR_RIP]);
    bt_settle(b);
    return why;
}

/* Runs translated code from the current rip. *entry tells the epoch afterwards: what was left belongs to it. */
static enum bt_exit enter(struct bt_vcpu *b, struct entry *entry)
{
    struct bt_engine *e = b->engine;
    enum bt_exit why = BT_EXIT_attention;
    simd_load(&b->c);
    native_pointers_hide(&b->c);
    b->x87_last = 0;
    flags_in(b);
    polls_reset(b);
    cache_enter(b);
    uint64_t epoch = __atomic_load_n(&e->epoch, __ATOMIC_ACQUIRE), generation = epoch + __atomic_load_n(&e->rewrites, __ATOMIC_ACQUIRE);
    if (unlikely(b->serialized != generation)) {
        native_serialize();
        b->serialized = generation;
    }
    tables_select(b);
    system_calls_prepare(b);
    if (b->fill_next) {
        tables_fill_page(b, b->fill_next);
        b->fill_next = 0;
    }
    if (unlikely(e->debug.kick)) {
        e->debug.kick = false;
        bt_kick(&b->c.v);
    }
    if (likely(!atomic_load(&b->c.v.attention))) {
        bool same = entry->epoch == epoch && entry->invalidations == __atomic_load_n(&e->invalidations, __ATOMIC_ACQUIRE);
        uint32_t start = entry->tc_start && same ? entry->tc_start : e->stubs.lookup;
        b->enter_target = (uintptr_t)e->layout.tc_exec + start;
        b->fault_tc = 0;
        do
            why = stay(b);
        while (why == BT_EXIT_miss && exec_again(b));
    }
    entry->epoch = epoch;
    entry->tc_start = 0;
    cache_leave(b);
    native_pointers_show(&b->c);
    if (unlikely(b->x87_last))
        native_pointers_set(&b->c, bt_code_linear(&b->mode, b->x87_page) + (b->x87_last & BT_X87_OFFSET), b->x87_last >> BT_X87_FOP_SHIFT & BT_X87_FOP);
    flags_out(b);
    vcpu_count(&b->c.v, COUNTER_exit_miss + why);
    return why;
}

/* ---- finding and making blocks ---- */

#define REACHES_END (PAGE_SIZE_BYTES - BT_BLOCK_INSNS_MAX * 15)

/* RAM offset of the page that follows the current instruction's, ~0: cannot be fetched from. Looked up only when a block at `start` may get there. */
static uint64_t next_page(struct bt_vcpu *b, unsigned start)
{
    uint64_t ram_offset;
    gva_t next = (b->c.v.cpu.gpr[GPR_RIP] | PAGE_MASK_BITS) + 1;
    if (start < REACHES_END || (b->mode.code_bits == 32 && next >> 32) || tables_look(b, next, &ram_offset))
        return ~0ull;
    return ram_offset & ~PAGE_MASK_BITS;
}

static struct bt_block *translate(struct bt_vcpu *b, struct bt_page *page, unsigned start, uint64_t next, bool careful)
{
    struct bt_engine *e = b->engine;
    uint64_t *counters = b->c.v.counters;
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    uint32_t published = e->block_count;
    bool here = page->gva == (b->c.v.cpu.gpr[GPR_RIP] & ~PAGE_MASK_BITS);
    struct bt_block *block = translate_block(e, page, start, next, careful, here ? b : NULL);
    clock_gettime(CLOCK_MONOTONIC, &after);
    int64_t ns = (after.tv_sec - before.tv_sec) * 1000000000ll + (after.tv_nsec - before.tv_nsec);
    e->translate_ns += (uint64_t)ns;
    counters[COUNTER_translation_us] += (uint64_t)ns / 1000;
    if (block) {
        counters[COUNTER_translated_blocks]++;
        counters[COUNTER_translated_insns] += block->insns;
        counters[COUNTER_translated_bytes] += block->tc_end - block->tc_start;
    }
    report_published(e, published);
    direct_translated(b, (uint64_t)ns);
    return block;
}

/* Pages that change all the time are interpreted; now and then they are given the benefit of the doubt. */
static bool page_thrashes(struct bt_vcpu *b, uint64_t ram_offset)
{
    uint8_t *flags = &b->engine->code_flags[ram_offset / PAGE_SIZE_BYTES];
    if ((*flags & BT_CODE_THRASH) != BT_CODE_THRASH)
        return false;
    if (++b->thrash_visits % THRASH_FORGIVEN == 0)
        *flags = (uint8_t)((*flags >> 1 & BT_CODE_THRASH) | (*flags & ~BT_CODE_THRASH));
    b->interp_blocks = THRASH_BLOCKS;
    return true;
}

/* RAM offset of the current instruction's page. *again: its exec entry is there. */
static bool page_find(struct bt_vcpu *b, gva_t gva, uint64_t *ram_offset, bool *again)
{
    const uint32_t *dt = tables_exec_find(b, gva);
    *again = dt != NULL;
    if (dt)
        *ram_offset = cache_page_of(b->engine, dt)->offset;
    else if (tables_fetch(b, gva, ram_offset))
        return false;
    *ram_offset &= ~PAGE_MASK_BITS;
    return true;
}

/* NULL with *full: the cache has to be flushed first; else the interpreter goes on. */
static struct bt_block *block_in_page(struct bt_vcpu *b, gva_t gva, bool *full)
{
    struct bt_engine *e = b->engine;
    unsigned start = (unsigned)(gva & PAGE_MASK_BITS);
    uint64_t ram_offset;
    bool again;
    *full = false;
    if (!page_find(b, gva, &ram_offset, &again) || page_thrashes(b, ram_offset) || (!again && direct_preferred(b)))
        return NULL;
    if (!direct_release(e, ram_offset)) {
        b->interp_blocks = 1;
        return NULL;
    }
    struct bt_page *page = cache_page(e, ram_offset, physmap_gpa(b->c.v.memory, ram_offset), &b->mode);
    struct bt_block *block = page ? cache_block(e, page, start) : NULL;
    if (page)
        page->gva = gva & ~PAGE_MASK_BITS;
    if (!block && direct_preferred(b))
        return NULL;
    if (!block && page && cache_room(e) && e->tc_used <= e->debug.tc_bytes)
        block = translate(b, page, start, next_page(b, start), false);
    else if (!block)
        *full = true;
    if (block && !again)
        tables_exec_set(b, gva, page->dt);
    return block;
}

/* The block at the current rip, found or made, with e->lock held; NULL without it: the interpreter goes on. */
static struct bt_block *block_lock(struct bt_vcpu *b)
{
    struct bt_engine *e = b->engine;
    gva_t gva = b->c.v.cpu.gpr[GPR_RIP];
    bool full;
    simd_save(&b->c);
    pthread_mutex_lock(&e->lock);
    struct bt_block *block = block_in_page(b, gva, &full);
    if (full) {
        pthread_mutex_unlock(&e->lock);
        cache_exclusive_begin(e, b);
        cache_flush(e);
        vcpu_count(&b->c.v, COUNTER_translation_flushes);
        block = block_in_page(b, gva, &full);
        pthread_mutex_lock(&e->lock); /* once more: nobody else flushes between the end of this and the use of the block */
        cache_exclusive_end(e, b);
    }
    if (!block)
        pthread_mutex_unlock(&e->lock);
    return block;
}

/* ---- code that has not run often ---- */

/*
 * A block takes as long to translate as the interpreter takes to run it some hundred times, and most of what a guest runs in its first moments, and when it has little to do, runs less often: so
 * what has no translation is counted first, as long as that is not more than a guest that computes would lose by it. Counts are by linear address and shared by what has the same hash: it only
 * matters that what runs often is translated soon.
 */
#define COLD_RUNS 128u /* below 256 */
#define COLD_AT_FIRST (1u << 18) /* runs of blocks that have no translation: some 40 ms */
#define COLD_PER_SECOND (1u << 14) /* and later, as many of them as time has passed: 3 ms */
#define COLD_REFILLS_PER_SECOND 64u
#define COLD_HASH_BITS 14u
#define BLOCKS_BYTES (1u << 20)      /* decoded blocks, where they are the exception */
#define COLD_BLOCKS_BYTES (8u << 20) /* and as long as all code begins there: of a busy server's guest they take 4 MiB */

struct bt_cold {
    bool here;        /* the block that ran last was */
    bool settled;     /* the first moments are over */
    uint32_t left;    /* to be counted until `refilled` is some time ago */
    uint64_t created, refilled, tsc_per_second; /* the host's counter */
    uint8_t runs[1u << COLD_HASH_BITS];
};

static struct bt_cold *cold_create(void)
{
    struct bt_cold *cold = calloc(1, sizeof(*cold));
    if (!cold)
        return NULL;
    cold->left = COLD_AT_FIRST;
    cold->tsc_per_second = inputs_tsc_khz_roughly() * 1000 + 1;
    cold->created = cold->refilled = __builtin_ia32_rdtsc();
    return cold;
}

/* Most of what the first moments needed is not needed again: its memory goes back. */
static void cold_settle(struct bt_vcpu *b)
{
    if (b->cold->settled)
        return;
    b->cold->settled = true;
    block_cache_shrink(&b->c, BLOCKS_BYTES);
}

/* A guest that has nothing to do after a quarter of a second is no longer in its first moments. */
static void cold_idle(struct bt_vcpu *b)
{
    if (b->cold && !b->cold->settled && __builtin_ia32_rdtsc() - b->cold->created > b->cold->tsc_per_second / 4)
        cold_settle(b);
}

static bool cold_refill(struct bt_vcpu *b)
{
    struct bt_cold *cold = b->cold;
    uint64_t now = __builtin_ia32_rdtsc(), passed = now - cold->refilled;
    cold_settle(b);
    if (passed < cold->tsc_per_second / COLD_REFILLS_PER_SECOND)
        return false;
    cold->refilled = now;
    cold->left = passed > cold->tsc_per_second ? COLD_PER_SECOND : (uint32_t)(passed * COLD_PER_SECOND / cold->tsc_per_second);
    return cold->left;
}

/* Whether the block at rip, which may have no translation, is the interpreter's for now; counts that. User code that is executed directly has another balance (direct.c). */
static bool is_cold(struct bt_vcpu *b)
{
    struct bt_cold *cold = b->cold;
    if (!cold)
        return false;
    cold->here = false;
    if (!cold->left && !cold_refill(b))
        return false;
    uint8_t *runs = &cold->runs[b->c.v.cpu.gpr[GPR_RIP] * 0x9e3779b97f4a7c15ull >> (64 - COLD_HASH_BITS)];
    cold->here = *runs < COLD_RUNS && !(b->c.cpl == 3 && direct_active(b));
    if (cold->here) {
        ++*runs;
        cold->left--;
    }
    return cold->here;
}

static void run_cold(struct bt_vcpu *b)
{
    b->c.tally = b->interpreted[BT_TALLY_COLD];
    interp_run_next(&b->c);
}

/* ---- why translated code was left ---- */

/* True: enter again, in the same mode. */
typedef bool exit_fn(struct bt_vcpu *b, struct entry *entry);

static bool exit_run_one(struct bt_vcpu *b, struct entry *entry)
{
    interp_run_one(&b->c);
    return false;
}

/* The ways back to user mode. */
static bool exit_sysret(struct bt_vcpu *b, struct entry *entry)
{
    interp_run_one(&b->c);
    direct_user_entered(b);
    return false;
}

static bool exit_miss(struct bt_vcpu *b, struct entry *entry)
{
    if (is_cold(b)) {
        run_cold(b);
        return false;
    }
    struct bt_block *block = block_lock(b);
    if (!block) {
        interp_run_next(&b->c);
        return false;
    }
    *entry = (struct entry){block->tc_start, b->engine->epoch, b->engine->invalidations};
    pthread_mutex_unlock(&b->engine->lock);
    return true;
}

/* A page of the same physical address only: other mappings of the source's page share its code. */
static void link_patch(struct bt_engine *e, uint32_t site, const struct bt_block *target)
{
    const struct bt_block *source = cache_find(e, (uintptr_t)e->layout.tc_exec + site);
    if (source && source->page == target->page)
        __atomic_store_n((uint32_t *)(e->layout.tc_write + site), target->tc_chain - (site + 4), __ATOMIC_RELEASE);
}

/* The way from a block whose group would cross a page to the rest of it without groups. */
static bool exit_link_careful(struct bt_vcpu *b, struct entry *entry)
{
    struct bt_engine *e = b->engine;
    uint32_t site = (uint32_t)b->link_site & ~BT_LINK_CAREFUL;
    unsigned start = b->c.v.cpu.gpr[GPR_RIP] & PAGE_MASK_BITS;
    simd_save(&b->c);
    pthread_mutex_lock(&e->lock);
    const struct bt_block *source = e->epoch == entry->epoch ? cache_find(e, (uintptr_t)e->layout.tc_exec + site) : NULL;
    struct bt_page *page = source && source->valid ? source->page : NULL;
    struct bt_block *block = page ? cache_block_careful(page, start) : NULL;
    if (page && !block && cache_room(e))
        block = translate(b, page, start, next_page(b, start), true);
    if (block && block->valid)
        link_patch(e, site, block);
    if (block)
        *entry = (struct entry){block->tc_start, e->epoch, e->invalidations};
    pthread_mutex_unlock(&e->lock);
    if (!block)
        interp_run_next(&b->c);
    return block != NULL;
}

static bool exit_link(struct bt_vcpu *b, struct entry *entry)
{
    if (b->link_site & BT_LINK_CAREFUL && !(b->link_site & BT_LINK_FAR))
        return exit_link_careful(b, entry);
    if (is_cold(b)) {
        run_cold(b);
        return false;
    }
    struct bt_engine *e = b->engine;
    uint64_t epoch = entry->epoch;
    uint32_t site = (uint32_t)b->link_site & ~BT_LINK_FAR;
    bool far = b->link_site & BT_LINK_FAR;
    struct bt_block *block = block_lock(b);
    if (!block) {
        interp_run_next(&b->c);
        return false;
    }
    if (block->valid && e->epoch == epoch && far)
        cache_link_far(e, site, block->page, block->start);
    else if (block->valid && e->epoch == epoch)
        link_patch(e, site, block);
    *entry = (struct entry){block->tc_start, e->epoch, e->invalidations};
    pthread_mutex_unlock(&e->lock);
    return true;
}

/* Attention is raised already, unless IF was set just now with an interrupt waiting, or the cache wants everybody outside. */
static bool exit_attention(struct bt_vcpu *b, struct entry *entry)
{
    if (b->c.interrupt_waiting && (b->c.v.cpu.rflags & RFLAGS_IF))
        vcpu_raise_attention(&b->c.v);
    return false;
}

/* Makes the old block's chain entry a jump to the new one's: jumps inside the page lead there. The world is stopped, so nobody is in between. */
static void block_redirect(struct bt_engine *e, const struct bt_block *old, const struct bt_block *new)
{
    uint8_t *at = e->layout.tc_write + old->tc_chain;
    if (old->tc_end - old->tc_chain < JUMP_BYTES)
        return;
    at[0] = 0xe9; /* JMP rel32 */
    *(uint32_t *)(at + 1) = new->tc_chain - (old->tc_chain + JUMP_BYTES);
    __atomic_store_n(&e->rewrites, e->rewrites + 1, __ATOMIC_RELEASE);
}

/* A site that keeps needing the interpreter is translated in another way. */
static void site_note(struct bt_vcpu *b, uint32_t tc, uint64_t epoch, bool crossing)
{
    struct bt_engine *e = b->engine;
    uint8_t *count = &b->site_counts[(tc * 0x9e3779b9u) >> 24];
    if (++*count < (crossing ? CROSSING_PATIENCE : MMIO_PATIENCE))
        return;
    *count = 0;
    uintptr_t address = (uintptr_t)e->layout.tc_exec + tc;
    cache_exclusive_begin(e, b);
    struct bt_block *block = e->epoch == epoch ? cache_find(e, address) : NULL;
    const struct bt_site *site = block ? cache_site(e, block, address) : NULL;
    if (site) {
        cache_mark(e, block->page, site->page_offset, crossing ? BT_MARK_CROSSES : BT_MARK_CALLS);
    }
    if (site && block->valid) {
        cache_block_drop(e, block);
        struct bt_block *new = cache_room(e) ? translate(b, block->page, block->start, block->page->crosses ? block->page->crosses->offset : ~0ull, block->careful) : NULL;
        if (new)
            block_redirect(e, block, new);
    }
    cache_exclusive_end(e, b);
}

static bool exit_data(struct bt_vcpu *b, struct entry *entry)
{
    const uint64_t *counters = b->c.v.counters;
    uint64_t mmio = counters[COUNTER_mmio_reads] + counters[COUNTER_mmio_writes];
    bool crossing = b->fault_crossing, opaque = b->fault_opaque;
    uint32_t tc = b->fault_tc;
    uint64_t epoch = entry->epoch;
    interp_run_one(&b->c);
    if (!tc) /* left without a signal: translated in the other way already */
        return false;
    if (crossing || opaque || counters[COUNTER_mmio_reads] + counters[COUNTER_mmio_writes] != mmio)
        site_note(b, tc, epoch, crossing);
    return false;
}

static void page_fault(struct bt_vcpu *b)
{
    struct icpu *c = &b->c;
    c->fault = (struct fault){.vector = VECTOR_PF, .has_error = true, .error = b->fill_error & ~BT_FILL_FAULT, .address = b->fault_address};
    exception_deliver(c);
}

static bool exit_page_fault(struct bt_vcpu *b, struct entry *entry)
{
    page_fault(b);
    return false;
}

/* The way back from a page fault: what was missing then is asked for next. */
static bool exit_iret(struct bt_vcpu *b, struct entry *entry)
{
    static const struct insn iretq = {.fn = op_iret, .op_size = 8, .length = 2, .mnemonic = ZYDIS_MNEMONIC_IRETQ};
    struct fault *fault = &b->c.fault;
    interp_run_insn(&b->c, &iretq);
    if (fault->vector == VECTOR_PF && !(fault->error & PF_I))
        b->fill_next = fault->address;
    fault->vector = 0;
    direct_user_entered(b);
    return false;
}

static exit_fn *const exit_handlers[BT_EXIT_COUNT] = {
    [BT_EXIT_miss] = exit_miss,
    [BT_EXIT_link] = exit_link,
    [BT_EXIT_interp] = exit_run_one,
    [BT_EXIT_attention] = exit_attention,
    [BT_EXIT_data] = exit_data,
    [BT_EXIT_page_fault] = exit_page_fault,
    [BT_EXIT_crossing] = exit_run_one,
    [BT_EXIT_string] = exit_run_one,
    [BT_EXIT_code_write] = exit_run_one,
    [BT_EXIT_trap] = exit_run_one,
    [BT_EXIT_syscall] = exit_run_one,
    [BT_EXIT_sysret] = exit_sysret,
    [BT_EXIT_iret] = exit_iret,
    [BT_EXIT_halt] = exit_run_one,
};

/* ---- the loop ---- */

/*
 * RF keeps code breakpoints from the next instruction and is cleared by it (SDM vol. 3, 17.3.1.1). Without breakpoints nothing but an interrupt that comes before that instruction
 * could tell that it is cleared earlier; every return from a page fault would be interpreted otherwise, and all rounds of a REP one by one.
 */
static bool resume_flag_dropped(struct icpu *c)
{
    struct cpu_state *cpu = &c->v.cpu;
    if (!(cpu->rflags & RFLAGS_RF) || (cpu->rflags & RFLAGS_TF) || (cpu->dr[7] & DR7_ENABLES) || cpu->interrupt_shadow)
        return false;
    cpu->rflags &= ~RFLAGS_RF;
    interp_mode_changed(c);
    return true;
}

static void debug_turn(struct bt_vcpu *b)
{
    simd_save(&b->c);
    b->engine->debug.turn(b, b->engine->debug.opaque);
}

static void segment_guards_set(struct bt_vcpu *b)
{
    unsigned flat = bt_flat_segments(&b->c.v.cpu);
    b->segment_guard[0] = flat >> SEG_FS & 1 ? b->poll_quiet : b->engine->layout.poison;
    b->segment_guard[1] = flat >> SEG_GS & 1 ? b->poll_quiet : b->engine->layout.poison;
}

static void run_translated(struct bt_vcpu *b)
{
    struct entry entry = {0};
    enum bt_exit why;
    if (b->c.code_bits == 32)
        segment_guards_set(b);
    b->mode = bt_mode_of(&b->c, b->c.cpl == 3, b->c.code_bits);
    do {
        if (unlikely(b->engine->debug.turn != NULL))
            debug_turn(b);
        why = enter(b, &entry);
        b->c.tally = b->interpreted[why];
    } while (exit_handlers[why](b, &entry));
}

static enum attend_result attend(struct bt_vcpu *b)
{
    bool user = b->c.cpl == 3;
    enum attend_result result = interp_attend(&b->c);
    if (result != ATTEND_DELIVERED)
        return result;
    if (user)
        direct_tick(b);
    return interp_attend(&b->c); /* raised again by the delivery: now, while the vector state is out of the way, rather than on the way into translated code */
}

static __attribute__((noinline)) enum engine_exit run_loop(struct bt_vcpu *b)
{
    struct icpu *c = &b->c;
    enum engine_exit exit;
    for (;;) {
        if (unlikely(atomic_load_explicit(&c->v.attention, memory_order_relaxed)) && attend(b) == ATTEND_EXIT)
            return ENGINE_EXIT_ATTENTION;
        if (unlikely(c->v.cpu.activity != CPU_RUNNING)) {
            if (interp_stopped(c, &exit))
                return exit;
        } else if (c->slow && !resume_flag_dropped(c)) {
            c->tally = b->interpreted[BT_TALLY_SLOW];
            interp_run_one(c);
        } else if (b->interp_blocks) {
            b->interp_blocks--;
            c->tally = b->interpreted[BT_TALLY_THRASH];
            interp_run_next(c);
        } else if (direct_active(b) && direct_wanted(b)) {
            if (direct_run(b) == DIRECT_LOST)
                return ENGINE_EXIT_ERROR;
        } else if (!bt_usable(b) || !is_dispatched(c)) {
            c->tally = b->interpreted[BT_TALLY_MODE];
            interp_run_next(c);
        } else if (b->cold && b->cold->here && is_cold(b)) {
            run_cold(b);
        } else {
            run_translated(b);
        }
    }
}

static enum engine_exit bt_run(struct vcpu *v)
{
    struct bt_vcpu *b = (struct bt_vcpu *)v;
    struct icpu *c = &b->c;
    enum engine_exit exit = ENGINE_EXIT_SHUTDOWN;
    int rc = fault_thread_enter(b);
    if (rc) {
        log_error("processor %u cannot have a signal stack: %s", v->index, strerror(-rc));
        return ENGINE_EXIT_ERROR;
    }
    direct_thread_enter(b);
    int why = setjmp(c->escape);
    if (!why)
        interp_enter(c);
    else
        interp_recover(c, why);
    if (v->cpu.activity != CPU_SHUTDOWN)
        exit = run_loop(b);
    if (exit == ENGINE_EXIT_HALT)
        cold_idle(b);
    interp_leave(c);
    direct_thread_leave(b);
    fault_thread_leave(b);
    return exit;
}

/* ---- engine and vCPUs ---- */

static int processor_check(struct error *err)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(ebx & bit_BMI2))
        return error_set(err, -ENOTSUP, "engine \"bt\" needs a processor with BMI2 (RORX, PEXT)");
    if (!host_fsgsbase()) /* which also says that SS_AUTODISARM is there */
        return error_set(err, -ENOTSUP, "engine \"bt\" needs WRGSBASE in user mode: a processor with FSGSBASE and Linux 5.9 or later");
    return 0;
}

static int bt_probe(struct error *err)
{
    int rc = processor_check(err);
    return rc ? rc : layout_probe(err);
}

void bt_debug_set(struct engine *engine, const struct bt_debug *debug)
{
    ((struct bt_engine *)engine)->debug = *debug;
}

static void bt_destroy(struct engine *engine)
{
    struct bt_engine *e = (struct bt_engine *)engine;
    fault_engine_remove(e);
    report_options_clear(e);
    cache_destroy(e);
    forms_destroy(e->forms);
    layout_destroy(&e->layout);
    interp_engine_fini(&e->interp);
    free(e);
}

static int bt_create(struct engine **out, struct physmap *memory, struct error *err)
{
    int rc = processor_check(err);
    if (rc)
        return rc;
    struct bt_engine *e = calloc(1, sizeof(*e));
    if (!e)
        return error_set(err, -ENOMEM, "no memory for the translator");
    interp_engine_init(&e->interp, memory);
    e->debug = (struct bt_debug){.block_insns = BT_BLOCK_INSNS_MAX, .group_span = BT_GROUP_SPAN_MAX, .tc_bytes = BT_TC_BYTES};
    e->fsgsbase = true;
    e->avx512 = (host_xcr0() & XCR0_AVX512) == XCR0_AVX512;
    rc = fault_install(err);
    if (rc)
        goto fail;
    rc = layout_create(&e->layout, memory, BT_TC_BYTES, err);
    if (rc)
        goto fail;
    stubs_create(e);
    rc = cache_create(e, err);
    if (rc)
        goto fail_layout;
    e->forms = forms_create(); /* without, decoding is slower */
    rc = fault_engine_add(e);
    if (rc) {
        rc = error_set(err, rc, "too many translators in one process");
        goto fail_cache;
    }
    *out = &e->interp;
    return 0;

fail_cache:
    forms_destroy(e->forms);
    cache_destroy(e);
fail_layout:
    layout_destroy(&e->layout);
fail:
    interp_engine_fini(&e->interp);
    free(e);
    return rc;
}

static void bt_vcpu_destroy(struct vcpu *v)
{
    struct bt_vcpu *b = (struct bt_vcpu *)v;
    direct_destroy(b);
    free(b->cold);
    icpu_destroy(&b->c);
    fault_vcpu_destroy(b);
    report_vcpu_destroy(b);
    tables_destroy(b);
}

/* What the guest invalidates goes to the tables and to the shadows of direct execution. */

static void flush_all(struct icpu *c)
{
    tables_flush_all(c);
    direct_flush((struct bt_vcpu *)c, DIRECT_ALL_ASIDS);
}

static void flush_non_global(struct icpu *c, unsigned asid)
{
    tables_flush_non_global(c, asid);
    direct_flush((struct bt_vcpu *)c, asid);
}

static void load_cr3(struct icpu *c, bool keep)
{
    struct bt_vcpu *b = (struct bt_vcpu *)c;
    tables_load_cr3(c, keep);
    direct_switch(b, keep);
}

static void flush_page(struct icpu *c, gva_t gva)
{
    tables_flush_page(c, gva);
    direct_flush_page((struct bt_vcpu *)c, gva);
}

static int bt_vcpu_create(struct engine *engine, const struct vcpu_config *config, struct vcpu **out, struct error *err)
{
    static const struct tlb_listener listener = {flush_all, flush_non_global, load_cr3, flush_page};
    struct bt_engine *e = (struct bt_engine *)engine;
    const struct icpu_sizes sizes = {.blocks_bytes = e->patient ? COLD_BLOCKS_BYTES : BLOCKS_BYTES, .stubs_bytes = 2u << 20};
    struct bt_vcpu *b;
    int rc = tables_create(e, &b, err);
    if (rc)
        return rc;
    rc = report_vcpu_create(b);
    if (rc) {
        tables_destroy(b);
        return error_set(err, rc, "no memory for vCPU %u", config->index);
    }
    b->engine = e;
    b->c.tlb_listener = &listener;
    b->c.memory_shift = e->layout.window_w - (uint8_t *)physmap_get(config->memory, 0, PAGE_SIZE_BYTES, PHYSMAP_READ);
    b->mask_low12 = PAGE_MASK_BITS;
    b->mask_bit12 = PAGE_SIZE_BYTES;
    b->mask_arith = RFLAGS_OSZAPC | RFLAGS_DF;
    polls_reset(b);
    b->cold = e->patient ? cold_create() : NULL; /* without, more is translated */
    rc = icpu_create(&b->c, &e->interp, &bt_engine_ops, config, &sizes);
    if (rc) {
        bt_vcpu_destroy(&b->c.v);
        return error_set(err, rc, "cannot create vCPU %u: %s", config->index, strerror(-rc));
    }
    rc = fault_vcpu_create(b);
    if (rc == 0)
        rc = direct_create(b, e->direct);
    if (rc) {
        bt_vcpu_destroy(&b->c.v);
        return error_set(err, rc, "no memory for vCPU %u", config->index);
    }
    *out = &b->c.v;
    return 0;
}

static void bt_invalidate(struct engine *engine, gpa_t gpa, uint64_t length_bytes)
{
    interp_invalidate(engine, gpa, length_bytes);
    cache_memory_changed(engine, gpa, length_bytes);
}

static void bt_state_changed(struct vcpu *v)
{
    interp_state_changed(v);
    direct_forget((struct bt_vcpu *)v);
}

const struct engine_ops bt_engine_ops = {
    .name = "bt",
    .help = "binary translator: guest code runs as translations of itself",
    .probe = bt_probe,
    .tells = true,
    .create = bt_create,
    .destroy = bt_destroy,
    .set_options = report_options_set,
    .counters = report_counters,
    .vcpu_create = bt_vcpu_create,
    .vcpu_destroy = bt_vcpu_destroy,
    .run = bt_run,
    .step = interp_step,
    .kick = kick_everywhere,
    .state_changed = bt_state_changed,
    .invalidate = bt_invalidate,
    .report = report_print,
};
