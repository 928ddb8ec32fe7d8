/*
 * The transport and the queues, driven by a guest's driver through the bus; the device behind them is virtio-rng.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <unistd.h>

#include <string.h>

#include "device/virtio_rng.h"
#include "device/virtqueue.h"
#include "guest_driver.h"
#include "util/log.h"

extern const struct device_class virtio_rng_class;

struct fixture {
    struct guest g;
    struct device *device;
};

static struct fixture fixture;

static int setup(void **state)
{
    const struct virtio_rng_config config = {.slot = 5};

    log_set_level(LOG_ERROR);
    guest_init(&fixture.g);
    assert_int_equal(virtio_rng_class.create(&fixture.device, &fixture.g.host, &config, NULL), 0);
    guest_attach(&fixture.g, 5);
    *state = &fixture;
    return 0;
}

static int teardown(void **state)
{
    virtio_rng_class.destroy(fixture.device);
    guest_fini(&fixture.g);
    return 0;
}

static bool all_zero(const uint8_t *data, size_t size)
{
    for (size_t i = 0; i < size; i++) {
        if (data[i])
            return false;
    }
    return true;
}

/* One request of `bytes` on queue 0; checks that random bytes came. */
static void fetch(struct guest *g, uint32_t bytes)
{
    struct guest_queue *q = &g->queue[0];
    struct guest_buffer buffer = {guest_alloc(g, bytes), bytes, true};
    uint16_t expected = guest_add(q, &buffer, 1), head;

    guest_kick(q);
    guest_wait_used(q);
    assert_int_equal(guest_take_used(q, &head), bytes < 4096 ? bytes : 4096);
    assert_int_equal(head, expected);
    assert_false(all_zero(guest_at(g, buffer.gpa, bytes), bytes));
    assert_true(physmap_take_dirty(g->memory, buffer.gpa));
    assert_true(physmap_take_dirty(g->memory, q->used_gpa));
}

static void test_identity(void **state)
{
    struct guest *g = &fixture.g;

    assert_int_equal(guest_config_read(g, 2, 2), 0x1044);
    assert_int_equal(guest_config_read(g, 8, 1), 1);
    assert_int_equal(common_read(g, C_NUM_QUEUES, 2), 1);
    assert_int_equal(common_read(g, C_STATUS, 1), 0);
    assert_true(guest_offered(g) == (F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC | F_RING_RESET));
    common_write(g, C_DEVICE_FEATURE_SELECT, 4, 2);
    assert_int_equal(common_read(g, C_DEVICE_FEATURE, 4), 0);
    common_write(g, C_QUEUE_SELECT, 2, 1); /* no such queue */
    assert_int_equal(common_read(g, C_QUEUE_SIZE, 2), 0);
    assert_int_equal(common_read(g, C_QUEUE_VECTOR, 2), 0xFFFF);
    assert_int_equal(common_read(g, 0x3C, 4), 0);
}

static void test_negotiation(void **state)
{
    struct guest *g = &fixture.g;

    assert_false(guest_negotiate(g, F_EVENT_IDX)); /* VERSION_1 is not optional */
    guest_device_reset(g);
    assert_false(guest_negotiate(g, F_VERSION_1 | 1)); /* not offered */
    guest_driver_ok(g);
    assert_false(common_read(g, C_STATUS, 1) & STATUS_DRIVER_OK);
    guest_device_reset(g);
    assert_true(guest_negotiate(g, F_VERSION_1));
    common_write(g, C_DRIVER_FEATURE_SELECT, 4, 0);
    common_write(g, C_DRIVER_FEATURE, 4, 0xFFFFFFFF); /* too late */
    assert_int_equal(common_read(g, C_DRIVER_FEATURE, 4), 0);
    common_write(g, C_STATUS, 1, STATUS_ACK); /* bits do not clear one by one */
    assert_true(common_read(g, C_STATUS, 1) & STATUS_FEATURES_OK);
    guest_device_reset(g);
    assert_int_equal(common_read(g, C_STATUS, 1), 0);
}

static void test_io(void **state)
{
    struct guest *g = &fixture.g;

    guest_start(g, 0, 1);
    for (unsigned i = 0; i < 200; i++) /* several times around the ring */
        fetch(g, 16 + i);
    fetch(g, 10000); /* gets a part */
    assert_int_equal(g->messages[1], 201);
    assert_int_equal(g->messages[0], 0);
    assert_false(g->intx[5 % 4]);
}

