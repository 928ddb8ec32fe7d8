/*
 * Files with the pages that a machine touched first after it went on from a snapshot, to be read ahead the next time (docs/formats.md). Only advice: a file that is damaged, of another
 * snapshot or not complete is as good as none, and no guest depends on what it says.
 * Threading: stateless.
 */
#ifndef DOPPEL_STATE_WORKING_SET_H
#define DOPPEL_STATE_WORKING_SET_H

#include <stddef.h>
#include <stdint.h>

#include "state/chunk_file.h"

#define WORKING_SET_RUNS_MAX 65536u
#define WORKING_SET_BYTES_MAX (64u + 8u * WORKING_SET_RUNS_MAX)

/*
 * Sets the bits of the pages that the file names, by 64, for a memory of `page_count`, of the snapshot `id`. How many there are, or -EINVAL; then no bit was touched.
 */
int64_t working_set_read(const void *data, size_t size_bytes, const struct chunk_id *id, uint64_t page_count, uint64_t *pages);
/* The bytes of a file, for free(); when there are too many runs, it has the first. NULL: out of memory. */
void *working_set_make(const uint64_t *pages, uint64_t page_count, const struct chunk_id *id, size_t *size_bytes);

#endif
