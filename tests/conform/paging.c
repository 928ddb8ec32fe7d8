/*
 * Four-level paging: error codes, accessed and dirty bits, large pages, WP, NX, SMEP, SMAP, PCID, global pages, INVLPG and INVPCID.
 * SDM vol. 3, 4.5 to 4.10.
 */
#include "runtime/conform.h"

#define P 1ull
#define W 2ull
#define U 4ull
#define A 0x20ull
#define D 0x40ull
#define LARGE 0x80ull
#define G 0x100ull
#define NX (1ull << 63)
#define CR0_WP (1u << 16)
#define CR4_PGE (1u << 7)
#define CR4_PCIDE (1u << 17)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define EFER 0xc0000080
#define EFER_NXE (1u << 11)

/* Error code bits. */
enum { E_P = 1, E_W = 2, E_U = 4, E_R = 8, E_I = 16 };

/* An area of our own: PML4 entry 1, one table of each level. */
#define AREA 0x8000000000ull
static uint64_t pdpt[512] __attribute__((aligned(4096)));
static uint64_t pd[512] __attribute__((aligned(4096)));
static uint64_t pt[512] __attribute__((aligned(4096)));
static uint8_t frames[4][4096] __attribute__((aligned(4096)));
extern uint64_t boot_pml4[512];
static uint64_t other_pml4[512] __attribute__((aligned(4096)));
static uint64_t other_pdpt[512] __attribute__((aligned(4096)));
static uint64_t other_pd[512] __attribute__((aligned(4096)));
static uint64_t other_pt[512] __attribute__((aligned(4096)));

#define PAGE(n) ((volatile uint64_t *)(AREA + (n) * 4096ull))
#define FRAME(n) ((uint64_t)(uintptr_t)frames[n])

static void flush(void)
{
    write_cr3(read_cr3());
}

static void map(unsigned n, uint64_t entry)
{
    pt[n] = entry;
    invlpg((void *)PAGE(n));
}

static void tables_reset(void)
{
    boot_pml4[1] = (uintptr_t)pdpt | P | W | U;
    pdpt[0] = (uintptr_t)pd | P | W | U;
    pd[0] = (uintptr_t)pt | P | W | U;
    flush();
}

static void load(volatile void *p)
{
    asm_volatile("movb (%0), %%al" ::"r"(p) : "rax");
}
static void store(volatile void *p)
{
    asm_volatile("movb $1, (%0)" ::"r"(p) : "memory");
}
static void jump(volatile void *p)
{
    asm_volatile("call *%0" ::"r"(p) : "memory", "rax");
}
/* In ring 3. */
static void user_load(reg_t p)
{
    load((void *)p);
}
static void user_store(reg_t p)
{
    store((void *)p);
}
static void user_jump(reg_t p)
{
    jump((void *)p);
}
/* Register-only ring 3 code, so that no other page is touched through SMAP's eyes. */
#define expect_user(vector, error, name, fn, page) expect_fault(vector, error, name, user_call(fn, (reg_t)(page)))

static void test_present_and_write(void)
{
    map(0, 0);
    expect_fault(PF, 0, "read of a page that is not present", load(PAGE(0)));
    expect_eq(trap.cr2, (reg_t)PAGE(0), "CR2 of it");
    expect_fault(PF, E_W, "write to a page that is not present", store((uint8_t *)PAGE(0) + 123));
    expect_eq(trap.cr2, (reg_t)PAGE(0) + 123, "CR2 of it");
    expect_fault(PF, 0, "fetch from a page that is not present: I says so only with NX", (wrmsr(EFER, rdmsr(EFER) & ~(uint64_t)EFER_NXE), flush(), jump(PAGE(0))));
    wrmsr(EFER, rdmsr(EFER) | EFER_NXE);
    flush();
    expect_fault(PF, E_I, "fetch from a page that is not present", jump(PAGE(0)));
    expect_user(PF, E_U, "user read of a page that is not present", user_load, PAGE(0));
    expect_user(PF, E_U | E_W, "user write to a page that is not present", user_store, PAGE(0));
    expect_user(PF, E_U | E_I, "user fetch from a page that is not present", user_jump, PAGE(0));

    map(0, FRAME(0) | P | U);
    expect_ok("read of a read-only page", load(PAGE(0)));
    expect_fault(PF, E_P | E_W, "supervisor write to a read-only page with WP", store(PAGE(0)));
    expect_user(PF, E_P | E_W | E_U, "user write to a read-only page", user_store, PAGE(0));
    write_cr0(read_cr0() & ~(reg_t)CR0_WP);
    expect_ok("supervisor write to a read-only page without WP", store(PAGE(0)));
    expect_user(PF, E_P | E_W | E_U, "user write to a read-only page without WP", user_store, PAGE(0));
    write_cr0(read_cr0() | CR0_WP);
    expect_fault(PF, E_P | E_W, "and again with WP", store(PAGE(0)));
}

