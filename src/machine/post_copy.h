/*
 * Migration by post-copy: the guest goes on at the target before all of its memory is there, and the pages that are missing follow: those that it wants first, the others in between
 * (migrate_priv.h has the messages). Until the target has everything, the guest needs both sides. When the connection is lost, its processors wait where they want a page that is
 * missing, the source keeps what it has, and both go on over another connection.
 */
#ifndef DOPPEL_MACHINE_POST_COPY_H
#define DOPPEL_MACHINE_POST_COPY_H

#include "machine/migrate_pack.h"
#include "machine/migrate_priv.h"

/* Pages that are missing, as REMOTE messages, the last of them without any; and back. `pages`: a word has a chunk's. */
int post_copy_put_remote(struct stream *stream, const uint64_t *pages, uint64_t words, struct error *err) __attribute__((warn_unused_result));
/* Foreign bytes. *last: it was the last. */
int post_copy_take_remote(uint64_t *pages, uint64_t words, const uint8_t *body, size_t size_bytes, bool *last, struct error *err) __attribute__((warn_unused_result));

/*
 * The source: machine->post_copy_source from when the guest stands still for good until the target has all. One thread at a time, the loop's at first. Stream and packer stay the caller's, and are those
 * of post_copy_source_connect.
 */
struct post_copy_source;
/* `left` is copied. */
int post_copy_source_create(struct machine *machine, const uint64_t *left, struct error *err) __attribute__((warn_unused_result));
void post_copy_source_destroy(struct machine *machine);
uint64_t post_copy_source_pages(const struct post_copy_source *source); /* that were not sent */
/* What is known of the way to the target; 0: not known. */
struct post_copy_way {
    double bytes_a_s;
    uint64_t ns; /* there and back */
};
void post_copy_source_connect(struct post_copy_source *source, struct stream *stream, struct packer *packer, struct post_copy_way way);
/* Before it is announced: what the target needs to load the state. */
int post_copy_source_send_ahead(struct post_copy_source *source, const struct state_need *needs, unsigned need_count, struct error *err) __attribute__((warn_unused_result));
int post_copy_source_announce(struct post_copy_source *source, struct error *err) __attribute__((warn_unused_result));
/* As many pages as the way holds, unasked; and again whenever some have arrived: */
int post_copy_source_fill(struct post_copy_source *source, struct error *err) __attribute__((warn_unused_result));
/* The next message must be this one; what is asked for before it is answered. */
int post_copy_source_expect(struct post_copy_source *source, unsigned type, struct error *err) __attribute__((warn_unused_result));
/* The other side wants to go on after a connection was lost. */
int post_copy_source_rejoin(struct post_copy_source *source, struct error *err) __attribute__((warn_unused_result));
/* All pages, until the target needs no more: 0. `rest` says for how long (ns) what nobody asked for has to wait; `sent` is called after each. -ESRCH: this machine has ended. */
struct post_copy_pace {
    uint64_t (*rest_ns)(void *ctx);
    void (*sent)(void *ctx);
    void *ctx;
};
int post_copy_source_serve(struct post_copy_source *source, const struct post_copy_pace *pace, struct error *err) __attribute__((warn_unused_result));

/*
 * The target: machine->post_copy_target. Memory's page source is asked by any thread; the connection has a thread of its own from post_copy_target_start on, and before that is used by one at a time of
 * those that ask (devices take what comes from outside already).
 */
struct post_copy_target;
/* bytes_a_s: how fast they come. Takes the unpacker over, if it succeeds; the stream stays the caller's until post_copy_target_start has succeeded. */
int post_copy_target_create(struct machine *machine, struct stream *stream, struct unpacker *unpacker, const uint8_t id[MIGRATE_ID_BYTES], const uint64_t *remote, uint64_t bytes_a_s, struct error *err) __attribute__((warn_unused_result));
/* Says READY, and waits for GO. *paused: the guest is to stay so. */
int post_copy_target_start(struct machine *machine, bool *paused, struct error *err) __attribute__((warn_unused_result));
void post_copy_target_started(struct machine *machine);
/* Whether it waits for another connection; over that, which is taken over. Until the first page has come over it, or it has failed. */
bool post_copy_target_waits(struct machine *machine);
int post_copy_target_rejoin(struct machine *machine, struct stream *stream, struct error *err) __attribute__((warn_unused_result));
/* The machine ends: who waits for a page gets it now or never. Any thread. */
void post_copy_target_end(struct machine *machine);
/* When nothing runs any more; the source is told. Then, when memory is gone, the rest. */
void post_copy_target_stop(struct machine *machine);
void post_copy_target_destroy(struct machine *machine);

#endif
