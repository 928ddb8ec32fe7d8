/*
 * `filtered_pages KIND touched`: a thread of a kind is the first that wants pages of a restored machine, to read and to write them: one of a file that is mapped, one that a source
 * has (as chunk files are read). Status 0: they were right.
 */
#include "filtered.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "memory/memory.h"
#include "memory/page_source.h"
#include "sandbox/sandbox.h"
#include "state/chunk_priv.h"

#define RAM_BYTES (4u << 20)
#define REMOTE (RAM_BYTES / 2) /* from here on, pages are the source's */

static int fetch(void *ctx, uint64_t offset, void *data, uint64_t bytes, struct error *err)
{
    int r = chunk_pread(*(int *)ctx, data, bytes, offset);
    return r ? error_set(err, r, "cannot read") : 0;
}

static void touch(void *ctx)
{
    struct physmap *map = ctx;
    uint8_t *shared = physmap_get(map, 0, 1, PHYSMAP_WRITE), *remote = physmap_get(map, REMOTE, 1, PHYSMAP_WRITE);
    if (!shared || !remote || *shared != 's' || *remote != 'r')
        exit(1);
}

int main(int argc, char **argv)
{
    unsigned kind = 1;
    while (kind < 1u << SANDBOX_KINDS && argc == 3 && strcmp(argv[1], sandbox_kind_name(kind)) != 0)
        kind <<= 1;
    if (argc != 3 || kind == 1u << SANDBOX_KINDS || strcmp(argv[2], "touched") != 0)
        return 2;
    static uint64_t remote[RAM_BYTES / PAGE_SIZE_BYTES / 64];
    for (uint64_t page = REMOTE / PAGE_SIZE_BYTES; page < RAM_BYTES / PAGE_SIZE_BYTES; page++)
        remote[page / 64] |= 1ull << page % 64;
    struct physmap *map;
    struct error err = {0};
    int file = memfd_create("snapshot", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, RAM_BYTES) || pwrite(file, "s", 1, 0) != 1 || pwrite(file, "r", 1, REMOTE) != 1 || physmap_create(&map, RAM_BYTES, &err) ||
        physmap_share(map, file, &err) || physmap_set_source(map, &(struct page_source){.fetch = fetch, .ctx = &file}, remote, &err)) {
        fprintf(stderr, "no memory to touch: %s\n", err.text);
        return 3;
    }
    filtered_call(kind, touch, map);
    return 0;
}
