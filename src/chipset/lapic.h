/*
 * Local APICs of all processors of a machine, xAPIC and x2APIC mode, with timers, IPIs and the message bus between them.
 * SDM vol. 3, chapter 11.
 *
 * Threading: every function may be called from any thread, with or without the device lock; each APIC has a lock of its own
 * (rank below the device lock). Callbacks in lapic_ops are made with no APIC lock held.
 */
#ifndef DOPPEL_CHIPSET_LAPIC_H
#define DOPPEL_CHIPSET_LAPIC_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "arch/apic.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/loop.h"

struct lapic_set; /* all local APICs of one machine */

#define LAPIC_BASE_DEFAULT 0xFEE00000ull
#define LAPIC_TIMER_HZ 1000000000ull /* the timer's input clock: one tick a nanosecond */

struct lapic_ops {
    /* Something may have become deliverable on this processor (interrupt, NMI): wake and kick it. Any thread. */
    void (*wake)(void *ctx, unsigned cpu);
    /* INIT and startup IPIs addressed to this processor. Any thread. */
    void (*init)(void *ctx, unsigned cpu);
    void (*startup)(void *ctx, unsigned cpu, uint8_t vector);
    /* A level-triggered vector ended (EOI broadcast): the IOAPIC looks whether its line is still high. Takes the device lock itself. */
    void (*eoi)(void *ctx, uint8_t vector);
    /* ExtINT through LINT0: acknowledge the 8259 pair, returns its vector. -1: nothing pending. Takes the device lock itself. */
    int (*pic_ack)(void *ctx);
    /* Guest TSC now on that processor, and the host monotonic time at which it will reach `tsc`. */
    uint64_t (*tsc_now)(void *ctx, unsigned cpu);
    uint64_t (*tsc_to_ns)(void *ctx, unsigned cpu, uint64_t tsc);
};

int lapic_set_create(struct lapic_set **set, unsigned cpu_count, struct loop *loop, const struct lapic_ops *ops, void *ctx)
    __attribute__((warn_unused_result));
void lapic_set_destroy(struct lapic_set *set);

void lapic_reset(struct lapic_set *set, unsigned cpu, bool init_only); /* INIT keeps the APIC id and base */

/* The page at the APIC base (xAPIC mode). Offset 0..0xFFF, 32-bit registers; other sizes do what hardware does. */
uint64_t lapic_mmio_read(struct lapic_set *set, unsigned cpu, uint32_t offset, unsigned size_bytes);
void lapic_mmio_write(struct lapic_set *set, unsigned cpu, uint32_t offset, unsigned size_bytes, uint64_t value);
/* gpa of the page, or UINT64_MAX when not in xAPIC mode. */
uint64_t lapic_mmio_base(struct lapic_set *set, unsigned cpu);

/* IA32_APIC_BASE, IA32_TSC_DEADLINE, 0x800..0x8FF. -EINVAL: #GP. -ENOENT: not an APIC MSR. */
int lapic_msr_read(struct lapic_set *set, unsigned cpu, uint32_t index, uint64_t *value);
int lapic_msr_write(struct lapic_set *set, unsigned cpu, uint32_t index, uint64_t value);

/* See struct vcpu_host_ops. */
int lapic_interrupt_peek(struct lapic_set *set, unsigned cpu); /* ExtINT: 0, since only the acknowledgement tells its vector */
int lapic_interrupt_ack(struct lapic_set *set, unsigned cpu);
bool lapic_nmi_take(struct lapic_set *set, unsigned cpu);
uint8_t lapic_cr8_read(struct lapic_set *set, unsigned cpu);
void lapic_cr8_write(struct lapic_set *set, unsigned cpu, uint8_t value);

/* The 8259's INTR output is wired to LINT0 of every processor (only the enabled one takes it). */
void lapic_set_extint(struct lapic_set *set, bool level);
void lapic_inject_nmi(struct lapic_set *set, unsigned cpu);
/* Some APIC has it requested or in service. */
bool lapic_has_vector(struct lapic_set *set, uint8_t vector);

/* What firmware leaves behind and a kernel that is booted without any expects: software-enabled, LINT0 ExtINT on processor 0, LINT1 NMI. */
void lapic_set_virtual_wire(struct lapic_set *set, unsigned cpu);

/* Delivers a message; ctx of the returned target is the set. */
struct msi_target lapic_msi_target(struct lapic_set *set);

/*
 * An engine may keep the APICs itself. Giving hands a state over, and what is here rests afterwards; taking brings it back, to be saved; resting forgets it again.
 * While the processors stand still.
 */
void lapic_give(struct lapic_set *set, unsigned cpu, struct apic_state *state);
void lapic_take(struct lapic_set *set, unsigned cpu, const struct apic_state *state);
void lapic_rest(struct lapic_set *set, unsigned cpu);

int lapic_state(struct lapic_set *set, struct state_io *io) __attribute__((warn_unused_result));
void lapic_dump(struct lapic_set *set, FILE *out);

#endif
