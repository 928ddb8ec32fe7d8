/*
 * Headers of qcow2 images: read and checked, field by field. Everything that comes from here is within bounds: tables are aligned, inside the file and of a size that memory can bear.
 *
 * Threading: none; waits for the host.
 */
#include <endian.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "block/qcow2.h"
#include "block/qcow2_layout.h"

#define EXTENSION_END 0u
#define EXTENSION_BACKING_FORMAT 0xe2792acau
#define EXTENSION_FEATURE_NAMES 0x6803f857u
#define BACKING_NAME_MAX 1023u
#define FEATURE_NAME_BYTES 48u
#define SNAPSHOTS_MAX 65536u

const uint8_t qcow2_magic[QCOW2_MAGIC_BYTES] = {'Q', 'F', 'I', 0xfb};

/* The first cluster while it is looked at. */
struct reading {
    const char *path;
    uint8_t *data;
    size_t bytes;
    uint64_t file_bytes;
    struct qcow2_header *header;
    struct error *err;
};

static int bad(const struct reading *r, const char *what, uint64_t value)
{
    return error_set(r->err, -EINVAL, "disk %s: not a qcow2 image that can be used: %s (%llu)", r->path, what, (unsigned long long)value);
}

static int check_table(const struct reading *r, const char *what, uint64_t offset, uint64_t bytes)
{
    uint64_t cluster_bytes = 1ull << r->header->cluster_bits;

    if (offset % cluster_bytes || offset == 0)
        return bad(r, what, offset);
    if (bytes > QCOW2_TABLE_BYTES_MAX)
        return bad(r, what, bytes);
    if (offset > r->file_bytes || bytes > r->file_bytes - offset)
        return error_set(r->err, -EINVAL, "disk %s: the image was cut: its %s ends at byte %llu, the file has %llu", r->path, what,
                         (unsigned long long)(offset + bytes), (unsigned long long)r->file_bytes);
    return 0;
}

/* Names of features in the image's own list, for messages. */
static void feature_name(const struct reading *r, const uint8_t *list, size_t list_bytes, uint64_t bits, char name[FEATURE_NAME_BYTES])
{
    unsigned bit = (unsigned)__builtin_ctzll(bits);

    snprintf(name, FEATURE_NAME_BYTES, "bit %u", bit);
    for (size_t i = 0; list && i + FEATURE_NAME_BYTES <= list_bytes; i += FEATURE_NAME_BYTES) {
        if (list[i] != 0 || list[i + 1] != bit)
            continue;
        memcpy(name, list + i + 2, FEATURE_NAME_BYTES - 2);
        name[FEATURE_NAME_BYTES - 2] = '\0';
        for (char *c = name; *c; c++) {
            if (*c < ' ' || *c > '~')
                *c = '?';
        }
        return;
    }
    (void)r;
}

static int check_features(const struct reading *r, const uint8_t *names, size_t names_bytes)
{
    uint64_t unknown = r->header->incompatible & ~(QCOW2_DIRTY | QCOW2_CORRUPT | QCOW2_COMPRESSION_TYPE);
    char name[FEATURE_NAME_BYTES];

    if (!unknown)
        return 0;
    feature_name(r, names, names_bytes, unknown, name);
    return error_set(r->err, -ENOTSUP, "disk %s: the image uses a feature of qcow2 that is not supported: %s; convert it: qemu-img convert -O qcow2 %s new.qcow2",
                     r->path, name, r->path);
}

static char *copy_text(const uint8_t *data, size_t bytes)
{
    return memchr(data, 0, bytes) ? NULL : strndup((const char *)data, bytes);
}

