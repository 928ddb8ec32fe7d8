/* The metadata service, inside: store.c (the data), token.c, http.c (requests). */
#ifndef DOPPEL_METADATA_METADATA_PRIV_H
#define DOPPEL_METADATA_METADATA_PRIV_H

#include <pthread.h>

#include "metadata/metadata.h"

#define TOKEN_KEY_BYTES 32u
#define TOKEN_TTL_MAX_S 21600u
#define TOKEN_ROOM 81u /* with the end */

struct metadata {
    pthread_mutex_t lock; /* guards all but the key */
    json_t *value;   /* NULL: nothing was put */
    json_t *nothing; /* read then */
    size_t bytes_max;
    struct metadata_settings settings;
    struct metadata_counters counters;
    uint8_t key[TOKEN_KEY_BYTES];
};

/*
 * The text of what is at "/a/b/0", percent-encoded (empty segments are skipped): JSON, or else a string as it is and an object's names one a line, with "/" behind those of objects.
 * -ENOENT: there is nothing; -EDOM: neither string nor object; -ENOMEM.
 */
int metadata_text(struct metadata *metadata, const char *path, bool json, char **text) __attribute__((warn_unused_result));

int token_draw_key(uint8_t key[TOKEN_KEY_BYTES]) __attribute__((warn_unused_result));
/* Valid for that long from now on. False: no memory. */
bool token_make(const uint8_t key[TOKEN_KEY_BYTES], uint32_t ttl_s, char token[TOKEN_ROOM]);
bool token_is_valid(const uint8_t key[TOKEN_KEY_BYTES], const char *token);

#endif
