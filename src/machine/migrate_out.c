/*
 * The source of a migration (machine.h, migrate_priv.h). Pages go while the guest runs, in the rounds of snapshot_live.c; the last ones, the state and the handover on the loop's thread
 * while everything stands still. Whatever fails before GO was sent leaves the guest running here.
 * Invariants: once GO may have been sent (phase HANDED_OVER) this process runs the guest no more by itself, and no callback of its devices runs (loop_hold).
 * Threading: the caller's thread, and the loop's in the last round; `phase` is whoever's changes it first.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>

#include "machine/migrate_pack.h"
#include "machine/migrate_disks.h"
#include "machine/post_copy.h"
#include "util/log.h"

#define ANSWER_NS 30000000000ull   /* for all that is asked while the guest runs: making a machine takes a while */
#define HANDOVER_NS 10000000000ull /* the guest stands still meanwhile */
#define ECHO_NS 120000000000ull    /* for what waits on a slow way */
#define TAKE_BACK_NS 5000000000ull
#define WAIT_NS_MAX 200000000ull   /* then it is seen whether it was cancelled */
#define PACK_THREADS 2u
#define FRAMES_BYTES_MIN (64ull << 10)
#define FRAMES_BYTES_MAX (2ull << 20)
#define FRAMES_PER_S 100u /* what is sent of them takes no more than a hundredth of a second */
#define RATE_FIRST (256ull << 20)  /* bytes a second, as long as none was measured */
#define MEASURED_BYTES_MIN (1ull << 20)
#define FEW_PAGES_MIN 64u
#define ROUNDS_MAX 40u
#define SLOW_ROUNDS 2u     /* in a row, before the guest is held up (more) */
#define THROTTLE_FIRST 40u /* per cent */
#define FEW_DISK_BYTES (4ull << 20) /* then it is memory's turn */
#define DISK_PASSES_MAX 30u

enum { MOVING, CANCELLED, HANDED_OVER };

struct source {
    struct machine *machine;
    struct machine_migration *migration;
    struct stream *stream;
    struct machine_snapshot rounds;
    uint64_t began_ns, sending_ns; /* since when pages go, or follow */
    uint64_t still_ns;             /* when the guest stood still for good */
    uint64_t count_before;
    unsigned slow; /* rounds that were not much shorter than the one before */
    uint64_t left, followed_bytes; /* by post-copy: pages; what was sent before */
    struct disks_out *disks;       /* NULL: they stay */
    uint64_t paused_ns;            /* when the guest was paused for the last of its disks; 0: it was not */
    bool pause_next;
    unsigned takes;                /* MIGRATE_TAKES_* */
    uint64_t way_ns;               /* there and back, when nothing else is on its way; 0: not known */
    double rate;                   /* bytes a second, as measured */
    uint64_t round_ns, round_bytes; /* when this round began, and what had been sent */
    struct packer *packer;
    struct migrate_hello hello;
};

/* ---- pages ---- */

/* When the next bytes may go: what the stream has taken takes a while to send at the speed that is wanted. */
static uint64_t due(const struct source *source)
{
    uint64_t rate = source->migration->bandwidth_bytes, bytes = stream_bytes_sent(source->stream) - source->followed_bytes;
    return rate ? source->sending_ns + (uint64_t)((double)bytes * 1e9 / (double)rate) : 0;
}

static void keep_to_bandwidth(const struct source *source)
{
    while (!source->still_ns && !source->paused_ns && atomic_load(&source->migration->phase) == MOVING) {
        uint64_t due_ns = due(source), now = loop_now_ns();
        if (due_ns < now + 1000000)
            return;
        poll(NULL, 0, due_ns - now < WAIT_NS_MAX ? (int)((due_ns - now) / 1000000) : (int)(WAIT_NS_MAX / 1000000));
    }
}

static int put_pages(void *ctx, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err)
{
    struct source *source = ctx;
    keep_to_bandwidth(source);
    stream_set_deadline(source->stream, source->still_ns ? source->still_ns + HANDOVER_NS : loop_now_ns() + ANSWER_NS);
    return packer_put(source->packer, chunk, pages, data, err);
}

