/*
 * PhysMap: one memfd, mapped once, holds all guest RAM: low RAM first, then the part that the guest sees from 4 GiB on, then pluggable RAM and what fills files up to the
 * guest's granularity. The files themselves are mapped behind it.
 *
 * Invariants: `base` maps exactly `space` bytes, and the memfd is sealed at its size, so that no access inside can raise SIGBUS for a
 * shrunken file; other files are the host's, and locked. ROM is RAM with a guard: a short sorted list of page-aligned ranges, written before vCPUs run and constant afterwards.
 * The dirty and watch bitmaps hold one bit a page of RAM.
 * Threading: look-ups read only constant fields and take no lock; the bitmaps are atomic. Watchers are called with watch_lock held for reading, so
 * that they may take locks under which others mark memory.
 */
#include "memory/memory.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/pages.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_IF(IN_LOOP, fallocate, ARG_IS(1, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE));
SANDBOX_ALLOW(IN_LOOP | IN_MAIN | IN_API, fstat);

#define ROM_RANGES_MAX (16 + 2 * PHYSMAP_FILES_MAX)
#define EXTRA_MAX (1 + 2 * PHYSMAP_FILES_MAX)
#define EXTRA_ALIGNMENT (1ull << 30)
#define BLOCK_BYTES_MIN (2ull << 20)

/* What is at PHYSMAP_EXTRA_BASE and above. */
struct extra {
    gpa_t gpa;
    uint64_t length, offset;
};

struct rom_range {
    gpa_t start, end;
};

struct watcher {
    void (*changed)(void *opaque, gpa_t gpa, uint64_t length_bytes);
    void *opaque;
};

struct physmap {
    int fd;
    uint8_t *base;
    uint64_t ram_bytes, low_bytes, high_bytes, space_bytes; /* of the memfd; of RAM that is always there; of the memfd and files */
    struct extra extra[EXTRA_MAX]; /* ascending by gpa */
    unsigned extra_count, file_count;
    gpa_t end;
    struct physmap_file file[PHYSMAP_FILES_MAX]; /* fd: ours */
    uint64_t file_offset[PHYSMAP_FILES_MAX], file_gpa[PHYSMAP_FILES_MAX];
    uint64_t plug_bytes, block_bytes;
    _Atomic uint8_t *plugged; /* by block; NULL: nothing is pluggable */
    void (*ranges_changed)(void *opaque);
    void *ranges_opaque;
    struct rom_range rom[ROM_RANGES_MAX]; /* ascending, disjoint */
    unsigned rom_count;
    _Atomic uint64_t *dirty, *watched;
    pthread_rwlock_t watch_lock;
    struct watcher watchers[PHYSMAP_WATCHERS_MAX]; /* free ones have no `changed` */
    struct pages pages;
    bool marks_needed;
    bool has_states; /* some of RAM may be other than private; set before vCPUs run */
};

static uint64_t host_memory_bytes(void)
{
    long pages = sysconf(_SC_PHYS_PAGES);
    long page_bytes = sysconf(_SC_PAGESIZE);

    return pages > 0 && page_bytes > 0 ? (uint64_t)pages * (uint64_t)page_bytes : UINT64_MAX;
}

