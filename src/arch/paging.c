/*
 * The page-table walk of SDM vol. 3, chapter 4: one table-driven loop for 32-bit, PAE and 4-level paging.
 *
 * The walk collects the entries it used and only then sets their accessed and dirty bits, each by compare-and-swap against the value it decided on;
 * if another processor changed an entry meanwhile, it walks again. Table entries outside RAM read as all ones, as an unclaimed bus does, and so
 * fail the reserved-bit check.
 * Threading: any; guest tables may change at any time.
 */
#include "arch/paging.h"

#include <errno.h>
#include <stddef.h>

#define ENTRY_P (1ull << 0)
#define ENTRY_RW (1ull << 1)
#define ENTRY_US (1ull << 2)
#define ENTRY_A (1ull << 5)
#define ENTRY_D (1ull << 6)
#define ENTRY_PS (1ull << 7)
#define ENTRY_G (1ull << 8)
#define ENTRY_NX (1ull << 63)

#define ADDRESS_BITS 0x000ffffffffff000ull
#define LEVELS_MAX 4
#define RETRIES_MAX 16 /* then the bits are left to the next walk: a guest that races with itself must not hold us here */

struct paging_mode {
    unsigned levels;      /* tables read from memory */
    unsigned entry_bytes; /* 4 or 8 */
    unsigned index_bits;
    uint64_t leaf_levels; /* bit n: an entry at level n (1: page table) may map a page through PS */
    uint64_t reserved;    /* in every present entry; physical address width and NX are added */
};

static const struct paging_mode mode_32bit = {2, 4, 10, 1u << 2, 0};
static const struct paging_mode mode_pae = {2, 8, 9, 1u << 2, 0x7ff0000000000000ull};
static const struct paging_mode mode_4level = {4, 8, 9, 1u << 2 | 1u << 3, 0};

struct walk {
    struct physmap *memory;
    const struct cpu_state *cpu;
    const struct paging_mode *mode;
    uint64_t reserved;
    uint64_t rights; /* AND of the entries' RW and US, OR of NX */
    unsigned used;
    gpa_t entry_gpa[LEVELS_MAX];
    uint64_t entry[LEVELS_MAX];
    unsigned leaf_level;
};

enum walk_status { WALK_OK, WALK_NOT_PRESENT, WALK_RESERVED };

static uint64_t entry_read(const struct walk *w, gpa_t gpa)
{
    const void *host = physmap_get(w->memory, gpa, w->mode->entry_bytes, PHYSMAP_READ);
    if (!host)
        return w->mode->entry_bytes == 4 ? 0xffffffffull : ~0ull;
    if (w->mode->entry_bytes == 4)
        return __atomic_load_n((const uint32_t *)host, __ATOMIC_RELAXED);
    return __atomic_load_n((const uint64_t *)host, __ATOMIC_RELAXED);
}

static unsigned level_shift(const struct paging_mode *mode, unsigned level)
{
    return 12 + (level - 1) * mode->index_bits;
}

/* Bits of a large page's entry between the attribute bits and its address; bit 12 is PAT. */
static uint64_t large_page_reserved(const struct walk *w, unsigned shift, unsigned max_phys_bits)
{
    if (w->mode->entry_bytes == 8)
        return ((1ull << shift) - 1) & ~0x1fffull;
    /* PSE-36 (SDM vol. 3, table 4-4): bits 20:13 are address bits 39:32, of which MAXPHYADDR allows some; bit 21 is zero. */
    unsigned high = max_phys_bits > 40 ? 8 : max_phys_bits > 32 ? max_phys_bits - 32 : 0;
    return (0x3fe000ull & ~(((1ull << high) - 1) << 13));
}

