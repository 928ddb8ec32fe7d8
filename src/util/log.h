/*
 * Logging to stderr, one line a message: "doppel: warning: text", or to a file or named pipe: "TIME [instance:thread:WARNING:src/file.c:12] text".
 *
 * Anything a guest can trigger logs through LOG_GUEST, which is rate-limited per call site: at most 10 lines in 10 seconds, then
 * a count of what was left out. Threading: every function may be called from any thread; not from a signal handler.
 */
#ifndef DOPPEL_UTIL_LOG_H
#define DOPPEL_UTIL_LOG_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum log_level { LOG_OFF = -1, LOG_ERROR, LOG_WARNING, LOG_INFO, LOG_DEBUG };

struct log_limit {
    _Atomic uint64_t window_start_ns;
    _Atomic uint32_t count;
};

void log_set_level(enum log_level level);
enum log_level log_get_level(void);

/* How lines of a file look. */
struct log_format {
    const char *instance; /* whose lines they are */
    bool level, origin;   /* whether they say these */
    const char *module;   /* only lines of source files whose path has this in it; NULL: all */
};

/* From now on everything goes to this file (created, or appended to) or named pipe (which needs no reader yet); what a full pipe does not take is lost. */
int log_open(const char *path, const struct log_format *format) __attribute__((warn_unused_result));

/* What a full pipe does not take is lost from here on, where standard error is one, too: who does not read must not stop the program. Says how many lines that were when there is room again. */
void log_never_wait(void);

/* Lines end in "\r\n" while a terminal is in raw mode. */
void log_set_raw_terminal(bool raw);
/*
 * How lines of stderr look instead: `format` puts one without its end into `line` (`room` bytes, not 0) and returns its length; any thread may call it. NULL: as above.
 */
typedef size_t log_line_format(char *line, size_t room, enum log_level level, const char *text);
void log_set_line_format(log_line_format *format);

void log_message_at(enum log_level level, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));
#define log_message(level, ...) log_message_at(level, __FILE__, __LINE__, __VA_ARGS__)
/* Text of many lines as it is, with the line ends the terminal needs. */
void log_text(const char *text);
bool log_limit_pass(struct log_limit *limit);

#define log_error(...) log_message(LOG_ERROR, __VA_ARGS__)
#define log_warning(...) log_message(LOG_WARNING, __VA_ARGS__)
#define log_info(...) log_message(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_message(LOG_DEBUG, __VA_ARGS__)

/* For conditions that a guest or a network peer can cause at will. */
#define LOG_GUEST(level, ...)                                                                      \
    do {                                                                                           \
        static struct log_limit limit_;                                                            \
        if ((level) <= log_get_level() && log_limit_pass(&limit_))                                 \
            log_message(level, __VA_ARGS__);                                                       \
    } while (0)

#endif
