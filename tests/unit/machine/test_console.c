/* Console back ends on pipes, files and sockets: bytes pass both ways, back pressure keeps order, bad specifications are named. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "machine/console.h"

struct guest {
    char text[4096];
    size_t count, room;
};

static size_t receive(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct guest *guest = ctx;
    size_t taken = size_bytes < guest->room ? size_bytes : guest->room;
    memcpy(guest->text + guest->count, data, taken);
    guest->count += taken;
    guest->room -= taken;
    return taken;
}

static struct console *open_console(struct loop *loop, const char *spec, struct guest *guest, int in, int out)
{
    struct console *console = NULL;
    struct error err = {0};
    struct console_ops ops = {.receive = receive, .ctx = guest};
    assert_int_equal(console_open(&console, spec, "--console", loop, in, out, &ops, &err), 0);
    return console;
}

static void pipes(void **state)
{
    struct guest guest = {.room = 3};
    struct loop *loop;
    int in[2], out[2];
    char text[16] = "";
    assert_int_equal(loop_create(&loop, NULL), 0);
    assert_int_equal(pipe(in), 0);
    assert_int_equal(pipe(out), 0);
    struct console *console = open_console(loop, "stdio", &guest, in[0], out[1]);
    assert_int_equal(write(in[1], "hello", 5), 5);
    loop_run_once(loop, 1000);
    assert_int_equal(guest.count, 3);
    guest.room = 100;
    console_resume(console);
    assert_int_equal(guest.count, 5);
    assert_memory_equal(guest.text, "hello", 5);
    console_write(console, (const uint8_t *)"world", 5);
    assert_int_equal(read(out[0], text, sizeof text), 5);
    assert_string_equal(text, "world");
    console_close(console);
    loop_destroy(loop);
    for (int i = 0; i < 2; i++) {
        close(in[i]);
        close(out[i]);
    }
}

/* A descriptor that would block is not read when the guest makes room: the caller is a virtual processor. */
static void resume_does_not_block(void **state)
{
    struct guest guest = {.room = 16};
    struct loop *loop;
    int in[2];
    assert_int_equal(loop_create(&loop, NULL), 0);
    assert_int_equal(pipe(in), 0);
    struct console *console = open_console(loop, "stdio", &guest, in[0], -1);
    assert_int_equal(write(in[1], "one line longer than the guest takes", 36), 36);
    loop_run_once(loop, 1000);
    assert_int_equal(guest.count, 16);
    guest.room = 1000;
    console_resume(console);
    console_resume(console);
    assert_int_equal(guest.count, 36);
    assert_int_equal(write(in[1], "next", 4), 4);
    loop_run_once(loop, 1000);
    assert_memory_equal(guest.text, "one line longer than the guest takesnext", 40);
    /* What came before the end of input still arrives after it. */
    guest.room = 0;
    assert_int_equal(write(in[1], "last", 4), 4);
    loop_run_once(loop, 1000);
    close(in[1]);
    loop_run_once(loop, 1000);
    guest.room = 1000;
    console_resume(console);
    assert_memory_equal(guest.text + 40, "last", 4);
    console_close(console);
    loop_destroy(loop);
    close(in[0]);
}

/* A tap hears what a console without any back end says, and types with the back pressure of a guest that is slow. */
static struct {
    char text[64];
    size_t count;
    unsigned rooms;
} heard;

static void hear(void *ctx, const uint8_t *data, size_t size_bytes)
{
    memcpy(heard.text + heard.count, data, size_bytes);
    heard.count += size_bytes;
}

static void hear_room(void *ctx)
{
    heard.rooms++;
}

static void tapped(void **state)
{
    static uint8_t much[100000];
    struct guest guest = {.room = 3};
    struct loop *loop;
    const struct console_tap tap = {.output = hear, .room = hear_room};
    assert_int_equal(loop_create(&loop, NULL), 0);
    struct console *console = open_console(loop, "stdio", &guest, -1, -1);
    console_write(console, (const uint8_t *)"before", 6);
    console_set_tap(console, &tap);
    console_write(console, (const uint8_t *)"said", 4);
    assert_int_equal(heard.count, 4);
    assert_memory_equal(heard.text, "said", 4);
    assert_int_equal(console_type(console, (const uint8_t *)"typed", 5), 5);
    assert_int_equal(guest.count, 3);
    assert_int_equal(heard.rooms, 0);
    memset(much, 'm', sizeof much);
    size_t taken = console_type(console, much, sizeof much);
    assert_true(taken > 0 && taken < sizeof much);
    assert_int_equal(console_type(console, much, sizeof much), 0);
    guest.room = 2;
    console_resume(console);
    assert_memory_equal(guest.text, "typed", 5);
    assert_int_equal(heard.rooms, 0);
    guest.count = 0;
    while (!heard.rooms) {
        guest.count = 0;
        guest.room = 4096;
        console_resume(console);
    }
    assert_true(console_type(console, much, 5) == 5);
    console_set_tap(console, NULL);
    console_write(console, (const uint8_t *)"after", 5);
    assert_int_equal(heard.count, 4);
    console_close(console);
    loop_destroy(loop);
}

