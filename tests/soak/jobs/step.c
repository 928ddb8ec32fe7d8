/* step SEED: a debugger and its program: single steps, breakpoints, registers read and written, system calls watched. All counts are the program's own. */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile unsigned rounds;

/* A loop with a known number of instructions, calls and returns, strings and pushes in it. */
extern const char work_begin[], work_call[], work_end[];
__attribute__((noinline)) static unsigned long work(unsigned long n)
{
    unsigned long sum = 0;
    char buffer[64];
    void *to = buffer;
    __asm__ volatile(".globl work_begin, work_call, work_end\n"
                     "work_begin:\n"
                     "xor %%ecx, %%ecx\n"
                     "1: push %0\n pop %%rax\n add %1, %0\n imul $31, %0, %0\n"
                     "work_call: call 2f\n"
                     "mov $16, %%ecx\n mov %2, %%rdi\n rep stosb\n"
                     "lahf\n sahf\n dec %1\n jnz 1b\n jmp 3f\n"
                     "2: xor $5, %0\n ret\n"
                     "3:\nwork_end:\n nop\n"
                     : "+&r"(sum), "+&r"(n)
                     : "r"(to)
                     : "rax", "rcx", "rdi", "memory", "cc");
    return sum;
}

static void wait_stop(pid_t child, int expected)
{
    int status;
    if (waitpid(child, &status, 0) != child || !WIFSTOPPED(status) || WSTOPSIG(status) != expected) {
        printf("unexpected status %x, not a stop by %d\n", status, expected);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    unsigned long n = 300 + (unsigned long)(argc > 1 ? atoi(argv[1]) : 0);
    pid_t child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        work(n);
        rounds = 1;
        syscall(SYS_getppid);
        work(n);
        _exit(7);
    }
    wait_stop(child, SIGSTOP);
    ptrace(PTRACE_SETOPTIONS, child, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL);
    /* A breakpoint at the beginning; then every step to the end. */
    uintptr_t begin = (uintptr_t)work_begin, end = (uintptr_t)work_end, inside = (uintptr_t)work_call;
    struct user_regs_struct regs;
    long word = ptrace(PTRACE_PEEKTEXT, child, begin, 0);
    ptrace(PTRACE_POKETEXT, child, begin, (word & ~0xffL) | 0xcc);
    ptrace(PTRACE_CONT, child, 0, 0);
    wait_stop(child, SIGTRAP);
    ptrace(PTRACE_GETREGS, child, 0, &regs);
    printf("breakpoint %d\n", regs.rip == begin + 1);
    regs.rip = begin;
    ptrace(PTRACE_SETREGS, child, 0, &regs);
    ptrace(PTRACE_POKETEXT, child, begin, word);
    unsigned steps = 0, calls = 0;
    uint64_t hash = 0;
    do {
        ptrace(PTRACE_SINGLESTEP, child, 0, 0);
        wait_stop(child, SIGTRAP);
        ptrace(PTRACE_GETREGS, child, 0, &regs);
        steps++;
        calls += regs.rip == inside;
        hash = hash * 31 + (regs.rip - begin) + regs.rcx;
    } while (regs.rip != end);
    printf("steps %u calls %u hash %016llx\n", steps, calls, (unsigned long long)hash);
    /* A watchpoint on a variable (DR0, DR7: 4 bytes, writes). */
    ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[0]), &rounds);
    ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[7]), 0xd0101);
    ptrace(PTRACE_CONT, child, 0, 0);
    wait_stop(child, SIGTRAP);
    printf("watchpoint, value %lu\n", ptrace(PTRACE_PEEKDATA, child, &rounds, 0) & 0xffffffff);
    ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[7]), 0);
    /* The system call, entry and exit; then the program's own breakpoint count in the second call. */
    for (int i = 0; i < 2; i++) {
        ptrace(PTRACE_SYSCALL, child, 0, 0);
        wait_stop(child, SIGTRAP | 0x80);
        ptrace(PTRACE_GETREGS, child, 0, &regs);
        printf("system call %llu\n", regs.orig_rax);
    }
    word = ptrace(PTRACE_PEEKTEXT, child, inside, 0);
    unsigned hits = 0;
    int status;
    for (;;) {
        ptrace(PTRACE_POKETEXT, child, inside, (word & ~0xffL) | 0xcc);
        ptrace(PTRACE_CONT, child, 0, 0);
        if (waitpid(child, &status, 0) != child || WIFEXITED(status))
            break;
        hits++;
        ptrace(PTRACE_GETREGS, child, 0, &regs);
        regs.rip--;
        ptrace(PTRACE_SETREGS, child, 0, &regs);
        ptrace(PTRACE_POKETEXT, child, inside, word);
        ptrace(PTRACE_SINGLESTEP, child, 0, 0);
        wait_stop(child, SIGTRAP);
    }
    printf("hits %u, exit status %d\n", hits, WEXITSTATUS(status));
    return 0;
}
