/*
 * ACPI fixed hardware (ACPI 6.4, 4.8.3): PM1a event and control registers, the PM timer, the power button, S5; and the reset register at
 * 0xCF9. The register blocks are at the ports of chipset.h. Time comes from inputs_now_ns. Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_PM_H
#define DOPPEL_CHIPSET_PM_H

#include <stdint.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/loop.h"

#define PM_TIMER_HZ 3579545u

struct pm;

struct pm_config {
    struct bus *bus;
    struct loop *loop;
    struct irq_line sci; /* CHIPSET_SCI_IRQ */
    /* The guest entered S5, or wrote the reset register. Device lock held. */
    void (*power_off)(void *ctx);
    void (*reset)(void *ctx);
    void *ctx;
};

int pm_create(struct pm **pm, const struct pm_config *config) __attribute__((warn_unused_result));
void pm_destroy(struct pm *pm);
void pm_reset(struct pm *pm);
int pm_state(struct pm *pm, struct state_io *io) __attribute__((warn_unused_result));

/* The user pressed the power button: PWRBTN_STS, and the SCI when enabled. */
void pm_power_button(struct pm *pm);

/* A general purpose event happened (4.8.4): its status bit, and the SCI when enabled. */
void pm_gpe_raise(struct pm *pm, unsigned bit);

/* Port 0xCF9 (ctx: struct pm *). It lies inside the PCI bridge's 0xCF8..0xCFB, so the bridge passes bytes on: pci_host_config.cf9. */
extern const struct region_ops pm_reset_port_ops;

#endif
