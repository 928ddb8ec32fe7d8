/*
 * The static ACPI tables (ACPI 6.4, 5.2), put into one image and copied to guest RAM.
 *
 * Invariants: the image is a copy of [ACPI_TABLES_BASE, +ACPI_TABLES_BYTES); RSDP at its start, tables after it at multiples of 16, FACS in
 * the last page, which the memory map calls NVS. Every checksum is put in when its table is complete. Threading: none.
 */
#include "chipset/acpi.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "chipset/acpi_priv.h"
#include "chipset/chipset.h"

#define FACS_OFFSET (ACPI_TABLES_BYTES - PAGE_SIZE_BYTES)

struct __attribute__((packed)) sdt_header {
    char signature[4];
    uint32_t length_bytes;
    uint8_t revision, checksum;
    char oem_id[6], oem_table_id[8];
    uint32_t oem_revision;
    char creator_id[4];
    uint32_t creator_revision;
};

struct __attribute__((packed)) rsdp {
    char signature[8];
    uint8_t checksum;
    char oem_id[6];
    uint8_t revision;
    uint32_t rsdt;
    uint32_t length_bytes;
    uint64_t xsdt;
    uint8_t extended_checksum, reserved[3];
};

struct __attribute__((packed)) generic_address {
    uint8_t space, bit_width, bit_offset, access_size;
    uint64_t address;
};

/* 5.2.9. Fields that stay zero are named together. */
struct __attribute__((packed)) fadt {
    uint32_t firmware_control, dsdt;
    uint8_t reserved0, preferred_profile;
    uint16_t sci_interrupt;
    uint32_t smi_command;
    uint8_t acpi_enable, acpi_disable, s4bios_request, pstate_control;
    uint32_t pm1a_event, pm1b_event, pm1a_control, pm1b_control, pm2_control, pm_timer, gpe0, gpe1;
    uint8_t pm1_event_length, pm1_control_length, pm2_control_length, pm_timer_length;
    uint8_t gpe0_length, gpe1_length, gpe1_base, cst_control;
    uint16_t c2_latency, c3_latency, flush_size, flush_stride;
    uint8_t duty_offset, duty_width, day_alarm, month_alarm, century;
    uint16_t boot_architecture;
    uint8_t reserved1;
    uint32_t flags;
    struct generic_address reset_register;
    uint8_t reset_value;
    uint16_t arm_boot_architecture;
    uint8_t minor_version;
    uint64_t x_firmware_control, x_dsdt;
    struct generic_address x_pm1a_event, x_pm1b_event, x_pm1a_control, x_pm1b_control, x_pm2_control, x_pm_timer, x_gpe0, x_gpe1;
    struct generic_address sleep_control, sleep_status;
    char hypervisor_vendor[8];
};
_Static_assert(sizeof(struct sdt_header) + sizeof(struct fadt) == 276, "FADT of ACPI 6");

#define BOOT_LEGACY_DEVICES 0x01u
#define BOOT_8042 0x02u
#define BOOT_NO_VGA 0x04u

#define FADT_WBINVD (1u << 0)
#define FADT_PROC_C1 (1u << 2)
#define FADT_SLP_BUTTON (1u << 5) /* set: no fixed sleep button. PWR_BUTTON stays clear: there is a fixed power button */
#define FADT_FIX_RTC (1u << 6)    /* set: RTC wake status is not in PM1 */
#define FADT_TMR_VAL_EXT (1u << 8)
#define FADT_RESET_REG_SUP (1u << 10)

#define CMOS_CENTURY 0x32
#define RESET_VALUE 6

struct __attribute__((packed)) facs {
    char signature[4];
    uint32_t length_bytes, hardware_signature, waking_vector, global_lock, flags;
    uint64_t x_waking_vector;
    uint8_t version, reserved[31];
};
_Static_assert(sizeof(struct facs) == 64, "FACS");

/* 5.2.12, MADT structures by type. */
struct __attribute__((packed)) madt_lapic {
    uint8_t type, length_bytes, processor_uid, apic_id;
    uint32_t flags;
};
struct __attribute__((packed)) madt_ioapic {
    uint8_t type, length_bytes, id, reserved;
    uint32_t address, gsi_base;
};
struct __attribute__((packed)) madt_override {
    uint8_t type, length_bytes, bus, source;
    uint32_t gsi;
    uint16_t flags;
};
struct __attribute__((packed)) madt_lapic_nmi {
    uint8_t type, length_bytes, processor_uid;
    uint16_t flags;
    uint8_t lint;
};
#define MADT_ACTIVE_HIGH 0x1u
#define MADT_LEVEL 0xCu
#define MADT_PCAT_COMPAT 1u

struct __attribute__((packed)) mcfg_allocation {
    uint64_t base;
    uint16_t segment;
    uint8_t bus_first, bus_last;
    uint32_t reserved;
};

struct __attribute__((packed)) hpet_table {
    uint32_t id;
    struct generic_address base;
    uint8_t number;
    uint16_t minimum_tick;
    uint8_t protection;
};

