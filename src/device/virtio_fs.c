/*
 * virtio-fs: a shared directory (virtio 1.2, section 5.11) over the file server of fs/fs.h.
 *
 * Requests that are quick are served in the doorbell: to the guest, the answer is there when its write to the register ends. All others, and those of storage that turned out
 * to be slow, are served by a few workers, so that the machine does not stand still. A vCPU that may not touch files (sandbox) waits in the doorbell for a thread that may, the
 * companion, which is kept on the same processor: changing threads there costs a twentieth of what waking another processor does, and works on busy hosts as well. There are a few,
 * so that those of vCPUs on several processors stay where they are.
 * Threading: with the device lock held; the list of chains for workers has a lock of its own, inside the device lock. Workers take the device lock to push, the companion when
 * the vCPU has left. A loop without a guard belongs to one thread, and everything is served on it.
 */
#include "device/virtio_fs.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "device/virtio.h"
#include "util/sandbox_rules.h"

#define QUEUE_SIZE 1024u /* the guest's kernel makes requests no longer than a ring */
#define WORKERS 4u
#define COMPANIONS_MAX 4u
#define HERE_MAX 16u /* requests served on the thread that makes them, of one notification */
#define SLOW_NS 1000000u
#define SLOW_FACTOR 10u
#define WATCHED_NS 1000000000u
#define TICK_NS 5000000u
#define FORGETS 64u
#define WAIT_NS 4000000u /* a vCPU waits no longer for the companion; a busy host's time slice */

SANDBOX_ALLOW_IF(IN_SHARE, sched_setaffinity, ARG_IS(0, 0)); /* its own */
SANDBOX_ALLOW_IF(IN_SHARE, getrusage, ARG_IS(0, RUSAGE_THREAD));

_Static_assert(VIRTQUEUE_CHAIN_MAX <= FS_VECTORS_MAX, "a chain is a message");

/* 5.11.2: the queue for FORGET and its like, then those for requests. */
#define QUEUE_HIPRIO 0u
#define QUEUE_REQUEST 1u

/* 5.11.4 */
struct fs_config_space {
    char tag[VIRTIO_FS_TAG_BYTES];
    uint32_t num_request_queues;
} __attribute__((packed));

enum errand_state { ERRAND_NONE, ERRAND_WAITED, ERRAND_DONE, ERRAND_LEFT };

/* A chain that a vCPU waits for. WAITED becomes DONE by the companion or LEFT by the vCPU; who comes second pushes it. */
struct errand {
    struct device *share;
    _Atomic int state;
    struct virtqueue_chain *chain;
    int processor; /* of the vCPU, and where the companion is */
    bool moved;    /* it is not yet */
    uint64_t started_ns;
    uint64_t used_bytes;
    bool slow;
    sem_t asked, answered;
};

struct device {
    struct virtio virtio;
    struct fs *fs;
    struct fs_config_space space;
    pthread_mutex_t *guard; /* the device lock; NULL: no workers */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct virtqueue_chain *first, **last; /* waiting for a worker */
    struct errand errand[COMPANIONS_MAX];
    unsigned companions;
    atomic_bool stopping;
    bool at_once;
    uint64_t slow_until_ns; /* requests go to the workers */
    _Atomic uint64_t watched_until_ns; /* whose time it is that requests take is looked at */
    struct loop_timer *tick; /* while requests come: looks after what the driver did not notify of, see serve_forgets */
    bool ticking;
    pthread_t worker[COMPANIONS_MAX + WORKERS]; /* companions first */
    unsigned worker_count;
};

/* ---- requests ---- */

static struct fs_message message_of(const struct virtqueue_chain *chain)
{
    return (struct fs_message){
        .in = chain->in,
        .out = chain->out,
        .in_count = chain->in_count,
        .out_count = chain->out_count,
        .in_bytes = chain->in_bytes,
        .out_bytes = chain->out_bytes,
    };
}

/* How often this thread has waited for something. */
static long waits(void)
{
    struct rusage usage;

    return getrusage(RUSAGE_THREAD, &usage) < 0 ? 0 : usage.ru_nvcsw;
}

