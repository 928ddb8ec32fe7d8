/*
 * doppel logs: the console's log, or Doppel's messages, from their files; --follow waits for changes of the directory (inotify) and for the end of the process, so
 * nothing is polled. A log that has become FILE.1 is read to its end before the new one.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"

#define PIECE_BYTES 65536u

struct log {
    const char *name, *file;
    int fd; /* -1: there is none yet */
};

/* For --json: a line is an object when it is complete, or when nothing follows. */
static struct {
    char text[PIECE_BYTES];
    size_t length;
} line;

static void print_line(void)
{
    json_t *object = json_object();
    size_t length = line.length - (line.length && line.text[line.length - 1] == '\r');
    report_set_bytes(object, "line", line.text, length);
    report_line(object);
    line.length = 0;
}

static int print_lines(const char *data, size_t size_bytes)
{
    for (; size_bytes; size_bytes--, data++) {
        if (*data != '\n')
            line.text[line.length++] = *data;
        if (*data == '\n' || line.length == sizeof line.text)
            print_line();
    }
    return ferror(stdout) ? -EIO : 0;
}

static int write_all(const char *data, size_t size_bytes)
{
    if (report_is_json())
        return print_lines(data, size_bytes);
    while (size_bytes) {
        ssize_t n = write(STDOUT_FILENO, data, size_bytes);
        if (n < 0 && errno != EINTR)
            return -errno;
        data += n > 0 ? n : 0;
        size_bytes -= n > 0 ? (size_t)n : 0;
    }
    return 0;
}

/* From where it was read to up to its end. */
static int print_rest(int fd)
{
    char data[PIECE_BYTES];
    ssize_t n;
    int r = 0;
    while (r == 0 && (n = read(fd, data, sizeof data)) > 0)
        r = write_all(data, (size_t)n);
    return r;
}

/* Puts the file's position where its last `lines` lines begin; how many are still wanted from the file before it. */
static unsigned long seek_lines(int fd, unsigned long lines)
{
    char data[PIECE_BYTES];
    off_t at = lseek(fd, 0, SEEK_END);
    bool last = true; /* what ends the last line separates nothing */
    while (lines && at > 0) {
        size_t size = at < (off_t)sizeof data ? (size_t)at : sizeof data;
        ssize_t n = pread(fd, data, size, at - (off_t)size);
        if (n != (ssize_t)size)
            break;
        for (; n; n--, at--, last = false) {
            if (data[n - 1] == '\n' && !last && --lines == 0) {
                lseek(fd, at, SEEK_SET);
                return 0;
            }
        }
    }
    if (lines)
        lseek(fd, 0, SEEK_SET);
    return lines && !last ? lines - 1 : lines;
}

static int print_log(struct log *log, const char *lines_text, unsigned long lines)
{
    char before[64];
    snprintf(before, sizeof before, "%s.1", log->file);
    int old = instance_open(log->name, before, O_RDONLY), r = 0;
    log->fd = instance_open(log->name, log->file, O_RDONLY);
    if (lines_text && log->fd >= 0)
        lines = seek_lines(log->fd, lines);
    if (old >= 0 && (!lines_text || lines)) {
        if (lines_text)
            seek_lines(old, lines);
        r = print_rest(old);
    }
    if (old >= 0)
        close(old);
    return r || log->fd < 0 ? r : print_rest(log->fd);
}

/* The file of that name may be another by now. */
static int look_again(struct log *log)
{
    struct stat mine, now;
    int r = log->fd >= 0 ? print_rest(log->fd) : 0;
    int fd = instance_open(log->name, log->file, O_RDONLY);
    if (r || fd < 0 || fstat(fd, &now))
        return r;
    if (log->fd >= 0 && fstat(log->fd, &mine) == 0 && mine.st_ino == now.st_ino) {
        close(fd);
        return 0;
    }
    if (log->fd >= 0)
        close(log->fd);
    log->fd = fd;
    return print_rest(fd);
}

/* Waits for something in the directory, or for the process. */
static void wait_for_change(int notify, const struct process *process)
{
    char events[4096];
    int ended = process_open(process);
    struct pollfd ready[2] = {{.fd = notify, .events = POLLIN}, {.fd = ended, .events = POLLIN}};
    poll(ready, 2, ended >= 0 ? -1 : 100); /* a new process has not said who it is yet, or the last is about to end */
    if (ready[0].revents)
        (void)!read(notify, events, sizeof events);
    if (ended >= 0)
        close(ended);
}

static int follow(struct log *log)
{
    char path[INSTANCE_PATH_BYTES];
    struct instance_info vm;
    int r = 0, notify = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (notify < 0 || instance_path_of(log->name, "", path, NULL) ||
        inotify_add_watch(notify, path, IN_MODIFY | IN_CREATE | IN_MOVED_TO | IN_DELETE_SELF | IN_ONLYDIR) < 0)
        return complain(STATUS_ERROR, "cannot watch the log of %s: %s", log->name, strerror(errno));
    while (r == 0) {
        bool alive = instance_read(log->name, &vm, NULL) == 0 && vm.life == INSTANCE_ALIVE;
        r = look_again(log); /* after the look at its life: the last words are in it */
        if (alive && r == 0)
            wait_for_change(notify, &vm.process);
        instance_info_clear(&vm);
        if (!alive)
            break;
    }
    close(notify);
    return r ? STATUS_ERROR : 0;
}

int logs_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    unsigned long lines = 0;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    r = parse_number(argv[0], "--lines", arguments.value[LOGS_LINES], 1000000000, &lines);
    if (r)
        return r;
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    struct log log = {.name = vm.name, .file = arguments.value[LOGS_MESSAGES] ? "messages.log" : "console.log", .fd = -1};
    r = print_log(&log, arguments.value[LOGS_LINES], lines) ? STATUS_ERROR : 0;
    if (r == 0 && arguments.value[LOGS_FOLLOW])
        r = follow(&log);
    if (line.length)
        print_line();
    if (log.fd >= 0)
        close(log.fd);
    instance_info_clear(&vm);
    return r;
}
