/*
 * Chunk files: pages of a memory or of any other sequence of bytes, compressed (zstd), encrypted (AES-256-GCM), or neither, each part readable by itself. For the memory
 * and state of snapshots that are not kept raw, and for layers: files that have only those pages that differ from another file's. docs/formats.md has the format.
 *
 * Content is numbered in chunks of 64 pages of 4096 bytes; a set of pages of one chunk is a mask. A page may be written several times, the last one counts.
 * What is read was checked: against its checksum, or its authentication tag when the file is encrypted. Messages name the file and the place.
 * Threading: a writer belongs to one thread (and has workers of its own); a reader may be read from any number at once.
 */
#ifndef DOPPEL_STATE_CHUNK_FILE_H
#define DOPPEL_STATE_CHUNK_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "util/error.h"

#define CHUNK_PAGE_BYTES 4096u
#define CHUNK_PAGES 64u
#define CHUNK_BYTES (CHUNK_PAGES * CHUNK_PAGE_BYTES)
#define CHUNK_FILE_BYTES_MAX (1ull << 42) /* of content */
#define CHUNK_THREADS_MAX 8u

/* What keys are made from: 32 bytes or 64 hexadecimal digits are a key, all else is a passphrase. */
#define CHUNK_SECRET_BYTES_MAX 4096u
struct chunk_secret {
    uint32_t size_bytes; /* 0: none */
    uint8_t data[CHUNK_SECRET_BYTES_MAX];
};
/* As read from a file: a line's end is not part of it. -EINVAL: it is empty or too long. */
int chunk_secret_set(struct chunk_secret *secret, const void *data, size_t size_bytes) __attribute__((warn_unused_result));

/* Files with a secret need it, and ask for it themselves; who is about to enter a sandbox, where nothing can be loaded, does so before. 0 or -ENOENT. */
int chunk_prepare_encryption(struct error *err);

struct chunk_id {
    uint8_t bytes[16];
};

struct chunk_options {
    uint64_t size_bytes; /* of the content; 1 to CHUNK_FILE_BYTES_MAX */
    struct chunk_id id;  /* whoever reads can compare it */
    struct chunk_id base; /* of a layer: what the pages that are not there are those of */
    bool layer;          /* false: they are zero */
    int zstd_level;      /* 0: not compressed */
    const struct chunk_secret *secret; /* NULL or empty: not encrypted */
    unsigned threads;    /* workers, at most CHUNK_THREADS_MAX. 0: the caller's thread does the work */
};

struct chunk_totals {
    uint64_t pages, zero_pages, stored_bytes; /* pages put, of them zero; bytes in the file */
};

struct chunk_writer;

/* `fd` (borrowed) is an empty file that can be written and sought; `name` (borrowed) is for messages. */
int chunk_writer_create(struct chunk_writer **writer, int fd, const char *name, const struct chunk_options *options, struct error *err) __attribute__((warn_unused_result));
/* The pages `present` of a chunk whose first page is (or would be) at `data`; with `packed`, they follow each other at `data`. Data may go when this returns. */
int chunk_writer_put(struct chunk_writer *writer, uint64_t chunk, uint64_t present, const uint8_t *data, bool packed, struct error *err) __attribute__((warn_unused_result));
/* Writes what makes the file complete; not to disk yet (fsync). */
int chunk_writer_finish(struct chunk_writer *writer, struct chunk_totals *totals, struct error *err) __attribute__((warn_unused_result));
void chunk_writer_destroy(struct chunk_writer *writer); /* NULL: nothing */
/* All in one. */
int chunk_file_write(int fd, const char *name, const void *data, const struct chunk_options *options, struct error *err) __attribute__((warn_unused_result));

struct chunk_info {
    uint64_t size_bytes, file_bytes, entries;
    struct chunk_id id, base;
    bool layer, compressed, encrypted;
};

/* Whether a file begins as one does. */
bool chunk_file_is(int fd);
/* What its beginning says, without a key; nothing of it is authentic. */
int chunk_file_info(int fd, const char *name, struct chunk_info *info, struct error *err) __attribute__((warn_unused_result));

struct chunk_reader;

/* `fd` is taken over by a success. -EKEYREJECTED: the key is not the one; -ENOKEY: one is needed; -EBADMSG: damaged, or not complete. */
int chunk_reader_open(struct chunk_reader **reader, int fd, const char *name, const struct chunk_secret *secret, uint64_t size_bytes_max, struct error *err)
    __attribute__((warn_unused_result));
void chunk_reader_close(struct chunk_reader *reader); /* NULL: nothing */
const struct chunk_info *chunk_reader_info(const struct chunk_reader *reader);
/* Pages of the chunk that are in the file. `zero`, if not NULL, gets those of them that are known to be zero without reading. chunk < size / CHUNK_BYTES, rounded up. */
uint64_t chunk_reader_present(const struct chunk_reader *reader, uint64_t chunk, uint64_t *zero);
/* Pages wanted & present into the chunk at `data`; other bytes there are not touched. */
int chunk_reader_read(struct chunk_reader *reader, uint64_t chunk, uint64_t wanted, uint8_t *data, struct error *err) __attribute__((warn_unused_result));
/* All of a small file that is no layer: the caller frees *data, which has a zero byte more. */
int chunk_reader_read_all(struct chunk_reader *reader, char **data, size_t *size_bytes, struct error *err) __attribute__((warn_unused_result));

#endif
