/* What both ends of a migration share (migrate_priv.h): messages, and what a target believes of them. Stateless. */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "machine/migrate_priv.h"

int migrate_hello_state(struct migrate_hello *hello, struct state_io *io)
{
    unsigned lowest = hello->disk_count ? 3 : hello->post_copy ? 2 : 1; /* who does not know what is to come need not begin */
    unsigned version = state_begin_unlisted(io, "migration", state_loading(io) ? 3 : lowest);
    state_string(io, &hello->version);
    state_u64(io, &hello->ram_bytes);
    state_string(io, &hello->about);
    hello->post_copy |= version == 2;
    if (version == 3) {
        state_bool(io, &hello->post_copy);
        state_u32(io, &hello->disk_count);
        if (hello->disk_count > CONFIG_DISKS_MAX) {
            state_fail(io, "more disks than there can be");
            hello->disk_count = 0;
        }
        for (unsigned i = 0; i < hello->disk_count; i++) {
            state_u32(io, &hello->disk[i].index);
            state_u64(io, &hello->disk[i].bytes);
        }
    }
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

void migrate_say_failed(struct stream *stream, const char *reason)
{
    struct error ignored = {0};
    stream_set_deadline(stream, loop_now_ns() + 1000000000ull);
    if (stream_put(stream, MIGRATE_FAILED, reason, strnlen(reason, MIGRATE_REASON_BYTES), NULL, 0, &ignored) == 0)
        (void)!stream_flush(stream, &ignored);
}

int migrate_expect(struct stream *stream, unsigned type, const uint8_t **body, size_t *size_bytes, struct error *err)
{
    unsigned came;
    int r = stream_get(stream, &came, body, size_bytes, err);
    return r ? r : came == type ? 0 : migrate_unexpected(came, *body, *size_bytes, err);
}

bool migrate_has_ended(struct machine *machine)
{
    pthread_mutex_lock(&machine->run_lock);
    bool ended = machine->end != MACHINE_RUNNING;
    pthread_mutex_unlock(&machine->run_lock);
    return ended;
}
