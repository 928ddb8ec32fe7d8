/* What a machine tells about itself: the one-screen state dump and the counters. Registers of a running vCPU are read as they fly by. */
#include <inttypes.h>
#include <time.h>

#include "machine/machine_priv.h"

static const char *const activity_names[] = {"running", "halted", "waiting for SIPI", "shut down"};

static void dump_cpu(const struct vcpu_thread *thread, FILE *out)
{
    const struct cpu_state *cpu = &thread->vcpu->cpu;
    const uint64_t *r = cpu->gpr;
    fprintf(out, "cpu %u: %s, CPL %u, %s; exits: %" PRIu64 " attention, %" PRIu64 " halt\n", thread->index, activity_names[cpu->activity & 3],
            cpu_cpl(cpu), cpu_in_64bit_mode(cpu) ? "64-bit" : cpu_in_long_mode(cpu) ? "compatibility" : cpu->cr0 & CR0_PE ? "protected" : "real mode",
            thread->exits[ENGINE_EXIT_ATTENTION], thread->exits[ENGINE_EXIT_HALT]);
    fprintf(out, "  rip %016" PRIx64 " rsp %016" PRIx64 " rbp %016" PRIx64 " rflags %06" PRIx64 "\n", r[GPR_RIP], r[GPR_RSP], r[GPR_RBP], cpu->rflags);
    fprintf(out, "  rax %016" PRIx64 " rbx %016" PRIx64 " rcx %016" PRIx64 " rdx %016" PRIx64 "\n", r[GPR_RAX], r[GPR_RBX], r[GPR_RCX], r[GPR_RDX]);
    fprintf(out, "  rsi %016" PRIx64 " rdi %016" PRIx64 " r8  %016" PRIx64 " r9  %016" PRIx64 "\n", r[GPR_RSI], r[GPR_RDI], r[8], r[9]);
    fprintf(out, "  r10 %016" PRIx64 " r11 %016" PRIx64 " r12 %016" PRIx64 " r13 %016" PRIx64 "\n", r[10], r[11], r[12], r[13]);
    fprintf(out, "  r14 %016" PRIx64 " r15 %016" PRIx64 " cs %04x ss %04x ds %04x es %04x fs %04x gs %04x\n", r[14], r[15],
            cpu->seg[SEG_CS].selector, cpu->seg[SEG_SS].selector, cpu->seg[SEG_DS].selector, cpu->seg[SEG_ES].selector,
            cpu->seg[SEG_FS].selector, cpu->seg[SEG_GS].selector);
    fprintf(out, "  fs %016" PRIx64 " gs %016" PRIx64 " idt %016" PRIx64 " gdt %016" PRIx64 "\n", cpu->seg[SEG_FS].base, cpu->seg[SEG_GS].base,
            cpu->idtr.base, cpu->gdtr.base);
    fprintf(out, "  cr0 %08" PRIx64 " cr2 %016" PRIx64 " cr3 %012" PRIx64 " cr4 %06" PRIx64 " efer %03" PRIx64 "\n", cpu->cr0, cpu->cr2, cpu->cr3,
            cpu->cr4, cpu->efer);
}

static uint64_t counter_sum(const struct machine *machine, unsigned counter)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < machine->cpu_count; i++)
        sum += machine->vcpu[i].vcpu->counters[counter];
    return sum;
}

static void print_missing(const struct machine *machine, FILE *out)
{
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        const struct vcpu *vcpu = machine->vcpu[i].vcpu;
        for (unsigned n = 0; n < VCPU_MISSING_MAX && vcpu->missing[n].count; n++)
            fprintf(out, "missing: %s %" PRIu64 " (cpu %u)\n", vcpu->missing[n].name, vcpu->missing[n].count, i);
    }
}

static void print_engine(const struct machine *machine, FILE *out)
{
    if (machine->engine_ops->report)
        machine->engine_ops->report(machine->engine, out);
}

