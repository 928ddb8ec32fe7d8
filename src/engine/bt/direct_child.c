/*
 * The sandboxed process of direct execution: made, filled and driven through ptrace.
 *
 * The program is made here, in a memfd: one page with a loop that executes a list of mmap and munmap calls from the pages behind it. The tracer uses its SYSCALL instruction for
 * setting the process up too. Guest code never runs but under PTRACE_SYSEMU, so that page is of no use to it; the filter allows what the loop needs all the same, and nothing else.
 *
 * A kick is a byte in a pipe whose reader is the process: the kernel sends it a signal then, on behalf of the thread that made it. Other threads may not be allowed to send signals there: in the
 * sandbox they are other users.
 * Threading: the tracer's only, but for direct_child_kick.
 */
#include "engine/bt/direct_child.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#undef PF_W /* of a program header; cpu.h's is of a page fault */
#include "arch/cpu.h"
#include "util/sandbox_rules.h"

#define PTRACE_SIGMASK_SET ((enum __ptrace_request)0x420b)

/* Making a process, in it before it is ready, and driving it. The filter of the thread is its, too, under its own. */
#define ALLOW(call) SANDBOX_ALLOW_WITH(SANDBOX_DIRECT, IN_VCPU, call)
#define ALLOW_IF(call, ...) SANDBOX_ALLOW_WITH_IF(SANDBOX_DIRECT, IN_VCPU, call, __VA_ARGS__)
ALLOW(memfd_create);
ALLOW(ftruncate);
ALLOW(getrandom);
ALLOW(vfork);
ALLOW_IF(fcntl, ARG_IS(1, F_DUPFD));
ALLOW_IF(fcntl, ARG_IS(1, F_DUPFD_CLOEXEC));
ALLOW(pipe2);
ALLOW_IF(fcntl, ARG_IS(1, F_SETOWN));
ALLOW_IF(fcntl, ARG_IS(1, F_SETSIG));
ALLOW_IF(fcntl, ARG_IS(1, F_SETFL));
ALLOW(read); /* kicks */
ALLOW(dup2);
ALLOW_IF(execveat, ARG_HAS(4, AT_EMPTY_PATH));
ALLOW(mmap); /* code, too */
ALLOW(close_range);
ALLOW(setsid);
ALLOW_IF(prctl, ARG_IS(0, PR_SET_PDEATHSIG));
ALLOW_IF(prctl, ARG_IS(0, PR_SET_TSC));
ALLOW_IF(prctl, ARG_IS(0, PR_SET_NO_NEW_PRIVS));
ALLOW(seccomp);
/* Of what asked to be traced only: neither PTRACE_ATTACH nor PTRACE_SEIZE. */
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_TRACEME));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_SETOPTIONS));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_SIGMASK_SET));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_GETREGS));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_SETREGS));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_GETREGSET));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_SETREGSET));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_GETSIGINFO));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_PEEKTEXT));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_POKEUSER));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_CONT));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_SINGLESTEP));
ALLOW_IF(ptrace, ARG_IS(0, PTRACE_SYSEMU));
ALLOW(prlimit64);
SANDBOX_ALLOW_WITH(SANDBOX_DIRECT, IN_VCPU | IN_MAIN, wait4);
#undef ALLOW
#undef ALLOW_IF

#define PAGE 4096u
#ifndef MFD_EXEC
#define MFD_EXEC 0x10u /* <sys/mman.h> is often older than the kernel */
#endif
#define KICK_SIGNAL SIGUSR1
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define RAM_FD 3
#define LIST_FD 4
#define MAP_FLAGS (MAP_SHARED | MAP_FIXED | MAP_POPULATE)
#define USER_CS 0x33
#define USER_SS 0x2b
#define XSTATE_BYTES_MAX 16384u
#define HEADER_BYTES 128u /* of the ELF file: its header and one program header */
#define XSAVE_SOFTWARE 464u /* to 511: not the processor's; the kernel puts marks of its own there */
#define XSAVE_HEADER 512u
#define XSAVE_MXCSR 24u
#define XSAVE_XMM 160u
#define XSAVE_XMM_BYTES 256u
#define MXCSR_INITIAL 0x1f80u

