/*
 * The local APICs: registers in xAPIC and x2APIC mode, interrupt priorities, acknowledgement and EOI. SDM vol. 3, chapter 11.
 *
 * One table describes each register: in which mode it can be read and written, and which bits exist. What is deliverable is worked out
 * whenever an APIC's lock is released and published in an atomic, so that the engines' question costs one load.
 * An APIC's callbacks (wake, EOI broadcast, 8259 acknowledgement) are made after its lock is released.
 */
#include "chipset/lapic_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "state/inputs.h"
#include "util/log.h"

#define MSR_IA32_APIC_BASE 0x1B
#define MSR_IA32_TSC_DEADLINE 0x6E0
#define MSR_X2APIC_FIRST 0x800
#define MSR_X2APIC_LAST 0x8FF

#define XR 1u  /* xAPIC: readable */
#define XW 2u  /* xAPIC: writable */
#define X2R 4u /* x2APIC: readable */
#define X2W 8u /* x2APIC: writable */
#define RW (XR | XW | X2R | X2W)
#define RO (XR | X2R)

static const struct {
    uint8_t access;
    uint32_t writable; /* bits that exist; others raise #GP in x2APIC mode and are dropped in xAPIC mode */
} registers[REG_COUNT] = {
    [REG_ID] = {RO, 0},
    [REG_VERSION] = {RO, 0},
    [REG_TPR] = {RW, 0xff},
    [REG_APR] = {XR, 0},
    [REG_PPR] = {RO, 0},
    [REG_EOI] = {XW | X2W, 0},
    [REG_RRD] = {XR, 0},
    [REG_LDR] = {XR | XW | X2R, 0xff000000},
    [REG_DFR] = {XR | XW, 0xf0000000},
    [REG_SVR] = {RW, 0x1ff},
    [REG_ISR ... REG_ISR + 7] = {RO, 0},
    [REG_TMR ... REG_TMR + 7] = {RO, 0},
    [REG_IRR ... REG_IRR + 7] = {RO, 0},
    [REG_ESR] = {RW, 0},
    [REG_ICR_LOW] = {RW, 0x000ccfff},
    [REG_ICR_HIGH] = {XR | XW, 0xff000000},
    [REG_LVT_TIMER] = {RW, 0x000710ff},
    [REG_LVT_THERMAL] = {RW, 0x000117ff},
    [REG_LVT_PERF] = {RW, 0x000117ff},
    [REG_LVT_LINT0] = {RW, 0x0001f7ff},
    [REG_LVT_LINT1] = {RW, 0x0001f7ff},
    [REG_LVT_ERROR] = {RW, 0x000110ff},
    [REG_INITIAL_COUNT] = {RW, 0xffffffff},
    [REG_CURRENT_COUNT] = {RO, 0},
    [REG_DIVIDE] = {RW, 0xb},
    [REG_SELF_IPI] = {X2W, 0xff},
};

#define LVT_READ_ONLY (1u << 12 | LVT_REMOTE_IRR) /* delivery status, which is always idle, and remote IRR */

uint32_t lapic_register_bits(unsigned reg)
{
    return registers[reg].writable;
}

/* ---- 256-bit vector registers ---- */

static int bits_highest(const uint32_t bits[8])
{
    for (int i = 7; i >= 0; i--) {
        if (bits[i])
            return i * 32 + 31 - __builtin_clz(bits[i]);
    }
    return -1;
}

static void bits_set(uint32_t bits[8], uint8_t vector)
{
    bits[vector / 32] |= 1u << (vector % 32);
}

static void bits_clear(uint32_t bits[8], uint8_t vector)
{
    bits[vector / 32] &= ~(1u << (vector % 32));
}

static bool bits_test(const uint32_t bits[8], uint8_t vector)
{
    return bits[vector / 32] >> (vector % 32) & 1;
}

/* ---- Priorities ---- */

uint32_t lapic_ppr(const struct lapic *apic)
{
    int in_service = bits_highest(apic->isr);
    uint32_t isrv = in_service < 0 ? 0 : (uint32_t)in_service & 0xf0;
    return (apic->tpr & 0xf0) >= isrv ? apic->tpr : isrv;
}