static int read_extensions(const struct reading *r, size_t end)
{
    const uint8_t *names = NULL;
    size_t names_bytes = 0, at = r->header->header_bytes;

    while (at + 8 <= end) {
        uint32_t type, bytes;

        memcpy(&type, r->data + at, 4);
        memcpy(&bytes, r->data + at + 4, 4);
        type = be32toh(type);
        bytes = be32toh(bytes);
        at += 8;
        if (type == EXTENSION_END)
            break;
        if (bytes > end - at)
            return bad(r, "a header extension that goes beyond the header", type);
        if (type == EXTENSION_BACKING_FORMAT && !r->header->backing_format) {
            r->header->backing_format = bytes && bytes <= 32 ? copy_text(r->data + at, bytes) : NULL;
            if (!r->header->backing_format)
                return bad(r, "the backing file's format is no text", bytes);
        } else if (type == EXTENSION_FEATURE_NAMES) {
            names = r->data + at;
            names_bytes = bytes;
        }
        at += bytes;
        at = (at + 7) / 8 * 8;
    }
    return check_features(r, names, names_bytes);
}

static int read_backing(const struct reading *r, const struct qcow2_disk_header *disk, size_t *extensions_end)
{
    uint64_t offset = be64toh(disk->backing_file_offset);
    uint32_t bytes = be32toh(disk->backing_file_size);

    *extensions_end = r->bytes;
    if (offset == 0 || bytes == 0)
        return 0;
    if (bytes > BACKING_NAME_MAX || offset > r->bytes || bytes > r->bytes - offset || offset < r->header->header_bytes)
        return bad(r, "its backing file's name is not in the header", offset);
    *extensions_end = (size_t)offset;
    r->header->backing = copy_text(r->data + offset, bytes);
    return r->header->backing ? 0 : bad(r, "its backing file's name is no text", bytes);
}

static int read_version_3(const struct reading *r, const struct qcow2_disk_header *disk)
{
    struct qcow2_header *header = r->header;

    header->incompatible = be64toh(disk->incompatible_features);
    header->compatible = be64toh(disk->compatible_features);
    header->autoclear = be64toh(disk->autoclear_features);
    header->header_bytes = be32toh(disk->header_length);
    if (header->header_bytes < offsetof(struct qcow2_disk_header, compression_type) || header->header_bytes > r->bytes || header->header_bytes % 8)
        return bad(r, "header length", header->header_bytes);
    if (be32toh(disk->refcount_order) > 6)
        return bad(r, "refcount order", be32toh(disk->refcount_order));
    header->refcount_bits = 1u << be32toh(disk->refcount_order);
    if (header->header_bytes > offsetof(struct qcow2_disk_header, compression_type)) {
        if (disk->compression_type > 1 || (disk->compression_type == 1) != !!(header->incompatible & QCOW2_COMPRESSION_TYPE))
            return bad(r, "compression type", disk->compression_type);
        header->zstd = disk->compression_type == 1;
    } else if (header->incompatible & QCOW2_COMPRESSION_TYPE) {
        return bad(r, "no compression type in a header of length", header->header_bytes);
    }
    return 0;
}

static int check_sizes(const struct reading *r)
{
    const struct qcow2_header *header = r->header;
    unsigned l1_shift = header->cluster_bits + header->cluster_bits - 3; /* what an L1 entry covers */
    int ret;

    if (header->size_bytes == 0 || header->size_bytes % QCOW2_SECTOR_BYTES || header->size_bytes > INT64_MAX)
        return bad(r, "the disk's size", header->size_bytes);
    if (header->l1_entries > QCOW2_TABLE_BYTES_MAX / 8 || (header->size_bytes - 1) >> l1_shift >= header->l1_entries)
        return bad(r, "L1 table's entries", header->l1_entries);
    ret = check_table(r, "L1 table", header->l1_offset, 8ull * header->l1_entries);
    if (ret == 0)
        ret = check_table(r, "refcount table", header->reftable_offset, (uint64_t)header->reftable_clusters << header->cluster_bits);
    if (ret == 0 && header->reftable_clusters == 0)
        ret = bad(r, "refcount table's clusters", 0);
    if (ret == 0 && header->snapshots > SNAPSHOTS_MAX)
        ret = bad(r, "snapshots", header->snapshots);
    if (ret == 0 && header->snapshots)
        ret = check_table(r, "snapshot table", header->snapshots_offset, 40ull * header->snapshots);
    return ret;
}

