/*
 * The high precision event timer. IA-PC HPET specification 1.0a, chapter 2.
 *
 * The counter is worked out from the clock: its value at `start_ns` and the time since. A comparator's timer on the loop runs only while the
 * counter and its interrupt are enabled; whoever looks at a comparator that is due makes it fire first. A repeating one that
 * fell behind skips what it missed, and the loop is not asked to call more often than every FIRE_FLOOR_NS.
 * Threading: with the device lock held.
 */
#include "chipset/hpet.h"

#include <errno.h>
#include <stdlib.h>

#include "chipset/chipset.h"
#include "state/inputs.h"

#define TICK_NS 10ull
#define TICK_FS 10000000ull
#define FIRE_FLOOR_NS 50000ull
#define NEVER_TICKS (1ull << 56) /* 22 years; beyond is never */
#define COMPARATORS 3
#define WINDOW_BYTES 0x400

#define REG_CAPABILITIES 0x000
#define REG_CONFIGURATION 0x010
#define REG_STATUS 0x020
#define REG_COUNTER 0x0F0
#define REG_COMPARATORS 0x100 /* 0x20 apart */
#define COMPARATOR_STRIDE 0x20
#define REG_CONFIG 0x00 /* of a comparator */
#define REG_VALUE 0x08

/* Revision 1, three comparators, 64 bits, legacy replacement, vendor, period. */
#define CAPABILITIES (TICK_FS << 32 | 0x8086A201ull)

#define CONF_ENABLE 0x1u
#define CONF_LEGACY 0x2u

#define TN_LEVEL (1u << 1)
#define TN_INT_ENABLE (1u << 2)
#define TN_PERIODIC (1u << 3)
#define TN_CAPABLE (1u << 4 | 1u << 5) /* periodic, 64 bits */
#define TN_VALUE_SET (1u << 6)
#define TN_32BIT (1u << 8)
#define TN_ROUTE_SHIFT 9
#define TN_ROUTE (0x1fu << TN_ROUTE_SHIFT)
#define TN_WRITABLE (TN_LEVEL | TN_INT_ENABLE | TN_PERIODIC | TN_VALUE_SET | TN_32BIT | TN_ROUTE)
#define TN_ROUTES ((uint64_t)((1u << HPET_PINS) - 1) << HPET_PIN_FIRST)

struct comparator {
    struct hpet *hpet;
    unsigned index;
    uint32_t config; /* writable bits */
    uint64_t value, period;
    bool armed;
    uint64_t expiry_ns;
    struct loop_timer *timer;
};

struct hpet {
    struct bus *bus;
    struct irq_line pins[HPET_PINS];
    struct irq_line legacy[2];
    void (*legacy_changed)(void *ctx, bool replaced);
    void *ctx;
    uint32_t config, status;
    uint64_t counter; /* at start_ns while enabled, else now */
    uint64_t start_ns;
    struct comparator comparators[COMPARATORS];
};

/* ---- Counter and interrupts ---- */

static uint64_t counter_now(const struct hpet *hpet, uint64_t now_ns)
{
    return hpet->counter + ((hpet->config & CONF_ENABLE) ? (now_ns - hpet->start_ns) / TICK_NS : 0);
}

/* Where a comparator's interrupt goes; NULL when it is routed to nothing. */
static struct irq_line *comparator_line(struct comparator *comparator)
{
    struct hpet *hpet = comparator->hpet;
    if ((hpet->config & CONF_LEGACY) && comparator->index < 2)
        return &hpet->legacy[comparator->index];
    unsigned pin = (comparator->config & TN_ROUTE) >> TN_ROUTE_SHIFT;
    return pin >= HPET_PIN_FIRST && pin < HPET_PIN_FIRST + HPET_PINS ? &hpet->pins[pin - HPET_PIN_FIRST] : NULL;
}

static bool holds_line(struct comparator *comparator, const struct irq_line *line)
{
    return (comparator->config & TN_LEVEL) && (comparator->config & TN_INT_ENABLE) &&
           (comparator->hpet->status >> comparator->index & 1) && comparator_line(comparator) == line;
}

/* Level-triggered comparators may share a line. */
static void line_update(struct hpet *hpet, struct irq_line *line)
{
    bool level = false;
    for (unsigned i = 0; i < COMPARATORS; i++)
        level = level || holds_line(&hpet->comparators[i], line);
    irq_line_set(line, level);
}

static void lines_update(struct hpet *hpet)
{
    for (unsigned i = 0; i < HPET_PINS; i++)
        line_update(hpet, &hpet->pins[i]);
    for (unsigned i = 0; i < 2; i++)
        line_update(hpet, &hpet->legacy[i]);
}

