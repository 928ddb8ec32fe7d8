/*
 * The software TLB and every access to guest memory that the inline fast paths do not finish.
 *
 * Three views (user, supervisor, supervisor with SMAP suspended) so that a change of privilege costs nothing. A tag holds the page and a generation; an
 * address space (PCID) owns a generation, and dropping the address space is giving it a new one. Generation 0 stands for "none yet" in
 * the table, and 0xfff is never used, because TLB_NEVER carries it. Large pages enter as 4 KiB pieces; filters remember where they may be, so
 * that INVLPG of one drops all its pieces.
 * A write tag exists only when the page's dirty bit is set and the write is allowed now; MMIO has no tags, ROM no write tag.
 * Threading: the vCPU's own thread.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arch/paging.h"
#include "engine/interp/interp_core.h"

#define ASIDS 4096u
#define GENERATION_LAST 0xffeu
#define FILTER_WORDS 64u /* 4096 bits */
#define SHIFT_4M 22u     /* covers 2 MiB pages too: dropping too much is harmless */
#define SHIFT_1G 30u

struct tlb_asid {
    uint16_t generation[ASIDS]; /* 0: none */
    uint16_t last;              /* highest generation given out */
    uint64_t filter_4m[FILTER_WORDS], filter_1g[FILTER_WORDS];
};

static uint64_t page_of(gva_t gva)
{
    return gva & ~PAGE_MASK_BITS;
}

static bool crosses_page(gva_t gva, unsigned length)
{
    return (gva & PAGE_MASK_BITS) + length > PAGE_SIZE_BYTES;
}

/* ---- maintenance ---- */

static void entries_clear(struct tlb_entry *entries)
{
    for (unsigned n = 0; n < TLB_ENTRIES; n++)
        entries[n] = (struct tlb_entry){TLB_NEVER, TLB_NEVER, TLB_NEVER, 0};
}

int tlb_create(struct icpu *c)
{
    c->asids = calloc(1, sizeof(*c->asids));
    struct tlb_entry *entries = calloc((VIEW_COUNT + 1) * TLB_ENTRIES, sizeof(*entries));
    if (!c->asids || !entries) {
        free(c->asids);
        free(entries);
        c->asids = NULL;
        return -ENOMEM;
    }
    for (unsigned view = 0; view <= VIEW_COUNT; view++) {
        c->views[view] = entries + view * TLB_ENTRIES;
        entries_clear(c->views[view]);
    }
    c->tlb = c->views[VIEW_SUPERVISOR];
    return 0;
}

void tlb_destroy(struct icpu *c)
{
    free(c->views[0]);
    free(c->asids);
}

static unsigned current_asid(const struct icpu *c)
{
    return c->v.cpu.cr4 & CR4_PCIDE ? c->v.cpu.cr3 & 0xfff : 0;
}

static void forget_everything(struct icpu *c)
{
    struct tlb_asid *a = c->asids;
    memset(a->generation, 0, sizeof(a->generation));
    memset(a->filter_4m, 0, sizeof(a->filter_4m));
    memset(a->filter_1g, 0, sizeof(a->filter_1g));
}

static void generation_renew(struct icpu *c, unsigned asid)
{
    struct tlb_asid *a = c->asids;
    if (a->last == GENERATION_LAST) {
        forget_everything(c);
        a->last = 0;
        for (unsigned view = 0; view < VIEW_COUNT; view++)
            entries_clear(c->views[view]);
    }
    a->generation[asid] = ++a->last;
    c->tlb_generation = a->generation[asid];
}

void tlb_flush_all(struct icpu *c)
{
    vcpu_count(&c->v, COUNTER_tlb_flushes);
    forget_everything(c);
    generation_renew(c, current_asid(c));
    if (c->tlb_listener)
        c->tlb_listener->flush_all(c);
}

static void asid_drop(struct icpu *c, unsigned asid)
{
    if (asid == current_asid(c)) {
        vcpu_count(&c->v, COUNTER_tlb_flushes);
        generation_renew(c, asid);
    } else {
        c->asids->generation[asid] = 0;
    }
}

