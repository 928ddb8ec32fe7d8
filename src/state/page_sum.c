/* Checksums of raw memory files (page_sum.h). */
#include "state/page_sum.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <xxhash.h>

#define BLOCK_BYTES (256u << 10)

struct page_sum {
    uint64_t pages;
    uint64_t of[]; /* 0: all zero */
};

static uint64_t pages_of(uint64_t size_bytes)
{
    return (size_bytes + PAGE_SUM_BYTES - 1) / PAGE_SUM_BYTES;
}

struct page_sum *page_sum_create(uint64_t size_bytes)
{
    struct page_sum *sum = calloc(1, sizeof *sum + pages_of(size_bytes) * sizeof sum->of[0]);
    if (sum)
        sum->pages = pages_of(size_bytes);
    return sum;
}

void page_sum_destroy(struct page_sum *sum)
{
    free(sum);
}

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, PAGE_SUM_BYTES - 1) == 0;
}

void page_sum_put(struct page_sum *sum, uint64_t page, const uint8_t *data)
{
    sum->of[page] = is_zero(data) ? 0 : XXH3_64bits(data, PAGE_SUM_BYTES);
}

static void write_text(XXH128_hash_t hash, char text[PAGE_SUM_TEXT_BYTES])
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, hash);
    for (unsigned i = 0; i < sizeof canonical.digest; i++)
        snprintf(text + 2 * i, 3, "%02x", canonical.digest[i]);
}

void page_sum_text(const struct page_sum *sum, char text[PAGE_SUM_TEXT_BYTES])
{
    write_text(XXH3_128bits(sum->of, sum->pages * sizeof sum->of[0]), text);
}

void page_sum_bytes(const void *data, size_t size_bytes, char text[PAGE_SUM_TEXT_BYTES])
{
    write_text(XXH3_128bits(data, size_bytes), text);
}

static int read_block(int fd, const char *path, uint8_t *block, size_t bytes, uint64_t at, struct error *err)
{
    for (size_t got = 0; got < bytes;) {
        ssize_t n = pread(fd, block + got, bytes - got, (off_t)(at + got));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return error_set(err, n < 0 ? -errno : -EBADMSG, "cannot read %s: %s", path, n < 0 ? strerror(errno) : "it is cut short");
        got += (size_t)n;
    }
    return 0;
}

/* *at goes to the page of the next data, or to the end. A file system that cannot tell has no holes. */
static void skip_hole(int fd, uint64_t *at, uint64_t size_bytes)
{
    off_t data = lseek(fd, (off_t)*at, SEEK_DATA);
    if (data < 0 && errno == ENXIO && lseek(fd, 0, SEEK_END) >= (off_t)size_bytes)
        *at = size_bytes;
    else if (data > (off_t)*at)
        *at = (uint64_t)data - (uint64_t)data % PAGE_SUM_BYTES;
}

int page_sum_file(int fd, const char *path, uint64_t size_bytes, char text[PAGE_SUM_TEXT_BYTES], struct error *err)
{
    struct page_sum *sum = page_sum_create(size_bytes);
    uint8_t *block = malloc(BLOCK_BYTES);
    uint64_t at = 0;
    int r = sum && block ? 0 : error_set(err, -ENOMEM, "no memory to check %s", path);
    for (; r == 0 && at < size_bytes; skip_hole(fd, &at, size_bytes)) {
        size_t bytes = size_bytes - at < BLOCK_BYTES ? (size_t)(size_bytes - at) : BLOCK_BYTES;
        r = read_block(fd, path, block, bytes, at, err);
        memset(block + bytes, 0, (PAGE_SUM_BYTES - bytes % PAGE_SUM_BYTES) % PAGE_SUM_BYTES);
        for (size_t n = 0; r == 0 && n < bytes; n += PAGE_SUM_BYTES)
            page_sum_put(sum, (at + n) / PAGE_SUM_BYTES, block + n);
        at += bytes;
    }
    if (r == 0)
        page_sum_text(sum, text);
    page_sum_destroy(sum);
    free(block);
    return r;
}
