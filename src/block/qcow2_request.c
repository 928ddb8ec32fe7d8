/*
 * qcow2: requests. Each is worked off from its beginning to its end, a run of like clusters at a time; different ones at the same time.
 *
 * Invariants: clusters that a request is about to give a new place (`allocating`) are left alone by others, which wait; a request that waits pins nothing. A table entry
 * changes only when the data it will point at has been written.
 * Threading: with the device lock held.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "block/qcow2.h"
#include "util/log.h"

enum kind { KIND_NONE, KIND_ZERO, KIND_DATA, KIND_COMPRESSED, KIND_BAD };

static const uint8_t zeroes[65536];

/* ---- waiting and ending ---- */

void qcow2_wait(struct qcow2_op *op)
{
    TAILQ_INSERT_TAIL(&op->image->waiting, op, wait_link);
}

void qcow2_wake_all(struct qcow2 *image)
{
    if (!TAILQ_EMPTY(&image->waiting))
        loop_event_raise(image->wake);
}

uint64_t qcow2_oldest_sequence(const struct qcow2 *image)
{
    const struct qcow2_op *op = TAILQ_FIRST(&image->ops);

    return op ? op->sequence : UINT64_MAX;
}

static void drop_buffers(struct qcow2_op *op)
{
    free(op->iov);
    free(op->head);
    free(op->tail);
    free(op->compressed);
    op->iov = NULL;
    op->head = op->tail = op->compressed = NULL;
}

static void finish(struct qcow2_op *op, int result)
{
    struct qcow2 *image = op->image;
    struct block_request *request = op->request;
    bool inside_submit = op->inside_submit;

    qcow2_table_put(op->table);
    drop_buffers(op);
    TAILQ_REMOVE(&image->ops, op, link);
    free(op);
    qcow2_wake_all(image);
    if (inside_submit)
        block_complete_later(image->block, request, result);
    else
        block_complete(image->block, request, result);
}

void qcow2_op_committed(struct qcow2_op *op, int result)
{
    if (op->request->op == BLOCK_FLUSH || result < 0)
        finish(op, result);
    else
        op->again(op);
}

void qcow2_broken(struct qcow2 *image, const char *what, uint64_t where)
{
    if (image->broken)
        return;
    image->broken = true;
    log_error("disk %s: the image is damaged (%s %llu); nothing is written to it any more; qemu-img check tells more", image->block->path, what, (unsigned long long)where);
    if (image->writable && image->header.version == 3) {
        image->header.incompatible |= QCOW2_CORRUPT;
        image->header_dirty = true;
    }
}

void qcow2_give_up(struct qcow2 *image, const char *why)
{
    if (!image->broken)
        log_error("disk %s: nothing is written to it any more: %s", image->block->path, why);
    image->broken = true;
}

/* The table that guest bytes at op->at are in. True: *table is there, or NULL where there is none; false: the request waits or has ended. */
static bool get_table(struct qcow2_op *op, bool write, struct qcow2_table **table)
{
    struct qcow2 *image = op->image;
    int ret = qcow2_table_get(image, (uint32_t)(op->at / image->table_bytes), write, table);
    bool dirty = false;
    const struct qcow2_table *other;

    if (ret == 0)
        return true;
    if (ret == -EAGAIN) {
        qcow2_wait(op);
        return false;
    }
    if (ret != -ENOBUFS) {
        finish(op, ret);
        return false;
    }
    TAILQ_FOREACH(other, &image->tables, link)
        dirty = dirty || !qcow2_range_empty(&other->dirty) || other->writing;
    if (dirty)
        qcow2_commit_for(image, op);
    else
        qcow2_wait(op); /* for those that have them pinned */
    return false;
}

/* ---- what an entry says ---- */

