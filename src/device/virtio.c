/*
 * The device status machine, features and queues of a virtio device (virtio 1.2, sections 2 and 3), whatever the transport.
 *
 * A reset is seen as complete (status 0) only when no chain is in flight any more, so that a driver never finds a device writing into memory
 * that it has freed (2.4.1): `draining_status` is what it reads until then.
 * Threading: with the device lock held. virtio_wake_queue from any thread: it touches `notified` and the event only.
 */
#include "device/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "device/virtio_priv.h"
#include "util/log.h"

#define STATUS_OF_DRIVER (STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED)

/* 6: features of the transport and the queues. */
#define F_INDIRECT_DESC 28
#define F_EVENT_IDX 29
#define F_VERSION_1 32
#define F_RING_RESET 40
#define TRANSPORT_FEATURES (1ull << F_INDIRECT_DESC | 1ull << F_EVENT_IDX | 1ull << F_VERSION_1 | 1ull << F_RING_RESET)

/* ---- interrupts ---- */

static void queue_interrupt(void *ctx, unsigned index)
{
    struct virtio *virtio = ctx;

    virtio->transport->interrupt(virtio, ISR_QUEUE, index);
}

void virtio_config_changed(struct virtio *virtio)
{
    virtio->generation++;
    if (virtio->status & STATUS_DRIVER_OK)
        virtio->transport->interrupt(virtio, ISR_CONFIG, QUEUE_NONE);
}

void virtio_needs_reset(struct virtio *virtio, const char *reason)
{
    if (virtio->status & STATUS_NEEDS_RESET)
        return;
    LOG_GUEST(LOG_WARNING, "%s: stopped until the guest's driver resets it: %s", virtio->ops->name, reason);
    virtio->status |= STATUS_NEEDS_RESET;
    virtio_config_changed(virtio);
}

static void queue_broken(void *ctx, unsigned index, const char *reason)
{
    virtio_needs_reset(ctx, reason);
}

/* ---- queues ---- */

bool virtio_ready(const struct virtio *virtio)
{
    return (virtio->status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET)) == STATUS_DRIVER_OK && virtio->transport->bus_master(virtio);
}

void virtio_wake_queue(struct virtio *virtio, unsigned index)
{
    atomic_store_explicit(&virtio->queue[index].notified, true, memory_order_release);
    loop_event_raise(virtio->wake);
}

void virtio_notify(struct virtio *virtio, uint64_t index)
{
    if (index >= virtio->queue_count)
        return;
    if (virtio->ops->queue_kick)
        virtio->ops->queue_kick(virtio->device, (unsigned)index);
    else
        virtio_wake_queue(virtio, (unsigned)index);
}

struct virtio_doorbell {
    struct virtio *virtio;
    unsigned index;
    int fd;
    struct loop_fd *source;
};

static void serve_queues(void *ctx);

static void doorbell_rung(void *ctx, unsigned events)
{
    struct virtio_doorbell *doorbell = ctx;
    uint64_t count;

    if (read(doorbell->fd, &count, sizeof(count)) < 0)
        return;
    atomic_store_explicit(&doorbell->virtio->queue[doorbell->index].notified, true, memory_order_release);
    serve_queues(doorbell->virtio);
}

