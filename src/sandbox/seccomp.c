/*
 * From the rules that are spread over the program (util/sandbox_rules.h) to one filter for each kind of thread. libseccomp compiles them once, before threads start; a
 * thread only loads the finished program. A call without a rule raises SIGSYS: the handler says which thread wanted what, and ends the program.
 * Threading: after creation everything here is constant.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/sandbox_priv.h"

/* What the C library does by itself, in any thread. */
SANDBOX_ALLOW(IN_PROGRAM, futex);
SANDBOX_ALLOW(IN_PROGRAM, rt_sigprocmask);
SANDBOX_ALLOW(IN_PROGRAM, brk);
SANDBOX_ALLOW_IF(IN_PROGRAM, mmap, ARG_LACKS(2, PROT_EXEC));
SANDBOX_ALLOW_IF(IN_PROGRAM, mprotect, ARG_LACKS(2, PROT_EXEC));
SANDBOX_ALLOW(IN_PROGRAM, munmap);
SANDBOX_ALLOW(IN_PROGRAM, mremap);
SANDBOX_ALLOW(IN_PROGRAM, madvise);
SANDBOX_ALLOW(IN_PROGRAM, sched_getaffinity); /* malloc wants the number of processors, for its arenas */
SANDBOX_ALLOW(IN_PROGRAM, clock_gettime);     /* where the kernel's page for it does not know the time */
SANDBOX_ALLOW(IN_PROGRAM, exit);
SANDBOX_ALLOW(IN_ALL & ~IN_SHARE, restart_syscall); /* waits that have an end, after SIGSTOP and SIGCONT */
/* abort(). */
SANDBOX_ALLOW(IN_PROGRAM, getpid);
SANDBOX_ALLOW(IN_PROGRAM, gettid);
SANDBOX_ALLOW(IN_PROGRAM, tgkill); /* only this process can be meant: see add_rule */
/* A call without a rule is told of. */
SANDBOX_ALLOW(IN_ALL, write); /* to what is open; errors are printed, too */
SANDBOX_ALLOW(IN_ALL, exit_group);

extern const struct sandbox_rule __start_sandbox_allow[], __stop_sandbox_allow[];

static const char *const kind_names[SANDBOX_KINDS] = {"main", "loop", "vcpu", "worker", "share", "api", "broker"};

const struct sandbox_rule *sandbox_rules(unsigned *count)
{
    *count = (unsigned)(__stop_sandbox_allow - __start_sandbox_allow);
    return __start_sandbox_allow;
}

const char *sandbox_kind_name(unsigned kind)
{
    return kind && kind < 1u << SANDBOX_KINDS ? kind_names[__builtin_ctz(kind)] : "?";
}

void sandbox_rule_name(char name[SANDBOX_RULE_NAME_BYTES], const struct sandbox_rule *rule, unsigned kind)
{
    static const char *const needs[] = {"user", "vsock", "direct", "kvm"};
    size_t size = SANDBOX_RULE_NAME_BYTES, at = (size_t)snprintf(name, size, "%s:%s", sandbox_kind_name(kind), rule->name);
    if (rule->argument >= 0 && rule->mask == ~0ull)
        at += (size_t)snprintf(name + at, size - at, "(%d=%#llx)", rule->argument, (unsigned long long)rule->value);
    else if (rule->argument >= 0)
        at += (size_t)snprintf(name + at, size - at, "(%d&%#llx=%#llx)", rule->argument, (unsigned long long)rule->mask, (unsigned long long)rule->value);
    for (unsigned n = 0; n < sizeof needs / sizeof *needs; n++)
        if (rule->needs >> n & 1)
            at += (size_t)snprintf(name + at, size - at, "[%s]", needs[n]);
}

static bool is_omitted(const char *omit, unsigned kind, const struct sandbox_rule *rule)
{
    char name[SANDBOX_RULE_NAME_BYTES];
    if (omit)
        sandbox_rule_name(name, rule, kind);
    return omit && strcmp(omit, name) == 0;
}

