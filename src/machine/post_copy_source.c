/*
 * The source of a post-copy migration (post_copy.h). The guest stands still for good, so pages can go in any order and more than once: what is asked for is always answered, even when it is on its way.
 * What nobody has asked for goes in the order in which it may be wanted: what is around the page that was asked for last; then what lies scattered, where the kernel's and the processes' own
 * pages are among much that is not missing (stacks, tables of pages, what is counted in); and what is behind the last one. A guest that goes so writes much, and most of what is missing is in large pieces.
 * Invariants: a page whose bit is in `left` has not been sent over this connection. What nobody asked for is under way only as far as it does not stand in a queue for long (`window`): an answer would
 * wait behind it.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "machine/post_copy.h"
#include "state/inputs.h"

#define SILENCE_NS 60000000000ull
#define LOOK_NS 200000000ull /* then it is seen whether the machine has ended */
#define UNANSWERED_MAX 64u
#define WINDOW_MIN 8u  /* pages */
#define WINDOW_MAX (8u * CHUNK_PAGES)
#define NEAR_PAGES 16u
#define SCATTERED_FIRST 2u
#define SCATTERED_MAX 32u
#define WINDOW_GAIN 1.25        /* of what the way holds, at least */
#define WINDOW_PART 4u          /* it changes by so much with what has arrived */
#define QUEUE_NS 15000000ull    /* what was sent may wait for so long, beside a quarter of the way */
#define REMOTE_WORDS 65536u
#define REMOTE_GAP ((STREAM_HEADER_BYTES + 8) / 8) /* words */

struct post_copy_source {
    struct machine *machine;
    struct stream *stream;
    struct packer *packer;
    const uint8_t *ram;
    uint8_t id[MIGRATE_ID_BYTES];
    uint64_t words, next; /* next: the chunk to look at for what is to be sent unasked */
    _Atomic uint64_t pages;
    unsigned unanswered;      /* messages */
    unsigned oldest, noted;   /* of `sent`, which goes round: the first; how many, the oldest of the unanswered */
    struct {
        uint64_t at_ns, pages;
    } sent[UNANSWERED_MAX];
    uint64_t under_way;   /* pages */
    double window, window_min;
    uint64_t shortest_ns; /* from sending to hearing of it; 0: not known */
    bool complete;
    uint64_t near_chunk, near; /* pages around the last one that was asked for */
    uint64_t at;               /* the chunk to look at for scattered ones: */
    unsigned scattered;        /* chunks where no more than so many are missing */
    uint64_t left[];
};

/* ---- what is missing ---- */

/* How many words are in one message: where there are none for long, another one is shorter. */
static uint64_t remote_run(const uint64_t *pages, uint64_t words)
{
    uint64_t count = 0, empty = 0;
    while (count < words && count < REMOTE_WORDS && empty < REMOTE_GAP) {
        empty = pages[count] ? 0 : empty + 1;
        count++;
    }
    return count - empty;
}

int post_copy_put_remote(struct stream *stream, const uint64_t *pages, uint64_t words, struct error *err)
{
    uint8_t head[8], *body = malloc(REMOTE_WORDS * 8);
    int r = body ? 0 : error_set(err, -ENOMEM, "out of memory");
    for (uint64_t at = 0, count = 1; r == 0 && count; at += count) {
        while (at < words && !pages[at])
            at++;
        count = remote_run(pages + at, words - at);
        for (uint64_t i = 0; i < count; i++)
            stream_put_number(body + 8 * i, pages[at + i], 8);
        stream_put_number(head, at, 8);
        r = stream_put(stream, MIGRATE_REMOTE, head, sizeof head, body, count * 8, err);
    }
    free(body);
    return r;
}

int post_copy_take_remote(uint64_t *pages, uint64_t words, const uint8_t *body, size_t size_bytes, bool *last, struct error *err)
{
    uint64_t at = size_bytes >= 8 ? stream_number(body, 8) : 0, count = size_bytes / 8 - 1;
    if (size_bytes < 8 || size_bytes % 8 || count > REMOTE_WORDS || at > words || count > words - at)
        return error_set(err, -EPROTO, "what is said of missing pages is not as it should be");
    for (uint64_t i = 0; i < count; i++)
        pages[at + i] |= stream_number(body + 8 + 8 * i, 8);
    *last = count == 0;
    return 0;
}

