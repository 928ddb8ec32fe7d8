/*
 * JSON objects in files that tell damage: the member "checksum" is XXH64, 16 hexadecimal digits, of all others as JSON with sorted keys and no spaces, however the text is laid out. Files without that
 * member are taken as they are: first versions wrote none. The checksum is no part of what callers see.
 * Threading: stateless.
 */
#ifndef DOPPEL_CONTROL_CHECKED_JSON_H
#define DOPPEL_CONTROL_CHECKED_JSON_H

#include <stdbool.h>
#include <stddef.h>

#include <jansson.h>

#define CHECKED_JSON_BYTES_MAX (256u << 10)

/* NULL: no object, or damaged. */
json_t *checked_json_parse(const char *text, size_t bytes);
/* A regular file, at most CHECKED_JSON_BYTES_MAX. 0, -EBADMSG: damaged, or -errno; *value is NULL then. */
int checked_json_read(int directory, const char *name, json_t **value) __attribute__((warn_unused_result));
/* Replaces the file at once, by way of a draft ".NAME". `lasting`: it is on the disk when this returns, with all names in the directory. 0 or -errno; then nothing has changed. */
int checked_json_write(int directory, const char *name, const json_t *value, bool lasting) __attribute__((warn_unused_result));

#endif
