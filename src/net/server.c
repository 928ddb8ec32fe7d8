/*
 * The filter in front of a back end that keeps one IPv4 address for a server inside (net.h): diverts ARP for it and IPv4 to it, whatever the Ethernet address they are sent to (guests
 * without a route of their own send to their gateway), and lets nothing pass from the back end that claims to come from it.
 *
 * Frames with VLAN tags belong to other networks and pass. The guest's frame is copied before it is looked at; offloaded checksums are taken as right, since
 * the frame has not been on any wire. libslirp is no help here: its forwards to callbacks tell neither which connection bytes belong to nor when one begins or ends, and those to
 * sockets would have the loop make connections for the guest, which the sandbox is there to prevent.
 * Threading: on the loop's thread.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "net/offload.h"
#include "net/server_priv.h"

#define ETHERNET_BYTES 14u
#define ETHERTYPE_IPV4 0x0800u
#define ETHERTYPE_ARP 0x0806u
#define ARP_BYTES 28u /* RFC 826, of Ethernet and IPv4 */
#define ARP_REQUEST 1u
#define ARP_REPLY 2u
#define IPV4_BYTES 20u
#define IPV4_DONT_FRAGMENT 0x4000u
#define IPV4_FRAGMENT 0x3FFFu /* more fragments, or an offset */
#define PROTOCOL_TCP 6u
#define TCP_BYTES 20u
#define HEAD_BYTES (NET_HEADER_BYTES + ETHERNET_BYTES + ARP_BYTES) /* what it takes to see whose a frame is */
#define MTU_DEFAULT 1500u

static const struct net_backend server_backend;

/* Copies as much of the vectors as there is room for; returns the bytes copied. */
static size_t gather(const struct iovec *iov, unsigned iov_count, void *to, size_t room_bytes)
{
    size_t done = 0;
    for (unsigned i = 0; i < iov_count && done < room_bytes; i++) {
        size_t part = iov[i].iov_len < room_bytes - done ? iov[i].iov_len : room_bytes - done;
        memcpy((uint8_t *)to + done, iov[i].iov_base, part);
        done += part;
    }
    return done;
}

/* Whether the address is at `arp` in an ARP packet, or at `ipv4` in an IPv4 header. */
static bool has_address(const struct server *server, const uint8_t *frame, size_t length_bytes, size_t arp, size_t ipv4)
{
    if (length_bytes < ETHERNET_BYTES)
        return false;
    unsigned type = server_load16(frame + 12);
    size_t at = ETHERNET_BYTES + (type == ETHERTYPE_ARP ? arp : ipv4);
    return (type == ETHERTYPE_ARP || type == ETHERTYPE_IPV4) && length_bytes >= at + 4 && memcmp(frame + at, server->server.address, 4) == 0;
}

static bool is_to_server(const struct server *server, const uint8_t *frame, size_t length_bytes)
{
    return has_address(server, frame, length_bytes, 24, 16);
}

static bool is_from_server(const struct server *server, const uint8_t *frame, size_t length_bytes)
{
    return has_address(server, frame, length_bytes, 14, 12);
}

/* ---- to the guest ---- */

static bool deliver(struct server *server, const uint8_t *frame, size_t length_bytes)
{
    const struct net_header header = {0}; /* every checksum is in the frame */
    const struct iovec iov[2] = {{(void *)(uintptr_t)&header, sizeof header}, {(void *)(uintptr_t)frame, length_bytes}};
    server->stalled = !server->net.client.receive(server->net.client.ctx, iov, 2);
    if (server->stalled)
        return false;
    server->server.counters->tx_frames++;
    server->server.counters->tx_bytes += length_bytes;
    return true;
}

bool server_emit(struct server *server, const uint8_t *frame, size_t length_bytes)
{
    return !server->stalled && server->queue_count == 0 && deliver(server, frame, length_bytes);
}

void server_emit_later(struct server *server, const uint8_t *frame, size_t length_bytes)
{
    if (server_emit(server, frame, length_bytes))
        return;
    if (server->queue_count == SERVER_QUEUE_FRAMES || length_bytes > SERVER_QUEUE_FRAME_BYTES) {
        server->server.counters->tx_errors++; /* the guest asks again */
        return;
    }
    unsigned last = (server->queue_first + server->queue_count++) % SERVER_QUEUE_FRAMES;
    memcpy(server->queue[last].data, frame, length_bytes);
    server->queue[last].length_bytes = length_bytes;
}

