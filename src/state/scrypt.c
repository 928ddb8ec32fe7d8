/* scrypt (scrypt.h), in the words of RFC 7914. */
#include "state/scrypt.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "util/gnutls_library.h"

#define WORDS 16u /* of a block of Salsa20 */

static uint32_t rotate(uint32_t value, unsigned bits)
{
    return value << bits | value >> (32 - bits);
}

static void quarter(uint32_t x[WORDS], unsigned a, unsigned b, unsigned c, unsigned d)
{
    x[b] ^= rotate(x[a] + x[d], 7);
    x[c] ^= rotate(x[b] + x[a], 9);
    x[d] ^= rotate(x[c] + x[b], 13);
    x[a] ^= rotate(x[d] + x[c], 18);
}

/* Section 3: Salsa20/8. */
static void salsa(uint32_t block[WORDS])
{
    uint32_t x[WORDS];
    memcpy(x, block, sizeof x);
    for (unsigned round = 0; round < 8; round += 2) {
        for (unsigned i = 0; i < 4; i++) /* columns, each from the diagonal on */
            quarter(x, 5 * i, (5 * i + 4) % 16, (5 * i + 8) % 16, (5 * i + 12) % 16);
        for (unsigned i = 0; i < 4; i++) /* rows */
            quarter(x, 5 * i, 4 * i + (i + 1) % 4, 4 * i + (i + 2) % 4, 4 * i + (i + 3) % 4);
    }
    for (unsigned i = 0; i < WORDS; i++)
        block[i] += x[i];
}

/* Section 4: scryptBlockMix, from `in` to `out`. */
static void block_mix(const uint32_t *in, uint32_t *out, uint32_t r)
{
    uint32_t x[WORDS];
    memcpy(x, in + (2 * r - 1) * WORDS, sizeof x);
    for (uint32_t i = 0; i < 2 * r; i++) {
        for (unsigned n = 0; n < WORDS; n++)
            x[n] ^= in[i * WORDS + n];
        salsa(x);
        memcpy(out + (i / 2 + (i & 1) * r) * WORDS, x, sizeof x);
    }
}

/* Section 5: scryptROMix. `room` is for n + 1 blocks. */
static void rom_mix(uint32_t *block, uint32_t n, uint32_t r, uint32_t *room)
{
    size_t words = 2 * (size_t)r * WORDS;
    uint32_t *mixed = room + n * words;
    for (size_t i = 0; i < words; i++)
        block[i] = le32toh(block[i]);
    for (uint32_t i = 0; i < n; i++) {
        memcpy(room + i * words, block, words * sizeof *block);
        block_mix(room + i * words, block, r);
    }
    for (uint32_t i = 0; i < n; i++) {
        const uint32_t *other = room + (block[words - WORDS] & (n - 1)) * words;
        for (size_t k = 0; k < words; k++)
            mixed[k] = block[k] ^ other[k];
        block_mix(mixed, block, r);
    }
    for (size_t i = 0; i < words; i++)
        block[i] = htole32(block[i]);
}

int scrypt(const void *passphrase, size_t passphrase_bytes, const void *salt, size_t salt_bytes, uint32_t n, uint32_t r, uint32_t p, uint8_t *key, size_t key_bytes)
{
    size_t block_bytes = 128 * (size_t)r, room_bytes = ((size_t)n + 1) * block_bytes;
    uint8_t *blocks = malloc(p * block_bytes);
    uint32_t *room = malloc(room_bytes);
    const gnutls_datum_t secret = {(void *)(uintptr_t)passphrase, (unsigned)passphrase_bytes}, first = {(void *)(uintptr_t)salt, (unsigned)salt_bytes},
                         second = {blocks, (unsigned)(p * block_bytes)};
    bool good = blocks && room && gnutls_pbkdf2(GNUTLS_MAC_SHA256, &secret, &first, 1, blocks, p * block_bytes) == 0;
    for (uint32_t i = 0; good && i < p; i++)
        rom_mix((uint32_t *)(void *)(blocks + i * block_bytes), n, r, room);
    good = good && gnutls_pbkdf2(GNUTLS_MAC_SHA256, &secret, &second, 1, key, key_bytes) == 0;
    if (blocks)
        explicit_bzero(blocks, p * block_bytes);
    if (room)
        explicit_bzero(room, room_bytes);
    free(blocks);
    free(room);
    return good ? 0 : -ENOMEM;
}