static void test_user_and_upper_levels(void)
{
    map(0, FRAME(0) | P | W);
    expect_user(PF, E_P | E_U, "user read of a supervisor page", user_load, PAGE(0));
    expect_user(PF, E_P | E_U | E_W, "user write to a supervisor page", user_store, PAGE(0));
    expect_user(PF, E_P | E_U | E_I, "user fetch from a supervisor page", user_jump, PAGE(0));
    map(0, FRAME(0) | P | W | U);
    expect_user(USER_DONE, 0, "user read of a user page", user_load, PAGE(0));

    static uint64_t *const levels[] = {pd, pdpt, boot_pml4 + 1};
    static const char *const names[] = {"page directory", "pointer table", "PML4"};
    for (unsigned n = 0; n < 3; n++) {
        uint64_t keep = *levels[n];
        *levels[n] = keep & ~U;
        flush();
        (void)TRY(user_call(user_load, (reg_t)PAGE(0)));
        check(trap.vector == PF && trap.error == (E_P | E_U), "U is ANDed with the %s's", names[n]);
        *levels[n] = keep & ~W;
        flush();
        (void)TRY(store(PAGE(0)));
        check(trap.vector == PF && trap.error == (E_P | E_W), "W is ANDed with the %s's", names[n]);
        *levels[n] = keep | NX;
        flush();
        frames[0][0] = 0xc3;
        (void)TRY(jump(PAGE(0)));
        check(trap.vector == PF && trap.error == (E_P | E_I), "NX is ORed with the %s's", names[n]);
        *levels[n] = keep & ~P;
        flush();
        (void)TRY(load(PAGE(0)));
        check(trap.vector == PF && trap.error == 0, "no %s entry", names[n]);
        *levels[n] = keep;
        flush();
    }
}

static void test_nx_and_reserved(void)
{
    frames[0][0] = 0xc3;
    map(0, FRAME(0) | P | W | U);
    expect_ok("executing a page", jump(PAGE(0)));
    map(0, FRAME(0) | P | W | U | NX);
    expect_fault(PF, E_P | E_I, "executing an NX page", jump(PAGE(0)));
    expect_ok("reading an NX page", load(PAGE(0)));
    expect_user(PF, E_P | E_I | E_U, "user executing an NX page", user_jump, PAGE(0));
    wrmsr(EFER, rdmsr(EFER) & ~(uint64_t)EFER_NXE);
    flush();
    expect_fault(PF, E_P | E_R, "NX is reserved without EFER.NXE", load(PAGE(0)));
    expect_fault(PF, E_P | E_R | E_W, "the same for a write", store(PAGE(0)));
    wrmsr(EFER, rdmsr(EFER) | EFER_NXE);
    flush();
    expect_ok("and legal again", load(PAGE(0)));

    unsigned bits = cpuid(0x80000008, 0).a & 0xff;
    if (bits < 52) {
        map(0, FRAME(0) | P | W | U | 1ull << bits);
        expect_fault(PF, E_P | E_R, "an address beyond MAXPHYADDR", load(PAGE(0)));
        expect_user(PF, E_P | E_R | E_U | E_W, "the same by a user's write", user_store, PAGE(0));
        map(0, 1ull << bits);
        expect_fault(PF, 0, "no reserved bits without P", load(PAGE(0)));
    }
    map(0, FRAME(0) | P | W | U);
    uint64_t keep = boot_pml4[1];
    boot_pml4[1] |= LARGE;
    flush();
    expect_fault(PF, E_P | E_R, "PS in the PML4 is reserved", load(PAGE(0)));
    boot_pml4[1] = keep;
    pd[1] = 0x200000 | 0x2000 | P | W | LARGE;
    flush();
    expect_fault(PF, E_P | E_R, "low address bits of a 2 MiB page are reserved", load((void *)(AREA + 0x200000)));
    pd[1] = 0x200000 | 0x1000 | P | W | LARGE;
    flush();
    expect_ok("but bit 12 is PAT", load((void *)(AREA + 0x200000)));
    pd[1] = 0;
    flush();
}