/* One call of the list: the loop's layout. */
struct command {
    uint64_t number, address, bytes, prot, flags, fd, offset;
};

#define COMMANDS_MAX ((DIRECT_HIDDEN_BYTES - PAGE) / sizeof(struct command))

/* Executes RBP calls from RBX on; stops with what is left in RBP and the last result in RAX. */
static const uint8_t loop_code[] = {
    0x48, 0x85, 0xed,       /* 00 test rbp, rbp */
    0x74, 0x30,             /* 03 jz 35 */
    0x48, 0x8b, 0x03,       /* 05 mov rax, [rbx] */
    0x48, 0x8b, 0x7b, 0x08, /* 08 mov rdi, [rbx + 8] */
    0x48, 0x8b, 0x73, 0x10, /* 0c mov rsi, [rbx + 16] */
    0x48, 0x8b, 0x53, 0x18, /* 10 mov rdx, [rbx + 24] */
    0x4c, 0x8b, 0x53, 0x20, /* 14 mov r10, [rbx + 32] */
    0x4c, 0x8b, 0x43, 0x28, /* 18 mov r8, [rbx + 40] */
    0x4c, 0x8b, 0x4b, 0x30, /* 1c mov r9, [rbx + 48] */
    0x0f, 0x05,             /* 20 syscall */
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, /* 22 cmp rax, -4095 */
    0x73, 0x0b,             /* 28 jae 35 */
    0x48, 0x83, 0xc3, 0x38, /* 2a add rbx, 56 */
    0x48, 0xff, 0xcd,       /* 2e dec rbp */
    0xeb, 0xcd,             /* 31 jmp 00 */
    0x90, 0x90,
    0xcc,                   /* 35 int3 */
};
#define LOOP_SYSCALL 0x20u
#define LOOP_SYSCALL_END 0x22u
#define LOOP_BREAKPOINT 0x35u
#define LOOP_END 0x36u
#define INJECT_TRAPPED (-4096l) /* beyond what system calls return: some filter's signal instead */

/*
 * What the loop calls, exactly. The kernel itself does the calls of the vsyscall page for code that jumps there, without asking the tracer (SYSEMU) but asking the filter: these
 * become a signal, and are the guest's to do. Nothing else gets as far as the filter.
 */
#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define IF_EQUAL(value, then, otherwise) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, then, otherwise)
static const struct sock_filter filter[] = {
    LOAD(arch),
    IF_EQUAL(AUDIT_ARCH_X86_64, 0, 11),
    LOAD(nr),
    IF_EQUAL(SYS_munmap, 8, 0),
    IF_EQUAL(SYS_gettimeofday, 9, 0),
    IF_EQUAL(SYS_time, 8, 0),
    IF_EQUAL(SYS_getcpu, 7, 0),
    IF_EQUAL(SYS_mmap, 0, 5),
    LOAD(args[3]),
    IF_EQUAL(MAP_FLAGS, 0, 3),
    LOAD(args[4]),
    IF_EQUAL(RAM_FD, 0, 1),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
};
#define FILTER_LENGTH (sizeof(filter) / sizeof(filter[0]))

/* The page as it is in the file, too. */
struct hidden_page {
    uint8_t elf[HEADER_BYTES];
    uint8_t code[128];
    struct sock_fprog program;
    struct sock_filter filter[FILTER_LENGTH];
};
_Static_assert(sizeof(loop_code) <= 128 && sizeof(struct hidden_page) <= PAGE, "one page");

struct direct_child {
    pid_t pid, tracer;
    uint64_t hidden;          /* address of its hidden pages */
    struct command *commands; /* the list, as mapped here */
    unsigned count;
    unsigned xstate_bytes; /* what this kernel wants */
    uint8_t *vectors;      /* as the process has them, when known */
    bool vectors_known;
    uint64_t fault_address;
    uint64_t fixed_flags; /* RFLAGS.ID as it has it */
    int error; /* of a list that did not fit, so was executed before its time */
    int cpu;
    int kicks[2]; /* a pipe, or -1 */
    uint64_t cpu_ns; /* processor time it has had */
};

