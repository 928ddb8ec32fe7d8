/*
 * The paravirtual clock that the hypervisor leaf offers (KVM's interface: MSRs 0x4B564D00 and 0x4B564D01): a page in guest memory says how the TSC maps to nanoseconds, so
 * a guest neither calibrates nor reads a slow device. One per vCPU; used by its thread, or while that is parked.
 */
#ifndef DOPPEL_MACHINE_PVCLOCK_H
#define DOPPEL_MACHINE_PVCLOCK_H

#include <stdint.h>

#include "memory/memory.h"
#include "state/state.h"

#define PVCLOCK_MSR_WALL 0x4B564D00u
#define PVCLOCK_MSR_SYSTEM 0x4B564D01u

struct pvclock {
    uint64_t wall_msr, system_msr; /* as written by the guest */
};

/* What the page says: guest TSC `tsc` is `system_ns` after the machine's start, `wall_ns` is the host's wall clock at the machine's start. */
struct pvclock_now {
    uint64_t tsc, tsc_khz, system_ns, wall_ns;
};

/* -ENOENT when `index` is not the clock's. */
int pvclock_msr_read(const struct pvclock *clock, uint32_t index, uint64_t *value);
int pvclock_msr_write(struct pvclock *clock, struct physmap *memory, uint32_t index, uint64_t value, const struct pvclock_now *now);
/* Tells the guest that this processor stood still (no watchdog of its own is to bark). While it does. */
void pvclock_stopped(const struct pvclock *clock, struct physmap *memory);
void pvclock_state(struct pvclock *clock, struct state_io *io);

#endif
