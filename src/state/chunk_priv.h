/* Chunk files, inside: the layout (docs/formats.md) and what writer and reader share. Integers are little endian. */
#ifndef DOPPEL_STATE_CHUNK_PRIV_H
#define DOPPEL_STATE_CHUNK_PRIV_H

#include "state/chunk_file.h"

#define CHUNK_VERSION 1u
#define CHUNK_MAGIC "DOPPELCF"
#define CHUNK_END_MAGIC "DOPPELCE"
#define CHUNK_HEADER_BYTES 160u      /* what is used of it */
#define CHUNK_HEADER_SPACE 4096u     /* parts begin here */
#define CHUNK_ENTRY_BYTES 48u
#define CHUNK_FOOTER_BYTES 48u
#define CHUNK_FOOTER_CHECKED 32u     /* the part that the footer's own check covers */
#define CHUNK_ENTRIES_MAX (1u << 24)
#define CHUNK_CHECK_BYTES 16u
#define CHUNK_SALT_BYTES 32u
#define CHUNK_KEY_BYTES 32u

enum { CHUNK_COMPRESSED = 1, CHUNK_ENCRYPTED = 2, CHUNK_LAYER = 4, CHUNK_FLAGS_KNOWN = 7 };
enum { CHUNK_KEY_NONE, CHUNK_KEY_RAW, CHUNK_KEY_SCRYPT };

struct chunk_header {
    uint32_t flags, key_kind;
    uint64_t size_bytes;
    struct chunk_id id, base;
    uint8_t salt[CHUNK_SALT_BYTES], key_check[CHUNK_CHECK_BYTES];
};

struct chunk_entry {
    uint64_t offset, present, zero;
    uint32_t stored_bytes, chunk;
    uint8_t check[CHUNK_CHECK_BYTES];
};

void chunk_header_encode(const struct chunk_header *header, uint8_t bytes[CHUNK_HEADER_BYTES]);
int chunk_header_decode(struct chunk_header *header, const uint8_t bytes[CHUNK_HEADER_BYTES], const char *name, struct error *err);
void chunk_entry_encode(const struct chunk_entry *entry, uint8_t bytes[CHUNK_ENTRY_BYTES]);
void chunk_entry_decode(struct chunk_entry *entry, const uint8_t bytes[CHUNK_ENTRY_BYTES]);
uint64_t chunk_number(const uint8_t *bytes, unsigned size_bytes);
void chunk_put_number(uint8_t *bytes, uint64_t value, unsigned size_bytes);

int chunk_pwrite(int fd, const void *data, uint64_t size_bytes, uint64_t offset);
int chunk_pread(int fd, void *data, uint64_t size_bytes, uint64_t offset); /* -ENODATA: it ends before */

static inline unsigned chunk_count(uint64_t mask)
{
    return (unsigned)__builtin_popcountll(mask);
}

/* Pages that chunk number `chunk` has in content of that size. */
static inline uint64_t chunk_mask(uint64_t size_bytes, uint64_t chunk)
{
    uint64_t pages = (size_bytes - chunk * CHUNK_BYTES + CHUNK_PAGE_BYTES - 1) / CHUNK_PAGE_BYTES;
    return pages >= CHUNK_PAGES ? ~0ull : (1ull << pages) - 1;
}

static inline uint64_t chunk_chunks(uint64_t size_bytes)
{
    return (size_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
}

/* ---- chunk_crypt.c: keys and checks ---- */

struct chunk_cipher; /* of one thread */

/* One key for one file: made from the secret, and from the salt, which is drawn anew for each file; so the numbers of parts can be nonces. Fills key_kind (writing: by the secret). */
int chunk_key_make(const struct chunk_secret *secret, uint32_t *key_kind, const uint8_t salt[CHUNK_SALT_BYTES], uint8_t key[CHUNK_KEY_BYTES],
                   uint8_t key_check[CHUNK_CHECK_BYTES]);
struct chunk_cipher *chunk_cipher_create(void); /* NULL: no memory */
void chunk_cipher_destroy(struct chunk_cipher *cipher);

/* The nonce: what a part is, and where. */
enum chunk_part { CHUNK_PART_PAGES, CHUNK_PART_INDEX };
/* In place. `extra` is authenticated with it. 0 or -EIO. */
int chunk_seal(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES], enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, uint8_t *data,
               size_t size_bytes, uint8_t tag[CHUNK_CHECK_BYTES]);
/* The reverse; -EBADMSG: not what was sealed. */
int chunk_unseal(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES], enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, uint8_t *data,
                 size_t size_bytes, const uint8_t tag[CHUNK_CHECK_BYTES]);
/* Without a key: a checksum of the same. */
void chunk_checksum(const void *extra, size_t extra_bytes, const void *data, size_t size_bytes, uint8_t check[CHUNK_CHECK_BYTES]);

#endif
