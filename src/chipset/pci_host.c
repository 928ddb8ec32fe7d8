/*
 * The host bridge at 00:00.0: configuration space through ports 0xCF8/0xCFC (PCI Local Bus 3.0, 3.2.2.3.2) and through ECAM (PCI Express Base
 * 4.0, 7.2.2), the four interrupt lines, and the placing of BARs that firmware would do.
 * Only bus 0 and function 0 of each slot exist; everything else reads as ones.
 * Threading: with the device lock held.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "chipset/chipset.h"
#include "chipset/pci_priv.h"
#include "util/log.h"

#define CONFIG_ADDRESS_PORT 0xCF8
#define CONFIG_DATA_PORT 0xCFC
#define CONFIG_ADDRESS_ENABLE 0x80000000u
#define CONFIG_ADDRESS_WRITABLE 0x80FFFFFCu /* enable, bus, device, function, register */

#define ECAM_FUNCTION_BITS 12
#define ECAM_BYTES (256ull << 20)

/* device and function number together, as both mechanisms have them: slot * 8 + function. */
static struct pci_function *function_at(struct pci_host *host, unsigned bus_number, unsigned devfn)
{
    return bus_number == 0 && devfn % 8 == 0 ? host->slots[devfn / 8] : NULL;
}

static uint64_t address_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pci_host *host = ctx;

    if (size_bytes == 4)
        return host->address;
    if (offset == 1 && size_bytes == 1 && host->config.cf9)
        return host->config.cf9->read(host->config.cf9_ctx, 0, 1);
    return UINT64_MAX;
}

static void address_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pci_host *host = ctx;

    /* Only doublewords are the bridge's; others pass it by. */
    if (size_bytes == 4)
        host->address = (uint32_t)value & CONFIG_ADDRESS_WRITABLE;
    else if (offset == 1 && size_bytes == 1 && host->config.cf9)
        host->config.cf9->write(host->config.cf9_ctx, 0, 1, value);
}

static struct pci_function *addressed_function(struct pci_host *host)
{
    if (!(host->address & CONFIG_ADDRESS_ENABLE))
        return NULL;
    return function_at(host, host->address >> 16 & 0xFF, host->address >> 8 & 0xFF);
}

static uint64_t data_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pci_host *host = ctx;
    struct pci_function *function = addressed_function(host);

    return function ? pci_function_config_read(function, (host->address & 0xFC) + (unsigned)offset, size_bytes) : UINT64_MAX;
}

static void data_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pci_host *host = ctx;
    struct pci_function *function = addressed_function(host);

    if (function)
        pci_function_config_write(function, (host->address & 0xFC) + (unsigned)offset, size_bytes, (uint32_t)value);
}

static uint64_t ecam_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pci_function *function = function_at(ctx, offset >> 20 & 0xFF, offset >> ECAM_FUNCTION_BITS & 0xFF);

    return function ? pci_function_config_read(function, offset & (PCI_CONFIG_BYTES - 1), size_bytes) : UINT64_MAX;
}

static void ecam_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pci_function *function = function_at(ctx, offset >> 20 & 0xFF, offset >> ECAM_FUNCTION_BITS & 0xFF);

    if (function)
        pci_function_config_write(function, offset & (PCI_CONFIG_BYTES - 1), size_bytes, (uint32_t)value);
}

static const struct region_ops address_ops = {"pci-address", address_read, address_write, 1, 4};
static const struct region_ops data_ops = {"pci-data", data_read, data_write, 1, 4};
static const struct region_ops ecam_ops = {"pci-ecam", ecam_read, ecam_write, 1, 4};

void pci_host_set_intx(void *ctx, unsigned pin, bool level)
{
    struct pci_host *host = ctx;

    assert(level || host->intx_asserted[pin]);
    host->intx_asserted[pin] += level ? 1 : -1;
    irq_line_set(&host->config.intx[pin], host->intx_asserted[pin] != 0);
}

static int add_regions(struct pci_host *host)
{
    struct bus *bus = host->config.bus;
    int rc = bus_add(bus, BUS_PORT, CONFIG_ADDRESS_PORT, 4, &address_ops, host);

    if (rc == 0)
        rc = bus_add(bus, BUS_PORT, CONFIG_DATA_PORT, 4, &data_ops, host);
    if (rc == 0 && host->config.ecam_base)
        rc = bus_add(bus, BUS_MMIO, host->config.ecam_base, ECAM_BYTES, &ecam_ops, host);
    return rc;
}

