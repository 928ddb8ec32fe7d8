/*
 * Fuzz target: the metadata service behind its address, fed by a guest. Input: steps of a byte (kind), a byte (length) and that many bytes: a raw frame, a TCP segment (port, flags,
 * steps from the expected numbers, window, text), buffers taken away or given back, or time for the server to send again. Checks that every frame for the guest is well formed, that
 * nothing for the address passes, and that there are never more connections than there may be.
 */
#include <stdlib.h>
#include <string.h>

#include "metadata/metadata.h"
#include "net/offload.h"
#include "net/server_priv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

enum { RAW, SEGMENT, TEXT, BUFFERS, TIME, KINDS };
#define PORTS 64u

struct guest {
    struct loop *loop;
    struct net *net;
    bool no_buffers;
    uint32_t seq[PORTS], ack[PORTS];
};

static const uint8_t address[4] = {169, 254, 169, 254}, guest_address[4] = {10, 0, 2, 15};

static bool inner_transmit(struct net *net, const struct iovec *iov, unsigned iov_count)
{
    if (iov_count != 2 || (iov[1].iov_len >= 34 && memcmp((uint8_t *)iov[1].iov_base + 12, "\x08\x00", 2) == 0 &&
                           memcmp((uint8_t *)iov[1].iov_base + 30, address, 4) == 0))
        abort();
    return true;
}

static const struct net_backend inner_backend = {.name = "inner", .transmit = inner_transmit};

static bool receive(void *ctx, const struct iovec *iov, unsigned iov_count)
{
    struct guest *guest = ctx;
    const uint8_t *frame = iov[1].iov_base, *tcp = frame + 34;
    if (guest->no_buffers)
        return false;
    if (iov_count != 2 || iov[1].iov_len > SERVER_FRAME_BYTES_MAX || iov[1].iov_len < 42)
        abort();
    if (server_load16(frame + 12) != 0x0800)
        return true;
    size_t bytes = server_load16(frame + 16);
    if (bytes + 14 != iov[1].iov_len || net_checksum_finish(net_checksum_add(0, frame + 14, 20)) != 0)
        abort();
    unsigned port = server_load16(tcp + 2);
    if (port < PORTS && tcp[13] & TCP_ACK) {
        guest->seq[port] = server_load32(tcp + 8);
        guest->ack[port] = server_load32(tcp + 4) + (uint32_t)(bytes - 20 - (size_t)(tcp[12] >> 4) * 4) + (tcp[13] & (TCP_SYN | TCP_FIN) ? 1 : 0);
    }
    return true;
}

static void transmit(struct guest *guest, const uint8_t *bytes, size_t size_bytes, unsigned flags)
{
    struct net_header header = {.flags = (uint8_t)flags};
    uint8_t *frame = malloc(size_bytes ? size_bytes : 1); /* of its exact size, so that the sanitizer sees any byte beyond */
    memcpy(frame, bytes, size_bytes);
    const struct iovec iov[2] = {{&header, sizeof header}, {frame, size_bytes}};
    net_transmit(guest->net, iov, 2);
    free(frame);
}

/* `step` is of at most 255 bytes. */
static void send_segment(struct guest *guest, const uint8_t *step, size_t size_bytes)
{
    uint8_t frame[34 + 20 + 256] = {0}, *ip = frame + 14, *tcp = frame + 34;
    if (size_bytes < 5)
        return;
    unsigned port = step[0] % PORTS;
    memcpy(frame + 12, (uint8_t[3]){8, 0, 0x45}, 3);
    server_store16(ip + 2, (unsigned)(40 + size_bytes - 5));
    ip[9] = 6;
    memcpy(ip + 12, guest_address, 4);
    memcpy(ip + 16, address, 4);
    uint16_t sum = net_checksum_finish(net_checksum_add(0, ip, 20));
    memcpy(ip + 10, &sum, 2);
    server_store16(tcp, port);
    server_store16(tcp + 2, 80);
    server_store32(tcp + 4, guest->seq[port] + (uint32_t)(int8_t)step[2]);
    server_store32(tcp + 8, guest->ack[port] + (uint32_t)(int8_t)step[3] * 4);
    tcp[12] = 0x50;
    tcp[13] = step[1];
    server_store16(tcp + 14, step[4] * 64u);
    memcpy(tcp + 20, step + 5, size_bytes - 5);
    guest->seq[port] += (uint32_t)size_bytes - 5;
    transmit(guest, frame, 54 + size_bytes - 5, NET_HEADER_F_NEEDS_CSUM);
}

static void take_step(struct guest *guest, unsigned kind, const uint8_t *step, size_t size_bytes)
{
    uint8_t text[5 + 250] = {1, TCP_ACK, 0, 0, 255};
    switch (kind) {
    case RAW:
        transmit(guest, step, size_bytes, 0);
        break;
    case SEGMENT:
        send_segment(guest, step, size_bytes);
        break;
    case TEXT: /* on connection 1 */
        memcpy(text + 5, step, size_bytes < 250 ? size_bytes : 250);
        send_segment(guest, text, 5 + (size_bytes < 250 ? size_bytes : 250));
        break;
    case BUFFERS:
        guest->no_buffers = size_bytes % 2;
        if (!guest->no_buffers)
            net_resume(guest->net);
        break;
    default: /* all that waits, a few times at once */
        for (unsigned i = 0; i < SERVER_CONNECTIONS_MAX; i++)
            ((struct server *)guest->net)->connection[i].sent_ns = ((struct server *)guest->net)->connection[i].heard_ns = 0;
        server_tcp_timer(guest->net);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    struct guest guest = {0};
    struct net_server_counters counters = {0};
    struct metadata *metadata = metadata_create(0);
    json_t *content = json_pack("{s:{s:{s:s, s:i}, s:s}}", "latest", "meta-data", "id", "i-1", "n", 5, "user-data", "text");
    struct net *inner = calloc(1, sizeof *inner);
    if (!metadata || !content || !inner || loop_create(&guest.loop, NULL) || metadata_put(metadata, content, NULL))
        abort();
    metadata_set(metadata, &(struct metadata_settings){.version_2 = size_bytes && data[0] & 128});
    inner->backend = &inner_backend;
    inner->loop = guest.loop;
    inner->client = (struct net_client){.receive = receive, .ctx = &guest};
    guest.net = inner;
    const struct net_server server = {.address = {169, 254, 169, 254}, .port = METADATA_PORT, .serve = metadata_serve, .ctx = metadata, .counters = &counters};
    if (net_serve(&guest.net, &server))
        abort();
    for (size_t at = 0; at + 2 <= size_bytes;) {
        size_t length = data[at + 1] < size_bytes - at - 2 ? data[at + 1] : size_bytes - at - 2;
        take_step(&guest, data[at] % 128 % KINDS, data + at + 2, length);
        at += 2 + length;
        if (counters.connections_created - counters.connections_destroyed > SERVER_CONNECTIONS_MAX)
            abort();
    }
    net_close(guest.net);
    if (counters.connections_created != counters.connections_destroyed)
        abort();
    loop_destroy(guest.loop);
    json_decref(content);
    metadata_destroy(metadata);
    return 0;
}
