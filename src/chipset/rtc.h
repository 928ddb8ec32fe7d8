/*
 * The MC146818 real-time clock with 128 bytes of CMOS memory at ports 0x70/0x71. Bit 7 of port 0x70 masks NMI.
 * The clock is the host's UTC wall clock plus an offset that the guest changes by setting the time.
 * Motorola MC146818A data sheet; CMOS bytes as PC firmware uses them.
 * Threading: with the device lock held; the timer runs on the loop, under its guard.
 */
#ifndef DOPPEL_CHIPSET_RTC_H
#define DOPPEL_CHIPSET_RTC_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/loop.h"

struct rtc;

struct rtc_config {
    struct bus *bus;
    struct loop *loop;
    struct irq_line irq;      /* ISA interrupt 8 */
    uint64_t ram_low_bytes;   /* below 4 GiB; for CMOS 0x15..0x18, 0x30, 0x31, 0x34, 0x35 */
    uint64_t ram_high_bytes;  /* from 4 GiB on; for CMOS 0x5B..0x5D */
    int64_t offset_seconds;   /* guest's clock minus the host's UTC; e.g. the zone's for guests that keep local time */
};

int rtc_create(struct rtc **rtc, const struct rtc_config *config) __attribute__((warn_unused_result));
void rtc_reset(struct rtc *rtc); /* the clock and CMOS memory are battery-backed: interrupts go off, the rest stays */
int rtc_state(struct rtc *rtc, struct state_io *io) __attribute__((warn_unused_result));
void rtc_destroy(struct rtc *rtc);
void rtc_dump(const struct rtc *rtc, FILE *out);

bool rtc_nmi_masked(const struct rtc *rtc);

/* How long, by hosts' wall clocks, the state that was loaded had been saved before. 0: none was, it does not say, or the clock was set back. */
uint64_t rtc_away_ns(const struct rtc *rtc);

/* While an HPET replaces the legacy interrupts, the clock does not reach its line. */
void rtc_set_irq_enabled(struct rtc *rtc, bool enabled);

#endif
