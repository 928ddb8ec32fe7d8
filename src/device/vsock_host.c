/*
 * The host's side of virtio-vsock: the socket at which programs ask for the guest's ports, and connecting to theirs (virtio_vsock.h).
 *
 * A program's first line is read up to its end and no further, so that what follows is data. Nobody can make this wait: a line that does not come and a guest
 * that does not answer end at a deadline, and without room or descriptors the listening socket is left alone until a connection ends.
 * Threading: on the loop's thread with the device lock held, listen and close before and after it runs.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "device/vsock_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_WITH_IF(SANDBOX_VSOCK, IN_LOOP, socket, ARG_IS(0, AF_UNIX));
SANDBOX_ALLOW_WITH(SANDBOX_VSOCK, IN_LOOP, connect);
SANDBOX_ALLOW_WITH(SANDBOX_VSOCK, IN_LOOP, recvfrom);

#define BACKLOG 128
#define ACCEPT_BATCH 16u
#define RETRY_NS 1000000000ull

/* ---- Listening ---- */

static void client_connected(void *ctx, unsigned events);

/* A socket at which nobody listens any more is left over from a run that was killed. */
static void remove_stale(const struct sockaddr_un *address)
{
    struct stat st;
    if (lstat(address->sun_path, &st) || !S_ISSOCK(st.st_mode))
        return;
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0)
        return;
    if (connect(probe, (const struct sockaddr *)address, sizeof *address) && errno == ECONNREFUSED)
        unlink(address->sun_path);
    close(probe);
}

/* Half of the descriptors that this process may have are for others. */
static unsigned connections_max(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur / 2 > VSOCK_CONNECTIONS_MAX)
        return VSOCK_CONNECTIONS_MAX;
    return limit.rlim_cur < 4 ? 1 : (unsigned)(limit.rlim_cur / 2);
}

int vsock_host_listen(struct virtio_vsock *vsock, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;
    snprintf(address.sun_path, sizeof address.sun_path, "%s", vsock->path);
    vsock->connections_max = connections_max();
    vsock->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (vsock->listen_fd < 0)
        return error_set(err, -errno, "virtio-vsock: cannot make a socket: %s", strerror(errno));
    remove_stale(&address);
    if (bind(vsock->listen_fd, (const struct sockaddr *)&address, sizeof address))
        return error_set(err, -errno, "virtio-vsock: cannot listen on %s: %s", vsock->path,
                         errno == EADDRINUSE ? "something is there already; remove it or choose another path" : strerror(errno));
    if (lstat(vsock->path, &st) == 0) {
        vsock->path_device = st.st_dev;
        vsock->path_inode = st.st_ino;
    }
    if (listen(vsock->listen_fd, BACKLOG))
        return error_set(err, -errno, "virtio-vsock: cannot listen on %s: %s", vsock->path, strerror(errno));
    int result = loop_fd_add(vsock->virtio.host->loop, vsock->listen_fd, LOOP_READ, client_connected, vsock, &vsock->listener);
    if (result < 0)
        return error_set(err, result, "virtio-vsock: cannot wait for connections: %s", strerror(-result));
    vsock->listening = true;
    return 0;
}

void vsock_host_close(struct virtio_vsock *vsock)
{
    struct stat st;
    loop_fd_remove(vsock->listener);
    vsock->listener = NULL;
    if (vsock->listen_fd >= 0)
        close(vsock->listen_fd);
    vsock->listen_fd = -1;
    /* Not what somebody else has put there since. */
    if (vsock->path_inode && lstat(vsock->path, &st) == 0 && st.st_dev == vsock->path_device && st.st_ino == vsock->path_inode)
        unlink(vsock->path);
}

static void pause_listening(struct virtio_vsock *vsock)
{
    vsock->listening = loop_fd_modify(vsock->listener, 0) != 0;
}

void vsock_host_resume(struct virtio_vsock *vsock)
{
    if (vsock->listener && !vsock->listening && loop_fd_modify(vsock->listener, LOOP_READ) == 0)
        vsock->listening = true;
}

/* ---- Deadlines ---- */

void vsock_host_arm(struct virtio_vsock *vsock)
{
    const struct vsock_connection *first = TAILQ_FIRST(&vsock->waiting);
    if (vsock->held_until_ns) /* there are no connections then */
        loop_timer_arm(vsock->timer, vsock->held_until_ns);
    else if (first)
        loop_timer_arm(vsock->timer, first->deadline_ns);
}

/* All wait for the same time, so the list is in the order of deadlines. */
static void set_deadline(struct vsock_connection *connection)
{
    connection->deadline_ns = loop_now_ns() + VSOCK_DEADLINE_NS;
    vsock_host_arm(connection->vsock);
}

