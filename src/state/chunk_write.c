/*
 * Writing chunk files (chunk_file.h). The caller's thread copies pages into a job; whoever works (a worker, or the same thread) finds out which are zero, compresses, gets a
 * place in the file, encrypts, writes, and notes the entry at the job's number, so that entries are in the order of the calls whoever is first.
 * Invariants: no offset is given out twice. After a failure nothing more is written and the file never gets its footer, without which nobody reads it.
 * Threading: `lock` guards places, entries and jobs' states; a job's buffers belong to who took it.
 */
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include <zstd.h>

#include "state/chunk_priv.h"
#include "state/inputs.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_IF(IN_API, clone, ARG_HAS(0, CLONE_THREAD));

enum job_state { JOB_FREE, JOB_READY, JOB_TAKEN };

struct job {
    enum job_state state;
    uint64_t chunk, present, number;
    uint8_t *pages, *packed; /* CHUNK_BYTES; what compression makes of it */
    ZSTD_CCtx *zstd;
    struct chunk_cipher *cipher;
};

struct chunk_writer {
    int fd;
    const char *name;
    struct chunk_header header;
    uint8_t header_bytes[CHUNK_HEADER_BYTES], key[CHUNK_KEY_BYTES];
    int zstd_level;
    size_t packed_bytes;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool over;
    int failed; /* -errno */
    uint64_t end; /* the next place */
    struct chunk_entry *entry;
    uint64_t entry_count, entry_room;
    struct chunk_totals totals;
    struct job *job;
    unsigned job_count, thread_count;
    pthread_t thread[CHUNK_THREADS_MAX];
};

static bool is_zero(const uint8_t *page)
{
    return page[0] == 0 && memcmp(page, page + 1, CHUNK_PAGE_BYTES - 1) == 0;
}

/* Moves the pages that are not zero to the front; returns the zero ones. */
static uint64_t drop_zeroes(struct job *job)
{
    uint64_t zero = 0;
    unsigned kept = 0, n = 0;
    for (uint64_t left = job->present; left; left &= left - 1, n++) {
        uint8_t *page = job->pages + (size_t)n * CHUNK_PAGE_BYTES;
        if (is_zero(page)) {
            zero |= left & -left;
            continue;
        }
        if (kept != n)
            memcpy(job->pages + (size_t)kept * CHUNK_PAGE_BYTES, page, CHUNK_PAGE_BYTES);
        kept++;
    }
    return zero;
}

/* Parts that can be mapped are where pages are. */
static uint64_t take_place(struct chunk_writer *writer, uint32_t size_bytes)
{
    bool plain = !(writer->header.flags & (CHUNK_COMPRESSED | CHUNK_ENCRYPTED));
    pthread_mutex_lock(&writer->lock);
    uint64_t offset = writer->end;
    writer->end += plain ? (size_bytes + CHUNK_PAGE_BYTES - 1) / CHUNK_PAGE_BYTES * CHUNK_PAGE_BYTES : size_bytes;
    pthread_mutex_unlock(&writer->lock);
    return offset;
}

static int write_job(struct chunk_writer *writer, struct job *job, struct chunk_entry *entry)
{
    *entry = (struct chunk_entry){.chunk = (uint32_t)job->chunk, .present = job->present, .zero = drop_zeroes(job)};
    uint8_t *data = job->pages;
    size_t size = (size_t)(chunk_count(entry->present) - chunk_count(entry->zero)) * CHUNK_PAGE_BYTES;
    int r = 0;
    if (size && job->zstd) {
        size_t packed = ZSTD_compressCCtx(job->zstd, job->packed, writer->packed_bytes, data, size, writer->zstd_level);
        if (!ZSTD_isError(packed) && packed < size) { /* else it stays as it is: its length says so */
            data = job->packed;
            size = packed;
        }
    }
    entry->stored_bytes = (uint32_t)size;
    entry->offset = size ? take_place(writer, entry->stored_bytes) : CHUNK_HEADER_SPACE;
    if (size && job->cipher)
        r = chunk_seal(job->cipher, writer->key, CHUNK_PART_PAGES, entry->offset, NULL, 0, data, size, entry->check);
    else if (size)
        chunk_checksum(NULL, 0, data, size, entry->check);
    return r ? r : chunk_pwrite(writer->fd, data, size, entry->offset);
}

