/* Bytes of chunk files' headers and entries (chunk_priv.h). Stateless. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "state/chunk_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, pwrite64);
SANDBOX_ALLOW(IN_GUEST | IN_API | IN_SHARE | IN_MAIN, pread64); /* for pages of a restored machine that are touched */

#define CHECK_OFFSET (CHUNK_HEADER_BYTES - CHUNK_CHECK_BYTES)

uint64_t chunk_number(const uint8_t *bytes, unsigned size_bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < size_bytes; i++)
        value |= (uint64_t)bytes[i] << 8 * i;
    return value;
}

void chunk_put_number(uint8_t *bytes, uint64_t value, unsigned size_bytes)
{
    for (unsigned i = 0; i < size_bytes; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
}

void chunk_header_encode(const struct chunk_header *header, uint8_t bytes[CHUNK_HEADER_BYTES])
{
    memset(bytes, 0, CHUNK_HEADER_BYTES);
    memcpy(bytes, CHUNK_MAGIC, 8);
    chunk_put_number(bytes + 8, CHUNK_VERSION, 4);
    chunk_put_number(bytes + 12, header->flags, 4);
    chunk_put_number(bytes + 16, header->size_bytes, 8);
    chunk_put_number(bytes + 24, CHUNK_PAGE_BYTES, 4);
    chunk_put_number(bytes + 28, CHUNK_PAGES, 4);
    memcpy(bytes + 32, header->id.bytes, 16);
    memcpy(bytes + 48, header->base.bytes, 16);
    memcpy(bytes + 64, header->salt, CHUNK_SALT_BYTES);
    memcpy(bytes + 96, header->key_check, CHUNK_CHECK_BYTES);
    chunk_put_number(bytes + 112, header->key_kind, 4);
    chunk_checksum(NULL, 0, bytes, CHECK_OFFSET, bytes + CHECK_OFFSET);
}

int chunk_header_decode(struct chunk_header *header, const uint8_t bytes[CHUNK_HEADER_BYTES], const char *name, struct error *err)
{
    uint8_t check[CHUNK_CHECK_BYTES];
    uint32_t version = (uint32_t)chunk_number(bytes + 8, 4);
    if (memcmp(bytes, CHUNK_MAGIC, 8) != 0)
        return error_set(err, -EBADMSG, "%s is no chunk file", name);
    if (version != CHUNK_VERSION)
        return error_set(err, -ENOTSUP, "%s: chunk file of version %u; this program reads %u", name, version, CHUNK_VERSION);
    chunk_checksum(NULL, 0, bytes, CHECK_OFFSET, check);
    if (memcmp(check, bytes + CHECK_OFFSET, sizeof check) != 0)
        return error_set(err, -EBADMSG, "%s: the header (offset 0) is damaged", name);
    *header = (struct chunk_header){.flags = (uint32_t)chunk_number(bytes + 12, 4), .size_bytes = chunk_number(bytes + 16, 8), .key_kind = (uint32_t)chunk_number(bytes + 112, 4)};
    memcpy(header->id.bytes, bytes + 32, 16);
    memcpy(header->base.bytes, bytes + 48, 16);
    memcpy(header->salt, bytes + 64, CHUNK_SALT_BYTES);
    memcpy(header->key_check, bytes + 96, CHUNK_CHECK_BYTES);
    bool encrypted = header->flags & CHUNK_ENCRYPTED;
    if ((header->flags & ~(uint32_t)CHUNK_FLAGS_KNOWN) || chunk_number(bytes + 24, 4) != CHUNK_PAGE_BYTES || chunk_number(bytes + 28, 4) != CHUNK_PAGES ||
        header->size_bytes == 0 || header->size_bytes > CHUNK_FILE_BYTES_MAX || header->key_kind > CHUNK_KEY_SCRYPT || encrypted != (header->key_kind != CHUNK_KEY_NONE))
        return error_set(err, -ENOTSUP, "%s: the header asks for what this program does not know", name);
    return 0;
}

void chunk_entry_encode(const struct chunk_entry *entry, uint8_t bytes[CHUNK_ENTRY_BYTES])
{
    chunk_put_number(bytes, entry->offset, 8);
    chunk_put_number(bytes + 8, entry->stored_bytes, 4);
    chunk_put_number(bytes + 12, entry->chunk, 4);
    chunk_put_number(bytes + 16, entry->present, 8);
    chunk_put_number(bytes + 24, entry->zero, 8);
    memcpy(bytes + 32, entry->check, CHUNK_CHECK_BYTES);
}

void chunk_entry_decode(struct chunk_entry *entry, const uint8_t bytes[CHUNK_ENTRY_BYTES])
{
    *entry = (struct chunk_entry){.offset = chunk_number(bytes, 8), .stored_bytes = (uint32_t)chunk_number(bytes + 8, 4), .chunk = (uint32_t)chunk_number(bytes + 12, 4),
                                  .present = chunk_number(bytes + 16, 8), .zero = chunk_number(bytes + 24, 8)};
    memcpy(entry->check, bytes + 32, CHUNK_CHECK_BYTES);
}

int chunk_pwrite(int fd, const void *data, uint64_t size_bytes, uint64_t offset)
{
    const uint8_t *next = data;
    while (size_bytes > 0) {
        ssize_t n = pwrite(fd, next, size_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        next += n;
        offset += (uint64_t)n;
        size_bytes -= (uint64_t)n;
    }
    return 0;
}

int chunk_pread(int fd, void *data, uint64_t size_bytes, uint64_t offset)
{
    uint8_t *next = data;
    while (size_bytes > 0) {
        ssize_t n = pread(fd, next, size_bytes, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -ENODATA;
        next += n;
        offset += (uint64_t)n;
        size_bytes -= (uint64_t)n;
    }
    return 0;
}