/* A guest that writes as fast as its pages go is held up, more and more, until rounds become shorter. */
static void slow_down(struct source *source, uint64_t count)
{
    unsigned throttle = atomic_load(&source->migration->throttle);
    source->slow = count > source->count_before / 4 * 3 ? source->slow + 1 : 0;
    source->count_before = count;
    if (source->slow < SLOW_ROUNDS || throttle == THROTTLE_MAX || source->migration->post_copy)
        return;
    throttle = throttle ? throttle + (THROTTLE_MAX - throttle + 1) / 2 : THROTTLE_FIRST;
    atomic_store(&source->migration->throttle, throttle);
    machine_throttle(source->machine, throttle);
    source->slow = 0;
}

/* ---- disks ---- */

static int piece_sent(void *ctx, struct error *err)
{
    struct source *source = ctx;
    keep_to_bandwidth(source);
    stream_set_deadline(source->stream, loop_now_ns() + ANSWER_NS);
    atomic_store(&source->migration->bytes_sent, stream_bytes_sent(source->stream));
    pthread_mutex_lock(&source->machine->device_lock);
    atomic_store(&source->migration->disk_bytes_left, disks_out_left(source->disks));
    pthread_mutex_unlock(&source->machine->device_lock);
    if (migrate_has_ended(source->machine))
        return error_set(err, -ESRCH, "the virtual machine has ended");
    return atomic_load(&source->migration->phase) == MOVING ? 0 : error_set(err, -ECANCELED, "the migration was cancelled");
}

static int send_disks(struct source *source, struct error *err)
{
    const struct disks_pass pass = {.stream = source->stream, .zstd_level = source->migration->zstd_level, .sent = piece_sent, .ctx = source};
    stream_set_deadline(source->stream, loop_now_ns() + ANSWER_NS);
    return disks_out_send(source->disks, &pass, err);
}

/* All of them, and what is written meanwhile, until that is little or does not become less; while the guest runs. */
static int send_disks_first(struct source *source, struct error *err)
{
    uint64_t before = UINT64_MAX, left = UINT64_MAX - 1;
    int r = 0;
    for (unsigned n = 0; r == 0 && n < DISK_PASSES_MAX && left > FEW_DISK_BYTES && left < before / 4 * 3; n++) {
        before = left;
        r = send_disks(source, err);
        left = atomic_load(&source->migration->disk_bytes_left);
    }
    return r;
}

/* Until the target has said that this came. */
static int echo(struct source *source, struct error *err)
{
    const uint8_t *body;
    size_t size;
    stream_set_deadline(source->stream, loop_now_ns() + ECHO_NS);
    int r = stream_put(source->stream, MIGRATE_ECHO, NULL, 0, NULL, 0, err);
    if (r == 0)
        r = stream_flush(source->stream, err);
    return r ? r : migrate_expect(source->stream, MIGRATE_ECHO, &body, &size, err);
}

static uint64_t bytes_sent(const struct source *source)
{
    return source->migration->zstd_level ? source->rounds.pages * PAGE_SIZE_BYTES : stream_bytes_sent(source->stream);
}

/* How fast it goes, by the last round that sent enough to tell. */
static void measure(struct source *source, uint64_t now)
{
    uint64_t bytes = bytes_sent(source) - source->round_bytes, took_ns = now - source->round_ns;
    if (took_ns > 1000000 && bytes > MEASURED_BYTES_MIN)
        source->rate = (double)bytes * 1e9 / (double)took_ns;
    source->round_bytes = bytes_sent(source);
    source->round_ns = now;
}

/*
 * What was sent waits in this host and in the network for as long as a second, and nothing overtakes it: it is to be there before the guest stands still. The second answer, with nothing else on its way, tells how long that is.
 */
