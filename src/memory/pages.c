/*
 * Page states (pages.h): which pages of RAM are in the memfd (private), which in a file that windows show instead (shared), which nowhere yet (remote).
 *
 * Shared pages need nothing of engines: each window has the file's range mapped, read-only, in place of the memfd's. A write intent copies a run of pages into the memfd and maps that over
 * them in every window. Host addresses never change, and the kernel's own shootdown makes it coherent: nobody stores to a page before all windows show the same memory again, and until
 * then both hold the same bytes. Mappings are scarce (vm.max_map_count): runs grow with what was copied before them, and when many islands exist.
 * Remote pages are fetched into the memfd behind the windows' back; no engine knows an address in them before its look-up has returned.
 * Threading: bits are read without the lock (acquire) and cleared under it (release) when the bytes are there. Fetching is done without the lock; `fetching` has those under way.
 */
#include "memory/pages.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory/vector_save.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_GUEST | IN_API | IN_SHARE | IN_MAIN, pwrite64);
SANDBOX_ALLOW(IN_GUEST | IN_API | IN_SHARE | IN_MAIN, lseek);

#define GROUP_PAGES (PAGE_SOURCE_BYTES / PAGE_SIZE_BYTES) /* fetched together; divides 64 */
#define COPY_PAGES 16u                                    /* copied together when mappings get scarcer */
#define REGION_PAGES 512u                                 /* holes become private by these */
#define RUN_PAGES_MAX 16u
#define SHRUNK "the file with the guest's memory has not the size it had"
#define MAPPINGS_DEFAULT 65530u
#define MAPPINGS_A_PIECE 2u /* that an island costs in each window */

void pages_init(struct pages *pages)
{
    *pages = (struct pages){.ram_fd = -1, .file_fd = -1, .vector_components = vector_save_components()};
    pthread_mutex_init(&pages->lock, NULL);
    pthread_cond_init(&pages->arrived, NULL);
}

static void source_close(struct pages *pages)
{
    bool had = pages->has_source;
    pages->has_source = false;
    if (had && pages->source.close)
        pages->source.close(pages->source.ctx);
}

void pages_destroy(struct pages *pages)
{
    source_close(pages);
    if (pages->file_fd >= 0)
        close(pages->file_fd);
    free((void *)pages->remote);
    free((void *)pages->shared);
    free((void *)pages->touched);
    free((void *)pages->guarded);
    free(pages->fetching);
    pthread_cond_destroy(&pages->arrived);
    pthread_mutex_destroy(&pages->lock);
}

/* ---- bits ---- */

static uint64_t words(const struct pages *pages)
{
    return (pages->page_count + 63) / 64;
}

static uint64_t word_bits(uint64_t word, uint64_t first, uint64_t last)
{
    uint64_t bits = ~0ull;
    if (word == first / 64)
        bits &= ~0ull << first % 64;
    if (word == last / 64)
        bits &= ~0ull >> (63 - last % 64);
    return bits;
}

static bool is_set(const _Atomic uint64_t *bits, uint64_t page)
{
    return atomic_load_explicit(&bits[page / 64], memory_order_acquire) >> page % 64 & 1;
}

static bool is_fetching(const struct pages *pages, uint64_t page)
{
    return pages->fetching[page / 64] >> page % 64 & 1;
}

/* Returns how many were set. */
static uint64_t clear(_Atomic uint64_t *bits, uint64_t first, uint64_t count)
{
    uint64_t cleared = 0;
    for (uint64_t word = first / 64; count && word <= (first + count - 1) / 64; word++) {
        uint64_t mask = word_bits(word, first, first + count - 1);
        cleared += (uint64_t)__builtin_popcountll(atomic_fetch_and(&bits[word], ~mask) & mask);
    }
    return cleared;
}

static int bits_make(struct pages *pages)
{
    if (pages->remote)
        return 0;
    pages->remote = calloc(words(pages), sizeof *pages->remote);
    pages->shared = calloc(words(pages), sizeof *pages->shared);
    pages->touched = calloc(words(pages), sizeof *pages->touched);
    pages->fetching = calloc(words(pages), sizeof *pages->fetching);
    pages->guarded = calloc(words(pages), sizeof *pages->guarded);
    return pages->remote && pages->shared && pages->touched && pages->guarded && pages->fetching ? 0 : -ENOMEM;
}

