/*
 * virtio-vsock: connecting from both sides, data, credit, closing, what breaks the rules, peers that vanish, limits, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "device/vsock_priv.h"
#include "guest_driver.h"
#include "util/log.h"

#define CID 42u
#define BUFFERS 32u
#define BUFFER_BYTES (4096u + VSOCK_HEADER_BYTES)
#define GUEST_ALLOC (1u << 20)

extern const struct device_class virtio_vsock_class;

enum { RX, TX, EVENT };

static struct fixture {
    struct guest g;
    struct device *device;
    char directory[64], path[96];
    gpa_t buffer[64]; /* of the receive ring, by descriptor */
    gpa_t packet;
    uint32_t fwd_cnt;
} f;

struct packet {
    struct vsock_header header;
    uint8_t data[4096];
};

/* ---- the guest ---- */

static void add_buffers(unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        struct guest_buffer buffer = {guest_alloc(&f.g, 8192), BUFFER_BYTES, true};
        f.buffer[guest_add(&f.g.queue[RX], &buffer, 1)] = buffer.gpa;
    }
    guest_kick(&f.g.queue[RX]);
    guest_run(&f.g);
}

static struct vsock_header header(unsigned op, uint32_t guest_port, uint32_t host_port)
{
    return (struct vsock_header){.src_cid = CID, .dst_cid = 2, .src_port = guest_port, .dst_port = host_port, .type = 1, .op = (uint16_t)op,
                                 .buf_alloc = GUEST_ALLOC, .fwd_cnt = f.fwd_cnt};
}

static void send_raw(const void *bytes, unsigned size, const void *data, unsigned data_bytes)
{
    struct guest_queue *q = &f.g.queue[TX];
    struct guest_buffer buffers[2] = {{f.packet, size, false}, {f.packet + 4096, data_bytes, false}};
    memcpy(guest_at(&f.g, f.packet, size), bytes, size);
    if (data_bytes)
        memcpy(guest_at(&f.g, f.packet + 4096, data_bytes), data, data_bytes);
    guest_add(q, buffers, data_bytes ? 2 : 1);
    guest_kick(q);
    guest_run(&f.g);
    guest_wait_used(q);
    guest_take_used(q, NULL);
}

static void send_packet(unsigned op, uint32_t guest_port, uint32_t host_port, const void *data, unsigned size)
{
    struct vsock_header h = header(op, guest_port, host_port);
    h.len = size;
    send_raw(&h, sizeof h, data, size);
}

static void send_shutdown(uint32_t guest_port, uint32_t host_port, uint32_t flags)
{
    struct vsock_header h = header(VSOCK_OP_SHUTDOWN, guest_port, host_port);
    h.flags = flags;
    send_raw(&h, sizeof h, NULL, 0);
}

static struct packet receive(void)
{
    struct packet packet;
    uint16_t head;
    guest_wait_used(&f.g.queue[RX]);
    uint32_t size = guest_take_used(&f.g.queue[RX], &head);
    assert_in_range(size, VSOCK_HEADER_BYTES, BUFFER_BYTES);
    memcpy(&packet, guest_at(&f.g, f.buffer[head], size), size);
    assert_int_equal(packet.header.len, size - VSOCK_HEADER_BYTES);
    assert_int_equal(packet.header.dst_cid, CID);
    f.fwd_cnt += packet.header.len;
    return packet;
}

static struct packet expect(unsigned op)
{
    struct packet packet = receive();
    assert_int_equal(packet.header.op, op);
    return packet;
}

static void expect_nothing(void)
{
    guest_run(&f.g);
    assert_false(guest_has_used(&f.g.queue[RX]));
}

/* ---- the host ---- */

static int make_socket(const char *suffix, struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    snprintf(address->sun_path, sizeof address->sun_path, "%s%s", f.path, suffix);
    assert_true(fd >= 0);
    return fd;
}

static int listen_on(const char *suffix)
{
    struct sockaddr_un address;
    int fd = make_socket(suffix, &address);
    unlink(address.sun_path);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(listen(fd, 1100), 0);
    return fd;
}

static int client(const char *line)
{
    struct sockaddr_un address;
    int fd = make_socket("", &address);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(write(fd, line, strlen(line)), strlen(line));
    guest_run(&f.g);
    return fd;
}

