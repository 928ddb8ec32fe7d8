/*
 * The TCP of the server inside (RFC 9293), as much as a server needs whose clients are one guest on the same Ethernet: it listens on one port, takes segments in order only, has one
 * request and one reply of each connection in hand at a time, and sends again by going back to what was not acknowledged.
 *
 * Invariants: snd_una <= snd_nxt <= snd_max; the reply lies at reply_seq, our FIN behind it. What is to be sent follows from a connection's numbers, so a guest without
 * buffers costs no memory: output() stops and goes on with server_tcp_resume. No TIME-WAIT: numbers of later connections come from the clock, and the only
 * network there is loses nothing for long. When every place is taken, the connection not heard of for longest goes, or a new one waits.
 * Threading: on the loop's thread.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "net/offload.h"
#include "net/server_priv.h"

#define NS_PER_MS 1000000ull
#define RETRANSMIT_NS (300 * NS_PER_MS) /* at first; then twice that, ... */
#define TRIES_MAX 7u                    /* 38 s together */
#define IDLE_NS (60000 * NS_PER_MS)
#define BUSY_NS (500 * NS_PER_MS) /* who was heard of since then is not given up for others */
#define TCP_BYTES 20u
#define TCP_AT 34u /* behind Ethernet and IPv4 */
#define OPTION_END 0u
#define OPTION_NOTHING 1u
#define OPTION_MSS 2u
#define MSS_DEFAULT 536u
#define MSS_MIN 64u

static bool seq_before(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b) < 0;
}

static uint32_t reply_end(const struct server_connection *c)
{
    return c->reply_seq + c->reply_bytes;
}

static bool fin_was_acked(const struct server_connection *c)
{
    return c->established && c->closing && c->snd_una == reply_end(c) + 1;
}

static uint32_t room(const struct server_connection *c)
{
    return c->closing ? SERVER_REQUEST_BYTES : SERVER_REQUEST_BYTES - c->request_bytes;
}

/* ---- segments for the guest ---- */

/* Header and data at their place in `frame`; an MSS option with SYN. Returns the frame's length. */
static size_t make_segment(struct server *server, const struct server_peer *peer, uint8_t *frame, const struct server_segment *what)
{
    uint8_t *tcp = frame + TCP_AT, pseudo[4] = {0, 6};
    size_t header_bytes = what->flags & TCP_SYN ? TCP_BYTES + 4 : TCP_BYTES, tcp_bytes = header_bytes + what->data_bytes;
    server_store16(tcp, server->server.port);
    server_store16(tcp + 2, peer->port);
    server_store32(tcp + 4, what->seq);
    server_store32(tcp + 8, what->ack);
    tcp[12] = (uint8_t)(header_bytes / 4 << 4);
    tcp[13] = (uint8_t)what->flags;
    server_store16(tcp + 14, what->window);
    server_store32(tcp + 16, 0); /* checksum, urgent pointer */
    if (what->flags & TCP_SYN)
        server_store32(tcp + TCP_BYTES, OPTION_MSS << 24 | 4u << 16 | server->mss);
    if (what->data_bytes)
        memcpy(tcp + header_bytes, what->data, what->data_bytes);
    size_t length_bytes = server_finish_frame(server, peer, frame, tcp_bytes);
    server_store16(pseudo + 2, (unsigned)tcp_bytes);
    uint64_t sum = net_checksum_add(0, frame + TCP_AT - 8, 8); /* the two addresses */
    uint16_t checksum = net_checksum_finish(net_checksum_add(net_checksum_add(sum, pseudo, sizeof pseudo), tcp, tcp_bytes));
    memcpy(tcp + 16, &checksum, sizeof checksum);
    return length_bytes;
}

static bool send_segment(struct server *server, struct server_connection *c, unsigned flags, uint32_t seq, const char *data, uint32_t bytes)
{
    uint8_t frame[SERVER_FRAME_BYTES_MAX];
    struct server_segment what = {.seq = seq, .flags = flags | TCP_ACK, .ack = c->rcv_nxt, .window = room(c), .data = (const uint8_t *)data, .data_bytes = bytes};
    if (!server_emit(server, frame, make_segment(server, &c->peer, frame, &what)))
        return false;
    server->server.counters->tx_count++;
    c->ack_due = false;
    uint32_t end = seq + bytes + (flags & (TCP_SYN | TCP_FIN) ? 1 : 0);
    if (end == seq)
        return true;
    c->snd_nxt = end;
    if (seq_before(c->snd_max, end))
        c->snd_max = end;
    c->sent_ns = loop_now_ns();
    return true;
}

