/*
 * virtio-vsock (virtio 1.2, section 5.10): packets between the guest's driver and the connections of vsock_connection.c.
 *
 * Packets of the guest are handled at once: their bytes go straight from guest memory to a Unix socket, or into the connection's buffer, so that no chain is in
 * flight between two callbacks. Bytes for the guest are read by the Unix socket straight into as many receive buffers as the guest gave and the connection's
 * credit allows, the headers are filled in afterwards. Where buffers or credit are missing, the socket is not watched until they come.
 * Work for one event is bounded by BATCH and BATCH_BYTES. Every number in a packet is the guest's: headers are copied out before they are looked at.
 * Threading: with the device lock held, on the loop's thread except for resets.
 */
#include "device/virtio_vsock.h"

#include <assert.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/vsock_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_WITH(SANDBOX_VSOCK, IN_LOOP, readv);

/* 5.10.2 */
enum { QUEUE_RX, QUEUE_TX, QUEUE_EVENT, QUEUES };
#define QUEUE_SIZE 256u
#define BATCH 64u
#define BATCH_BYTES (1u << 20)
#define BURST_FIRST 2u

#define F_STREAM 0 /* 5.10.3 */

#define EVENT_TRANSPORT_RESET 0u /* 5.10.6.6 */

/* ---- To the guest ---- */

/* A receive buffer with room for a header. NULL: there is none now, and the driver is asked to tell of new ones. */
static struct virtqueue_chain *take_chain(struct virtio_vsock *vsock)
{
    struct virtqueue *queue = virtio_queue(&vsock->virtio, QUEUE_RX);
    struct virtqueue_chain *chain = virtqueue_pop(queue);
    if (!chain && virtqueue_set_notification(queue, true)) {
        chain = virtqueue_pop(queue);
        if (chain)
            virtqueue_set_notification(queue, false);
    }
    if (chain && chain->out_bytes <= VSOCK_HEADER_BYTES) {
        virtqueue_unpop(chain);
        virtqueue_fail(queue, "a receive buffer has no room for data behind a packet's header");
        return NULL;
    }
    return chain;
}

static bool send_packet(struct virtio_vsock *vsock, const struct vsock_header *header)
{
    struct virtqueue_chain *chain = take_chain(vsock);
    if (!chain)
        return false;
    virtqueue_push(chain, virtqueue_write(chain, 0, header, VSOCK_HEADER_BYTES), true);
    return true;
}

/* The header of a packet of this connection, which also tells the guest of the buffer's state. */
static struct vsock_header header_of(const struct vsock_connection *connection, enum vsock_op op)
{
    return (struct vsock_header){
        .src_cid = VSOCK_CID_HOST,
        .dst_cid = connection->vsock->cid,
        .src_port = connection->host_port,
        .dst_port = connection->guest_port,
        .type = VSOCK_TYPE_STREAM,
        .op = (uint16_t)op,
        .flags = op == VSOCK_OP_SHUTDOWN ? connection->host_closed : 0,
        .buf_alloc = connection->credit_bytes,
        .fwd_cnt = connection->forwarded,
    };
}

static bool send_reset(struct virtio_vsock *vsock)
{
    const struct vsock_reset *reset = &vsock->reset[vsock->reset_first];
    const struct vsock_header header = {
        .src_cid = reset->host_cid,
        .dst_cid = vsock->cid,
        .src_port = reset->host_port,
        .dst_port = reset->guest_port,
        .type = reset->type,
        .op = VSOCK_OP_RST,
    };
    if (!send_packet(vsock, &header))
        return false;
    vsock->reset_first = (vsock->reset_first + 1) % VSOCK_RESETS_MAX;
    vsock->reset_count--;
    return true;
}

/* A guest that leaves as many answers lying is not told of more; its own timeouts help it then. */
void vsock_reset_ports(struct virtio_vsock *vsock, const struct vsock_reset *reset)
{
    if (vsock->reset_count == VSOCK_RESETS_MAX) {
        LOG_GUEST(LOG_WARNING, "virtio-vsock: the guest takes no answers");
        return;
    }
    vsock->reset[(vsock->reset_first + vsock->reset_count++) % VSOCK_RESETS_MAX] = *reset;
}