void vsock_host_timer(void *ctx)
{
    struct virtio_vsock *vsock = ctx;
    struct vsock_connection *first;
    uint64_t now = loop_now_ns();
    if (vsock->held && vsock->held_until_ns <= now)
        vsock_hold_end(vsock);
    while ((first = TAILQ_FIRST(&vsock->waiting)) && first->deadline_ns <= now)
        vsock_connection_abort(first);
    vsock_host_resume(vsock);
    vsock_host_arm(vsock);
    vsock_send(vsock);
}

/* ---- Programs that want a port of the guest ---- */

static void client_connected(void *ctx, unsigned events)
{
    struct virtio_vsock *vsock = ctx;
    if (vsock_hold(vsock)) {
        pause_listening(vsock);
        return;
    }
    for (unsigned i = 0; i < ACCEPT_BATCH; i++) {
        if (!vsock_connection_room(vsock)) {
            pause_listening(vsock);
            break;
        }
        int fd = accept4(vsock->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0) {
            if (errno != EMFILE && errno != ENFILE && errno != ENOMEM && errno != ENOBUFS)
                break;
            LOG_GUEST(LOG_WARNING, "virtio-vsock: cannot accept a connection: %s", strerror(errno));
            pause_listening(vsock);
            loop_timer_arm(vsock->timer, loop_now_ns() + RETRY_NS);
            break;
        }
        struct vsock_connection *connection = vsock_connection_create(vsock, VSOCK_HELLO, fd);
        if (!connection)
            continue;
        set_deadline(connection);
        vsock_connection_watch(connection, LOOP_READ);
    }
    vsock_send(vsock); /* making room may have ended a connection */
}

/* "CONNECT <port>"; false when it is something else. */
static bool parse_hello(const char *line, uint32_t *port)
{
    uint64_t value = 0;
    if (strncasecmp(line, "CONNECT ", 8) != 0 || !line[8])
        return false;
    for (const char *digit = line + 8; *digit; digit++) {
        if (*digit < '0' || *digit > '9' || (value = value * 10 + (uint64_t)(*digit - '0')) >= VSOCK_PORT_ANY)
            return false;
    }
    *port = (uint32_t)value;
    return true;
}

static uint32_t free_port(struct virtio_vsock *vsock, uint32_t guest_port)
{
    uint32_t port;
    do {
        port = vsock->next_port++;
        if (vsock->next_port == VSOCK_PORT_ANY)
            vsock->next_port = VSOCK_PORT_FIRST;
    } while (vsock_connection_find(vsock, guest_port, port)); /* there are fewer connections than ports */
    return port;
}

/* Adds what has come of the line to connection->hello. 1: it is complete, 0: not yet, negative: it never will be. */
static int read_hello(struct vsock_connection *connection)
{
    char *at = connection->hello + connection->hello_bytes;
    size_t room = sizeof connection->hello - connection->hello_bytes;
    ssize_t seen = recv(connection->fd, at, room, MSG_PEEK);
    if (seen <= 0)
        return seen < 0 && (errno == EAGAIN || errno == EINTR) ? 0 : -ECONNRESET;
    char *end = memchr(at, '\n', (size_t)seen);
    ssize_t taken = recv(connection->fd, at, end ? (size_t)(end - at) + 1 : (size_t)seen, 0);
    if (taken != (end ? end - at + 1 : seen))
        return -ECONNRESET;
    connection->hello_bytes += (unsigned)taken;
    if (!end)
        return connection->hello_bytes == sizeof connection->hello ? -EPROTO : 0;
    *end = '\0';
    return memchr(connection->hello, '\0', (size_t)(end - connection->hello)) ? -EPROTO : 1;
}

void vsock_host_hello(struct vsock_connection *connection)
{
    struct virtio_vsock *vsock = connection->vsock;
    uint32_t port;
    int result = read_hello(connection);
    if (result == 0)
        return;
    if (result < 0 || !parse_hello(connection->hello, &port) || !virtio_ready(&vsock->virtio)) {
        vsock->counters.refused++;
        vsock_connection_free(connection);
        return;
    }
    vsock_connection_watch(connection, 0);
    vsock_connection_bind(connection, port, free_port(vsock, port));
    vsock_connection_enter(connection, VSOCK_REQUESTED);
    set_deadline(connection);
    vsock_pend(connection, VSOCK_PENDING_REQUEST);
}

void vsock_host_accepted(struct vsock_connection *connection)
{
    char line[32];
    int length = snprintf(line, sizeof line, "OK %u\n", connection->host_port);
    if (send(connection->fd, line, (size_t)length, MSG_NOSIGNAL | MSG_DONTWAIT) != length)
        vsock_connection_hang_up(connection);
    else
        vsock_pend(connection, VSOCK_PENDING_DATA);
}

/* ---- Programs that the guest wants ---- */

int vsock_host_connect(struct virtio_vsock *vsock, uint32_t port)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s_%u", vsock->path, port);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (const struct sockaddr *)&address, sizeof address)) {
        int code = -errno; /* also -EAGAIN, when the program has not accepted a long line of others */
        close(fd);
        return code;
    }
    return fd;
}
