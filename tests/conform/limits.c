/*
 * A guest that uses up what a monitor keeps for it, or leaves what it was given: more code than any cache of translations holds, again and again; a page at tens of thousands of
 * addresses; hundreds of address spaces; page tables that share their page with code and data; code, data and tables at the end of RAM, beyond it and in devices. Everything must
 * go on as the manuals say, and what they leave open must end in some exception of the guest's.
 */
#include "runtime/probe.h"

#define AREA 0x200000000000ull /* a slot of the topmost table of its own */
#define HOLE 0x10000000ull     /* behind RAM of 256 MiB, where nothing answers */
#define RWX (PG_P | PG_W | PG_U)

static uint64_t physical(const void *p)
{
    return (uintptr_t)p;
}

static uint64_t call_with(uint64_t va, uint64_t rdi)
{
    uint64_t value;
    asm_volatile("call *%1" : "=a"(value), "+r"(va), "+D"(rdi)::"memory", "cc", "rcx", "rdx", "rsi", "r8");
    return value;
}

static void put_function(uint8_t *at, uint32_t value) /* mov eax, value; ret */
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

/* ---- more code than fits ---- */

#define CODE_PAGES 9500u
#define FULL_PAGES 3000u
#define UNITS (PAGE / 8 - 2) /* of 8 bytes in a page */

/* xor eax, eax; then add eax, immediate; add eax, [rdi + n]; and ret. Returns what it will, with 32 words of 1 at RDI. */
static uint32_t page_of_code(uint8_t *at, uint32_t seed)
{
    uint32_t sum = 0;
    at[0] = 0x31, at[1] = 0xc0;
    memset(at + 2, 0x90, 6);
    for (unsigned n = 0; n < UNITS; n++) {
        uint8_t *p = at + 8 + n * 8;
        uint32_t value = seed * 2654435761u + n;
        p[0] = 0x05;
        memcpy(p + 1, &value, 4);
        p[5] = 0x03, p[6] = 0x47, p[7] = (uint8_t)(n % 31 * 4);
        sum += value + 1;
    }
    at[8 + UNITS * 8] = 0xc3;
    return sum;
}

static void test_endless_code(void)
{
    uint8_t *code = pages_allocate(CODE_PAGES);
    uint32_t ones[32], sums[64];
    unsigned good = 0, count = 0;
    for (unsigned n = 0; n < 32; n++)
        ones[n] = 1;
    for (unsigned round = 0; round < 2; round++)
        for (unsigned n = 0; n < FULL_PAGES; n++, count++) {
            uint32_t sum = page_of_code(code + n * PAGE, n + round * 77777);
            sums[n % 64] = sum;
            good += (uint32_t)call_with(physical(code + n * PAGE), physical(ones)) == sum;
            if (n >= 64 && n % 8 == 0) { /* what ran a while ago */
                unsigned back = n - 1 - random_below(63);
                good += (uint32_t)call_with(physical(code + back * PAGE), physical(ones)) == sums[back % 64];
                count++;
            }
        }
    expect_eq(good, count, "3,000 pages full of code, twice");
    good = count = 0;
    for (unsigned round = 0; round < 2; round++)
        for (unsigned n = 0; n < CODE_PAGES; n++, count++) {
            if (!round)
                put_function(code + n * PAGE + n % 4000, n);
            good += call_with(physical(code + n * PAGE) + n % 4000, 0) == n;
        }
    expect_eq(good, count, "9,500 pages with a function each, twice");
}

/* ---- one page at any number of addresses ---- */

static void test_everywhere(void)
{
    uint64_t *page = pages_allocate(1), *table = pages_allocate(1), *directory = pages_allocate(1), *upper = pages_allocate(1);
    static const uint8_t function[] = {0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xc3}; /* lea rax, [its own address]; ret */
    for (unsigned n = 0; n < 512; n++) {
        table[n] = physical(page) | RWX;
        directory[n] = physical(table) | RWX;
        upper[n] = physical(directory) | RWX;
    }
    for (unsigned slot = 64; slot < 80; slot++) /* 8 TiB, all the same page */
        boot_pml4[slot] = physical(upper) | RWX;
    write_cr3(read_cr3());
    unsigned good = 0;
    uint64_t count = 0;
    for (unsigned n = 0; n < 60000; n++) {
        uint64_t va = AREA + (random64() & 0x7fffffff000);
        volatile uint64_t *cell = (volatile uint64_t *)(va + 8 * random_below(64));
        uint64_t old = *cell;
        *cell = old + 1;
        count += page[((uintptr_t)cell & (PAGE - 1)) / 8] == old + 1;
    }
    expect_eq(count, 60000, "one page of data at 60,000 random addresses");
    memcpy((uint8_t *)page + 2048, function, sizeof function);
    for (unsigned n = 0; n < 20000; n++) {
        uint64_t va = AREA + (random64() & 0x7fffffff000) + 2048;
        good += call_with(va, 0) == va;
    }
    expect_eq(good, 20000, "one page of code at 20,000 random addresses");
    good = 0;
    for (unsigned n = 0; n < 300; n++) { /* taken away and given back in the one table */
        uint64_t va = AREA + (random64() & 0x7fffffff000) + 2048;
        good += call_with(va, 0) == va;
        table[va >> 12 & 511] = 0;
        invlpg((void *)va);
        good += TRY(call_with(va, 0)) == PF && trap.cr2 == va;
        table[va >> 12 & 511] = physical(page) | RWX;
    }
    expect_eq(good, 600, "and without it after INVLPG");
    for (unsigned slot = 64; slot < 80; slot++)
        boot_pml4[slot] = 0;
    write_cr3(read_cr3());
}

