/*
 * Page states: pages of a shared file are read where they are and copied at a write, remote ones are fetched once however many want them, failures are told and
 * final. Three mappings stand for PhysMap's own and an engine's two.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/memory.h"
#include "memory/page_source.h"
#include "memory/ram_file.h"

#define MIB (1ull << 20)
#define RAM_BYTES (8 * MIB)
#define PAGES (RAM_BYTES / PAGE_SIZE_BYTES)
#define THREADS 4

struct fixture {
    struct physmap *map;
    uint8_t *window_w, *window_r;
    int file;
    atomic_uint fetched[PAGES], closed, failures;
    atomic_int fail_with;
};

static uint64_t stamp(uint64_t offset)
{
    return offset * 0x9e3779b97f4a7c15ull | 1;
}

static void stamp_page(void *data, uint64_t offset)
{
    for (uint64_t i = 0; i < PAGE_SIZE_BYTES; i += 8)
        ((uint64_t *)data)[i / 8] = stamp(offset + i);
}

static int file_make(void)
{
    int fd = memfd_create("snapshot", MFD_CLOEXEC);
    uint8_t page[PAGE_SIZE_BYTES];
    assert_int_equal(ftruncate(fd, RAM_BYTES), 0);
    for (uint64_t at = 0; at < RAM_BYTES / 2; at += PAGE_SIZE_BYTES) { /* the other half is a hole */
        stamp_page(page, at);
        assert_int_equal(pwrite(fd, page, sizeof page, (off_t)at), sizeof page);
    }
    return fd;
}

static uint8_t *window(struct physmap *map, int prot)
{
    uint8_t *at = mmap(NULL, RAM_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    assert_true(at != MAP_FAILED);
    assert_int_equal(physmap_map(map, at, prot), 0);
    return at;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof *f);
    struct error err = {0};
    assert_non_null(f);
    if (physmap_create(&f->map, RAM_BYTES, &err))
        fail_msg("%s", err.text);
    f->window_w = window(f->map, PROT_READ | PROT_WRITE);
    f->window_r = window(f->map, PROT_READ);
    f->file = -1;
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    physmap_unmap(f->map, f->window_w);
    physmap_unmap(f->map, f->window_r);
    munmap(f->window_w, RAM_BYTES);
    munmap(f->window_r, RAM_BYTES);
    physmap_destroy(f->map);
    if (f->file >= 0)
        close(f->file);
    free(f);
    return 0;
}

static void share(struct fixture *f)
{
    struct error err = {0};
    f->file = file_make();
    if (physmap_share(f->map, f->file, &err))
        fail_msg("%s", err.text);
}

static int source_fetch(void *ctx, uint64_t offset, void *data, uint64_t bytes, struct error *err)
{
    struct fixture *f = ctx;
    int code = atomic_load(&f->fail_with);
    if (code)
        return error_set(err, code, "the source is gone");
    for (uint64_t at = 0; at < bytes; at += PAGE_SIZE_BYTES) {
        atomic_fetch_add(&f->fetched[(offset + at) / PAGE_SIZE_BYTES], 1);
        stamp_page((uint8_t *)data + at, offset + at);
    }
    return 0;
}

static void source_close(void *ctx)
{
    atomic_fetch_add(&((struct fixture *)ctx)->closed, 1);
}

static void failed(void *ctx, const char *text)
{
    assert_non_null(strstr(text, "the source is gone"));
    atomic_fetch_add(&((struct fixture *)ctx)->failures, 1);
}

static void remote(struct fixture *f)
{
    const struct page_source source = {source_fetch, source_close, f};
    uint64_t pages[PAGES / 64];
    struct error err = {0};
    memset(pages, 0xff, sizeof pages);
    physmap_on_failure(f->map, failed, f);
    if (physmap_set_source(f->map, &source, pages, &err))
        fail_msg("%s", err.text);
}

static uint64_t load(const uint8_t *at)
{
    return *(const volatile uint64_t *)at;
}

static void test_shared_read(void **state)
{
    struct fixture *f = *state;
    uint64_t left_remote, left_shared;
    share(f);
    for (uint64_t at = 0; at < RAM_BYTES; at += PAGE_SIZE_BYTES) {
        uint64_t want = at < RAM_BYTES / 2 ? stamp(at) : 0;
        assert_int_equal(load(physmap_get(f->map, at, 8, PHYSMAP_READ)), want);
        assert_int_equal(load(f->window_w + at), want);
        assert_int_equal(load(f->window_r + at), want);
    }
    assert_int_equal(physmap_resident_bytes(f->map), 0);
    physmap_page_counts(f->map, &left_remote, &left_shared);
    assert_int_equal(left_remote, 0);
    assert_int_equal(left_shared, PAGES);
}