static int ram_map(struct physmap *map, struct error *err)
{
    unsigned long long mebibytes = map->ram_bytes >> 20;
    int ret;

    map->fd = memfd_create("doppel-ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (map->fd < 0) {
        ret = -errno;
        return error_set(err, ret, "cannot create the guest's memory (memfd_create): %s", strerror(-ret));
    }
    if (ftruncate(map->fd, (off_t)map->ram_bytes) < 0) {
        ret = -errno;
        return error_set(err, ret, "cannot size the guest's memory to %llu MiB: %s; check the file size limit (ulimit -f)",
                         mebibytes, strerror(-ret));
    }
    if (fcntl(map->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        ret = -errno;
        return error_set(err, ret, "cannot seal the guest's memory: %s", strerror(-ret));
    }
    map->pages.ram_fd = map->fd;
    map->pages.page_count = map->ram_bytes / PAGE_SIZE_BYTES;
    map->base = mmap(NULL, map->space_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ret = map->base == MAP_FAILED ? -errno : physmap_map(map, map->base, PROT_READ | PROT_WRITE);
    if (ret < 0) {
        if (map->base == MAP_FAILED)
            map->base = NULL;
        return error_set(err, ret, "cannot map %llu MiB for the guest's memory: %s; give the guest less memory or raise "
                                   "the address space limit (ulimit -v)",
                         (unsigned long long)map->space_bytes >> 20, strerror(-ret));
    }
    return 0;
}

static uint64_t round_up(uint64_t value, uint64_t alignment)
{
    return (value + alignment - 1) & ~(alignment - 1);
}

static void extra_add(struct physmap *map, gpa_t gpa, uint64_t length, uint64_t offset)
{
    if (length)
        map->extra[map->extra_count++] = (struct extra){gpa, length, offset};
    map->end = length ? gpa + length : map->end;
}

/* Pluggable memory, then files; what fills a file up is in the memfd behind pluggable memory. */
static int extras_plan(struct physmap *map, const struct physmap_config *config, struct error *err)
{
    gpa_t gpa = PHYSMAP_EXTRA_BASE;

    map->plug_bytes = config->plug_bytes;
    map->block_bytes = config->block_bytes;
    extra_add(map, gpa, config->plug_bytes, config->ram_bytes);
    map->ram_bytes += config->plug_bytes;
    for (unsigned i = 0; i < config->file_count; i++)
        map->ram_bytes += round_up(config->file[i].bytes, PHYSMAP_FILE_ALIGNMENT) - round_up(config->file[i].bytes, PAGE_SIZE_BYTES);
    map->space_bytes = map->ram_bytes;
    uint64_t fill_offset = config->ram_bytes + config->plug_bytes;
    gpa = round_up(gpa + config->plug_bytes, EXTRA_ALIGNMENT);
    for (unsigned i = 0; i < config->file_count; i++) {
        uint64_t bytes = round_up(config->file[i].bytes, PAGE_SIZE_BYTES), all = round_up(bytes, PHYSMAP_FILE_ALIGNMENT);
        map->file[i] = config->file[i];
        map->file[i].fd = fcntl(config->file[i].fd, F_DUPFD_CLOEXEC, 0);
        map->file_count++;
        if (map->file[i].fd < 0)
            return error_set(err, -errno, "cannot keep a file of persistent memory: %s", strerror(errno));
        map->file_offset[i] = map->space_bytes;
        map->file_gpa[i] = gpa;
        extra_add(map, gpa, bytes, map->space_bytes);
        extra_add(map, gpa + bytes, all - bytes, fill_offset);
        map->space_bytes += bytes;
        fill_offset += all - bytes;
        gpa = round_up(gpa + all, EXTRA_ALIGNMENT);
    }
    return 0;
}

static int config_check(const struct physmap_config *config, struct error *err)
{
    uint64_t block = config->block_bytes, bytes = config->plug_bytes;

    if (config->plug_bytes && (block < BLOCK_BYTES_MIN || (block & (block - 1)) || config->plug_bytes % block))
        return error_set(err, -EINVAL, "pluggable memory of %llu bytes in blocks of %llu: must be whole blocks, and a block a power of two from 2 MiB",
                         (unsigned long long)config->plug_bytes, (unsigned long long)block);
    for (unsigned i = 0; i < config->file_count; i++)
        bytes = config->file[i].bytes < 1ull << 46 && bytes < 1ull << 46 ? bytes + config->file[i].bytes : UINT64_MAX;
    if (bytes > 1ull << 46 || config->file_count > PHYSMAP_FILES_MAX)
        return error_set(err, -E2BIG, "more pluggable or persistent memory than a guest can have");
    return 0;
}

int physmap_create(struct physmap **out, uint64_t ram_bytes, struct error *err)
{
    return physmap_create_with(out, &(struct physmap_config){.ram_bytes = ram_bytes}, err);
}

int physmap_create_with(struct physmap **out, const struct physmap_config *config, struct error *err)
{
    uint64_t host_bytes = host_memory_bytes(), ram_bytes = config->ram_bytes;
    struct physmap *map;
    int ret;

    *out = NULL;
    if (ram_bytes == 0 || (ram_bytes & PAGE_MASK_BITS))
        return error_set(err, -EINVAL, "guest memory of %llu bytes: must be a multiple of 4096 above 0",
                         (unsigned long long)ram_bytes);
    if (ram_bytes > host_bytes)
        return error_set(err, -ENOMEM, "guest memory of %llu MiB is more than this host has (%llu MiB); give the guest less",
                         (unsigned long long)(ram_bytes >> 20), (unsigned long long)(host_bytes >> 20));
    ret = config_check(config, err);
    if (ret < 0)
        return ret;
    map = calloc(1, sizeof(*map));
    if (!map)
        return error_set(err, -ENOMEM, "no memory for the guest's memory map");
    pthread_rwlock_init(&map->watch_lock, NULL);
    pages_init(&map->pages);
    map->fd = -1;
    map->ram_bytes = ram_bytes;
    map->low_bytes = ram_bytes < PHYSMAP_LOW_LIMIT ? ram_bytes : PHYSMAP_LOW_LIMIT;
    map->high_bytes = ram_bytes - map->low_bytes;
    map->end = map->high_bytes ? PHYSMAP_HIGH_BASE + map->high_bytes : map->low_bytes;
    ret = extras_plan(map, config, err);
    if (ret == 0)
        ret = ram_map(map, err);
    if (ret < 0)
        goto fail;
    map->dirty = calloc((map->space_bytes / PAGE_SIZE_BYTES + 63) / 64, sizeof(*map->dirty));
    map->watched = calloc((map->space_bytes / PAGE_SIZE_BYTES + 63) / 64, sizeof(*map->watched));
    if (config->plug_bytes)
        map->plugged = calloc(config->plug_bytes / config->block_bytes, sizeof(*map->plugged));
    if (!map->dirty || !map->watched || (config->plug_bytes && !map->plugged)) {
        ret = error_set(err, -ENOMEM, "no memory for the guest's page maps");
        goto fail;
    }
    for (unsigned i = 0; i < map->extra_count; i++) {
        for (unsigned n = 0; n < map->file_count; n++)
            if (map->file[n].readonly && map->extra[i].gpa >= map->file_gpa[n] && map->extra[i].gpa < round_up(map->file_gpa[n] + map->file[n].bytes, PHYSMAP_FILE_ALIGNMENT))
                ret = physmap_set_rom(map, map->extra[i].gpa, map->extra[i].length);
        if (ret < 0)
            goto fail;
    }
    *out = map;
    return 0;

fail:
    physmap_destroy(map);
    return ret;
}

void physmap_destroy(struct physmap *map)
{
    if (!map)
        return;
    free(map->dirty);
    free(map->watched);
    free((void *)map->plugged);
    for (unsigned i = 0; i < map->file_count; i++)
        if (map->file[i].fd >= 0)
            close(map->file[i].fd);
    pages_destroy(&map->pages); /* first: a source may write to memory until then */
    pthread_rwlock_destroy(&map->watch_lock);
    if (map->base)
        munmap(map->base, map->space_bytes);
    if (map->fd >= 0)
        close(map->fd);
    free(map);
}

uint64_t physmap_ram_bytes(const struct physmap *map)
{
    return map->ram_bytes;
}

uint64_t physmap_space_bytes(const struct physmap *map)
{
    return map->space_bytes;
}

gpa_t physmap_plug_base(const struct physmap *map)
{
    return PHYSMAP_EXTRA_BASE;
}

gpa_t physmap_file_base(const struct physmap *map, unsigned index, uint64_t *length_bytes)
{
    *length_bytes = round_up(map->file[index].bytes, PHYSMAP_FILE_ALIGNMENT);
    return map->file_gpa[index];
}

gpa_t physmap_end(const struct physmap *map)
{
    return map->end;
}

uint64_t physmap_low_bytes(const struct physmap *map)
{
    return map->low_bytes;
}

uint64_t physmap_high_bytes(const struct physmap *map)
{
    return map->high_bytes;
}

int physmap_fd(const struct physmap *map)
{
    return map->fd;
}

static bool is_plugged(const struct physmap *map, uint64_t from, uint64_t length_bytes)
{
    uint64_t last = length_bytes ? from + length_bytes - 1 : from;

    for (uint64_t block = from / map->block_bytes; block <= last / map->block_bytes; block++)
        if (!atomic_load_explicit(&map->plugged[block], memory_order_relaxed))
            return false;
    return true;
}

static bool extra_offset(const struct physmap *map, gpa_t gpa, uint64_t length_bytes, uint64_t *offset)
{
    for (unsigned i = 0; i < map->extra_count; i++) {
        const struct extra *extra = &map->extra[i];
        uint64_t from = gpa - extra->gpa;
        if (gpa < extra->gpa || from >= extra->length)
            continue;
        *offset = extra->offset + from;
        return length_bytes <= extra->length - from && (i || !map->plugged || is_plugged(map, from, length_bytes));
    }
    return false;
}

/* Offset of [gpa, +length) in linear order; false when it is not all in one range of memory. Nothing here can wrap. */
static inline bool ram_offset(const struct physmap *map, gpa_t gpa, uint64_t length_bytes, uint64_t *offset)
{
    if (gpa < map->low_bytes) {
        *offset = gpa;
        return length_bytes <= map->low_bytes - gpa;
    }
    if (gpa >= PHYSMAP_HIGH_BASE && gpa - PHYSMAP_HIGH_BASE < map->high_bytes) {
        *offset = map->low_bytes + (gpa - PHYSMAP_HIGH_BASE);
        return length_bytes <= map->high_bytes - (gpa - PHYSMAP_HIGH_BASE);
    }
    return gpa >= PHYSMAP_EXTRA_BASE && extra_offset(map, gpa, length_bytes, offset);
}

/* [gpa, +length) is inside RAM already. */
static inline bool touches_rom(const struct physmap *map, gpa_t gpa, uint64_t length_bytes)
{
    for (unsigned i = 0; i < map->rom_count; i++) {
        if (gpa < map->rom[i].end && map->rom[i].start < gpa + length_bytes)
            return true;
    }
    return false;
}

/* What lies in RAM; files are always there. */
static uint64_t in_ram(const struct physmap *map, uint64_t offset, uint64_t length_bytes)
{
    if (offset >= map->ram_bytes)
        return 0;
    return length_bytes < map->ram_bytes - offset ? length_bytes : map->ram_bytes - offset;
}

static inline bool is_ready(struct physmap *map, uint64_t offset, uint64_t length_bytes, enum physmap_intent intent)
{
    if (!map->has_states || offset >= map->ram_bytes)
        return true;
    return pages_need(&map->pages, offset, in_ram(map, offset, length_bytes), intent) == 0;
}

void *physmap_get(struct physmap *map, gpa_t gpa, uint64_t length_bytes, enum physmap_intent intent)
{
    uint64_t offset;

    if (!ram_offset(map, gpa, length_bytes, &offset))
        return NULL;
    if (intent == PHYSMAP_WRITE && touches_rom(map, gpa, length_bytes))
        return NULL;
    return is_ready(map, offset, length_bytes, intent) ? map->base + offset : NULL;
}

int physmap_map(struct physmap *map, void *at, int prot)
{
    int ret = pages_window_add(&map->pages, at, prot);

    if (ret < 0)
        return ret;
    for (unsigned i = 0; i < map->file_count; i++) {
        const struct physmap_file *file = &map->file[i];
        /* A private mapping has all rights on a file that may only be read; nobody uses them. */
        if (mmap((uint8_t *)at + map->file_offset[i], file->bytes, prot, (file->readonly ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE | MAP_FIXED, file->fd, 0) ==
            MAP_FAILED) {
            ret = -errno;
            pages_window_remove(&map->pages, at);
            return ret;
        }
    }
    /* A core dump of the VMM is about the VMM. Kernels without the advice lose nothing. */
    (void)madvise(at, map->space_bytes, MADV_DONTDUMP);
    return 0;
}

void physmap_unmap(struct physmap *map, void *at)
{
    pages_window_remove(&map->pages, at);
}

int physmap_guard(struct physmap *map, void *at, uint64_t offset, uint64_t length_bytes, bool on)
{
    uint64_t ram = map->has_states ? in_ram(map, offset, length_bytes) : 0;
    int ret = ram ? pages_guard(&map->pages, at, offset, ram, on) : 0;

    if (ret == 0 && length_bytes > ram && mprotect((uint8_t *)at + offset + ram, length_bytes - ram, on ? PROT_READ : PROT_READ | PROT_WRITE) < 0)
        ret = -errno;
    return ret;
}

bool physmap_take(struct physmap *map, gpa_t gpa, uint64_t length_bytes, enum physmap_intent intent, uint64_t *offset)
{
    return ram_offset(map, gpa, length_bytes, offset) && is_ready(map, *offset, length_bytes, intent);
}

int physmap_need(struct physmap *map, uint64_t offset, uint64_t length_bytes, enum physmap_intent intent)
{
    return is_ready(map, offset, length_bytes, intent) ? 0 : -EIO;
}

bool physmap_is_private(const struct physmap *map, uint64_t offset, uint64_t length_bytes)
{
    return !map->has_states || offset >= map->ram_bytes || pages_are_private(&map->pages, offset, in_ram(map, offset, length_bytes));
}

bool physmap_offset(const struct physmap *map, gpa_t gpa, uint64_t length_bytes, uint64_t *offset)
{
    return ram_offset(map, gpa, length_bytes, offset);
}

gpa_t physmap_gpa(const struct physmap *map, uint64_t offset)
{
    if (offset < map->low_bytes)
        return offset;
    if (offset - map->low_bytes < map->high_bytes)
        return PHYSMAP_HIGH_BASE + (offset - map->low_bytes);
    for (unsigned i = 0; i < map->extra_count; i++)
        if (offset >= map->extra[i].offset && offset - map->extra[i].offset < map->extra[i].length)
            return map->extra[i].gpa + (offset - map->extra[i].offset);
    return map->end;
}

/* ---- dirty pages and watched pages ---- */

/* Bits of the pages first..last that are in `word`. */
static uint64_t word_bits(uint64_t word, uint64_t first, uint64_t last)
{
    uint64_t bits = ~0ull;
    if (word == first / 64)
        bits &= ~0ull << (first % 64);
    if (word == last / 64)
        bits &= ~0ull >> (63 - last % 64);
    return bits;
}

/* Sets the dirty bits; true when one of the pages is watched. */
static bool mark(struct physmap *map, gpa_t gpa, uint64_t length_bytes)
{
    uint64_t offset, first, last;
    bool watched = false;

    if (length_bytes == 0 || !ram_offset(map, gpa, length_bytes, &offset))
        return false;
    first = offset / PAGE_SIZE_BYTES;
    last = (offset + length_bytes - 1) / PAGE_SIZE_BYTES;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t bits = word_bits(word, first, last);
        /* Sequentially consistent: the writer writes bytes and then looks at `watched`, the watcher the other way round. */
        atomic_fetch_or(&map->dirty[word], bits);
        watched |= (atomic_load(&map->watched[word]) & bits) != 0;
    }
    return watched;
}

void physmap_mark_written(struct physmap *map, gpa_t gpa, uint64_t length_bytes)
{
    uint64_t offset, first, last;

    if (length_bytes == 0 || !ram_offset(map, gpa, length_bytes, &offset))
        return;
    first = offset / PAGE_SIZE_BYTES;
    last = (offset + length_bytes - 1) / PAGE_SIZE_BYTES;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t bits = word_bits(word, first, last);
        if ((atomic_load_explicit(&map->dirty[word], memory_order_relaxed) & bits) != bits)
            atomic_fetch_or(&map->dirty[word], bits);
    }
}

void physmap_mark_dirty(struct physmap *map, gpa_t gpa, uint64_t length_bytes)
{
    if (!mark(map, gpa, length_bytes))
        return;
    pthread_rwlock_rdlock(&map->watch_lock);
    for (unsigned i = 0; i < PHYSMAP_WATCHERS_MAX; i++) {
        if (map->watchers[i].changed)
            map->watchers[i].changed(map->watchers[i].opaque, gpa, length_bytes);
    }
    pthread_rwlock_unlock(&map->watch_lock);
}

void physmap_watch_set(struct physmap *map, void (*changed)(void *opaque, gpa_t gpa, uint64_t length_bytes), void *opaque)
{
    struct watcher *free_slot = NULL, *slot = NULL;

    pthread_rwlock_wrlock(&map->watch_lock);
    for (unsigned i = 0; i < PHYSMAP_WATCHERS_MAX; i++) {
        if (!map->watchers[i].changed)
            free_slot = &map->watchers[i];
        else if (map->watchers[i].opaque == opaque)
            slot = &map->watchers[i];
    }
    if (!slot && changed) {
        assert(free_slot);
        slot = free_slot;
    }
    if (slot)
        *slot = (struct watcher){changed, opaque};
    pthread_rwlock_unlock(&map->watch_lock);
}

void physmap_watch_page(struct physmap *map, gpa_t gpa, bool on)
{
    uint64_t offset, bit;

    if (!ram_offset(map, gpa, 1, &offset))
        return;
    bit = 1ull << (offset / PAGE_SIZE_BYTES % 64);
    if (on)
        atomic_fetch_or(&map->watched[offset / PAGE_SIZE_BYTES / 64], bit);
    else
        atomic_fetch_and(&map->watched[offset / PAGE_SIZE_BYTES / 64], ~bit);
}

void physmap_need_marks(struct physmap *map)
{
    map->marks_needed = true;
}

bool physmap_marks_are_needed(const struct physmap *map)
{
    return map->marks_needed;
}

uint64_t physmap_marks(const struct physmap *map, uint64_t offset)
{
    uint64_t page = offset / PAGE_SIZE_BYTES, bits = atomic_load_explicit(&map->dirty[page / 64], memory_order_relaxed) >> page % 64;
    return page % 64 ? bits | atomic_load_explicit(&map->dirty[page / 64 + 1], memory_order_relaxed) << (64 - page % 64) : bits;
}

bool physmap_expects_writes(const struct physmap *map, uint64_t offset)
{
    return physmap_is_private(map, offset, PAGE_SIZE_BYTES) &&
           (!map->marks_needed || atomic_load_explicit(&map->dirty[offset / PAGE_SIZE_BYTES / 64], memory_order_relaxed) >> offset / PAGE_SIZE_BYTES % 64 & 1);
}

bool physmap_take_dirty(struct physmap *map, gpa_t gpa)
{
    uint64_t offset, bit;

    if (!ram_offset(map, gpa, 1, &offset))
        return false;
    bit = 1ull << (offset / PAGE_SIZE_BYTES % 64);
    return atomic_fetch_and_explicit(&map->dirty[offset / PAGE_SIZE_BYTES / 64], ~bit, memory_order_acq_rel) & bit;
}

/* Words of the map of dirty pages that are about RAM; the last may be about files as well, which bits_of_ram cuts off. */
static uint64_t ram_words(const struct physmap *map)
{
    return (map->ram_bytes / PAGE_SIZE_BYTES + 63) / 64;
}

static uint64_t bits_of_ram(const struct physmap *map, uint64_t word)
{
    return word_bits(word, 0, map->ram_bytes / PAGE_SIZE_BYTES - 1);
}

void physmap_take_dirty_pages(struct physmap *map, uint64_t *pages)
{
    for (uint64_t word = 0; word < ram_words(map); word++) {
        if (!atomic_load_explicit(&map->dirty[word], memory_order_relaxed))
            continue;
        uint64_t bits = bits_of_ram(map, word);
        pages[word] |= atomic_fetch_and_explicit(&map->dirty[word], ~bits, memory_order_acq_rel) & bits;
    }
}

void physmap_mark_pages(struct physmap *map, const uint64_t *pages)
{
    for (uint64_t word = 0; word < ram_words(map); word++)
        if (pages[word])
            atomic_fetch_or(&map->dirty[word], pages[word] & bits_of_ram(map, word));
}

int physmap_read(struct physmap *map, gpa_t gpa, void *data, uint64_t length_bytes)
{
    uint64_t offset;

    if (length_bytes == 0)
        return 0;
    if (!ram_offset(map, gpa, length_bytes, &offset))
        return -EFAULT;
    if (!is_ready(map, offset, length_bytes, PHYSMAP_READ))
        return -EIO;
    memcpy(data, map->base + offset, length_bytes);
    return 0;
}

int physmap_write(struct physmap *map, gpa_t gpa, const void *data, uint64_t length_bytes)
{
    uint64_t offset;

    if (length_bytes == 0)
        return 0;
    if (!ram_offset(map, gpa, length_bytes, &offset))
        return -EFAULT;
    if (!is_ready(map, offset, length_bytes, PHYSMAP_WRITE))
        return -EIO;
    memcpy(map->base + offset, data, length_bytes);
    physmap_mark_dirty(map, gpa, length_bytes);
    return 0;
}

void physmap_ranges_watch(struct physmap *map, void (*changed)(void *opaque), void *opaque)
{
    map->ranges_changed = changed;
    map->ranges_opaque = opaque;
}

static void ranges_have_changed(const struct physmap *map)
{
    if (map->ranges_changed)
        map->ranges_changed(map->ranges_opaque);
}

int physmap_set_rom(struct physmap *map, gpa_t gpa, uint64_t length_bytes)
{
    uint64_t offset;
    unsigned first = 0, last;

    if (length_bytes == 0 || (gpa & PAGE_MASK_BITS) || (length_bytes & PAGE_MASK_BITS))
        return -EINVAL;
    if (!ram_offset(map, gpa, length_bytes, &offset))
        return -EFAULT;

    /* Ranges first..last-1 touch the new one and melt into it. */
    struct rom_range merged = {gpa, gpa + length_bytes};
    while (first < map->rom_count && map->rom[first].end < merged.start)
        first++;
    for (last = first; last < map->rom_count && map->rom[last].start <= merged.end; last++) {
        if (map->rom[last].start < merged.start)
            merged.start = map->rom[last].start;
        if (map->rom[last].end > merged.end)
            merged.end = map->rom[last].end;
    }
    if (first == last && map->rom_count == ROM_RANGES_MAX)
        return -ENOSPC;
    memmove(&map->rom[first + 1], &map->rom[last], (map->rom_count - last) * sizeof(map->rom[0]));
    map->rom_count = map->rom_count - (last - first) + 1;
    map->rom[first] = merged;
    ranges_have_changed(map);
    return 0;
}

/* Cuts [gpa, end), which is in one range of RAM, at the borders of ROM. */
static unsigned ranges_cut(const struct physmap *map, gpa_t gpa, gpa_t end, struct physmap_range *ranges, unsigned count, unsigned capacity)
{
    unsigned n = 0;

    while (gpa < end) {
        while (n < map->rom_count && map->rom[n].end <= gpa)
            n++;
        bool rom = n < map->rom_count && map->rom[n].start <= gpa;
        gpa_t border = n == map->rom_count ? end : rom ? map->rom[n].end : map->rom[n].start;
        uint64_t offset;

        if (border > end)
            border = end;
        if (count < capacity && ram_offset(map, gpa, border - gpa, &offset))
            ranges[count] = (struct physmap_range){gpa, border - gpa, map->base + offset, rom};
        count++;
        gpa = border;
    }
    return count;
}

unsigned physmap_ranges(const struct physmap *map, struct physmap_range *ranges, unsigned capacity)
{
    unsigned count = ranges_cut(map, 0, map->low_bytes, ranges, 0, capacity);

    count = ranges_cut(map, PHYSMAP_HIGH_BASE, PHYSMAP_HIGH_BASE + map->high_bytes, ranges, count, capacity);
    for (unsigned i = 0; i < map->extra_count; i++) {
        const struct extra *extra = &map->extra[i];
        if (i || !map->plugged) {
            count = ranges_cut(map, extra->gpa, extra->gpa + extra->length, ranges, count, capacity);
            continue;
        }
        for (uint64_t at = 0; at < extra->length; at += map->block_bytes)
            if (is_plugged(map, at, map->block_bytes))
                count = ranges_cut(map, extra->gpa + at, extra->gpa + at + map->block_bytes, ranges, count, capacity);
    }
    return count;
}

bool physmap_is_rom(const struct physmap *map, gpa_t gpa)
{
    uint64_t offset;

    return ram_offset(map, gpa, 1, &offset) && touches_rom(map, gpa, 1);
}

int physmap_discard(struct physmap *map, gpa_t gpa, uint64_t length_bytes)
{
    uint64_t offset;

    if (length_bytes == 0 || (gpa & PAGE_MASK_BITS) || (length_bytes & PAGE_MASK_BITS))
        return -EINVAL;
    if (!ram_offset(map, gpa, length_bytes, &offset) || offset >= map->ram_bytes || touches_rom(map, gpa, length_bytes))
        return -EFAULT;
    if (!physmap_is_private(map, offset, length_bytes) && pages_forget(&map->pages, offset, length_bytes) < 0)
        return -EIO;
    while (fallocate(map->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length_bytes) < 0) {
        if (errno != EINTR)
            return -errno;
    }
    physmap_mark_dirty(map, gpa, length_bytes);
    return 0;
}

int physmap_plug(struct physmap *map, gpa_t gpa, uint64_t length_bytes, bool plugged)
{
    uint64_t from = gpa - PHYSMAP_EXTRA_BASE;

    if (gpa < PHYSMAP_EXTRA_BASE || !length_bytes || from >= map->plug_bytes || length_bytes > map->plug_bytes - from || from % map->block_bytes ||
        length_bytes % map->block_bytes)
        return -EINVAL;
    for (uint64_t at = from; at < from + length_bytes; at += map->block_bytes) {
        _Atomic uint8_t *block = &map->plugged[at / map->block_bytes];
        int ret = *block && !plugged ? physmap_discard(map, PHYSMAP_EXTRA_BASE + at, map->block_bytes) : 0;
        if (ret < 0) {
            ranges_have_changed(map);
            return ret;
        }
        atomic_store_explicit(block, plugged, memory_order_relaxed);
    }
    ranges_have_changed(map);
    return 0;
}

uint64_t physmap_resident_bytes(const struct physmap *map)
{
    struct stat st;

    /* Not fstat(): the C library turns that into a call that takes paths, which no thread of a machine may make. */
    return syscall(SYS_fstat, map->fd, &st) == 0 ? (uint64_t)st.st_blocks * 512 : 0;
}

void physmap_zero(struct physmap *map)
{
    if (!physmap_is_private(map, 0, map->ram_bytes) && pages_forget(&map->pages, 0, map->ram_bytes) < 0)
        return;
    /* Giving the pages back is both quicker and thriftier than writing zeroes. */
    if (fallocate(map->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)map->ram_bytes) < 0)
        memset(map->base, 0, map->ram_bytes);
    physmap_mark_dirty(map, 0, map->low_bytes);
    physmap_mark_dirty(map, PHYSMAP_HIGH_BASE, map->high_bytes);
    for (uint64_t at = 0; at < map->plug_bytes; at += map->block_bytes)
        physmap_mark_dirty(map, PHYSMAP_EXTRA_BASE + at, map->block_bytes);
}

