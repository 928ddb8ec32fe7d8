/*
 * Reading chunk files (chunk_file.h). Opening reads and checks header, footer and index, all of them foreign bytes; after that each entry is known to lie inside the file and
 * each part is checked when it is read. Entries of one chunk are a list, the last written first.
 * Threading: what opening made is constant; what a read needs for itself (`bench`) is taken from a list under `lock`.
 */
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <zstd.h>

#include "state/chunk_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_WORKER, close); /* whoever fetched the last page */

#define NO_ENTRY UINT32_MAX

/* What one read works with. */
struct bench {
    struct bench *next;
    ZSTD_DCtx *zstd;
    struct chunk_cipher *cipher;
    uint8_t stored[CHUNK_BYTES], pages[CHUNK_BYTES];
};

struct chunk_reader {
    int fd;
    char *name;
    struct chunk_header header;
    struct chunk_info info;
    uint8_t key[CHUNK_KEY_BYTES];
    struct chunk_entry *entry;
    uint32_t *newest, *older; /* by chunk; by entry: the one before of the same chunk */
    pthread_mutex_t lock;
    struct bench *idle;
};

static void bench_free(struct bench *bench)
{
    if (!bench)
        return;
    ZSTD_freeDCtx(bench->zstd);
    chunk_cipher_destroy(bench->cipher);
    free(bench);
}

static struct bench *bench_take(struct chunk_reader *reader)
{
    pthread_mutex_lock(&reader->lock);
    struct bench *bench = reader->idle;
    if (bench)
        reader->idle = bench->next;
    pthread_mutex_unlock(&reader->lock);
    if (bench || !(bench = malloc(sizeof *bench)))
        return bench;
    bench->zstd = ZSTD_createDCtx();
    bench->cipher = chunk_cipher_create();
    if (bench->zstd && bench->cipher)
        return bench;
    bench_free(bench);
    return NULL;
}

static void bench_put(struct chunk_reader *reader, struct bench *bench)
{
    pthread_mutex_lock(&reader->lock);
    bench->next = reader->idle;
    reader->idle = bench;
    pthread_mutex_unlock(&reader->lock);
}

/* ---- opening ---- */

bool chunk_file_is(int fd)
{
    uint8_t magic[8];
    return chunk_pread(fd, magic, sizeof magic, 0) == 0 && memcmp(magic, CHUNK_MAGIC, sizeof magic) == 0;
}

static int read_failed(const char *name, int r, uint64_t offset, struct error *err)
{
    return error_set(err, r == -ENODATA ? -EBADMSG : r, "cannot read %s at offset %llu: %s", name, (unsigned long long)offset,
                     r == -ENODATA ? "the file is cut short" : strerror(-r));
}

static int read_header(int fd, const char *name, uint8_t bytes[CHUNK_HEADER_BYTES], struct chunk_header *header, struct chunk_info *info, struct error *err)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return error_set(err, -errno, "cannot read %s: %s", name, strerror(errno));
    int r = chunk_pread(fd, bytes, CHUNK_HEADER_BYTES, 0);
    if (r)
        return read_failed(name, r, 0, err);
    r = chunk_header_decode(header, bytes, name, err);
    *info = (struct chunk_info){.size_bytes = header->size_bytes, .file_bytes = (uint64_t)st.st_size, .id = header->id, .base = header->base,
                                .layer = header->flags & CHUNK_LAYER, .compressed = header->flags & CHUNK_COMPRESSED, .encrypted = header->flags & CHUNK_ENCRYPTED};
    return r;
}

int chunk_file_info(int fd, const char *name, struct chunk_info *info, struct error *err)
{
    uint8_t bytes[CHUNK_HEADER_BYTES];
    struct chunk_header header;
    return read_header(fd, name, bytes, &header, info, err);
}

