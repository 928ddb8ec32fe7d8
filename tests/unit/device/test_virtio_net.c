/*
 * virtio-net in front of a back end that the test plays: buffers of all shapes, filters, commands, offloads, link, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio_net.h"
#include "guest_driver.h"
#include "net/offload.h"
#include "util/log.h"

#define F_CSUM (1ull << 0)
#define F_GUEST_CSUM (1ull << 1)
#define F_MTU (1ull << 3)
#define F_MAC (1ull << 5)
#define F_GUEST_TSO4 (1ull << 7)
#define F_GUEST_TSO6 (1ull << 8)
#define F_GUEST_ECN (1ull << 9)
#define F_HOST_TSO4 (1ull << 11)
#define F_MRG_RXBUF (1ull << 15)
#define F_STATUS (1ull << 16)
#define F_CTRL_VQ (1ull << 17)
#define F_CTRL_RX (1ull << 18)
#define F_CTRL_RX_EXTRA (1ull << 20)
#define F_CTRL_MAC_ADDR (1ull << 23)
#define CONTROL (F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR)

enum { RX, TX, CTRL };
#define FRAME_BYTES 60u

extern const struct device_class virtio_net_class;

/* The back end: what it was told and given. */
struct net {
    struct net_client client;
    struct net_info info;
    struct net_offloads offloads;
    bool full;
    unsigned sent, resumed;
    uint8_t last[70000];
    size_t last_bytes;
    /* Delivered by net_resume until the NIC refuses. */
    unsigned waiting;
    uint8_t frame[70000];
    size_t frame_bytes;
};

static struct fixture {
    struct guest g;
    struct device *device;
    struct net net;
    unsigned closed;
} f;

int net_open(struct net **net, const char *spec, struct loop *loop, const struct net_client *client, struct error *err)
{
    if (strcmp(spec, "test") != 0)
        return error_set(err, -EINVAL, "network '%s' is unknown", spec);
    *net = &f.net;
    f.net.client = *client;
    return 0;
}

void net_close(struct net *net)
{
    f.closed += net != NULL;
}

bool net_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    if (net->full)
        return false;
    net->last_bytes = 0;
    for (unsigned i = 0; i < iov_count; i++) {
        memcpy(net->last + net->last_bytes, iov[i].iov_base, iov[i].iov_len);
        net->last_bytes += iov[i].iov_len;
    }
    net->sent++;
    return true;
}

static bool deliver(const void *frame, size_t length_bytes, const struct net_header *header)
{
    const struct iovec iov[2] = {{(void *)(uintptr_t)header, sizeof *header}, {(void *)(uintptr_t)frame, length_bytes}};
    return f.net.client.receive(f.net.client.ctx, iov, 2);
}

void net_give(struct net *net, const void *frame, size_t size_bytes)
{
}

size_t net_take(struct net *net, void *frame, size_t size_bytes)
{
    return 0;
}

void net_resume(struct net *net)
{
    const struct net_header header = {0};
    net->resumed++;
    while (net->waiting && deliver(net->frame, net->frame_bytes, &header))
        net->waiting--;
}

void net_set_offloads(struct net *net, const struct net_offloads *offloads)
{
    net->offloads = *offloads;
}

int net_serve(struct net **net, const struct net_server *server)
{
    return -ENOMEM;
}

void net_get_info(const struct net *net, struct net_info *info)
{
    *info = net->info;
}

/* ---- the guest ---- */

static int create(void)
{
    const struct virtio_net_config config = {.net = "test", .machine = "m", .index = 0, .slot = -1};
    return virtio_net_class.create(&f.device, &f.g.host, &config, NULL);
}

static int setup(void **state)
{
    log_set_level(LOG_ERROR);
    memset(&f, 0, sizeof f);
    f.net.info = (struct net_info){.kind = "test", .link_up = true, .receive = {.checksum = true, .tso4 = true, .tso6 = true, .ecn = true}};
    guest_init(&f.g);
    assert_int_equal(create(), 0);
    guest_attach(&f.g, 1);
    return 0;
}