/* With the lock, which is let go meanwhile. */
static void do_job(struct chunk_writer *writer, struct job *job)
{
    struct chunk_entry entry;
    job->state = JOB_TAKEN;
    bool wanted = !writer->failed;
    pthread_mutex_unlock(&writer->lock);
    int r = wanted ? write_job(writer, job, &entry) : 0;
    pthread_mutex_lock(&writer->lock);
    if (wanted && r == 0) {
        writer->entry[job->number] = entry;
        writer->totals.pages += chunk_count(entry.present);
        writer->totals.zero_pages += chunk_count(entry.zero);
    }
    if (r && !writer->failed)
        writer->failed = r;
    job->state = JOB_FREE;
    pthread_cond_broadcast(&writer->changed);
}

static struct job *find_job(struct chunk_writer *writer, enum job_state state)
{
    for (unsigned i = 0; i < writer->job_count; i++)
        if (writer->job[i].state == state)
            return &writer->job[i];
    return NULL;
}

static void *worker_main(void *arg)
{
    struct chunk_writer *writer = arg;
    pthread_mutex_lock(&writer->lock);
    for (;;) {
        struct job *job = find_job(writer, JOB_READY);
        if (job)
            do_job(writer, job);
        else if (writer->over)
            break;
        else
            pthread_cond_wait(&writer->changed, &writer->lock);
    }
    pthread_mutex_unlock(&writer->lock);
    return NULL;
}

/* ---- life ---- */

static int fail(const struct chunk_writer *writer, int code, struct error *err)
{
    return error_set(err, code, "cannot write %s: %s", writer->name, strerror(-code));
}

static int make_jobs(struct chunk_writer *writer, unsigned count)
{
    writer->job = calloc(count, sizeof *writer->job);
    writer->packed_bytes = writer->zstd_level ? ZSTD_compressBound(CHUNK_BYTES) : 0;
    for (; writer->job && writer->job_count < count; writer->job_count++) {
        struct job *job = &writer->job[writer->job_count];
        job->pages = malloc(CHUNK_BYTES);
        job->packed = writer->zstd_level ? malloc(writer->packed_bytes) : NULL;
        job->zstd = writer->zstd_level ? ZSTD_createCCtx() : NULL;
        job->cipher = writer->header.flags & CHUNK_ENCRYPTED ? chunk_cipher_create() : NULL;
        if (!job->pages || (writer->zstd_level && (!job->packed || !job->zstd)) || ((writer->header.flags & CHUNK_ENCRYPTED) && !job->cipher)) {
            writer->job_count++;
            return -ENOMEM;
        }
    }
    return writer->job ? 0 : -ENOMEM;
}

static int make_header(struct chunk_writer *writer, const struct chunk_options *options)
{
    struct chunk_header *header = &writer->header;
    *header = (struct chunk_header){.size_bytes = options->size_bytes, .id = options->id, .base = options->base};
    header->flags = (options->layer ? CHUNK_LAYER : 0u) | (options->zstd_level ? CHUNK_COMPRESSED : 0u);
    int r = inputs_random(header->salt, sizeof header->salt);
    if (r == 0 && options->secret && options->secret->size_bytes) {
        header->flags |= CHUNK_ENCRYPTED;
        r = chunk_key_make(options->secret, &header->key_kind, header->salt, writer->key, header->key_check);
    }
    chunk_header_encode(header, writer->header_bytes);
    return r ? r : chunk_pwrite(writer->fd, writer->header_bytes, CHUNK_HEADER_BYTES, 0);
}

