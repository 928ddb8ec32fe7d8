/*
 * virtio-vsock: stream sockets between the guest and Unix sockets of the host (Virtual I/O Device specification 1.2, section 5.10).
 *
 * A program of the host connects to `path`, writes "CONNECT <port>\n" and reads "OK <its port>\n" once the guest has accepted; the guest's connections to
 * CID 2, port P go to the Unix socket `path`_P.
 */
#ifndef DOPPEL_DEVICE_VIRTIO_VSOCK_H
#define DOPPEL_DEVICE_VIRTIO_VSOCK_H

#include <stdint.h>

/* Of `path`, so that "_" and a port behind it still fit a Unix socket's address. */
#define VIRTIO_VSOCK_PATH_MAX 96u
#define VIRTIO_VSOCK_CID_MIN 3u /* 5.10.4: the others are reserved, as is the last */
#define VIRTIO_VSOCK_CID_MAX 0xFFFFFFFEu

struct virtio_vsock_config {
    uint32_t cid;     /* the guest's */
    const char *path; /* borrowed for the time of create */
    int slot;         /* PCI slot, -1: the next free one */
};

struct virtio_vsock_counters {
    uint64_t connections;                  /* established since the start */
    uint64_t refused;                      /* nobody listens, no room, or not a request at all */
    uint64_t to_guest_bytes, to_host_bytes;
    uint64_t violations;                   /* connections ended because the guest sent more than it was allowed to, or out of order */
    unsigned open;
};

struct device;
void virtio_vsock_get_counters(const struct device *device, struct virtio_vsock_counters *counters);

#endif