int pci_host_create(struct pci_host **out, const struct pci_host_config *config)
{
    /* The number of a chipset that every OS knows as a plain PCI Express host bridge. */
    static const struct pci_identity identity = {.vendor = 0x8086, .device = 0x29C0, .class_code = 0x060000};
    struct pci_host *host = calloc(1, sizeof(*host));
    int rc;

    if (!host)
        return -ENOMEM;
    host->config = *config;
    rc = add_regions(host);
    if (rc == 0)
        rc = pci_function_register(host, &host->bridge, 0, &identity, NULL, host);
    if (rc < 0) {
        pci_host_destroy(host);
        return rc;
    }
    *out = host;
    return 0;
}

void pci_host_destroy(struct pci_host *host)
{
    if (!host)
        return;
    pci_function_unregister(&host->bridge);
    bus_remove(host->config.bus, BUS_PORT, CONFIG_ADDRESS_PORT, host);
    bus_remove(host->config.bus, BUS_PORT, CONFIG_DATA_PORT, host);
    if (host->config.ecam_base)
        bus_remove(host->config.bus, BUS_MMIO, host->config.ecam_base, host);
    free(host);
}

/* A window of addresses that is handed out from the bottom. */
struct window {
    uint64_t next, end;
};

static bool window_take(struct window *window, uint64_t size_bytes, uint64_t *address)
{
    uint64_t start = (window->next + size_bytes - 1) & -size_bytes;

    if (start < window->next || start > window->end || size_bytes > window->end - start)
        return false;
    *address = start;
    window->next = start + size_bytes;
    return true;
}

struct windows {
    struct window port, mem32, mem64;
};

static void assign_bar(struct pci_function *function, unsigned index, struct windows *windows)
{
    const struct pci_bar *bar = &function->bar[index];
    uint64_t address = 0;
    bool done = false;

    if (bar->kind == PCI_BAR_NONE)
        return;
    if (bar->kind == PCI_BAR_PORT) {
        done = window_take(&windows->port, bar->size_bytes, &address);
    } else {
        /* Small ones below 4 GiB even when they need not, for guests that run without paging or with a 4 GiB identity map. */
        bool low = bar->kind == PCI_BAR_MEM32 || bar->size_bytes <= 1ull << 20;

        done = low && window_take(&windows->mem32, bar->size_bytes, &address);
        if (!done && bar->kind == PCI_BAR_MEM64)
            done = window_take(&windows->mem64, bar->size_bytes, &address);
    }
    if (!done)
        log_warning("pci %02x.0: no address space left for BAR %u", function->slot, index);
    pci_function_write_bar(function, index, address);
}

void pci_host_assign(struct pci_host *host)
{
    const struct pci_host_config *config = &host->config;
    struct windows windows = {
        .port = {config->port_base, (uint64_t)config->port_base + config->port_size_bytes},
        .mem32 = {config->mem32_base, config->mem32_base + config->mem32_size_bytes},
        .mem64 = {config->mem64_base, config->mem64_base + config->mem64_size_bytes},
    };

    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
        struct pci_function *function = host->slots[slot];
        bool any = false;

        if (!function)
            continue;
        for (unsigned i = 0; i < PCI_BARS; i++) {
            assign_bar(function, i, &windows);
            any |= function->bar[i].kind != PCI_BAR_NONE;
        }
        if (any)
            pci_set16(function->config, PCI_COMMAND, pci_get16(function, PCI_COMMAND) | PCI_COMMAND_IO | PCI_COMMAND_MEMORY);
        if (function->config[PCI_INTERRUPT_PIN])
            function->config[PCI_INTERRUPT_LINE] = (uint8_t)(CHIPSET_GSI_PCI + slot % 4);
    }
    pci_host_remap(host);
}

void pci_host_reset(struct pci_host *host)
{
    host->address = 0;
    pci_function_reset(&host->bridge);
}

int pci_host_state(struct pci_host *host, struct state_io *io)
{
    state_begin(io, "pci-host", 1);
    state_u32(io, &host->address);
    if (state_loading(io))
        host->address &= CONFIG_ADDRESS_WRITABLE;
    pci_function_state(&host->bridge, io);
    return state_end(io);
}
