/*
 * Views: what translated code reads to turn linear addresses into host addresses and targets into translations.
 *
 * A view is a piece of one reservation with a data table, an exec table, a check page and an alias of the vCPU's structure (bt_priv.h). One view serves the supervisor; BT_USER_VIEWS
 * address spaces (PCIDs) have one each for user mode and for the supervisor with SMAP suspended.
 * Invariants: a table's chunk is PROT_NONE or holds nothing but entries that hit the right byte and poison, so no entry ever reads as zero. A data entry points into window W
 * only if the guest may write there now, the dirty bit is set, and the page is neither ROM nor code; dirty marks of PhysMap are set before. The exec table's first page is never
 * readable. Each chunk knows which of its groups of PAGING_GROUP entries hold something, so that dropping costs in proportion to what was filled.
 * Dropping is lazy for whole views: marks that view_clean obeys before the view is used again. The three views that translated code may be in without leaving are clean whenever it runs.
 * Threading: the vCPU's own thread. tables_fill and tables_commit are also called from its signal handler while it is in translated code, never inside this file.
 */
#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "arch/paging.h"
#include "engine/bt/bt_priv.h"

#define PAGE_SHIFT 12u
#define CHUNK_ENTRIES (BT_CHUNK_BYTES / 8)
#define CHUNK_SHIFT 11u /* from entry number to chunk number */
#define HALF_SHIFT 10u  /* half a chunk is 4 MiB of linear addresses and 64 groups */
#define GROUP_SHIFT 4u
#define DATA_ENTRIES (BT_DATA_TABLE_BYTES / 8)
#define EXEC_ENTRIES (BT_EXEC_TABLE_BYTES / 8)
#define EXEC_ENTRIES_UNUSED (PAGE_SIZE_BYTES / 8)
#define TABLE_BYTES_MIN (16ull << 20) /* committed by all views of one vCPU; a map of all RAM is granted besides */
#define CHUNKS_MAX 65000u
#define LARGE_BYTES (2ull << 20)
#define LARGE_PAGES (LARGE_BYTES / PAGE_SIZE_BYTES)
#define HUGE_SHIFT 30u
#define HUGE_CHUNKS_SHIFT (HUGE_SHIFT - PAGE_SHIFT - CHUNK_SHIFT) /* from chunk number to the number of its 1 GiB */
#define HUGE_REGIONS (DATA_ENTRIES >> CHUNK_SHIFT >> HUGE_CHUNKS_SHIFT)
#define VIEW_RESERVED_BELOW (2ull << 30)
#define VIEW_RESERVED_BYTES (VIEW_RESERVED_BELOW + BT_DATA_TABLE_BYTES)
#define VIEW_CHUNKS ((DATA_ENTRIES + EXEC_ENTRIES) >> CHUNK_SHIFT)

_Static_assert(CHUNK_ENTRIES == 1u << CHUNK_SHIFT && PAGING_GROUP == 1u << GROUP_SHIFT, "shifts");

/* Committed memory of a table. */
struct chunk {
    uint32_t number;       /* in its table */
    uint16_t next;         /* of the table's chunks; of the free ones */
    uint16_t next_pending; /* of those with non-global entries */
    bool pending;
    uint8_t large;          /* bit per half: entries of large pages are among them */
    uint64_t filled[2];     /* bit per group, one word per half: something else than poison is there */
    uint64_t non_global[2]; /* those groups with an entry of a page that is not global */
};

struct table {
    uint64_t *entry;
    uint16_t *chunk_of; /* by chunk number; 0: not committed, otherwise in bt_tables.chunk */
    uint16_t first, pending;
    bool exec;
    uint64_t huge[HUGE_REGIONS / 64]; /* bit per 1 GiB of the table: entries of pages of that size may be there */
};

enum view_kind { KIND_SUPERVISOR, KIND_SUPERVISOR_AC, KIND_USER };

struct bt_view {
    uint8_t *base; /* T; NULL: not made */
    struct table data, exec;
    enum view_kind kind;
    unsigned asid;      /* the address space of the non-global entries */
    uint64_t used;      /* bt_tables.clock when it was last chosen */
    bool drop_all, drop_non_global;
    struct bt_mode mode; /* of the blocks that exec entries lead to */
    uint64_t epoch;
};

/* The supervisor's, then for each of BT_USER_VIEWS address spaces the supervisor's with SMAP suspended and the user's. */
#define VIEWS (1 + 2 * BT_USER_VIEWS)

struct bt_tables {
    struct bt_view view[VIEWS];
    uint8_t *reserved;  /* VIEW_RESERVED_BYTES for each */
    uint16_t *chunk_of; /* VIEW_CHUNKS for each */
    uint64_t clock;
    struct bt_view *ready[VIEW_COUNT]; /* of the current address space, by enum tlb_view, clean; what is in bt_vcpu.table_of */
    uint64_t key, epoch; /* what those were made ready for */
    bool stale;          /* marks to be obeyed first */
    bool mixed;          /* not all of `ready` are for 64-bit code */
    struct chunk *chunk; /* chunk_limit + 1 of them; number 0 is never used */
    unsigned chunk_limit, chunk_count, chunk_touched;
    uint16_t chunk_free;
    /* The last page that tables_fetch found, and its neighbours, for tables_exec_set. */
    gva_t fetch_page;
    struct paging_result fetch;
    struct paging_group fetch_group;
};

