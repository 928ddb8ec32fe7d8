/*
 * The block interface: picks a format, checks requests at the border, counts what is in flight.
 *
 * Invariant: every submitted request ends in block_complete exactly once, on the loop's thread.
 * Threading: with the device lock held.
 */
#include "block/block_priv.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "block/qcow2.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, pread64); /* what format a disk has that is plugged */

#define SECTOR_BYTES 512u

static const struct block_ops *const formats[] = {&block_raw_ops, &block_qcow2_ops};

static void complete_later(void *ctx)
{
    struct block *block = ctx;
    struct block_request *request;

    /* `done` may submit and so add to the list again. */
    while ((request = block->later)) {
        block->later = request->backend_private[0];
        block_complete(block, request, (int)(intptr_t)request->backend_private[1]);
    }
}

static bool path_ends(const char *path, const char *end)
{
    size_t length = strlen(path), end_length = strlen(end);

    return length > end_length && !strcasecmp(path + length - end_length, end);
}

/* Does the image begin as its format's do? What a guest can write into a raw disk must not decide how the disk is opened: for formats by content only. */
static bool looks_like_qcow2(const char *path)
{
    uint8_t magic[QCOW2_MAGIC_BYTES];
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    bool yes = fd >= 0 && pread(fd, magic, sizeof(magic), 0) == (ssize_t)sizeof(magic) && !memcmp(magic, qcow2_magic, sizeof(magic));

    if (fd >= 0)
        close(fd);
    return yes;
}

static const struct block_ops *find_format(struct block_config *config, struct error *err)
{
    const char *name = config->format;

    if (name && !strcmp(name, "auto")) {
        if (config->backing == BLOCK_BACKING_NEAR)
            config->backing = BLOCK_BACKING_NONE;
        return looks_like_qcow2(config->path) ? &block_qcow2_ops : &block_raw_ops;
    }
    if (!name && path_ends(config->path, ".qcow2"))
        return &block_qcow2_ops;
    if (!name && looks_like_qcow2(config->path))
        log_warning("disk %s: begins like a qcow2 image, but is used as a raw one; add format=qcow2 if it is not", config->path);
    if (!name)
        return &block_raw_ops;
    for (unsigned i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        if (!strcmp(formats[i]->name, name))
            return formats[i];
    }
    error_set(err, -EINVAL, "unknown disk image format \"%s\"; use \"raw\", \"qcow2\" or \"auto\"", name);
    return NULL;
}

struct block *block_create(const char *path, struct loop *loop)
{
    struct block *block = calloc(1, sizeof(*block));

    if (!block)
        return NULL;
    block->loop = loop;
    block->path = strdup(path);
    block->completion = loop_event_create(loop, complete_later, block);
    if (block->path && block->completion)
        return block;
    block_close(block);
    return NULL;
}

int block_open_beneath(struct block **out, const struct block_config *wanted, const struct block_below *below, struct loop *loop, struct error *err)
{
    struct block_config config = *wanted;
    const struct block_ops *ops = find_format(&config, err);
    struct block *block;
    int ret;

    *out = NULL;
    if (!ops)
        return -EINVAL;
    block = block_create(config.path, loop);
    if (!block)
        return error_set(err, -ENOMEM, "disk %s: no memory", config.path);
    if (below) {
        block->beneath = true;
        block->depth = below->depth;
        block->above = below->above;
        block->io = below->io;
        if (block->io)
            block->io->users++;
    }
    ret = ops->open(block, &config, err);
    if (ret < 0) {
        block_close(block);
        return ret;
    }
    block->ops = ops;
    *out = block;
    return 0;
}

int block_open(struct block **out, const struct block_config *config, struct loop *loop, struct error *err)
{
    return block_open_beneath(out, config, NULL, loop, err);
}

const char *block_format(const struct block *block)
{
    return block->ops->name;
}

int block_dup(const struct block *block)
{
    int fd = fcntl(block->ops == &block_qcow2_ops ? block_raw_fd(qcow2_file(block)) : block_raw_fd(block), F_DUPFD_CLOEXEC, 3);

    return fd < 0 ? -errno : fd;
}

int block_settle(struct block *block)
{
    return block->readonly ? 0 : block->ops->settle(block);
}

int block_give(struct block *block, bool away, struct error *err)
{
    int ret = away ? block_settle(block) : 0;

    if (ret < 0)
        return error_set(err, ret, "disk %s: cannot be written: %s", block->path, strerror(-ret));
    return block->readonly ? 0 : block->ops->give(block, away, err);
}

int block_take_over(struct block *block, const struct block_config *wanted, struct error *err)
{
    struct block_config config = *wanted;
    const struct block_ops *ops = find_format(&config, err);
    uint64_t size_bytes = block->size_bytes;
    int ret;

    if (!ops)
        return -EINVAL;
    config.later = false;
    block->ops->close(block);
    ret = ops == block->ops ? ops->open(block, &config, err) : error_set(err, -ESTALE, "disk %s: its format has changed meanwhile", block->path);
    if (ret == 0 && block->size_bytes != size_bytes)
        ret = error_set(err, -ESTALE, "disk %s: its size has changed meanwhile", block->path);
    return ret;
}

