/*
 * What the program gives up before the first guest instruction, so that whoever takes it over has next to nothing.
 *
 * Three steps. sandbox_begin, first thing and with one thread: namespaces of its own (user, when not root; mounts; IPC). As soon as it is known what will be needed,
 * sandbox_compile: filters of system calls are made aside. Then, when all files are open: sandbox_create makes what each kind of thread may do, and each thread calls sandbox_enter with its kind as the first thing it does, the creating one last:
 *   - a root directory that is empty, and no path that leads anywhere (chroot; Landlock), but for those named;
 *   - its own network, when no back end needs the host's;
 *   - no privileges: user and groups nobody when root, no capabilities, no_new_privs;
 *   - the system calls of its kind (util/sandbox_rules.h), no others.
 * What the host does not offer is left out and told once, by sandbox_create.
 */
#ifndef DOPPEL_SANDBOX_SANDBOX_H
#define DOPPEL_SANDBOX_SANDBOX_H

#include <stdbool.h>

#include "util/error.h"
#include "util/sandbox_rules.h"

struct sandbox;

struct sandbox_path {
    const char *path;
    bool writable;    /* and what is below may be made and removed */
    unsigned threads; /* kinds that may use it */
};

struct sandbox_config {
    unsigned needs;    /* SANDBOX_NET_USER ... */
    bool host_network; /* a back end needs it */
    const struct sandbox_path *paths;
    unsigned path_count;
    int broker;       /* broker_start's, -1: none */
    const char *omit; /* a sandbox_rule_name: for tests: this rule is left out; NULL: none */
};

/* True when namespaces were entered. Single-threaded; before anything is opened or made. */
void sandbox_begin(void);

/* Begins to make the filters, in a thread of its own. NULL: too little memory; sandbox_create does it all then. */
struct sandbox *sandbox_compile(unsigned needs, const char *omit, bool broker);
/* *sandbox is sandbox_compile's or NULL; should more or less be needed than was said then, its filters are made again. NULL after a failure. */
int sandbox_create(struct sandbox **sandbox, const struct sandbox_config *config, struct error *err) __attribute__((warn_unused_result));
/* The calling thread only. `kind` is one of IN_MAIN ... Must be called before what it protects from can happen; a failure (with err) means that it did not take effect. */
int sandbox_enter(const struct sandbox *sandbox, unsigned kind, struct error *err) __attribute__((warn_unused_result));
/* IN_API threads' files are opened by another process (sandbox/broker.h). */
bool sandbox_has_broker(const struct sandbox *sandbox);
/* Threads that have entered stay as they are. */
void sandbox_destroy(struct sandbox *sandbox);

/* All rules there are: for tests and docs. */
const struct sandbox_rule *sandbox_rules(unsigned *count);
#define SANDBOX_RULE_NAME_BYTES 128
/* What tests call a rule of one kind of thread: "loop:socket(0=0x2)[user]", or without a condition of the argument (ARGUMENT&MASK=VALUE) or of the configuration. */
void sandbox_rule_name(char name[SANDBOX_RULE_NAME_BYTES], const struct sandbox_rule *rule, unsigned kind);
const char *sandbox_kind_name(unsigned kind);

#endif
