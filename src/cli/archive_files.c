/* Files in archives. Whatever is read comes out as it was, but for what nobody wrote: holes are holes again, and no part of the sum. Threading: none. */
#include "cli/archive_files.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <xxhash.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "util/loop.h"

#define BLOCK_BYTES (256u << 10)
#define PAGE_BYTES 4096u
#define PROGRESS_NS 200000000ull

/* ---- progress ---- */

void archive_progress_begin(struct archive_progress *progress, const char *what, uint64_t all)
{
    *progress = (struct archive_progress){.what = isatty(STDERR_FILENO) && !report_is_json() && all ? what : NULL, .all = all, .shown_ns = loop_now_ns()};
}

void archive_progress_to(struct archive_progress *progress, uint64_t done)
{
    uint64_t now = progress && progress->what ? loop_now_ns() : 0;
    if (!progress)
        return;
    progress->done = done;
    if (!progress->what || now - progress->shown_ns < PROGRESS_NS)
        return;
    progress->shown_ns = now;
    fprintf(stderr, "\r%s: %3d %% ", progress->what, (int)((double)done / (double)progress->all * 100));
}

void archive_progress_end(struct archive_progress *progress)
{
    if (progress->what)
        fprintf(stderr, "\r\033[K");
    progress->what = NULL;
}

static void progress_by(struct archive_progress *progress, uint64_t bytes)
{
    if (progress)
        archive_progress_to(progress, progress->done + bytes);
}

/* ---- writing ---- */

/* The next part from *at on that has data: false at the end. What cannot tell its holes has none. */
static bool next_data(int fd, uint64_t size, uint64_t *at, uint64_t *end)
{
    if (*at >= size)
        return false;
    off_t data = lseek(fd, (off_t)*at, SEEK_DATA), hole = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
    if (data < 0 && errno == ENXIO)
        return false;
    *end = hole < 0 ? size : (uint64_t)hole;
    if (data >= 0)
        *at = (uint64_t)data;
    if (*end > size)
        *end = size;
    return *at < *end;
}

static void note_data(int fd, uint64_t size, struct archive_entry *entry)
{
    uint64_t at = 0, end;
    bool any = false, whole = false;
    while (next_data(fd, size, &at, &end)) {
        archive_entry_sparse_add_entry(entry, (int64_t)at, (int64_t)(end - at));
        any = true;
        whole = at == 0 && end == size;
        at = end;
    }
    if (whole)
        archive_entry_sparse_clear(entry);
    else if (!any && size)
        archive_entry_sparse_add_entry(entry, (int64_t)size, 0);
}