static int wait_until_there(struct source *source, struct error *err)
{
    bool echoes = source->takes & MIGRATE_TAKES_ECHO && !machine_is_paused(source->machine);
    int r = packer_flush(source->packer, err);
    if (r == 0 && echoes)
        r = echo(source, err);
    uint64_t there_ns = loop_now_ns();
    measure(source, there_ns);
    if (r || !echoes || !source->migration->post_copy)
        return r;
    r = echo(source, err);
    source->round_ns = loop_now_ns();
    source->way_ns = source->round_ns - there_ns;
    return r;
}

/* Between rounds. The last of them goes with the guest paused and its requests done: they are read by the loop, which cannot wait for itself. */
static int between(void *ctx, struct error *err)
{
    struct source *source = ctx;
    if (source->disks && source->pause_next && !machine_is_paused(source->machine)) { /* again, if somebody has let it go on */
        source->paused_ns = source->paused_ns ? source->paused_ns : loop_now_ns();
        int r = machine_pause(source->machine, err);
        if (r)
            return r;
    }
    int r = source->disks ? send_disks(source, err) : 0;
    return r ? r : wait_until_there(source, err);
}

/* That go in half of the time that the guest may stand still; the rest is for the state. */
static uint64_t few_pages(const struct source *source)
{
    return (uint64_t)(source->rate * (double)source->migration->downtime_ns / 2e9) / PAGE_SIZE_BYTES;
}

/*
 * As many as go in half of the time that the guest may stand still; the rest is for the state. Of disks nothing may be left then: first comes another round, with the guest paused when little is left.
 */
static enum snapshot_step what_now(void *ctx, uint64_t count, uint64_t still_since_ns, bool must)
{
    struct source *source = ctx;
    uint64_t few = few_pages(source), disks = source->disks ? disks_out_left(source->disks) : 0;
    bool fits = count + disks / PAGE_SIZE_BYTES <= (few > FEW_PAGES_MIN ? few : FEW_PAGES_MIN);
    if (!fits && !source->paused_ns)
        slow_down(source, count + disks / PAGE_SIZE_BYTES);
    bool leave = !fits && source->migration->post_copy && (must || source->paused_ns || source->slow >= SLOW_ROUNDS);
    bool over = fits || must || leave || source->paused_ns;
    source->pause_next = source->pause_next || over;
    if (!over || disks)
        return SNAPSHOT_ANOTHER_ROUND;
    source->still_ns = still_since_ns;
    return leave ? SNAPSHOT_LEAVE_REST : SNAPSHOT_LAST_ROUND;
}

/* ---- the handover ---- */

static int send_state(struct source *source, struct state_io *state, struct error *err)
{
    size_t size, done = 0;
    const uint8_t *data = state_writer_data(state, &size);
    int r = 0;
    do {
        size_t piece = size - done < STREAM_BODY_BYTES_MAX - 1 ? size - done : STREAM_BODY_BYTES_MAX - 1;
        const uint8_t more = done + piece < size;
        r = stream_put(source->stream, MIGRATE_STATE, &more, 1, data + done, piece, err);
        done += piece;
    } while (r == 0 && done < size);
    return r ? r : stream_flush(source->stream, err);
}

/* The guest is the target's, or nobody knows. Either way no device of this machine does anything more by itself. It ends, unless the target needs its memory or somebody has to look. */
static void stay_still(struct source *source, bool certain)
{
    struct machine *machine = source->machine;
    loop_hold(machine->loop, true);
    if (certain && !machine->post_copy_source) {
        machine_stop(machine, MACHINE_MIGRATED);
        return;
    }
    pthread_mutex_lock(&machine->run_lock);
    machine->paused = machine->given_away = true;
    machine->gone = certain;
    pthread_mutex_unlock(&machine->run_lock);
    machine_tell(machine, MACHINE_EVENT_PAUSED, certain ? "post-copy" : "migration");
}

