/*
 * From the rules that are spread over the program (util/sandbox_rules.h) to one filter for each kind of thread. They are made once, before threads start; a
 * thread only loads the finished program. A call without a rule raises SIGSYS: the handler says which thread wanted what, and ends the program.
 * Threading: after creation everything here is constant.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sandbox/filter_program.h"
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

/* As many cases as there are rules, and a few of our own. */
struct case_list {
    struct filter_case *item;
    unsigned count;
};

static void add_case(struct case_list *list, int number, int argument, uint64_t mask, uint64_t value, uint32_t action)
{
    list->item[list->count++] = (struct filter_case){number, argument, mask, value, action};
}

static void add_rule(struct case_list *list, const struct sandbox_rule *rule)
{
    if (rule->number == SYS_tgkill) /* to other processes it says nothing */
        add_case(list, SYS_tgkill, ARG_IS(0, (uint64_t)getpid()), SECCOMP_RET_ALLOW);
    else
        add_case(list, rule->number, rule->argument, rule->mask, rule->value, SECCOMP_RET_ALLOW);
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

static void add_brokered(struct case_list *list)
{
    const uint64_t negative = ~0ull << 31; /* descriptors lack these bits; AT_FDCWD has them, as 32 bits or as 64 */
    for (size_t n = 0; n < sizeof brokered / sizeof *brokered; n++) {
        if (brokered[n].by_directory)
            add_case(list, brokered[n].number, ARG_LACKS(0, negative), SECCOMP_RET_ALLOW);
        add_case(list, brokered[n].number, -1, 0, 0, SECCOMP_RET_USER_NOTIF);
    }
    add_case(list, SYS_ioctl, ARG_IS(1, BROKERED_IOCTL), SECCOMP_RET_USER_NOTIF);
}
#define OWN_CASES_MAX (2 + 2 * sizeof brokered / sizeof *brokered + 1)

int filter_make(struct sock_fprog *program, unsigned kind, unsigned needs, const char *omit, bool broker)
{
    unsigned count;
    const struct sandbox_rule *rules = sandbox_rules(&count);
    struct case_list list = {.item = calloc(count + OWN_CASES_MAX, sizeof *list.item)};
    bool opens = broker, clones = false;
    if (!list.item)
        return -ENOMEM;
    for (unsigned n = 0; n < count; n++) {
        const struct sandbox_rule *rule = &rules[n];
        if (!(rule->threads & kind) || (rule->needs & needs) != rule->needs || (broker && is_brokered(rule->number)))
            continue;
        opens |= rule->number == SYS_openat;
        clones |= rule->number == SYS_clone;
        if (!is_omitted(omit, kind, rule))
            add_rule(&list, rule);
    }
    /* The C library's free() looks into /proc/sys/vm/overcommit_memory when it gives an arena's memory back, and does without. */
    if (!opens)
        add_case(&list, SYS_openat, -1, 0, 0, SECCOMP_RET_ERRNO | EACCES);
    /* Its flags are in memory, where a filter cannot look; the C library does with clone. */
    if (clones)
        add_case(&list, SYS_clone3, -1, 0, 0, SECCOMP_RET_ERRNO | ENOSYS);
    if (broker)
        add_brokered(&list);
    int r = filter_program(program, list.item, list.count, SECCOMP_RET_TRAP);
    free(list.item);
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
