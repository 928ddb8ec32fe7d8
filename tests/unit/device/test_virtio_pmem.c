/*
 * virtio-pmem: where the memory is, flushes good and bad, a reset with one in flight, state.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/virtio_pmem.h"
#include "guest_driver.h"
#include "util/log.h"

extern const struct device_class virtio_pmem_class;

struct rig {
    struct guest guest;
    struct block *block;
    struct device *device;
    char path[64];
};

static void rig_open(struct rig *r, gpa_t start)
{
    struct error err = {0};
    int fd;
    guest_init(&r->guest);
    snprintf(r->path, sizeof r->path, "/tmp/doppel-pmem-XXXXXX");
    fd = mkstemp(r->path);
    assert_true(fd >= 0 && ftruncate(fd, 4 << 20) == 0);
    close(fd);
    assert_int_equal(block_open(&r->block, &(struct block_config){.path = r->path}, r->guest.loop, &err), 0);
    const struct virtio_pmem_config config = {.block = r->block, .start = start, .size_bytes = 4 << 20, .slot = 4};
    assert_int_equal(virtio_pmem_class.create(&r->device, &r->guest.host, &config, &err), 0);
    guest_attach(&r->guest, 4);
    guest_start(&r->guest, 0, 1);
}

static void rig_close(struct rig *r)
{
    while (!virtio_pmem_class.quiesce(r->device))
        assert_true(loop_run_once(r->guest.loop, 100) >= 0);
    virtio_pmem_class.destroy(r->device);
    block_close(r->block);
    unlink(r->path);
    guest_fini(&r->guest);
}

static uint32_t request(struct rig *r, uint32_t type, uint32_t type_bytes, uint32_t answer_bytes)
{
    struct guest_queue *q = &r->guest.queue[0];
    gpa_t gpa = guest_alloc(&r->guest, 8192);
    uint32_t *answer = guest_at(&r->guest, gpa + 4096, 4);
    memcpy(guest_at(&r->guest, gpa, 4), &type, 4);
    *answer = 0x5a5a5a5a;
    guest_add(q, (struct guest_buffer[]){{gpa, type_bytes, false}, {gpa + 4096, answer_bytes, true}}, 2);
    guest_kick(q);
    guest_wait_used(q);
    assert_int_equal(guest_take_used(q, NULL), answer_bytes < 4 ? answer_bytes : 4);
    return *answer;
}

static void test_flush(void **state)
{
    struct rig r;
    rig_open(&r, PHYSMAP_EXTRA_BASE);
    assert_int_equal(bus_read(r.guest.bus, BUS_MMIO, r.guest.config, 4), 0);
    assert_int_equal(bus_read(r.guest.bus, BUS_MMIO, r.guest.config + 4, 4), PHYSMAP_EXTRA_BASE >> 32);
    assert_int_equal(bus_read(r.guest.bus, BUS_MMIO, r.guest.config + 8, 4), 4 << 20);
    assert_int_equal(request(&r, 0, 4, 4), 0);
    assert_int_equal(request(&r, 0, 4, 100), 0);
    assert_int_equal(request(&r, 1, 4, 4), 1);
    assert_int_equal(request(&r, 0, 3, 4), 1);
    assert_int_equal(request(&r, 0, 4, 2) & 0xffff, 0);
    for (unsigned n = 0; n < 100; n++)
        assert_int_equal(request(&r, 0, 4, 4), 0);
    rig_close(&r);
}

static void test_reset(void **state)
{
    struct rig r;
    rig_open(&r, PHYSMAP_EXTRA_BASE);
    struct guest_queue *q = &r.guest.queue[0];
    gpa_t gpa = guest_alloc(&r.guest, 8192);
    for (unsigned n = 0; n < 20; n++)
        guest_add(q, (struct guest_buffer[]){{gpa, 4, false}, {gpa + 4096, 4, true}}, 2);
    guest_kick(q);
    assert_true(loop_run_once(r.guest.loop, 0) >= 0);
    guest_device_reset(&r.guest); /* returns when all have ended */
    guest_start(&r.guest, 0, 1);
    assert_int_equal(request(&r, 0, 4, 4), 0);
    rig_close(&r);
}

static void test_state(void **state)
{
    struct rig r, other;
    size_t size;
    rig_open(&r, PHYSMAP_EXTRA_BASE);
    struct state_io *writer = state_writer_create();
    assert_int_equal(virtio_pmem_class.state(r.device, writer), 0);
    const void *saved = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(saved, size);
    assert_int_equal(virtio_pmem_class.state(r.device, reader), 0);
    state_io_destroy(reader);
    assert_int_equal(request(&r, 0, 4, 4), 0);
    rig_open(&other, PHYSMAP_EXTRA_BASE + (1ull << 30));
    reader = state_reader_create(saved, size);
    assert_true(virtio_pmem_class.state(other.device, reader) < 0);
    assert_non_null(strstr(state_error(reader), "elsewhere"));
    state_io_destroy(reader);
    state_io_destroy(writer);
    rig_close(&other);
    rig_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_flush), cmocka_unit_test(test_reset), cmocka_unit_test(test_state)};
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
