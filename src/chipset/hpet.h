/*
 * The high precision event timer at CHIPSET_HPET_BASE: a 64-bit counter at 100 MHz and three comparators, all able to repeat, with legacy
 * replacement (comparator 0 in place of the PIT, 1 in place of the RTC). No FSB delivery. IA-PC HPET specification 1.0a.
 * Threading: with the device lock held; the timers run on the loop, under its guard.
 */
#ifndef DOPPEL_CHIPSET_HPET_H
#define DOPPEL_CHIPSET_HPET_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/loop.h"

#define HPET_PIN_FIRST 20 /* comparators can be routed to I/O APIC pins 20..23 */
#define HPET_PINS 4

struct hpet;

struct hpet_config {
    struct bus *bus;
    struct loop *loop;
    struct irq_line pins[HPET_PINS];
    struct irq_line legacy[2]; /* ISA interrupts 0 and 8 */
    /* Legacy replacement goes on or off: pit_set_irq_enabled and rtc_set_irq_enabled with the opposite. */
    void (*legacy_changed)(void *ctx, bool replaced);
    void *ctx;
};

int hpet_create(struct hpet **hpet, const struct hpet_config *config) __attribute__((warn_unused_result));
void hpet_reset(struct hpet *hpet);
int hpet_state(struct hpet *hpet, struct state_io *io) __attribute__((warn_unused_result));
void hpet_destroy(struct hpet *hpet);
void hpet_dump(const struct hpet *hpet, FILE *out);

#endif