static enum kind kind_of(struct qcow2 *image, uint64_t entry, uint64_t *host)
{
    *host = entry & QCOW2_OFFSET;
    if (entry & QCOW2_COMPRESSED)
        return KIND_COMPRESSED;
    if ((entry & QCOW2_L2_RESERVED) || *host % image->cluster_bytes || ((entry & QCOW2_ZERO) && image->header.version < 3)) {
        qcow2_broken(image, "L2 entry", entry);
        return KIND_BAD;
    }
    if (entry & QCOW2_ZERO)
        return KIND_ZERO;
    return *host ? KIND_DATA : KIND_NONE;
}

/* The cluster is this image's alone. */
static bool is_own(struct qcow2 *image, uint64_t host)
{
    uint64_t cluster = host / image->cluster_bytes;

    if (!host || qcow2_refcount(image, cluster) != 1)
        return false;
    if (!qcow2_is_metadata(image, cluster))
        return true;
    qcow2_broken(image, "data on a table at byte", host);
    return false;
}

/* Vectors of a part of the request's data; they are op->iov then, behind `before` free ones. */
static int cut_vectors(struct qcow2_op *op, unsigned before, unsigned after, uint64_t skip, uint64_t bytes)
{
    const struct block_request *request = op->request;
    bool zero = request->op == BLOCK_WRITE_ZEROES;
    unsigned most = before + after + (zero ? (unsigned)(bytes / sizeof(zeroes)) + 1 : request->iov_count), count = before;

    free(op->iov);
    op->iov = calloc(most, sizeof(*op->iov));
    if (!op->iov)
        return -ENOMEM;
    for (; zero && bytes; count++) {
        op->iov[count] = (struct iovec){(void *)(uintptr_t)zeroes, bytes < sizeof(zeroes) ? bytes : sizeof(zeroes)};
        bytes -= op->iov[count].iov_len;
    }
    for (unsigned i = 0; !zero && i < request->iov_count && bytes; i++) {
        struct iovec part = request->iov[i];

        if (skip >= part.iov_len) {
            skip -= part.iov_len;
            continue;
        }
        part.iov_base = (uint8_t *)part.iov_base + skip;
        part.iov_len -= skip;
        part.iov_len = part.iov_len < bytes ? part.iov_len : bytes;
        skip = 0;
        bytes -= part.iov_len;
        op->iov[count++] = part;
    }
    op->iov_count = count;
    return 0;
}

/* ---- reading parts ---- */

static void sub_done(struct block_request *request, int result)
{
    struct qcow2_op *op = (struct qcow2_op *)request;

    op->next(op, result);
}

static void submit_sub(struct qcow2_op *op, struct block *to, enum block_op kind, uint64_t offset, struct iovec *iov, unsigned count, uint64_t bytes)
{
    op->sub = (struct block_request){.op = kind, .offset_bytes = offset, .length_bytes = bytes, .iov = iov, .iov_count = count, .done = sub_done};
    block_submit_unchecked(to, &op->sub);
}

static void copy_out(const struct iovec *iov, unsigned count, const uint8_t *data)
{
    for (unsigned i = 0; i < count; i++) {
        if (data) {
            memcpy(iov[i].iov_base, data, iov[i].iov_len);
            data += iov[i].iov_len;
        } else {
            memset(iov[i].iov_base, 0, iov[i].iov_len);
        }
    }
}

static void compressed_read(struct qcow2_op *op, int result)
{
    struct qcow2 *image = op->image;
    uint64_t offset, bytes;

    if (result == 0) {
        qcow2_compressed_place(image, op->part.entry, &offset, &bytes);
        image->unpacked_entry = 0;
        result = qcow2_decompress(image->header.zstd, op->compressed + offset % QCOW2_SECTOR_BYTES, (size_t)bytes, image->unpacked, image->cluster_bytes);
        if (result == 0)
            image->unpacked_entry = op->part.entry;
        else
            LOG_GUEST(LOG_ERROR, "disk %s: the compressed cluster at byte %llu is damaged", image->block->path, (unsigned long long)offset);
    }
    free(op->compressed);
    op->compressed = NULL;
    if (result == 0)
        copy_out(op->part.iov, op->part.iov_count, image->unpacked + op->part.at % image->cluster_bytes);
    op->part.done(op, result);
}

