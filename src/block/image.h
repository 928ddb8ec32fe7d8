/*
 * Images for tools: what they are, where their bytes come from, copies. All calls wait for the host. Names of backing files in images are believed: only for images that are
 * one's own.
 */
#ifndef DOPPEL_BLOCK_IMAGE_H
#define DOPPEL_BLOCK_IMAGE_H

#include "block/block.h"

struct block_image_info {
    bool qcow2, dirty, corrupt;
    unsigned version, cluster_bytes, snapshots; /* of qcow2 */
    uint64_t size_bytes, file_bytes, allocated_bytes;
    char *backing, *backing_format; /* the path, from the image's own; NULL: none, not told */
};
/* `format` NULL: by content. Neither locks nor opens what is below. */
int block_image_info(const char *path, const char *format, struct block_image_info *info, struct error *err) __attribute__((warn_unused_result));
void block_image_info_clear(struct block_image_info *info);

struct block_image;
int block_image_open(struct block_image **image, const char *path, const char *format, struct error *err) __attribute__((warn_unused_result));
void block_image_close(struct block_image *image); /* NULL: nothing */
/* Whether it and the images below it agree with themselves; contents have no checksums. *count: how many images there are. -EBADMSG: which one, and where it does not. */
int block_image_check(struct block_image *image, unsigned *count, struct error *err) __attribute__((warn_unused_result));
uint64_t block_image_bytes(const struct block_image *image);
int block_image_read(struct block_image *image, uint64_t offset, void *data, uint64_t bytes) __attribute__((warn_unused_result));

/* Where bytes come from; equal ones are the same bytes. */
struct block_where {
    enum { WHERE_ZERO, WHERE_DATA } kind;
    unsigned depth; /* how many images are above the one that has them, or says that they are zeroes */
    uint64_t device, inode, at;
};
/* *bytes: how many are asked for; how many from `offset` on come from one place, in a row. */
int block_image_where(const struct block_image *image, uint64_t offset, uint64_t *bytes, struct block_where *where) __attribute__((warn_unused_result));

#define BLOCK_ALL_LAYERS 1000u
/*
 * A new qcow2 image `to`, which must not exist, with what the upper `layers` images of a chain have; the rest comes from `backing` (NULL: there is none, and `layers` has to be
 * all). On the host's disk when this returns, but for its name. On failure there is no file.
 */
int block_image_copy(const char *from, const char *format, const char *to, unsigned layers, const char *backing, const char *backing_format, struct error *err)
    __attribute__((warn_unused_result));
/*
 * A qcow2 image takes up what it needs of the image below it, whose own backing file is told here, and lies upon that from then on. At one moment the file has another one's place (made as `draft`);
 * who has the old one open sees the same contents there. -EBUSY: somebody writes it.
 */
int block_image_merge(const char *path, const char *draft, const char *backing, const char *backing_format, struct error *err) __attribute__((warn_unused_result));

#endif
