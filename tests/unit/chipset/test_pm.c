/* ACPI fixed hardware, the reset register, the debug console and the panic device. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "chipset/chipset.h"
#include "chipset/debugcon.h"
#include "chipset/pm.h"
#include "chipset/pvpanic.h"

struct fixture {
    struct bus *bus;
    struct loop *loop;
    struct pm *pm;
    bool sci;
    unsigned offs, resets;
};

static void set_sci(void *ctx, unsigned pin, bool level)
{
    ((struct fixture *)ctx)->sci = level;
}

static void power_off(void *ctx)
{
    ((struct fixture *)ctx)->offs++;
}

static void reset(void *ctx)
{
    ((struct fixture *)ctx)->resets++;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct pm_config config = {.sci = {set_sci, f, 9, false}, .power_off = power_off, .reset = reset, .ctx = f};

    config.bus = f->bus = bus_create();
    assert_int_equal(loop_create(&f->loop, NULL), 0);
    config.loop = f->loop;
    assert_int_equal(pm_create(&f->pm, &config), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    pm_destroy(f->pm);
    loop_destroy(f->loop);
    bus_destroy(f->bus);
    free(f);
    return 0;
}

static uint64_t in(struct fixture *f, unsigned port, unsigned size)
{
    return bus_read(f->bus, BUS_PORT, port, size);
}

static void out(struct fixture *f, unsigned port, unsigned size, uint64_t value)
{
    bus_write(f->bus, BUS_PORT, port, size, value);
}

static void test_power_button(void **state)
{
    struct fixture *f = *state;

    pm_power_button(f->pm);
    assert_false(f->sci);
    assert_int_equal(in(f, CHIPSET_PM_EVENT_PORT, 2), 0x100);
    out(f, CHIPSET_PM_EVENT_PORT + 2, 2, 0x100);
    assert_true(f->sci);
    assert_int_equal(in(f, CHIPSET_PM_EVENT_PORT, 4), 0x1000100);
    out(f, CHIPSET_PM_EVENT_PORT, 1, 0xFF); /* the other byte */
    assert_true(f->sci);
    out(f, CHIPSET_PM_EVENT_PORT + 1, 1, 1);
    assert_false(f->sci);
    assert_int_equal(in(f, CHIPSET_PM_EVENT_PORT, 2), 0);
    out(f, CHIPSET_PM_EVENT_PORT + 3, 1, 0);
    assert_int_equal(in(f, CHIPSET_PM_EVENT_PORT + 2, 2), 0);
}

static void test_sleep(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(in(f, CHIPSET_PM_CONTROL_PORT, 2), 1);
    out(f, CHIPSET_PM_CONTROL_PORT, 2, 5 << 10);
    assert_int_equal(f->offs, 0);
    out(f, CHIPSET_PM_CONTROL_PORT, 2, 3 << 10 | 1 << 13); /* no such state */
    assert_int_equal(f->offs, 0);
    out(f, CHIPSET_PM_CONTROL_PORT, 2, 5 << 10 | 1 << 13);
    assert_int_equal(f->offs, 1);
    out(f, CHIPSET_PM_CONTROL_PORT + 1, 1, (5 << 10 | 1 << 13) >> 8);
    assert_int_equal(f->offs, 2);
    assert_int_equal(in(f, CHIPSET_PM_CONTROL_PORT, 2), 5 << 10 | 1); /* SLP_EN reads as zero */
}

static void test_reset_register(void **state)
{
    struct fixture *f = *state;

    pm_reset_port_ops.write(f->pm, 0, 1, 2);
    assert_int_equal(f->resets, 0);
    pm_reset_port_ops.write(f->pm, 0, 1, 6);
    assert_int_equal(f->resets, 1);
    assert_int_equal(pm_reset_port_ops.read(f->pm, 0, 1), 6);
    pm_reset_port_ops.write(f->pm, 0, 1, 6);
    assert_int_equal(f->resets, 1);
    pm_reset(f->pm);
    pm_reset_port_ops.write(f->pm, 0, 1, 6);
    assert_int_equal(f->resets, 2);
}

