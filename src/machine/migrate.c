/* What both ends of a migration share (migrate_priv.h): messages, and what a target believes of them. Stateless. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "machine/migrate_priv.h"

_Static_assert(MIGRATE_PAGES_HEAD_BYTES + CHUNK_BYTES <= STREAM_BODY_BYTES_MAX, "a chunk is one message");

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

int migrate_take_pages(uint8_t *ram, uint64_t ram_bytes, const uint8_t *body, size_t size_bytes, struct error *err)
{
    if (size_bytes < MIGRATE_PAGES_HEAD_BYTES)
        return error_set(err, -EPROTO, "a message with pages is too short");
    uint64_t chunk = stream_number(body, 8), pages = stream_number(body + 8, 8), zero = stream_number(body + 16, 8);
    const uint8_t *data = body + MIGRATE_PAGES_HEAD_BYTES;
    if (chunk >= (ram_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES)
        return error_set(err, -EPROTO, "pages came that the guest's memory does not have");
    uint64_t room = (ram_bytes - chunk * CHUNK_BYTES) / PAGE_SIZE_BYTES, has = room < CHUNK_PAGES ? (1ull << room) - 1 : ~0ull;
    if (pages & ~has || zero & ~pages || size_bytes - MIGRATE_PAGES_HEAD_BYTES != (size_t)__builtin_popcountll(pages & ~zero) * PAGE_SIZE_BYTES)
        return error_set(err, -EPROTO, "a message with pages has not what it says");
    for (uint64_t left = pages; left; left &= left - 1) {
        unsigned page = (unsigned)__builtin_ctzll(left);
        uint8_t *to = ram + chunk * CHUNK_BYTES + page * PAGE_SIZE_BYTES;
        if (zero >> page & 1) {
            memset(to, 0, PAGE_SIZE_BYTES);
            continue;
        }
        memcpy(to, data, PAGE_SIZE_BYTES);
        data += PAGE_SIZE_BYTES;
    }
    return 0;
}
