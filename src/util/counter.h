/*
 * Counters: numbers with names, handed to whoever asks one by one. What prints them, as text, JSON or for a metrics collector, is one walk away from all of them.
 */
#ifndef DOPPEL_UTIL_COUNTER_H
#define DOPPEL_UTIL_COUNTER_H

#include <stdbool.h>
#include <stdint.h>

struct counter {
    const char *name, *help;         /* letters, digits and "_"; the help of a name is always the same */
    const char *label, *label_value; /* which one of several, as "cpu" "0"; NULL: there is one */
    uint64_t value;
    bool gauge; /* goes up and down; else it only grows */
};

/* The strings are valid during the call. */
typedef void counter_fn(void *ctx, const struct counter *counter);

#endif