/* Says that there is no such connection. RFC 9293, section 3.5.2. */
static void refuse(struct server *server, const struct server_segment *segment)
{
    uint8_t frame[SERVER_QUEUE_FRAME_BYTES];
    struct server_segment what = {.flags = TCP_RST};
    uint32_t length = (uint32_t)segment->data_bytes + !!(segment->flags & TCP_SYN) + !!(segment->flags & TCP_FIN);
    server->server.counters->rx_accepted_unusual++;
    if (segment->flags & TCP_RST)
        return;
    if (segment->flags & TCP_ACK) {
        what.seq = segment->ack;
    } else {
        what.flags |= TCP_ACK;
        what.ack = segment->seq + length;
    }
    server_emit_later(server, frame, make_segment(server, &segment->peer, frame, &what));
}

/* ---- connections ---- */

static void forget(struct server *server, struct server_connection *c)
{
    free(c->reply);
    c->reply = NULL;
    c->used = false;
    server->server.counters->connections_destroyed++;
}

static void reset(struct server *server, struct server_connection *c)
{
    uint8_t frame[SERVER_QUEUE_FRAME_BYTES];
    struct server_segment what = {.flags = TCP_RST | TCP_ACK, .seq = c->snd_nxt, .ack = c->rcv_nxt};
    server_emit_later(server, frame, make_segment(server, &c->peer, frame, &what));
    forget(server, c);
}

static struct server_connection *find(struct server *server, const struct server_peer *peer)
{
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++) {
        struct server_connection *c = &server->connection[i];
        if (c->used && c->peer.port == peer->port && memcmp(c->peer.address, peer->address, sizeof peer->address) == 0)
            return c;
    }
    return NULL;
}

/* A free place, made free if need be; NULL: everybody was heard of just now. */
static struct server_connection *find_place(struct server *server)
{
    struct server_connection *oldest = &server->connection[0];
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++) {
        struct server_connection *c = &server->connection[i];
        if (!c->used)
            return c;
        if (c->heard_ns < oldest->heard_ns)
            oldest = c;
    }
    if (loop_now_ns() - oldest->heard_ns < BUSY_NS)
        return NULL;
    reset(server, oldest);
    return oldest;
}

static uint32_t mss_option(const struct server_segment *segment)
{
    size_t i = 0;
    while (i + 1 < segment->options_bytes && segment->options[i] != OPTION_END) {
        const uint8_t *option = segment->options + i;
        if (option[0] == OPTION_NOTHING) {
            i++;
            continue;
        }
        if (option[1] < 2 || option[1] > segment->options_bytes - i)
            break;
        if (option[0] == OPTION_MSS && option[1] == 4)
            return server_load16(option + 2);
        i += option[1];
    }
    return MSS_DEFAULT;
}

static struct server_connection *open_connection(struct server *server, const struct server_segment *segment)
{
    struct server_connection *c = find_place(server);
    if (!c)
        return NULL; /* a guest asks again after a second */
    memset(c, 0, offsetof(struct server_connection, request));
    uint32_t mss = mss_option(segment), iss = (uint32_t)(loop_now_ns() >> 12) + 64007u * server->opened++; /* RFC 9293, section 3.4.1 */
    c->used = true;
    c->peer = segment->peer;
    c->irs = segment->seq;
    c->rcv_nxt = segment->seq + 1;
    c->iss = c->snd_una = c->snd_nxt = c->snd_max = iss;
    c->snd_wnd = segment->window;
    c->reply_seq = iss + 1;
    c->mss = mss < MSS_MIN ? MSS_MIN : mss < server->mss ? mss : server->mss;
    c->heard_ns = loop_now_ns();
    server->server.counters->connections_created++;
    return c;
}

/* ---- sending ---- */

