/*
 * Checksum and TCP segmentation in software; see offload.h.
 *
 * Every look into the frame goes through packet_at, which checks the range against the frame's length; what was parsed is copied or kept as
 * offsets that were checked. Segments are cut in place: the headers of each one are written directly in front of its payload, over
 * payload that has been emitted already, so that no byte of payload is copied.
 * Ones' complement sums are kept in host byte order throughout: RFC 1071, section 2 (B), shows that the result, stored as it is, is right.
 */
#include "net/offload.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>

/* Bounds the number of frames that one frame of a guest can become (8192); smaller than any MSS in use. */
#define GSO_SIZE_MIN 8u
/* Ethernet with two VLAN tags (22), IPv6 with some extension headers or IPv4 with options, TCP with options (60). */
#define HEADERS_BYTES_MAX 256u
#define IPV6_EXTENSIONS_MAX 8u

#define ETHERNET_BYTES 14u
#define VLAN_TAG_BYTES 4u
#define VLAN_TAGS_MAX 2u
#define ETHERTYPE_VLAN 0x8100u
#define ETHERTYPE_SERVICE_VLAN 0x88A8u
#define ETHERTYPE_V4 0x0800u
#define ETHERTYPE_V6 0x86DDu

#define IPV4_BYTES_MIN 20u
#define IPV6_BYTES 40u
#define TCP_BYTES_MIN 20u
#define TCP_FLAG_FIN 0x01u
#define TCP_FLAG_PSH 0x08u
#define TCP_FLAG_CWR 0x80u
#define TCP_CHECKSUM_OFFSET 16u

struct packet {
    uint8_t *data;
    size_t length_bytes;
};

/* Where the parts of a TCP segment are, as offsets into the frame. */
struct tcp_layout {
    bool ipv6;
    size_t ip, tcp, payload, end;
};

static uint8_t *packet_at(const struct packet *packet, size_t offset, size_t length_bytes)
{
    if (offset > packet->length_bytes || length_bytes > packet->length_bytes - offset)
        return NULL;
    return packet->data + offset;
}

static uint16_t load16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] << 8 | bytes[1]);
}

static void store16(uint8_t *bytes, unsigned value)
{
    bytes[0] = (uint8_t)(value >> 8);
    bytes[1] = (uint8_t)value;
}

static uint32_t load32(const uint8_t *bytes)
{
    return (uint32_t)load16(bytes) << 16 | load16(bytes + 2);
}

static void store32(uint8_t *bytes, uint32_t value)
{
    store16(bytes, value >> 16);
    store16(bytes + 2, value & 0xFFFF);
}

uint64_t net_checksum_add(uint64_t sum, const void *data, size_t length_bytes)
{
    const uint8_t *bytes = data;
    /* 32-bit words into a 64-bit sum: no carry is lost for any length below 16 GiB. */
    while (length_bytes >= 4) {
        uint32_t word;
        memcpy(&word, bytes, 4);
        sum += word;
        bytes += 4;
        length_bytes -= 4;
    }
    uint8_t tail[4] = {0};
    memcpy(tail, bytes, length_bytes);
    uint32_t word;
    memcpy(&word, tail, 4);
    return sum + word;
}

uint16_t net_checksum_finish(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xFFFF) + (sum >> 16);
    return (uint16_t)~sum;
}

/* Sums `length_bytes` at `offset` and stores the checksum; a zero is sent as all ones, because zero means "none" in UDP. */
static void checksum_store(uint8_t *field, uint64_t sum)
{
    uint16_t checksum = net_checksum_finish(sum);
    if (checksum == 0)
        checksum = 0xFFFF;
    memcpy(field, &checksum, sizeof checksum);
}

/* NEEDS_CSUM: the field holds the sum of the pseudo header already (virtio 1.2, 5.1.6.2). */
static int finish_checksum(const struct net_header *header, const struct packet *packet)
{
    size_t start = header->csum_start;
    uint8_t *field = packet_at(packet, start + header->csum_offset, 2);
    if (!field)
        return -EINVAL;
    checksum_store(field, net_checksum_add(0, packet->data + start, packet->length_bytes - start));
    return 0;
}

