/*
 * Pages of a migration on their way into messages and out of them (migrate_priv.h): compressed by threads of their own, and pages that are sent again as the difference from what was sent before.
 * Sandbox: the threads are made by a control thread, and inherit what it may do.
 */
#ifndef DOPPEL_MACHINE_MIGRATE_PACK_H
#define DOPPEL_MACHINE_MIGRATE_PACK_H

#include <stdint.h>

#include "state/stream.h"
#include "util/error.h"

/*
 * PAGES: u64 chunk, u64 pages that are meant, u64 of these all zero, u64 of these a difference (XOR) from what was sent of the page before, u8 1: compressed (zstd), 0: not; then the pages that are
 * not zero, one after the other. A page may come again.
 */
#define MIGRATE_PAGES_HEAD_BYTES 33u

struct packer;

/* level 0: nothing is compressed, there are no threads and no differences. NULL: no memory. */
struct packer *packer_create(struct stream *stream, int level, unsigned threads);
void packer_destroy(struct packer *packer);
/*
 * Pages of one chunk, from `data`, where the chunk is; the guest may be writing to them, and they may change when this returns. Messages go to the stream in the order of the calls, on the callers'
 * threads, one at a time; the last ones by packer_flush.
 */
int packer_put(struct packer *packer, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err) __attribute__((warn_unused_result));
int packer_flush(struct packer *packer, struct error *err) __attribute__((warn_unused_result));
/* Before what was put and not sent, uncompressed. Only when nothing goes as a difference any more. */
int packer_put_first(struct packer *packer, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err) __attribute__((warn_unused_result));
void packer_no_differences(struct packer *packer);

struct unpacker;
struct unpacker *unpacker_create(void); /* NULL: no memory */
void unpacker_destroy(struct unpacker *unpacker);
/* What a PAGES message has: foreign bytes, checked against RAM of ram_bytes. `data` has those that are not zero, until the next message. */
struct unpacked_pages {
    uint64_t chunk, pages, zero, delta;
    const uint8_t *data;
};
int unpacker_open(struct unpacker *unpacker, uint64_t ram_bytes, const uint8_t *body, size_t size_bytes, struct unpacked_pages *out, struct error *err) __attribute__((warn_unused_result));
/* Puts a PAGES message where it belongs in RAM of ram_bytes at `ram`. Foreign bytes. */
int unpacker_take(struct unpacker *unpacker, uint8_t *ram, uint64_t ram_bytes, const uint8_t *body, size_t size_bytes, struct error *err) __attribute__((warn_unused_result));

#endif
