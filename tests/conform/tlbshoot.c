/*
 * Stale translations: after INVLPG, INVPCID, loads of CR3 (with PCIDs and without, flushing or not), CR4.PGE and other control bits, the next access must see the page
 * tables as they are; large pages split and joined; accessed and dirty bits; shootdowns between two processors, whose old pages are poisoned as soon as the other
 * one has answered. Where the manual allows stale entries to be used, nothing is checked. SDM vol. 3, 4.8 and 4.10. Run with two processors.
 */
#include "runtime/probe.h"
#include "runtime/processors.h"

#define AREA 0xa000000000ull
#define GLOBAL_AREA 0xffffc00000000000ull
#define FRAMES 32u
#define ID_AT 64u /* each frame: a function that returns its number, and the number */
#define EFER 0xc0000080
#define EFER_NXE (1u << 11)

static uint8_t *frames;
static uint64_t root; /* CR3 of boot_pml4 */

static uint64_t frame(unsigned n)
{
    return (uintptr_t)frames + n * PAGE;
}

static void frame_fill(uint8_t *p, uint64_t n)
{
    p[0] = 0xb8; /* mov eax, n; ret */
    memcpy(p + 1, &n, 4);
    p[5] = 0xc3;
    *(uint64_t *)(p + ID_AT) = n;
}

static uint64_t read_id(uint64_t va)
{
    return *(volatile uint64_t *)(va + ID_AT);
}
static uint64_t run_id(uint64_t va)
{
    uint64_t value;
    asm_volatile("call *%1" : "=a"(value) : "r"(va) : "memory");
    return value;
}
static void store(uint64_t va)
{
    ((volatile uint8_t *)va)[128]++;
}
static void invpcid(uint64_t type, uint64_t pcid, uint64_t va)
{
    struct {
        uint64_t pcid, va;
    } descriptor = {pcid, va};
    asm_volatile("invpcid %0, %1" ::"m"(descriptor), "r"(type) : "memory");
}
static uint64_t *entry_of(uint64_t va)
{
    return page_entry(boot_pml4, va);
}

/* ---- one page ---- */

static void test_downgrades(void)
{
    unsigned good = 0, rounds = 300;
    for (unsigned n = 0; n < rounds; n++) {
        uint64_t va = AREA + n % 7 * PAGE, *e = entry_of(va);
        page_map(va, frame(0) | PG_P | PG_W);
        store(va);
        run_id(va);
        *e &= ~PG_W;
        invlpg((void *)va);
        good += TRY(store(va)) == PF && trap.error == (PF_P | PF_W) && read_id(va) == 0;
        *e |= PG_NX;
        invlpg((void *)va);
        good += TRY(run_id(va)) == PF && trap.error == (PF_P | PF_I) && read_id(va) == 0;
        *e = 0;
        invlpg((void *)va);
        good += TRY(read_id(va)) == PF && trap.error == 0;
        *e = frame(1) | PG_P; /* what was not present needs no invalidation */
        good += TRY(good += read_id(va) == 1) == NO_TRAP;
        /* Rights that were given may be seen late, but not after the fault that their absence gave. */
        *e |= PG_W;
        if (TRY(store(va)) == PF)
            good += TRY(store(va)) == NO_TRAP;
        else
            good += trap.vector == NO_TRAP;
    }
    expect_eq(good, 6 * rounds, "less rights after INVLPG, more rights after a fault at the latest");
}

static void test_controls(void)
{
    unsigned good = 0, rounds = 100;
    reg_t cr0 = read_cr0(), cr4 = read_cr4();
    bool smap = cpuid(7, 0).b & 1u << 20;
    uint64_t va = AREA + 64 * PAGE, keep = boot_pml4[0], *pdpt = (uint64_t *)(keep & PG_ADDRESS), keep_pd[4];
    memcpy(keep_pd, pdpt, sizeof keep_pd);
    for (unsigned n = 0; n < 4; n++) /* the program's own pages: not ring 3's */
        pdpt[n] &= ~PG_U;
    write_cr3(root);
    page_map(va, frame(2) | PG_P | PG_U);
    for (unsigned n = 0; n < rounds; n++) {
        good += TRY(store(va)) == PF;
        write_cr0(cr0 & ~CR0_WP);
        good += TRY(store(va)) == NO_TRAP;
        write_cr0(cr0);
        good += TRY(store(va)) == PF;
        if (smap) {
            write_cr4(cr4 | CR4_SMAP);
            good += TRY((void)read_id(va)) == PF;
            good += TRY(asm_volatile("stac"); (void)read_id(va); asm_volatile("clac")) == NO_TRAP;
            good += TRY((void)read_id(va)) == PF;
            write_cr4(cr4 | CR4_SMEP);
            good += TRY((void)read_id(va)) == NO_TRAP;
            good += TRY(run_id(va)) == PF;
            write_cr4(cr4);
        }
        good += TRY(run_id(va)) == NO_TRAP;
    }
    memcpy(pdpt, keep_pd, sizeof keep_pd);
    write_cr3(root);
    expect_eq(good, rounds * (smap ? 9 : 4), "WP, SMAP, AC and SMEP count at once");
}

