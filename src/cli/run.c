/*
 * doppel run: options, signals, exit status. Signals are blocked in every thread and taken by one that waits for them, so that nothing happens in
 * signal context. Every machine has a place in the directory of virtual machines (control/instance.h) unless that cannot be made.
 */
#include "cli/run.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "control/snapshot_disks.h"
#include "control/snapshot_store.h"
#include "doppel/doppel.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

/* What a machine is made of is large arrays of which it uses little: as mappings of their own they take no memory where nobody writes. Buffers of a running one come and go. */
#define MAKING_MMAP_BYTES (16 << 10)
#define RUNNING_MMAP_BYTES (1 << 20)

SANDBOX_ALLOW(IN_MAIN, rt_sigtimedwait);
SANDBOX_ALLOW(IN_MAIN, unlink);
/* The terminal as it was, before the program dies of a signal in whatever thread (guard_terminal). */
SANDBOX_ALLOW_IF(IN_PROGRAM, ioctl, ARG_IS(1, TCSETS));
SANDBOX_ALLOW(IN_PROGRAM, rt_sigaction);
SANDBOX_ALLOW(IN_PROGRAM & ~IN_VCPU, rt_sigreturn); /* it dies when the handler is left; vCPUs have handlers of their own */

/* Options of the machine come as --key value, --key=value or, for flags, --key. How many arguments were used, 0 after a message. */
static int take_machine_option(struct run *run, char **argv)
{
    struct error err = {0};
    char key[64];
    const char *value = strchr(argv[0], '=');
    if (strncmp(argv[0], "--", 2) != 0 || !argv[0][2])
        return complain(0, "unexpected argument \"%s\"; options start with --, see doppel run --help", argv[0]);
    size_t length = value ? (size_t)(value - argv[0] - 2) : strlen(argv[0] + 2);
    snprintf(key, sizeof key, "%.*s", (int)length, argv[0] + 2);
    const struct option_info *option = length < sizeof key ? option_find(key) : NULL;
    if (!option)
        return complain(0, "unknown option \"--%.*s\"; see doppel run --help", (int)length, argv[0] + 2);
    int used = 1;
    if (value) {
        value++;
    } else if (!(option->flags & OPT_FLAG) && argv[1]) {
        value = argv[1];
        used = 2;
    }
    return machine_config_set(&run->config, key, value, &err) ? complain(0, "%s", err.text) : used;
}

/* no, on-failure, on-failure:5, always. */
static int set_restart(struct run *run, const char *text)
{
    static const char failure[] = "on-failure";
    if (!text || strcmp(text, "no") == 0)
        return 0;
    run->restart = strcmp(text, "always") == 0 ? RESTART_ALWAYS : RESTART_ON_FAILURE;
    if (run->restart == RESTART_ALWAYS || strcmp(text, failure) == 0)
        return 0;
    if (strncmp(text, failure, sizeof failure - 1) == 0 && text[sizeof failure - 1] == ':')
        return parse_number("run", "--restart", text + sizeof failure, 1000000, &run->restarts_max);
    return complain(STATUS_USAGE, "--restart: \"%s\" is not one of no, on-failure, on-failure:N, always", text);
}

static int check_options(struct run *run, const struct arguments *own)
{
    run->name = own->value[RUN_NAME];
    run->detach = own->value[RUN_DETACH];
    run->remove = own->value[RUN_REMOVE];
    if (!run->detach && (own->value[RUN_RESTART] || run->remove || own->value[RUN_JSON]))
        return complain(STATUS_USAGE, "--restart, --rm and --json need --detach");
    if (run->name && !instance_name_valid(run->name))
        return complain(STATUS_USAGE, "--name: \"%s\" is no name for a virtual machine: use up to %d letters, digits, \"-\", \"_\" and \".\", beginning with a letter or digit",
                        run->name, INSTANCE_NAME_BYTES - 1);
    return set_restart(run, own->value[RUN_RESTART]);
}

/* `stored` gets what starts the same machine again: all but --detach, --name and --json. An exit status. */
static int parse_options(struct run *run, int argc, char **argv, json_t *stored)
{
    const struct subcommand *command = command_find("run");
    struct arguments own = {0};
    for (int i = 1; i < argc;) {
        bool is_own = knows_option(command, argv[i]);
        const char *name = own.value[RUN_NAME], *detach = own.value[RUN_DETACH], *json = own.value[RUN_JSON];
        int used = is_own ? take_option(command, argv + i, &own) : take_machine_option(run, argv + i);
        if (!used)
            return STATUS_USAGE;
        bool of_this_start = is_own && (own.value[RUN_NAME] != name || own.value[RUN_DETACH] != detach || own.value[RUN_JSON] != json);
        for (int n = 0; n < used && !of_this_start; n++)
            json_array_append_new(stored, json_string(argv[i + n]));
        i += used;
    }
    return check_options(run, &own);
}

