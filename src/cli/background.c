/*
 * doppel run --detach: the machine in a process of its own, and with --restart a supervisor above it that waits for its end and begins again.
 *
 * The starter waits on a pipe for one byte, which comes when the guest runs; the pipe's end without one is a failure, whose status is the process's. Until then
 * messages go to the starter's stderr, afterwards to messages.log. The supervisor has one thread and sleeps in sigwaitinfo. All processes share the lock of the
 * machine's directory, so that it lives as long as one of them does.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "cli/run.h"
#include "util/log.h"
#include "util/loop.h"

#define PAUSE_MS_FIRST 100u
#define PAUSE_MS_MAX 60000u
#define HEALTHY_NS 10000000000ull /* who ran that long begins with short pauses again */

/* ---- descriptors ---- */

static void to_nowhere(void)
{
    int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (nowhere < 0)
        return;
    dup2(nowhere, STDIN_FILENO);
    dup2(nowhere, STDOUT_FILENO);
    if (nowhere > STDERR_FILENO)
        close(nowhere);
}

static int open_log(const struct instance *instance)
{
    int log = openat(instance_dir(instance), "messages.log", O_WRONLY | O_APPEND | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    return log >= 0 ? log : open("/dev/null", O_WRONLY | O_CLOEXEC);
}

void tell_ready(struct run *run)
{
    if (run->log_fd >= 0) {
        dup2(run->log_fd, STDERR_FILENO);
        report_as_text();
        close(run->log_fd);
        run->log_fd = -1;
    }
    if (run->from)
        close(run->from_lock);
    run->from = NULL;
    if (run->ready_fd >= 0) {
        (void)!write(run->ready_fd, "", 1);
        close(run->ready_fd);
        run->ready_fd = -1;
    }
}

/* True: the other side said that the guest runs. */
static bool wait_ready(int fd)
{
    char byte;
    ssize_t n;
    do
        n = read(fd, &byte, 1);
    while (n < 0 && errno == EINTR);
    close(fd);
    return n == 1;
}

/* The status of a process that has ended, as a shell gives it. */
static int status_of_process(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return STATUS_ERROR;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/*
 * Calls `be` in a process of its own with the writing end of a pipe in run->ready_fd, and waits until it has said that the guest runs (*ready) or cannot any more.
 * The process, or -errno.
 */
static pid_t start_process(struct run *run, int (*be)(struct run *run), bool *ready)
{
    int pipe_fd[2];
    if (pipe2(pipe_fd, O_CLOEXEC))
        return -errno;
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        close(pipe_fd[0]);
        if (run->ready_fd >= 0)
            close(run->ready_fd); /* a supervisor's own */
        run->ready_fd = pipe_fd[1];
        exit(be(run));
    }
    int code = -errno;
    close(pipe_fd[1]);
    if (pid < 0) {
        close(pipe_fd[0]);
        return code;
    }
    *ready = wait_ready(pipe_fd[0]);
    return pid;
}

static int be_machine(struct run *run)
{
    setsid();
    to_nowhere();
    if (run->log_fd < 0)
        run->log_fd = open_log(run->instance);
    return run_vm(run);
}

/* ---- the supervisor ---- */

static sigset_t supervisor_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    sigaddset(&set, SIGCHLD);
    return set;
}

static int be_supervised(struct run *run)
{
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    pthread_sigmask(SIG_UNBLOCK, &child, NULL);
    return be_machine(run);
}

/* Until the machine's process has ended. Other signals mean the end, and are for the machine as well. */
static int wait_for_machine(pid_t pid, bool *over)
{
    sigset_t set = supervisor_signals();
    for (;;) {
        siginfo_t info = {0};
        if (waitid(P_PID, (id_t)pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == pid)
            return status_of_process(pid);
        int number = sigwaitinfo(&set, NULL);
        if (number == SIGTERM || number == SIGINT || number == SIGHUP) {
            *over = true;
            kill(pid, number);
        }
    }
}

/* False: a signal came that means the end. */
static bool rest(unsigned pause_ms)
{
    sigset_t set = supervisor_signals();
    const struct timespec pause = {.tv_sec = pause_ms / 1000, .tv_nsec = (long)(pause_ms % 1000) * 1000000};
    int number;
    do
        number = sigtimedwait(&set, NULL, &pause);
    while (number == SIGCHLD);
    return number < 0;
}

static void write_state(const struct run *run, const char *state, int status)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    json_t *self = json_pack("{s:i, s:I}", "pid", (int)run->supervisor.pid, "start_time", (json_int_t)run->supervisor.start_time);
    json_t *object = json_pack("{s:s, s:I, s:O, s:o, s:i, s:i, s:s}", "state", state, "since_ms", (json_int_t)now.tv_sec * 1000 + now.tv_nsec / 1000000, "process", self,
                               "supervisor", self, "restarts", (int)run->restarts, "exit_status", status, "reason", status > 128 ? "killed" : "failed");
    if (!object || instance_write(run->instance, "state.json", object))
        log_warning("the state of %s cannot be written", instance_name(run->instance));
    json_decref(object);
}

static bool is_wanted(const struct run *run, int status, bool over)
{
    bool failed = status != STATUS_SHUTDOWN && status != STATUS_RESET;
    if (over || status == STATUS_STOPPED || status == STATUS_MIGRATED || instance_unwanted(run->instance))
        return false;
    return run->restart == RESTART_ALWAYS || (failed && (!run->restarts_max || run->restarts < run->restarts_max));
}

static int supervise(struct run *run)
{
    unsigned pause_ms = PAUSE_MS_FIRST;
    bool ready = false, over = false, ran = false;
    sigset_t set = supervisor_signals();
    int status = STATUS_ERROR, starter = run->ready_fd;
    setsid();
    to_nowhere();
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    run->supervisor = process_self();
    run->log_fd = open_log(run->instance);
    for (;; run->restarts++) {
        uint64_t began = loop_now_ns();
        pid_t pid = start_process(run, be_supervised, &ready);
        if (pid > 0 && ready && !ran) {
            ran = true;
            run->ready_fd = starter;
            tell_ready(run);
        }
        status = pid > 0 ? wait_for_machine(pid, &over) : STATUS_ERROR;
        if (!ran || !is_wanted(run, status, over))
            break;
        if (loop_now_ns() - began > HEALTHY_NS)
            pause_ms = PAUSE_MS_FIRST;
        write_state(run, "restarting", status);
        log_info("%s ended with status %d and is started again in %u ms", instance_name(run->instance), status, pause_ms);
        if (!rest(pause_ms) || instance_unwanted(run->instance))
            break;
        pause_ms = 2 * pause_ms < PAUSE_MS_MAX ? 2 * pause_ms : PAUSE_MS_MAX;
    }
    struct instance_info last = {0};
    if (status > 128 || instance_read(instance_name(run->instance), &last, NULL) || strcmp(last.state, "restarting") == 0)
        write_state(run, "ended", status); /* else the machine itself has */
    instance_info_clear(&last);
    instance_close(run->instance, run->keep && (ran || run->name));
    return status;
}

/* ---- the starter ---- */

int run_in_background(struct run *run)
{
    bool ready = false;
    run->keep = !run->remove;
    pid_t pid = start_process(run, run->restart == RESTART_NO ? be_machine : supervise, &ready);
    if (pid < 0)
        complain(0, "cannot start a process: %s", strerror(-(int)pid));
    snprintf(run->called, sizeof run->called, "%s", instance_name(run->instance));
    instance_close(run->instance, pid > 0);
    if (ready)
        return 0;
    return pid > 0 ? status_of_process(pid) : STATUS_ERROR;
}
