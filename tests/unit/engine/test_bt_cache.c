/*
 * The cache of translations alone: random operations against a model, its limits, writers on other threads, and stopping the world.
 * The rest of the translator is stand-ins: "code" is nothing, a kick is a flag.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "engine/bt/direct.h"

#define STUBS_END 1000u
#define POISON 1u

/* ---- stand-ins ---- */

void bt_kick(struct vcpu *v)
{
    struct bt_vcpu *b = (struct bt_vcpu *)v;
    atomic_store_explicit(&b->poll, POISON, memory_order_release);
}

static bool released = true;

bool direct_release(struct bt_engine *engine, uint64_t ram_offset)
{
    return released;
}

void simd_save_slow(struct icpu *c)
{
    c->simd_live = false;
    c->debug_hits++; /* counts */
}

void simd_load(struct icpu *c)
{
    c->simd_live = true;
}

/* ---- rig ---- */

struct rig {
    struct bt_engine e;
    int zero;
    uint32_t random;
};

static void *map_or_fail(uint64_t bytes, int prot)
{
    void *at = mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(at != MAP_FAILED);
    return at;
}

static void rig_open(struct rig *r, uint64_t ram_pages)
{
    struct error err = {0};
    struct bt_layout *l = &r->e.layout;
    *r = (struct rig){.random = 12345, .zero = open("/dev/zero", O_RDONLY | O_CLOEXEC)};
    assert_true(r->zero >= 0);
    assert_int_equal(physmap_create(&r->e.interp.memory, ram_pages * PAGE_SIZE_BYTES, &err), 0);
    pthread_mutex_init(&r->e.interp.lock, NULL);
    l->ram_bytes = ram_pages * PAGE_SIZE_BYTES;
    l->window_w = map_or_fail(l->ram_bytes, PROT_NONE);
    l->window_r = map_or_fail(l->ram_bytes, PROT_NONE);
    assert_int_equal(physmap_map(r->e.interp.memory, l->window_w, PROT_READ | PROT_WRITE), 0);
    assert_int_equal(physmap_map(r->e.interp.memory, l->window_r, PROT_READ), 0);
    l->dt_pool = map_or_fail((BT_CODE_PAGES_MAX + 1) * BT_DT_BYTES, PROT_READ | PROT_WRITE);
    l->tc_bytes = 1u << 20;
    l->tc_exec = (uint8_t *)0x40000000; /* never touched */
    l->tc_write = map_or_fail(l->tc_bytes, PROT_READ | PROT_WRITE);
    r->e.stubs.end = STUBS_END;
    assert_int_equal(cache_create(&r->e, &err), 0);
}

static void rig_close(struct rig *r)
{
    struct bt_layout *l = &r->e.layout;
    cache_destroy(&r->e);
    munmap(l->window_w, l->ram_bytes);
    munmap(l->window_r, l->ram_bytes);
    munmap(l->dt_pool, (BT_CODE_PAGES_MAX + 1) * BT_DT_BYTES);
    munmap(l->tc_write, l->tc_bytes);
    physmap_destroy(r->e.interp.memory);
    pthread_mutex_destroy(&r->e.interp.lock);
    close(r->zero);
}

static uint32_t pick(uint32_t *random, uint32_t limit)
{
    *random = *random * 1664525 + 1013904223;
    return (uint32_t)((uint64_t)*random * limit >> 32);
}

static bool window_writable(struct rig *r, uint64_t page)
{
    uint8_t *at = r->e.layout.window_w + page * PAGE_SIZE_BYTES + 4095;
    return read(r->zero, at, 1) == 1;
}

static struct bt_mode mode_of(unsigned n)
{
    return (struct bt_mode){.code_bits = n == 2 ? 32 : 64, .user = n == 1, .flat = n == 2 ? 0x3f : 0};
}

static uint64_t ram_gpa(struct rig *r, uint64_t page)
{
    return physmap_gpa(r->e.interp.memory, page * PAGE_SIZE_BYTES);
}

