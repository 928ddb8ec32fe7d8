/*
 * virtio-mem: plugging up to what was asked for, unplugging that waits until nobody runs, wrong requests, resets, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "device/virtio_mem.h"
#include "guest_driver.h"
#include "util/log.h"

#define BLOCK (2ull << 20)
#define BLOCKS 16u
#define BASE PHYSMAP_EXTRA_BASE
#define F_INACCESSIBLE 2ull

enum { PLUG, UNPLUG, UNPLUG_ALL, STATE };
enum { ACK, NACK, BUSY, ERROR };

extern const struct device_class virtio_mem_class;

struct rig {
    struct guest guest;
    struct device *device;
    unsigned wanted; /* calls of unplug */
    gpa_t answer;
};

static void unplug(void *ctx)
{
    ((struct rig *)ctx)->wanted++;
}

static void rig_open(struct rig *r)
{
    struct error err = {0};
    const struct virtio_mem_config config = {
        .start = BASE, .region_bytes = BLOCKS * BLOCK, .block_bytes = BLOCK, .unplug = unplug, .ctx = r, .slot = 4};
    const struct physmap_config memory = {.ram_bytes = GUEST_RAM_BYTES, .plug_bytes = BLOCKS * BLOCK, .block_bytes = BLOCK};
    *r = (struct rig){0};
    guest_init(&r->guest);
    physmap_destroy(r->guest.memory);
    assert_int_equal(physmap_create_with(&r->guest.memory, &memory, &err), 0);
    r->guest.host.memory = r->guest.memory;
    assert_int_equal(virtio_mem_class.create(&r->device, &r->guest.host, &config, &err), 0);
    guest_attach(&r->guest, 4);
    guest_start(&r->guest, F_INACCESSIBLE, 1);
}

static void rig_close(struct rig *r)
{
    virtio_mem_class.destroy(r->device);
    guest_fini(&r->guest);
}

static uint64_t config_field(struct rig *r, unsigned offset)
{
    return bus_read(r->guest.bus, BUS_MMIO, r->guest.config + offset, 4) | bus_read(r->guest.bus, BUS_MMIO, r->guest.config + offset + 4, 4) << 32;
}

static uint64_t plugged(struct rig *r)
{
    struct virtio_mem_status status;
    virtio_mem_status(r->device, &status);
    assert_int_equal(config_field(r, 40), status.plugged_bytes);
    assert_int_equal(config_field(r, 48), status.requested_bytes);
    return status.plugged_bytes / BLOCK;
}

static void post(struct rig *r, uint16_t type, gpa_t address, uint16_t blocks, uint32_t bytes)
{
    struct guest_queue *q = &r->guest.queue[0];
    gpa_t gpa = guest_alloc(&r->guest, 8192);
    uint8_t *request = guest_at(&r->guest, gpa, 24);
    memcpy(request, &type, 2);
    memcpy(request + 8, &address, 8);
    memcpy(request + 16, &blocks, 2);
    r->answer = gpa + 4096;
    guest_add(q, (struct guest_buffer[]){{gpa, bytes, false}, {gpa + 4096, 10, true}}, 2);
    guest_kick(q);
    guest_run(&r->guest);
}

static unsigned answer(struct rig *r, unsigned *state)
{
    const uint16_t *words = guest_at(&r->guest, r->answer, 10);
    assert_int_equal(guest_take_used(&r->guest.queue[0], NULL), 10);
    if (state)
        *state = words[4];
    return words[0];
}

static unsigned request(struct rig *r, uint16_t type, gpa_t address, uint16_t blocks)
{
    unsigned before = r->wanted;
    post(r, type, address, blocks, 24);
    if (r->wanted != before) {
        assert_false(guest_has_used(&r->guest.queue[0]));
        assert_true(virtio_mem_unplug(r->device));
        assert_false(virtio_mem_unplug(r->device));
    }
    return answer(r, NULL);
}

static unsigned state_of(struct rig *r, gpa_t address, uint16_t blocks)
{
    unsigned state;
    post(r, STATE, address, blocks, 24);
    assert_int_equal(answer(r, &state), ACK);
    return state;
}

