/*
 * virtio devices (virtio 1.2, section 2): the device status machine, features and queues. How a driver reaches them, over PCI or as memory-mapped registers, is
 * the machine's choice (struct device_host) and hidden from devices.
 *
 * A device fills a `struct virtio_device_ops`, embeds a `struct virtio`, and gets its queues served on the loop's thread: a driver's notification on a
 * vCPU's thread only marks the queue and wakes the loop. Everything runs with the device lock held.
 *
 * Life of a device: driver resets (status 0) -> acknowledges features (features_set) -> sets up queues -> DRIVER_OK (ready) ->
 * queue_notify ... -> reset. Chains in flight at a reset are detached (virtqueue.h): the device pushes them when their work has ended, and
 * the driver sees the reset as complete only then.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_H
#define DOPPEL_DEVICE_VIRTIO_H

#include <stdbool.h>
#include <stdint.h>

#include "device/device.h"
#include "device/virtqueue.h"
#include "util/loop.h"

#define VIRTIO_QUEUES_MAX 64u
#define VIRTIO_CONFIG_BYTES_MAX 256u

struct virtio_device_ops {
    const char *name;      /* for logs: "virtio-blk" */
    uint16_t device_id;    /* virtio 1.2, section 5: 1 net, 2 block, 3 console, 4 entropy */
    uint32_t class_code;   /* PCI class, 24 bits */
    unsigned config_bytes; /* size of the device configuration, at most VIRTIO_CONFIG_BYTES_MAX */
    /* Device configuration space, little endian. Bytes outside config_bytes are handled by the transport (read 0, dropped). Each call is 1, 2, 4 or 8 bytes long. */
    void (*config_read)(void *device, unsigned offset, void *data, unsigned size_bytes);
    void (*config_write)(void *device, unsigned offset, const void *data, unsigned size_bytes); /* NULL: read-only */
    /* The driver's features were accepted (FEATURES_OK). Optional. */
    void (*features_set)(void *device, uint64_t features);
    /* DRIVER_OK was set, or state was loaded with it set: queues may be popped. Optional. */
    void (*ready)(void *device);
    /* On the loop's thread: the driver notified this queue. Called for enabled queues after DRIVER_OK only. */
    void (*queue_notify)(void *device, unsigned index);
    /* For devices with threads of their own: the driver notified this queue, on the vCPU's thread. Instead of queue_notify, which then only follows other wake-ups. Optional. */
    void (*queue_kick)(void *device, unsigned index);
    /* The driver reset the device: forget requests that are only queued inside the device; those in flight end by a push of their detached chains. Optional. */
    void (*reset)(void *device);
};

struct virtio_queue_registers {
    struct virtqueue *ring;
    uint16_t size;
    bool enabled;
    bool draining; /* was reset by the driver and has chains in flight */
    _Atomic bool notified;
    uint64_t descriptors, available, used;
};

struct virtio {
    const struct device_host *host;
    const struct virtio_device_ops *ops;
    void *device;
    const struct virtio_transport *transport; /* virtio_priv.h; NULL: not set up */
    void *link;                               /* the transport's own */
    uint64_t device_features, features; /* offered (with the transport's own), accepted */
    uint32_t device_feature_select, driver_feature_select;
    uint64_t driver_features;
    uint16_t queue_select;
    uint8_t status, generation, isr;
    uint8_t draining_status; /* what status reads as while a reset waits for chains in flight, see virtio.c */
    unsigned queue_count, queue_size_max;
    struct virtio_queue_registers *queue;
    struct loop_event *wake;
    struct virtio_doorbell *doorbell; /* by queue; NULL: nobody has asked for one */
};

struct virtio_config {
    uint64_t features;    /* the device's own; VERSION_1, EVENT_IDX, INDIRECT_DESC and RING_RESET are added */
    unsigned queue_count; /* 1..VIRTIO_QUEUES_MAX */
    unsigned queue_size;  /* largest ring, power of two up to VIRTQUEUE_SIZE_MAX */
    int slot;             /* PCI slot, -1: any; memory-mapped devices are placed in order */
};

/* Puts the device where drivers find it. `virtio` is zeroed memory inside the device's structure and stays where it is. */
int virtio_init(struct virtio *virtio, const struct device_host *host, const struct virtio_device_ops *ops, void *device,
                    const struct virtio_config *config, struct error *err) __attribute__((warn_unused_result));
/* Nothing may be in flight any more. Also after a failed or missing init of zeroed memory. */
void virtio_fini(struct virtio *virtio);
/* The machine's reset: also the transport (PCI configuration space). Calls ops->reset. */
void virtio_reset(struct virtio *virtio);

static inline struct virtqueue *virtio_queue(struct virtio *virtio, unsigned index)
{
    return virtio->queue[index].ring;
}

static inline bool virtio_has_feature(const struct virtio *virtio, unsigned bit)
{
    return virtio->features >> bit & 1;
}

/* DRIVER_OK is set, NEEDS_RESET is not, and the device may master the bus. */
bool virtio_ready(const struct virtio *virtio);
/* Calls ops->queue_notify for this queue later, on the loop's thread. Any thread. */
void virtio_wake_queue(struct virtio *virtio, unsigned index);
/* The device configuration changed: new generation and a configuration interrupt. */
void virtio_config_changed(struct virtio *virtio);
/* The device cannot go on until the driver resets it. */
void virtio_needs_reset(struct virtio *virtio, const char *reason);
/* Chains out in any queue, detached ones included. */
bool virtio_in_use(const struct virtio *virtio);

/* Transport and queues, inside the caller's section; calls ops->ready when loading a running device, and wakes all queues. */
void virtio_state(struct virtio *virtio, struct state_io *io);

#endif
