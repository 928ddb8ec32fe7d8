/*
 * doppel serve: one virtual machine behind the HTTP API of tools for micro VMs, in the foreground. Also what the program does under their name for it: then the socket has
 * their default. The main thread waits for the machine's end, the HTTP server's answers calls, one waits for signals.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cli/cli.h"
#include "control/api.h"
#include "control/vm_control.h"
#include "doppel/doppel.h"
#include "util/log.h"

/* Exit statuses that these tools' users know. */
enum { SERVE_OK = 0, SERVE_ERROR = 1, SERVE_BAD_CONFIGURATION = 152, SERVE_BAD_ARGUMENTS = 153 };

#define COMPATIBLE_NAME "firecracker"
#define COMPATIBLE_SOCKET "/run/firecracker.socket"
#define ID_BYTES_MAX 64
#define DEFAULT_ID "anonymous-instance"

struct serve {
    /* What the options say. */
    char *api_sock, *id, *config_file, *metadata, *log_path, *level, *module, *metrics_path, *engine, *seccomp_filter, *describe, *sandbox;
    char *body_max, *mmds_max, *start_us, *start_cpu_us, *parent_us, *seccomp_level;
    bool no_api, show_level, show_origin, boot_timer, pci, no_seccomp, version, snapshot_version, help;

    struct api *api;
    char directory[INSTANCE_PATH_BYTES]; /* in the directory of virtual machines; "": none */
    struct vm_control *control; /* NULL: not listed by doppel ps */
    struct http_server *server, *own_server; /* for tools; in the directory of virtual machines */
    enum machine_end end;
    struct machine_config sandbox_config; /* its parts about the sandbox */
    atomic_bool over, started; /* the signals' thread is to end; to shut itself in */
};

/* VALUE(name, argument, member, help), FLAG(name, member, help). */
#define SERVE_OPTIONS \
    VALUE("api-sock", "PATH", api_sock, "Unix socket of the API") \
    VALUE("id", "ID", id, "name of the instance: letters, digits and -, 64 at most (default anonymous-instance)") \
    VALUE("config-file", "FILE", config_file, "configure and start from a file: the JSON of GET /vm/config") \
    VALUE("metadata", "FILE", metadata, "JSON for the metadata service") \
    FLAG("no-api", no_api, "no socket; needs --config-file") \
    VALUE("log-path", "PATH", log_path, "file or named pipe for the log (default: stderr)") \
    VALUE("level", "Off|Error|Warning|Info|Debug|Trace", level, "what is logged (default Info)") \
    VALUE("module", "TEXT", module, "log only from source files with this in their path") \
    FLAG("show-level", show_level, "log lines with their level") \
    FLAG("show-log-origin", show_origin, "log lines with the source line they come from") \
    VALUE("metrics-path", "PATH", metrics_path, "file or named pipe for metrics, one JSON object a line") \
    FLAG("boot-timer", boot_timer, "log how long the guest took until its init said so") \
    FLAG("enable-pci", pci, "devices on PCI instead of memory-mapped virtio") \
    VALUE("engine", "auto|bt|kvm|interp", engine, "how guest code runs (default auto)") \
    VALUE("sandbox", "on|off", sandbox, "shut the program in before the guest runs: system calls, paths, user, network (default on)") \
    VALUE("http-api-max-payload-size", "BYTES", body_max, "largest body of a request (default 51200)") \
    VALUE("mmds-size-limit", "BYTES", mmds_max, "largest metadata (default: as the body)") \
    VALUE("start-time-us", "US", start_us, "when the process was started, by the monotonic clock; for metrics") \
    VALUE("start-time-cpu-us", "US", start_cpu_us, "processor time it had used by then") \
    VALUE("parent-cpu-time-us", "US", parent_us, "processor time of its parent, to be added") \
    FLAG("no-seccomp", no_seccomp, "accepted; docs/api.md says what confines the process") \
    VALUE("seccomp-filter", "FILE", seccomp_filter, "refused: filters are Doppel's own") \
    VALUE("seccomp-level", "0|1|2", seccomp_level, "accepted, as --no-seccomp") \
    FLAG("snapshot-version", snapshot_version, "print the version of snapshots") \
    VALUE("describe-snapshot", "FILE", describe, "refused: snapshots say themselves what they are") \
    FLAG("version", version, "print the version") \
    FLAG("help", help, "this text")