static void test_plug(void **state)
{
    struct rig r;
    rig_open(&r);
    assert_int_equal(config_field(&r, 0), BLOCK);
    assert_int_equal(config_field(&r, 16), BASE);
    assert_int_equal(config_field(&r, 24), BLOCKS * BLOCK);
    assert_int_equal(config_field(&r, 32), BLOCKS * BLOCK);
    assert_int_equal(request(&r, PLUG, BASE, 1), NACK); /* nobody has asked */
    unsigned interrupts = r.guest.messages[0];
    virtio_mem_request(r.device, 6 * BLOCK);
    assert_int_equal(r.guest.messages[0], interrupts + 1);
    assert_int_equal(request(&r, PLUG, BASE + 2 * BLOCK, 4), ACK);
    assert_int_equal(plugged(&r), 4);
    memset(guest_at(&r.guest, BASE + 2 * BLOCK, 4 * BLOCK), 'x', 4 * BLOCK);
    assert_int_equal(request(&r, PLUG, BASE + 5 * BLOCK, 2), ERROR); /* one is */
    assert_int_equal(request(&r, PLUG, BASE + 6 * BLOCK, 3), NACK);
    assert_int_equal(state_of(&r, BASE, 2), 1);
    assert_int_equal(state_of(&r, BASE + 2 * BLOCK, 4), 0);
    assert_int_equal(state_of(&r, BASE + BLOCK, 2), 2);
    assert_int_equal(request(&r, UNPLUG, BASE + BLOCK, 2), ERROR);
    assert_int_equal(request(&r, UNPLUG, BASE + 3 * BLOCK, 2), ACK);
    assert_int_equal(plugged(&r), 2);
    assert_null(physmap_get(r.guest.memory, BASE + 3 * BLOCK, 1, PHYSMAP_READ));
    assert_int_equal(request(&r, PLUG, BASE + 3 * BLOCK, 1), ACK);
    assert_int_equal(*(char *)guest_at(&r.guest, BASE + 3 * BLOCK, 1), 0);
    assert_int_equal(*(char *)guest_at(&r.guest, BASE + 5 * BLOCK, 1), 'x');
    virtio_mem_request(r.device, 0);
    assert_int_equal(request(&r, UNPLUG_ALL, 0, 0), ACK);
    assert_int_equal(request(&r, UNPLUG_ALL, 0, 0), ACK);
    assert_int_equal(plugged(&r), 0);
    rig_close(&r);
}

static void test_wrong(void **state)
{
    static const struct {
        gpa_t address;
        uint16_t blocks;
    } ranges[] = {{BASE, 0},         {BASE - BLOCK, 1},          {BASE + 1, 1},  {BASE + BLOCK / 2, 1}, {BASE, BLOCKS + 1}, {BASE, 65535},
                  {0, 1},            {BASE + BLOCKS * BLOCK, 1}, {~0ull, 1},     {~0ull - BLOCK + 1, 2}, {0x100000, 1}};
    struct rig r;
    rig_open(&r);
    virtio_mem_request(r.device, BLOCKS * BLOCK);
    for (unsigned n = 0; n < sizeof ranges / sizeof *ranges; n++)
        for (uint16_t type = 0; type < 6; type++)
            if (type != UNPLUG_ALL)
                assert_int_equal(request(&r, type, ranges[n].address, ranges[n].blocks), ERROR);
    post(&r, PLUG, BASE, 1, 17);
    assert_int_equal(answer(&r, NULL), ERROR);
    post(&r, PLUG, BASE, 1, 1);
    assert_int_equal(answer(&r, NULL), ERROR);
    post(&r, UNPLUG_ALL, 0, 0, 8); /* all that it takes */
    assert_int_equal(answer(&r, NULL), ACK);
    assert_int_equal(plugged(&r), 0);
    assert_int_equal(r.wanted, 0);
    rig_close(&r);
}