/* ---- the program ---- */

static void page_make(struct hidden_page *page, uint64_t address)
{
    Elf64_Ehdr *header = (Elf64_Ehdr *)page->elf;
    Elf64_Phdr *segment = (Elf64_Phdr *)(page->elf + sizeof(*header));
    _Static_assert(sizeof(*header) + sizeof(*segment) <= HEADER_BYTES, "both fit");
    memset(page, 0, sizeof(*page));
    memcpy(header->e_ident, ELFMAG, SELFMAG);
    header->e_ident[EI_CLASS] = ELFCLASS64;
    header->e_ident[EI_DATA] = ELFDATA2LSB;
    header->e_ident[EI_VERSION] = EV_CURRENT;
    header->e_type = ET_EXEC;
    header->e_machine = EM_X86_64;
    header->e_version = EV_CURRENT;
    header->e_entry = address + offsetof(struct hidden_page, code);
    header->e_phoff = sizeof(*header);
    header->e_ehsize = sizeof(*header);
    header->e_phentsize = sizeof(*segment);
    header->e_phnum = 1;
    *segment = (Elf64_Phdr){.p_type = PT_LOAD, .p_flags = PF_R | PF_X, .p_vaddr = address, .p_paddr = address, .p_filesz = PAGE, .p_memsz = PAGE, .p_align = PAGE};
    memcpy(page->code, loop_code, sizeof(loop_code));
    page->program = (struct sock_fprog){FILTER_LENGTH, (struct sock_filter *)(address + offsetof(struct hidden_page, filter))};
    memcpy(page->filter, filter, sizeof(filter));
}

/* Somewhere between where programs and where their libraries and stacks usually are. */
static uint64_t address_choose(void)
{
    uint64_t random = 0;
    if (getrandom(&random, sizeof(random), GRND_NONBLOCK) < 0)
        random = (uint64_t)(uintptr_t)&random >> 4;
    return 0x600000000000ull + (random & 0xfffffffull) * 0x10000;
}

/* Hosts may want to be told that it is a program (vm.memfd_noexec); older kernels do not know the word. */
static int program_create(uint64_t address)
{
    uint8_t page[PAGE] = {0};
    int fd = memfd_create("doppel-direct", MFD_CLOEXEC | MFD_EXEC);
    if (fd < 0 && errno == EINVAL)
        fd = memfd_create("doppel-direct", MFD_CLOEXEC);
    page_make((struct hidden_page *)page, address);
    if (fd >= 0 && write(fd, page, PAGE) != PAGE) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static int list_create(struct direct_child *child)
{
    int fd = memfd_create("doppel-direct-list", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, DIRECT_HIDDEN_BYTES - PAGE))
        return fd < 0 ? fd : (close(fd), -1);
    void *at = mmap(NULL, DIRECT_HIDDEN_BYTES - PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        close(fd);
        return -1;
    }
    child->commands = at;
    return fd;
}

/* What went wrong, for people. */
struct trouble {
    const char *what;
    int error;
};

/* In the new process, on the memory of the old one, which waits: system calls only. Comes back in *trouble only. */
static _Noreturn void child_begin(int program_fd, int ram_fd, int list_fd, volatile struct trouble *trouble)
{
    static const char *const none[] = {NULL};
    /* Above the numbers that are wanted, so that none of them is overwritten. */
    int ram = fcntl(ram_fd, F_DUPFD, 10), list = fcntl(list_fd, F_DUPFD, 10), program = fcntl(program_fd, F_DUPFD_CLOEXEC, 10);
    trouble->what = "its descriptors";
    if (ram >= 0 && list >= 0 && program >= 0 && dup2(ram, RAM_FD) == RAM_FD && dup2(list, LIST_FD) == LIST_FD && close(ram) == 0 && close(list) == 0) {
        trouble->what = "PTRACE_TRACEME";
        if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) == 0) {
            trouble->what = "execveat";
            syscall(SYS_execveat, program, "", none, none, AT_EMPTY_PATH);
        }
    }
    trouble->error = errno;
    _exit(1);
}

