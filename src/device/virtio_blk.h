/*
 * virtio-blk: configuration of a disk (virtio 1.2, section 5.2).
 */
#ifndef DOPPEL_DEVICE_VIRTIO_BLK_H
#define DOPPEL_DEVICE_VIRTIO_BLK_H

#include "block/block.h"
#include "device/device.h"
#include "util/token_bucket.h"

#define VIRTIO_BLK_SERIAL_BYTES 20 /* longer ones are cut */
#define VIRTIO_BLK_QUEUES_MAX 16

struct virtio_blk_config {
    struct block *block; /* borrowed; outlives the device. Read-only when it is */
    const char *serial;  /* what /dev/disk/by-id shows; may be NULL */
    bool unsafe;         /* flushes cost nothing and keep nothing: none are offered, none are made */
    unsigned queues;     /* request queues, usually one per processor; clamped to 1..VIRTIO_BLK_QUEUES_MAX */
    const struct rate_limit_config *limit; /* of all queues together; NULL: none */
    int slot;            /* PCI slot, -1: the next free one */
};

/* Another medium, or the same one with another size: the driver is told. Nothing is in flight; the old back end is the caller's again. */
void virtio_blk_set_block(struct device *device, struct block *block);
/* The same medium by another way (an overlay): the driver notices nothing. Nothing is in flight. */
void virtio_blk_exchange(struct device *device, struct block *block);
/* Changes the limit; NULL leaves one as it is. Device lock held. */
void virtio_blk_set_limit(struct device *device, const struct bucket_config *bandwidth, const struct bucket_config *ops);

#endif
