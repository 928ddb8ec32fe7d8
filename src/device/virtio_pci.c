/*
 * virtio over PCI (virtio 1.2, section 4.1): capabilities, the common configuration, notifications, interrupts.
 *
 * One 16 KiB memory BAR holds the structures that the capabilities point to; BAR 1 is MSI-X with one vector per queue and one for configuration changes.
 * A reset is seen as complete (status 0) only when no chain is in flight any more, so that a driver never finds a device writing into memory
 * that it has freed (2.4.1): `draining_status` is what it reads until then.
 * Threading: with the device lock held. virtio_wake_queue from any thread: it touches `notified` and the event only.
 */
#include "device/virtio.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "util/log.h"

#define VIRTIO_PCI_VENDOR 0x1AF4
#define VIRTIO_PCI_DEVICE_BASE 0x1040

/* 2.1: device status. */
#define STATUS_ACKNOWLEDGE 0x01u
#define STATUS_DRIVER 0x02u
#define STATUS_DRIVER_OK 0x04u
#define STATUS_FEATURES_OK 0x08u
#define STATUS_NEEDS_RESET 0x40u
#define STATUS_FAILED 0x80u
#define STATUS_OF_DRIVER (STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED)

/* 6: features of the transport and the queues. */
#define F_INDIRECT_DESC 28
#define F_EVENT_IDX 29
#define F_VERSION_1 32
#define F_RING_RESET 40
#define TRANSPORT_FEATURES (1ull << F_INDIRECT_DESC | 1ull << F_EVENT_IDX | 1ull << F_VERSION_1 | 1ull << F_RING_RESET)

#define NO_VECTOR 0xFFFFu
#define ISR_QUEUE 1u
#define ISR_CONFIG 2u

/* 4.1.4: capabilities. */
enum { CAP_COMMON = 1, CAP_NOTIFY = 2, CAP_ISR = 3, CAP_DEVICE = 4, CAP_PCI = 5 };
#define PCI_CAP_VENDOR 0x09

struct virtio_cap {
    uint8_t id, next, length, type, bar, cap_id, padding[2];
    uint32_t offset, size;
    uint32_t extra; /* notify: multiplier; PCI access: the data window */
};
#define CAP_BYTES 16u
#define CAP_WINDOW offsetof(struct virtio_cap, extra)

#define REGISTERS_BAR 4
#define REGISTERS_BAR_BYTES 0x4000u
#define MSIX_BAR 1
#define NOTIFY_MULTIPLIER 4u

/* 4.1.4.3 */
enum common_register {
    COMMON_DEVICE_FEATURE_SELECT,
    COMMON_DEVICE_FEATURE,
    COMMON_DRIVER_FEATURE_SELECT,
    COMMON_DRIVER_FEATURE,
    COMMON_CONFIG_VECTOR,
    COMMON_NUM_QUEUES,
    COMMON_STATUS,
    COMMON_GENERATION,
    COMMON_QUEUE_SELECT,
    COMMON_QUEUE_SIZE,
    COMMON_QUEUE_VECTOR,
    COMMON_QUEUE_ENABLE,
    COMMON_QUEUE_NOTIFY_OFF,
    COMMON_QUEUE_DESC,
    COMMON_QUEUE_DRIVER,
    COMMON_QUEUE_DEVICE,
    COMMON_QUEUE_NOTIFY_DATA,
    COMMON_QUEUE_RESET,
};

static const struct {
    uint8_t offset, size;
} common_layout[] = {
    [COMMON_DEVICE_FEATURE_SELECT] = {0x00, 4},
    [COMMON_DEVICE_FEATURE] = {0x04, 4},
    [COMMON_DRIVER_FEATURE_SELECT] = {0x08, 4},
    [COMMON_DRIVER_FEATURE] = {0x0C, 4},
    [COMMON_CONFIG_VECTOR] = {0x10, 2},
    [COMMON_NUM_QUEUES] = {0x12, 2},
    [COMMON_STATUS] = {0x14, 1},
    [COMMON_GENERATION] = {0x15, 1},
    [COMMON_QUEUE_SELECT] = {0x16, 2},
    [COMMON_QUEUE_SIZE] = {0x18, 2},
    [COMMON_QUEUE_VECTOR] = {0x1A, 2},
    [COMMON_QUEUE_ENABLE] = {0x1C, 2},
    [COMMON_QUEUE_NOTIFY_OFF] = {0x1E, 2},
    [COMMON_QUEUE_DESC] = {0x20, 8},
    [COMMON_QUEUE_DRIVER] = {0x28, 8},
    [COMMON_QUEUE_DEVICE] = {0x30, 8},
    [COMMON_QUEUE_NOTIFY_DATA] = {0x38, 2},
    [COMMON_QUEUE_RESET] = {0x3A, 2},
};
#define COMMON_BYTES 0x3Cu