static ssize_t take(int fd, void *data, size_t size)
{
    guest_run(&f.g);
    return recv(fd, data, size, MSG_DONTWAIT);
}

static void expect_end(int fd)
{
    char byte;
    assert_int_equal(take(fd, &byte, 1), 0);
}

/* The guest connects to host port `port`, whose listener is `listener`. Returns the host's end. */
static int guest_connects(int listener, uint32_t guest_port, uint32_t port)
{
    send_packet(VSOCK_OP_REQUEST, guest_port, port, NULL, 0);
    struct packet answer = expect(VSOCK_OP_RESPONSE);
    assert_int_equal(answer.header.src_cid, 2);
    assert_int_equal(answer.header.src_port, port);
    assert_int_equal(answer.header.dst_port, guest_port);
    assert_true(answer.header.buf_alloc >= 65536);
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

static int setup(void **state)
{
    struct virtio_vsock_config config = {.cid = CID, .path = f.path, .slot = -1};
    log_set_level(LOG_ERROR);
    memset(&f, 0, sizeof f);
    strcpy(f.directory, "/tmp/doppel-vsock-XXXXXX");
    assert_non_null(mkdtemp(f.directory));
    snprintf(f.path, sizeof f.path, "%s/v.sock", f.directory);
    guest_init(&f.g);
    assert_int_equal(virtio_vsock_class.create(&f.device, &f.g.host, &config, NULL), 0);
    guest_attach(&f.g, 1);
    guest_start(&f.g, F_EVENT_IDX, 3);
    f.packet = guest_alloc(&f.g, 4096 + 65536);
    return 0;
}

static int teardown(void **state)
{
    char command[128];
    virtio_vsock_class.destroy(f.device);
    assert_int_equal(access(f.path, F_OK), -1);
    guest_fini(&f.g);
    snprintf(command, sizeof command, "rm -rf %s", f.directory);
    return system(command);
}

/* ---- tests ---- */

static void test_config(void **state)
{
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config, 4), CID);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 4, 4), 0);
}

static void test_guest_connects(void **state)
{
    char text[64];
    add_buffers(BUFFERS);
    send_packet(VSOCK_OP_REQUEST, 1000, 5, NULL, 0); /* nobody listens */
    struct packet refused = expect(VSOCK_OP_RST);
    assert_int_equal(refused.header.src_port, 5);
    assert_int_equal(refused.header.dst_port, 1000);

    int listener = listen_on("_5");
    int fd = guest_connects(listener, 1000, 5);
    send_packet(VSOCK_OP_RW, 1000, 5, "hello", 5);
    assert_int_equal(take(fd, text, sizeof text), 5);
    assert_memory_equal(text, "hello", 5);
    assert_int_equal(write(fd, "answer", 6), 6);
    struct packet data = expect(VSOCK_OP_RW);
    assert_int_equal(data.header.len, 6);
    assert_int_equal(data.header.fwd_cnt, 5);
    assert_memory_equal(data.data, "answer", 6);

    /* Half a close on either side, data the other way. */
    shutdown(fd, SHUT_WR);
    assert_int_equal(expect(VSOCK_OP_SHUTDOWN).header.flags, VSOCK_SHUTDOWN_SEND);
    send_packet(VSOCK_OP_RW, 1000, 5, "more", 4);
    assert_int_equal(take(fd, text, sizeof text), 4);
    send_shutdown(1000, 5, VSOCK_SHUTDOWN_SEND);
    expect_end(fd);
    send_shutdown(1000, 5, VSOCK_SHUTDOWN_RECEIVE);
    expect(VSOCK_OP_RST);
    expect_nothing();
    send_packet(VSOCK_OP_RW, 1000, 5, "late", 4);
    expect(VSOCK_OP_RST);
    close(fd);
    close(listener);
}