/* ---- accessed and dirty ---- */

static void test_accessed_dirty(void)
{
    enum { PAGES = 48 };
    bool dirty[PAGES] = {false};
    unsigned wrong_dirty = 0, wrong_accessed = 0;
    uint64_t base = AREA + 0x400000;
    for (unsigned n = 0; n < PAGES; n++)
        page_map(base + n * PAGE, frame(n % FRAMES) | PG_P | PG_W);
    for (unsigned n = 0; n < 20000; n++) {
        unsigned k = random_below(PAGES);
        uint64_t va = base + k * PAGE, *e = entry_of(va), old, one = 1;
        bool touched = true;
        switch (random_below(14)) {
        case 0:
        case 1:
            *e &= ~(random_below(2) ? PG_A | PG_D : PG_D);
            invlpg((void *)va);
            dirty[k] = touched = false;
            break;
        case 2:
            store(va);
            dirty[k] = true;
            break;
        case 3: /* fails, and writes all the same */
            old = 7;
            asm_volatile("lock cmpxchg %2, (%1)" : "+a"(old) : "r"(va + 256), "r"(one) : "memory", "cc");
            dirty[k] = true;
            break;
        case 4:
            asm_volatile("lock orl $0, 200(%0)" ::"r"(va) : "memory", "cc");
            dirty[k] = true;
            break;
        case 5:
            asm_volatile("mov %%rsp, %%rcx; lea 512(%0), %%rsp; push %%rcx; mov %%rcx, %%rsp" ::"r"(va) : "rcx", "memory");
            dirty[k] = true;
            break;
        case 6:
            memcpy((uint8_t *)va + 600, (uint8_t *)base + (k + 1) % PAGES * PAGE + 600, 16);
            dirty[k] = true;
            break;
        case 7:
            asm_volatile("movups %%xmm0, 700(%0)" ::"r"(va) : "memory");
            dirty[k] = true;
            break;
        case 8:
            run_id(va);
            break;
        case 9:
            asm_volatile("movups 700(%0), %%xmm0" ::"r"(va) : "memory");
            break;
        case 10:
            asm_volatile("cmpl $0, 200(%0); testb $1, 3(%0)" ::"r"(va) : "cc", "memory");
            break;
        case 11:
            memcpy(frames + FRAMES * PAGE, (uint8_t *)va + 600, 16);
            break;
        default:
            read_id(va);
        }
        wrong_dirty += ((*e & PG_D) != 0) != dirty[k];
        wrong_accessed += touched && !(*e & PG_A);
    }
    check(!wrong_dirty, "D is set by the write, and by nothing else (%u wrong)", wrong_dirty);
    check(!wrong_accessed, "A is set by every access (%u wrong)", wrong_accessed);
}

/* ---- large pages ---- */

