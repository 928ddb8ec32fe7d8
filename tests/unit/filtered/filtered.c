#include "filtered.h"

#include <linux/filter.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "sandbox/sandbox_priv.h"

/* A thread of a kind and what it is to do. Guarded by `lock`, but for `process` and `thread`, which are the test's thread's. */
struct work {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    pid_t process; /* that has the thread: tests fork */
    pthread_t thread;
    unsigned kind;
    void (*fn)(void *ctx);
    void *ctx;
};

static struct work works[SANDBOX_KINDS];
static __thread bool inside;

static void broken(const char *what)
{
    fprintf(stderr, "filtered: %s\n", what);
    _Exit(2);
}

void filtered_make(struct sock_fprog *program, unsigned kind)
{
    const char *needs = getenv("FILTER_NEEDS");
    if (filter_catch() || filter_make(program, kind, needs ? (unsigned)strtoul(needs, NULL, 0) : 0, getenv("FILTER_OMIT"), false))
        broken("no filter");
}

void filtered_load(struct sock_fprog *program, unsigned kind)
{
    filter_note_kind(kind);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || filter_load(program, false) < 0)
        broken("the filter cannot be loaded");
}

void filtered_enter(unsigned kind)
{
    struct sock_fprog program = {0};
    filtered_make(&program, kind);
    filtered_load(&program, kind);
    filter_free(&program);
}

static void *thread_main(void *ctx)
{
    struct work *work = ctx;
    filtered_enter(work->kind);
    inside = true;
    pthread_mutex_lock(&work->lock);
    for (;;) {
        while (!work->fn)
            pthread_cond_wait(&work->changed, &work->lock);
        pthread_mutex_unlock(&work->lock);
        work->fn(work->ctx);
        pthread_mutex_lock(&work->lock);
        work->fn = NULL;
        pthread_cond_broadcast(&work->changed);
    }
    return NULL;
}

void filtered_call(unsigned kind, void (*fn)(void *ctx), void *ctx)
{
    struct work *work = &works[__builtin_ctz(kind)];
    if (filter_catch()) /* cmocka takes SIGSYS for each test */
        broken("no handler");
    if (!inside && getpid() != gettid()) { /* a thread of the test, which plays one of the machine's */
        filtered_enter(kind);
        inside = true;
    }
    if (inside) { /* or a callback's */
        fn(ctx);
        return;
    }
    if (work->process != getpid()) {
        pthread_mutex_init(&work->lock, NULL);
        pthread_cond_init(&work->changed, NULL);
    }
    pthread_mutex_lock(&work->lock);
    work->kind = kind;
    work->fn = fn;
    work->ctx = ctx;
    if (work->process != getpid() && pthread_create(&work->thread, NULL, thread_main, work))
        broken("no thread");
    work->process = getpid();
    pthread_cond_broadcast(&work->changed);
    while (work->fn)
        pthread_cond_wait(&work->changed, &work->lock);
    pthread_mutex_unlock(&work->lock);
}
