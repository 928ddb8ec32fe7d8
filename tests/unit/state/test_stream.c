/* Frames between two hosts: what goes in comes out, and all that can be wrong with them is told and ends the stream. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "state/stream.h"
#include "util/loop.h"

struct pair {
    struct stream *a, *b;
    int raw; /* of b's other side, when there is no a */
};

static void make_pair(struct pair *pair, bool raw)
{
    int fds[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    pair->raw = raw ? fds[0] : -1;
    pair->a = raw ? NULL : stream_create(fds[0], "a");
    pair->b = stream_create(fds[1], "b");
    assert_non_null(pair->b);
}

static void drop_pair(struct pair *pair)
{
    if (pair->raw >= 0)
        close(pair->raw);
    stream_destroy(pair->a);
    stream_destroy(pair->b);
}

/* More than the socket holds, so that both wait for each other. */
static void *send_many(void *arg)
{
    struct stream *stream = arg;
    struct error err = {0};
    uint8_t *data = malloc(STREAM_BODY_BYTES_MAX);
    assert_non_null(data);
    for (unsigned i = 0; i < 40; i++) {
        size_t size = i % 8 == 7 ? STREAM_BODY_BYTES_MAX - 3 : i * 1000;
        memset(data, (int)i, size);
        assert_int_equal(stream_put(stream, i, "abc", 3, data, size, &err), 0);
    }
    assert_int_equal(stream_flush(stream, &err), 0);
    free(data);
    return NULL;
}

static void test_round_trip(void **state)
{
    struct pair pair;
    struct error err = {0};
    const uint8_t *body;
    unsigned type;
    size_t size;
    pthread_t thread;
    make_pair(&pair, false);
    assert_int_equal(pthread_create(&thread, NULL, send_many, pair.a), 0);
    for (unsigned i = 0; i < 40; i++) {
        assert_int_equal(stream_get(pair.b, &type, &body, &size, &err), 0);
        assert_int_equal(type, i);
        assert_int_equal(size, 3 + (i % 8 == 7 ? STREAM_BODY_BYTES_MAX - 3 : i * 1000));
        assert_memory_equal(body, "abc", 3);
        for (size_t n = 3; n < size; n++)
            assert_int_equal(body[n], (uint8_t)i);
    }
    pthread_join(thread, NULL);
    assert_int_equal(stream_put(pair.a, 1, NULL, 0, "x", STREAM_BODY_BYTES_MAX + 1, &err), -EMSGSIZE);
    stream_destroy(pair.a);
    pair.a = NULL;
    assert_int_equal(stream_get(pair.b, &type, &body, &size, &err), -EPIPE);
    drop_pair(&pair);
}

/* One good frame, changed by `change`, is refused with a word about it; so is everything after it. */
static void refused(void (*change)(uint8_t *frame), int code, const char *word)
{
    struct pair pair, other;
    struct error err = {0};
    uint8_t frame[STREAM_HEADER_BYTES + 4];
    const uint8_t *body;
    unsigned type;
    size_t size;
    make_pair(&pair, true);
    make_pair(&other, true);
    assert_int_equal(stream_put(other.b, 3, "body", 4, NULL, 0, &err), 0);
    assert_int_equal(stream_flush(other.b, &err), 0);
    assert_int_equal(read(other.raw, frame, sizeof frame), sizeof frame);
    change(frame);
    assert_int_equal(write(pair.raw, frame, sizeof frame), sizeof frame);
    assert_int_equal(stream_get(pair.b, &type, &body, &size, &err), code);
    assert_non_null(strstr(err.text, word));
    change(frame);
    assert_int_equal(write(pair.raw, frame, sizeof frame), sizeof frame);
    assert_int_equal(stream_get(pair.b, &type, &body, &size, &err), code);
    drop_pair(&pair);
    drop_pair(&other);
}

static void flip_magic(uint8_t *frame)
{
    frame[0] ^= 1;
}

static void flip_zero(uint8_t *frame)
{
    frame[6] ^= 1;
}

static void flip_length(uint8_t *frame)
{
    frame[10] ^= 0x80;
}

static void flip_number(uint8_t *frame)
{
    frame[12] ^= 1;
}

static void flip_type(uint8_t *frame)
{
    frame[4] ^= 1;
}

static void flip_body(uint8_t *frame)
{
    frame[STREAM_HEADER_BYTES + 3] ^= 0x40;
}

static void test_damaged(void **state)
{
    refused(flip_magic, -EPROTO, "no migration stream");
    refused(flip_zero, -EPROTO, "no migration stream");
    refused(flip_length, -EPROTO, "no migration stream");
    refused(flip_number, -EPROTO, "missing");
    refused(flip_type, -EPROTO, "checksum");
    refused(flip_body, -EPROTO, "checksum");
}

/* Who says nothing, or takes nothing, holds nobody for longer than the deadline; cutting ends a wait, too. */
static void test_waiting(void **state)
{
    static uint8_t data[STREAM_BODY_BYTES_MAX];
    struct pair pair;
    struct error err = {0};
    const uint8_t *body;
    unsigned type;
    size_t size;
    int r = 0;
    make_pair(&pair, true);
    stream_set_deadline(pair.b, loop_now_ns() + 20000000);
    assert_int_equal(stream_get(pair.b, &type, &body, &size, &err), -ETIMEDOUT);
    drop_pair(&pair);
    make_pair(&pair, true);
    stream_set_deadline(pair.b, loop_now_ns() + 20000000);
    for (unsigned i = 0; i < 100 && r == 0; i++)
        r = stream_put(pair.b, 1, data, sizeof data, NULL, 0, &err);
    assert_int_equal(r, -ETIMEDOUT);
    drop_pair(&pair);
    make_pair(&pair, true);
    stream_cut(pair.b);
    assert_int_equal(stream_get(pair.b, &type, &body, &size, &err), -EPIPE);
    drop_pair(&pair);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_waiting),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
