/*
 * The vCPUs' threads: the run loop around the engine, requests from other threads (park, stop, INIT, SIPI), and the calls the engine makes to the
 * machine (I/O, MSRs, interrupts).
 *
 * A request is a bit in vcpu_thread.requests plus a kick; the thread looks at the bits between engine runs. HLT and wait-for-SIPI wait for
 * vcpu_thread.woken, asleep if it takes long. Parking is in still.c.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "machine/machine_priv.h"
#include "state/inputs.h"
#include "util/log.h"

/* ---- what the engine asks of the machine ---- */

static uint32_t host_port_read(void *host, uint16_t port, unsigned size_bytes)
{
    struct machine *machine = ((struct vcpu_thread *)host)->machine;
    pthread_mutex_lock(&machine->device_lock);
    uint64_t value = bus_read(machine->bus, BUS_PORT, port, size_bytes);
    pthread_mutex_unlock(&machine->device_lock);
    return (uint32_t)value;
}

static void host_port_write(void *host, uint16_t port, unsigned size_bytes, uint32_t value)
{
    struct machine *machine = ((struct vcpu_thread *)host)->machine;
    pthread_mutex_lock(&machine->device_lock);
    bus_write(machine->bus, BUS_PORT, port, size_bytes, value);
    pthread_mutex_unlock(&machine->device_lock);
}

/* Offset in this processor's APIC page, or -1. */
static int64_t apic_offset(struct vcpu_thread *cpu, gpa_t gpa)
{
    uint64_t base = lapic_mmio_base(cpu->machine->lapics, cpu->index);
    return gpa - base < PAGE_SIZE_BYTES ? (int64_t)(gpa - base) : -1;
}

static uint64_t host_mmio_read(void *host, gpa_t gpa, unsigned size_bytes)
{
    struct vcpu_thread *cpu = host;
    struct machine *machine = cpu->machine;
    int64_t apic = apic_offset(cpu, gpa);
    if (apic >= 0)
        return lapic_mmio_read(machine->lapics, cpu->index, (uint32_t)apic, size_bytes);
    pthread_mutex_lock(&machine->device_lock);
    uint64_t value = bus_read(machine->bus, BUS_MMIO, gpa, size_bytes);
    pthread_mutex_unlock(&machine->device_lock);
    return value;
}

static void host_mmio_write(void *host, gpa_t gpa, unsigned size_bytes, uint64_t value)
{
    struct vcpu_thread *cpu = host;
    struct machine *machine = cpu->machine;
    int64_t apic = apic_offset(cpu, gpa);
    if (apic >= 0) {
        lapic_mmio_write(machine->lapics, cpu->index, (uint32_t)apic, size_bytes, value);
        return;
    }
    pthread_mutex_lock(&machine->device_lock);
    bus_write(machine->bus, BUS_MMIO, gpa, size_bytes, value);
    pthread_mutex_unlock(&machine->device_lock);
}

static int host_msr_read(void *host, uint32_t index, uint64_t *value)
{
    struct vcpu_thread *cpu = host;
    int r = lapic_msr_read(cpu->machine->lapics, cpu->index, index, value);
    return r == -ENOENT ? pvclock_msr_read(&cpu->pvclock, index, value) : r;
}

static int host_msr_write(void *host, uint32_t index, uint64_t value)
{
    struct vcpu_thread *cpu = host;
    struct machine *machine = cpu->machine;
    int r = lapic_msr_write(machine->lapics, cpu->index, index, value);
    if (r != -ENOENT)
        return r;
    uint64_t tsc = inputs_tsc() + cpu->vcpu->cpu.tsc_offset;
    struct pvclock_now now = {.tsc = tsc, .tsc_khz = machine->tsc_khz};
    now.system_ns = (uint64_t)((unsigned __int128)tsc * 1000000 / machine->tsc_khz);
    now.wall_ns = inputs_wall_ns() - now.system_ns;
    return pvclock_msr_write(&cpu->pvclock, machine->memory, index, value, &now);
}

static void apic_eoi(void *ctx, uint8_t vector)
{
    struct machine *machine = ctx;
    pthread_mutex_lock(&machine->device_lock);
    ioapic_eoi(machine->ioapic, vector);
    pthread_mutex_unlock(&machine->device_lock);
}

static int apic_pic_ack(void *ctx)
{
    struct machine *machine = ctx;
    pthread_mutex_lock(&machine->device_lock);
    int vector = pic_ack(machine->pic);
    pthread_mutex_unlock(&machine->device_lock);
    return vector;
}

