/*
 * The boot timer: a guest's init that knows of it writes 123 to the first byte of the memory-mapped devices' window, and the log says how long the boot took. Only with
 * option boot_timer, in machines without PCI (whose BARs are there). Keeps no state: a restored guest has booted. Threading: with the device lock held.
 */
#include <time.h>

#include "machine/machine_priv.h"
#include "util/log.h"

#define BOOT_TIMER_ADDRESS CHIPSET_PCI_MEM32_BASE
#define BOOT_TIMER_DONE 123

static uint64_t clock_us(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

static uint64_t timer_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    return 0;
}

static void timer_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    const struct machine *machine = ctx;
    uint64_t wall = clock_us(CLOCK_MONOTONIC) - machine->started_us, cpu = clock_us(CLOCK_PROCESS_CPUTIME_ID) - machine->started_cpu_us;
    if (value == BOOT_TIMER_DONE)
        LOG_GUEST(LOG_INFO, "Guest-boot-time = %6llu us %llu ms, %6llu CPU us %llu CPU ms", (unsigned long long)wall, (unsigned long long)wall / 1000,
                  (unsigned long long)cpu, (unsigned long long)cpu / 1000);
}

static const struct region_ops timer_ops = {"boot-timer", timer_read, timer_write, 1, 1};

int machine_add_boot_timer(struct machine *machine)
{
    machine->started_us = clock_us(CLOCK_MONOTONIC);
    machine->started_cpu_us = clock_us(CLOCK_PROCESS_CPUTIME_ID);
    if (!machine->config->boot_timer || machine->config->transport != TRANSPORT_MMIO)
        return 0;
    return bus_add(machine->bus, BUS_MMIO, BOOT_TIMER_ADDRESS, PAGE_SIZE_BYTES, &timer_ops, machine);
}
