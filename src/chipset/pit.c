/*
 * The 8254 interval timer and port 0x61. Intel 8254 data sheet.
 *
 * Nothing counts: a counter keeps when it started and how far it had come when its gate stopped it; values and outputs follow from the
 * clock when somebody looks. Only counter 0 needs a timer, for the next rising edge of its output, which is its interrupt. A rising edge
 * that ends a low of one clock is shown as low and high at once. Edges that fell behind become one, and the loop is not asked to call more
 * often than every EDGE_FLOOR_NS.
 *
 * Threading: with the device lock held.
 */
#include "chipset/pit.h"

#include <errno.h>
#include <stdlib.h>

#include "state/inputs.h"

#define NS_PER_SECOND 1000000000ull
#define EDGE_FLOOR_NS 50000ull
#define REFRESH_HALF_PERIOD_NS 15085ull

#define PORT_COUNTERS 0x40
#define PORT_CONTROL 3 /* offset */
#define PORT_SYSTEM 0x61

#define RW_LATCH 0
#define RW_LSB 1
#define RW_MSB 2
#define RW_BOTH 3

#define READ_BACK 3 /* counter select */
#define READ_BACK_NO_COUNT 0x20
#define READ_BACK_NO_STATUS 0x10

#define SYSTEM_GATE2 0x01
#define SYSTEM_WRITABLE 0x0f
#define SYSTEM_REFRESH 0x10
#define SYSTEM_OUT2 0x20

struct pit_counter {
    uint8_t mode; /* 0..5 */
    uint8_t rw;   /* 1..3 */
    bool bcd, gate;
    uint32_t count;  /* clocks of a round, 1..65536; 0: none was loaded since the control word */
    uint32_t next;   /* written, taken over at next_ns (modes 2, 3) or by a trigger (modes 1, 5); 0: none */
    uint64_t next_ns;
    bool running;      /* start_ns is valid; else the time stands still at held_ns */
    uint64_t start_ns; /* when the round (modes 2, 3: the first one) began */
    uint64_t held_ns;
    bool write_msb, read_msb; /* RW_BOTH: the low byte is done */
    uint8_t write_lsb;
    bool count_latched, status_latched;
    uint16_t latched_count;
    uint8_t latched_status;
};

struct pit {
    struct bus *bus;
    struct loop_timer *timer;
    struct irq_line irq;
    bool output, irq_enabled; /* level of counter 0's interrupt; whether it gets through */
    uint64_t edge_ns;         /* next rising edge of counter 0; UINT64_MAX: none */
    uint8_t system;           /* port 0x61, writable bits */
    struct pit_counter counters[3];
};

/* ---- Time ---- */

static uint64_t ticks_to_ns(uint64_t ticks) /* rounded up: when that many have passed */
{
    return (uint64_t)(((unsigned __int128)ticks * NS_PER_SECOND + PIT_HZ - 1) / PIT_HZ);
}

static uint64_t counter_ticks(const struct pit_counter *counter, uint64_t now_ns)
{
    uint64_t ns = counter->running ? now_ns - counter->start_ns : counter->held_ns;
    if ((int64_t)ns < 0) /* start_ns may lie before the host's clock began, so the difference counts, not the order */
        ns = 0;
    return (uint64_t)((unsigned __int128)ns * PIT_HZ / NS_PER_SECOND);
}

static bool is_periodic(const struct pit_counter *counter)
{
    return counter->mode == 2 || counter->mode == 3;
}

static bool is_triggered(const struct pit_counter *counter)
{
    return counter->mode == 1 || counter->mode == 5;
}

static void counter_start(struct pit_counter *counter, uint32_t count, uint64_t now_ns)
{
    counter->count = count;
    counter->next = 0;
    counter->start_ns = now_ns;
    counter->held_ns = 0;
    counter->running = counter->gate || is_triggered(counter);
}

