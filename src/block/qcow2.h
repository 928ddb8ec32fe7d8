/*
 * qcow2 images: their layout (the format's specification, docs/interop/qcow2 of its authors) and how the parts of the driver work together.
 *
 * Metadata lives in memory: the L1 table and all reference counts of a writable image, and a bounded cache of L2 tables. Changes are collected there and go to the file in a commit, in an
 * order in which each thing is on the disk before what points at it: reference counts, their table, the header, L2 tables, the L1 table, a flush of the host's disk between them.
 * So whatever moment the program or the host ends at, the file is consistent; clusters that nothing points at may be lost, which checking finds. Clusters that nothing needs any
 * more can be used again only when a commit has written that, and no request that began before is under way.
 */
#ifndef DOPPEL_BLOCK_QCOW2_H
#define DOPPEL_BLOCK_QCOW2_H

#include "block/block_priv.h"

#define QCOW2_MAGIC_BYTES 4
extern const uint8_t qcow2_magic[QCOW2_MAGIC_BYTES];

#define QCOW2_CLUSTER_BITS_MIN 9u
#define QCOW2_CLUSTER_BITS_MAX 21u
#define QCOW2_SECTOR_BYTES 512u
#define QCOW2_NEW_CLUSTER_BITS 16u
#define QCOW2_NEW_CLUSTER_BYTES (1u << QCOW2_NEW_CLUSTER_BITS)
#define QCOW2_CLUSTERS_MAX (1ull << 27)  /* of a writable file: what its reference counts take in memory */
#define QCOW2_TABLE_BYTES_MAX (32u << 20) /* L1 and reference count tables */
#define QCOW2_CACHE_BYTES (8u << 20)
#define QCOW2_TABLES_MIN 8u
#define QCOW2_TABLES_MAX 256u /* they are searched one by one */
#define QCOW2_DEPTH_MAX 64u

/* Entries of L1 and L2 tables. */
#define QCOW2_COPIED (1ull << 63)     /* the cluster's reference count is one */
#define QCOW2_COMPRESSED (1ull << 62)
#define QCOW2_OFFSET 0x00fffffffffffe00ull
#define QCOW2_ZERO 1ull
#define QCOW2_L1_RESERVED (~(QCOW2_COPIED | QCOW2_OFFSET))
#define QCOW2_L2_RESERVED (~(QCOW2_COPIED | QCOW2_COMPRESSED | QCOW2_OFFSET | QCOW2_ZERO))

/* Incompatible features. */
#define QCOW2_DIRTY 1ull
#define QCOW2_CORRUPT 2ull
#define QCOW2_COMPRESSION_TYPE 8ull
#define QCOW2_COMPATIBLE_LAZY 1ull

struct qcow2_header {
    uint32_t version, cluster_bits, refcount_bits;
    uint64_t size_bytes, l1_offset, reftable_offset, snapshots_offset;
    uint32_t l1_entries, reftable_clusters, snapshots, header_bytes;
    uint64_t incompatible, compatible, autoclear;
    bool zstd;
    char *backing, *backing_format; /* NULL: none */
};

/* Reads and checks. The file's size in bytes is what the offsets are held against. */
int qcow2_header_read(struct qcow2_header *header, int fd, uint64_t file_bytes, const char *path, struct error *err) __attribute__((warn_unused_result));
/* The path that a backing file's name stands for: relative ones begin at the image. */
int qcow2_backing_path(const char *own, const char *name, char **path, struct error *err) __attribute__((warn_unused_result));
void qcow2_header_clear(struct qcow2_header *header);

/* Sectors of something in memory that differ from the file's, first to behind the last. */
struct qcow2_range {
    uint32_t first, end;
};

struct qcow2_refblock {
    uint8_t *data; /* as in the file */
    uint64_t offset;
    struct qcow2_range dirty, written; /* `written`: what a commit has a copy of */
};

struct qcow2_table {
    TAILQ_ENTRY(qcow2_table) link; /* in the cache, most recently used first */
    struct block_request load;     /* of its contents */
    struct iovec vector;
    struct qcow2 *image;
    uint32_t index;   /* in the L1 table */
    uint64_t offset;  /* in the file */
    uint64_t *entry;  /* as in the file, big-endian */
    unsigned pins;    /* requests that look at it */
    bool loading, failed;
    bool writing;     /* a commit has a copy that is not in the file yet */
    struct qcow2_range dirty, written;
};

