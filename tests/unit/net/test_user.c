/*
 * User networking as a guest sees it, through a guest of a few lines: ARP, DHCP, ping, TCP both ways, UDP through a forward,
 * by IPv6 and to the name server, a guest without buffers, an idle one, and ports that cannot be had.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "net/offload.h"
#include "util/log.h"

#define FRAMES_MAX 256
#define WAIT_NS 5000000000ull
#define BIG_BYTES 20000u

#define TCP_FIN 1u
#define TCP_SYN 2u
#define TCP_PSH 8u
#define TCP_ACK 16u

static const uint8_t guest_mac[6] = {0x52, 0x54, 0, 1, 2, 3}, guest_ip[4] = {10, 0, 2, 15}, gateway_ip[4] = {10, 0, 2, 2};

struct frame {
    uint8_t data[2048];
    size_t length_bytes;
};

struct guest {
    struct loop *loop;
    struct net *net;
    bool no_buffers;
    bool arrived_valid; /* the last header had DATA_VALID */
    unsigned count, taken;
    struct frame frame[FRAMES_MAX];
    /* The one TCP connection. */
    const uint8_t *peer_ip;
    uint16_t own_port, peer_port;
    uint32_t sent, received; /* next sequence numbers */
};

static unsigned get16(const uint8_t *p)
{
    return p[0] * 256u + p[1];
}

static void put16(uint8_t *p, unsigned value)
{
    p[0] = (uint8_t)(value >> 8);
    p[1] = (uint8_t)value;
}

static uint32_t get32(const uint8_t *p)
{
    return get16(p) << 16 | get16(p + 2);
}

static void put32(uint8_t *p, uint32_t value)
{
    put16(p, value >> 16);
    put16(p + 2, value & 0xFFFF);
}

static bool receive(void *ctx, const struct iovec *iov, unsigned iov_count)
{
    struct guest *guest = ctx;
    struct net_header header;
    if (guest->no_buffers)
        return false;
    assert_int_equal(iov_count, 2);
    assert_int_equal(iov[0].iov_len, sizeof header);
    memcpy(&header, iov[0].iov_base, sizeof header);
    assert_int_equal(header.gso_type, NET_GSO_NONE);
    guest->arrived_valid = header.flags == NET_HEADER_F_DATA_VALID;
    assert_true(guest->count < FRAMES_MAX && iov[1].iov_len <= sizeof guest->frame[0].data);
    struct frame *frame = &guest->frame[guest->count++];
    memcpy(frame->data, iov[1].iov_base, iov[1].iov_len);
    frame->length_bytes = iov[1].iov_len;
    return true;
}

static struct guest *guest_open(const char *spec)
{
    struct guest *guest = calloc(1, sizeof *guest);
    struct error err = {0};
    assert_non_null(guest);
    assert_int_equal(loop_create(&guest->loop, NULL), 0);
    const struct net_client client = {.receive = receive, .ctx = guest};
    if (net_open(&guest->net, spec, guest->loop, &client, &err) < 0)
        fail_msg("%s", err.text);
    return guest;
}

static void guest_close(struct guest *guest)
{
    net_close(guest->net);
    loop_destroy(guest->loop);
    free(guest);
}

static void send_frame(struct guest *guest, const struct net_header *header, const uint8_t *data, size_t length_bytes)
{
    struct net_header none = {0};
    const struct iovec iov[2] = {{(void *)(uintptr_t)(header ? header : &none), sizeof none}, {(void *)(uintptr_t)data, length_bytes}};
    assert_true(net_transmit(guest->net, iov, 2));
}

static void ethernet(uint8_t *frame, const uint8_t *destination, unsigned type)
{
    memcpy(frame, destination, 6);
    memcpy(frame + 6, guest_mac, 6);
    put16(frame + 12, type);
}

