/*
 * virtio-console: output, input with and without room, the window's size, emergency output, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "device/virtio_console.h"
#include "guest_driver.h"
#include "util/log.h"

#define F_SIZE 1ull
#define F_EMERG 4ull

extern const struct device_class virtio_console_class;

static struct fixture {
    struct guest g;
    struct device *device;
    char output[4096];
    size_t output_bytes, total_bytes;
    unsigned ready;
} f;

static void sink_write(void *ctx, const uint8_t *data, size_t size_bytes)
{
    f.total_bytes += size_bytes;
    if (size_bytes > sizeof(f.output) - f.output_bytes)
        size_bytes = sizeof(f.output) - f.output_bytes;
    memcpy(f.output + f.output_bytes, data, size_bytes);
    f.output_bytes += size_bytes;
}

static void room_again(void *ctx)
{
    f.ready++;
}

static int setup(void **state)
{
    const struct virtio_console_config config = {
        .sink = {.write = sink_write}, .ready = room_again, .columns = 80, .rows = 25, .slot = -1};

    log_set_level(LOG_ERROR);
    f.output_bytes = f.total_bytes = f.ready = 0;
    guest_init(&f.g);
    assert_int_equal(virtio_console_class.create(&f.device, &f.g.host, &config, NULL), 0);
    guest_attach(&f.g, 1);
    return 0;
}

static int teardown(void **state)
{
    virtio_console_class.destroy(f.device);
    guest_fini(&f.g);
    return 0;
}

static void test_output(void **state)
{
    gpa_t page;
    struct guest_buffer buffers[2];

    guest_start(&f.g, F_SIZE, 2);
    page = guest_alloc(&f.g, 4096);
    memcpy(guest_at(&f.g, page, 16), "hello, world\n", 13);
    buffers[0] = (struct guest_buffer){page, 7, false};
    buffers[1] = (struct guest_buffer){page + 7, 6, false};
    guest_add(&f.g.queue[1], buffers, 2);
    guest_kick(&f.g.queue[1]);
    guest_wait_used(&f.g.queue[1]);
    assert_int_equal(guest_take_used(&f.g.queue[1], NULL), 0);
    assert_int_equal(f.output_bytes, 13);
    assert_memory_equal(f.output, "hello, world\n", 13);
    assert_int_equal(f.g.messages[2], 1);
}

/* A chain may hold gigabytes, which would keep the device lock for as long: the rest of what no driver sends is not printed. */
static void test_output_without_measure(void **state)
{
    struct guest_buffer buffers[8];

    guest_start(&f.g, F_SIZE, 2);
    for (unsigned i = 0; i < 8; i++)
        buffers[i] = (struct guest_buffer){0, 8 << 20, false};
    guest_add(&f.g.queue[1], buffers, 8);
    guest_kick(&f.g.queue[1]);
    guest_wait_used(&f.g.queue[1]);
    assert_int_equal(f.total_bytes, 1 << 20);
}

static void test_input(void **state)
{
    gpa_t page;
    struct guest_buffer buffer;
    struct guest_queue *q = &f.g.queue[0];

    /* Nobody there yet. */
    assert_int_equal(virtio_console_receive(f.device, (const uint8_t *)"early", 5), 0);
    assert_int_equal(f.ready, 0);
    guest_start(&f.g, F_EVENT_IDX, 2);
    assert_int_equal(f.ready, 1);
    assert_int_equal(virtio_console_receive(f.device, (const uint8_t *)"early", 5), 0);
    page = guest_alloc(&f.g, 4096);
    for (unsigned i = 0; i < 2; i++) {
        buffer = (struct guest_buffer){page + 16 * i, 4, true};
        guest_add(q, &buffer, 1);
    }
    guest_kick(q);
    guest_run(&f.g);
    assert_int_equal(f.ready, 2);
    assert_int_equal(virtio_console_receive(f.device, (const uint8_t *)"abcdefghij", 10), 8);
    assert_int_equal(guest_take_used(q, NULL), 4);
    assert_int_equal(guest_take_used(q, NULL), 4);
    assert_memory_equal(guest_at(&f.g, page, 4), "abcd", 4);
    assert_memory_equal(guest_at(&f.g, page + 16, 4), "efgh", 4);
    guest_add(q, &buffer, 1);
    guest_kick(q);
    guest_run(&f.g);
    assert_int_equal(f.ready, 3);
    assert_int_equal(virtio_console_receive(f.device, (const uint8_t *)"ij", 2), 2);
    assert_int_equal(guest_take_used(q, NULL), 2);
}

static void test_config(void **state)
{
    unsigned generation;

    guest_start(&f.g, F_SIZE | F_EMERG, 2);
    generation = (unsigned)common_read(&f.g, C_GENERATION, 1);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config, 4), 80 | 25 << 16);
    virtio_console_resize(f.device, 132, 43);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config, 2), 132);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 2, 2), 43);
    assert_int_not_equal(common_read(&f.g, C_GENERATION, 1), generation);
    assert_int_equal(f.g.messages[0], 1);
    virtio_console_resize(f.device, 132, 43); /* nothing new */
    assert_int_equal(f.g.messages[0], 1);
    bus_write(f.g.bus, BUS_MMIO, f.g.config + 8, 4, '!');
    assert_int_equal(f.output_bytes, 1);
    assert_int_equal(f.output[0], '!');
}

static void test_state(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    struct guest_buffer buffer;
    size_t size;

    guest_start(&f.g, F_SIZE, 2);
    buffer = (struct guest_buffer){guest_alloc(&f.g, 64), 64, true};
    assert_int_equal(virtio_console_class.state(f.device, writer), 0);
    virtio_console_class.reset(f.device);
    const void *saved = state_writer_data(writer, &size);
    reader = state_reader_create(saved, size);
    assert_int_equal(virtio_console_class.state(f.device, reader), 0);
    assert_int_equal(f.ready, 1);
    guest_add(&f.g.queue[0], &buffer, 1);
    assert_int_equal(virtio_console_receive(f.device, (const uint8_t *)"x", 1), 1);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {TEST(test_output), TEST(test_output_without_measure), TEST(test_input), TEST(test_config), TEST(test_state)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
