/*
 * virtio-net (virtio 1.2, section 5.1): one receive queue, one transmit queue and the control queue, in front of a back end of net/net.h.
 *
 * Frames are copied or handed on at once, so that no chain is in flight between two callbacks. The driver's notifications of the receive queue are
 * wanted only while the back end waits for buffers. Work for one event is bounded by BATCH and BATCH_BYTES; what is left goes on in the loop's next round.
 * Everything in rings, headers and commands is the guest's: commands are copied out before they are looked at.
 * Threading: with the device lock held; queue_notify, receive and writable on the loop's thread.
 */
#include "device/virtio_net.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/device.h"
#include "device/rate_gate.h"
#include "device/virtio.h"
#include "net/net.h"
#include "net/offload.h"
#include "util/log.h"

/* 5.1.2 */
enum { QUEUE_RX, QUEUE_TX, QUEUE_CONTROL, QUEUES };
#define QUEUE_SIZE 256u
#define BATCH 64u
#define BATCH_BYTES (256u << 10) /* a guest may ask for segments of 8 bytes */
/* Back ends hand over a header and a frame, or both in one. */
#define RECEIVE_VECTORS_MAX 4u

/* 5.1.3 */
#define F_CSUM 0
#define F_GUEST_CSUM 1
#define F_MTU 3
#define F_MAC 5
#define F_GUEST_TSO4 7
#define F_GUEST_TSO6 8
#define F_GUEST_ECN 9
#define F_HOST_TSO4 11
#define F_HOST_TSO6 12
#define F_HOST_ECN 13
#define F_MRG_RXBUF 15
#define F_STATUS 16
#define F_CTRL_VQ 17
#define F_CTRL_RX 18
#define F_CTRL_RX_EXTRA 20
#define F_CTRL_MAC_ADDR 23
#define BIT(n) (1ull << (n))

#define MAC_BYTES 6u
#define ETHERNET_BYTES 14u
/* Addresses of each kind in the filter table; more are taken as "all". */
#define TABLE_ENTRIES 64u

/* 5.1.4 */
#define STATUS_LINK_UP 1u
struct config_space {
    uint8_t mac[MAC_BYTES];
    uint16_t status;
    uint16_t queue_pairs;
    uint16_t mtu;
} __attribute__((packed));

/* 5.1.6.5: classes, commands and answers of the control queue. */
#define CONTROL_OK 0u
#define CONTROL_ERROR 1u
#define CLASS_RX 0u
#define CLASS_MAC 1u
#define MAC_TABLE_SET 0u
#define MAC_ADDR_SET 1u
enum rx_mode { RX_PROMISC, RX_ALLMULTI, RX_ALLUNI, RX_NOMULTI, RX_NOUNI, RX_NOBCAST, RX_MODES };

struct mac_table {
    uint32_t count;
    bool overflow; /* there were more: every address of this kind is taken */
    uint8_t mac[TABLE_ENTRIES][MAC_BYTES];
};

struct virtio_net {
    struct virtio virtio;
    struct net *net;
    uint8_t permanent_mac[MAC_BYTES];
    uint8_t mac[MAC_BYTES];
    uint16_t status, mtu;
    bool rx_mode[RX_MODES];
    struct mac_table unicast, multicast;
    bool tx_waiting; /* the back end is full */
    struct rate_gate rx_gate, tx_gate;
    struct virtio_net_counters counters;
    struct virtqueue_chain *merged[QUEUE_SIZE]; /* the buffers of the frame being received */
};

/* ---- Addresses ---- */

/* FNV-1a, 32 bits: spreads names that differ in one character only. The terminating zero is part of the text. */
static uint32_t hash_text(uint32_t hash, const char *text)
{
    do
        hash = (hash ^ (uint8_t)*text) * 16777619u;
    while (*text++);
    return hash;
}

void virtio_net_default_mac(uint8_t mac[6], const char *machine, const char *interface, unsigned index)
{
    uint32_t hash = hash_text(hash_text(2166136261u, machine ? machine : ""), interface ? interface : "");
    for (unsigned shift = 0; shift < 32; shift += 8)
        hash = (hash ^ (index >> shift & 0xFF)) * 16777619u;
    hash ^= hash >> 24;
    const uint8_t bytes[6] = {0x52, 0x54, 0x00, (uint8_t)(hash >> 16), (uint8_t)(hash >> 8), (uint8_t)hash};
    memcpy(mac, bytes, sizeof bytes);
}

