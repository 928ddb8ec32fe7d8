/* Logging into a pipe that nobody reads: nothing waits, what is lost is counted, and told when there is room. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "util/log.h"

static void test_full_pipe(void **state)
{
    static char data[1 << 20];
    int ends[2], kept = dup(STDERR_FILENO);
    assert_int_equal(pipe(ends), 0);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    dup2(ends[1], STDERR_FILENO);
    log_never_wait();
    for (unsigned n = 0; n < 5000; n++) /* some 200 KiB */
        log_error("message number %u, which is one of very many", n);
    ssize_t full = read(ends[0], data, sizeof data);
    log_error("and now");
    ssize_t more = read(ends[0], data + full, sizeof data - 1 - (size_t)full);
    dup2(kept, STDERR_FILENO);
    close(kept);
    close(ends[0]);
    close(ends[1]);
    assert_true(full > 4096 && more > 0);
    unsigned lines = 0, lost = 0;
    for (ssize_t n = 0; n < full; n++)
        lines += data[n] == '\n';
    assert_int_equal(data[full - 1], '\n'); /* whole lines */
    assert_int_equal(sscanf(data + full, "doppel: warning: %u messages before this one were lost", &lost), 1);
    assert_int_equal(lines + lost, 5000);
    assert_non_null(strstr(data + full, "doppel: error: and now\n"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_full_pipe)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