static uint64_t count_left(const struct post_copy_source *source)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < source->words; i++)
        count += (uint64_t)__builtin_popcountll(source->left[i]);
    return count;
}

int post_copy_source_create(struct machine *machine, const uint64_t *left, struct error *err)
{
    uint64_t words = (physmap_ram_bytes(machine->memory) + CHUNK_BYTES - 1) / CHUNK_BYTES;
    struct post_copy_source *source = calloc(1, sizeof *source + words * sizeof source->left[0]);
    if (!source)
        return error_set(err, -ENOMEM, "out of memory");
    source->machine = machine;
    source->ram = physmap_get(machine->memory, 0, PAGE_SIZE_BYTES, PHYSMAP_READ);
    source->words = words;
    memcpy(source->left, left, words * sizeof source->left[0]);
    atomic_store(&source->pages, count_left(source));
    int r = inputs_random(source->id, sizeof source->id);
    if (r) {
        free(source);
        return error_set(err, r, "no random numbers: %s", strerror(-r));
    }
    machine->post_copy_source = source;
    return 0;
}

void post_copy_source_destroy(struct machine *machine)
{
    free(machine->post_copy_source);
    machine->post_copy_source = NULL;
}

uint64_t post_copy_source_pages(const struct post_copy_source *source)
{
    return atomic_load(&source->pages);
}

static void set_window(struct post_copy_source *source, double pages)
{
    source->window = pages < source->window_min ? source->window_min : pages > WINDOW_MAX ? WINDOW_MAX : pages;
}

void post_copy_source_connect(struct post_copy_source *source, struct stream *stream, struct packer *packer, struct post_copy_way way)
{
    source->stream = stream;
    source->packer = packer;
    source->unanswered = source->oldest = source->noted = 0;
    source->under_way = 0;
    source->shortest_ns = way.ns;
    source->window_min = WINDOW_GAIN * way.bytes_a_s * (double)way.ns / 1e9 / PAGE_SIZE_BYTES;
    source->window_min = source->window_min < WINDOW_MIN ? WINDOW_MIN : source->window_min > WINDOW_MAX ? WINDOW_MAX : source->window_min;
    set_window(source, source->window_min);
    source->scattered = SCATTERED_FIRST;
    source->at = 0;
    source->near = 0;
    packer_no_differences(packer);
}

int post_copy_source_announce(struct post_copy_source *source, struct error *err)
{
    int r = stream_put(source->stream, MIGRATE_POST_COPY, source->id, sizeof source->id, NULL, 0, err);
    return r ? r : post_copy_put_remote(source->stream, source->left, source->words, err);
}

/* ---- sending ---- */

/* Answers are sent however many pages are under way. */
static void note_sent(struct post_copy_source *source, uint64_t pages)
{
    if (source->noted == source->unanswered && source->noted < UNANSWERED_MAX) {
        unsigned at = (source->oldest + source->noted++) % UNANSWERED_MAX;
        source->sent[at].at_ns = loop_now_ns();
        source->sent[at].pages = pages;
        source->under_way += pages;
    }
    source->unanswered++;
}

static void note_arrived(struct post_copy_source *source)
{
    source->unanswered--;
    if (!source->noted)
        return;
    source->noted--;
    uint64_t took_ns = loop_now_ns() - source->sent[source->oldest].at_ns + 1, pages = source->sent[source->oldest].pages;
    source->under_way -= pages;
    source->oldest = (source->oldest + 1) % UNANSWERED_MAX;
    if (!source->shortest_ns || took_ns < source->shortest_ns)
        source->shortest_ns = took_ns;
    bool waited = took_ns > source->shortest_ns + source->shortest_ns / 4 + QUEUE_NS;
    set_window(source, source->window + (waited ? -1.0 : 1.0) * (double)pages / WINDOW_PART);
}

typedef int put_fn(struct packer *packer, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err);

