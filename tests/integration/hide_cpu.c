/*
 * Preloaded into a program, makes the processor look as if it lacked what HIDE_CPU names (words from `features`): CPUID traps (arch_prctl, ARCH_CPUID_SET), and the answer is
 * changed; the kernel's word in the auxiliary vector, too. Exit status 77 where CPUID cannot be made to trap.
 *
 * Threading: threads inherit the trap; the handler uses nothing but its frame and what the constructor wrote.
 */
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_CPUID_SET 0x1012 /* <asm/prctl.h> is often older than the kernel */
#define HWCAP2_FSGSBASE 2ul
#define SKIPPED 77

enum { EAX, EBX, ECX, EDX };

static const struct feature {
    const char *name;
    unsigned leaf, subleaf, reg, bit;
} features[] = {
    {"fsgsbase", 7, 0, EBX, 0}, {"bmi2", 7, 0, EBX, 8}, {"xsave", 1, 0, ECX, 27}, {"invariant-tsc", 0x80000007, 0, EDX, 8},
};
#define FEATURES (sizeof features / sizeof *features)

static unsigned hidden; /* bit per feature */

static void cpuid_answer(greg_t *regs)
{
    unsigned leaf = (unsigned)regs[REG_RAX], subleaf = (unsigned)regs[REG_RCX], r[4];
    syscall(SYS_arch_prctl, ARCH_CPUID_SET, 1);
    __cpuid_count(leaf, subleaf, r[EAX], r[EBX], r[ECX], r[EDX]);
    syscall(SYS_arch_prctl, ARCH_CPUID_SET, 0);
    for (unsigned n = 0; n < FEATURES; n++)
        if (hidden >> n & 1 && features[n].leaf == leaf && features[n].subleaf == (leaf == 7 ? subleaf : 0))
            r[features[n].reg] &= ~(1u << features[n].bit);
    regs[REG_RAX] = r[EAX];
    regs[REG_RBX] = r[EBX];
    regs[REG_RCX] = r[ECX];
    regs[REG_RDX] = r[EDX];
    regs[REG_RIP] += 2;
}

static void on_segv(int number, siginfo_t *info, void *context)
{
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    if (info->si_code == SI_KERNEL && memcmp((const void *)regs[REG_RIP], "\x0f\xa2", 2) == 0)
        cpuid_answer(regs);
    else
        signal(number, SIG_DFL); /* it happens again */
}

static int is_hidden(const char *name)
{
    for (unsigned n = 0; n < FEATURES; n++)
        if (hidden >> n & 1 && !strcmp(features[n].name, name))
            return 1;
    return 0;
}

unsigned long getauxval(unsigned long type)
{
    unsigned long (*real)(unsigned long) = (unsigned long (*)(unsigned long))dlsym(RTLD_NEXT, "getauxval");
    unsigned long value = real(type);
    return type == AT_HWCAP2 && is_hidden("fsgsbase") ? value & ~HWCAP2_FSGSBASE : value;
}

__attribute__((constructor)) static void hide(void)
{
    const char *words = getenv("HIDE_CPU");
    struct sigaction action = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    for (unsigned n = 0; words && n < FEATURES; n++)
        if (strstr(words, features[n].name))
            hidden |= 1u << n;
    if (hidden && (sigaction(SIGSEGV, &action, NULL) || syscall(SYS_arch_prctl, ARCH_CPUID_SET, 0)))
        _exit(SKIPPED);
}
