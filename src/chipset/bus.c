/*
 * Regions of a space in an array sorted by base, found by binary search after a look at the last hit.
 *
 * Invariants: regions of one space never overlap and are never empty; a callback sees an access that lies inside its region, is aligned to its
 * own size and has a size within [size_min, size_max].
 * Callbacks may add and remove regions (a BAR moves while configuration space is written), so nothing found is kept across a call.
 * Threading: with the device lock held.
 */
#include "chipset/bus.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct region {
    uint64_t base, last; /* inclusive, so that a region may end at 2^64 - 1 */
    const struct region_ops *ops;
    void *ctx;
};

struct space {
    struct region *regions;
    unsigned count, capacity;
    unsigned last_hit;
    uint64_t limit; /* highest address */
};

struct bus {
    struct space spaces[2];
    uint64_t unclaimed;
    bus_doorbell_fn *doorbell;
    void *doorbell_ctx;
};

struct bus *bus_create(void)
{
    struct bus *bus = calloc(1, sizeof(*bus));

    if (!bus)
        return NULL;
    bus->spaces[BUS_PORT].limit = 0xFFFF;
    bus->spaces[BUS_MMIO].limit = UINT64_MAX;
    return bus;
}

void bus_destroy(struct bus *bus)
{
    if (!bus)
        return;
    free(bus->spaces[BUS_PORT].regions);
    free(bus->spaces[BUS_MMIO].regions);
    free(bus);
}

/* Index of the first region that ends at or after address; count when there is none. */
static unsigned lower_bound(const struct space *space, uint64_t address)
{
    unsigned low = 0, high = space->count;

    while (low < high) {
        unsigned middle = low + (high - low) / 2;

        if (space->regions[middle].last < address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static bool contains(const struct region *region, uint64_t address)
{
    return address >= region->base && address <= region->last;
}

static const struct region *find(struct space *space, uint64_t address)
{
    unsigned index = space->last_hit;

    if (index >= space->count || !contains(&space->regions[index], address)) {
        index = lower_bound(space, address);
        if (index == space->count || !contains(&space->regions[index], address))
            return NULL;
        space->last_hit = index;
    }
    return &space->regions[index];
}

static void tell_doorbells(const struct bus *bus, const struct region *region, bool on)
{
    struct bus_doorbell doorbell;

    for (unsigned n = 0; bus->doorbell && region->ops->doorbell && region->ops->doorbell(region->ctx, n, &doorbell); n++)
        bus->doorbell(bus->doorbell_ctx, region->base + doorbell.offset, &doorbell, on);
}

void bus_set_doorbells(struct bus *bus, bus_doorbell_fn *fn, void *ctx)
{
    const struct space *space = &bus->spaces[BUS_MMIO];

    bus->doorbell = fn;
    bus->doorbell_ctx = ctx;
    for (unsigned i = 0; i < space->count; i++)
        tell_doorbells(bus, &space->regions[i], true);
}

int bus_add(struct bus *bus, enum bus_space which, uint64_t base, uint64_t length_bytes, const struct region_ops *ops, void *ctx)
{
    struct space *space = &bus->spaces[which];
    unsigned index;

    assert(ops);
    if (!length_bytes || base > space->limit || length_bytes - 1 > space->limit - base)
        return -EINVAL;
    index = lower_bound(space, base);
    if (index < space->count && space->regions[index].base <= base + (length_bytes - 1))
        return -EEXIST;
    if (space->count == space->capacity) {
        unsigned capacity = space->capacity ? space->capacity * 2 : 16;
        struct region *regions = realloc(space->regions, capacity * sizeof(*regions));

        if (!regions)
            return -ENOMEM;
        space->regions = regions;
        space->capacity = capacity;
    }
    memmove(&space->regions[index + 1], &space->regions[index], (space->count - index) * sizeof(struct region));
    space->regions[index] = (struct region){base, base + (length_bytes - 1), ops, ctx};
    space->count++;
    if (which == BUS_MMIO)
        tell_doorbells(bus, &space->regions[index], true);
    return 0;
}

void bus_remove(struct bus *bus, enum bus_space which, uint64_t base, void *ctx)
{
    struct space *space = &bus->spaces[which];
    unsigned index = lower_bound(space, base);

    if (index == space->count || space->regions[index].base != base || space->regions[index].ctx != ctx)
        return;
    if (which == BUS_MMIO)
        tell_doorbells(bus, &space->regions[index], false);
    space->count--;
    memmove(&space->regions[index], &space->regions[index + 1], (space->count - index) * sizeof(struct region));
}

static uint64_t ones(unsigned size_bytes)
{
    return size_bytes >= 8 ? UINT64_MAX : (1ull << (size_bytes * 8)) - 1;
}

static unsigned region_size_min(const struct region *region)
{
    return region->ops->size_min ? region->ops->size_min : 1;
}

/* The largest access at `offset` that is aligned, allowed, inside the region and no longer than size_bytes. */
static unsigned piece_bytes(const struct region *region, uint64_t offset, unsigned size_bytes, bool port)
{
    unsigned max = region->ops->size_max ? region->ops->size_max : port ? 4 : 8;
    unsigned piece = 8;

    while (piece > max || piece > size_bytes || (offset & (piece - 1)) || piece - 1 > region->last - region->base - offset)
        piece /= 2;
    return piece;
}

static uint64_t read_piece(const struct region *region, uint64_t offset, unsigned piece)
{
    unsigned min = region_size_min(region);
    uint64_t start = offset & ~(uint64_t)(min - 1);

    if (!region->ops->read)
        return ones(piece);
    if (piece >= min)
        return region->ops->read(region->ctx, offset, piece) & ones(piece);
    if (min - 1 > region->last - region->base - start)
        return ones(piece);
    return region->ops->read(region->ctx, start, min) >> ((offset - start) * 8) & ones(piece);
}

uint64_t bus_read(struct bus *bus, enum bus_space which, uint64_t address, unsigned size_bytes)
{
    struct space *space = &bus->spaces[which];
    uint64_t value = 0;
    bool claimed = true;
    unsigned done = 0;

    assert(size_bytes >= 1 && size_bytes <= 8);
    while (done < size_bytes) {
        uint64_t at = address + done;
        const struct region *region = at < address ? NULL : find(space, at);
        unsigned piece = 1;
        uint64_t part = 0xFF;

        if (region) {
            struct region copy = *region;

            piece = piece_bytes(&copy, at - copy.base, size_bytes - done, which == BUS_PORT);
            part = read_piece(&copy, at - copy.base, piece);
        } else {
            claimed = false;
        }
        value |= part << (done * 8);
        done += piece;
    }
    bus->unclaimed += !claimed;
    return value;
}

void bus_write(struct bus *bus, enum bus_space which, uint64_t address, unsigned size_bytes, uint64_t value)
{
    struct space *space = &bus->spaces[which];
    bool claimed = true;
    unsigned done = 0;

    assert(size_bytes >= 1 && size_bytes <= 8);
    while (done < size_bytes) {
        uint64_t at = address + done;
        const struct region *region = at < address ? NULL : find(space, at);
        unsigned piece = 1;

        if (region) {
            struct region copy = *region;

            piece = piece_bytes(&copy, at - copy.base, size_bytes - done, which == BUS_PORT);
            if (copy.ops->write && piece >= region_size_min(&copy))
                copy.ops->write(copy.ctx, at - copy.base, piece, value >> (done * 8) & ones(piece));
        } else {
            claimed = false;
        }
        done += piece;
    }
    bus->unclaimed += !claimed;
}

uint64_t bus_unclaimed(const struct bus *bus)
{
    return bus->unclaimed;
}