/* Whoever they are for. */
static int take_out(struct post_copy_source *source, uint64_t chunk, uint64_t pages, struct error *err)
{
    for (uint64_t rest = pages; rest; rest &= rest - 1)
        if (physmap_need(source->machine->memory, chunk * CHUNK_BYTES + (uint64_t)__builtin_ctzll(rest) * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES, PHYSMAP_READ))
            return error_set(err, -EIO, "a page of the guest's memory cannot be had from where it is");
    atomic_fetch_sub(&source->pages, (uint64_t)__builtin_popcountll(source->left[chunk] & pages));
    source->left[chunk] &= ~pages;
    return 0;
}

static int send_pages(struct post_copy_source *source, uint64_t chunk, uint64_t pages, put_fn *put, struct error *err)
{
    int r = take_out(source, chunk, pages, err);
    if (r)
        return r;
    note_sent(source, (uint64_t)__builtin_popcountll(pages));
    return put(source->packer, chunk, pages, source->ram + chunk * CHUNK_BYTES, err);
}

/* Those that nobody asked for, by how soon they may be wanted: of one chunk. 0: nothing is left. */
static uint64_t next_pages(struct post_copy_source *source, uint64_t *chunk)
{
    uint64_t pages = source->near & source->left[*chunk = source->near_chunk];
    while (!pages && source->scattered <= SCATTERED_MAX) {
        pages = source->left[*chunk = source->at];
        if (pages && (unsigned)__builtin_popcountll(pages) <= source->scattered)
            break;
        pages = 0;
        source->at = (source->at + 1) % source->words;
        source->scattered *= source->at ? 1 : 2;
    }
    for (uint64_t n = 0; !pages && n < source->words; n++, source->next = (source->next + !pages) % source->words)
        pages = source->left[*chunk = source->next];
    return pages;
}

int post_copy_source_send_ahead(struct post_copy_source *source, const struct state_need *needs, unsigned need_count, struct error *err)
{
    int r = 0;
    for (unsigned i = 0; i < need_count; i++) {
        uint64_t offset, bytes = needs[i].bytes;
        if (!bytes || !physmap_offset(source->machine->memory, needs[i].gpa, bytes, &offset))
            continue;
        for (uint64_t page = offset / PAGE_SIZE_BYTES; r == 0 && page <= (offset + bytes - 1) / PAGE_SIZE_BYTES; page++) {
            uint64_t chunk = page / CHUNK_PAGES, bit = 1ull << page % CHUNK_PAGES;
            if (chunk >= source->words || !(source->left[chunk] & bit))
                continue;
            r = take_out(source, chunk, bit, err);
            if (r == 0)
                r = packer_put(source->packer, chunk, bit, source->ram + chunk * CHUNK_BYTES, err);
        }
    }
    return r ? r : packer_flush(source->packer, err);
}

static bool is_full(const struct post_copy_source *source)
{
    return source->unanswered >= UNANSWERED_MAX || (double)source->under_way >= source->window;
}

/* Of one chunk as many pages as there is room for. Whether there were any. */
static bool push(struct post_copy_source *source, int *r, struct error *err)
{
    uint64_t chunk, pages = next_pages(source, &chunk), next;
    if (!pages)
        return false;
    while ((double)(source->under_way + (uint64_t)__builtin_popcountll(pages)) >= source->window + 1 && pages & (pages - 1))
        pages &= ~(1ull << (63 - __builtin_clzll(pages)));
    *r = send_pages(source, chunk, pages, packer_put, err);
    if (*r == 0 && (is_full(source) || !next_pages(source, &next)))
        *r = packer_flush(source->packer, err);
    if (*r == 0)
        *r = stream_flush(source->stream, err);
    return true;
}

int post_copy_source_fill(struct post_copy_source *source, struct error *err)
{
    int r = 0;
    while (r == 0 && !is_full(source) && push(source, &r, err))
        continue;
    return r;
}

/* ---- what the other side says ---- */

static int answer(struct post_copy_source *source, const uint8_t *body, size_t size, struct error *err)
{
    uint64_t chunk = size == 16 ? stream_number(body, 8) : source->words, pages = chunk < source->words ? stream_number(body + 8, 8) : 0;
    uint64_t room = chunk < source->words ? (physmap_ram_bytes(source->machine->memory) - chunk * CHUNK_BYTES) / PAGE_SIZE_BYTES : 0;
    if (!pages || (room < CHUNK_PAGES && pages >> room))
        return error_set(err, -EPROTO, "pages were asked for that the guest's memory does not have");
    source->next = source->near_chunk = chunk;
    source->near = ((1ull << NEAR_PAGES) - 1) << (__builtin_ctzll(pages) & ~(NEAR_PAGES - 1));
    return send_pages(source, chunk, pages, packer_put_first, err);
}

