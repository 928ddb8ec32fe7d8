/*
 * Requests under /doppel/v1 (docs/openapi-doppel-v1.json). One line in the table below is one request; a test compares table, description and answers. All handlers
 * run on the server's thread; the machine stays while one holds machine_lock.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "control/vm_control_priv.h"
#include "doppel/doppel.h"
#include "metadata/metadata.h"

#define STOP_TIMEOUT_S_DEFAULT 30
#define STOP_TIMEOUT_S_MAX 86400

/* The machine, or a reply that there is none. */
static struct machine *machine_of(struct http_call *call, struct vm_control *control)
{
    struct machine *machine = vm_machine_get(control);
    if (!machine)
        http_reply_error(call, 400, "The virtual machine has not been started, or has ended.");
    return machine;
}

/* 0 becomes 204; what is not possible now 400. */
static void reply_result(struct http_call *call, int result, const struct error *err)
{
    if (result)
        http_reply_error(call, 400, "%s", err->text[0] ? err->text : strerror(-result));
    else
        http_reply_empty(call, 204);
}

/* ---- what it is ---- */

static void get_vm(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    pthread_mutex_lock(&control->event_lock);
    json_t *vm = json_pack("{s:s, s:s, s:i, s:s, s:I, s:i}", "name", control->name, "state", control->state, "pid", (int)control->self.pid, "version", doppel_version(),
                           "created_ms", (json_int_t)control->created_ms, "restarts", (int)control->restarts);
    if (control->started_ms)
        json_object_set_new(vm, "started_ms", json_integer((json_int_t)control->started_ms));
    pthread_mutex_unlock(&control->event_lock);
    struct machine *machine = vm_machine_get(control);
    if (machine) {
        json_object_set_new(vm, "config", vm_config_json(control->config));
        vm_machine_put(control);
    }
    http_reply_json(call, 200, vm);
}

static void get_engine(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    const char *reason, *name = machine_engine(machine, &reason);
    json_t *engine = json_pack("{s:s}", "name", name);
    if (reason[0])
        json_object_set_new(engine, "reason", json_string(reason));
    vm_machine_put(ctx);
    http_reply_json(call, 200, engine);
}

static void add_device(void *ctx, const char *name, const char *class, const char *help)
{
    json_array_append_new(ctx, json_pack("{s:s, s:s, s:s}", "name", name, "class", class, "help", help));
}

static void get_devices(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    json_t *list = json_array();
    machine_devices(machine, add_device, list);
    vm_machine_put(ctx);
    http_reply_json(call, 200, list);
}

static void get_statistics(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    json_t *statistics = vm_statistics(ctx, machine);
    vm_machine_put(ctx);
    http_reply_json(call, 200, statistics);
}

static void get_metrics(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    size_t size = 0;
    char *text = vm_metrics(ctx, machine, &size);
    vm_machine_put(ctx);
    if (text)
        http_reply_data(call, 200, "text/plain; version=0.0.4", text, size);
    else
        http_reply_error(call, 500, "out of memory");
    free(text);
}

static void get_state(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    char *text = NULL;
    size_t size = 0;
    FILE *out = machine ? open_memstream(&text, &size) : NULL;
    if (out) {
        machine_dump(machine, out);
        fclose(out);
        http_reply_data(call, 200, "text/plain", text, size);
    } else if (machine) {
        http_reply_error(call, 500, "out of memory");
    }
    if (machine)
        vm_machine_put(ctx);
    free(text);
}

/* ---- what it does ---- */

static void get_events(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    const char *since = http_query(call, "since");
    char *end = NULL, *past = NULL;
    unsigned long long id = 0;
    size_t size = 0;
    if (since) {
        errno = 0;
        id = strtoull(since, &end, 10);
        if (!*since || *since == '-' || *end || errno) {
            http_reply_error(call, 400, "The query's \"since\" is the number of an event.");
            return;
        }
        past = vm_events_since(control, id, &size);
    }
    vm_streams_add(&control->streams, call, STREAM_EVENTS, "text/event-stream", past, size);
    free(past);
}

static void get_console(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    char recent[VM_SCREEN_RECENT_BYTES];
    size_t size = http_query(call, "recent") ? vm_screen_recent(control->screen, recent) : 0;
    vm_streams_add(&control->streams, call, STREAM_CONSOLE, "application/octet-stream", recent, size);
}

static void get_screen(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    const char *format = http_query(call, "format"), *content_type;
    char *text = vm_screen_render(control->screen, format ? format : "json", &content_type);
    if (text)
        http_reply_data(call, 200, content_type, text, strlen(text));
    else if (content_type)
        http_reply_error(call, 500, "no terminal: out of memory, or libvterm0 is not installed");
    else
        http_reply_error(call, 400, "The query's \"format\" is json, text or svg.");
    free(text);
}

