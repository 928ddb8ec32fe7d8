/*
 * The source of disks that move (migrate_disks.h). Bytes are read as the guest would read them, through the loop, so that formats and overlays do not matter.
 * Threading: the caller's thread; requests and notes of what was written are the loop's, with the device lock.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <zstd.h>

#include "machine/migrate_disks.h"

#define PIECE_BYTES (512u << 10)
#define HEAD_BYTES 17u

_Static_assert(HEAD_BYTES + PIECE_BYTES <= STREAM_BODY_BYTES_MAX, "a piece is one message");
_Static_assert(PIECE_BYTES % BLOCK_WRITTEN_BYTES == 0, "whole parts");

struct disk_out {
    unsigned index;
    struct block *block;
    int fd;          /* of a raw one, for its holes; -1 */
    uint64_t *known; /* a bit for each part that was sent: what is zero and was not need not be */
};

struct disks_out {
    struct machine *machine;
    unsigned count;
    struct disk_out disk[CONFIG_DISKS_MAX];
    ZSTD_CCtx *context;
    /* One read at a time. */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct block *from;
    struct block_request request;
    struct iovec iov;
    bool done;
    int result;
    uint8_t data[PIECE_BYTES], packed[PIECE_BYTES];
};

/* ---- reading ---- */

static void read_done(struct block_request *request, int result)
{
    struct disks_out *out = request->user;
    pthread_mutex_lock(&out->lock);
    out->done = true;
    out->result = result;
    pthread_cond_signal(&out->changed);
    pthread_mutex_unlock(&out->lock);
}

static void read_begin(void *ctx)
{
    struct disks_out *out = ctx;
    block_submit(out->from, &out->request);
}

static int read_piece(struct disks_out *out, const struct disk_out *disk, uint64_t offset, uint64_t length, struct error *err)
{
    out->from = disk->block;
    out->iov = (struct iovec){.iov_base = out->data, .iov_len = length};
    out->request = (struct block_request){.op = BLOCK_READ, .offset_bytes = offset, .length_bytes = length, .iov = &out->iov, .iov_count = 1, .done = read_done, .user = out};
    out->done = false;
    int r = loop_post(out->machine->loop, read_begin, out);
    pthread_mutex_lock(&out->lock);
    while (r == 0 && !out->done)
        pthread_cond_wait(&out->changed, &out->lock);
    r = r ? r : out->result;
    pthread_mutex_unlock(&out->lock);
    return r ? error_set(err, r, "disk %s: it cannot be read at %llu: %s", out->machine->config->disk[disk->index].path, (unsigned long long)offset, strerror(-r)) : 0;
}

/* ---- sending ---- */

static bool is_zero(const uint8_t *data, uint64_t length)
{
    return data[0] == 0 && memcmp(data, data + 1, length - 1) == 0;
}

static int put(struct disks_out *out, const struct disks_pass *pass, const struct disk_out *disk, uint64_t offset, const uint8_t *data, uint64_t length, bool zero, struct error *err)
{
    uint8_t head[HEAD_BYTES];
    size_t n = !zero && pass->zstd_level ? ZSTD_compressCCtx(out->context, out->packed, length - length / 16, data, length, pass->zstd_level) : 0;
    bool packed = n && !ZSTD_isError(n);
    stream_put_number(head, disk->index, 4);
    stream_put_number(head + 4, offset, 8);
    stream_put_number(head + 12, length, 4);
    head[16] = zero ? MIGRATE_DISK_ZERO : packed ? MIGRATE_DISK_ZSTD : MIGRATE_DISK_PLAIN;
    return stream_put(pass->stream, MIGRATE_DISK, head, sizeof head, packed ? out->packed : data, zero ? 0 : packed ? n : length, err);
}

/* What was read, in runs of parts that are zero or not. */
static int put_piece(struct disks_out *out, const struct disks_pass *pass, const struct disk_out *disk, uint64_t offset, uint64_t length, struct error *err)
{
    int r = 0;
    for (uint64_t at = 0, end; r == 0 && at < length; at = end) {
        bool zero = false, send = false;
        for (end = at; end < length;) {
            uint64_t bytes = length - end < BLOCK_WRITTEN_BYTES ? length - end : BLOCK_WRITTEN_BYTES, part = (offset + end) / BLOCK_WRITTEN_BYTES;
            bool this_zero = is_zero(out->data + end, bytes), known = disk->known[part / 64] >> part % 64 & 1;
            if (end > at && (this_zero != zero || (!this_zero || known) != send))
                break;
            zero = this_zero;
            send = !zero || known;
            disk->known[part / 64] |= (uint64_t)send << part % 64;
            end += bytes;
        }
        if (send)
            r = put(out, pass, disk, offset + at, out->data + at, end - at, zero, err);
    }
    return r;
}

