/* The HTTP server over its socket: routes, bounds, replies at once and later, streams, and clients that are slow, many or gone. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/http.h"

struct rig {
    struct http_server *server;
    char path[64];
    struct http_stream *stream;
    struct http_call *deferred;
    sem_t event; /* a stream began or closed, a call was deferred */
    unsigned closed, answered;
};

static void echo(struct http_call *call, void *ctx)
{
    size_t size;
    const char *body = http_body(call, &size), *query = http_query(call, "q");
    http_reply_json(call, 200, json_pack("{s:s, s:s, s:s, s:I, s:s, s:s}", "method", http_method(call), "first", http_parameter(call, 0), "second",
                                         http_parameter(call, 1), "size", (json_int_t)size, "body", size < 100 ? body : "", "query", query ? query : "none"));
}

static void json(struct http_call *call, void *ctx)
{
    json_t *body = http_body_json(call);
    if (body)
        http_reply_json(call, 200, body);
}

static void nothing(struct http_call *call, void *ctx)
{
}

static void empty(struct http_call *call, void *ctx)
{
    http_reply_empty(call, 204);
}

static void defer(struct http_call *call, void *ctx)
{
    struct rig *rig = ctx;
    rig->deferred = call;
    http_defer(call);
    sem_post(&rig->event);
}

static void closed(void *ctx)
{
    struct rig *rig = ctx;
    rig->closed++;
    sem_post(&rig->event);
}

static void stream(struct http_call *call, void *ctx)
{
    struct rig *rig = ctx;
    rig->stream = http_reply_stream(call, "text/event-stream", closed, rig);
    sem_post(&rig->event);
}

static void answered(void *ctx, const char *method, const char *path, unsigned status, uint64_t duration_ns)
{
    ((struct rig *)ctx)->answered++;
}

static const struct http_route routes[] = {
    {"GET", "/things/{id}", echo},  {"PUT", "/things/{id}", echo}, {"GET", "/things/{id}/parts/{part}", echo}, {"GET", "/", empty},
    {"PUT", "/json", json},         {"GET", "/nothing", nothing},  {"GET", "/defer", defer},                   {"GET", "/stream", stream}, {0},
};

static int start(struct rig *rig, unsigned patience_s)
{
    struct error err = {0};
    *rig = (struct rig){0};
    sem_init(&rig->event, 0, 0);
    snprintf(rig->path, sizeof rig->path, "/tmp/doppel-http-%d.sock", (int)getpid());
    struct http_options options = {.path = rig->path, .body_bytes_max = 1000, .patience_s = patience_s, .answered = answered, .answered_ctx = rig};
    int r = http_server_create(&rig->server, &options, &err);
    if (r == 0)
        r = http_server_add_routes(rig->server, routes, rig);
    if (r == 0)
        r = http_server_start(rig->server, &err);
    if (r)
        print_error("%s\n", err.text);
    return r;
}

static int dial(const struct rig *rig)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = 20};
    strcpy(address.sun_path, rig->path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
}

static void say(int fd, const char *text)
{
    assert_int_equal(send(fd, text, strlen(text), MSG_NOSIGNAL), strlen(text));
}

/* Reads until `end` has come; "" matches the connection's end. */
static char *hear(int fd, const char *end)
{
    static char text[1 << 20];
    size_t count = 0;
    for (;;) {
        ssize_t n = recv(fd, text + count, sizeof text - 1 - count, 0);
        assert_true(n >= 0 || errno == ECONNRESET);
        if (n <= 0)
            break;
        text[count += (size_t)n] = '\0';
        if (*end && strstr(text, end))
            break;
    }
    text[count] = '\0';
    return text;
}

static void expect(struct rig *rig, const char *request, const char *status, const char *contains)
{
    char line[16];
    int fd = dial(rig);
    say(fd, request);
    shutdown(fd, SHUT_WR);
    char *text = hear(fd, "");
    close(fd);
    snprintf(line, sizeof line, "HTTP/1.1 %s", status);
    if (strncmp(text, line, strlen(line)) != 0 || !strstr(text, contains))
        fail_msg("\"%s\" got \"%s\" instead of %s with %s", request, text, status, contains);
}

#define END " HTTP/1.1\r\nConnection: close\r\n\r\n"

