/* Fuzz target: working sets, from whoever may write beside a snapshot. The checksum is made right, but for inputs of odd length, so that what it guards is reached; no bit lies outside. */
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#include "state/working_set.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CHECK_AT 16u
#define PAGES 4000u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct chunk_id id;
    uint64_t pages[(PAGES + 63) / 64] = {0};
    uint8_t *file = malloc(size + 1);
    if (!file)
        abort();
    memcpy(file, data, size);
    if (size >= CHECK_AT + 8 && size % 2 == 0) {
        uint64_t check = XXH3_64bits(file + CHECK_AT + 8, size - CHECK_AT - 8);
        memcpy(file + CHECK_AT, &check, sizeof check);
    }
    int64_t count = working_set_read(file, size, &id, PAGES, pages), set = 0;
    for (unsigned i = 0; i < sizeof pages / sizeof *pages; i++)
        set += __builtin_popcountll(pages[i]);
    if (set != (count > 0 ? count : 0) || pages[PAGES / 64] >> PAGES % 64)
        abort();
    free(file);
    return 0;
}