/* Finds the network header behind the VLAN tags. */
static int parse_ethernet(const struct packet *packet, struct tcp_layout *layout, uint16_t *ethertype)
{
    size_t offset = ETHERNET_BYTES - 2;
    for (unsigned tags = 0; tags <= VLAN_TAGS_MAX; tags++, offset += VLAN_TAG_BYTES) {
        const uint8_t *type = packet_at(packet, offset, 2);
        if (!type)
            return -EINVAL;
        *ethertype = load16(type);
        if (*ethertype != ETHERTYPE_VLAN && *ethertype != ETHERTYPE_SERVICE_VLAN) {
            layout->ip = offset + 2;
            return 0;
        }
    }
    return -EINVAL;
}

static int parse_ipv4(const struct packet *packet, struct tcp_layout *layout)
{
    const uint8_t *ip = packet_at(packet, layout->ip, IPV4_BYTES_MIN);
    if (!ip || ip[0] >> 4 != 4)
        return -EINVAL;
    size_t header_bytes = (ip[0] & 15) * 4u, total_bytes = load16(ip + 2);
    bool fragment = (load16(ip + 6) & 0x3FFF) != 0; /* more fragments, or an offset */
    if (header_bytes < IPV4_BYTES_MIN || total_bytes < header_bytes || !packet_at(packet, layout->ip, total_bytes) ||
        fragment || ip[9] != IPPROTO_TCP)
        return -EINVAL;
    layout->tcp = layout->ip + header_bytes;
    layout->end = layout->ip + total_bytes;
    return 0;
}

static int parse_ipv6(const struct packet *packet, struct tcp_layout *layout)
{
    const uint8_t *ip = packet_at(packet, layout->ip, IPV6_BYTES);
    if (!ip || ip[0] >> 4 != 6)
        return -EINVAL;
    size_t payload_bytes = load16(ip + 4);
    if (!packet_at(packet, layout->ip, IPV6_BYTES + payload_bytes))
        return -EINVAL;
    layout->ipv6 = true;
    layout->end = layout->ip + IPV6_BYTES + payload_bytes;

    uint8_t next = ip[6];
    size_t offset = layout->ip + IPV6_BYTES;
    for (unsigned extensions = 0; extensions <= IPV6_EXTENSIONS_MAX; extensions++) {
        if (next == IPPROTO_TCP) {
            layout->tcp = offset;
            return 0;
        }
        /* A routing header changes the destination of the pseudo header, a fragment cannot be cut: neither comes from a sane guest. */
        if (next != IPPROTO_HOPOPTS && next != IPPROTO_DSTOPTS)
            return -EINVAL;
        const uint8_t *extension = packet_at(packet, offset, 8);
        if (!extension)
            return -EINVAL;
        next = extension[0];
        offset += 8u + extension[1] * 8u;
    }
    return -EINVAL;
}

static int parse_tcp(const struct packet *packet, unsigned gso_type, struct tcp_layout *layout)
{
    uint16_t ethertype;
    int result = parse_ethernet(packet, layout, &ethertype);
    if (result < 0)
        return result;
    if (ethertype == ETHERTYPE_V4 && gso_type == NET_GSO_TCPV4)
        result = parse_ipv4(packet, layout);
    else if (ethertype == ETHERTYPE_V6 && gso_type == NET_GSO_TCPV6)
        result = parse_ipv6(packet, layout);
    else
        result = -EINVAL;
    if (result < 0)
        return result;

    const uint8_t *tcp = packet_at(packet, layout->tcp, TCP_BYTES_MIN);
    if (!tcp)
        return -EINVAL;
    size_t header_bytes = (tcp[12] >> 4) * 4u;
    layout->payload = layout->tcp + header_bytes;
    if (header_bytes < TCP_BYTES_MIN || layout->payload > layout->end || layout->payload > HEADERS_BYTES_MAX)
        return -EINVAL;
    return 0;
}

