/*
 * virtio-pmem: a file of the host as the guest's persistent memory (virtio 1.2, section 5.19).
 *
 * PhysMap has the file's bytes where the guest sees them; this device says where, and flushes.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_PMEM_H
#define DOPPEL_DEVICE_VIRTIO_PMEM_H

#include "block/block.h"
#include "device/device.h"
#include "util/token_bucket.h"

struct virtio_pmem_config {
    struct block *block; /* the file, for flushing; borrowed */
    gpa_t start;
    uint64_t size_bytes;
    const struct rate_limit_config *limit; /* of flushes, each of the whole size; NULL: none */
    int slot; /* PCI slot, -1: the next free one */
};

/* Changes the limit; NULL leaves one as it is. Device lock held. */
void virtio_pmem_set_limit(struct device *device, const struct bucket_config *bandwidth, const struct bucket_config *ops);

#endif