static bool mac_is_multicast(const uint8_t *mac)
{
    return mac[0] & 1;
}

static bool mac_is_station(const uint8_t *mac)
{
    static const uint8_t zero[MAC_BYTES];
    return !mac_is_multicast(mac) && memcmp(mac, zero, MAC_BYTES) != 0;
}

static bool table_has(const struct mac_table *table, const uint8_t *mac)
{
    for (unsigned i = 0; i < table->count; i++)
        if (memcmp(table->mac[i], mac, MAC_BYTES) == 0)
            return true;
    return table->overflow;
}

/* 5.1.6.5.1 and 5.1.6.5.2 */
static bool wants_frame(const struct virtio_net *nic, const uint8_t *destination)
{
    static const uint8_t broadcast[MAC_BYTES] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    const bool *mode = nic->rx_mode;
    if (mode[RX_PROMISC])
        return true;
    if (memcmp(destination, broadcast, MAC_BYTES) == 0)
        return !mode[RX_NOBCAST];
    if (mac_is_multicast(destination))
        return mode[RX_ALLMULTI] || (!mode[RX_NOMULTI] && table_has(&nic->multicast, destination));
    return mode[RX_ALLUNI] ||
           (!mode[RX_NOUNI] && (memcmp(destination, nic->mac, MAC_BYTES) == 0 || table_has(&nic->unicast, destination)));
}

/* ---- Receive ---- */

/* Copies `size_bytes` from the start of the vectors; false when they are shorter. */
static bool peek(const struct iovec *iov, unsigned iov_count, void *data, size_t size_bytes)
{
    uint8_t *to = data;
    for (unsigned i = 0; i < iov_count && size_bytes; i++) {
        size_t part = iov[i].iov_len < size_bytes ? iov[i].iov_len : size_bytes;
        memcpy(to, iov[i].iov_base, part);
        to += part;
        size_bytes -= part;
    }
    return size_bytes == 0;
}

/*
 * A frame may have been made for the driver before a reset, which had other offloads. Adapts the header where that is enough (5.1.6.4.1: no flags
 * without GUEST_CSUM); false when the driver cannot take the frame.
 */
static bool adapt_header(const struct virtio_net *nic, struct net_header *header)
{
    uint64_t needed = 0;
    if (header->flags & NET_HEADER_F_NEEDS_CSUM)
        needed |= BIT(F_GUEST_CSUM);
    switch (header->gso_type & ~NET_GSO_ECN) {
    case NET_GSO_NONE:
        break;
    case NET_GSO_TCPV4:
        needed |= BIT(F_GUEST_TSO4);
        break;
    case NET_GSO_TCPV6:
        needed |= BIT(F_GUEST_TSO6);
        break;
    default:
        return false;
    }
    if (header->gso_type & NET_GSO_ECN)
        needed |= BIT(F_GUEST_ECN);
    if (needed & ~nic->virtio.features)
        return false;
    if (!virtio_has_feature(&nic->virtio, F_GUEST_CSUM))
        header->flags = 0;
    return true;
}

static void unpop_merged(struct virtio_net *nic, unsigned count)
{
    while (count)
        virtqueue_unpop(nic->merged[--count]); /* last popped first */
}

/*
 * Pops buffers for `frame_bytes` into nic->merged. Returns their number; 0: there are not enough (now), -ENOSPC: there never will be.
 */
static int pop_buffers(struct virtio_net *nic, struct virtqueue *queue, uint64_t frame_bytes)
{
    bool mergeable = virtio_has_feature(&nic->virtio, F_MRG_RXBUF);
    unsigned limit = mergeable ? nic->virtio.queue[QUEUE_RX].size : 1;
    uint64_t room_bytes = 0;
    unsigned count = 0;
    while (room_bytes < frame_bytes && count < limit) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);
        if (!chain) {
            unpop_merged(nic, count);
            return 0;
        }
        nic->merged[count++] = chain;
        room_bytes += chain->out_bytes;
        if (chain->out_bytes == 0) {
            unpop_merged(nic, count);
            virtqueue_fail(queue, "a receive buffer is not writable");
            return 0;
        }
    }
    if (room_bytes >= frame_bytes)
        return (int)count;
    unpop_merged(nic, count);
    return -ENOSPC;
}