static int read_compressed(struct qcow2_op *op)
{
    struct qcow2 *image = op->image;
    uint64_t offset, bytes, end;

    if (!image->unpacked && !(image->unpacked = malloc(image->cluster_bytes)))
        return -ENOMEM;
    if (image->unpacked_entry == op->part.entry) {
        copy_out(op->part.iov, op->part.iov_count, image->unpacked + op->part.at % image->cluster_bytes);
        return 1;
    }
    qcow2_compressed_place(image, op->part.entry, &offset, &bytes);
    end = (offset + bytes + QCOW2_SECTOR_BYTES - 1) / QCOW2_SECTOR_BYTES * QCOW2_SECTOR_BYTES;
    offset = offset / QCOW2_SECTOR_BYTES * QCOW2_SECTOR_BYTES;
    if (offset >= block_size_bytes(image->file) && !image->writable)
        return -EIO;
    op->compressed = malloc(end - offset);
    if (!op->compressed)
        return -ENOMEM;
    op->part.vector = (struct iovec){op->compressed, end - offset};
    op->next = compressed_read;
    submit_sub(op, image->file, BLOCK_READ, offset, &op->part.vector, 1, end - offset);
    return 0;
}

/*
 * Reads guest bytes that lie in clusters of one kind, in a row in the file, as `entry` of the first says. Returns 1 when they are there already, 0 when `done` will be called, or -errno.
 */
static int read_part(struct qcow2_op *op, uint64_t entry, uint64_t at, struct iovec *iov, unsigned iov_count, uint64_t bytes, void (*done)(struct qcow2_op *op, int result))
{
    struct qcow2 *image = op->image;
    uint64_t host;
    enum kind kind = kind_of(image, entry, &host);

    op->part = (struct qcow2_part){.entry = entry, .at = at, .iov = iov, .iov_count = iov_count, .done = done};
    op->next = done;
    switch (kind) {
    case KIND_NONE:
        if (image->backing && at < block_size_bytes(image->backing)) {
            submit_sub(op, image->backing, BLOCK_READ, at, iov, iov_count, bytes);
            return 0;
        }
        copy_out(iov, iov_count, NULL);
        return 1;
    case KIND_ZERO:
        copy_out(iov, iov_count, NULL);
        return 1;
    case KIND_DATA:
        submit_sub(op, image->file, BLOCK_READ, host + at % image->cluster_bytes, iov, iov_count, bytes);
        return 0;
    case KIND_COMPRESSED:
        return read_compressed(op);
    case KIND_BAD:
        break;
    }
    return -EIO;
}

/* ---- reads ---- */

/* How many of the bytes from op->at on, up to `most`, are like the first and follow it in the file. */
static uint64_t like_bytes(struct qcow2_op *op, const struct qcow2_table *table, uint64_t most)
{
    struct qcow2 *image = op->image;
    uint64_t in_table = image->table_bytes - op->at % image->table_bytes, host, first_host, bytes = image->cluster_bytes - op->at % image->cluster_bytes;
    uint32_t index = (uint32_t)(op->at % image->table_bytes / image->cluster_bytes);
    uint64_t end = image->backing ? block_size_bytes(image->backing) : 0;
    enum kind kind = table ? kind_of(image, qcow2_table_entry(table, index), &first_host) : KIND_NONE;

    most = most < in_table ? most : in_table;
    if (!table)
        bytes = most;
    for (uint32_t i = 1; table && bytes < most && kind != KIND_COMPRESSED; i++) {
        if (kind_of(image, qcow2_table_entry(table, index + i), &host) != kind || (kind == KIND_DATA && host != first_host + (uint64_t)i * image->cluster_bytes))
            break;
        bytes += image->cluster_bytes;
    }
    bytes = bytes < most ? bytes : most;
    if (kind == KIND_NONE && op->at < end && bytes > end - op->at)
        bytes = end - op->at; /* the backing file is shorter */
    return bytes;
}

static void read_step(struct qcow2_op *op);

