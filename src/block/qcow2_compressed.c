/*
 * qcow2: compressed clusters, which are only read here. Threading: none.
 */
#include <errno.h>
#include <libdeflate.h>
#include <string.h>

#include <zstd.h>

#include "block/qcow2.h"

#define WINDOW_LOG_MAX 22         /* what a hostile frame may make us allocate; a cluster has 2 MiB at most */

/* The descriptor: the byte in the file, and how many sectors follow the first one. */
void qcow2_compressed_place(const struct qcow2 *image, uint64_t entry, uint64_t *offset, uint64_t *bytes)
{
    unsigned shift = 62 - (image->header.cluster_bits - 8);
    uint64_t sectors = entry >> shift & ((1ull << (image->header.cluster_bits - 8)) - 1);

    *offset = entry & ((1ull << shift) - 1) & 0x00ffffffffffffffull;
    *bytes = (sectors + 1) * QCOW2_SECTOR_BYTES - *offset % QCOW2_SECTOR_BYTES;
}

static int inflate_all(const uint8_t *data, size_t bytes, uint8_t *out, size_t out_bytes)
{
    struct libdeflate_decompressor *decompressor = libdeflate_alloc_decompressor();
    enum libdeflate_result result;

    if (!decompressor)
        return -ENOMEM;
    result = libdeflate_deflate_decompress(decompressor, data, bytes, out, out_bytes, NULL); /* sectors may have more after the end */
    libdeflate_free_decompressor(decompressor);
    return result == LIBDEFLATE_SUCCESS ? 0 : -EIO;
}

static int unzstd_all(const uint8_t *data, size_t bytes, uint8_t *out, size_t out_bytes)
{
    ZSTD_DCtx *context = ZSTD_createDCtx();
    ZSTD_inBuffer input = {data, bytes, 0};
    ZSTD_outBuffer output = {out, out_bytes, 0};
    size_t ret = 1;

    if (!context)
        return -ENOMEM;
    (void)ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax, WINDOW_LOG_MAX);
    while (output.pos < out_bytes) {
        size_t in_before = input.pos, out_before = output.pos;

        ret = ZSTD_decompressStream(context, &output, &input);
        if (ZSTD_isError(ret) || (input.pos == in_before && output.pos == out_before))
            break;
    }
    ZSTD_freeDCtx(context);
    return !ZSTD_isError(ret) && output.pos == out_bytes ? 0 : -EIO;
}

int qcow2_decompress(bool zstd, const uint8_t *data, size_t bytes, uint8_t *out, size_t out_bytes)
{
    return zstd ? unzstd_all(data, bytes, out, out_bytes) : inflate_all(data, bytes, out, out_bytes);
}
