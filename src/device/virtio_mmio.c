/*
 * virtio over memory-mapped registers (virtio 1.2, section 4.2, register layout version 2): a page of 32-bit registers and a level interrupt line.
 *
 * The line is high while a bit of InterruptStatus is set and the driver has not acknowledged it. Kernels that know the line from their command line only take it as
 * edge-triggered: bits left after an acknowledgement therefore make a new edge.
 * Shared memory regions do not exist: their length reads as all ones (4.2.2.1). Threading: with the device lock held.
 */
#include "device/virtio_mmio.h"

#include <errno.h>
#include <stdlib.h>

#include "device/virtio_priv.h"

#define MAGIC 0x74726976u /* "virt" */
#define VERSION 2u
#define VENDOR 0x1AF4u

/* 4.2.2 */
enum mmio_register {
    MMIO_MAGIC_VALUE = 0x000,
    MMIO_VERSION = 0x004,
    MMIO_DEVICE_ID = 0x008,
    MMIO_VENDOR_ID = 0x00C,
    MMIO_DEVICE_FEATURES = 0x010,
    MMIO_DEVICE_FEATURES_SEL = 0x014,
    MMIO_DRIVER_FEATURES = 0x020,
    MMIO_DRIVER_FEATURES_SEL = 0x024,
    MMIO_QUEUE_SEL = 0x030,
    MMIO_QUEUE_NUM_MAX = 0x034,
    MMIO_QUEUE_NUM = 0x038,
    MMIO_QUEUE_READY = 0x044,
    MMIO_QUEUE_NOTIFY = 0x050,
    MMIO_INTERRUPT_STATUS = 0x060,
    MMIO_INTERRUPT_ACK = 0x064,
    MMIO_STATUS = 0x070,
    MMIO_QUEUE_DESC = 0x080, /* each with its upper half behind it */
    MMIO_QUEUE_DRIVER = 0x090,
    MMIO_QUEUE_DEVICE = 0x0A0,
    MMIO_SHM_LEN_LOW = 0x0B0,
    MMIO_SHM_BASE_HIGH = 0x0BC,
    MMIO_QUEUE_RESET = 0x0C0,
    MMIO_CONFIG_GENERATION = 0x0FC,
    MMIO_CONFIG = 0x100,
};

struct virtio_mmio {
    struct virtio_mmio_host *host;
    unsigned place, line;
    bool level;
};

static struct virtio_mmio *mmio_of(const struct virtio *virtio)
{
    return virtio->link;
}

/* ---- the line ---- */

static void set_level(struct virtio_mmio *mmio, bool level)
{
    if (mmio->level == level)
        return;
    mmio->level = level;
    mmio->host->asserted[mmio->line] += level ? 1 : -1;
    irq_line_set(&mmio->host->line[mmio->line], mmio->host->asserted[mmio->line] != 0);
}

static void interrupt(struct virtio *virtio, uint8_t isr_bit, unsigned queue)
{
    virtio->isr |= isr_bit;
    set_level(mmio_of(virtio), true);
}

static void acknowledge(struct virtio *virtio, uint8_t bits)
{
    virtio->isr &= ~bits;
    set_level(mmio_of(virtio), false);
    set_level(mmio_of(virtio), virtio->isr != 0);
}

static void device_reset(struct virtio *virtio)
{
    set_level(mmio_of(virtio), false);
}

static void loaded(struct virtio *virtio)
{
    set_level(mmio_of(virtio), virtio->isr != 0);
}

/* ---- registers ---- */

static uint32_t queue_register_read(struct virtio *virtio, uint64_t offset)
{
    struct virtio_queue_registers *queue = virtio_queue_selected(virtio);

    if (!queue)
        return 0;
    switch (offset) {
    case MMIO_QUEUE_NUM_MAX:
        return virtio->queue_size_max;
    case MMIO_QUEUE_READY:
        return queue->enabled || virtio_queue_draining(queue);
    case MMIO_QUEUE_RESET:
        return virtio_queue_draining(queue);
    default:
        return 0;
    }
}

static uint32_t register_read(struct virtio *virtio, uint64_t offset)
{
    switch (offset) {
    case MMIO_MAGIC_VALUE:
        return MAGIC;
    case MMIO_VERSION:
        return VERSION;
    case MMIO_DEVICE_ID:
        return virtio->ops->device_id;
    case MMIO_VENDOR_ID:
        return VENDOR;
    case MMIO_DEVICE_FEATURES:
        return virtio_device_features_read(virtio);
    case MMIO_INTERRUPT_STATUS:
        return virtio->isr;
    case MMIO_STATUS:
        return virtio_status_read(virtio);
    case MMIO_CONFIG_GENERATION:
        return virtio->generation;
    default:
        return offset >= MMIO_SHM_LEN_LOW && offset <= MMIO_SHM_BASE_HIGH ? UINT32_MAX : queue_register_read(virtio, offset);
    }
}