void machine_dump_locked(struct machine *machine, FILE *out)
{
    fprintf(out, "engine %s, %u processor%s, %" PRIu64 " MiB\n", machine->engine_ops->name, machine->cpu_count,
            machine->cpu_count == 1 ? "" : "s", physmap_ram_bytes(machine->memory) >> 20);
    for (unsigned i = 0; i < machine->cpu_count; i++)
        dump_cpu(&machine->vcpu[i], out);
    lapic_dump(machine->lapics, out);
    ioapic_dump(machine->ioapic, out);
    pic_dump(machine->pic, out);
    pit_dump(machine->pit, out);
    rtc_dump(machine->rtc, out);
    hpet_dump(machine->hpet, out);
    for (unsigned i = 0; i < COUNTER_COUNT; i++)
        if (counter_sum(machine, i))
            fprintf(out, "%s %" PRIu64 "%s", engine_counter_names[i], counter_sum(machine, i), i % 4 == 3 ? "\n" : "  ");
    fprintf(out, "unclaimed %" PRIu64 "\n", bus_unclaimed(machine->bus));
    fprintf(out, "memory: %" PRIu64 " KiB of the guest's %" PRIu64 " KiB are in use on the host", physmap_resident_bytes(machine->memory) >> 10,
            physmap_ram_bytes(machine->memory) >> 10);
    fprintf(out, "\n");
    print_missing(machine, out);
    print_engine(machine, out);
}

void machine_dump(struct machine *machine, FILE *out)
{
    pthread_mutex_lock(&machine->device_lock);
    machine_dump_locked(machine, out);
    pthread_mutex_unlock(&machine->device_lock);
}

/* ---- counters ---- */

static void count_cpus(struct machine *machine, counter_fn *counter, void *ctx)
{
    char number[16];
    pthread_mutex_lock(&machine->join_lock); /* threads that are there stay there */
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        clockid_t clock;
        struct timespec used;
        snprintf(number, sizeof number, "%u", i);
        if (machine->vcpu[i].started && !pthread_getcpuclockid(machine->vcpu[i].thread, &clock) && !clock_gettime(clock, &used))
            counter(ctx, &(struct counter){.name = "vcpu_ns", .help = "processor time of a vCPU's thread", .label = "cpu", .label_value = number,
                                           .value = (uint64_t)used.tv_sec * 1000000000 + (uint64_t)used.tv_nsec});
    }
    pthread_mutex_unlock(&machine->join_lock);
}

static void count_missing(struct machine *machine, counter_fn *counter, void *ctx)
{
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        const struct vcpu *vcpu = machine->vcpu[i].vcpu;
        char label[48];
        for (unsigned n = 0; n < VCPU_MISSING_MAX && vcpu->missing[n].count; n++) {
            snprintf(label, sizeof label, "%.27s (cpu %u)", vcpu->missing[n].name, i);
            counter(ctx, &(struct counter){.name = "missing", .help = "what the guest asked for and is not there", .label = "what", .label_value = label,
                                           .value = vcpu->missing[n].count});
        }
    }
}

struct device_walk {
    counter_fn *counter;
    void *ctx;
    const char *kind, *name;
};

static void count_device(void *ctx, const char *name, uint64_t value)
{
    const struct device_walk *walk = ctx;
    char full[80];
    snprintf(full, sizeof full, "%s_%s", walk->kind, name);
    walk->counter(walk->ctx, &(struct counter){.name = full, .help = "counted by a device of this kind", .label = "device", .label_value = walk->name, .value = value});
}

static void count_devices(struct machine *machine, counter_fn *counter, void *ctx)
{
    char name[MACHINE_DEVICE_NAME_BYTES];
    pthread_mutex_lock(&machine->device_lock);
    for (unsigned i = 0; i < machine->device_count; i++) {
        const struct machine_device *device = machine->device[i];
        machine_device_name(machine, i, name);
        struct device_walk walk = {.counter = counter, .ctx = ctx, .kind = device->kind, .name = name};
        if (device->kind && device->class->counters)
            device->class->counters(device->device, count_device, &walk);
    }
    pthread_mutex_unlock(&machine->device_lock);
}

