/* The translator's views, read exactly as translated code reads them. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <string.h>
#include <time.h>

#include "arch/host.h"
#include "arch/paging.h"
#include "engine/bt/bt_priv.h"
#include "probe.h"

#define P 1ull
#define RW 2ull
#define US 4ull
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define G 0x100ull
#define USED (P | RW | A | D)

#define RAM_BYTES (14ull << 20) /* each page has a DT page, and one is left over */
#define ROOT 0x1000ull
#define ROOT_2 0x2000ull
#define TABLES 0x100000ull /* page tables are taken from here on, up to DATA */
#define DATA 0x800000ull   /* pages with a pattern */
#define ROM 0x600000ull
#define KERNEL 0xffff888000000000ull
#define USER 0x00007f1234500000ull
#define MMIO 0xfe000000ull

struct fixture {
    struct physmap *memory;
    struct bt_engine engine;
    struct bt_vcpu *b;
    gpa_t next_table;
};

static uint32_t *dt_at(const struct bt_engine *e, uint64_t n)
{
    return (uint32_t *)(e->layout.dt_pool + n * BT_DT_BYTES);
}

/* For the cache: it has translations of all code pages, in any mode, in the dispatch table after the page's number. */
const uint32_t *cache_dt(const struct bt_engine *e, uint64_t ram_offset, const struct bt_mode *mode)
{
    return e->code_flags[ram_offset >> 12] ? dt_at(e, 1 + (ram_offset >> 12)) : NULL;
}

static uint8_t pattern(gpa_t gpa)
{
    return (uint8_t)(gpa * 0x9e3779b97f4a7c15ull >> 56);
}

static int setup(void **state)
{
    struct fixture *f = test_calloc(1, sizeof(*f));
    assert_int_equal(physmap_create(&f->memory, RAM_BYTES, NULL), 0);
    uint8_t *ram = physmap_get(f->memory, ROM, RAM_BYTES - ROM, PHYSMAP_WRITE);
    for (uint64_t n = 0; n < RAM_BYTES - ROM; n++)
        ram[n] = pattern(ROM + n);
    assert_int_equal(physmap_set_rom(f->memory, ROM, 0x4000), 0);
    f->engine.interp.memory = f->memory;
    f->engine.code_flags = test_calloc(RAM_BYTES / PAGE_SIZE_BYTES, 1);
    f->next_table = TABLES;
    assert_int_equal(layout_create(&f->engine.layout, f->memory, 1 << 20, NULL), 0);
    assert_int_equal(tables_create(&f->engine, &f->b, NULL), 0);
    struct icpu *c = &f->b->c;
    c->v.memory = f->memory;
    c->max_phys_bits = 46;
    c->view = VIEW_SUPERVISOR;
    c->v.cpu.cr0 = CR0_PE | CR0_PG | CR0_WP;
    c->v.cpu.cr3 = ROOT;
    c->v.cpu.cr4 = CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP;
    c->v.cpu.efer = EFER_LME | EFER_LMA | EFER_NXE;
    f->b->mode.code_bits = 64;
    c->code_bits = 64;
    tables_select(f->b);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    tables_destroy(f->b);
    layout_destroy(&f->engine.layout);
    physmap_destroy(f->memory);
    test_free(f->engine.code_flags);
    test_free(f);
    return 0;
}

/* ---- page tables ---- */

static uint64_t *entry_at(struct fixture *f, gpa_t table, gva_t gva, unsigned level)
{
    return physmap_get(f->memory, table + (gva >> (12 + 9 * (level - 1)) & 511) * 8, 8, PHYSMAP_WRITE);
}

/* The entry for gva at the level, with the tables above made on demand. */
static uint64_t *leaf_of(struct fixture *f, gpa_t root, gva_t gva, unsigned leaf_level)
{
    gpa_t table = root;
    for (unsigned level = 4; level > leaf_level; level--) {
        uint64_t *entry = entry_at(f, table, gva, level);
        if (!(*entry & P)) {
            *entry = f->next_table | P | RW | US;
            f->next_table += PAGE_SIZE_BYTES;
            assert_true(f->next_table <= ROM);
        }
        table = *entry & 0xffffffffff000ull;
    }
    return entry_at(f, table, gva, leaf_level);
}

static void map(struct fixture *f, gva_t gva, uint64_t entry)
{
    *leaf_of(f, ROOT, gva, 1) = entry;
}

static void as(struct fixture *f, enum tlb_view view)
{
    f->b->c.view = view;
    f->b->mode.user = view == VIEW_USER;
    tables_select(f->b);
}

/* ---- what translated code does ---- */

struct access {
    uint64_t gva, value;
    uint8_t byte;
};

static void read_code(void *opaque)
{
    struct access *a = opaque;
    uint64_t t;
    __asm__ volatile("rorx $12, %[gva], %[t]\n\t"
                     "movl %k[t], %k[t]\n\t"
                     "movq %%gs:(,%k[t],8), %[t]\n\t"
                     "movb (%[gva],%[t]), %[byte]"
                     : [t] "=&r"(t), [byte] "=&q"(a->byte)
                     : [gva] "r"(a->gva)
                     : "memory");
}

static void write_code(void *opaque)
{
    struct access *a = opaque;
    uint64_t t;
    __asm__ volatile("rorx $12, %[gva], %[t]\n\t"
                     "movq %%gs:(,%k[t],8), %[t]\n\t"
                     "movb %[byte], (%[gva],%[t])"
                     : [t] "=&r"(t)
                     : [gva] "r"(a->gva), [byte] "q"(a->byte)
                     : "memory");
}

static void jump_code(void *opaque)
{
    struct access *a = opaque;
    uint64_t t;
    __asm__ volatile("pextq %%gs:%c[mask], %[gva], %[t]\n\t"
                     "movq %%gs:%c[table](,%[t],8), %[t]\n\t"
                     "movl (%[t],%[gva],4), %k[t]"
                     : [t] "=&r"(t)
                     : [gva] "r"(a->gva), [mask] "i"(BT_CTX(exec_mask)), [table] "i"((int32_t)BT_EXEC_TABLE_OFFSET)
                     : "memory");
    a->value = t;
}

