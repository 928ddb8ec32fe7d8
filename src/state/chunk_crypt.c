/*
 * Keys, encryption and checksums of chunk files. The file's key is HMAC-SHA256(master, text + salt), where master is the secret itself (32 bytes) or scrypt of it. The salt is
 * random for each file and no part is ever written twice at one offset, so key and nonce never come again.
 * Threading: a cipher is one thread's, all else has no state.
 */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "state/chunk_priv.h"

#define NONCE_BYTES 12
#define SCRYPT_N 32768
#define SCRYPT_R 8
#define SCRYPT_P 1
#define SCRYPT_MEMORY (64ull << 20)

struct chunk_cipher {
    EVP_CIPHER_CTX *evp;
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
    return HMAC(EVP_sha256(), key, CHUNK_KEY_BYTES, message, length + CHUNK_SALT_BYTES, out, NULL) != NULL;
}

int chunk_key_make(const struct chunk_secret *secret, uint32_t *key_kind, const uint8_t salt[CHUNK_SALT_BYTES], uint8_t key[CHUNK_KEY_BYTES],
                   uint8_t key_check[CHUNK_CHECK_BYTES])
{
    uint8_t master[CHUNK_KEY_BYTES], check[CHUNK_KEY_BYTES];
    OPENSSL_init_crypto(OPENSSL_INIT_NO_LOAD_CONFIG, NULL); /* no file of the host's is looked for: threads that come here may open none */
    bool good = true, raw = raw_key(secret, master);
    *key_kind = raw ? CHUNK_KEY_RAW : CHUNK_KEY_SCRYPT;
    if (!raw)
        good = EVP_PBE_scrypt((const char *)secret->data, secret->size_bytes, salt, CHUNK_SALT_BYTES, SCRYPT_N, SCRYPT_R, SCRYPT_P, SCRYPT_MEMORY, master, sizeof master) == 1;
    good = good && keyed_hash(master, "doppel chunk file key", salt, key) && keyed_hash(key, "doppel chunk file check", salt, check);
    if (good)
        memcpy(key_check, check, CHUNK_CHECK_BYTES);
    OPENSSL_cleanse(master, sizeof master);
    return good ? 0 : -ENOMEM;
}

struct chunk_cipher *chunk_cipher_create(void)
{
    struct chunk_cipher *cipher = calloc(1, sizeof *cipher);
    if (cipher)
        cipher->evp = EVP_CIPHER_CTX_new();
    if (cipher && cipher->evp)
        return cipher;
    free(cipher);
    return NULL;
}

void chunk_cipher_destroy(struct chunk_cipher *cipher)
{
    if (!cipher)
        return;
    EVP_CIPHER_CTX_free(cipher->evp);
    free(cipher);
}

static void make_nonce(enum chunk_part part, uint64_t offset, uint8_t nonce[NONCE_BYTES])
{
    chunk_put_number(nonce, part, 4);
    chunk_put_number(nonce + 4, offset, 8);
}

/* The library's lengths are ints. */
static bool begin(struct chunk_cipher *cipher, const uint8_t *key, enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, size_t size_bytes, int encrypt)
{
    uint8_t nonce[NONCE_BYTES];
    int length;
    make_nonce(part, offset, nonce);
    return size_bytes <= 1u << 30 && EVP_CipherInit_ex(cipher->evp, EVP_aes_256_gcm(), NULL, key, nonce, encrypt) == 1 &&
           (!extra_bytes || EVP_CipherUpdate(cipher->evp, NULL, &length, extra, (int)extra_bytes) == 1);
}

int chunk_seal(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES], enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, uint8_t *data,
               size_t size_bytes, uint8_t tag[CHUNK_CHECK_BYTES])
{
    int length;
    bool good = begin(cipher, key, part, offset, extra, extra_bytes, size_bytes, 1) && EVP_CipherUpdate(cipher->evp, data, &length, data, (int)size_bytes) == 1 &&
                EVP_CipherFinal_ex(cipher->evp, data + size_bytes, &length) == 1 &&
                EVP_CIPHER_CTX_ctrl(cipher->evp, EVP_CTRL_AEAD_GET_TAG, CHUNK_CHECK_BYTES, tag) == 1;
    return good ? 0 : -EIO;
}

int chunk_unseal(struct chunk_cipher *cipher, const uint8_t key[CHUNK_KEY_BYTES], enum chunk_part part, uint64_t offset, const void *extra, size_t extra_bytes, uint8_t *data,
                 size_t size_bytes, const uint8_t tag[CHUNK_CHECK_BYTES])
{
    uint8_t expected[CHUNK_CHECK_BYTES];
    int length;
    memcpy(expected, tag, sizeof expected);
    bool good = begin(cipher, key, part, offset, extra, extra_bytes, size_bytes, 0) && EVP_CipherUpdate(cipher->evp, data, &length, data, (int)size_bytes) == 1 &&
                EVP_CIPHER_CTX_ctrl(cipher->evp, EVP_CTRL_AEAD_SET_TAG, CHUNK_CHECK_BYTES, expected) == 1 && EVP_CipherFinal_ex(cipher->evp, data + size_bytes, &length) == 1;
    return good ? 0 : -EBADMSG;
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
