/*
 * The target of disks that move (migrate_disks.h): new files, filled before the machine runs.
 * Invariant: a file is removed by disks_in_close only if disks_in_make has made it.
 * Threading: one thread, before the sandbox is made.
 */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <zstd.h>

#include "machine/migrate_disks.h"

#define HEAD_BYTES 17u
#define SECTOR_BYTES 512u
#define NAME_BYTES 128u
#define PIECE_BYTES_MAX (512u << 10)

struct disk_in {
    unsigned index;
    uint64_t bytes;
    char *path;
    int fd;
};

struct disks_in {
    unsigned count;
    struct disk_in disk[CONFIG_DISKS_MAX];
    ZSTD_DCtx *context;
    uint8_t room[PIECE_BYTES_MAX];
};

/* ---- files ---- */

/* Like the file there, with nothing in it that could lead elsewhere, and "raw" for what is another format there. Foreign text. */
static void choose_name(const char *path, unsigned index, char name[NAME_BYTES])
{
    const char *base = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    size_t length = 0;
    for (; *base && length < NAME_BYTES - 16; base++)
        if (isalnum((unsigned char)*base) || strchr("-_+", *base) || (*base == '.' && length))
            name[length++] = *base;
    name[length] = '\0';
    if (!length)
        snprintf(name, NAME_BYTES, "disk%u.raw", index);
    else if (length > 6 && strcmp(name + length - 6, ".qcow2") == 0)
        strcpy(name + length - 6, ".raw");
}

static bool is_ours(const struct disks_in *in, const char *path)
{
    for (unsigned i = 0; i < in->count; i++)
        if (strcmp(in->disk[i].path, path) == 0)
            return true;
    return false;
}

static int make_file(struct disks_in *in, const struct migrate_hello_disk *wanted, const char *directory, const char *like, struct error *err)
{
    char name[NAME_BYTES], *path = NULL;
    choose_name(like, wanted->index, name);
    if (asprintf(&path, "%s/%s", directory, name) < 0)
        return error_set(err, -ENOMEM, "out of memory");
    if (is_ours(in, path)) { /* two of one name */
        free(path);
        if (asprintf(&path, "%s/%u-%s", directory, wanted->index, name) < 0)
            return error_set(err, -ENOMEM, "out of memory");
    }
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600), r = 0;
    if (fd < 0) {
        r = errno == EEXIST ? error_set(err, -EEXIST, "disk %s: it is there already, and is not overwritten; move it away, or give another --disk-dir", path)
                            : error_set(err, -errno, "disk %s: cannot be made: %s", path, strerror(errno));
        free(path);
        return r;
    }
    in->disk[in->count++] = (struct disk_in){wanted->index, wanted->bytes, path, fd};
    return ftruncate(fd, (off_t)wanted->bytes) < 0 ? error_set(err, -errno, "disk %s: cannot have %llu bytes: %s", path, (unsigned long long)wanted->bytes, strerror(errno)) : 0;
}

/* Texts of the configuration are replaced. */
static int use_file(const struct disk_in *disk, struct disk_config *config)
{
    char *path = strdup(disk->path), *format = strdup("raw");
    if (!path || !format) {
        free(path);
        free(format);
        return -ENOMEM;
    }
    free(config->path);
    free(config->format);
    free(config->origin);
    config->path = path;
    config->format = format;
    config->origin = NULL;
    config->backing = BLOCK_BACKING_NONE;
    config->fresh = true;
    return 0;
}

