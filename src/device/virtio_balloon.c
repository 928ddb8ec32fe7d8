/*
 * virtio-balloon (virtio 1.2, section 5.5): inflation, statistics, free page hinting and reporting.
 *
 * Pages in the balloon, reported and hinted are discarded (physmap_discard): contents are gone, the guest may touch them all the same and gets zeroes. So nothing needs to be known of them
 * afterwards, and deflating is the driver's affair alone. Page frame numbers are a hostile guest's: what is not RAM is ignored.
 * A statistics buffer stays in its ring until it is asked for again; each look takes it out and puts it back. Work is bounded: ROUND_CALLS discards a round of
 * the loop, CHAIN_PAGES numbers of a chain.
 * Queues are numbered as drivers do it: those of features that were not agreed on are not counted.
 * Threading: with the device lock held.
 */
#include "device/virtio_balloon.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio.h"
#include "util/log.h"

#define QUEUE_SIZE 128u
#define ROUND_CALLS 1024u
#define CHAIN_PAGES 4096u
#define STAT_BYTES 10u /* 5.5.6.3: le16 tag, le64 value */
#define SECOND_NS 1000000000ull
#define INTERVAL_MAX_S 1000000000u

enum { F_STATS_VQ = 1, F_DEFLATE_ON_OOM = 2, F_FREE_PAGE_HINT = 3, F_PAGE_POISON = 4, F_PAGE_REPORTING = 5 };
enum { COMMAND_STOP = 0, COMMAND_DONE = 1, COMMAND_FIRST = 2 };
enum { CONFIG_NUM_PAGES = 0, CONFIG_ACTUAL = 4, CONFIG_COMMAND = 8, CONFIG_POISON = 12, CONFIG_BYTES = 16 };

enum role { ROLE_INFLATE, ROLE_DEFLATE, ROLE_STATISTICS, ROLE_HINTING, ROLE_REPORTING, ROLE_COUNT, ROLE_NONE = ROLE_COUNT };

struct device {
    struct virtio virtio;
    struct physmap *memory;
    struct loop_timer *timer;
    enum role role[ROLE_COUNT]; /* of each queue */
    uint8_t config[CONFIG_BYTES];
    bool told; /* the driver has filled a statistics buffer since it was last asked */
    bool hints_count, acknowledge; /* hinting: the round is the current one; it ends itself */
    struct virtio_balloon_status status;
    uint64_t served[ROLE_COUNT], freed_bytes[ROLE_COUNT]; /* requests by role, and what they gave back */
    uint64_t failures;                                    /* pages that could not be given back */
};

static uint32_t config_get(const struct device *balloon, unsigned offset)
{
    uint32_t value;
    memcpy(&value, balloon->config + offset, sizeof value);
    return value;
}

static void config_set(struct device *balloon, unsigned offset, uint32_t value)
{
    memcpy(balloon->config + offset, &value, sizeof value);
}

static void config_tell(struct device *balloon, unsigned offset, uint32_t value)
{
    config_set(balloon, offset, value);
    virtio_config_changed(&balloon->virtio);
}

/* ---- pages ---- */

static void discard(struct device *balloon, gpa_t gpa, uint64_t length_bytes)
{
    int ret = physmap_discard(balloon->memory, gpa, length_bytes);
    balloon->failures += ret != 0;
    if (ret)
        LOG_GUEST(LOG_WARNING, "virtio-balloon: pages at %#llx not given back: %s", (unsigned long long)gpa, ret == -EFAULT ? "not RAM" : strerror(-ret));
    else
        balloon->status.discarded_bytes += length_bytes;
}

static int page_compare(const void *left, const void *right)
{
    uint32_t a = *(const uint32_t *)left, b = *(const uint32_t *)right;
    return a < b ? -1 : a > b;
}

/* 5.5.6.1: le32 page frame numbers. In order they are few ranges. Returns the number of discards. */
static unsigned inflate(struct device *balloon, const struct virtqueue_chain *chain)
{
    uint32_t page[CHAIN_PAGES];
    unsigned count = (unsigned)(virtqueue_read(chain, 0, page, sizeof page) / sizeof page[0]), calls = 0;
    if (chain->in_bytes > sizeof page)
        LOG_GUEST(LOG_WARNING, "virtio-balloon: a request with more than %u pages; the rest stays", CHAIN_PAGES);
    qsort(page, count, sizeof page[0], page_compare);
    for (unsigned n = 0; n < count; calls++) {
        uint32_t first = page[n], last = first;
        while (++n < count && page[n] - last <= 1)
            last = page[n];
        uint64_t length_bytes = ((uint64_t)last - first + 1) * PAGE_SIZE_BYTES;
        gpa_t gpa = first * PAGE_SIZE_BYTES;
        if (physmap_get(balloon->memory, gpa, length_bytes, PHYSMAP_WRITE)) {
            discard(balloon, gpa, length_bytes);
            continue;
        }
        for (uint32_t at = first; at <= last && at >= first; at++, calls++) /* the range leaves RAM: page by page */
            discard(balloon, at * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES);
    }
    return calls;
}

