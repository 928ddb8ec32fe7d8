/*
 * Pages into messages (migrate_pack.h). A slot has one chunk's pages: the caller copies them in and takes differences, a worker compresses them, and the caller sends them when all before them were sent.
 * Invariants: slots from `sent` to `put` are in use, in this order; the cache has what the other side has of a page, or nothing of it.
 * Threading: the cache and the stream are the caller's. Workers take slots from `taken` on, under the lock.
 */
#include "machine/migrate_pack.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <zstd.h>

#include "machine/migrate_priv.h"

_Static_assert(MIGRATE_PAGES_HEAD_BYTES + CHUNK_BYTES <= STREAM_BODY_BYTES_MAX, "a chunk is one message");
#define SLOTS 8u
#define THREADS_MAX 8u
#define CACHE_PAGES (64u << 20 >> 12)
#define PAGE_WORDS (PAGE_SIZE_BYTES / sizeof(uint64_t))

struct slot {
    uint64_t chunk, pages, zero, delta;
    size_t bytes, packed_bytes; /* packed_bytes 0: it is not smaller */
    bool done;                  /* lock */
    uint64_t data[CHUNK_BYTES / sizeof(uint64_t)];
    uint8_t packed[CHUNK_BYTES];
};

struct packer {
    struct stream *stream;
    int level;
    pthread_t thread[THREADS_MAX];
    unsigned thread_count;
    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    bool over;
    uint64_t put, taken, sent; /* counts of slots; lock, but for their own thread */
    uint64_t *cache, *cached;  /* contents, and number of the page + 1, 0 none */
    struct slot first;         /* packer_put_first's */
    struct slot slot[];
};

/* ---- copying ---- */

static bool is_zero(const uint64_t *page)
{
    uint64_t any = 0;
    for (unsigned i = 0; i < PAGE_WORDS; i++)
        any |= page[i];
    return any == 0;
}

/* The page becomes its difference from what was sent, which then is this one. False: nothing is known of it. */
static bool take_difference(struct packer *packer, uint64_t number, uint64_t *page)
{
    uint64_t place = number % CACHE_PAGES, *old = packer->cache + place * PAGE_WORDS;
    if (packer->cached[place] != number + 1) {
        packer->cached[place] = number + 1;
        memcpy(old, page, PAGE_SIZE_BYTES);
        return false;
    }
    for (unsigned i = 0; i < PAGE_WORDS; i++) {
        uint64_t now = page[i];
        page[i] ^= old[i];
        old[i] = now;
    }
    return true;
}

static void forget(struct packer *packer, uint64_t number)
{
    if (packer->cached[number % CACHE_PAGES] == number + 1)
        packer->cached[number % CACHE_PAGES] = 0;
}

static void fill(struct packer *packer, struct slot *slot, uint64_t chunk, uint64_t pages, const uint8_t *data)
{
    uint64_t *to = slot->data;
    slot->chunk = chunk;
    slot->pages = pages;
    slot->zero = slot->delta = slot->packed_bytes = 0;
    slot->done = false;
    for (uint64_t left = pages; left; left &= left - 1) {
        unsigned page = (unsigned)__builtin_ctzll(left);
        uint64_t bit = 1ull << page, number = chunk * CHUNK_PAGES + page;
        memcpy(to, data + page * PAGE_SIZE_BYTES, PAGE_SIZE_BYTES);
        if (is_zero(to)) {
            slot->zero |= bit;
            if (packer->cache)
                forget(packer, number);
            continue;
        }
        if (packer->cache && take_difference(packer, number, to)) {
            if (is_zero(to)) { /* it is there already */
                slot->pages &= ~bit;
                continue;
            }
            slot->delta |= bit;
        }
        to += PAGE_WORDS;
    }
    slot->bytes = (size_t)((uint8_t *)to - (uint8_t *)slot->data);
}

/* ---- workers ---- */

