/* Looking after one machine, inside: vm_control.c (life, events, state), vm_console.c (console), vm_screen.c (as a terminal shows it), vm_trace.c, vm_streams.c (clients that listen), doppel_v1*.c (requests). */
#ifndef DOPPEL_CONTROL_VM_CONTROL_PRIV_H
#define DOPPEL_CONTROL_VM_CONTROL_PRIV_H

#include <pthread.h>
#include <stdatomic.h>

#include "control/vm_control.h"
#include "util/loop.h"

#define EVENT_DETAIL_BYTES 48u
#define EVENTS_KEPT 128u
#define EVENT_LINE_BYTES 512u

/* ---- streams: HTTP clients that listen ---- */

enum stream_kind { STREAM_FREE, STREAM_EVENTS, STREAM_CONSOLE, STREAM_TRACE };

struct vm_streams;
struct vm_stream {
    struct vm_streams *all;
    enum stream_kind kind;
    struct http_stream *http;
    uint64_t lost; /* what this client was too slow for */
};

/* A client that falls behind loses what does not fit; it is told so when there is room again. */
struct vm_streams {
    pthread_mutex_t lock;
    bool closed; /* no new ones */
    void (*gone)(void *ctx); /* one has gone; any thread, with the lock held */
    void *ctx;
    struct vm_stream slot[HTTP_STREAMS_MAX];
};

void vm_streams_init(struct vm_streams *streams);
bool vm_streams_have(struct vm_streams *streams, enum stream_kind kind);
void vm_streams_end(struct vm_streams *streams); /* all; there will be none after this */
/* Replies to the call in every case. `first` is sent before all else. */
void vm_streams_add(struct vm_streams *streams, struct http_call *call, enum stream_kind kind, const char *content_type, const void *first, size_t first_bytes);
void vm_streams_write(struct vm_streams *streams, enum stream_kind kind, const void *data, size_t size_bytes);

/* ---- the console ---- */

struct vm_console;
int vm_console_create(struct vm_console **console, struct vm_control *control, struct error *err);
void vm_console_destroy(struct vm_console *console); /* with the loop's thread ended */
void vm_console_drain(struct vm_console *console);   /* on the loop's thread: what the guest said goes to its listeners */
const struct console_tap *vm_console_tap(struct vm_console *console);

/* ---- the trace ---- */

struct vm_trace;
int vm_trace_create(struct vm_trace **trace, struct vm_control *control);
void vm_trace_destroy(struct vm_trace *trace); /* with the loop's thread ended, and no machine */
/* Replies to the call in every case, with the trace from now on if it can be had. Server's thread; `machine` stays meanwhile. */
void vm_trace_add(struct vm_trace *trace, struct machine *machine, struct http_call *call);
/* Looks, soon, whether somebody still listens. Any thread. */
void vm_trace_look(struct vm_trace *trace);

/* ---- what was said lately, and what a terminal shows of it; any thread ---- */

#define VM_SCREEN_RECENT_BYTES (16u << 10)

struct vm_screen;
struct vm_screen *vm_screen_create(void); /* NULL: no memory */
int vm_screen_prepare(struct error *err); /* loads its library, which a thread in the sandbox cannot */
void vm_screen_destroy(struct vm_screen *screen);
void vm_screen_feed(struct vm_screen *screen, const char *data, size_t size_bytes);
/* The last bytes; returns how many. */
size_t vm_screen_recent(struct vm_screen *screen, char data[VM_SCREEN_RECENT_BYTES]);
/* As "json", "text" or "svg"; the caller frees. *content_type NULL: there is no such format; NULL: no memory. */
char *vm_screen_render(struct vm_screen *screen, const char *format, const char **content_type);

/* ---- one machine ---- */

struct vm_event {
    uint64_t id, time_ms; /* since 1970 */
    enum machine_event event;
    char detail[EVENT_DETAIL_BYTES];
};

struct vm_control {
    char name[INSTANCE_NAME_BYTES];
    struct instance *instance;
    struct process supervisor, self;
    unsigned restarts;
    int proc; /* a descriptor of /proc; -1: none */
    uint64_t created_ms;
    int snapshots_fd; /* where snapshots of it are made; -1: nowhere */
    const char *snapshots; /* its path, borrowed */
    atomic_bool snapshot_under_way; /* or a migration */
    _Atomic uint64_t snapshot_pages, snapshot_pages_expected;
    int migrate_fd; /* where connections of migrations come in; -1: nowhere */
    pthread_mutex_t migration_lock; /* guards `migration`. Innermost */
    struct machine_migration *migration; /* under way; NULL: none */
    struct loop *loop;
    struct loop_event *noted;      /* events have come */
    struct loop_timer *stop_timer; /* the guest's time to shut down is over */
    pthread_t thread;
    bool thread_started;
    struct vm_console *console;
    struct vm_screen *screen;
    struct vm_trace *trace;
    struct vm_streams streams;

    pthread_rwlock_t machine_lock; /* read: the machine stays as long as one holds it. Before all of the machine's locks */
    struct machine *machine;       /* NULL: not yet, or no more */
    const struct machine_config *config;

    pthread_mutex_t event_lock; /* innermost; guards the rest */
    struct vm_event event[EVENTS_KEPT]; /* number n is at n % EVENTS_KEPT */
    uint64_t next_event, written_event; /* ids begin with 1 */
    const char *state;
    uint64_t started_ms;
    bool asked; /* somebody stopped it from outside */

    /* The loop's thread. */
    int event_log;
    uint64_t event_log_bytes;
};

/* As a line of JSON, without its end; returns its length. */
size_t vm_event_text(const struct vm_control *control, const struct vm_event *event, char text[EVENT_LINE_BYTES]);
/* As server-sent events those after `since`; the caller frees. NULL: no memory. */
char *vm_events_since(struct vm_control *control, uint64_t since, size_t *size_bytes);
void vm_event_note(struct vm_control *control, enum machine_event event, const char *detail);
/* The machine, which stays until vm_machine_put; NULL: there is none, nothing to put. */
struct machine *vm_machine_get(struct vm_control *control);
void vm_machine_put(struct vm_control *control);
/* Appends to a file of the directory whose size is bounded: beyond it, the file becomes FILE.1 and a new one begins. Loop's thread. */
void vm_log_append(const struct vm_control *control, const char *file, int *fd, uint64_t *size_bytes, const void *data, size_t data_bytes);

/* doppel_v1_snapshot.c */
http_handler_fn vm_post_snapshot, vm_post_clone, vm_get_snapshot;

/* doppel_v1_migrate.c */
http_handler_fn vm_post_migration, vm_get_migration, vm_cancel_migration;

/* doppel_v1_stats.c */
json_t *vm_statistics(struct vm_control *control, struct machine *machine);
char *vm_metrics(struct vm_control *control, struct machine *machine, size_t *size_bytes); /* the caller frees */

#endif
