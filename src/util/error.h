/*
 * Errors that a person will read.
 *
 * Functions return 0 or -errno. Where a failure is about something the user named (a file, an option, a device), the
 * function also takes a `struct error *` and fills it once, at the place that knows the object: what failed, on
 * which object, why, and what to do about it. Callers pass it on unchanged. A NULL pointer is allowed: nothing is recorded.
 */
#ifndef DOPPEL_UTIL_ERROR_H
#define DOPPEL_UTIL_ERROR_H

#include <stdarg.h>

struct error {
    int code;       /* -errno, 0 when nothing failed */
    char text[512]; /* one line, no trailing newline, no leading capital */
};

/* Records `code` (-errno) and the message; returns `code`, so that callers write `return error_set(...)`. */
int error_set(struct error *err, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Puts "prefix: " in front of a recorded message. Returns err->code. */
int error_prefix(struct error *err, const char *format, ...) __attribute__((format(printf, 2, 3)));

#endif
