/*
 * ACPI fixed hardware (ACPI 6.4, 4.8.3) and the reset register.
 *
 * There is no SMI command port, so the machine is always in ACPI mode and SCI_EN reads as one. The PM timer is computed from time, never
 * counted; its status bit is brought up to date at every access, and by a loop timer while its interrupt is enabled.
 * Threading: with the device lock held.
 */
#include "chipset/pm.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>

#include "chipset/chipset.h"
#include "state/inputs.h"
#include "util/log.h"

/* PM1 status and enable (4.8.3.1). */
#define PM1_TIMER 0x0001u
#define PM1_GLOBAL 0x0020u
#define PM1_POWER_BUTTON 0x0100u
#define PM1_WAKE 0x8000u
#define PM1_STATUS_BITS (PM1_TIMER | PM1_POWER_BUTTON | PM1_WAKE)
#define PM1_SLEEP_BUTTON 0x0200u
#define PM1_RTC 0x0400u
/* The sleep button and the RTC never signal here, but drivers enable them and read the bit back. */
#define PM1_ENABLE_BITS (PM1_TIMER | PM1_GLOBAL | PM1_POWER_BUTTON | PM1_SLEEP_BUTTON | PM1_RTC)

/* PM1 control (4.8.3.2). */
#define PM1_SCI_EN 0x0001u
#define PM1_BM_RLD 0x0002u
#define PM1_SLP_TYP(value) ((value) >> 10 & 7)
#define PM1_SLP_EN 0x2000u
#define PM1_CONTROL_BITS (PM1_BM_RLD | 7u << 10)

#define RESET_CPU 0x04u /* a change from 0 to 1 resets */
#define RESET_BITS 0x0Eu

#define NS_PER_S 1000000000ull

struct pm {
    struct pm_config config;
    struct loop_timer *timer;

    uint16_t status, enable, control;
    uint8_t gpe_status, gpe_enable;
    uint8_t reset_control;
    uint64_t base_ns;     /* when the PM timer was zero */
    uint64_t half_period; /* how often bit 31 had changed when the status was last brought up to date */
};

static uint64_t timer_ticks(const struct pm *pm)
{
    return (uint64_t)((unsigned __int128)(inputs_now_ns() - pm->base_ns) * PM_TIMER_HZ / NS_PER_S);
}

/* TMR_STS is set whenever the highest bit changes, either way (4.8.3.1.1). */
static void update_timer_status(struct pm *pm)
{
    uint64_t half_period = timer_ticks(pm) >> 31;

    if (half_period != pm->half_period)
        pm->status |= PM1_TIMER;
    pm->half_period = half_period;
}

static void update_sci(struct pm *pm)
{
    update_timer_status(pm);
    irq_line_set(&pm->config.sci, (pm->status & pm->enable & PM1_ENABLE_BITS) || (pm->gpe_status & pm->gpe_enable));
    if (!pm->timer)
        return;
    if ((pm->enable & PM1_TIMER) && !(pm->status & PM1_TIMER)) {
        unsigned __int128 ticks = ((unsigned __int128)pm->half_period + 1) << 31;

        loop_timer_arm(pm->timer, pm->base_ns + (uint64_t)(ticks * NS_PER_S / PM_TIMER_HZ) + 1);
    } else {
        loop_timer_disarm(pm->timer);
    }
}

static void timer_expired(void *ctx)
{
    update_sci(ctx);
}

void pm_power_button(struct pm *pm)
{
    pm->status |= PM1_POWER_BUTTON;
    update_sci(pm);
}

void pm_gpe_raise(struct pm *pm, unsigned bit)
{
    pm->gpe_status |= 1u << bit;
    update_sci(pm);
}

static uint64_t gpe_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    const struct pm *pm = ctx;

    return offset ? pm->gpe_enable : pm->gpe_status;
}

static void gpe_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pm *pm = ctx;

    if (offset)
        pm->gpe_enable = (uint8_t)value;
    else
        pm->gpe_status &= ~(uint8_t)value;
    update_sci(pm);
}

/* One byte or one word of a pair of 16-bit registers laid out one after the other. */
static uint64_t event_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pm *pm = ctx;

    update_sci(pm);
    return ((uint32_t)pm->enable << 16 | pm->status) >> (offset * 8);
}

static void event_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pm *pm = ctx;
    uint16_t lane = size_bytes == 2 ? 0xFFFF : offset & 1 ? 0xFF00 : 0x00FF;
    uint16_t word = (uint16_t)(value << (offset & 1) * 8);

    update_timer_status(pm);
    if (offset < 2)
        pm->status &= ~(word & lane);
    else
        pm->enable = ((pm->enable & ~lane) | (word & lane)) & PM1_ENABLE_BITS;
    update_sci(pm);
}

