/* The 8259 pair and the I/O APIC: command words, priorities, EOIs, redirection, state, and random accesses to every register. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "chipset/chipset.h"
#include "chipset/ioapic.h"
#include "chipset/pic.h"

struct rig {
    struct bus *bus;
    struct pic *pic;
    struct ioapic *ioapic;
    bool intr;
    int messages;
    uint64_t address;
    uint32_t data;
};

static void on_intr(void *ctx, unsigned pin, bool level)
{
    ((struct rig *)ctx)->intr = level;
}

static void on_message(void *ctx, uint64_t address, uint32_t data)
{
    struct rig *rig = ctx;
    rig->messages++;
    rig->address = address;
    rig->data = data;
}

static void out(struct rig *rig, uint16_t port, uint8_t value)
{
    bus_write(rig->bus, BUS_PORT, port, 1, value);
}

static uint8_t in(struct rig *rig, uint16_t port)
{
    return (uint8_t)bus_read(rig->bus, BUS_PORT, port, 1);
}

static void pic_init(struct rig *rig, uint8_t icw4)
{
    out(rig, 0x20, 0x11);
    out(rig, 0x21, 0x30);
    out(rig, 0x21, 0x04);
    out(rig, 0x21, icw4);
    out(rig, 0xA0, 0x11);
    out(rig, 0xA1, 0x38);
    out(rig, 0xA1, 0x02);
    out(rig, 0xA1, 0x01);
}

static int setup(void **state)
{
    static struct rig rig;
    memset(&rig, 0, sizeof(rig));
    rig.bus = bus_create();
    assert_non_null(rig.bus);
    struct pic_config pic = {.bus = rig.bus, .intr = {.set = on_intr, .ctx = &rig}};
    assert_int_equal(pic_create(&rig.pic, &pic), 0);
    struct ioapic_config ioapic = {.bus = rig.bus, .msi = {.send = on_message, .ctx = &rig}};
    assert_int_equal(ioapic_create(&rig.ioapic, &ioapic), 0);
    *state = &rig;
    return 0;
}

static int teardown(void **state)
{
    struct rig *rig = *state;
    ioapic_destroy(rig->ioapic);
    pic_destroy(rig->pic);
    assert_int_equal(bus_read(rig->bus, BUS_PORT, 0x21, 1), 0xff); /* gone from the bus */
    bus_destroy(rig->bus);
    return 0;
}

/* ---- 8259 ---- */

static void test_pic_basic(void **state)
{
    struct rig *rig = *state;
    pic_set_irq(rig->pic, 3, true);
    assert_false(rig->intr); /* all masked before it is initialised */
    pic_set_irq(rig->pic, 3, false);
    pic_init(rig, 0x01);
    assert_int_equal(in(rig, 0x21), 0);
    pic_set_irq(rig->pic, 5, true);
    assert_true(rig->intr);
    assert_int_equal(in(rig, 0x20), 0x20); /* IRR */
    assert_int_equal(pic_ack(rig->pic), 0x35);
    assert_false(rig->intr);
    out(rig, 0x20, 0x0B);
    assert_int_equal(in(rig, 0x20), 0x20); /* ISR */
    pic_set_irq(rig->pic, 6, true);
    assert_false(rig->intr); /* below the one in service */
    pic_set_irq(rig->pic, 1, true);
    assert_true(rig->intr); /* above */
    assert_int_equal(pic_ack(rig->pic), 0x31);
    out(rig, 0x20, 0x20); /* non-specific: the highest, 1 */
    assert_int_equal(in(rig, 0x20), 0x20);
    out(rig, 0x20, 0x65); /* specific: 5 */
    assert_int_equal(in(rig, 0x20), 0);
    assert_int_equal(pic_ack(rig->pic), 0x36);
    out(rig, 0x20, 0x20);
    assert_false(rig->intr); /* lines are still high, but an edge counts once */
    out(rig, 0x21, 0xff);
    pic_set_irq(rig->pic, 5, false);
    pic_set_irq(rig->pic, 5, true);
    assert_false(rig->intr);
    out(rig, 0x21, 0xdf);
    assert_true(rig->intr); /* latched while masked */
}

