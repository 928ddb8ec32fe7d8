/* The interval timer with port 0x61, the real-time clock and the HPET: registers, interrupts in real time, state, random accesses. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "chipset/chipset.h"
#include "chipset/hpet.h"
#include "chipset/pit.h"
#include "chipset/rtc.h"
#include "state/inputs.h"

#define MS 1000000ull
#define MIB (1024ull * 1024)

struct rig {
    struct bus *bus;
    struct loop *loop;
    struct pit *pit;
    struct rtc *rtc;
    struct hpet *hpet;
    bool legacy;
    bool level[8]; /* PIT, RTC; HPET: pins 20..23, ISA 0, ISA 8 */
    int rises[8];
};

static void on_irq(void *ctx, unsigned pin, bool level)
{
    struct rig *rig = ctx;
    rig->level[pin] = level;
    rig->rises[pin] += level;
}

static void on_legacy(void *ctx, bool replaced)
{
    ((struct rig *)ctx)->legacy = replaced;
}

static void out(struct rig *rig, uint16_t port, uint8_t value)
{
    bus_write(rig->bus, BUS_PORT, port, 1, value);
}

static uint8_t in(struct rig *rig, uint16_t port)
{
    return (uint8_t)bus_read(rig->bus, BUS_PORT, port, 1);
}

static int setup(void **state)
{
    static struct rig rig;
    memset(&rig, 0, sizeof(rig));
    rig.bus = bus_create();
    assert_int_equal(loop_create(&rig.loop, NULL), 0);
    struct pit_config pit = {.bus = rig.bus, .loop = rig.loop, .irq = {.set = on_irq, .ctx = &rig, .pin = 0}};
    assert_int_equal(pit_create(&rig.pit, &pit), 0);
    struct rtc_config rtc = {.bus = rig.bus, .loop = rig.loop, .irq = {.set = on_irq, .ctx = &rig, .pin = 1},
                             .ram_low_bytes = 512 * MIB, .ram_high_bytes = 3 * 65536};
    assert_int_equal(rtc_create(&rig.rtc, &rtc), 0);
    struct hpet_config hpet = {.bus = rig.bus, .loop = rig.loop, .legacy_changed = on_legacy, .ctx = &rig};
    for (unsigned i = 0; i < 6; i++)
        *(i < 4 ? &hpet.pins[i] : &hpet.legacy[i - 4]) = (struct irq_line){.set = on_irq, .ctx = &rig, .pin = 2 + i};
    assert_int_equal(hpet_create(&rig.hpet, &hpet), 0);
    *state = &rig;
    return 0;
}

static int teardown(void **state)
{
    struct rig *rig = *state;
    hpet_destroy(rig->hpet);
    rtc_destroy(rig->rtc);
    pit_destroy(rig->pit);
    loop_destroy(rig->loop);
    bus_destroy(rig->bus);
    return 0;
}

static void run_for(struct rig *rig, uint64_t ns)
{
    uint64_t end = inputs_now_ns() + ns;
    for (uint64_t now; (now = inputs_now_ns()) < end;)
        loop_run_once(rig->loop, (int)((end - now) / MS) + 1);
}

/* ---- 8254 ---- */

static unsigned read_count(struct rig *rig, unsigned counter)
{
    out(rig, 0x43, (uint8_t)(counter << 6)); /* latch */
    unsigned low = in(rig, 0x40 + counter);
    return low | in(rig, 0x40 + counter) << 8;
}

static void test_pit_periodic(void **state)
{
    struct rig *rig = *state;
    run_for(rig, 2 * MS);
    assert_int_equal(rig->rises[0], 0); /* silent until programmed */
    out(rig, 0x43, 0x34); /* counter 0, both bytes, mode 2 */
    int rises = rig->rises[0];
    uint64_t start = inputs_now_ns();
    out(rig, 0x40, 1193 & 0xff); /* about 1 ms */
    out(rig, 0x40, 1193 >> 8);
    unsigned count = read_count(rig, 0);
    assert_true(count > 0 && count <= 1193);
    while (rig->rises[0] < rises + 5)
        loop_run_once(rig->loop, 100);
    assert_true(inputs_now_ns() - start >= 1193ull * 5 * 1000000000 / PIT_HZ);
    pit_set_irq_enabled(rig->pit, false);
    assert_false(rig->level[0]);
    rises = rig->rises[0];
    run_for(rig, 3 * MS);
    assert_int_equal(rig->rises[0], rises);
    pit_set_irq_enabled(rig->pit, true);
    assert_true(rig->level[0]);
}

