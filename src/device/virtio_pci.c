/*
 * virtio over PCI (virtio 1.2, section 4.1): capabilities, the common configuration, notifications, interrupts.
 *
 * One 16 KiB memory BAR holds the structures that the capabilities point to; BAR 1 is MSI-X with one vector per queue and one for configuration changes.
 * Threading: with the device lock held.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "chipset/pci.h"
#include "device/virtio_priv.h"

#define VIRTIO_PCI_VENDOR 0x1AF4
#define VIRTIO_PCI_DEVICE_BASE 0x1040
#define NO_VECTOR 0xFFFFu

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

struct virtio_pci {
    struct pci_function function;
    unsigned window; /* offset of the PCI configuration access capability */
    uint16_t config_vector, queue_vector[VIRTIO_QUEUES_MAX];
};

static struct virtio_pci *pci_of(const struct virtio *virtio)
{
    return virtio->link;
}

/* ---- interrupts ---- */

/* Without MSI-X: the ISR bit and the pin (4.1.5.3, 4.1.5.4). */
static void interrupt(struct virtio *virtio, uint8_t isr_bit, unsigned queue)
{
    struct virtio_pci *pci = pci_of(virtio);

    if (pci_msix_enabled(&pci->function)) {
        uint16_t vector = queue == QUEUE_NONE ? pci->config_vector : pci->queue_vector[queue];

        if (vector != NO_VECTOR)
            pci_msix_notify(&pci->function, vector);
        return;
    }
    virtio->isr |= isr_bit;
    pci_function_set_intx(&pci->function, true);
}

/* The ISR bits are there to be seen, or MSI-X has taken the pin's place. */
static void set_pin(struct virtio *virtio)
{
    struct virtio_pci *pci = pci_of(virtio);

    if (virtio->isr)
        pci_function_set_intx(&pci->function, !pci_msix_enabled(&pci->function));
}

/* A vector that does not exist reads back as none (4.1.5.1.2). */
static uint16_t vector_of(const struct virtio *virtio, uint64_t value)
{
    return value <= virtio->queue_count ? (uint16_t)value : NO_VECTOR;
}

static void queue_vector_reset(struct virtio *virtio, unsigned index)
{
    pci_of(virtio)->queue_vector[index] = NO_VECTOR;
}

static void device_reset(struct virtio *virtio)
{
    struct virtio_pci *pci = pci_of(virtio);

    for (unsigned i = 0; i < VIRTIO_QUEUES_MAX; i++)
        pci->queue_vector[i] = NO_VECTOR;
    pci->config_vector = NO_VECTOR;
    pci_function_set_intx(&pci->function, false);
}

/* ---- common configuration ---- */

static uint64_t queue_register_read(struct virtio *virtio, enum common_register reg)
{
    struct virtio_queue_registers *queue = virtio_queue_selected(virtio);

    if (!queue)
        return reg == COMMON_QUEUE_VECTOR ? NO_VECTOR : 0; /* size 0: no such queue */
    switch (reg) {
    case COMMON_QUEUE_SIZE:
        return queue->size;
    case COMMON_QUEUE_VECTOR:
        return pci_of(virtio)->queue_vector[virtio->queue_select];
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
        return virtio_queue_draining(queue);
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
        return virtio_device_features_read(virtio);
    case COMMON_DRIVER_FEATURE_SELECT:
        return virtio->driver_feature_select;
    case COMMON_DRIVER_FEATURE:
        return virtio_driver_features_read(virtio);
    case COMMON_CONFIG_VECTOR:
        return pci_of(virtio)->config_vector;
    case COMMON_NUM_QUEUES:
        return virtio->queue_count;
    case COMMON_STATUS:
        return virtio_status_read(virtio);
    case COMMON_GENERATION:
        return virtio->generation;
    case COMMON_QUEUE_SELECT:
        return virtio->queue_select;
    default:
        return queue_register_read(virtio, reg);
    }
}

