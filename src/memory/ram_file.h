/*
 * Guest RAM in a file: byte for byte as physmap_offset counts, sparse where nothing but zeroes is. For snapshots.
 * Threading: no vCPU runs and no device writes meanwhile, but for ram_file_pages.
 */
#ifndef DOPPEL_MEMORY_RAM_FILE_H
#define DOPPEL_MEMORY_RAM_FILE_H

#include "memory/memory.h"

/*
 * Writes RAM to `fd` and forgets all dirty marks: all of it, into an empty file, or (`dirty_only`) pages marked dirty, pages of zeroes included, wherever
 * they are in the file. After a failure (-errno, err names the cause) the marks are as they were.
 */
int ram_file_write(struct physmap *map, int fd, bool dirty_only, struct error *err) __attribute__((warn_unused_result));
/* Fills RAM, which is all zero and unknown to any engine, from a file that must have its size; no page counts as dirty afterwards. */
int ram_file_read(struct physmap *map, int fd, struct error *err) __attribute__((warn_unused_result));

/* Sets the bits (as physmap_take_dirty_pages counts) of pages that may be other than zero. Any thread, also while vCPUs run: what they write later counts as dirty. */
void ram_file_pages(struct physmap *map, uint64_t *pages);

#endif