#define VALUE(name, argument, member, help) {name, 0, argument, help},
#define FLAG(name, member, help) {name, 0, NULL, help},
const struct cli_option serve_options[] = {SERVE_OPTIONS {0}};
#undef VALUE
#undef FLAG
#define VALUE(name, argument, member, help) offsetof(struct serve, member),
#define FLAG(name, member, help) offsetof(struct serve, member),
static const size_t option_offsets[] = {SERVE_OPTIONS}; /* of a char * with an argument, else of a bool */
#undef VALUE
#undef FLAG

static int complain(int status, const char *text)
{
    fprintf(stderr, "doppel: %s\n", text);
    return status;
}

static void print_help(void)
{
    printf("usage: doppel serve --api-sock PATH [OPTIONS]\n\nRuns one virtual machine behind an HTTP API on a Unix socket (docs/api.md).\n\noptions:\n");
    for (const struct cli_option *option = serve_options; option->name; option++)
        printf("  --%s%s%s\n        %s\n", option->name, option->argument ? " " : "", option->argument ? option->argument : "", option->help);
    printf("\nexit status:\n  0    the guest ended, or SIGTERM, SIGINT or SIGHUP came\n  1    trouble on the host\n  152  the configuration file is bad\n"
           "  153  an option is bad\n");
}

/* --name value, --name=value or, for flags, --name. */
static int parse(struct serve *serve, int argc, char **argv)
{
    char text[160];
    for (int i = 1; i < argc; i++) {
        const struct cli_option *option = serve_options;
        char *value = strchr(argv[i], '=');
        size_t length = value ? (size_t)(value - argv[i]) : strlen(argv[i]);
        while (option->name && !(length == strlen(option->name) + 2 && strncmp(argv[i], "--", 2) == 0 && strncmp(argv[i] + 2, option->name, length - 2) == 0))
            option++;
        if (!option->name) {
            snprintf(text, sizeof text, "unknown argument \"%.100s\"; see --help", argv[i]);
            return complain(SERVE_BAD_ARGUMENTS, text);
        }
        value = value ? value + 1 : option->argument && i + 1 < argc ? argv[++i] : NULL;
        if (!option->argument != !value) {
            snprintf(text, sizeof text, "--%s %s", option->name, option->argument ? "needs a value" : "takes no value");
            return complain(SERVE_BAD_ARGUMENTS, text);
        }
        char *member = (char *)serve + option_offsets[option - serve_options];
        if (value)
            memcpy(member, &value, sizeof value);
        else
            *(bool *)member = true;
    }
    return 0;
}

static int number(const char *text, const char *name, uint64_t *value)
{
    char *end, message[160];
    if (!text)
        return 0;
    errno = 0;
    *value = strtoull(text, &end, 10);
    if (*text >= '0' && *text <= '9' && !*end && !errno)
        return 0;
    snprintf(message, sizeof message, "--%s: \"%.40s\" is not a number", name, text);
    return complain(SERVE_BAD_ARGUMENTS, message);
}

static int check_options(const struct serve *serve)
{
    if (serve->no_api && !serve->config_file)
        return complain(SERVE_BAD_ARGUMENTS, "--no-api needs --config-file");
    if (!serve->no_api && !serve->api_sock)
        return complain(SERVE_BAD_ARGUMENTS, "give --api-sock PATH (or --no-api with --config-file)");
    if (serve->seccomp_filter)
        return complain(SERVE_BAD_ARGUMENTS, "--seccomp-filter: Doppel's filters are its own; leave the option out");
    if (serve->describe)
        return complain(SERVE_BAD_ARGUMENTS, "--describe-snapshot: snapshots of other programs cannot be read");
    bool omits = serve->sandbox && strncmp(serve->sandbox, "omit=", 5) == 0; /* for tests */
    if (serve->sandbox && !omits && strcmp(serve->sandbox, "on") != 0 && strcmp(serve->sandbox, "off") != 0)
        return complain(SERVE_BAD_ARGUMENTS, "--sandbox: on or off");
    size_t length = strlen(serve->id);
    if (length < 1 || length > ID_BYTES_MAX || strspn(serve->id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != length)
        return complain(SERVE_BAD_ARGUMENTS, "--id: letters, digits and - only, 1 to 64 of them");
    return 0;
}

/* ---- signals ---- */

static sigset_t signals_taken(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGUSR2); /* look at `over` */
    return set;
}