static int host_interrupt_peek(void *host)
{
    struct vcpu_thread *cpu = host;
    if (cpu->machine->irqchip)
        return atomic_load_explicit(&cpu->machine->extint, memory_order_acquire) ? 0 : -1;
    return lapic_interrupt_peek(cpu->machine->lapics, cpu->index);
}

static int host_interrupt_ack(void *host)
{
    struct vcpu_thread *cpu = host;
    if (cpu->machine->irqchip)
        return atomic_load(&cpu->machine->extint) ? apic_pic_ack(cpu->machine) : -1;
    return lapic_interrupt_ack(cpu->machine->lapics, cpu->index);
}

static bool host_nmi_take(void *host)
{
    struct vcpu_thread *cpu = host;
    return lapic_nmi_take(cpu->machine->lapics, cpu->index);
}

static void host_nmi_return(void *host)
{
    struct vcpu_thread *cpu = host;
    lapic_inject_nmi(cpu->machine->lapics, cpu->index);
}

static uint8_t host_cr8_read(void *host)
{
    struct vcpu_thread *cpu = host;
    return lapic_cr8_read(cpu->machine->lapics, cpu->index);
}

static void host_cr8_write(void *host, uint8_t value)
{
    struct vcpu_thread *cpu = host;
    lapic_cr8_write(cpu->machine->lapics, cpu->index, value);
}

static void host_eoi(void *host, uint8_t vector)
{
    struct vcpu_thread *cpu = host;
    apic_eoi(cpu->machine, vector);
}

static bool host_must_exit(void *host)
{
    struct vcpu_thread *cpu = host;
    return atomic_load(&cpu->requests) != 0;
}

static const struct vcpu_host_ops host_ops = {
    .port_read = host_port_read,
    .port_write = host_port_write,
    .mmio_read = host_mmio_read,
    .mmio_write = host_mmio_write,
    .msr_read = host_msr_read,
    .msr_write = host_msr_write,
    .interrupt_peek = host_interrupt_peek,
    .interrupt_ack = host_interrupt_ack,
    .nmi_take = host_nmi_take,
    .nmi_return = host_nmi_return,
    .cr8_read = host_cr8_read,
    .cr8_write = host_cr8_write,
    .eoi = host_eoi,
    .must_exit = host_must_exit,
};

/* ---- what the local APICs ask of the machine ---- */

static void apic_wake(void *ctx, unsigned cpu)
{
    struct machine *machine = ctx;
    if (machine->vcpu)
        vcpu_thread_wake(&machine->vcpu[cpu]);
}

static void apic_init(void *ctx, unsigned cpu)
{
    struct machine *machine = ctx;
    /* A startup message that came before is lost in the INIT; one that comes after is not. */
    atomic_fetch_and(&machine->vcpu[cpu].requests, ~REQUEST_STARTUP);
    vcpu_thread_request(&machine->vcpu[cpu], REQUEST_INIT);
}

static void apic_startup(void *ctx, unsigned cpu, uint8_t vector)
{
    struct machine *machine = ctx;
    atomic_store(&machine->vcpu[cpu].startup_vector, vector);
    vcpu_thread_request(&machine->vcpu[cpu], REQUEST_STARTUP);
}

static uint64_t apic_tsc_now(void *ctx, unsigned cpu)
{
    struct machine *machine = ctx;
    return inputs_tsc() + machine->vcpu[cpu].vcpu->cpu.tsc_offset;
}

static uint64_t apic_tsc_to_ns(void *ctx, unsigned cpu, uint64_t tsc)
{
    struct machine *machine = ctx;
    uint64_t now = apic_tsc_now(ctx, cpu);
    if (tsc <= now)
        return inputs_now_ns();
    unsigned __int128 delta_ns = (unsigned __int128)(tsc - now) * 1000000 / machine->tsc_khz;
    const uint64_t far = 1ull << 60; /* decades: a deadline beyond is as good as never */
    return inputs_now_ns() + (delta_ns > far ? far : (uint64_t)delta_ns);
}

const struct lapic_ops machine_lapic_ops = {
    .wake = apic_wake,
    .init = apic_init,
    .startup = apic_startup,
    .eoi = apic_eoi,
    .pic_ack = apic_pic_ack,
    .tsc_now = apic_tsc_now,
    .tsc_to_ns = apic_tsc_to_ns,
};

/* ---- waking and requests ---- */