struct bells {
    unsigned count, matching;
    uint64_t address;
    int fd;
};

/* As somebody who turns doorbells into counts: knows where the first queue's is. */
static void bell(void *ctx, uint64_t address, const struct bus_doorbell *doorbell, bool on)
{
    struct bells *bells = ctx;

    bells->count += on ? 1 : -1u;
    bells->matching += doorbell->match;
    if (on && (!doorbell->match || doorbell->value == 0)) {
        bells->address = address;
        bells->fd = doorbell->fd;
    }
}

static void command_write(struct guest *g, unsigned slot, uint16_t value)
{
    bus_write(g->bus, BUS_PORT, 0xCF8, 4, 0x80000004u | slot << 11);
    bus_write(g->bus, BUS_PORT, 0xCFC, 2, value);
}

/* A count on the descriptor does what a write to the register does. */
static void ring(struct guest *g, const struct bells *bells)
{
    struct guest_queue *q = &g->queue[0];
    struct guest_buffer buffer = {guest_alloc(g, 64), 64, true};
    uint64_t one = 1;

    guest_run(g); /* what the driver's other doings have woken */
    guest_add(q, &buffer, 1);
    guest_run(g);
    assert_false(guest_has_used(q));
    assert_int_equal(write(bells->fd, &one, sizeof(one)), sizeof(one));
    guest_wait_used(q);
    assert_int_equal(guest_take_used(q, NULL), 64);
}

static void test_doorbells(void **state)
{
    struct guest *g = &fixture.g;
    struct bells bells = {.fd = -1};

    guest_start(g, 0, 1);
    bus_set_doorbells(g->bus, bell, &bells);
    assert_int_equal(bells.count, 1); /* the device has one queue */
    assert_int_equal(bells.matching, 0);
    assert_int_equal(bells.address, g->notify);
    ring(g, &bells);
    command_write(g, 5, 0); /* BARs are not decoded, then again */
    assert_int_equal(bells.count, 0);
    command_write(g, 5, 6);
    assert_int_equal(bells.count, 1);
    ring(g, &bells);
    bus_set_doorbells(g->bus, NULL, NULL);
}

static void test_doorbells_mmio(void **state)
{
    const struct virtio_rng_config config = {.slot = -1};
    struct bells bells = {.fd = -1};
    struct device *device;
    static struct guest g;

    guest_init_mmio(&g);
    bus_set_doorbells(g.bus, bell, &bells);
    assert_int_equal(virtio_rng_class.create(&device, &g.host, &config, NULL), 0);
    guest_attach(&g, 0);
    guest_start(&g, 0, 1);
    assert_int_equal(bells.count, 1);
    assert_int_equal(bells.matching, 1);
    assert_int_equal(bells.address, g.notify);
    ring(&g, &bells);
    virtio_rng_class.destroy(device);
    assert_int_equal(bells.count, 0);
    guest_fini(&g);
}

static void test_indirect_and_split(void **state)
{
    struct guest *g = &fixture.g;
    struct guest_queue *q = &g->queue[0];
    struct guest_buffer buffers[4];
    gpa_t page;

    guest_start(g, F_INDIRECT_DESC | F_EVENT_IDX, 1);
    for (unsigned round = 0; round < 2; round++) {
        page = guest_alloc(g, 8192);
        for (unsigned i = 0; i < 4; i++)
            buffers[i] = (struct guest_buffer){page + 1000 * i, 100 * i, true}; /* the first is empty */
        q->indirect = round;
        guest_add(q, buffers, 4);
        guest_kick(q);
        guest_wait_used(q);
        assert_int_equal(guest_take_used(q, NULL), 600);
        assert_true(all_zero(guest_at(g, page, 1000), 1000));
        assert_false(all_zero(guest_at(g, page + 1000, 100), 100));
        assert_true(all_zero(guest_at(g, page + 1100, 900), 900));
        assert_false(all_zero(guest_at(g, page + 3000, 300), 300));
        assert_true(all_zero(guest_at(g, page + 3300, 700), 700));
    }
}