TAILQ_HEAD(qcow2_table_list, qcow2_table);

/* Clusters in the file that nothing in memory points at any more. */
struct qcow2_freed {
    TAILQ_ENTRY(qcow2_freed) link;
    uint64_t cluster, count;
    uint64_t sequence; /* requests with this number or less may still use them */
    bool collected, committed; /* a commit has begun, has ended since */
};
TAILQ_HEAD(qcow2_freed_list, qcow2_freed);

struct qcow2_op;
TAILQ_HEAD(qcow2_op_list, qcow2_op);

enum qcow2_phase { PHASE_REFBLOCKS, PHASE_REFTABLE, PHASE_HEADER, PHASE_L2, PHASE_L1, PHASES };

/* A copy of metadata on its way to the file. */
struct qcow2_item {
    STAILQ_ENTRY(qcow2_item) link;
    struct block_request request;
    struct iovec iov;
    struct qcow2 *image;
    uint64_t offset;
    uint32_t bytes;
    uint8_t data[];
};
STAILQ_HEAD(qcow2_item_list, qcow2_item);

struct qcow2_commit {
    bool running;
    unsigned phase, outstanding;
    int result;
    bool flushed;
    bool moved, header; /* what it writes of the refcount table and the header */
    struct qcow2_item_list items[PHASES];
    struct qcow2_op_list served, next; /* who waits for this one, and for the one after it */
    struct block_request flush;
};

struct qcow2 {
    struct block *block;
    struct block *file, *backing;
    struct qcow2_header header;
    uint32_t cluster_bytes, l2_entries;
    uint64_t table_bytes; /* of the disk, that an L2 table describes */
    uint8_t first_sector[QCOW2_SECTOR_BYTES];
    uint8_t *unpacked;    /* the compressed cluster read last, by its entry; 0: none */
    uint64_t unpacked_entry;
    bool writable;
    bool frozen_before; /* what an overlay was put on was read-only already */
    bool opened; /* it was opened to the end: closing writes what is left */
    bool broken; /* the image contradicts itself: nothing is written any more */

    uint64_t *l1; /* host order */
    struct qcow2_range l1_dirty, l1_written;

    struct qcow2_table_list tables;
    unsigned table_count, tables_max;

    /* Of writable images. */
    uint64_t *reftable; /* host order; reserved bits are zero */
    uint32_t reftable_entries;
    struct qcow2_range reftable_dirty, reftable_written;
    bool reftable_moved, header_dirty;
    struct qcow2_refblock *refblock; /* one per entry of reftable */
    uint8_t *metadata;               /* a bit per cluster of the file at most: not for data */
    uint64_t metadata_clusters;
    uint64_t first_free;             /* no free cluster is before it */
    struct qcow2_freed_list freed;

    struct qcow2_op_list ops;     /* all, in order of submission */
    struct qcow2_op_list waiting; /* for something that others do */
    struct loop_event *wake;
    uint64_t sequence;
    struct qcow2_commit commit;
};

static inline bool qcow2_range_empty(const struct qcow2_range *range)
{
    return range->first == range->end;
}

static inline void qcow2_range_add(struct qcow2_range *range, uint64_t byte, uint64_t bytes)
{
    uint32_t first = (uint32_t)(byte / QCOW2_SECTOR_BYTES), end = (uint32_t)((byte + bytes + QCOW2_SECTOR_BYTES - 1) / QCOW2_SECTOR_BYTES);

    if (qcow2_range_empty(range))
        *range = (struct qcow2_range){first, end};
    range->first = first < range->first ? first : range->first;
    range->end = end > range->end ? end : range->end;
}

/* ---- reference counts (qcow2_refcount.c) ---- */

int qcow2_refcounts_open(struct qcow2 *image, struct error *err) __attribute__((warn_unused_result));
void qcow2_refcounts_close(struct qcow2 *image);
uint64_t qcow2_refcount(const struct qcow2 *image, uint64_t cluster);
int qcow2_refcount_set(struct qcow2 *image, uint64_t cluster, uint64_t count) __attribute__((warn_unused_result));
bool qcow2_is_metadata(const struct qcow2 *image, uint64_t cluster);
/* Up to *count free clusters in a row, counted as used once. `metadata`: for a table. 0 or -errno (-ENOSPC, -EFBIG, -ENOMEM). */
int qcow2_alloc(struct qcow2 *image, uint64_t *cluster, uint32_t *count, bool metadata) __attribute__((warn_unused_result));
/* Gives back at once what no table and no file ever pointed at. */
void qcow2_unalloc(struct qcow2 *image, uint64_t cluster, uint32_t count);
/* What is not pointed at from now on; its reference counts go down later. */
void qcow2_free(struct qcow2 *image, uint64_t cluster, uint64_t count);
/* Counts down what was committed and is in nobody's hands. */
void qcow2_release(struct qcow2 *image, uint64_t oldest_sequence);