static uint64_t entry_number(const struct table *table, gva_t gva)
{
    return table->exec ? bt_exec_index(gva) : gva >> PAGE_SHIFT & (DATA_ENTRIES - 1);
}

static struct chunk *chunk_at(struct bt_tables *t, const struct table *table, uint64_t entry)
{
    uint16_t n = table->chunk_of[entry >> CHUNK_SHIFT];
    return n ? &t->chunk[n] : NULL;
}

/* ---- poison ---- */

static uint64_t data_poison(const struct bt_layout *l, uint64_t entry)
{
    return bt_poison_v(l, entry << PAGE_SHIFT);
}

/* The part of an address that the entry's number gives, but for the bits that the scale loses. */
static uint64_t exec_offset(uint64_t entry)
{
    return (entry & (BT_EXEC_LOW_ENTRIES - 1)) << PAGE_SHIFT;
}

/* Addresses fall on nothing, whatever their tag: a jump to one that is not canonical has to fault where it is. */
static uint64_t exec_poison_hard(const struct bt_layout *l, uint64_t entry)
{
    return l->poison - exec_offset(entry) * 4;
}

/* Addresses under the same tag as gva read a dispatch slot that is always zero; others fall on nothing. */
static uint64_t exec_poison(const struct bt_layout *l, gva_t gva, uint64_t entry)
{
    gva_t tag = gva & ~((1ull << BT_EXEC_BITS) - 1);
    if (!gva_is_canonical(gva))
        return exec_poison_hard(l, entry);
    return (uintptr_t)l->dt_pool - (tag + exec_offset(entry)) * 4;
}

/* The poison that keeps the tag of what is there: only the place in the pool goes. */
static uint64_t exec_poison_again(const struct bt_layout *l, uint64_t entry, uint64_t value)
{
    if (value == exec_poison_hard(l, entry))
        return value;
    return value - ((value + exec_offset(entry) * 4 - (uintptr_t)l->dt_pool) & (BT_ALIAS_BYTES - 1));
}

static void entries_poison(const struct bt_layout *l, const struct table *table, uint64_t first, unsigned count)
{
    uint64_t *e = table->entry + first;
    for (unsigned n = 0; n < count; n++)
        e[n] = table->exec ? exec_poison_again(l, first + n, e[n]) : data_poison(l, first + n);
}

/* ---- chunks ---- */

static uint64_t *chunk_start(const struct table *table, uint32_t number, size_t *bytes)
{
    size_t skip = table->exec && !number ? PAGE_SIZE_BYTES : 0;
    *bytes = BT_CHUNK_BYTES - skip;
    return table->entry + (uint64_t)number * CHUNK_ENTRIES + skip / 8;
}

/* Gives all memory of the table back. Not readable first, empty afterwards: never readable as zeros. */
static void table_reset(struct bt_tables *t, struct table *table)
{
    size_t bytes = table->exec ? BT_EXEC_TABLE_BYTES : BT_DATA_TABLE_BYTES;
    if (!table->first)
        return;
    bool hidden = !mprotect(table->entry, bytes, PROT_NONE);
    assert(hidden); /* it only joins mappings */
    madvise(table->entry, bytes, MADV_DONTNEED);
    for (uint16_t n = table->first; n;) {
        struct chunk *c = &t->chunk[n];
        uint16_t next = c->next;
        table->chunk_of[c->number] = 0;
        c->next = t->chunk_free;
        t->chunk_free = n;
        t->chunk_count--;
        n = next;
    }
    table->first = table->pending = 0;
    memset(table->huge, 0, sizeof(table->huge));
}

static void view_reset(struct bt_tables *t, struct bt_view *view)
{
    table_reset(t, &view->data);
    table_reset(t, &view->exec);
    view->drop_all = view->drop_non_global = false;
}

/* Takes the memory of the view that was longest unused; of `current` when no other has any. */
static void room_make(struct bt_tables *t, struct bt_view *current)
{
    struct bt_view *victim = NULL;
    for (unsigned n = 0; n < VIEWS; n++) {
        struct bt_view *view = &t->view[n];
        if (view != current && (view->data.first || view->exec.first) && (!victim || view->used < victim->used))
            victim = view;
    }
    view_reset(t, victim ? victim : current);
}

static uint16_t chunk_allocate(struct bt_tables *t)
{
    uint16_t n = t->chunk_free;
    if (n)
        t->chunk_free = t->chunk[n].next;
    else
        n = (uint16_t)++t->chunk_touched;
    t->chunk_count++;
    return n;
}

/* NULL: the host has no memory, or no more mappings, for it. */
static struct chunk *chunk_commit(struct bt_vcpu *b, struct bt_view *view, struct table *table, uint64_t entry, gva_t gva)
{
    struct bt_tables *t = b->tables;
    const struct bt_layout *l = &b->engine->layout;
    uint32_t number = (uint32_t)(entry >> CHUNK_SHIFT);
    size_t bytes;
    uint64_t *start = chunk_start(table, number, &bytes);
    if (t->chunk_count == t->chunk_limit)
        room_make(t, view);
    while (mprotect(start, bytes, PROT_READ | PROT_WRITE)) {
        if (!t->chunk_count)
            return NULL;
        room_make(t, view);
    }
    uint64_t first = (uint64_t)(start - table->entry);
    for (uint64_t n = 0; n < bytes / 8; n++)
        start[n] = table->exec ? exec_poison(l, gva, first + n) : data_poison(l, first + n);
    uint16_t n = chunk_allocate(t);
    struct chunk *c = &t->chunk[n];
    *c = (struct chunk){.number = number, .next = table->first};
    table->first = n;
    table->chunk_of[number] = n;
    return c;
}

