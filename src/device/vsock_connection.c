/*
 * Connections of virtio-vsock (vsock_priv.h): their table, their end, and the bytes of the guest on the way to the host's program.
 *
 * Invariants: received - forwarded bytes of the guest are in the buffer, at most credit_bytes. LOOP_WRITE is watched exactly while there are some that were
 * not gathered just now: small packets of one notification go to the socket together, at its end or before anything else of their connection. fd is -1 once the
 * host's program has gone; the connection then only waits for the guest to close it, too.
 * Threading: with the device lock held.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "device/vsock_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_WITH(SANDBOX_VSOCK, IN_LOOP, sendmsg);
SANDBOX_ALLOW_WITH(SANDBOX_VSOCK, IN_LOOP, shutdown);

/* ---- The table ---- */

static unsigned bucket_of(uint32_t guest_port, uint32_t host_port)
{
    return (guest_port ^ host_port * 31) % VSOCK_BUCKETS;
}

struct vsock_connection *vsock_connection_find(struct virtio_vsock *vsock, uint32_t guest_port, uint32_t host_port)
{
    struct vsock_connection *connection;
    LIST_FOREACH(connection, &vsock->table[bucket_of(guest_port, host_port)], bucket)
        if (connection->guest_port == guest_port && connection->host_port == host_port)
            return connection;
    return NULL;
}

static struct vsock_list *list_of(struct virtio_vsock *vsock, enum vsock_state state)
{
    return state == VSOCK_OPEN ? &vsock->open : state == VSOCK_FLUSHING ? &vsock->flushing : &vsock->waiting;
}


struct vsock_connection *vsock_connection_create(struct virtio_vsock *vsock, enum vsock_state state, int fd)
{
    struct vsock_connection *connection = calloc(1, sizeof *connection);
    if (!connection || loop_fd_add(vsock->virtio.host->loop, fd, 0, vsock_connection_ready, connection, &connection->source)) {
        free(connection);
        close(fd);
        return NULL;
    }
    connection->vsock = vsock;
    connection->state = state;
    connection->fd = fd;
    connection->burst = 1;
    connection->credit_bytes = vsock->connection_count < VSOCK_CREDIT_FEW ? VSOCK_CREDIT_BYTES : VSOCK_CREDIT_SMALL_BYTES;
    TAILQ_INSERT_TAIL(list_of(vsock, state), connection, list);
    vsock->connection_count++;
    return connection;
}

void vsock_connection_bind(struct vsock_connection *connection, uint32_t guest_port, uint32_t host_port)
{
    connection->guest_port = guest_port;
    connection->host_port = host_port;
    connection->bound = true;
    LIST_INSERT_HEAD(&connection->vsock->table[bucket_of(guest_port, host_port)], connection, bucket);
}

void vsock_connection_enter(struct vsock_connection *connection, enum vsock_state state)
{
    TAILQ_REMOVE(list_of(connection->vsock, connection->state), connection, list);
    connection->state = state;
    TAILQ_INSERT_TAIL(list_of(connection->vsock, state), connection, list);
}

static void leave_table(struct vsock_connection *connection)
{
    if (connection->bound)
        LIST_REMOVE(connection, bucket);
    connection->bound = false;
}

bool vsock_connection_room(struct virtio_vsock *vsock)
{
    struct vsock_connection *connection;
    if (vsock->connection_count < vsock->connections_max)
        return true;
    TAILQ_FOREACH(connection, &vsock->open, list) {
        if (connection->fd < 0) {
            vsock_connection_abort(connection);
            return true;
        }
    }
    connection = TAILQ_FIRST(&vsock->flushing);
    if (connection)
        vsock_connection_free(connection);
    return connection != NULL;
}

/* ---- The end ---- */

/* The bytes are forwarded, or nobody will take them. Large buffers are kept for the next connection that needs one. */
static void drop_buffer(struct vsock_connection *connection)
{
    struct virtio_vsock *vsock = connection->vsock;
    connection->forwarded = connection->received;
    connection->buffer_start = 0;
    if (!vsock->spare && connection->credit_bytes == VSOCK_CREDIT_BYTES)
        vsock->spare = connection->buffer;
    else
        free(connection->buffer);
    connection->buffer = NULL;
}

static void leave_gathered(struct vsock_connection *connection)
{
    if (connection->gathered)
        TAILQ_REMOVE(&connection->vsock->gathered, connection, gathering);
    connection->gathered = false;
}

static void close_socket(struct vsock_connection *connection)
{
    if (connection->fd < 0)
        return;
    leave_gathered(connection);
    loop_fd_remove(connection->source);
    close(connection->fd);
    connection->source = NULL;
    connection->fd = -1;
    connection->events = 0;
    drop_buffer(connection);
    vsock_host_resume(connection->vsock);
}

void vsock_connection_free(struct vsock_connection *connection)
{
    struct virtio_vsock *vsock = connection->vsock;
    vsock_unpend(connection);
    leave_table(connection);
    TAILQ_REMOVE(list_of(vsock, connection->state), connection, list);
    vsock->connection_count--;
    close_socket(connection);
    vsock_host_resume(vsock);
    free(connection);
}

