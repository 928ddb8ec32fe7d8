/*
 * qcow2: commits. Copies of all changed metadata are taken at one moment and written in phases, each on the host's disk before the next begins, so that whatever is in the
 * file points only at what is there and counted. What changes meanwhile is the next commit's.
 *
 * Invariant: a commit runs only while a request waits for it, so that nothing happens in the file when no request is in flight.
 * Threading: with the device lock held; qcow2_commit_now waits for the host.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "block/qcow2.h"
#include "block/qcow2_layout.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

/* At the end, and when the file is frozen beneath another. */
SANDBOX_ALLOW(IN_LOOP | IN_MAIN, pwrite64);
SANDBOX_ALLOW(IN_LOOP | IN_MAIN, fdatasync);

/* ---- what is to be written ---- */

static struct qcow2_item *add_item(struct qcow2 *image, enum qcow2_phase phase, uint64_t offset, uint32_t bytes)
{
    struct qcow2_item *item = malloc(sizeof(*item) + bytes);

    if (!item)
        return NULL;
    memset(item, 0, sizeof(*item));
    item->image = image;
    item->offset = offset;
    item->bytes = bytes;
    STAILQ_INSERT_TAIL(&image->commit.items[phase], item, link);
    return item;
}

/* The sectors of `data` (an array of bytes as in the file) that the range says. */
static int add_range(struct qcow2 *image, enum qcow2_phase phase, uint64_t offset, const void *data, const struct qcow2_range *range)
{
    uint32_t first = range->first * QCOW2_SECTOR_BYTES, bytes = (range->end - range->first) * QCOW2_SECTOR_BYTES;
    struct qcow2_item *item = add_item(image, phase, offset + first, bytes);

    if (!item)
        return -ENOMEM;
    memcpy(item->data, (const uint8_t *)data + first, bytes);
    return 0;
}

/* The same of a table in the host's order, whose last sector may not be whole. */
static int add_words(struct qcow2 *image, enum qcow2_phase phase, uint64_t offset, const uint64_t *words, uint64_t count, const struct qcow2_range *range)
{
    uint64_t first = range->first * (uint64_t)QCOW2_SECTOR_BYTES / 8, end = range->end * (uint64_t)QCOW2_SECTOR_BYTES / 8;
    struct qcow2_item *item = add_item(image, phase, offset + 8 * first, (uint32_t)(8 * (end - first)));

    if (!item)
        return -ENOMEM;
    for (uint64_t i = first; i < end; i++) {
        uint64_t word = htobe64(i < count ? words[i] : 0);

        memcpy(item->data + 8 * (i - first), &word, 8);
    }
    return 0;
}

/* The first sector, of which little changes. */
static int add_header(struct qcow2 *image)
{
    struct qcow2_item *item = add_item(image, PHASE_HEADER, 0, QCOW2_SECTOR_BYTES);
    struct qcow2_disk_header disk;
    ssize_t got;

    if (!item)
        return -ENOMEM;
    memcpy(item->data, image->first_sector, QCOW2_SECTOR_BYTES);
    memcpy(&disk, item->data, sizeof(disk));
    disk.refcount_table_offset = htobe64(image->header.reftable_offset);
    disk.refcount_table_clusters = htobe32(image->header.reftable_clusters);
    got = image->header.version == 3 ? (ssize_t)offsetof(struct qcow2_disk_header, refcount_order) : (ssize_t)offsetof(struct qcow2_disk_header, incompatible_features);
    disk.incompatible_features = htobe64(image->header.incompatible);
    disk.autoclear_features = htobe64(image->header.autoclear);
    memcpy(item->data, &disk, (size_t)got);
    return 0;
}

static int collect(struct qcow2 *image)
{
    const struct qcow2_range all = {0, (uint32_t)(image->reftable_entries * 8ull / QCOW2_SECTOR_BYTES)};
    struct qcow2_table *table;
    int ret = 0;

    if (image->broken) /* only that it is */
        return image->header_dirty ? add_header(image) : 0;
    for (uint32_t i = 0; ret == 0 && i < image->reftable_entries; i++) {
        struct qcow2_refblock *block = &image->refblock[i];

        if (!qcow2_range_empty(&block->dirty))
            ret = add_range(image, PHASE_REFBLOCKS, block->offset, block->data, &block->dirty);
    }
    if (ret == 0 && (image->reftable_moved || !qcow2_range_empty(&image->reftable_dirty)))
        ret = add_words(image, PHASE_REFTABLE, image->header.reftable_offset, image->reftable, image->reftable_entries,
                        image->reftable_moved ? &all : &image->reftable_dirty);
    if (ret == 0 && image->header_dirty)
        ret = add_header(image);
    TAILQ_FOREACH(table, &image->tables, link) {
        if (ret == 0 && !qcow2_range_empty(&table->dirty))
            ret = add_range(image, PHASE_L2, table->offset, table->entry, &table->dirty);
    }
    if (ret == 0 && !qcow2_range_empty(&image->l1_dirty))
        ret = add_words(image, PHASE_L1, image->header.l1_offset, image->l1, image->header.l1_entries, &image->l1_dirty);
    return ret;
}