static enum walk_status walk_tables(struct walk *w, gva_t gva, gpa_t table, unsigned max_phys_bits)
{
    const struct paging_mode *mode = w->mode;
    w->used = 0;
    w->rights = ENTRY_RW | ENTRY_US;
    for (unsigned level = mode->levels; level; level--) {
        unsigned shift = level_shift(mode, level);
        uint64_t index = gva >> shift & ((1u << mode->index_bits) - 1);
        gpa_t entry_gpa = table + index * mode->entry_bytes;
        uint64_t entry = entry_read(w, entry_gpa);
        if (!(entry & ENTRY_P))
            return WALK_NOT_PRESENT;
        bool large = level > 1 && (entry & ENTRY_PS);
        if (mode->entry_bytes == 4 && !(w->cpu->cr4 & CR4_PSE))
            large = false;
        uint64_t reserved = w->reserved;
        if (large)
            reserved |= mode->leaf_levels >> level & 1 ? large_page_reserved(w, shift, max_phys_bits) : ENTRY_PS;
        if (entry & reserved)
            return WALK_RESERVED;
        w->rights &= entry | ENTRY_NX;
        w->rights |= entry & ENTRY_NX;
        w->entry_gpa[w->used] = entry_gpa;
        w->entry[w->used++] = entry;
        w->leaf_level = level;
        if (large)
            break;
        table = entry & ADDRESS_BITS;
    }
    return WALK_OK;
}

static bool access_allowed(const struct walk *w, unsigned access)
{
    bool user_page = w->rights & ENTRY_US;
    if (access & PAGING_FETCH) {
        if (w->rights & ENTRY_NX)
            return false;
        return access & PAGING_USER ? user_page : !(user_page && (w->cpu->cr4 & CR4_SMEP));
    }
    if (access & PAGING_USER) {
        if (!user_page)
            return false;
        return !(access & PAGING_WRITE) || (w->rights & ENTRY_RW);
    }
    if (user_page && (w->cpu->cr4 & CR4_SMAP) && !(access & PAGING_AC))
        return false;
    return !(access & PAGING_WRITE) || (w->rights & ENTRY_RW) || !(w->cpu->cr0 & CR0_WP);
}