/* Poison of an exec chunk that leads nowhere yet, under the tag that is about to be used: targets without translations then miss without faulting. */
static void chunk_tag(const struct bt_layout *l, const struct table *table, const struct chunk *c, gva_t gva)
{
    size_t bytes;
    uint64_t *start = chunk_start(table, c->number, &bytes), first = (uint64_t)(start - table->entry);
    if (start[0] != exec_poison(l, gva, first))
        for (uint64_t n = 0; n < bytes / 8; n++)
            start[n] = exec_poison(l, gva, first + n);
}

static struct chunk *chunk_get(struct bt_vcpu *b, struct bt_view *view, struct table *table, gva_t gva)
{
    uint64_t entry = entry_number(table, gva);
    struct chunk *c = chunk_at(b->tables, table, entry);
    return c ? c : chunk_commit(b, view, table, entry, gva);
}

/* Notes that the group(s) holding [entry, +count), in one half, are filled. */
static void chunk_note(struct bt_tables *t, struct table *table, struct chunk *c, uint64_t entry, unsigned count, bool global, uint64_t page_bytes)
{
    unsigned half = entry >> HALF_SHIFT & 1, group = entry >> GROUP_SHIFT & 63, groups = (count + PAGING_GROUP - 1) >> GROUP_SHIFT;
    uint64_t bits = ((1ull << groups) - 1) << group; /* at most 32 groups */
    c->filled[half] |= bits;
    if (page_bytes > PAGE_SIZE_BYTES)
        c->large |= (uint8_t)(1u << half);
    if (page_bytes >> HUGE_SHIFT)
        table->huge[c->number >> HUGE_CHUNKS_SHIFT >> 6] |= 1ull << (c->number >> HUGE_CHUNKS_SHIFT & 63);
    if (global)
        return;
    c->non_global[half] |= bits;
    if (!c->pending) {
        c->pending = true;
        c->next_pending = table->pending;
        table->pending = (uint16_t)(c - t->chunk);
    }
}

/* ---- dropping ---- */

static void groups_drop(const struct bt_layout *l, const struct table *table, struct chunk *c, unsigned half, uint64_t groups)
{
    uint64_t first = (uint64_t)c->number * CHUNK_ENTRIES + ((uint64_t)half << HALF_SHIFT);
    for (uint64_t left = groups & c->filled[half]; left; left &= left - 1)
        entries_poison(l, table, first + ((uint64_t)__builtin_ctzll(left) << GROUP_SHIFT), PAGING_GROUP);
    c->filled[half] &= ~groups;
    c->non_global[half] &= ~groups;
    if (!c->filled[half])
        c->large &= (uint8_t)~(1u << half);
}

static void table_drop_non_global(struct bt_tables *t, const struct bt_layout *l, struct table *table)
{
    for (uint16_t n = table->pending; n; n = t->chunk[n].next_pending) {
        struct chunk *c = &t->chunk[n];
        for (unsigned half = 0; half < 2; half++)
            groups_drop(l, table, c, half, c->non_global[half]);
        c->pending = false;
    }
    table->pending = 0;
}

static void table_drop_all(struct bt_tables *t, const struct bt_layout *l, struct table *table)
{
    for (uint16_t n = table->first; n; n = t->chunk[n].next) {
        struct chunk *c = &t->chunk[n];
        for (unsigned half = 0; half < 2; half++)
            groups_drop(l, table, c, half, ~0ull);
        c->pending = false;
    }
    table->pending = 0;
    memset(table->huge, 0, sizeof(table->huge));
}

/* Everything in the 1 GiB numbered so, whatever its tag. */
static void table_drop_huge(struct bt_tables *t, const struct bt_layout *l, struct table *table, unsigned region)
{
    for (unsigned number = region << HUGE_CHUNKS_SHIFT; number < (region + 1) << HUGE_CHUNKS_SHIFT; number++)
        for (unsigned half = 0; half < 2 && table->chunk_of[number]; half++)
            groups_drop(l, table, &t->chunk[table->chunk_of[number]], half, ~0ull);
    table->huge[region / 64] &= ~(1ull << region % 64);
}

static void table_drop_page(struct bt_tables *t, const struct bt_layout *l, struct table *table, gva_t gva)
{
    uint64_t entry = entry_number(table, gva);
    struct chunk *c = chunk_at(t, table, entry);
    unsigned half = entry >> HALF_SHIFT & 1, region = (unsigned)(entry >> CHUNK_SHIFT >> HUGE_CHUNKS_SHIFT);
    if (table->huge[region / 64] >> region % 64 & 1)
        table_drop_huge(t, l, table, region);
    else if (c && c->large >> half & 1) /* the 4 MiB around: 32-bit paging's large pages */
        groups_drop(l, table, c, half, ~0ull);
    else if (c && c->filled[half] >> (entry >> GROUP_SHIFT & 63) & 1)
        entries_poison(l, table, entry, 1);
}

/* ---- filling ---- */

static unsigned kind_access(enum view_kind kind)
{
    static const uint8_t access[] = {[KIND_SUPERVISOR] = 0, [KIND_SUPERVISOR_AC] = PAGING_AC, [KIND_USER] = PAGING_USER};
    return access[kind];
}

