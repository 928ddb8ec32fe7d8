/*
 * A thread that somebody has taken over, in each part of the program: whatever it tries with the host, by system calls put into it, it gets nothing. Each attempt is made in a process
 * of its own. Some attempts end the program (SIGSYS); others are refused by the kernel. And each kind's filter as a program: what it allows is what there are rules for, of all system calls,
 * by each way into the kernel.
 *
 * `test_sandbox container`: the same as a user without rights where neither namespaces nor Landlock are to be had, as in many containers: filters are all there is.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
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
#define NOBODY 65534u
#define X32 0x40000000u /* in a number: the 32-bit calls of 64-bit programs */
#define NUMBERS 1024u   /* more than there are */

static pid_t parent; /* asked for beforehand: attempts make only the calls that they are about */
static char victim[8]; /* of writes to other processes */
static int other_namespace, other_process, terminal; /* descriptors */
static char *low;                                    /* the secret's path where 32-bit calls can name it */
static bool is_container;
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
    uint32_t attributes[16] = {2, 4, 4, 1}; /* an array of one word */
    return (int)syscall(SYS_bpf, 0, attributes, sizeof attributes);
}

static int try_chroot(void)
{
    return chroot("/tmp");
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
    uint64_t attributes[16] = {128ull << 32 | 1}; /* the processor's time, in software */
    return (int)syscall(SYS_perf_event_open, attributes, 0, -1, -1, 0);
}

static int try_setns(void)
{
    return (int)syscall(SYS_setns, other_namespace, 0);
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
    return (int)syscall(SYS_ioctl, terminal, TIOCSTI, "x");
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
    return (int)syscall(SYS_pidfd_send_signal, other_process, 0, NULL, 0);
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

static int try_descriptor(void)
{
    return (int)syscall(SYS_pidfd_getfd, other_process, STDIN_FILENO, 0);
}

static int try_shared_memory(void)
{
    return (int)syscall(SYS_shmget, 0, 4096, 01600);
}

static int try_mount_tree(void)
{
    return (int)syscall(SYS_open_tree, AT_FDCWD, "/", 1 /* OPEN_TREE_CLONE */);
}

static int try_file_system(void)
{
    return (int)syscall(SYS_fsopen, "tmpfs", 0);
}

static int try_limits(void)
{
    return (int)syscall(SYS_prlimit64, parent, 7, NULL, (uint64_t[2]){0});
}

static int try_socket_pair(void)
{
    return socketpair(AF_UNIX, SOCK_STREAM, 0, (int[2]){0});
}

static int try_memory_advice(void)
{
    struct iovec there = {victim, 0};
    return (int)syscall(SYS_process_madvise, other_process, &there, 1, 21 /* MADV_PAGEOUT */, 0);
}

static int try_watch(void)
{
    return (int)syscall(SYS_inotify_init1, 0);
}

/* The ways of 32-bit programs. In 64-bit code INT 0x80 takes registers' lower halves, and numbers of its own. */
static int int80(unsigned number, uint32_t a, uint32_t b, uint32_t c)
{
    long result;
    __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c) : "r8", "r9", "r10", "r11", "memory");
    return (int)result;
}

static int try_open_32(void)
{
    return int80(5, (uint32_t)(uintptr_t)low, O_RDONLY, 0);
}

static int try_socket_32(void)
{
    return int80(359, AF_UNIX, SOCK_STREAM, 0);
}

static int try_kill_32(void)
{
    return int80(37, (uint32_t)parent, SIGUSR1, 0);
}

static int try_exec_32(void)
{
    return int80(11, (uint32_t)(uintptr_t)low, 0, 0) == -EACCES ? 0 : -1; /* it is found, and no program */
}

static int try_open_x32(void)
{
    return (int)syscall(SYS_open | X32, secret, O_RDONLY);
}

static int try_kill_x32(void)
{
    return (int)syscall(SYS_kill | X32, parent, SIGUSR1);
}

#define WITH(needs) ((needs) << 8)

/* Where it comes through without the sandbox: it must, or the attempt shows nothing. */
enum reality {
    ANYWHERE,
    AS_ROOT,
    BY_CHANCE, /* kernels may be built or set up to refuse it */
};

/*
 * `allowed`: what else has it, by design: kinds of threads, or WITH what configuration a vCPU or the loop does. `bare`: kinds that have it besides where there is no Landlock: they work on the
 * user's files then as the user. (The loop reads /etc/resolv.conf, with user networking.)
 */
