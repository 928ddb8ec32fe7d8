/*
 * One operating system service each, over and over: `micro NAME COUNT`. What it prints is the same wherever it runs; the time is taken by the agent from outside,
 * so COUNT must be large enough for the start of the program not to matter.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *self;

static void check(int good, const char *what)
{
    if (!good) {
        perror(what);
        exit(3);
    }
}

static unsigned wait_for(pid_t pid)
{
    int status = 0;
    check(pid > 0 && waitpid(pid, &status, 0) == pid && WIFEXITED(status), "child");
    return (unsigned)WEXITSTATUS(status);
}

static uint64_t run_fork(unsigned count)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < count; i++) {
        pid_t pid = fork();
        if (pid == 0)
            _exit(i & 127);
        sum += wait_for(pid);
    }
    return sum;
}

static uint64_t run_forkexec(unsigned count)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < count; i++) {
        pid_t pid = fork();
        if (pid == 0) {
            execl(self, self, "exit", "7", (char *)NULL);
            _exit(1);
        }
        sum += wait_for(pid);
    }
    return sum;
}

/* One byte to and fro between two processes over two pipes. */
static uint64_t run_pipe(unsigned count)
{
    int there[2], back[2];
    char byte = 1;
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t pid = fork();
    if (pid == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1) {
            byte++;
            if (write(back[1], &byte, 1) != 1)
                break;
        }
        _exit(5);
    }
    for (unsigned i = 0; i < count; i++)
        check(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "pipe");
    close(there[1]);
    return wait_for(pid) + (unsigned char)byte;
}

static void futex_wait_while(uint32_t *word, uint32_t value)
{
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == value)
        syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
}

/* Two processes that hand one shared word to each other: two context switches a turn. */
static uint64_t run_switch(unsigned count)
{
    uint32_t *turn = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    check(turn != MAP_FAILED, "mmap");
    pid_t pid = fork();
    unsigned mine = pid == 0;
    for (unsigned i = 0; i < count; i++) {
        futex_wait_while(turn, !mine);
        __atomic_store_n(turn, !mine, __ATOMIC_RELEASE);
        syscall(SYS_futex, turn, FUTEX_WAKE, 1, NULL, NULL, 0);
    }
    if (pid == 0)
        _exit(9);
    return wait_for(pid) + *turn;
}

/* One byte from /dev/zero and one to /dev/null. */
static uint64_t run_io(unsigned count)
{
    int in = open("/dev/zero", O_RDONLY), out = open("/dev/null", O_WRONLY);
    uint64_t sum = 0;
    char byte = 1;
    check(in >= 0 && out >= 0, "/dev");
    for (unsigned i = 0; i < count; i++)
        sum += (uint64_t)(read(in, &byte, 1) + write(out, &byte, 1));
    return sum + (unsigned char)byte;
}

/* First touch of `count` pages, 4 MiB at a time. */
static uint64_t run_fault(unsigned count)
{
    enum { PAGES = 1024 };
    uint64_t sum = 0;
    char *memory = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(memory != MAP_FAILED, "mmap");
    madvise(memory, PAGES * 4096, MADV_NOHUGEPAGE);
    for (unsigned i = 0; i < count; i++) {
        unsigned page = i % PAGES;
        if (page == 0)
            check(madvise(memory, PAGES * 4096, MADV_DONTNEED) == 0, "madvise");
        sum += (uint64_t)memory[page * 4096]++ + 1;
    }
    return sum;
}

/* Maps a page, writes to it and unmaps it. */
static uint64_t run_mmap(unsigned count)
{
    uint64_t sum = 0;
    for (unsigned i = 0; i < count; i++) {
        unsigned char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(page != MAP_FAILED, "mmap");
        *page = (unsigned char)i;
        sum += *page;
        munmap(page, 4096);
    }
    return sum;
}

static uint64_t run_getppid(unsigned count)
{
    uint64_t good = 0;
    pid_t parent = getppid();
    for (unsigned i = 0; i < count; i++)
        good += syscall(SYS_getppid) == parent;
    return good;
}

static volatile unsigned handled;

static void handler(int signal)
{
    (void)signal;
    handled++;
}

static uint64_t run_signal(unsigned count)
{
    struct sigaction action = {.sa_handler = handler};
    check(sigaction(SIGUSR1, &action, NULL) == 0, "sigaction");
    pid_t self_pid = getpid();
    for (unsigned i = 0; i < count; i++)
        kill(self_pid, SIGUSR1);
    return handled;
}

static const struct {
    const char *name;
    uint64_t (*run)(unsigned count);
} services[] = {
    {"fork", run_fork}, {"forkexec", run_forkexec}, {"pipe", run_pipe}, {"switch", run_switch},   {"io", run_io},
    {"fault", run_fault}, {"mmap", run_mmap},       {"getppid", run_getppid}, {"signal", run_signal},
};

int main(int argc, char **argv)
{
    self = argv[0];
    if (argc == 3 && strcmp(argv[1], "exit") == 0)
        return atoi(argv[2]);
    for (size_t i = 0; argc == 3 && i < sizeof services / sizeof *services; i++) {
        if (strcmp(argv[1], services[i].name) == 0) {
            printf("%s %llu\n", argv[1], (unsigned long long)services[i].run((unsigned)atoi(argv[2])));
            return 0;
        }
    }
    fprintf(stderr, "usage: micro NAME COUNT\n");
    return 2;
}
