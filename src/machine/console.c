/*
 * Console back ends (console.h). All kinds are a pair of descriptors; they differ only in how those are opened. Input and output never share one,
 * because epoll takes each once. A regular file or anything else epoll refuses is read and written directly. The unix socket serves one
 * client at a time; without one, output is discarded.
 */
#include "machine/console.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_LOOP | IN_VCPU | IN_MAIN, poll);
SANDBOX_ALLOW(IN_LOOP | IN_VCPU | IN_MAIN, sendto); /* what is connected already */
SANDBOX_ALLOW(IN_LOOP, accept4);
SANDBOX_ALLOW_IF(IN_LOOP, fcntl, ARG_IS(1, F_DUPFD_CLOEXEC)); /* of a client */
SANDBOX_ALLOW(IN_LOOP, close);
SANDBOX_ALLOW_IF(IN_MAIN, ioctl, ARG_IS(1, TCGETS));

#define ESCAPE 0x01 /* Ctrl-A */
/* Reading goes on while this has room, so that the keys for Doppel itself work when the guest has stopped taking input. */
#define INPUT_BYTES 65536u
#define CLOSE_WAIT_MS 1000 /* for a reader that is slow but there */

struct console {
    struct loop *loop;
    struct console_ops ops;
    struct console_tap tap; /* all NULL: none */
    int input_fd, output_fd, listen_fd; /* -1: none */
    int slave_fd;                       /* of a pseudo-terminal */
    bool owns_input, owns_output, escapes, raw;
    bool output_is_direct; /* epoll cannot watch it: writes complete at once */
    struct termios saved;
    int terminal_fd; /* whose settings `saved` are */
    struct loop_fd *input_watch, *output_watch, *listen_watch;
    bool after_escape;
    uint8_t input[INPUT_BYTES]; /* not taken by the guest yet: [input_start, input_start + input_count) */
    size_t input_count, input_start;
    uint8_t *backlog;
    size_t backlog_start, backlog_count;
    uint64_t dropped_bytes;
    bool error_logged;
    char *unlink_path;
};

static void input_ready(void *ctx, unsigned events);
static void output_ready(void *ctx, unsigned events);

static void terminal_raw(struct console *console)
{
    struct termios raw;
    console->terminal_fd = console->input_fd;
    if (tcgetattr(console->input_fd, &console->saved))
        return;
    raw = console->saved;
    cfmakeraw(&raw);
    if (tcsetattr(console->input_fd, TCSANOW, &raw) == 0) {
        console->raw = true;
        log_set_raw_terminal(true);
    }
}

/* A regular file counts as always readable (loop.h). */
static void watch_input(struct console *console)
{
    if (console->input_fd < 0 || console->input_watch)
        return;
    if (loop_fd_add(console->loop, console->input_fd, LOOP_READ, input_ready, console, &console->input_watch))
        console->input_watch = NULL;
}

static void unwatch(struct loop_fd **watch)
{
    if (*watch)
        loop_fd_remove(*watch);
    *watch = NULL;
}

static void drop_fd(int *fd, bool owned)
{
    if (*fd >= 0 && owned)
        close(*fd);
    *fd = -1;
}

/* There is no more input. With a socket the client has gone altogether. */
static void client_gone(struct console *console)
{
    unwatch(&console->input_watch);
    drop_fd(&console->input_fd, console->owns_input);
    if (console->listen_fd >= 0) {
        unwatch(&console->output_watch);
        drop_fd(&console->output_fd, console->owns_output);
        console->backlog_start = console->backlog_count = 0;
    }
}

/* Hands over what is buffered; false when the guest has no room. */
static bool deliver(struct console *console)
{
    while (console->input_count) {
        size_t taken = console->ops.receive(console->ops.ctx, console->input + console->input_start, console->input_count);
        if (taken == 0)
            return false;
        console->input_start += taken;
        console->input_count -= taken;
    }
    console->input_start = 0;
    return true;
}

