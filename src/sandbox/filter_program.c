/*
 * Filter programs (filter_program.h). After the architecture's check, the accumulator holds the call's number while the program walks down a tree of comparisons; at a leaf, the
 * cases of one call follow each other, and each ends with a verdict, so what the accumulator holds then is nobody's any more.
 */
#include "sandbox/filter_program.h"

#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

/* Of one case at most: both halves of an argument, and the verdict; of a leaf and the branch above it. */
#define CASE_LENGTH 7u
#define LEAF_LENGTH 4u
#define BEGIN_LENGTH 4u
#define JUMP_MAX 255u /* over so many instructions, when there is a condition */

struct writer {
    struct sock_filter *code;
    unsigned at;
    uint32_t otherwise;
    bool too_far;
};

static unsigned put(struct writer *w, uint16_t code, uint32_t k)
{
    w->code[w->at] = (struct sock_filter){.code = code, .k = k};
    return w->at++;
}

/* The comparison at `from` goes on here when it fails. */
static void else_here(struct writer *w, unsigned from)
{
    unsigned over = w->at - from - 1;
    w->too_far |= over > JUMP_MAX;
    w->code[from].jf = (uint8_t)over;
}

static void put_case(struct writer *w, const struct filter_case *c)
{
    unsigned comparison[2], count = 0;
    for (unsigned half = 0; c->argument >= 0 && half < 2; half++) {
        uint32_t mask = (uint32_t)(c->mask >> 32 * half), value = (uint32_t)(c->value >> 32 * half);
        if (!mask && !value)
            continue;
        put(w, BPF_LD | BPF_W | BPF_ABS, (uint32_t)(offsetof(struct seccomp_data, args) + 8 * (unsigned)c->argument + 4 * half));
        if (mask != ~0u)
            put(w, BPF_ALU | BPF_AND | BPF_K, mask);
        comparison[count++] = put(w, BPF_JMP | BPF_JEQ | BPF_K, value);
    }
    put(w, BPF_RET | BPF_K, c->action);
    while (count)
        else_here(w, comparison[--count]);
}

static void put_leaf(struct writer *w, const struct filter_case *cases, unsigned count)
{
    unsigned comparison = put(w, BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)cases->number);
    for (unsigned n = 0; n < count; n++)
        put_case(w, &cases[n]);
    else_here(w, comparison);
    put(w, BPF_RET | BPF_K, w->otherwise);
}

/* The first case of another call than the first one's, at the middle if possible; `count`: there is none. */
static unsigned middle_of(const struct filter_case *cases, unsigned count)
{
    unsigned middle = count / 2;
    while (middle && cases[middle - 1].number == cases[middle].number)
        middle--;
    while (middle < count && cases[middle].number == cases[0].number)
        middle++;
    return middle;
}

static void put_tree(struct writer *w, const struct filter_case *cases, unsigned count)
{
    unsigned middle = middle_of(cases, count);
    if (middle == count) {
        put_leaf(w, cases, count);
        return;
    }
    unsigned comparison = put(w, BPF_JMP | BPF_JGE | BPF_K, (uint32_t)cases[middle].number), jump = put(w, BPF_JMP | BPF_JA, 0);
    w->code[comparison].jf = 1;
    put_tree(w, cases, middle);
    w->code[jump].k = w->at - jump - 1;
    put_tree(w, cases + middle, count - middle);
}

static int compare_cases(const void *left, const void *right)
{
    const struct filter_case *a = left, *b = right;
    if (a->number != b->number)
        return a->number < b->number ? -1 : 1;
    return (a->argument < 0) - (b->argument < 0);
}

int filter_program(struct sock_fprog *program, struct filter_case *cases, unsigned count, uint32_t otherwise)
{
    struct writer w = {.otherwise = otherwise, .code = calloc(BEGIN_LENGTH + count * (CASE_LENGTH + LEAF_LENGTH), sizeof *w.code)};
    if (!w.code)
        return -ENOMEM;
    qsort(cases, count, sizeof *cases, compare_cases);
    put(&w, BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch));
    w.code[put(&w, BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64)].jt = 1;
    put(&w, BPF_RET | BPF_K, otherwise);
    put(&w, BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    if (count)
        put_tree(&w, cases, count);
    else
        w.code[w.at - 1] = (struct sock_filter){.code = BPF_RET | BPF_K, .k = otherwise};
    if (w.too_far || w.at > BPF_MAXINSNS) {
        free(w.code);
        return -E2BIG;
    }
    *program = (struct sock_fprog){.len = (unsigned short)w.at, .filter = w.code};
    return 0;
}
