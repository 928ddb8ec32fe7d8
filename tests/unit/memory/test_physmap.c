/*
 * PhysMap: borders, ROM, dirty bits, refusals. Big sizes cost only address space.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/memory.h"

#define MIB (1ull << 20)

static struct physmap *make(uint64_t bytes)
{
    struct physmap *map;
    struct error err = {0};

    if (physmap_create(&map, bytes, &err) < 0)
        fail_msg("%s", err.text);
    return map;
}

static void test_low_only(void **state)
{
    struct physmap *map = make(4 * MIB);
    uint8_t *base = physmap_get(map, 0, 4 * MIB, PHYSMAP_WRITE);

    assert_non_null(base);
    assert_int_equal(physmap_ram_bytes(map), 4 * MIB);
    assert_int_equal(physmap_low_bytes(map), 4 * MIB);
    assert_int_equal(physmap_high_bytes(map), 0);
    assert_ptr_equal(physmap_get(map, 4 * MIB - 1, 1, PHYSMAP_READ), base + 4 * MIB - 1);
    assert_null(physmap_get(map, 4 * MIB - 1, 2, PHYSMAP_READ));
    assert_null(physmap_get(map, 4 * MIB, 1, PHYSMAP_READ));
    assert_null(physmap_get(map, PHYSMAP_HIGH_BASE, 1, PHYSMAP_READ));
    assert_null(physmap_get(map, 4096, UINT64_MAX, PHYSMAP_READ));
    assert_null(physmap_get(map, UINT64_MAX, 1, PHYSMAP_READ));
    assert_null(physmap_get(map, UINT64_MAX - 4095, 8192, PHYSMAP_READ));
    physmap_destroy(map);
}

static void test_split(void **state)
{
    uint64_t host = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t ram = PHYSMAP_LOW_LIMIT + 2 * MIB;
    uint32_t word = 0x12345678;
    struct physmap *map;

    if (host < ram)
        skip();
    map = make(ram);
    assert_int_equal(physmap_low_bytes(map), PHYSMAP_LOW_LIMIT);
    assert_int_equal(physmap_high_bytes(map), 2 * MIB);
    assert_null(physmap_get(map, PHYSMAP_LOW_LIMIT - 2, 4, PHYSMAP_READ));
    assert_null(physmap_get(map, PHYSMAP_HIGH_BASE - 2, 4, PHYSMAP_READ));
    assert_null(physmap_get(map, PHYSMAP_HIGH_BASE + 2 * MIB - 2, 4, PHYSMAP_READ));
    assert_non_null(physmap_get(map, PHYSMAP_HIGH_BASE + 2 * MIB - 4, 4, PHYSMAP_READ));
    assert_int_equal(physmap_write(map, PHYSMAP_HIGH_BASE, &word, 4), 0);
    word = 0;
    assert_int_equal(physmap_read(map, PHYSMAP_HIGH_BASE, &word, 4), 0);
    assert_int_equal(word, 0x12345678);
    assert_int_equal(physmap_write(map, PHYSMAP_LOW_LIMIT - 2, &word, 4), -EFAULT);
    physmap_zero(map);
    assert_int_equal(physmap_read(map, PHYSMAP_HIGH_BASE, &word, 4), 0);
    assert_int_equal(word, 0);
    physmap_destroy(map);
}

static void test_rom(void **state)
{
    struct physmap *map = make(4 * MIB);

    assert_int_equal(physmap_set_rom(map, 0xE0000, 0x10000), 0);
    assert_int_equal(physmap_set_rom(map, 0xC0000, 0x8000), 0);
    assert_true(physmap_is_rom(map, 0xE0000));
    assert_true(physmap_is_rom(map, 0xEFFFF));
    assert_false(physmap_is_rom(map, 0xF0000));
    assert_false(physmap_is_rom(map, 0xC8000));
    assert_int_equal(physmap_set_rom(map, 0xC8000, 0x28000), 0); /* closes both gaps: one range */
    assert_int_equal(physmap_set_rom(map, 0xC0000, 0x30000), 0); /* again: nothing new */
    for (gpa_t gpa = 0xC0000; gpa < 0xF0000; gpa += 4096)
        assert_true(physmap_is_rom(map, gpa));
    assert_null(physmap_get(map, 0xBFFFF, 2, PHYSMAP_WRITE));
    assert_non_null(physmap_get(map, 0xBFFFF, 1, PHYSMAP_WRITE));
    assert_non_null(physmap_get(map, 0xBFFFF, 2, PHYSMAP_READ));
    assert_non_null(physmap_get(map, 0xC0000, 4096, PHYSMAP_EXECUTE));
    assert_int_equal(physmap_write(map, 0xC0000, "x", 1), 0); /* the VMM itself may */
    assert_int_equal(physmap_set_rom(map, 0xC0001, 4096), -EINVAL);
    assert_int_equal(physmap_set_rom(map, 4 * MIB, 4096), -EFAULT);
    assert_false(physmap_is_rom(map, 5 * MIB));
    for (unsigned i = 0; i < 31; i++)
        assert_int_equal(physmap_set_rom(map, 0x200000 + i * 8192, 4096), 0);
    assert_int_equal(physmap_set_rom(map, 0x300000, 4096), -ENOSPC);
    physmap_destroy(map);
}