/* A raw file's holes are zero, and so is what was never sent there. */
static bool is_hole(const struct disk_out *disk, uint64_t offset, uint64_t length)
{
    off_t data = disk->fd >= 0 ? lseek(disk->fd, (off_t)offset, SEEK_DATA) : -1;
    if (disk->fd < 0 || (data < 0 && errno != ENXIO) || (data >= 0 && (uint64_t)data < offset + length))
        return false;
    for (uint64_t part = offset / BLOCK_WRITTEN_BYTES; part < (offset + length + BLOCK_WRITTEN_BYTES - 1) / BLOCK_WRITTEN_BYTES; part++)
        if (disk->known[part / 64] >> part % 64 & 1)
            return false;
    return true;
}

static bool take(struct disks_out *out, const struct disk_out *disk, uint64_t *offset, uint64_t *length)
{
    pthread_mutex_lock(&out->machine->device_lock);
    bool some = block_take_written(disk->block, offset, length, PIECE_BYTES);
    pthread_mutex_unlock(&out->machine->device_lock);
    return some;
}

int disks_out_send(struct disks_out *out, const struct disks_pass *pass, struct error *err)
{
    int r = 0;
    for (unsigned i = 0; r == 0 && i < out->count; i++) {
        const struct disk_out *disk = &out->disk[i];
        for (uint64_t offset = 0, length; r == 0 && take(out, disk, &offset, &length); offset += length) {
            bool hole = is_hole(disk, offset, length);
            r = hole ? 0 : read_piece(out, disk, offset, length, err);
            if (r == 0 && !hole)
                r = put_piece(out, pass, disk, offset, length, err);
            if (r == 0)
                r = pass->sent(pass->ctx, err);
        }
    }
    return r ? r : stream_flush(pass->stream, err);
}

uint64_t disks_out_left(const struct disks_out *out)
{
    uint64_t left = 0;
    for (unsigned i = 0; i < out->count; i++)
        left += block_written_bytes(out->disk[i].block);
    return left;
}

/* ---- beginning and end ---- */

static int add_disk(struct disks_out *out, unsigned index, struct migrate_hello *hello, struct error *err)
{
    struct block *block = out->machine->disk[index].block;
    uint64_t bytes = block_size_bytes(block);
    struct disk_out *disk = &out->disk[out->count];
    *disk = (struct disk_out){.index = index, .block = block, .fd = strcmp(block_format(block), "raw") == 0 ? block_dup(block) : -1};
    disk->known = calloc(bytes / BLOCK_WRITTEN_BYTES / 64 + 1, sizeof *disk->known);
    out->count++;
    if (!disk->known || block_track_writes(block, true))
        return error_set(err, -ENOMEM, "out of memory");
    hello->disk[hello->disk_count++] = (struct migrate_hello_disk){index, bytes};
    return 0;
}

int disks_out_create(struct disks_out **made, struct machine *machine, struct migrate_hello *hello, struct error *err)
{
    struct disks_out *out = calloc(1, sizeof *out);
    if (!out)
        return error_set(err, -ENOMEM, "out of memory");
    out->machine = machine;
    out->context = ZSTD_createCCtx();
    pthread_mutex_init(&out->lock, NULL);
    pthread_cond_init(&out->changed, NULL);
    pthread_mutex_lock(&machine->device_lock);
    machine->disks_leaving = true;
    int r = out->context ? 0 : error_set(err, -ENOMEM, "out of memory");
    for (unsigned i = 0; r == 0 && i < machine->config->disk_count; i++)
        if (machine->disk[i].block && !block_readonly(machine->disk[i].block))
            r = add_disk(out, i, hello, err);
    pthread_mutex_unlock(&machine->device_lock);
    if (r)
        disks_out_destroy(out);
    else
        *made = out;
    return r;
}

void disks_out_destroy(struct disks_out *out)
{
    if (!out)
        return;
    pthread_mutex_lock(&out->machine->device_lock);
    out->machine->disks_leaving = false;
    for (unsigned i = 0; i < out->count; i++)
        (void)!block_track_writes(out->disk[i].block, false);
    pthread_mutex_unlock(&out->machine->device_lock);
    for (unsigned i = 0; i < out->count; i++) {
        if (out->disk[i].fd >= 0)
            close(out->disk[i].fd);
        free(out->disk[i].known);
    }
    ZSTD_freeCCtx(out->context);
    pthread_cond_destroy(&out->changed);
    pthread_mutex_destroy(&out->lock);
    free(out);
}
