/*
 * The directory of snapshots: what `doppel snapshot` keeps. Under snapshot_store_root, one directory a virtual machine, in it one a snapshot:
 *
 *     VM/.lock                 exclusive: something is made or removed; shared: something is being read
 *     VM/NAME/snapshot.json    what it is; written last, and what is not named in it does not count
 *     VM/NAME/state            state file (docs/formats.md)
 *     VM/NAME/memory           memory file: raw, or a chunk file. Another name after snapshots were merged
 *     VM/NAME/working-set      pages that a machine touched first after it was restored, if one was
 *     VM/.new-NAME             one that is not complete: it is removed when the next one is made, and was a snapshot at no time
 *     VM/.old-NAME             one that is being removed
 *
 * A snapshot that is "incremental" needs the one whose identifier is its base. All renaming is behind an fsync of what gets the name, so a crash leaves either what was before or
 * what was to be. Files count as foreign: names, sizes and JSON are checked.
 * Threading: stateless; the locks are for processes.
 */
#ifndef DOPPEL_CONTROL_SNAPSHOT_STORE_H
#define DOPPEL_CONTROL_SNAPSHOT_STORE_H

#include <stdbool.h>

#include <jansson.h>

#include "machine/machine.h"
#include "util/error.h"

#define STORE_PATH_BYTES 1024
#define STORE_NAME_BYTES 49 /* as a virtual machine's */
#define STORE_CLONES "clones-" /* names of those that clones are made from begin so */
#define STORE_DEPTH_MAX 64u /* snapshots that one may need, one below the other */

/* $XDG_DATA_HOME/doppel/snapshots; without it /var/lib/doppel/snapshots for root and ~/.local/share/doppel/snapshots for others. */
int snapshot_store_root(char path[STORE_PATH_BYTES], struct error *err) __attribute__((warn_unused_result));
/* The machine's directory in it, made when it is missing. */
int snapshot_store_directory(const char *vm, char path[STORE_PATH_BYTES], struct error *err) __attribute__((warn_unused_result));
/* Removes empty directories of machines that are no more; those in a sandbox cannot do that themselves. */
void snapshot_store_tidy(void);

struct stored_snapshot {
    char vm[STORE_NAME_BYTES], name[STORE_NAME_BYTES];
    char path[STORE_PATH_BYTES]; /* of its directory */
    char id[33], base_id[33], parent_id[33]; /* hexadecimal; base_id "": it needs no other */
    char memory[STORE_NAME_BYTES]; /* the file's name */
    bool encrypted;
    bool passing; /* for clones: good until the host starts again, and gone when its machine is */
    int zstd_level;
    uint64_t created_ms;
    json_t *meta; /* snapshot.json */
};
void stored_snapshot_clear(struct stored_snapshot *snapshot);

/* All of one machine, or (`vm` NULL) of all; by machine, then by time. Freed by snapshot_store_free. What cannot be read is left out, with a message in the log. */
int snapshot_store_list(const char *vm, struct stored_snapshot **list, unsigned *count, struct error *err) __attribute__((warn_unused_result));
void snapshot_store_free(struct stored_snapshot *list, unsigned count);
const struct stored_snapshot *snapshot_store_by_id(const struct stored_snapshot *list, unsigned count, const char *id);
const struct stored_snapshot *snapshot_store_by_name(const struct stored_snapshot *list, unsigned count, const char *name);
/* Bytes on the disk. */
uint64_t snapshot_store_bytes(const struct stored_snapshot *snapshot);

/* A descriptor to close. -EBUSY, at once. */
int snapshot_store_lock(const char *vm, bool exclusive, struct error *err) __attribute__((warn_unused_result));

/* What a snapshot that is passing has as "boot_id" in its description: this start of the host. False: not known. */
bool snapshot_store_boot_id(char text[64]);
/* With the exclusive lock: makes an empty directory for a snapshot under way; gives it its name, when its files are complete; or removes it. -EEXIST: the name is taken. */
int snapshot_store_begin(const char *vm, const char *name, struct error *err) __attribute__((warn_unused_result));
int snapshot_store_commit(const char *vm, const char *name, const json_t *meta, struct error *err) __attribute__((warn_unused_result));
void snapshot_store_abort(const char *vm, const char *name);

/* The files that loading it takes. `chain` keeps the paths and must stay. -ENOENT: one that it needs is not there. */
struct snapshot_chain {
    char state[STORE_PATH_BYTES], memory[STORE_DEPTH_MAX][STORE_PATH_BYTES], working_set[STORE_PATH_BYTES];
    const char *below[STORE_DEPTH_MAX];
    struct snapshot_files files;
};
int snapshot_store_chain(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, struct snapshot_chain *chain, struct error *err)
    __attribute__((warn_unused_result));

/* With the exclusive lock. Those that need it get what they need of it first; a snapshot is whole at every moment. `progress` may be NULL. */
int snapshot_store_remove(const char *vm, const char *name, const struct chunk_secret *secret, void (*progress)(uint64_t done, uint64_t all), struct error *err)
    __attribute__((warn_unused_result));

/* Pages of 4096 bytes that differ in what two snapshots of guests of the same size hold. */
int snapshot_store_compare(const struct snapshot_chain *a, const struct snapshot_chain *b, uint64_t *different, uint64_t *all, struct error *err)
    __attribute__((warn_unused_result));

void snapshot_id_text(const struct chunk_id *id, char text[33]);
bool snapshot_id_parse(const char *text, struct chunk_id *id);

#endif
