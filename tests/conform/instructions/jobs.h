/*
 * Many cases in several processes: pieces of a range of case numbers, each in a process that knows nothing of the others, so that a piece repeats by itself.
 *
 * A process that dies or does not get on is a finding like any other; what is left of its piece goes to the next one.
 */
#ifndef DOPPEL_CONFORM_JOBS_H
#define DOPPEL_CONFORM_JOBS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define JOBS_MAX 64u
#define JOBS_TALLY 48u

struct jobs {
    uint64_t first, count;
    bool alone;         /* no other processes: jobs_run is piece_run for all cases */
    unsigned processes; /* up to JOBS_MAX; 0: as many as there are processors for this process */
    unsigned findings_max; /* then it stops */
    uint64_t piece;
    /* In a process of its own, which exits with what it returns: 0, also after findings; anything else is one more. Returns early when there are findings_max. */
    int (*piece_run)(uint64_t first, uint64_t count);
    /* How to repeat a case, on a line of its own. */
    void (*repeat_print)(uint64_t number);
};

/* Memory that all processes share; also there without jobs_run, once jobs_init has been called. */
struct jobs_shared {
    _Atomic uint64_t done, tally[JOBS_TALLY];
    atomic_uint findings;
    _Atomic uint64_t at[JOBS_MAX]; /* the case that a process is at */
};
extern struct jobs_shared *jobs_shared;

/* The options that every program of this kind has; `value` is the argument's. False: it is none of them. */
#define JOBS_USAGE "[--count N] [--first CASE] [--findings N] [--jobs N (0: as many as processors)]"
#define JOBS_OPTIONS \
    {"count", required_argument, NULL, 'c'}, {"first", required_argument, NULL, 'f'}, {"jobs", required_argument, NULL, 'j'}, {"findings", required_argument, NULL, 'n'}
bool jobs_option(struct jobs *jobs, int option, uint64_t value);

int jobs_init(void);
void jobs_at(uint64_t number);   /* begins a case */
unsigned jobs_finding(void);     /* counts one; its number, from 1 */
/* Progress goes to stderr, unless alone. 0: all done without findings; 1: findings; else what the first piece returned, when it came to no case. */
int jobs_run(const struct jobs *jobs);

#endif
