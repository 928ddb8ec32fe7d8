/*
 * Token buckets, and rate limits made of two of them.
 *
 * A bucket holds `size` tokens and is refilled evenly, an empty one in `refill_ms`. Before that there are `one_time_burst` tokens, used first; refilling begins when these are gone.
 * More than `size` at once is let through when the bucket is full, and paid back by waiting longer afterwards, so that the rate is right for requests of any length.
 * Threading: the caller's lock. Times are of one monotonic clock.
 */
#ifndef DOPPEL_UTIL_TOKEN_BUCKET_H
#define DOPPEL_UTIL_TOKEN_BUCKET_H

#include <stdbool.h>
#include <stdint.h>

/* size or refill_ms 0: no limit. */
struct bucket_config {
    uint64_t size, one_time_burst, refill_ms;
};

struct rate_limit_config {
    struct bucket_config bandwidth; /* bytes */
    struct bucket_config ops;       /* requests or frames */
};

struct token_bucket {
    uint64_t size, burst; /* size 0: no limit */
    uint64_t refill_ns;
    uint64_t tokens, debt; /* one of them is zero */
    uint64_t last_ns;      /* up to when refilling has been counted */
};

/* Full. */
void token_bucket_init(struct token_bucket *bucket, const struct bucket_config *config, uint64_t now_ns);
/* When so many could be taken: now_ns or a later time; UINT64_MAX: beyond counting. */
uint64_t token_bucket_ready_at(struct token_bucket *bucket, uint64_t now_ns, uint64_t tokens);
/* Takes them; token_bucket_ready_at said now. */
void token_bucket_take(struct token_bucket *bucket, uint64_t now_ns, uint64_t tokens);
/* Takes at most so many; returns how many. For what can be cut short. */
uint64_t token_bucket_take_some(struct token_bucket *bucket, uint64_t now_ns, uint64_t tokens);
/* What was taken last was not used. */
void token_bucket_give_back(struct token_bucket *bucket, uint64_t tokens);

struct rate_limiter {
    struct token_bucket bandwidth, ops;
};

void rate_limiter_init(struct rate_limiter *limiter, const struct rate_limit_config *config, uint64_t now_ns);
static inline bool rate_limiter_is_set(const struct rate_limiter *limiter)
{
    return limiter->bandwidth.size || limiter->ops.size;
}
/* Takes the bytes and one operation, or nothing: then *retry_ns is when to try again. */
bool rate_limiter_take(struct rate_limiter *limiter, uint64_t now_ns, uint64_t bytes, uint64_t *retry_ns);
void rate_limiter_give_back(struct rate_limiter *limiter, uint64_t bytes);

#endif
