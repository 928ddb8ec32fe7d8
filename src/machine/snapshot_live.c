/*
 * Snapshots of a machine that runs meanwhile (machine.h). Pages are written while the guest runs. Then it stands still for as long as it takes to see which of them it has
 * written since; when these are few, they are copied and the state is encoded at the same time, otherwise they are written in another round. Nothing goes to a file while the guest
 * stands still, unless it writes more in each round than there is room for.
 * The same rounds also go to a sink instead of files: another host's memory (migrate_out.c). The last pages are then sent while the guest stands still, and the sink decides what comes after.
 * Invariants: `taken` has every mark that was taken since the base; after a failure they are marks again.
 * Threading: the caller's thread writes, with the snapshot lock; `look` runs on the loop's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine/machine_priv.h"
#include "memory/ram_file.h"
#include "state/inputs.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, ftruncate);
SANDBOX_ALLOW(IN_API, pread64);
SANDBOX_ALLOW(IN_API, fsync);

_Static_assert(CHUNK_PAGES == 64 && CHUNK_PAGE_BYTES == PAGE_SIZE_BYTES, "a word of a map of pages is a chunk");
#define ROUNDS_MAX 16u
#define FEW_PAGES 4096u   /* copied in some 5 ms */
#define ROOM_PAGES 16384u /* copied at once in the last round, if need be */

struct live {
    struct machine *machine;
    struct machine_snapshot *snapshot;
    const struct snapshot_sink *sink; /* NULL: files */
    struct chunk_writer *writer; /* NULL: the memory file is raw */
    struct page_sum *sum; /* of a raw file; NULL: none is wanted */
    uint8_t *bounce;      /* of a raw file: a chunk's pages as they are written */
    uint64_t ram_bytes, words; /* a word has a chunk's pages */
    uint64_t *taken, *todo;    /* marks that were taken; pages to be written now */
    uint8_t *room;          /* copies of pages, by chunk and number */
    uint64_t room_pages;
    bool first, last, copied; /* the file is still empty: holes are zero; it is the last round in any case; the last pages are in `room` */
    bool still; /* the guest stands still: sums come later */
    struct state_io *state;
    uint64_t expected, still_since_ns;
};

static uint64_t count_pages(const uint64_t *pages, uint64_t words)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < words; i++)
        count += (uint64_t)__builtin_popcountll(pages[i]);
    return count;
}

static uint8_t *ram_at(const struct live *live, uint64_t chunk)
{
    uint8_t *ram = physmap_get(live->machine->memory, 0, PAGE_SIZE_BYTES, PHYSMAP_READ);
    return ram + chunk * CHUNK_BYTES;
}

/* ---- writing ---- */

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, PAGE_SIZE_BYTES - 1) == 0;
}

static int write_raw_bytes(const struct live *live, const uint8_t *data, uint64_t bytes, uint64_t at, struct error *err)
{
    while (bytes) {
        ssize_t n = pwrite(live->snapshot->memory_fd, data, bytes, (off_t)at);
        if (n < 0 && errno != EINTR)
            return error_set(err, -errno, "cannot write %s: %s", live->snapshot->memory_name, strerror(errno));
        data += n > 0 ? n : 0;
        at += n > 0 ? (uint64_t)n : 0;
        bytes -= n > 0 ? (uint64_t)n : 0;
    }
    return 0;
}

/* Pages in a row, which nobody changes meanwhile. Those of zeroes are left out where the file is empty. */
static int write_raw_run(const struct live *live, uint64_t page, uint64_t count, const uint8_t *data, struct error *err)
{
    int r = 0;
    for (uint64_t n = 0; live->sum && !live->still && n < count; n++)
        page_sum_put(live->sum, page + n, data + n * PAGE_SIZE_BYTES);
    for (uint64_t n = 0, run; r == 0 && n < count; n += run ? run : 1) {
        for (run = 0; n + run < count && !(live->first && is_zero(data + (n + run) * PAGE_SIZE_BYTES)); run++)
            continue;
        r = write_raw_bytes(live, data + n * PAGE_SIZE_BYTES, run * PAGE_SIZE_BYTES, (page + n) * PAGE_SIZE_BYTES, err);
    }
    return r;
}

