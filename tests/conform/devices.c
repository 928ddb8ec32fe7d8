/*
 * The platform: PCI by ports and by ECAM, BARs sized, ACPI tables found and checksummed, what they say against what answers, the RTC, clocks against each other, the UART.
 * PCI 3.0; PCI Express 5.0, 7.2.2; ACPI 6.4, ch. 5; MC146818; 16550.
 */
#include "runtime/conform.h"

static uint32_t pci_read(unsigned bus, unsigned slot, unsigned function, unsigned offset)
{
    outl(0xcf8, 1u << 31 | bus << 16 | slot << 11 | function << 8 | (offset & 0xfc));
    return inl(0xcfc);
}
static void pci_write(unsigned bus, unsigned slot, unsigned function, unsigned offset, uint32_t value)
{
    outl(0xcf8, 1u << 31 | bus << 16 | slot << 11 | function << 8 | (offset & 0xfc));
    outl(0xcfc, value);
}

/* ---- ACPI ---- */

struct header {
    char signature[4];
    uint32_t length;
    uint8_t revision, checksum;
    char oem[6], oem_table[8];
    uint32_t oem_revision, creator, creator_revision;
} __attribute__((packed));

static const struct header *tables[16];
static unsigned table_count;

static uint8_t sum(const void *data, size_t length)
{
    const uint8_t *p = data;
    uint8_t total = 0;
    while (length--)
        total = (uint8_t)(total + *p++);
    return total;
}
static const struct header *table_find(const char *signature)
{
    for (unsigned n = 0; n < table_count; n++)
        if (!memcmp(tables[n]->signature, signature, 4))
            return tables[n];
    return NULL;
}

static const uint8_t *rsdp_find(void)
{
    const uint8_t *info = (const uint8_t *)(uintptr_t)start_info[0];
    uint64_t address;
    memcpy(&address, info + 32, 8); /* hvm_start_info.rsdp_paddr */
    if (address && address < 1ull << 32 && !memcmp((const void *)(uintptr_t)address, "RSD PTR ", 8))
        return (const uint8_t *)(uintptr_t)address;
    for (uintptr_t p = 0xe0000; p < 0x100000; p += 16)
        if (!memcmp((const void *)p, "RSD PTR ", 8))
            return (const uint8_t *)p;
    return NULL;
}

static void test_acpi(void)
{
    uint32_t magic;
    memcpy(&magic, (const void *)(uintptr_t)start_info[0], 4);
    expect_eq(magic, 0x336ec578, "PVH start info in EBX");
    const uint8_t *rsdp = rsdp_find();
    if (!check(rsdp != NULL, "the RSDP"))
        return;
    check(sum(rsdp, 20) == 0, "its checksum");
    uint64_t root = 0;
    uint32_t rsdt;
    memcpy(&rsdt, rsdp + 16, 4);
    if (rsdp[15] >= 2) {
        check(sum(rsdp, 36) == 0, "its extended checksum");
        memcpy(&root, rsdp + 24, 8);
    }
    const struct header *list = (const void *)(uintptr_t)(root ? root : rsdt);
    unsigned width = root ? 8 : 4;
    check(!memcmp(list->signature, root ? "XSDT" : "RSDT", 4) && sum(list, list->length) == 0, "the list of tables");
    for (unsigned at = sizeof *list; at + width <= list->length && table_count < 16; at += width) {
        uint64_t address = 0;
        memcpy(&address, (const uint8_t *)list + at, width);
        tables[table_count++] = (const void *)(uintptr_t)address;
    }
    for (unsigned n = 0; n < table_count; n++) {
        char name[5] = {0};
        memcpy(name, tables[n]->signature, 4);
        check(sum(tables[n], tables[n]->length) == 0, "checksum of %s", name);
    }
    const uint8_t *fadt = (const uint8_t *)table_find("FACP");
    if (!check(fadt != NULL && table_find("APIC") && table_find("MCFG"), "FADT, MADT and MCFG are there"))
        return;
    uint32_t dsdt, pm_timer_port;
    memcpy(&dsdt, fadt + 40, 4);
    memcpy(&pm_timer_port, fadt + 76, 4);
    const struct header *dsdt_header = (const void *)(uintptr_t)dsdt;
    check(dsdt && !memcmp(dsdt_header->signature, "DSDT", 4) && sum(dsdt_header, dsdt_header->length) == 0, "the DSDT and its checksum");
    expect_eq(pm_timer_port, 0x608, "the PM timer's port");
    const uint8_t *madt = (const uint8_t *)table_find("APIC");
    uint32_t length, lapic, ioapic = 0;
    memcpy(&length, madt + 4, 4);
    memcpy(&lapic, madt + 36, 4);
    unsigned processors = 0;
    for (unsigned at = 44; at + 2 <= length && madt[at + 1]; at += madt[at + 1]) {
        processors += madt[at] == 0 && (madt[at + 4] & 1);
        if (madt[at] == 1)
            memcpy(&ioapic, madt + at + 4, 4);
    }
    check(lapic == LAPIC && ioapic == 0xfec00000 && processors >= 1, "MADT: APICs and processors (%x %x %u)", lapic, ioapic, processors);
}