static struct bt_page *page_get(struct rig *r, uint64_t page, unsigned mode)
{
    struct bt_mode m = mode_of(mode);
    return cache_page(&r->e, page * PAGE_SIZE_BYTES, ram_gpa(r, page), &m);
}

static struct bt_block *publish(struct rig *r, struct bt_page *page, unsigned start, unsigned tc_bytes, unsigned sites)
{
    struct bt_site site[8];
    struct bt_block block = {.page = page, .start = (uint16_t)start, .length = 3, .insns = 2, .site_count = (uint16_t)sites, .hot_sites = (uint16_t)sites};
    block.tc_start = r->e.tc_used;
    block.tc_chain = block.tc_start + 4;
    block.tc_end = block.tc_start + tc_bytes;
    block.cold_start = r->e.cold_used;
    block.cold_end = block.cold_start + (tc_bytes % 3 ? tc_bytes / 8 : 0);
    for (unsigned n = 0; n < sites; n++)
        site[n] = (struct bt_site){.tc_offset = (uint16_t)(4 + n * tc_bytes / 16), .page_offset = (uint16_t)(start + n)};
    return cache_publish(&r->e, &block, site);
}

/* ---- random operations against a model ---- */

#define PAGES 24u
#define MODES 3u
#define STARTS 16u
#define BLOCKS 20000u

struct model_block {
    uint8_t page, mode, start, sites;
    uint32_t tc_start, tc_end;
};

struct model {
    struct model_block all[BLOCKS]; /* since the last flush */
    uint32_t count;
    int32_t at[PAGES][MODES][STARTS]; /* index of the valid block, or -1 */
    bool present[PAGES];
    unsigned thrash[PAGES];
};

static void model_flush(struct model *m)
{
    m->count = 0;
    memset(m->at, -1, sizeof(m->at));
    memset(m->present, 0, sizeof(m->present));
    for (unsigned n = 0; n < PAGES; n++)
        m->thrash[n] /= 2;
}

static void model_page_drop(struct model *m, unsigned page)
{
    if (m->present[page] && m->thrash[page] < 15)
        m->thrash[page]++;
    m->present[page] = false;
    memset(m->at[page], -1, sizeof(m->at[page]));
}

static void compare(struct rig *r, struct model *m)
{
    unsigned protected_pages = 0;
    for (unsigned page = 0; page < PAGES; page++) {
        assert_int_equal(r->e.code_flags[page], (m->present[page] ? BT_CODE_PRESENT : 0) | m->thrash[page] << 4);
        assert_int_equal(window_writable(r, page), !m->present[page]);
        protected_pages += m->present[page];
    }
    assert_int_equal(r->e.protected_pages, protected_pages);
    for (uint32_t n = 0; n < r->e.page_count; n++) {
        struct bt_page *page = &r->e.page_store[n];
        unsigned mode = page->mode.code_bits == 32 ? 2 : page->mode.user, valid = 0, number = (unsigned)(page->offset / PAGE_SIZE_BYTES);
        assert_ptr_equal(page->dt, r->e.layout.dt_pool + (n + 1) * BT_DT_BYTES);
        for (unsigned start = 0; start < PAGE_SIZE_BYTES; start++) {
            int32_t wanted = start < STARTS ? m->at[number][mode][start] : -1;
            assert_int_equal(page->dt[start], wanted < 0 ? 0 : m->all[wanted].tc_start);
            struct bt_block *block = start < STARTS ? cache_block(&r->e, page, start) : NULL;
            assert_int_equal(block != NULL, wanted >= 0);
            assert_true(!block || (block->valid && block->start == start && block->page == page));
            valid += wanted >= 0;
        }
        for (struct bt_block *block = page->blocks; block; block = block->next)
            valid--;
        assert_int_equal(valid, 0);
    }
}