static void test_large(void)
{
    static const uint64_t base = AREA + 0x40000000;
    uint8_t *two_mib = (uint8_t *)0xa000000; /* RAM that nobody uses, a multiple of 2 MiB */
    uint64_t *pd = (uint64_t *)(page_entry(boot_pml4, base) - (base >> 12 & 511)); /* a page table, to begin with */
    uint64_t *table = pd, *pdpt = (uint64_t *)(boot_pml4[base >> 39 & 511] & PG_ADDRESS);
    pd = (uint64_t *)(pdpt[base >> 30 & 511] & PG_ADDRESS);
    uint64_t small = pd[0], large = (uintptr_t)two_mib | PG_P | PG_W | PG_LARGE;
    for (unsigned n = 0; n < 512; n++)
        frame_fill(two_mib + n * PAGE, n + 5000);
    unsigned good = 0, rounds = 200, dirty = 0;
    for (unsigned n = 0; n < rounds; n++) {
        pd[0] = large; /* joined: every piece is invalidated */
        if (n % 4)
            write_cr3(root);
        else
            for (unsigned k = 0; k < 512; k++)
                invlpg((void *)(base + k * PAGE));
        for (unsigned k = 0; k < 8; k++) {
            unsigned page = random_below(512);
            good += read_id(base + page * PAGE) == page + 5000 && run_id(base + page * PAGE) == page + 5000;
        }
        dirty += pd[0] & PG_D ? 1 : 0;
        store(base + random_below(512) * PAGE);
        dirty += pd[0] & PG_D ? 0 : 1;
        for (unsigned k = 0; k < 512; k++)
            table[k] = frame((k + n) % FRAMES) | PG_P | PG_W;
        pd[0] = small; /* split: one INVLPG anywhere in it is enough */
        invlpg((void *)(base + random_below(0x200000)));
        for (unsigned k = 0; k < 8; k++) {
            unsigned page = random_below(512);
            good += read_id(base + page * PAGE) == (page + n) % FRAMES && run_id(base + page * PAGE) == (page + n) % FRAMES;
        }
    }
    expect_eq(good, rounds * 16, "2 MiB pages split and joined");
    expect_eq(dirty, 0, "their D bit");
    if (!(cpuid(0x80000001, 0).d & 1u << 26)) {
        skip("1 GiB pages", "not offered");
        return;
    }
    uint64_t keep = pdpt[base >> 30 & 511];
    good = 0;
    for (unsigned n = 0; n < 100; n++) {
        pdpt[base >> 30 & 511] = PG_P | PG_W | PG_LARGE; /* from physical 0 */
        write_cr3(root);
        unsigned page = random_below(512);
        good += read_id(base + (uintptr_t)two_mib + page * PAGE) == page + 5000 && run_id(base + (uintptr_t)two_mib + page * PAGE) == page + 5000;
        pdpt[base >> 30 & 511] = keep;
        invlpg((void *)(base + random64() % 0x40000000));
        good += read_id(base + page * PAGE) == (page + rounds - 1) % FRAMES && TRY((void)read_id(base + (uintptr_t)two_mib)) == PF;
    }
    expect_eq(good, 200, "1 GiB pages split and joined");
}

/* ---- address spaces: every legal way of invalidating, at random ---- */

#define SPACES 5u
#define PAGES 10u

static struct space {
    uint64_t *pml4;
    uint8_t now[PAGES];  /* frame */
    bool stale[PAGES];   /* changed and not invalidated since */
} spaces[SPACES];
static uint8_t global_now[PAGES];
static bool global_stale[PAGES];
static unsigned space_now;
static bool pcids, invpcids;

static uint64_t space_cr3(unsigned n)
{
    return (uintptr_t)spaces[n].pml4 | (pcids ? n * 3 + 1 : 0);
}

static void forget(struct space *s)
{
    memset(s->stale, 0, sizeof s->stale);
}

static void forget_all(bool global_too)
{
    for (unsigned n = 0; n < SPACES; n++)
        forget(&spaces[n]);
    if (global_too)
        memset(global_stale, 0, sizeof global_stale);
}

static void spaces_make(void)
{
    memset(spaces, 0, sizeof spaces);
    for (unsigned n = 0; n < PAGES; n++) {
        page_map(GLOBAL_AREA + n * PAGE, frame(n) | PG_P | PG_W | PG_G);
        global_now[n] = (uint8_t)n;
    }
    for (unsigned k = 0; k < SPACES; k++) {
        struct space *s = &spaces[k];
        s->pml4 = pages_allocate(1);
        memcpy(s->pml4, boot_pml4, PAGE);
        s->pml4[AREA >> 39 & 511] = 0;
        for (unsigned n = 0; n < PAGES; n++) {
            s->now[n] = (uint8_t)random_below(FRAMES);
            *page_entry(s->pml4, AREA + n * PAGE) = frame(s->now[n]) | PG_P | PG_W;
        }
    }
}

