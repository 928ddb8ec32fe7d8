/* The client of a machine's socket: whatever is at the other end, it returns in time, with a message, and keeps a bounded answer. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "control/client.h"
#include "control/instance.h"

static char runtime[64];
static struct instance *instance;
static int listen_fd;

/* What the server says to whoever connects, `repeat` times, and whether it then ends. */
static const struct answer {
    const char *text;
    unsigned repeat;
    bool hangs;
    int result;
    const char *message;
} answers[] = {
    {"", 1, false, -EPROTO, "no answer"},
    {"nonsense", 1, false, -EPROTO, "no answer"},
    {"HTTP/1.1 200 OK\r\nContent-", 1, false, -EPROTO, "no answer"},
    {"HTTP/2 200\r\n\r\n{}", 1, false, -EPROTO, "no answer"},
    {"HTTP/1.1 abc\r\n\r\n{}", 1, false, -EPROTO, "no answer"},
    {"HTTP/1.1 204 No Content\r\n\r\n", 1, false, 0, NULL},
    {"HTTP/1.1 200 OK\r\n\r\n{\"a\": 1}", 1, false, 0, NULL},
    {"HTTP/1.0 200 OK\r\nX: y\r\n\r\n{\"a\": 1}", 1, false, 0, NULL},
    {"HTTP/1.1 200 OK\r\n\r\nno JSON", 1, false, 0, NULL},
    {"HTTP/1.1 400 Bad\r\n\r\n{\"fault_message\": \"not today\"}", 1, false, -EREMOTEIO, "not today"},
    {"HTTP/1.1 500 Bad\r\n\r\n{\"fault_message\": 5}", 1, false, -EREMOTEIO, "refused"},
    {"HTTP/1.1 404 Bad\r\n\r\n[1]", 1, false, -EREMOTEIO, "refused"},
    {"HTTP/1.1 200 OK\r\n\r\n{", 1, true, -ETIMEDOUT, "does not answer"},
    {"", 1, true, -ETIMEDOUT, "does not answer"},
    {"HTTP/1.1 200 OK\r\n", 1 << 19, false, -EMSGSIZE, ""},
};

static void *serve(void *arg)
{
    const struct answer *answer = arg;
    char request[4096] = "";
    size_t count = 0;
    int fd = accept(listen_fd, NULL, NULL);
    while (fd >= 0 && !strchr(request, '}')) { /* all of it: what is not read when a socket is closed is an error at the other end */
        ssize_t n = recv(fd, request + count, sizeof request - 1 - count, 0);
        if (n <= 0)
            break;
        count += (size_t)n;
    }
    for (unsigned i = 0; i < answer->repeat && send(fd, answer->text, strlen(answer->text), MSG_NOSIGNAL) >= 0; i++)
        continue;
    while (answer->hangs && recv(fd, request, sizeof request, 0) > 0)
        continue; /* until the client has given up */
    close(fd);
    return NULL;
}

static void all_answers(void **state)
{
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        struct error err = {0};
        pthread_t server;
        json_t *answer, *body = json_pack("{s:i}", "timeout_s", 1);
        assert_int_equal(pthread_create(&server, NULL, serve, (void *)&answers[i]), 0);
        int r = client_request("vm", "POST", "/doppel/v1/stop", body, answers[i].hangs ? 100 : 60000, &answer, &err);
        pthread_join(server, NULL);
        if (r != answers[i].result)
            fail_msg("answer %zu: %d, not %d: %s", i, r, answers[i].result, err.text);
        if (answers[i].message && (!strstr(err.text, answers[i].message) || strncmp(err.text, "vm: ", 4) != 0))
            fail_msg("answer %zu: \"%s\"", i, err.text);
        assert_true(r == 0 || !answer);
        json_decref(answer);
        json_decref(body);
    }
}

static void nobody(void **state)
{
    struct error err = {0};
    assert_int_equal(client_request("none", "GET", "/", NULL, 1000, NULL, &err), -ENOENT);
    assert_string_equal(err.text, "none: it is not running");
    assert_int_equal(client_request("../vm", "GET", "/", NULL, 1000, NULL, NULL), -ENOENT);
}

static int set_up(void **state)
{
    json_t *vm = json_object();
    snprintf(runtime, sizeof runtime, "/tmp/doppel-client-XXXXXX");
    if (!mkdtemp(runtime) || setenv("XDG_RUNTIME_DIR", runtime, 1) || instance_create(&instance, "vm", vm, NULL))
        return -1;
    json_decref(vm);
    listen_fd = instance_listen(instance, "api.sock", NULL);
    return listen_fd >= 0 && fcntl(listen_fd, F_SETFL, 0) == 0 ? 0 : -1; /* accept waits */
}

static int tear_down(void **state)
{
    char command[128];
    close(listen_fd);
    instance_close(instance, false);
    snprintf(command, sizeof command, "rm -rf %s", runtime);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_answers), cmocka_unit_test(nobody)};
    alarm(100);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
