/*
 * steady MEBIBYTES DIRECTORY...: inside a guest, looks without an end at what must never change by itself: memory, files (one that stays open in each directory), the monotonic clock
 * on all processors, timers, a TCP stream, processes. Says "steady: tick N ..." five times a second, "steady: WRONG ..." and ends when something is not as it was left or
 * one part makes no progress, "steady: ok" when it is terminated. Whoever saves, loads and moves the guest meanwhile is not to be noticed.
 */
#include <arpa/inet.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define BLOCK 65536u
#define BLOCKS 32u /* of a file */
#define MEMORY_THREADS 2u
#define DIRECTORIES_MAX 4u
#define TICK_NS 200000000
#define PATIENCE_TICKS 150u     /* without progress */
#define JUMP_NS 30000000000ull  /* the guest's time goes on from where it was, and hosts are busy */

enum part { MEMORY, CLOCK, TIMER, SLEEP, STREAM, PROCESS, FILES, PARTS = FILES + DIRECTORIES_MAX };
static const char *const part_names[PARTS] = {"memory", "clock", "timer", "sleep", "stream", "process", "file0", "file1", "file2", "file3"};
static _Atomic uint64_t progress[PARTS];
static atomic_bool over;

static void wrong(const char *what, uint64_t a, uint64_t b)
{
    printf("\nsteady: WRONG %s (%" PRIx64 ", %" PRIx64 ")\n", what, a, b);
    fflush(stdout);
    _exit(1);
}

static uint64_t next(uint64_t *state)
{
    *state = *state * 6364136223846793005ull + 1442695040888963407ull;
    return *state >> 24;
}

static void fill(uint8_t *at, size_t bytes, uint64_t seed)
{
    uint64_t state = seed * 2 + 1;
    for (size_t n = 0; n < bytes; n += 8) {
        uint64_t value = next(&state);
        memcpy(at + n, &value, 8);
    }
}

static void expect(const uint8_t *at, size_t bytes, uint64_t seed, const char *what)
{
    uint64_t state = seed * 2 + 1, value;
    for (size_t n = 0; n < bytes; n += 8) {
        memcpy(&value, at + n, 8);
        uint64_t wanted = next(&state);
        if (value != wanted)
            wrong(what, value, wanted);
    }
}

/* ---- memory ---- */

static size_t memory_pages;

static void *watch_memory(void *number)
{
    uint64_t state = (uintptr_t)number + 77;
    uint8_t *base = mmap(NULL, memory_pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *seed = calloc(memory_pages, sizeof *seed);
    if (base == MAP_FAILED || !seed)
        wrong("no memory", memory_pages, 0);
    for (size_t page = 0; page < memory_pages; page++)
        fill(base + page * PAGE, PAGE, seed[page] = next(&state));
    for (size_t sweep = 0; !over; sweep++) {
        size_t page = next(&state) % memory_pages, other = sweep % memory_pages;
        expect(base + page * PAGE, PAGE, seed[page], "memory");
        expect(base + other * PAGE, PAGE, seed[other], "memory");
        fill(base + page * PAGE, PAGE, seed[page] = next(&state));
        progress[MEMORY]++;
        if (sweep % 64 == 0)
            usleep(1000);
    }
    return NULL;
}

/* ---- files ---- */

struct directory {
    unsigned number;
    const char *path;
};

static void small_files(const struct directory *directory, uint64_t seed)
{
    char path[256], other[256];
    uint8_t data[512];
    snprintf(path, sizeof path, "%s/small-%u", directory->path, (unsigned)(seed % 8));
    snprintf(other, sizeof other, "%s/moved", directory->path);
    fill(data, sizeof data, seed);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, data, sizeof data) != sizeof data || rename(path, other) < 0)
        wrong("a small file cannot be written", seed, directory->number);
    close(fd);
    memset(data, 0, sizeof data);
    fd = open(other, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, data, sizeof data) != sizeof data)
        wrong("a small file cannot be read", seed, directory->number);
    close(fd);
    expect(data, sizeof data, seed, "a small file");
}

static void *watch_files(void *arg)
{
    const struct directory *directory = arg;
    uint64_t state = directory->number + 99, seed[BLOCKS];
    uint8_t *data = malloc(BLOCK);
    char path[256];
    snprintf(path, sizeof path, "%s/steady", directory->path);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    for (unsigned n = 0; n < BLOCKS; n++) {
        fill(data, BLOCK, seed[n] = next(&state));
        if (fd < 0 || pwrite(fd, data, BLOCK, n * BLOCK) != BLOCK)
            wrong("a file cannot be written", n, directory->number);
    }
    for (unsigned round = 0; !over; round++) {
        unsigned n = next(&state) % BLOCKS, m = next(&state) % BLOCKS;
        if (pread(fd, data, BLOCK, n * BLOCK) != BLOCK)
            wrong("a file cannot be read", n, directory->number);
        expect(data, BLOCK, seed[n], "a file");
        fill(data, BLOCK, seed[m] = next(&state));
        if (pwrite(fd, data, BLOCK, m * BLOCK) != BLOCK)
            wrong("a file cannot be written", m, directory->number);
        if (round % 4 == 0 && (fdatasync(fd) < 0 || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED))) /* what is read next comes from where it is kept */
            wrong("a file cannot be flushed", round, directory->number);
        small_files(directory, next(&state));
        progress[FILES + directory->number]++;
        usleep(2000);
    }
    free(data);
    close(fd);
    return NULL;
}

/* ---- clocks and timers ---- */

static uint64_t now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000ull + (uint64_t)time.tv_nsec;
}

static _Atomic uint64_t latest;

