/*
 * 16550A (National PC16550D data sheet). Characters leave at once, so the transmitter is always empty; they arrive through uart_receive.
 *
 * Invariants: fifo_count <= 16, and <= 1 while the FIFOs are off; the interrupt line always shows what IIR would say. OUT2 does not
 * gate it as PC boards do: small kernels forget to set it and have been forgiven everywhere.
 * Threading: with the device lock held.
 */
#include "chipset/uart.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "state/inputs.h"

enum uart_register { RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR, UART_PORTS };

#define IER_RECEIVED 0x01
#define IER_TRANSMITTER 0x02
#define IER_LINE 0x04
#define IER_MODEM 0x08

#define IIR_NONE 0x01
#define IIR_MODEM 0x00
#define IIR_TRANSMITTER 0x02
#define IIR_RECEIVED 0x04
#define IIR_LINE 0x06
#define IIR_TIMEOUT 0x0C
#define IIR_FIFOS_ON 0xC0

#define FCR_ENABLE 0x01
#define FCR_CLEAR_RECEIVER 0x02

#define LCR_DLAB 0x80

#define MCR_DTR 0x01
#define MCR_RTS 0x02
#define MCR_OUT1 0x04
#define MCR_OUT2 0x08
#define MCR_LOOP 0x10

#define LSR_DATA_READY 0x01
#define LSR_OVERRUN 0x02
#define LSR_THR_EMPTY 0x20
#define LSR_TRANSMITTER_EMPTY 0x40

#define MSR_DELTA 0x0F
#define MSR_CTS 0x10
#define MSR_DSR 0x20
#define MSR_RI 0x40
#define MSR_DCD 0x80

#define FIFO_BYTES 16
/* Four character times at 115200 baud, the wait before the character timeout interrupt. */
#define TIMEOUT_NS 350000ull

struct uart {
    struct uart_config config;
    struct loop_timer *timer;

    uint8_t ier, fcr, lcr, mcr, msr, scr;
    uint16_t divisor;
    bool overrun;
    bool thr_interrupt; /* the transmitter became empty and nobody has seen it */
    bool timed_out;     /* characters below the trigger level wait in the FIFO */
    uint8_t fifo[FIFO_BYTES];
    uint8_t fifo_first, fifo_count;

    bool input_waits; /* uart_receive took less than it was offered */
};

static bool fifos_on(const struct uart *uart)
{
    return uart->fcr & FCR_ENABLE;
}

static unsigned capacity(const struct uart *uart)
{
    return fifos_on(uart) ? FIFO_BYTES : 1;
}

static unsigned trigger_level(const struct uart *uart)
{
    static const uint8_t levels[] = {1, 4, 8, 14};

    return fifos_on(uart) ? levels[uart->fcr >> 6] : 1;
}

/* Highest-priority interrupt (data sheet, table IV). */
static uint8_t interrupt_id(const struct uart *uart)
{
    if ((uart->ier & IER_LINE) && uart->overrun)
        return IIR_LINE;
    if ((uart->ier & IER_RECEIVED) && uart->fifo_count >= trigger_level(uart))
        return IIR_RECEIVED;
    if ((uart->ier & IER_RECEIVED) && uart->timed_out)
        return IIR_TIMEOUT;
    if ((uart->ier & IER_TRANSMITTER) && uart->thr_interrupt)
        return IIR_TRANSMITTER;
    if ((uart->ier & IER_MODEM) && (uart->msr & MSR_DELTA))
        return IIR_MODEM;
    return IIR_NONE;
}

static void update_irq(struct uart *uart)
{
    irq_line_set(&uart->config.irq, interrupt_id(uart) != IIR_NONE);
}

static void timeout(void *ctx)
{
    struct uart *uart = ctx;

    uart->timed_out = fifos_on(uart) && uart->fifo_count;
    update_irq(uart);
}

/* A character came or went: the wait for a timeout starts again, if there is anything to wait for. */
static void restart_timeout(struct uart *uart)
{
    uart->timed_out = false;
    if (!fifos_on(uart) || !uart->fifo_count) {
        if (uart->timer)
            loop_timer_disarm(uart->timer);
    } else if (uart->timer) {
        loop_timer_arm(uart->timer, inputs_now_ns() + TIMEOUT_NS);
    } else {
        uart->timed_out = true;
    }
}

