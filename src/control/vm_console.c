/*
 * The console of a machine for those who are not its terminal: the log, the clients of console.sock, the HTTP streams.
 *
 * What the guest says is put into a ring by whoever runs the device (tap, device lock held) and taken out on the control's thread; a guest that is faster than
 * that loses bytes in the middle, and the log says how many. What clients type waits in their buffers until the guest has room; a client whose bytes
 * wait is not read from, so nobody's input is lost.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "control/vm_control_priv.h"
#include "util/byte_ring.h"

#define RING_BYTES (256u << 10)
#define CLIENTS_MAX 8u
#define TYPED_BYTES 4096u
#define BACKLOG_BYTES (64u << 10)
#define PIECE_BYTES 16384u

struct client {
    struct vm_console *console;
    int fd; /* -1: free */
    struct loop_fd *watch;
    uint8_t typed[TYPED_BYTES];
    size_t typed_count;
    uint8_t *backlog; /* not taken by the client yet */
    size_t backlog_count;
};

struct vm_console {
    struct vm_control *control;
    struct console_tap tap;
    struct loop_event *said, *room;
    int listen_fd; /* -1: none */
    struct loop_fd *listen_watch;
    struct client client[CLIENTS_MAX];
    int log;
    uint64_t log_bytes;

    pthread_mutex_t lock; /* innermost; guards the rest */
    struct byte_ring ring;
};

/* ---- from the guest ---- */

static void tap_output(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct vm_console *console = ctx;
    pthread_mutex_lock(&console->lock);
    byte_ring_put(&console->ring, data, size_bytes);
    pthread_mutex_unlock(&console->lock);
    loop_event_raise(console->said);
}

static void tap_room(void *ctx)
{
    struct vm_console *console = ctx;
    loop_event_raise(console->room);
}

/* ---- clients ---- */

static void drop_client(struct client *client)
{
    if (client->watch)
        loop_fd_remove(client->watch);
    close(client->fd);
    free(client->backlog);
    *client = (struct client){.console = client->console, .fd = -1};
}

static void watch_client(struct client *client)
{
    unsigned events = (client->typed_count < TYPED_BYTES ? LOOP_READ : 0) | (client->backlog_count ? LOOP_WRITE : 0);
    if (loop_fd_modify(client->watch, events))
        drop_client(client);
}

/* As much as it takes now; a client that does not read loses what is too much. */
static void send_to_client(struct client *client, const uint8_t *data, size_t size_bytes)
{
    ssize_t sent = client->backlog_count ? 0 : send(client->fd, data, size_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0 && errno != EAGAIN && errno != EINTR) {
        drop_client(client);
        return;
    }
    sent = sent < 0 ? 0 : sent;
    size_t rest = size_bytes - (size_t)sent;
    if (!rest || (!client->backlog && !(client->backlog = malloc(BACKLOG_BYTES))))
        return;
    rest = rest < BACKLOG_BYTES - client->backlog_count ? rest : BACKLOG_BYTES - client->backlog_count;
    memcpy(client->backlog + client->backlog_count, data + sent, rest);
    client->backlog_count += rest;
    watch_client(client);
}

static void send_backlog(struct client *client)
{
    ssize_t sent = send(client->fd, client->backlog, client->backlog_count, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent <= 0)
        return;
    client->backlog_count -= (size_t)sent;
    memmove(client->backlog, client->backlog + sent, client->backlog_count);
}

static void type(struct client *client)
{
    struct machine *machine = client->typed_count ? vm_machine_get(client->console->control) : NULL;
    if (!machine)
        return;
    size_t taken = machine_console_type(machine, client->typed, client->typed_count);
    vm_machine_put(client->console->control);
    client->typed_count -= taken;
    memmove(client->typed, client->typed + taken, client->typed_count);
}

static void client_ready(void *ctx, unsigned events)
{
    struct client *client = ctx;
    if (events & LOOP_WRITE && client->backlog_count)
        send_backlog(client);
    if (events & (LOOP_READ | LOOP_HANGUP) && client->typed_count < TYPED_BYTES) {
        ssize_t n = recv(client->fd, client->typed + client->typed_count, TYPED_BYTES - client->typed_count, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
            drop_client(client);
            return;
        }
        client->typed_count += n > 0 ? (size_t)n : 0;
        type(client);
    } else if (events & LOOP_HANGUP) {
        drop_client(client);
        return;
    }
    watch_client(client);
}

