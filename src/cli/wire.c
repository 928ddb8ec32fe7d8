/* Connections between hosts (wire.h). */
#include "cli/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "util/gnutls_library.h"

#define KEY_BYTES_MIN 16u
#define KEY_BYTES_MAX 4096u
#define HANDSHAKE_MS 10000u
#define BUFFER_BYTES (1 << 20)
#define PIECE_BYTES (64u << 10)
#define PSK_USER "doppel"
/* AES before ChaCha20: all hosts have instructions for it. Secrets go with SHA-256, which of AES only 128 bits have in TLS 1.3 (RFC 8446, 4.2.11). */
#define CIPHERS ":-VERS-ALL:+VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM:+AES-256-GCM:+CHACHA20-POLY1305"
#define PRIORITIES "NORMAL" CIPHERS
#define PSK_PRIORITIES "NORMAL" CIPHERS ":-KX-ALL:+ECDHE-PSK:+DHE-PSK"

/* One end of a TLS connection, of the process that does that. */
struct tls {
    int fd, inner; /* the wire; what the user of the connection writes to and reads from */
    bool server;
    gnutls_session_t session;
    gnutls_certificate_credentials_t certificates;
    gnutls_psk_client_credentials_t psk_client;
    gnutls_psk_server_credentials_t psk_server;
    gnutls_datum_t key;
};

static const char *unix_path(const char *address)
{
    return strncmp(address, "unix:", 5) == 0 ? address + 5 : NULL;
}

/* Raw bytes: as many as there are, but for a line's end at the end. */
static int read_key(const char *path, gnutls_datum_t *key, struct error *err)
{
    unsigned char data[KEY_BYTES_MAX + 1];
    FILE *file = fopen(path, "re");
    size_t size = file ? fread(data, 1, sizeof data, file) : 0;
    int r = !file || ferror(file) ? error_set(err, -errno, "cannot read %s: %s", path, strerror(errno)) : 0;
    if (file)
        fclose(file);
    if (r == 0 && size > 0 && size <= KEY_BYTES_MAX && data[size - 1] == '\n')
        size--;
    if (r == 0 && (size < KEY_BYTES_MIN || size > KEY_BYTES_MAX))
        r = error_set(err, -EINVAL, "%s is no key: it has to have %u to %u bytes (head -c 32 /dev/urandom > FILE makes one)", path, KEY_BYTES_MIN, KEY_BYTES_MAX);
    *key = (gnutls_datum_t){.data = r ? NULL : gnutls_malloc(size), .size = (unsigned)size};
    if (key->data)
        memcpy(key->data, data, size);
    else if (r == 0)
        r = error_set(err, -ENOMEM, "out of memory");
    explicit_bzero(data, sizeof data);
    return r;
}

static void free_key(gnutls_datum_t *key)
{
    if (!key->data)
        return;
    explicit_bzero(key->data, key->size);
    gnutls_free(key->data);
}

int wire_check(const char *address, const struct wire_security *security, struct error *err)
{
    const char *path = unix_path(address);
    bool certificates = security->cert_file || security->cert_key_file || security->ca_file;
    if (!*address || (path && (!*path || strlen(path) >= sizeof((struct sockaddr_un){0}).sun_path)))
        return error_set(err, -EINVAL, "\"%s\" is no address: unix:PATH (of 1 to 107 bytes), HOST, HOST:PORT or [IPV6]:PORT", address);
    if (path)
        return 0;
    if (certificates && !(security->cert_file && security->cert_key_file && security->ca_file))
        return error_set(err, -EINVAL, "--cert, --cert-key and --ca belong together");
    if ((security->insecure != 0) + (security->key_file != NULL) + certificates != 1)
        return error_set(err, -EINVAL, "over TCP the guest's memory is to be encrypted: give both sides --key-file with the same secret, or --cert, --cert-key and --ca; or --insecure");
    gnutls_datum_t key = {0};
    int r = security->insecure ? 0 : library_load(&gnutls_library_file, err);
    if (r == 0 && security->key_file)
        r = read_key(security->key_file, &key, err);
    free_key(&key);
    return r;
}

/* ---- sockets ---- */

static int unix_socket(const char *path, struct sockaddr_un *address)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(address->sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    return fd < 0 ? -errno : fd;
}

