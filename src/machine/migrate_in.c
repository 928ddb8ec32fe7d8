/*
 * The target of a migration (machine.h, migrate_priv.h): a machine is made from what HELLO says, filled with pages and state, and runs when the source has sent GO. The source counts as hostile:
 * everything it sends is bounded and checked, like a snapshot.
 * Threading: one thread from the beginning to the end, the one that makes and starts the machine.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "machine/migrate_pack.h"
#include "machine/migrate_disks.h"
#include "machine/post_copy.h"

#define HELLO_NS 30000000000ull
#define SILENCE_NS 60000000000ull  /* between two messages while the guest runs on the other side */
#define GO_NS 30000000000ull

struct machine_incoming {
    struct stream *stream;
    struct migrate_hello hello;
    uint8_t *hello_body; /* io's */
    struct state_io *io; /* behind the configuration */
    struct unpacker *unpacker;
    uint8_t *state;
    size_t state_bytes, state_capacity;
    uint8_t post_copy_id[MIGRATE_ID_BYTES];
    uint64_t *remote; /* pages that come later; NULL: none. All are known */
    bool remote_complete;
    uint64_t bytes, began_ns; /* of pages and all that is between them */
    struct disks_in *disks; /* NULL: none come */
    bool keep_disks;
};

void machine_incoming_close(struct machine_incoming *incoming)
{
    if (!incoming)
        return;
    state_io_destroy(incoming->io);
    stream_destroy(incoming->stream);
    unpacker_destroy(incoming->unpacker);
    free(incoming->hello.version);
    free(incoming->hello.about);
    free(incoming->hello_body);
    free(incoming->state);
    free(incoming->remote);
    disks_in_close(incoming->disks, incoming->keep_disks);
    free(incoming);
}

void machine_incoming_refuse(struct machine_incoming *incoming, const char *reason)
{
    migrate_say_failed(incoming->stream, reason);
}

const char *machine_incoming_about(const struct machine_incoming *incoming)
{
    return incoming->hello.about ? incoming->hello.about : "";
}

unsigned machine_incoming_disks(const struct machine_incoming *incoming)
{
    return incoming->hello.disk_count;
}

int machine_incoming_make_disks(struct machine_incoming *incoming, const char *directory, struct machine_config *config, struct error *err)
{
    return disks_in_make(&incoming->disks, &incoming->hello, directory, config, err);
}

void machine_incoming_keep_disks(struct machine_incoming *incoming)
{
    incoming->keep_disks = true;
}

static int read_hello(struct machine_incoming *incoming, struct machine_config *config, struct error *err)
{
    const uint8_t *body;
    size_t size;
    stream_set_deadline(incoming->stream, loop_now_ns() + HELLO_NS);
    int r = migrate_expect(incoming->stream, MIGRATE_HELLO, &body, &size, err);
    if (r)
        return r;
    incoming->hello_body = malloc(size + 1);
    if (!incoming->hello_body)
        return error_set(err, -ENOMEM, "out of memory");
    memcpy(incoming->hello_body, body, size);
    incoming->io = state_reader_create(incoming->hello_body, size);
    r = incoming->io ? migrate_hello_state(&incoming->hello, incoming->io) : -ENOMEM;
    if (r == 0)
        r = machine_config_state(config, incoming->io);
    return r ? error_set(err, r, "what the other side says of its machine: %s", incoming->io ? state_error(incoming->io) : "out of memory") : 0;
}

int machine_incoming_open(struct machine_incoming **out, int fd, struct machine_config *config, struct error *err)
{
    struct machine_incoming *incoming = calloc(1, sizeof *incoming);
    if (incoming)
        incoming->stream = stream_create(fd, "the migration's source");
    if (incoming)
        incoming->unpacker = unpacker_create();
    if (!incoming || !incoming->stream || !incoming->unpacker) {
        if (incoming) {
            unpacker_destroy(incoming->unpacker);
            stream_destroy(incoming->stream);
        }
        free(incoming);
        return error_set(err, -ENOMEM, "out of memory");
    }
    int r = read_hello(incoming, config, err);
    if (r) {
        machine_incoming_refuse(incoming, err->text);
        machine_incoming_close(incoming);
        return r;
    }
    *out = incoming;
    return 0;
}

