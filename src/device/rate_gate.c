/*
 * See rate_gate.h. Invariant: whenever a request was turned away the timer is armed. Threading: with the device lock held.
 */
#include "device/rate_gate.h"

#include <errno.h>

#include "state/inputs.h"

int rate_gate_init(struct rate_gate *gate, struct loop *loop, const struct rate_limit_config *limit, loop_timer_fn *resume, void *ctx)
{
    static const struct rate_limit_config none;

    rate_limiter_init(&gate->limiter, limit ? limit : &none, inputs_now_ns());
    gate->timer = loop_timer_create(loop, resume, ctx);
    return gate->timer ? 0 : -ENOMEM;
}

void rate_gate_fini(struct rate_gate *gate)
{
    if (gate->timer)
        loop_timer_destroy(gate->timer);
    gate->timer = NULL;
}

bool rate_gate_pass(struct rate_gate *gate, uint64_t bytes)
{
    uint64_t retry_ns;

    if (!rate_limiter_is_set(&gate->limiter))
        return true;
    if (rate_limiter_take(&gate->limiter, inputs_now_ns(), bytes, &retry_ns))
        return true;
    gate->turned_away++;
    loop_timer_arm(gate->timer, retry_ns);
    return false;
}

void rate_gate_give_back(struct rate_gate *gate, uint64_t bytes)
{
    if (rate_limiter_is_set(&gate->limiter))
        rate_limiter_give_back(&gate->limiter, bytes);
}

void rate_gate_set(struct rate_gate *gate, const struct bucket_config *bandwidth, const struct bucket_config *ops)
{
    uint64_t now_ns = inputs_now_ns();

    if (bandwidth)
        token_bucket_init(&gate->limiter.bandwidth, bandwidth, now_ns);
    if (ops)
        token_bucket_init(&gate->limiter.ops, ops, now_ns);
    loop_timer_arm(gate->timer, now_ns);
}
