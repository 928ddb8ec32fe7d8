#include "cli/report.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "util/log.h"

static struct {
    bool json, failed;
    json_t *list; /* NULL: what is reported is the whole */
} output;

json_t *report_text(const char *text)
{
    json_t *value = json_string(text);
    char *copy = value ? NULL : strdup(text);
    for (char *c = copy; c && *c; c++)
        *c = *c & 0x80 ? '?' : *c;
    value = copy ? json_string(copy) : value;
    free(copy);
    return value;
}

static size_t log_line(char *line, size_t room, enum log_level level, const char *text)
{
    static const char *const names[] = {[LOG_ERROR] = "error", [LOG_WARNING] = "warning", [LOG_INFO] = "info", [LOG_DEBUG] = "debug"};
    json_t *object = json_pack("{s:s, s:o}", "level", names[level], "message", report_text(text));
    size_t length = object ? json_dumpb(object, line, room, JSON_COMPACT) : 0;
    json_decref(object);
    return length <= room ? length : 0;
}

void report_as_json(void)
{
    output.json = true;
    log_set_line_format(log_line);
}

void report_as_text(void)
{
    output.json = false;
    log_set_line_format(NULL);
}

void report_message(const char *text)
{
    json_t *object = output.json ? json_pack("{s:o}", "message", report_text(text)) : NULL;
    char *line = object ? json_dumps(object, JSON_COMPACT) : NULL;
    if (line)
        fprintf(stderr, "%s\n", line);
    else
        fprintf(stderr, "doppel: %s\n", text);
    free(line);
    json_decref(object);
}

bool report_is_json(void)
{
    return output.json;
}

void report_list(void)
{
    if (output.json && !output.list)
        output.failed = !(output.list = json_array());
}

static void print(json_t *value, size_t flags)
{
    if (!value || json_dumpf(value, stdout, flags))
        output.failed = true;
    putchar('\n');
    json_decref(value);
}

void report_line(json_t *value)
{
    print(value, JSON_COMPACT);
    fflush(stdout);
}

void report_value(json_t *value)
{
    print(value, JSON_INDENT(2) | JSON_ENCODE_ANY);
}

void report(json_t *value, const char *format, ...)
{
    va_list args;
    if (!output.json) {
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        putchar('\n');
        json_decref(value);
    } else if (!output.list) {
        report_value(value);
    } else if (json_array_append_new(output.list, value)) {
        output.failed = true;
    }
}

json_t *report_machine_json(const struct instance_info *vm)
{
    static const char *const from_config[] = {"cpus", "memory_bytes", "kernel"}, *const from_status[] = {"since_ms", "started_ms", "restarts", "reason", "exit_status"};
    const json_t *config = json_object_get(vm->vm, "config");
    json_t *object = json_pack("{s:s, s:s, s:b}", "name", vm->name, "state", vm->state, "alive", vm->life == INSTANCE_ALIVE);
    if (vm->process.pid)
        json_object_set_new(object, "pid", json_integer(vm->process.pid));
    for (size_t i = 0; i < sizeof from_config / sizeof *from_config; i++)
        json_object_set(object, from_config[i], json_object_get(config, from_config[i]));
    for (size_t i = 0; i < sizeof from_status / sizeof *from_status; i++)
        json_object_set(object, from_status[i], json_object_get(vm->status, from_status[i]));
    return object;
}

void report_machine_with(const char *name, json_t *more)
{
    struct instance_info vm = {0};
    json_t *object = NULL;
    if (output.json) {
        object = instance_read(name, &vm, NULL) ? json_pack("{s:s, s:s, s:b}", "name", name, "state", "gone", "alive", 0) : report_machine_json(&vm);
        instance_info_clear(&vm);
        if (more && json_object_update(object, more))
            output.failed = true;
    }
    json_decref(more);
    report(object, "%s", name);
}

void report_machine(const char *name)
{
    report_machine_with(name, NULL);
}

static char *base64(const uint8_t *data, size_t size)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *text = malloc(size / 3 * 4 + 5), *to = text;
    for (size_t i = 0; text && i < size; i += 3) {
        uint32_t three = (uint32_t)data[i] << 16 | (i + 1 < size ? data[i + 1] << 8 : 0) | (i + 2 < size ? data[i + 2] : 0);
        for (unsigned n = 0; n < 4; n++)
            *to++ = i + n > size ? '=' : digits[three >> (18 - 6 * n) & 63];
    }
    if (text)
        *to = '\0';
    return text;
}

void report_set_bytes(json_t *object, const char *key, const void *data, size_t size_bytes)
{
    json_t *text = json_stringn(size_bytes ? data : "", size_bytes);
    char longer[32], *encoded = text ? NULL : base64(data, size_bytes);
    snprintf(longer, sizeof longer, "%s_base64", key);
    if (json_object_set_new(object, text ? key : longer, text ? text : json_string(encoded)))
        output.failed = true;
    free(encoded);
}

void report_file(const char *path, json_t *more)
{
    struct stat st = {0};
    if (stat(path, &st) || json_object_update_new(more, json_pack("{s:o, s:I}", "file", report_text(path), "bytes", (json_int_t)st.st_size)))
        output.failed = true;
    report_value(more);
}

bool report_end(void)
{
    if (output.list)
        report_value(output.list);
    output.list = NULL;
    return !output.failed;
}
