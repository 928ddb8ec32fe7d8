/*
 * The server inside as a guest sees it, with a TCP of a few lines on the other side: what is diverted and what passes, requests in pieces and several at once, replies larger than
 * windows, lost segments, guests without buffers, too many connections, and frames that lie.
 */
#include <arpa/inet.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "net/offload.h"
#include "net/server_priv.h"

#define WAIT_NS 5000000000ull
#define REPLY_BYTES 40000u

static const uint8_t guest_mac[6] = {0x52, 0x54, 0, 1, 2, 3}, guest_ip[4] = {10, 0, 2, 15}, other_ip[4] = {10, 0, 2, 2}, server_ip[4] = {169, 254, 169, 254};
static const uint8_t other_mac[6] = {0x52, 0x55, 10, 0, 2, 2}, broadcast[6] = {255, 255, 255, 255, 255, 255};

struct frame {
    uint8_t data[1600];
    size_t length_bytes;
};

/* The guest, and the back end behind the server: a stack of what came to each. */
static struct {
    struct loop *loop;
    struct net *net;
    struct net *inner;
    struct net_server_counters counters;
    bool no_buffers;
    unsigned count, taken, passed, resumed, requests;
    struct frame frame[512];
} f;

/* ---- the back end ---- */

static bool inner_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    f.passed++;
    return f.passed != 1000; /* full once, when a test says so */
}

static void inner_resume(struct net *net)
{
    f.resumed++;
}

static const struct net_backend inner_backend = {.name = "inner", .transmit = inner_transmit, .resume = inner_resume};

/* ---- the server's program: lines, answered by as many bytes as they say ---- */

static size_t serve(void *ctx, const char *data, size_t size_bytes, bool full, struct net_reply *reply)
{
    const char *end = memchr(data, '\n', size_bytes);
    assert_ptr_equal(ctx, &f);
    assert_int_equal(full, size_bytes == SERVER_REQUEST_BYTES);
    if (!end)
        return 0;
    f.requests++;
    reply->close = *data == 'c';
    size_t wanted = *data == 'c' ? 10 : strtoul(data, NULL, 10);
    if (wanted) {
        reply->data = malloc(wanted);
        reply->size_bytes = wanted;
        for (size_t i = 0; i < wanted; i++)
            reply->data[i] = (char)(i * 7 + i / 256);
    }
    return (size_t)(end + 1 - data);
}

/* ---- the guest ---- */

static bool receive(void *ctx, const struct iovec *iov, unsigned iov_count)
{
    struct net_header header;
    if (f.no_buffers)
        return false;
    assert_true(f.count < sizeof f.frame / sizeof *f.frame);
    assert_int_equal(iov[0].iov_len, sizeof header);
    memcpy(&header, iov[0].iov_base, sizeof header);
    assert_int_equal(header.flags, 0);
    assert_true(iov[1].iov_len <= sizeof f.frame[0].data);
    f.frame[f.count].length_bytes = iov[1].iov_len;
    memcpy(f.frame[f.count++].data, iov[1].iov_base, iov[1].iov_len);
    return true;
}

static int setup(void **state)
{
    memset(&f, 0, sizeof f);
    assert_int_equal(loop_create(&f.loop, NULL), 0);
    f.inner = f.net = calloc(1, sizeof *f.net);
    f.net->backend = &inner_backend;
    f.net->loop = f.loop;
    f.net->client = (struct net_client){.receive = receive, .ctx = &f};
    f.net->info.kind = "inner";
    const struct net_server server = {.address = {169, 254, 169, 254}, .port = 80, .serve = serve, .ctx = &f, .counters = &f.counters};
    assert_int_equal(net_serve(&f.net, &server), 0);
    return 0;
}

static int teardown(void **state)
{
    net_close(f.net);
    loop_destroy(f.loop);
    return 0;
}

static void send_frame(const uint8_t *data, size_t length_bytes, unsigned flags)
{
    struct net_header header = {.flags = (uint8_t)flags};
    /* In pieces, as drivers do. */
    size_t cut = length_bytes > 20 ? 20 : length_bytes;
    const struct iovec iov[3] = {{&header, sizeof header}, {(void *)(uintptr_t)data, cut}, {(void *)(uintptr_t)(data + cut), length_bytes - cut}};
    assert_true(net_transmit(f.net, iov, 3));
}