/* ---- interrupts ---- */

/* Without MSI-X: the ISR bit and the pin (4.1.5.3, 4.1.5.4). */
static void interrupt(struct virtio *virtio, uint8_t isr_bit, uint16_t vector)
{
    if (pci_msix_enabled(&virtio->function)) {
        if (vector != NO_VECTOR)
            pci_msix_notify(&virtio->function, vector);
        return;
    }
    virtio->isr |= isr_bit;
    pci_function_set_intx(&virtio->function, true);
}

static void queue_interrupt(void *ctx, unsigned index)
{
    struct virtio *virtio = ctx;

    interrupt(virtio, ISR_QUEUE, virtio->queue[index].vector);
}

void virtio_config_changed(struct virtio *virtio)
{
    virtio->generation++;
    if (virtio->status & STATUS_DRIVER_OK)
        interrupt(virtio, ISR_CONFIG, virtio->config_vector);
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
    return (virtio->status & (STATUS_DRIVER_OK | STATUS_NEEDS_RESET)) == STATUS_DRIVER_OK &&
           pci_function_bus_master(&virtio->function);
}

void virtio_wake_queue(struct virtio *virtio, unsigned index)
{
    atomic_store_explicit(&virtio->queue[index].notified, true, memory_order_release);
    loop_event_raise(virtio->wake);
}

static void wake_all(struct virtio *virtio)
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

static void queue_enable(struct virtio *virtio, struct virtio_queue_registers *queue)
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
    queue->vector = NO_VECTOR;
    queue->descriptors = queue->available = queue->used = 0;
    atomic_store_explicit(&queue->notified, false, memory_order_relaxed);
}

bool virtio_in_use(const struct virtio *virtio)
{
    for (unsigned i = 0; i < virtio->queue_count; i++) {
        if (virtqueue_in_use(virtio->queue[i].ring))
            return true;
    }
    return false;
}

/* ---- status ---- */

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
    virtio->config_vector = NO_VECTOR;
    virtio->status = 0;
    virtio->draining_status = virtio_in_use(virtio) ? old : 0;
    virtio->isr = 0;
    pci_function_set_intx(&virtio->function, false);
}

static uint8_t status_read(struct virtio *virtio)
{
    if (virtio->draining_status && !virtio_in_use(virtio))
        virtio->draining_status = 0;
    return virtio->status | virtio->draining_status;
}

static void status_write(struct virtio *virtio, uint8_t value)
{
    uint8_t set;

    if (value == 0) {
        device_reset(virtio);
        return;
    }
    if (status_read(virtio) != virtio->status)
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
        wake_all(virtio);
    }
}

/* ---- common configuration ---- */

static struct virtio_queue_registers *selected(struct virtio *virtio)
{
    return virtio->queue_select < virtio->queue_count ? &virtio->queue[virtio->queue_select] : NULL;
}

static uint64_t queue_register_read(struct virtio *virtio, enum common_register reg)
{
    struct virtio_queue_registers *queue = selected(virtio);

    if (!queue)
        return reg == COMMON_QUEUE_VECTOR ? NO_VECTOR : 0; /* size 0: no such queue */
    switch (reg) {
    case COMMON_QUEUE_SIZE:
        return queue->size;
    case COMMON_QUEUE_VECTOR:
        return queue->vector;
    case COMMON_QUEUE_ENABLE:
        return queue->enabled;
    case COMMON_QUEUE_NOTIFY_OFF:
    case COMMON_QUEUE_NOTIFY_DATA:
        return virtio->queue_select;
    case COMMON_QUEUE_DESC:
        return queue->descriptors;
    case COMMON_QUEUE_DRIVER:
        return queue->available;
    case COMMON_QUEUE_DEVICE:
        return queue->used;
    case COMMON_QUEUE_RESET:
        queue->draining = queue->draining && virtqueue_in_use(queue->ring);
        return queue->draining;
    default:
        return 0;
    }
}