static bool send_reply(struct server *server, struct server_connection *c)
{
    uint32_t end = reply_end(c), limit = c->snd_una + (c->snd_wnd ? c->snd_wnd : c->probe);
    c->probe = false;
    while (seq_before(c->snd_nxt, end) && seq_before(c->snd_nxt, limit)) {
        uint32_t bytes = end - c->snd_nxt;
        bytes = bytes < c->mss ? bytes : c->mss;
        bytes = bytes < limit - c->snd_nxt ? bytes : limit - c->snd_nxt;
        if (!send_segment(server, c, c->snd_nxt + bytes == end ? TCP_PSH : 0, c->snd_nxt, c->reply + (c->snd_nxt - c->reply_seq), bytes))
            return false;
    }
    return true;
}

/* Whatever there is to send, as far as guest and window take it. */
static void output(struct server *server, struct server_connection *c)
{
    if (!c->established) {
        if (c->snd_nxt == c->iss)
            send_segment(server, c, TCP_SYN, c->iss, NULL, 0);
        return;
    }
    if (!send_reply(server, c))
        return;
    if (c->closing && c->snd_nxt == reply_end(c) && !send_segment(server, c, TCP_FIN, c->snd_nxt, NULL, 0))
        return;
    if (c->ack_due)
        send_segment(server, c, 0, c->snd_nxt, NULL, 0);
}

/* Serves requests until one has a reply to send, or there is none. False: the connection is gone. */
static bool serve(struct server *server, struct server_connection *c)
{
    while (!c->reply && !c->closing && c->request_bytes) {
        struct net_reply reply = {0};
        bool full = c->request_bytes == SERVER_REQUEST_BYTES;
        size_t used = server->server.serve(server->server.ctx, c->request, c->request_bytes, full, &reply);
        if (used == 0 && !full)
            break;
        if (used == 0 || used > c->request_bytes || !reply.data || reply.size_bytes == 0 || reply.size_bytes > INT32_MAX) {
            free(reply.data);
            reset(server, c);
            return false;
        }
        c->ack_due |= room(c) < SERVER_MSS_MAX; /* the window is open again */
        c->request_bytes -= (uint32_t)used;
        memmove(c->request, c->request + used, c->request_bytes);
        c->reply = reply.data;
        c->reply_bytes = (uint32_t)reply.size_bytes;
        c->closing = reply.close;
    }
    if (!c->reply && c->peer_done)
        c->closing = true; /* half a request is no request */
    return true;
}

/* ---- receiving ---- */

/* False: the connection is gone, or the segment is none of it. */
static bool take_ack(struct server *server, struct server_connection *c, const struct server_segment *segment)
{
    if (seq_before(c->snd_max, segment->ack) || seq_before(segment->ack, c->snd_una)) {
        if (!c->established) {
            refuse(server, segment);
            return false;
        }
        bool early = seq_before(c->snd_max, segment->ack);
        c->ack_due |= early;
        return !early; /* an old one's data may be new all the same */
    }
    if (!c->established && segment->ack == c->iss)
        return false;
    c->established = true;
    c->snd_wnd = segment->window;
    if (segment->ack == c->snd_una)
        return true;
    c->snd_una = segment->ack;
    if (seq_before(c->snd_nxt, c->snd_una))
        c->snd_nxt = c->snd_una;
    c->tries = 0;
    c->sent_ns = loop_now_ns();
    if (c->reply && !seq_before(c->snd_una, reply_end(c))) {
        free(c->reply);
        c->reply = NULL;
        c->reply_seq = reply_end(c);
        c->reply_bytes = 0;
    }
    return true;
}

static void take_data(struct server_connection *c, const struct server_segment *segment)
{
    uint32_t bytes = (uint32_t)segment->data_bytes, ahead = c->rcv_nxt - segment->seq;
    bool fin = segment->flags & TCP_FIN;
    if (bytes == 0 && !fin) {
        c->ack_due |= segment->seq != c->rcv_nxt; /* somebody asks whether we are there */
        return;
    }
    c->ack_due = true;
    if (seq_before(c->rcv_nxt, segment->seq) || ahead > bytes || c->peer_done)
        return; /* behind a gap, or all of it was there before */
    const uint8_t *data = segment->data + ahead;
    uint32_t fits = bytes - ahead < room(c) ? bytes - ahead : room(c);
    if (!c->closing) {
        memcpy(c->request + c->request_bytes, data, fits);
        c->request_bytes += fits;
    }
    c->rcv_nxt += fits;
    if (fin && fits == bytes - ahead) {
        c->rcv_nxt++;
        c->peer_done = true;
    }
}

