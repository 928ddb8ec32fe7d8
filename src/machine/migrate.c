/* What both ends of a migration share (migrate_priv.h): messages, and what a target believes of them. Stateless. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "machine/migrate_priv.h"

int migrate_hello_state(struct migrate_hello *hello, struct state_io *io)
{
    state_begin(io, "migration", 1);
    state_string(io, &hello->version);
    state_u64(io, &hello->ram_bytes);
    state_string(io, &hello->about);
    return state_end(io);
}

int migrate_unexpected(unsigned type, const uint8_t *body, size_t size_bytes, struct error *err)
{
    char text[MIGRATE_REASON_BYTES + 1];
    size_t length = 0;
    if (type != MIGRATE_FAILED)
        return error_set(err, -EPROTO, "the other side sent message %u, which does not belong here", type);
    for (size_t i = 0; i < size_bytes && length < sizeof text - 1; i++)
        if (isprint(body[i]))
            text[length++] = (char)body[i];
    text[length] = '\0';
    return error_set(err, -ECONNABORTED, "the other side refuses: %s", text);
}

int migrate_expect(struct stream *stream, unsigned type, const uint8_t **body, size_t *size_bytes, struct error *err)
{
    unsigned came;
    int r = stream_get(stream, &came, body, size_bytes, err);
    return r ? r : came == type ? 0 : migrate_unexpected(came, *body, *size_bytes, err);
}
