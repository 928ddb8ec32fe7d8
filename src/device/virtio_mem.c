/*
 * virtio-mem (virtio 1.2, section 5.15): blocks of PhysMap's pluggable memory.
 *
 * Plugging is done at once. Unplugged memory is nothing, so engines must not know its address any more: an unplug request waits in `waiting` until the machine stands still
 * (virtio_mem_unplug), and requests behind it wait in the ring. A guest never has more than it was asked to have.
 * Threading: with the device lock held.
 */
#include "device/virtio_mem.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio.h"
#include "util/log.h"

#define QUEUE_SIZE 64u
#define ROUND_CHAINS 64u
#define F_UNPLUGGED_INACCESSIBLE 1

enum { REQUEST_PLUG, REQUEST_UNPLUG, REQUEST_UNPLUG_ALL, REQUEST_STATE };
enum { ANSWER_ACK, ANSWER_NACK, ANSWER_BUSY, ANSWER_ERROR };
enum { STATE_PLUGGED, STATE_UNPLUGGED, STATE_MIXED };

/* 5.15.4 */
struct mem_config {
    uint64_t block_size;
    uint16_t node_id;
    uint8_t padding[6];
    uint64_t address, region_size, usable_region_size, plugged_size, requested_size;
};

/* 5.15.6 */
struct request {
    uint16_t type, padding[3];
    uint64_t address;
    uint16_t blocks, padding2[3];
};

struct answer {
    uint16_t type, padding[3];
    uint16_t state;
} __attribute__((packed));

struct device {
    struct virtio virtio;
    struct physmap *memory;
    struct virtio_mem_config config;
    struct mem_config registers;
    uint8_t *plugged; /* by block */
    uint64_t blocks;
    struct virtqueue_chain *waiting; /* an unplug request; NULL: none */
    struct request request;          /* its */
    uint64_t served[REQUEST_STATE + 1], failures, plugged_bytes, unplugged_bytes;
};

static uint64_t block_of(const struct device *mem, const struct request *request)
{
    return (request->address - mem->config.start) / mem->config.block_bytes;
}

/* Inside the region, and aligned. */
static bool range_ok(const struct device *mem, const struct request *request)
{
    uint64_t from = request->address - mem->config.start;
    return request->blocks && request->address >= mem->config.start && from < mem->config.region_bytes && from % mem->config.block_bytes == 0 &&
           request->blocks <= mem->blocks - from / mem->config.block_bytes;
}

static uint64_t plugged_in(const struct device *mem, const struct request *request)
{
    uint64_t first = block_of(mem, request), count = 0;
    for (uint64_t n = first; n < first + request->blocks; n++)
        count += mem->plugged[n];
    return count;
}

/* Blocks [first, +count), which are all the other way. */
static int change(struct device *mem, uint64_t first, uint64_t count, bool plugged)
{
    uint64_t bytes = mem->config.block_bytes;
    int ret = physmap_plug(mem->memory, mem->config.start + first * bytes, count * bytes, plugged);
    if (ret < 0)
        return ret;
    memset(mem->plugged + first, plugged, count);
    *(plugged ? &mem->plugged_bytes : &mem->unplugged_bytes) += count * bytes;
    mem->registers.plugged_size += plugged ? count * bytes : -(count * bytes);
    return 0;
}

/* Every block of it; also when some are unplugged already. */
static int unplug_all(struct device *mem)
{
    int ret = 0;
    for (uint64_t n = 0; n < mem->blocks && ret == 0; n++)
        if (mem->plugged[n])
            ret = change(mem, n, 1, false);
    return ret;
}

static void reply(struct virtqueue_chain *chain, unsigned type, unsigned state)
{
    const struct answer answer = {.type = (uint16_t)type, .state = (uint16_t)state};
    virtqueue_push(chain, virtqueue_write(chain, 0, &answer, sizeof answer), true);
}

/* ---- requests ---- */