/* ---- windows ---- */

static int map_range(const struct pages_window *window, uint64_t first, uint64_t count, bool writable, int fd)
{
    uint8_t *at = window->at + first * PAGE_SIZE_BYTES;
    int prot = writable ? window->prot : window->prot & ~PROT_WRITE;
    if (mmap(at, count * PAGE_SIZE_BYTES, prot, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, (off_t)(first * PAGE_SIZE_BYTES)) == MAP_FAILED)
        return -errno;
    /* A core dump of the VMM is about the VMM. Kernels without the advice lose nothing. With the same advice as around it, it becomes one with its neighbours. */
    (void)madvise(at, count * PAGE_SIZE_BYTES, MADV_DONTDUMP);
    return 0;
}

/* The end of the run of pages from `page` on, below `end`, whose bits are so. */
static uint64_t run_end(const _Atomic uint64_t *bits, uint64_t page, uint64_t end, bool set)
{
    while (page < end && is_set(bits, page) == set)
        page++;
    return page;
}

/* Guarded pages are never writable, not even between two calls: a store that nobody notices would be one that translations of them miss. */
static int window_show_ram(const struct pages *pages, unsigned i, uint64_t first, uint64_t end)
{
    int r = 0;
    if (i != pages->guarding)
        return map_range(&pages->window[i], first, end - first, true, pages->ram_fd);
    while (r == 0 && first < end) {
        bool guarded = is_set(pages->guarded, first);
        uint64_t stop = run_end(pages->guarded, first, end, guarded);
        r = map_range(&pages->window[i], first, stop - first, !guarded, pages->ram_fd);
        first = stop;
    }
    return r;
}

/* All windows show RAM's file there. Counts islands of private pages among shared ones. */
static int show_ram(struct pages *pages, uint64_t first, uint64_t count)
{
    uint64_t end = first + count;
    for (unsigned i = 0; i < PAGES_WINDOWS_MAX; i++) {
        int r = pages->window[i].at ? window_show_ram(pages, i, first, end) : 0;
        if (r)
            return r;
    }
    bool before = first && !is_set(pages->shared, first - 1), after = end < pages->page_count && !is_set(pages->shared, end);
    if (!before && !after)
        pages->islands++;
    else if (before && after && pages->islands)
        pages->islands--;
    pages->shared_left -= clear(pages->shared, first, count);
    return 0;
}

int pages_window_add(struct pages *pages, void *at, int prot)
{
    pthread_mutex_lock(&pages->lock);
    struct pages_window window = {at, prot};
    unsigned i = 0;
    while (i < PAGES_WINDOWS_MAX && pages->window[i].at)
        i++;
    int r = i == PAGES_WINDOWS_MAX ? -ENOSPC : map_range(&window, 0, pages->page_count, true, pages->ram_fd);
    for (uint64_t page = 0; r == 0 && pages->shared_left && page < pages->page_count;) {
        uint64_t first = run_end(pages->shared, page, pages->page_count, false);
        page = run_end(pages->shared, first, pages->page_count, true);
        if (page > first)
            r = map_range(&window, first, page - first, false, pages->file_fd);
    }
    if (r == 0)
        pages->window[i] = window;
    pthread_mutex_unlock(&pages->lock);
    return r;
}

void pages_window_remove(struct pages *pages, const void *at)
{
    pthread_mutex_lock(&pages->lock);
    for (unsigned i = 0; i < PAGES_WINDOWS_MAX; i++)
        if (pages->window[i].at == at)
            pages->window[i].at = NULL;
    pthread_mutex_unlock(&pages->lock);
}