void tlb_flush_non_global(struct icpu *c)
{
    unsigned asid = current_asid(c);
    asid_drop(c, asid);
    if (c->tlb_listener)
        c->tlb_listener->flush_non_global(c, asid);
}

void tlb_load_cr3(struct icpu *c, uint64_t value, bool keep)
{
    unsigned asid = current_asid(c);
    keep = keep && (c->v.cpu.cr4 & CR4_PCIDE);
    if (keep && c->asids->generation[asid])
        c->tlb_generation = c->asids->generation[asid];
    else
        asid_drop(c, asid);
    if (c->tlb_listener)
        c->tlb_listener->load_cr3(c, keep);
}

static bool entry_in_region(const struct tlb_entry *e, gva_t gva, unsigned shift)
{
    return (e->read != TLB_NEVER && e->read >> shift == gva >> shift) || (e->write != TLB_NEVER && e->write >> shift == gva >> shift) ||
           (e->execute != TLB_NEVER && e->execute >> shift == gva >> shift);
}

static void region_drop(struct icpu *c, gva_t gva, unsigned shift)
{
    for (unsigned view = 0; view < VIEW_COUNT; view++)
        for (unsigned n = 0; n < TLB_ENTRIES; n++)
            if (entry_in_region(&c->views[view][n], gva, shift))
                c->views[view][n] = (struct tlb_entry){TLB_NEVER, TLB_NEVER, TLB_NEVER, 0};
}

static bool filter_has(const uint64_t *filter, uint64_t number)
{
    number &= FILTER_WORDS * 64 - 1;
    return filter[number / 64] >> (number % 64) & 1;
}

static void filter_add(uint64_t *filter, uint64_t number)
{
    number &= FILTER_WORDS * 64 - 1;
    filter[number / 64] |= 1ull << (number % 64);
}

void tlb_flush_page(struct icpu *c, gva_t gva)
{
    vcpu_count(&c->v, COUNTER_page_invalidations);
    if (filter_has(c->asids->filter_1g, gva >> SHIFT_1G)) {
        region_drop(c, gva, SHIFT_1G);
    } else if (filter_has(c->asids->filter_4m, gva >> SHIFT_4M)) {
        region_drop(c, gva, SHIFT_4M);
    } else {
        for (unsigned view = 0; view < VIEW_COUNT; view++) {
            struct tlb_entry *e = &c->views[view][gva >> 12 & (TLB_ENTRIES - 1)];
            if (entry_in_region(e, gva, 12))
                *e = (struct tlb_entry){TLB_NEVER, TLB_NEVER, TLB_NEVER, 0};
        }
    }
    if (c->tlb_listener)
        c->tlb_listener->flush_page(c, gva);
}

void tlb_invpcid(struct icpu *c, unsigned type, uint16_t pcid, gva_t gva)
{
    switch (type) {
    case 0: /* one address: the entry of whichever address space holds the slot goes */
        tlb_flush_page(c, gva);
        break;
    case 1:
        pcid &= ASIDS - 1;
        asid_drop(c, pcid);
        if (c->tlb_listener)
            c->tlb_listener->flush_non_global(c, pcid);
        break;
    default: /* all, with or without global pages */
        tlb_flush_all(c);
    }
}

/* ---- translation ---- */

/* Instructions that reach the stack without naming it, for the choice between #GP and #SS. */
static bool is_stack_instruction(unsigned mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_POP:
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_RET:
    case ZYDIS_MNEMONIC_ENTER:
    case ZYDIS_MNEMONIC_LEAVE:
    case ZYDIS_MNEMONIC_IRET:
    case ZYDIS_MNEMONIC_IRETD:
    case ZYDIS_MNEMONIC_IRETQ:
        return true;
    default:
        return false;
    }
}

static _Noreturn void noncanonical_fault(struct icpu *c, gva_t gva)
{
    const struct insn *i = c->current;
    if (i) {
        bool named = i->flags & (INSN_MEM_DST | INSN_MEM_SRC);
        bool stack = is_stack_instruction(i->mnemonic) && !(named && c->segment_base[i->segment] + ea_offset(c, i) == gva);
        if (stack || (named && i->segment == SEG_SS))
            raise_error(c, VECTOR_SS, 0);
    }
    raise_gp0(c);
}

