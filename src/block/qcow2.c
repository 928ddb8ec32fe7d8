/*
 * qcow2: opening, closing, overlays, and new images (qcow2.h has the plan).
 *
 * Invariant: backing files are opened for reading only, as the user allows, in the format that the image tells, and never twice in a chain.
 * Threading: with the device lock held; opening and closing wait for the host.
 */
#include <assert.h>
#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/qcow2.h"
#include "block/qcow2_layout.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

/* Headers and tables: of overlays, while the guest stands still; of images that are plugged. */
SANDBOX_ALLOW(IN_LOOP | IN_API, pread64);

#define EXTENSION_BACKING_FORMAT 0xe2792acau

static void wake(void *ctx)
{
    struct qcow2 *image = ctx;
    struct qcow2_op_list list = TAILQ_HEAD_INITIALIZER(list);
    struct qcow2_op *op;

    TAILQ_CONCAT(&list, &image->waiting, wait_link);
    while ((op = TAILQ_FIRST(&list))) {
        TAILQ_REMOVE(&list, op, wait_link);
        op->again(op);
    }
}

/* ---- the backing file ---- */

static bool same_file(const char *a, const char *b)
{
    struct stat sa, sb;

    return stat(a, &sa) == 0 && stat(b, &sb) == 0 && sa.st_dev == sb.st_dev && sa.st_ino == sb.st_ino;
}

int qcow2_backing_path(const char *own, const char *name, char **path, struct error *err)
{
    const char *slash = strrchr(own, '/');

    *path = NULL;
    if (!strncmp(name, "file:", 5))
        name += 5;
    else if (!strncmp(name, "json:", 5) || strstr(name, "://"))
        return error_set(err, -ENOTSUP, "disk %s: its backing file \"%s\" is no file's path", own, name);
    if (*name == '/' || !slash)
        *path = strdup(name);
    else if (asprintf(path, "%.*s/%s", (int)(slash - own), own, name) < 0)
        *path = NULL;
    return *path ? 0 : error_set(err, -ENOMEM, "disk %s: no memory", own);
}

/* By where the paths lead in the end. */
static bool is_near(const char *image, const char *backing)
{
    char *own = realpath(image, NULL), *other = realpath(backing, NULL), *slash = own ? strrchr(own, '/') : NULL;
    bool near = own && other && slash && !strncmp(own, other, (size_t)(slash - own) + 1);

    free(own);
    free(other);
    return near;
}

static int may_open(const struct qcow2 *image, const struct block_config *config, const char *path, struct error *err)
{
    const char *own = image->block->path;

    if (config->backing == BLOCK_BACKING_NONE)
        return error_set(err, -EPERM, "disk %s: the image wants the backing file %s, which is not opened for an image whose format is guessed, or when backing=none; "
                         "if you trust it, add format=qcow2 and backing=any", own, path);
    for (const struct block *above = image->block; above; above = above->above) {
        if (same_file(above->path, path))
            return error_set(err, -ELOOP, "disk %s: its backing file %s is itself or an image above it", own, path);
    }
    if (image->block->depth >= QCOW2_DEPTH_MAX)
        return error_set(err, -ELOOP, "disk %s: more than %u images on top of one another", own, QCOW2_DEPTH_MAX);
    if (config->backing == BLOCK_BACKING_NEAR && access(path, F_OK) == 0 && !is_near(own, path))
        return error_set(err, -EPERM, "disk %s: the image wants the backing file %s, which is not in its directory; if you trust it, add backing=any", own, path);
    if (!image->header.backing_format)
        return error_set(err, -EINVAL, "disk %s: the image does not tell the format of its backing file %s; tell it: qemu-img rebase -u -F raw -b %s %s (or -F qcow2)", own,
                         path, image->header.backing, own);
    if (strcmp(image->header.backing_format, "raw") && strcmp(image->header.backing_format, "qcow2"))
        return error_set(err, -ENOTSUP, "disk %s: its backing file %s has the format \"%s\", which is not supported", own, path, image->header.backing_format);
    return 0;
}

static bool is_beside(const struct qcow2 *image, const char *path)
{
    struct stat own, other;

    return fstat(block_raw_fd(image->file), &own) == 0 && stat(path, &other) == 0 && own.st_dev == other.st_dev;
}

