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

struct region_ops {
    const char *name;
    /* offset is from the region's start; size_bytes 1, 2, 4 or 8. */
    uint64_t (*read)(void *ctx, uint64_t offset, unsigned size_bytes);
    void (*write)(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value);
    unsigned size_min, size_max; /* 0 means 1 and 8 (ports: 4) */
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

/* Accesses that nobody claimed. */
uint64_t bus_unclaimed(const struct bus *bus);

#endif
