/*
 * The process of direct execution with the worst that guest code can do in it: every system call in every way, the process's own page, the vsyscall page, segments, flags, signals
 * from outside, death. Skipped on hosts that allow no tracing.
 */
#include <errno.h>
#include <dirent.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cmocka.h>

#include "engine/bt/direct_child.h"

#define PAGE 4096u
#define CODE 0x10000000ull
#define DATA 0x20000000ull
#define STACK (DATA + PAGE - 256)
#define XSAVE_BYTES 2696u
#define FLAG_TF (1u << 8)
#define FLAG_NT (1u << 14)
#define FLAG_ID (1u << 21)

static struct direct_child *child;
static uint8_t *ram; /* page 0: CODE, page 1: DATA */
static int ram_fd;

static void map_both(void)
{
    direct_child_map(child, CODE, PAGE, 0, PROT_READ | PROT_EXEC);
    direct_child_map(child, DATA, PAGE, PAGE, PROT_READ | PROT_WRITE);
    assert_int_equal(direct_child_flush(child), 0);
}

static int set_up(void **state)
{
    struct error err;
    ram_fd = memfd_create("ram", MFD_CLOEXEC);
    if (ram_fd < 0 || ftruncate(ram_fd, 16 * PAGE))
        return -1;
    ram = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ram_fd, 0);
    if (ram == MAP_FAILED)
        return -1;
    if (direct_child_create(&child, ram_fd, &err)) {
        print_message("%s\n", err.text);
        child = NULL;
        return 0;
    }
    map_both();
    return 0;
}

static int tear_down(void **state)
{
    if (child)
        direct_child_destroy(child);
    child = NULL;
    munmap(ram, 16 * PAGE);
    close(ram_fd);
    return 0;
}

static void need_child(void)
{
    if (!child)
        skip();
}

static struct user_regs_struct regs_new(void)
{
    return (struct user_regs_struct){.rip = CODE, .rsp = STACK, .cs = 0x33, .ss = 0x2b, .rbx = 0x1122334455667788, .r15 = 77};
}

static enum direct_stop run_code(const char *code, size_t length, struct user_regs_struct *regs)
{
    memset(ram, 0xf4, PAGE); /* HLT */
    memcpy(ram, code, length);
    regs->rip = CODE;
    return direct_child_run(child, regs);
}
#define RUN(code, regs) run_code(code, sizeof(code) - 1, regs)

/* It still does what it is told. */
static void check_alive(void)
{
    struct user_regs_struct regs = regs_new();
    assert_int_equal(RUN("\x90\xf4", &regs), DIRECT_FAULT);
    assert_int_equal(regs.rip, CODE + 1);
    assert_int_equal(regs.r15, 77);
}

static void test_system_calls(void **state)
{
    static const struct {
        const char *code;
        uint64_t high;
    } ways[] = {{"\x0f\x05", 0}, {"\xcd\x80", 0}, {"\x0f\x05", 0x40000000}, {"\x0f\x05", 0xffffffff00000000}};
    need_child();
    for (unsigned way = 0; way < sizeof(ways) / sizeof(ways[0]); way++)
        for (uint64_t number = 0; number <= 600; number++) {
            struct user_regs_struct regs = regs_new();
            regs.rax = number | ways[way].high;
            regs.rdi = CODE, regs.rsi = PAGE;
            assert_int_equal(run_code(ways[way].code, 2, &regs), DIRECT_SYSCALL);
            assert_int_equal(regs.orig_rax, number | ways[way].high);
            assert_int_equal(regs.rip, CODE + 2);
            assert_int_equal(regs.rax, -ENOSYS);
        }
    check_alive();
    struct user_regs_struct regs = regs_new();
    enum direct_stop stop = RUN("\x0f\x34", &regs); /* SYSENTER: whatever the processor makes of it */
    assert_true(stop == DIRECT_SYSCALL || stop == DIRECT_FAULT);
    check_alive();
}