static bool page_is_code(const struct bt_engine *e, uint64_t offset)
{
    return __atomic_load_n(&e->code_flags[offset >> PAGE_SHIFT], __ATOMIC_RELAXED) & BT_CODE_PRESENT;
}

/* V for the page of RAM at offset. */
static uint64_t entry_value(const struct bt_engine *e, uint64_t offset, bool writable, gva_t page)
{
    uint8_t *window = writable && !page_is_code(e, offset) ? e->layout.window_w : e->layout.window_r;
    return (uintptr_t)window + offset - page;
}

/* write: the access is one, so that the page is ready for it. Otherwise pages that would have to be copied or marked first are filled for reading. */
static void page_fill(struct bt_vcpu *b, struct table *table, gva_t page, gpa_t gpa, bool writable, bool write)
{
    uint64_t offset;
    if (!physmap_take(b->c.v.memory, gpa, PAGE_SIZE_BYTES, write ? PHYSMAP_WRITE : PHYSMAP_READ, &offset))
        return;
    writable = writable && !physmap_is_rom(b->c.v.memory, gpa) && (write || physmap_expects_writes(b->c.v.memory, offset));
    if (writable)
        physmap_mark_written(b->c.v.memory, gpa, PAGE_SIZE_BYTES);
    table->entry[entry_number(table, page)] = entry_value(b->engine, offset, writable, page);
}

/* Neighbours come along when they cost nothing. */
static void group_fill(struct bt_vcpu *b, struct table *table, struct chunk *c, gva_t gva, const struct paging_group *group, bool write)
{
    struct physmap *memory = b->c.v.memory;
    gva_t first = gva & ~(PAGING_GROUP * PAGE_SIZE_BYTES - 1);
    for (unsigned left = group->readable; left; left &= left - 1) {
        unsigned n = (unsigned)__builtin_ctz(left);
        bool wanted = n == (gva >> PAGE_SHIFT & (PAGING_GROUP - 1));
        uint64_t offset;
        if (!wanted && (!physmap_offset(memory, group->gpa[n], PAGE_SIZE_BYTES, &offset) || !physmap_is_private(memory, offset, PAGE_SIZE_BYTES)))
            continue;
        page_fill(b, table, first + n * PAGE_SIZE_BYTES, group->gpa[n], group->writable >> n & 1, wanted && write);
    }
    chunk_note(b->tables, table, c, entry_number(table, first), PAGING_GROUP, group->all_global, PAGE_SIZE_BYTES);
}

/* The 2 MiB around gva inside a larger page, when all of them are plain RAM. */
static bool large_fill(struct bt_vcpu *b, struct table *table, struct chunk *c, gva_t gva, const struct paging_result *page, bool writable, bool write)
{
    const struct bt_layout *l = &b->engine->layout;
    struct physmap *memory = b->c.v.memory;
    gva_t first = gva & ~(LARGE_BYTES - 1);
    gpa_t gpa = page->gpa & ~(LARGE_BYTES - 1);
    uint64_t offset;
    if (!physmap_offset(memory, gpa, LARGE_BYTES, &offset) || !physmap_is_private(memory, offset, LARGE_BYTES) || !physmap_get(memory, gpa, LARGE_BYTES, PHYSMAP_WRITE))
        return false;
    if (writable && !physmap_marks_are_needed(memory))
        physmap_mark_written(memory, gpa, LARGE_BYTES);
    else if (write)
        physmap_mark_written(memory, page->gpa, 1);
    uint64_t entry = entry_number(table, first), marks = writable ? ~0ull : 0;
    uint64_t value = (uintptr_t)l->window_r + offset - first, to_write = (uint64_t)(l->window_w - l->window_r); /* the same all along */
    for (unsigned n = 0; n < LARGE_PAGES; n++) {
        if (writable && n % 64 == 0)
            marks = physmap_marks(memory, offset + n * PAGE_SIZE_BYTES);
        table->entry[entry + n] = value + (marks >> n % 64 & 1 ? to_write : 0);
    }
    for (unsigned n = 0; writable && n < LARGE_PAGES; n++)
        if (unlikely(page_is_code(b->engine, offset + n * PAGE_SIZE_BYTES)))
            table->entry[entry + n] = value;
    chunk_note(b->tables, table, c, entry, LARGE_PAGES, page->global, page->page_bytes);
    return true;
}

static bool linear_is_possible(const struct cpu_state *cpu, gva_t gva)
{
    return (cpu->efer & EFER_LMA) || !(gva >> 32); /* without long mode INVLPG would miss the aliases above 4 GiB */
}

static struct bt_view *view_current(struct bt_vcpu *b);