static int make_key(struct chunk_reader *reader, const struct chunk_secret *secret, struct error *err)
{
    uint8_t check[CHUNK_CHECK_BYTES];
    uint32_t kind;
    if (!(reader->header.flags & CHUNK_ENCRYPTED))
        return 0;
    if (!secret || !secret->size_bytes)
        return error_set(err, -ENOKEY, "%s is encrypted: it takes a key", reader->name);
    int r = chunk_key_make(secret, &kind, reader->header.salt, reader->key, check);
    if (r)
        return error_set(err, r, "cannot make the key of %s: %s", reader->name, strerror(-r));
    if (kind != reader->header.key_kind || memcmp(check, reader->header.key_check, sizeof check) != 0)
        return error_set(err, -EKEYREJECTED, "%s was encrypted with another key", reader->name);
    return 0;
}

/* The footer at the end of the file; where the index is follows from it. */
static int read_footer(struct chunk_reader *reader, uint8_t footer[CHUNK_FOOTER_BYTES], uint64_t *index, struct error *err)
{
    uint64_t size = reader->info.file_bytes, at = size < CHUNK_HEADER_SPACE + CHUNK_FOOTER_BYTES ? 0 : size - CHUNK_FOOTER_BYTES;
    int r = at ? chunk_pread(reader->fd, footer, CHUNK_FOOTER_BYTES, at) : -ENODATA;
    if (r && r != -ENODATA)
        return read_failed(reader->name, r, at, err);
    if (r || memcmp(footer, CHUNK_END_MAGIC, 8) != 0)
        return error_set(err, -EBADMSG, "%s is not complete: its end (offset %llu) is not one", reader->name, (unsigned long long)at);
    *index = chunk_number(footer + 8, 8);
    reader->info.entries = chunk_number(footer + 16, 8);
    if (reader->info.entries > CHUNK_ENTRIES_MAX || *index < CHUNK_HEADER_SPACE || *index > at || reader->info.entries * CHUNK_ENTRY_BYTES != at - *index)
        return error_set(err, -EBADMSG, "%s: the end (offset %llu) is damaged", reader->name, (unsigned long long)at);
    return 0;
}

static bool entry_is_good(const struct chunk_reader *reader, const struct chunk_entry *entry, uint64_t end)
{
    if (entry->chunk >= chunk_chunks(reader->info.size_bytes) || !entry->present || (entry->present & ~chunk_mask(reader->info.size_bytes, entry->chunk)) ||
        (entry->zero & ~entry->present))
        return false;
    uint64_t bytes = (uint64_t)(chunk_count(entry->present) - chunk_count(entry->zero)) * CHUNK_PAGE_BYTES;
    bool packed = reader->header.flags & CHUNK_COMPRESSED;
    return entry->stored_bytes <= bytes && (entry->stored_bytes > 0) == (bytes > 0) && (packed || entry->stored_bytes == bytes) && entry->offset >= CHUNK_HEADER_SPACE &&
           entry->offset <= end && entry->stored_bytes <= end - entry->offset;
}

static int decode_index(struct chunk_reader *reader, const uint8_t *bytes, uint64_t index, struct error *err)
{
    uint64_t chunks = chunk_chunks(reader->info.size_bytes), count = reader->info.entries;
    reader->entry = calloc(count + 1, sizeof *reader->entry);
    reader->older = calloc(count + 1, sizeof *reader->older);
    reader->newest = malloc(chunks * sizeof *reader->newest);
    if (!reader->entry || !reader->older || !reader->newest)
        return error_set(err, -ENOMEM, "no memory to read %s", reader->name);
    memset(reader->newest, 0xff, chunks * sizeof *reader->newest);
    for (uint32_t i = 0; i < count; i++) {
        struct chunk_entry *entry = &reader->entry[i];
        chunk_entry_decode(entry, bytes + (uint64_t)i * CHUNK_ENTRY_BYTES);
        if (!entry_is_good(reader, entry, index))
            return error_set(err, -EBADMSG, "%s: entry %u of the index (offset %llu) says what cannot be", reader->name, i, (unsigned long long)(index + (uint64_t)i * CHUNK_ENTRY_BYTES));
        reader->older[i] = reader->newest[entry->chunk];
        reader->newest[entry->chunk] = i;
    }
    return 0;
}

