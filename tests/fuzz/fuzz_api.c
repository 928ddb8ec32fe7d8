/*
 * Fuzz target: the API's bodies. Input: any number of "METHOD /path/{id}" lines, each followed by a line of JSON; all go to one API before its start. Left out is what
 * would make files or a machine: of those only the shape is checked. Checks that a refused call has changed nothing and says why in one line.
 */
#include <stdlib.h>
#include <string.h>

#include "control/api_priv.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes);

static const struct http_route *find_route(const char *line, size_t length)
{
    for (const struct http_route *route = api_routes; route->method; route++) {
        size_t method = strlen(route->method);
        if (length == method + 1 + strlen(route->path) && memcmp(line, route->method, method) == 0 && line[method] == ' ' &&
            memcmp(line + method + 1, route->path, length - method - 1) == 0)
            return route;
    }
    return NULL;
}

static bool makes_something(const struct http_route *route)
{
    static const char *const paths[] = {"/actions", "/logger", "/metrics", "/serial", "/snapshot/load"};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        if (strcmp(paths[i], route->path) == 0)
            return true;
    return false;
}

static void call(struct api *api, const struct http_route *route, const char *text, size_t length)
{
    const struct api_endpoint *endpoint = route->data;
    struct error err = {0};
    json_t *answer = NULL, *body = json_loadb(text, length, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, NULL);
    if (!body && endpoint->body != API_NO_BODY)
        return;
    if (makes_something(route)) {
        int r = schema_check(endpoint->fields, body, &err);
        json_decref(r ? NULL : schema_complete(endpoint->fields, body));
        json_decref(body);
        return;
    }
    const char *id = endpoint->id_field && json_is_object(body) ? api_text(body, endpoint->id_field) : "";
    json_t *before = json_deep_copy(api->configuration);
    int r = api_execute(api, endpoint, id ? id : "", endpoint->body == API_NO_BODY ? NULL : body, &answer, &err);
    if (r && (!json_equal(before, api->configuration) || !err.text[0] || strchr(err.text, '\n')))
        abort();
    json_decref(before);
    json_decref(answer);
    json_decref(body);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    struct api *api;
    const struct api_options options = {.id = "fuzz", .app_name = "Doppel"};
    const struct http_route *route = NULL;
    const char *at = (const char *)data, *end = at + size_bytes;
    if (api_create(&api, &options, NULL))
        return 0;
    while (at < end) {
        const char *stop = memchr(at, '\n', (size_t)(end - at));
        size_t length = (size_t)((stop ? stop : end) - at);
        const struct http_route *named = find_route(at, length);
        if (!named && route)
            call(api, route, at, length);
        route = named;
        at += length + 1;
    }
    api_destroy(api);
    return 0;
}