static void test_intx(void **state)
{
    struct guest *g = &fixture.g;

    guest_device_reset(g);
    assert_true(guest_negotiate(g, F_VERSION_1));
    guest_queue_setup(g, 0, 16, 0xFFFF);
    guest_driver_ok(g);
    fetch(g, 8);
    assert_true(g->intx[5 % 4]);
    assert_int_equal(bus_read(g->bus, BUS_MMIO, g->isr, 1), 1);
    assert_false(g->intx[5 % 4]);
    assert_int_equal(bus_read(g->bus, BUS_MMIO, g->isr, 1), 0);
    fetch(g, 8);
    assert_true(g->intx[5 % 4]);
    guest_device_reset(g); /* takes the line down */
    assert_false(g->intx[5 % 4]);
}

static void test_no_interrupt(void **state)
{
    struct guest *g = &fixture.g;
    struct guest_queue *q = &g->queue[0];

    guest_start(g, 0, 1);
    q->avail[0] = 1; /* NO_INTERRUPT */
    fetch(g, 8);
    assert_int_equal(g->messages[1], 0);
    q->avail[0] = 0;
    fetch(g, 8);
    assert_int_equal(g->messages[1], 1);
}

static void test_event_index(void **state)
{
    struct guest *g = &fixture.g;
    struct guest_queue *q = &g->queue[0];
    struct guest_buffer buffer = {guest_alloc(g, 64), 64, true};

    guest_start(g, F_EVENT_IDX, 1);
    fetch(g, 8);
    assert_int_equal(g->messages[1], 1);
    /* avail_event: the device wants to hear of entry 1. */
    assert_int_equal(q->used[2 + 4 * q->size], 1);
    q->avail[2 + q->size] = 4; /* an interrupt only once entry 4 is used */
    for (unsigned i = 1; i < 7; i++) {
        guest_add(q, &buffer, 1);
        guest_kick(q);
        guest_wait_used(q);
        q->next_used++;
        assert_int_equal(g->messages[1], i < 4 ? 1 : 2);
    }
    assert_int_equal(q->used[2 + 4 * q->size], 7);
    /* Across the wrap of the 16-bit index. */
    for (unsigned i = 7; i < 66000; i++) {
        guest_add(q, &buffer, 1);
        guest_kick(q);
        guest_wait_used(q);
        guest_take_used(q, NULL);
    }
    assert_int_equal(g->messages[1], 2 + 66000 - 7 - 1); /* the first came before used_event was moved on */
}

static void test_queue_reset(void **state)
{
    struct guest *g = &fixture.g;

    guest_start(g, F_RING_RESET, 1);
    fetch(g, 8);
    common_write(g, C_QUEUE_SELECT, 2, 0);
    common_write(g, C_QUEUE_RESET, 2, 1);
    assert_int_equal(common_read(g, C_QUEUE_RESET, 2), 0);
    assert_int_equal(common_read(g, C_QUEUE_ENABLE, 2), 0);
    guest_kick(&g->queue[0]);
    guest_run(g);
    guest_queue_setup(g, 0, 32, 1);
    fetch(g, 8);
}

static void test_bad_rings(void **state)
{
    struct guest *g = &fixture.g;
    static const uint64_t bad[][4] = {
        /* size, descriptors, available, used */
        {16, 0x8008, 0x9000, 0xA000},
        {16, 0x8000, 0x9001, 0xA000},
        {16, 0x8000, 0x9000, 0xA002},
        {16, GUEST_RAM_BYTES - 16, 0x9000, 0xA000},
        {16, 0x8000, UINT64_MAX - 1, 0xA000},
        {16, 0x8000, 0x9000, GUEST_RAM_BYTES},
        {16, 0x8000, 0x9000, 0xC0000}, /* ROM */
    };

    assert_int_equal(physmap_set_rom(g->memory, 0xC0000, 4096), 0);
    for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        guest_device_reset(g);
        assert_true(guest_negotiate(g, F_VERSION_1));
        common_write(g, C_QUEUE_SELECT, 2, 0);
        common_write(g, C_QUEUE_SIZE, 2, bad[i][0]);
        common_write(g, C_QUEUE_DESC, 8, bad[i][1]);
        common_write(g, C_QUEUE_DRIVER, 8, bad[i][2]);
        common_write(g, C_QUEUE_DEVICE, 8, bad[i][3]);
        common_write(g, C_QUEUE_ENABLE, 2, 1);
        assert_int_equal(common_read(g, C_QUEUE_ENABLE, 2), 0);
        assert_true(common_read(g, C_STATUS, 1) & STATUS_NEEDS_RESET);
    }
    guest_device_reset(g);
    common_write(g, C_QUEUE_SIZE, 2, 3);
    assert_int_equal(common_read(g, C_QUEUE_SIZE, 2), 64);
    common_write(g, C_QUEUE_SIZE, 2, 128);
    assert_int_equal(common_read(g, C_QUEUE_SIZE, 2), 64);
    common_write(g, C_QUEUE_ENABLE, 2, 1); /* before FEATURES_OK */
    assert_int_equal(common_read(g, C_QUEUE_ENABLE, 2), 0);
}

