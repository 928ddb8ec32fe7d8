/*
 * Paging outside long mode: two-level tables with 4 MiB pages, and PAE with its four registers. SDM vol. 3, 4.3 and 4.4.
 */
#include "runtime/conform.h"

#define P 1u
#define W 2u
#define U 4u
#define A 0x20u
#define D 0x40u
#define LARGE 0x80u
#define CR0_PG 0x80000000u
#define CR0_WP 0x10000u
#define CR4_PSE 0x10u
#define CR4_PAE 0x20u
#define EFER 0xc0000080
#define EFER_NXE 0x800

enum { E_P = 1, E_W = 2, E_U = 4, E_R = 8, E_I = 16 };

static uint32_t directory[1024] __attribute__((aligned(4096)));
static uint32_t identity[4][1024] __attribute__((aligned(4096))); /* 16 MiB in small pages, open to ring 3 */
static uint32_t table[1024] __attribute__((aligned(4096)));
static uint64_t pointers[4] __attribute__((aligned(32)));
static uint64_t pae_pd[2][512] __attribute__((aligned(4096)));
static uint64_t pae_pt[512] __attribute__((aligned(4096)));
static uint8_t frames[2][4096] __attribute__((aligned(4096)));
#define FRAME(n) ((uint32_t)(uintptr_t)frames[n])
#define AREA 0x40000000u
#define AREA_AT(n) ((volatile uint8_t *)(AREA + (n)))

static void flush(void)
{
    write_cr3(read_cr3());
}
static void load(volatile void *p)
{
    asm_volatile("movb (%0), %%al" ::"r"(p) : "eax");
}
static void store(volatile void *p)
{
    asm_volatile("movb $1, (%0)" ::"r"(p) : "memory");
}
static void jump(volatile void *p)
{
    asm_volatile("call *%0" ::"r"(p) : "memory");
}
static void user_load(reg_t p)
{
    load((void *)p);
}
static void user_store(reg_t p)
{
    store((void *)p);
}

static void test_two_levels(void)
{
    for (unsigned n = 0; n < 4096; n++)
        identity[n / 1024][n % 1024] = n << 12 | P | W | U;
    for (unsigned n = 0; n < 4; n++)
        directory[n] = (uint32_t)(uintptr_t)identity[n] | P | W | U;
    directory[AREA >> 22] = (uint32_t)(uintptr_t)table | P | W | U;
    write_cr3((reg_t)directory);
    expect_ok("paging on", write_cr0(read_cr0() | CR0_PG | CR0_WP));
    expect_fault(PF, 0, "read of a page that is not present", load(AREA_AT(5)));
    expect_eq(trap.cr2, AREA + 5, "CR2 of it");
    expect_fault(PF, 0, "fetch: no I outside PAE with NX", jump(AREA_AT(0)));
    table[0] = FRAME(0) | P;
    expect_ok("read of a supervisor page", load(AREA_AT(0)));
    expect_eq(table[0], FRAME(0) | P | A, "A is set");
    check(directory[AREA >> 22] & A, "A is set in the directory");
    expect_fault(PF, E_P | E_W, "write to a read-only page, WP", store(AREA_AT(0)));
    write_cr0(read_cr0() & ~CR0_WP);
    expect_ok("the same without WP", store(AREA_AT(0)));
    check(table[0] & D, "D is set");
    write_cr0(read_cr0() | CR0_WP);
    expect_fault(PF, E_P | E_U, "user read of it", user_call(user_load, AREA));
    table[0] = FRAME(0) | P | U;
    invlpg((void *)AREA);
    expect_fault(USER_DONE, 0, "user read of a user page", user_call(user_load, AREA));
    expect_fault(PF, E_P | E_U | E_W, "user write to a read-only page", user_call(user_store, AREA));

    directory[(AREA >> 22) + 1] = 0x4000000 | P | W | LARGE;
    volatile uint32_t *large = (void *)(AREA + 0x400000);
    large[0x3ffffc / 4] = 77;
    large[0] = 66;
    write_cr0(read_cr0() & ~CR0_PG);
    check(*(volatile uint32_t *)0x43ffffc == 77 && *(volatile uint32_t *)0x4000000 == 66, "a 4 MiB page");
    write_cr0(read_cr0() | CR0_PG);
    check((directory[(AREA >> 22) + 1] & (A | D)) == (A | D), "A and D in its entry");
    directory[(AREA >> 22) + 1] |= 1u << 21;
    flush();
    expect_fault(PF, E_P | E_R, "bit 21 of a 4 MiB page's entry is reserved", load(large));
    directory[(AREA >> 22) + 1] = (uint32_t)(uintptr_t)table | P | W | LARGE; /* without PSE: a table whose address has no bit 7 */
    write_cr4(read_cr4() & ~CR4_PSE);
    expect_ok("without CR4.PSE the bit means nothing", load(large));
    write_cr4(read_cr4() | CR4_PSE);
    write_cr0(read_cr0() & ~CR0_PG);
}

