/*
 * Looking after one machine (vm_control.h): events, the state file, beginning and end.
 *
 * Locks: machine_lock (the machine stays), then the machine's own, then event_lock. The machine tells of events with its locks held; they are noted under event_lock and
 * written on the control's thread. Files are touched on that thread only, so that the others need not be able to.
 */
#include "control/vm_control.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "control/vm_control_priv.h"
#include "util/log.h"

#define LOG_BYTES_MAX (4u << 20)

static uint64_t wall_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

/* ---- events ---- */

static void write_time(uint64_t time_ms, char text[32])
{
    struct tm tm;
    char seconds[24];
    gmtime_r(&(time_t){(time_t)(time_ms / 1000)}, &tm);
    strftime(seconds, sizeof seconds, "%Y-%m-%dT%H:%M:%S", &tm);
    snprintf(text, 32, "%s.%03uZ", seconds, (unsigned)(time_ms % 1000));
}

size_t vm_event_text(const struct vm_control *control, const struct vm_event *event, char text[EVENT_LINE_BYTES])
{
    char when[32];
    write_time(event->time_ms, when);
    json_t *object = json_pack("{s:s, s:s, s:s}", "time", when, "vm", control->name, "event", machine_event_table[event->event].name);
    if (event->detail[0])
        json_object_set_new(object, "detail", json_string(event->detail));
    size_t length = json_dumpb(object, text, EVENT_LINE_BYTES, JSON_COMPACT);
    json_decref(object);
    return length < EVENT_LINE_BYTES ? length : 0;
}

void vm_event_note(struct vm_control *control, enum machine_event event, const char *detail)
{
    pthread_mutex_lock(&control->event_lock);
    struct vm_event *note = &control->event[control->next_event % EVENTS_KEPT];
    *note = (struct vm_event){.id = control->next_event++, .time_ms = wall_ms(), .event = event};
    snprintf(note->detail, sizeof note->detail, "%s", detail ? detail : "");
    if (event == MACHINE_EVENT_STARTED)
        control->started_ms = note->time_ms;
    if (event == MACHINE_EVENT_STARTED || event == MACHINE_EVENT_RESUMED)
        control->state = "running";
    else if (event == MACHINE_EVENT_PAUSED)
        control->state = "paused";
    else if (event == MACHINE_EVENT_ENDED)
        control->state = "ending";
    pthread_mutex_unlock(&control->event_lock);
    loop_event_raise(control->noted);
}

static void on_event(void *ctx, enum machine_event event, const char *detail)
{
    vm_event_note(ctx, event, detail);
}

/* The next after `last` that is still kept. */
static bool next_event(struct vm_control *control, uint64_t last, struct vm_event *event)
{
    pthread_mutex_lock(&control->event_lock);
    uint64_t oldest = control->next_event > EVENTS_KEPT ? control->next_event - EVENTS_KEPT : 1;
    uint64_t wanted = last + 1 > oldest ? last + 1 : oldest;
    bool there = last < UINT64_MAX && wanted < control->next_event;
    if (there)
        *event = control->event[wanted % EVENTS_KEPT];
    pthread_mutex_unlock(&control->event_lock);
    return there;
}

static int event_message(const struct vm_control *control, const struct vm_event *event, char text[2 * EVENT_LINE_BYTES])
{
    char line[EVENT_LINE_BYTES];
    size_t length = vm_event_text(control, event, line);
    return snprintf(text, 2 * EVENT_LINE_BYTES, "id: %" PRIu64 "\nevent: %s\ndata: %.*s\n\n", event->id, machine_event_table[event->event].name, (int)length, line);
}

char *vm_events_since(struct vm_control *control, uint64_t since, size_t *size_bytes)
{
    char *text = NULL, message[2 * EVENT_LINE_BYTES];
    FILE *out = open_memstream(&text, size_bytes);
    struct vm_event event;
    if (!out)
        return NULL;
    while (next_event(control, since, &event)) {
        since = event.id;
        event_message(control, &event, message);
        fputs(message, out);
    }
    fclose(out);
    return text;
}

/* ---- files; the control's thread ---- */