void vsock_pend(struct vsock_connection *connection, unsigned bits)
{
    if (!connection->pending)
        TAILQ_INSERT_TAIL(&connection->vsock->pending, connection, sending);
    connection->pending |= (uint8_t)bits;
}

void vsock_unpend(struct vsock_connection *connection)
{
    if (connection->pending)
        TAILQ_REMOVE(&connection->vsock->pending, connection, sending);
    connection->pending = 0;
}

static const struct {
    uint8_t bit, op;
} pending_packets[] = {
    {VSOCK_PENDING_REQUEST, VSOCK_OP_REQUEST},
    {VSOCK_PENDING_RESPONSE, VSOCK_OP_RESPONSE},
    {VSOCK_PENDING_CREDIT, VSOCK_OP_CREDIT_UPDATE},
    {VSOCK_PENDING_SHUTDOWN, VSOCK_OP_SHUTDOWN},
};

/* The first connection's packets without data; false: there are no buffers. */
static bool send_pending(struct vsock_connection *connection)
{
    for (unsigned i = 0; i < sizeof pending_packets / sizeof *pending_packets; i++) {
        if (!(connection->pending & pending_packets[i].bit))
            continue;
        /* Whatever went out since told the same. */
        if (pending_packets[i].bit != VSOCK_PENDING_CREDIT || connection->forwarded != connection->forwarded_told) {
            const struct vsock_header header = header_of(connection, pending_packets[i].op);
            if (!send_packet(connection->vsock, &header))
                return false;
            connection->forwarded_told = connection->forwarded;
        }
        connection->pending &= (uint8_t)~pending_packets[i].bit;
        if (!connection->pending) {
            TAILQ_REMOVE(&connection->vsock->pending, connection, sending);
            return true;
        }
    }
    return true;
}

void vsock_send(struct virtio_vsock *vsock)
{
    struct vsock_connection *connection;
    uint64_t bytes = 0;
    if (!virtio_ready(&vsock->virtio))
        return;
    while (vsock->reset_count)
        if (!send_reset(vsock))
            return;
    for (unsigned i = 0; (connection = TAILQ_FIRST(&vsock->pending)); i++) {
        if (i == BATCH || bytes >= BATCH_BYTES) {
            virtio_wake_queue(&vsock->virtio, QUEUE_RX);
            return;
        }
        if (!send_pending(connection))
            return;
        if (connection->pending & VSOCK_PENDING_DATA) {
            vsock_unpend(connection);
            int64_t moved = vsock_pump(connection); /* back at the end when there is more */
            if (moved == -ENOBUFS)
                return;
            bytes += moved > 0 ? (uint64_t)moved : 0;
        }
    }
    while (vsock->reset_count && send_reset(vsock))
        ;
}

/* ---- Data for the guest ---- */

/* What the guest has room for: 5.10.6.3. It may have lied; then it has room for nothing. */
static uint32_t guest_credit(const struct vsock_connection *connection)
{
    uint32_t on_the_way = connection->sent - connection->guest_forwarded;
    return on_the_way < connection->guest_alloc ? connection->guest_alloc - on_the_way : 0;
}

static bool wants_data(const struct vsock_connection *connection)
{
    return connection->state == VSOCK_OPEN && connection->fd >= 0 && !(connection->host_closed & VSOCK_SHUTDOWN_SEND) &&
           !(connection->guest_closed & VSOCK_SHUTDOWN_RECEIVE);
}

struct burst {
    unsigned count, iov_count;
    uint64_t room_bytes;
};

/* Takes up to connection->burst buffers for at most `most` bytes of data; their vectors go to vsock->iov. */
static struct burst take_burst(struct vsock_connection *connection, uint64_t most)
{
    struct virtio_vsock *vsock = connection->vsock;
    struct burst burst = {0};
    while (burst.count < connection->burst && burst.room_bytes < most) {
        struct virtqueue_chain *chain = take_chain(vsock);
        if (!chain)
            break;
        if (chain->out_count > VIRTQUEUE_CHAIN_MAX - burst.iov_count) {
            virtqueue_unpop(chain);
            break;
        }
        uint64_t room = chain->out_bytes - VSOCK_HEADER_BYTES;
        if (room > most - burst.room_bytes)
            room = most - burst.room_bytes;
        burst.iov_count += virtqueue_slice(chain, true, VSOCK_HEADER_BYTES, room, vsock->iov + burst.iov_count);
        burst.room_bytes += room;
        vsock->chain[burst.count++] = chain;
    }
    return burst;
}

