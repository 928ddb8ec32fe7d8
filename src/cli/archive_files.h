/* Files in archives (libarchive), sparse ones as such. Exit statuses, after a message. Threading: none. */
#ifndef DOPPEL_CLI_ARCHIVE_FILES_H
#define DOPPEL_CLI_ARCHIVE_FILES_H

#include <stdint.h>
#include <time.h>

#include <archive.h>
#include <archive_entry.h>

#define ARCHIVE_SUM_BYTES 33 /* as text */

/* The first size_bytes of `fd` as an entry `name`; `path` is for messages. */
int archive_put_file(struct archive *out, int fd, uint64_t size_bytes, time_t changed, const char *name, const char *path);
int archive_put_text(struct archive *out, const char *text, const char *name);
/* The entry that was just reached becomes the new file `file` in `directory`; `from` is for messages. A descriptor for reading and writing, or -1 after a message. */
int archive_take_file(struct archive *in, struct archive_entry *entry, int directory, const char *file, const char *from);
/* XXH3 (128 bits, canonical) of the pages of 4096 bytes that are not zero, each after its offset (8 bytes, little endian); the last one is filled up with zeroes. */
int archive_sum(int fd, uint64_t size_bytes, const char *path, char sum[ARCHIVE_SUM_BYTES]);

#endif