static uint64_t common_register_read(struct virtio *virtio, enum common_register reg)
{
    switch (reg) {
    case COMMON_DEVICE_FEATURE_SELECT:
        return virtio->device_feature_select;
    case COMMON_DEVICE_FEATURE:
        return virtio->device_feature_select < 2 ? (uint32_t)(virtio->device_features >> 32 * virtio->device_feature_select) : 0;
    case COMMON_DRIVER_FEATURE_SELECT:
        return virtio->driver_feature_select;
    case COMMON_DRIVER_FEATURE:
        return virtio->driver_feature_select < 2 ? (uint32_t)(virtio->driver_features >> 32 * virtio->driver_feature_select) : 0;
    case COMMON_CONFIG_VECTOR:
        return virtio->config_vector;
    case COMMON_NUM_QUEUES:
        return virtio->queue_count;
    case COMMON_STATUS:
        return status_read(virtio);
    case COMMON_GENERATION:
        return virtio->generation;
    case COMMON_QUEUE_SELECT:
        return virtio->queue_select;
    default:
        return queue_register_read(virtio, reg);
    }
}

/* A vector that does not exist reads back as none (4.1.5.1.2). */
static uint16_t vector_of(const struct virtio *virtio, uint64_t value)
{
    return value <= virtio->queue_count ? (uint16_t)value : NO_VECTOR;
}

/* Replaces `size_bytes` bytes at `shift` of a 64-bit register, which drivers write in halves. */
static void replace_part(uint64_t *reg, unsigned shift, unsigned size_bytes, uint64_t value)
{
    uint64_t mask = (size_bytes == 8 ? ~0ull : (1ull << 8 * size_bytes) - 1) << 8 * shift;

    *reg = (*reg & ~mask) | (value << 8 * shift & mask);
}

static void queue_register_write(struct virtio *virtio, enum common_register reg, unsigned shift, unsigned size_bytes, uint64_t value)
{
    struct virtio_queue_registers *queue = selected(virtio);

    if (!queue)
        return;
    switch (reg) {
    case COMMON_QUEUE_SIZE:
        if (!queue->enabled && value && value <= virtio->queue_size_max && !(value & (value - 1)))
            queue->size = (uint16_t)value;
        break;
    case COMMON_QUEUE_VECTOR:
        queue->vector = vector_of(virtio, value);
        break;
    case COMMON_QUEUE_ENABLE:
        if (value == 1)
            queue_enable(virtio, queue);
        break;
    case COMMON_QUEUE_DESC:
        if (!queue->enabled)
            replace_part(&queue->descriptors, shift, size_bytes, value);
        break;
    case COMMON_QUEUE_DRIVER:
        if (!queue->enabled)
            replace_part(&queue->available, shift, size_bytes, value);
        break;
    case COMMON_QUEUE_DEVICE:
        if (!queue->enabled)
            replace_part(&queue->used, shift, size_bytes, value);
        break;
    case COMMON_QUEUE_RESET: /* 2.6.1 */
        if (value == 1 && virtio_has_feature(virtio, F_RING_RESET)) {
            queue_disable(virtio, queue);
            queue->draining = virtqueue_in_use(queue->ring);
        }
        break;
    default:
        break;
    }
}

static void common_register_write(struct virtio *virtio, enum common_register reg, unsigned shift, unsigned size_bytes, uint64_t value)
{
    switch (reg) {
    case COMMON_DEVICE_FEATURE_SELECT:
        virtio->device_feature_select = (uint32_t)value;
        break;
    case COMMON_DRIVER_FEATURE_SELECT:
        virtio->driver_feature_select = (uint32_t)value;
        break;
    case COMMON_DRIVER_FEATURE:
        if (virtio->driver_feature_select < 2 && !(virtio->status & STATUS_FEATURES_OK))
            replace_part(&virtio->driver_features, 4 * virtio->driver_feature_select, 4, value);
        break;
    case COMMON_CONFIG_VECTOR:
        virtio->config_vector = vector_of(virtio, value);
        break;
    case COMMON_STATUS:
        status_write(virtio, (uint8_t)value);
        break;
    case COMMON_QUEUE_SELECT:
        virtio->queue_select = (uint16_t)value;
        break;
    default:
        queue_register_write(virtio, reg, shift, size_bytes, value);
        break;
    }
}