/* Whole pages of what the driver made writable: free ones. */
static unsigned discard_buffers(struct device *balloon, const struct virtqueue_chain *chain)
{
    /* 5.5.6.6: pages are to hold the poison, which zeroes are not. */
    if (virtio_has_feature(&balloon->virtio, F_PAGE_POISON) && config_get(balloon, CONFIG_POISON))
        return 0;
    for (unsigned n = 0; n < chain->out_count; n++) {
        gpa_t start = (chain->out_gpa[n] + PAGE_MASK_BITS) & ~PAGE_MASK_BITS;
        gpa_t end = (chain->out_gpa[n] + chain->out[n].iov_len) & ~PAGE_MASK_BITS;
        if (start < end)
            discard(balloon, start, end - start);
    }
    return chain->out_count;
}

/* 5.5.6.5: the driver sends the id of the round, its free pages, and "stop". What belongs to a round that is over counts no more: the pages may be in use again. */
static unsigned take_hint(struct device *balloon, const struct virtqueue_chain *chain)
{
    uint32_t command;
    if (chain->in_bytes >= sizeof command && virtqueue_read(chain, 0, &command, sizeof command) == sizeof command) {
        balloon->status.guest_command = command;
        bool ended = balloon->hints_count && command == COMMAND_STOP;
        balloon->hints_count = command >= COMMAND_FIRST && command == config_get(balloon, CONFIG_COMMAND);
        if (ended && balloon->acknowledge)
            config_tell(balloon, CONFIG_COMMAND, COMMAND_DONE);
    }
    return balloon->hints_count ? discard_buffers(balloon, chain) : 0;
}

/* ---- statistics ---- */

static void poll_arm(struct device *balloon, uint64_t after_ns)
{
    if (balloon->status.statistics_interval_s && virtio_has_feature(&balloon->virtio, F_STATS_VQ))
        loop_timer_arm(balloon->timer, loop_now_ns() + after_ns);
    else
        loop_timer_disarm(balloon->timer);
}

static struct virtqueue *statistics_queue(struct device *balloon)
{
    for (unsigned n = 0; n < balloon->virtio.queue_count; n++)
        if (balloon->role[n] == ROLE_STATISTICS)
            return virtio_queue(&balloon->virtio, n);
    return NULL;
}

static void statistics_read(struct device *balloon, struct virtqueue *queue)
{
    struct virtqueue_chain *chain = virtqueue_pop(queue);
    uint8_t entry[STAT_BYTES];
    if (chain) {
        for (unsigned n = 0; n < 4 * VIRTIO_BALLOON_STATS && virtqueue_read(chain, n * STAT_BYTES, entry, STAT_BYTES) == STAT_BYTES; n++) {
            uint16_t tag;
            memcpy(&tag, entry, sizeof tag);
            if (tag >= VIRTIO_BALLOON_STATS)
                continue; /* 5.5.6.3.2: unknown ones are ignored */
            memcpy(&balloon->status.statistic[tag], entry + sizeof tag, sizeof balloon->status.statistic[tag]);
            balloon->status.known |= (uint16_t)(1u << tag);
        }
        balloon->told = true;
        balloon->served[ROLE_STATISTICS]++;
        virtqueue_unpop(chain);
    }
    virtqueue_set_notification(queue, true); /* what is in the ring stays there, so whether it holds any does not matter */
}

/* Returning the buffer asks for a new one. */
static void poll_statistics(void *ctx)
{
    struct device *balloon = ctx;
    struct virtqueue *queue = statistics_queue(balloon);
    if (queue && balloon->told && virtio_ready(&balloon->virtio)) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);
        balloon->told = false;
        if (chain)
            virtqueue_push(chain, 0, true);
        virtqueue_set_notification(queue, true);
    }
    poll_arm(balloon, balloon->status.statistics_interval_s * SECOND_NS);
}

/* ---- the driver's side ---- */