static int teardown(void **state)
{
    virtio_net_class.destroy(f.device);
    assert_int_equal(f.closed, 1);
    guest_fini(&f.g);
    return 0;
}

static void read_mac(uint8_t *mac)
{
    for (unsigned i = 0; i < 6; i++)
        mac[i] = (uint8_t)bus_read(f.g.bus, BUS_MMIO, f.g.config + i, 1);
}

/* A frame to this address with `length` bytes that tell their place. */
static void fill(uint8_t *frame, size_t length, const uint8_t *destination)
{
    for (size_t i = 0; i < length; i++)
        frame[i] = (uint8_t)(i * 13 + i / 256);
    memcpy(frame, destination, 6);
}

static gpa_t add_rx(unsigned count, uint32_t length)
{
    gpa_t gpa = guest_alloc(&f.g, (uint64_t)count * length);
    for (unsigned i = 0; i < count; i++)
        guest_add(&f.g.queue[RX], &(struct guest_buffer){gpa + (uint64_t)i * length, length, true}, 1);
    return gpa;
}

static struct virtio_net_counters counters(void)
{
    struct virtio_net_counters now;
    virtio_net_get_counters(f.device, &now);
    return now;
}

/* Sends a command; returns the answer. */
static uint8_t control(uint8_t class, uint8_t command, const void *data, uint32_t length)
{
    gpa_t page = guest_alloc(&f.g, 8192);
    uint8_t *bytes = guest_at(&f.g, page, 8192);
    bytes[0] = class;
    bytes[1] = command;
    if (length)
        memcpy(bytes + 2, data, length);
    bytes[8000] = 0xEE;
    const struct guest_buffer buffers[3] = {{page, 2, false}, {page + 2, length, false}, {page + 8000, 1, true}};
    guest_add(&f.g.queue[CTRL], buffers, 3);
    guest_kick(&f.g.queue[CTRL]);
    guest_wait_used(&f.g.queue[CTRL]);
    assert_int_equal(guest_take_used(&f.g.queue[CTRL], NULL), 1);
    return bytes[8000];
}

static void mode(uint8_t command, bool on)
{
    uint8_t value = on;
    assert_int_equal(control(0, command, &value, 1), 0);
}

/* ---- tests ---- */

static void test_identity(void **state)
{
    uint8_t mac[6], expected[6], other[6];
    uint64_t offered = guest_offered(&f.g);
    uint64_t always = F_CSUM | F_MAC | F_HOST_TSO4 | F_MRG_RXBUF | F_STATUS | CONTROL | F_CTRL_RX_EXTRA;
    assert_int_equal(offered & always, always);
    assert_int_equal(offered & (F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN), F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN);
    assert_false(offered & F_MTU);
    read_mac(mac);
    virtio_net_default_mac(expected, "m", NULL, 0);
    assert_memory_equal(mac, expected, 6);
    assert_memory_equal(mac, "\x52\x54\x00", 3);
    virtio_net_default_mac(other, "m", NULL, 1);
    assert_memory_not_equal(mac, other, 6);
    virtio_net_default_mac(other, "n", NULL, 0);
    assert_memory_not_equal(mac, other, 6);
    virtio_net_default_mac(other, "m", "tap0", 0);
    assert_memory_not_equal(mac, other, 6);
    virtio_net_default_mac(other, NULL, NULL, 0);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 6, 2), 1);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 8, 2), 1);
}

/* A back end without offloads, with a MAC address and an MTU, and no link. */
static void test_plain_back_end(void **state)
{
    uint8_t mac[6];
    virtio_net_class.destroy(f.device);
    f.closed = 0;
    f.net.info = (struct net_info){.kind = "test", .has_mac = true, .mac = {2, 0, 0, 0, 0, 9}, .mtu = 9000};
    assert_int_equal(create(), 0);
    guest_attach(&f.g, 1);
    uint64_t offered = guest_offered(&f.g);
    assert_true(offered & F_MTU);
    assert_false(offered & (F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN));
    read_mac(mac);
    assert_memory_equal(mac, f.net.info.mac, 6);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 6, 2), 0);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 10, 2), 9000);
}

