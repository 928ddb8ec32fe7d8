/* doppel snapshot, inside: snapshot.c (create, restore), snapshot_list.c (the command, list, show, delete, diff), snapshot_export.c (export, import). */
#ifndef DOPPEL_CLI_SNAPSHOT_H
#define DOPPEL_CLI_SNAPSHOT_H

#include "cli/arguments.h"
#include "control/snapshot_store.h"

/* The key that --key-file or --key-command give; empty without. An exit status. */
int snapshot_read_secret(const struct arguments *arguments, struct chunk_secret *secret);

/* names[0] is the action. Exit statuses. */
int snapshot_create(const struct arguments *arguments);
int snapshot_restore(const struct arguments *arguments);
int snapshot_export(const struct arguments *arguments);
int snapshot_import(const struct arguments *arguments);

#endif