static void note_command(void *ctx, int character)
{
    *(int *)ctx = character;
}

static size_t receive_nothing(void *ctx, const uint8_t *data, size_t size_bytes)
{
    return 0;
}

/* The keys for Doppel work on a terminal whose guest takes no input. */
static void commands_to_a_stuck_guest(void **state)
{
    struct loop *loop;
    struct console *console = NULL;
    struct error err = {0};
    int command = 0, terminal, keyboard = posix_openpt(O_RDWR | O_NOCTTY);
    assert_true(keyboard >= 0);
    assert_int_equal(grantpt(keyboard), 0);
    assert_int_equal(unlockpt(keyboard), 0);
    terminal = open(ptsname(keyboard), O_RDWR | O_NOCTTY);
    assert_true(terminal >= 0);
    assert_int_equal(loop_create(&loop, NULL), 0);
    struct console_ops ops = {.receive = receive_nothing, .command = note_command, .ctx = &command};
    assert_int_equal(console_open(&console, "stdio", "--console", loop, terminal, terminal, &ops, &err), 0);
    for (int i = 0; i < 20; i++) {
        assert_int_equal(write(keyboard, "is it dead?\r", 12), 12);
        loop_run_once(loop, 1000);
    }
    assert_int_equal(write(keyboard, "\1x", 2), 2);
    loop_run_once(loop, 1000);
    assert_int_equal(command, 'x');
    console_close(console);
    loop_destroy(loop);
    close(terminal);
    close(keyboard);
}

/* A reader that is slow gets everything in order. */
static void backlog(void **state)
{
    enum { TOTAL = 300000 };
    struct guest guest = {0};
    struct loop *loop;
    int out[2];
    assert_int_equal(loop_create(&loop, NULL), 0);
    assert_int_equal(pipe(out), 0);
    struct console *console = open_console(loop, "stdio", &guest, -1, out[1]);
    uint8_t *sent = malloc(TOTAL), *got = malloc(TOTAL);
    for (int i = 0; i < TOTAL; i++)
        sent[i] = (uint8_t)(i * 7 + i / 251);
    console_write(console, sent, TOTAL);
    size_t count = 0;
    fcntl(out[0], F_SETFL, O_NONBLOCK);
    for (int round = 0; round < 100000 && count < TOTAL; round++) {
        ssize_t n = read(out[0], got + count, TOTAL - count);
        if (n > 0)
            count += (size_t)n;
        loop_run_once(loop, 0);
    }
    assert_int_equal(count, TOTAL);
    assert_memory_equal(sent, got, TOTAL);
    free(sent);
    free(got);
    console_close(console);
    loop_destroy(loop);
    close(out[0]);
    close(out[1]);
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    return fd;
}

/* Input and output of a socket are watched at the same time. */
static void backlog_of_a_socket(void **state)
{
    enum { TOTAL = 900000 };
    struct guest guest = {.room = 100};
    struct loop *loop;
    char spec[80];
    snprintf(spec, sizeof spec, "unix:/tmp/doppel-console-slow-%d", (int)getpid());
    assert_int_equal(loop_create(&loop, NULL), 0);
    struct console *console = open_console(loop, spec, &guest, -1, -1);
    int fd = connect_to(spec + 5);
    loop_run_once(loop, 1000);
    uint8_t *sent = malloc(TOTAL), *got = malloc(TOTAL);
    for (int i = 0; i < TOTAL; i++)
        sent[i] = (uint8_t)(i * 7 + i / 251);
    console_write(console, sent, TOTAL);
    size_t count = 0;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    for (int round = 0; round < 10000 && count < TOTAL; round++) {
        ssize_t n = read(fd, got + count, TOTAL - count);
        if (n > 0)
            count += (size_t)n;
        loop_run_once(loop, 0);
    }
    assert_int_equal(count, TOTAL);
    assert_memory_equal(sent, got, TOTAL);
    assert_int_equal(write(fd, "in", 2), 2);
    loop_run_once(loop, 1000);
    assert_int_equal(guest.count, 2);
    free(sent);
    free(got);
    close(fd);
    console_close(console);
    loop_destroy(loop);
}

/* A client that goes while the guest takes no input makes way for the next one. */
static void client_of_a_stuck_guest_goes(void **state)
{
    static const uint8_t typed[4096];
    struct guest guest = {0};
    struct loop *loop;
    char spec[80], text[8] = "";
    snprintf(spec, sizeof spec, "unix:/tmp/doppel-console-stuck-%d", (int)getpid());
    assert_int_equal(loop_create(&loop, NULL), 0);
    struct console *console = open_console(loop, spec, &guest, -1, -1);
    int fd = connect_to(spec + 5);
    for (int i = 0; i < 40; i++) {
        assert_true(send(fd, typed, sizeof typed, MSG_DONTWAIT) != 0);
        loop_run_once(loop, 0);
    }
    close(fd);
    loop_run_once(loop, 0);
    for (int i = 0; i < 3; i++)
        console_write(console, (const uint8_t *)"lost", 4);
    fd = connect_to(spec + 5);
    loop_run_once(loop, 1000);
    console_write(console, (const uint8_t *)"out", 3);
    assert_int_equal(read(fd, text, sizeof text), 3);
    close(fd);
    console_close(console);
    loop_destroy(loop);
}