static void test_pic_slave_and_spurious(void **state)
{
    struct rig *rig = *state;
    pic_init(rig, 0x01);
    pic_set_irq(rig->pic, 12, true);
    assert_int_equal(pic_ack(rig->pic), 0x3C);
    pic_set_irq(rig->pic, 10, true);
    assert_false(rig->intr); /* the master's IR2 is in service */
    out(rig, 0xA0, 0x20);
    out(rig, 0x20, 0x20);
    assert_true(rig->intr);
    assert_int_equal(pic_ack(rig->pic), 0x3A);
    out(rig, 0xA0, 0x20);
    out(rig, 0x20, 0x20);

    pic_set_irq(rig->pic, 4, true);
    out(rig, 0x21, 0x10); /* masked between INT and INTA */
    assert_false(rig->intr);
    assert_int_equal(pic_ack(rig->pic), 0x37);
    out(rig, 0x20, 0x0B);
    assert_int_equal(in(rig, 0x20), 0); /* a spurious one is not in service */
    pic_set_irq(rig->pic, 2, true);     /* the cascade is no input */
    pic_set_irq(rig->pic, 99, true);
    assert_false(rig->intr);
}

static void test_pic_rotation(void **state)
{
    struct rig *rig = *state;
    pic_init(rig, 0x01);
    out(rig, 0x20, 0xC3); /* 3 is the lowest, 4 the highest */
    pic_set_irq(rig->pic, 1, true);
    pic_set_irq(rig->pic, 5, true);
    assert_int_equal(pic_ack(rig->pic), 0x35);
    out(rig, 0x20, 0xA0); /* rotate on non-specific EOI: 5 becomes the lowest */
    pic_set_irq(rig->pic, 5, false);
    pic_set_irq(rig->pic, 5, true);
    assert_int_equal(pic_ack(rig->pic), 0x31);
    out(rig, 0x20, 0xE1); /* rotate on specific EOI: 1 becomes the lowest */
    assert_int_equal(pic_ack(rig->pic), 0x35);
}

static void test_pic_special_mask(void **state)
{
    struct rig *rig = *state;
    pic_init(rig, 0x01);
    pic_set_irq(rig->pic, 1, true);
    assert_int_equal(pic_ack(rig->pic), 0x31);
    pic_set_irq(rig->pic, 6, true);
    assert_false(rig->intr);
    out(rig, 0x21, 0x02);
    out(rig, 0x20, 0x68); /* special mask mode */
    assert_true(rig->intr);
    assert_int_equal(pic_ack(rig->pic), 0x36);
    out(rig, 0x20, 0x20); /* skips the masked one */
    out(rig, 0x20, 0x0B);
    assert_int_equal(in(rig, 0x20), 0x02);
    out(rig, 0x20, 0x48);
    pic_set_irq(rig->pic, 7, true);
    assert_false(rig->intr);
}

static void test_pic_aeoi_and_poll(void **state)
{
    struct rig *rig = *state;
    pic_init(rig, 0x03);
    pic_set_irq(rig->pic, 4, true);
    assert_int_equal(pic_ack(rig->pic), 0x34);
    out(rig, 0x20, 0x0B);
    assert_int_equal(in(rig, 0x20), 0);
    out(rig, 0x20, 0x80); /* rotate in automatic EOI mode */
    pic_set_irq(rig->pic, 0, true);
    pic_set_irq(rig->pic, 1, true);
    assert_int_equal(pic_ack(rig->pic), 0x30);
    pic_set_irq(rig->pic, 0, false);
    pic_set_irq(rig->pic, 0, true);
    assert_int_equal(pic_ack(rig->pic), 0x31); /* 0 is now the lowest */

    pic_init(rig, 0x01);
    out(rig, 0x20, 0x0C);
    assert_int_equal(in(rig, 0x20), 0);
    pic_set_irq(rig->pic, 3, true);
    out(rig, 0x20, 0x0C);
    assert_int_equal(in(rig, 0x20), 0x83);
    assert_false(rig->intr);
    out(rig, 0x20, 0x0B);
    assert_int_equal(in(rig, 0x20), 0x08);
}

static void test_pic_level(void **state)
{
    struct rig *rig = *state;
    pic_init(rig, 0x01);
    out(rig, 0x4D0, 0xff);
    out(rig, 0x4D1, 0xff);
    assert_int_equal(in(rig, 0x4D0), 0xf8);
    assert_int_equal(in(rig, 0x4D1), 0xde);
    pic_set_irq(rig->pic, 11, true);
    for (int i = 0; i < 2; i++) { /* again as long as it is high */
        assert_int_equal(pic_ack(rig->pic), 0x3B);
        out(rig, 0xA0, 0x20);
        out(rig, 0x20, 0x20);
        assert_true(rig->intr);
    }
    pic_set_irq(rig->pic, 11, false);
    assert_false(rig->intr);
}

