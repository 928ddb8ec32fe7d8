/* The directory of snapshots, inside: snapshot_store.c (places, reading, names), snapshot_merge.c (what reads memory files). */
#ifndef DOPPEL_CONTROL_SNAPSHOT_STORE_PRIV_H
#define DOPPEL_CONTROL_SNAPSHOT_STORE_PRIV_H

#include "control/snapshot_store.h"

#define STORE_FORMAT 1
#define STORE_NEW ".new-"
#define STORE_OLD ".old-"

/* A descriptor of the machine's directory. */
int snapshot_store_open(const char *vm, struct error *err);
void snapshot_store_sweep(int vm_dir);
bool stored_snapshot_read(int vm_dir, const char *vm, const char *name, struct stored_snapshot *out);
/* -EBADMSG, with its name: there is one of which is not known what it needs, so nothing may be removed that it could. */
int snapshot_store_all_readable(const char *vm, struct error *err);
/* Replaces snapshot.json at once, and is on the disk then. 0 or -errno. */
int snapshot_store_write_meta(int dir, const json_t *meta);
/* Removes one that nobody needs. */
int snapshot_store_drop(const char *vm, const char *name, struct error *err);

#endif
