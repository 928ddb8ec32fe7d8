/*
 * Time, random bytes and the event loop, as the lockstep test has them: in place of state/inputs.c and util/loop.c.
 *
 * Time stands still until somebody sets it. The loop has no thread and waits for nothing: virtual_run runs what is due at the present time, in an order that follows from what happened
 * before. Descriptors are never ready: nothing comes from outside.
 * Threading: one thread in each process.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/queue.h>

#include "lockstep.h"
#include "state/inputs.h"

#define TSC_KHZ 2000000ull
#define WALL_START_NS 1700000000000000000ull
#define ROUNDS_MAX 1000 /* of a callback that raises itself again */

static struct {
    uint64_t now_ns, random;
    void (*tsc_read)(void *ctx);
    void *ctx;
} clock_state = {.now_ns = 1000000000, .random = 1};

/* ---- inputs ---- */

uint64_t virtual_now(void)
{
    return clock_state.now_ns;
}

void virtual_set(uint64_t now_ns)
{
    clock_state.now_ns = now_ns;
}

void virtual_watch_tsc(void (*read)(void *ctx), void *ctx)
{
    clock_state.tsc_read = read;
    clock_state.ctx = ctx;
}

uint64_t inputs_now_ns(void)
{
    return clock_state.now_ns;
}

uint64_t inputs_wall_ns(void)
{
    return WALL_START_NS + clock_state.now_ns;
}

uint64_t inputs_tsc(void)
{
    if (clock_state.tsc_read)
        clock_state.tsc_read(clock_state.ctx);
    return clock_state.now_ns * (TSC_KHZ / 1000) / 1000;
}

bool inputs_tsc_is_host(void)
{
    return false;
}

bool inputs_random_is_host(void)
{
    return false;
}

uint64_t inputs_tsc_khz(void)
{
    return TSC_KHZ;
}

uint64_t inputs_tsc_khz_roughly(void)
{
    return inputs_tsc_khz();
}

int inputs_random(void *data, size_t size_bytes)
{
    uint8_t *to = data;
    for (size_t n = 0; n < size_bytes; n++) {
        clock_state.random = clock_state.random * 6364136223846793005ull + 1442695040888963407ull;
        to[n] = (uint8_t)(clock_state.random >> 56);
    }
    return 0;
}

void loop_set_thread_enter(struct loop *loop, bool (*enter)(void *ctx, unsigned kind), void *ctx)
{
}

bool loop_thread_enter(struct loop *loop, unsigned kind)
{
    return true;
}

uint64_t loop_now_ns(void)
{
    return clock_state.now_ns;
}

/* ---- the loop ---- */

struct loop_fd {
    struct loop *loop;
};

struct loop_timer {
    struct loop *loop;
    bool armed;
    uint64_t deadline_ns;
    loop_timer_fn *fn;
    void *ctx;
    TAILQ_ENTRY(loop_timer) link;
};

struct loop_event {
    struct loop *loop;
    loop_post_fn *fn;
    void *ctx;
    bool once, queued;
    TAILQ_ENTRY(loop_event) link;
};

struct loop {
    pthread_mutex_t *guard;
    TAILQ_HEAD(, loop_timer) timers;
    TAILQ_HEAD(, loop_event) queue;
};

int loop_create(struct loop **out, pthread_mutex_t *guard)
{
    struct loop *loop = calloc(1, sizeof *loop);
    *out = loop;
    if (!loop)
        return -ENOMEM;
    loop->guard = guard;
    TAILQ_INIT(&loop->timers);
    TAILQ_INIT(&loop->queue);
    return 0;
}

pthread_mutex_t *loop_guard(struct loop *loop)
{
    return loop->guard;
}

void loop_destroy(struct loop *loop) /* the process ends soon: timers and events that are left are nobody's */
{
    free(loop);
}

