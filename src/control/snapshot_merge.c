/*
 * What of the directory of snapshots reads memory: removing a snapshot that others need, and comparing two.
 *
 * Who needs a snapshot that is to go gets a new memory file, which has both its own pages and those of the other that it lacks. snapshot.json then names that file and another
 * base, in one step; until then, nothing that counts has changed. A merged file is encrypted when one of the two was.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/snapshot_store_priv.h"

/* A memory file, raw or of chunks. */
struct source {
    int fd; /* raw; else -1 */
    struct chunk_reader *reader;
    const char *path;
    uint64_t size_bytes;
};

static int source_open(struct source *source, const char *path, const struct chunk_secret *secret, struct error *err)
{
    struct stat st;
    *source = (struct source){.fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), .path = path};
    if (source->fd < 0 || fstat(source->fd, &st))
        return error_set(err, -errno, "cannot read %s: %s", path, strerror(errno));
    source->size_bytes = (uint64_t)st.st_size;
    if (!chunk_file_is(source->fd))
        return source->size_bytes && source->size_bytes % CHUNK_PAGE_BYTES == 0 ? 0 : error_set(err, -EBADMSG, "%s is no memory of a guest", path);
    int r = chunk_reader_open(&source->reader, source->fd, path, secret, CHUNK_FILE_BYTES_MAX, err);
    if (r)
        return r;
    source->fd = -1;
    source->size_bytes = chunk_reader_info(source->reader)->size_bytes;
    return 0;
}

static void source_close(struct source *source)
{
    if (source->fd >= 0)
        close(source->fd);
    chunk_reader_close(source->reader);
}

static bool is_layer(const struct source *source)
{
    return source->reader && chunk_reader_info(source->reader)->layer;
}

static uint64_t mask_of(const struct source *source, uint64_t chunk)
{
    uint64_t pages = (source->size_bytes - chunk * CHUNK_BYTES + CHUNK_PAGE_BYTES - 1) / CHUNK_PAGE_BYTES;
    return pages >= CHUNK_PAGES ? ~0ull : (1ull << pages) - 1;
}

/* The pages of `wanted` that it has; *had gets them. What is whole has all. */
static int source_read(struct source *source, uint64_t chunk, uint64_t wanted, uint8_t *data, uint64_t *had, struct error *err)
{
    *had = wanted & mask_of(source, chunk);
    if (source->reader) {
        uint64_t present = chunk_reader_present(source->reader, chunk, NULL), absent = *had & ~present;
        if (is_layer(source))
            *had &= present;
        for (; !is_layer(source) && absent; absent &= absent - 1)
            memset(data + (size_t)__builtin_ctzll(absent) * CHUNK_PAGE_BYTES, 0, CHUNK_PAGE_BYTES);
        return chunk_reader_read(source->reader, chunk, *had, data, err);
    }
    for (uint64_t left = *had; left; left &= left - 1) {
        size_t at = (size_t)__builtin_ctzll(left) * CHUNK_PAGE_BYTES;
        ssize_t n = pread(source->fd, data + at, CHUNK_PAGE_BYTES, (off_t)(chunk * CHUNK_BYTES + at));
        if (n != CHUNK_PAGE_BYTES)
            return error_set(err, n < 0 ? -errno : -EBADMSG, "cannot read %s at offset %llu: %s", source->path, (unsigned long long)(chunk * CHUNK_BYTES + at),
                             n < 0 ? strerror(errno) : "the file is cut short");
    }
    return 0;
}

/* ---- merging ---- */

struct merge {
    struct source lower, upper;
    struct chunk_writer *writer; /* NULL: raw */
    struct page_sum *sum;        /* of a raw file */
    int out;
    char path[STORE_PATH_BYTES + STORE_NAME_BYTES], upper_path[STORE_PATH_BYTES + STORE_NAME_BYTES], lower_path[STORE_PATH_BYTES + STORE_NAME_BYTES];
};

