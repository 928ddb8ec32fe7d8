/* Requests to a machine that take long, with what becomes of them on the terminal. */
#ifndef DOPPEL_CLI_PROGRESS_H
#define DOPPEL_CLI_PROGRESS_H

#include <jansson.h>

#include "util/error.h"

/*
 * POST as client_request() makes it, of this machine. Where stderr is a terminal, `show` is called a few times a second meanwhile, to print a line without an end; it is erased
 * afterwards.
 */
int request_with_progress(const char *vm, const char *path, const json_t *body, int timeout_ms, void (*show)(const void *ctx), const void *ctx, json_t **answer, struct error *err);

#endif
