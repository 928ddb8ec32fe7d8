/* edges SEED: what ordinary programs rarely do, done on purpose: faults of every kind with what the handler is told about them, instructions that user code may not
   have, stacks and mappings at odd places, contexts changed by handlers, system calls by all doors. Every line is what an x86-64 Linux does. */
#define _GNU_SOURCE
#include <errno.h>
#include <fenv.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile int got_signal, got_code;
static void *volatile got_address;
static volatile long got_trap, got_error;

static void on_signal(int number, siginfo_t *info, void *context)
{
#ifdef __x86_64__
    __asm__ volatile("pushfq\n andl $~0x40000, (%%rsp)\n popfq" ::: "cc", "memory");       /* AC stays set in handlers */
#else
    __asm__ volatile("pushf\n andl $~0x40000, (%%esp)\n popf" ::: "cc", "memory");
#endif
    static unsigned count;
    if (++count > 1000)         /* it is lost */
        _exit(3);
    ucontext_t *c = context;
    got_signal = number;
    got_code = info->si_code;
    got_address = info->si_addr;
    got_trap = c->uc_mcontext.gregs[REG_TRAPNO];
    got_error = c->uc_mcontext.gregs[REG_ERR];
    siglongjmp(back, 1);
}

/* `base` makes addresses that differ from run to run comparable. */
static void report(const char *name, const void *base)
{
    uintptr_t address = (uintptr_t)got_address - (uintptr_t)base;
    printf("%s: signal %d code %d trap %ld error %ld", name, got_signal, got_code, got_trap, got_error);
    if (got_signal == SIGSEGV || got_signal == SIGBUS)
        printf(" address %lx", (unsigned long)address);
    putchar('\n');
}

#define TRY(name, base, ...) \
    do { \
        got_signal = 0; \
        if (!sigsetjmp(back, 1)) { \
            __VA_ARGS__; \
            printf("%s: nothing\n", name); \
        } else { \
            report(name, base); \
        } \
    } while (0)

#define OPCODE(name, text) TRY(name, NULL, __asm__ volatile(text ::: "eax", "ecx", "edx", "memory", "cc"))