/* The next frame for the guest; waits for it. */
static const struct frame *next_frame(void)
{
    uint64_t end_ns = loop_now_ns() + WAIT_NS;
    while (f.taken == f.count) {
        assert_true(loop_now_ns() < end_ns);
        loop_run_once(f.loop, 100);
    }
    return &f.frame[f.taken++];
}

static void drop_frames(void)
{
    f.taken = f.count = 0;
}

/* ---- TCP ---- */

struct connection {
    uint16_t port, peer_port, window;
    uint32_t seq, ack;
    unsigned mss;
};

struct segment {
    unsigned flags, window;
    uint32_t seq, ack;
    const uint8_t *data;
    size_t data_bytes;
    uint16_t port;
};

static size_t make_tcp(uint8_t *frame, const struct connection *c, unsigned flags, const void *data, size_t data_bytes)
{
    uint8_t *ip = frame + 14, *tcp = frame + 34, pseudo[4] = {0, 6};
    size_t options = flags & TCP_SYN && c->mss ? 8 : 0, tcp_bytes = 20 + options + data_bytes;
    memcpy(frame, other_mac, 6);
    memcpy(frame + 6, guest_mac, 6);
    server_store16(frame + 12, 0x0800);
    memset(ip, 0, 40 + options);
    ip[0] = 0x45;
    server_store16(ip + 2, (unsigned)(20 + tcp_bytes));
    ip[8] = 64;
    ip[9] = 6;
    memcpy(ip + 12, guest_ip, 4);
    memcpy(ip + 16, server_ip, 4);
    uint16_t sum = net_checksum_finish(net_checksum_add(0, ip, 20));
    memcpy(ip + 10, &sum, 2);
    server_store16(tcp, c->port);
    server_store16(tcp + 2, c->peer_port ? c->peer_port : 80);
    server_store32(tcp + 4, c->seq);
    server_store32(tcp + 8, c->ack);
    tcp[12] = (uint8_t)((20 + options) / 4 << 4);
    tcp[13] = (uint8_t)flags;
    server_store16(tcp + 14, c->window);
    if (options)
        memcpy(tcp + 20, (uint8_t[8]){1, 2, 4, (uint8_t)(c->mss >> 8), (uint8_t)c->mss, 1, 1, 0}, 8);
    if (data_bytes)
        memcpy(tcp + 20 + options, data, data_bytes);
    server_store16(pseudo + 2, (unsigned)tcp_bytes);
    sum = net_checksum_finish(net_checksum_add(net_checksum_add(net_checksum_add(0, ip + 12, 8), pseudo, 4), tcp, tcp_bytes));
    memcpy(tcp + 16, &sum, 2);
    return 34 + tcp_bytes;
}

static void tcp_send(struct connection *c, unsigned flags, const void *data, size_t data_bytes)
{
    uint8_t frame[10000];
    send_frame(frame, make_tcp(frame, c, flags, data, data_bytes), 0);
    c->seq += (uint32_t)data_bytes + (flags & (TCP_SYN | TCP_FIN) ? 1 : 0);
}

/* Checks all that a guest's kernel would. */
static struct segment parse(const struct frame *frame)
{
    const uint8_t *ip = frame->data + 14, *tcp = ip + 20;
    uint8_t pseudo[4] = {0, 6};
    assert_memory_equal(frame->data, guest_mac, 6);
    assert_int_equal(server_load16(frame->data + 12), 0x0800);
    assert_int_equal(ip[0], 0x45);
    size_t total = server_load16(ip + 2);
    assert_int_equal(14 + total, frame->length_bytes);
    assert_int_equal(net_checksum_finish(net_checksum_add(0, ip, 20)), 0);
    assert_memory_equal(ip + 12, server_ip, 4);
    assert_memory_equal(ip + 16, guest_ip, 4);
    memcpy(pseudo + 2, (uint8_t[2]){(uint8_t)((total - 20) >> 8), (uint8_t)(total - 20)}, 2);
    assert_int_equal(net_checksum_finish(net_checksum_add(net_checksum_add(net_checksum_add(0, ip + 12, 8), pseudo, 4), tcp, total - 20)), 0);
    size_t header = (size_t)(tcp[12] >> 4) * 4;
    assert_int_equal(server_load16(tcp), 80);
    return (struct segment){tcp[13], server_load16(tcp + 14), server_load32(tcp + 4), server_load32(tcp + 8), tcp + header, total - 20 - header, server_load16(tcp + 2)};
}