/* ---- stops ---- */

static uint64_t nanoseconds(struct timeval t)
{
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_usec * 1000;
}

static bool wait_stop(struct direct_child *child, int *status)
{
    struct rusage usage;
    pid_t got;
    do
        got = wait4(child->pid, status, __WALL, &usage);
    while (got < 0 && errno == EINTR);
    if (got != child->pid || !WIFSTOPPED(*status)) {
        child->pid = 0; /* the number may be another process's from now on */
        return false;
    }
    child->cpu_ns = nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime);
    return true;
}

/* Of kicks that have come nothing is left in the pipe: a full one would make no more of them. */
static void kicks_take(const struct direct_child *child)
{
    char bytes[64];
    while (read(child->kicks[0], bytes, sizeof(bytes)) == sizeof(bytes))
        ;
}

/* A signal that somebody sent, and not the processor. */
static bool was_sent(const struct direct_child *child, const siginfo_t *info)
{
    if (info->si_signo == KICK_SIGNAL)
        kicks_take(child);
    return info->si_signo == KICK_SIGNAL || info->si_code <= 0;
}

static bool stopped_itself(const struct direct_child *child)
{
    siginfo_t info;
    return ptrace(PTRACE_GETSIGINFO, child->pid, NULL, &info) || !was_sent(child, &info);
}

static struct user_regs_struct regs_at(uint64_t rip)
{
    return (struct user_regs_struct){.rip = rip, .cs = USER_CS, .ss = USER_SS, .orig_rax = ~0ull};
}

static uint64_t code_address(const struct direct_child *child, unsigned offset)
{
    return child->hidden + offsetof(struct hidden_page, code) + offset;
}

/* The process executes one system call. Its result, INJECT_TRAPPED, or -ESRCH. */
static long inject(struct direct_child *child, long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
    struct user_regs_struct regs = regs_at(code_address(child, LOOP_SYSCALL));
    int status;
    regs.rax = (uint64_t)number;
    regs.rdi = a, regs.rsi = b, regs.rdx = c, regs.r10 = d, regs.r8 = e, regs.r9 = f;
    if (ptrace(PTRACE_SETREGS, child->pid, NULL, &regs))
        return -ESRCH;
    do /* signals from outside may come first, and are dropped */
        if (ptrace(PTRACE_SINGLESTEP, child->pid, NULL, NULL) || !wait_stop(child, &status))
            return -ESRCH;
    while (!stopped_itself(child));
    if (ptrace(PTRACE_GETREGS, child->pid, NULL, &regs) || regs.rip != code_address(child, LOOP_SYSCALL_END))
        return -ESRCH;
    return WSTOPSIG(status) == SIGTRAP ? (long)regs.rax : INJECT_TRAPPED;
}

/* ---- setting up ---- */

static int inject_all(struct direct_child *child, const char **what)
{
    const uint64_t page = child->hidden, list = page + PAGE, end = page + DIRECT_HIDDEN_BYTES;
    const struct {
        const char *what;
        long number;
        uint64_t a, b, c, d, e, f;
    } calls[] = {
        {"munmap", SYS_munmap, 0, page, 0, 0, 0, 0},
        {"munmap", SYS_munmap, list, DIRECT_ADDRESS_LIMIT - list, 0, 0, 0, 0},
        {"mmap", SYS_mmap, list, end - list, PROT_READ, MAP_SHARED | MAP_FIXED, LIST_FD, 0},
        {"close_range", SYS_close_range, 0, RAM_FD - 1, 0, 0, 0, 0},
        {"close_range", SYS_close_range, RAM_FD + 1, ~0u, 0, 0, 0, 0},
        {"setsid", SYS_setsid, 0, 0, 0, 0, 0, 0},
        {"PR_SET_PDEATHSIG", SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0, 0},
        {"PR_SET_TSC", SYS_prctl, PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0, 0},
        {"PR_SET_NO_NEW_PRIVS", SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0},
        {"seccomp", SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, page + offsetof(struct hidden_page, program), 0, 0, 0},
    };
    for (unsigned n = 0; n < sizeof(calls) / sizeof(calls[0]); n++) {
        long rc = inject(child, calls[n].number, calls[n].a, calls[n].b, calls[n].c, calls[n].d, calls[n].e, calls[n].f);
        if (rc < 0 && rc >= INJECT_TRAPPED) {
            *what = calls[n].what;
            return rc == INJECT_TRAPPED ? -EPERM : (int)rc;
        }
    }
    return 0;
}

