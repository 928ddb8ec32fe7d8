/*
 * The server inside: what its filter (server.c) and its TCP (server_tcp.c) tell each other.
 */
#ifndef DOPPEL_NET_SERVER_PRIV_H
#define DOPPEL_NET_SERVER_PRIV_H

#include "net/net_priv.h"

#define SERVER_CONNECTIONS_MAX 32u
#define SERVER_REQUEST_BYTES 8192u /* kept of what a connection has sent, which is the window */
#define SERVER_MSS_MAX 1460u
#define SERVER_FRAME_BYTES_MAX (14u + 40u + SERVER_MSS_MAX)
/* ARP answers and resets that wait for guest buffers. Connections remember what they have to send and need no frames for it. */
#define SERVER_QUEUE_FRAMES 8u
#define SERVER_QUEUE_FRAME_BYTES 54u
/* The largest frame for the server that is looked at: a window in one piece, with all headers and options. */
#define SERVER_INPUT_BYTES (14u + 120u + SERVER_REQUEST_BYTES)

/* The other end of a connection. Ports and numbers are in host order everywhere here. */
struct server_peer {
    uint8_t mac[6], address[4];
    uint16_t port;
};

struct server_connection {
    bool used, established;
    bool peer_done; /* its FIN has come */
    bool closing;   /* our FIN follows the reply; what still comes is dropped */
    bool ack_due;
    bool probe;     /* one byte may go into a window of none */
    struct server_peer peer;
    uint32_t irs, rcv_nxt;                       /* RFC 9293, section 3.3.1 */
    uint32_t iss, snd_una, snd_nxt, snd_max, snd_wnd; /* snd_max: as far as was ever sent; snd_nxt goes back to send again */
    uint32_t mss;
    unsigned tries;                              /* of sending the same again */
    uint64_t sent_ns, heard_ns;
    char *reply;                                 /* NULL: none is under way */
    uint32_t reply_seq, reply_bytes;             /* its first byte; none: the next that will be sent */
    uint32_t request_bytes;
    char request[SERVER_REQUEST_BYTES];
};

struct server {
    struct net net;
    struct net *inner;
    struct net_server server;
    uint8_t mac[6];
    uint16_t mss, next_id;
    uint32_t opened; /* connections so far */
    bool stalled;    /* the guest has no buffer: net_resume goes on */
    struct loop_timer *timer;
    unsigned queue_first, queue_count;
    struct {
        size_t length_bytes;
        uint8_t data[SERVER_QUEUE_FRAME_BYTES];
    } queue[SERVER_QUEUE_FRAMES];
    struct server_connection connection[SERVER_CONNECTIONS_MAX];
};

/* A segment for the server's address, whose lengths and checksums have been found right. */
struct server_segment {
    struct server_peer peer;
    uint16_t port; /* at the server */
    uint32_t seq, ack, window;
    unsigned flags;
    const uint8_t *options, *data;
    size_t options_bytes, data_bytes;
};

#define TCP_FIN 0x01u
#define TCP_SYN 0x02u
#define TCP_RST 0x04u
#define TCP_PSH 0x08u
#define TCP_ACK 0x10u

/* server.c: a frame for the guest. False: it has no buffer now. */
bool server_emit(struct server *server, const uint8_t *frame, size_t length_bytes);
/* The same, kept for later if there is room. At most SERVER_QUEUE_FRAME_BYTES. */
void server_emit_later(struct server *server, const uint8_t *frame, size_t length_bytes);
/* Ethernet and IPv4 headers around `payload_bytes` of TCP that are in the frame already. Returns the frame's length. */
size_t server_finish_frame(struct server *server, const struct server_peer *peer, uint8_t *frame, size_t payload_bytes);

/* server_tcp.c */
void server_tcp_input(struct server *server, const struct server_segment *segment);
/* The guest has buffers again. */
void server_tcp_resume(struct server *server);
void server_tcp_timer(void *ctx);
/* Forgets all connections. */
void server_tcp_close(struct server *server);

static inline uint16_t server_load16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] << 8 | bytes[1]);
}

static inline uint32_t server_load32(const uint8_t *bytes)
{
    return (uint32_t)server_load16(bytes) << 16 | server_load16(bytes + 2);
}

static inline void server_store16(uint8_t *bytes, unsigned value)
{
    bytes[0] = (uint8_t)(value >> 8);
    bytes[1] = (uint8_t)value;
}

static inline void server_store32(uint8_t *bytes, uint32_t value)
{
    server_store16(bytes, value >> 16);
    server_store16(bytes + 2, value & 0xFFFF);
}

#endif