/* ---- checking (qcow2_check.c) ---- */

/* -EBADMSG: an image that is open for reading contradicts itself. Loads its reference counts. */
int qcow2_check(struct qcow2 *image, struct error *err) __attribute__((warn_unused_result));

/* ---- L2 tables (qcow2_table.c) ---- */

/* Pinned. -EAGAIN: it is being read, wait; -ENOBUFS: a commit has to make room; NULL and 0: there is none (only when not `write`). */
int qcow2_table_get(struct qcow2 *image, uint32_t index, bool write, struct qcow2_table **table) __attribute__((warn_unused_result));
void qcow2_table_put(struct qcow2_table *table);
uint64_t qcow2_table_entry(const struct qcow2_table *table, uint32_t index);
void qcow2_table_set(struct qcow2_table *table, uint32_t index, uint64_t entry);
void qcow2_tables_close(struct qcow2 *image);

/* ---- commits (qcow2_commit.c) ---- */

/* `op` goes on when a commit that begins now or later has ended. */
void qcow2_commit_for(struct qcow2 *image, struct qcow2_op *op);
/* The same, waiting, with nothing in flight. */
int qcow2_commit_now(struct qcow2 *image);

/* ---- requests (qcow2_request.c) ---- */

/* A read of guest bytes that a request needs. */
struct qcow2_part {
    uint64_t entry, at;
    struct iovec *iov;
    unsigned iov_count;
    struct iovec vector; /* of what is compressed */
    void (*done)(struct qcow2_op *op, int result);
};

struct qcow2_op {
    struct block_request sub; /* first: to the file or the backing file */
    TAILQ_ENTRY(qcow2_op) link, wait_link;
    struct qcow2 *image;
    struct block_request *request;
    uint64_t sequence;
    uint64_t done_bytes;
    bool inside_submit, allocating;
    void (*next)(struct qcow2_op *op, int result); /* when `sub` is done */
    void (*again)(struct qcow2_op *op);            /* goes on with what is left */
    /* The part that is being worked on: guest bytes from `at`. */
    uint64_t at, run_bytes;
    struct qcow2_table *table;
    uint64_t cluster;        /* first one allocated */
    uint32_t cluster_count;
    bool fresh;              /* allocated for this, not used before */
    uint8_t *head, *tail, *compressed;
    uint32_t head_bytes, tail_bytes;
    struct iovec *iov;
    unsigned iov_count;
    struct iovec rest;
    struct qcow2_part part;
};

const struct block *qcow2_file(const struct block *block);
void qcow2_wait(struct qcow2_op *op);
void qcow2_wake_all(struct qcow2 *image);
uint64_t qcow2_oldest_sequence(const struct qcow2 *image);
void qcow2_op_committed(struct qcow2_op *op, int result);
void qcow2_submit(struct block *block, struct block_request *request);
/* Of an image that contradicts itself: says so once and marks it. */
void qcow2_broken(struct qcow2 *image, const char *what, uint64_t where);
/* Of one that is sound, but cannot be kept up in memory: nothing is written to it any more. */
void qcow2_give_up(struct qcow2 *image, const char *why);

/* A new file with an empty image of so many bytes. `backing` NULL: none. Nothing is flushed. */
int qcow2_format(int fd, uint64_t size_bytes, const char *backing, const char *backing_format) __attribute__((warn_unused_result));

/* ---- compressed clusters (qcow2_compressed.c) ---- */

void qcow2_compressed_place(const struct qcow2 *image, uint64_t entry, uint64_t *offset, uint64_t *bytes);
/* Exactly out_bytes, or -EIO. */
int qcow2_decompress(bool zstd, const uint8_t *data, size_t bytes, uint8_t *out, size_t out_bytes) __attribute__((warn_unused_result));

#endif