static void check_find_cold(struct rig *r)
{
    uint32_t offset = cache_cold_base(&r->e) + pick(&r->random, r->e.cold_used - cache_cold_base(&r->e) + 100);
    const struct bt_block *found = cache_find(&r->e, (uintptr_t)r->e.layout.tc_exec + offset), *wanted = NULL;
    for (uint32_t n = 0; n < r->e.block_count; n++)
        if (offset >= r->e.blocks[n].cold_start && offset < r->e.blocks[n].cold_end)
            wanted = &r->e.blocks[n];
    assert_ptr_equal(found, wanted);
}

static void check_find(struct rig *r, struct model *m)
{
    uint32_t offset = pick(&r->random, r->e.tc_used + 100), low = 0;
    const struct bt_block *found = cache_find(&r->e, (uintptr_t)r->e.layout.tc_exec + offset);
    const struct model_block *wanted = NULL;
    for (; low < m->count && !wanted; low++)
        if (offset >= m->all[low].tc_start && offset < m->all[low].tc_end)
            wanted = &m->all[low];
    assert_int_equal(found != NULL, wanted != NULL);
    assert_null(cache_find(&r->e, (uintptr_t)r->e.layout.tc_exec - 1));
    check_find_cold(r);
    if (!found)
        return;
    assert_int_equal(found->tc_start, wanted->tc_start);
    assert_int_equal(found->page->offset, wanted->page * PAGE_SIZE_BYTES);
    const struct bt_site *site = cache_site(&r->e, found, (uintptr_t)r->e.layout.tc_exec + offset);
    int n = -1;
    for (unsigned s = 0; s < wanted->sites; s++)
        if (offset - wanted->tc_start >= 4 + s * (wanted->tc_end - wanted->tc_start) / 16)
            n = (int)s;
    assert_int_equal(site ? site->page_offset - found->start : -1, n);
}

static void random_publish(struct rig *r, struct model *m)
{
    struct model_block block = {.page = (uint8_t)pick(&r->random, PAGES), .mode = (uint8_t)pick(&r->random, MODES),
                                .start = (uint8_t)pick(&r->random, STARTS), .sites = (uint8_t)pick(&r->random, 8)};
    if (!cache_room(&r->e) || m->count == BLOCKS) {
        cache_flush(&r->e);
        model_flush(m);
    }
    struct bt_page *page = page_get(r, block.page, block.mode);
    assert_non_null(page);
    assert_ptr_equal(page_get(r, block.page, block.mode), page);
    struct bt_block *made = publish(r, page, block.start, 16 + pick(&r->random, 400), block.sites);
    assert_true(made && made->valid);
    block.tc_start = made->tc_start;
    block.tc_end = made->tc_end;
    m->at[block.page][block.mode][block.start] = (int32_t)m->count;
    m->all[m->count++] = block;
    m->present[block.page] = true;
}

static void random_step(struct rig *r, struct model *m)
{
    unsigned page = pick(&r->random, PAGES), mode = pick(&r->random, MODES), start = pick(&r->random, STARTS);
    switch (pick(&r->random, 200)) {
    case 0:
        cache_page_drop(&r->e, page * PAGE_SIZE_BYTES + start);
        model_page_drop(m, page);
        break;
    case 1: {
        uint8_t bytes[5000] = {0};
        uint64_t length = 1 + pick(&r->random, sizeof(bytes));
        uint64_t at = page * PAGE_SIZE_BYTES + pick(&r->random, 4096);
        if (physmap_write(r->e.interp.memory, at, bytes, length) < 0)
            break;
        for (uint64_t n = at / PAGE_SIZE_BYTES; n <= (at + length - 1) / PAGE_SIZE_BYTES; n++)
            model_page_drop(m, (unsigned)n);
        break;
    }
    case 2:
        if (pick(&r->random, 100) == 0) {
            cache_flush(&r->e);
            model_flush(m);
        }
        break;
    case 3 ... 20: {
        int32_t n = m->at[page][mode][start];
        if (n < 0)
            break;
        struct bt_block *block = cache_find(&r->e, (uintptr_t)r->e.layout.tc_exec + m->all[n].tc_start);
        cache_block_drop(&r->e, block);
        cache_block_drop(&r->e, block); /* the second does nothing */
        m->at[page][mode][start] = -1;
        break;
    }
    case 21 ... 60:
        check_find(r, m);
        break;
    default:
        random_publish(r, m);
    }
}

