/*
 * Directories of imported machines: machine.json and the files that it names, under $XDG_DATA_HOME/doppel/machines (beside the snapshots), or where the user says. One that is being
 * made is .importing-NAME beside it, locked, and gets its own name when it is complete and on the disk; what a crash left goes with the next try. Messages and exit statuses. Threading: none.
 */
#ifndef DOPPEL_CLI_MACHINE_DIRECTORY_H
#define DOPPEL_CLI_MACHINE_DIRECTORY_H

#include <jansson.h>

#include "control/snapshot_store.h"

struct machine_directory {
    char path[STORE_PATH_BYTES], draft[STORE_PATH_BYTES];
    int fd; /* -1: there is none */
};

/* `wanted` NULL: the usual place. What is there already is left alone, and refused. */
int machine_directory_begin(struct machine_directory *directory, const char *name, const char *wanted);
/* With machine.json; its path is printed. */
int machine_directory_commit(struct machine_directory *directory, const json_t *config);
/* Removes it unless it is to be kept, which takes a commit. */
void machine_directory_end(struct machine_directory *directory, bool keep);

#endif
