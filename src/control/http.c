/*
 * The server's thread: connections, requests, routes (http.h). libmicrohttpd parses and writes HTTP; it runs inside our own event loop on our own thread, so
 * that replies and streams of other threads, timers and hang-ups of suspended connections meet in one place.
 *
 * What a client can hold: one of HTTP_CONNECTIONS_MAX connections, HTTP_HEADER_BYTES, one body of body_bytes_max. The sweep cuts connections off that have
 * let us wait for `patience_s`; when all but a few are taken, the one waited for longest goes at once, so somebody new always gets in.
 */
#include "control/http.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/http_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

/* The library's sockets and this file's loop. The main thread sends the last replies. */
SANDBOX_ALLOW(IN_API, epoll_wait);
SANDBOX_ALLOW(IN_API, epoll_ctl);
SANDBOX_ALLOW(IN_API, timerfd_settime);
SANDBOX_ALLOW(IN_API | IN_MAIN, accept4);
SANDBOX_ALLOW(IN_API | IN_MAIN, recvfrom);
SANDBOX_ALLOW(IN_API | IN_MAIN, sendto);
SANDBOX_ALLOW(IN_API | IN_MAIN, sendmsg);
SANDBOX_ALLOW(IN_API | IN_MAIN, shutdown);
SANDBOX_ALLOW(IN_API, fcntl);
SANDBOX_ALLOW(IN_API, poll);
SANDBOX_ALLOW(IN_API, read);
SANDBOX_ALLOW(IN_API, close);

#define SPARE_CONNECTIONS 4u
#define DISCARD_FACTOR 16u /* bodies too large are read and thrown away up to this many times the bound, so that a client that only sends sees its reply */
#define NS_PER_SECOND 1000000000ull

int http_decode(char *text)
{
    char *out = text;
    for (const char *in = text; *in; in++) {
        if (*in != '%') {
            *out++ = *in;
            continue;
        }
        if (!isxdigit((unsigned char)in[1]) || !isxdigit((unsigned char)in[2]))
            return -EINVAL;
        *out = (char)strtoul((const char[]){in[1], in[2], 0}, NULL, 16);
        if (!*out++)
            return -EINVAL;
        in += 2;
    }
    *out = '\0';
    return 0;
}

/* ---- routes ---- */

/* Splits `path` (changed) along `pattern`; fills call->parameter. */
static bool match(struct http_call *call, const char *pattern, char *path)
{
    call->parameter_count = 0;
    for (;;) {
        while (*pattern && *pattern != '{') {
            if (*pattern++ != *path++)
                return false;
        }
        if (!*pattern)
            return !*path;
        size_t length = strcspn(path, "/");
        if (length == 0 || call->parameter_count == HTTP_PARAMETERS_MAX)
            return false;
        call->parameter[call->parameter_count++] = path;
        pattern += strcspn(pattern, "}") + 1;
        path += length;
        if (*path && *pattern == '/') {
            *path++ = '\0';
            pattern++;
        }
    }
}

static bool decode_parameters(struct http_call *call)
{
    for (unsigned i = 0; i < call->parameter_count; i++)
        if (http_decode((char *)call->parameter[i]))
            return false;
    return true;
}

static bool try_route(struct http_call *call, const struct http_route *route, const char *url)
{
    memcpy(call->path + strlen(url) + 1, url, strlen(url) + 1);
    return match(call, route->path, call->path + strlen(url) + 1);
}

/* Adds a method to the header's value (RFC 9110, section 10.2.1: all that the path has). */
static void allow(struct http_call *call, const char *method)
{
    size_t length = strlen(call->allow);
    if (strstr(call->allow, method) == NULL && length + strlen(method) + 3 <= sizeof call->allow)
        snprintf(call->allow + length, sizeof call->allow - length, "%s%s", length ? ", " : "", method);
}