static void answer_arp(struct guest *guest, const uint8_t *request)
{
    uint8_t frame[42];
    if (get16(request + 20) != 1 || memcmp(request + 38, guest_ip, 4) != 0)
        return;
    memcpy(frame, request, sizeof frame);
    ethernet(frame, request + 6, 0x0806);
    put16(frame + 20, 2);
    memcpy(frame + 22, guest_mac, 6);
    memcpy(frame + 28, guest_ip, 4);
    memcpy(frame + 32, request + 22, 10);
    send_frame(guest, NULL, frame, sizeof frame);
}

/* The next frame of this kind; answers ARP on the way and skips the rest. NULL after five seconds. */
static const uint8_t *wait_frame(struct guest *guest, unsigned ethertype, unsigned protocol, size_t *length_bytes)
{
    uint64_t deadline = loop_now_ns() + WAIT_NS;
    while (loop_now_ns() < deadline) {
        while (guest->taken < guest->count) {
            const struct frame *frame = &guest->frame[guest->taken++];
            if (get16(frame->data + 12) == ethertype && (ethertype != 0x0800 || frame->data[23] == protocol)) {
                *length_bytes = frame->length_bytes;
                return frame->data;
            }
            if (get16(frame->data + 12) == 0x0806)
                answer_arp(guest, frame->data);
        }
        loop_run_once(guest->loop, 100);
    }
    fail_msg("no frame of type %#x arrived", ethertype);
    return NULL;
}

/* Headers of Ethernet (to the gateway) and IPv4 with its checksum. */
static void ipv4(uint8_t *frame, const uint8_t *destination, unsigned protocol, size_t payload_bytes)
{
    static const uint8_t gateway_mac[6] = {0x52, 0x55, 10, 0, 2, 2};
    uint8_t *ip = frame + 14;
    ethernet(frame, gateway_mac, 0x0800);
    memset(ip, 0, 20);
    ip[0] = 0x45;
    put16(ip + 2, (unsigned)(20 + payload_bytes));
    ip[8] = 64;
    ip[9] = (uint8_t)protocol;
    memcpy(ip + 12, guest_ip, 4);
    memcpy(ip + 16, destination, 4);
    uint16_t checksum = net_checksum_finish(net_checksum_add(0, ip, 20));
    memcpy(ip + 10, &checksum, 2);
}

static void announce(struct guest *guest)
{
    uint8_t frame[42] = {0};
    static const uint8_t broadcast[6] = {255, 255, 255, 255, 255, 255};
    size_t length;
    ethernet(frame, broadcast, 0x0806);
    put16(frame + 14, 1);
    put16(frame + 16, 0x0800);
    frame[18] = 6;
    frame[19] = 4;
    put16(frame + 20, 1);
    memcpy(frame + 22, guest_mac, 6);
    memcpy(frame + 28, guest_ip, 4);
    memcpy(frame + 38, gateway_ip, 4);
    send_frame(guest, NULL, frame, sizeof frame);
    const uint8_t *reply = wait_frame(guest, 0x0806, 0, &length);
    assert_int_equal(get16(reply + 20), 2);
    assert_memory_equal(reply + 28, gateway_ip, 4);
}

static void ping(struct guest *guest)
{
    uint8_t frame[14 + 20 + 40] = {0}, *icmp = frame + 34;
    size_t length;
    ipv4(frame, gateway_ip, IPPROTO_ICMP, 40);
    icmp[0] = 8;
    put16(icmp + 4, 0x1234);
    for (unsigned i = 8; i < 40; i++)
        icmp[i] = (uint8_t)i;
    uint16_t checksum = net_checksum_finish(net_checksum_add(0, icmp, 40));
    memcpy(icmp + 2, &checksum, 2);
    send_frame(guest, NULL, frame, sizeof frame);
    const uint8_t *reply = wait_frame(guest, 0x0800, IPPROTO_ICMP, &length);
    assert_int_equal(reply[34], 0);
    assert_memory_equal(reply + 38, icmp + 4, 36);
}