/* Arbitration priority: what the register showed when there was a bus to arbitrate for (11.6.2.4). */
static uint32_t lapic_apr(const struct lapic *apic)
{
    int requested = bits_highest(apic->irr), in_service = bits_highest(apic->isr);
    uint32_t tpr = apic->tpr & 0xf0;
    uint32_t irrv = requested < 0 ? 0 : (uint32_t)requested & 0xf0;
    uint32_t isrv = in_service < 0 ? 0 : (uint32_t)in_service & 0xf0;
    if (tpr >= irrv && tpr > isrv)
        return apic->tpr;
    return irrv > isrv ? (irrv > tpr ? irrv : tpr) : (isrv > tpr ? isrv : tpr);
}

/* Whether the 8259 pair's interrupt reaches the processor. With the APIC off, LINT0 is the processor's INTR pin. */
static bool extint_pending(const struct lapic *apic)
{
    if (!lapic_is_enabled(apic))
        return apic->extint_level && apic->cpu == 0;
    uint32_t lint0 = apic->lvt[LVT_LINT0];
    return apic->extint_latched ||
           (apic->extint_level && !(lint0 & LVT_MASKED) && (lint0 >> 8 & 7) == DELIVERY_EXTINT);
}

/* Highest request above the processor priority; -1: none. */
static int fixed_pending(const struct lapic *apic)
{
    int vector = bits_highest(apic->irr);
    if (vector < 0 || !lapic_is_enabled(apic) || ((uint32_t)vector & 0xf0) <= (lapic_ppr(apic) & 0xf0))
        return -1;
    return vector;
}

void lapic_lock(struct lapic *apic)
{
    pthread_mutex_lock(&apic->lock);
}

void lapic_unlock(struct lapic *apic)
{
    int before = atomic_load_explicit(&apic->deliverable, memory_order_relaxed);
    int now = extint_pending(apic) ? 0 : fixed_pending(apic);
    bool wake = apic->nmi_raised || (now >= 0 && now != before);
    apic->nmi_raised = false;
    atomic_store(&apic->deliverable, now);
    pthread_mutex_unlock(&apic->lock);
    if (wake)
        apic->set->ops->wake(apic->set->ctx, apic->cpu);
}

/* ---- Acceptance ---- */

void lapic_accept_fixed(struct lapic *apic, uint8_t vector, bool level)
{
    if (vector < 16) {
        lapic_error(apic, ESR_RECEIVE_ILLEGAL_VECTOR);
        return;
    }
    bits_set(apic->irr, vector);
    if (level)
        bits_set(apic->tmr, vector);
    else
        bits_clear(apic->tmr, vector);
}

void lapic_error(struct lapic *apic, uint32_t esr_bit)
{
    bool news = !(apic->esr_pending & esr_bit);
    apic->esr_pending |= esr_bit;
    uint32_t lvt = apic->lvt[LVT_ERROR];
    if (!news || (lvt & LVT_MASKED))
        return;
    if ((lvt & LVT_VECTOR) < 16)
        apic->esr_pending |= ESR_RECEIVE_ILLEGAL_VECTOR;
    else
        lapic_accept_fixed(apic, lvt & LVT_VECTOR, false);
}

void lapic_raise_nmi(struct lapic *apic)
{
    atomic_store(&apic->nmi_pending, true);
    apic->nmi_raised = true;
}

/* LINT0's level or entry changed: a fixed or NMI entry turns it into an interrupt. ExtINT is looked at when publishing. */
static void lint0_evaluate(struct lapic *apic, bool rising)
{
    uint32_t *lvt = &apic->lvt[LVT_LINT0];
    if (!lapic_is_enabled(apic) || !apic->extint_level || (*lvt & LVT_MASKED))
        return;
    bool level = *lvt & LVT_LEVEL;
    switch (*lvt >> 8 & 7) {
    case DELIVERY_FIXED:
        if (level ? !(*lvt & LVT_REMOTE_IRR) : rising) {
            lapic_accept_fixed(apic, *lvt & LVT_VECTOR, level);
            if (level && (*lvt & LVT_VECTOR) >= 16)
                *lvt |= LVT_REMOTE_IRR;
        }
        break;
    case DELIVERY_NMI:
        if (rising)
            lapic_raise_nmi(apic);
        break;
    }
}

void lapic_set_extint(struct lapic_set *set, bool level)
{
    for (unsigned cpu = 0; cpu < set->cpu_count; cpu++) {
        struct lapic *apic = &set->apics[cpu];
        lapic_lock(apic);
        bool rising = level && !apic->extint_level;
        apic->extint_level = level;
        lint0_evaluate(apic, rising);
        lapic_unlock(apic);
    }
}