/* Each place in the process's own page that is a SYSCALL to a jump, as far as the filter would allow it. */
static void test_own_page(void **state)
{
    need_child();
    static uint8_t own[DIRECT_HIDDEN_BYTES];
    uint64_t hidden = direct_child_hidden(child);
    struct iovec here = {own, sizeof(own)}, there = {(void *)(uintptr_t)hidden, sizeof(own)};
    unsigned found = 0;
    assert_int_equal(process_vm_readv(direct_child_pid(child), &here, 1, &there, 1, 0), sizeof(own));
    for (unsigned n = 0; n + 1 < PAGE; n++) {
        if (own[n] != 0x0f || own[n + 1] != 0x05)
            continue;
        found++;
        struct user_regs_struct regs = regs_new();
        regs.rip = hidden + n;
        regs.rax = SYS_munmap, regs.rdi = CODE, regs.rsi = PAGE;
        assert_int_equal(direct_child_run(child, &regs), DIRECT_SYSCALL);
        assert_int_equal(regs.orig_rax, SYS_munmap);
        check_alive();
    }
    assert_true(found >= 1);
    for (unsigned n = PAGE; n < sizeof(own); n++)
        assert_int_equal(own[n], 0); /* what was mapped has left no trace */
    /* The loop with a list of its own, in guest memory. */
    uint64_t *list = (uint64_t *)(ram + PAGE);
    struct user_regs_struct regs = regs_new();
    list[0] = SYS_munmap, list[1] = CODE, list[2] = PAGE;
    regs.rip = hidden + 128, regs.rbx = DATA, regs.rbp = 1;
    assert_int_equal(direct_child_run(child, &regs), DIRECT_SYSCALL);
    check_alive();
}

static void test_vsyscalls(void **state)
{
    need_child();
    for (unsigned n = 0; n < 4; n++) {
        struct user_regs_struct regs = regs_new();
        uint64_t at = 0xffffffffff600000 + n * 0x400;
        memset(ram, 0xf4, PAGE);
        *(uint64_t *)(ram + PAGE + (STACK - DATA)) = CODE;
        regs.rip = at, regs.rdi = DATA;
        assert_int_equal(direct_child_run(child, &regs), DIRECT_FAULT);
        assert_int_equal(regs.rip, at);
        assert_int_equal(regs.rsp, STACK);
        check_alive();
    }
}

/* Selectors and bases that only code can set. */
static void test_segments(void **state)
{
    need_child();
    struct user_regs_struct regs = regs_new();
    regs.rax = 0xffff888000000000;
    assert_int_equal(RUN("\xf3\x48\x0f\xae\xd0\xf4", &regs), DIRECT_FAULT); /* wrfsbase rax */
    assert_int_equal(regs.rip, CODE + 5);
    assert_int_equal(regs.fs_base, 0xffff888000000000);
    assert_int_equal(direct_child_run(child, &regs), DIRECT_REFUSED);
    check_alive();
    regs = regs_new();
    regs.rax = 1;
    assert_int_equal(RUN("\x8e\xd8\xf4", &regs), DIRECT_FAULT); /* mov ds, eax */
    assert_int_equal(regs.rip, CODE + 2);
    assert_int_equal(regs.ds, 1);
    assert_int_equal(direct_child_run(child, &regs), DIRECT_REFUSED);
    check_alive();
    regs = regs_new();
    regs.fs_base = 0x7f0012345678, regs.gs_base = 0x1000, regs.fs = 0x2b;
    assert_int_equal(RUN("\x90\xf4", &regs), DIRECT_FAULT);
    assert_int_equal(regs.fs_base, 0x7f0012345678);
    assert_int_equal(regs.gs_base, 0x1000);
    assert_int_equal(regs.fs, 0x2b);
}

