/*
 * What loading a snapshot reads: state files that are compressed or encrypted, and memory in layers (state/chunk_file.h). The lowest layer is a raw file or a chunk file with
 * all pages; the others are laid upon it. Usually nothing of memory is read: the raw file is shared, and what chunk files have comes from a page source made of them. An flock() tells
 * those who would write to a raw file in place that it is in use (snapshot.c).
 * Threading: no vCPU runs while loading. The source is constant, and may be asked by any thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "machine/machine_priv.h"
#include "memory/page_source.h"
#include "memory/ram_file.h"

_Static_assert(CHUNK_BYTES % PAGE_SOURCE_BYTES == 0, "what is fetched at once is in one chunk");

#define STATE_FILE_BYTES_MAX (256ull << 20)

static int read_plain(int fd, const char *path, size_t size, char **data, struct error *err)
{
    size_t done = 0;
    *data = malloc(size + 1);
    if (!*data)
        return error_set(err, -ENOMEM, "no memory to read %s", path);
    while (done < size) {
        ssize_t n = read(fd, *data + done, size - done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            free(*data);
            *data = NULL;
            return error_set(err, n < 0 ? -errno : -EIO, "cannot read %s: %s", path, n < 0 ? strerror(errno) : "it shrank meanwhile");
        }
        done += (size_t)n;
    }
    return 0;
}

int snapshot_read_state(const struct snapshot_files *files, char **data, size_t *size, struct error *err)
{
    struct chunk_reader *reader = NULL;
    struct stat st;
    int fd = open(files->state, O_RDONLY | O_CLOEXEC), r = 0;
    *data = NULL;
    if (fd < 0 || fstat(fd, &st) < 0)
        r = error_set(err, -errno, "cannot read %s: %s", files->state, strerror(errno));
    else if (!S_ISREG(st.st_mode) || (uint64_t)st.st_size > STATE_FILE_BYTES_MAX)
        r = error_set(err, -EINVAL, "%s is not a snapshot's state file", files->state);
    else if (!chunk_file_is(fd))
        r = read_plain(fd, files->state, *size = (size_t)st.st_size, data, err);
    else if ((r = chunk_reader_open(&reader, fd, files->state, files->secret, STATE_FILE_BYTES_MAX, err)) == 0) {
        fd = -1; /* the reader's */
        r = chunk_reader_read_all(reader, data, size, err);
    }
    chunk_reader_close(reader);
    if (fd >= 0)
        close(fd);
    return r;
}

/* RAM's bytes are one range of host addresses; whole chunks of it, but for the last. */
static int read_chunks(struct machine *machine, struct chunk_reader *reader, struct error *err)
{
    uint64_t size = physmap_ram_bytes(machine->memory);
    bool layer = chunk_reader_info(reader)->layer;
    uint8_t *ram = physmap_get(machine->memory, 0, PAGE_SIZE_BYTES, PHYSMAP_READ);
    int r = 0;
    for (uint64_t chunk = 0; r == 0 && chunk * CHUNK_BYTES < size; chunk++) {
        uint64_t zero, present = chunk_reader_present(reader, chunk, &zero);
        uint64_t wanted = layer ? present : present & ~zero; /* RAM is zero before the lowest */
        if (wanted)
            r = chunk_reader_read(reader, chunk, wanted, ram + chunk * CHUNK_BYTES, err);
    }
    return r;
}

/* The file number `level`, 0 the highest. *raw: it is no chunk file, and `fd` stays open. */
static int open_layer(uint64_t size, const struct snapshot_files *files, unsigned level, struct chunk_reader **reader, int *fd, struct error *err)
{
    const char *path = level ? files->below[level - 1] : files->memory;
    *reader = NULL;
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0)
        return error_set(err, -errno, "cannot read %s: %s", path, strerror(errno));
    if (!chunk_file_is(*fd))
        return 0;
    int r = chunk_reader_open(reader, *fd, path, files->secret, CHUNK_FILE_BYTES_MAX, err);
    if (r)
        close(*fd);
    *fd = -1;
    if (r == 0 && chunk_reader_info(*reader)->size_bytes != size)
        r = error_set(err, -EINVAL, "%s: it has %llu bytes and the guest's memory %llu", path, (unsigned long long)chunk_reader_info(*reader)->size_bytes,
                      (unsigned long long)size);
    if (r) {
        chunk_reader_close(*reader);
        *reader = NULL;
    }
    return r;
}

