/*
 * The event loop. See loop.h for the contract.
 *
 * Timers sit in a binary heap; one timerfd is set to its root before each wait. Calls from other threads queue under `lock` and wake the
 * wait by an eventfd, only while the loop really waits. Each callback takes the guard on its own, so that others get between them.
 * What is due in a round is bounded by what was there when the round began: a callback that keeps re-arming itself cannot starve the rest.
 *
 * Locks: guard first, then `lock`; no callback runs with `lock` held. Removed descriptors stay in the list, marked dead, until the
 * round's end, because the events already fetched point at them. A timer is taken off the heap with the guard held, so that a
 * holder of the guard who disarms it is sure.
 */
#include "util/loop.h"
#include "util/sandbox_rules.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

SANDBOX_ALLOW(IN_LOOP | IN_MAIN, epoll_wait); /* the end drains the loop on the thread that ends the machine */
SANDBOX_ALLOW(IN_LOOP | IN_VCPU | IN_MAIN, epoll_ctl);
SANDBOX_ALLOW(IN_LOOP | IN_MAIN | IN_VCPU, timerfd_settime);
SANDBOX_ALLOW(IN_LOOP | IN_MAIN, read);
SANDBOX_ALLOW(IN_MAIN, close);

#define LOOP_BATCH 32 /* descriptor events fetched at once */
#define TIMER_IDLE SIZE_MAX
#define NS_PER_SECOND 1000000000ull

struct loop_fd {
    struct loop *loop;
    int fd;
    unsigned events;
    bool in_epoll;
    bool always_ready; /* a regular file: epoll refuses it, poll(2) calls it ready */
    bool dead;
    loop_fd_fn *fn;
    void *ctx;
    LIST_ENTRY(loop_fd) link; /* lock */
};

struct loop_timer {
    struct loop *loop;
    uint64_t deadline_ns; /* lock */
    size_t index;         /* in the heap or TIMER_IDLE; lock */
    loop_timer_fn *fn;
    void *ctx;
    LIST_ENTRY(loop_timer) link; /* lock */
};

/* A queued call: a post, freed when it ran, or an event. */
struct loop_event {
    struct loop *loop;
    loop_post_fn *fn;
    void *ctx;
    bool once;
    bool queued;                  /* lock */
    TAILQ_ENTRY(loop_event) queue; /* lock */
    LIST_ENTRY(loop_event) link;   /* lock; events only */
};

struct loop {
    int epoll_fd, timer_fd, wake_fd;
    pthread_mutex_t *guard;
    atomic_bool stop;
    bool held; /* lock; set on the loop's thread */
    pthread_cond_t released;
    _Atomic unsigned always_ready; /* descriptors of that kind that want events */

    bool (*thread_enter)(void *ctx, unsigned kind); /* lock */
    void *thread_enter_ctx;                         /* lock */

    pthread_mutex_t lock;
    bool waiting; /* the thread is in, or about to enter, epoll_wait; lock */
    bool woken;   /* wake_fd was written since; lock */
    uint64_t timerfd_ns; /* what timer_fd is set to; UINT64_MAX: off; lock */
    struct loop_timer **heap; /* lock */
    size_t heap_count, heap_capacity, timer_count;
    size_t queued_count;
    bool any_dead;
    LIST_HEAD(, loop_fd) fds;
    LIST_HEAD(, loop_timer) timers;
    LIST_HEAD(, loop_event) events;
    TAILQ_HEAD(, loop_event) queue;
};

void loop_set_thread_enter(struct loop *loop, bool (*enter)(void *ctx, unsigned kind), void *ctx)
{
    pthread_mutex_lock(&loop->lock);
    loop->thread_enter = enter;
    loop->thread_enter_ctx = ctx;
    pthread_mutex_unlock(&loop->lock);
}