static void test_random(void **state)
{
    struct rig r;
    struct model *m = calloc(1, sizeof(*m));
    rig_open(&r, PAGES);
    assert_non_null(m);
    model_flush(m);
    for (unsigned n = 0; n < 30000; n++) {
        random_step(&r, m);
        if (n % 300 == 0)
            compare(&r, m);
    }
    cache_flush(&r.e);
    model_flush(m);
    compare(&r, m);
    assert_true(r.e.flushes > 2 && r.e.epoch == r.e.flushes && r.e.invalidations > 50);
    assert_true(r.e.tc_used >= STUBS_END + 4 && r.e.tc_used % 16 == 0);
    for (unsigned n = 0; n < BT_DT_BYTES; n++)
        assert_int_equal(r.e.layout.dt_pool[n], 0); /* never handed out */
    free(m);
    rig_close(&r);
}

/* ---- limits ---- */

static void test_pages_full(void **state)
{
    struct rig r;
    rig_open(&r, BT_CODE_PAGES_MAX + 1);
    for (unsigned n = 0; n < BT_CODE_PAGES_MAX; n++)
        assert_non_null(page_get(&r, n, 0));
    assert_null(page_get(&r, BT_CODE_PAGES_MAX, 0));
    assert_null(page_get(&r, 0, 1));
    assert_non_null(page_get(&r, 0, 0));
    assert_true(window_writable(&r, BT_CODE_PAGES_MAX));
    cache_flush(&r.e);
    for (unsigned n = 0; n < BT_CODE_PAGES_MAX; n++)
        assert_true(window_writable(&r, n));
    assert_non_null(page_get(&r, BT_CODE_PAGES_MAX, 0));
    rig_close(&r);
}

static void test_tc_full(void **state)
{
    struct rig r;
    unsigned blocks = 0;
    rig_open(&r, 1);
    struct bt_page *page = page_get(&r, 0, 0);
    for (; cache_room(&r.e); blocks++)
        publish(&r, page, blocks % 4096, BT_BLOCK_TC_MAX - 15, 1);
    assert_true(r.e.tc_used <= r.e.layout.tc_bytes);
    assert_int_equal(blocks, 25); /* of four fifths of 1 MiB; the stubs have the rest */
    cache_flush(&r.e);
    assert_true(cache_room(&r.e));
    rig_close(&r);
}

/* A block whose page was written before it could be published is never found. */
static void test_late_publish(void **state)
{
    struct rig r;
    rig_open(&r, 2);
    struct bt_page *page = page_get(&r, 1, 0);
    assert_int_equal(physmap_write(r.e.interp.memory, 4096, "x", 1), 0);
    struct bt_block *block = publish(&r, page, 5, 100, 1);
    assert_false(block->valid);
    assert_null(cache_block(&r.e, page, 5));
    assert_ptr_equal(cache_find(&r.e, (uintptr_t)r.e.layout.tc_exec + block->tc_start), block);
    cache_block_drop(&r.e, block);
    assert_ptr_equal(page_get(&r, 1, 0), page);
    assert_true(publish(&r, page, 5, 100, 1)->valid);
    assert_false(window_writable(&r, 1));
    rig_close(&r);
}