static void count_memory(struct machine *machine, counter_fn *counter, void *ctx)
{
    struct machine_balloon balloon;
    struct error err = {0};
    counter(ctx, &(struct counter){.name = "memory_bytes", .help = "memory that the guest has", .value = physmap_ram_bytes(machine->memory), .gauge = true});
    counter(ctx, &(struct counter){.name = "memory_resident", .help = "bytes of the guest's memory that are in use on the host",
                                   .value = physmap_resident_bytes(machine->memory), .gauge = true});
    if (!machine->balloon || machine_balloon_get(machine, &balloon, &err))
        return;
    counter(ctx, &(struct counter){.name = "balloon_pages", .help = "pages of the guest's memory in the balloon", .value = balloon.actual_pages, .gauge = true});
    counter(ctx, &(struct counter){.name = "balloon_discarded", .help = "bytes given back by balloon, hinting and reporting so far", .value = balloon.discarded_bytes});
}

void machine_count(struct machine *machine, counter_fn *counter, void *ctx)
{
    static const struct {
        const char *name, *help;
    } exits[] = {{"exits_attention", "engine returns because a request or interrupt came"},
                 {"exits_halt", "engine returns because the guest halted"},
                 {"exits_shutdown", "triple faults"},
                 {"exits_error", "engine failures"}};
    for (unsigned i = 0; i < COUNTER_COUNT; i++)
        counter(ctx, &(struct counter){.name = engine_counter_names[i], .help = engine_counter_help[i], .value = counter_sum(machine, i)});
    for (unsigned why = 0; why < 4; why++) {
        uint64_t sum = 0;
        for (unsigned i = 0; i < machine->cpu_count; i++)
            sum += machine->vcpu[i].exits[why];
        counter(ctx, &(struct counter){.name = exits[why].name, .help = exits[why].help, .value = sum});
    }
    counter(ctx, &(struct counter){.name = "bus_unclaimed", .help = "accesses to ports and addresses where nothing is", .value = bus_unclaimed(machine->bus)});
    if (machine->engine_ops->counters)
        machine->engine_ops->counters(machine->engine, counter, ctx);
    count_memory(machine, counter, ctx);
    count_cpus(machine, counter, ctx);
    count_devices(machine, counter, ctx);
    count_missing(machine, counter, ctx);
}

static void print_counter(void *ctx, const struct counter *counter)
{
    char name[96];
    snprintf(name, sizeof name, counter->label ? "%s{%s}" : "%s", counter->name, counter->label_value);
    fprintf(ctx, "%-22s %15" PRIu64 "  %s\n", name, counter->value, counter->help);
}

void machine_stats(struct machine *machine, FILE *out)
{
    machine_count(machine, print_counter, out);
    print_engine(machine, out);
}

/* ---- names ---- */

const char *machine_engine(const struct machine *machine, const char **reason)
{
    *reason = machine->engine_reason;
    return machine->engine_ops->name;
}

void machine_device_name(const struct machine *machine, unsigned index, char name[MACHINE_DEVICE_NAME_BYTES])
{
    const struct machine_device *device = machine->device[index];
    unsigned before = 0;
    for (unsigned i = 0; i < index; i++)
        before += machine->device[i]->class == device->class;
    if (device->id)
        snprintf(name, MACHINE_DEVICE_NAME_BYTES, "%s", device->id);
    else
        snprintf(name, MACHINE_DEVICE_NAME_BYTES, "%s%u", device->kind ? device->kind : device->class->name, before);
}

void machine_devices(struct machine *machine, void (*each)(void *ctx, const char *name, const char *class, const char *help), void *ctx)
{
    char name[MACHINE_DEVICE_NAME_BYTES];
    pthread_mutex_lock(&machine->device_lock);
    for (unsigned i = 0; i < machine->device_count; i++) {
        machine_device_name(machine, i, name);
        each(ctx, name, machine->device[i]->class->name, machine->device[i]->class->help);
    }
    pthread_mutex_unlock(&machine->device_lock);
}
