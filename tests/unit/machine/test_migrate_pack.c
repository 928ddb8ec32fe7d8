/* Pages into messages and out of them: whatever a guest writes between two rounds, the other side has in the end; zeroes, differences and what cannot be compressed included. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine/migrate_pack.h"
#include "machine/migrate_priv.h"

#define CHUNKS 20u
#define RAM_BYTES ((uint64_t)CHUNKS * CHUNK_BYTES + 5 * PAGE_SIZE_BYTES)
#define ROUNDS 6u

static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    return *seed ^= *seed << 17;
}

/* One page: all zero, a few bytes, all of it at random, or as it was. */
static void scribble(uint8_t *page, uint64_t *seed)
{
    uint64_t kind = next_random(seed) % 4;
    if (kind == 0)
        memset(page, 0, PAGE_SIZE_BYTES);
    for (unsigned i = 0; kind == 1 && i < 5; i++)
        page[next_random(seed) % PAGE_SIZE_BYTES] = (uint8_t)next_random(seed);
    for (unsigned i = 0; kind == 2 && i < PAGE_SIZE_BYTES; i++)
        page[i] = (uint8_t)next_random(seed);
}

static uint64_t receive(int fd, uint8_t *ram)
{
    struct stream *stream;
    struct unpacker *unpacker = unpacker_create();
    struct error err = {0};
    const uint8_t *body;
    unsigned type;
    size_t size;
    uint64_t total = 0;
    assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
    stream = stream_create(fd, "source");
    assert_non_null(stream);
    assert_non_null(unpacker);
    while (stream_get(stream, &type, &body, &size, &err) == 0) {
        assert_int_equal(type, MIGRATE_PAGES);
        assert_int_equal(unpacker_take(unpacker, ram, RAM_BYTES, body, size, &err), 0);
        total += size;
    }
    assert_string_equal(err.text, "source: the connection was closed");
    unpacker_destroy(unpacker);
    stream_destroy(stream);
    return total;
}

static uint64_t move(int level, unsigned threads)
{
    uint8_t *ram = calloc(1, RAM_BYTES + CHUNK_BYTES), *there = malloc(RAM_BYTES);
    int fd = memfd_create("stream", MFD_CLOEXEC);
    struct error err = {0};
    uint64_t seed = 88172645463325252ull;
    assert_true(ram && there && fd >= 0);
    memset(there, 0xAA, RAM_BYTES);
    struct stream *stream = stream_create(dup(fd), "target");
    assert_non_null(stream);
    struct packer *packer = packer_create(stream, level, threads);
    assert_non_null(packer);
    for (unsigned round = 0; round < ROUNDS; round++)
        for (uint64_t chunk = 0; chunk <= CHUNKS; chunk++) {
            uint64_t has = chunk == CHUNKS ? 0x1F : ~0ull, pages = round ? has & next_random(&seed) : has;
            for (uint64_t left = pages; left; left &= left - 1)
                scribble(ram + chunk * CHUNK_BYTES + (uint64_t)__builtin_ctzll(left) * PAGE_SIZE_BYTES, &seed);
            if (pages)
                assert_int_equal(packer_put(packer, chunk, pages, ram + chunk * CHUNK_BYTES, &err), 0);
        }
    assert_int_equal(packer_flush(packer, &err), 0);
    assert_int_equal(stream_flush(stream, &err), 0);
    packer_destroy(packer);
    stream_destroy(stream);
    uint64_t bytes = receive(fd, there);
    assert_memory_equal(ram, there, RAM_BYTES);
    free(ram);
    free(there);
    return bytes;
}

static void test_round_trip(void **state)
{
    uint64_t plain = move(0, 0), packed = move(1, 1);
    assert_in_range(packed, 1, plain * 9 / 10);
    assert_int_equal(move(3, 4), move(3, 1));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_round_trip)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
