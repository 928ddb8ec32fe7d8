/* The loop's rounds on a thread of kind IN_LOOP. */
#include "filtered.h"

#include "util/loop.h"

/* What other parts of the program have rules for. */
SANDBOX_ALLOW(IN_LOOP, accept4);
SANDBOX_ALLOW(IN_LOOP, close);
SANDBOX_ALLOW(IN_LOOP, poll);
SANDBOX_ALLOW(IN_LOOP, sendto);

int __real_loop_run_once(struct loop *loop, int timeout_ms);
int __wrap_loop_run_once(struct loop *loop, int timeout_ms);

struct round {
    struct loop *loop;
    int timeout_ms, result;
};

static void run_once(void *ctx)
{
    struct round *round = ctx;
    round->result = __real_loop_run_once(round->loop, round->timeout_ms);
}

int __wrap_loop_run_once(struct loop *loop, int timeout_ms)
{
    struct round round = {loop, timeout_ms, 0};
    filtered_call(IN_LOOP, run_once, &round);
    return round.result;
}
