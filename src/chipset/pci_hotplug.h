/*
 * The PCI hot-plug controller that the DSDT's methods drive: three doublewords of slots, one bit each, at CHIPSET_HOTPLUG_PORT.
 *
 *     0  inserted: functions that came; 4  leaving: functions that shall go. Writing ones clears.
 *     8  eject (written only): the OS has let go of these
 *
 * A general purpose event says that one of the first two has changed. Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_PCI_HOTPLUG_H
#define DOPPEL_CHIPSET_PCI_HOTPLUG_H

#include <stdint.h>

#include "chipset/bus.h"
#include "chipset/pm.h"
#include "state/state.h"

struct pci_hotplug;

struct pci_hotplug_config {
    struct bus *bus;
    struct pm *pm;
    void (*eject)(void *ctx, uint32_t slots); /* on the vCPU's thread that wrote it */
    void *ctx;
};

int pci_hotplug_create(struct pci_hotplug **hotplug, const struct pci_hotplug_config *config) __attribute__((warn_unused_result));
void pci_hotplug_destroy(struct pci_hotplug *hotplug);
void pci_hotplug_reset(struct pci_hotplug *hotplug);
int pci_hotplug_state(struct pci_hotplug *hotplug, struct state_io *io) __attribute__((warn_unused_result));

void pci_hotplug_inserted(struct pci_hotplug *hotplug, unsigned slot);
void pci_hotplug_leaving(struct pci_hotplug *hotplug, unsigned slot);

#endif
