/* PCI: configuration mechanisms, BARs, MSI-X, INTx, assignment, state, hostile writes. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/pci.h"

#define ECAM 0xE0000000ull
#define MEM32 0xC0000000ull

struct fixture {
    struct bus *bus;
    struct pci_host *host;
    struct pci_function function;
    struct msi_target msi;
    unsigned messages;
    uint64_t last_address;
    uint32_t last_data;
    bool line[4];
    uint8_t cf9;
};

static uint64_t bar_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    return 0x1234;
}

static void bar_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
}

static const struct region_ops bar_ops = {"bar", bar_read, bar_write, 1, 4};

static uint64_t cf9_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    return ((struct fixture *)ctx)->cf9;
}

static void cf9_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    ((struct fixture *)ctx)->cf9 = (uint8_t)value;
}

static const struct region_ops cf9_ops = {"cf9", cf9_read, cf9_write, 1, 1};

static void take_message(void *ctx, uint64_t address, uint32_t data)
{
    struct fixture *f = ctx;

    f->messages++;
    f->last_address = address;
    f->last_data = data;
}

static void set_line(void *ctx, unsigned pin, bool level)
{
    ((struct fixture *)ctx)->line[pin - 16] = level;
}

static int setup(void **state)
{
    static const struct pci_identity identity = {0x1AF4, 0x1041, 0x1AF4, 1, 0x020000, 1, true};
    struct fixture *f = calloc(1, sizeof(*f));
    struct pci_host_config config = {
        .ecam_base = ECAM,
        .mem32_base = MEM32,
        .mem32_size_bytes = 0x20000000,
        .mem64_base = 0x4000000000ull,
        .mem64_size_bytes = 0x1000000000ull,
        .port_base = 0xC000,
        .port_size_bytes = 0x4000,
        .cf9 = &cf9_ops,
        .cf9_ctx = f,
    };

    f->bus = bus_create();
    f->msi = (struct msi_target){take_message, f};
    config.bus = f->bus;
    config.msi = &f->msi;
    for (unsigned i = 0; i < 4; i++)
        config.intx[i] = (struct irq_line){set_line, f, 16 + i, false};
    assert_int_equal(pci_host_create(&f->host, &config), 0);
    assert_int_equal(pci_function_register(f->host, &f->function, 5, &identity, NULL, f), 0);
    pci_function_set_bar(&f->function, 0, PCI_BAR_PORT, 0x40, &bar_ops, f);
    assert_int_equal(pci_msix_create(&f->function, 3, 1), 0);
    pci_function_set_bar(&f->function, 4, PCI_BAR_MEM64, 0x4000, &bar_ops, f);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    pci_function_unregister(&f->function);
    pci_host_destroy(f->host);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCF8, 4), 0xFFFFFFFF); /* nothing stays behind */
    bus_destroy(f->bus);
    free(f);
    return 0;
}

static uint32_t config_read(struct fixture *f, unsigned slot, unsigned offset, unsigned size)
{
    return (uint32_t)bus_read(f->bus, BUS_MMIO, ECAM + slot * 0x8000 + offset, size);
}

static void config_write(struct fixture *f, unsigned offset, unsigned size, uint32_t value)
{
    bus_write(f->bus, BUS_MMIO, ECAM + 5 * 0x8000 + offset, size, value);
}

