/*
 * Between the device status machine (virtio.c) and its transports (virtio_pci.c, virtio_mmio.c). Register numbers, vectors and interrupt lines are the transport's; status, features,
 * queues and the ISR bits are virtio.c's. Never included outside this folder. Threading: with the device lock held.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_PRIV_H
#define DOPPEL_DEVICE_VIRTIO_PRIV_H

#include "device/virtio.h"

/* 2.1: device status. */
#define STATUS_ACKNOWLEDGE 0x01u
#define STATUS_DRIVER 0x02u
#define STATUS_DRIVER_OK 0x04u
#define STATUS_FEATURES_OK 0x08u
#define STATUS_NEEDS_RESET 0x40u
#define STATUS_FAILED 0x80u

#define ISR_QUEUE 1u
#define ISR_CONFIG 2u
#define QUEUE_NONE UINT32_MAX /* an interrupt that is not a queue's */

struct virtio_transport {
    /* Makes the device reachable and fills virtio->link. What it leaves behind on failure `destroy` takes away; link NULL: nothing. */
    int (*create)(struct virtio *virtio, const struct virtio_config *config);
    void (*destroy)(struct virtio *virtio);
    /* The machine's reset, after the device's. */
    void (*reset)(struct virtio *virtio);
    /* The driver reset the device, or one queue: vectors are forgotten, the line goes down. */
    void (*device_reset)(struct virtio *virtio);
    void (*queue_reset)(struct virtio *virtio, unsigned index);
    /* An interrupt for `queue`, or a configuration change (QUEUE_NONE); isr_bit is set in virtio->isr where the transport shows it. */
    void (*interrupt)(struct virtio *virtio, uint8_t isr_bit, unsigned queue);
    bool (*bus_master)(const struct virtio *virtio);
    /* Fields inside the caller's section, before virtio.c's. */
    void (*state)(struct virtio *virtio, struct state_io *io);
    /* virtio->isr was loaded: the line follows it. */
    void (*loaded)(struct virtio *virtio);
};

extern const struct virtio_transport virtio_pci_transport, virtio_mmio_transport;

/* ---- what registers of both transports do ---- */

uint32_t virtio_device_features_read(const struct virtio *virtio);
uint32_t virtio_driver_features_read(const struct virtio *virtio);
void virtio_driver_features_write(struct virtio *virtio, uint32_t value);
uint8_t virtio_status_read(struct virtio *virtio);
void virtio_status_write(struct virtio *virtio, uint8_t value);
/* NULL: the driver selected a queue that does not exist. */
struct virtio_queue_registers *virtio_queue_selected(struct virtio *virtio);
void virtio_queue_size_write(struct virtio *virtio, struct virtio_queue_registers *queue, uint64_t value);
/* Replaces `size_bytes` bytes at byte `shift` of one of the queue's three addresses, unless it is enabled. */
void virtio_queue_address_write(struct virtio_queue_registers *queue, uint64_t *address, unsigned shift, unsigned size_bytes, uint64_t value);
void virtio_queue_enable(struct virtio *virtio, struct virtio_queue_registers *queue);
/* Stops one queue; `draining` stays set while chains of it are in flight. */
void virtio_queue_stop(struct virtio *virtio, struct virtio_queue_registers *queue);
/* 2.6.1: as asked for by a queue reset register, if that feature was agreed on. */
void virtio_queue_reset(struct virtio *virtio, struct virtio_queue_registers *queue);
bool virtio_queue_draining(struct virtio_queue_registers *queue);
uint64_t virtio_config_space_read(struct virtio *virtio, uint64_t offset, unsigned size_bytes);
void virtio_config_space_write(struct virtio *virtio, uint64_t offset, unsigned size_bytes, uint64_t value);
/* The driver's doorbell; queues that do not exist are ignored. */
void virtio_notify(struct virtio *virtio, uint64_t index);
/* An eventfd that does the same when it is counted up; -1: notifications of this device are to come by themselves. */
int virtio_doorbell_fd(struct virtio *virtio, unsigned index);
void virtio_wake_all(struct virtio *virtio);

#endif