static size_t strip_commands(struct console *console, uint8_t *data, size_t size_bytes)
{
    size_t kept = 0;
    for (size_t i = 0; i < size_bytes; i++) {
        if (console->after_escape) {
            console->after_escape = false;
            if (data[i] == ESCAPE)
                data[kept++] = ESCAPE;
            else if (console->ops.command)
                console->ops.command(console->ops.ctx, data[i]);
        } else if (data[i] == ESCAPE) {
            console->after_escape = true;
        } else {
            data[kept++] = data[i];
        }
    }
    return kept;
}

static bool make_room(struct console *console)
{
    if (console->input_start) {
        memmove(console->input, console->input + console->input_start, console->input_count);
        console->input_start = 0;
    }
    return console->input_count < INPUT_BYTES;
}

static void input_ready(void *ctx, unsigned events)
{
    struct console *console = ctx;
    if (!make_room(console)) {
        unwatch(&console->input_watch); /* until console_resume */
        return;
    }
    uint8_t *end = console->input + console->input_count;
    ssize_t n = read(console->input_fd, end, INPUT_BYTES - console->input_count);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) {
        client_gone(console);
        return;
    }
    console->input_count += console->escapes ? strip_commands(console, end, (size_t)n) : (size_t)n;
    deliver(console);
}

/* Reads nothing itself: a read of a terminal would wait for the next key. */
void console_resume(struct console *console)
{
    if (!console || !deliver(console))
        return;
    watch_input(console);
    if (console->tap.room)
        console->tap.room(console->tap.ctx);
}

void console_set_tap(struct console *console, const struct console_tap *tap)
{
    console->tap = tap ? *tap : (struct console_tap){0};
}

size_t console_type(struct console *console, const uint8_t *data, size_t size_bytes)
{
    size_t room = make_room(console) ? INPUT_BYTES - console->input_count : 0;
    size_t taken = size_bytes < room ? size_bytes : room;
    memcpy(console->input + console->input_count, data, taken);
    console->input_count += taken;
    deliver(console);
    return taken;
}

/* Writes without blocking; returns bytes written, or -errno. */
static ssize_t write_now(struct console *console, const uint8_t *data, size_t size_bytes)
{
    if (!console->output_is_direct) {
        struct pollfd ready = {.fd = console->output_fd, .events = POLLOUT};
        if (poll(&ready, 1, 0) != 1 || !(ready.revents & (POLLOUT | POLLERR | POLLHUP)))
            return 0;
        if (size_bytes > 512) /* a writable pipe or terminal takes this much without blocking */
            size_bytes = 512;
    }
    ssize_t n = console->listen_fd >= 0 ? send(console->output_fd, data, size_bytes, MSG_NOSIGNAL | MSG_DONTWAIT)
                                        : write(console->output_fd, data, size_bytes);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR ? 0 : -errno;
    return n;
}

/* A socket's client has gone, perhaps unnoticed because its input is not read; of others only the output is lost. */
static void output_failed(struct console *console, int code)
{
    if (console->listen_fd >= 0) {
        client_gone(console);
        return;
    }
    console->backlog_count = 0;
    if (!console->error_logged)
        log_warning("console: output is lost: %s", strerror(-code));
    console->error_logged = true;
}

static void output_ready(void *ctx, unsigned events)
{
    struct console *console = ctx;
    while (console->backlog_count) {
        ssize_t n = write_now(console, console->backlog + console->backlog_start, console->backlog_count);
        if (n == 0)
            return;
        if (n < 0) {
            output_failed(console, (int)n);
            break;
        }
        console->backlog_start += (size_t)n;
        console->backlog_count -= (size_t)n;
    }
    console->backlog_start = 0;
    unwatch(&console->output_watch);
}

