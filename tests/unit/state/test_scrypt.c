/* scrypt as RFC 7914, section 12 has it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "state/scrypt.h"
#include "util/gnutls_library.h"

static void test_rfc(void **state)
{
    static const struct {
        const char *passphrase, *salt;
        uint32_t n, r, p;
        const char *key;
    } cases[] = {
        {"", "", 16, 1, 1,
         "\x77\xd6\x57\x62\x38\x65\x7b\x20\x3b\x19\xca\x42\xc1\x8a\x04\x97\xf1\x6b\x48\x44\xe3\x07\x4a\xe8\xdf\xdf\xfa\x3f\xed\xe2\x14\x42"
         "\xfc\xd0\x06\x9d\xed\x09\x48\xf8\x32\x6a\x75\x3a\x0f\xc8\x1f\x17\xe8\xd3\xe0\xfb\x2e\x0d\x36\x28\xcf\x35\xe2\x0c\x38\xd1\x89\x06"},
        {"password", "NaCl", 1024, 8, 16,
         "\xfd\xba\xbe\x1c\x9d\x34\x72\x00\x78\x56\xe7\x19\x0d\x01\xe9\xfe\x7c\x6a\xd7\xcb\xc8\x23\x78\x30\xe7\x73\x76\x63\x4b\x37\x31\x62"
         "\x2e\xaf\x30\xd9\x2e\x22\xa3\x88\x6f\xf1\x09\x27\x9d\x98\x30\xda\xc7\x27\xaf\xb9\x4a\x83\xee\x6d\x83\x60\xcb\xdf\xa2\xcc\x06\x40"},
        {"pleaseletmein", "SodiumChloride", 16384, 8, 1,
         "\x70\x23\xbd\xcb\x3a\xfd\x73\x48\x46\x1c\x06\xcd\x81\xfd\x38\xeb\xfd\xa8\xfb\xba\x90\x4f\x8e\x3e\xa9\xb5\x43\xf6\x54\x5d\xa1\xf2"
         "\xd5\x43\x29\x55\x61\x3f\x0f\xcf\x62\xd4\x97\x05\x24\x2a\x9a\xf9\xe6\x1e\x85\xdc\x0d\x65\x1e\x40\xdf\xcf\x01\x7b\x45\x57\x58\x87"},
    };
    struct error err = {0};
    assert_int_equal(library_load(&gnutls_library_file, &err), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint8_t key[64];
        assert_int_equal(scrypt(cases[i].passphrase, strlen(cases[i].passphrase), cases[i].salt, strlen(cases[i].salt), cases[i].n, cases[i].r, cases[i].p, key, sizeof key), 0);
        assert_memory_equal(key, cases[i].key, sizeof key);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_rfc)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
