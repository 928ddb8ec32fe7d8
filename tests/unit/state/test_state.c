/*
 * Saved sections: round trips, nesting, and every way in which a snapshot can be wrong.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state/state.h"

struct inner {
    uint16_t a;
    bool flag;
};

struct part {
    uint8_t a;
    uint32_t b;
    uint64_t c;
    int64_t d;
    uint8_t bytes[5];
    uint32_t used;
    uint8_t buffer[8];
    struct inner inner[2];
};

static const struct part sample = {
    0x12, 0x89ABCDEF, 0x0123456789ABCDEF, -5, {1, 2, 3, 4, 5}, 3, {7, 8, 9}, {{0xFFFF, true}, {1, false}},
};

static int inner_state(struct inner *inner, struct state_io *io)
{
    state_begin(io, "inner", 2);
    state_u16(io, &inner->a);
    state_bool(io, &inner->flag);
    return state_end(io);
}

static int part_state(struct part *part, struct state_io *io)
{
    int ret = 0;

    state_begin(io, "part", 1);
    state_u8(io, &part->a);
    state_u32(io, &part->b);
    state_u64(io, &part->c);
    state_i64(io, &part->d);
    state_bytes(io, part->bytes, sizeof(part->bytes));
    state_buffer(io, part->buffer, &part->used, sizeof(part->buffer));
    for (unsigned i = 0; i < 2; i++)
        ret = inner_state(&part->inner[i], io) ?: ret;
    return state_end(io) ?: ret;
}

/* Saves the sample; the caller frees. */
static uint8_t *saved(size_t *size)
{
    struct state_io *io = state_writer_create();
    struct part part = sample;
    uint8_t *copy;

    assert_false(state_loading(io));
    assert_int_equal(part_state(&part, io), 0);
    assert_string_equal(state_error(io), "");
    const void *data = state_writer_data(io, size);
    copy = malloc(*size);
    memcpy(copy, data, *size);
    state_io_destroy(io);
    return copy;
}

static int load(const void *data, size_t size, struct part *part, char error[256])
{
    struct state_io *io = state_reader_create(data, size);
    int ret = part_state(part, io);

    assert_int_equal(state_failed(io), ret != 0);
    strcpy(error, state_error(io));
    state_io_destroy(io);
    return ret;
}

static void test_round_trip(void **state)
{
    size_t size;
    uint8_t *data = saved(&size);
    struct part part;
    char error[256];

    memset(&part, 0xEE, sizeof(part));
    assert_int_equal(load(data, size, &part, error), 0);
    assert_int_equal(part.a, sample.a);
    assert_int_equal(part.b, sample.b);
    assert_true(part.c == sample.c && part.d == sample.d);
    assert_memory_equal(part.bytes, sample.bytes, sizeof(part.bytes));
    assert_int_equal(part.used, 3);
    assert_memory_equal(part.buffer, sample.buffer, 3);
    assert_int_equal(part.inner[0].a, 0xFFFF);
    assert_true(part.inner[0].flag);
    assert_false(part.inner[1].flag);
    free(data);
}

/* The format is a promise: a known section, byte for byte. 0xCBF43926 is the published check value of CRC-32 for "123456789". */
static void test_format(void **state)
{
    struct state_io *io = state_writer_create();
    uint8_t nine[9] = {'1', '2', '3', '4', '5', '6', '7', '8', '9'};
    const uint8_t expected[] = {
        'D', 'P', 'S', 'T', 2,   'h', 'i', 3,   0,   0,   0,   9,    0,    0,    0,    0,
        0,   0,   0,   '1', '2', '3', '4', '5', '6', '7', '8', '9', 0x26, 0x39, 0xF4, 0xCB,
    };
    size_t size;

    state_begin(io, "hi", 3);
    state_bytes(io, nine, sizeof(nine));
    assert_int_equal(state_end(io), 0);
    const void *data = state_writer_data(io, &size);
    assert_int_equal(size, sizeof(expected));
    assert_memory_equal(data, expected, size);
    state_io_destroy(io);
}

static void test_truncated(void **state)
{
    size_t size;
    uint8_t *data = saved(&size);
    struct part part;
    char error[256];

    for (size_t cut = 0; cut < size; cut++) {
        uint8_t *piece = malloc(cut ? cut : 1); /* so that a sanitizer sees reads behind the end */

        memcpy(piece, data, cut);
        assert_int_equal(load(piece, cut, &part, error), -EINVAL);
        assert_true(error[0] != '\0');
        free(piece);
    }
    free(data);
}

static void test_corrupted(void **state)
{
    size_t size;
    uint8_t *data = saved(&size);
    struct part part;
    char error[256];

    for (size_t at = 0; at < size; at++) {
        for (unsigned bit = 0; bit < 8; bit++) {
            data[at] ^= 1u << bit;
            /* Only the version (here 1 -> other numbers) is outside the checksum, and no other version is known. */
            assert_int_equal(load(data, size, &part, error), -EINVAL);
            data[at] ^= 1u << bit;
        }
    }
    assert_int_equal(load(data, size, &part, error), 0);
    free(data);
}

