/*
 * virtio-blk: a disk (virtio 1.2, section 5.2) over a block back end.
 *
 * A chain becomes one `struct blk_request`, which lives until the chain is pushed; it may take several block requests (segments of a discard, the
 * flush after a write in write-through mode). The status is the last byte of the writable part, however the driver split its buffers.
 * Reads, writes and flushes never wait here: everything ends in block_done on the loop's thread.
 * Threading: with the device lock held.
 */
#include "device/virtio_blk.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "device/rate_gate.h"
#include "device/virtio.h"
#include "util/log.h"

#define QUEUE_SIZE 256u
#define SECTOR_BYTES 512u
#define SEGMENTS_MAX 16u               /* of a discard or write-zeroes request */
#define SEGMENT_SECTORS_MAX (1u << 21) /* 1 GiB each */
#define DISCARD_ALIGNMENT_SECTORS 8u

/* 5.2.3: feature bits. */
#define F_SEG_MAX 2
#define F_RO 5
#define F_BLK_SIZE 6
#define F_FLUSH 9
#define F_TOPOLOGY 10
#define F_CONFIG_WCE 11
#define F_MQ 12
#define F_DISCARD 13
#define F_WRITE_ZEROES 14

/* 5.2.6: requests. */
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };

struct blk_header {
    uint32_t type, reserved;
    uint64_t sector;
};
#define HEADER_BYTES ((uint64_t)sizeof(struct blk_header))

struct blk_segment {
    uint64_t sector;
    uint32_t num_sectors, flags;
};
#define SEGMENT_UNMAP 1u

/* 5.2.4; the fields up to write_zeroes_may_unmap are those of every 1.2 device. */
struct blk_config_space {
    uint64_t capacity; /* sectors of 512 bytes */
    uint32_t size_max, seg_max;
    struct {
        uint16_t cylinders;
        uint8_t heads, sectors;
    } geometry;
    uint32_t blk_size;
    struct {
        uint8_t physical_block_exp, alignment_offset;
        uint16_t min_io_size;
        uint32_t opt_io_size;
    } topology;
    uint8_t writeback;
    uint8_t unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_sector_alignment;
    uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
    uint8_t write_zeroes_may_unmap;
    uint8_t unused1[3];
} __attribute__((packed));

struct device {
    struct virtio virtio;
    struct block *block;
    char serial[VIRTIO_BLK_SERIAL_BYTES];
    unsigned queue_count;
    struct rate_gate gate;
    uint32_t waiting; /* queues with a request that the gate turned away */
    bool writeback; /* the guest's wish: false flushes after every write */
    bool unsafe;    /* ours: nothing is ever flushed */
};

struct blk_request {
    struct block_request block; /* first */
    struct device *disk;
    struct virtqueue_chain *chain;
    bool flush_after;
    unsigned segment, segment_count;
    struct blk_segment segments[SEGMENTS_MAX];
    struct iovec iov[]; /* the data */
};

static void end_chain(struct virtqueue_chain *chain, uint8_t status)
{
    virtqueue_write(chain, chain->out_bytes - 1, &status, 1);
    virtqueue_push(chain, chain->out_bytes, true);
}

static void end_request(struct blk_request *request, uint8_t status)
{
    end_chain(request->chain, status);
    free(request);
}

static void submit_segment(struct blk_request *request)
{
    const struct blk_segment *segment = &request->segments[request->segment];

    request->block.offset_bytes = segment->sector * SECTOR_BYTES;
    request->block.length_bytes = (uint64_t)segment->num_sectors * SECTOR_BYTES;
    request->block.may_unmap = segment->flags & SEGMENT_UNMAP;
    block_submit(request->disk->block, &request->block);
}

static void block_done(struct block_request *block, int result)
{
    struct blk_request *request = (struct blk_request *)block;

    if (result == 0 && ++request->segment < request->segment_count) {
        submit_segment(request);
    } else if (result == 0 && request->flush_after) {
        request->flush_after = false;
        request->block.op = BLOCK_FLUSH;
        block_submit(request->disk->block, &request->block);
    } else {
        end_request(request, result == 0 ? S_OK : S_IOERR);
    }
}

/* True when [sector, +length) is on the disk. */
static bool range_ok(const struct device *disk, uint64_t sector, uint64_t length_bytes)
{
    uint64_t size_bytes = block_size_bytes(disk->block);

    return length_bytes % SECTOR_BYTES == 0 && sector <= size_bytes / SECTOR_BYTES &&
           length_bytes <= size_bytes - sector * SECTOR_BYTES;
}

