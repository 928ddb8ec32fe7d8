/*
 * The shadow that direct execution runs in: guest page tables turned into mappings of a process.
 *
 * Kept in leaves of 2 MiB. What is mapped is compared with what the tables say whenever the guest has invalidated it, and the difference is queued for the process,
 * neighbours in one mapping where their RAM lies side by side.
 * Invariant: a page of RAM that is writable in some shadow, perhaps at several addresses, has BT_CODE_DIRECT and its bit in that shadow's `writable`. Both are cleared only by
 * direct_space_release, which makes the shadow stale: catching up sets them again where the page stays writable.
 * Threading: direct_space.h.
 */
#include "engine/bt/direct_space.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "arch/paging.h"
#include "engine/bt/direct_code.h"

#define LEAVES_MAX 2048u
#define LEAF_SLOTS (4 * LEAVES_MAX)
#define WANTED_MAX 64u
#define AROUND_FAULT 64u  /* pages, aligned, that a fault brings in when their accessed bits are set */
#define AROUND_WANTED 16u
#define ENTRY_RIGHTS 7u   /* PAGING_MAY_* in the bits below the RAM offset */
#define REGION_SHIFT 21
#define TURNS 1024u
#define TURNS_PATIENCE 8u

struct leaf {
    gva_t region;
    bool large; /* some of it may have come from one page of 2 MiB */
    uint64_t entry[PAGING_REGION_PAGES]; /* RAM offset | PAGING_MAY_*; 0: not mapped */
    uint64_t guest[PAGING_REGION_PAGES]; /* what the guest's tables said when that was made */
};

struct wanted {
    gva_t page;
    bool add; /* also when it is not mapped */
};

/* A mapping under construction. */
struct run {
    gva_t at;
    uint64_t bytes, entry;
};

struct direct_space {
    struct bt_engine *engine;
    struct direct_child *child;
    struct leaf *leaf[LEAVES_MAX];
    unsigned leaves;
    uint16_t slot[LEAF_SLOTS]; /* hash table of 1 + index of a leaf; 0: free */
    struct run run;
    uint64_t *writable; /* bit per page of RAM: perhaps */
    uint8_t turns[TURNS]; /* by pages, hashed: how often they went from written to executed and back */
    uint64_t guard[DIRECT_BREAKPOINTS]; /* where the process stops before an instruction, because its page is executable here; 0: free */
    unsigned guard_hand;
    bool guards_changed; /* not told to the process yet */
    struct wanted wanted[WANTED_MAX];
    unsigned wanted_count;
    bool stale;
    bool released; /* a page that is written to here has translations now */
    bool huge; /* something may have come from a larger page */
    bool entered;
    bool unusable;
};

/* ---- creation ---- */

int direct_space_create(struct direct_space **out, struct bt_engine *e, struct error *err)
{
    struct direct_space *space = calloc(1, sizeof(*space));
    uint64_t pages = e->layout.ram_bytes / PAGE_SIZE_BYTES;
    if (space) {
        space->engine = e;
        space->writable = calloc((pages + 63) / 64, sizeof(uint64_t));
        space->stale = true;
    }
    int rc = space && space->writable ? 0 : error_set(err, -ENOMEM, "no memory for a shadow");
    if (!rc)
        rc = direct_child_create(&space->child, physmap_fd(e->interp.memory), err);
    if (rc && space)
        direct_space_destroy(space);
    else if (!rc)
        *out = space;
    return rc;
}

static void leaves_free(struct direct_space *space)
{
    while (space->leaves)
        free(space->leaf[--space->leaves]);
    memset(space->slot, 0, sizeof(space->slot));
}

void direct_space_destroy(struct direct_space *space)
{
    if (space->child)
        direct_child_destroy(space->child);
    leaves_free(space);
    free(space->writable);
    free(space);
}

/* Nothing is mapped any more, once that is flushed. */
static void shadow_empty(struct direct_space *space)
{
    direct_child_unmap_all(space->child);
    leaves_free(space);
    memset(space->guard, 0, sizeof(space->guard));
    space->guards_changed = true;
}

int direct_space_reset(struct direct_space *space)
{
    struct bt_engine *e = space->engine;
    pthread_mutex_lock(&e->lock);
    shadow_empty(space);
    memset(space->writable, 0, (e->layout.ram_bytes / PAGE_SIZE_BYTES + 63) / 64 * sizeof(uint64_t));
    memset(space->turns, 0, sizeof(space->turns));
    space->wanted_count = 0;
    space->stale = true; /* where its own page is may be in use there */
    pthread_mutex_unlock(&e->lock);
    return space->unusable ? -EADDRINUSE : direct_space_flush(space);
}