static void test_bad_spec(void **state)
{
    const struct virtio_net_config config = {.net = "nonsense", .slot = -1};
    struct device *device;
    struct error err = {0};
    assert_int_equal(virtio_net_class.create(&device, &f.g.host, &config, &err), -EINVAL);
    assert_non_null(strstr(err.text, "nonsense"));
}

static void test_receive(void **state)
{
    uint8_t frame[FRAME_BYTES], mac[6];
    struct net_header header = {.flags = NET_HEADER_F_DATA_VALID, .num_buffers = 77};
    guest_start(&f.g, F_MAC, 2);
    read_mac(mac);
    fill(frame, sizeof frame, mac);
    gpa_t gpa = add_rx(1, 2000);
    assert_true(deliver(frame, sizeof frame, &header));
    assert_int_equal(guest_take_used(&f.g.queue[RX], NULL), 12 + sizeof frame);
    const uint8_t *got = guest_at(&f.g, gpa, 2000);
    memcpy(&header, got, sizeof header);
    assert_int_equal(header.num_buffers, 1);
    assert_int_equal(header.flags, 0); /* GUEST_CSUM was not negotiated */
    assert_memory_equal(got + 12, frame, sizeof frame);
    assert_int_equal(f.g.messages[1], 1);
}

static void test_mergeable(void **state)
{
    static uint8_t frame[5000];
    uint8_t mac[6];
    struct net_header header = {.flags = NET_HEADER_F_NEEDS_CSUM, .gso_type = NET_GSO_TCPV4 | NET_GSO_ECN, .gso_size = 1448};
    guest_start(&f.g, F_MAC | F_MRG_RXBUF | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_ECN | F_EVENT_IDX, 2);
    read_mac(mac);
    fill(frame, sizeof frame, mac);
    gpa_t gpa = add_rx(4, 1500);
    assert_true(deliver(frame, sizeof frame, &header));
    const uint8_t *got = guest_at(&f.g, gpa, 6000);
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(guest_take_used(&f.g.queue[RX], NULL), i < 3 ? 1500 : 5012 - 4500);
    memcpy(&header, got, sizeof header);
    assert_int_equal(header.num_buffers, 4);
    assert_int_equal(header.flags, NET_HEADER_F_NEEDS_CSUM);
    assert_int_equal(header.gso_size, 1448);
    assert_memory_equal(got + 12, frame, sizeof frame);

    /* Buffers smaller than the header. */
    gpa = add_rx(40, 5);
    assert_true(deliver(frame, FRAME_BYTES, &header));
    got = guest_at(&f.g, gpa, 200);
    assert_int_equal(got[10] + got[11] * 256, (12 + FRAME_BYTES + 4) / 5);
    assert_memory_equal(got + 12, frame, FRAME_BYTES);
}

/* Not enough for the frame now: nothing is shown to the driver, and the frame comes after its next notification. */
static void test_wait_for_buffers(void **state)
{
    uint8_t mac[6];
    for (unsigned event_index = 0; event_index < 2; event_index++) {
        guest_start(&f.g, F_MAC | F_MRG_RXBUF | (event_index ? F_EVENT_IDX : 0), 2);
        read_mac(mac);
        fill(f.net.frame, 3000, mac);
        f.net.frame_bytes = 3000;
        f.net.waiting = 2;
        add_rx(1, 1500);
        guest_kick(&f.g.queue[RX]);
        guest_run(&f.g);
        assert_false(guest_has_used(&f.g.queue[RX]));
        assert_int_equal(f.net.waiting, 2);
        add_rx(4, 1500);
        guest_kick(&f.g.queue[RX]);
        guest_run(&f.g);
        assert_int_equal(f.net.waiting, 1);
        for (unsigned i = 0; i < 3; i++)
            guest_take_used(&f.g.queue[RX], NULL);
        assert_false(guest_has_used(&f.g.queue[RX]));
        add_rx(1, 1500);
        guest_kick(&f.g.queue[RX]);
        guest_run(&f.g);
        assert_int_equal(f.net.waiting, 0);
    }
}

