/*
 * The event loop: descriptors (epoll), timers (one timerfd under a heap) and calls posted from other threads.
 *
 * One thread runs the loop. Every callback runs on that thread with the loop's `guard` mutex held; for a machine that is
 * the device lock, so callbacks may touch any device. loop_timer_arm, loop_timer_disarm, loop_post, loop_event_raise and loop_stop may be called
 * from any thread, with or without the guard; loop_fd_* from any thread with it; the others only on the loop's thread or before it runs.
 * Time is CLOCK_MONOTONIC in nanoseconds (loop_now_ns).
 */
#ifndef DOPPEL_UTIL_LOOP_H
#define DOPPEL_UTIL_LOOP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct loop;
struct loop_fd;
struct loop_timer;

#define LOOP_READ 1u
#define LOOP_WRITE 2u
#define LOOP_HANGUP 4u /* reported, never asked for */

typedef void loop_fd_fn(void *ctx, unsigned events);
typedef void loop_timer_fn(void *ctx);
typedef void loop_post_fn(void *ctx);

/* `guard` may be NULL; it must outlive the loop. */
int loop_create(struct loop **loop, pthread_mutex_t *guard) __attribute__((warn_unused_result));
void loop_destroy(struct loop *loop); /* frees what is still registered; closes no user descriptor */

/* Runs until loop_stop. Returns 0 or -errno. */
int loop_run(struct loop *loop);
/* One round: waits at most timeout_ms (-1: no limit) and runs what is due. For tests. */
int loop_run_once(struct loop *loop, int timeout_ms);
void loop_stop(struct loop *loop);
/* On, from a callback: no other callback runs after it until it is off again (any thread), or at all if the loop is stopped before. */
void loop_hold(struct loop *loop, bool on);

int loop_fd_add(struct loop *loop, int fd, unsigned events, loop_fd_fn *fn, void *ctx, struct loop_fd **out)
    __attribute__((warn_unused_result));
int loop_fd_modify(struct loop_fd *source, unsigned events);
/* The callback does not run again after this returns, also when called from a callback. The descriptor stays open. */
void loop_fd_remove(struct loop_fd *source);

struct loop_timer *loop_timer_create(struct loop *loop, loop_timer_fn *fn, void *ctx); /* NULL: no memory */
void loop_timer_arm(struct loop_timer *timer, uint64_t deadline_ns);                    /* one shot, absolute */
void loop_timer_disarm(struct loop_timer *timer); /* may still run once if it had expired and the guard is not held */
void loop_timer_destroy(struct loop_timer *timer);

/* Runs fn(ctx) once on the loop's thread. Allocates; for hot paths keep a `struct loop_event`. */
int loop_post(struct loop *loop, loop_post_fn *fn, void *ctx);

/* A wake-up that may be raised any number of times from any thread and runs at least once afterwards; never allocates. */
struct loop_event;
struct loop_event *loop_event_create(struct loop *loop, loop_post_fn *fn, void *ctx);
void loop_event_raise(struct loop_event *event);
void loop_event_destroy(struct loop_event *event);

/* The mutex under which callbacks run, for threads beside the loop; NULL: none. */
pthread_mutex_t *loop_guard(struct loop *loop);

/*
 * Threads that back ends make. Whoever runs the loop may want each to do something before it works for a guest (enter a sandbox): such a thread calls loop_thread_enter with its
 * kind before each piece of work until that returns true. The setter: before the loop runs.
 */
void loop_set_thread_enter(struct loop *loop, bool (*enter)(void *ctx, unsigned kind), void *ctx);
bool loop_thread_enter(struct loop *loop, unsigned kind);

uint64_t loop_now_ns(void);

#endif