static void drop_phase(struct qcow2 *image, unsigned phase)
{
    struct qcow2_item *item;

    while (phase < PHASES && (item = STAILQ_FIRST(&image->commit.items[phase]))) {
        STAILQ_REMOVE_HEAD(&image->commit.items[phase], link);
        free(item);
    }
}

static void drop_items(struct qcow2 *image)
{
    for (unsigned phase = 0; phase < PHASES; phase++)
        drop_phase(image, phase);
}

/* From here on the copies are what the file will be. */
static void mark_collected(struct qcow2 *image)
{
    const struct qcow2_range none = {0, 0};
    struct qcow2_table *table;
    struct qcow2_freed *freed;

    for (uint32_t i = 0; i < image->reftable_entries; i++) {
        image->refblock[i].written = image->refblock[i].dirty;
        image->refblock[i].dirty = none;
    }
    TAILQ_FOREACH(table, &image->tables, link) {
        table->written = table->dirty;
        table->writing = !qcow2_range_empty(&table->dirty);
        table->dirty = none;
    }
    TAILQ_FOREACH(freed, &image->freed, link)
        freed->collected = true;
    image->l1_written = image->l1_dirty;
    image->reftable_written = image->reftable_dirty;
    image->commit.moved = image->reftable_moved;
    image->commit.header = image->header_dirty;
    image->l1_dirty = image->reftable_dirty = none;
    image->reftable_moved = image->header_dirty = false;
}

static void add_back(struct qcow2_range *dirty, struct qcow2_range *written, bool failed)
{
    if (failed && !qcow2_range_empty(written))
        qcow2_range_add(dirty, (uint64_t)written->first * QCOW2_SECTOR_BYTES, (uint64_t)(written->end - written->first) * QCOW2_SECTOR_BYTES);
    *written = (struct qcow2_range){0, 0};
}

/* What failed is to be written again, all of it. */
static void mark_written(struct qcow2 *image, bool failed)
{
    struct qcow2_table *table;
    struct qcow2_freed *freed;

    for (uint32_t i = 0; i < image->reftable_entries; i++)
        add_back(&image->refblock[i].dirty, &image->refblock[i].written, failed);
    TAILQ_FOREACH(table, &image->tables, link) {
        add_back(&table->dirty, &table->written, failed);
        table->writing = false;
    }
    TAILQ_FOREACH(freed, &image->freed, link) {
        freed->committed = freed->committed || (freed->collected && !failed);
        freed->collected = freed->committed;
    }
    add_back(&image->l1_dirty, &image->l1_written, failed);
    add_back(&image->reftable_dirty, &image->reftable_written, failed);
    image->reftable_moved = image->reftable_moved || (failed && image->commit.moved);
    image->header_dirty = image->header_dirty || (failed && image->commit.header);
}

/* ---- one step after the other ---- */

static void next_phase(struct qcow2 *image);

static void finish(struct qcow2 *image)
{
    struct qcow2_commit *commit = &image->commit;
    struct qcow2_op_list served = TAILQ_HEAD_INITIALIZER(served);
    struct qcow2_op *op;
    int result = commit->result;

    qcow2_release(image, qcow2_oldest_sequence(image));
    TAILQ_CONCAT(&served, &commit->served, wait_link);
    commit->running = false;
    while ((op = TAILQ_FIRST(&served))) {
        TAILQ_REMOVE(&served, op, wait_link);
        qcow2_op_committed(op, result);
    }
    if (!commit->running && !TAILQ_EMPTY(&commit->next))
        qcow2_commit_for(image, NULL);
    qcow2_wake_all(image);
}

static void punched(struct block_request *request, int result)
{
    struct qcow2 *image = request->user;

    (void)result; /* the host keeps the space, then */
    free(request);
    if (--image->commit.outstanding == 0)
        finish(image);
}

/* The host's file system gets its space back before anybody else can get the clusters. */
static void punch(struct qcow2 *image)
{
    uint64_t oldest = qcow2_oldest_sequence(image);
    struct qcow2_freed *freed;

    image->commit.outstanding = 1;
    TAILQ_FOREACH(freed, &image->freed, link) {
        struct block_request *request;
        bool all = freed->committed && freed->sequence < oldest;

        for (uint64_t i = 0; all && i < freed->count; i++)
            all = qcow2_refcount(image, freed->cluster + i) == 1;
        request = all ? calloc(1, sizeof(*request)) : NULL;
        if (!request)
            continue;
        *request = (struct block_request){.op = BLOCK_DISCARD, .offset_bytes = freed->cluster * image->cluster_bytes, .length_bytes = freed->count * image->cluster_bytes,
                                          .done = punched, .user = image};
        image->commit.outstanding++;
        block_submit_unchecked(image->file, request);
    }
    if (--image->commit.outstanding == 0)
        finish(image);
}

