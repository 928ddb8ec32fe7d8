/*
 * Replies and streams (http.h). A reply is stored in the call and given to MHD on the server's thread. A stream is a bounded ring that its owner fills and MHD
 * empties: while it is empty its connection is suspended, and its socket watched here for the client going away.
 *
 * A stream has two holders, its owner (until http_stream_end) and MHD (until it frees the response); the last to let go frees it. Locks: the stream's, then server->lock.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "control/http_priv.h"

#define READ_BLOCK_BYTES 16384

static void set_header(struct MHD_Response *response, const char *name, const char *value)
{
    if (value)
        (void)MHD_add_response_header(response, name, value);
}

/* ---- storing a reply ---- */

static void reply_ready(struct http_call *call, unsigned status, const char *content_type, void *data, size_t size_bytes)
{
    struct http_server *server = call->server;
    pthread_mutex_lock(&server->lock);
    if (call->ready) { /* a handler that replies twice: the first counts */
        pthread_mutex_unlock(&server->lock);
        free(data);
        return;
    }
    call->status = status;
    call->content_type = content_type;
    call->data = data;
    call->data_bytes = size_bytes;
    call->ready = true;
    if (call->deferred) {
        call->deferred = false;
        server->deferred_count--;
        pthread_cond_broadcast(&server->undeferred);
    }
    if (call->suspended) {
        TAILQ_INSERT_TAIL(&server->resume_calls, call, resume_link);
        loop_event_raise(server->resume); /* with the lock held: the server is not gone before it is released */
    }
    pthread_mutex_unlock(&server->lock);
}

void http_reply_empty(struct http_call *call, unsigned status)
{
    reply_ready(call, status, NULL, NULL, 0);
}

void http_reply_data(struct http_call *call, unsigned status, const char *content_type, const void *data, size_t size_bytes)
{
    void *copy = malloc(size_bytes ? size_bytes : 1);
    if (copy)
        memcpy(copy, data, size_bytes);
    reply_ready(call, copy ? status : 500, content_type, copy, copy ? size_bytes : 0);
}

void http_reply_json(struct http_call *call, unsigned status, json_t *value)
{
    char *text = value ? json_dumps(value, JSON_COMPACT | JSON_ENCODE_ANY) : NULL;
    json_decref(value);
    reply_ready(call, text ? status : 500, "application/json", text, text ? strlen(text) : 0);
}

void http_reply_error(struct http_call *call, unsigned status, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (unsigned char *c = (unsigned char *)text; *c; c++)
        if (*c >= 0x80 || *c < ' ')
            *c = '?'; /* what a client sent comes back here, cut anywhere: it need not be UTF-8 */
    http_reply_json(call, status, json_pack("{s:s}", "fault_message", text));
}

void http_defer(struct http_call *call)
{
    pthread_mutex_lock(&call->server->lock);
    if (!call->ready && !call->deferred) {
        call->deferred = true;
        call->server->deferred_count++;
    }
    pthread_mutex_unlock(&call->server->lock);
}

/* ---- streams ---- */

static void stream_free(struct http_stream *stream)
{
    pthread_mutex_destroy(&stream->lock);
    free(stream->buffer);
    free(stream);
}

static void unwatch(struct http_stream *stream)
{
    loop_fd_remove(stream->watch);
    stream->watch = NULL;
}