static const struct attempt {
    const char *name;
    int (*run)(void);
    unsigned allowed, bare;
    enum reality reality;
} attempts[] = {
    {"open a file", try_open, IN_BROKER, IN_MAIN | IN_LOOP | IN_SHARE | IN_API, ANYWHERE},
    {"open a file in another way", try_openat2, 0, IN_SHARE, ANYWHERE},
    {"open a file by INT 0x80", try_open_32, 0, 0, BY_CHANCE},
    {"open a file as an x32 program does", try_open_x32, 0, 0, BY_CHANCE},
    {"create a file", try_create, IN_BROKER, IN_MAIN | IN_SHARE | IN_API, ANYWHERE},
    {"connect to the Internet", try_internet, WITH(SANDBOX_NET_USER) | IN_LOOP, 0, ANYWHERE},
    {"make a process", try_fork, 0, 0, ANYWHERE},
    {"make a process in another way", try_clone3, 0, 0, ANYWHERE},
    {"write to another process", try_poke, IN_BROKER, 0, AS_ROOT},
    {"make a userfaultfd", try_userfaultfd, 0, 0, BY_CHANCE},
    {"watch the processor", try_perf, 0, 0, BY_CHANCE},
    {"enter a namespace", try_setns, 0, 0, AS_ROOT},
    {"join a keyring", try_keyring, 0, 0, BY_CHANCE},
    {"change its personality", try_personality, 0, 0, ANYWHERE},
    {"type on the terminal", try_typing, 0, 0, AS_ROOT},
    {"let all trace it", try_tracer, 0, 0, BY_CHANCE},
    {"become dumpable", try_dumpable, 0, 0, ANYWHERE},
    {"loosen what privileges mean", try_securebits, 0, 0, AS_ROOT},
    {"signal all processes", try_kill_all, 0, 0, ANYWHERE},
    {"signal a thread of another process", try_tgkill, 0, 0, ANYWHERE},
    {"signal by a descriptor", try_pidfd_signal, 0, 0, ANYWHERE},
    {"take another process's descriptor", try_descriptor, IN_BROKER, 0, AS_ROOT},
    {"give up another process's memory", try_memory_advice, 0, 0, BY_CHANCE},
    {"limit another process", try_limits, WITH(SANDBOX_DIRECT) | IN_VCPU, 0, AS_ROOT},
    {"map code", try_code, WITH(SANDBOX_DIRECT) | IN_VCPU, 0, ANYWHERE},
    {"make code of memory", try_make_code, 0, 0, ANYWHERE},
    {"make a file of memory", try_memory_file, WITH(SANDBOX_DIRECT) | IN_VCPU, 0, ANYWHERE},
    {"make shared memory", try_shared_memory, 0, 0, BY_CHANCE},
    {"connect to a Unix socket", try_unix, 0, 0, ANYWHERE},
    {"make a pair of sockets", try_socket_pair, 0, 0, ANYWHERE},
    {"make a socket by INT 0x80", try_socket_32, 0, 0, BY_CHANCE},
    {"make a packet socket", try_packet, 0, 0, AS_ROOT},
    {"make a netlink socket", try_netlink, 0, 0, ANYWHERE},
    {"watch files", try_watch, 0, 0, ANYWHERE},
    {"execute a program", try_exec, 0, 0, ANYWHERE},
    {"execute a program in another way", try_execveat, 0, 0, ANYWHERE},
    {"execute a program by INT 0x80", try_exec_32, 0, 0, BY_CHANCE},
    {"start a shell", try_shell, 0, 0, ANYWHERE},
    {"signal another process", try_kill, 0, 0, ANYWHERE},
    {"signal another process by INT 0x80", try_kill_32, 0, 0, BY_CHANCE},
    {"signal another process as an x32 program does", try_kill_x32, 0, 0, BY_CHANCE},
    {"trace another process", try_ptrace, 0, 0, AS_ROOT},
    {"read another process", try_peek, IN_BROKER, 0, AS_ROOT},
    {"become root", try_user, 0, 0, AS_ROOT},
    {"make a namespace", try_namespace, 0, 0, BY_CHANCE},
    {"mount", try_mount, 0, 0, AS_ROOT},
    {"copy what is mounted", try_mount_tree, 0, 0, AS_ROOT},
    {"make a file system", try_file_system, 0, 0, AS_ROOT},
    {"make an io_uring", try_ring, 0, 0, BY_CHANCE},
    {"open a process", try_pidfd, 0, 0, ANYWHERE},
    {"load a program into the kernel", try_bpf, 0, 0, AS_ROOT},
    {"leave the root directory", try_chroot, 0, 0, AS_ROOT},
    {"link a file", try_links, 0, 0, ANYWHERE},
    {"remove a file", try_remove, IN_BROKER, IN_API, ANYWHERE},
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
        struct sandbox *sandbox = NULL;
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
    if (is_container && attempt->bare & kind && (kind != IN_LOOP || needs & SANDBOX_NET_USER))
        return true;
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

/* Without the sandbox they come through: the attempts are real. Each in a process with mounts of its own. */
static void attempts_are_real(void **state)
{
    for (size_t n = 0; n < sizeof attempts / sizeof *attempts; n++) {
        close(open(spare_path, O_WRONLY | O_CREAT, 0600));
        pid_t pid = fork();
        if (pid == 0) {
            if (geteuid() == 0 && (unshare(CLONE_NEWNS) || syscall(SYS_mount, NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)))
                _exit(REFUSED);
            _exit(attempts[n].run() < 0 ? REFUSED : DONE);
        }
        int status = 0;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        bool came = WIFEXITED(status) && (WEXITSTATUS(status) == DONE || WEXITSTATUS(status) == 0 /* a program was executed */);
        if (!came && (attempts[n].reality == ANYWHERE || (attempts[n].reality == AS_ROOT && geteuid() == 0)))
            fail_msg("without the sandbox, too: %s: status %#x", attempts[n].name, status);
        if (!came)
            print_message("not on this host in any case: %s\n", attempts[n].name);
    }
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
    assert_int_equal(attempt_status(IN_LOOP, SANDBOX_NET_USER, &path, 1, write_named), STOPPED);
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

/* ---- filters as programs ---- */

/* What the kernel would do. Classic BPF, as much of it as filters are made of. */
static uint32_t verdict(const struct sock_fprog *program, const struct seccomp_data *data)
{
    uint32_t a = 0;
    for (const struct sock_filter *at = program->filter;; at++) {
        assert_true(at < program->filter + program->len);
        switch (at->code) {
        case BPF_LD | BPF_W | BPF_ABS:
            assert_true(at->k + 4 <= sizeof *data);
            memcpy(&a, (const char *)data + at->k, 4);
            break;
        case BPF_ALU | BPF_AND | BPF_K:
            a &= at->k;
            break;
        case BPF_JMP | BPF_JA:
            at += at->k;
            break;
        case BPF_JMP | BPF_JEQ | BPF_K:
            at += a == at->k ? at->jt : at->jf;
            break;
        case BPF_JMP | BPF_JGT | BPF_K:
            at += a > at->k ? at->jt : at->jf;
            break;
        case BPF_JMP | BPF_JGE | BPF_K:
            at += a >= at->k ? at->jt : at->jf;
            break;
        case BPF_RET | BPF_K:
            return at->k;
        default:
            fail_msg("an instruction that this test does not know: %#x", at->code);
        }
    }
}

static bool has_rule(unsigned kind, unsigned needs, const struct seccomp_data *data)
{
    unsigned count;
    const struct sandbox_rule *rules = sandbox_rules(&count);
    for (unsigned n = 0; n < count; n++)
        if (rules[n].number == data->nr && rules[n].threads & kind && (rules[n].needs & needs) == rules[n].needs &&
            (rules[n].argument < 0 || (data->args[rules[n].argument] & rules[n].mask) == rules[n].value) && (data->nr != SYS_tgkill || data->args[0] == (uint64_t)getpid()))
            return data->arch == AUDIT_ARCH_X86_64;
    return false;
}

static void check_call(const struct sock_fprog *program, unsigned kind, unsigned needs, const struct seccomp_data *data)
{
    uint32_t action = verdict(program, data);
    bool harmless = action == (SECCOMP_RET_ERRNO | EACCES) || action == (SECCOMP_RET_ERRNO | ENOSYS); /* the C library does without */
    bool expected = has_rule(kind, needs, data) ? action == SECCOMP_RET_ALLOW : action == SECCOMP_RET_TRAP || (harmless && (data->nr == SYS_openat || data->nr == SYS_clone3));
    if (!expected)
        fail_msg("a thread (%s, needs %u), system call %#x(%#llx, %#llx, %#llx ...) of architecture %#x: %#x", sandbox_kind_name(kind), needs, (unsigned)data->nr,
                 (unsigned long long)data->args[0], (unsigned long long)data->args[1], (unsigned long long)data->args[2], data->arch, action);
}

static void check_filter(unsigned kind, unsigned needs)
{
    static const uint32_t ways[] = {AUDIT_ARCH_X86_64, AUDIT_ARCH_I386, AUDIT_ARCH_AARCH64};
    struct sock_fprog program;
    unsigned count;
    const struct sandbox_rule *rules = sandbox_rules(&count);
    assert_int_equal(filter_make(&program, kind, needs, NULL, false), 0);
    for (unsigned way = 0; way < sizeof ways / sizeof *ways; way++)
        for (uint32_t number = 0; number <= NUMBERS; number++)
            for (unsigned n = 0; n < 4; n++) {
                struct seccomp_data data = {.nr = (int)(number == NUMBERS ? ~0u : number | (n & 1 ? X32 : 0)), .arch = ways[way]};
                memset(data.args, n & 2 ? 0xff : 0, sizeof data.args);
                check_call(&program, kind, needs, &data);
            }
    for (unsigned rule = 0; rule < count; rule++) /* what the conditions of arguments are about, and each bit beside it */
        for (unsigned bit = 0; bit <= 64; bit++) {
            struct seccomp_data data = {.nr = rules[rule].number, .arch = AUDIT_ARCH_X86_64};
            if (rules[rule].argument >= 0)
                data.args[rules[rule].argument] = rules[rule].value ^ (bit < 64 ? 1ull << bit : 0);
            else if (rules[rule].number == SYS_tgkill)
                data.args[0] = (uint64_t)getpid() ^ (bit < 64 ? 1ull << bit : 0);
            check_call(&program, kind, needs, &data);
        }
    filter_free(&program);
}

static void filters_allow_what_rules_say(void **state)
{
    for (unsigned kind = 1; kind < 1u << SANDBOX_KINDS; kind <<= 1)
        for (unsigned needs = 0; needs < 16; needs++)
            check_filter(kind, needs);
}

/* What waits for the broker, and what of the same calls does not. */
static void filters_send_to_the_broker(void **state)
{
    static const struct {
        int number;
        uint64_t first, second;
        uint32_t action;
    } calls[] = {
        {SYS_recvfrom, 5, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_openat, 5, 0, SECCOMP_RET_ALLOW},
        {SYS_openat, (uint64_t)AT_FDCWD, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_openat, (uint32_t)AT_FDCWD, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_openat, 1ull << 32, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_newfstatat, INT32_MAX, 0, SECCOMP_RET_ALLOW},
        {SYS_newfstatat, (uint64_t)AT_FDCWD, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_rename, 0, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_unlink, 0, 0, SECCOMP_RET_USER_NOTIF},
        {SYS_ioctl, 5, TUNSETIFF, SECCOMP_RET_USER_NOTIF},
        {SYS_ioctl, 5, TIOCSTI, SECCOMP_RET_TRAP},
        {SYS_open, 0, 0, SECCOMP_RET_TRAP},
        {SYS_futex, 0, 0, SECCOMP_RET_ALLOW},
    };
    struct sock_fprog program;
    assert_int_equal(filter_make(&program, IN_API, 0, NULL, true), 0);
    for (size_t n = 0; n < sizeof calls / sizeof *calls; n++) {
        struct seccomp_data data = {.nr = calls[n].number, .arch = AUDIT_ARCH_X86_64, .args = {calls[n].first, calls[n].second}};
        assert_int_equal(verdict(&program, &data), calls[n].action);
        data.arch = AUDIT_ARCH_I386;
        assert_int_equal(verdict(&program, &data), SECCOMP_RET_TRAP);
    }
    filter_free(&program);
}

/* ---- the tests ---- */

/* What many containers refuse. */
static void enter_container(void)
{
    static struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_unshare, 7, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_setns, 6, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_fsopen, 5, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mount, 4, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_landlock_create_ruleset, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_landlock_add_rule, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_landlock_restrict_self, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
    };
    const struct sock_fprog program = {sizeof code / sizeof *code, code};
    if (geteuid() == 0 && (setgroups(0, NULL) || setresgid(NOBODY, NOBODY, NOBODY) || setresuid(NOBODY, NOBODY, NOBODY)))
        exit(BROKEN);
    if (prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program))
        exit(77);
    is_container = true;
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
    other_namespace = open("/proc/self/ns/uts", O_RDONLY | O_CLOEXEC);
    other_process = (int)syscall(SYS_pidfd_open, parent, 0);
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    terminal = master < 0 || grantpt(master) || unlockpt(master) ? -1 : open(ptsname(master), O_RDWR | O_NOCTTY | O_CLOEXEC);
    low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (low == MAP_FAILED)
        return -1;
    log_set_level(LOG_ERROR);
    strcpy(low, secret);
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

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(attempts_are_real),
        cmocka_unit_test(hijacked),
        cmocka_unit_test(filters_allow_what_rules_say),
        cmocka_unit_test(filters_send_to_the_broker),
        cmocka_unit_test(named_paths),
        cmocka_unit_test(what_is_left),
    };
    if (argc > 1 && strcmp(argv[1], "container") == 0) {
        enter_container();
        cmocka_set_test_filter("hijacked"); /* there are no paths to be named, and the rest is as it was */
    }
    return cmocka_run_group_tests(tests, setup, teardown);
}