static void test_no_room_ever(void **state)
{
    static uint8_t frame[3000];
    struct net_header header = {0};
    uint8_t mac[6];
    guest_start(&f.g, F_MAC, 2);
    read_mac(mac);
    fill(frame, sizeof frame, mac);
    add_rx(2, 1500);
    assert_true(deliver(frame, sizeof frame, &header)); /* dropped, and the buffer is still there */
    assert_int_equal(counters().rx_no_room, 1);
    assert_false(guest_has_used(&f.g.queue[RX]));
    assert_true(deliver(frame, 1000, &header));
    assert_true(guest_has_used(&f.g.queue[RX]));

    guest_start(&f.g, F_MAC | F_MRG_RXBUF, 2);
    add_rx(64, 40); /* the whole ring is too small */
    assert_true(deliver(frame, sizeof frame, &header));
    assert_int_equal(counters().rx_no_room, 2);
    assert_true(deliver(frame, 64 * 40 - 12, &header));
    assert_int_equal(counters().rx_frames, 2);
}

static void test_unsuitable(void **state)
{
    uint8_t frame[FRAME_BYTES] = {2};
    static const struct net_header bad[] = {
        {.flags = NET_HEADER_F_NEEDS_CSUM}, {.gso_type = NET_GSO_TCPV4}, {.gso_type = NET_GSO_TCPV6},
        {.gso_type = NET_GSO_UDP},          {.gso_type = NET_GSO_ECN},
    };
    struct net_header good = {0};
    assert_true(deliver(frame, sizeof frame, &good)); /* no driver yet */
    assert_int_equal(counters().rx_no_driver, 1);
    guest_start(&f.g, F_MAC, 2);
    add_rx(4, 1500);
    for (unsigned i = 0; i < 5; i++)
        assert_true(deliver(frame, sizeof frame, &bad[i]));
    assert_int_equal(counters().rx_unsuitable, 5);
    assert_false(guest_has_used(&f.g.queue[RX]));
    assert_true(deliver(frame, 3, &good)); /* not even an address */
    assert_false(guest_has_used(&f.g.queue[RX]));
}

static void test_bad_receive_buffer(void **state)
{
    uint8_t frame[FRAME_BYTES] = {2};
    struct net_header header = {0};
    guest_start(&f.g, F_MAC, 2);
    guest_add(&f.g.queue[RX], &(struct guest_buffer){guest_alloc(&f.g, 4096), 2000, false}, 1);
    assert_true(deliver(frame, sizeof frame, &header));
    assert_true(common_read(&f.g, C_STATUS, 1) & STATUS_NEEDS_RESET);
    assert_true(deliver(frame, sizeof frame, &header));
    assert_int_equal(counters().rx_frames, 0);
}

static bool arrives(const char *destination)
{
    uint8_t frame[FRAME_BYTES];
    struct net_header header = {0};
    fill(frame, sizeof frame, (const uint8_t *)destination);
    add_rx(1, 200);
    assert_true(deliver(frame, sizeof frame, &header));
    bool used = guest_has_used(&f.g.queue[RX]);
    if (used)
        guest_take_used(&f.g.queue[RX], NULL);
    return used;
}

#define BROADCAST "\xff\xff\xff\xff\xff\xff"
#define OTHER "\x02\x00\x00\x00\x00\x01"
#define GROUP "\x01\x00\x5e\x00\x00\x01"
#define GROUP2 "\x01\x00\x5e\x00\x00\x02"