/* HOST, HOST:PORT, [IPV6]:PORT. */
static int resolve(const char *address, bool listens, struct addrinfo **list, struct error *err)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = listens ? AI_PASSIVE : 0};
    char host[256];
    const char *port = WIRE_PORT, *end, *from = address;
    if (*address == '[' && (end = strchr(address, ']')) && (!end[1] || end[1] == ':')) {
        from = address + 1;
        port = end[1] ? end + 2 : port;
    } else {
        end = strchr(address, ':');
        if (end && strchr(end + 1, ':')) /* IPv6 by itself */
            end = NULL;
        port = end ? end + 1 : port;
        end = end ? end : address + strlen(address);
    }
    if ((size_t)(end - from) >= sizeof host)
        return error_set(err, -EINVAL, "\"%s\" is no address", address);
    snprintf(host, sizeof host, "%.*s", (int)(end - from), from);
    int r = getaddrinfo(*host ? host : NULL, port, &hints, list);
    return r ? error_set(err, -EHOSTUNREACH, "%s: %s", address, r == EAI_SYSTEM ? strerror(errno) : gai_strerror(r)) : 0;
}

static void tune(int fd)
{
    const int on = 1, idle_s = 5, count = 4;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on); /* a link that is cut is noticed in some 25 s */
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
    const unsigned patience_ms = 25000;
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof patience_ms);
}

static int connect_socket(const char *address, struct error *err)
{
    const char *path = unix_path(address);
    struct sockaddr_un name;
    struct addrinfo *list;
    if (path) {
        int fd = unix_socket(path, &name);
        if (fd >= 0 && connect(fd, (struct sockaddr *)&name, sizeof name) == 0)
            return fd;
        int r = error_set(err, fd < 0 ? fd : -errno, "cannot connect to %s: %s", address, strerror(fd < 0 ? -fd : errno));
        if (fd >= 0)
            close(fd);
        return r;
    }
    int r = resolve(address, false, &list, err), fd = -1;
    for (struct addrinfo *one = r ? NULL : list; one && fd < 0; one = one->ai_next) {
        fd = socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, one->ai_addr, one->ai_addrlen) == 0)
            continue;
        r = error_set(err, -errno, "cannot connect to %s: %s", address, strerror(errno));
        close(fd);
        fd = -1;
    }
    if (r == 0 || fd >= 0)
        freeaddrinfo(list);
    if (fd >= 0)
        tune(fd);
    return fd >= 0 ? fd : r ? r : error_set(err, -EHOSTUNREACH, "cannot connect to %s", address);
}

/* A socket's file that nobody listens at is left over. */
static int listen_unix(const char *path, const char *address, struct error *err)
{
    struct sockaddr_un name;
    struct stat st;
    int fd = unix_socket(path, &name), other;
    if (fd < 0)
        return error_set(err, fd, "cannot listen at %s: %s", address, strerror(-fd));
    if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode) && (other = unix_socket(path, &name)) >= 0) {
        if (connect(other, (struct sockaddr *)&name, sizeof name) && errno == ECONNREFUSED)
            unlink(path);
        close(other);
    }
    mode_t before = umask(0177);
    int r = bind(fd, (struct sockaddr *)&name, sizeof name) || listen(fd, 1) ? -errno : 0;
    umask(before);
    if (r == 0)
        return fd;
    close(fd);
    return error_set(err, r, "cannot listen at %s: %s", address, strerror(-r));
}

int wire_listen(const char *address, char shown[WIRE_ADDRESS_BYTES], struct error *err)
{
    const char *path = unix_path(address);
    struct addrinfo *list;
    const int on = 1;
    snprintf(shown, WIRE_ADDRESS_BYTES, "%s", address);
    if (path)
        return listen_unix(path, address, err);
    int r = resolve(address, true, &list, err), fd = -1;
    if (r)
        return r;
    for (struct addrinfo *one = list; one && fd < 0; one = one->ai_next) {
        fd = socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd >= 0)
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (fd >= 0 && bind(fd, one->ai_addr, one->ai_addrlen) == 0 && listen(fd, 1) == 0)
            continue;
        r = error_set(err, -errno, "cannot listen at %s: %s", address, strerror(errno));
        if (fd >= 0)
            close(fd);
        fd = -1;
    }
    freeaddrinfo(list);
    if (fd < 0)
        return r;
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    char host[128], port[16];
    if (getsockname(fd, (struct sockaddr *)&bound, &size) == 0 &&
        getnameinfo((struct sockaddr *)&bound, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV) == 0)
        snprintf(shown, WIRE_ADDRESS_BYTES, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    return fd;
}

/* ---- TLS ---- */

static int tls_error(struct error *err, const char *what, int code)
{
    return error_set(err, -EPROTO, "%s: %s", what, gnutls_strerror(code));
}

static int give_key(gnutls_session_t session, const char *user, gnutls_datum_t *key)
{
    const struct tls *tls = gnutls_session_get_ptr(session);
    key->data = strcmp(user, PSK_USER) == 0 ? gnutls_malloc(tls->key.size) : NULL;
    if (!key->data)
        return -1;
    memcpy(key->data, tls->key.data, tls->key.size);
    key->size = tls->key.size;
    return 0;
}

