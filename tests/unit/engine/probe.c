/* See probe.h. */
#include "probe.h"

#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

static sigjmp_buf escape;
static volatile uintptr_t fault_address;

static void on_fault(int number, siginfo_t *info, void *context)
{
    fault_address = (uintptr_t)info->si_addr;
    siglongjmp(escape, 1);
}

bool probe_run(void (*code)(void *opaque), void *opaque, uintptr_t *address)
{
    const struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    struct sigaction segv, bus; /* cmocka has its own */
    sigaction(SIGSEGV, &action, &segv);
    sigaction(SIGBUS, &action, &bus);
    volatile bool done = false;
    if (!sigsetjmp(escape, 0)) {
        code(opaque);
        done = true;
    } else if (address) {
        *address = fault_address;
    }
    sigaction(SIGSEGV, &segv, NULL);
    sigaction(SIGBUS, &bus, NULL);
    return done;
}

static void read_byte(void *at)
{
    (void)*(volatile uint8_t *)at;
}
static void write_byte(void *at)
{
    volatile uint8_t *byte = at;
    *byte = *byte;
}

bool probe_readable(const void *at)
{
    return probe_run(read_byte, (void *)at, NULL);
}
bool probe_writable(void *at)
{
    return probe_run(write_byte, at, NULL);
}