static void *map(void *at, size_t size, int rights, int flags)
{
    void *p = mmap(at, size, rights, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

static void forbidden(void)
{
    OPCODE("hlt", "hlt");
    OPCODE("cli", "cli");
    OPCODE("sti", "sti");
    OPCODE("in", "in $0x80, %%al");
    OPCODE("out", "out %%al, $0x80");
    OPCODE("insb", "insb");
    OPCODE("ud2", "ud2");
    OPCODE("invlpg", "invlpg (%%esp)");
    OPCODE("wbinvd", "wbinvd");
    OPCODE("clts", "clts");
    OPCODE("rdmsr", "rdmsr");
    OPCODE("wrmsr", "wrmsr");
    OPCODE("int 0x20", "int $0x20");
    OPCODE("int 0x0e", "int $0x0e");
    OPCODE("int1", ".byte 0xf1");
    OPCODE("lock on a register", ".byte 0xf0, 0x01, 0xc0");
    OPCODE("null selector", "xor %%eax, %%eax\n mov %%eax, %%ss");
    OPCODE("kernel selector", "mov $0x10, %%eax\n mov %%eax, %%ds");
    OPCODE("selector beyond", "mov $0xfff8, %%eax\n mov %%eax, %%es");
    OPCODE("16 prefixes", ".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90");
    OPCODE("int3", "int3");
#ifdef __x86_64__
    OPCODE("mov cr0", "mov %%cr0, %%rax");
    OPCODE("mov dr7", "mov %%dr7, %%rax");
    OPCODE("xsetbv", "xor %%ecx, %%ecx\n xor %%edx, %%edx\n mov $3, %%eax\n xsetbv");
    OPCODE("lgdt", "lgdt (%%rsp)");
    OPCODE("ltr", "ltr %%ax");
    OPCODE("iretq to the kernel", "mov %%rsp, %%rcx\n push $0x18\n push %%rcx\n pushfq\n push $0x10\n lea 1f(%%rip), %%rax\n push %%rax\n iretq\n1:");
    OPCODE("sysretq", ".byte 0x48, 0x0f, 0x07");
    OPCODE("swapgs", "swapgs");
    OPCODE("push es", ".byte 0x06");
    OPCODE("aam", ".byte 0xd4, 0x0a");
#else
    OPCODE("aam 0", ".byte 0xd4, 0x00");
    OPCODE("into", "mov $0x7fffffff, %%eax\n add $1, %%eax\n into");
    OPCODE("bound", "sub $8, %%esp\n movl $3, (%%esp)\n movl $5, 4(%%esp)\n mov $9, %%eax\n .byte 0x62, 0x04, 0x24");
#endif
}

static void arithmetic(void)
{
    OPCODE("division by 0", "xor %%ecx, %%ecx\n div %%ecx");
    OPCODE("quotient too large", "mov $0x80000000, %%eax\n cltd\n mov $-1, %%ecx\n idiv %%ecx");
    for (volatile int which = 0; which < 4; which++) {
        static const int flags[] = {FE_DIVBYZERO, FE_INVALID, FE_OVERFLOW, FE_INEXACT};
        static const char *const names[] = {"trap on 1.0/0", "trap on sqrt(-1)", "trap on overflow", "trap on inexact"};
        volatile double a = which == 2 ? 1e308 : 1.0, b = which == 0 ? 0.0 : which == 3 ? 3.0 : 1e-308;
        volatile long double c = a, d = b;
        feenableexcept(flags[which]);
        TRY(names[which], NULL, a = which == 1 ? a * __builtin_inf() * 0 : a / b);
        feclearexcept(FE_ALL_EXCEPT);
        feenableexcept(flags[which]);
        TRY(names[which], NULL, c = which == 1 ? c * __builtin_infl() * 0 : which == 2 ? c / d * (long double)1e308 : c / d; a = (double)c; __asm__ volatile("fwait"));
        feclearexcept(FE_ALL_EXCEPT);
        fedisableexcept(FE_ALL_EXCEPT);
    }
    OPCODE("alignment check",
#ifdef __x86_64__
           "pushfq\n orl $0x40000, (%%rsp)\n popfq\n mov %%rsp, %%rax\n and $-16, %%rax\n mov -31(%%rax), %%ecx\n pushfq\n andl $~0x40000, (%%rsp)\n popfq");
#else
           "pushf\n orl $0x40000, (%%esp)\n popf\n mov %%esp, %%eax\n and $-16, %%eax\n mov -31(%%eax), %%ecx\n pushf\n andl $~0x40000, (%%esp)\n popf");
#endif
    OPCODE("movaps misaligned", "lea -39(%%esp), %%eax\n and $-16, %%eax\n movaps 4(%%eax), %%xmm0");
}

/* A page that may be read, one that may not, and what lies between. */
static void memory(void)
{
    uint8_t *p = map(NULL, 8 * 4096, PROT_READ | PROT_WRITE, 0);
    memset(p, 0x90, 8 * 4096);
    p[4095] = 0xc3;
    mprotect(p + 4096, 4096, PROT_NONE);
    mprotect(p + 2 * 4096, 4096, PROT_READ);
    munmap(p + 4 * 4096, 4096);
    TRY("read nothing", p, (void)*(volatile uint8_t *)(p + 4096 + 5));
    TRY("write nothing", p, *(volatile uint8_t *)(p + 4096 + 5) = 1);
    TRY("write read-only", p, *(volatile uint8_t *)(p + 2 * 4096 + 7) = 1);
    TRY("increment read-only", p, ++*(volatile uint32_t *)(p + 2 * 4096 + 8));
    TRY("read unmapped", p, (void)*(volatile uint8_t *)(p + 4 * 4096));
    TRY("read across", p, (void)*(volatile uint64_t *)(p + 4096 - 3));
    TRY("write across", p, *(volatile uint64_t *)(p + 4096 - 3) = 1);
    TRY("write across into read-only", p, *(volatile uint32_t *)(p + 2 * 4096 - 1) = 1);
    TRY("compare and exchange read-only", p, __atomic_compare_exchange_n((uint32_t *)(p + 2 * 4096), &(uint32_t){5}, 6, 0, 5, 5));
    TRY("string store to the end", p, memset(p + 3 * 4096, 1, 4097));
    void (*volatile jump)(void);
    const uint8_t *targets[] = {p + 100, p + 4096 + 100, p + 4 * 4096 + 9};
    for (volatile int i = 0; i < 3; i++) {
        jump = (void (*)(void))(uintptr_t)targets[i];
        TRY("jump", p, jump());
    }
    mprotect(p, 4096, PROT_READ | PROT_EXEC);
    jump = (void (*)(void))(uintptr_t)targets[0];
    TRY("jump to code", p, jump());
    mprotect(p, 4096, PROT_READ);
    TRY("jump to what was code", p, jump());
    /* Code that runs out of its page. */
    mprotect(p + 3 * 4096, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    memset(p + 3 * 4096, 0x90, 4096);
    const uint8_t *last = p + 4 * 4096 - 3;
    jump = (void (*)(void))(uintptr_t)last;
    TRY("run off a page", p, jump());
    p[4 * 4096 - 1] = 0xe9;
    TRY("run off a page inside an instruction", p, jump());
    TRY("jump to 0", NULL, __asm__ volatile("xor %%eax, %%eax\n jmp *%0" ::"r"((uintptr_t)0) : "eax"));
#ifdef __x86_64__
    static const uint64_t odd[] = {0x800000000000, 0xffff800000000000, 0xffffffff81000000, 0x8000000000000000, 0x7ffffffff000, 0xfffffffffffffff8,
                                   0x00ffffffffffffff, 0x7fffffffffff, 0x123456789abcdef0, 0xffffffffff600000};
    for (volatile unsigned i = 0; i < sizeof(odd) / sizeof(odd[0]); i++) {
        char name[40];
        snprintf(name, sizeof(name), "read %llx", (unsigned long long)odd[i]);
        if (odd[i] != 0xffffffffff600000)
            TRY(name, NULL, (void)*(volatile uint8_t *)odd[i]);
        memcpy(name, "writ", 4);
        TRY(name, NULL, *(volatile uint8_t *)odd[i] = 1);
        memcpy(name, "jump", 4);
        jump = (void (*)(void))odd[i];
        if (odd[i] != 0xffffffffff600000)
            TRY(name, NULL, jump());
    }
    OPCODE("stack not canonical", "mov %%rsp, %%rdx\n mov $0x800000000000, %%rax\n mov %%rax, %%rsp\n push %%rax\n mov %%rdx, %%rsp");
#endif
    munmap(p, 4 * 4096);
}

/* Memory at addresses where nobody expects it. */
static void places(void)
{
    static const uint64_t where[] = {0x10000, 0x400000 - 0x200000, 0x7fff0000, 0x40000000, 0x50000000, 0xc0000000,
#ifdef __x86_64__
                                     0x100000000, 0x7ffff000, 0x8000000000, 0x7fff00000, 0x10000000000, 0x20000000000, 0x40000000000, 0x400000000000, 0x600000000000, 0x7f0000000000 - 0x1000000000,
                                     0x1fffffffff000, 0x555500000000, 0x700000000000, 0x7ffe00000000 - 0x200000000000
#endif
    };
    for (volatile unsigned i = 0; i < sizeof(where) / sizeof(where[0]); i++) {
        uint8_t *p = map((void *)(uintptr_t)where[i], 3 * 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_FIXED_NOREPLACE);
        if (!p || p != (void *)(uintptr_t)where[i]) {
            printf("place %llx: no\n", (unsigned long long)where[i]);
            continue;
        }
        static const uint8_t code[] = {0x89, 0xf8, 0x83, 0xc0, 0x11, 0xc3};
        for (unsigned k = 0; k < 3000; k++)
            *(volatile uint32_t *)(p + k * 4) += k;
        memcpy(p + 4093, code, sizeof(code));
        uint32_t value = 5;
        __asm__ volatile("call *%1" : "=a"(value) : "r"(p + 4093), "D"(5) : "memory");
#ifdef __x86_64__
        printf("place %llx: %u %u\n", (unsigned long long)where[i], value, *(uint32_t *)(p + 8000));
#else
        printf("place %llx: %u\n", (unsigned long long)where[i], *(uint32_t *)(p + 8000));
#endif
        munmap(p, 3 * 4096);
        TRY("place gone", p, (void)*(volatile uint8_t *)(p + 4096));
    }
}

/* Handlers that mend what was wrong and return. */
static uint8_t *mend_page;
static volatile unsigned mended;

static void on_fault(int number, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    mended++;
    if (number == SIGSEGV) {
        uintptr_t page = (uintptr_t)info->si_addr & ~4095ul;
        mprotect((void *)page, 4096, PROT_READ | PROT_WRITE);
    } else if (number == SIGILL) {
#ifdef __x86_64__
        c->uc_mcontext.gregs[REG_RIP] += 2;
        c->uc_mcontext.gregs[REG_R10] = 0x1234;
        c->uc_mcontext.gregs[REG_R11] ^= 0xffff;
        c->uc_mcontext.gregs[REG_EFL] ^= 1;
#else
        c->uc_mcontext.gregs[REG_EIP] += 2;
#endif
        c->uc_mcontext.fpregs->
#ifdef __x86_64__
            mxcsr ^= 0x6000;
#else
            cw ^= 0xc00;
#endif
    }
}

static void mending(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK}, old[2];
    static uint8_t alternate[65536];
    sigaltstack(&(stack_t){.ss_sp = alternate, .ss_size = sizeof(alternate)}, NULL);
    sigaction(SIGSEGV, &action, &old[0]);
    sigaction(SIGILL, &action, &old[1]);
    mend_page = map(NULL, 64 * 4096, PROT_NONE, 0);
    for (unsigned round = 0; round < 20; round++) {
        mprotect(mend_page, 64 * 4096, round & 1 ? PROT_READ : PROT_NONE);
        for (unsigned i = 0; i < 64 * 512 - 1; i += 7)
            ((volatile uint64_t *)mend_page)[i] += i;
        memmove(mend_page + 3, mend_page, 40 * 4096 + 17);
    }
    uint64_t hash = 0;
    for (unsigned i = 0; i < 64 * 512; i++)
        hash = hash * 31 + ((uint64_t *)mend_page)[i];
    printf("mended %u times, %016llx\n", mended, (unsigned long long)hash);
#ifdef __x86_64__
    for (unsigned i = 0; i < 3; i++) {
        uint64_t r10 = i, r11 = 77, flags;
        uint32_t mxcsr;
        __asm__ volatile("mov %0, %%r10\n mov %1, %%r11\n stc\n ud2\n pushfq\n pop %2\n mov %%r10, %0\n mov %%r11, %1" : "+&r"(r10), "+&r"(r11), "=&r"(flags)::"r10", "r11", "cc", "memory");
        __asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
        printf("after a handler: r10 %llx r11 %llx carry %d mxcsr %x\n", (unsigned long long)r10, (unsigned long long)r11, (int)(flags & 1), mxcsr & ~0x3fu);
    }
#endif
    sigaction(SIGSEGV, &old[0], NULL);
    sigaction(SIGILL, &old[1], NULL);
    munmap(mend_page, 64 * 4096);
}

/* Single steps of its own: TF set by POPF. */
static volatile unsigned traps;

static void on_trap(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    traps += info->si_code == TRAP_TRACE;
}

static void tracing(void)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO}, old;
    sigaction(SIGTRAP, &action, &old);
    for (unsigned i = 0; i < 200; i++) {
#ifdef __x86_64__
        __asm__ volatile("pushfq\n orq $0x100, (%%rsp)\n popfq\n nop\n mov $5, %%ecx\n1: dec %%ecx\n jnz 1b\n push %%rcx\n pop %%rcx\n pushfq\n andq $~0x100, (%%rsp)\n popfq" ::: "ecx", "cc", "memory");
#else
        __asm__ volatile("pushf\n orl $0x100, (%%esp)\n popf\n nop\n mov $5, %%ecx\n1: dec %%ecx\n jnz 1b\n push %%ecx\n pop %%ecx\n pushf\n andl $~0x100, (%%esp)\n popf" ::: "ecx", "cc", "memory");
#endif
    }
    printf("traced %u instructions\n", traps);
    sigaction(SIGTRAP, &old, NULL);
}