static void queue_register_write(struct virtio *virtio, uint64_t offset, uint32_t value)
{
    struct virtio_queue_registers *queue = virtio_queue_selected(virtio);

    if (!queue)
        return;
    switch (offset) {
    case MMIO_QUEUE_NUM:
        virtio_queue_size_write(virtio, queue, value);
        break;
    case MMIO_QUEUE_READY:
        if (value == 1)
            virtio_queue_enable(virtio, queue);
        else if (value == 0)
            virtio_queue_stop(virtio, queue);
        break;
    case MMIO_QUEUE_DESC:
    case MMIO_QUEUE_DESC + 4:
        virtio_queue_address_write(queue, &queue->descriptors, offset & 4, 4, value);
        break;
    case MMIO_QUEUE_DRIVER:
    case MMIO_QUEUE_DRIVER + 4:
        virtio_queue_address_write(queue, &queue->available, offset & 4, 4, value);
        break;
    case MMIO_QUEUE_DEVICE:
    case MMIO_QUEUE_DEVICE + 4:
        virtio_queue_address_write(queue, &queue->used, offset & 4, 4, value);
        break;
    case MMIO_QUEUE_RESET:
        if (value == 1)
            virtio_queue_reset(virtio, queue);
        break;
    default:
        break;
    }
}

static void register_write(struct virtio *virtio, uint64_t offset, uint32_t value)
{
    switch (offset) {
    case MMIO_DEVICE_FEATURES_SEL:
        virtio->device_feature_select = value;
        break;
    case MMIO_DRIVER_FEATURES_SEL:
        virtio->driver_feature_select = value;
        break;
    case MMIO_DRIVER_FEATURES:
        virtio_driver_features_write(virtio, value);
        break;
    case MMIO_QUEUE_SEL:
        virtio->queue_select = value < virtio->queue_count ? (uint16_t)value : UINT16_MAX;
        break;
    case MMIO_QUEUE_NOTIFY:
        virtio_notify(virtio, value);
        break;
    case MMIO_INTERRUPT_ACK:
        acknowledge(virtio, (uint8_t)value);
        break;
    case MMIO_STATUS:
        virtio_status_write(virtio, (uint8_t)value);
        break;
    default:
        queue_register_write(virtio, offset, value);
        break;
    }
}

/* Registers are read and written as a whole (4.2.2.2); the device's configuration as its fields are. */
static uint64_t window_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    if (offset >= MMIO_CONFIG)
        return virtio_config_space_read(ctx, offset - MMIO_CONFIG, size_bytes);
    return size_bytes == 4 && offset % 4 == 0 ? register_read(ctx, offset) : 0;
}

static void window_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    if (offset >= MMIO_CONFIG)
        virtio_config_space_write(ctx, offset - MMIO_CONFIG, size_bytes, value);
    else if (size_bytes == 4 && offset % 4 == 0)
        register_write(ctx, offset, (uint32_t)value);
}

/* One register for all queues, which are told apart by the value. */
static bool doorbell(void *ctx, unsigned n, struct bus_doorbell *out)
{
    *out = (struct bus_doorbell){.offset = MMIO_QUEUE_NOTIFY, .size_bytes = 4, .match = true, .value = n, .fd = virtio_doorbell_fd(ctx, n)};
    return out->fd >= 0;
}

static const struct region_ops window_ops = {
    .name = "virtio-mmio",
    .read = window_read,
    .write = window_write,
    .size_min = 1,
    .size_max = 8,
    .doorbell = doorbell,
};

/* ---- the transport ---- */

static void destroy(struct virtio *virtio)
{
    struct virtio_mmio *mmio = mmio_of(virtio);

    set_level(mmio, false);
    if (mmio->place + 1 == mmio->host->device_count)
        mmio->host->device_count--;
    bus_remove(mmio->host->bus, BUS_MMIO, virtio_mmio_address(mmio->host, mmio->place), virtio);
    free(mmio);
    virtio->link = NULL;
}

static int create(struct virtio *virtio, const struct virtio_config *config)
{
    struct virtio_mmio_host *host = virtio->host->mmio;
    unsigned place = host->device_count;
    struct virtio_mmio *mmio;
    int ret;

    if (place >= host->places)
        return -ENOSPC;
    mmio = calloc(1, sizeof(*mmio));
    if (!mmio)
        return -ENOMEM;
    *mmio = (struct virtio_mmio){.host = host, .place = place, .line = virtio_mmio_line(host, place)};
    ret = bus_add(host->bus, BUS_MMIO, virtio_mmio_address(host, place), VIRTIO_MMIO_WINDOW_BYTES, &window_ops, virtio);
    if (ret < 0) {
        free(mmio);
        return ret;
    }
    virtio->link = mmio;
    host->device_count++;
    return 0;
}

static void reset(struct virtio *virtio)
{
}

static void queue_reset(struct virtio *virtio, unsigned index)
{
}

/* Memory-mapped devices may always reach memory. */
static bool bus_master(const struct virtio *virtio)
{
    return true;
}

/* A device saved at another place would not be where its driver looks for it. */
static void state(struct virtio *virtio, struct state_io *io)
{
    uint32_t place = mmio_of(virtio)->place;

    state_u32(io, &place);
    if (place != mmio_of(virtio)->place)
        state_fail(io, "a memory-mapped device was at another address");
}

const struct virtio_transport virtio_mmio_transport = {
    .create = create,
    .destroy = destroy,
    .reset = reset,
    .device_reset = device_reset,
    .queue_reset = queue_reset,
    .interrupt = interrupt,
    .bus_master = bus_master,
    .state = state,
    .loaded = loaded,
};
