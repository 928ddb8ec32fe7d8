/*
 * The 8259A pair: master at ports 0x20/0x21, slave at 0xA0/0xA1 behind IR2, edge/level control at 0x4D0/0x4D1.
 * Intel 8259A data sheet; the ELCR as in the PIIX4 data sheet, 4.2.4.
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_PIC_H
#define DOPPEL_CHIPSET_PIC_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"

struct pic;

struct pic_config {
    struct bus *bus;
    struct irq_line intr; /* the master's INT output: lapic_set_extint */
};

/* The result is in its reset state and registered on the bus. -ENOMEM, or what bus_add returns. */
int pic_create(struct pic **pic, const struct pic_config *config) __attribute__((warn_unused_result));
void pic_reset(struct pic *pic); /* power-on; the input lines keep their levels */
int pic_state(struct pic *pic, struct state_io *io) __attribute__((warn_unused_result));
void pic_destroy(struct pic *pic);
void pic_dump(const struct pic *pic, FILE *out);

/* Level of ISA interrupt `irq`, 0..15 (2 is the cascade and ignored). Usable as irq_line.set. */
void pic_set_irq(void *pic, unsigned irq, bool level);

/* The processor's INTA cycle: returns the vector, 0..255. When the request has gone meanwhile that is the spurious vector (IR7). */
int pic_ack(struct pic *pic);

#endif
