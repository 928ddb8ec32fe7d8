/* Guest RAM in a sparse file (ram_file.h). Works in runs of pages of one kind; pages that RAM itself does not have yet are not touched. */
#include "memory/ram_file.h"
#include "util/sandbox_rules.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

SANDBOX_ALLOW(IN_LOOP, pwrite64);
SANDBOX_ALLOW(IN_LOOP, lseek);
SANDBOX_ALLOW(IN_LOOP, ftruncate);

#define RUN_BYTES_MAX (4ull << 20) /* one write */

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, PAGE_SIZE_BYTES - 1) == 0;
}

static int write_all(int fd, const uint8_t *data, uint64_t size_bytes, uint64_t offset)
{
    while (size_bytes > 0) {
        ssize_t n = pwrite(fd, data, size_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        data += n;
        offset += (uint64_t)n;
        size_bytes -= (uint64_t)n;
    }
    return 0;
}

static int read_all(int fd, uint8_t *data, uint64_t size_bytes, uint64_t offset)
{
    while (size_bytes > 0) {
        ssize_t n = pread(fd, data, size_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        data += n;
        offset += (uint64_t)n;
        size_bytes -= (uint64_t)n;
    }
    return 0;
}

/* The next range with data in [at, end) of a sparse file, all that is left where the file system cannot tell. False: only holes. */
static bool next_data(int fd, uint64_t at, uint64_t end, uint64_t *start, uint64_t *stop)
{
    off_t data = lseek(fd, (off_t)at, SEEK_DATA), hole;
    *start = at;
    *stop = end;
    if (data < 0)
        return errno != ENXIO && at < end;
    hole = lseek(fd, data, SEEK_HOLE);
    *start = (uint64_t)data & ~PAGE_MASK_BITS;
    if (hole > 0 && (uint64_t)hole < end)
        *stop = ((uint64_t)hole + PAGE_MASK_BITS) & ~PAGE_MASK_BITS;
    return *start < end;
}

/* Pages of zeroes are holes. */
static int write_range(int fd, const uint8_t *base, uint64_t start, uint64_t stop)
{
    for (uint64_t at = start; at < stop;) {
        uint64_t run = 0;
        while (at + run < stop && run < RUN_BYTES_MAX && !is_zero(base + at + run))
            run += PAGE_SIZE_BYTES;
        int r = write_all(fd, base + at, run, at);
        if (r)
            return r;
        at += run ? run : PAGE_SIZE_BYTES;
    }
    return 0;
}

/* RAM's bytes as one range of host addresses: both parts of it lie behind each other. */
static const uint8_t *ram_base(struct physmap *map)
{
    return physmap_get(map, 0, PAGE_SIZE_BYTES, PHYSMAP_READ);
}

/* The pages whose bits are set, run by run; those of zeroes, too, or (`sparse`) as holes. */
static int write_pages(struct physmap *map, int fd, const uint64_t *bits, bool sparse)
{
    const uint8_t *base = ram_base(map);
    uint64_t pages = physmap_ram_bytes(map) / PAGE_SIZE_BYTES;
    for (uint64_t page = 0; page < pages;) {
        uint64_t first = page, start, bytes;
        while (page < pages && page - first < RUN_BYTES_MAX / PAGE_SIZE_BYTES && bits[page / 64] >> page % 64 & 1)
            page++;
        start = first * PAGE_SIZE_BYTES;
        bytes = (page - first) * PAGE_SIZE_BYTES;
        int r = bytes ? physmap_need(map, start, bytes, PHYSMAP_READ) : 0;
        if (r == 0)
            r = sparse ? write_range(fd, base, start, start + bytes) : write_all(fd, base + start, bytes, start);
        if (r)
            return r;
        page += page == first;
    }
    return 0;
}

static int write_everything(struct physmap *map, int fd)
{
    uint64_t *bits = calloc((physmap_ram_bytes(map) / PAGE_SIZE_BYTES + 63) / 64, sizeof *bits);
    if (!bits)
        return -ENOMEM;
    ram_file_pages(map, bits);
    int r = write_pages(map, fd, bits, true);
    free(bits);
    return r;
}

int ram_file_write(struct physmap *map, int fd, bool dirty_only, struct error *err)
{
    uint64_t pages = physmap_ram_bytes(map) / PAGE_SIZE_BYTES;
    uint64_t *marks = calloc((pages + 63) / 64, sizeof *marks);
    if (!marks)
        return error_set(err, -ENOMEM, "no memory to write the guest's memory");
    for (uint64_t page = 0; page < pages; page++)
        if (physmap_take_dirty(map, physmap_gpa(map, page * PAGE_SIZE_BYTES)))
            marks[page / 64] |= 1ull << page % 64;
    int r = ftruncate(fd, (off_t)physmap_ram_bytes(map)) < 0 ? -errno : 0;
    if (r == 0)
        r = dirty_only ? write_pages(map, fd, marks, false) : write_everything(map, fd);
    for (uint64_t page = 0; r && page < pages; page++)
        if (marks[page / 64] >> page % 64 & 1)
            physmap_mark_written(map, physmap_gpa(map, page * PAGE_SIZE_BYTES), PAGE_SIZE_BYTES);
    free(marks);
    return r ? error_set(err, r, "cannot write the guest's memory: %s", strerror(-r)) : 0;
}

int ram_file_read(struct physmap *map, int fd, struct error *err)
{
    uint64_t end = physmap_ram_bytes(map), start, stop;
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != end)
        return error_set(err, -EINVAL, "it has %llu bytes and the guest's memory %llu", (unsigned long long)st.st_size, (unsigned long long)end);
    for (uint64_t at = 0; at < end && next_data(fd, at, end, &start, &stop); at = stop) {
        int r = read_all(fd, (uint8_t *)(uintptr_t)ram_base(map) + start, stop - start, start);
        if (r)
            return error_set(err, r, "cannot read the guest's memory: %s", strerror(-r));
    }
    for (uint64_t at = 0; at < end; at += PAGE_SIZE_BYTES)
        (void)physmap_take_dirty(map, physmap_gpa(map, at));
    return 0;
}

void ram_file_pages(struct physmap *map, uint64_t *pages)
{
    uint64_t end = physmap_ram_bytes(map), start, stop;
    physmap_pages_elsewhere(map, pages); /* first: what comes from there meanwhile, without a mark, is found by what follows */
    for (uint64_t at = 0; at < end && next_data(physmap_fd(map), at, end, &start, &stop); at = stop)
        for (uint64_t page = start / PAGE_SIZE_BYTES; page < stop / PAGE_SIZE_BYTES; page++)
            pages[page / 64] |= 1ull << page % 64;
}
