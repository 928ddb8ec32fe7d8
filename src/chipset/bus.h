/*
 * The bus: who answers at an I/O port or at a guest-physical address that is not RAM.
 *
 * Parts register regions. The bus normalises each access once: a callback only ever sees sizes its region allows (min/max), never one that
 * crosses the region's end. Wider or unaligned accesses are split; a read narrower than `size_min` is widened and cut, a write narrower than that is
 * dropped. Unclaimed reads give all ones, unclaimed writes vanish; both are counted.
 * Threading: every call is made with the machine's device lock held, on a vCPU's thread or the loop's. Callbacks run under it.
 */
#ifndef DOPPEL_CHIPSET_BUS_H
#define DOPPEL_CHIPSET_BUS_H

#include <stdbool.h>
#include <stdint.h>

#include "memory/memory.h"

struct bus;

/*
 * A write that says nothing but "look": somebody between guest and bus (a kernel that runs the guest) may turn it into a count on an eventfd, so that no vCPU has to come
 * out for it. The same write on the bus does the same.
 */
struct bus_doorbell {
    uint64_t offset;     /* in the region */
    unsigned size_bytes; /* 0: any */
    bool match;          /* this value only */
    uint64_t value;
    int fd; /* the region's */
};

struct region_ops {
    const char *name;
    /* offset is from the region's start; size_bytes 1, 2, 4 or 8. */
    uint64_t (*read)(void *ctx, uint64_t offset, unsigned size_bytes);
    void (*write)(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value);
    unsigned size_min, size_max; /* 0 means 1 and 8 (ports: 4) */
    /* The region's n-th doorbell; false: there are no more. NULL: none. Asked when it is mapped and when it goes. */
    bool (*doorbell)(void *ctx, unsigned n, struct bus_doorbell *doorbell);
};

enum bus_space { BUS_PORT, BUS_MMIO };

struct bus *bus_create(void);
void bus_destroy(struct bus *bus);

/* -EEXIST when it overlaps a region of higher or equal priority; -EINVAL when empty or beyond the space. Regions registered by PCI BARs may overlap nothing. */
int bus_add(struct bus *bus, enum bus_space space, uint64_t base, uint64_t length_bytes, const struct region_ops *ops, void *ctx)
    __attribute__((warn_unused_result));
/* Removes the region that starts at base and has this ctx; nothing when there is none. */
void bus_remove(struct bus *bus, enum bus_space space, uint64_t base, void *ctx);

uint64_t bus_read(struct bus *bus, enum bus_space space, uint64_t address, unsigned size_bytes);
void bus_write(struct bus *bus, enum bus_space space, uint64_t address, unsigned size_bytes, uint64_t value);

/* Who turns doorbells in memory into counts, told of each that comes (with those that are there) and goes. NULL: nobody any more. */
typedef void bus_doorbell_fn(void *ctx, uint64_t address, const struct bus_doorbell *doorbell, bool on);
void bus_set_doorbells(struct bus *bus, bus_doorbell_fn *fn, void *ctx);

/* Accesses that nobody claimed. */
uint64_t bus_unclaimed(const struct bus *bus);

#endif
