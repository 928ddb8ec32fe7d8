/*
 * HTTP with JSON on a Unix socket: a server with tables of routes, bounded in all that a client can make it keep.
 *
 *     static void get_thing(struct http_call *call, void *ctx) { http_reply_json(call, 200, json_pack("{s:s}", "id", http_parameter(call, 0))); }
 *     static const struct http_route routes[] = {{"GET", "/things/{id}", get_thing}, {0}};
 *     http_server_create(&server, &(struct http_options){.path = "/run/x.sock"}, err);
 *     http_server_add_routes(server, routes, ctx);
 *     http_server_start(server, err);
 *
 * Threading: one thread runs the server. All handlers run on it, one at a time, so they need no lock among themselves and should not take long; one
 * that must wait calls http_defer and is answered from any thread. Streams are written from any thread. No client can hold the server up: a request that is not
 * complete after HTTP_PATIENCE_S is cut off, and so is the one waited for longest when there are too many.
 */
#ifndef DOPPEL_CONTROL_HTTP_H
#define DOPPEL_CONTROL_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "util/error.h"

#define HTTP_BODY_BYTES_DEFAULT 51200u /* what clients of this API know */
#define HTTP_CONNECTIONS_MAX 64u
#define HTTP_STREAMS_MAX 32u /* connections that streams may take */
#define HTTP_STREAM_BYTES (256u << 10) /* kept for a client that reads slowly */
#define HTTP_HEADER_BYTES 32768u       /* request line and headers, about; MHD's memory of a connection */
#define HTTP_PATIENCE_S 60u
#define HTTP_PARAMETERS_MAX 4u

struct http_server;
struct http_call;
struct http_stream;

/* Replies exactly once, or calls http_defer. */
typedef void http_handler_fn(struct http_call *call, void *ctx);

struct http_route {
    const char *method;  /* "GET" */
    const char *path;    /* "/drives/{id}": {x} matches one non-empty segment */
    http_handler_fn *handler;
    const void *data; /* the table's own, http_data */
};

struct http_options {
    const char *path;     /* of the socket; made with mode 0600. One that nobody listens on is replaced, everything else there is an error */
    int listen_fd;        /* when path is NULL: a socket that listens; taken over */
    size_t body_bytes_max; /* 0: HTTP_BODY_BYTES_DEFAULT */
    unsigned patience_s;  /* 0: HTTP_PATIENCE_S */
    /* Each answered request, on the server's thread. Optional. */
    void (*answered)(void *ctx, const char *method, const char *path, unsigned status, uint64_t duration_ns);
    void *answered_ctx;
};

int http_server_create(struct http_server **server, const struct http_options *options, struct error *err) __attribute__((warn_unused_result));
/* Its descriptor that listens, until the start. */
int http_server_socket(const struct http_server *server);
/* Before the start. `routes` (ended by a NULL method) and `ctx` (the handlers') must outlive the server. The first match counts. */
int http_server_add_routes(struct http_server *server, const struct http_route *routes, void *ctx) __attribute__((warn_unused_result));
int http_server_start(struct http_server *server, struct error *err) __attribute__((warn_unused_result));
/* Runs fn once on the server's thread, before requests that come later. Any thread, also before the start. */
int http_server_post(struct http_server *server, void (*fn)(void *ctx), void *ctx) __attribute__((warn_unused_result));
/* Ends streams and connections; waits for the handler that runs and for replies that were deferred. Not from a handler. Removes the socket's file. */
void http_server_destroy(struct http_server *server);

/* ---- the request ---- */

const char *http_method(const struct http_call *call);
const char *http_path(const struct http_call *call);                          /* decoded for people: not to be parsed */
const char *http_parameter(const struct http_call *call, unsigned index);     /* what {x} matched, percent-decoded */
const char *http_query(struct http_call *call, const char *name);             /* ?name=value, decoded; NULL: not there, "": no value */
const char *http_body(const struct http_call *call, size_t *size_bytes);      /* NUL-terminated as well */
const void *http_data(const struct http_call *call);                          /* the route's */
/* The body as JSON without duplicate keys; the caller's. NULL: replied with 400 already. */
json_t *http_body_json(struct http_call *call);

/* ---- replies ---- */

void http_reply_empty(struct http_call *call, unsigned status);
void http_reply_json(struct http_call *call, unsigned status, json_t *value); /* takes the reference over */
void http_reply_data(struct http_call *call, unsigned status, const char *content_type, const void *data, size_t size_bytes); /* copies */
/* {"fault_message": text} */
void http_reply_error(struct http_call *call, unsigned status, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* The reply comes later, from any thread, by one of the functions above; `call` stays valid until then. It must come: destroying the server waits for it. */
void http_defer(struct http_call *call);

/* ---- streams ---- */

/*
 * A reply whose end is not known, status 200. The stream stays valid until http_stream_end, which its owner calls exactly once in every case, also after the
 * server's end. `closed` (may be NULL) is called at most once, on the server's thread or by http_server_destroy, when the client has gone or the server ends
 * before http_stream_end; it may call that itself. It can be on its way while http_stream_end is called elsewhere, so `ctx` lives as long as the server.
 * NULL: replied with 503, `closed` is not called.
 */
struct http_stream *http_reply_stream(struct http_call *call, const char *content_type, void (*closed)(void *ctx), void *ctx);
/* Any thread. All or nothing: -ENOBUFS when the client is HTTP_STREAM_BYTES behind, -EPIPE when it has gone. */
int http_stream_write(struct http_stream *stream, const void *data, size_t size_bytes);
/* Any thread. What was written is still sent. */
void http_stream_end(struct http_stream *stream);

#endif