/* The linear address as the mode makes it: 32 bits wide outside long mode, canonical in it. */
static gva_t linear_check(struct icpu *c, gva_t gva, unsigned length)
{
    if (!(c->v.cpu.efer & EFER_LMA))
        return gva & 0xffffffffu;
    if (unlikely(!gva_is_canonical(gva) || !gva_is_canonical(gva + length - 1)))
        noncanonical_fault(c, gva);
    return gva;
}

/* The page after gva's, as an access that crosses into it sees it: 32-bit code wraps to zero, in long mode too. */
static gva_t next_page(const struct icpu *c, gva_t gva)
{
    gva_t next = page_of(gva) + PAGE_SIZE_BYTES;
    bool wraps = !(c->v.cpu.efer & EFER_LMA) || (c->current && c->current->flags & INSN_LEGACY);
    return wraps ? next & 0xffffffffu : next;
}

static unsigned view_access(enum tlb_view view)
{
    static const uint8_t access[VIEW_COUNT] = {[VIEW_USER] = PAGING_USER, [VIEW_SUPERVISOR_AC] = PAGING_AC};
    return access[view];
}

static bool write_allowed(const struct icpu *c, enum tlb_view view, const struct paging_result *page)
{
    return page->writable || (view != VIEW_USER && !(c->v.cpu.cr0 & CR0_WP));
}

static void entry_fill(struct icpu *c, enum tlb_view view, gva_t gva, unsigned access, bool writable, uintptr_t host_page)
{
    struct tlb_entry *e = &c->views[view][gva >> 12 & (TLB_ENTRIES - 1)];
    uint64_t tag = page_of(gva) | c->tlb_generation;
    uintptr_t addend = host_page - page_of(gva);
    if (e->addend != addend || (e->read != tag && e->write != tag && e->execute != tag))
        *e = (struct tlb_entry){TLB_NEVER, TLB_NEVER, TLB_NEVER, addend};
    if (access & PAGING_FETCH)
        e->execute = tag;
    else
        e->read = tag;
    if (writable)
        e->write = tag;
    vcpu_count(&c->v, COUNTER_tlb_fills);
}

static void large_page_note(struct icpu *c, gva_t gva, uint64_t page_bytes)
{
    if (page_bytes > 1ull << SHIFT_4M)
        filter_add(c->asids->filter_1g, gva >> SHIFT_1G);
    else if (page_bytes > PAGE_SIZE_BYTES)
        filter_add(c->asids->filter_4m, gva >> SHIFT_4M);
}

/* Walks and fills; like PhysMap's look-ups without vector registers. Host address of the byte, or NULL with *gpa when access may not be direct. */
static void *translate_miss(struct icpu *c, enum tlb_view view, gva_t gva, unsigned access, gpa_t *gpa)
{
    struct paging_result page;
    uint32_t error = 0;
    int rc = paging_walk(c->v.memory, &c->v.cpu, c->max_phys_bits, gva, access | view_access(view), &page, &error);
    if (rc == -EINVAL)
        noncanonical_fault(c, gva);
    if (rc)
        raise_page_fault(c, gva, error);
    *gpa = page.gpa;
    gpa_t gpa_page = page.gpa & ~PAGE_MASK_BITS;
    bool writable = false;
    if (!(access & PAGING_FETCH))
        writable = (access & PAGING_WRITE) || (page.dirty && write_allowed(c, view, &page));
    uint8_t *host = NULL;
    uint64_t offset;
    if (writable && !(access & PAGING_WRITE))
        writable = physmap_offset(c->v.memory, gpa_page, PAGE_SIZE_BYTES, &offset) && physmap_expects_writes(c->v.memory, offset);
    if (writable) {
        host = physmap_get(c->v.memory, gpa_page, PAGE_SIZE_BYTES, PHYSMAP_WRITE);
        if (host)
            physmap_mark_written(c->v.memory, gpa_page, PAGE_SIZE_BYTES);
        else if (access & PAGING_WRITE)
            return NULL;
        else
            writable = false;
    }
    if (!host)
        host = physmap_get(c->v.memory, gpa_page, PAGE_SIZE_BYTES, access & PAGING_FETCH ? PHYSMAP_EXECUTE : PHYSMAP_READ);
    if (!host)
        return NULL;
    host += c->memory_shift;
    large_page_note(c, gva, page.page_bytes);
    entry_fill(c, view, gva, access, writable, (uintptr_t)host);
    return host + (gva & PAGE_MASK_BITS);
}