/* Sends `size_bytes` that are in the first buffers already, and gives the others back. */
static void send_burst(struct vsock_connection *connection, unsigned count, uint64_t size_bytes)
{
    struct virtio_vsock *vsock = connection->vsock;
    unsigned used = 0;
    for (uint64_t room = 0; room < size_bytes; used++)
        room += vsock->chain[used]->out_bytes - VSOCK_HEADER_BYTES;
    while (count > used)
        virtqueue_unpop(vsock->chain[--count]); /* last popped first */
    struct vsock_header header = header_of(connection, VSOCK_OP_RW);
    for (unsigned i = 0; i < used; i++) {
        struct virtqueue_chain *chain = vsock->chain[i];
        uint64_t part = chain->out_bytes - VSOCK_HEADER_BYTES;
        if (part > size_bytes)
            part = size_bytes;
        size_bytes -= part;
        header.len = (uint32_t)part;
        virtqueue_write(chain, 0, &header, sizeof header);
        virtqueue_push(chain, VSOCK_HEADER_BYTES + part, i + 1 == used);
    }
    if (used)
        connection->forwarded_told = connection->forwarded;
}

/* The host's program sends no more. When it has gone altogether, it does not receive either. */
static void end_of_data(struct vsock_connection *connection)
{
    struct pollfd state = {.fd = connection->fd};
    if (poll(&state, 1, 0) == 1 && state.revents & (POLLHUP | POLLERR)) {
        vsock_connection_hang_up(connection);
        return;
    }
    connection->host_closed |= VSOCK_SHUTDOWN_SEND;
    vsock_connection_watch(connection, connection->events & ~LOOP_READ);
    vsock_pend(connection, VSOCK_PENDING_SHUTDOWN);
}

int64_t vsock_pump(struct vsock_connection *connection)
{
    struct virtio_vsock *vsock = connection->vsock;
    if (!wants_data(connection))
        return 0;
    uint32_t credit = guest_credit(connection);
    if (credit == 0) {
        /* take_credit goes on. Drivers tell of room by themselves; asking would cost them as much as a packet of data. */
        vsock_connection_watch(connection, connection->events & ~LOOP_READ);
        return 0;
    }
    struct burst burst = take_burst(connection, credit);
    if (burst.count == 0) {
        vsock_connection_watch(connection, connection->events & ~LOOP_READ);
        vsock_pend(connection, VSOCK_PENDING_DATA);
        return -ENOBUFS;
    }
    ssize_t got = readv(connection->fd, vsock->iov, (int)burst.iov_count);
    int code = got < 0 ? errno : 0;
    send_burst(connection, burst.count, got > 0 ? (uint64_t)got : 0);
    if (got == 0) {
        end_of_data(connection);
        return 0;
    }
    if (got < 0 && code != EAGAIN && code != EINTR) {
        vsock_connection_abort(connection); /* the program ended with our bytes unread, for example */
        return -ECONNRESET;
    }
    if (got < 0 || (uint64_t)got < burst.room_bytes) {
        connection->burst = connection->burst > 2 * BURST_FIRST ? connection->burst / 2 : BURST_FIRST;
        vsock_connection_watch(connection, connection->events | LOOP_READ);
    } else {
        connection->burst = connection->burst < VSOCK_BURST_MAX / 2 ? 2 * connection->burst : VSOCK_BURST_MAX;
        if (!(connection->events & LOOP_READ))
            vsock_pend(connection, VSOCK_PENDING_DATA);
    }
    if (got < 0)
        return 0;
    connection->sent += (uint32_t)got;
    vsock->counters.to_guest_bytes += (uint64_t)got;
    return got;
}

/* ---- From the guest ---- */

/* Every packet of a connection tells of the guest's buffer. */
static void take_credit(struct vsock_connection *connection, const struct vsock_header *header)
{
    connection->guest_alloc = header->buf_alloc;
    connection->guest_forwarded = header->fwd_cnt;
    if (wants_data(connection) && !(connection->events & LOOP_READ) && guest_credit(connection))
        vsock_pend(connection, VSOCK_PENDING_DATA);
}