/* One message, waited for; *type 0 when it was for this file. */
static int take_message(struct post_copy_source *source, unsigned *type, struct error *err)
{
    const uint8_t *body;
    size_t size;
    int r = stream_get(source->stream, type, &body, &size, err);
    if (r || *type == MIGRATE_READY || *type == MIGRATE_STARTED)
        return r;
    if (*type == MIGRATE_REQUEST)
        r = answer(source, body, size, err);
    else if (*type == MIGRATE_ARRIVED && source->unanswered)
        note_arrived(source);
    else if (*type == MIGRATE_COMPLETE)
        source->complete = true;
    else
        return migrate_unexpected(*type, body, size, err);
    *type = 0;
    return r ? r : stream_flush(source->stream, err);
}

int post_copy_source_expect(struct post_copy_source *source, unsigned type, struct error *err)
{
    unsigned came = 0;
    int r = 0;
    while (r == 0 && !came) {
        r = take_message(source, &came, err);
        if (r == 0 && !came)
            r = post_copy_source_fill(source, err);
    }
    return r ? r : came == type && !source->complete ? 0 : migrate_unexpected(came, NULL, 0, err);
}

int post_copy_source_rejoin(struct post_copy_source *source, struct error *err)
{
    const uint8_t *body;
    size_t size;
    bool last = false;
    stream_set_deadline(source->stream, loop_now_ns() + SILENCE_NS);
    int r = stream_put(source->stream, MIGRATE_RECOVER, source->id, sizeof source->id, NULL, 0, err);
    if (r == 0)
        r = stream_flush(source->stream, err);
    memset(source->left, 0, source->words * sizeof source->left[0]);
    while (r == 0 && !last) {
        r = migrate_expect(source->stream, MIGRATE_REMOTE, &body, &size, err);
        if (r == 0)
            r = post_copy_take_remote(source->left, source->words, body, size, &last, err);
    }
    uint64_t room = (physmap_ram_bytes(source->machine->memory) / PAGE_SIZE_BYTES) % CHUNK_PAGES;
    if (room)
        source->left[source->words - 1] &= (1ull << room) - 1;
    atomic_store(&source->pages, count_left(source));
    return r;
}

/* ---- all of it ---- */

/* Whether there is a message now, or within so much time. */
static bool can_take(const struct post_copy_source *source, uint64_t ns)
{
    struct pollfd poll_fd = {.fd = stream_descriptor(source->stream), .events = POLLIN};
    return stream_has_frame(source->stream) || poll(&poll_fd, 1, (int)((ns + 999999) / 1000000)) > 0;
}

int post_copy_source_serve(struct post_copy_source *source, const struct post_copy_pace *pace, struct error *err)
{
    uint64_t heard_ns = loop_now_ns(); /* or since when something is waited for */
    int r = 0;
    while (r == 0 && !source->complete) {
        uint64_t chunk;
        bool more = !is_full(source) && next_pages(source, &chunk);
        uint64_t rest_ns = more ? pace->rest_ns(pace->ctx) : LOOK_NS, now;
        unsigned type = 0;
        if (can_take(source, rest_ns < LOOK_NS ? rest_ns : LOOK_NS)) {
            heard_ns = now = loop_now_ns();
            stream_set_deadline(source->stream, now + SILENCE_NS);
            r = take_message(source, &type, err);
            if (r == 0 && type)
                r = migrate_unexpected(type, NULL, 0, err);
        } else if (migrate_has_ended(source->machine)) {
            r = error_set(err, -ESRCH, "the virtual machine has ended");
        } else if ((now = loop_now_ns()) - heard_ns > SILENCE_NS && (source->unanswered || !more)) {
            r = error_set(err, -ETIMEDOUT, "the other side says nothing more");
        } else if (more && !rest_ns) {
            heard_ns = source->unanswered ? heard_ns : now;
            stream_set_deadline(source->stream, now + SILENCE_NS);
            push(source, &r, err);
            pace->sent(pace->ctx);
        }
    }
    return r;
}
