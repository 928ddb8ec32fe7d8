/*
 * One HTTP request to a virtual machine of this user, over its socket: HTTP/1.0, one connection a request, so that an answer ends where the connection does. The server
 * is Doppel; answers are bounded and checked all the same. Stateless; any thread.
 */
#ifndef DOPPEL_CONTROL_CLIENT_H
#define DOPPEL_CONTROL_CLIENT_H

#include <jansson.h>

#include "util/error.h"

#define CLIENT_ANSWER_BYTES_MAX (4u << 20)

/*
 * `body` may be NULL. `answer` (may be NULL) gets the answer's JSON, NULL when there is none; the caller's. A status that is not 2xx is -EREMOTEIO with the server's
 * message; -ETIMEDOUT after timeout_ms.
 */
int client_request(const char *vm, const char *method, const char *path, const json_t *body, int timeout_ms, json_t **answer, struct error *err)
    __attribute__((warn_unused_result));
/* The same with GET for answers that are text; the caller frees it. */
int client_get_text(const char *vm, const char *path, int timeout_ms, char **answer, struct error *err) __attribute__((warn_unused_result));
/* The same for an answer without an end: `take` gets it piece by piece, and ends it by other than 0. 0: the machine ended it, or `take` did. */
int client_get_stream(const char *vm, const char *path, int (*take)(void *ctx, const char *data, size_t size_bytes), void *ctx, struct error *err)
    __attribute__((warn_unused_result));

#endif