/* Holes are not read: on large images that would be most of the time. */
static int put_data(struct archive *out, int fd, uint64_t size, const char *path, struct archive_progress *progress)
{
    uint8_t *block = malloc(BLOCK_BYTES), *zeroes = calloc(1, BLOCK_BYTES);
    uint64_t data = 0, end = 0; /* the next part with data */
    int r = block && zeroes ? 0 : complain(STATUS_ERROR, "out of memory");
    for (uint64_t done = 0; r == 0 && done < size;) {
        if (done >= end) {
            data = done;
            if (!next_data(fd, size, &data, &end))
                data = end = size;
        }
        bool hole = done < data;
        uint64_t left = (hole ? data : end) - done;
        size_t bytes = left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES;
        ssize_t n = hole ? (ssize_t)bytes : pread(fd, block, bytes, (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            r = complain(STATUS_ERROR, "cannot read %s: %s", path, n < 0 ? strerror(errno) : "it shrank meanwhile");
        else if (archive_write_data(out, hole ? zeroes : block, (size_t)n) < n)
            r = complain(STATUS_ERROR, "cannot write the export: %s", archive_error_string(out));
        done += n > 0 ? (uint64_t)n : 0;
        progress_by(progress, n > 0 ? (uint64_t)n : 0);
    }
    free(zeroes);
    free(block);
    return r;
}

static struct archive_entry *new_entry(const char *name, uint64_t size, time_t changed)
{
    struct archive_entry *entry = archive_entry_new();
    if (!entry)
        return NULL;
    archive_entry_set_pathname(entry, name);
    archive_entry_set_filetype(entry, AE_IFREG);
    archive_entry_set_perm(entry, 0600);
    archive_entry_set_mtime(entry, changed, 0);
    archive_entry_set_size(entry, (int64_t)size);
    return entry;
}

int archive_put_file(struct archive *out, int fd, uint64_t size_bytes, time_t changed, const char *name, const char *path, struct archive_progress *progress)
{
    struct archive_entry *entry = new_entry(name, size_bytes, changed);
    if (!entry)
        return complain(STATUS_ERROR, "out of memory");
    note_data(fd, size_bytes, entry);
    int r = archive_write_header(out, entry) == ARCHIVE_OK ? put_data(out, fd, size_bytes, path, progress)
                                                           : complain(STATUS_ERROR, "cannot write the export: %s", archive_error_string(out));
    archive_entry_free(entry);
    return r;
}

int archive_put_text(struct archive *out, const char *text, const char *name)
{
    size_t length = strlen(text);
    struct archive_entry *entry = new_entry(name, length, time(NULL));
    if (!entry)
        return complain(STATUS_ERROR, "out of memory");
    bool good = archive_write_header(out, entry) == ARCHIVE_OK && archive_write_data(out, text, length) == (la_ssize_t)length;
    archive_entry_free(entry);
    return good ? 0 : complain(STATUS_ERROR, "cannot write the export: %s", archive_error_string(out));
}

/* ---- reading ---- */

static bool is_zero(const uint8_t *data, size_t bytes)
{
    return data[0] == 0 && memcmp(data, data + 1, bytes - 1) == 0;
}

static int write_all(int fd, const uint8_t *data, size_t bytes, uint64_t at)
{
    while (bytes) {
        ssize_t n = pwrite(fd, data, bytes, (off_t)at);
        if (n < 0 && errno != EINTR)
            return -errno;
        data += n > 0 ? n : 0;
        bytes -= n > 0 ? (size_t)n : 0;
        at += n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* In pieces of at most a page. */
int archive_write_sparse(int fd, const uint8_t *data, size_t bytes, uint64_t at)
{
    int r = 0;
    while (r == 0 && bytes) {
        size_t run = 0, piece;
        for (; run < bytes; run += piece) {
            piece = PAGE_BYTES - (at + run) % PAGE_BYTES;
            piece = piece < bytes - run ? piece : bytes - run;
            if (is_zero(data + run, piece))
                break;
        }
        r = write_all(fd, data, run, at);
        if (run < bytes)
            run += piece; /* the piece of zeroes */
        data += run;
        bytes -= run;
        at += run;
    }
    return r;
}

static int take_data(struct archive *in, struct archive_entry *entry, int fd, const char *file, const char *from, struct archive_progress *progress)
{
    const uint64_t size = (uint64_t)archive_entry_size(entry);
    const void *data;
    size_t bytes;
    la_int64_t at;
    int code, r = 0;
    if (ftruncate(fd, (off_t)size)) /* first: a size that cannot be is found out before anything is written */
        return complain(STATUS_ERROR, "cannot write %s: %s", file, strerror(errno));
    while ((code = archive_read_data_block(in, &data, &bytes, &at)) == ARCHIVE_OK && r == 0) {
        if (at < 0 || (uint64_t)at > size || bytes > size - (uint64_t)at)
            return complain(STATUS_ERROR, "%s: %s is longer than it says", from, file);
        r = bytes ? archive_write_sparse(fd, data, bytes, (uint64_t)at) : 0;
        archive_progress_to(progress, (uint64_t)archive_filter_bytes(in, -1));
    }
    if (r)
        return complain(STATUS_ERROR, "cannot write %s: %s", file, strerror(-r));
    return code == ARCHIVE_EOF ? 0 : complain(STATUS_ERROR, "cannot read %s of %s: %s", file, from, archive_error_string(in));
}

int archive_take_file(struct archive *in, struct archive_entry *entry, int directory, const char *file, const char *from, struct archive_progress *progress)
{
    int fd = openat(directory, file, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        complain(0, "cannot write %s: %s", file, strerror(errno));
        return -1;
    }
    if (take_data(in, entry, fd, file, from, progress) == 0)
        return fd;
    close(fd);
    return -1;
}

/* ---- sums ---- */

static void add_pages(XXH3_state_t *state, uint8_t *block, size_t bytes, uint64_t at)
{
    memset(block + bytes, 0, (PAGE_BYTES - bytes % PAGE_BYTES) % PAGE_BYTES);
    for (size_t n = 0; n < bytes; n += PAGE_BYTES) {
        uint64_t offset = htole64(at + n);
        if (is_zero(block + n, PAGE_BYTES))
            continue;
        XXH3_128bits_update(state, &offset, sizeof offset);
        XXH3_128bits_update(state, block + n, PAGE_BYTES);
    }
}

int archive_sum(int fd, uint64_t size_bytes, const char *path, char sum[ARCHIVE_SUM_BYTES], struct archive_progress *progress)
{
    const uint64_t before = progress ? progress->done : 0;
    uint8_t *block = malloc(BLOCK_BYTES);
    XXH3_state_t *state = XXH3_createState();
    uint64_t at = 0, end;
    int r = block && state ? 0 : complain(STATUS_ERROR, "out of memory");
    if (r == 0)
        XXH3_128bits_reset(state);
    while (r == 0 && next_data(fd, size_bytes, &at, &end)) {
        at -= at % PAGE_BYTES;
        while (r == 0 && at < end) { /* whole pages, whatever the host's blocks are */
            uint64_t want = size_bytes - at < BLOCK_BYTES ? size_bytes - at : BLOCK_BYTES;
            size_t got = 0;
            for (ssize_t n = 1; got < want && n; got += n > 0 ? (size_t)n : 0) {
                n = pread(fd, block + got, (size_t)want - got, (off_t)(at + got));
                if (n < 0 && errno != EINTR)
                    break;
            }
            if (got < want)
                r = complain(STATUS_ERROR, "cannot read %s", path);
            else
                add_pages(state, block, got, at);
            at += want;
            archive_progress_to(progress, before + at);
        }
    }
    archive_progress_to(progress, before + size_bytes);
    if (r == 0) {
        XXH128_canonical_t canonical;
        XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state));
        for (unsigned i = 0; i < sizeof canonical.digest; i++)
            snprintf(sum + 2 * i, 3, "%02x", canonical.digest[i]);
    }
    XXH3_freeState(state);
    free(block);
    return r;
}