static void send_reset(struct vsock_connection *connection)
{
    const struct vsock_reset reset = {VSOCK_CID_HOST, connection->guest_port, connection->host_port, VSOCK_TYPE_STREAM};
    vsock_reset_ports(connection->vsock, &reset);
}

void vsock_connection_abort(struct vsock_connection *connection)
{
    if (connection->bound)
        send_reset(connection);
    vsock_connection_free(connection);
}

void vsock_connection_hang_up(struct vsock_connection *connection)
{
    close_socket(connection);
    connection->host_closed = VSOCK_SHUTDOWN_BOTH;
    vsock_pend(connection, VSOCK_PENDING_SHUTDOWN);
}

void vsock_connections_drop(struct virtio_vsock *vsock)
{
    struct vsock_list *const lists[] = {&vsock->waiting, &vsock->open, &vsock->flushing};
    struct vsock_connection *connection;
    for (unsigned i = 0; i < sizeof lists / sizeof *lists; i++)
        while ((connection = TAILQ_FIRST(lists[i])))
            vsock_connection_free(connection);
}

/* ---- Bytes for the host ---- */

uint32_t vsock_connection_buffered(const struct vsock_connection *connection)
{
    return connection->received - connection->forwarded;
}

void vsock_connection_watch(struct vsock_connection *connection, unsigned events)
{
    if (connection->events == events || !connection->source)
        return;
    connection->events = events;
    int result = loop_fd_modify(connection->source, events);
    if (result < 0)
        LOG_GUEST(LOG_ERROR, "virtio-vsock: cannot wait for a socket: %s", strerror(-result));
}

/* The guest is told of room in larger steps. */
static void tell_credit(struct vsock_connection *connection)
{
    if (connection->forwarded - connection->forwarded_told >= connection->credit_bytes / 4 && connection->state == VSOCK_OPEN)
        vsock_pend(connection, VSOCK_PENDING_CREDIT);
}

/* The guest sends no more and everything has been handed on. False: that was all there was to do for this connection. */
static bool all_forwarded(struct vsock_connection *connection)
{
    if (connection->state == VSOCK_FLUSHING) {
        vsock_connection_free(connection);
        return false;
    }
    if (connection->guest_closed & VSOCK_SHUTDOWN_SEND && !connection->write_shut) {
        connection->write_shut = true;
        (void)shutdown(connection->fd, SHUT_WR);
    }
    return true;
}

/* The host's program does not take anything any more. False: the connection has ended. */
static bool write_failed(struct vsock_connection *connection)
{
    drop_buffer(connection);
    vsock_connection_watch(connection, connection->events & ~LOOP_WRITE);
    connection->host_closed |= VSOCK_SHUTDOWN_RECEIVE;
    if (connection->state == VSOCK_OPEN)
        vsock_pend(connection, VSOCK_PENDING_SHUTDOWN);
    return all_forwarded(connection);
}

static ssize_t send_now(struct vsock_connection *connection, const struct iovec *iov, unsigned iov_count)
{
    const struct msghdr message = {.msg_iov = (struct iovec *)(uintptr_t)iov, .msg_iovlen = iov_count};
    ssize_t sent = sendmsg(connection->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    return sent < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOBUFS || errno == ENOMEM) ? 0 : sent;
}

/* The buffer's bytes, in one piece or two. */
static unsigned buffer_vectors(const struct vsock_connection *connection, struct iovec iov[2])
{
    uint32_t fill = vsock_connection_buffered(connection), first = connection->credit_bytes - connection->buffer_start;
    if (first > fill)
        first = fill;
    iov[0] = (struct iovec){connection->buffer + connection->buffer_start, first};
    iov[1] = (struct iovec){connection->buffer, fill - first};
    return fill > first ? 2 : 1;
}

/* False: the connection has ended. */
static bool flush(struct vsock_connection *connection)
{
    struct iovec iov[2];
    unsigned iov_count = buffer_vectors(connection, iov);
    ssize_t sent = send_now(connection, iov, iov_count);
    if (sent < 0)
        return write_failed(connection);
    connection->forwarded += (uint32_t)sent;
    connection->buffer_start = (connection->buffer_start + (uint32_t)sent) % connection->credit_bytes;
    tell_credit(connection);
    if (vsock_connection_buffered(connection))
        return true;
    drop_buffer(connection);
    vsock_connection_watch(connection, connection->events & ~LOOP_WRITE);
    return all_forwarded(connection);
}

static bool make_buffer(struct vsock_connection *connection)
{
    struct virtio_vsock *vsock = connection->vsock;
    if (!connection->buffer && vsock->spare && connection->credit_bytes == VSOCK_CREDIT_BYTES) {
        connection->buffer = vsock->spare;
        vsock->spare = NULL;
    }
    if (!connection->buffer)
        connection->buffer = malloc(connection->credit_bytes);
    return connection->buffer != NULL;
}

