/*
 * The host address space of one engine: a range reserved at the same offset in every 512 GiB alias of user space, and the translation cache below 2 GiB.
 *
 * Invariants: [offset, offset + length_bytes) of each of the BT_ALIASES aliases belongs to this engine alone, and only one of them holds anything
 * accessible: window W, window R and the DT pool, each with BT_GUARD_BYTES of nothing on both sides. So an address that agrees with a byte of the range in its low
 * BT_ALIAS_BITS bits either is that byte or faults (kernel addresses and non-canonical ones fault anyway). The place is random: a guest cannot know it.
 * Mappings that appear later (malloc, other engines) go elsewhere by themselves, because what is reserved is taken.
 * Most aliases are where the process has nothing at all: these are reserved in one or two pieces (`wastes`), whole and for all engines of the process, because 256 calls take a millisecond.
 * Threading: `wastes` has a lock. Creation may race with other threads' mappings; what got in the way is seen (MAP_FIXED_NOREPLACE) and another place is tried.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

#include "engine/bt/bt_priv.h"

#define BT_ALIASES (1u << (47 - BT_ALIAS_BITS))
#define ALIGNMENT (2ull << 20) /* so that the windows can have huge pages */
#define DISTANCE (1ull << 30)  /* to foreign mappings, which may grow: heap, stacks */
#define LOW_LIMIT (4ull << 30) /* 32-bit addresses belong to the translation cache and its like */
#define ROOM (8ull << 40)      /* left below mappings, where the kernel puts new ones: tables of 64 processors take most of it */
#define WASTES_MAX 4u
#define VSYSCALL_PAGE 0xffffffffff600000ull
#define ATTEMPTS_MAX 32u
#define TC_LOWEST (256ull << 20)
#define TC_LIMIT (2ull << 30)
#define TC_BYTES_MAX (1ull << 30)

/* [start, end): addresses, offsets in an alias, or numbers of aliases. */
struct interval {
    uint64_t start, end;
};

struct interval_list {
    struct interval *item;
    size_t count, capacity;
};

static uint64_t random_below(uint64_t limit)
{
    uint64_t value;
    if (getrandom(&value, sizeof(value), GRND_NONBLOCK) != (ssize_t)sizeof(value))
        value = (uint64_t)(uintptr_t)&value * 0x9e3779b97f4a7c15ull; /* early in boot: the stack's own randomness */
    return value % limit;
}

static uint64_t round_up(uint64_t value, uint64_t alignment)
{
    return (value + alignment - 1) & ~(alignment - 1);
}

static int interval_append(struct interval_list *list, uint64_t start, uint64_t end)
{
    if (list->count == list->capacity) {
        size_t capacity = list->capacity ? list->capacity * 2 : 256;
        struct interval *item = realloc(list->item, capacity * sizeof(*item));
        if (!item)
            return -ENOMEM;
        list->item = item;
        list->capacity = capacity;
    }
    list->item[list->count++] = (struct interval){start, end};
    return 0;
}

/* Blocks what the addresses [start, end) take in any alias, `margin` on both sides included. */
static int addresses_block(struct interval_list *list, uint64_t start, uint64_t end, uint64_t margin)
{
    start = start > margin ? start - margin : 0;
    end += margin;
    if (end - start >= BT_ALIAS_BYTES)
        return interval_append(list, 0, BT_ALIAS_BYTES);
    uint64_t low = start & (BT_ALIAS_BYTES - 1), length = end - start;
    if (low + length <= BT_ALIAS_BYTES)
        return interval_append(list, low, low + length);
    int rc = interval_append(list, low, BT_ALIAS_BYTES);
    return rc ? rc : interval_append(list, 0, low + length - BT_ALIAS_BYTES);
}

/* What engines have reserved in whole aliases; numbers of these. Given back with the last engine. */
static struct {
    pthread_mutex_t lock;
    unsigned users, count;
    struct interval item[WASTES_MAX];
} wastes = {.lock = PTHREAD_MUTEX_INITIALIZER};

