/*
 * PCI functions: the type 0 header, guest writes to configuration space, BARs, capabilities, INTA#.
 *
 * Invariants: a BAR's mapped_at is where the bus has its region now, PCI_NOT_MAPPED when it has not; the interrupt status bit
 * is the level that the device drives, before INTx disable; configuration bytes outside write_mask change only by the device.
 * Threading: with the device lock held.
 */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "chipset/pci_priv.h"
#include "util/log.h"

static int pick_slot(struct pci_host *host, int slot)
{
    if (slot >= 0)
        return slot >= PCI_SLOTS ? -ENOSPC : host->slots[slot] ? -EBUSY : slot;
    for (slot = 1; slot < PCI_SLOTS; slot++) {
        if (!host->slots[slot])
            return slot;
    }
    return -ENOSPC;
}

bool pci_slot_is_free(const struct pci_host *host, unsigned slot)
{
    return slot < PCI_SLOTS && !host->slots[slot];
}

static void fill_header(struct pci_function *function, const struct pci_identity *identity)
{
    uint8_t *config = function->config, *mask = function->write_mask;

    pci_set16(config, PCI_VENDOR_ID, identity->vendor);
    pci_set16(config, PCI_DEVICE_ID, identity->device);
    config[PCI_REVISION_ID] = identity->revision;
    config[PCI_CLASS_CODE] = identity->class_code & 0xFF;
    config[PCI_CLASS_CODE + 1] = identity->class_code >> 8 & 0xFF;
    config[PCI_CLASS_CODE + 2] = identity->class_code >> 16 & 0xFF;
    pci_set16(config, PCI_SUBSYSTEM_VENDOR_ID, identity->subsystem_vendor);
    pci_set16(config, PCI_SUBSYSTEM_ID, identity->subsystem);
    config[PCI_INTERRUPT_PIN] = identity->has_intx ? 1 : 0;

    pci_set16(mask, PCI_COMMAND,
              PCI_COMMAND_IO | PCI_COMMAND_MEMORY | PCI_COMMAND_BUS_MASTER | PCI_COMMAND_PARITY | PCI_COMMAND_SERR |
                  PCI_COMMAND_INTX_DISABLE);
    mask[PCI_CACHE_LINE_SIZE] = 0xFF;
    mask[PCI_INTERRUPT_LINE] = 0xFF;
}

int pci_function_register(struct pci_host *host, struct pci_function *function, int slot, const struct pci_identity *identity,
                          const struct pci_function_ops *ops, void *device)
{
    slot = pick_slot(host, slot);
    if (slot < 0)
        return slot;
    memset(function, 0, sizeof(*function));
    function->host = host;
    function->slot = (uint8_t)slot;
    function->device = device;
    function->ops = ops;
    function->capability_end = PCI_HEADER_END;
    for (unsigned i = 0; i < PCI_BARS; i++)
        function->bar[i].mapped_at = PCI_NOT_MAPPED;
    /* INTA# of slot s is wired to line s mod 4, as the _PRT says. */
    function->intx = (struct irq_line){.set = pci_host_set_intx, .ctx = host, .pin = (unsigned)slot % 4};
    fill_header(function, identity);
    host->slots[slot] = function;
    return 0;
}

static enum bus_space bar_space(const struct pci_bar *bar)
{
    return bar->kind == PCI_BAR_PORT ? BUS_PORT : BUS_MMIO;
}

static void unmap_bar(struct pci_function *function, struct pci_bar *bar)
{
    if (bar->mapped_at == PCI_NOT_MAPPED)
        return;
    bus_remove(function->host->config.bus, bar_space(bar), bar->mapped_at, bar->ctx);
    bar->mapped_at = PCI_NOT_MAPPED;
}

void pci_function_unregister(struct pci_function *function)
{
    if (!function->host)
        return;
    irq_line_set(&function->intx, false);
    for (unsigned i = 0; i < PCI_BARS; i++)
        unmap_bar(function, &function->bar[i]);
    pci_msix_destroy(function);
    function->host->slots[function->slot] = NULL;
    pci_host_remap(function->host);
    function->host = NULL;
}

