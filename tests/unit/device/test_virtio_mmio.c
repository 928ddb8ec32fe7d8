/*
 * The memory-mapped transport, driven by a guest's driver through the bus; the devices behind it are virtio-rng.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <string.h>

#include "device/virtio.h"
#include "device/virtio_rng.h"
#include "guest_driver.h"
#include "util/log.h"

extern const struct device_class virtio_rng_class;

static struct fixture {
    struct guest g;
    struct device *device[GUEST_MMIO_PLACES + 1];
    unsigned count;
    unsigned edges; /* of line 0, up */
} f;

static void plug(void)
{
    const struct virtio_rng_config config = {.slot = -1};

    assert_int_equal(virtio_rng_class.create(&f.device[f.count], &f.g.host, &config, NULL), 0);
    f.count++;
    guest_attach(&f.g, 0);
}

static int setup(void **state)
{
    log_set_level(LOG_ERROR);
    memset(&f, 0, sizeof(f));
    guest_init_mmio(&f.g);
    plug();
    return 0;
}

static int teardown(void **state)
{
    for (unsigned i = f.count; i-- > 0;)
        virtio_rng_class.destroy(f.device[i]);
    guest_fini(&f.g);
    return 0;
}

static uint32_t reg(unsigned offset)
{
    return (uint32_t)bus_read(f.g.bus, BUS_MMIO, f.g.common + offset, 4);
}

static void set_reg(unsigned offset, uint32_t value)
{
    bus_write(f.g.bus, BUS_MMIO, f.g.common + offset, 4, value);
}

static void fetch(uint32_t bytes)
{
    struct guest_queue *q = &f.g.queue[0];
    struct guest_buffer buffer = {guest_alloc(&f.g, bytes), bytes, true};

    guest_add(q, &buffer, 1);
    guest_kick(q);
    guest_wait_used(q);
    assert_int_equal(guest_take_used(q, NULL), bytes);
    assert_true(physmap_take_dirty(f.g.memory, buffer.gpa));
}

static void test_identity(void **state)
{
    assert_int_equal(reg(0x008), 4);
    assert_int_equal(reg(0x00C), 0x1AF4);
    assert_true(guest_offered(&f.g) == (F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_RING_RESET));
    set_reg(0x014, 2);
    assert_int_equal(reg(0x010), 0);
    set_reg(0x030, 1); /* no such queue */
    assert_int_equal(reg(0x034), 0);
    set_reg(0x030, 0x10000); /* nor this, although its lower half is one */
    assert_int_equal(reg(0x034), 0);
    set_reg(0x030, 0);
    assert_int_equal(reg(0x034), 64);
    set_reg(0x0AC, 0); /* no shared memory region: 4.2.2.1 */
    for (unsigned offset = 0x0B0; offset <= 0x0BC; offset += 4)
        assert_int_equal(reg(offset), UINT32_MAX);
    assert_int_equal(reg(0x100), 0); /* no configuration */
    /* Registers are accessed as a whole. */
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.common, 2), 0);
    bus_write(f.g.bus, BUS_MMIO, f.g.common + 0x070, 1, 1);
    assert_int_equal(reg(0x070), 0);
}

static void test_negotiation(void **state)
{
    struct guest *g = &f.g;

    assert_false(guest_negotiate(g, F_EVENT_IDX)); /* VERSION_1 is not optional */
    guest_device_reset(g);
    assert_false(guest_negotiate(g, F_VERSION_1 | 1)); /* not offered */
    guest_driver_ok(g);
    assert_false(reg(0x070) & STATUS_DRIVER_OK);
    guest_device_reset(g);
    assert_true(guest_negotiate(g, F_VERSION_1));
    guest_device_reset(g);
}

static void test_io(void **state)
{
    guest_start(&f.g, F_INDIRECT_DESC | F_EVENT_IDX, 1);
    for (unsigned i = 0; i < 200; i++) {
        f.g.queue[0].indirect = i & 1;
        fetch(16 + i);
        assert_true(f.g.intx[0]);
        assert_int_equal(guest_take_isr(&f.g), 1);
        assert_false(f.g.intx[0]);
    }
    assert_int_equal(f.g.messages[0] + f.g.messages[1], 0);
}

static void count_edges(void *ctx, unsigned pin, bool level)
{
    f.g.intx[pin] = level;
    f.edges += pin == 0 && level;
}

/* A kernel that takes the line as edge-triggered gets an edge for what it left. */
static void test_edges(void **state)
{
    f.g.mmio_host.line[0].set = count_edges;
    guest_start(&f.g, 0, 1);
    fetch(8);
    fetch(8);
    assert_int_equal(f.edges, 1);
    f.g.queue[0].desc[0].address = UINT64_MAX; /* breaks the queue: a configuration interrupt */
    guest_publish(&f.g.queue[0], 0);
    guest_kick(&f.g.queue[0]);
    guest_run(&f.g);
    assert_true(reg(0x070) & STATUS_NEEDS_RESET);
    assert_int_equal(reg(0x060), 3);
    set_reg(0x064, 1);
    assert_true(f.g.intx[0]);
    assert_int_equal(f.edges, 2);
    assert_int_equal(reg(0x060), 2);
    set_reg(0x064, 0xFFFFFFFE);
    assert_false(f.g.intx[0]);
    assert_int_equal(f.edges, 2);
    guest_start(&f.g, 0, 1); /* a reset mends it */
    fetch(8);
    assert_int_equal(f.edges, 3);
}