static void fifo_put(struct uart *uart, uint8_t byte)
{
    uart->fifo[(uart->fifo_first + uart->fifo_count++) % FIFO_BYTES] = byte;
}

static void clear_receiver(struct uart *uart)
{
    uart->fifo_first = uart->fifo_count = 0;
    restart_timeout(uart);
}

static bool receives(const struct uart *uart)
{
    return !(uart->mcr & MCR_LOOP) && uart->fifo_count < capacity(uart);
}

/* After anything that may have made room. Last thing in a register access: the callback may come back with input. */
static void tell_ready(struct uart *uart)
{
    if (!uart->input_waits || !receives(uart))
        return;
    uart->input_waits = false;
    if (uart->config.ready)
        uart->config.ready(uart->config.ready_ctx);
}

size_t uart_receive(struct uart *uart, const uint8_t *data, size_t size_bytes)
{
    size_t taken = 0;

    while (taken < size_bytes && receives(uart))
        fifo_put(uart, data[taken++]);
    if (taken < size_bytes)
        uart->input_waits = true;
    if (taken) {
        restart_timeout(uart);
        update_irq(uart);
    }
    return taken;
}

/* The modem's lines: a willing peer, or in loopback our own outputs (data sheet, 8.6.7). */
static void update_modem(struct uart *uart)
{
    uint8_t lines = MSR_DCD | MSR_DSR | MSR_CTS, changed;

    if (uart->mcr & MCR_LOOP) {
        lines = (uart->mcr & MCR_DTR ? MSR_DSR : 0) | (uart->mcr & MCR_RTS ? MSR_CTS : 0) |
                (uart->mcr & MCR_OUT1 ? MSR_RI : 0) | (uart->mcr & MCR_OUT2 ? MSR_DCD : 0);
    }
    changed = (uart->msr ^ lines) & ~MSR_DELTA;
    /* Ring indicator counts its trailing edge only. */
    if (lines & MSR_RI)
        changed &= ~MSR_RI;
    uart->msr = lines | (uart->msr & MSR_DELTA) | changed >> 4;
}

static void transmit(struct uart *uart, uint8_t byte)
{
    /* The holding register fills and empties again: the line must show the edge. */
    uart->thr_interrupt = false;
    update_irq(uart);
    if (!(uart->mcr & MCR_LOOP)) {
        if (uart->config.sink.write)
            uart->config.sink.write(uart->config.sink.ctx, &byte, 1);
    } else if (uart->fifo_count < capacity(uart)) {
        fifo_put(uart, byte);
        restart_timeout(uart);
    } else {
        uart->overrun = true;
        if (!fifos_on(uart))
            uart->fifo[uart->fifo_first] = byte; /* the register is overwritten, a full FIFO is not */
    }
    uart->thr_interrupt = true;
}

static uint8_t read_data(struct uart *uart)
{
    uint8_t byte = uart->fifo[uart->fifo_first];

    if (uart->fifo_count) {
        uart->fifo_first = (uart->fifo_first + 1) % FIFO_BYTES;
        uart->fifo_count--;
        restart_timeout(uart);
    }
    return byte;
}

static uint8_t read_interrupt_id(struct uart *uart)
{
    uint8_t id = interrupt_id(uart);

    if (id == IIR_TRANSMITTER)
        uart->thr_interrupt = false;
    return id | (fifos_on(uart) ? IIR_FIFOS_ON : 0);
}

static uint8_t read_line_status(struct uart *uart)
{
    uint8_t value = LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY;

    value |= uart->fifo_count ? LSR_DATA_READY : 0;
    value |= uart->overrun ? LSR_OVERRUN : 0;
    uart->overrun = false;
    return value;
}

static uint64_t uart_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct uart *uart = ctx;
    bool dlab = uart->lcr & LCR_DLAB;
    uint8_t value = 0xFF;

    switch (offset) {
    case RBR_THR: value = dlab ? uart->divisor & 0xFF : read_data(uart); break;
    case IER: value = dlab ? uart->divisor >> 8 : uart->ier; break;
    case IIR_FCR: value = read_interrupt_id(uart); break;
    case LCR: value = uart->lcr; break;
    case MCR: value = uart->mcr; break;
    case LSR: value = read_line_status(uart); break;
    case MSR:
        value = uart->msr;
        uart->msr &= ~MSR_DELTA;
        break;
    case SCR: value = uart->scr; break;
    }
    update_irq(uart);
    tell_ready(uart);
    return value;
}

