/*
 * virtio-fs: a shared directory (virtio 1.2, section 5.11) over the file server of fs/fs.h.
 *
 * A few threads take requests from the queues, serve them and push the answers themselves, so that storage that is slow holds up nobody but those who
 * asked. They hold the device lock (the loop's guard) around the rings only, not while they serve. A loop without a guard belongs to one thread; then requests are served
 * on it.
 * Threading: with the device lock held; `kicks`, `sleeping` and `stopping` have a lock of their own, inside the device lock.
 */
#include "device/virtio_fs.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "device/virtio.h"
#include "util/log.h"

#define QUEUE_SIZE 1024u /* the guest's kernel makes requests no longer than a ring */
#define WORKERS 4u
#define LOCK_TRY_NS 10000000u
_Static_assert(VIRTQUEUE_CHAIN_MAX <= FS_VECTORS_MAX, "a chain is a message");

/* 5.11.2: the queue for FORGET and its like, then those for requests. */
#define QUEUE_HIPRIO 0u
#define QUEUE_REQUEST 1u

/* 5.11.4 */
struct fs_config_space {
    char tag[VIRTIO_FS_TAG_BYTES];
    uint32_t num_request_queues;
} __attribute__((packed));

struct device {
    struct virtio virtio;
    struct fs *fs;
    struct fs_config_space space;
    pthread_mutex_t *guard; /* the device lock; NULL: no workers */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    uint64_t kicks;
    unsigned sleeping;
    bool stopping;
    pthread_t worker[WORKERS];
    unsigned worker_count;
};

/* ---- requests ---- */

static struct virtqueue_chain *take_chain(struct device *share)
{
    struct virtqueue_chain *chain = NULL;

    if (!virtio_ready(&share->virtio))
        return NULL;
    for (unsigned i = 0; i < share->virtio.queue_count && !chain; i++)
        chain = virtqueue_pop(virtio_queue(&share->virtio, i));
    return chain;
}

static bool pending(struct device *share)
{
    bool any = false;

    if (virtio_ready(&share->virtio)) {
        for (unsigned i = 0; i < share->virtio.queue_count; i++)
            any |= virtqueue_pending(virtio_queue(&share->virtio, i));
    }
    return any;
}

static uint64_t serve(struct device *share, const struct virtqueue_chain *chain)
{
    const struct fs_message message = {
        .in = chain->in,
        .out = chain->out,
        .in_count = chain->in_count,
        .out_count = chain->out_count,
        .in_bytes = chain->in_bytes,
        .out_bytes = chain->out_bytes,
    };

    return fs_serve(share->fs, &message);
}

/* ---- workers ---- */

static void wake_worker(struct device *share)
{
    pthread_mutex_lock(&share->lock);
    share->kicks++;
    if (share->sleeping)
        pthread_cond_signal(&share->wake);
    pthread_mutex_unlock(&share->lock);
}

/* Until there was a kick after number *seen. False: the device goes. */
static bool wait_for_kick(struct device *share, uint64_t *seen)
{
    bool stopping;

    pthread_mutex_lock(&share->lock);
    while (*seen == share->kicks && !share->stopping) {
        share->sleeping++;
        pthread_cond_wait(&share->wake, &share->lock);
        share->sleeping--;
    }
    *seen = share->kicks;
    stopping = share->stopping;
    pthread_mutex_unlock(&share->lock);
    return !stopping;
}

/* Takes the device lock; false when the device goes, whose owner may hold the lock while it waits for us. */
static bool guard_take(struct device *share)
{
    for (;;) {
        struct timespec until;
        bool stopping;

        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += LOCK_TRY_NS;
        if (until.tv_nsec >= 1000000000) {
            until.tv_nsec -= 1000000000;
            until.tv_sec++;
        }
        if (pthread_mutex_trylock(share->guard) == 0 || pthread_mutex_clocklock(share->guard, CLOCK_MONOTONIC, &until) == 0)
            return true;
        pthread_mutex_lock(&share->lock);
        stopping = share->stopping;
        pthread_mutex_unlock(&share->lock);
        if (stopping)
            return false;
    }
}

/* Serves until the queues are empty. A chain that is out keeps the device alive, so the lock is there to be had for its push. */
static void work(struct device *share)
{
    struct virtqueue_chain *chain;

    if (!guard_take(share))
        return;
    while ((chain = take_chain(share))) {
        uint64_t used_bytes;

        if (pending(share))
            wake_worker(share);
        pthread_mutex_unlock(share->guard);
        used_bytes = serve(share, chain);
        pthread_mutex_lock(share->guard);
        virtqueue_push(chain, used_bytes, true);
    }
    pthread_mutex_unlock(share->guard);
}

static void *worker_main(void *ctx)
{
    struct device *share = ctx;
    uint64_t seen = 0;

    fs_thread_prepare(share->fs);
    while (wait_for_kick(share, &seen))
        work(share);
    return NULL;
}