static int use_key(struct tls *tls, const struct wire_security *security, struct error *err)
{
    int r = read_key(security->key_file, &tls->key, err);
    if (r)
        return r;
    if (tls->server) {
        r = gnutls_psk_allocate_server_credentials(&tls->psk_server);
        if (r == 0) {
            gnutls_psk_set_server_credentials_function(tls->psk_server, give_key);
            r = gnutls_credentials_set(tls->session, GNUTLS_CRD_PSK, tls->psk_server);
        }
    } else {
        r = gnutls_psk_allocate_client_credentials(&tls->psk_client);
        if (r == 0)
            r = gnutls_psk_set_client_credentials(tls->psk_client, PSK_USER, &tls->key, GNUTLS_PSK_KEY_RAW);
        if (r == 0)
            r = gnutls_credentials_set(tls->session, GNUTLS_CRD_PSK, tls->psk_client);
    }
    return r ? tls_error(err, "TLS", r) : 0;
}

/* Both sides show one, and each wants the other's to be signed by `ca_file`. The host's name is not looked at: whoever the authority trusts may take guests. */
static int use_certificates(struct tls *tls, const struct wire_security *security, struct error *err)
{
    int r = gnutls_certificate_allocate_credentials(&tls->certificates);
    if (r < 0)
        return tls_error(err, "TLS", r);
    r = gnutls_certificate_set_x509_trust_file(tls->certificates, security->ca_file, GNUTLS_X509_FMT_PEM);
    if (r <= 0)
        return error_set(err, -EINVAL, "%s: %s", security->ca_file, r ? gnutls_strerror(r) : "there is no certificate in it");
    r = gnutls_certificate_set_x509_key_file(tls->certificates, security->cert_file, security->cert_key_file, GNUTLS_X509_FMT_PEM);
    if (r < 0)
        return error_set(err, -EINVAL, "%s with %s: %s", security->cert_file, security->cert_key_file, gnutls_strerror(r));
    if (tls->server)
        gnutls_certificate_server_set_request(tls->session, GNUTLS_CERT_REQUIRE);
    gnutls_session_set_verify_cert(tls->session, NULL, 0);
    r = gnutls_credentials_set(tls->session, GNUTLS_CRD_CERTIFICATE, tls->certificates);
    return r ? tls_error(err, "TLS", r) : 0;
}

static int begin_tls(struct tls *tls, const struct wire_security *security, struct error *err)
{
    int r = library_load(&gnutls_library_file, err);
    if (r)
        return r;
    r = gnutls_init(&tls->session, (tls->server ? GNUTLS_SERVER : GNUTLS_CLIENT) | GNUTLS_NO_SIGNAL);
    if (r)
        return tls_error(err, "TLS", r);
    gnutls_session_set_ptr(tls->session, tls);
    r = gnutls_priority_set_direct(tls->session, security->key_file ? PSK_PRIORITIES : PRIORITIES, NULL);
    if (r)
        return tls_error(err, "TLS", r);
    r = security->key_file ? use_key(tls, security, err) : use_certificates(tls, security, err);
    if (r)
        return r;
    gnutls_transport_set_int2(tls->session, tls->fd, tls->fd);
    gnutls_handshake_set_timeout(tls->session, HANDSHAKE_MS);
    do
        r = gnutls_handshake(tls->session);
    while (r < 0 && !gnutls_error_is_fatal(r));
    return r ? tls_error(err, "the other side was not recognised (are keys or certificates the same there, and is it TLS?)", r) : 0;
}

/* ---- TLS to a socket and back ---- */

