/*
 * A 16550A serial port: all registers, both FIFOs, interrupts, loopback. No pacing: a byte written is out at once, whatever the divisor
 * says. Source: National PC16550D data sheet. Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_UART_H
#define DOPPEL_CHIPSET_UART_H

#include <stddef.h>
#include <stdint.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/loop.h"

#define UART_COM1_PORT 0x3F8
#define UART_COM2_PORT 0x2F8

/* Where a guest's characters go. Must not block for long: called with the device lock held. */
struct uart_sink {
    void (*write)(void *ctx, const uint8_t *data, size_t size_bytes);
    void *ctx;
};

struct uart;

struct uart_config {
    struct bus *bus;
    struct loop *loop; /* for the character timeout interrupt; NULL: it comes at once */
    uint16_t port;     /* 8 ports */
    struct irq_line irq;
    struct uart_sink sink;
    /* There is room for input again after uart_receive took less than offered. Optional. May call uart_receive. */
    void (*ready)(void *ctx);
    void *ready_ctx;
};

int uart_create(struct uart **uart, const struct uart_config *config) __attribute__((warn_unused_result));
void uart_destroy(struct uart *uart);
void uart_reset(struct uart *uart);
int uart_state(struct uart *uart, struct state_io *io) __attribute__((warn_unused_result));

/* Characters arriving from outside. Takes what fits in the receiver and returns how many. */
size_t uart_receive(struct uart *uart, const uint8_t *data, size_t size_bytes);

#endif