/* Devices with threads of their own want the notification on the vCPU's. */
int virtio_doorbell_fd(struct virtio *virtio, unsigned index)
{
    if (virtio->ops->queue_kick || index >= virtio->queue_count)
        return -1;
    if (!virtio->doorbell)
        virtio->doorbell = calloc(virtio->queue_count, sizeof(*virtio->doorbell));
    if (!virtio->doorbell)
        return -1;
    struct virtio_doorbell *doorbell = &virtio->doorbell[index];
    if (doorbell->source)
        return doorbell->fd;
    *doorbell = (struct virtio_doorbell){.virtio = virtio, .index = index, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (doorbell->fd >= 0 && loop_fd_add(virtio->host->loop, doorbell->fd, LOOP_READ, doorbell_rung, doorbell, &doorbell->source)) {
        close(doorbell->fd);
        doorbell->source = NULL;
        return -1;
    }
    return doorbell->fd;
}

static void doorbells_close(struct virtio *virtio)
{
    for (unsigned i = 0; virtio->doorbell && i < virtio->queue_count; i++) {
        if (!virtio->doorbell[i].source)
            continue;
        loop_fd_remove(virtio->doorbell[i].source);
        close(virtio->doorbell[i].fd);
    }
    free(virtio->doorbell);
}

void virtio_wake_all(struct virtio *virtio)
{
    for (unsigned i = 0; i < virtio->queue_count; i++)
        virtio_wake_queue(virtio, i);
}

static void serve_queues(void *ctx)
{
    struct virtio *virtio = ctx;

    for (unsigned i = 0; i < virtio->queue_count; i++) {
        struct virtio_queue_registers *queue = &virtio->queue[i];

        if (!atomic_exchange_explicit(&queue->notified, false, memory_order_acq_rel))
            continue;
        if (queue->enabled && virtio_ready(virtio))
            virtio->ops->queue_notify(virtio->device, i);
    }
}

struct virtio_queue_registers *virtio_queue_selected(struct virtio *virtio)
{
    return virtio->queue_select < virtio->queue_count ? &virtio->queue[virtio->queue_select] : NULL;
}

void virtio_queue_size_write(struct virtio *virtio, struct virtio_queue_registers *queue, uint64_t value)
{
    if (!queue->enabled && value && value <= virtio->queue_size_max && !(value & (value - 1)))
        queue->size = (uint16_t)value;
}

void virtio_queue_address_write(struct virtio_queue_registers *queue, uint64_t *address, unsigned shift, unsigned size_bytes, uint64_t value)
{
    uint64_t mask = (size_bytes == 8 ? ~0ull : (1ull << 8 * size_bytes) - 1) << 8 * shift;

    if (!queue->enabled)
        *address = (*address & ~mask) | (value << 8 * shift & mask);
}

void virtio_queue_enable(struct virtio *virtio, struct virtio_queue_registers *queue)
{
    struct virtqueue_rings rings = {
        .size = queue->size,
        .descriptors = queue->descriptors,
        .available = queue->available,
        .used = queue->used,
        .event_index = virtio_has_feature(virtio, F_EVENT_IDX),
        .indirect = virtio_has_feature(virtio, F_INDIRECT_DESC),
    };

    if (queue->enabled)
        return;
    if (!(virtio->status & STATUS_FEATURES_OK)) {
        LOG_GUEST(LOG_WARNING, "%s: queue enabled before the features were agreed", virtio->ops->name);
        return;
    }
    if (virtqueue_enable(queue->ring, &rings) < 0) {
        virtio_needs_reset(virtio, "a queue's rings are misaligned or not in guest memory");
        return;
    }
    queue->enabled = true;
    queue->draining = false;
}

static void queue_disable(struct virtio *virtio, struct virtio_queue_registers *queue)
{
    virtqueue_disable(queue->ring);
    queue->enabled = queue->draining = false;
    queue->size = (uint16_t)virtio->queue_size_max;
    queue->descriptors = queue->available = queue->used = 0;
    atomic_store_explicit(&queue->notified, false, memory_order_relaxed);
}

void virtio_queue_stop(struct virtio *virtio, struct virtio_queue_registers *queue)
{
    queue_disable(virtio, queue);
    virtio->transport->queue_reset(virtio, (unsigned)(queue - virtio->queue));
    queue->draining = virtqueue_in_use(queue->ring);
}

void virtio_queue_reset(struct virtio *virtio, struct virtio_queue_registers *queue)
{
    if (virtio_has_feature(virtio, F_RING_RESET))
        virtio_queue_stop(virtio, queue);
}

bool virtio_queue_draining(struct virtio_queue_registers *queue)
{
    queue->draining = queue->draining && virtqueue_in_use(queue->ring);
    return queue->draining;
}

bool virtio_in_use(const struct virtio *virtio)
{
    for (unsigned i = 0; i < virtio->queue_count; i++) {
        if (virtqueue_in_use(virtio->queue[i].ring))
            return true;
    }
    return false;
}

/* ---- features and status ---- */

/* 32 of the bits, as the select register says; those beyond 64 do not exist. */
static uint32_t feature_word(uint64_t features, uint32_t select)
{
    return select < 2 ? (uint32_t)(features >> 32 * select) : 0;
}

uint32_t virtio_device_features_read(const struct virtio *virtio)
{
    return feature_word(virtio->device_features, virtio->device_feature_select);
}

uint32_t virtio_driver_features_read(const struct virtio *virtio)
{
    return feature_word(virtio->driver_features, virtio->driver_feature_select);
}

void virtio_driver_features_write(struct virtio *virtio, uint32_t value)
{
    unsigned shift = 32 * virtio->driver_feature_select;

    if (virtio->driver_feature_select < 2 && !(virtio->status & STATUS_FEATURES_OK))
        virtio->driver_features = (virtio->driver_features & ~(0xFFFFFFFFull << shift)) | (uint64_t)value << shift;
}

static void device_reset(struct virtio *virtio)
{
    uint8_t old = virtio->status | virtio->draining_status;

    for (unsigned i = 0; i < virtio->queue_count; i++)
        queue_disable(virtio, &virtio->queue[i]);
    if (virtio->ops->reset)
        virtio->ops->reset(virtio->device);
    virtio->features = virtio->driver_features = 0;
    virtio->device_feature_select = virtio->driver_feature_select = 0;
    virtio->queue_select = 0;
    virtio->status = 0;
    virtio->draining_status = virtio_in_use(virtio) ? old : 0;
    virtio->isr = 0;
    virtio->transport->device_reset(virtio);
}

uint8_t virtio_status_read(struct virtio *virtio)
{
    if (virtio->draining_status && !virtio_in_use(virtio))
        virtio->draining_status = 0;
    return virtio->status | virtio->draining_status;
}

void virtio_status_write(struct virtio *virtio, uint8_t value)
{
    uint8_t set;

    if (value == 0) {
        device_reset(virtio);
        return;
    }
    if (virtio_status_read(virtio) != virtio->status)
        return; /* the reset has not ended; the driver did not wait (4.1.4.3.2) */
    set = (value & STATUS_OF_DRIVER) & ~virtio->status;
    if (set & STATUS_FEATURES_OK) {
        /* 2.2.2: the bit stays clear unless the driver's choice works. */
        if ((virtio->driver_features & ~virtio->device_features) || !(virtio->driver_features >> F_VERSION_1 & 1)) {
            LOG_GUEST(LOG_INFO, "%s: features %#llx refused", virtio->ops->name, (unsigned long long)virtio->driver_features);
            set &= ~STATUS_FEATURES_OK;
        } else {
            virtio->features = virtio->driver_features;
            if (virtio->ops->features_set)
                virtio->ops->features_set(virtio->device, virtio->features);
        }
    }
    if (!((virtio->status | set) & STATUS_FEATURES_OK))
        set &= ~STATUS_DRIVER_OK;
    virtio->status |= set; /* drivers do not clear bits but by a reset (2.1.1) */
    if (set & STATUS_DRIVER_OK) {
        if (virtio->ops->ready)
            virtio->ops->ready(virtio->device);
        virtio_wake_all(virtio);
    }
}

/* ---- device configuration space ---- */

uint64_t virtio_config_space_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes)
{
    uint64_t value = 0;

    if (offset >= virtio->ops->config_bytes)
        return 0;
    if (size_bytes > virtio->ops->config_bytes - offset)
        size_bytes = (unsigned)(virtio->ops->config_bytes - offset);
    virtio->ops->config_read(virtio->device, (unsigned)offset, &value, size_bytes);
    return value;
}

