/*
 * The keyboard controller at ports 0x60 and 0x64 with a keyboard that answers commands, and the fast A20/reset port 0x92.
 * The A20 gate is remembered and reads back, but address line 20 is never masked. Source: IBM PS/2 Technical Reference, keyboard/auxiliary controller.
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_I8042_H
#define DOPPEL_CHIPSET_I8042_H

#include <stddef.h>
#include <stdint.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"

struct i8042;

struct i8042_config {
    struct bus *bus;
    struct irq_line irq; /* CHIPSET_IRQ_KEYBOARD */
    /* The guest pulsed the processor's reset line (command 0xFE, port 0x92 bit 0). Device lock held. */
    void (*reset)(void *ctx);
    void *ctx;
};

/* What the guest did since the machine was made. Errors: commands that the controller does not know. */
struct i8042_counters {
    uint64_t reads, writes, resets, errors;
};

int i8042_create(struct i8042 **i8042, const struct i8042_config *config) __attribute__((warn_unused_result));
void i8042_destroy(struct i8042 *i8042);
void i8042_reset(struct i8042 *i8042);
int i8042_state(struct i8042 *i8042, struct state_io *io) __attribute__((warn_unused_result));
void i8042_get_counters(const struct i8042 *i8042, struct i8042_counters *counters);

/* Scan codes (set 2, as the keyboard sends them; translated to set 1 when the guest asked for that). Returns how many were taken. */
size_t i8042_key(struct i8042 *i8042, const uint8_t *scan_codes, size_t count);

#endif