static void test_pit_no_storm(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x43, 0x14); /* counter 0, low byte, mode 2 */
    out(rig, 0x40, 2);
    int rises = rig->rises[0];
    run_for(rig, 5 * MS);
    assert_true(rig->rises[0] > rises && rig->rises[0] - rises < 120);
}

static void test_pit_one_shot(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x43, 0x30); /* mode 0 */
    assert_false(rig->level[0]);
    out(rig, 0x40, 0x00);
    out(rig, 0x40, 0x40); /* 16384 clocks: 14 ms */
    assert_false(rig->level[0]);
    run_for(rig, 16 * MS);
    assert_true(rig->level[0]);
    assert_int_equal(rig->rises[0], 1);
    out(rig, 0x40, 0x00); /* the first byte lowers the output and stops the counter */
    assert_false(rig->level[0]);
    run_for(rig, 3 * MS);
    assert_false(rig->level[0]);
}

static void test_pit_counter2_and_port61(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x61, 0x00);
    out(rig, 0x43, 0xB0); /* counter 2, mode 0 */
    out(rig, 0x42, 0x00);
    out(rig, 0x42, 0x08);
    run_for(rig, 3 * MS);
    assert_int_equal(in(rig, 0x61) & 0x20, 0); /* the gate is closed */
    assert_int_equal(read_count(rig, 2), 0x0800);
    out(rig, 0x61, 0xF1);
    assert_int_equal(in(rig, 0x61) & 0xCF, 0x01);
    run_for(rig, 1 * MS);
    out(rig, 0x61, 0x00); /* closed again: it stands still */
    unsigned count = read_count(rig, 2);
    run_for(rig, 1 * MS);
    assert_int_equal(read_count(rig, 2), count);
    out(rig, 0x61, 0x01);
    run_for(rig, 3 * MS);
    assert_int_equal(in(rig, 0x61) & 0x20, 0x20);
    /* The refresh bit moves. */
    unsigned seen = 0;
    for (int i = 0; i < 100000 && seen != 3; i++)
        seen |= (in(rig, 0x61) & 0x10) ? 2 : 1;
    assert_int_equal(seen, 3);
    /* Mode 1: the gate's rise triggers. */
    out(rig, 0x61, 0x00);
    out(rig, 0x43, 0xB2);
    out(rig, 0x42, 0x00);
    out(rig, 0x42, 0x40);
    assert_int_equal(in(rig, 0x61) & 0x20, 0x20);
    out(rig, 0x61, 0x01);
    assert_int_equal(in(rig, 0x61) & 0x20, 0);
    run_for(rig, 16 * MS);
    assert_int_equal(in(rig, 0x61) & 0x20, 0x20);
}

static void test_pit_latches(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x61, 0x00);
    out(rig, 0x43, 0xB1); /* counter 2, both bytes, mode 0, BCD; gate closed, so the count stands */
    out(rig, 0x43, 0xE8); /* read back the status of counter 2 */
    assert_int_equal(in(rig, 0x42), 0x71); /* null count */
    out(rig, 0x42, 0x34);
    out(rig, 0x42, 0x12);
    assert_int_equal(in(rig, 0x42), 0x34);
    assert_int_equal(in(rig, 0x42), 0x12);
    out(rig, 0x43, 0xC8); /* status and count: status first */
    out(rig, 0x43, 0xE8); /* a second status latch is ignored */
    assert_int_equal(in(rig, 0x42), 0x31);
    assert_int_equal(in(rig, 0x42), 0x34);
    assert_int_equal(in(rig, 0x42), 0x12);
    out(rig, 0x43, 0x80);
    out(rig, 0x42, 0x99);
    out(rig, 0x42, 0x99);
    assert_int_equal(in(rig, 0x42), 0x34); /* latched before the write */
    assert_int_equal(in(rig, 0x42), 0x12);
    assert_int_equal(in(rig, 0x42), 0x99);
    assert_int_equal(in(rig, 0x43), 0xff);
    out(rig, 0x43, 0xBE); /* mode 7 is mode 3 */
    out(rig, 0x43, 0xE8);
    assert_int_equal(in(rig, 0x42), 0xF6);
}

