/*
 * The target of a post-copy migration (post_copy.h). Whoever wants a page that is missing (memory/page_source.h) is in the list of `waiting`, and a thread of its own asks for it and puts what comes to
 * its place: that of who waits, or of whoever comes later.
 * Invariants: a page that is asked for comes, over each connection, as the source answers always; one that comes twice is dropped the second time (physmap_fill).
 * Threading: the lock guards all but `stream`'s use, which is the thread's.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "machine/post_copy.h"
#include "memory/page_source.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

#define GROUP_BYTES_MAX (64u << 10)
#define GROUP_MS 5u
#define SILENCE_NS 60000000000ull
#define GO_NS 30000000000ull
#define FAREWELL_NS 5000000000ull

struct waiting {
    struct waiting *next;
    uint64_t chunk, pages;
    uint8_t *to; /* where the chunk is */
    bool asked;
};

enum { CONNECTED, LOST, FAILED, OVER }; /* FAILED: for good */

struct post_copy_target {
    struct machine *machine;
    struct unpacker *unpacker;
    uint64_t ram_bytes;
    uint8_t id[MIGRATE_ID_BYTES];
    int wake_fd;
    pthread_t thread;
    bool threaded, taken; /* it is; without it, somebody uses the stream */
    _Atomic bool arrived, ending; /* everything; the machine ends */
    unsigned arrivals;    /* the thread's: messages with pages that the source does not know of yet */

    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct stream *stream, *next_stream; /* the one in use; one to go on with */
    struct waiting *waiting;
    uint32_t to_say; /* messages without a body, by type */
    int state;
    bool gone_over, paused, stopping, heard; /* GO came, and the stream is this file's since; its memory is wanted no more; something came over this connection */
    struct error why;
};

static void wake(const struct post_copy_target *target)
{
    const uint64_t one = 1;
    while (write(target->wake_fd, &one, sizeof one) < 0 && errno == EINTR)
        continue;
}

/* With the lock. */
static void fail(struct post_copy_target *target, const struct error *why)
{
    if (target->state == FAILED)
        return;
    target->state = FAILED;
    target->why = *why;
    pthread_cond_broadcast(&target->changed);
}

/* ---- what comes ---- */

/* With the lock. Who waits for the page of the chunk. */
static struct waiting **find_waiting(struct post_copy_target *target, uint64_t chunk, uint64_t page)
{
    struct waiting **at = &target->waiting;
    while (*at && !((*at)->chunk == chunk && (*at)->pages & page))
        at = &(*at)->next;
    return at;
}

static int put_page(struct post_copy_target *target, uint64_t chunk, unsigned page, const uint8_t *data)
{
    struct waiting **at = find_waiting(target, chunk, 1ull << page), *waiting = *at;
    if (!waiting)
        return physmap_fill(target->machine->memory, chunk * CHUNK_BYTES + page * PAGE_SIZE_BYTES, data, PAGE_SIZE_BYTES);
    memcpy(waiting->to + page * PAGE_SIZE_BYTES, data, PAGE_SIZE_BYTES);
    waiting->pages &= ~(1ull << page);
    if (!waiting->pages) {
        *at = waiting->next;
        pthread_cond_broadcast(&target->changed);
    }
    return 0;
}

static int take_pages(struct post_copy_target *target, const uint8_t *body, size_t size, struct error *err)
{
    static const uint8_t zeroes[PAGE_SIZE_BYTES];
    struct unpacked_pages in;
    int r = unpacker_open(target->unpacker, target->ram_bytes, body, size, &in, err);
    if (r == 0 && in.delta)
        r = error_set(err, -EPROTO, "a difference came for a page that is missing");
    if (r)
        return r;
    const uint8_t *data = in.data;
    pthread_mutex_lock(&target->lock);
    for (uint64_t left = in.pages; r == 0 && left; left &= left - 1) {
        unsigned page = (unsigned)__builtin_ctzll(left);
        bool zero = in.zero >> page & 1;
        r = put_page(target, in.chunk, page, zero ? zeroes : data);
        data += zero ? 0 : PAGE_SIZE_BYTES;
    }
    pthread_mutex_unlock(&target->lock);
    target->arrivals++;
    return r ? error_set(err, r, "the guest's memory cannot be mapped: %s", strerror(-r)) : 0;
}