static int open_backing(struct qcow2 *image, const struct block_config *config, struct error *err)
{
    struct block_config below = *config;
    struct block_below place = {.io = image->file->io, .above = image->block, .depth = image->block->depth + 1};
    char *path;
    int ret;

    if (!image->header.backing)
        return 0;
    ret = qcow2_backing_path(image->block->path, image->header.backing, &path, err);
    if (ret == 0)
        ret = may_open(image, config, path, err);
    if (ret == 0) {
        below.path = path;
        below.format = image->header.backing_format;
        below.readonly = true;
        below.beside = is_beside(image, path);
        ret = block_open_beneath(&image->backing, &below, &place, image->block->loop, err);
        if (ret < 0 && !image->block->depth)
            error_prefix(err, "disk %s: its backing file", image->block->path);
    }
    free(path);
    return ret;
}

/* ---- opening and closing ---- */

static int read_l1(struct qcow2 *image)
{
    uint64_t bytes = 8ull * image->header.l1_entries;
    ssize_t got;

    image->l1 = malloc(bytes);
    if (!image->l1)
        return -ENOMEM;
    for (uint64_t done = 0; done < bytes; done += (uint64_t)got) {
        got = pread(block_raw_fd(image->file), (uint8_t *)image->l1 + done, bytes - done, (off_t)(image->header.l1_offset + done));
        if (got <= 0)
            return got < 0 ? -errno : -EIO;
    }
    for (uint32_t i = 0; i < image->header.l1_entries; i++)
        image->l1[i] = be64toh(image->l1[i]);
    return 0;
}

/* What has to be so before anything is written. */
static int prepare_writing(struct qcow2 *image, struct error *err)
{
    const char *path = image->block->path;

    if (image->header.incompatible & QCOW2_CORRUPT)
        return error_set(err, -EINVAL, "disk %s: the image is marked as damaged; use it with \",readonly\", or repair it: qemu-img check -r all %s", path, path);
    if (image->header.incompatible & QCOW2_DIRTY)
        return error_set(err, -EINVAL, "disk %s: the image was not closed and its reference counts are not up to date; repair it: qemu-img check -r all %s", path, path);
    if (image->header.snapshots)
        return error_set(err, -ENOTSUP, "disk %s: the image has %u snapshots inside it, which are not kept up; use it with \",readonly\", or delete them: qemu-img snapshot -d NAME %s", path,
                         image->header.snapshots, path);
    if (pread(block_raw_fd(image->file), image->first_sector, sizeof(image->first_sector), 0) != (ssize_t)sizeof(image->first_sector))
        return error_set(err, -EIO, "disk %s: cannot be read", path);
    if (image->header.autoclear) { /* whatever they say of the image is not kept up here */
        image->header.autoclear = 0;
        image->header_dirty = true;
    }
    return qcow2_refcounts_open(image, err);
}

static void qcow2_close(struct block *block)
{
    struct qcow2 *image = block->private;
    int ret;

    if (!image)
        return;
    if (image->writable && image->opened && (ret = qcow2_commit_now(image)) < 0)
        log_error("disk %s: closing failed: %s; what the guest had flushed is there", block->path, strerror(-ret));
    qcow2_tables_close(image);
    qcow2_refcounts_close(image);
    if (image->wake)
        loop_event_destroy(image->wake);
    block_close(image->backing);
    block_close(image->file);
    qcow2_header_clear(&image->header);
    free(image->l1);
    free(image->unpacked);
    free(image);
    block->private = NULL;
}

static struct qcow2 *create(struct block *block)
{
    struct qcow2 *image = calloc(1, sizeof(*image));

    if (!image)
        return NULL;
    image->block = block;
    TAILQ_INIT(&image->tables);
    TAILQ_INIT(&image->freed);
    TAILQ_INIT(&image->ops);
    TAILQ_INIT(&image->waiting);
    TAILQ_INIT(&image->commit.served);
    TAILQ_INIT(&image->commit.next);
    for (unsigned i = 0; i < PHASES; i++)
        STAILQ_INIT(&image->commit.items[i]);
    block->private = image;
    image->wake = loop_event_create(block->loop, wake, image);
    return image->wake ? image : NULL;
}

static int open_image(struct qcow2 *image, const struct block_config *config, int fd, struct error *err)
{
    struct block *block = image->block;
    int ret = block_open_file(&image->file, config, fd, block->io, block->loop, err);

    if (ret == 0)
        ret = qcow2_header_read(&image->header, block_raw_fd(image->file), block_size_bytes(image->file), block->path, err);
    if (ret < 0)
        return ret;
    if (!block->io) { /* an overlay may come on top, which shares it */
        block->io = image->file->io;
        block->io->users++;
    }
    image->cluster_bytes = 1u << image->header.cluster_bits;
    image->l2_entries = image->cluster_bytes / 8;
    image->table_bytes = (uint64_t)image->l2_entries * image->cluster_bytes;
    image->tables_max = QCOW2_CACHE_BYTES / image->cluster_bytes;
    if (image->tables_max < QCOW2_TABLES_MIN)
        image->tables_max = QCOW2_TABLES_MIN;
    if (image->tables_max > QCOW2_TABLES_MAX)
        image->tables_max = QCOW2_TABLES_MAX;
    ret = read_l1(image);
    if (ret < 0)
        return error_set(err, ret, "disk %s: cannot be read: %s", block->path, strerror(-ret));
    if (!config->readonly && !config->later)
        ret = prepare_writing(image, err);
    if (ret < 0)
        return ret;
    image->writable = !config->readonly && !config->later;
    block->size_bytes = image->header.size_bytes;
    block->readonly = config->readonly;
    block->can_discard = !config->readonly;
    return 0;
}