static void *pack(void *arg)
{
    struct packer *packer = arg;
    ZSTD_CCtx *context = ZSTD_createCCtx();
    pthread_mutex_lock(&packer->lock);
    while (!packer->over) {
        if (packer->taken == packer->put) {
            pthread_cond_wait(&packer->filled, &packer->lock);
            continue;
        }
        struct slot *slot = &packer->slot[packer->taken++ % SLOTS];
        pthread_mutex_unlock(&packer->lock);
        size_t n = context && slot->bytes ? ZSTD_compressCCtx(context, slot->packed, slot->bytes - slot->bytes / 16, slot->data, slot->bytes, packer->level) : 0;
        slot->packed_bytes = ZSTD_isError(n) ? 0 : n; /* it does not fit: it is sent as it is */
        pthread_mutex_lock(&packer->lock);
        slot->done = true;
        pthread_cond_signal(&packer->emptied);
    }
    pthread_mutex_unlock(&packer->lock);
    ZSTD_freeCCtx(context);
    return NULL;
}

static int send_slot(struct packer *packer, const struct slot *slot, struct error *err)
{
    uint8_t head[MIGRATE_PAGES_HEAD_BYTES];
    const uint64_t fields[] = {slot->chunk, slot->pages, slot->zero, slot->delta};
    for (unsigned i = 0; i < 4; i++)
        stream_put_number(head + 8 * i, fields[i], 8);
    head[32] = slot->packed_bytes != 0;
    if (!slot->pages)
        return 0;
    if (slot->packed_bytes)
        return stream_put(packer->stream, MIGRATE_PAGES, head, sizeof head, slot->packed, slot->packed_bytes, err);
    return stream_put(packer->stream, MIGRATE_PAGES, head, sizeof head, slot->data, slot->bytes, err);
}

/* The first one that was not sent, once it is done. */
static int send_next(struct packer *packer, struct error *err)
{
    struct slot *slot = &packer->slot[packer->sent % SLOTS];
    pthread_mutex_lock(&packer->lock);
    while (!slot->done)
        pthread_cond_wait(&packer->emptied, &packer->lock);
    pthread_mutex_unlock(&packer->lock);
    packer->sent++;
    return send_slot(packer, slot, err);
}

int packer_put(struct packer *packer, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err)
{
    int r = packer->put - packer->sent == SLOTS ? send_next(packer, err) : 0;
    if (r)
        return r;
    struct slot *slot = &packer->slot[packer->put % SLOTS];
    fill(packer, slot, chunk, pages, data);
    if (!packer->thread_count)
        return send_slot(packer, slot, err);
    pthread_mutex_lock(&packer->lock);
    packer->put++;
    pthread_cond_signal(&packer->filled);
    pthread_mutex_unlock(&packer->lock);
    return 0;
}

int packer_flush(struct packer *packer, struct error *err)
{
    int r = 0;
    while (r == 0 && packer->sent < packer->put)
        r = send_next(packer, err);
    return r;
}

int packer_put_first(struct packer *packer, uint64_t chunk, uint64_t pages, const uint8_t *data, struct error *err)
{
    fill(packer, &packer->first, chunk, pages, data);
    return send_slot(packer, &packer->first, err);
}

void packer_no_differences(struct packer *packer)
{
    if (packer->cache)
        munmap(packer->cache, (size_t)CACHE_PAGES * PAGE_SIZE_BYTES);
    packer->cache = NULL;
}

struct packer *packer_create(struct stream *stream, int level, unsigned threads)
{
    struct packer *packer = calloc(1, sizeof *packer + SLOTS * sizeof packer->slot[0]);
    if (!packer)
        return NULL;
    packer->stream = stream;
    packer->level = level;
    pthread_mutex_init(&packer->lock, NULL);
    pthread_cond_init(&packer->filled, NULL);
    pthread_cond_init(&packer->emptied, NULL);
    for (unsigned i = 0; level && i < threads && i < THREADS_MAX; i++)
        if (pthread_create(&packer->thread[packer->thread_count], NULL, pack, packer) == 0)
            packer->thread_count++;
    if (!packer->thread_count)
        return packer; /* or none could be made: it goes as it is */
    packer->cached = calloc(CACHE_PAGES, sizeof *packer->cached);
    packer->cache = packer->cached ? mmap(NULL, (size_t)CACHE_PAGES * PAGE_SIZE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) : MAP_FAILED;
    if (packer->cache == MAP_FAILED)
        packer->cache = NULL;
    return packer;
}

