/*
 * The directory of virtual machines: what `doppel ps` and its like know. There is no daemon; each VM has a directory of its own under instance_root, named as the
 * VM is:
 *
 *     lock            flocked by the VM's processes as long as one lives: the test of life, which neither a crash nor a reused process id fools
 *     vm.json         what it is: arguments, configuration, when it was made
 *     state.json      what it does: state, process id with start time, how it ended
 *     api.sock        HTTP (docs/openapi-doppel-v1.yaml)
 *     console.sock    bytes to and from the console
 *     migrate.sock    connections to where it is to go on, as descriptors
 *     console.log     what the console said (console.log.1: before that)
 *     messages.log    what Doppel said, of a VM in the background
 *     events.log      events, one JSON object a line
 *     passing         nothing of it is to stay: what is left after a crash goes with the next VM that is made
 *     unwanted        somebody stopped it: it is not to be restarted
 *
 * A directory appears under its name complete and locked, and names are given out under the root's lock, so of two processes that race for a name one wins.
 * What is in there counts as foreign: links, files of other users, files that are too large and JSON of other types are refused or read as absent.
 * Threading: a struct instance belongs to one thread at a time, except instance_write; the others are stateless.
 */
#ifndef DOPPEL_CONTROL_INSTANCE_H
#define DOPPEL_CONTROL_INSTANCE_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "control/process.h"
#include "util/error.h"

#define INSTANCE_NAME_BYTES 49 /* with the NUL */
#define INSTANCE_PATH_BYTES 512
#define INSTANCE_FILE_BYTES_MAX (256u << 10)

/* $XDG_RUNTIME_DIR/doppel; without it /run/doppel for root and /tmp/doppel-UID for others. Made when it is missing. */
int instance_root(char path[INSTANCE_PATH_BYTES], struct error *err) __attribute__((warn_unused_result));
/* Letters, digits, "-", "_", "."; begins with a letter or digit. */
bool instance_name_valid(const char *name);

/* ---- one's own ---- */

struct instance;

/* name NULL: one is made up. `vm` (borrowed) becomes vm.json; its member "passing" says that nothing is to stay. -EEXIST: a VM of this name lives. What one that has ended left behind is replaced. */
int instance_create(struct instance **instance, const char *name, json_t *vm, struct error *err) __attribute__((warn_unused_result));
const char *instance_name(const struct instance *instance);
const char *instance_path(const struct instance *instance);
int instance_dir(const struct instance *instance); /* a descriptor of the directory */
/* Replaces a file at once. Any thread. */
int instance_write(const struct instance *instance, const char *file, const json_t *value) __attribute__((warn_unused_result));
/* A listening socket in the directory. Descriptor or -errno. */
int instance_listen(const struct instance *instance, const char *file, struct error *err) __attribute__((warn_unused_result));
bool instance_unwanted(const struct instance *instance);
/* Frees it. The directory stays (`keep`) or goes; the lock ends with the last process that has it. */
void instance_close(struct instance *instance, bool keep);

/* ---- all of them ---- */

enum instance_life {
    INSTANCE_ALIVE,
    INSTANCE_ENDED, /* and said how */
    INSTANCE_DIED,  /* without a word */
};

struct instance_info {
    char name[INSTANCE_NAME_BYTES];
    enum instance_life life;
    char state[24];         /* "starting", "running", "paused", "restarting", "ended", "died" */
    struct process process; /* the VM's, or its supervisor's while there is none */
    struct process supervisor; /* pid 0: none */
    json_t *vm, *status;    /* vm.json and state.json; empty objects when unreadable */
};

/* Sorted by name; the caller frees with instance_list_free. */
int instance_list(struct instance_info **list, unsigned *count, struct error *err) __attribute__((warn_unused_result));
void instance_list_free(struct instance_info *list, unsigned count);
/* By name, or a beginning that only one has. -ENOENT: none, or several. */
int instance_find(const char *name, struct instance_info *info, struct error *err) __attribute__((warn_unused_result));
int instance_read(const char *name, struct instance_info *info, struct error *err) __attribute__((warn_unused_result)); /* by its whole name */
void instance_info_clear(struct instance_info *info);

/* A file of its directory. Descriptor or -errno; regular files of this user only. `flags` as of open. */
int instance_open(const char *name, const char *file, int flags) __attribute__((warn_unused_result));
/* A connection to a socket of its directory. Descriptor or -errno. */
int instance_connect(const char *name, const char *file) __attribute__((warn_unused_result));
int instance_path_of(const char *name, const char *file, char path[INSTANCE_PATH_BYTES], struct error *err) __attribute__((warn_unused_result));
/* Says that it is not to be restarted (`unwanted`), or takes that back. */
int instance_want(const char *name, bool wanted);
/* Waits until the last of its processes has gone; -ETIMEDOUT. -1: for ever. */
int instance_wait(const struct instance_info *info, int timeout_ms);
/* What an ended one left behind. -EBUSY: it lives. */
int instance_remove(const char *name, struct error *err) __attribute__((warn_unused_result));

#endif
