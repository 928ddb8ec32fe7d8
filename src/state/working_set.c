/* Files of working sets (working_set.h). All numbers are little-endian; what is read is checked as a whole before any of it counts. */
#include "state/working_set.h"

#include <endian.h>
#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <xxhash.h>

#define MAGIC "DOPPELWS"
#define VERSION 1u
#define CHECKED_FROM (offsetof(struct header, check) + sizeof(uint64_t)) /* what the checksum is of */

struct header {
    char magic[8];
    uint32_t version, runs;
    uint64_t check; /* XXH3, 64 bits, of all that follows */
    uint8_t id[16];
    uint64_t page_count; /* of the memory */
    uint64_t zero[2];
};
_Static_assert(sizeof(struct header) == 64, "docs/formats.md");

struct run {
    uint32_t first, count;
};

static uint64_t check_of(const void *data, size_t size_bytes)
{
    return XXH3_64bits((const uint8_t *)data + CHECKED_FROM, size_bytes - CHECKED_FROM);
}

static bool header_is_good(const struct header *header, const void *data, size_t size_bytes, const struct chunk_id *id, uint64_t page_count)
{
    uint32_t runs = le32toh(header->runs);
    return memcmp(header->magic, MAGIC, sizeof header->magic) == 0 && le32toh(header->version) == VERSION && runs <= WORKING_SET_RUNS_MAX &&
           size_bytes == sizeof *header + runs * sizeof(struct run) && le64toh(header->check) == check_of(data, size_bytes) && memcmp(header->id, id->bytes, sizeof header->id) == 0 &&
           le64toh(header->page_count) == page_count && !header->zero[0] && !header->zero[1];
}

static struct run run_at(const void *data, uint32_t index)
{
    struct run run;
    memcpy(&run, (const uint8_t *)data + sizeof(struct header) + index * sizeof run, sizeof run);
    return (struct run){le32toh(run.first), le32toh(run.count)};
}

int64_t working_set_read(const void *data, size_t size_bytes, const struct chunk_id *id, uint64_t page_count, uint64_t *pages)
{
    struct header header;
    uint64_t end = 0;
    int64_t total = 0;
    if (size_bytes < sizeof header || size_bytes > WORKING_SET_BYTES_MAX)
        return -EINVAL;
    memcpy(&header, data, sizeof header);
    if (!header_is_good(&header, data, size_bytes, id, page_count))
        return -EINVAL;
    for (uint32_t i = 0; i < le32toh(header.runs); i++) { /* ascending, not empty, inside */
        struct run run = run_at(data, i);
        if (!run.count || run.first < end || (uint64_t)run.first + run.count > page_count)
            return -EINVAL;
        end = (uint64_t)run.first + run.count;
        total += run.count;
    }
    for (uint32_t i = 0; i < le32toh(header.runs); i++) {
        struct run run = run_at(data, i);
        for (uint64_t page = run.first; page < (uint64_t)run.first + run.count; page++)
            pages[page / 64] |= 1ull << page % 64;
    }
    return total;
}

static bool has(const uint64_t *pages, uint64_t page)
{
    return pages[page / 64] >> page % 64 & 1;
}

/* The next run from *page on; false when there is none. */
static bool next_run(const uint64_t *pages, uint64_t page_count, uint64_t *page, struct run *run)
{
    uint64_t first = *page;
    while (first < page_count && !has(pages, first))
        first = pages[first / 64] ? first + 1 : (first / 64 + 1) * 64;
    uint64_t end = first;
    while (end < page_count && has(pages, end))
        end++;
    *page = end;
    if (first >= page_count || end > UINT32_MAX)
        return false;
    *run = (struct run){htole32((uint32_t)first), htole32((uint32_t)(end - first))};
    return true;
}

void *working_set_make(const uint64_t *pages, uint64_t page_count, const struct chunk_id *id, size_t *size_bytes)
{
    struct header header = {.magic = MAGIC, .version = htole32(VERSION), .page_count = htole64(page_count)};
    struct run run;
    uint32_t runs = 0;
    for (uint64_t page = 0; runs < WORKING_SET_RUNS_MAX && next_run(pages, page_count, &page, &run);)
        runs++;
    *size_bytes = sizeof header + runs * sizeof run;
    uint8_t *data = malloc(*size_bytes);
    if (!data)
        return NULL;
    memcpy(header.id, id->bytes, sizeof header.id);
    header.runs = htole32(runs);
    uint64_t page = 0;
    for (uint32_t i = 0; i < runs && next_run(pages, page_count, &page, &run); i++)
        memcpy(data + sizeof header + i * sizeof run, &run, sizeof run);
    memcpy(data, &header, sizeof header);
    uint64_t check = htole64(check_of(data, *size_bytes));
    memcpy(data + offsetof(struct header, check), &check, sizeof check);
    return data;
}