void virtio_config_space_write(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    if (virtio->ops->config_write && offset < virtio->ops->config_bytes && size_bytes <= virtio->ops->config_bytes - offset)
        virtio->ops->config_write(virtio->device, (unsigned)offset, &value, size_bytes);
}

/* ---- creation ---- */

static int create_queues(struct virtio *virtio, const struct virtio_config *config)
{
    virtio->queue = calloc(config->queue_count, sizeof(*virtio->queue));
    if (!virtio->queue)
        return -ENOMEM;
    virtio->queue_size_max = config->queue_size;
    for (unsigned i = 0; i < config->queue_count; i++) {
        struct virtqueue_config queue_config = {
            .memory = virtio->host->memory,
            .index = i,
            .interrupt = queue_interrupt,
            .broken = queue_broken,
            .ctx = virtio,
        };

        virtio->queue[i].ring = virtqueue_create(&queue_config);
        if (!virtio->queue[i].ring)
            return -ENOMEM;
        virtio->queue_count++;
        queue_disable(virtio, &virtio->queue[i]);
    }
    return 0;
}

int virtio_init(struct virtio *virtio, const struct device_host *host, const struct virtio_device_ops *ops, void *device,
                    const struct virtio_config *config, struct error *err)
{
    int ret = -EINVAL;

    if (config->queue_count == 0 || config->queue_count > VIRTIO_QUEUES_MAX || config->queue_size == 0 ||
        config->queue_size > VIRTQUEUE_SIZE_MAX || (config->queue_size & (config->queue_size - 1)) ||
        ops->config_bytes > VIRTIO_CONFIG_BYTES_MAX)
        return error_set(err, ret, "%s: impossible number or size of queues", ops->name);
    virtio->host = host;
    virtio->ops = ops;
    virtio->device = device;
    virtio->device_features = config->features | TRANSPORT_FEATURES;
    virtio->transport = host->mmio ? &virtio_mmio_transport : &virtio_pci_transport;
    ret = create_queues(virtio, config);
    if (ret == 0 && !(virtio->wake = loop_event_create(host->loop, serve_queues, virtio)))
        ret = -ENOMEM;
    if (ret == 0)
        ret = virtio->transport->create(virtio, config);
    if (ret == 0)
        return 0;

    virtio_fini(virtio);
    if (ret == -ENOSPC || ret == -EBUSY)
        return error_set(err, ret, "%s: no free %s; use fewer devices", ops->name, host->mmio ? "place for its registers" : "PCI slot");
    return error_set(err, ret, "%s: cannot be set up: %s", ops->name, strerror(-ret));
}

