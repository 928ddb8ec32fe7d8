/*
 * The cache of translations: code pages, blocks, sites and the memory they live in; and stopping the world, which emptying it needs.
 *
 * Invariants, while nobody holds the lock: a RAM page has BT_CODE_PRESENT exactly when it is watched in PhysMap and read-only in window W, and every valid block lies in
 * such a page. A DT slot is the tc_start of the valid block that starts at that byte, or 0. Blocks ascend by tc_start, their sites lie in the same order. Nothing is given back before
 * a flush: TC, blocks, sites, pages and DT pages only grow, so whoever is inside translated code may go on in a dropped block until it polls.
 * A page is protected and watched before its bytes are read, so a write to it either is read or drops the translation.
 * Threading: e->lock, then PhysMap's and e->interp.lock. Without it: cache_enter, cache_leave, and cache_find and cache_site for those inside.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "engine/bt/direct.h"

#define HASH_BITS 11u
#define HASH_BUCKETS (1u << HASH_BITS)
#define TC_ALIGNMENT 16u
#define THRASH_ONE 0x10u
#define LINK_WAITS 1024u
#define LINK_PATIENCE 4u /* visits of a jump that waits to be linked, until other vCPUs are asked to come out */
#define LANDMARKS(tc_bytes) ((tc_bytes) / BT_LANDMARK_BYTES + 2) /* hot and cold each have one that is cut */

_Static_assert(BT_TC_BYTES + BT_DT_BYTES_MAX + BT_CODE_PAGES_MAX * sizeof(struct bt_page) + BT_MARKS * sizeof(uint64_t) + BT_BLOCKS_MAX * sizeof(struct bt_block) +
                       BT_SITES_MAX * sizeof(struct bt_site) + LANDMARKS(BT_TC_BYTES) * sizeof(uint32_t) + BT_LINKS_MAX * sizeof(struct bt_link) + HASH_BUCKETS * sizeof(struct bt_page *) <= BT_CACHE_BYTES_MAX,
               "the cache is larger than promised");
_Static_assert(BT_CODE_PAGES_MAX < BT_DT_PAGES, "the DT pool is too small");

/* ---- creation ---- */

static void *reserve(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

static void release(void *memory, uint64_t bytes)
{
    if (memory)
        munmap(memory, bytes);
}

/* Where a block may start after code that ends at `end`: its number is before it. */
static uint32_t tc_next(uint32_t end)
{
    return (uint32_t)((end + sizeof(uint32_t) + TC_ALIGNMENT - 1) & ~(TC_ALIGNMENT - 1));
}

static uint32_t *block_number(const struct bt_engine *e, uint32_t tc_start)
{
    return (uint32_t *)(e->layout.tc_write + tc_start - sizeof(uint32_t));
}

static uint32_t first_free_tc(const struct bt_engine *e)
{
    return tc_next(e->stubs.end);
}

int cache_create(struct bt_engine *e, struct error *err)
{
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&e->lock, &recursive);
    pthread_mutexattr_destroy(&recursive);
    pthread_cond_init(&e->world, NULL);
    e->tc_used = first_free_tc(e);
    e->cold_used = cache_cold_base(e);
    e->blocks = reserve(BT_BLOCKS_MAX * sizeof(*e->blocks));
    e->sites = reserve(BT_SITES_MAX * sizeof(*e->sites));
    e->landmarks = reserve(LANDMARKS(e->layout.tc_bytes) * sizeof(*e->landmarks));
    e->links = reserve(BT_LINKS_MAX * sizeof(*e->links));
    e->link_waits = reserve(LINK_WAITS * sizeof(*e->link_waits));
    e->marks = reserve(BT_MARKS * sizeof(*e->marks));
    e->page_store = reserve(BT_CODE_PAGES_MAX * sizeof(*e->page_store));
    e->pages = reserve(HASH_BUCKETS * sizeof(*e->pages));
    e->code_flags = reserve(e->layout.ram_bytes / PAGE_SIZE_BYTES);
    e->code_tells = reserve(e->layout.ram_bytes / PAGE_SIZE_BYTES * sizeof(*e->code_tells));
    if (!e->blocks || !e->sites || !e->landmarks || !e->links || !e->link_waits || !e->marks || !e->page_store || !e->pages || !e->code_flags || !e->code_tells) {
        cache_destroy(e);
        return error_set(err, -ENOMEM, "no memory for the table of translations");
    }
    physmap_watch_set(e->interp.memory, cache_memory_changed, e);
    return 0;
}

