/* Snapshots: a guest that computes is stopped, saved and gone on with by another engine again and again; whatever is wrong with the files is said, and harms nothing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "computing_guest.h"
#include "util/log.h"

#define HOPS 12

struct place {
    const char *engine, *irqchip;
};

static void set_place(struct machine_config *config, const struct place *place)
{
    set(config, "engine", usable(place->engine));
    set(config, "kvm-irqchip", place->irqchip ? place->irqchip : "auto");
}

/* Begins at the first of `places` and goes round; the last one waits for the end. */
static void hops_through(const struct place *places, unsigned place_count, unsigned hops_max)
{
    struct files f;
    struct machine_config config[HOPS + 1];
    struct machine *machine = NULL;
    struct error err = {0};
    files_make(&f);
    struct snapshot_files files = {.state = f.state, .memory = f.memory};
    make_config(&config[0], &f, "interp");
    set_place(&config[0], &places[0]);
    must(machine_create(&machine, &config[0], &err), &err);
    must(machine_start(machine, &err), &err);
    unsigned hop = 0;
    for (; hop < hops_max; hop++) {
        run_for_ms(10);
        files.differential = hop % 3 != 0; /* onto the whole one before */
        if (hop % 2)
            must(machine_pause(machine, &err), &err);
        if (machine_snapshot_save(machine, &files, &err)) {
            assert_int_equal(err.code, -ESRCH); /* it had ended */
            break;
        }
        machine_destroy(machine);
        machine_config_init(&config[hop + 1]);
        must(machine_snapshot_config(&files, &config[hop + 1], &err), &err);
        set_place(&config[hop + 1], &places[(hop + 1) % place_count]);
        must(machine_snapshot_load(&machine, &config[hop + 1], &files, &err), &err);
        must(machine_start(machine, &err), &err);
    }
    assert_true(hop >= 4);
    assert_int_equal(machine_wait(machine), MACHINE_SHUTDOWN);
    machine_destroy(machine);
    for (unsigned i = 0; i <= (hop < hops_max ? hop : hops_max); i++)
        machine_config_clear(&config[i]);

    assert_int_equal(result(&f), expected());
    files_remove(&f);
}

static void hops(void **state)
{
    static const struct place places[] = {{"bt"}, {"bt"}, {"interp"}, {"interp"}, {"bt"}};
    hops_through(places, 5, HOPS);
}

/* Hardware virtualization offers what the host's kernel supports, so the guest begins there; local APICs are now the kernel's, now ours. */
static void hops_kvm(void **state)
{
    static const struct place places[] = {{"kvm", "user"}, {"bt"}, {"kvm", "split"}, {"interp"}, {"kvm", "user"}, {"kvm", "split"}, {"bt"}};
    struct error err;
    if (kvm_engine_ops.probe(&err)) {
        print_message("%s\n", err.text);
        skip();
    }
    hops_through(places, 7, 6);
}

/* A machine that went on is not disturbed by a differential snapshot of it; that one holds what was written since, and no more. */
static void differential_under(const char *engine)
{
    struct files f;
    struct machine_config config;
    struct machine *machine = NULL;
    struct error err = {0};
    struct stat st;
    char second[128];
    files_make(&f);
    snprintf(second, sizeof second, "%s/second", f.directory);
    make_config(&config, &f, usable(engine));
    must(machine_create(&machine, &config, &err), &err);
    must(machine_start(machine, &err), &err);
    run_for_ms(10); /* so that it may write most pages without anybody's noticing */
    must(machine_snapshot_save(machine, &(struct snapshot_files){f.state, f.memory, false}, &err), &err);
    run_for_ms(20);
    must(machine_pause(machine, &err), &err);
    must(machine_snapshot_save(machine, &(struct snapshot_files){f.state, second, true}, &err), &err);
    assert_int_equal(stat(second, &st), 0);
    assert_int_equal(st.st_size, 16 << 20);
    uint64_t used = (uint64_t)st.st_blocks * 512;
    assert_true(used >= PAGES * 2048 && used <= PAGES * 4096 + (256 << 10)); /* most of its pages, little else */
    unlink(second);
    must(machine_snapshot_save(machine, &(struct snapshot_files){f.state, second, true}, &err), &err);
    assert_int_equal(stat(second, &st), 0);
    assert_true((uint64_t)st.st_blocks * 512 <= 64 << 10); /* paused: nothing was written */
    unlink(second);
    machine_destroy(machine);
    machine_config_clear(&config);
    files_remove(&f);
}

