/*
 * The MC146818 clock and CMOS memory. Motorola MC146818A data sheet; the century byte and memory sizes as PC firmware keeps them.
 *
 * The clock is the host's wall clock plus an offset. While the guest sets it (SET, or the divider held in reset) it is frozen in the CMOS
 * bytes; letting go turns them into a new offset. Flags of register C are worked out from the time that passed since they were last looked
 * at, so a timer runs only while an interrupt is enabled and the guest has read the last one's cause.
 *
 * Threading: with the device lock held.
 */
#include "chipset/rtc.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "state/inputs.h"

#define NS_PER_SECOND 1000000000ll
#define SECONDS_PER_DAY 86400ll

#define PORT_INDEX 0x70
#define CMOS_BYTES 128

#define REG_SECONDS 0x00
#define REG_SECONDS_ALARM 0x01
#define REG_MINUTES 0x02
#define REG_MINUTES_ALARM 0x03
#define REG_HOURS 0x04
#define REG_HOURS_ALARM 0x05
#define REG_WEEKDAY 0x06
#define REG_DAY 0x07
#define REG_MONTH 0x08
#define REG_YEAR 0x09
#define REG_A 0x0A
#define REG_B 0x0B
#define REG_C 0x0C
#define REG_D 0x0D
#define REG_CENTURY 0x32

#define A_UIP 0x80
#define A_RATE 0x0f
#define B_SET 0x80
#define B_DM 0x04 /* binary */
#define B_24H 0x02
#define C_IRQF 0x80
#define FLAG_PERIODIC 0x40 /* in B: enable, in C: flag */
#define FLAG_ALARM 0x20
#define FLAG_UPDATE 0x10
#define FLAGS (FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE)
#define D_VRT 0x80 /* the battery is good */

#define ALARM_ANY 0xC0       /* both high bits set: matches everything */
#define UPDATE_NS 2228000ll /* 244 us of warning and 1984 us of update, 32768 Hz time base */

#define HOUR_PM 0x80

/* What a guest can set; with the offsets that follow from it, sums stay well inside 64 bits of nanoseconds. */
#define YEAR_FIRST 1900
#define YEAR_LAST 2199
#define OFFSET_NS_MOST 6000000000000000000ll
#define OFFSET_NS_LEAST (-4600000000000000000ll)

struct rtc {
    struct bus *bus;
    struct loop_timer *timer;
    struct irq_line irq;
    bool irq_enabled;
    bool output; /* level of the interrupt, whether or not it gets through */
    bool nmi_masked;
    uint8_t index;
    int64_t offset_ns; /* guest's clock minus the host's wall clock */
    int64_t seen_ns;   /* guest time up to which register C is complete */
    uint64_t away_ns;  /* from saving to loading */
    uint8_t cmos[CMOS_BYTES];
};

struct calendar {
    int64_t year;
    unsigned month, day, weekday; /* from 1; Sunday is 1 */
    unsigned hour, minute, second;
};

/* ---- Calendar: proleptic Gregorian, days counted from 1970-01-01 ---- */

static int64_t floor_div(int64_t value, int64_t by)
{
    return value / by - (value % by < 0);
}

