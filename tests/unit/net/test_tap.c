/*
 * The tap back end with a real tap interface in a network namespace of the test's own. Skipped where that cannot be had.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cmocka.h>

#include "net/offload.h"
#include "util/log.h"

#define ETHERTYPE_TEST 0x88B5 /* IEEE 802: for local experiments */
#define QUEUE_FRAMES 10

struct guest {
    bool no_buffers;
    int link; /* -1: not told */
    unsigned count;
    uint8_t last[2048]; /* behind the header */
    size_t last_bytes;
};

static struct guest guest;
static struct loop *loop;
static struct net *net;
static int wire = -1; /* a packet socket on the host's side of the tap */

static bool receive(void *ctx, const struct iovec *iov, unsigned iov_count)
{
    assert_int_equal(iov_count, 1);
    const uint8_t *frame = (const uint8_t *)iov->iov_base + NET_HEADER_BYTES;
    if (iov->iov_len < NET_HEADER_BYTES + 14 || ntohs(*(const uint16_t *)(frame + 12)) != ETHERTYPE_TEST)
        return true; /* the host's own: router solicitations */
    if (guest.no_buffers)
        return false;
    guest.count++;
    guest.last_bytes = iov->iov_len - NET_HEADER_BYTES;
    assert_true(guest.last_bytes <= sizeof guest.last);
    memcpy(guest.last, frame, guest.last_bytes);
    return true;
}

static void link_changed(void *ctx, bool up)
{
    guest.link = up;
}

static const struct net_client client = {.receive = receive, .link = link_changed};

/* Makes (or with `keep` 0 forgets) a persistent tap, and brings it up. */
static int make_tap(const char *name, int keep)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    int result = ioctl(fd, TUNSETIFF, &request) < 0 || ioctl(fd, TUNSETPERSIST, keep) < 0 ? -errno : 0;
    close(fd);
    if (result < 0 || !keep)
        return result;
    fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    request.ifr_flags = IFF_UP;
    result = ioctl(fd, SIOCSIFFLAGS, &request) < 0 ? -errno : 0;
    close(fd);
    return result;
}

static int setup(void **state)
{
    int result = unshare(CLONE_NEWNET) < 0 ? -errno : make_tap("tap0", 1);
    if (result < 0) {
        print_message("the tap tests are skipped: they need root and /dev/net/tun: %s\n", strerror(-result));
        return 0;
    }
    wire = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, htons(ETHERTYPE_TEST));
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE_TEST), .sll_ifindex = (int)if_nametoindex("tap0")};
    return bind(wire, (struct sockaddr *)&address, sizeof address);
}

static void close_tap(void)
{
    net_close(net);
    loop_destroy(loop);
}

static void run(void)
{
    for (unsigned i = 0; i < 20; i++)
        loop_run_once(loop, 1);
}

static void fill(uint8_t *frame, size_t length_bytes, uint8_t tag)
{
    memset(frame, tag, length_bytes);
    frame[0] = 0x02;
    frame[12] = ETHERTYPE_TEST >> 8;
    frame[13] = ETHERTYPE_TEST & 0xFF;
}

static void open_tap(void)
{
    struct error err = {0};
    if (wire < 0)
        skip();
    guest = (struct guest){.link = -1};
    assert_int_equal(loop_create(&loop, NULL), 0);
    if (net_open(&net, "tap:tap0", loop, &client, &err) < 0)
        fail_msg("%s", err.text);
    /* The kernel notices the carrier a moment after the opening and loses what is sent before. */
    uint8_t frame[100];
    fill(frame, sizeof frame, 0xFF);
    for (unsigned i = 0; i < 200 && guest.count == 0; i++) {
        (void)!send(wire, frame, sizeof frame, 0);
        run();
    }
    assert_int_not_equal(guest.count, 0);
    run();
    guest = (struct guest){.link = -1};
}

