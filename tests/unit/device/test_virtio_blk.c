/*
 * virtio-blk driven by a guest's driver, over a raw image.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/virtio_blk.h"
#include "guest_driver.h"
#include "util/log.h"

#define DISK_BYTES (4ull << 20)
#define SECTORS (DISK_BYTES / 512)

#define F_RO (1ull << 5)
#define F_FLUSH (1ull << 9)
#define F_CONFIG_WCE (1ull << 11)
#define F_MQ (1ull << 12)
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
#define F_ALL (F_FLUSH | F_CONFIG_WCE | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_EVENT_IDX | F_INDIRECT_DESC)

enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };

extern const struct device_class virtio_blk_class;

static struct fixture {
    struct guest g;
    char path[64];
    struct block *block;
    struct device *device;
} f;

static bool mmio, unsafe; /* the transport; what the next disk is made with */

static void plug(bool readonly)
{
    struct block_config block_config = {.path = f.path, .readonly = readonly};
    struct virtio_blk_config config = {.serial = "SERIAL-0123456789-TOO-LONG", .unsafe = unsafe, .queues = 3, .slot = 7};
    struct error err;

    if (block_open(&f.block, &block_config, f.g.loop, &err) < 0)
        fail_msg("%s", err.text);
    config.block = f.block;
    assert_int_equal(virtio_blk_class.create(&f.device, &f.g.host, &config, &err), 0);
    guest_attach(&f.g, 7);
}

static void unplug(void)
{
    while (!virtio_blk_class.quiesce(f.device))
        loop_run_once(f.g.loop, 100);
    virtio_blk_class.destroy(f.device);
    block_close(f.block);
}

static int setup(void **state)
{
    int fd;

    log_set_level(LOG_ERROR);
    (mmio ? guest_init_mmio : guest_init)(&f.g);
    strcpy(f.path, "/tmp/doppel-blk-XXXXXX");
    fd = mkstemp(f.path);
    assert_true(fd >= 0 && ftruncate(fd, DISK_BYTES) == 0);
    close(fd);
    plug(false);
    return 0;
}

static int teardown(void **state)
{
    unplug();
    guest_fini(&f.g);
    unlink(f.path);
    return 0;
}

/* Puts a request on a queue: header, data, status in three buffers, in the usual way. Returns the status byte's address. */
static gpa_t post(unsigned queue, uint32_t type, uint64_t sector, gpa_t data, uint32_t length, bool writable)
{
    gpa_t header = guest_alloc(&f.g, 4096);
    uint64_t *words = guest_at(&f.g, header, 16);
    struct guest_buffer buffers[3] = {{header, 16, false}, {data, length, writable}, {header + 64, 1, true}};

    words[0] = type;
    words[1] = sector;
    *(uint8_t *)guest_at(&f.g, header + 64, 1) = 0xEE;
    if (length == 0)
        buffers[1] = buffers[2];
    guest_add(&f.g.queue[queue], buffers, length ? 3 : 2);
    guest_kick(&f.g.queue[queue]);
    return header + 64;
}

static uint8_t status_at(gpa_t gpa)
{
    return *(uint8_t *)guest_at(&f.g, gpa, 1);
}

static uint8_t request(uint32_t type, uint64_t sector, gpa_t data, uint32_t length, bool writable)
{
    gpa_t status = post(0, type, sector, data, length, writable);

    guest_wait_used(&f.g.queue[0]);
    guest_take_used(&f.g.queue[0], NULL);
    return status_at(status);
}

static void fill(gpa_t gpa, uint8_t value, uint32_t length)
{
    memset(guest_at(&f.g, gpa, length), value, length);
}

static uint8_t byte_on_disk(uint64_t offset)
{
    uint8_t value = 0xFF;
    int fd = open(f.path, O_RDONLY);

    assert_int_equal(pread(fd, &value, 1, (off_t)offset), 1);
    close(fd);
    return value;
}

static void test_config(void **state)
{
    uint64_t features = guest_offered(&f.g);

    assert_true((features & F_ALL) == F_ALL);
    assert_false(features & F_RO);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config, 8), SECTORS);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config, 4), SECTORS);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 20, 4), 512);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 34, 2), 3);
    if (mmio)
        return;
    assert_int_equal(common_read(&f.g, C_NUM_QUEUES, 2), 3);
    assert_int_equal(guest_config_read(&f.g, 0xA, 2), 0x0180);
}

