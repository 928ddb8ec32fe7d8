/* The event loop: timers, descriptors, events and posts, removal from inside callbacks, the guard. Also errors and the log's limit. */
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

#include <cmocka.h>

#include "util/error.h"
#include "util/log.h"
#include "util/loop.h"

#define MS 1000000ull

struct trace {
    struct loop *loop;
    int count;
    int order[64];
    unsigned events;
    struct loop_timer *timer, *victim;
    struct loop_fd *fd, *fd_victim;
    struct loop_event *event;
    pthread_mutex_t *guard;
};

struct slot {
    struct trace *trace;
    int id;
};

static void note(void *ctx)
{
    struct slot *slot = ctx;
    slot->trace->order[slot->trace->count++] = slot->id;
}

static struct loop *loop_new(pthread_mutex_t *guard)
{
    struct loop *loop;
    assert_int_equal(loop_create(&loop, guard), 0);
    return loop;
}

static void test_timers_run_in_order(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    static const int delays_ms[] = {5, 1, 4, 2, 3, 9};
    struct slot slots[6];
    struct loop_timer *timers[6];
    uint64_t now = loop_now_ns();
    for (int i = 0; i < 6; i++) {
        slots[i] = (struct slot){&trace, delays_ms[i]};
        timers[i] = loop_timer_create(loop, note, &slots[i]);
        loop_timer_arm(timers[i], now + delays_ms[i] * MS);
    }
    loop_timer_disarm(timers[5]);
    while (trace.count < 5)
        assert_int_equal(loop_run_once(loop, 100), 0);
    assert_true(loop_now_ns() >= now + 5 * MS);
    for (int i = 0; i < 5; i++)
        assert_int_equal(trace.order[i], i + 1);
    loop_run_once(loop, 10);
    assert_int_equal(trace.count, 5);
    loop_destroy(loop);
}

static void test_timer_past_and_zero(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    struct slot slot = {&trace, 1};
    struct loop_timer *timer = loop_timer_create(loop, note, &slot);
    loop_timer_arm(timer, 0);
    loop_run_once(loop, 1000);
    assert_int_equal(trace.count, 1);
    loop_timer_arm(timer, UINT64_MAX);
    loop_run_once(loop, 1);
    loop_timer_arm(timer, loop_now_ns() + MS); /* earlier than what was set */
    while (trace.count < 2)
        loop_run_once(loop, 1000);
    loop_timer_destroy(timer);
    loop_destroy(loop);
}

static void destroy_both(void *ctx)
{
    struct trace *trace = ctx;
    trace->count++;
    loop_timer_destroy(trace->victim);
    loop_timer_destroy(trace->timer);
}

static void never(void *ctx)
{
    fail_msg("ran after it was removed");
}

static void test_timer_destroyed_in_callback(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    trace.timer = loop_timer_create(loop, destroy_both, &trace);
    trace.victim = loop_timer_create(loop, never, &trace);
    loop_timer_arm(trace.timer, 1);
    loop_timer_arm(trace.victim, 2);
    loop_run_once(loop, 100);
    loop_run_once(loop, 1);
    assert_int_equal(trace.count, 1);
    loop_destroy(loop);
}

static void rearm(void *ctx)
{
    struct trace *trace = ctx;
    trace->count++;
    loop_timer_arm(trace->timer, 1);
}

static void test_timer_cannot_starve(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    trace.timer = loop_timer_create(loop, rearm, &trace);
    loop_timer_arm(trace.timer, 1);
    for (int i = 1; i <= 5; i++) {
        loop_run_once(loop, 100);
        assert_int_equal(trace.count, i);
    }
    loop_destroy(loop);
}

static void on_fd(void *ctx, unsigned events)
{
    struct trace *trace = ctx;
    trace->count++;
    trace->events = events;
}

static void test_fd_events(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(loop_fd_add(loop, ends[0], LOOP_READ, on_fd, &trace, &trace.fd), 0);
    loop_run_once(loop, 0);
    assert_int_equal(trace.count, 0);
    assert_int_equal(write(ends[1], "x", 1), 1);
    loop_run_once(loop, 100);
    assert_int_equal(trace.count, 1);
    assert_int_equal(trace.events, LOOP_READ);
    /* Nothing wanted: silence, even after a hang-up. */
    assert_int_equal(loop_fd_modify(trace.fd, 0), 0);
    close(ends[1]);
    loop_run_once(loop, 0);
    assert_int_equal(trace.count, 1);
    assert_int_equal(loop_fd_modify(trace.fd, LOOP_READ), 0);
    loop_run_once(loop, 100);
    assert_int_equal(trace.count, 2);
    assert_int_equal(trace.events, LOOP_READ | LOOP_HANGUP);
    loop_fd_remove(trace.fd);
    loop_run_once(loop, 0);
    assert_int_equal(trace.count, 2);
    close(ends[0]);
    loop_destroy(loop);
}

