/* The client side of HTTP over a Unix socket (client.h): small, because the only server it talks to is our own. */
#include "control/client.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "control/instance.h"
#include "util/loop.h"

struct text {
    char *data;
    size_t count, room;
};

/* Waits for the socket; -ETIMEDOUT. */
static int wait_ready(int fd, short events, uint64_t deadline_ns)
{
    uint64_t now = loop_now_ns();
    struct pollfd ready = {.fd = fd, .events = events};
    int n = poll(&ready, 1, now < deadline_ns ? (int)((deadline_ns - now) / 1000000) + 1 : 0);
    return n > 0 ? 0 : n < 0 && errno == EINTR ? 0 : n < 0 ? -errno : -ETIMEDOUT;
}

static int send_all(int fd, const char *data, size_t size_bytes, uint64_t deadline_ns)
{
    int r = 0;
    while (size_bytes && r == 0) {
        ssize_t n = send(fd, data, size_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            data += n;
            size_bytes -= (size_t)n;
        } else if (errno == EAGAIN || errno == EINTR) {
            r = wait_ready(fd, POLLOUT, deadline_ns);
        } else {
            r = -errno;
        }
    }
    return r;
}

/* Until the other side ends. */
static int receive_all(int fd, struct text *text, uint64_t deadline_ns)
{
    for (;;) {
        if (text->room - text->count < 4096) {
            char *data = text->room < CLIENT_ANSWER_BYTES_MAX ? realloc(text->data, text->room + 65536) : NULL;
            if (!data)
                return -EMSGSIZE;
            text->data = data;
            text->room += 65536;
        }
        ssize_t n = recv(fd, text->data + text->count, text->room - text->count - 1, MSG_DONTWAIT);
        if (n == 0) {
            text->data[text->count] = '\0';
            return 0;
        }
        int r = n > 0 ? 0 : errno == EAGAIN || errno == EINTR ? wait_ready(fd, POLLIN, deadline_ns) : -errno;
        if (r)
            return r;
        text->count += n > 0 ? (size_t)n : 0;
    }
}

/* Status line, headers, body; `body` gets where that begins. */
static int understand(const struct text *text, const char **body, struct error *err)
{
    unsigned status = 0;
    *body = text->count ? strstr(text->data, "\r\n\r\n") : NULL;
    if (!*body || sscanf(text->data, "HTTP/1.%*1[01] %3u", &status) != 1)
        return error_set(err, -EPROTO, "it gave no answer");
    *body += 4;
    if (status >= 200 && status <= 299)
        return 0;
    json_t *value = json_loads(*body, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, NULL);
    const char *why = json_string_value(json_object_get(value, "fault_message"));
    error_set(err, -EREMOTEIO, "%s", why ? why : "it refused");
    json_decref(value);
    return -EREMOTEIO;
}

static int talk(int fd, const char *method, const char *path, const json_t *body, uint64_t deadline_ns, struct text *text)
{
    char head[512], *payload = body ? json_dumps(body, JSON_COMPACT) : NULL;
    size_t payload_bytes = payload ? strlen(payload) : 0;
    int length = snprintf(head, sizeof head, "%s %s HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n", method, path, payload_bytes);
    int r = (body && !payload) || length >= (int)sizeof head ? -EINVAL : send_all(fd, head, (size_t)length, deadline_ns);
    if (r == 0)
        r = send_all(fd, payload, payload_bytes, deadline_ns);
    free(payload);
    return r && r != -EPIPE ? r : receive_all(fd, text, deadline_ns); /* who ends early may have answered before */
}

/* `answer` is of text->data, which the caller frees. */
static int request(const char *vm, const char *method, const char *path, const json_t *body, int timeout_ms, struct text *text, const char **answer, struct error *err)
{
    int fd = instance_connect(vm, "api.sock");
    int r = fd < 0 ? fd : talk(fd, method, path, body, loop_now_ns() + (uint64_t)timeout_ms * 1000000, text);
    if (r)
        error_set(err, r, "%s", r == -ECONNREFUSED || r == -ENOENT ? "it is not running" : r == -ETIMEDOUT ? "it does not answer" : strerror(-r));
    else
        r = understand(text, answer, err);
    if (fd >= 0)
        close(fd);
    if (r)
        error_prefix(err, "%s", vm);
    return r;
}

int client_request(const char *vm, const char *method, const char *path, const json_t *body, int timeout_ms, json_t **answer, struct error *err)
{
    struct text text = {0};
    const char *content;
    int r = request(vm, method, path, body, timeout_ms, &text, &content, err);
    if (answer)
        *answer = r == 0 && *content ? json_loads(content, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, NULL) : NULL;
    free(text.data);
    return r;
}

int client_get_text(const char *vm, const char *path, int timeout_ms, char **answer, struct error *err)
{
    struct text text = {0};
    const char *content;
    int r = request(vm, "GET", path, NULL, timeout_ms, &text, &content, err);
    if (r == 0 && !(*answer = strdup(content)))
        r = error_set(err, -ENOMEM, "out of memory");
    free(text.data);
    return r;
}

/* What comes until the answer's head is complete, and perhaps more. */
static int receive_head(int fd, struct text *text)
{
    while (text->count < text->room - 1 && !(text->count && strstr(text->data, "\r\n\r\n"))) {
        ssize_t n = recv(fd, text->data + text->count, text->room - text->count - 1, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : 0;
        text->count += (size_t)n;
        text->data[text->count] = '\0';
    }
    return 0;
}

static int receive_stream(int fd, const char *path, int (*take)(void *ctx, const char *data, size_t size_bytes), void *ctx, struct error *err)
{
    char head[256], data[16384] = "";
    struct text text = {.data = data, .room = sizeof data};
    const char *body;
    int length = snprintf(head, sizeof head, "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n", path);
    int r = send_all(fd, head, (size_t)length, UINT64_MAX);
    if (r == 0)
        r = receive_head(fd, &text);
    if (r)
        return error_set(err, r, "%s", strerror(-r));
    if ((r = understand(&text, &body, err)))
        return r;
    int stop = take(ctx, body, text.count - (size_t)(body - data));
    while (!stop) {
        ssize_t n = recv(fd, data, sizeof data, 0);
        if (n < 0 && errno != EINTR)
            return error_set(err, -errno, "%s", strerror(errno));
        if (n == 0)
            break;
        stop = n > 0 ? take(ctx, data, (size_t)n) : 0;
    }
    return 0;
}

int client_get_stream(const char *vm, const char *path, int (*take)(void *ctx, const char *data, size_t size_bytes), void *ctx, struct error *err)
{
    int fd = instance_connect(vm, "api.sock");
    int r = fd < 0 ? error_set(err, fd, "%s", fd == -ECONNREFUSED || fd == -ENOENT ? "it is not running" : strerror(-fd)) : receive_stream(fd, path, take, ctx, err);
    if (fd >= 0)
        close(fd);
    if (r)
        error_prefix(err, "%s", vm);
    return r;
}