static void run_read(struct qcow2_op *op, int result)
{
    if (result < 0) {
        finish(op, result);
        return;
    }
    op->done_bytes += op->run_bytes;
    read_step(op);
}

static void read_step(struct qcow2_op *op)
{
    struct block_request *request = op->request;
    struct qcow2 *image = op->image;
    struct qcow2_table *table;
    uint64_t entry;
    int ret = 1;

    while (ret == 1 && op->done_bytes < request->length_bytes) {
        op->at = request->offset_bytes + op->done_bytes;
        if (!get_table(op, false, &table))
            return;
        op->run_bytes = like_bytes(op, table, request->length_bytes - op->done_bytes);
        entry = table ? qcow2_table_entry(table, (uint32_t)(op->at % image->table_bytes / image->cluster_bytes)) : 0;
        qcow2_table_put(table);
        ret = cut_vectors(op, 0, 0, op->done_bytes, op->run_bytes);
        if (ret == 0)
            ret = read_part(op, entry, op->at, op->iov, op->iov_count, op->run_bytes, run_read);
        if (ret == 1)
            op->done_bytes += op->run_bytes;
    }
    if (ret)
        finish(op, ret < 0 ? ret : 0);
}

/* ---- writes ---- */

/* How many clusters from `first` on nobody else is giving a new place. */
static uint32_t not_allocating(const struct qcow2_op *op, uint64_t first, uint32_t count)
{
    const struct qcow2 *image = op->image;
    const struct qcow2_op *other;

    TAILQ_FOREACH(other, &image->ops, link) {
        uint64_t other_first = other->at / image->cluster_bytes;

        if (!other->allocating || other == op || other_first >= first + count || other_first + other->cluster_count <= first)
            continue;
        count = other_first > first ? (uint32_t)(other_first - first) : 0;
    }
    return count;
}

static void free_entry(struct qcow2 *image, uint64_t entry)
{
    uint64_t host, bytes;

    switch (kind_of(image, entry, &host)) {
    case KIND_COMPRESSED:
        qcow2_compressed_place(image, entry, &host, &bytes);
        qcow2_free(image, host / image->cluster_bytes, (host + bytes - 1) / image->cluster_bytes - host / image->cluster_bytes + 1);
        break;
    case KIND_ZERO:
    case KIND_DATA:
        if (host)
            qcow2_free(image, host / image->cluster_bytes, 1);
        break;
    default:
        break;
    }
}

static void again(struct qcow2_op *op)
{
    op->again(op);
}

static void allocated_written(struct qcow2_op *op, int result)
{
    struct qcow2 *image = op->image;
    uint32_t index = (uint32_t)(op->at % image->table_bytes / image->cluster_bytes);

    if (result < 0) {
        if (op->fresh)
            qcow2_unalloc(image, op->cluster, op->cluster_count);
        finish(op, result);
        return;
    }
    for (uint32_t i = 0; i < op->cluster_count; i++) {
        if (op->fresh)
            free_entry(image, qcow2_table_entry(op->table, index + i));
        qcow2_table_set(op->table, index + i, (op->cluster + i) * image->cluster_bytes | QCOW2_COPIED);
    }
    op->allocating = false;
    op->done_bytes += op->run_bytes;
    qcow2_table_put(op->table);
    op->table = NULL;
    drop_buffers(op);
    qcow2_wake_all(image);
    again(op);
}

static void write_allocated(struct qcow2_op *op, int result)
{
    unsigned before = op->head_bytes ? 1 : 0, after = op->tail_bytes ? 1 : 0;

    if (result >= 0)
        result = cut_vectors(op, before, after, op->done_bytes, op->run_bytes);
    if (result < 0) {
        allocated_written(op, result);
        return;
    }
    if (before)
        op->iov[0] = (struct iovec){op->head, op->head_bytes};
    if (after)
        op->iov[op->iov_count++] = (struct iovec){op->tail, op->tail_bytes};
    op->next = allocated_written;
    submit_sub(op, op->image->file, BLOCK_WRITE, op->cluster * op->image->cluster_bytes, op->iov, op->iov_count,
               (uint64_t)op->cluster_count * op->image->cluster_bytes);
}

