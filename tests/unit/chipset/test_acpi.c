/* ACPI tables and the memory map: signatures, checksums, links, AML lengths, regions. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/acpi.h"
#include "chipset/chipset.h"
#include "chipset/e820.h"

static uint8_t *at(struct physmap *memory, uint64_t address, uint64_t length)
{
    uint8_t *bytes = physmap_get(memory, address, length, PHYSMAP_READ);

    assert_non_null(bytes);
    return bytes;
}

static uint64_t get(const uint8_t *bytes, unsigned size)
{
    uint64_t value = 0;

    memcpy(&value, bytes, size);
    return value;
}

static uint8_t sum(const uint8_t *bytes, size_t size)
{
    uint8_t total = 0;

    while (size--)
        total += *bytes++;
    return total;
}

/* Checks the header and returns the table. */
static uint8_t *table(struct physmap *memory, uint64_t address, const char *signature, uint32_t *length)
{
    uint8_t *bytes = at(memory, address, 36);

    assert_memory_equal(bytes, signature, 4);
    *length = (uint32_t)get(bytes + 4, 4);
    assert_true(address % 16 == 0 && *length >= 36 && address + *length <= ACPI_TABLES_BASE + ACPI_TABLES_BYTES);
    assert_int_equal(sum(at(memory, address, *length), *length), 0);
    return bytes;
}

/* Walks AML objects of the kinds that the writer knows, checking that packages nest. Returns how many devices it saw. */
static unsigned count_devices(const uint8_t *aml, size_t size)
{
    unsigned devices = 0;

    for (size_t i = 0; i + 6 < size; i++) {
        if (aml[i] == 0x5B && aml[i + 1] == 0x82) {
            unsigned extra = aml[i + 2] >> 6;
            size_t length = extra ? aml[i + 2] & 0xF : aml[i + 2] & 0x3F;

            for (unsigned k = 0; k < extra; k++)
                length |= (size_t)aml[i + 3 + k] << (4 + 8 * k);
            assert_true(length > extra + 4u && i + 2 + length <= size);
            devices++;
        }
    }
    return devices;
}

static void check_tables(const struct acpi_config *config, unsigned devices)
{
    static const char *const expected[] = {"FACP", "APIC", "MCFG", "HPET"};
    struct physmap *memory;
    uint32_t length, dsdt_length;
    uint8_t *rsdp, *xsdt, *fadt;
    gpa_t where;

    assert_int_equal(physmap_create(&memory, 4 << 20, NULL), 0);
    assert_int_equal(acpi_build(memory, config, &where, NULL), 0);
    assert_true(where % 16 == 0 && where >= 0xE0000 && where < 0x100000);
    rsdp = at(memory, where, 36);
    assert_memory_equal(rsdp, "RSD PTR ", 8);
    assert_int_equal(sum(rsdp, 20), 0);
    assert_int_equal(sum(rsdp, 36), 0);
    xsdt = table(memory, get(rsdp + 24, 8), "XSDT", &length);
    assert_int_equal(length, 36 + 8 * (config->hpet + !config->no_pci + 2));
    for (unsigned i = 0, kind = 0; i < (length - 36) / 8; i++, kind++) {
        uint32_t ignored;

        kind += kind == 2 && config->no_pci;
        table(memory, get(xsdt + 36 + i * 8, 8), expected[kind], &ignored);
    }
    fadt = table(memory, get(xsdt + 36, 8), "FACP", &length);
    assert_int_equal(length, 276);
    assert_int_equal(get(fadt + 46, 2), CHIPSET_SCI_IRQ);
    assert_int_equal(get(fadt + 56, 4), CHIPSET_PM_EVENT_PORT);
    assert_int_equal(get(fadt + 116 + 4, 8), CHIPSET_RESET_PORT);
    assert_int_equal(fadt[128], 6);
    assert_memory_equal(at(memory, get(fadt + 36, 4), 64), "FACS", 4);
    assert_true(get(fadt + 36, 4) % 64 == 0);
    assert_true(get(fadt + 40, 4) == get(fadt + 140, 8));
    table(memory, get(fadt + 40, 4), "DSDT", &dsdt_length);
    assert_int_equal(count_devices(at(memory, get(fadt + 40, 4), dsdt_length) + 36, dsdt_length - 36), devices + config->cpu_count);
    physmap_destroy(memory);
}

