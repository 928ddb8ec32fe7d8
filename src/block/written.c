/*
 * Which parts of an image have been written (block.h), for who copies it while it is in use: a bit for each BLOCK_WRITTEN_BYTES. A part is noted when a request begins and when it ends, so that
 * whoever takes a note and reads afterwards has the new bytes, or a note of them again.
 * Threading: with the guard.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "block/block_priv.h"

struct block_written {
    uint64_t parts, count; /* count: bits that are set */
    uint64_t bits[];
};

static uint64_t word_bits(uint64_t word, uint64_t first, uint64_t last)
{
    uint64_t bits = ~0ull;
    if (word == first / 64)
        bits &= ~0ull << first % 64;
    if (word == last / 64)
        bits &= ~0ull >> (63 - last % 64);
    return bits;
}

static void note(struct block_written *written, uint64_t offset, uint64_t length)
{
    uint64_t first = offset / BLOCK_WRITTEN_BYTES, last = (offset + length - 1) / BLOCK_WRITTEN_BYTES;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t bits = word_bits(word, first, last) & ~written->bits[word];
        written->bits[word] |= bits;
        written->count += (uint64_t)__builtin_popcountll(bits);
    }
}

void block_note_written(struct block *block, const struct block_request *request)
{
    bool writes = request->op == BLOCK_WRITE || request->op == BLOCK_DISCARD || request->op == BLOCK_WRITE_ZEROES;
    if (writes && request->length_bytes && request->offset_bytes < block->size_bytes && request->length_bytes <= block->size_bytes - request->offset_bytes)
        note(block->written, request->offset_bytes, request->length_bytes);
}

int block_track_writes(struct block *block, bool on)
{
    free(block->written);
    block->written = NULL;
    if (!on || !block->size_bytes)
        return 0;
    uint64_t parts = (block->size_bytes + BLOCK_WRITTEN_BYTES - 1) / BLOCK_WRITTEN_BYTES;
    block->written = calloc(1, sizeof *block->written + (parts + 63) / 64 * sizeof block->written->bits[0]);
    if (!block->written)
        return -ENOMEM;
    block->written->parts = parts;
    note(block->written, 0, block->size_bytes);
    return 0;
}

uint64_t block_written_bytes(const struct block *block)
{
    return block->written ? block->written->count * BLOCK_WRITTEN_BYTES : 0;
}

bool block_take_written(struct block *block, uint64_t *offset, uint64_t *length, uint64_t most)
{
    struct block_written *written = block->written;
    uint64_t part = *offset / BLOCK_WRITTEN_BYTES, end, limit = most / BLOCK_WRITTEN_BYTES;
    while (written && part < written->parts && !(written->bits[part / 64] >> part % 64 & 1))
        part = written->bits[part / 64] >> part % 64 ? part + 1 : (part / 64 + 1) * 64;
    if (!written || part >= written->parts)
        return false;
    for (end = part; end < written->parts && end - part < limit && written->bits[end / 64] >> end % 64 & 1; end++)
        written->bits[end / 64] &= ~(1ull << end % 64);
    written->count -= end - part;
    *offset = part * BLOCK_WRITTEN_BYTES;
    *length = (end == written->parts ? block->size_bytes : end * BLOCK_WRITTEN_BYTES) - *offset;
    return true;
}
