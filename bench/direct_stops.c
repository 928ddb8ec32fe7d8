/*
 * What direct execution pays for (docs/design.md): stops of its process, by what is done at each, with process and tracer on one processor and on two.
 *
 *     direct_stops [STOPS]       default 20000 of each kind, the best of five rounds
 */
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "engine/bt/direct_child.h"

#define PAGE 4096u
#define CODE 0x10000000ull
#define DATA 0x20000000ull
#define ROUNDS 5u
#define XSAVE_BYTES 2696u /* all up to AVX-512, standard layout */

struct bench {
    struct direct_child *child;
    struct user_regs_struct regs;
    uint8_t xsave[16384];
};

static void stop(struct bench *b)
{
    if (direct_child_run(b->child, &b->regs) != DIRECT_SYSCALL) {
        fprintf(stderr, "direct_stops: the process did something else than a system call\n");
        exit(1);
    }
}

static void stop_and_vectors(struct bench *b)
{
    stop(b);
    if (direct_child_vectors_get(b->child, b->xsave, XSAVE_BYTES) || direct_child_vectors_set(b->child, b->xsave, XSAVE_BYTES))
        exit(1);
}

static void stop_and_new_vectors(struct bench *b)
{
    stop(b);
    if (direct_child_vectors_get(b->child, b->xsave, XSAVE_BYTES))
        exit(1);
    b->xsave[160]++; /* XMM0 */
    b->xsave[512] |= 2;
    if (direct_child_vectors_set(b->child, b->xsave, XSAVE_BYTES))
        exit(1);
}

static void stop_and_map(struct bench *b)
{
    stop(b);
    direct_child_map(b->child, DATA, PAGE, PAGE, PROT_READ | (b->regs.rbx++ & 1 ? PROT_WRITE : 0));
    if (direct_child_flush(b->child))
        exit(1);
}

static double microseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static double best(struct bench *b, void (*one)(struct bench *), unsigned stops)
{
    double least = 1e9;
    for (unsigned round = 0; round < ROUNDS; round++) {
        double before = microseconds();
        for (unsigned n = 0; n < stops; n++)
            one(b);
        double each = (microseconds() - before) / stops;
        least = each < least ? each : least;
    }
    return least;
}

static void measure(struct bench *b, const char *where, unsigned stops)
{
    static const struct {
        const char *what;
        void (*one)(struct bench *);
    } kinds[] = {
        {"a stop at a system call, registers read and written", stop},
        {"with vector state that has not changed", stop_and_vectors},
        {"with vector state that has", stop_and_new_vectors},
        {"with one page mapped", stop_and_map},
    };
    for (unsigned n = 0; n < sizeof(kinds) / sizeof(kinds[0]); n++)
        printf("%-16s %-54s %7.2f us\n", where, kinds[n].what, best(b, kinds[n].one, stops));
}

int main(int argc, char **argv)
{
    static struct bench b;
    static const uint8_t code[] = {0x0f, 0x05, 0xeb, 0xfc}; /* syscall; jmp to it */
    unsigned stops = argc > 1 ? (unsigned)strtoul(argv[1], NULL, 10) : 20000;
    struct error err;
    int ram_fd = memfd_create("ram", MFD_CLOEXEC);
    cpu_set_t one;
    if (!stops || ram_fd < 0 || ftruncate(ram_fd, 2 * PAGE) || pwrite(ram_fd, code, sizeof(code), 0) != sizeof(code)) {
        fprintf(stderr, "direct_stops: cannot make memory for it\n");
        return 1;
    }
    if (direct_child_create(&b.child, ram_fd, &err)) {
        fprintf(stderr, "direct_stops: %s\n", err.text);
        return 1;
    }
    direct_child_map(b.child, CODE, PAGE, 0, PROT_READ | PROT_EXEC);
    b.regs = (struct user_regs_struct){.rip = CODE, .cs = 0x33, .ss = 0x2b};
    CPU_ZERO(&one);
    CPU_SET(0, &one);
    if (direct_child_flush(b.child) || sched_setaffinity(0, sizeof(one), &one))
        return 1;
    direct_child_pin(b.child, 0);
    measure(&b, "one processor", stops);
    if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
        direct_child_pin(b.child, 1);
        measure(&b, "two processors", stops / 10 + 1);
    }
    direct_child_destroy(b.child);
    return 0;
}