/* The register that holds byte `offset`; -1: none. */
static int common_find(uint64_t offset)
{
    for (unsigned i = 0; i < sizeof(common_layout) / sizeof(common_layout[0]); i++) {
        if (offset >= common_layout[i].offset && offset < common_layout[i].offset + common_layout[i].size)
            return (int)i;
    }
    return -1;
}

/* Reads may be narrower than the register; a wider one sees the first register only. */
static uint64_t common_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes)
{
    int reg = common_find(offset);

    return reg < 0 ? 0 : common_register_read(virtio, (enum common_register)reg) >> 8 * (offset - common_layout[reg].offset);
}

/* Writes have the register's width (4.1.3.1), but for halves of 64-bit ones; others are dropped. */
static void common_write(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    int reg = common_find(offset);
    unsigned shift;

    if (reg < 0)
        return;
    shift = (unsigned)(offset - common_layout[reg].offset);
    if (size_bytes != common_layout[reg].size && (common_layout[reg].size != 8 || size_bytes != 4 || shift % 4))
        return;
    common_register_write(virtio, (enum common_register)reg, shift, size_bytes, value);
}

/* ---- the other structures ---- */

static uint64_t isr_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes)
{
    uint8_t isr = virtio->isr;

    if (offset != 0)
        return 0;
    virtio->isr = 0;
    pci_function_set_intx(&virtio->function, false);
    return isr;
}

static uint64_t device_config_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes)
{
    uint64_t value = 0;

    if (offset >= virtio->ops->config_bytes)
        return 0;
    if (size_bytes > virtio->ops->config_bytes - offset)
        size_bytes = (unsigned)(virtio->ops->config_bytes - offset);
    virtio->ops->config_read(virtio->device, (unsigned)offset, &value, size_bytes);
    return value;
}

static void device_config_write(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    if (virtio->ops->config_write && offset < virtio->ops->config_bytes && size_bytes <= virtio->ops->config_bytes - offset)
        virtio->ops->config_write(virtio->device, (unsigned)offset, &value, size_bytes);
}

static uint64_t notify_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes)
{
    return 0;
}

static void notify_write(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    uint64_t index = offset / NOTIFY_MULTIPLIER;

    if (index < virtio->queue_count)
        virtio_wake_queue(virtio, (unsigned)index);
}

static const struct structure {
    uint8_t cap_type;
    uint32_t offset, size;
    uint64_t (*read)(struct virtio *virtio, uint64_t offset, unsigned size_bytes);
    void (*write)(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value); /* NULL: read-only */
} structures[] = {
    {CAP_COMMON, 0x0000, COMMON_BYTES, common_read, common_write},
    {CAP_ISR, 0x1000, 4, isr_read, NULL},
    {CAP_DEVICE, 0x2000, VIRTIO_CONFIG_BYTES_MAX, device_config_read, device_config_write},
    {CAP_NOTIFY, 0x3000, NOTIFY_MULTIPLIER * VIRTIO_QUEUES_MAX, notify_read, notify_write},
};

static const struct structure *structure_at(uint64_t offset)
{
    for (unsigned i = 0; i < sizeof(structures) / sizeof(structures[0]); i++) {
        if (offset >= structures[i].offset && offset - structures[i].offset < structures[i].size)
            return &structures[i];
    }
    return NULL;
}

static uint64_t registers_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    const struct structure *structure = structure_at(offset);

    return structure ? structure->read(ctx, offset - structure->offset, size_bytes) : 0;
}

static void registers_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    const struct structure *structure = structure_at(offset);

    if (structure && structure->write)
        structure->write(ctx, offset - structure->offset, size_bytes, value);
}

static const struct region_ops registers_ops = {
    .name = "virtio",
    .read = registers_read,
    .write = registers_write,
    .size_min = 1,
    .size_max = 8,
};

/* ---- PCI ---- */