/* The guest broke the protocol. */
static void violation(struct vsock_connection *connection, const char *what)
{
    LOG_GUEST(LOG_INFO, "virtio-vsock: connection to port %u ended: %s", connection->guest_port, what);
    connection->vsock->counters.violations++;
    vsock_connection_abort(connection);
}

static void refuse(struct virtio_vsock *vsock, const struct vsock_header *header)
{
    const struct vsock_reset reset = {header->dst_cid, header->src_port, header->dst_port, header->type};
    vsock->counters.refused++;
    vsock_reset_ports(vsock, &reset);
}

static void take_request(struct virtio_vsock *vsock, const struct vsock_header *header)
{
    if (!vsock_connection_room(vsock)) {
        LOG_GUEST(LOG_WARNING, "virtio-vsock: the guest has more than %u connections", vsock->connections_max);
        refuse(vsock, header);
        return;
    }
    int fd = vsock_host_connect(vsock, header->dst_port);
    struct vsock_connection *connection = fd < 0 ? NULL : vsock_connection_create(vsock, VSOCK_OPEN, fd);
    if (!connection) {
        refuse(vsock, header);
        return;
    }
    vsock_connection_bind(connection, header->src_port, header->dst_port);
    connection->guest_alloc = header->buf_alloc;
    connection->guest_forwarded = header->fwd_cnt;
    vsock->counters.connections++;
    vsock_pend(connection, VSOCK_PENDING_RESPONSE | VSOCK_PENDING_DATA);
}

static void take_response(struct vsock_connection *connection, const struct vsock_header *header)
{
    if (connection->state != VSOCK_REQUESTED) {
        violation(connection, "a second answer to a request");
        return;
    }
    vsock_connection_enter(connection, VSOCK_OPEN);
    connection->vsock->counters.connections++;
    vsock_host_accepted(connection);
}

/* `chain` has the whole payload. */
static void take_data(struct vsock_connection *connection, const struct vsock_header *header, const struct virtqueue_chain *chain)
{
    struct virtio_vsock *vsock = connection->vsock;
    if (connection->state != VSOCK_OPEN || connection->guest_closed & VSOCK_SHUTDOWN_SEND) {
        violation(connection, "data outside the connection's time");
        return;
    }
    if (header->len > connection->credit_bytes - vsock_connection_buffered(connection)) {
        violation(connection, "more data than there is room for");
        return;
    }
    unsigned iov_count = virtqueue_slice(chain, false, VSOCK_HEADER_BYTES, header->len, vsock->iov);
    vsock->counters.to_host_bytes += header->len;
    vsock_connection_write(connection, vsock->iov, iov_count, header->len);
}

static void take_packet(struct virtio_vsock *vsock, const struct virtqueue_chain *chain)
{
    struct vsock_header header;
    if (virtqueue_read(chain, 0, &header, sizeof header) != sizeof header || header.src_cid != vsock->cid) {
        LOG_GUEST(LOG_INFO, "virtio-vsock: dropped a packet without header or with another sender's address");
        return;
    }
    struct vsock_connection *connection = NULL;
    if (header.type == VSOCK_TYPE_STREAM && header.dst_cid == VSOCK_CID_HOST)
        connection = vsock_connection_find(vsock, header.src_port, header.dst_port);
    if (!connection) {
        if (header.type == VSOCK_TYPE_STREAM && header.dst_cid == VSOCK_CID_HOST && header.op == VSOCK_OP_REQUEST)
            take_request(vsock, &header);
        else if (header.op != VSOCK_OP_RST)
            refuse(vsock, &header);
        return;
    }
    if (header.op != VSOCK_OP_RW || header.len > VSOCK_GATHER_BYTES_MAX)
        vsock_connection_release(connection);
    if (header.op == VSOCK_OP_RST) {
        vsock_connection_free(connection);
        return;
    }
    if (header.op == VSOCK_OP_INVALID || header.op > VSOCK_OP_CREDIT_REQUEST || header.op == VSOCK_OP_REQUEST ||
        (header.op == VSOCK_OP_RW && header.len > chain->in_bytes - VSOCK_HEADER_BYTES)) {
        violation(connection, "a packet that makes no sense");
        return;
    }
    take_credit(connection, &header);
    if (header.op == VSOCK_OP_RESPONSE)
        take_response(connection, &header);
    else if (header.op == VSOCK_OP_RW)
        take_data(connection, &header, chain);
    else if (header.op == VSOCK_OP_SHUTDOWN)
        vsock_connection_guest_shutdown(connection, header.flags & VSOCK_SHUTDOWN_BOTH);
    else if (header.op == VSOCK_OP_CREDIT_REQUEST) {
        connection->forwarded_told = connection->forwarded - 1; /* so that it is told in any case */
        vsock_pend(connection, VSOCK_PENDING_CREDIT);
    }
}