static void test_accessed_dirty(void)
{
    map(0, FRAME(0) | P | W);
    pd[0] &= ~A;
    pdpt[0] &= ~A;
    boot_pml4[1] &= ~A;
    flush();
    load(PAGE(0));
    expect_eq(pt[0], FRAME(0) | P | W | A, "a read sets A");
    check((pd[0] & A) && (pdpt[0] & A) && (boot_pml4[1] & A), "a read sets A in upper levels");
    check(!(pd[0] & D), "no D in upper levels");
    store(PAGE(0));
    expect_eq(pt[0], FRAME(0) | P | W | A | D, "a write after a read sets D");
    map(0, FRAME(0) | P | W);
    store(PAGE(0));
    expect_eq(pt[0], FRAME(0) | P | W | A | D, "a write sets A and D");
    map(0, FRAME(0) | P | W);
    frames[0][0] = 0xc3;
    jump(PAGE(0));
    expect_eq(pt[0], FRAME(0) | P | W | A, "a fetch sets A");
    map(0, FRAME(0) | P | U);
    (void)TRY(store(PAGE(0)));
    check(!(pt[0] & D), "a write that faults sets no D");
    map(0, FRAME(0) | P | W);
    asm_volatile("lock addb $0, (%0)" ::"r"(PAGE(0)) : "memory");
    expect_eq(pt[0], FRAME(0) | P | W | A | D, "a locked read-modify-write sets D");
    map(0, FRAME(0) | P | W);
    asm_volatile("lock cmpxchgb %%cl, (%0)" ::"r"(PAGE(0)), "a"(1), "c"(0) : "memory", "cc");
    expect_eq(pt[0], FRAME(0) | P | W | A | D, "CMPXCHG that fails to compare sets D");
    map(0, FRAME(0) | P | W | A | D);
    load(PAGE(0));
    pt[0] &= ~D;
    invlpg((void *)PAGE(0));
    store(PAGE(0));
    check(pt[0] & D, "D is set again after INVLPG");
}

static void test_crossing(void)
{
    map(0, FRAME(0) | P | W);
    map(1, FRAME(2) | P | W);
    *(volatile uint64_t *)((uintptr_t)PAGE(1) - 3) = 0x1122334455667788ull;
    check(frames[0][4093] == 0x88 && frames[0][4095] == 0x66 && frames[2][0] == 0x55 && frames[2][4] == 0x11, "a write across pages that are apart");
    expect_eq(*(volatile uint64_t *)((uintptr_t)PAGE(1) - 3), 0x1122334455667788ull, "a read across them");
    map(1, 0);
    frames[0][4093] = 1;
    expect_fault(PF, E_W, "a write across, second page not present", *(volatile uint64_t *)((uintptr_t)PAGE(1) - 3) = 0);
    expect_eq(trap.cr2, (reg_t)PAGE(1), "CR2 is in the second page");
    expect_eq(frames[0][4093], 1, "nothing was written to the first page");
    frames[0][4094] = 0x48; /* mov rax, imm64 begins in the first page */
    frames[0][4095] = 0xb8;
    expect_fault(PF, E_I, "an instruction across, second page not present", jump((uint8_t *)PAGE(1) - 2));
    expect_eq(trap.cr2, (reg_t)PAGE(1), "CR2 is in the second page");
    expect_eq(trap.ip, (reg_t)PAGE(1) - 2, "RIP is the instruction's");
    map(1, FRAME(2) | P | W);
    memset(frames[2], 0x90, 8);
    frames[2][8] = 0xc3;
    expect_ok("an instruction across two pages", jump((uint8_t *)PAGE(1) - 2));
}

