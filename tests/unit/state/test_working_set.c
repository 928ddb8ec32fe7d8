/* Files of working sets: what is written is read; what was changed anywhere, cut, or of another snapshot is refused and touches nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "state/working_set.h"

#define PAGES 1000u
#define WORDS 16u

static const struct chunk_id id = {{1, 2, 3}};

static void *make(uint64_t *pages, size_t *size)
{
    memset(pages, 0, WORDS * sizeof *pages);
    pages[0] = 0x8000000000000001ull;
    pages[1] = 0x7;
    pages[15] = 1ull << (PAGES - 1) % 64;
    void *data = working_set_make(pages, PAGES, &id, size);
    assert_non_null(data);
    return data;
}

static void test_round_trip(void **state)
{
    uint64_t pages[WORDS], again[WORDS] = {0};
    size_t size;
    void *data = make(pages, &size);
    assert_int_equal(working_set_read(data, size, &id, PAGES, again), 6);
    assert_memory_equal(pages, again, sizeof pages);
    free(data);
}

static void test_nothing_touched(void **state)
{
    uint64_t pages[WORDS] = {0}, again[WORDS] = {0};
    size_t size;
    void *data = working_set_make(pages, PAGES, &id, &size);
    assert_int_equal(working_set_read(data, size, &id, PAGES, again), 0);
    free(data);
}

static void test_every_bit_counts(void **state)
{
    uint64_t pages[WORDS], again[WORDS] = {0};
    const uint64_t none[WORDS] = {0};
    size_t size;
    uint8_t *data = make(pages, &size);
    for (size_t bit = 0; bit < size * 8; bit++) {
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
        assert_int_equal(working_set_read(data, size, &id, PAGES, again), -EINVAL);
        data[bit / 8] ^= (uint8_t)(1u << bit % 8);
    }
    for (size_t shorter = 0; shorter < size; shorter++)
        assert_int_equal(working_set_read(data, shorter, &id, PAGES, again), -EINVAL);
    assert_memory_equal(again, none, sizeof none);
    free(data);
}

static void test_of_another(void **state)
{
    const struct chunk_id other = {{1, 2, 4}};
    uint64_t pages[WORDS], again[WORDS] = {0};
    size_t size;
    void *data = make(pages, &size);
    assert_int_equal(working_set_read(data, size, &other, PAGES, again), -EINVAL);
    assert_int_equal(working_set_read(data, size, &id, PAGES - 1, again), -EINVAL);
    free(data);
}

/* More runs than a file has room for: the first ones. */
static void test_bounded(void **state)
{
    uint64_t page_count = 4 * WORKING_SET_RUNS_MAX, *pages = malloc(page_count / 8), *again = calloc(page_count / 64, 8);
    size_t size;
    assert_non_null(pages);
    assert_non_null(again);
    memset(pages, 0x55, page_count / 8);
    void *data = working_set_make(pages, page_count, &id, &size);
    assert_int_equal(size, WORKING_SET_BYTES_MAX);
    assert_int_equal(working_set_read(data, size, &id, page_count, again), WORKING_SET_RUNS_MAX);
    assert_int_equal(again[0], 0x5555555555555555);
    assert_int_equal(again[page_count / 64 - 1], 0);
    free(data);
    free(pages);
    free(again);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_nothing_touched), cmocka_unit_test(test_every_bit_counts), cmocka_unit_test(test_of_another), cmocka_unit_test(test_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
