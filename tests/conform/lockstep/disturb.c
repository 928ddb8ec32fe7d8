/*
 * What the translator goes through on one side: disturbances that must change nothing, small blocks for a trace, and the deliberate error that the test has to find.
 *
 * All of it happens in the hook that the translator calls on each way into translated code, and follows from the seed. Threading: the side's only thread.
 */
#include "lockstep.h"

#define ODDS_MAX 400 /* one turn in so many is disturbed, at least */
#define KICKS_MAX 500
#define KICK_ODDS 300  /* one turn in so many begins a stretch of kicked ones */
#define ASYNC_ODDS 100 /* one kicked turn in so many lets time go on */
#define TC_SPARE_MAX (8u << 20)

static uint32_t pick(struct side *s, uint32_t limit)
{
    s->random = s->random * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)((s->random >> 33) % limit);
}

static void flush(struct bt_vcpu *b)
{
    cache_exclusive_begin(b->engine, b);
    cache_flush(b->engine);
    cache_exclusive_end(b->engine, b);
}

static void limits_change(struct side *s, struct bt_debug *debug)
{
    debug->block_insns = (uint16_t)(1 + pick(s, pick(s, 2) ? BT_BLOCK_INSNS_MAX : 4));
    debug->group_span = (uint16_t)(pick(s, 2) ? 0 : pick(s, BT_GROUP_SPAN_MAX + 1));
}

static void some_block_drop(struct side *s, struct bt_engine *e)
{
    pthread_mutex_lock(&e->lock);
    if (e->block_count)
        cache_block_drop(e, &e->blocks[pick(s, e->block_count)]);
    pthread_mutex_unlock(&e->lock);
}

static void some_page_drop(struct side *s, struct bt_engine *e)
{
    pthread_mutex_lock(&e->lock);
    if (e->page_count)
        cache_page_drop(e, e->page_store[pick(s, e->page_count)].offset);
    pthread_mutex_unlock(&e->lock);
}

/* An instruction is translated in another way from now on. */
static void some_site_mark(struct side *s, struct bt_engine *e)
{
    pthread_mutex_lock(&e->lock);
    if (e->block_count) {
        const struct bt_block *block = &e->blocks[pick(s, e->block_count)];
        unsigned site = block->site_count ? block->site_first + pick(s, block->site_count) : 0;
        if (block->valid && block->site_count)
            cache_mark(e, block->page, e->sites[site].page_offset, pick(s, 4) ? BT_MARK_CROSSES : BT_MARK_CALLS);
        cache_page_drop(e, block->page->offset);
    }
    pthread_mutex_unlock(&e->lock);
}

static void disturb(struct side *s, struct bt_vcpu *b)
{
    struct bt_engine *e = b->engine;
    switch (pick(s, 200)) {
    case 0:
        flush(b);
        break;
    case 1 ... 20:
        some_page_drop(s, e);
        break;
    case 21 ... 80:
        some_block_drop(s, e);
        break;
    case 81 ... 90:
        some_site_mark(s, e);
        break;
    case 91 ... 95:
        tables_flush_all(&b->c);
        break;
    case 96 ... 110:
        tables_flush_non_global(&b->c, 0);
        break;
    case 111 ... 130:
        vcpu_raise_attention(&b->c.v);
        break;
    case 131 ... 150:
        limits_change(s, &e->debug);
        break;
    case 151:
        if (e->page_count)
            e->code_flags[e->page_store[pick(s, e->page_count)].offset / PAGE_SIZE_BYTES] |= BT_CODE_THRASH;
        break;
    default:
        tables_flush_page(&b->c, b->c.v.cpu.gpr[pick(s, 16)]);
    }
}

/* ---- the deliberate error ---- */

static void error_make(struct side *s, struct bt_vcpu *b)
{
    const struct plan *plan = &s->plan;
    s->error_made = true;
    if (plan->error_register < GPR_RIP)
        b->c.v.cpu.gpr[plan->error_register] ^= 1ull << 5;
    else
        *(uint8_t *)physmap_get(b->c.v.memory, plan->error_gpa, 1, PHYSMAP_WRITE) ^= 1;
    fprintf(stderr, "error made: at %#llx, after event %llu\n", (unsigned long long)b->c.v.cpu.gpr[GPR_RIP], (unsigned long long)s->number - 1);
}

/* ---- interrupts anywhere ---- */

static void kick(struct side *s, struct bt_vcpu *b)
{
    if (!s->kicks && !pick(s, KICK_ODDS))
        s->kicks = 1 + pick(s, KICKS_MAX);
    if (!s->kicks)
        return;
    s->kicks--;
    b->engine->debug.kick = true;
    if (pick(s, ASYNC_ODDS))
        return;
    s->async_due = true;
    vcpu_raise_attention(&b->c.v);
}

/* ---- the hook ---- */

static void turn(struct bt_vcpu *b, void *opaque)
{
    struct side *s = opaque;
    gva_t rip = b->c.v.cpu.gpr[GPR_RIP];
    if (s->plan.error && !s->error_made && s->number > s->plan.error_event)
        error_make(s, b);
    if (s->tracing) {
        side_trace(s, true);
        if (rip != s->last_turn) /* once more here: translated meanwhile */
            flush(b);
        s->last_turn = rip;
        return;
    }
    if (s->plan.anywhere)
        kick(s, b);
    if (s->plan.disturb && !pick(s, ODDS_MAX)) {
        disturb(s, b);
    }
}

void disturb_prepare(struct side *s)
{
    struct bt_debug debug = {.block_insns = BT_BLOCK_INSNS_MAX, .group_span = BT_GROUP_SPAN_MAX, .tc_bytes = BT_TC_BYTES};
    const struct plan *plan = &s->plan;
    if (plan->disturb || plan->anywhere || plan->error || plan->trace_from) {
        debug.turn = turn;
        debug.opaque = s;
    }
    if (plan->disturb && pick(s, 2))
        limits_change(s, &debug);
    if (plan->disturb && pick(s, 2))
        debug.tc_bytes = ((struct bt_engine *)s->machine->engine)->stubs.end + pick(s, TC_SPARE_MAX);
    bt_debug_set(s->machine->engine, &debug);
}

void disturb_trace_begin(struct side *s)
{
    struct bt_engine *e = (struct bt_engine *)s->machine->engine;
    e->debug.block_insns = s->plan.trace_block_insns;
    if (s->plan.trace_block_insns == 1)
        e->debug.group_span = 0;
}
