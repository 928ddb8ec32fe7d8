/*
 * A guest's virtio driver for tests: finds a device over PCI or at its memory-mapped registers, negotiates, sets up rings in guest memory and uses them.
 * Registers are named as in the PCI transport (C_*); for memory-mapped devices common_read and common_write translate.
 */
#ifndef DOPPEL_TESTS_GUEST_DRIVER_H
#define DOPPEL_TESTS_GUEST_DRIVER_H

#include <stdbool.h>
#include <stdint.h>

#include "chipset/chipset.h"
#include "device/device.h"
#include "device/virtio_mmio.h"

#define GUEST_RAM_BYTES (16ull << 20)
#define GUEST_QUEUES 8

#define F_INDIRECT_DESC (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)
#define F_RING_RESET (1ull << 40)

enum { STATUS_ACK = 1, STATUS_DRIVER = 2, STATUS_DRIVER_OK = 4, STATUS_FEATURES_OK = 8, STATUS_NEEDS_RESET = 64 };

enum {
    C_DEVICE_FEATURE_SELECT = 0x00,
    C_DEVICE_FEATURE = 0x04,
    C_DRIVER_FEATURE_SELECT = 0x08,
    C_DRIVER_FEATURE = 0x0C,
    C_CONFIG_VECTOR = 0x10,
    C_NUM_QUEUES = 0x12,
    C_STATUS = 0x14,
    C_GENERATION = 0x15,
    C_QUEUE_SELECT = 0x16,
    C_QUEUE_SIZE = 0x18,
    C_QUEUE_VECTOR = 0x1A,
    C_QUEUE_ENABLE = 0x1C,
    C_QUEUE_NOTIFY_OFF = 0x1E,
    C_QUEUE_DESC = 0x20,
    C_QUEUE_DRIVER = 0x28,
    C_QUEUE_DEVICE = 0x30,
    C_QUEUE_RESET = 0x3A,
};

struct guest_desc {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

struct guest;

struct guest_queue {
    struct guest *guest;
    unsigned index, size;
    gpa_t desc_gpa, avail_gpa, used_gpa;
    struct guest_desc *desc;
    uint16_t *avail; /* flags, index, ring, used_event */
    uint16_t *used;  /* flags, index, ring of two words, avail_event */
    uint16_t next_desc, next_used;
    bool indirect, event_index;
};

struct guest_buffer {
    gpa_t gpa;
    uint32_t length;
    bool writable;
};

struct guest {
    struct bus *bus;
    struct pci_host *pci;
    struct physmap *memory;
    struct loop *loop;
    struct device_host host;
    struct msi_target msi;
    unsigned messages[64]; /* MSIs, by data */
    bool intx[4];
    bool mmio; /* the transport */
    struct virtio_mmio_host mmio_host;
    /* The device under test. */
    unsigned slot;
    uint64_t common, notify, isr, config; /* bus addresses */
    uint32_t multiplier;
    gpa_t next_page;
    uint64_t features;
    struct guest_queue queue[GUEST_QUEUES];
};

#define GUEST_MMIO_BASE 0xD0000000ull
#define GUEST_MMIO_PLACES 4

void guest_init(struct guest *g);      /* a machine with PCI */
void guest_init_mmio(struct guest *g); /* one without; intx[] are its devices' lines 0..2, the last one shared */
void guest_fini(struct guest *g);
/* BARs assigned, bus mastering on, structures found. Memory-mapped: the device that was made last. */
void guest_attach(struct guest *g, unsigned slot);
uint8_t guest_take_isr(struct guest *g); /* reads the interrupt status and acknowledges it */

uint32_t guest_config_read(struct guest *g, unsigned offset, unsigned size);
void guest_config_write(struct guest *g, unsigned offset, unsigned size, uint32_t value);
uint64_t common_read(struct guest *g, unsigned offset, unsigned size);
void common_write(struct guest *g, unsigned offset, unsigned size, uint64_t value);

void guest_enable_msix(struct guest *g, unsigned vectors); /* vector v sends data v */
uint64_t guest_offered(struct guest *g);
/* Up to FEATURES_OK; false when the device refuses. */
bool guest_negotiate(struct guest *g, uint64_t features);
void guest_queue_setup(struct guest *g, unsigned index, unsigned size, unsigned vector);
void guest_driver_ok(struct guest *g);
/* All of it. */
void guest_start(struct guest *g, uint64_t features, unsigned queues);
void guest_device_reset(struct guest *g); /* and waits until the device says so */

gpa_t guest_alloc(struct guest *g, uint64_t bytes); /* zeroed pages */
void *guest_at(struct guest *g, gpa_t gpa, uint64_t bytes);
void guest_run(struct guest *g); /* rounds of the loop until nothing is due */

/* Makes a chain available; returns its head. */
uint16_t guest_add(struct guest_queue *q, const struct guest_buffer *buffers, unsigned count);
void guest_publish(struct guest_queue *q, uint16_t head); /* only the available ring */
void guest_kick(struct guest_queue *q);
/* Whether the device wants to know of the buffers that were added last (virtio 1.2, 2.7.10). */
bool guest_kick_is_wanted(const struct guest_queue *q);
bool guest_has_used(struct guest_queue *q);
void guest_wait_used(struct guest_queue *q);
uint32_t guest_take_used(struct guest_queue *q, uint16_t *head); /* its length */

#endif
