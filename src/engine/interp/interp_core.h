/*
 * What the core's own files (interp.c, block.c, tlb.c) share beyond interp_priv.h.
 *
 * Threading: `lock` guards the list of vCPUs; `split_lock` serialises locked accesses that cross into a page elsewhere in host memory.
 */
#ifndef DOPPEL_ENGINE_INTERP_CORE_H
#define DOPPEL_ENGINE_INTERP_CORE_H

#include <pthread.h>

#include "engine/interp/interp_priv.h"

#define INTERP_VCPUS_MAX 256

struct engine {
    struct physmap *memory;
    pthread_mutex_t lock;
    pthread_mutex_t split_lock;
    struct icpu *vcpus[INTERP_VCPUS_MAX];
};

/* A store of `length` bytes went to host memory: the running block may have been hit. */
void block_note_store(struct icpu *c, uintptr_t host, unsigned length);

/* The block's bytes have changed: it is not found again. Its memory stays until the next flush. */
void block_drop(struct icpu *c, struct block *b);

/* Code bytes within one page for which mem_fetch_host gave NULL. */
void mem_fetch_mmio(struct icpu *c, gva_t gva, uint8_t *to, unsigned length);

static inline uint64_t block_load64(const uint8_t *p)
{
    return *(const volatile uint64_t *)p;
}

/* True while the block's bytes in memory are those that were decoded (of a crossing instruction: those in the first page). */
static inline bool block_is_intact(const struct block *b)
{
    const uint8_t *p = (const uint8_t *)b->host;
    for (int n = 0; n < b->tail_offset; n += 8)
        if (block_load64(p + n) != block_load64(b->bytes + n))
            return false;
    return (block_load64(p + b->tail_offset) & b->tail_mask) == b->tail_value;
}

#endif