static void test_both_ways(void **state)
{
    uint8_t frame[1000], got[2000];
    struct net_header header = {0};
    struct net_info info;
    open_tap();
    net_get_info(net, &info);
    assert_true(info.link_up && info.receive.checksum && info.receive.tso4 && info.receive.tso6);
    const struct net_offloads all = {.checksum = true, .tso4 = true, .tso6 = true, .ecn = true};
    net_set_offloads(net, &all);
    net_set_offloads(net, &(struct net_offloads){0});

    fill(frame, sizeof frame, 1);
    const struct iovec iov[3] = {{&header, sizeof header}, {frame, 100}, {frame + 100, sizeof frame - 100}};
    assert_true(net_transmit(net, iov, 3));
    assert_int_equal(recv(wire, got, sizeof got, 0), sizeof frame);
    assert_memory_equal(got, frame, sizeof frame);

    fill(frame, sizeof frame, 2);
    assert_int_equal(send(wire, frame, sizeof frame, 0), sizeof frame);
    run();
    assert_int_equal(guest.count, 1);
    assert_int_equal(guest.last_bytes, sizeof frame);
    assert_memory_equal(guest.last, frame, sizeof frame);
    close_tap();
}

static void test_backpressure(void **state)
{
    uint8_t frame[100];
    open_tap();
    guest.no_buffers = true;
    for (unsigned i = 0; i < QUEUE_FRAMES; i++) {
        fill(frame, sizeof frame, (uint8_t)i);
        assert_int_equal(send(wire, frame, sizeof frame, 0), sizeof frame);
    }
    run();
    assert_int_equal(guest.count, 0);
    uint64_t start = loop_now_ns();
    loop_run_once(loop, 50); /* nothing to do until net_resume */
    assert_true(loop_now_ns() - start >= 45000000ull);
    guest.no_buffers = false;
    net_resume(net);
    run();
    assert_int_equal(guest.count, QUEUE_FRAMES);
    assert_int_equal(guest.last[20], QUEUE_FRAMES - 1);
    close_tap();
}

static void test_bad_header(void **state)
{
    uint8_t frame[100];
    struct net_info info;
    struct net_header header = {.flags = NET_HEADER_F_NEEDS_CSUM, .gso_type = 0x77, .csum_start = 0xFFFF};
    open_tap();
    fill(frame, sizeof frame, 1);
    const struct iovec iov[2] = {{&header, sizeof header}, {frame, sizeof frame}};
    assert_true(net_transmit(net, iov, 2));
    net_get_info(net, &info);
    assert_int_equal(info.dropped_from_guest, 1);
    close_tap();
}

static void refuse(const char *spec, int code, const char *word)
{
    struct error err = {0};
    struct net *other;
    struct loop *own;
    assert_int_equal(loop_create(&own, NULL), 0);
    int result = net_open(&other, spec, own, &client, &err);
    if (result != code || !strstr(err.text, word))
        fail_msg("%s: %d, %s", spec, result, err.text);
    loop_destroy(own);
}

static void test_refusals(void **state)
{
    open_tap();
    refuse("tap:tap0", -EBUSY, "another program");
    refuse("tap:tap9", -ENODEV, "ip tuntap add tap9 mode tap user $USER");
    refuse("tap:lo", -EINVAL, "not a single-queue tap");
    close_tap();
}

/* A user without privileges and a tap that is not theirs. */
static void test_permission(void **state)
{
    if (wire < 0)
        skip();
    if (seteuid(65534) < 0)
        skip();
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0)
        refuse("tap:tap0", -EACCES, "/dev/net/tun");
    else
        refuse("tap:tap0", -EPERM, "user $USER");
    if (fd >= 0)
        close(fd);
    assert_int_equal(seteuid(0), 0);
}

/* Last: the interface is deleted under the machine. */
static void test_lost(void **state)
{
    uint8_t frame[100];
    struct net_header header = {0};
    open_tap();
    run();
    int result = system("ip link delete tap0 2>/dev/null");
    if (result != 0) {
        close_tap();
        skip();
    }
    run();
    assert_int_equal(guest.link, 0);
    fill(frame, sizeof frame, 1);
    const struct iovec iov[2] = {{&header, sizeof header}, {frame, sizeof frame}};
    assert_true(net_transmit(net, iov, 2));
    net_resume(net);
    net_set_offloads(net, &(struct net_offloads){0});
    uint64_t start = loop_now_ns();
    loop_run_once(loop, 50); /* and the hang-up does not keep the loop busy */
    assert_true(loop_now_ns() - start >= 45000000ull);
    close_tap();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_both_ways), cmocka_unit_test(test_backpressure), cmocka_unit_test(test_bad_header),
        cmocka_unit_test(test_refusals),  cmocka_unit_test(test_permission),   cmocka_unit_test(test_lost),
    };
    return cmocka_run_group_tests(tests, setup, NULL);
}
