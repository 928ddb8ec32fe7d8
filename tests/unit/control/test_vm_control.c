/* Looking after a machine: what its directory says at each moment, clients of its console and its streams that come, go, and stay beyond the end; logs that stay bounded. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../pvh_kernel.h"
#include "control/client.h"
#include "control/vm_control_priv.h"

#define CLIENTS 12
#define STREAMS 40

/* Sends back what comes at the serial port. */
static const uint8_t echoes[] = {0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x75, 0x04, 0xf3, 0x90, 0xeb, 0xf7, 0xba, 0xf8, 0x03, 0x00, 0x00, 0xec, 0xee, 0xeb, 0xe9};

static char runtime[64];

struct vm {
    struct machine_config config;
    struct machine *machine;
    struct vm_control *control;
    struct http_server *server;
};

static void must(int result, const struct error *err)
{
    if (result)
        fail_msg("%s", err->text);
}

static struct instance *make_instance(void)
{
    struct error err = {0};
    struct instance *instance;
    json_t *object = json_object();
    must(instance_create(&instance, "vm", object, &err), &err);
    json_decref(object);
    return instance;
}

static void start(struct vm *vm)
{
    static const char *const options[][2] = {{"memory", "4M"}, {"net", "none"}, {"engine", "interp"}};
    struct error err = {0};
    char path[96];
    *vm = (struct vm){0};
    snprintf(path, sizeof path, "%s/kernel", runtime);
    pvh_kernel_write(path, echoes, sizeof echoes);
    machine_config_init(&vm->config);
    must(machine_config_set(&vm->config, "kernel", path, &err), &err);
    for (size_t i = 0; i < sizeof options / sizeof *options; i++)
        must(machine_config_set(&vm->config, options[i][0], options[i][1], &err), &err);
    vm->config.input_fd = vm->config.output_fd = -1;
    struct instance *instance = make_instance();
    int listen_fd = instance_listen(instance, "api.sock", &err);
    must(vm_control_create(&vm->control, &(struct vm_control_options){.instance = instance}, &err), &err);
    must(http_server_create(&vm->server, &(struct http_options){.listen_fd = listen_fd}, &err), &err);
    must(vm_control_add_routes(vm->control, vm->server), &err);
    must(http_server_start(vm->server, &err), &err);
    must(machine_create(&vm->machine, &vm->config, &err), &err);
    vm_control_attach(vm->control, vm->machine, &vm->config);
    must(machine_start(vm->machine, &err), &err);
    vm_control_sync(vm->control);
}

static void end(struct vm *vm, bool keep)
{
    machine_stop(vm->machine, MACHINE_STOPPED);
    enum machine_end how = machine_wait(vm->machine);
    vm_control_detach(vm->control, true);
    http_server_destroy(vm->server);
    machine_destroy(vm->machine);
    vm_control_destroy(vm->control, how, 5, keep);
    machine_config_clear(&vm->config);
}

static void check_state(const char *wanted)
{
    struct error err = {0};
    struct instance_info info;
    must(instance_read("vm", &info, &err), &err);
    assert_string_equal(info.state, wanted);
    instance_info_clear(&info);
}

/* Until so much has come. */
static void expect(int fd, const char *text)
{
    char data[64] = "";
    size_t count = 0;
    while (count < strlen(text)) {
        struct pollfd ready = {.fd = fd, .events = POLLIN};
        assert_int_equal(poll(&ready, 1, 60000), 1);
        ssize_t n = read(fd, data + count, strlen(text) - count);
        assert_true(n > 0);
        count += (size_t)n;
    }
    assert_string_equal(data, text);
}

static int request_stream(const char *path)
{
    char request[128];
    int fd = instance_connect("vm", "api.sock");
    int length = snprintf(request, sizeof request, "GET %s HTTP/1.0\r\n\r\n", path);
    assert_true(fd >= 0 && send(fd, request, (size_t)length, MSG_NOSIGNAL) == length);
    return fd;
}

/* ---- tests ---- */

static void states(void **state)
{
    struct vm vm;
    struct error err = {0};
    json_t *answer;
    start(&vm);
    check_state("running");
    must(client_request("vm", "POST", "/doppel/v1/pause", NULL, 60000, NULL, &err), &err);
    check_state("paused");
    must(client_request("vm", "POST", "/doppel/v1/resume", NULL, 60000, NULL, &err), &err);
    check_state("running");
    must(client_request("vm", "GET", "/doppel/v1/statistics", NULL, 60000, &answer, &err), &err);
    assert_true(json_object_size(json_object_get(answer, "counters")) > 40);
    json_decref(answer);
    vm_control_detach(vm.control, false); /* and another machine could come */
    assert_true(client_request("vm", "POST", "/doppel/v1/pause", NULL, 60000, NULL, &err) < 0);
    assert_non_null(strstr(err.text, "not been started"));
    vm_control_attach(vm.control, vm.machine, &vm.config);
    must(client_request("vm", "POST", "/doppel/v1/pause", NULL, 60000, NULL, &err), &err);
    end(&vm, true);
    check_state("ended");
    assert_int_equal(instance_remove("vm", NULL), 0);
    start(&vm);
    end(&vm, false);
    assert_true(instance_connect("vm", "api.sock") < 0);
}

