/*
 * virtio-rng: configuration of the entropy device (virtio 1.2, section 5.4).
 */
#ifndef DOPPEL_DEVICE_VIRTIO_RNG_H
#define DOPPEL_DEVICE_VIRTIO_RNG_H

#include "device/device.h"
#include "util/token_bucket.h"

struct virtio_rng_config {
    const struct rate_limit_config *limit; /* NULL: none */
    int slot; /* PCI slot, -1: the next free one */
};

#endif