int direct_space_flush(struct direct_space *space)
{
    int rc = space->guards_changed ? direct_child_break_at(space->child, space->guard) : 0;
    space->guards_changed = false;
    return rc ? rc : direct_child_flush(space->child);
}

struct direct_child *direct_space_child(struct direct_space *space)
{
    return space->child;
}

/* ---- leaves ---- */

static uint16_t *leaf_slot(struct direct_space *space, gva_t region)
{
    unsigned n = (unsigned)((region >> REGION_SHIFT) * 0x9e3779b97f4a7c15ull >> 40) % LEAF_SLOTS;
    while (space->slot[n] && space->leaf[space->slot[n] - 1]->region != region)
        n = (n + 1) % LEAF_SLOTS;
    return &space->slot[n];
}

/* NULL: nothing is mapped there. */
static struct leaf *leaf_find(struct direct_space *space, gva_t gva)
{
    unsigned slot = *leaf_slot(space, gva & ~(PAGING_REGION_BYTES - 1));
    return slot ? space->leaf[slot - 1] : NULL;
}

/* NULL: there are too many (catch_up), or no memory. */
static struct leaf *leaf_get(struct direct_space *space, gva_t gva)
{
    gva_t region = gva & ~(PAGING_REGION_BYTES - 1);
    uint16_t *slot = leaf_slot(space, region);
    if (*slot || space->leaves == LEAVES_MAX)
        return *slot ? space->leaf[*slot - 1] : NULL;
    struct leaf *leaf = calloc(1, sizeof(*leaf));
    if (leaf) {
        leaf->region = region;
        space->leaf[space->leaves++] = leaf;
        *slot = (uint16_t)space->leaves;
    }
    return leaf;
}

/* ---- changing mappings ---- */

static int protection(uint64_t entry)
{
    return (entry & PAGING_MAY_READ ? PROT_READ : 0) | (entry & PAGING_MAY_WRITE ? PROT_WRITE : 0) | (entry & PAGING_MAY_EXECUTE ? PROT_EXEC : 0);
}

static void run_end(struct direct_space *space)
{
    struct run *run = &space->run;
    if (run->bytes)
        direct_child_map(space->child, run->at, run->bytes, run->entry & ~(uint64_t)ENTRY_RIGHTS, protection(run->entry));
    run->bytes = 0;
}

static void run_add(struct direct_space *space, gva_t at, uint64_t entry)
{
    struct run *run = &space->run;
    bool follows = run->bytes && run->at + run->bytes == at && (entry ? run->entry && run->entry + run->bytes == entry : !run->entry);
    if (!follows) {
        run_end(space);
        *run = (struct run){at, 0, entry};
    }
    run->bytes += PAGE_SIZE_BYTES;
}

/* ---- what a page may be mapped as ---- */

static void writable_note(struct direct_space *space, uint64_t ram_offset)
{
    uint64_t page = ram_offset / PAGE_SIZE_BYTES;
    space->writable[page / 64] |= 1ull << page % 64;
    space->engine->code_flags[page] |= BT_CODE_DIRECT;
}

/* Where the guest's tables can be followed. Something of the guest's where the process has its own page: another process then, with its page elsewhere. */
static bool is_usable(struct direct_space *space, gva_t gva)
{
    bool hidden = gva - direct_child_hidden(space->child) < DIRECT_HIDDEN_BYTES;
    space->unusable |= hidden;
    return !hidden && gva >= DIRECT_ADDRESS_FIRST && gva < DIRECT_ADDRESS_LIMIT;
}

/* Only RAM can be mapped there: files of persistent memory have descriptors of their own, and stay translated code's. */
static bool ram_offset(struct physmap *memory, gpa_t gpa, uint64_t *offset)
{
    return physmap_offset(memory, gpa, PAGE_SIZE_BYTES, offset) && *offset < physmap_ram_bytes(memory);
}