static void guest_has_room(void *ctx)
{
    struct vm_console *console = ctx;
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        if (console->client[i].fd < 0)
            continue;
        type(&console->client[i]);
        watch_client(&console->client[i]);
    }
}

static void client_connected(void *ctx, unsigned events)
{
    static const char full[] = "doppel: too many clients have this console\r\n";
    struct vm_console *console = ctx;
    int fd = accept4(console->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    for (unsigned i = 0; i < CLIENTS_MAX; i++) {
        struct client *client = &console->client[i];
        if (client->fd >= 0)
            continue;
        client->fd = fd;
        if (loop_fd_add(console->control->loop, fd, LOOP_READ, client_ready, client, &client->watch))
            drop_client(client);
        return;
    }
    send(fd, full, sizeof full - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
    close(fd);
}

/* ---- to everybody ---- */

static void tell(struct vm_console *console, const uint8_t *data, size_t size_bytes)
{
    vm_log_append(console->control, "console.log", &console->log, &console->log_bytes, data, size_bytes);
    vm_screen_feed(console->control->screen, (const char *)data, size_bytes);
    for (unsigned i = 0; i < CLIENTS_MAX; i++)
        if (console->client[i].fd >= 0)
            send_to_client(&console->client[i], data, size_bytes);
    vm_streams_write(&console->control->streams, STREAM_CONSOLE, data, size_bytes);
}

/* Some of what is in the ring; 0: nothing is. */
static size_t take(struct vm_console *console, uint8_t piece[PIECE_BYTES], uint64_t *lost)
{
    pthread_mutex_lock(&console->lock);
    size_t n = byte_ring_take(&console->ring, piece, PIECE_BYTES, lost);
    pthread_mutex_unlock(&console->lock);
    return n;
}

void vm_console_drain(struct vm_console *console)
{
    uint8_t piece[PIECE_BYTES];
    uint64_t lost = 0;
    size_t n;
    while ((n = take(console, piece, &lost))) {
        tell(console, piece, n);
        if (lost) {
            int length = snprintf((char *)piece, sizeof piece, "\r\n[doppel: %llu bytes of the console were lost here]\r\n", (unsigned long long)lost);
            tell(console, piece, (size_t)length);
        }
    }
}

static void guest_said(void *ctx)
{
    vm_console_drain(ctx);
}

/* ---- life ---- */

int vm_console_create(struct vm_console **out, struct vm_control *control, struct error *err)
{
    struct vm_console *console = calloc(1, sizeof *console);
    if (!console)
        return error_set(err, -ENOMEM, "out of memory");
    *out = console;
    console->control = control;
    console->tap = (struct console_tap){.output = tap_output, .room = tap_room, .ctx = console};
    console->listen_fd = console->log = -1;
    for (unsigned i = 0; i < CLIENTS_MAX; i++)
        console->client[i] = (struct client){.console = console, .fd = -1};
    pthread_mutex_init(&console->lock, NULL);
    console->ring = (struct byte_ring){.data = malloc(RING_BYTES), .room = RING_BYTES};
    console->said = loop_event_create(control->loop, guest_said, console);
    console->room = loop_event_create(control->loop, guest_has_room, console);
    if (!console->ring.data || !console->said || !console->room)
        return error_set(err, -ENOMEM, "out of memory");
    if (!control->instance)
        return 0;
    console->listen_fd = instance_listen(control->instance, "console.sock", err);
    if (console->listen_fd < 0)
        return console->listen_fd;
    int r = loop_fd_add(control->loop, console->listen_fd, LOOP_READ, client_connected, console, &console->listen_watch);
    return r ? error_set(err, r, "cannot watch the console's socket: %s", strerror(-r)) : 0;
}

const struct console_tap *vm_console_tap(struct vm_console *console)
{
    return &console->tap;
}

void vm_console_destroy(struct vm_console *console)
{
    if (!console)
        return;
    for (unsigned i = 0; i < CLIENTS_MAX; i++)
        if (console->client[i].fd >= 0)
            drop_client(&console->client[i]);
    if (console->listen_watch)
        loop_fd_remove(console->listen_watch);
    if (console->listen_fd >= 0)
        close(console->listen_fd);
    if (console->log >= 0)
        close(console->log);
    if (console->said)
        loop_event_destroy(console->said);
    if (console->room)
        loop_event_destroy(console->room);
    pthread_mutex_destroy(&console->lock);
    free(console->ring.data);
    free(console);
}