static struct blk_request *make_request(struct device *disk, struct virtqueue_chain *chain, enum block_op op, unsigned vectors)
{
    struct blk_request *request = malloc(sizeof(*request) + vectors * sizeof(struct iovec));

    if (!request)
        return NULL;
    request->block = (struct block_request){.op = op, .iov = request->iov, .done = block_done};
    request->disk = disk;
    request->chain = chain;
    request->flush_after = !disk->writeback && !disk->unsafe && op != BLOCK_READ && op != BLOCK_FLUSH;
    request->segment = request->segment_count = 0;
    return request;
}

static uint8_t start_transfer(struct device *disk, struct virtqueue_chain *chain, uint64_t sector, bool write)
{
    uint64_t length_bytes = write ? chain->in_bytes - HEADER_BYTES : chain->out_bytes - 1;
    struct blk_request *request;

    if (!range_ok(disk, sector, length_bytes) || (write && block_readonly(disk->block)))
        return S_IOERR;
    request = make_request(disk, chain, write ? BLOCK_WRITE : BLOCK_READ, write ? chain->in_count : chain->out_count);
    if (!request)
        return S_IOERR;
    request->block.offset_bytes = sector * SECTOR_BYTES;
    request->block.length_bytes = length_bytes;
    request->block.iov_count = virtqueue_slice(chain, !write, write ? HEADER_BYTES : 0, length_bytes, request->iov);
    block_submit(disk->block, &request->block);
    return S_OK;
}

static uint8_t start_flush(struct device *disk, struct virtqueue_chain *chain)
{
    struct blk_request *request;

    if (disk->unsafe) {
        end_chain(chain, S_OK);
        return S_OK;
    }
    request = make_request(disk, chain, BLOCK_FLUSH, 0);
    if (!request)
        return S_IOERR;
    block_submit(disk->block, &request->block);
    return S_OK;
}

/* 5.2.6.2: which bits of a segment's flags mean something. */
static uint8_t check_segment(const struct device *disk, const struct blk_segment *segment, enum block_op op)
{
    uint32_t known = op == BLOCK_WRITE_ZEROES ? SEGMENT_UNMAP : 0;

    if (segment->flags & ~known)
        return S_UNSUPP;
    if (segment->num_sectors > SEGMENT_SECTORS_MAX || !range_ok(disk, segment->sector, (uint64_t)segment->num_sectors * SECTOR_BYTES))
        return S_IOERR;
    return S_OK;
}

static uint8_t start_segments(struct device *disk, struct virtqueue_chain *chain, enum block_op op)
{
    unsigned feature = op == BLOCK_DISCARD ? F_DISCARD : F_WRITE_ZEROES;
    uint64_t length_bytes = chain->in_bytes - HEADER_BYTES;
    struct blk_request *request;
    uint8_t status = S_OK;

    if (!virtio_has_feature(&disk->virtio, feature) || (op == BLOCK_DISCARD && !block_can_discard(disk->block)))
        return S_UNSUPP;
    if (block_readonly(disk->block) || length_bytes == 0 || length_bytes % sizeof(request->segments[0]) ||
        length_bytes > sizeof(request->segments))
        return S_IOERR;
    request = make_request(disk, chain, op, 0);
    if (!request)
        return S_IOERR;
    request->segment_count = (unsigned)(length_bytes / sizeof(request->segments[0]));
    virtqueue_read(chain, HEADER_BYTES, request->segments, length_bytes);
    for (unsigned i = 0; i < request->segment_count && status == S_OK; i++)
        status = check_segment(disk, &request->segments[i], op);
    if (status == S_OK)
        submit_segment(request);
    else
        free(request);
    return status;
}

/* Starts a request. Anything but OK means that nothing was started and the status goes to the driver now. */
static uint8_t start_request(struct device *disk, struct virtqueue_chain *chain, const struct blk_header *header)
{
    switch (header->type) {
    case T_IN:
        return start_transfer(disk, chain, header->sector, false);
    case T_OUT:
        return start_transfer(disk, chain, header->sector, true);
    case T_FLUSH:
        return start_flush(disk, chain);
    case T_DISCARD:
        return start_segments(disk, chain, BLOCK_DISCARD);
    case T_WRITE_ZEROES:
        return start_segments(disk, chain, BLOCK_WRITE_ZEROES);
    default:
        return S_UNSUPP;
    }
}

