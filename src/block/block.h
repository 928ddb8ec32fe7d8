/*
 * Block back ends: what a disk's bytes are stored in. Formats and filters stack behind this one interface.
 *
 * Requests are asynchronous: block_submit returns at once, `done` runs later on the loop's thread with the device lock held, exactly once. Requests may complete in any order; a flush
 * covers every write that had completed when it was submitted. A completed flush means the data is on the host's disk (fdatasync).
 * The vectors and the memory they point at stay valid until done. Offsets and lengths are bytes, multiples of 512, checked against the size here too.
 */
#ifndef DOPPEL_BLOCK_BLOCK_H
#define DOPPEL_BLOCK_BLOCK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "util/error.h"
#include "util/loop.h"

struct block;

enum block_op { BLOCK_READ, BLOCK_WRITE, BLOCK_FLUSH, BLOCK_DISCARD, BLOCK_WRITE_ZEROES };

struct block_request {
    enum block_op op;
    bool may_unmap; /* write-zeroes: the range may be deallocated */
    uint64_t offset_bytes, length_bytes;
    struct iovec *iov; /* read and write */
    unsigned iov_count;
    void (*done)(struct block_request *request, int result); /* 0 or -errno (-ENOSPC, -EIO, ...) */
    void *user; /* the submitter's */
    /* Private to the back end that has the request. */
    void *backend_private[4];
};

/* Which files an image may name as its backing file. What an image says is its author's choice, and he may have had the host's secrets in mind. */
enum block_backing {
    BLOCK_BACKING_NEAR, /* files in the image's directory or below it */
    BLOCK_BACKING_ANY,
    BLOCK_BACKING_NONE,
};

struct block_config {
    const char *path;
    const char *format; /* "raw", "qcow2" or "auto" (by content; names no backing file then unless `backing` is BLOCK_BACKING_ANY); NULL: by the path's end, else raw */
    bool readonly;
    const char *io; /* "auto" (or NULL), "uring", "threads" */
    enum block_backing backing;
    bool later; /* another machine has it yet, perhaps on another host: it is opened for reading only, and must be locked by that machine. block_take_over comes before any request */
    bool beside; /* with `later`: it is on the file system of a file that was looked at, which both machines see, so it is the right one. Merging replaces files that are in use (control/snapshot_disks.h) */
};

/* Opens and locks (F_OFD_SETLK: one writer or many readers) the image. `err` names the path and the remedy: missing, a directory, in use by another VM, not a multiple of 512, no permission. */
int block_open(struct block **block, const struct block_config *config, struct loop *loop, struct error *err) __attribute__((warn_unused_result));
void block_close(struct block *block); /* nothing may be in flight */
/*
 * From one machine to the other; nothing is in flight. Here: what was written is on the host's disk, the lock is gone, and nothing is written any more; or (`away` false) it is locked again, -EBUSY when somebody
 * else has locked it. There: the file is opened anew, and locked, by the configuration that it had with `later`.
 */
int block_give(struct block *block, bool away, struct error *err) __attribute__((warn_unused_result));
int block_take_over(struct block *block, const struct block_config *config, struct error *err) __attribute__((warn_unused_result));

uint64_t block_size_bytes(const struct block *block);
bool block_readonly(const struct block *block);
bool block_can_discard(const struct block *block);
void block_submit(struct block *block, struct block_request *request);
const char *block_format(const struct block *block); /* "raw", "qcow2" */
/* An empty qcow2 image in an empty file, on the host's disk when this returns. `backing` NULL: none; otherwise its name and format as the image will tell them. */
int block_image_format(int fd, const char *path, uint64_t size_bytes, const char *backing, const char *backing_format, struct error *err) __attribute__((warn_unused_result));
/*
 * Overlays. An image made by block_image_format is put on top of `below`, which becomes its backing file as it is, whatever name the image has for it: `below` is
 * brought up to date on the host's disk, frozen (others may open it for reading then), and belongs to the overlay from then on. With the guard; nothing of `below` is in flight. Opens nothing;
 * `fd` is taken over also on failure, after which `below` is as before.
 */
int block_overlay(struct block **overlay, struct block *below, const char *path, int fd, struct error *err) __attribute__((warn_unused_result));
/* Takes an overlay away that nothing was written to; what was below is as before block_overlay. */
struct block *block_overlay_undo(struct block *overlay);
/* A descriptor of its file that is the caller's, or -errno: to bring the file up to date on the host's disk beforehand, which takes time. */
int block_dup(const struct block *block);
/* What was written is in the files, for others who open them. Nothing is in flight; waits for the host. */
int block_settle(struct block *block);
/* Whether `path` names the same file now. */
bool block_holds(const struct block *block, const char *path);
/* The file may have another size than when it was opened. Nothing is in flight. */
int block_refresh(struct block *block, struct error *err) __attribute__((warn_unused_result));
unsigned block_in_flight(const struct block *block); /* those that wait for room are among them */

/*
 * Writes that fail because the host has no room (-ENOSPC, -EDQUOT) wait in the block instead of ending, and `full` is told; NULL (at first): they fail. It may not submit or retry itself. An overlay does as
 * what is below it. block_retry begins those that wait again: `for_good`: what fails now, and until the next call, fails.
 */
typedef void block_full_fn(void *ctx, const char *path, int result);
void block_wait_when_full(struct block *block, block_full_fn *full, void *ctx);
bool block_waits(const struct block *block);
void block_retry(struct block *block, bool for_good);

/*
 * Which parts of the image are written while somebody copies it, in units of BLOCK_WRITTEN_BYTES; all of it is at first. Take the next parts from *offset on, at most `most` bytes (a multiple of the unit), and read
 * them then: what is written at the same time is noted again. False: there is none. With the guard.
 */
#define BLOCK_WRITTEN_BYTES (64u << 10)
int block_track_writes(struct block *block, bool on); /* -ENOMEM */
bool block_take_written(struct block *block, uint64_t *offset, uint64_t *length, uint64_t most);
uint64_t block_written_bytes(const struct block *block); /* that are left, about */

/* Of requests that succeeded, since the image was opened. */
struct block_counters {
    uint64_t reads, read_bytes, writes, write_bytes, flushes, discards, errors;
};
void block_get_counters(const struct block *block, struct block_counters *counters);
void block_set_counters(struct block *block, const struct block_counters *counters); /* goes on from there */

#endif