static void test_spaces(void)
{
    enum { SPACES = 300 };
    uint64_t keep = read_cr3(), *root[SPACES];
    bool pcids = cpuid(1, 0).c & 1u << 17;
    for (unsigned n = 0; n < SPACES; n++) {
        uint8_t *page = pages_allocate(1);
        root[n] = pages_allocate(1);
        memcpy(root[n], boot_pml4, PAGE);
        root[n][AREA >> 39 & 511] = 0;
        *page_entry(root[n], AREA) = physical(page) | RWX;
        put_function(page, n);
        *(uint64_t *)(page + 64) = n;
    }
    unsigned good = 0;
    if (pcids)
        write_cr4(read_cr4() | CR4_PCIDE);
    for (unsigned n = 0; n < 6000; n++) {
        unsigned k = n < SPACES ? n : random_below(SPACES);
        write_cr3(physical(root[k]) | (pcids ? (k + 1) | (uint64_t)(n >= SPACES) << 63 : 0));
        good += call_with(AREA, 0) == k && *(volatile uint64_t *)(AREA + 64) == k;
    }
    write_cr3(keep);
    if (pcids)
        write_cr4(read_cr4() & ~CR4_PCIDE);
    expect_eq(good, 6000, "300 address spaces in turn");
}

/* ---- tables, code and data in one page ---- */

static void test_tables_with_code(void)
{
    static const uint8_t function[] = {0x48, 0x8b, 0x07, 0x48, 0xff, 0x07, 0xc3}; /* mov rax, [rdi]; inc qword [rdi]; ret */
    uint8_t *table = pages_allocate(1), *data = pages_allocate(16);
    unsigned good = 0;
    (void)page_entry(boot_pml4, AREA);
    uint64_t *upper = (uint64_t *)(boot_pml4[AREA >> 39 & 511] & PG_ADDRESS), *directory = (uint64_t *)(upper[AREA >> 30 & 511] & PG_ADDRESS);
    directory[AREA >> 21 & 511] = physical(table) | RWX;
    write_cr3(read_cr3());
    memcpy(table + 2048, function, sizeof function); /* entries 256 on are code */
    for (unsigned n = 0; n < 2000; n++) {
        uint64_t *entry = (uint64_t *)table + n % 16;
        *entry = physical(data + n % 16 * PAGE) | PG_P | PG_W;
        invlpg((void *)(AREA + n % 16 * PAGE));
        *(uint64_t *)(data + n % 16 * PAGE + 8) = n;
        good += call_with(physical(table) + 2048, AREA + n % 16 * PAGE + 8) == n && *(uint64_t *)(data + n % 16 * PAGE + 8) == n + 1;
        good += (*entry & (PG_A | PG_D)) == (PG_A | PG_D);
    }
    expect_eq(good, 4000, "code in the page table that it uses");
    /* The table maps itself: code run and entries written by way of one address. */
    ((uint64_t *)table)[20] = physical(table) | RWX;
    good = 0;
    for (unsigned n = 0; n < 500; n++) {
        volatile uint64_t *self = (volatile uint64_t *)(AREA + 20 * PAGE);
        self[1] = physical(data + n % 16 * PAGE) | PG_P | PG_W;
        invlpg((void *)(AREA + PAGE));
        *(uint64_t *)(data + n % 16 * PAGE) = n;
        good += call_with(AREA + 20 * PAGE + 2048, AREA + PAGE) == n;
    }
    expect_eq(good, 500, "and by way of itself");
    directory[AREA >> 21 & 511] = 0;
    write_cr3(read_cr3());
}

/* ---- beyond RAM ---- */