int disks_in_make(struct disks_in **made, const struct migrate_hello *hello, const char *directory, struct machine_config *config, struct error *err)
{
    struct disks_in *in = calloc(1, sizeof *in);
    char *whole = realpath(directory, NULL);
    int r = 0;
    if (!whole)
        r = error_set(err, -errno, "the directory for disks, %s: %s", directory, strerror(errno));
    else if (!in || !(in->context = ZSTD_createDCtx()))
        r = error_set(err, -ENOMEM, "out of memory");
    for (unsigned i = 0; r == 0 && i < hello->disk_count; i++) {
        const struct migrate_hello_disk *wanted = &hello->disk[i];
        if (wanted->index >= config->disk_count || config->disk[wanted->index].readonly || config->disk[wanted->index].fresh || wanted->bytes % SECTOR_BYTES || wanted->bytes > INT64_MAX)
            r = error_set(err, -EPROTO, "a disk comes that the machine does not have");
        if (r == 0)
            r = make_file(in, wanted, whole, config->disk[wanted->index].path, err);
        if (r == 0 && use_file(&in->disk[i], &config->disk[wanted->index]))
            r = error_set(err, -ENOMEM, "out of memory");
    }
    free(whole);
    if (r)
        disks_in_close(in, false);
    else
        *made = in;
    return r;
}

void disks_in_close(struct disks_in *in, bool keep)
{
    if (!in)
        return;
    for (unsigned i = 0; i < in->count; i++) {
        if (!keep)
            unlink(in->disk[i].path);
        close(in->disk[i].fd);
        free(in->disk[i].path);
    }
    ZSTD_freeDCtx(in->context);
    free(in);
}

/* ---- bytes ---- */

static int write_all(const struct disk_in *disk, const uint8_t *data, uint64_t length, uint64_t offset, struct error *err)
{
    for (uint64_t done = 0; done < length;) {
        ssize_t n = pwrite(disk->fd, data + done, length - done, (off_t)(offset + done));
        if (n < 0 && errno != EINTR)
            return error_set(err, -errno, "disk %s: cannot be written: %s", disk->path, strerror(errno));
        done += n > 0 ? (uint64_t)n : 0;
    }
    return 0;
}

static int write_zeroes(struct disks_in *in, const struct disk_in *disk, uint64_t length, uint64_t offset, struct error *err)
{
    if (fallocate(disk->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length) == 0)
        return 0;
    memset(in->room, 0, length);
    return write_all(disk, in->room, length, offset, err);
}

int disks_in_take(struct disks_in *in, const uint8_t *body, size_t size_bytes, struct error *err)
{
    const struct disk_in *disk = NULL;
    uint64_t index = size_bytes >= HEAD_BYTES ? stream_number(body, 4) : UINT64_MAX;
    for (unsigned i = 0; in && i < in->count; i++)
        if (in->disk[i].index == index)
            disk = &in->disk[i];
    if (!disk)
        return error_set(err, -EPROTO, "a piece of a disk came that the machine does not have");
    uint64_t offset = stream_number(body + 4, 8), length = stream_number(body + 12, 4);
    const uint8_t *data = body + HEAD_BYTES;
    size_t data_bytes = size_bytes - HEAD_BYTES;
    unsigned kind = body[16];
    if (!length || length > PIECE_BYTES_MAX || length % SECTOR_BYTES || offset % SECTOR_BYTES || offset > disk->bytes || length > disk->bytes - offset || kind > MIGRATE_DISK_ZSTD ||
        (kind == MIGRATE_DISK_PLAIN && data_bytes != length) || (kind == MIGRATE_DISK_ZERO && data_bytes))
        return error_set(err, -EPROTO, "a piece of a disk is not as it should be");
    if (kind == MIGRATE_DISK_ZERO)
        return write_zeroes(in, disk, length, offset, err);
    if (kind == MIGRATE_DISK_ZSTD) {
        size_t n = ZSTD_decompressDCtx(in->context, in->room, length, data, data_bytes);
        if (ZSTD_isError(n) || n != length)
            return error_set(err, -EPROTO, "a compressed piece of a disk is damaged");
        data = in->room;
    }
    return write_all(disk, data, length, offset, err);
}

int disks_in_settle(struct disks_in *in, struct error *err)
{
    for (unsigned i = 0; in && i < in->count; i++)
        if (fsync(in->disk[i].fd) < 0)
            return error_set(err, -errno, "disk %s: cannot be written: %s", in->disk[i].path, strerror(errno));
    return 0;
}
