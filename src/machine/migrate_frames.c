/*
 * What the network has sent to a guest that stands still waits at the source, and goes on to the target, so that no connection has to notice by its own timers that something is missing
 * (migrate_priv.h).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio_net.h"
#include "machine/migrate_priv.h"

#define FRAMES_MAX 512u    /* of a card */
#define WAITING_MAX 4096u  /* at the target, whose loop may be slower than the source sends */
#define HEAD_BYTES 4u

_Static_assert(HEAD_BYTES + VIRTIO_NET_FRAME_BYTES_MAX <= STREAM_BODY_BYTES_MAX, "a frame is one message");

int migrate_send_frames(struct machine *machine, struct stream *stream, uint64_t bytes_max, struct error *err)
{
    static uint8_t frame[VIRTIO_NET_FRAME_BYTES_MAX]; /* the loop's thread alone is here */
    uint64_t sent = 0;
    size_t size;
    int r = 0;
    for (uint32_t card = 0; r == 0 && card < CONFIG_NETS_MAX; card++)
        for (unsigned n = 0; r == 0 && machine->net[card] && n < FRAMES_MAX && sent < bytes_max && (size = virtio_net_take(machine->net[card]->device, frame, sizeof frame)); n++) {
            uint8_t head[HEAD_BYTES];
            stream_put_number(head, card, sizeof head);
            r = stream_put(stream, MIGRATE_FRAME, head, sizeof head, frame, size, err);
            sent += size;
        }
    return r;
}

struct arrival {
    struct machine *machine;
    uint64_t card;
    size_t size_bytes;
    uint8_t frame[];
};

static void give(void *ctx)
{
    struct arrival *arrival = ctx;
    atomic_fetch_sub(&arrival->machine->frames_waiting, 1);
    const struct machine_device *card = arrival->machine->net[arrival->card];
    if (card)
        virtio_net_give(card->device, arrival->frame, arrival->size_bytes);
    free(arrival);
}

int migrate_take_frame(struct machine *machine, const uint8_t *body, size_t size_bytes, struct error *err)
{
    size_t size = size_bytes - HEAD_BYTES;
    if (size_bytes < HEAD_BYTES || size > VIRTIO_NET_FRAME_BYTES_MAX || stream_number(body, HEAD_BYTES) >= CONFIG_NETS_MAX)
        return error_set(err, -EPROTO, "a frame of the network is not as it should be");
    struct arrival *arrival = atomic_load(&machine->frames_waiting) < WAITING_MAX ? malloc(sizeof *arrival + size) : NULL;
    if (!arrival)
        return 0; /* lost, as on a wire */
    atomic_fetch_add(&machine->frames_waiting, 1);
    *arrival = (struct arrival){.machine = machine, .card = stream_number(body, HEAD_BYTES), .size_bytes = size};
    memcpy(arrival->frame, body + HEAD_BYTES, size);
    if (loop_post(machine->loop, give, arrival)) {
        atomic_fetch_sub(&machine->frames_waiting, 1);
        free(arrival);
    }
    return 0;
}