/* The host has no mapping to spare: no page is protected, and what needs one more mapping to be opened opens everything. */
static void test_mappings_full(void **state)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip(); /* they need mappings themselves */
#endif
    const uint64_t length = 200000 * PAGE_SIZE_BYTES;
    struct rig r;
    bool refused = false;
    rig_open(&r, 64);
    for (unsigned n = 10; n < 13; n++)
        publish(&r, page_get(&r, n, 0), 0, 100, 0);
    uint8_t *many = map_or_fail(length, PROT_NONE);
    for (uint64_t at = PAGE_SIZE_BYTES; at < length && !refused; at += 2 * PAGE_SIZE_BYTES)
        refused = mprotect(many + at, PAGE_SIZE_BYTES, PROT_READ) != 0;
    struct bt_page *page = refused ? page_get(&r, 40, 0) : NULL;
    cache_page_drop(&r.e, 11 * PAGE_SIZE_BYTES);
    munmap(many, length);
    if (!refused)
        skip();
    assert_null(page);
    for (unsigned n = 0; n < 64; n++) {
        assert_true(window_writable(&r, n));
        assert_false(r.e.code_flags[n] & BT_CODE_PRESENT);
    }
    assert_int_equal(r.e.protected_pages, 0);
    for (unsigned n = 10; n < 13; n++)
        assert_null(cache_block(&r.e, page_get(&r, n, 0), 0));
    rig_close(&r);
}

/* ---- writers on other threads ---- */

struct writer {
    struct rig *r;
    atomic_bool stop;
    atomic_uint writes;
};

static void *writer_main(void *opaque)
{
    struct writer *w = opaque;
    uint32_t random = 99;
    while (!atomic_load(&w->stop)) {
        uint32_t value = random;
        assert_int_equal(physmap_write(w->r->e.interp.memory, pick(&random, 8) * PAGE_SIZE_BYTES, &value, 4), 0);
        atomic_fetch_add(&w->writes, 1);
    }
    return NULL;
}

/* Translations made while another thread writes: in the end each that is still valid is one of the bytes that are there. */
static void test_writer(void **state)
{
    struct rig r;
    pthread_t thread;
    uint32_t read_from[8] = {0};
    rig_open(&r, 8);
    struct writer w = {.r = &r};
    for (unsigned round = 0; round < 20; round++) {
        atomic_store(&w.stop, false);
        atomic_store(&w.writes, 0);
        pthread_create(&thread, NULL, writer_main, &w);
        for (unsigned n = 0; n < 300 || atomic_load(&w.writes) < 20; n++) {
            unsigned number = pick(&r.random, 8);
            pthread_mutex_lock(&r.e.lock);
            if (!cache_room(&r.e))
                cache_flush(&r.e);
            struct bt_page *page = page_get(&r, number, 0);
            if (!cache_block(&r.e, page, 0)) {
                read_from[number] = *(volatile uint32_t *)(r.e.layout.window_r + number * PAGE_SIZE_BYTES);
                publish(&r, page, 0, 100, 1);
            }
            pthread_mutex_unlock(&r.e.lock);
            if (n % 8 == 0)
                sched_yield();
        }
        atomic_store(&w.stop, true);
        pthread_join(thread, NULL);
        for (unsigned number = 0; number < 8; number++)
            if (cache_block(&r.e, page_get(&r, number, 0), 0))
                assert_int_equal(read_from[number], *(volatile uint32_t *)(r.e.layout.window_r + number * PAGE_SIZE_BYTES));
    }
    assert_true(r.e.invalidations > 0);
    rig_close(&r);
}

static struct bt_vcpu *vcpu_add(struct rig *r, unsigned index)
{
    struct bt_vcpu *b = aligned_alloc(64, (sizeof(*b) + 63) / 64 * 64);
    assert_non_null(b);
    memset(b, 0, sizeof(*b));
    b->engine = &r->e;
    pthread_mutex_lock(&r->e.interp.lock);
    r->e.interp.vcpus[index] = &b->c;
    pthread_mutex_unlock(&r->e.interp.lock);
    return b;
}

/* Who was outside when a page was dropped is kicked, too: it may have looked the block up before. Pages without blocks disturb nobody. */
static void test_drop_kicks(void **state)
{
    struct rig r;
    rig_open(&r, 2);
    struct bt_vcpu *b = vcpu_add(&r, 3);
    publish(&r, page_get(&r, 0, 0), 0, 100, 1);
    page_get(&r, 1, 0);
    assert_int_equal(physmap_write(r.e.interp.memory, 4096, "x", 1), 0);
    assert_int_equal(b->poll, 0);
    assert_int_equal(physmap_write(r.e.interp.memory, 0, "x", 1), 0);
    assert_int_equal(b->poll, POISON);
    free(b);
    rig_close(&r);
}