static void test_host_connects(void **state)
{
    char text[64];
    struct sockaddr_un address;
    add_buffers(BUFFERS);
    int fd = make_socket("", &address);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    assert_int_equal(write(fd, "CONN", 4), 4);
    expect_nothing();
    assert_int_equal(write(fd, "ECT 1234\nearly", 14), 14);
    struct packet request = expect(VSOCK_OP_REQUEST);
    uint32_t port = request.header.src_port;
    assert_int_equal(request.header.dst_port, 1234);
    assert_int_equal(port, 1u << 30);
    assert_int_equal(take(fd, text, sizeof text), -1);
    send_packet(VSOCK_OP_RESPONSE, 1234, port, NULL, 0);
    assert_int_equal(take(fd, text, sizeof text), 14);
    assert_memory_equal(text, "OK 1073741824\n", 14);
    struct packet data = expect(VSOCK_OP_RW);
    assert_int_equal(data.header.len, 5);
    assert_memory_equal(data.data, "early", 5);
    close(fd);
    assert_int_equal(expect(VSOCK_OP_SHUTDOWN).header.flags, VSOCK_SHUTDOWN_BOTH);
    send_packet(VSOCK_OP_RW, 1234, port, "lost", 4); /* on the way while the host closed */
    send_packet(VSOCK_OP_RST, 1234, port, NULL, 0);
    expect_nothing();

    fd = client("connect 9\n"); /* nobody listens in the guest */
    request = expect(VSOCK_OP_REQUEST);
    assert_int_equal(request.header.src_port, port + 1);
    send_packet(VSOCK_OP_RST, 9, port + 1, NULL, 0);
    expect_end(fd);
    close(fd);
}

static void test_bad_hellos(void **state)
{
    static const char *const lines[] = {"\n", "CONNECT\n", "CONNECT \n", "CONNECT 12x\n", "CONNECT -1\n", "CONNECT 4294967295\n",
                                        "CONNECT 99999999999999999999\n", "GET / HTTP/1.1\r\n", "CONNECT 00000000000000000000000000000"};
    add_buffers(BUFFERS);
    for (unsigned i = 0; i < sizeof lines / sizeof *lines; i++) {
        int fd = client(lines[i]);
        char byte;
        ssize_t got = take(fd, &byte, 1);
        assert_true(got == 0 || (got < 0 && errno == ECONNRESET));
        close(fd);
    }
    expect_nothing();
}

/* Into the queue, without telling the device. */
static void queue_packet(unsigned op, uint32_t guest_port, uint32_t host_port, const void *data, unsigned size)
{
    struct vsock_header h = header(op, guest_port, host_port);
    h.len = size;
    struct guest_buffer buffers[2] = {{guest_alloc(&f.g, sizeof h), sizeof h, false}, {size ? guest_alloc(&f.g, size) : 0, size, false}};
    memcpy(guest_at(&f.g, buffers[0].gpa, sizeof h), &h, sizeof h);
    if (size)
        memcpy(guest_at(&f.g, buffers[1].gpa, size), data, size);
    guest_add(&f.g.queue[TX], buffers, size ? 2 : 1);
}

/* Small and large packets of two connections in one notification: each connection's bytes in order, all of them before its end. */
static void test_gathering(void **state)
{
    static uint8_t large[VSOCK_GATHER_BYTES_MAX + 1], got[3 * sizeof large];
    add_buffers(BUFFERS);
    int listener = listen_on("_5");
    int fd = guest_connects(listener, 1000, 5), other = guest_connects(listener, 1001, 5);
    memset(large, 'L', sizeof large);
    queue_packet(VSOCK_OP_RW, 1000, 5, "one ", 4);
    queue_packet(VSOCK_OP_RW, 1001, 5, "other ", 6);
    queue_packet(VSOCK_OP_RW, 1000, 5, "two ", 4);
    queue_packet(VSOCK_OP_RW, 1000, 5, large, sizeof large);
    queue_packet(VSOCK_OP_RW, 1000, 5, "three ", 6);
    queue_packet(VSOCK_OP_RW, 1001, 5, "last", 4);
    queue_packet(VSOCK_OP_RST, 1000, 5, NULL, 0);
    guest_kick(&f.g.queue[TX]);
    assert_int_equal(take(fd, got, sizeof got), 8 + sizeof large + 6);
    assert_memory_equal(got, "one two ", 8);
    assert_memory_equal(got + 8, large, sizeof large);
    assert_memory_equal(got + 8 + sizeof large, "three ", 6);
    expect_end(fd);
    assert_int_equal(take(other, got, sizeof got), 10);
    assert_memory_equal(got, "other last", 10);
    for (unsigned i = 0; i < 7; i++)
        guest_take_used(&f.g.queue[TX], NULL);

    /* A program that has gone with packets on the way. */
    close(other);
    queue_packet(VSOCK_OP_RW, 1001, 5, "late", 4);
    queue_packet(VSOCK_OP_RW, 1001, 5, "later", 5);
    queue_packet(VSOCK_OP_SHUTDOWN, 1001, 5, NULL, 0);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    for (unsigned i = 0; i < 3; i++)
        guest_take_used(&f.g.queue[TX], NULL);
    assert_true(expect(VSOCK_OP_SHUTDOWN).header.flags != 0);
    close(fd);
    close(listener);
}