static struct segment tcp_next(void)
{
    return parse(next_frame());
}

static struct connection open_with(uint16_t port, uint16_t window, unsigned mss)
{
    struct connection c = {.port = port, .window = window, .seq = 1000u * port, .mss = mss};
    tcp_send(&c, TCP_SYN, NULL, 0);
    struct segment s = tcp_next();
    assert_int_equal(s.flags, TCP_SYN | TCP_ACK);
    assert_int_equal(s.ack, c.seq);
    assert_int_equal(s.port, port);
    c.ack = s.seq + 1;
    tcp_send(&c, TCP_ACK, NULL, 0);
    return c;
}

static void say(struct connection *c, const char *text)
{
    tcp_send(c, TCP_ACK | TCP_PSH, text, strlen(text));
}

/* Takes `wanted` bytes, each segment in order, acknowledging each. */
static void take_reply(struct connection *c, size_t wanted)
{
    size_t got = 0;
    while (got < wanted) {
        struct segment s = tcp_next();
        assert_true(s.flags & TCP_ACK);
        assert_int_equal(s.seq, c->ack);
        assert_true(s.data_bytes <= c->window);
        for (size_t i = 0; i < s.data_bytes; i++)
            assert_int_equal(s.data[i], (uint8_t)((got + i) * 7 + (got + i) / 256));
        got += s.data_bytes;
        c->ack += (uint32_t)s.data_bytes;
        if (s.data_bytes)
            tcp_send(c, TCP_ACK, NULL, 0);
    }
    assert_int_equal(got, wanted);
}

static void close_by_guest(struct connection *c)
{
    tcp_send(c, TCP_ACK | TCP_FIN, NULL, 0);
    struct segment s = tcp_next();
    assert_int_equal(s.flags & (TCP_FIN | TCP_ACK), TCP_FIN | TCP_ACK);
    assert_int_equal(s.seq, c->ack);
    assert_int_equal(s.ack, c->seq);
    c->ack++;
    tcp_send(c, TCP_ACK, NULL, 0);
    assert_int_equal(f.taken, f.count);
}

/* ---- tests ---- */

static size_t make_arp(uint8_t *frame, unsigned operation, const uint8_t *from, const uint8_t *to)
{
    memset(frame, 0, 60);
    memcpy(frame, broadcast, 6);
    memcpy(frame + 6, guest_mac, 6);
    memcpy(frame + 12, (uint8_t[10]){8, 6, 0, 1, 8, 0, 6, 4, 0, (uint8_t)operation}, 10);
    memcpy(frame + 22, guest_mac, 6);
    memcpy(frame + 28, from, 4);
    memcpy(frame + 38, to, 4);
    return 60;
}

static void test_arp(void **state)
{
    uint8_t frame[64];
    send_frame(frame, make_arp(frame, 1, guest_ip, server_ip), 0);
    const struct frame *answer = next_frame();
    assert_int_equal(answer->length_bytes, 42);
    assert_memory_equal(answer->data, guest_mac, 6);
    assert_int_equal(server_load16(answer->data + 20), 2);
    assert_memory_equal(answer->data + 22, answer->data + 6, 6);
    assert_int_equal(answer->data[6] & 3, 2); /* a station's, locally administered */
    assert_memory_equal(answer->data + 28, server_ip, 4);
    assert_memory_equal(answer->data + 32, guest_mac, 6);
    assert_memory_equal(answer->data + 38, guest_ip, 4);
    assert_int_equal(f.passed, 0);

    send_frame(frame, make_arp(frame, 2, guest_ip, server_ip), 0); /* an answer that nobody asked for */
    make_arp(frame, 1, guest_ip, server_ip);
    frame[15] = 6; /* not Ethernet's */
    send_frame(frame, 60, 0);
    assert_int_equal(f.passed, 0);
    assert_int_equal(f.counters.rx_bad_eth, 1);
    send_frame(frame, make_arp(frame, 1, guest_ip, other_ip), 0);
    assert_int_equal(f.passed, 1);
    assert_int_equal(f.counters.rx_accepted, 3);
    assert_int_equal(f.count, 1);
}