static void test_large(void)
{
    uint64_t target = 0x4000000; /* 64 MiB: RAM that nothing else uses */
    pd[1] = target | P | W | U | LARGE;
    flush();
    volatile uint32_t *window = (void *)(AREA + 0x200000);
    window[0] = 1;
    window[0x1ffffc / 4] = 2;
    check(*(volatile uint32_t *)target == 1 && *(volatile uint32_t *)(target + 0x1ffffc) == 2, "a 2 MiB page maps all of its bytes");
    check((pd[1] & (A | D)) == (A | D), "A and D in the directory entry");
    pd[1] = target | P | U | LARGE;
    invlpg((void *)(window + 0x1000));
    expect_fault(PF, E_P | E_W, "INVLPG anywhere in a large page drops all of it (first)", window[0] = 1);
    expect_fault(PF, E_P | E_W, "INVLPG anywhere in a large page drops all of it (last)", window[0x1ffffc / 4] = 1);
    if (cpuid(0x80000001, 0).d & 1u << 26) {
        pdpt[1] = 0 | P | W | LARGE;
        flush();
        window = (void *)(AREA + (1ull << 30) + target);
        expect_eq(window[0], 1, "a 1 GiB page");
        check((pdpt[1] & (A | D)) == A, "A in the pointer entry");
        pdpt[1] = 0x2000000 | P | W | LARGE;
        flush();
        expect_fault(PF, E_P | E_R, "low address bits of a 1 GiB page are reserved", load(window));
        pdpt[1] = 0;
    }
    pd[1] = 0;
    flush();
}

static void test_smep(void)
{
    if (!(cpuid(7, 0).b & 1u << 7)) {
        skip("SMEP", "not offered");
        return;
    }
    frames[0][0] = 0xc3;
    map(0, FRAME(0) | P | W | U);
    map(1, FRAME(1) | P | W);
    /* Our own code lies in user pages: make them the supervisor's meanwhile. */
    extern uint64_t boot_pd[2048];
    for (unsigned n = 0; n < 16; n++)
        boot_pd[n] &= ~U;
    flush();
    write_cr4(read_cr4() | CR4_SMEP);
    expect_fault(PF, E_P | E_I, "SMEP: supervisor fetch from a user page", jump(PAGE(0)));
    expect_ok("SMEP: supervisor read of a user page", load(PAGE(0)));
    wrmsr(EFER, rdmsr(EFER) & ~(uint64_t)EFER_NXE);
    map(2, 0);
    expect_fault(PF, E_I, "SMEP: I is reported without NXE too", jump(PAGE(2)));
    wrmsr(EFER, rdmsr(EFER) | EFER_NXE);
    write_cr4(read_cr4() & ~(reg_t)CR4_SMEP);
    expect_ok("without SMEP: supervisor fetch from a user page", jump(PAGE(0)));
    for (unsigned n = 0; n < 16; n++)
        boot_pd[n] |= U;
    flush();
}