/* As above, and asks for a notification when there are none, looking again for those that came in between. */
static int take_buffers(struct virtio_net *nic, struct virtqueue *queue, uint64_t frame_bytes)
{
    int count = pop_buffers(nic, queue, frame_bytes);
    if (count == 0 && virtqueue_set_notification(queue, true)) {
        count = pop_buffers(nic, queue, frame_bytes);
        if (count != 0)
            virtqueue_set_notification(queue, false);
    }
    return count;
}

/* Spreads the vectors over the `count` buffers in nic->merged and gives these back to the driver. */
static void fill_buffers(struct virtio_net *nic, unsigned count, const struct iovec *iov, unsigned iov_count)
{
    unsigned source = 0;
    size_t source_offset = 0;
    for (unsigned i = 0; i < count; i++) {
        struct virtqueue_chain *chain = nic->merged[i];
        uint64_t filled = 0;
        while (filled < chain->out_bytes && source < iov_count) {
            const struct iovec *from = &iov[source];
            uint64_t done = virtqueue_write(chain, filled, (const uint8_t *)from->iov_base + source_offset,
                                            from->iov_len - source_offset);
            filled += done;
            source_offset += done;
            if (source_offset == from->iov_len) {
                source++;
                source_offset = 0;
            }
        }
        virtqueue_push(chain, filled, i + 1 == count);
    }
}

/* The header is replaced by the adapted one; the frame's bytes are where they were. */
static bool receive_frame(struct virtio_net *nic, struct net_header *header, const struct iovec *iov, unsigned iov_count)
{
    struct iovec frame[1 + RECEIVE_VECTORS_MAX];
    assert(iov_count <= RECEIVE_VECTORS_MAX);
    unsigned frame_count = 1;
    uint64_t frame_bytes = sizeof *header;
    size_t skip_bytes = sizeof *header;
    frame[0] = (struct iovec){header, sizeof *header};
    for (unsigned i = 0; i < iov_count; i++) {
        size_t skipped = skip_bytes < iov[i].iov_len ? skip_bytes : iov[i].iov_len;
        skip_bytes -= skipped;
        if (iov[i].iov_len == skipped)
            continue;
        frame[frame_count++] = (struct iovec){(uint8_t *)iov[i].iov_base + skipped, iov[i].iov_len - skipped};
        frame_bytes += iov[i].iov_len - skipped;
    }

    int count = take_buffers(nic, virtio_queue(&nic->virtio, QUEUE_RX), frame_bytes);
    if (count == 0)
        return false;
    if (count < 0) {
        nic->counters.rx_no_room++;
        return true;
    }
    header->num_buffers = (uint16_t)count; /* 1 also without MRG_RXBUF: 5.1.6.4.1 */
    fill_buffers(nic, (unsigned)count, frame, frame_count);
    nic->counters.rx_frames++;
    nic->counters.rx_bytes += frame_bytes - sizeof *header;
    return true;
}

static uint64_t length_of(const struct iovec *iov, unsigned iov_count)
{
    uint64_t bytes = 0;
    for (unsigned i = 0; i < iov_count; i++)
        bytes += iov[i].iov_len;
    return bytes;
}

static void rx_gate_opened(void *ctx)
{
    struct virtio_net *nic = ctx;
    net_resume(nic->net);
}

static bool nic_receive(void *ctx, const struct iovec *iov, unsigned iov_count)
{
    struct virtio_net *nic = ctx;
    struct {
        struct net_header header;
        uint8_t destination[MAC_BYTES];
    } start;
    _Static_assert(sizeof start == NET_HEADER_BYTES + MAC_BYTES, "no padding between header and frame");

    if (!virtio_ready(&nic->virtio) || !(nic->status & STATUS_LINK_UP)) {
        nic->counters.rx_no_driver++;
        return true;
    }
    if (!peek(iov, iov_count, &start, sizeof start))
        return true;
    if (!wants_frame(nic, start.destination)) {
        nic->counters.rx_filtered++;
        return true;
    }
    if (!adapt_header(nic, &start.header)) {
        nic->counters.rx_unsuitable++;
        return true;
    }
    uint64_t frame_bytes = length_of(iov, iov_count) - NET_HEADER_BYTES;
    if (!rate_gate_pass(&nic->rx_gate, frame_bytes))
        return false; /* rx_gate_opened goes on */
    if (receive_frame(nic, &start.header, iov, iov_count))
        return true;
    rate_gate_give_back(&nic->rx_gate, frame_bytes);
    if (virtio_ready(&nic->virtio))
        return false;
    nic->counters.rx_no_driver++; /* the queue broke on the way: there will be no buffer before a reset */
    return true;
}