static bool from_back_end(const uint8_t *frame, size_t length_bytes)
{
    const struct net_header header = {0};
    const struct iovec iov[2] = {{(void *)(uintptr_t)&header, sizeof header}, {(void *)(uintptr_t)frame, length_bytes}};
    return f.inner->client.receive(f.inner->client.ctx, iov, 2);
}

static void test_passes(void **state)
{
    uint8_t frame[200];
    struct connection c = {.port = 7, .window = 100};
    size_t length = make_tcp(frame, &c, TCP_SYN, NULL, 0);
    memcpy(frame + 30, other_ip, 4);
    send_frame(frame, length, 0);
    assert_int_equal(f.passed, 1);
    for (length = 14; length < 34; length++) { /* too short to be for anybody */
        make_tcp(frame, &c, TCP_SYN, NULL, 0);
        send_frame(frame, length, 0);
    }
    assert_int_equal(f.passed, 21);
    /* A back end that is full stays the device's affair. */
    f.passed = 999;
    const struct net_header header = {0};
    const struct iovec iov[2] = {{(void *)(uintptr_t)&header, sizeof header}, {frame, 20}};
    assert_false(net_transmit(f.net, iov, 2));
    /* What comes from outside, unless it says that it comes from here. */
    make_tcp(frame, &c, TCP_ACK, NULL, 0);
    assert_true(from_back_end(frame, 54));
    assert_int_equal(f.count, 1);
    memcpy(frame + 26, server_ip, 4);
    assert_true(from_back_end(frame, 54));
    make_arp(frame, 2, server_ip, guest_ip);
    assert_true(from_back_end(frame, 60));
    assert_int_equal(f.count, 1);
    make_arp(frame, 2, other_ip, guest_ip);
    assert_true(from_back_end(frame, 60));
    assert_int_equal(f.count, 2);
    f.no_buffers = true;
    assert_false(from_back_end(frame, 60));
    struct net_info info;
    net_get_info(f.net, &info);
    assert_string_equal(info.kind, "inner");
}

static void test_conversation(void **state)
{
    struct connection c = open_with(5000, 60000, 1460);
    say(&c, "100\n");
    take_reply(&c, 100);
    char large[32];
    snprintf(large, sizeof large, "%u\n", REPLY_BYTES);
    say(&c, large);
    take_reply(&c, REPLY_BYTES);
    close_by_guest(&c);
    assert_int_equal(f.counters.connections_created, 1);
    assert_int_equal(f.counters.connections_destroyed, 1);
    assert_int_equal(f.passed, 0);
}

static void test_close_by_server(void **state)
{
    struct connection c = open_with(5000, 60000, 1460);
    say(&c, "c\nignored");
    struct segment s = tcp_next(), fin = tcp_next();
    assert_int_equal(s.data_bytes, 10);
    assert_int_equal(s.ack, c.seq);
    assert_true(fin.flags & TCP_FIN);
    c.ack = fin.seq + 1;
    say(&c, "more that nobody reads\n");
    assert_int_equal(tcp_next().ack, c.seq);
    tcp_send(&c, TCP_ACK | TCP_FIN, NULL, 0);
    assert_int_equal(tcp_next().ack, c.seq);
    assert_int_equal(f.counters.connections_destroyed, 1);
    assert_int_equal(f.requests, 1);
}

