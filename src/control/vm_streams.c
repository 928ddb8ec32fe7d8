/*
 * HTTP clients that listen to events, the console or the trace (vm_control_priv.h). A slot is given back only when the client has gone, by the server's thread, so the server's
 * call about a client's end never meets a slot that is somebody else's by then.
 */
#include <stdio.h>
#include <string.h>

#include "control/vm_control_priv.h"

void vm_streams_init(struct vm_streams *streams)
{
    pthread_mutex_init(&streams->lock, NULL);
    for (unsigned i = 0; i < HTTP_STREAMS_MAX; i++)
        streams->slot[i].all = streams;
}

static void end(struct vm_stream *stream)
{
    if (stream->kind != STREAM_FREE && stream->http)
        http_stream_end(stream->http);
    stream->http = NULL;
}

bool vm_streams_have(struct vm_streams *streams, enum stream_kind kind)
{
    bool have = false;
    pthread_mutex_lock(&streams->lock);
    for (unsigned i = 0; i < HTTP_STREAMS_MAX; i++)
        have |= streams->slot[i].kind == kind && streams->slot[i].http;
    pthread_mutex_unlock(&streams->lock);
    return have;
}

/* The client has gone. */
static void closed(void *ctx)
{
    struct vm_stream *stream = ctx;
    pthread_mutex_lock(&stream->all->lock);
    end(stream);
    if (!stream->all->closed)
        stream->kind = STREAM_FREE;
    stream->all->gone(stream->all->ctx);
    pthread_mutex_unlock(&stream->all->lock);
}

void vm_streams_end(struct vm_streams *streams)
{
    pthread_mutex_lock(&streams->lock);
    streams->closed = true;
    for (unsigned i = 0; i < HTTP_STREAMS_MAX; i++)
        end(&streams->slot[i]);
    pthread_mutex_unlock(&streams->lock);
}

static struct vm_stream *take_slot(struct vm_streams *streams, enum stream_kind kind)
{
    struct vm_stream *stream = NULL;
    for (unsigned i = 0; i < HTTP_STREAMS_MAX && !stream && !streams->closed; i++)
        if (streams->slot[i].kind == STREAM_FREE)
            stream = &streams->slot[i];
    if (stream)
        *stream = (struct vm_stream){.all = streams, .kind = kind};
    return stream;
}

void vm_streams_add(struct vm_streams *streams, struct http_call *call, enum stream_kind kind, const char *content_type, const void *first, size_t first_bytes)
{
    pthread_mutex_lock(&streams->lock);
    struct vm_stream *stream = take_slot(streams, kind);
    if (stream && (stream->http = http_reply_stream(call, content_type, closed, stream))) {
        if (first_bytes && http_stream_write(stream->http, first, first_bytes))
            stream->lost += first_bytes;
    } else if (stream) {
        stream->kind = STREAM_FREE; /* replied */
    } else {
        http_reply_error(call, 503, "There are too many streams, or the virtual machine is ending.");
    }
    pthread_mutex_unlock(&streams->lock);
}

/* The console's bytes are the guest's, so only events can tell. */
static bool tell_loss(struct vm_stream *stream)
{
    char text[64];
    if (stream->kind != STREAM_EVENTS)
        return true;
    int length = snprintf(text, sizeof text, ": %llu bytes of events were lost\n\n", (unsigned long long)stream->lost);
    return http_stream_write(stream->http, text, (size_t)length) == 0;
}

void vm_streams_write(struct vm_streams *streams, enum stream_kind kind, const void *data, size_t size_bytes)
{
    pthread_mutex_lock(&streams->lock);
    for (unsigned i = 0; i < HTTP_STREAMS_MAX; i++) {
        struct vm_stream *stream = &streams->slot[i];
        if (stream->kind != kind || !stream->http)
            continue;
        if (stream->lost && tell_loss(stream))
            stream->lost = 0;
        if (stream->lost || http_stream_write(stream->http, data, size_bytes))
            stream->lost += size_bytes;
    }
    pthread_mutex_unlock(&streams->lock);
}