static void get_trace(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    struct machine *machine = machine_of(call, control);
    if (!machine)
        return;
    vm_trace_add(control->trace, machine, call);
    vm_machine_put(control);
}

static void put_console(struct http_call *call, void *ctx)
{
    size_t size;
    const char *body = http_body(call, &size);
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    size_t taken = machine_console_type(machine, (const uint8_t *)body, size);
    vm_machine_put(ctx);
    http_reply_json(call, 200, json_pack("{s:I}", "taken_bytes", (json_int_t)taken));
}

/* ---- what is done to it ---- */

static void pause_vm(struct http_call *call, void *ctx)
{
    struct error err = {0};
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    int r = machine_pause(machine, &err);
    vm_machine_put(ctx);
    vm_control_sync(ctx);
    reply_result(call, r, &err);
}

static void resume_vm(struct http_call *call, void *ctx)
{
    struct error err = {0};
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    int r = machine_resume(machine, &err);
    vm_machine_put(ctx);
    vm_control_sync(ctx);
    reply_result(call, r, &err);
}

static void reset_vm(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    machine_reset(machine);
    vm_machine_put(ctx);
    http_reply_empty(call, 204);
}

/* The supervisor finds the file when the machine has ended. */
static void write_unwanted(void *ctx)
{
    struct vm_control *control = ctx;
    json_t *nothing = json_object();
    if (control->supervisor.pid && control->instance)
        (void)!instance_write(control->instance, "unwanted", nothing);
    json_decref(nothing);
}

static void note_asked(struct vm_control *control)
{
    pthread_mutex_lock(&control->event_lock);
    control->asked = true;
    pthread_mutex_unlock(&control->event_lock);
    (void)!loop_post(control->loop, write_unwanted, control);
}

static void kill_vm(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    note_asked(ctx);
    machine_stop(machine, MACHINE_STOPPED);
    vm_machine_put(ctx);
    http_reply_empty(call, 204);
}

/* {"timeout_s": N}, or nothing. False: replied. */
static bool stop_timeout(struct http_call *call, json_int_t *timeout_s)
{
    size_t size;
    const char *key;
    json_t *value;
    *timeout_s = STOP_TIMEOUT_S_DEFAULT;
    http_body(call, &size);
    json_t *body = size ? http_body_json(call) : NULL;
    if (size && !body)
        return false;
    bool good = !body || json_is_object(body);
    json_object_foreach(body, key, value)
    {
        good = good && strcmp(key, "timeout_s") == 0 && json_is_integer(value) && json_integer_value(value) >= 0 && json_integer_value(value) <= STOP_TIMEOUT_S_MAX;
        *timeout_s = json_integer_value(value);
    }
    json_decref(body);
    if (!good)
        http_reply_error(call, 400, "The body is an object with \"timeout_s\", an integer from 0 to %d.", STOP_TIMEOUT_S_MAX);
    return good;
}

static void stop_vm(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    json_int_t timeout_s;
    if (!stop_timeout(call, &timeout_s))
        return;
    struct machine *machine = machine_of(call, control);
    if (!machine)
        return;
    note_asked(control);
    if (machine_is_paused(machine))
        (void)!machine_resume(machine, NULL); /* who stands still cannot shut down */
    machine_power_button(machine);
    loop_timer_arm(control->stop_timer, loop_now_ns() + (uint64_t)timeout_s * 1000000000ull);
    vm_machine_put(control);
    http_reply_empty(call, 204);
}

/* ---- what its guest can ask ---- */

/* The machine's, which stays until vm_machine_put; NULL: replied. */
static struct metadata *metadata_of(struct http_call *call, struct vm_control *control)
{
    struct machine *machine = machine_of(call, control);
    struct metadata *metadata = machine ? machine_metadata(machine) : NULL;
    if (machine && !metadata) {
        vm_machine_put(control);
        http_reply_error(call, 400, "The virtual machine has no metadata: it was started without --metadata.");
    }
    return metadata;
}

static void get_metadata(struct http_call *call, void *ctx)
{
    struct metadata *metadata = metadata_of(call, ctx);
    if (!metadata)
        return;
    json_t *data = metadata_get(metadata);
    vm_machine_put(ctx);
    if (data)
        http_reply_json(call, 200, data);
    else
        http_reply_error(call, 500, "out of memory");
}

static void change_metadata(struct http_call *call, void *ctx)
{
    struct error err = {0};
    json_t *body = http_body_json(call);
    struct metadata *metadata = body ? metadata_of(call, ctx) : NULL;
    if (metadata) {
        int r = strcmp(http_method(call), "PUT") == 0 ? metadata_put(metadata, body, &err) : metadata_patch(metadata, body, &err);
        vm_machine_put(ctx);
        reply_result(call, r, &err);
    }
    json_decref(body);
}

