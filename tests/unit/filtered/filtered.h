/*
 * Unit tests again, with the library's work on a thread that has the filter of system calls which it has in a machine. The tests are not changed: the linker leads their calls here
 * (--wrap), and they wait meanwhile. The environment says which rule is left out (FILTER_OMIT, a sandbox_rule_name) and what the configuration has (FILTER_NEEDS, SANDBOX_...).
 */
#ifndef DOPPEL_TESTS_FILTERED_H
#define DOPPEL_TESTS_FILTERED_H

#include "util/sandbox_rules.h"

/* Calls fn(ctx) on the thread of this kind; in such a thread, there. */
void filtered_call(unsigned kind, void (*fn)(void *ctx), void *ctx);
/* For threads that the library made. */
void filtered_enter(unsigned kind);
/* The same in two steps, the first of them in another thread. */
struct sock_fprog;
void filtered_make(struct sock_fprog *program, unsigned kind);
void filtered_load(struct sock_fprog *program, unsigned kind);

#endif