void lapic_inject_nmi(struct lapic_set *set, unsigned cpu)
{
    if (cpu >= set->cpu_count)
        return;
    lapic_lock(&set->apics[cpu]);
    lapic_raise_nmi(&set->apics[cpu]);
    lapic_unlock(&set->apics[cpu]);
}

bool lapic_has_vector(struct lapic_set *set, uint8_t vector)
{
    bool has = false;
    for (unsigned cpu = 0; cpu < set->cpu_count && !has; cpu++) {
        struct lapic *apic = &set->apics[cpu];
        lapic_lock(apic);
        has = bits_test(apic->irr, vector) || bits_test(apic->isr, vector);
        lapic_unlock(apic);
    }
    return has;
}

struct msi_target lapic_msi_target(struct lapic_set *set)
{
    return (struct msi_target){.send = lapic_send_msi, .ctx = set};
}

/* ---- The processor's side ---- */

int lapic_interrupt_peek(struct lapic_set *set, unsigned cpu)
{
    return atomic_load_explicit(&set->apics[cpu].deliverable, memory_order_acquire);
}

int lapic_interrupt_ack(struct lapic_set *set, unsigned cpu)
{
    struct lapic *apic = &set->apics[cpu];
    lapic_lock(apic);
    if (extint_pending(apic)) {
        apic->extint_latched = false;
        lapic_unlock(apic);
        int vector = set->ops->pic_ack(set->ctx);
        if (vector >= 0)
            return vector;
        lapic_lock(apic);
    }
    int vector = fixed_pending(apic);
    if (vector >= 0) {
        bits_clear(apic->irr, (uint8_t)vector);
        bits_set(apic->isr, (uint8_t)vector);
    }
    lapic_unlock(apic);
    return vector;
}

bool lapic_nmi_take(struct lapic_set *set, unsigned cpu)
{
    atomic_bool *pending = &set->apics[cpu].nmi_pending;
    return atomic_load_explicit(pending, memory_order_acquire) && atomic_exchange(pending, false);
}

uint8_t lapic_cr8_read(struct lapic_set *set, unsigned cpu)
{
    struct lapic *apic = &set->apics[cpu];
    pthread_mutex_lock(&apic->lock);
    uint8_t priority = apic->tpr >> 4 & 0xf;
    pthread_mutex_unlock(&apic->lock);
    return priority;
}

void lapic_cr8_write(struct lapic_set *set, unsigned cpu, uint8_t value)
{
    struct lapic *apic = &set->apics[cpu];
    lapic_lock(apic);
    apic->tpr = (uint32_t)(value & 0xf) << 4;
    lapic_unlock(apic);
}

/* Returns the level-triggered vector whose end is to be broadcast, or -1. */
static int end_of_interrupt(struct lapic *apic)
{
    int vector = bits_highest(apic->isr);
    if (vector < 0)
        return -1;
    bits_clear(apic->isr, (uint8_t)vector);
    if (!bits_test(apic->tmr, (uint8_t)vector))
        return -1;
    uint32_t *lint0 = &apic->lvt[LVT_LINT0];
    if ((*lint0 & LVT_REMOTE_IRR) && (*lint0 & LVT_VECTOR) == (uint32_t)vector) {
        *lint0 &= ~LVT_REMOTE_IRR;
        lint0_evaluate(apic, false);
    }
    return vector;
}

/* ---- Registers ---- */

static uint32_t register_read(struct lapic *apic, unsigned reg)
{
    switch (reg) {
    case REG_ID:
        return lapic_is_x2apic(apic) ? apic->cpu : apic->cpu << 24;
    case REG_VERSION:
        return LAPIC_VERSION_VALUE;
    case REG_TPR:
        return apic->tpr;
    case REG_APR:
        return lapic_apr(apic);
    case REG_PPR:
        return lapic_ppr(apic);
    case REG_LDR:
        return lapic_logical_id(apic);
    case REG_DFR:
        return apic->dfr;
    case REG_SVR:
        return apic->svr;
    case REG_ISR ... REG_ISR + 7:
        return apic->isr[reg - REG_ISR];
    case REG_TMR ... REG_TMR + 7:
        return apic->tmr[reg - REG_TMR];
    case REG_IRR ... REG_IRR + 7:
        return apic->irr[reg - REG_IRR];
    case REG_ESR:
        return apic->esr;
    case REG_ICR_LOW:
        return apic->icr_low;
    case REG_ICR_HIGH:
        return apic->icr_high;
    case REG_LVT_TIMER ... REG_LVT_ERROR:
        return apic->lvt[reg - REG_LVT_TIMER];
    case REG_INITIAL_COUNT:
        return apic->timer.initial_count;
    case REG_CURRENT_COUNT:
        return lapic_timer_current_count(apic);
    case REG_DIVIDE:
        return apic->timer.divide;
    default:
        return 0;
    }
}