static void flags_set_present(struct bt_engine *e, uint64_t ram_offset, bool present)
{
    uint8_t *flags = &e->code_flags[ram_offset / PAGE_SIZE_BYTES];
    uint8_t value = present ? *flags | BT_CODE_PRESENT : *flags & (uint8_t)~BT_CODE_PRESENT;
    __atomic_store_n(flags, value, __ATOMIC_RELAXED);
    physmap_watch_page(e->interp.memory, physmap_gpa(e->interp.memory, ram_offset), present);
}

static bool is_present(const struct bt_engine *e, uint64_t ram_offset)
{
    return e->code_flags[ram_offset / PAGE_SIZE_BYTES] & BT_CODE_PRESENT;
}

/* No page is watched or protected any more. */
static void pages_release(struct bt_engine *e)
{
    for (uint32_t n = 0; n < e->page_count; n++)
        if (is_present(e, e->page_store[n].offset))
            flags_set_present(e, e->page_store[n].offset, false);
    if (e->protected_pages && physmap_guard(e->interp.memory, e->layout.window_w, 0, e->layout.ram_bytes, false))
        assert(!"one protection for a whole mapping needs no memory");
    e->protected_pages = 0;
}

void cache_destroy(struct bt_engine *e)
{
    physmap_watch_set(e->interp.memory, NULL, e);
    if (e->page_store && e->code_flags)
        pages_release(e);
    release(e->blocks, BT_BLOCKS_MAX * sizeof(*e->blocks));
    release(e->sites, BT_SITES_MAX * sizeof(*e->sites));
    release(e->landmarks, LANDMARKS(e->layout.tc_bytes) * sizeof(*e->landmarks));
    release(e->links, BT_LINKS_MAX * sizeof(*e->links));
    release(e->link_waits, LINK_WAITS * sizeof(*e->link_waits));
    release(e->marks, BT_MARKS * sizeof(*e->marks));
    release(e->page_store, BT_CODE_PAGES_MAX * sizeof(*e->page_store));
    release(e->pages, HASH_BUCKETS * sizeof(*e->pages));
    release(e->code_flags, e->layout.ram_bytes / PAGE_SIZE_BYTES);
    release(e->code_tells, e->layout.ram_bytes / PAGE_SIZE_BYTES * sizeof(*e->code_tells));
    e->blocks = NULL;
    e->sites = NULL;
    e->landmarks = NULL;
    e->links = NULL;
    e->link_waits = NULL;
    e->marks = NULL;
    e->page_store = NULL;
    e->pages = NULL;
    e->code_flags = NULL;
    e->code_tells = NULL;
    pthread_cond_destroy(&e->world);
    pthread_mutex_destroy(&e->lock);
}

/* ---- pages ---- */

static struct bt_page **bucket_of(const struct bt_engine *e, uint64_t ram_offset)
{
    return &e->pages[(uint32_t)(ram_offset / PAGE_SIZE_BYTES * 0x9e3779b97f4a7c15ull >> (64 - HASH_BITS))];
}

/* The newest of the page's modes; the others follow by same_page. */
static struct bt_page *newest_of(const struct bt_engine *e, uint64_t ram_offset)
{
    struct bt_page *page = __atomic_load_n(bucket_of(e, ram_offset), __ATOMIC_ACQUIRE);
    while (page && page->offset != ram_offset)
        page = page->next;
    return page;
}

