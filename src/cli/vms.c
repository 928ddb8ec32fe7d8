/* Commands about virtual machines that are there: ps, inspect, stop, kill, pause, resume, reset, plug, unplug, screen, rm. What they do is a request to the machine's own process. */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "control/client.h"

#define ANSWER_MS 10000
#define KILL_MS 3000
#define STOP_SECONDS 30ul
#define STOP_SECONDS_MAX 86400ul

/* ---- names ---- */

static int for_all(int (*act)(struct instance_info *vm, void *ctx), void *ctx)
{
    struct instance_info *list;
    struct error err = {0};
    unsigned count;
    int status = 0;
    if (instance_list(&list, &count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    for (unsigned i = 0; i < count; i++)
        if (act(&list[i], ctx))
            status = STATUS_ERROR;
    instance_list_free(list, count);
    return status;
}

int for_each_vm(const struct arguments *arguments, int (*act)(struct instance_info *vm, void *ctx), void *ctx)
{
    int status = 0;
    if (!arguments->name_count)
        return for_all(act, ctx);
    for (unsigned i = 0; i < arguments->name_count; i++) {
        struct instance_info vm;
        struct error err = {0};
        if (instance_find(arguments->names[i], &vm, &err)) {
            status = complain(STATUS_ERROR, "%s", err.text);
            continue;
        }
        if (act(&vm, ctx))
            status = STATUS_ERROR;
        instance_info_clear(&vm);
    }
    return status;
}

/* ---- ps ---- */

static void print_age(json_int_t since_ms, char text[24])
{
    long seconds = since_ms > 0 ? (long)(time(NULL) - since_ms / 1000) : -1;
    if (seconds < 0)
        snprintf(text, 24, "-");
    else if (seconds < 120)
        snprintf(text, 24, "%ld s", seconds);
    else if (seconds < 7200)
        snprintf(text, 24, "%ld min", seconds / 60);
    else if (seconds < 172800)
        snprintf(text, 24, "%ld h", seconds / 3600);
    else
        snprintf(text, 24, "%ld d", seconds / 86400);
}

/* How it is, in a word or a few. */
static void print_state(const struct instance_info *vm, char text[48])
{
    const char *reason = json_string_value(json_object_get(vm->status, "reason"));
    if (vm->life == INSTANCE_ENDED)
        snprintf(text, 48, "ended: %.24s (%d)", reason ? reason : "?", (int)json_integer_value(json_object_get(vm->status, "exit_status")));
    else
        snprintf(text, 48, "%s", vm->state);
}

static int show(struct instance_info *vm, void *ctx)
{
    const struct arguments *arguments = ctx;
    char state[48], age[24], pid[16] = "-";
    const json_t *config = json_object_get(vm->vm, "config");
    if (vm->life != INSTANCE_ALIVE && !arguments->value[PS_ALL])
        return 0;
    if (report_is_json() || arguments->value[PS_QUIET]) {
        report(report_is_json() ? report_machine_json(vm) : NULL, "%s", vm->name);
        return 0;
    }
    print_state(vm, state);
    print_age(json_integer_value(json_object_get(vm->status, "since_ms")), age);
    if (vm->process.pid)
        snprintf(pid, sizeof pid, "%d", (int)vm->process.pid);
    printf("%-20s %-22s %8s %8s %4d %7llu  %s\n", vm->name, state, age, pid, (int)json_integer_value(json_object_get(config, "cpus")),
           (unsigned long long)json_integer_value(json_object_get(config, "memory_bytes")) >> 20,
           json_string_value(json_object_get(config, "kernel")) ? json_string_value(json_object_get(config, "kernel")) : "-");
    return 0;
}

int ps_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    report_list();
    if (!report_is_json() && !arguments.value[PS_QUIET])
        printf("%-20s %-22s %8s %8s %4s %7s  %s\n", "NAME", "STATE", "SINCE", "PID", "CPUS", "MEM/MIB", "KERNEL");
    return for_each_vm(&arguments, show, &arguments);
}

/* ---- inspect ---- */

static int collect(struct instance_info *vm, void *ctx)
{
    char path[INSTANCE_PATH_BYTES];
    json_t *object = json_pack("{s:s, s:s, s:O, s:O}", "name", vm->name, "state", vm->state, "vm", vm->vm, "status", vm->status), *answer = NULL;
    if (instance_path_of(vm->name, "", path, NULL) == 0)
        json_object_set_new(object, "directory", json_string(path));
    if (vm->life == INSTANCE_ALIVE && client_request(vm->name, "GET", "/doppel/v1/engine", NULL, ANSWER_MS, &answer, NULL) == 0)
        json_object_set_new(object, "engine", answer);
    if (vm->life == INSTANCE_ALIVE && client_request(vm->name, "GET", "/doppel/v1/devices", NULL, ANSWER_MS, &answer, NULL) == 0)
        json_object_set_new(object, "devices", answer);
    json_array_append_new(ctx, object);
    return 0;
}

int inspect_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    json_t *list = json_array();
    int status = for_each_vm(&arguments, collect, list);
    report_value(list);
    return status;
}