/* Replies itself when there is none. */
static void find_route(struct http_call *call, const char *method, const char *url)
{
    struct http_server *server = call->server;
    for (unsigned t = 0; t < server->table_count; t++) {
        for (const struct http_route *route = server->table[t].routes; route->method; route++) {
            if (!try_route(call, route, url))
                continue;
            if (strcmp(route->method, method) != 0) {
                allow(call, route->method);
                continue;
            }
            call->allow[0] = '\0';
            call->route = route;
            call->route_ctx = server->table[t].ctx;
            if (!decode_parameters(call))
                http_reply_error(call, 400, "The path is not properly encoded.");
            return;
        }
    }
    http_reply_error(call, call->allow[0] ? 405 : 404, "Invalid request method and/or path: %.16s %.200s.", method, call->path);
}

/* ---- requests ---- */

static struct http_call *call_create(struct http_server *server, struct MHD_Connection *connection, const char *method, const char *url)
{
    struct http_call *call = calloc(1, sizeof *call);
    const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    if (!call || !info || !info->socket_context || !(call->path = malloc(2 * (strlen(url) + 1)))) {
        free(call);
        return NULL;
    }
    strcpy(call->path, url); /* then a copy that is split into parameters */
    call->server = server;
    call->connection = connection;
    call->peer = info->socket_context;
    call->begin_ns = loop_now_ns();
    find_route(call, method, url);
    return call;
}

/* Or that waits to be told to send its body. */
static bool is_hopeless(struct http_call *call)
{
    size_t max = call->server->options.body_bytes_max;
    const char *text = MHD_lookup_connection_value(call->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_CONTENT_LENGTH);
    unsigned long long length = text ? strtoull(text, NULL, 10) : 0;
    bool waits = MHD_lookup_connection_value(call->connection, MHD_HEADER_KIND, MHD_HTTP_HEADER_EXPECT) != NULL;
    call->too_large = length > max;
    return length > DISCARD_FACTOR * max || (call->too_large && waits);
}

static void call_destroy(struct http_call *call)
{
    if (call->stream && !call->queued)
        http_stream_unserve(call->stream);
    for (unsigned i = 0; i < call->query_count; i++)
        free(call->query[i]);
    free(call->path);
    free(call->body);
    free(call->data);
    free(call);
}

static void reply_too_large(struct http_call *call)
{
    free(call->data);
    call->data = NULL;
    call->ready = false;
    http_reply_error(call, 413, "The request's body is larger than the limit of %zu bytes.", call->server->options.body_bytes_max);
}

/* False: no memory, or endless. */
static bool take_body(struct http_call *call, const char *data, size_t size_bytes)
{
    size_t max = call->server->options.body_bytes_max;
    if (call->too_large || size_bytes > max - call->body_bytes) {
        call->too_large = true;
        call->body_room += size_bytes; /* counts what is thrown away now */
        return call->body_room < DISCARD_FACTOR * max;
    }
    if (call->body_bytes + size_bytes + 1 > call->body_room) {
        size_t room = call->body_room ? call->body_room : 512;
        while (room < call->body_bytes + size_bytes + 1)
            room *= 2;
        char *body = realloc(call->body, room);
        if (!body)
            return false;
        call->body = body;
        call->body_room = room;
    }
    memcpy(call->body + call->body_bytes, data, size_bytes);
    call->body_bytes += size_bytes;
    call->body[call->body_bytes] = '\0';
    return true;
}

void http_wait_for_client(struct http_server *server, struct http_connection *peer)
{
    peer->at_work = false;
    peer->since_ns = loop_now_ns();
    TAILQ_REMOVE(&server->connections, peer, link);
    TAILQ_INSERT_TAIL(&server->connections, peer, link);
}

static void dispatch(struct http_call *call)
{
    struct http_server *server = call->server;
    call->dispatched = true;
    call->peer->at_work = true;
    if (server->stopping)
        http_reply_error(call, 503, "The server is stopping.");
    else if (call->too_large)
        reply_too_large(call);
    else if (!call->ready)
        call->route->handler(call, call->route_ctx);
    pthread_mutex_lock(&server->lock);
    bool answered = call->ready || call->deferred;
    pthread_mutex_unlock(&server->lock);
    if (!answered)
        http_reply_error(call, 500, "The request was not answered.");
}

