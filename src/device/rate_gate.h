/*
 * A rate limit in front of a device's queues: requests pass or are turned away, and then `resume` is called when the next one can pass. Nothing polls: a
 * loop timer waits. Threading: with the device lock held; `resume` is called on the loop's thread.
 */
#ifndef DOPPEL_DEVICE_RATE_GATE_H
#define DOPPEL_DEVICE_RATE_GATE_H

#include <stdbool.h>
#include <stdint.h>

#include "util/loop.h"
#include "util/token_bucket.h"

struct rate_gate {
    struct rate_limiter limiter;
    struct loop_timer *timer;
    uint64_t turned_away; /* how often a request had to wait */
};

/* `limit` NULL: none. -ENOMEM. Zeroed memory may be passed to fini. */
int rate_gate_init(struct rate_gate *gate, struct loop *loop, const struct rate_limit_config *limit, loop_timer_fn *resume, void *ctx)
    __attribute__((warn_unused_result));
void rate_gate_fini(struct rate_gate *gate);
/* One request of so many bytes. False: not now, resume comes. */
bool rate_gate_pass(struct rate_gate *gate, uint64_t bytes);
/* It passed, but could not be done after all. */
void rate_gate_give_back(struct rate_gate *gate, uint64_t bytes);
/* New limits, full; NULL leaves one as it is. Who waits tries again. */
void rate_gate_set(struct rate_gate *gate, const struct bucket_config *bandwidth, const struct bucket_config *ops);

#endif
