/* Chunk files: what is put in comes out, in every combination of compression, encryption and threads; layers; and everything that can be wrong with a file. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "state/chunk_file.h"

#define PAGES 300u /* four chunks and a piece */
#define BYTES (PAGES * CHUNK_PAGE_BYTES)

static uint8_t memory[BYTES + CHUNK_BYTES], back[BYTES + CHUNK_BYTES];

static struct chunk_secret secret_of(const char *text)
{
    struct chunk_secret secret = {0};
    assert_int_equal(chunk_secret_set(&secret, text, strlen(text)), 0);
    return secret;
}

/* Text-like pages, noise, and zeroes. */
static void fill(unsigned seed)
{
    memset(memory, 0, sizeof memory);
    for (unsigned page = 0; page < PAGES; page++)
        for (unsigned i = 0; page % 3 && i < CHUNK_PAGE_BYTES; i++) {
            seed = seed * 1664525u + 1013904223u;
            memory[page * CHUNK_PAGE_BYTES + i] = page % 3 == 1 ? (uint8_t)"the quick brown fox "[i % 20] + (uint8_t)page : (uint8_t)(seed >> 24);
        }
}

static int new_file(void)
{
    int fd = memfd_create("chunks", MFD_CLOEXEC);
    assert_true(fd >= 0);
    return fd;
}

static struct chunk_reader *must_open(int fd, const struct chunk_secret *secret)
{
    struct chunk_reader *reader = NULL;
    struct error err = {0};
    if (chunk_reader_open(&reader, dup(fd), "file", secret, CHUNK_FILE_BYTES_MAX, &err))
        fail_msg("%s", err.text);
    return reader;
}

static uint64_t all_of(uint64_t chunk)
{
    return chunk == PAGES / CHUNK_PAGES ? (1ull << PAGES % CHUNK_PAGES) - 1 : ~0ull;
}

static void put_all(struct chunk_writer *writer)
{
    struct error err = {0};
    for (uint64_t chunk = 0; chunk * CHUNK_PAGES < PAGES; chunk++)
        if (chunk_writer_put(writer, chunk, all_of(chunk), memory + chunk * CHUNK_BYTES, false, &err))
            fail_msg("%s", err.text);
}

static void read_everything(struct chunk_reader *reader)
{
    struct error err = {0};
    for (uint64_t chunk = 0; chunk * CHUNK_PAGES < PAGES; chunk++)
        if (chunk_reader_read(reader, chunk, ~0ull, back + chunk * CHUNK_BYTES, &err))
            fail_msg("%s", err.text);
}

static void test_combinations(void **state)
{
    const struct chunk_secret secret = secret_of("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n");
    for (unsigned n = 0; n < 12; n++) {
        struct chunk_options options = {.size_bytes = BYTES, .zstd_level = n & 1 ? 3 : 0, .secret = n & 2 ? &secret : NULL, .threads = n / 4};
        struct chunk_writer *writer;
        struct chunk_totals totals;
        struct error err = {0};
        int fd = new_file();
        fill(n);
        assert_int_equal(chunk_writer_create(&writer, fd, "file", &options, &err), 0);
        put_all(writer);
        memory[5 * CHUNK_PAGE_BYTES] ^= 1; /* a page again, and a page that has become zero */
        memset(memory + 7 * CHUNK_PAGE_BYTES, 0, CHUNK_PAGE_BYTES);
        assert_int_equal(chunk_writer_put(writer, 0, 1ull << 5 | 1ull << 7, memory, false, &err), 0);
        assert_int_equal(chunk_writer_finish(writer, &totals, &err), 0);
        chunk_writer_destroy(writer);
        assert_int_equal(totals.pages, PAGES + 2);
        assert_int_equal(totals.zero_pages, PAGES / 3 + 1);
        if (n & 1)
            assert_true(totals.stored_bytes < BYTES / 2);
        struct chunk_reader *reader = must_open(fd, n & 2 ? &secret : NULL);
        assert_int_equal(chunk_reader_info(reader)->size_bytes, BYTES);
        assert_int_equal(chunk_reader_info(reader)->file_bytes, totals.stored_bytes);
        memset(back, 0xEE, sizeof back);
        read_everything(reader);
        assert_memory_equal(back, memory, BYTES);
        assert_int_equal(back[BYTES], 0xEE);
        memset(back, 0xEE, sizeof back); /* one page, nothing else */
        assert_int_equal(chunk_reader_read(reader, 0, 1ull << 5, back, &err), 0);
        assert_memory_equal(back + 5 * CHUNK_PAGE_BYTES, memory + 5 * CHUNK_PAGE_BYTES, CHUNK_PAGE_BYTES);
        assert_int_equal(back[4 * CHUNK_PAGE_BYTES], 0xEE);
        assert_int_equal(back[6 * CHUNK_PAGE_BYTES], 0xEE);
        chunk_reader_close(reader);
        close(fd);
    }
}

