/*
 * Random steps through the fuzz target of the virtio devices: no crash, no hang, everything started ends. Seeded, so repeatable.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

#define STEP_BYTES 8u
#define INPUTS 160u
#define STEPS 640u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static void test_random_steps(void **state)
{
    uint64_t seed = 0x9E3779B97F4A7C15;
    uint8_t *input = malloc(STEPS * STEP_BYTES + 1);

    assert_non_null(input);
    for (unsigned i = 0; i < INPUTS; i++) {
        for (unsigned s = 0; s < STEPS; s++) {
            uint64_t step = next_random(&seed);

            if (i % 2 && step % 8) /* half of the inputs: buffers that lie in memory, few register writes */
                step = (step & ~0xFF00000000000000ull & ~0xC00000FFull) | (uint64_t[]){5, 14, 7, 8, 3, 13, 5, 14}[step >> 8 & 7];
            if (s % 200 < 3)
                step = (step & ~0x3FFull) | 9 | (s % 200) << 8; /* set a device up */
            memcpy(input + s * STEP_BYTES, &step, STEP_BYTES);
        }
        input[STEPS * STEP_BYTES] = 0;
        assert_int_equal(LLVMFuzzerTestOneInput(input, STEPS * STEP_BYTES + i / 2 % 2), 0); /* PCI, memory-mapped */
    }
    free(input);
}

static void test_short_inputs(void **state)
{
    const uint8_t nothing[STEP_BYTES + 3] = {9};

    for (size_t size = 0; size < sizeof(nothing); size++)
        assert_int_equal(LLVMFuzzerTestOneInput(nothing, size), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_random_steps), cmocka_unit_test(test_short_inputs)};

    return cmocka_run_group_tests(tests, NULL, NULL);
}
