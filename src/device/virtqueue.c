/*
 * Split virtqueues, device side (virtio 1.2, section 2.7).
 *
 * The descriptor table and the available ring belong to the driver, who may change them at any moment from another processor: every field is read
 * exactly once into a local and only the local is checked and used. The used ring is written here and never read back.
 * Invariants: avail_next - used_next == in_flight (mod 2^16) while the device is well-behaved; in_flight <= rings.size; a chain whose epoch differs from the queue's
 * belongs to rings that are gone and is counted in `detached` only.
 * Threading: with the device lock held; the atomics are for the guest's processors.
 */
#include "device/virtqueue.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* 2.7.5: descriptors. 2.7.6, 2.7.8: rings. x86 hosts are little endian like the rings. */
#define DESC_F_NEXT 1u
#define DESC_F_WRITE 2u
#define DESC_F_INDIRECT 4u
#define AVAIL_F_NO_INTERRUPT 1u
#define USED_F_NO_NOTIFY 1u

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};

struct available_ring {
    uint16_t flags;
    uint16_t index;
    uint16_t ring[]; /* size entries, then used_event */
};

struct used_element {
    uint32_t id;
    uint32_t length;
};

struct used_ring {
    uint16_t flags;
    uint16_t index;
    struct used_element ring[]; /* size entries, then avail_event (16 bits) */
};

struct virtqueue {
    struct virtqueue_config config;
    struct virtqueue_rings rings;
    bool enabled, broken;
    bool notification; /* the driver is asked to notify */
    const struct descriptor *descriptors;
    struct available_ring *available;
    struct used_ring *used;
    uint16_t avail_next;     /* next entry of the available ring to pop */
    uint16_t used_next;      /* next entry of the used ring to fill */
    uint16_t used_signalled; /* used index at the last look at used_event */
    uint32_t epoch;
    unsigned in_flight, detached;
    /* Scratch for pop. */
    unsigned count;
    unsigned in_count;
    uint64_t in_bytes, out_bytes;
    struct iovec iov[VIRTQUEUE_CHAIN_MAX];
    gpa_t gpa[VIRTQUEUE_CHAIN_MAX];
};

struct virtqueue *virtqueue_create(const struct virtqueue_config *config)
{
    struct virtqueue *queue = calloc(1, sizeof(*queue));

    if (queue)
        queue->config = *config;
    return queue;
}

void virtqueue_destroy(struct virtqueue *queue)
{
    if (!queue)
        return;
    assert(!virtqueue_in_use(queue));
    free(queue);
}

static uint64_t available_bytes(unsigned size)
{
    return sizeof(struct available_ring) + 2ull * size + 2;
}

static uint64_t used_bytes_of(unsigned size)
{
    return sizeof(struct used_ring) + sizeof(struct used_element) * (uint64_t)size + 2;
}

int virtqueue_enable(struct virtqueue *queue, const struct virtqueue_rings *rings)
{
    unsigned size = rings->size;
    struct physmap *memory = queue->config.memory;

    virtqueue_disable(queue);
    if (size == 0 || size > VIRTQUEUE_SIZE_MAX || (size & (size - 1)))
        return -EINVAL;
    if ((rings->descriptors & 15) || (rings->available & 1) || (rings->used & 3)) /* 2.7 */
        return -EINVAL;
    queue->descriptors =
        physmap_get(memory, rings->descriptors, sizeof(struct descriptor) * (uint64_t)size, PHYSMAP_READ);
    queue->available = physmap_get(memory, rings->available, available_bytes(size), PHYSMAP_READ);
    queue->used = physmap_get(memory, rings->used, used_bytes_of(size), PHYSMAP_WRITE);
    if (!queue->descriptors || !queue->available || !queue->used)
        return -EFAULT;
    queue->rings = *rings;
    queue->enabled = true;
    queue->notification = true;
    return 0;
}