static void test_filter(void **state)
{
    char mac[7] = "";
    struct {
        uint32_t unicast;
        uint8_t one[6];
        uint32_t multicast;
        uint8_t two[6];
    } __attribute__((packed)) table = {1, {2, 0, 0, 0, 0, 1}, 1, {1, 0, 0x5E, 0, 0, 1}};

    guest_start(&f.g, F_MAC | CONTROL | F_CTRL_RX_EXTRA, 3);
    read_mac((uint8_t *)mac);
    assert_true(arrives(OTHER) && arrives(GROUP) && arrives(mac) && arrives(BROADCAST)); /* before any command */
    mode(0, false);
    assert_true(!arrives(OTHER) && !arrives(GROUP) && arrives(mac) && arrives(BROADCAST));
    assert_int_equal(control(1, 0, &table, sizeof table), 0);
    assert_true(arrives(OTHER) && arrives(GROUP) && !arrives(GROUP2));
    mode(1, true);
    assert_true(arrives(GROUP2));
    mode(1, false);
    mode(3, true); /* no multicast */
    assert_true(!arrives(GROUP) && arrives(OTHER));
    mode(4, true); /* no unicast */
    assert_true(!arrives(OTHER) && !arrives(mac) && arrives(BROADCAST));
    mode(5, true);
    assert_false(arrives(BROADCAST));
    mode(2, true); /* all unicast */
    assert_true(arrives(mac));
    assert_int_equal(control(1, 1, OTHER, 6), 0);
    read_mac((uint8_t *)mac);
    assert_memory_equal(mac, OTHER, 6);
    assert_int_equal(counters().rx_filtered, 7);

    /* A reset takes it all back. */
    guest_start(&f.g, F_MAC | CONTROL, 3);
    read_mac((uint8_t *)mac);
    assert_memory_not_equal(mac, OTHER, 6);
    assert_true(arrives(OTHER) && arrives(BROADCAST));
}

static void test_bad_commands(void **state)
{
    static uint8_t many[4 + 200 * 6 + 4];
    uint32_t lie = 0xFFFFFFFF, one = 1;
    uint8_t on = 1;
    guest_start(&f.g, F_MAC | CONTROL, 3);
    assert_int_equal(control(0, 2, &on, 1), 1); /* CTRL_RX_EXTRA was not negotiated */
    assert_int_equal(control(0, 0, NULL, 0), 1);
    assert_int_equal(control(0, 200, &on, 1), 1);
    assert_int_equal(control(1, 1, "\x01\x02\x03\x04\x05\x06", 6), 1);
    assert_int_equal(control(1, 1, "\0\0\0\0\0\0", 6), 1);
    assert_int_equal(control(1, 1, "\x02\x02", 2), 1);
    assert_int_equal(control(1, 0, &lie, 4), 1);
    assert_int_equal(control(1, 0, &one, 4), 1);
    assert_int_equal(control(1, 0, NULL, 0), 1);
    assert_int_equal(control(9, 9, &on, 1), 1);

    /* More addresses than the table holds: all of that kind. */
    many[0] = 200;
    mode(0, false);
    assert_false(arrives(OTHER));
    assert_int_equal(control(1, 0, many, sizeof many), 0);
    assert_true(arrives(OTHER) && !arrives(GROUP));

    /* A command without room for the answer, and one of a single byte. */
    gpa_t page = guest_alloc(&f.g, 4096);
    guest_add(&f.g.queue[CTRL], &(struct guest_buffer){page, 1, false}, 1);
    guest_kick(&f.g.queue[CTRL]);
    guest_wait_used(&f.g.queue[CTRL]);
    assert_int_equal(guest_take_used(&f.g.queue[CTRL], NULL), 0);
}

static void add_tx(uint32_t first, uint32_t second, uint8_t tag)
{
    gpa_t page = guest_alloc(&f.g, 4096);
    memset(guest_at(&f.g, page, 4096), tag, 4096);
    memset(guest_at(&f.g, page, 12), 0, 12);
    const struct guest_buffer buffers[2] = {{page, first, false}, {page + first, second, false}};
    guest_add(&f.g.queue[TX], buffers, second ? 2 : 1);
}

/* Ten frames of 100 bytes, five at once and then one every 5 ms. */
static void test_receive_limit(void **state)
{
    uint8_t mac[6];
    guest_start(&f.g, F_MAC, 2);
    read_mac(mac);
    fill(f.net.frame, 100, mac);
    f.net.frame_bytes = 100;
    f.net.waiting = 10;
    virtio_net_set_limit(f.device, true, &(struct bucket_config){500, 0, 25}, NULL);
    uint64_t begin = loop_now_ns();
    for (unsigned i = 0; i < 10; i++)
        add_rx(1, 2000);
    guest_kick(&f.g.queue[RX]);
    guest_run(&f.g);
    for (unsigned i = 0; i < 10; i++) {
        guest_wait_used(&f.g.queue[RX]);
        assert_int_equal(guest_take_used(&f.g.queue[RX], NULL), 112);
    }
    assert_true(loop_now_ns() - begin >= 25 * 1000000ull);
    assert_true(counters().rx_limited >= 5 && counters().tx_limited == 0);
}