/* ---- pages and state ---- */

static int take_state(struct machine_incoming *incoming, const uint8_t *body, size_t size, bool *last, struct error *err)
{
    if (size < 1 || body[0] > 1 || incoming->state_bytes + size > MIGRATE_STATE_BYTES_MAX)
        return error_set(err, -EPROTO, "the state is not as it should be, or larger than any");
    size_t needed = incoming->state_bytes + size - 1;
    if (needed > incoming->state_capacity) {
        uint8_t *more = realloc(incoming->state, 2 * needed);
        if (!more)
            return error_set(err, -ENOMEM, "out of memory");
        incoming->state = more;
        incoming->state_capacity = 2 * needed;
    }
    if (size > 1)
        memcpy(incoming->state + incoming->state_bytes, body + 1, size - 1);
    incoming->state_bytes = needed;
    *last = body[0] == 0;
    return 0;
}

static int begin_post_copy(struct machine_incoming *incoming, uint64_t chunks, const uint8_t *id, size_t size, struct error *err)
{
    if (!incoming->hello.post_copy || incoming->remote || size != sizeof incoming->post_copy_id)
        return error_set(err, -EPROTO, "the other side begins with post-copy, which does not belong here");
    memcpy(incoming->post_copy_id, id, size);
    incoming->remote = calloc(chunks, sizeof *incoming->remote);
    return incoming->remote ? 0 : error_set(err, -ENOMEM, "out of memory");
}

static int answer_echo(struct machine_incoming *incoming, struct error *err)
{
    int r = stream_put(incoming->stream, MIGRATE_ECHO, NULL, 0, NULL, 0, err);
    return r ? r : stream_flush(incoming->stream, err);
}

