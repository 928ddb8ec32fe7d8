/*
 * One virtual machine, looked after by the process that runs it: its events, its console's log and socket, what it tells in its directory (control/instance.h), and the
 * requests under /doppel/v1 (docs/openapi-doppel-v1.json).
 *
 *     vm_control_create(&control, &options, err);
 *     vm_control_add_routes(control, server, err);        server: control/http.h
 *     vm_control_attach(control, machine, &config);       before machine_start
 *     ... machine_wait ...
 *     vm_control_detach(control, true);                   before machine_destroy
 *     http_server_destroy(server);
 *     vm_control_destroy(control, ...);
 *
 * Threading: a thread of its own does all that touches files and clients; the machine's threads only leave notes. Requests come on the server's thread.
 */
#ifndef DOPPEL_CONTROL_VM_CONTROL_H
#define DOPPEL_CONTROL_VM_CONTROL_H

#include "control/http.h"
#include "control/instance.h"
#include "machine/machine.h"

struct vm_control;

struct vm_control_options {
    const char *name;           /* shown; of the instance when there is one */
    struct instance *instance;  /* NULL: nothing is written. Taken over by a success */
    struct process supervisor;  /* pid 0: none */
    unsigned restarts;          /* how often it was brought back before */
    const char *snapshots;      /* the directory in which snapshots of it are made; NULL: nowhere */
};

int vm_control_create(struct vm_control **control, const struct vm_control_options *options, struct error *err) __attribute__((warn_unused_result));
int vm_control_add_routes(struct vm_control *control, struct http_server *server) __attribute__((warn_unused_result));
/* Loads the libraries that requests need; before the server's thread enters the sandbox. What is missing is logged, and requests for it fail. */
void vm_control_load_libraries(void);
/* `config` is what the machine was made from. `control` NULL: nothing. */
void vm_control_attach(struct vm_control *control, struct machine *machine, const struct machine_config *config);
/* Returns when everything that has happened so far is written where others see it. NULL: at once. */
void vm_control_sync(struct vm_control *control);
/* `over`: there will be no other machine; streams end when they have told the end. NULL: at once. */
void vm_control_detach(struct vm_control *control, bool over);
/* After the server's end. Writes how it ended, with the exit status; `keep`: its directory stays. */
void vm_control_destroy(struct vm_control *control, enum machine_end end, int status, bool keep);

/* For people and programs that ask what a machine is. */
json_t *vm_config_json(const struct machine_config *config);

/* The routes, ended by a NULL method: for the test that compares them with their description. */
extern const struct http_route doppel_v1_routes[];

#endif