/* The guest may write to its pages meanwhile: what goes to the file and into the sum is a copy. */
static int write_raw_chunk(struct live *live, uint64_t chunk, uint64_t pages, const uint8_t *data, bool packed, struct error *err)
{
    int r = 0;
    unsigned done = 0, count;
    for (uint64_t left = pages; r == 0 && left; done += count) {
        unsigned first = (unsigned)__builtin_ctzll(left);
        uint64_t ones = ~(left >> first);
        count = ones ? (unsigned)__builtin_ctzll(ones) : CHUNK_PAGES;
        const uint8_t *from = data + (uint64_t)(packed ? done : first) * PAGE_SIZE_BYTES;
        if (!packed && !live->still)
            from = memcpy(live->bounce, from, (size_t)count * PAGE_SIZE_BYTES);
        r = write_raw_run(live, chunk * CHUNK_PAGES + first, count, from, err);
        left &= count == CHUNK_PAGES ? 0 : ~(((1ull << count) - 1) << first);
    }
    return r;
}

/* Sums of the pages that were written while the guest stood still. */
static int sum_last_round(const struct live *live, struct error *err)
{
    for (uint64_t chunk = 0; live->sum && chunk < live->words; chunk++)
        for (uint64_t left = live->todo[chunk]; left; left &= left - 1) {
            uint64_t page = chunk * CHUNK_PAGES + (unsigned)__builtin_ctzll(left);
            ssize_t n = pread(live->snapshot->memory_fd, live->bounce, PAGE_SIZE_BYTES, (off_t)(page * PAGE_SIZE_BYTES));
            if (n != (ssize_t)PAGE_SIZE_BYTES)
                return error_set(err, n < 0 ? -errno : -EIO, "cannot read %s: %s", live->snapshot->memory_name, n < 0 ? strerror(errno) : "it is cut short");
            page_sum_put(live->sum, page, live->bounce);
        }
    return 0;
}

/* One chunk's pages, where they are in RAM or (`packed`) one after the other. */
static int write_chunk(struct live *live, uint64_t chunk, uint64_t pages, const uint8_t *data, bool packed, struct error *err)
{
    live->snapshot->pages += (uint64_t)__builtin_popcountll(pages);
    if (live->sink)
        return live->sink->put(live->sink->ctx, chunk, pages, data, err);
    if (live->writer)
        return chunk_writer_put(live->writer, chunk, pages, data, packed, err);
    return write_raw_chunk(live, chunk, pages, data, packed, err);
}

/* Those of `todo` that are with a page source yet. */
static int fetch_pages(const struct live *live, uint64_t chunk, struct error *err)
{
    for (uint64_t left = live->todo[chunk]; left; left &= left - 1)
        if (physmap_need(live->machine->memory, chunk * CHUNK_BYTES + (uint64_t)__builtin_ctzll(left) * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES, PHYSMAP_READ))
            return error_set(err, -EIO, "a page of the guest's memory cannot be had from where it is");
    return 0;
}

static void tell_progress(const struct live *live)
{
    if (live->snapshot->progress)
        live->snapshot->progress(live->snapshot->ctx, live->snapshot->pages, live->expected > live->snapshot->pages ? live->expected : live->snapshot->pages);
}

/* All of `todo`, from RAM. */
static int write_round(struct live *live, bool tell, struct error *err)
{
    int r = 0;
    for (uint64_t chunk = 0; r == 0 && chunk < live->words; chunk++) {
        r = fetch_pages(live, chunk, err);
        if (r == 0 && live->todo[chunk])
            r = write_chunk(live, chunk, live->todo[chunk], ram_at(live, chunk), false, err);
        if (tell && chunk % 64 == 0)
            tell_progress(live);
    }
    return r;
}