/* ---- stopping the world ---- */

struct world {
    struct rig *r;
    atomic_uint owners;   /* of the stopped world: 0 or 1 */
    atomic_uint inside;
    atomic_bool stop;
    atomic_uint wrong;
};

struct runner {
    struct world *world;
    struct bt_vcpu *b; /* NULL: not a vCPU */
    uint32_t random;
    atomic_uint entries, stops;
};

static void stop_world(struct world *w, struct runner *who)
{
    struct bt_engine *e = &w->r->e;
    cache_exclusive_begin(e, who->b);
    if (atomic_fetch_add(&w->owners, 1) != 0 || atomic_load(&w->inside) != 0)
        atomic_fetch_add(&w->wrong, 1);
    publish(w->r, page_get(w->r, 0, 0), 0, 100, 1);
    cache_flush(e);
    atomic_fetch_sub(&w->owners, 1);
    cache_exclusive_end(e, who->b);
    who->stops++;
}

/* As the engine does it: reset, enter, run until kicked, leave. */
static void run_inside(struct world *w, struct runner *who)
{
    struct bt_vcpu *b = who->b;
    bool until_kicked = pick(&who->random, 4) == 0;
    atomic_store_explicit(&b->poll, 0, memory_order_relaxed);
    b->c.simd_live = true;
    cache_enter(b);
    atomic_fetch_add(&w->inside, 1);
    uint64_t epoch = __atomic_load_n(&w->r->e.epoch, __ATOMIC_ACQUIRE);
    for (unsigned n = 0; n < 20 || (until_kicked && !atomic_load(&w->stop)); n++) {
        if (atomic_load_explicit(&b->poll, memory_order_acquire) == POISON)
            break;
        if (n % 8 == 7)
            sched_yield();
    }
    if (atomic_load(&w->owners) != 0 || __atomic_load_n(&w->r->e.epoch, __ATOMIC_ACQUIRE) != epoch || !b->c.simd_live)
        atomic_fetch_add(&w->wrong, 1);
    atomic_fetch_sub(&w->inside, 1);
    cache_leave(b);
    who->entries++;
}

static void *runner_main(void *opaque)
{
    struct runner *who = opaque;
    struct world *w = who->world;
    while (!atomic_load(&w->stop)) {
        if (!who->b || pick(&who->random, 8) == 0)
            stop_world(w, who);
        else
            run_inside(w, who);
    }
    return NULL;
}

static void test_exclusive(void **state)
{
    struct rig r;
    rig_open(&r, 4);
    struct world w = {.r = &r};
    struct runner runner[4] = {0};
    pthread_t thread[4];
    for (unsigned n = 0; n < 4; n++) {
        runner[n] = (struct runner){.world = &w, .random = n, .b = n < 3 ? vcpu_add(&r, n) : NULL};
        pthread_create(&thread[n], NULL, runner_main, &runner[n]);
    }
    for (unsigned n = 0; n < 4; n++) /* until everybody had turns; the test's timeout notices who never has */
        while (atomic_load(&runner[n].stops) < 50 || (n < 3 && atomic_load(&runner[n].entries) < 50))
            usleep(10000);
    atomic_store(&w.stop, true);
    for (unsigned n = 0; n < 4; n++)
        pthread_join(thread[n], NULL);
    assert_int_equal(w.wrong, 0);
    assert_int_equal(r.e.world_wanted, 0);
    for (unsigned n = 0; n < 4; n++)
        free(runner[n].b);
    rig_close(&r);
}

static void *visit_main(void *opaque)
{
    struct bt_vcpu *b = opaque;
    cache_enter(b);
    while (atomic_load(&b->poll) != POISON)
        sched_yield();
    cache_leave(b);
    return NULL;
}

