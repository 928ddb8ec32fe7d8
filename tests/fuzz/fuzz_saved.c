/*
 * Fuzz target: the state of a whole machine, as a hostile snapshot has it. The input changes bytes of a good one, three bytes each: offset in 1/65536 of its length (little endian) and value; then the
 * checksums of all sections are made right again. What the guest's CPUID shows stays: a machine that has lost features does not get them back. A state that is accepted must save, load again, and survive some steps of the first processor.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "../pvh_kernel.h"
#include "machine/machine_priv.h"
#include "util/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SECTIONS_MAX 512u
#define CHANGE_BYTES 3u
#define STEPS 50u

struct section {
    size_t body, end;
};

/* A fuzz target's only way to keep what is costly to make. */
static struct fuzzed {
    struct machine *machine;
    uint8_t *good, *changed;
    size_t size;
    struct section section[SECTIONS_MAX]; /* as they begin: outer ones before those inside */
    unsigned section_count;
    struct section cpuid;
} fuzzed;

static uint32_t crc32_of(const uint8_t *data, size_t size)
{
    uint32_t crc = ~0u;
    for (size_t i = 0; i < size; i++) {
        crc ^= data[i];
        for (unsigned bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
    }
    return ~crc;
}

static uint64_t number_at(const uint8_t *data, unsigned size)
{
    uint64_t value = 0;
    memcpy(&value, data, size);
    return value;
}

/* Wherever a section's beginning is followed by a body with the right checksum. */
static void find_sections(void)
{
    for (size_t at = 0; at + 25 < fuzzed.size && fuzzed.section_count < SECTIONS_MAX; at++) {
        if (memcmp(fuzzed.good + at, "DPS", 3) != 0)
            continue;
        size_t body = at + 5 + fuzzed.good[at + 4] + 12;
        if (body + 4 > fuzzed.size)
            continue;
        uint64_t length = number_at(fuzzed.good + body - 8, 8);
        if (length > fuzzed.size - body - 4 || number_at(fuzzed.good + body + length, 4) != crc32_of(fuzzed.good + body, length))
            continue;
        fuzzed.section[fuzzed.section_count++] = (struct section){body, body + length};
        if (fuzzed.good[at + 4] == 5 && memcmp(fuzzed.good + at + 5, "cpuid", 5) == 0)
            fuzzed.cpuid = (struct section){body, body + length};
    }
}

static void set(struct machine_config *config, const char *key, const char *value)
{
    struct error err = {0};
    if (machine_config_set(config, key, value, &err))
        abort();
}

static void make_machine(void)
{
    static struct machine_config config;
    struct error err = {0};
    char kernel[64], disk[64];
    snprintf(kernel, sizeof kernel, "/tmp/doppel-fuzz-saved-%d.elf", (int)getpid());
    snprintf(disk, sizeof disk, "/tmp/doppel-fuzz-saved-%d.img", (int)getpid());
    pvh_kernel_write(kernel, "\xeb\xfe", 2); /* a loop */
    int fd = open(disk, O_CREAT | O_RDWR, 0600);
    if (fd < 0 || ftruncate(fd, 1 << 20))
        abort();
    close(fd);
    log_set_level(LOG_ERROR);
    machine_config_init(&config);
    set(&config, "kernel", kernel);
    set(&config, "disk", disk);
    set(&config, "memory", "16M");
    set(&config, "cpus", "2");
    set(&config, "console", "none");
    set(&config, "virtio-console", "none");
    set(&config, "net", "user,restrict=on");
    set(&config, "engine", "interp");
    if (machine_create(&fuzzed.machine, &config, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    unlink(kernel);
    unlink(disk);
    struct state_io *io = state_writer_create();
    if (machine_state(fuzzed.machine, io))
        abort();
    const void *data = state_writer_data(io, &fuzzed.size);
    fuzzed.good = malloc(fuzzed.size);
    fuzzed.changed = malloc(fuzzed.size);
    if (!fuzzed.good || !fuzzed.changed)
        abort();
    memcpy(fuzzed.good, data, fuzzed.size);
    state_io_destroy(io);
    find_sections();
}

static void change(const uint8_t *data, size_t size)
{
    memcpy(fuzzed.changed, fuzzed.good, fuzzed.size);
    for (; size >= CHANGE_BYTES; data += CHANGE_BYTES, size -= CHANGE_BYTES) {
        size_t at = number_at(data, 2) * fuzzed.size / 65536;
        if (at < fuzzed.cpuid.body || at >= fuzzed.cpuid.end)
            fuzzed.changed[at] = data[2];
    }
    for (unsigned i = fuzzed.section_count; i-- > 0;) {
        const struct section *section = &fuzzed.section[i];
        uint32_t crc = crc32_of(fuzzed.changed + section->body, section->end - section->body);
        memcpy(fuzzed.changed + section->end, &crc, 4);
    }
}

static int load(const void *data, size_t size, bool good)
{
    struct state_io *io = state_reader_create(data, size);
    int r = machine_state(fuzzed.machine, io);
    if (r && (good || !state_error(io)[0])) {
        fprintf(stderr, "a good state does not load: %s\n", state_error(io));
        abort();
    }
    state_io_destroy(io);
    return r;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!fuzzed.machine)
        make_machine();
    while (!machine_quiesce(fuzzed.machine))
        loop_run_once(fuzzed.machine->loop, -1);
    change(data, size);
    if (load(fuzzed.changed, fuzzed.size, false) == 0) {
        struct state_io *io = state_writer_create();
        struct vcpu *vcpu = fuzzed.machine->vcpu[0].vcpu;
        size_t saved_bytes;
        if (machine_state(fuzzed.machine, io)) {
            fprintf(stderr, "a state that was loaded does not save: %s\n", state_error(io));
            abort();
        }
        const void *saved = state_writer_data(io, &saved_bytes);
        (void)!load(saved, saved_bytes, true);
        state_io_destroy(io);
        for (unsigned i = 0; i < STEPS && vcpu->cpu.activity == CPU_RUNNING; i++)
            fuzzed.machine->engine_ops->step(vcpu);
        loop_run_once(fuzzed.machine->loop, 0);
    }
    while (!machine_quiesce(fuzzed.machine))
        loop_run_once(fuzzed.machine->loop, -1);
    (void)!load(fuzzed.good, fuzzed.size, true);
    return 0;
}