static int64_t days_of(int64_t year, unsigned month, unsigned day)
{
    /* A year that begins in March puts the leap day last. */
    int64_t y = month <= 2 ? year - 1 : year;
    int64_t day_of_year = (153 * ((int64_t)month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
    return 365 * y + floor_div(y, 4) - floor_div(y, 100) + floor_div(y, 400) + day_of_year - 719468;
}

static struct calendar calendar_of(int64_t seconds)
{
    int64_t days = floor_div(seconds, SECONDS_PER_DAY);
    unsigned second = (unsigned)(seconds - days * SECONDS_PER_DAY);
    struct calendar c = {.hour = second / 3600, .minute = second / 60 % 60, .second = second % 60};
    c.weekday = (unsigned)(((days + 4) % 7 + 7) % 7) + 1; /* 1970-01-01 was a Thursday */
    c.year = 1970 + floor_div(days, 366) - (days < 0); /* never too late, and a step too early at most for the years allowed */
    while (days_of(c.year + 1, 1, 1) <= days)
        c.year++;
    c.month = 1;
    while (c.month < 12 && days_of(c.year, c.month + 1, 1) <= days)
        c.month++;
    c.day = (unsigned)(days - days_of(c.year, c.month, 1)) + 1;
    return c;
}

/* ---- Register formats ---- */

static uint8_t encode(const struct rtc *rtc, unsigned value)
{
    return (uint8_t)((rtc->cmos[REG_B] & B_DM) ? value : value / 10 << 4 | value % 10);
}

static unsigned decode(const struct rtc *rtc, uint8_t value)
{
    return (rtc->cmos[REG_B] & B_DM) ? value : (value >> 4) * 10u + (value & 15);
}

static uint8_t encode_hour(const struct rtc *rtc, unsigned hour)
{
    if (rtc->cmos[REG_B] & B_24H)
        return encode(rtc, hour);
    return encode(rtc, hour % 12 ? hour % 12 : 12) | (hour >= 12 ? HOUR_PM : 0);
}

static unsigned decode_hour(const struct rtc *rtc, uint8_t value)
{
    if (rtc->cmos[REG_B] & B_24H)
        return decode(rtc, value);
    unsigned hour = decode(rtc, value & ~HOUR_PM & 0xff);
    return (hour == 12 ? 0 : hour) + ((value & HOUR_PM) ? 12 : 0);
}

static bool is_time_register(unsigned index)
{
    return index == REG_CENTURY || (index <= REG_YEAR && index != REG_SECONDS_ALARM && index != REG_MINUTES_ALARM &&
                                    index != REG_HOURS_ALARM);
}

/* Divider bits 11x hold the chain in reset. */
static bool divider_reset(const struct rtc *rtc)
{
    return (rtc->cmos[REG_A] & 0x60) == 0x60;
}

static bool is_frozen(const struct rtc *rtc)
{
    return (rtc->cmos[REG_B] & B_SET) || divider_reset(rtc);
}

static int64_t guest_ns(const struct rtc *rtc)
{
    return (int64_t)inputs_wall_ns() + rtc->offset_ns;
}

/* Writes the time into its CMOS bytes. */
static void image_fill(struct rtc *rtc, int64_t ns)
{
    struct calendar c = calendar_of(floor_div(ns, NS_PER_SECOND));
    rtc->cmos[REG_SECONDS] = encode(rtc, c.second);
    rtc->cmos[REG_MINUTES] = encode(rtc, c.minute);
    rtc->cmos[REG_HOURS] = encode_hour(rtc, c.hour);
    rtc->cmos[REG_WEEKDAY] = encode(rtc, c.weekday);
    rtc->cmos[REG_DAY] = encode(rtc, c.day);
    rtc->cmos[REG_MONTH] = encode(rtc, c.month);
    rtc->cmos[REG_YEAR] = encode(rtc, (unsigned)(c.year % 100));
    rtc->cmos[REG_CENTURY] = encode(rtc, (unsigned)(c.year / 100));
}

/* Makes the CMOS bytes the time, `fraction_ns` after that second began. Nonsense in them gives some time, as it does on the chip. */
static void image_take(struct rtc *rtc, int64_t fraction_ns)
{
    int64_t year = decode(rtc, rtc->cmos[REG_CENTURY]) * 100ll + decode(rtc, rtc->cmos[REG_YEAR]);
    unsigned month = decode(rtc, rtc->cmos[REG_MONTH]);
    if (year > YEAR_LAST)
        year = YEAR_LAST;
    if (year < YEAR_FIRST)
        year = YEAR_FIRST;
    if (month < 1 || month > 12)
        month = 1;
    int64_t seconds = days_of(year, month, 1) + (int64_t)decode(rtc, rtc->cmos[REG_DAY]) - 1;
    seconds = seconds * SECONDS_PER_DAY + decode_hour(rtc, rtc->cmos[REG_HOURS]) * 3600ll +
              decode(rtc, rtc->cmos[REG_MINUTES]) * 60ll + decode(rtc, rtc->cmos[REG_SECONDS]);
    rtc->offset_ns = seconds * NS_PER_SECOND + fraction_ns - (int64_t)inputs_wall_ns();
    rtc->seen_ns = guest_ns(rtc);
}

/* ---- Events ---- */

/* The alarm byte's value, -1 for "any", -2 for one that never comes. */
static int alarm_field(unsigned value, uint8_t raw, unsigned limit)
{
    if ((raw & ALARM_ANY) == ALARM_ANY)
        return -1;
    return value < limit ? (int)value : -2;
}

static bool field_matches(int field, unsigned value)
{
    return field == -1 || field == (int)value;
}

/* Guest second of the first alarm after `seconds`; INT64_MAX: never. */
static int64_t next_alarm(const struct rtc *rtc, int64_t seconds)
{
    const uint8_t *cmos = rtc->cmos;
    int hour = alarm_field(decode_hour(rtc, cmos[REG_HOURS_ALARM]), cmos[REG_HOURS_ALARM], 24);
    int minute = alarm_field(decode(rtc, cmos[REG_MINUTES_ALARM]), cmos[REG_MINUTES_ALARM], 60);
    int second = alarm_field(decode(rtc, cmos[REG_SECONDS_ALARM]), cmos[REG_SECONDS_ALARM], 60);
    if (hour == -2 || minute == -2 || second == -2)
        return INT64_MAX;

    int64_t midnight = floor_div(seconds, SECONDS_PER_DAY) * SECONDS_PER_DAY;
    unsigned first_minute = (unsigned)(seconds - midnight) / 60;
    /* From this minute on to the same one tomorrow, which may match before the second it is now. */
    for (unsigned m = first_minute; m <= first_minute + 24 * 60; m++) {
        if (!field_matches(hour, m / 60 % 24) || !field_matches(minute, m % 60))
            continue;
        int64_t begin = midnight + m * 60ll;
        int64_t found = second >= 0 ? begin + second : begin > seconds ? begin : seconds + 1;
        if (found > seconds && found < begin + 60)
            return found;
    }
    return INT64_MAX;
}

/* Periods of the rate in register A since the clock's zero; rates 1 and 2 are those of 8 and 9 (32768 Hz time base). 0: off. */
static unsigned rate_shift(const struct rtc *rtc)
{
    unsigned rate = rtc->cmos[REG_A] & A_RATE;
    return rate == 0 ? 0 : (rate <= 2 ? rate + 7 : rate) - 1;
}

static int64_t period_index(const struct rtc *rtc, int64_t ns)
{
    return (int64_t)(((__int128)ns << 15) / NS_PER_SECOND) >> rate_shift(rtc);
}

static int64_t period_begin_ns(const struct rtc *rtc, int64_t index)
{
    return (int64_t)((((__int128)index << rate_shift(rtc)) * NS_PER_SECOND + 32767) >> 15);
}

/* The flags of what happened since the last look. */
static void flags_update(struct rtc *rtc, int64_t now_ns)
{
    int64_t seen = rtc->seen_ns;
    rtc->seen_ns = now_ns;
    if (now_ns <= seen || divider_reset(rtc)) /* the host's clock may be set back */
        return;
    uint8_t flags = 0;
    if (rate_shift(rtc) && period_index(rtc, now_ns) != period_index(rtc, seen))
        flags |= FLAG_PERIODIC;
    int64_t second = floor_div(now_ns, NS_PER_SECOND), seen_second = floor_div(seen, NS_PER_SECOND);
    if (second != seen_second && !is_frozen(rtc)) {
        flags |= FLAG_UPDATE;
        if (next_alarm(rtc, seen_second) <= second)
            flags |= FLAG_ALARM;
    }
    rtc->cmos[REG_C] |= flags;
}

static void output_set(struct rtc *rtc, bool level)
{
    rtc->output = level;
    irq_line_set(&rtc->irq, level && rtc->irq_enabled);
}

static int64_t next_event_ns(const struct rtc *rtc, int64_t now_ns)
{
    int64_t next = INT64_MAX;
    uint8_t enabled = rtc->cmos[REG_B] & FLAGS;
    int64_t second = floor_div(now_ns, NS_PER_SECOND);
    if ((enabled & FLAG_PERIODIC) && rate_shift(rtc) && !divider_reset(rtc))
        next = period_begin_ns(rtc, period_index(rtc, now_ns) + 1);
    if (is_frozen(rtc))
        return next;
    if ((enabled & FLAG_UPDATE) && (second + 1) * NS_PER_SECOND < next)
        next = (second + 1) * NS_PER_SECOND;
    if (enabled & FLAG_ALARM) {
        int64_t alarm = next_alarm(rtc, second);
        if (alarm < next / NS_PER_SECOND)
            next = alarm * NS_PER_SECOND;
    }
    return next;
}

/* Brings flags, interrupt and timer up to date. */
static void rtc_update(struct rtc *rtc)
{
    int64_t now = guest_ns(rtc);
    flags_update(rtc, now);
    bool interrupt = rtc->cmos[REG_C] & rtc->cmos[REG_B] & FLAGS;
    rtc->cmos[REG_C] = (rtc->cmos[REG_C] & FLAGS) | (interrupt ? C_IRQF : 0);
    output_set(rtc, interrupt);

    /* While an interrupt waits to be read, another would change nothing. */
    int64_t next = interrupt ? INT64_MAX : next_event_ns(rtc, now);
    if (next == INT64_MAX)
        loop_timer_disarm(rtc->timer);
    else
        loop_timer_arm(rtc->timer, inputs_now_ns() + (uint64_t)(next - now));
}

static void rtc_expired(void *ctx)
{
    rtc_update(ctx);
}

uint64_t rtc_away_ns(const struct rtc *rtc)
{
    return rtc->away_ns;
}

void rtc_set_irq_enabled(struct rtc *rtc, bool enabled)
{
    rtc->irq_enabled = enabled;
    output_set(rtc, rtc->output);
}

bool rtc_nmi_masked(const struct rtc *rtc)
{
    return rtc->nmi_masked;
}

/* ---- Registers ---- */

static uint8_t register_read(struct rtc *rtc, unsigned index)
{
    int64_t now = guest_ns(rtc);
    if (is_time_register(index) && !is_frozen(rtc))
        image_fill(rtc, now);
    if (index == REG_A) {
        int64_t fraction = now - floor_div(now, NS_PER_SECOND) * NS_PER_SECOND;
        return rtc->cmos[REG_A] | (!is_frozen(rtc) && fraction >= NS_PER_SECOND - UPDATE_NS ? A_UIP : 0);
    }
    if (index != REG_C)
        return rtc->cmos[index];
    rtc_update(rtc);
    uint8_t value = rtc->cmos[REG_C];
    rtc->cmos[REG_C] = 0;
    output_set(rtc, false); /* what comes from here on is a new edge, be it now */
    rtc_update(rtc);
    return value;
}

/* Writes A or B, which may freeze the clock or let it go. */
static void control_write(struct rtc *rtc, unsigned index, uint8_t value)
{
    bool was_frozen = is_frozen(rtc), was_reset = divider_reset(rtc);
    int64_t now = guest_ns(rtc);
    flags_update(rtc, now);
    if (!was_frozen)
        image_fill(rtc, now); /* in the old format: the chip converts nothing either when DM or 24H change */
    rtc->cmos[index] = value;
    if (index == REG_B && (value & B_SET)) /* SET clears UIE */
        rtc->cmos[REG_B] &= ~FLAG_UPDATE;
    if (was_frozen && !is_frozen(rtc)) {
        int64_t fraction = now - floor_div(now, NS_PER_SECOND) * NS_PER_SECOND;
        /* The first update comes half a second after the divider's reset. */
        image_take(rtc, was_reset ? NS_PER_SECOND / 2 : fraction);
    }
    rtc_update(rtc);
}

static void register_write(struct rtc *rtc, unsigned index, uint8_t value)
{
    if (index == REG_C || index == REG_D)
        return;
    if (index == REG_A || index == REG_B) {
        control_write(rtc, index, index == REG_A ? value & ~A_UIP & 0xff : value);
        return;
    }
    int64_t now = guest_ns(rtc);
    flags_update(rtc, now);
    if (!is_time_register(index) || is_frozen(rtc)) {
        rtc->cmos[index] = value;
    } else {
        image_fill(rtc, now);
        rtc->cmos[index] = value;
        image_take(rtc, now - floor_div(now, NS_PER_SECOND) * NS_PER_SECOND);
    }
    if (index <= REG_YEAR)
        rtc_update(rtc);
}

static uint64_t rtc_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct rtc *rtc = ctx;
    return offset == 0 ? 0xff : register_read(rtc, rtc->index);
}

static void rtc_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct rtc *rtc = ctx;
    if (offset == 0) {
        rtc->index = value & (CMOS_BYTES - 1);
        rtc->nmi_masked = value & 0x80;
    } else {
        register_write(rtc, rtc->index, (uint8_t)value);
    }
}