/* MHD calls this when headers have come, for pieces of the body, when all has come, and again after a suspended connection was resumed. */
static enum MHD_Result on_request(void *ctx, struct MHD_Connection *connection, const char *url, const char *method, const char *version,
                                  const char *upload, size_t *upload_bytes, void **con_cls)
{
    struct http_server *server = ctx;
    struct http_call *call = *con_cls;
    if (!call) {
        call = *con_cls = call_create(server, connection, method, url);
        if (!call)
            return MHD_NO;
        if (!is_hopeless(call))
            return MHD_YES;
        dispatch(call); /* before the body comes */
        return http_queue_reply(call);
    }
    if (*upload_bytes) {
        bool taken = take_body(call, upload, *upload_bytes);
        *upload_bytes = 0;
        return taken ? MHD_YES : MHD_NO;
    }
    if (call->queued)
        return MHD_YES;
    if (!call->dispatched)
        dispatch(call);
    pthread_mutex_lock(&server->lock);
    bool ready = call->ready;
    if (!ready) {
        call->suspended = true;
        MHD_suspend_connection(connection);
    }
    pthread_mutex_unlock(&server->lock);
    return ready ? http_queue_reply(call) : MHD_YES;
}

static void on_completed(void *ctx, struct MHD_Connection *connection, void **con_cls, enum MHD_RequestTerminationCode why)
{
    struct http_server *server = ctx;
    struct http_call *call = *con_cls;
    if (!call)
        return;
    *con_cls = NULL;
    http_wait_for_client(server, call->peer);
    call_destroy(call);
}

/* ---- connections ---- */

static void cut_off(struct http_connection *peer)
{
    peer->cut_off = true;
    shutdown(peer->fd, SHUT_RDWR); /* MHD sees the end and cleans up */
}

static void make_place(struct http_server *server)
{
    struct http_connection *peer;
    TAILQ_FOREACH(peer, &server->connections, link)
    {
        if (!peer->at_work && !peer->cut_off) {
            cut_off(peer);
            return;
        }
    }
}

static void on_connection(void *ctx, struct MHD_Connection *connection, void **socket_context, enum MHD_ConnectionNotificationCode code)
{
    struct http_server *server = ctx;
    struct http_connection *peer = *socket_context;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *info = MHD_get_connection_info(connection, MHD_CONNECTION_INFO_CONNECTION_FD);
        peer = info ? calloc(1, sizeof *peer) : NULL;
        *socket_context = peer;
        if (!peer)
            return; /* its requests are refused */
        if (server->connection_count++ == 0)
            loop_timer_arm(server->sweep, loop_now_ns() + NS_PER_SECOND);
        else if (server->connection_count > HTTP_CONNECTIONS_MAX - SPARE_CONNECTIONS)
            make_place(server);
        peer->fd = info->connect_fd;
        peer->since_ns = loop_now_ns();
        TAILQ_INSERT_TAIL(&server->connections, peer, link);
    } else if (peer) {
        TAILQ_REMOVE(&server->connections, peer, link);
        server->connection_count--;
        loop_event_raise(server->again); /* at its limit MHD does not listen, and it looks for room only when it runs */
        free(peer);
    }
}

/* MHD misses an end that came together with the last bytes of half a request. */
static bool is_gone(const struct http_connection *peer)
{
    char byte;
    return recv(peer->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) == 0;
}

static void sweep(void *ctx)
{
    struct http_server *server = ctx;
    uint64_t now = loop_now_ns(), patience = server->options.patience_s * NS_PER_SECOND;
    struct http_connection *peer;
    TAILQ_FOREACH(peer, &server->connections, link)
    {
        if (!peer->at_work && !peer->cut_off && (now - peer->since_ns >= patience || is_gone(peer)))
            cut_off(peer);
    }
    if (server->connection_count)
        loop_timer_arm(server->sweep, now + NS_PER_SECOND);
}

/* ---- the thread ---- */

static void run_mhd(void *ctx)
{
    struct http_server *server = ctx;
    MHD_UNSIGNED_LONG_LONG timeout_ms;
    MHD_run(server->daemon);
    if (MHD_get_timeout(server->daemon, &timeout_ms) == MHD_YES && timeout_ms == 0)
        loop_event_raise(server->again);
}

static void mhd_ready(void *ctx, unsigned events)
{
    run_mhd(ctx);
}