static void take_chain(struct device *disk, struct virtqueue *queue, struct virtqueue_chain *chain)
{
    struct blk_header header;
    uint8_t status = S_IOERR;

    if (chain->out_bytes == 0) {
        virtqueue_push(chain, 0, true);
        virtqueue_fail(queue, "a request has no room for its status");
        return;
    }
    if (virtqueue_read(chain, 0, &header, sizeof(header)) == sizeof(header)) {
        if (header.type == T_GET_ID) {
            uint64_t room = chain->out_bytes - 1;

            virtqueue_write(chain, 0, disk->serial, room < sizeof(disk->serial) ? room : sizeof(disk->serial));
            end_chain(chain, S_OK);
            return;
        }
        status = start_request(disk, chain, &header);
    }
    if (status != S_OK)
        end_chain(chain, status);
}

/* What counts as bandwidth: the data, in either direction. */
static uint64_t transfer_bytes(const struct virtqueue_chain *chain)
{
    struct blk_header header;

    if (virtqueue_read(chain, 0, &header, sizeof(header)) != sizeof(header))
        return 0;
    if (header.type == T_OUT)
        return chain->in_bytes - HEADER_BYTES;
    return header.type == T_IN && chain->out_bytes ? chain->out_bytes - 1 : 0;
}

/* The queue's notifications stay off meanwhile. */
static void gate_opened(void *ctx)
{
    struct device *disk = ctx;
    uint32_t waiting = disk->waiting;

    disk->waiting = 0;
    for (; waiting; waiting &= waiting - 1)
        virtio_wake_queue(&disk->virtio, (unsigned)__builtin_ctz(waiting));
}

static void blk_notify(void *ctx, unsigned index)
{
    struct device *disk = ctx;
    struct virtqueue *queue = virtio_queue(&disk->virtio, index);

    virtqueue_set_notification(queue, false);
    for (unsigned i = 0; i < 2 * QUEUE_SIZE; i++) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);

        if (chain && !rate_gate_pass(&disk->gate, transfer_bytes(chain))) {
            virtqueue_unpop(chain);
            disk->waiting |= 1u << index;
            return;
        }
        if (chain)
            take_chain(disk, queue, chain);
        else if (!virtqueue_set_notification(queue, true))
            return;
    }
    /* A driver that never lets the queue run dry: others' turn. */
    virtio_wake_queue(&disk->virtio, index);
}

/* ---- configuration ---- */

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    const struct device *disk = ctx;
    const struct blk_config_space space = {
        .capacity = block_size_bytes(disk->block) / SECTOR_BYTES,
        .seg_max = QUEUE_SIZE - 2,
        .blk_size = SECTOR_BYTES,
        .topology = {.physical_block_exp = 3, .min_io_size = 8},
        .writeback = disk->writeback,
        .num_queues = (uint16_t)disk->queue_count,
        .max_discard_sectors = SEGMENT_SECTORS_MAX,
        .max_discard_seg = SEGMENTS_MAX,
        .discard_sector_alignment = DISCARD_ALIGNMENT_SECTORS,
        .max_write_zeroes_sectors = SEGMENT_SECTORS_MAX,
        .max_write_zeroes_seg = SEGMENTS_MAX,
        .write_zeroes_may_unmap = 1,
    };

    memcpy(data, (const uint8_t *)&space + offset, size_bytes);
}

static void config_write(void *ctx, unsigned offset, const void *data, unsigned size_bytes)
{
    struct device *disk = ctx;

    if (offset == offsetof(struct blk_config_space, writeback) && size_bytes == 1 &&
        virtio_has_feature(&disk->virtio, F_CONFIG_WCE))
        disk->writeback = *(const uint8_t *)data & 1;
}

/* 5.2.6.2: a driver that cannot flush gets a disk that needs no flushing. */
static void features_set(void *ctx, uint64_t features)
{
    struct device *disk = ctx;

    disk->writeback = features >> F_FLUSH & 1;
}

static void driver_reset(void *ctx)
{
    ((struct device *)ctx)->writeback = true;
}

static const struct virtio_device_ops blk_ops = {
    .name = "virtio-blk",
    .device_id = 2,
    .class_code = 0x018000,
    .config_bytes = sizeof(struct blk_config_space),
    .config_read = config_read,
    .config_write = config_write,
    .features_set = features_set,
    .queue_notify = blk_notify,
    .reset = driver_reset,
};

