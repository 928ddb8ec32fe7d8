/*
 * The one funnel through which nondeterminism reaches a guest: time, random bytes; later packets, keys and disk completions. Recording and
 * replay will be put in here; until then each function passes the host's value on. Callable from any thread.
 */
#ifndef DOPPEL_STATE_INPUTS_H
#define DOPPEL_STATE_INPUTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Guest's monotonic time: CLOCK_MONOTONIC, nanoseconds, same scale as loop timers. */
uint64_t inputs_now_ns(void);
/* Wall clock, nanoseconds since 1970 UTC (for the RTC). */
uint64_t inputs_wall_ns(void);
/* Host time stamp counter; a vCPU adds its own offset. */
uint64_t inputs_tsc(void);
/* True: inputs_tsc() is the host's RDTSC and nobody wants to know of each call, so engines may let guests execute RDTSC itself. Never changes while processors run. */
bool inputs_tsc_is_host(void);
/* True: guests may have the processor's own random numbers (RDRAND, RDSEED); otherwise CPUID does not offer them. Never changes. */
bool inputs_random_is_host(void);
/* Frequency of inputs_tsc in kHz; measured or read from CPUID once, then cached. */
uint64_t inputs_tsc_khz(void);
/* The same to one in ten thousand, in a twentieth of the time: for comparing with what a state says. */
uint64_t inputs_tsc_khz_roughly(void);
/* Fills from getrandom(2). Returns 0 or -errno. */
int inputs_random(void *data, size_t size_bytes);

#endif
