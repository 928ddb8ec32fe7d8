/*
 * virtio-mem: memory that the guest plugs and unplugs by blocks, as it is asked to (virtio 1.2, section 5.15).
 *
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_MEM_H
#define DOPPEL_DEVICE_VIRTIO_MEM_H

#include "device/device.h"

struct virtio_mem_config {
    gpa_t start; /* PhysMap's pluggable memory */
    uint64_t region_bytes, block_bytes;
    /* The driver unplugs: virtio_mem_unplug is to be called as soon as no vCPU runs and nothing is in flight. */
    void (*unplug)(void *ctx);
    void *ctx;
    int slot; /* PCI slot, -1: the next free one */
};

struct virtio_mem_status {
    uint64_t plugged_bytes, requested_bytes;
};

void virtio_mem_status(const struct device *mem, struct virtio_mem_status *status);
/* Tells the driver how much it should have; a multiple of the block size up to the region's. */
void virtio_mem_request(struct device *mem, uint64_t requested_bytes);
/* Does what the driver waits for. True: engines must forget what they know of addresses. */
bool virtio_mem_unplug(struct device *mem);

#endif
