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

#include "../../pvh_kernel.h"
#include "machine/machine.h"
#include "util/log.h"

#define ROUNDS 60000000u
#define PAGES 1024u
#define HOPS 12

/* x = x * 1664525 + 1013904223, mixed into one of 1024 pages, ROUNDS times; then a sum over the pages goes to port 0xE9, and the power off. */
static const uint8_t computes[] = {
    0x31, 0xc0,                               /*    xor eax,eax */
    0xbe, 0x00, 0x87, 0x93, 0x03,             /*    mov esi,ROUNDS */
    0x69, 0xc0, 0x0d, 0x66, 0x19, 0x00,       /* 1: imul eax,eax,1664525 */
    0x05, 0x5f, 0xf3, 0x6e, 0x3c,             /*    add eax,1013904223 */
    0x89, 0xc2, 0xc1, 0xea, 0x08,             /*    mov edx,eax; shr edx,8 */
    0x81, 0xe2, 0x00, 0xf0, 0x3f, 0x00,       /*    and edx,0x3ff000 */
    0x31, 0x82, 0x00, 0x00, 0x20, 0x00,       /*    xor [edx+0x200000],eax */
    0x4e, 0x75, 0xe1,                         /*    dec esi; jnz 1b */
    0xba, 0x00, 0x00, 0x60, 0x00,             /*    mov edx,0x600000 */
    0x81, 0xea, 0x00, 0x10, 0x00, 0x00,       /* 2: sub edx,4096 */
    0x03, 0x02, 0xd1, 0xc0,                   /*    add eax,[edx]; rol eax,1 */
    0x81, 0xfa, 0x00, 0x00, 0x20, 0x00,       /*    cmp edx,0x200000 */
    0x77, 0xee, 0xb1, 0x04,                   /*    ja 2b; mov cl,4 */
    0xe6, 0xe9, 0xc1, 0xe8, 0x08,             /* 3: out 0xe9,al; shr eax,8 */
    0xfe, 0xc9, 0x75, 0xf7,                   /*    dec cl; jnz 3b */
    0x66, 0xba, 0x04, 0x06, 0xb4, 0x34, 0x66, 0xef, 0xf4, /* mov dx,0x604; mov ah,0x34; out dx,ax; hlt */
};

static uint32_t expected(void)
{
    static uint32_t page[PAGES];
    uint32_t x = 0;
    memset(page, 0, sizeof page);
    for (uint32_t i = 0; i < ROUNDS; i++) {
        x = x * 1664525u + 1013904223u;
        page[(x >> 8 & 0x3ff000) >> 12] ^= x;
    }
    for (unsigned i = PAGES; i-- > 0;) {
        x += page[i];
        x = x << 1 | x >> 31;
    }
    return x;
}

struct files {
    char directory[64], kernel[96], state[96], memory[96], output[96];
};

static void files_make(struct files *f)
{
    snprintf(f->directory, sizeof f->directory, "/tmp/doppel-snapshot-XXXXXX");
    assert_non_null(mkdtemp(f->directory));
    snprintf(f->kernel, sizeof f->kernel, "%s/kernel", f->directory);
    snprintf(f->state, sizeof f->state, "%s/state", f->directory);
    snprintf(f->memory, sizeof f->memory, "%s/memory", f->directory);
    snprintf(f->output, sizeof f->output, "%s/output", f->directory);
    pvh_kernel_write(f->kernel, computes, sizeof computes);
}

static void files_remove(struct files *f)
{
    unlink(f->kernel);
    unlink(f->state);
    unlink(f->memory);
    unlink(f->output);
    assert_int_equal(rmdir(f->directory), 0); /* nothing temporary is left */
}

static void set(struct machine_config *config, const char *key, const char *value)
{
    struct error err = {0};
    if (machine_config_set(config, key, value, &err))
        fail_msg("%s", err.text);
}

static void make_config(struct machine_config *config, const struct files *f, const char *engine)
{
    char output[128];
    snprintf(output, sizeof output, "file:%s", f->output);
    machine_config_init(config);
    set(config, "kernel", f->kernel);
    set(config, "memory", "16M");
    set(config, "console", "none");
    set(config, "debug-console", output);
    set(config, "net", "user,restrict=on");
    set(config, "engine", engine);
}

static void must(int result, const struct error *err)
{
    if (result)
        fail_msg("%s", err->text);
}

static void run_for_ms(long ms)
{
    struct timespec time = {.tv_nsec = ms * 1000000};
    nanosleep(&time, NULL);
}

struct place {
    const char *engine, *irqchip;
};

/* Without the translator, which sanitizers leave no room for, the interpreter has to do. */
static const char *usable(const char *engine)
{
    struct error err;
    return strcmp(engine, "bt") == 0 && bt_engine_ops.probe(&err) ? "interp" : engine;
}

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
        must(machine_snapshot_config(f.state, &config[hop + 1], &err), &err);
        set_place(&config[hop + 1], &places[(hop + 1) % place_count]);
        must(machine_snapshot_load(&machine, &config[hop + 1], &files, &err), &err);
        must(machine_start(machine, &err), &err);
    }
    assert_true(hop >= 4);
    assert_int_equal(machine_wait(machine), MACHINE_SHUTDOWN);
    machine_destroy(machine);
    for (unsigned i = 0; i <= (hop < hops_max ? hop : hops_max); i++)
        machine_config_clear(&config[i]);

    uint8_t sum[4];
    FILE *output = fopen(f.output, "re");
    assert_non_null(output);
    assert_int_equal(fread(sum, 1, 4, output), 4);
    fclose(output);
    assert_int_equal(sum[0] | sum[1] << 8 | sum[2] << 16 | (uint32_t)sum[3] << 24, expected());
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
    machine_config_init(&read);
    if (machine_snapshot_config(f->state, &read, &err) == 0)
        if (machine_snapshot_load(&machine, good, &(struct snapshot_files){f->state, f->memory, false}, &err) == 0)
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