/* ---- devices that come and go ---- */

/* The body's only member, a text: its key is one of `keys` (ended by NULL), or a reply says what was wanted. The caller's to decref. */
static json_t *only_member(struct http_call *call, const char *const *keys, const char **key, const char **text)
{
    json_t *body = http_body_json(call), *value;
    const char *name;
    if (!body)
        return NULL;
    *key = NULL;
    json_object_foreach(body, name, value)
        for (unsigned i = 0; keys[i]; i++)
            if (strcmp(keys[i], name) == 0 && json_is_string(value) && strlen(json_string_value(value)) == json_string_length(value)) {
                *key = keys[i];
                *text = json_string_value(value);
            }
    if (*key && json_object_size(body) == 1)
        return body;
    json_decref(body);
    http_reply_error(call, 400, "The body is an object with one text: %s%s%s.", keys[0], keys[1] ? " or " : "", keys[1] ? keys[1] : "");
    return NULL;
}

static void add_device_now(struct http_call *call, void *ctx)
{
    static const char *const kinds[] = {"disk", "net", NULL};
    struct error err = {0};
    const char *kind, *text;
    json_t *body = only_member(call, kinds, &kind, &text);
    struct machine *machine = body ? machine_of(call, ctx) : NULL;
    if (machine) {
        int r = kind == kinds[0] ? machine_disk_add(machine, text, &err) : machine_net_add(machine, text, &err);
        vm_machine_put(ctx);
        vm_control_sync(ctx);
        reply_result(call, r, &err);
    }
    json_decref(body);
}

static void change_device(struct http_call *call, void *ctx)
{
    static const char *const kinds[] = {"path", NULL};
    struct error err = {0};
    const char *kind, *text;
    json_t *body = only_member(call, kinds, &kind, &text);
    struct machine *machine = body ? machine_of(call, ctx) : NULL;
    if (machine) {
        int r = machine_disk_replace(machine, http_parameter(call, 0), text, &err);
        vm_machine_put(ctx);
        reply_result(call, r, &err);
    }
    json_decref(body);
}

static void remove_device(struct http_call *call, void *ctx)
{
    struct error err = {0};
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    int r = machine_device_remove(machine, http_parameter(call, 0), &err);
    vm_machine_put(ctx);
    reply_result(call, r, &err);
}

static void press_power_button(struct http_call *call, void *ctx)
{
    struct machine *machine = machine_of(call, ctx);
    if (!machine)
        return;
    machine_power_button(machine);
    vm_machine_put(ctx);
    http_reply_empty(call, 204);
}

const struct http_route doppel_v1_routes[] = {
    {"GET", "/doppel/v1/vm", get_vm},
    {"GET", "/doppel/v1/engine", get_engine},
    {"GET", "/doppel/v1/devices", get_devices},
    {"POST", "/doppel/v1/devices", add_device_now},
    {"PATCH", "/doppel/v1/devices/{name}", change_device},
    {"DELETE", "/doppel/v1/devices/{name}", remove_device},
    {"GET", "/doppel/v1/statistics", get_statistics},
    {"GET", "/doppel/v1/metrics", get_metrics},
    {"GET", "/doppel/v1/registers", get_state},
    {"GET", "/doppel/v1/events", get_events},
    {"GET", "/doppel/v1/console", get_console},
    {"POST", "/doppel/v1/console", put_console},
    {"GET", "/doppel/v1/screen", get_screen},
    {"GET", "/doppel/v1/trace", get_trace},
    {"GET", "/doppel/v1/metadata", get_metadata},
    {"PUT", "/doppel/v1/metadata", change_metadata},
    {"PATCH", "/doppel/v1/metadata", change_metadata},
    {"GET", "/doppel/v1/snapshot", vm_get_snapshot},
    {"POST", "/doppel/v1/snapshot", vm_post_snapshot},
    {"POST", "/doppel/v1/clone", vm_post_clone},
    {"GET", "/doppel/v1/migration", vm_get_migration},
    {"POST", "/doppel/v1/migration", vm_post_migration},
    {"DELETE", "/doppel/v1/migration", vm_cancel_migration},
    {"POST", "/doppel/v1/pause", pause_vm},
    {"POST", "/doppel/v1/resume", resume_vm},
    {"POST", "/doppel/v1/reset", reset_vm},
    {"POST", "/doppel/v1/power-button", press_power_button},
    {"POST", "/doppel/v1/stop", stop_vm},
    {"POST", "/doppel/v1/kill", kill_vm},
    {0},
};
