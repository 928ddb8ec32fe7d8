/*
 * tap: the guest's frames go to and come from a tap interface of the host's kernel, offloads included.
 *
 * The kernel reads and writes the same 12-byte header as virtio (IFF_VNET_HDR, Documentation/networking/tuntap.rst), so frames pass through as they
 * are. The interface must exist: one that this process made would vanish with it and be connected to nothing.
 * Backpressure: a frame that the guest has no buffer for is kept, and nothing more is read until net_resume; the kernel's queue then
 * fills and drops, as a wire would.
 * Threading: on the loop's thread.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "net/net_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_LOOP, writev);
SANDBOX_ALLOW_IF(IN_LOOP | IN_VCPU, ioctl, ARG_IS(1, TUNSETOFFLOAD));
SANDBOX_ALLOW_IF(IN_LOOP, ioctl, ARG_IS(1, TUNSETVNETHDRSZ)); /* of an interface that is plugged */

#define TUN_PATH "/dev/net/tun"
#define TAP_EXAMPLE "tap:tap0"
/* Frames handed to the guest in one go before other sources of the loop have their turn. */
#define READ_BATCH 64u

struct tap {
    struct net net;
    char name[IFNAMSIZ];
    int fd;
    struct loop_fd *source;
    bool stalled; /* `frame` waits for a guest buffer */
    bool full;    /* the kernel took no more: `writable` is due */
    bool gone;    /* the interface was deleted */
    size_t frame_bytes;
    uint8_t frame[NET_HEADER_BYTES + NET_FRAME_BYTES_MAX];
};

static int tap_set_argument(struct net *net, const char *argument, struct error *err)
{
    struct tap *tap = (struct tap *)net;
    size_t length = strlen(argument);
    if (length == 0)
        return error_set(err, -EINVAL, "network 'tap' needs the interface's name (example: " TAP_EXAMPLE ")");
    if (length >= sizeof tap->name || strchr(argument, '/') || strchr(argument, '%') || strchr(argument, ' '))
        return error_set(err, -EINVAL, "network 'tap:%s': not an interface's name, which has 1 to 15 characters (example: " TAP_EXAMPLE ")",
                         argument);
    memcpy(tap->name, argument, length + 1);
    return 0;
}

static void tap_update_interest(struct tap *tap)
{
    unsigned events = (tap->stalled ? 0 : LOOP_READ) | (tap->full ? LOOP_WRITE : 0);
    if (!tap->gone && loop_fd_modify(tap->source, events) < 0)
        log_warning("network 'tap:%s': cannot wait for the interface", tap->name);
}

/* The interface was deleted under the guest: as when the cable is pulled. */
static void tap_lost(struct tap *tap)
{
    if (tap->gone)
        return;
    tap->gone = true;
    loop_fd_remove(tap->source);
    tap->source = NULL;
    log_warning("network 'tap:%s': the interface is gone; the guest has no link any more", tap->name);
    if (tap->net.client.link)
        tap->net.client.link(tap->net.client.ctx, false);
}

/* Hands the frame in the buffer to the guest; false: it stays there and reading stops. */
static bool tap_deliver(struct tap *tap)
{
    const struct iovec iov = {tap->frame, tap->frame_bytes};
    tap->stalled = !tap->net.client.receive(tap->net.client.ctx, &iov, 1);
    return !tap->stalled;
}

static void tap_read(struct tap *tap)
{
    for (unsigned frames = 0; frames < READ_BATCH && !tap->stalled; frames++) {
        ssize_t got = read(tap->fd, tap->frame, sizeof tap->frame);
        if (got < 0) {
            if (errno == EBADFD)
                tap_lost(tap);
            return; /* EAGAIN: no more. EIO while the interface is down: nothing comes until it is up */
        }
        if ((size_t)got <= NET_HEADER_BYTES)
            continue;
        tap->frame_bytes = (size_t)got;
        (void)tap_deliver(tap);
    }
}

static void tap_ready(void *ctx, unsigned events)
{
    struct tap *tap = ctx;
    if (events & LOOP_READ && !tap->stalled)
        tap_read(tap);
    if (events & LOOP_HANGUP && !tap->gone) { /* a live interface never hangs up */
        tap_lost(tap);
        return;
    }
    if (events & LOOP_WRITE && tap->full) {
        tap->full = false;
        if (tap->net.client.writable)
            tap->net.client.writable(tap->net.client.ctx);
    }
    tap_update_interest(tap);
}

static void tap_resume(struct net *net)
{
    struct tap *tap = (struct tap *)net;
    if (!tap->stalled || !tap_deliver(tap))
        return;
    tap_update_interest(tap);
}

static size_t tap_take(struct net *net, void *frame, size_t size_bytes)
{
    struct tap *tap = (struct tap *)net;
    if (!tap->stalled) {
        ssize_t got = read(tap->fd, frame, size_bytes);
        return got > (ssize_t)NET_HEADER_BYTES ? (size_t)got : 0;
    }
    tap->stalled = false;
    tap_update_interest(tap);
    if (tap->frame_bytes > size_bytes)
        return 0;
    memcpy(frame, tap->frame, tap->frame_bytes);
    return tap->frame_bytes;
}

static bool tap_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    struct tap *tap = (struct tap *)net;
    if (tap->gone || writev(tap->fd, iov, (int)iov_count) >= 0)
        return true;
    if (errno == EAGAIN) {
        tap->full = true;
        tap_update_interest(tap);
        return false;
    }
    net->info.dropped_from_guest++; /* EINVAL: the guest's header is wrong; EIO: the interface is down */
    if (errno == EBADFD)
        tap_lost(tap);
    return true;
}

