/* doppel trace: what a virtual machine's processors do, from now until Ctrl-C or its end. */
#include <stdio.h>

#include "cli/arguments.h"
#include "control/client.h"

static int print(void *ctx, const char *data, size_t size_bytes)
{
    return fwrite(data, 1, size_bytes, stdout) == size_bytes && fflush(stdout) == 0 ? 0 : -1;
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
    r = client_get_stream(vm.name, "/doppel/v1/trace", print, NULL, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    instance_info_clear(&vm);
    return r;
}