static int put(struct merge *merge, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err)
{
    static const uint8_t zero[CHUNK_PAGE_BYTES];
    if (merge->writer)
        return chunk_writer_put(merge->writer, chunk, pages, data, false, err);
    for (; pages; pages &= pages - 1) {
        size_t at = (size_t)__builtin_ctzll(pages) * CHUNK_PAGE_BYTES;
        page_sum_put(merge->sum, chunk * CHUNK_PAGES + at / CHUNK_PAGE_BYTES, data + at);
        if (memcmp(data + at, zero, sizeof zero) != 0 && pwrite(merge->out, data + at, CHUNK_PAGE_BYTES, (off_t)(chunk * CHUNK_BYTES + at)) != CHUNK_PAGE_BYTES)
            return error_set(err, errno ? -errno : -EIO, "cannot write %s: %s", merge->path, strerror(errno ? errno : EIO));
    }
    return 0;
}

static int merge_pages(struct merge *merge, void (*progress)(uint64_t done, uint64_t all), struct error *err)
{
    uint64_t size = merge->upper.size_bytes, upper, lower;
    uint8_t *data = malloc(CHUNK_BYTES);
    int r = data ? 0 : error_set(err, -ENOMEM, "out of memory");
    for (uint64_t chunk = 0; r == 0 && chunk * CHUNK_BYTES < size; chunk++) {
        r = source_read(&merge->upper, chunk, ~0ull, data, &upper, err);
        if (r == 0)
            r = source_read(&merge->lower, chunk, ~upper, data, &lower, err);
        if (r == 0)
            r = put(merge, chunk, upper | lower, data, err);
        if (progress && chunk % 64 == 0)
            progress(chunk * CHUNK_BYTES, size);
    }
    free(data);
    return r;
}