/* The guest sends ahead of a program that does not read: up to its credit, every byte arrives in order, and it is told of room again. */
static void test_credit_of_the_guest(void **state)
{
    static uint8_t block[32768], got[VSOCK_CREDIT_BYTES * 2];
    uint32_t sent = 0, forwarded = 0, alloc;
    size_t arrived = 0;
    add_buffers(BUFFERS);
    int listener = listen_on("_7");
    send_packet(VSOCK_OP_REQUEST, 99, 7, NULL, 0);
    alloc = expect(VSOCK_OP_RESPONSE).header.buf_alloc;
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
    for (bool full = false; !full;) {
        for (unsigned i = 0; i < sizeof block; i += 4)
            memcpy(block + i, &(uint32_t){sent + i}, 4);
        send_packet(VSOCK_OP_RW, 99, 7, block, sizeof block);
        sent += sizeof block;
        while (guest_has_used(&f.g.queue[RX]))
            forwarded = expect(VSOCK_OP_CREDIT_UPDATE).header.fwd_cnt;
        full = alloc - (sent - forwarded) < sizeof block;
        assert_true(sent <= sizeof got);
    }
    assert_true(forwarded > 0); /* what the socket itself takes */
    while (arrived < sent) {
        ssize_t n = take(fd, got + arrived, sizeof got - arrived);
        assert_true(n > 0);
        arrived += (size_t)n;
    }
    for (uint32_t i = 0; i < sent; i += 4)
        assert_memory_equal(got + i, &i, 4);
    guest_run(&f.g);
    while (guest_has_used(&f.g.queue[RX]))
        forwarded = expect(VSOCK_OP_CREDIT_UPDATE).header.fwd_cnt;
    assert_true(sent - forwarded < alloc / 4);

    /* More than that is against the rules. */
    for (unsigned i = 0; !guest_has_used(&f.g.queue[RX]) || receive().header.op == VSOCK_OP_CREDIT_UPDATE; i++) {
        assert_true(i < 100);
        send_packet(VSOCK_OP_RW, 99, 7, block, sizeof block);
    }
    struct virtio_vsock_counters counters;
    virtio_vsock_get_counters(f.device, &counters);
    assert_int_equal(counters.violations, 1);
    assert_int_equal(counters.open, 0);
    close(fd);
    close(listener);
}

/* What a guest has sent before it closed still arrives, though the guest has been told that the connection is over. */
static void test_flush_after_close(void **state)
{
    static uint8_t block[65536];
    size_t sent = 0, arrived = 0;
    add_buffers(BUFFERS);
    int listener = listen_on("_7");
    int fd = guest_connects(listener, 99, 7);
    for (unsigned i = 0; i < 6; i++, sent += sizeof block)
        send_packet(VSOCK_OP_RW, 99, 7, block, sizeof block);
    send_shutdown(99, 7, VSOCK_SHUTDOWN_BOTH);
    while (receive().header.op != VSOCK_OP_RST)
        ;
    int again = guest_connects(listener, 99, 7); /* the ports are free */
    for (ssize_t n; (n = take(fd, block, sizeof block)) != 0; arrived += (size_t)n)
        assert_true(n > 0);
    assert_int_equal(arrived, sent);
    close(fd);
    close(again);
    close(listener);
}

