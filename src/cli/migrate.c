/*
 * doppel migrate and doppel receive: the two ends of a live migration (docs/migration.md). Connections are made and taken here. The machine that goes gets its connection through a socket in its
 * directory (control/doppel_v1_migrate.c); the machine that comes is made by this process's child, which then is its process as with doppel run --detach.
 * Threading: requests to a machine that take long have a thread of their own, so that progress can be shown meanwhile.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/progress.h"
#include "cli/report.h"
#include "cli/run.h"
#include "cli/wire.h"
#include "control/client.h"

#define ANSWER_MS 10000
#define MIGRATE_MS (24 * 3600 * 1000)
#define DOWNTIME_MS_MAX 60000ul
#define ZSTD_LEVEL_MAX 19ul
#define BANDWIDTH_MAX (1ul << 40)

/* ---- connections ---- */

static struct wire_security security_of(const struct arguments *arguments)
{
    return (struct wire_security){.insecure = arguments->value[WIRE_INSECURE] != NULL,
                                  .key_file = arguments->value[WIRE_KEY_FILE],
                                  .cert_file = arguments->value[WIRE_CERT],
                                  .cert_key_file = arguments->value[WIRE_CERT_KEY],
                                  .ca_file = arguments->value[WIRE_CA]};
}

/* The first who connects and is recognised; nobody else is listened to then. */
static int wait_for_one(const struct arguments *arguments, struct wire *wire)
{
    const struct wire_security security = security_of(arguments);
    const char *address = arguments->value[RECEIVE_LISTEN] ? arguments->value[RECEIVE_LISTEN] : WIRE_LISTEN;
    char shown[WIRE_ADDRESS_BYTES];
    struct error err = {0};
    if (wire_check(address, &security, &err))
        return complain(STATUS_USAGE, "receive: %s", err.text);
    int listener = wire_listen(address, shown, &err), r;
    if (listener < 0)
        return complain(STATUS_ERROR, "receive: %s", err.text);
    complain(0, "waiting for a virtual machine at %s", shown);
    while ((r = wire_accept(wire, listener, address, &security, &err)) == -EPROTO)
        complain(0, "receive: %s", err.text); /* a stranger */
    close(listener);
    if (strncmp(address, "unix:", 5) == 0)
        unlink(address + 5);
    return r ? complain(STATUS_ERROR, "receive: %s", err.text) : 0;
}

/* ---- migrate ---- */