/* One message, waited for. */
static int take_message(struct post_copy_target *target, struct error *err)
{
    const uint8_t *body;
    unsigned type;
    size_t size;
    stream_set_deadline(target->stream, loop_now_ns() + SILENCE_NS);
    int r = stream_get(target->stream, &type, &body, &size, err);
    if (r == 0 && type == MIGRATE_PAGES)
        r = take_pages(target, body, size, err);
    else if (r == 0 && type == MIGRATE_GO && size == 1 && body[0] <= 1 && !target->gone_over)
        target->paused = body[0];
    else if (r == 0 && type == MIGRATE_FRAME && !target->gone_over)
        r = migrate_take_frame(target->machine, body, size, err);
    else if (r == 0)
        r = migrate_unexpected(type, body, size, err);
    if (r)
        return r;
    pthread_mutex_lock(&target->lock);
    target->heard = true;
    target->gone_over |= type == MIGRATE_GO && target->state != FAILED; /* who waited for it may have given up */
    pthread_cond_broadcast(&target->changed);
    pthread_mutex_unlock(&target->lock);
    return 0;
}

/* ---- what is said ---- */

/* With the lock. */
static int put_requests(struct post_copy_target *target, struct error *err)
{
    int r = 0;
    for (struct waiting *waiting = target->waiting; r == 0 && waiting; waiting = waiting->next) {
        uint8_t body[16];
        if (waiting->asked)
            continue;
        stream_put_number(body, waiting->chunk, 8);
        stream_put_number(body + 8, waiting->pages, 8);
        waiting->asked = true;
        r = stream_put(target->stream, MIGRATE_REQUEST, body, sizeof body, NULL, 0, err);
    }
    return r;
}

/* All there is to say. *complete: also that it was all, and that was sent; whoever is not told of it asks over another connection. */
static int say(struct post_copy_target *target, bool *complete, struct error *err)
{
    int r = 0;
    stream_set_deadline(target->stream, loop_now_ns() + SILENCE_NS);
    pthread_mutex_lock(&target->lock);
    if (target->gone_over && (target->stopping || atomic_load(&target->arrived)))
        target->to_say |= 1u << MIGRATE_COMPLETE;
    bool last = target->to_say >> MIGRATE_COMPLETE & 1;
    for (unsigned type = 1; r == 0 && target->to_say; type++) {
        if (target->to_say >> type & 1)
            r = stream_put(target->stream, type, NULL, 0, NULL, 0, err);
        target->to_say &= ~(1u << type);
    }
    if (r == 0)
        r = put_requests(target, err);
    pthread_mutex_unlock(&target->lock);
    for (; r == 0 && target->arrivals; target->arrivals--)
        r = stream_put(target->stream, MIGRATE_ARRIVED, NULL, 0, NULL, 0, err);
    if (r == 0)
        r = stream_flush(target->stream, err);
    *complete = r == 0 && last;
    return r;
}