/* The image under construction: an AML writer serves for all tables. */
struct builder {
    struct aml out;
    const struct acpi_config *config;
    size_t table; /* where the open table starts */
    uint64_t xsdt_entries[8];
    unsigned xsdt_count;
    uint64_t dsdt;
};

static uint8_t checksum(const uint8_t *bytes, size_t size_bytes)
{
    uint8_t sum = 0;

    for (size_t i = 0; i < size_bytes; i++)
        sum += bytes[i];
    return (uint8_t)-sum;
}

static uint64_t table_begin(struct builder *builder, const char signature[4], uint8_t revision)
{
    struct sdt_header header = {
        .revision = revision,
        .oem_id = {'D', 'O', 'P', 'P', 'E', 'L'},
        .oem_table_id = {'D', 'O', 'P', 'P', 'E', 'L', ' ', ' '},
        .oem_revision = 1,
        .creator_id = {'D', 'P', 'P', 'L'},
        .creator_revision = 1,
    };

    while (builder->out.size_bytes % 16 && !builder->out.overflow)
        aml_byte(&builder->out, 0);
    memcpy(header.signature, signature, sizeof(header.signature));
    builder->table = builder->out.size_bytes;
    aml_raw(&builder->out, &header, sizeof(header));
    return ACPI_TABLES_BASE + builder->table;
}

static void table_end(struct builder *builder)
{
    uint8_t *table = builder->out.bytes + builder->table;
    uint32_t length = (uint32_t)(builder->out.size_bytes - builder->table);

    if (builder->out.overflow)
        return;
    memcpy(table + offsetof(struct sdt_header, length_bytes), &length, sizeof(length));
    table[offsetof(struct sdt_header, checksum)] = checksum(table, length);
}

static void list_in_xsdt(struct builder *builder, uint64_t address)
{
    assert(builder->xsdt_count < sizeof(builder->xsdt_entries) / sizeof(builder->xsdt_entries[0]));
    builder->xsdt_entries[builder->xsdt_count++] = address;
}

static struct generic_address port_address(uint16_t port, uint8_t length_bytes)
{
    return (struct generic_address){
        .space = 1, /* system I/O */
        .bit_width = length_bytes * 8,
        .access_size = length_bytes == 1 ? 1 : length_bytes == 2 ? 2 : 3,
        .address = port,
    };
}

static void write_dsdt(struct builder *builder)
{
    builder->dsdt = table_begin(builder, "DSDT", 2);
    acpi_write_dsdt(&builder->out, builder->config);
    table_end(builder);
}

static void write_fadt(struct builder *builder)
{
    struct fadt fadt = {
        .firmware_control = (uint32_t)(ACPI_TABLES_BASE + FACS_OFFSET),
        .dsdt = (uint32_t)builder->dsdt,
        .x_dsdt = builder->dsdt,
        .sci_interrupt = CHIPSET_SCI_IRQ,
        .pm1a_event = CHIPSET_PM_EVENT_PORT,
        .pm1a_control = CHIPSET_PM_CONTROL_PORT,
        .pm_timer = CHIPSET_PM_TIMER_PORT,
        .gpe0 = CHIPSET_GPE_PORT,
        .gpe0_length = CHIPSET_GPE_BYTES,
        .pm1_event_length = 4,
        .pm1_control_length = 2,
        .pm_timer_length = 4,
        .c2_latency = 0xFFFF, /* neither C2 nor C3 */
        .c3_latency = 0xFFFF,
        .century = CMOS_CENTURY,
        .boot_architecture = BOOT_LEGACY_DEVICES | BOOT_NO_VGA | (builder->config->no_i8042 ? 0 : BOOT_8042),
        .flags = FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_FIX_RTC | FADT_TMR_VAL_EXT | FADT_RESET_REG_SUP,
        .reset_register = port_address(CHIPSET_RESET_PORT, 1),
        .reset_value = RESET_VALUE,
        .minor_version = 4,
        .x_pm1a_event = port_address(CHIPSET_PM_EVENT_PORT, 4),
        .x_pm1a_control = port_address(CHIPSET_PM_CONTROL_PORT, 2),
        .x_pm_timer = port_address(CHIPSET_PM_TIMER_PORT, 4),
        .x_gpe0 = port_address(CHIPSET_GPE_PORT, CHIPSET_GPE_BYTES),
        .hypervisor_vendor = {'D', 'O', 'P', 'P', 'E', 'L'},
    };

    /* The event block is two registers of a word each. */
    fadt.x_pm1a_event.access_size = 2;
    fadt.x_gpe0.access_size = 1;
    list_in_xsdt(builder, table_begin(builder, "FACP", 6));
    aml_raw(&builder->out, &fadt, sizeof(fadt));
    table_end(builder);
}