static void test_credit_of_the_host(void **state)
{
    char data[300] = {0};
    add_buffers(BUFFERS);
    int fd = client("CONNECT 1\n");
    uint32_t port = expect(VSOCK_OP_REQUEST).header.src_port;
    struct vsock_header h = header(VSOCK_OP_RESPONSE, 1, port);
    h.buf_alloc = 100;
    send_raw(&h, sizeof h, NULL, 0);
    assert_int_equal(write(fd, data, sizeof data), sizeof data);
    assert_int_equal(expect(VSOCK_OP_RW).header.len, 100);
    expect_nothing();
    h.op = VSOCK_OP_CREDIT_UPDATE;
    h.fwd_cnt = 60;
    send_raw(&h, sizeof h, NULL, 0);
    assert_int_equal(expect(VSOCK_OP_RW).header.len, 60);
    h.fwd_cnt = 10000; /* a lie */
    send_raw(&h, sizeof h, NULL, 0);
    expect_nothing();
    h.fwd_cnt = 160;
    h.buf_alloc = 1000;
    send_raw(&h, sizeof h, NULL, 0);
    assert_int_equal(expect(VSOCK_OP_RW).header.len, 140);
    expect_nothing();
    close(fd);
}

static void test_no_receive_buffers(void **state)
{
    static char data[3 * 4096];
    int fd = client("CONNECT 1\n");
    guest_run(&f.g);
    add_buffers(1);
    uint32_t port = expect(VSOCK_OP_REQUEST).header.src_port;
    send_packet(VSOCK_OP_RESPONSE, 1, port, NULL, 0);
    assert_int_equal(take(fd, data, sizeof data), 14);
    assert_int_equal(write(fd, data, sizeof data), sizeof data);
    send_packet(VSOCK_OP_REQUEST, 77, 88, NULL, 0); /* to be refused */
    guest_run(&f.g);
    add_buffers(1);
    expect(VSOCK_OP_RST);
    for (unsigned i = 0; i < 3; i++) {
        add_buffers(1);
        assert_int_equal(expect(VSOCK_OP_RW).header.len, 4096);
    }
    close(fd);
    guest_run(&f.g);
    add_buffers(1);
    assert_int_equal(expect(VSOCK_OP_SHUTDOWN).header.flags, VSOCK_SHUTDOWN_BOTH);
}

static void test_program_vanishes(void **state)
{
    add_buffers(BUFFERS);
    int listener = listen_on("_7");
    int fd = guest_connects(listener, 99, 7);
    send_packet(VSOCK_OP_RW, 99, 7, "unread", 6);
    close(fd); /* with bytes unread: the host's kernel resets the connection */
    struct packet last = receive();
    assert_true(last.header.op == VSOCK_OP_RST || last.header.op == VSOCK_OP_SHUTDOWN);
    fd = guest_connects(listener, 98, 7);
    shutdown(fd, SHUT_RD);
    send_packet(VSOCK_OP_RW, 98, 7, "unwanted", 8);
    assert_int_equal(expect(VSOCK_OP_SHUTDOWN).header.flags, VSOCK_SHUTDOWN_RECEIVE);
    assert_int_equal(write(fd, "bye", 3), 3);
    assert_int_equal(expect(VSOCK_OP_RW).header.len, 3);
    close(fd);
    assert_int_equal(expect(VSOCK_OP_SHUTDOWN).header.flags, VSOCK_SHUTDOWN_BOTH);
    close(listener);
}

static void test_nonsense(void **state)
{
    add_buffers(BUFFERS);
    struct vsock_header h = header(VSOCK_OP_REQUEST, 1, 7);
    send_raw(&h, 43, NULL, 0);
    h.src_cid = CID + 1;
    send_raw(&h, sizeof h, NULL, 0);
    expect_nothing();
    h.src_cid = CID;
    h.dst_cid = 77;
    send_raw(&h, sizeof h, NULL, 0);
    assert_int_equal(expect(VSOCK_OP_RST).header.src_cid, 77);
    h.dst_cid = 2;
    h.type = 9;
    send_raw(&h, sizeof h, NULL, 0);
    assert_int_equal(expect(VSOCK_OP_RST).header.type, 9);
    send_packet(VSOCK_OP_RST, 1, 7, NULL, 0);
    expect_nothing(); /* never an answer to that */

    int listener = listen_on("_7");
    static const uint16_t ops[] = {VSOCK_OP_INVALID, VSOCK_OP_REQUEST, VSOCK_OP_RESPONSE, 8, 0xFFFF};
    for (unsigned i = 0; i < sizeof ops / sizeof *ops; i++) {
        int fd = guest_connects(listener, 50 + i, 7);
        send_packet(ops[i], 50 + i, 7, NULL, 0);
        expect(VSOCK_OP_RST);
        expect_end(fd);
        close(fd);
    }
    int fd = guest_connects(listener, 60, 7);
    h = header(VSOCK_OP_RW, 60, 7);
    h.len = 100; /* without them */
    send_raw(&h, sizeof h, NULL, 0);
    expect(VSOCK_OP_RST);
    close(fd);
    fd = guest_connects(listener, 61, 7);
    send_shutdown(61, 7, VSOCK_SHUTDOWN_SEND);
    send_packet(VSOCK_OP_RW, 61, 7, "x", 1);
    expect(VSOCK_OP_RST);
    close(fd);
    close(listener);

    struct guest_buffer small = {guest_alloc(&f.g, 4096), VSOCK_HEADER_BYTES, true};
    for (unsigned i = 0; i < BUFFERS; i++)
        guest_add(&f.g.queue[RX], &small, 1);
    for (unsigned i = 0; i < BUFFERS && !(common_read(&f.g, C_STATUS, 1) & STATUS_NEEDS_RESET); i++)
        send_packet(VSOCK_OP_REQUEST, 1, 1, NULL, 0);
    assert_true(common_read(&f.g, C_STATUS, 1) & STATUS_NEEDS_RESET);
}

