/*
 * Keys, encryption and checksums of chunk files. The file's key is HMAC-SHA256(master, text + salt), where master is the secret itself (32 bytes) or scrypt of it. The salt is
 * random for each file and no part is ever written twice at one offset, so key and nonce never come again.
 * Threading: a cipher is one thread's, all else has no state.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "state/chunk_priv.h"
#include "state/scrypt.h"
#include "util/gnutls_library.h"

#define NONCE_BYTES 12
#define SCRYPT_N 32768
#define SCRYPT_R 8
#define SCRYPT_P 1

struct chunk_cipher {
    gnutls_aead_cipher_hd_t handle; /* NULL: no key yet */
    uint8_t key[CHUNK_KEY_BYTES];
};

int chunk_secret_set(struct chunk_secret *secret, const void *data, size_t size_bytes)
{
    const uint8_t *bytes = data;
    if (size_bytes != CHUNK_KEY_BYTES && size_bytes && bytes[size_bytes - 1] == '\n')
        size_bytes--;
    if (size_bytes != CHUNK_KEY_BYTES && size_bytes && bytes[size_bytes - 1] == '\r')
        size_bytes--;
    if (size_bytes == 0 || size_bytes > CHUNK_SECRET_BYTES_MAX)
        return -EINVAL;
    memcpy(secret->data, data, size_bytes);
    secret->size_bytes = (uint32_t)size_bytes;
    return 0;
}

static int digit(uint8_t character)
{
    if (!isxdigit(character))
        return -1;
    return isdigit(character) ? character - '0' : tolower(character) - 'a' + 10;
}

/* The secret as a key; false: it is a passphrase. */
static bool raw_key(const struct chunk_secret *secret, uint8_t key[CHUNK_KEY_BYTES])
{
    if (secret->size_bytes == CHUNK_KEY_BYTES)
        memcpy(key, secret->data, CHUNK_KEY_BYTES);
    else if (secret->size_bytes == 2 * CHUNK_KEY_BYTES)
        for (unsigned i = 0; i < CHUNK_KEY_BYTES; i++) {
            int high = digit(secret->data[2 * i]), low = digit(secret->data[2 * i + 1]);
            if (high < 0 || low < 0)
                return false;
            key[i] = (uint8_t)(high << 4 | low);
        }
    else
        return false;
    return true;
}

static bool keyed_hash(const uint8_t key[CHUNK_KEY_BYTES], const char *text, const uint8_t salt[CHUNK_SALT_BYTES], uint8_t out[CHUNK_KEY_BYTES])
{
    uint8_t message[64 + CHUNK_SALT_BYTES];
    size_t length = strlen(text);
    memcpy(message, text, length);
    memcpy(message + length, salt, CHUNK_SALT_BYTES);
    return gnutls_hmac_fast(GNUTLS_MAC_SHA256, key, CHUNK_KEY_BYTES, message, length + CHUNK_SALT_BYTES, out) == 0;
}

int chunk_prepare_encryption(struct error *err)
{
    return library_load(&gnutls_library_file, err);
}

int chunk_key_make(const struct chunk_secret *secret, uint32_t *key_kind, const uint8_t salt[CHUNK_SALT_BYTES], uint8_t key[CHUNK_KEY_BYTES],
                   uint8_t key_check[CHUNK_CHECK_BYTES])
{
    uint8_t master[CHUNK_KEY_BYTES], check[CHUNK_KEY_BYTES];
    struct error why = {0};
    int r = chunk_prepare_encryption(&why);
    if (r)
        return r;
    bool good = true, raw = raw_key(secret, master);
    *key_kind = raw ? CHUNK_KEY_RAW : CHUNK_KEY_SCRYPT;
    if (!raw)
        good = scrypt(secret->data, secret->size_bytes, salt, CHUNK_SALT_BYTES, SCRYPT_N, SCRYPT_R, SCRYPT_P, master, sizeof master) == 0;
    good = good && keyed_hash(master, "doppel chunk file key", salt, key) && keyed_hash(key, "doppel chunk file check", salt, check);
    if (good)
        memcpy(key_check, check, CHUNK_CHECK_BYTES);
    explicit_bzero(master, sizeof master);
    return good ? 0 : -ENOMEM;
}

struct chunk_cipher *chunk_cipher_create(void)
{
    return calloc(1, sizeof(struct chunk_cipher));
}

void chunk_cipher_destroy(struct chunk_cipher *cipher)
{
    if (!cipher)
        return;
    if (cipher->handle)
        gnutls_aead_cipher_deinit(cipher->handle);
    explicit_bzero(cipher->key, sizeof cipher->key);
    free(cipher);
}

static void make_nonce(enum chunk_part part, uint64_t offset, uint8_t nonce[NONCE_BYTES])
{
    chunk_put_number(nonce, part, 4);
    chunk_put_number(nonce + 4, offset, 8);
}

static bool set_key(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES])
{
    const gnutls_datum_t datum = {(void *)(uintptr_t)key, CHUNK_KEY_BYTES};
    if (cipher->handle && memcmp(cipher->key, key, CHUNK_KEY_BYTES) == 0)
        return true;
    if (cipher->handle)
        gnutls_aead_cipher_deinit(cipher->handle);
    cipher->handle = NULL;
    memcpy(cipher->key, key, CHUNK_KEY_BYTES);
    return gnutls_aead_cipher_init(&cipher->handle, GNUTLS_CIPHER_AES_256_GCM, &datum) == 0;
}

int chunk_seal(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES], enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, uint8_t *data,
               size_t size_bytes, uint8_t tag[CHUNK_CHECK_BYTES])
{
    uint8_t nonce[NONCE_BYTES];
    const struct iovec also = {(void *)(uintptr_t)extra, extra_bytes}, text = {data, size_bytes};
    size_t tag_bytes = CHUNK_CHECK_BYTES;
    make_nonce(part, offset, nonce);
    return set_key(cipher, key) && gnutls_aead_cipher_encryptv2(cipher->handle, nonce, sizeof nonce, &also, extra_bytes ? 1 : 0, &text, 1, tag, &tag_bytes) == 0 ? 0 : -EIO;
}

int chunk_unseal(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES], enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, uint8_t *data,
                 size_t size_bytes, const uint8_t tag[CHUNK_CHECK_BYTES])
{
    uint8_t nonce[NONCE_BYTES], expected[CHUNK_CHECK_BYTES];
    const struct iovec also = {(void *)(uintptr_t)extra, extra_bytes}, text = {data, size_bytes};
    memcpy(expected, tag, sizeof expected);
    make_nonce(part, offset, nonce);
    return set_key(cipher, key) && gnutls_aead_cipher_decryptv2(cipher->handle, nonce, sizeof nonce, &also, extra_bytes ? 1 : 0, &text, 1, expected, sizeof expected) == 0 ? 0 : -EBADMSG;
}

void chunk_checksum(const void *extra, size_t extra_bytes, const void *data, size_t size_bytes, uint8_t check[CHUNK_CHECK_BYTES])
{
    XXH3_state_t state;
    XXH128_canonical_t canonical;
    XXH3_128bits_reset(&state);
    XXH3_128bits_update(&state, extra, extra_bytes);
    XXH3_128bits_update(&state, data, size_bytes);
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state));
    memcpy(check, canonical.digest, CHUNK_CHECK_BYTES);
}
