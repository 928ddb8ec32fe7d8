/*
 * Shared libraries of the host that are loaded when they are first needed, because loading them takes milliseconds that every start of a machine would pay otherwise.
 *
 * A library has a header that declares a table of its functions and gives them their own names (util/gnutls_library.h and the like); they are called as ever once library_load has returned 0.
 * A thread in the sandbox can load nothing: what it may call is loaded before.
 */
#ifndef DOPPEL_UTIL_LIBRARY_H
#define DOPPEL_UTIL_LIBRARY_H

#include <stdbool.h>
#include <stddef.h>

#include "util/error.h"

struct library {
    const char *file, *package; /* what the loader looks for; what to install */
    const struct library_name {
        const char *name;
        size_t offset; /* of the pointer in the table */
    } *name;
    size_t count;
    void *table; /* of pointers, NULL before */
    bool tried;  /* guarded inside */
    struct error why_not;
};

/* Any thread; waits for one that is at it. 0, also when it was loaded before; -ENOENT: it is not there or too old, and will not be looked for again. It stays for as long as the program runs. */
int library_load(struct library *library, struct error *err) __attribute__((warn_unused_result));
/* Begins to load it in a thread of its own; library_load waits for that. */
void library_load_ahead(struct library *library);

#endif