void pci_function_set_bar(struct pci_function *function, unsigned index, enum pci_bar_kind kind, uint64_t size_bytes,
                          const struct region_ops *ops, void *ctx)
{
    unsigned offset = PCI_BASE_ADDRESS + index * 4;
    static const struct {
        uint64_t smallest, largest;
        uint32_t flags;
    } kinds[] = {
        [PCI_BAR_PORT] = {4, 0x1000, 1},
        [PCI_BAR_MEM32] = {16, 1ull << 31, 0},
        [PCI_BAR_MEM64] = {16, 1ull << 40, 4},
    };

    assert(kind > PCI_BAR_NONE && kind <= PCI_BAR_MEM64 && ops);
    assert(index < (kind == PCI_BAR_MEM64 ? PCI_BARS - 1 : PCI_BARS) && function->bar[index].kind == PCI_BAR_NONE);
    assert(size_bytes >= kinds[kind].smallest && size_bytes <= kinds[kind].largest && !(size_bytes & (size_bytes - 1)));
    function->bar[index] = (struct pci_bar){kind, size_bytes, ops, ctx, PCI_NOT_MAPPED};
    pci_set32(function->config, offset, kinds[kind].flags);
    pci_set32(function->write_mask, offset, (uint32_t)-size_bytes);
    if (kind == PCI_BAR_MEM64) {
        assert(function->bar[index + 1].kind == PCI_BAR_NONE);
        pci_set32(function->write_mask, offset + 4, (uint32_t)(-size_bytes >> 32));
    }
}

/* The address in a BAR's registers. */
static uint64_t bar_address(const struct pci_function *function, unsigned index)
{
    const struct pci_bar *bar = &function->bar[index];
    unsigned offset = PCI_BASE_ADDRESS + index * 4;
    uint64_t address = pci_get32(function, offset);

    if (bar->kind == PCI_BAR_MEM64)
        address |= (uint64_t)pci_get32(function, offset + 4) << 32;
    return address & -bar->size_bytes;
}

void pci_function_write_bar(struct pci_function *function, unsigned index, uint64_t address)
{
    unsigned offset = PCI_BASE_ADDRESS + index * 4;

    assert(!(address & (function->bar[index].size_bytes - 1)));
    pci_set32(function->config, offset, (uint32_t)address | (function->config[offset] & 0xF));
    if (function->bar[index].kind == PCI_BAR_MEM64)
        pci_set32(function->config, offset + 4, (uint32_t)(address >> 32));
}

/* Where the guest wants the BAR now. Zero means unassigned, as firmware and OSes take it. */
static uint64_t bar_target(const struct pci_function *function, unsigned index)
{
    const struct pci_bar *bar = &function->bar[index];
    uint64_t address;

    if (bar->kind == PCI_BAR_NONE)
        return PCI_NOT_MAPPED;
    if (!(pci_get16(function, PCI_COMMAND) & (bar->kind == PCI_BAR_PORT ? PCI_COMMAND_IO : PCI_COMMAND_MEMORY)))
        return PCI_NOT_MAPPED;
    address = bar_address(function, index);
    if (!address || (bar->kind == PCI_BAR_PORT && address + bar->size_bytes > 0x10000))
        return PCI_NOT_MAPPED;
    return address;
}

static void map_bar(struct pci_function *function, unsigned index, uint64_t target)
{
    struct pci_bar *bar = &function->bar[index];

    if (target == bar->mapped_at)
        return;
    /* Two things at one address is the guest's mistake; the one that was there stays. Retried at the next change. */
    if (bus_add(function->host->config.bus, bar_space(bar), target, bar->size_bytes, bar->ops, bar->ctx) == 0)
        bar->mapped_at = target;
    else
        LOG_GUEST(LOG_DEBUG, "pci %02x.0: BAR %u at 0x%llx overlaps something, not mapped", function->slot, index,
                  (unsigned long long)target);
}

void pci_host_remap(struct pci_host *host)
{
    for (int pass = 0; pass < 2; pass++) {
        for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
            struct pci_function *function = host->slots[slot];

            for (unsigned i = 0; function && i < PCI_BARS; i++) {
                uint64_t target = bar_target(function, i);

                if (pass == 0 && target != function->bar[i].mapped_at)
                    unmap_bar(function, &function->bar[i]);
                if (pass == 1 && target != PCI_NOT_MAPPED)
                    map_bar(function, i, target);
            }
        }
    }
}

unsigned pci_function_add_capability(struct pci_function *function, uint8_t id, unsigned size_bytes, const void *body, const void *write_mask)
{
    unsigned offset = function->capability_end, end;

    assert(size_bytes >= 2);
    end = (offset + size_bytes + 3) & ~3u;
    /* capability_end is a byte: the last four bytes of the space stay free. */
    if (size_bytes > PCI_CAPABILITIES_END || end >= PCI_CAPABILITIES_END)
        return 0;
    function->config[offset] = id;
    function->config[offset + 1] = function->config[PCI_CAPABILITIES_POINTER];
    function->config[PCI_CAPABILITIES_POINTER] = (uint8_t)offset;
    if (body)
        memcpy(function->config + offset + 2, body, size_bytes - 2);
    if (write_mask)
        memcpy(function->write_mask + offset + 2, write_mask, size_bytes - 2);
    pci_set16(function->config, PCI_STATUS, pci_get16(function, PCI_STATUS) | PCI_STATUS_CAPABILITIES);
    function->capability_end = (uint8_t)end;
    return offset;
}