/* Watched first and then protected: from here on every write is noticed. */
static bool page_protect(struct bt_engine *e, uint64_t ram_offset)
{
    if (is_present(e, ram_offset))
        return true;
    if (!direct_release(e, ram_offset))
        return false;
    flags_set_present(e, ram_offset, true);
    if (physmap_guard(e->interp.memory, e->layout.window_w, ram_offset, PAGE_SIZE_BYTES, true)) { /* the host's limit of mappings: a flush makes room */
        flags_set_present(e, ram_offset, false);
        return false;
    }
    e->protected_pages++;
    return true;
}

struct bt_page *cache_page_of(const struct bt_engine *e, const uint32_t *dt)
{
    return &e->page_store[((const uint8_t *)dt - e->layout.dt_pool) / BT_DT_BYTES - 1];
}

const uint32_t *cache_dt(const struct bt_engine *e, uint64_t ram_offset, const struct bt_mode *mode)
{
    const struct bt_page *page = is_present(e, ram_offset) ? newest_of(e, ram_offset) : NULL;
    while (page && memcmp(&page->mode, mode, sizeof(*mode)) != 0)
        page = page->same_page;
    return page ? page->dt : NULL;
}

struct bt_page *cache_page(struct bt_engine *e, uint64_t ram_offset, gpa_t gpa, const struct bt_mode *mode)
{
    struct bt_page *same_page = newest_of(e, ram_offset), *page = same_page;
    while (page && memcmp(&page->mode, mode, sizeof(*mode)) != 0)
        page = page->same_page;
    if ((!page && e->page_count == BT_CODE_PAGES_MAX) || !page_protect(e, ram_offset))
        return NULL;
    if (page)
        return page;

    struct bt_page **bucket = bucket_of(e, ram_offset);
    uint32_t n = e->page_count++;
    page = &e->page_store[n];
    page->offset = ram_offset;
    page->gpa = gpa;
    page->mode = *mode;
    page->dt = (uint32_t *)(e->layout.dt_pool + (n + 1) * BT_DT_BYTES);
    page->same_page = same_page;
    page->next = *bucket;
    __atomic_store_n(bucket, page, __ATOMIC_RELEASE); /* for cache_dt, which may be without the lock */
    return page;
}

/* ---- what is known about instructions ---- */

static uint64_t *mark_slot(const struct bt_engine *e, const struct bt_page *page, unsigned start, enum bt_mark mark, uint64_t *key)
{
    *key = (page->offset | start) << 2 | (uint64_t)mark << 1 | 1;
    uint32_t n = (uint32_t)(*key * 0x9e3779b97f4a7c15ull >> 32) % BT_MARKS;
    while (e->marks[n] && e->marks[n] != *key)
        n = (n + 1) % BT_MARKS;
    return &e->marks[n];
}

void cache_mark(struct bt_engine *e, const struct bt_page *page, unsigned start, enum bt_mark mark)
{
    uint64_t key, *slot = mark_slot(e, page, start, mark, &key);
    if (*slot)
        return;
    if (e->mark_count == BT_MARKS / 2) { /* begin again: what still holds is soon learnt */
        memset(e->marks, 0, BT_MARKS * sizeof(*e->marks));
        e->mark_count = 0;
        slot = mark_slot(e, page, start, mark, &key);
    }
    *slot = key;
    e->mark_count++;
    __atomic_or_fetch(&e->code_flags[page->offset / PAGE_SIZE_BYTES], BT_CODE_MARKED, __ATOMIC_RELAXED);
}

bool cache_marked(const struct bt_engine *e, const struct bt_page *page, unsigned start, enum bt_mark mark)
{
    uint64_t key;
    if (!(e->code_flags[page->offset / PAGE_SIZE_BYTES] & BT_CODE_MARKED))
        return false;
    return *mark_slot(e, page, start, mark, &key);
}

