/*
 * Fuzz target: chunk files of hostile snapshots. Byte 0: flags; bytes 1..3: size of the content; 4: how much of the rest is parts, in 1/256; then parts and index entries. With bit 7 of the flags
 * the whole input is the file as it is; otherwise all checksums are made right, so that what they guard is reached.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "state/chunk_priv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define AS_IT_IS 0x80u
#define CONTENT_BYTES_MAX (16u << 20)

static void must_write(int fd, const void *data, size_t size, uint64_t offset)
{
    if (chunk_pwrite(fd, data, size, offset))
        abort();
}

/* Checks of parts that lie in the file are made right, those of others are as they come. */
static void make_file(int fd, const uint8_t *data, size_t size)
{
    uint8_t header[CHUNK_HEADER_BYTES], footer[CHUNK_FOOTER_BYTES] = CHUNK_END_MAGIC, extra[CHUNK_HEADER_BYTES + CHUNK_FOOTER_CHECKED];
    struct chunk_header fields = {.flags = data[0] & (CHUNK_COMPRESSED | CHUNK_LAYER), .size_bytes = 1 + chunk_number(data + 1, 3)};
    size_t parts = (size - 5) * data[4] / 256, count = (size - 5 - parts) / CHUNK_ENTRY_BYTES;
    uint8_t *index = malloc(count * CHUNK_ENTRY_BYTES + 1);
    if (!index)
        abort();
    for (size_t i = 0; i < count; i++) {
        struct chunk_entry entry;
        chunk_entry_decode(&entry, data + 5 + parts + i * CHUNK_ENTRY_BYTES);
        if (entry.offset >= CHUNK_HEADER_SPACE && entry.offset - CHUNK_HEADER_SPACE <= parts && entry.stored_bytes <= parts - (entry.offset - CHUNK_HEADER_SPACE))
            chunk_checksum(NULL, 0, data + 5 + (entry.offset - CHUNK_HEADER_SPACE), entry.stored_bytes, entry.check);
        chunk_entry_encode(&entry, index + i * CHUNK_ENTRY_BYTES);
    }
    chunk_header_encode(&fields, header);
    chunk_put_number(footer + 8, CHUNK_HEADER_SPACE + parts, 8);
    chunk_put_number(footer + 16, count, 8);
    memcpy(extra, header, sizeof header);
    memcpy(extra + sizeof header, footer, CHUNK_FOOTER_CHECKED);
    chunk_checksum(extra, sizeof extra, index, count * CHUNK_ENTRY_BYTES, footer + CHUNK_FOOTER_CHECKED);
    must_write(fd, header, sizeof header, 0);
    must_write(fd, data + 5, parts, CHUNK_HEADER_SPACE);
    must_write(fd, index, count * CHUNK_ENTRY_BYTES, CHUNK_HEADER_SPACE + parts);
    must_write(fd, footer, sizeof footer, CHUNK_HEADER_SPACE + parts + count * CHUNK_ENTRY_BYTES);
    free(index);
}

static void read_all(struct chunk_reader *reader)
{
    static uint8_t chunk[CHUNK_BYTES];
    const struct chunk_info *info = chunk_reader_info(reader);
    for (uint64_t i = 0; i * CHUNK_BYTES < info->size_bytes; i++) {
        struct error err = {0};
        uint64_t zero, present = chunk_reader_present(reader, i, &zero);
        if (zero & ~present)
            abort();
        if (chunk_reader_read(reader, i, ~0ull, chunk, &err) && !err.text[0])
            abort();
        (void)!chunk_reader_read(reader, i, present & -present, chunk, NULL);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct chunk_reader *reader = NULL;
    struct error err = {0};
    if (size < 6)
        return 0;
    int fd = memfd_create("chunks", MFD_CLOEXEC);
    if (fd < 0)
        abort();
    if (data[0] & AS_IT_IS)
        must_write(fd, data + 1, size - 1, 0);
    else
        make_file(fd, data, size);
    if (chunk_reader_open(&reader, fd, "file", NULL, CONTENT_BYTES_MAX, &err)) {
        if (!err.text[0])
            abort();
        close(fd);
        return 0;
    }
    read_all(reader);
    chunk_reader_close(reader);
    return 0;
}