/* True when the access succeeded. Uncommitted chunks are committed on the way, as the fault handler does. */
static bool try(struct fixture *f, void (*code)(void *), struct access *a, bool exec)
{
    for (;;) {
        uintptr_t address;
        if (probe_run(code, a, &address))
            return true;
        if (!tables_commit(f->b, address, a->gva, exec))
            return false;
    }
}

static int read_at(struct fixture *f, gva_t gva) /* the byte or -1 */
{
    struct access a = {.gva = gva};
    return try(f, read_code, &a, false) ? a.byte : -1;
}
static bool write_at(struct fixture *f, gva_t gva, uint8_t byte)
{
    struct access a = {.gva = gva, .byte = byte};
    return try(f, write_code, &a, false);
}
static int64_t jump_to(struct fixture *f, gva_t gva) /* the dispatch slot or -1 */
{
    struct access a = {.gva = gva};
    return try(f, jump_code, &a, true) ? (int64_t)a.value : -1;
}

/* ---- data ---- */

static void an_empty_table_faults_everywhere(void **state)
{
    struct fixture *f = *state;
    static const unsigned constant = 1;
    static const gva_t gvas[] = {0, 1, 0xfff, USER, KERNEL, ~0ull, 1ull << 47, 1ull << 63, 0x1ffffffffff, 0xffffffffff600000ull, 0x0123456789abcdefull};
    for (unsigned n = 0; n < sizeof(gvas) / sizeof(gvas[0]); n++)
        assert_int_equal(read_at(f, gvas[n]), -1);
    /* What this process has there itself is not to be seen, either. */
    const void *own[] = {&constant, &f, f, f->b, f->engine.layout.tc_exec, f->engine.layout.window_r, f->b->table, (const void *)(uintptr_t)an_empty_table_faults_everywhere};
    for (unsigned n = 0; n < sizeof(own) / sizeof(own[0]); n++)
        assert_int_equal(read_at(f, (uintptr_t)own[n]), -1);
    assert_true(tables_bytes(f->b) > 0);
}

static void fills_hit_the_right_byte(void **state)
{
    struct fixture *f = *state;
    map(f, KERNEL + 0x5000, DATA | USED);
    assert_int_equal(read_at(f, KERNEL + 0x5123), -1);
    assert_int_equal(tables_fill(f->b, KERNEL + 0x5123, 4, false), BT_FILL_DONE);
    for (unsigned n = 0; n < PAGE_SIZE_BYTES; n += 7)
        assert_int_equal(read_at(f, KERNEL + 0x5000 + n), pattern(DATA + n));
    assert_true(write_at(f, KERNEL + 0x5001, 0x77));
    assert_int_equal(*(uint8_t *)physmap_get(f->memory, DATA + 1, 1, PHYSMAP_READ), 0x77);
    /* The same slot under other tags, canonical and not; neighbours. */
    for (unsigned bit = BT_ALIAS_BITS; bit < 64; bit++)
        assert_int_equal(read_at(f, (KERNEL + 0x5123) ^ 1ull << bit), -1);
    assert_int_equal(read_at(f, KERNEL + 0x4fff), -1);
    assert_int_equal(read_at(f, KERNEL + 0x6000), -1);
}

static void what_is_not_plain_memory_is_slow(void **state)
{
    struct fixture *f = *state;
    map(f, KERNEL, MMIO | USED);
    map(f, KERNEL + 0x1000, DATA | USED);
    assert_int_equal(tables_fill(f->b, KERNEL, 4, false), BT_FILL_SLOW);
    assert_int_equal(tables_fill(f->b, KERNEL + 0x2000, 4, false), BT_FILL_SLOW);        /* not present */
    assert_int_equal(tables_fill(f->b, KERNEL + 0x1ffd, 4, false), BT_FILL_SLOW);        /* crosses */
    assert_int_equal(tables_fill(f->b, KERNEL + 0x1ffc, 4, false), BT_FILL_DONE);
    assert_int_equal(tables_fill(f->b, KERNEL ^ 1ull << 62, 4, false), BT_FILL_SLOW);    /* not canonical */
    assert_int_equal(read_at(f, KERNEL), -1);
}

static void rights_and_dirty_bits(void **state)
{
    struct fixture *f = *state;
    map(f, KERNEL, DATA | P | RW);
    map(f, KERNEL + 0x20000, (DATA + 0x1000) | P | A | D);
    assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_DONE);
    assert_int_equal(*leaf_of(f, ROOT, KERNEL, 1) & (A | D), A);
    assert_int_equal(read_at(f, KERNEL), pattern(DATA));
    assert_false(physmap_take_dirty(f->memory, DATA));
    assert_false(write_at(f, KERNEL, 1)); /* the dirty bit first */
    assert_int_equal(tables_fill(f->b, KERNEL, 1, true), BT_FILL_DONE);
    assert_int_equal(*leaf_of(f, ROOT, KERNEL, 1) & (A | D), A | D);
    assert_true(physmap_take_dirty(f->memory, DATA));
    assert_true(write_at(f, KERNEL, 1));
    /* Write-protected, with and without CR0.WP. */
    assert_int_equal(tables_fill(f->b, KERNEL + 0x20000, 1, true), BT_FILL_SLOW);
    assert_int_equal(tables_fill(f->b, KERNEL + 0x20000, 1, false), BT_FILL_DONE);
    assert_false(write_at(f, KERNEL + 0x20000, 1));
    f->b->c.v.cpu.cr0 &= ~CR0_WP;
    tables_flush_all(&f->b->c);
    tables_select(f->b);
    assert_int_equal(tables_fill(f->b, KERNEL + 0x20000, 1, false), BT_FILL_DONE);
    assert_true(write_at(f, KERNEL + 0x20000, 1));
}