static int add_rule(scmp_filter_ctx filter, const struct sandbox_rule *rule)
{
    if (rule->number == SYS_tgkill) /* to other processes it says nothing */
        return seccomp_rule_add(filter, SCMP_ACT_ALLOW, rule->number, 1, SCMP_A0(SCMP_CMP_EQ, (scmp_datum_t)getpid()));
    if (rule->argument < 0)
        return seccomp_rule_add(filter, SCMP_ACT_ALLOW, rule->number, 0);
    struct scmp_arg_cmp compare = {.arg = (unsigned)rule->argument, .op = SCMP_CMP_MASKED_EQ, .datum_a = rule->mask, .datum_b = rule->value};
    return seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, rule->number, 1, &compare);
}

/* The filter's instructions, by way of a file in memory: libseccomp gives them no other way. */
static int export_program(scmp_filter_ctx filter, struct sock_fprog *program)
{
    struct stat st;
    int fd = memfd_create("filter", MFD_CLOEXEC), r = fd < 0 ? -errno : seccomp_export_bpf(filter, fd);
    if (r == 0 && fstat(fd, &st) < 0)
        r = -errno;
    if (r == 0) {
        program->len = (unsigned short)((size_t)st.st_size / sizeof(struct sock_filter));
        program->filter = malloc((size_t)st.st_size);
        if (!program->filter)
            r = -ENOMEM;
        else if (pread(fd, program->filter, (size_t)st.st_size, 0) != st.st_size)
            r = -EIO;
    }
    if (fd >= 0)
        close(fd);
    return r;
}

/* What the broker does (broker.c, perform): all of it, or what is relative to the working directory, which is what paths without a descriptor are. */
static const struct {
    int number;
    bool by_directory;
} brokered[] = {{SYS_recvfrom}, {SYS_openat, true}, {SYS_newfstatat, true}, {SYS_rename}, {SYS_unlink}};
/* And of ioctl this one; without a broker it is nobody's. */
#define BROKERED_IOCTL TUNSETIFF

static bool is_brokered(int number)
{
    for (size_t n = 0; n < sizeof brokered / sizeof *brokered; n++)
        if (brokered[n].number == number)
            return true;
    return false;
}

static int add_brokered(scmp_filter_ctx filter)
{
    int r = 0;
    for (size_t n = 0; r == 0 && n < sizeof brokered / sizeof *brokered; n++) {
        const struct scmp_arg_cmp descriptor = SCMP_A0(SCMP_CMP_LT, 1ull << 31), none = SCMP_A0(SCMP_CMP_GE, 1ull << 31); /* AT_FDCWD is negative */
        if (!brokered[n].by_directory) {
            r = seccomp_rule_add(filter, SCMP_ACT_NOTIFY, brokered[n].number, 0);
            continue;
        }
        r = seccomp_rule_add_array(filter, SCMP_ACT_ALLOW, brokered[n].number, 1, &descriptor);
        if (r == 0)
            r = seccomp_rule_add_array(filter, SCMP_ACT_NOTIFY, brokered[n].number, 1, &none);
    }
    const struct scmp_arg_cmp attaches = SCMP_A1(SCMP_CMP_EQ, BROKERED_IOCTL);
    return r ? r : seccomp_rule_add_array(filter, SCMP_ACT_NOTIFY, SYS_ioctl, 1, &attaches);
}