/* direct_child_run, and again after signals from outside. */
static enum direct_stop run_settled(struct direct_child *child, struct user_regs_struct *regs)
{
    enum direct_stop stop;
    unsigned patience = 1000;
    do
        stop = direct_child_run(child, regs);
    while (stop == DIRECT_KICKED && --patience);
    return stop;
}

/*
 * Everything that guest code will be driven by, once: hosts that pretend to have it, or whose filters allow some of ptrace, would lose a guest by it later, or never stop it. Neither
 * the signal nor the two instructions do anything.
 */
static int try_all(struct direct_child *child, const char **what)
{
    static const uint64_t nowhere[DIRECT_BREAKPOINTS];
    struct iovec io = {child->vectors, child->xstate_bytes};
    siginfo_t info = {0};
    struct user_regs_struct kicked = regs_at(code_address(child, LOOP_SYSCALL)), called = kicked, trapped = regs_at(code_address(child, LOOP_BREAKPOINT));
    *what = "PTRACE_SETREGSET";
    if (ptrace(PTRACE_SETREGSET, child->pid, NT_X86_XSTATE, &io))
        return -errno;
    *what = "breakpoints";
    int rc = direct_child_break_at(child, nowhere);
    if (rc)
        return rc;
    *what = "PTRACE_CONT";
    direct_child_map(child, 0, child->hidden, 0, PROT_NONE);
    rc = direct_child_flush(child);
    if (rc)
        return rc;
    *what = "a filter of system calls";
    child->commands[child->count++] = (struct command){.number = SYS_getcpu};
    if (direct_child_flush(child) != -EFAULT || ptrace(PTRACE_GETSIGINFO, child->pid, NULL, &info) || info.si_signo != SIGSYS)
        return -EPERM;
    child->error = 0;
    *what = "PTRACE_SYSEMU";
    if (run_settled(child, &called) != DIRECT_SYSCALL || called.rip != code_address(child, LOOP_SYSCALL_END) || run_settled(child, &trapped) != DIRECT_TRAP)
        return -EPERM;
    *what = "a signal to it";
    if (pipe2(child->kicks, O_CLOEXEC | O_NONBLOCK) || fcntl(child->kicks[0], F_SETOWN, child->pid) || fcntl(child->kicks[0], F_SETSIG, KICK_SIGNAL) ||
        fcntl(child->kicks[0], F_SETFL, O_NONBLOCK | O_ASYNC))
        return -errno;
    direct_child_kick(direct_child_kicker(child));
    return direct_child_run(child, &kicked) == DIRECT_KICKED ? 0 : -EPERM;
}

/* -errno with *what; as it was: the program was not reached. */
static int set_up(struct direct_child *child, const char **what)
{
    const struct rlimit no_core = {0, 0};
    uint64_t no_signals = 0;
    struct iovec io = {child->vectors, XSTATE_BYTES_MAX};
    int status;
    do /* the program's beginning is one; signals from outside may come first */
        if (!wait_stop(child, &status))
            return -EPERM;
    while (WSTOPSIG(status) != SIGTRAP && !ptrace(PTRACE_CONT, child->pid, NULL, NULL));
    if (WSTOPSIG(status) != SIGTRAP)
        return -EPERM;
    *what = "its limits";
    if (prlimit(child->pid, RLIMIT_CORE, &no_core, NULL))
        return -errno;
    *what = "ptrace";
    if (ptrace(PTRACE_SETOPTIONS, child->pid, NULL, PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD) || ptrace(PTRACE_SIGMASK_SET, child->pid, 8, &no_signals) ||
        ptrace(PTRACE_GETREGSET, child->pid, NT_X86_XSTATE, &io))
        return -errno;
    child->xstate_bytes = (unsigned)io.iov_len;
    int rc = inject_all(child, what);
    return rc ? rc : try_all(child, what);
}