/* The suspended client's socket is readable: it has gone, or it sends something, which is looked at after the stream. */
static void client_moved(void *ctx, unsigned events)
{
    struct http_stream *stream = ctx;
    char byte;
    ssize_t n = recv(stream->peer->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        http_stream_resume(stream, true);
    else if (n > 0)
        unwatch(stream);
}

static void take_off_resume(struct http_stream *stream)
{
    struct http_server *server = stream->server;
    pthread_mutex_lock(&server->lock);
    if (stream->resume_wanted)
        TAILQ_REMOVE(&server->resume_streams, stream, resume_link);
    stream->resume_wanted = false;
    pthread_mutex_unlock(&server->lock);
}

void http_stream_resume(struct http_stream *stream, bool gone)
{
    pthread_mutex_lock(&stream->lock);
    stream->gone |= gone;
    bool suspended = stream->suspended;
    stream->suspended = false;
    take_off_resume(stream);
    if (stream->ended && stream->peer->at_work)
        http_wait_for_client(stream->server, stream->peer); /* the rest is the client's to take in time */
    pthread_mutex_unlock(&stream->lock);
    if (!suspended)
        return;
    unwatch(stream);
    MHD_resume_connection(stream->connection);
    loop_event_raise(stream->server->again); /* takes effect when MHD runs */
}

/* Some of what is there; 0: nothing. With the lock held. */
static size_t take_bytes(struct http_stream *stream, char *out, size_t room)
{
    size_t n = HTTP_STREAM_BYTES - stream->start;
    n = n < stream->count ? n : stream->count;
    n = n < room ? n : room;
    memcpy(out, stream->buffer + stream->start, n);
    stream->start = (stream->start + n) % HTTP_STREAM_BYTES;
    stream->count -= n;
    return n;
}

static ssize_t read_stream(void *cls, uint64_t position, char *out, size_t room)
{
    struct http_stream *stream = cls;
    pthread_mutex_lock(&stream->lock);
    ssize_t n = stream->gone ? MHD_CONTENT_READER_END_WITH_ERROR : (ssize_t)take_bytes(stream, out, room);
    if (n == 0 && stream->ended)
        n = MHD_CONTENT_READER_END_OF_STREAM;
    if (n == 0) {
        stream->suspended = true;
        MHD_suspend_connection(stream->connection);
    }
    pthread_mutex_unlock(&stream->lock);
    if (n == 0 && loop_fd_add(stream->server->loop, stream->peer->fd, LOOP_READ, client_moved, stream, &stream->watch))
        stream->watch = NULL;
    return n;
}

void http_stream_unserve(struct http_stream *stream)
{
    struct http_server *server = stream->server;
    unwatch(stream);
    pthread_mutex_lock(&stream->lock);
    take_off_resume(stream);
    pthread_mutex_lock(&server->lock);
    LIST_REMOVE(stream, link);
    server->stream_count--;
    pthread_mutex_unlock(&server->lock);
    stream->served = stream->suspended = false;
    stream->gone = true;
    bool ended = stream->ended;
    void (*closed)(void *ctx) = stream->closed;
    void *ctx = stream->ctx;
    pthread_mutex_unlock(&stream->lock);
    if (ended)
        stream_free(stream);
    else if (closed)
        closed(ctx);
}

/* MHD lets go: all was sent, or the connection has ended. */
static void stream_unserved(void *cls)
{
    http_stream_unserve(cls);
}

static struct http_stream *stream_create(struct http_call *call)
{
    struct http_server *server = call->server;
    struct http_stream *stream = calloc(1, sizeof *stream);
    if (!stream || !(stream->buffer = malloc(HTTP_STREAM_BYTES))) {
        free(stream);
        return NULL;
    }
    pthread_mutex_lock(&server->lock);
    if (call->ready || server->stream_count == HTTP_STREAMS_MAX) {
        pthread_mutex_unlock(&server->lock);
        free(stream->buffer);
        free(stream);
        return NULL;
    }
    pthread_mutex_init(&stream->lock, NULL);
    stream->server = server;
    stream->connection = call->connection;
    stream->peer = call->peer;
    stream->served = true;
    server->stream_count++;
    LIST_INSERT_HEAD(&server->streams, stream, link);
    pthread_mutex_unlock(&server->lock);
    return stream;
}

struct http_stream *http_reply_stream(struct http_call *call, const char *content_type, void (*closed)(void *ctx), void *ctx)
{
    struct http_stream *stream = stream_create(call);
    if (!stream) {
        http_reply_error(call, 503, "There are too many streams; close some.");
        return NULL;
    }
    stream->closed = closed;
    stream->ctx = ctx;
    call->stream = stream;
    reply_ready(call, 200, content_type, NULL, 0);
    return stream;
}

/* With the stream's lock held. */
static void want_resume(struct http_stream *stream)
{
    struct http_server *server = stream->server;
    pthread_mutex_lock(&server->lock);
    if (!stream->resume_wanted) {
        stream->resume_wanted = true;
        TAILQ_INSERT_TAIL(&server->resume_streams, stream, resume_link);
        loop_event_raise(server->resume);
    }
    pthread_mutex_unlock(&server->lock);
}

int http_stream_write(struct http_stream *stream, const void *data, size_t size_bytes)
{
    int r = 0;
    pthread_mutex_lock(&stream->lock);
    if (stream->gone) {
        r = -EPIPE;
    } else if (size_bytes > HTTP_STREAM_BYTES - stream->count) {
        r = -ENOBUFS;
    } else {
        size_t at = (stream->start + stream->count) % HTTP_STREAM_BYTES;
        size_t first = size_bytes < HTTP_STREAM_BYTES - at ? size_bytes : HTTP_STREAM_BYTES - at;
        memcpy(stream->buffer + at, data, first);
        memcpy(stream->buffer, (const uint8_t *)data + first, size_bytes - first);
        stream->count += size_bytes;
        if (stream->suspended)
            want_resume(stream);
    }
    pthread_mutex_unlock(&stream->lock);
    return r;
}

void http_stream_end(struct http_stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    stream->ended = true;
    bool served = stream->served;
    if (served)
        want_resume(stream);
    pthread_mutex_unlock(&stream->lock);
    if (!served)
        stream_free(stream);
}

/* ---- giving it to MHD ---- */

static struct MHD_Response *stream_response(struct http_call *call)
{
    struct MHD_Response *response =
        MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, READ_BLOCK_BYTES, read_stream, call->stream, stream_unserved);
    if (response)
        set_header(response, MHD_HTTP_HEADER_CACHE_CONTROL, "no-store");
    return response;
}

enum MHD_Result http_queue_reply(struct http_call *call)
{
    struct MHD_Response *response = call->stream ? stream_response(call)
                                                 : MHD_create_response_from_buffer(call->data_bytes, call->data, MHD_RESPMEM_MUST_FREE);
    if (!response)
        return MHD_NO;
    call->data = NULL;
    call->queued = true;
    set_header(response, MHD_HTTP_HEADER_SERVER, "Doppel API");
    set_header(response, MHD_HTTP_HEADER_CONTENT_TYPE, call->content_type);
    set_header(response, MHD_HTTP_HEADER_ALLOW, call->allow[0] ? call->allow : NULL);
    enum MHD_Result result = MHD_queue_response(call->connection, call->status, response);
    MHD_destroy_response(response);
    if (!call->stream)
        http_wait_for_client(call->server, call->peer);
    struct http_options *options = &call->server->options;
    if (options->answered)
        options->answered(options->answered_ctx, call->route ? call->route->method : "", call->path, call->status, loop_now_ns() - call->begin_ns);
    return result;
}