/* What was there, of a cluster that is only partly written. Behind the disk's end, or the backing file's, there are zeroes. */
static int read_rest(struct qcow2_op *op, uint8_t **buffer, uint32_t bytes, uint64_t at, void (*next)(struct qcow2_op *op, int result))
{
    struct qcow2 *image = op->image;
    uint64_t entry = qcow2_table_entry(op->table, (uint32_t)(at % image->table_bytes / image->cluster_bytes)), end = image->header.size_bytes, host;

    *buffer = calloc(1, bytes);
    if (!*buffer)
        return -ENOMEM;
    if (kind_of(image, entry, &host) == KIND_NONE)
        end = image->backing ? block_size_bytes(image->backing) : 0;
    if (at >= end)
        return 1;
    bytes = bytes < end - at ? bytes : (uint32_t)(end - at);
    op->rest = (struct iovec){*buffer, bytes};
    return read_part(op, entry, at, &op->rest, 1, bytes, next);
}

static void head_read(struct qcow2_op *op, int result)
{
    if (result >= 0 && op->tail_bytes)
        result = read_rest(op, &op->tail, op->tail_bytes, op->at + op->run_bytes, write_allocated);
    else if (result >= 0)
        result = 1;
    if (result)
        write_allocated(op, result);
}

/* Clusters from op->at on that have to be given a place, up to `most`. 0: wait for another request. */
static uint32_t count_new(struct qcow2_op *op, uint32_t index, uint32_t most)
{
    struct qcow2 *image = op->image;
    uint64_t host;
    uint32_t n = 0;

    while (n < most) {
        enum kind kind = kind_of(image, qcow2_table_entry(op->table, index + n), &host);

        if (kind == KIND_BAD || ((kind == KIND_DATA || kind == KIND_ZERO) && is_own(image, host)))
            break;
        n++;
    }
    return n;
}

/* 0 when under way, 1 when it waits, or -errno. */
static int write_new(struct qcow2_op *op, uint32_t index, uint32_t most)
{
    struct qcow2 *image = op->image;
    uint64_t offset = op->at % image->cluster_bytes, host, end;
    int ret;

    most = not_allocating(op, op->at / image->cluster_bytes, most);
    if (most == 0)
        return 1;
    kind_of(image, qcow2_table_entry(op->table, index), &host);
    op->cluster_count = count_new(op, index, most);
    op->fresh = op->cluster_count > 0;
    if (op->fresh) {
        ret = qcow2_alloc(image, &op->cluster, &op->cluster_count, false);
        if (ret < 0)
            return ret;
    } else { /* a cluster of zeroes that has its place */
        op->cluster = host / image->cluster_bytes;
        op->cluster_count = 1;
    }
    op->allocating = true;
    end = op->at - offset + (uint64_t)op->cluster_count * image->cluster_bytes;
    if (op->run_bytes > end - op->at)
        op->run_bytes = end - op->at;
    op->head_bytes = (uint32_t)offset;
    op->tail_bytes = (uint32_t)(end - op->at - op->run_bytes);
    ret = offset ? read_rest(op, &op->head, op->head_bytes, op->at - offset, head_read) : 1;
    if (ret)
        head_read(op, ret);
    return 0;
}

static void run_written(struct qcow2_op *op, int result)
{
    if (result < 0) {
        finish(op, result);
        return;
    }
    op->done_bytes += op->run_bytes;
    again(op);
}

/* Clusters that are this image's already are written where they are. */
static int write_in_place(struct qcow2_op *op, uint32_t index, uint64_t host, uint32_t most)
{
    struct qcow2 *image = op->image;
    uint64_t next_host, bytes = image->cluster_bytes - op->at % image->cluster_bytes;
    int ret;

    for (uint32_t n = 1; n < most && kind_of(image, qcow2_table_entry(op->table, index + n), &next_host) == KIND_DATA; n++) {
        if (next_host != host + (uint64_t)n * image->cluster_bytes || !is_own(image, next_host))
            break;
        bytes += image->cluster_bytes;
    }
    if (op->run_bytes > bytes)
        op->run_bytes = bytes;
    ret = cut_vectors(op, 0, 0, op->done_bytes, op->run_bytes);
    if (ret < 0)
        return ret;
    qcow2_table_put(op->table);
    op->table = NULL;
    op->next = run_written;
    submit_sub(op, image->file, BLOCK_WRITE, host + op->at % image->cluster_bytes, op->iov, op->iov_count, op->run_bytes);
    return 0;
}

