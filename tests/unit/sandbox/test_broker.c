/*
 * The broker under attack: a thread of the program that somebody has taken over asks it for files, with its memory and all its descriptors at hand, and another plays with both. It gets
 * what the control socket's client has named, and nothing else; the broker neither waits, nor dies, nor collects anything.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "doppel/doppel.h"
#include "sandbox/broker.h"
#include "sandbox/sandbox_priv.h"

#define MANY 5000

static char folder[] = "/tmp/doppel-broker-XXXXXX", named[64], secret[64], pipe_path[64], socket_path[64], said[64];
static struct stat named_stat;
static int broker = -1, listener, accepted, from_here[2];
static pid_t client;
static int orders[2]; /* to the client: what it is to send; closed: it goes */
static char shared_path[64];
static atomic_bool ended; /* the thread that toggles */

/* ---- the taken-over thread ---- */

static int failures;

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            dprintf(STDERR_FILENO, "line %d: %s (%d)\n", __LINE__, #condition, errno); \
            failures++;                                                               \
        }                                                                             \
    } while (0)

static bool opens(const char *path, int flags)
{
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0600);
    if (fd >= 0)
        syscall(SYS_close, fd);
    return fd >= 0;
}

static void order(const char *text)
{
    char data[256];
    (void)!write(orders[1], text, strlen(text));
    while (syscall(SYS_recvfrom, accepted, data, sizeof data, 0, NULL, NULL) < 0 && errno == EAGAIN)
        ;
}

static void nothing_was_named(void)
{
    char data[256];
    CHECK(!opens(named, O_RDONLY) && errno == EACCES);
    /* What the program says to itself is no client's: on a pair, and on a connection to the control socket that it has made. */
    snprintf(data, sizeof data, "{\"path\": \"%s\"}", secret);
    for (int i = 0; i < 2; i++) {
        CHECK(write(from_here[i], data, strlen(data)) > 0);
        CHECK(syscall(SYS_recvfrom, from_here[!i], data, sizeof data, 0, NULL, NULL) > 0);
        CHECK(!opens(secret, O_RDONLY));
    }
}

static void what_was_named(void)
{
    char text[128], path[8192];
    struct stat st;
    snprintf(text, sizeof text, "{\"path\": \"%s\"}", named);
    order(text);
    CHECK(opens(named, O_RDONLY));
    CHECK(!opens(secret, O_RDONLY) && errno == EACCES);
    static const char *const ways[] = {"%s/../secret", "%s/./secret", "//%s/secret", "%s/named/../secret", "%s/named/", "%s//named", "%s/link", "%s/", ""};
    for (size_t n = 0; n < sizeof ways / sizeof *ways; n++) {
        snprintf(path, sizeof path, ways[n], folder);
        CHECK(!opens(path, O_RDONLY));
    }
    snprintf(path, sizeof path, "%s.ABCDEF", secret); /* a draft of what was not named */
    CHECK(!opens(path, O_WRONLY | O_CREAT | O_EXCL));
    CHECK(syscall(SYS_rename, named, secret) < 0 && syscall(SYS_unlink, named) < 0 && syscall(SYS_unlink, secret) < 0);
    CHECK(syscall(SYS_newfstatat, AT_FDCWD, named, &st, 0) == 0 && st.st_ino == named_stat.st_ino);
    CHECK(syscall(SYS_newfstatat, AT_FDCWD, secret, &st, 0) < 0);
    CHECK(syscall(SYS_newfstatat, AT_FDCWD, named, (void *)8, 0) < 0 && errno == EFAULT);
    CHECK(!opens((const char *)8, O_RDONLY) && errno == EFAULT);
    memset(path, 'x', sizeof path);
    CHECK(!opens(path, O_RDONLY) && errno == ENAMETOOLONG);
    CHECK(!opens("/proc/self/environ", O_RDONLY) && !opens("/dev/mem", O_RDONLY) && !opens("/dev/null", O_RDWR) && !opens(".", O_RDONLY | O_DIRECTORY));
}

static int attach(int fd, const char *name, short flags)
{
    struct ifreq request = {.ifr_flags = flags};
    strcpy(request.ifr_name, name);
    return (int)syscall(SYS_ioctl, fd, TUNSETIFF, &request) < 0 ? errno : 0;
}

