/* The translator's address space: aliases, windows, guards, the translation cache, and what is said when the host refuses. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine/bt/bt_priv.h"
#include "probe.h"

#define RAM_BYTES (8ull << 20)
#define TC_BYTES (4ull << 20)
#define ALIASES 256

static uint8_t *alias_of(const void *at, unsigned n)
{
    return (uint8_t *)(((uintptr_t)at & (BT_ALIAS_BYTES - 1)) + n * BT_ALIAS_BYTES);
}

static bool is_taken(uint8_t *at)
{
    void *got = mmap(at, PAGE_SIZE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (got != MAP_FAILED)
        munmap(got, PAGE_SIZE_BYTES);
    return got != at;
}

static int setup(void **state)
{
    return physmap_create((struct physmap **)state, RAM_BYTES, NULL);
}

static int teardown(void **state)
{
    physmap_destroy(*state);
    return 0;
}

static void every_alias_is_reserved(void **state)
{
    struct bt_layout l;
    assert_int_equal(layout_create(&l, *state, TC_BYTES, NULL), 0);
    assert_true(l.offset >= 4ull << 30);
    assert_true(l.offset + l.length_bytes <= BT_ALIAS_BYTES);
    uint64_t vsyscall = 0xffffffffff600000ull & (BT_ALIAS_BYTES - 1);
    assert_true(l.offset + l.length_bytes <= vsyscall || l.offset > vsyscall);
    for (unsigned n = 0; n < ALIASES; n++) {
        assert_true(is_taken(alias_of(l.reserved_low, n)));
        assert_true(is_taken(alias_of(l.reserved_low + l.length_bytes / 2, n)));
        assert_true(is_taken(alias_of(l.reserved_low + l.length_bytes - PAGE_SIZE_BYTES, n)));
        assert_false(probe_readable(alias_of((void *)l.poison, n)));
        bool used = alias_of(l.reserved_low, n) == l.reserved_low;
        assert_int_equal(probe_readable(alias_of(l.window_w, n)), used);
        assert_int_equal(probe_readable(alias_of(l.window_r + RAM_BYTES - 1, n)), used);
        assert_int_equal(probe_readable(alias_of(l.dt_pool + BT_DT_POOL_BYTES - 1, n)), used);
    }
    uint8_t *low = l.reserved_low;
    layout_destroy(&l);
    assert_false(is_taken(low));
    assert_null(l.reserved_low);
}

static void windows_show_ram(void **state)
{
    struct bt_layout l;
    uint8_t *ram = physmap_get(*state, 0, RAM_BYTES, PHYSMAP_WRITE);
    assert_int_equal(layout_create(&l, *state, TC_BYTES, NULL), 0);
    l.window_w[5 * PAGE_SIZE_BYTES + 7] = 0x5a;
    assert_int_equal(ram[5 * PAGE_SIZE_BYTES + 7], 0x5a);
    assert_int_equal(l.window_r[5 * PAGE_SIZE_BYTES + 7], 0x5a);
    assert_true(probe_writable(l.window_w + RAM_BYTES - 1));
    assert_false(probe_writable(l.window_r));
    uint8_t *starts[] = {l.window_w, l.window_r, l.dt_pool, (uint8_t *)l.poison};
    uint64_t lengths[] = {RAM_BYTES, RAM_BYTES, BT_DT_POOL_BYTES, PAGE_SIZE_BYTES};
    for (unsigned n = 0; n < 4; n++) {
        for (uint64_t distance = 1; distance <= BT_GUARD_BYTES; distance += PAGE_SIZE_BYTES - 1) {
            assert_false(probe_readable(starts[n] - distance));
            assert_false(probe_readable(starts[n] + lengths[n] - 1 + distance));
        }
    }
    /* Of the witness and what a dispatch slot may be away from another, one page. */
    assert_true(probe_readable(l.witness) && probe_readable(l.witness + PAGE_SIZE_BYTES - 1));
    assert_false(probe_writable(l.witness));
    for (uint64_t distance = 1; distance <= BT_DT_POOL_BYTES; distance += distance < 1 << 20 ? PAGE_SIZE_BYTES - 1 : 997 * PAGE_SIZE_BYTES) {
        assert_false(probe_readable(l.witness - distance));
        assert_false(probe_readable(l.witness + PAGE_SIZE_BYTES - 1 + distance));
    }
    assert_int_equal(l.dt_pool[BT_DT_POOL_BYTES / 2], 0);
    l.dt_pool[BT_DT_POOL_BYTES / 2] = 1;
    layout_destroy(&l);
}