bool loop_thread_enter(struct loop *loop, unsigned kind)
{
    pthread_mutex_lock(&loop->lock);
    bool (*enter)(void *ctx, unsigned kind) = loop->thread_enter;
    void *ctx = loop->thread_enter_ctx;
    pthread_mutex_unlock(&loop->lock);
    return enter && enter(ctx, kind);
}

uint64_t loop_now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * NS_PER_SECOND + (uint64_t)ts.tv_nsec;
}

pthread_mutex_t *loop_guard(struct loop *loop)
{
    return loop->guard;
}

static void guard_take(struct loop *loop)
{
    if (loop->guard)
        pthread_mutex_lock(loop->guard);
}

static void guard_release(struct loop *loop)
{
    if (loop->guard)
        pthread_mutex_unlock(loop->guard);
}

/* For a callback, which may have to wait for the end of a hold. False: the loop ends before; the guard is not taken then. */
static bool guard_take_for_callback(struct loop *loop)
{
    for (;;) {
        guard_take(loop);
        pthread_mutex_lock(&loop->lock);
        bool held = loop->held;
        if (held)
            guard_release(loop);
        while (loop->held && !atomic_load(&loop->stop))
            pthread_cond_wait(&loop->released, &loop->lock);
        bool over = loop->held;
        pthread_mutex_unlock(&loop->lock);
        if (!held || over)
            return !held;
    }
}

/* Makes the wait end. Called with `lock` held. */
static void wake_locked(struct loop *loop)
{
    if (!loop->waiting || loop->woken)
        return;
    loop->woken = true;
    uint64_t one = 1;
    ssize_t ignored = write(loop->wake_fd, &one, sizeof(one)); /* full means it is awake already */
    (void)ignored;
}

/* ---- Creation ---- */

static int epoll_register(struct loop *loop, int fd, void *tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = tag};
    return epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int loop_create(struct loop **out, pthread_mutex_t *guard)
{
    *out = NULL;
    struct loop *loop = calloc(1, sizeof(*loop));
    if (!loop)
        return -ENOMEM;
    loop->guard = guard;
    loop->timer_fd = loop->wake_fd = -1;
    loop->timerfd_ns = UINT64_MAX;
    LIST_INIT(&loop->fds);
    LIST_INIT(&loop->timers);
    LIST_INIT(&loop->events);
    TAILQ_INIT(&loop->queue);
    pthread_mutex_init(&loop->lock, NULL);
    pthread_cond_init(&loop->released, NULL);

    int rc = 0;
    loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (loop->epoll_fd >= 0)
        loop->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (loop->timer_fd >= 0)
        loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (loop->wake_fd < 0)
        rc = -errno;
    if (rc == 0)
        rc = epoll_register(loop, loop->timer_fd, &loop->timer_fd);
    if (rc == 0)
        rc = epoll_register(loop, loop->wake_fd, &loop->wake_fd);
    if (rc < 0) {
        loop_destroy(loop);
        return rc;
    }
    *out = loop;
    return 0;
}

void loop_destroy(struct loop *loop)
{
    if (!loop)
        return;
    struct loop_fd *source;
    while ((source = LIST_FIRST(&loop->fds))) {
        LIST_REMOVE(source, link);
        free(source);
    }
    struct loop_timer *timer;
    while ((timer = LIST_FIRST(&loop->timers))) {
        LIST_REMOVE(timer, link);
        free(timer);
    }
    struct loop_event *event;
    while ((event = TAILQ_FIRST(&loop->queue))) {
        TAILQ_REMOVE(&loop->queue, event, queue);
        if (event->once)
            free(event);
    }
    while ((event = LIST_FIRST(&loop->events))) {
        LIST_REMOVE(event, link);
        free(event);
    }
    if (loop->wake_fd >= 0)
        close(loop->wake_fd);
    if (loop->timer_fd >= 0)
        close(loop->timer_fd);
    if (loop->epoll_fd >= 0)
        close(loop->epoll_fd);
    pthread_cond_destroy(&loop->released);
    pthread_mutex_destroy(&loop->lock);
    free(loop->heap);
    free(loop);
}