/* Interfaces: by name, that exist, for tap descriptors only, in one way. Each name is that of an interface that is no tap. */
static void interfaces(void)
{
    const short flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    int tun = (int)syscall(SYS_openat, AT_FDCWD, "/dev/net/tun", O_RDWR); /* hosts may have none */
    int fd = tun < 0 ? accepted : tun;
    CHECK(attach(fd, "lo", flags) == EACCES);
    order("{\"net\": [\"tap:lo,id=x\", \"tap:absent-name\", \"tap:n%d\"]}");
    CHECK(attach(fd, "lo", IFF_TUN | IFF_NO_PI) == EACCES && attach(fd, "lo", flags | IFF_MULTI_QUEUE) == EACCES && attach(fd, "", flags) == EACCES);
    CHECK(attach(fd, "absent-name", flags) == ENODEV && attach(fd, "n%d", flags) == ENODEV && attach(fd, "l", flags) == EACCES);
    CHECK(attach(accepted, "lo", flags) == ENOTTY && attach(-1, "lo", flags) == EBADF);
    CHECK(tun < 0 || attach(tun, "lo", flags) == EINVAL);
    CHECK(syscall(SYS_ioctl, fd, TUNSETIFF, 8) < 0 && errno == EFAULT);
    CHECK(tun < 0 || syscall(SYS_close, tun) == 0);
}

/* The other thread writes another path over this one all the time. */
static void changing_path(void)
{
    unsigned got = 0;
    struct stat st;
    for (int i = 0; i < MANY; i++) {
        int fd = (int)syscall(SYS_openat, AT_FDCWD, shared_path, O_RDONLY);
        if (fd < 0)
            continue;
        CHECK(fstat(fd, &st) == 0 && st.st_ino == named_stat.st_ino);
        close(fd);
        got++;
    }
    atomic_store(&ended, true);
    CHECK(got > 0);
}

/* A named pipe that nobody has at the other end. */
static void pipe_without_end(void)
{
    char text[128];
    snprintf(text, sizeof text, "{\"path\": \"%s\"}", pipe_path);
    order(text);
    CHECK(opens(pipe_path, O_RDONLY));
    CHECK(!opens(pipe_path, O_WRONLY) && errno == ENXIO);
}

static void send_message(const void *data, size_t size, const int *fds, unsigned count)
{
    union {
        char bytes[CMSG_SPACE(8 * sizeof(int))];
        struct cmsghdr align;
    } room = {{0}};
    struct iovec iov = {(void *)(uintptr_t)data, size};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (count) {
        message.msg_control = room.bytes;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(count * sizeof(int))};
        memcpy(CMSG_DATA(header), fds, count * sizeof(int));
    }
    (void)!sendmsg(broker, &message, MSG_NOSIGNAL);
}

/* Messages of any length, kind and number of descriptors: sockets after the doors have closed, listeners that are none. */
static void forged_messages(void)
{
    char data[512] = "";
    const int fds[8] = {from_here[0], from_here[1], accepted, STDERR_FILENO, from_here[0], from_here[1], accepted, STDERR_FILENO};
    CHECK(write(from_here[0], "x", 1) == 1); /* one that has always something to be read */
    for (int i = 0; i < MANY; i++) {
        *(int *)(void *)data = i % 5;
        if (i % 5 == 1) {
            *(unsigned short *)(void *)(data + 16) = AF_UNIX;
            strcpy(data + 18, said);
        }
        send_message(data, i % 7 == 0 ? 128 : (size_t)i % sizeof data, fds, (unsigned)i % 9);
    }
    CHECK(opens(named, O_RDONLY) && !opens(secret, O_RDONLY));
}

static void thousands(void)
{
    for (int i = 0; i < MANY; i++)
        CHECK(opens(i % 2 ? named : secret, O_RDONLY) == i % 2);
}

static void client_goes(void)
{
    char data[16];
    snprintf(data, sizeof data, "{\"half");
    order(data);
    close(orders[1]);
    while (syscall(SYS_recvfrom, accepted, data, sizeof data, 0, NULL, NULL) != 0)
        ;
    CHECK(opens(named, O_RDONLY));
}

