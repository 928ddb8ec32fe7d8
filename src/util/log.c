/*
 * Logging to stderr. A line is put together first and written with one write(2), so that lines of several threads do not mix.
 *
 * The level and the line ending belong to the process, as stderr does: they are the only variables of file scope here.
 * Threading: any thread. The rate limit is approximate under contention (a few lines more), never blocking.
 */
#include "util/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOG_LIMIT_WINDOW_NS 10000000000ull
#define LOG_LIMIT_LINES 10u

static _Atomic int log_level_now = LOG_INFO;
static atomic_bool log_raw_terminal;

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

static void log_write(const char *data, size_t size_bytes)
{
    while (size_bytes > 0) {
        ssize_t done = write(STDERR_FILENO, data, size_bytes);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return; /* nobody to tell */
        data += done;
        size_bytes -= (size_t)done;
    }
}

void log_message(enum log_level level, const char *format, ...)
{
    if (level > log_get_level())
        return;
    int saved_errno = errno;
    char line[1024];
    const size_t room = sizeof(line) - 2; /* for the line's end */
    size_t length = (size_t)snprintf(line, room, level == LOG_INFO ? "doppel: " : "doppel: %s: ", log_level_names[level]);

    va_list args;
    va_start(args, format);
    int body = vsnprintf(line + length, room - length, format, args);
    va_end(args);
    if (body > 0)
        length += (size_t)body < room - length ? (size_t)body : room - length - 1;

    if (atomic_load_explicit(&log_raw_terminal, memory_order_relaxed))
        line[length++] = '\r';
    line[length++] = '\n';
    log_write(line, length);
    errno = saved_errno;
}

void log_text(const char *text)
{
    bool raw = atomic_load_explicit(&log_raw_terminal, memory_order_relaxed);
    while (*text) {
        size_t length = strcspn(text, "\n");
        log_write(text, length);
        if (text[length])
            log_write(raw ? "\r\n" : "\n", raw ? 2 : 1);
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