/* alone: not the neighbours, too; and nobody has accessed it yet, so that accessed bits must be there already. */
static enum bt_fill fill(struct bt_vcpu *b, gva_t gva, unsigned size, bool write, bool alone)
{
    const struct cpu_state *cpu = &b->c.v.cpu;
    struct physmap *memory = b->c.v.memory;
    struct paging_result page;
    struct paging_group group = {.readable = 0};
    uint32_t error;
    uint64_t offset;
    b->fill_error = 0;
    if (!size || (gva & PAGE_MASK_BITS) + size > PAGE_SIZE_BYTES || !linear_is_possible(cpu, gva))
        return BT_FILL_SLOW;
    struct bt_view *view = view_current(b);
    unsigned access = kind_access(view->kind) | (write ? PAGING_WRITE : PAGING_READ) | (alone ? PAGING_NO_UPDATE : 0);
    int rc = paging_walk_group(memory, cpu, b->c.max_phys_bits, gva, access, &page, alone ? NULL : &group, &error);
    if (rc) {
        b->fill_error = rc == -EFAULT ? error | BT_FILL_FAULT : 0;
        return BT_FILL_SLOW;
    }
    if (alone && !page.accessed)
        return BT_FILL_SLOW;
    if (!(cpu->cr0 & CR0_PG))
        page.page_bytes = LARGE_BYTES; /* nothing ends at 4 KiB */
    gpa_t gpa = page.gpa & ~PAGE_MASK_BITS;
    if (!physmap_take(memory, gpa, PAGE_SIZE_BYTES, PHYSMAP_READ, &offset) || (write && (physmap_is_rom(memory, gpa) || page_is_code(b->engine, offset))))
        return BT_FILL_SLOW;
    struct table *table = &view->data;
    struct chunk *c = chunk_get(b, view, table, gva);
    if (!c)
        return BT_FILL_SLOW;
    bool writable = write || (page.dirty && (page.writable || (view->kind != KIND_USER && !(cpu->cr0 & CR0_WP))));
    if (page.page_bytes > PAGE_SIZE_BYTES && large_fill(b, table, c, gva, &page, writable, write))
        return BT_FILL_DONE;
    if (group.readable)
        group_fill(b, table, c, gva, &group, write);
    /* Its bits are set by now, so the group has it, unless the guest changed the entry meanwhile. */
    if (!((write ? group.writable : group.readable) >> (gva >> PAGE_SHIFT & (PAGING_GROUP - 1)) & 1)) {
        page_fill(b, table, gva & ~PAGE_MASK_BITS, gpa, writable, write);
        chunk_note(b->tables, table, c, entry_number(table, gva), 1, page.global, page.page_bytes);
    }
    return BT_FILL_DONE;
}

/* Filling for another access may have taken the chunk away again. */
uint64_t tables_v(const struct bt_vcpu *b, gva_t gva)
{
    const struct table *table = &b->view->data;
    uint64_t entry = entry_number(table, gva);
    return chunk_at(b->tables, table, entry) ? table->entry[entry] : data_poison(&b->engine->layout, entry);
}

enum bt_fill tables_fill(struct bt_vcpu *b, gva_t gva, unsigned size, bool write)
{
    return fill(b, gva, size, write, false);
}

void tables_fill_page(struct bt_vcpu *b, gva_t gva)
{
    (void)fill(b, gva, 1, false, true);
}

int tables_fetch(struct bt_vcpu *b, gva_t gva, uint64_t *ram_offset)
{
    const struct cpu_state *cpu = &b->c.v.cpu;
    struct bt_tables *t = b->tables;
    uint32_t error;
    unsigned access = PAGING_FETCH | (b->c.view == VIEW_USER ? PAGING_USER : 0);
    t->fetch_page = ~0ull;
    if (!linear_is_possible(cpu, gva) ||
        paging_walk_group(b->c.v.memory, cpu, b->c.max_phys_bits, gva, access, &t->fetch, &t->fetch_group, &error))
        return -EFAULT;
    if (!physmap_take(b->c.v.memory, t->fetch.gpa & ~PAGE_MASK_BITS, PAGE_SIZE_BYTES, PHYSMAP_EXECUTE, ram_offset))
        return -EFAULT;
    t->fetch_page = gva & ~PAGE_MASK_BITS;
    return 0;
}

int tables_look(const struct bt_vcpu *b, gva_t gva, uint64_t *ram_offset)
{
    const struct cpu_state *cpu = &b->c.v.cpu;
    struct paging_result page;
    uint32_t error;
    unsigned access = PAGING_FETCH | PAGING_NO_UPDATE | (b->c.view == VIEW_USER ? PAGING_USER : 0);
    if (!linear_is_possible(cpu, gva) || paging_walk(b->c.v.memory, cpu, b->c.max_phys_bits, gva, access, &page, &error))
        return -EFAULT;
    return physmap_take(b->c.v.memory, page.gpa & ~PAGE_MASK_BITS, PAGE_SIZE_BYTES, PHYSMAP_EXECUTE, ram_offset) ? 0 : -EFAULT;
}

/* After an address space was dropped, its translations come back a group at a time. */
static void exec_set_neighbours(struct bt_vcpu *b, struct table *table, uint64_t page)
{
    struct bt_tables *t = b->tables;
    uint64_t first = page & ~(PAGING_GROUP * PAGE_SIZE_BYTES - 1);
    for (unsigned left = t->fetch_group.readable; left; left &= left - 1) {
        unsigned n = (unsigned)__builtin_ctz(left);
        uint64_t address = first + n * PAGE_SIZE_BYTES, entry = entry_number(table, address), offset;
        if (table->entry[entry] != exec_poison(&b->engine->layout, address, entry))
            continue;
        if (!physmap_offset(b->c.v.memory, t->fetch_group.gpa[n], PAGE_SIZE_BYTES, &offset))
            continue;
        const uint32_t *dt = cache_dt(b->engine, offset, &b->mode);
        if (dt)
            table->entry[entry] = (uintptr_t)dt - address * 4;
    }
}