/* ---- blocks ---- */

struct bt_block *cache_block_careful(struct bt_page *page, unsigned start)
{
    struct bt_block *block = page->blocks;
    while (block && (block->start != start || !block->careful))
        block = block->next;
    return block;
}

struct bt_block *cache_block(const struct bt_engine *e, const struct bt_page *page, unsigned start)
{
    uint32_t tc_start = page->dt[start];
    return tc_start ? &e->blocks[*block_number(e, tc_start)] : NULL;
}

bool cache_room(const struct bt_engine *e)
{
    return e->tc_used + BT_BLOCK_TC_MAX <= cache_cold_base(e) && e->cold_used + BT_BLOCK_TC_MAX <= e->layout.tc_bytes && e->block_count < BT_BLOCKS_MAX &&
           e->site_count + BT_BLOCK_SITES_MAX <= BT_SITES_MAX && e->dt_pieces < BT_DT_BYTES_MAX / PAGE_SIZE_BYTES;
}

static void dt_set(struct bt_page *page, unsigned start, uint32_t tc_start)
{
    __atomic_store_n(&page->dt[start], tc_start, __ATOMIC_RELEASE); /* after the code that it leads to */
}

static void block_forget(struct bt_block *block)
{
    if (!block->careful)
        dt_set(block->page, block->start, 0);
    __atomic_store_n(&block->valid, false, __ATOMIC_RELAXED);
}

void cache_block_drop(struct bt_engine *e, struct bt_block *block)
{
    if (!block->valid)
        return;
    struct bt_block **link = &block->page->blocks;
    while (*link != block)
        link = &(*link)->next;
    *link = block->next;
    block_forget(block);
}

static void dt_piece_note(struct bt_engine *e, struct bt_page *page, unsigned start)
{
    uint8_t piece = (uint8_t)(1u << start * sizeof(*page->dt) / PAGE_SIZE_BYTES);
    if (!(page->dt_pieces & piece))
        e->dt_pieces++;
    page->dt_pieces |= piece;
}

static uint32_t *cold_landmarks(const struct bt_engine *e)
{
    return e->landmarks + cache_cold_base(e) / BT_LANDMARK_BYTES + 1;
}

/* The block is about to be the last one. */
static void landmarks_add(struct bt_engine *e, const struct bt_block *block)
{
    uint32_t hot = e->hot_landmarks, cold = e->cold_landmarks;
    for (; hot * BT_LANDMARK_BYTES <= block->tc_start; hot++)
        e->landmarks[hot] = e->block_count;
    for (; cold * BT_LANDMARK_BYTES <= block->cold_start - cache_cold_base(e); cold++)
        cold_landmarks(e)[cold] = e->block_count;
    __atomic_store_n(&e->hot_landmarks, hot, __ATOMIC_RELEASE);
    __atomic_store_n(&e->cold_landmarks, cold, __ATOMIC_RELEASE);
}

struct bt_block *cache_publish(struct bt_engine *e, const struct bt_block *block, const struct bt_site *sites)
{
    struct bt_page *page = block->page;
    assert(cache_room(e) && block->site_count <= BT_BLOCK_SITES_MAX && block->start < PAGE_SIZE_BYTES);
    assert(block->tc_start >= e->tc_used && block->tc_end > block->tc_start && block->tc_end - e->tc_used <= BT_BLOCK_TC_MAX);
    struct bt_block *before = block->careful ? cache_block_careful(page, block->start) : cache_block(e, page, block->start);
    if (before)
        cache_block_drop(e, before);