static void neighbours_that_were_used_come_along(void **state)
{
    struct fixture *f = *state;
    for (unsigned n = 0; n < 32; n++)
        map(f, KERNEL + n * PAGE_SIZE_BYTES, (DATA + n * PAGE_SIZE_BYTES) | P | RW | (n % 3 ? A : 0) | (n % 2 ? D : 0));
    map(f, KERNEL + 7 * PAGE_SIZE_BYTES, MMIO | USED);
    assert_int_equal(tables_fill(f->b, KERNEL + 0x4000, 1, false), BT_FILL_DONE);
    for (unsigned n = 0; n < 32; n++) {
        bool there = n < 16 && n % 3 && n != 7;
        gva_t gva = KERNEL + n * PAGE_SIZE_BYTES + n;
        assert_int_equal(read_at(f, gva), there ? pattern(DATA + n * PAGE_SIZE_BYTES + n) : -1);
        assert_int_equal(write_at(f, gva, 0), there && n % 2);
        assert_int_equal(physmap_take_dirty(f->memory, DATA + n * PAGE_SIZE_BYTES), there && n % 2);
    }
}

static void rom_and_code_pages(void **state)
{
    struct fixture *f = *state;
    map(f, KERNEL, ROM | USED);
    map(f, KERNEL + 0x1000, DATA | USED);
    f->engine.code_flags[DATA >> 12] = BT_CODE_PRESENT;
    assert_int_equal(tables_fill(f->b, KERNEL, 1, true), BT_FILL_SLOW);
    assert_int_equal(tables_fill(f->b, KERNEL + 0x1000, 1, true), BT_FILL_SLOW);
    assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_DONE);
    assert_int_equal(read_at(f, KERNEL), pattern(ROM));
    assert_int_equal(read_at(f, KERNEL + 0x1000), pattern(DATA)); /* its neighbour */
    assert_false(write_at(f, KERNEL, 1));
    assert_false(write_at(f, KERNEL + 0x1000, 1));
    f->engine.code_flags[DATA >> 12] = 0;
    assert_int_equal(tables_fill(f->b, KERNEL + 0x1000, 1, true), BT_FILL_DONE);
    assert_true(write_at(f, KERNEL + 0x1000, 1));
}

static void large_pages_are_filled_whole(void **state)
{
    struct fixture *f = *state;
    f->engine.code_flags[(DATA >> 12) + 5] = BT_CODE_PRESENT;
    *leaf_of(f, ROOT, KERNEL, 2) = DATA | USED | PS;
    *leaf_of(f, ROOT, KERNEL + (6ull << 20), 2) = (RAM_BYTES - (2 << 20)) | USED | PS;
    *leaf_of(f, ROOT, KERNEL + (2ull << 30), 3) = 0 | USED | PS; /* 1 GiB from 0 on: mostly not RAM */
    assert_int_equal(tables_fill(f->b, KERNEL + 0x1234, 1, false), BT_FILL_DONE);
    for (unsigned n = 0; n < 512; n++) {
        assert_int_equal(read_at(f, KERNEL + n * PAGE_SIZE_BYTES + n), pattern(DATA + n * PAGE_SIZE_BYTES + n));
        assert_int_equal(write_at(f, KERNEL + n * PAGE_SIZE_BYTES, pattern(DATA + n * PAGE_SIZE_BYTES)), n != 5);
    }
    assert_int_equal(read_at(f, KERNEL + (2 << 20)), -1);
    assert_int_equal(tables_fill(f->b, KERNEL + (6ull << 20), 1, true), BT_FILL_DONE);
    gva_t huge = KERNEL + (2ull << 30);
    assert_int_equal(tables_fill(f->b, huge + DATA, 1, true), BT_FILL_DONE);
    assert_int_equal(tables_fill(f->b, huge + ROM + 0x5000, 1, true), BT_FILL_DONE); /* the 2 MiB around have ROM: alone */
    assert_int_equal(read_at(f, huge + ROM + 0x6000), -1);
    assert_int_equal(tables_fill(f->b, huge + RAM_BYTES, 1, true), BT_FILL_SLOW);
    assert_int_equal(read_at(f, huge + RAM_BYTES), -1);
    assert_true(write_at(f, huge + DATA + (1 << 20), 9));
    /* INVLPG anywhere in it drops it. */
    tables_flush_page(&f->b->c, KERNEL + 0x100000);
    assert_int_equal(read_at(f, KERNEL), -1);
    tables_flush_page(&f->b->c, huge + (900ull << 20));
    assert_int_equal(read_at(f, huge + DATA), -1);
    assert_int_equal(read_at(f, huge + ROM + 0x5000), -1);
}

/* Where marks tell something, only what is written to is marked; before, whatever may be. */
static void only_what_is_written_is_marked(void **state)
{
    struct fixture *f = *state;
    enum { WRITTEN = 3, SMALL = 2 << 20 };
    *leaf_of(f, ROOT, KERNEL, 2) = DATA | USED | PS;
    map(f, KERNEL + SMALL, (DATA + SMALL) | USED);
    map(f, KERNEL + SMALL + PAGE_SIZE_BYTES, (DATA + SMALL + PAGE_SIZE_BYTES) | USED);
    physmap_need_marks(f->memory);
    for (unsigned pass = 0; pass < 3; pass++) {
        bool written = pass == 1;
        assert_int_equal(tables_fill(f->b, KERNEL + WRITTEN * PAGE_SIZE_BYTES, 1, written), BT_FILL_DONE);
        assert_int_equal(tables_fill(f->b, KERNEL + SMALL, 1, written), BT_FILL_DONE);
        for (unsigned n = 0; n < 512; n++) {
            assert_int_equal(read_at(f, KERNEL + n * PAGE_SIZE_BYTES), pattern(DATA + n * PAGE_SIZE_BYTES));
            assert_int_equal(write_at(f, KERNEL + n * PAGE_SIZE_BYTES, pattern(DATA + n * PAGE_SIZE_BYTES)), pass && n == WRITTEN); /* in the last pass a read is enough: it is marked */
        }
        assert_int_equal(write_at(f, KERNEL + SMALL, 1), pass > 0);
        assert_false(write_at(f, KERNEL + SMALL + PAGE_SIZE_BYTES, 1));
        tables_flush_all(&f->b->c);
        tables_select(f->b);
    }
    for (unsigned n = 0; n < 512; n++)
        assert_int_equal(physmap_take_dirty(f->memory, DATA + n * PAGE_SIZE_BYTES), n == WRITTEN);
    assert_true(physmap_take_dirty(f->memory, DATA + SMALL));
    assert_false(physmap_take_dirty(f->memory, DATA + SMALL + PAGE_SIZE_BYTES));
    assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_DONE);
    assert_false(write_at(f, KERNEL + WRITTEN * PAGE_SIZE_BYTES, 1));
}

