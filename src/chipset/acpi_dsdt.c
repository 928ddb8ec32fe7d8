/*
 * The DSDT: what an OS cannot find out by itself. The PCI host bridge with its windows and interrupt routing, the ISA devices, the processors and the
 * sleep state for power-off. Addresses come from chipset.h. Threading: none.
 */
#include <stdio.h>

#include "chipset/acpi_priv.h"
#include "chipset/chipset.h"
#include "chipset/pci.h"
#include "chipset/pvpanic.h"
#include "chipset/uart.h"

/* Devices at fixed ports. */
struct isa_device {
    char name[5];
    const char *id; /* "PNPxxxx": an EISA id; anything else is written as a string */
    uint8_t unique;
    struct {
        uint16_t port;
        uint8_t length_bytes;
    } io[2];
    int irq;
    bool (*present)(const struct acpi_config *config); /* NULL: always */
};

static bool has_com1(const struct acpi_config *config)
{
    return config->com1;
}

static bool has_com2(const struct acpi_config *config)
{
    return config->com2;
}

static bool has_keyboard(const struct acpi_config *config)
{
    return !config->no_i8042;
}

static bool has_pvpanic(const struct acpi_config *config)
{
    return config->pvpanic;
}

static const struct isa_device isa_devices[] = {
    {"PIC", "PNP0000", 0, {{0x20, 2}, {0xA0, 2}}, -1, NULL},
    {"TIMR", "PNP0100", 0, {{0x40, 4}}, CHIPSET_IRQ_PIT, NULL},
    {"RTC", "PNP0B00", 0, {{0x70, 2}}, CHIPSET_IRQ_RTC, NULL},
    {"PS2K", "PNP0303", 0, {{0x60, 1}, {0x64, 1}}, CHIPSET_IRQ_KEYBOARD, has_keyboard},
    {"COM1", "PNP0501", 1, {{UART_COM1_PORT, 8}}, CHIPSET_IRQ_COM1, has_com1},
    {"COM2", "PNP0501", 2, {{UART_COM2_PORT, 8}}, CHIPSET_IRQ_COM2, has_com2},
    {"PEVT", "QEMU0001", 0, {{PVPANIC_PORT, 1}}, -1, has_pvpanic},
};

static void write_isa_device(struct aml *aml, const struct isa_device *device)
{
    aml_device(aml, device->name);
    aml_name(aml, "_HID");
    if (device->id[0] == 'P')
        aml_eisa_id(aml, device->id);
    else
        aml_string(aml, device->id);
    aml_name(aml, "_UID");
    aml_integer(aml, device->unique);
    aml_name(aml, "_STA");
    aml_integer(aml, 0x0F); /* present, enabled, shown, working */
    aml_resources(aml);
    for (unsigned i = 0; i < 2 && device->io[i].length_bytes; i++)
        aml_io(aml, device->io[i].port, device->io[i].length_bytes);
    if (device->irq >= 0)
        aml_irq(aml, (unsigned)device->irq);
    aml_resources_end(aml);
    aml_close(aml);
}

/* INTA..INTD of slot s go to GSI 16 + (s + pin) % 4, as pci.c wires them (_PRT, 6.2.13). */
static void write_routing(struct aml *aml)
{
    aml_name(aml, "_PRT");
    aml_package(aml, PCI_SLOTS * 4);
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
        for (unsigned pin = 0; pin < 4; pin++) {
            aml_package(aml, 4);
            aml_integer(aml, (uint64_t)slot << 16 | 0xFFFF); /* every function */
            aml_integer(aml, pin);
            aml_integer(aml, 0); /* a global interrupt, not a link device */
            aml_integer(aml, CHIPSET_GSI_PCI + (slot + pin) % 4);
            aml_close(aml);
        }
    }
    aml_close(aml);
}

static const char *slot_name(char name[16], const char *prefix, unsigned slot)
{
    snprintf(name, 16, "%sS%02u", prefix, slot);
    return name;
}