static void requests(void **state)
{
    struct rig rig;
    assert_int_equal(start(&rig, 0), 0);
    expect(&rig, "GET /" END, "204", "");
    expect(&rig, "GET /things/a%20b" END, "200", "\"first\":\"a b\"");
    expect(&rig, "GET /things/a%2Fb/parts/c?q=x%26y" END, "200", "\"first\":\"a/b\",\"second\":\"c\",\"size\":0,\"body\":\"\",\"query\":\"x&y\"");
    expect(&rig, "GET /things/a%00b" END, "400", "fault_message");
    expect(&rig, "GET /things/a%zzb" END, "400", "fault_message");
    expect(&rig, "GET /things/" END, "404", "Invalid request method and/or path: GET /things/.");
    expect(&rig, "GET /things/a/" END, "404", "fault_message");
    expect(&rig, "GET /thing" END, "404", "fault_message");
    expect(&rig, "DELETE /things/a" END, "405", "Allow: GET, PUT\r\n");
    expect(&rig, "GET /nothing" END, "500", "not answered");
    expect(&rig, "PUT /things/a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "200", "\"body\":\"abc\"");
    expect(&rig, "PUT /things/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n", "200", "\"body\":\"abc\"");
    expect(&rig, "PUT /json HTTP/1.1\r\nContent-Length: 13\r\n\r\n{\"a\":1,\"a\":2}", "400", "duplicate object key");
    expect(&rig, "PUT /json HTTP/1.1\r\nContent-Length: 7\r\n\r\n{\"a\":1}", "200", "{\"a\":1}");
    expect(&rig, "PUT /json HTTP/1.1\r\nContent-Length: 3\r\n\r\n\xff\xfe{", "400", "fault_message");
    expect(&rig, "PUT /json HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "400", "deserializing the json body");
    assert_int_equal(rig.answered, 16);
    http_server_destroy(rig.server);
    assert_int_equal(access(rig.path, F_OK), -1);
}

static void bounds(void **state)
{
    struct rig rig;
    static char request[70000];
    assert_int_equal(start(&rig, 0), 0);
    expect(&rig, "PUT /things/a HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", "413", "");
    expect(&rig, "PUT /things/a HTTP/1.1\r\nContent-Length: 100000\r\n\r\n", "413", "1000 bytes"); /* without waiting for the body */
    expect(&rig, "PUT /things/a HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n", "413", "1000 bytes");
    int n = sprintf(request, "PUT /things/a HTTP/1.1\r\nContent-Length: 1000\r\n\r\n");
    memset(request + n, 'x', 1000);
    request[n + 1000] = '\0';
    expect(&rig, request, "200", "\"size\":1000");
    n = sprintf(request, "PUT /things/a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n");
    memset(request + n, 'x', 1001);
    strcpy(request + n + 1001, "\r\n0\r\n\r\n");
    expect(&rig, request, "413", "1000 bytes");
    n = sprintf(request, "GET / HTTP/1.1\r\nX: ");
    memset(request + n, 'x', 60000);
    strcpy(request + n + 60000, "\r\n\r\n");
    expect(&rig, request, "431", "");
    http_server_destroy(rig.server);
}

static void keeps_alive(void **state)
{
    struct rig rig;
    assert_int_equal(start(&rig, 0), 0);
    int fd = dial(&rig), half = dial(&rig);
    say(half, "PUT /things/a HTTP/1.1\r\nContent-Length: 10\r\n\r\nabc"); /* never more */
    for (unsigned i = 0; i < 1000; i++) {
        say(fd, "GET / HTTP/1.1\r\n\r\n");
        assert_non_null(strstr(hear(fd, "\r\n\r\n"), "204"));
    }
    say(fd, "GET /things/1 HTTP/1.1\r\n\r\nGET /things/2 HTTP/1.1\r\n\r\n"); /* both at once */
    assert_non_null(strstr(hear(fd, "\"first\":\"2\""), "\"first\":\"1\""));
    close(fd);
    close(half);
    http_server_destroy(rig.server);
}

/* Connections that send nothing, as many as there can be, do not keep others out; and they are cut off after a while. */
static void crowd(void **state)
{
    struct rig rig;
    int fd[2 * HTTP_CONNECTIONS_MAX];
    assert_int_equal(start(&rig, 1), 0);
    for (unsigned i = 0; i < 2 * HTTP_CONNECTIONS_MAX; i++) {
        fd[i] = dial(&rig);
        say(fd[i], "GET / HTT");
    }
    expect(&rig, "GET /" END, "204", "");
    for (unsigned i = 0; i < 2 * HTTP_CONNECTIONS_MAX; i++) {
        assert_null(strstr(hear(fd[i], ""), "204"));
        close(fd[i]);
    }
    http_server_destroy(rig.server);
}

static void later(void **state)
{
    struct rig rig;
    assert_int_equal(start(&rig, 0), 0);
    int fd = dial(&rig);
    say(fd, "GET /defer" END);
    sem_wait(&rig.event);
    expect(&rig, "GET /" END, "204", ""); /* others go on */
    http_reply_error(rig.deferred, 400, "no \"such\" thing");
    assert_non_null(strstr(hear(fd, ""), "{\"fault_message\":\"no \\\"such\\\" thing\"}"));
    close(fd);
    fd = dial(&rig); /* a client that has gone before the reply */
    say(fd, "GET /defer" END);
    sem_wait(&rig.event);
    close(fd);
    http_reply_empty(rig.deferred, 204);
    expect(&rig, "GET /" END, "204", "");
    http_server_destroy(rig.server);
}

static void streams(void **state)
{
    struct rig rig;
    static char piece[HTTP_STREAM_BYTES];
    assert_int_equal(start(&rig, 1), 0);
    int fd = dial(&rig);
    say(fd, "GET /stream" END);
    sem_wait(&rig.event);
    assert_int_equal(http_stream_write(rig.stream, "data: one\n\n", 11), 0);
    hear(fd, "data: one");
    assert_int_equal(http_stream_write(rig.stream, "data: two\n\n", 11), 0);
    http_stream_end(rig.stream);
    assert_non_null(strstr(hear(fd, ""), "data: two"));
    close(fd);
    assert_int_equal(rig.closed, 0);

    fd = dial(&rig); /* a client that leaves while nothing is sent */
    say(fd, "GET /stream" END);
    sem_wait(&rig.event);
    assert_int_equal(http_stream_write(rig.stream, "x", 1), 0);
    hear(fd, "x\r\n");
    close(fd);
    sem_wait(&rig.event);
    assert_int_equal(rig.closed, 1);
    assert_int_equal(http_stream_write(rig.stream, "x", 1), -EPIPE);
    http_stream_end(rig.stream);

    fd = dial(&rig); /* one that does not read: told to the writer, and cut off after the stream's end */
    say(fd, "GET /stream" END);
    sem_wait(&rig.event);
    memset(piece, 'x', sizeof piece);
    int r;
    while ((r = http_stream_write(rig.stream, piece, sizeof piece / 16)) == 0)
        continue;
    assert_int_equal(r, -ENOBUFS);
    expect(&rig, "GET /" END, "204", "");
    http_stream_end(rig.stream);
    close(fd);
    http_server_destroy(rig.server);
}

static void ends_with_open_stream(void **state)
{
    struct rig rig;
    assert_int_equal(start(&rig, 0), 0);
    int fd[HTTP_STREAMS_MAX];
    struct http_stream *stream[HTTP_STREAMS_MAX];
    for (unsigned i = 0; i < HTTP_STREAMS_MAX; i++) {
        fd[i] = dial(&rig);
        say(fd[i], "GET /stream" END);
        sem_wait(&rig.event);
        assert_non_null(stream[i] = rig.stream);
        if (i % 2)
            assert_int_equal(http_stream_write(stream[i], "x", 1), 0);
    }
    expect(&rig, "GET /stream" END, "503", "too many streams");
    http_stream_end(stream[0]);
    http_server_destroy(rig.server);
    assert_int_equal(rig.closed, HTTP_STREAMS_MAX - 1);
    for (unsigned i = 0; i < HTTP_STREAMS_MAX; i++) {
        if (i)
            http_stream_end(stream[i]);
        close(fd[i]);
    }
}

static void sockets(void **state)
{
    struct rig rig, other;
    struct stat st;
    assert_int_equal(start(&rig, 0), 0);
    assert_int_equal(stat(rig.path, &st), 0);
    assert_int_equal(st.st_mode & 07777, 0600);
    struct error err = {0};
    struct http_options options = {.path = rig.path};
    assert_int_equal(http_server_create(&other.server, &options, &err), -EADDRINUSE);
    assert_non_null(strstr(err.text, "cannot open the API socket at"));
    http_server_destroy(rig.server);

    /* A socket left over is replaced, a file is not. */
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, rig.path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&address, sizeof address), 0);
    close(fd);
    assert_int_equal(start(&rig, 0), 0);
    http_server_destroy(rig.server);
    fclose(fopen(rig.path, "w"));
    assert_int_equal(http_server_create(&other.server, &options, &err), -EADDRINUSE);
    unlink(rig.path);
    options.path = "/tmp/0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789012345678901";
    assert_int_equal(http_server_create(&other.server, &options, &err), -ENAMETOOLONG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(requests), cmocka_unit_test(bounds),  cmocka_unit_test(keeps_alive),           cmocka_unit_test(crowd),
        cmocka_unit_test(later),    cmocka_unit_test(streams), cmocka_unit_test(ends_with_open_stream), cmocka_unit_test(sockets),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