static void console_clients(void **state)
{
    struct vm vm;
    int client[CLIENTS];
    start(&vm);
    for (unsigned i = 0; i < CLIENTS; i++) {
        client[i] = instance_connect("vm", "console.sock");
        assert_true(client[i] >= 0);
    }
    for (unsigned i = 8; i < CLIENTS; i++) { /* more than there is room for */
        char text[64];
        while (read(client[i], text, sizeof text) > 0)
            continue;
        close(client[i]);
    }
    assert_int_equal(send(client[0], "abc", 3, MSG_NOSIGNAL), 3);
    for (unsigned i = 0; i < 8; i++)
        expect(client[i], "abc");
    for (unsigned i = 0; i < 7; i++)
        close(client[i]);
    assert_int_equal(send(client[7], "def", 3, MSG_NOSIGNAL), 3);
    expect(client[7], "def");
    int late = instance_connect("vm", "console.sock");
    assert_int_equal(send(late, "ghi", 3, MSG_NOSIGNAL), 3);
    expect(late, "ghi");
    expect(client[7], "ghi");
    close(late);
    end(&vm, true); /* with one still there */
    char rest[16];
    assert_int_equal(read(client[7], rest, sizeof rest), 0);
    close(client[7]);
    int log = instance_open("vm", "console.log", O_RDONLY);
    expect(log, "abcdefghi");
    close(log);
    assert_int_equal(instance_remove("vm", NULL), 0);
}

static void many_streams(void **state)
{
    struct vm vm;
    int stream[STREAMS];
    unsigned refused = 0;
    char answer[4096];
    start(&vm);
    for (unsigned round = 0; round < 3; round++) {
        for (unsigned i = 0; i < STREAMS; i++)
            stream[i] = request_stream(i % 2 ? "/doppel/v1/events?since=0" : "/doppel/v1/console?recent");
        for (unsigned i = 0; i < STREAMS; i++) {
            ssize_t n = recv(stream[i], answer, sizeof answer - 1, 0);
            answer[n > 0 ? n : 0] = '\0';
            refused += strstr(answer, " 503 ") != NULL;
        }
        assert_true(refused >= STREAMS - HTTP_STREAMS_MAX);
        for (unsigned i = 0; i < STREAMS && round < 2; i++)
            close(stream[i]);
    }
    end(&vm, true); /* the streams end with the machine */
    for (unsigned i = 0; i < STREAMS; i++) {
        while (recv(stream[i], answer, sizeof answer, 0) > 0)
            continue;
        close(stream[i]);
    }
    assert_int_equal(instance_remove("vm", NULL), 0);
}

static void logs_stay_bounded(void **state)
{
    static char piece[300000];
    struct vm_control control = {.instance = make_instance()};
    struct stat now, before;
    uint64_t size = 0;
    int fd = -1;
    memset(piece, 'x', sizeof piece);
    for (unsigned i = 0; i < 50; i++)
        vm_log_append(&control, "console.log", &fd, &size, piece, sizeof piece);
    assert_int_equal(fstatat(instance_dir(control.instance), "console.log", &now, 0), 0);
    assert_int_equal(fstatat(instance_dir(control.instance), "console.log.1", &before, 0), 0);
    assert_true(now.st_size <= 4 << 20 && before.st_size <= 4 << 20 && now.st_size + before.st_size > 4 << 20);
    assert_int_equal((unsigned long long)now.st_size, size);
    close(fd);
    fd = -1; /* a restart goes on where it ended */
    vm_log_append(&control, "console.log", &fd, &size, "end", 3);
    assert_int_equal(size, (unsigned long long)now.st_size + 3);
    close(fd);
    instance_close(control.instance, false);
}

static int set_up(void **state)
{
    snprintf(runtime, sizeof runtime, "/tmp/doppel-control-XXXXXX");
    return mkdtemp(runtime) && setenv("XDG_RUNTIME_DIR", runtime, 1) == 0 ? 0 : -1;
}

static int tear_down(void **state)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", runtime);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(states), cmocka_unit_test(console_clients), cmocka_unit_test(many_streams), cmocka_unit_test(logs_stay_bounded)};
    alarm(110);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