/* ---- PCI ---- */

static void test_pci(void)
{
    const uint8_t *mcfg = (const uint8_t *)table_find("MCFG");
    uint64_t ecam = 0;
    if (mcfg)
        memcpy(&ecam, mcfg + 44, 8);
    unsigned found = 0, different = 0, bars = 0, bad_bars = 0;
    uint32_t kept = inl(0xcf8);
    outl(0xcf8, 0x80000000);
    expect_eq(inl(0xcf8), 0x80000000, "0xCF8 reads back");
    for (unsigned slot = 0; slot < 32; slot++) {
        if ((pci_read(0, slot, 0, 0) & 0xffff) == 0xffff)
            continue;
        found++;
        for (unsigned offset = 0; ecam && offset < 64; offset += 4)
            different += pci_read(0, slot, 0, offset) != *(volatile uint32_t *)(uintptr_t)(ecam + (slot << 15) + offset);
        for (unsigned bar = 0x10; slot && bar < 0x28; bar += 4) {
            uint32_t old = pci_read(0, slot, 0, bar);
            pci_write(0, slot, 0, bar, ~0u);
            uint32_t mask = pci_read(0, slot, 0, bar);
            pci_write(0, slot, 0, bar, old);
            if (!mask)
                continue;
            bars++;
            uint32_t size = ~(mask & (mask & 1 ? ~3u : ~15u)) + 1;
            if (mask & 1)
                size &= 0xffff;
            bad_bars += (size & (size - 1)) != 0 || pci_read(0, slot, 0, bar) != old;
            if (!(mask & 1) && (mask & 6) == 4)
                bar += 4;
        }
    }
    outl(0xcf8, kept);
    check(found >= 1 && (pci_read(0, 0, 0, 8) >> 16) == 0x0600, "a host bridge at slot 0 (%u devices)", found);
    check(ecam != 0, "MCFG names ECAM");
    expect_eq(different, 0, "ECAM shows what the ports show");
    check(bad_bars == 0, "BARs size to powers of two (%u BARs)", bars);
    expect_eq(pci_read(0, 31, 7, 0), 0xffffffff, "an absent function reads as ones");
    outl(0xcf8, 0);
    expect_eq(inl(0xcfc), 0xffffffff, "without the enable bit the data port reads as ones");
    outl(0xcf8, 0x80000000);
    check((inw(0xcfc) | (uint32_t)inw(0xcfe) << 16) == inl(0xcfc) && inb(0xcfd) == (inl(0xcfc) >> 8 & 0xff), "narrow reads of the data port");
    pci_write(0, 0, 0, 0, 0);
    check((pci_read(0, 0, 0, 0) & 0xffff) != 0, "the ID cannot be written");
}