void vcpu_thread_wake(struct vcpu_thread *cpu)
{
    if (cpu->vcpu)
        vcpu_kick(cpu->vcpu);
    pthread_mutex_lock(&cpu->lock);
    atomic_store(&cpu->woken, true);
    pthread_cond_signal(&cpu->wake);
    pthread_mutex_unlock(&cpu->lock);
}

void vcpu_thread_request(struct vcpu_thread *cpu, uint32_t request)
{
    atomic_fetch_or(&cpu->requests, request);
    vcpu_thread_wake(cpu);
}

void vcpu_threads_request(struct machine *machine, uint32_t request)
{
    for (unsigned i = 0; machine->vcpu && i < machine->cpu_count; i++)
        vcpu_thread_request(&machine->vcpu[i], request);
}

/* Sleeps until something happened since the last sleep. */
static void wait_for_wake(struct vcpu_thread *cpu)
{
    if (!patience_look(&cpu->patience, &cpu->woken)) {
        pthread_mutex_lock(&cpu->lock);
        while (!atomic_load(&cpu->woken))
            pthread_cond_wait(&cpu->wake, &cpu->lock);
        pthread_mutex_unlock(&cpu->lock);
        patience_slept(&cpu->patience);
    }
    (void)atomic_exchange(&cpu->woken, false); /* and what its setter did before is seen from here on */
}

enum machine_end machine_wait(struct machine *machine)
{
    pthread_mutex_lock(&machine->run_lock);
    while (machine->end == MACHINE_RUNNING)
        pthread_cond_wait(&machine->run_changed, &machine->run_lock);
    enum machine_end end = machine->end;
    pthread_mutex_unlock(&machine->run_lock);
    vcpu_threads_join(machine);
    return end;
}

/* ---- the threads ---- */

static void take_startup(struct vcpu_thread *cpu)
{
    struct vcpu *vcpu = cpu->vcpu;
    uint32_t requests = atomic_fetch_and(&cpu->requests, ~(REQUEST_INIT | REQUEST_STARTUP));
    if (requests & REQUEST_INIT) {
        lapic_reset(cpu->machine->lapics, cpu->index, true);
        cpu_reset(&vcpu->cpu, CPU_RESET_INIT);
        if (cpu->index != 0)
            vcpu->cpu.activity = CPU_WAIT_FOR_SIPI;
        vcpu->ops->state_changed(vcpu);
    }
    if (requests & REQUEST_STARTUP && vcpu->cpu.activity == CPU_WAIT_FOR_SIPI) {
        cpu_start_at(&vcpu->cpu, atomic_load(&cpu->startup_vector));
        vcpu->cpu.activity = CPU_RUNNING;
        vcpu->ops->state_changed(vcpu);
    }
}

static void guest_died(struct vcpu_thread *cpu)
{
    log_error("the guest died of a triple fault on processor %u at rip 0x%llx (SIGUSR1 or --trace show more)", cpu->index,
              (unsigned long long)cpu->vcpu->cpu.gpr[GPR_RIP]);
    machine_stop(cpu->machine, MACHINE_CRASH);
}

static void run_once(struct vcpu_thread *cpu)
{
    struct vcpu *vcpu = cpu->vcpu;
    bool elsewhere = vcpu->cpu.activity == CPU_WAIT_FOR_SIPI && cpu->machine->irqchip; /* the engine waits for the startup message */
    if (!elsewhere && (vcpu->cpu.activity == CPU_WAIT_FOR_SIPI || vcpu->cpu.activity == CPU_SHUTDOWN)) {
        wait_for_wake(cpu);
        return;
    }
    enum engine_exit why = vcpu->ops->run(vcpu);
    cpu->exits[why]++;
    switch (why) {
    case ENGINE_EXIT_ATTENTION:
        break;
    case ENGINE_EXIT_HALT:
        wait_for_wake(cpu);
        break;
    case ENGINE_EXIT_SHUTDOWN:
        guest_died(cpu);
        break;
    case ENGINE_EXIT_ERROR:
        machine_stop(cpu->machine, MACHINE_ERROR);
        break;
    }
}

/* ---- holding up ---- */

#define THROTTLE_PERIOD_NS 10000000ull

void machine_throttle(struct machine *machine, unsigned percent)
{
    atomic_store(&machine->throttle, percent < THROTTLE_MAX ? percent : THROTTLE_MAX);
    if (percent)
        loop_timer_arm(machine->throttle_timer, loop_now_ns());
}

void machine_throttle_tick(void *ctx)
{
    struct machine *machine = ctx;
    if (!atomic_load(&machine->throttle))
        return;
    vcpu_threads_request(machine, REQUEST_HOLD_UP);
    loop_timer_arm(machine->throttle_timer, loop_now_ns() + THROTTLE_PERIOD_NS);
}