/* The process, on a program made for it. */
static void child_start(struct direct_child *child, int ram_fd, struct trouble *trouble)
{
    int program = program_create(child->hidden), list = program < 0 ? -1 : list_create(child);
    volatile struct trouble began = {"its start", 0}; /* the new process writes to it */
    if (list < 0)
        *trouble = (struct trouble){"memory for it", errno};
    else if ((child->pid = vfork()) == 0)
        child_begin(program, ram_fd, list, &began);
    else if (child->pid < 0)
        *trouble = (struct trouble){"no process", errno};
    else
        trouble->error = -set_up(child, &trouble->what);
    if (trouble->error && !trouble->what)
        *trouble = (struct trouble){began.what, began.error ? began.error : EPERM};
    if (program >= 0)
        close(program);
    if (list >= 0)
        close(list);
}

int direct_child_create(struct direct_child **out, int ram_fd, struct error *err)
{
    struct trouble trouble = {NULL, 0};
    struct direct_child *child = calloc(1, sizeof(*child));
    uint8_t *vectors = calloc(1, XSTATE_BYTES_MAX);
    if (!child || !vectors) {
        free(child);
        free(vectors);
        return error_set(err, -ENOMEM, "no memory for a process");
    }
    child->vectors = vectors;
    child->tracer = gettid();
    child->hidden = address_choose();
    child->cpu = child->kicks[0] = child->kicks[1] = -1;
    child_start(child, ram_fd, &trouble);
    if (trouble.error) {
        direct_child_destroy(child);
        return error_set(err, -trouble.error, "%s: %s", trouble.what, strerror(trouble.error));
    }
    *out = child;
    return 0;
}

void direct_child_destroy(struct direct_child *child)
{
    /* It stands still, and is killed as it goes on. Those of a thread that has ended the kernel kills (PTRACE_O_EXITKILL). */
    bool stays = child->pid > 0 && child->tracer == gettid() && ptrace(PTRACE_CONT, child->pid, NULL, SIGKILL);
    while (child->pid > 0 && waitpid(child->pid, NULL, __WALL | (stays ? WNOHANG : 0)) < 0 && errno == EINTR)
        ;
    if (child->commands)
        munmap(child->commands, DIRECT_HIDDEN_BYTES - PAGE);
    for (unsigned n = 0; n < 2; n++)
        if (child->kicks[n] >= 0)
            close(child->kicks[n]);
    free(child->vectors);
    free(child);
}

/* ---- mappings ---- */

void direct_child_map(struct direct_child *child, uint64_t address, uint64_t bytes, uint64_t offset, int prot)
{
    if (child->count == COMMANDS_MAX && !child->error)
        child->error = direct_child_flush(child);
    if (child->error)
        return;
    child->commands[child->count++] = prot ? (struct command){SYS_mmap, address, bytes, (uint64_t)prot, MAP_FLAGS, RAM_FD, offset}
                                           : (struct command){.number = SYS_munmap, .address = address, .bytes = bytes};
}

void direct_child_unmap_all(struct direct_child *child)
{
    uint64_t end = child->hidden + DIRECT_HIDDEN_BYTES;
    direct_child_map(child, 0, child->hidden, 0, PROT_NONE);
    direct_child_map(child, end, DIRECT_ADDRESS_LIMIT - end, 0, PROT_NONE);
}