int filter_make(struct sock_fprog *program, unsigned kind, unsigned needs, const char *omit, bool broker)
{
    unsigned count;
    const struct sandbox_rule *rules = sandbox_rules(&count);
    scmp_filter_ctx filter = seccomp_init(SCMP_ACT_TRAP);
    int r = filter ? 0 : -ENOMEM;
    if (r == 0)
        r = seccomp_attr_set(filter, SCMP_FLTATR_CTL_OPTIMIZE, 2); /* a tree: the wanted call is found in few steps */
    if (r == 0)
        r = seccomp_attr_set(filter, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_TRAP); /* INT 0x80 and x32: else only the thread would end, and the program go on without it */
    bool opens = broker, clones = false;
    for (unsigned n = 0; r == 0 && n < count; n++) {
        const struct sandbox_rule *rule = &rules[n];
        if (!(rule->threads & kind) || (rule->needs & needs) != rule->needs || (broker && is_brokered(rule->number)))
            continue;
        opens |= rule->number == SYS_openat;
        clones |= rule->number == SYS_clone;
        if (!is_omitted(omit, kind, rule))
            r = add_rule(filter, rule);
        if (r == -EEXIST)
            r = 0;
    }
    /* The C library's free() looks into /proc/sys/vm/overcommit_memory when it gives an arena's memory back, and does without. */
    if (r == 0 && !opens)
        r = seccomp_rule_add(filter, SCMP_ACT_ERRNO(EACCES), SYS_openat, 0);
    /* Its flags are in memory, where a filter cannot look; the C library does with clone. */
    if (r == 0 && clones)
        r = seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOSYS), SYS_clone3, 0);
    if (r == 0 && broker)
        r = add_brokered(filter);
    if (r == 0)
        r = export_program(filter, program);
    if (filter)
        seccomp_release(filter);
    return r;
}

void filter_free(struct sock_fprog *program)
{
    free(program->filter);
    program->filter = NULL;
}

bool filter_possible(void)
{
    const uint32_t action = SECCOMP_RET_TRAP;
    return syscall(SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, 0, &action) == 0;
}

int filter_load(const struct sock_fprog *program, bool listen)
{
    /* Without SPEC_ALLOW older kernels slow down all that the thread does from here on. */
    const unsigned flags = SECCOMP_FILTER_FLAG_SPEC_ALLOW | (listen ? SECCOMP_FILTER_FLAG_NEW_LISTENER : 0);
    int r = -1;
    /* A call that the broker has begun is not begun again because a signal came: its file would be there already, or what it received be lost. Linux 5.19. */
    if (listen)
        r = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, program);
    if (r < 0)
        r = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, program);
    return r < 0 ? -errno : r;
}

/* ---- when a rule is missing ---- */

static __thread unsigned thread_kind = IN_API; /* for the message; what has a filter and no kind is a thread that one of these made */

void filter_note_kind(unsigned kind)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGSYS);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL); /* blocked, it would end the program without a word */
    thread_kind = kind;
}

static void append(char *line, size_t size, const char *text)
{
    strncat(line, text, size - strlen(line) - 1);
}

static void append_number(char *line, size_t size, unsigned long number)
{
    char digits[24], *at = digits + sizeof digits - 1;
    *at = '\0';
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10);
    append(line, size, at);
}

/* Of the calls that some thread makes. */
static void append_name(char *line, size_t size, int number)
{
    unsigned count;
    const struct sandbox_rule *rules = sandbox_rules(&count);
    for (unsigned n = 0; n < count; n++)
        if (rules[n].number == number) {
            append(line, size, " (");
            append(line, size, rules[n].name);
            append(line, size, ")");
            return;
        }
}

/* Only what a signal handler may do, and what every filter allows. */
static void forbidden(int number, siginfo_t *info, void *context)
{
    char line[160] = "doppel: sandbox: a thread (";
    append(line, sizeof line, sandbox_kind_name(thread_kind));
    append(line, sizeof line, ") tried system call ");
    append_number(line, sizeof line, (unsigned long)info->si_syscall);
    if (info->si_arch == AUDIT_ARCH_X86_64)
        append_name(line, sizeof line, info->si_syscall);
    else
        append(line, sizeof line, " of 32-bit programs");
    append(line, sizeof line, ", which it never makes: stopped\n");
    (void)!write(STDERR_FILENO, line, strlen(line));
    _exit(SANDBOX_EXIT_STATUS);
}

int filter_catch(void)
{
    struct sigaction action = {.sa_sigaction = forbidden, .sa_flags = SA_SIGINFO};
    return sigaction(SIGSYS, &action, NULL) < 0 ? -errno : 0;
}
