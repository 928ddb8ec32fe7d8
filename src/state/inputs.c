/*
 * The funnel for nondeterminism: passes the host's clocks and random bytes on.
 *
 * The TSC's frequency is a constant of the host, found once and cached; two threads that race find the same or nearly the same value, and the
 * first one stored is the one that everybody gets. Threading: any thread.
 */
#include "state/inputs.h"

#include <cpuid.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/random.h>
#include <time.h>
#include <x86intrin.h>

#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_LOOP | IN_API, getrandom);

#define NS_PER_SECOND 1000000000ull
#define TSC_MEASURE_NS 20000000ull
#define TSC_MEASURE_ROUGHLY_NS 1000000ull
#define ASLEEP_NS 1000000 /* more than the two readings of asleep_ns may differ by */
#define TSC_KHZ_LOWEST 100000ull    /* 100 MHz: below and above these limits a leaf is taken for nonsense */
#define TSC_KHZ_HIGHEST 20000000ull /* 20 GHz */

static uint64_t clock_ns(clockid_t clock)
{
    struct timespec ts;
    clock_gettime(clock, &ts);
    return (uint64_t)ts.tv_sec * NS_PER_SECOND + (uint64_t)ts.tv_nsec;
}

uint64_t inputs_now_ns(void)
{
    return clock_ns(CLOCK_MONOTONIC);
}

uint64_t inputs_wall_ns(void)
{
    return clock_ns(CLOCK_REALTIME);
}

uint64_t inputs_tsc(void)
{
    return __rdtsc();
}

bool inputs_tsc_is_host(void)
{
    return true;
}

bool inputs_random_is_host(void)
{
    return true;
}

/* CPUID leaf 15H, SDM vol. 2, CPUID: crystal frequency (ECX) times EBX / EAX. 0 when not given. */
static uint64_t tsc_khz_leaf_15(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(0x15, &eax, &ebx, &ecx, &edx) || !eax || !ebx || !ecx)
        return 0;
    return (uint64_t)ecx * ebx / eax / 1000;
}

/* The hypervisors' timing leaf 40000010H: EAX is the TSC's frequency in kHz. 0 when not given. */
static uint64_t tsc_khz_hypervisor(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & (1u << 31)))
        return 0;
    __cpuid(0x40000000, eax, ebx, ecx, edx);
    if (eax < 0x40000010 || eax > 0x400000ff)
        return 0;
    __cpuid(0x40000010, eax, ebx, ecx, edx);
    return eax;
}

/* A reading of both clocks that no interruption came between: the tightest of a few. */
static void clock_pair(uint64_t *tsc, uint64_t *ns)
{
    uint64_t best = UINT64_MAX;
    for (int i = 0; i < 8; i++) {
        uint64_t before = __rdtsc();
        uint64_t now = clock_ns(CLOCK_MONOTONIC);
        uint64_t after = __rdtsc();
        if (after - before < best) {
            best = after - before;
            *tsc = before + best / 2;
            *ns = now;
        }
    }
}

/* When the program was loaded, so that there is less to wait for when the frequency is asked for. Constant from then on. */
static uint64_t tsc_loaded, ns_loaded;
static int64_t asleep_ns_loaded;

/* How long the host has slept in all, in which the TSC may have begun anew. */
static int64_t asleep_ns(void)
{
    return (int64_t)(clock_ns(CLOCK_BOOTTIME) - clock_ns(CLOCK_MONOTONIC));
}

__attribute__((constructor)) static void begin_measuring(void)
{
    asleep_ns_loaded = asleep_ns();
    clock_pair(&tsc_loaded, &ns_loaded);
}

static uint64_t tsc_khz_measured(uint64_t during_ns)
{
    uint64_t tsc_start = tsc_loaded, ns_start = ns_loaded, tsc_end, ns_end;
    if (asleep_ns() - asleep_ns_loaded > ASLEEP_NS)
        clock_pair(&tsc_start, &ns_start);
    struct timespec until = {.tv_sec = (time_t)((ns_start + during_ns) / NS_PER_SECOND), .tv_nsec = (long)((ns_start + during_ns) % NS_PER_SECOND)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
        ;
    clock_pair(&tsc_end, &ns_end);
    return (uint64_t)((unsigned __int128)(tsc_end - tsc_start) * 1000000u / (ns_end - ns_start));
}

static bool tsc_khz_plausible(uint64_t khz)
{
    return khz >= TSC_KHZ_LOWEST && khz <= TSC_KHZ_HIGHEST;
}

/* What the processor or a hypervisor says; 0: nothing that can be. */
static uint64_t tsc_khz_told(void)
{
    uint64_t khz = tsc_khz_leaf_15();
    if (!tsc_khz_plausible(khz))
        khz = tsc_khz_hypervisor();
    return tsc_khz_plausible(khz) ? khz : 0;
}

static _Atomic uint64_t tsc_khz; /* 0: not known yet */

uint64_t inputs_tsc_khz(void)
{
    uint64_t khz = atomic_load(&tsc_khz);
    if (khz)
        return khz;
    khz = tsc_khz_told();
    if (!khz)
        khz = tsc_khz_measured(TSC_MEASURE_NS);
    uint64_t expected = 0;
    return atomic_compare_exchange_strong(&tsc_khz, &expected, khz) ? khz : expected;
}

uint64_t inputs_tsc_khz_roughly(void)
{
    uint64_t khz = atomic_load(&tsc_khz);
    if (!khz)
        khz = tsc_khz_told();
    return khz ? khz : tsc_khz_measured(TSC_MEASURE_ROUGHLY_NS);
}

int inputs_random(void *data, size_t size_bytes)
{
    uint8_t *next = data;
    while (size_bytes > 0) {
        ssize_t got = getrandom(next, size_bytes, 0);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -errno;
        next += got;
        size_bytes -= (size_t)got;
    }
    return 0;
}
