/*
 * virtio-vsock, inside: packets and their queues (virtio_vsock.c), connections (vsock_connection.c), the host's sockets (vsock_host.c).
 *
 * A connection lives from the moment a Unix socket is accepted, or the guest asks for one, until both sides are done with it:
 *
 *     HELLO      accepted, the line "CONNECT <port>" has not come in full        (deadline)
 *     REQUESTED  the guest was asked                                              (deadline)
 *     OPEN       data flows
 *     FLUSHING   the guest has closed and forgotten it; what it sent still goes to the host's program
 *
 * HELLO and FLUSHING have no ports and are not in the table. What is to be told to the guest is kept as bits (`pending`), not as packets, so nothing
 * grows while the guest provides no buffers; answers to packets that belong to no connection are kept in a ring of fixed size.
 */
#ifndef DOPPEL_DEVICE_VSOCK_PRIV_H
#define DOPPEL_DEVICE_VSOCK_PRIV_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "device/virtio.h"
#include "device/virtio_vsock.h"

#define VSOCK_CID_HOST 2u
#define VSOCK_PORT_ANY 0xFFFFFFFFu
#define VSOCK_PORT_FIRST (1u << 30) /* of the ports given to the host's programs */

/* 5.10.6: packets. Integers are little endian, as x86 is. */
enum vsock_op {
    VSOCK_OP_INVALID,
    VSOCK_OP_REQUEST,
    VSOCK_OP_RESPONSE,
    VSOCK_OP_RST,
    VSOCK_OP_SHUTDOWN,
    VSOCK_OP_RW,
    VSOCK_OP_CREDIT_UPDATE,
    VSOCK_OP_CREDIT_REQUEST,
};
#define VSOCK_TYPE_STREAM 1u
#define VSOCK_SHUTDOWN_RECEIVE 1u
#define VSOCK_SHUTDOWN_SEND 2u
#define VSOCK_SHUTDOWN_BOTH 3u

struct vsock_header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port;
    uint32_t len;
    uint16_t type, op;
    uint32_t flags;
    uint32_t buf_alloc, fwd_cnt;
} __attribute__((packed));
#define VSOCK_HEADER_BYTES 44u
_Static_assert(sizeof(struct vsock_header) == VSOCK_HEADER_BYTES, "virtio 1.2, 5.10.6");

#define VSOCK_CONNECTIONS_MAX 1023u
#define VSOCK_BUCKETS 256u
#define VSOCK_RESETS_MAX 1024u /* a power of two */
#define VSOCK_HELLO_BYTES_MAX 32u
#define VSOCK_BURST_MAX 128u
#define VSOCK_GATHER_BYTES_MAX 4096u /* of a packet; larger ones are not copied */
#define VSOCK_DEADLINE_NS (10ull * 1000000000)
#define VSOCK_HELD_NS (5ull * 1000000000)

/*
 * What the guest may send ahead of the host's program. The first few connections get much and the others less, so that all buffers together are bounded by
 * 80 MiB, and that only when every program on the host stands still.
 */
#define VSOCK_CREDIT_BYTES (256u << 10)
#define VSOCK_CREDIT_FEW 64u
#define VSOCK_CREDIT_SMALL_BYTES (64u << 10)

enum vsock_state { VSOCK_HELLO, VSOCK_REQUESTED, VSOCK_OPEN, VSOCK_FLUSHING };

/* Bits of `pending`, in the order in which they are sent. */
#define VSOCK_PENDING_REQUEST 1u
#define VSOCK_PENDING_RESPONSE 2u
#define VSOCK_PENDING_CREDIT 4u
#define VSOCK_PENDING_DATA 8u
#define VSOCK_PENDING_SHUTDOWN 16u

struct vsock_connection {
    struct virtio_vsock *vsock;
    enum vsock_state state;
    uint32_t guest_port, host_port;
    int fd; /* -1: the host's side is closed */
    struct loop_fd *source;
    unsigned events;      /* asked of source */
    uint8_t pending;      /* > 0: in vsock->pending */
    uint8_t guest_closed; /* shutdown bits the guest has sent */
    uint8_t host_closed;  /* shutdown bits the guest is told */
    uint8_t burst;        /* receive buffers to try for the next read */
    bool bound;           /* has ports and is in the table */
    bool write_shut;      /* the host's program was told that nothing more comes */
    bool gathered;        /* in vsock->gathered: the buffer has small packets that go to the socket together, when the guest's queue is empty */
    /* Guest to host, 5.10.6.3: free-running counts. received - forwarded bytes are in the buffer. */
    uint32_t credit_bytes, received, forwarded, forwarded_told;
    uint8_t *buffer; /* NULL until the host's program falls behind; a ring of credit_bytes */
    uint32_t buffer_start;
    /* Host to guest. */
    uint32_t sent, guest_alloc, guest_forwarded;
    uint64_t deadline_ns;
    char hello[VSOCK_HELLO_BYTES_MAX];
    unsigned hello_bytes;
    LIST_ENTRY(vsock_connection) bucket;     /* REQUESTED and OPEN */
    TAILQ_ENTRY(vsock_connection) list;      /* waiting (HELLO, REQUESTED), open or flushing */
    TAILQ_ENTRY(vsock_connection) sending;   /* vsock->pending */
    TAILQ_ENTRY(vsock_connection) gathering; /* vsock->gathered */
};
TAILQ_HEAD(vsock_list, vsock_connection);