void tables_exec_set(struct bt_vcpu *b, gva_t gva, const uint32_t *dt)
{
    struct bt_tables *t = b->tables;
    struct bt_view *view = view_current(b);
    uint64_t address = bt_code_address(&view->mode, gva), page = address & ~PAGE_MASK_BITS, entry = entry_number(&view->exec, address), offset;
    if (entry < EXEC_ENTRIES_UNUSED)
        return;
    if (t->fetch_page != (gva & ~PAGE_MASK_BITS) && tables_fetch(b, gva, &offset))
        return;
    struct chunk *c = chunk_get(b, view, &view->exec, address);
    if (!c)
        return;
    if (!(c->filled[0] | c->filled[1]))
        chunk_tag(&b->engine->layout, &view->exec, c, address);
    view->exec.entry[entry] = (uintptr_t)dt - page * 4;
    exec_set_neighbours(b, &view->exec, page);
    bool global = t->fetch.global && (!t->fetch_group.readable || t->fetch_group.all_global);
    chunk_note(t, &view->exec, c, entry, 1, global, t->fetch.page_bytes);
    t->fetch_page = ~0ull; /* the guest may change it from here on */
}

const uint32_t *tables_exec_find(struct bt_vcpu *b, gva_t gva)
{
    const struct bt_view *view = view_current(b);
    const struct table *table = &view->exec;
    uint64_t address = bt_code_address(&view->mode, gva), entry = entry_number(table, address);
    if (entry < EXEC_ENTRIES_UNUSED || !chunk_at(b->tables, table, entry))
        return NULL;
    uint64_t at = table->entry[entry] + (address & ~PAGE_MASK_BITS) * 4, in_pool = at - (uintptr_t)b->engine->layout.dt_pool;
    return in_pool >= BT_DT_BYTES && in_pool < BT_DT_POOL_BYTES && !(in_pool % BT_DT_BYTES) ? (const uint32_t *)at : NULL;
}

bool tables_exec_again(struct bt_vcpu *b, gva_t gva)
{
    uint64_t offset;
    const struct bt_view *view = view_current(b);
    if (entry_number(&view->exec, bt_code_address(&view->mode, gva)) < EXEC_ENTRIES_UNUSED || tables_fetch(b, gva, &offset))
        return false;
    const uint32_t *dt = cache_dt(b->engine, offset & ~PAGE_MASK_BITS, &b->mode);
    if (!dt || !__atomic_load_n(&dt[gva & PAGE_MASK_BITS], __ATOMIC_RELAXED))
        return false;
    tables_exec_set(b, gva, dt);
    return true;
}

bool tables_commit(struct bt_vcpu *b, uintptr_t address, gva_t gva_hint, bool exec)
{
    struct bt_view *view = b->view;
    if (!view)
        return false;
    struct table *table = exec ? &view->exec : &view->data;
    uint64_t entry = (address - (uintptr_t)table->entry) / 8, entries = exec ? EXEC_ENTRIES : DATA_ENTRIES;
    if (address < (uintptr_t)table->entry || entry >= entries || (exec && entry < EXEC_ENTRIES_UNUSED))
        return false;
    return !chunk_at(b->tables, table, entry) && chunk_commit(b, view, table, entry, gva_hint);
}

uint64_t tables_bytes(const struct bt_vcpu *b)
{
    return (uint64_t)b->tables->chunk_count * BT_CHUNK_BYTES;
}

/* ---- choosing a view ---- */

static unsigned current_asid(const struct cpu_state *cpu)
{
    return cpu->cr4 & CR4_PCIDE ? cpu->cr3 & 0xfff : 0;
}

/* Obeys the marks that flushes left. */
static void view_clean(struct bt_vcpu *b, struct bt_view *view)
{
    struct bt_tables *t = b->tables;
    const struct bt_layout *l = &b->engine->layout;
    if (view->drop_all) {
        table_drop_all(t, l, &view->data);
        table_drop_all(t, l, &view->exec);
    } else {
        table_drop_non_global(t, l, &view->data);
        table_drop_non_global(t, l, &view->exec);
    }
    view->drop_all = view->drop_non_global = false;
}

static struct bt_view *user_view(struct bt_tables *t, unsigned n)
{
    return &t->view[1 + BT_USER_VIEWS + n];
}

static struct bt_view *supervisor_ac_view(struct bt_tables *t, unsigned n)
{
    return &t->view[1 + n];
}

/* Number of the address space among those that have views; the one that was longest unused makes room. */
static unsigned space_number(struct bt_tables *t, unsigned asid)
{
    unsigned oldest = 0;
    for (unsigned n = 0; n < BT_USER_VIEWS; n++) {
        const struct bt_view *view = user_view(t, n);
        if (view->used && view->asid == asid)
            return n;
        if (view->used < user_view(t, oldest)->used)
            oldest = n;
    }
    user_view(t, oldest)->asid = asid;
    user_view(t, oldest)->drop_all = true;
    return oldest;
}

static void gs_base_set(const uint8_t *base)
{
    uintptr_t have;
    __asm__ volatile("rdgsbase %0" : "=r"(have)); /* the thread may have run another vCPU in between */
    if (have != (uintptr_t)base)
        __asm__ volatile("wrgsbase %0" : : "r"(base) : "memory");
}

