/*
 * Inside the block folder: what an image format provides, and asynchronous I/O on host descriptors that formats build on.
 */
#ifndef DOPPEL_BLOCK_BLOCK_PRIV_H
#define DOPPEL_BLOCK_BLOCK_PRIV_H

#include <sys/queue.h>

#include "block/block.h"

/* ---- formats and filters ---- */

struct block_ops {
    const char *name; /* "raw" */
    /* Opens config->path: sets block->private, size_bytes, readonly and can_discard. */
    int (*open)(struct block *block, const struct block_config *config, struct error *err);
    void (*close)(struct block *block);
    bool (*holds)(const struct block *block, const char *path);
    int (*refresh)(struct block *block, struct error *err); /* sets size_bytes anew */
    /* `request` is inside the image and allowed; ends by block_complete or block_complete_later. */
    void (*submit)(struct block *block, struct block_request *request);
    /* What was written is on the host's disk, for others who open the file; nothing is in flight. Waits for the host. */
    int (*settle)(struct block *block);
    /* From now on nobody writes it, and others may open it for reading; or the other way round. Nothing is in flight. */
    int (*freeze)(struct block *block, bool freeze, struct error *err);
    /* It is not locked any more, and is not written; or the other way round. Settled before, nothing is in flight. */
    int (*give)(struct block *block, bool away, struct error *err);
};

extern const struct block_ops block_raw_ops, block_qcow2_ops;

struct block {
    const struct block_ops *ops;
    void *private;
    struct loop *loop;
    char *path;
    uint64_t size_bytes;
    bool readonly, can_discard;
    bool beneath;        /* under a format: of any size, zeroes after its end; writes may make it longer */
    unsigned depth;      /* images above it in a chain */
    const struct block *above;
    struct block_io *io; /* of the file, shared by all files of a chain */
    unsigned in_flight;
    struct block_counters counters;
    struct block_written *written; /* written.c; NULL: nobody asked */
    struct loop_event *completion; /* for block_complete_later */
    struct block_request *later;   /* linked by backend_private[0] */
    block_full_fn *full;
    void *full_ctx;
    struct block_request *waiting; /* for room; likewise */
    bool for_good;
};

/* How an image is opened beneath another one. */
struct block_below {
    struct block_io *io;       /* shared; NULL: an own one */
    const struct block *above; /* of which it is the backing file; NULL: none */
    unsigned depth;            /* images above it */
};

struct block *block_create(const char *path, struct loop *loop); /* NULL: no memory */
int block_open_beneath(struct block **block, const struct block_config *config, const struct block_below *below, struct loop *loop, struct error *err)
    __attribute__((warn_unused_result));
/* A raw file for a format to keep its clusters in. `fd` is taken over also on failure; -1: config->path is opened. */
int block_open_file(struct block **block, const struct block_config *config, int fd, struct block_io *io, struct loop *loop, struct error *err)
    __attribute__((warn_unused_result));
int block_raw_fd(const struct block *block); /* of a raw one */
/* Like block_submit without its checks: an offset may be behind the end of a file beneath. */
void block_submit_unchecked(struct block *block, struct block_request *request);

/* With block->written, when a request begins and when it ends. */
void block_note_written(struct block *block, const struct block_request *request);

/* Ends a request. Not from inside submit: the caller of block_submit does not expect `done` yet. */
void block_complete(struct block *block, struct block_request *request, int result);
/* From anywhere on the loop's thread or with the device lock held; `done` runs from the loop. Uses backend_private. */
void block_complete_later(struct block *block, struct block_request *request, int result);

/* ---- asynchronous I/O ---- */

enum block_task_kind { TASK_READ, TASK_WRITE, TASK_SYNC, TASK_FALLOCATE };

/* One system call's worth of work; results may be short. Valid until done. */
struct block_task {
    enum block_task_kind kind;
    int fd;
    int mode; /* of fallocate */
    const struct iovec *iov;
    unsigned iov_count; /* up to BLOCK_TASK_IOV_MAX */
    uint64_t offset_bytes, length_bytes;
    /* On the loop's thread: bytes transferred, 0, or -errno. */
    void (*done)(struct block_task *task, int64_t result);
    /* Of the I/O back end. */
    TAILQ_ENTRY(block_task) link;
    int64_t result;
};

TAILQ_HEAD(block_task_list, block_task);

#define BLOCK_TASK_IOV_MAX 1024u

struct block_io {
    const struct block_io_ops *ops;
    unsigned users; /* files of a chain */
};

struct block_io_ops {
    const char *name;
    int (*create)(struct block_io **io, struct loop *loop);
    /* Returns at once; done runs later, from the loop. */
    void (*submit)(struct block_io *io, struct block_task *task);
    void (*destroy)(struct block_io *io); /* nothing in flight */
};

extern const struct block_io_ops block_io_uring_ops;
extern const struct block_io_ops block_io_threads_ops;

/* `name` NULL or "auto": io_uring where it works, else threads. -EINVAL: no such back end. */
int block_io_create(struct block_io **io, const char *name, struct loop *loop, struct error *err) __attribute__((warn_unused_result));
void block_io_put(struct block_io *io); /* the last user destroys it; nothing of it is in flight then */

#endif
