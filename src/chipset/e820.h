/*
 * The map of physical memory that a guest gets at boot, as firmware's INT 15h AX=E820h would tell it (ACPI 6.4, 15.1).
 * The same numbers serve Linux's zero page and PVH. Pure.
 */
#ifndef DOPPEL_CHIPSET_E820_H
#define DOPPEL_CHIPSET_E820_H

#include <stdint.h>

#include "memory/memory.h"

enum e820_type { E820_RAM = 1, E820_RESERVED = 2, E820_ACPI_DATA = 3, E820_ACPI_NVS = 4 };

struct e820_entry {
    uint64_t base, length_bytes;
    uint32_t type;
};

#define E820_MAX 16
#define E820_LOW_RAM_END 0x9FC00ull /* the EBDA starts here */

/* Fills entries in ascending order; returns how many. */
unsigned e820_build(const struct physmap *memory, struct e820_entry entries[E820_MAX]);

#endif