static void test_read_write(void **state)
{
    gpa_t out, in;

    guest_start(&f.g, F_ALL, 1);
    out = guest_alloc(&f.g, 65536);
    in = guest_alloc(&f.g, 65536);
    for (unsigned i = 0; i < 65536; i++)
        *(uint8_t *)guest_at(&f.g, out + i, 1) = (uint8_t)(i * 13 + (i >> 8));
    for (unsigned round = 0; round < 2; round++) {
        f.g.queue[0].indirect = round;
        assert_int_equal(request(T_OUT, 100 + round, out, 65536, false), S_OK);
        assert_int_equal(request(T_FLUSH, 0, 0, 0, false), S_OK);
        assert_int_equal(request(T_IN, 100 + round, in, 65536, true), S_OK);
        assert_memory_equal(guest_at(&f.g, in, 65536), guest_at(&f.g, out, 65536), 65536);
        assert_int_equal(byte_on_disk((100 + round) * 512 + 1), 13);
        assert_true(physmap_take_dirty(f.g.memory, in + 65535));
    }
    assert_int_equal(request(T_IN, SECTORS, in, 512, true), S_IOERR);
    assert_int_equal(request(T_IN, SECTORS - 1, in, 1024, true), S_IOERR);
    assert_int_equal(request(T_IN, 1ull << 55, in, 512, true), S_IOERR);
    assert_int_equal(request(T_OUT, UINT64_MAX, out, 512, false), S_IOERR);
    assert_int_equal(request(T_OUT, 0, out, 500, false), S_IOERR);
    assert_int_equal(request(T_IN, SECTORS - 1, in, 512, true), S_OK);
    assert_int_equal(request(99, 0, in, 512, true), S_UNSUPP);
    assert_int_equal(request(T_IN, 0, 0, 0, false), S_OK); /* nothing to read */
}

static void test_id(void **state)
{
    gpa_t data;

    guest_start(&f.g, 0, 1);
    data = guest_alloc(&f.g, 4096);
    fill(data, 0xEE, 32);
    assert_int_equal(request(T_GET_ID, 0, data, 20, true), S_OK);
    assert_memory_equal(guest_at(&f.g, data, 20), "SERIAL-0123456789-TO", 20);
    assert_int_equal(*(uint8_t *)guest_at(&f.g, data + 20, 1), 0xEE);
    assert_int_equal(request(T_GET_ID, 0, data, 5, true), S_OK);
}

/* Legal: the header and the status split and merged in any way (2.7.4). */
static void test_layouts(void **state)
{
    gpa_t page;
    struct guest_queue *q = &f.g.queue[0];

    guest_start(&f.g, 0, 1);
    for (unsigned cut = 1; cut < 16; cut++) {
        page = guest_alloc(&f.g, 8192);
        uint64_t *header = guest_at(&f.g, page, 16);
        struct guest_buffer write[] = {
            {page, cut, false}, {page + cut, 16 - cut + 100, false}, {page + 116, 412, false}, {page + 4096, 1, true}};
        struct guest_buffer read[] = {
            {page, cut, false}, {page + cut, 16 - cut, false}, {page + 2048, cut, true}, {page + 2048 + cut, 513 - cut, true}};

        header[0] = T_OUT;
        header[1] = cut;
        fill(page + 16, (uint8_t)cut, 512);
        guest_add(q, write, 4);
        guest_kick(q);
        guest_wait_used(q);
        assert_int_equal(guest_take_used(q, NULL), 1);
        assert_int_equal(status_at(page + 4096), S_OK);
        assert_int_equal(byte_on_disk(cut * 512 + 511), cut);
        header[0] = T_IN;
        fill(page + 2048, 0xEE, 514);
        guest_add(q, read, 4);
        guest_kick(q);
        guest_wait_used(q);
        assert_int_equal(guest_take_used(q, NULL), 513);
        assert_memory_equal(guest_at(&f.g, page + 2048, 512), guest_at(&f.g, page + 16, 512), 512);
        assert_int_equal(status_at(page + 2048 + 512), S_OK);
        assert_int_equal(status_at(page + 2048 + 513), 0xEE);
    }
}