static void test_pieces(void **state)
{
    struct connection c = open_with(5000, 60000, 1460);
    for (const char *text = "0000050\n"; *text; text++) {
        tcp_send(&c, TCP_ACK, text, 1);
        if (text[1]) {
            struct segment s = tcp_next();
            assert_int_equal(s.flags, TCP_ACK);
            assert_int_equal(s.ack, c.seq);
        }
    }
    take_reply(&c, 50);
    /* Again, the second half overlapping what was sent, after a gap; then pipelined. */
    say(&c, "20");
    assert_int_equal(tcp_next().ack, c.seq);
    uint32_t seq = c.seq;
    c.seq += 5;
    say(&c, "lost");
    assert_int_equal(tcp_next().ack, seq);
    c.seq = seq - 1;
    say(&c, "00\n30\n40\n");
    take_reply(&c, 200);
    take_reply(&c, 30);
    take_reply(&c, 40);
    assert_int_equal(f.requests, 4);
    /* All of it once more. */
    c.seq -= 9;
    say(&c, "00\n30\n40\n");
    assert_int_equal(tcp_next().ack, c.seq);
    assert_int_equal(f.requests, 4);
    close_by_guest(&c);
}

static void test_several(void **state)
{
    struct connection c[SERVER_CONNECTIONS_MAX];
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++)
        c[i] = open_with((uint16_t)(6000 + i), 300, i % 2 ? 100 : 0);
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++) {
        unsigned got = 0;
        say(&c[i], "1000\n");
        while (f.taken < f.count) {
            struct segment s = tcp_next();
            assert_int_equal(s.port, c[i].port);
            assert_int_equal(s.seq, c[i].ack + got);
            assert_true(s.data_bytes <= (i % 2 ? 100 : 300));
            got += (unsigned)s.data_bytes;
        }
        assert_int_equal(got, 300);
    }
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++) {
        drop_frames();
        c[i].ack += 300;
        for (unsigned got = 300; got < 1000;) {
            tcp_send(&c[i], TCP_ACK, NULL, 0);
            while (f.taken < f.count) {
                struct segment s = tcp_next();
                assert_int_equal(s.port, c[i].port);
                got += (unsigned)s.data_bytes;
                c[i].ack += (uint32_t)s.data_bytes;
            }
        }
        tcp_send(&c[i], TCP_ACK, NULL, 0);
    }
    /* One too many: it waits while all are busy. Then the one not heard of for longest goes. */
    drop_frames();
    struct connection more = {.port = 7000, .window = 100};
    tcp_send(&more, TCP_SYN, NULL, 0);
    assert_int_equal(f.count, 0);
    more.seq = 0;
    ((struct server *)f.net)->connection[0].heard_ns -= 1000000000;
    tcp_send(&more, TCP_SYN, NULL, 0);
    struct segment gone = tcp_next(), opened = tcp_next();
    assert_true(gone.flags & TCP_RST);
    assert_int_equal(gone.port, c[0].port);
    assert_int_equal(opened.flags, TCP_SYN | TCP_ACK);
    assert_int_equal(f.counters.connections_created, SERVER_CONNECTIONS_MAX + 1);
    assert_int_equal(f.counters.connections_destroyed, 1);
}

static void test_no_buffers(void **state)
{
    struct connection c = open_with(5000, 60000, 1460);
    uint8_t frame[64];
    f.no_buffers = true;
    say(&c, "40000\n");
    for (unsigned i = 0; i < 20; i++)
        send_frame(frame, make_arp(frame, 1, guest_ip, server_ip), 0);
    assert_int_equal(f.counters.tx_errors, 20 - SERVER_QUEUE_FRAMES);
    f.no_buffers = false;
    unsigned resumed = f.resumed;
    net_resume(f.net);
    assert_int_equal(f.resumed, resumed + 1);
    for (unsigned i = 0; i < SERVER_QUEUE_FRAMES; i++)
        assert_int_equal(server_load16(next_frame()->data + 12), 0x0806);
    take_reply(&c, 40000);
    /* Nobody says that there are buffers again, but it asks. */
    f.no_buffers = true;
    send_frame(frame, make_arp(frame, 1, guest_ip, server_ip), 0);
    f.no_buffers = false;
    send_frame(frame, make_arp(frame, 1, guest_ip, server_ip), 0);
    next_frame();
    next_frame();
    assert_int_equal(f.taken, f.count);
    /* In the middle. */
    drop_frames();
    c.window = 1460;
    say(&c, "5000\n");
    struct segment s = tcp_next();
    f.no_buffers = true;
    c.ack += (uint32_t)s.data_bytes;
    c.window = 60000;
    tcp_send(&c, TCP_ACK, NULL, 0);
    f.no_buffers = false;
    net_resume(f.net);
    while (f.taken < f.count)
        c.ack += (uint32_t)tcp_next().data_bytes;
    assert_int_equal(c.ack - s.seq, 5000);
}