/* A byte with the descriptor. The connection stays open until the machine has taken it: with it, what is on its way would go. */
static int hand_over_connection(const char *vm, int fd, int *through)
{
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec part = {.iov_base = (char[]){0}, .iov_len = 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    *through = instance_connect(vm, "migrate.sock");
    if (*through < 0)
        return complain(STATUS_ERROR, "%s cannot be migrated: its socket does not answer: %s", vm, strerror(-*through));
    return sendmsg(*through, &message, MSG_NOSIGNAL) == 1 ? 0 : complain(STATUS_ERROR, "%s cannot be given the connection: %s", vm, strerror(errno));
}

static void show_progress(const void *ctx)
{
    const char *name = ctx;
    json_t *answer;
    if (client_request(name, "GET", "/doppel/v1/migration", NULL, ANSWER_MS, &answer, NULL))
        return;
    int throttle = (int)json_integer_value(json_object_get(answer, "throttle"));
    char slowed[48] = "";
    if (throttle)
        snprintf(slowed, sizeof slowed, ", the guest is held up for %d %%", throttle);
    long long disks = (long long)json_integer_value(json_object_get(answer, "disk_bytes_left")) >> 20;
    const char *where = json_is_true(json_object_get(answer, "following")) ? ", the guest runs there" : slowed;
    if (json_is_true(json_object_get(answer, "under_way")))
        fprintf(stderr, "\r%s: %lld MiB sent, %lld MiB left%s\033[K", name, (long long)json_integer_value(json_object_get(answer, "bytes")) >> 20,
                (long long)json_integer_value(json_object_get(answer, "pages_left")) / 256 + disks, where);
    json_decref(answer);
}

/* Takes the answer. */
static void report_result(const char *name, json_t *answer, const char *to)
{
    double downtime = (double)json_integer_value(json_object_get(answer, "downtime_ns")), duration = (double)json_integer_value(json_object_get(answer, "duration_ns"));
    long long sent = (long long)json_integer_value(json_object_get(answer, "bytes"));
    int rounds = (int)json_integer_value(json_object_get(answer, "rounds")) + 1;
    json_object_set_new(answer, "name", json_string(name));
    json_object_set_new(answer, "to", json_string(to));
    report(answer, "%s runs at %s: %.2f s, %lld MiB in %d rounds, still for %.1f ms", name, to, duration / 1e9, sent >> 20, rounds, downtime / 1e6);
}

/* 50, 50ms, 2s */
static int read_downtime(const char *text, unsigned long *ms)
{
    char *end;
    *ms = 50;
    if (!text)
        return 0;
    unsigned long value = strtoul(text, &end, 10);
    unsigned long unit = strcmp(end, "s") == 0 ? 1000 : 1;
    if (text[0] < '0' || text[0] > '9' || (*end && strcmp(end, "s") != 0 && strcmp(end, "ms") != 0) || value < 1 || value > DOWNTIME_MS_MAX / unit)
        return complain(STATUS_USAGE, "migrate: --downtime: \"%s\" is not a time as in 50ms or 2s, at most %lu s", text, DOWNTIME_MS_MAX / 1000);
    *ms = value * unit;
    return 0;
}

/* zstd, zstd=LEVEL, none */
static int read_level(const char *text, unsigned long *level)
{
    *level = 0;
    if (!text || strcmp(text, "none") == 0)
        return 0;
    *level = 1;
    if (strcmp(text, "zstd") == 0)
        return 0;
    if (strncmp(text, "zstd=", 5) != 0 || text[5] == '0')
        return complain(STATUS_USAGE, "migrate: --compress: \"%s\" is not none, zstd or zstd=LEVEL, LEVEL from 1 to %lu", text, ZSTD_LEVEL_MAX);
    return parse_number("migrate", "--compress", text + 5, ZSTD_LEVEL_MAX, level);
}

/* 100M */
static int read_bandwidth(const char *text, unsigned long *bytes)
{
    static const char units[] = "KMG";
    char *end;
    *bytes = 0;
    if (!text)
        return 0;
    *bytes = strtoul(text, &end, 10);
    const char *unit = *end ? strchr(units, *end) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    if (text[0] < '0' || text[0] > '9' || (*end && (!unit || end[1])) || *bytes < 1 || *bytes > BANDWIDTH_MAX >> shift)
        return complain(STATUS_USAGE, "migrate: --bandwidth: \"%s\" is not a number of bytes a second, as in 100M", text);
    *bytes <<= shift;
    return 0;
}

static int start_migration(const struct arguments *arguments, const struct instance_info *vm)
{
    unsigned long downtime_ms, level, bandwidth;
    const struct wire_security security = security_of(arguments);
    struct wire wire = {.fd = -1};
    struct error err = {0};
    json_t *body = NULL, *answer = NULL;
    int through = -1, r = read_downtime(arguments->value[MIGRATE_DOWNTIME], &downtime_ms);
    if (r == 0)
        r = read_level(arguments->value[MIGRATE_COMPRESS], &level);
    if (r == 0)
        r = read_bandwidth(arguments->value[MIGRATE_BANDWIDTH], &bandwidth);
    if (r == 0 && wire_check(arguments->names[1], &security, &err))
        r = complain(STATUS_USAGE, "migrate: %s", err.text);
    if (r == 0 && wire_connect(&wire, arguments->names[1], &security, &err))
        r = complain(STATUS_ERROR, "migrate: %s", err.text);
    if (r == 0)
        r = hand_over_connection(vm->name, wire.fd, &through);
    if (wire.fd >= 0)
        close(wire.fd); /* it is the machine's */
    wire.fd = -1;
    if (r == 0) {
        char instance[INSTANCE_PATH_BYTES] = "";
        (void)!instance_path_of(vm->name, "", instance, NULL);
        body = json_pack("{s:i, s:i, s:I, s:b, s:b, s:b, s:{s:s, s:s, s:O*, s:O*}}", "downtime_ms", (int)downtime_ms, "zstd_level", (int)level, "bandwidth_bytes", (json_int_t)bandwidth, "post_copy",
                         arguments->value[MIGRATE_POST_COPY] != NULL, "disks", arguments->value[MIGRATE_DISKS] != NULL, "recover", arguments->value[MIGRATE_RECOVER] != NULL, "about", "name",
                         vm->name, "instance", instance, "arguments", json_object_get(vm->vm, "arguments"), "directory", json_object_get(vm->vm, "directory"));
        if (request_with_progress(vm->name, "/doppel/v1/migration", body, MIGRATE_MS, show_progress, vm->name, &answer, &err))
            r = complain(STATUS_ERROR, "%s", err.text);
    }
    if (through >= 0)
        close(through);
    wire_close(&wire);
    if (r == 0)
        report_result(vm->name, answer, arguments->names[1]);
    json_decref(body);
    return r;
}

static int show_status(const struct instance_info *vm)
{
    struct error err = {0};
    json_t *answer;
    if (client_request(vm->name, "GET", "/doppel/v1/migration", NULL, ANSWER_MS, &answer, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    report_value(answer);
    return 0;
}

static int cancel_migration(const struct instance_info *vm)
{
    struct error err = {0};
    if (client_request(vm->name, "DELETE", "/doppel/v1/migration", NULL, ANSWER_MS, NULL, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (report_is_json()) /* people see it go on */
        report_machine(vm->name);
    return 0;
}

int migrate_main(int argc, char **argv)
{
    struct arguments arguments;
    struct instance_info vm;
    struct error err = {0};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    bool status = arguments.value[MIGRATE_STATUS], cancel = arguments.value[MIGRATE_CANCEL];
    if (arguments.name_count != (status || cancel ? 1 : 2) || (status && cancel))
        return complain(STATUS_USAGE, "migrate: usage: doppel migrate [OPTIONS] VM HOST[:PORT]|unix:PATH, or doppel migrate --status|--cancel VM");
    if (instance_find(arguments.names[0], &vm, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    if (vm.life != INSTANCE_ALIVE)
        r = complain(STATUS_ERROR, "%s is not running", vm.name);
    else if (status)
        r = show_status(&vm);
    else if (cancel)
        r = cancel_migration(&vm);
    else
        r = start_migration(&arguments, &vm);
    instance_info_clear(&vm);
    return r;
}

/* ---- receive ---- */

/* The machine is there already, and only its connection was lost. */
static int receive_again(const struct arguments *arguments, struct wire *wire)
{
    const char *name = arguments->value[RECEIVE_RECOVER];
    struct error err = {0};
    int through = -1, r = hand_over_connection(name, wire->fd, &through);
    close(wire->fd);
    wire->fd = -1;
    json_t *body = json_pack("{s:b}", "recover", 1);
    if (r == 0 && client_request(name, "POST", "/doppel/v1/migration", body, MIGRATE_MS, NULL, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (through >= 0)
        close(through);
    json_decref(body);
    if (r == 0)
        report_machine(name);
    return r;
}

/* What the source tells about its machine is foreign text. *stored: arguments that doppel start may use, or none. */
static void read_about(const struct run *run, json_t **about, json_t **stored)
{
    *about = json_loads(machine_incoming_about(run->incoming), JSON_REJECT_DUPLICATES, NULL);
    json_t *list = json_object_get(*about, "arguments"), *argument;
    size_t i;
    bool good = json_is_array(list);
    json_array_foreach(list, i, argument)
        good = good && json_is_string(argument) && strlen(json_string_value(argument)) == json_string_length(argument);
    *stored = good ? list : NULL;
}

/* A vsock socket in the directory that the machine had there is made in the one that it gets here. */
static void forget_own_vsock(struct vsock_config *vsock, const char *instance)
{
    size_t length = instance ? strlen(instance) : 0;
    if (!length || !vsock->present || !vsock->path || strncmp(vsock->path, instance, length) != 0)
        return;
    free(vsock->path);
    vsock->path = NULL;
    vsock->present = false;
}

/* "PATH,OPTION..." names `from`, as --disk has it: its options, behind the comma or at the end. NULL: it does not. */
static const char *options_behind(const char *text, const char *from)
{
    for (; *from; from++, text++) {
        if (*text != *from || (*from == ',' && *++text != ','))
            return NULL;
    }
    return *text == '\0' || (*text == ',' && text[1] != ',') ? text : NULL;
}

/* The same disk with another file, which is raw. NULL: no memory. */
static char *with_file(const char *options, const char *path)
{
    char *text = malloc(2 * strlen(path) + strlen(options) + 16), *to = text;
    if (!text)
        return NULL;
    for (; *path; path++) {
        if (*path == ',')
            *to++ = ',';
        *to++ = *path;
    }
    to = stpcpy(to, ",format=raw");
    while (*options) { /* each begins with its comma */
        size_t length = 1 + strcspn(options + 1, ",");
        if (strncmp(options, ",format=", 8) != 0)
            to = mempcpy(to, options, length);
        options += length;
    }
    *to = '\0';
    return text;
}

/* doppel start is to use the images that disks have got here. */
static void rename_disks(json_t *stored, char *const from[], const struct machine_config *config)
{
    json_t *argument;
    size_t i;
    json_array_foreach(stored, i, argument)
    {
        const char *text = json_string_value(argument);
        bool joined = strncmp(text, "--disk=", 7) == 0, after = i > 0 && strcmp(json_string_value(json_array_get(stored, i - 1)), "--disk") == 0;
        for (unsigned n = 0; (joined || after) && n < config->disk_count; n++) {
            const char *options = config->disk[n].fresh && from[n] ? options_behind(text + (joined ? 7 : 0), from[n]) : NULL;
            char *other = options ? with_file(options, config->disk[n].path) : NULL;
            if (!other)
                continue;
            json_array_set_new(stored, i, joined ? json_sprintf("--disk=%s", other) : json_string(other));
            free(other);
            break;
        }
    }
}

static int make_disks(struct run *run, const struct arguments *arguments, json_t *stored)
{
    const char *directory = arguments->value[RECEIVE_DISK_DIR];
    char *from[CONFIG_DISKS_MAX] = {0};
    struct error err = {0};
    int r = 0;
    if (!machine_incoming_disks(run->incoming))
        return 0;
    if (!directory)
        r = error_set(&err, -EINVAL, "disks come with it: --disk-dir says where they get their images");
    for (unsigned i = 0; i < run->config.disk_count; i++)
        from[i] = strdup(run->config.disk[i].path);
    if (r == 0)
        r = machine_incoming_make_disks(run->incoming, directory, &run->config, &err);
    if (r == 0 && stored)
        rename_disks(stored, from, &run->config);
    for (unsigned i = 0; i < CONFIG_DISKS_MAX; i++)
        free(from[i]);
    if (r == 0)
        return 0;
    machine_incoming_refuse(run->incoming, err.text);
    return complain(STATUS_ERROR, "receive: %s", err.text);
}

static int start_incoming(struct run *run, const struct arguments *arguments)
{
    json_t *about, *stored;
    read_about(run, &about, &stored);
    const char *name = json_string_value(json_object_get(about, "name")), *directory = json_string_value(json_object_get(about, "directory"));
    run->name = arguments->value[RECEIVE_NAME] ? arguments->value[RECEIVE_NAME] : name && instance_name_valid(name) ? name : NULL;
    forget_own_vsock(&run->config.vsock, json_string_value(json_object_get(about, "instance")));
    int r = make_disks(run, arguments, stored);
    if (directory && chdir(directory)) /* its files may all have whole paths */
        complain(0, "it was started in %s, where one cannot go here", directory);
    if (r == 0 && (r = run_again(run, stored)))
        machine_incoming_refuse(run->incoming, "the machine cannot be made there; doppel receive says why");
    json_decref(about);
    if (r)
        return r;
    machine_incoming_keep_disks(run->incoming);
    report_machine(run->called);
    return 0;
}

int receive_main(int argc, char **argv)
{
    struct arguments arguments;
    struct run run = {.ready_fd = -1, .log_fd = -1, .detach = true};
    struct error err = {0};
    struct wire wire = {.fd = -1};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (arguments.value[RECEIVE_NAME] && !instance_name_valid(arguments.value[RECEIVE_NAME]))
        return complain(STATUS_USAGE, "receive: \"%s\" is no name for a virtual machine", arguments.value[RECEIVE_NAME]);
    signal(SIGPIPE, SIG_IGN); /* the source may close the connection at any moment */
    signal(SIGXFSZ, SIG_IGN); /* and a disk may be too large */
    if (arguments.value[RECEIVE_RECOVER] && (arguments.value[RECEIVE_NAME] || arguments.value[RECEIVE_ENGINE]))
        return complain(STATUS_USAGE, "receive: --recover is for a machine that is there: it has its name and engine");
    r = wait_for_one(&arguments, &wire);
    if (r)
        return r;
    if (arguments.value[RECEIVE_RECOVER]) {
        r = receive_again(&arguments, &wire);
        wire_close(&wire);
        return r;
    }
    machine_config_init(&run.config);
    if (machine_incoming_open(&run.incoming, wire.fd, &run.config, &err)) {
        r = complain(STATUS_ERROR, "receive: %s", err.text);
    } else {
        run.config.sandbox = true;
        if (arguments.value[RECEIVE_ENGINE] && machine_config_set(&run.config, "engine", arguments.value[RECEIVE_ENGINE], &err))
            r = complain(STATUS_USAGE, "%s", err.text);
        else
            r = start_incoming(&run, &arguments);
    }
    machine_incoming_close(run.incoming);
    wire.fd = -1; /* closed with it */
    machine_config_clear(&run.config);
    wire_close(&wire);
    return r;
}