static void test_short_requests(void **state)
{
    gpa_t page;
    struct guest_queue *q = &f.g.queue[0];

    guest_start(&f.g, 0, 1);
    page = guest_alloc(&f.g, 4096);
    struct guest_buffer tiny[] = {{page, 8, false}, {page + 64, 1, true}};
    guest_add(q, tiny, 2);
    guest_kick(q);
    guest_wait_used(q);
    guest_take_used(q, NULL);
    assert_int_equal(status_at(page + 64), S_IOERR);
    /* No room for a status: the device cannot answer. */
    guest_add(q, tiny, 1);
    guest_kick(q);
    guest_run(&f.g);
    assert_true(common_read(&f.g, C_STATUS, 1) & STATUS_NEEDS_RESET);
}

static uint8_t segments(uint32_t type, uint64_t sector, uint32_t count, uint32_t flags, unsigned copies)
{
    gpa_t data = guest_alloc(&f.g, 4096);
    struct {
        uint64_t sector;
        uint32_t count, flags;
    } *segment = guest_at(&f.g, data, 4096);

    for (unsigned i = 0; i < copies; i++) {
        segment[i].sector = sector + i * count;
        segment[i].count = count;
        segment[i].flags = flags;
    }
    return request(type, 0, data, copies * 16, false);
}

static void test_discard_and_zeroes(void **state)
{
    gpa_t data;

    guest_start(&f.g, F_ALL, 1);
    data = guest_alloc(&f.g, 65536);
    fill(data, 0xAB, 65536);
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(request(T_OUT, i * 128, data, 65536, false), S_OK);
    assert_int_equal(segments(T_WRITE_ZEROES, 10, 20, 0, 1), S_OK);
    assert_int_equal(byte_on_disk(10 * 512 - 1), 0xAB);
    assert_int_equal(byte_on_disk(10 * 512), 0);
    assert_int_equal(byte_on_disk(30 * 512 - 1), 0);
    assert_int_equal(byte_on_disk(30 * 512), 0xAB);
    assert_int_equal(segments(T_WRITE_ZEROES, 100, 8, 1, 16), S_OK);
    assert_int_equal(byte_on_disk(228 * 512 - 1), 0);
    assert_int_equal(byte_on_disk(228 * 512), 0xAB);
    assert_int_equal(segments(T_DISCARD, 512, 128, 0, 2), S_OK);
    assert_int_equal(byte_on_disk(768 * 512), 0xAB);

    assert_int_equal(segments(T_DISCARD, 0, 8, 1, 1), S_UNSUPP);
    assert_int_equal(segments(T_WRITE_ZEROES, 0, 8, 2, 1), S_UNSUPP);
    assert_int_equal(segments(T_DISCARD, SECTORS - 4, 8, 0, 1), S_IOERR);
    assert_int_equal(segments(T_WRITE_ZEROES, UINT64_MAX - 4, 8, 0, 1), S_IOERR);
    assert_int_equal(segments(T_WRITE_ZEROES, 0, UINT32_MAX, 0, 1), S_IOERR);
    assert_int_equal(segments(T_WRITE_ZEROES, 0, 1, 0, 17), S_IOERR);
    assert_int_equal(request(T_DISCARD, 0, data, 24, false), S_IOERR);
    assert_int_equal(byte_on_disk(0), 0xAB);

    guest_start(&f.g, F_FLUSH, 1); /* not agreed on */
    assert_int_equal(segments(T_DISCARD, 0, 8, 0, 1), S_UNSUPP);
    assert_int_equal(segments(T_WRITE_ZEROES, 0, 8, 0, 1), S_UNSUPP);
}

static void test_write_through(void **state)
{
    gpa_t data;

    guest_start(&f.g, F_ALL, 1);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 32, 1), 1);
    bus_write(f.g.bus, BUS_MMIO, f.g.config + 32, 1, 0);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 32, 1), 0);
    bus_write(f.g.bus, BUS_MMIO, f.g.config, 8, 1); /* the capacity is not the driver's to set */
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config, 8), SECTORS);
    data = guest_alloc(&f.g, 4096);
    fill(data, 0x77, 4096);
    assert_int_equal(request(T_OUT, 3, data, 4096, false), S_OK);
    assert_int_equal(byte_on_disk(3 * 512), 0x77);
    guest_device_reset(&f.g);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 32, 1), 1);
}

