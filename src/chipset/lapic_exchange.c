/*
 * Handing a local APIC's state to an engine that keeps the APICs itself, and taking it back (arch/apic.h). While the engine has it the APIC here is at rest: nothing
 * is requested, no timer runs; only the 8259's line and a pending NMI stay.
 *
 * What comes from the engine is cut down to bits that exist here, so that it can be saved and loaded like any other.
 * Threading: as lapic.h; the processors stand still.
 */
#include <string.h>

#include "chipset/lapic_priv.h"
#include "state/inputs.h"

static uint32_t divisor_of(uint32_t divide)
{
    unsigned code = (divide & 3) | (divide >> 1 & 4);
    return code == 7 ? 1 : 2u << code;
}

static bool timer_counts(const struct lapic *apic)
{
    return (apic->lvt[LVT_TIMER] >> 17 & 3) < TIMER_TSC_DEADLINE;
}

void lapic_give(struct lapic_set *set, unsigned cpu, struct apic_state *state)
{
    struct lapic *apic = &set->apics[cpu];
    uint32_t *reg = state->reg;
    *state = (struct apic_state){.base = atomic_load(&apic->base)};
    lapic_lock(apic);
    /* Looking at the timer raises its interrupt when it has expired: before the requests are copied. */
    state->tsc_deadline = lapic_timer_read_deadline(apic);
    uint32_t count = lapic_timer_current_count(apic);
    reg[REG_ID] = lapic_is_x2apic(apic) ? apic->cpu : apic->cpu << 24;
    reg[REG_VERSION] = LAPIC_VERSION_VALUE;
    reg[REG_TPR] = apic->tpr;
    reg[REG_LDR] = lapic_logical_id(apic);
    reg[REG_DFR] = apic->dfr;
    reg[REG_SVR] = apic->svr;
    reg[REG_ESR] = apic->esr;
    reg[REG_ICR_LOW] = apic->icr_low;
    reg[REG_ICR_HIGH] = apic->icr_high;
    memcpy(&reg[REG_ISR], apic->isr, sizeof apic->isr);
    memcpy(&reg[REG_TMR], apic->tmr, sizeof apic->tmr);
    memcpy(&reg[REG_IRR], apic->irr, sizeof apic->irr);
    memcpy(&reg[REG_LVT_TIMER], apic->lvt, sizeof apic->lvt);
    reg[REG_INITIAL_COUNT] = apic->timer.initial_count;
    reg[REG_CURRENT_COUNT] = count;
    reg[REG_DIVIDE] = apic->timer.divide;
    lapic_unlock(apic);
    lapic_rest(set, cpu);
}

void lapic_take(struct lapic_set *set, unsigned cpu, const struct apic_state *state)
{
    struct lapic *apic = &set->apics[cpu];
    const uint32_t *reg = state->reg;
    uint64_t now = inputs_now_ns(), deadline_ns = state->tsc_deadline ? set->ops->tsc_to_ns(set->ctx, cpu, state->tsc_deadline) : 0;
    lapic_lock(apic);
    atomic_store(&apic->base, state->base & (APIC_BASE_ADDRESS | APIC_BASE_MODE | APIC_BASE_BSP));
    apic->tpr = reg[REG_TPR] & 0xff;
    if (!lapic_is_x2apic(apic)) { /* derived from the id there */
        apic->ldr = reg[REG_LDR] & 0xff000000;
        apic->dfr = reg[REG_DFR] | 0x0fffffff;
    }
    apic->svr = reg[REG_SVR] & lapic_register_bits(REG_SVR);
    apic->esr = reg[REG_ESR] & 0xff;
    apic->esr_pending = 0;
    apic->icr_low = reg[REG_ICR_LOW] & lapic_register_bits(REG_ICR_LOW);
    apic->icr_high = reg[REG_ICR_HIGH];
    memcpy(apic->isr, &reg[REG_ISR], sizeof apic->isr);
    memcpy(apic->tmr, &reg[REG_TMR], sizeof apic->tmr);
    memcpy(apic->irr, &reg[REG_IRR], sizeof apic->irr);
    apic->isr[0] &= ~0xffffu;
    apic->irr[0] &= ~0xffffu;
    for (unsigned n = 0; n < LVT_COUNT; n++)
        apic->lvt[n] = (reg[REG_LVT_TIMER + n] & lapic_register_bits(REG_LVT_TIMER + n)) | (apic->svr & SVR_ENABLED ? 0 : LVT_MASKED);
    struct lapic_timer *timer = &apic->timer;
    timer->initial_count = reg[REG_INITIAL_COUNT];
    timer->divide = reg[REG_DIVIDE] & lapic_register_bits(REG_DIVIDE);
    timer->deadline_tsc = timer_counts(apic) ? 0 : state->tsc_deadline;
    /* A count of zero: it has expired, and nobody knows whether KVM, which raises the interrupt when the processor runs, has done so. Rather once too often, as KVM does. */
    timer->running = timer_counts(apic) ? timer->initial_count != 0 : state->tsc_deadline != 0;
    timer->expiry_ns = timer_counts(apic) ? now + (uint64_t)reg[REG_CURRENT_COUNT] * divisor_of(timer->divide) : deadline_ns;
    lapic_unlock(apic);
}

void lapic_rest(struct lapic_set *set, unsigned cpu)
{
    struct lapic *apic = &set->apics[cpu];
    lapic_lock(apic);
    memset(apic->irr, 0, sizeof apic->irr);
    memset(apic->isr, 0, sizeof apic->isr);
    memset(apic->tmr, 0, sizeof apic->tmr);
    lapic_timer_reset(apic);
    lapic_unlock(apic);
}
