/*
 * virtio-console: one port without multiport (virtio 1.2, section 5.3). Queue 0 takes input to the guest, queue 1 its output.
 *
 * Invariant: `starved` means that receive took less than it was offered and nobody was told of new buffers since.
 * Threading: with the device lock held.
 */
#include "device/virtio_console.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio.h"
#include "util/log.h"

#define F_SIZE 0
#define F_EMERG_WRITE 2
#define CONFIG_BYTES 12u
#define CONFIG_EMERG_WR 8u

#define QUEUE_RECEIVE 0u
#define QUEUE_TRANSMIT 1u
#define QUEUE_SIZE 128u
#define ROUND_CHAINS 128u
#define ROUND_BYTES (1u << 20)  /* the device lock is held meanwhile */
#define CHAIN_BYTES (1u << 20)  /* of one chain more is not printed; drivers send some pages */

struct device {
    struct virtio virtio;
    struct virtio_console_config config;
    bool starved;
};

/* Returns the number of bytes printed. */
static uint64_t print_chain(const struct uart_sink *sink, const struct virtqueue_chain *chain)
{
    uint64_t done = 0;

    for (unsigned i = 0; i < chain->in_count && done < CHAIN_BYTES && sink->write; i++) {
        size_t part = chain->in[i].iov_len < CHAIN_BYTES - done ? chain->in[i].iov_len : (size_t)(CHAIN_BYTES - done);

        sink->write(sink->ctx, chain->in[i].iov_base, part);
        done += part;
    }
    if (sink->write && done < chain->in_bytes)
        LOG_GUEST(LOG_WARNING, "virtio-console: %llu bytes at once are more than a console prints", (unsigned long long)chain->in_bytes);
    return done;
}

static void transmit(struct device *console)
{
    struct virtqueue *queue = virtio_queue(&console->virtio, QUEUE_TRANSMIT);
    const struct uart_sink *sink = &console->config.sink;

    uint64_t round_bytes = 0;

    for (unsigned i = 0; i < ROUND_CHAINS && round_bytes < ROUND_BYTES; i++) {
        struct virtqueue_chain *chain = virtqueue_pop(queue);

        if (!chain) {
            if (!virtqueue_set_notification(queue, true))
                return;
            continue;
        }
        round_bytes += print_chain(sink, chain);
        virtqueue_push(chain, 0, true);
    }
    virtio_wake_queue(&console->virtio, QUEUE_TRANSMIT);
}

static void buffers_arrived(void *ctx)
{
    struct device *console = ctx;

    if (!console->starved)
        return;
    console->starved = false;
    if (console->config.ready)
        console->config.ready(console->config.ready_ctx);
}

static void console_notify(void *ctx, unsigned index)
{
    if (index == QUEUE_TRANSMIT)
        transmit(ctx);
    else
        buffers_arrived(ctx);
}

size_t virtio_console_receive(struct device *console, const uint8_t *data, size_t size_bytes)
{
    struct virtqueue *queue = virtio_queue(&console->virtio, QUEUE_RECEIVE);
    size_t done = 0;

    if (virtio_ready(&console->virtio)) {
        for (unsigned i = 0; i < ROUND_CHAINS && done < size_bytes; i++) {
            struct virtqueue_chain *chain = virtqueue_pop(queue);

            if (chain) {
                uint64_t part = virtqueue_write(chain, 0, data + done, size_bytes - done);

                virtqueue_push(chain, part, true);
                done += part;
            } else if (!virtqueue_set_notification(queue, true)) {
                break;
            }
        }
    }
    if (done < size_bytes) {
        console->starved = true;
        if (virtio_ready(&console->virtio) && virtqueue_pending(queue))
            virtio_wake_queue(&console->virtio, QUEUE_RECEIVE);
    }
    return done;
}

void virtio_console_resize(struct device *console, uint16_t columns, uint16_t rows)
{
    if (console->config.columns == columns && console->config.rows == rows)
        return;
    console->config.columns = columns;
    console->config.rows = rows;
    virtio_config_changed(&console->virtio);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    const struct device *console = ctx;
    const struct virtio_console_config *config = &console->config;
    const uint8_t bytes[CONFIG_BYTES] = {
        config->columns & 0xFF, config->columns >> 8, config->rows & 0xFF, config->rows >> 8, 1, /* max_nr_ports */
    };

    memcpy(data, bytes + offset, size_bytes);
}

static void config_write(void *ctx, unsigned offset, const void *data, unsigned size_bytes)
{
    const struct uart_sink *sink = &((struct device *)ctx)->config.sink;

    /* 5.3.4: emerg_wr prints a character at any time, even before the features are agreed. */
    if (offset == CONFIG_EMERG_WR && sink->write)
        sink->write(sink->ctx, data, 1);
}

static const struct virtio_device_ops console_ops = {
    .name = "virtio-console",
    .device_id = 3,
    .class_code = 0x078000,
    .config_bytes = CONFIG_BYTES,
    .config_read = config_read,
    .config_write = config_write,
    .ready = buffers_arrived,
    .queue_notify = console_notify,
};

static int console_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_console_config *console_config = config;
    const struct virtio_config pci_config = {
        .features = 1ull << F_SIZE | 1ull << F_EMERG_WRITE,
        .queue_count = 2,
        .queue_size = QUEUE_SIZE,
        .slot = console_config->slot,
    };
    struct device *console = calloc(1, sizeof(*console));
    int ret;

    *out = NULL;
    if (!console)
        return error_set(err, -ENOMEM, "virtio-console: no memory");
    console->config = *console_config;
    ret = virtio_init(&console->virtio, host, &console_ops, console, &pci_config, err);
    if (ret < 0) {
        free(console);
        return ret;
    }
    *out = console;
    return 0;
}

static void console_reset(struct device *console)
{
    virtio_reset(&console->virtio);
}

static int console_state(struct device *console, struct state_io *io)
{
    if (state_loading(io))
        console->starved = true; /* somebody may be waiting with input */
    state_begin(io, "virtio-console", 1);
    virtio_state(&console->virtio, io);
    return state_end(io);
}

static void console_destroy(struct device *console)
{
    virtio_fini(&console->virtio);
    free(console);
}

const struct device_class virtio_console_class = {
    .name = "virtio-console",
    .help = "console port (/dev/hvc0)",
    .create = console_create,
    .reset = console_reset,
    .state = console_state,
    .destroy = console_destroy,
};
