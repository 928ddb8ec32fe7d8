/* GnuTLS (util/library.h): connections between hosts, and the ciphers and hashes of files. The eight libraries with it take some 1.5 ms. */
#ifndef DOPPEL_UTIL_GNUTLS_LIBRARY_H
#define DOPPEL_UTIL_GNUTLS_LIBRARY_H

#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>

#include "util/library.h"

#define GNUTLS_FUNCTIONS(EACH) \
    EACH(gnutls_aead_cipher_decryptv2) \
    EACH(gnutls_aead_cipher_deinit) \
    EACH(gnutls_aead_cipher_encryptv2) \
    EACH(gnutls_aead_cipher_init) \
    EACH(gnutls_bye) \
    EACH(gnutls_certificate_allocate_credentials) \
    EACH(gnutls_certificate_server_set_request) \
    EACH(gnutls_certificate_set_x509_key_file) \
    EACH(gnutls_certificate_set_x509_trust_file) \
    EACH(gnutls_credentials_set) \
    EACH(gnutls_error_is_fatal) \
    EACH(gnutls_free) \
    EACH(gnutls_handshake) \
    EACH(gnutls_handshake_set_timeout) \
    EACH(gnutls_hash) \
    EACH(gnutls_hash_deinit) \
    EACH(gnutls_hash_get_len) \
    EACH(gnutls_hash_init) \
    EACH(gnutls_hmac_fast) \
    EACH(gnutls_init) \
    EACH(gnutls_malloc) \
    EACH(gnutls_pbkdf2) \
    EACH(gnutls_priority_set_direct) \
    EACH(gnutls_psk_allocate_client_credentials) \
    EACH(gnutls_psk_allocate_server_credentials) \
    EACH(gnutls_psk_set_client_credentials) \
    EACH(gnutls_psk_set_server_credentials_function) \
    EACH(gnutls_record_recv) \
    EACH(gnutls_record_send) \
    EACH(gnutls_session_get_ptr) \
    EACH(gnutls_session_set_ptr) \
    EACH(gnutls_session_set_verify_cert) \
    EACH(gnutls_strerror) \
    EACH(gnutls_transport_set_int2)

struct gnutls_library {
#define MEMBER(name) __typeof__(name) *name;
    GNUTLS_FUNCTIONS(MEMBER)
#undef MEMBER
};

extern struct gnutls_library gnutls_library; /* all NULL before it is loaded */
extern struct library gnutls_library_file;

#ifndef GNUTLS_LIBRARY_NAMES
#undef gnutls_free
#define gnutls_free(a) ((*gnutls_library.gnutls_free)((void *)(a)), (a) = NULL)
#define gnutls_aead_cipher_decryptv2 gnutls_library.gnutls_aead_cipher_decryptv2
#define gnutls_aead_cipher_deinit gnutls_library.gnutls_aead_cipher_deinit
#define gnutls_aead_cipher_encryptv2 gnutls_library.gnutls_aead_cipher_encryptv2
#define gnutls_aead_cipher_init gnutls_library.gnutls_aead_cipher_init
#define gnutls_bye gnutls_library.gnutls_bye
#define gnutls_certificate_allocate_credentials gnutls_library.gnutls_certificate_allocate_credentials
#define gnutls_certificate_server_set_request gnutls_library.gnutls_certificate_server_set_request
#define gnutls_certificate_set_x509_key_file gnutls_library.gnutls_certificate_set_x509_key_file
#define gnutls_certificate_set_x509_trust_file gnutls_library.gnutls_certificate_set_x509_trust_file
#define gnutls_credentials_set gnutls_library.gnutls_credentials_set
#define gnutls_error_is_fatal gnutls_library.gnutls_error_is_fatal
#define gnutls_handshake gnutls_library.gnutls_handshake
#define gnutls_handshake_set_timeout gnutls_library.gnutls_handshake_set_timeout
#define gnutls_hash gnutls_library.gnutls_hash
#define gnutls_hash_deinit gnutls_library.gnutls_hash_deinit
#define gnutls_hash_get_len gnutls_library.gnutls_hash_get_len
#define gnutls_hash_init gnutls_library.gnutls_hash_init
#define gnutls_hmac_fast gnutls_library.gnutls_hmac_fast
#define gnutls_init gnutls_library.gnutls_init
#define gnutls_malloc (*gnutls_library.gnutls_malloc)
#define gnutls_pbkdf2 gnutls_library.gnutls_pbkdf2
#define gnutls_priority_set_direct gnutls_library.gnutls_priority_set_direct
#define gnutls_psk_allocate_client_credentials gnutls_library.gnutls_psk_allocate_client_credentials
#define gnutls_psk_allocate_server_credentials gnutls_library.gnutls_psk_allocate_server_credentials
#define gnutls_psk_set_client_credentials gnutls_library.gnutls_psk_set_client_credentials
#define gnutls_psk_set_server_credentials_function gnutls_library.gnutls_psk_set_server_credentials_function
#define gnutls_record_recv gnutls_library.gnutls_record_recv
#define gnutls_record_send gnutls_library.gnutls_record_send
#define gnutls_session_get_ptr gnutls_library.gnutls_session_get_ptr
#define gnutls_session_set_ptr gnutls_library.gnutls_session_set_ptr
#define gnutls_session_set_verify_cert gnutls_library.gnutls_session_set_verify_cert
#define gnutls_strerror gnutls_library.gnutls_strerror
#define gnutls_transport_set_int2 gnutls_library.gnutls_transport_set_int2
#endif

#endif