static const struct region_ops rtc_ops = {.name = "rtc", .read = rtc_read, .write = rtc_write, .size_min = 1, .size_max = 1};

/* ---- Life ---- */

static void cmos_put(struct rtc *rtc, unsigned index, unsigned bytes, uint64_t value)
{
    uint64_t most = (1ull << bytes * 8) - 1;
    if (value > most)
        value = most;
    for (unsigned i = 0; i < bytes; i++)
        rtc->cmos[index + i] = (uint8_t)(value >> i * 8);
}

static void cmos_fill(struct rtc *rtc, const struct rtc_config *config)
{
    const uint64_t mib = 1024 * 1024;
    uint64_t low = config->ram_low_bytes;
    uint64_t extended_kib = low > mib ? (low - mib) / 1024 : 0;
    rtc->cmos[REG_A] = 0x26; /* 32768 Hz time base, 1024 Hz rate */
    rtc->cmos[REG_B] = B_24H;
    rtc->cmos[REG_D] = D_VRT;
    cmos_put(rtc, 0x15, 2, 640);
    cmos_put(rtc, 0x17, 2, extended_kib);
    cmos_put(rtc, 0x30, 2, extended_kib);
    cmos_put(rtc, 0x34, 2, low > 16 * mib ? (low - 16 * mib) / 65536 : 0);
    cmos_put(rtc, 0x5B, 3, config->ram_high_bytes / 65536);
}

