/*
 * The I/O APIC: 24 pins, each with a redirection entry, at CHIPSET_IOAPIC_BASE. Version 0x20: it has the EOI register.
 * Intel 82093AA data sheet; the EOI register as in the ICH9 data sheet, 13.5.
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_IOAPIC_H
#define DOPPEL_CHIPSET_IOAPIC_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"

struct ioapic;

struct ioapic_config {
    struct bus *bus;
    struct msi_target msi; /* lapic_msi_target */
    /* What a level-triggered pin sends now; data 0: the pin is not level-triggered. For those who watch for the ends of such interrupts; may be NULL. */
    void (*level_pin)(void *ctx, unsigned pin, uint64_t address, uint32_t data);
    void *level_ctx;
};

int ioapic_create(struct ioapic **ioapic, const struct ioapic_config *config) __attribute__((warn_unused_result));
void ioapic_reset(struct ioapic *ioapic); /* the pins keep their levels */
int ioapic_state(struct ioapic *ioapic, struct state_io *io) __attribute__((warn_unused_result));
void ioapic_destroy(struct ioapic *ioapic);
void ioapic_dump(const struct ioapic *ioapic, FILE *out);

/* Level of a pin, true: asserted, whatever polarity its entry names. Usable as irq_line.set. */
void ioapic_set_pin(void *ioapic, unsigned pin, bool level);

/* A processor's EOI broadcast for a level-triggered vector (lapic_ops.eoi). */
void ioapic_eoi(struct ioapic *ioapic, uint8_t vector);
/*
 * After loading: an interrupt that no processor has any more, requested or in service, was ended, and its EOI was on the way when the state was saved (it can wait in the host's kernel).
 */
void ioapic_end_unserved(struct ioapic *ioapic, bool (*served)(void *ctx, uint8_t vector), void *ctx);

#endif