static void test_traps(void **state)
{
    static const struct {
        const char *code;
        unsigned length, end;
        enum direct_stop stop;
    } cases[] = {
        {"\xcc", 1, 1, DIRECT_TRAP},
        {"\xcd\x03", 2, 2, DIRECT_TRAP},
        {"\xf1", 1, 1, DIRECT_TRAP},
        {"\x0f\x0b", 2, 0, DIRECT_FAULT},                     /* ud2 */
        {"\x31\xc9\xf7\xf1", 4, 2, DIRECT_FAULT},             /* div ecx by zero */
        {"\x0f\x31", 2, 0, DIRECT_FAULT},                     /* rdtsc */
        {"\xfa", 1, 0, DIRECT_FAULT},                         /* cli */
        {"\xcd\x30", 2, 0, DIRECT_FAULT},                     /* int 0x30 */
        {"\x68\x02\x01\x00\x00\x9d\x90\xf4", 8, 7, DIRECT_STEP},  /* push 0x102; popf; nop */
        {"\x68\x02\x01\x00\x00\x9d\xcc", 7, 7, DIRECT_TRAP},  /* and int3: #BP comes first */
        {"\x68\x02\x01\x00\x00\x9d\x0f\x05", 8, 8, DIRECT_SYSCALL},
        {"\xf3\xaa", 2, 0, DIRECT_FAULT},                     /* rep stosb to an address that is not canonical */
    };
    need_child();
    for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
        struct user_regs_struct regs = regs_new();
        regs.rdi = 1ull << 63, regs.rcx = 100;
        enum direct_stop stop = run_code(cases[n].code, cases[n].length, &regs);
        bool left = stop == DIRECT_FAULT && cases[n].code[0] == '\xf1'; /* hypervisors on AMD's processors leave RIP at INT1: it is done again, as a fault is */
        assert_true(stop == cases[n].stop || left);
        assert_int_equal(regs.rip, CODE + (left ? 0 : cases[n].end));
        assert_int_equal(!!(regs.eflags & FLAG_TF), cases[n].length > 6);
        assert_int_equal(direct_child_fault_address(child), ~0ull);
        check_alive();
    }
    struct user_regs_struct regs = regs_new();
    regs.rdi = DATA + PAGE - 10, regs.rcx = 100;
    assert_int_equal(RUN("\xf3\xaa", &regs), DIRECT_FAULT); /* over the end of the page */
    assert_int_equal(direct_child_fault_address(child), DATA + PAGE);
    assert_int_equal(regs.rcx, 90);
    assert_int_equal(regs.rip, CODE);
}

static void test_fixed_flags(void **state)
{
    need_child();
    struct user_regs_struct regs = regs_new();
    assert_int_equal(direct_child_fixed_flags(child), 0);
    assert_int_equal(RUN("\x68\x02\x40\x20\x00\x9d\xf4", &regs), DIRECT_FAULT); /* push 0x204002; popf */
    assert_int_equal(direct_child_fixed_flags(child), FLAG_ID);
    assert_true(regs.eflags & FLAG_NT);
    regs = regs_new();
    regs.eflags = FLAG_NT;
    assert_int_equal(RUN("\x9c\x58\xf4", &regs), DIRECT_FAULT); /* pushf; pop rax */
    assert_int_equal(regs.rax & (FLAG_ID | FLAG_NT), FLAG_ID | FLAG_NT);
    map_both(); /* nor does the loop change them */
    assert_int_equal(RUN("\x6a\x02\x9d\xf4", &regs), DIRECT_FAULT);
    assert_int_equal(direct_child_fixed_flags(child), 0);
}

static unsigned lines_of_maps(void)
{
    char path[64], line[512];
    unsigned lines = 0;
    snprintf(path, sizeof(path), "/proc/%d/maps", (int)direct_child_pid(child));
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    while (fgets(line, sizeof(line), f))
        lines += !strstr(line, "[vsyscall]");
    fclose(f);
    return lines;
}

static void test_what_it_has(void **state)
{
    char path[64];
    need_child();
    assert_int_equal(lines_of_maps(), 4);
    direct_child_unmap_all(child);
    assert_int_equal(direct_child_flush(child), 0);
    assert_int_equal(lines_of_maps(), 2);
    struct user_regs_struct regs = regs_new();
    assert_int_equal(RUN("\x90", &regs), DIRECT_FAULT);
    assert_int_equal(direct_child_fault_address(child), CODE);
    snprintf(path, sizeof(path), "/proc/%d/fd", (int)direct_child_pid(child));
    DIR *folder = opendir(path);
    assert_non_null(folder);
    for (struct dirent *entry; (entry = readdir(folder));)
        assert_true(entry->d_name[0] == '.' || !strcmp(entry->d_name, "3"));
    closedir(folder);
    map_both();
    check_alive();
    /* More than fits into one list. */
    for (unsigned n = 0; n < 6000; n++)
        direct_child_map(child, 0x30000000 + n * 2ull * PAGE, PAGE, n % 16 * PAGE, PROT_READ);
    assert_int_equal(direct_child_flush(child), 0);
    assert_int_equal(lines_of_maps(), 4 + 6000);
    direct_child_map(child, CODE + 1, PAGE, 0, PROT_READ);
    assert_true(direct_child_flush(child) < 0);
    assert_true(direct_child_flush(child) < 0); /* for good */
}

