/*
 * The API's life and its one HTTP handler (api.h): every endpoint is a line of api_endpoints.c, every call goes through api_execute, so that what is legal when,
 * and that a refused call changes nothing, is decided in one place.
 */
#include "control/api.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "control/api_priv.h"
#include "control/vm_control.h"
#include "util/log.h"

/* ---- one call ---- */

static int check_time(struct api *api, enum api_when when, struct error *err)
{
    bool started = api_machine(api) != NULL;
    if (when == API_BEFORE_START && started)
        return error_set(err, -EPERM, "The requested operation is not supported after starting the microVM.");
    if (when == API_AFTER_START && !started)
        return error_set(err, -EPERM, "The requested operation is not supported before starting the microVM.");
    return 0;
}

static int check_id(const struct api_endpoint *endpoint, const char *id, const json_t *body, struct error *err)
{
    if (!endpoint->id_field)
        return 0;
    for (const char *c = id; *c; c++)
        if (!strchr("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_", *c))
            return error_set(err, -EINVAL, "API Resource IDs can only contain alphanumeric characters and underscores.");
    if (strlen(id) > 64)
        return error_set(err, -EINVAL, "API Resource IDs can have 64 characters at most.");
    const char *inside = api_text(body, endpoint->id_field);
    if (strcmp(inside, id) != 0)
        return error_set(err, -EINVAL, "The id from the path [%s] does not match the id from the body [%.64s]!", id, inside);
    return 0;
}

int api_execute(struct api *api, const struct api_endpoint *endpoint, const char *id, const json_t *body, json_t **answer, struct error *err)
{
    struct api_request request = {.api = api, .endpoint = endpoint, .machine = api_machine(api), .body = body, .id = id};
    int r = 0;
    if (body && endpoint->fields) {
        r = schema_check(endpoint->fields, body, err);
        if (r)
            error_prefix(err, "An error occurred when deserializing the json body of a request");
    }
    if (r == 0)
        r = check_id(endpoint, id, body, err);
    if (r == 0)
        r = check_time(api, endpoint->when, err);
    if (r == 0 && endpoint->section && endpoint->check) {
        json_t *complete = schema_complete(endpoint->fields, body);
        r = complete ? endpoint->check(api, complete, err) : error_set(err, -ENOMEM, "out of memory");
        json_decref(complete);
    }
    if (r == 0)
        r = endpoint->handler(&request, err);
    if (r == 0)
        *answer = request.answer;
    else
        json_decref(request.answer);
    return r;
}

/* False: replied already. */
static bool take_body(struct http_call *call, const struct api_endpoint *endpoint, json_t **body)
{
    size_t size_bytes;
    http_body(call, &size_bytes);
    *body = NULL;
    if (endpoint->body == API_NO_BODY && size_bytes)
        http_reply_error(call, 400, "%s request cannot have a body.", http_method(call));
    else if (endpoint->body == API_BODY && !size_bytes)
        http_reply_error(call, 400, "Empty %s request.", http_method(call));
    else if (!size_bytes)
        return true;
    else
        *body = http_body_json(call);
    return *body != NULL;
}

static void handle(struct http_call *call, void *ctx)
{
    struct api *api = ctx;
    const struct api_endpoint *endpoint = http_data(call);
    struct error err = {0};
    json_t *body, *answer = NULL;
    int r = -EINVAL;
    api_count(api->metrics, endpoint->counter);
    if (take_body(call, endpoint, &body)) {
        r = api_execute(api, endpoint, http_parameter(call, 0), body, &answer, &err);
        if (r)
            http_reply_error(call, 400, "%s", err.text[0] ? err.text : strerror(-r));
        else if (answer)
            http_reply_json(call, 200, answer);
        else
            http_reply_empty(call, 204);
    }
    if (r)
        api_count(api->metrics, endpoint->failures);
    json_decref(body);
}

/* The table's lines as routes of the HTTP server. */
const struct http_route api_routes[] = {
#define ENDPOINT(http_method, http_path, ...) \
    {http_method, http_path, handle, &(const struct api_endpoint){__VA_ARGS__}},
#include "control/api_endpoints.def"
#undef ENDPOINT
    {0},
};

const struct api_endpoint *api_endpoint_of_section(const char *section)
{
    for (const struct http_route *route = api_routes; route->method; route++) {
        const struct api_endpoint *endpoint = route->data;
        if (strcmp(route->method, "PUT") == 0 && endpoint->section && strcmp(endpoint->section, section) == 0)
            return endpoint;
    }
    return NULL;
}

void api_answered(void *ctx, const char *method, const char *path, unsigned status, uint64_t duration_ns)
{
    struct api *api = ctx;
    if (status >= 400)
        log_warning("API: %s %s: status %u", method, path, status);
    else
        log_debug("API: %s %s: status %u, %llu us", method, path, status, (unsigned long long)duration_ns / 1000);
    api_metrics_answered(api->metrics, status, duration_ns);
}

