/* The serial port: registers, FIFOs, interrupts, loopback, the wait for room, state. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/uart.h"

#define PORT 0x3F8
enum { DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR, FCR = IIR };

struct fixture {
    struct bus *bus;
    struct loop *loop;
    struct uart *uart;
    bool irq;
    unsigned edges;
    uint8_t output[64];
    size_t used;
    unsigned ready;
};

static void set_irq(void *ctx, unsigned pin, bool level)
{
    struct fixture *f = ctx;

    f->irq = level;
    f->edges += level;
}

static void take(void *ctx, const uint8_t *data, size_t size)
{
    struct fixture *f = ctx;

    for (size_t i = 0; i < size; i++)
        f->output[f->used++ % sizeof(f->output)] = data[i];
}

static void ready(void *ctx)
{
    ((struct fixture *)ctx)->ready++;
}

static int setup(void **state)
{
    struct fixture *f = calloc(1, sizeof(*f));
    struct uart_config config = {.port = PORT, .irq = {set_irq, f, 4, false}, .sink = {take, f}, .ready = ready, .ready_ctx = f};

    config.bus = f->bus = bus_create();
    assert_int_equal(loop_create(&f->loop, NULL), 0);
    config.loop = f->loop;
    assert_int_equal(uart_create(&f->uart, &config), 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;

    uart_destroy(f->uart);
    loop_destroy(f->loop);
    bus_destroy(f->bus);
    free(f);
    return 0;
}

static unsigned in(struct fixture *f, unsigned reg)
{
    return (unsigned)bus_read(f->bus, BUS_PORT, PORT + reg, 1);
}

static void out(struct fixture *f, unsigned reg, unsigned value)
{
    bus_write(f->bus, BUS_PORT, PORT + reg, 1, value);
}

static void test_registers(void **state)
{
    struct fixture *f = *state;

    out(f, SCR, 0x5A);
    assert_int_equal(in(f, SCR), 0x5A);
    out(f, IER, 0xFF);
    assert_int_equal(in(f, IER), 0x0F);
    out(f, LCR, 0x83);
    out(f, DATA, 1);
    out(f, IER, 2);
    assert_int_equal(in(f, DATA), 1);
    assert_int_equal(in(f, IER), 2);
    out(f, LCR, 3);
    assert_int_equal(in(f, IER), 0x0F);
    assert_int_equal(in(f, LSR), 0x60);
    assert_int_equal(in(f, MSR), 0xB0);
    assert_int_equal(in(f, IIR) & 0xC0, 0);
    out(f, FCR, 1);
    assert_int_equal(in(f, IIR) & 0xC0, 0xC0);
}

static void test_transmit(void **state)
{
    struct fixture *f = *state;

    out(f, DATA, 'a');
    assert_int_equal(f->used, 1);
    assert_int_equal(f->output[0], 'a');
    assert_false(f->irq);
    out(f, IER, 2); /* enabling interrupts at once */
    assert_true(f->irq);
    assert_int_equal(in(f, IIR), 2);
    assert_false(f->irq); /* reading IIR was the acknowledgement */
    assert_int_equal(in(f, IIR), 1);
    out(f, DATA, 'b');
    assert_true(f->irq);
    f->edges = 0;
    out(f, DATA, 'c'); /* one more edge although nobody read IIR */
    assert_int_equal(f->edges, 1);
    out(f, IER, 0);
    assert_false(f->irq);
}

static void test_receive(void **state)
{
    struct fixture *f = *state;

    out(f, IER, 1);
    assert_int_equal(uart_receive(f->uart, (const uint8_t *)"xy", 2), 1); /* no FIFO: one register */
    assert_true(f->irq);
    assert_int_equal(in(f, IIR), 4);
    assert_int_equal(f->ready, 0);
    assert_int_equal(in(f, LSR), 0x61);
    assert_int_equal(in(f, DATA), 'x');
    assert_int_equal(f->ready, 1);
    assert_false(f->irq);
    assert_int_equal(in(f, LSR), 0x60);
}