static unsigned plug(struct device *mem, const struct request *request)
{
    if (!range_ok(mem, request) || plugged_in(mem, request))
        return ANSWER_ERROR;
    if (request->blocks * mem->config.block_bytes + mem->registers.plugged_size > mem->registers.requested_size)
        return ANSWER_NACK;
    return change(mem, block_of(mem, request), request->blocks, true) ? ANSWER_BUSY : ANSWER_ACK;
}

static unsigned state_of(const struct device *mem, const struct request *request)
{
    uint64_t plugged = plugged_in(mem, request);
    return plugged == request->blocks ? STATE_PLUGGED : plugged ? STATE_MIXED : STATE_UNPLUGGED;
}

static bool must_wait(const struct device *mem, const struct request *request)
{
    if (request->type == REQUEST_UNPLUG_ALL)
        return mem->registers.plugged_size != 0;
    return request->type == REQUEST_UNPLUG && range_ok(mem, request) && plugged_in(mem, request) == request->blocks;
}

static void serve(struct device *mem, struct virtqueue_chain *chain)
{
    struct request request = {.type = UINT16_MAX};
    unsigned answer = ANSWER_ERROR, state = 0;
    uint64_t size = virtqueue_read(chain, 0, &request, sizeof request);
    if (size < sizeof request)
        request = (struct request){.type = size >= sizeof request.type && request.type == REQUEST_UNPLUG_ALL ? REQUEST_UNPLUG_ALL : UINT16_MAX};
    if (request.type <= REQUEST_STATE)
        mem->served[request.type]++;
    if (must_wait(mem, &request)) {
        mem->waiting = chain;
        mem->request = request;
        mem->config.unplug(mem->config.ctx);
        return;
    }
    if (request.type == REQUEST_PLUG)
        answer = plug(mem, &request);
    else if (request.type == REQUEST_UNPLUG_ALL)
        answer = ANSWER_ACK; /* nothing is plugged */
    else if (request.type == REQUEST_STATE && range_ok(mem, &request)) {
        answer = ANSWER_ACK;
        state = state_of(mem, &request);
    }
    mem->failures += answer != ANSWER_ACK;
    if (answer == ANSWER_ERROR)
        LOG_GUEST(LOG_WARNING, "virtio-mem: a wrong request, type %u", request.type);
    reply(chain, answer, state);
}

bool virtio_mem_unplug(struct device *mem)
{
    struct virtqueue_chain *chain = mem->waiting;
    int ret;
    if (!chain)
        return false;
    mem->waiting = NULL;
    if (mem->request.type == REQUEST_UNPLUG_ALL)
        ret = unplug_all(mem);
    else
        ret = change(mem, block_of(mem, &mem->request), mem->request.blocks, false);
    reply(chain, ret ? ANSWER_BUSY : ANSWER_ACK, 0);
    virtio_wake_queue(&mem->virtio, 0);
    return true;
}

static void mem_notify(void *ctx, unsigned index)
{
    struct device *mem = ctx;
    struct virtqueue *queue = virtio_queue(&mem->virtio, index);
    for (unsigned n = 0; n < ROUND_CHAINS && !mem->waiting; n++) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);
        if (chain)
            serve(mem, chain);
        else if (!virtqueue_set_notification(queue, true))
            return;
    }
    if (!mem->waiting)
        virtio_wake_queue(&mem->virtio, index);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    memcpy(data, (const uint8_t *)&((struct device *)ctx)->registers + offset, size_bytes);
}

/* Plugged memory stays; the next driver finds out by itself. */
static void driver_reset(void *ctx)
{
    struct device *mem = ctx;
    if (mem->waiting)
        virtqueue_push(mem->waiting, 0, false); /* of a queue that is gone: only freed */
    mem->waiting = NULL;
}

static const struct virtio_device_ops mem_ops = {
    .name = "virtio-mem",
    .device_id = 24,
    .class_code = 0xFF0000,
    .config_bytes = sizeof(struct mem_config),
    .config_read = config_read,
    .queue_notify = mem_notify,
    .reset = driver_reset,
};

/* ---- our side ---- */