/* Answers that a guest does not take are bounded. */
static void test_no_answers_taken(void **state)
{
    for (unsigned i = 0; i < VSOCK_RESETS_MAX + 100; i++)
        send_packet(VSOCK_OP_REQUEST, 1 + i, 1, NULL, 0);
    for (unsigned i = 0; i < VSOCK_RESETS_MAX / BUFFERS; i++) {
        add_buffers(BUFFERS);
        for (unsigned n = 0; n < BUFFERS; n++)
            assert_int_equal(expect(VSOCK_OP_RST).header.dst_port, 1 + i * BUFFERS + n);
    }
    add_buffers(1);
    expect_nothing();
}

static void test_limit(void **state)
{
    struct virtio_vsock *vsock = (struct virtio_vsock *)f.device;
    struct virtio_vsock_counters counters;
    int fd[8];
    vsock->connections_max = 4;
    add_buffers(BUFFERS);
    int listener = listen_on("_7");
    for (unsigned i = 0; i < 4; i++)
        fd[i] = guest_connects(listener, i, 7);
    send_packet(VSOCK_OP_REQUEST, 4, 7, NULL, 0);
    expect(VSOCK_OP_RST);
    for (unsigned i = 4; i < 8; i++)
        fd[i] = client("CONNECT 3\n");
    expect_nothing(); /* they wait in line */
    send_packet(VSOCK_OP_RST, 0, 7, NULL, 0);
    expect(VSOCK_OP_REQUEST);
    expect_nothing();
    close(fd[1]); /* only the guest's half is left: makes room for the next */
    assert_int_equal(expect(VSOCK_OP_SHUTDOWN).header.dst_port, 1);
    assert_int_equal(expect(VSOCK_OP_RST).header.dst_port, 1);
    expect(VSOCK_OP_REQUEST);
    virtio_vsock_get_counters(f.device, &counters);
    assert_int_equal(counters.open, 4);
    guest_device_reset(&f.g);
    virtio_vsock_get_counters(f.device, &counters);
    assert_true(counters.open <= 4);
    expect_end(fd[2]);
    for (unsigned i = 0; i < 8; i++)
        if (i != 1)
            close(fd[i]);
    close(listener);
}

static void test_deadline(void **state)
{
    struct virtio_vsock *vsock = (struct virtio_vsock *)f.device;
    add_buffers(BUFFERS);
    int silent = client(""), unanswered = client("CONNECT 3\n");
    expect(VSOCK_OP_REQUEST);
    struct vsock_connection *connection;
    TAILQ_FOREACH(connection, &vsock->waiting, list)
        connection->deadline_ns = 1;
    vsock_host_arm(vsock);
    expect(VSOCK_OP_RST);
    expect_end(silent);
    expect_end(unanswered);
    close(silent);
    close(unanswered);
}

static void test_driver_not_there(void **state)
{
    guest_device_reset(&f.g);
    int fd = client("CONNECT 3\n");
    expect_end(fd);
    close(fd);
}