/* The PCI configuration access capability (4.1.4.9): a window for those who cannot reach BARs yet. */
static bool window_target(const struct virtio *virtio, unsigned offset, unsigned size_bytes, uint32_t *target, unsigned *length)
{
    const uint8_t *config = virtio->function.config + virtio->pci_window;
    unsigned data = virtio->pci_window + CAP_WINDOW;
    struct virtio_cap cap;

    if (offset >= data + 4 || offset + size_bytes <= data)
        return false;
    memcpy(&cap, config, sizeof(cap));
    *target = cap.offset;
    *length = cap.size;
    return cap.bar == REGISTERS_BAR && (cap.size == 1 || cap.size == 2 || cap.size == 4) && cap.offset % cap.size == 0 &&
           cap.offset <= REGISTERS_BAR_BYTES - cap.size;
}

static void config_reading(void *device, unsigned offset, unsigned size_bytes)
{
    struct virtio *virtio = device;
    uint32_t target, value;
    unsigned length;

    if (!window_target(virtio, offset, size_bytes, &target, &length))
        return;
    value = (uint32_t)registers_read(virtio, target, length);
    memcpy(virtio->function.config + virtio->pci_window + CAP_WINDOW, &value, length);
}

static void config_written(void *device, unsigned offset, unsigned size_bytes)
{
    struct virtio *virtio = device;
    uint32_t target, value = 0;
    unsigned length;

    if (window_target(virtio, offset, size_bytes, &target, &length)) {
        memcpy(&value, virtio->function.config + virtio->pci_window + CAP_WINDOW, length);
        registers_write(virtio, target, length, value);
        return;
    }
    /* The command register or MSI-X control may have changed: bus mastering may be on now, the pin may have gone out of use. */
    if (virtio->isr)
        pci_function_set_intx(&virtio->function, !pci_msix_enabled(&virtio->function));
    if (offset < 6 && offset + size_bytes > 4)
        wake_all(virtio);
}

/* As after power-on: the fields that the guest may write are zero. */
static void window_reset(struct virtio *virtio)
{
    uint8_t *config = virtio->function.config + virtio->pci_window;
    const uint8_t *mask = virtio->function.write_mask + virtio->pci_window;

    for (unsigned i = 0; i < sizeof(struct virtio_cap); i++)
        config[i] &= ~mask[i];
}

static const struct pci_function_ops function_ops = {
    .name = "virtio",
    .config_written = config_written,
    .config_reading = config_reading,
};

static int add_capabilities(struct virtio *virtio)
{
    struct virtio_cap cap = {.bar = REGISTERS_BAR}, mask = {0};

    for (unsigned i = 0; i < sizeof(structures) / sizeof(structures[0]); i++) {
        bool notify = structures[i].cap_type == CAP_NOTIFY;

        if (structures[i].cap_type == CAP_DEVICE && virtio->ops->config_bytes == 0)
            continue;
        cap.type = structures[i].cap_type;
        cap.length = notify ? sizeof(cap) : CAP_BYTES;
        cap.offset = structures[i].offset;
        cap.size = structures[i].size;
        if (cap.type == CAP_DEVICE)
            cap.size = (virtio->ops->config_bytes + 3) & ~3u;
        cap.extra = NOTIFY_MULTIPLIER;
        if (!pci_function_add_capability(&virtio->function, PCI_CAP_VENDOR, cap.length, &cap.length, NULL))
            return -ENOSPC;
    }
    cap = (struct virtio_cap){.length = sizeof(cap), .type = CAP_PCI};
    mask.bar = 0xFF;
    mask.offset = mask.size = mask.extra = UINT32_MAX;
    virtio->pci_window = pci_function_add_capability(&virtio->function, PCI_CAP_VENDOR, cap.length, &cap.length, &mask.length);
    return virtio->pci_window ? 0 : -ENOSPC;
}

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
    const struct pci_identity identity = {
        .vendor = VIRTIO_PCI_VENDOR,
        .device = (uint16_t)(VIRTIO_PCI_DEVICE_BASE + ops->device_id),
        .subsystem_vendor = VIRTIO_PCI_VENDOR,
        .subsystem = (uint16_t)(VIRTIO_PCI_DEVICE_BASE + ops->device_id),
        .class_code = ops->class_code,
        .revision = 1, /* 4.1.2.1 */
        .has_intx = true,
    };
    int ret = -EINVAL;

    if (config->queue_count == 0 || config->queue_count > VIRTIO_QUEUES_MAX || config->queue_size == 0 ||
        config->queue_size > VIRTQUEUE_SIZE_MAX || (config->queue_size & (config->queue_size - 1)) ||
        ops->config_bytes > VIRTIO_CONFIG_BYTES_MAX)
        return error_set(err, ret, "%s: impossible number or size of queues", ops->name);
    virtio->host = host;
    virtio->ops = ops;
    virtio->device = device;
    virtio->device_features = config->features | TRANSPORT_FEATURES;
    virtio->config_vector = NO_VECTOR;
    ret = create_queues(virtio, config);
    if (ret < 0)
        goto fail;
    virtio->wake = loop_event_create(host->loop, serve_queues, virtio);
    if (!virtio->wake) {
        ret = -ENOMEM;
        goto fail;
    }
    ret = pci_function_register(host->pci, &virtio->function, config->slot, &identity, &function_ops, virtio);
    if (ret < 0)
        goto fail;
    pci_function_set_bar(&virtio->function, REGISTERS_BAR, PCI_BAR_MEM64, REGISTERS_BAR_BYTES, &registers_ops, virtio);
    ret = pci_msix_create(&virtio->function, config->queue_count + 1, MSIX_BAR);
    if (ret == 0)
        ret = add_capabilities(virtio);
    if (ret == 0)
        return 0;
    pci_function_unregister(&virtio->function);
    virtio->function.host = NULL;