/* The code there is not executed here any more. */
static void guard_remove(struct direct_space *space, unsigned k)
{
    gva_t page = space->guard[k] & ~PAGE_MASK_BITS;
    struct leaf *leaf = leaf_find(space, page);
    uint64_t *entry = leaf ? &leaf->entry[page >> 12 & (PAGING_REGION_PAGES - 1)] : NULL;
    if (entry && *entry & PAGING_MAY_EXECUTE) {
        *entry &= ~(uint64_t)PAGING_MAY_EXECUTE;
        run_add(space, page, *entry);
    }
    for (unsigned n = 0; n < DIRECT_BREAKPOINTS; n++)
        if ((space->guard[n] & ~PAGE_MASK_BITS) == page)
            space->guard[n] = 0;
}

/* A breakpoint for `page`: one that is free, or another page's. */
static unsigned guard_free(struct direct_space *space, gva_t page)
{
    for (unsigned k = 0; k < DIRECT_BREAKPOINTS; k++)
        if (!space->guard[k])
            return k;
    do
        space->guard_hand = (space->guard_hand + 1) % DIRECT_BREAKPOINTS;
    while ((space->guard[space->guard_hand] & ~PAGE_MASK_BITS) == page);
    guard_remove(space, space->guard_hand);
    return space->guard_hand;
}

static uint8_t *turns_of(struct direct_space *space, gva_t gva)
{
    return &space->turns[(gva >> 12) * 0x9e3779b97f4a7c15ull >> 32 & (TURNS - 1)];
}

/*
 * A page that may be written and executed is one or the other, so that its code is looked at before it runs: as it was, unless `access` says otherwise. Those that change
 * all the time are both after a while.
 */
static uint64_t write_or_execute(struct direct_space *space, gva_t gva, uint64_t rights, uint64_t old, unsigned access)
{
    const uint64_t both = PAGING_MAY_WRITE | PAGING_MAY_EXECUTE;
    uint8_t *turns = turns_of(space, gva);
    if ((rights & both) != both || *turns >= TURNS_PATIENCE)
        return rights;
    uint64_t one = access & PAGING_WRITE ? PAGING_MAY_WRITE : access & PAGING_FETCH ? PAGING_MAY_EXECUTE : old & both ? old & both : PAGING_MAY_WRITE;
    *turns += (old & both) && !(old & one);
    return (rights & ~both) | one;
}

/* bt_engine.code_tells: what is known of a page, and for which contents of it. */
enum { CODE_UNKNOWN, CODE_PLAIN, CODE_TELLS, CODE_TELLS_MUCH, CODE_KINDS };

/* Contents made to have the same one as others hide what direct_code.h looks for, no more. */
static uint64_t contents_hash(const uint8_t *page)
{
    uint64_t h[4] = {1, 2, 3, 4}, words[4];
    for (unsigned n = 0; n < PAGE_SIZE_BYTES; n += sizeof(words)) {
        __builtin_memcpy(words, page + n, sizeof(words));
        for (unsigned k = 0; k < 4; k++)
            h[k] = ((h[k] << 23 | h[k] >> 41) ^ words[k]) * 0x9e3779b97f4a7c15ull;
    }
    return h[0] ^ h[1] << 1 ^ h[2] << 2 ^ h[3] << 3;
}

/* How many instructions of the page must not run here, and where; more than fit into at[]: too many. */
static unsigned tells_find(struct direct_space *space, uint64_t offset, uint16_t at[DIRECT_BREAKPOINTS])
{
    struct bt_engine *e = space->engine;
    const uint8_t *page = e->layout.window_r + offset;
    uint64_t *known = &e->code_tells[offset / PAGE_SIZE_BYTES], hash = contents_hash(page) & ~(uint64_t)(CODE_KINDS - 1);
    if (*known == (hash | CODE_PLAIN))
        return 0;
    if (*known == (hash | CODE_TELLS_MUCH))
        return DIRECT_BREAKPOINTS + 1;
    unsigned count = direct_code_tells(page, at, DIRECT_BREAKPOINTS);
    *known = hash | (!count ? CODE_PLAIN : count <= DIRECT_BREAKPOINTS ? CODE_TELLS : CODE_TELLS_MUCH);
    return count;
}

/*
 * Are all instructions of the page of code that must not run here stopped before? `now`: they are to be, if need be instead of others'. Neighbours of what is wanted now may run
 * when there are none; what had some is not looked at again for their sake.
 */