static void test_pic_state(void **state)
{
    struct rig *rig = *state;
    pic_init(rig, 0x01);
    out(rig, 0x21, 0x80);
    pic_set_irq(rig->pic, 9, true);
    assert_int_equal(pic_ack(rig->pic), 0x39);
    pic_set_irq(rig->pic, 1, true);
    struct state_io *writer = state_writer_create();
    assert_int_equal(pic_state(rig->pic, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);

    pic_set_irq(rig->pic, 1, false);
    pic_set_irq(rig->pic, 9, false);
    pic_reset(rig->pic);
    assert_false(rig->intr);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(pic_state(rig->pic, reader), 0);
    assert_true(rig->intr);
    assert_int_equal(in(rig, 0x21), 0x80);
    assert_int_equal(pic_ack(rig->pic), 0x31);
    out(rig, 0x20, 0x20);
    out(rig, 0xA0, 0x20);
    out(rig, 0x20, 0x20);
    assert_false(rig->intr);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

/* ---- I/O APIC ---- */

static void reg_write(struct rig *rig, uint8_t reg, uint32_t value)
{
    bus_write(rig->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE, 4, reg);
    bus_write(rig->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE + 0x10, 4, value);
}

static uint32_t reg_read(struct rig *rig, uint8_t reg)
{
    bus_write(rig->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE, 4, reg);
    return (uint32_t)bus_read(rig->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE + 0x10, 4);
}

static void test_ioapic_registers(void **state)
{
    struct rig *rig = *state;
    assert_int_equal(reg_read(rig, 1), 0x00170020);
    reg_write(rig, 0, 0xffffffff);
    assert_int_equal(reg_read(rig, 0), 0x0f000000);
    assert_int_equal(reg_read(rig, 0x10), 0x10000);
    reg_write(rig, 0x3E, 0xffffffff);
    reg_write(rig, 0x3F, 0xffffffff);
    assert_int_equal(reg_read(rig, 0x3E), 0x1afff);
    assert_int_equal(reg_read(rig, 0x3F), 0xff000000);
    reg_write(rig, 0x40, 1); /* beyond the pins */
    assert_int_equal(reg_read(rig, 0x40), 0);
    assert_int_equal(reg_read(rig, 0xff), 0);
    assert_int_equal(rig->messages, 0);
}

static bool is_0x50(void *ctx, uint8_t vector)
{
    return vector == 0x50;
}

/* An EOI that got lost on the way is made good; one that is still to come is waited for. */
static void test_ioapic_unserved(void **state)
{
    struct rig *rig = *state;
    reg_write(rig, 0x30, 0x8050); /* pins 16 and 17, level */
    reg_write(rig, 0x32, 0x8051);
    ioapic_set_pin(rig->ioapic, 16, true);
    ioapic_set_pin(rig->ioapic, 17, true);
    assert_int_equal(rig->messages, 2);
    ioapic_end_unserved(rig->ioapic, is_0x50, NULL);
    assert_int_equal(rig->messages, 3);
    assert_int_equal(rig->data & 0xff, 0x51);
    ioapic_set_pin(rig->ioapic, 17, false);
    ioapic_end_unserved(rig->ioapic, is_0x50, NULL);
    assert_int_equal(rig->messages, 3);
    assert_int_equal(reg_read(rig, 0x30), 0xC050);
    assert_int_equal(reg_read(rig, 0x32), 0x8051);
}

static void test_ioapic_edge(void **state)
{
    struct rig *rig = *state;
    ioapic_set_pin(rig->ioapic, 4, true);
    ioapic_set_pin(rig->ioapic, 4, false);
    reg_write(rig, 0x19, 0x03000000);
    reg_write(rig, 0x18, 0x0944); /* lowest priority, logical */
    assert_int_equal(rig->messages, 0); /* the edge came while masked */
    ioapic_set_pin(rig->ioapic, 4, true);
    ioapic_set_pin(rig->ioapic, 4, true);
    assert_int_equal(rig->messages, 1);
    assert_int_equal(rig->address, 0xFEE03004);
    assert_int_equal(rig->data, 0x4144);
    ioapic_set_pin(rig->ioapic, 4, false);
    ioapic_set_pin(rig->ioapic, 4, true);
    assert_int_equal(rig->messages, 2);
    ioapic_set_pin(rig->ioapic, 24, true);
    ioapic_set_pin(rig->ioapic, 4000, true);
    assert_int_equal(rig->messages, 2);
}

static void test_ioapic_level(void **state)
{
    struct rig *rig = *state;
    reg_write(rig, 0x30, 0x8050); /* pin 16 */
    ioapic_set_pin(rig->ioapic, 16, true);
    assert_int_equal(rig->messages, 1);
    assert_int_equal(rig->data, 0xC050);
    assert_int_equal(reg_read(rig, 0x30), 0xC050); /* remote IRR */
    ioapic_set_pin(rig->ioapic, 16, false);
    ioapic_set_pin(rig->ioapic, 16, true);
    assert_int_equal(rig->messages, 1);
    ioapic_eoi(rig->ioapic, 0x51);
    assert_int_equal(rig->messages, 1);
    ioapic_eoi(rig->ioapic, 0x50);
    assert_int_equal(rig->messages, 2); /* still high */
    ioapic_set_pin(rig->ioapic, 16, false);
    bus_write(rig->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE + 0x40, 4, 0x50);
    assert_int_equal(rig->messages, 2);
    assert_int_equal(reg_read(rig, 0x30), 0x8050);
    /* Masked while high: comes when unmasked. */
    reg_write(rig, 0x30, 0x18050);
    ioapic_set_pin(rig->ioapic, 16, true);
    assert_int_equal(rig->messages, 2);
    reg_write(rig, 0x30, 0x8050);
    assert_int_equal(rig->messages, 3);
    /* To edge and back, masked: what systems do in place of a lost EOI. */
    reg_write(rig, 0x30, 0x10050);
    reg_write(rig, 0x30, 0x18050);
    assert_int_equal(reg_read(rig, 0x30), 0x18050);
}

static void test_ioapic_state(void **state)
{
    struct rig *rig = *state;
    reg_write(rig, 0x31, 0x01000000);
    reg_write(rig, 0x30, 0x8050);
    ioapic_set_pin(rig->ioapic, 16, true);
    struct state_io *writer = state_writer_create();
    assert_int_equal(ioapic_state(rig->ioapic, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    ioapic_set_pin(rig->ioapic, 16, false);
    ioapic_reset(rig->ioapic);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(ioapic_state(rig->ioapic, reader), 0);
    state_io_destroy(reader);
    assert_int_equal(reg_read(rig, 0x30), 0xC050);
    ioapic_eoi(rig->ioapic, 0x50);
    assert_int_equal(rig->messages, 2);
    reader = state_reader_create(data, size - 20); /* cut short */
    assert_true(ioapic_state(rig->ioapic, reader) < 0);
    assert_int_equal(reg_read(rig, 0x30), 0x10000);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

/* ---- Anything at all ---- */

static uint64_t random_next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static void test_random_accesses(void **state)
{
    struct rig *rig = *state;
    static const uint16_t ports[] = {0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1};
    uint64_t seed = 88172645463325252ull;
    for (int i = 0; i < 60000; i++) {
        uint64_t r = random_next(&seed);
        unsigned size = 1u << (r >> 40 & 3);
        uint16_t port = ports[(r >> 8) % 6];
        uint64_t gpa = CHIPSET_IOAPIC_BASE + ((r >> 48 & 1) ? r >> 12 & 0xfff : (r >> 12 & 7) * 0x10);
        switch (r & 7) {
        case 0:
        case 1:
            bus_write(rig->bus, BUS_PORT, port, 1, r >> 16);
            break;
        case 2:
            bus_read(rig->bus, BUS_PORT, port, 1);
            break;
        case 3:
        case 4:
            bus_write(rig->bus, BUS_MMIO, gpa, size, (r & 256) ? r >> 20 : r >> 20 & 0x1f);
            break;
        case 5:
            bus_read(rig->bus, BUS_MMIO, gpa, size);
            break;
        case 6:
            pic_set_irq(rig->pic, r >> 16 & 31, r >> 24 & 1);
            ioapic_set_pin(rig->ioapic, r >> 16 & 31, r >> 24 & 1);
            break;
        default:
            if (rig->intr) {
                int vector = pic_ack(rig->pic);
                assert_true(vector >= 0 && vector <= 255);
            }
            ioapic_eoi(rig->ioapic, (uint8_t)(r >> 16));
        }
    }
    /* Whatever they ended in is a state that loads. */
    struct state_io *writer = state_writer_create();
    assert_int_equal(pic_state(rig->pic, writer), 0);
    assert_int_equal(ioapic_state(rig->ioapic, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(pic_state(rig->pic, reader), 0);
    assert_int_equal(ioapic_state(rig->ioapic, reader), 0);
    state_io_destroy(reader);
    state_io_destroy(writer);
    FILE *sink = fopen("/dev/null", "w");
    pic_dump(rig->pic, sink);
    ioapic_dump(rig->ioapic, sink);
    fclose(sink);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_pic_basic),        T(test_pic_slave_and_spurious), T(test_pic_rotation), T(test_pic_special_mask),
        T(test_pic_aeoi_and_poll), T(test_pic_level),             T(test_pic_state),    T(test_ioapic_registers),
        T(test_ioapic_edge),      T(test_ioapic_level),           T(test_ioapic_state), T(test_ioapic_unserved), T(test_random_accesses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
