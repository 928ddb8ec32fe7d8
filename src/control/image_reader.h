/*
 * The bytes of a disk's image, whatever its format and the images that it lies upon, read one after the other by who can wait. Locks it as a reader of the block layer does.
 * Threading: one thread at a time.
 */
#ifndef DOPPEL_CONTROL_IMAGE_READER_H
#define DOPPEL_CONTROL_IMAGE_READER_H

#include "block/block.h"

struct image_reader;

/* As in block_config. */
int image_reader_open(struct image_reader **reader, const char *path, const char *format, enum block_backing backing, struct error *err) __attribute__((warn_unused_result));
uint64_t image_reader_size(const struct image_reader *reader);
/* Whole sectors. 0 or -errno. */
int image_reader_read(struct image_reader *reader, void *data, uint64_t bytes, uint64_t at) __attribute__((warn_unused_result));
void image_reader_close(struct image_reader *reader);

#endif