/* The other side must have let the disks go to be believed that it failed; it does so when the connection ends. Until then, and if somebody else has them now, the guest stays paused. */
static int stay_here(struct source *source, int result, const struct error *cause)
{
    struct error why = {0};
    uint64_t give_up_ns = loop_now_ns() + TAKE_BACK_NS;
    int r;
    migrate_say_failed(source->stream, cause->text);
    stream_cut(source->stream);
    while ((r = machine_give_disks(source->machine, false, &why)) && loop_now_ns() < give_up_ns)
        poll(NULL, 0, 10);
    if (r == 0)
        return result;
    log_error("the guest is paused, because after the migration failed it does not get its disks back: %s", why.text);
    stay_still(source, false);
    return result;
}

static int expect(struct source *source, unsigned type, struct error *err)
{
    const uint8_t *body;
    size_t size;
    if (source->machine->post_copy_source)
        return post_copy_source_expect(source->machine->post_copy_source, type, err);
    return migrate_expect(source->stream, type, &body, &size, err);
}

static int send_frames(const struct source *source, struct error *err)
{
    uint64_t most = (uint64_t)source->rate / FRAMES_PER_S;
    most = most < FRAMES_BYTES_MIN ? FRAMES_BYTES_MIN : most > FRAMES_BYTES_MAX ? FRAMES_BYTES_MAX : most;
    return source->takes & MIGRATE_TAKES_FRAME ? migrate_send_frames(source->machine, source->stream, most, err) : 0;
}

static int leave_pages(struct source *source, const struct state_io *state, const uint64_t *left, struct error *err)
{
    unsigned need_count;
    const struct state_need *needs = state_needed(state, &need_count);
    int r = post_copy_source_create(source->machine, left, err);
    if (r)
        return r;
    struct post_copy_source *pages = source->machine->post_copy_source;
    post_copy_source_connect(pages, source->stream, source->packer, (struct post_copy_way){.bytes_a_s = source->rate, .ns = source->way_ns});
    r = post_copy_source_send_ahead(pages, needs, need_count, err);
    return r ? r : post_copy_source_announce(pages, err);
}

/* On the loop's thread; everything stands still. */
static int hand_over(void *ctx, struct state_io *state, const uint64_t *left, struct error *err)
{
    struct source *source = ctx;
    struct machine_migration *migration = source->migration;
    int expected = MOVING;
    stream_set_deadline(source->stream, source->still_ns + HANDOVER_NS);
    int r = packer_flush(source->packer, err);
    if (r == 0 && left)
        r = leave_pages(source, state, left, err);
    if (r == 0)
        r = machine_give_disks(source->machine, true, err);
    if (r == 0)
        r = send_state(source, state, err);
    if (r == 0 && left)
        r = post_copy_source_fill(source->machine->post_copy_source, err);
    if (r == 0)
        r = expect(source, MIGRATE_READY, err);
    if (r == 0)
        r = send_frames(source, err);
    if (r == 0 && !atomic_compare_exchange_strong(&migration->phase, &expected, HANDED_OVER))
        r = error_set(err, -ECANCELED, "the migration was cancelled");
    if (r) {
        post_copy_source_destroy(source->machine);
        return stay_here(source, r, err);
    }
    const uint8_t paused = machine_is_paused(source->machine) && !source->paused_ns;
    r = stream_put(source->stream, MIGRATE_GO, &paused, 1, NULL, 0, err);
    if (r == 0)
        r = stream_flush(source->stream, err);
    if (r == 0)
        r = expect(source, MIGRATE_STARTED, err);
    migration->downtime_ns = loop_now_ns() - (source->paused_ns ? source->paused_ns : source->still_ns);
    migration->unknown = r != 0;
    stay_still(source, r == 0);
    return r ? error_prefix(err, "the guest was handed over, but the other side did not say that it runs; it is paused here. Look there: if it does not run, doppel resume lets it go on here, else doppel kill ends it") : 0;
}

/* ---- memory that follows ---- */