static void test_fifo(void **state)
{
    struct fixture *f = *state;

    out(f, FCR, 0x81); /* trigger at 8 */
    out(f, IER, 1);
    assert_int_equal(uart_receive(f->uart, (const uint8_t *)"1234567", 7), 7);
    assert_false(f->irq);
    assert_int_equal(uart_receive(f->uart, (const uint8_t *)"89abcdefghij", 12), 9);
    assert_int_equal(in(f, IIR), 0xC4);
    for (unsigned i = 0; i < 8; i++)
        assert_int_equal(in(f, DATA), "12345678"[i]);
    assert_int_equal(in(f, IIR), 0xC4);
    assert_int_equal(in(f, DATA), '9');
    assert_int_equal(in(f, IIR), 0xC1); /* below the level */
    for (unsigned i = 0; i < 100 && !f->irq; i++)
        loop_run_once(f->loop, 10); /* character timeout */
    assert_int_equal(in(f, IIR), 0xCC);
    assert_int_equal(in(f, DATA), 'a');
    assert_false(f->irq);
    out(f, FCR, 0x83);
    assert_int_equal(in(f, LSR), 0x60);
    assert_int_equal(uart_receive(f->uart, (const uint8_t *)"0123456789abcdefg", 17), 16);
    out(f, FCR, 0); /* switching the FIFOs clears them */
    assert_int_equal(in(f, LSR), 0x60);
}

static void test_loopback(void **state)
{
    struct fixture *f = *state;

    out(f, FCR, 1);
    out(f, MCR, 0x1A); /* the probe that Linux makes */
    assert_int_equal(in(f, MSR) & 0xF0, 0x90);
    assert_int_equal(uart_receive(f->uart, (const uint8_t *)"q", 1), 0);
    for (unsigned i = 0; i < 17; i++)
        out(f, DATA, 'A' + i);
    assert_int_equal(f->used, 0);
    assert_int_equal(in(f, LSR), 0x63); /* overrun, cleared by reading */
    assert_int_equal(in(f, LSR), 0x61);
    for (unsigned i = 0; i < 16; i++)
        assert_int_equal(in(f, DATA), 'A' + i);
    assert_int_equal(in(f, LSR), 0x60);
    out(f, IER, 8);
    in(f, MSR);
    out(f, MCR, 0x10);
    assert_true(f->irq);
    assert_int_equal(in(f, IIR), 0xC0);
    assert_int_equal(in(f, MSR), 0x09); /* CTS and DCD changed */
    assert_false(f->irq);
    f->ready = 0;
    out(f, MCR, 0);
    assert_int_equal(f->ready, 1); /* the character refused above may come now */
}

static void test_state(void **state)
{
    struct fixture *f = *state;
    struct state_io *writer = state_writer_create(), *reader;
    const void *data;
    size_t size;

    out(f, FCR, 0x41);
    out(f, IER, 5);
    out(f, SCR, 9);
    assert_int_equal(uart_receive(f->uart, (const uint8_t *)"hello", 5), 5);
    assert_int_equal(in(f, DATA), 'h');
    assert_int_equal(uart_state(f->uart, writer), 0);
    data = state_writer_data(writer, &size);
    uart_reset(f->uart);
    assert_false(f->irq);
    reader = state_reader_create(data, size);
    assert_int_equal(uart_state(f->uart, reader), 0);
    assert_true(f->irq);
    assert_int_equal(in(f, SCR), 9);
    for (unsigned i = 0; i < 4; i++)
        assert_int_equal(in(f, DATA), "ello"[i]);
    state_io_destroy(reader);
    reader = state_reader_create(data, size - 1);
    assert_true(uart_state(f->uart, reader) < 0);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void test_random_writes(void **state)
{
    struct fixture *f = *state;

    srand(11);
    for (unsigned i = 0; i < 50000; i++) {
        switch (rand() % 3) {
        case 0: out(f, (unsigned)rand() % 8, (unsigned)rand() & 0xFF); break;
        case 1: in(f, (unsigned)rand() % 8); break;
        default: assert_true(uart_receive(f->uart, (const uint8_t *)"abcdefghijklmnopqrst", (size_t)rand() % 20) <= 16);
        }
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_registers), TEST(test_transmit), TEST(test_receive),       TEST(test_fifo),
        TEST(test_loopback),  TEST(test_state),    TEST(test_random_writes),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