static void end_commit(struct qcow2 *image, int result)
{
    struct qcow2_commit *commit = &image->commit;

    commit->result = result;
    drop_items(image);
    mark_written(image, result < 0);
    if (result < 0)
        finish(image);
    else
        punch(image);
}

static void flushed(struct block_request *request, int result)
{
    struct qcow2 *image = request->user;

    if (result < 0) {
        end_commit(image, result);
        return;
    }
    image->commit.flushed = true;
    next_phase(image);
}

static void flush_file(struct qcow2 *image)
{
    image->commit.flush = (struct block_request){.op = BLOCK_FLUSH, .done = flushed, .user = image};
    block_submit_unchecked(image->file, &image->commit.flush);
}

static void item_done(struct block_request *request, int result)
{
    struct qcow2 *image = request->user;
    struct qcow2_commit *commit = &image->commit;

    if (result < 0)
        commit->result = result;
    if (--commit->outstanding)
        return;
    drop_phase(image, commit->phase);
    if (commit->result < 0)
        end_commit(image, commit->result);
    else
        flush_file(image);
}

static void next_phase(struct qcow2 *image)
{
    struct qcow2_commit *commit = &image->commit;
    struct qcow2_item *item;

    while (commit->phase < PHASES && STAILQ_EMPTY(&commit->items[commit->phase]))
        commit->phase++;
    if (commit->phase == PHASES && commit->flushed) {
        end_commit(image, image->broken ? -EIO : 0);
        return;
    }
    if (commit->phase >= PHASE_L2 && !commit->flushed) { /* what the tables will point at: data copied from below must not be lost */
        flush_file(image);
        return;
    }
    STAILQ_FOREACH(item, &commit->items[commit->phase], link)
        commit->outstanding++;
    STAILQ_FOREACH(item, &commit->items[commit->phase], link) {
        item->iov = (struct iovec){item->data, item->bytes};
        item->request = (struct block_request){.op = BLOCK_WRITE, .offset_bytes = item->offset, .length_bytes = item->bytes, .iov = &item->iov, .iov_count = 1,
                                               .done = item_done, .user = image};
        block_submit_unchecked(image->file, &item->request);
    }
}

void qcow2_commit_for(struct qcow2 *image, struct qcow2_op *op)
{
    struct qcow2_commit *commit = &image->commit;
    int ret;

    if (op)
        TAILQ_INSERT_TAIL(&commit->next, op, wait_link);
    if (commit->running)
        return;
    commit->running = true;
    commit->phase = commit->outstanding = 0;
    commit->result = 0;
    commit->flushed = false;
    TAILQ_CONCAT(&commit->served, &commit->next, wait_link);
    ret = collect(image);
    if (ret < 0) {
        drop_items(image);
        commit->result = ret;
        finish(image);
        return;
    }
    mark_collected(image);
    next_phase(image);
}

/* ---- waiting for it ---- */

static int write_item(int fd, const struct qcow2_item *item)
{
    for (uint32_t done = 0; done < item->bytes;) {
        ssize_t n = pwrite(fd, item->data + done, item->bytes - done, (off_t)(item->offset + done));

        if (n < 0 && errno != EINTR)
            return -errno;
        done += n > 0 ? (uint32_t)n : 0;
    }
    return 0;
}

static int commit_once(struct qcow2 *image)
{
    int fd = block_raw_fd(image->file), ret = collect(image);

    if (ret == 0)
        mark_collected(image);
    if (ret == 0 && fdatasync(fd) < 0) /* the data */
        ret = -errno;
    for (unsigned phase = 0; ret == 0 && phase < PHASES; phase++) {
        const struct qcow2_item *item;

        if (STAILQ_EMPTY(&image->commit.items[phase]))
            continue;
        STAILQ_FOREACH(item, &image->commit.items[phase], link) {
            if (ret == 0)
                ret = write_item(fd, item);
        }
        if (ret == 0 && fdatasync(fd) < 0)
            ret = -errno;
    }
    drop_items(image);
    mark_written(image, ret < 0);
    return ret;
}

int qcow2_commit_now(struct qcow2 *image)
{
    int ret;

    assert(TAILQ_EMPTY(&image->ops) && !image->commit.running);
    ret = commit_once(image);
    if (ret == 0 && !TAILQ_EMPTY(&image->freed)) {
        qcow2_release(image, UINT64_MAX);
        ret = commit_once(image);
    }
    return ret ? ret : image->broken ? -EIO : 0;
}