void virtqueue_disable(struct virtqueue *queue)
{
    queue->enabled = false;
    queue->broken = false;
    queue->notification = false;
    queue->avail_next = queue->used_next = queue->used_signalled = 0;
    queue->detached += queue->in_flight;
    queue->in_flight = 0;
    queue->epoch++;
}

bool virtqueue_enabled(const struct virtqueue *queue)
{
    return queue->enabled;
}

void virtqueue_fail(struct virtqueue *queue, const char *reason)
{
    if (queue->broken)
        return;
    queue->broken = true;
    queue->config.broken(queue->config.ctx, queue->config.index, reason);
}

static uint16_t available_index(const struct virtqueue *queue)
{
    return __atomic_load_n(&queue->available->index, __ATOMIC_ACQUIRE);
}

/* 2.7.7, 2.7.9: the event fields are behind the last entry of the other side's ring. */
static uint16_t used_event(const struct virtqueue *queue)
{
    return __atomic_load_n(&queue->available->ring[queue->rings.size], __ATOMIC_RELAXED);
}

static void set_available_event(struct virtqueue *queue, uint16_t index)
{
    __atomic_store_n((uint16_t *)&queue->used->ring[queue->rings.size], index, __ATOMIC_RELAXED);
    physmap_mark_dirty(queue->config.memory, queue->rings.used + used_bytes_of(queue->rings.size) - 2, 2);
}

bool virtqueue_pending(struct virtqueue *queue)
{
    return queue->enabled && !queue->broken && available_index(queue) != queue->avail_next;
}

uint16_t virtqueue_offered(struct virtqueue *queue)
{
    return queue->enabled ? available_index(queue) : 0;
}

