/*
 * User networking: the guest's packets end in libslirp, which speaks for them through ordinary sockets of this process.
 *
 * libslirp wants to be asked before each wait which descriptors it waits for, and told after it what became ready. The loop has no such step, so
 * after anything that can change the answer (a frame, a ready descriptor, a timer) the event `service` is raised; it reports
 * what is ready, asks again, and turns the difference into registrations, one `struct watch` for each descriptor.
 * Invariant: between two slirp_pollfds_fill there is exactly one slirp_pollfds_poll; an index given to libslirp is the descriptor itself.
 * Threading: on the loop's thread.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <unistd.h>

#include "net/offload.h"
#include "net/slirp_library.h"
#include "net/user_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

/* What libslirp does for the guest's connections. */
SANDBOX_ALLOW_WITH_IF(SANDBOX_NET_USER, IN_LOOP, socket, ARG_IS(0, AF_INET));
SANDBOX_ALLOW_WITH_IF(SANDBOX_NET_USER, IN_LOOP, socket, ARG_IS(0, AF_INET6));
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, connect);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, bind);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, listen);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, accept);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, recvfrom);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, recvmsg);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, shutdown);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, setsockopt);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, getsockopt);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, getsockname);
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, getpeername);
SANDBOX_ALLOW_WITH_IF(SANDBOX_NET_USER, IN_LOOP, ioctl, ARG_IS(1, FIONREAD));
SANDBOX_ALLOW_WITH_IF(SANDBOX_NET_USER, IN_LOOP, fcntl, ARG_IS(1, F_GETFL));
SANDBOX_ALLOW_WITH_IF(SANDBOX_NET_USER, IN_LOOP, fcntl, ARG_IS(1, F_SETFL));
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, getppid); /* the library's random numbers, for a card that is plugged */
/* It looks for the host's name servers now and then; Landlock lets this one file be found. */
SANDBOX_ALLOW_WITH_IF(SANDBOX_NET_USER, IN_LOOP, openat, ARG_LACKS(2, O_ACCMODE | O_CREAT | O_TRUNC));
SANDBOX_ALLOW_WITH(SANDBOX_NET_USER, IN_LOOP, newfstatat);

#define NS_PER_MS 1000000ull
/* slirp_pollfds_fill asks for a wait of at most this long even when nothing is due. */
#define IDLE_TIMEOUT_MS 1000u
/* libslirp's slow timer runs as long as there is any socket, a listening one too. After this many quiet ticks (half a second each, together
 * longer than a fragment may wait to be reassembled) it is looked at whether anything but forwards is left. */
#define QUIET_TICKS 64u
/* Frames that wait for guest buffers: four windows of 64 KiB for each of a few connections. */
#define BACKLOG_BYTES_MAX (1u << 20)
/* Two VLAN tags more than the largest frame. */
#define FRAME_BYTES_MAX (NET_FRAME_BYTES_MAX + 8u)

struct watch {
    struct user *user;
    int fd;
    unsigned wanted, ready; /* SLIRP_POLL_* */
    bool marked;            /* the loop reported something since the last service */
    uint32_t generation;    /* of the last fill that named it */
    struct loop_fd *source;
    LIST_ENTRY(watch) link;
};

struct waiting_frame {
    STAILQ_ENTRY(waiting_frame) link;
    size_t length_bytes;
    uint8_t data[];
};

struct user_timer {
    struct user *user;
    SlirpTimerId id;
    void *opaque;
    struct loop_timer *timer;
};

struct user {
    struct user_base base;
    Slirp *slirp;
    struct loop_event *service;
    struct loop_timer *tick;
    bool sigpipe_blocked;
    bool active; /* something happened since the last tick */
    unsigned quiet_ticks;
    bool data_valid; /* the guest understands VIRTIO_NET_HDR_F_DATA_VALID */

    LIST_HEAD(, watch) watches;
    struct watch **by_fd;
    size_t by_fd_count;
    struct pollfd *polled; /* room for every watch: by_fd_count */
    uint32_t generation;

    STAILQ_HEAD(, waiting_frame) backlog;
    size_t backlog_bytes;

    uint8_t frame[NET_HEADER_BYTES + FRAME_BYTES_MAX]; /* the guest's, copied before it is looked at */
};

/*
 * libslirp sends without MSG_NOSIGNAL, and a program that uses the library need not ignore SIGPIPE. The signal goes to the thread that
 * wrote, so it is blocked on the loop's.
 */