/* Which pages are missing, to a source that goes on. */
static int recover(struct post_copy_target *target, struct error *err)
{
    uint64_t words = (target->ram_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES, *missing = calloc(words, sizeof *missing);
    const uint8_t *body;
    size_t size;
    if (!missing)
        return error_set(err, -ENOMEM, "out of memory");
    physmap_pages_elsewhere(target->machine->memory, missing);
    stream_set_deadline(target->stream, loop_now_ns() + SILENCE_NS);
    int r = migrate_expect(target->stream, MIGRATE_RECOVER, &body, &size, err);
    if (r == 0 && (size != sizeof target->id || memcmp(body, target->id, size) != 0))
        r = error_set(err, -EINVAL, "what came is not the memory that the guest waits for");
    if (r == 0)
        r = post_copy_put_remote(target->stream, missing, words, err);
    free(missing);
    return r;
}

/* ---- the page source ---- */

static int take_until_here(struct post_copy_target *target, const struct waiting *waiting, struct error *err)
{
    bool ignored;
    int r = say(target, &ignored, err);
    while (r == 0 && waiting->pages)
        r = take_message(target, err);
    return r;
}

static int fetch(void *ctx, uint64_t offset, void *data, uint64_t bytes, struct error *err)
{
    struct post_copy_target *target = ctx;
    unsigned first = (unsigned)(offset % CHUNK_BYTES / PAGE_SIZE_BYTES), count = (unsigned)(bytes / PAGE_SIZE_BYTES);
    struct waiting waiting = {.chunk = offset / CHUNK_BYTES, .pages = (count < CHUNK_PAGES ? (1ull << count) - 1 : ~0ull) << first, .to = (uint8_t *)data - offset % CHUNK_BYTES};
    struct error why = {0};
    pthread_mutex_lock(&target->lock);
    waiting.next = target->waiting;
    target->waiting = &waiting;
    while (!target->threaded && target->taken && waiting.pages)
        pthread_cond_wait(&target->changed, &target->lock);
    if (!target->threaded && waiting.pages && target->state != FAILED) {
        target->taken = true;
        pthread_mutex_unlock(&target->lock);
        int r = take_until_here(target, &waiting, &why);
        pthread_mutex_lock(&target->lock);
        target->taken = false;
        pthread_cond_broadcast(&target->changed);
        if (r)
            fail(target, &why);
    } else {
        wake(target);
    }
    while (waiting.pages && target->state != FAILED)
        pthread_cond_wait(&target->changed, &target->lock);
    bool came = !waiting.pages;
    if (!came) {
        struct waiting **at = &target->waiting;
        while (*at != &waiting)
            at = &(*at)->next;
        *at = waiting.next;
        *err = target->why;
    }
    pthread_mutex_unlock(&target->lock);
    return came ? 0 : err->code ? err->code : -EIO;
}

static void all_arrived(void *ctx)
{
    struct post_copy_target *target = ctx;
    atomic_store(&target->arrived, true);
    wake(target);
}

/* ---- the thread ---- */

/* Until there is something to get or to say. */
static int rest(struct post_copy_target *target, bool *readable, struct error *err)
{
    struct pollfd poll_fd[2] = {{.fd = target->wake_fd, .events = POLLIN}, {.fd = target->stream ? stream_descriptor(target->stream) : -1, .events = POLLIN}};
    uint64_t count;
    int n;
    *readable = target->stream && stream_has_frame(target->stream);
    if (*readable)
        return 0;
    while ((n = poll(poll_fd, 2, target->stream ? (int)(SILENCE_NS / 1000000) : -1)) < 0 && errno == EINTR)
        continue;
    if (n == 0)
        return error_set(err, -ETIMEDOUT, "the migration's source: it says nothing more");
    if (poll_fd[0].revents && read(target->wake_fd, &count, sizeof count) < 0 && errno != EAGAIN)
        return error_set(err, -errno, "cannot wait: %s", strerror(errno));
    *readable = poll_fd[1].revents != 0;
    return 0;
}

/* The connection does no more. Before GO that is the end of the migration, afterwards it can go on over another. */
static void lose(struct post_copy_target *target, const struct error *why)
{
    pthread_mutex_lock(&target->lock);
    struct stream *stream = target->stream;
    target->stream = NULL;
    target->heard = false;
    if (target->gone_over && target->state != FAILED && !target->ending && !target->stopping) {
        target->state = LOST;
        target->why = *why;
        pthread_cond_broadcast(&target->changed);
    } else {
        fail(target, why);
    }
    bool lost = target->state == LOST, mine = target->gone_over;
    pthread_mutex_unlock(&target->lock);
    if (mine && stream)
        migrate_say_failed(stream, why->text);
    if (mine)
        stream_destroy(stream);
    if (!lost)
        return;
    log_error("%s: %s. Go on with doppel receive --recover here and doppel migrate --recover there",
              atomic_load(&target->arrived) ? "the guest has all of its memory, but the other side of its migration does not know" : "the guest waits for memory that is at the other side of its migration", why->text);
    machine_tell(target->machine, MACHINE_EVENT_MIGRATION_FAILED, why->text);
}

/* A new connection, if there is one. */
static int go_on(struct post_copy_target *target, struct error *err)
{
    pthread_mutex_lock(&target->lock);
    if (!target->stream && target->next_stream) {
        target->stream = target->next_stream;
        target->next_stream = NULL;
        target->state = CONNECTED;
        target->arrivals = 0;
        for (struct waiting *waiting = target->waiting; waiting; waiting = waiting->next)
            waiting->asked = false;
    } else {
        pthread_mutex_unlock(&target->lock);
        return 0;
    }
    pthread_mutex_unlock(&target->lock);
    return recover(target, err);
}

static bool is_over(struct post_copy_target *target)
{
    pthread_mutex_lock(&target->lock);
    bool over = target->state == FAILED || (target->state == LOST && (target->ending || target->stopping));
    if (over && target->state == LOST)
        fail(target, &target->why);
    pthread_mutex_unlock(&target->lock);
    return over;
}

/* What is still on its way is taken until the source has closed the connection: otherwise it might never hear the last word. */
static void say_farewell(struct post_copy_target *target)
{
    struct error ignored = {0};
    const uint8_t *body;
    unsigned type;
    size_t size;
    stream_set_deadline(target->stream, loop_now_ns() + FAREWELL_NS);
    while (stream_get(target->stream, &type, &body, &size, &ignored) == 0)
        continue;
    stream_destroy(target->stream);
    target->stream = NULL;
}

static void *target_main(void *arg)
{
    struct post_copy_target *target = arg;
    bool complete = false, readable;
    pthread_setname_np(pthread_self(), "post-copy");
    if (!machine_enter_sandbox(target->machine, IN_API))
        return NULL;
    while (!complete && !is_over(target)) {
        struct error err = {0};
        int r = go_on(target, &err);
        if (r == 0 && target->stream)
            r = say(target, &complete, &err);
        if (r == 0 && !complete)
            r = rest(target, &readable, &err);
        if (r == 0 && !complete && readable)
            r = take_message(target, &err);
        if (r)
            lose(target, &err);
    }
    if (complete) {
        pthread_mutex_lock(&target->lock);
        target->state = target->state == CONNECTED ? OVER : target->state;
        pthread_cond_broadcast(&target->changed);
        pthread_mutex_unlock(&target->lock);
        say_farewell(target);
    }
    return NULL;
}

/* ---- for the machine ---- */

/* Who waits for a page also waits for its neighbours: for so long that it does not matter. */
static uint64_t group_bytes(uint64_t bytes_a_s)
{
    uint64_t bytes = GROUP_BYTES_MAX;
    while (bytes > PAGE_SIZE_BYTES && bytes > bytes_a_s / 1000 * GROUP_MS)
        bytes /= 2;
    return bytes;
}

int post_copy_target_create(struct machine *machine, struct stream *stream, struct unpacker *unpacker, const uint8_t id[MIGRATE_ID_BYTES], const uint64_t *remote, uint64_t bytes_a_s, struct error *err)
{
    struct post_copy_target *target = calloc(1, sizeof *target);
    if (!target)
        return error_set(err, -ENOMEM, "out of memory");
    *target = (struct post_copy_target){.machine = machine, .unpacker = unpacker, .stream = stream, .ram_bytes = physmap_ram_bytes(machine->memory), .wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    memcpy(target->id, id, sizeof target->id);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&target->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    pthread_mutex_init(&target->lock, NULL);
    machine->post_copy_target = target;
    const struct page_source source = {.fetch = fetch, .close = all_arrived, .ctx = target, .group_bytes = group_bytes(bytes_a_s)};
    int r = target->wake_fd < 0 ? error_set(err, -errno, "cannot make an event: %s", strerror(errno)) : physmap_set_source(machine->memory, &source, remote, err);
    if (r) {
        target->unpacker = NULL; /* the caller's */
        post_copy_target_destroy(machine);
    }
    return r;
}

/* The thread, if there is one, ends; nobody gets a page any more. */
static void end_for_good(struct post_copy_target *target)
{
    wake(target);
    if (target->threaded)
        pthread_join(target->thread, NULL);
    pthread_mutex_lock(&target->lock);
    target->threaded = false;
    fail(target, &(struct error){.code = -ESHUTDOWN, .text = "the virtual machine has ended"});
    pthread_mutex_unlock(&target->lock);
}

int post_copy_target_start(struct machine *machine, bool *paused, struct error *err)
{
    struct post_copy_target *target = machine->post_copy_target;
    uint64_t until_ns = loop_now_ns() + GO_NS;
    const struct timespec until = {.tv_sec = (time_t)(until_ns / 1000000000), .tv_nsec = (long)(until_ns % 1000000000)};
    struct error why = {0};
    pthread_mutex_lock(&target->lock);
    while (target->taken)
        pthread_cond_wait(&target->changed, &target->lock);
    target->to_say |= 1u << MIGRATE_READY;
    int r = pthread_create(&target->thread, NULL, target_main, target);
    target->threaded = r == 0;
    if (r)
        error_set(&why, -r, "cannot start a thread: %s", strerror(r));
    while (r == 0 && target->state != FAILED && !target->gone_over)
        r = pthread_cond_timedwait(&target->changed, &target->lock, &until);
    bool gone_over = target->gone_over;
    if (!gone_over && !why.code && target->state != FAILED)
        error_set(&why, -ETIMEDOUT, "the migration's source: it did not answer in time");
    if (!gone_over && why.code)
        fail(target, &why);
    if (!gone_over && target->stream)
        stream_cut(target->stream);
    *paused = target->paused;
    why = target->why;
    pthread_mutex_unlock(&target->lock);
    if (gone_over)
        return 0;
    end_for_good(target);
    return error_set(err, why.code, "%s", why.text);
}

void post_copy_target_started(struct machine *machine)
{
    struct post_copy_target *target = machine->post_copy_target;
    pthread_mutex_lock(&target->lock);
    target->to_say |= 1u << MIGRATE_STARTED;
    pthread_mutex_unlock(&target->lock);
    wake(target);
}

bool post_copy_target_waits(struct machine *machine)
{
    struct post_copy_target *target = machine->post_copy_target;
    if (!target)
        return false;
    pthread_mutex_lock(&target->lock);
    bool waits = target->state == LOST && !target->next_stream;
    pthread_mutex_unlock(&target->lock);
    return waits;
}

int post_copy_target_rejoin(struct machine *machine, struct stream *stream, struct error *err)
{
    struct post_copy_target *target = machine->post_copy_target;
    int r = 0;
    stream_set_peer(stream, "the migration's source");
    pthread_mutex_lock(&target->lock);
    if (target->state != LOST || target->next_stream) {
        r = error_set(err, -EINVAL, "the guest does not wait for another connection");
        stream_destroy(stream);
    } else {
        target->next_stream = stream;
        wake(target);
        while (target->next_stream && target->state == LOST)
            pthread_cond_wait(&target->changed, &target->lock);
        while (!target->heard && target->state == CONNECTED)
            pthread_cond_wait(&target->changed, &target->lock);
        if (!target->heard && target->state != OVER)
            *err = target->why, r = err->code;
    }
    pthread_mutex_unlock(&target->lock);
    return r;
}

void post_copy_target_end(struct machine *machine)
{
    struct post_copy_target *target = machine->post_copy_target;
    if (!target)
        return;
    atomic_store(&target->ending, true);
    wake(target);
}

void post_copy_target_stop(struct machine *machine)
{
    struct post_copy_target *target = machine->post_copy_target;
    if (!target)
        return;
    pthread_mutex_lock(&target->lock);
    target->stopping = true;
    pthread_mutex_unlock(&target->lock);
    end_for_good(target);
}

void post_copy_target_destroy(struct machine *machine)
{
    struct post_copy_target *target = machine->post_copy_target;
    if (!target)
        return;
    machine->post_copy_target = NULL;
    if (target->gone_over)
        stream_destroy(target->stream);
    stream_destroy(target->next_stream);
    unpacker_destroy(target->unpacker);
    if (target->wake_fd >= 0)
        close(target->wake_fd);
    pthread_cond_destroy(&target->changed);
    pthread_mutex_destroy(&target->lock);
    free(target);
}