static void keep(struct console *console, const uint8_t *data, size_t size_bytes)
{
    if (!console->backlog && !(console->backlog = malloc(CONSOLE_BACKLOG_BYTES)))
        return;
    if (console->backlog_start && console->backlog_start + console->backlog_count + size_bytes > CONSOLE_BACKLOG_BYTES) {
        memmove(console->backlog, console->backlog + console->backlog_start, console->backlog_count);
        console->backlog_start = 0;
    }
    if (console->backlog_count + size_bytes > CONSOLE_BACKLOG_BYTES) {
        console->dropped_bytes += size_bytes;
        LOG_GUEST(LOG_WARNING, "console: nobody reads the guest's output; some of it is dropped");
        return;
    }
    memcpy(console->backlog + console->backlog_start + console->backlog_count, data, size_bytes);
    console->backlog_count += size_bytes;
    if (!console->output_watch &&
        loop_fd_add(console->loop, console->output_fd, LOOP_WRITE, output_ready, console, &console->output_watch))
        console->output_watch = NULL;
}

void console_write(struct console *console, const uint8_t *data, size_t size_bytes)
{
    if (console && console->tap.output)
        console->tap.output(console->tap.ctx, data, size_bytes);
    if (!console || console->output_fd < 0)
        return;
    while (size_bytes && !console->backlog_count) {
        ssize_t n = write_now(console, data, size_bytes);
        if (n < 0) {
            output_failed(console, (int)n);
            return;
        }
        if (n == 0)
            break;
        data += n;
        size_bytes -= (size_t)n;
    }
    if (size_bytes)
        keep(console, data, size_bytes);
}

static void client_connected(void *ctx, unsigned events)
{
    struct console *console = ctx;
    int fd = accept4(console->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    if (console->input_fd >= 0) {
        static const char busy[] = "doppel: another client has this console\r\n";
        send(fd, busy, sizeof busy - 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        close(fd);
        return;
    }
    console->output_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (console->output_fd < 0) {
        close(fd);
        return;
    }
    console->input_fd = fd;
    watch_input(console);
}

static int open_socket(struct console *console, const char *path, const char *what, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;
    if (strlen(path) >= sizeof address.sun_path)
        return error_set(err, -ENAMETOOLONG, "%s: socket path %s is longer than %zu characters", what, path, sizeof address.sun_path - 1);
    strcpy(address.sun_path, path);
    console->listen_fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (console->listen_fd < 0)
        return error_set(err, -errno, "%s: cannot make a socket: %s", what, strerror(errno));
    /* A socket nobody listens on any more is left over from a run that was killed. */
    if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode)) {
        int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (probe >= 0) {
            if (connect(probe, (struct sockaddr *)&address, sizeof address) && errno == ECONNREFUSED)
                unlink(path);
            close(probe);
        }
    }
    if (bind(console->listen_fd, (struct sockaddr *)&address, sizeof address) || listen(console->listen_fd, 4))
        return error_set(err, -errno, "%s: cannot listen on %s: %s", what, path,
                         errno == EADDRINUSE ? "something is there already; remove it or choose another path" : strerror(errno));
    console->owns_input = console->owns_output = true;
    console->unlink_path = strdup(path);
    return loop_fd_add(console->loop, console->listen_fd, LOOP_READ, client_connected, console, &console->listen_watch);
}

static int open_pty(struct console *console, const char *what, struct error *err)
{
    char name[64];
    int fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || grantpt(fd) || unlockpt(fd) || ptsname_r(fd, name, sizeof name)) {
        int code = -errno;
        if (fd >= 0)
            close(fd);
        return error_set(err, code, "%s: cannot make a pseudo-terminal: %s", what, strerror(-code));
    }
    console->owns_input = console->owns_output = true;
    console->input_fd = fd;
    console->output_fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    /* Keeping the slave side open makes the master wait for clients instead of reporting a hang-up. */
    console->slave_fd = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    struct termios raw;
    if (console->output_fd < 0 || console->slave_fd < 0 || tcgetattr(console->slave_fd, &raw))
        return error_set(err, -errno, "%s: cannot set up %s: %s", what, name, strerror(errno));
    cfmakeraw(&raw);
    tcsetattr(console->slave_fd, TCSANOW, &raw);
    fprintf(stderr, "doppel: %s is %s\n", what, name);
    return 0;
}

