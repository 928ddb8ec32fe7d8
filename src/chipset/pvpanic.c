/*
 * The panic device: reads say which events are understood, a write reports them. Invariants: none, it keeps nothing.
 * Threading: with the device lock held.
 */
#include "chipset/pvpanic.h"

#include <errno.h>
#include <stdlib.h>

#define PVPANIC_PANICKED 0x01
#define PVPANIC_CRASH_LOADED 0x02

struct pvpanic {
    struct pvpanic_config config;
};

static uint64_t pvpanic_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    return PVPANIC_PANICKED | PVPANIC_CRASH_LOADED;
}

static void pvpanic_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pvpanic *pvpanic = ctx;

    if ((value & (PVPANIC_PANICKED | PVPANIC_CRASH_LOADED)) && pvpanic->config.panicked)
        pvpanic->config.panicked(pvpanic->config.ctx, !(value & PVPANIC_PANICKED));
}

static const struct region_ops pvpanic_ops = {"pvpanic", pvpanic_read, pvpanic_write, 1, 1};

int pvpanic_create(struct pvpanic **out, const struct pvpanic_config *config)
{
    struct pvpanic *pvpanic = calloc(1, sizeof(*pvpanic));
    int rc;

    if (!pvpanic)
        return -ENOMEM;
    pvpanic->config = *config;
    rc = bus_add(config->bus, BUS_PORT, PVPANIC_PORT, 1, &pvpanic_ops, pvpanic);
    if (rc < 0) {
        free(pvpanic);
        return rc;
    }
    *out = pvpanic;
    return 0;
}

void pvpanic_destroy(struct pvpanic *pvpanic)
{
    if (!pvpanic)
        return;
    bus_remove(pvpanic->config.bus, BUS_PORT, PVPANIC_PORT, pvpanic);
    free(pvpanic);
}