/* Writes the next run_bytes, or as much as goes at once. */
static void write_run(struct qcow2_op *op)
{
    struct qcow2 *image = op->image;
    uint64_t last = op->at + op->run_bytes - 1, host;
    uint32_t index = (uint32_t)(op->at % image->table_bytes / image->cluster_bytes), count;
    enum kind kind;
    int ret;

    if (image->broken) {
        finish(op, -EIO);
        return;
    }
    if (!get_table(op, true, &op->table))
        return;
    if (last / image->table_bytes != op->at / image->table_bytes)
        last = op->at / image->table_bytes * image->table_bytes + image->table_bytes - 1;
    op->run_bytes = last - op->at + 1;
    count = (uint32_t)(last % image->table_bytes / image->cluster_bytes) - index + 1;
    kind = kind_of(image, qcow2_table_entry(op->table, index), &host);
    if (kind == KIND_BAD)
        ret = -EIO;
    else if (kind == KIND_DATA && is_own(image, host))
        ret = write_in_place(op, index, host, count);
    else
        ret = image->broken ? -EIO : write_new(op, index, count);
    if (ret == 1) {
        qcow2_table_put(op->table);
        op->table = NULL;
        qcow2_wait(op);
    } else if (ret < 0) {
        finish(op, ret);
    }
}

static void write_step(struct qcow2_op *op)
{
    const struct block_request *request = op->request;

    if (op->done_bytes == request->length_bytes) {
        finish(op, 0);
        return;
    }
    op->at = request->offset_bytes + op->done_bytes;
    op->run_bytes = request->length_bytes - op->done_bytes;
    write_run(op);
}

/* ---- zeroes and discards ---- */

/* Makes a whole cluster read as zeroes without writing any. 1: that cannot be. */
static int clear_cluster(struct qcow2_op *op, struct qcow2_table *table, uint32_t index)
{
    struct qcow2 *image = op->image;
    uint64_t entry = qcow2_table_entry(table, index), host, clear = image->backing ? QCOW2_ZERO : 0;
    enum kind kind = kind_of(image, entry, &host);

    if (kind == KIND_BAD)
        return -EIO;
    if ((kind == KIND_NONE && !image->backing) || (kind == KIND_ZERO && (!host || !op->request->may_unmap)))
        return 0;
    if (image->header.version < 3 && image->backing)
        return op->request->op == BLOCK_DISCARD ? 0 : 1;
    if (op->request->op == BLOCK_WRITE_ZEROES && !op->request->may_unmap && image->header.version == 3 && kind == KIND_DATA && is_own(image, host)) {
        qcow2_table_set(table, index, host | QCOW2_COPIED | QCOW2_ZERO); /* it keeps its place */
        return 0;
    }
    free_entry(image, entry);
    qcow2_table_set(table, index, clear);
    return 0;
}

/* From op->at, the start of a cluster, whole clusters in this table. Returns how many are done, or -errno. */
static int64_t clear_clusters(struct qcow2_op *op, struct qcow2_table *table, uint32_t count)
{
    struct qcow2 *image = op->image;
    uint32_t index = (uint32_t)(op->at % image->table_bytes / image->cluster_bytes), n = 0;
    int ret = 0;

    while (n < count && (ret = clear_cluster(op, table, index + n)) == 0)
        n++;
    return ret < 0 ? ret : (int64_t)n;
}

