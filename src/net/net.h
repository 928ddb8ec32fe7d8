/*
 * Network back ends: where a NIC's frames go. Back ends stack behind this one interface.
 *
 * Frames carry the virtio-net header (struct virtio_net_hdr_v1, 12 bytes, little endian) in front, so that checksum and segmentation offloads pass through to back ends that
 * understand them (tap with IFF_VNET_HDR); others finish the checksum and cut the segments in software (offload.h).
 * Threading: net_transmit, net_resume and every callback on the loop's thread; the rest also elsewhere with the device lock held.
 */
#ifndef DOPPEL_NET_NET_H
#define DOPPEL_NET_NET_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "util/error.h"
#include "util/loop.h"

#define NET_HEADER_BYTES 12u
#define NET_FRAME_BYTES_MAX 65550u /* a 64 KiB segment with its Ethernet header, without the virtio header */

struct net;

struct net_client {
    /* A frame for the guest, virtio header first, in at most 4 vectors. Returns false when the guest has no buffer: the back end keeps or drops it and waits for net_resume. */
    bool (*receive)(void *ctx, const struct iovec *iov, unsigned iov_count);
    /* The link went up or down. Optional. */
    void (*link)(void *ctx, bool up);
    /* After net_transmit returned false: the back end takes frames again. Optional. */
    void (*writable)(void *ctx);
    void *ctx;
    int *given; /* net_acquire's descriptor; -1 once the back end has taken it over. NULL: it opens for itself */
};

/* `spec` is the --net option's text: "user,forward=tcp:8080:80,forward=udp::5353:53", "tap:tap0", "none". */
int net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err) __attribute__((warn_unused_result));
/* Opens what such a back end needs of the host, where net_open's thread may not and the caller's has a broker (sandbox/broker.h). `fd`: the caller's; -1: it needs nothing. */
int net_acquire(const char *spec, int *fd, struct error *err) __attribute__((warn_unused_result));
/* Only checks the spec's syntax, for --config and --help. */
int net_check(const char *spec, struct error *err) __attribute__((warn_unused_result));
void net_close(struct net *net);
/* Begins to load, aside, what user networking needs. */
void net_load_ahead(void);

/* A frame from the guest, virtio header first; copied or consumed before returning. Returns false when the back end is full: try again after `writable`. */
bool net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count);
/* The guest has receive buffers again. */
void net_resume(struct net *net);
/* A frame that waits for the guest in the host, virtio header first, for who moves the guest elsewhere. Its bytes, at most `size_bytes`; longer ones are lost. 0: none waits. */
size_t net_take(struct net *net, void *frame, size_t size_bytes);
/* A frame that waited elsewhere: to the guest, or copied until net_resume. Too many are lost. */
void net_give(struct net *net, const void *frame, size_t size_bytes);
/* What the guest negotiated: may receive frames with partial checksums / TSO4 / TSO6 / UFO set in their header, and mergeable buffers' sizes. */
struct net_offloads {
    bool checksum, tso4, tso6, ecn, ufo;
};
void net_set_offloads(struct net *net, const struct net_offloads *offloads);

/* What is known about an open back end, for the NIC in front of it and for statistics. */
struct net_info {
    const char *kind;             /* "user", "tap", "none" */
    const char *interface;        /* the host's interface behind it, as long as it is open: "tap0"; NULL: none */
    bool link_up;                 /* when it was opened; changes come through client->link */
    bool has_mac;                 /* the spec's mac= option */
    uint8_t mac[6];
    uint16_t mtu;                 /* the spec's mtu= option; 0: none given */
    struct net_offloads receive;  /* what it can make use of in net_set_offloads */
    uint64_t dropped_from_guest;  /* frames that were malformed or that the host refused */
    uint64_t dropped_to_guest;    /* frames lost because the guest had no buffers for too long */
};
void net_get_info(const struct net *net, struct net_info *info);

/* ---- a server inside ---- */

/* `data` comes from malloc and is taken over; NULL: the connection is reset. `close`: after it nothing is read any more. */
struct net_reply {
    char *data;
    size_t size_bytes;
    bool close;
};

/* Named as clients of the metrics know them. */
#define NET_SERVER_COUNTERS(X)                                                                                                                \
    X(rx_accepted)         /* frames for the server */                                                                                        \
    X(rx_accepted_err)     /* of these: malformed */                                                                                          \
    X(rx_accepted_unusual) /* of these: no TCP, for another port, of no connection, fragments */                                              \
    X(rx_bad_eth)          /* of these: ARP that is none */                                                                                   \
    X(rx_count)            /* segments taken */                                                                                               \
    X(tx_bytes) X(tx_frames) X(tx_count) /* given to the guest; tx_count: segments */                                                         \
    X(tx_errors)           /* lost because the guest had no buffers */                                                                        \
    X(connections_created) X(connections_destroyed)

struct net_server_counters {
#define NET_SERVER_COUNTER(name) uint64_t name;
    NET_SERVER_COUNTERS(NET_SERVER_COUNTER)
#undef NET_SERVER_COUNTER
};

/*
 * A host on the guest's network that is in this process: an IPv4 address with one TCP port. ARP for it and IPv4 to it do not reach the back end, and nothing that the back end
 * receives comes from that address. All that a guest can make it keep is bounded.
 */
struct net_server {
    uint8_t address[4];
    uint16_t port;
    /*
     * Looks at what has come on a connection and returns how many bytes of it are a request, which *reply answers; 0: more must come first. `full`: no more will be kept, so 0 resets
     * the connection. On the loop's thread; the next call for a connection comes when its reply has arrived.
     */
    size_t (*serve)(void *ctx, const char *data, size_t size_bytes, bool full, struct net_reply *reply);
    void *ctx;
    struct net_server_counters *counters; /* may be shared by several; loop's thread */
};

/* Puts the server in front of an open back end, which *net takes the place of from then on. Copies `server`. -ENOMEM: nothing has changed. */
int net_serve(struct net **net, const struct net_server *server) __attribute__((warn_unused_result));

#endif
