/*
 * Builds the ACPI tables (6.4) that describe the machine, into guest RAM in 0xE0000..0xEFFFF: RSDP first, at ACPI_TABLES_BASE, then XSDT, FADT,
 * FACS, DSDT, MADT, MCFG, HPET. Stateless. Call it before boot_load, at start and again at each reset. Threading: no vCPU runs.
 */
#ifndef DOPPEL_CHIPSET_ACPI_H
#define DOPPEL_CHIPSET_ACPI_H

#include <stdbool.h>
#include <stdint.h>

#include "chipset/chipset.h"
#include "chipset/vmgenid.h"
#include "memory/memory.h"
#include "util/error.h"

#define ACPI_TABLES_BASE 0xE0000ull
#define ACPI_TABLES_BYTES 0x10000ull
/* In the FACS's page, which is memory that no OS uses and that is cached as any other. */
#define ACPI_GENERATION_ID (ACPI_TABLES_BASE + ACPI_TABLES_BYTES - 0x800)

/* A memory-mapped virtio device: a page of registers, an IOAPIC pin (level, high, may be shared). */
struct acpi_virtio {
    uint32_t address, gsi;
};

struct acpi_config {
    unsigned cpu_count; /* 1..255; processor n has local APIC id n */
    bool hpet;          /* an HPET is at CHIPSET_HPET_BASE */
    bool com1, com2;
    bool pvpanic;
    bool no_i8042;      /* no keyboard controller: clears the 8042 flag and leaves the keyboard out of the DSDT */
    uint32_t hotplug;   /* slots of the PCI bus that functions may be plugged into and taken out of, see pci_hotplug.h */
    bool no_pci;        /* no host bridge and no ECAM */
    struct acpi_virtio virtio[CHIPSET_VIRTIO_MMIO_PLACES];
    unsigned virtio_count;
    const struct vmgenid_guid *generation; /* what is at ACPI_GENERATION_ID; NULL: no such device */
};

/* *rsdp: where the RSDP is, for boot_config. */
int acpi_build(struct physmap *memory, const struct acpi_config *config, gpa_t *rsdp, struct error *err)
    __attribute__((warn_unused_result));

#endif
