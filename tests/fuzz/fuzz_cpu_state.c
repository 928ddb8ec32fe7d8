/*
 * Fuzz target: a saved processor state, as a hostile snapshot has it. The input changes bytes of a good one, whose checksum is then made right again.
 *
 * Byte 0: which good state; byte 1: number of changes; three bytes each, offset (little endian) and value; the rest is guest code. A state that is
 * accepted must save as the same bytes; the processor must survive running it; and what running leaves must be a state that can be loaded.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz_vm.h"
#include "state/state.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define SECTION_HEADER_BYTES (4u + 1 + 3 /* "cpu" */ + 4 + 8)
#define STATE_BYTES_MAX 8192u
#define CODE_BYTES_MAX 256u
#define STEPS 24u
#define RUN_MICROSECONDS 2000

static uint8_t image[STATE_BYTES_MAX];
static size_t image_bytes;

static void save(void)
{
    struct state_io *io = state_writer_create();
    if (!io || cpu_state_state(&vm.vcpu->cpu, io))
        abort();
    const void *data = state_writer_data(io, &image_bytes);
    if (image_bytes > sizeof(image))
        abort();
    memcpy(image, data, image_bytes);
    state_io_destroy(io);
}

static int load(void)
{
    struct state_io *io = state_reader_create(image, image_bytes);
    if (!io)
        abort();
    int result = cpu_state_state(&vm.vcpu->cpu, io);
    if (result && getenv("FUZZ_VERBOSE"))
        fprintf(stderr, "%s\n", state_error(io));
    state_io_destroy(io);
    return result;
}

static void checksum_renew(void)
{
    uint32_t crc = ~0u;
    for (size_t n = SECTION_HEADER_BYTES; n < image_bytes - 4; n++) {
        crc ^= image[n];
        for (unsigned bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xedb88320u : crc >> 1;
    }
    crc = ~crc;
    memcpy(image + image_bytes - 4, &crc, 4);
}

static void change(const uint8_t *changes, unsigned count)
{
    size_t body = image_bytes - SECTION_HEADER_BYTES - 4;
    for (unsigned n = 0; n < count; n++)
        image[SECTION_HEADER_BYTES + (changes[3 * n] | changes[3 * n + 1] << 8) % body] = changes[3 * n + 2];
    checksum_renew();
}

static void execute(void)
{
    struct cpu_state *cpu = &vm.vcpu->cpu;
    vm.exit_wanted = vm.pending_nmi = false;
    vm.pending_vector = -1;
    interp_engine.state_changed(vm.vcpu);
    start_timer(RUN_MICROSECONDS);
    for (unsigned n = 0; n < STEPS && cpu->activity == CPU_RUNNING; n++)
        interp_engine.step(vm.vcpu);
    if (cpu->activity == CPU_RUNNING)
        interp_engine.run(vm.vcpu);
    start_timer(0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const enum tiny_mode modes[4] = {TINY_LONG, TINY_PROTECTED, TINY_REAL, TINY_LONG};
    static uint8_t accepted[STATE_BYTES_MAX];
    if (size < 3)
        return 0;
    unsigned count = data[1] < (size - 3) / 3 ? data[1] : (unsigned)(size - 3) / 3;
    size_t header = 2 + 3 * (size_t)count;
    if (size - header > CODE_BYTES_MAX)
        return 0;
    if (!vm.vcpu)
        create();
    tiny_vm_load(&vm, modes[data[0] & 3], data + header, size - header);
    if ((data[0] & 3) == 3)
        tiny_vm_enter_user(&vm, true);
    save();
    change(data + 2, count);
    if (load())
        return 0;
    memcpy(accepted, image, image_bytes);
    save();
    if (memcmp(accepted, image, image_bytes))
        abort();
    execute();
    save();
    if (load())
        abort();
    return 0;
}
