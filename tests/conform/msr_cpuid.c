/*
 * CPUID against what CR4, EFER, XCR0 and the MSRs accept: features offered can be switched on, reserved bits give #GP, unknown MSRs give #GP. SDM vol. 3, 2.5 and vol. 4.
 */
#include "runtime/conform.h"

#define EFER 0xc0000080

static void test_cpuid(void)
{
    struct cpuid zero = cpuid(0, 0);
    check(zero.a >= 7, "basic leaves (%x)", zero.a);
    check(cpuid(0x80000000, 0).a >= 0x80000008, "extended leaves (%x)", cpuid(0x80000000, 0).a);
    struct cpuid one = cpuid(1, 0);
    static const struct {
        unsigned bit;
        const char *name;
    } needed[] = {{0, "FPU"}, {3, "PSE"}, {4, "TSC"}, {5, "MSR"}, {6, "PAE"}, {8, "CX8"}, {9, "APIC"}, {11, "SEP"}, {12, "MTRR"}, {13, "PGE"}, {15, "CMOV"},
                  {16, "PAT"}, {23, "MMX"}, {24, "FXSR"}, {25, "SSE"}, {26, "SSE2"}};
    for (unsigned n = 0; n < sizeof needed / sizeof *needed; n++)
        check(one.d >> needed[n].bit & 1, "CPUID offers %s", needed[n].name);
    check(cpuid(0x80000001, 0).d & 1u << 29, "long mode");
    check(cpuid(0x80000001, 0).d & 1u << 20, "NX");
    check(one.c & 1u << 31, "a hypervisor is present");
    struct cpuid sizes = cpuid(0x80000008, 0);
    check((sizes.a & 0xff) >= 36 && (sizes.a & 0xff) <= 52 && (sizes.a >> 8 & 0xff) == 48, "address sizes (%x)", sizes.a);
    struct cpuid a = cpuid(1, 5), b = cpuid(1, 9);
    check(a.a == b.a && a.d == b.d, "leaf 1 ignores ECX");
    expect_eq(one.b >> 24, 0, "the first processor's APIC ID");
}

static void test_cr4(void)
{
    struct cpuid one = cpuid(1, 0), seven = cpuid(7, 0);
    const struct {
        const char *name;
        unsigned bit;
        bool offered;
    } bits[] = {
        {"VME", 0, one.d >> 1 & 1},    {"PVI", 1, one.d >> 1 & 1},      {"TSD", 2, one.d >> 4 & 1},     {"DE", 3, one.d >> 2 & 1},
        {"PSE", 4, one.d >> 3 & 1},    {"MCE", 6, one.d >> 7 & 1},      {"PGE", 7, one.d >> 13 & 1},    {"PCE", 8, true},
        {"UMIP", 11, seven.c >> 2 & 1}, {"LA57", 12, false},            {"VMXE", 13, one.c >> 5 & 1},   {"SMXE", 14, one.c >> 6 & 1},
        {"bit 15", 15, false},         {"FSGSBASE", 16, seven.b & 1},   {"PCIDE", 17, one.c >> 17 & 1}, {"OSXSAVE", 18, one.c >> 26 & 1},
        {"bit 19", 19, seven.c >> 23 & 1}, {"SMEP", 20, seven.b >> 7 & 1}, {"PKE", 22, seven.c >> 3 & 1},
        {"CET", 23, seven.c >> 7 & 1}, {"bit 25", 25, false},           {"bit 31", 31, false},          {"bit 40", 40, false},
    };
    reg_t cr4 = read_cr4();
    for (volatile unsigned n = 0; n < sizeof bits / sizeof *bits; n++) {
        extern uint64_t boot_pd[2048];
        bool smep = bits[n].bit == 20;
        for (unsigned m = 0; smep && m < 16; m++)
            boot_pd[m] &= ~4ull;
        if (smep)
            write_cr3(read_cr3());
        int vector = TRY(write_cr4(cr4 ^ 1ul << bits[n].bit));
        bool same = vector == NO_TRAP ? read_cr4() == (cr4 ^ 1ul << bits[n].bit) : read_cr4() == cr4;
        (void)TRY(write_cr4(cr4));
        check((vector == NO_TRAP) == bits[n].offered && same, "CR4.%s is writable as CPUID says (%s)", bits[n].name, bits[n].offered ? "offered" : "not");
        for (unsigned m = 0; smep && m < 16; m++)
            boot_pd[m] |= 4;
    }
    expect_fault(GP, 0, "CR4.PAE cannot be cleared in long mode", write_cr4(cr4 & ~0x20ul));
    expect_fault(GP, 0, "CR0 with high bits", write_cr0(read_cr0() | 1ul << 32));
    expect_fault(GP, 0, "CR0.NW without CD", write_cr0(read_cr0() | 1ul << 29));
    expect_fault(GP, 0, "CR0.PG cannot be cleared in 64-bit mode", write_cr0(read_cr0() & ~(1ul << 31)));
    expect_fault(GP, 0, "CR0.PE cannot be cleared with paging", write_cr0(read_cr0() & ~1ul));
    check(read_cr0() & 0x10, "CR0.ET is one");
    expect_fault(GP, 0, "CR8 with reserved bits", write_cr8(16));
    expect_fault(GP, 0, "CR3 beyond MAXPHYADDR", write_cr3(read_cr3() | 1ul << 60));
}