static void test_names_and_versions(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    uint32_t value = 77;
    size_t size;

    state_begin(writer, "pit", 2);
    state_u32(writer, &value);
    assert_int_equal(state_end(writer), 0);
    const void *data = state_writer_data(writer, &size);

    reader = state_reader_create(data, size);
    assert_int_equal(state_begin(reader, "pit", 3), 2); /* older than this program */
    state_u32(reader, &value);
    assert_int_equal(state_end(reader), 0);
    assert_int_equal(value, 77);
    state_io_destroy(reader);

    reader = state_reader_create(data, size);
    state_begin(reader, "pit", 1); /* newer than this program */
    state_u32(reader, &value);
    assert_int_equal(value, 0);
    assert_int_equal(state_end(reader), -EINVAL);
    assert_non_null(strstr(state_error(reader), "version 2"));
    state_io_destroy(reader);

    reader = state_reader_create(data, size);
    state_begin(reader, "rtc", 2);
    assert_int_equal(state_end(reader), -EINVAL);
    assert_non_null(strstr(state_error(reader), "\"rtc\" expected"));
    state_io_destroy(reader);

    reader = state_reader_create(data, size);
    state_begin(reader, "pit", 2); /* reads too little */
    assert_int_equal(state_end(reader), -EINVAL);
    assert_string_equal(state_error(reader), "pit: has bytes left over");
    state_io_destroy(reader);
    state_io_destroy(writer);
}

/* What a later program saves, in the eyes of programs that know less. */
static void save_newer(struct state_io *io)
{
    uint8_t number = 7;
    state_begin(io, "outer", 1);
    state_u8(io, &number);
    if (state_begin_optional(io, "hint", 2)) {
        state_u8(io, &number);
        assert_int_equal(state_end(io), 0);
    }
    state_begin(io, "inner", 1);
    state_u8(io, &number);
    assert_int_equal(state_end(io), 0);
    if (state_begin_optional(io, "last", 1)) {
        state_u8(io, &number);
        assert_int_equal(state_end(io), 0);
    }
    assert_int_equal(state_end(io), 0);
}

/* `hint`: the highest version known, 0: it is not; the same of `last`. Returns the sum of the optional numbers that were read, or a failure's code. */
static int load_newer(const void *data, size_t size, unsigned hint, unsigned last, char error[256])
{
    struct state_io *io = state_reader_create(data, size);
    uint8_t number = 0;
    int sum = 0;
    state_begin(io, "outer", 1);
    state_u8(io, &number);
    if (hint && state_begin_optional(io, "hint", hint)) {
        state_u8(io, &number);
        sum += number;
        (void)!state_end(io);
    }
    state_begin(io, "inner", 1);
    state_u8(io, &number);
    (void)!state_end(io);
    if (last && state_begin_optional(io, "last", last)) {
        state_u8(io, &number);
        sum += number;
        (void)!state_end(io);
    }
    int ret = state_end(io);
    strcpy(error, state_error(io));
    state_io_destroy(io);
    return ret ? ret : sum;
}

static void test_optional(void **state)
{
    struct state_io *io = state_writer_create();
    char error[256];
    size_t size;
    save_newer(io);
    const void *written = state_writer_data(io, &size);
    uint8_t *data = malloc(size);
    memcpy(data, written, size);
    state_io_destroy(io);
    assert_int_equal(load_newer(data, size, 2, 1, error), 14);
    assert_int_equal(load_newer(data, size, 3, 1, error), 14);
    assert_int_equal(load_newer(data, size, 1, 1, error), 7); /* "hint" has a version that is too new */
    assert_int_equal(load_newer(data, size, 2, 0, error), 7);
    assert_int_equal(load_newer(data, size, 0, 1, error), 7);
    assert_int_equal(load_newer(data, size, 0, 0, error), 0);
    for (size_t i = 0; i < size; i++) { /* damage is told also where nobody reads */
        data[i] ^= 0x10;
        int ret = load_newer(data, size, 0, 0, error);
        assert_true(ret < 0 || ret == 0);
        assert_int_equal(ret == 0, error[0] == 0);
        data[i] ^= 0x10;
    }
    for (size_t cut = 0; cut < size; cut++)
        assert_int_equal(load_newer(data, cut, 0, 0, error), -EINVAL);
    free(data);

    /* One that is not optional cannot be skipped, and its name is told. */
    io = state_writer_create();
    state_begin(io, "outer", 1);
    uint8_t number = 7;
    state_u8(io, &number);
    state_begin(io, "strange", 1);
    assert_int_equal(state_end(io), 0);
    assert_int_equal(state_end(io), 0);
    assert_int_equal(load_newer(state_writer_data(io, &size), size, 2, 1, error), -EINVAL);
    assert_non_null(strstr(error, "strange"));
    state_io_destroy(io);
}