static void update_intx(struct pci_function *function)
{
    bool level = pci_get16(function, PCI_STATUS) & PCI_STATUS_INTERRUPT;

    if (pci_get16(function, PCI_COMMAND) & PCI_COMMAND_INTX_DISABLE)
        level = false;
    irq_line_set(&function->intx, level && !pci_msix_enabled(function));
}

void pci_function_set_intx(struct pci_function *function, bool level)
{
    uint16_t status = pci_get16(function, PCI_STATUS);

    if (!function->config[PCI_INTERRUPT_PIN])
        return;
    status = level ? status | PCI_STATUS_INTERRUPT : status & ~PCI_STATUS_INTERRUPT;
    pci_set16(function->config, PCI_STATUS, status);
    update_intx(function);
}

bool pci_function_bus_master(const struct pci_function *function)
{
    return pci_get16(function, PCI_COMMAND) & PCI_COMMAND_BUS_MASTER;
}

uint32_t pci_function_config_read(struct pci_function *function, unsigned offset, unsigned size_bytes)
{
    uint32_t value = 0;

    assert(offset + size_bytes <= PCI_CONFIG_BYTES && size_bytes <= 4);
    if (function->ops && function->ops->config_reading)
        function->ops->config_reading(function->device, offset, size_bytes);
    memcpy(&value, function->config + offset, size_bytes);
    return value;
}

static bool touches(unsigned offset, unsigned size_bytes, unsigned first, unsigned end)
{
    return offset < end && offset + size_bytes > first;
}

void pci_function_config_write(struct pci_function *function, unsigned offset, unsigned size_bytes, uint32_t value)
{
    assert(offset + size_bytes <= PCI_CONFIG_BYTES && size_bytes <= 4);
    for (unsigned i = 0; i < size_bytes; i++) {
        uint8_t mask = function->write_mask[offset + i], byte = (uint8_t)(value >> (i * 8));

        function->config[offset + i] = (function->config[offset + i] & ~mask) | (byte & mask);
    }
    if (touches(offset, size_bytes, PCI_COMMAND, PCI_STATUS) ||
        touches(offset, size_bytes, PCI_BASE_ADDRESS, PCI_BASE_ADDRESS + PCI_BARS * 4))
        pci_host_remap(function->host);
    pci_msix_control_changed(function);
    update_intx(function);
    if (function->ops && function->ops->config_written)
        function->ops->config_written(function->device, offset, size_bytes);
}

void pci_function_reset(struct pci_function *function)
{
    pci_set16(function->config, PCI_COMMAND, 0);
    pci_set16(function->config, PCI_STATUS, pci_get16(function, PCI_STATUS) & ~PCI_STATUS_INTERRUPT);
    function->config[PCI_CACHE_LINE_SIZE] = 0;
    function->config[PCI_INTERRUPT_LINE] = 0;
    for (unsigned i = 0; i < PCI_BARS; i++) {
        if (function->bar[i].kind != PCI_BAR_NONE)
            pci_function_write_bar(function, i, 0);
    }
    pci_msix_reset(function);
    pci_host_remap(function->host);
    update_intx(function);
}

void pci_function_state(struct pci_function *function, struct state_io *io)
{
    uint8_t loaded[PCI_CONFIG_BYTES];

    memcpy(loaded, function->config, sizeof(loaded));
    state_bytes(io, loaded, sizeof(loaded));
    pci_msix_state(function, io);
    if (!state_loading(io) || state_failed(io))
        return;
    /* Only what a guest can change, so that a snapshot cannot give a function another identity or other BARs. */
    for (unsigned i = 0; i < PCI_CONFIG_BYTES; i++) {
        uint8_t mask = function->write_mask[i] | (i == PCI_STATUS ? PCI_STATUS_INTERRUPT : 0);

        function->config[i] = (function->config[i] & ~mask) | (loaded[i] & mask);
    }
    if (!function->config[PCI_INTERRUPT_PIN])
        function->config[PCI_STATUS] &= ~PCI_STATUS_INTERRUPT;
    pci_host_remap(function->host);
    pci_msix_control_changed(function);
    update_intx(function);
}