static inline void *translate(struct icpu *c, enum tlb_view view, gva_t gva, unsigned access, gpa_t *gpa)
{
    const struct tlb_entry *e = &c->views[view][gva >> 12 & (TLB_ENTRIES - 1)];
    uint64_t have = access & PAGING_FETCH ? e->execute : access & PAGING_WRITE ? e->write : e->read;
    if (likely(have == (page_of(gva) | c->tlb_generation)))
        return (void *)(gva + e->addend);
    return translate_miss(c, view, gva, access, gpa);
}

const uint8_t *mem_fetch_host(struct icpu *c, gva_t gva)
{
    gpa_t gpa;
    if (c->code_bits != 64)
        gva &= 0xffffffffu;
    else if (unlikely(!gva_is_canonical(gva)))
        raise_gp0(c);
    return translate(c, c->view, gva, PAGING_FETCH, &gpa);
}

/* ---- checks that take the fast paths away: alignment and data breakpoints ---- */

static void breakpoints_match(struct icpu *c, gva_t gva, unsigned length, bool write)
{
    static const uint8_t bytes_of[4] = {1, 2, 8, 4};
    uint64_t dr7 = c->v.cpu.dr[7];
    for (unsigned n = 0; n < 4; n++) {
        unsigned type = dr7 >> (16 + 4 * n) & 3; /* 1: writes, 3: reads and writes */
        if (!(dr7 >> (2 * n) & 3) || !(type == 3 || (type == 1 && write)))
            continue;
        unsigned bytes = bytes_of[dr7 >> (18 + 4 * n) & 3];
        gva_t first = c->v.cpu.dr[n] & ~(uint64_t)(bytes - 1);
        if (gva < first + bytes && first < gva + length)
            c->debug_hits |= 1u << n;
    }
}

/* An address that is not canonical is left to the access: its fault comes first. */
void mem_check_alignment(struct icpu *c, enum tlb_view view, gva_t gva, unsigned alignment)
{
    if (view == VIEW_USER && (c->v.cpu.cr0 & CR0_AM) && (c->v.cpu.rflags & RFLAGS_AC) && (gva & (alignment - 1)) && gva_is_canonical(gva) &&
        gva_is_canonical(gva + alignment - 1))
        raise_error(c, VECTOR_AC, 0);
}

static void careful_check(struct icpu *c, enum tlb_view view, gva_t gva, unsigned length, bool write, bool aligned)
{
    if (aligned)
        mem_check_alignment(c, view, gva, length);
    breakpoints_match(c, gva, length, write);
}

/* ---- MMIO ---- */

uint64_t mmio_read(struct icpu *c, gpa_t gpa, unsigned size)
{
    simd_save(c);
    vcpu_count(&c->v, COUNTER_mmio_reads);
    uint64_t value = c->v.host_ops->mmio_read(c->v.host, gpa, size);
    TRACE(c, "mmio read %llx size %u = %llx\n", (unsigned long long)gpa, size, (unsigned long long)value);
    return value;
}

void mmio_write(struct icpu *c, gpa_t gpa, unsigned size, uint64_t value)
{
    simd_save(c);
    vcpu_count(&c->v, COUNTER_mmio_writes);
    TRACE(c, "mmio write %llx size %u = %llx\n", (unsigned long long)gpa, size, (unsigned long long)value);
    c->v.host_ops->mmio_write(c->v.host, gpa, size, value);
}

static unsigned mmio_piece(unsigned length)
{
    return length >= 8 ? 8 : length >= 4 ? 4 : length >= 2 ? 2 : 1;
}