static void test_layer(void **state)
{
    struct chunk_options options = {.size_bytes = BYTES, .layer = true, .zstd_level = 1, .id = {{1}}, .base = {{2}}};
    struct chunk_writer *writer;
    struct error err = {0};
    uint64_t zero;
    int fd = new_file();
    fill(9);
    assert_int_equal(chunk_writer_create(&writer, fd, "file", &options, &err), 0);
    assert_int_equal(chunk_writer_put(writer, 1, 1ull << 63 | 1ull << 2, memory + CHUNK_BYTES + 62 * CHUNK_PAGE_BYTES, true, &err), 0); /* packed: pages 126 (zero) and 127 */
    assert_int_equal(chunk_writer_put(writer, 4, 1ull << 44, memory, false, &err), -EINVAL); /* behind the end */
    assert_int_equal(chunk_writer_put(writer, 5, 1, memory, false, &err), -EINVAL);
    assert_int_equal(chunk_writer_finish(writer, NULL, &err), 0);
    chunk_writer_destroy(writer);
    struct chunk_reader *reader = must_open(fd, NULL);
    assert_true(chunk_reader_info(reader)->layer);
    assert_int_equal(chunk_reader_info(reader)->id.bytes[0], 1);
    assert_int_equal(chunk_reader_info(reader)->base.bytes[0], 2);
    assert_true(chunk_reader_present(reader, 0, &zero) == 0);
    assert_true(chunk_reader_present(reader, 1, &zero) == (1ull << 63 | 1ull << 2));
    assert_true(zero == 1ull << 2);
    memset(back, 0xEE, sizeof back);
    read_everything(reader);
    assert_memory_equal(back + 127 * CHUNK_PAGE_BYTES, memory + 127 * CHUNK_PAGE_BYTES, CHUNK_PAGE_BYTES);
    assert_int_equal(back[66 * CHUNK_PAGE_BYTES], 0);
    assert_int_equal(back[67 * CHUNK_PAGE_BYTES], 0xEE);
    chunk_reader_close(reader);
    close(fd);
}

/* A small file: 0: plain, 1: compressed, 2: encrypted with a passphrase's key, 3: both with a key. */
static int small_file(unsigned kind, const struct chunk_secret *secret)
{
    struct chunk_options options = {.size_bytes = 3 * CHUNK_PAGE_BYTES + 5, .zstd_level = kind & 1, .secret = kind & 2 ? secret : NULL};
    struct error err = {0};
    int fd = new_file();
    fill(kind);
    if (chunk_file_write(fd, "file", memory, &options, &err))
        fail_msg("%s", err.text);
    return fd;
}

static int read_small(int fd, const struct chunk_secret *secret, struct error *err)
{
    struct chunk_reader *reader = NULL;
    size_t size = 0;
    char *data = NULL;
    int copy = dup(fd), r = chunk_reader_open(&reader, copy, "file", secret, 1u << 20, err);
    if (r)
        close(copy);
    else
        r = chunk_reader_read_all(reader, &data, &size, err);
    if (r == 0) {
        assert_int_equal(size, 3 * CHUNK_PAGE_BYTES + 5);
        assert_memory_equal(data, memory, size);
        assert_int_equal(data[size], 0);
    }
    free(data);
    chunk_reader_close(reader);
    return r;
}

