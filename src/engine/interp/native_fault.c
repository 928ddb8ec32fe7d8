/*
 * Host signals that guest instructions cause inside stubs.
 *
 * SIGFPE (unmasked x87 or SSE exception), SIGSEGV (misaligned operand, reserved MXCSR bits), SIGILL (the host lacks the instruction) and SIGBUS with the
 * instruction pointer in a registered arena make the stub return the trap number + 1: a stub keeps nothing on its stack but the return address. Everything else goes to
 * the handler that was there before. The kernel keeps vector state in the signal frame and restores it, sticky exception flags included.
 * Signals are process-wide, so the table of arenas and the previous actions are the one place in this folder that is static.
 * Threading: registration from any thread by compare-and-swap; the handler only reads.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <ucontext.h>

#include "engine/interp/native_priv.h"

#define ARENAS_MAX 1024

static struct {
    _Atomic uintptr_t start, length;
} arenas[ARENAS_MAX];

static const int signals[] = {SIGFPE, SIGSEGV, SIGILL, SIGBUS};
#define SIGNALS (sizeof(signals) / sizeof(signals[0]))

static struct sigaction previous[SIGNALS];
static _Atomic(native_fault_fn *) first;

/* Trap numbers that an instruction's operands and state can cause. A page fault in a stub is not among them: that is the host's trouble. */
#define TRAPS_EXPECTED                                                                             \
    (1u << VECTOR_UD | 1u << VECTOR_GP | 1u << VECTOR_MF | 1u << VECTOR_AC | 1u << VECTOR_XM)

int native_fault_register(const void *start, size_t length_bytes)
{
    for (unsigned n = 0; n < ARENAS_MAX; n++) {
        uintptr_t expected = 0;
        if (atomic_compare_exchange_strong(&arenas[n].start, &expected, (uintptr_t)start)) {
            atomic_store(&arenas[n].length, length_bytes);
            return 0;
        }
    }
    return -ENOSPC;
}

void native_fault_unregister(const void *start)
{
    for (unsigned n = 0; n < ARENAS_MAX; n++)
        if (atomic_load(&arenas[n].start) == (uintptr_t)start) {
            atomic_store(&arenas[n].length, 0);
            atomic_store(&arenas[n].start, 0);
        }
}

void native_fault_first(native_fault_fn *fn)
{
    atomic_store(&first, fn);
}

static bool in_arena(uintptr_t address)
{
    for (unsigned n = 0; n < ARENAS_MAX; n++) {
        uintptr_t start = atomic_load_explicit(&arenas[n].start, memory_order_relaxed);
        if (start && address - start < atomic_load_explicit(&arenas[n].length, memory_order_relaxed))
            return true;
    }
    return false;
}

/* Somebody cut a file that guest memory is mapped from: what it had is lost, and the process with it. At least it is said. */
static void tell_of_lost_file(void)
{
    static const char text[] = "doppel: a file that the guest's memory is mapped from (a snapshot's memory, or persistent memory) was cut short: the guest cannot go on\n";
    (void)!write(STDERR_FILENO, text, sizeof text - 1);
}

static void chain(int sig, siginfo_t *info, void *context)
{
    if (sig == SIGBUS && info->si_code == BUS_ADRERR)
        tell_of_lost_file();
    unsigned n = 0;
    while (n < SIGNALS - 1 && signals[n] != sig)
        n++;
    const struct sigaction *old = &previous[n];
    if (old->sa_flags & SA_SIGINFO) {
        old->sa_sigaction(sig, info, context);
    } else if (old->sa_handler != SIG_DFL && old->sa_handler != SIG_IGN) {
        old->sa_handler(sig);
    } else if (old->sa_handler == SIG_IGN && info->si_code <= 0) {
        return; /* sent by somebody, and still not wanted */
    } else {
        /* The instruction runs again and ends the process as it would have without us. */
        signal(sig, SIG_DFL);
        if (info->si_code <= 0)
            raise(sig);
    }
}

static void handler(int sig, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned trap = (unsigned)regs[REG_TRAPNO];
    native_fault_fn *ask = atomic_load_explicit(&first, memory_order_relaxed);

    if (ask && ask(sig, info, context)) {
        errno = saved_errno;
        return;
    }
    if (info->si_code > 0 && trap < 32 && TRAPS_EXPECTED >> trap & 1 && in_arena((uintptr_t)regs[REG_RIP])) {
        regs[REG_RIP] = *(const greg_t *)regs[REG_RSP];
        regs[REG_RSP] += 8;
        regs[REG_RAX] = trap + 1;
    } else {
        chain(sig, info, context);
    }
    errno = saved_errno;
}

static int install(unsigned n)
{
    struct sigaction current, action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    if (sigaction(signals[n], NULL, &current))
        return -errno;
    if (current.sa_flags & SA_SIGINFO && current.sa_sigaction == handler)
        return 0;
    previous[n] = current;
    return sigaction(signals[n], &action, NULL) ? -errno : 0;
}

/* Called again it takes back signals that others have taken since. */
int native_install_handlers(void)
{
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    int error = 0;
    pthread_mutex_lock(&lock);
    for (unsigned n = 0; n < SIGNALS && !error; n++)
        error = install(n);
    pthread_mutex_unlock(&lock);
    return error;
}
