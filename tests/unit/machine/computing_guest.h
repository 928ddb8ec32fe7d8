/* A guest that computes, in files of its own: for tests that stop it, save it and go on with it. Included by one test program each, after cmocka.h. */
#ifndef DOPPEL_TESTS_COMPUTING_GUEST_H
#define DOPPEL_TESTS_COMPUTING_GUEST_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../../pvh_kernel.h"
#include "engine/engine.h"
#include "machine/machine.h"

#ifndef ROUNDS /* long enough to be stopped several times on the way, with what engines are usable */
#ifdef __SANITIZE_ADDRESS__
#define ROUNDS 10000000u
#else
#define ROUNDS 60000000u
#endif
#endif
#define PAGES 1024u
#define BYTE(value, n) (uint8_t)((value) >> 8 * (n))

/* x = x * 1664525 + 1013904223, mixed into one of 1024 pages, ROUNDS times; then a sum over the pages goes to port 0xE9, and the power off. */
static const uint8_t computes[] = {
    0x31, 0xc0,                               /*    xor eax,eax */
    0xbe, BYTE(ROUNDS, 0), BYTE(ROUNDS, 1), BYTE(ROUNDS, 2), BYTE(ROUNDS, 3), /* mov esi,ROUNDS */
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

static int64_t clock_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Until the machine has had that much of a processor, however busy the host is; not for ever, as it may have ended. */
static void run_for_ms(long ms)
{
    static const struct timespec a_while = {.tv_nsec = 1000000};
    int64_t enough = clock_ns(CLOCK_PROCESS_CPUTIME_ID) + ms * 1000000, end = clock_ns(CLOCK_MONOTONIC) + 2000000000;
    while (clock_ns(CLOCK_PROCESS_CPUTIME_ID) < enough && clock_ns(CLOCK_MONOTONIC) < end)
        nanosleep(&a_while, NULL);
}

/* Without the translator, which sanitizers leave no room for, the interpreter has to do. */
static const char *usable(const char *engine)
{
    struct error err;
    return strcmp(engine, "bt") == 0 && bt_engine_ops.probe(&err) ? "interp" : engine;
}

/* What it wrote when it was through. */
static uint32_t result(const struct files *f)
{
    uint8_t sum[4];
    FILE *output = fopen(f->output, "re");
    assert_non_null(output);
    assert_int_equal(fread(sum, 1, 4, output), 4);
    fclose(output);
    return sum[0] | sum[1] << 8 | sum[2] << 16 | (uint32_t)sum[3] << 24;
}

#endif