/* Of part of a cluster: nothing to do when it reads as zeroes already, or is only discarded. */
static bool part_is_clear(struct qcow2_op *op, const struct qcow2_table *table)
{
    struct qcow2 *image = op->image;
    uint64_t host;
    enum kind kind = table ? kind_of(image, qcow2_table_entry(table, (uint32_t)(op->at % image->table_bytes / image->cluster_bytes)), &host) : KIND_NONE;

    return op->request->op == BLOCK_DISCARD || kind == KIND_ZERO || (kind == KIND_NONE && !image->backing);
}

/* One table's worth. False: the request has ended, waits or is being written. */
static bool clear_some(struct qcow2_op *op, uint64_t left)
{
    struct qcow2 *image = op->image;
    uint64_t offset = op->at % image->cluster_bytes, in_table = image->table_bytes - op->at % image->table_bytes, bytes = left < in_table ? left : in_table;
    struct qcow2_table *table;
    bool to_end = op->at + left == image->header.size_bytes;
    uint32_t whole = (uint32_t)((bytes + (to_end && bytes == left ? image->cluster_bytes - 1 : 0)) / image->cluster_bytes);
    int64_t n;

    if (!get_table(op, !offset && whole && image->backing, &table))
        return false;
    if (!table && !image->backing) {
        op->done_bytes += bytes;
        return true;
    }
    if (offset || !whole) { /* part of a cluster */
        bytes = bytes < image->cluster_bytes - offset ? bytes : image->cluster_bytes - offset;
        if (part_is_clear(op, table)) {
            qcow2_table_put(table);
            op->done_bytes += bytes;
            return true;
        }
    } else {
        qcow2_table_put(table);
        if (!get_table(op, true, &table))
            return false;
        whole = not_allocating(op, op->at / image->cluster_bytes, whole);
        n = whole ? clear_clusters(op, table, whole) : 0;
        qcow2_table_put(table);
        table = NULL;
        if (n < 0 || image->broken)
            finish(op, -EIO);
        else if (!whole)
            qcow2_wait(op);
        if (n < 0 || image->broken || !whole)
            return false;
        if (n) {
            bytes = (uint64_t)n * image->cluster_bytes;
            op->done_bytes += bytes < left ? bytes : left;
            return true;
        }
        bytes = left < image->cluster_bytes ? left : image->cluster_bytes;
    }
    qcow2_table_put(table);
    op->run_bytes = bytes;
    write_run(op);
    return false;
}

static void clear_step(struct qcow2_op *op)
{
    const struct block_request *request = op->request;

    if (op->image->broken) {
        finish(op, -EIO);
        return;
    }
    if (op->done_bytes < request->length_bytes) {
        op->at = request->offset_bytes + op->done_bytes;
        if (!clear_some(op, request->length_bytes - op->done_bytes))
            return;
    }
    if (op->done_bytes == request->length_bytes) {
        finish(op, 0);
        return;
    }
    qcow2_wait(op); /* others have a turn between tables */
    qcow2_wake_all(op->image);
}

static void flush_step(struct qcow2_op *op)
{
    qcow2_commit_for(op->image, op);
}

void qcow2_submit(struct block *block, struct block_request *request)
{
    static void (*const steps[])(struct qcow2_op *op) = {
        [BLOCK_READ] = read_step, [BLOCK_WRITE] = write_step, [BLOCK_FLUSH] = flush_step, [BLOCK_DISCARD] = clear_step, [BLOCK_WRITE_ZEROES] = clear_step,
    };
    struct qcow2 *image = block->private;
    struct qcow2_op *op = calloc(1, sizeof(*op));

    if (!op) {
        block_complete_later(block, request, -ENOMEM);
        return;
    }
    op->image = image;
    op->request = request;
    op->again = steps[request->op];
    op->sequence = ++image->sequence;
    TAILQ_INSERT_TAIL(&image->ops, op, link);
    op->inside_submit = true;
    op->again(op);
    /* It may be gone; if it is still there, it is the last one or has gone on by itself. */
    op = TAILQ_LAST(&image->ops, qcow2_op_list);
    if (op && op->request == request)
        op->inside_submit = false;
}