static void test_arp_and_ping(void **state)
{
    struct guest *guest = guest_open("user");
    struct net_offloads offloads = {.checksum = true};
    announce(guest);
    assert_false(guest->arrived_valid);
    net_set_offloads(guest->net, &offloads);
    ping(guest);
    assert_true(guest->arrived_valid);
    guest_close(guest);
}

static void test_dhcp(void **state)
{
    struct guest *guest = guest_open("user,hostname=box,dhcpstart=10.0.2.40");
    static const uint8_t broadcast[6] = {255, 255, 255, 255, 255, 255}, everyone[4] = {255, 255, 255, 255};
    static const uint8_t options[] = {0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255}; /* the cookie, DHCPDISCOVER, end */
    static const uint8_t offered[4] = {10, 0, 2, 40};
    uint8_t frame[14 + 20 + 8 + 300] = {0}, *udp = frame + 34, *bootp = udp + 8;
    size_t length;
    ipv4(frame, everyone, IPPROTO_UDP, 308);
    memset(frame + 26, 0, 4);
    memset(frame + 24, 0, 2);
    uint16_t checksum = net_checksum_finish(net_checksum_add(0, frame + 14, 20));
    memcpy(frame + 24, &checksum, 2);
    memcpy(frame, broadcast, 6);
    put16(udp, 68);
    put16(udp + 2, 67);
    put16(udp + 4, 308);
    bootp[0] = 1;
    bootp[1] = 1;
    bootp[2] = 6;
    put32(bootp + 4, 0xCAFE);
    memcpy(bootp + 28, guest_mac, 6);
    memcpy(bootp + 236, options, sizeof options);
    send_frame(guest, NULL, frame, sizeof frame);

    const uint8_t *reply = wait_frame(guest, 0x0800, IPPROTO_UDP, &length);
    assert_int_equal(get16(reply + 36), 68);
    assert_int_equal(get32(reply + 42 + 4), 0xCAFE);
    assert_memory_equal(reply + 42 + 16, offered, 4);
    assert_non_null(memmem(reply + 42 + 240, length - 42 - 240, "\x0c\x03"
                                                                "box", 5));
    guest_close(guest);
}

/* Sends one segment of the connection; the checksum is left to the back end, and so is cutting when gso_size is not 0. */
static void tcp_send(struct guest *guest, unsigned flags, const uint8_t *payload, size_t payload_bytes, unsigned gso_size)
{
    static uint8_t frame[70000];
    uint8_t *ip = frame + 14, *tcp = frame + 34;
    ipv4(frame, guest->peer_ip, IPPROTO_TCP, 20 + payload_bytes);
    memset(tcp, 0, 20);
    put16(tcp, guest->own_port);
    put16(tcp + 2, guest->peer_port);
    put32(tcp + 4, guest->sent);
    put32(tcp + 8, guest->received);
    tcp[12] = 0x50;
    tcp[13] = (uint8_t)flags;
    put16(tcp + 14, 60000);
    uint64_t sum = net_checksum_add(0, ip + 12, 8) + htons(6) + htons((uint16_t)(20 + payload_bytes));
    uint16_t partial = (uint16_t)~net_checksum_finish(sum);
    memcpy(tcp + 16, &partial, 2);
    if (payload_bytes)
        memcpy(tcp + 20, payload, payload_bytes);
    struct net_header header = {
        .flags = NET_HEADER_F_NEEDS_CSUM,
        .gso_type = gso_size ? NET_GSO_TCPV4 : NET_GSO_NONE,
        .gso_size = (uint16_t)gso_size,
        .csum_start = 34,
        .csum_offset = 16,
    };
    send_frame(guest, &header, frame, 54 + payload_bytes);
    guest->sent += (uint32_t)payload_bytes + (flags & (TCP_SYN | TCP_FIN) ? 1 : 0);
}

