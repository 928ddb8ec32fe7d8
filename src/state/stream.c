/* Frames (stream.h). The descriptor does not block; waiting is poll() up to the deadline, so that a peer that is slow on purpose holds nobody longer than that. */
#include "state/stream.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <xxhash.h>

#include "util/loop.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API | IN_LOOP | IN_MAIN, read);
SANDBOX_ALLOW(IN_API | IN_LOOP | IN_MAIN, write);
SANDBOX_ALLOW(IN_API | IN_LOOP | IN_MAIN, poll);
SANDBOX_ALLOW(IN_API, fcntl);
SANDBOX_ALLOW(IN_API | IN_MAIN, close);
SANDBOX_ALLOW(IN_API | IN_MAIN, shutdown);

#define MAGIC 0x464d5044u /* "DPMF" */
#define FRAME_BYTES_MAX (STREAM_HEADER_BYTES + STREAM_BODY_BYTES_MAX)
#define SEND_BYTES (512u << 10) /* sent when so much has come together */

struct stream {
    int fd;
    const char *peer;
    int put_failed, get_failed; /* 0 or -errno */
    uint64_t deadline_ns, sent_bytes;
    uint32_t put_number, get_number;
    size_t out_bytes;           /* appended and not sent */
    size_t in_begin, in_end;    /* received and not taken */
    uint8_t out[FRAME_BYTES_MAX], in[FRAME_BYTES_MAX];
};

void stream_put_number(uint8_t *at, uint64_t value, unsigned bytes)
{
    for (unsigned i = 0; i < bytes; i++)
        at[i] = (uint8_t)(value >> 8 * i);
}

uint64_t stream_number(const uint8_t *at, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << 8 * i;
    return value;
}

struct stream *stream_create(int fd, const char *peer)
{
    struct stream *stream = malloc(sizeof *stream);
    int flags = fcntl(fd, F_GETFL);
    if (!stream || flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK)) {
        free(stream);
        close(fd);
        return NULL;
    }
    memset(stream, 0, offsetof(struct stream, out));
    stream->fd = fd;
    stream->peer = peer;
    return stream;
}

void stream_destroy(struct stream *stream)
{
    if (!stream)
        return;
    close(stream->fd);
    free(stream);
}

int stream_descriptor(const struct stream *stream)
{
    return stream->fd;
}

bool stream_has_frame(const struct stream *stream)
{
    size_t here = stream->in_end - stream->in_begin;
    return stream->get_failed || (here >= STREAM_HEADER_BYTES && here - STREAM_HEADER_BYTES >= stream_number(stream->in + stream->in_begin + 8, 4));
}

void stream_set_peer(struct stream *stream, const char *peer)
{
    stream->peer = peer;
}

void stream_set_deadline(struct stream *stream, uint64_t deadline_ns)
{
    stream->deadline_ns = deadline_ns;
}

uint64_t stream_bytes_sent(const struct stream *stream)
{
    return stream->sent_bytes;
}

void stream_cut(struct stream *stream)
{
    shutdown(stream->fd, SHUT_RDWR);
}

static int fail(const struct stream *stream, int *failed, int code, struct error *err, const char *why)
{
    *failed = code;
    return error_set(err, code, "%s: %s", stream->peer, why);
}

static int fail_io(const struct stream *stream, int *failed, int number, struct error *err)
{
    if (number == EPIPE || number == ECONNRESET)
        return fail(stream, failed, -EPIPE, err, "the connection was closed");
    return fail(stream, failed, -number, err, number == ETIMEDOUT ? "it did not answer in time" : strerror(number));
}

