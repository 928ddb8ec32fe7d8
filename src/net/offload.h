/*
 * Checksum and segmentation in software, for back ends that take plain Ethernet frames only.
 *
 * A guest that negotiated VIRTIO_NET_F_CSUM and VIRTIO_NET_F_HOST_TSO4/6 leaves the transport checksum partial and hands over TCP segments of
 * up to 64 KiB; the virtio header says what is left to do (virtio 1.2, 5.1.6.2). Everything in header and frame is the guest's and not trusted.
 * Threading: pure functions.
 */
#ifndef DOPPEL_NET_OFFLOAD_H
#define DOPPEL_NET_OFFLOAD_H

#include <stddef.h>
#include <stdint.h>

#include "net/net.h"

/* struct virtio_net_hdr_v1, virtio 1.2, 5.1.6; little endian, as is every host that Doppel runs on. */
struct net_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t header_bytes;
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint16_t num_buffers;
};
_Static_assert(sizeof(struct net_header) == NET_HEADER_BYTES, "the header is 12 bytes");

#define NET_HEADER_F_NEEDS_CSUM 1u
#define NET_HEADER_F_DATA_VALID 2u
#define NET_GSO_NONE 0u
#define NET_GSO_TCPV4 1u
#define NET_GSO_UDP 3u
#define NET_GSO_TCPV6 4u
#define NET_GSO_ECN 0x80u

/* One finished frame; valid during the call only. */
typedef void net_offload_emit_fn(void *ctx, const uint8_t *frame, size_t length_bytes);

/*
 * Finishes the frame as the header asks and emits the one or more frames that come of it. `frame` is scratch: it is overwritten.
 * Returns -EINVAL, with nothing emitted, when header and frame do not belong together.
 */
int net_offload_finish(const struct net_header *header, uint8_t *frame, size_t length_bytes, net_offload_emit_fn *emit, void *ctx)
    __attribute__((warn_unused_result));

/* Adds `data` to a ones' complement sum (RFC 1071), as if the data began at an even offset. Start with 0. */
uint64_t net_checksum_add(uint64_t sum, const void *data, size_t length_bytes);
/* The 16-bit checksum in network byte order in memory: store it with memcpy. */
uint16_t net_checksum_finish(uint64_t sum);

#endif