static struct loop_timer *first_timer(struct loop *loop)
{
    struct loop_timer *timer, *first = NULL;
    TAILQ_FOREACH(timer, &loop->timers, link)
        if (timer->armed && (!first || timer->deadline_ns < first->deadline_ns))
            first = timer;
    return first;
}

bool virtual_deadline(struct loop *loop, uint64_t *ns)
{
    const struct loop_timer *first = first_timer(loop);
    if (first)
        *ns = first->deadline_ns;
    return first != NULL;
}

static void call(struct loop *loop, void (*fn)(void *ctx), void *ctx)
{
    pthread_mutex_lock(loop->guard);
    fn(ctx);
    pthread_mutex_unlock(loop->guard);
}

static bool run_one(struct loop *loop)
{
    struct loop_event *event = TAILQ_FIRST(&loop->queue);
    struct loop_timer *timer = first_timer(loop);
    if (event) {
        loop_post_fn *fn = event->fn;
        void *ctx = event->ctx;
        TAILQ_REMOVE(&loop->queue, event, link);
        event->queued = false;
        if (event->once)
            free(event);
        call(loop, fn, ctx);
    } else if (timer && timer->deadline_ns <= clock_state.now_ns) {
        timer->armed = false;
        call(loop, timer->fn, timer->ctx);
    } else {
        return false;
    }
    return true;
}

void virtual_run(struct loop *loop)
{
    for (unsigned n = 0; n < ROUNDS_MAX && run_one(loop); n++)
        continue;
}

int loop_run(struct loop *loop)
{
    return -ENOSYS; /* nobody starts the machine's own threads */
}

int loop_run_once(struct loop *loop, int timeout_ms)
{
    return run_one(loop);
}

/* Of migrations, which there are none of. */
void loop_hold(struct loop *loop, bool on)
{
}

void loop_stop(struct loop *loop)
{
}

int loop_fd_add(struct loop *loop, int fd, unsigned events, loop_fd_fn *fn, void *ctx, struct loop_fd **out)
{
    *out = calloc(1, sizeof **out);
    return *out ? 0 : -ENOMEM;
}

int loop_fd_modify(struct loop_fd *source, unsigned events)
{
    return 0;
}

void loop_fd_remove(struct loop_fd *source)
{
    free(source);
}

struct loop_timer *loop_timer_create(struct loop *loop, loop_timer_fn *fn, void *ctx)
{
    struct loop_timer *timer = calloc(1, sizeof *timer);
    if (!timer)
        return NULL;
    *timer = (struct loop_timer){.loop = loop, .fn = fn, .ctx = ctx};
    TAILQ_INSERT_TAIL(&loop->timers, timer, link);
    return timer;
}

void loop_timer_arm(struct loop_timer *timer, uint64_t deadline_ns)
{
    timer->armed = true;
    timer->deadline_ns = deadline_ns;
}

void loop_timer_disarm(struct loop_timer *timer)
{
    timer->armed = false;
}

void loop_timer_destroy(struct loop_timer *timer)
{
    if (!timer)
        return;
    TAILQ_REMOVE(&timer->loop->timers, timer, link);
    free(timer);
}

struct loop_event *loop_event_create(struct loop *loop, loop_post_fn *fn, void *ctx)
{
    struct loop_event *event = calloc(1, sizeof *event);
    if (event)
        *event = (struct loop_event){.loop = loop, .fn = fn, .ctx = ctx};
    return event;
}

void loop_event_raise(struct loop_event *event)
{
    if (event->queued)
        return;
    event->queued = true;
    TAILQ_INSERT_TAIL(&event->loop->queue, event, link);
}

int loop_post(struct loop *loop, loop_post_fn *fn, void *ctx)
{
    struct loop_event *event = loop_event_create(loop, fn, ctx);
    if (!event)
        return -ENOMEM;
    event->once = true;
    loop_event_raise(event);
    return 0;
}

void loop_event_destroy(struct loop_event *event)
{
    if (event && event->queued)
        TAILQ_REMOVE(&event->loop->queue, event, link);
    free(event);
}
