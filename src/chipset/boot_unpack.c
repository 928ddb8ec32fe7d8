/*
 * Unpacks the compressed kernel inside a bzImage, so that an interpreted guest need not.
 *
 * Invariants: no more than limit_bytes are written, whatever the payload says; the unpacked size must be the one that the payload ends with.
 * Threading: none.
 */
#include <errno.h>
#include <libdeflate.h>
#include <limits.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <zstd.h>

#include "chipset/boot_priv.h"
#include "chipset/lz4_library.h"
#include "chipset/lzma_library.h"

/* Each unpacks exactly `to_bytes` bytes; 0 or -EBADMSG, -ENOMEM, -ENOTSUP (its library is not there). */
typedef int unpack_fn(const uint8_t *from, size_t from_bytes, uint8_t *to, size_t to_bytes);

static int unpack_xz(const uint8_t *from, size_t from_bytes, uint8_t *to, size_t to_bytes)
{
    lzma_stream stream = LZMA_STREAM_INIT;
    lzma_ret ret;

    if (library_load(&lzma_library_file, NULL))
        return -ENOTSUP;
    ret = lzma_stream_decoder(&stream, 256u << 20, 0);
    if (ret != LZMA_OK)
        return -ENOMEM;
    stream.next_in = from;
    stream.avail_in = from_bytes;
    stream.next_out = to;
    stream.avail_out = to_bytes;
    ret = lzma_code(&stream, LZMA_FINISH);
    lzma_end(&stream);
    if (ret == LZMA_MEM_ERROR)
        return -ENOMEM;
    return ret == LZMA_STREAM_END && stream.avail_out == 0 ? 0 : -EBADMSG;
}

static int unpack_gzip(const uint8_t *from, size_t from_bytes, uint8_t *to, size_t to_bytes)
{
    struct libdeflate_decompressor *decompressor = libdeflate_alloc_decompressor();
    enum libdeflate_result result;

    if (!decompressor)
        return -ENOMEM;
    result = libdeflate_gzip_decompress(decompressor, from, from_bytes, to, to_bytes, NULL);
    libdeflate_free_decompressor(decompressor);
    return result == LIBDEFLATE_SUCCESS ? 0 : -EBADMSG;
}

static int unpack_zstd(const uint8_t *from, size_t from_bytes, uint8_t *to, size_t to_bytes)
{
    ZSTD_DStream *stream = ZSTD_createDStream();
    ZSTD_inBuffer in = {from, from_bytes, 0};
    ZSTD_outBuffer out = {to, to_bytes, 0};
    size_t left = 1;

    if (!stream)
        return -ENOMEM;
    /* Kernels are packed with windows above the default limit. */
    ZSTD_DCtx_setParameter(stream, ZSTD_d_windowLogMax, 27);
    while (left && !ZSTD_isError(left)) {
        size_t before = in.pos + out.pos;

        left = ZSTD_decompressStream(stream, &out, &in);
        if (in.pos + out.pos == before)
            break;
    }
    ZSTD_freeDStream(stream);
    return left == 0 && out.pos == to_bytes ? 0 : -EBADMSG;
}

/* The legacy frame: a magic number, then blocks, each with its packed size; all unpack to 8 MiB but the last. */
static int unpack_lz4(const uint8_t *from, size_t from_bytes, uint8_t *to, size_t to_bytes)
{
    struct image in = {from, from_bytes};
    size_t at = 4, done = 0;

    if (library_load(&lz4_library_file, NULL))
        return -ENOTSUP;
    while (done < to_bytes) {
        uint32_t block = image_u32(&in, at);
        size_t room = to_bytes - done;
        int got;

        if (!image_has(&in, at, 4) || !block || block > INT_MAX || !image_has(&in, at + 4, block))
            return -EBADMSG;
        got = LZ4_decompress_safe((const char *)from + at + 4, (char *)to + done, (int)block, room > 8u << 20 ? 8 << 20 : (int)room);
        if (got <= 0)
            return -EBADMSG;
        at += 4 + (size_t)block;
        done += (size_t)got;
    }
    return 0;
}

static int unpack_none(const uint8_t *from, size_t from_bytes, uint8_t *to, size_t to_bytes)
{
    if (from_bytes < to_bytes)
        return -EBADMSG;
    memcpy(to, from, to_bytes);
    return 0;
}

static const struct {
    uint8_t magic[6];
    uint8_t magic_bytes;
    uint8_t trailer_bytes; /* of the payload that are not the unpacker's: the size. gzip's is its own, an ELF has none */
    unpack_fn *unpack;
} formats[] = {
    {{0xFD, '7', 'z', 'X', 'Z', 0}, 6, 4, unpack_xz},
    {{0x1F, 0x8B}, 2, 0, unpack_gzip},
    {{0x28, 0xB5, 0x2F, 0xFD}, 4, 4, unpack_zstd},
    {{0x02, 0x21, 0x4C, 0x18}, 4, 4, unpack_lz4},
    {{0x7F, 'E', 'L', 'F'}, 4, 0, unpack_none},
};

/* Aligned for large pages, which take a tenth of the time to come by. */
static uint8_t *allocate(uint64_t size)
{
    const size_t large = 2u << 20, rounded = ((size_t)size + large - 1) & ~(large - 1);
    uint8_t *bytes = aligned_alloc(large, rounded);

    if (bytes)
        (void)madvise(bytes, rounded, MADV_HUGEPAGE); /* not every kernel has them */
    return bytes;
}

int boot_unpack(const struct image *payload, uint64_t limit_bytes, uint8_t **bytes, uint64_t *size_bytes)
{
    unsigned format = 0, count = sizeof(formats) / sizeof(formats[0]);
    uint64_t size;
    int rc;

    while (format < count && (payload->size_bytes < 8 || memcmp(payload->bytes, formats[format].magic, formats[format].magic_bytes)))
        format++;
    if (format == count || payload->size_bytes > UINT_MAX)
        return -ENOTSUP;
    size = formats[format].unpack == unpack_none ? payload->size_bytes : image_u32(payload, payload->size_bytes - 4);
    if (!size)
        return -EBADMSG;
    if (size > limit_bytes)
        return -EFBIG;
    *bytes = allocate(size);
    if (!*bytes)
        return -ENOMEM;
    rc = formats[format].unpack(payload->bytes, payload->size_bytes - formats[format].trailer_bytes, *bytes, size);
    if (rc < 0) {
        free(*bytes);
        *bytes = NULL;
        return rc;
    }
    *size_bytes = size;
    return 0;
}
