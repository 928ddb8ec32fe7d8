/*
 * virtio-balloon: inflation with good and bad page numbers, statistics, hinting, reporting, queues by features, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#include "device/virtio_balloon.h"
#include "guest_driver.h"
#include "util/log.h"

#define F_STATS 2ull
#define F_HINT 8ull
#define F_POISON 16ull
#define F_REPORTING 32ull
#define PAGES_AT 0x400000ull /* memory that nothing else uses */

extern const struct device_class virtio_balloon_class;

struct rig {
    struct guest guest;
    struct device *device;
};

static void rig_open(struct rig *r, const struct virtio_balloon_config *config, uint64_t features, unsigned queues)
{
    struct error err = {0};
    guest_init(&r->guest);
    if (virtio_balloon_class.create(&r->device, &r->guest.host, config, &err))
        fail_msg("%s", err.text);
    guest_attach(&r->guest, 4);
    guest_start(&r->guest, features, queues);
    memset(guest_at(&r->guest, PAGES_AT, 1 << 20), 'x', 1 << 20);
}

static void rig_close(struct rig *r)
{
    virtio_balloon_class.destroy(r->device);
    guest_fini(&r->guest);
}

static struct virtio_balloon_status status_of(struct rig *r)
{
    struct virtio_balloon_status status;
    virtio_balloon_status(r->device, &status);
    return status;
}

static uint32_t config_word(struct rig *r, unsigned offset)
{
    return (uint32_t)bus_read(r->guest.bus, BUS_MMIO, r->guest.config + offset, 4);
}

/* One chain of one buffer; returns when it was used. */
static void send(struct rig *r, unsigned queue, gpa_t gpa, uint32_t length, bool writable)
{
    struct guest_queue *q = &r->guest.queue[queue];
    guest_add(q, &(struct guest_buffer){gpa, length, writable}, 1);
    guest_kick(q);
    guest_wait_used(q);
    assert_int_equal(guest_take_used(q, NULL), 0);
}

static void send_words(struct rig *r, unsigned queue, const uint32_t *words, unsigned count)
{
    gpa_t gpa = guest_alloc(&r->guest, count * 4);
    memcpy(guest_at(&r->guest, gpa, count * 4), words, count * 4);
    send(r, queue, gpa, count * 4, false);
}

static bool is_gone(struct rig *r, gpa_t gpa)
{
    const char *at = guest_at(&r->guest, gpa, 4096);
    assert_true(at[0] == 0 || at[0] == 'x');
    assert_memory_equal(at, at + 1, 4095);
    return at[0] == 0;
}

static void test_inflate(void **state)
{
    struct rig r;
    rig_open(&r, &(struct virtio_balloon_config){.target_pages = 77, .slot = 4}, 0, 2);
    assert_int_equal(guest_offered(&r.guest) & 0xFF, 0);
    assert_int_equal(config_word(&r, 0), 77);
    uint64_t before = physmap_resident_bytes(r.guest.memory);
    /* Out of order, twice, at the end of RAM and beyond, at the end of all page numbers. */
    send_words(&r, 0, (uint32_t[]){0x405, 0x400, 0x401, 0x405, 0x402, 0xFFE, 0xFFF, 0x1000, 0x100000, UINT32_MAX, UINT32_MAX - 1, 0x407}, 12);
    assert_true(physmap_resident_bytes(r.guest.memory) <= before - 4 * 4096);
    for (unsigned page = 0; page < 16; page++)
        assert_int_equal(is_gone(&r, PAGES_AT + page * 4096), page < 3 || page == 5 || page == 7);
    assert_int_equal(status_of(&r).discarded_bytes, 7 * 4096);
    send_words(&r, 1, (uint32_t[]){0x400, 0x401}, 2);
    send(&r, 0, PAGES_AT + 0x20000, 3, false); /* less than one number, and what is no request at all */
    send(&r, 0, PAGES_AT + 0x20000, 64, true);

    bus_write(r.guest.bus, BUS_MMIO, r.guest.config + 4, 4, 5);
    bus_write(r.guest.bus, BUS_MMIO, r.guest.config + 0, 4, 99); /* ours */
    assert_int_equal(status_of(&r).actual_pages, 5);
    assert_int_equal(status_of(&r).target_pages, 77);
    unsigned interrupts = r.guest.messages[0];
    virtio_balloon_resize(r.device, 1000);
    assert_int_equal(config_word(&r, 0), 1000);
    assert_int_equal(r.guest.messages[0], interrupts + 1);
    guest_device_reset(&r.guest);
    assert_int_equal(status_of(&r).actual_pages, 0);
    assert_int_equal(status_of(&r).target_pages, 1000);
    rig_close(&r);
}

