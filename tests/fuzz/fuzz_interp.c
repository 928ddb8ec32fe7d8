/*
 * Fuzz target: guest code. The input is arbitrary code run in one of the processor's modes, at privilege and with flags of the input's choosing.
 *
 * Byte 0: mode and variant; byte 1: flags; bytes 2 to 17: seeds of the registers; the rest is code. Some instructions run by step(), the
 * others by run(), which a timer ends. Anything may happen to the guest; the process must neither crash nor hang.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz_vm.h"
#include "state/state.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define HEADER_BYTES 18u
#define CODE_BYTES_MAX 1024u
#define STEPS 200u
#define RUN_MICROSECONDS 2000
#define RESTARTS 24u

enum { VARIANT_USER = 0x10, VARIANT_STEP = 0x20, VARIANT_STRICT = 0x40, VARIANT_INTERRUPT = 0x80 };

/* Addresses that matter and small numbers. */
static uint64_t register_value(uint8_t seed)
{
    static const uint64_t values[] = {0, 1, TINY_DATA, TINY_DATA + 0xffd, TINY_STACK, TINY_CODE, TINY_PD, TINY_GDT, TINY_IDT + 3, TINY_TSS, TINY_MMIO,
                                      TINY_PAGES + 0xffc, 0x7fffffffffffull, 0xffff800000000000ull, ~0ull, 0x80000000ull};
    return values[seed & 15] + (seed >> 4);
}

static void prepare(const uint8_t *data, size_t size)
{
    static const enum tiny_mode modes[4] = {TINY_LONG, TINY_LONG, TINY_PROTECTED, TINY_REAL};
    enum tiny_mode mode = modes[data[0] & 3];
    tiny_vm_load(&vm, mode, data + HEADER_BYTES, size - HEADER_BYTES);
    struct cpu_state *cpu = &vm.vcpu->cpu;
    for (unsigned n = 0; n < 16; n++)
        if (n != GPR_RSP || data[2 + n] & 1)
            cpu->gpr[n] = mode == TINY_LONG ? register_value(data[2 + n]) : (uint32_t)register_value(data[2 + n]);
    if (mode == TINY_LONG) {
        tiny_vm_map(&vm, 0, 0x50003 | (data[1] & 4));
        tiny_vm_map(&vm, 1, 0x70000 | (data[1] & 7));
    }
    if (data[0] & VARIANT_STRICT) {
        cpu->cr0 |= CR0_AM;
        cpu->dr[0] = TINY_DATA;
        cpu->dr[7] |= 1 | 3 << 16;
    }
    cpu->rflags |= (uint64_t)data[1] << 8 & (RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_OF | RFLAGS_NT | RFLAGS_IOPL);
    if (mode != TINY_REAL && (data[0] & VARIANT_USER))
        tiny_vm_enter_user(&vm, mode == TINY_LONG);
    vm.pending_vector = data[0] & VARIANT_INTERRUPT ? 0x40 : -1;
    vm.pending_nmi = data[1] & 1;
    vm.exit_wanted = false;
    interp_engine.state_changed(vm.vcpu);
}

static void execute(bool step)
{
    const struct cpu_state *cpu = &vm.vcpu->cpu;
    start_timer(RUN_MICROSECONDS); /* a repeated string instruction is one step, and may be a long one */
    for (unsigned n = 0; step && n < STEPS && cpu->activity == CPU_RUNNING; n++)
        interp_engine.step(vm.vcpu);
    if (cpu->activity == CPU_RUNNING)
        interp_engine.run(vm.vcpu);
    start_timer(0);
}

/* What run and step leave can be saved and loaded again. */
static void check_state(const struct cpu_state *left)
{
    static struct cpu_state cpu;
    size_t bytes;
    cpu = *left;
    struct state_io *writer = state_writer_create();
    if (!writer || cpu_state_state(&cpu, writer))
        abort();
    const void *saved = state_writer_data(writer, &bytes);
    struct state_io *reader = state_reader_create(saved, bytes);
    if (!reader || cpu_state_state(&cpu, reader)) {
        fprintf(stderr, "%s\n", reader ? state_error(reader) : "no memory");
        abort();
    }
    state_io_destroy(reader);
    state_io_destroy(writer);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < HEADER_BYTES || size > HEADER_BYTES + CODE_BYTES_MAX)
        return 0;
    if (!vm.vcpu)
        create();
    prepare(data, size);
    struct cpu_state *cpu = &vm.vcpu->cpu;
    for (unsigned n = 0; n < RESTARTS && cpu->activity != CPU_SHUTDOWN; n++) {
        execute(data[0] & VARIANT_STEP);
        check_state(cpu);
        if (cpu->activity != CPU_HALTED)
            break;
        /* Usually a fault's handler: go on somewhere else in the code, now in ring 0. */
        cpu->activity = CPU_RUNNING;
        cpu->gpr[GPR_RIP] = (cpu->cr0 & CR0_PE ? TINY_CODE : 0) + (n + 1) * 7 % (size - HEADER_BYTES + 1);
        interp_engine.state_changed(vm.vcpu);
    }
    return 0;
}
