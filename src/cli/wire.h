/*
 * Connections between hosts for migration: Unix sockets, TCP, and TLS over TCP (GnuTLS), by address:
 *
 *     unix:PATH        HOST        HOST:PORT        [IPV6]:PORT
 *
 * Who uses the connection has a socket. TLS is done by a process of its own, so that keys are not where guests are.
 */
#ifndef DOPPEL_CLI_WIRE_H
#define DOPPEL_CLI_WIRE_H

#include <stdbool.h>
#include <sys/types.h>

#include "util/error.h"

#define WIRE_PORT "4446"
#define WIRE_LISTEN "0.0.0.0:" WIRE_PORT
#define WIRE_ADDRESS_BYTES 256u

/* Who may take part. Of a Unix socket nothing is asked: its file's permissions are what counts. */
struct wire_security {
    bool insecure;        /* TCP without TLS */
    const char *key_file; /* a secret that both sides have (TLS-PSK) */
    const char *cert_file, *cert_key_file, *ca_file; /* or certificates; each side shows its own, and wants the other's to be of `ca_file` */
};

struct wire {
    int fd;        /* a stream socket: what is written goes there, what is read comes from there */
    pid_t process; /* that does TLS for it; 0: none */
};

/* 0, or -errno with what the user can do. */
int wire_check(const char *address, const struct wire_security *security, struct error *err) __attribute__((warn_unused_result));
int wire_connect(struct wire *wire, const char *address, const struct wire_security *security, struct error *err) __attribute__((warn_unused_result));
/* A descriptor, or -errno. `shown` gets the address with the port that was taken. */
int wire_listen(const char *address, char shown[WIRE_ADDRESS_BYTES], struct error *err) __attribute__((warn_unused_result));
int wire_accept(struct wire *wire, int listen_fd, const char *address, const struct wire_security *security, struct error *err) __attribute__((warn_unused_result));
/* Closes the descriptor and waits until all that was said has arrived, or cannot any more, and copies of the descriptor elsewhere are closed. */
void wire_close(struct wire *wire);

#endif
