/*
 * Fuzz target: software checksum and segmentation. Input: the 12-byte virtio header, then the frame. Checks that what comes out is bounded.
 */
#include <stdlib.h>
#include <string.h>

#include "net/offload.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

struct emitted {
    size_t frames, bytes, limit_bytes;
    uint64_t sum;
};

static void emit(void *ctx, const uint8_t *frame, size_t length_bytes)
{
    struct emitted *emitted = ctx;
    if (length_bytes > emitted->limit_bytes)
        abort();
    emitted->frames++;
    emitted->sum = net_checksum_add(emitted->sum, frame, length_bytes); /* reads every byte */
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    struct net_header header;
    if (size_bytes < sizeof header || size_bytes > sizeof header + NET_FRAME_BYTES_MAX)
        return 0;
    memcpy(&header, data, sizeof header);
    size_t length_bytes = size_bytes - sizeof header;
    uint8_t *frame = malloc(length_bytes ? length_bytes : 1); /* of its exact size, so that the sanitizer sees any byte beyond */
    if (!frame)
        return 0;
    memcpy(frame, data + sizeof header, length_bytes);
    struct emitted emitted = {.limit_bytes = length_bytes};
    int result = net_offload_finish(&header, frame, length_bytes, emit, &emitted);
    if ((result == 0) != (emitted.frames > 0) || emitted.frames > length_bytes / 8 + 1)
        abort();
    free(frame);
    return 0;
}
