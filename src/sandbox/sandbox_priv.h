/* The sandbox, inside: system call filters (seccomp.c), everything else and the order of it (sandbox.c). */
#ifndef DOPPEL_SANDBOX_SANDBOX_PRIV_H
#define DOPPEL_SANDBOX_SANDBOX_PRIV_H

#include "sandbox/sandbox.h"

#define SANDBOX_EXIT_STATUS 148

struct sock_fprog;

/* `broker`: what a broker does waits for it, instead of happening. */
int filter_make(struct sock_fprog *program, unsigned kind, unsigned needs, const char *omit, bool broker);
void filter_free(struct sock_fprog *program);
/* For the calling thread. `listen`: a descriptor for the broker is returned. */
int filter_load(const struct sock_fprog *program, bool listen);
bool filter_possible(void); /* the host lets processes have filters */
void filter_note_kind(unsigned kind);
int filter_catch(void); /* SIGSYS, for the process */

#endif