static int write_copies(struct live *live, struct error *err)
{
    const uint8_t *at = live->room;
    int r = 0;
    for (uint64_t chunk = 0; r == 0 && chunk < live->words; chunk++) {
        if (live->todo[chunk])
            r = write_chunk(live, chunk, live->todo[chunk], at, true, err);
        at += (uint64_t)__builtin_popcountll(live->todo[chunk]) * PAGE_SIZE_BYTES;
    }
    return r;
}

static int copy_pages(struct live *live, struct error *err)
{
    uint8_t *to = live->room;
    for (uint64_t chunk = 0; chunk < live->words; chunk++) {
        int r = fetch_pages(live, chunk, err);
        if (r)
            return r;
        for (uint64_t left = live->todo[chunk]; left; left &= left - 1, to += PAGE_SIZE_BYTES)
            memcpy(to, ram_at(live, chunk) + (uint64_t)__builtin_ctzll(left) * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES);
    }
    live->copied = true;
    return 0;
}

/* ---- rounds ---- */

/* Everything stands still. `todo` becomes what was written since the last time. */
static int look(struct machine *machine, void *ctx, struct error *err)
{
    struct live *live = ctx;
    int r = snapshot_collect(machine, live->todo, err);
    if (r)
        return r;
    uint64_t count = count_pages(live->todo, live->words);
    for (uint64_t i = 0; i < live->words; i++)
        live->taken[i] |= live->todo[i];
    /* What little there is since the base is copied at once; everything else begins with a round that the guest runs in. */
    bool at_once = live->snapshot->layer && !live->sink && count <= FEW_PAGES;
    if (live->snapshot->rounds == 0 && !at_once)
        return 0;
    live->snapshot->rounds += live->snapshot->rounds == 0;
    enum snapshot_step step = live->last || count <= FEW_PAGES ? SNAPSHOT_LAST_ROUND : SNAPSHOT_ANOTHER_ROUND;
    if (live->sink)
        step = live->sink->what_now(live->sink->ctx, count, live->still_since_ns, live->last);
    live->last = step != SNAPSHOT_ANOTHER_ROUND;
    if (!live->last)
        return 0;
    live->still = true;
    if (!live->sink && count <= live->room_pages)
        r = copy_pages(live, err);
    else if (step == SNAPSHOT_LAST_ROUND)
        r = write_round(live, false, err);
    live->still = false;
    if (r == 0)
        r = snapshot_encode(machine, &live->snapshot->id, &live->state, err);
    if (r == 0 && live->snapshot->overlay_count) { /* the state names what is below them */
        r = machine_overlay_still(machine, live->snapshot->overlays, live->snapshot->overlay_count, err);
        live->snapshot->overlaid = r == 0;
    }
    return r == 0 && live->sink ? live->sink->finish(live->sink->ctx, live->state, step == SNAPSHOT_LEAVE_REST ? live->todo : NULL, err) : r;
}

static int look_while_still(struct live *live, struct error *err)
{
    uint64_t begin_ns = live->still_since_ns = loop_now_ns();
    memset(live->todo, 0, live->words * sizeof *live->todo);
    int r = machine_call_still(live->machine, look, live, err);
    uint64_t pause_ns = loop_now_ns() - begin_ns;
    if (pause_ns > live->snapshot->pause_ns)
        live->snapshot->pause_ns = pause_ns;
    return r;
}

/* The guest's first pages, or what it wrote since the base; then what it wrote meanwhile, until that is little or rounds do not become shorter. */
static int write_memory(struct live *live, struct error *err)
{
    struct machine_snapshot *snapshot = live->snapshot;
    uint64_t before = UINT64_MAX;
    int r = look_while_still(live, err);
    if (r == 0 && !snapshot->layer) {
        memset(live->todo, 0, live->words * sizeof *live->todo);
        ram_file_pages(live->machine->memory, live->todo);
    }
    while (r == 0 && !live->state) {
        uint64_t count = count_pages(live->todo, live->words);
        live->expected = snapshot->pages + count;
        r = write_round(live, true, err);
        live->first = false;
        snapshot->rounds++;
        live->last = live->sink ? snapshot->rounds == live->sink->rounds_max : snapshot->rounds == ROUNDS_MAX || (snapshot->rounds > 2 && count > before / 4 * 3);
        before = count;
        if (r == 0 && live->sink && live->sink->between)
            r = live->sink->between(live->sink->ctx, err);
        if (r == 0)
            r = look_while_still(live, err);
    }
    if (r == 0)
        r = live->copied ? write_copies(live, err) : sum_last_round(live, err);
    return r;
}

