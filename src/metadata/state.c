/*
 * The data in a snapshot or on its way to another host: JSON, in pieces as long as the state's format has them. Readers may lack it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "metadata/metadata_priv.h"

#define PIECE_BYTES 32768u
#define PIECES_MAX 4096u

static void save(struct metadata *metadata, struct state_io *io)
{
    pthread_mutex_lock(&metadata->lock);
    char *text = metadata->value ? json_dumps(metadata->value, JSON_COMPACT) : NULL;
    pthread_mutex_unlock(&metadata->lock);
    uint32_t pieces = text ? (uint32_t)(strlen(text) / PIECE_BYTES + 1) : 0;
    state_u32(io, &pieces);
    for (uint32_t i = 0; i < pieces; i++) {
        char *piece = strndup(text + (size_t)i * PIECE_BYTES, PIECE_BYTES);
        if (!piece)
            state_fail(io, "out of memory");
        state_string(io, &piece);
        free(piece);
    }
    free(text);
}

/* The whole text, the caller's; NULL: none, or a failure. */
static char *load_text(struct metadata *metadata, struct state_io *io)
{
    uint32_t pieces = 0;
    size_t length = 0;
    char *text = NULL, *piece = NULL;
    state_u32(io, &pieces);
    if (pieces > PIECES_MAX)
        state_fail(io, "more metadata than there can be");
    for (uint32_t i = 0; i < pieces && !state_failed(io); i++) {
        state_string(io, &piece);
        size_t more = piece ? strlen(piece) : 0;
        char *longer = length + more <= metadata->bytes_max ? realloc(text, length + more + 1) : NULL;
        if (!longer) {
            state_fail(io, "more metadata than there can be, or out of memory");
            break;
        }
        text = longer;
        memcpy(text + length, piece ? piece : "", more);
        text[length += more] = '\0';
    }
    free(piece);
    return text;
}

int metadata_state(struct metadata *metadata, bool take, struct state_io *io)
{
    if (!state_begin_optional(io, "metadata", 1))
        return state_failed(io) ? -EINVAL : 0;
    if (!state_loading(io)) {
        save(metadata, io);
        return state_end(io);
    }
    char *text = load_text(metadata, io);
    json_t *value = text && !state_failed(io) ? json_loads(text, JSON_REJECT_DUPLICATES, NULL) : NULL;
    if (text && !value)
        state_fail(io, "the metadata is no JSON");
    int r = state_end(io);
    pthread_mutex_lock(&metadata->lock);
    bool wanted = r == 0 && take && !metadata->value;
    pthread_mutex_unlock(&metadata->lock);
    if (value && wanted)
        r = metadata_put(metadata, value, NULL);
    json_decref(value);
    free(text);
    return r;
}