static void load_state(bool put_back)
{
    struct state_io *writer = state_writer_create(), *reader;
    struct guest_buffer event = {guest_alloc(&f.g, 64), 64, true};
    size_t size;
    add_buffers(BUFFERS);
    int listener = listen_on("_7"), fd = guest_connects(listener, 1, 7);
    memset(guest_at(&f.g, event.gpa, 4), 0xFF, 4);
    guest_add(&f.g.queue[EVENT], &event, 1);
    guest_kick(&f.g.queue[EVENT]);
    guest_run(&f.g);
    assert_false(guest_has_used(&f.g.queue[EVENT]));
    assert_int_equal(virtio_vsock_class.state(f.device, writer), 0);
    send_packet(VSOCK_OP_RW, 1, 7, "still there", 11); /* for who goes on */
    char text[16];
    assert_int_equal(take(fd, text, sizeof text), 11);
    /* Loading into the same device: as if in a new one, whose connections are others. The transmit ring is empty at both times. */
    struct guest_queue tx = f.g.queue[TX];
    const void *saved = state_writer_data(writer, &size);
    virtio_vsock_class.reset(f.device);
    reader = state_reader_create(saved, size);
    assert_int_equal(virtio_vsock_class.state(f.device, reader), 0);
    tx.used[1]--, tx.avail[1]--, f.g.queue[TX].next_used--; /* memory as it was, too */
    expect_end(fd);
    guest_wait_used(&f.g.queue[EVENT]);
    assert_int_equal(guest_take_used(&f.g.queue[EVENT], NULL), 4);
    assert_memory_equal(guest_at(&f.g, event.gpa, 4), "\0\0\0\0", 4);
    /* The guest may drop what it has at any time from here on: nothing new until it has handled the event. */
    int early = client("CONNECT 3\n");
    queue_packet(VSOCK_OP_RW, 1, 7, "what?", 5);
    guest_kick(&f.g.queue[TX]);
    expect_nothing();
    guest_kick(&f.g.queue[EVENT]); /* means nothing by itself */
    expect_nothing();
    if (put_back) {
        guest_add(&f.g.queue[EVENT], &event, 1);
        guest_kick(&f.g.queue[EVENT]);
    } else {
        struct virtio_vsock *vsock = (struct virtio_vsock *)f.device;
        assert_true(vsock->held_until_ns);
        vsock->held_until_ns = 1;
        vsock_host_arm(vsock);
    }
    expect(VSOCK_OP_RST);
    guest_take_used(&f.g.queue[TX], NULL);
    struct packet request = expect(VSOCK_OP_REQUEST);
    send_packet(VSOCK_OP_RST, 3, request.header.src_port, NULL, 0);
    expect_end(early);
    close(early);
    close(fd);
    fd = guest_connects(listener, 2, 7);
    close(fd);
    close(listener);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void test_state(void **state)
{
    load_state(true);
}

/* A driver that never puts an event's buffer back. */
static void test_state_forgetful(void **state)
{
    load_state(false);
}

static void test_paths(void **state)
{
    struct device *second = NULL;
    struct error err = {0};
    char path[128];
    struct virtio_vsock_config config = {.cid = CID, .path = f.path, .slot = -1};
    assert_int_equal(virtio_vsock_class.create(&second, &f.g.host, &config, &err), -EADDRINUSE);
    assert_non_null(strstr(err.text, f.path));
    assert_int_equal(access(f.path, F_OK), 0);
    snprintf(path, sizeof path, "%s/left", f.directory);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int left = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(left, (struct sockaddr *)&address, sizeof address), 0);
    close(left); /* by a program that was killed */
    config.path = path;
    assert_int_equal(virtio_vsock_class.create(&second, &f.g.host, &config, &err), 0);
    virtio_vsock_class.destroy(second);
    memset(path, 'x', 100);
    path[100] = '\0';
    assert_int_equal(virtio_vsock_class.create(&second, &f.g.host, &config, &err), -ENAMETOOLONG);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_config),         TEST(test_guest_connects),     TEST(test_gathering),     TEST(test_host_connects),      TEST(test_bad_hellos), TEST(test_credit_of_the_guest),
        TEST(test_flush_after_close), TEST(test_credit_of_the_host), TEST(test_no_receive_buffers), TEST(test_program_vanishes), TEST(test_nonsense),
        TEST(test_no_answers_taken), TEST(test_limit), TEST(test_deadline), TEST(test_driver_not_there), TEST(test_state), TEST(test_state_forgetful), TEST(test_paths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