void block_close(struct block *block)
{
    if (!block)
        return;
    assert(block->in_flight == 0);
    if (block->ops)
        block->ops->close(block);
    if (block->completion)
        loop_event_destroy(block->completion);
    block_io_put(block->io);
    free(block->written);
    free(block->path);
    free(block);
}

uint64_t block_size_bytes(const struct block *block)
{
    return block->size_bytes;
}

bool block_readonly(const struct block *block)
{
    return block->readonly;
}

bool block_can_discard(const struct block *block)
{
    return block->can_discard;
}

bool block_holds(const struct block *block, const char *path)
{
    return block->ops->holds(block, path);
}

int block_refresh(struct block *block, struct error *err)
{
    return block->ops->refresh(block, err);
}

unsigned block_in_flight(const struct block *block)
{
    return block->in_flight;
}

void block_get_counters(const struct block *block, struct block_counters *counters)
{
    *counters = block->counters;
}

void block_set_counters(struct block *block, const struct block_counters *counters)
{
    block->counters = *counters;
}

static void count(struct block_counters *counters, const struct block_request *request, int result)
{
    if (result < 0) {
        counters->errors++;
        return;
    }
    switch (request->op) {
    case BLOCK_READ:
        counters->reads++;
        counters->read_bytes += request->length_bytes;
        break;
    case BLOCK_WRITE:
        counters->writes++;
        counters->write_bytes += request->length_bytes;
        break;
    case BLOCK_FLUSH:
        counters->flushes++;
        break;
    case BLOCK_DISCARD:
    case BLOCK_WRITE_ZEROES:
        counters->discards++;
        break;
    }
}

/* ---- no room on the host ---- */

void block_wait_when_full(struct block *block, block_full_fn *full, void *ctx)
{
    block->full = full;
    block->full_ctx = ctx;
}

bool block_waits(const struct block *block)
{
    return block->waiting != NULL;
}

/* What a format writes for a flush can be written again; a raw file's flush cannot be believed once it has failed. */
static bool may_wait(const struct block *block, const struct block_request *request, int result)
{
    bool writes = request->op == BLOCK_WRITE || request->op == BLOCK_WRITE_ZEROES || (request->op == BLOCK_FLUSH && block->ops != &block_raw_ops);

    return (result == -ENOSPC || result == -EDQUOT) && writes && block->full && !block->for_good;
}

void block_retry(struct block *block, bool for_good)
{
    struct block_request *request, *next;

    block->for_good = for_good;
    request = block->waiting;
    block->waiting = NULL;
    for (; request; request = next) {
        next = request->backend_private[0];
        block->ops->submit(block, request);
    }
}

void block_complete(struct block *block, struct block_request *request, int result)
{
    assert(block->in_flight > 0);
    if (may_wait(block, request, result)) {
        request->backend_private[0] = block->waiting;
        block->waiting = request;
        block->full(block->full_ctx, block->path, result);
        return;
    }
    block->in_flight--;
    if (block->written)
        block_note_written(block, request);
    count(&block->counters, request, result);
    request->done(request, result);
}

void block_complete_later(struct block *block, struct block_request *request, int result)
{
    request->backend_private[0] = block->later;
    request->backend_private[1] = (void *)(intptr_t)result;
    block->later = request;
    loop_event_raise(block->completion);
}

static int check_request(const struct block *block, const struct block_request *request)
{
    uint64_t vector_bytes = 0;

    if (request->op == BLOCK_FLUSH)
        return 0;
    if (request->offset_bytes % SECTOR_BYTES || request->length_bytes % SECTOR_BYTES ||
        request->offset_bytes > block->size_bytes || request->length_bytes > block->size_bytes - request->offset_bytes)
        return -EINVAL;
    if (request->op != BLOCK_READ && block->readonly)
        return -EROFS;
    if (request->op != BLOCK_READ && request->op != BLOCK_WRITE)
        return 0;
    for (unsigned i = 0; i < request->iov_count; i++)
        vector_bytes += request->iov[i].iov_len;
    return vector_bytes == request->length_bytes ? 0 : -EINVAL;
}

void block_submit_unchecked(struct block *block, struct block_request *request)
{
    block->in_flight++;
    block->ops->submit(block, request);
}

void block_submit(struct block *block, struct block_request *request)
{
    int ret = check_request(block, request);

    block->in_flight++;
    if (block->written)
        block_note_written(block, request);
    if (ret < 0 || (request->op != BLOCK_FLUSH && request->length_bytes == 0) || (request->op == BLOCK_FLUSH && block->readonly))
        block_complete_later(block, request, ret);
    else
        block->ops->submit(block, request);
}
