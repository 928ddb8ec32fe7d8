/* The bus: splitting, widening, overlaps, unclaimed accesses. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>

#include <cmocka.h>

#include "chipset/bus.h"

struct seen {
    unsigned count;
    struct {
        uint64_t offset, value;
        unsigned size_bytes;
        bool write;
    } access[16];
};

static uint64_t record_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct seen *seen = ctx;

    seen->access[seen->count % 16].offset = offset;
    seen->access[seen->count % 16].size_bytes = size_bytes;
    seen->access[seen->count++ % 16].write = false;
    return 0x8877665544332211ull >> (offset % 8 * 8);
}

static void record_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct seen *seen = ctx;

    seen->access[seen->count % 16].offset = offset;
    seen->access[seen->count % 16].size_bytes = size_bytes;
    seen->access[seen->count % 16].value = value;
    seen->access[seen->count++ % 16].write = true;
}

static const struct region_ops any_ops = {"any", record_read, record_write, 0, 0};
static const struct region_ops byte_ops = {"byte", record_read, record_write, 1, 1};
static const struct region_ops dword_ops = {"dword", record_read, record_write, 4, 4};

static void test_splits(void **state)
{
    struct bus *bus = bus_create();
    struct seen seen = {0};

    assert_int_equal(bus_add(bus, BUS_PORT, 0x3F8, 8, &byte_ops, &seen), 0);
    assert_int_equal(bus_read(bus, BUS_PORT, 0x3F8, 4), 0x44332211);
    assert_int_equal(seen.count, 4);
    assert_int_equal(seen.access[3].offset, 3);
    seen.count = 0;
    bus_write(bus, BUS_PORT, 0x3FE, 4, 0xAABBCCDD); /* the last two bytes are nobody's */
    assert_int_equal(seen.count, 2);
    assert_int_equal(seen.access[0].value, 0xDD);
    assert_int_equal(seen.access[1].value, 0xCC);
    assert_int_equal(bus_unclaimed(bus), 1);
    bus_destroy(bus);
}

static void test_unaligned(void **state)
{
    struct bus *bus = bus_create();
    struct seen seen = {0};

    assert_int_equal(bus_add(bus, BUS_MMIO, 0x1000, 0x1000, &any_ops, &seen), 0);
    assert_true(bus_read(bus, BUS_MMIO, 0x1000, 8) == 0x8877665544332211ull);
    assert_int_equal(seen.count, 1);
    seen.count = 0;
    assert_int_equal(bus_read(bus, BUS_MMIO, 0x1001, 4), 0x55443322); /* 1, 2, 1 */
    assert_int_equal(seen.count, 3);
    assert_int_equal(seen.access[1].size_bytes, 2);
    bus_destroy(bus);
}

static void test_minimum(void **state)
{
    struct bus *bus = bus_create();
    struct seen seen = {0};

    assert_int_equal(bus_add(bus, BUS_MMIO, 0x1000, 0x10, &dword_ops, &seen), 0);
    assert_int_equal(bus_read(bus, BUS_MMIO, 0x1002, 2), 0x4433); /* widened */
    assert_int_equal(seen.access[0].offset, 0);
    assert_int_equal(seen.access[0].size_bytes, 4);
    seen.count = 0;
    bus_write(bus, BUS_MMIO, 0x1002, 2, 1); /* dropped */
    assert_int_equal(seen.count, 0);
    bus_write(bus, BUS_MMIO, 0x1000, 8, 0x1122334455667788ull);
    assert_int_equal(seen.count, 2);
    assert_int_equal(seen.access[1].value, 0x11223344);
    bus_destroy(bus);
}

static void test_overlaps(void **state)
{
    struct bus *bus = bus_create();
    struct seen seen = {0};

    assert_int_equal(bus_add(bus, BUS_MMIO, 0x1000, 0x1000, &any_ops, &seen), 0);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0x1FFF, 1, &any_ops, &seen), -EEXIST);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0xF00, 0x101, &any_ops, &seen), -EEXIST);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0, UINT64_MAX, &any_ops, &seen), -EEXIST);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0x2000, 1, &any_ops, &seen), 0);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0x3000, 0, &any_ops, &seen), -EINVAL);
    assert_int_equal(bus_add(bus, BUS_MMIO, UINT64_MAX, 2, &any_ops, &seen), -EINVAL);
    assert_int_equal(bus_add(bus, BUS_PORT, 0xFFFF, 2, &any_ops, &seen), -EINVAL);
    assert_int_equal(bus_add(bus, BUS_MMIO, UINT64_MAX, 1, &any_ops, &seen), 0);
    bus_read(bus, BUS_MMIO, UINT64_MAX, 8); /* does not wrap around */
    bus_remove(bus, BUS_MMIO, 0x1000, &bus);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0x1000, 1, &any_ops, &seen), -EEXIST);
    bus_remove(bus, BUS_MMIO, 0x1000, &seen);
    assert_int_equal(bus_add(bus, BUS_MMIO, 0x1000, 1, &any_ops, &seen), 0);
    bus_destroy(bus);
}

/* A callback that takes away its own region and others must not confuse an access that spans them. */
struct vanishing {
    struct bus *bus;
    unsigned writes;
};

static void vanish(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct vanishing *self = ctx;

    self->writes++;
    bus_remove(self->bus, BUS_PORT, 0x100, self);
    bus_remove(self->bus, BUS_PORT, 0x101, self);
}

static void test_removal_in_callback(void **state)
{
    static const struct region_ops ops = {"vanishing", NULL, vanish, 1, 1};
    struct vanishing self = {bus_create(), 0};

    assert_int_equal(bus_add(self.bus, BUS_PORT, 0x100, 1, &ops, &self), 0);
    assert_int_equal(bus_add(self.bus, BUS_PORT, 0x101, 1, &ops, &self), 0);
    bus_write(self.bus, BUS_PORT, 0x100, 4, 0);
    assert_int_equal(self.writes, 1);
    bus_destroy(self.bus);
}

static void test_many_regions(void **state)
{
    struct bus *bus = bus_create();
    struct seen seen = {0};

    srand(1);
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(bus_add(bus, BUS_MMIO, (i * 73 % 200) * 0x100, 0x80, &any_ops, &seen), 0);
    for (unsigned i = 0; i < 2000; i++) {
        uint64_t address = (uint64_t)rand() % (200 * 0x100);

        seen.count = 0;
        bus_read(bus, BUS_MMIO, address, 1);
        assert_int_equal(seen.count, address % 0x100 < 0x80);
        if (seen.count)
            assert_int_equal(seen.access[0].offset, address % 0x100);
    }
    bus_destroy(bus);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_splits),   cmocka_unit_test(test_unaligned),           cmocka_unit_test(test_minimum),
        cmocka_unit_test(test_overlaps), cmocka_unit_test(test_removal_in_callback), cmocka_unit_test(test_many_regions),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
