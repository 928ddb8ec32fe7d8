/*
 * The 8254 interval timer at ports 0x40..0x43 and the system control port 0x61 (gate and output of counter 2, refresh toggle).
 * Intel 8254 data sheet; port 0x61 as in the PIIX4 data sheet, 4.2.3. Counter 0 drives ISA interrupt 0.
 * Threading: with the device lock held; the timer runs on the loop, under its guard.
 */
#ifndef DOPPEL_CHIPSET_PIT_H
#define DOPPEL_CHIPSET_PIT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/loop.h"

#define PIT_HZ 1193182u

struct pit;

struct pit_config {
    struct bus *bus;
    struct loop *loop;
    struct irq_line irq; /* output of counter 0 */
};

int pit_create(struct pit **pit, const struct pit_config *config) __attribute__((warn_unused_result));
void pit_reset(struct pit *pit);
int pit_state(struct pit *pit, struct state_io *io) __attribute__((warn_unused_result));
void pit_destroy(struct pit *pit);
void pit_dump(const struct pit *pit, FILE *out);

/* While an HPET replaces the legacy interrupts, counter 0 does not reach its line. */
void pit_set_irq_enabled(struct pit *pit, bool enabled);

#endif