static void comparator_fire(struct comparator *comparator)
{
    if (!(comparator->config & TN_INT_ENABLE))
        return;
    struct irq_line *line = comparator_line(comparator);
    if (comparator->config & TN_LEVEL) {
        comparator->hpet->status |= 1u << comparator->index;
        lines_update(comparator->hpet);
    } else if (line && !line->level) {
        irq_line_pulse(line);
    }
}

/* ---- Comparators ---- */

static uint64_t value_mask(const struct comparator *comparator)
{
    return (comparator->config & TN_32BIT) ? UINT32_MAX : UINT64_MAX;
}

/* Ticks by which the counter is past the comparator; negative: still to go. */
static int64_t ticks_past(const struct comparator *comparator, uint64_t counter)
{
    uint64_t past = counter - comparator->value;
    return (comparator->config & TN_32BIT) ? (int32_t)past : (int64_t)past;
}

static bool repeats(const struct comparator *comparator)
{
    return (comparator->config & TN_PERIODIC) && comparator->period;
}

static void comparator_arm(struct comparator *comparator, uint64_t now_ns, bool just_fired)
{
    const struct hpet *hpet = comparator->hpet;
    uint64_t counter = counter_now(hpet, now_ns);
    uint64_t ticks = (comparator->value - counter) & value_mask(comparator);
    if (ticks == 0 && just_fired)
        ticks = (comparator->config & TN_32BIT) ? 1ull << 32 : NEVER_TICKS;
    comparator->armed =
        (hpet->config & CONF_ENABLE) && (comparator->config & TN_INT_ENABLE) && ticks < NEVER_TICKS;
    if (!comparator->armed) {
        loop_timer_disarm(comparator->timer);
        return;
    }
    uint64_t tick_began_ns = now_ns - (now_ns - hpet->start_ns) % TICK_NS;
    comparator->expiry_ns = tick_began_ns + ticks * TICK_NS;
    uint64_t floor_ns = just_fired ? now_ns + FIRE_FLOOR_NS : 0;
    loop_timer_arm(comparator->timer, comparator->expiry_ns > floor_ns ? comparator->expiry_ns : floor_ns);
}

/* Fires when due and looks ahead. */
static void comparator_update(struct comparator *comparator, uint64_t now_ns)
{
    const struct hpet *hpet = comparator->hpet;
    bool fired = false;
    if (!(hpet->config & CONF_ENABLE)) {
        comparator_arm(comparator, now_ns, false);
        return;
    }
    if (repeats(comparator)) {
        int64_t past = ticks_past(comparator, counter_now(hpet, now_ns));
        if (past >= 0) {
            comparator->value += ((uint64_t)past / comparator->period + 1) * comparator->period;
            comparator->value &= value_mask(comparator);
            fired = true;
        }
    } else {
        fired = comparator->armed && now_ns >= comparator->expiry_ns;
    }
    if (fired)
        comparator_fire(comparator);
    comparator_arm(comparator, now_ns, fired);
}

static void comparator_expired(void *ctx)
{
    comparator_update(ctx, inputs_now_ns());
}

static void all_update(struct hpet *hpet, uint64_t now_ns)
{
    for (unsigned i = 0; i < COMPARATORS; i++)
        comparator_update(&hpet->comparators[i], now_ns);
}

/* ---- Registers ---- */

static uint64_t comparator_config_read(const struct comparator *comparator)
{
    return TN_ROUTES << 32 | TN_CAPABLE | (comparator->config & ~TN_VALUE_SET);
}

static uint64_t register_read(struct hpet *hpet, uint64_t reg, uint64_t now_ns)
{
    switch (reg) {
    case REG_CAPABILITIES:
        return CAPABILITIES;
    case REG_CONFIGURATION:
        return hpet->config;
    case REG_STATUS:
        return hpet->status;
    case REG_COUNTER:
        return counter_now(hpet, now_ns);
    }
    uint64_t index = (reg - REG_COMPARATORS) / COMPARATOR_STRIDE;
    if (reg < REG_COMPARATORS || index >= COMPARATORS)
        return 0;
    struct comparator *comparator = &hpet->comparators[index];
    switch (reg % COMPARATOR_STRIDE) {
    case REG_CONFIG:
        return comparator_config_read(comparator);
    case REG_VALUE:
        comparator_update(comparator, now_ns);
        return comparator->value;
    default:
        return 0;
    }
}

