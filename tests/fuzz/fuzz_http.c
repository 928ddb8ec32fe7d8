/*
 * Fuzz target: what a client sends to the HTTP server, headers and all. Input: the bytes of one connection. The handlers echo what they were given, so that reads past an end
 * are seen. Checks that the next client is served.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/http.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

static void echo(struct http_call *call, void *ctx)
{
    size_t size;
    const char *body = http_body(call, &size), *query = http_query(call, "q");
    if (strlen(http_path(call)) + strlen(http_parameter(call, 0)) + strlen(http_parameter(call, 1)) + (query ? strlen(query) : 0) > 1u << 20)
        abort();
    http_reply_data(call, 200, "text/plain", body, size);
}

static void json(struct http_call *call, void *ctx)
{
    json_t *body = http_body_json(call);
    if (body)
        http_reply_json(call, 200, body);
}

static void stream(struct http_call *call, void *ctx)
{
    struct http_stream *stream = http_reply_stream(call, "text/plain", NULL, NULL);
    if (!stream)
        return;
    if (http_stream_write(stream, "text", 4))
        abort();
    http_stream_end(stream);
}

static const struct http_route routes[] = {
    {"GET", "/a/{x}/b/{y}", echo}, {"PUT", "/a/{x}", echo}, {"PUT", "/json", json}, {"GET", "/stream", stream}, {0},
};

struct target {
    struct http_server *server;
    struct sockaddr_un address;
    socklen_t length;
};

/* One for the process: each input is a connection. */
static const struct target *target(void)
{
    static struct target only;
    if (only.server)
        return &only;
    only.address = (struct sockaddr_un){.sun_family = AF_UNIX};
    only.length = sizeof only.address;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    /* An address of the kernel's choice, without a file. */
    if (bind(fd, (struct sockaddr *)&only.address, sizeof(sa_family_t)) || listen(fd, 16) ||
        getsockname(fd, (struct sockaddr *)&only.address, &only.length))
        abort();
    struct http_options options = {.listen_fd = fd, .body_bytes_max = 4096};
    if (http_server_create(&only.server, &options, NULL) || http_server_add_routes(only.server, routes, NULL) || http_server_start(only.server, NULL))
        abort();
    return &only;
}

static int dial(void)
{
    const struct target *to = target();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (const struct sockaddr *)&to->address, to->length))
        abort();
    return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    static const char next[] = "GET /a/x/b/y HTTP/1.1\r\nConnection: close\r\n\r\n";
    char buffer[64] = "";
    int fd = dial();
    if (size_bytes <= 65536) /* less than the socket takes at once, so that this does not wait */
        (void)!send(fd, data, size_bytes, MSG_NOSIGNAL);
    close(fd);
    fd = dial();
    if (send(fd, next, sizeof next - 1, MSG_NOSIGNAL) < 0 || recv(fd, buffer, sizeof buffer - 1, 0) <= 0 || strncmp(buffer, "HTTP/1.1 200", 12) != 0)
        abort();
    close(fd);
    return 0;
}