    struct bt_block *made = &e->blocks[e->block_count];
    *made = *block;
    *block_number(e, block->tc_start) = e->block_count;
    made->site_first = e->site_count;
    made->valid = is_present(e, page->offset); /* else the bytes have changed since they were read: good for one run, like any instruction fetched before */
    memcpy(&e->sites[e->site_count], sites, block->site_count * sizeof(*sites));
    e->site_count += block->site_count;
    e->translated_blocks++;
    e->translated_insns += block->insns;
    __atomic_store_n(&e->tc_used, tc_next(block->tc_end), __ATOMIC_RELAXED);
    if (block->cold_end == block->cold_start)
        made->cold_start = made->cold_end = e->cold_used; /* blocks ascend by this, too */
    e->cold_used = made->cold_end;
    landmarks_add(e, made);
    __atomic_store_n(&e->block_count, e->block_count + 1, __ATOMIC_RELEASE); /* for cache_find, which takes no lock */
    if (made->valid) {
        made->next = page->blocks;
        page->blocks = made;
        if (made->careful)
            return made;
        dt_piece_note(e, page, made->start);
        dt_set(page, made->start, made->tc_start);
    }
    return made;
}

/* The first block that starts above the offset is one of [low, high]. */
static void landmarks_find(const struct bt_engine *e, bool cold, uintptr_t offset, uint32_t *low, uint32_t *high)
{
    const uint32_t *landmark = cold ? cold_landmarks(e) : e->landmarks;
    uintptr_t at = (cold ? offset - cache_cold_base(e) : offset) / BT_LANDMARK_BYTES;
    uint32_t blocks = __atomic_load_n(&e->block_count, __ATOMIC_ACQUIRE), count = __atomic_load_n(cold ? &e->cold_landmarks : &e->hot_landmarks, __ATOMIC_ACQUIRE);
    *low = at < count ? landmark[at] : blocks;
    *high = at + 1 < count ? landmark[at + 1] : blocks;
    if (*high > blocks) /* more have been added meanwhile */
        *high = blocks;
    if (*low > *high)
        *low = *high;
}