static bool is_guarded(struct direct_space *space, gva_t page, uint64_t offset, bool now)
{
    uint16_t at[DIRECT_BREAKPOINTS];
    if (!now && space->engine->code_tells[offset / PAGE_SIZE_BYTES] % CODE_KINDS > CODE_PLAIN)
        return false;
    unsigned count = tells_find(space, offset, at);
    if (!count || !now || count > DIRECT_BREAKPOINTS)
        return !count;
    for (unsigned k = 0; k < DIRECT_BREAKPOINTS; k++) /* what is left of its own, from other contents */
        if ((space->guard[k] & ~PAGE_MASK_BITS) == page)
            space->guard[k] = 0;
    for (unsigned n = 0; n < count; n++)
        space->guard[guard_free(space, page)] = page + at[n];
    space->guards_changed = true;
    return true;
}

/*
 * `guest`: as paging_user_region gives it; `old`: what is mapped; `access`: what it is wanted for; `now`: it is what was touched, so that it may cost something. Only private pages are in
 * the file that the process has.
 */
static uint64_t entry_wanted(struct direct_space *space, gva_t gva, uint64_t guest, uint64_t old, unsigned access, bool now)
{
    struct bt_engine *e = space->engine;
    struct physmap *memory = e->interp.memory;
    uint64_t offset, rights = guest & ENTRY_RIGHTS;
    gpa_t gpa = guest & ~PAGE_MASK_BITS;
    if (!guest || !is_usable(space, gva) || !ram_offset(memory, gpa, &offset))
        return 0;
    if (!physmap_is_private(memory, offset, PAGE_SIZE_BYTES) && (!now || physmap_need(memory, offset, PAGE_SIZE_BYTES, PHYSMAP_WRITE)))
        return 0;
    uint8_t *flags = &e->code_flags[offset / PAGE_SIZE_BYTES];
    if (physmap_is_rom(memory, gpa) || (*flags & BT_CODE_PRESENT) || !(access & PAGING_WRITE || physmap_expects_writes(memory, offset)))
        rights &= ~PAGING_MAY_WRITE;
    rights = write_or_execute(space, gva, rights, old, access);
    bool known = (old & ~(uint64_t)ENTRY_RIGHTS) == offset && (old & PAGING_MAY_EXECUTE);
    if ((rights & PAGING_MAY_EXECUTE) && !known && !is_guarded(space, gva, offset, access & PAGING_FETCH))
        rights &= ~(uint64_t)PAGING_MAY_EXECUTE;
    return offset | rights;
}

/* Pages [first, first + count) of the leaf become what the tables say; those that are not mapped only with `add`. `access` is for page `wanted`. */
static void leaf_sync(struct direct_space *space, struct bt_vcpu *b, struct leaf *leaf, unsigned first, unsigned count, bool add, unsigned wanted, unsigned access)
{
    struct physmap *memory = b->c.v.memory;
    uint64_t guest[PAGING_REGION_PAGES];
    uint64_t page_bytes = paging_user_region(memory, &b->c.v.cpu, b->c.max_phys_bits, leaf->region, guest);
    leaf->large = page_bytes == PAGING_REGION_BYTES || (leaf->large && count < PAGING_REGION_PAGES);
    space->huge |= page_bytes > PAGING_REGION_BYTES;
    for (unsigned n = first; n < first + count; n++) {
        gva_t at = leaf->region + n * PAGE_SIZE_BYTES;
        uint64_t old = leaf->entry[n];
        if (old ? guest[n] == leaf->guest[n] && !space->released && access == PAGING_READ : !add)
            continue;
        uint64_t new = entry_wanted(space, at, guest[n], old, n == wanted ? access : PAGING_READ, n == wanted);
        leaf->guest[n] = guest[n];
        if (new & PAGING_MAY_WRITE)
            writable_note(space, new & ~(uint64_t)ENTRY_RIGHTS);
        if (new == old)
            continue;
        if (new & PAGING_MAY_WRITE)
            physmap_mark_written(memory, physmap_gpa(memory, new & ~(uint64_t)ENTRY_RIGHTS), PAGE_SIZE_BYTES);
        leaf->entry[n] = new;
        run_add(space, at, new);
    }
    run_end(space);
}

static void page_sync(struct direct_space *space, struct bt_vcpu *b, gva_t gva, unsigned around, bool add)
{
    struct leaf *leaf = add ? leaf_get(space, gva) : leaf_find(space, gva);
    unsigned n = gva >> 12 & (PAGING_REGION_PAGES - 1);
    if (leaf && leaf->large)
        around = PAGING_REGION_PAGES;
    if (leaf)
        leaf_sync(space, b, leaf, n & ~(around - 1), around, add, n, PAGING_READ);
}

/* ---- what the guest invalidates ---- */