static void loop_chain(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){0x8000, 8, DESC_WRITE | DESC_NEXT, 1};
    q->desc[1] = (struct guest_desc){0x8000, 8, DESC_WRITE | DESC_NEXT, 0};
    guest_publish(q, 0);
}

static void bad_next(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){0x8000, 8, DESC_WRITE | DESC_NEXT, 64};
    guest_publish(q, 0);
}

static void bad_head(struct guest_queue *q)
{
    guest_publish(q, 64);
}

static void bad_index(struct guest_queue *q)
{
    q->avail[1] += 65;
}

static void bad_address(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){GUEST_RAM_BYTES - 4, 8, DESC_WRITE, 0};
    guest_publish(q, 0);
}

static void bad_order(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){0x8000, 8, DESC_WRITE | DESC_NEXT, 1};
    q->desc[1] = (struct guest_desc){0x8000, 8, 0, 0};
    guest_publish(q, 0);
}

static void rom_buffer(struct guest_queue *q)
{
    (void)!physmap_set_rom(q->guest->memory, 0xC0000, 4096);
    q->desc[0] = (struct guest_desc){0xBFFF0, 32, DESC_WRITE, 0};
    guest_publish(q, 0);
}

static void nested_indirect(struct guest_queue *q)
{
    gpa_t table = guest_alloc(q->guest, 4096);

    *(struct guest_desc *)guest_at(q->guest, table, 16) = (struct guest_desc){table, 16, DESC_INDIRECT, 0};
    q->desc[0] = (struct guest_desc){table, 16, DESC_INDIRECT, 0};
    guest_publish(q, 0);
}

static void odd_indirect(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){0x8000, 24, DESC_INDIRECT, 0};
    guest_publish(q, 0);
}

static void indirect_with_next(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){0x8000, 16, DESC_INDIRECT | DESC_NEXT, 1};
    guest_publish(q, 0);
}

static void huge_indirect(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){0x10000, 16 * 1025, DESC_INDIRECT, 0};
    guest_publish(q, 0);
}

static void indirect_outside(struct guest_queue *q)
{
    q->desc[0] = (struct guest_desc){GUEST_RAM_BYTES - 16, 32, DESC_INDIRECT, 0};
    guest_publish(q, 0);
}

static void test_bad_chains(void **state)
{
    struct guest *g = &fixture.g;
    void (*const cases[])(struct guest_queue *) = {
        loop_chain, bad_next,     bad_head,           bad_index,     bad_address,      bad_order,
        rom_buffer, odd_indirect, indirect_with_next, huge_indirect, indirect_outside, nested_indirect,
    };

    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        unsigned before;

        guest_start(g, F_INDIRECT_DESC, 1);
        fetch(g, 8);
        before = g->messages[0];
        cases[i](&g->queue[0]);
        guest_kick(&g->queue[0]);
        guest_run(g);
        assert_false(guest_has_used(&g->queue[0]));
        assert_true(common_read(g, C_STATUS, 1) & STATUS_NEEDS_RESET);
        assert_int_equal(g->messages[0], before + 1); /* told by a configuration interrupt */
    }
    /* Indirect tables that were not agreed on. */
    guest_start(g, 0, 1);
    g->queue[0].indirect = true;
    guest_add(&g->queue[0], &(struct guest_buffer){0x8000, 8, true}, 1);
    guest_kick(&g->queue[0]);
    guest_run(g);
    assert_true(common_read(g, C_STATUS, 1) & STATUS_NEEDS_RESET);
    guest_start(g, 0, 1);
    fetch(g, 8); /* a reset mends it */
}

static void test_bus_master(void **state)
{
    struct guest *g = &fixture.g;
    struct guest_buffer buffer = {guest_alloc(g, 64), 64, true};

    guest_start(g, 0, 1);
    guest_config_write(g, 4, 2, 2);
    guest_add(&g->queue[0], &buffer, 1);
    guest_kick(&g->queue[0]);
    guest_run(g);
    assert_false(guest_has_used(&g->queue[0]));
    guest_config_write(g, 4, 2, 6);
    guest_wait_used(&g->queue[0]);
}