static void test_damage(void **state)
{
    const struct chunk_secret secret = secret_of("0123456789abcdef0123456789abcdeX");
    for (unsigned kind = 0; kind < 4; kind++) {
        struct error err = {0};
        int fd = small_file(kind, &secret);
        off_t size = lseek(fd, 0, SEEK_END);
        assert_int_equal(read_small(fd, &secret, &err), 0);
        for (off_t at = 0; at < size; at += at < 160 || at > size - 200 ? 1 : 61) {
            uint8_t byte, wrong;
            if (at >= 160 && at < 4096) /* nothing is there */
                continue;
            assert_int_equal(pread(fd, &byte, 1, at), 1);
            wrong = byte ^ (uint8_t)(1u << at % 8);
            assert_int_equal(pwrite(fd, &wrong, 1, at), 1);
            err.text[0] = '\0';
            int r = read_small(fd, &secret, &err);
            if (r == 0)
                fail_msg("kind %u: a changed bit at %ld was not noticed", kind, (long)at);
            assert_non_null(strstr(err.text, "file"));
            assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        }
        for (off_t cut = size - 1; cut > 0; cut -= cut > 4000 ? 997 : 13) {
            assert_int_equal(ftruncate(fd, cut), 0);
            assert_int_equal(read_small(fd, &secret, &err), -EBADMSG);
        }
        close(fd);
    }
}

static void test_keys(void **state)
{
    const struct chunk_secret phrase = secret_of("correct horse battery staple\n"), other = secret_of("correct horse battery stapler"),
                              key = secret_of("0123456789abcdef0123456789abcdeX"), hex = secret_of("3031323334353637383961626364656630313233343536373839616263646558\r\n");
    struct chunk_secret empty = {0};
    struct error err = {0};
    int fd = small_file(2, &phrase);
    uint8_t bytes[8192];
    assert_int_equal(read_small(fd, &phrase, &err), 0);
    int keyed = small_file(3, &key);
    assert_int_equal(read_small(fd, &other, &err), -EKEYREJECTED);
    assert_int_equal(read_small(fd, &key, &err), -EKEYREJECTED);
    assert_int_equal(read_small(fd, NULL, &err), -ENOKEY);
    assert_int_equal(read_small(fd, &empty, &err), -ENOKEY);
    assert_int_equal(read_small(keyed, &hex, &err), 0); /* the same 32 bytes */
    assert_int_equal(read_small(keyed, &phrase, &err), -EKEYREJECTED);
    ssize_t n = pread(fd, bytes, sizeof bytes, 4096);
    assert_true(n > 4096);
    assert_null(memmem(bytes, (size_t)n, "quick brown", 11));
    assert_int_equal(chunk_secret_set(&empty, "\n", 1), -EINVAL);
    close(fd);
    close(keyed);
}

static void test_full(void **state)
{
    struct chunk_options options = {.size_bytes = BYTES, .zstd_level = 1, .threads = 2};
    struct chunk_writer *writer;
    struct error err = {0};
    int fd = memfd_create("chunks", MFD_CLOEXEC | MFD_ALLOW_SEALING), r = 0;
    fill(1);
    assert_int_equal(ftruncate(fd, 100000), 0);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW), 0); /* writing beyond fails */
    assert_int_equal(chunk_writer_create(&writer, fd, "file", &options, &err), 0);
    for (uint64_t chunk = 0; r == 0 && chunk < 4; chunk++)
        r = chunk_writer_put(writer, chunk, ~0ull, memory + chunk * CHUNK_BYTES, false, &err);
    r = chunk_writer_finish(writer, NULL, &err);
    assert_true(r < 0);
    assert_non_null(strstr(err.text, "cannot write file"));
    chunk_writer_destroy(writer);
    close(fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_combinations), cmocka_unit_test(test_layer), cmocka_unit_test(test_damage), cmocka_unit_test(test_keys), cmocka_unit_test(test_full),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