/* A timer's signals at any instruction of code that uses every register: nothing may change. */
static volatile unsigned ticks;

static void on_tick(int number)
{
    (void)number;
    ticks++;
    __asm__ volatile("pxor %%xmm0, %%xmm0\n pxor %%xmm15, %%xmm15\n fld1\n fstp %%st(0)" ::: "memory");
}

#ifdef __x86_64__
static void interrupted(void)
{
    sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_tick, .sa_flags = SA_RESTART}, NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){{0, 300}, {0, 300}}, NULL);
    uint64_t bad = 0;
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        uint64_t sum;
        __asm__ volatile("mov $1, %%eax\n mov $2, %%ebx\n mov $3, %%ecx\n mov $4, %%edx\n mov $5, %%esi\n mov $6, %%edi\n mov $8, %%r8d\n mov $9, %%r9d\n mov $10, %%r10d\n"
                         "mov $11, %%r11d\n mov $12, %%r12d\n mov $13, %%r13d\n mov $14, %%r14d\n mov $20000, %%r15d\n movq %%rax, %%xmm0\n movq %%r15, %%xmm15\n stc\n"
                         "1: lea 1(%%rax), %%rax\n lea -1(%%rax), %%rax\n xchg %%r10, %%r11\n xchg %%r11, %%r10\n lea -1(%%r15), %%r15\n jnc 2f\n"
                         "push %%rcx\n lea -1(%%r15), %%rcx\n jrcxz 3f\n pop %%rcx\n jmp 1b\n3: pop %%rcx\n"
                         "2: adc $0, %%rax\n add %%rbx, %%rax\n add %%rcx, %%rax\n add %%rdx, %%rax\n add %%rsi, %%rax\n add %%rdi, %%rax\n add %%r8, %%rax\n add %%r9, %%rax\n"
                         "add %%r10, %%rax\n add %%r11, %%rax\n add %%r12, %%rax\n add %%r13, %%rax\n add %%r14, %%rax\n add %%r15, %%rax\n movq %%xmm0, %%rbx\n add %%rbx, %%rax\n"
                         "movq %%xmm15, %%rbx\n add %%rbx, %%rax"
                         : "=a"(sum)::"rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm15", "memory", "cc");
        if (sum != 1 + 2 + 3 + 4 + 5 + 6 + 8 + 9 + 10 + 11 + 12 + 13 + 14 + 1 + 1 + 1 + 20000)
            bad = sum;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (ticks <= 50 || now.tv_sec - start.tv_sec + (double)(now.tv_nsec - start.tv_nsec) / 1e9 < 0.5); /* however busy the host is */
    setitimer(ITIMER_REAL, &(struct itimerval){0}, NULL);
    printf("interrupted, wrong sum %llu\n", (unsigned long long)bad);
}
#endif