/* A range within one page that is not directly accessible. */
static void indirect_read(struct icpu *c, gpa_t gpa, uint8_t *data, unsigned length)
{
    for (unsigned done = 0; done < length;) {
        unsigned size = mmio_piece(length - done);
        uint64_t value = mmio_read(c, gpa + done, size);
        memcpy(data + done, &value, size);
        done += size;
    }
}

void mem_fetch_mmio(struct icpu *c, gva_t gva, uint8_t *to, unsigned length)
{
    gpa_t gpa;
    const void *host = translate(c, c->view, c->code_bits == 64 ? gva : gva & 0xffffffffu, PAGING_FETCH, &gpa);
    if (host)
        memcpy(to, host, length);
    else
        indirect_read(c, gpa, to, length);
}

static void indirect_write(struct icpu *c, gpa_t gpa, const uint8_t *data, unsigned length)
{
    simd_save(c);
    if (physmap_is_rom(c->v.memory, gpa))
        return;
    for (unsigned done = 0; done < length;) {
        unsigned size = mmio_piece(length - done);
        uint64_t value = 0;
        memcpy(&value, data + done, size);
        mmio_write(c, gpa + done, size, value);
        done += size;
    }
}

/* ---- accesses ---- */

void mem_read_bytes(struct icpu *c, enum tlb_view view, gva_t gva, void *data, unsigned length)
{
    gva = linear_check(c, gva, length);
    if (unlikely(c->careful))
        careful_check(c, view, gva, length, false, false);
    uint8_t *out = data;
    gpa_t gpa;
    unsigned first = length;
    if (crosses_page(gva, length)) {
        first = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
        translate(c, view, gva, PAGING_READ, &gpa); /* the lower page's fault comes first */
        gva_t next = next_page(c, gva);
        const void *host = translate(c, view, next, PAGING_READ, &gpa);
        if (host)
            memcpy(out + first, host, length - first);
        else
            indirect_read(c, gpa, out + first, length - first);
    }
    const void *host = translate(c, view, gva, PAGING_READ, &gpa);
    if (host)
        memcpy(out, host, first);
    else
        indirect_read(c, gpa, out, first);
}

static void store_bytes(struct icpu *c, void *host, gpa_t gpa, const uint8_t *data, unsigned length)
{
    if (host) {
        memcpy(host, data, length);
        block_note_store(c, (uintptr_t)host, length);
    } else {
        indirect_write(c, gpa, data, length);
    }
}

void mem_write_bytes(struct icpu *c, enum tlb_view view, gva_t gva, const void *data, unsigned length)
{
    gva = linear_check(c, gva, length);
    if (unlikely(c->careful))
        careful_check(c, view, gva, length, true, false);
    const uint8_t *in = data;
    gpa_t gpa = 0, next_gpa = 0;
    void *host = translate(c, view, gva, PAGING_WRITE, &gpa);
    if (!crosses_page(gva, length)) {
        store_bytes(c, host, gpa, in, length);
        return;
    }
    unsigned first = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
    void *next = translate(c, view, next_page(c, gva), PAGING_WRITE, &next_gpa);
    store_bytes(c, host, gpa, in, first);
    store_bytes(c, next, next_gpa, in + first, length - first);
}

static uint64_t load_sized(const void *host, unsigned size)
{
    switch (size) {
    case 1:
        return *(const volatile uint8_t *)host;
    case 2:
        return *(const volatile uint16_t *)host;
    case 4:
        return *(const volatile uint32_t *)host;
    default:
        return *(const volatile uint64_t *)host;
    }
}

static void store_sized(void *host, unsigned size, uint64_t value)
{
    switch (size) {
    case 1:
        *(volatile uint8_t *)host = (uint8_t)value;
        break;
    case 2:
        *(volatile uint16_t *)host = (uint16_t)value;
        break;
    case 4:
        *(volatile uint32_t *)host = (uint32_t)value;
        break;
    default:
        *(volatile uint64_t *)host = value;
    }
}

