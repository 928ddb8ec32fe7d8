/* Looking before sleeping: it is not begun without a reason, grows with short waits, ends with a long one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "util/loop.h"
#include "util/patience.h"

static void test_adapts(void **state)
{
    struct patience patience;
    atomic_bool flag = false;
    patience_init(&patience);
    patience.limit_max_ns = PATIENCE_NS_MAX; /* whatever host this is */
    assert_int_equal(patience.limit_ns, 0);
    assert_false(patience_look(&patience, &flag));
    for (unsigned i = 0; i < 1000 && patience.limit_ns < PATIENCE_NS_MAX; i++) { /* a busy host makes waits long */
        patience.since_ns = loop_now_ns();
        patience_slept(&patience);
    }
    assert_int_equal(patience.limit_ns, PATIENCE_NS_MAX);
    assert_false(patience_look(&patience, &flag));
    assert_true(loop_now_ns() - patience.since_ns >= patience.limit_ns);
    atomic_store(&flag, true);
    assert_true(patience_look(&patience, &flag));
    patience.since_ns = loop_now_ns() - 3 * PATIENCE_NS_MAX;
    patience_slept(&patience);
    assert_int_equal(patience.limit_ns, 0);
    assert_true(patience_look(&patience, &flag));
}

static void test_alone(void **state)
{
    struct patience patience = {0};
    atomic_bool flag = false;
    for (unsigned i = 0; i < 3; i++) {
        assert_false(patience_look(&patience, &flag));
        patience_slept(&patience);
        assert_int_equal(patience.limit_ns, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_adapts), cmocka_unit_test(test_alone)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