/* ---- Descriptors ---- */

static uint32_t epoll_mask(unsigned events)
{
    return ((events & LOOP_READ) ? (uint32_t)EPOLLIN : 0) | ((events & LOOP_WRITE) ? (uint32_t)EPOLLOUT : 0);
}

/*
 * Puts source->events into effect. A source that wants nothing leaves the epoll set: a hang-up cannot be masked there and
 * would end every wait.
 */
static int source_apply(struct loop_fd *source, unsigned events)
{
    struct loop *loop = source->loop;
    if (source->always_ready) {
        if (!source->events != !events)
            atomic_fetch_add(&loop->always_ready, events ? 1u : ~0u);
        source->events = events;
        return 0;
    }
    struct epoll_event event = {.events = epoll_mask(events), .data.ptr = source};
    int op = !events ? EPOLL_CTL_DEL : source->in_epoll ? EPOLL_CTL_MOD : EPOLL_CTL_ADD;
    if (events || source->in_epoll) {
        if (epoll_ctl(loop->epoll_fd, op, source->fd, &event) < 0) {
            /* The owner may have closed it already: then it has left by itself. */
            if (op != EPOLL_CTL_DEL)
                return -errno;
        }
        source->in_epoll = events != 0;
    }
    source->events = events;
    return 0;
}

int loop_fd_add(struct loop *loop, int fd, unsigned events, loop_fd_fn *fn, void *ctx, struct loop_fd **out)
{
    *out = NULL;
    struct loop_fd *source = calloc(1, sizeof(*source));
    if (!source)
        return -ENOMEM;
    source->loop = loop;
    source->fd = fd;
    source->fn = fn;
    source->ctx = ctx;

    /* Even when nothing is wanted yet, find out whether epoll takes it. */
    struct epoll_event probe = {.events = epoll_mask(events), .data.ptr = source};
    if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &probe) == 0) {
        source->in_epoll = true;
    } else if (errno == EPERM) {
        source->always_ready = true;
    } else {
        int rc = -errno;
        free(source);
        return rc;
    }
    int rc = source_apply(source, events & (LOOP_READ | LOOP_WRITE));
    if (rc < 0) {
        free(source);
        return rc;
    }
    pthread_mutex_lock(&loop->lock);
    LIST_INSERT_HEAD(&loop->fds, source, link);
    if (source->always_ready)
        wake_locked(loop);
    pthread_mutex_unlock(&loop->lock);
    *out = source;
    return 0;
}

int loop_fd_modify(struct loop_fd *source, unsigned events)
{
    events &= LOOP_READ | LOOP_WRITE;
    if (source->events == events)
        return 0;
    int rc = source_apply(source, events);
    if (source->always_ready && events) {
        pthread_mutex_lock(&source->loop->lock);
        wake_locked(source->loop);
        pthread_mutex_unlock(&source->loop->lock);
    }
    return rc;
}

void loop_fd_remove(struct loop_fd *source)
{
    if (!source)
        return;
    struct loop *loop = source->loop;
    (void)source_apply(source, 0);
    pthread_mutex_lock(&loop->lock);
    source->dead = true;
    loop->any_dead = true;
    pthread_mutex_unlock(&loop->lock);
}

static void source_run(struct loop_fd *source, unsigned events)
{
    struct loop *loop = source->loop;
    if (!guard_take_for_callback(loop))
        return;
    if (!source->dead && (events & (source->events | LOOP_HANGUP)))
        source->fn(source->ctx, events & (source->events | LOOP_HANGUP));
    guard_release(loop);
}

static void run_always_ready(struct loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    struct loop_fd *source = LIST_FIRST(&loop->fds);
    pthread_mutex_unlock(&loop->lock);
    /* New ones come in front, nothing leaves the list before bury_dead. */
    for (; source; source = LIST_NEXT(source, link)) {
        if (source->always_ready && source->events)
            source_run(source, source->events);
    }
}

