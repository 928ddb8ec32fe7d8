/*
 * The metrics file (api_metrics.h). A thread of its own writes the line of each minute, so that neither the guest nor the API waits for a slow file. `lock` guards the
 * file, the lines and `machine`; counters are atomic.
 */
#include "control/api_metrics.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "control/api.h"
#include "util/log.h"
#include "util/loop.h"

#define INTERVAL_S 60

static const struct {
    const char *group, *name;
} counters[] = {
    {NULL, NULL},
#define COUNTER(identifier, group, name) {group, name},
#include "control/api_counters.def"
#undef COUNTER
};

static const char *const latency_names[LATENCIES] = {"pause_vm", "resume_vm", "full_create_snapshot", "diff_create_snapshot", "load_snapshot"};

struct api_metrics {
    const struct api_options *options;
    _Atomic uint64_t counter[COUNTERS], latency_us[LATENCIES];
    uint64_t begin_us, begin_cpu_us; /* of the process, as this was made */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t thread;
    bool running, ending;
    struct machine *machine;
    int fd;
    bool emit_id;
    json_t *properties;
    json_t *last; /* the counters of the line before */
};

static uint64_t clock_us(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

struct api_metrics *api_metrics_create(const struct api_options *options)
{
    struct api_metrics *metrics = calloc(1, sizeof *metrics);
    if (!metrics)
        return NULL;
    metrics->options = options;
    metrics->fd = -1;
    metrics->last = json_object();
    metrics->begin_us = clock_us(CLOCK_MONOTONIC);
    metrics->begin_cpu_us = clock_us(CLOCK_PROCESS_CPUTIME_ID);
    pthread_mutex_init(&metrics->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&metrics->wake, &attributes);
    pthread_condattr_destroy(&attributes);
    return metrics;
}

void api_metrics_destroy(struct api_metrics *metrics)
{
    if (!metrics)
        return;
    if (metrics->fd >= 0)
        close(metrics->fd);
    json_decref(metrics->properties);
    json_decref(metrics->last);
    pthread_cond_destroy(&metrics->wake);
    pthread_mutex_destroy(&metrics->lock);
    free(metrics);
}

void api_count(struct api_metrics *metrics, enum api_counter counter)
{
    if (counter)
        atomic_fetch_add_explicit(&metrics->counter[counter], 1, memory_order_relaxed);
}

void api_metrics_answered(struct api_metrics *metrics, unsigned status, uint64_t duration_ns)
{
    api_count(metrics, COUNTER_API_CALLS);
    if (status >= 400)
        api_count(metrics, COUNTER_API_ERRORS);
    atomic_fetch_add_explicit(&metrics->counter[COUNTER_API_TIME_US], duration_ns / 1000, memory_order_relaxed);
}

void api_metrics_latency(struct api_metrics *metrics, enum api_latency latency, uint64_t duration_ns)
{
    atomic_store_explicit(&metrics->latency_us[latency], duration_ns / 1000, memory_order_relaxed);
}

/* ---- a line ---- */

static void set(json_t *line, const char *group, const char *name, uint64_t value)
{
    json_t *object = json_object_get(line, group);
    if (!object) {
        object = json_object();
        json_object_set_new(line, group, object);
    }
    json_object_set_new(object, name, json_integer((json_int_t)value));
}

static void set_counter(void *line, const char *group, const char *name, uint64_t value)
{
    set(line, group, name, value);
}

/* Each number of `now` minus that of `before`. */
static json_t *increase(const json_t *now, const json_t *before)
{
    const char *key;
    json_t *value, *result = json_object();
    json_object_foreach((json_t *)now, key, value)
    {
        const json_t *old = json_object_get(before, key);
        json_object_set_new(result, key,
                            json_is_object(value) ? increase(value, old) : json_integer(json_integer_value(value) - json_integer_value(old)));
    }
    return result;
}

static void add_states(struct api_metrics *metrics, json_t *line)
{
    const struct api_options *options = metrics->options;
    uint64_t started = options->start_time_us ? options->start_time_us : metrics->begin_us;
    uint64_t started_cpu = options->start_time_cpu_us;
    set(line, "api_server", "process_startup_time_us", metrics->begin_us - started);
    set(line, "api_server", "process_startup_time_cpu_us", metrics->begin_cpu_us - started_cpu + options->parent_cpu_time_us);
    for (unsigned i = 0; i < LATENCIES; i++)
        set(line, "latencies_us", latency_names[i], metrics->latency_us[i]);
}

/* With the lock held. */
static json_t *make_line(struct api_metrics *metrics)
{
    json_t *now = json_object();
    for (unsigned i = COUNTER_NONE + 1; i < COUNTERS; i++)
        set(now, counters[i].group, counters[i].name, metrics->counter[i]);
    if (metrics->machine)
        machine_counters(metrics->machine, set_counter, now);
    json_t *line = increase(now, metrics->last);
    json_decref(metrics->last);
    metrics->last = now;
    add_states(metrics, line);
    json_object_set_new(line, "utc_timestamp_ms", json_integer((json_int_t)(clock_us(CLOCK_REALTIME) / 1000)));
    if (metrics->emit_id)
        json_object_set_new(line, "id", json_string(metrics->options->id));
    if (json_object_size(metrics->properties))
        json_object_set(line, "properties", metrics->properties);
    return line;
}

static int write_line(struct api_metrics *metrics)
{
    json_t *line = make_line(metrics);
    char *text = json_dumps(line, JSON_COMPACT);
    json_decref(line);
    if (!text)
        return -ENOMEM;
    size_t length = strlen(text);
    text[length++] = '\n'; /* in place of the end */
    ssize_t n = write(metrics->fd, text, length);
    int r = n == (ssize_t)length ? 0 : n < 0 ? -errno : -EIO;
    free(text);
    if (r)
        api_count(metrics, r == -EAGAIN ? COUNTER_METRICS_MISSED : COUNTER_METRICS_FAILS);
    return r;
}

int api_metrics_flush(struct api_metrics *metrics, struct error *err)
{
    pthread_mutex_lock(&metrics->lock);
    int r = metrics->fd >= 0 ? write_line(metrics) : 0;
    pthread_mutex_unlock(&metrics->lock);
    return r ? error_set(err, r, "Cannot write the metrics: %s", strerror(-r)) : 0;
}

/* ---- each minute ---- */

static void *metrics_main(void *arg)
{
    struct api_metrics *metrics = arg;
    struct timespec next;
    bool inside = false;
    clock_gettime(CLOCK_MONOTONIC, &next);
    next.tv_sec += INTERVAL_S;
    pthread_mutex_lock(&metrics->lock);
    do { /* once at least: the end may come before this thread */
        if (metrics->machine && !inside)
            machine_shut_in_or_stop(metrics->machine, IN_WORKER); /* it only writes to what is open */
        inside = metrics->machine;
        bool due = metrics->ending || pthread_cond_timedwait(&metrics->wake, &metrics->lock, &next) == ETIMEDOUT || metrics->ending;
        next.tv_sec += due ? INTERVAL_S : 0;
        if (due && write_line(metrics))
            LOG_GUEST(LOG_WARNING, "a line of metrics was lost");
    } while (!metrics->ending);
    pthread_mutex_unlock(&metrics->lock);
    return NULL;
}

int api_metrics_open(struct api_metrics *metrics, const char *path, bool emit_id, const json_t *properties, struct error *err)
{
    pthread_mutex_lock(&metrics->lock);
    int r = metrics->fd >= 0 ? error_set(err, -EEXIST, "The metrics system was already initialized.") : 0;
    /* O_RDWR: a named pipe needs no reader yet. */
    int fd = r ? -1 : open(path, O_RDWR | O_CREAT | O_APPEND | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0600);
    if (r == 0 && fd < 0)
        r = error_set(err, -errno, "Cannot open the metrics file %s: %s", path, strerror(errno));
    if (r == 0) {
        metrics->fd = fd;
        metrics->emit_id = emit_id;
        metrics->properties = json_deep_copy(properties);
        r = -pthread_create(&metrics->thread, NULL, metrics_main, metrics);
        metrics->running = r == 0;
        if (r) {
            close(fd);
            metrics->fd = -1;
            error_set(err, r, "Cannot start a thread for the metrics: %s", strerror(-r));
        }
    }
    pthread_mutex_unlock(&metrics->lock);
    return r;
}

void api_metrics_attach(struct api_metrics *metrics, struct machine *machine)
{
    pthread_mutex_lock(&metrics->lock);
    metrics->machine = machine;
    pthread_cond_broadcast(&metrics->wake);
    pthread_mutex_unlock(&metrics->lock);
}

void api_metrics_end(struct api_metrics *metrics)
{
    if (!metrics || !metrics->running)
        return;
    pthread_mutex_lock(&metrics->lock);
    metrics->ending = true;
    pthread_cond_broadcast(&metrics->wake);
    pthread_mutex_unlock(&metrics->lock);
    pthread_join(metrics->thread, NULL);
    metrics->running = false;
}