static int read_index(struct chunk_reader *reader, const uint8_t header[CHUNK_HEADER_BYTES], struct error *err)
{
    uint8_t footer[CHUNK_FOOTER_BYTES], extra[CHUNK_HEADER_BYTES + CHUNK_FOOTER_CHECKED], check[CHUNK_CHECK_BYTES];
    uint64_t at = 0;
    int r = read_footer(reader, footer, &at, err);
    if (r)
        return r;
    size_t size = (size_t)reader->info.entries * CHUNK_ENTRY_BYTES;
    uint8_t *bytes = malloc(size + 1);
    struct chunk_cipher *cipher = chunk_cipher_create();
    r = bytes && cipher ? chunk_pread(reader->fd, bytes, size, at) : -ENOMEM;
    if (r)
        read_failed(reader->name, r, at, err);
    memcpy(extra, header, CHUNK_HEADER_BYTES);
    memcpy(extra + CHUNK_HEADER_BYTES, footer, CHUNK_FOOTER_CHECKED);
    if (r == 0 && reader->info.encrypted) {
        r = chunk_unseal(cipher, reader->key, CHUNK_PART_INDEX, at, extra, sizeof extra, bytes, size, footer + CHUNK_FOOTER_CHECKED);
    } else if (r == 0) {
        chunk_checksum(extra, sizeof extra, bytes, size, check);
        r = memcmp(check, footer + CHUNK_FOOTER_CHECKED, sizeof check) ? -EBADMSG : 0;
    }
    if (r == -EBADMSG)
        error_set(err, r, "%s: the index (offset %llu) or the header is damaged", reader->name, (unsigned long long)at);
    if (r == 0)
        r = decode_index(reader, bytes, at, err);
    chunk_cipher_destroy(cipher);
    free(bytes);
    return r;
}

int chunk_reader_open(struct chunk_reader **out, int fd, const char *name, const struct chunk_secret *secret, uint64_t size_bytes_max, struct error *err)
{
    uint8_t header[CHUNK_HEADER_BYTES];
    struct chunk_reader *reader = calloc(1, sizeof *reader);
    if (!reader || !(reader->name = strdup(name))) {
        free(reader);
        return error_set(err, -ENOMEM, "out of memory");
    }
    reader->fd = -1;
    pthread_mutex_init(&reader->lock, NULL);
    int r = read_header(fd, name, header, &reader->header, &reader->info, err);
    reader->fd = fd;
    if (r == 0 && reader->info.size_bytes > size_bytes_max)
        r = error_set(err, -EBADMSG, "%s holds %llu bytes, more than the %llu that there can be", name, (unsigned long long)reader->info.size_bytes,
                      (unsigned long long)size_bytes_max);
    if (r == 0)
        r = make_key(reader, secret, err);
    if (r == 0)
        r = read_index(reader, header, err);
    if (r) {
        reader->fd = -1; /* stays the caller's */
        chunk_reader_close(reader);
        return r;
    }
    *out = reader;
    return 0;
}

void chunk_reader_close(struct chunk_reader *reader)
{
    if (!reader)
        return;
    while (reader->idle) {
        struct bench *next = reader->idle->next;
        bench_free(reader->idle);
        reader->idle = next;
    }
    if (reader->fd >= 0)
        close(reader->fd);
    free(reader->entry);
    free(reader->older);
    free(reader->newest);
    free(reader->name);
    pthread_mutex_destroy(&reader->lock);
    explicit_bzero(reader->key, sizeof reader->key);
    free(reader);
}

const struct chunk_info *chunk_reader_info(const struct chunk_reader *reader)
{
    return &reader->info;
}

/* ---- pages ---- */

uint64_t chunk_reader_present(const struct chunk_reader *reader, uint64_t chunk, uint64_t *zero)
{
    uint64_t present = 0, zeroes = 0;
    for (uint32_t i = reader->newest[chunk]; i != NO_ENTRY; i = reader->older[i]) {
        zeroes |= reader->entry[i].zero & ~present;
        present |= reader->entry[i].present;
    }
    if (zero)
        *zero = zeroes;
    return present;
}