/* ---- requests ---- */

static int request(struct instance_info *vm, void *ctx)
{
    struct error err = {0};
    char path[64];
    if (vm->life != INSTANCE_ALIVE)
        return complain(STATUS_ERROR, "%s is not running", vm->name);
    snprintf(path, sizeof path, "/doppel/v1/%s", (const char *)ctx);
    if (client_request(vm->name, "POST", path, NULL, ANSWER_MS, NULL, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    report_machine(vm->name);
    return 0;
}

static int request_each(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    report_list();
    return for_each_vm(&arguments, request, argv[0]);
}

int pause_main(int argc, char **argv)
{
    return request_each(argc, argv);
}

int resume_main(int argc, char **argv)
{
    return request_each(argc, argv);
}

int reset_main(int argc, char **argv)
{
    return request_each(argc, argv);
}

/* ---- devices ---- */

/* The machine's process may be in another directory. A comma in a path is written twice. */
static void make_absolute(const char *text, char *absolute, size_t size)
{
    char *directory = text[0] == '/' ? NULL : get_current_dir_name();
    size_t length = 0;
    for (const char *c = directory; c && *c && length + 3 < size; c++) {
        absolute[length++] = *c;
        if (*c == ',')
            absolute[length++] = ',';
    }
    snprintf(absolute + length, size - length, "%s%s", directory ? "/" : "", text);
    free(directory);
}

/* What programs are told: the name of the device that was not there before. */
static json_t *new_device(const char *vm, const json_t *before)
{
    json_t *now = NULL, *device, *found = NULL;
    size_t i, n;
    if (report_is_json() && client_request(vm, "GET", "/doppel/v1/devices", NULL, ANSWER_MS, &now, NULL))
        return NULL;
    json_array_foreach(now, i, device) {
        const json_t *name = json_object_get(device, "name"), *other;
        bool known = false;
        json_array_foreach(before, n, other)
            known = known || json_equal(name, json_object_get(other, "name"));
        if (!known && !found)
            found = json_pack("{s:O}", "device", name);
    }
    json_decref(now);
    return found;
}

int plug_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    char path[8192] = "";
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    const char *disk = arguments.value[PLUG_DISK], *net = arguments.value[PLUG_NET];
    if (!disk == !net)
        return complain(STATUS_USAGE, "plug: give either --disk or --net");
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (disk)
        make_absolute(disk, path, sizeof path);
    json_t *body = json_pack("{s:s}", disk ? "disk" : "net", disk ? path : net), *before = NULL;
    r = report_is_json() ? client_request(vm.name, "GET", "/doppel/v1/devices", NULL, ANSWER_MS, &before, &err) : 0;
    r = r || client_request(vm.name, "POST", "/doppel/v1/devices", body, ANSWER_MS, NULL, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    if (r == 0)
        report_machine_with(vm.name, new_device(vm.name, before));
    json_decref(before);
    json_decref(body);
    instance_info_clear(&vm);
    return r;
}

int screen_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    char path[64], *text;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (report_is_json() && arguments.value[SCREEN_SVG])
        return complain(STATUS_USAGE, "screen: give either --json or --svg");
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    snprintf(path, sizeof path, "/doppel/v1/screen?format=%s", report_is_json() ? "json" : arguments.value[SCREEN_SVG] ? "svg" : "text");
    r = client_get_text(vm.name, path, ANSWER_MS, &text, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    if (r == 0) {
        fputs(text, stdout);
        free(text);
    }
    instance_info_clear(&vm);
    return r;
}

int unplug_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    char path[256];
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (arguments.name_count != 2)
        return complain(STATUS_USAGE, "unplug: which device of which virtual machine? usage: doppel unplug NAME DEVICE");
    if (strspn(arguments.names[1], "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") != strlen(arguments.names[1]) || strlen(arguments.names[1]) > 128)
        return complain(STATUS_ERROR, "unplug: there is no device \"%s\"", arguments.names[1]);
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    snprintf(path, sizeof path, "/doppel/v1/devices/%s", arguments.names[1]);
    r = client_request(vm.name, "DELETE", path, NULL, ANSWER_MS, NULL, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    if (r == 0)
        report_machine(vm.name);
    instance_info_clear(&vm);
    return r;
}

/* ---- the end ---- */

int end_by_force(struct instance_info *vm)
{
    (void)!instance_want(vm->name, false);
    if (client_request(vm->name, "POST", "/doppel/v1/kill", NULL, KILL_MS, NULL, NULL) == 0 && instance_wait(vm, KILL_MS) == 0)
        return 0;
    process_signal(&vm->process, SIGKILL);
    if (process_is(&vm->supervisor) && vm->supervisor.pid != vm->process.pid)
        process_signal(&vm->supervisor, SIGTERM); /* between two runs, or about to see the end */
    return instance_wait(vm, KILL_MS);
}

static int kill_one(struct instance_info *vm, void *ctx)
{
    if (vm->life != INSTANCE_ALIVE)
        return complain(STATUS_ERROR, "%s is not running", vm->name);
    if (end_by_force(vm))
        return complain(STATUS_ERROR, "%s does not end", vm->name);
    report_machine(vm->name);
    return 0;
}

int kill_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    report_list();
    return for_each_vm(&arguments, kill_one, NULL);
}

static int rm_one(struct instance_info *vm, void *ctx)
{
    const struct arguments *arguments = ctx;
    struct error err = {0};
    if (vm->life == INSTANCE_ALIVE && arguments->value[RM_FORCE] && end_by_force(vm))
        return complain(STATUS_ERROR, "%s does not end", vm->name);
    int r = instance_remove(vm->name, &err);
    if (r && !(r == -ENOENT && arguments->value[RM_FORCE])) /* it may have gone by itself */
        return complain(STATUS_ERROR, "%s", err.text);
    report_machine(vm->name);
    return 0;
}

int rm_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    report_list();
    return for_each_vm(&arguments, rm_one, &arguments);
}

