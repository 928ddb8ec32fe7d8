/*
 * qcow2: reference counts and free clusters of a writable image, all in memory.
 *
 * Invariant: a cluster is given out only when its count is zero and no table that is known lies there, whatever the image says. Counts go up in memory before anything points
 * at a cluster, and down when the file is known not to point at it any more (qcow2_free, qcow2_release).
 * Threading: with the device lock held.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/qcow2.h"

static uint64_t per_block(const struct qcow2 *image)
{
    return (uint64_t)image->cluster_bytes * 8 / image->header.refcount_bits;
}

static uint64_t get(const struct qcow2 *image, const uint8_t *data, uint64_t index)
{
    uint16_t v16;
    uint32_t v32;
    uint64_t v64;

    switch (image->header.refcount_bits) {
    case 8:
        return data[index];
    case 16:
        memcpy(&v16, data + 2 * index, 2);
        return be16toh(v16);
    case 32:
        memcpy(&v32, data + 4 * index, 4);
        return be32toh(v32);
    case 64:
        memcpy(&v64, data + 8 * index, 8);
        return be64toh(v64);
    default: { /* 1, 2, 4: the lowest bits of a byte first */
        unsigned bits = image->header.refcount_bits, shift = (unsigned)(index * bits % 8);
        return data[index * bits / 8] >> shift & ((1u << bits) - 1);
    }
    }
}

static void put(const struct qcow2 *image, uint8_t *data, uint64_t index, uint64_t count)
{
    uint16_t v16 = htobe16((uint16_t)count);
    uint32_t v32 = htobe32((uint32_t)count);
    uint64_t v64 = htobe64(count);

    switch (image->header.refcount_bits) {
    case 8:
        data[index] = (uint8_t)count;
        break;
    case 16:
        memcpy(data + 2 * index, &v16, 2);
        break;
    case 32:
        memcpy(data + 4 * index, &v32, 4);
        break;
    case 64:
        memcpy(data + 8 * index, &v64, 8);
        break;
    default: {
        unsigned bits = image->header.refcount_bits, shift = (unsigned)(index * bits % 8);
        uint8_t *byte = data + index * bits / 8;
        *byte = (uint8_t)((*byte & ~(((1u << bits) - 1) << shift)) | count << shift);
    }
    }
}

uint64_t qcow2_refcount(const struct qcow2 *image, uint64_t cluster)
{
    uint64_t block = cluster / per_block(image);

    if (block >= image->reftable_entries || !image->refblock[block].data)
        return 0;
    return get(image, image->refblock[block].data, cluster % per_block(image));
}

/* ---- clusters that hold tables ---- */

bool qcow2_is_metadata(const struct qcow2 *image, uint64_t cluster)
{
    return cluster < image->metadata_clusters && (image->metadata[cluster / 8] >> cluster % 8 & 1);
}

static void set_metadata(struct qcow2 *image, uint64_t cluster, bool on)
{
    if (on)
        image->metadata[cluster / 8] |= (uint8_t)(1u << cluster % 8);
    else
        image->metadata[cluster / 8] &= (uint8_t)~(1u << cluster % 8);
}

static int cover_metadata(struct qcow2 *image, uint64_t clusters)
{
    uint64_t now = image->metadata_clusters, want = now ? now : 4096;
    uint8_t *bits;

    if (clusters <= now)
        return 0;
    while (want < clusters)
        want *= 2;
    bits = realloc(image->metadata, want / 8);
    if (!bits)
        return -ENOMEM;
    memset(bits + now / 8, 0, (want - now) / 8);
    image->metadata = bits;
    image->metadata_clusters = want;
    return 0;
}

/* -EEXIST: something else is there. */
static int claim(struct qcow2 *image, uint64_t offset, uint64_t bytes)
{
    uint64_t first = offset / image->cluster_bytes, end = (offset + bytes + image->cluster_bytes - 1) / image->cluster_bytes;
    int ret = end > QCOW2_CLUSTERS_MAX ? -EFBIG : cover_metadata(image, end);

    for (uint64_t cluster = first; ret == 0 && cluster < end; cluster++) {
        if (qcow2_is_metadata(image, cluster))
            ret = -EEXIST;
        else
            set_metadata(image, cluster, true);
    }
    return ret;
}