static void test_lost(void **state)
{
    struct connection c = {.port = 5000, .window = 60000, .seq = 1, .mss = 1460};
    tcp_send(&c, TCP_SYN, NULL, 0);
    uint32_t iss = tcp_next().seq;
    struct segment again = tcp_next(); /* by itself */
    assert_int_equal(again.seq, iss);
    assert_int_equal(again.flags, TCP_SYN | TCP_ACK);
    c.seq = 1;
    tcp_send(&c, TCP_SYN, NULL, 0); /* and on request */
    assert_int_equal(tcp_next().seq, iss);
    c.ack = iss + 1;
    tcp_send(&c, TCP_ACK, NULL, 0);
    say(&c, "3000\n");
    assert_int_equal(f.count - f.taken, 3);
    drop_frames(); /* all three */
    take_reply(&c, 3000);
    tcp_send(&c, TCP_ACK | TCP_FIN, NULL, 0);
    assert_true(tcp_next().flags & TCP_FIN);
    struct segment fin = tcp_next();
    assert_true(fin.flags & TCP_FIN);
    c.ack = fin.seq + 1;
    tcp_send(&c, TCP_ACK, NULL, 0);
    assert_int_equal(f.counters.connections_destroyed, 1);
}

static void test_windows(void **state)
{
    struct connection c = open_with(5000, 1, 1460);
    say(&c, "5\n");
    take_reply(&c, 5);
    c.window = 0;
    say(&c, "5\n");
    assert_int_equal(tcp_next().data_bytes, 0);
    struct segment probe = tcp_next();
    assert_int_equal(probe.data_bytes, 1);
    assert_int_equal(probe.seq, c.ack);
    c.window = 3;
    tcp_send(&c, TCP_ACK, NULL, 0); /* the probe was not taken, but there is room now */
    drop_frames();
    take_reply(&c, 5);
    /* Our own: what is said while a reply is under way fills it, and it opens again. */
    c.window = 0;
    say(&c, "9\n");
    drop_frames();
    static char much[SERVER_REQUEST_BYTES];
    memset(much, '\n', sizeof much);
    memcpy(much, "7\n", 2);
    much[sizeof much - 1] = 'x';
    for (size_t sent = 0; sent < sizeof much; sent += 1024)
        tcp_send(&c, TCP_ACK, much + sent, 1024);
    while (f.taken + 1 < f.count)
        f.taken++;
    assert_int_equal(tcp_next().window, 0);
    tcp_send(&c, TCP_ACK, "y", 1);
    assert_int_equal(tcp_next().ack, c.seq - 1);
}

static void expect_reset(const struct connection *c, unsigned flags, bool by_ack)
{
    struct connection copy = *c;
    tcp_send(&copy, flags, NULL, 0);
    struct segment s = tcp_next();
    assert_true(s.flags & TCP_RST);
    if (by_ack)
        assert_int_equal(s.seq, c->ack);
    else
        assert_int_equal(s.ack, c->seq + !!(flags & TCP_SYN) + !!(flags & TCP_FIN));
    assert_int_equal(f.taken, f.count);
}

static void test_refused(void **state)
{
    struct connection c = {.port = 4000, .window = 1000, .seq = 77, .ack = 99};
    expect_reset(&c, TCP_ACK, true);
    expect_reset(&c, TCP_FIN, false);
    expect_reset(&c, TCP_SYN | TCP_ACK, true);
    expect_reset(&c, TCP_SYN | TCP_FIN, false);
    tcp_send(&c, TCP_RST, NULL, 0);
    tcp_send(&c, TCP_RST | TCP_ACK, NULL, 0);
    assert_int_equal(f.taken, f.count);
    assert_int_equal(f.counters.connections_created, 0);
}