/* Three at once, and one more every 10 ms; a full back end costs nothing of the limit. */
static void test_transmit_limit(void **state)
{
    guest_start(&f.g, F_MAC, 2);
    virtio_net_set_limit(f.device, false, NULL, &(struct bucket_config){3, 0, 30});
    f.net.full = true;
    for (unsigned i = 0; i < 6; i++)
        add_tx(12, 60, (uint8_t)i);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    f.net.full = false;
    uint64_t begin = loop_now_ns();
    f.net.client.writable(f.net.client.ctx);
    guest_run(&f.g);
    assert_true(f.net.sent >= 3);
    for (unsigned i = 0; i < 6; i++) {
        guest_wait_used(&f.g.queue[TX]);
        guest_take_used(&f.g.queue[TX], NULL);
    }
    assert_true(loop_now_ns() - begin >= 29 * 1000000ull);
    assert_int_equal(f.net.sent, 6);
    assert_true(counters().tx_limited >= 3);
}

static void test_transmit(void **state)
{
    guest_start(&f.g, F_MAC | F_CSUM, 2);
    add_tx(12, 500, 7);
    guest_kick(&f.g.queue[TX]);
    guest_wait_used(&f.g.queue[TX]);
    assert_int_equal(guest_take_used(&f.g.queue[TX], NULL), 0);
    assert_int_equal(f.net.sent, 1);
    assert_int_equal(f.net.last_bytes, 512);
    assert_int_equal(f.net.last[12], 7);

    add_tx(11, 0, 1);
    add_tx(25, 0, 1);
    guest_kick(&f.g.queue[TX]);
    guest_wait_used(&f.g.queue[TX]);
    guest_run(&f.g);
    assert_int_equal(counters().tx_malformed, 2);
    assert_int_equal(f.net.sent, 1);

    /* One that is far too long. */
    gpa_t big = guest_alloc(&f.g, 100000);
    guest_add(&f.g.queue[TX], &(struct guest_buffer){big, 100000, false}, 1);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    assert_int_equal(counters().tx_malformed, 3);
    assert_int_equal(f.net.sent, 1);
}

/* More than one event may serve: the rest is done in later rounds without another notification. */
static void test_transmit_many(void **state)
{
    guest_enable_msix(&f.g, 3);
    guest_device_reset(&f.g);
    assert_true(guest_negotiate(&f.g, F_VERSION_1 | F_MAC));
    guest_queue_setup(&f.g, RX, 64, 1);
    guest_queue_setup(&f.g, TX, 256, 2);
    guest_driver_ok(&f.g);
    for (unsigned i = 0; i < 200; i++)
        add_tx(12, 60, (uint8_t)i);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    assert_int_equal(f.net.sent, 200);
    assert_int_equal(f.net.last[12], 199);
}

static void test_transmit_full(void **state)
{
    guest_start(&f.g, F_MAC, 2);
    f.net.full = true;
    for (unsigned i = 0; i < 5; i++)
        add_tx(12, 60, (uint8_t)i);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    assert_false(guest_has_used(&f.g.queue[TX]));
    f.net.full = false;
    f.net.client.writable(f.net.client.ctx);
    guest_run(&f.g);
    assert_int_equal(f.net.sent, 5);
    assert_int_equal(f.net.last[12], 4);

    /* When the link goes, what waits is let go. */
    f.net.full = true;
    add_tx(12, 60, 9);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    f.net.client.link(f.net.client.ctx, false);
    guest_run(&f.g);
    assert_int_equal(counters().tx_frames, 6);
    assert_int_equal(f.net.sent, 5);
}

