/*
 * virtio-rng: random bytes for the guest (virtio 1.2, section 5.4).
 *
 * A request gets at most CHAIN_BYTES, and a round of the loop serves at most ROUND_CHAINS requests, so that a greedy guest cannot keep the
 * device lock. Threading: with the device lock held.
 */
#include "device/virtio_rng.h"

#include <errno.h>
#include <stdlib.h>

#include "device/rate_gate.h"
#include "device/virtio.h"
#include "state/inputs.h"
#include "util/log.h"

#define QUEUE_SIZE 64
#define CHAIN_BYTES 4096u
#define ROUND_CHAINS 64u

struct device {
    struct virtio virtio;
    struct rate_gate gate;
};

static void gate_opened(void *ctx)
{
    virtio_wake_queue(&((struct device *)ctx)->virtio, 0);
}

static void rng_notify(void *ctx, unsigned index)
{
    struct device *rng = ctx;
    struct virtqueue *queue = virtio_queue(&rng->virtio, index);
    struct virtqueue_chain *chain;
    uint8_t data[CHAIN_BYTES];

    for (unsigned i = 0; i < ROUND_CHAINS; i++) {
        chain = virtqueue_pop(queue);
        if (!chain) {
            if (!virtqueue_set_notification(queue, true))
                return;
            continue;
        }
        size_t wanted = chain->out_bytes < sizeof(data) ? chain->out_bytes : sizeof(data);
        if (!rate_gate_pass(&rng->gate, wanted)) {
            virtqueue_unpop(chain);
            return; /* gate_opened goes on */
        }
        int ret = inputs_random(data, wanted);
        if (ret < 0) {
            LOG_GUEST(LOG_ERROR, "virtio-rng: no random bytes from the host (%d)", ret);
            wanted = 0;
        }
        virtqueue_push(chain, virtqueue_write(chain, 0, data, wanted), true);
    }
    virtio_wake_queue(&rng->virtio, index);
}

static const struct virtio_device_ops rng_ops = {
    .name = "virtio-rng",
    .device_id = 4,
    .class_code = 0xFF0000,
    .queue_notify = rng_notify,
};

static int rng_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_rng_config *rng_config = config;
    const struct virtio_config pci_config = {.queue_count = 1, .queue_size = QUEUE_SIZE, .slot = rng_config->slot};
    struct device *rng = calloc(1, sizeof(*rng));
    int ret;

    *out = NULL;
    if (!rng)
        return error_set(err, -ENOMEM, "virtio-rng: no memory");
    ret = rate_gate_init(&rng->gate, host->loop, rng_config->limit, gate_opened, rng);
    if (ret < 0)
        error_set(err, ret, "virtio-rng: no memory");
    else
        ret = virtio_init(&rng->virtio, host, &rng_ops, rng, &pci_config, err);
    if (ret < 0) {
        rate_gate_fini(&rng->gate);
        free(rng);
        return ret;
    }
    *out = rng;
    return 0;
}

static void rng_reset(struct device *rng)
{
    virtio_reset(&rng->virtio);
}

static int rng_state(struct device *rng, struct state_io *io)
{
    state_begin(io, "virtio-rng", 1);
    virtio_state(&rng->virtio, io);
    return state_end(io);
}

static void rng_destroy(struct device *rng)
{
    rate_gate_fini(&rng->gate);
    virtio_fini(&rng->virtio);
    free(rng);
}

const struct device_class virtio_rng_class = {
    .name = "virtio-rng",
    .help = "entropy source",
    .create = rng_create,
    .reset = rng_reset,
    .state = rng_state,
    .destroy = rng_destroy,
};