/* Serves on this thread. True: it was the storage that took long. That is asked only while something has taken long not long ago, as the two calls would be a part of what quick requests cost. */
static bool serve_timed(struct device *share, const struct virtqueue_chain *chain, uint64_t *used_bytes)
{
    struct fs_message message = message_of(chain);
    uint64_t started_ns = loop_now_ns(), ended_ns;
    bool watched = started_ns < atomic_load(&share->watched_until_ns);
    long waited = watched ? waits() : 0;

    *used_bytes = fs_serve(share->fs, &message);
    ended_ns = loop_now_ns();
    if (ended_ns - started_ns <= SLOW_NS)
        return false;
    atomic_store(&share->watched_until_ns, ended_ns + WATCHED_NS);
    return watched && waits() != waited;
}

/* Storage that makes the machine stand still is left to the workers for a while, so that this is a small part of the time only. With the device lock, like all that serve. */
static void slow_since(struct device *share, uint64_t started_ns)
{
    share->slow_until_ns = started_ns + SLOW_FACTOR * (loop_now_ns() - started_ns);
}

static void serve_here(struct device *share, struct virtqueue_chain *chain)
{
    uint64_t started_ns = loop_now_ns(), used_bytes;
    bool slow = serve_timed(share, chain, &used_bytes);

    virtqueue_push(chain, used_bytes, true);
    if (slow)
        slow_since(share, started_ns);
}

/* ---- the companion ---- */

static void errand_push(struct errand *errand)
{
    virtqueue_push(errand->chain, errand->used_bytes, true);
    atomic_store(&errand->state, ERRAND_NONE);
}

/* Of those that have time the one on this processor, otherwise the one used least lately. */
static struct errand *find_companion(struct device *share, int processor)
{
    struct errand *found = NULL;

    for (unsigned i = 0; i < share->companions; i++) {
        struct errand *errand = &share->errand[i];

        if (atomic_load(&errand->state) != ERRAND_NONE)
            continue;
        if (errand->processor == processor)
            return errand;
        if (!found || errand->started_ns < found->started_ns)
            found = errand;
    }
    return found;
}

/* A companion serves the chain while this vCPU waits for it. False: none has time. */
static bool run_errand(struct device *share, struct virtqueue_chain *chain)
{
    int processor = sched_getcpu(), ret;
    struct errand *errand = find_companion(share, processor);
    uint64_t started_ns = loop_now_ns(), until_ns = started_ns + WAIT_NS;
    struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};

    if (!errand)
        return false;
    errand->chain = chain;
    errand->moved = errand->processor != processor;
    errand->processor = processor;
    errand->started_ns = started_ns;
    atomic_store(&errand->state, ERRAND_WAITED);
    sem_post(&errand->asked);
    do
        ret = sem_clockwait(&errand->answered, CLOCK_MONOTONIC, &until);
    while (ret < 0 && errno == EINTR);
    if (ret < 0 && atomic_exchange(&errand->state, ERRAND_LEFT) == ERRAND_DONE) {
        while (sem_wait(&errand->answered) < 0)
            continue;
        ret = 0;
    }
    if (ret < 0 || errand->slow)
        slow_since(share, started_ns);
    if (ret == 0)
        errand_push(errand);
    return true;
}

/* Where this thread runs from now on. Where that is refused it goes on elsewhere, slower. */
static void move_to(int processor)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET((unsigned)processor, &set);
    (void)sched_setaffinity(0, sizeof(set), &set);
}

/* One for each of the host's processors, up to a few; none where vCPUs serve themselves. */
static void companions_init(struct device *share)
{
    cpu_set_t set;
    unsigned processors = sched_getaffinity(0, sizeof(set), &set) < 0 ? 1 : (unsigned)CPU_COUNT(&set);

    if (!share->at_once)
        share->companions = processors < COMPANIONS_MAX ? processors : COMPANIONS_MAX;
    for (unsigned i = 0; i < share->companions; i++) {
        struct errand *errand = &share->errand[i];

        errand->share = share;
        errand->processor = -1;
        sem_init(&errand->asked, 0, 0);
        sem_init(&errand->answered, 0, 0);
    }
}