/* Of a packet that is answered by RST. */
struct vsock_reset {
    uint64_t host_cid;
    uint32_t guest_port, host_port;
    uint16_t type;
};

struct virtio_vsock {
    struct virtio virtio;
    struct virtio_vsock_counters counters;
    uint32_t cid;
    char path[VIRTIO_VSOCK_PATH_MAX + 1];
    int listen_fd;
    uint64_t path_device, path_inode; /* of the socket made there */
    struct loop_fd *listener;
    bool listening; /* the listener's events are wanted */
    bool interrupted; /* the guest is to be told that its connections are gone */
    /* It may not have dropped them yet, and would drop new ones with them: none is made until it puts the event's buffer back, or that time has come (0: nobody waits yet). */
    bool held;
    uint16_t event_offered; /* of the event queue, when the event went out */
    uint64_t held_until_ns;
    struct loop_timer *timer; /* deadlines, and accepting again after the host had no descriptors */
    unsigned connection_count, connections_max;
    uint32_t next_port;
    LIST_HEAD(, vsock_connection) table[VSOCK_BUCKETS];
    struct vsock_list waiting, open, flushing, pending, gathered;
    struct vsock_reset reset[VSOCK_RESETS_MAX];
    unsigned reset_first, reset_count;
    struct virtqueue_chain *chain[VSOCK_BURST_MAX]; /* of the read in progress */
    struct iovec iov[VIRTQUEUE_CHAIN_MAX];
    uint8_t *spare; /* a buffer of VSOCK_CREDIT_BYTES that a connection has emptied */
};

/* ---- virtio_vsock.c: towards the guest ---- */

/* Marks what the guest is to be told, and tells it as soon as there are receive buffers (vsock_send). */
void vsock_pend(struct vsock_connection *connection, unsigned bits);
void vsock_unpend(struct vsock_connection *connection);
/* The guest gets RST for these ports. */
void vsock_reset_ports(struct virtio_vsock *vsock, const struct vsock_reset *reset);
/* True: no connection may begin, as the guest still drops those from before (`held`). Who is told so has to wait for vsock_hold_end. */
bool vsock_hold(struct virtio_vsock *vsock);
void vsock_hold_end(struct virtio_vsock *vsock);
/* Sends what is pending as far as receive buffers last. May end connections. */
void vsock_send(struct virtio_vsock *vsock);
/* Moves bytes from the host's socket into receive buffers; their number, -ENOBUFS: there were none, or -ECONNRESET: the connection is gone. */
int64_t vsock_pump(struct vsock_connection *connection);

/* ---- vsock_connection.c ---- */

struct vsock_connection *vsock_connection_find(struct virtio_vsock *vsock, uint32_t guest_port, uint32_t host_port);
/* Takes `fd` over, also when it fails (NULL). */
struct vsock_connection *vsock_connection_create(struct virtio_vsock *vsock, enum vsock_state state, int fd);
/* Gives it its ports and puts it in the table. */
void vsock_connection_bind(struct vsock_connection *connection, uint32_t guest_port, uint32_t host_port);
void vsock_connection_enter(struct vsock_connection *connection, enum vsock_state state);
void vsock_connection_free(struct vsock_connection *connection);
/* Free, and the guest gets RST. */
void vsock_connection_abort(struct vsock_connection *connection);
/* Closes the host's socket; the connection stays for the guest. */
void vsock_connection_hang_up(struct vsock_connection *connection);
void vsock_connections_drop(struct virtio_vsock *vsock);
/* Makes room when there are as many as there may be, at the cost of one that nobody waits for. False: there is none. */
bool vsock_connection_room(struct virtio_vsock *vsock);
void vsock_connection_watch(struct vsock_connection *connection, unsigned events);
/* Bytes of the guest in the buffer. */
uint32_t vsock_connection_buffered(const struct vsock_connection *connection);
/*
 * Hands `iov`, of at most credit_bytes - buffered, to the host's socket, and what that has no room for to the buffer; small packets wait in the buffer for
 * vsock_connections_release. May end the connection. */
void vsock_connection_write(struct vsock_connection *connection, const struct iovec *iov, unsigned iov_count, uint32_t size_bytes);
/* Hands the small packets that were gathered to the host's socket. */
void vsock_connection_release(struct vsock_connection *connection);
void vsock_connections_release(struct virtio_vsock *vsock);
/* The guest closed one or both directions. */
void vsock_connection_guest_shutdown(struct vsock_connection *connection, unsigned flags);
/* The host's socket is ready. */
void vsock_connection_ready(void *connection, unsigned events);

/* ---- vsock_host.c ---- */

int vsock_host_listen(struct virtio_vsock *vsock, struct error *err);
void vsock_host_close(struct virtio_vsock *vsock);
/* There is room for connections again. */
void vsock_host_resume(struct virtio_vsock *vsock);
/* Connects to the socket for the guest's connections to `port`. Descriptor or -errno. */
int vsock_host_connect(struct virtio_vsock *vsock, uint32_t port);
/* Reads the line of a program that wants to be connected. */
void vsock_host_hello(struct vsock_connection *connection);
/* The guest has accepted. */
void vsock_host_accepted(struct vsock_connection *connection);
/* Ends what waited too long. */
void vsock_host_timer(void *vsock);
void vsock_host_arm(struct virtio_vsock *vsock);

#endif
