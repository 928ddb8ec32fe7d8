/* What a machine tells about itself: the one-screen state dump and the counters. Registers of a running vCPU are read as they fly by. */
#include <inttypes.h>

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

void machine_stats(struct machine *machine, FILE *out)
{
    static const char *const exit_names[] = {"exits_attention", "exits_halt", "exits_shutdown", "exits_error"};
    static const char *const exit_help[] = {"engine returns because a request or interrupt came", "engine returns because the guest halted",
                                            "triple faults", "engine failures"};
    for (unsigned i = 0; i < COUNTER_COUNT; i++)
        fprintf(out, "%-22s %15" PRIu64 "  %s\n", engine_counter_names[i], counter_sum(machine, i), engine_counter_help[i]);
    for (unsigned why = 0; why < 4; why++) {
        uint64_t sum = 0;
        for (unsigned i = 0; i < machine->cpu_count; i++)
            sum += machine->vcpu[i].exits[why];
        fprintf(out, "%-22s %15" PRIu64 "  %s\n", exit_names[why], sum, exit_help[why]);
    }
    fprintf(out, "%-22s %15" PRIu64 "  %s\n", "bus_unclaimed", bus_unclaimed(machine->bus), "accesses to ports and addresses where nothing is");
    fprintf(out, "%-22s %15" PRIu64 "  %s\n", "memory_resident", physmap_resident_bytes(machine->memory), "bytes of the guest's memory that are in use on the host");
    if (machine->balloon) {
        struct machine_balloon balloon;
        struct error err = {0};
        if (!machine_balloon_get(machine, &balloon, &err)) {
            fprintf(out, "%-22s %15" PRIu64 "  %s\n", "balloon_pages", balloon.actual_pages, "pages of the guest's memory in the balloon");
            fprintf(out, "%-22s %15" PRIu64 "  %s\n", "balloon_discarded", balloon.discarded_bytes, "bytes given back by balloon, hinting and reporting so far");
        }
    }
    print_missing(machine, out);
    print_engine(machine, out);
}