static void doors(void)
{
    long pid = getpid(), answer;
    __asm__ volatile("int $0x80" : "=a"(answer) : "0"(20) : "memory");      /* getpid in the 32-bit table */
    printf("int 0x80 %d\n", answer == pid);
#ifdef __x86_64__
    uint64_t rcx, r11;
    __asm__ volatile("stc\n syscall\n" : "=a"(answer), "=c"(rcx), "=r"(r11) : "0"((long)SYS_getpid) : "r11", "memory");
    printf("syscall %d\n", answer == pid);
    __asm__ volatile("syscall" : "=a"(answer) : "0"(-5L) : "rcx", "r11", "memory");
    printf("no such system call %ld\n", answer);
    __asm__ volatile("syscall" : "=a"(answer) : "0"((long)SYS_write), "D"(1L), "S"(0xffff800000000000), "d"(5L) : "rcx", "r11", "memory");
    printf("write from the kernel's half %ld\n", answer);
#endif
    struct timespec last = {0}, now;
    unsigned backwards = 0;
    for (unsigned i = 0; i < 100000; i++) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        backwards += now.tv_sec < last.tv_sec || (now.tv_sec == last.tv_sec && now.tv_nsec < last.tv_nsec);
        last = now;
    }
    uint64_t stamp = 0;
    for (unsigned i = 0; i < 100000; i++) {
        uint64_t next = __builtin_ia32_rdtsc();
        backwards += next < stamp;
        stamp = next;
    }
    printf("time went back %u times\n", backwards);
}