static void test_smap(void)
{
    if (!(cpuid(7, 0).b & 1u << 20)) {
        skip("SMAP", "not offered");
        return;
    }
    extern uint64_t boot_pd[2048];
    expect_fault(NO_TRAP, 0, "STAC is legal without CR4.SMAP", asm_volatile("stac; clac"));
    for (unsigned n = 0; n < 16; n++)
        boot_pd[n] &= ~U;
    map(0, FRAME(0) | P | W | U);
    map(1, FRAME(1) | P | W);
    flush();
    write_cr4(read_cr4() | CR4_SMAP);
    expect_fault(PF, E_P, "SMAP: read of a user page", load(PAGE(0)));
    expect_fault(PF, E_P | E_W, "SMAP: write to a user page", store(PAGE(0)));
    expect_ok("SMAP: a supervisor page", store(PAGE(1)));
    expect_ok("SMAP with AC: read and write", asm_volatile("stac"); load(PAGE(0)); store(PAGE(0)); asm_volatile("clac"));
    expect_fault(PF, E_P, "SMAP after CLAC", asm_volatile("stac"); load(PAGE(0)); asm_volatile("clac"); load(PAGE(0)));
    expect_fault(PF, E_P, "SMAP: AC by POPF", flags_write(2 | FLAG_AC); load(PAGE(0)); flags_write(2); load(PAGE(0)));
    frames[0][0] = 0xc3;
    expect_ok("SMAP: fetching from a user page is SMEP's matter", jump(PAGE(0)));
    /* Implicit supervisor accesses fail even with AC. */
    gdt[FREE_SELECTOR / 8] = descriptor(0, 0xfff, 0x82);
    gdt[FREE_SELECTOR / 8] |= (AREA & 0xffffff) << 16;
    gdt[FREE_SELECTOR / 8 + 1] = AREA >> 32;
    memcpy(frames[0], &gdt[KDATA / 8], 8);
    asm_volatile("lldt %w0" ::"r"(FREE_SELECTOR));
    expect_fault(PF, E_P, "SMAP: descriptor reads ignore AC", asm_volatile("stac; mov %0, %%fs" ::"r"(4)));
    asm_volatile("lldt %w0" ::"r"(0));
    write_cr4(read_cr4() & ~(reg_t)CR4_SMAP);
    expect_ok("without SMAP again", load(PAGE(0)));
    for (unsigned n = 0; n < 16; n++)
        boot_pd[n] |= U;
    flush();
}

static void test_global(void)
{
    *(uint64_t *)frames[0] = 100;
    *(uint64_t *)frames[1] = 200;
    map(0, FRAME(0) | P | W | G);
    map(1, FRAME(0) | P | W);
    check(*PAGE(0) == 100 && *PAGE(1) == 100, "two mappings of a page");
    pt[0] = FRAME(1) | P | W | G;
    pt[1] = FRAME(1) | P | W;
    flush();
    expect_eq(*PAGE(1), 200, "CR3 load drops a page that is not global");
    uint64_t seen = *PAGE(0);
    check(seen == 100 || seen == 200, "a global page may stay");
    write_cr4(read_cr4() ^ CR4_PGE);
    expect_eq(*PAGE(0), 200, "clearing CR4.PGE drops global pages");
    write_cr4(read_cr4() ^ CR4_PGE);
    pt[0] = FRAME(0) | P | W | G;
    invlpg((void *)PAGE(0));
    expect_eq(*PAGE(0), 100, "INVLPG drops a global page");
    map(0, 0);
}

static void invpcid(reg_t type, uint64_t pcid, const volatile void *address)
{
    uint64_t descriptor[2] = {pcid, (reg_t)address};
    asm_volatile("invpcid %0, %1" ::"m"(descriptor), "r"(type) : "memory");
}