static void configuration_write(struct hpet *hpet, uint32_t value, uint64_t now_ns)
{
    uint32_t old = hpet->config;
    value &= CONF_ENABLE | CONF_LEGACY;
    all_update(hpet, now_ns);
    hpet->counter = counter_now(hpet, now_ns);
    hpet->start_ns = now_ns;
    hpet->config = value;
    if ((old ^ value) & CONF_LEGACY)
        hpet->legacy_changed(hpet->ctx, value & CONF_LEGACY);
    lines_update(hpet);
    for (unsigned i = 0; i < COMPARATORS; i++)
        comparator_arm(&hpet->comparators[i], now_ns, false);
}

static void status_write(struct hpet *hpet, uint32_t value)
{
    hpet->status &= ~value;
    lines_update(hpet);
}

static void comparator_config_write(struct comparator *comparator, uint32_t value, uint64_t now_ns)
{
    comparator_update(comparator, now_ns);
    comparator->config = value & TN_WRITABLE;
    comparator->value &= value_mask(comparator);
    comparator->period &= value_mask(comparator);
    if (!(comparator->config & TN_LEVEL))
        comparator->hpet->status &= ~(1u << comparator->index);
    lines_update(comparator->hpet);
    comparator_arm(comparator, now_ns, false);
}

/* In periodic mode a write sets the period, and with VAL_SET, for once, the next match too (2.3.9.2.2). */
static void comparator_value_write(struct comparator *comparator, uint64_t value, uint64_t now_ns)
{
    value &= value_mask(comparator);
    comparator_update(comparator, now_ns);
    if (!(comparator->config & TN_PERIODIC) || (comparator->config & TN_VALUE_SET))
        comparator->value = value;
    if (comparator->config & TN_PERIODIC)
        comparator->period = value;
    comparator->config &= ~TN_VALUE_SET;
    comparator->armed = false; /* what was armed was for the old value */
    comparator_arm(comparator, now_ns, false);
}

static void register_write(struct hpet *hpet, uint64_t reg, uint64_t value, uint64_t now_ns)
{
    switch (reg) {
    case REG_CONFIGURATION:
        configuration_write(hpet, (uint32_t)value, now_ns);
        return;
    case REG_STATUS:
        status_write(hpet, (uint32_t)value);
        return;
    case REG_COUNTER: /* only while it stands still (2.3.7) */
        if (!(hpet->config & CONF_ENABLE))
            hpet->counter = value;
        return;
    }
    uint64_t index = (reg - REG_COMPARATORS) / COMPARATOR_STRIDE;
    if (reg < REG_COMPARATORS || index >= COMPARATORS)
        return;
    if (reg % COMPARATOR_STRIDE == REG_CONFIG)
        comparator_config_write(&hpet->comparators[index], (uint32_t)value, now_ns);
    else if (reg % COMPARATOR_STRIDE == REG_VALUE)
        comparator_value_write(&hpet->comparators[index], value, now_ns);
}

static uint64_t window_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    uint64_t value = register_read(ctx, offset & ~7ull, inputs_now_ns());
    return size_bytes == 8 ? value : (uint32_t)(value >> (offset & 4) * 8);
}

/* Half a register: the other half keeps what it has; of W1C bits, it writes none. */
static void window_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct hpet *hpet = ctx;
    uint64_t reg = offset & ~7ull, now = inputs_now_ns();
    bool high = offset & 4;
    if (size_bytes < 8) {
        uint64_t old = reg == REG_STATUS ? 0 : register_read(hpet, reg, now);
        /* Nothing is writable in the high halves of configuration registers. */
        if (high && reg != REG_COUNTER && reg % COMPARATOR_STRIDE != REG_VALUE)
            return;
        value = high ? (old & UINT32_MAX) | value << 32 : (old & ~(uint64_t)UINT32_MAX) | (uint32_t)value;
    }
    register_write(hpet, reg, value, now);
}

static const struct region_ops window_ops = {
    .name = "hpet", .read = window_read, .write = window_write, .size_min = 4, .size_max = 8};

/* ---- Life ---- */

void hpet_reset(struct hpet *hpet)
{
    if (hpet->config & CONF_LEGACY)
        hpet->legacy_changed(hpet->ctx, false);
    hpet->config = hpet->status = 0;
    hpet->counter = 0;
    for (unsigned i = 0; i < COMPARATORS; i++) {
        struct comparator *comparator = &hpet->comparators[i];
        comparator->config = 0;
        comparator->value = UINT64_MAX;
        comparator->period = 0;
        comparator_arm(comparator, 0, false);
    }
    lines_update(hpet);
}

static void ignore_legacy(void *ctx, bool replaced)
{
}

