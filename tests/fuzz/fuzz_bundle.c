/* Fuzz target: configurations that come in bundles. Checks that no path but those in the directory asked for comes out, and that what does can be read as a configuration. */
#include <stdlib.h>
#include <string.h>

#include "control/bundle.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

static const char place[] = "/a,b";

static void check_path(const json_t *value)
{
    const char *path = json_string_value(value);
    if (!path || strncmp(path, place, sizeof place - 1) != 0 || path[sizeof place - 1] != '/' || strchr(path + sizeof place, '/') || path[sizeof place] == '.' || !path[sizeof place])
        abort();
}

static void check_config(const json_t *placed, const json_t *paths)
{
    struct machine_config config;
    struct error err = {0};
    const char *key;
    json_t *value, *element;
    size_t index;
    machine_config_init(&config);
    json_object_foreach((json_t *)placed, key, value) {
        json_array_foreach(value, index, element)
            if (machine_config_set(&config, key, json_string_value(element), &err))
                goto done;
        if (json_is_string(value) && machine_config_set(&config, key, json_string_value(value), &err))
            goto done;
    }
    if (bundle_set_paths(&config, paths, &err) || config.share_count || config.trace || config.pid_file)
        abort();
done:
    machine_config_clear(&config);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    struct bundle bundle;
    struct error err = {0};
    const char *key;
    json_t *config = json_loadb((const char *)data, size_bytes, JSON_REJECT_DUPLICATES, NULL), *value, *element;
    size_t index;
    if (!config || bundle_check(&bundle, config, &err)) {
        json_decref(config);
        return 0;
    }
    json_t *placed = bundle_place(&bundle, place), *paths = bundle_paths(placed);
    json_object_foreach(paths, key, value) {
        if (strcmp(key, "disk_format") == 0)
            continue;
        json_array_foreach(value, index, element)
            check_path(element);
        if (!json_is_array(value))
            check_path(value);
    }
    check_config(placed, paths);
    json_decref(paths);
    json_decref(placed);
    bundle_clear(&bundle);
    json_decref(config);
    return 0;
}