/* 0 or -errno. */
static int send_all(int fd, const char *from, size_t size_bytes)
{
    while (size_bytes) {
        ssize_t n = send(fd, from, size_bytes, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return -errno;
        from += n > 0 ? n : 0;
        size_bytes -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

static int tls_send_all(gnutls_session_t session, const char *from, size_t size_bytes)
{
    while (size_bytes) {
        ssize_t n = gnutls_record_send(session, from, size_bytes);
        if (n < 0 && gnutls_error_is_fatal((int)n))
            return -EPIPE;
        from += n > 0 ? n : 0;
        size_bytes -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* When the wire takes no more, the user's side is told by its next write; what comes from there is still read. */
static void *out_main(void *arg)
{
    struct tls *tls = arg;
    char *data = malloc(PIECE_BYTES);
    ssize_t n;
    while (data && ((n = recv(tls->inner, data, PIECE_BYTES, 0)) > 0 || (n < 0 && errno == EINTR)))
        if (n > 0 && tls_send_all(tls->session, data, (size_t)n))
            break;
    gnutls_bye(tls->session, GNUTLS_SHUT_WR);
    shutdown(tls->inner, SHUT_RD);
    free(data);
    return NULL;
}

static void *in_main(void *arg)
{
    struct tls *tls = arg;
    char *data = malloc(PIECE_BYTES);
    ssize_t n;
    while (data && ((n = gnutls_record_recv(tls->session, data, PIECE_BYTES)) > 0 || (n < 0 && !gnutls_error_is_fatal((int)n))))
        if (n > 0 && send_all(tls->inner, data, (size_t)n))
            break;
    shutdown(tls->inner, SHUT_WR);
    shutdown(tls->fd, SHUT_RD);
    free(data);
    return NULL;
}

/* A process of its own has the keys, and nobody else's memory. It ends when both sides have. */
static void be_tls(struct tls *tls, const struct wire_security *security, int report)
{
    struct error err = {0};
    pthread_t in;
    if (begin_tls(tls, security, &err) == 0 && pthread_create(&in, NULL, in_main, tls))
        error_set(&err, -EAGAIN, "cannot start a thread");
    bool told = write(report, &err, sizeof err) == (ssize_t)sizeof err;
    close(report);
    if (err.code || !told)
        _exit(1);
    out_main(tls);
    pthread_join(in, NULL);
    _exit(0);
}

static int read_report(int fd, struct error *err)
{
    struct error report;
    ssize_t n;
    do
        n = read(fd, &report, sizeof report);
    while (n < 0 && errno == EINTR);
    if (n != (ssize_t)sizeof report)
        return error_set(err, -EPROTO, "the process for TLS died");
    return report.code ? error_set(err, report.code, "%s", report.text) : 0;
}

/* `fd` becomes one that TLS is done for. */
static int wrap(struct wire *wire, bool server, const struct wire_security *security, struct error *err)
{
    int pair[2], report[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        return error_set(err, -errno, "cannot make a pair of sockets: %s", strerror(errno));
    if (pipe2(report, O_CLOEXEC)) {
        close(pair[0]);
        close(pair[1]);
        return error_set(err, -errno, "cannot make a pipe: %s", strerror(errno));
    }
    fflush(NULL);
    wire->process = fork();
    if (wire->process == 0) {
        struct tls tls = {.fd = wire->fd, .inner = pair[0], .server = server};
        close(pair[1]);
        close(report[0]);
        be_tls(&tls, security, report[1]);
    }
    int r = wire->process < 0 ? error_set(err, -errno, "cannot start a process: %s", strerror(errno)) : 0;
    close(wire->fd);
    wire->fd = pair[1];
    close(pair[0]);
    close(report[1]);
    if (r == 0)
        r = read_report(report[0], err);
    close(report[0]);
    return r;
}

/* ---- connections ---- */

/* Whoever connects and goes without a word wanted to know whether somebody listens. */
static int wait_for_word(struct wire *wire, struct error *err)
{
    char first;
    ssize_t n;
    do
        n = recv(wire->fd, &first, 1, MSG_PEEK);
    while (n < 0 && errno == EINTR);
    return n > 0 ? 0 : error_set(err, -EPROTO, "a connection was closed before anything was said");
}

static int begin(struct wire *wire, int fd, bool server, const char *address, const struct wire_security *security, struct error *err)
{
    const int bytes = BUFFER_BYTES;
    *wire = (struct wire){.fd = fd};
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    bool plain = unix_path(address) || security->insecure;
    int r = plain ? 0 : wrap(wire, server, security, err);
    if (r == 0 && plain && server)
        r = wait_for_word(wire, err);
    if (r)
        wire_close(wire);
    return r;
}

int wire_connect(struct wire *wire, const char *address, const struct wire_security *security, struct error *err)
{
    *wire = (struct wire){.fd = -1};
    int fd = connect_socket(address, err);
    return fd < 0 ? fd : begin(wire, fd, false, address, security, err);
}

int wire_accept(struct wire *wire, int listen_fd, const char *address, const struct wire_security *security, struct error *err)
{
    int fd;
    *wire = (struct wire){.fd = -1};
    do
        fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC);
    while (fd < 0 && (errno == EINTR || errno == ECONNABORTED));
    if (fd < 0)
        return error_set(err, -errno, "cannot accept a connection: %s", strerror(errno));
    if (!unix_path(address))
        tune(fd);
    return begin(wire, fd, true, address, security, err);
}

void wire_close(struct wire *wire)
{
    if (wire->fd >= 0)
        close(wire->fd);
    wire->fd = -1;
    while (wire->process > 0 && waitpid(wire->process, NULL, 0) < 0 && errno == EINTR)
        continue;
    wire->process = 0;
}