/* 0, or an error number. Also looks at the deadline when there is no need to wait: who sends a byte now and then gets no further either. */
static int wait_for(struct stream *stream, short events)
{
    for (;;) {
        int timeout_ms = -1;
        if (stream->deadline_ns) {
            uint64_t now = loop_now_ns(), left_ms = now < stream->deadline_ns ? (stream->deadline_ns - now) / 1000000 + 1 : 0;
            if (!left_ms)
                return ETIMEDOUT;
            timeout_ms = left_ms < 1000000 ? (int)left_ms : 1000000;
        }
        struct pollfd poll_fd = {.fd = stream->fd, .events = events};
        int n = poll(&poll_fd, 1, timeout_ms);
        if (n > 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return errno;
    }
}

/* ---- sending ---- */

int stream_flush(struct stream *stream, struct error *err)
{
    size_t done = 0;
    if (stream->put_failed)
        return fail(stream, &stream->put_failed, stream->put_failed, err, "the connection has failed before");
    while (done < stream->out_bytes) {
        ssize_t n = write(stream->fd, stream->out + done, stream->out_bytes - done);
        int number = n >= 0 ? 0 : errno;
        if (number == EAGAIN)
            number = wait_for(stream, POLLOUT);
        if (number && number != EINTR)
            return fail_io(stream, &stream->put_failed, number, err);
        done += n > 0 ? (size_t)n : 0;
    }
    stream->sent_bytes += done;
    stream->out_bytes = 0;
    return 0;
}

static uint64_t check_of(const uint8_t *header, const uint8_t *body, size_t size)
{
    return XXH3_64bits_withSeed(body, size, XXH3_64bits(header, STREAM_HEADER_BYTES - 8));
}

int stream_put(struct stream *stream, unsigned type, const void *head, size_t head_bytes, const void *data, size_t data_bytes, struct error *err)
{
    size_t size = head_bytes + data_bytes;
    if (size > STREAM_BODY_BYTES_MAX)
        return error_set(err, -EMSGSIZE, "%s: %zu bytes are too many for one message", stream->peer, size);
    if (stream->put_failed || stream->out_bytes + STREAM_HEADER_BYTES + size > sizeof stream->out) {
        int r = stream_flush(stream, err);
        if (r)
            return r;
    }
    uint8_t *header = stream->out + stream->out_bytes, *body = header + STREAM_HEADER_BYTES;
    if (head_bytes)
        memcpy(body, head, head_bytes);
    if (data_bytes)
        memcpy(body + head_bytes, data, data_bytes);
    stream_put_number(header, MAGIC, 4);
    stream_put_number(header + 4, type, 2);
    stream_put_number(header + 6, 0, 2);
    stream_put_number(header + 8, size, 4);
    stream_put_number(header + 12, stream->put_number++, 4);
    stream_put_number(header + 16, check_of(header, body, size), 8);
    stream->out_bytes += STREAM_HEADER_BYTES + size;
    return stream->out_bytes >= SEND_BYTES ? stream_flush(stream, err) : 0;
}

/* ---- receiving ---- */

/* At least so many bytes from in_begin on. */
static int have(struct stream *stream, size_t size, struct error *err)
{
    if (stream->in_begin + size > sizeof stream->in) {
        memmove(stream->in, stream->in + stream->in_begin, stream->in_end - stream->in_begin);
        stream->in_end -= stream->in_begin;
        stream->in_begin = 0;
    }
    while (stream->in_end - stream->in_begin < size) {
        int number = wait_for(stream, POLLIN);
        ssize_t n = number ? 0 : read(stream->fd, stream->in + stream->in_end, sizeof stream->in - stream->in_end);
        if (n < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (number || n <= 0)
            return fail_io(stream, &stream->get_failed, number ? number : n < 0 ? errno : EPIPE, err);
        stream->in_end += (size_t)n;
    }
    return 0;
}

int stream_get(struct stream *stream, unsigned *type, const uint8_t **body, size_t *size_bytes, struct error *err)
{
    int r = stream->get_failed ? fail(stream, &stream->get_failed, stream->get_failed, err, "the connection has failed before") : 0;
    if (r == 0 && stream->in_begin == stream->in_end)
        stream->in_begin = stream->in_end = 0;
    if (r == 0)
        r = have(stream, STREAM_HEADER_BYTES, err);
    if (r)
        return r;
    const uint8_t *header = stream->in + stream->in_begin;
    size_t size = stream_number(header + 8, 4);
    if (stream_number(header, 4) != MAGIC || stream_number(header + 6, 2) || size > STREAM_BODY_BYTES_MAX)
        return fail(stream, &stream->get_failed, -EPROTO, err, "what comes is no migration stream");
    if (stream_number(header + 12, 4) != stream->get_number)
        return fail(stream, &stream->get_failed, -EPROTO, err, "a message is missing, or came twice");
    r = have(stream, STREAM_HEADER_BYTES + size, err);
    if (r)
        return r;
    header = stream->in + stream->in_begin;
    if (stream_number(header + 16, 8) != check_of(header, header + STREAM_HEADER_BYTES, size))
        return fail(stream, &stream->get_failed, -EPROTO, err, "a message was damaged on its way (checksum)");
    *type = (unsigned)stream_number(header + 4, 2);
    *body = header + STREAM_HEADER_BYTES;
    *size_bytes = size;
    stream->get_number++;
    stream->in_begin += STREAM_HEADER_BYTES + size;
    return 0;
}