static void bury_dead(struct loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    if (loop->any_dead) {
        struct loop_fd *source = LIST_FIRST(&loop->fds);
        while (source) {
            struct loop_fd *next = LIST_NEXT(source, link);
            if (source->dead) {
                LIST_REMOVE(source, link);
                free(source);
            }
            source = next;
        }
        loop->any_dead = false;
    }
    pthread_mutex_unlock(&loop->lock);
}

/* ---- Timers: a binary heap, earliest at the root; `lock` held ---- */

static void heap_put(struct loop *loop, size_t index, struct loop_timer *timer)
{
    loop->heap[index] = timer;
    timer->index = index;
}

static void heap_up(struct loop *loop, size_t index, struct loop_timer *timer)
{
    while (index > 0) {
        size_t parent = (index - 1) / 2;
        if (loop->heap[parent]->deadline_ns <= timer->deadline_ns)
            break;
        heap_put(loop, index, loop->heap[parent]);
        index = parent;
    }
    heap_put(loop, index, timer);
}

static void heap_down(struct loop *loop, size_t index, struct loop_timer *timer)
{
    for (;;) {
        size_t child = index * 2 + 1;
        if (child >= loop->heap_count)
            break;
        if (child + 1 < loop->heap_count && loop->heap[child + 1]->deadline_ns < loop->heap[child]->deadline_ns)
            child++;
        if (timer->deadline_ns <= loop->heap[child]->deadline_ns)
            break;
        heap_put(loop, index, loop->heap[child]);
        index = child;
    }
    heap_put(loop, index, timer);
}

static void heap_remove(struct loop *loop, struct loop_timer *timer)
{
    size_t index = timer->index;
    if (index == TIMER_IDLE)
        return;
    timer->index = TIMER_IDLE;
    struct loop_timer *last = loop->heap[--loop->heap_count];
    if (last == timer)
        return;
    if (index > 0 && last->deadline_ns < loop->heap[(index - 1) / 2]->deadline_ns)
        heap_up(loop, index, last);
    else
        heap_down(loop, index, last);
}

/* Sets timer_fd so that it fires no later than the root. An earlier setting may stay: the wait then ends once for nothing. */
static void timerfd_follow(struct loop *loop)
{
    uint64_t want = loop->heap_count > 0 ? loop->heap[0]->deadline_ns : UINT64_MAX;
    if (want >= loop->timerfd_ns)
        return;
    loop->timerfd_ns = want;
    struct itimerspec spec = {
        .it_value = {.tv_sec = (time_t)(want / NS_PER_SECOND), .tv_nsec = (long)(want % NS_PER_SECOND)},
    };
    if (want == 0)
        spec.it_value.tv_nsec = 1; /* zero would turn it off */
    timerfd_settime(loop->timer_fd, TFD_TIMER_ABSTIME, &spec, NULL);
}

struct loop_timer *loop_timer_create(struct loop *loop, loop_timer_fn *fn, void *ctx)
{
    struct loop_timer *timer = calloc(1, sizeof(*timer));
    if (!timer)
        return NULL;
    timer->loop = loop;
    timer->fn = fn;
    timer->ctx = ctx;
    timer->index = TIMER_IDLE;

    pthread_mutex_lock(&loop->lock);
    /* Room for every timer is made here, so that arming cannot fail. */
    if (loop->timer_count == loop->heap_capacity) {
        size_t capacity = loop->heap_capacity ? loop->heap_capacity * 2 : 16;
        struct loop_timer **heap = realloc(loop->heap, capacity * sizeof(*heap));
        if (!heap) {
            pthread_mutex_unlock(&loop->lock);
            free(timer);
            return NULL;
        }
        loop->heap = heap;
        loop->heap_capacity = capacity;
    }
    loop->timer_count++;
    LIST_INSERT_HEAD(&loop->timers, timer, link);
    pthread_mutex_unlock(&loop->lock);
    return timer;
}