static void block_sigpipe(struct user *user)
{
    sigset_t set;
    if (user->sigpipe_blocked)
        return;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    user->sigpipe_blocked = pthread_sigmask(SIG_BLOCK, &set, NULL) == 0;
}

static void user_touch(struct user *user)
{
    user->active = true;
    loop_event_raise(user->service);
}

/* ---- Descriptors ---- */

static struct watch *watch_find(struct user *user, int fd)
{
    return fd >= 0 && (size_t)fd < user->by_fd_count ? user->by_fd[fd] : NULL;
}

static void watch_remove(struct watch *watch)
{
    loop_fd_remove(watch->source);
    watch->user->by_fd[watch->fd] = NULL;
    LIST_REMOVE(watch, link);
    free(watch);
}

static void watch_ready(void *ctx, unsigned events)
{
    struct watch *watch = ctx;
    watch->marked = true;
    user_touch(watch->user);
}

static const struct {
    unsigned slirp;
    short poll;
} event_names[] = {
    {SLIRP_POLL_IN, POLLIN},   {SLIRP_POLL_OUT, POLLOUT}, {SLIRP_POLL_PRI, POLLPRI},
    {SLIRP_POLL_ERR, POLLERR}, {SLIRP_POLL_HUP, POLLHUP},
};

/* Fills in `ready` of the watches that the loop reported. */
static void poll_marked(struct user *user)
{
    struct watch *watch;
    nfds_t count = 0;
    LIST_FOREACH(watch, &user->watches, link) {
        watch->ready = 0;
        if (!watch->marked)
            continue;
        watch->marked = false;
        struct pollfd *polled = &user->polled[count++];
        *polled = (struct pollfd){.fd = watch->fd};
        for (size_t i = 0; i < sizeof event_names / sizeof event_names[0]; i++)
            polled->events |= watch->wanted & event_names[i].slirp ? event_names[i].poll : 0;
    }
    if (count == 0 || poll(user->polled, count, 0) <= 0)
        return;
    for (nfds_t n = 0; n < count; n++)
        for (size_t i = 0; i < sizeof event_names / sizeof event_names[0]; i++)
            if (user->polled[n].revents & event_names[i].poll)
                user->by_fd[user->polled[n].fd]->ready |= event_names[i].slirp;
}

static unsigned watch_events(unsigned wanted)
{
    return (wanted & SLIRP_POLL_IN ? LOOP_READ : 0) | (wanted & SLIRP_POLL_OUT ? LOOP_WRITE : 0);
}

static bool by_fd_grow(struct user *user, int fd)
{
    if ((size_t)fd < user->by_fd_count)
        return true;
    size_t count = ((size_t)fd + 64) & ~(size_t)63;
    struct watch **by_fd = reallocarray(user->by_fd, count, sizeof *by_fd);
    if (!by_fd)
        return false;
    memset(by_fd + user->by_fd_count, 0, (count - user->by_fd_count) * sizeof *by_fd);
    user->by_fd = by_fd;
    struct pollfd *polled = reallocarray(user->polled, count, sizeof *polled);
    if (!polled)
        return false;
    user->polled = polled;
    user->by_fd_count = count;
    return true;
}

static struct watch *watch_create(struct user *user, int fd, unsigned wanted)
{
    if (fd < 0 || !by_fd_grow(user, fd))
        return NULL;
    struct watch *watch = calloc(1, sizeof *watch);
    if (!watch)
        return NULL;
    *watch = (struct watch){.user = user, .fd = fd, .wanted = wanted};
    if (loop_fd_add(user->base.net.loop, fd, watch_events(wanted), watch_ready, watch, &watch->source) < 0) {
        free(watch);
        return NULL;
    }
    user->by_fd[fd] = watch;
    LIST_INSERT_HEAD(&user->watches, watch, link);
    return watch;
}

/* Called by slirp_pollfds_fill. What cannot be watched is polled on other occasions' wake-ups only: index -1. */
static int add_poll(int fd, int events, void *opaque)
{
    struct user *user = opaque;
    struct watch *watch = watch_find(user, fd);
    if (!watch) {
        watch = watch_create(user, fd, (unsigned)events);
        if (!watch) {
            LOG_GUEST(LOG_WARNING, "user networking: a connection cannot be waited for: out of memory or descriptors");
            return -1;
        }
    } else if (watch->wanted != (unsigned)events) {
        watch->wanted = (unsigned)events;
        if (loop_fd_modify(watch->source, watch_events(watch->wanted)) < 0) {
            watch_remove(watch);
            return -1;
        }
    }
    watch->generation = user->generation;
    return fd;
}

