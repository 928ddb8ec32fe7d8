/*
 * qcow2: whether an image that is open for reading agrees with itself: tables where they can be, nothing used twice, and each cluster that is used counted so often. Clusters that are counted and not
 * used are no damage: a crash leaves such.
 * Threading: nothing is in flight.
 */
#include <endian.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <unistd.h>

#include "block/qcow2.h"

struct check {
    struct qcow2 *image;
    uint64_t clusters; /* of the file */
    uint32_t *used;    /* how often, each of them */
    uint64_t *table;   /* the L2 table that is looked at */
    struct error *err;
};

static int wrong(const struct check *check, const char *what, uint64_t offset, const char *how)
{
    return error_set(check->err, -EBADMSG, "disk %s: %s at offset %" PRIu64 " %s", check->image->block->path, what, offset, how);
}

/* Notes the clusters of [offset, offset + bytes). */
static int use(struct check *check, const char *what, uint64_t offset, uint64_t bytes)
{
    uint64_t first = offset / check->image->cluster_bytes, last = (offset + bytes - 1) / check->image->cluster_bytes;

    if (bytes == 0)
        return 0;
    if (offset + bytes < offset || last >= check->clusters)
        return wrong(check, what, offset, "is behind the end of the file");
    for (uint64_t cluster = first; cluster <= last; cluster++)
        check->used[cluster]++;
    return 0;
}

static int use_cluster(struct check *check, const char *what, uint64_t offset)
{
    if (offset % check->image->cluster_bytes)
        return wrong(check, what, offset, "does not begin a cluster");
    return use(check, what, offset, check->image->cluster_bytes);
}

static int check_entry(struct check *check, uint64_t entry)
{
    uint64_t offset, bytes;

    if (entry & QCOW2_COMPRESSED) {
        qcow2_compressed_place(check->image, entry, &offset, &bytes);
        if (offset < check->clusters * check->image->cluster_bytes && bytes > check->clusters * check->image->cluster_bytes - offset)
            bytes = check->clusters * check->image->cluster_bytes - offset; /* whole sectors, of which the file may lack the end */
        return use(check, "a compressed cluster", offset, bytes);
    }
    if (entry & QCOW2_L2_RESERVED)
        return wrong(check, "a cluster", entry & QCOW2_OFFSET, "has bits that stand for nothing");
    return entry & QCOW2_OFFSET ? use_cluster(check, "a cluster", entry & QCOW2_OFFSET) : 0;
}

static int check_tables(struct check *check)
{
    const struct qcow2 *image = check->image;
    int ret = 0;

    for (uint32_t i = 0; ret == 0 && i < image->header.l1_entries; i++) {
        uint64_t offset = image->l1[i] & QCOW2_OFFSET;

        if (image->l1[i] & QCOW2_L1_RESERVED)
            ret = wrong(check, "an L2 table", offset, "has bits that stand for nothing");
        else if (offset)
            ret = use_cluster(check, "an L2 table", offset);
        if (ret < 0 || !offset)
            continue;
        if (pread(block_raw_fd(image->file), check->table, image->cluster_bytes, (off_t)offset) != (ssize_t)image->cluster_bytes)
            ret = wrong(check, "an L2 table", offset, "cannot be read");
        for (uint32_t n = 0; ret == 0 && n < image->l2_entries; n++)
            ret = check_entry(check, be64toh(check->table[n]));
    }
    return ret;
}

/* Images with snapshots inside them share clusters, which their own tables tell. */
static int check_counts(const struct check *check)
{
    const struct qcow2 *image = check->image;

    for (uint64_t cluster = 0; cluster < check->clusters; cluster++) {
        uint64_t count = qcow2_refcount(image, cluster);

        if (check->used[cluster] > count)
            return wrong(check, "a cluster", cluster * image->cluster_bytes, "is used more often than its reference count says");
        if (check->used[cluster] > 1 && qcow2_is_metadata(image, cluster))
            return wrong(check, "a table", cluster * image->cluster_bytes, "is used for something else, too");
    }
    return 0;
}

int qcow2_check(struct qcow2 *image, struct error *err)
{
    const struct qcow2_header *header = &image->header;
    struct check check = {.image = image, .err = err, .clusters = (block_size_bytes(image->file) + image->cluster_bytes - 1) / image->cluster_bytes};
    int ret = 0;

    if (header->incompatible & (QCOW2_DIRTY | QCOW2_CORRUPT))
        return error_set(err, -EBADMSG, "disk %s: is marked as %s", image->block->path, header->incompatible & QCOW2_CORRUPT ? "corrupt" : "not closed");
    check.used = calloc(check.clusters + 1, sizeof(*check.used));
    check.table = malloc(image->cluster_bytes);
    if (!check.used || !check.table)
        ret = error_set(err, -ENOMEM, "disk %s: no memory", image->block->path);
    if (ret == 0 && !image->refblock)
        ret = qcow2_refcounts_open(image, err);
    if (ret == 0)
        ret = use(&check, "the header", 0, image->cluster_bytes);
    if (ret == 0)
        ret = use(&check, "the L1 table", header->l1_offset, 8ull * header->l1_entries);
    if (ret == 0)
        ret = use(&check, "the refcount table", header->reftable_offset, (uint64_t)header->reftable_clusters * image->cluster_bytes);
    for (uint32_t i = 0; ret == 0 && i < image->reftable_entries; i++)
        if (image->reftable[i])
            ret = use(&check, "a refcount block", image->reftable[i], image->cluster_bytes);
    if (ret == 0)
        ret = check_tables(&check);
    if (ret == 0)
        ret = check_counts(&check);
    free(check.used);
    free(check.table);
    return ret;
}