static unsigned serve(struct device *balloon, enum role role, struct virtqueue_chain *chain)
{
    unsigned calls = 0;
    uint64_t before = balloon->status.discarded_bytes;
    if (role == ROLE_INFLATE)
        calls = inflate(balloon, chain);
    else if (role == ROLE_HINTING)
        calls = take_hint(balloon, chain);
    else if (role == ROLE_REPORTING)
        calls = discard_buffers(balloon, chain);
    if (role < ROLE_COUNT) {
        balloon->served[role]++;
        balloon->freed_bytes[role] += balloon->status.discarded_bytes - before;
    }
    virtqueue_push(chain, 0, true);
    return calls + 1;
}

static void balloon_notify(void *ctx, unsigned index)
{
    struct device *balloon = ctx;
    struct virtqueue *queue = virtio_queue(&balloon->virtio, index);
    enum role role = balloon->role[index];
    unsigned calls = 0;
    if (role == ROLE_STATISTICS) {
        statistics_read(balloon, queue);
        return;
    }
    while (calls < ROUND_CALLS) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);
        if (chain)
            calls += serve(balloon, role, chain);
        else if (!virtqueue_set_notification(queue, true))
            return;
        else
            calls++;
    }
    virtio_wake_queue(&balloon->virtio, index);
}

static void features_set(void *ctx, uint64_t features)
{
    static const struct {
        enum role role;
        unsigned feature;
    } optional[] = {{ROLE_STATISTICS, F_STATS_VQ}, {ROLE_HINTING, F_FREE_PAGE_HINT}, {ROLE_REPORTING, F_PAGE_REPORTING}};
    struct device *balloon = ctx;
    unsigned count = 2;
    balloon->role[0] = ROLE_INFLATE;
    balloon->role[1] = ROLE_DEFLATE;
    for (unsigned n = 0; n < sizeof optional / sizeof *optional; n++)
        if (features >> optional[n].feature & 1)
            balloon->role[count++] = optional[n].role;
    while (count < ROLE_COUNT)
        balloon->role[count++] = ROLE_NONE;
}

static void balloon_ready(void *ctx)
{
    struct device *balloon = ctx;
    poll_arm(balloon, balloon->status.statistics_interval_s * SECOND_NS);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    memcpy(data, ((struct device *)ctx)->config + offset, size_bytes);
}

static void config_write(void *ctx, unsigned offset, const void *data, unsigned size_bytes)
{
    struct device *balloon = ctx;
    bool actual = offset >= CONFIG_ACTUAL && offset + size_bytes <= CONFIG_COMMAND;
    bool poison = offset >= CONFIG_POISON && offset + size_bytes <= CONFIG_BYTES;
    if (actual || poison)
        memcpy(balloon->config + offset, data, size_bytes);
}

/* The driver has gone, and with it what it held. */
static void driver_reset(void *ctx)
{
    struct device *balloon = ctx;
    loop_timer_disarm(balloon->timer);
    for (unsigned n = 0; n < ROLE_COUNT; n++)
        balloon->role[n] = ROLE_NONE;
    config_set(balloon, CONFIG_ACTUAL, 0);
    config_set(balloon, CONFIG_COMMAND, COMMAND_STOP);
    config_set(balloon, CONFIG_POISON, 0);
    balloon->hints_count = balloon->acknowledge = balloon->told = false;
    balloon->status.guest_command = COMMAND_STOP;
    balloon->status.known = 0;
}

static const struct virtio_device_ops balloon_ops = {
    .name = "virtio-balloon",
    .device_id = 5,
    .class_code = 0xFF0000,
    .config_bytes = CONFIG_BYTES,
    .config_read = config_read,
    .config_write = config_write,
    .features_set = features_set,
    .ready = balloon_ready,
    .queue_notify = balloon_notify,
    .reset = driver_reset,
};

/* ---- our side ---- */

void virtio_balloon_status(const struct device *balloon, struct virtio_balloon_status *status)
{
    *status = balloon->status;
    status->target_pages = config_get(balloon, CONFIG_NUM_PAGES);
    status->actual_pages = config_get(balloon, CONFIG_ACTUAL);
    status->host_command = config_get(balloon, CONFIG_COMMAND);
}

void virtio_balloon_resize(struct device *balloon, uint32_t target_pages)
{
    config_tell(balloon, CONFIG_NUM_PAGES, target_pages);
}

void virtio_balloon_set_interval(struct device *balloon, uint32_t seconds)
{
    balloon->status.statistics_interval_s = seconds < INTERVAL_MAX_S ? seconds : INTERVAL_MAX_S;
    poll_arm(balloon, 0);
}