/* ---- pages that are elsewhere ---- */

int physmap_share(struct physmap *map, int fd, struct error *err)
{
    int ret = pages_share(&map->pages, fd, err);

    map->has_states |= map->pages.shared != NULL;
    return ret;
}

int physmap_set_source(struct physmap *map, const struct page_source *source, const uint64_t *remote, struct error *err)
{
    int ret = pages_set_source(&map->pages, source, remote, err);

    map->has_states |= map->pages.remote != NULL;
    return ret;
}

void physmap_on_failure(struct physmap *map, void (*failed)(void *ctx, const char *text), void *ctx)
{
    map->pages.on_failure = failed;
    map->pages.failure_ctx = ctx;
}

int physmap_fill(struct physmap *map, uint64_t offset, const void *data, uint64_t length_bytes)
{
    if ((offset & PAGE_MASK_BITS) || (length_bytes & PAGE_MASK_BITS) || offset > map->ram_bytes || length_bytes > map->ram_bytes - offset)
        return -EINVAL;
    return map->has_states ? pages_fill(&map->pages, offset, data, length_bytes) : 0;
}

int physmap_fetch_next(struct physmap *map, uint64_t *offset)
{
    if (!map->has_states)
        return 0;
    for (; *offset < map->ram_bytes; *offset += PAGE_SIZE_BYTES) {
        if (!pages_are_remote(&map->pages, *offset))
            continue;
        int ret = pages_need(&map->pages, *offset, PAGE_SIZE_BYTES, PHYSMAP_READ);
        return ret < 0 ? ret : 1;
    }
    return 0;
}

void physmap_pages_touched(const struct physmap *map, uint64_t *pages)
{
    if (map->has_states)
        pages_touched(&map->pages, pages);
}

void physmap_advise(const struct physmap *map, const uint64_t *pages)
{
    if (map->has_states)
        pages_advise(&map->pages, pages);
}

void physmap_page_counts(const struct physmap *map, uint64_t *remote, uint64_t *shared)
{
    struct pages *pages = (struct pages *)(uintptr_t)&map->pages;

    pthread_mutex_lock(&pages->lock);
    *remote = pages->remote_left;
    *shared = pages->shared_left;
    pthread_mutex_unlock(&pages->lock);
}

void physmap_pages_elsewhere(const struct physmap *map, uint64_t *pages)
{
    if (map->has_states)
        pages_elsewhere(&map->pages, pages);
}
