/*
 * virtio-net: configuration of the network device (Virtual I/O Device specification 1.2, section 5.1).
 */
#ifndef DOPPEL_DEVICE_VIRTIO_NET_H
#define DOPPEL_DEVICE_VIRTIO_NET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/token_bucket.h"

struct net_server;

/* Everything pointed to is borrowed for the time of create. */
struct virtio_net_config {
    const char *net;     /* the back end's spec, see net_open: "user,forward=tcp:2222:22" */
    const char *machine; /* the machine's name or identity, for the default MAC address; may be NULL */
    unsigned mtu;        /* told to the driver; 0: the back end's, if it says one */
    unsigned index;      /* of this NIC in its machine: 0, 1, ... */
    const struct rate_limit_config *receive, *transmit; /* NULL: no limit */
    const struct net_server *server; /* in front of the back end; NULL: none */
    int *given;          /* struct net_client's; NULL: none */
    int slot;            /* PCI slot, -1: the next free one */
};

struct virtio_net_counters {
    uint64_t rx_frames, rx_bytes, tx_frames, tx_bytes; /* without virtio headers */
    uint64_t rx_no_driver;  /* arrived while no driver was running */
    uint64_t rx_filtered;   /* for other stations */
    uint64_t rx_no_room;    /* larger than the driver's receive buffers can ever be */
    uint64_t rx_unsuitable; /* with an offload that the driver did not negotiate */
    uint64_t rx_limited, tx_limited; /* how often a frame had to wait for the rate limit */
    uint64_t tx_malformed;  /* without a whole header and address, or too long */
};

struct device;
void virtio_net_get_counters(const struct device *device, struct virtio_net_counters *counters);

/* Changes the limit of what the guest receives or transmits; NULL leaves one as it is. Device lock held. */
void virtio_net_set_limit(struct device *device, bool receive, const struct bucket_config *bandwidth, const struct bucket_config *ops);

/*
 * Tells the network that the guest's address is here now, so that switches send its frames this way: a broadcast from that address, a reverse ARP request that asks for
 * nothing (RFC 903). Only where there is an interface of the host. Loop's thread.
 */
void virtio_net_announce(struct device *device);

/* What waits for the guest at a device whose guest goes elsewhere (net_take), and that at the device it has gone to (net_give). Loop's thread. */
#define VIRTIO_NET_FRAME_BYTES_MAX (NET_HEADER_BYTES + NET_FRAME_BYTES_MAX)
size_t virtio_net_take(struct device *device, void *frame, size_t size_bytes);
void virtio_net_give(struct device *device, const void *frame, size_t size_bytes);

/*
 * The address used when the spec has no mac=: 52:54:00 and 24 bits of a hash, the same for the same machine, host interface and index. The interface (NULL:
 * none) is in it because machines that boot the same kernel may meet on one bridge.
 */
void virtio_net_default_mac(uint8_t mac[6], const char *machine, const char *interface, unsigned index);

/* Another permanent address. The driver has it from its next start on, and until then the old one. Device lock held. */
void virtio_net_set_mac(struct device *device, const uint8_t mac[6]);

#endif