static void test_shared_write(void **state)
{
    struct fixture *f = *state;
    uint64_t *host, offset;
    uint64_t bytes;
    share(f);
    host = physmap_get(f->map, 17 * PAGE_SIZE_BYTES + 8, 8, PHYSMAP_WRITE);
    assert_true(physmap_is_private(f->map, 17 * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES));
    assert_false(physmap_is_private(f->map, 16 * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES));
    assert_int_equal(load((uint8_t *)host), stamp(17 * PAGE_SIZE_BYTES + 8));
    *host = 1234;
    assert_int_equal(load(f->window_r + 17 * PAGE_SIZE_BYTES + 8), 1234);
    assert_int_equal(load(f->window_w + 17 * PAGE_SIZE_BYTES + 16), stamp(17 * PAGE_SIZE_BYTES + 16));
    assert_int_equal(pread(f->file, &bytes, 8, 17 * PAGE_SIZE_BYTES + 8), 8);
    assert_int_equal(bytes, stamp(17 * PAGE_SIZE_BYTES + 8)); /* not the file's */
    assert_int_equal(physmap_resident_bytes(f->map), PAGE_SIZE_BYTES);
    /* A hole takes nothing until it is written. */
    assert_true(physmap_take(f->map, RAM_BYTES - PAGE_SIZE_BYTES, 8, PHYSMAP_WRITE, &offset));
    assert_int_equal(physmap_resident_bytes(f->map), PAGE_SIZE_BYTES);
    *(volatile uint64_t *)(f->window_w + offset) = 5;
    assert_int_equal(load(f->window_r + offset), 5);
}

static void test_shared_discard(void **state)
{
    struct fixture *f = *state;
    share(f);
    assert_int_equal(physmap_discard(f->map, 0, 64 * PAGE_SIZE_BYTES), 0);
    for (uint64_t page = 0; page < 64; page++)
        assert_int_equal(load(f->window_r + page * PAGE_SIZE_BYTES), 0);
    assert_int_equal(load(f->window_r + 64 * PAGE_SIZE_BYTES), stamp(64 * PAGE_SIZE_BYTES));
    assert_true(physmap_is_private(f->map, 0, 64 * PAGE_SIZE_BYTES));
}

/* A window that comes later shows the same. */
static void test_shared_new_window(void **state)
{
    struct fixture *f = *state;
    share(f);
    *(volatile uint64_t *)physmap_get(f->map, 0x5000, 8, PHYSMAP_WRITE) = 77;
    uint8_t *late = window(f->map, PROT_READ);
    assert_int_equal(load(late + 0x5000), 77);
    assert_int_equal(load(late + 0x4000), stamp(0x4000));
    physmap_unmap(f->map, late);
    munmap(late, RAM_BYTES);
}

/* Every other page written, so that mappings get scarce on hosts with few; all bytes stay right. */
static void test_shared_scattered(void **state)
{
    struct fixture *f = *state;
    share(f);
    for (uint64_t at = 0; at < RAM_BYTES; at += 2 * PAGE_SIZE_BYTES)
        *(volatile uint64_t *)physmap_get(f->map, at, 8, PHYSMAP_WRITE) = ~at;
    for (uint64_t at = 0; at < RAM_BYTES; at += PAGE_SIZE_BYTES)
        assert_int_equal(load(f->window_r + at), at / PAGE_SIZE_BYTES % 2 == 0 ? ~at : at < RAM_BYTES / 2 ? stamp(at) : 0);
}

static void test_truncated(void **state)
{
    struct fixture *f = *state;
    share(f);
    assert_int_equal(ftruncate(f->file, MIB), 0);
    assert_null(physmap_get(f->map, 2 * MIB, 8, PHYSMAP_WRITE)); /* an error, no signal */
    assert_non_null(physmap_get(f->map, 0, 8, PHYSMAP_READ));
}

static void test_size(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    f->file = file_make();
    assert_int_equal(ftruncate(f->file, RAM_BYTES - 1), 0);
    assert_int_equal(physmap_share(f->map, f->file, &err), -EINVAL);
    assert_non_null(strstr(err.text, "8388607 bytes"));
}

static void *reader(void *arg)
{
    struct fixture *f = arg;
    for (uint64_t at = 0; at < RAM_BYTES; at += PAGE_SIZE_BYTES) {
        const uint8_t *host = physmap_get(f->map, at, 8, PHYSMAP_READ);
        if (!host || load(host) != stamp(at))
            return arg;
    }
    return NULL;
}

