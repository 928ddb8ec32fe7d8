/*
 * A thread that somebody has taken over, in each part of the program: whatever it tries with the host, by system calls put into it, it gets nothing. Each attempt is made in a process
 * of its own. Some attempts end the program (SIGSYS); others are refused by the kernel.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "doppel/doppel.h"
#include "sandbox/sandbox_priv.h"
#include "util/log.h"

#define STOPPED 148 /* by the filter */
#define REFUSED 10  /* by the kernel */
#define DONE 11     /* the attempt came through */
#define BROKEN 12

static pid_t parent; /* asked for beforehand: attempts make only the calls that they are about */
static char victim[8]; /* of writes to other processes */
static char secret[] = "/tmp/doppel-sandbox-XXXXXX", socket_path[sizeof secret + 8], spare_path[sizeof secret + 8];

static int try_open(void)
{
    return open(secret, O_RDONLY);
}

static int try_openat2(void)
{
    uint64_t how[3] = {O_RDONLY};
    return (int)syscall(SYS_openat2, AT_FDCWD, secret, how, sizeof how);
}

static int try_create(void)
{
    char path[64];
    snprintf(path, sizeof path, "%s.new", secret);
    return open(path, O_WRONLY | O_CREAT, 0600);
}

static int try_unix(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strcpy(address.sun_path, socket_path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return fd < 0 ? fd : connect(fd, (struct sockaddr *)&address, sizeof address);
}

static int try_packet(void)
{
    return socket(AF_PACKET, SOCK_RAW, 0);
}

static int try_netlink(void)
{
    return socket(AF_NETLINK, SOCK_RAW, 0);
}

static int try_exec(void)
{
    char *const arguments[] = {(char *)"true", NULL};
    return execve("/bin/true", arguments, arguments + 1);
}

static int try_execveat(void)
{
    char *const arguments[] = {(char *)"true", NULL};
    return (int)syscall(SYS_execveat, AT_FDCWD, "/bin/true", arguments, arguments + 1, AT_EMPTY_PATH);
}

static int try_shell(void)
{
    return system("true") == 0 ? 0 : -1;
}

static int try_kill(void)
{
    return kill(parent, SIGUSR1);
}

static int try_ptrace(void)
{
    return (int)ptrace(PTRACE_SEIZE, parent, NULL, NULL);
}

static int try_peek(void)
{
    char data[8];
    struct iovec here = {data, sizeof data}, there = {secret, sizeof data};
    return (int)syscall(SYS_process_vm_readv, parent, &here, 1, &there, 1, 0);
}

static int try_user(void)
{
    return (int)syscall(SYS_setresuid, 0, 0, 0);
}

static int try_namespace(void)
{
    return unshare(CLONE_NEWUSER);
}

static int try_mount(void)
{
    return (int)syscall(SYS_mount, "none", "/", "tmpfs", 0, NULL);
}

static int try_ring(void)
{
    uint32_t parameters[32] = {0};
    return (int)syscall(SYS_io_uring_setup, 4, parameters);
}

static int try_pidfd(void)
{
    return (int)syscall(SYS_pidfd_open, parent, 0);
}

static int try_bpf(void)
{
    return (int)syscall(SYS_bpf, 0, NULL, 0);
}

static int try_chroot(void)
{
    return chroot("..") == 0 && chdir("/tmp") == 0 ? 0 : -1;
}

static int try_links(void)
{
    char path[64];
    snprintf(path, sizeof path, "%s.link", secret);
    return link(secret, path);
}

static int try_remove(void)
{
    return unlink(spare_path);
}

static int try_internet(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(9), .sin_addr = {htonl(INADDR_LOOPBACK)}};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    return fd < 0 ? fd : connect(fd, (struct sockaddr *)&address, sizeof address);
}

static int try_fork(void)
{
    return (int)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0);
}

static int try_clone3(void)
{
    uint64_t arguments[8] = {0, 0, 0, 0, SIGCHLD};
    return (int)syscall(SYS_clone3, arguments, sizeof arguments);
}

static int try_poke(void)
{
    char data[8] = "";
    struct iovec here = {data, sizeof data}, there = {victim, sizeof data};
    return (int)syscall(SYS_process_vm_writev, parent, &here, 1, &there, 1, 0);
}

static int try_userfaultfd(void)
{
    return (int)syscall(SYS_userfaultfd, O_CLOEXEC);
}

static int try_perf(void)
{
    uint64_t attributes[16] = {128ull << 32};
    return (int)syscall(SYS_perf_event_open, attributes, 0, -1, -1, 0);
}

static int try_setns(void)
{
    return (int)syscall(SYS_setns, STDIN_FILENO, 0);
}

static int try_keyring(void)
{
    return (int)syscall(SYS_keyctl, 0, -3, 1);
}

static int try_personality(void)
{
    return (int)syscall(SYS_personality, 0x0400000); /* READ_IMPLIES_EXEC */
}