static void tell_left(void *ctx)
{
    struct source *source = ctx;
    uint64_t left = post_copy_source_pages(source->machine->post_copy_source);
    atomic_store(&source->migration->pages_sent, source->rounds.pages + source->left - left);
    atomic_store(&source->migration->pages_left, left);
    atomic_store(&source->migration->bytes_sent, stream_bytes_sent(source->stream));
}

static uint64_t rest_ns(void *ctx)
{
    const struct source *source = ctx;
    uint64_t now = loop_now_ns(), due_ns = due(source);
    return due_ns > now ? due_ns - now : 0;
}

/* The guest runs there; it ends here when all of its memory is there, too. */
static int follow(struct source *source, struct error *err)
{
    struct machine *machine = source->machine;
    const struct post_copy_pace pace = {.rest_ns = rest_ns, .sent = tell_left, .ctx = source};
    source->left = post_copy_source_pages(machine->post_copy_source);
    source->sending_ns = loop_now_ns();
    source->followed_bytes = stream_bytes_sent(source->stream);
    atomic_store(&source->migration->following, true);
    tell_left(source);
    int r = post_copy_source_serve(machine->post_copy_source, &pace, err);
    if (r)
        return error_prefix(err, "the guest runs at the other side, and waits for memory that is here: go on with doppel receive --recover there and doppel migrate --recover here");
    machine_stop(machine, MACHINE_MIGRATED);
    return 0;
}

static int go_on(struct source *source, struct error *err)
{
    struct machine *machine = source->machine;
    if (!machine->post_copy_source)
        return error_set(err, -EINVAL, "there is no migration of it to go on with");
    post_copy_source_connect(machine->post_copy_source, source->stream, source->packer, (struct post_copy_way){0});
    int r = post_copy_source_rejoin(machine->post_copy_source, err);
    if (r)
        return r;
    pthread_mutex_lock(&machine->run_lock);
    machine->gone = true;
    pthread_mutex_unlock(&machine->run_lock);
    return follow(source, err);
}

/* ---- all of it ---- */

static int send_hello(struct source *source, struct error *err)
{
    struct machine *machine = source->machine;
    struct migrate_hello *hello = &source->hello;
    struct state_io *io = state_writer_create();
    size_t size = 0;
    if (!io)
        return error_set(err, -ENOMEM, "out of memory");
    pthread_mutex_lock(&machine->device_lock);
    struct machine_config config = *machine->config;
    int r = migrate_hello_state(hello, io);
    if (r == 0)
        r = machine_config_state(&config, io);
    if (r == 0)
        r = cpuid_state(machine->cpuid, io);
    pthread_mutex_unlock(&machine->device_lock);
    if (r)
        error_set(err, r, "cannot describe the machine: %s", state_error(io));
    const void *data = state_writer_data(io, &size);
    if (r == 0)
        r = stream_put(source->stream, MIGRATE_HELLO, data, size, NULL, 0, err);
    state_io_destroy(io);
    return r ? r : stream_flush(source->stream, err);
}

/* Who refuses says why, and closes the connection: the first thing that is noticed may be that nothing can be sent any more. */
static int find_reason(struct source *source, int result, struct error *err)
{
    struct error reason = {0};
    const uint8_t *body;
    unsigned type;
    size_t size;
    stream_set_deadline(source->stream, loop_now_ns() + 1000000000ull);
    while (stream_get(source->stream, &type, &body, &size, &reason) == 0)
        if (type == MIGRATE_FAILED)
            return migrate_unexpected(type, body, size, err);
    return result;
}

static void tell_progress(void *ctx, uint64_t pages, uint64_t pages_expected)
{
    struct source *source = ctx;
    atomic_store(&source->migration->pages_sent, pages);
    atomic_store(&source->migration->pages_left, pages_expected - pages);
    atomic_store(&source->migration->bytes_sent, stream_bytes_sent(source->stream));
}

