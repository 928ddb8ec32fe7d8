/*
 * Whether snapshots are as they were made: all that has a checksum is read and held against it, images of disks against themselves. Nothing is changed.
 * Threading: stateless; with the lock of the machine's snapshots, shared at least.
 */
#ifndef DOPPEL_CONTROL_SNAPSHOT_CHECK_H
#define DOPPEL_CONTROL_SNAPSHOT_CHECK_H

#include "control/snapshot_store.h"

#define CHECK_TEXT_BYTES 512

enum check_result { CHECK_SOUND, CHECK_DAMAGED, CHECK_UNKNOWN }; /* nothing is known: there is no checksum, or no key */

/* `item`: "state", "memory" ...; `text`: what is wrong or not known, else "". Valid during the call. */
struct check_report {
    void (*item)(void *ctx, const char *snapshot, const char *item, enum check_result result, const char *text);
    void *ctx;
};

/* State and memory, those of the snapshots below it not included. `text` has CHECK_TEXT_BYTES. */
enum check_result snapshot_check_state(const struct stored_snapshot *snapshot, const struct chunk_secret *secret, char *text);
enum check_result snapshot_check_memory(const struct stored_snapshot *snapshot, const struct chunk_secret *secret, char *text);

/* All of one snapshot, but for those that it needs, of which is only told whether they are there. `list` has all of its machine. */
void snapshot_check(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, const struct chunk_secret *secret, const struct check_report *report);
/* What is of a machine and of none of the snapshots in `list`: the map of its disks, and snapshots that cannot be read. */
void snapshot_check_rest(const char *vm, const struct stored_snapshot *list, unsigned count, const struct check_report *report);

#endif
