/* The HTTP server, inside: shared by http.c (connections, requests) and http_reply.c (replies, streams). */
#ifndef DOPPEL_CONTROL_HTTP_PRIV_H
#define DOPPEL_CONTROL_HTTP_PRIV_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>

#include "control/http.h"
#include "control/http_library.h"
#include "util/loop.h"

#define HTTP_TABLES_MAX 8
#define HTTP_QUERIES_MAX 8

/* Everything here belongs to the server's thread. */
struct http_connection {
    int fd;
    uint64_t since_ns; /* a request has been waited for since then, or its reply has not been taken */
    bool at_work;      /* a handler, a deferred reply or an open stream: not the client's fault */
    bool cut_off;      /* shut down; MHD has not seen it yet */
    TAILQ_ENTRY(http_connection) link;
};

struct http_call {
    struct http_server *server;
    struct MHD_Connection *connection;
    struct http_connection *peer;
    const struct http_route *route;
    void *route_ctx;
    char *path;
    const char *parameter[HTTP_PARAMETERS_MAX];
    unsigned parameter_count;
    char *query[HTTP_QUERIES_MAX]; /* decoded values that were asked for */
    unsigned query_count;
    char *body;
    size_t body_bytes, body_room;
    bool too_large;
    bool dispatched, queued;
    uint64_t begin_ns;

    /* The reply; guarded by server->lock from http_defer on. */
    bool deferred, ready, suspended;
    unsigned status;
    const char *content_type; /* a literal, or of the stream's owner */
    char allow[64];           /* the header's value, with 405 */
    void *data;
    size_t data_bytes;
    struct http_stream *stream;
    TAILQ_ENTRY(http_call) resume_link;
};

struct http_stream {
    struct http_server *server;
    struct MHD_Connection *connection;
    struct http_connection *peer; /* server's thread */
    struct loop_fd *watch;        /* of a suspended connection's socket; server's thread */
    void (*closed)(void *ctx);
    void *ctx;
    pthread_mutex_t lock; /* guards the rest; before server->lock */
    uint8_t *buffer;
    size_t start, count;
    bool ended;  /* the owner has called http_stream_end */
    bool gone;   /* the client, or the server */
    bool served; /* the server still knows it */
    bool suspended;
    bool resume_wanted; /* in resume_streams; server->lock */
    TAILQ_ENTRY(http_stream) resume_link;
    LIST_ENTRY(http_stream) link; /* server->lock */
};

struct http_server {
    struct http_options options;
    char *path; /* removed at the end */
    int listen_fd;
    struct MHD_Daemon *daemon;
    struct loop *loop;
    struct loop_fd *watch;
    struct loop_event *again, *resume;
    struct loop_timer *sweep;
    pthread_t thread;
    bool started;
    struct {
        const struct http_route *routes;
        void *ctx;
    } table[HTTP_TABLES_MAX];
    unsigned table_count;

    /* The server's thread. */
    TAILQ_HEAD(, http_connection) connections; /* longest waited for first */
    unsigned connection_count;

    pthread_mutex_t lock;
    pthread_cond_t undeferred; /* with `lock`: a deferred reply has come */
    bool stopping;
    unsigned deferred_count, stream_count;
    LIST_HEAD(, http_stream) streams;
    TAILQ_HEAD(, http_call) resume_calls;
    TAILQ_HEAD(, http_stream) resume_streams;
};

/* Gives MHD the reply that is ready. */
enum MHD_Result http_queue_reply(struct http_call *call);
/* Resumes a stream that waits for bytes, and gives it up when `gone`. Server's thread. */
void http_stream_resume(struct http_stream *stream, bool gone);
/* The server lets go of a stream. Server's thread. */
void http_stream_unserve(struct http_stream *stream);
/* From now on it is the client that is waited for. Server's thread. */
void http_wait_for_client(struct http_server *server, struct http_connection *peer);
/* The socket at options.path. */
int http_listen(const char *path, struct error *err);
/* "a%20b" in place; -EINVAL for bad escapes and NUL. */
int http_decode(char *text);

#endif
