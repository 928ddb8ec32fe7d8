/*
 * The page-table walk: 32-bit, PAE and 4-level paging with 4 KiB, 2/4 MiB and 1 GiB pages, NX, WP, SMEP, SMAP, U/S, R/W, reserved bits, accessed and dirty bits.
 * SDM vol. 3, chapter 4. Pure: reads tables through PhysMap, sets A/D with atomic compare-and-swap, touches no engine state.
 */
#ifndef DOPPEL_ARCH_PAGING_H
#define DOPPEL_ARCH_PAGING_H

#include "arch/cpu.h"
#include "memory/memory.h"

#define PAGING_READ 0u
#define PAGING_WRITE 1u
#define PAGING_FETCH 2u
#define PAGING_USER 4u      /* CPL 3 access; otherwise supervisor */
#define PAGING_AC 8u        /* supervisor access with SMAP suspended (EFLAGS.AC) and not implicit */
#define PAGING_NO_UPDATE 16u /* look only: no A/D bits (debuggers, prefill) */

struct paging_result {
    gpa_t gpa;             /* of the byte asked for */
    uint64_t page_bytes;   /* 4096, 2 MiB, 4 MiB, 1 GiB */
    bool writable, user, executable; /* combined rights, WP not applied */
    bool dirty;            /* the leaf's dirty bit is set now */
    bool global;
};

/* 0 and *result, or the #PF error code with -EFAULT, or -EINVAL for a non-canonical address in 4-level mode. With paging off the result is the identity. */
int paging_walk(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, unsigned access,
                struct paging_result *result, uint32_t *error_code) __attribute__((warn_unused_result));

#endif