/* In modes 2 and 3 a count written while counting begins with the next round. */
static void counter_settle(struct pit_counter *counter, uint64_t now_ns)
{
    if (counter->next && counter->running && is_periodic(counter) && now_ns >= counter->next_ns)
        counter_start(counter, counter->next, counter->next_ns);
}

static uint16_t counter_value(const struct pit_counter *counter, uint64_t now_ns)
{
    if (!counter->count)
        return 0;
    uint64_t ticks = counter_ticks(counter, now_ns);
    uint64_t modulus = counter->bcd ? 10000 : 65536;
    uint64_t value;
    if (counter->mode == 2)
        value = counter->count - ticks % counter->count;
    else if (counter->mode == 3) /* counts by two, twice a round */
        value = (counter->count - ticks * 2 % counter->count) & ~1ull;
    else
        value = counter->count + modulus - ticks % modulus;
    value %= modulus;
    if (!counter->bcd)
        return (uint16_t)value;
    return (uint16_t)(value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10);
}

static bool counter_output(const struct pit_counter *counter, uint64_t now_ns)
{
    if (!counter->count)
        return counter->mode != 0;
    uint64_t ticks = counter_ticks(counter, now_ns);
    switch (counter->mode) {
    case 0:
        return ticks >= counter->count;
    case 1:
        return !counter->running || ticks >= counter->count;
    case 2:
        return !counter->gate || ticks % counter->count != counter->count - 1;
    case 3:
        return !counter->gate || ticks % counter->count < (counter->count + 1) / 2;
    default:
        return ticks != counter->count;
    }
}

/* ---- Counter 0's interrupt ---- */

static void output_set(struct pit *pit, bool level)
{
    pit->output = level;
    irq_line_set(&pit->irq, level && pit->irq_enabled);
}

static uint64_t next_edge_ns(const struct pit_counter *counter, uint64_t now_ns)
{
    if (!counter->count || !counter->running)
        return UINT64_MAX;
    uint64_t ticks = counter_ticks(counter, now_ns);
    if (is_periodic(counter))
        return counter->start_ns + ticks_to_ns((ticks / counter->count + 1) * counter->count);
    return ticks < counter->count ? counter->start_ns + ticks_to_ns(counter->count) : UINT64_MAX;
}

static void edge_schedule(struct pit *pit, uint64_t now_ns, uint64_t not_before_ns)
{
    pit->edge_ns = next_edge_ns(&pit->counters[0], now_ns);
    if (pit->edge_ns == UINT64_MAX)
        loop_timer_disarm(pit->timer);
    else
        loop_timer_arm(pit->timer, pit->edge_ns > not_before_ns ? pit->edge_ns : not_before_ns);
}

static void pit_expired(void *ctx)
{
    struct pit *pit = ctx;
    uint64_t now = inputs_now_ns();
    if (now >= pit->edge_ns) {
        counter_settle(&pit->counters[0], now);
        output_set(pit, false);
        output_set(pit, true);
    }
    edge_schedule(pit, now, now + EDGE_FLOOR_NS);
}

void pit_set_irq_enabled(struct pit *pit, bool enabled)
{
    pit->irq_enabled = enabled;
    output_set(pit, pit->output);
}

/* ---- Programming ---- */

static uint8_t counter_status(const struct pit_counter *counter, uint64_t now_ns)
{
    bool null_count = !counter->count || counter->next;
    return (uint8_t)(counter_output(counter, now_ns) << 7 | null_count << 6 | counter->rw << 4 | counter->mode << 1 |
                     counter->bcd);
}

static void counter_latch(struct pit_counter *counter, uint64_t now_ns)
{
    if (counter->count_latched)
        return;
    counter->count_latched = true;
    counter->latched_count = counter_value(counter, now_ns);
}

