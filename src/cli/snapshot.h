/* doppel snapshot, inside: snapshot.c (create, restore), snapshot_list.c (the command, list, show, delete, diff), snapshot_export.c (export, import). */
#ifndef DOPPEL_CLI_SNAPSHOT_H
#define DOPPEL_CLI_SNAPSHOT_H

#include "cli/arguments.h"
#include "control/snapshot_store.h"

struct archive;
struct archive_entry;

/* The key that --key-file or --key-command give; empty without. An exit status. */
int snapshot_read_secret(const struct arguments *arguments, struct chunk_secret *secret);

int snapshot_secret_from(const char *file, const char *command, struct chunk_secret *secret);

/* names[0] is the action. Exit statuses. */
int snapshot_create(const struct arguments *arguments);
int snapshot_restore(const struct arguments *arguments);
int snapshot_export(const struct arguments *arguments);
int snapshot_import(const struct arguments *arguments);

/*
 * For bundles: a snapshot and those that it needs; and an import that gets its entries one by one, of which `last` comes last. Changes (borrowed) are members that each
 * snapshot.json gets, that of the last one others.
 */
int snapshot_put(struct archive *out, const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot);
struct snapshot_import;
struct snapshot_import *snapshot_import_begin(struct archive *in, const char *path, const char *vm, const char *last, const json_t *changes, const json_t *changes_last); /* NULL: no memory */
int snapshot_import_entry(struct snapshot_import *import, struct archive_entry *entry);
/* Frees it. `good`: all is well so far. *count: how many are there now. */
int snapshot_import_end(struct snapshot_import *import, bool good, unsigned *count);

/* One that clones of a running machine begin with. `lock` is the exclusive one, and shared afterwards. An exit status. */
int snapshot_create_for_clones(struct instance_info *vm, int lock, char name[STORE_NAME_BYTES]);
/*
 * Starts a machine from the files, in place of one of that name. The lock is shared with its process, which lets it go when the files were read. `change` (may be NULL) alters what the
 * snapshot says of it; other than 0 is the exit status then.
 */
int snapshot_start(const struct stored_snapshot *snapshot, struct snapshot_chain *chain, const char *name, int lock, int (*change)(struct machine_config *config, void *ctx), void *ctx);

#endif
