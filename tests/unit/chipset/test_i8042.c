/* The keyboard controller: what operating systems probe, keys, reset, state. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/i8042.h"

struct fixture {
    struct bus *bus;
    struct i8042 *i8042;
    bool irq;
    unsigned resets;
};

static void set_irq(void *ctx, unsigned pin, bool level)
{
    ((struct fixture *)ctx)->irq = level;
}

static void reset(void *ctx)
{
    ((struct fixture *)ctx)->resets++;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct i8042_config config = {.irq = {set_irq, f, 1, false}, .reset = reset, .ctx = f};

    config.bus = f->bus = bus_create();
    assert_int_equal(i8042_create(&f->i8042, &config), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    i8042_destroy(f->i8042);
    bus_destroy(f->bus);
    free(f);
    return 0;
}

static void out(struct fixture *f, unsigned port, unsigned value)
{
    bus_write(f->bus, BUS_PORT, port, 1, value);
}

static unsigned status(struct fixture *f)
{
    return (unsigned)bus_read(f->bus, BUS_PORT, 0x64, 1);
}

/* The next byte; there must be one. */
static unsigned next(struct fixture *f)
{
    assert_int_equal(status(f) & 1, 1);
    return (unsigned)bus_read(f->bus, BUS_PORT, 0x60, 1);
}

static void test_controller(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(status(f) & 3, 0);
    out(f, 0x64, 0xAA);
    assert_int_equal(next(f), 0x55);
    out(f, 0x64, 0xAB);
    assert_int_equal(next(f), 0);
    out(f, 0x64, 0x60);
    out(f, 0x60, 0x74);
    out(f, 0x64, 0x20);
    assert_false(f->irq);
    assert_int_equal(next(f), 0x74);
    out(f, 0x64, 0xA7);
    out(f, 0x64, 0x20);
    assert_int_equal(next(f) & 0x20, 0x20);
    /* The search for an auxiliary device finds none, and its unread answer does not stay. */
    out(f, 0x64, 0xD3);
    out(f, 0x60, 0x5A);
    assert_int_equal(status(f) & 0x21, 0x01);
    out(f, 0x64, 0xA9);
    assert_int_equal(next(f), 1);
    assert_int_equal(status(f) & 1, 0);
    out(f, 0x64, 0xD0);
    assert_int_equal(next(f), 3);
    out(f, 0x64, 0xDD);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0x92, 1), 0);
    out(f, 0x92, 2);
    out(f, 0x64, 0xD0);
    assert_int_equal(next(f), 3);
}

static void test_keyboard(void **state)
{
    static const uint8_t key[] = {0x1C, 0xF0, 0x1C, 0x83}; /* A pressed and released, F7 */
    struct fixture *f = *state;

    out(f, 0x60, 0xFF);
    assert_true(f->irq);
    assert_int_equal(next(f), 0xFA);
    assert_true(f->irq);
    assert_int_equal(next(f), 0xAA);
    assert_false(f->irq);
    out(f, 0x64, 0x60);
    out(f, 0x60, 0x05); /* no translation */
    out(f, 0x60, 0xF2);
    assert_int_equal(next(f), 0xFA);
    assert_int_equal(next(f), 0xAB);
    assert_int_equal(next(f), 0x83);
    out(f, 0x60, 0xED);
    assert_int_equal(next(f), 0xFA);
    out(f, 0x60, 7);
    assert_int_equal(next(f), 0xFA);
    out(f, 0x60, 0xF0);
    assert_int_equal(next(f), 0xFA);
    out(f, 0x60, 0);
    assert_int_equal(next(f), 0xFA);
    assert_int_equal(next(f), 2);
    out(f, 0x60, 0x55);
    assert_int_equal(next(f), 0xFE);
    assert_int_equal(i8042_key(f->i8042, key, 3), 3);
    assert_int_equal(next(f), 0x1C);
    assert_int_equal(next(f), 0xF0);
    assert_int_equal(next(f), 0x1C);
    out(f, 0x64, 0x60);
    out(f, 0x60, 0x45);
    assert_int_equal(i8042_key(f->i8042, key, 4), 4);
    assert_int_equal(next(f), 0x1E);
    assert_int_equal(next(f), 0x9E);
    assert_int_equal(next(f), 0x41);
    out(f, 0x64, 0xAD); /* held back while the keyboard is off */
    assert_int_equal(i8042_key(f->i8042, key, 1), 1);
    assert_int_equal(status(f) & 1, 0);
    out(f, 0x64, 0xAE);
    assert_int_equal(next(f), 0x1E);
    for (unsigned i = 0; i < 50; i++)
        assert_true(i8042_key(f->i8042, key, 4) <= 4);
}

static void test_resets(void **state)
{
    struct fixture *f = *state;

    out(f, 0x64, 0xFF);
    assert_int_equal(f->resets, 0);
    out(f, 0x64, 0xFE);
    assert_int_equal(f->resets, 1);
    out(f, 0x92, 1);
    assert_int_equal(f->resets, 2);
    out(f, 0x64, 0xD1);
    out(f, 0x60, 0x02);
    assert_int_equal(f->resets, 3);
    struct i8042_counters counters;
    i8042_get_counters(f->i8042, &counters);
    assert_int_equal(counters.resets, 3);
    assert_true(counters.writes >= 3);
}

static void test_state(void **state)
{
    static const uint8_t keys[] = {0x1C, 0x32};
    struct fixture *f = *state;
    struct state_io *writer = state_writer_create(), *reader;
    const void *data;
    size_t size;

    i8042_key(f->i8042, keys, 2);
    assert_int_equal(i8042_state(f->i8042, writer), 0);
    data = state_writer_data(writer, &size);
    i8042_reset(f->i8042);
    assert_false(f->irq);
    reader = state_reader_create(data, size);
    assert_int_equal(i8042_state(f->i8042, reader), 0);
    assert_true(f->irq);
    assert_int_equal(next(f), 0x1E);
    assert_int_equal(next(f), 0x30);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void test_random_writes(void **state)
{
    static const unsigned ports[] = {0x60, 0x64, 0x92};
    struct fixture *f = *state;

    srand(5);
    for (unsigned i = 0; i < 50000; i++) {
        unsigned port = ports[rand() % 3];

        if (rand() & 1)
            out(f, port, (unsigned)rand() & 0xFF);
        else
            bus_read(f->bus, BUS_PORT, port, 1);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_controller), TEST(test_keyboard), TEST(test_resets), TEST(test_state), TEST(test_random_writes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