/* The driver gives its own rings away: they are zeroes, and nothing worse. */
static void test_rings(void **state)
{
    struct rig r;
    rig_open(&r, &(struct virtio_balloon_config){.slot = 4}, 0, 2);
    struct guest_queue *q = &r.guest.queue[0];
    gpa_t list = guest_alloc(&r.guest, 4096);
    const uint32_t pages[] = {q->desc_gpa >> 12, q->avail_gpa >> 12, q->used_gpa >> 12, list >> 12};
    memcpy(guest_at(&r.guest, list, sizeof pages), pages, sizeof pages);
    guest_add(q, &(struct guest_buffer){list, sizeof pages, false}, 1);
    guest_kick(q);
    guest_run(&r.guest);
    assert_int_equal(status_of(&r).discarded_bytes, 4 * 4096);
    guest_kick(q);
    guest_run(&r.guest);
    guest_start(&r.guest, 0, 2);
    send_words(&r, 0, (uint32_t[]){0x400}, 1);
    assert_true(is_gone(&r, PAGES_AT));
    rig_close(&r);
}

static void put_stat(uint8_t *at, uint16_t tag, uint64_t value)
{
    memcpy(at, &tag, 2);
    memcpy(at + 2, &value, 8);
}

static void test_statistics(void **state)
{
    struct rig r, other;
    const struct virtio_balloon_config config = {.statistics = true, .statistics_interval_s = 1000, .slot = 4};
    rig_open(&r, &config, F_STATS, 3);
    struct guest_queue *q = &r.guest.queue[2];
    gpa_t gpa = guest_alloc(&r.guest, 4096);
    uint8_t *buffer = guest_at(&r.guest, gpa, 4096);
    put_stat(buffer, 5, 0x123456789);
    put_stat(buffer + 10, 700, 1); /* nobody knows it */
    put_stat(buffer + 20, 15, 2);
    assert_int_equal(status_of(&r).known, 0);
    guest_add(q, &(struct guest_buffer){gpa, 35, false}, 1); /* the last is not complete */
    guest_kick(q);
    guest_run(&r.guest);
    assert_int_equal(status_of(&r).known, 1u << 5 | 1u << 15);
    assert_int_equal(status_of(&r).statistic[5], 0x123456789);
    assert_false(guest_has_used(q)); /* ours until the next time */
    put_stat(buffer, 5, 4242);
    virtio_balloon_set_interval(r.device, 2000);
    guest_wait_used(q);
    guest_take_used(q, NULL);
    assert_int_equal(status_of(&r).statistic[5], 0x123456789);
    guest_add(q, &(struct guest_buffer){gpa, 30, false}, 1);
    guest_kick(q);
    guest_run(&r.guest);
    assert_int_equal(status_of(&r).statistic[5], 4242);

    /* Saved with a buffer waiting; the other device asks for it again. */
    struct state_io *writer = state_writer_create();
    size_t size;
    assert_int_equal(virtio_balloon_class.state(r.device, writer), 0);
    const void *saved = state_writer_data(writer, &size);
    rig_open(&other, &config, F_STATS, 3);
    memcpy(guest_at(&other.guest, 0, GUEST_RAM_BYTES), guest_at(&r.guest, 0, GUEST_RAM_BYTES), GUEST_RAM_BYTES);
    struct state_io *reader = state_reader_create(saved, size);
    assert_int_equal(virtio_balloon_class.state(other.device, reader), 0);
    assert_int_equal(status_of(&other).statistic[5], 4242);
    assert_int_equal(status_of(&other).statistics_interval_s, 2000);
    virtio_balloon_set_interval(other.device, 1);
    other.guest.queue[2].next_used = q->next_used;
    guest_wait_used(&other.guest.queue[2]);
    state_io_destroy(reader);
    state_io_destroy(writer);
    rig_close(&other);

    guest_device_reset(&r.guest); /* with the buffer in the ring */
    assert_int_equal(status_of(&r).known, 0);
    rig_close(&r);
}