static void queue_register_write(struct virtio *virtio, enum common_register reg, unsigned shift, unsigned size_bytes, uint64_t value)
{
    struct virtio_queue_registers *queue = virtio_queue_selected(virtio);

    if (!queue)
        return;
    switch (reg) {
    case COMMON_QUEUE_SIZE:
        virtio_queue_size_write(virtio, queue, value);
        break;
    case COMMON_QUEUE_VECTOR:
        pci_of(virtio)->queue_vector[virtio->queue_select] = vector_of(virtio, value);
        break;
    case COMMON_QUEUE_ENABLE:
        if (value == 1)
            virtio_queue_enable(virtio, queue);
        break;
    case COMMON_QUEUE_DESC:
        virtio_queue_address_write(queue, &queue->descriptors, shift, size_bytes, value);
        break;
    case COMMON_QUEUE_DRIVER:
        virtio_queue_address_write(queue, &queue->available, shift, size_bytes, value);
        break;
    case COMMON_QUEUE_DEVICE:
        virtio_queue_address_write(queue, &queue->used, shift, size_bytes, value);
        break;
    case COMMON_QUEUE_RESET:
        if (value == 1)
            virtio_queue_reset(virtio, queue);
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
        virtio_driver_features_write(virtio, (uint32_t)value);
        break;
    case COMMON_CONFIG_VECTOR:
        pci_of(virtio)->config_vector = vector_of(virtio, value);
        break;
    case COMMON_STATUS:
        virtio_status_write(virtio, (uint8_t)value);
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
    pci_function_set_intx(&pci_of(virtio)->function, false);
    return isr;
}

static uint64_t notify_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes)
{
    return 0;
}

static void notify_write(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    virtio_notify(virtio, offset / NOTIFY_MULTIPLIER);
}

#define NOTIFY_OFFSET 0x3000u

/* Each queue has a place of its own, so what is written does not matter. */
static bool doorbell(void *ctx, unsigned n, struct bus_doorbell *out)
{
    *out = (struct bus_doorbell){.offset = NOTIFY_OFFSET + n * NOTIFY_MULTIPLIER, .fd = virtio_doorbell_fd(ctx, n)};
    return out->fd >= 0;
}

static const struct structure {
    uint8_t cap_type;
    uint32_t offset, size;
    uint64_t (*read)(struct virtio *virtio, uint64_t offset, unsigned size_bytes);
    void (*write)(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value); /* NULL: read-only */
} structures[] = {
    {CAP_COMMON, 0x0000, COMMON_BYTES, common_read, common_write},
    {CAP_ISR, 0x1000, 4, isr_read, NULL},
    {CAP_DEVICE, 0x2000, VIRTIO_CONFIG_BYTES_MAX, virtio_config_space_read, virtio_config_space_write},
    {CAP_NOTIFY, NOTIFY_OFFSET, NOTIFY_MULTIPLIER * VIRTIO_QUEUES_MAX, notify_read, notify_write},
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
    .doorbell = doorbell,
};

/* ---- PCI ---- */

/* The PCI configuration access capability (4.1.4.9): a window for those who cannot reach BARs yet. */
static bool window_target(const struct virtio_pci *pci, unsigned offset, unsigned size_bytes, uint32_t *target, unsigned *length)
{
    const uint8_t *config = pci->function.config + pci->window;
    unsigned data = pci->window + CAP_WINDOW;
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
    struct virtio_pci *pci = pci_of(virtio);
    uint32_t target, value;
    unsigned length;

    if (!window_target(pci, offset, size_bytes, &target, &length))
        return;
    value = (uint32_t)registers_read(virtio, target, length);
    memcpy(pci->function.config + pci->window + CAP_WINDOW, &value, length);
}