void loop_timer_arm(struct loop_timer *timer, uint64_t deadline_ns)
{
    struct loop *loop = timer->loop;
    pthread_mutex_lock(&loop->lock);
    heap_remove(loop, timer);
    timer->deadline_ns = deadline_ns;
    heap_up(loop, loop->heap_count++, timer);
    if (loop->waiting)
        timerfd_follow(loop);
    pthread_mutex_unlock(&loop->lock);
}

void loop_timer_disarm(struct loop_timer *timer)
{
    pthread_mutex_lock(&timer->loop->lock);
    heap_remove(timer->loop, timer);
    pthread_mutex_unlock(&timer->loop->lock);
}

void loop_timer_destroy(struct loop_timer *timer)
{
    if (!timer)
        return;
    struct loop *loop = timer->loop;
    pthread_mutex_lock(&loop->lock);
    heap_remove(loop, timer);
    LIST_REMOVE(timer, link);
    loop->timer_count--;
    pthread_mutex_unlock(&loop->lock);
    free(timer);
}

static void run_timers(struct loop *loop)
{
    uint64_t now = loop_now_ns();
    pthread_mutex_lock(&loop->lock);
    size_t budget = loop->heap_count;
    bool due = budget > 0 && loop->heap[0]->deadline_ns <= now;
    pthread_mutex_unlock(&loop->lock);

    while (due && budget-- > 0 && guard_take_for_callback(loop)) {
        pthread_mutex_lock(&loop->lock);
        struct loop_timer *timer = loop->heap_count > 0 ? loop->heap[0] : NULL;
        if (timer && timer->deadline_ns <= now)
            heap_remove(loop, timer);
        else
            timer = NULL;
        pthread_mutex_unlock(&loop->lock);
        if (timer)
            timer->fn(timer->ctx);
        guard_release(loop);
        due = timer != NULL;
    }
}

/* ---- Calls from other threads ---- */

static void enqueue_locked(struct loop *loop, struct loop_event *event)
{
    event->queued = true;
    TAILQ_INSERT_TAIL(&loop->queue, event, queue);
    loop->queued_count++;
    wake_locked(loop);
}

static void dequeue_locked(struct loop *loop, struct loop_event *event)
{
    if (!event->queued)
        return;
    event->queued = false;
    TAILQ_REMOVE(&loop->queue, event, queue);
    loop->queued_count--;
}

int loop_post(struct loop *loop, loop_post_fn *fn, void *ctx)
{
    struct loop_event *event = calloc(1, sizeof(*event));
    if (!event)
        return -ENOMEM;
    event->loop = loop;
    event->fn = fn;
    event->ctx = ctx;
    event->once = true;
    pthread_mutex_lock(&loop->lock);
    enqueue_locked(loop, event);
    pthread_mutex_unlock(&loop->lock);
    return 0;
}

struct loop_event *loop_event_create(struct loop *loop, loop_post_fn *fn, void *ctx)
{
    struct loop_event *event = calloc(1, sizeof(*event));
    if (!event)
        return NULL;
    event->loop = loop;
    event->fn = fn;
    event->ctx = ctx;
    pthread_mutex_lock(&loop->lock);
    LIST_INSERT_HEAD(&loop->events, event, link);
    pthread_mutex_unlock(&loop->lock);
    return event;
}

void loop_event_raise(struct loop_event *event)
{
    struct loop *loop = event->loop;
    pthread_mutex_lock(&loop->lock);
    if (!event->queued)
        enqueue_locked(loop, event);
    pthread_mutex_unlock(&loop->lock);
}

void loop_event_destroy(struct loop_event *event)
{
    if (!event)
        return;
    struct loop *loop = event->loop;
    pthread_mutex_lock(&loop->lock);
    dequeue_locked(loop, event);
    LIST_REMOVE(event, link);
    pthread_mutex_unlock(&loop->lock);
    free(event);
}