static void lvt_write(struct lapic *apic, unsigned index, uint32_t value)
{
    value = (value & ~LVT_READ_ONLY) | (apic->lvt[index] & LVT_REMOTE_IRR);
    if (!(apic->svr & SVR_ENABLED))
        value |= LVT_MASKED;
    if (index == LVT_LINT0 && !((value & LVT_LEVEL) && (value >> 8 & 7) == DELIVERY_FIXED))
        value &= ~LVT_REMOTE_IRR;
    if (index == LVT_TIMER)
        lapic_timer_write_lvt(apic, value);
    else
        apic->lvt[index] = value;
    if (index == LVT_LINT0)
        lint0_evaluate(apic, false);
}

static void svr_write(struct lapic *apic, uint32_t value)
{
    apic->svr = value;
    if (value & SVR_ENABLED)
        return;
    for (unsigned i = 0; i < LVT_COUNT; i++)
        lvt_write(apic, i, apic->lvt[i] | LVT_MASKED);
}

/* Registers whose writing has no effect outside this APIC. `value` has existing bits only. */
static void register_write(struct lapic *apic, unsigned reg, uint32_t value)
{
    switch (reg) {
    case REG_TPR:
        apic->tpr = value;
        break;
    case REG_LDR:
        apic->ldr = value;
        break;
    case REG_DFR:
        apic->dfr = value | 0x0fffffff;
        break;
    case REG_SVR:
        svr_write(apic, value);
        break;
    case REG_ESR: /* a write makes what happened since the last one readable (11.5.3) */
        apic->esr = apic->esr_pending;
        apic->esr_pending = 0;
        break;
    case REG_ICR_HIGH:
        apic->icr_high = value;
        break;
    case REG_LVT_TIMER ... REG_LVT_ERROR:
        lvt_write(apic, reg - REG_LVT_TIMER, value);
        break;
    case REG_INITIAL_COUNT:
        lapic_timer_write_initial_count(apic, value);
        break;
    case REG_DIVIDE:
        lapic_timer_write_divide(apic, value);
        break;
    }
}

static void eoi_write(struct lapic *apic)
{
    lapic_lock(apic);
    int vector = end_of_interrupt(apic);
    lapic_unlock(apic);
    if (vector >= 0)
        apic->set->ops->eoi(apic->set->ctx, (uint8_t)vector);
}

static void icr_write(struct lapic *apic, uint32_t low, uint32_t high, bool x2apic)
{
    pthread_mutex_lock(&apic->lock);
    apic->icr_low = low;
    apic->icr_high = high;
    pthread_mutex_unlock(&apic->lock);
    lapic_send_ipi(apic, low, x2apic ? high : high >> 24, x2apic);
}

/* ---- xAPIC: the page ---- */

uint64_t lapic_mmio_base(struct lapic_set *set, unsigned cpu)
{
    uint64_t base = atomic_load_explicit(&set->apics[cpu].base, memory_order_relaxed);
    return (base & APIC_BASE_MODE) == APIC_BASE_EN ? base & APIC_BASE_ADDRESS : UINT64_MAX;
}

static bool register_accessible(unsigned reg, unsigned access)
{
    return reg < REG_COUNT && (registers[reg].access & access);
}

/* Registers are 32 bits wide at multiples of 16. Parts of one can be read; the gaps between them read as zero. */
uint64_t lapic_mmio_read(struct lapic_set *set, unsigned cpu, uint32_t offset, unsigned size_bytes)
{
    struct lapic *apic = &set->apics[cpu];
    unsigned reg = (offset & 0xfff) >> 4, byte = offset & 0xf;
    if (byte >= 4)
        return 0;
    lapic_lock(apic);
    uint32_t value = 0;
    if (register_accessible(reg, XR))
        value = register_read(apic, reg);
    else if (reg != REG_EOI)
        lapic_error(apic, ESR_ILLEGAL_REGISTER);
    lapic_unlock(apic);
    value >>= byte * 8;
    return size_bytes >= 4 ? value : value & ((1u << size_bytes * 8) - 1);
}

