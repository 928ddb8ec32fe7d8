/*
 * String instructions: page faults half-way and the state they leave, restart, direction, address sizes, overlap, counts of zero, segments. SDM vol. 2, REP.
 */
#include "runtime/conform.h"

#define AREA 0x8000000000ull
static uint64_t pdpt[512] __attribute__((aligned(4096)));
static uint64_t pd[512] __attribute__((aligned(4096)));
static uint64_t pt[512] __attribute__((aligned(4096)));
static uint8_t frames[4][4096] __attribute__((aligned(4096)));
extern uint64_t boot_pml4[512];

struct registers {
    reg_t cx, si, di, ax;
};
static volatile struct registers at_fault;
static volatile unsigned faults;
static volatile uint64_t fault_cr2;

static void map(unsigned n, uint64_t entry)
{
    pt[n] = entry;
    invlpg((void *)(AREA + n * 4096ull));
}
static void note(struct frame *f)
{
    at_fault.cx = f->cx;
    at_fault.si = f->si;
    at_fault.di = f->di;
    at_fault.ax = f->ax;
    fault_cr2 = read_cr2();
}
static void on_fault(struct frame *f)
{
    note(f);
    faults++;
    unsigned n = (unsigned)(fault_cr2 >> 12) & 511;
    map(n, (uintptr_t)frames[n & 3] | 3);
}

#define STRING(name, text)                                                                                                                           \
    static void name(struct registers *r)                                                                                                            \
    {                                                                                                                                                \
        asm_volatile(text : "+c"(r->cx), "+S"(r->si), "+D"(r->di), "+a"(r->ax)::"memory", "cc");                                                     \
    }
STRING(rep_movsb, "rep movsb")
STRING(rep_movsq, "rep movsq")
STRING(rep_movsb_down, "std; rep movsb; cld")
STRING(rep_stosd, "rep stosl")
STRING(rep_stosb, "rep stosb")
STRING(rep_lodsb, "rep lodsb")
STRING(repne_scasb, "repne scasb")
STRING(repe_scasw, "repe scasw")
STRING(repe_cmpsb, "repe cmpsb")
STRING(repne_cmpsl, "repne cmpsl")
STRING(rep_movsb_32, "addr32 rep movsb")
STRING(rep_movsb_fs, "rep movsb %%fs:(%%rsi), (%%rdi)")
STRING(movsw_down, "std; movsw; movsw; cld")
STRING(rep_stosq_down, "std; rep stosq; cld")

static void test_restart(void)
{
    struct registers r = {.cx = 3000, .si = (reg_t)frames[3], .di = AREA + 2000};
    for (unsigned n = 0; n < 4096; n++)
        frames[3][n] = (uint8_t)(n * 7);
    map(0, (uintptr_t)frames[0] | 3);
    map(1, 0);
    trap_handlers[PF] = on_fault;
    faults = 0;
    rep_movsb(&r);
    check(faults == 1 && fault_cr2 == AREA + 4096, "REP MOVSB into a page that is not present: one fault, at its first byte");
    check(at_fault.cx == 3000 - 2096 && at_fault.di == AREA + 4096 && at_fault.si == (reg_t)frames[3] + 2096, "with RCX, RSI, RDI where it stopped (%lx)", at_fault.cx);
    check(r.cx == 0 && !memcmp((void *)(AREA + 2000), frames[3], 3000), "and it finishes after the fault");

    map(1, 0);
    faults = 0;
    r = (struct registers){.cx = 2000, .di = AREA + 100, .ax = 0xa1b2c3d4};
    rep_stosd(&r);
    check(faults == 1 && at_fault.cx == 2000 - (4096 - 100) / 4 && r.di == AREA + 8100, "REP STOSD likewise");
    map(1, 0);
    faults = 0;
    r = (struct registers){.cx = 1000, .di = AREA + 4, .ax = 0x55};
    asm_volatile("" ::: "memory");
    r.di = AREA + 4090;
    r.cx = 4;
    rep_stosq_down(&r);
    check(faults == 1 && r.di == AREA + 4090 - 32, "downwards with an element across the pages");
    map(1, 0);
    faults = 0;
    memset((void *)AREA, 0, 4096);
    memset(frames[1], 0, 4096);
    r = (struct registers){.cx = 8000, .di = AREA + 10, .ax = 0x77};
    frames[1][50] = 0x77;
    repne_scasb(&r);
    check(faults == 1 && r.di == AREA + 4096 + 51, "REPNE SCASB finds it after a fault");
    /* The last page stays absent: the state of a fault that is not mended. */
    trap_handlers[PF] = 0;
    map(1, 0);
    memset((void *)(AREA + 4000), 0, 96);
    struct registers *volatile p = &r;
    r = (struct registers){.cx = 100, .di = AREA + 4000, .si = (reg_t)frames[3]};
    expect_fault(PF, 2, "REP MOVSB with a fault", rep_movsb(p));
    expect_eq(trap.cx, 4, "RCX counts what is left");
    check(!memcmp((void *)(AREA + 4000), frames[3], 96), "what comes before the fault is done");
    r = (struct registers){.cx = 20, .si = AREA + 4096 - 13, .di = (reg_t)frames[2]};
    memset(frames[2], 0xee, 4096);
    expect_fault(PF, 0, "REP MOVSQ with a source across the pages", rep_movsq(p));
    check(trap.cx == 19 && frames[2][8] == 0xee, "one element done, no part of the second");
    map(1, (uintptr_t)frames[1] | 3);
}