static void test_bad_frames(void **state)
{
    static const struct {
        unsigned at, value;
        bool error; /* counted as such; else as unusual */
    } lies[] = {{14, 0x44, true}, {14, 0x65, true}, {14, 0x4F, true}, {16, 0xFF, true}, {17, 19, true}, {24, 1, true}, {46, 0x40, true}, {46, 0xF0, true}, {50, 1, true}};
    static const struct {
        unsigned at, value;
    } strange[] = {{20, 0x20}, {21, 1}, {23, 17}};
    uint8_t frame[10000];
    struct connection c = {.port = 4000, .window = 1000};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        size_t length = make_tcp(frame, &c, TCP_SYN, NULL, 0);
        frame[lies[i].at] = (uint8_t)lies[i].value;
        send_frame(frame, length, 0);
        assert_int_equal(f.counters.rx_accepted_err, i + 1);
    }
    for (size_t i = 0; i < sizeof strange / sizeof *strange; i++) {
        size_t length = make_tcp(frame, &c, TCP_SYN, NULL, 0);
        frame[strange[i].at] = (uint8_t)strange[i].value;
        server_store16(frame + 24, 0);
        uint16_t sum = net_checksum_finish(net_checksum_add(0, frame + 14, 20));
        memcpy(frame + 24, &sum, 2);
        send_frame(frame, length, 0);
        assert_int_equal(f.counters.rx_accepted_unusual, i + 1);
    }
    size_t length = make_tcp(frame, &c, TCP_SYN, NULL, 0);
    for (size_t cut = 34; cut < length; cut++)
        send_frame(frame, cut, 0);
    static uint8_t long_frame[20000];
    make_tcp(long_frame, &c, TCP_SYN, NULL, 0);
    send_frame(long_frame, sizeof long_frame, 0);
    assert_int_equal(f.count, 0);
    assert_int_equal(f.passed, 0);
    /* With the checksum left to the other side it does not matter, and neither does padding. */
    frame[50] ^= 1;
    send_frame(frame, length + 6, NET_HEADER_F_NEEDS_CSUM);
    assert_int_equal(tcp_next().flags, TCP_SYN | TCP_ACK);
}

static void test_ends(void **state)
{
    /* Reset by the guest, which counts only at the right place. */
    struct connection c = open_with(5000, 1000, 0), wrong = c;
    wrong.seq += 100;
    tcp_send(&wrong, TCP_RST, NULL, 0);
    assert_int_equal(f.counters.connections_destroyed, 0);
    tcp_send(&c, TCP_RST, NULL, 0);
    assert_int_equal(f.counters.connections_destroyed, 1);
    /* Forgotten by the guest, which begins anew. */
    open_with(5001, 1000, 0);
    c = open_with(5001, 1000, 0);
    assert_int_equal(f.counters.connections_destroyed, 2);
    /* It acknowledges what was never sent. */
    wrong = c;
    wrong.ack += 1000;
    tcp_send(&wrong, TCP_ACK, "5\n", 2);
    assert_int_equal(tcp_next().ack, c.seq);
    assert_int_equal(f.requests, 0);
    /* Half a request, and that was it. */
    say(&c, "12");
    tcp_next();
    close_by_guest(&c);
    /* A program that gives nothing back. */
    c = open_with(5002, 1000, 0);
    say(&c, "0\n");
    assert_true(tcp_next().flags & TCP_RST);
    /* More than is ever kept. */
    c = open_with(5003, 1000, 0);
    char much[1024];
    memset(much, 'x', sizeof much);
    for (size_t sent = 0; sent < SERVER_REQUEST_BYTES; sent += sizeof much)
        tcp_send(&c, TCP_ACK, much, sizeof much);
    while (f.taken + 1 < f.count)
        f.taken++;
    assert_true(tcp_next().flags & TCP_RST);
    assert_int_equal(f.counters.connections_destroyed, f.counters.connections_created);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(test_##name, setup, teardown)
    const struct CMUnitTest tests[] = {TEST(arp),     TEST(passes),  TEST(conversation), TEST(close_by_server), TEST(pieces), TEST(several),
                                       TEST(no_buffers), TEST(lost), TEST(windows),      TEST(refused),         TEST(bad_frames), TEST(ends)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