int chunk_writer_create(struct chunk_writer **out, int fd, const char *name, const struct chunk_options *options, struct error *err)
{
    if (options->size_bytes == 0 || options->size_bytes > CHUNK_FILE_BYTES_MAX)
        return error_set(err, -E2BIG, "cannot write %s: a chunk file cannot hold %llu bytes", name, (unsigned long long)options->size_bytes);
    struct chunk_writer *writer = calloc(1, sizeof *writer);
    if (!writer)
        return error_set(err, -ENOMEM, "out of memory");
    writer->fd = fd;
    writer->name = name;
    writer->zstd_level = options->zstd_level;
    writer->end = CHUNK_HEADER_SPACE;
    pthread_mutex_init(&writer->lock, NULL);
    pthread_cond_init(&writer->changed, NULL);
    unsigned threads = options->threads < CHUNK_THREADS_MAX ? options->threads : CHUNK_THREADS_MAX;
    int r = make_header(writer, options);
    if (r == 0)
        r = make_jobs(writer, threads ? 2 * threads : 1);
    while (r == 0 && writer->thread_count < threads && pthread_create(&writer->thread[writer->thread_count], NULL, worker_main, writer) == 0)
        writer->thread_count++; /* with fewer it goes, too, also with none */
    if (r) {
        fail(writer, r, err);
        chunk_writer_destroy(writer);
        return r;
    }
    *out = writer;
    return 0;
}

static void end_threads(struct chunk_writer *writer)
{
    pthread_mutex_lock(&writer->lock);
    writer->over = true;
    pthread_cond_broadcast(&writer->changed);
    pthread_mutex_unlock(&writer->lock);
    while (writer->thread_count)
        pthread_join(writer->thread[--writer->thread_count], NULL);
}

void chunk_writer_destroy(struct chunk_writer *writer)
{
    if (!writer)
        return;
    end_threads(writer);
    for (unsigned i = 0; i < writer->job_count; i++) {
        free(writer->job[i].pages);
        free(writer->job[i].packed);
        ZSTD_freeCCtx(writer->job[i].zstd);
        chunk_cipher_destroy(writer->job[i].cipher);
    }
    free(writer->job);
    free(writer->entry);
    pthread_mutex_destroy(&writer->lock);
    pthread_cond_destroy(&writer->changed);
    explicit_bzero(writer->key, sizeof writer->key);
    free(writer);
}

/* ---- pages ---- */

/* Lock held. */
static int add_entry(struct chunk_writer *writer)
{
    if (writer->entry_count == writer->entry_room) {
        uint64_t room = writer->entry_room ? 2 * writer->entry_room : 1024;
        struct chunk_entry *grown = writer->entry_count < CHUNK_ENTRIES_MAX ? realloc(writer->entry, room * sizeof *grown) : NULL;
        if (!grown)
            return -ENOMEM;
        writer->entry = grown;
        writer->entry_room = room;
    }
    writer->entry_count++;
    return 0;
}

static void fill_job(struct job *job, const uint8_t *data, bool packed)
{
    unsigned n = 0;
    for (uint64_t left = job->present; left; left &= left - 1, n++) {
        unsigned page = packed ? n : (unsigned)__builtin_ctzll(left);
        memcpy(job->pages + (size_t)n * CHUNK_PAGE_BYTES, data + (size_t)page * CHUNK_PAGE_BYTES, CHUNK_PAGE_BYTES);
    }
}

int chunk_writer_put(struct chunk_writer *writer, uint64_t chunk, uint64_t present, const uint8_t *data, bool packed, struct error *err)
{
    struct job *job;
    if (chunk >= chunk_chunks(writer->header.size_bytes) || (present & ~chunk_mask(writer->header.size_bytes, chunk)))
        return error_set(err, -EINVAL, "cannot write %s: no such pages", writer->name);
    if (!present)
        return 0;
    pthread_mutex_lock(&writer->lock);
    while (!(job = find_job(writer, JOB_FREE)))
        pthread_cond_wait(&writer->changed, &writer->lock);
    int r = writer->failed ? writer->failed : add_entry(writer);
    if (r == 0) {
        *job = (struct job){JOB_TAKEN, chunk, present, writer->entry_count - 1, job->pages, job->packed, job->zstd, job->cipher};
        pthread_mutex_unlock(&writer->lock);
        fill_job(job, data, packed);
        pthread_mutex_lock(&writer->lock);
        job->state = JOB_READY;
        if (writer->thread_count)
            pthread_cond_broadcast(&writer->changed);
        else
            do_job(writer, job);
        r = writer->failed;
    }
    pthread_mutex_unlock(&writer->lock);
    return r ? fail(writer, r, err) : 0;
}