static void user_rdtsc(reg_t arg)
{
    asm_volatile("rdtsc" ::: "rax", "rdx");
}
static void user_sgdt(reg_t arg)
{
    struct table_pointer p;
    asm_volatile("sgdt %0" : "=m"(p));
}
static void user_rdpmc(reg_t arg)
{
    asm_volatile("rdpmc" ::"c"(0) : "rax", "rdx");
}

static void test_efer(void)
{
    uint64_t efer = rdmsr(EFER);
    expect_fault(GP, 0, "EFER with reserved bits", wrmsr(EFER, efer | 2));
    expect_fault(GP, 0, "EFER with high bits", wrmsr(EFER, efer | 1ull << 40));
    expect_fault(GP, 0, "EFER.LME cannot change with paging", wrmsr(EFER, efer & ~0x100ull));
    wrmsr(EFER, efer & ~0x400ull);
    expect_eq(rdmsr(EFER), efer, "EFER.LMA cannot be cleared");
    check(efer & 0x400, "EFER.LMA is set");
    write_cr4(read_cr4() | 4);
    expect_fault(GP, 0, "RDTSC in ring 3 with CR4.TSD", user_call(user_rdtsc, 0));
    write_cr4(read_cr4() & ~4ul);
    expect_fault(USER_DONE, 0, "RDTSC in ring 3", user_call(user_rdtsc, 0));
    expect_fault(GP, 0, "RDPMC in ring 3 without CR4.PCE", user_call(user_rdpmc, 0));
    if (cpuid(7, 0).c & 4) {
        expect_fault(USER_DONE, 0, "SGDT in ring 3", user_call(user_sgdt, 0));
        write_cr4(read_cr4() | 1ul << 11);
        expect_fault(GP, 0, "SGDT in ring 3 with CR4.UMIP", user_call(user_sgdt, 0));
        write_cr4(read_cr4() & ~(1ul << 11));
    }
}

static void test_msrs(void)
{
    static const uint32_t unknown[] = {0x12345678, 0xc0011fff, 0x4b564d80, 0xffffffff, 0x900, 0xc0000105};
    for (volatile unsigned n = 0; n < sizeof unknown / sizeof *unknown; n++) {
        check(TRY((void)rdmsr(unknown[n])) == GP, "RDMSR of %x is #GP", unknown[n]);
        check(TRY(wrmsr(unknown[n], 0)) == GP, "WRMSR of %x is #GP", unknown[n]);
    }
    /* PAT: types 2, 3 and above 7 are reserved. */
    uint64_t pat = rdmsr(0x277);
    expect_eq(pat, 0x0007040600070406ull, "PAT after reset");
    expect_fault(GP, 0, "PAT with a reserved type", wrmsr(0x277, 2));
    expect_fault(GP, 0, "PAT with another", wrmsr(0x277, 0x0800000000000000ull));
    wrmsr(0x277, 0x0001040600070406ull);
    expect_eq(rdmsr(0x277), 0x0001040600070406ull, "PAT reads back");
    wrmsr(0x277, pat);
    /* MTRRs. */
    unsigned count = rdmsr(0xfe) & 0xff;
    check(count > 0 && count <= 8, "MTRRs (%u)", count);
    expect_fault(GP, 0, "a write to MTRRCAP", wrmsr(0xfe, 0));
    expect_fault(GP, 0, "MTRR default with a reserved type", wrmsr(0x2ff, 2));
    expect_fault(GP, 0, "a fixed MTRR with a reserved type", wrmsr(0x250, 3));
    expect_fault(GP, 0, "a variable MTRR that is not there", (void)rdmsr(0x200 + 2 * count));
    /* TSC. */
    uint64_t before = rdtsc();
    wrmsr(0x10, 1ull << 40);
    uint64_t now = rdtsc();
    check(now >= 1ull << 40 && now < (1ull << 40) + (1ull << 36), "WRMSR of the TSC");
    if (cpuid(7, 0).b & 2) {
        uint64_t adjust = rdmsr(0x3b);
        wrmsr(0x3b, 0);
        check(rdtsc() - before < 1ull << 36, "TSC_ADJUST follows a write to the TSC and takes it back (%llx)", (unsigned long long)adjust);
    }
    if (cpuid(0x80000001, 0).d & 1u << 27) {
        uint32_t aux;
        wrmsr(0xc0000103, 0x1234);
        asm_volatile("rdtscp" : "=c"(aux)::"rax", "rdx");
        expect_eq(aux, 0x1234, "RDTSCP gives TSC_AUX");
        expect_fault(GP, 0, "TSC_AUX with high bits", wrmsr(0xc0000103, 1ull << 32));
    }
    uint64_t base = rdmsr(0x1b);
    check((base & 0x900) == 0x900 && (base & ~0xfffull) == LAPIC, "APIC base: enabled, boot processor (%llx)", (unsigned long long)base);
    expect_fault(GP, 0, "APIC base with reserved bits", wrmsr(0x1b, base | 1));
    expect_fault(GP, 0, "APIC base beyond MAXPHYADDR", wrmsr(0x1b, base | 1ull << 60));
    wrmsr(0x174, 0x18);
    expect_eq(rdmsr(0x174), 0x18, "SYSENTER_CS");
    wrmsr(0x174, 0);
    expect_fault(GP, 0, "a write to MCG_CAP", wrmsr(0x179, 0));
}

void test_main(void)
{
    test_cpuid();
    test_cr4();
    test_efer();
    test_msrs();
}