static int get_revents(int index, void *opaque)
{
    struct watch *watch = watch_find(opaque, index);
    return watch ? (int)watch->ready : 0;
}

/* A descriptor is about to be closed. */
static void unregister_poll_fd(int fd, void *opaque)
{
    struct watch *watch = watch_find(opaque, fd);
    if (watch)
        watch_remove(watch);
}

/* libslirp announces descriptors too early: what it wants of them is known at the next fill. */
static void register_poll_fd(int fd, void *opaque)
{
}

/* ---- Time ---- */

/* True when no connection but the listening sockets of forwards is left: then the slow timer has nothing to do. */
static bool only_forwards(struct user *user)
{
    char *text = slirp_connection_info(user->slirp);
    bool only = text != NULL;
    for (char *line = text ? strchr(text, '\n') : NULL; line && line[1]; line = strchr(line + 1, '\n')) /* behind the heading */
        only &= strncmp(line + 1 + strspn(line + 1, " "), "TCP[HOST_FORWARD]", 17) == 0 ||
                strncmp(line + 1 + strspn(line + 1, " "), "UDP[HOST_FORWARD]", 17) == 0;
    free(text); /* from g_malloc, which is malloc since GLib 2.46 */
    return only;
}

static void arm_tick(struct user *user, uint32_t timeout_ms)
{
    if (user->active)
        user->quiet_ticks = 0;
    user->active = false;
    bool idle = timeout_ms >= IDLE_TIMEOUT_MS || (user->quiet_ticks >= QUIET_TICKS && only_forwards(user));
    if (idle)
        loop_timer_disarm(user->tick);
    else
        loop_timer_arm(user->tick, loop_now_ns() + timeout_ms * NS_PER_MS);
}

static void user_service(void *ctx)
{
    struct user *user = ctx;
    block_sigpipe(user);
    poll_marked(user);
    slirp_pollfds_poll(user->slirp, 0, get_revents, user);

    uint32_t timeout_ms = UINT32_MAX;
    user->generation++;
    slirp_pollfds_fill(user->slirp, &timeout_ms, add_poll, user);
    struct watch *next;
    for (struct watch *watch = LIST_FIRST(&user->watches); watch; watch = next) {
        next = LIST_NEXT(watch, link);
        if (watch->generation != user->generation)
            watch_remove(watch);
    }
    arm_tick(user, timeout_ms);
}

static void tick_expired(void *ctx)
{
    struct user *user = ctx;
    user->quiet_ticks++;
    user_service(user);
}

static int64_t clock_get_ns(void *opaque)
{
    return (int64_t)loop_now_ns();
}

static void timer_expired(void *ctx)
{
    struct user_timer *timer = ctx;
    slirp_handle_timer(timer->user->slirp, timer->id, timer->opaque);
    user_touch(timer->user);
}

static void *timer_new(SlirpTimerId id, void *timer_opaque, void *opaque)
{
    struct user *user = opaque;
    struct user_timer *timer = calloc(1, sizeof *timer);
    if (!timer)
        return NULL;
    *timer = (struct user_timer){user, id, timer_opaque, loop_timer_create(user->base.net.loop, timer_expired, timer)};
    return timer;
}

/* A timer without memory never expires: router advertisements then come when asked for only. */
static void timer_mod(void *opaque_timer, int64_t expire_ms, void *opaque)
{
    struct user_timer *timer = opaque_timer;
    if (timer && timer->timer)
        loop_timer_arm(timer->timer, (uint64_t)expire_ms * NS_PER_MS);
}

static void timer_free(void *opaque_timer, void *opaque)
{
    struct user_timer *timer = opaque_timer;
    if (timer && timer->timer)
        loop_timer_destroy(timer->timer);
    free(timer);
}

/* ---- Frames ---- */

static bool deliver(struct user *user, const void *frame, size_t length_bytes)
{
    /* Made by libslirp in this process, checksums included. */
    struct net_header header = {.flags = user->data_valid ? NET_HEADER_F_DATA_VALID : 0};
    const struct iovec iov[2] = {{&header, sizeof header}, {(void *)(uintptr_t)frame, length_bytes}};
    return user->base.net.client.receive(user->base.net.client.ctx, iov, 2);
}

