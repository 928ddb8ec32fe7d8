/* Files in archives (libarchive), sparse ones as such. Exit statuses, after a message. Threading: none. */
#ifndef DOPPEL_CLI_ARCHIVE_FILES_H
#define DOPPEL_CLI_ARCHIVE_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <time.h>

#include "cli/archive_library.h"

#define ARCHIVE_SUM_BYTES 33 /* as text */

/* Shown on a terminal, now and then: "what: 42 %". */
struct archive_progress {
    const char *what; /* NULL: nothing is shown */
    uint64_t done, all;
    uint64_t shown_ns;
};
void archive_progress_begin(struct archive_progress *progress, const char *what, uint64_t all);
void archive_progress_to(struct archive_progress *progress, uint64_t done);
void archive_progress_end(struct archive_progress *progress);

/* The first size_bytes of `fd` as an entry `name`; `path` is for messages, `progress` may be NULL. */
int archive_put_file(struct archive *out, int fd, uint64_t size_bytes, time_t changed, const char *name, const char *path, struct archive_progress *progress);
int archive_put_text(struct archive *out, const char *text, const char *name);
/*
 * The entry that was just reached becomes the new file `file` in `directory`; `from` is for messages. Pages of zeroes become holes. `progress` is of what was read of the archive's file.
 * A descriptor for reading and writing, or -1 after a message.
 */
int archive_take_file(struct archive *in, struct archive_entry *entry, int directory, const char *file, const char *from, struct archive_progress *progress);
/* Into a new file: pages of zeroes stay holes. 0 or -errno. */
int archive_write_sparse(int fd, const uint8_t *data, size_t bytes, uint64_t at);
/* XXH3 (128 bits, canonical) of the pages of 4096 bytes that are not zero, each after its offset (8 bytes, little endian); the last one is filled up with zeroes. */
int archive_sum(int fd, uint64_t size_bytes, const char *path, char sum[ARCHIVE_SUM_BYTES], struct archive_progress *progress);

#endif
