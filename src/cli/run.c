/*
 * doppel run: options, signals, exit status. Signals are blocked in every thread and taken by one that waits for them, so that nothing happens in
 * signal context.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

#include "cli/cli.h"
#include "doppel/doppel.h"
#include "machine/config.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_MAIN, rt_sigtimedwait);
SANDBOX_ALLOW(IN_MAIN, unlink);

struct run {
    struct doppel_config *config;
    struct doppel_vm *vm;
    atomic_bool over; /* the signals' thread is to end */
};

static void complain(const char *text)
{
    fprintf(stderr, "doppel: %s\n", text);
}

/* Options come as --key value, --key=value or, for flags, --key. */
static int parse_options(struct run *run, int argc, char **argv)
{
    char error[DOPPEL_ERROR_BYTES];
    for (int i = 1; i < argc; i++) {
        char key[64];
        const char *value = strchr(argv[i], '=');
        if (strncmp(argv[i], "--", 2) != 0 || !argv[i][2]) {
            fprintf(stderr, "doppel: unexpected argument \"%s\"; options start with --, see doppel run --help\n", argv[i]);
            return -EINVAL;
        }
        size_t length = value ? (size_t)(value - argv[i] - 2) : strlen(argv[i] + 2);
        snprintf(key, sizeof key, "%.*s", (int)length, argv[i] + 2);
        const struct option_info *option = length < sizeof key ? option_find(key) : NULL;
        if (!option) {
            fprintf(stderr, "doppel: unknown option \"--%.*s\"; see doppel run --help\n", (int)length, argv[i] + 2);
            return -EINVAL;
        }
        if (value)
            value++;
        else if (!(option->flags & OPT_FLAG) && i + 1 < argc)
            value = argv[++i];
        if (doppel_config_set(run->config, key, value, error)) {
            complain(error);
            return -EINVAL;
        }
    }
    return 0;
}

/* Through log_text, because the terminal may be raw. */
static void print_dump(struct run *run)
{
    char *text = NULL;
    size_t size = 0;
    FILE *out = open_memstream(&text, &size);
    if (!out)
        return;
    doppel_vm_dump(run->vm, out);
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
        doppel_vm_stop(run->vm);
        break;
    default:
        if (*asked)
            doppel_vm_stop(run->vm);
        else
            doppel_vm_power_button(run->vm);
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
    char error[DOPPEL_ERROR_BYTES];
    if (doppel_vm_shut_in(run->vm, error)) {
        complain(error);
        doppel_vm_stop(run->vm);
    }
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
static struct termios terminal_before;

/* Dies of the signal after all, with a terminal that can be used. */
static void restore_terminal(int number)
{
    tcsetattr(STDIN_FILENO, TCSANOW, &terminal_before);
    signal(number, SIG_DFL);
    raise(number);
}

/* The console restores the terminal in every orderly end; this is for the others. */
static void guard_terminal(void)
{
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGSYS, SIGQUIT};
    struct sigaction action = {.sa_handler = restore_terminal};
    if (tcgetattr(STDIN_FILENO, &terminal_before))
        return;
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++)
        sigaction(fatal[i], &action, NULL);
}

static void block_signals(void)
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
        fprintf(stderr, "doppel: --pid-file: cannot write %s: %s\n", path, strerror(errno));
    return written ? 0 : -EIO;
}

static int status_of(enum doppel_end end)
{
    switch (end) {
    case DOPPEL_END_SHUTDOWN:
        return STATUS_SHUTDOWN;
    case DOPPEL_END_RESET:
        return STATUS_RESET;
    case DOPPEL_END_CRASH:
        return STATUS_CRASH;
    case DOPPEL_END_STOPPED:
        return STATUS_STOPPED;
    default:
        return STATUS_ERROR;
    }
}

static int run_vm(struct run *run)
{
    char error[DOPPEL_ERROR_BYTES];
    pthread_t signals;
    const char *pid_file = doppel_config_get(run->config, "pid-file");
    if (doppel_vm_create(run->config, &run->vm, error)) {
        complain(error);
        return STATUS_USAGE;
    }
    int status = STATUS_ERROR;
    if (write_pid_file(pid_file)) {
        status = STATUS_USAGE;
        pid_file = NULL; /* it is not ours to remove */
    } else if (doppel_vm_start(run->vm, error)) {
        complain(error);
    } else if (pthread_create(&signals, NULL, signal_main, run)) {
        complain("cannot start a thread: too little memory, or too many of them (ulimit -u)");
    } else {
        shut_in(run);
        status = status_of(doppel_vm_wait(run->vm));
        end_signals(run, signals);
        if (strcmp(doppel_config_get(run->config, "stats"), "true") == 0)
            doppel_vm_stats(run->vm, stderr);
    }
    doppel_vm_destroy(run->vm);
    if (pid_file)
        unlink(pid_file);
    return status;
}

int run_main(int argc, char **argv)
{
    struct run run = {.config = doppel_config_create()};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_run_help(stdout);
            doppel_config_destroy(run.config);
            return 0;
        }
    }
    if (!run.config) {
        complain("out of memory");
        return STATUS_ERROR;
    }
    block_signals();
    guard_terminal();
    int status = STATUS_USAGE;
    if (parse_options(&run, argc, argv) == 0) {
        if (strcmp(doppel_config_get(run.config, "sandbox"), "on") == 0)
            doppel_sandbox_begin();
        status = run_vm(&run);
    }
    doppel_config_destroy(run.config);
    return status;
}
