/*
 * Errors that a person will read: formatting into the caller's structure. Messages that do not fit are cut.
 * Threading: none; the caller owns the structure.
 */
#include "util/error.h"

#include <stdio.h>
#include <string.h>

int error_set(struct error *err, int code, const char *format, ...)
{
    if (!err)
        return code;
    va_list args;
    va_start(args, format);
    vsnprintf(err->text, sizeof(err->text), format, args);
    va_end(args);
    err->code = code;
    return code;
}

int error_prefix(struct error *err, const char *format, ...)
{
    if (!err)
        return 0;
    char prefix[sizeof(err->text) - 2]; /* leaves room for ": " */
    va_list args;
    va_start(args, format);
    vsnprintf(prefix, sizeof(prefix), format, args);
    va_end(args);

    /* The old text moves up, losing its end when there is no room. */
    size_t length = strlen(prefix);
    memmove(err->text + length + 2, err->text, sizeof(err->text) - length - 2);
    memcpy(err->text, prefix, length);
    memcpy(err->text + length, ": ", 2);
    err->text[sizeof(err->text) - 1] = '\0';
    return err->code;
}