static void remove_both(void *ctx, unsigned events)
{
    struct trace *trace = ctx;
    trace->count++;
    loop_fd_remove(trace->fd);
    loop_fd_remove(trace->fd_victim);
}

static void test_fd_removed_in_callback(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    int copy = dup(ends[0]);
    assert_int_equal(write(ends[1], "x", 1), 1);
    assert_int_equal(loop_fd_add(loop, ends[0], LOOP_READ, remove_both, &trace, &trace.fd), 0);
    assert_int_equal(loop_fd_add(loop, copy, LOOP_READ, remove_both, &trace, &trace.fd_victim), 0);
    loop_run_once(loop, 100);
    loop_run_once(loop, 0);
    assert_int_equal(trace.count, 1); /* whichever came first removed the other */
    close(copy);
    close(ends[0]);
    close(ends[1]);
    loop_destroy(loop);
}

static void test_regular_file_is_always_ready(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    int fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    assert_int_equal(loop_fd_add(loop, fd, LOOP_READ, on_fd, &trace, &trace.fd), 0);
    loop_run_once(loop, -1);
    assert_int_equal(trace.count, 1);
    loop_fd_modify(trace.fd, 0);
    loop_run_once(loop, 1);
    assert_int_equal(trace.count, 1);
    loop_fd_remove(trace.fd);
    close(fd);
    loop_destroy(loop);
}

static void test_bad_descriptor(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct loop_fd *source;
    assert_true(loop_fd_add(loop, -1, LOOP_READ, on_fd, NULL, &source) < 0);
    assert_null(source);
    loop_destroy(loop);
}

static void event_again(void *ctx)
{
    struct trace *trace = ctx;
    if (++trace->count == 1)
        loop_event_raise(trace->event);
    else
        loop_event_destroy(trace->event);
}

static void test_event_merges_and_reraises(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    trace.event = loop_event_create(loop, event_again, &trace);
    loop_event_raise(trace.event);
    loop_event_raise(trace.event);
    loop_run_once(loop, 100);
    assert_int_equal(trace.count, 1);
    loop_run_once(loop, 100);
    assert_int_equal(trace.count, 2);
    struct loop_event *unused = loop_event_create(loop, never, NULL);
    loop_event_raise(unused);
    loop_event_destroy(unused);
    loop_run_once(loop, 1);
    loop_destroy(loop);
}

/* Threads post and arm while the loop runs; the guard keeps callbacks and holders apart. */
struct shared {
    struct loop *loop;
    pthread_mutex_t guard;
    int guarded;  /* under the guard, not atomic on purpose */
    int finished; /* the same */
    struct loop_timer *timer;
};

static void shared_post(void *ctx)
{
    struct shared *shared = ctx;
    shared->guarded++;
}

static void shared_finish(void *ctx)
{
    struct shared *shared = ctx;
    if (++shared->finished == 3)
        loop_stop(shared->loop);
}

static void *poster(void *ctx)
{
    struct shared *shared = ctx;
    for (int i = 0; i < 500; i++) {
        assert_int_equal(loop_post(shared->loop, shared_post, shared), 0);
        pthread_mutex_lock(&shared->guard);
        shared->guarded++;
        pthread_mutex_unlock(&shared->guard);
        loop_timer_arm(shared->timer, loop_now_ns() + (i % 3) * 1000);
    }
    assert_int_equal(loop_post(shared->loop, shared_finish, shared), 0);
    return NULL;
}

static void nothing(void *ctx)
{
}

static void test_threads_and_guard(void **state)
{
    struct shared shared = {.guard = PTHREAD_MUTEX_INITIALIZER};
    shared.loop = loop_new(&shared.guard);
    shared.timer = loop_timer_create(shared.loop, nothing, NULL);
    pthread_t threads[3];
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, poster, &shared);
    assert_int_equal(loop_run(shared.loop), 0);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(shared.guarded, 3000);
    loop_destroy(shared.loop);
}

static void *arm_later(void *ctx)
{
    struct trace *trace = ctx;
    usleep(2000);
    loop_timer_arm(trace->timer, loop_now_ns() + MS);
    return NULL;
}

static void stop(void *ctx)
{
    struct trace *trace = ctx;
    trace->count++;
    loop_stop(trace->loop);
}