static void *taken_over(void *ctx)
{
    struct sock_fprog program;
    static void (*const attacks[])(void) = {nothing_was_named, what_was_named, interfaces, changing_path, pipe_without_end, forged_messages, thousands, client_goes};
    int notifications;
    filter_note_kind(IN_API);
    if (filter_catch() || filter_make(&program, IN_API, 0, NULL, true) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || (notifications = filter_load(&program, true)) < 0 ||
        broker_serve(broker, notifications)) {
        failures++;
        return NULL;
    }
    for (size_t n = 0; n < sizeof attacks / sizeof *attacks; n++)
        attacks[n]();
    return NULL;
}

static void *toggle(void *ctx)
{
    for (unsigned i = 0; !atomic_load(&ended); i++)
        memcpy(shared_path, i % 2 ? named : secret, sizeof named);
    return NULL;
}

/* ---- around it ---- */

static void client_main(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char data[256];
    ssize_t n;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    close(orders[1]);
    strcpy(address.sun_path, socket_path);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        _exit(1);
    while ((n = read(orders[0], data, sizeof data)) > 0)
        if (write(fd, data, (size_t)n) != n)
            _exit(1);
    _exit(0);
}

static int make_file(char path[64], const char *name)
{
    snprintf(path, 64, "%s/%s", folder, name);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    return fd < 0 ? -1 : close(fd);
}

static void test_attacks(void **state)
{
    pthread_t thread, other;
    int status;
    assert_int_equal(pthread_create(&other, NULL, toggle, NULL), 0);
    assert_int_equal(pthread_create(&thread, NULL, taken_over, NULL), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(pthread_join(other, NULL), 0);
    assert_int_equal(failures, 0);
    assert_int_equal(waitpid(client, &status, 0), client);
    assert_int_equal(status, 0);
}

static int setup(void **state)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct doppel_vm *vm;
    struct doppel_config *config = doppel_config_create();
    struct rlimit before, few = {.rlim_cur = 64};
    char link_path[64];
    if (doppel_vm_create(config, &vm, NULL) == 0) /* the rules are spread over the program, so all of it has to be here */
        return -1;
    doppel_config_destroy(config);
    if (!mkdtemp(folder) || make_file(named, "named") || make_file(secret, "secret") || stat(named, &named_stat))
        return -1;
    snprintf(pipe_path, sizeof pipe_path, "%s/pipe", folder);
    snprintf(link_path, sizeof link_path, "%s/link", folder);
    snprintf(socket_path, sizeof socket_path, "%s/control", folder);
    snprintf(said, sizeof said, "%s/other", folder);
    strcpy(shared_path, named);
    strcpy(address.sun_path, socket_path);
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (mkfifo(pipe_path, 0600) || symlink(secret, link_path) || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8) || pipe(orders))
        return -1;
    getrlimit(RLIMIT_NOFILE, &before);
    few.rlim_max = before.rlim_max;
    setrlimit(RLIMIT_NOFILE, &few);
    broker = broker_start(NULL); /* what it collected would soon be too much */
    setrlimit(RLIMIT_NOFILE, &before);
    client = fork();
    if (client == 0)
        client_main();
    close(orders[0]);
    accepted = accept(listener, NULL, NULL);
    int own = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (broker < 0 || accepted < 0 || connect(own, (struct sockaddr *)&address, sizeof address))
        return -1;
    from_here[0] = own;
    from_here[1] = accept(listener, NULL, NULL);
    return broker_add_socket(broker, listener);
}

static int teardown(void **state)
{
    static const char *const names[] = {"named", "secret", "pipe", "link", "control"};
    char path[64];
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[n]);
        unlink(path);
    }
    return rmdir(folder);
}

/* Before the others: what a host without it makes of a broker is sandbox_hosts.py's. */
static void test_doors(void **state)
{
    struct sock_fprog filter = {0};
    if (!filter_possible() || filter_make(&filter, IN_BROKER, 0, NULL, false) || !broker_close_doors(broker, &filter, false)) {
        print_message("no broker on this host\n");
        exit(77);
    }
    filter_free(&filter);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_doors), cmocka_unit_test(test_attacks)};
    return cmocka_run_group_tests(tests, setup, teardown);
}
