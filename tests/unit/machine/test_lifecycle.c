/* The life of a virtual machine through libdoppel: functions in any order, from several threads at once, end and leave nothing behind. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "../../pvh_kernel.h"
#include "doppel/doppel.h"

#define THREADS 4
#define ROUNDS 12
#define STEPS 60

/* A guest that runs for ever, one that sleeps for ever, one that resets all the time through the keyboard controller. */
static const uint8_t spins[] = {0xeb, 0xfe};
static const uint8_t halts[] = {0xfa, 0xf4, 0xeb, 0xfd};
static const uint8_t resets[] = {0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xf9};
static const struct {
    const uint8_t *code;
    size_t size_bytes;
} guests[] = {{spins, sizeof spins}, {halts, sizeof halts}, {resets, sizeof resets}};
#define GUESTS (sizeof guests / sizeof *guests)

static void must(int result, const char *error)
{
    if (result)
        fail_msg("%s", error);
}

static struct doppel_config *make_config(unsigned guest)
{
    char error[DOPPEL_ERROR_BYTES] = "", path[64];
    static const char *const options[][2] = {{"memory", "8M"}, {"cpus", "2"}, {"console", "none"}, {"net", "none"}, {"engine", "interp"}};
    snprintf(path, sizeof path, "/tmp/doppel-lifecycle-%d-%u.elf", (int)getpid(), guest);
    pvh_kernel_write(path, guests[guest].code, guests[guest].size_bytes);
    struct doppel_config *config = doppel_config_create();
    assert_non_null(config);
    must(doppel_config_set(config, "kernel", path, error), error);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        must(doppel_config_set(config, options[i][0], options[i][1], error), error);
    return config;
}

static void drop_config(struct doppel_config *config)
{
    unlink(doppel_config_get(config, "kernel"));
    doppel_config_destroy(config);
}

static struct doppel_vm *make_vm(const struct doppel_config *config)
{
    char error[DOPPEL_ERROR_BYTES] = "";
    struct doppel_vm *vm = NULL;
    must(doppel_vm_create(config, &vm, error), error);
    return vm;
}

static unsigned open_descriptors(void)
{
    unsigned count = 0;
    DIR *dir = opendir("/proc/self/fd");
    assert_non_null(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}

/* ---- one thread ---- */

static void never_started(void **state)
{
    struct doppel_config *config = make_config(1);
    unsigned before = open_descriptors();
    for (int i = 0; i < 3; i++) {
        struct doppel_vm *vm = make_vm(config);
        if (i == 1)
            doppel_vm_reset(vm);
        if (i == 2)
            doppel_vm_stop(vm);
        doppel_vm_destroy(vm);
    }
    assert_int_equal(open_descriptors(), before);
    drop_config(config);
}

static void started_paused(void **state)
{
    char error[DOPPEL_ERROR_BYTES] = "";
    struct doppel_config *config = make_config(0);
    struct doppel_vm *vm = make_vm(config);
    must(doppel_vm_pause(vm, error), error);
    must(doppel_vm_start(vm, error), error);
    assert_int_equal(doppel_vm_start(vm, error), -EALREADY);
    must(doppel_vm_pause(vm, error), error);
    must(doppel_vm_resume(vm, error), error);
    assert_int_equal(doppel_vm_resume(vm, error), -EALREADY);
    doppel_vm_stop(vm);
    assert_int_equal(doppel_vm_wait(vm), DOPPEL_END_STOPPED);
    assert_int_equal(doppel_vm_wait(vm), DOPPEL_END_STOPPED);
    assert_int_equal(doppel_vm_pause(vm, error), -ESRCH);
    doppel_vm_destroy(vm);
    drop_config(config);
}

/* ---- many threads ---- */

struct caller {
    pthread_t thread;
    struct doppel_vm *vm;
    unsigned seed;
};

static void *call_at_random(void *ctx)
{
    struct caller *caller = ctx;
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    for (unsigned step = 0; step < STEPS; step++) {
        switch (rand_r(&caller->seed) % 8) {
        case 0:
        case 1:
            (void)doppel_vm_pause(caller->vm, NULL);
            break;
        case 2:
        case 3:
            (void)doppel_vm_resume(caller->vm, NULL);
            break;
        case 4:
            doppel_vm_reset(caller->vm);
            break;
        case 5:
            doppel_vm_power_button(caller->vm);
            break;
        case 6:
            doppel_vm_dump(caller->vm, out);
            doppel_vm_stats(caller->vm, out);
            rewind(out);
            break;
        case 7:
            usleep(rand_r(&caller->seed) % 500);
            break;
        }
    }
    fclose(out);
    free(text);
    return NULL;
}

static void *wait_for_end(void *ctx)
{
    struct caller *caller = ctx;
    assert_int_equal(doppel_vm_wait(caller->vm), DOPPEL_END_STOPPED);
    return NULL;
}

static void storm(struct doppel_vm *vm, unsigned seed)
{
    char error[DOPPEL_ERROR_BYTES] = "";
    struct caller callers[THREADS + 2];
    for (unsigned i = 0; i < THREADS + 2; i++) {
        callers[i] = (struct caller){.vm = vm, .seed = seed * 31 + i};
        assert_int_equal(pthread_create(&callers[i].thread, NULL, i < THREADS ? call_at_random : wait_for_end, &callers[i]), 0);
    }
    must(doppel_vm_start(vm, error), error);
    usleep(seed % 7 * 3000);
    if (seed % 2) { /* half of the time the end comes in the middle of everything */
        doppel_vm_stop(vm);
    } else {
        for (unsigned i = 0; i < THREADS; i++)
            pthread_join(callers[i].thread, NULL);
        doppel_vm_stop(vm);
    }
    for (unsigned i = seed % 2 ? 0 : THREADS; i < THREADS + 2; i++)
        pthread_join(callers[i].thread, NULL);
}

static void any_order(void **state)
{
    for (unsigned guest = 0; guest < GUESTS; guest++) {
        struct doppel_config *config = make_config(guest);
        unsigned before = open_descriptors();
        for (unsigned round = 0; round < ROUNDS; round++) {
            struct doppel_vm *vm = make_vm(config);
            storm(vm, round);
            doppel_vm_destroy(vm);
        }
        assert_int_equal(open_descriptors(), before);
        drop_config(config);
    }
}

/* A pause must not wait for ever when another thread resumes at that moment. */
static void pause_against_resume(void **state)
{
    struct doppel_config *config = make_config(0);
    struct doppel_vm *vm = make_vm(config);
    storm(vm, 2);
    doppel_vm_destroy(vm);
    drop_config(config);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(never_started),
        cmocka_unit_test(started_paused),
        cmocka_unit_test(pause_against_resume),
        cmocka_unit_test(any_order),
    };
    alarm(300); /* a deadlock is a failure */
    return cmocka_run_group_tests(tests, NULL, NULL);
}