static void test_mechanisms(void **state)
{
    struct fixture *f = *state;

    assert_int_equal(config_read(f, 0, 0, 4), 0x29C08086);
    assert_int_equal(config_read(f, 0, 8, 4), 0x06000000);
    assert_int_equal(config_read(f, 5, 0, 4), 0x10411AF4);
    assert_int_equal(config_read(f, 6, 0, 4), 0xFFFFFFFF);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, ECAM + 5 * 0x8000 + 0x1000, 4), 0xFFFFFFFF); /* function 1 */
    assert_int_equal(bus_read(f->bus, BUS_MMIO, ECAM + (1 << 20), 4), 0xFFFFFFFF);           /* bus 1 */
    bus_write(f->bus, BUS_PORT, 0xCF8, 4, 0x80000000 | 5 << 11 | 8);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCF8, 4), 0x80000000 | 5 << 11 | 8);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCFC, 4), 0x02000001);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCFF, 1), 0x02);
    bus_write(f->bus, BUS_PORT, 0xCF9, 1, 0x0E); /* the reset register, not the address */
    assert_int_equal(f->cf9, 0x0E);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCF9, 1), 0x0E);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCF8, 4), 0x80000000 | 5 << 11 | 8);
    bus_write(f->bus, BUS_PORT, 0xCF8, 4, 5 << 11);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCFC, 4), 0xFFFFFFFF); /* not enabled */
}

static void test_bars(void **state)
{
    struct fixture *f = *state;

    config_write(f, 0x10, 4, 0xFFFFFFFF);
    assert_int_equal(config_read(f, 5, 0x10, 4), 0xFFFFFFC1);
    config_write(f, 0x20, 4, 0xFFFFFFFF);
    config_write(f, 0x24, 4, 0xFFFFFFFF);
    assert_int_equal(config_read(f, 5, 0x20, 4), 0xFFFFC004);
    assert_int_equal(config_read(f, 5, 0x24, 4), 0xFFFFFFFF);
    assert_int_equal(config_read(f, 5, 0x18, 4), 0);
    config_write(f, 0x18, 4, 0xFFFFFFFF); /* no BAR there */
    assert_int_equal(config_read(f, 5, 0x18, 4), 0);

    config_write(f, 0x10, 4, 0xC040);
    config_write(f, 0x20, 4, 0x10000000);
    config_write(f, 0x24, 4, 0x40);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xC040, 2), 0xFFFF);
    config_write(f, 4, 2, 3);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xC040, 2), 0x1234);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, 0x4010003FFCull, 4), 0x1234);
    config_write(f, 0x10, 4, 0xC080); /* moves */
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xC040, 2), 0xFFFF);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xC080, 2), 0x1234);
    config_write(f, 0x10, 4, 0xCC0); /* over the bridge's own ports: those stay */
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCF8, 4), 0);
    config_write(f, 0x10, 4, 0xFFFFFFC0); /* beyond the ports */
    config_write(f, 4, 2, 0);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, 0x4010000000ull, 4), 0xFFFFFFFF);
}

/* A BAR that was blocked by another appears when the other moves away. */
static void test_overlapping_bars(void **state)
{
    static const struct pci_identity identity = {1, 2, 3, 4, 0xFF0000, 0, false};
    struct fixture *f = *state;
    struct pci_function other;

    assert_int_equal(pci_function_register(f->host, &other, 5, &identity, NULL, f), -EBUSY);
    assert_int_equal(pci_function_register(f->host, &other, 32, &identity, NULL, f), -ENOSPC);
    assert_int_equal(pci_function_register(f->host, &other, -1, &identity, NULL, f), 0);
    assert_int_equal(other.slot, 1);
    pci_function_set_bar(&other, 0, PCI_BAR_PORT, 0x10, &bar_ops, &other);
    config_write(f, 0x10, 4, 0xC000);
    config_write(f, 4, 2, 1);
    bus_write(f->bus, BUS_MMIO, ECAM + 0x8000 + 0x10, 4, 0xC010);
    bus_write(f->bus, BUS_MMIO, ECAM + 0x8000 + 4, 2, 1);
    assert_true(other.bar[0].mapped_at == UINT64_MAX);
    config_write(f, 0x10, 4, 0xD000);
    assert_true(other.bar[0].mapped_at == 0xC010);
    pci_function_unregister(&other);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xC010, 4), 0xFFFFFFFF);
}

