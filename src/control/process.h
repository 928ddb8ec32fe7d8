/*
 * Processes of this host, named so that a reused process id is noticed: by id and start time. Stateless; any thread.
 */
#ifndef DOPPEL_CONTROL_PROCESS_H
#define DOPPEL_CONTROL_PROCESS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

struct process {
    pid_t pid;
    uint64_t start_time; /* in clock ticks since the host's start, as in /proc/PID/stat; 0: unknown */
};

struct process process_self(void);
bool process_is(const struct process *process); /* it lives, and is the one that was meant */
/* A pidfd of the process, -ESRCH when it has gone. */
int process_open(const struct process *process);
/* 0, -ESRCH or another -errno. Never hits another process. */
int process_signal(const struct process *process, int signal_number);

struct process_usage {
    uint64_t cpu_ns;         /* used by it and its children */
    uint64_t resident_bytes; /* of its own and its children's */
    uint64_t threads;
};
/* `proc`: a descriptor of /proc, for those who cannot open it any more; AT_FDCWD: it is opened. -ESRCH: there is no such process. */
int process_usage(int proc, pid_t pid, struct process_usage *usage);

#endif