static void test_hinting(void **state)
{
    struct rig r;
    rig_open(&r, &(struct virtio_balloon_config){.hinting = true, .slot = 4}, F_HINT | F_POISON, 3);
    send(&r, 2, PAGES_AT, 4096, true); /* nobody has asked */
    assert_false(is_gone(&r, PAGES_AT));
    virtio_balloon_hint(r.device, false);
    uint32_t round = config_word(&r, 8);
    assert_true(round >= 2);
    send_words(&r, 2, &round, 1);
    send(&r, 2, PAGES_AT + 100, 3 * 4096, true); /* two whole pages */
    assert_false(is_gone(&r, PAGES_AT + 0x3000));
    assert_false(*(char *)guest_at(&r.guest, PAGES_AT, 1) == 0);
    assert_true(is_gone(&r, PAGES_AT + 0x1000) && is_gone(&r, PAGES_AT + 0x2000));
    virtio_balloon_hint(r.device, true); /* while the old one goes on: what belongs to that is not taken */
    assert_int_equal(config_word(&r, 8), round + 1);
    send_words(&r, 2, &round, 1);
    send(&r, 2, PAGES_AT + 0x4000, 4096, true);
    assert_false(is_gone(&r, PAGES_AT + 0x4000));
    round++;
    send_words(&r, 2, &round, 1);
    send(&r, 2, PAGES_AT + 0x4000, 4096, true);
    assert_true(is_gone(&r, PAGES_AT + 0x4000));
    assert_int_equal(status_of(&r).guest_command, round);
    send_words(&r, 2, &(uint32_t){0}, 1);
    assert_int_equal(status_of(&r).guest_command, 0);
    assert_int_equal(config_word(&r, 8), 1); /* done, by itself */
    send(&r, 2, PAGES_AT + 0x5000, 4096, true);
    assert_false(is_gone(&r, PAGES_AT + 0x5000));
    virtio_balloon_hint(r.device, false);
    assert_int_equal(config_word(&r, 8), round + 1);
    virtio_balloon_hint_done(r.device);
    assert_int_equal(config_word(&r, 8), 1);
    rig_close(&r);
}

static void test_reporting(void **state)
{
    struct rig r;
    rig_open(&r, &(struct virtio_balloon_config){.hinting = true, .statistics = true, .reporting = true, .slot = 4}, F_POISON | F_REPORTING, 3);
    assert_int_equal(guest_offered(&r.guest) & 0xFF, F_STATS | F_HINT | F_POISON | F_REPORTING);
    struct guest_queue *q = &r.guest.queue[2]; /* the first after the two that are always there */
    guest_add(q, (struct guest_buffer[]){{PAGES_AT, 0x4000, true}, {PAGES_AT + 0x6000, 0x2000, true}, {PAGES_AT + 0x9001, 0xFFF, true}}, 3);
    guest_kick(q);
    guest_wait_used(q);
    guest_take_used(q, NULL);
    for (unsigned page = 0; page < 16; page++)
        assert_int_equal(is_gone(&r, PAGES_AT + page * 4096), page < 4 || page == 6 || page == 7);
    /* Free pages that are to hold something else than zeroes stay. */
    bus_write(r.guest.bus, BUS_MMIO, r.guest.config + 12, 4, 0xAA);
    send(&r, 2, PAGES_AT + 0xA000, 4096, true);
    assert_false(is_gone(&r, PAGES_AT + 0xA000));
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_inflate), cmocka_unit_test(test_rings),     cmocka_unit_test(test_statistics),
        cmocka_unit_test(test_hinting), cmocka_unit_test(test_reporting),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