/* RESET clears the enables and flags (data sheet, register B and C). */
void rtc_reset(struct rtc *rtc)
{
    rtc->cmos[REG_B] &= ~(FLAGS | 0x08);
    rtc->cmos[REG_C] = 0;
    rtc->index = 0;
    rtc->nmi_masked = false;
    rtc->irq_enabled = true;
    rtc->seen_ns = guest_ns(rtc);
    rtc_update(rtc);
}

int rtc_create(struct rtc **out, const struct rtc_config *config)
{
    *out = NULL;
    struct rtc *rtc = calloc(1, sizeof(*rtc));
    if (!rtc)
        return -ENOMEM;
    rtc->bus = config->bus;
    rtc->irq = config->irq;
    if (config->offset_seconds > OFFSET_NS_MOST / NS_PER_SECOND || config->offset_seconds < OFFSET_NS_LEAST / NS_PER_SECOND) {
        free(rtc);
        return -EINVAL;
    }
    rtc->offset_ns = config->offset_seconds * NS_PER_SECOND;
    rtc->timer = loop_timer_create(config->loop, rtc_expired, rtc);
    if (!rtc->timer) {
        free(rtc);
        return -ENOMEM;
    }
    cmos_fill(rtc, config);
    rtc_reset(rtc);
    int rc = bus_add(rtc->bus, BUS_PORT, PORT_INDEX, 2, &rtc_ops, rtc);
    if (rc < 0) {
        rtc_destroy(rtc);
        return rc;
    }
    *out = rtc;
    return 0;
}

