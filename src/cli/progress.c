/* Slow requests (progress.h): the request on a thread of its own, what is shown on the caller's. */
#include "cli/progress.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "cli/report.h"
#include "control/client.h"

#define BETWEEN_NS 200000000l

struct request {
    const char *vm, *path;
    const json_t *body;
    int timeout_ms;
    json_t **answer;
    struct error *err;
    int result;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool done; /* lock */
};

static void *request_main(void *arg)
{
    struct request *request = arg;
    request->result = client_request(request->vm, "POST", request->path, request->body, request->timeout_ms, request->answer, request->err);
    pthread_mutex_lock(&request->lock);
    request->done = true;
    pthread_cond_signal(&request->ended);
    pthread_mutex_unlock(&request->lock);
    return NULL;
}

static void show_until_done(struct request *request, void (*show)(const void *ctx), const void *ctx)
{
    pthread_mutex_lock(&request->lock);
    while (!request->done) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += BETWEEN_NS;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (pthread_cond_timedwait(&request->ended, &request->lock, &until) != ETIMEDOUT)
            continue;
        pthread_mutex_unlock(&request->lock);
        show(ctx);
        pthread_mutex_lock(&request->lock);
    }
    pthread_mutex_unlock(&request->lock);
    fprintf(stderr, "\r\033[K");
}

int request_with_progress(const char *vm, const char *path, const json_t *body, int timeout_ms, void (*show)(const void *ctx), const void *ctx, json_t **answer, struct error *err)
{
    struct request request = {.vm = vm, .path = path, .body = body, .timeout_ms = timeout_ms, .answer = answer, .err = err, .lock = PTHREAD_MUTEX_INITIALIZER};
    pthread_condattr_t monotonic;
    pthread_t thread;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&request.ended, &monotonic);
    if (!isatty(STDERR_FILENO) || report_is_json() || pthread_create(&thread, NULL, request_main, &request)) {
        request_main(&request);
    } else {
        show_until_done(&request, show, ctx);
        pthread_join(thread, NULL);
    }
    pthread_cond_destroy(&request.ended);
    pthread_condattr_destroy(&monotonic);
    return request.result;
}
