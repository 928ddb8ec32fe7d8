/*
 * Images as tools see them: what they are, from where their bytes come, and copies of them. Everything waits for the host; each open image has a loop of its own.
 *
 * Invariant: images are opened for reading here, but for new ones that are being written.
 * Threading: none.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/image.h"
#include "block/qcow2.h"

#define STEP_BYTES (1u << 20)

struct block_image {
    struct loop *loop;
    struct block *block;
};

struct waiting {
    struct block_request request; /* first */
    bool done;
    int result;
};

static void ended(struct block_request *request, int result)
{
    struct waiting *waiting = (struct waiting *)request;

    waiting->done = true;
    waiting->result = result;
}

static int run(struct block_image *image, enum block_op op, uint64_t offset, void *data, uint64_t bytes)
{
    struct iovec iov = {data, bytes};
    struct waiting waiting = {.request = {.op = op, .may_unmap = true, .offset_bytes = offset, .length_bytes = bytes, .iov = &iov, .iov_count = 1, .done = ended}};

    block_submit(image->block, &waiting.request);
    while (!waiting.done) {
        int ret = loop_run_once(image->loop, -1);

        if (ret < 0)
            return ret;
    }
    return waiting.result;
}

/* ---- what it is ---- */

int block_image_info(const char *path, const char *format, struct block_image_info *info, struct error *err)
{
    struct block_image_info none = {0};
    struct qcow2_header header;
    struct stat st;
    uint8_t magic[QCOW2_MAGIC_BYTES];
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK), ret = 0;

    *info = none;
    if (fd < 0 || fstat(fd, &st) < 0)
        ret = error_set(err, -errno, "disk %s: cannot be read: %s", path, strerror(errno));
    else if (!S_ISREG(st.st_mode))
        ret = error_set(err, -EINVAL, "disk %s: is not a regular file", path);
    if (ret == 0) {
        info->file_bytes = (uint64_t)st.st_size;
        info->allocated_bytes = (uint64_t)st.st_blocks * 512;
        info->qcow2 = format ? !strcmp(format, "qcow2") : pread(fd, magic, sizeof(magic), 0) == (ssize_t)sizeof(magic) && !memcmp(magic, qcow2_magic, sizeof(magic));
        info->size_bytes = info->file_bytes;
    }
    if (ret == 0 && info->qcow2 && (ret = qcow2_header_read(&header, fd, info->file_bytes, path, err)) == 0) {
        info->version = header.version;
        info->size_bytes = header.size_bytes;
        info->cluster_bytes = 1u << header.cluster_bits;
        info->snapshots = header.snapshots;
        info->dirty = header.incompatible & QCOW2_DIRTY;
        info->corrupt = header.incompatible & QCOW2_CORRUPT;
        info->backing_format = header.backing_format ? strdup(header.backing_format) : NULL;
        if (header.backing)
            ret = qcow2_backing_path(path, header.backing, &info->backing, err);
        qcow2_header_clear(&header);
    }
    if (fd >= 0)
        close(fd);
    if (ret < 0)
        block_image_info_clear(info);
    return ret;
}

void block_image_info_clear(struct block_image_info *info)
{
    free(info->backing);
    free(info->backing_format);
    info->backing = info->backing_format = NULL;
}

/* ---- reading ---- */

static int open_any(struct block_image **out, const char *path, const char *format, bool writable, struct error *err)
{
    struct block_image *image = calloc(1, sizeof(*image));
    const struct block_config config = {.path = path, .format = format, .readonly = !writable, .io = "threads", .backing = BLOCK_BACKING_ANY};
    int ret = image ? loop_create(&image->loop, NULL) : -ENOMEM;

    *out = image;
    if (ret < 0)
        error_set(err, ret, "disk %s: no memory", path);
    else
        ret = block_open(&image->block, &config, image->loop, err);
    if (ret < 0) {
        block_image_close(image);
        *out = NULL;
    }
    return ret;
}

int block_image_open(struct block_image **image, const char *path, const char *format, struct error *err)
{
    return open_any(image, path, format, false, err);
}

