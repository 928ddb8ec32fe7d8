/* For the targets that run guest code: one tiny_vm, and a timer that ends a run. */
#ifndef DOPPEL_FUZZ_VM_H
#define DOPPEL_FUZZ_VM_H

#include <signal.h>
#include <stdlib.h>
#include <sys/time.h>

#include "../unit/engine/tiny_vm.c"
#include "util/log.h"

static struct tiny_vm vm;

static void time_is_up(int signal_number)
{
    vm.exit_wanted = true;
    vcpu_raise_attention(vm.vcpu);
}

/* 0 stops it. */
static void start_timer(suseconds_t microseconds)
{
    struct itimerval timer = {.it_value = {0, microseconds}};
    if (setitimer(ITIMER_REAL, &timer, NULL))
        abort();
}

static void create(void)
{
    struct sigaction action = {.sa_handler = time_is_up, .sa_flags = SA_RESTART};
    log_set_level(LOG_ERROR);
    if (tiny_vm_create(&vm) || sigaction(SIGALRM, &action, NULL))
        abort();
}

#endif