static void without_paging(void **state)
{
    struct fixture *f = *state;
    struct cpu_state *cpu = &f->b->c.v.cpu;
    cpu->cr0 = CR0_PE;
    cpu->efer = cpu->cr4 = 0;
    tables_flush_all(&f->b->c);
    tables_select(f->b);
    assert_int_equal(tables_fill(f->b, DATA + 5, 1, true), BT_FILL_DONE);
    assert_int_equal(read_at(f, DATA + 0x1fffff), pattern(DATA + 0x1fffff));
    assert_int_equal(tables_fill(f->b, (1ull << 32) + DATA, 1, false), BT_FILL_SLOW);
    assert_int_equal(tables_fill(f->b, MMIO, 1, false), BT_FILL_SLOW);
}

static void pages_of_32_bit_paging(void **state)
{
    struct fixture *f = *state;
    struct cpu_state *cpu = &f->b->c.v.cpu;
    cpu->efer = 0;
    cpu->cr4 = CR4_PSE;
    cpu->cr3 = ROOT_2;
    uint32_t *directory = physmap_get(f->memory, ROOT_2, PAGE_SIZE_BYTES, PHYSMAP_WRITE);
    uint32_t *table = physmap_get(f->memory, ROOT_2 + 0x1000, PAGE_SIZE_BYTES, PHYSMAP_WRITE);
    directory[0x300] = DATA | USED | PS;
    directory[1] = (ROOT_2 + 0x1000) | USED;
    for (unsigned n = 0; n < 1024; n++)
        table[n] = (uint32_t)((DATA + n * PAGE_SIZE_BYTES) | USED);
    tables_flush_all(&f->b->c);
    tables_select(f->b);
    assert_int_equal(tables_fill(f->b, 0xc0000000, 1, true), BT_FILL_DONE);
    assert_int_equal(tables_fill(f->b, 0xc0200000, 1, true), BT_FILL_DONE);
    assert_int_equal(read_at(f, 0xc03fffff), pattern(DATA + 0x3fffff));
    assert_int_equal(tables_fill(f->b, 0x00412345, 1, true), BT_FILL_DONE);
    assert_int_equal(read_at(f, 0x00410000), pattern(DATA + 0x10000));
    assert_int_equal(read_at(f, 0x00420000), -1);
    tables_flush_page(&f->b->c, 0xc0000000);
    assert_int_equal(read_at(f, 0xc0200000), -1);
}

static void wild_addresses(void **state)
{
    struct fixture *f = *state;
    enum { PAGES = 24, ROUNDS = 60000 };
    gva_t page[PAGES];
    uint64_t x = 0x12345;
    for (unsigned n = 0; n < PAGES; n++) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        page[n] = (uint64_t)((int64_t)(x << 16 & ~(0xfffull << 16)) >> 16) & ~PAGE_MASK_BITS;
        map(f, page[n], (DATA + n * PAGE_SIZE_BYTES) | USED);
        assert_int_equal(tables_fill(f->b, page[n], 1, n & 1), BT_FILL_DONE);
    }
    unsigned hits = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        uint64_t r = x >> 20;
        unsigned n = r % PAGES;
        gva_t gva = page[n] | (r >> 8 & 0xfff);
        if (r >> 30 & 3)
            gva ^= 1ull << (r >> 32 & 63);
        if (r >> 38 & 1)
            gva = x;
        bool hit = (gva & ~PAGE_MASK_BITS) == page[n];
        int want = hit ? pattern(DATA + n * PAGE_SIZE_BYTES + (gva & PAGE_MASK_BITS)) : -1;
        int got = read_at(f, gva);
        if (hit && got < 0) { /* so many chunks were touched that it had to go */
            assert_int_equal(tables_fill(f->b, gva, 1, n & 1), BT_FILL_DONE);
            got = read_at(f, gva);
        }
        for (unsigned other = 0; !hit && other < PAGES; other++)
            if ((gva & ~PAGE_MASK_BITS) == page[other])
                want = got;
        if (got != want)
            fail_msg("%#llx: %d, not %d", (unsigned long long)gva, got, want);
        hits += hit;
    }
    assert_true(hits > ROUNDS / 16);
}

static void the_check_page(void **state)
{
    struct fixture *f = *state;
    uint8_t *check = f->b->table + (int32_t)BT_CHECK;
    assert_int_equal(check[0], 0);
    assert_true(probe_readable(check + PAGE_SIZE_BYTES - 1));
    assert_false(probe_writable(check));
    assert_false(probe_readable(check + PAGE_SIZE_BYTES));
    assert_false(probe_readable(check + 2 * PAGE_SIZE_BYTES - 1));
    assert_false(probe_readable(check - 1));
    /* The structure below the table is the vCPU's own. */
    f->b->scratch[3] = 0x1122334455667788;
    assert_int_equal(*(uint64_t *)(f->b->table + BT_CTX(scratch) + 24), 0x1122334455667788);
}

/* ---- code ---- */

