/*
 * The page-table walk: 32-bit, PAE and 4-level paging with 4 KiB, 2/4 MiB and 1 GiB pages, NX, WP, SMEP, SMAP, U/S, R/W, reserved bits, accessed and dirty bits.
 * SDM vol. 3, chapter 4. Pure: reads tables through PhysMap, sets A/D with atomic compare-and-swap, touches no engine state
 * and no vector register.
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
    bool accessed;         /* the accessed bits of all entries on the way are */
    bool global;
};

/* The aligned group of pages around one, as a translation cache fills it. */
#define PAGING_GROUP 16u
struct paging_group {
    uint16_t readable, writable; /* bit n: page n of the group may be read, or read and written, with no bit left to set in its entry */
    bool all_global;             /* those of them */
    gpa_t gpa[PAGING_GROUP];
};

/* 0 and *result, or the #PF error code with -EFAULT, or -EINVAL for a non-canonical address in 4-level mode. With paging off the result is the identity. */
int paging_walk(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, unsigned access,
                struct paging_result *result, uint32_t *error_code) __attribute__((warn_unused_result));
/* The same for a data access, and what the last table says about the page's neighbours; nothing but `result` when it is not a 4 KiB page of a table
 * (result->page_bytes, CR0.PG). Changes no entry but the page's own. */
int paging_walk_group(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, unsigned access,
                      struct paging_result *result, struct paging_group *group, uint32_t *error_code) __attribute__((warn_unused_result));

/*
 * What user code may do in the 2 MiB around gva without any bit in the tables left to set: of each 4 KiB page the gpa, with PAGING_MAY_*; 0: nothing. Of 4-level tables only
 * (EFER.LMA). Changes nothing. The pages' size, which is that of what holds no pages, too; 4 KiB where there is a table.
 */
#define PAGING_REGION_BYTES (2ull << 20)
#define PAGING_REGION_PAGES 512u
#define PAGING_MAY_READ 1u
#define PAGING_MAY_WRITE 2u
#define PAGING_MAY_EXECUTE 4u
uint64_t paging_user_region(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, uint64_t entry[PAGING_REGION_PAGES]);
/* Has [gva, +bytes) no page at all, by the same tables? Nor one that may not be used. */
bool paging_is_free(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, uint64_t bytes);

#endif