static void read_back(struct pit *pit, uint8_t value, uint64_t now_ns)
{
    for (unsigned i = 0; i < 3; i++) {
        struct pit_counter *counter = &pit->counters[i];
        if (!(value & 2u << i))
            continue;
        counter_settle(counter, now_ns);
        if (!(value & READ_BACK_NO_COUNT))
            counter_latch(counter, now_ns);
        if (!(value & READ_BACK_NO_STATUS) && !counter->status_latched) {
            counter->status_latched = true;
            counter->latched_status = counter_status(counter, now_ns);
        }
    }
}

static void control_write(struct pit *pit, uint8_t value, uint64_t now_ns)
{
    unsigned index = value >> 6, rw = value >> 4 & 3;
    if (index == READ_BACK) {
        read_back(pit, value, now_ns);
        return;
    }
    struct pit_counter *counter = &pit->counters[index];
    if (rw == RW_LATCH) {
        counter_settle(counter, now_ns);
        counter_latch(counter, now_ns);
        return;
    }
    *counter = (struct pit_counter){
        .mode = value >> 1 & 7,
        .rw = (uint8_t)rw,
        .bcd = value & 1,
        .gate = counter->gate,
    };
    if (counter->mode > 5) /* bit 3 is not looked at in modes 2 and 3 */
        counter->mode -= 4;
    if (index == 0) {
        output_set(pit, counter->mode != 0);
        edge_schedule(pit, now_ns, 0);
    }
}

static uint32_t count_decode(const struct pit_counter *counter, uint16_t raw)
{
    if (!counter->bcd)
        return raw ? raw : 65536;
    uint32_t count = (raw >> 12) * 1000u + (raw >> 8 & 15) * 100u + (raw >> 4 & 15) * 10u + (raw & 15);
    return count ? count : 10000;
}

static void counter_load(struct pit_counter *counter, uint16_t raw, uint64_t now_ns)
{
    uint32_t count = count_decode(counter, raw);
    counter_settle(counter, now_ns);
    if (is_triggered(counter)) {
        counter->next = count; /* waits for the gate to rise */
    } else if (is_periodic(counter) && counter->count && counter->running) {
        counter->next_ns = next_edge_ns(counter, now_ns);
        counter->next = count;
    } else {
        counter_start(counter, count, now_ns);
    }
}

static void counter_write(struct pit *pit, unsigned index, uint8_t value, uint64_t now_ns)
{
    struct pit_counter *counter = &pit->counters[index];
    if (counter->rw == RW_BOTH && !counter->write_msb) {
        counter->write_lsb = value;
        counter->write_msb = true;
        if (counter->mode == 0) { /* the first byte stops the counting */
            counter->held_ns = 0;
            counter->running = false;
        }
    } else {
        uint16_t raw = counter->rw == RW_LSB ? value : counter->rw == RW_MSB ? (uint16_t)(value << 8)
                                                                              : (uint16_t)(value << 8 | counter->write_lsb);
        counter->write_msb = false;
        counter_load(counter, raw, now_ns);
    }
    if (index == 0) {
        if (counter->mode == 0)
            output_set(pit, false);
        edge_schedule(pit, now_ns, 0);
    }
}

static uint8_t counter_read(struct pit_counter *counter, uint64_t now_ns)
{
    if (counter->status_latched) {
        counter->status_latched = false;
        return counter->latched_status;
    }
    counter_settle(counter, now_ns);
    uint16_t value = counter->count_latched ? counter->latched_count : counter_value(counter, now_ns);
    bool msb = counter->rw == RW_MSB || (counter->rw == RW_BOTH && counter->read_msb);
    if (counter->rw == RW_BOTH)
        counter->read_msb = !counter->read_msb;
    if (counter->rw != RW_BOTH || !counter->read_msb)
        counter->count_latched = false;
    return (uint8_t)(msb ? value >> 8 : value);
}

