/* doppel run, inside: options and one run of a machine (run.c), the same in the background and again and again (background.c). */
#ifndef DOPPEL_CLI_RUN_H
#define DOPPEL_CLI_RUN_H

#include <stdatomic.h>

#include "control/vm_control.h"
#include "machine/machine.h"

enum restart_policy { RESTART_NO, RESTART_ON_FAILURE, RESTART_ALWAYS };

struct run {
    struct machine_config config;
    const char *name; /* NULL: made up */
    bool detach, remove;
    char called[INSTANCE_NAME_BYTES]; /* its name, when it runs in the background */
    enum restart_policy restart;
    unsigned long restarts_max; /* 0: no limit */

    struct instance *instance; /* NULL: not registered. run_vm takes it over */
    struct process supervisor;
    unsigned restarts;
    int ready_fd; /* gets a byte when the guest runs; -1: nobody waits */
    int log_fd;   /* where messages go from then on; -1: where they go */
    bool keep;    /* its directory stays */
    const struct snapshot_files *from; /* it begins with this snapshot, but not when it is brought back; NULL: with its kernel */
    int from_lock;                     /* held until these were read; with `from` only */
    struct machine_incoming *incoming; /* it comes from elsewhere; NULL: it does not, or is there */
    char snapshots[1024];              /* where snapshots of it are made; "": nowhere */

    struct machine *machine;
    struct vm_control *control;
    struct http_server *server;
    atomic_bool over; /* the signals' thread is to end */
};

/* One machine from its creation to its end; an exit status. */
int run_vm(struct run *run);
/* A machine in the background with the configuration in `run`; `arguments` (may be NULL) are those that doppel start gives. An exit status. */
int run_again(struct run *run, const json_t *arguments);
/* Returns in the caller's process, when the guest runs (run->called) or has failed to: an exit status. */
int run_in_background(struct run *run);
/* The guest runs: says so to whoever waits, and messages go to the log. */
void tell_ready(struct run *run);
/* Signals taken by a thread that waits for them are blocked. */
void block_signals(void);

#endif