static void differential(void **state)
{
    differential_under("interp");
    differential_under("bt");
}

/* ---- whatever is wrong ---- */

static void write_file(const char *path, const void *data, size_t size)
{
    FILE *file = fopen(path, "we");
    assert_non_null(file);
    assert_int_equal(fwrite(data, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static char *read_whole(const char *path, size_t *size)
{
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    char *data = malloc((size_t)st.st_size);
    FILE *file = fopen(path, "re");
    assert_non_null(file);
    *size = fread(data, 1, (size_t)st.st_size, file);
    fclose(file);
    return data;
}

static void must_not_load(const struct files *f, const struct machine_config *good, const char *what)
{
    struct machine *machine = NULL;
    struct machine_config read;
    struct error err = {0};
    const struct snapshot_files files = {f->state, f->memory, false};
    machine_config_init(&read);
    if (machine_snapshot_config(&files, &read, &err) == 0)
        if (machine_snapshot_load(&machine, good, &files, &err) == 0)
            fail_msg("a snapshot that is %s was loaded", what);
    assert_true(strlen(err.text) > 0);
    assert_true(strstr(err.text, f->state) || strstr(err.text, f->memory));
    machine_config_clear(&read);
}

static void damaged(void **state)
{
    struct files f;
    struct machine_config config;
    struct machine *machine = NULL;
    struct error err = {0};
    size_t size;
    files_make(&f);
    make_config(&config, &f, "interp");
    must(machine_create(&machine, &config, &err), &err);
    must(machine_start(machine, &err), &err);
    must(machine_snapshot_save(machine, &(struct snapshot_files){f.state, f.memory, false}, &err), &err);
    machine_destroy(machine);

    char *data = read_whole(f.state, &size);
    for (size_t at = 0; at < size; at += 1 + size / 97) { /* every section, cut and changed */
        write_file(f.state, data, at);
        must_not_load(&f, &config, "cut short");
        data[at] ^= 0x10;
        write_file(f.state, data, size);
        must_not_load(&f, &config, "damaged");
        data[at] ^= 0x10;
    }
    write_file(f.state, data, size);
    assert_int_equal(truncate(f.memory, 12 << 20), 0);
    must_not_load(&f, &config, "of another size");
    unlink(f.memory);
    must_not_load(&f, &config, "without memory");
    assert_int_equal(mkdir(f.memory, 0700), 0);
    must_not_load(&f, &config, "a directory");
    rmdir(f.memory);
    free(data);
    machine_config_clear(&config);
    files_remove(&f);
}

/* A disk that fills up in the middle: the snapshot before is still there, the guest goes on, and the next one is whole again. */
static void disk_full(void **state)
{
    struct files f;
    struct machine_config config;
    struct machine *machine = NULL;
    struct error err = {0};
    struct rlimit before, small = {1 << 20, RLIM_INFINITY};
    struct stat st;
    files_make(&f);
    make_config(&config, &f, "interp");
    must(machine_create(&machine, &config, &err), &err);
    must(machine_start(machine, &err), &err);
    struct snapshot_files files = {f.state, f.memory, false};
    must(machine_snapshot_save(machine, &files, &err), &err);
    size_t size;
    char *first = read_whole(f.state, &size);
    run_for_ms(20);
    must(machine_pause(machine, &err), &err);

    assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
    small.rlim_max = before.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    assert_true(machine_snapshot_save(machine, &files, &err) < 0);
    assert_non_null(strstr(err.text, f.memory));
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
    size_t again;
    char *kept = read_whole(f.state, &again);
    assert_int_equal(again, size);
    assert_memory_equal(kept, first, size);
    assert_int_equal(stat(f.memory, &st), 0);
    assert_int_equal(st.st_size, 16 << 20);

    files.differential = true; /* what the failed one would have had is in it */
    must(machine_snapshot_save(machine, &files, &err), &err);
    machine_destroy(machine);
    set(&config, "engine", usable("bt"));
    must(machine_snapshot_load(&machine, &config, &files, &err), &err);
    must(machine_start(machine, &err), &err);
    assert_int_equal(machine_wait(machine), MACHINE_SHUTDOWN);
    machine_destroy(machine);
    free(first);
    free(kept);
    machine_config_clear(&config);
    files_remove(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hops),
        cmocka_unit_test(hops_kvm),
        cmocka_unit_test(differential),
        cmocka_unit_test(damaged),
        cmocka_unit_test(disk_full),
    };
    signal(SIGXFSZ, SIG_IGN);
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
