/*
 * Fuzz target: hostile qcow2 images. Byte 0: bit 0 read only, bit 1 the checks of the header's magic and version are made right; byte 1: how many requests; the rest is the file's
 * first bytes, padded to 64 KiB. Reads, writes, discards and flushes at places that the bytes choose.
 */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "block/block.h"
#include "util/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define FILE_BYTES (64u << 10)
#define LENGTH_MAX (32u << 10)

struct one {
    struct block_request request; /* first */
    bool done;
};

static void done(struct block_request *request, int result)
{
    (void)result;
    ((struct one *)request)->done = true;
}

static void run(struct block *block, struct loop *loop, unsigned what)
{
    static uint8_t buffer[LENGTH_MAX];
    static const enum block_op kinds[] = {BLOCK_READ, BLOCK_WRITE, BLOCK_DISCARD, BLOCK_WRITE_ZEROES, BLOCK_FLUSH};
    uint64_t size = block_size_bytes(block), offset = size / 256 * (what * 37 % 256) / 512 * 512, length = (what % 7 + 1) * 512 * (what % 3 ? 1 : 8);
    struct iovec iov = {buffer, length < size - offset ? length : size - offset};
    struct one one = {.request = {.op = kinds[what % 5], .offset_bytes = offset, .length_bytes = iov.iov_len, .iov = &iov, .iov_count = 1, .done = done, .may_unmap = what & 1}};

    block_submit(block, &one.request);
    while (!one.done)
        if (loop_run_once(loop, -1) < 0)
            abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char path[] = "/tmp/doppel-fuzz-qcow2-XXXXXX";
    static uint8_t file[FILE_BYTES];
    struct loop *loop;
    struct block *block;
    struct error err = {0};
    int fd;

    if (size < 2)
        return 0;
    log_set_level(LOG_OFF);
    memset(file, 0, sizeof file);
    memcpy(file, data + 2, size - 2 < sizeof file ? size - 2 : sizeof file);
    if (data[0] & 2)
        memcpy(file, "QFI\xfb\0\0\0\3", 8);
    fd = mkstemp(path);
    if (fd < 0 || write(fd, file, sizeof file) != (ssize_t)sizeof file || loop_create(&loop, NULL))
        abort();
    close(fd);
    const struct block_config config = {.path = path, .format = "qcow2", .readonly = data[0] & 1, .io = "threads", .backing = BLOCK_BACKING_NONE};
    if (block_open(&block, &config, loop, &err) == 0) {
        for (unsigned i = 0; i < data[1] % 16u; i++)
            run(block, loop, i * 5 + data[1]);
        block_close(block);
    }
    loop_destroy(loop);
    unlink(path);
    return 0;
}