static int receive_all(struct machine *machine, struct machine_incoming *incoming, struct error *err)
{
    uint64_t ram_bytes = physmap_ram_bytes(machine->memory), chunks = (ram_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
    uint8_t *ram = physmap_get(machine->memory, 0, PAGE_SIZE_BYTES, PHYSMAP_WRITE);
    bool last = false;
    incoming->began_ns = loop_now_ns();
    while (!last) {
        const uint8_t *body;
        size_t size;
        unsigned type;
        stream_set_deadline(incoming->stream, loop_now_ns() + SILENCE_NS);
        int r = stream_get(incoming->stream, &type, &body, &size, err);
        incoming->bytes += r == 0 ? size : 0;
        if (r == 0 && type == MIGRATE_PAGES && !incoming->state_bytes && !incoming->remote)
            r = unpacker_take(incoming->unpacker, ram, ram_bytes, body, size, err);
        else if (r == 0 && type == MIGRATE_DISK && !incoming->state_bytes)
            r = disks_in_take(incoming->disks, body, size, err);
        else if (r == 0 && type == MIGRATE_ECHO && !incoming->state_bytes && !incoming->remote)
            r = answer_echo(incoming, err);
        else if (r == 0 && type == MIGRATE_POST_COPY && !incoming->state_bytes)
            r = begin_post_copy(incoming, chunks, body, size, err);
        else if (r == 0 && type == MIGRATE_REMOTE && incoming->remote && !incoming->remote_complete)
            r = post_copy_take_remote(incoming->remote, chunks, body, size, &incoming->remote_complete, err);
        else if (r == 0 && type == MIGRATE_STATE && (!incoming->remote || incoming->remote_complete))
            r = take_state(incoming, body, size, &last, err);
        else if (r == 0)
            r = migrate_unexpected(type, body, size, err);
        if (r)
            return r;
    }
    return 0;
}

static uint64_t bytes_a_s(const struct machine_incoming *incoming)
{
    uint64_t took_ns = loop_now_ns() - incoming->began_ns + 1;
    return (uint64_t)((double)incoming->bytes * 1e9 / (double)took_ns);
}

/* The machine is complete and has no thread yet. */
static int begin_incoming(struct machine *machine, void *ctx, struct error *err)
{
    struct machine_incoming *incoming = ctx;
    if (incoming->hello.ram_bytes != physmap_ram_bytes(machine->memory))
        return error_set(err, -EINVAL, "the guest's memory has %llu bytes there and %llu here", (unsigned long long)incoming->hello.ram_bytes,
                         (unsigned long long)physmap_ram_bytes(machine->memory));
    if (incoming->hello.disk_count && !incoming->disks)
        return error_set(err, -EINVAL, "disks come with it, and there is no place for them");
    if (cpuid_state(machine->cpuid, incoming->io))
        return error_set(err, -EINVAL, "the guest's processor cannot be made here: %s", state_error(incoming->io));
    static const uint8_t takes[] = {0, MIGRATE_TAKES_FRAME | MIGRATE_TAKES_ECHO};
    int r = stream_put(incoming->stream, MIGRATE_WELCOME, DOPPEL_VERSION, strlen(DOPPEL_VERSION), takes, sizeof takes, err);
    if (r == 0)
        r = stream_flush(incoming->stream, err);
    if (r == 0)
        r = receive_all(machine, incoming, err);
    if (r == 0)
        r = disks_in_settle(incoming->disks, err);
    if (r == 0 && incoming->remote && (r = post_copy_target_create(machine, incoming->stream, incoming->unpacker, incoming->post_copy_id, incoming->remote, bytes_a_s(incoming), err)) == 0)
        incoming->unpacker = NULL;
    if (r == 0)
        r = machine_take_over_disks(machine, err);
    return r ? r : snapshot_decode(machine, incoming->state, incoming->state_bytes, "the state that came", err);
}

int machine_receive(struct machine **machine, const struct machine_config *config, struct machine_incoming *incoming, struct error *err)
{
    struct error own = {0};
    struct machine_config waiting = *config; /* copied by what makes the machine */
    waiting.incoming = true;
    int r = machine_create_with(machine, &waiting, begin_incoming, incoming, &own);
    if (r) {
        machine_incoming_refuse(incoming, own.text);
        error_set(err, r, "%s", own.text);
    }
    return r;
}

static int go_before_memory(struct machine *machine, struct machine_incoming *incoming, struct error *err)
{
    struct error ignored = {0};
    bool paused = false;
    int r = post_copy_target_start(machine, &paused, err);
    if (r)
        return r;
    incoming->stream = NULL;
    incoming->keep_disks = true;
    if (!paused)
        (void)!machine_resume(machine, &ignored);
    post_copy_target_started(machine);
    (void)!loop_post(machine->loop, machine_announce_nets, machine);
    return 0;
}

int machine_receive_go(struct machine *machine, struct machine_incoming *incoming, struct error *err)
{
    if (machine->post_copy_target)
        return go_before_memory(machine, incoming, err);
    const uint8_t *body;
    unsigned type = MIGRATE_FRAME;
    size_t size;
    stream_set_deadline(incoming->stream, loop_now_ns() + GO_NS);
    int r = stream_put(incoming->stream, MIGRATE_READY, NULL, 0, NULL, 0, err);
    if (r == 0)
        r = stream_flush(incoming->stream, err);
    while (r == 0 && type == MIGRATE_FRAME) {
        r = stream_get(incoming->stream, &type, &body, &size, err);
        if (r == 0 && type == MIGRATE_FRAME)
            r = migrate_take_frame(machine, body, size, err);
    }
    if (r == 0 && type != MIGRATE_GO)
        r = migrate_unexpected(type, body, size, err);
    if (r == 0 && (size != 1 || body[0] > 1))
        r = error_set(err, -EPROTO, "the message that lets the guest go is not as it should be");
    if (r)
        return r;
    /* From here on the guest is this machine's: nobody else will run it, so nothing that happens to the connection matters any more. */
    struct error ignored = {0};
    incoming->keep_disks = true;
    if (!body[0])
        (void)!machine_resume(machine, &ignored);
    if (stream_put(incoming->stream, MIGRATE_STARTED, NULL, 0, NULL, 0, &ignored) == 0)
        (void)!stream_flush(incoming->stream, &ignored);
    (void)!loop_post(machine->loop, machine_announce_nets, machine); /* without memory for that, the guest's next frame does it */
    return 0;
}