/* Nobody but the vCPU that leaves wakes the one who waits for it. */
static void test_leave_wakes(void **state)
{
    struct rig r;
    rig_open(&r, 1);
    struct bt_vcpu *b = vcpu_add(&r, 0);
    for (unsigned n = 0; n < 20; n++) {
        pthread_t thread;
        atomic_store(&b->poll, 0);
        pthread_create(&thread, NULL, visit_main, b);
        while (!atomic_load(&b->inside))
            sched_yield();
        cache_exclusive_begin(&r.e, NULL);
        assert_false(atomic_load(&b->inside));
        pthread_mutex_lock(&r.e.lock); /* keeps it */
        cache_exclusive_end(&r.e, NULL);
        assert_int_equal(pthread_mutex_unlock(&r.e.lock), 0);
        atomic_store(&b->poll, POISON); /* it may have stepped back before it could be kicked */
        pthread_join(thread, NULL);
    }
    free(b);
    rig_close(&r);
}

/* While a shadow can write to a page, nobody may count on its bytes. */
static void test_not_released(void **state)
{
    struct rig r;
    rig_open(&r, PAGES);
    pthread_mutex_lock(&r.e.lock);
    released = false;
    assert_null(page_get(&r, 3, 0));
    assert_true(window_writable(&r, 3));
    released = true;
    assert_non_null(page_get(&r, 3, 0));
    assert_false(window_writable(&r, 3));
    pthread_mutex_unlock(&r.e.lock);
    rig_close(&r);
}

static uint32_t displacement(const struct rig *r, uint32_t at)
{
    return *(const uint32_t *)(r->e.layout.tc_write + at);
}

/* Who was inside when what a jump compares with was changed may be about to jump: the branch waits until it has been outside. */
static void test_links_wait(void **state)
{
    struct rig r;
    rig_open(&r, 2);
    struct bt_vcpu *one = vcpu_add(&r, 1), *two = vcpu_add(&r, 2);
    uint32_t at = publish(&r, page_get(&r, 0, 0), 0, 100, 1)->tc_start + 40, unlinked = cache_cold_base(&r.e) + 64 - (at + 4);
    *(uint32_t *)(r.e.layout.tc_write + at) = unlinked;
    for (unsigned round = 0; round < 3; round++) {
        struct bt_page *page = page_get(&r, 1, 0);
        uint32_t linked = publish(&r, page, 8 * round, 100, 1)->tc_start - (at + 4);
        atomic_store(&two->poll, 0);
        if (round)
            cache_enter(two);
        cache_link_far(&r.e, at, page, 8 * round);
        assert_int_equal(displacement(&r, at - 5), (uint32_t)(r.e.layout.witness - (uint8_t *)&page->dt[8 * round]));
        for (unsigned n = 0; round && n < 20; n++) {
            assert_int_equal(displacement(&r, at), unlinked);
            cache_enter(one); /* it finds the comparison as it is now */
            cache_link_far(&r.e, at, page, 8 * round);
            cache_leave(one);
        }
        assert_int_equal(two->poll, round ? POISON : 0);
        if (round)
            cache_leave(two);
        if (round == 2)
            cache_enter(two);
        cache_link_far(&r.e, at, page, 8 * round);
        assert_int_equal(displacement(&r, at), linked);
        atomic_store(&two->inside, false);
        assert_int_equal(physmap_write(r.e.interp.memory, 4096, "x", 1), 0);
        assert_int_equal(displacement(&r, at), unlinked);
    }
    free(one);
    free(two);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random),        cmocka_unit_test(test_pages_full), cmocka_unit_test(test_tc_full), cmocka_unit_test(test_late_publish),
        cmocka_unit_test(test_mappings_full), cmocka_unit_test(test_writer),     cmocka_unit_test(test_drop_kicks),
        cmocka_unit_test(test_exclusive),     cmocka_unit_test(test_leave_wakes), cmocka_unit_test(test_not_released),
        cmocka_unit_test(test_links_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
