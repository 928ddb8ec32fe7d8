/*
 * Virtqueues: split rings of virtio 1.2, section 2.7. The rings are touched here only; devices see chains.
 *
 * A chain is copied out of the descriptor table once, checked, and turned into host vectors: first what the device reads, then what it writes. The device owns a popped
 * chain until it pushes it (with the number of bytes written) or the queue is reset; then virtqueue_pop may hand the same memory out again.
 * Whatever is wrong with a ring or a chain breaks the queue: pop returns NULL from then on and `broken` is called once, which makes the
 * device ask for a reset (DEVICE_NEEDS_RESET).
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_DEVICE_VIRTQUEUE_H
#define DOPPEL_DEVICE_VIRTQUEUE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "memory/memory.h"
#include "state/state.h"

#define VIRTQUEUE_SIZE_MAX 1024u      /* entries in a ring */
#define VIRTQUEUE_CHAIN_MAX 1024u     /* descriptors in a chain, indirect ones included */
#define VIRTQUEUE_CHAIN_BYTES_MAX (1ull << 32) /* sum of a chain's lengths; 2.7.5.2 */

struct virtqueue;

struct virtqueue_chain {
    struct iovec *in;  /* readable by the device: the driver's request */
    struct iovec *out; /* writable by the device: the answer */
    unsigned in_count, out_count;
    uint64_t in_bytes, out_bytes;
    /* Of the queue. */
    struct virtqueue *queue;
    uint16_t head;
    uint32_t epoch;               /* differs from the queue's after a reset: the chain is detached, pushing it only frees it */
    gpa_t *out_gpa;               /* guest address of each writable vector */
    struct virtqueue_chain *next; /* both free for the device */
    void *user;
};

struct virtqueue_config {
    struct physmap *memory;
    unsigned index;
    /* The used ring has something new and the driver wants to know. */
    void (*interrupt)(void *ctx, unsigned index);
    /* The driver broke the rules; `reason` is for the log. */
    void (*broken)(void *ctx, unsigned index, const char *reason);
    void *ctx;
};

struct virtqueue *virtqueue_create(const struct virtqueue_config *config); /* NULL: no memory */
void virtqueue_destroy(struct virtqueue *queue);

/*
 * Starts using the rings at these guest addresses. `size` is a power of two up to VIRTQUEUE_SIZE_MAX. -EINVAL: size or alignment; -EFAULT: not
 * all in RAM. `event_index`: VIRTIO_F_EVENT_IDX, `indirect`: VIRTIO_F_INDIRECT_DESC was negotiated.
 */
struct virtqueue_rings {
    unsigned size;
    gpa_t descriptors, available, used;
    bool event_index, indirect;
};
int virtqueue_enable(struct virtqueue *queue, const struct virtqueue_rings *rings) __attribute__((warn_unused_result));
/* Forgets the rings. Chains that the device still has become detached: their memory stays valid until pushed. */
void virtqueue_disable(struct virtqueue *queue);
bool virtqueue_enabled(const struct virtqueue *queue);

/* The next chain, NULL when there is none (or the queue is off or broken). */
struct virtqueue_chain *virtqueue_pop(struct virtqueue *queue);
/* Gives the last popped chain back, as if pop had not happened. Only valid for the most recent pop. */
void virtqueue_unpop(struct virtqueue_chain *chain);
/*
 * Returns the chain to the driver: the device wrote `used_bytes` of its writable part, from its start. Frees the chain. Interrupts the driver if
 * it asked for that; with `flush` false the entry stays invisible until a later push of this queue has flush true (mergeable receive buffers).
 */
void virtqueue_push(struct virtqueue_chain *chain, uint64_t used_bytes, bool flush);
/* True when the ring holds chains to pop. */
bool virtqueue_pending(struct virtqueue *queue);
/* How many chains the driver has ever put into the ring, modulo 65536; 0 while the queue is off. */
uint16_t virtqueue_offered(struct virtqueue *queue);
/*
 * Asks the driver (not) to notify. Enabling returns true when chains arrived meanwhile: pop again before sleeping. A queue starts enabled.
 *     do {
 *         virtqueue_set_notification(queue, false);
 *         while ((chain = virtqueue_pop(queue))) ...
 *     } while (virtqueue_set_notification(queue, true));
 * A device that leaves chains in the ring (too few buffers for a frame) gets true for those as well: it tries once more and then sleeps; any
 * chain added after the enabling call notifies.
 */
bool virtqueue_set_notification(struct virtqueue *queue, bool enabled);
/*
 * The driver is not to notify until `count` more chains are in the ring, one at least; for those nobody waits for, whose device looks by itself from time to time. Until the next
 * virtqueue_set_notification(). Drivers without VIRTIO_F_EVENT_IDX go on notifying.
 */
void virtqueue_notify_after(struct virtqueue *queue, unsigned count);
/* Shows the driver what was pushed without `flush`. */
void virtqueue_flush(struct virtqueue *queue);
/* The device found the chain itself unusable (too short for its header ...). */
void virtqueue_fail(struct virtqueue *queue, const char *reason);

bool virtqueue_in_use(const struct virtqueue *queue);        /* any chain out, detached ones included */

/* Copies out of and into a chain, from byte `offset` of its readable or writable part. Return the number of bytes copied (less at the end). */
uint64_t virtqueue_read(const struct virtqueue_chain *chain, uint64_t offset, void *data, uint64_t size_bytes);
uint64_t virtqueue_write(struct virtqueue_chain *chain, uint64_t offset, const void *data, uint64_t size_bytes);
/*
 * Vectors for [offset, offset + length) of the readable (`writable` false) or writable part, in `iov` (room for at least in_count or out_count).
 * Returns how many; length is cut to what there is.
 */
unsigned virtqueue_slice(const struct virtqueue_chain *chain, bool writable, uint64_t offset, uint64_t length_bytes, struct iovec *iov);

/* Fields inside the caller's section. Nothing is in flight. Rings are checked again when loading. */
void virtqueue_state(struct virtqueue *queue, struct state_io *io);

#endif