static void take_segment(struct server *server, struct server_connection *c, const struct server_segment *segment)
{
    c->heard_ns = loop_now_ns();
    if (take_ack(server, c, segment)) {
        take_data(c, segment);
        if (!serve(server, c))
            return;
    }
    output(server, c);
    if (fin_was_acked(c) && c->peer_done)
        forget(server, c);
}

static void take_syn(struct server *server, struct server_connection *c, const struct server_segment *segment)
{
    if (segment->flags & (TCP_ACK | TCP_FIN)) {
        refuse(server, segment);
        return;
    }
    if (c && !c->established && c->irs == segment->seq) {
        c->snd_nxt = c->iss; /* it did not get our answer */
    } else {
        if (c)
            forget(server, c); /* the guest knows nothing of it any more */
        c = open_connection(server, segment);
    }
    if (c)
        output(server, c);
    else
        server->server.counters->rx_accepted_unusual++;
}

static void arm_timer(struct server *server);

void server_tcp_input(struct server *server, const struct server_segment *segment)
{
    struct server_connection *c = find(server, &segment->peer);
    bool ours = segment->port == server->server.port;
    if (!ours || (!c && !(segment->flags & TCP_SYN))) {
        refuse(server, segment);
        return;
    }
    server->server.counters->rx_count++;
    if (segment->flags & TCP_RST) {
        if (c && segment->seq == c->rcv_nxt)
            forget(server, c);
    } else if (segment->flags & TCP_SYN) {
        take_syn(server, c, segment);
    } else if (segment->flags & TCP_ACK) {
        take_segment(server, c, segment);
    }
    arm_timer(server);
}

void server_tcp_resume(struct server *server)
{
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX && !server->stalled; i++)
        if (server->connection[i].used)
            output(server, &server->connection[i]);
    arm_timer(server);
}

/* ---- time ---- */

/* Something was sent or is held back, and no acknowledgement has come. */
static bool is_waiting(const struct server_connection *c)
{
    return c->snd_una != c->snd_max || seq_before(c->snd_nxt, reply_end(c)) || !c->established;
}

static uint64_t deadline_of(const struct server_connection *c)
{
    if (is_waiting(c))
        return (c->sent_ns > c->heard_ns ? c->sent_ns : c->heard_ns) + (RETRANSMIT_NS << c->tries);
    return c->heard_ns + IDLE_NS;
}

static void arm_timer(struct server *server)
{
    uint64_t first_ns = UINT64_MAX;
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++) {
        const struct server_connection *c = &server->connection[i];
        if (c->used && deadline_of(c) < first_ns)
            first_ns = deadline_of(c);
    }
    if (first_ns == UINT64_MAX)
        loop_timer_disarm(server->timer);
    else
        loop_timer_arm(server->timer, first_ns);
}

static void expire(struct server *server, struct server_connection *c, uint64_t now_ns)
{
    if (is_waiting(c) && server->stalled) {
        c->sent_ns = now_ns; /* the guest has not had a chance */
        return;
    }
    if (is_waiting(c)) {
        if (++c->tries > TRIES_MAX) {
            reset(server, c);
            return;
        }
        c->snd_nxt = c->established ? c->snd_una : c->iss;
        c->probe = true;
        c->sent_ns = now_ns;
    } else if (c->closing) {
        reset(server, c); /* its FIN never came */
        return;
    } else {
        c->closing = true;
    }
    output(server, c);
}

void server_tcp_timer(void *ctx)
{
    struct server *server = ctx;
    uint64_t now_ns = loop_now_ns();
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++) {
        struct server_connection *c = &server->connection[i];
        if (c->used && deadline_of(c) <= now_ns)
            expire(server, c, now_ns);
    }
    arm_timer(server);
}

void server_tcp_close(struct server *server)
{
    for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++)
        if (server->connection[i].used)
            forget(server, &server->connection[i]);
}
