/*
 * Reading images, and waiting for it (image_reader.h): a loop of its own runs until the request is done.
 *
 * Invariant: between two calls nothing is in flight.
 * Threading: one thread at a time.
 */
#include "control/image_reader.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NOT_DONE 1

struct image_reader {
    struct loop *loop;
    struct block *block;
    int result;
};

int image_reader_open(struct image_reader **out, const char *path, const char *format, enum block_backing backing, struct error *err)
{
    const struct block_config config = {.path = path, .format = format, .readonly = true, .backing = backing};
    struct image_reader *reader = calloc(1, sizeof *reader);
    int r = reader ? loop_create(&reader->loop, NULL) : -ENOMEM;
    *out = NULL;
    if (r)
        error_set(err, r, "cannot read %s: %s", path, strerror(-r));
    else
        r = block_open(&reader->block, &config, reader->loop, err);
    if (r)
        image_reader_close(reader);
    else
        *out = reader;
    return r;
}

uint64_t image_reader_size(const struct image_reader *reader)
{
    return block_size_bytes(reader->block);
}

static void done(struct block_request *request, int result)
{
    struct image_reader *reader = request->user;
    reader->result = result;
}

int image_reader_read(struct image_reader *reader, void *data, uint64_t bytes, uint64_t at)
{
    struct iovec iov = {data, bytes};
    struct block_request request = {.op = BLOCK_READ, .offset_bytes = at, .length_bytes = bytes, .iov = &iov, .iov_count = 1, .done = done, .user = reader};
    reader->result = NOT_DONE;
    block_submit(reader->block, &request);
    while (reader->result == NOT_DONE)
        loop_run_once(reader->loop, -1);
    return reader->result;
}

void image_reader_close(struct image_reader *reader)
{
    if (!reader)
        return;
    block_close(reader->block);
    if (reader->loop)
        loop_destroy(reader->loop);
    free(reader);
}