/* Through log_text, because the terminal may be raw. */
static void print_dump(struct run *run)
{
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return;
    machine_dump(run->machine, out);
    fclose(out);
    log_text(text);
    free(text);
}

static void take_signal(struct run *run, int signal_number, bool *asked)
{
    switch (signal_number) {
    case SIGUSR1:
        print_dump(run);
        break;
    case SIGHUP:
        machine_stop(run->machine, MACHINE_STOPPED);
        break;
    default:
        if (*asked)
            machine_stop(run->machine, MACHINE_STOPPED);
        else
            machine_power_button(run->machine);
        *asked = true;
    }
}

/* Those that the signal thread takes, and that are blocked in all threads. */
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

/* A thread of this program gives up what it does not need; when it cannot, the guest does not run. */
static void shut_in(struct run *run)
{
    machine_shut_in_or_stop(run->machine, IN_MAIN);
}

static void shut_in_server(void *ctx)
{
    machine_shut_in_or_stop(ctx, IN_API);
}

static void *signal_main(void *arg)
{
    struct run *run = arg;
    bool asked = false;
    sigset_t set = signals_taken();
    shut_in(run);
    for (;;) {
        int number = sigwaitinfo(&set, NULL);
        if (atomic_load(&run->over))
            return NULL;
        if (number > 0 && number != SIGUSR2)
            take_signal(run, number, &asked);
    }
}

static void end_signals(struct run *run, pthread_t signals)
{
    atomic_store(&run->over, true);
    pthread_kill(signals, SIGUSR2);
    pthread_join(signals, NULL);
}

/* What a signal handler can know is static: the terminal as it was. */
static char terminal_before[128]; /* the kernel's struct termios (36 bytes), not the C library's, whose tcsetattr() looks by a second call what came of the first */

/* Dies of the signal after all, with a terminal that can be used. */
static void restore_terminal(int number)
{
    ioctl(STDIN_FILENO, TCSETS, terminal_before);
    signal(number, SIG_DFL);
    raise(number);
}

/* The console restores the terminal in every orderly end; this is for the others. */
static void guard_terminal(void)
{
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS, SIGQUIT};
    struct sigaction action = {.sa_handler = restore_terminal};
    if (ioctl(STDIN_FILENO, TCGETS, terminal_before))
        return;
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
        sigaction(fatal[i], &action, NULL);
}

void block_signals(void)
{
    sigset_t set = signals_taken();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* writing past ulimit -f is an I/O error for the guest */
}

static int write_pid_file(const char *path)
{
    FILE *file = path ? fopen(path, "we") : NULL;
    if (!path)
        return 0;
    bool written = file && fprintf(file, "%d\n", (int)getpid()) > 0;
    if (file && fclose(file) != 0)
        written = false;
    if (!written)
        complain(0, "--pid-file: cannot write %s: %s", path, strerror(errno));
    return written ? 0 : -EIO;
}

static int status_of(enum machine_end end)
{
    switch (end) {
    case MACHINE_SHUTDOWN:
        return STATUS_SHUTDOWN;
    case MACHINE_RESET:
        return STATUS_RESET;
    case MACHINE_CRASH:
        return STATUS_CRASH;
    case MACHINE_STOPPED:
        return STATUS_STOPPED;
    case MACHINE_MIGRATED:
        return STATUS_MIGRATED;
    default:
        return STATUS_ERROR;
    }
}

/* ---- one machine ---- */

/* So that doppel exec reaches machines that are there to be found. Nothing is said when it cannot be: the path is too long, then. */
static void add_vsock(struct run *run)
{
    struct error err = {0};
    char *option = NULL;
    if (run->config.vsock.present || (!run->detach && !run->name) || strchr(instance_path(run->instance), ','))
        return;
    if (asprintf(&option, "path=%s/vsock.sock", instance_path(run->instance)) >= 0 && machine_config_set(&run->config, "vsock", option, &err))
        log_info("doppel exec will not reach this machine: %s", err.text);
    free(option);
}