void virtio_balloon_hint(struct device *balloon, bool acknowledge)
{
    uint32_t last = balloon->status.host_command;
    balloon->status.host_command = last < COMMAND_FIRST || last == UINT32_MAX ? COMMAND_FIRST : last + 1;
    balloon->acknowledge = acknowledge;
    config_tell(balloon, CONFIG_COMMAND, balloon->status.host_command);
}

void virtio_balloon_hint_done(struct device *balloon)
{
    balloon->hints_count = false;
    config_tell(balloon, CONFIG_COMMAND, COMMAND_DONE);
}

/* ---- the class ---- */

static int balloon_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_balloon_config *wanted = config;
    const struct virtio_config transport = {
        .features = (uint64_t)wanted->statistics << F_STATS_VQ | (uint64_t)wanted->deflate_on_oom << F_DEFLATE_ON_OOM |
                    (uint64_t)wanted->hinting << F_FREE_PAGE_HINT | (uint64_t)wanted->reporting << F_PAGE_REPORTING |
                    (uint64_t)(wanted->hinting || wanted->reporting) << F_PAGE_POISON,
        .queue_count = 2u + wanted->statistics + wanted->hinting + wanted->reporting,
        .queue_size = QUEUE_SIZE,
        .slot = wanted->slot,
    };
    struct device *balloon = calloc(1, sizeof *balloon);
    *out = NULL;
    if (!balloon || !(balloon->timer = loop_timer_create(host->loop, poll_statistics, balloon))) {
        free(balloon);
        return error_set(err, -ENOMEM, "virtio-balloon: no memory");
    }
    balloon->memory = host->memory;
    balloon->status.statistics_interval_s = wanted->statistics_interval_s < INTERVAL_MAX_S ? wanted->statistics_interval_s : INTERVAL_MAX_S;
    config_set(balloon, CONFIG_NUM_PAGES, wanted->target_pages);
    driver_reset(balloon);
    int ret = virtio_init(&balloon->virtio, host, &balloon_ops, balloon, &transport, err);
    if (ret < 0) {
        loop_timer_destroy(balloon->timer);
        free(balloon);
        return ret;
    }
    *out = balloon;
    return 0;
}

static void balloon_reset(struct device *balloon)
{
    virtio_reset(&balloon->virtio);
}

static int balloon_state(struct device *balloon, struct state_io *io)
{
    struct virtio_balloon_status *status = &balloon->status;
    state_begin(io, "virtio-balloon", 1);
    virtio_state(&balloon->virtio, io);
    state_bytes(io, balloon->config, sizeof balloon->config);
    state_bool(io, &balloon->told);
    state_bool(io, &balloon->hints_count);
    state_bool(io, &balloon->acknowledge);
    state_u32(io, &status->host_command);
    state_u32(io, &status->guest_command);
    state_u32(io, &status->statistics_interval_s);
    state_u16(io, &status->known);
    for (unsigned tag = 0; tag < VIRTIO_BALLOON_STATS; tag++)
        state_u64(io, &status->statistic[tag]);
    if (state_loading(io) && status->statistics_interval_s > INTERVAL_MAX_S)
        state_fail(io, "an impossible interval");
    if (state_loading(io))
        poll_arm(balloon, status->statistics_interval_s * SECOND_NS);
    return state_end(io);
}

static void balloon_destroy(struct device *balloon)
{
    virtio_fini(&balloon->virtio);
    loop_timer_destroy(balloon->timer);
    free(balloon);
}

static void balloon_counters(struct device *balloon, device_counter_fn *emit, void *ctx)
{
    emit(ctx, "inflate_count", balloon->served[ROLE_INFLATE]);
    emit(ctx, "deflate_count", balloon->served[ROLE_DEFLATE]);
    emit(ctx, "stats_updates_count", balloon->served[ROLE_STATISTICS]);
    emit(ctx, "free_page_hint_count", balloon->served[ROLE_HINTING]);
    emit(ctx, "free_page_hint_freed", balloon->freed_bytes[ROLE_HINTING]);
    emit(ctx, "free_page_report_count", balloon->served[ROLE_REPORTING]);
    emit(ctx, "free_page_report_freed", balloon->freed_bytes[ROLE_REPORTING]);
    emit(ctx, "event_fails", balloon->failures);
}

const struct device_class virtio_balloon_class = {
    .name = "virtio-balloon",
    .help = "memory given back to the host",
    .create = balloon_create,
    .reset = balloon_reset,
    .state = balloon_state,
    .destroy = balloon_destroy,
    .counters = balloon_counters,
};