static void test_pit_reload_at_round_end(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x61, 0x01);
    out(rig, 0x43, 0xB4); /* counter 2, mode 2 */
    out(rig, 0x42, 0x00);
    out(rig, 0x42, 0x40); /* 16384 clocks: 14 ms */
    out(rig, 0x42, 0x10);
    out(rig, 0x42, 0x00); /* then 16 */
    assert_true(read_count(rig, 2) > 16);
    out(rig, 0x43, 0xE8);
    assert_int_equal(in(rig, 0x42) & 0x40, 0x40);
    run_for(rig, 16 * MS);
    for (int i = 0; i < 50; i++) {
        unsigned count = read_count(rig, 2);
        assert_true(count >= 1 && count <= 16);
    }
}

static void test_pit_state(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x43, 0x34);
    out(rig, 0x40, 0x00);
    out(rig, 0x40, 0x20); /* 6.9 ms */
    out(rig, 0x61, 0x03);
    out(rig, 0x43, 0xB6);
    out(rig, 0x42, 0x00);
    out(rig, 0x42, 0x80);
    out(rig, 0x43, 0x80);
    struct state_io *writer = state_writer_create();
    assert_int_equal(pit_state(rig->pit, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    unsigned latched = in(rig, 0x42);
    pit_reset(rig->pit);
    assert_false(rig->level[0]);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(pit_state(rig->pit, reader), 0);
    assert_true(rig->level[0]);
    assert_int_equal(in(rig, 0x42), latched);
    assert_int_equal(in(rig, 0x61) & 0x0f, 0x03);
    int rises = rig->rises[0];
    run_for(rig, 9 * MS);
    assert_true(rig->rises[0] > rises);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

/* ---- MC146818 ---- */

static uint8_t cmos(struct rig *rig, uint8_t index)
{
    out(rig, 0x70, index);
    return in(rig, 0x71);
}

static void cmos_set(struct rig *rig, uint8_t index, uint8_t value)
{
    out(rig, 0x70, index);
    out(rig, 0x71, value);
}

static unsigned bcd(unsigned value)
{
    return (value >> 4) * 10 + (value & 15);
}

static void test_rtc_time(void **state)
{
    struct rig *rig = *state;
    time_t now = time(NULL);
    struct tm tm;
    gmtime_r(&now, &tm);
    unsigned year = bcd(cmos(rig, 0x32)) * 100 + bcd(cmos(rig, 9));
    long days = (long)(year - 1900 - tm.tm_year) * 365 + ((int)bcd(cmos(rig, 8)) - 1 - tm.tm_mon) * 30;
    assert_true(labs(days) <= 1 || tm.tm_mday > 27 || tm.tm_mday < 2);
    long seconds = bcd(cmos(rig, 4)) * 3600 + bcd(cmos(rig, 2)) * 60 + bcd(cmos(rig, 0));
    long off = labs(seconds - (tm.tm_hour * 3600 + tm.tm_min * 60 + tm.tm_sec));
    assert_true(off <= 2 || off >= 86398);
    assert_int_equal(cmos(rig, 0x0D), 0x80);
    assert_int_equal(cmos(rig, 0x0B), 0x02);
    assert_int_equal(cmos(rig, 0x0A) & 0x7f, 0x26);
}

static void set_time(struct rig *rig, const uint8_t bytes[7]) /* century, year, month, day, hour, minute, second */
{
    static const uint8_t index[] = {0x32, 9, 8, 7, 4, 2, 0};
    uint8_t b = cmos(rig, 0x0B);
    cmos_set(rig, 0x0B, b | 0x80);
    for (int i = 0; i < 7; i++)
        cmos_set(rig, index[i], bytes[i]);
    for (int i = 0; i < 7; i++)
        assert_int_equal(cmos(rig, index[i]), bytes[i]); /* frozen */
    cmos_set(rig, 0x0B, b);
}

static void test_rtc_set_and_formats(void **state)
{
    struct rig *rig = *state;
    set_time(rig, (const uint8_t[]){0x20, 0x24, 0x02, 0x29, 0x23, 0x15, 0x40});
    assert_int_equal(cmos(rig, 7), 0x29);
    assert_int_equal(cmos(rig, 6), 0x05); /* a Thursday */
    assert_int_equal(cmos(rig, 4), 0x23);
    cmos_set(rig, 0x0B, 0x06); /* binary: reads change, the time does not */
    assert_int_equal(cmos(rig, 4), 23);
    assert_int_equal(cmos(rig, 0x32), 20);
    cmos_set(rig, 0x0B, 0x00); /* BCD, 12 hours */
    assert_int_equal(cmos(rig, 4), 0x91);
    cmos_set(rig, 4, 0x12); /* without SET: midnight, at once */
    cmos_set(rig, 0x0B, 0x02);
    assert_int_equal(cmos(rig, 4), 0x00);
    set_time(rig, (const uint8_t[]){0x19, 0x03, 0x03, 0x01, 0x12, 0x00, 0x00});
    assert_int_equal(cmos(rig, 7), 0x01);
    assert_int_equal(cmos(rig, 8), 0x03);
    assert_int_equal(cmos(rig, 0x32), 0x19);
    assert_int_equal(cmos(rig, 6), 0x01); /* 1 March 1903 was a Sunday */
    cmos_set(rig, 0x0B, 0x82);
    for (int i = 0; i < 10; i++)
        cmos_set(rig, (uint8_t)i, 0xff); /* nonsense gives some time */
    cmos_set(rig, 0x32, 0xff);
    cmos_set(rig, 0x0B, 0x02);
    assert_true(bcd(cmos(rig, 8)) >= 1 && bcd(cmos(rig, 8)) <= 12);
    assert_true(bcd(cmos(rig, 7)) >= 1 && bcd(cmos(rig, 7)) <= 31);
}

static void test_rtc_periodic(void **state)
{
    struct rig *rig = *state;
    run_for(rig, 2 * MS);
    assert_int_equal(cmos(rig, 0x0C) & 0x80, 0);
    cmos_set(rig, 0x0B, 0x42);
    for (int i = 1; i <= 4; i++) {
        while (rig->rises[1] < i)
            loop_run_once(rig->loop, 100);
        assert_true(rig->level[1]);
        assert_int_equal(cmos(rig, 0x0C) & 0xC0, 0xC0);
        assert_false(rig->level[1]);
        assert_int_equal(cmos(rig, 0x0C) & 0xC0, 0);
    }
    run_for(rig, 3 * MS); /* unread: one interrupt only */
    assert_int_equal(rig->rises[1], 5);
    cmos_set(rig, 0x0B, 0x02);
    assert_false(rig->level[1]);
    cmos(rig, 0x0C);
    cmos_set(rig, 0x0A, 0x20); /* no rate */
    cmos_set(rig, 0x0B, 0x42);
    run_for(rig, 2 * MS);
    assert_int_equal(rig->rises[1], 5);
}

static void test_rtc_update_and_alarm(void **state)
{
    struct rig *rig = *state;
    /* Letting the divider go brings the first update half a second later. */
    cmos_set(rig, 0x0A, 0x76);
    cmos_set(rig, 4, 0x23);
    cmos_set(rig, 2, 0x59);
    cmos_set(rig, 0, 0x59);
    cmos_set(rig, 1, 0x00);
    cmos_set(rig, 3, 0xC0);
    cmos_set(rig, 5, 0x00);
    cmos_set(rig, 0x0B, 0x32);
    uint64_t start = inputs_now_ns();
    cmos_set(rig, 0x0A, 0x26);
    cmos(rig, 0x0C);
    while (!rig->level[1] && inputs_now_ns() < start + 2000 * MS)
        loop_run_once(rig->loop, 100);
    uint64_t took = inputs_now_ns() - start;
    assert_true(took >= 499 * MS && took < 900 * MS);
    assert_int_equal(cmos(rig, 0x0C), 0xF0);
    assert_int_equal(cmos(rig, 4), 0);
    cmos_set(rig, 0x0B, 0xB2); /* SET clears UIE */
    assert_int_equal(cmos(rig, 0x0B), 0xA2);
}

static void test_rtc_cmos(void **state)
{
    struct rig *rig = *state;
    assert_int_equal(cmos(rig, 0x15) | cmos(rig, 0x16) << 8, 640);
    assert_int_equal(cmos(rig, 0x17) | cmos(rig, 0x18) << 8, 65535);
    assert_int_equal(cmos(rig, 0x34) | cmos(rig, 0x35) << 8, 496 * 16);
    assert_int_equal(cmos(rig, 0x5B) | cmos(rig, 0x5C) << 8 | cmos(rig, 0x5D) << 16, 3);
    assert_false(rtc_nmi_masked(rig->rtc));
    cmos_set(rig, 0x8F, 0x0A);
    assert_true(rtc_nmi_masked(rig->rtc));
    assert_int_equal(cmos(rig, 0x0F), 0x0A);
    assert_false(rtc_nmi_masked(rig->rtc));
    rtc_reset(rig->rtc);
    assert_int_equal(cmos(rig, 0x0F), 0x0A); /* the battery keeps it */
    cmos_set(rig, 0x0D, 0);
    assert_int_equal(cmos(rig, 0x0D), 0x80);
}

static void test_rtc_state(void **state)
{
    struct rig *rig = *state;
    set_time(rig, (const uint8_t[]){0x20, 0x01, 0x12, 0x31, 0x10, 0x00, 0x00});
    cmos_set(rig, 0x40, 0xA5);
    cmos_set(rig, 0x0B, 0x42);
    run_for(rig, 3 * MS);
    assert_true(rig->level[1]);
    struct state_io *writer = state_writer_create();
    assert_int_equal(rtc_state(rig->rtc, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    cmos_set(rig, 0x40, 0);
    rtc_reset(rig->rtc);
    set_time(rig, (const uint8_t[]){0x20, 0x30, 0x06, 0x01, 0x10, 0x00, 0x00});
    assert_false(rig->level[1]);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(rtc_state(rig->rtc, reader), 0);
    assert_true(rig->level[1]);
    assert_int_equal(cmos(rig, 0x40), 0xA5);
    assert_int_equal(cmos(rig, 9), 0x01);
    assert_int_equal(cmos(rig, 7), 0x31);
    assert_int_equal(cmos(rig, 0x0C) & 0xC0, 0xC0);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

/* ---- HPET ---- */

static uint64_t hpet_read(struct rig *rig, unsigned reg, unsigned size_bytes)
{
    return bus_read(rig->bus, BUS_MMIO, CHIPSET_HPET_BASE + reg, size_bytes);
}

static void hpet_write(struct rig *rig, unsigned reg, unsigned size_bytes, uint64_t value)
{
    bus_write(rig->bus, BUS_MMIO, CHIPSET_HPET_BASE + reg, size_bytes, value);
}

static void test_hpet_counter(void **state)
{
    struct rig *rig = *state;
    assert_int_equal(hpet_read(rig, 0, 4), 0x8086A201);
    assert_int_equal(hpet_read(rig, 4, 4), 10000000);
    assert_int_equal(hpet_read(rig, 0x104, 4), 0x00f00000);
    hpet_write(rig, 0xF0, 8, 0x1234567890);
    run_for(rig, MS);
    assert_true(hpet_read(rig, 0xF0, 8) == 0x1234567890);
    hpet_write(rig, 0xF4, 4, 0);
    assert_int_equal(hpet_read(rig, 0xF0, 8), 0x34567890);
    hpet_write(rig, 0x10, 4, 1);
    uint64_t start = inputs_now_ns(), from = hpet_read(rig, 0xF0, 8);
    run_for(rig, 2 * MS);
    uint64_t ticks = hpet_read(rig, 0xF0, 8) - from, ns = inputs_now_ns() - start;
    assert_true(ticks >= 2 * MS / 10 && ticks <= ns / 10);
    hpet_write(rig, 0xF0, 8, 0); /* running: ignored */
    assert_true(hpet_read(rig, 0xF0, 8) > 0x34567890);
    hpet_write(rig, 0x10, 4, 0);
    from = hpet_read(rig, 0xF0, 8);
    assert_int_equal(hpet_read(rig, 0xF0, 8), from);
}

static void test_hpet_interrupts(void **state)
{
    struct rig *rig = *state;
    hpet_write(rig, 0x10, 4, 3);
    assert_true(rig->legacy);
    /* Comparator 0 repeats every millisecond in place of the PIT, as Linux programs it. */
    hpet_write(rig, 0x100, 4, 0x14C);
    hpet_write(rig, 0x108, 4, hpet_read(rig, 0xF0, 4) + 100000);
    hpet_write(rig, 0x108, 4, 100000);
    uint64_t start = inputs_now_ns();
    while (rig->rises[6] < 4 && inputs_now_ns() < start + 1000 * MS)
        loop_run_once(rig->loop, 100);
    assert_true(inputs_now_ns() - start >= 3 * MS);
    assert_int_equal(rig->rises[6], 4);
    hpet_write(rig, 0x10, 4, 1);
    assert_false(rig->legacy);
    hpet_write(rig, 0x100, 4, 0);

    /* Comparator 2, level-triggered on pin 21. */
    hpet_write(rig, 0x140, 4, 21 << 9 | 6);
    hpet_write(rig, 0x148, 8, hpet_read(rig, 0xF0, 8) + 100000);
    start = inputs_now_ns();
    while (!rig->level[3] && inputs_now_ns() < start + 1000 * MS)
        loop_run_once(rig->loop, 100);
    assert_true(rig->level[3]);
    assert_int_equal(hpet_read(rig, 0x20, 4), 4);
    struct state_io *writer = state_writer_create();
    assert_int_equal(hpet_state(rig->hpet, writer), 0);
    hpet_write(rig, 0x20, 4, 4);
    assert_false(rig->level[3]);
    run_for(rig, 2 * MS);
    assert_int_equal(rig->rises[3], 1);

    hpet_reset(rig->hpet);
    assert_int_equal(hpet_read(rig, 0xF0, 4), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(hpet_state(rig->hpet, reader), 0);
    assert_true(rig->level[3]);
    assert_int_equal(hpet_read(rig, 0x140, 4), 21 << 9 | 0x36);
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

static void save_and_load(struct rig *rig)
{
    struct state_io *writer = state_writer_create();
    assert_int_equal(pit_state(rig->pit, writer), 0);
    assert_int_equal(rtc_state(rig->rtc, writer), 0);
    assert_int_equal(hpet_state(rig->hpet, writer), 0);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(pit_state(rig->pit, reader), 0);
    assert_int_equal(rtc_state(rig->rtc, reader), 0);
    assert_int_equal(hpet_state(rig->hpet, reader), 0);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

static void test_random_accesses(void **state)
{
    struct rig *rig = *state;
    static const uint16_t ports[] = {0x40, 0x41, 0x42, 0x43, 0x61, 0x70, 0x71, 0x71};
    uint64_t seed = 88172645463325252ull;
    for (int i = 0; i < 40000; i++) {
        uint64_t r = random_next(&seed);
        uint16_t port = ports[r >> 8 & 7];
        uint8_t value = (uint8_t)(r >> 16);
        if (port == 0x70 && (r >> 32 & 3))
            value &= 0x8f; /* the clock's registers more often */
        if (r & 1)
            bus_write(rig->bus, BUS_PORT, port, (r >> 40 & 7) ? 1 : 2, value);
        else
            bus_read(rig->bus, BUS_PORT, port, (r >> 40 & 7) ? 1 : 4);
        unsigned reg = (r >> 40 & 3) ? (r >> 44 & 3) * 0x10 + (r >> 46 & 3) * 0x20 + (r >> 48 & 1) * 0x100 : r >> 44 & 0x3ff;
        if (r & 2)
            hpet_write(rig, reg + (r >> 50 & 12), 4u << (r >> 52 & 1), (r & 4) ? r : r & 0x14f);
        else
            hpet_read(rig, reg, 1u << (r >> 52 & 3));
        if (i % 64 == 0)
            loop_run_once(rig->loop, 0);
        if (i % 4096 == 0)
            save_and_load(rig);
    }
    FILE *sink = fopen("/dev/null", "w");
    pit_dump(rig->pit, sink);
    rtc_dump(rig->rtc, sink);
    hpet_dump(rig->hpet, sink);
    fclose(sink);
}

/* What is due when the state is saved, and nobody has looked at yet, comes where the state is loaded. */
static void test_due_when_saved(void **state)
{
    struct rig *rig = *state;
    out(rig, 0x43, 0x30); /* one shot, 1 ms */
    out(rig, 0x40, 1193 & 0xff);
    out(rig, 0x40, 1193 >> 8);
    hpet_write(rig, 0x100, 4, 20 << 9 | 4);
    hpet_write(rig, 0x120, 4, 21 << 9 | 0x4C); /* repeating */
    hpet_write(rig, 0x10, 4, 1);
    hpet_write(rig, 0x108, 8, hpet_read(rig, 0xF0, 8) + 100000);
    hpet_write(rig, 0x128, 8, hpet_read(rig, 0xF0, 8) + 100000);
    hpet_write(rig, 0x128, 8, 100000000);
    cmos_set(rig, 0x0A, 0x26);
    cmos_set(rig, 0x0B, 0x42);
    uint64_t start = inputs_now_ns();
    while (inputs_now_ns() < start + 2 * MS)
        continue;
    cmos(rig, 0x0C);

    struct state_io *writer = state_writer_create();
    assert_int_equal(pit_state(rig->pit, writer), 0);
    assert_int_equal(hpet_state(rig->hpet, writer), 0);
    assert_int_equal(rtc_state(rig->rtc, writer), 0);
    pit_reset(rig->pit);
    hpet_reset(rig->hpet);
    rtc_reset(rig->rtc);
    run_for(rig, 3 * MS);
    memset(rig->rises, 0, sizeof rig->rises);
    size_t size;
    const void *data = state_writer_data(writer, &size);
    struct state_io *reader = state_reader_create(data, size);
    assert_int_equal(pit_state(rig->pit, reader), 0);
    assert_int_equal(hpet_state(rig->hpet, reader), 0);
    assert_int_equal(rtc_state(rig->rtc, reader), 0);
    run_for(rig, 1 * MS);
    assert_int_equal(rig->rises[0], 1);
    assert_int_equal(rig->rises[2], 1);
    assert_int_equal(rig->rises[3], 1);
    assert_true(rig->level[1]);
    assert_int_equal(cmos(rig, 0x0C) & 0xC0, 0xC0);
    state_io_destroy(reader);
    state_io_destroy(writer);
}

/* Loaded bytes are foreign: any that are wrong in content, but not in checksum, must be refused or harmless. */
static void test_hostile_state(void **state)
{
    struct rig *rig = *state;
    uint64_t seed = 1234567;
    for (int i = 0; i < 300; i++) {
        struct state_io *writer = state_writer_create();
        unsigned version = 1 + (i >> 2 & 1);
        state_begin_unlisted(writer, (i & 1) ? "pit" : "rtc", version);
        uint8_t bytes[256];
        for (size_t j = 0; j < sizeof(bytes); j++)
            bytes[j] = (uint8_t)((i & 2) ? random_next(&seed) : random_next(&seed) & 1);
        state_bytes(writer, bytes, ((i & 1) ? 138 : 139) + (version - 1) * 8);
        assert_int_equal(state_end(writer), 0);
        size_t size;
        const void *data = state_writer_data(writer, &size);
        struct state_io *reader = state_reader_create(data, size);
        int rc = (i & 1) ? pit_state(rig->pit, reader) : rtc_state(rig->rtc, reader);
        (void)rc;
        state_io_destroy(reader);
        state_io_destroy(writer);
        for (uint16_t port = 0x40; port < 0x43; port++)
            in(rig, port);
        for (uint8_t index = 0; index < 14; index++)
            cmos(rig, index);
        loop_run_once(rig->loop, 0);
    }
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_pit_periodic), T(test_pit_no_storm), T(test_pit_one_shot), T(test_pit_counter2_and_port61),
        T(test_pit_latches),  T(test_pit_reload_at_round_end), T(test_pit_state), T(test_rtc_time),
        T(test_rtc_set_and_formats), T(test_rtc_periodic), T(test_rtc_update_and_alarm), T(test_rtc_cmos),
        T(test_rtc_state),    T(test_hpet_counter), T(test_hpet_interrupts), T(test_due_when_saved), T(test_random_accesses), T(test_hostile_state),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
