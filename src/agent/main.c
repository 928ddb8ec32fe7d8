/*
 * doppel-agent: runs in a guest and does what `doppel exec`, `cp` and others ask for over vsock (docs/agent.md). A static program without anything of Doppel's.
 *
 *     doppel-agent [--port N]          serves the host, and nobody else
 *     doppel-agent --stdio             serves one connection, which is its standard input
 *     doppel-agent connect [CID] PORT  connects standard input and output with a vsock port (CID 2: the host)
 *     doppel-agent listen PORT         the same with the first who connects
 *
 * One process serves one connection, so that none can keep another from being served, and none sees another's data.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "agent/agent.h"

#define SESSIONS_MAX 256u

/* ---- one connection ---- */

int session_receive(struct session *session, struct agent_frame *frame)
{
    int result;
    while ((result = agent_reader_next(&session->reader, frame)) == 0) {
        size_t room;
        uint8_t *at = agent_reader_room(&session->reader, &room);
        ssize_t n = read(session->fd, at, room);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return (int)n;
        agent_reader_add(&session->reader, (size_t)n);
    }
    return result;
}

bool session_send(struct session *session, enum agent_type type, const void *body, size_t size_bytes)
{
    size_t size = AGENT_HEADER_BYTES + size_bytes, done = 0;
    agent_header(session->frame, type, (uint32_t)size_bytes);
    if (size_bytes)
        memcpy(session->frame + AGENT_HEADER_BYTES, body, size_bytes);
    while (done < size) {
        ssize_t n = send(session->fd, session->frame + done, size - done, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        done += (size_t)n;
    }
    return true;
}

bool session_fail(struct session *session, uint8_t status, const char *format, ...)
{
    char text[600];
    va_list args;
    text[0] = (char)status;
    va_start(args, format);
    vsnprintf(text + 1, sizeof text - 1, format, args);
    va_end(args);
    session_send(session, AGENT_FAILED, text, 1 + strlen(text + 1));
    return false;
}

static void serve_ping(struct session *session, const struct agent_frame *frame)
{
    session_send(session, AGENT_DONE, frame->body, frame->size_bytes);
}

static void serve_clock(struct session *session, const struct agent_frame *frame)
{
    if (frame->size_bytes != 8)
        return;
    uint64_t ns = agent_get_u64(frame->body);
    struct timespec now = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    if (clock_settime(CLOCK_REALTIME, &now))
        session_fail(session, 1, "cannot set the clock: %s", strerror(errno));
    else
        session_send(session, AGENT_DONE, NULL, 0);
}

static void serve_shutdown(struct session *session, const struct agent_frame *frame)
{
    static char *const commands[][2] = {{"poweroff", NULL}, {"reboot", NULL}};
    if (frame->size_bytes != 1 || frame->body[0] > 1)
        return;
    pid_t pid = fork();
    if (pid == 0) {
        setsid();
        setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
        execvp(commands[frame->body[0]][0], commands[frame->body[0]]);
        _exit(AGENT_STATUS_NOT_FOUND);
    }
    if (pid < 0)
        session_fail(session, 1, "cannot start a process: %s", strerror(errno));
    else
        session_send(session, AGENT_DONE, NULL, 0);
}

static const struct {
    enum agent_type type;
    void (*serve)(struct session *session, const struct agent_frame *frame);
} requests[] = {
    {AGENT_EXEC, serve_exec}, {AGENT_PING, serve_ping},   {AGENT_INFO, serve_info},         {AGENT_PUT, serve_put},
    {AGENT_GET, serve_get},   {AGENT_CLOCK, serve_clock}, {AGENT_SHUTDOWN, serve_shutdown},
    {AGENT_IDENTITY, serve_identity},
};

void session_serve(struct session *session)
{
    struct agent_frame frame;
    if (session_receive(session, &frame) != 1)
        return;
    for (size_t i = 0; i < sizeof requests / sizeof *requests; i++) {
        if (requests[i].type == frame.type) {
            requests[i].serve(session, &frame);
            return;
        }
    }
    session_fail(session, AGENT_STATUS_TROUBLE, "this agent does not know request %u", frame.type);
}

/* ---- serving ---- */

static int serve_one(int fd)
{
    static struct session session;
    session.fd = fd;
    signal(SIGPIPE, SIG_IGN);
    session_serve(&session);
    return 0;
}

static int fail(const char *what)
{
    fprintf(stderr, "doppel-agent: %s: %s\n", what, strerror(errno));
    return 1;
}

static int listen_on(unsigned port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 64))) {
        int code = errno;
        close(fd);
        errno = code;
        return -1;
    }
    return fd;
}