/* What the choice of views and what their exec tables lead to depend on, besides the epoch. */
static uint64_t views_key(const struct bt_vcpu *b)
{
    const struct cpu_state *cpu = &b->c.v.cpu;
    uint64_t key = current_asid(cpu) | cpu->cr4 << 12 | (uint64_t)b->c.simd_blocked << 48 | (uint64_t)b->c.code_bits << 56;
    if (b->c.code_bits == 32)
        key |= (uint64_t)(bt_flat_segments(cpu) & BT_MODE_SEGMENTS) << 40;
    return b->tables->mixed ? key | 1ull << 52 | (uint64_t)(b->c.view == VIEW_USER) << 53 : key;
}

/* The mode of the code that runs in view n. 32-bit code is not entered from inside translated code, so views for it stay as they are while others are in use, and are kept from being
 * entered by tables_are_long. */
static struct bt_mode view_mode(const struct bt_vcpu *b, enum tlb_view n, const struct bt_view *view)
{
    bool user = n == VIEW_USER;
    if (user == (b->c.view == VIEW_USER))
        return bt_mode_of(&b->c, user, b->c.code_bits);
    return view->mode.code_bits == 32 ? view->mode : bt_mode_of(&b->c, user, 64);
}

static void view_ready(struct bt_vcpu *b, enum tlb_view n, struct bt_view *view, uint64_t epoch)
{
    struct bt_tables *t = b->tables;
    struct bt_mode mode = view_mode(b, n, view);
    unsigned asid = current_asid(&b->c.v.cpu);
    if (view->asid != asid) {
        view->drop_non_global = true;
        view->asid = asid;
    }
    if (view->drop_all || view->drop_non_global)
        view_clean(b, view);
    if (view->epoch != epoch || memcmp(&view->mode, &mode, sizeof(mode)) != 0) {
        table_drop_all(t, &b->engine->layout, &view->exec);
        view->mode = mode;
        view->epoch = epoch;
    }
    view->used = ++t->clock;
    t->ready[n] = view;
    b->table_of[n] = view->base;
}

/* All views of the current address space, so that translated code can change between them. */
static void views_ready(struct bt_vcpu *b, uint64_t epoch)
{
    struct bt_tables *t = b->tables;
    bool smap = b->c.v.cpu.cr4 & CR4_SMAP;
    unsigned space = space_number(t, current_asid(&b->c.v.cpu));
    view_ready(b, VIEW_USER, user_view(t, space), epoch);
    view_ready(b, VIEW_SUPERVISOR_AC, smap ? supervisor_ac_view(t, space) : &t->view[0], epoch);
    view_ready(b, VIEW_SUPERVISOR, &t->view[0], epoch);
    t->mixed = false;
    for (unsigned n = 0; n < VIEW_COUNT; n++)
        t->mixed |= t->ready[n]->mode.code_bits != 64;
    t->epoch = epoch;
    t->key = views_key(b);
    t->stale = false;
}

bool tables_are_long(const struct bt_vcpu *b)
{
    return !b->tables->mixed;
}

static struct bt_view *view_current(struct bt_vcpu *b)
{
    struct bt_tables *t = b->tables;
    uint64_t epoch = __atomic_load_n(&b->engine->epoch, __ATOMIC_ACQUIRE);
    if (unlikely(t->stale || t->epoch != epoch || t->key != views_key(b)))
        views_ready(b, epoch);
    b->view = t->ready[b->c.view];
    b->table = b->view->base;
    return b->view;
}

void tables_select(struct bt_vcpu *b)
{
    gs_base_set(view_current(b)->base);
}

void tables_settle(struct bt_vcpu *b)
{
    b->view = b->tables->ready[b->c.view];
    b->table = b->view->base;
}

/* ---- what the interpreter's TLB maintenance calls ---- */

void tables_flush_all(struct icpu *c)
{
    struct bt_vcpu *b = (struct bt_vcpu *)c;
    for (unsigned n = 0; n < VIEWS; n++)
        b->tables->view[n].drop_all = true;
    b->tables->stale = true;
}

void tables_flush_non_global(struct icpu *c, unsigned asid)
{
    struct bt_vcpu *b = (struct bt_vcpu *)c;
    for (unsigned n = 0; n < VIEWS; n++)
        if (b->tables->view[n].asid == asid)
            b->tables->view[n].drop_non_global = true;
    b->tables->stale = true;
}

void tables_load_cr3(struct icpu *c, bool keep)
{
    if (!keep) /* otherwise the key is another */
        tables_flush_non_global(c, current_asid(&c->v.cpu));
}

void tables_flush_page(struct icpu *c, gva_t gva)
{
    struct bt_vcpu *b = (struct bt_vcpu *)c;
    for (unsigned n = 0; n < VIEWS; n++) {
        struct bt_view *view = &b->tables->view[n];
        if (!view->used || view->drop_all)
            continue;
        table_drop_page(b->tables, &b->engine->layout, &view->data, gva);
        table_drop_page(b->tables, &b->engine->layout, &view->exec, bt_code_address(&view->mode, gva));
    }
}

/* ---- creation ---- */