bool virtqueue_set_notification(struct virtqueue *queue, bool enabled)
{
    if (!queue->enabled)
        return false;
    queue->notification = enabled;
    if (!queue->rings.event_index) {
        __atomic_store_n(&queue->used->flags, enabled ? 0 : USED_F_NO_NOTIFY, __ATOMIC_RELAXED);
        physmap_mark_dirty(queue->config.memory, queue->rings.used, 2);
    } else if (enabled) {
        set_available_event(queue, available_index(queue));
    }
    if (!enabled)
        return false;
    /* The driver adds and then looks at the event field; here it is the other way round. Without the fence both may miss. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return virtqueue_pending(queue);
}

void virtqueue_notify_after(struct virtqueue *queue, unsigned count)
{
    if (!queue->enabled || !queue->rings.event_index)
        return;
    queue->notification = false;
    set_available_event(queue, (uint16_t)(queue->avail_next + count - 1));
}

/* ---- pop ---- */

/* Takes one descriptor into the scratch vectors. NULL, or what is wrong with it. */
static const char *add_buffer(struct virtqueue *queue, const struct descriptor *descriptor)
{
    bool writable = descriptor->flags & DESC_F_WRITE;
    void *host;

    if (!writable && queue->count > queue->in_count)
        return "a readable buffer follows a writable one"; /* 2.7.4.2 */
    if (descriptor->length == 0)
        return NULL;
    if (queue->count == VIRTQUEUE_CHAIN_MAX)
        return "a chain has too many buffers";
    if (queue->in_bytes + queue->out_bytes + descriptor->length > VIRTQUEUE_CHAIN_BYTES_MAX)
        return "a chain is longer than 4 GiB";
    host = physmap_get(queue->config.memory, descriptor->address, descriptor->length, writable ? PHYSMAP_WRITE : PHYSMAP_READ);
    if (!host)
        return "a buffer is not in guest memory";
    queue->iov[queue->count] = (struct iovec){host, descriptor->length};
    queue->gpa[queue->count] = descriptor->address;
    queue->count++;
    if (writable) {
        queue->out_bytes += descriptor->length;
    } else {
        queue->in_bytes += descriptor->length;
        queue->in_count++;
    }
    return NULL;
}

/* One fetch from memory that the guest may be writing: the barrier keeps the compiler from fetching a field again. */
static struct descriptor fetch_descriptor(const uint8_t *table, unsigned index)
{
    struct descriptor descriptor;

    memcpy(&descriptor, table + sizeof(descriptor) * index, sizeof(descriptor));
    __asm__ volatile("" : "+m"(descriptor) : : "memory");
    return descriptor;
}

/* Follows a chain in `table` from `index`. An INDIRECT descriptor ends it and is handed back in *indirect (when allowed). */
static const char *walk_table(struct virtqueue *queue, const uint8_t *table, unsigned table_size, unsigned index, struct descriptor *indirect)
{
    for (unsigned steps = 0; steps < table_size; steps++) {
        struct descriptor descriptor = fetch_descriptor(table, index);

        if (descriptor.flags & DESC_F_INDIRECT) {
            if (!indirect)
                return "an indirect descriptor where none is allowed";
            if (descriptor.flags & DESC_F_NEXT)
                return "an indirect descriptor has a successor"; /* 2.7.5.3.1 */
            *indirect = descriptor;
            return NULL;
        }
        const char *reason = add_buffer(queue, &descriptor);
        if (reason)
            return reason;
        if (!(descriptor.flags & DESC_F_NEXT))
            return NULL;
        if (descriptor.next >= table_size)
            return "a descriptor's successor is outside its table";
        index = descriptor.next;
    }
    return "a descriptor chain is a loop";
}

static const char *collect_chain(struct virtqueue *queue, unsigned head)
{
    struct descriptor indirect = {0};
    const char *reason;
    const uint8_t *table;

    queue->count = queue->in_count = 0;
    queue->in_bytes = queue->out_bytes = 0;
    reason = walk_table(queue, (const uint8_t *)queue->descriptors, queue->rings.size, head,
                        queue->rings.indirect ? &indirect : NULL);
    if (reason || !(indirect.flags & DESC_F_INDIRECT))
        return reason;
    if (indirect.length == 0 || indirect.length % sizeof(struct descriptor))
        return "an indirect table's length is not a multiple of 16";
    if (indirect.length / sizeof(struct descriptor) > VIRTQUEUE_CHAIN_MAX)
        return "an indirect table is too long";
    table = physmap_get(queue->config.memory, indirect.address, indirect.length, PHYSMAP_READ);
    if (!table)
        return "an indirect table is not in guest memory";
    return walk_table(queue, table, indirect.length / sizeof(struct descriptor), 0, NULL);
}

/* A chain with room for the scratch vectors, which are copied behind it. */
static struct virtqueue_chain *make_chain(struct virtqueue *queue, uint16_t head)
{
    unsigned out_count = queue->count - queue->in_count;
    size_t vectors_bytes = queue->count * sizeof(struct iovec);
    struct virtqueue_chain *chain = malloc(sizeof(*chain) + vectors_bytes + out_count * sizeof(gpa_t));

    if (!chain)
        return NULL;
    *chain = (struct virtqueue_chain){
        .in = (struct iovec *)(chain + 1),
        .in_count = queue->in_count,
        .out_count = out_count,
        .in_bytes = queue->in_bytes,
        .out_bytes = queue->out_bytes,
        .queue = queue,
        .head = head,
        .epoch = queue->epoch,
    };
    chain->out = chain->in + queue->in_count;
    chain->out_gpa = (gpa_t *)(chain->in + queue->count);
    if (queue->count)
        memcpy(chain->in, queue->iov, vectors_bytes);
    if (out_count)
        memcpy(chain->out_gpa, queue->gpa + queue->in_count, out_count * sizeof(gpa_t));
    return chain;
}

struct virtqueue_chain *virtqueue_pop(struct virtqueue *queue)
{
    struct virtqueue_chain *chain;
    const char *reason;
    uint16_t waiting, head;

    if (!virtqueue_pending(queue))
        return NULL;
    waiting = (uint16_t)(available_index(queue) - queue->avail_next);
    if (waiting == 0)
        return NULL;
    /* The acquire load of the index orders everything read below behind it (2.7.13.3.1). */
    head = __atomic_load_n(&queue->available->ring[queue->avail_next & (queue->rings.size - 1)], __ATOMIC_RELAXED);
    if (waiting > queue->rings.size || queue->in_flight == queue->rings.size)
        reason = "more chains available than the ring has entries";
    else if (head >= queue->rings.size)
        reason = "a chain's head is outside the descriptor table";
    else
        reason = collect_chain(queue, head);
    if (reason) {
        virtqueue_fail(queue, reason);
        return NULL;
    }
    chain = make_chain(queue, head);
    if (!chain) {
        virtqueue_fail(queue, "no memory on the host");
        return NULL;
    }
    queue->avail_next++;
    queue->in_flight++;
    if (queue->rings.event_index && queue->notification)
        set_available_event(queue, queue->avail_next);
    return chain;
}

static void chain_forget(struct virtqueue_chain *chain)
{
    struct virtqueue *queue = chain->queue;

    if (chain->epoch == queue->epoch)
        queue->in_flight--;
    else
        queue->detached--;
    free(chain);
}

void virtqueue_unpop(struct virtqueue_chain *chain)
{
    struct virtqueue *queue = chain->queue;

    if (chain->epoch == queue->epoch)
        queue->avail_next--;
    chain_forget(chain);
}

/* ---- push ---- */

static void mark_written(const struct virtqueue_chain *chain, uint64_t used_bytes)
{
    for (unsigned i = 0; i < chain->out_count && used_bytes; i++) {
        uint64_t part = used_bytes < chain->out[i].iov_len ? used_bytes : chain->out[i].iov_len;

        physmap_mark_dirty(chain->queue->config.memory, chain->out_gpa[i], part);
        used_bytes -= part;
    }
}

/* 2.7.7.2, 2.7.10: does the driver want an interrupt now that the used index went from `old` to used_next? */
static bool wants_interrupt(const struct virtqueue *queue, uint16_t old)
{
    if (!queue->rings.event_index)
        return !(__atomic_load_n(&queue->available->flags, __ATOMIC_RELAXED) & AVAIL_F_NO_INTERRUPT);
    return (uint16_t)(queue->used_next - used_event(queue) - 1) < (uint16_t)(queue->used_next - old);
}

void virtqueue_push(struct virtqueue_chain *chain, uint64_t used_bytes, bool flush)
{
    struct virtqueue *queue = chain->queue;
    unsigned slot = queue->used_next & (queue->rings.size - 1);

    if (used_bytes > chain->out_bytes)
        used_bytes = chain->out_bytes;
    mark_written(chain, used_bytes); /* also when the driver will not hear of it: the bytes are in its memory */
    if (chain->epoch != queue->epoch || queue->broken) {
        chain_forget(chain);
        return;
    }
    /* A length of exactly 4 GiB does not fit the element; no driver can tell. */
    __atomic_store_n(&queue->used->ring[slot].id, chain->head, __ATOMIC_RELAXED);
    __atomic_store_n(&queue->used->ring[slot].length, used_bytes > UINT32_MAX ? UINT32_MAX : (uint32_t)used_bytes, __ATOMIC_RELAXED);
    physmap_mark_dirty(queue->config.memory, queue->rings.used + sizeof(struct used_ring) + sizeof(struct used_element) * slot,
                       sizeof(struct used_element));
    queue->used_next++;
    chain_forget(chain);
    if (flush)
        virtqueue_flush(queue);
}

void virtqueue_flush(struct virtqueue *queue)
{
    uint16_t old = queue->used_signalled;

    if (!queue->enabled || queue->broken || queue->used_next == old)
        return;
    __atomic_store_n(&queue->used->index, queue->used_next, __ATOMIC_RELEASE);
    physmap_mark_dirty(queue->config.memory, queue->rings.used, sizeof(struct used_ring));
    /* The driver sets used_event (or its flags) and then looks at the index; here it is the other way round. */
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    queue->used_signalled = queue->used_next;
    if (wants_interrupt(queue, old))
        queue->config.interrupt(queue->config.ctx, queue->config.index);
}

bool virtqueue_in_use(const struct virtqueue *queue)
{
    return queue->in_flight + queue->detached > 0;
}

/* ---- bytes of a chain ---- */

unsigned virtqueue_slice(const struct virtqueue_chain *chain, bool writable, uint64_t offset, uint64_t length_bytes, struct iovec *iov)
{
    const struct iovec *from = writable ? chain->out : chain->in;
    unsigned from_count = writable ? chain->out_count : chain->in_count, count = 0;

    for (unsigned i = 0; i < from_count && length_bytes; i++) {
        if (offset >= from[i].iov_len) {
            offset -= from[i].iov_len;
            continue;
        }
        uint64_t part = from[i].iov_len - offset;
        if (part > length_bytes)
            part = length_bytes;
        iov[count++] = (struct iovec){(uint8_t *)from[i].iov_base + offset, part};
        length_bytes -= part;
        offset = 0;
    }
    return count;
}

static uint64_t copy_chain(const struct virtqueue_chain *chain, bool writable, uint64_t offset, uint8_t *data, uint64_t size_bytes)
{
    const struct iovec *iov = writable ? chain->out : chain->in;
    unsigned count = writable ? chain->out_count : chain->in_count;
    uint64_t done = 0;

    for (unsigned i = 0; i < count && done < size_bytes; i++) {
        if (offset >= iov[i].iov_len) {
            offset -= iov[i].iov_len;
            continue;
        }
        uint64_t part = iov[i].iov_len - offset;
        if (part > size_bytes - done)
            part = size_bytes - done;
        if (writable) {
            memcpy((uint8_t *)iov[i].iov_base + offset, data + done, part);
            physmap_mark_dirty(chain->queue->config.memory, chain->out_gpa[i] + offset, part);
        } else {
            memcpy(data + done, (const uint8_t *)iov[i].iov_base + offset, part);
        }
        done += part;
        offset = 0;
    }
    /* What was copied in is checked next: as with descriptors, no second fetch. */
    __asm__ volatile("" : : : "memory");
    return done;
}

uint64_t virtqueue_read(const struct virtqueue_chain *chain, uint64_t offset, void *data, uint64_t size_bytes)
{
    return copy_chain(chain, false, offset, data, size_bytes);
}

uint64_t virtqueue_write(struct virtqueue_chain *chain, uint64_t offset, const void *data, uint64_t size_bytes)
{
    return copy_chain(chain, true, offset, (uint8_t *)(uintptr_t)data, size_bytes);
}

/* ---- state ---- */

void virtqueue_state(struct virtqueue *queue, struct state_io *io)
{
    struct virtqueue_rings rings = queue->rings;
    bool enabled = queue->enabled, broken = queue->broken, notification = queue->notification;
    uint16_t avail_next = queue->avail_next, used_next = queue->used_next;
    uint32_t size = rings.size;

    state_bool(io, &enabled);
    state_bool(io, &broken);
    state_bool(io, &notification);
    state_bool(io, &rings.event_index);
    state_bool(io, &rings.indirect);
    state_u32(io, &size);
    state_u64(io, &rings.descriptors);
    state_u64(io, &rings.available);
    state_u64(io, &rings.used);
    state_u16(io, &avail_next);
    state_u16(io, &used_next);
    if (enabled) {
        state_needs(io, rings.descriptors, sizeof(struct descriptor) * (uint64_t)size);
        state_needs(io, rings.available, available_bytes(size));
        state_needs(io, rings.used, used_bytes_of(size));
    }
    if (!state_loading(io))
        return;

    virtqueue_disable(queue);
    if (state_failed(io) || !enabled)
        return;
    rings.size = size;
    /* A broken queue may have lost chains: its indices need not agree. */
    if (virtqueue_enable(queue, &rings) < 0 || (!broken && avail_next != used_next)) {
        state_fail(io, "a virtqueue's rings are impossible");
        return;
    }
    queue->broken = broken;
    queue->notification = notification;
    queue->avail_next = avail_next;
    queue->used_next = queue->used_signalled = used_next;
}