/* ---- life ---- */

int api_create(struct api **out, const struct api_options *options, struct error *err)
{
    struct api *api = calloc(1, sizeof *api);
    if (!api)
        return error_set(err, -ENOMEM, "out of memory");
    api->options = *options;
    machine_config_init(&api->config);
    pthread_mutex_init(&api->lock, NULL);
    pthread_cond_init(&api->changed, NULL);
    api->configuration = api_default_configuration();
    api->mmds = metadata_create(options->mmds_bytes_max);
    api->metrics = api_metrics_create(&api->options);
    if (!api->configuration || !api->mmds || !api->metrics) {
        api_destroy(api);
        return error_set(err, -ENOMEM, "out of memory");
    }
    *out = api;
    return 0;
}

void api_destroy(struct api *api)
{
    if (!api)
        return;
    api_metrics_end(api->metrics); /* its last line tells of the machine */
    machine_destroy(api->machine);
    api_metrics_destroy(api->metrics);
    metadata_destroy(api->mmds);
    json_decref(api->configuration);
    machine_config_clear(&api->config);
    pthread_cond_destroy(&api->changed);
    pthread_mutex_destroy(&api->lock);
    free(api);
}

struct machine *api_machine(struct api *api)
{
    pthread_mutex_lock(&api->lock);
    struct machine *machine = api->machine;
    pthread_mutex_unlock(&api->lock);
    return machine;
}

struct metadata *api_mmds(struct api *api)
{
    return api->mmds;
}

void api_set_machine(struct api *api, struct machine *machine)
{
    pthread_mutex_lock(&api->lock);
    api->machine = machine;
    if (api->stopped)
        machine_stop(machine, MACHINE_STOPPED);
    pthread_cond_broadcast(&api->changed);
    pthread_mutex_unlock(&api->lock);
    if (api->options.started)
        api->options.started(api->options.started_ctx, machine);
    api_metrics_attach(api->metrics, machine);
}

int api_start(struct api *api, struct error *err)
{
    struct machine *machine;
    int r = api_build_config(api, &api->config, err);
    if (r == 0)
        r = machine_create(&machine, &api->config, err);
    if (r == 0) {
        vm_control_attach(api->options.control, machine, &api->config);
        r = machine_start(machine, err);
        if (r) {
            vm_control_detach(api->options.control, false);
            machine_destroy(machine);
        }
    }
    if (r) {
        machine_config_clear(&api->config); /* as if nothing had been asked */
        return r;
    }
    api_set_machine(api, machine);
    return 0;
}

struct machine *api_wait_started(struct api *api)
{
    pthread_mutex_lock(&api->lock);
    while (!api->machine && !api->stopped)
        pthread_cond_wait(&api->changed, &api->lock);
    struct machine *machine = api->machine;
    pthread_mutex_unlock(&api->lock);
    return machine;
}

void api_stop(struct api *api)
{
    pthread_mutex_lock(&api->lock);
    api->stopped = true;
    struct machine *machine = api->machine;
    pthread_cond_broadcast(&api->changed);
    pthread_mutex_unlock(&api->lock);
    if (machine)
        machine_stop(machine, MACHINE_STOPPED);
}

/* ---- for handlers ---- */

json_t *api_section(struct api *api, const char *name)
{
    json_t *section = json_object_get(api->configuration, name);
    return json_is_null(section) ? NULL : section;
}

json_t *api_section_element(struct api *api, const char *name, const char *id_field, const char *id)
{
    size_t index;
    json_t *element;
    json_array_foreach(api_section(api, name), index, element)
        if (strcmp(api_text(element, id_field), id) == 0)
            return element;
    return NULL;
}

bool api_has(const json_t *object, const char *name)
{
    const json_t *value = json_object_get(object, name);
    return value && !json_is_null(value);
}

const char *api_text(const json_t *object, const char *name)
{
    return json_string_value(json_object_get(object, name));
}

bool api_flag(const json_t *object, const char *name)
{
    return json_is_true(json_object_get(object, name));
}

int64_t api_integer(const json_t *object, const char *name)
{
    return json_integer_value(json_object_get(object, name));
}

void api_bucket(const json_t *object, struct bucket_config *bucket)
{
    if (!json_is_object(object))
        return;
    bucket->size = (uint64_t)api_integer(object, "size");
    bucket->one_time_burst = (uint64_t)api_integer(object, "one_time_burst");
    bucket->refill_ms = (uint64_t)api_integer(object, "refill_time");
}

void api_rate_limit(const json_t *object, struct rate_limit_config *limit)
{
    api_bucket(json_object_get(object, "bandwidth"), &limit->bandwidth);
    api_bucket(json_object_get(object, "ops"), &limit->ops);
}

int api_not_available(struct api_request *request, struct error *err)
{
    return error_set(err, -ENOTSUP, "This is not available in Doppel; docs/api.md lists what is.");
}