void vm_log_append(const struct vm_control *control, const char *file, int *fd, uint64_t *size_bytes, const void *data, size_t data_bytes)
{
    struct stat st;
    char before[64];
    if (!control->instance)
        return;
    int dir = instance_dir(control->instance);
    if (*fd >= 0 && *size_bytes + data_bytes > LOG_BYTES_MAX) {
        snprintf(before, sizeof before, "%s.1", file);
        renameat(dir, file, dir, before);
        close(*fd);
        *fd = -1;
    }
    if (*fd < 0) {
        *fd = openat(dir, file, O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
        *size_bytes = *fd >= 0 && fstat(*fd, &st) == 0 ? (uint64_t)st.st_size : 0;
    }
    ssize_t n = *fd >= 0 ? write(*fd, data, data_bytes) : -1;
    if (n < 0)
        LOG_GUEST(LOG_WARNING, "%s of %s cannot be written: %s", file, control->name, strerror(errno));
    else
        *size_bytes += (uint64_t)n;
}

static json_t *process_json(const struct process *process)
{
    return json_pack("{s:i, s:I}", "pid", (int)process->pid, "start_time", (json_int_t)process->start_time);
}

static void write_state(struct vm_control *control, const char *state, const char *reason, int status)
{
    if (!control->instance)
        return;
    pthread_mutex_lock(&control->event_lock);
    uint64_t started = control->started_ms;
    bool asked = control->asked;
    pthread_mutex_unlock(&control->event_lock);
    json_t *object = json_pack("{s:s, s:I, s:o, s:i, s:b}", "state", state, "since_ms", (json_int_t)wall_ms(), "process", process_json(&control->self), "restarts",
                               (int)control->restarts, "asked", asked);
    if (control->supervisor.pid)
        json_object_set_new(object, "supervisor", process_json(&control->supervisor));
    if (started)
        json_object_set_new(object, "started_ms", json_integer((json_int_t)started));
    if (reason) {
        json_object_set_new(object, "reason", json_string(reason));
        json_object_set_new(object, "exit_status", json_integer(status));
    }
    int r = object ? instance_write(control->instance, "state.json", object) : -ENOMEM;
    json_decref(object);
    if (r)
        log_warning("the state of %s cannot be written: %s", control->name, strerror(-r));
}

static void write_event(struct vm_control *control, const struct vm_event *event)
{
    char line[EVENT_LINE_BYTES + 1], message[2 * EVENT_LINE_BYTES];
    size_t length = vm_event_text(control, event, line);
    line[length] = '\n';
    vm_log_append(control, "events.log", &control->event_log, &control->event_log_bytes, line, length + 1);
    int bytes = event_message(control, event, message);
    vm_streams_write(&control->streams, STREAM_EVENTS, message, (size_t)bytes);
}

static void write_events(void *ctx)
{
    struct vm_control *control = ctx;
    struct vm_event event;
    bool any = false;
    while (next_event(control, control->written_event, &event)) {
        control->written_event = event.id;
        write_event(control, &event);
        any = true;
    }
    pthread_mutex_lock(&control->event_lock);
    const char *state = control->state;
    pthread_mutex_unlock(&control->event_lock);
    if (any)
        write_state(control, state, NULL, 0);
}

/* ---- the machine ---- */

struct machine *vm_machine_get(struct vm_control *control)
{
    pthread_rwlock_rdlock(&control->machine_lock);
    if (!control->machine)
        pthread_rwlock_unlock(&control->machine_lock);
    return control->machine;
}

void vm_machine_put(struct vm_control *control)
{
    pthread_rwlock_unlock(&control->machine_lock);
}

static void plug(void *ctx)
{
    struct vm_control *control = ctx;
    struct machine *machine = vm_machine_get(control);
    if (!machine)
        return;
    machine_stop(machine, MACHINE_STOPPED);
    vm_machine_put(control);
}

static void shut_in(void *ctx)
{
    machine_shut_in_or_stop(ctx, IN_API);
}

void vm_control_attach(struct vm_control *control, struct machine *machine, const struct machine_config *config)
{
    if (!control)
        return;
    if (loop_post(control->loop, shut_in, machine))
        machine_stop(machine, MACHINE_ERROR);
    machine_observe(machine, &(struct machine_observer){.event = on_event, .ctx = control});
    machine_console_tap(machine, vm_console_tap(control->console));
    pthread_rwlock_wrlock(&control->machine_lock);
    control->machine = machine;
    control->config = config;
    pthread_rwlock_unlock(&control->machine_lock);
}

struct synchronous {
    struct vm_control *control;
    void (*run)(struct vm_control *control);
    sem_t done;
};

static void run_synchronous(void *ctx)
{
    struct synchronous *call = ctx;
    call->run(call->control);
    sem_post(&call->done);
}

/* On the control's thread, behind what was noted before; waits for it. */
static void run_on_loop(struct vm_control *control, void (*run)(struct vm_control *control))
{
    struct synchronous call = {.control = control, .run = run};
    sem_init(&call.done, 0, 0);
    if (loop_post(control->loop, run_synchronous, &call) == 0)
        while (sem_wait(&call.done))
            continue; /* interrupted */
    sem_destroy(&call.done);
}

static void nothing(struct vm_control *control)
{
}

void vm_control_load_libraries(void)
{
    struct error err = {0};
    if (vm_screen_prepare(&err))
        log_warning("the screen cannot be shown: %s", err.text);
}

void vm_control_sync(struct vm_control *control)
{
    if (control)
        run_on_loop(control, nothing);
}

/* What there was to tell is told before the streams end. */
static void say_farewell(struct vm_control *control)
{
    vm_console_drain(control->console);
    write_events(control);
    vm_streams_end(&control->streams);
}

void vm_control_detach(struct vm_control *control, bool over)
{
    if (!control)
        return;
    pthread_rwlock_wrlock(&control->machine_lock);
    struct machine *machine = control->machine;
    control->machine = NULL;
    pthread_rwlock_unlock(&control->machine_lock);
    if (machine) {
        machine_observe(machine, NULL);
        machine_console_tap(machine, NULL);
    }
    if (over)
        run_on_loop(control, say_farewell);
}

/* ---- life ---- */

static void *control_main(void *arg)
{
    struct vm_control *control = arg;
    pthread_setname_np(pthread_self(), "control");
    int r = loop_run(control->loop);
    if (r)
        log_error("the control's loop failed: %s", strerror(-r));
    return NULL;
}

static void release(struct vm_control *control)
{
    vm_console_destroy(control->console);
    vm_screen_destroy(control->screen);
    vm_trace_destroy(control->trace);
    if (control->stop_timer)
        loop_timer_destroy(control->stop_timer);
    if (control->noted)
        loop_event_destroy(control->noted);
    if (control->loop)
        loop_destroy(control->loop);
    if (control->event_log >= 0)
        close(control->event_log);
    if (control->proc >= 0)
        close(control->proc);
    if (control->snapshots_fd >= 0)
        close(control->snapshots_fd);
    if (control->migrate_fd >= 0)
        close(control->migrate_fd);
    pthread_mutex_destroy(&control->migration_lock);
    pthread_rwlock_destroy(&control->machine_lock);
    pthread_mutex_destroy(&control->event_lock);
    free(control);
}

static void stream_gone(void *ctx)
{
    struct vm_control *control = ctx;
    vm_trace_look(control->trace);
}

static int start(struct vm_control *control, struct error *err)
{
    tzset(); /* the C library would read the time zone when it first writes a date: then the sandbox is closed, and the broker would be asked */
    int r = loop_create(&control->loop, NULL);
    if (r)
        return error_set(err, r, "cannot make an event loop: %s", strerror(-r));
    control->noted = loop_event_create(control->loop, write_events, control);
    control->stop_timer = loop_timer_create(control->loop, plug, control);
    if (!control->noted || !control->stop_timer)
        return error_set(err, -ENOMEM, "out of memory");
    control->screen = vm_screen_create();
    if (!control->screen || vm_trace_create(&control->trace, control))
        return error_set(err, -ENOMEM, "out of memory");
    r = vm_console_create(&control->console, control, err);
    if (r)
        return r;
    if (control->instance && (control->migrate_fd = instance_listen(control->instance, "migrate.sock", err)) < 0)
        return control->migrate_fd;
    write_state(control, control->state, NULL, 0);
    r = pthread_create(&control->thread, NULL, control_main, control);
    if (r)
        return error_set(err, -r, "cannot start a thread: %s", strerror(r));
    control->thread_started = true;
    return 0;
}

int vm_control_create(struct vm_control **out, const struct vm_control_options *options, struct error *err)
{
    struct vm_control *control = calloc(1, sizeof *control);
    if (!control)
        return error_set(err, -ENOMEM, "out of memory");
    snprintf(control->name, sizeof control->name, "%s", options->instance ? instance_name(options->instance) : options->name ? options->name : "");
    control->instance = options->instance;
    control->supervisor = options->supervisor;
    control->restarts = options->restarts;
    control->self = process_self();
    control->proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    control->event_log = -1;
    control->snapshots = options->snapshots;
    control->snapshots_fd = options->snapshots ? open(options->snapshots, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC) : -1;
    control->migrate_fd = -1;
    control->state = "starting";
    control->created_ms = wall_ms();
    control->next_event = 1;
    pthread_rwlock_init(&control->machine_lock, NULL);
    pthread_mutex_init(&control->migration_lock, NULL);
    pthread_mutex_init(&control->event_lock, NULL);
    vm_streams_init(&control->streams);
    control->streams.gone = stream_gone;
    control->streams.ctx = control;
    int r = start(control, err);
    if (r) {
        release(control);
        return r;
    }
    *out = control;
    return 0;
}

int vm_control_add_routes(struct vm_control *control, struct http_server *server)
{
    return http_server_add_routes(server, doppel_v1_routes, control);
}

struct last_words {
    struct vm_control *control;
    enum machine_end end;
    int status;
    bool keep;
};

/* Files once more, and by the thread that may. */
static void say_last_words(void *ctx)
{
    struct last_words *words = ctx;
    struct vm_control *control = words->control;
    const char *reason = machine_end_name(words->end);
    vm_console_drain(control->console);
    write_events(control);
    write_state(control, "ended", reason ? reason : "error", words->status);
    loop_stop(control->loop);
}

void vm_control_destroy(struct vm_control *control, enum machine_end end, int status, bool keep)
{
    if (!control)
        return;
    struct last_words words = {.control = control, .end = end, .status = status, .keep = keep};
    if (loop_post(control->loop, say_last_words, &words))
        loop_stop(control->loop);
    pthread_join(control->thread, NULL);
    instance_close(control->instance, keep); /* here, because the control's thread may write in the directory and not remove it */
    release(control);
}
