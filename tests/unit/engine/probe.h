/*
 * Runs a piece of code that may fault, and tells where it did.
 *
 * Threading: one probe at a time in the process.
 */
#ifndef DOPPEL_TESTS_PROBE_H
#define DOPPEL_TESTS_PROBE_H

#include <stdbool.h>
#include <stdint.h>

/* True when code(opaque) ran to its end; otherwise *address is what the kernel reported (0 for non-canonical ones). */
bool probe_run(void (*code)(void *opaque), void *opaque, uintptr_t *address);

bool probe_readable(const void *at);
bool probe_writable(void *at); /* writes back what it read */

#endif
