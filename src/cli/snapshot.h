/* doppel snapshot, inside: snapshot.c (create, restore), snapshot_list.c (the command, list, show, delete, diff), snapshot_export.c (export, import). */
#ifndef DOPPEL_CLI_SNAPSHOT_H
#define DOPPEL_CLI_SNAPSHOT_H

#include "cli/arguments.h"
#include "control/snapshot_store.h"

struct archive;
struct archive_entry;

/* The key that --key-file or --key-command give; empty without. An exit status. */
int snapshot_read_secret(const struct arguments *arguments, struct chunk_secret *secret);

/* names[0] is the action. Exit statuses. */
int snapshot_create(const struct arguments *arguments);
int snapshot_restore(const struct arguments *arguments);
int snapshot_export(const struct arguments *arguments);
int snapshot_import(const struct arguments *arguments);

/* For bundles: a snapshot and those that it needs; and an import that gets its entries one by one. `changes` (borrowed, may be NULL) are members that each snapshot.json gets. */
int snapshot_put(struct archive *out, const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot);
struct snapshot_import;
struct snapshot_import *snapshot_import_begin(struct archive *in, const char *path, const char *vm, const json_t *changes); /* NULL: no memory */
int snapshot_import_entry(struct snapshot_import *import, struct archive_entry *entry);
/* Frees it. When all is `good` so far: `last` has to have come last. *count: how many are there now. */
int snapshot_import_end(struct snapshot_import *import, bool good, const char *last, unsigned *count);

#endif
