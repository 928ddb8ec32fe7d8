/*
 * One instruction on the processor: everything is loaded, IRET enters it with TF set, and the signal of the single step, or of its fault, brings the result.
 * A repeated string instruction is stepped until it is left.
 */
#include "cases.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#define STEPS_MAX 64

/* The trampoline reads it by offsets. */
struct launch {
    uint64_t gpr[16];
    uint64_t frame[5]; /* RIP CS RFLAGS RSP SS */
    _Alignas(64) uint8_t xsave[CPU_XSAVE_BYTES];
};
_Static_assert(offsetof(struct launch, xsave) == 192, "used below");

static struct launch launch;
static sigjmp_buf back;
static struct state *result;
static unsigned steps; /* of a repeated instruction; more than STEPS_MAX: not stepping */
static uint64_t xcr0;
static uint32_t image_bytes;

void processor_launch(struct launch *launch, uint64_t components) __attribute__((noreturn));
__asm__(".text\nprocessor_launch:\n"
        " mov %esi, %eax\n xor %edx, %edx\n xrstor64 192(%rdi)\n"
        " lea 128(%rdi), %rsp\n"
        " mov 0(%rdi), %rax\n mov 8(%rdi), %rcx\n mov 16(%rdi), %rdx\n mov 24(%rdi), %rbx\n mov 40(%rdi), %rbp\n mov 48(%rdi), %rsi\n"
        " mov 64(%rdi), %r8\n mov 72(%rdi), %r9\n mov 80(%rdi), %r10\n mov 88(%rdi), %r11\n mov 96(%rdi), %r12\n mov 104(%rdi), %r13\n"
        " mov 112(%rdi), %r14\n mov 120(%rdi), %r15\n mov 56(%rdi), %rdi\n iretq\n");

static const uint8_t greg_of[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

static void on_signal(int number, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    greg_t *regs = uc->uc_mcontext.gregs;
    if (!result)
        abort();
    if (number == SIGTRAP && (uint64_t)regs[REG_RIP] == CODE && ++steps < STEPS_MAX)
        return; /* a repeated instruction */
    for (unsigned n = 0; n < 16; n++)
        result->gpr[n] = (uint64_t)regs[greg_of[n]];
    result->rip = (uint64_t)regs[REG_RIP];
    result->rflags = (uint64_t)regs[REG_EFL] & ~(RFLAGS_TF | RFLAGS_RF);
    result->vector = number == SIGTRAP && steps <= STEPS_MAX ? -1 : (int)regs[REG_TRAPNO];
    result->error = (uint64_t)regs[REG_ERR];
    result->cr2 = (uint64_t)regs[REG_CR2];
    memcpy(result->xsave, uc->uc_mcontext.fpregs, image_bytes);
    siglongjmp(back, 1);
}

static void run(const struct state *from, struct state *to, uint64_t rflags)
{
    memcpy(launch.gpr, from->gpr, sizeof launch.gpr);
    memcpy(launch.xsave, from->xsave, sizeof launch.xsave);
    uint16_t cs, ss;
    __asm__("mov %%cs, %0; mov %%ss, %1" : "=r"(cs), "=r"(ss));
    memcpy(launch.frame, (uint64_t[]){from->rip, cs, rflags, from->gpr[GPR_RSP], ss}, sizeof launch.frame);
    result = to;
    if (!sigsetjmp(back, 0))
        processor_launch(&launch, xcr0);
    result = NULL;
}

void processor_run(const struct test_case *test, const struct state *from, struct state *to)
{
    memset((void *)CODE_PAGE, 0xc3, 4096);
    memcpy((void *)CODE, test->code, 15);
    steps = 0;
    run(from, to, from->rflags | RFLAGS_TF);
}

void processor_run_on(const struct state *from, struct state *to)
{
    steps = STEPS_MAX + 1;
    run(from, to, from->rflags | RFLAGS_IF);
}

int processor_init(uint64_t components, uint32_t bytes)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    stack_t stack = {.ss_sp = malloc(1 << 18), .ss_size = 1 << 18};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    xcr0 = components;
    image_bytes = bytes;
    if (!stack.ss_sp || sigaltstack(&stack, NULL))
        return -ENOMEM;
    for (unsigned n = 0; n < sizeof signals / sizeof *signals; n++)
        sigaction(signals[n], &action, NULL);
    void *area = mmap((void *)AREA, AREA_BYTES + 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    return area == (void *)AREA ? 0 : -errno;
}
