/*
 * Places for memory-mapped virtio devices (virtio 1.2, section 4.2): windows of one page each, one behind the other, and their interrupt lines. A machine without PCI
 * has one of these; devices take the next place when they are created. Lines beyond the last are shared from the first shared one on.
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_MMIO_H
#define DOPPEL_DEVICE_VIRTIO_MMIO_H

#include <stdint.h>

#include "chipset/bus.h"
#include "chipset/irq.h"

#define VIRTIO_MMIO_WINDOW_BYTES 0x1000u
#define VIRTIO_MMIO_LINES_MAX 24

struct virtio_mmio_host {
    struct bus *bus;
    uint64_t base;         /* of the first window */
    unsigned places;       /* how many devices there can be */
    struct irq_line line[VIRTIO_MMIO_LINES_MAX]; /* active high, level */
    unsigned line_count;   /* 1 or more */
    unsigned shared_first; /* devices that find none of their own share line[shared_first] to the last */
    /* Its own: zero at first. */
    unsigned device_count;
    unsigned asserted[VIRTIO_MMIO_LINES_MAX]; /* how many devices pull each line */
};

/* Index into `line` of a device, by its place. */
static inline unsigned virtio_mmio_line(const struct virtio_mmio_host *host, unsigned place)
{
    if (place < host->line_count)
        return place;
    return host->shared_first + (place - host->line_count) % (host->line_count - host->shared_first);
}

static inline uint64_t virtio_mmio_address(const struct virtio_mmio_host *host, unsigned place)
{
    return host->base + (uint64_t)place * VIRTIO_MMIO_WINDOW_BYTES;
}

#endif