void rtc_destroy(struct rtc *rtc)
{
    if (!rtc)
        return;
    bus_remove(rtc->bus, BUS_PORT, PORT_INDEX, rtc);
    loop_timer_destroy(rtc->timer);
    free(rtc);
}

int rtc_state(struct rtc *rtc, struct state_io *io)
{
    if (!state_loading(io))
        rtc_update(rtc);
    unsigned version = state_begin(io, "rtc", 2);
    state_u8(io, &rtc->index);
    state_bool(io, &rtc->nmi_masked);
    state_bool(io, &rtc->irq_enabled);
    state_i64(io, &rtc->offset_ns);
    state_bytes(io, rtc->cmos, sizeof(rtc->cmos));
    if (state_loading(io) && (rtc->index >= CMOS_BYTES || rtc->offset_ns > OFFSET_NS_MOST ||
                              rtc->offset_ns < OFFSET_NS_LEAST)) {
        state_fail(io, "clock in an impossible state");
        rtc->offset_ns = 0; /* for what is worked out from it below */
    }
    int64_t now = guest_ns(rtc), away = 0;
    rtc->seen_ns = state_loading(io) ? now : rtc->seen_ns;
    if (version >= 2) /* alarms of the time between ring when the guest is back */
        state_i64(io, &rtc->seen_ns);
    if (state_loading(io))
        rtc->away_ns = !__builtin_sub_overflow(now, rtc->seen_ns, &away) && away > 0 ? (uint64_t)away : 0;
    int rc = state_end(io);
    if (!state_loading(io))
        return rc;
    if (rc < 0) {
        rtc->offset_ns = 0;
        memset(rtc->cmos, 0, sizeof(rtc->cmos));
        cmos_fill(rtc, &(struct rtc_config){0});
        rtc_reset(rtc);
        return rc;
    }
    rtc_update(rtc);
    return 0;
}

void rtc_dump(const struct rtc *rtc, FILE *out)
{
    struct calendar c = calendar_of(floor_div(guest_ns(rtc), NS_PER_SECOND));
    fprintf(out, "rtc: %04lld-%02u-%02u %02u:%02u:%02u a %02x b %02x c %02x%s\n", (long long)c.year, c.month, c.day, c.hour,
            c.minute, c.second, rtc->cmos[REG_A], rtc->cmos[REG_B], rtc->cmos[REG_C], is_frozen(rtc) ? " frozen" : "");
}