static void run_queue(struct loop *loop)
{
    pthread_mutex_lock(&loop->lock);
    size_t budget = loop->queued_count;
    pthread_mutex_unlock(&loop->lock);

    while (budget-- > 0 && guard_take_for_callback(loop)) {
        pthread_mutex_lock(&loop->lock);
        struct loop_event *event = TAILQ_FIRST(&loop->queue);
        if (event)
            dequeue_locked(loop, event); /* before it runs: a raise during the call queues it again */
        pthread_mutex_unlock(&loop->lock);
        if (event) {
            /* fn may destroy the event. */
            loop_post_fn *fn = event->fn;
            void *ctx = event->ctx;
            if (event->once)
                free(event);
            fn(ctx);
        }
        guard_release(loop);
        if (!event)
            break;
    }
}

/* ---- Running ---- */

/* Returns the timeout to wait with. */
static int wait_prepare(struct loop *loop, int timeout_ms)
{
    pthread_mutex_lock(&loop->lock);
    timerfd_follow(loop);
    if (loop->queued_count > 0 || atomic_load(&loop->always_ready) > 0 || atomic_load(&loop->stop))
        timeout_ms = 0;
    loop->waiting = true;
    loop->woken = false;
    pthread_mutex_unlock(&loop->lock);
    return timeout_ms;
}

static void drain(int fd)
{
    uint64_t value;
    ssize_t ignored = read(fd, &value, sizeof(value));
    (void)ignored;
}

static void wait_finish(struct loop *loop, const struct epoll_event *events, int count)
{
    pthread_mutex_lock(&loop->lock);
    loop->waiting = false;
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr == &loop->timer_fd) {
            drain(loop->timer_fd);
            /* Unless it was set anew since: reading an unexpired timer does nothing, and setting it again is harmless. */
            loop->timerfd_ns = UINT64_MAX;
        } else if (events[i].data.ptr == &loop->wake_fd) {
            drain(loop->wake_fd);
        }
    }
    pthread_mutex_unlock(&loop->lock);
}

static bool is_own(const struct loop *loop, const void *tag)
{
    return tag == &loop->timer_fd || tag == &loop->wake_fd;
}

int loop_run_once(struct loop *loop, int timeout_ms)
{
    struct epoll_event events[LOOP_BATCH];
    timeout_ms = wait_prepare(loop, timeout_ms);
    int count = epoll_wait(loop->epoll_fd, events, LOOP_BATCH, timeout_ms);
    int rc = count < 0 && errno != EINTR ? -errno : 0;
    if (count < 0)
        count = 0;
    wait_finish(loop, events, count);
    if (rc < 0)
        return rc;

    run_timers(loop);
    run_queue(loop);
    for (int i = 0; i < count; i++) {
        if (is_own(loop, events[i].data.ptr))
            continue;
        uint32_t got = events[i].events;
        source_run(events[i].data.ptr, ((got & EPOLLIN) ? LOOP_READ : 0) | ((got & EPOLLOUT) ? LOOP_WRITE : 0) |
                                           ((got & (EPOLLHUP | EPOLLERR)) ? LOOP_HANGUP : 0));
    }
    if (atomic_load(&loop->always_ready) > 0)
        run_always_ready(loop);
    bury_dead(loop);
    return 0;
}

int loop_run(struct loop *loop)
{
    int rc = 0;
    /* A stop that came before the run counts too: whoever asked may have been faster than this thread. */
    while (rc == 0 && !atomic_exchange(&loop->stop, false))
        rc = loop_run_once(loop, -1);
    return rc;
}

void loop_stop(struct loop *loop)
{
    atomic_store(&loop->stop, true);
    pthread_mutex_lock(&loop->lock);
    pthread_cond_broadcast(&loop->released);
    wake_locked(loop);
    pthread_mutex_unlock(&loop->lock);
}

void loop_hold(struct loop *loop, bool on)
{
    pthread_mutex_lock(&loop->lock);
    loop->held = on;
    pthread_cond_broadcast(&loop->released);
    pthread_mutex_unlock(&loop->lock);
}