/* There are buffers. If they do not last, nic_receive asks for notifications again. */
static void notify_rx(struct virtio_net *nic)
{
    virtqueue_set_notification(virtio_queue(&nic->virtio, QUEUE_RX), false);
    net_resume(nic->net);
}

/* ---- Transmit ---- */

/* False when the back end is full; the chain is then still the caller's. */
static bool transmit_chain(struct virtio_net *nic, const struct virtqueue_chain *chain)
{
    if (chain->in_bytes < NET_HEADER_BYTES + ETHERNET_BYTES || chain->in_bytes > NET_HEADER_BYTES + NET_FRAME_BYTES_MAX) {
        nic->counters.tx_malformed++;
        LOG_GUEST(LOG_DEBUG, "virtio-net: dropped a frame of %llu bytes", (unsigned long long)chain->in_bytes);
        return true;
    }
    if (nic->status & STATUS_LINK_UP && !net_transmit(nic->net, chain->in, chain->in_count))
        return false;
    nic->counters.tx_frames++;
    nic->counters.tx_bytes += chain->in_bytes - NET_HEADER_BYTES;
    return true;
}

static void tx_gate_opened(void *ctx)
{
    struct virtio_net *nic = ctx;
    virtio_wake_queue(&nic->virtio, QUEUE_TX);
}

static void notify_tx(struct virtio_net *nic)
{
    struct virtqueue *queue = virtio_queue(&nic->virtio, QUEUE_TX);
    unsigned done = 0;
    uint64_t done_bytes = 0;
    do {
        struct virtqueue_chain *chain;
        virtqueue_set_notification(queue, false);
        while ((chain = virtqueue_pop(queue))) {
            uint64_t frame_bytes = chain->in_bytes > NET_HEADER_BYTES ? chain->in_bytes - NET_HEADER_BYTES : 0;
            if (!rate_gate_pass(&nic->tx_gate, frame_bytes)) {
                virtqueue_unpop(chain);
                return; /* tx_gate_opened goes on */
            }
            done_bytes += chain->in_bytes;
            if (!transmit_chain(nic, chain)) {
                virtqueue_unpop(chain);
                rate_gate_give_back(&nic->tx_gate, frame_bytes);
                nic->tx_waiting = true; /* nic_writable goes on */
                return;
            }
            virtqueue_push(chain, 0, true);
            if (++done == BATCH || done_bytes >= BATCH_BYTES) {
                virtio_wake_queue(&nic->virtio, QUEUE_TX);
                return;
            }
        }
    } while (virtqueue_set_notification(queue, true));
}

static void nic_writable(void *ctx)
{
    struct virtio_net *nic = ctx;
    if (nic->tx_waiting)
        virtio_wake_queue(&nic->virtio, QUEUE_TX);
    nic->tx_waiting = false;
}

/* ---- Control ---- */

static uint8_t control_rx(struct virtio_net *nic, const struct virtqueue_chain *chain, uint8_t command)
{
    uint8_t on;
    unsigned known = virtio_has_feature(&nic->virtio, F_CTRL_RX_EXTRA) ? RX_MODES : RX_ALLUNI;
    if (!virtio_has_feature(&nic->virtio, F_CTRL_RX) || command >= known || virtqueue_read(chain, 2, &on, 1) != 1)
        return CONTROL_ERROR;
    nic->rx_mode[command] = on != 0;
    return CONTROL_OK;
}

/* Reads one list of 5.1.6.5.2 at *offset and moves behind it. False: the command is too short for it. */
static bool read_table(const struct virtqueue_chain *chain, uint64_t *offset, struct mac_table *table)
{
    uint32_t entries;
    if (virtqueue_read(chain, *offset, &entries, sizeof entries) != sizeof entries)
        return false;
    uint64_t bytes = (uint64_t)entries * MAC_BYTES, start = *offset + sizeof entries;
    if (bytes > chain->in_bytes - start)
        return false;
    *offset = start + bytes;
    table->overflow = entries > TABLE_ENTRIES;
    table->count = table->overflow ? 0 : entries;
    return virtqueue_read(chain, start, table->mac, table->count * MAC_BYTES) == table->count * MAC_BYTES;
}