void block_image_close(struct block_image *image)
{
    if (!image)
        return;
    block_close(image->block);
    if (image->loop)
        loop_destroy(image->loop);
    free(image);
}

uint64_t block_image_bytes(const struct block_image *image)
{
    return block_size_bytes(image->block);
}

int block_image_read(struct block_image *image, uint64_t offset, void *data, uint64_t bytes)
{
    return run(image, BLOCK_READ, offset, data, bytes);
}

int block_image_check(struct block_image *image, unsigned *count, struct error *err)
{
    const struct block *block = image->block;
    int ret = 0;

    for (*count = 0; ret == 0 && block; ++*count) {
        bool qcow2 = block->ops == &block_qcow2_ops;

        ret = qcow2 ? qcow2_check(block->private, err) : 0;
        block = qcow2 ? ((struct qcow2 *)block->private)->backing : NULL;
    }
    return ret;
}

/* ---- where bytes come from ---- */

static int raw_where(const struct block *block, uint64_t offset, uint64_t *bytes, struct block_where *where)
{
    struct stat st;
    int fd = block_raw_fd(block);
    off_t data = lseek(fd, (off_t)offset, SEEK_DATA), hole;

    if (fstat(fd, &st) < 0)
        return -errno;
    where->device = st.st_dev;
    where->inode = st.st_ino;
    where->at = offset;
    where->kind = WHERE_DATA;
    if (data < 0 && errno == ENXIO) {
        where->kind = WHERE_ZERO;
    } else if (data > (off_t)offset) {
        where->kind = WHERE_ZERO;
        *bytes = *bytes < (uint64_t)data - offset ? *bytes : (uint64_t)data - offset;
    } else if (data == (off_t)offset && (hole = lseek(fd, data, SEEK_HOLE)) > data) {
        *bytes = *bytes < (uint64_t)(hole - data) ? *bytes : (uint64_t)(hole - data);
    }
    return 0;
}

/* Nothing is in flight, and nobody writes it. */
static int entry_at(const struct qcow2 *image, uint64_t offset, uint64_t *bytes, uint64_t *entry)
{
    uint64_t l1 = image->l1[offset / image->table_bytes], in_table = image->table_bytes - offset % image->table_bytes, cluster = image->cluster_bytes - offset % image->cluster_bytes;
    ssize_t got;

    *entry = 0;
    *bytes = *bytes < in_table ? *bytes : in_table;
    if (!(l1 & QCOW2_OFFSET))
        return 0;
    got = pread(block_raw_fd(image->file), entry, 8, (off_t)((l1 & QCOW2_OFFSET) + offset % image->table_bytes / image->cluster_bytes * 8));
    *entry = __builtin_bswap64(*entry);
    *bytes = *bytes < cluster ? *bytes : cluster;
    return got == 8 ? 0 : got < 0 ? -errno : -EIO;
}

static int where_below(const struct block *block, uint64_t offset, uint64_t *bytes, struct block_where *where)
{
    const struct qcow2 *image = block->private;
    uint64_t entry;
    struct stat st;
    int ret;

    if (offset >= block_size_bytes(block)) { /* shorter than what is above */
        where->kind = WHERE_ZERO;
        return 0;
    }
    if (*bytes > block_size_bytes(block) - offset)
        *bytes = block_size_bytes(block) - offset;
    if (block->ops != &block_qcow2_ops)
        return raw_where(block, offset, bytes, where);
    ret = entry_at(image, offset, bytes, &entry);
    if (ret < 0)
        return ret;
    if (!(entry & ~QCOW2_COPIED)) {
        where->depth++;
        if (image->backing)
            return where_below(image->backing, offset, bytes, where);
        where->kind = WHERE_ZERO;
        return 0;
    }
    if (fstat(block_raw_fd(image->file), &st) < 0)
        return -errno;
    where->device = st.st_dev;
    where->inode = st.st_ino;
    where->kind = !(entry & QCOW2_COMPRESSED) && (entry & QCOW2_ZERO) ? WHERE_ZERO : WHERE_DATA;
    /* Of compressed ones the descriptor is as good as a place. */
    where->at = entry & QCOW2_COMPRESSED ? entry ^ offset % image->cluster_bytes : (entry & QCOW2_OFFSET) + offset % image->cluster_bytes;
    return 0;
}