/* Replies and stream data that other threads have left. */
static void resume(void *ctx)
{
    struct http_server *server = ctx;
    pthread_mutex_lock(&server->lock);
    struct http_call *call;
    while ((call = TAILQ_FIRST(&server->resume_calls))) {
        TAILQ_REMOVE(&server->resume_calls, call, resume_link);
        call->suspended = false;
        MHD_resume_connection(call->connection);
    }
    struct http_stream *stream;
    while ((stream = TAILQ_FIRST(&server->resume_streams))) {
        TAILQ_REMOVE(&server->resume_streams, stream, resume_link);
        stream->resume_wanted = false;
        pthread_mutex_unlock(&server->lock);
        http_stream_resume(stream, false);
        pthread_mutex_lock(&server->lock);
    }
    pthread_mutex_unlock(&server->lock);
    run_mhd(server);
}

static void *server_main(void *arg)
{
    struct http_server *server = arg;
    int r = loop_run(server->loop);
    if (r)
        log_error("the API server's loop failed: %s", strerror(-r));
    return NULL;
}

/* ---- life ---- */

static void mhd_log(void *ctx, const char *format, va_list args)
{
    char text[256];
    vsnprintf(text, sizeof text, format, args);
    text[strcspn(text, "\n")] = '\0';
    LOG_GUEST(LOG_DEBUG, "API: %s", text);
}

/* The path is split at its slashes before escapes are resolved; see decode_parameters. */
static size_t keep_escapes(void *ctx, struct MHD_Connection *connection, char *text)
{
    return strlen(text);
}

static int start_mhd(struct http_server *server)
{
    server->daemon = MHD_start_daemon(MHD_USE_EPOLL | MHD_USE_SUSPEND_RESUME | MHD_USE_ERROR_LOG, 0, NULL, NULL, on_request, server,
                                      MHD_OPTION_EXTERNAL_LOGGER, mhd_log, NULL, MHD_OPTION_LISTEN_SOCKET, server->listen_fd,
                                      MHD_OPTION_NOTIFY_COMPLETED, on_completed, server, MHD_OPTION_NOTIFY_CONNECTION, on_connection, server,
                                      MHD_OPTION_UNESCAPE_CALLBACK, keep_escapes, NULL, MHD_OPTION_CONNECTION_LIMIT, HTTP_CONNECTIONS_MAX,
                                      MHD_OPTION_CONNECTION_MEMORY_LIMIT, (size_t)HTTP_HEADER_BYTES, MHD_OPTION_STRICT_FOR_CLIENT, -1,
                                      MHD_OPTION_SIGPIPE_HANDLED_BY_APP, 1, MHD_OPTION_END);
    if (!server->daemon)
        return -ENOMEM;
    server->listen_fd = -1; /* MHD's now */
    const union MHD_DaemonInfo *info = MHD_get_daemon_info(server->daemon, MHD_DAEMON_INFO_EPOLL_FD);
    return info ? loop_fd_add(server->loop, info->epoll_fd, LOOP_READ, mhd_ready, server, &server->watch) : -ENOTSUP;
}

int http_server_create(struct http_server **out, const struct http_options *options, struct error *err)
{
    struct http_server *server = calloc(1, sizeof *server);
    if (!server)
        return error_set(err, -ENOMEM, "out of memory");
    server->options = *options;
    if (!server->options.body_bytes_max)
        server->options.body_bytes_max = HTTP_BODY_BYTES_DEFAULT;
    if (!server->options.patience_s)
        server->options.patience_s = HTTP_PATIENCE_S;
    server->listen_fd = options->path ? -1 : options->listen_fd;
    TAILQ_INIT(&server->connections);
    TAILQ_INIT(&server->resume_calls);
    TAILQ_INIT(&server->resume_streams);
    LIST_INIT(&server->streams);
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->undeferred, NULL);
    int r = loop_create(&server->loop, NULL);
    if (r == 0) {
        server->again = loop_event_create(server->loop, run_mhd, server);
        server->resume = loop_event_create(server->loop, resume, server);
        server->sweep = loop_timer_create(server->loop, sweep, server);
        r = server->again && server->resume && server->sweep ? 0 : -ENOMEM;
    }
    if (r)
        error_set(err, r, "cannot make the API server: %s", strerror(-r));
    if (r == 0 && options->path) {
        r = server->listen_fd = http_listen(options->path, err);
        if (r >= 0)
            r = (server->path = strdup(options->path)) ? 0 : error_set(err, -ENOMEM, "out of memory");
    }
    if (r) {
        http_server_destroy(server);
        return r;
    }
    *out = server;
    return 0;
}