static void test_timer(void **state)
{
    struct fixture *f = *state;
    struct timespec wait = {.tv_nsec = 20000000};
    uint32_t first = (uint32_t)in(f, CHIPSET_PM_TIMER_PORT, 4), second;

    nanosleep(&wait, NULL);
    second = (uint32_t)in(f, CHIPSET_PM_TIMER_PORT, 4);
    assert_true(second - first >= 71590); /* 20 ms; no upper limit on a busy host */
    out(f, CHIPSET_PM_TIMER_PORT, 4, 0);
    assert_true((uint32_t)in(f, CHIPSET_PM_TIMER_PORT, 4) >= second);
}

/* Offsets in the section's body: status, enable, control, reset, elapsed, half periods. */
static void test_state(void **state)
{
    struct fixture *f = *state;
    struct state_io *writer = state_writer_create(), *reader;
    const void *data;
    size_t size;
    uint32_t before, after;

    pm_power_button(f->pm);
    out(f, CHIPSET_PM_EVENT_PORT + 2, 2, 0x101);
    before = (uint32_t)in(f, CHIPSET_PM_TIMER_PORT, 4);
    assert_int_equal(pm_state(f->pm, writer), 0);
    pm_reset(f->pm);
    assert_false(f->sci);
    data = state_writer_data(writer, &size);
    reader = state_reader_create(data, size);
    assert_int_equal(pm_state(f->pm, reader), 0);
    assert_true(f->sci);
    assert_int_equal(in(f, CHIPSET_PM_EVENT_PORT, 4), 0x1010100);
    after = (uint32_t)in(f, CHIPSET_PM_TIMER_PORT, 4);
    assert_true(after >= before);
    state_io_destroy(reader);
    reader = state_reader_create(data, size - 3);
    assert_true(pm_state(f->pm, reader) < 0);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void test_random_writes(void **state)
{
    struct fixture *f = *state;

    srand(3);
    for (unsigned i = 0; i < 20000; i++) {
        unsigned port = CHIPSET_PM_EVENT_PORT + (unsigned)rand() % 16, size = 1u << rand() % 3;

        if (rand() & 1)
            out(f, port, size, (uint64_t)rand());
        else
            in(f, port, size);
    }
    assert_int_equal(in(f, CHIPSET_PM_CONTROL_PORT, 1) & 1, 1);
}

struct text {
    char bytes[16];
    size_t used;
    unsigned panics, crashes;
};

static void append(void *ctx, const uint8_t *data, size_t size)
{
    struct text *text = ctx;

    memcpy(text->bytes + text->used, data, size);
    text->used += size;
}

static void panicked(void *ctx, bool crash_loaded)
{
    struct text *text = ctx;

    text->panics += !crash_loaded;
    text->crashes += crash_loaded;
}

static void test_message_ports(void **state)
{
    struct text text = {0};
    struct bus *bus = bus_create();
    struct debugcon *debugcon;
    struct pvpanic *pvpanic;

    assert_int_equal(debugcon_create(&debugcon, &(struct debugcon_config){bus, {append, &text}}), 0);
    assert_int_equal(pvpanic_create(&pvpanic, &(struct pvpanic_config){bus, panicked, &text}), 0);
    assert_int_equal(pvpanic_create(&pvpanic, &(struct pvpanic_config){bus, panicked, &text}), -EEXIST);
    assert_int_equal(bus_read(bus, BUS_PORT, DEBUGCON_PORT, 1), 0xE9);
    bus_write(bus, BUS_PORT, DEBUGCON_PORT, 1, 'h');
    bus_write(bus, BUS_PORT, DEBUGCON_PORT, 1, 'i');
    bus_write(bus, BUS_PORT, 0x80, 1, 'x');
    assert_string_equal(text.bytes, "hi");
    assert_int_equal(bus_read(bus, BUS_PORT, PVPANIC_PORT, 1), 3);
    bus_write(bus, BUS_PORT, PVPANIC_PORT, 1, 4);
    bus_write(bus, BUS_PORT, PVPANIC_PORT, 1, 2);
    bus_write(bus, BUS_PORT, PVPANIC_PORT, 1, 1);
    assert_int_equal(text.panics, 1);
    assert_int_equal(text.crashes, 1);
    assert_int_equal(bus_unclaimed(bus), 0);
    pvpanic_destroy(pvpanic);
    debugcon_destroy(debugcon);
    bus_destroy(bus);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_power_button), TEST(test_sleep), TEST(test_reset_register),
        TEST(test_timer),        TEST(test_state), TEST(test_random_writes),
        cmocka_unit_test(test_message_ports),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