int direct_child_flush(struct direct_child *child)
{
    struct user_regs_struct regs = regs_at(code_address(child, 0));
    int status, rc = child->error;
    if (!child->count || rc)
        return rc;
    regs.rbx = child->hidden + PAGE;
    regs.rbp = child->count;
    struct user_regs_struct start = regs;
    do { /* signals from outside may come first */
        regs = start;
        if (ptrace(PTRACE_SETREGS, child->pid, NULL, &regs) || ptrace(PTRACE_CONT, child->pid, NULL, NULL) || !wait_stop(child, &status) ||
            ptrace(PTRACE_GETREGS, child->pid, NULL, &regs))
            return child->error = -ESRCH;
    } while (!stopped_itself(child));
    if (regs.rip != code_address(child, LOOP_END))
        rc = -EFAULT;
    else if (regs.rbp)
        rc = (int)regs.rax;
    memset(child->commands, 0, child->count * sizeof(*child->commands)); /* where guest memory is does not concern guest user code, which can read this */
    child->count = 0;
    return child->error = rc;
}

/* ---- running ---- */

/*
 * Linux takes a debug exception without a cause in DR6 for INT1. Hypervisors that have to deliver an exception twice may lose the cause; a breakpoint's then looks like INT1, but RIP is
 * at the instruction, not behind one.
 */
static bool is_behind_int1(const struct direct_child *child, uint64_t rip)
{
    uint64_t at = rip - 1;
    errno = 0;
    long word = ptrace(PTRACE_PEEKTEXT, child->pid, at & ~7ull, NULL);
    return !errno && (uint8_t)((uint64_t)word >> 8 * (at & 7)) == 0xf1;
}

/* A signal of the processor's making. Those that somebody sent say nothing about the code, whichever they are. */
static enum direct_stop stop_of_signal(struct direct_child *child, int signal, struct user_regs_struct *regs)
{
    siginfo_t info;
    if (ptrace(PTRACE_GETSIGINFO, child->pid, NULL, &info))
        return DIRECT_GONE;
    if (info.si_code <= 0)
        return DIRECT_KICKED;
    switch (signal) {
    case SIGSEGV:
    case SIGBUS:
        if (info.si_code != SI_KERNEL)
            child->fault_address = (uint64_t)(uintptr_t)info.si_addr;
        return DIRECT_FAULT;
    case SIGTRAP:
        if (info.si_code == TRAP_HWBKPT || (info.si_code == TRAP_BRKPT && !is_behind_int1(child, regs->rip)))
            return DIRECT_FAULT;
        return info.si_code == TRAP_TRACE ? DIRECT_STEP : DIRECT_TRAP;
    case SIGSYS: /* a vsyscall: it has returned already, to where the jump there was to return */
        regs->rip = (uint64_t)(uintptr_t)info.si_call_addr;
        regs->rsp -= 8;
        return DIRECT_FAULT;
    default:
        return DIRECT_FAULT;
    }
}

enum direct_stop direct_child_run(struct direct_child *child, struct user_regs_struct *regs)
{
    int status;
    regs->orig_rax = ~0ull;
    if (ptrace(PTRACE_SETREGS, child->pid, NULL, regs) || ptrace(PTRACE_SYSEMU, child->pid, NULL, NULL))
        return DIRECT_REFUSED;
    if (!wait_stop(child, &status) || ptrace(PTRACE_GETREGS, child->pid, NULL, regs))
        return DIRECT_GONE;
    child->fixed_flags = regs->eflags & RFLAGS_ID;
    child->fault_address = ~0ull;
    switch (WSTOPSIG(status)) {
    case SYSCALL_STOP:
        return DIRECT_SYSCALL;
    case SIGSEGV:
    case SIGBUS:
    case SIGFPE:
    case SIGILL:
    case SIGTRAP:
    case SIGSYS:
        return stop_of_signal(child, WSTOPSIG(status), regs);
    case KICK_SIGNAL:
        kicks_take(child);
        return DIRECT_KICKED;
    default:
        return DIRECT_KICKED;
    }
}

uint64_t direct_child_fixed_flags(const struct direct_child *child)
{
    return child->fixed_flags;
}

