/* Processor templates (api_cpu.h). */
#include "control/api_cpu.h"

#include <errno.h>
#include <string.h>

int api_cpu_check_template(const char *name, struct error *err)
{
    return strcmp(name, "None") == 0 ? 0 : error_set(err, -ENOTSUP, "The CPU template %s is not available in Doppel.", name);
}

int api_cpu_check(const json_t *cpu_config, struct error *err)
{
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)cpu_config, key, value)
        if (json_array_size(value))
            return error_set(err, -ENOTSUP, "`%s` is not available in Doppel.", key);
    return 0;
}