/* One device for each slot that can be plugged: _EJ0 tells the controller that the OS has let go (6.3.3). Registers: pci_hotplug.h. */
static void write_hotplug_slots(struct aml *aml, uint32_t slots)
{
    static const char *const registers[] = {"PCIU", "PCID", "PCIE"};
    char name[16];

    aml_port_region(aml, "PCHP", CHIPSET_HOTPLUG_PORT, CHIPSET_HOTPLUG_BYTES);
    aml_fields(aml, "PCHP", registers, 3);
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
        if (!(slots >> slot & 1))
            continue;
        aml_device(aml, slot_name(name, "", slot));
        aml_name(aml, "_ADR");
        aml_integer(aml, (uint64_t)slot << 16);
        aml_name(aml, "_SUN");
        aml_integer(aml, slot);
        aml_method(aml, "_EJ0", 1);
        aml_store(aml);
        aml_integer(aml, 1ull << slot);
        aml_reference(aml, "PCIE");
        aml_close(aml);
        aml_close(aml);
    }
}

/* Takes the bits of one register and notifies the slots they stand for (5.6.6): 1, look at the bus again; 3, the device shall go. */
static void write_notifications(struct aml *aml, uint32_t slots, const char *field, uint8_t value)
{
    char name[16];

    aml_store(aml);
    aml_reference(aml, field);
    aml_byte(aml, AML_LOCAL0);
    aml_store(aml);
    aml_byte(aml, AML_LOCAL0);
    aml_reference(aml, field);
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
        if (!(slots >> slot & 1))
            continue;
        aml_if(aml);
        aml_and(aml, AML_LOCAL0, 1ull << slot);
        aml_notify(aml, slot_name(name, "\\_SB.PCI0.", slot), value);
        aml_close(aml);
    }
}

static void write_hotplug_event(struct aml *aml, uint32_t slots)
{
    aml_scope(aml, "\\_GPE");
    aml_method(aml, "_E01", 0); /* CHIPSET_GPE_HOTPLUG */
    write_notifications(aml, slots, "\\_SB.PCI0.PCIU", 1);
    write_notifications(aml, slots, "\\_SB.PCI0.PCID", 3);
    aml_close(aml);
    aml_close(aml);
}

/* Microsoft's "Virtual Machine Generation ID": ADDR tells where it is, in two halves. The shorter name is what drivers with nine characters look for. */
static void write_generation_id(struct aml *aml)
{
    aml_device(aml, "VGEN");
    aml_name(aml, "_HID");
    aml_string(aml, "DPPL0001");
    aml_name(aml, "_CID");
    aml_package(aml, 2);
    aml_string(aml, "VM_Gen_Counter");
    aml_string(aml, "VMGENCTR");
    aml_close(aml);
    aml_name(aml, "_DDN");
    aml_string(aml, "VM_Gen_Counter");
    aml_name(aml, "_UID");
    aml_integer(aml, 0);
    aml_name(aml, "ADDR");
    aml_package(aml, 2);
    aml_integer(aml, ACPI_GENERATION_ID & 0xFFFFFFFF);
    aml_integer(aml, ACPI_GENERATION_ID >> 32);
    aml_close(aml);
    aml_close(aml);
}

static void write_generation_event(struct aml *aml)
{
    aml_scope(aml, "\\_GPE");
    aml_method(aml, "_E02", 0); /* CHIPSET_GPE_GENERATION */
    aml_notify(aml, "\\_SB.VGEN", 0x80);
    aml_close(aml);
    aml_close(aml);
}

static void write_pci(struct aml *aml, uint32_t hotplug)
{
    aml_device(aml, "PCI0");
    aml_name(aml, "_HID");
    aml_eisa_id(aml, "PNP0A08");
    aml_name(aml, "_CID");
    aml_eisa_id(aml, "PNP0A03");
    aml_name(aml, "_UID");
    aml_integer(aml, 0);
    aml_name(aml, "_SEG");
    aml_integer(aml, 0);
    aml_name(aml, "_BBN");
    aml_integer(aml, 0);
    aml_resources(aml);
    aml_bus_window(aml, 0, 0xFF);
    aml_io(aml, 0xCF8, 8);
    aml_io_window(aml, CHIPSET_PCI_PORT_BASE, CHIPSET_PCI_PORT_BASE + CHIPSET_PCI_PORT_BYTES - 1);
    aml_memory_window(aml, CHIPSET_PCI_MEM32_BASE, CHIPSET_PCI_MEM32_BYTES);
    aml_memory_window(aml, CHIPSET_PCI_MEM64_BASE, CHIPSET_PCI_MEM64_BYTES);
    aml_resources_end(aml);
    write_routing(aml);
    if (hotplug)
        write_hotplug_slots(aml, hotplug);
    aml_close(aml);
}

