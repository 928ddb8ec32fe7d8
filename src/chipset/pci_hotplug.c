/*
 * See pci_hotplug.h. What the guest does not ask for is not undone: a function that it never lets go stays. Threading: with the device lock held.
 */
#include "chipset/pci_hotplug.h"

#include <errno.h>
#include <stdlib.h>

#include "chipset/chipset.h"

enum { REGISTER_INSERTED = 0, REGISTER_LEAVING = 4, REGISTER_EJECT = 8 };

struct pci_hotplug {
    struct pci_hotplug_config config;
    uint32_t inserted, leaving;
};

static uint64_t registers_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    const struct pci_hotplug *hotplug = ctx;

    return offset == REGISTER_INSERTED ? hotplug->inserted : offset == REGISTER_LEAVING ? hotplug->leaving : 0;
}

static void registers_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pci_hotplug *hotplug = ctx;

    if (offset == REGISTER_INSERTED) {
        hotplug->inserted &= ~(uint32_t)value;
    } else if (offset == REGISTER_LEAVING) {
        hotplug->leaving &= ~(uint32_t)value;
    } else if (offset == REGISTER_EJECT) {
        hotplug->leaving &= ~(uint32_t)value;
        hotplug->config.eject(hotplug->config.ctx, (uint32_t)value);
    }
}

static const struct region_ops registers_ops = {"pci-hotplug", registers_read, registers_write, 4, 4};

int pci_hotplug_create(struct pci_hotplug **out, const struct pci_hotplug_config *config)
{
    struct pci_hotplug *hotplug = calloc(1, sizeof(*hotplug));
    int rc;

    if (!hotplug)
        return -ENOMEM;
    hotplug->config = *config;
    rc = bus_add(config->bus, BUS_PORT, CHIPSET_HOTPLUG_PORT, CHIPSET_HOTPLUG_BYTES, &registers_ops, hotplug);
    if (rc < 0) {
        free(hotplug);
        return rc;
    }
    *out = hotplug;
    return 0;
}

void pci_hotplug_destroy(struct pci_hotplug *hotplug)
{
    if (!hotplug)
        return;
    bus_remove(hotplug->config.bus, BUS_PORT, CHIPSET_HOTPLUG_PORT, hotplug);
    free(hotplug);
}

void pci_hotplug_reset(struct pci_hotplug *hotplug)
{
    hotplug->inserted = hotplug->leaving = 0;
}

int pci_hotplug_state(struct pci_hotplug *hotplug, struct state_io *io)
{
    state_begin(io, "pci-hotplug", 1);
    state_u32(io, &hotplug->inserted);
    state_u32(io, &hotplug->leaving);
    return state_end(io);
}

void pci_hotplug_inserted(struct pci_hotplug *hotplug, unsigned slot)
{
    hotplug->inserted |= 1u << slot;
    pm_gpe_raise(hotplug->config.pm, CHIPSET_GPE_HOTPLUG);
}

void pci_hotplug_leaving(struct pci_hotplug *hotplug, unsigned slot)
{
    hotplug->leaving |= 1u << slot;
    pm_gpe_raise(hotplug->config.pm, CHIPSET_GPE_HOTPLUG);
}