static int open_file(struct console *console, const char *path, const char *what, struct error *err)
{
    /* O_NONBLOCK: a named pipe would wait for its reader here, and later make the guest wait. */
    console->output_fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0666);
    if (console->output_fd < 0)
        return error_set(err, -errno, "%s: cannot write %s: %s", what, path,
                         errno == ENXIO ? "nobody reads this pipe; start the reader first" : strerror(errno));
    console->owns_output = true;
    return 0;
}

/*
 * The descriptors are the caller's, shared with other processes: O_NONBLOCK must not be set on them. Output to a terminal or a pipe goes through an open file
 * description of its own; where that is refused (a terminal of another user), write_now's care has to do.
 */
static void open_stdio(struct console *console, int input_fd, int output_fd)
{
    char path[32];
    struct stat st;
    console->input_fd = input_fd;
    console->output_fd = output_fd;
    console->escapes = isatty(input_fd);
    if (isatty(output_fd) || (fstat(output_fd, &st) == 0 && S_ISFIFO(st.st_mode))) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", output_fd);
        int own = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
        console->owns_output = own >= 0;
        console->output_fd = own >= 0 ? own : output_fd;
    }
    if (console->escapes)
        terminal_raw(console);
}

int console_open(struct console **out, const char *spec, const char *what, struct loop *loop, int input_fd, int output_fd,
                 const struct console_ops *ops, struct error *err)
{
    struct stat st;
    int r = 0;
    struct console *console = calloc(1, sizeof *console);
    if (!console)
        return error_set(err, -ENOMEM, "out of memory");
    console->loop = loop;
    console->ops = *ops;
    console->input_fd = console->output_fd = console->listen_fd = console->slave_fd = -1;
    if (strcmp(spec, "stdio") == 0) {
        open_stdio(console, input_fd, output_fd);
    } else if (strcmp(spec, "pty") == 0) {
        r = open_pty(console, what, err);
    } else if (strncmp(spec, "file:", 5) == 0) {
        r = open_file(console, spec + 5, what, err);
    } else if (strncmp(spec, "unix:", 5) == 0) {
        r = open_socket(console, spec + 5, what, err);
    } else if (strcmp(spec, "none") != 0) {
        r = error_set(err, -EINVAL, "%s: unknown kind \"%s\"", what, spec);
    }
    if (r) {
        console_close(console);
        return r;
    }
    if (console->output_fd >= 0)
        console->output_is_direct = fstat(console->output_fd, &st) == 0 && S_ISREG(st.st_mode);
    watch_input(console);
    *out = console;
    return 0;
}

/* The guest's last words. A reader that takes nothing for a while is not waited for. */
static void write_rest(struct console *console)
{
    while (console->backlog_count) {
        size_t before = console->backlog_count;
        struct pollfd ready = {.fd = console->output_fd, .events = POLLOUT};
        if (poll(&ready, 1, CLOSE_WAIT_MS) != 1)
            return;
        output_ready(console, LOOP_WRITE);
        if (console->backlog_count == before)
            return;
    }
}

void console_close(struct console *console)
{
    if (!console)
        return;
    write_rest(console);
    unwatch(&console->input_watch);
    unwatch(&console->output_watch);
    unwatch(&console->listen_watch);
    if (console->raw) {
        tcsetattr(console->terminal_fd, TCSANOW, &console->saved);
        log_set_raw_terminal(false);
    }
    drop_fd(&console->listen_fd, true);
    drop_fd(&console->slave_fd, true);
    drop_fd(&console->input_fd, console->owns_input);
    drop_fd(&console->output_fd, console->owns_output);
    if (console->unlink_path)
        unlink(console->unlink_path);
    free(console->unlink_path);
    free(console->backlog);
    free(console);
}