static void write_interrupt_enable(struct uart *uart, uint8_t value)
{
    /* Enabling it with the transmitter empty interrupts at once: drivers test for that. */
    if ((value & IER_TRANSMITTER) && !(uart->ier & IER_TRANSMITTER))
        uart->thr_interrupt = true;
    uart->ier = value & 0x0F;
}

static void write_fifo_control(struct uart *uart, uint8_t value)
{
    bool toggled = (value ^ uart->fcr) & FCR_ENABLE;

    /* The other bits can be programmed only together with the enable bit. */
    uart->fcr = value & FCR_ENABLE ? value & 0xC1 : 0;
    if (toggled || ((value & FCR_ENABLE) && (value & FCR_CLEAR_RECEIVER)))
        clear_receiver(uart);
}

static void uart_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t raw)
{
    struct uart *uart = ctx;
    uint8_t value = (uint8_t)raw;
    bool dlab = uart->lcr & LCR_DLAB;

    switch (offset) {
    case RBR_THR:
        if (dlab)
            uart->divisor = (uart->divisor & 0xFF00) | value;
        else
            transmit(uart, value);
        break;
    case IER:
        if (dlab)
            uart->divisor = (uint16_t)((uart->divisor & 0xFF) | value << 8);
        else
            write_interrupt_enable(uart, value);
        break;
    case IIR_FCR: write_fifo_control(uart, value); break;
    case LCR: uart->lcr = value; break;
    case MCR:
        uart->mcr = value & 0x1F;
        update_modem(uart);
        break;
    case SCR: uart->scr = value; break;
    }
    update_irq(uart);
    tell_ready(uart);
}

static const struct region_ops uart_ops = {"uart", uart_read, uart_write, 1, 1};

int uart_create(struct uart **out, const struct uart_config *config)
{
    struct uart *uart = calloc(1, sizeof(*uart));
    int rc;

    if (!uart)
        return -ENOMEM;
    uart->config = *config;
    rc = bus_add(config->bus, BUS_PORT, config->port, UART_PORTS, &uart_ops, uart);
    if (rc == 0 && config->loop) {
        uart->timer = loop_timer_create(config->loop, timeout, uart);
        rc = uart->timer ? 0 : -ENOMEM;
    }
    if (rc < 0) {
        uart_destroy(uart);
        return rc;
    }
    uart_reset(uart);
    *out = uart;
    return 0;
}

void uart_destroy(struct uart *uart)
{
    if (!uart)
        return;
    bus_remove(uart->config.bus, BUS_PORT, uart->config.port, uart);
    if (uart->timer)
        loop_timer_destroy(uart->timer);
    free(uart);
}

void uart_reset(struct uart *uart)
{
    uart->ier = uart->fcr = uart->lcr = uart->mcr = uart->scr = 0;
    uart->divisor = 12; /* 9600 baud, as firmware leaves it */
    uart->overrun = uart->thr_interrupt = false;
    clear_receiver(uart);
    update_modem(uart);
    uart->msr &= ~MSR_DELTA;
    update_irq(uart);
    tell_ready(uart);
}

int uart_state(struct uart *uart, struct state_io *io)
{
    state_begin(io, "uart", 1);
    state_u8(io, &uart->ier);
    state_u8(io, &uart->fcr);
    state_u8(io, &uart->lcr);
    state_u8(io, &uart->mcr);
    state_u8(io, &uart->msr);
    state_u8(io, &uart->scr);
    state_u16(io, &uart->divisor);
    state_bool(io, &uart->overrun);
    state_bool(io, &uart->thr_interrupt);
    state_bool(io, &uart->timed_out);
    state_bytes(io, uart->fifo, sizeof(uart->fifo));
    state_u8(io, &uart->fifo_first);
    state_u8(io, &uart->fifo_count);
    if (state_loading(io)) {
        bool timed_out = uart->timed_out;

        uart->ier &= 0x0F;
        uart->mcr &= 0x1F;
        uart->fcr &= 0xC1;
        if (uart->fifo_first >= FIFO_BYTES || uart->fifo_count > capacity(uart)) {
            uart->fifo_first = uart->fifo_count = 0;
            state_fail(io, "more characters than the FIFO holds");
        }
        restart_timeout(uart);
        uart->timed_out = timed_out && uart->fifo_count;
        update_irq(uart);
    }
    return state_end(io);
}