static void *signal_main(void *arg)
{
    struct serve *serve = arg;
    sigset_t set = signals_taken();
    for (;;) {
        int taken = sigwaitinfo(&set, NULL);
        if (atomic_load(&serve->over))
            return NULL;
        if (taken == SIGUSR2 && atomic_load(&serve->started))
            machine_shut_in_or_stop(api_machine(serve->api), IN_MAIN);
        if (taken == SIGTERM || taken == SIGINT || taken == SIGHUP)
            api_stop(serve->api);
    }
}

/* ---- life ---- */

static void shut_in_server(void *machine)
{
    machine_shut_in_or_stop(machine, IN_API);
}

/* Once there is a machine; the main thread and the signals' see to themselves. */
static void shut_in_all(void *ctx, struct machine *machine)
{
    struct serve *serve = ctx;
    struct http_server *servers[] = {serve->server, serve->own_server};
    for (unsigned i = 0; i < 2; i++)
        if (servers[i] && http_server_post(servers[i], shut_in_server, machine))
            machine_stop(machine, MACHINE_ERROR);
}

static int configure_log(struct serve *serve, struct error *err)
{
    json_t *body = json_pack("{s:s*, s:s*, s:s*, s:b, s:b}", "log_path", serve->log_path, "level", serve->level, "module", serve->module, "show_level",
                             serve->show_level, "show_log_origin", serve->show_origin);
    int r = body ? api_configure(serve->api, "logger", body, err) : -ENOMEM;
    json_decref(body);
    if (r == 0 && serve->metrics_path) {
        body = json_pack("{s:s}", "metrics_path", serve->metrics_path);
        r = api_configure(serve->api, "metrics", body, err);
        json_decref(body);
    }
    return r;
}

static int open_server(struct serve *serve, size_t body_bytes_max, struct error *err)
{
    struct http_options http = {.path = serve->api_sock, .body_bytes_max = body_bytes_max, .answered = api_answered, .answered_ctx = serve->api};
    int r = http_server_create(&serve->server, &http, err);
    if (r == 0) {
        machine_broker_socket(serve->sandbox_config.broker, http_server_socket(serve->server));
        r = http_server_add_routes(serve->server, api_routes, serve->api);
    }
    return r || !serve->control ? r : vm_control_add_routes(serve->control, serve->server);
}

/* A place in the directory of virtual machines, under the id. Without it the API works all the same. */
static void open_control(struct serve *serve)
{
    struct error err = {0};
    struct instance *instance;
    int listen_fd = -1;
    bool named = strcmp(serve->id, DEFAULT_ID) != 0 && instance_name_valid(serve->id);
    json_t *vm = json_pack("{s:b, s:b, s:s, s:s?}", "detached", 0, "passing", 1, "version", doppel_version(), "api_sock", serve->api_sock);
    int r = vm ? instance_create(&instance, named ? serve->id : NULL, vm, &err) : error_set(&err, -EINVAL, "--api-sock is not UTF-8");
    json_decref(vm);
    if (r == 0) {
        r = listen_fd = instance_listen(instance, "api.sock", &err);
        if (listen_fd >= 0)
            machine_broker_socket(serve->sandbox_config.broker, listen_fd);
        snprintf(serve->directory, sizeof serve->directory, "%s", instance_path(instance));
        if (r >= 0)
            r = vm_control_create(&serve->control, &(struct vm_control_options){.instance = instance}, &err);
        if (r)
            instance_close(instance, false);
    }
    if (r == 0)
        r = http_server_create(&serve->own_server, &(struct http_options){.listen_fd = listen_fd}, &err);
    if (r == 0)
        r = vm_control_add_routes(serve->control, serve->own_server);
    if (r == 0)
        vm_control_load_libraries();
    if (r == 0)
        r = http_server_start(serve->own_server, &err);
    if (r)
        log_warning("doppel's commands do not reach this virtual machine: %s", err.text);
}