struct bt_block *cache_find(struct bt_engine *e, uintptr_t tc_address)
{
    uintptr_t offset = tc_address - (uintptr_t)e->layout.tc_exec;
    bool cold = offset >= cache_cold_base(e);
    uint32_t low, high;
    landmarks_find(e, cold, offset, &low, &high);
    while (low < high) { /* the first block that starts above */
        uint32_t middle = low + (high - low) / 2;
        if ((cold ? e->blocks[middle].cold_start : e->blocks[middle].tc_start) <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    if (!low)
        return NULL;
    struct bt_block *block = &e->blocks[low - 1];
    return offset < (cold ? block->cold_end : block->tc_end) ? block : NULL;
}

const struct bt_site *cache_site(const struct bt_engine *e, const struct bt_block *block, uintptr_t tc_address)
{
    const struct bt_site *sites = &e->sites[block->site_first];
    uintptr_t offset = tc_address - (uintptr_t)e->layout.tc_exec;
    bool cold = offset >= cache_cold_base(e);
    unsigned low = 0, high = cold ? block->site_count - block->hot_sites : block->hot_sites;
    offset -= cold ? block->cold_start : block->tc_start;
    if (cold)
        sites += block->hot_sites;
    while (low < high) {
        unsigned middle = low + (high - low) / 2;
        if (sites[middle].tc_offset <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    return low ? &sites[low - 1] : NULL;
}

/* ---- dropping ---- */

/* Calls bt_kick for all vCPUs, or those inside translated code only; returns whether one was. */
static bool kick_all(struct bt_engine *e, bool inside_only)
{
    bool any_inside = false;
    pthread_mutex_lock(&e->interp.lock);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX; n++) {
        struct bt_vcpu *b = (struct bt_vcpu *)e->interp.vcpus[n];
        bool inside = b && atomic_load(&b->inside);
        if (b && (inside || !inside_only))
            bt_kick(&b->c.v);
        any_inside |= inside;
    }
    pthread_mutex_unlock(&e->interp.lock);
    return any_inside;
}

static void displacement_set(struct bt_engine *e, uint32_t at, uint32_t value)
{
    __atomic_store_n((uint32_t *)(e->layout.tc_write + at), value, __ATOMIC_RELEASE);
}

static void link_set(struct bt_engine *e, uint32_t at, struct bt_page *page, uint32_t target)
{
    uint32_t stub = at + 4 + *(const uint32_t *)(e->layout.tc_write + at);
    e->links[e->link_count++] = (struct bt_link){at, stub, page->links};
    page->links = e->link_count;
    displacement_set(e, at, target - (at + 4));
}

static uint32_t link_witness(const struct bt_engine *e, const struct bt_page *page, unsigned start)
{
    return (uint32_t)(e->layout.witness - (const uint8_t *)&page->dt[start]);
}

void cache_link_far_early(struct bt_engine *e, uint32_t at, struct bt_page *page, unsigned start)
{
    uint32_t target = page->dt[start];
    if (e->link_count == BT_LINKS_MAX || !target)
        return;
    displacement_set(e, at - 5, link_witness(e, page, start));
    link_set(e, at, page, target);
}

/* Has every vCPU that is inside gone there since? */
static bool link_turn_over(struct bt_engine *e, uint64_t turn)
{
    bool over = true;
    pthread_mutex_lock(&e->interp.lock);
    for (unsigned n = 0; n < INTERP_VCPUS_MAX && over; n++) {
        const struct bt_vcpu *b = (const struct bt_vcpu *)e->interp.vcpus[n];
        over = !b || !atomic_load(&b->inside) || atomic_load(&b->link_turn) >= turn;
    }
    pthread_mutex_unlock(&e->interp.lock);
    return over;
}

/* A vCPU that has read what the slot was compared with before, and not yet jumped, must not find the new branch: that is set when all have been outside since the comparison was. */
void cache_link_far(struct bt_engine *e, uint32_t at, struct bt_page *page, unsigned start)
{
    uint32_t target = page->dt[start], witness = link_witness(e, page, start);
    struct bt_link_wait *wait = &e->link_waits[at * 0x9e3779b9u >> 16 & (LINK_WAITS - 1)];
    if (e->link_count == BT_LINKS_MAX || !target)
        return;
    if (at + 4 + *(const uint32_t *)(e->layout.tc_write + at) < cache_cold_base(e)) /* another vCPU came by the same stub and was faster: the branch leads to a block now */
        return;
    if (wait->at != at || wait->witness != witness) {
        displacement_set(e, at - 5, witness);
        *wait = (struct bt_link_wait){at, witness, atomic_fetch_add(&e->link_turn, 1) + 1, 0};
    }
    if (link_turn_over(e, wait->turn)) {
        wait->at = 0;
        link_set(e, at, page, target);
    } else if (++wait->visits % LINK_PATIENCE == 0) {
        kick_all(e, true);
    }
}

static void links_undo(struct bt_engine *e, struct bt_page *page)
{
    for (uint32_t n = page->links; n; n = e->links[n - 1].next)
        displacement_set(e, e->links[n - 1].at, e->links[n - 1].stub - (e->links[n - 1].at + 4));
    page->links = 0;
}

static void discard(void *memory, uint64_t bytes) /* reads as zero from now on */
{
    if (bytes && madvise(memory, (bytes + PAGE_MASK_BITS) & ~PAGE_MASK_BITS, MADV_DONTNEED))
        memset(memory, 0, bytes);
}

/* No slot of the page is set: its memory is given back. */
static void dt_discard(struct bt_engine *e, struct bt_page *page)
{
    for (unsigned left = page->dt_pieces; left; left &= left - 1)
        discard((uint8_t *)page->dt + (size_t)__builtin_ctz(left) * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES);
    e->dt_pieces -= (uint32_t)__builtin_popcount(page->dt_pieces);
    page->dt_pieces = 0;
}

static bool blocks_drop(struct bt_engine *e, struct bt_page *page) /* true: there were any */
{
    bool any = page->blocks != NULL;
    links_undo(e, page);
    for (struct bt_block *block = page->blocks; block; block = block->next)
        block_forget(block);
    page->blocks = NULL;
    dt_discard(e, page);
    return any;
}

void cache_page_cross(struct bt_engine *e, struct bt_page *page, const struct bt_page *next)
{
    page->crosses = next;
    __atomic_or_fetch(&e->code_flags[next->offset / PAGE_SIZE_BYTES], BT_CODE_CROSSED, __ATOMIC_RELAXED);
}

/* Pages with an instruction that ends in the page at `ram_offset`. */
static bool crossers_drop(struct bt_engine *e, uint64_t ram_offset)
{
    bool dropped = false;
    for (uint32_t n = 0; n < e->page_count; n++) {
        struct bt_page *page = &e->page_store[n];
        if (page->crosses && page->crosses->offset == ram_offset) {
            dropped |= blocks_drop(e, page);
            page->crosses = NULL;
        }
    }
    __atomic_and_fetch(&e->code_flags[ram_offset / PAGE_SIZE_BYTES], (uint8_t)~BT_CODE_CROSSED, __ATOMIC_RELAXED);
    return dropped;
}

/* True when a vCPU may be inside a block that was dropped. */
static bool page_drop(struct bt_engine *e, uint64_t ram_offset)
{
    uint8_t *flags = &e->code_flags[ram_offset / PAGE_SIZE_BYTES];
    bool dropped = false;
    if (!is_present(e, ram_offset))
        return false;
    for (struct bt_page *page = newest_of(e, ram_offset); page; page = page->same_page)
        dropped |= blocks_drop(e, page);
    if (*flags & BT_CODE_CROSSED)
        dropped |= crossers_drop(e, ram_offset);
    flags_set_present(e, ram_offset, false);
    if ((*flags & BT_CODE_THRASH) != BT_CODE_THRASH)
        __atomic_store_n(flags, *flags + THRASH_ONE, __ATOMIC_RELAXED);
    __atomic_store_n(&e->invalidations, e->invalidations + 1, __ATOMIC_SEQ_CST); /* before the kick: who reads the old number is kicked after its reset */
    if (physmap_guard(e->interp.memory, e->layout.window_w, ram_offset, PAGE_SIZE_BYTES, false) == 0) {
        e->protected_pages--;
        return dropped;
    }
    /* A hole in a run of protected pages is one mapping more than the host allows: all pages go. */
    for (uint32_t n = 0; n < e->page_count; n++)
        dropped |= blocks_drop(e, &e->page_store[n]);
    pages_release(e);
    return dropped;
}

void cache_page_drop(struct bt_engine *e, uint64_t ram_offset)
{
    /* Those outside are kicked, too: one of them may have looked a block up already. */
    if (page_drop(e, ram_offset & ~PAGE_MASK_BITS))
        kick_all(e, false);
}

void cache_memory_changed(void *engine, gpa_t gpa, uint64_t length_bytes)
{
    struct bt_engine *e = engine;
    uint64_t offset;
    bool dropped = false;
    if (!length_bytes || !physmap_offset(e->interp.memory, gpa, length_bytes, &offset))
        return;
    pthread_mutex_lock(&e->lock);
    for (uint64_t page = offset & ~PAGE_MASK_BITS; page < offset + length_bytes; page += PAGE_SIZE_BYTES)
        dropped |= page_drop(e, page);
    if (dropped)
        kick_all(e, false);
    pthread_mutex_unlock(&e->lock);
}

void cache_flush(struct bt_engine *e)
{
    pages_release(e);
    for (uint64_t n = 0; n < e->layout.ram_bytes / PAGE_SIZE_BYTES; n++)
        if (e->code_flags[n])
            __atomic_store_n(&e->code_flags[n], e->code_flags[n] >> 1 & BT_CODE_THRASH, __ATOMIC_RELAXED);
    discard(e->layout.dt_pool + BT_DT_BYTES, e->page_count * BT_DT_BYTES);
    discard(e->page_store, e->page_count * sizeof(*e->page_store));
    discard(e->blocks, e->block_count * sizeof(*e->blocks));
    discard(e->sites, e->site_count * sizeof(*e->sites));
    discard(e->links, e->link_count * sizeof(*e->links));
    e->link_count = 0;
    memset(e->link_waits, 0, LINK_WAITS * sizeof(*e->link_waits));
    memset(e->pages, 0, HASH_BUCKETS * sizeof(*e->pages));
    e->page_count = e->site_count = e->dt_pieces = 0;
    e->hot_landmarks = e->cold_landmarks = 0;
    __atomic_store_n(&e->block_count, 0, __ATOMIC_RELEASE);
    __atomic_store_n(&e->tc_used, first_free_tc(e), __ATOMIC_RELAXED);
    e->cold_used = cache_cold_base(e);
    e->flushes++;
    __atomic_store_n(&e->epoch, e->epoch + 1, __ATOMIC_RELEASE);
}

/* ---- stopping the world ---- */

/*
 * A vCPU says that it is inside and then looks whether the world is wanted; a requester wants it and then looks who is inside: one of them sees the other, and likewise on the
 * way out. Waiting vCPUs and waiting requesters are all outside, so several requesters get the world one after the other: the lock is what excludes them.
 */

/* Live guest vector state is put away while libc is called, which may use vector registers. */
static bool simd_put_away(struct bt_vcpu *b)
{
    bool live = b->c.simd_live;
    simd_save(&b->c);
    return live;
}

static void wait_for_world(struct bt_vcpu *b)
{
    struct bt_engine *e = b->engine;
    bool live = simd_put_away(b);
    pthread_mutex_lock(&e->lock);
    pthread_cond_broadcast(&e->world); /* somebody may have seen this vCPU inside */
    while (atomic_load(&e->world_wanted))
        pthread_cond_wait(&e->world, &e->lock);
    pthread_mutex_unlock(&e->lock);
    if (live)
        simd_load(&b->c);
}

void cache_enter(struct bt_vcpu *b)
{
    for (;;) {
        atomic_store(&b->inside, true);
        if (likely(!atomic_load(&b->engine->world_wanted))) {
            atomic_store_explicit(&b->link_turn, atomic_load(&b->engine->link_turn), memory_order_release);
            return;
        }
        atomic_store(&b->inside, false);
        wait_for_world(b);
    }
}

static void tell_requesters(struct bt_vcpu *b)
{
    struct bt_engine *e = b->engine;
    bool live = simd_put_away(b);
    pthread_mutex_lock(&e->lock);
    pthread_cond_broadcast(&e->world);
    pthread_mutex_unlock(&e->lock);
    if (live)
        simd_load(&b->c);
}

void cache_leave(struct bt_vcpu *b)
{
    atomic_store(&b->inside, false);
    if (unlikely(atomic_load(&b->engine->world_wanted)))
        tell_requesters(b);
}

void cache_exclusive_begin(struct bt_engine *e, struct bt_vcpu *b)
{
    if (b) {
        simd_save(&b->c);
        atomic_store(&b->inside, false);
    }
    pthread_mutex_lock(&e->lock);
    atomic_fetch_add(&e->world_wanted, 1);
    pthread_cond_broadcast(&e->world); /* other requesters may have seen b inside */
    while (kick_all(e, true))
        pthread_cond_wait(&e->world, &e->lock);
}

void cache_exclusive_end(struct bt_engine *e, struct bt_vcpu *b)
{
    atomic_fetch_sub(&e->world_wanted, 1);
    pthread_cond_broadcast(&e->world);
    pthread_mutex_unlock(&e->lock);
}