/* ---- clocks ---- */

static uint8_t cmos(uint8_t index)
{
    outb(0x70, index);
    return inb(0x71);
}
static unsigned decimal(uint8_t value, uint8_t status)
{
    return status & 4 ? value : (value >> 4) * 10u + (value & 15);
}

static void test_clocks(void)
{
    uint8_t status = cmos(0xb);
    unsigned month = decimal(cmos(8), status), day = decimal(cmos(7), status), year = decimal(cmos(9), status), hour = decimal(cmos(4) & 0x7f, status);
    check(month >= 1 && month <= 12 && day >= 1 && day <= 31 && hour <= 23 && year >= 20, "the RTC's date is one (20%u-%u-%u)", year, month, day);
    check(cmos(0xd) & 0x80, "its memory is valid");
    unsigned second = decimal(cmos(0), status);
    uint32_t start = pm_timer();
    while (decimal(cmos(0), status) == second && ((pm_timer() - start) & 0xffffff) < 3579545 * 2)
        cpu_pause();
    second = decimal(cmos(0), status);
    start = pm_timer();
    while (decimal(cmos(0), status) == second && ((pm_timer() - start) & 0xffffff) < 3579545 * 2)
        cpu_pause();
    uint32_t ticks = (pm_timer() - start) & 0xffffff;
    check(ticks > 3579545 * 9 / 10 && ticks < 3579545 / 10 * 12, "a second of the RTC by the PM timer (%u ticks)", ticks);
    /* PIT channel 2 counts 50 ms. */
    outb(0x61, (uint8_t)((inb(0x61) & ~2) | 1));
    outb(0x43, 0xb0);
    outb(0x42, 59659 & 0xff);
    outb(0x42, 59659 >> 8);
    uint64_t tsc = rdtsc();
    start = pm_timer();
    while (!(inb(0x61) & 0x20) && ((pm_timer() - start) & 0xffffff) < 3579545)
        cpu_pause();
    ticks = (pm_timer() - start) & 0xffffff;
    tsc = rdtsc() - tsc;
    check(ticks > 178977 * 9 / 10 && ticks < 178977 * 13 / 10, "50 ms of the PIT's channel 2 by the PM timer (%u ticks)", ticks);
    check(tsc > 1000000, "the TSC runs");
    uint32_t a = pm_timer(), b = pm_timer();
    check(a < 1u << 24 || b >= a, "the PM timer does not run backwards");
    unsigned backwards = 0;
    uint64_t last = rdtsc();
    for (unsigned n = 0; n < 10000; n++) {
        uint64_t now = rdtsc();
        backwards += now < last;
        last = now;
    }
    expect_eq(backwards, 0, "nor does the TSC");
}

static void test_uart(void)
{
    outb(0x3ff, 0xa5);
    expect_eq(inb(0x3ff), 0xa5, "the UART's scratch register");
    uint8_t lcr = inb(0x3fb);
    outb(0x3fb, lcr | 0x80);
    outb(0x3f8, 0x0c);
    outb(0x3f9, 0x00);
    uint8_t divisor = inb(0x3f8);
    outb(0x3fb, lcr);
    expect_eq(divisor, 0x0c, "its divisor latch");
    outb(0x3fc, 0x1a); /* loop-back: OUT2, RTS */
    expect_eq(inb(0x3fe) & 0xf0, 0x90, "loop-back: OUT2 and RTS come back as DCD and CTS");
    outb(0x3fc, 0);
    expect_eq(inb(0x1234), 0xff, "a port that nobody has");
    expect_eq(*(volatile uint32_t *)(uintptr_t)0xd8000000u, 0xffffffff, "an address that nobody has");
    *(volatile uint32_t *)(uintptr_t)0xd8000000u = 0;
    check(true, "and a write to it is lost");
}

void test_main(void)
{
    test_acpi();
    test_pci();
    test_clocks();
    test_uart();
}