static void write_madt(struct builder *builder)
{
    const struct madt_ioapic ioapic = {1, sizeof(ioapic), 0, 0, CHIPSET_IOAPIC_BASE, 0};
    const struct madt_override overrides[] = {
        {2, sizeof(overrides[0]), 0, CHIPSET_IRQ_PIT, 2, 0},
        {2, sizeof(overrides[0]), 0, CHIPSET_SCI_IRQ, CHIPSET_SCI_IRQ, MADT_LEVEL | MADT_ACTIVE_HIGH},
    };
    const struct madt_lapic_nmi nmi = {4, sizeof(nmi), 0xFF, 0, 1}; /* LINT1 of every processor */

    list_in_xsdt(builder, table_begin(builder, "APIC", 5));
    aml_u32(&builder->out, CHIPSET_LAPIC_BASE);
    aml_u32(&builder->out, MADT_PCAT_COMPAT);
    for (unsigned i = 0; i < builder->config->cpu_count; i++) {
        struct madt_lapic lapic = {0, sizeof(lapic), (uint8_t)i, (uint8_t)i, 1};

        aml_raw(&builder->out, &lapic, sizeof(lapic));
    }
    aml_raw(&builder->out, &ioapic, sizeof(ioapic));
    aml_raw(&builder->out, overrides, sizeof(overrides));
    aml_raw(&builder->out, &nmi, sizeof(nmi));
    table_end(builder);
}

static void write_mcfg(struct builder *builder)
{
    const struct mcfg_allocation allocation = {
        .base = CHIPSET_ECAM_BASE,
        .bus_last = (uint8_t)((CHIPSET_ECAM_BYTES >> 20) - 1),
    };

    if (builder->config->no_pci)
        return;
    list_in_xsdt(builder, table_begin(builder, "MCFG", 1));
    aml_u64(&builder->out, 0); /* reserved */
    aml_raw(&builder->out, &allocation, sizeof(allocation));
    table_end(builder);
}

static void write_hpet(struct builder *builder)
{
    const struct hpet_table hpet = {
        .id = 0x8086A201, /* vendor, legacy replacement, 64-bit counter, three comparators, revision 1 */
        .base = {.bit_width = 64, .address = CHIPSET_HPET_BASE},
        .minimum_tick = 0x80,
    };

    if (!builder->config->hpet)
        return;
    list_in_xsdt(builder, table_begin(builder, "HPET", 1));
    aml_raw(&builder->out, &hpet, sizeof(hpet));
    table_end(builder);
}

static uint64_t write_xsdt(struct builder *builder)
{
    uint64_t address = table_begin(builder, "XSDT", 1);

    for (unsigned i = 0; i < builder->xsdt_count; i++)
        aml_u64(&builder->out, builder->xsdt_entries[i]);
    table_end(builder);
    return address;
}

static void write_rsdp(uint8_t *image, uint64_t xsdt)
{
    struct rsdp rsdp = {
        .signature = {'R', 'S', 'D', ' ', 'P', 'T', 'R', ' '},
        .oem_id = {'D', 'O', 'P', 'P', 'E', 'L'},
        .revision = 2,
        .length_bytes = sizeof(rsdp),
        .xsdt = xsdt,
    };

    rsdp.checksum = checksum((const uint8_t *)&rsdp, 20); /* the part that ACPI 1.0 had */
    rsdp.extended_checksum = checksum((const uint8_t *)&rsdp, sizeof(rsdp));
    memcpy(image, &rsdp, sizeof(rsdp));
}

int acpi_build(struct physmap *memory, const struct acpi_config *config, gpa_t *rsdp, struct error *err)
{
    const struct facs facs = {.signature = {'F', 'A', 'C', 'S'}, .length_bytes = sizeof(facs), .version = 2};
    struct builder builder = {.config = config};
    uint8_t *image;
    uint64_t xsdt;
    int rc;

    if (!config->cpu_count || config->cpu_count > 255)
        return error_set(err, -EINVAL, "%u processors: 1 to 255 can be described", config->cpu_count);
    image = calloc(1, ACPI_TABLES_BYTES);
    if (!image)
        return error_set(err, -ENOMEM, "no memory for the ACPI tables");
    builder.out = (struct aml){.bytes = image, .size_bytes = sizeof(struct rsdp), .capacity_bytes = FACS_OFFSET};
    write_dsdt(&builder);
    write_fadt(&builder);
    write_madt(&builder);
    write_mcfg(&builder);
    write_hpet(&builder);
    xsdt = write_xsdt(&builder);
    assert(!builder.out.overflow); /* 255 processors need less than half of it */
    write_rsdp(image, xsdt);
    memcpy(image + FACS_OFFSET, &facs, sizeof(facs));
    if (config->generation)
        memcpy(image + (ACPI_GENERATION_ID - ACPI_TABLES_BASE), config->generation, sizeof(*config->generation));
    rc = physmap_write(memory, ACPI_TABLES_BASE, image, ACPI_TABLES_BYTES);
    if (rc < 0)
        error_set(err, rc, "no guest RAM at 0x%llx for the ACPI tables: give the machine at least 1 MiB", ACPI_TABLES_BASE);
    *rsdp = ACPI_TABLES_BASE;
    free(image);
    return rc;
}
