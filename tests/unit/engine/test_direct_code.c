/* What is found in pages of code, and what only looks like it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "engine/bt/direct_code.h"

#define PAGE 4096u

static uint8_t page[PAGE];
static uint16_t offsets[4];

static bool tells(unsigned at, const char *code, size_t length)
{
    memset(page, 0x90, PAGE);
    memcpy(page + at, code, length);
    return direct_code_tells(page, offsets, 4);
}
#define TELLS(at, code) tells(at, code, sizeof(code) - 1)

#define USUAL 5u /* the first of these are found at the page's beginning, too */

static void test_instructions(void **state)
{
    static const struct {
        const char *code;
        unsigned length;
    } codes[] = {{"\x0f\xa2", 2}, {"\xf3\x0f\xc7\xf8", 4}, {"\xf3\x48\x0f\xc7\xf9", 5}, {"\x0f\x03\xc1", 3}, {"\x48\x0f\x03\xc1", 4}, {"\x0f\x01\x07", 3}, {"\x0f\x01\x0f", 3},
        {"\x0f\x01\xe0", 3}, {"\x0f\x00\xc0", 3}, {"\x0f\x00\xc8", 3}, {"\x0f\x34", 2}};
    for (unsigned n = 0; n < sizeof(codes) / sizeof(codes[0]); n++)
        for (unsigned at = n < USUAL ? 0 : 8; at <= PAGE - 8; at += at < 80 ? 1 : 61)
            assert_true(tells(at, codes[n].code, codes[n].length) && (at < 80 || offsets[0] == at));
    assert_true(TELLS(PAGE - 3, "\x0f\xa2"));
}

static void test_others(void **state)
{
    memset(page, 0x90, PAGE);
    assert_int_equal(direct_code_tells(page, offsets, 4), 0);
    assert_false(TELLS(1000, "\x48\xb8\x0f\xa2\x0f\xa2\x0f\xa2\x0f\xa2")); /* mov rax, imm64 */
    assert_false(TELLS(1000, "\xb8\x00\x0f\xa2\x00"));                     /* mov eax, imm32 */
    assert_false(TELLS(1000, "\x8b\x80\x0f\x34\x00\x00"));                 /* mov eax, [rax + disp32] */
    assert_false(TELLS(1000, "\x0f\xae\xe8\x0f\xae\xf0"));                 /* lfence; mfence */
    assert_false(TELLS(1000, "\x0f\xc7\x08\x48\x0f\xc7\x0f"));             /* cmpxchg8b, cmpxchg16b */
    assert_false(TELLS(1000, "\x0f\xc7\xf0\x0f\xc7\xf8"));                 /* rdrand, rdseed */
    assert_false(TELLS(1000, "\x0f\x1f\x00\x0f\x05\x0f\x01\xf9"));         /* nop, syscall, rdtscp: that faults */
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_instructions), cmocka_unit_test(test_others)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
