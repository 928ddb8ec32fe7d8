/*
 * The paravirtual panic device: a guest kernel that dies writes what happened to one port. Listed in the DSDT as QEMU0001, which Linux's
 * pvpanic driver binds to. Source: QEMU docs/specs/pvpanic. Stateless. Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_PVPANIC_H
#define DOPPEL_CHIPSET_PVPANIC_H

#include <stdbool.h>

#include "chipset/bus.h"

#define PVPANIC_PORT 0x505

struct pvpanic;

struct pvpanic_config {
    struct bus *bus;
    /* The guest reports a panic; crash_loaded: it goes on into a crash kernel by itself. Device lock held. */
    void (*panicked)(void *ctx, bool crash_loaded);
    void *ctx;
};

int pvpanic_create(struct pvpanic **pvpanic, const struct pvpanic_config *config) __attribute__((warn_unused_result));
void pvpanic_destroy(struct pvpanic *pvpanic);

#endif