static void backlog_add(struct user *user, const void *frame, size_t length_bytes)
{
    struct waiting_frame *waiting = NULL;
    if (user->backlog_bytes + length_bytes <= BACKLOG_BYTES_MAX)
        waiting = malloc(sizeof *waiting + length_bytes);
    if (!waiting) {
        user->base.net.info.dropped_to_guest++; /* TCP sends it again, slower */
        return;
    }
    waiting->length_bytes = length_bytes;
    memcpy(waiting->data, frame, length_bytes);
    STAILQ_INSERT_TAIL(&user->backlog, waiting, link);
    user->backlog_bytes += length_bytes;
}

static void backlog_drop_first(struct user *user)
{
    struct waiting_frame *waiting = STAILQ_FIRST(&user->backlog);
    STAILQ_REMOVE_HEAD(&user->backlog, link);
    user->backlog_bytes -= waiting->length_bytes;
    free(waiting);
}

static ssize_t send_packet(const void *frame, size_t length_bytes, void *opaque)
{
    struct user *user = opaque;
    user->active = true;
    if (!STAILQ_EMPTY(&user->backlog) || !deliver(user, frame, length_bytes))
        backlog_add(user, frame, length_bytes);
    return (ssize_t)length_bytes;
}

static void user_resume(struct net *net)
{
    struct user *user = (struct user *)net;
    struct waiting_frame *waiting;
    while ((waiting = STAILQ_FIRST(&user->backlog)) && deliver(user, waiting->data, waiting->length_bytes))
        backlog_drop_first(user);
}

static void input(void *ctx, const uint8_t *frame, size_t length_bytes)
{
    struct user *user = ctx;
    slirp_input(user->slirp, frame, (int)length_bytes);
}

static bool user_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    struct user *user = (struct user *)net;
    size_t total_bytes = 0;
    block_sigpipe(user);
    for (unsigned i = 0; i < iov_count; i++) {
        if (iov[i].iov_len > sizeof user->frame - total_bytes) {
            net->info.dropped_from_guest++;
            return true;
        }
        memcpy(user->frame + total_bytes, iov[i].iov_base, iov[i].iov_len);
        total_bytes += iov[i].iov_len;
    }
    struct net_header header;
    if (total_bytes < sizeof header) {
        net->info.dropped_from_guest++;
        return true;
    }
    memcpy(&header, user->frame, sizeof header);
    if (net_offload_finish(&header, user->frame + sizeof header, total_bytes - sizeof header, input, user) < 0) {
        net->info.dropped_from_guest++;
        LOG_GUEST(LOG_DEBUG, "user networking: dropped a frame of %zu bytes whose header does not fit it", total_bytes);
    }
    user_touch(user);
    return true;
}

static void user_set_offloads(struct net *net, const struct net_offloads *offloads)
{
    ((struct user *)net)->data_valid = offloads->checksum;
}

static void guest_error(const char *message, void *opaque)
{
    LOG_GUEST(LOG_DEBUG, "user networking: %s", message);
}

static void notify(void *opaque)
{
    user_touch(opaque);
}

/* ---- Creation ---- */

static const SlirpCb callbacks = {
    .send_packet = send_packet,
    .guest_error = guest_error,
    .clock_get_ns = clock_get_ns,
    .timer_free = timer_free,
    .timer_mod = timer_mod,
    .register_poll_fd = register_poll_fd,
    .unregister_poll_fd = unregister_poll_fd,
    .notify = notify,
    .timer_new_opaque = timer_new,
};

/*
 * Tries to bind the port as the forward will, to say why it cannot be had: libslirp loses the reason, and it binds UDP ports in a way
 * that silently shares them with another libslirp.
 */
