/*
 * The local APIC's timer: one-shot, periodic and TSC-deadline. SDM vol. 3, 11.5.4.
 *
 * Nothing counts: the moment of expiry is kept, and counts are worked out from the clock when read. The loop's timer is armed only
 * while an unmasked interrupt is due. Whoever looks at the timer first after it expired delivers its interrupt, so a
 * read never sees an expiry whose interrupt is still to come.
 *
 * A periodic timer that fell behind skips what it missed, and the loop is not asked to call more often than
 * every PERIOD_FLOOR_NS, whatever count the guest chose.
 */
#include "chipset/lapic_priv.h"
#include "state/inputs.h"

#define PERIOD_FLOOR_NS 50000ull

static enum timer_mode timer_mode(const struct lapic *apic)
{
    return (enum timer_mode)(apic->lvt[LVT_TIMER] >> 17 & 3);
}

/* Divide configuration, SDM figure 11-10: bits 3, 1, 0; 111 divides by one. */
static uint64_t divisor(const struct lapic_timer *timer)
{
    unsigned code = (timer->divide & 3) | (timer->divide >> 1 & 4);
    return code == 7 ? 1 : 2ull << code;
}

/* At most 2^32 * 128 ns. */
static uint64_t period_ns(const struct lapic_timer *timer)
{
    return timer->initial_count * divisor(timer);
}

static void timer_arm(struct lapic *apic, uint64_t now_ns)
{
    struct lapic_timer *timer = &apic->timer;
    uint64_t want = UINT64_MAX;
    if (timer->running && !(apic->lvt[LVT_TIMER] & LVT_MASKED)) {
        want = timer->expiry_ns;
        if (timer_mode(apic) == TIMER_PERIODIC && period_ns(timer) < PERIOD_FLOOR_NS && want < now_ns + PERIOD_FLOOR_NS)
            want = now_ns + PERIOD_FLOOR_NS;
    }
    if (want == timer->armed_ns)
        return;
    timer->armed_ns = want;
    if (want == UINT64_MAX)
        loop_timer_disarm(timer->loop_timer);
    else
        loop_timer_arm(timer->loop_timer, want);
}

/* Ends a period that is over: delivers its interrupt, sets the next expiry or stops. */
static void timer_fire(struct lapic *apic, uint64_t now_ns)
{
    struct lapic_timer *timer = &apic->timer;
    if (timer_mode(apic) == TIMER_PERIODIC) {
        uint64_t period = period_ns(timer);
        timer->expiry_ns += ((now_ns - timer->expiry_ns) / period + 1) * period;
    } else {
        timer->running = false;
        timer->deadline_tsc = 0;
    }
    if (!(apic->lvt[LVT_TIMER] & LVT_MASKED))
        lapic_accept_fixed(apic, apic->lvt[LVT_TIMER] & LVT_VECTOR, false);
}

void lapic_timer_update(struct lapic *apic, uint64_t now_ns)
{
    if (apic->timer.running && now_ns >= apic->timer.expiry_ns)
        timer_fire(apic, now_ns);
    timer_arm(apic, now_ns);
}

void lapic_timer_expired(void *ctx)
{
    struct lapic *apic = ctx;
    lapic_lock(apic);
    apic->timer.armed_ns = UINT64_MAX;
    lapic_timer_update(apic, inputs_now_ns());
    lapic_unlock(apic);
}

void lapic_timer_reset(struct lapic *apic)
{
    struct lapic_timer *timer = &apic->timer;
    timer->running = false;
    timer->expiry_ns = timer->deadline_tsc = 0;
    timer->initial_count = timer->divide = 0;
    timer_arm(apic, 0);
}