static void test_failures(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    uint32_t used = 8;
    uint8_t eight[8] = {2};
    bool flag;
    size_t size;

    state_begin(writer, "x", 1);
    state_buffer(writer, eight, &used, 8);
    assert_int_equal(state_end(writer), 0);
    const void *data = state_writer_data(writer, &size);

    reader = state_reader_create(data, size);
    state_begin(reader, "x", 1);
    state_buffer(reader, eight, &used, 7);
    assert_int_equal(used, 0);
    assert_int_equal(state_end(reader), -EINVAL);
    state_io_destroy(reader);

    reader = state_reader_create(data, size);
    state_begin(reader, "x", 1);
    state_bool(reader, &flag); /* the low byte of the length: 8 */
    assert_int_equal(state_end(reader), -EINVAL);
    assert_false(flag);
    state_io_destroy(reader);

    reader = state_reader_create(data, size);
    state_begin(reader, "x", 1);
    state_fail(reader, "first");
    state_fail(reader, "second");
    assert_int_equal(state_end(reader), -EINVAL);
    assert_string_equal(state_error(reader), "x: first");
    state_io_destroy(reader);
    state_io_destroy(writer);

    writer = state_writer_create();
    state_begin(writer, "outer", 1);
    state_begin(writer, "deep", 1);
    state_fail(writer, "no");
    assert_int_equal(state_end(writer), -EINVAL);
    assert_int_equal(state_end(writer), -EINVAL);
    assert_string_equal(state_error(writer), "outer/deep: no");
    assert_null(state_writer_data(writer, &size));
    assert_int_equal(size, 0);
    state_io_destroy(writer);
}

static void test_large(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t size, big = 3000000;
    uint8_t *bytes = malloc(big), *back = malloc(big);

    for (size_t i = 0; i < big; i++)
        bytes[i] = (uint8_t)(i * 7 + (i >> 9));
    state_begin(writer, "big", 1);
    state_bytes(writer, bytes, big);
    assert_int_equal(state_end(writer), 0);
    const void *data = state_writer_data(writer, &size);
    reader = state_reader_create(data, size);
    state_begin(reader, "big", 1);
    state_bytes(reader, back, big);
    assert_int_equal(state_end(reader), 0);
    assert_memory_equal(bytes, back, big);
    state_io_destroy(reader);
    state_io_destroy(writer);
    free(bytes);
    free(back);
}

/* A state with sections "known" 2 and `name` `version`, and its list: what a program that reads "known" up to 2 says of it. */
static void list_and_check(const char *name, unsigned version, bool optional, char why[256])
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t place, size;
    char found[64];
    const void *body;
    size_t body_bytes;

    state_begin(writer, "known", 1);
    assert_int_equal(state_end(writer), 0);
    (void)state_writer_data(writer, &place);
    state_begin(writer, "known", 2);
    if (optional)
        assert_int_equal(state_begin_optional(writer, "more", 9), 9);
    state_begin_unlisted(writer, name, version);
    assert_int_equal(state_end(writer), 0);
    if (optional)
        assert_int_equal(state_end(writer), 0);
    assert_int_equal(state_end(writer), 0);
    assert_int_equal(state_put_parts(writer, place), 0);
    const void *data = state_writer_data(writer, &size);
    reader = state_reader_create((const uint8_t *)data + place, size - place);
    assert_true(state_next(reader, found, &body, &body_bytes));
    assert_string_equal(found, "parts");
    state_check_parts(reader, body, body_bytes);
    snprintf(why, 256, "%s", state_error(reader));
    state_io_destroy(reader);
    reader = state_reader_create((const uint8_t *)data + place, size - place); /* who does not know the list does not see it */
    state_begin(reader, "known", 2);
    assert_false(state_failed(reader));
    state_io_destroy(reader);
    for (size_t cut = 0; cut < body_bytes; cut++) {
        struct state_io *io = state_reader_create(data, size);
        state_check_parts(io, body, cut);
        assert_true(state_failed(io));
        state_io_destroy(io);
    }
    state_io_destroy(writer);
}

static void test_parts(void **state)
{
    char why[256];

    list_and_check("known", 2, false, why);
    assert_string_equal(why, "");
    list_and_check("known", 3, false, why);
    assert_string_equal(why, "section \"known\" has version 3; this program reads up to 2");
    list_and_check("new", 1, false, why);
    assert_string_equal(why, "section \"new\" is not known to this program");
    list_and_check("new", 1, true, why); /* what may be skipped is, with all that is in it */
    assert_string_equal(why, "");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_format),
        cmocka_unit_test(test_truncated),  cmocka_unit_test(test_corrupted),
        cmocka_unit_test(test_names_and_versions), cmocka_unit_test(test_failures),
        cmocka_unit_test(test_large), cmocka_unit_test(test_optional), cmocka_unit_test(test_parts),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