/* What the file says that it lies upon, which the next one must be. */
static int check_order(const struct snapshot_files *files, unsigned level, const struct chunk_reader *reader, const struct chunk_id *wanted, struct error *err)
{
    const char *path = level ? files->below[level - 1] : files->memory;
    const struct chunk_info *info = reader ? chunk_reader_info(reader) : NULL;
    bool layer = info && info->layer;
    if (level && info && memcmp(&info->id, wanted, sizeof *wanted) != 0)
        return error_set(err, -EINVAL, "%s is not what the memory above it lies upon", path);
    if (layer && level == files->below_count)
        return error_set(err, -EINVAL, "%s has only what changed since the snapshot before, which is needed, too", path);
    if (!layer && level < files->below_count)
        return error_set(err, -EINVAL, "%s is whole: nothing belongs below it", path);
    return 0;
}

/* ---- all layers ---- */

struct layers {
    unsigned count; /* chunk files, the highest first */
    int raw_fd;     /* what they lie upon, -1: nothing */
    struct chunk_reader *reader[];
};

static void layers_close(void *ctx)
{
    struct layers *layers = ctx;
    for (unsigned i = 0; i < layers->count; i++)
        chunk_reader_close(layers->reader[i]);
    if (layers->raw_fd >= 0)
        close(layers->raw_fd);
    free(layers);
}

static int layers_open(const struct machine *machine, const struct snapshot_files *files, struct layers **out, struct error *err)
{
    struct layers *layers = calloc(1, sizeof *layers + (files->below_count + 1) * sizeof layers->reader[0]);
    const struct chunk_id *wanted = NULL;
    bool more = true;
    int r = 0;
    if (!layers)
        return error_set(err, -ENOMEM, "out of memory");
    layers->raw_fd = -1;
    for (unsigned level = 0; r == 0 && more; level++) {
        struct chunk_reader *reader;
        r = open_layer(physmap_ram_bytes(machine->memory), files, level, &reader, &layers->raw_fd, err);
        if (r == 0 && reader)
            layers->reader[layers->count++] = reader;
        if (r == 0)
            r = check_order(files, level, reader, wanted, err);
        more = r == 0 && reader && chunk_reader_info(reader)->layer;
        wanted = more ? &chunk_reader_info(reader)->base : NULL;
    }
    if (r)
        layers_close(layers);
    else
        *out = layers;
    return r;
}

static const char *raw_path(const struct snapshot_files *files, const struct layers *layers)
{
    return layers->count ? files->below[layers->count - 1] : files->memory;
}

static int read_whole(struct machine *machine, const struct snapshot_files *files, const struct layers *layers, struct error *err)
{
    int r = 0;
    if (layers->raw_fd >= 0 && (r = ram_file_read(machine->memory, layers->raw_fd, err)))
        r = error_prefix(err, "%s", raw_path(files, layers));
    for (unsigned n = layers->count; r == 0 && n > 0; n--)
        r = read_chunks(machine, layers->reader[n - 1], err);
    return r;
}

/* ---- page by page ---- */

/* What page_source asks for is in one chunk. Of each page the highest layer counts. */
static int layers_fetch(void *ctx, uint64_t offset, void *data, uint64_t bytes, struct error *err)
{
    const struct layers *layers = ctx;
    uint64_t chunk = offset / CHUNK_BYTES;
    unsigned first = (unsigned)(offset % CHUNK_BYTES / PAGE_SIZE_BYTES), count = (unsigned)(bytes / PAGE_SIZE_BYTES);
    uint64_t left = (count < CHUNK_PAGES ? (1ull << count) - 1 : ~0ull) << first;
    int r = 0;
    for (unsigned n = 0; r == 0 && left && n < layers->count; n++) {
        uint64_t here = chunk_reader_present(layers->reader[n], chunk, NULL) & left;
        if (here)
            r = chunk_reader_read(layers->reader[n], chunk, here, (uint8_t *)data - offset % CHUNK_BYTES, err);
        left &= ~here;
    }
    return r;
}

/* Pages that chunk files have. Those that are zero need no reading where nothing lies below. */
static void layers_pages(const struct layers *layers, uint64_t chunks, uint64_t *pages)
{
    for (uint64_t chunk = 0; chunk < chunks; chunk++) {
        uint64_t seen = 0;
        for (unsigned n = 0; n < layers->count; n++) {
            uint64_t zero, present = chunk_reader_present(layers->reader[n], chunk, &zero) & ~seen;
            seen |= present;
            pages[chunk] |= layers->raw_fd >= 0 ? present : present & ~zero;
        }
    }
}

/* Takes `layers` over by a success. */
static int use_source(struct machine *machine, struct layers *layers, struct error *err)
{
    const struct page_source source = {layers_fetch, layers_close, layers};
    uint64_t chunks = (physmap_ram_bytes(machine->memory) + CHUNK_BYTES - 1) / CHUNK_BYTES;
    uint64_t *pages = calloc(chunks, sizeof *pages);
    if (!pages)
        return error_set(err, -ENOMEM, "out of memory");
    layers_pages(layers, chunks, pages);
    int r = physmap_set_source(machine->memory, &source, pages, err);
    free(pages);
    return r;
}

