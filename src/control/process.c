/* Processes by id and start time (process.h), from /proc. */
#include "control/process.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEPTH_MAX 4 /* children of children; ours have none */

struct stat_line {
    uint64_t cpu_ticks, start_time, resident_pages, threads;
    char state;
};

static const char *prefix(int proc)
{
    return proc == AT_FDCWD ? "/proc/" : "";
}

/* proc(5): the second field is a name in parentheses that may contain anything, so counting starts behind the last of them. */
static int read_stat(int proc, pid_t pid, struct stat_line *line)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "%s%d/stat", prefix(proc), (int)pid);
    int fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0)
        return -ESRCH;
    text[n] = '\0';
    char *at = strrchr(text, ')');
    uint64_t user, kernel, waited_user, waited_kernel;
    if (!at || sscanf(at + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64 " %*s %*s %" SCNu64 " %*s %" SCNu64
                              " %*s %" SCNu64, &line->state, &user, &kernel, &waited_user, &waited_kernel, &line->threads, &line->start_time,
                      &line->resident_pages) != 8)
        return -EPROTO;
    line->cpu_ticks = user + kernel + waited_user + waited_kernel;
    return 0;
}

struct process process_self(void)
{
    struct stat_line line = {0};
    struct process self = {.pid = getpid()};
    if (read_stat(AT_FDCWD, self.pid, &line) == 0)
        self.start_time = line.start_time;
    return self;
}

bool process_is(const struct process *process)
{
    struct stat_line line;
    return process->pid > 0 && process->start_time && read_stat(AT_FDCWD, process->pid, &line) == 0 && line.start_time == process->start_time && line.state != 'Z' &&
           line.state != 'X';
}

int process_open(const struct process *process)
{
    if (process->pid <= 0)
        return -ESRCH;
    int fd = (int)syscall(SYS_pidfd_open, process->pid, 0);
    if (fd < 0)
        return -errno;
    if (process_is(process)) /* looked at after the descriptor was made: that cannot become another's */
        return fd;
    close(fd);
    return -ESRCH;
}

int process_signal(const struct process *process, int signal_number)
{
    int fd = process_open(process);
    if (fd < 0)
        return fd;
    int r = syscall(SYS_pidfd_send_signal, fd, signal_number, NULL, 0) ? -errno : 0;
    close(fd);
    return r;
}

static void add_usage(int proc, pid_t pid, struct process_usage *usage, unsigned depth);

/* /proc/PID/task/TID/children; where the kernel has it. */
static void add_children(int proc, const char *path, struct process_usage *usage, unsigned depth)
{
    int fd = openat(proc, path, O_RDONLY | O_CLOEXEC), child;
    FILE *file = fd >= 0 ? fdopen(fd, "r") : NULL;
    if (!file && fd >= 0)
        close(fd);
    while (file && fscanf(file, "%d", &child) == 1)
        add_usage(proc, child, usage, depth + 1);
    if (file)
        fclose(file);
}

static void add_usage(int proc, pid_t pid, struct process_usage *usage, unsigned depth)
{
    struct stat_line line;
    char path[320];
    if (depth > DEPTH_MAX || read_stat(proc, pid, &line))
        return;
    usage->cpu_ns += line.cpu_ticks * (1000000000ull / (uint64_t)sysconf(_SC_CLK_TCK));
    usage->resident_bytes += line.resident_pages * (uint64_t)sysconf(_SC_PAGESIZE);
    usage->threads += line.threads;
    snprintf(path, sizeof path, "%s%d/task", prefix(proc), (int)pid);
    int fd = openat(proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *tasks = fd >= 0 ? fdopendir(fd) : NULL;
    if (!tasks && fd >= 0)
        close(fd);
    for (struct dirent *entry; tasks && (entry = readdir(tasks));) {
        snprintf(path, sizeof path, "%s%d/task/%s/children", prefix(proc), (int)pid, entry->d_name);
        if (entry->d_name[0] != '.')
            add_children(proc, path, usage, depth);
    }
    if (tasks)
        closedir(tasks);
}

int process_usage(int proc, pid_t pid, struct process_usage *usage)
{
    *usage = (struct process_usage){0};
    add_usage(proc, pid, usage, 0);
    return usage->threads ? 0 : -ESRCH;
}
