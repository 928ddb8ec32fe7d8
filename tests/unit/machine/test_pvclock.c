/* The paravirtual clock: the records say what the guest needs to turn its TSC into nanoseconds; bad addresses are refused. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <string.h>

#include "machine/pvclock.h"

struct record {
    uint32_t version, pad;
    uint64_t tsc, system;
    uint32_t mul;
    int8_t shift;
    uint8_t flags, pad2[2];
};

static uint64_t to_ns(const struct record *record, uint64_t tsc)
{
    uint64_t delta = tsc - record->tsc;
    delta = record->shift < 0 ? delta >> -record->shift : delta << record->shift;
    return record->system + (uint64_t)(((unsigned __int128)delta * record->mul) >> 32);
}

static void scales(void **state)
{
    static const uint64_t khz[] = {100000, 999999, 1000000, 1000001, 1999999, 2000000, 2100000, 2999999, 5300000};
    struct physmap *memory;
    assert_int_equal(physmap_create(&memory, 1 << 20, NULL), 0);
    for (size_t i = 0; i < sizeof khz / sizeof *khz; i++) {
        struct pvclock clock = {0};
        struct pvclock_now now = {.tsc = 12345, .tsc_khz = khz[i], .system_ns = 777};
        assert_int_equal(pvclock_msr_write(&clock, memory, PVCLOCK_MSR_SYSTEM, 0x1000 | 1, &now), 0);
        struct record record;
        assert_int_equal(physmap_read(memory, 0x1000, &record, sizeof record), 0);
        assert_int_equal(record.version % 2, 0);
        int64_t error = (int64_t)(to_ns(&record, 12345 + khz[i] * 1000) - 777 - 1000000000);
        assert_in_range(error + 100, 0, 200); /* one second, to 100 ns */
    }
    physmap_destroy(memory);
}

static void refuses(void **state)
{
    struct physmap *memory;
    struct pvclock clock = {0};
    struct pvclock_now now = {.tsc_khz = 1000000};
    uint64_t value;
    assert_int_equal(physmap_create(&memory, 1 << 20, NULL), 0);
    assert_int_equal(pvclock_msr_write(&clock, memory, PVCLOCK_MSR_SYSTEM, (1 << 20) | 1, &now), -EINVAL);
    assert_int_equal(pvclock_msr_write(&clock, memory, PVCLOCK_MSR_SYSTEM, ~1ull | 1, &now), -EINVAL);
    assert_int_equal(pvclock_msr_write(&clock, memory, PVCLOCK_MSR_WALL, (1 << 20) - 4, &now), -EINVAL);
    assert_int_equal(pvclock_msr_write(&clock, memory, 0x10, 0, &now), -ENOENT);
    assert_int_equal(pvclock_msr_read(&clock, PVCLOCK_MSR_SYSTEM, &value), 0);
    assert_int_equal(value, 0);
    physmap_destroy(memory);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(scales), cmocka_unit_test(refuses)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