static int qcow2_open(struct block *block, const struct block_config *config, struct error *err)
{
    struct qcow2 *image = create(block);
    int ret = image ? open_image(image, config, -1, err) : error_set(err, -ENOMEM, "disk %s: no memory", config->path);

    if (ret == 0)
        ret = open_backing(image, config, err);
    if (ret == 0 && image->writable && image->header_dirty && (ret = qcow2_commit_now(image)) < 0) /* before anything that they say is not so any more */
        error_set(err, ret, "disk %s: cannot be written: %s", block->path, strerror(-ret));
    if (ret == 0)
        image->opened = true;
    else
        qcow2_close(block);
    return ret;
}

const struct block *qcow2_file(const struct block *block)
{
    const struct qcow2 *image = block->private;

    return image->file;
}

static bool qcow2_holds(const struct block *block, const char *path)
{
    const struct qcow2 *image = block->private;

    return image->file->ops->holds(image->file, path);
}

/* The size is in the header, which nobody else may change meanwhile. */
static int qcow2_refresh(struct block *block, struct error *err)
{
    (void)block;
    (void)err;
    return 0;
}

static int qcow2_settle(struct block *block)
{
    return qcow2_commit_now(block->private);
}

static int qcow2_freeze(struct block *block, bool freeze, struct error *err)
{
    struct qcow2 *image = block->private;
    int ret = image->file->ops->freeze(image->file, freeze, err);

    if (ret == 0) {
        image->writable = !freeze;
        block->readonly = freeze;
        block->can_discard = !freeze;
    }
    return ret;
}

static int qcow2_give(struct block *block, bool away, struct error *err)
{
    struct qcow2 *image = block->private;
    int ret = image->file->ops->give(image->file, away, err);

    if (ret == 0)
        image->writable = !away;
    return ret;
}

const struct block_ops block_qcow2_ops = {
    .name = "qcow2",
    .open = qcow2_open,
    .close = qcow2_close,
    .holds = qcow2_holds,
    .refresh = qcow2_refresh,
    .submit = qcow2_submit,
    .settle = qcow2_settle,
    .freeze = qcow2_freeze,
    .give = qcow2_give,
};

/* ---- overlays ---- */

/* How many images there are from this one down. */
static unsigned images_from(const struct block *block)
{
    unsigned count = 1;

    while (block->ops == &block_qcow2_ops && ((const struct qcow2 *)block->private)->backing) {
        block = ((const struct qcow2 *)block->private)->backing;
        count++;
    }
    return count;
}

int block_overlay(struct block **out, struct block *below, const char *path, int fd, struct error *err)
{
    const struct block_config config = {.path = path, .format = "qcow2"};
    struct block *block = block_create(path, below->loop);
    struct qcow2 *image = NULL;
    bool frozen_before = below->readonly;
    int ret;

    *out = NULL;
    assert(!below->in_flight);
    if (block) {
        block->io = below->io;
        block->io->users++;
        image = create(block);
    }
    if (image) {
        ret = open_image(image, &config, fd, err);
    } else {
        ret = error_set(err, -ENOMEM, "disk %s: no memory", path);
        close(fd);
    }
    if (ret == 0 && images_from(below) >= QCOW2_DEPTH_MAX)
        ret = error_set(err, -ELOOP, "disk %s: lies on %u images already; deleting snapshots makes them fewer", below->path, images_from(below) - 1);
    if (ret == 0 && block->size_bytes != below->size_bytes)
        ret = error_set(err, -EINVAL, "disk %s: has another size than %s, which it is to lie on", path, below->path);
    if (ret == 0 && (ret = block_settle(below)) < 0)
        error_set(err, ret, "disk %s: cannot be written: %s", below->path, strerror(-ret));
    if (ret == 0 && !below->readonly)
        ret = below->ops->freeze(below, true, err);
    if (ret < 0) {
        if (block && block->private)
            qcow2_close(block);
        block_close(block);
        return ret;
    }
    image->backing = below;
    image->frozen_before = frozen_before;
    image->opened = true;
    block->ops = &block_qcow2_ops;
    block_wait_when_full(block, below->full, below->full_ctx);
    *out = block;
    return 0;
}

