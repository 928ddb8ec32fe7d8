/*
 * Moving a running machine to another process or host, inside: what the frames of the stream (state/stream.h) say; docs/formats.md and docs/migration.md have it for people.
 *
 *     source                                   target
 *     HELLO  configuration, processor     ->   makes such a machine, or says why it cannot (FAILED)
 *                                         <-   WELCOME
 *     DISK, PAGES, in rounds; it runs     ->
 *     ECHO, behind each round             ->
 *                                         <-   ECHO: all before it is there
 *     the guest stands still
 *     PAGES, STATE                        ->   loads it
 *                                         <-   READY: nothing is left that could fail
 *     FRAME, for each that waits          ->   gives it to the network card
 *     GO: the source never runs it again  ->   runs it
 *                                         <-   STARTED
 *
 * By post-copy (post_copy.h) the guest goes before all of its memory has:
 *
 *     POST_COPY, REMOTE: what is missing  ->
 *     STATE                               ->   loads it, and may want pages already
 *                                         <-   REQUEST, any time from here on
 *     PAGES, wanted or not                ->
 *                                         <-   ARRIVED, for each
 *     READY, FRAME, GO, STARTED as above; then more of the same until
 *                                         <-   COMPLETE
 *     and over another connection, when one was lost:
 *     RECOVER                             ->
 *                                         <-   REMOTE
 *
 * Before GO the source may go on at any time, and the target must not run the guest. After GO it is the other way round. Who sends GO and hears nothing more cannot know whether it
 * arrived: the source then keeps the guest paused, until somebody who has looked at the target decides.
 */
#ifndef DOPPEL_MACHINE_MIGRATE_PRIV_H
#define DOPPEL_MACHINE_MIGRATE_PRIV_H

#include "machine/machine_priv.h"
#include "state/stream.h"

enum migrate_message {
    MIGRATE_HELLO = 1,
    MIGRATE_WELCOME,
    MIGRATE_PAGES,
    MIGRATE_STATE,
    MIGRATE_READY,
    MIGRATE_GO,
    MIGRATE_STARTED,
    MIGRATE_FAILED,
    MIGRATE_POST_COPY,
    MIGRATE_REMOTE,
    MIGRATE_REQUEST,
    MIGRATE_ARRIVED,
    MIGRATE_COMPLETE,
    MIGRATE_RECOVER,
    MIGRATE_DISK,
    MIGRATE_FRAME,
    MIGRATE_ECHO,
};

/*
 * WELCOME: the program's version, text; from targets that take more than the first version knew, a 0 and u8 MIGRATE_TAKES_* behind it.
 * PAGES: migrate_pack.h.
 * STATE: u8 1: more comes, 0: the last piece; then a piece of the state. GO: u8 1: the guest is to stay paused. FAILED: the reason, text.
 * POST_COPY, RECOVER: MIGRATE_ID_BYTES by which both sides know the migration. REMOTE: u64 first chunk, then a u64 of pages for it and for those that follow it; 0 to 65536 of them.
 * REQUEST: u64 chunk, u64 pages.
 * FRAME: u32 card; then a frame of the network, with its virtio header, that waited for the guest.
 * DISK, before STATE: u32 disk, u64 offset, u32 bytes, u8 how the bytes follow: MIGRATE_DISK_*.
 */
enum { MIGRATE_TAKES_FRAME = 1, MIGRATE_TAKES_ECHO = 2 };
enum { MIGRATE_DISK_PLAIN, MIGRATE_DISK_ZERO, MIGRATE_DISK_ZSTD };
#define MIGRATE_ID_BYTES 16u
#define MIGRATE_STATE_BYTES_MAX (64u << 20)
#define MIGRATE_REASON_BYTES 400u

struct migrate_hello {
    char *version; /* of the program */
    uint64_t ram_bytes;
    char *about;
    bool post_copy; /* may follow */
    uint32_t disk_count;
    struct migrate_hello_disk {
        uint32_t index; /* in the configuration */
        uint64_t bytes;
    } disk[CONFIG_DISKS_MAX]; /* that come with it */
};

/* The first section of HELLO; "config" and "cpuid" follow. */
int migrate_hello_state(struct migrate_hello *hello, struct state_io *io);

/* So that the other side can say why this one ends. Whether it arrives or not. */
void migrate_say_failed(struct stream *stream, const char *reason);
/* The next message must be this one; the other side's reason when it is FAILED. */
int migrate_expect(struct stream *stream, unsigned type, const uint8_t **body, size_t *size_bytes, struct error *err);
/* The error for a message that is not the one expected. */
int migrate_unexpected(unsigned type, const uint8_t *body, size_t size_bytes, struct error *err);
/* The source, on the loop's thread: what waits for the guest, from about `bytes_max` on no more. The target: foreign bytes; any thread. */
int migrate_send_frames(struct machine *machine, struct stream *stream, uint64_t bytes_max, struct error *err) __attribute__((warn_unused_result));
int migrate_take_frame(struct machine *machine, const uint8_t *body, size_t size_bytes, struct error *err) __attribute__((warn_unused_result));

/* For who sends for long without looking at the guest. */
bool migrate_has_ended(struct machine *machine);

#endif
