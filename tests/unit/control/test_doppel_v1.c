/* The requests under /doppel/v1 are those of their description, no more and no fewer. What they answer is compared by tests/integration/vms.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <ctype.h>
#include <string.h>
#include <strings.h>

#include "control/vm_control.h"

static json_t *description;

static json_t *find(const char *method, const char *path)
{
    char lower[16];
    size_t i = 0;
    for (; method[i] && i < sizeof lower - 1; i++)
        lower[i] = (char)tolower((unsigned char)method[i]);
    lower[i] = '\0';
    return json_object_get(json_object_get(json_object_get(description, "paths"), path), lower);
}

static void routes_are_described(void **state)
{
    for (const struct http_route *route = doppel_v1_routes; route->method; route++)
        if (!find(route->method, route->path))
            fail_msg("%s %s is not described", route->method, route->path);
}

static void described_are_routes(void **state)
{
    const char *path, *method;
    json_t *methods, *one;
    json_object_foreach(json_object_get(description, "paths"), path, methods)
    {
        json_object_foreach(methods, method, one)
        {
            bool there = false;
            for (const struct http_route *route = doppel_v1_routes; route->method; route++)
                there |= strcmp(route->path, path) == 0 && strcasecmp(route->method, method) == 0;
            if (!there)
                fail_msg("%s %s is described and not there", method, path);
        }
    }
}

static void events_are_described(void **state)
{
    json_t *schemas = json_object_get(json_object_get(description, "components"), "schemas"), *value;
    json_t *names = json_object_get(json_object_get(json_object_get(json_object_get(schemas, "Event"), "properties"), "event"), "enum");
    size_t index;
    assert_int_equal(json_array_size(names), MACHINE_EVENT_COUNT);
    json_array_foreach(names, index, value)
        assert_string_equal(json_string_value(value), machine_event_table[index].name);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(routes_are_described), cmocka_unit_test(described_are_routes), cmocka_unit_test(events_are_described)};
    json_error_t why;
    description = argc == 2 ? json_load_file(argv[1], JSON_REJECT_DUPLICATES, &why) : NULL;
    if (!description) {
        print_error("cannot read the description: %s\n", argc == 2 ? why.text : "no file given");
        return 1;
    }
    int r = cmocka_run_group_tests(tests, NULL, NULL);
    json_decref(description);
    return r;
}