static void test_queues(void **state)
{
    gpa_t data[3], status[3][16];

    guest_start(&f.g, F_ALL, 3);
    for (unsigned q = 0; q < 3; q++) {
        data[q] = guest_alloc(&f.g, 4096);
        fill(data[q], (uint8_t)(q + 1), 4096);
        for (unsigned i = 0; i < 16; i++)
            status[q][i] = post(q, T_OUT, q * 1000 + i * 8, data[q], 4096, false);
    }
    for (unsigned q = 0; q < 3; q++) {
        for (unsigned i = 0; i < 16; i++) {
            guest_wait_used(&f.g.queue[q]);
            guest_take_used(&f.g.queue[q], NULL);
        }
        for (unsigned i = 0; i < 16; i++) {
            assert_int_equal(status_at(status[q][i]), S_OK);
            assert_int_equal(byte_on_disk((q * 1000 + i * 8) * 512), q + 1);
        }
        assert_true(mmio || f.g.messages[q + 1] > 0);
    }
}

/* A reset is over only when the disk has left the guest's memory alone. */
static void test_reset_in_flight(void **state)
{
    for (unsigned round = 0; round < 20; round++) {
        guest_start(&f.g, F_ALL, 2);
        for (unsigned i = 0; i < 16; i++)
            post(i % 2, i % 3 ? T_IN : T_OUT, i * 8, guest_alloc(&f.g, 4096), 4096, i % 3);
        loop_run_once(f.g.loop, 0);
        guest_device_reset(&f.g);
        assert_int_equal(block_in_flight(f.block), 0);
    }
    guest_start(&f.g, F_RING_RESET, 1);
    gpa_t pages[16];
    for (unsigned i = 0; i < 16; i++) {
        pages[i] = guest_alloc(&f.g, 4096);
        memset(guest_at(&f.g, pages[i], 4096), 0xEE, 4096);
        physmap_take_dirty(f.g.memory, pages[i]);
        post(0, T_IN, i * 8, pages[i], 4096, true);
    }
    loop_run_once(f.g.loop, 0);
    common_write(&f.g, C_QUEUE_SELECT, 2, 0);
    common_write(&f.g, C_QUEUE_RESET, 2, 1);
    while (common_read(&f.g, C_QUEUE_RESET, 2))
        loop_run_once(f.g.loop, 100);
    /* Nobody is told of these reads any more, but what they wrote is written. */
    for (unsigned i = 0; i < 16; i++)
        assert_true(*(uint8_t *)guest_at(&f.g, pages[i], 1) == 0xEE || physmap_take_dirty(f.g.memory, pages[i]));
    guest_queue_setup(&f.g, 0, 64, 1);
    assert_int_equal(request(T_FLUSH, 0, 0, 0, false), S_OK);
}

static void test_readonly(void **state)
{
    gpa_t data;

    unplug();
    plug(true);
    assert_true(guest_offered(&f.g) & F_RO);
    assert_false(guest_offered(&f.g) & (F_DISCARD | F_WRITE_ZEROES));
    guest_start(&f.g, F_RO | F_FLUSH, 1);
    data = guest_alloc(&f.g, 4096);
    assert_int_equal(request(T_IN, 0, data, 4096, true), S_OK);
    assert_int_equal(request(T_OUT, 0, data, 4096, false), S_IOERR);
    assert_int_equal(request(T_FLUSH, 0, 0, 0, false), S_OK);
}