static void test_offloads_and_link(void **state)
{
    guest_start(&f.g, F_MAC | F_STATUS | F_GUEST_CSUM | F_GUEST_TSO4, 2);
    assert_true(f.net.offloads.checksum && f.net.offloads.tso4 && !f.net.offloads.tso6 && !f.net.offloads.ufo);
    unsigned before = f.g.messages[0];
    f.net.client.link(f.net.client.ctx, false);
    assert_int_equal(f.g.messages[0], before + 1);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 6, 2), 0);
    f.net.client.link(f.net.client.ctx, true);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 6, 2), 1);
    guest_start(&f.g, F_MAC | F_GUEST_TSO4, 2); /* segments without checksums are no offer */
    assert_true(!f.net.offloads.checksum && !f.net.offloads.tso4);
}

static struct state_io *save(void)
{
    struct state_io *io = state_writer_create();
    assert_int_equal(virtio_net_class.state(f.device, io), 0);
    return io;
}

/* Where the guest is now, in the address that it uses; nothing where the host has no interface. */
static void test_announce(void **state)
{
    static const uint8_t expected[] = "\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\x09\x80\x35\0\x01\x08\0\x06\x04\0\x03\x02\0\0\0\0\x09\0\0\0\0\x02\0\0\0\0\x09\0\0\0\0";
    virtio_net_class.destroy(f.device);
    f.closed = 0;
    f.net.info = (struct net_info){.kind = "test", .has_mac = true, .mac = {2, 0, 0, 0, 0, 9}};
    assert_int_equal(create(), 0);
    virtio_net_announce(f.device);
    assert_int_equal(f.net.sent, 0);
    f.net.info.interface = "tap0";
    virtio_net_announce(f.device);
    assert_int_equal(f.net.sent, 1);
    assert_int_equal(f.net.last_bytes, NET_HEADER_BYTES + 60);
    assert_memory_equal(f.net.last + NET_HEADER_BYTES, expected, sizeof expected - 1);
    f.net.full = true;
    virtio_net_announce(f.device);
    f.net.full = false;
}

static void test_state(void **state)
{
    guest_start(&f.g, F_MAC | CONTROL | F_GUEST_CSUM, 3);
    mode(0, false);
    mode(1, true);
    assert_int_equal(control(1, 1, OTHER, 6), 0);
    assert_true(arrives(OTHER));
    struct state_io *first = save();
    size_t first_bytes, second_bytes;
    const uint8_t *first_data = state_writer_data(first, &first_bytes);

    virtio_net_class.reset(f.device);
    assert_false(f.net.offloads.checksum);
    struct state_io *reader = state_reader_create(first_data, first_bytes);
    if (virtio_net_class.state(f.device, reader) != 0)
        fail_msg("%s", state_error(reader));
    assert_true(f.net.offloads.checksum);
    struct state_io *second = save();
    const uint8_t *second_data = state_writer_data(second, &second_bytes);
    assert_int_equal(first_bytes, second_bytes);
    assert_memory_equal(first_data, second_data, first_bytes);

    /* It goes on where it was. */
    assert_true(arrives(OTHER) && arrives(GROUP) && !arrives("\x02\x00\x00\x00\x00\x07"));
    add_tx(12, 60, 1);
    guest_kick(&f.g.queue[TX]);
    guest_run(&f.g);
    assert_int_equal(f.net.sent, 1);

    /* Cut short anywhere it is refused. */
    state_io_destroy(reader);
    for (size_t cut = 0; cut < first_bytes; cut += 97) {
        reader = state_reader_create(first_data, cut);
        assert_int_not_equal(virtio_net_class.state(f.device, reader), 0);
        state_io_destroy(reader);
    }
    state_io_destroy(first);
    state_io_destroy(second);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_identity),         TEST(test_plain_back_end),     TEST(test_bad_spec),    TEST(test_receive),
        TEST(test_mergeable),        TEST(test_wait_for_buffers),   TEST(test_no_room_ever), TEST(test_unsuitable),
        TEST(test_bad_receive_buffer), TEST(test_filter),           TEST(test_bad_commands), TEST(test_transmit),
        TEST(test_receive_limit),      TEST(test_transmit_limit),
        TEST(test_transmit_many),    TEST(test_transmit_full),      TEST(test_offloads_and_link), TEST(test_announce), TEST(test_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