static uint64_t control_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pm *pm = ctx;

    return (uint64_t)(pm->control | PM1_SCI_EN) >> (offset * 8);
}

static void control_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pm *pm = ctx;
    uint16_t lane = size_bytes == 2 ? 0xFFFF : offset ? 0xFF00 : 0x00FF;
    uint16_t word = (uint16_t)(value << offset * 8) & lane;

    pm->control = ((pm->control & ~lane) | word) & PM1_CONTROL_BITS;
    if (!(word & PM1_SLP_EN))
        return;
    if (PM1_SLP_TYP(pm->control) == CHIPSET_SLEEP_TYPE_S5)
        pm->config.power_off(pm->config.ctx);
    else
        LOG_GUEST(LOG_WARNING, "the guest asked for sleep type %u, which does not exist; ignored", PM1_SLP_TYP(pm->control));
}

static uint64_t timer_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    return (uint32_t)timer_ticks(ctx) >> (offset * 8);
}

static uint64_t reset_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pm *pm = ctx;

    return pm->reset_control;
}

static void reset_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pm *pm = ctx;
    bool rises = (value & RESET_CPU) && !(pm->reset_control & RESET_CPU);

    pm->reset_control = value & RESET_BITS;
    if (rises)
        pm->config.reset(pm->config.ctx);
}

const struct region_ops pm_reset_port_ops = {"reset", reset_read, reset_write, 1, 1};

static const struct {
    uint16_t port, length_bytes;
    struct region_ops ops;
} blocks[] = {
    {CHIPSET_PM_EVENT_PORT, 4, {"pm1-event", event_read, event_write, 1, 2}},
    {CHIPSET_PM_CONTROL_PORT, 2, {"pm1-control", control_read, control_write, 1, 2}},
    {CHIPSET_GPE_PORT, CHIPSET_GPE_BYTES, {"gpe0", gpe_read, gpe_write, 1, 1}},
    {CHIPSET_PM_TIMER_PORT, 4, {"pm-timer", timer_read, NULL, 1, 4}},
};

#define BLOCKS (sizeof(blocks) / sizeof(blocks[0]))

int pm_create(struct pm **out, const struct pm_config *config)
{
    struct pm *pm = calloc(1, sizeof(*pm));
    int rc = 0;

    if (!pm)
        return -ENOMEM;
    pm->config = *config;
    for (unsigned i = 0; rc == 0 && i < BLOCKS; i++)
        rc = bus_add(config->bus, BUS_PORT, blocks[i].port, blocks[i].length_bytes, &blocks[i].ops, pm);
    if (rc == 0 && config->loop) {
        pm->timer = loop_timer_create(config->loop, timer_expired, pm);
        rc = pm->timer ? 0 : -ENOMEM;
    }
    if (rc < 0) {
        pm_destroy(pm);
        return rc;
    }
    pm_reset(pm);
    *out = pm;
    return 0;
}

void pm_destroy(struct pm *pm)
{
    if (!pm)
        return;
    for (unsigned i = 0; i < BLOCKS; i++)
        bus_remove(pm->config.bus, BUS_PORT, blocks[i].port, pm);
    if (pm->timer)
        loop_timer_destroy(pm->timer);
    free(pm);
}

void pm_reset(struct pm *pm)
{
    pm->status = pm->enable = pm->control = 0;
    pm->gpe_status = pm->gpe_enable = 0;
    pm->reset_control = 0;
    pm->base_ns = inputs_now_ns();
    pm->half_period = 0;
    update_sci(pm);
}

int pm_state(struct pm *pm, struct state_io *io)
{
    uint64_t now = inputs_now_ns(), elapsed_ns = now - pm->base_ns;

    state_begin(io, "pm", 1);
    state_u16(io, &pm->status);
    state_u16(io, &pm->enable);
    state_u16(io, &pm->control);
    state_u8(io, &pm->reset_control);
    state_u8(io, &pm->gpe_status);
    state_u8(io, &pm->gpe_enable);
    state_u64(io, &elapsed_ns);
    state_u64(io, &pm->half_period);
    if (state_loading(io)) {
        /* A century keeps the timer's arithmetic far from overflow. */
        if (elapsed_ns >> 62) {
            elapsed_ns = 0;
            state_fail(io, "PM timer out of range");
        }
        pm->status &= PM1_STATUS_BITS;
        pm->enable &= PM1_ENABLE_BITS;
        pm->control &= PM1_CONTROL_BITS;
        pm->reset_control &= RESET_BITS;
        pm->base_ns = now - elapsed_ns;
        update_sci(pm);
    }
    return state_end(io);
}