static void test_assign(void **state)
{
    struct fixture *f = *state;
    uint32_t msix, mem;

    pci_host_assign(f->host);
    assert_int_equal(config_read(f, 5, 4, 2) & 7, 3);
    assert_int_equal(config_read(f, 5, 0x10, 4), 0xC001);
    assert_false(pci_function_bus_master(&f->function));
    msix = config_read(f, 5, 0x14, 4);
    mem = config_read(f, 5, 0x20, 4) & ~0xFu;
    assert_true(msix >= MEM32 && mem > msix && mem % 0x4000 == 0);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, mem, 4), 0x1234);
    config_write(f, 4, 2, 7);
    assert_true(pci_function_bus_master(&f->function));
    pci_function_reset(&f->function);
    assert_false(pci_function_bus_master(&f->function));
    assert_int_equal(config_read(f, 5, 0x10, 4), 1);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, mem, 4), 0xFFFFFFFF);
}

static unsigned msix_capability(struct fixture *f)
{
    unsigned offset = config_read(f, 5, 0x34, 1);

    assert_int_equal(config_read(f, 5, 6, 2) & 0x10, 0x10);
    assert_int_equal(config_read(f, 5, offset, 1), 0x11);
    return offset;
}

static void test_msix(void **state)
{
    struct fixture *f = *state;
    unsigned cap = msix_capability(f);
    uint64_t table, pba;

    assert_int_equal(config_read(f, 5, cap + 2, 2), 2);
    pci_host_assign(f->host);
    table = config_read(f, 5, 0x14, 4);
    pba = table + (config_read(f, 5, cap + 8, 4) & ~7u);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, table + 12, 4), 1); /* masked after reset */
    bus_write(f->bus, BUS_MMIO, table + 16, 8, 0xFEE00003);
    bus_write(f->bus, BUS_MMIO, table + 24, 4, 0x41);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, table + 16, 4), 0xFEE00000);
    bus_write(f->bus, BUS_MMIO, table + 28, 1, 0); /* bytes are not defined: dropped */
    assert_int_equal(bus_read(f->bus, BUS_MMIO, table + 28, 4), 1);

    pci_msix_notify(&f->function, 1); /* off */
    assert_int_equal(bus_read(f->bus, BUS_MMIO, pba, 8), 0);
    config_write(f, cap + 2, 2, 0xC000);
    assert_true(pci_msix_enabled(&f->function));
    pci_msix_notify(&f->function, 1);
    pci_msix_notify(&f->function, 3);
    pci_msix_notify(&f->function, 4000);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, pba, 8), 2);
    bus_write(f->bus, BUS_MMIO, pba, 4, 0); /* read-only */
    bus_write(f->bus, BUS_MMIO, table + 28, 4, 0xFFFFFFFE);
    assert_int_equal(f->messages, 0); /* the function is masked still */
    config_write(f, cap + 2, 2, 0x8000);
    assert_int_equal(f->messages, 1);
    assert_true(f->last_address == 0xFEE00000);
    assert_int_equal(f->last_data, 0x41);
    assert_int_equal(bus_read(f->bus, BUS_MMIO, pba, 8), 0);
    pci_msix_notify(&f->function, 1);
    assert_int_equal(f->messages, 2);
    bus_write(f->bus, BUS_MMIO, table + 28, 4, 1);
    pci_msix_notify(&f->function, 1);
    assert_int_equal(f->messages, 2);
    bus_write(f->bus, BUS_MMIO, table + 28, 4, 0);
    assert_int_equal(f->messages, 3);
}