static void *companion_main(void *ctx)
{
    struct errand *errand = ctx;
    struct device *share = errand->share;
    bool entered = false;

    fs_thread_prepare(share->fs);
    for (;;) {
        while (sem_wait(&errand->asked) < 0)
            continue;
        if (atomic_load(&share->stopping))
            return NULL;
        entered = entered || loop_thread_enter(share->virtio.host->loop, IN_SHARE);
        if (errand->moved && errand->processor >= 0 && errand->processor < CPU_SETSIZE)
            move_to(errand->processor);
        errand->slow = serve_timed(share, errand->chain, &errand->used_bytes);
        if (atomic_exchange(&errand->state, ERRAND_DONE) == ERRAND_LEFT) {
            pthread_mutex_lock(share->guard);
            errand_push(errand);
            pthread_mutex_unlock(share->guard);
        } else {
            sem_post(&errand->answered);
        }
    }
}

/* ---- workers ---- */

static void hand_over(struct device *share, struct virtqueue_chain *chain)
{
    chain->next = NULL;
    pthread_mutex_lock(&share->lock);
    *share->last = chain;
    share->last = &chain->next;
    pthread_cond_signal(&share->wake);
    pthread_mutex_unlock(&share->lock);
}

static struct virtqueue_chain *take_first(struct device *share)
{
    struct virtqueue_chain *chain = share->first;

    if (chain) {
        share->first = chain->next;
        if (!share->first)
            share->last = &share->first;
    }
    return chain;
}

/* The first chain, or NULL at the end. With the lock held. */
static struct virtqueue_chain *wait_for_chain(struct device *share)
{
    struct virtqueue_chain *chain;

    while (!(chain = take_first(share)) && !atomic_load(&share->stopping))
        pthread_cond_wait(&share->wake, &share->lock);
    return chain;
}

/* A chain that is out keeps the device alive, so the device lock is there to be had for its push. */
static void *worker_main(void *ctx)
{
    struct device *share = ctx;
    struct virtqueue_chain *chain;
    bool entered = false;

    fs_thread_prepare(share->fs);
    pthread_mutex_lock(&share->lock);
    while ((chain = wait_for_chain(share))) {
        struct fs_message message;
        uint64_t used_bytes;

        pthread_mutex_unlock(&share->lock);
        message = message_of(chain);
        entered = entered || loop_thread_enter(share->virtio.host->loop, IN_SHARE);
        used_bytes = fs_serve(share->fs, &message);
        pthread_mutex_lock(share->guard);
        virtqueue_push(chain, used_bytes, true);
        pthread_mutex_unlock(share->guard);
        pthread_mutex_lock(&share->lock);
    }
    pthread_mutex_unlock(&share->lock);
    return NULL;
}