int http_server_socket(const struct http_server *server)
{
    return server->listen_fd;
}

int http_server_add_routes(struct http_server *server, const struct http_route *routes, void *ctx)
{
    if (server->table_count == HTTP_TABLES_MAX)
        return -E2BIG;
    server->table[server->table_count].routes = routes;
    server->table[server->table_count++].ctx = ctx;
    return 0;
}

int http_server_start(struct http_server *server, struct error *err)
{
    int r = library_load(&http_library_file, err);
    if (r)
        return error_prefix(err, "cannot start the API server");
    r = start_mhd(server);
    if (r)
        return error_set(err, r, "cannot start the API server: %s", strerror(-r));
    r = -pthread_create(&server->thread, NULL, server_main, server);
    if (r)
        return error_set(err, r, "cannot start a thread for the API server: %s", strerror(-r));
    server->started = true;
    return 0;
}

int http_server_post(struct http_server *server, void (*fn)(void *ctx), void *ctx)
{
    return loop_post(server->loop, fn, ctx);
}

/* The thread has ended, so nobody else takes streams off the list. */
static void end_streams(struct http_server *server)
{
    for (struct http_stream *stream = LIST_FIRST(&server->streams), *next; stream; stream = next) {
        next = LIST_NEXT(stream, link);
        http_stream_resume(stream, true);
    }
}

void http_server_destroy(struct http_server *server)
{
    if (!server)
        return;
    if (server->started) {
        loop_stop(server->loop);
        pthread_join(server->thread, NULL);
        server->stopping = true;
        pthread_mutex_lock(&server->lock);
        while (server->deferred_count)
            pthread_cond_wait(&server->undeferred, &server->lock);
        pthread_mutex_unlock(&server->lock);
    }
    if (server->daemon) {
        resume(server); /* the last replies go out */
        end_streams(server);
        MHD_run(server->daemon);
        MHD_stop_daemon(server->daemon);
    }
    if (server->path)
        unlink(server->path);
    free(server->path);
    if (server->listen_fd >= 0)
        close(server->listen_fd);
    if (server->again)
        loop_event_destroy(server->again);
    if (server->resume)
        loop_event_destroy(server->resume);
    if (server->sweep)
        loop_timer_destroy(server->sweep);
    loop_destroy(server->loop);
    pthread_cond_destroy(&server->undeferred);
    pthread_mutex_destroy(&server->lock);
    free(server);
}

/* ---- what a handler asks ---- */

const char *http_method(const struct http_call *call)
{
    return call->route->method;
}

const char *http_path(const struct http_call *call)
{
    return call->path;
}

const char *http_parameter(const struct http_call *call, unsigned index)
{
    return index < call->parameter_count ? call->parameter[index] : "";
}

const char *http_query(struct http_call *call, const char *name)
{
    const char *value = NULL;
    if (MHD_lookup_connection_value_n(call->connection, MHD_GET_ARGUMENT_KIND, name, strlen(name), &value, NULL) != MHD_YES)
        return NULL;
    char *copy = call->query_count < HTTP_QUERIES_MAX ? strdup(value ? value : "") : NULL;
    if (!copy || http_decode(copy)) {
        free(copy);
        return NULL;
    }
    return call->query[call->query_count++] = copy;
}

const char *http_body(const struct http_call *call, size_t *size_bytes)
{
    *size_bytes = call->body_bytes;
    return call->body ? call->body : "";
}

const void *http_data(const struct http_call *call)
{
    return call->route->data;
}

json_t *http_body_json(struct http_call *call)
{
    json_error_t why;
    json_t *value = json_loadb(call->body ? call->body : "", call->body_bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &why);
    if (!value)
        http_reply_error(call, 400, "An error occurred when deserializing the json body of a request: %s at line %d column %d.", why.text,
                         why.line < 0 ? 0 : why.line, why.column < 0 ? 0 : why.column);
    return value;
}
