/* What a machine has counted, by group and name, for metrics and statistics: processors, serial port, keyboard controller, and each device whose class counts something. Any thread. */
#include <stdio.h>

#include "machine/machine_priv.h"

struct group {
    machine_counter_fn *emit;
    void *ctx;
    const char *name;
};

static void emit_device(void *ctx, const char *name, uint64_t value)
{
    const struct group *group = ctx;
    group->emit(group->ctx, group->name, name, value);
}

static uint64_t sum(const struct machine *machine, unsigned counter)
{
    uint64_t total = 0;
    for (unsigned i = 0; i < machine->cpu_count; i++)
        total += machine->vcpu[i].vcpu->counters[counter];
    return total;
}

static void count_processors(const struct machine *machine, machine_counter_fn *emit, void *ctx)
{
    static const struct {
        const char *name;
        unsigned counter;
    } counters[] = {{"exit_io_in", COUNTER_port_reads},       {"exit_io_out", COUNTER_port_writes}, {"exit_mmio_read", COUNTER_mmio_reads},
                    {"exit_mmio_write", COUNTER_mmio_writes}, {"exit_msr_read", COUNTER_msr_reads}, {"exit_msr_write", COUNTER_msr_writes},
                    {"exit_halt", COUNTER_halts},             {"interrupts", COUNTER_interrupts},   {"page_faults", COUNTER_page_faults},
                    {"system_calls", COUNTER_system_calls},   {"exit_kick", COUNTER_attentions}};
    uint64_t failures = 0;
    for (size_t i = 0; i < sizeof counters / sizeof *counters; i++)
        emit(ctx, "vcpu", counters[i].name, sum(machine, counters[i].counter));
    for (unsigned i = 0; i < machine->cpu_count; i++)
        failures += machine->vcpu[i].exits[ENGINE_EXIT_ERROR];
    emit(ctx, "vcpu", "failures", failures);
}

static void count_keyboard(const struct machine *machine, machine_counter_fn *emit, void *ctx)
{
    struct i8042_counters counters;
    i8042_get_counters(machine->i8042, &counters);
    emit(ctx, "i8042", "read_count", counters.reads);
    emit(ctx, "i8042", "write_count", counters.writes);
    emit(ctx, "i8042", "reset_count", counters.resets);
    emit(ctx, "i8042", "error_count", counters.errors);
}

void machine_counters(struct machine *machine, machine_counter_fn *emit, void *ctx)
{
    count_processors(machine, emit, ctx);
    pthread_mutex_lock(&machine->device_lock);
    emit(ctx, "uart", "write_count", machine->serial_written);
    emit(ctx, "uart", "read_count", machine->serial_read);
    emit(ctx, "uart", "rate_limiter_dropped_bytes", machine->serial_dropped);
    count_keyboard(machine, emit, ctx);
    for (unsigned i = 0; i < machine->device_count; i++) {
        const struct machine_device *device = machine->device[i];
        char name[96];
        snprintf(name, sizeof name, "%s%s%s", device->kind, device->id ? "_" : "", device->id ? device->id : "");
        struct group group = {.emit = emit, .ctx = ctx, .name = name};
        if (device->class->counters)
            device->class->counters(device->device, emit_device, &group);
    }
    machine_count_metadata(machine, emit, ctx);
    pthread_mutex_unlock(&machine->device_lock);
}