/* As if somebody had typed it. */
static int try_typing(void)
{
    return (int)syscall(SYS_ioctl, STDIN_FILENO, TIOCSTI, "x");
}

static int try_tracer(void)
{
    return prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}

static int try_dumpable(void)
{
    return prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
}

static int try_securebits(void)
{
    return prctl(PR_SET_SECUREBITS, 0, 0, 0, 0);
}

static int try_kill_all(void)
{
    return kill(-1, 0);
}

static int try_tgkill(void)
{
    return (int)syscall(SYS_tgkill, parent, parent, 0);
}

static int try_pidfd_signal(void)
{
    return (int)syscall(SYS_pidfd_send_signal, STDIN_FILENO, SIGKILL, NULL, 0);
}

static int try_code(void)
{
    return mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0;
}

static int try_make_code(void)
{
    static _Alignas(4096) char page[4096];
    return (int)syscall(SYS_mprotect, page, sizeof page, PROT_READ | PROT_EXEC);
}

static int try_memory_file(void)
{
    return (int)syscall(SYS_memfd_create, "x", 0);
}

#define WITH(needs) ((needs) << 8)

/* `allowed`: what else has it, by design: kinds of threads, or WITH what configuration a vCPU or the loop does. */
static const struct attempt {
    const char *name;
    int (*run)(void);
    unsigned allowed;
} attempts[] = {
    {"open a file", try_open, IN_BROKER},
    {"open a file in another way", try_openat2},
    {"create a file", try_create, IN_BROKER},
    {"connect to the Internet", try_internet, WITH(SANDBOX_NET_USER) | IN_LOOP},
    {"make a process", try_fork},
    {"make a process in another way", try_clone3},
    {"write to another process", try_poke, IN_BROKER},
    {"make a userfaultfd", try_userfaultfd},
    {"watch the processor", try_perf},
    {"enter a namespace", try_setns},
    {"join a keyring", try_keyring},
    {"change its personality", try_personality},
    {"type on the terminal", try_typing},
    {"let all trace it", try_tracer},
    {"become dumpable", try_dumpable},
    {"loosen what privileges mean", try_securebits},
    {"signal all processes", try_kill_all},
    {"signal a thread of another process", try_tgkill},
    {"signal by a descriptor", try_pidfd_signal},
    {"map code", try_code, WITH(SANDBOX_DIRECT) | IN_VCPU},
    {"make code of memory", try_make_code},
    {"make a file of memory", try_memory_file, WITH(SANDBOX_DIRECT) | IN_VCPU},
    {"connect to a Unix socket", try_unix},
    {"make a packet socket", try_packet},
    {"make a netlink socket", try_netlink},
    {"execute a program", try_exec},
    {"execute a program in another way", try_execveat},
    {"start a shell", try_shell},
    {"signal another process", try_kill},
    {"trace another process", try_ptrace},
    {"read another process", try_peek, IN_BROKER},
    {"become root", try_user},
    {"make a namespace", try_namespace},
    {"mount", try_mount},
    {"make an io_uring", try_ring},
    {"open a process", try_pidfd},
    {"load a program into the kernel", try_bpf},
    {"leave the root directory", try_chroot},
    {"link a file", try_links},
    {"remove a file", try_remove, IN_BROKER},
};

struct injected {
    const struct sandbox *sandbox;
    unsigned kind;
    int (*run)(void);
};

static void *thread_main(void *ctx)
{
    struct injected *injected = ctx;
    struct error err = {0};
    struct sock_fprog program;
    if (injected->kind == IN_BROKER) { /* a process, which has no more than this */
        filter_note_kind(IN_BROKER);
        if (filter_make(&program, IN_BROKER, 0, NULL, false) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || filter_load(&program, false) < 0)
            _exit(BROKEN);
    } else if (sandbox_enter(injected->sandbox, injected->kind, &err)) {
        fprintf(stderr, "%s\n", err.text);
        _exit(BROKEN);
    }
    syscall(SYS_exit_group, injected->run() < 0 ? REFUSED : DONE); /* not by _exit(): before that, the address sanitizer makes calls of its own */
    return NULL;
}