static void test_tables(void **state)
{
    check_tables(&(struct acpi_config){.cpu_count = 1, .no_i8042 = true}, 5);
    check_tables(&(struct acpi_config){.cpu_count = 4, .hpet = true, .com1 = true, .com2 = true, .pvpanic = true}, 10);
    check_tables(&(struct acpi_config){.cpu_count = 255, .com1 = true}, 7);
    check_tables(&(struct acpi_config){.cpu_count = 1, .no_i8042 = true, .generation = &(struct vmgenid_guid){{1}}}, 6);
}

static void test_virtio(void **state)
{
    struct acpi_config config = {.cpu_count = 2, .hpet = true, .no_pci = true, .no_i8042 = true, .virtio_count = CHIPSET_VIRTIO_MMIO_PLACES};

    for (unsigned i = 0; i < config.virtio_count; i++)
        config.virtio[i] = (struct acpi_virtio){(uint32_t)CHIPSET_VIRTIO_MMIO_BASE + i * 0x1000, 5 + i % 11};
    check_tables(&config, 5 + config.virtio_count);
}

static void test_madt(void **state)
{
    struct acpi_config config = {.cpu_count = 3};
    struct physmap *memory;
    unsigned lapics = 0, overrides = 0;
    uint32_t length;
    uint8_t *madt;
    gpa_t rsdp;

    assert_int_equal(physmap_create(&memory, 4 << 20, NULL), 0);
    assert_int_equal(acpi_build(memory, &config, &rsdp, NULL), 0);
    madt = table(memory, get(at(memory, get(at(memory, rsdp, 36) + 24, 8), 64) + 44, 8), "APIC", &length);
    for (uint32_t i = 44; i < length; i += madt[i + 1]) {
        assert_true(madt[i + 1] >= 2 && i + madt[i + 1] <= length);
        if (madt[i] == 0)
            assert_int_equal(madt[i + 3], lapics++);
        if (madt[i] == 1)
            assert_int_equal(get(madt + i + 4, 4), CHIPSET_IOAPIC_BASE);
        if (madt[i] == 2)
            overrides++;
    }
    assert_int_equal(lapics, 3);
    assert_int_equal(overrides, 2);
    physmap_destroy(memory);
}

static void test_bad_config(void **state)
{
    struct acpi_config config = {.cpu_count = 256};
    struct physmap *memory;
    struct error err = {0};
    gpa_t rsdp;

    assert_int_equal(physmap_create(&memory, 4 << 20, NULL), 0);
    assert_int_equal(acpi_build(memory, &config, &rsdp, &err), -EINVAL);
    assert_non_null(strstr(err.text, "256"));
    physmap_destroy(memory);
}

static void test_memory_map(void **state)
{
    struct physmap *memory;
    struct e820_entry entries[E820_MAX];
    uint64_t sizes[] = {2ull << 20, 512ull << 20, 5ull << 30};

    for (unsigned s = 0; s < 3; s++) {
        uint64_t ram = 0, end = 0;
        unsigned count;

        assert_int_equal(physmap_create(&memory, sizes[s], NULL), 0);
        count = e820_build(memory, entries);
        for (unsigned i = 0; i < count; i++) {
            assert_true(entries[i].base >= end);
            end = entries[i].base + entries[i].length_bytes;
            if (entries[i].type == E820_RAM)
                ram += entries[i].length_bytes;
            if (entries[i].base <= ACPI_TABLES_BASE && end > ACPI_TABLES_BASE)
                assert_int_equal(entries[i].type, E820_ACPI_DATA);
        }
        assert_true(ram == sizes[s] - (0x100000 - E820_LOW_RAM_END));
        physmap_destroy(memory);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),
        cmocka_unit_test(test_virtio),
        cmocka_unit_test(test_madt),
        cmocka_unit_test(test_bad_config),
        cmocka_unit_test(test_memory_map),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