fail:
    virtio_fini(virtio);
    if (ret == -ENOSPC || ret == -EBUSY)
        return error_set(err, ret, "%s: no free PCI slot; use fewer devices", ops->name);
    return error_set(err, ret, "%s: cannot be set up: %s", ops->name, strerror(-ret));
}

void virtio_fini(struct virtio *virtio)
{
    if (virtio->function.host)
        pci_function_unregister(&virtio->function);
    if (virtio->wake)
        loop_event_destroy(virtio->wake);
    for (unsigned i = 0; i < virtio->queue_count; i++)
        virtqueue_destroy(virtio->queue[i].ring);
    free(virtio->queue);
    memset(virtio, 0, sizeof(*virtio));
}

void virtio_reset(struct virtio *virtio)
{
    device_reset(virtio);
    virtio->generation = 0;
    window_reset(virtio);
    pci_function_reset(&virtio->function);
}

/* ---- state ---- */

static void queue_state(struct virtio *virtio, struct virtio_queue_registers *queue, struct state_io *io)
{
    state_u16(io, &queue->size);
    state_u16(io, &queue->vector);
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
    queue->vector = vector_of(virtio, queue->vector);
    queue->draining = false;
}

void virtio_state(struct virtio *virtio, struct state_io *io)
{
    uint32_t queue_count = virtio->queue_count;

    if (state_loading(io))
        device_reset(virtio);
    pci_function_state(&virtio->function, io);
    state_u64(io, &virtio->features);
    state_u64(io, &virtio->driver_features);
    state_u32(io, &virtio->device_feature_select);
    state_u32(io, &virtio->driver_feature_select);
    state_u16(io, &virtio->config_vector);
    state_u16(io, &virtio->queue_select);
    state_u8(io, &virtio->status);
    state_u8(io, &virtio->generation);
    state_u8(io, &virtio->isr);
    state_u32(io, &queue_count);
    if (queue_count != virtio->queue_count)
        state_fail(io, "another number of virtqueues than this device has");
    for (unsigned i = 0; i < virtio->queue_count; i++)
        queue_state(virtio, &virtio->queue[i], io);
    if (!state_loading(io))
        return;

    virtio->config_vector = vector_of(virtio, virtio->config_vector);
    virtio->isr &= ISR_QUEUE | ISR_CONFIG;
    if ((virtio->features & ~virtio->device_features) || (virtio->status & ~(STATUS_OF_DRIVER | STATUS_NEEDS_RESET)) ||
        ((virtio->status & STATUS_DRIVER_OK) && !(virtio->status & STATUS_FEATURES_OK)))
        state_fail(io, "virtio status or features are impossible; was the device made with other options?");
    if (state_failed(io)) {
        device_reset(virtio);
        return;
    }
    if (virtio->isr)
        pci_function_set_intx(&virtio->function, !pci_msix_enabled(&virtio->function));
    if (virtio->status & STATUS_FEATURES_OK && virtio->ops->features_set)
        virtio->ops->features_set(virtio->device, virtio->features);
    if (virtio->status & STATUS_DRIVER_OK && virtio->ops->ready)
        virtio->ops->ready(virtio->device);
    wake_all(virtio);
}