/* Files of persistent memory lie in the windows behind RAM, and nothing is accessible but them. */
static void windows_show_files(void **state)
{
    int fd = memfd_create("file", MFD_CLOEXEC);
    const struct physmap_file files[] = {{.fd = fd, .bytes = 5000}, {.fd = fd, .bytes = 2u << 20, .readonly = true}};
    const struct physmap_config config = {.ram_bytes = RAM_BYTES, .file = files, .file_count = 2};
    struct physmap *memory;
    struct bt_layout l;
    uint64_t length, offset;
    assert_int_equal(ftruncate(fd, 2u << 20), 0);
    assert_int_equal(physmap_create_with(&memory, &config, NULL), 0);
    assert_int_equal(layout_create(&l, memory, TC_BYTES, NULL), 0);
    assert_int_equal(l.ram_bytes, RAM_BYTES + (2u << 20) - 8192 + 8192 + (2u << 20));
    gpa_t gpa = physmap_file_base(memory, 0, &length);
    assert_true(physmap_offset(memory, gpa, 8192, &offset));
    l.window_w[offset + 4100] = 0x5a;
    assert_int_equal(l.window_r[offset + 4100], 0x5a);
    assert_int_equal(*(uint8_t *)physmap_get(memory, gpa + 4100, 1, PHYSMAP_READ), 0x5a);
    char byte = 0;
    assert_int_equal(pread(fd, &byte, 1, 4100), 1);
    assert_int_equal(byte, 0x5a);
    for (uint64_t at = 0; at < l.ram_bytes; at += PAGE_SIZE_BYTES)
        assert_true(probe_readable(l.window_r + at) && !probe_writable(l.window_r + at));
    for (uint64_t distance = 1; distance <= BT_GUARD_BYTES; distance += PAGE_SIZE_BYTES - 1) {
        assert_false(probe_readable(l.window_w + l.ram_bytes - 1 + distance));
        assert_false(probe_readable(l.window_r + l.ram_bytes - 1 + distance));
    }
    layout_destroy(&l);
    physmap_destroy(memory);
    close(fd);
}

static void translations_run_where_they_are_not_written(void **state)
{
    static const uint8_t code[] = {0xb8, 42, 0, 0, 0, 0xc3}; /* mov eax, 42; ret */
    struct bt_layout l;
    assert_int_equal(layout_create(&l, *state, TC_BYTES, NULL), 0);
    assert_true((uintptr_t)l.tc_exec >= 256u << 20 && (uintptr_t)l.tc_exec + TC_BYTES <= 2ull << 30);
    memcpy(l.tc_write + TC_BYTES - sizeof(code), code, sizeof(code));
    int (*function)(void) = (int (*)(void))(uintptr_t)(l.tc_exec + TC_BYTES - sizeof(code));
    assert_int_equal(function(), 42);
    assert_false(probe_writable(l.tc_exec));
    layout_destroy(&l);
}

static void call(void *at)
{
    ((void (*)(void))(uintptr_t)at)();
}

static void nothing_runs_where_it_is_written(void **state)
{
    static const uint8_t ret = 0xc3;
    struct bt_layout l;
    assert_int_equal(layout_create(&l, *state, TC_BYTES, NULL), 0);
    uint8_t *writable[] = {physmap_get(*state, 0, RAM_BYTES, PHYSMAP_WRITE), l.window_w + PAGE_SIZE_BYTES, l.dt_pool, l.tc_write};
    for (unsigned n = 0; n < sizeof(writable) / sizeof(writable[0]); n++) {
        *writable[n] = ret;
        assert_false(probe_run(call, writable[n], NULL));
    }
    assert_false(probe_run(call, l.window_r, NULL));
    assert_true(probe_run(call, l.tc_exec, NULL));
    layout_destroy(&l);
}

static void several_in_one_process(void **state)
{
    struct bt_layout l[4];
    for (unsigned n = 0; n < 4; n++) {
        assert_int_equal(layout_create(&l[n], *state, TC_BYTES, NULL), 0);
        for (unsigned other = 0; other < n; other++) {
            assert_true(l[n].offset + l[n].length_bytes <= l[other].offset || l[other].offset + l[other].length_bytes <= l[n].offset);
            assert_ptr_not_equal(l[n].tc_exec, l[other].tc_exec);
        }
    }
    /* Those that stay keep what they have, in all aliases, whoever else goes. */
    for (unsigned n = 0; n < 4; n++) {
        uint8_t *gone = l[n].window_w;
        layout_destroy(&l[n]);
        assert_false(probe_readable(gone));
        for (unsigned other = n + 1; other < 4; other++)
            for (unsigned alias = 0; alias < ALIASES; alias++) {
                assert_true(is_taken(alias_of(l[other].window_w, alias)));
                assert_int_equal(probe_readable(alias_of(l[other].window_w, alias)), alias_of(l[other].window_w, alias) == l[other].window_w);
            }
    }
    /* Nothing is left behind: many more fit one after the other. */
    for (unsigned n = 0; n < 50; n++) {
        assert_int_equal(layout_probe(NULL), 0);
        assert_int_equal(layout_create(&l[0], *state, TC_BYTES, NULL), 0);
        layout_destroy(&l[0]);
    }
}

static void a_limit_of_the_address_space_is_named(void **state)
{
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) {
        struct rlimit limit = {8ull << 30, 8ull << 30};
        struct bt_layout l;
        struct error err = {0};
        setrlimit(RLIMIT_AS, &limit);
        int rc = layout_create(&l, *state, TC_BYTES, &err);
        bool named = rc == -ENOMEM && strstr(err.text, "ulimit -v unlimited") && !l.reserved_low;
        err.text[0] = 0;
        _exit(named && layout_probe(&err) == -ENOMEM && strstr(err.text, "ulimit -v unlimited") ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_alias_is_reserved),
        cmocka_unit_test(windows_show_ram),
        cmocka_unit_test(windows_show_files),
        cmocka_unit_test(translations_run_where_they_are_not_written),
        cmocka_unit_test(nothing_runs_where_it_is_written),
        cmocka_unit_test(several_in_one_process),
        cmocka_unit_test(a_limit_of_the_address_space_is_named),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