struct block *block_overlay_undo(struct block *overlay)
{
    struct qcow2 *image = overlay->private;
    struct block *below = image->backing;
    struct error err;

    image->backing = NULL;
    if (!image->frozen_before && below->ops->freeze(below, false, &err) < 0)
        log_error("%s", err.text); /* it cannot be locked for writing any more; the guest sees a disk that refuses */
    block_close(overlay);
    return below;
}

/* ---- new images ---- */

static int write_at(int fd, const void *data, size_t bytes, uint64_t offset)
{
    ssize_t n;

    do
        n = pwrite(fd, data, bytes, (off_t)offset);
    while (n < 0 && errno == EINTR);
    return n == (ssize_t)bytes ? 0 : n < 0 ? -errno : -ENOSPC;
}

/* The header's extensions and the backing file's name, in the first sectors. */
static void fill_header(uint8_t *data, struct qcow2_disk_header *disk, const char *backing, const char *backing_format)
{
    size_t at = sizeof(*disk);
    uint32_t words[2] = {htobe32(EXTENSION_BACKING_FORMAT), htobe32((uint32_t)(backing ? strlen(backing_format) : 0))};

    if (backing) {
        memcpy(data + at, words, sizeof(words));
        memcpy(data + at + 8, backing_format, strlen(backing_format));
        at += 8 + (strlen(backing_format) + 7) / 8 * 8;
        at += 8; /* the end of the extensions: zeroes */
        disk->backing_file_offset = htobe64(at);
        disk->backing_file_size = htobe32((uint32_t)strlen(backing));
        memcpy(data + at, backing, strlen(backing));
    }
    memcpy(data, disk, sizeof(*disk));

}

int qcow2_format(int fd, uint64_t size_bytes, const char *backing, const char *backing_format)
{
    const uint64_t cluster_bytes = 1ull << QCOW2_NEW_CLUSTER_BITS, l1_covers = cluster_bytes * (cluster_bytes / 8);
    uint64_t l1_entries = (size_bytes + l1_covers - 1) / l1_covers, l1_clusters = (8 * l1_entries + cluster_bytes - 1) / cluster_bytes, reftable;
    struct qcow2_disk_header disk = {.version = htobe32(3),
                                     .cluster_bits = htobe32(QCOW2_NEW_CLUSTER_BITS),
                                     .size = htobe64(size_bytes),
                                     .l1_size = htobe32((uint32_t)l1_entries),
                                     .refcount_table_offset = htobe64(cluster_bytes),
                                     .refcount_table_clusters = htobe32(1),
                                     .l1_table_offset = htobe64(3 * cluster_bytes),
                                     .refcount_order = htobe32(4),
                                     .header_length = htobe32(sizeof(disk))};
    uint8_t header[2048] = {0};
    uint16_t refcounts[QCOW2_TABLE_BYTES_MAX / (1 << QCOW2_NEW_CLUSTER_BITS) + 3];
    int ret;

    if (size_bytes == 0 || size_bytes % QCOW2_SECTOR_BYTES || l1_entries > QCOW2_TABLE_BYTES_MAX / 8)
        return -EINVAL;
    if (backing && (strlen(backing) > 1023 || strlen(backing_format) > 32))
        return -ENAMETOOLONG;
    memcpy(disk.magic, qcow2_magic, sizeof(disk.magic));
    fill_header(header, &disk, backing, backing_format);
    for (unsigned i = 0; i < l1_clusters + 3; i++)
        refcounts[i] = htobe16(1);
    reftable = htobe64(2 * cluster_bytes);
    /* Clusters: header, refcount table, its first block, L1 table. The header last: without it the file is no image. */
    ret = ftruncate(fd, (off_t)((3 + l1_clusters) * cluster_bytes)) < 0 ? -errno : 0;
    if (ret == 0)
        ret = write_at(fd, refcounts, (l1_clusters + 3) * sizeof(*refcounts), 2 * cluster_bytes);
    if (ret == 0)
        ret = write_at(fd, &reftable, sizeof(reftable), cluster_bytes);
    return ret ? ret : write_at(fd, header, sizeof(header), 0);
}

int block_image_format(int fd, const char *path, uint64_t size_bytes, const char *backing, const char *backing_format, struct error *err)
{
    int ret = qcow2_format(fd, size_bytes, backing, backing_format);

    if (ret == 0 && fsync(fd) < 0)
        ret = -errno;
    return ret ? error_set(err, ret, "cannot make the image %s: %s", path, strerror(-ret)) : 0;
}