static void notify_tx(struct virtio_vsock *vsock)
{
    struct virtqueue *queue = virtio_queue(&vsock->virtio, QUEUE_TX);
    unsigned done = 0;
    uint64_t bytes = 0;
    if (vsock_hold(vsock))
        return;
    do {
        struct virtqueue_chain *chain;
        virtqueue_set_notification(queue, false);
        while ((chain = virtqueue_pop(queue))) {
            bytes += chain->in_bytes;
            take_packet(vsock, chain);
            virtqueue_push(chain, 0, true);
            if (++done == BATCH || bytes >= BATCH_BYTES) {
                virtio_wake_queue(&vsock->virtio, QUEUE_TX);
                vsock_connections_release(vsock);
                vsock_send(vsock);
                return;
            }
        }
        vsock_connections_release(vsock); /* before the queue is looked at again, so that no byte waits for another notification */
    } while (virtqueue_set_notification(queue, true));
    vsock_send(vsock);
}

static void notify_rx(struct virtio_vsock *vsock)
{
    virtqueue_set_notification(virtio_queue(&vsock->virtio, QUEUE_RX), false);
    vsock_send(vsock);
}

bool vsock_hold(struct virtio_vsock *vsock)
{
    if (vsock->held && !vsock->held_until_ns) {
        vsock->held_until_ns = loop_now_ns() + VSOCK_HELD_NS;
        vsock_host_arm(vsock);
    }
    return vsock->held;
}

void vsock_hold_end(struct virtio_vsock *vsock)
{
    vsock->held = false;
    vsock->held_until_ns = 0;
    vsock_host_resume(vsock);
    notify_tx(vsock);
}

/* 5.10.6.6: the guest's connections were to another host, in a way. Drivers put a buffer back when they have done what its event says (Linux does). */
static void notify_event(struct virtio_vsock *vsock)
{
    const uint32_t event = EVENT_TRANSPORT_RESET;
    struct virtqueue *queue = virtio_queue(&vsock->virtio, QUEUE_EVENT);
    struct virtqueue_chain *chain = vsock->interrupted ? virtqueue_pop(queue) : NULL;
    if (chain) {
        vsock->event_offered = virtqueue_offered(queue);
        virtqueue_set_notification(queue, true); /* of the next one */
        virtqueue_push(chain, virtqueue_write(chain, 0, &event, sizeof event), true);
        vsock->interrupted = false;
    } else if (vsock->held && !vsock->interrupted && virtqueue_offered(queue) != vsock->event_offered) {
        vsock_hold_end(vsock);
    }
}

/* ---- The device ---- */

static void vsock_notify(void *ctx, unsigned index)
{
    static void (*const notify[QUEUES])(struct virtio_vsock *vsock) = {notify_rx, notify_tx, notify_event};
    notify[index](ctx);
}

static void vsock_driver_reset(void *ctx)
{
    struct virtio_vsock *vsock = ctx;
    vsock_connections_drop(vsock);
    vsock->reset_count = 0;
    vsock->interrupted = vsock->held = false;
    vsock->held_until_ns = 0;
    vsock_host_resume(vsock);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    const struct virtio_vsock *vsock = ctx;
    const uint64_t guest_cid = vsock->cid;
    memcpy(data, (const uint8_t *)&guest_cid + offset, size_bytes);
}

static const struct virtio_device_ops vsock_ops = {
    .name = "virtio-vsock",
    .device_id = 19,
    .class_code = 0x078000,
    .config_bytes = sizeof(uint64_t),
    .config_read = config_read,
    .queue_notify = vsock_notify,
    .reset = vsock_driver_reset,
};

