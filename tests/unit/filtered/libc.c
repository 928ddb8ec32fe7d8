/*
 * `filtered_libc KIND SCENARIO`: what any code of the program may come to do by the C library, on a thread of a kind: allocate in each way, wait, log, fail an assertion, run where the
 * kernel's page for the time is not there, be stopped and continued, end. Status 0: it went as it should.
 *
 * The scenario runs in a child, so that its end can be looked at; the child's main thread has no filter.
 */
#include "filtered.h"

#include <dirent.h>
#include <elf.h>
#include <errno.h>
#include <linux/filter.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "sandbox/sandbox.h"
#include "util/log.h"

#define SMALL 60000u
#define BLOCKS 400u
#define LARGE (4u << 20)
#define ARENAS 8u /* that the library makes before it counts processors */
#define NO_CLOCK "FILTERED_NO_CLOCK"

static unsigned kind;
static struct sock_fprog filter;
static atomic_uint others;

static void allocate(void)
{
    static char *block[BLOCKS];
    for (unsigned n = 0; n < BLOCKS; n++)
        if (!(block[n] = malloc(SMALL)))
            _exit(1);
        else
            memset(block[n], 1, SMALL);
    for (unsigned n = BLOCKS; n-- > 0;)
        free(block[n]);
    malloc_trim(0);
    char *large = malloc(LARGE), *larger = large ? realloc(large, 4 * (size_t)LARGE) : NULL;
    if (!larger)
        _exit(1);
    free(larger);
}

static void allocate_from_one_arena(void)
{
    allocate();
}

static void *take_arena(void *ctx)
{
    char *volatile block = malloc(SMALL); /* not left out by the compiler */
    free(block);
    atomic_fetch_add(&others, 1);
    for (;;)
        pause();
    return NULL;
}

static void wait_for_others(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
    const struct timespec past = {0, 1};
    pthread_mutex_lock(&lock);
    if (pthread_cond_timedwait(&changed, &lock, &past) != ETIMEDOUT)
        _exit(1);
    pthread_mutex_unlock(&lock);
    pthread_cond_broadcast(&changed);
    struct timespec soon;
    clock_gettime(CLOCK_REALTIME, &soon);
    soon.tv_nsec = 0;
    soon.tv_sec += 1;
    pthread_mutex_lock(&lock);
    if (pthread_cond_timedwait(&changed, &lock, &soon) != ETIMEDOUT)
        _exit(1);
}

static void log_a_line(void)
{
    log_error("a line of the log");
}

static void fail(void)
{
    abort();
}

static void forbidden(void)
{
    (void)!chdir("/");
    _exit(1);
}

static void ask_time(void)
{
    struct timespec now;
    if (getauxval(AT_SYSINFO_EHDR) || clock_gettime(CLOCK_MONOTONIC, &now))
        _exit(1);
}

SANDBOX_ALLOW(IN_ALL, poll);
#ifdef FILES /* what shares have rules for: where files can be opened the library looks at how memory is given out before it gives some back */
SANDBOX_ALLOW(IN_SHARE, openat);
SANDBOX_ALLOW(IN_SHARE, read);
SANDBOX_ALLOW(IN_SHARE, close);
#endif

static void wait_in_poll(void)
{
    struct pollfd none = {.fd = -1};
    if (poll(&none, 1, 700) != 0)
        _exit(1);
}

static void wait_for_a_time(void)
{
    wait_for_others();
}

static void nothing(void)
{
}

static const struct scenario {
    const char *name;
    void (*run)(void);
    int exits, dies; /* how the child ends */
    bool stopped;    /* and continued meanwhile */
} scenarios[] = {
    {"allocates", allocate, 0, 0, false},
    {"allocates from one arena", allocate_from_one_arena, 0, 0, false},
    {"allocates first", allocate, 0, 0, false},
    {"waits", wait_for_others, 0, 0, false},
    {"logs", log_a_line, 0, 0, false},
    {"fails", fail, 0, SIGABRT, false},
    {"does what is forbidden", forbidden, 148, 0, false},
    {"asks for the time", ask_time, 0, 0, false},
    {"is stopped in poll", wait_in_poll, 0, 0, true},
    {"is stopped in a wait", wait_for_a_time, 0, 0, true},
    {"ends", nothing, 0, 0, false},
};