static void jumps_find_their_slot(void **state)
{
    struct fixture *f = *state;
    gva_t gva = KERNEL + 0x40003000;
    map(f, gva, (DATA + 0x9000) | USED | G);
    uint64_t offset;
    assert_int_equal(tables_fetch(f->b, gva + 0x123, &offset), 0);
    assert_int_equal(offset & ~PAGE_MASK_BITS, DATA + 0x9000);
    assert_int_equal(tables_fetch(f->b, gva + 0x1000, &offset), -EFAULT);
    dt_at(&f->engine, 3)[0x123] = 0x4567;
    tables_exec_set(f->b, gva + 0x123, dt_at(&f->engine, 3));
    assert_int_equal(jump_to(f, gva + 0x123), 0x4567);
    assert_int_equal(jump_to(f, gva + 0x124), 0);
    assert_int_equal(jump_to(f, gva + 0x1123), 0); /* poison under the same tag: a miss without a fault */
    for (unsigned bit = BT_EXEC_BITS; bit < 64; bit++)
        assert_int_equal(jump_to(f, (gva + 0x123) ^ 1ull << bit), -1);
    tables_flush_page(&f->b->c, gva);
    assert_int_equal(jump_to(f, gva + 0x123), 0);
    /* A host address beyond RAM, and MMIO, are no code. */
    map(f, gva, MMIO | USED);
    assert_int_equal(tables_fetch(f->b, gva, &offset), -EFAULT);
}

static void jumps_to_neighbours(void **state)
{
    struct fixture *f = *state;
    gva_t gva = KERNEL + 0x40000000;
    for (unsigned n = 0; n < 32; n++) {
        map(f, gva + n * PAGE_SIZE_BYTES, (DATA + n * PAGE_SIZE_BYTES) | P | (n % 5 ? A : 0) | G);
        f->engine.code_flags[(DATA >> 12) + n] = n % 3 ? BT_CODE_PRESENT : 0;
        dt_at(&f->engine, 1 + (DATA >> 12) + n)[n] = 100 + n;
    }
    tables_exec_set(f->b, gva + PAGE_SIZE_BYTES, dt_at(&f->engine, 1 + (DATA >> 12) + 1));
    for (unsigned n = 0; n < 32; n++)
        assert_int_equal(jump_to(f, gva + n * PAGE_SIZE_BYTES + n), n < 16 && n % 5 && n % 3 ? 100 + n : 0);
    tables_flush_non_global(&f->b->c, 0);
    tables_select(f->b);
    assert_int_equal(jump_to(f, gva + 2 * PAGE_SIZE_BYTES + 2), 102);
    *leaf_of(f, ROOT, gva + 7 * PAGE_SIZE_BYTES, 1) &= ~G;
    tables_flush_page(&f->b->c, gva + 7 * PAGE_SIZE_BYTES);
    tables_exec_set(f->b, gva + PAGE_SIZE_BYTES, dt_at(&f->engine, 1 + (DATA >> 12) + 1));
    tables_flush_non_global(&f->b->c, 0);
    tables_select(f->b);
    assert_int_equal(jump_to(f, gva + 7 * PAGE_SIZE_BYTES + 7), 0);
}

static void a_kicked_jump_faults(void **state)
{
    struct fixture *f = *state;
    static const gva_t pages[] = {0, 0x1ff000, 1ull << 39, 3ull << 37};
    for (unsigned n = 0; n < sizeof(pages) / sizeof(pages[0]); n++) {
        map(f, pages[n], DATA | USED);
        tables_exec_set(f->b, pages[n], dt_at(&f->engine, 1));
        assert_int_equal(jump_to(f, pages[n]), -1);
    }
    map(f, 0x200000, DATA | USED); /* the rest of the same piece of the table is there */
    tables_exec_set(f->b, 0x200000, dt_at(&f->engine, 1));
    uint8_t *exec = f->b->table + BT_EXEC_TABLE_OFFSET;
    assert_true(probe_readable(exec + PAGE_SIZE_BYTES) && !probe_readable(exec) && !probe_readable(exec + PAGE_SIZE_BYTES - 1));
    gva_t gva = KERNEL + 0x200000;
    map(f, gva, DATA | USED);
    dt_at(&f->engine, 1)[0] = 77;
    tables_exec_set(f->b, gva, dt_at(&f->engine, 1));
    assert_int_equal(jump_to(f, gva), 77);
    f->b->exec_mask = 0;
    static const gva_t targets[] = {KERNEL + 0x200000, 0, ~0ull, USER};
    for (unsigned n = 0; n < 4; n++)
        assert_int_equal(jump_to(f, targets[n]), -1);
    /* Whatever R11 is: an address of the host's own, divided by the scale. */
    for (unsigned n = 0; n < 4; n++)
        assert_int_equal(jump_to(f, (uint64_t)(uintptr_t)f->engine.layout.window_r / 4 + ((uint64_t)n << 62)), -1);
    f->b->exec_mask = BT_EXEC_MASK;
    assert_int_equal(jump_to(f, gva), 77);
}

static void another_mode_or_epoch_drops_code_only(void **state)
{
    struct fixture *f = *state;
    gva_t gva = KERNEL + 0x800000;
    map(f, gva, DATA | USED | G);
    dt_at(&f->engine, 1)[0] = 77;
    tables_exec_set(f->b, gva, dt_at(&f->engine, 1));
    assert_int_equal(tables_fill(f->b, gva, 1, false), BT_FILL_DONE);
    tables_select(f->b);
    assert_int_equal(jump_to(f, gva), 77);
    f->b->c.simd_blocked = 1;
    tables_select(f->b);
    assert_int_equal(jump_to(f, gva), 0);
    tables_exec_set(f->b, gva, dt_at(&f->engine, 1));
    f->engine.epoch++;
    tables_select(f->b);
    assert_int_equal(jump_to(f, gva), 0);
    assert_int_equal(read_at(f, gva), pattern(DATA));
}