static void vsock_destroy(struct device *device)
{
    struct virtio_vsock *vsock = (struct virtio_vsock *)device;
    vsock_connections_drop(vsock);
    vsock_host_close(vsock);
    loop_timer_destroy(vsock->timer);
    virtio_fini(&vsock->virtio);
    free(vsock->spare);
    free(vsock);
}

static int vsock_create(struct device **device, const struct device_host *host, const void *config_of_class, struct error *err)
{
    const struct virtio_vsock_config *config = config_of_class;
    const struct virtio_config virtio = {.features = 1ull << F_STREAM, .queue_count = QUEUES, .queue_size = QUEUE_SIZE, .slot = config->slot};
    if (strlen(config->path) > VIRTIO_VSOCK_PATH_MAX)
        return error_set(err, -ENAMETOOLONG, "virtio-vsock: the path %s is longer than %u characters", config->path, VIRTIO_VSOCK_PATH_MAX);
    struct virtio_vsock *vsock = calloc(1, sizeof *vsock);
    if (!vsock)
        return error_set(err, -ENOMEM, "virtio-vsock: out of memory");
    vsock->cid = config->cid;
    strcpy(vsock->path, config->path);
    vsock->listen_fd = -1;
    vsock->next_port = VSOCK_PORT_FIRST;
    TAILQ_INIT(&vsock->waiting);
    TAILQ_INIT(&vsock->open);
    TAILQ_INIT(&vsock->flushing);
    TAILQ_INIT(&vsock->pending);
    TAILQ_INIT(&vsock->gathered);
    int result = virtio_init(&vsock->virtio, host, &vsock_ops, vsock, &virtio, err);
    if (result < 0) {
        free(vsock);
        return result;
    }
    vsock->timer = loop_timer_create(host->loop, vsock_host_timer, vsock);
    result = vsock->timer ? vsock_host_listen(vsock, err) : error_set(err, -ENOMEM, "virtio-vsock: out of memory");
    if (result < 0) {
        vsock_destroy((struct device *)vsock);
        return result;
    }
    *device = (struct device *)vsock;
    return 0;
}

static void vsock_machine_reset(struct device *device)
{
    virtio_reset(&((struct virtio_vsock *)device)->virtio);
}

/* Connections are not part of the state: their other ends are programs of this host. A machine that goes on after saving keeps its own. */
static int vsock_state(struct device *device, struct state_io *io)
{
    struct virtio_vsock *vsock = (struct virtio_vsock *)device;
    state_begin(io, "virtio-vsock", 1);
    virtio_state(&vsock->virtio, io); /* resets the device when loading, so it comes first */
    state_u32(io, &vsock->next_port); /* not one that the guest knows already */
    if (state_loading(io)) {
        if (vsock->next_port < VSOCK_PORT_FIRST || vsock->next_port == VSOCK_PORT_ANY) {
            vsock->next_port = VSOCK_PORT_FIRST;
            state_fail(io, "the next port is out of range");
        }
        vsock->interrupted = vsock->held = !state_failed(io) && virtio_ready(&vsock->virtio);
    }
    return state_end(io);
}

void virtio_vsock_get_counters(const struct device *device, struct virtio_vsock_counters *counters)
{
    const struct virtio_vsock *vsock = (const struct virtio_vsock *)device;
    *counters = vsock->counters;
    counters->open = vsock->connection_count;
}

static void vsock_counters(struct device *device, device_counter_fn *emit, void *ctx)
{
    struct virtio_vsock_counters counters;
    virtio_vsock_get_counters(device, &counters);
    emit(ctx, "connections", counters.connections);
    emit(ctx, "refused", counters.refused);
    emit(ctx, "violations", counters.violations);
    emit(ctx, "open", counters.open);
    emit(ctx, "rx_bytes_count", counters.to_guest_bytes);
    emit(ctx, "tx_bytes_count", counters.to_host_bytes);
}

const struct device_class virtio_vsock_class = {
    .name = "virtio-vsock",
    .help = "stream sockets between guest and host",
    .counters = vsock_counters,
    .create = vsock_create,
    .reset = vsock_machine_reset,
    .state = vsock_state,
    .destroy = vsock_destroy,
};
