/*
 * The metadata service: one JSON object of bounded size, put as a whole or changed by merge patches (RFC 7396), and the HTTP by which a guest reads it at 169.254.169.254
 * (docs/metadata.md). Version 2 wants a session token with each request, which the guest gets by a PUT; version 1 takes requests with and without.
 *
 * Tokens are authenticated with a key that was drawn when the service was made and is kept nowhere else, so those of other machines, and of the time before a snapshot was loaded,
 * are not valid. Knows no network: net/net.h has the server in the guest's network that calls metadata_serve.
 * Threading: any thread; the service has its own lock. What is returned is the caller's.
 */
#ifndef DOPPEL_METADATA_METADATA_H
#define DOPPEL_METADATA_METADATA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "net/net.h"
#include "state/state.h"
#include "util/error.h"

#define METADATA_BYTES_DEFAULT 51200u
#define METADATA_ADDRESS_DEFAULT "169.254.169.254"
#define METADATA_PORT 80u

struct metadata;

struct metadata *metadata_create(size_t bytes_max); /* 0: METADATA_BYTES_DEFAULT; NULL: no memory, or no random numbers */
void metadata_destroy(struct metadata *metadata);

/* `value` is borrowed and must be an object. On refusal nothing changes. -EFBIG: the text would be longer than the bound. */
int metadata_put(struct metadata *metadata, const json_t *value, struct error *err) __attribute__((warn_unused_result));
/* -ENODATA: nothing was put yet. */
int metadata_patch(struct metadata *metadata, const json_t *patch, struct error *err) __attribute__((warn_unused_result));
/* A file of JSON in the place of what there is. */
int metadata_load(struct metadata *metadata, const char *path, struct error *err) __attribute__((warn_unused_result));
/* A copy of the whole; an empty object when nothing was put. NULL: no memory. */
json_t *metadata_get(struct metadata *metadata);

struct metadata_settings {
    bool version_2;       /* no answers without a valid token */
    bool imds_compatible; /* plain text whatever the request accepts */
};
void metadata_set(struct metadata *metadata, const struct metadata_settings *settings);

/*
 * The data, which a snapshot's readers may lack; tokens are never in it. `take`: when loading, it becomes this service's if nothing was put there yet; else it is only checked.
 */
int metadata_state(struct metadata *metadata, bool take, struct state_io *io) __attribute__((warn_unused_result));

/* net_server.serve; ctx is the struct metadata. */
size_t metadata_serve(void *metadata, const char *data, size_t size_bytes, bool full, struct net_reply *reply);

/* Requests without a token, and with one that is not valid, counted in version 1 as well. */
struct metadata_counters {
    uint64_t rx_no_token, rx_invalid_token;
};
void metadata_get_counters(struct metadata *metadata, struct metadata_counters *counters);

/* Whether the text is an address that metadata may have: 169.254.1.0 to 169.254.254.255. `address` is in network order. */
bool metadata_parse_address(const char *text, uint8_t address[4]);

#endif