static void config_written(void *device, unsigned offset, unsigned size_bytes)
{
    struct virtio *virtio = device;
    struct virtio_pci *pci = pci_of(virtio);
    uint32_t target, value = 0;
    unsigned length;

    if (window_target(pci, offset, size_bytes, &target, &length)) {
        memcpy(&value, pci->function.config + pci->window + CAP_WINDOW, length);
        registers_write(virtio, target, length, value);
        return;
    }
    /* The command register or MSI-X control may have changed: bus mastering may be on now, the pin may have gone out of use. */
    set_pin(virtio);
    if (offset < 6 && offset + size_bytes > 4)
        virtio_wake_all(virtio);
}

/* As after power-on: the fields that the guest may write are zero. */
static void window_reset(struct virtio_pci *pci)
{
    uint8_t *config = pci->function.config + pci->window;
    const uint8_t *mask = pci->function.write_mask + pci->window;

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
    struct virtio_pci *pci = pci_of(virtio);
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
        if (!pci_function_add_capability(&pci->function, PCI_CAP_VENDOR, cap.length, &cap.length, NULL))
            return -ENOSPC;
    }
    cap = (struct virtio_cap){.length = sizeof(cap), .type = CAP_PCI};
    mask.bar = 0xFF;
    mask.offset = mask.size = mask.extra = UINT32_MAX;
    pci->window = pci_function_add_capability(&pci->function, PCI_CAP_VENDOR, cap.length, &cap.length, &mask.length);
    return pci->window ? 0 : -ENOSPC;
}

static void destroy(struct virtio *virtio)
{
    struct virtio_pci *pci = pci_of(virtio);

    pci_function_unregister(&pci->function);
    free(pci);
    virtio->link = NULL;
}

static int create(struct virtio *virtio, const struct virtio_config *config)
{
    const struct pci_identity identity = {
        .vendor = VIRTIO_PCI_VENDOR,
        .device = (uint16_t)(VIRTIO_PCI_DEVICE_BASE + virtio->ops->device_id),
        .subsystem_vendor = VIRTIO_PCI_VENDOR,
        .subsystem = (uint16_t)(VIRTIO_PCI_DEVICE_BASE + virtio->ops->device_id),
        .class_code = virtio->ops->class_code,
        .revision = 1, /* 4.1.2.1 */
        .has_intx = true,
    };
    struct virtio_pci *pci = calloc(1, sizeof(*pci));
    int ret;

    if (!pci)
        return -ENOMEM;
    virtio->link = pci;
    ret = pci_function_register(virtio->host->pci, &pci->function, config->slot, &identity, &function_ops, virtio);
    if (ret < 0)
        return ret;
    device_reset(virtio);
    pci_function_set_bar(&pci->function, REGISTERS_BAR, PCI_BAR_MEM64, REGISTERS_BAR_BYTES, &registers_ops, virtio);
    ret = pci_msix_create(&pci->function, config->queue_count + 1, MSIX_BAR);
    return ret ? ret : add_capabilities(virtio);
}

static void reset(struct virtio *virtio)
{
    struct virtio_pci *pci = pci_of(virtio);

    window_reset(pci);
    pci_function_reset(&pci->function);
}

static bool bus_master(const struct virtio *virtio)
{
    return pci_function_bus_master(&pci_of(virtio)->function);
}

static void state(struct virtio *virtio, struct state_io *io)
{
    struct virtio_pci *pci = pci_of(virtio);

    pci_function_state(&pci->function, io);
    state_u16(io, &pci->config_vector);
    for (unsigned i = 0; i < virtio->queue_count; i++)
        state_u16(io, &pci->queue_vector[i]);
    if (!state_loading(io))
        return;
    pci->config_vector = vector_of(virtio, pci->config_vector);
    for (unsigned i = 0; i < virtio->queue_count; i++)
        pci->queue_vector[i] = vector_of(virtio, pci->queue_vector[i]);
}

const struct virtio_transport virtio_pci_transport = {
    .create = create,
    .destroy = destroy,
    .reset = reset,
    .device_reset = device_reset,
    .queue_reset = queue_vector_reset,
    .interrupt = interrupt,
    .bus_master = bus_master,
    .state = state,
    .loaded = set_pin,
};