static void test_pae(void)
{
    for (unsigned n = 0; n < 8; n++)
        pae_pd[0][n] = n << 21 | P | W | U | LARGE;
    pae_pd[1][0] = (uint32_t)(uintptr_t)pae_pt | P | W | U;
    pointers[0] = (uint32_t)(uintptr_t)pae_pd[0] | P;
    pointers[1] = (uint32_t)(uintptr_t)pae_pd[1] | P;
    write_cr4(read_cr4() | CR4_PAE);
    write_cr3((reg_t)pointers);
    expect_ok("PAE paging on", write_cr0(read_cr0() | CR0_PG));
    expect_fault(PF, 0, "read of a page that is not present", load(AREA_AT(0)));
    pae_pt[0] = FRAME(0) | P | W | U;
    frames[0][9] = 99;
    expect_eq(*AREA_AT(9), 99, "a 4 KiB page");
    check((pae_pt[0] & (A | D)) == A && (pae_pd[1][0] & A), "A in both levels");
    check(!(pointers[1] & A), "no A in the pointer table");
    pointers[1] = 0;
    invlpg((void *)AREA);
    expect_ok("the pointers are registers: memory is not read", load(AREA_AT(0)));
    expect_fault(PF, 0, "until CR3 is loaded", flush(); load(AREA_AT(0)));
    pointers[1] = (uint32_t)(uintptr_t)pae_pd[1] | P | W;
    expect_fault(GP, 0, "reserved bits in a pointer: #GP by MOV to CR3", flush());
    pointers[1] = (uint32_t)(uintptr_t)pae_pd[1] | P;
    expect_ok("and well again", flush(); load(AREA_AT(0)));
    pointers[2] = ~0ull & ~1ull;
    expect_ok("reserved bits are ignored without P", flush());
    pointers[2] = 0;

    pae_pt[0] |= 1ull << 63;
    invlpg((void *)AREA);
    expect_fault(PF, E_P | E_R, "bit 63 is reserved without NXE", load(AREA_AT(0)));
    wrmsr(EFER, rdmsr(EFER) | EFER_NXE);
    flush();
    frames[0][0] = 0xc3;
    expect_ok("read of an NX page", load(AREA_AT(0)));
    expect_fault(PF, E_P | E_I, "fetch from an NX page", jump(AREA_AT(0)));
    pae_pt[0] &= ~(1ull << 63);
    flush();
    expect_ok("fetch without NX", jump(AREA_AT(0)));
    pae_pt[0] |= 1ull << 62;
    flush();
    expect_fault(PF, E_P | E_R, "bit 62 is reserved", load(AREA_AT(0)));
    pae_pt[0] = FRAME(0) | P | W;
    flush();
    expect_fault(PF, E_P | E_U | E_W, "user write to a supervisor page", user_call(user_store, AREA));
    pae_pd[1][1] = 0x4000000 | P | W | LARGE;
    expect_eq(*(volatile uint32_t *)(AREA + 0x200000), 66, "a 2 MiB page");
    pae_pd[1][1] |= 1u << 14;
    flush();
    expect_fault(PF, E_P | E_R, "low address bits of a 2 MiB page are reserved", load(AREA_AT(0x200000)));
    expect_fault(GP, 0, "CR4.PCIDE outside long mode", write_cr4(read_cr4() | 1u << 17));
    write_cr0(read_cr0() & ~CR0_PG);
    write_cr4(read_cr4() & ~CR4_PAE);
    wrmsr(EFER, rdmsr(EFER) & ~(uint64_t)EFER_NXE);
    check(true, "back without paging");
    expect_fault(GP, 0, "CR0.PG without PE", write_cr0((read_cr0() | CR0_PG) & ~1u));
}

void test_main(void)
{
    test_two_levels();
    test_pae();
}