/* Waits for a segment with `flags`; acknowledges what it brings, and returns its payload. */
static const uint8_t *tcp_wait(struct guest *guest, unsigned flags, size_t *payload_bytes)
{
    size_t length;
    const uint8_t *tcp;
    do
        tcp = wait_frame(guest, 0x0800, IPPROTO_TCP, &length) + 34;
    while ((tcp[13] & flags) != flags);
    size_t header_bytes = (tcp[12] >> 4) * 4u, ip_bytes = get16(tcp - 18);
    *payload_bytes = ip_bytes - 20 - header_bytes;
    guest->received = get32(tcp + 4) + (uint32_t)*payload_bytes + (tcp[13] & (TCP_SYN | TCP_FIN) ? 1 : 0);
    return tcp + header_bytes;
}

static int listener(int type, uint16_t *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, size), 0);
    if (type == SOCK_STREAM)
        assert_int_equal(listen(fd, 4), 0);
    assert_int_equal(getsockname(fd, (struct sockaddr *)&address, &size), 0);
    *port = ntohs(address.sin_port);
    return fd;
}

/* A port that was free a moment ago. */
static uint16_t free_port(int type)
{
    uint16_t port;
    close(listener(type, &port));
    return port;
}

/* The guest connects to a server on the host's loopback, sends one big segment to be cut, reads the answer and sees the end. */
static void test_tcp_out(void **state)
{
    struct guest *guest = guest_open("user,ipv6=off");
    static uint8_t big[BIG_BYTES], got[BIG_BYTES];
    size_t payload_bytes, total = 0;
    int server = listener(SOCK_STREAM, &guest->peer_port);
    for (unsigned i = 0; i < sizeof big; i++)
        big[i] = (uint8_t)(i * 7 + i / 251);
    guest->peer_ip = gateway_ip;
    guest->own_port = 40000;
    guest->sent = 1000;
    announce(guest);
    tcp_send(guest, TCP_SYN, NULL, 0, 0);
    tcp_wait(guest, TCP_SYN | TCP_ACK, &payload_bytes);
    tcp_send(guest, TCP_ACK, NULL, 0, 0);
    int peer = accept(server, NULL, NULL);
    assert_true(peer >= 0);
    tcp_send(guest, TCP_ACK | TCP_PSH, big, sizeof big, 1460);
    while (total < sizeof big) {
        loop_run_once(guest->loop, 10);
        ssize_t part = recv(peer, got + total, sizeof got - total, MSG_DONTWAIT);
        assert_true(part > 0 || (part < 0 && errno == EAGAIN));
        total += part > 0 ? (size_t)part : 0;
    }
    assert_memory_equal(got, big, sizeof big);
    assert_int_equal(write(peer, "answer", 6), 6);
    close(peer);
    const uint8_t *payload;
    do
        payload = tcp_wait(guest, TCP_ACK, &payload_bytes);
    while (payload_bytes == 0);
    assert_int_equal(payload_bytes, 6);
    assert_memory_equal(payload, "answer", 6);
    tcp_send(guest, TCP_ACK, NULL, 0, 0);
    tcp_wait(guest, TCP_FIN, &payload_bytes);
    close(server);
    guest_close(guest);
}

/* A peer that goes away while the guest still sends ends the connection, not this process. */
static void test_tcp_peer_gone(void **state)
{
    struct guest *guest = guest_open("user,ipv6=off");
    static uint8_t data[1000];
    size_t payload_bytes;
    int server = listener(SOCK_STREAM, &guest->peer_port);
    guest->peer_ip = gateway_ip;
    guest->own_port = 40001;
    announce(guest);
    tcp_send(guest, TCP_SYN, NULL, 0, 0);
    tcp_wait(guest, TCP_SYN | TCP_ACK, &payload_bytes);
    tcp_send(guest, TCP_ACK, NULL, 0, 0);
    int peer = accept(server, NULL, NULL);
    close(peer);
    close(server);
    tcp_wait(guest, TCP_FIN, &payload_bytes);
    for (unsigned i = 0; i < 3; i++) {
        tcp_send(guest, TCP_ACK | TCP_PSH, data, sizeof data, 0);
        for (unsigned rounds = 0; rounds < 10; rounds++)
            loop_run_once(guest->loop, 1);
    }
    ping(guest);
    guest_close(guest);
}