static void invalidate(void)
{
    struct space *s = &spaces[space_now];
    unsigned n = random_below(PAGES), k = random_below(SPACES);
    reg_t cr4 = read_cr4();
    switch (random_below(invpcids ? 8 : 4)) {
    case 0: /* all of this space, by its CR3 */
        write_cr3(space_cr3(space_now));
        forget(s);
        break;
    case 1:
        write_cr4(cr4 & ~CR4_PGE);
        write_cr4(cr4);
        forget_all(true);
        break;
    case 2:
        invlpg((void *)(AREA + n * PAGE));
        s->stale[n] = false;
        break;
    case 3:
        invlpg((void *)(GLOBAL_AREA + n * PAGE));
        global_stale[n] = false;
        break;
    case 4:
        invpcid(0, space_cr3(k) & 0xfff, AREA + n * PAGE);
        if (pcids || k == space_now)
            spaces[k].stale[n] = false;
        break;
    case 5:
        invpcid(1, space_cr3(k) & 0xfff, 0);
        if (pcids || k == space_now)
            forget(&spaces[k]);
        break;
    case 6:
        invpcid(2, 0, 0);
        forget_all(true);
        break;
    default:
        invpcid(3, 0, 0);
        forget_all(false);
    }
}

static bool page_good(uint64_t va, unsigned want)
{
    switch (random_below(3)) {
    case 0:
        return read_id(va) == want;
    case 1:
        return run_id(va) == want;
    default:
        store(va);
        return ((volatile uint8_t *)frame(want))[128] == ((volatile uint8_t *)va)[128] && read_id(va) == want;
    }
}

static void test_spaces(const char *name)
{
    unsigned good = 0, count = 0;
    spaces_make();
    space_now = 0;
    write_cr3(space_cr3(0));
    forget_all(true);
    for (unsigned step = 0; step < 12000; step++) {
        struct space *s = &spaces[space_now];
        unsigned n = random_below(PAGES), k = random_below(SPACES);
        switch (random_below(8)) {
        case 0: /* to another one */
            if (pcids && random_below(2)) {
                write_cr3(space_cr3(k) | 1ull << 63);
            } else {
                write_cr3(space_cr3(k));
                forget(&spaces[k]);
                if (!pcids)
                    forget_all(false);
            }
            space_now = k;
            break;
        case 1: /* a page of any of them is changed */
            spaces[k].now[n] = (uint8_t)random_below(FRAMES);
            *page_entry(spaces[k].pml4, AREA + n * PAGE) = frame(spaces[k].now[n]) | PG_P | PG_W;
            spaces[k].stale[n] = true;
            break;
        case 2:
            if (random_below(4) == 0) {
                global_now[n] = (uint8_t)random_below(FRAMES);
                *page_entry(boot_pml4, GLOBAL_AREA + n * PAGE) = frame(global_now[n]) | PG_P | PG_W | PG_G;
                global_stale[n] = true;
            }
            break;
        case 3:
            invalidate();
            break;
        default:
            if (!s->stale[n]) {
                good += page_good(AREA + n * PAGE, s->now[n]);
                count++;
            }
            if (!global_stale[n]) {
                good += page_good(GLOBAL_AREA + n * PAGE, global_now[n]);
                count++;
            }
        }
    }
    write_cr3(root);
    check(good == count && count > 3000, "%s (%u of %u)", name, good, count);
}

/* ---- two processors ---- */

#define SHARED_PAGES 6u
#define SHARED (AREA + 0x20000000)
#define POISON 0xdead0000u
static volatile unsigned acknowledged, flush_page, poison_seen, other_rounds;
static volatile bool other_stop;

static void on_shootdown(struct frame *f)
{
    if (flush_page < SHARED_PAGES)
        invlpg((void *)(SHARED + flush_page * PAGE));
    else
        write_cr3(read_cr3());
    acknowledged++;
    lapic_write(0xb0, 0);
}

/* Reads, writes and executes the shared pages all the time. */
static void use_pages(unsigned number)
{
    sti();
    while (!other_stop) {
        for (unsigned n = 0; n < SHARED_PAGES; n++) {
            uint64_t va = SHARED + n * PAGE;
            poison_seen += read_id(va) >= POISON;
            asm_volatile("lock incl 1024(%0)" ::"r"(va) : "memory", "cc");
            poison_seen += run_id(va) >= POISON;
            ((volatile uint32_t *)va)[300]++;
        }
        other_rounds++;
    }
    cli();
}

static bool shoot(unsigned page)
{
    unsigned want = acknowledged + 1;
    flush_page = page;
    invlpg((void *)(SHARED + page % SHARED_PAGES * PAGE));
    processor_send(1, 0x4000 | 0x63);
    return wait_for(&acknowledged, want, 2000);
}