static uint8_t control_mac_table(struct virtio_net *nic, const struct virtqueue_chain *chain)
{
    struct mac_table unicast = {0}, multicast = {0};
    uint64_t offset = 2;
    if (!virtio_has_feature(&nic->virtio, F_CTRL_RX) || !read_table(chain, &offset, &unicast) ||
        !read_table(chain, &offset, &multicast))
        return CONTROL_ERROR;
    nic->unicast = unicast;
    nic->multicast = multicast;
    return CONTROL_OK;
}

static uint8_t control_mac_address(struct virtio_net *nic, const struct virtqueue_chain *chain)
{
    uint8_t mac[MAC_BYTES];
    if (!virtio_has_feature(&nic->virtio, F_CTRL_MAC_ADDR) || virtqueue_read(chain, 2, mac, sizeof mac) != sizeof mac ||
        !mac_is_station(mac))
        return CONTROL_ERROR;
    memcpy(nic->mac, mac, sizeof mac);
    return CONTROL_OK;
}

static uint8_t control_command(struct virtio_net *nic, const struct virtqueue_chain *chain)
{
    uint8_t head[2];
    if (virtqueue_read(chain, 0, head, sizeof head) != sizeof head)
        return CONTROL_ERROR;
    if (head[0] == CLASS_RX)
        return control_rx(nic, chain, head[1]);
    if (head[0] == CLASS_MAC && head[1] == MAC_TABLE_SET)
        return control_mac_table(nic, chain);
    if (head[0] == CLASS_MAC && head[1] == MAC_ADDR_SET)
        return control_mac_address(nic, chain);
    return CONTROL_ERROR;
}

static void notify_control(struct virtio_net *nic)
{
    struct virtqueue *queue = virtio_queue(&nic->virtio, QUEUE_CONTROL);
    unsigned done = 0;
    do {
        struct virtqueue_chain *chain;
        virtqueue_set_notification(queue, false);
        while ((chain = virtqueue_pop(queue))) {
            uint8_t answer = control_command(nic, chain);
            virtqueue_push(chain, virtqueue_write(chain, 0, &answer, 1), true);
            if (++done == BATCH) {
                virtio_wake_queue(&nic->virtio, QUEUE_CONTROL);
                return;
            }
        }
    } while (virtqueue_set_notification(queue, true));
}

/* ---- The device ---- */

static void nic_queue_notify(void *device, unsigned index)
{
    static void (*const notify[QUEUES])(struct virtio_net *) = {notify_rx, notify_tx, notify_control};
    notify[index](device);
}

static void nic_config_read(void *device, unsigned offset, void *data, unsigned size_bytes)
{
    const struct virtio_net *nic = device;
    struct config_space config = {.status = nic->status, .queue_pairs = 1, .mtu = nic->mtu};
    memcpy(config.mac, nic->mac, sizeof config.mac);
    memcpy(data, (const uint8_t *)&config + offset, size_bytes);
}

static void nic_features_set(void *device, uint64_t features)
{
    struct virtio_net *nic = device;
    bool checksum = features & BIT(F_GUEST_CSUM);
    struct net_offloads offloads = {
        .checksum = checksum,
        .tso4 = checksum && features & BIT(F_GUEST_TSO4),
        .tso6 = checksum && features & BIT(F_GUEST_TSO6),
        .ecn = checksum && features & BIT(F_GUEST_ECN),
    };
    net_set_offloads(nic->net, &offloads);
}

/* Until the driver says otherwise every frame is for it: not all drivers set a filter. */
static void nic_reset(void *device)
{
    struct virtio_net *nic = device;
    memcpy(nic->mac, nic->permanent_mac, sizeof nic->mac);
    memset(nic->rx_mode, 0, sizeof nic->rx_mode);
    nic->rx_mode[RX_PROMISC] = true;
    nic->unicast = nic->multicast = (struct mac_table){0};
    nic->tx_waiting = false;
    nic_features_set(nic, 0);
}

static const struct virtio_device_ops nic_ops = {
    .name = "virtio-net",
    .device_id = 1,
    .class_code = 0x020000, /* Ethernet controller */
    .config_bytes = sizeof(struct config_space),
    .config_read = nic_config_read,
    .features_set = nic_features_set,
    .queue_notify = nic_queue_notify,
    .reset = nic_reset,
};