void lapic_timer_write_lvt(struct lapic *apic, uint32_t value)
{
    struct lapic_timer *timer = &apic->timer;
    uint64_t now = inputs_now_ns();
    lapic_timer_update(apic, now); /* what expired so far did so under the old entry */

    enum timer_mode before = timer_mode(apic);
    apic->lvt[LVT_TIMER] = value;
    enum timer_mode after = timer_mode(apic);
    /* Between TSC-deadline mode and the others the timer is disarmed (11.5.4.1). */
    if (before != after && (before >= TIMER_TSC_DEADLINE || after >= TIMER_TSC_DEADLINE)) {
        timer->running = false;
        timer->deadline_tsc = 0;
        timer->initial_count = 0;
    }
    timer_arm(apic, now);
}

void lapic_timer_write_initial_count(struct lapic *apic, uint32_t value)
{
    struct lapic_timer *timer = &apic->timer;
    if (timer_mode(apic) >= TIMER_TSC_DEADLINE)
        return;
    uint64_t now = inputs_now_ns();
    lapic_timer_update(apic, now);
    timer->initial_count = value;
    timer->running = value != 0;
    timer->expiry_ns = now + period_ns(timer);
    timer_arm(apic, now);
}

static uint32_t count_at(const struct lapic_timer *timer, uint64_t now_ns)
{
    if (!timer->running || timer->expiry_ns <= now_ns)
        return 0;
    uint64_t count = (timer->expiry_ns - now_ns + divisor(timer) - 1) / divisor(timer);
    return count > UINT32_MAX ? UINT32_MAX : (uint32_t)count;
}

void lapic_timer_write_divide(struct lapic *apic, uint32_t value)
{
    struct lapic_timer *timer = &apic->timer;
    uint64_t now = inputs_now_ns();
    lapic_timer_update(apic, now);
    uint64_t left = count_at(timer, now);
    timer->divide = value;
    if (timer_mode(apic) < TIMER_TSC_DEADLINE)
        timer->expiry_ns = now + left * divisor(timer);
    timer_arm(apic, now);
}

uint32_t lapic_timer_current_count(struct lapic *apic)
{
    if (timer_mode(apic) >= TIMER_TSC_DEADLINE)
        return 0;
    uint64_t now = inputs_now_ns();
    lapic_timer_update(apic, now);
    return count_at(&apic->timer, now);
}

uint64_t lapic_timer_read_deadline(struct lapic *apic)
{
    lapic_timer_update(apic, inputs_now_ns());
    return timer_mode(apic) == TIMER_TSC_DEADLINE ? apic->timer.deadline_tsc : 0;
}

void lapic_timer_write_deadline(struct lapic *apic, uint64_t tsc, uint64_t expiry_ns)
{
    if (timer_mode(apic) != TIMER_TSC_DEADLINE)
        return;
    apic->timer.deadline_tsc = tsc;
    apic->timer.running = tsc != 0;
    apic->timer.expiry_ns = expiry_ns;
    lapic_timer_update(apic, inputs_now_ns());
}

/*
 * The expiry is saved as time left, so that it does not depend on this host's clock nor on the vCPU's TSC being loaded first. A timer that has expired and that nobody
 * looked at yet is saved so, with nothing left: its interrupt is raised where the state is loaded. Raising it here would be too late, for the requests are saved already.
 */
void lapic_timer_state(struct lapic *apic, struct state_io *io)
{
    struct lapic_timer *timer = &apic->timer;
    uint64_t now = inputs_now_ns();
    uint64_t left = timer->running && timer->expiry_ns > now ? timer->expiry_ns - now : 0;
    state_bool(io, &timer->running);
    state_u64(io, &left);
    state_u64(io, &timer->deadline_tsc);
    state_u32(io, &timer->initial_count);
    state_u32(io, &timer->divide);
    if (!state_loading(io))
        return;
    enum timer_mode mode = timer_mode(apic);
    if ((timer->divide & ~0xBu) || (timer->running && mode == TIMER_RESERVED) ||
        (timer->running && mode < TIMER_TSC_DEADLINE && timer->initial_count == 0))
        state_fail(io, "APIC timer in an impossible state");
    if (state_failed(io))
        timer->running = false;
    timer->expiry_ns = left > UINT64_MAX - now ? UINT64_MAX : now + left;
    timer_arm(apic, now);
}