static void test_shootdown(void)
{
    uint8_t *pages = pages_allocate(2 * SHARED_PAGES);
    uint64_t after[SHARED_PAGES] = {0};
    unsigned at[SHARED_PAGES] = {0}, answered = 0, written_later = 0, not_dirty = 0, n, lost = 0;
    trap_handlers[0x63] = on_shootdown;
    for (n = 0; n < 2 * SHARED_PAGES; n++)
        frame_fill(pages + n * PAGE, n);
    for (n = 0; n < SHARED_PAGES; n++)
        page_map(SHARED + n * PAGE, (uintptr_t)(pages + n * PAGE) | PG_P | PG_W);
    processor_begin(1, use_pages);
    for (n = 0; n < 400; n++) {
        unsigned k = random_below(SHARED_PAGES), other = at[k] ^ 1;
        uint8_t *old = pages + (at[k] * SHARED_PAGES + k) * PAGE, *new = pages + (other * SHARED_PAGES + k) * PAGE;
        /* Nobody has written the page that was taken away last time. */
        written_later += after[k] && (*(volatile uint32_t *)(new + 1024) + ((uint64_t) * (volatile uint32_t *)(new + 1200) << 32)) + 1 != after[k];
        frame_fill(new, n);
        uint64_t *e = entry_of(SHARED + k * PAGE), entry = (uintptr_t)new | PG_P | PG_W;
        asm_volatile("xchg %0, (%1)" : "+r"(entry) : "r"(e) : "memory");
        if (!shoot(random_below(4) ? k : SHARED_PAGES))
            break;
        answered++;
        frame_fill(old, POISON + n);
        after[k] = *(volatile uint32_t *)(old + 1024) + ((uint64_t) * (volatile uint32_t *)(old + 1200) << 32) + 1;
        at[k] = other;
        if (n % 4 == 0) { /* D is taken away: the next write brings it back */
            asm_volatile("lock andq %0, (%1)" ::"r"(~PG_D), "r"(e) : "memory", "cc");
            if (!shoot(k))
                break;
            unsigned rounds = other_rounds;
            wait_for(&other_rounds, rounds + 2, 2000);
            not_dirty += !(*e & PG_D);
        }
    }
    /* Its walks set A and D while the entry's free bits change: neither gets lost. */
    uint64_t *e = entry_of(SHARED);
    for (unsigned k = 1; k <= 1000; k++) {
        asm_volatile("lock andq %0, (%1)" ::"r"(~(PG_A | PG_D)), "r"(e) : "memory", "cc");
        asm_volatile("lock addq %0, (%1)" ::"r"(1ull << 52), "r"(e) : "memory", "cc");
        lost += (*e >> 52 & 0x3ff) != k;
        if (k % 4 == 0 && !shoot(0))
            break;
    }
    other_stop = true;
    check(processor_wait(1, 5000) && answered == 400, "400 shootdowns are answered (%u)", answered);
    check(!poison_seen, "no read and no call reaches a page that was taken away (%u)", poison_seen);
    check(!written_later, "no write either (%u)", written_later);
    check(!not_dirty, "D is set again after it was taken away (%u)", not_dirty);
    check(!lost, "A and D are set without losing what others change in the entry (%u)", lost);
    print("# %u rounds of the other processor\n", other_rounds);
}

void test_main(void)
{
    random_seed();
    root = read_cr3();
    frames = pages_allocate(FRAMES + 1);
    for (unsigned n = 0; n < FRAMES; n++)
        frame_fill((uint8_t *)frame(n), n);
    test_downgrades();
    test_controls();
    test_accessed_dirty();
    test_large();
    test_spaces("five address spaces, INVLPG, CR3 and CR4.PGE");
    pcids = cpuid(1, 0).c & 1u << 17;
    invpcids = cpuid(7, 0).b & 1u << 10;
    if (pcids) {
        write_cr4(read_cr4() | CR4_PCIDE);
        test_spaces("with PCIDs and INVPCID");
        write_cr4(read_cr4() & ~CR4_PCIDE);
        pcids = false;
    } else {
        skip("with PCIDs", "not offered");
    }
    if (processors_start(2) < 2)
        skip("shootdowns", "one processor");
    else
        test_shootdown();
}