static int debug_register_set(const struct direct_child *child, unsigned n, uint64_t value)
{
    return ptrace(PTRACE_POKEUSER, child->pid, offsetof(struct user, u_debugreg[0]) + n * sizeof(uint64_t), value) ? -errno : 0;
}

/* Execution breakpoints of one byte: R/W and LEN 0 in DR7, enabled by its local bits (SDM vol. 3, 17.2.4). */
int direct_child_break_at(struct direct_child *child, const uint64_t address[DIRECT_BREAKPOINTS])
{
    uint64_t dr7 = 0;
    int rc = debug_register_set(child, 7, 0);
    for (unsigned n = 0; !rc && n < DIRECT_BREAKPOINTS; n++) {
        if (!address[n])
            continue;
        rc = debug_register_set(child, n, address[n]);
        dr7 |= 1ull << 2 * n;
    }
    return rc ? rc : debug_register_set(child, 7, dr7);
}

uint64_t direct_child_fault_address(const struct direct_child *child)
{
    return child->fault_address;
}

/* The kernel takes MXCSR from the image only where SSE or AVX are not in their initial state; XRSTOR always does (SDM vol. 1, 13.8.1). */
static void mxcsr_keep(uint8_t *xsave)
{
    uint32_t mxcsr;
    memcpy(&mxcsr, xsave + XSAVE_MXCSR, sizeof(mxcsr));
    if (mxcsr == MXCSR_INITIAL || xsave[XSAVE_HEADER] & XCR0_SSE)
        return;
    memset(xsave + XSAVE_XMM, 0, XSAVE_XMM_BYTES);
    xsave[XSAVE_HEADER] |= XCR0_SSE;
}

/* Compares first: the guest's kernel has seldom touched what the process has still. */
int direct_child_vectors_set(struct direct_child *child, void *xsave, unsigned bytes)
{
    unsigned own = bytes < child->xstate_bytes ? bytes : child->xstate_bytes;
    struct iovec io = {child->vectors, child->xstate_bytes};
    if (child->vectors_known && !memcmp(child->vectors, xsave, own))
        return 0;
    memcpy(child->vectors, xsave, own);
    mxcsr_keep(child->vectors);
    child->vectors_known = !ptrace(PTRACE_SETREGSET, child->pid, NT_X86_XSTATE, &io);
    return child->vectors_known ? 0 : -errno;
}

int direct_child_vectors_get(struct direct_child *child, void *xsave, unsigned bytes)
{
    struct iovec io = {child->vectors, child->xstate_bytes};
    uint64_t components;
    child->vectors_known = !ptrace(PTRACE_GETREGSET, child->pid, NT_X86_XSTATE, &io);
    memset(child->vectors + XSAVE_SOFTWARE, 0, XSAVE_HEADER - XSAVE_SOFTWARE);
    memcpy(&components, child->vectors + XSAVE_HEADER, sizeof(components));
    components &= XCR0_SUPPORTED; /* the host has more, such as protection keys */
    memcpy(child->vectors + XSAVE_HEADER, &components, sizeof(components));
    memcpy(xsave, child->vectors, bytes < child->xstate_bytes ? bytes : child->xstate_bytes);
    return child->vectors_known ? 0 : -errno;
}

uint64_t direct_child_cpu_ns(const struct direct_child *child)
{
    return child->cpu_ns;
}

void direct_child_pin(struct direct_child *child, int cpu)
{
    cpu_set_t set;
    if (child->cpu == cpu || cpu < 0 || cpu >= CPU_SETSIZE)
        return;
    CPU_ZERO(&set);
    CPU_SET((unsigned)cpu, &set);
    if (!sched_setaffinity(child->pid, sizeof(set), &set))
        child->cpu = cpu;
}

pid_t direct_child_pid(const struct direct_child *child)
{
    return child->pid;
}

int direct_child_kicker(const struct direct_child *child)
{
    return child->kicks[1];
}

void direct_child_kick(int kicker)
{
    (void)!write(kicker, "", 1);
}

uint64_t direct_child_hidden(const struct direct_child *child)
{
    return child->hidden;
}
