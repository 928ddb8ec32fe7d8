/* doppel metadata: prints or changes what the guest of a running virtual machine can ask for. Single-threaded. */
#include <stdio.h>
#include <string.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "control/client.h"

#define ANSWER_MS 10000

/* NULL after a message. */
static json_t *read_data(const char *path)
{
    json_error_t why;
    bool input = strcmp(path, "-") == 0;
    json_t *data = input ? json_loadf(stdin, JSON_REJECT_DUPLICATES, &why) : json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    if (!data && why.line < 0)
        complain(STATUS_ERROR, "metadata: cannot read %s: %s", input ? "standard input" : path, why.text);
    else if (!data)
        complain(STATUS_ERROR, "metadata: %s:%d:%d: %s", input ? "standard input" : path, why.line, why.column, why.text);
    return data;
}

int metadata_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    json_t *body = NULL, *answer = NULL;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    const char *set = arguments.value[METADATA_SET], *merge = arguments.value[METADATA_MERGE];
    if (set && merge)
        return complain(STATUS_USAGE, "metadata: give either --set or --merge");
    if ((set || merge) && !(body = read_data(set ? set : merge)))
        return STATUS_ERROR;
    if (instance_find(arguments.names[0], &vm, &err)) {
        json_decref(body);
        return complain(STATUS_ERROR, "%s", err.text);
    }
    r = client_request(vm.name, set ? "PUT" : merge ? "PATCH" : "GET", "/doppel/v1/metadata", body, ANSWER_MS, &answer, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    if (answer)
        report_value(answer);
    if (r == 0 && body)
        report_machine(vm.name);
    json_decref(body);
    instance_info_clear(&vm);
    return r;
}
