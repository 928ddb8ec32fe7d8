/*
 * Token buckets (token_bucket.h). Invariants: tokens <= size; debt is what requests larger than the bucket took beyond it. Time that did not come to a
 * whole token yet stays uncounted (last_ns), so that slow rates are right, too.
 */
#include "util/token_bucket.h"

#include <string.h>

#define NS_PER_MS 1000000ull
#define TOKENS_MAX (1ull << 62)

typedef unsigned __int128 u128;

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

void token_bucket_init(struct token_bucket *bucket, const struct bucket_config *config, uint64_t now_ns)
{
    memset(bucket, 0, sizeof *bucket);
    if (!config->size || !config->refill_ms)
        return;
    bucket->size = bucket->tokens = least(config->size, TOKENS_MAX);
    bucket->burst = least(config->one_time_burst, TOKENS_MAX);
    bucket->refill_ns = least(config->refill_ms, UINT64_MAX / NS_PER_MS) * NS_PER_MS;
    bucket->last_ns = now_ns;
}

/* Rounded up. */
static u128 time_for(const struct token_bucket *bucket, u128 tokens)
{
    return (tokens * bucket->refill_ns + bucket->size - 1) / bucket->size;
}

static void refill(struct token_bucket *bucket, uint64_t now_ns)
{
    uint64_t room = bucket->size - bucket->tokens;
    if (now_ns <= bucket->last_ns)
        return;
    u128 made = (u128)(now_ns - bucket->last_ns) * bucket->size / bucket->refill_ns;
    if (bucket->burst || made >= (u128)room + bucket->debt) {
        if (!bucket->burst) {
            bucket->tokens = bucket->size;
            bucket->debt = 0;
        }
        bucket->last_ns = now_ns;
        return;
    }
    bucket->last_ns += (uint64_t)time_for(bucket, made);
    uint64_t paid = least((uint64_t)made, bucket->debt);
    bucket->debt -= paid;
    bucket->tokens += (uint64_t)made - paid;
}

uint64_t token_bucket_ready_at(struct token_bucket *bucket, uint64_t now_ns, uint64_t tokens)
{
    if (!bucket->size)
        return now_ns;
    refill(bucket, now_ns);
    tokens = tokens > bucket->burst ? least(tokens - bucket->burst, bucket->size) : 0;
    if (tokens <= bucket->tokens)
        return now_ns;
    u128 at = time_for(bucket, (u128)(tokens - bucket->tokens) + bucket->debt) + bucket->last_ns;
    return at < UINT64_MAX ? (uint64_t)at : UINT64_MAX;
}

void token_bucket_take(struct token_bucket *bucket, uint64_t now_ns, uint64_t tokens)
{
    if (!bucket->size)
        return;
    refill(bucket, now_ns);
    uint64_t of_burst = least(tokens, bucket->burst), of_bucket = least(tokens - of_burst, bucket->tokens);
    bucket->burst -= of_burst;
    bucket->tokens -= of_bucket;
    bucket->debt = least(bucket->debt + (tokens - of_burst - of_bucket), TOKENS_MAX);
}

uint64_t token_bucket_take_some(struct token_bucket *bucket, uint64_t now_ns, uint64_t tokens)
{
    if (!bucket->size)
        return tokens;
    refill(bucket, now_ns);
    tokens = least(tokens, bucket->burst + bucket->tokens);
    token_bucket_take(bucket, now_ns, tokens);
    return tokens;
}

void token_bucket_give_back(struct token_bucket *bucket, uint64_t tokens)
{
    uint64_t paid = least(tokens, bucket->debt);
    bucket->debt -= paid;
    bucket->tokens += least(tokens - paid, bucket->size - bucket->tokens);
}

void rate_limiter_init(struct rate_limiter *limiter, const struct rate_limit_config *config, uint64_t now_ns)
{
    token_bucket_init(&limiter->bandwidth, &config->bandwidth, now_ns);
    token_bucket_init(&limiter->ops, &config->ops, now_ns);
}

bool rate_limiter_take(struct rate_limiter *limiter, uint64_t now_ns, uint64_t bytes, uint64_t *retry_ns)
{
    uint64_t bandwidth_ns = token_bucket_ready_at(&limiter->bandwidth, now_ns, bytes);
    uint64_t ops_ns = token_bucket_ready_at(&limiter->ops, now_ns, 1);
    *retry_ns = bandwidth_ns > ops_ns ? bandwidth_ns : ops_ns;
    if (*retry_ns > now_ns)
        return false;
    token_bucket_take(&limiter->bandwidth, now_ns, bytes);
    token_bucket_take(&limiter->ops, now_ns, 1);
    return true;
}

void rate_limiter_give_back(struct rate_limiter *limiter, uint64_t bytes)
{
    token_bucket_give_back(&limiter->bandwidth, bytes);
    token_bucket_give_back(&limiter->ops, 1);
}