/* 32-bit processes on a 64-bit kernel: nothing is lost by going back and forth, and translated code does not change views by itself meanwhile. */
static void code_of_another_width_waits(void **state)
{
    struct fixture *f = *state;
    gva_t gva = USER + 0x1000;
    map(f, gva, DATA | USED | US);
    map(f, KERNEL, (DATA + 0x1000) | USED | G);
    dt_at(&f->engine, 1)[0] = 77;
    dt_at(&f->engine, 2)[0] = 78;
    tables_exec_set(f->b, KERNEL, dt_at(&f->engine, 2));
    assert_true(tables_are_long(f->b));
    f->b->c.code_bits = f->b->mode.code_bits = 32;
    as(f, VIEW_USER);
    tables_exec_set(f->b, gva, dt_at(&f->engine, 1));
    assert_int_equal(jump_to(f, gva + BT_CODE_BIAS), 77);
    assert_int_equal(jump_to(f, gva), 0);
    for (unsigned n = 0; n < 3; n++) {
        f->b->c.code_bits = f->b->mode.code_bits = 64;
        as(f, VIEW_SUPERVISOR);
        assert_false(tables_are_long(f->b));
        assert_int_equal(jump_to(f, KERNEL), 78);
        f->b->c.code_bits = f->b->mode.code_bits = 32;
        as(f, VIEW_USER);
        assert_int_equal(jump_to(f, gva + BT_CODE_BIAS), 77);
    }
    tables_flush_page(&f->b->c, gva);
    assert_int_equal(jump_to(f, gva + BT_CODE_BIAS), 0);
    f->b->c.code_bits = f->b->mode.code_bits = 64;
    as(f, VIEW_USER);
    assert_true(tables_are_long(f->b));
    assert_int_equal(jump_to(f, gva), 0);
}

/* ---- views and flushes ---- */

static void privileges_do_not_mix(void **state)
{
    struct fixture *f = *state;
    map(f, KERNEL, DATA | USED | G);
    map(f, USER, (DATA + 0x1000) | USED | US);
    assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_DONE);
    assert_int_equal(tables_fill(f->b, USER, 1, false), BT_FILL_SLOW); /* SMAP */
    as(f, VIEW_SUPERVISOR_AC);
    assert_int_equal(read_at(f, KERNEL), -1);
    assert_int_equal(tables_fill(f->b, USER, 1, true), BT_FILL_DONE);
    assert_int_equal(tables_fill(f->b, KERNEL, 1, true), BT_FILL_DONE);
    assert_int_equal(read_at(f, USER), pattern(DATA + 0x1000));
    as(f, VIEW_SUPERVISOR);
    assert_int_equal(read_at(f, USER), -1);
    assert_int_equal(read_at(f, KERNEL), pattern(DATA));
    as(f, VIEW_USER);
    assert_int_equal(read_at(f, KERNEL), -1);
    assert_int_equal(read_at(f, USER), -1);
    assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_SLOW);
    assert_int_equal(tables_fill(f->b, USER, 1, false), BT_FILL_DONE);
    uint64_t offset;
    assert_int_equal(tables_fetch(f->b, KERNEL, &offset), -EFAULT);
    assert_int_equal(tables_fetch(f->b, USER, &offset), 0);
    as(f, VIEW_SUPERVISOR);
    assert_int_equal(tables_fetch(f->b, USER, &offset), -EFAULT); /* SMEP */
    /* Without SMAP one view serves. */
    f->b->c.v.cpu.cr4 &= ~CR4_SMAP;
    tables_flush_all(&f->b->c);
    as(f, VIEW_SUPERVISOR_AC);
    uint8_t *table = f->b->table;
    assert_int_equal(tables_fill(f->b, USER, 1, false), BT_FILL_DONE);
    as(f, VIEW_SUPERVISOR);
    assert_ptr_equal(f->b->table, table);
    assert_int_equal(read_at(f, USER), pattern(DATA + 0x1000));
}

static void flushes_keep_what_they_may(void **state)
{
    struct fixture *f = *state;
    struct icpu *c = &f->b->c;
    map(f, KERNEL, DATA | USED | G);
    map(f, KERNEL + 0x100000, (DATA + 0x1000) | USED);
    map(f, USER, (DATA + 0x2000) | USED | US);
    dt_at(&f->engine, 1)[0] = 77;
    for (unsigned round = 0; round < 3; round++) {
        as(f, VIEW_SUPERVISOR);
        assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_DONE);
        assert_int_equal(tables_fill(f->b, KERNEL + 0x100000, 1, false), BT_FILL_DONE);
        as(f, VIEW_USER);
        assert_int_equal(tables_fill(f->b, USER, 1, false), BT_FILL_DONE);
        tables_exec_set(f->b, USER, dt_at(&f->engine, 1));
        if (round == 0)
            tables_flush_all(c);
        else if (round == 1)
            tables_flush_non_global(c, 0);
        else
            tables_load_cr3(c, false);
        tables_select(f->b);
        assert_int_equal(read_at(f, USER), -1);
        assert_int_equal(jump_to(f, USER), 0);
        as(f, VIEW_SUPERVISOR);
        assert_int_equal(read_at(f, KERNEL), round ? pattern(DATA) : -1);
        assert_int_equal(read_at(f, KERNEL + 0x100000), -1);
    }
    tables_flush_page(c, KERNEL + 0x123);
    assert_int_equal(read_at(f, KERNEL), -1);
}