/* A part of the period, or until something else is asked of this thread. */
static void hold_up(struct vcpu_thread *cpu)
{
    uint64_t end_ns = loop_now_ns() + THROTTLE_PERIOD_NS / 100 * atomic_load(&cpu->machine->throttle);
    const struct timespec end = {.tv_sec = (time_t)(end_ns / 1000000000), .tv_nsec = (long)(end_ns % 1000000000)};
    atomic_fetch_and(&cpu->requests, ~REQUEST_HOLD_UP);
    pthread_mutex_lock(&cpu->lock);
    while (!(atomic_load(&cpu->requests) & (REQUEST_STOP | REQUEST_PARK)) && pthread_cond_clockwait(&cpu->wake, &cpu->lock, CLOCK_MONOTONIC, &end) != ETIMEDOUT)
        continue;
    cpu->woken = true; /* something may have happened: whoever sleeps next looks once more */
    pthread_mutex_unlock(&cpu->lock);
}

static void *vcpu_main(void *arg)
{
    struct vcpu_thread *cpu = arg;
    if (!machine_enter_sandbox(cpu->machine, IN_VCPU))
        return NULL;
    for (;;) {
        uint32_t requests = atomic_load(&cpu->requests);
        if (requests & REQUEST_STOP)
            return NULL;
        if (requests & REQUEST_PARK)
            machine_park(cpu);
        else if (requests & REQUEST_HOLD_UP)
            hold_up(cpu);
        else if (requests)
            take_startup(cpu);
        else
            run_once(cpu);
    }
}

int vcpu_threads_create(struct machine *machine, struct error *err)
{
    machine->vcpu = calloc(machine->cpu_count, sizeof *machine->vcpu);
    if (!machine->vcpu)
        return error_set(err, -ENOMEM, "out of memory");
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        struct vcpu_thread *cpu = &machine->vcpu[i];
        cpu->machine = machine;
        cpu->index = i;
        pthread_mutex_init(&cpu->lock, NULL);
        pthread_cond_init(&cpu->wake, NULL);
        patience_init(&cpu->patience);
    }
    for (unsigned i = 0; i < machine->cpu_count; i++) {
        struct vcpu_config config = {.index = i,
                                     .host_ops = &host_ops,
                                     .host = &machine->vcpu[i],
                                     .memory = machine->memory,
                                     .cpuid = machine->cpuid};
        int r = machine->engine_ops->vcpu_create(machine->engine, &config, &machine->vcpu[i].vcpu, err);
        if (r)
            return r;
    }
    return 0;
}

int vcpu_threads_start(struct machine *machine, struct error *err)
{
    int r = 0;
    pthread_mutex_lock(&machine->join_lock);
    for (unsigned i = 0; i < machine->cpu_count && r == 0; i++) {
        char name[16];
        r = pthread_create(&machine->vcpu[i].thread, NULL, vcpu_main, &machine->vcpu[i]);
        if (r) {
            error_set(err, -r, "cannot start a thread for processor %u: %s", i, strerror(r));
            break;
        }
        machine->vcpu[i].started = true;
        snprintf(name, sizeof name, "vcpu%u", i);
        pthread_setname_np(machine->vcpu[i].thread, name);
    }
    pthread_mutex_unlock(&machine->join_lock);
    if (r)
        machine_stop(machine, MACHINE_ERROR);
    return -r;
}

/* The machine has ended: every thread has been asked to stop. Several callers may wait for that. */
void vcpu_threads_join(struct machine *machine)
{
    pthread_mutex_lock(&machine->join_lock);
    for (unsigned i = 0; machine->vcpu && i < machine->cpu_count; i++) {
        if (machine->vcpu[i].started)
            pthread_join(machine->vcpu[i].thread, NULL);
        machine->vcpu[i].started = false;
    }
    pthread_mutex_unlock(&machine->join_lock);
}

void vcpu_threads_destroy(struct machine *machine)
{
    for (unsigned i = 0; machine->vcpu && i < machine->cpu_count; i++) {
        if (machine->vcpu[i].vcpu)
            machine->engine_ops->vcpu_destroy(machine->vcpu[i].vcpu);
        pthread_cond_destroy(&machine->vcpu[i].wake);
        pthread_mutex_destroy(&machine->vcpu[i].lock);
    }
    free(machine->vcpu);
    machine->vcpu = NULL;
}