static void test_remote_once(void **state)
{
    struct fixture *f = *state;
    pthread_t thread[THREADS];
    void *result;
    remote(f);
    for (unsigned i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, reader, f), 0);
    for (unsigned i = 0; i < THREADS; i++) {
        assert_int_equal(pthread_join(thread[i], &result), 0);
        assert_null(result);
    }
    for (uint64_t page = 0; page < PAGES; page++)
        assert_int_equal(f->fetched[page], 1);
    assert_int_equal(f->closed, 1);
}

static void test_remote_background(void **state)
{
    struct fixture *f = *state;
    uint8_t data[2 * PAGE_SIZE_BYTES];
    uint64_t at = 0;
    remote(f);
    memset(data, 7, sizeof data);
    assert_int_equal(physmap_fill(f->map, 0, data, sizeof data), 0);
    assert_int_equal(physmap_discard(f->map, 3 * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES), 0);
    assert_int_equal(f->closed, 0);
    while (physmap_fetch_next(f->map, &at) > 0)
        ;
    assert_int_equal(at, RAM_BYTES);
    assert_int_equal(load(f->window_r), 0x0707070707070707ull);
    assert_int_equal(load(f->window_r + 3 * PAGE_SIZE_BYTES), 0);
    assert_int_equal(load(f->window_r + 4 * PAGE_SIZE_BYTES), stamp(4 * PAGE_SIZE_BYTES));
    assert_int_equal(f->fetched[0] + f->fetched[1] + f->fetched[3], 0);
    assert_int_equal(f->closed, 1);
    /* Nothing is remote any more: this is no news. */
    assert_int_equal(physmap_fill(f->map, 0x4000, data, PAGE_SIZE_BYTES), 0);
    assert_int_equal(load(f->window_r + 0x4000), stamp(0x4000));
}

static void test_remote_failure(void **state)
{
    struct fixture *f = *state;
    uint8_t byte;
    remote(f);
    assert_non_null(physmap_get(f->map, 0, 8, PHYSMAP_READ));
    atomic_store(&f->fail_with, -EPIPE);
    assert_null(physmap_get(f->map, MIB, 8, PHYSMAP_READ));
    assert_int_equal(f->failures, 1);
    atomic_store(&f->fail_with, 0);
    assert_int_equal(physmap_read(f->map, MIB, &byte, 1), -EIO); /* final, and told once */
    assert_int_equal(f->failures, 1);
    assert_non_null(physmap_get(f->map, 8, 8, PHYSMAP_WRITE)); /* what is there is there */
}

/* Remote over shared: what a layer has differs from the file below. */
static void test_remote_over_shared(void **state)
{
    struct fixture *f = *state;
    const struct page_source source = {source_fetch, source_close, f};
    uint64_t pages[PAGES / 64] = {[PAGES / 64 - 1] = 1};
    uint64_t offset = (PAGES - 64) * PAGE_SIZE_BYTES, saved[PAGES / 64] = {0};
    struct error err = {0};
    share(f);
    assert_int_equal(physmap_set_source(f->map, &source, pages, &err), 0);
    ram_file_pages(f->map, saved);
    assert_int_equal(saved[0], ~0ull);
    assert_int_equal(saved[PAGES / 64 - 1], 1);
    assert_int_equal(load(physmap_get(f->map, offset, 8, PHYSMAP_EXECUTE)), stamp(offset));
    assert_int_equal(load(f->window_r + offset), stamp(offset));
    assert_int_equal(load(f->window_r + offset + PAGE_SIZE_BYTES), 0);
    assert_int_equal(f->closed, 1);
}

static void *fetch_all(void *arg)
{
    struct fixture *f = arg;
    for (uint64_t at = 0; at < RAM_BYTES; at += PAGE_SIZE_BYTES)
        assert_non_null(physmap_get(f->map, at, 8, PHYSMAP_READ));
    return NULL;
}

/* Which pages there are is known at each moment, also when they come just now. */
static void test_pages_while_they_come(void **state)
{
    for (unsigned round = 0; round < 50; round++) {
        struct fixture *f = *state;
        pthread_t thread;
        uint64_t left_remote = 1, left_shared;
        remote(f);
        assert_int_equal(pthread_create(&thread, NULL, fetch_all, f), 0);
        while (left_remote) {
            uint64_t pages[PAGES / 64] = {0};
            physmap_page_counts(f->map, &left_remote, &left_shared);
            ram_file_pages(f->map, pages);
            for (uint64_t n = 0; n < PAGES / 64; n++)
                assert_int_equal(pages[n], ~0ull);
        }
        pthread_join(thread, NULL);
        teardown(state);
        setup(state);
    }
}

