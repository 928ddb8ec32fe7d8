/*
 * Looking for a moment before sleeping. To be woken by another thread costs far more than most answers take, so a thread whose last waits were short looks for what it waits for, without the host's kernel,
 * before it sleeps. How long adapts: it doubles when a short wait ended in sleep and is zero after a long one, so that who has nothing to do uses no processor. On a host with one processor nobody looks.
 * Each object is one thread's.
 */
#ifndef DOPPEL_UTIL_PATIENCE_H
#define DOPPEL_UTIL_PATIENCE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define PATIENCE_NS_MAX 100000u

struct patience {
    uint64_t limit_ns, limit_max_ns;
    uint64_t since_ns; /* the beginning of this wait */
};

/* Before the thread enters a sandbox. */
void patience_init(struct patience *patience);
/* A wait begins: returns when the flag is set (true), or is not for as long as is worth it. */
bool patience_look(struct patience *patience, const atomic_bool *flag);
/* The wait has ended, in sleep. */
void patience_slept(struct patience *patience);

#endif