static unsigned tap_offload_flags(const struct net_offloads *offloads)
{
    if (!offloads->checksum) /* the kernel refuses the others without */
        return 0;
    bool any_tso = offloads->tso4 || offloads->tso6;
    return TUN_F_CSUM | (offloads->tso4 ? TUN_F_TSO4 : 0) | (offloads->tso6 ? TUN_F_TSO6 : 0) |
           (offloads->ecn && any_tso ? TUN_F_TSO_ECN : 0) | (offloads->ufo ? TUN_F_UFO : 0);
}

static void tap_set_offloads(struct net *net, const struct net_offloads *offloads)
{
    struct tap *tap = (struct tap *)net;
    if (!tap->gone && ioctl(tap->fd, TUNSETOFFLOAD, tap_offload_flags(offloads)) < 0)
        log_warning("network 'tap:%s': cannot set offloads: %s", tap->name, strerror(errno));
}

static int tap_attach_error(const struct tap *tap, int code, struct error *err)
{
    switch (-code) {
    case ENODEV:
        return error_set(err, code, "network 'tap:%s': there is no such interface; as root: ip tuntap add %s mode tap user $USER; "
                         "ip link set %s up", tap->name, tap->name, tap->name);
    case EPERM:
    case EACCES:
        return error_set(err, code, "network 'tap:%s': no permission to use the interface; as root: ip tuntap del %s mode tap; "
                         "ip tuntap add %s mode tap user $USER; ip link set %s up", tap->name, tap->name, tap->name, tap->name);
    case EBUSY:
        return error_set(err, code, "network 'tap:%s': another program has the interface; give each machine a tap of its own", tap->name);
    case EINVAL:
        return error_set(err, code, "network 'tap:%s': the interface is not a single-queue tap; make one: "
                         "ip tuntap add NAME mode tap user $USER", tap->name);
    default:
        return error_set(err, code, "network 'tap:%s': cannot use the interface: %s", tap->name, strerror(-code));
    }
}

/* Of an interface that exists: what is held up for a broker does not make one. */
static int tap_acquire(const struct net *net, struct error *err)
{
    const struct tap *tap = (const struct tap *)net;
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    int fd = open(TUN_PATH, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return error_set(err, -errno, "network 'tap:%s': cannot open " TUN_PATH ": %s; is the tun module loaded and the device "
                         "accessible to this user?", tap->name, strerror(errno));
    memcpy(request.ifr_name, tap->name, sizeof tap->name);
    if (ioctl(fd, TUNSETIFF, &request) < 0) {
        int code = -errno;
        close(fd);
        return tap_attach_error(tap, code, err);
    }
    return fd;
}

static int tap_attach(struct tap *tap, struct error *err)
{
    int *given = tap->net.client.given, header_bytes = NET_HEADER_BYTES;
    if (given && *given >= 0) {
        tap->fd = *given;
        *given = -1;
    } else if (if_nametoindex(tap->name) == 0) {
        return tap_attach_error(tap, -ENODEV, err);
    } else if ((tap->fd = tap_acquire(&tap->net, err)) < 0) {
        return tap->fd;
    }
    if (ioctl(tap->fd, TUNSETVNETHDRSZ, &header_bytes) < 0 || ioctl(tap->fd, TUNSETOFFLOAD, 0) < 0)
        return error_set(err, -errno, "network 'tap:%s': the kernel has no 12-byte headers for it: %s", tap->name, strerror(errno));
    return 0;
}

/* Not an error: the interface may be brought up later. The kernel takes frames when it is up. */
static void tap_warn_down(const struct tap *tap)
{
    struct pollfd ready = {.fd = tap->fd, .events = POLLOUT};
    if (poll(&ready, 1, 0) >= 0 && !(ready.revents & POLLOUT))
        log_warning("network 'tap:%s': the interface is down; as root: ip link set %s up", tap->name, tap->name);
}

static void tap_close(struct net *net)
{
    struct tap *tap = (struct tap *)net;
    if (tap->source)
        loop_fd_remove(tap->source);
    if (tap->fd >= 0)
        close(tap->fd);
}

static int tap_open(struct net *net, struct error *err)
{
    struct tap *tap = (struct tap *)net;
    tap->fd = -1;
    int result = tap_attach(tap, err);
    if (result == 0) {
        result = loop_fd_add(net->loop, tap->fd, LOOP_READ, tap_ready, tap, &tap->source);
        if (result < 0)
            error_set(err, result, "network 'tap:%s': cannot wait for the interface: %s", tap->name, strerror(-result));
    }
    if (result < 0) {
        tap_close(net);
        return result;
    }
    tap_warn_down(tap);
    net->info.interface = tap->name;
    net->info.receive = (struct net_offloads){.checksum = true, .tso4 = true, .tso6 = true, .ecn = true};
    return 0;
}

const struct net_backend net_backend_tap = {
    .name = "tap",
    .example = TAP_EXAMPLE,
    .size_bytes = sizeof(struct tap),
    .set_argument = tap_set_argument,
    .acquire = tap_acquire,
    .open = tap_open,
    .close = tap_close,
    .transmit = tap_transmit,
    .resume = tap_resume,
    .take = tap_take,
    .set_offloads = tap_set_offloads,
};
