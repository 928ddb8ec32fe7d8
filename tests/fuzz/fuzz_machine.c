/*
 * A whole machine against a guest that writes garbage into every register: the input is a list of 16-byte operations on ports, memory-mapped
 * regions, RAM, local APIC MSRs and the console. One thread does it all, so the device lock is not taken. Nothing may crash or hang, and saved state must load.
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

struct operation {
    uint8_t kind, size_log2, region, pad;
    uint32_t offset;
    uint64_t value;
};

static void set(struct machine_config *config, const char *key, const char *value)
{
    struct error err = {0};
    if (machine_config_set(config, key, value, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
}

static struct machine *make_machine(void)
{
    static struct machine_config config;
    struct machine *machine = NULL;
    struct error err = {0};
    char kernel[64], disk[64];
    snprintf(kernel, sizeof kernel, "/tmp/doppel-fuzz-%d.elf", (int)getpid());
    snprintf(disk, sizeof disk, "/tmp/doppel-fuzz-%d.img", (int)getpid());
    pvh_kernel_write(kernel, "\xf4", 1); /* HLT */
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
    set(&config, "on-panic", "ignore");
    if (machine_create(&machine, &config, &err)) {
        fprintf(stderr, "%s\n", err.text);
        abort();
    }
    unlink(disk); /* the kernel file is read again at each reset */
    return machine;
}

static uint64_t region_base(uint8_t index)
{
    static const uint64_t fixed[] = {CHIPSET_IOAPIC_BASE, CHIPSET_HPET_BASE, 0xFEB00000, 0xFFFFF000, CHIPSET_PCI_MEM64_BASE, 0x10000000};
    if (index < 128) /* BARs as assigned at reset */
        return CHIPSET_PCI_MEM32_BASE + (uint64_t)index * 0x1000;
    if (index < 160) /* configuration space of each slot */
        return CHIPSET_ECAM_BASE + ((uint64_t)(index - 128) << 15);
    return fixed[index % (sizeof fixed / sizeof *fixed)];
}

static void round_trip(struct machine *machine)
{
    struct state_io *writer = state_writer_create();
    size_t size;
    if (!machine_quiesce(machine) || machine_state(machine, writer)) {
        state_io_destroy(writer);
        return;
    }
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    if (machine_state(machine, reader)) {
        fprintf(stderr, "state that was saved does not load: %s\n", state_error(reader));
        abort();
    }
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void operate(struct machine *machine, const struct operation *op)
{
    unsigned size = 1u << (op->size_log2 & 3), port_size = size == 8 ? 4 : size;
    uint64_t address = region_base(op->region) + (op->offset & 0xfff);
    uint64_t value = op->value;
    void *ram;
    switch (op->kind % 16) {
    case 0:
    case 1:
        bus_write(machine->bus, BUS_PORT, (uint16_t)op->offset, port_size, (uint32_t)value);
        break;
    case 2:
        bus_read(machine->bus, BUS_PORT, (uint16_t)op->offset, port_size);
        break;
    case 3:
    case 4:
    case 5:
        bus_write(machine->bus, BUS_MMIO, address, size, value);
        break;
    case 6:
        bus_read(machine->bus, BUS_MMIO, address, size);
        break;
    case 7:
    case 8:
        ram = physmap_get(machine->memory, op->offset & 0xffffff, 8, PHYSMAP_WRITE);
        if (ram)
            memcpy(ram, &value, 8);
        break;
    case 9:
        (void)!lapic_msr_write(machine->lapics, op->region & 1, 0x800 + (op->offset & 0xff), value);
        break;
    case 10:
        lapic_mmio_write(machine->lapics, op->region & 1, op->offset & 0xfff, size, value);
        break;
    case 11:
        lapic_mmio_read(machine->lapics, op->region & 1, op->offset & 0xfff, size);
        lapic_msr_read(machine->lapics, op->region & 1, 0x1b + (op->offset & 0xfff), &value);
        break;
    case 12:
        lapic_interrupt_ack(machine->lapics, op->region & 1);
        lapic_cr8_write(machine->lapics, op->region & 1, value & 15);
        break;
    case 13:
        uart_receive(machine->com1, (const uint8_t *)&value, op->offset % 9);
        break;
    case 14:
        loop_run_once(machine->loop, 0);
        break;
    case 15:
        if (op->region < 16)
            round_trip(machine);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct machine *machine; /* a fuzz target's only way to keep what is costly to make */
    struct error err = {0};
    if (!machine)
        machine = make_machine();
    while (!machine_quiesce(machine))
        loop_run_once(machine->loop, -1);
    if (machine_power_on(machine, NULL, &err))
        abort();
    for (size_t at = 0; at + sizeof(struct operation) <= size; at += sizeof(struct operation)) {
        struct operation op;
        memcpy(&op, data + at, sizeof op);
        operate(machine, &op);
    }
    loop_run_once(machine->loop, 0);
    return 0;
}