int pages_guard(struct pages *pages, const void *at, uint64_t offset, uint64_t bytes, bool on)
{
    uint64_t first = offset / PAGE_SIZE_BYTES, end = first + bytes / PAGE_SIZE_BYTES;
    int r = 0;
    pthread_mutex_lock(&pages->lock);
    for (unsigned i = 0; i < PAGES_WINDOWS_MAX; i++)
        if (pages->window[i].at == at)
            pages->guarding = i;
    const struct pages_window *window = &pages->window[pages->guarding];
    for (uint64_t page = first; r == 0 && page < end;) { /* what is shared cannot be stored to anyway */
        uint64_t from = run_end(pages->shared, page, end, true);
        page = run_end(pages->shared, from, end, false);
        if (page > from && mprotect(window->at + from * PAGE_SIZE_BYTES, (page - from) * PAGE_SIZE_BYTES, on ? window->prot & ~PROT_WRITE : window->prot) < 0)
            r = -errno;
    }
    for (uint64_t word = first / 64; r == 0 && word <= (end - 1) / 64; word++) {
        if (on)
            atomic_fetch_or(&pages->guarded[word], word_bits(word, first, end - 1));
        else
            atomic_fetch_and(&pages->guarded[word], ~word_bits(word, first, end - 1));
    }
    pthread_mutex_unlock(&pages->lock);
    return r;
}

/* ---- where pages come from ---- */

static uint64_t host_mappings_max(void)
{
    char text[32] = "";
    int fd = open("/proc/sys/vm/max_map_count", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd >= 0 ? read(fd, text, sizeof text - 1) : 0;
    if (fd >= 0)
        close(fd);
    unsigned long long value = n > 0 ? strtoull(text, NULL, 10) : 0;
    return value ? value : MAPPINGS_DEFAULT;
}

int pages_share(struct pages *pages, int fd, struct error *err)
{
    struct stat st;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || (uint64_t)st.st_size != pages->page_count * PAGE_SIZE_BYTES)
        return error_set(err, -EINVAL, "it has %llu bytes and the guest's memory %llu", (unsigned long long)st.st_size,
                         (unsigned long long)(pages->page_count * PAGE_SIZE_BYTES));
    int r = bits_make(pages);
    if (r)
        return error_set(err, r, "no memory for the guest's page maps");
    pages->file_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (pages->file_fd < 0)
        return error_set(err, -errno, "cannot keep it open: %s", strerror(errno));
    pages->mappings_max = host_mappings_max();
    pages->islands = 0;
    for (unsigned i = 0; r == 0 && i < PAGES_WINDOWS_MAX; i++)
        if (pages->window[i].at)
            r = map_range(&pages->window[i], 0, pages->page_count, false, pages->file_fd);
    if (r)
        return error_set(err, r, "cannot map it: %s", strerror(-r));
    for (uint64_t word = 0; word < words(pages); word++)
        atomic_store(&pages->shared[word], word_bits(word, 0, pages->page_count - 1));
    pages->shared_left = pages->page_count;
    return 0;
}

int pages_set_source(struct pages *pages, const struct page_source *source, const uint64_t *remote, struct error *err)
{
    if (pages->has_source)
        return error_set(err, -EBUSY, "the guest's memory comes from somewhere already");
    if (bits_make(pages))
        return error_set(err, -ENOMEM, "no memory for the guest's page maps");
    pages->source = *source;
    pages->has_source = true;
    for (uint64_t word = 0; word < words(pages); word++) {
        uint64_t bits = remote[word] & word_bits(word, 0, pages->page_count - 1);
        atomic_store(&pages->remote[word], bits);
        pages->remote_left += (uint64_t)__builtin_popcountll(bits);
    }
    if (!pages->remote_left)
        source_close(pages);
    return 0;
}

/* ---- transitions, with the lock held ---- */

/* It is let go meanwhile. Always an error. */
static int fail(struct pages *pages, int code, const char *text)
{
    bool first = !pages->failed;
    pages->failed = true;
    pthread_cond_broadcast(&pages->arrived);
    pthread_mutex_unlock(&pages->lock);
    if (first && pages->on_failure)
        pages->on_failure(pages->failure_ctx, text);
    pthread_mutex_lock(&pages->lock);
    return code;
}

static int fail_at(struct pages *pages, int code, const char *what, uint64_t page)
{
    struct error err;
    error_set(&err, code, "%s (at offset 0x%llx): %s", what, (unsigned long long)(page * PAGE_SIZE_BYTES), strerror(-code));
    return fail(pages, code, err.text);
}

/* Nothing is remote any more: the source can go. */
static void see_end(struct pages *pages)
{
    if (pages->remote_left || !pages->has_source)
        return;
    pages->has_source = false;
    pthread_mutex_unlock(&pages->lock);
    if (pages->source.close)
        pages->source.close(pages->source.ctx);
    pthread_mutex_lock(&pages->lock);
}