static int move(struct source *source, struct error *err)
{
    const struct snapshot_sink sink = {.put = put_pages, .what_now = what_now, .finish = hand_over, .between = between, .ctx = source, .rounds_max = ROUNDS_MAX};
    const uint8_t *body;
    size_t size;
    if (source->machine->post_copy_source)
        return error_set(err, -EINVAL, "the guest has gone already, and its memory is to follow: doppel migrate --recover goes on with that");
    source->rounds = (struct machine_snapshot){.without_disks = true, .progress = tell_progress, .ctx = source};
    stream_set_deadline(source->stream, loop_now_ns() + ANSWER_NS);
    int r = source->migration->disks ? disks_out_create(&source->disks, source->machine, &source->hello, err) : 0;
    if (r == 0)
        r = send_hello(source, err);
    if (r == 0)
        r = migrate_expect(source->stream, MIGRATE_WELCOME, &body, &size, err);
    source->takes = r == 0 && size > 2 && body[size - 2] == 0 ? body[size - 1] : 0;
    source->sending_ns = source->round_ns = loop_now_ns();
    source->rate = RATE_FIRST;
    if (r == 0 && source->disks)
        r = send_disks_first(source, err);
    if (r == 0)
        r = snapshot_to_sink(source->machine, &source->rounds, &sink, err);
    return r == 0 && source->machine->post_copy_source ? follow(source, err) : r;
}

int machine_migration_open(struct machine_migration *migration, int fd)
{
    migration->stream = stream_create(fd, "the migration's target");
    return migration->stream ? 0 : -ENOMEM;
}

void machine_migration_close(struct machine_migration *migration)
{
    stream_destroy(migration->stream);
    migration->stream = NULL;
}

int machine_migrate(struct machine *machine, struct machine_migration *migration, struct error *err)
{
    struct error own = {0};
    if (migration->recover && post_copy_target_waits(machine)) {
        struct stream *stream = migration->stream;
        migration->stream = NULL;
        return post_copy_target_rejoin(machine, stream, err);
    }
    struct source *source = calloc(1, sizeof *source);
    if (!source)
        return error_set(err, -ENOMEM, "out of memory");
    *source = (struct source){.machine = machine, .migration = migration, .stream = migration->stream, .began_ns = loop_now_ns()};
    source->hello = (struct migrate_hello){.version = (char *)DOPPEL_VERSION, .ram_bytes = physmap_ram_bytes(machine->memory), .about = (char *)migration->about, .post_copy = migration->post_copy};
    machine_tell(machine, MACHINE_EVENT_MIGRATING, NULL);
    source->packer = packer_create(source->stream, migration->zstd_level, PACK_THREADS);
    int r = !source->packer ? error_set(&own, -ENOMEM, "out of memory") : migration->recover ? go_on(source, &own) : move(source, &own);
    if (r == -EPIPE && !migration->unknown)
        r = find_reason(source, r, &own);
    if (r && atomic_load(&migration->phase) == CANCELLED)
        r = error_set(&own, -ECANCELED, "the migration was cancelled");
    if (r && !migration->unknown)
        migrate_say_failed(source->stream, own.text);
    if (r) {
        machine_tell(machine, MACHINE_EVENT_MIGRATION_FAILED, own.text);
        log_warning("migration: %s", own.text);
        error_set(err, r, "%s", own.text);
    }
    disks_out_destroy(source->disks);
    if (r && source->paused_ns && !migration->unknown && !machine->gone)
        (void)!machine_resume(machine, NULL);
    machine_throttle(machine, 0);
    migration->duration_ns = loop_now_ns() - source->began_ns;
    migration->rounds = source->rounds.rounds;
    atomic_store(&migration->pages_sent, source->rounds.pages);
    atomic_store(&migration->bytes_sent, stream_bytes_sent(source->stream));
    packer_destroy(source->packer);
    free(source);
    return r;
}

int machine_migration_cancel(struct machine_migration *migration)
{
    int expected = MOVING;
    if (!atomic_compare_exchange_strong(&migration->phase, &expected, CANCELLED))
        return expected == CANCELLED ? 0 : -EALREADY;
    stream_cut(migration->stream);
    return 0;
}