/* The sum of the pseudo header: RFC 9293, section 3.1, for IPv4; RFC 8200, section 8.1, for IPv6. */
static uint64_t pseudo_header_sum(const uint8_t *ip, bool ipv6, size_t tcp_bytes)
{
    uint64_t sum = ipv6 ? net_checksum_add(0, ip + 8, 32) : net_checksum_add(0, ip + 12, 8);
    return sum + htons(IPPROTO_TCP) + htons((uint16_t)tcp_bytes);
}

/* Makes the headers at `frame` those of segment `index`, whose `payload_bytes` follow them. */
static void finish_segment(uint8_t *frame, const struct tcp_layout *layout, unsigned index, unsigned gso_size,
                           size_t payload_bytes, bool last)
{
    uint8_t *ip = frame + layout->ip, *tcp = frame + layout->tcp;
    size_t tcp_bytes = layout->payload - layout->tcp + payload_bytes;
    size_t ip_bytes = layout->payload - layout->ip + payload_bytes;

    if (layout->ipv6) {
        store16(ip + 4, (unsigned)(ip_bytes - IPV6_BYTES));
    } else {
        store16(ip + 2, (unsigned)ip_bytes);
        store16(ip + 4, load16(ip + 4) + index);
        store16(ip + 10, 0);
        uint16_t checksum = net_checksum_finish(net_checksum_add(0, ip, layout->tcp - layout->ip));
        memcpy(ip + 10, &checksum, sizeof checksum);
    }
    store32(tcp + 4, load32(tcp + 4) + index * gso_size);
    if (!last)
        tcp[13] &= (uint8_t)~(TCP_FLAG_FIN | TCP_FLAG_PSH);
    if (index > 0) /* CWR answers one ECE: RFC 3168, section 6.1.2, so it goes out once */
        tcp[13] &= (uint8_t)~TCP_FLAG_CWR;
    store16(tcp + TCP_CHECKSUM_OFFSET, 0);
    checksum_store(tcp + TCP_CHECKSUM_OFFSET,
                   net_checksum_add(pseudo_header_sum(ip, layout->ipv6, tcp_bytes), tcp, tcp_bytes));
}

static int finish_tcp(const struct net_header *header, const struct packet *packet, net_offload_emit_fn *emit, void *ctx)
{
    struct tcp_layout layout = {0};
    unsigned gso_size = header->gso_size;
    int result = parse_tcp(packet, header->gso_type & ~NET_GSO_ECN, &layout);
    if (result < 0 || gso_size < GSO_SIZE_MIN)
        return -EINVAL;

    uint8_t headers[HEADERS_BYTES_MAX];
    size_t headers_bytes = layout.payload, payload_bytes = layout.end - layout.payload, done = 0;
    memcpy(headers, packet->data, headers_bytes);
    unsigned index = 0;
    do {
        size_t part = payload_bytes - done < gso_size ? payload_bytes - done : gso_size;
        uint8_t *frame = packet->data + done; /* headers_bytes in front of this part's payload */
        memcpy(frame, headers, headers_bytes);
        finish_segment(frame, &layout, index, gso_size, part, done + part == payload_bytes);
        emit(ctx, frame, headers_bytes + part);
        done += part;
        index++;
    } while (done < payload_bytes);
    return 0;
}

int net_offload_finish(const struct net_header *header, uint8_t *frame, size_t length_bytes, net_offload_emit_fn *emit, void *ctx)
{
    struct packet packet = {frame, length_bytes};
    if (!packet_at(&packet, 0, ETHERNET_BYTES))
        return -EINVAL;
    switch (header->gso_type & ~NET_GSO_ECN) {
    case NET_GSO_NONE:
        if (header->flags & NET_HEADER_F_NEEDS_CSUM && finish_checksum(header, &packet) < 0)
            return -EINVAL;
        emit(ctx, frame, length_bytes);
        return 0;
    case NET_GSO_TCPV4:
    case NET_GSO_TCPV6:
        return finish_tcp(header, &packet, emit, ctx);
    default:
        return -EINVAL;
    }
}