static bool is_waste(unsigned alias)
{
    for (unsigned n = 0; n < wastes.count; n++)
        if (alias >= wastes.item[n].start && alias < wastes.item[n].end)
            return true;
    return false;
}

/* Ascending. Of the wastes only what engines use; what they keep free around it is nearer than DISTANCE. */
static int mappings_read(struct interval_list *list)
{
    FILE *maps = fopen("/proc/self/maps", "re");
    if (!maps)
        return -errno;
    char *line = NULL, *at;
    size_t size = 0;
    int rc = 0;
    while (!rc && getline(&line, &size, maps) > 0) {
        uint64_t start = strtoull(line, &at, 16), end = *at == '-' ? strtoull(at + 1, &at, 16) : 0;
        bool waste = end <= 1ull << 47 && is_waste((unsigned)(start / BT_ALIAS_BYTES)) && strncmp(at, " ---", 4) == 0;
        if (end && end <= 1ull << 47 && !waste)
            rc = interval_append(list, start, end);
    }
    free(line);
    fclose(maps);
    return rc;
}

static int interval_compare(const void *left, const void *right)
{
    uint64_t a = ((const struct interval *)left)->start, b = ((const struct interval *)right)->start;
    return a < b ? -1 : a > b;
}

/* Number of aligned places for `length_bytes` in the gap; *first is the lowest. */
static uint64_t gap_places(uint64_t start, uint64_t end, uint64_t length_bytes, uint64_t *first)
{
    *first = round_up(start, ALIGNMENT);
    if (*first >= end || end - *first < length_bytes)
        return 0;
    return (end - *first - length_bytes) / ALIGNMENT + 1;
}

/* Walks the gaps between the sorted intervals. Returns the number of places in all; *offset is the one numbered `wanted`, when there are so many. */
static uint64_t places_walk(const struct interval_list *list, uint64_t length_bytes, uint64_t wanted, uint64_t *offset)
{
    uint64_t total = 0, position = 0;
    for (size_t n = 0; n <= list->count; n++) {
        uint64_t first, end = n < list->count ? list->item[n].start : BT_ALIAS_BYTES;
        uint64_t places = position < end ? gap_places(position, end, length_bytes, &first) : 0;
        if (wanted >= total && wanted - total < places)
            *offset = first + (wanted - total) * ALIGNMENT;
        total += places;
        if (n < list->count && list->item[n].end > position)
            position = list->item[n].end;
    }
    return total;
}

/* A random place that is free in all aliases. -ENOSPC: there is none. */
static int offset_find(const struct interval_list *mappings, uint64_t length_bytes, uint64_t *offset)
{
    struct interval_list list = {0};
    int rc = 0;
    for (size_t n = 0; !rc && n < mappings->count; n++)
        rc = addresses_block(&list, mappings->item[n].start, mappings->item[n].end, DISTANCE);
    if (!rc)
        rc = addresses_block(&list, 0, LOW_LIMIT, 0);
    if (!rc)
        rc = addresses_block(&list, VSYSCALL_PAGE, VSYSCALL_PAGE + PAGE_SIZE_BYTES, BT_GUARD_BYTES);
    if (!rc) /* the last page of user space cannot be mapped */
        rc = interval_append(&list, BT_ALIAS_BYTES - DISTANCE, BT_ALIAS_BYTES);
    if (!rc) {
        qsort(list.item, list.count, sizeof(*list.item), interval_compare);
        uint64_t places = places_walk(&list, length_bytes, ~0ull, offset);
        if (places)
            places_walk(&list, length_bytes, random_below(places), offset);
        else
            rc = -ENOSPC;
    }
    free(list.item);
    return rc;
}

/* Address of the range in an alias. */
static uint8_t *alias_at(const struct bt_layout *layout, unsigned n)
{
    return (uint8_t *)(n * BT_ALIAS_BYTES + layout->offset); /* NOLINT: a number becomes an address here */
}

/* MAP_FIXED_NOREPLACE; kernels before 4.17 take it for a hint. Returns 0 or -errno. */
static int map_exactly(void *at, uint64_t length_bytes, int prot, int flags, int fd)
{
    void *got = mmap(at, length_bytes, prot, flags | MAP_FIXED_NOREPLACE, fd, 0);
    if (got == MAP_FAILED)
        return -errno;
    if (got == at)
        return 0;
    munmap(got, length_bytes);
    return -EEXIST;
}