/* In a new process: a thread of this kind tries. Returns the process's status. */
static int attempt_status(unsigned kind, unsigned needs, const struct sandbox_path *paths, unsigned path_count, int (*run)(void))
{
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct sandbox_config config = {.broker = -1, .needs = needs, .host_network = needs & SANDBOX_NET_USER, .paths = paths, .path_count = path_count};
        struct injected injected = {.kind = kind, .run = run};
        struct error err = {0};
        pthread_t thread;
        struct sandbox *sandbox;
        int null = open("/dev/null", O_WRONLY);
        dup2(null, STDERR_FILENO); /* the filter's line */
        sandbox_begin();
        if (sandbox_create(&sandbox, &config, &err))
            _exit(BROKEN);
        injected.sandbox = sandbox;
        if (pthread_create(&thread, NULL, thread_main, &injected))
            _exit(BROKEN);
        pthread_join(thread, NULL);
        _exit(BROKEN);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static bool is_allowed(const struct attempt *attempt, unsigned kind, unsigned needs)
{
    return attempt->allowed & kind && (attempt->allowed >> 8 & needs) == attempt->allowed >> 8;
}

static void check_kind(unsigned kind, unsigned needs)
{
    for (size_t n = 0; n < sizeof attempts / sizeof *attempts; n++) {
        close(open(spare_path, O_WRONLY | O_CREAT, 0600)); /* one may be removed */
        int status = attempt_status(kind, needs, NULL, 0, attempts[n].run);
        bool nothing = status == STOPPED || status == REFUSED || status == -SIGSYS; /* the kernel may refuse what the filter allows: Landlock keeps a broker to its program */
        if (is_allowed(&attempts[n], kind, needs) ? status != DONE && status != REFUSED : !nothing)
            fail_msg("a thread (%s, needs %u) and: %s: status %d", sandbox_kind_name(kind), needs, attempts[n].name, status);
    }
}

static void hijacked(void **state)
{
    for (unsigned kind = 1; kind < 1u << SANDBOX_KINDS; kind <<= 1) {
        check_kind(kind, 0);
        if (kind & IN_GUEST)
            check_kind(kind, SANDBOX_DIRECT | SANDBOX_NET_USER);
    }
}

/* Without the sandbox they come through: the attempts are real. */
static void attempts_are_real(void **state)
{
    static int (*const sure[])(void) = {try_open, try_openat2, try_create, try_unix, try_internet, try_shell, try_code, try_memory_file, try_dumpable};
    for (size_t n = 0; n < sizeof sure / sizeof *sure; n++)
        assert_true(sure[n]() >= 0);
}

static int use_named(void)
{
    char data[8] = "";
    int fd = open(secret, O_RDONLY);
    return fd < 0 || read(fd, data, sizeof data) != 6 || memcmp(data, "secret", 6) != 0 ? -1 : 0;
}

static int write_named(void)
{
    return open(secret, O_WRONLY);
}

/* A sanitizer's runtime has needs of its own. */
static void skip_if_sanitized(void)
{
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    skip();
#endif
}

/* What is named may be used, as it was named. */
static void named_paths(void **state)
{
    skip_if_sanitized();
    const struct sandbox_path path = {secret, false, IN_LOOP};
    assert_int_equal(attempt_status(IN_LOOP, SANDBOX_NET_USER, &path, 1, use_named), DONE);
    assert_int_equal(attempt_status(IN_LOOP, SANDBOX_NET_USER, &path, 1, write_named), REFUSED);
    assert_int_not_equal(attempt_status(IN_VCPU, SANDBOX_NET_USER, &path, 1, use_named), DONE);
}

static int do_nothing(void)
{
    return 0;
}

static int change_memory(void)
{
    void *memory = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED || munmap(memory, 65536) ? -1 : 0;
}

static void what_is_left(void **state)
{
    skip_if_sanitized();
    for (unsigned kind = 1; kind < 1u << SANDBOX_KINDS; kind <<= 1) {
        assert_int_equal(attempt_status(kind, 0, NULL, 0, do_nothing), DONE);
        assert_int_equal(attempt_status(kind, 0, NULL, 0, change_memory), kind == IN_BROKER ? STOPPED : DONE);
        assert_int_equal(attempt_status(kind, 0, NULL, 0, try_code), STOPPED);
    }
}

/* The rules are spread over the program, so all of it has to be here. */
static int setup(void **state)
{
    struct doppel_vm *vm;
    struct doppel_config *config = doppel_config_create();
    if (doppel_vm_create(config, &vm, NULL) == 0)
        return -1;
    doppel_config_destroy(config);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = mkstemp(secret), listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(socket_path, sizeof socket_path, "%s.sock", secret);
    snprintf(spare_path, sizeof spare_path, "%s.spare", secret);
    strcpy(address.sun_path, socket_path);
    signal(SIGUSR1, SIG_IGN);
    parent = getpid();
    log_set_level(LOG_ERROR);
    return fd < 0 || write(fd, "secret", 6) != 6 || fchmod(fd, 0644) || close(fd) || listener < 0 ||
           bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64);
}

static int teardown(void **state)
{
    char path[64];
    unlink(socket_path);
    unlink(spare_path);
    snprintf(path, sizeof path, "%s.new", secret);
    unlink(path);
    snprintf(path, sizeof path, "%s.link", secret);
    unlink(path);
    return unlink(secret);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attempts_are_real),
        cmocka_unit_test(hijacked),
        cmocka_unit_test(named_paths),
        cmocka_unit_test(what_is_left),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