static void test_intx(void **state)
{
    struct fixture *f = *state;
    unsigned cap = msix_capability(f);

    assert_int_equal(config_read(f, 5, 0x3D, 1), 1);
    pci_function_set_intx(&f->function, true);
    assert_true(f->line[1]); /* slot 5, INTA */
    assert_int_equal(config_read(f, 5, 6, 2) & 8, 8);
    config_write(f, 4, 2, 0x400);
    assert_false(f->line[1]);
    assert_int_equal(config_read(f, 5, 6, 2) & 8, 8);
    config_write(f, 4, 2, 0);
    assert_true(f->line[1]);
    config_write(f, cap + 2, 2, 0x8000); /* MSI-X takes over */
    assert_false(f->line[1]);
    config_write(f, cap + 2, 2, 0);
    assert_true(f->line[1]);
    pci_function_set_intx(&f->function, false);
    assert_false(f->line[1]);
    pci_function_set_intx(&f->function, true); /* teardown lets go of it */
}

static void test_capability_room(void **state)
{
    struct fixture *f = *state;
    unsigned count = 0;

    while (pci_function_add_capability(&f->function, 9, 16, NULL, NULL))
        count++;
    assert_true(count > 5 && count < 12);
    assert_int_equal(pci_function_add_capability(&f->function, 9, 100000, NULL, NULL), 0);
}

static void save(struct fixture *f, struct state_io *io)
{
    state_begin(io, "device", 1);
    pci_function_state(&f->function, io);
    (void)!state_end(io);
    (void)!pci_host_state(f->host, io);
}

static void test_state(void **state)
{
    struct fixture *f = *state;
    struct state_io *out = state_writer_create(), *in, *again = state_writer_create();
    unsigned cap = msix_capability(f);
    size_t size, size2;
    uint64_t table;
    const void *data;

    pci_host_assign(f->host);
    config_write(f, 4, 2, 7);
    config_write(f, cap + 2, 2, 0x8000);
    table = config_read(f, 5, 0x14, 4);
    bus_write(f->bus, BUS_MMIO, table + 8, 4, 0x55);
    pci_msix_notify(&f->function, 0);
    bus_write(f->bus, BUS_PORT, 0xCF8, 4, 0x80002810);
    save(f, out);
    data = state_writer_data(out, &size);
    pci_function_reset(&f->function);
    pci_host_reset(f->host);
    in = state_reader_create(data, size);
    save(f, in);
    assert_false(state_failed(in));
    assert_int_equal(bus_read(f->bus, BUS_MMIO, table + 8, 4), 0x55);
    assert_int_equal(bus_read(f->bus, BUS_PORT, 0xCF8, 4), 0x80002810);
    assert_true(pci_msix_enabled(&f->function));
    save(f, again);
    assert_memory_equal(state_writer_data(again, &size2), data, size);
    assert_int_equal(size, size2);
    state_io_destroy(in);
    state_io_destroy(out);
    state_io_destroy(again);
}

static void test_random_writes(void **state)
{
    struct fixture *f = *state;

    srand(7);
    for (unsigned i = 0; i < 20000; i++) {
        unsigned size = 1u << rand() % 3;
        uint64_t value = (uint64_t)rand() << 8 ^ (uint64_t)rand();

        switch (rand() % 4) {
        case 0: config_write(f, (unsigned)rand() % 0x100, size, (uint32_t)value); break;
        case 1: bus_write(f->bus, BUS_PORT, 0xCF8 + (unsigned)rand() % 8, size, value); break;
        case 2: bus_write(f->bus, BUS_MMIO, (uint64_t)config_read(f, 5, 0x14, 4) + (unsigned)rand() % 0x1100, size, value); break;
        default: pci_msix_notify(&f->function, (unsigned)rand() % 4); pci_function_set_intx(&f->function, rand() & 1);
        }
    }
    assert_int_equal(config_read(f, 5, 0, 4), 0x10411AF4);
    assert_int_equal(config_read(f, 0, 0, 4), 0x29C08086);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_mechanisms), TEST(test_bars),  TEST(test_overlapping_bars), TEST(test_assign),        TEST(test_msix),
        TEST(test_intx),       TEST(test_state), TEST(test_capability_room),  TEST(test_random_writes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
