/*
 * Shared directories: a file server for one directory of the host, speaking the kernel's FUSE protocol (<linux/fuse.h>, 7.31 and later).
 *
 * fs_serve does what one message asks and writes the answer; it has no threads of its own and may be called by any number of them at once.
 * The guest is hostile: it names files by node numbers and single names only, and nothing that it sends leads out of the directory
 * (docs/security.md). On the host, everything is done as the VMM's own user.
 */
#ifndef DOPPEL_FS_FS_H
#define DOPPEL_FS_FS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "state/state.h"
#include "util/error.h"

#define FS_VECTORS_MAX 1024u /* in either direction of a message */
#define FS_ID_AS_ON_HOST (-1)

/* How long the guest may believe what it knows. */
enum fs_cache {
    FS_CACHE_AUTO,   /* names and attributes for a second; data until the file is opened and has changed */
    FS_CACHE_NONE,   /* nothing */
    FS_CACHE_ALWAYS, /* for good: nobody else changes the directory */
};

struct fs_config {
    const char *path;
    bool readonly;
    enum fs_cache cache;
    bool writeback;    /* the guest may keep written data for a while */
    bool xattr;        /* users' extended attributes; the guest's kernel then asks for one before it writes to a file */
    bool no_capabilities; /* the threads that serve have none, also when they are root's */
    int64_t uid, gid;  /* what the VMM's own user and group look like to the guest, or FS_ID_AS_ON_HOST */
};

/* A request and the room for its answer, in guest memory. At most FS_VECTORS_MAX vectors each; the bytes are the vectors' sums. */
struct fs_message {
    const struct iovec *in, *out;
    unsigned in_count, out_count;
    uint64_t in_bytes, out_bytes;
};

struct fs;

int fs_create(struct fs **fs, const struct fs_config *config, struct error *err) __attribute__((warn_unused_result));
void fs_destroy(struct fs *fs);
/* Returns the number of bytes written to `out` from its start; 0: there is no answer. May wait for the host's storage. Any thread. */
uint64_t fs_serve(struct fs *fs, const struct fs_message *message);
/*
 * True when this message is one of those that end at once unless the storage is slow, so that handing it to another thread would take longer. A guess; the guest
 * may change the message behind it.
 */
bool fs_is_quick(const struct fs *fs, const struct fs_message *message);
/*
 * Does what the message says if it gives files up (FORGET), without any system call but close(); for threads that may not touch files. False: it is something else, nothing was done.
 */
bool fs_serve_forget(struct fs *fs, const struct fs_message *message);
/* For threads that only call fs_serve: gives them a file mode mask of their own (none), and lets them make files for the guest's users. */
void fs_thread_prepare(const struct fs *fs);
/* The guest's driver started anew: it holds nothing any more. Calls under way end with nothing kept. Any thread. */
void fs_reset(struct fs *fs);
/* Fields inside the caller's section; no call is under way. What is not found again when loading answers ESTALE from then on. */
void fs_state(struct fs *fs, struct state_io *io);

/* For tests and statistics. */
struct fs_counts {
    unsigned nodes, node_descriptors, handles;
    uint64_t node_bytes;
};
struct fs_counts fs_count(struct fs *fs);
/* Fewer descriptors for nodes and for open files than the host would grant. */
void fs_limit(struct fs *fs, unsigned node_descriptors, unsigned handles);

#endif