static void test_dirty(void **state)
{
    struct physmap *map = make(4 * MIB);

    assert_false(physmap_take_dirty(map, 0x1000));
    physmap_mark_dirty(map, 0x1FFF, 2);
    assert_true(physmap_take_dirty(map, 0x1000));
    assert_false(physmap_take_dirty(map, 0x1000));
    assert_true(physmap_take_dirty(map, 0x2ABC));
    assert_false(physmap_take_dirty(map, 0x3000));
    assert_int_equal(physmap_write(map, 63 * 4096, "ab", 2), 0);
    assert_true(physmap_take_dirty(map, 63 * 4096));
    physmap_mark_dirty(map, 60 * 4096, 140 * 4096); /* over several words of the bitmap */
    for (gpa_t page = 0; page < 256; page++)
        assert_int_equal(physmap_take_dirty(map, page * 4096), page >= 60 && page < 200);
    physmap_mark_dirty(map, 4 * MIB, 1); /* not RAM: nothing */
    physmap_mark_dirty(map, 0, 0);
    assert_false(physmap_take_dirty(map, 0));
    physmap_destroy(map);
}

static void test_map(void **state)
{
    uint64_t offset, ram = PHYSMAP_LOW_LIMIT + 2 * MIB;
    struct physmap *map = make(4 * MIB);
    uint8_t *at = mmap(NULL, 8 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    assert_true(at != MAP_FAILED);
    assert_int_equal(physmap_map(map, at + MIB, PROT_READ), 0);
    assert_int_equal(physmap_write(map, 0x12345, "abc", 4), 0);
    assert_true(physmap_offset(map, 0x12345, 4, &offset));
    assert_string_equal((char *)at + MIB + offset, "abc");
    assert_false(physmap_offset(map, 4 * MIB - 1, 2, &offset));
    assert_int_equal(physmap_gpa(map, 4 * MIB - 1), 4 * MIB - 1);
    assert_int_equal(physmap_map(map, at + 1, PROT_READ), -EINVAL);
    munmap(at, 8 * MIB);
    physmap_destroy(map);

    if ((uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE) < ram)
        return;
    map = make(ram);
    assert_int_equal(physmap_gpa(map, PHYSMAP_LOW_LIMIT - 1), PHYSMAP_LOW_LIMIT - 1);
    assert_int_equal(physmap_gpa(map, PHYSMAP_LOW_LIMIT + 5), PHYSMAP_HIGH_BASE + 5);
    assert_true(physmap_offset(map, PHYSMAP_HIGH_BASE + 5, 1, &offset));
    assert_int_equal(offset, PHYSMAP_LOW_LIMIT + 5);
    assert_false(physmap_offset(map, PHYSMAP_LOW_LIMIT - 1, 2, &offset));
    physmap_destroy(map);
}

struct watch {
    struct physmap *map;
    unsigned calls;
    gpa_t gpa;
    uint64_t length_bytes;
    char seen[4];
};

static void changed(void *opaque, gpa_t gpa, uint64_t length_bytes)
{
    struct watch *w = opaque;

    w->calls++;
    w->gpa = gpa;
    w->length_bytes = length_bytes;
    assert_int_equal(physmap_read(w->map, 0x5ffe, w->seen, sizeof(w->seen)), 0);
}

static void test_watch(void **state)
{
    struct physmap *map = make(4 * MIB);
    struct watch w[PHYSMAP_WATCHERS_MAX];

    for (unsigned i = 0; i < PHYSMAP_WATCHERS_MAX; i++) {
        w[i] = (struct watch){.map = map};
        physmap_watch_set(map, changed, &w[i]);
    }
    physmap_watch_set(map, changed, &w[0]); /* still one */
    assert_int_equal(physmap_write(map, 0x5ffe, "abcd", 4), 0);
    assert_int_equal(w[0].calls, 0);
    physmap_watch_page(map, 0x6000, true);
    physmap_watch_page(map, 8 * MIB, true); /* not RAM: nothing */
    assert_int_equal(physmap_write(map, 0x5000, "z", 1), 0);
    physmap_mark_written(map, 0x6000, 1);
    assert_int_equal(w[0].calls, 0);
    assert_int_equal(physmap_write(map, 0x5ffe, "efgh", 4), 0);
    for (unsigned i = 0; i < PHYSMAP_WATCHERS_MAX; i++) {
        assert_int_equal(w[i].calls, 1);
        assert_int_equal(w[i].gpa, 0x5ffe);
        assert_int_equal(w[i].length_bytes, 4);
        assert_memory_equal(w[i].seen, "efgh", 4); /* afterwards */
    }
    physmap_watch_set(map, NULL, &w[1]);
    physmap_watch_set(map, NULL, map); /* not there: nothing */
    physmap_mark_dirty(map, 0, 4 * MIB);
    assert_int_equal(w[0].calls, 2);
    assert_int_equal(w[1].calls, 1);
    physmap_zero(map);
    assert_int_equal(w[0].calls, 3);
    physmap_watch_page(map, 0x6fff, false);
    physmap_mark_dirty(map, 0x6000, 1);
    assert_int_equal(w[0].calls, 3);
    physmap_destroy(map);
}

static void test_discard(void **state)
{
    struct physmap *map = make(4 * MIB);
    uint8_t *base = physmap_get(map, 0, 4 * MIB, PHYSMAP_WRITE);
    uint8_t *window = mmap(NULL, 4 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct watch w = {.map = map};

    assert_int_equal(physmap_map(map, window, PROT_READ), 0);
    assert_int_equal(physmap_resident_bytes(map), 0);
    memset(base, 'x', 4 * MIB);
    assert_int_equal(physmap_resident_bytes(map), 4 * MIB);
    physmap_watch_set(map, changed, &w);
    physmap_watch_page(map, 0x5000, true);
    assert_int_equal(physmap_discard(map, 0x4000, 0x3000), 0);
    assert_int_equal(physmap_resident_bytes(map), 4 * MIB - 0x1000); /* the watcher has read two of the three */
    assert_int_equal(w.calls, 1);
    assert_memory_equal(w.seen, "\0\0\0", 4);
    for (gpa_t page = 0; page < 16; page++) {
        bool hole = page >= 4 && page < 7;
        assert_int_equal(physmap_take_dirty(map, page * 4096), hole);
        assert_int_equal(base[page * 4096 + 17], hole ? 0 : 'x');
        assert_int_equal(window[page * 4096 + 4095], hole ? 0 : 'x');
    }
    base[0x5000] = 'y'; /* comes back, zeroed */
    assert_int_equal(window[0x5000], 'y');
    assert_int_equal(window[0x5001], 0);
    assert_int_equal(physmap_set_rom(map, 0xE0000, 0x10000), 0);
    assert_int_equal(physmap_discard(map, 0x1001, 4096), -EINVAL);
    assert_int_equal(physmap_discard(map, 0x1000, 4095), -EINVAL);
    assert_int_equal(physmap_discard(map, 0x1000, 0), -EINVAL);
    assert_int_equal(physmap_discard(map, 4 * MIB - 4096, 8192), -EFAULT);
    assert_int_equal(physmap_discard(map, 4 * MIB, 4096), -EFAULT);
    assert_int_equal(physmap_discard(map, 1ull << 63, 4096), -EFAULT);
    assert_int_equal(physmap_discard(map, 0xEF000, 8192), -EFAULT); /* ROM stays what it is */
    assert_int_equal(base[4 * MIB - 1], 'x');
    assert_int_equal(base[0xF0000], 'x');
    munmap(window, 4 * MIB);
    physmap_destroy(map);
}

static void test_files(void **state)
{
    const char text[] = "what is in the file";
    int fd = memfd_create("file", MFD_CLOEXEC), other = memfd_create("other", MFD_CLOEXEC);
    struct physmap_file file[] = {{.fd = fd, .bytes = 3 * MIB + 512}, {.fd = other, .bytes = 4 * MIB, .readonly = true}};
    struct physmap_config config = {.ram_bytes = 4 * MIB, .file = file, .file_count = 2};
    struct physmap *map;
    struct error err = {0};
    uint64_t length, offset;
    char data[32] = "";

    assert_int_equal(ftruncate(fd, 3 * MIB + 512), 0);
    assert_int_equal(ftruncate(other, 4 * MIB), 0);
    assert_int_equal(pwrite(other, text, sizeof text, 4096), sizeof text);
    assert_int_equal(physmap_create_with(&map, &config, &err), 0);
    gpa_t first = physmap_file_base(map, 0, &length);
    assert_int_equal(first, PHYSMAP_EXTRA_BASE);
    assert_int_equal(length, 4 * MIB);
    gpa_t second = physmap_file_base(map, 1, &length);
    assert_int_equal(second, PHYSMAP_EXTRA_BASE + (1ull << 30));
    assert_int_equal(length, 4 * MIB);
    assert_int_equal(physmap_end(map), second + length);
    assert_int_equal(physmap_ram_bytes(map), 4 * MIB + MIB - 4096); /* RAM, and what fills the first file up */
    assert_int_equal(physmap_space_bytes(map), physmap_ram_bytes(map) + 3 * MIB + 4096 + 4 * MIB);

    assert_int_equal(physmap_write(map, first + 5000, text, sizeof text), 0);
    assert_int_equal(pread(fd, data, sizeof data, 5000), sizeof data);
    assert_string_equal(data, text);
    assert_int_equal(physmap_read(map, second + 4096, data, sizeof text), 0);
    assert_string_equal(data, text);
    assert_true(physmap_is_rom(map, second) && physmap_is_rom(map, second + 4 * MIB - 1) && !physmap_is_rom(map, first));
    assert_null(physmap_get(map, second, 1, PHYSMAP_WRITE));
    assert_non_null(physmap_get(map, second, 4 * MIB, PHYSMAP_EXECUTE));
    assert_non_null(physmap_get(map, first + 4 * MIB - 1, 1, PHYSMAP_WRITE));
    assert_null(physmap_get(map, first + 4 * MIB - 1, 2, PHYSMAP_READ));
    assert_null(physmap_get(map, first + 4 * MIB, 1, PHYSMAP_READ));
    assert_null(physmap_get(map, first - 1, 1, PHYSMAP_READ));
    assert_null(physmap_get(map, second + 4 * MIB, 1, PHYSMAP_READ));

    for (uint64_t at = 0; at < physmap_space_bytes(map); at += 4096) { /* every page has one place */
        assert_true(physmap_offset(map, physmap_gpa(map, at), 4096, &offset));
        assert_int_equal(offset, at);
    }
    physmap_mark_dirty(map, first + 4096, 1);
    assert_true(physmap_take_dirty(map, first + 4096) && !physmap_take_dirty(map, first));
    /* A file keeps its bytes whatever a balloon says; what fills it up is RAM. */
    assert_int_equal(physmap_discard(map, first, 8192), -EFAULT);
    assert_int_equal(physmap_discard(map, second, 8192), -EFAULT);
    assert_int_equal(physmap_discard(map, first + 4 * MIB - 4096, 4096), 0);
    assert_int_equal(pread(fd, data, sizeof data, 5000), sizeof data);
    assert_string_equal(data, text);
    physmap_destroy(map);

    file[0].bytes = 1ull << 60;
    assert_int_equal(physmap_create_with(&map, &config, &err), -E2BIG);
    close(fd);
    close(other);
}

static void test_plug(void **state)
{
    struct physmap_config config = {.ram_bytes = 4 * MIB, .plug_bytes = 16 * MIB, .block_bytes = 2 * MIB};
    struct physmap *map;
    struct error err = {0};
    gpa_t base;

    assert_int_equal(physmap_create_with(&map, &config, &err), 0);
    base = physmap_plug_base(map);
    assert_int_equal(physmap_ram_bytes(map), 20 * MIB);
    assert_int_equal(physmap_end(map), base + 16 * MIB);
    assert_null(physmap_get(map, base, 1, PHYSMAP_READ));
    assert_int_equal(physmap_write(map, base, "x", 1), -EFAULT);
    assert_int_equal(physmap_plug(map, base + 2 * MIB, 4 * MIB, true), 0);
    assert_null(physmap_get(map, base + 2 * MIB - 1, 1, PHYSMAP_READ));
    assert_null(physmap_get(map, base + 2 * MIB - 1, 2, PHYSMAP_READ));
    assert_non_null(physmap_get(map, base + 2 * MIB, 4 * MIB, PHYSMAP_WRITE));
    assert_null(physmap_get(map, base + 2 * MIB, 4 * MIB + 1, PHYSMAP_WRITE));
    assert_int_equal(physmap_gpa(map, 6 * MIB), base + 2 * MIB);
    memset(physmap_get(map, base + 2 * MIB, 4 * MIB, PHYSMAP_WRITE), 'x', 4 * MIB);
    assert_int_equal(physmap_resident_bytes(map), 4 * MIB);
    assert_int_equal(physmap_plug(map, base + 4 * MIB, 2 * MIB, false), 0);
    assert_int_equal(physmap_resident_bytes(map), 2 * MIB);
    assert_null(physmap_get(map, base + 4 * MIB, 1, PHYSMAP_READ));
    assert_int_equal(physmap_discard(map, base + 4 * MIB, 4096), -EFAULT);
    assert_int_equal(physmap_plug(map, base + 4 * MIB, 2 * MIB, true), 0);
    assert_int_equal(*(char *)physmap_get(map, base + 4 * MIB, 1, PHYSMAP_READ), 0);
    assert_int_equal(physmap_plug(map, base, 16 * MIB, false), 0);
    assert_int_equal(physmap_resident_bytes(map), 0);
    assert_int_equal(physmap_plug(map, base - 2 * MIB, 2 * MIB, true), -EINVAL);
    assert_int_equal(physmap_plug(map, base + 16 * MIB, 2 * MIB, true), -EINVAL);
    assert_int_equal(physmap_plug(map, base + 14 * MIB, 4 * MIB, true), -EINVAL);
    assert_int_equal(physmap_plug(map, base + MIB, 2 * MIB, true), -EINVAL);
    assert_int_equal(physmap_plug(map, base, MIB, true), -EINVAL);
    assert_int_equal(physmap_plug(map, base, 0, true), -EINVAL);
    physmap_destroy(map);
    config.block_bytes = 3 * MIB;
    assert_int_equal(physmap_create_with(&map, &config, &err), -EINVAL);
    config = (struct physmap_config){.ram_bytes = 4 * MIB, .plug_bytes = 3 * MIB, .block_bytes = 2 * MIB};
    assert_int_equal(physmap_create_with(&map, &config, &err), -EINVAL);
}

static void test_refusals(void **state)
{
    struct physmap *map;
    struct error err = {0};

    assert_int_equal(physmap_create(&map, 0, &err), -EINVAL);
    assert_int_equal(physmap_create(&map, 4097, &err), -EINVAL);
    assert_null(map);
    assert_int_equal(physmap_create(&map, 1ull << 60, &err), -ENOMEM);
    assert_non_null(strstr(err.text, "more than this host has"));
    assert_int_equal(physmap_create(&map, 1ull << 60, NULL), -ENOMEM);
    physmap_destroy(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_low_only), cmocka_unit_test(test_split),    cmocka_unit_test(test_rom),
        cmocka_unit_test(test_dirty),    cmocka_unit_test(test_map),      cmocka_unit_test(test_watch),
        cmocka_unit_test(test_discard),  cmocka_unit_test(test_files),    cmocka_unit_test(test_plug),
        cmocka_unit_test(test_refusals),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