/* A program of the guest that reaches this port over the loopback is not the host. */
static bool is_host(const struct sockaddr_vm *peer)
{
    return peer->svm_family == AF_VSOCK && peer->svm_cid == VMADDR_CID_HOST;
}

static void child_ended(int number)
{
}

static int serve(unsigned port)
{
    struct sigaction action = {.sa_handler = child_ended}; /* ends accept */
    unsigned sessions = 0;
    int listener = listen_on(port);
    if (listener < 0)
        return fail("cannot listen");
    sigaction(SIGCHLD, &action, NULL);
    for (;;) {
        struct sockaddr_vm peer = {0};
        socklen_t size = sizeof peer;
        while (sessions && waitpid(-1, NULL, sessions < SESSIONS_MAX ? WNOHANG : 0) > 0)
            sessions--;
        int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC);
        if (fd < 0 && errno != EINTR && errno != ECONNABORTED) {
            struct timespec pause = {.tv_sec = 1}; /* no descriptors or memory: try again */
            nanosleep(&pause, NULL);
        }
        pid_t pid = fd >= 0 && is_host(&peer) ? fork() : -1;
        if (pid == 0) {
            close(listener);
            signal(SIGCHLD, SIG_DFL);
            _exit(serve_one(fd));
        }
        sessions += pid > 0;
        if (fd >= 0)
            close(fd);
    }
}

/* ---- connect and listen ---- */

/* Moves what there is from one to the other; false at the end. */
static bool move(int from, int to)
{
    static char data[262144];
    ssize_t n = read(from, data, sizeof data);
    if (n <= 0)
        return n < 0 && (errno == EINTR || errno == EAGAIN);
    for (ssize_t done = 0, part; done < n; done += part) {
        part = write(to, data + done, (size_t)(n - done));
        if (part < 0)
            return false;
    }
    return true;
}

/* Until the other end has sent all; the end of standard input closes half of the connection. */
static int relay(int fd)
{
    struct pollfd fds[2] = {{.fd = 0, .events = POLLIN}, {.fd = fd, .events = POLLIN}};
    signal(SIGPIPE, SIG_IGN);
    for (;;) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return fail("poll");
        if (fds[1].revents && !move(fd, 1))
            return 0;
        if (fds[0].revents && !move(0, fd)) {
            shutdown(fd, SHUT_WR);
            fds[0].fd = -1;
        }
    }
}

static int connect_to(unsigned cid, unsigned port)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        return fail("cannot connect");
    return relay(fd);
}

static int accept_one(unsigned port)
{
    int listener = listen_on(port);
    int fd = listener < 0 ? -1 : accept(listener, NULL, NULL);
    if (fd < 0)
        return fail("cannot listen");
    close(listener);
    return relay(fd);
}

static bool parse_number(const char *text, unsigned *value)
{
    char *end;
    unsigned long long wide = strtoull(text, &end, 10);
    *value = (unsigned)wide;
    return *text >= '0' && *text <= '9' && !*end && wide < 0xFFFFFFFFull;
}

int main(int argc, char **argv)
{
    unsigned port = AGENT_PORT, cid = VMADDR_CID_HOST;
    if (argc == 1 || (argc == 3 && strcmp(argv[1], "--port") == 0 && parse_number(argv[2], &port)))
        return serve(port);
    if (argc == 2 && strcmp(argv[1], "--stdio") == 0)
        return serve_one(0);
    if (argc == 3 && strcmp(argv[1], "connect") == 0 && parse_number(argv[2], &port))
        return connect_to(cid, port);
    if (argc == 4 && strcmp(argv[1], "connect") == 0 && parse_number(argv[2], &cid) && parse_number(argv[3], &port))
        return connect_to(cid, port);
    if (argc == 3 && strcmp(argv[1], "listen") == 0 && parse_number(argv[2], &port))
        return accept_one(port);
    fprintf(stderr, "usage: doppel-agent [--port N | --stdio | connect [CID] PORT | listen PORT]\n");
    return 2;
}
