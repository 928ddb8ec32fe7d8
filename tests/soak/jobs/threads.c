/* threads SEED: threads that meet at mutexes, conditions, spinlocks, atomics, barriers, pipes and futexes while signals arrive; all sums are known beforehand. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

enum { THREADS = 4, ROUNDS = 20000 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static pthread_spinlock_t spin;
static pthread_barrier_t barrier;
static unsigned plain, turn, spun;
static atomic_uint added, compared;
static _Atomic uint64_t wide;
static atomic_uint alarms;
static __thread unsigned local;

static void on_alarm(int number)
{
    (void)number;
    atomic_fetch_add(&alarms, 1);
}

static void *meet(void *argument)
{
    unsigned me = (unsigned)(uintptr_t)argument;
    for (unsigned i = 0; i < ROUNDS; i++) {
        pthread_mutex_lock(&mutex);
        plain++;
        pthread_mutex_unlock(&mutex);
        pthread_spin_lock(&spin);
        spun += i % 3;
        pthread_spin_unlock(&spin);
        atomic_fetch_add(&added, i);
        unsigned old = atomic_load(&compared);
        while (!atomic_compare_exchange_weak(&compared, &old, old * 2 > 1000 ? old + 1 : old + 1))
            ;
        atomic_fetch_add(&wide, (uint64_t)i << 32 | 1);
        local += me;
        if (i % 2000 == 0)
            pthread_barrier_wait(&barrier);
    }
    for (unsigned i = 0; i < 300; i++) {      /* in turns */
        pthread_mutex_lock(&mutex);
        while (turn % THREADS != me)
            pthread_cond_wait(&changed, &mutex);
        turn++;
        pthread_cond_broadcast(&changed);
        pthread_mutex_unlock(&mutex);
    }
    return (void *)(uintptr_t)local;
}

/* Two threads hand a token through plain stores and loads (x86 keeps their order). */
static volatile unsigned letter[2][64];
static atomic_int order_errors;

static void *post(void *unused)
{
    for (unsigned i = 1; i <= 300000; i++) {
        letter[0][0] = i;
        letter[1][0] = i;
    }
    return unused;
}

static void *receive(void *unused)
{
    for (unsigned last = 0; last < 300000;) {
        unsigned second = letter[1][0], first = letter[0][0];
        if (first < second || second < last)
            atomic_fetch_add(&order_errors, 1);
        last = second;
    }
    return unused;
}

static void *nothing(void *argument)
{
    return argument;
}

static void pipes(unsigned seed)
{
    int there[2], back[2];
    if (pipe(there) || pipe(back))
        exit(1);
    pid_t child = fork();
    unsigned value = seed;
    if (child == 0) {
        while (read(there[0], &value, sizeof(value)) == sizeof(value) && value != 0xffffffff) {
            value = value * 69069 + 1;
            if (write(back[1], &value, sizeof(value)) != sizeof(value))
                _exit(1);
        }
        _exit(0);
    }
    for (unsigned i = 0; i < 3000; i++) {
        while (write(there[1], &value, sizeof(value)) < 0 && errno == EINTR)
            ;
        while (read(back[0], &value, sizeof(value)) < 0 && errno == EINTR)
            ;
    }
    printf("pipe %08x\n", value);
    value = 0xffffffff;
    if (write(there[1], &value, sizeof(value)) < 0)
        exit(1);
}

int main(int argc, char **argv)
{
    unsigned seed = argc > 1 ? (unsigned)atoi(argv[1]) : 0;
    pthread_t threads[THREADS];
    pthread_spin_init(&spin, PTHREAD_PROCESS_PRIVATE);
    pthread_barrier_init(&barrier, NULL, THREADS);
    sigaction(SIGALRM, &(struct sigaction){.sa_handler = on_alarm, .sa_flags = SA_RESTART}, NULL);
    setitimer(ITIMER_REAL, &(struct itimerval){{0, 700}, {0, 700}}, NULL);
    for (unsigned round = 0; round < 2; round++) {
        plain = spun = turn = 0;
        added = 0;
        compared = 0;
        wide = 0;
        for (uintptr_t i = 0; i < THREADS; i++)
            pthread_create(&threads[i], NULL, meet, (void *)i);
        for (unsigned i = 0; i < THREADS; i++) {
            void *result;
            pthread_join(threads[i], &result);
            printf("thread %u %lu\n", i, (unsigned long)(uintptr_t)result);
        }
        printf("%u %u %u %u %llu %u\n", plain, spun, atomic_load(&added), atomic_load(&compared), (unsigned long long)atomic_load(&wide), turn);
    }
    pthread_create(&threads[0], NULL, post, NULL);
    pthread_create(&threads[1], NULL, receive, NULL);
    pthread_join(threads[0], NULL);
    pthread_join(threads[1], NULL);
    printf("out of order %d\n", atomic_load(&order_errors));
    uintptr_t sum = 0;
    for (uintptr_t i = 0; i < 600; i++) {
        void *result;
        pthread_create(&threads[0], NULL, nothing, (void *)i);
        pthread_join(threads[0], &result);
        sum += (uintptr_t)result;
    }
    printf("created %lu\n", (unsigned long)sum);
    pipes(seed);
    printf("alarms %d\n", atomic_load(&alarms) > 0);
    return 0;
}