/* All of it is written out, wherever it is. */
static void test_save(void **state)
{
    struct fixture *f = *state;
    struct error err = {0};
    uint64_t word;
    int out = memfd_create("saved", MFD_CLOEXEC);
    share(f);
    *(volatile uint64_t *)physmap_get(f->map, 0x3000, 8, PHYSMAP_WRITE) = 42;
    if (ram_file_write(f->map, out, false, &err))
        fail_msg("%s", err.text);
    for (uint64_t at = 0; at < RAM_BYTES; at += PAGE_SIZE_BYTES) {
        assert_int_equal(pread(out, &word, 8, (off_t)at), 8);
        assert_int_equal(word, at == 0x3000 ? 42 : at < RAM_BYTES / 2 ? stamp(at) : 0);
    }
    close(out);
}

/* One stores to a page and then raises a flag in another; whoever sees the flag sees the store, through every window. */
#define RACE_STEP (3 * PAGE_SIZE_BYTES)

static void *race_writer(void *arg)
{
    struct fixture *f = arg;
    for (uint64_t at = PAGE_SIZE_BYTES; at < RAM_BYTES; at += RACE_STEP) {
        _Atomic uint64_t *host = physmap_get(f->map, at, 8, PHYSMAP_WRITE), *flag = physmap_get(f->map, 0, 8, PHYSMAP_WRITE);
        if (!host || !flag)
            return arg;
        atomic_store_explicit(host, ~at, memory_order_relaxed);
        atomic_store_explicit(flag, at, memory_order_release);
    }
    return NULL;
}

static void *race_reader(void *arg)
{
    struct fixture *f = arg;
    uint64_t checked = PAGE_SIZE_BYTES - RACE_STEP, last = PAGE_SIZE_BYTES + (RAM_BYTES - PAGE_SIZE_BYTES - 1) / RACE_STEP * RACE_STEP;
    while (checked != last) {
        uint64_t flag = atomic_load_explicit((_Atomic uint64_t *)f->window_r, memory_order_acquire);
        if (flag == stamp(0))
            continue;
        for (uint64_t at = checked + RACE_STEP; at <= flag; at += RACE_STEP)
            if (atomic_load_explicit((_Atomic uint64_t *)(f->window_r + at), memory_order_relaxed) != ~at)
                return arg;
        checked = flag;
    }
    return NULL;
}

static void test_race(void **state)
{
    struct fixture *f = *state;
    pthread_t thread[3];
    void *result;
    share(f);
    assert_int_equal(pthread_create(&thread[0], NULL, race_reader, f), 0);
    assert_int_equal(pthread_create(&thread[1], NULL, race_reader, f), 0);
    assert_int_equal(pthread_create(&thread[2], NULL, race_writer, f), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(pthread_join(thread[i], &result), 0);
        assert_null(result);
    }
}

static int fetch_with_vectors(void *ctx, uint64_t offset, void *data, uint64_t bytes, struct error *err)
{
    __asm__ volatile("pxor %%xmm5, %%xmm5" : : : "xmm5");
    return source_fetch(ctx, offset, data, bytes, err);
}

/* Engines look pages up with the guest's registers in the processor. */
static void test_vectors(void **state)
{
    struct fixture *f = *state;
    const struct page_source source = {fetch_with_vectors, source_close, f};
    uint64_t pages[PAGES / 64] = {1}, before = 0x1122334455667788, after = 0;
    struct error err = {0};
    void *(*volatile get)(struct physmap *, gpa_t, uint64_t, enum physmap_intent) = physmap_get;
    struct physmap *map = f->map;
    void *host;
    assert_int_equal(physmap_set_source(map, &source, pages, &err), 0);
    __asm__ volatile("movq %[before], %%xmm5\n\t"
                     "call *%[get]\n\t"
                     "movq %%xmm5, %[after]"
                     : "=a"(host), [after] "=b"(after)
                     : [before] "r"(before), [get] "r"(get), "D"(map), "S"(0x2000ull), "d"(8ull), "c"((uint64_t)PHYSMAP_READ)
                     : "r8", "r9", "r10", "r11", "xmm5", "memory", "cc");
    assert_non_null(host);
    assert_int_equal(after, before);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_shared_read),       TEST(test_shared_write),   TEST(test_shared_discard),     TEST(test_shared_new_window), TEST(test_shared_scattered),
        TEST(test_truncated),         TEST(test_size),           TEST(test_remote_once),        TEST(test_remote_background), TEST(test_remote_failure),
        TEST(test_pages_while_they_come),
        TEST(test_remote_over_shared), TEST(test_save),          TEST(test_race),               TEST(test_vectors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