/* 4.1.4.9: registers through configuration space, as firmware does it. */
static void test_window(void **state)
{
    struct guest *g = &fixture.g;
    unsigned at = guest_config_read(g, 0x34, 1);

    while (!(guest_config_read(g, at, 1) == 9 && guest_config_read(g, at + 3, 1) == 5))
        at = guest_config_read(g, at + 1, 1);
    guest_config_write(g, at + 4, 1, 4);
    guest_config_write(g, at + 8, 4, C_STATUS);
    guest_config_write(g, at + 12, 4, 1);
    guest_config_write(g, at + 16, 1, STATUS_ACK);
    assert_int_equal(common_read(g, C_STATUS, 1), STATUS_ACK);
    common_write(g, C_STATUS, 1, STATUS_ACK | STATUS_DRIVER);
    assert_int_equal(guest_config_read(g, at + 16, 1), STATUS_ACK | STATUS_DRIVER);
    /* Nonsense is ignored. */
    guest_config_write(g, at + 12, 4, 3);
    guest_config_write(g, at + 16, 4, 0);
    guest_config_write(g, at + 12, 4, 4);
    guest_config_write(g, at + 8, 4, 0x3FFE);
    guest_config_write(g, at + 16, 4, 0);
    guest_config_write(g, at + 8, 4, 0xFFFFFFFC);
    guest_config_write(g, at + 16, 4, 0);
    guest_config_write(g, at + 4, 1, 1);
    guest_config_write(g, at + 16, 4, 0);
    (void)guest_config_read(g, at + 16, 4);
    assert_int_equal(common_read(g, C_STATUS, 1), STATUS_ACK | STATUS_DRIVER);
}

static void test_state(void **state)
{
    struct guest *g = &fixture.g;
    struct guest_buffer buffer = {guest_alloc(g, 64), 64, true};
    struct state_io *writer = state_writer_create(), *reader;
    size_t size;

    guest_start(g, F_EVENT_IDX | F_INDIRECT_DESC, 1);
    fetch(g, 8);
    guest_add(&g->queue[0], &buffer, 1); /* waits in the ring, not notified */
    assert_int_equal(virtio_rng_class.state(fixture.device, writer), 0);
    const void *data = state_writer_data(writer, &size);

    /* A new device in the same place takes over. */
    teardown(NULL);
    struct guest old = *g;
    setup(state);
    g->next_page = old.next_page;
    reader = state_reader_create(data, size);
    /* Memory did not travel along: empty rings, with the old indices. */
    memcpy(g->queue, old.queue, sizeof(g->queue));
    struct guest_queue *q = &g->queue[0];
    q->desc = guest_at(g, q->desc_gpa, 16 * q->size);
    q->avail = guest_at(g, q->avail_gpa, 6 + 2 * q->size);
    q->used = guest_at(g, q->used_gpa, 6 + 8 * q->size);
    q->avail[1] = 1;
    q->used[1] = 1;
    q->avail[2 + q->size] = 1;
    q->next_desc = 1;
    guest_add(q, &buffer, 1);
    assert_int_equal(virtio_rng_class.state(fixture.device, reader), 0);
    guest_wait_used(q); /* the chain is found without a notification */
    assert_int_equal(guest_take_used(q, NULL), 64);
    assert_int_equal(g->messages[1], 1);
    fetch(g, 8);
    assert_int_equal(common_read(g, C_STATUS, 1), 15);
    state_io_destroy(reader);

    /* A snapshot that is cut short leaves a device that is reset. */
    for (size_t cut = 0; cut < size; cut += 97) {
        reader = state_reader_create(data, cut);
        assert_true(virtio_rng_class.state(fixture.device, reader) < 0);
        state_io_destroy(reader);
        assert_int_equal(common_read(g, C_STATUS, 1), 0);
    }
    state_io_destroy(writer);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_identity),    TEST(test_negotiation), TEST(test_io), TEST(test_doorbells), cmocka_unit_test(test_doorbells_mmio),
        TEST(test_indirect_and_split),
        TEST(test_intx),        TEST(test_no_interrupt), TEST(test_event_index), TEST(test_queue_reset),
        TEST(test_bad_rings),   TEST(test_bad_chains),  TEST(test_bus_master),  TEST(test_window),
        TEST(test_state),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
