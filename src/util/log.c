/*
 * Logging. A line is put together first and written with one write(2), so that lines of several threads do not mix.
 *
 * Level, line ending and file belong to the process, as stderr does: they are the only variables of file scope here.
 * Threading: any thread. The rate limit is approximate under contention (a few lines more), never blocking.
 */
#include "util/log.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "util/sandbox_rules.h"

#define LOG_LIMIT_WINDOW_NS 10000000000ull
#define LOG_LIMIT_LINES 10u

static _Atomic int log_level_now = LOG_INFO;
static atomic_bool log_raw_terminal;
static log_line_format *_Atomic log_line;

/* The file, guarded by `lock`; fd -1: stderr. */
static struct {
    pthread_mutex_t lock;
    int fd;
    bool level, origin;
    char instance[72], module[72];
    unsigned long lost; /* lines that a full pipe did not take */
} log_file = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static const char *const log_level_names[] = {
    [LOG_ERROR] = "error",
    [LOG_WARNING] = "warning",
    [LOG_INFO] = "info",
    [LOG_DEBUG] = "debug",
};

void log_set_level(enum log_level level)
{
    atomic_store_explicit(&log_level_now, (int)level, memory_order_relaxed);
}

enum log_level log_get_level(void)
{
    return (enum log_level)atomic_load_explicit(&log_level_now, memory_order_relaxed);
}

void log_set_raw_terminal(bool raw)
{
    atomic_store_explicit(&log_raw_terminal, raw, memory_order_relaxed);
}

void log_set_line_format(log_line_format *format)
{
    atomic_store_explicit(&log_line, format, memory_order_relaxed);
}

SANDBOX_ALLOW_IF(IN_PROGRAM, prctl, ARG_IS(0, PR_GET_NAME)); /* the thread's, in lines of the file */

static bool log_write(int fd, const char *data, size_t size_bytes)
{
    while (size_bytes > 0) {
        ssize_t done = write(fd, data, size_bytes);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return false; /* nobody to tell */
        data += done;
        size_bytes -= (size_t)done;
    }
    return true;
}

/* A line, and before it how many are missing. A pipe takes a line of this size whole or not at all. */
static void line_write(int fd, const char *line, size_t length, bool raw)
{
    char missing[96];
    if (log_file.lost) {
        int bytes = snprintf(missing, sizeof missing, "doppel: warning: %lu messages before this one were lost, because nobody read them%s\n", log_file.lost, raw ? "\r" : "");
        if (!log_write(fd, missing, (size_t)bytes)) {
            log_file.lost++;
            return;
        }
        log_file.lost = 0;
    }
    log_file.lost += !log_write(fd, line, length);
}

void log_never_wait(void)
{
    struct stat st;
    int fd = fstat(STDERR_FILENO, &st) == 0 && S_ISFIFO(st.st_mode) ? open("/proc/self/fd/2", O_WRONLY | O_NONBLOCK | O_CLOEXEC) : -1;
    if (fd < 0) /* nobody will ever read it, or it is a socket, which cannot be opened again */
        return;
    (void)dup2(fd, STDERR_FILENO); /* an open file of our own: others who write to the pipe wait as before */
    close(fd);
}

int log_open(const char *path, const struct log_format *format)
{
    /* O_RDWR opens a pipe without a reader. */
    int fd = open(path, O_RDWR | O_CREAT | O_APPEND | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0600);
    if (fd < 0)
        return -errno;
    pthread_mutex_lock(&log_file.lock);
    if (log_file.fd >= 0)
        close(log_file.fd);
    log_file.fd = fd;
    log_file.level = format->level;
    log_file.origin = format->origin;
    snprintf(log_file.instance, sizeof log_file.instance, "%s", format->instance);
    snprintf(log_file.module, sizeof log_file.module, "%s", format->module ? format->module : "");
    pthread_mutex_unlock(&log_file.lock);
    return 0;
}

/* What snprintf says, as what is really in the buffer. */
static size_t written(int length, size_t room)
{
    return length < 0 ? 0 : (size_t)length < room ? (size_t)length : room - 1;
}

/* The beginning of a line of the file; 0: the line is not wanted. */
static size_t file_prefix(char *text, size_t room, enum log_level level, const char *file, int line)
{
    static const char *const names[] = {[LOG_ERROR] = "ERROR", [LOG_WARNING] = "WARN", [LOG_INFO] = "INFO", [LOG_DEBUG] = "DEBUG"};
    char thread[16] = "main", level_text[8] = "", origin[96] = "";
    struct timespec now;
    struct tm date;
    const char *source = strstr(file, "src/");
    if (!strstr(file, log_file.module))
        return 0;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &date);
    pthread_getname_np(pthread_self(), thread, sizeof thread);
    if (log_file.level)
        snprintf(level_text, sizeof level_text, ":%s", names[level]);
    if (log_file.origin)
        snprintf(origin, sizeof origin, ":%s:%d", source ? source : file, line);
    size_t length = strftime(text, room, "%Y-%m-%dT%H:%M:%S", &date);
    return length + written(snprintf(text + length, room - length, ".%09ld [%s:%s%s%s] ", now.tv_nsec, log_file.instance, thread, level_text, origin),
                            room - length);
}

void log_message_at(enum log_level level, const char *file, int line_number, const char *format, ...)
{
    if (level > log_get_level())
        return;
    int saved_errno = errno;
    char line[1024];
    const size_t room = sizeof(line) - 2; /* for the line's end */
    pthread_mutex_lock(&log_file.lock);
    bool to_file = log_file.fd >= 0;
    size_t length = to_file ? file_prefix(line, room, level, file, line_number)
                            : (size_t)snprintf(line, room, level == LOG_INFO ? "doppel: " : "doppel: %s: ", log_level_names[level]);
    if (length) {
        va_list args;
        va_start(args, format);
        length += written(vsnprintf(line + length, room - length, format, args), room - length);
        va_end(args);
        log_line_format *other = to_file ? NULL : atomic_load_explicit(&log_line, memory_order_relaxed);
        if (other) {
            char text[sizeof line];
            va_start(args, format);
            vsnprintf(text, sizeof text, format, args);
            va_end(args);
            length = other(line, room, level, text);
        }
        bool raw = !to_file && atomic_load_explicit(&log_raw_terminal, memory_order_relaxed);
        if (raw)
            line[length++] = '\r';
        line[length++] = '\n';
        line_write(to_file ? log_file.fd : STDERR_FILENO, line, length, raw);
    }
    pthread_mutex_unlock(&log_file.lock);
    errno = saved_errno;
}

void log_text(const char *text)
{
    bool raw = atomic_load_explicit(&log_raw_terminal, memory_order_relaxed);
    while (*text) {
        size_t length = strcspn(text, "\n");
        (void)log_write(STDERR_FILENO, text, length);
        if (text[length])
            (void)log_write(STDERR_FILENO, raw ? "\r\n" : "\n", raw ? 2 : 1);
        text += length + (text[length] != 0);
    }
}

bool log_limit_pass(struct log_limit *limit)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    uint64_t now = (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
    uint64_t start = atomic_load(&limit->window_start_ns);
    if (start == 0 || now - start >= LOG_LIMIT_WINDOW_NS) {
        if (atomic_compare_exchange_strong(&limit->window_start_ns, &start, now)) {
            uint32_t seen = atomic_exchange(&limit->count, 0);
            if (seen > LOG_LIMIT_LINES)
                log_message(LOG_WARNING, "%u more messages like the next one were left out", seen - LOG_LIMIT_LINES);
        }
    }
    return atomic_fetch_add(&limit->count, 1) < LOG_LIMIT_LINES;
}