/* Only aligned writes of 32 bits are defined (11.4.1.1); others are dropped. */
void lapic_mmio_write(struct lapic_set *set, unsigned cpu, uint32_t offset, unsigned size_bytes, uint64_t value64)
{
    struct lapic *apic = &set->apics[cpu];
    unsigned reg = (offset & 0xfff) >> 4;
    uint32_t value = (uint32_t)value64;
    if ((offset & 0xf) || size_bytes < 4) {
        LOG_GUEST(LOG_DEBUG, "local APIC %u: %u-byte write at 0x%x dropped", cpu, size_bytes, offset);
        return;
    }
    if (reg == REG_EOI) {
        eoi_write(apic);
        return;
    }
    if (reg == REG_ICR_LOW) {
        icr_write(apic, value & registers[reg].writable, apic->icr_high, false);
        return;
    }
    lapic_lock(apic);
    if (register_accessible(reg, XW))
        register_write(apic, reg, value & registers[reg].writable);
    else if (!register_accessible(reg, XR)) /* read-only ones ignore the write */
        lapic_error(apic, ESR_ILLEGAL_REGISTER);
    lapic_unlock(apic);
}

/* ---- MSRs ---- */

static void registers_reset(struct lapic *apic)
{
    apic->tpr = apic->ldr = apic->icr_low = apic->icr_high = apic->esr = apic->esr_pending = 0;
    apic->dfr = UINT32_MAX;
    apic->svr = 0xff;
    for (unsigned i = 0; i < LVT_COUNT; i++)
        apic->lvt[i] = LVT_MASKED;
    memset(apic->isr, 0, sizeof(apic->isr));
    memset(apic->tmr, 0, sizeof(apic->tmr));
    memset(apic->irr, 0, sizeof(apic->irr));
    apic->extint_latched = false;
    lapic_timer_reset(apic);
}

/* Mode changes, SDM 11.12.5 and figure 11-27. */
static int base_write(struct lapic *apic, uint64_t value)
{
    if (value & ~(APIC_BASE_ADDRESS | APIC_BASE_MODE | APIC_BASE_BSP))
        return -EINVAL;
    uint64_t from = atomic_load(&apic->base) & APIC_BASE_MODE, to = value & APIC_BASE_MODE;
    if (to == APIC_BASE_EXTD || (from == 0 && to == APIC_BASE_MODE) || (from == APIC_BASE_MODE && to == APIC_BASE_EN))
        return -EINVAL;
    lapic_lock(apic);
    atomic_store(&apic->base, value);
    if (to == 0 && from != 0)
        registers_reset(apic);
    lapic_unlock(apic);
    return 0;
}

static int x2apic_read(struct lapic *apic, unsigned reg, uint64_t *value)
{
    if (!lapic_is_x2apic(apic) || !register_accessible(reg, X2R))
        return -EINVAL;
    lapic_lock(apic);
    *value = register_read(apic, reg);
    if (reg == REG_ICR_LOW)
        *value |= (uint64_t)apic->icr_high << 32;
    lapic_unlock(apic);
    return 0;
}

static int x2apic_write(struct lapic *apic, unsigned reg, uint64_t value)
{
    if (!lapic_is_x2apic(apic) || !register_accessible(reg, X2W))
        return -EINVAL;
    uint64_t writable = registers[reg].writable | (reg == REG_ICR_LOW ? 0xffffffff00000000ull : 0);
    if (value & ~writable)
        return -EINVAL;
    switch (reg) {
    case REG_EOI:
        eoi_write(apic);
        break;
    case REG_ICR_LOW:
        icr_write(apic, (uint32_t)value, (uint32_t)(value >> 32), true);
        break;
    case REG_SELF_IPI: /* the same as a fixed, edge-triggered IPI with the shorthand "self" (11.12.11) */
        lapic_send_ipi(apic, (uint32_t)value | 1u << 18, 0, true);
        break;
    default:
        lapic_lock(apic);
        register_write(apic, reg, (uint32_t)value);
        lapic_unlock(apic);
    }
    return 0;
}

