/*
 * Session tokens: the moment of expiry (CLOCK_MONOTONIC, nanoseconds), and a code over it (HMAC-SHA256) that only this service can make. Nothing is kept of tokens that were given
 * out, so a guest may ask for as many as it likes.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "metadata/metadata_priv.h"
#include "util/glib_library.h"
#include "util/loop.h"

#define EXPIRY_DIGITS 16
#define CODE_DIGITS 64
#define NS_PER_S 1000000000ull
_Static_assert(TOKEN_ROOM == EXPIRY_DIGITS + CODE_DIGITS + 1, "room for a token");

int token_draw_key(uint8_t key[TOKEN_KEY_BYTES])
{
    if (library_load(&glib_library_file, NULL))
        return -ENOENT;
    return getrandom(key, TOKEN_KEY_BYTES, 0) == TOKEN_KEY_BYTES ? 0 : -EIO;
}

static bool write_token(const uint8_t *key, uint64_t expiry_ns, char token[TOKEN_ROOM])
{
    snprintf(token, TOKEN_ROOM, "%0*llx", EXPIRY_DIGITS, (unsigned long long)expiry_ns);
    char *code = g_compute_hmac_for_data(G_CHECKSUM_SHA256, key, TOKEN_KEY_BYTES, (const guchar *)token, EXPIRY_DIGITS);
    if (!code || strlen(code) != CODE_DIGITS) {
        g_free(code);
        return false;
    }
    memcpy(token + EXPIRY_DIGITS, code, CODE_DIGITS + 1);
    g_free(code);
    return true;
}

bool token_make(const uint8_t key[TOKEN_KEY_BYTES], uint32_t ttl_s, char token[TOKEN_ROOM])
{
    return write_token(key, loop_now_ns() + ttl_s * NS_PER_S, token);
}

bool token_is_valid(const uint8_t key[TOKEN_KEY_BYTES], const char *token)
{
    char right[TOKEN_ROOM], digits[EXPIRY_DIGITS + 1];
    unsigned different = 0;
    if (strlen(token) != TOKEN_ROOM - 1)
        return false;
    memcpy(digits, token, EXPIRY_DIGITS);
    digits[EXPIRY_DIGITS] = '\0';
    uint64_t expiry_ns = strtoull(digits, NULL, 16); /* what is no number comes out different below */
    if (!write_token(key, expiry_ns, right))
        return false;
    for (unsigned i = 0; i < TOKEN_ROOM; i++) /* all of it, so that the time tells nothing */
        different |= (unsigned char)(token[i] ^ right[i]);
    return !different && loop_now_ns() < expiry_ns;
}