/* ---- the class ---- */

static uint64_t blk_features(const struct block *block, bool unsafe)
{
    uint64_t features = 1ull << F_SEG_MAX | 1ull << F_BLK_SIZE | 1ull << F_TOPOLOGY | 1ull << F_MQ;

    if (!unsafe)
        features |= 1ull << F_FLUSH | 1ull << F_CONFIG_WCE;
    if (block_readonly(block))
        return features | 1ull << F_RO;
    if (block_can_discard(block))
        features |= 1ull << F_DISCARD;
    return features | 1ull << F_WRITE_ZEROES;
}

static int blk_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_blk_config *blk_config = config;
    unsigned queues = blk_config->queues ? blk_config->queues : 1;
    struct virtio_config pci_config = {
        .features = blk_features(blk_config->block, blk_config->unsafe),
        .queue_count = queues < VIRTIO_BLK_QUEUES_MAX ? queues : VIRTIO_BLK_QUEUES_MAX,
        .queue_size = QUEUE_SIZE,
        .slot = blk_config->slot,
    };
    struct device *disk = calloc(1, sizeof(*disk));
    int ret;

    *out = NULL;
    if (!disk)
        return error_set(err, -ENOMEM, "virtio-blk: no memory");
    disk->block = blk_config->block;
    disk->queue_count = pci_config.queue_count;
    disk->writeback = true;
    disk->unsafe = blk_config->unsafe;
    if (blk_config->serial)
        memcpy(disk->serial, blk_config->serial, strnlen(blk_config->serial, sizeof(disk->serial)));
    ret = rate_gate_init(&disk->gate, host->loop, blk_config->limit, gate_opened, disk);
    if (ret < 0)
        error_set(err, ret, "virtio-blk: no memory");
    else
        ret = virtio_init(&disk->virtio, host, &blk_ops, disk, &pci_config, err);
    if (ret < 0) {
        rate_gate_fini(&disk->gate);
        free(disk);
        return ret;
    }
    *out = disk;
    return 0;
}

static void blk_reset(struct device *disk)
{
    virtio_reset(&disk->virtio);
}

static int blk_state(struct device *disk, struct state_io *io)
{
    bool writeback = disk->writeback;
    uint64_t size_bytes = block_size_bytes(disk->block);

    state_begin(io, "virtio-blk", 1);
    state_u64(io, &size_bytes);
    if (size_bytes != block_size_bytes(disk->block))
        state_fail(io, "the disk has another size than when this was saved");
    state_bool(io, &writeback);
    virtio_state(&disk->virtio, io);
    if (state_loading(io) && !state_failed(io))
        disk->writeback = writeback;
    return state_end(io);
}

static bool blk_quiesce(struct device *disk)
{
    return !virtio_in_use(&disk->virtio);
}

static void blk_destroy(struct device *disk)
{
    rate_gate_fini(&disk->gate);
    virtio_fini(&disk->virtio);
    free(disk);
}

void virtio_blk_exchange(struct device *disk, struct block *block)
{
    struct block_counters counters;

    block_get_counters(disk->block, &counters);
    block_set_counters(block, &counters); /* they are the disk's */
    disk->block = block;
}

void virtio_blk_set_block(struct device *disk, struct block *block)
{
    virtio_blk_exchange(disk, block);
    virtio_config_changed(&disk->virtio);
}

void virtio_blk_set_limit(struct device *disk, const struct bucket_config *bandwidth, const struct bucket_config *ops)
{
    rate_gate_set(&disk->gate, bandwidth, ops);
}

static void blk_counters(struct device *device, device_counter_fn *emit, void *ctx)
{
    struct block_counters c;
    block_get_counters(device->block, &c);
    emit(ctx, "read_count", c.reads);
    emit(ctx, "read_bytes", c.read_bytes);
    emit(ctx, "write_count", c.writes);
    emit(ctx, "write_bytes", c.write_bytes);
    emit(ctx, "flush_count", c.flushes);
    emit(ctx, "discard_count", c.discards);
    emit(ctx, "execute_fails", c.errors);
    emit(ctx, "rate_limiter_throttled_events", device->gate.turned_away);
}

const struct device_class virtio_blk_class = {
    .name = "virtio-blk",
    .help = "disk",
    .create = blk_create,
    .reset = blk_reset,
    .state = blk_state,
    .quiesce = blk_quiesce,
    .destroy = blk_destroy,
    .counters = blk_counters,
};