static void address_spaces_are_kept_apart(void **state)
{
    struct fixture *f = *state;
    struct icpu *c = &f->b->c;
    enum { SPACES = 2 * BT_USER_VIEWS };
    c->v.cpu.cr4 |= CR4_PCIDE;
    tables_flush_all(c);
    for (unsigned asid = 0; asid < SPACES; asid++) {
        map(f, USER, (DATA + asid * PAGE_SIZE_BYTES) | USED | US);
        c->v.cpu.cr3 = ROOT | asid;
        tables_load_cr3(c, true);
        as(f, VIEW_USER);
        assert_int_equal(read_at(f, USER), -1);
        assert_int_equal(tables_fill(f->b, USER, 1, false), BT_FILL_DONE);
        as(f, VIEW_SUPERVISOR_AC);
        assert_int_equal(read_at(f, USER), -1);
        assert_int_equal(tables_fill(f->b, USER, 1, false), BT_FILL_DONE);
        assert_int_equal(read_at(f, USER), pattern(DATA + asid * PAGE_SIZE_BYTES));
    }
    /* The last ones are still there, whatever the tables say now. */
    for (unsigned asid = SPACES; asid-- > SPACES - BT_USER_VIEWS;) {
        c->v.cpu.cr3 = ROOT | asid;
        tables_load_cr3(c, true);
        as(f, VIEW_USER);
        assert_int_equal(read_at(f, USER), pattern(DATA + asid * PAGE_SIZE_BYTES));
    }
    /* INVPCID of another address space, then a load that does not keep. */
    tables_flush_non_global(c, SPACES - 1);
    assert_int_equal(read_at(f, USER), pattern(DATA + (SPACES - BT_USER_VIEWS) * PAGE_SIZE_BYTES));
    tables_load_cr3(c, false);
    tables_select(f->b);
    assert_int_equal(read_at(f, USER), -1);
    c->v.cpu.cr3 = ROOT | (SPACES - 1);
    tables_load_cr3(c, true);
    tables_select(f->b);
    assert_int_equal(read_at(f, USER), -1);
    c->v.cpu.cr3 = ROOT | (SPACES - 2);
    tables_load_cr3(c, true);
    tables_select(f->b);
    assert_int_equal(read_at(f, USER), pattern(DATA + (SPACES - 2) * PAGE_SIZE_BYTES));
    /* INVLPG reaches all. */
    tables_flush_page(c, USER);
    assert_int_equal(read_at(f, USER), -1);
}

static void memory_is_bounded(void **state)
{
    struct fixture *f = *state;
    uint64_t most = 0;
    for (unsigned n = 0; n < 3000; n++) {
        as(f, n & 1 ? VIEW_USER : VIEW_SUPERVISOR);
        assert_int_equal(read_at(f, KERNEL + ((uint64_t)n << 23)), -1);
        most = tables_bytes(f->b) > most ? tables_bytes(f->b) : most;
    }
    assert_true(most <= 17u << 20);
    map(f, KERNEL, DATA | USED);
    as(f, VIEW_SUPERVISOR);
    assert_int_equal(tables_fill(f->b, KERNEL, 1, false), BT_FILL_DONE);
    assert_int_equal(read_at(f, KERNEL), pattern(DATA));
}

/* ---- everything at random ---- */

struct storm {
    struct fixture *f;
    uint64_t x;
    gva_t gva[48];
};

enum { STORM_PAGES = 48, STORM_CODE = 3 };

static uint64_t pick(struct storm *s, uint64_t limit)
{
    s->x = s->x * 6364136223846793005ull + 1442695040888963407ull;
    return (s->x >> 24) % limit;
}

/* Neighbours in a group, in a chunk, under the same index, and in other tables. */
static void storm_places(struct storm *s)
{
    static const gva_t regions[] = {KERNEL, USER, USER & 0x1ffffe00000, 0xffffffff81000000, 0x400000, KERNEL + (1ull << BT_ALIAS_BITS)};
    for (unsigned n = 0; n < STORM_PAGES; n++)
        s->gva[n] = regions[n % 6] + pick(s, n < 24 ? 20 : 2500) * PAGE_SIZE_BYTES;
}

/* The guest changes an entry and invalidates what it must: the page, or all that is not global in each address space, or everything. */
static void storm_remap(struct storm *s)
{
    struct fixture *f = s->f;
    struct icpu *c = &f->b->c;
    gva_t gva = s->gva[pick(s, STORM_PAGES)];
    uint64_t *large = leaf_of(f, ROOT, gva, 2), rights = P | pick(s, 2) * RW | pick(s, 2) * US | pick(s, 2) * A | pick(s, 2) * D;
    bool was_large = *large & PS, was_global = (was_large ? *large : *leaf_of(f, ROOT, gva, 1)) & G;
    if (was_large || !pick(s, 16)) {
        tables_flush_all(c); /* a change of the page's size */
        *large = was_large ? 0 : (pick(s, 2) ? DATA : ROM & ~0x1fffffull) | rights | PS | pick(s, 2) * G;
        return;
    }
    gpa_t gpa = pick(s, 4) ? DATA + pick(s, 64) * PAGE_SIZE_BYTES : pick(s, 2) ? ROM + pick(s, 4) * PAGE_SIZE_BYTES : MMIO;
    *leaf_of(f, ROOT, gva, 1) = pick(s, 4) ? gpa | rights | pick(s, 2) * G : 0;
    switch (was_global ? pick(s, 2) : pick(s, 3)) {
    case 0:
        tables_flush_page(c, gva + pick(s, PAGE_SIZE_BYTES));
        break;
    case 1:
        tables_flush_all(c);
        break;
    default:
        for (unsigned asid = 0; asid < 4; asid++)
            tables_flush_non_global(c, asid);
    }
}

static void storm_switch(struct storm *s)
{
    struct icpu *c = &s->f->b->c;
    static const enum tlb_view views[] = {VIEW_USER, VIEW_SUPERVISOR, VIEW_SUPERVISOR_AC};
    c->v.cpu.cr3 = ROOT | pick(s, 4);
    tables_load_cr3(c, pick(s, 4));
    if (!pick(s, 8))
        c->simd_blocked ^= 1;
    if (!pick(s, 8))
        s->f->engine.epoch++;
    as(s->f, views[pick(s, 3)]);
}

static bool storm_allows(struct storm *s, gva_t gva, unsigned access, struct paging_result *page)
{
    static const uint8_t by_view[] = {[VIEW_USER] = PAGING_USER, [VIEW_SUPERVISOR_AC] = PAGING_AC};
    struct icpu *c = &s->f->b->c;
    uint32_t error;
    return !paging_walk(s->f->memory, &c->v.cpu, c->max_phys_bits, gva, access | by_view[c->view] | PAGING_NO_UPDATE, page, &error);
}