/* ---- files ---- */

static bool is_wrapped(const struct machine_snapshot *snapshot)
{
    return snapshot->zstd_level || (snapshot->secret && snapshot->secret->size_bytes);
}

static int begin_memory_file(struct live *live, struct error *err)
{
    struct machine_snapshot *snapshot = live->snapshot;
    struct chunk_options options = {.size_bytes = live->ram_bytes, .id = snapshot->id, .base = snapshot->parent, .layer = snapshot->layer, .zstd_level = snapshot->zstd_level,
                                    .secret = snapshot->secret, .threads = is_wrapped(snapshot) ? snapshot->threads : 0};
    if (snapshot->layer || is_wrapped(snapshot))
        return chunk_writer_create(&live->writer, snapshot->memory_fd, snapshot->memory_name, &options, err);
    live->bounce = malloc(CHUNK_BYTES);
    live->sum = snapshot->sums ? page_sum_create(live->ram_bytes) : NULL;
    if (!live->bounce || (snapshot->sums && !live->sum))
        return error_set(err, -ENOMEM, "out of memory");
    return ftruncate(snapshot->memory_fd, (off_t)live->ram_bytes) < 0 ? error_set(err, -errno, "cannot write %s: %s", snapshot->memory_name, strerror(errno)) : 0;
}

static int end_memory_file(struct live *live, struct error *err)
{
    struct chunk_totals totals;
    if (!live->writer) {
        live->snapshot->memory_bytes = live->ram_bytes;
        if (live->sum)
            page_sum_text(live->sum, live->snapshot->memory_sum);
        return 0;
    }
    int r = chunk_writer_finish(live->writer, &totals, err);
    live->snapshot->memory_bytes = r ? 0 : totals.stored_bytes;
    return r;
}