static void wait_for_jobs(struct chunk_writer *writer)
{
    pthread_mutex_lock(&writer->lock);
    while (find_job(writer, JOB_READY) || find_job(writer, JOB_TAKEN))
        pthread_cond_wait(&writer->changed, &writer->lock);
    pthread_mutex_unlock(&writer->lock);
}

/* Index and footer. */
static int write_end(struct chunk_writer *writer)
{
    uint8_t footer[CHUNK_FOOTER_BYTES] = CHUNK_END_MAGIC, extra[CHUNK_HEADER_BYTES + CHUNK_FOOTER_CHECKED];
    size_t size = (size_t)writer->entry_count * CHUNK_ENTRY_BYTES;
    uint8_t *index = malloc(size + 1);
    int r = 0;
    if (!index)
        return -ENOMEM;
    for (uint64_t i = 0; i < writer->entry_count; i++)
        chunk_entry_encode(&writer->entry[i], index + i * CHUNK_ENTRY_BYTES);
    chunk_put_number(footer + 8, writer->end, 8);
    chunk_put_number(footer + 16, writer->entry_count, 8);
    memcpy(extra, writer->header_bytes, CHUNK_HEADER_BYTES);
    memcpy(extra + CHUNK_HEADER_BYTES, footer, CHUNK_FOOTER_CHECKED);
    uint8_t *check = footer + CHUNK_FOOTER_CHECKED;
    if (writer->header.flags & CHUNK_ENCRYPTED)
        r = chunk_seal(writer->job[0].cipher, writer->key, CHUNK_PART_INDEX, writer->end, extra, sizeof extra, index, size, check);
    else
        chunk_checksum(extra, sizeof extra, index, size, check);
    if (r == 0)
        r = chunk_pwrite(writer->fd, index, size, writer->end);
    if (r == 0)
        r = chunk_pwrite(writer->fd, footer, sizeof footer, writer->end + size);
    writer->totals.stored_bytes = writer->end + size + sizeof footer;
    free(index);
    return r;
}

int chunk_writer_finish(struct chunk_writer *writer, struct chunk_totals *totals, struct error *err)
{
    wait_for_jobs(writer);
    int r = writer->failed ? writer->failed : write_end(writer);
    if (r)
        return fail(writer, r, err);
    if (totals)
        *totals = writer->totals;
    return 0;
}

int chunk_file_write(int fd, const char *name, const void *data, const struct chunk_options *options, struct error *err)
{
    struct chunk_writer *writer = NULL;
    uint8_t *last = calloc(1, CHUNK_BYTES);
    int r = last ? chunk_writer_create(&writer, fd, name, options, err) : error_set(err, -ENOMEM, "out of memory");
    for (uint64_t chunk = 0; r == 0 && chunk < chunk_chunks(options->size_bytes); chunk++) {
        const uint8_t *at = (const uint8_t *)data + chunk * CHUNK_BYTES;
        uint64_t left = options->size_bytes - chunk * CHUNK_BYTES;
        if (left < CHUNK_BYTES)
            at = memcpy(last, at, left);
        r = chunk_writer_put(writer, chunk, chunk_mask(options->size_bytes, chunk), at, false, err);
    }
    if (r == 0)
        r = chunk_writer_finish(writer, NULL, err);
    chunk_writer_destroy(writer);
    free(last);
    return r;
}
