/* Token buckets: bursts, the rate over a long time, debts, and numbers at the edges. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "util/token_bucket.h"

#define MS 1000000ull
#define S 1000000000ull

static struct token_bucket bucket_of(uint64_t size, uint64_t burst, uint64_t refill_ms, uint64_t now)
{
    struct token_bucket bucket;
    token_bucket_init(&bucket, &(struct bucket_config){size, burst, refill_ms}, now);
    return bucket;
}

static void no_limit(void **state)
{
    struct token_bucket buckets[] = {bucket_of(0, 0, 0, 5), bucket_of(0, 5, 100, 5), bucket_of(100, 0, 0, 5)};
    for (unsigned i = 0; i < 3; i++) {
        for (unsigned n = 0; n < 100; n++) {
            assert_int_equal(token_bucket_ready_at(&buckets[i], 7, UINT64_MAX), 7);
            token_bucket_take(&buckets[i], 7, UINT64_MAX);
        }
        assert_int_equal(token_bucket_take_some(&buckets[i], 7, 1000), 1000);
    }
}

static void refilling(void **state)
{
    struct token_bucket bucket = bucket_of(1000, 0, 100, S);
    token_bucket_take(&bucket, S, 1000);
    assert_int_equal(token_bucket_ready_at(&bucket, S, 1), S + MS / 10);
    assert_int_equal(token_bucket_ready_at(&bucket, S, 500), S + 50 * MS);
    assert_int_equal(token_bucket_ready_at(&bucket, S + 50 * MS, 500), S + 50 * MS);
    token_bucket_take(&bucket, S + 50 * MS, 500);
    assert_int_equal(token_bucket_ready_at(&bucket, S + 50 * MS, 1000), S + 150 * MS);
    /* Never more than full. */
    assert_int_equal(token_bucket_take_some(&bucket, 100 * S, 5000), 1000);
    assert_int_equal(token_bucket_take_some(&bucket, 100 * S, 1), 0);
    assert_int_equal(token_bucket_take_some(&bucket, 100 * S + 5 * MS, 5000), 50);
    /* Time that goes backwards gives nothing. */
    assert_int_equal(token_bucket_take_some(&bucket, 99 * S, 5000), 0);
}

/* The one-time burst first, and no refilling before it is gone. */
static void burst(void **state)
{
    struct token_bucket bucket = bucket_of(100, 1000, 1000, 0);
    assert_int_equal(token_bucket_ready_at(&bucket, 0, 1100), 0);
    token_bucket_take(&bucket, 0, 900);
    token_bucket_take(&bucket, 10 * S, 200);
    assert_int_equal(token_bucket_ready_at(&bucket, 10 * S, 1), 10 * S + 10 * MS);
    assert_int_equal(token_bucket_ready_at(&bucket, 11 * S, 100), 11 * S);
    assert_int_equal(token_bucket_ready_at(&bucket, 20 * S, 101), 20 * S); /* larger than the bucket: when it is full */
}

static void debt(void **state)
{
    struct token_bucket bucket = bucket_of(100, 0, 1000, 0);
    token_bucket_take(&bucket, 0, 100);
    assert_int_equal(token_bucket_ready_at(&bucket, 0, 1000), S);
    token_bucket_take(&bucket, S, 1000);
    assert_int_equal(token_bucket_ready_at(&bucket, S, 1), 10 * S + 10 * MS);
    assert_int_equal(token_bucket_ready_at(&bucket, S, 1000), 11 * S);
    assert_int_equal(token_bucket_take_some(&bucket, 10 * S, 50), 0);
    token_bucket_give_back(&bucket, 30);
    assert_int_equal(token_bucket_take_some(&bucket, 10 * S, 50), 30);
    token_bucket_give_back(&bucket, 1000);
    assert_int_equal(token_bucket_take_some(&bucket, 10 * S, 500), 100);
}

/* Whoever takes as soon as may be gets the rate, whatever the sizes; also one token in three seconds. */
static void long_run(void **state)
{
    static const struct {
        uint64_t size, refill_ms, least, most; /* tokens in 1000 s, after the first bucketful */
    } cases[] = {{100, 1000, 99500, 100500}, {7, 1000, 6950, 7050}, {1, 3000, 332, 334}, {1 << 20, 100, 10435000000, 10537000000}};
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct token_bucket bucket = bucket_of(cases[i].size, 0, cases[i].refill_ms, 0);
        uint64_t now = 0, taken = 0, seed = 1;
        token_bucket_take(&bucket, 0, cases[i].size);
        for (;;) {
            seed = seed * 6364136223846793005 + 1442695040888963407;
            uint64_t tokens = 1 + (seed >> 33) % (2 * cases[i].size);
            uint64_t at = token_bucket_ready_at(&bucket, now, tokens);
            assert_true(at >= now);
            now = at;
            if (now > 1000 * S)
                break;
            assert_int_equal(token_bucket_ready_at(&bucket, now, tokens), now);
            token_bucket_take(&bucket, now, tokens);
            taken += tokens;
        }
        if (taken < cases[i].least || taken > cases[i].most)
            fail_msg("case %u: %llu tokens", i, (unsigned long long)taken);
    }
}

static void edges(void **state)
{
    static const uint64_t values[] = {1, 2, 1000, INT64_MAX, UINT64_MAX};
    for (unsigned i = 0; i < 5; i++)
        for (unsigned j = 0; j < 5; j++)
            for (unsigned k = 0; k < 5; k++) {
                struct token_bucket bucket = bucket_of(values[i], values[j], values[k], 1);
                for (unsigned n = 0; n < 20; n++) {
                    uint64_t now = values[n % 5], tokens = values[(n / 5 + n) % 5];
                    (void)token_bucket_ready_at(&bucket, now, tokens);
                    token_bucket_take(&bucket, now, tokens);
                    (void)token_bucket_take_some(&bucket, now, tokens);
                    token_bucket_give_back(&bucket, tokens);
                    assert_true(bucket.tokens <= bucket.size);
                }
            }
}

static void limiter(void **state)
{
    struct rate_limiter both;
    uint64_t retry = 0;
    rate_limiter_init(&both, &(struct rate_limit_config){.bandwidth = {1000, 0, 1000}, .ops = {2, 0, 1000}}, 0);
    assert_true(rate_limiter_is_set(&both));
    assert_true(rate_limiter_take(&both, 0, 10, &retry));
    assert_true(rate_limiter_take(&both, 0, 10, &retry));
    assert_false(rate_limiter_take(&both, 0, 10, &retry)); /* two operations a second */
    assert_int_equal(retry, 500 * MS);
    assert_true(rate_limiter_take(&both, retry, 990, &retry));
    assert_false(rate_limiter_take(&both, retry, 1000, &retry));
    assert_int_equal(retry, 1490 * MS); /* bandwidth is what is missing longest; neither was taken */
    rate_limiter_give_back(&both, 990);
    assert_true(rate_limiter_take(&both, 600 * MS, 990, &retry));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_limit), cmocka_unit_test(refilling), cmocka_unit_test(burst), cmocka_unit_test(debt),
        cmocka_unit_test(long_run), cmocka_unit_test(edges),     cmocka_unit_test(limiter),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