static void nic_link(void *ctx, bool up)
{
    struct virtio_net *nic = ctx;
    nic->status = up ? STATUS_LINK_UP : 0;
    virtio_config_changed(&nic->virtio);
    virtio_wake_queue(&nic->virtio, QUEUE_TX); /* without a link what waits is sent into nothing */
}

static uint64_t offered_features(const struct net_info *info)
{
    const struct net_offloads *receive = &info->receive;
    bool tso = receive->tso4 || receive->tso6;
    return BIT(F_CSUM) | BIT(F_HOST_TSO4) | BIT(F_HOST_TSO6) | BIT(F_HOST_ECN) | BIT(F_MAC) | BIT(F_MRG_RXBUF) | BIT(F_STATUS) |
           BIT(F_CTRL_VQ) | BIT(F_CTRL_RX) | BIT(F_CTRL_RX_EXTRA) | BIT(F_CTRL_MAC_ADDR) | (info->mtu ? BIT(F_MTU) : 0) |
           (receive->checksum ? BIT(F_GUEST_CSUM) : 0) | (receive->tso4 ? BIT(F_GUEST_TSO4) : 0) |
           (receive->tso6 ? BIT(F_GUEST_TSO6) : 0) | (receive->ecn && tso ? BIT(F_GUEST_ECN) : 0);
}

static void nic_destroy(struct device *device)
{
    struct virtio_net *nic = (struct virtio_net *)device;
    if (!nic)
        return;
    net_close(nic->net);
    rate_gate_fini(&nic->rx_gate);
    rate_gate_fini(&nic->tx_gate);
    virtio_fini(&nic->virtio);
    free(nic);
}

static int nic_create(struct device **device, const struct device_host *host, const void *config_of_class, struct error *err)
{
    const struct virtio_net_config *config = config_of_class;
    struct virtio_net *nic = calloc(1, sizeof *nic);
    if (!nic)
        return error_set(err, -ENOMEM, "virtio-net: out of memory");
    const struct net_client client = {.receive = nic_receive, .link = nic_link, .writable = nic_writable, .ctx = nic, .given = config->given};
    int result = rate_gate_init(&nic->rx_gate, host->loop, config->receive, rx_gate_opened, nic);
    if (result == 0)
        result = rate_gate_init(&nic->tx_gate, host->loop, config->transmit, tx_gate_opened, nic);
    if (result < 0) {
        error_set(err, result, "virtio-net: out of memory");
        goto fail;
    }
    result = net_open(&nic->net, config->net, host->loop, &client, err);
    if (result < 0)
        goto fail;
    if (config->server && (result = net_serve(&nic->net, config->server)) < 0) {
        error_set(err, result, "virtio-net: out of memory");
        goto fail;
    }

    struct net_info info;
    net_get_info(nic->net, &info);
    nic->status = info.link_up ? STATUS_LINK_UP : 0;
    if (config->mtu)
        info.mtu = (uint16_t)config->mtu;
    nic->mtu = info.mtu;
    virtio_net_default_mac(nic->permanent_mac, config->machine, info.interface, config->index);
    if (info.has_mac)
        memcpy(nic->permanent_mac, info.mac, sizeof nic->permanent_mac);
    const struct virtio_config pci = {
        .features = offered_features(&info),
        .queue_count = QUEUES,
        .queue_size = QUEUE_SIZE,
        .slot = config->slot,
    };
    result = virtio_init(&nic->virtio, host, &nic_ops, nic, &pci, err);
    if (result < 0)
        goto fail;
    nic_reset(nic);
    *device = (struct device *)nic;
    return 0;

fail:
    nic_destroy((struct device *)nic);
    return result;
}

void virtio_net_set_mac(struct device *device, const uint8_t mac[6])
{
    struct virtio_net *nic = (struct virtio_net *)device;
    memcpy(nic->permanent_mac, mac, sizeof nic->permanent_mac);
}

static void nic_machine_reset(struct device *device)
{
    virtio_reset(&((struct virtio_net *)device)->virtio);
}

/* ---- State ---- */

static void table_state(struct mac_table *table, struct state_io *io)
{
    state_bool(io, &table->overflow);
    state_u32(io, &table->count);
    state_bytes(io, table->mac, sizeof table->mac);
    if (state_loading(io) && table->count > TABLE_ENTRIES) {
        table->count = 0;
        state_fail(io, "the address table is longer than the device's");
    }
}

