/*
 * The memory map at boot. Invariants: entries ascend and do not overlap. Threading: none.
 */
#include "chipset/e820.h"

#include "chipset/acpi.h"
#include "chipset/chipset.h"

#define LOW_MEMORY_END 0x100000ull

static unsigned add(struct e820_entry entries[E820_MAX], unsigned count, uint64_t base, uint64_t end, enum e820_type type)
{
    if (end <= base || count == E820_MAX)
        return count;
    entries[count] = (struct e820_entry){base, end - base, type};
    return count + 1;
}

unsigned e820_build(const struct physmap *memory, struct e820_entry entries[E820_MAX])
{
    uint64_t nvs = ACPI_TABLES_BASE + ACPI_TABLES_BYTES - PAGE_SIZE_BYTES; /* FACS, see acpi.c */
    uint64_t low = physmap_low_bytes(memory), high = physmap_high_bytes(memory);
    unsigned count = 0;

    count = add(entries, count, 0, low < E820_LOW_RAM_END ? low : E820_LOW_RAM_END, E820_RAM);
    count = add(entries, count, E820_LOW_RAM_END, ACPI_TABLES_BASE, E820_RESERVED);
    count = add(entries, count, ACPI_TABLES_BASE, nvs, E820_ACPI_DATA);
    count = add(entries, count, nvs, ACPI_TABLES_BASE + ACPI_TABLES_BYTES, E820_ACPI_NVS);
    count = add(entries, count, ACPI_TABLES_BASE + ACPI_TABLES_BYTES, LOW_MEMORY_END, E820_RESERVED); /* where PCs have their BIOS */
    count = add(entries, count, LOW_MEMORY_END, low, E820_RAM);
    count = add(entries, count, CHIPSET_ECAM_BASE, CHIPSET_ECAM_BASE + CHIPSET_ECAM_BYTES, E820_RESERVED);
    return add(entries, count, PHYSMAP_HIGH_BASE, PHYSMAP_HIGH_BASE + high, E820_RAM);
}
