/* scrypt (RFC 7914): a key from a passphrase, slow and in much memory on purpose. Any thread. */
#ifndef DOPPEL_STATE_SCRYPT_H
#define DOPPEL_STATE_SCRYPT_H

#include <stddef.h>
#include <stdint.h>

/* n: a power of two from 2 on; takes 128 * r * n bytes meanwhile. Needs GnuTLS loaded. 0, or -ENOMEM. */
int scrypt(const void *passphrase, size_t passphrase_bytes, const void *salt, size_t salt_bytes, uint32_t n, uint32_t r, uint32_t p, uint8_t *key, size_t key_bytes)
    __attribute__((warn_unused_result));

#endif