/* The table of gate effects in the data sheet, figure 21. */
static void gate_set(struct pit_counter *counter, bool gate, uint64_t now_ns)
{
    if (counter->gate == gate)
        return;
    counter_settle(counter, now_ns);
    if (!gate && !is_triggered(counter) && counter->running) {
        counter->held_ns = now_ns - counter->start_ns;
        counter->running = false;
    }
    counter->gate = gate;
    if (!gate)
        return;
    if (is_triggered(counter) || is_periodic(counter)) {
        uint32_t count = counter->next ? counter->next : counter->count;
        if (count)
            counter_start(counter, count, now_ns);
    } else if (counter->count && !(counter->mode == 0 && counter->write_msb)) {
        counter->start_ns = now_ns - counter->held_ns;
        counter->running = true;
    }
}

/* ---- Ports ---- */

static uint64_t counters_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pit *pit = ctx;
    return offset == PORT_CONTROL ? 0xff : counter_read(&pit->counters[offset], inputs_now_ns());
}

static void counters_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pit *pit = ctx;
    if (offset == PORT_CONTROL)
        control_write(pit, (uint8_t)value, inputs_now_ns());
    else
        counter_write(pit, (unsigned)offset, (uint8_t)value, inputs_now_ns());
}

static uint64_t system_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pit *pit = ctx;
    uint64_t now = inputs_now_ns();
    counter_settle(&pit->counters[2], now);
    return pit->system | (now / REFRESH_HALF_PERIOD_NS % 2 ? SYSTEM_REFRESH : 0) |
           (counter_output(&pit->counters[2], now) ? SYSTEM_OUT2 : 0);
}

static void system_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pit *pit = ctx;
    pit->system = value & SYSTEM_WRITABLE;
    gate_set(&pit->counters[2], value & SYSTEM_GATE2, inputs_now_ns());
}

static const struct region_ops counters_ops = {
    .name = "pit", .read = counters_read, .write = counters_write, .size_min = 1, .size_max = 1};
static const struct region_ops system_ops = {
    .name = "system-control", .read = system_read, .write = system_write, .size_min = 1, .size_max = 1};

/* ---- Life ---- */

void pit_reset(struct pit *pit)
{
    for (unsigned i = 0; i < 3; i++)
        pit->counters[i] = (struct pit_counter){.mode = 3, .rw = RW_BOTH, .gate = i != 2};
    pit->system = 0;
    pit->irq_enabled = true;
    output_set(pit, false);
    edge_schedule(pit, inputs_now_ns(), 0);
}

int pit_create(struct pit **out, const struct pit_config *config)
{
    *out = NULL;
    struct pit *pit = calloc(1, sizeof(*pit));
    if (!pit)
        return -ENOMEM;
    pit->bus = config->bus;
    pit->irq = config->irq;
    pit->timer = loop_timer_create(config->loop, pit_expired, pit);
    if (!pit->timer) {
        free(pit);
        return -ENOMEM;
    }
    pit_reset(pit);
    int rc = bus_add(pit->bus, BUS_PORT, PORT_COUNTERS, 4, &counters_ops, pit);
    if (rc == 0)
        rc = bus_add(pit->bus, BUS_PORT, PORT_SYSTEM, 1, &system_ops, pit);
    if (rc < 0) {
        pit_destroy(pit);
        return rc;
    }
    *out = pit;
    return 0;
}

void pit_destroy(struct pit *pit)
{
    if (!pit)
        return;
    bus_remove(pit->bus, BUS_PORT, PORT_COUNTERS, pit);
    bus_remove(pit->bus, BUS_PORT, PORT_SYSTEM, pit);
    loop_timer_destroy(pit->timer);
    free(pit);
}