/* How processes die. */
static void deaths(void)
{
    for (int which = 0; which < 7; which++) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            for (int i = 1; i < 32; i++)
                if (i != SIGKILL && i != SIGSTOP)
                    signal(i, SIG_DFL);
            struct { uint8_t *p; } nobody = {NULL};
            switch (which) {
            case 0: abort();
            case 1: *(volatile uint8_t *)nobody.p = 1; break;
            case 2: __asm__ volatile("ud2"); break;
            case 3: __asm__ volatile("int3"); break;
            case 4: kill(getpid(), SIGKILL); break;
            case 5: __asm__ volatile("xor %%esp, %%esp\n .byte 0x50" ::: "memory"); break;
            case 6: __asm__ volatile("xor %%ecx, %%ecx\n div %%ecx" ::: "eax", "ecx", "edx"); break;
            }
            _exit(0);
        }
        int status = -1;
        waitpid(child, &status, 0);
        printf("death %d: %x\n", which, status & 0x7f);
    }
}

static int deep(int n)
{
    volatile char space[3000];
    space[n % 3000] = (char)n;
    return n ? deep(n - 1) + space[n % 3000] : 0;
}

int main(int argc, char **argv)
{
    (void)argc, (void)argv;
    static const int caught[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
    for (unsigned i = 0; i < sizeof(caught) / sizeof(caught[0]); i++)
        sigaction(caught[i], &(struct sigaction){.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK}, NULL);
    static uint8_t alternate[65536];
    sigaltstack(&(stack_t){.ss_sp = alternate, .ss_size = sizeof(alternate)}, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    forbidden();
    arithmetic();
    memory();
    places();
    mending();
    tracing();
#ifdef __x86_64__
    interrupted();
#endif
    doors();
    deaths();
    printf("deep %d\n", deep(2000));
    return 0;
}