static void test_arm_from_thread_ends_wait(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct trace trace = {.loop = loop};
    trace.timer = loop_timer_create(loop, stop, &trace);
    pthread_t thread;
    pthread_create(&thread, NULL, arm_later, &trace);
    assert_int_equal(loop_run(loop), 0); /* hangs if the wait misses the new timer */
    pthread_join(thread, NULL);
    assert_int_equal(trace.count, 1);
    loop_stop(loop); /* before the run: it returns at once */
    assert_int_equal(loop_run(loop), 0);
    loop_destroy(loop);
}

/* ---- holding ---- */

static void hold(void *ctx)
{
    struct trace *trace = ctx;
    trace->count++;
    loop_hold(trace->loop, true);
}

static void count_one(void *ctx)
{
    struct trace *trace = ctx;
    trace->count += 10;
}

static void *run_loop(void *ctx)
{
    assert_int_equal(loop_run(ctx), 0);
    return NULL;
}

/* Nothing that is due after the hold runs before its end, nor at all if the loop ends first. The guard is free meanwhile. */
static void test_hold(void **state)
{
    for (int ends = 0; ends < 2; ends++) {
        pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
        struct loop *loop = loop_new(&guard);
        struct trace trace = {.loop = loop};
        struct loop_timer *timer = loop_timer_create(loop, count_one, &trace);
        pthread_t thread;
        int count = 0;
        assert_int_equal(loop_post(loop, hold, &trace), 0);
        assert_int_equal(loop_post(loop, count_one, &trace), 0);
        pthread_create(&thread, NULL, run_loop, loop);
        while (!count) {
            pthread_mutex_lock(&guard);
            count = trace.count;
            pthread_mutex_unlock(&guard);
        }
        loop_timer_arm(timer, 1);
        assert_int_equal(count, 1);
        if (!ends) {
            assert_int_equal(loop_post(loop, stop, &trace), 0);
            loop_hold(loop, false);
        } else {
            loop_stop(loop);
        }
        pthread_join(thread, NULL);
        assert_true(ends ? trace.count == 1 : trace.count == 12 || trace.count == 22);
        loop_destroy(loop);
    }
}

static void test_destroy_with_leftovers(void **state)
{
    struct loop *loop = loop_new(NULL);
    struct loop_fd *source;
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(loop_fd_add(loop, ends[0], LOOP_READ, on_fd, NULL, &source), 0);
    for (int i = 0; i < 40; i++)
        loop_timer_arm(loop_timer_create(loop, never, NULL), UINT64_MAX - i);
    loop_event_raise(loop_event_create(loop, never, NULL));
    assert_int_equal(loop_post(loop, never, NULL), 0);
    loop_destroy(loop);
    close(ends[0]);
    close(ends[1]);
    loop_destroy(NULL);
}

static void test_error(void **state)
{
    struct error err = {0};
    assert_int_equal(error_set(&err, -5, "disk %d is missing", 3), -5);
    assert_int_equal(error_prefix(&err, "machine '%s'", "a"), -5);
    assert_string_equal(err.text, "machine 'a': disk 3 is missing");
    char longer[2000];
    for (size_t i = 0; i < sizeof(longer); i++)
        longer[i] = 'x';
    longer[sizeof(longer) - 1] = '\0';
    error_set(&err, -1, "%s", longer);
    error_prefix(&err, "%s", longer);
    assert_int_equal(err.text[sizeof(err.text) - 1], '\0');
    assert_int_equal(error_set(NULL, -7, "unheard"), -7);
}

static void test_log_limit(void **state)
{
    struct log_limit limit = {0};
    int passed = 0;
    for (int i = 0; i < 100; i++)
        passed += log_limit_pass(&limit);
    assert_int_equal(passed, 10);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_timers_run_in_order),
        cmocka_unit_test(test_timer_past_and_zero),
        cmocka_unit_test(test_timer_destroyed_in_callback),
        cmocka_unit_test(test_timer_cannot_starve),
        cmocka_unit_test(test_fd_events),
        cmocka_unit_test(test_fd_removed_in_callback),
        cmocka_unit_test(test_regular_file_is_always_ready),
        cmocka_unit_test(test_bad_descriptor),
        cmocka_unit_test(test_event_merges_and_reraises),
        cmocka_unit_test(test_threads_and_guard),
        cmocka_unit_test(test_arm_from_thread_ends_wait),
        cmocka_unit_test(test_hold),
        cmocka_unit_test(test_destroy_with_leftovers),
        cmocka_unit_test(test_error),
        cmocka_unit_test(test_log_limit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