static int read_first_cluster(struct reading *r, int fd, struct qcow2_disk_header *disk)
{
    uint32_t bits;
    ssize_t got = pread(fd, disk, sizeof(*disk), 0);

    if (got < 0)
        return error_set(r->err, -errno, "disk %s: cannot be read: %s", r->path, strerror(errno));
    if (got < (ssize_t)offsetof(struct qcow2_disk_header, incompatible_features) || memcmp(&disk->magic, qcow2_magic, sizeof(qcow2_magic)))
        return error_set(r->err, -EINVAL, "disk %s: is not a qcow2 image; use format=raw if it is a raw one", r->path);
    if (be32toh(disk->version) != 2 && be32toh(disk->version) != 3)
        return bad(r, "version", be32toh(disk->version));
    bits = be32toh(disk->cluster_bits);
    if (bits < QCOW2_CLUSTER_BITS_MIN || bits > QCOW2_CLUSTER_BITS_MAX)
        return bad(r, "cluster bits", bits);
    if (r->file_bytes < 1ull << bits)
        return error_set(r->err, -EINVAL, "disk %s: the image was cut in its first cluster", r->path);
    r->header->cluster_bits = bits;
    r->bytes = (size_t)1 << bits;
    r->data = malloc(r->bytes);
    if (!r->data)
        return error_set(r->err, -ENOMEM, "disk %s: no memory", r->path);
    got = pread(fd, r->data, r->bytes, 0);
    if (got != (ssize_t)r->bytes)
        return error_set(r->err, got < 0 ? -errno : -EIO, "disk %s: cannot be read: %s", r->path, strerror(got < 0 ? errno : EIO));
    return 0;
}

static int read_fields(struct reading *r, const struct qcow2_disk_header *disk)
{
    struct qcow2_header *header = r->header;
    size_t end;
    int ret = 0;

    header->version = be32toh(disk->version);
    header->size_bytes = be64toh(disk->size);
    header->l1_offset = be64toh(disk->l1_table_offset);
    header->l1_entries = be32toh(disk->l1_size);
    header->reftable_offset = be64toh(disk->refcount_table_offset);
    header->reftable_clusters = be32toh(disk->refcount_table_clusters);
    header->snapshots = be32toh(disk->nb_snapshots);
    header->snapshots_offset = be64toh(disk->snapshots_offset);
    header->refcount_bits = 16;
    header->header_bytes = offsetof(struct qcow2_disk_header, incompatible_features);
    if (disk->crypt_method)
        return error_set(r->err, -ENOTSUP, "disk %s: the image is encrypted, which is not supported; decrypt it: qemu-img convert", r->path);
    if (header->version == 3)
        ret = read_version_3(r, disk);
    if (ret == 0)
        ret = read_backing(r, disk, &end);
    if (ret == 0)
        ret = read_extensions(r, end);
    return ret ? ret : check_sizes(r);
}

int qcow2_header_read(struct qcow2_header *header, int fd, uint64_t file_bytes, const char *path, struct error *err)
{
    struct reading r = {.path = path, .file_bytes = file_bytes, .header = header, .err = err};
    struct qcow2_disk_header disk = {0};
    int ret;

    memset(header, 0, sizeof(*header));
    ret = read_first_cluster(&r, fd, &disk);
    if (ret == 0) {
        memcpy(&disk, r.data, sizeof(disk)); /* one version of it: somebody may be writing */
        ret = be32toh(disk.cluster_bits) == header->cluster_bits ? read_fields(&r, &disk) : bad(&r, "cluster bits", be32toh(disk.cluster_bits));
    }
    free(r.data);
    if (ret < 0)
        qcow2_header_clear(header);
    return ret;
}

void qcow2_header_clear(struct qcow2_header *header)
{
    free(header->backing);
    free(header->backing_format);
    header->backing = header->backing_format = NULL;
}