static void test_direction_overlap(void)
{
    for (unsigned n = 0; n < 256; n++)
        frames[0][n] = (uint8_t)n;
    struct registers r = {.cx = 100, .si = (reg_t)frames[0], .di = (reg_t)frames[0] + 1};
    rep_movsb(&r);
    bool good = true;
    for (unsigned n = 0; n <= 100; n++)
        good &= frames[0][n] == 0;
    check(good && frames[0][101] == 101, "overlap by one spreads the byte");
    for (unsigned n = 0; n < 256; n++)
        frames[0][n] = (uint8_t)n;
    r = (struct registers){.cx = 10, .si = (reg_t)frames[0], .di = (reg_t)frames[0] + 12};
    rep_movsq(&r);
    good = true;
    for (unsigned n = 0; n < 80; n++)
        good &= frames[0][12 + n] == n % 12;
    check(good, "overlap by twelve in eights repeats a pattern");
    for (unsigned n = 0; n < 256; n++)
        frames[0][n] = (uint8_t)n;
    r = (struct registers){.cx = 100, .si = (reg_t)frames[0] + 99, .di = (reg_t)frames[0] + 109};
    rep_movsb_down(&r);
    good = r.si == (reg_t)frames[0] - 1 && r.di == (reg_t)frames[0] + 9;
    for (unsigned n = 0; n < 100; n++)
        good &= frames[0][10 + n] == n;
    check(good, "DF: a move upwards that overlaps");
    r = (struct registers){.cx = 1, .si = (reg_t)frames[0] + 50, .di = (reg_t)frames[1] + 50};
    movsw_down(&r);
    check(r.si == (reg_t)frames[0] + 46 && frames[1][48] == frames[0][48] && frames[1][51] == frames[0][51], "DF: MOVSW goes down by two");
}

static void test_counts_and_sizes(void)
{
    struct registers r = {.cx = 0, .si = 1ull << 60, .di = 1ull << 61, .ax = 1};
    reg_t flags;
    rep_movsb(&r);
    rep_stosb(&r);
    check(r.si == 1ull << 60 && r.di == 1ull << 61, "a count of zero touches nothing");
    asm_volatile("cmp %%eax, %%eax; stc; repe cmpsb; pushf; pop %0" : "=r"(flags) : "c"((reg_t)0), "S"(r.si), "D"(r.di), "a"(1) : "memory", "cc");
    check((flags & (FLAG_ZF | FLAG_CF)) == (FLAG_ZF | FLAG_CF), "nor flags");
    memcpy(frames[0], "abcdefghijklmnop", 16);
    memset(frames[1], 0, 16);
    r = (struct registers){.cx = 5 | 0xabcdull << 32, .si = (reg_t)frames[0] | 1ull << 40, .di = (reg_t)frames[1] | 1ull << 41};
    rep_movsb_32(&r);
    check(!memcmp(frames[1], "abcde\0", 6) && (uint32_t)r.cx == 0 && (uint32_t)r.di == (uint32_t)(uintptr_t)frames[1] + 5, "32-bit addresses use ECX, ESI, EDI");
    check(r.si >> 32 == 0 && r.di >> 32 == 0, "and clear the upper halves (%lx)", r.si);
    r = (struct registers){.cx = 10, .ax = 'd', .di = (reg_t)frames[0]};
    repne_scasb(&r);
    check(r.cx == 6 && r.di == (reg_t)frames[0] + 4, "REPNE SCASB stops after the match");
    memset(frames[1], 0x20, 64);
    frames[1][21] = 1;
    r = (struct registers){.cx = 30, .ax = 0x2020, .di = (reg_t)frames[1]};
    repe_scasw(&r);
    check(r.cx == 30 - 11 && r.di == (reg_t)frames[1] + 22, "REPE SCASW stops after the difference");
    memcpy(frames[1], frames[0], 32);
    frames[1][7] ^= 1;
    r = (struct registers){.cx = 20, .si = (reg_t)frames[0], .di = (reg_t)frames[1]};
    repe_cmpsb(&r);
    expect_eq(r.cx, 12, "REPE CMPSB stops after the difference");
    r = (struct registers){.cx = 3, .si = (reg_t)frames[0], .di = (reg_t)frames[2]};
    repne_cmpsl(&r);
    expect_eq(r.cx, 0, "REPNE CMPSD runs to the end without a match");
    r = (struct registers){.cx = 5, .si = (reg_t)frames[0]};
    rep_lodsb(&r);
    check((r.ax & 0xff) == 'e' && r.cx == 0, "REP LODSB leaves the last");
    wrmsr(0xc0000100, 3);
    r = (struct registers){.cx = 2, .si = (reg_t)frames[0], .di = (reg_t)frames[1]};
    rep_movsb_fs(&r);
    check(frames[1][0] == 'd' && frames[1][1] == 'e', "a segment override applies to the source");
    wrmsr(0xc0000100, 0);
}

void test_main(void)
{
    boot_pml4[1] = (uintptr_t)pdpt | 3;
    pdpt[0] = (uintptr_t)pd | 3;
    pd[0] = (uintptr_t)pt | 3;
    test_restart();
    test_direction_overlap();
    test_counts_and_sizes();
}