static int start_workers(struct device *share)
{
    sigset_t all, before;
    int ret = 0;

    /* Signals are for the threads that expect them. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (ret == 0 && share->worker_count < WORKERS) {
        ret = -pthread_create(&share->worker[share->worker_count], NULL, worker_main, share);
        if (ret == 0)
            share->worker_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ret;
}

static void stop_workers(struct device *share)
{
    pthread_mutex_lock(&share->lock);
    share->stopping = true;
    pthread_cond_broadcast(&share->wake);
    pthread_mutex_unlock(&share->lock);
    for (unsigned i = 0; i < share->worker_count; i++)
        pthread_join(share->worker[i], NULL);
    share->worker_count = 0;
}

/* ---- the driver ---- */

static void fs_notify(void *ctx, unsigned index)
{
    struct device *share = ctx;
    struct virtqueue_chain *chain;

    if (share->guard) {
        wake_worker(share);
        return;
    }
    for (unsigned i = 0; i < QUEUE_SIZE && (chain = virtqueue_pop(virtio_queue(&share->virtio, index))); i++)
        virtqueue_push(chain, serve(share, chain), true);
    if (virtqueue_pending(virtio_queue(&share->virtio, index)))
        virtio_wake_queue(&share->virtio, index);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    const struct device *share = ctx;

    memcpy(data, (const uint8_t *)&share->space + offset, size_bytes);
}

static void driver_reset(void *ctx)
{
    fs_reset(((struct device *)ctx)->fs);
}

static const struct virtio_device_ops fs_ops = {
    .name = "virtio-fs",
    .device_id = 26,
    .class_code = 0x018000,
    .config_bytes = sizeof(struct fs_config_space),
    .config_read = config_read,
    .queue_notify = fs_notify,
    .reset = driver_reset,
};

/* ---- the class ---- */

static void share_free(struct device *share)
{
    stop_workers(share);
    virtio_fini(&share->virtio);
    fs_destroy(share->fs);
    pthread_cond_destroy(&share->wake);
    pthread_mutex_destroy(&share->lock);
    free(share);
}

static int share_create(struct device **out, const struct device_host *host, const void *config, struct error *err)
{
    const struct virtio_fs_config *fs_config = config;
    unsigned queues = fs_config->queues ? fs_config->queues : 1;
    struct virtio_config virtio_config = {.queue_size = QUEUE_SIZE, .slot = fs_config->slot};
    struct device *share = calloc(1, sizeof(*share));
    int ret;

    *out = NULL;
    if (!share)
        return error_set(err, -ENOMEM, "virtio-fs: no memory");
    queues = queues < VIRTIO_FS_QUEUES_MAX ? queues : VIRTIO_FS_QUEUES_MAX;
    virtio_config.queue_count = QUEUE_REQUEST + queues;
    memcpy(share->space.tag, fs_config->tag, strnlen(fs_config->tag, VIRTIO_FS_TAG_BYTES));
    share->space.num_request_queues = queues;
    share->guard = loop_guard(host->loop);
    pthread_mutex_init(&share->lock, NULL);
    pthread_cond_init(&share->wake, NULL);
    ret = fs_create(&share->fs, &fs_config->fs, err);
    if (ret == 0)
        ret = virtio_init(&share->virtio, host, &fs_ops, share, &virtio_config, err);
    if (ret == 0 && share->guard && (ret = start_workers(share)) < 0)
        error_set(err, ret, "virtio-fs: cannot start threads: %s", strerror(-ret));
    if (ret < 0) {
        share_free(share);
        return ret;
    }
    *out = share;
    return 0;
}

static void share_reset(struct device *share)
{
    virtio_reset(&share->virtio);
}

static int share_state(struct device *share, struct state_io *io)
{
    char tag[VIRTIO_FS_TAG_BYTES];

    state_begin(io, "virtio-fs", 1);
    memcpy(tag, share->space.tag, sizeof(tag));
    state_bytes(io, tag, sizeof(tag));
    if (memcmp(tag, share->space.tag, sizeof(tag)))
        state_fail(io, "the share has another tag than when this was saved");
    /* The transport's first: it begins with a reset, which forgets what the server knows. */
    virtio_state(&share->virtio, io);
    fs_state(share->fs, io);
    return state_end(io);
}

/* Nothing arrives while the processors stand still, so an empty ring stays empty. */
static bool share_quiesce(struct device *share)
{
    return !virtio_in_use(&share->virtio) && !pending(share);
}

const struct device_class virtio_fs_class = {
    .name = "virtio-fs",
    .help = "shared directory",
    .create = share_create,
    .reset = share_reset,
    .state = share_state,
    .quiesce = share_quiesce,
    .destroy = share_free,
};