static void test_state(void **state)
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t size;
    unsigned count;
    gpa_t data;

    guest_start(&f.g, F_ALL, 2);
    data = guest_alloc(&f.g, 4096);
    fill(data, 0x42, 4096);
    assert_int_equal(request(T_OUT, 1, data, 4096, false), S_OK);
    bus_write(f.g.bus, BUS_MMIO, f.g.config + 32, 1, 0);
    while (!virtio_blk_class.quiesce(f.device))
        loop_run_once(f.g.loop, 100);
    assert_int_equal(virtio_blk_class.state(f.device, writer), 0);
    const void *saved = state_writer_data(writer, &size);
    const struct state_need *need = state_needed(writer, &count);
    assert_int_equal(count, 2 * 3);
    for (unsigned i = 0; i < 2; i++) { /* the rings, whole */
        const struct guest_queue *q = &f.g.queue[i];
        const struct state_need rings[] = {{q->desc_gpa, 16 * q->size}, {q->avail_gpa, 6 + 2 * q->size}, {q->used_gpa, 6 + 8 * q->size}};
        assert_memory_equal(need + 3 * i, rings, sizeof rings);
    }

    /* The same guest memory goes on with a new device. */
    unplug();
    plug(false);
    reader = state_reader_create(saved, size);
    assert_int_equal(virtio_blk_class.state(f.device, reader), 0);
    state_io_destroy(reader);
    assert_int_equal(bus_read(f.g.bus, BUS_MMIO, f.g.config + 32, 1), 0);
    fill(data, 0, 4096);
    assert_int_equal(request(T_IN, 1, data, 4096, true), S_OK);
    assert_int_equal(*(uint8_t *)guest_at(&f.g, data + 4095, 1), 0x42);

    /* Another disk does not take it. */
    unplug();
    assert_int_equal(truncate(f.path, DISK_BYTES * 2), 0);
    plug(false);
    reader = state_reader_create(saved, size);
    assert_true(virtio_blk_class.state(f.device, reader) < 0);
    assert_non_null(strstr(state_error(reader), "another size"));
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void test_unsafe(void **state)
{
    unplug();
    unsafe = true;
    plug(false);
    unsafe = false;
    assert_int_equal(guest_offered(&f.g) & (1ull << 9 | 1ull << 11), 0); /* FLUSH, CONFIG_WCE */
    guest_start(&f.g, 0, 1);
    gpa_t data = guest_alloc(&f.g, 4096);
    assert_int_equal(request(T_OUT, 1, data, 4096, false), S_OK);
    assert_int_equal(request(T_FLUSH, 0, data, 0, false), S_OK); /* nobody should, and it does no harm */
}

static uint64_t now_ms(void)
{
    return loop_now_ns() / 1000000;
}

/* Fifty requests of 4 KiB at 1 MB/s, ten of which are in the bucket; the rest waits, and nothing but the timer starts it. */
static void test_limit(void **state)
{
    const struct bucket_config bandwidth = {40960, 0, 40}, none = {0};
    struct guest_queue *q = &f.g.queue[0];
    gpa_t header = guest_alloc(&f.g, 4096), data = guest_alloc(&f.g, 4096), status = guest_alloc(&f.g, 4096);
    const struct guest_buffer buffers[] = {{header, 16, false}, {data, 4096, true}, {status, 1, true}};

    guest_start(&f.g, F_INDIRECT_DESC, 1);
    q->indirect = true;
    virtio_blk_set_limit(f.device, &bandwidth, NULL);
    uint64_t begin = now_ms();
    for (unsigned i = 0; i < 50; i++)
        guest_add(q, buffers, 3);
    guest_kick(q);
    for (unsigned i = 0; i < 50; i++) {
        guest_wait_used(q);
        guest_take_used(q, NULL);
        assert_true(i < 10 || now_ms() - begin >= (i - 9) * 4 - 1);
    }
    assert_true(now_ms() - begin >= 159);

    /* A limit that is lifted lets go of what waits. */
    virtio_blk_set_limit(f.device, NULL, &(struct bucket_config){1, 0, 3600000});
    guest_add(q, buffers, 3);
    guest_add(q, buffers, 3);
    guest_kick(q);
    guest_wait_used(q);
    guest_take_used(q, NULL);
    guest_run(&f.g);
    assert_false(guest_has_used(q));
    assert_true(virtio_blk_class.quiesce(f.device)); /* it waits in the ring */
    virtio_blk_set_limit(f.device, &none, &none);
    guest_wait_used(q);
    guest_take_used(q, NULL);

    /* A reset meanwhile is the end of it. */
    virtio_blk_set_limit(f.device, NULL, &(struct bucket_config){1, 0, 20});
    guest_add(q, buffers, 3);
    guest_add(q, buffers, 3);
    guest_kick(q);
    guest_run(&f.g);
    guest_device_reset(&f.g);
    guest_start(&f.g, 0, 1);
    assert_int_equal(request(T_IN, 0, data, 512, true), S_OK);
    assert_int_equal(request(T_IN, 0, data, 512, true), S_OK);
}

/* Argument "mmio": over memory-mapped registers. */
int main(int argc, char **argv)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_config),         TEST(test_read_write),         TEST(test_id),            TEST(test_layouts),
        TEST(test_short_requests), TEST(test_discard_and_zeroes), TEST(test_write_through), TEST(test_queues),
        TEST(test_reset_in_flight), TEST(test_readonly),          TEST(test_state), TEST(test_unsafe), TEST(test_limit),
    };

    mmio = argc > 1;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
