/*
 * qcow2: L2 tables in memory, a bounded number of them. A table is known by its place in the L1 table, so that it can move in the file.
 *
 * Invariant: what differs from the file (dirty, or in a commit that has not ended) is never dropped, nor is what a request has pinned.
 * Threading: with the device lock held.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "block/qcow2.h"

static struct qcow2_table *find(struct qcow2 *image, uint32_t index)
{
    struct qcow2_table *table;

    TAILQ_FOREACH(table, &image->tables, link) {
        if (table->index == index)
            return table;
    }
    return NULL;
}

static void drop(struct qcow2_table *table)
{
    TAILQ_REMOVE(&table->image->tables, table, link);
    table->image->table_count--;
    free(table->entry);
    free(table);
}

/* An empty place in the cache. -ENOBUFS: every table there is needed. */
static int make(struct qcow2 *image, uint32_t index, struct qcow2_table **out)
{
    struct qcow2_table *table;

    if (image->table_count >= image->tables_max) {
        TAILQ_FOREACH_REVERSE(table, &image->tables, qcow2_table_list, link) {
            if (!table->pins && !table->loading && !table->writing && qcow2_range_empty(&table->dirty))
                break;
        }
        if (!table)
            return -ENOBUFS;
        drop(table);
    }
    table = calloc(1, sizeof(*table));
    if (table)
        table->entry = calloc(1, image->cluster_bytes);
    if (!table || !table->entry) {
        free(table);
        return -ENOMEM;
    }
    table->image = image;
    table->index = index;
    TAILQ_INSERT_HEAD(&image->tables, table, link);
    image->table_count++;
    *out = table;
    return 0;
}

static void loaded(struct block_request *request, int result)
{
    struct qcow2_table *table = (struct qcow2_table *)((char *)request - offsetof(struct qcow2_table, load));

    table->loading = false;
    table->failed = result < 0;
    qcow2_wake_all(table->image);
}

static void load(struct qcow2_table *table)
{
    struct qcow2 *image = table->image;

    table->loading = true;
    table->vector = (struct iovec){table->entry, image->cluster_bytes};
    table->load = (struct block_request){.op = BLOCK_READ, .offset_bytes = table->offset, .length_bytes = image->cluster_bytes, .iov = &table->vector,
                                         .iov_count = 1, .done = loaded};
    block_submit_unchecked(image->file, &table->load);
}

static int check_offset(struct qcow2 *image, uint32_t index)
{
    uint64_t entry = image->l1[index], offset = entry & QCOW2_OFFSET;

    if (!(entry & QCOW2_L1_RESERVED) && offset % image->cluster_bytes == 0 && offset < block_size_bytes(image->file))
        return 0;
    qcow2_broken(image, "L1 entry", index);
    return -EIO;
}

/* The table gets an own place in the file: it has none, or shares it with a snapshot. */
static int move(struct qcow2_table *table)
{
    struct qcow2 *image = table->image;
    uint64_t cluster;
    uint32_t one = 1;
    int ret = qcow2_alloc(image, &cluster, &one, true);

    if (ret < 0)
        return ret;
    if (table->offset)
        qcow2_free(image, table->offset / image->cluster_bytes, 1);
    table->offset = cluster * image->cluster_bytes;
    qcow2_range_add(&table->dirty, 0, image->cluster_bytes);
    image->l1[table->index] = table->offset | QCOW2_COPIED;
    qcow2_range_add(&image->l1_dirty, 8ull * table->index, 8);
    return 0;
}

int qcow2_table_get(struct qcow2 *image, uint32_t index, bool write, struct qcow2_table **out)
{
    struct qcow2_table *table = find(image, index);
    int ret;

    *out = NULL;
    if (!table) {
        if (!image->l1[index] && !write)
            return 0;
        if (image->l1[index] && (ret = check_offset(image, index)) < 0)
            return ret;
        ret = make(image, index, &table);
        if (ret < 0)
            return ret;
        table->offset = image->l1[index] & QCOW2_OFFSET;
        if (table->offset)
            load(table);
    }
    if (table->loading)
        return -EAGAIN;
    if (table->failed) { /* whoever comes next tries again */
        if (!table->pins)
            drop(table);
        return -EIO;
    }
    if (write && (!table->offset || qcow2_refcount(image, table->offset / image->cluster_bytes) != 1)) {
        ret = move(table);
        if (ret < 0) {
            if (!table->offset && !table->pins)
                drop(table); /* there is none, in memory neither */
            return ret;
        }
    }
    TAILQ_REMOVE(&image->tables, table, link);
    TAILQ_INSERT_HEAD(&image->tables, table, link);
    table->pins++;
    *out = table;
    return 0;
}

void qcow2_table_put(struct qcow2_table *table)
{
    if (!table)
        return;
    assert(table->pins);
    table->pins--;
}

uint64_t qcow2_table_entry(const struct qcow2_table *table, uint32_t index)
{
    return be64toh(table->entry[index]);
}

void qcow2_table_set(struct qcow2_table *table, uint32_t index, uint64_t entry)
{
    table->entry[index] = htobe64(entry);
    qcow2_range_add(&table->dirty, 8ull * index, 8);
}

void qcow2_tables_close(struct qcow2 *image)
{
    struct qcow2_table *table;

    while ((table = TAILQ_FIRST(&image->tables)))
        drop(table);
}
