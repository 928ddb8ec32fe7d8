/*
 * virtio-blk: configuration of a disk (virtio 1.2, section 5.2).
 */
#ifndef DOPPEL_DEVICE_VIRTIO_BLK_H
#define DOPPEL_DEVICE_VIRTIO_BLK_H

#include "block/block.h"
#include "device/device.h"

#define VIRTIO_BLK_SERIAL_BYTES 20 /* longer ones are cut */
#define VIRTIO_BLK_QUEUES_MAX 16

struct virtio_blk_config {
    struct block *block; /* borrowed; outlives the device. Read-only when it is */
    const char *serial;  /* what /dev/disk/by-id shows; may be NULL */
    bool unsafe;         /* flushes cost nothing and keep nothing: none are offered, none are made */
    unsigned queues;     /* request queues, usually one per processor; clamped to 1..VIRTIO_BLK_QUEUES_MAX */
    int slot;            /* PCI slot, -1: the next free one */
};

#endif