/* Everything up to waiting; an exit status when something is wrong. */
static int start(struct serve *serve, struct error *err)
{
    uint64_t body_max = HTTP_BODY_BYTES_DEFAULT, mmds_max = 0;
    struct api_options api = {.id = serve->id, .app_name = "Doppel", .engine = serve->engine, .pci = serve->pci, .boot_timer = serve->boot_timer,
                              .sandbox = !serve->sandbox || strcmp(serve->sandbox, "off") != 0, .sandbox_omit = serve->sandbox && strncmp(serve->sandbox, "omit=", 5) == 0 ? serve->sandbox + 5 : NULL};
    if (number(serve->body_max, "http-api-max-payload-size", &body_max) || number(serve->mmds_max, "mmds-size-limit", &mmds_max) ||
        number(serve->start_us, "start-time-us", &api.start_time_us) || number(serve->start_cpu_us, "start-time-cpu-us", &api.start_time_cpu_us) ||
        number(serve->parent_us, "parent-cpu-time-us", &api.parent_cpu_time_us))
        return SERVE_BAD_ARGUMENTS;
    api.mmds_bytes_max = mmds_max ? mmds_max : body_max;
    log_never_wait();
    if (api.sandbox)
        doppel_sandbox_begin(); /* while there is one thread */
    serve->sandbox_config.sandbox = api.sandbox;
    serve->sandbox_config.sandbox_omit = api.sandbox_omit ? serve->sandbox + 5 : NULL; /* not its own */
    api.broker = machine_start_broker(&serve->sandbox_config);
    if (chunk_prepare_encryption(err))
        return SERVE_ERROR;
    open_control(serve);
    api.control = serve->control;
    api.api_socket = serve->no_api ? NULL : serve->api_sock;
    api.started = shut_in_all;
    api.started_ctx = serve;
    api.own_directory = serve->control ? serve->directory : NULL;
    if (api_create(&serve->api, &api, err))
        return SERVE_ERROR;
    if (configure_log(serve, err))
        return SERVE_BAD_ARGUMENTS;
    if (!serve->no_api && open_server(serve, body_max, err))
        return SERVE_ERROR;
    if (serve->metadata && api_load_metadata(serve->api, serve->metadata, err))
        return SERVE_BAD_CONFIGURATION;
    if (serve->config_file && (api_load_file(serve->api, serve->config_file, err) || api_start(serve->api, err)))
        return SERVE_BAD_CONFIGURATION;
    if (serve->server && http_server_start(serve->server, err))
        return SERVE_ERROR;
    return 0;
}

static int wait_for_end(struct serve *serve)
{
    pthread_t signals;
    if (pthread_create(&signals, NULL, signal_main, serve))
        return complain(SERVE_ERROR, "cannot start a thread: too little memory, or too many of them (ulimit -u)");
    struct machine *machine = api_wait_started(serve->api);
    if (machine) {
        atomic_store(&serve->started, true);
        pthread_kill(signals, SIGUSR2);
        machine_shut_in_or_stop(machine, IN_MAIN);
    }
    enum machine_end end = serve->end = machine ? machine_wait(machine) : MACHINE_STOPPED;
    atomic_store(&serve->over, true);
    pthread_kill(signals, SIGUSR2);
    pthread_join(signals, NULL);
    return end == MACHINE_SHUTDOWN || end == MACHINE_RESET || end == MACHINE_STOPPED ? SERVE_OK : SERVE_ERROR;
}

int serve_main(int argc, char **argv)
{
    const char *name = strrchr(argv[0], '/');
    bool compatible = strcmp(name ? name + 1 : argv[0], COMPATIBLE_NAME) == 0;
    struct serve serve = {.id = (char[]){DEFAULT_ID}};
    struct error err = {0};
    int status = parse(&serve, argc, argv);
    if (status)
        return status;
    if (serve.help) {
        print_help();
        return 0;
    }
    if (serve.version || serve.snapshot_version) {
        if (serve.snapshot_version)
            printf("v%s\n", doppel_version());
        else
            printf("Firecracker v%s\ndoppel %s\n", API_VERSION, doppel_version());
        return 0;
    }
    if (compatible && !serve.api_sock)
        serve.api_sock = (char[]){COMPATIBLE_SOCKET};
    status = check_options(&serve);
    if (status)
        return status;
    sigset_t set = signals_taken();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* writing past ulimit -f is an I/O error for the guest */
    status = start(&serve, &err);
    if (status == 0)
        status = wait_for_end(&serve);
    else if (err.text[0])
        complain(status, err.text);
    vm_control_detach(serve.control, true);
    http_server_destroy(serve.server);
    http_server_destroy(serve.own_server);
    api_destroy(serve.api);
    vm_control_destroy(serve.control, serve.end ? serve.end : MACHINE_STOPPED, status, false);
    return status;
}