int block_image_where(const struct block_image *image, uint64_t offset, uint64_t *bytes, struct block_where *where)
{
    *where = (struct block_where){0};
    return where_below(image->block, offset, bytes, where);
}

/* ---- copies ---- */

static bool is_zero(const uint8_t *data, uint64_t bytes)
{
    return bytes == 0 || (data[0] == 0 && !memcmp(data, data + 1, bytes - 1));
}

static int copy_part(struct block_image *from, struct block_image *to, uint64_t offset, uint64_t bytes, uint8_t *buffer)
{
    int ret = run(from, BLOCK_READ, offset, buffer, bytes);

    for (uint64_t done = 0, part; ret == 0 && done < bytes; done += part) { /* clusters of nothing but zeroes take no place */
        part = bytes - done < QCOW2_NEW_CLUSTER_BYTES ? bytes - done : QCOW2_NEW_CLUSTER_BYTES;
        ret = run(to, is_zero(buffer + done, part) ? BLOCK_WRITE_ZEROES : BLOCK_WRITE, offset + done, buffer + done, part);
    }
    return ret;
}

static int copy_layers(struct block_image *from, struct block_image *to, unsigned layers)
{
    uint64_t size = block_size_bytes(from->block), bytes;
    uint8_t *buffer = malloc(STEP_BYTES);
    int ret = buffer ? 0 : -ENOMEM;

    for (uint64_t offset = 0; ret == 0 && offset < size; offset += bytes) {
        struct block_where where;

        bytes = size - offset;
        ret = block_image_where(from, offset, &bytes, &where);
        if (ret < 0 || where.depth >= layers)
            continue;
        if (where.kind == WHERE_ZERO) {
            ret = run(to, BLOCK_WRITE_ZEROES, offset, NULL, bytes);
            continue;
        }
        bytes = bytes < STEP_BYTES ? bytes : STEP_BYTES;
        ret = copy_part(from, to, offset, bytes, buffer);
    }
    free(buffer);
    return ret ? ret : run(to, BLOCK_FLUSH, 0, NULL, 0);
}

static int copy_image(const char *from, const char *format, const char *to, unsigned layers, const char *backing, const char *backing_format, bool replace, struct error *err)
{
    struct block_image *source, *target = NULL;
    int ret = block_image_open(&source, from, format, err), fd;

    if (ret < 0)
        return ret;
    fd = open(to, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        ret = error_set(err, -errno, "cannot make %s: %s", to, strerror(errno));
        block_image_close(source);
        return ret;
    }
    ret = block_image_format(fd, to, block_size_bytes(source->block), backing, backing_format, err);
    close(fd);
    if (ret == 0)
        ret = open_any(&target, to, "qcow2", true, err);
    if (ret == 0 && (ret = copy_layers(source, target, layers)) < 0)
        error_set(err, ret, "cannot copy %s to %s: %s", from, to, strerror(-ret));
    block_image_close(target);
    if (ret == 0 && replace && rename(to, from) < 0)
        ret = error_set(err, -errno, "cannot replace %s: %s", from, strerror(errno));
    block_image_close(source); /* it was locked until now: nobody has begun to write to what is replaced */
    if (ret < 0)
        unlink(to);
    return ret;
}

int block_image_copy(const char *from, const char *format, const char *to, unsigned layers, const char *backing, const char *backing_format, struct error *err)
{
    return copy_image(from, format, to, layers, backing, backing_format, false, err);
}

int block_image_merge(const char *path, const char *draft, const char *backing, const char *backing_format, struct error *err)
{
    return copy_image(path, "qcow2", draft, 2, backing, backing_format, true, err);
}
