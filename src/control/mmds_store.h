/*
 * The metadata of a virtual machine: one JSON object of bounded size, put as a whole or changed by merge patches (RFC 7396), read by path. Knows no HTTP and no network.
 * Threading: any thread; the store has its own lock. What is returned is the caller's.
 */
#ifndef DOPPEL_CONTROL_MMDS_STORE_H
#define DOPPEL_CONTROL_MMDS_STORE_H

#include <stddef.h>

#include <jansson.h>

#include "util/error.h"

#define MMDS_BYTES_DEFAULT 51200u

struct mmds_store;

struct mmds_store *mmds_store_create(size_t bytes_max); /* 0: MMDS_BYTES_DEFAULT; NULL: no memory */
void mmds_store_destroy(struct mmds_store *store);

/* `value` is borrowed and must be an object. On refusal nothing changes. -EFBIG: the text would be longer than the bound. */
int mmds_store_put(struct mmds_store *store, const json_t *value, struct error *err) __attribute__((warn_unused_result));
/* -ENODATA: nothing was put yet. */
int mmds_store_patch(struct mmds_store *store, const json_t *patch, struct error *err) __attribute__((warn_unused_result));
/* A copy of the whole; an empty object when nothing was put. NULL: no memory. */
json_t *mmds_store_get(struct mmds_store *store);
/* A copy of what is at "/a/b/0" (empty segments are skipped); NULL: there is nothing. */
json_t *mmds_store_find(struct mmds_store *store, const char *path);

#endif