static bool can_fetch(const struct pages *pages, uint64_t page)
{
    return is_set(pages->remote, page) && !is_fetching(pages, page);
}

static void fetching_set(struct pages *pages, uint64_t first, uint64_t count, bool on)
{
    uint64_t bits = word_bits(first / 64, first, first + count - 1); /* all in one word */
    pages->fetching[first / 64] = on ? pages->fetching[first / 64] | bits : pages->fetching[first / 64] & ~bits;
}

/* The page and its neighbours that are as far. The lock is let go meanwhile. */
static int fetch_around(struct pages *pages, uint64_t page)
{
    uint64_t group = pages->source.group_bytes ? pages->source.group_bytes / PAGE_SIZE_BYTES : GROUP_PAGES;
    uint64_t low = page & ~(group - 1), high = low + group, first = page, end = page + 1;
    struct error err = {0};
    while (first > low && can_fetch(pages, first - 1))
        first--;
    while (end < high && end < pages->page_count && can_fetch(pages, end))
        end++;
    for (uint64_t at = first; at < end; at++)
        if (is_set(pages->shared, at)) {
            int r = show_ram(pages, at, 1);
            if (r)
                return fail_at(pages, r, "cannot map the guest's memory", at);
        }
    fetching_set(pages, first, end - first, true);
    pthread_mutex_unlock(&pages->lock);
    int r = pages->source.fetch(pages->source.ctx, first * PAGE_SIZE_BYTES, pages->window[0].at + first * PAGE_SIZE_BYTES, (end - first) * PAGE_SIZE_BYTES, &err);
    pthread_mutex_lock(&pages->lock);
    fetching_set(pages, first, end - first, false);
    if (r == 0)
        pages->remote_left -= clear(pages->remote, first, end - first);
    pthread_cond_broadcast(&pages->arrived);
    return r ? fail(pages, r < 0 ? r : -EIO, err.text) : 0;
}

static int fetch(struct pages *pages, uint64_t page)
{
    int r = 0;
    while (r == 0 && is_set(pages->remote, page)) {
        if (is_fetching(pages, page))
            pthread_cond_wait(&pages->arrived, &pages->lock);
        else
            r = pages->failed ? -EIO : fetch_around(pages, page);
    }
    see_end(pages);
    return r;
}

/* The hole of the file around `page`, inside its region. False: there are bytes. */
static bool find_hole(const struct pages *pages, uint64_t page, uint64_t *first, uint64_t *end)
{
    uint64_t low = page & ~(uint64_t)(REGION_PAGES - 1), high = low + REGION_PAGES;
    high = high < pages->page_count ? high : pages->page_count;
    if (lseek(pages->file_fd, (off_t)(page * PAGE_SIZE_BYTES), SEEK_DATA) == (off_t)(page * PAGE_SIZE_BYTES))
        return false; /* as usual */
    for (uint64_t at = low; at <= page;) {
        off_t data = lseek(pages->file_fd, (off_t)(at * PAGE_SIZE_BYTES), SEEK_DATA), hole;
        uint64_t data_page = data >= 0 ? (uint64_t)data / PAGE_SIZE_BYTES : errno == ENXIO ? high : page;
        if (data_page > page) {
            *first = at;
            *end = data_page < high ? data_page : high;
            return true;
        }
        hole = data >= 0 ? lseek(pages->file_fd, data, SEEK_HOLE) : -1;
        if (hole < 0)
            return false;
        at = ((uint64_t)hole + PAGE_MASK_BITS) / PAGE_SIZE_BYTES;
    }
    return false;
}

/* How many pages are copied at once, at least: more when mappings get scarce, so that they suffice however the guest writes. A power of two. */
static uint64_t granule(const struct pages *pages)
{
    unsigned windows = 0;
    for (unsigned i = 0; i < PAGES_WINDOWS_MAX; i++)
        windows += pages->window[i].at != NULL;
    uint64_t used = pages->islands * windows * MAPPINGS_A_PIECE, all = pages->mappings_max, last = REGION_PAGES;
    if (used < all / 4)
        return 1;
    if (used < all / 2)
        return COPY_PAGES;
    while (pages->page_count / last * windows * MAPPINGS_A_PIECE > all / 4)
        last *= 2;
    return last;
}