/* The entry's pages that are not zero, one after the other; NULL after a failure. */
static const uint8_t *load(struct chunk_reader *reader, const struct chunk_entry *entry, struct bench *bench, struct error *err)
{
    uint8_t check[CHUNK_CHECK_BYTES];
    size_t bytes = (size_t)(chunk_count(entry->present) - chunk_count(entry->zero)) * CHUNK_PAGE_BYTES;
    int r = chunk_pread(reader->fd, bench->stored, entry->stored_bytes, entry->offset);
    if (r) {
        read_failed(reader->name, r, entry->offset, err);
        return NULL;
    }
    if (reader->info.encrypted) {
        r = chunk_unseal(bench->cipher, reader->key, CHUNK_PART_PAGES, entry->offset, NULL, 0, bench->stored, entry->stored_bytes, entry->check);
    } else {
        chunk_checksum(NULL, 0, bench->stored, entry->stored_bytes, check);
        r = memcmp(check, entry->check, sizeof check) ? -EBADMSG : 0;
    }
    const uint8_t *pages = bench->stored;
    if (r == 0 && entry->stored_bytes < bytes) {
        pages = bench->pages;
        r = ZSTD_decompressDCtx(bench->zstd, bench->pages, bytes, bench->stored, entry->stored_bytes) == bytes ? 0 : -EBADMSG;
    }
    if (r == 0)
        return pages;
    error_set(err, r, "%s: chunk %u (%u bytes at offset %llu) is damaged", reader->name, entry->chunk, entry->stored_bytes, (unsigned long long)entry->offset);
    return NULL;
}

/* The pages `wanted`, all of which the entry has. */
static int copy_out(struct chunk_reader *reader, const struct chunk_entry *entry, uint64_t wanted, struct bench *bench, uint8_t *data, struct error *err)
{
    const uint8_t *pages = wanted & ~entry->zero ? load(reader, entry, bench, err) : bench->pages;
    if (!pages)
        return err ? err->code : -EBADMSG;
    unsigned n = 0;
    for (uint64_t left = entry->present; left; left &= left - 1) {
        uint64_t bit = left & -left;
        uint8_t *to = data + (size_t)__builtin_ctzll(left) * CHUNK_PAGE_BYTES;
        if ((wanted & bit) && (entry->zero & bit))
            memset(to, 0, CHUNK_PAGE_BYTES);
        else if (wanted & bit)
            memcpy(to, pages + (size_t)n * CHUNK_PAGE_BYTES, CHUNK_PAGE_BYTES);
        n += !(entry->zero & bit);
    }
    return 0;
}

int chunk_reader_read(struct chunk_reader *reader, uint64_t chunk, uint64_t wanted, uint8_t *data, struct error *err)
{
    int r = 0;
    struct error ignored = {0};
    struct bench *bench = bench_take(reader);
    if (!bench)
        return error_set(err, -ENOMEM, "no memory to read %s", reader->name);
    for (uint32_t i = reader->newest[chunk]; r == 0 && wanted && i != NO_ENTRY; i = reader->older[i]) {
        const struct chunk_entry *entry = &reader->entry[i];
        if (wanted & entry->present)
            r = copy_out(reader, entry, wanted & entry->present, bench, data, err ? err : &ignored);
        wanted &= ~entry->present;
    }
    bench_put(reader, bench);
    return r;
}

int chunk_reader_read_all(struct chunk_reader *reader, char **data, size_t *size_bytes, struct error *err)
{
    uint64_t chunks = chunk_chunks(reader->info.size_bytes);
    int r = 0;
    *data = calloc(chunks, CHUNK_BYTES + 1);
    if (!*data)
        return error_set(err, -ENOMEM, "no memory to read %s", reader->name);
    for (uint64_t chunk = 0; r == 0 && chunk < chunks; chunk++)
        r = chunk_reader_read(reader, chunk, ~0ull, (uint8_t *)*data + chunk * CHUNK_BYTES, err);
    if (r) {
        free(*data);
        *data = NULL;
    }
    *size_bytes = (size_t)reader->info.size_bytes;
    return r;
}