void virtio_mem_status(const struct device *mem, struct virtio_mem_status *status)
{
    *status = (struct virtio_mem_status){.plugged_bytes = mem->registers.plugged_size, .requested_bytes = mem->registers.requested_size};
}

void virtio_mem_request(struct device *mem, uint64_t requested_bytes)
{
    mem->registers.requested_size = requested_bytes;
    virtio_config_changed(&mem->virtio);
}

/* ---- the class ---- */

static void mem_destroy(struct device *mem)
{
    driver_reset(mem);
    virtio_fini(&mem->virtio);
    free(mem->plugged);
    free(mem);
}

static int mem_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_mem_config *wanted = config;
    const struct virtio_config transport = {.features = 1ull << F_UNPLUGGED_INACCESSIBLE, .queue_count = 1, .queue_size = QUEUE_SIZE, .slot = wanted->slot};
    struct device *mem = calloc(1, sizeof *mem);
    *out = NULL;
    if (!mem)
        return error_set(err, -ENOMEM, "virtio-mem: no memory");
    mem->memory = host->memory;
    mem->config = *wanted;
    mem->blocks = wanted->region_bytes / wanted->block_bytes;
    mem->plugged = calloc(mem->blocks, 1);
    mem->registers = (struct mem_config){
        .block_size = wanted->block_bytes, .address = wanted->start, .region_size = wanted->region_bytes, .usable_region_size = wanted->region_bytes};
    int ret = mem->plugged ? virtio_init(&mem->virtio, host, &mem_ops, mem, &transport, err) : error_set(err, -ENOMEM, "virtio-mem: no memory");
    if (ret < 0) {
        mem_destroy(mem);
        return ret;
    }
    *out = mem;
    return 0;
}

/* The machine's reset, with no vCPU running: a fresh machine has nothing plugged. */
static void mem_reset(struct device *mem)
{
    virtio_reset(&mem->virtio);
    (void)unplug_all(mem);
}

static int mem_state(struct device *mem, struct state_io *io)
{
    uint64_t requested = mem->registers.requested_size, size = mem->config.block_bytes;
    state_begin(io, "virtio-mem", 1);
    if (mem->waiting && !state_loading(io)) { /* back into the ring, to be found there again, here and elsewhere */
        virtqueue_unpop(mem->waiting);
        mem->waiting = NULL;
        virtio_wake_queue(&mem->virtio, 0);
    }
    virtio_state(&mem->virtio, io);
    state_u64(io, &requested);
    state_u64(io, &size);
    if (size != mem->config.block_bytes || requested > mem->config.region_bytes || requested % size)
        state_fail(io, "pluggable memory of another size");
    if (state_loading(io) && unplug_all(mem))
        state_fail(io, "memory that cannot be unplugged");
    for (uint64_t n = 0; n < mem->blocks; n++) {
        bool plugged = mem->plugged[n];
        state_bool(io, &plugged);
        if (state_loading(io) && !state_failed(io) && plugged && change(mem, n, 1, true))
            state_fail(io, "memory that cannot be plugged");
    }
    if (state_loading(io) && !state_failed(io))
        mem->registers.requested_size = requested;
    return state_end(io);
}

static void mem_counters(struct device *mem, device_counter_fn *emit, void *ctx)
{
    emit(ctx, "plug_count", mem->served[REQUEST_PLUG]);
    emit(ctx, "plug_bytes", mem->plugged_bytes);
    emit(ctx, "unplug_count", mem->served[REQUEST_UNPLUG]);
    emit(ctx, "unplug_all_count", mem->served[REQUEST_UNPLUG_ALL]);
    emit(ctx, "unplug_bytes", mem->unplugged_bytes);
    emit(ctx, "state_count", mem->served[REQUEST_STATE]);
    emit(ctx, "queue_event_fails", mem->failures);
}

const struct device_class virtio_mem_class = {
    .name = "virtio-mem",
    .help = "memory that is plugged while the guest runs",
    .create = mem_create,
    .reset = mem_reset,
    .state = mem_state,
    .destroy = mem_destroy,
    .counters = mem_counters,
};