size_t server_finish_frame(struct server *server, const struct server_peer *peer, uint8_t *frame, size_t payload_bytes)
{
    uint8_t *ip = frame + ETHERNET_BYTES;
    memcpy(frame, peer->mac, 6);
    memcpy(frame + 6, server->mac, 6);
    server_store16(frame + 12, ETHERTYPE_IPV4);
    ip[0] = 0x45;
    ip[1] = 0;
    server_store16(ip + 2, (unsigned)(IPV4_BYTES + payload_bytes));
    server_store16(ip + 4, server->next_id++);
    server_store16(ip + 6, IPV4_DONT_FRAGMENT);
    ip[8] = 64;
    ip[9] = PROTOCOL_TCP;
    server_store16(ip + 10, 0);
    memcpy(ip + 12, server->server.address, 4);
    memcpy(ip + 16, peer->address, 4);
    uint16_t sum = net_checksum_finish(net_checksum_add(0, ip, IPV4_BYTES));
    memcpy(ip + 10, &sum, sizeof sum);
    return ETHERNET_BYTES + IPV4_BYTES + payload_bytes;
}

/* All that the guest has had no buffers for. */
static void send_waiting(struct server *server)
{
    server->stalled = false;
    while (server->queue_count && deliver(server, server->queue[server->queue_first].data, server->queue[server->queue_first].length_bytes)) {
        server->queue_first = (server->queue_first + 1) % SERVER_QUEUE_FRAMES;
        server->queue_count--;
    }
    if (!server->stalled)
        server_tcp_resume(server);
}

/* ---- from the guest ---- */

static void answer_arp(struct server *server, const uint8_t *frame, size_t length_bytes)
{
    static const uint8_t ethernet_ipv4[6] = {0, 1, ETHERTYPE_IPV4 >> 8, ETHERTYPE_IPV4 & 0xFF, 6, 4};
    const uint8_t *arp = frame + ETHERNET_BYTES;
    uint8_t answer[ETHERNET_BYTES + ARP_BYTES];
    if (length_bytes < sizeof answer || memcmp(arp, ethernet_ipv4, sizeof ethernet_ipv4) != 0) {
        server->server.counters->rx_bad_eth++;
        return;
    }
    if (server_load16(arp + 6) != ARP_REQUEST) {
        server->server.counters->rx_accepted_unusual++;
        return;
    }
    memcpy(answer, frame + 6, 6);
    memcpy(answer + 6, server->mac, 6);
    server_store16(answer + 12, ETHERTYPE_ARP);
    uint8_t *to = answer + ETHERNET_BYTES;
    memcpy(to, ethernet_ipv4, sizeof ethernet_ipv4);
    server_store16(to + 6, ARP_REPLY);
    memcpy(to + 8, server->mac, 6);
    memcpy(to + 14, server->server.address, 4);
    memcpy(to + 18, arp + 8, 10); /* who asked */
    server_emit_later(server, answer, sizeof answer);
}

/* The bytes of a TCP segment in an IPv4 packet; false: it was counted as something else. */
static bool find_tcp(struct server *server, const uint8_t *ip, size_t length_bytes, const uint8_t **tcp, size_t *tcp_bytes)
{
    struct net_server_counters *counters = server->server.counters;
    size_t header_bytes = length_bytes >= IPV4_BYTES ? (ip[0] & 0xFu) * 4 : 0;
    size_t total_bytes = length_bytes >= IPV4_BYTES ? server_load16(ip + 2) : 0;
    if (header_bytes < IPV4_BYTES || ip[0] >> 4 != 4 || total_bytes < header_bytes || total_bytes > length_bytes ||
        net_checksum_finish(net_checksum_add(0, ip, header_bytes)) != 0) {
        counters->rx_accepted_err++;
        return false;
    }
    if (ip[9] != PROTOCOL_TCP || server_load16(ip + 6) & IPV4_FRAGMENT) {
        counters->rx_accepted_unusual++;
        return false;
    }
    *tcp = ip + header_bytes;
    *tcp_bytes = total_bytes - header_bytes;
    return true;
}

static bool checksum_is_right(const uint8_t *ip, const uint8_t *tcp, size_t tcp_bytes)
{
    uint8_t pseudo[4] = {0, PROTOCOL_TCP};
    server_store16(pseudo + 2, (unsigned)tcp_bytes);
    return net_checksum_finish(net_checksum_add(net_checksum_add(net_checksum_add(0, ip + 12, 8), pseudo, sizeof pseudo), tcp, tcp_bytes)) == 0;
}

static void take_ipv4(struct server *server, const struct net_header *header, const uint8_t *frame, size_t length_bytes)
{
    const uint8_t *ip = frame + ETHERNET_BYTES, *tcp;
    size_t tcp_bytes;
    if (!find_tcp(server, ip, length_bytes - ETHERNET_BYTES, &tcp, &tcp_bytes))
        return;
    size_t header_bytes = tcp_bytes >= TCP_BYTES ? (size_t)(tcp[12] >> 4) * 4 : 0;
    if (header_bytes < TCP_BYTES || header_bytes > tcp_bytes ||
        (!(header->flags & NET_HEADER_F_NEEDS_CSUM) && !checksum_is_right(ip, tcp, tcp_bytes))) {
        server->server.counters->rx_accepted_err++;
        return;
    }
    struct server_segment segment = {
        .peer.port = server_load16(tcp),
        .port = server_load16(tcp + 2),
        .seq = server_load32(tcp + 4),
        .ack = server_load32(tcp + 8),
        .window = server_load16(tcp + 14),
        .flags = tcp[13],
        .options = tcp + TCP_BYTES,
        .options_bytes = header_bytes - TCP_BYTES,
        .data = tcp + header_bytes,
        .data_bytes = tcp_bytes - header_bytes,
    };
    memcpy(segment.peer.mac, frame + 6, 6);
    memcpy(segment.peer.address, ip + 12, 4);
    server_tcp_input(server, &segment);
}