/* ---- allocation ---- */

static int grow_reftable(struct qcow2 *image, uint64_t cluster);

/* A cluster for the block of counts that `cluster` has its own in. */
static int ensure_block(struct qcow2 *image, uint64_t cluster)
{
    uint64_t index = cluster / per_block(image), at = index * per_block(image);
    struct qcow2_refblock *block;
    int ret;

    if (index >= image->reftable_entries) {
        ret = grow_reftable(image, cluster);
        if (ret < 0)
            return ret;
    }
    block = &image->refblock[index];
    if (block->data)
        return 0;
    /* None of its clusters is counted, so that it can have the first that is no table: it counts itself. */
    at = cluster;
    while (qcow2_is_metadata(image, at))
        at++;
    if (at / per_block(image) != index || at >= QCOW2_CLUSTERS_MAX)
        return -EFBIG;
    block->data = calloc(1, image->cluster_bytes);
    if (!block->data)
        return -ENOMEM;
    ret = claim(image, at * image->cluster_bytes, image->cluster_bytes);
    if (ret < 0) {
        free(block->data);
        block->data = NULL;
        return ret;
    }
    block->offset = at * image->cluster_bytes;
    put(image, block->data, at % per_block(image), 1);
    block->dirty = (struct qcow2_range){0, image->cluster_bytes / QCOW2_SECTOR_BYTES};
    image->reftable[index] = block->offset;
    qcow2_range_add(&image->reftable_dirty, index * 8, 8);
    return 0;
}

int qcow2_refcount_set(struct qcow2 *image, uint64_t cluster, uint64_t count)
{
    uint64_t index = cluster % per_block(image);
    struct qcow2_refblock *block;
    int ret = ensure_block(image, cluster);

    if (ret < 0)
        return ret;
    block = &image->refblock[cluster / per_block(image)];
    put(image, block->data, index, count);
    qcow2_range_add(&block->dirty, index * image->header.refcount_bits / 8, (image->header.refcount_bits + 7) / 8);
    if (count == 0 && cluster < image->first_free)
        image->first_free = cluster;
    return 0;
}

static bool is_free(const struct qcow2 *image, uint64_t cluster)
{
    return qcow2_refcount(image, cluster) == 0 && !qcow2_is_metadata(image, cluster);
}

int qcow2_alloc(struct qcow2 *image, uint64_t *cluster, uint32_t *count, bool metadata)
{
    uint64_t at = image->first_free, end;
    int ret = 0;

    do { /* a new block of counts takes a cluster itself */
        while (at < QCOW2_CLUSTERS_MAX && !is_free(image, at))
            at++;
        image->first_free = at;
        if (at == QCOW2_CLUSTERS_MAX)
            return -EFBIG;
        ret = ensure_block(image, at);
        if (ret < 0)
            return ret;
    } while (!is_free(image, at));
    for (end = at; ret == 0 && end < at + *count && end < QCOW2_CLUSTERS_MAX && is_free(image, end); end++) {
        if (end / per_block(image) != at / per_block(image))
            break;
        ret = qcow2_refcount_set(image, end, 1);
        if (ret == 0 && metadata)
            ret = claim(image, end * image->cluster_bytes, image->cluster_bytes);
    }
    if (ret < 0)
        return ret;
    *cluster = at;
    *count = (uint32_t)(end - at);
    image->first_free = end;
    return 0;
}

