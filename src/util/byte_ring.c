/* A ring of bytes that never waits (byte_ring.h). */
#include "util/byte_ring.h"

#include <string.h>

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

void byte_ring_put(struct byte_ring *ring, const void *data, size_t size_bytes)
{
    size_t taken = smaller(ring->room - ring->count, size_bytes), at = (ring->start + ring->count) % ring->room, first = smaller(taken, ring->room - at);
    memcpy(ring->data + at, data, first);
    memcpy(ring->data, (const uint8_t *)data + first, taken - first);
    ring->count += taken;
    ring->lost += size_bytes - taken;
}

size_t byte_ring_take(struct byte_ring *ring, void *data, size_t room_bytes, uint64_t *lost)
{
    size_t n = smaller(ring->count, room_bytes), first = smaller(n, ring->room - ring->start);
    memcpy(data, ring->data + ring->start, first);
    memcpy((uint8_t *)data + first, ring->data, n - first);
    ring->start = (ring->start + n) % ring->room;
    ring->count -= n;
    *lost = ring->count ? 0 : ring->lost;
    if (!ring->count)
        ring->lost = 0;
    return n;
}