void virtio_fini(struct virtio *virtio)
{
    if (virtio->link)
        virtio->transport->destroy(virtio);
    if (virtio->wake)
        loop_event_destroy(virtio->wake);
    doorbells_close(virtio);
    for (unsigned i = 0; i < virtio->queue_count; i++)
        virtqueue_destroy(virtio->queue[i].ring);
    free(virtio->queue);
    memset(virtio, 0, sizeof(*virtio));
}

void virtio_reset(struct virtio *virtio)
{
    device_reset(virtio);
    virtio->generation = 0;
    virtio->transport->reset(virtio);
}

/* ---- state ---- */

static void queue_state(struct virtio *virtio, struct virtio_queue_registers *queue, struct state_io *io)
{
    state_u16(io, &queue->size);
    state_bool(io, &queue->enabled);
    state_u64(io, &queue->descriptors);
    state_u64(io, &queue->available);
    state_u64(io, &queue->used);
    virtqueue_state(queue->ring, io);
    if (!state_loading(io))
        return;
    if (queue->size == 0 || queue->size > virtio->queue_size_max || (queue->size & (queue->size - 1)) ||
        queue->enabled != virtqueue_enabled(queue->ring))
        state_fail(io, "a virtqueue's registers are impossible");
    queue->draining = false;
}

static void registers_state(struct virtio *virtio, struct state_io *io)
{
    uint32_t queue_count = virtio->queue_count;

    state_u64(io, &virtio->features);
    state_u64(io, &virtio->driver_features);
    state_u32(io, &virtio->device_feature_select);
    state_u32(io, &virtio->driver_feature_select);
    state_u16(io, &virtio->queue_select);
    state_u8(io, &virtio->status);
    state_u8(io, &virtio->generation);
    state_u8(io, &virtio->isr);
    state_u32(io, &queue_count);
    if (queue_count != virtio->queue_count)
        state_fail(io, "another number of virtqueues than this device has");
    for (unsigned i = 0; i < virtio->queue_count; i++)
        queue_state(virtio, &virtio->queue[i], io);
}

void virtio_state(struct virtio *virtio, struct state_io *io)
{
    if (state_loading(io))
        device_reset(virtio);
    virtio->transport->state(virtio, io);
    registers_state(virtio, io);
    if (!state_loading(io))
        return;

    virtio->isr &= ISR_QUEUE | ISR_CONFIG;
    if ((virtio->features & ~virtio->device_features) || (virtio->status & ~(STATUS_OF_DRIVER | STATUS_NEEDS_RESET)) ||
        ((virtio->status & STATUS_DRIVER_OK) && !(virtio->status & STATUS_FEATURES_OK)))
        state_fail(io, "virtio status or features are impossible; was the device made with other options?");
    if (state_failed(io)) {
        device_reset(virtio);
        return;
    }
    virtio->transport->loaded(virtio);
    if (virtio->status & STATUS_FEATURES_OK && virtio->ops->features_set)
        virtio->ops->features_set(virtio->device, virtio->features);
    if (virtio->status & STATUS_DRIVER_OK && virtio->ops->ready)
        virtio->ops->ready(virtio->device);
    virtio_wake_all(virtio);
}