/* A larger table behind everything, half as large again as it must be. The old one's clusters are freed. */
static int grow_reftable(struct qcow2 *image, uint64_t cluster)
{
    uint64_t entries_per_cluster = image->cluster_bytes / 8, blocks = cluster / per_block(image) + 1;
    uint64_t clusters = (blocks + blocks / 2 + 16) / entries_per_cluster + 2;
    uint64_t entries = clusters * entries_per_cluster, old_offset = image->header.reftable_offset, old_clusters = image->header.reftable_clusters;
    uint64_t *table;
    struct qcow2_refblock *refblock;
    int ret;

    if (clusters * image->cluster_bytes > QCOW2_TABLE_BYTES_MAX)
        return -EFBIG;
    table = realloc(image->reftable, entries * 8);
    if (!table)
        return -ENOMEM;
    image->reftable = table;
    refblock = realloc(image->refblock, entries * sizeof(*refblock));
    if (!refblock)
        return -ENOMEM;
    image->refblock = refblock;
    memset(table + image->reftable_entries, 0, (entries - image->reftable_entries) * 8);
    memset(refblock + image->reftable_entries, 0, (entries - image->reftable_entries) * sizeof(*refblock));
    image->reftable_entries = (uint32_t)entries;

    /* It is placed behind `cluster`, where nothing is counted yet. */
    uint64_t at = cluster + 2;
    while (at < QCOW2_CLUSTERS_MAX) {
        uint64_t n = 0;
        while (n < clusters && is_free(image, at + n))
            n++;
        if (n == clusters)
            break;
        at += n + 1;
    }
    ret = at + clusters > QCOW2_CLUSTERS_MAX ? -EFBIG : claim(image, at * image->cluster_bytes, clusters * image->cluster_bytes);
    for (uint64_t n = 0; ret == 0 && n < clusters; n++)
        ret = qcow2_refcount_set(image, at + n, 1);
    if (ret < 0) { /* what is in memory and the file's table are not of one size any more */
        qcow2_give_up(image, "no memory or place for a larger refcount table");
        return ret;
    }
    image->header.reftable_offset = at * image->cluster_bytes;
    image->header.reftable_clusters = (uint32_t)clusters;
    image->reftable_moved = image->header_dirty = true;
    qcow2_free(image, old_offset / image->cluster_bytes, old_clusters);
    return 0;
}

void qcow2_unalloc(struct qcow2 *image, uint64_t cluster, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        if (qcow2_refcount_set(image, cluster + i, 0) < 0)
            return; /* it is lost, no more */
        if (cluster + i < image->metadata_clusters)
            set_metadata(image, cluster + i, false);
    }
}

void qcow2_free(struct qcow2 *image, uint64_t cluster, uint64_t count)
{
    struct qcow2_freed *last = TAILQ_LAST(&image->freed, qcow2_freed_list), *freed;

    if (last && !last->collected && last->sequence == image->sequence && last->cluster + last->count == cluster) {
        last->count += count;
        return;
    }
    freed = calloc(1, sizeof(*freed));
    if (!freed)
        return; /* lost: checking finds it */
    *freed = (struct qcow2_freed){.cluster = cluster, .count = count, .sequence = image->sequence};
    TAILQ_INSERT_TAIL(&image->freed, freed, link);
}

void qcow2_release(struct qcow2 *image, uint64_t oldest_sequence)
{
    struct qcow2_freed *freed, *next;

    for (freed = TAILQ_FIRST(&image->freed); freed; freed = next) {
        next = TAILQ_NEXT(freed, link);
        if (!freed->committed || freed->sequence >= oldest_sequence)
            continue;
        for (uint64_t i = 0; i < freed->count; i++) {
            uint64_t cluster = freed->cluster + i, count = qcow2_refcount(image, cluster);

            if (count && qcow2_refcount_set(image, cluster, count - 1) == 0 && count == 1 && cluster < image->metadata_clusters)
                set_metadata(image, cluster, false);
        }
        TAILQ_REMOVE(&image->freed, freed, link);
        free(freed);
    }
}

/* ---- opening ---- */

static int overlap(const struct qcow2 *image, int ret, const char *what, uint64_t offset, struct error *err)
{
    if (ret == -EEXIST)
        return error_set(err, -EINVAL, "disk %s: the image is damaged: its %s at byte %llu lies on another table; qemu-img check tells more", image->block->path, what,
                         (unsigned long long)offset);
    if (ret == -EFBIG)
        return error_set(err, ret, "disk %s: the image is damaged or has too many clusters: %s at byte %llu", image->block->path, what, (unsigned long long)offset);
    return error_set(err, ret, "disk %s: cannot be read: %s", image->block->path, strerror(-ret));
}