/* What looks after the machine: without it the machine runs all the same, only nobody sees it from outside. */
static void open_control(struct run *run)
{
    struct error err = {0};
    int listen_fd = -1, r = 0;
    if (!run->instance)
        return;
    add_vsock(run);
    listen_fd = instance_listen(run->instance, "api.sock", &err);
    if (listen_fd < 0)
        r = listen_fd;
    else
        machine_broker_socket(run->config.broker, listen_fd);
    struct vm_control_options options = {.instance = run->instance, .supervisor = run->supervisor, .restarts = run->restarts,
                                         .snapshots = run->snapshots[0] ? run->snapshots : NULL};
    if (r == 0)
        r = vm_control_create(&run->control, &options, &err);
    if (r) {
        complain(0, "this virtual machine cannot be reached by doppel's commands: %s", err.text);
        instance_close(run->instance, false);
        if (listen_fd >= 0)
            close(listen_fd);
    } else if (http_server_create(&run->server, &(struct http_options){.listen_fd = listen_fd}, &err) || vm_control_add_routes(run->control, run->server)) {
        complain(0, "this virtual machine cannot be reached by doppel's commands: %s", err.text);
    }
    run->instance = NULL; /* taken over, or closed */
}

static int start_machine(struct run *run, struct error *err)
{
    vm_control_attach(run->control, run->machine, &run->config);
    if (!run->incoming)
        return machine_start(run->machine, err);
    int r = machine_pause(run->machine, err);
    if (r == 0)
        r = machine_start(run->machine, err);
    if (r)
        machine_incoming_refuse(run->incoming, err->text);
    else
        r = machine_receive_go(run->machine, run->incoming, err);
    machine_incoming_close(run->incoming);
    run->incoming = NULL;
    return r;
}

/* While the guest runs already, because it takes some time. Clients that come before wait at the socket. */
static void start_server(struct run *run)
{
    struct error err = {0};
    if (!run->server)
        return;
    if (http_server_post(run->server, shut_in_server, run->machine))
        error_set(&err, -ENOMEM, "out of memory");
    vm_control_load_libraries();
    if (err.code || http_server_start(run->server, &err) || chunk_prepare_encryption(&err)) {
        complain(0, "this virtual machine cannot be reached by doppel's commands: %s", err.text);
        http_server_destroy(run->server);
        run->server = NULL;
    }
}

/* Waits for the machine's end with a thread that takes signals. */
static int wait_for_end(struct run *run, enum machine_end *end)
{
    pthread_t signals;
    if (pthread_create(&signals, NULL, signal_main, run))
        return complain(STATUS_ERROR, "cannot start a thread: too little memory, or too many of them (ulimit -u)");
    vm_control_sync(run->control);
    tell_ready(run);
    mallopt(M_MMAP_THRESHOLD, RUNNING_MMAP_BYTES);
    start_server(run);
    shut_in(run);
    malloc_trim(0); /* what making it took */
    *end = machine_wait(run->machine);
    end_signals(run, signals);
    return status_of(*end);
}

static int make_machine(struct run *run, struct error *err)
{
    if (run->incoming)
        return machine_receive(&run->machine, &run->config, run->incoming, err);
    if (run->from)
        return machine_snapshot_load(&run->machine, &run->config, run->from, err);
    return machine_create(&run->machine, &run->config, err);
}

int run_vm(struct run *run)
{
    struct error err = {0};
    enum machine_end end = MACHINE_ERROR;
    const char *pid_file = run->config.pid_file;
    bool ran = false;
    int status = STATUS_USAGE;
    if (run->config.sandbox_omit && strcmp(run->config.sandbox_omit, "list") == 0)
        return machine_print_sandbox_rules(), STATUS_SHUTDOWN;
    log_never_wait();
    mallopt(M_MMAP_THRESHOLD, MAKING_MMAP_BYTES);
    if (run->config.sandbox)
        doppel_sandbox_begin();
    machine_start_broker(&run->config);
    machine_load_ahead(&run->config);
    char directory[INSTANCE_PATH_BYTES];
    if (run->instance) {
        snprintf(directory, sizeof directory, "%s", instance_path(run->instance));
        run->config.own_directory = directory;
        snapshot_store_tidy();
        if (snapshot_store_directory(instance_name(run->instance), run->snapshots, NULL))
            run->snapshots[0] = '\0'; /* there will be none of it */
        run->config.snapshots_directory = run->snapshots[0] ? run->snapshots : NULL;
    }
    open_control(run);
    /* One that comes names the files that it has there; what a machine of this name had here before is not its. */
    int code = run->snapshots[0] && !run->incoming ? snapshot_disks_apply(run->snapshots, &run->config, &err) : 0;
    if (code || make_machine(run, &err)) {
        complain(0, "%s", err.text);
        pid_file = NULL;
    } else if (write_pid_file(pid_file)) {
        pid_file = NULL; /* it is not ours to remove */
    } else if (start_machine(run, &err)) {
        status = complain(STATUS_ERROR, "%s", err.text);
    } else {
        ran = true;
        status = wait_for_end(run, &end);
        if (run->config.stats)
            machine_stats(run->machine, stderr);
    }
    vm_control_detach(run->control, true);
    http_server_destroy(run->server);
    machine_destroy(run->machine);
    if (run->snapshots[0])
        unlinkat(AT_FDCWD, run->snapshots, AT_REMOVEDIR); /* if nothing is in it */
    vm_control_destroy(run->control, end, status, run->supervisor.pid || (run->keep && (ran || run->name)));
    if (pid_file)
        unlink(pid_file);
    return status;
}

