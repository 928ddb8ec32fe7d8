/*
 * Bytes between one who may not wait and one who takes them later: what does not fit is lost, and counted.
 * Threading: the owner's lock.
 */
#ifndef DOPPEL_UTIL_BYTE_RING_H
#define DOPPEL_UTIL_BYTE_RING_H

#include <stddef.h>
#include <stdint.h>

struct byte_ring {
    uint8_t *data; /* the owner's */
    size_t room, start, count;
    uint64_t lost; /* bytes, since they were last told */
};

/* As many as fit. */
void byte_ring_put(struct byte_ring *ring, const void *data, size_t size_bytes);
/* The oldest, at most room_bytes; 0: there are none. *lost gets, with the last of them, how many were lost behind it; else 0. */
size_t byte_ring_take(struct byte_ring *ring, void *data, size_t room_bytes, uint64_t *lost);

#endif