/* False when another processor changed the entry since it was read. Entries that are not in writable RAM stay as they are. */
static bool entry_set_bits(struct walk *w, unsigned n, uint64_t bits)
{
    uint64_t old = w->entry[n];
    if ((old & bits) == bits)
        return true;
    void *host = physmap_get(w->memory, w->entry_gpa[n], w->mode->entry_bytes, PHYSMAP_WRITE);
    if (!host)
        return true;
    bool done;
    if (w->mode->entry_bytes == 4) {
        uint32_t expected = (uint32_t)old;
        done = __atomic_compare_exchange_n((uint32_t *)host, &expected, expected | (uint32_t)bits, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    } else {
        done = __atomic_compare_exchange_n((uint64_t *)host, &old, old | bits, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    }
    if (done) {
        w->entry[n] |= bits;
        physmap_mark_dirty(w->memory, w->entry_gpa[n], w->mode->entry_bytes);
    }
    return done;
}

static bool set_accessed_dirty(struct walk *w, bool write)
{
    for (unsigned n = 0; n < w->used; n++)
        if (!entry_set_bits(w, n, write && n == w->used - 1 ? ENTRY_A | ENTRY_D : ENTRY_A))
            return false;
    return true;
}

static void fill_result(const struct walk *w, gva_t gva, struct paging_result *result)
{
    uint64_t leaf = w->entry[w->used - 1];
    unsigned shift = level_shift(w->mode, w->leaf_level);
    uint64_t offset_mask = (1ull << shift) - 1;
    gpa_t base = leaf & ADDRESS_BITS & ~offset_mask;
    if (w->mode->entry_bytes == 4 && w->leaf_level == 2)
        base = (leaf & 0xffc00000ull) | (leaf >> 13 & 0xff) << 32; /* PSE-36 */
    result->gpa = base | (gva & offset_mask);
    result->page_bytes = offset_mask + 1;
    result->writable = w->rights & ENTRY_RW;
    result->user = w->rights & ENTRY_US;
    result->executable = !(w->rights & ENTRY_NX);
    result->dirty = leaf & ENTRY_D;
    result->accessed = true;
    for (unsigned n = 0; n < w->used; n++)
        result->accessed = result->accessed && w->entry[n] & ENTRY_A;
    result->global = (leaf & ENTRY_G) && (w->cpu->cr4 & CR4_PGE);
}

static uint32_t fault_code(const struct cpu_state *cpu, unsigned access)
{
    uint32_t code = 0;
    if (access & PAGING_WRITE)
        code |= PF_W;
    if (access & PAGING_USER)
        code |= PF_U;
    if ((access & PAGING_FETCH) && ((cpu->cr4 & CR4_SMEP) || ((cpu->cr4 & CR4_PAE) && (cpu->efer & EFER_NXE))))
        code |= PF_I;
    return code;
}

static void identity_result(gva_t gva, struct paging_result *result)
{
    *result = (struct paging_result){.gpa = gva & 0xffffffffull, .page_bytes = PAGE_SIZE_BYTES, .writable = true, .user = true,
                                     .executable = true, .dirty = true, .accessed = true};
}

/* Chooses mode and root. False: the PDPTE is not present. */
static bool walk_root(struct walk *w, gva_t gva, unsigned max_phys_bits, gpa_t *table)
{
    const struct cpu_state *cpu = w->cpu;
    if (cpu->efer & EFER_LMA) {
        w->mode = &mode_4level;
        *table = cpu->cr3 & ADDRESS_BITS;
    } else if (cpu->cr4 & CR4_PAE) {
        uint64_t pdpte = cpu->pdpte[gva >> 30 & 3];
        w->mode = &mode_pae;
        *table = pdpte & ADDRESS_BITS;
        if (!(pdpte & ENTRY_P))
            return false;
    } else {
        w->mode = &mode_32bit;
        *table = cpu->cr3 & 0xfffff000ull;
        w->reserved = 0;
        return true;
    }
    w->reserved = w->mode->reserved | (ADDRESS_BITS & ~((1ull << max_phys_bits) - 1));
    if (!(cpu->efer & EFER_NXE))
        w->reserved |= ENTRY_NX;
    return true;
}

/* Walks until the bits of the entries used are set. 0 or -EFAULT and the error code. */
static int walk_update(struct walk *w, gva_t gva, unsigned max_phys_bits, unsigned access, uint32_t *error_code)
{
    *error_code = fault_code(w->cpu, access);
    for (unsigned attempt = 0;; attempt++) {
        gpa_t table;
        if (!walk_root(w, gva, max_phys_bits, &table))
            return -EFAULT;
        enum walk_status status = walk_tables(w, gva, table, max_phys_bits);
        if (status == WALK_RESERVED)
            *error_code |= PF_P | PF_RSVD;
        if (status != WALK_OK)
            return -EFAULT;
        if (!access_allowed(w, access)) {
            *error_code |= PF_P;
            return -EFAULT;
        }
        if ((access & PAGING_NO_UPDATE) || attempt >= RETRIES_MAX || set_accessed_dirty(w, access & PAGING_WRITE))
            return 0;
    }
}

/* Reads the group's entries, which lie in one table, under the rights that the tables above it gave the page in the middle. */
static void fill_group(const struct walk *above, unsigned access, struct paging_group *group)
{
    struct walk w = *above;
    unsigned entry_bytes = w.mode->entry_bytes;
    gpa_t first = w.entry_gpa[w.used - 1] & ~(gpa_t)(PAGING_GROUP * entry_bytes - 1);
    const char *host = physmap_get(w.memory, first, PAGING_GROUP * entry_bytes, PHYSMAP_READ);
    if (!host)
        return;
    uint64_t rights = ENTRY_RW | ENTRY_US;
    for (unsigned n = 0; n + 1 < w.used; n++)
        rights = (rights & (w.entry[n] | ENTRY_NX)) | (w.entry[n] & ENTRY_NX);
    bool global = w.cpu->cr4 & CR4_PGE;
    for (unsigned n = 0; n < PAGING_GROUP; n++, host += entry_bytes) {
        uint64_t entry = entry_bytes == 4 ? __atomic_load_n((const uint32_t *)host, __ATOMIC_RELAXED)
                                          : __atomic_load_n((const uint64_t *)host, __ATOMIC_RELAXED);
        if ((entry & (ENTRY_P | ENTRY_A)) != (ENTRY_P | ENTRY_A) || (entry & w.reserved))
            continue;
        w.rights = (rights & (entry | ENTRY_NX)) | (entry & ENTRY_NX);
        if (!access_allowed(&w, access & ~PAGING_WRITE))
            continue;
        group->gpa[n] = entry & ADDRESS_BITS;
        group->readable |= (uint16_t)(1u << n);
        if ((entry & ENTRY_D) && access_allowed(&w, access | PAGING_WRITE))
            group->writable |= (uint16_t)(1u << n);
        global = global && (entry & ENTRY_G);
    }
    group->all_global = global;
}

int paging_walk_group(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, unsigned access,
                      struct paging_result *result, struct paging_group *group, uint32_t *error_code)
{
    if (group)
        group->readable = group->writable = group->all_global = 0;
    if (!(cpu->cr0 & CR0_PG)) {
        identity_result(gva, result);
        return 0;
    }
    if (!(cpu->efer & EFER_LMA))
        gva &= 0xffffffffull;
    else if ((uint64_t)((int64_t)(gva << 16) >> 16) != gva)
        return -EINVAL;

    struct walk w = {.memory = memory, .cpu = cpu};
    int rc = walk_update(&w, gva, max_phys_bits, access, error_code);
    if (rc)
        return rc;
    fill_result(&w, gva, result);
    if (group && w.leaf_level == 1)
        fill_group(&w, access, group);
    return 0;
}

int paging_walk(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, unsigned access,
                struct paging_result *result, uint32_t *error_code)
{
    return paging_walk_group(memory, cpu, max_phys_bits, gva, access, result, NULL, error_code);
}

static uint64_t user_page(uint64_t rights, uint64_t leaf, gpa_t gpa)
{
    if ((rights & (ENTRY_US | ENTRY_A)) != (ENTRY_US | ENTRY_A))
        return 0;
    return gpa | PAGING_MAY_READ | ((rights & ENTRY_RW) && (leaf & ENTRY_D) ? PAGING_MAY_WRITE : 0) | (rights & ENTRY_NX ? 0 : PAGING_MAY_EXECUTE);
}

bool paging_is_free(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, uint64_t bytes)
{
    struct walk w = {.memory = memory, .cpu = cpu};
    gpa_t table;
    for (gva_t end = gva + bytes; gva < end;) {
        if (!walk_root(&w, gva, max_phys_bits, &table))
            return true;
        unsigned shift = 0;
        for (unsigned level = LEVELS_MAX; level; level--) {
            shift = level_shift(w.mode, level);
            uint64_t entry = entry_read(&w, table + (gva >> shift & 511) * 8);
            if (!(entry & ENTRY_P))
                break;
            if (level == 1 || (entry & ENTRY_PS))
                return false;
            table = entry & ADDRESS_BITS;
        }
        gva = ((gva >> shift) + 1) << shift;
    }
    return true;
}

uint64_t paging_user_region(struct physmap *memory, const struct cpu_state *cpu, unsigned max_phys_bits, gva_t gva, uint64_t entry[PAGING_REGION_PAGES])
{
    struct walk w = {.memory = memory, .cpu = cpu};
    uint64_t rights = ENTRY_RW | ENTRY_US | ENTRY_A, leaf = 0;
    gpa_t table;
    unsigned level;
    for (unsigned n = 0; n < PAGING_REGION_PAGES; n++)
        entry[n] = 0;
    if (!walk_root(&w, gva, max_phys_bits, &table))
        return PAGE_SIZE_BYTES;
    for (level = LEVELS_MAX; level > 1; level--) {
        unsigned shift = level_shift(w.mode, level);
        leaf = entry_read(&w, table + (gva >> shift & 511) * 8);
        bool large = leaf & ENTRY_PS;
        if (!(leaf & ENTRY_P) || (leaf & w.reserved) || (large && (!(w.mode->leaf_levels >> level & 1) || (leaf & large_page_reserved(&w, shift, max_phys_bits)))))
            return 1ull << shift;
        rights = (rights & (leaf | ENTRY_NX)) | (leaf & ENTRY_NX);
        table = leaf & ADDRESS_BITS;
        if (large) {
            uint64_t mask = (1ull << shift) - 1;
            table = (leaf & ADDRESS_BITS & ~mask) | (gva & mask & ~(PAGING_REGION_BYTES - 1));
            break;
        }
    }
    const uint64_t *host = level > 1 ? NULL : physmap_get(memory, table, PAGE_SIZE_BYTES, PHYSMAP_READ);
    for (unsigned n = 0; n < PAGING_REGION_PAGES; n++) {
        if (level > 1) {
            entry[n] = user_page(rights, leaf, table + n * PAGE_SIZE_BYTES);
        } else if (host) {
            leaf = __atomic_load_n(&host[n], __ATOMIC_RELAXED);
            if ((leaf & ENTRY_P) && !(leaf & w.reserved))
                entry[n] = user_page((rights & (leaf | ENTRY_NX)) | (leaf & ENTRY_NX), leaf, leaf & ADDRESS_BITS);
        }
    }
    return 1ull << level_shift(w.mode, level);
}