static bool server_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    struct server *server = (struct server *)net;
    uint8_t head[HEAD_BYTES];
    struct net_header header;
    size_t head_bytes = gather(iov, iov_count, head, sizeof head);
    if (head_bytes < NET_HEADER_BYTES || !is_to_server(server, head + NET_HEADER_BYTES, head_bytes - NET_HEADER_BYTES))
        return net_transmit(server->inner, iov, iov_count);

    server->server.counters->rx_accepted++;
    if (server->stalled) /* a guest that was reset meanwhile has other buffers, and nobody said so */
        send_waiting(server);
    uint8_t all[NET_HEADER_BYTES + SERVER_INPUT_BYTES];
    size_t total_bytes = 0;
    for (unsigned i = 0; i < iov_count; i++)
        total_bytes += iov[i].iov_len;
    if (total_bytes > sizeof all) {
        server->server.counters->rx_accepted_err++;
        return true;
    }
    gather(iov, iov_count, all, sizeof all);
    memcpy(&header, all, sizeof header);
    const uint8_t *frame = all + sizeof header;
    if (server_load16(frame + 12) == ETHERTYPE_ARP)
        answer_arp(server, frame, total_bytes - sizeof header);
    else
        take_ipv4(server, &header, frame, total_bytes - sizeof header);
    return true;
}

/* ---- between guest and back end ---- */

static bool server_receive(void *ctx, const struct iovec *iov, unsigned iov_count)
{
    struct server *server = ctx;
    uint8_t head[HEAD_BYTES];
    size_t head_bytes = gather(iov, iov_count, head, sizeof head);
    if (head_bytes >= NET_HEADER_BYTES && is_from_server(server, head + NET_HEADER_BYTES, head_bytes - NET_HEADER_BYTES))
        return true;
    return server->net.client.receive(server->net.client.ctx, iov, iov_count);
}

static void server_link(void *ctx, bool up)
{
    struct server *server = ctx;
    if (server->net.client.link)
        server->net.client.link(server->net.client.ctx, up);
}

static void server_writable(void *ctx)
{
    struct server *server = ctx;
    if (server->net.client.writable)
        server->net.client.writable(server->net.client.ctx);
}

static void server_resume(struct net *net)
{
    struct server *server = (struct server *)net;
    send_waiting(server);
    net_resume(server->inner);
}

static size_t server_take(struct net *net, void *frame, size_t size_bytes)
{
    return net_take(((struct server *)net)->inner, frame, size_bytes);
}

static void server_set_offloads(struct net *net, const struct net_offloads *offloads)
{
    net_set_offloads(((struct server *)net)->inner, offloads);
}

static void server_get_info(const struct net *net, struct net_info *info)
{
    net_get_info(((const struct server *)net)->inner, info);
}

static void server_close(struct net *net)
{
    struct server *server = (struct server *)net;
    server_tcp_close(server);
    loop_timer_destroy(server->timer);
    net_close(server->inner);
}

int net_serve(struct net **net, const struct net_server *with)
{
    struct net *inner = *net;
    struct server *server = calloc(1, sizeof *server);
    if (!server)
        return -ENOMEM;
    server->net = (struct net){.backend = &server_backend, .loop = inner->loop, .client = inner->client};
    server->inner = inner;
    server->server = *with;
    server->timer = loop_timer_create(inner->loop, server_tcp_timer, server);
    if (!server->timer) {
        free(server);
        return -ENOMEM;
    }
    /* Locally administered, and the same wherever the guest is moved to. */
    const uint8_t mac[6] = {0x06, 0x44, with->address[0], with->address[1], with->address[2], with->address[3]};
    memcpy(server->mac, mac, sizeof mac);
    unsigned mtu = inner->info.mtu ? inner->info.mtu : MTU_DEFAULT;
    unsigned headers = IPV4_BYTES + TCP_BYTES;
    server->mss = (uint16_t)(mtu - headers < SERVER_MSS_MAX ? mtu - headers : SERVER_MSS_MAX);
    inner->client = (struct net_client){.receive = server_receive, .link = server_link, .writable = server_writable, .ctx = server};
    *net = &server->net;
    return 0;
}

static const struct net_backend server_backend = {
    .name = "server",
    .close = server_close,
    .transmit = server_transmit,
    .resume = server_resume,
    .take = server_take,
    .set_offloads = server_set_offloads,
    .get_info = server_get_info,
};