/* The run of shared pages around `page` in [low, high). Pages that are remote, too, are not for copying. */
static void clip_to_shared(const struct pages *pages, uint64_t page, uint64_t *low, uint64_t *high)
{
    uint64_t first = page, end = page + 1;
    while (first > *low && is_set(pages->shared, first - 1) && !is_set(pages->remote, first - 1))
        first--;
    while (end < *high && is_set(pages->shared, end) && !is_set(pages->remote, end))
        end++;
    *low = first;
    *high = end;
}

/* What is copied with `page`: as many as are private before it, as long as it goes up. */
static void choose_run(const struct pages *pages, uint64_t page, uint64_t *first, uint64_t *end)
{
    uint64_t size = granule(pages), before = 0;
    while (before < RUN_PAGES_MAX && before < page && !is_set(pages->shared, page - 1 - before))
        before++;
    *first = page & ~(size - 1);
    *end = *first + size > page + before ? *first + size : page + before;
    *end = *end < pages->page_count ? *end : pages->page_count;
}

static int copy_run(struct pages *pages, uint64_t first, uint64_t end)
{
    /* By the kernel, from the window: what is not in the file any more is an error here, and a signal otherwise. */
    for (uint64_t at = first * PAGE_SIZE_BYTES; at < end * PAGE_SIZE_BYTES;) {
        ssize_t n = pwrite(pages->ram_fd, pages->window[0].at + at, end * PAGE_SIZE_BYTES - at, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        at += (uint64_t)n;
    }
    return 0;
}

static int make_private(struct pages *pages, uint64_t page)
{
    uint64_t first, end;
    bool hole = find_hole(pages, page, &first, &end);
    if (hole && lseek(pages->file_fd, 0, SEEK_END) != (off_t)(pages->page_count * PAGE_SIZE_BYTES)) /* its end would look like a hole */
        return fail_at(pages, -EFAULT, SHRUNK, page);
    if (!hole)
        choose_run(pages, page, &first, &end);
    clip_to_shared(pages, page, &first, &end);
    int r = hole ? 0 : copy_run(pages, first, end);
    if (r)
        return fail_at(pages, r, r == -EFAULT ? SHRUNK : "cannot copy a page of the snapshot's memory file", page);
    r = show_ram(pages, first, end - first);
    return r ? fail_at(pages, r, "cannot map the guest's memory", page) : 0;
}

/* ---- intents ---- */

static int need_slowly(struct pages *pages, uint64_t first, uint64_t last, enum physmap_intent intent)
{
    int r = 0;
    pthread_mutex_lock(&pages->lock);
    for (uint64_t page = first; r == 0 && page <= last; page++) {
        if (is_set(pages->remote, page))
            r = fetch(pages, page);
        if (r == 0 && intent == PHYSMAP_WRITE && is_set(pages->shared, page))
            r = pages->failed ? -EIO : make_private(pages, page);
    }
    pthread_mutex_unlock(&pages->lock);
    return r;
}

int pages_need(struct pages *pages, uint64_t offset, uint64_t bytes, enum physmap_intent intent)
{
    uint64_t first = offset / PAGE_SIZE_BYTES, last = bytes ? (offset + bytes - 1) / PAGE_SIZE_BYTES : first;
    bool ready = true;
    for (uint64_t word = first / 64; word <= last / 64; word++) {
        uint64_t bits = word_bits(word, first, last);
        uint64_t remote = atomic_load_explicit(&pages->remote[word], memory_order_acquire) & bits;
        uint64_t shared = atomic_load_explicit(&pages->shared[word], memory_order_acquire) & bits;
        uint64_t news = (remote | shared) & ~atomic_load_explicit(&pages->touched[word], memory_order_relaxed);
        if (news)
            atomic_fetch_or_explicit(&pages->touched[word], news, memory_order_relaxed);
        ready = ready && !remote && !(intent == PHYSMAP_WRITE && shared);
    }
    if (ready)
        return 0;
    struct vector_save vectors;
    vector_save(&vectors, pages->vector_components);
    int r = need_slowly(pages, first, last, intent);
    vector_restore(&vectors);
    return r;
}

bool pages_are_private(const struct pages *pages, uint64_t offset, uint64_t bytes)
{
    uint64_t first = offset / PAGE_SIZE_BYTES, last = bytes ? (offset + bytes - 1) / PAGE_SIZE_BYTES : first;
    for (uint64_t word = first / 64; word <= last / 64; word++)
        if ((atomic_load_explicit(&pages->remote[word], memory_order_acquire) | atomic_load_explicit(&pages->shared[word], memory_order_acquire)) &
            word_bits(word, first, last))
            return false;
    return true;
}

bool pages_are_remote(const struct pages *pages, uint64_t offset)
{
    return is_set(pages->remote, offset / PAGE_SIZE_BYTES);
}

void pages_elsewhere(const struct pages *pages, uint64_t *bits)
{
    for (uint64_t word = 0; word < words(pages); word++)
        bits[word] |= atomic_load(&pages->remote[word]);
    for (uint64_t page = 0; pages->file_fd >= 0 && page < pages->page_count;) {
        off_t data = lseek(pages->file_fd, (off_t)(page * PAGE_SIZE_BYTES), SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            return;
        off_t hole = data < 0 ? -1 : lseek(pages->file_fd, data, SEEK_HOLE);
        uint64_t first = data < 0 ? page : (uint64_t)data / PAGE_SIZE_BYTES, end = hole < 0 ? pages->page_count : ((uint64_t)hole + PAGE_MASK_BITS) / PAGE_SIZE_BYTES;
        for (page = first; page < end && page < pages->page_count; page++)
            if (is_set(pages->shared, page))
                bits[page / 64] |= 1ull << page % 64;
    }
}

void pages_touched(const struct pages *pages, uint64_t *bits)
{
    for (uint64_t word = 0; word < words(pages); word++)
        bits[word] |= atomic_load_explicit(&pages->touched[word], memory_order_relaxed);
}

void pages_advise(const struct pages *pages, const uint64_t *bits)
{
    for (uint64_t page = 0, end; pages->file_fd >= 0 && page < pages->page_count; page = end) {
        end = page + 1;
        if (!bits[page / 64]) {
            end = (page / 64 + 1) * 64;
            continue;
        }
        while (end < pages->page_count && (bits[page / 64] >> page % 64 & 1) && (bits[end / 64] >> end % 64 & 1))
            end++;
        if (bits[page / 64] >> page % 64 & 1)
            (void)posix_fadvise(pages->file_fd, (off_t)(page * PAGE_SIZE_BYTES), (off_t)((end - page) * PAGE_SIZE_BYTES), POSIX_FADV_WILLNEED);
    }
}

int pages_forget(struct pages *pages, uint64_t offset, uint64_t bytes)
{
    uint64_t first = offset / PAGE_SIZE_BYTES, end = first + bytes / PAGE_SIZE_BYTES;
    int r = 0;
    pthread_mutex_lock(&pages->lock);
    for (uint64_t page = first; page < end; page++)
        while (is_fetching(pages, page))
            pthread_cond_wait(&pages->arrived, &pages->lock);
    pages->remote_left -= clear(pages->remote, first, end - first);
    for (uint64_t page = first; r == 0 && page < end;) {
        uint64_t from = run_end(pages->shared, page, end, false);
        page = run_end(pages->shared, from, end, true);
        if (page > from && (r = show_ram(pages, from, page - from)))
            r = fail_at(pages, r, "cannot map the guest's memory", from);
    }
    see_end(pages);
    pthread_mutex_unlock(&pages->lock);
    return r;
}

int pages_fill(struct pages *pages, uint64_t offset, const void *data, uint64_t bytes)
{
    int r = 0;
    pthread_mutex_lock(&pages->lock);
    for (uint64_t done = 0; r == 0 && done < bytes; done += PAGE_SIZE_BYTES) {
        uint64_t page = (offset + done) / PAGE_SIZE_BYTES;
        if (!can_fetch(pages, page))
            continue;
        if (is_set(pages->shared, page) && (r = show_ram(pages, page, 1))) {
            r = fail_at(pages, r, "cannot map the guest's memory", page);
            break;
        }
        memcpy(pages->window[0].at + page * PAGE_SIZE_BYTES, (const uint8_t *)data + done, PAGE_SIZE_BYTES);
        pages->remote_left -= clear(pages->remote, page, 1);
    }
    pthread_cond_broadcast(&pages->arrived);
    see_end(pages);
    pthread_mutex_unlock(&pages->lock);
    return r;
}