/* Copies the vectors from byte `skip_bytes` behind the `fill` bytes that are in the buffer already. */
static void append(struct vsock_connection *connection, uint32_t fill, const struct iovec *iov, unsigned iov_count, size_t skip_bytes)
{
    uint32_t size = connection->credit_bytes, at = (connection->buffer_start + fill) % size;
    for (unsigned i = 0; i < iov_count; i++) {
        size_t skipped = skip_bytes < iov[i].iov_len ? skip_bytes : iov[i].iov_len;
        const uint8_t *from = (const uint8_t *)iov[i].iov_base + skipped;
        size_t left = iov[i].iov_len - skipped;
        skip_bytes -= skipped;
        while (left) {
            size_t part = left < size - at ? left : size - at;
            memcpy(connection->buffer + at, from, part);
            at = (at + (uint32_t)part) % size;
            from += part;
            left -= part;
        }
    }
}

/* Into the buffer. False: there was no memory, the connection has ended. */
static bool keep(struct vsock_connection *connection, const struct iovec *iov, unsigned iov_count, uint32_t fill, size_t skip_bytes)
{
    if (!make_buffer(connection)) {
        LOG_GUEST(LOG_ERROR, "virtio-vsock: out of memory");
        vsock_connection_abort(connection);
        return false;
    }
    append(connection, fill, iov, iov_count, skip_bytes);
    return true;
}

static void gather(struct vsock_connection *connection, const struct iovec *iov, unsigned iov_count, uint32_t fill)
{
    if (!keep(connection, iov, iov_count, fill, 0) || connection->gathered)
        return;
    connection->gathered = true;
    TAILQ_INSERT_TAIL(&connection->vsock->gathered, connection, gathering);
}

void vsock_connection_release(struct vsock_connection *connection)
{
    if (!connection->gathered)
        return;
    leave_gathered(connection);
    if (flush(connection) && vsock_connection_buffered(connection))
        vsock_connection_watch(connection, connection->events | LOOP_WRITE);
}

void vsock_connections_release(struct virtio_vsock *vsock)
{
    struct vsock_connection *connection;
    while ((connection = TAILQ_FIRST(&vsock->gathered)))
        vsock_connection_release(connection);
}

void vsock_connection_write(struct vsock_connection *connection, const struct iovec *iov, unsigned iov_count, uint32_t size_bytes)
{
    uint32_t fill = vsock_connection_buffered(connection);
    ssize_t sent = 0;
    connection->received += size_bytes;
    if (connection->fd < 0 || connection->host_closed & VSOCK_SHUTDOWN_RECEIVE) {
        connection->forwarded = connection->received; /* on the way when the guest was told */
        tell_credit(connection);
        return;
    }
    if (size_bytes == 0)
        return;
    if (size_bytes <= VSOCK_GATHER_BYTES_MAX && (fill == 0 || connection->gathered)) {
        gather(connection, iov, iov_count, fill);
        return;
    }
    if (fill == 0) {
        sent = send_now(connection, iov, iov_count);
        if (sent < 0) {
            (void)write_failed(connection);
            return;
        }
        connection->forwarded += (uint32_t)sent;
        tell_credit(connection);
    }
    if ((size_t)sent != size_bytes && keep(connection, iov, iov_count, fill, (size_t)sent))
        vsock_connection_watch(connection, connection->events | LOOP_WRITE);
}

void vsock_connection_guest_shutdown(struct vsock_connection *connection, unsigned flags)
{
    connection->guest_closed |= (uint8_t)flags;
    if (connection->state != VSOCK_OPEN) {
        vsock_connection_abort(connection);
        return;
    }
    if (connection->guest_closed == VSOCK_SHUTDOWN_BOTH) {
        /* 5.10.6.5: the answer to a complete shutdown is RST. What is in the buffer is in our care now. */
        send_reset(connection);
        leave_table(connection);
        vsock_unpend(connection);
        if (connection->fd < 0 || vsock_connection_buffered(connection) == 0) {
            vsock_connection_free(connection);
            return;
        }
        vsock_connection_enter(connection, VSOCK_FLUSHING);
    }
    if (connection->fd < 0)
        return;
    if (connection->guest_closed & VSOCK_SHUTDOWN_RECEIVE) {
        (void)shutdown(connection->fd, SHUT_RD); /* the host's program notices when it writes */
        vsock_connection_watch(connection, connection->events & ~LOOP_READ);
    }
    if (vsock_connection_buffered(connection) == 0)
        (void)all_forwarded(connection);
}

void vsock_connection_ready(void *ctx, unsigned events)
{
    struct vsock_connection *connection = ctx;
    struct virtio_vsock *vsock = connection->vsock;
    bool there = true;
    if (connection->state == VSOCK_HELLO) {
        vsock_host_hello(connection);
    } else {
        if (events & (LOOP_WRITE | LOOP_HANGUP) && vsock_connection_buffered(connection))
            there = flush(connection);
        if (there && events & (LOOP_READ | LOOP_HANGUP) && connection->events & LOOP_READ)
            (void)vsock_pump(connection);
    }
    vsock_send(vsock);
}
