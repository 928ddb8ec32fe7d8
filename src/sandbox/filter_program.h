/*
 * Filters of system calls as programs of the kernel's (classic BPF, seccomp): from a table of calls to a search tree of them. Stateless.
 */
#ifndef DOPPEL_SANDBOX_FILTER_PROGRAM_H
#define DOPPEL_SANDBOX_FILTER_PROGRAM_H

#include <stdint.h>

struct sock_fprog;

struct filter_case {
    int number;           /* the system call's */
    int argument;         /* 0 to 5: looked at, as 64 bits; -1: none is */
    uint64_t mask, value; /* (argument & mask) == value */
    uint32_t action;      /* SECCOMP_RET_...: what then happens */
};

/*
 * Of several cases of one call, those with a condition count first; conditions whose actions differ must exclude each other. `otherwise` happens to all other calls, and to those of other
 * architectures (32-bit programs', x32). Sorts the cases. 0, -ENOMEM, or -E2BIG: more than a kernel takes.
 */
int filter_program(struct sock_fprog *program, struct filter_case *cases, unsigned count, uint32_t otherwise) __attribute__((warn_unused_result));

#endif