void direct_space_stale(struct direct_space *space)
{
    space->stale = true;
}

static void page_note(struct direct_space *space, gva_t gva, bool add)
{
    gva &= ~PAGE_MASK_BITS;
    if (gva >= DIRECT_ADDRESS_LIMIT || (space->stale && !add))
        return;
    for (unsigned n = 0; n < space->wanted_count; n++)
        if (space->wanted[n].page == gva) {
            space->wanted[n].add |= add;
            return;
        }
    if (space->wanted_count < WANTED_MAX)
        space->wanted[space->wanted_count++] = (struct wanted){gva, add};
    else
        space->stale = true;
}

void direct_space_stale_page(struct direct_space *space, gva_t gva)
{
    if (space->huge)
        space->stale = true;
    else
        page_note(space, gva, false);
}

void direct_space_want(struct direct_space *space, gva_t gva)
{
    page_note(space, gva, true);
}

bool direct_space_release(struct direct_space *space, uint64_t ram_offset)
{
    uint64_t page = ram_offset / PAGE_SIZE_BYTES, bit = 1ull << page % 64;
    if (!(space->writable[page / 64] & bit))
        return true;
    if (space->entered)
        return false;
    space->writable[page / 64] &= ~bit;
    space->stale = space->released = true; /* by the next way in it has them */
    return true;
}

/* ---- the way in, and faults ---- */

static void catch_up(struct direct_space *space, struct bt_vcpu *b)
{
    if (space->leaves == LEAVES_MAX)
        shadow_empty(space);
    if (space->stale)
        space->huge = false;
    for (unsigned n = 0; space->stale && n < space->leaves; n++)
        leaf_sync(space, b, space->leaf[n], 0, PAGING_REGION_PAGES, false, 0, PAGING_READ);
    space->stale = space->released = false;
    for (unsigned n = 0; n < space->wanted_count; n++)
        page_sync(space, b, space->wanted[n].page, space->wanted[n].add ? AROUND_WANTED : 1, space->wanted[n].add);
    space->wanted_count = 0;
}

bool direct_space_enter(struct direct_space *space, struct bt_vcpu *b)
{
    if (!paging_is_free(b->c.v.memory, &b->c.v.cpu, b->c.max_phys_bits, direct_child_hidden(space->child), DIRECT_HIDDEN_BYTES))
        space->unusable = true;
    catch_up(space, b);
    space->entered = true;
    return !space->unusable;
}

void direct_space_left(struct direct_space *space)
{
    space->entered = false;
}

static enum direct_fill fill_result(uint64_t old, uint64_t new, unsigned access)
{
    uint64_t right = access & PAGING_WRITE ? PAGING_MAY_WRITE : access & PAGING_FETCH ? PAGING_MAY_EXECUTE : PAGING_MAY_READ;
    if (!(new & right))
        return access & PAGING_FETCH && new ? DIRECT_FILL_FORBIDDEN : DIRECT_FILL_NOT;
    return old == new ? DIRECT_FILL_SAME : DIRECT_FILL_CHANGED;
}

enum direct_fill direct_space_fill(struct direct_space *space, struct bt_vcpu *b, gva_t gva, unsigned access)
{
    struct bt_engine *e = space->engine;
    struct paging_result page;
    uint64_t offset;
    uint32_t error;
    if (gva >= DIRECT_ADDRESS_LIMIT || paging_walk(b->c.v.memory, &b->c.v.cpu, b->c.max_phys_bits, gva, access | PAGING_USER, &page, &error) || !is_usable(space, gva) ||
        !physmap_offset(b->c.v.memory, page.gpa & ~PAGE_MASK_BITS, PAGE_SIZE_BYTES, &offset))
        return DIRECT_FILL_NOT;
    if (offset >= physmap_ram_bytes(b->c.v.memory))
        return DIRECT_FILL_FORBIDDEN;
    struct leaf *leaf = leaf_get(space, gva);
    if (!leaf)
        return DIRECT_FILL_NOT;
    if (access & PAGING_WRITE && e->code_flags[offset / PAGE_SIZE_BYTES] & BT_CODE_PRESENT)
        cache_page_drop(e, offset);
    unsigned n = gva >> 12 & (PAGING_REGION_PAGES - 1);
    uint64_t old = leaf->entry[n];
    leaf_sync(space, b, leaf, n & ~(AROUND_FAULT - 1), AROUND_FAULT, true, n, access);
    return fill_result(old, leaf->entry[n], access);
}