/* Connections of the back end and the frames it still holds are not part of the state: to the guest they are lost on the wire. */
static int nic_state(struct device *device, struct state_io *io)
{
    struct virtio_net *nic = (struct virtio_net *)device;
    uint16_t status = nic->status;
    state_begin(io, "virtio-net", 1);
    virtio_state(&nic->virtio, io); /* resets the device when loading, so it comes first */
    state_bytes(io, nic->permanent_mac, sizeof nic->permanent_mac);
    state_bytes(io, nic->mac, sizeof nic->mac);
    state_u16(io, &status);
    for (unsigned i = 0; i < RX_MODES; i++)
        state_bool(io, &nic->rx_mode[i]);
    table_state(&nic->unicast, io);
    table_state(&nic->multicast, io);
    if (state_loading(io) && !state_failed(io)) {
        if (!mac_is_station(nic->mac) || !mac_is_station(nic->permanent_mac))
            state_fail(io, "a station's address is a group's or zero");
        else if (status != nic->status) /* the link is the new back end's */
            virtio_config_changed(&nic->virtio);
    }
    return state_end(io);
}

void virtio_net_get_counters(const struct device *device, struct virtio_net_counters *counters)
{
    const struct virtio_net *nic = (const struct virtio_net *)device;
    *counters = nic->counters;
    counters->rx_limited = nic->rx_gate.turned_away;
    counters->tx_limited = nic->tx_gate.turned_away;
}

void virtio_net_set_limit(struct device *device, bool receive, const struct bucket_config *bandwidth, const struct bucket_config *ops)
{
    struct virtio_net *nic = (struct virtio_net *)device;
    rate_gate_set(receive ? &nic->rx_gate : &nic->tx_gate, bandwidth, ops);
}

void virtio_net_announce(struct device *device)
{
    /* Ethernet header; then hardware type 1, protocol 0x0800, lengths 6 and 4, operation 3 (request reverse), and our address as both sender and target. */
    enum { SOURCE = 6, SENDER = 22, TARGET = 32 };
    uint8_t frame[NET_HEADER_BYTES + 60] = {0}, *packet = frame + NET_HEADER_BYTES;
    static const uint8_t arp[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3};
    const struct virtio_net *nic = (const struct virtio_net *)device;
    const struct iovec iov = {frame, sizeof frame};
    struct net_info info;
    net_get_info(nic->net, &info);
    if (!info.interface)
        return;
    memset(packet, 0xFF, MAC_BYTES);
    memcpy(packet + SOURCE, nic->mac, MAC_BYTES);
    memcpy(packet + SOURCE + MAC_BYTES, arp, sizeof arp);
    memcpy(packet + SENDER, nic->mac, MAC_BYTES);
    memcpy(packet + TARGET, nic->mac, MAC_BYTES);
    (void)net_transmit(nic->net, &iov, 1); /* full: there are frames of the guest's, which say it, too */
}

size_t virtio_net_take(struct device *device, void *frame, size_t size_bytes)
{
    return net_take(((struct virtio_net *)device)->net, frame, size_bytes);
}

void virtio_net_give(struct device *device, const void *frame, size_t size_bytes)
{
    net_give(((struct virtio_net *)device)->net, frame, size_bytes);
}

static void nic_counters(struct device *device, device_counter_fn *emit, void *ctx)
{
    const struct virtio_net *nic = (const struct virtio_net *)device;
    const struct virtio_net_counters *c = &nic->counters;
    emit(ctx, "rx_packets_count", c->rx_frames);
    emit(ctx, "rx_bytes_count", c->rx_bytes);
    emit(ctx, "rx_fails", c->rx_no_driver + c->rx_no_room + c->rx_unsuitable);
    emit(ctx, "tx_packets_count", c->tx_frames);
    emit(ctx, "tx_bytes_count", c->tx_bytes);
    emit(ctx, "tx_malformed_frames", c->tx_malformed);
    emit(ctx, "rx_rate_limiter_throttled", nic->rx_gate.turned_away);
    emit(ctx, "tx_rate_limiter_throttled", nic->tx_gate.turned_away);
}

const struct device_class virtio_net_class = {
    .name = "virtio-net",
    .help = "network interface (user networking or a tap)",
    .create = nic_create,
    .reset = nic_machine_reset,
    .state = nic_state,
    .destroy = nic_destroy,
    .counters = nic_counters,
};