static int write_state_file(struct live *live, struct error *err)
{
    struct machine_snapshot *snapshot = live->snapshot;
    size_t size;
    const uint8_t *data = state_writer_data(live->state, &size);
    snapshot->state_bytes = size;
    if (is_wrapped(snapshot)) {
        struct chunk_options options = {.size_bytes = size, .id = snapshot->id, .zstd_level = snapshot->zstd_level, .secret = snapshot->secret};
        return chunk_file_write(snapshot->state_fd, snapshot->state_name, data, &options, err);
    }
    if (snapshot->sums)
        page_sum_bytes(data, size, snapshot->state_sum);
    for (size_t done = 0; done < size;) {
        ssize_t n = write(snapshot->state_fd, data + done, size - done);
        if (n < 0 && errno != EINTR)
            return error_set(err, -errno, "cannot write %s: %s", snapshot->state_name, strerror(errno));
        done += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* ---- all of it ---- */

/* Files that go on changing would not fit the memory later. */
static int check_files(struct machine *machine, unsigned overlays, struct error *err)
{
    const struct machine_config *config = machine->config;
    unsigned disks = 0;
    char what[160] = "";
    pthread_mutex_lock(&machine->device_lock);
    for (unsigned i = 0; i < config->disk_count && !what[0]; i++)
        if (!config->disk[i].readonly && ++disks > overlays)
            snprintf(what, sizeof what, "disk %.120s", config->disk[i].path);
    for (unsigned i = 0; i < config->pmem_count && !what[0]; i++)
        if (!config->pmem[i].readonly)
            snprintf(what, sizeof what, "persistent memory %.120s", config->pmem[i].path);
    pthread_mutex_unlock(&machine->device_lock);
    return what[0] ? error_set(err, -ENOTSUP, "%s can be written by the guest, and is no part of the snapshot; without it (--no-disks) the file must be kept as it is now", what)
                   : 0;
}

static int prepare(struct live *live, struct error *err)
{
    struct machine_snapshot *snapshot = live->snapshot;
    struct machine *machine = live->machine;
    int r = snapshot->without_disks ? 0 : check_files(machine, snapshot->overlay_count, err);
    if (r)
        return r;
    live->ram_bytes = physmap_ram_bytes(machine->memory);
    live->words = (live->ram_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
    live->room_pages = live->sink ? 1 : live->ram_bytes / PAGE_SIZE_BYTES < ROOM_PAGES ? live->ram_bytes / PAGE_SIZE_BYTES : ROOM_PAGES;
    live->first = true;
    live->taken = calloc(live->words, sizeof *live->taken);
    live->todo = calloc(live->words, sizeof *live->todo);
    /* Touched now, so that copying is all that is left to do later; for a layer, which may be small, that takes longer than what it saves. */
    int touched = snapshot->layer ? 0 : MAP_POPULATE;
    live->room = mmap(NULL, live->room_pages * PAGE_SIZE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | touched, -1, 0);
    if (live->room == MAP_FAILED)
        live->room = NULL;
    if (!live->taken || !live->todo || !live->room)
        return error_set(err, -ENOMEM, "out of memory");
    r = inputs_random(&snapshot->id, sizeof snapshot->id);
    if (r)
        return error_set(err, r, "no random numbers: %s", strerror(-r));
    struct chunk_id base;
    snapshot->has_parent = machine_snapshot_base(machine, &base);
    if (snapshot->layer && (!snapshot->has_parent || memcmp(&base, &snapshot->parent, sizeof base) != 0))
        return error_set(err, -ESTALE, "what the guest wrote since that snapshot is not known: another one was made or loaded since, or none at all");
    snapshot->parent = base;
    return live->sink ? 0 : begin_memory_file(live, err);
}

static void release(struct live *live)
{
    chunk_writer_destroy(live->writer);
    page_sum_destroy(live->sum);
    free(live->bounce);
    state_io_destroy(live->state);
    if (live->room)
        munmap(live->room, live->room_pages * PAGE_SIZE_BYTES);
    free(live->taken);
    free(live->todo);
}

int snapshot_to_sink(struct machine *machine, struct machine_snapshot *snapshot, const struct snapshot_sink *sink, struct error *err)
{
    struct live live = {.machine = machine, .snapshot = snapshot, .sink = sink};
    uint64_t begin_ns = loop_now_ns();
    if (pthread_mutex_trylock(&machine->snapshot_lock)) {
        machine_overlays_close(snapshot->overlays, snapshot->overlay_count);
        return error_set(err, -EBUSY, "another snapshot is being made");
    }
    snapshot->rounds = 0;
    snapshot->overlaid = false;
    snapshot->pages = snapshot->pause_ns = 0;
    snapshot->memory_sum[0] = snapshot->state_sum[0] = '\0';
    int r = prepare(&live, err);
    if (r == 0 && snapshot->overlay_count)
        machine_disks_write_back(machine);
    if (r == 0)
        r = write_memory(&live, err);
    if (r == 0 && !sink)
        r = end_memory_file(&live, err);
    if (r == 0 && !sink)
        r = write_state_file(&live, err);
    live.expected = 0;
    tell_progress(&live);
    if (r == 0)
        snapshot_set_base(machine, &snapshot->id);
    else if (live.taken)
        physmap_mark_pages(machine->memory, live.taken);
    pthread_mutex_unlock(&machine->snapshot_lock);
    machine_overlays_close(snapshot->overlays, snapshot->overlay_count);
    release(&live);
    snapshot->duration_ns = loop_now_ns() - begin_ns;
    return r;
}

int machine_snapshot_live(struct machine *machine, struct machine_snapshot *snapshot, struct error *err)
{
    return snapshot_to_sink(machine, snapshot, NULL, err);
}