static int probe_port(const struct user_forward *forward, struct error *err)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(forward->host_port), .sin_addr = forward->host};
    char text[INET_ADDRSTRLEN];
    inet_ntop(AF_INET, &forward->host, text, sizeof text);
    const char *protocol = forward->udp ? "udp" : "tcp";
    int fd = socket(AF_INET, (forward->udp ? SOCK_DGRAM : SOCK_STREAM) | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return error_set(err, -errno, "network forward %s:%s:%u: no socket: %s", protocol, text, forward->host_port, strerror(errno));
    int one = 1, result = 0;
    if (!forward->udp) /* connections that linger after a forward's end do not block it */
        result = setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (result == 0)
        result = bind(fd, (struct sockaddr *)&address, sizeof address);
    if (result == 0 && !forward->udp)
        result = listen(fd, 1);
    result = result < 0 ? -errno : 0;
    close(fd);
    switch (-result) {
    case 0:
        return 0;
    case EADDRINUSE:
        return error_set(err, result, "network forward: %s port %u on %s is in use; choose another host port", protocol,
                         forward->host_port, text);
    case EADDRNOTAVAIL:
        return error_set(err, result, "network forward: %s is not an address of this host; use 127.0.0.1, 0.0.0.0 or one of its own", text);
    case EACCES:
        return error_set(err, result, "network forward: no permission for %s port %u on %s; ports below 1024 need CAP_NET_BIND_SERVICE",
                         protocol, forward->host_port, text);
    default:
        return error_set(err, result, "network forward: cannot have %s port %u on %s: %s", protocol, forward->host_port, text,
                         strerror(-result));
    }
}

static int open_forward(struct user *user, const struct user_forward *forward, struct error *err)
{
    int result = probe_port(forward, err);
    if (result < 0)
        return result;
    if (slirp_add_hostfwd(user->slirp, forward->udp, forward->host, forward->host_port, forward->guest, forward->guest_port) < 0)
        return error_set(err, -EADDRINUSE, "network forward: cannot open %s port %u on %s", forward->udp ? "udp" : "tcp",
                         forward->host_port, inet_ntoa(forward->host));
    return 0;
}

static Slirp *create_slirp(struct user *user)
{
    const struct user_options *options = &user->base.options;
    SlirpConfig config = {
        .version = 4,
        .restricted = options->restricted,
        .in_enabled = true,
        .vnetwork = options->network,
        .vnetmask = options->mask,
        .vhost = options->host,
        .in6_enabled = !options->no_ipv6,
        .vprefix_len = 64,
        .vhostname = options->hostname[0] ? options->hostname : NULL,
        .vdhcp_start = options->dhcp_start,
        .vnameserver = options->dns,
        .if_mtu = user->base.net.info.mtu,
        .if_mru = user->base.net.info.mtu,
        .disable_host_loopback = options->no_loopback,
    };
    inet_pton(AF_INET6, "fec0::", &config.vprefix_addr6);
    inet_pton(AF_INET6, "fec0::2", &config.vhost6);
    inet_pton(AF_INET6, "fec0::3", &config.vnameserver6);
    return slirp_new(&config, &callbacks, user);
}

static void user_close(struct net *net)
{
    struct user *user = (struct user *)net;
    if (user->slirp)
        slirp_cleanup(user->slirp);
    while (!LIST_EMPTY(&user->watches))
        watch_remove(LIST_FIRST(&user->watches));
    free(user->by_fd);
    free(user->polled);
    while (!STAILQ_EMPTY(&user->backlog))
        backlog_drop_first(user);
    if (user->tick)
        loop_timer_destroy(user->tick);
    if (user->service)
        loop_event_destroy(user->service);
}

void net_load_ahead(void)
{
    library_load_ahead(&slirp_library_file);
}

static int user_open(struct net *net, struct error *err)
{
    struct user *user = (struct user *)net;
    LIST_INIT(&user->watches);
    STAILQ_INIT(&user->backlog);
    int result = library_load(&slirp_library_file, err);
    if (result < 0) {
        error_prefix(err, "user networking");
        return result;
    }
    net->info.receive.checksum = true;
    user->service = loop_event_create(net->loop, user_service, user);
    user->tick = loop_timer_create(net->loop, tick_expired, user);
    if (user->service && user->tick)
        user->slirp = create_slirp(user);
    if (!user->slirp)
        result = error_set(err, -ENOMEM, "user networking: libslirp does not start");
    for (unsigned i = 0; result == 0 && i < user->base.options.forward_count; i++)
        result = open_forward(user, &user->base.options.forward[i], err);
    if (result < 0) {
        user_close(net);
        return result;
    }
    loop_event_raise(user->service);
    return 0;
}

const struct net_backend net_backend_user = {
    .name = "user",
    .example = USER_EXAMPLE,
    .size_bytes = sizeof(struct user),
    .options = user_option_table,
    .check = user_options_check,
    .open = user_open,
    .close = user_close,
    .transmit = user_transmit,
    .resume = user_resume,
    .set_offloads = user_set_offloads,
};
