/*
 * What the processors do, for HTTP clients that listen: tracing is on while there is one. vCPUs put lines into a ring, which the control's thread empties; who is faster than
 * that loses lines, and is told how many bytes.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "control/vm_control_priv.h"
#include "util/byte_ring.h"
#include "util/log.h"

#define RING_BYTES (256u << 10)
#define PIECE_BYTES 16384u

struct vm_trace {
    struct vm_control *control;
    struct loop_event *said, *changed;
    struct machine_trace_sink sink;
    pthread_mutex_t switch_lock; /* held while tracing is switched; guards `on` */
    bool on;
    pthread_mutex_t lock; /* innermost; guards the ring */
    struct byte_ring ring;
};

static void take_line(void *ctx, const char *line, size_t size_bytes)
{
    struct vm_trace *trace = ctx;
    pthread_mutex_lock(&trace->lock);
    size_t room = trace->ring.room - trace->ring.count;
    if (size_bytes <= room)
        byte_ring_put(&trace->ring, line, size_bytes);
    else
        trace->ring.lost += size_bytes;
    pthread_mutex_unlock(&trace->lock);
    loop_event_raise(trace->said);
}

static void drain(void *ctx)
{
    struct vm_trace *trace = ctx;
    char piece[PIECE_BYTES];
    uint64_t lost;
    for (;;) {
        pthread_mutex_lock(&trace->lock);
        size_t n = byte_ring_take(&trace->ring, piece, sizeof piece, &lost);
        pthread_mutex_unlock(&trace->lock);
        if (!n)
            return;
        vm_streams_write(&trace->control->streams, STREAM_TRACE, piece, n);
        if (lost) {
            int length = snprintf(piece, sizeof piece, "[%llu bytes were lost here]\n", (unsigned long long)lost);
            vm_streams_write(&trace->control->streams, STREAM_TRACE, piece, (size_t)length);
        }
    }
}

/* Somebody went: the last one? */
static void look(void *ctx)
{
    struct vm_trace *trace = ctx;
    struct error err = {0};
    pthread_mutex_lock(&trace->switch_lock);
    struct machine *machine = trace->on && !vm_streams_have(&trace->control->streams, STREAM_TRACE) ? vm_machine_get(trace->control) : NULL;
    if (machine) {
        if (machine_trace(machine, NULL, &err) && err.code != -ESRCH)
            log_warning("tracing goes on: %s", err.text);
        trace->on = err.code != 0;
        vm_machine_put(trace->control);
    }
    pthread_mutex_unlock(&trace->switch_lock);
}

void vm_trace_look(struct vm_trace *trace)
{
    loop_event_raise(trace->changed);
}

void vm_trace_add(struct vm_trace *trace, struct machine *machine, struct http_call *call)
{
    static const char head[] = "# seconds, processor, what\n";
    struct error err = {0};
    pthread_mutex_lock(&trace->switch_lock);
    trace->on = trace->on || machine_trace(machine, &trace->sink, &err) == 0;
    if (trace->on)
        vm_streams_add(&trace->control->streams, call, STREAM_TRACE, "text/plain", head, sizeof head - 1);
    else
        http_reply_error(call, 400, "%s", err.text);
    pthread_mutex_unlock(&trace->switch_lock);
}

int vm_trace_create(struct vm_trace **out, struct vm_control *control)
{
    struct vm_trace *trace = calloc(1, sizeof *trace);
    if (!trace)
        return -ENOMEM;
    *out = trace;
    trace->control = control;
    trace->sink = (struct machine_trace_sink){take_line, trace};
    pthread_mutex_init(&trace->switch_lock, NULL);
    pthread_mutex_init(&trace->lock, NULL);
    trace->ring = (struct byte_ring){.data = malloc(RING_BYTES), .room = RING_BYTES};
    trace->said = loop_event_create(control->loop, drain, trace);
    trace->changed = loop_event_create(control->loop, look, trace);
    return trace->ring.data && trace->said && trace->changed ? 0 : -ENOMEM;
}

void vm_trace_destroy(struct vm_trace *trace)
{
    if (!trace)
        return;
    if (trace->said)
        loop_event_destroy(trace->said);
    if (trace->changed)
        loop_event_destroy(trace->changed);
    pthread_mutex_destroy(&trace->switch_lock);
    pthread_mutex_destroy(&trace->lock);
    free(trace->ring.data);
    free(trace);
}