static void *map_anonymous(uint64_t bytes, int prot)
{
    void *at = mmap(NULL, bytes, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

/* The file that all views of a vCPU have mapped: its structure, then what is at BT_SPLIT. */
static int context_file(void)
{
    static const uint8_t one[] = {[0 ... PAGE_SIZE_BYTES - 1] = 1};
    int fd = memfd_create("doppel-vcpu", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n = pwrite(fd, one, sizeof(one), BT_CTX_BYTES + PAGE_SIZE_BYTES); /* which are the last */
    if (n == (ssize_t)sizeof(one))
        return fd;
    int rc = n < 0 ? -errno : -ENOMEM;
    close(fd);
    return rc;
}

static int view_create(struct bt_view *view, unsigned n, uint8_t *reserved, uint16_t *chunk_of, int context_fd)
{
    view->base = reserved + n * VIEW_RESERVED_BYTES + VIEW_RESERVED_BELOW;
    view->kind = !n ? KIND_SUPERVISOR : n <= BT_USER_VIEWS ? KIND_SUPERVISOR_AC : KIND_USER;
    view->data.entry = (uint64_t *)view->base;
    view->exec.entry = (uint64_t *)(view->base + BT_EXEC_TABLE_OFFSET);
    view->exec.exec = true;
    if (mmap(view->base + BT_SPLIT, 2 * PAGE_SIZE_BYTES, PROT_READ, MAP_SHARED | MAP_FIXED, context_fd, BT_CTX_BYTES) == MAP_FAILED ||
        mprotect(view->base + BT_CHECK, PAGE_SIZE_BYTES, PROT_READ))
        return -errno;
    if (mmap(view->base - BT_CTX_BYTES, BT_CTX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, context_fd, 0) == MAP_FAILED)
        return -errno;
    view->data.chunk_of = chunk_of + n * VIEW_CHUNKS;
    view->exec.chunk_of = view->data.chunk_of + (DATA_ENTRIES >> CHUNK_SHIFT);
    return 0;
}

static void context_init(struct bt_engine *e, struct bt_vcpu *b, struct bt_tables *t)
{
    b->engine = e;
    b->tables = t;
    b->exec_mask = BT_EXEC_MASK;
    b->poll = b->poll_sti = b->poll_quiet = (uintptr_t)&b->poll_word;
    b->poll_word = BT_POLL_OK;
    b->mask_low12 = PAGE_MASK_BITS;
    b->mask_page = ~PAGE_MASK_BITS;
    b->mask_count = ~(2 * PAGE_SIZE_BYTES - 1);
    b->mask_arith = RFLAGS_OSZAPC | RFLAGS_DF;
}

static void tables_free(struct bt_tables *t)
{
    if (t->reserved)
        munmap(t->reserved, VIEWS * VIEW_RESERVED_BYTES);
    if (t->chunk_of)
        munmap(t->chunk_of, VIEWS * VIEW_CHUNKS * sizeof(*t->chunk_of));
    if (t->chunk)
        munmap(t->chunk, (t->chunk_limit + 1) * sizeof(*t->chunk));
    munmap(t, sizeof(*t));
}

static int tables_allocate(struct bt_tables **tables, uint64_t ram_bytes, int context_fd)
{
    struct bt_tables *t = map_anonymous(sizeof(*t), PROT_READ | PROT_WRITE);
    if (!t)
        return -errno;
    uint64_t chunks = (TABLE_BYTES_MIN + ram_bytes / PAGE_SIZE_BYTES * 8) / BT_CHUNK_BYTES;
    t->chunk_limit = chunks < CHUNKS_MAX ? (unsigned)chunks : CHUNKS_MAX;
    t->fetch_page = ~0ull;
    t->stale = true;
    int rc = 0;
    if (!(t->chunk = map_anonymous((t->chunk_limit + 1) * sizeof(*t->chunk), PROT_READ | PROT_WRITE)) ||
        !(t->chunk_of = map_anonymous(VIEWS * VIEW_CHUNKS * sizeof(*t->chunk_of), PROT_READ | PROT_WRITE)) ||
        !(t->reserved = map_anonymous(VIEWS * VIEW_RESERVED_BYTES, PROT_NONE)))
        rc = -errno;
    if (!rc) {
        madvise(t->reserved, VIEWS * VIEW_RESERVED_BYTES, MADV_NOHUGEPAGE);
        madvise(t->reserved, VIEWS * VIEW_RESERVED_BYTES, MADV_DONTDUMP);
    }
    for (unsigned n = 0; !rc && n < VIEWS; n++)
        rc = view_create(&t->view[n], n, t->reserved, t->chunk_of, context_fd);
    if (rc)
        tables_free(t);
    else
        *tables = t;
    return rc;
}

int tables_create(struct bt_engine *e, struct bt_vcpu **b, struct error *err)
{
    struct bt_tables *t = NULL;
    int fd = context_file(), rc = fd < 0 ? fd : 0;
    void *context = rc ? MAP_FAILED : mmap(NULL, BT_CTX_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (!rc && context == MAP_FAILED)
        rc = -errno;
    if (!rc)
        rc = tables_allocate(&t, e->layout.ram_bytes, fd);
    if (fd >= 0)
        close(fd);
    if (rc) {
        if (context != MAP_FAILED)
            munmap(context, BT_CTX_BYTES);
        return error_set(err, rc, "cannot reserve %llu GiB of address space for a virtual processor's tables: %s; check 'ulimit -v', or use engine interp",
                         VIEWS * VIEW_RESERVED_BYTES >> 30, strerror(-rc));
    }
    *b = context;
    context_init(e, *b, t);
    return 0;
}

void tables_destroy(struct bt_vcpu *b)
{
    struct bt_tables *t = b->tables;
    tables_free(t);
    munmap(b, BT_CTX_BYTES);
}