static void *kick_later(void *arg)
{
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    direct_child_kick(direct_child_kicker(child));
    return NULL;
}

static void test_signals(void **state)
{
    static const int signals[] = {SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGSYS, SIGTERM, SIGINT, SIGSTOP, SIGTSTP, SIGCHLD, SIGUSR1};
    need_child();
    struct user_regs_struct regs = regs_new();
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, kick_later, NULL), 0);
    assert_int_equal(RUN("\xeb\xfe", &regs), DIRECT_KICKED);
    assert_int_equal(regs.rip, CODE);
    pthread_join(thread, NULL);
    for (unsigned n = 0; n < sizeof(signals) / sizeof(signals[0]); n++) {
        regs = regs_new();
        kill(direct_child_pid(child), signals[n]);
        assert_int_equal(RUN("\xeb\xfe", &regs), DIRECT_KICKED);
        assert_int_equal(regs.rip, CODE);
        check_alive();
        kill(direct_child_pid(child), signals[n]);
        map_both();
        check_alive();
    }
}

static void test_vectors(void **state)
{
    static uint8_t before[XSAVE_BYTES], after[XSAVE_BYTES];
    need_child();
    memset(before, 0, sizeof(before));
    memcpy(before, "\x7f\x03", 2);
    for (unsigned n = 160; n < 416; n++)
        before[n] = (uint8_t)(n * 7);
    memcpy(before + 24, "\xa0\x1f", 2);
    before[512] = 3;
    struct user_regs_struct regs = regs_new();
    assert_int_equal(direct_child_vectors_set(child, before, sizeof(before)), 0);
    assert_int_equal(RUN("\x0f\x05", &regs), DIRECT_SYSCALL);
    map_both();
    assert_int_equal(direct_child_vectors_get(child, after, sizeof(after)), 0);
    assert_memory_equal(before, after, 28);
    assert_memory_equal(before + 160, after + 160, 416 - 160);
    for (unsigned n = 464; n < 512; n++)
        assert_int_equal(after[n], 0);
    assert_int_equal(RUN("\x66\x0f\x76\xc0\xf4", &regs), DIRECT_FAULT); /* pcmpeqd xmm0, xmm0 */
    assert_int_equal(direct_child_vectors_get(child, after, sizeof(after)), 0);
    memset(before + 160, 0xff, 16);
    assert_memory_equal(before + 160, after + 160, 416 - 160);
    /* MXCSR counts although no XMM register does. */
    memset(before + 512, 0, 8);
    memcpy(before + 24, "\xc0\x1f", 2);
    assert_int_equal(direct_child_vectors_set(child, before, sizeof(before)), 0);
    check_alive();
    assert_int_equal(direct_child_vectors_get(child, after, sizeof(after)), 0);
    assert_memory_equal(before + 24, after + 24, 4);
    for (unsigned n = 160; n < 416; n++)
        assert_int_equal(after[n], 0);
}

static void test_death(void **state)
{
    need_child();
    struct user_regs_struct regs = regs_new();
    pid_t killer = fork();
    if (!killer) {
        usleep(50000);
        kill(direct_child_pid(child), SIGKILL);
        _exit(0);
    }
    assert_int_equal(RUN("\xeb\xfe", &regs), DIRECT_GONE);
    assert_int_equal(waitpid(killer, NULL, 0), killer);
    assert_int_equal(direct_child_run(child, &regs), DIRECT_REFUSED);
    direct_child_unmap_all(child);
    assert_true(direct_child_flush(child) < 0);
}

/* Its registers are still with whoever wanted it to run. */
static void test_death_before(void **state)
{
    need_child();
    struct user_regs_struct regs = regs_new();
    kill(direct_child_pid(child), SIGKILL);
    assert_int_equal(RUN("\xeb\xfe", &regs), DIRECT_REFUSED);
    direct_child_unmap_all(child);
    assert_true(direct_child_flush(child) < 0);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
    const struct CMUnitTest tests[] = {
        TEST(test_system_calls), TEST(test_own_page), TEST(test_vsyscalls), TEST(test_segments), TEST(test_traps), TEST(test_fixed_flags),
        TEST(test_what_it_has), TEST(test_signals), TEST(test_vectors), TEST(test_death), TEST(test_death_before),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
