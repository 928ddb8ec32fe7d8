/* The paravirtual clock (pvclock.h). Layout of the two records: the kernel's Documentation/virt/kvm/x86/msr.rst. */
#include "machine/pvclock.h"

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#define ENABLE 1u
#define FLAG_TSC_STABLE 1u
#define FLAG_GUEST_STOPPED 2u

struct system_record {
    uint32_t version, pad0;
    uint64_t tsc_timestamp, system_time_ns;
    uint32_t tsc_to_system_mul;
    int8_t tsc_shift;
    uint8_t flags, pad1[2];
};

struct wall_record {
    uint32_t version, seconds, nanoseconds;
};

int pvclock_msr_read(const struct pvclock *clock, uint32_t index, uint64_t *value)
{
    if (index == PVCLOCK_MSR_WALL)
        *value = clock->wall_msr;
    else if (index == PVCLOCK_MSR_SYSTEM)
        *value = clock->system_msr;
    else
        return -ENOENT;
    return 0;
}

/* ns = ((ticks << shift) * mul) >> 32, with mul using all 32 bits. */
static void scale_for(uint64_t tsc_khz, uint32_t *mul, int8_t *shift)
{
    uint64_t hz = tsc_khz * 1000;
    int s = 0;
    while (hz > 2000000000ull) {
        hz >>= 1;
        s--;
    }
    while (hz <= 1000000000ull) {
        hz <<= 1;
        s++;
    }
    *mul = (uint32_t)((1000000000ull << 32) / hz);
    *shift = (int8_t)s;
}

/* Readers see an odd version while a record is being written. */
static int publish(struct physmap *memory, gpa_t gpa, void *record, size_t size_bytes)
{
    uint8_t *guest = physmap_get(memory, gpa, size_bytes, PHYSMAP_WRITE);
    if (!guest || gpa % 4)
        return -EINVAL;
    uint32_t version = (*(uint32_t *)guest | 1) + 2;
    _Atomic uint32_t *shared = (_Atomic uint32_t *)guest;
    atomic_store(shared, version);
    memcpy(guest + 4, (const uint8_t *)record + 4, size_bytes - 4);
    atomic_store(shared, version + 1);
    physmap_mark_dirty(memory, gpa, size_bytes);
    return 0;
}

int pvclock_msr_write(struct pvclock *clock, struct physmap *memory, uint32_t index, uint64_t value, const struct pvclock_now *now)
{
    if (index == PVCLOCK_MSR_WALL) {
        struct wall_record record = {.seconds = (uint32_t)(now->wall_ns / 1000000000), .nanoseconds = (uint32_t)(now->wall_ns % 1000000000)};
        if (publish(memory, value, &record, sizeof record))
            return -EINVAL;
        clock->wall_msr = value;
        return 0;
    }
    if (index != PVCLOCK_MSR_SYSTEM)
        return -ENOENT;
    if (value & ENABLE) {
        struct system_record record = {.tsc_timestamp = now->tsc, .system_time_ns = now->system_ns, .flags = FLAG_TSC_STABLE};
        scale_for(now->tsc_khz, &record.tsc_to_system_mul, &record.tsc_shift);
        if (publish(memory, value & ~(uint64_t)ENABLE, &record, sizeof record))
            return -EINVAL;
    }
    clock->system_msr = value;
    return 0;
}

void pvclock_stopped(const struct pvclock *clock, struct physmap *memory)
{
    gpa_t gpa = (clock->system_msr & ~(uint64_t)ENABLE) + offsetof(struct system_record, flags);
    uint8_t *flags = clock->system_msr & ENABLE ? physmap_get(memory, gpa, 1, PHYSMAP_WRITE) : NULL;
    if (!flags)
        return;
    *flags |= FLAG_GUEST_STOPPED; /* the guest clears it */
    physmap_mark_dirty(memory, gpa, 1);
}

void pvclock_state(struct pvclock *clock, struct state_io *io)
{
    state_u64(io, &clock->wall_msr);
    state_u64(io, &clock->system_msr);
}