/* A request waits when the driver goes, or the device. */
static void test_waiting(void **state)
{
    struct rig r;
    rig_open(&r);
    virtio_mem_request(r.device, 8 * BLOCK);
    assert_int_equal(request(&r, PLUG, BASE, 8), ACK);
    post(&r, UNPLUG, BASE, 4, 24);
    gpa_t first = r.answer;
    post(&r, STATE, BASE, 4, 24); /* after it */
    assert_int_equal(r.wanted, 1);
    assert_false(guest_has_used(&r.guest.queue[0]));
    assert_true(virtio_mem_unplug(r.device));
    guest_run(&r.guest);
    guest_take_used(&r.guest.queue[0], NULL);
    unsigned seen;
    assert_int_equal(answer(&r, &seen), ACK);
    assert_int_equal(seen, 1);
    assert_int_equal(*(uint16_t *)guest_at(&r.guest, first, 2), ACK);

    post(&r, UNPLUG, BASE + 4 * BLOCK, 2, 24);
    guest_device_reset(&r.guest);
    assert_false(virtio_mem_unplug(r.device));
    assert_int_equal(plugged(&r), 4); /* stays with the machine */
    guest_start(&r.guest, F_INACCESSIBLE, 1);
    post(&r, UNPLUG_ALL, 0, 0, 24);
    virtio_mem_class.reset(r.device);
    struct virtio_mem_status status;
    virtio_mem_status(r.device, &status);
    assert_int_equal(status.plugged_bytes, 0);
    assert_int_equal(status.requested_bytes, 8 * BLOCK);
    rig_close(&r);
}

static void test_state(void **state)
{
    struct rig r, other;
    size_t size;
    rig_open(&r);
    virtio_mem_request(r.device, 8 * BLOCK);
    assert_int_equal(request(&r, PLUG, BASE + BLOCK, 3), ACK);
    assert_int_equal(request(&r, PLUG, BASE + 9 * BLOCK, 1), ACK);
    strcpy(guest_at(&r.guest, BASE + 9 * BLOCK, 8), "here");
    post(&r, UNPLUG, BASE + 2 * BLOCK, 1, 24); /* waits while it is saved */
    gpa_t where = r.answer;
    struct state_io *writer = state_writer_create();
    assert_int_equal(virtio_mem_class.state(r.device, writer), 0);
    assert_false(virtio_mem_unplug(r.device));
    guest_run(&r.guest);
    assert_int_equal(r.wanted, 2); /* found again */
    assert_true(virtio_mem_unplug(r.device));

    const void *saved = state_writer_data(writer, &size);
    rig_open(&other);
    virtio_mem_request(other.device, 2 * BLOCK);
    assert_int_equal(request(&other, PLUG, BASE, 2), ACK);
    memcpy(guest_at(&other.guest, 0, GUEST_RAM_BYTES), guest_at(&r.guest, 0, GUEST_RAM_BYTES), GUEST_RAM_BYTES);
    struct state_io *reader = state_reader_create(saved, size);
    assert_int_equal(virtio_mem_class.state(other.device, reader), 0);
    assert_int_equal(plugged(&other), 4);
    assert_null(physmap_get(other.guest.memory, BASE, 1, PHYSMAP_READ));
    assert_non_null(physmap_get(other.guest.memory, BASE + BLOCK, 3 * BLOCK, PHYSMAP_WRITE));
    guest_run(&other.guest);
    assert_int_equal(other.wanted, 1); /* the request came along */
    assert_true(virtio_mem_unplug(other.device));
    assert_int_equal(*(uint16_t *)guest_at(&other.guest, where, 2), ACK);
    assert_int_equal(plugged(&other), 3);
    for (size_t n = 0; n < size; n++) { /* bytes of a snapshot that somebody has changed */
        uint8_t *copy = (uint8_t *)guest_at(&r.guest, 0x800000, size);
        memcpy(copy, saved, size);
        copy[n] ^= 0xff;
        struct state_io *broken = state_reader_create(copy, size);
        assert_true(virtio_mem_class.state(other.device, broken) < 0);
        state_io_destroy(broken);
    }
    state_io_destroy(reader);
    state_io_destroy(writer);
    rig_close(&other);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plug), cmocka_unit_test(test_wrong), cmocka_unit_test(test_waiting), cmocka_unit_test(test_state)};
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
