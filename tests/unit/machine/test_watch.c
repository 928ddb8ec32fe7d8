/* Watching a machine: its events in order, its counters by name, its devices. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "../../pvh_kernel.h"
#include "machine/machine.h"

/* Says "x" through the serial port, then halts for ever. */
static const uint8_t says[] = {0x66, 0xba, 0xf8, 0x03, 0xb0, 'x', 0xee, 0xfa, 0xf4, 0xeb, 0xfd};
/* Reports a panic to pvpanic at port 0x505. */
static const uint8_t panics[] = {0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xf4};

struct watch {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    char text[512]; /* "started:interp paused ..." */
    char heard;
};

static void note(void *ctx, enum machine_event event, const char *detail)
{
    struct watch *watch = ctx;
    pthread_mutex_lock(&watch->lock);
    size_t length = strlen(watch->text);
    snprintf(watch->text + length, sizeof watch->text - length, "%s%s%s ", machine_event_table[event].name, detail ? ":" : "", detail ? detail : "");
    pthread_cond_broadcast(&watch->changed);
    pthread_mutex_unlock(&watch->lock);
}

static void hear(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct watch *watch = ctx;
    pthread_mutex_lock(&watch->lock);
    watch->heard = (char)data[0];
    pthread_cond_broadcast(&watch->changed);
    pthread_mutex_unlock(&watch->lock);
}

static void wait_heard(struct watch *watch)
{
    pthread_mutex_lock(&watch->lock);
    while (!watch->heard)
        pthread_cond_wait(&watch->changed, &watch->lock);
    pthread_mutex_unlock(&watch->lock);
}

static void wait_for(struct watch *watch, const char *event)
{
    pthread_mutex_lock(&watch->lock);
    while (!strstr(watch->text, event))
        pthread_cond_wait(&watch->changed, &watch->lock);
    pthread_mutex_unlock(&watch->lock);
}

static void must(int result, const struct error *err)
{
    if (result)
        fail_msg("%s", err->text);
}

static struct machine *make(struct machine_config *config, const uint8_t *code, size_t size_bytes)
{
    static const char *const options[][2] = {{"memory", "8M"}, {"cpus", "2"}, {"net", "none"}, {"engine", "interp"}};
    struct error err = {0};
    struct machine *machine;
    char path[64];
    snprintf(path, sizeof path, "/tmp/doppel-watch-%d.elf", (int)getpid());
    pvh_kernel_write(path, code, size_bytes);
    machine_config_init(config);
    must(machine_config_set(config, "kernel", path, &err), &err);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        must(machine_config_set(config, options[i][0], options[i][1], &err), &err);
    config->input_fd = config->output_fd = -1;
    must(machine_create(&machine, config, &err), &err);
    return machine;
}

static void drop(struct machine *machine, struct machine_config *config)
{
    machine_destroy(machine);
    unlink(config->kernel);
    machine_config_clear(config);
}

static void events(void **state)
{
    struct error err = {0};
    struct watch watch = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    struct machine_config config;
    struct machine *machine = make(&config, says, sizeof says);
    machine_observe(machine, &(struct machine_observer){note, &watch});
    machine_console_tap(machine, &(struct console_tap){.output = hear, .ctx = &watch});
    must(machine_start(machine, &err), &err);
    wait_heard(&watch);
    assert_int_equal(watch.heard, 'x');
    must(machine_pause(machine, &err), &err);
    must(machine_pause(machine, &err), &err);
    must(machine_resume(machine, &err), &err);
    assert_int_equal(machine_resume(machine, &err), -EALREADY);
    machine_power_button(machine);
    machine_reset(machine);
    wait_for(&watch, "reset ");
    assert_int_equal(machine_console_type(machine, (const uint8_t *)"y", 1), 1);
    machine_stop(machine, MACHINE_STOPPED);
    machine_stop(machine, MACHINE_ERROR);
    assert_int_equal(machine_wait(machine), MACHINE_STOPPED);
    assert_string_equal(watch.text, "started:interp paused resumed power-button reset ended:stopped ");
    machine_observe(machine, NULL);
    machine_console_tap(machine, NULL);
    drop(machine, &config);
}

static void panic(void **state)
{
    struct error err = {0};
    struct watch watch = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    struct machine_config config;
    struct machine *machine = make(&config, panics, sizeof panics);
    machine_observe(machine, &(struct machine_observer){note, &watch});
    must(machine_start(machine, &err), &err);
    assert_int_equal(machine_wait(machine), MACHINE_CRASH);
    assert_string_equal(watch.text, "started:interp guest-panic ended:crash ");
    drop(machine, &config);
}

struct sums {
    uint64_t port_writes, memory_bytes, frames;
    unsigned cpus, count;
};

static void add(void *ctx, const struct counter *counter)
{
    struct sums *sums = ctx;
    sums->count++;
    assert_non_null(counter->help);
    assert_true((counter->label == NULL) == (counter->label_value == NULL));
    for (const char *c = counter->name; *c; c++)
        assert_true((*c >= 'a' && *c <= 'z') || (*c >= '0' && *c <= '9') || *c == '_');
    if (strcmp(counter->name, "port_writes") == 0)
        sums->port_writes += counter->value;
    if (strcmp(counter->name, "memory_bytes") == 0)
        sums->memory_bytes += counter->value;
    if (strcmp(counter->name, "vcpu_ns") == 0)
        sums->cpus++;
}

static void list(void *ctx, const char *name, const char *class, const char *help)
{
    char *text = ctx;
    strcat(text, name);
    strcat(text, " ");
    assert_true(strlen(class) > 0 && strlen(help) > 0);
}

static void counters(void **state)
{
    struct error err = {0};
    struct watch watch = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};
    struct sums before = {0}, after = {0};
    struct machine_config config;
    char devices[256] = "";
    const char *reason;
    struct machine *machine = make(&config, says, sizeof says);
    machine_count(machine, add, &before);
    machine_console_tap(machine, &(struct console_tap){.output = hear, .ctx = &watch});
    must(machine_start(machine, &err), &err);
    wait_heard(&watch);
    must(machine_pause(machine, &err), &err);
    machine_count(machine, add, &after);
    assert_int_equal(before.port_writes, 0);
    assert_int_equal(before.cpus, 0);
    assert_int_equal(after.port_writes, 1);
    assert_int_equal(after.memory_bytes, 8 << 20);
    assert_int_equal(after.cpus, 2);
    assert_true(after.count > 40);
    machine_devices(machine, list, devices);
    assert_string_equal(devices, "rng0 ");
    assert_string_equal(machine_engine(machine, &reason), "interp");
    drop(machine, &config);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(events), cmocka_unit_test(panic), cmocka_unit_test(counters)};
    alarm(100);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