static int connect_to(int type, uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, type | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

static size_t read_soon(struct guest *guest, int fd, char *data, size_t size_bytes)
{
    uint64_t deadline = loop_now_ns() + WAIT_NS;
    while (loop_now_ns() < deadline) {
        ssize_t got = recv(fd, data, size_bytes, MSG_DONTWAIT);
        if (got > 0)
            return (size_t)got;
        loop_run_once(guest->loop, 10);
    }
    return 0;
}

/* A program on the host connects to the forwarded port; libslirp asks for the guest's address first. */
static void test_tcp_forward(void **state)
{
    uint16_t port = free_port(SOCK_STREAM);
    char spec[64], text[16];
    size_t length, payload_bytes;
    snprintf(spec, sizeof spec, "user,restrict=on,forward=tcp:%u:80", port);
    struct guest *guest = guest_open(spec);
    int client = connect_to(SOCK_STREAM, port);

    const uint8_t *tcp = wait_frame(guest, 0x0800, IPPROTO_TCP, &length) + 34;
    assert_int_equal(tcp[13], TCP_SYN);
    assert_int_equal(get16(tcp + 2), 80);
    guest->peer_ip = gateway_ip;
    guest->own_port = 80;
    guest->peer_port = (uint16_t)get16(tcp);
    guest->received = get32(tcp + 4) + 1;
    guest->sent = 77;
    tcp_send(guest, TCP_SYN | TCP_ACK, NULL, 0, 0);
    assert_int_equal(write(client, "hello", 5), 5);
    const uint8_t *payload;
    do
        payload = tcp_wait(guest, TCP_ACK, &payload_bytes);
    while (payload_bytes == 0);
    assert_int_equal(payload_bytes, 5);
    assert_memory_equal(payload, "hello", 5);
    tcp_send(guest, TCP_ACK | TCP_PSH, (const uint8_t *)"world!", 6, 0);
    assert_int_equal(read_soon(guest, client, text, sizeof text), 6);
    assert_memory_equal(text, "world!", 6);
    close(client);
    guest_close(guest);
    /* The port is free again. */
    close(connect_to(SOCK_DGRAM, port));
    guest_close(guest_open(spec));
}

static void test_udp_forward(void **state)
{
    uint16_t port = free_port(SOCK_DGRAM);
    char spec[64], text[16];
    size_t length;
    snprintf(spec, sizeof spec, "user,forward=udp:%u:53", port);
    struct guest *guest = guest_open(spec);
    int client = connect_to(SOCK_DGRAM, port);
    assert_int_equal(send(client, "question", 8, 0), 8);

    const uint8_t *frame = wait_frame(guest, 0x0800, IPPROTO_UDP, &length), *udp = frame + 34;
    assert_int_equal(get16(udp + 2), 53);
    assert_memory_equal(udp + 8, "question", 8);
    uint8_t answer[14 + 20 + 8 + 6] = {0};
    ipv4(answer, frame + 26, IPPROTO_UDP, 14);
    put16(answer + 34, 53);
    put16(answer + 36, get16(udp));
    put16(answer + 38, 14);
    memcpy(answer + 42, "answer", 6);
    send_frame(guest, NULL, answer, sizeof answer);
    assert_int_equal(read_soon(guest, client, text, sizeof text), 6);
    assert_memory_equal(text, "answer", 6);
    close(client);
    guest_close(guest);
}

/* What comes while the guest has no buffers waits, in order. */
static void test_backpressure(void **state)
{
    struct guest *guest = guest_open("user");
    announce(guest);
    guest->no_buffers = true;
    unsigned before = guest->count;
    uint8_t frame[14 + 20 + 16] = {0}, *icmp = frame + 34;
    for (unsigned i = 0; i < 20; i++) {
        ipv4(frame, gateway_ip, IPPROTO_ICMP, 16);
        memset(icmp, 0, 16);
        icmp[0] = 8;
        put16(icmp + 6, i);
        uint16_t checksum = net_checksum_finish(net_checksum_add(0, icmp, 16));
        memcpy(icmp + 2, &checksum, 2);
        send_frame(guest, NULL, frame, sizeof frame);
        loop_run_once(guest->loop, 0);
    }
    assert_int_equal(guest->count, before);
    guest->no_buffers = false;
    net_resume(guest->net);
    for (unsigned i = 0; i < 20; i++) {
        size_t length;
        assert_int_equal(get16(wait_frame(guest, 0x0800, IPPROTO_ICMP, &length) + 34 + 6), i);
    }
    struct net_info info;
    net_get_info(guest->net, &info);
    assert_int_equal(info.dropped_to_guest, 0);
    guest_close(guest);
}

/* A guest that never takes anything costs a bounded amount of memory, and is told so. */
static void test_backlog_bound(void **state)
{
    struct guest *guest = guest_open("user");
    static uint8_t frame[14 + 20 + 1400], *icmp = frame + 34;
    announce(guest);
    guest->no_buffers = true;
    for (unsigned i = 0; i < 1000; i++) {
        ipv4(frame, gateway_ip, IPPROTO_ICMP, 1400);
        memset(icmp, 0, 1400);
        icmp[0] = 8;
        uint16_t checksum = net_checksum_finish(net_checksum_add(0, icmp, 1400));
        memcpy(icmp + 2, &checksum, 2);
        send_frame(guest, NULL, frame, sizeof frame);
    }
    struct net_info info;
    net_get_info(guest->net, &info);
    assert_in_range(info.dropped_to_guest, 1, 999);
    guest_close(guest);
}

static void test_malformed(void **state)
{
    struct guest *guest = guest_open("user");
    uint8_t junk[100];
    memset(junk, 0xA5, sizeof junk);
    for (unsigned length = 0; length <= sizeof junk; length++) {
        const struct iovec iov = {junk, length};
        assert_true(net_transmit(guest->net, &iov, 1));
    }
    static uint8_t huge[NET_FRAME_BYTES_MAX + 1000];
    const struct iovec two[2] = {{huge, sizeof huge}, {huge, sizeof huge}};
    assert_true(net_transmit(guest->net, two, 2));
    struct net_info info;
    net_get_info(guest->net, &info);
    assert_int_equal(info.dropped_from_guest, sizeof junk + 2);
    announce(guest); /* and it still works */
    guest_close(guest);
}

static void test_idle(void **state)
{
    struct guest *guest = guest_open("user,ipv6=off");
    announce(guest);
    while (loop_now_ns() && guest->taken < guest->count)
        guest->taken++;
    for (unsigned i = 0; i < 3; i++)
        loop_run_once(guest->loop, 0);
    uint64_t start = loop_now_ns();
    loop_run_once(guest->loop, 1100);
    assert_true(loop_now_ns() - start >= 1090000000ull);
    guest_close(guest);
}

static void test_port_in_use(void **state)
{
    static const struct {
        int type;
        const char *name;
    } kinds[] = {{SOCK_STREAM, "tcp"}, {SOCK_DGRAM, "udp"}};
    for (unsigned i = 0; i < 2; i++) {
        uint16_t port;
        int fd = listener(kinds[i].type, &port);
        char spec[64], number[8];
        struct error err = {0};
        struct loop *loop;
        struct net *net;
        const struct net_client client = {.receive = receive};
        snprintf(spec, sizeof spec, "user,forward=%s:%u:80", kinds[i].name, port);
        snprintf(number, sizeof number, "%u", port);
        assert_int_equal(loop_create(&loop, NULL), 0);
        assert_int_equal(net_open(&net, spec, loop, &client, &err), -EADDRINUSE);
        if (!strstr(err.text, number) || !strstr(err.text, kinds[i].name))
            fail_msg("%s", err.text);
        assert_int_equal(net_open(&net, "user,forward=tcp:192.0.2.77:8080:80", loop, &client, &err), -EADDRNOTAVAIL);
        loop_destroy(loop);
        close(fd);
    }
}

/* A datagram to the host's own loopback by IPv6. */
static void test_udp6(void **state)
{
    static const uint8_t gateway_mac[6] = {0x52, 0x55, 10, 0, 2, 2};
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    socklen_t size = sizeof address;
    char got[8] = "";
    uint8_t frame[14 + 40 + 8 + 8] = {0}, *ip = frame + 14, *udp = ip + 40;
    int fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool can = fd >= 0 && bind(fd, (struct sockaddr *)&address, size) == 0 && getsockname(fd, (struct sockaddr *)&address, &size) == 0; /* the host */
    struct guest *guest = guest_open("user");
    ethernet(frame, gateway_mac, 0x86dd);
    ip[0] = 0x60;
    put16(ip + 4, 16);
    ip[6] = IPPROTO_UDP;
    ip[7] = 64;
    inet_pton(AF_INET6, "fec0::15", ip + 8);
    inet_pton(AF_INET6, "fec0::2", ip + 24);
    put16(udp, 1000);
    put16(udp + 2, ntohs(address.sin6_port));
    put16(udp + 4, 16);
    memcpy(udp + 8, "question", 8);
    uint16_t checksum = net_checksum_finish(net_checksum_add(net_checksum_add(0, ip + 8, 32) + htons(IPPROTO_UDP) + htons(16), udp, 16));
    memcpy(udp + 6, &checksum, 2);
    send_frame(guest, NULL, frame, sizeof frame);
    for (unsigned i = 0; i < (can ? 50 : 1) && recv(fd, got, sizeof got, 0) < 0; i++)
        loop_run_once(guest->loop, 100);
    assert_memory_equal(got, can ? "question" : "\0\0\0\0\0\0\0", 8);
    guest_close(guest);
    if (fd >= 0)
        close(fd);
}

/* Who the host's name server is, is read in a file, and the file looked at again when what it said is a second old. */
static void test_name_server(void **state)
{
    static const uint8_t server_ip[4] = {10, 0, 2, 3};
    struct guest *guest = guest_open("user,ipv6=off");
    uint8_t frame[14 + 20 + 8 + 12] = {0};
    uint64_t start = loop_now_ns();
    announce(guest);
    ipv4(frame, server_ip, IPPROTO_UDP, 20);
    put16(frame + 34, 1000);
    put16(frame + 36, 53);
    put16(frame + 38, 20);
    for (unsigned i = 0; i < 2; i++) {
        send_frame(guest, NULL, frame, sizeof frame);
        while (loop_now_ns() - start < i * 1100000000ull + 1100000000ull)
            loop_run_once(guest->loop, 100);
    }
    send_frame(guest, NULL, frame, sizeof frame);
    ping(guest); /* and goes on */
    guest_close(guest);
}

static void test_none(void **state)
{
    struct guest *guest = guest_open("none");
    struct net_info info;
    uint8_t frame[60] = {0};
    net_get_info(guest->net, &info);
    assert_string_equal(info.kind, "none");
    assert_false(info.link_up);
    send_frame(guest, NULL, frame, sizeof frame);
    net_resume(guest->net);
    guest_close(guest);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_arp_and_ping),  cmocka_unit_test(test_dhcp),        cmocka_unit_test(test_tcp_out),
        cmocka_unit_test(test_tcp_peer_gone), cmocka_unit_test(test_tcp_forward),   cmocka_unit_test(test_udp_forward), cmocka_unit_test(test_backpressure),
        cmocka_unit_test(test_backlog_bound), cmocka_unit_test(test_malformed),   cmocka_unit_test(test_idle),
        cmocka_unit_test(test_port_in_use),   cmocka_unit_test(test_udp6),        cmocka_unit_test(test_name_server),
        cmocka_unit_test(test_none),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
