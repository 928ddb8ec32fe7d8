/*
 * doppel console: this terminal and a machine's console, byte by byte, until Ctrl-]. The terminal is raw meanwhile and restored in every orderly end and on the signals
 * that end programs. What is typed goes to the guest as it is: Ctrl-A, too.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

#include "cli/arguments.h"

#define DETACH 0x1d /* Ctrl-] */
#define RECENT_BYTES 16384

static int write_all(int fd, const char *data, size_t size_bytes)
{
    while (size_bytes) {
        ssize_t n = write(fd, data, size_bytes);
        if (n < 0 && errno != EINTR)
            return -errno;
        data += n > 0 ? n : 0;
        size_bytes -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* 0: go on. 1: the other side has ended, -errno. */
static int pass_output(int console)
{
    char data[16384];
    ssize_t n = recv(console, data, sizeof data, 0);
    if (n < 0)
        return errno == EINTR ? 0 : 1;
    return n == 0 ? 1 : write_all(STDOUT_FILENO, data, (size_t)n);
}

/* 0: go on. 1: the end of input, 2: detached, -errno. */
static int pass_input(int console, bool terminal)
{
    char data[4096];
    ssize_t n = read(STDIN_FILENO, data, sizeof data);
    if (n < 0)
        return errno == EINTR || errno == EAGAIN ? 0 : 1;
    if (n == 0)
        return 1;
    const char *detach = terminal ? memchr(data, DETACH, (size_t)n) : NULL;
    size_t size = detach ? (size_t)(detach - data) : (size_t)n;
    for (size_t sent = 0; sent < size;) {
        ssize_t one = send(console, data + sent, size - sent, MSG_NOSIGNAL);
        if (one < 0 && errno != EINTR)
            return 1;
        sent += one > 0 ? (size_t)one : 0;
    }
    return detach ? 2 : 0;
}

/* Both ways. With input that has ended, until the machine has. */
static int pass(int console, bool terminal, int signals, const char **why)
{
    struct pollfd ready[3] = {{.fd = console, .events = POLLIN}, {.fd = STDIN_FILENO, .events = POLLIN}, {.fd = signals, .events = POLLIN}};
    *why = "the virtual machine has ended";
    for (;;) {
        if (poll(ready, 3, -1) < 0 && errno != EINTR)
            return STATUS_ERROR;
        if (ready[2].revents) {
            *why = "ended by a signal";
            return STATUS_ERROR;
        }
        if (ready[0].revents) {
            int r = pass_output(console);
            if (r)
                return r < 0 ? STATUS_ERROR : 0;
        }
        if (ready[1].revents) {
            int r = pass_input(console, terminal);
            if (r == 1)
                ready[1].fd = -1;
            *why = r == 2 ? "detached" : *why;
            if (r == 2)
                return 0;
        }
    }
}

static void print_recent(const char *name)
{
    char data[RECENT_BYTES];
    int fd = instance_open(name, "console.log", O_RDONLY);
    if (fd < 0)
        return;
    off_t end = lseek(fd, 0, SEEK_END);
    lseek(fd, end > RECENT_BYTES ? end - RECENT_BYTES : 0, SEEK_SET);
    ssize_t n = read(fd, data, sizeof data);
    if (n > 0)
        write_all(STDOUT_FILENO, data, (size_t)n);
    close(fd);
}

static int take_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGQUIT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC);
}

static int attach(const struct instance_info *vm, bool recent)
{
    struct termios before, raw;
    const char *why = "";
    int console = instance_connect(vm->name, "console.sock");
    if (console < 0)
        return complain(STATUS_ERROR, "%s: %s", vm->name, console == -ENOENT || console == -ECONNREFUSED ? "it is not running" : strerror(-console));
    int signals = take_signals();
    bool terminal = tcgetattr(STDIN_FILENO, &before) == 0;
    if (recent)
        print_recent(vm->name);
    if (terminal) {
        raw = before;
        cfmakeraw(&raw);
        tcsetattr(STDIN_FILENO, TCSANOW, &raw);
        fprintf(stderr, "doppel: the console of %s; Ctrl-] detaches\r\n", vm->name);
    }
    int status = pass(console, terminal, signals, &why);
    if (terminal) {
        tcsetattr(STDIN_FILENO, TCSANOW, &before);
        fprintf(stderr, "\ndoppel: %s\n", why);
    }
    close(signals);
    close(console);
    return status;
}

int console_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    int status = attach(&vm, arguments.value[CONSOLE_RECENT]);
    instance_info_clear(&vm);
    return status;
}
