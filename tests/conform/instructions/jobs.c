/* See jobs.h. Threading: the parent has one thread; the children's only share the counters. */
#include "jobs.h"

#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PROGRESS_SECONDS 10
#define STUCK_SECONDS 240

struct process {
    pid_t pid; /* 0: free */
    uint64_t first, end;
    uint64_t seen, since; /* the case it was at when looked at, and since when */
};

struct run {
    const struct jobs *jobs;
    struct process process[JOBS_MAX];
    unsigned count;
    uint64_t next, end, started;
    int failed; /* a piece could not be run at all: its exit status */
};

struct jobs_shared *jobs_shared;
static unsigned slot; /* this process's */

static uint64_t seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec;
}

int jobs_init(void)
{
    void *memory = mmap(NULL, sizeof *jobs_shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return -1;
    jobs_shared = memory;
    return 0;
}

void jobs_at(uint64_t number)
{
    atomic_store(&jobs_shared->at[slot], number);
    atomic_fetch_add(&jobs_shared->done, 1);
}

unsigned jobs_finding(void)
{
    return atomic_fetch_add(&jobs_shared->findings, 1) + 1;
}

static bool piece_start(struct run *r, unsigned n, uint64_t first, uint64_t end)
{
    struct process *p = &r->process[n];
    atomic_store(&jobs_shared->at[n], first);
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0)
        return false;
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        slot = n;
        int rc = r->jobs->piece_run(first, end - first);
        fflush(NULL);
        _exit(rc);
    }
    *p = (struct process){.pid = pid, .first = first, .end = end, .seen = first, .since = seconds()};
    return true;
}

static void next_start(struct run *r, unsigned n)
{
    uint64_t piece = r->jobs->piece, first = r->next, end = (first / piece + 1) * piece;
    if (first >= r->end)
        return;
    end = end < r->end ? end : r->end;
    if (piece_start(r, n, first, end))
        r->next = end;
    else
        r->failed = 2;
}

/* Killed by a signal, or by itself in the middle: what comes after the case that it was at is done by another. */
static void process_died(struct run *r, unsigned n, int status)
{
    uint64_t number = atomic_load(&jobs_shared->at[n]), end = r->process[n].end;
    jobs_finding();
    if (WIFSIGNALED(status))
        printf("case %llu: the process was killed by signal %d (%s)\n", (unsigned long long)number, WTERMSIG(status), strsignal(WTERMSIG(status)));
    else
        printf("case %llu: the process gave up with status %d\n", (unsigned long long)number, WEXITSTATUS(status));
    r->jobs->repeat_print(number);
    fflush(stdout);
    if (number + 1 < end && !piece_start(r, n, number + 1, end))
        r->failed = 2;
}

static void processes_reap(struct run *r)
{
    for (unsigned n = 0; n < r->count; n++) {
        int status;
        if (!r->process[n].pid || waitpid(r->process[n].pid, &status, WNOHANG) != r->process[n].pid)
            continue;
        r->process[n].pid = 0;
        if (WIFEXITED(status) && WEXITSTATUS(status) && !atomic_load(&jobs_shared->done)) /* not even one case */
            r->failed = WEXITSTATUS(status);
        else if (!WIFEXITED(status) || WEXITSTATUS(status))
            process_died(r, n, status);
    }
}

static void stuck_kill(struct run *r)
{
    for (unsigned n = 0; n < r->count; n++) {
        struct process *p = &r->process[n];
        uint64_t at = atomic_load(&jobs_shared->at[n]), now = seconds();
        if (at != p->seen) {
            p->seen = at;
            p->since = now;
        } else if (p->pid && now - p->since > STUCK_SECONDS) {
            kill(p->pid, SIGKILL);
        }
    }
}

static void progress_print(const struct run *r)
{
    uint64_t done = atomic_load(&jobs_shared->done), passed = seconds() - r->started, total = r->jobs->count;
    uint64_t speed = done / (passed ? passed : 1), left = speed && done < total ? (total - done) / speed : 0;
    fprintf(stderr, "%llu of %llu cases (%llu %%), %llu a second, %llu:%02llu to go, %u findings\n", (unsigned long long)done, (unsigned long long)total,
            (unsigned long long)(done * 100 / (total ? total : 1)), (unsigned long long)speed, (unsigned long long)(left / 3600),
            (unsigned long long)(left / 60 % 60), atomic_load(&jobs_shared->findings));
}

static unsigned processors(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) ? 1 : (unsigned)CPU_COUNT(&set);
}

bool jobs_option(struct jobs *jobs, int option, uint64_t value)
{
    switch (option) {
    case 'c':
        jobs->count = value;
        return true;
    case 'f':
        jobs->first = value;
        return true;
    case 'j':
        jobs->processes = (unsigned)value;
        jobs->alone = false;
        return true;
    case 'n':
        jobs->findings_max = (unsigned)value;
        return true;
    default:
        return false;
    }
}

int jobs_run(const struct jobs *jobs)
{
    if (jobs->alone)
        return jobs->piece_run(jobs->first, jobs->count);
    struct run r = {.jobs = jobs, .next = jobs->first, .end = jobs->first + jobs->count, .started = seconds()};
    r.count = jobs->processes ? jobs->processes : processors();
    r.count = r.count < JOBS_MAX ? r.count : JOBS_MAX;
    uint64_t printed = r.started;
    for (bool busy = true; busy; usleep(50000)) {
        bool stop = r.failed || atomic_load(&jobs_shared->findings) >= jobs->findings_max; /* those at work end by themselves, when they have told what they found */
        busy = false;
        for (unsigned n = 0; n < r.count; n++) {
            if (!r.process[n].pid && !stop)
                next_start(&r, n);
            busy |= r.process[n].pid != 0;
        }
        processes_reap(&r);
        stuck_kill(&r);
        if (seconds() - printed >= PROGRESS_SECONDS) {
            printed = seconds();
            progress_print(&r);
        }
    }
    return r.failed ? r.failed : atomic_load(&jobs_shared->findings) != 0;
}