static void test_shared_line(void **state)
{
    struct guest first = f.g;

    while (f.count < GUEST_MMIO_PLACES)
        plug();
    assert_int_equal(f.g.common, GUEST_MMIO_BASE + 3 * VIRTIO_MMIO_WINDOW_BYTES);
    const struct virtio_rng_config config = {.slot = -1};
    struct error err = {0};
    struct device *none = NULL;
    assert_int_equal(virtio_rng_class.create(&none, &f.g.host, &config, &err), -ENOSPC);
    assert_null(none);

    /* Places 2 and 3 share line 2. */
    guest_start(&f.g, 0, 1);
    fetch(8);
    assert_true(f.g.intx[2]);
    f.g.common -= VIRTIO_MMIO_WINDOW_BYTES;
    f.g.notify -= VIRTIO_MMIO_WINDOW_BYTES;
    f.g.isr -= VIRTIO_MMIO_WINDOW_BYTES;
    guest_start(&f.g, 0, 1);
    fetch(8);
    assert_int_equal(guest_take_isr(&f.g), 1);
    assert_true(f.g.intx[2]); /* the other one's */
    f.g.isr += VIRTIO_MMIO_WINDOW_BYTES;
    f.g.common += VIRTIO_MMIO_WINDOW_BYTES;
    assert_int_equal(guest_take_isr(&f.g), 1);
    assert_false(f.g.intx[2]);
    assert_int_equal(bus_read(first.bus, BUS_MMIO, first.common + 0x070, 4), 0);
}

static void test_queue_registers(void **state)
{
    struct guest *g = &f.g;

    guest_start(g, F_RING_RESET, 1);
    fetch(8);
    set_reg(0x030, 0);
    set_reg(0x080, 0x12345000); /* an enabled queue stays where it is */
    fetch(8);
    set_reg(0x0C0, 1);
    assert_int_equal(reg(0x0C0), 0);
    assert_int_equal(reg(0x044), 0);
    guest_kick(&g->queue[0]);
    guest_run(g);
    guest_queue_setup(g, 0, 32, 0);
    fetch(8);
    set_reg(0x044, 0);
    assert_int_equal(reg(0x044), 0);
    guest_queue_setup(g, 0, 16, 0);
    fetch(8);
    set_reg(0x050, 1); /* no such queue */
    set_reg(0x050, UINT32_MAX);
    guest_run(g);
    assert_int_equal(reg(0x070), 15);

    guest_device_reset(g);
    assert_true(guest_negotiate(g, F_VERSION_1));
    set_reg(0x038, 16);
    set_reg(0x080, 0xFFFFF000);
    set_reg(0x084, 0xFFFFFFFF);
    set_reg(0x044, 1);
    assert_int_equal(reg(0x044), 0);
    assert_true(reg(0x070) & STATUS_NEEDS_RESET);
}

static void test_state(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t size;

    guest_start(&f.g, F_EVENT_IDX, 1);
    fetch(8); /* and the interrupt is not taken */
    assert_int_equal(virtio_rng_class.state(f.device[0], writer), 0);
    const void *data = state_writer_data(writer, &size);
    assert_int_equal(guest_take_isr(&f.g), 1);
    virtio_rng_class.reset(f.device[0]);
    assert_int_equal(reg(0x070), 0);
    assert_false(f.g.intx[0]);

    reader = state_reader_create(data, size);
    assert_int_equal(virtio_rng_class.state(f.device[0], reader), 0);
    state_io_destroy(reader);
    assert_int_equal(reg(0x070), 15);
    assert_true(f.g.intx[0]);
    assert_int_equal(guest_take_isr(&f.g), 1);
    fetch(64);

    /* Cut short, or at another place. */
    for (size_t cut = 0; cut < size; cut += 13) {
        reader = state_reader_create(data, cut);
        assert_true(virtio_rng_class.state(f.device[0], reader) < 0);
        state_io_destroy(reader);
        assert_int_equal(reg(0x070), 0);
    }
    plug();
    reader = state_reader_create(data, size);
    assert_true(virtio_rng_class.state(f.device[1], reader) < 0);
    state_io_destroy(reader);
    assert_int_equal(reg(0x070), 0);
    state_io_destroy(writer);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_identity),    TEST(test_negotiation),     TEST(test_io),    TEST(test_edges),
        TEST(test_shared_line), TEST(test_queue_registers), TEST(test_state),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