static void test_pcid(void)
{
    if (!(cpuid(1, 0).c & 1u << 17)) {
        skip("PCID", "not offered");
        return;
    }
    reg_t cr3 = read_cr3();
    memcpy(other_pml4, boot_pml4, sizeof other_pml4);
    other_pml4[1] = (uintptr_t)other_pdpt | P | W | U;
    other_pdpt[0] = (uintptr_t)other_pd | P | W | U;
    other_pd[0] = (uintptr_t)other_pt | P | W | U;
    other_pt[0] = FRAME(1) | P | W;
    reg_t other = (reg_t)other_pml4 | 5, first = cr3;
    map(0, FRAME(0) | P | W);
    expect_fault(GP, 0, "CR4.PCIDE needs CR3[11:0] to be zero", write_cr3(cr3 | 8); write_cr4(read_cr4() | CR4_PCIDE));
    write_cr3(cr3);
    expect_ok("CR4.PCIDE", write_cr4(read_cr4() | CR4_PCIDE));
    check(*PAGE(0) == 100, "address space 0");
    write_cr3(other);
    check(*PAGE(0) == 200, "address space 5");
    expect_eq(read_cr3(), other, "CR3 reads back with the PCID");
    write_cr3(first | 1ull << 63);
    expect_eq(read_cr3(), first, "bit 63 is not stored");
    check(*PAGE(0) == 100, "address space 0 again, kept");
    write_cr3(other | 1ull << 63);
    check(*PAGE(0) == 200, "address space 5 again, kept");
    other_pt[0] = FRAME(0) | P | W;
    write_cr3(other);
    check(*PAGE(0) == 100, "a load without bit 63 drops the PCID's entries");
    if (cpuid(7, 0).b & 1u << 10) {
        other_pt[0] = FRAME(1) | P | W;
        invpcid(0, 5, PAGE(0));
        check(*PAGE(0) == 200, "INVPCID 0: an address");
        write_cr3(first | 1ull << 63);
        other_pt[0] = FRAME(0) | P | W;
        invpcid(1, 5, 0);
        write_cr3(other | 1ull << 63);
        check(*PAGE(0) == 100, "INVPCID 1: another address space");
        other_pt[0] = FRAME(1) | P | W | G;
        invpcid(3, 0, 0);
        check(*PAGE(0) == 200, "INVPCID 3: all but global");
        other_pt[0] = FRAME(0) | P | W;
        invpcid(2, 0, 0);
        check(*PAGE(0) == 100, "INVPCID 2: all with global");
        expect_fault(GP, 0, "INVPCID of a type that is not defined", invpcid(4, 0, 0));
        expect_fault(GP, 0, "INVPCID with reserved bits", invpcid(1, 0x1000, 0));
        expect_fault(GP, 0, "INVPCID 0 of an address that is not canonical", invpcid(0, 5, (void *)(1ull << 52)));
        expect_fault(GP, 0, "INVPCID in ring 3", user_call((void (*)(reg_t))(void *)invpcid, 2));
    }
    expect_fault(GP, 0, "CR0.PG may not be cleared with PCIDE", write_cr0(read_cr0() & ~0x80000000ul));
    write_cr3(first);
    expect_ok("CR4.PCIDE off", write_cr4(read_cr4() & ~(reg_t)CR4_PCIDE));
    expect_eq(*PAGE(0), 100, "back in the first address space");
}

static void test_canonical(void)
{
    volatile uint8_t *bad = (void *)0x0000800000000000ull;
    expect_fault(GP, 0, "a read that is not canonical", load(bad));
    tss.ist[0] = (reg_t)kernel_stack;
    idt[SS].ist = idt[GP].ist = 1;
    expect_fault(SS, 0, "through RSP it is #SS", asm_volatile("mov %%rsp, %%rbx; mov %0, %%rsp; mov (%%rsp), %%al" ::"r"(bad) : "rbx", "rax"));
    expect_fault(SS, 0, "through RBP too", asm_volatile("push %%rbp; mov %0, %%rbp; mov 0(%%rbp), %%al" ::"r"(bad) : "rax"));
    idt[SS].ist = idt[GP].ist = 0;
    expect_fault(GP, 0, "a jump that is not canonical", jump(bad));
    expect_fault(PF, 0, "the last canonical byte of the lower half", load(bad - 1));
    expect_fault(GP, 0, "an access that crosses out of the lower half", *(volatile uint32_t *)(bad - 2));
    expect_fault(PF, 0, "the first canonical byte of the upper half", load((void *)0xffff800000000000ull));
}

void test_main(void)
{
    tables_reset();
    test_present_and_write();
    test_user_and_upper_levels();
    test_nx_and_reserved();
    test_accessed_dirty();
    test_crossing();
    test_large();
    test_smep();
    test_smap();
    test_global();
    test_pcid();
    test_canonical();
}