static void *thread_main(void *ctx)
{
    const struct scenario *scenario = ctx;
    filtered_load(&filter, kind);
    scenario->run();
    if (kind == IN_BROKER)
        _exit(0); /* it has no threads to end */
    return NULL;
}

static int child(const struct scenario *scenario)
{
    pthread_t thread;
    filtered_make(&filter, kind);
    if (log_open("/dev/null", &(struct log_format){.instance = "test", .level = true}))
        return 1;
    if (scenario->run == allocate_from_one_arena)
        mallopt(M_ARENA_MAX, 1);
    for (unsigned n = 0; n < ARENAS && strstr(scenario->name, "first"); n++)
        if (pthread_create(&thread, NULL, take_arena, NULL))
            return 1;
    while (strstr(scenario->name, "first") && atomic_load(&others) < ARENAS)
        sched_yield();
    return pthread_create(&thread, NULL, thread_main, (void *)(uintptr_t)scenario) || pthread_join(thread, NULL);
}

/* The program again, without the kernel's page that tells the time without a call: the child's auxiliary vector is changed before its first instruction. */
static void hide_clock(pid_t pid)
{
    int status;
    unsigned long sp, at, word;
    char path[64];
    FILE *file;
    waitpid(pid, &status, 0);
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    if (!(file = fopen(path, "r")) || fscanf(file, "%*d %*s %*c" " %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %lu", &sp) != 1)
        _exit(3);
    fclose(file);
    at = sp + (1 + ptrace(PTRACE_PEEKDATA, pid, (void *)sp, NULL) + 1) * 8ul; /* argc, argv */
    while (ptrace(PTRACE_PEEKDATA, pid, (void *)at, NULL))
        at += 8;
    for (at += 8; (word = (unsigned long)ptrace(PTRACE_PEEKDATA, pid, (void *)at, NULL)) != AT_NULL; at += 16)
        if (word == AT_SYSINFO_EHDR)
            ptrace(PTRACE_POKEDATA, pid, (void *)at, (void *)AT_IGNORE);
    ptrace(PTRACE_DETACH, pid, NULL, NULL);
}

/* Both threads: one joins, the other waits. */
static bool are_asleep(pid_t pid)
{
    unsigned asleep = 0;
    char path[300], line[256] = "";
    snprintf(path, sizeof path, "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    for (struct dirent *task; tasks && (task = readdir(tasks));) {
        snprintf(path, sizeof path, "/proc/%d/task/%s/syscall", (int)pid, task->d_name);
        FILE *file = *task->d_name == '.' ? NULL : fopen(path, "r");
        asleep += file && fgets(line, sizeof line, file) && strncmp(line, "running", 7) != 0;
        if (file)
            fclose(file);
    }
    if (tasks)
        closedir(tasks);
    return asleep == 2;
}

static void stop_and_continue(pid_t pid)
{
    int status;
    while (!are_asleep(pid))
        sched_yield();
    kill(pid, SIGSTOP);
    if (waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status))
        kill(pid, SIGCONT);
}

int main(int argc, char **argv)
{
    const struct scenario *scenario = scenarios, *end = scenarios + sizeof scenarios / sizeof *scenarios;
    for (kind = 1; kind < 1u << SANDBOX_KINDS && argc == 3 && strcmp(argv[1], sandbox_kind_name(kind)) != 0;)
        kind <<= 1;
    while (argc == 3 && scenario < end && strcmp(argv[2], scenario->name) != 0)
        scenario++;
    if (argc != 3 || kind == 1u << SANDBOX_KINDS || scenario == end)
        return 2;
    if (getenv(NO_CLOCK))
        return child(scenario);
    pid_t pid = fork();
    if (pid == 0 && scenario->run == ask_time) {
        setenv(NO_CLOCK, "1", 1);
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        execv("/proc/self/exe", argv);
        _exit(3);
    }
    if (pid == 0)
        _exit(child(scenario));
    if (scenario->run == ask_time)
        hide_clock(pid);
    if (scenario->stopped)
        stop_and_continue(pid);
    int status;
    if (pid < 0 || waitpid(pid, &status, 0) != pid)
        return 3;
    bool right = scenario->dies ? WIFSIGNALED(status) && WTERMSIG(status) == scenario->dies : WIFEXITED(status) && WEXITSTATUS(status) == scenario->exits;
    if (!right && WIFSIGNALED(status) && WTERMSIG(status) == SIGSYS)
        fprintf(stderr, "a call of the filter's own handler was refused\n");
    return !right;
}