static int start_workers(struct device *share)
{
    sigset_t all, before;
    int ret = 0;

    /* Signals are for the threads that expect them. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (ret == 0 && share->worker_count < share->companions + WORKERS) {
        bool companion = share->worker_count < share->companions;

        ret = -pthread_create(&share->worker[share->worker_count], NULL, companion ? companion_main : worker_main,
                              companion ? (void *)&share->errand[share->worker_count] : share);
        if (ret == 0)
            share->worker_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ret;
}

static void stop_workers(struct device *share)
{
    pthread_mutex_lock(&share->lock);
    atomic_store(&share->stopping, true);
    pthread_cond_broadcast(&share->wake);
    pthread_mutex_unlock(&share->lock);
    for (unsigned i = 0; i < share->companions; i++)
        sem_post(&share->errand[i].asked);
    for (unsigned i = 0; i < share->worker_count; i++)
        pthread_join(share->worker[i], NULL);
    share->worker_count = 0;
}

/* ---- the driver ---- */

/*
 * Nobody waits for these. So the driver need not notify of each, nor is it told of the end of each at once: they are looked after when a request comes, when there are many, and
 * by a clock that runs while requests come.
 */
static void serve_forgets(struct device *share)
{
    struct virtqueue *queue = virtio_queue(&share->virtio, QUEUE_HIPRIO);
    bool quick = loop_now_ns() >= share->slow_until_ns;
    struct virtqueue_chain *chain;

    for (unsigned i = 1; i <= QUEUE_SIZE && (chain = virtqueue_pop(queue)); i++) {
        struct fs_message message = message_of(chain);

        if (!share->guard)
            serve_here(share, chain);
        else if (quick && fs_is_quick(share->fs, &message) && fs_serve_forget(share->fs, &message))
            virtqueue_push(chain, 0, i % FORGETS == 0);
        else
            hand_over(share, chain);
    }
    if (!share->guard)
        return;
    virtqueue_notify_after(queue, FORGETS);
    if (!share->ticking)
        loop_timer_arm(share->tick, loop_now_ns() + TICK_NS);
    share->ticking = true;
}

/* What was put off is told, and the driver notifies again. */
static void end_ticking(struct device *share)
{
    struct virtqueue *queue = virtio_queue(&share->virtio, QUEUE_HIPRIO);

    loop_timer_disarm(share->tick);
    share->ticking = false;
    virtqueue_flush(queue);
    if (virtqueue_set_notification(queue, true))
        virtio_wake_queue(&share->virtio, QUEUE_HIPRIO);
}

static void tick(void *ctx)
{
    struct device *share = ctx;

    if (!share->ticking || !virtio_ready(&share->virtio))
        return;
    serve_forgets(share);
    end_ticking(share);
}

static void serve_queue(struct device *share, unsigned index)
{
    struct virtqueue *queue = virtio_queue(&share->virtio, index);
    struct virtqueue_chain *chain;

    for (unsigned i = 0; index != QUEUE_HIPRIO && i < QUEUE_SIZE && (chain = virtqueue_pop(queue)); i++) {
        struct fs_message message = message_of(chain);
        bool quick = i < HERE_MAX && loop_now_ns() >= share->slow_until_ns && fs_is_quick(share->fs, &message);

        if (!share->guard || (quick && share->at_once))
            serve_here(share, chain);
        else if (!quick || !run_errand(share, chain))
            hand_over(share, chain);
    }
    serve_forgets(share);
    if (virtqueue_pending(queue))
        virtio_wake_queue(&share->virtio, index);
}

/* On the thread of the vCPU that made the requests: it is awake, and is what waits for them. */
static void fs_kick(void *ctx, unsigned index)
{
    struct device *share = ctx;

    if (share->virtio.queue[index].enabled && virtio_ready(&share->virtio))
        serve_queue(share, index);
}

static void fs_notify(void *ctx, unsigned index)
{
    serve_queue(ctx, index);
}

static void config_read(void *ctx, unsigned offset, void *data, unsigned size_bytes)
{
    const struct device *share = ctx;

    memcpy(data, (const uint8_t *)&share->space + offset, size_bytes);
}

static void driver_reset(void *ctx)
{
    struct device *share = ctx;
    struct virtqueue_chain *chain;

    fs_reset(share->fs);
    share->ticking = false;
    do {
        pthread_mutex_lock(&share->lock);
        chain = take_first(share);
        pthread_mutex_unlock(&share->lock);
        if (chain)
            virtqueue_push(chain, 0, false);
    } while (chain);
}

static const struct virtio_device_ops fs_ops = {
    .name = "virtio-fs",
    .device_id = 26,
    .class_code = 0x018000,
    .config_bytes = sizeof(struct fs_config_space),
    .config_read = config_read,
    .queue_notify = fs_notify,
    .queue_kick = fs_kick,
    .reset = driver_reset,
};

/* ---- the class ---- */

static void share_free(struct device *share)
{
    stop_workers(share);
    if (share->tick)
        loop_timer_destroy(share->tick);
    virtio_fini(&share->virtio);
    fs_destroy(share->fs);
    for (unsigned i = 0; i < share->companions; i++) {
        sem_destroy(&share->errand[i].asked);
        sem_destroy(&share->errand[i].answered);
    }
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
    share->at_once = fs_config->at_once;
    share->last = &share->first;
    share->watched_until_ns = loop_now_ns() + WATCHED_NS; /* its first accesses may well wait */
    companions_init(share);
    pthread_mutex_init(&share->lock, NULL);
    pthread_cond_init(&share->wake, NULL);
    share->tick = loop_timer_create(host->loop, tick, share);
    if (!share->tick) {
        share_free(share);
        return error_set(err, -ENOMEM, "virtio-fs: no memory");
    }
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

static bool share_quiesce(struct device *share)
{
    if (share->ticking)
        end_ticking(share);
    return !virtio_in_use(&share->virtio);
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
