/*
 * The block interface: picks a format, checks requests at the border, counts what is in flight.
 *
 * Invariant: every submitted request ends in block_complete exactly once, on the loop's thread.
 * Threading: with the device lock held.
 */
#include "block/block_priv.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR_BYTES 512u

static const struct block_ops *const formats[] = {&block_raw_ops};

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

static const struct block_ops *find_format(const char *name, struct error *err)
{
    if (!name)
        return &block_raw_ops;
    for (unsigned i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
        if (!strcmp(formats[i]->name, name))
            return formats[i];
    }
    error_set(err, -EINVAL, "unknown disk image format \"%s\"; use \"raw\"", name);
    return NULL;
}

int block_open(struct block **out, const struct block_config *config, struct loop *loop, struct error *err)
{
    const struct block_ops *ops = find_format(config->format, err);
    struct block *block;
    int ret;

    *out = NULL;
    if (!ops)
        return -EINVAL;
    block = calloc(1, sizeof(*block));
    if (!block)
        return error_set(err, -ENOMEM, "disk %s: no memory", config->path);
    block->loop = loop;
    block->path = strdup(config->path);
    block->completion = loop_event_create(loop, complete_later, block);
    if (!block->path || !block->completion)
        ret = error_set(err, -ENOMEM, "disk %s: no memory", config->path);
    else
        ret = ops->open(block, config, err);
    if (ret < 0) {
        block_close(block);
        return ret;
    }
    block->ops = ops;
    *out = block;
    return 0;
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

void block_complete(struct block *block, struct block_request *request, int result)
{
    assert(block->in_flight > 0);
    block->in_flight--;
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

void block_submit(struct block *block, struct block_request *request)
{
    int ret = check_request(block, request);

    block->in_flight++;
    if (ret < 0 || (request->op != BLOCK_FLUSH && request->length_bytes == 0) || (request->op == BLOCK_FLUSH && block->readonly))
        block_complete_later(block, request, ret);
    else
        block->ops->submit(block, request);
}