int hpet_create(struct hpet **out, const struct hpet_config *config)
{
    *out = NULL;
    struct hpet *hpet = calloc(1, sizeof(*hpet));
    if (!hpet)
        return -ENOMEM;
    hpet->bus = config->bus;
    hpet->legacy_changed = config->legacy_changed ? config->legacy_changed : ignore_legacy;
    hpet->ctx = config->ctx;
    for (unsigned i = 0; i < HPET_PINS; i++)
        hpet->pins[i] = config->pins[i];
    for (unsigned i = 0; i < 2; i++)
        hpet->legacy[i] = config->legacy[i];
    int rc = 0;
    for (unsigned i = 0; i < COMPARATORS; i++) {
        struct comparator *comparator = &hpet->comparators[i];
        comparator->hpet = hpet;
        comparator->index = i;
        comparator->timer = loop_timer_create(config->loop, comparator_expired, comparator);
        if (!comparator->timer)
            rc = -ENOMEM;
    }
    if (rc == 0)
        rc = bus_add(hpet->bus, BUS_MMIO, CHIPSET_HPET_BASE, WINDOW_BYTES, &window_ops, hpet);
    if (rc < 0) {
        hpet_destroy(hpet);
        return rc;
    }
    hpet_reset(hpet);
    *out = hpet;
    return 0;
}

void hpet_destroy(struct hpet *hpet)
{
    if (!hpet)
        return;
    bus_remove(hpet->bus, BUS_MMIO, CHIPSET_HPET_BASE, hpet);
    for (unsigned i = 0; i < COMPARATORS; i++)
        loop_timer_destroy(hpet->comparators[i].timer);
    free(hpet);
}

/* A match that is due when the state is saved is still to come: version 1 raised its interrupt then, when the interrupt controllers had been saved already. */
static void match_state(struct comparator *comparator, struct state_io *io, uint64_t now_ns)
{
    uint64_t until_ns = comparator->armed && comparator->expiry_ns > now_ns ? comparator->expiry_ns - now_ns : 0;
    state_bool(io, &comparator->armed);
    state_u64(io, &until_ns);
    if (!state_loading(io))
        return;
    if (until_ns > NEVER_TICKS * TICK_NS)
        state_fail(io, "HPET interrupt too far ahead");
    comparator->expiry_ns = now_ns + until_ns;
}

static void match_resume(struct comparator *comparator)
{
    if (comparator->armed)
        loop_timer_arm(comparator->timer, comparator->expiry_ns);
    else
        loop_timer_disarm(comparator->timer);
}

int hpet_state(struct hpet *hpet, struct state_io *io)
{
    uint64_t now = inputs_now_ns();
    uint64_t counter = counter_now(hpet, now);
    bool was_legacy = hpet->config & CONF_LEGACY;
    unsigned version = state_begin(io, "hpet", 2);
    state_u32(io, &hpet->config);
    state_u32(io, &hpet->status);
    state_u64(io, &counter);
    bool fits = !(hpet->config & ~(CONF_ENABLE | CONF_LEGACY)) && !(hpet->status >> COMPARATORS);
    for (unsigned i = 0; i < COMPARATORS; i++) {
        struct comparator *comparator = &hpet->comparators[i];
        state_u32(io, &comparator->config);
        state_u64(io, &comparator->value);
        state_u64(io, &comparator->period);
        if (version >= 2)
            match_state(comparator, io, now);
        fits = fits && !(comparator->config & ~TN_WRITABLE) && !(comparator->value & ~value_mask(comparator)) &&
               !(comparator->period & ~value_mask(comparator));
    }
    if (state_loading(io) && !fits)
        state_fail(io, "reserved bits set");
    int rc = state_end(io);
    if (!state_loading(io))
        return rc;
    if (rc < 0) {
        hpet->config = was_legacy ? CONF_LEGACY : 0; /* so that the reset tells who waits for it */
        hpet_reset(hpet);
        return rc;
    }
    hpet->counter = counter;
    hpet->start_ns = now;
    if (was_legacy != !!(hpet->config & CONF_LEGACY))
        hpet->legacy_changed(hpet->ctx, hpet->config & CONF_LEGACY);
    lines_update(hpet);
    for (unsigned i = 0; i < COMPARATORS; i++) {
        if (version >= 2)
            match_resume(&hpet->comparators[i]);
        else
            comparator_arm(&hpet->comparators[i], now, false);
    }
    return 0;
}

void hpet_dump(const struct hpet *hpet, FILE *out)
{
    fprintf(out, "hpet: config %x status %x counter %llx\n", hpet->config, hpet->status,
            (unsigned long long)counter_now(hpet, inputs_now_ns()));
    for (unsigned i = 0; i < COMPARATORS; i++) {
        const struct comparator *comparator = &hpet->comparators[i];
        fprintf(out, "  comparator %u: config %x value %llx period %llx%s\n", i, comparator->config,
                (unsigned long long)comparator->value, (unsigned long long)comparator->period,
                comparator->armed ? " armed" : "");
    }
}