/* What is in the tables is what the guest's tables allow now. */
static void storm_check(struct storm *s, gva_t gva)
{
    struct fixture *f = s->f;
    struct paging_result page;
    gva += pick(s, PAGE_SIZE_BYTES);
    int byte = read_at(f, gva);
    if (byte >= 0) {
        assert_true(storm_allows(s, gva, PAGING_READ, &page));
        assert_int_equal(byte, pattern(page.gpa));
        if (write_at(f, gva, (uint8_t)byte)) {
            assert_true(storm_allows(s, gva, PAGING_WRITE, &page) && page.dirty);
            assert_false(physmap_is_rom(f->memory, page.gpa));
            assert_false(f->engine.code_flags[page.gpa >> 12]);
        }
    }
    int64_t slot = jump_to(f, gva);
    if (slot > 0) {
        assert_true(storm_allows(s, gva, PAGING_FETCH, &page));
        assert_int_equal(slot, (page.gpa >> 12) + 1);
    }
}

static void storm_use(struct storm *s, gva_t gva)
{
    struct fixture *f = s->f;
    bool write = pick(s, 2);
    uint64_t offset;
    tables_select(f->b);
    if (pick(s, 3)) {
        if (tables_fill(f->b, gva, 8, write) == BT_FILL_DONE)
            assert_true(write ? write_at(f, gva, (uint8_t)read_at(f, gva)) : read_at(f, gva) >= 0);
    } else if (!tables_fetch(f->b, gva, &offset)) {
        tables_exec_set(f->b, gva, dt_at(&f->engine, 1 + (unsigned)(offset >> 12)));
    }
}

static void a_storm(void **state)
{
    struct storm s = {.f = *state, .x = 20250101};
    struct fixture *f = s.f;
    f->b->c.v.cpu.cr4 |= CR4_PCIDE;
    storm_places(&s);
    for (unsigned n = 0; n < RAM_BYTES >> 12; n++)
        for (unsigned byte = 0; byte < PAGE_SIZE_BYTES; byte++)
            dt_at(&f->engine, 1 + n)[byte] = n + 1;
    for (unsigned n = 0; n < STORM_CODE; n++)
        f->engine.code_flags[(DATA >> 12) + 7 * n] = BT_CODE_PRESENT;
    for (unsigned round = 0; round < 12000; round++) {
        unsigned what = (unsigned)pick(&s, 16);
        gva_t gva = s.gva[pick(&s, STORM_PAGES)];
        if (what == 0)
            storm_remap(&s);
        else if (what < 3)
            storm_switch(&s);
        else
            storm_use(&s, gva);
        tables_select(f->b);
        for (unsigned n = 0; n < 2; n++)
            storm_check(&s, s.gva[pick(&s, STORM_PAGES)]);
    }
}

/* ---- cost, printed only ---- */

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void cost(void **state)
{
    struct fixture *f = *state;
    struct icpu *c = &f->b->c;
    enum { ROUNDS = 2000, GROUPS = 32 };
    for (unsigned n = 0; n < 16 * GROUPS; n++)
        map(f, KERNEL + n * PAGE_SIZE_BYTES, (DATA + n * PAGE_SIZE_BYTES) | USED);
    *leaf_of(f, ROOT, KERNEL + (6ull << 20), 2) = DATA | USED | PS;
    double fill = 0, flush = 0, page = 0, large = 0, t0, t1;
    for (unsigned round = 0; round < ROUNDS; round++) {
        t0 = now_ns();
        for (unsigned n = 0; n < GROUPS; n++)
            (void)tables_fill(f->b, KERNEL + n * 16 * PAGE_SIZE_BYTES, 8, true);
        t1 = now_ns();
        fill += t1 - t0;
        for (unsigned n = 0; n < GROUPS; n++)
            tables_flush_page(c, KERNEL + n * 16 * PAGE_SIZE_BYTES);
        t0 = now_ns();
        page += t0 - t1;
        tables_flush_non_global(c, 0);
        tables_select(f->b);
        t1 = now_ns();
        flush += t1 - t0;
        (void)tables_fill(f->b, KERNEL + (6ull << 20), 8, true);
        large += now_ns() - t1;
    }
    t0 = now_ns();
    for (unsigned round = 0; round < ROUNDS * GROUPS; round++)
        tables_select(f->b);
    t1 = now_ns();
    print_message("fill of 16 pages %.0f ns, of 2 MiB %.0f ns; flush of %d groups %.0f ns; page flush %.0f ns; select %.1f ns\n",
                  fill / ROUNDS / GROUPS, large / ROUNDS, GROUPS, flush / ROUNDS, page / ROUNDS / GROUPS, (t1 - t0) / ROUNDS / GROUPS);
}

int main(void)
{
    if (!host_fsgsbase() || !__builtin_cpu_supports("bmi2")) {
        print_message("no FSGSBASE or no BMI2: skipped\n");
        return 77;
    }
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(an_empty_table_faults_everywhere),
        TEST(fills_hit_the_right_byte),
        TEST(what_is_not_plain_memory_is_slow),
        TEST(rights_and_dirty_bits),
        TEST(neighbours_that_were_used_come_along),
        TEST(rom_and_code_pages),
        TEST(large_pages_are_filled_whole),
        TEST(only_what_is_written_is_marked),
        TEST(without_paging),
        TEST(pages_of_32_bit_paging),
        TEST(wild_addresses),
        TEST(the_check_page),
        TEST(jumps_find_their_slot),
        TEST(jumps_to_neighbours),
        TEST(a_kicked_jump_faults),
        TEST(another_mode_or_epoch_drops_code_only),
        TEST(code_of_another_width_waits),
        TEST(privileges_do_not_mix),
        TEST(flushes_keep_what_they_may),
        TEST(address_spaces_are_kept_apart),
        TEST(memory_is_bounded),
        TEST(a_storm),
        TEST(cost),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