/* Times are saved as distances from now. */
static void counter_state(struct pit_counter *counter, struct state_io *io, uint64_t now_ns)
{
    counter_settle(counter, now_ns);
    uint64_t elapsed_ns = counter->running ? now_ns - counter->start_ns : 0;
    uint64_t until_next_ns = counter->next && counter->next_ns > now_ns ? counter->next_ns - now_ns : 0;
    uint8_t *const bytes[] = {&counter->mode, &counter->rw, &counter->write_lsb, &counter->latched_status};
    bool *const flags[] = {&counter->bcd,      &counter->gate,          &counter->running,       &counter->write_msb,
                           &counter->read_msb, &counter->count_latched, &counter->status_latched};
    for (size_t i = 0; i < sizeof(bytes) / sizeof(bytes[0]); i++)
        state_u8(io, bytes[i]);
    for (size_t i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        state_bool(io, flags[i]);
    state_u16(io, &counter->latched_count);
    state_u32(io, &counter->count);
    state_u32(io, &counter->next);
    state_u64(io, &elapsed_ns);
    state_u64(io, &counter->held_ns);
    state_u64(io, &until_next_ns);
    if (!state_loading(io))
        return;
    if (counter->mode > 5 || counter->rw < RW_LSB || counter->rw > RW_BOTH || counter->count > 65536 ||
        counter->next > 65536 || (counter->running && !counter->count))
        state_fail(io, "8254 counter in an impossible state");
    counter->start_ns = now_ns - elapsed_ns;
    counter->next_ns = now_ns + until_next_ns;
    if (until_next_ns > NS_PER_SECOND) /* no round is that long */
        counter->next_ns = now_ns;
}

#define EDGE_FAR_NS (100ull * NS_PER_SECOND) /* beyond the slowest counter */

/* An edge that is due when the state is saved is still to come: version 1 had no field for it, and lost it. */
static void edge_state(struct pit *pit, struct state_io *io, uint64_t now_ns)
{
    uint64_t until_ns = pit->edge_ns == UINT64_MAX ? UINT64_MAX : pit->edge_ns > now_ns ? pit->edge_ns - now_ns : 0;
    state_u64(io, &until_ns);
    if (!state_loading(io))
        return;
    if (until_ns != UINT64_MAX && until_ns > EDGE_FAR_NS)
        state_fail(io, "8254 interrupt too far ahead");
    pit->edge_ns = until_ns == UINT64_MAX ? UINT64_MAX : now_ns + until_ns;
}

static void edge_resume(struct pit *pit)
{
    if (pit->edge_ns == UINT64_MAX)
        loop_timer_disarm(pit->timer);
    else
        loop_timer_arm(pit->timer, pit->edge_ns);
}

int pit_state(struct pit *pit, struct state_io *io)
{
    uint64_t now = inputs_now_ns();
    bool output = pit->output;
    unsigned version = state_begin(io, "pit", 2);
    for (unsigned i = 0; i < 3; i++)
        counter_state(&pit->counters[i], io, now);
    state_u8(io, &pit->system);
    state_bool(io, &output);
    state_bool(io, &pit->irq_enabled);
    if (version >= 2)
        edge_state(pit, io, now);
    if (state_loading(io) &&
        ((pit->system & ~SYSTEM_WRITABLE) || pit->counters[2].gate != (pit->system & SYSTEM_GATE2) ||
         !pit->counters[0].gate || !pit->counters[1].gate))
        state_fail(io, "port 0x61 in an impossible state");
    int rc = state_end(io);
    if (!state_loading(io))
        return rc;
    if (rc < 0) {
        pit_reset(pit);
        return rc;
    }
    output_set(pit, output);
    if (version >= 2)
        edge_resume(pit);
    else
        edge_schedule(pit, now, 0);
    return 0;
}

void pit_dump(const struct pit *pit, FILE *out)
{
    uint64_t now = inputs_now_ns();
    for (unsigned i = 0; i < 3; i++) {
        const struct pit_counter *counter = &pit->counters[i];
        fprintf(out, "pit counter %u: mode %u count %u value %u out %d gate %d%s\n", i, counter->mode, counter->count,
                counter_value(counter, now), counter_output(counter, now), counter->gate, counter->running ? "" : " stopped");
    }
}