/* ---- stop and restart: all are asked, then all are waited for ---- */

struct stop {
    unsigned long timeout_s;
    bool again;              /* start them again */
    struct instance_info *list;
    unsigned count;
};

static bool is_detached(const struct instance_info *vm)
{
    return json_is_true(json_object_get(vm->vm, "detached"));
}

static int ask(struct instance_info *vm, void *ctx)
{
    struct stop *stop = ctx;
    struct error err = {0};
    if (stop->again && vm->life == INSTANCE_ALIVE && !is_detached(vm))
        return complain(STATUS_ERROR, "%s runs in the foreground of a terminal; doppel reset %s resets it", vm->name, vm->name);
    if (vm->life != INSTANCE_ALIVE && !stop->again)
        return complain(STATUS_ERROR, "%s is not running", vm->name);
    if (vm->life == INSTANCE_ALIVE) {
        json_t *body = json_pack("{s:I}", "timeout_s", (json_int_t)stop->timeout_s);
        (void)!instance_want(vm->name, false);
        int r = client_request(vm->name, "POST", "/doppel/v1/stop", body, ANSWER_MS, NULL, &err);
        json_decref(body);
        if (r && process_is(&vm->supervisor)) /* between two runs */
            r = process_signal(&vm->supervisor, SIGTERM);
        if (r && instance_wait(vm, 0))
            return complain(STATUS_ERROR, "%s; doppel kill %s ends it", err.text, vm->name);
    }
    stop->list[stop->count++] = *vm;
    *vm = (struct instance_info){0}; /* ours now */
    return 0;
}

static int finish(struct stop *stop, struct instance_info *vm)
{
    if (instance_wait(vm, (int)stop->timeout_s * 1000 + KILL_MS) && end_by_force(vm))
        return complain(STATUS_ERROR, "%s does not end", vm->name);
    if (stop->again && start_again(vm))
        return STATUS_ERROR;
    report_machine(vm->name);
    return 0;
}

static int stop_each(int argc, char **argv, bool again)
{
    struct arguments arguments;
    struct stop stop = {.timeout_s = STOP_SECONDS, .again = again};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    r = parse_number(argv[0], "--timeout", arguments.value[STOP_TIMEOUT], STOP_SECONDS_MAX, &stop.timeout_s);
    if (r)
        return r;
    stop.list = calloc(arguments.name_count, sizeof *stop.list);
    if (!stop.list)
        return complain(STATUS_ERROR, "out of memory");
    report_list();
    int status = for_each_vm(&arguments, ask, &stop);
    for (unsigned i = 0; i < stop.count; i++) {
        if (finish(&stop, &stop.list[i]))
            status = STATUS_ERROR;
        instance_info_clear(&stop.list[i]);
    }
    free(stop.list);
    return status;
}

int stop_main(int argc, char **argv)
{
    return stop_each(argc, argv, false);
}

int restart_main(int argc, char **argv)
{
    return stop_each(argc, argv, true);
}