static void test_end_of_ram(void)
{
    uint8_t *last = (uint8_t *)(HOLE - PAGE);
    uint64_t va = AREA + 0x400000;
    page_map(va, physical(last) | RWX);
    page_map(va + PAGE, HOLE | RWX);
    unsigned good = 0, ends = 0;
    for (unsigned n = 0; n < 50; n++) { /* data across the end: what nobody has reads as ones, what is written there is lost */
        volatile uint64_t *word = (volatile uint64_t *)(va + PAGE - 1 - n % 7);
        unsigned inside = 1 + n % 7;
        *word = 0;
        good += *word == ~0ull << 8 * inside;
    }
    expect_eq(good, 50, "words across the end of RAM");
    for (unsigned n = 0; n < 50; n++) { /* code runs into FF FF there, which is no instruction (SDM vol. 2, table A-6) */
        memset(last + PAGE - 64, 0x90, 64);
        ends += TRY(call_with(va + PAGE - 64, 0)) == UD && trap.ip == va + PAGE;
        last[PAGE - 1] = 0xb8; /* mov eax, FFFFFFFF */
        ends += TRY(call_with(va + PAGE - 64, 0)) == UD && trap.ip == va + PAGE + 4 && (uint32_t)trap.ax == 0xffffffff;
    }
    expect_eq(ends, 100, "code that runs off the end of RAM");
    ends = 0;
    for (unsigned n = 0; n < 20; n++) /* the stack there: what was pushed is not there when it is to be returned to */
        ends += TRY(asm_volatile("mov %%rsp, %%rbx; lea 64(%0), %%rsp; push $1; pop %%rcx; mov %%rbx, %%rsp" ::"r"(va + PAGE) : "rbx", "rcx", "memory")) == NO_TRAP;
    expect_eq(ends, 20, "a stack beyond RAM");
    page_map(va, 0);
    page_map(va + PAGE, 0);
}

/* Code in the registers of devices, in ROM and where nothing is; every end is one of the guest's own exceptions. */
static void test_odd_code(void)
{
    static const uint64_t places[] = {0xa0000, 0xc0000, 0xf0000, HOLE, 0x80000000, 0xb0000000, 0xe0000000, 0xfec00000, 0xfed00000, 0xfee00000, 0xfffff000, 0x8000000000, 0x3ffffff000};
    static uint64_t scratch[512];
    unsigned ends = 0, count = 0;
    uint64_t va = AREA + 0x600000;
    page_map(va + PAGE, 0);
    for (unsigned n = 0; n < sizeof places / sizeof *places; n++)
        for (unsigned k = 0; k < 24; k++, count++) {
            page_map(va, places[n] | RWX);
            uint64_t at = va + (k < 8 ? 16 * k : k < 16 ? PAGE - k : random_below(PAGE));
            struct entry entry = {.ip = at, .cs = KCODE, .flags = 2, .ss = KDATA, .sp = physical(scratch + 256), .ax = physical(scratch), .bx = physical(scratch), .cx = 1,
                                  .dx = physical(scratch), .si = physical(scratch), .di = physical(scratch)};
            ends += TRY(enter(&entry)) != NO_TRAP;
        }
    page_map(va, 0);
    expect_eq(ends, count, "code in devices, ROM and nowhere ends in exceptions");
}

/* Page tables where there is no memory: entries read as ones there, whose reserved bits are set (SDM vol. 3, 4.7), or as anything in devices. */
static void test_odd_tables(void)
{
    static const uint64_t places[] = {HOLE, 0x80000000, 0xe0000000, 0xfec00000, 0xfee00000, 0x3ffffff000};
    uint64_t keep = boot_pml4[AREA >> 39 & 511];
    unsigned faults = 0, count = 0, nowhere = 0;
    for (unsigned n = 0; n < sizeof places / sizeof *places; n++)
        for (unsigned level = 0; level < 3; level++)
            for (unsigned k = 0; k < 20; k++, count += 3) {
                uint64_t *upper = pages_allocate(1), *directory = pages_allocate(1), va = AREA + (random64() & 0x7fffffffff), entry = places[n] | RWX;
                boot_pml4[AREA >> 39 & 511] = level == 0 ? entry : physical(upper) | RWX;
                upper[va >> 30 & 511] = level == 1 ? entry : physical(directory) | RWX;
                directory[va >> 21 & 511] = entry;
                write_cr3(read_cr3());
                faults += TRY((void)*(volatile uint8_t *)va) == PF;
                nowhere += n == 0 && trap.error == (PF_P | PF_R);
                faults += TRY(*(volatile uint8_t *)va = 1) == PF;
                faults += TRY(call_with(va, 0)) == PF;
            }
    boot_pml4[AREA >> 39 & 511] = keep;
    write_cr3(read_cr3());
    check(faults <= count, "page tables in devices (%u of %u accesses fault)", faults, count);
    expect_eq(nowhere, 60, "page tables beyond RAM have reserved bits set");
}

void test_main(void)
{
    random_seed();
    test_everywhere();
    test_spaces();
    test_tables_with_code();
    test_end_of_ram();
    test_odd_code();
    test_odd_tables();
    test_endless_code();
}
