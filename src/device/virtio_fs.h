/*
 * virtio-fs: configuration of a shared directory (virtio 1.2, section 5.11).
 */
#ifndef DOPPEL_DEVICE_VIRTIO_FS_H
#define DOPPEL_DEVICE_VIRTIO_FS_H

#include "device/device.h"
#include "fs/fs.h"

#define VIRTIO_FS_TAG_BYTES 36 /* the longest */
#define VIRTIO_FS_QUEUES_MAX 8

struct virtio_fs_config {
    struct fs_config fs;
    const char *tag; /* what the guest mounts it by */
    bool at_once;    /* vCPU threads may touch files: quick requests are served on the thread that makes them */
    unsigned queues; /* request queues; clamped to 1..VIRTIO_FS_QUEUES_MAX */
    int slot;        /* PCI slot, -1: the next free one */
};

#endif