static int reserve(void *at, uint64_t length_bytes)
{
    return map_exactly(at, length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
}

/* ---- what engines share: under wastes.lock ---- */

static void waste_reserve(uint64_t start, uint64_t end)
{
    struct interval waste = {round_up(start, BT_ALIAS_BYTES) / BT_ALIAS_BYTES, end / BT_ALIAS_BYTES};
    if (waste.start < waste.end && wastes.count < WASTES_MAX && reserve((void *)(waste.start * BT_ALIAS_BYTES), (waste.end - waste.start) * BT_ALIAS_BYTES) == 0)
        wastes.item[wastes.count++] = waste;
}

/* What cannot be had in one piece is reserved alias by alias. */
static void wastes_begin(const struct interval_list *mappings)
{
    uint64_t free_from = LOW_LIMIT;
    for (size_t n = 0; n < mappings->count; n++) {
        const struct interval *next = &mappings->item[n];
        if (next->start > free_from + DISTANCE + ROOM)
            waste_reserve(free_from + DISTANCE, next->start - ROOM);
        if (next->end > free_from)
            free_from = next->end;
    }
}

static void wastes_end(void)
{
    for (unsigned n = 0; n < wastes.count; n++)
        munmap((void *)(wastes.item[n].start * BT_ALIAS_BYTES), (wastes.item[n].end - wastes.item[n].start) * BT_ALIAS_BYTES);
    wastes.count = 0;
}

static void aliases_release(const struct bt_layout *layout, unsigned count)
{
    for (unsigned n = 0; n < count; n++)
        if (!is_waste(n))
            munmap(alias_at(layout, n), layout->length_bytes);
        else if (alias_at(layout, n) == layout->reserved_low) /* what is waste stays reserved */
            (void)!mmap(layout->reserved_low, layout->length_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

static int aliases_reserve(const struct bt_layout *layout)
{
    for (unsigned n = 0; n < BT_ALIASES; n++) {
        int rc = is_waste(n) ? 0 : reserve(alias_at(layout, n), layout->length_bytes);
        if (rc) {
            aliases_release(layout, n);
            return rc;
        }
    }
    return 0; /* what was never written is in no core file, so none needs MADV_DONTDUMP */
}

/* Reserves the layout's aliases at a place that is free. */
static int aliases_place(struct bt_layout *layout)
{
    struct interval_list mappings = {0};
    int rc = mappings_read(&mappings);
    if (!rc && !wastes.users)
        wastes_begin(&mappings);
    if (!rc)
        rc = offset_find(&mappings, layout->length_bytes, &layout->offset);
    free(mappings.item);
    if (!rc)
        rc = aliases_reserve(layout);
    if (!rc)
        wastes.users++;
    else if (!wastes.users)
        wastes_end();
    return rc;
}

/* ---- why it failed, for people ---- */

static bool address_space_limited(unsigned long long *kibibytes)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur == RLIM_INFINITY)
        return false;
    *kibibytes = limit.rlim_cur >> 10;
    return true;
}

static bool overcommit_is_strict(void)
{
    FILE *file = fopen("/proc/sys/vm/overcommit_memory", "re");
    int mode = 0;
    if (!file)
        return false;
    bool strict = fscanf(file, "%d", &mode) == 1 && mode == 2;
    fclose(file);
    return strict;
}

static int reserve_error(struct error *err, int rc, uint64_t bytes)
{
    unsigned long long gibibytes = bytes >> 30, limit;
    if (rc == -ENOMEM && address_space_limited(&limit))
        return error_set(err, rc, "the address space is limited to %llu KiB, and the translator reserves %llu GiB without using them: run 'ulimit -v unlimited' "
                         "first, or use engine interp", limit, gibibytes);
    if (rc == -ENOMEM && overcommit_is_strict())
        return error_set(err, rc, "the host commits memory strictly, and the translator's reservations do not fit: set vm.overcommit_memory to 0 or 1 "
                         "(sysctl), or use engine interp");
    if (rc == -ENOSPC || rc == -EEXIST)
        return error_set(err, rc, "no free place for the translator's %llu GiB in the process's address space (sanitizers take it all): use engine interp",
                         gibibytes);
    return error_set(err, rc, "cannot reserve %llu GiB of address space for the translator: %s; use engine interp", gibibytes, strerror(-rc));
}

static int execute_error(struct error *err, int rc)
{
    if (rc == -EPERM || rc == -EACCES)
        return error_set(err, rc, "the host forbids executable shared memory (%s), which holds translated code: allow it (SELinux: execmem and "
                         "execmod), or use engine interp", strerror(-rc));
    return error_set(err, rc, "cannot make memory for translated code: %s; use engine interp", strerror(-rc));
}

/* ---- the pieces ---- */

static int aliases_create(struct bt_layout *layout, struct error *err)
{
    int rc = -EEXIST;
    pthread_mutex_lock(&wastes.lock);
    for (unsigned attempt = 0; attempt < ATTEMPTS_MAX && rc == -EEXIST; attempt++)
        rc = aliases_place(layout);
    pthread_mutex_unlock(&wastes.lock);
    if (rc)
        return reserve_error(err, rc, BT_ALIASES * layout->length_bytes);
    layout->reserved_low = alias_at(layout, 1 + (unsigned)random_below(BT_ALIASES - 2));
    return 0;
}

static void aliases_destroy(const struct bt_layout *layout)
{
    pthread_mutex_lock(&wastes.lock);
    aliases_release(layout, BT_ALIASES);
    if (--wastes.users == 0)
        wastes_end();
    pthread_mutex_unlock(&wastes.lock);
}

/* Poison, W, R and the pool lie in this order; places are computed before the range is reserved, as offsets in it. */
struct plan {
    uint64_t poison, window_w, window_r, dt_pool, witness, end;
};

static struct plan plan_make(uint64_t ram_bytes)
{
    struct plan p;
    p.poison = BT_GUARD_BYTES;
    p.window_w = round_up(p.poison + PAGE_SIZE_BYTES + BT_GUARD_BYTES, ALIGNMENT);
    p.window_r = round_up(p.window_w + ram_bytes + BT_GUARD_BYTES, ALIGNMENT);
    p.dt_pool = round_up(p.window_r + ram_bytes + BT_GUARD_BYTES, ALIGNMENT);
    p.witness = p.dt_pool + BT_DT_POOL_BYTES * 3;
    p.end = round_up(p.witness + PAGE_SIZE_BYTES + BT_DT_POOL_BYTES * 2, ALIGNMENT);
    return p;
}

static int windows_map(struct bt_layout *layout, struct physmap *memory, const struct plan *plan, struct error *err)
{
    layout->poison = (uintptr_t)layout->reserved_low + plan->poison;
    layout->window_w = layout->reserved_low + plan->window_w;
    layout->window_r = layout->reserved_low + plan->window_r;
    layout->dt_pool = layout->reserved_low + plan->dt_pool;
    layout->witness = layout->reserved_low + plan->witness;
    layout->memory = memory;
    int rc = physmap_map(memory, layout->window_w, PROT_READ | PROT_WRITE);
    if (!rc)
        rc = physmap_map(memory, layout->window_r, PROT_READ);
    if (rc)
        return error_set(err, rc, "cannot map the guest's memory for the translator: %s", strerror(-rc));
    madvise(layout->window_w, plan->dt_pool - plan->window_w - BT_GUARD_BYTES, MADV_DONTDUMP); /* PhysMap's own mapping is dumped */
    void *pool = mmap(layout->dt_pool, BT_DT_POOL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    if (pool == MAP_FAILED || mprotect(layout->witness, PAGE_SIZE_BYTES, PROT_READ))
        return reserve_error(err, -errno, BT_DT_POOL_BYTES);
    madvise(pool, BT_DT_POOL_BYTES, MADV_NOHUGEPAGE); /* sparse, and most of it only ever read */
    madvise(pool, BT_DT_POOL_BYTES, MADV_DONTDUMP);
    return 0;
}

/* Below 2 GiB, so that addresses in it are 32-bit displacements; any free place from a random one on. */
static int tc_map_low(struct bt_layout *layout)
{
    uint64_t places = (TC_LIMIT - TC_LOWEST - layout->tc_bytes) / ALIGNMENT + 1, first = random_below(places);
    for (uint64_t n = 0; n < places; n++) {
        uint8_t *at = (uint8_t *)(TC_LOWEST + (first + n) % places * ALIGNMENT);
        int rc = map_exactly(at, layout->tc_bytes, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1);
        if (!rc)
            layout->tc_exec = at;
        if (rc != -EEXIST)
            return rc;
    }
    return -ENOSPC;
}

/* Not a memfd: perf looks for names of code only in memory that has no file (--perf-map). */
static int tc_create(struct bt_layout *layout, struct error *err)
{
    int rc = tc_map_low(layout);
    if (!rc) {
        void *rw = mremap(layout->tc_exec, 0, layout->tc_bytes, MREMAP_MAYMOVE); /* old size 0: the same memory once more */
        if (rw != MAP_FAILED)
            layout->tc_write = rw;
        if (rw == MAP_FAILED || mprotect(rw, layout->tc_bytes, PROT_READ | PROT_WRITE))
            rc = -errno;
    }
    unsigned long long limit;
    if (rc == -ENOMEM && address_space_limited(&limit))
        return reserve_error(err, rc, layout->tc_bytes);
    return rc ? execute_error(err, rc) : 0;
}

/* As much in one piece as the aliases take: what limits a process, limits this; and a place that is free in all of them. To reserve them takes longer. */
int layout_probe(struct error *err)
{
    struct bt_layout layout = {.length_bytes = plan_make(0).end, .tc_bytes = ALIGNMENT};
    uint64_t bytes = BT_ALIASES * layout.length_bytes;
    struct interval_list mappings = {0};
    pthread_mutex_lock(&wastes.lock);
    int rc = mappings_read(&mappings);
    pthread_mutex_unlock(&wastes.lock);
    if (!rc)
        rc = offset_find(&mappings, layout.length_bytes, &layout.offset);
    free(mappings.item);
    void *all = rc ? MAP_FAILED : mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (!rc && all == MAP_FAILED)
        rc = -errno;
    if (rc)
        return reserve_error(err, rc, bytes);
    munmap(all, bytes);
    rc = tc_create(&layout, err);
    layout_destroy(&layout);
    return rc;
}

int layout_create(struct bt_layout *layout, struct physmap *memory, uint64_t tc_bytes, struct error *err)
{
    *layout = (struct bt_layout){.ram_bytes = physmap_space_bytes(memory), .tc_bytes = tc_bytes};
    assert(tc_bytes && tc_bytes <= TC_BYTES_MAX && !(tc_bytes & PAGE_MASK_BITS));
    if (layout->ram_bytes >= BT_ALIAS_BYTES / 4)
        return error_set(err, -E2BIG, "the translator runs guests of less than %llu GiB of memory, persistent and pluggable memory included: use engine interp", BT_ALIAS_BYTES / 4 >> 30);
    struct plan plan = plan_make(layout->ram_bytes);
    layout->length_bytes = plan.end;
    int rc = aliases_create(layout, err);
    if (!rc)
        rc = windows_map(layout, memory, &plan, err);
    if (!rc)
        rc = tc_create(layout, err);
    if (rc)
        layout_destroy(layout);
    return rc;
}

void layout_destroy(struct bt_layout *layout)
{
    if (layout->memory) {
        physmap_unmap(layout->memory, layout->window_w);
        physmap_unmap(layout->memory, layout->window_r);
    }
    if (layout->reserved_low)
        aliases_destroy(layout);
    if (layout->tc_exec)
        munmap(layout->tc_exec, layout->tc_bytes);
    if (layout->tc_write)
        munmap(layout->tc_write, layout->tc_bytes);
    *layout = (struct bt_layout){0};
}