void packer_destroy(struct packer *packer)
{
    if (!packer)
        return;
    pthread_mutex_lock(&packer->lock);
    packer->over = true;
    pthread_cond_broadcast(&packer->filled);
    pthread_mutex_unlock(&packer->lock);
    for (unsigned i = 0; i < packer->thread_count; i++)
        pthread_join(packer->thread[i], NULL);
    packer_no_differences(packer);
    free(packer->cached);
    pthread_cond_destroy(&packer->filled);
    pthread_cond_destroy(&packer->emptied);
    pthread_mutex_destroy(&packer->lock);
    free(packer);
}

/* ---- the other side ---- */

struct unpacker {
    ZSTD_DCtx *context;
    uint64_t room[CHUNK_BYTES / sizeof(uint64_t)];
};

struct unpacker *unpacker_create(void)
{
    struct unpacker *unpacker = malloc(sizeof *unpacker);
    if (unpacker && !(unpacker->context = ZSTD_createDCtx())) {
        free(unpacker);
        return NULL;
    }
    return unpacker;
}

void unpacker_destroy(struct unpacker *unpacker)
{
    if (unpacker)
        ZSTD_freeDCtx(unpacker->context);
    free(unpacker);
}

/* To their places. */
static void place(uint8_t *chunk, const struct unpacked_pages *in)
{
    const uint8_t *data = in->data;
    for (uint64_t left = in->pages; left; left &= left - 1) {
        unsigned page = (unsigned)__builtin_ctzll(left);
        uint8_t *to = chunk + page * PAGE_SIZE_BYTES;
        if (in->zero >> page & 1) {
            memset(to, 0, PAGE_SIZE_BYTES);
            continue;
        }
        if (in->delta >> page & 1)
            for (unsigned i = 0; i < PAGE_SIZE_BYTES; i++)
                to[i] ^= data[i];
        else
            memcpy(to, data, PAGE_SIZE_BYTES);
        data += PAGE_SIZE_BYTES;
    }
}

int unpacker_open(struct unpacker *unpacker, uint64_t ram_bytes, const uint8_t *body, size_t size_bytes, struct unpacked_pages *out, struct error *err)
{
    if (size_bytes < MIGRATE_PAGES_HEAD_BYTES)
        return error_set(err, -EPROTO, "a message with pages is too short");
    uint64_t chunk = stream_number(body, 8), pages = stream_number(body + 8, 8), zero = stream_number(body + 16, 8), delta = stream_number(body + 24, 8);
    size_t data_bytes = size_bytes - MIGRATE_PAGES_HEAD_BYTES;
    *out = (struct unpacked_pages){chunk, pages, zero, delta, body + MIGRATE_PAGES_HEAD_BYTES};
    if (chunk >= (ram_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES)
        return error_set(err, -EPROTO, "pages came that the guest's memory does not have");
    uint64_t room = (ram_bytes - chunk * CHUNK_BYTES) / PAGE_SIZE_BYTES, has = room < CHUNK_PAGES ? (1ull << room) - 1 : ~0ull;
    size_t expected = (size_t)__builtin_popcountll(pages & ~zero) * PAGE_SIZE_BYTES;
    if (pages & ~has || zero & ~pages || delta & ~(pages & ~zero) || body[32] > 1 || (!body[32] && data_bytes != expected))
        return error_set(err, -EPROTO, "a message with pages has not what it says");
    if (body[32]) {
        size_t n = ZSTD_decompressDCtx(unpacker->context, unpacker->room, expected, out->data, data_bytes);
        if (ZSTD_isError(n) || n != expected)
            return error_set(err, -EPROTO, "compressed pages are damaged");
        out->data = (const uint8_t *)unpacker->room;
    }
    return 0;
}

int unpacker_take(struct unpacker *unpacker, uint8_t *ram, uint64_t ram_bytes, const uint8_t *body, size_t size_bytes, struct error *err)
{
    struct unpacked_pages in;
    int r = unpacker_open(unpacker, ram_bytes, body, size_bytes, &in, err);
    if (r == 0)
        place(ram + in.chunk * CHUNK_BYTES, &in);
    return r;
}