int lapic_msr_read(struct lapic_set *set, unsigned cpu, uint32_t index, uint64_t *value)
{
    struct lapic *apic = &set->apics[cpu];
    if (index >= MSR_X2APIC_FIRST && index <= MSR_X2APIC_LAST)
        return x2apic_read(apic, index - MSR_X2APIC_FIRST, value);
    switch (index) {
    case MSR_IA32_APIC_BASE:
        *value = atomic_load(&apic->base);
        return 0;
    case MSR_IA32_TSC_DEADLINE:
        lapic_lock(apic);
        *value = lapic_timer_read_deadline(apic);
        lapic_unlock(apic);
        return 0;
    default:
        return -ENOENT;
    }
}

int lapic_msr_write(struct lapic_set *set, unsigned cpu, uint32_t index, uint64_t value)
{
    struct lapic *apic = &set->apics[cpu];
    if (index >= MSR_X2APIC_FIRST && index <= MSR_X2APIC_LAST)
        return x2apic_write(apic, index - MSR_X2APIC_FIRST, value);
    switch (index) {
    case MSR_IA32_APIC_BASE:
        return base_write(apic, value);
    case MSR_IA32_TSC_DEADLINE: {
        uint64_t expiry_ns = value ? set->ops->tsc_to_ns(set->ctx, cpu, value) : 0;
        lapic_lock(apic);
        lapic_timer_write_deadline(apic, value, expiry_ns);
        lapic_unlock(apic);
        return 0;
    }
    default:
        return -ENOENT;
    }
}

/* ---- Life ---- */

void lapic_reset(struct lapic_set *set, unsigned cpu, bool init_only)
{
    struct lapic *apic = &set->apics[cpu];
    lapic_lock(apic);
    if (!init_only)
        atomic_store(&apic->base, LAPIC_BASE_DEFAULT | APIC_BASE_EN | (cpu == 0 ? APIC_BASE_BSP : 0));
    registers_reset(apic);
    atomic_store(&apic->nmi_pending, false);
    lapic_unlock(apic);
}

void lapic_set_virtual_wire(struct lapic_set *set, unsigned cpu)
{
    struct lapic *apic = &set->apics[cpu];
    lapic_lock(apic);
    register_write(apic, REG_SVR, SVR_ENABLED | 0xff);
    lvt_write(apic, LVT_LINT0, DELIVERY_EXTINT << 8 | (cpu == 0 ? 0 : LVT_MASKED));
    lvt_write(apic, LVT_LINT1, DELIVERY_NMI << 8);
    lapic_unlock(apic);
}

int lapic_set_create(struct lapic_set **out, unsigned cpu_count, struct loop *loop, const struct lapic_ops *ops, void *ctx)
{
    *out = NULL;
    if (cpu_count == 0 || cpu_count > 4096)
        return -EINVAL;
    struct lapic_set *set = calloc(1, sizeof(*set));
    if (!set)
        return -ENOMEM;
    set->loop = loop;
    set->ops = ops;
    set->ctx = ctx;
    set->apics = aligned_alloc(_Alignof(struct lapic), cpu_count * sizeof(struct lapic));
    if (!set->apics) {
        free(set);
        return -ENOMEM;
    }
    memset(set->apics, 0, cpu_count * sizeof(struct lapic));
    for (; set->cpu_count < cpu_count; set->cpu_count++) {
        struct lapic *apic = &set->apics[set->cpu_count];
        apic->set = set;
        apic->cpu = set->cpu_count;
        apic->deliverable = -1;
        apic->timer.armed_ns = UINT64_MAX;
        apic->timer.loop_timer = loop_timer_create(loop, lapic_timer_expired, apic);
        if (!apic->timer.loop_timer) {
            lapic_set_destroy(set);
            return -ENOMEM;
        }
        pthread_mutex_init(&apic->lock, NULL);
        lapic_reset(set, apic->cpu, false);
    }
    *out = set;
    return 0;
}

void lapic_set_destroy(struct lapic_set *set)
{
    if (!set)
        return;
    for (unsigned cpu = 0; cpu < set->cpu_count; cpu++) {
        loop_timer_destroy(set->apics[cpu].timer.loop_timer);
        pthread_mutex_destroy(&set->apics[cpu].lock);
    }
    free(set->apics);
    free(set);
}

/* ---- State ---- */