/* What anybody has seen before is not later than what is seen now. */
static void look_at_clock(void)
{
    uint64_t before = latest, now = now_ns();
    if (now < before)
        wrong("the clock went back", now, before);
    if (before && now - before > JUMP_NS)
        wrong("the clock jumped", now, before);
    while (now > before && !atomic_compare_exchange_weak(&latest, &before, now))
        continue;
}

static void *watch_clock(void *unused)
{
    while (!over) {
        for (unsigned n = 0; n < 200; n++)
            look_at_clock();
        progress[CLOCK]++;
        usleep(1000);
    }
    return NULL;
}

static void *watch_timer(void *unused)
{
    struct itimerspec every = {{0, 10000000}, {0, 10000000}};
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    uint64_t count;
    timerfd_settime(fd, 0, &every, NULL);
    while (!over && read(fd, &count, sizeof count) == sizeof count)
        progress[TIMER] += count;
    close(fd);
    return NULL;
}

static void *watch_sleep(void *unused)
{
    while (!over) {
        uint64_t before = now_ns();
        usleep(3000);
        if (now_ns() - before < 3000000)
            wrong("a sleep was too short", now_ns(), before);
        progress[SLEEP]++;
    }
    return NULL;
}

/* ---- a stream of TCP ---- */

static struct sockaddr_in place = {.sin_family = AF_INET};

static void *send_stream(void *unused)
{
    uint8_t data[4096];
    uint64_t state = 5;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, (struct sockaddr *)&place, sizeof place) < 0)
        wrong("no connection", 0, 0);
    while (!over) {
        fill(data, sizeof data, next(&state));
        for (size_t done = 0; done < sizeof data;) {
            ssize_t n = send(fd, data + done, sizeof data - done, MSG_NOSIGNAL);
            if (n <= 0)
                wrong("the stream cannot be written", done, 0);
            done += (size_t)n;
        }
        usleep(500);
    }
    close(fd);
    return NULL;
}

static void *receive_stream(void *arg)
{
    uint8_t data[4096];
    uint64_t state = 5;
    int fd = accept4(*(int *)arg, NULL, NULL, SOCK_CLOEXEC);
    for (;;) {
        ssize_t n = recv(fd, data, sizeof data, MSG_WAITALL);
        if (n != sizeof data && over)
            break;
        if (n != sizeof data)
            wrong("the stream broke", (uint64_t)n, 0);
        expect(data, sizeof data, next(&state), "the stream");
        progress[STREAM]++;
    }
    close(fd);
    return NULL;
}

static int stream_listen(void)
{
    socklen_t length = sizeof place;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&place, sizeof place) < 0 || listen(fd, 1) < 0 || getsockname(fd, (struct sockaddr *)&place, &length) < 0)
        wrong("no listener", 0, 0);
    return fd;
}

/* ---- processes ---- */

static void *watch_processes(void *unused)
{
    while (!over) {
        int status = 0;
        pid_t child = fork();
        if (child == 0) {
            execl("/bin/busybox", "true", (char *)NULL);
            _exit(9);
        }
        if (child < 0 || waitpid(child, &status, 0) != child || status)
            wrong("a process ended otherwise", (uint64_t)child, (uint64_t)status);
        progress[PROCESS]++;
        usleep(20000);
    }
    return NULL;
}

/* ---- all of it ---- */

static void tick(unsigned number, unsigned parts)
{
    static uint64_t seen[PARTS];
    static unsigned since[PARTS];
    printf("steady: tick %u", number);
    for (unsigned n = 0; n < parts; n++) {
        uint64_t is = progress[n];
        since[n] = is == seen[n] ? since[n] + 1 : 0;
        seen[n] = is;
        printf(" %s=%" PRIu64, part_names[n], is);
        if (since[n] > PATIENCE_TICKS) {
            printf("\n");
            wrong(part_names[n], is, since[n]);
        }
    }
    printf(".\n");
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static void *(*const watchers[])(void *) = {watch_clock, watch_clock, watch_timer, watch_sleep, watch_processes, send_stream};
    static struct directory directories[DIRECTORIES_MAX];
    pthread_t thread[MEMORY_THREADS + DIRECTORIES_MAX + sizeof watchers / sizeof *watchers + 1];
    unsigned count = 0, directory_count = argc > 2 ? (unsigned)argc - 2 : 0;
    struct timespec wait = {.tv_nsec = TICK_NS};
    sigset_t ends;
    if (argc < 2 || directory_count > DIRECTORIES_MAX) {
        fprintf(stderr, "steady MEBIBYTES DIRECTORY...\n");
        return 2;
    }
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigprocmask(SIG_BLOCK, &ends, NULL);
    memory_pages = strtoul(argv[1], NULL, 10) * 256 / MEMORY_THREADS;
    int listener = stream_listen();
    pthread_create(&thread[count++], NULL, receive_stream, &listener);
    for (unsigned n = 0; n < sizeof watchers / sizeof *watchers; n++)
        pthread_create(&thread[count++], NULL, watchers[n], NULL);
    for (uintptr_t n = 0; n < MEMORY_THREADS; n++)
        pthread_create(&thread[count++], NULL, watch_memory, (void *)n);
    for (unsigned n = 0; n < directory_count; n++) {
        directories[n] = (struct directory){n, argv[n + 2]};
        pthread_create(&thread[count++], NULL, watch_files, &directories[n]);
    }
    for (unsigned number = 1; sigtimedwait(&ends, NULL, &wait) < 0; number++)
        tick(number, FILES + directory_count);
    over = true;
    for (unsigned n = 0; n < count; n++)
        pthread_join(thread[n], NULL);
    printf("steady: ok\n");
    return 0;
}