/* The id that drivers of memory-mapped virtio devices look for. */
static void write_virtio(struct aml *aml, const struct acpi_config *config)
{
    for (unsigned i = 0; i < config->virtio_count; i++) {
        char name[5];

        snprintf(name, sizeof(name), "V%03X", i & 0xFFF);
        aml_device(aml, name);
        aml_name(aml, "_HID");
        aml_string(aml, "LNRO0005");
        aml_name(aml, "_UID");
        aml_integer(aml, i);
        aml_resources(aml);
        aml_memory32_fixed(aml, config->virtio[i].address, PAGE_SIZE_BYTES);
        aml_gsi(aml, config->virtio[i].gsi);
        aml_resources_end(aml);
        aml_close(aml);
    }
}

/* Addresses that are taken and belong to no device an OS would drive. */
static void write_motherboard(struct aml *aml, const struct acpi_config *config)
{
    aml_device(aml, "MBRD");
    aml_name(aml, "_HID");
    aml_eisa_id(aml, "PNP0C02");
    aml_name(aml, "_UID");
    aml_integer(aml, 0);
    aml_resources(aml);
    aml_io(aml, CHIPSET_PM_EVENT_PORT, CHIPSET_PM_TIMER_PORT + 4 - CHIPSET_PM_EVENT_PORT);
    aml_io(aml, CHIPSET_GPE_PORT, CHIPSET_GPE_BYTES);
    aml_io(aml, CHIPSET_HOTPLUG_PORT, CHIPSET_HOTPLUG_BYTES);
    if (!config->no_pci)
        aml_memory32_fixed(aml, CHIPSET_ECAM_BASE, CHIPSET_ECAM_BYTES);
    aml_resources_end(aml);
    aml_close(aml);
}

static void write_hpet(struct aml *aml)
{
    aml_device(aml, "HPET");
    aml_name(aml, "_HID");
    aml_eisa_id(aml, "PNP0103");
    aml_name(aml, "_UID");
    aml_integer(aml, 0);
    aml_resources(aml);
    aml_memory32_fixed(aml, CHIPSET_HPET_BASE, 0x400);
    aml_resources_end(aml);
    aml_close(aml);
}

static void write_processors(struct aml *aml, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        char name[5];

        snprintf(name, sizeof(name), "C%03X", i & 0xFFF);
        aml_device(aml, name);
        aml_name(aml, "_HID");
        aml_string(aml, "ACPI0007");
        aml_name(aml, "_UID"); /* ties it to the MADT's entry */
        aml_integer(aml, i);
        aml_close(aml);
    }
}

void acpi_write_dsdt(struct aml *aml, const struct acpi_config *config)
{
    aml_scope(aml, "\\_SB");
    if (!config->no_pci)
        write_pci(aml, config->hotplug);
    write_motherboard(aml, config);
    write_virtio(aml, config);
    for (unsigned i = 0; i < sizeof(isa_devices) / sizeof(isa_devices[0]); i++) {
        if (!isa_devices[i].present || isa_devices[i].present(config))
            write_isa_device(aml, &isa_devices[i]);
    }
    if (config->hpet)
        write_hpet(aml);
    if (config->generation)
        write_generation_id(aml);
    write_processors(aml, config->cpu_count);
    aml_close(aml);

    if (config->hotplug && !config->no_pci)
        write_hotplug_event(aml, config->hotplug);
    if (config->generation)
        write_generation_event(aml);

    aml_name(aml, "\\_S5");
    aml_package(aml, 4);
    aml_integer(aml, CHIPSET_SLEEP_TYPE_S5);
    aml_integer(aml, CHIPSET_SLEEP_TYPE_S5);
    aml_integer(aml, 0);
    aml_integer(aml, 0);
    aml_close(aml);
}