/* ---- the command ---- */

/* Its place in the directory of virtual machines. A name that is taken is the user's to change; what else is wrong keeps no machine from running. */
static int register_vm(struct run *run, json_t *arguments)
{
    static const char *const policies[] = {"no", "on-failure", "always"};
    struct error err = {0};
    char *directory = get_current_dir_name();
    json_t *vm = json_pack("{s:O, s:s?, s:b, s:b, s:s, s:s, s:o}", "arguments", arguments, "directory", directory, "detached", run->detach, "passing",
                           !run->name && (!run->detach || run->remove), "restart", policies[run->restart],
                           "version", doppel_version(), "config", vm_config_json(&run->config));
    free(directory);
    int r = vm ? instance_create(&run->instance, run->name, vm, &err) : error_set(&err, -EINVAL, "its arguments are not UTF-8");
    json_decref(vm);
    if (r == 0)
        return 0;
    if (r == -EEXIST || run->detach)
        return complain(STATUS_USAGE, "%s", err.text);
    complain(0, "this virtual machine is not listed by doppel ps: %s", err.text);
    return 0;
}

/* A console in the background has no terminal: its log and clients are behind a tap. */
static void detach_console(struct run *run)
{
    run->config.input_fd = run->config.output_fd = -1;
}

/* The socket that add_vsock made for the machine is the same machine's under another name. */
static int move_vsock(struct run *run)
{
    char path[INSTANCE_PATH_BYTES];
    static const char file[] = "vsock.sock";
    const char *old = run->config.vsock.path, *slash = old ? strrchr(old, '/') : NULL;
    size_t length = slash ? (size_t)(slash - old) : 0;
    if (!slash || strcmp(slash + 1, file) != 0 || instance_root(path, NULL) || strncmp(old, path, strlen(path)) != 0 || length <= strlen(path) ||
        snprintf(path, sizeof path, "%s/%s", instance_path(run->instance), file) >= (int)sizeof path)
        return 0;
    char *copy = strdup(path);
    if (!copy)
        return complain(STATUS_ERROR, "out of memory");
    free(run->config.vsock.path);
    run->config.vsock.path = copy;
    return 0;
}

int run_again(struct run *run, const json_t *arguments)
{
    json_t *stored = arguments ? json_deep_copy(arguments) : json_array();
    struct error err = {0};
    block_signals();
    int status = machine_config_check(&run->config, &err) ? complain(STATUS_USAGE, "%s", err.text) : 0;
    if (status == 0)
        status = register_vm(run, stored);
    json_decref(stored);
    if (status == 0)
        status = move_vsock(run);
    if (status == 0) {
        detach_console(run);
        status = run_in_background(run);
    }
    return status;
}

int run_main(int argc, char **argv)
{
    struct run run = {.ready_fd = -1, .log_fd = -1};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_run_help(stdout);
            return 0;
        }
    }
    machine_config_init(&run.config);
    run.config.sandbox = true;
    json_t *arguments = json_array();
    block_signals();
    int status = parse_options(&run, argc, argv, arguments);
    struct error err = {0};
    if (status == 0 && machine_config_check(&run.config, &err)) /* before a name is taken for nothing */
        status = complain(STATUS_USAGE, "%s", err.text);
    if (status == 0)
        status = register_vm(&run, arguments);
    json_decref(arguments);
    if (status == 0 && run.detach) {
        detach_console(&run);
        status = run_in_background(&run);
        if (status == 0)
            report_machine(run.called);
    } else if (status == 0) {
        guard_terminal();
        status = run_vm(&run);
    }
    machine_config_clear(&run.config);
    return status;
}
