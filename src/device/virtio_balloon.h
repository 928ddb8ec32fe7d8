/*
 * virtio-balloon: memory taken from the guest and given back to the host (virtio 1.2, section 5.5).
 *
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_BALLOON_H
#define DOPPEL_DEVICE_VIRTIO_BALLOON_H

#include <stdbool.h>
#include <stdint.h>

#include "device/device.h"

struct virtio_balloon_config {
    uint32_t target_pages; /* of 4 KiB, what the balloon should hold from the start */
    bool deflate_on_oom, hinting, reporting, statistics;
    uint32_t statistics_interval_s; /* with `statistics`; 0: none until it is changed */
    int slot;                       /* PCI slot, -1: the next free one */
};

/* 5.5.6.4: tags of memory statistics, the later ones from virtio 1.3. */
#define VIRTIO_BALLOON_STATS 16u

struct virtio_balloon_status {
    uint32_t target_pages, actual_pages; /* wanted by us; held, as the driver says */
    uint64_t discarded_bytes;            /* given back to the host so far, again and again counted */
    uint32_t statistics_interval_s;
    uint16_t known;                        /* one bit a tag: the driver has told it */
    uint64_t statistic[VIRTIO_BALLOON_STATS]; /* by tag; memory in bytes */
    uint32_t host_command, guest_command;  /* 5.5.6.5: ids of free page hinting; 0 stop, 1 done */
};

void virtio_balloon_status(const struct device *balloon, struct virtio_balloon_status *status);
/* Inflates or deflates to that size: the driver is told and does what it can. */
void virtio_balloon_resize(struct device *balloon, uint32_t target_pages);
/* A device made with statistics only; the first ones come at once. 0: none any more. */
void virtio_balloon_set_interval(struct device *balloon, uint32_t seconds);
/*
 * Asks for a round of free page hinting, of a device made with it. The driver keeps the pages that it hints to itself until the round is done: when it has told all and
 * `acknowledge` is true, or by virtio_balloon_hint_done.
 */
void virtio_balloon_hint(struct device *balloon, bool acknowledge);
void virtio_balloon_hint_done(struct device *balloon);

#endif
