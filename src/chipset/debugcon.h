/*
 * Two ports for early messages: the console at 0xE9 that firmware and kernels print to byte by byte (reads give 0xE9 so that it can
 * be found), and the POST code at 0x80, which is swallowed. Stateless. Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_DEBUGCON_H
#define DOPPEL_CHIPSET_DEBUGCON_H

#include "chipset/bus.h"
#include "chipset/uart.h"

#define DEBUGCON_PORT 0xE9

struct debugcon;

struct debugcon_config {
    struct bus *bus;
    struct uart_sink sink; /* write may be NULL: characters vanish */
};

int debugcon_create(struct debugcon **debugcon, const struct debugcon_config *config) __attribute__((warn_unused_result));
void debugcon_destroy(struct debugcon *debugcon);

#endif
