/*
 * Disk I/O by a few threads with ordinary system calls, for hosts where io_uring is missing or forbidden.
 *
 * Threading: `lock` (a leaf: nothing is called with it held) guards `todo`, `finished` and `stopping`. Workers touch a task only between
 * taking it from `todo` and putting it on `finished`; callbacks run on the loop's thread.
 */
#include "block/block_priv.h"
#include "util/sandbox_rules.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

/* API threads make the workers of disks that are plugged, and what those may not, these may not either. */
SANDBOX_ALLOW(IN_WORKER | IN_API, preadv);
SANDBOX_ALLOW(IN_WORKER | IN_API, pwritev);
SANDBOX_ALLOW(IN_WORKER | IN_API, fdatasync);
SANDBOX_ALLOW(IN_WORKER | IN_API, fallocate);
SANDBOX_ALLOW_IF(IN_API, clone, ARG_HAS(0, CLONE_THREAD)); /* of which clone3 can say nothing: see filter_make */
SANDBOX_ALLOW(IN_API, set_robust_list);
SANDBOX_ALLOW(IN_API, rseq);

#define WORKERS 4u

struct threads {
    struct block_io io; /* first */
    struct loop *loop;
    struct loop_event *finished_event;
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct block_task_list todo, finished;
    bool stopping;
    pthread_t worker[WORKERS];
    unsigned worker_count;
};

static int64_t perform(const struct block_task *task)
{
    ssize_t ret = -1;

    switch (task->kind) {
    case TASK_READ:
        ret = preadv(task->fd, task->iov, (int)task->iov_count, (off_t)task->offset_bytes);
        break;
    case TASK_WRITE:
        ret = pwritev(task->fd, task->iov, (int)task->iov_count, (off_t)task->offset_bytes);
        break;
    case TASK_SYNC:
        ret = fdatasync(task->fd);
        break;
    case TASK_FALLOCATE:
        ret = fallocate(task->fd, task->mode, (off_t)task->offset_bytes, (off_t)task->length_bytes);
        break;
    }
    return ret < 0 ? -errno : ret;
}

static void *worker_main(void *ctx)
{
    struct threads *threads = ctx;
    struct block_task *task;
    bool entered = false;

    pthread_mutex_lock(&threads->lock);
    for (;;) {
        while (!(task = TAILQ_FIRST(&threads->todo)) && !threads->stopping)
            pthread_cond_wait(&threads->work, &threads->lock);
        if (!task)
            break;
        TAILQ_REMOVE(&threads->todo, task, link);
        pthread_mutex_unlock(&threads->lock);
        entered = entered || loop_thread_enter(threads->loop, IN_WORKER);
        task->result = perform(task);
        pthread_mutex_lock(&threads->lock);
        TAILQ_INSERT_TAIL(&threads->finished, task, link);
        loop_event_raise(threads->finished_event);
    }
    pthread_mutex_unlock(&threads->lock);
    return NULL;
}

static void finish(void *ctx)
{
    struct threads *threads = ctx;
    struct block_task_list list = TAILQ_HEAD_INITIALIZER(list);
    struct block_task *task;

    pthread_mutex_lock(&threads->lock);
    TAILQ_CONCAT(&list, &threads->finished, link);
    pthread_mutex_unlock(&threads->lock);
    while ((task = TAILQ_FIRST(&list))) {
        TAILQ_REMOVE(&list, task, link);
        task->done(task, task->result);
    }
}

static void threads_submit(struct block_io *io, struct block_task *task)
{
    struct threads *threads = (struct threads *)io;

    pthread_mutex_lock(&threads->lock);
    TAILQ_INSERT_TAIL(&threads->todo, task, link);
    pthread_cond_signal(&threads->work);
    pthread_mutex_unlock(&threads->lock);
}

static void threads_destroy(struct block_io *io)
{
    struct threads *threads = (struct threads *)io;

    pthread_mutex_lock(&threads->lock);
    threads->stopping = true;
    pthread_cond_broadcast(&threads->work);
    pthread_mutex_unlock(&threads->lock);
    for (unsigned i = 0; i < threads->worker_count; i++)
        pthread_join(threads->worker[i], NULL);
    if (threads->finished_event)
        loop_event_destroy(threads->finished_event);
    pthread_cond_destroy(&threads->work);
    pthread_mutex_destroy(&threads->lock);
    free(threads);
}

static int threads_create(struct block_io **io, struct loop *loop)
{
    struct threads *threads = calloc(1, sizeof(*threads));
    sigset_t all, before;
    int ret = 0;

    if (!threads)
        return -ENOMEM;
    threads->io.ops = &block_io_threads_ops;
    threads->loop = loop;
    TAILQ_INIT(&threads->todo);
    TAILQ_INIT(&threads->finished);
    pthread_mutex_init(&threads->lock, NULL);
    pthread_cond_init(&threads->work, NULL);
    threads->finished_event = loop_event_create(loop, finish, threads);
    if (!threads->finished_event)
        ret = -ENOMEM;
    /* Signals are for the threads that expect them. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (ret == 0 && threads->worker_count < WORKERS) {
        ret = -pthread_create(&threads->worker[threads->worker_count], NULL, worker_main, threads);
        if (ret == 0)
            threads->worker_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ret < 0) {
        threads_destroy(&threads->io);
        return ret;
    }
    *io = &threads->io;
    return 0;
}

const struct block_io_ops block_io_threads_ops = {
    .name = "threads",
    .create = threads_create,
    .submit = threads_submit,
    .destroy = threads_destroy,
};
