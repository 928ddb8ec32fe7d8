/*
 * The inside of the local APICs, shared by lapic.c (registers, priorities), lapic_timer.c and lapic_message.c (IPIs, MSIs).
 *
 * Threading: the fields of an APIC belong to its `lock`, except those marked atomic, which others read without it and which
 * change only under it. No two APIC locks are ever held together. lapic_unlock publishes what is deliverable and wakes the processor.
 */
#ifndef DOPPEL_CHIPSET_LAPIC_PRIV_H
#define DOPPEL_CHIPSET_LAPIC_PRIV_H

#include <pthread.h>
#include <stdatomic.h>

#include "chipset/lapic.h"

/* IA32_APIC_BASE, SDM vol. 3, figure 11-26. */
#define APIC_BASE_BSP (1ull << 8)
#define APIC_BASE_EXTD (1ull << 10)
#define APIC_BASE_EN (1ull << 11)
#define APIC_BASE_MODE (APIC_BASE_EXTD | APIC_BASE_EN)
#define APIC_BASE_ADDRESS 0x000ffffffffff000ull

/* Register numbers: xAPIC offset / 16, x2APIC MSR - 0x800. */
enum lapic_register {
    REG_ID = 0x02, REG_VERSION = 0x03, REG_TPR = 0x08, REG_APR = 0x09, REG_PPR = 0x0A, REG_EOI = 0x0B, REG_RRD = 0x0C,
    REG_LDR = 0x0D, REG_DFR = 0x0E, REG_SVR = 0x0F, REG_ISR = 0x10, REG_TMR = 0x18, REG_IRR = 0x20, REG_ESR = 0x28,
    REG_ICR_LOW = 0x30, REG_ICR_HIGH = 0x31, REG_LVT_TIMER = 0x32, REG_LVT_THERMAL = 0x33, REG_LVT_PERF = 0x34,
    REG_LVT_LINT0 = 0x35, REG_LVT_LINT1 = 0x36, REG_LVT_ERROR = 0x37, REG_INITIAL_COUNT = 0x38, REG_CURRENT_COUNT = 0x39,
    REG_DIVIDE = 0x3E, REG_SELF_IPI = 0x3F, REG_COUNT = 0x40
};

enum lapic_lvt { LVT_TIMER, LVT_THERMAL, LVT_PERF, LVT_LINT0, LVT_LINT1, LVT_ERROR, LVT_COUNT };

#define LVT_VECTOR 0x000000ffu
#define LVT_REMOTE_IRR (1u << 14)
#define LVT_LEVEL (1u << 15)
#define LVT_MASKED (1u << 16)

#define SVR_ENABLED (1u << 8)

#define ESR_SEND_ILLEGAL_VECTOR (1u << 5)
#define ESR_RECEIVE_ILLEGAL_VECTOR (1u << 6)
#define ESR_ILLEGAL_REGISTER (1u << 7)

/* Delivery modes of the ICR, of messages and of LVT entries (bits 10:8). */
enum delivery_mode {
    DELIVERY_FIXED = 0, DELIVERY_LOWEST = 1, DELIVERY_SMI = 2, DELIVERY_NMI = 4, DELIVERY_INIT = 5, DELIVERY_STARTUP = 6,
    DELIVERY_EXTINT = 7
};

enum timer_mode { TIMER_ONE_SHOT, TIMER_PERIODIC, TIMER_TSC_DEADLINE, TIMER_RESERVED };

struct lapic_timer {
    bool running;
    uint64_t expiry_ns;    /* when the count reaches zero or the TSC the deadline */
    uint64_t deadline_tsc; /* IA32_TSC_DEADLINE; 0: disarmed */
    uint32_t initial_count, divide;
    uint64_t armed_ns; /* what loop_timer is set to; UINT64_MAX: off */
    struct loop_timer *loop_timer;
};

struct lapic {
    struct lapic_set *set;
    unsigned cpu; /* also the APIC id */
    pthread_mutex_t lock;
    _Atomic uint64_t base;   /* IA32_APIC_BASE */
    _Atomic int deliverable; /* what lapic_interrupt_peek answers */
    atomic_bool nmi_pending;
    bool nmi_raised; /* since the lock was taken */

    uint32_t tpr, ldr, dfr, svr, icr_low, icr_high;
    uint32_t esr, esr_pending;
    uint32_t lvt[LVT_COUNT];
    uint32_t isr[8], tmr[8], irr[8];
    bool extint_level;   /* INTR of the 8259 pair at LINT0 */
    bool extint_latched; /* a message with delivery mode ExtINT arrived */
    struct lapic_timer timer;
} __attribute__((aligned(64)));

struct lapic_set {
    unsigned cpu_count;
    struct loop *loop;
    const struct lapic_ops *ops;
    void *ctx;
    _Atomic unsigned arbitration; /* where the search for the lowest priority starts */
    struct lapic *apics;
};

static inline bool lapic_is_enabled(const struct lapic *apic)
{
    return atomic_load_explicit(&apic->base, memory_order_relaxed) & APIC_BASE_EN;
}

static inline bool lapic_is_x2apic(const struct lapic *apic)
{
    return (atomic_load_explicit(&apic->base, memory_order_relaxed) & APIC_BASE_MODE) == APIC_BASE_MODE;
}

/* Integrated APIC, LVT entries up to number 5, no suppression of EOI broadcasts (bit 24). */
#define LAPIC_VERSION_VALUE (0x14u | (LVT_COUNT - 1) << 16)

/* lapic.c */
uint32_t lapic_register_bits(unsigned reg); /* those that can be written */
void lapic_lock(struct lapic *apic);
void lapic_unlock(struct lapic *apic); /* wakes the processor when there is news */
uint32_t lapic_ppr(const struct lapic *apic);
void lapic_error(struct lapic *apic, uint32_t esr_bit);
void lapic_accept_fixed(struct lapic *apic, uint8_t vector, bool level); /* lock held */
void lapic_raise_nmi(struct lapic *apic);                                /* lock held */

/* lapic_timer.c; lock held */
void lapic_timer_expired(void *apic); /* the loop's callback; takes the lock */
void lapic_timer_reset(struct lapic *apic);
void lapic_timer_update(struct lapic *apic, uint64_t now_ns); /* fires when due, then arms for what comes next */
void lapic_timer_write_lvt(struct lapic *apic, uint32_t value);
void lapic_timer_write_initial_count(struct lapic *apic, uint32_t value);
void lapic_timer_write_divide(struct lapic *apic, uint32_t value);
uint32_t lapic_timer_current_count(struct lapic *apic);
uint64_t lapic_timer_read_deadline(struct lapic *apic);
void lapic_timer_write_deadline(struct lapic *apic, uint64_t tsc, uint64_t expiry_ns);
void lapic_timer_state(struct lapic *apic, struct state_io *io);

/* lapic_message.c; no lock held */
void lapic_send_ipi(struct lapic *from, uint32_t icr_low, uint32_t destination, bool x2apic);
void lapic_send_msi(void *set, uint64_t address, uint32_t data);
uint32_t lapic_logical_id(const struct lapic *apic); /* LDR as read; lock held */

#endif
