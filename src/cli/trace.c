/* doppel trace: what a virtual machine's processors do, from now until Ctrl-C or its end. */
#include <stdio.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "control/client.h"

static int print(void *ctx, const char *data, size_t size_bytes)
{
    return fwrite(data, 1, size_bytes, stdout) == size_bytes && fflush(stdout) == 0 ? 0 : -1;
}

/* "SECONDS cpuN WHAT"; other lines are remarks. */
static json_t *line_json(const char *line)
{
    double seconds;
    int cpu, at = 0;
    if (sscanf(line, "%lf cpu%d %n", &seconds, &cpu, &at) == 2 && at)
        return json_pack("{s:f, s:i, s:o}", "seconds", seconds, "cpu", cpu, "what", report_text(line + at));
    return json_pack("{s:o}", "message", report_text(line));
}

struct lines {
    char text[1024];
    size_t length; /* of one that is not complete yet; longer ones are cut off */
};

static int print_lines(void *ctx, const char *data, size_t size_bytes)
{
    struct lines *lines = ctx;
    for (; size_bytes; size_bytes--, data++) {
        if (*data != '\n') {
            if (lines->length < sizeof lines->text - 1)
                lines->text[lines->length++] = *data;
            continue;
        }
        lines->text[lines->length] = '\0';
        lines->length = 0;
        if (lines->text[0] != '#') /* the heading */
            report_line(line_json(lines->text));
    }
    return ferror(stdout) ? -1 : 0;
}

int trace_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    struct lines lines = {.length = 0};
    r = client_get_stream(vm.name, "/doppel/v1/trace", report_is_json() ? print_lines : print, &lines, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    instance_info_clear(&vm);
    return r;
}