static int read_exactly(int fd, void *data, size_t bytes, uint64_t offset)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pread(fd, (uint8_t *)data + done, bytes - done, (off_t)(offset + done));

        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        if (got == 0) { /* behind the file's end there are zeroes */
            memset((uint8_t *)data + done, 0, bytes - done);
            return 0;
        }
        done += (size_t)got;
    }
    return 0;
}

static int load_blocks(struct qcow2 *image, struct error *err)
{
    int fd = block_raw_fd(image->file);
    uint64_t file_bytes = block_size_bytes(image->file);

    for (uint32_t i = 0; i < image->reftable_entries; i++) {
        uint64_t offset = be64toh(image->reftable[i]) & ~511ull;
        struct qcow2_refblock *block = &image->refblock[i];
        int ret;

        image->reftable[i] = offset;
        if (!offset)
            continue;
        if (offset % image->cluster_bytes || offset >= file_bytes)
            return overlap(image, -EFBIG, "refcount block", offset, err);
        if (i * per_block(image) >= QCOW2_CLUSTERS_MAX)
            return overlap(image, -EFBIG, "refcount block", offset, err);
        ret = claim(image, offset, image->cluster_bytes);
        block->data = ret == 0 ? malloc(image->cluster_bytes) : NULL;
        block->offset = offset;
        if (ret == 0)
            ret = block->data ? read_exactly(fd, block->data, image->cluster_bytes, offset) : -ENOMEM;
        if (ret < 0)
            return overlap(image, ret, "refcount block", offset, err);
    }
    return 0;
}

int qcow2_refcounts_open(struct qcow2 *image, struct error *err)
{
    const struct qcow2_header *header = &image->header;
    uint64_t bytes = (uint64_t)header->reftable_clusters * image->cluster_bytes, l2;
    int ret = claim(image, 0, image->cluster_bytes);

    if (block_size_bytes(image->file) / image->cluster_bytes >= QCOW2_CLUSTERS_MAX)
        return error_set(err, -EFBIG, "disk %s: the image's file has too many clusters to be written; convert it to one with larger clusters: "
                         "qemu-img convert -O qcow2 -o cluster_size=2M", image->block->path);
    image->reftable_entries = (uint32_t)(bytes / 8);
    image->reftable = malloc(bytes);
    image->refblock = calloc(image->reftable_entries, sizeof(*image->refblock));
    if (ret < 0 || !image->reftable || !image->refblock)
        return overlap(image, -ENOMEM, "refcount table", 0, err);
    if ((ret = claim(image, header->l1_offset, 8ull * header->l1_entries)))
        return overlap(image, ret, "L1 table", header->l1_offset, err);
    if ((ret = claim(image, header->reftable_offset, bytes)))
        return overlap(image, ret, "refcount table", header->reftable_offset, err);
    if (header->snapshots && (ret = claim(image, header->snapshots_offset, 40ull * header->snapshots)))
        return overlap(image, ret, "snapshot table", header->snapshots_offset, err);
    ret = read_exactly(block_raw_fd(image->file), image->reftable, bytes, header->reftable_offset);
    if (ret < 0)
        return overlap(image, ret, "refcount table", header->reftable_offset, err);
    ret = load_blocks(image, err);
    for (uint32_t i = 0; ret == 0 && i < header->l1_entries; i++) {
        l2 = image->l1[i] & QCOW2_OFFSET;
        if (l2 && l2 < block_size_bytes(image->file) && l2 % image->cluster_bytes == 0 && (ret = claim(image, l2, image->cluster_bytes)))
            return overlap(image, ret, "L2 table", l2, err);
    }
    return ret;
}

void qcow2_refcounts_close(struct qcow2 *image)
{
    struct qcow2_freed *freed;

    for (uint32_t i = 0; image->refblock && i < image->reftable_entries; i++)
        free(image->refblock[i].data);
    while ((freed = TAILQ_FIRST(&image->freed))) {
        TAILQ_REMOVE(&image->freed, freed, link);
        free(freed);
    }
    free(image->refblock);
    free(image->reftable);
    free(image->metadata);
}
