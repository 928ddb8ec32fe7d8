/*
 * What commands print. For people: text. With --json, for programs: one JSON value on standard output (of commands that go on, one object a line), and messages as JSON objects on
 * standard error, one a line. Belongs to the process, as these streams do; single-threaded.
 */
#ifndef DOPPEL_CLI_REPORT_H
#define DOPPEL_CLI_REPORT_H

#include <stdbool.h>

#include "control/instance.h"

/* --json was given; messages of the log follow. */
void report_as_json(void);
/* For a process whose standard error becomes a machine's log. */
void report_as_text(void);
bool report_is_json(void);
/* A line on standard error. */
void report_message(const char *text);

/* What is reported from here on is an array's, which report_end() prints; without this there is one value. Nothing for people. */
void report_list(void);
/* For people the text, a line. `value` is taken; NULL: no memory, which report_end() tells. */
void report(json_t *value, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* A machine that something was done to: its name, or what report_machine_json() says. */
void report_machine(const char *name);
/* With what else there is to tell to programs; `more` is taken, and may be NULL. */
void report_machine_with(const char *name, json_t *more);
/* For programs only: one value, printed at once; in one line, or in several. `value` is taken. */
void report_line(json_t *value);
void report_value(json_t *value);
/* False: something could not be told. */
bool report_end(void);

/* A string; bytes that are not UTF-8 become "?". */
json_t *report_text(const char *text);
/* Text of a guest or a file: {key: text}, or {key_base64: its bytes} when it is not UTF-8. */
void report_set_bytes(json_t *object, const char *key, const void *data, size_t size_bytes);
/* For programs only: a file that was written, with its size, and what `more` (taken) says. */
void report_file(const char *path, json_t *more);
/* Name, state, configuration in short, as doppel ps --json has it. */
json_t *report_machine_json(const struct instance_info *vm);

#endif