static int use_lazily(struct machine *machine, const struct snapshot_files *files, struct layers *layers, struct error *err)
{
    if (layers->raw_fd >= 0) {
        const char *path = raw_path(files, layers);
        if (flock(layers->raw_fd, LOCK_SH | LOCK_NB) < 0 && errno == EWOULDBLOCK)
            return error_set(err, -EBUSY, "%s is being written by another program", path);
        int r = physmap_share(machine->memory, layers->raw_fd, err);
        if (r)
            return error_prefix(err, "%s", path);
    }
    if (layers->count)
        return use_source(machine, layers, err);
    layers_close(layers);
    return 0;
}

int snapshot_read_memory(struct machine *machine, const struct snapshot_files *files, struct error *err)
{
    struct layers *layers = NULL;
    bool whole = files->whole || strcmp(machine->engine_ops->name, "kvm") == 0; /* the host's kernel looks for pages by itself */
    int r = layers_open(machine, files, &layers, err);
    if (r)
        return r;
    r = whole ? read_whole(machine, files, layers, err) : use_lazily(machine, files, layers, err);
    if (r || whole)
        layers_close(layers);
    return r;
}

int snapshot_check_layers(uint64_t ram_bytes, const struct snapshot_files *files, struct error *err)
{
    struct chunk_id wanted = {0};
    struct stat st;
    int r = 0;
    for (unsigned level = 0; r == 0 && level <= files->below_count; level++) {
        struct chunk_reader *reader;
        int fd;
        r = open_layer(ram_bytes, files, level, &reader, &fd, err);
        if (r)
            break;
        r = check_order(files, level, reader, &wanted, err);
        if (reader)
            wanted = chunk_reader_info(reader)->base;
        else if (r == 0 && (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != ram_bytes))
            r = error_set(err, -EINVAL, "%s is not a guest's memory of %llu bytes", level ? files->below[level - 1] : files->memory, (unsigned long long)ram_bytes);
        chunk_reader_close(reader);
        if (fd >= 0)
            close(fd);
    }
    return r;
}

/* ---- comparing ---- */

#define PARTS_MAX 512u

/* Sections of a state: what is in "machine" counts by itself, with the number of its kind so far. */
struct parts {
    char *data;
    struct part {
        char name[80];
        const void *body;
        size_t size;
    } part[PARTS_MAX];
    unsigned count;
};

static void add_parts(struct parts *parts, const void *data, size_t size, bool inside)
{
    struct state_io *io = state_reader_create(data, size);
    char name[64];
    const void *body;
    size_t bytes;
    while (io && parts->count < PARTS_MAX && state_next(io, name, &body, &bytes)) {
        unsigned same = 1;
        if (!inside && strcmp(name, "machine") == 0) {
            add_parts(parts, body, bytes, true);
            continue;
        }
        struct part *part = &parts->part[parts->count];
        for (unsigned i = 0; i < parts->count; i++)
            same += strncmp(parts->part[i].name, name, strlen(name)) == 0 && strchr("#", parts->part[i].name[strlen(name)]);
        snprintf(part->name, sizeof part->name, same > 1 ? "%s#%u" : "%s", name, same);
        part->body = body;
        part->size = bytes;
        parts->count++;
    }
    state_io_destroy(io);
}

static const struct part *find_part(const struct parts *parts, const char *name)
{
    for (unsigned i = 0; i < parts->count; i++)
        if (strcmp(parts->part[i].name, name) == 0)
            return &parts->part[i];
    return NULL;
}

int machine_snapshot_compare(const struct snapshot_files *a, const struct snapshot_files *b, void (*each)(void *ctx, const char *name, const char *how), void *ctx, struct error *err)
{
    struct parts *parts = calloc(2, sizeof *parts);
    size_t size;
    int r = parts ? snapshot_read_state(a, &parts[0].data, &size, err) : error_set(err, -ENOMEM, "out of memory");
    if (r == 0)
        add_parts(&parts[0], parts[0].data, size, false);
    if (r == 0 && (r = snapshot_read_state(b, &parts[1].data, &size, err)) == 0)
        add_parts(&parts[1], parts[1].data, size, false);
    for (unsigned i = 0; r == 0 && i < parts[0].count; i++) {
        const struct part *one = &parts[0].part[i], *other = find_part(&parts[1], one->name);
        if (!other || one->size != other->size || memcmp(one->body, other->body, one->size) != 0)
            each(ctx, one->name, other ? "" : "(only in the first)");
    }
    for (unsigned i = 0; r == 0 && i < parts[1].count; i++)
        if (!find_part(&parts[0], parts[1].part[i].name))
            each(ctx, parts[1].part[i].name, "(only in the second)");
    if (parts) {
        free(parts[0].data);
        free(parts[1].data);
    }
    free(parts);
    return r;
}