static int open_output(struct merge *merge, const struct stored_snapshot *doomed, const struct stored_snapshot *needs, const struct chunk_secret *secret, struct error *err)
{
    bool layer = is_layer(&merge->lower), encrypted = doomed->encrypted || needs->encrypted;
    struct chunk_options options = {.size_bytes = merge->upper.size_bytes, .layer = layer, .secret = encrypted ? secret : NULL, .threads = 2,
                                    .zstd_level = doomed->zstd_level > needs->zstd_level ? doomed->zstd_level : needs->zstd_level};
    merge->out = open(merge->path, O_RDWR | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (merge->out < 0)
        return error_set(err, -errno, "cannot write %s: %s", merge->path, strerror(errno));
    if (!snapshot_id_parse(needs->id, &options.id) || (layer && !snapshot_id_parse(doomed->base_id, &options.base)))
        return error_set(err, -EBADMSG, "%s has no identifier", needs->name);
    if (layer || encrypted || options.zstd_level)
        return chunk_writer_create(&merge->writer, merge->out, merge->path, &options, err);
    merge->sum = page_sum_create(options.size_bytes);
    if (!merge->sum)
        return error_set(err, -ENOMEM, "out of memory");
    return ftruncate(merge->out, (off_t)options.size_bytes) ? error_set(err, -errno, "cannot write %s: %s", merge->path, strerror(errno)) : 0;
}

static int write_merged(struct merge *merge, const struct stored_snapshot *doomed, const struct stored_snapshot *needs, const struct chunk_secret *secret,
                        void (*progress)(uint64_t done, uint64_t all), struct error *err)
{
    int r = source_open(&merge->upper, merge->upper_path, secret, err);
    if (r == 0)
        r = source_open(&merge->lower, merge->lower_path, secret, err);
    if (r == 0 && (merge->lower.size_bytes != merge->upper.size_bytes || !is_layer(&merge->upper)))
        r = error_set(err, -EBADMSG, "%s is no layer upon %s", merge->upper.path, merge->lower.path);
    if (r == 0)
        r = open_output(merge, doomed, needs, secret, err);
    if (r == 0)
        r = merge_pages(merge, progress, err);
    if (r == 0 && merge->writer)
        r = chunk_writer_finish(merge->writer, NULL, err);
    if (r == 0 && fsync(merge->out))
        r = error_set(err, -errno, "cannot write %s: %s", merge->path, strerror(errno));
    return r;
}

/* "memory" becomes "memory2", that "memory3". */
static void next_name(const char *name, char out[STORE_NAME_BYTES])
{
    unsigned number = 1;
    sscanf(name, "memory%9u", &number);
    snprintf(out, STORE_NAME_BYTES, "memory%u", number + 1);
}

/* snapshot.json of the one that needed it; then the old file is nobody's. */
static int switch_over(const struct stored_snapshot *doomed, const struct stored_snapshot *needs, const char *memory, const struct page_sum *sum, struct error *err)
{
    int dir = open(needs->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    json_t *meta = json_deep_copy(needs->meta);
    if (dir < 0 || !meta) {
        json_decref(meta);
        return error_set(err, dir < 0 ? -errno : -ENOMEM, "cannot change %s: %s", needs->path, strerror(dir < 0 ? errno : ENOMEM));
    }
    json_object_set_new(meta, "memory", json_string(memory));
    json_object_set_new(meta, "base_id", json_string(doomed->base_id));
    json_object_set_new(meta, "kind", json_string(doomed->base_id[0] ? "incremental" : "full"));
    json_object_set_new(meta, "encrypted", json_boolean(doomed->encrypted || needs->encrypted));
    json_object_set_new(meta, "zstd_level", json_integer(doomed->zstd_level > needs->zstd_level ? doomed->zstd_level : needs->zstd_level));
    json_object_set_new(meta, "parent_id", json_string(doomed->parent_id));
    char text[PAGE_SUM_TEXT_BYTES];
    if (sum) {
        page_sum_text(sum, text);
        json_object_set_new(meta, "memory_xxh3", json_string(text));
    } else {
        json_object_del(meta, "memory_xxh3");
    }
    int r = snapshot_store_write_meta(dir, meta);
    if (r == 0)
        unlinkat(dir, needs->memory, 0);
    json_decref(meta);
    close(dir);
    return r ? error_set(err, r, "cannot change %s: %s", needs->path, strerror(-r)) : 0;
}

static int absorb(const struct stored_snapshot *doomed, const struct stored_snapshot *needs, const struct chunk_secret *secret,
                  void (*progress)(uint64_t done, uint64_t all), struct error *err)
{
    struct merge merge = {.out = -1, .lower = {.fd = -1}, .upper = {.fd = -1}};
    char name[STORE_NAME_BYTES];
    next_name(needs->memory, name);
    snprintf(merge.path, sizeof merge.path, "%s/%s", needs->path, name);
    snprintf(merge.upper_path, sizeof merge.upper_path, "%s/%s", needs->path, needs->memory);
    snprintf(merge.lower_path, sizeof merge.lower_path, "%s/%s", doomed->path, doomed->memory);
    int r = write_merged(&merge, doomed, needs, secret, progress, err);
    chunk_writer_destroy(merge.writer);
    if (merge.out >= 0)
        close(merge.out);
    source_close(&merge.lower);
    source_close(&merge.upper);
    if (r == 0)
        r = switch_over(doomed, needs, name, merge.sum, err);
    if (r && merge.out >= 0)
        unlink(merge.path);
    page_sum_destroy(merge.sum);
    return r;
}

/* Who only descends from it: the tree stays one. */
static void adopt(const struct stored_snapshot *doomed, const struct stored_snapshot *child)
{
    int dir = open(child->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    json_object_set_new(child->meta, "parent_id", json_string(doomed->parent_id));
    if (dir < 0)
        return;
    (void)!snapshot_store_write_meta(dir, child->meta); /* it is complete without */
    close(dir);
}

int snapshot_store_remove(const char *vm, const char *name, const struct chunk_secret *secret, void (*progress)(uint64_t done, uint64_t all), struct error *err)
{
    struct stored_snapshot *list;
    unsigned count;
    int r = snapshot_store_all_readable(vm, err);
    if (r == 0)
        r = snapshot_store_list(vm, &list, &count, err);
    if (r)
        return r;
    const struct stored_snapshot *doomed = snapshot_store_by_name(list, count, name);
    if (!doomed)
        r = error_set(err, -ENOENT, "%s has no snapshot named %s", vm, name);
    for (unsigned i = 0; r == 0 && i < count; i++) {
        if (strcmp(list[i].base_id, doomed->id) == 0)
            r = absorb(doomed, &list[i], secret, progress, err);
        else if (strcmp(list[i].parent_id, doomed->id) == 0)
            adopt(doomed, &list[i]);
    }
    if (r == 0)
        r = snapshot_store_drop(vm, name, err);
    snapshot_store_free(list, count);
    return r;
}

/* ---- comparing ---- */

struct stack {
    struct source source[STORE_DEPTH_MAX];
    unsigned count;
};

static int stack_open(struct stack *stack, const struct snapshot_chain *chain, struct error *err)
{
    int r = 0;
    stack->count = 0;
    for (unsigned i = 0; r == 0 && i <= chain->files.below_count; i++)
        r = source_open(&stack->source[stack->count++], chain->memory[i], chain->files.secret, err);
    return r;
}

static void stack_close(struct stack *stack)
{
    for (unsigned i = 0; i < stack->count; i++)
        source_close(&stack->source[i]);
}

static int stack_read(struct stack *stack, uint64_t chunk, uint8_t *data, struct error *err)
{
    uint64_t wanted = mask_of(&stack->source[0], chunk), had;
    int r = 0;
    memset(data, 0, CHUNK_BYTES);
    for (unsigned i = 0; r == 0 && wanted && i < stack->count; i++) {
        r = source_read(&stack->source[i], chunk, wanted, data, &had, err);
        wanted &= ~had;
    }
    return r;
}

static int compare(struct stack *a, struct stack *b, uint64_t *different, uint64_t *all, struct error *err)
{
    uint8_t *data = malloc(2 * CHUNK_BYTES);
    int r = data ? 0 : error_set(err, -ENOMEM, "out of memory");
    if (r == 0 && a->source[0].size_bytes != b->source[0].size_bytes)
        r = error_set(err, -EINVAL, "the guests have different memories: %llu and %llu bytes", (unsigned long long)a->source[0].size_bytes,
                      (unsigned long long)b->source[0].size_bytes);
    *all = a->source[0].size_bytes / CHUNK_PAGE_BYTES;
    *different = 0;
    for (uint64_t chunk = 0; r == 0 && chunk * CHUNK_BYTES < a->source[0].size_bytes; chunk++) {
        r = stack_read(a, chunk, data, err);
        if (r == 0)
            r = stack_read(b, chunk, data + CHUNK_BYTES, err);
        for (unsigned page = 0; r == 0 && page < CHUNK_PAGES; page++)
            *different += memcmp(data + page * CHUNK_PAGE_BYTES, data + CHUNK_BYTES + page * CHUNK_PAGE_BYTES, CHUNK_PAGE_BYTES) != 0;
    }
    free(data);
    return r;
}

int snapshot_store_compare(const struct snapshot_chain *a, const struct snapshot_chain *b, uint64_t *different, uint64_t *all, struct error *err)
{
    struct stack *stacks = calloc(2, sizeof *stacks);
    if (!stacks)
        return error_set(err, -ENOMEM, "out of memory");
    int r = stack_open(&stacks[0], a, err);
    if (r == 0)
        r = stack_open(&stacks[1], b, err);
    if (r == 0)
        r = compare(&stacks[0], &stacks[1], different, all, err);
    stack_close(&stacks[0]);
    stack_close(&stacks[1]);
    free(stacks);
    return r;
}