static const char *check_loaded(const struct lapic *apic, uint64_t base)
{
    if ((base & ~(APIC_BASE_ADDRESS | APIC_BASE_MODE | APIC_BASE_BSP)) || (base & APIC_BASE_MODE) == APIC_BASE_EXTD)
        return "APIC base not possible";
    if ((apic->isr[0] | apic->irr[0]) & 0xffff)
        return "APIC has vectors below 16 pending";
    if ((apic->tpr & ~0xffu) || (apic->svr & ~registers[REG_SVR].writable) || (~apic->dfr & 0x0fffffff))
        return "APIC register has reserved bits set";
    for (unsigned i = 0; i < LVT_COUNT; i++) {
        if ((apic->lvt[i] & ~registers[REG_LVT_TIMER + i].writable) ||
            (!(apic->svr & SVR_ENABLED) && !(apic->lvt[i] & LVT_MASKED)))
            return "APIC local vector table entry not possible";
    }
    return NULL;
}

static void vector_bits_state(struct state_io *io, uint32_t bits[8])
{
    for (unsigned i = 0; i < 8; i++)
        state_u32(io, &bits[i]);
}

static void apic_state(struct lapic *apic, struct state_io *io)
{
    uint64_t base = atomic_load(&apic->base);
    bool nmi = atomic_load(&apic->nmi_pending);
    uint32_t *const fields[] = {&apic->tpr,      &apic->ldr, &apic->dfr,        &apic->svr, &apic->icr_low,
                                &apic->icr_high, &apic->esr, &apic->esr_pending};
    state_u64(io, &base);
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
        state_u32(io, fields[i]);
    for (unsigned i = 0; i < LVT_COUNT; i++)
        state_u32(io, &apic->lvt[i]);
    vector_bits_state(io, apic->isr);
    vector_bits_state(io, apic->tmr);
    vector_bits_state(io, apic->irr);
    state_bool(io, &apic->extint_level);
    state_bool(io, &apic->extint_latched);
    state_bool(io, &nmi);

    const char *wrong = state_loading(io) && !state_failed(io) ? check_loaded(apic, base) : NULL;
    if (wrong)
        state_fail(io, wrong);
    lapic_timer_state(apic, io);
    if (!state_loading(io))
        return;
    atomic_store(&apic->base, base);
    atomic_store(&apic->nmi_pending, nmi);
    apic->nmi_raised = nmi;
}

int lapic_state(struct lapic_set *set, struct state_io *io)
{
    uint32_t cpu_count = set->cpu_count;
    state_begin(io, "lapic", 1);
    state_u32(io, &cpu_count);
    if (state_loading(io) && cpu_count != set->cpu_count)
        state_fail(io, "number of processors differs");
    for (unsigned cpu = 0; cpu < set->cpu_count; cpu++) {
        lapic_lock(&set->apics[cpu]);
        apic_state(&set->apics[cpu], io);
        lapic_unlock(&set->apics[cpu]);
    }
    int rc = state_end(io);
    if (rc < 0 && state_loading(io)) { /* half of a state is worse than none */
        for (unsigned cpu = 0; cpu < set->cpu_count; cpu++)
            lapic_reset(set, cpu, false);
    }
    return rc;
}

void lapic_dump(struct lapic_set *set, FILE *out)
{
    for (unsigned cpu = 0; cpu < set->cpu_count; cpu++) {
        struct lapic *apic = &set->apics[cpu];
        pthread_mutex_lock(&apic->lock);
        fprintf(out,
                "lapic %u: base %llx svr %x tpr %02x ppr %02x irr %d isr %d deliverable %d lvt timer %x lint0 %x "
                "lint1 %x error %x timer %s in %lld ns%s\n",
                cpu, (unsigned long long)atomic_load(&apic->base), apic->svr, apic->tpr, lapic_ppr(apic),
                bits_highest(apic->irr), bits_highest(apic->isr), atomic_load(&apic->deliverable), apic->lvt[LVT_TIMER],
                apic->lvt[LVT_LINT0], apic->lvt[LVT_LINT1], apic->lvt[LVT_ERROR],
                apic->timer.running ? "expires" : "stopped",
                apic->timer.running ? (long long)(apic->timer.expiry_ns - inputs_now_ns()) : 0ll,
                atomic_load(&apic->nmi_pending) ? " nmi" : "");
        pthread_mutex_unlock(&apic->lock);
    }
}
