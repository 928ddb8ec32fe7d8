/*
 * virtio-pmem (virtio 1.2, section 5.19): where the memory is, and flushes.
 *
 * What the guest stores is in the host's page cache at once, and survives the guest. A flush writes it to the host's disk, off the loop's thread, by the block layer:
 * fdatasync covers pages that were written through mappings. At most QUEUE_SIZE flushes are in flight.
 * Threading: with the device lock held.
 */
#include "device/virtio_pmem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/rate_gate.h"
#include "device/virtio.h"
#include "util/log.h"

#define QUEUE_SIZE 64u
#define REQUEST_FLUSH 0u
#define RESPONSE_OK 0u
#define RESPONSE_FAILED 1u

struct device {
    struct virtio virtio;
    struct block *block;
    uint64_t place[2]; /* 5.19.4: start and size, as the driver reads them */
    uint64_t flushes, failures;
    struct rate_gate gate;
};

static void gate_opened(void *ctx)
{
    virtio_wake_queue(&((struct device *)ctx)->virtio, 0);
}

struct flush {
    struct block_request block;
    struct device *pmem;
    struct virtqueue_chain *chain;
};

static void answer(struct device *pmem, struct virtqueue_chain *chain, uint32_t response)
{
    pmem->failures += response != RESPONSE_OK;
    virtqueue_push(chain, virtqueue_write(chain, 0, &response, sizeof response), true);
}

static void flush_done(struct block_request *request, int result)
{
    struct flush *flush = (struct flush *)request;
    answer(flush->pmem, flush->chain, result ? RESPONSE_FAILED : RESPONSE_OK);
    free(flush);
}

static void serve(struct device *pmem, struct virtqueue_chain *chain)
{
    uint32_t type;
    struct flush *flush = NULL;
    if (virtqueue_read(chain, 0, &type, sizeof type) == sizeof type && type == REQUEST_FLUSH)
        flush = calloc(1, sizeof *flush);
    else
        LOG_GUEST(LOG_WARNING, "virtio-pmem: a request that is no flush");
    if (!flush) {
        answer(pmem, chain, RESPONSE_FAILED);
        return;
    }
    pmem->flushes++;
    *flush = (struct flush){.block = {.op = BLOCK_FLUSH, .done = flush_done}, .pmem = pmem, .chain = chain};
    block_submit(pmem->block, &flush->block);
}

static void pmem_notify(void *ctx, unsigned index)
{
    struct device *pmem = ctx;
    struct virtqueue *queue = virtio_queue(&pmem->virtio, index);
    for (unsigned n = 0; n < QUEUE_SIZE; n++) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);
        if (chain && !rate_gate_pass(&pmem->gate, pmem->place[1])) {
            virtqueue_unpop(chain);
            return; /* gate_opened goes on */
        }
        if (chain)
            serve(pmem, chain);
        else if (!virtqueue_set_notification(queue, true))
            return;
    }
    virtio_wake_queue(&pmem->virtio, index);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    const struct device *pmem = ctx;
    memcpy(data, (const uint8_t *)pmem->place + offset, size_bytes);
}

static const struct virtio_device_ops pmem_ops = {
    .name = "virtio-pmem",
    .device_id = 27,
    .class_code = 0xFF0000,
    .config_bytes = sizeof((struct device *)0)->place,
    .config_read = config_read,
    .queue_notify = pmem_notify,
};

static int pmem_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_pmem_config *wanted = config;
    const struct virtio_config transport = {.queue_count = 1, .queue_size = QUEUE_SIZE, .slot = wanted->slot};
    struct device *pmem = calloc(1, sizeof *pmem);
    *out = NULL;
    if (!pmem)
        return error_set(err, -ENOMEM, "virtio-pmem: no memory");
    pmem->block = wanted->block;
    pmem->place[0] = wanted->start;
    pmem->place[1] = wanted->size_bytes;
    int ret = rate_gate_init(&pmem->gate, host->loop, wanted->limit, gate_opened, pmem);
    ret = ret < 0 ? error_set(err, ret, "virtio-pmem: no memory") : virtio_init(&pmem->virtio, host, &pmem_ops, pmem, &transport, err);
    if (ret < 0) {
        rate_gate_fini(&pmem->gate);
        free(pmem);
        return ret;
    }
    *out = pmem;
    return 0;
}

static void pmem_reset(struct device *pmem)
{
    virtio_reset(&pmem->virtio);
}

/* Where the memory is, is the machine's affair, but a guest that has mapped it cannot be told otherwise. */
static int pmem_state(struct device *pmem, struct state_io *io)
{
    uint64_t start = pmem->place[0], size_bytes = pmem->place[1];
    state_begin(io, "virtio-pmem", 1);
    state_u64(io, &start);
    state_u64(io, &size_bytes);
    if (start != pmem->place[0] || size_bytes != pmem->place[1])
        state_fail(io, "persistent memory is elsewhere, or of another size");
    virtio_state(&pmem->virtio, io);
    return state_end(io);
}

static bool pmem_quiesce(struct device *pmem)
{
    return block_in_flight(pmem->block) == 0;
}

static void pmem_destroy(struct device *pmem)
{
    virtio_fini(&pmem->virtio);
    rate_gate_fini(&pmem->gate);
    free(pmem);
}

void virtio_pmem_set_limit(struct device *pmem, const struct bucket_config *bandwidth, const struct bucket_config *ops)
{
    rate_gate_set(&pmem->gate, bandwidth, ops);
}

static void pmem_counters(struct device *pmem, device_counter_fn *emit, void *ctx)
{
    emit(ctx, "flush_count", pmem->flushes);
    emit(ctx, "event_fails", pmem->failures);
}

const struct device_class virtio_pmem_class = {
    .name = "virtio-pmem",
    .help = "a file as persistent memory",
    .create = pmem_create,
    .reset = pmem_reset,
    .state = pmem_state,
    .quiesce = pmem_quiesce,
    .destroy = pmem_destroy,
    .counters = pmem_counters,
};