static void *read_slowly(void *ctx)
{
    static uint8_t data[4096];
    size_t count = 0;
    for (ssize_t n; (n = read(*(int *)ctx, data, sizeof data)) > 0; count += (size_t)n)
        usleep(500);
    return (void *)count;
}

/* What the guest wrote last is not lost with the machine while somebody reads. */
static void close_writes_the_rest(void **state)
{
    enum { TOTAL = 500000 };
    struct guest guest = {0};
    struct loop *loop;
    int out[2];
    pthread_t reader;
    void *count;
    uint8_t *sent = calloc(1, TOTAL);
    assert_int_equal(loop_create(&loop, NULL), 0);
    assert_int_equal(pipe(out), 0);
    struct console *console = open_console(loop, "stdio", &guest, -1, out[1]);
    console_write(console, sent, TOTAL);
    assert_int_equal(pthread_create(&reader, NULL, read_slowly, &out[0]), 0);
    console_close(console);
    close(out[1]);
    pthread_join(reader, &count);
    assert_int_equal((size_t)count, TOTAL);
    free(sent);
    loop_destroy(loop);
    close(out[0]);
}

/* Nobody reads a terminal: the writer is a virtual processor and must not wait. */
static void terminal_that_stands_still(void **state)
{
    static const uint8_t line[100] = "x";
    struct guest guest = {0};
    struct loop *loop;
    int terminal, screen = posix_openpt(O_RDWR | O_NOCTTY);
    assert_int_equal(grantpt(screen), 0);
    assert_int_equal(unlockpt(screen), 0);
    terminal = open(ptsname(screen), O_RDWR | O_NOCTTY);
    assert_int_equal(loop_create(&loop, NULL), 0);
    struct console *console = open_console(loop, "stdio", &guest, -1, terminal);
    alarm(20);
    for (int i = 0; i < 3000; i++)
        console_write(console, line, sizeof line);
    console_close(console);
    alarm(0);
    loop_destroy(loop);
    close(terminal);
    close(screen);
}

static void sockets(void **state)
{
    struct guest guest = {.room = 100};
    struct loop *loop;
    char spec[80], text[16] = "";
    snprintf(spec, sizeof spec, "unix:/tmp/doppel-console-%d", (int)getpid());
    assert_int_equal(loop_create(&loop, NULL), 0);
    struct console *console = open_console(loop, spec, &guest, -1, -1);
    console_write(console, (const uint8_t *)"lost", 4); /* nobody is there */
    for (int client = 0; client < 2; client++) { /* a second client may come after the first */
        int fd = connect_to(spec + 5);
        loop_run_once(loop, 1000);
        guest.count = 0;
        assert_int_equal(write(fd, "in", 2), 2);
        loop_run_once(loop, 1000);
        assert_int_equal(guest.count, 2);
        console_write(console, (const uint8_t *)"out", 3);
        assert_int_equal(read(fd, text, sizeof text), 3);
        close(fd);
        loop_run_once(loop, 1000);
    }
    console_close(console);
    assert_int_not_equal(access(spec + 5, F_OK), 0);
    loop_destroy(loop);
}

/* The last one is a pipe without a reader. */
static void refusals(void **state)
{
    char pipe_spec[80];
    snprintf(pipe_spec, sizeof pipe_spec, "file:/tmp/doppel-console-pipe-%d", (int)getpid());
    assert_int_equal(mkfifo(pipe_spec + 5, 0600), 0);
    const char *const specs[] = {"file:/nonexistent/x", "unix:/nonexistent/x", "elsewhere", pipe_spec};
    struct guest guest = {0};
    struct loop *loop;
    struct console_ops ops = {.receive = receive, .ctx = &guest};
    assert_int_equal(loop_create(&loop, NULL), 0);
    for (size_t i = 0; i < sizeof specs / sizeof *specs; i++) {
        struct console *console;
        struct error err = {0};
        assert_true(console_open(&console, specs[i], "--console", loop, -1, -1, &ops, &err) < 0);
        assert_non_null(strstr(err.text, "--console"));
    }
    unlink(pipe_spec + 5);
    loop_destroy(loop);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(pipes), cmocka_unit_test(resume_does_not_block), cmocka_unit_test(commands_to_a_stuck_guest),
                                       cmocka_unit_test(backlog), cmocka_unit_test(backlog_of_a_socket), cmocka_unit_test(client_of_a_stuck_guest_goes),
                                       cmocka_unit_test(close_writes_the_rest), cmocka_unit_test(terminal_that_stands_still), cmocka_unit_test(sockets),
                                       cmocka_unit_test(refusals), cmocka_unit_test(tapped)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