uint64_t mem_read_slow(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size)
{
    gva = linear_check(c, gva, size);
    if (unlikely(c->careful))
        careful_check(c, view, gva, size, false, true);
    if (crosses_page(gva, size)) {
        uint64_t value = 0;
        mem_read_bytes(c, view, gva, &value, size);
        return value;
    }
    gpa_t gpa;
    const void *host = translate(c, view, gva, PAGING_READ, &gpa);
    return host ? load_sized(host, size) : mmio_read(c, gpa, size);
}

void mem_write_slow(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size, uint64_t value)
{
    gva = linear_check(c, gva, size);
    if (unlikely(c->careful))
        careful_check(c, view, gva, size, true, true);
    if (crosses_page(gva, size)) {
        mem_write_bytes(c, view, gva, &value, size);
        return;
    }
    gpa_t gpa;
    void *host = translate(c, view, gva, PAGING_WRITE, &gpa);
    if (host) {
        store_sized(host, size, value);
        block_note_store(c, (uintptr_t)host, size);
    } else {
        indirect_write(c, gpa, (const uint8_t *)&value, size);
    }
}

void mem_probe_write(struct icpu *c, enum tlb_view view, gva_t gva, unsigned length)
{
    gva = linear_check(c, gva, length);
    gpa_t gpa;
    translate(c, view, gva, PAGING_WRITE, &gpa);
    if (crosses_page(gva, length))
        translate(c, view, next_page(c, gva), PAGING_WRITE, &gpa);
}

void mem_probe_read(struct icpu *c, enum tlb_view view, gva_t gva)
{
    gpa_t gpa;
    translate(c, view, linear_check(c, gva, 1), PAGING_READ, &gpa);
}

void *mem_host(struct icpu *c, enum tlb_view view, gva_t gva, unsigned size, bool write)
{
    if (unlikely(c->careful))
        return NULL;
    gva = linear_check(c, gva, size);
    if (crosses_page(gva, size))
        return NULL;
    gpa_t gpa;
    return translate(c, view, gva, write ? PAGING_WRITE : PAGING_READ, &gpa);
}

/* ---- read-modify-write ---- */

static void bounce_load(struct icpu *c, unsigned part, uint8_t *to)
{
    struct bounce_part *p = &c->bounce_part[part];
    const void *host = p->host;
    if (!host && p->length) {
        simd_save(c);
        host = physmap_get(c->v.memory, p->gpa, p->length, PHYSMAP_READ); /* ROM */
    }
    if (host)
        memcpy(to, host, p->length);
    else
        indirect_read(c, p->gpa, to, p->length);
}

void *mem_rmw_slow(struct icpu *c, gva_t gva, unsigned size, bool locked)
{
    gva = linear_check(c, gva, size);
    if (unlikely(c->careful)) {
        careful_check(c, c->view, gva, size, false, true);
        careful_check(c, c->view, gva, size, true, true);
    }
    struct bounce_part *p = c->bounce_part;
    p[0].host = translate(c, c->view, gva, PAGING_WRITE, &p[0].gpa);
    p[0].length = size;
    p[1] = (struct bounce_part){0};
    if (crosses_page(gva, size)) {
        p[0].length = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS));
        p[1].length = size - p[0].length;
        p[1].host = translate(c, c->view, next_page(c, gva), PAGING_WRITE, &p[1].gpa);
        if (p[0].host && (uint8_t *)p[0].host + p[0].length == p[1].host)
            return p[0].host; /* neighbours on the host too: its own LOCK does the rest */
    } else if (p[0].host) {
        return p[0].host;
    }
    if (locked) {
        simd_save(c);
        pthread_mutex_lock(&c->engine->split_lock);
        c->bounce_locked = true;
    }
    bounce_load(c, 0, c->bounce);
    bounce_load(c, 1, c->bounce + p[0].length);
    return c->bounce;
}

void mem_rmw_end_slow(struct icpu *c)
{
    struct bounce_part *p = c->bounce_part;
    store_bytes(c, p[0].host, p[0].gpa, c->bounce, p[0].length);
    if (p[1].length)
        store_bytes(c, p[1].host, p[1].gpa, c->bounce + p[0].length, p[1].length);
    if (c->bounce_locked) {
        c->bounce_locked = false;
        simd_save(c);
        pthread_mutex_unlock(&c->engine->split_lock);
    }
}
