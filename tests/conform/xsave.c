/*
 * x87, SSE and AVX state: FXSAVE, XSAVE and its kin with headers and init states, #NM by CR0.TS and EM, #UD by CR4 and XCR0, MXCSR's reserved bits, #MF, #XM, alignment.
 * SDM vol. 1, ch. 13; vol. 3, 2.5 and ch. 13.
 */
#include "runtime/conform.h"

#define CR0_MP 2u
#define CR0_EM 4u
#define CR0_TS 8u
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXMMEXCPT (1u << 10)
#define CR4_OSXSAVE (1u << 18)
#define BV 512
#define COMP 520

static uint8_t area[4096] __attribute__((aligned(64)));
static uint8_t other[4096] __attribute__((aligned(64)));
static uint32_t allowed;

static uint64_t get64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}
static void put64(uint8_t *p, uint64_t v)
{
    memcpy(p, &v, 8);
}
static void put32(uint8_t *p, uint32_t v)
{
    memcpy(p, &v, 4);
}
static void xsetbv(uint32_t index, uint64_t v)
{
    asm_volatile("xsetbv" ::"c"(index), "a"((uint32_t)v), "d"((uint32_t)(v >> 32)));
}
static uint64_t xgetbv(uint32_t index)
{
    uint32_t a, d;
    asm_volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(index));
    return a | (uint64_t)d << 32;
}
#define WITH_MASK(name, instruction)                                                                                                                 \
    static void name(void *p, uint64_t mask)                                                                                                         \
    {                                                                                                                                                \
        asm_volatile(instruction " (%0)" ::"r"(p), "a"((uint32_t)mask), "d"((uint32_t)(mask >> 32)) : "memory");                                     \
    }
WITH_MASK(xsave, "xsave64")
WITH_MASK(xsaveopt, "xsaveopt64")
WITH_MASK(xsavec, "xsavec64")
WITH_MASK(xrstor, "xrstor64")
#define set_xmm0(v) asm_volatile("movq %0, %%xmm0" ::"r"((uint64_t)(v)))
static uint64_t get_xmm0(void)
{
    uint64_t v;
    asm_volatile("movq %%xmm0, %0" : "=r"(v));
    return v;
}

static void test_controls(void)
{
    reg_t cr0 = read_cr0(), cr4 = read_cr4();
    static const struct {
        const char *name;
        reg_t cr0;
        int sse, x87, wait;
    } cases[] = {
        {"TS", CR0_TS, NM, NM, NO_TRAP}, {"TS and MP", CR0_TS | CR0_MP, NM, NM, NM}, {"EM", CR0_EM, UD, NM, NO_TRAP}, {"none", 0, NO_TRAP, NO_TRAP, NO_TRAP},
    };
    for (volatile unsigned n = 0; n < sizeof cases / sizeof *cases; n++) {
        write_cr0((cr0 & ~(reg_t)(CR0_TS | CR0_MP | CR0_EM)) | cases[n].cr0);
        check(TRY(asm_volatile("xorps %xmm0, %xmm0")) == cases[n].sse, "SSE with CR0.%s", cases[n].name);
        check(TRY(asm_volatile("fninit")) == cases[n].x87, "x87 with CR0.%s", cases[n].name);
        check(TRY(asm_volatile("fwait")) == cases[n].wait, "FWAIT with CR0.%s", cases[n].name);
    }
    check(TRY(write_cr0(cr0 | CR0_TS); asm_volatile("emms")) == NM, "MMX with CR0.TS");
    check(TRY(asm_volatile("fxsave %0" : "=m"(area))) == NM, "FXSAVE with CR0.TS");
    check(TRY(asm_volatile("ldmxcsr %0" ::"m"(area))) == NM, "LDMXCSR with CR0.TS");
    check(TRY(asm_volatile("lfence; prefetcht0 %0; movnti %%eax, %0" ::"m"(area[0]) : "memory")) == NO_TRAP, "LFENCE, PREFETCH, MOVNTI do not care");
    asm_volatile("clts");
    write_cr0(cr0);
    write_cr4(cr4 & ~(reg_t)CR4_OSFXSR);
    expect_fault(UD, 0, "SSE without CR4.OSFXSR", asm_volatile("xorps %xmm0, %xmm0"));
    expect_ok("MMX without CR4.OSFXSR", asm_volatile("emms"));
    write_cr4(cr4);
}

static void test_fxsave(void)
{
    expect_fault(GP, 0, "FXSAVE at an address that is not a multiple of 16", asm_volatile("fxsave %0" : "=m"(area[8])));
    memset(area, 0xcc, 512);
    asm_volatile("fninit; fld1; fldpi");
    set_xmm0(0x1122334455667788);
    asm_volatile("fxsave64 %0" : "=m"(area));
    check(area[4] == 0xc0 && (area[3] & 0x38) == 0x30 && area[32 + 9] == 0x40 && area[48 + 9] == 0x3f, "FXSAVE: abridged tags, TOP, the stack from its top");
    expect_eq(get64(area + 160), 0x1122334455667788, "FXSAVE: XMM0");
    uint32_t mask;
    memcpy(&mask, area + 28, 4);
    check(mask == 0xffff || mask == 0x2ffff, "FXSAVE: MXCSR_MASK (%x)", mask);
    put32(area + 24, 0x10000);
    expect_fault(GP, 0, "FXRSTOR with reserved bits of MXCSR", asm_volatile("fxrstor64 %0" ::"m"(area)));
    put32(area + 24, 0x1f80);
    put64(area + 160, 77);
    asm_volatile("fxrstor64 %0" ::"m"(area));
    expect_eq(get_xmm0(), 77, "FXRSTOR");
    uint32_t bad = 0x10000;
    expect_fault(GP, 0, "LDMXCSR with reserved bits", asm_volatile("ldmxcsr %0" ::"m"(bad)));
}

static void test_xsave(void)
{
    reg_t cr4 = read_cr4();
    check(!(cpuid(1, 0).c & 1u << 27), "CPUID.OSXSAVE is clear");
    expect_fault(UD, 0, "XGETBV without CR4.OSXSAVE", xgetbv(0));
    expect_fault(UD, 0, "XSAVE without CR4.OSXSAVE", xsave(area, 3));
    write_cr4(cr4 | CR4_OSXSAVE);
    check(cpuid(1, 0).c & 1u << 27, "CPUID.OSXSAVE follows CR4");
    allowed = cpuid(0xd, 0).a;
    expect_eq(xgetbv(0), 1, "XCR0 is 1 after reset");
    expect_fault(GP, 0, "XCR0 without x87", xsetbv(0, 2));
    expect_fault(GP, 0, "XCR0 with AVX without SSE", xsetbv(0, 5));
    expect_fault(GP, 0, "XCR0 with bits that CPUID does not offer", xsetbv(0, 3 | 1ull << 40));
    expect_fault(GP, 0, "XCR1", xsetbv(1, 1));
    if (allowed & 0xe0) {
        expect_fault(GP, 0, "XCR0 with part of AVX-512", xsetbv(0, 7 | 0x20));
        expect_fault(GP, 0, "XCR0 with AVX-512 without AVX", xsetbv(0, 3 | 0xe0));
    }
    if (allowed & 4)
        expect_fault(UD, 0, "AVX with XCR0 1", asm_volatile("vxorps %ymm0, %ymm0, %ymm0"));
    xsetbv(0, 3);
    expect_eq(cpuid(0xd, 0).b, 576, "CPUID 0xD EBX follows XCR0");
    xsetbv(0, allowed & 7);
    expect_fault(GP, 0, "XSAVE at an address that is not a multiple of 64", xsave(area + 16, 3));
    memset(area, 0, sizeof area);
    asm_volatile("fninit");
    set_xmm0(5);
    xsave(area, ~0ull);
    check((get64(area + BV) & 2) && get64(area + 160) == 5, "XSAVE: XSTATE_BV has SSE (%llx)", (unsigned long long)get64(area + BV));
    memset(other, 0xee, sizeof other);
    put64(other + BV, 0);
    xsave(other, 2);
    check(other[0] == 0xee && get64(other + 160) == 5 && get64(other + BV) == 2, "XSAVE of SSE only leaves x87's part");
    put64(area + BV, 0);
    xrstor(area, 2);
    expect_eq(get_xmm0(), 0, "XRSTOR of a component not in XSTATE_BV initialises it");
    set_xmm0(9);
    xrstor(area, 1);
    expect_eq(get_xmm0(), 9, "a component not asked for stays");
    put64(area + BV, 1ull << 50);
    expect_fault(GP, 0, "XRSTOR with bits beyond XCR0", xrstor(area, 3));
    put64(area + BV, 3);
    put64(area + COMP + 8, 1);
    expect_fault(GP, 0, "XRSTOR with reserved bytes of the header", xrstor(area, 3));
    put64(area + COMP + 8, 0);
    put64(area + COMP, 1);
    expect_fault(GP, 0, "XRSTOR with XCOMP_BV without its bit 63", xrstor(area, 3));
    put64(area + COMP, 0);
    put32(area + 24, 0x80000000);
    expect_fault(GP, 0, "XRSTOR with reserved bits of MXCSR", xrstor(area, 2));
    put32(area + 24, 0x1f80);
    xrstor(area, 3);
    if (allowed & 4) {
        asm_volatile("vpcmpeqb %ymm1, %ymm1, %ymm1; vzeroupper");
        memset(other, 0xee, sizeof other);
        put64(other + BV, 0);
        xsave(other, 7);
        uint32_t offset = cpuid(0xd, 2).b;
        check(offset == 576 && (other[offset + 16] == 0xee || other[offset + 16] == 0), "AVX in its initial state");
        asm_volatile("vpcmpeqb %ymm1, %ymm1, %ymm1");
        xsave(other, 7);
        check(other[offset + 16] == 0xff && (get64(other + BV) & 4), "AVX state at its offset");
        memset(other + COMP, 0, 56);
        put64(other + BV, 3);
        xrstor(other, 7);
        asm_volatile("vmovdqu %%ymm1, %0" : "=m"(area));
        check(area[0] == 0xff && area[16] == 0, "XRSTOR initialises the upper halves");
    }
    struct cpuid features = cpuid(0xd, 1);
    if (features.a & 1) {
        set_xmm0(3);
        memset(other, 0, sizeof other);
        xsaveopt(other, 3);
        expect_eq(get64(other + 160), 3, "XSAVEOPT");
        check(get64(other + BV) & 2, "XSAVEOPT sets XSTATE_BV");
    } else {
        skip("XSAVEOPT", "not offered");
    }
    if (features.a & 2) {
        asm_volatile("vzeroall");
        set_xmm0(4);
        memset(other, 0, sizeof other);
        xsavec(other, 7);
        check(get64(other + COMP) == (1ull << 63 | (allowed & 7)) && !(get64(other + BV) & 4) && get64(other + 160) == 4, "XSAVEC (%llx)",
              (unsigned long long)get64(other + COMP));
        set_xmm0(0);
        xrstor(other, 7);
        expect_eq(get_xmm0(), 4, "XRSTOR of the compacted form");
        put64(other + COMP, 1ull << 63 | 1);
        put64(other + BV, 3);
        expect_fault(GP, 0, "XSTATE_BV beyond XCOMP_BV", xrstor(other, 7));
    } else {
        skip("XSAVEC", "not offered");
    }
    if (features.a & 4)
        check(xgetbv(1) & 2, "XGETBV 1 shows SSE in use (%llx)", (unsigned long long)xgetbv(1));
    expect_fault(GP, 0, "XGETBV 2", xgetbv(2));
    write_cr0(read_cr0() | CR0_TS);
    expect_fault(NM, 0, "XSAVE with CR0.TS", xsave(area, 3));
    asm_volatile("clts");
    write_cr4(cr4);
    expect_fault(UD, 0, "AVX without CR4.OSXSAVE", asm_volatile("vxorps %xmm0, %xmm0, %xmm0"));
}

extern uint8_t mf_div[], mf_wait[];

static void user_xsetbv(reg_t arg)
{
    xsetbv(0, 1);
}

static void test_exceptions(void)
{
    uint16_t fcw = 0x37b; /* divide by zero unmasked */
    expect_fault(MF, 0, "#MF comes with the next x87 instruction",
                 asm_volatile("fninit; fldcw %0; fld1; fldz\nmf_div: fdivrp; nop\nmf_wait: fwait" ::"m"(fcw)));
    check(trap.ip == (reg_t)mf_wait, "at FWAIT");
    uint16_t fsw;
    asm_volatile("fnstsw %0; fnclex" : "=m"(fsw));
    check((fsw & 0x8084) == 0x8084, "ES, B and ZE in the status word (%x)", fsw);
    expect_ok("FNINIT and FNSTCW do not check", asm_volatile("fninit; fldcw %0; fld1; fldz; fdivrp; fnstcw %0; fninit" : "+m"(fcw)));
    uint32_t mxcsr = 0x1f80 & ~(4u << 7), normal = 0x1f80;
    write_cr4(read_cr4() | CR4_OSXMMEXCPT);
    asm_volatile("ldmxcsr %0" ::"m"(mxcsr));
    expect_fault(XM, 0, "#XM by DIVSS", asm_volatile("xorps %xmm1, %xmm1; mov $0x3f800000, %eax; movd %eax, %xmm0; divss %xmm1, %xmm0"));
    asm_volatile("stmxcsr %0" : "=m"(mxcsr));
    check(mxcsr & 4, "MXCSR.ZE is set");
    write_cr4(read_cr4() & ~(reg_t)CR4_OSXMMEXCPT);
    expect_fault(UD, 0, "#UD instead without CR4.OSXMMEXCPT", asm_volatile("xorps %xmm1, %xmm1; mov $0x3f800000, %eax; movd %eax, %xmm0; divss %xmm1, %xmm0"));
    write_cr4(read_cr4() | CR4_OSXMMEXCPT);
    asm_volatile("ldmxcsr %0" ::"m"(normal));
    expect_fault(GP, 0, "MOVAPS at an odd address", asm_volatile("movaps %0, %%xmm0" ::"m"(area[1])));
    expect_ok("MOVUPS at an odd address", asm_volatile("movups %0, %%xmm0" ::"m"(area[1])));
    expect_fault(GP, 0, "PADDB at an odd address", asm_volatile("paddb %0, %%xmm0" ::"m"(area[1])));
    expect_fault(GP, 0, "CMPXCHG16B at an odd multiple of 8", asm_volatile("cmpxchg16b %0" ::"m"(area[8]) : "rax", "rdx", "cc", "memory"));
    expect_fault(PF, 0, "MOVUPS from a page that is not present", asm_volatile("movups (%0), %%xmm0" ::"r"(0x8000000000ull)));
    write_cr4(read_cr4() | CR4_OSXSAVE);
    expect_fault(GP, 0, "XSETBV in ring 3", user_call(user_xsetbv, 0));
    write_cr4(read_cr4() & ~(reg_t)CR4_OSXSAVE);
}

void test_main(void)
{
    test_controls();
    test_fxsave();
    if (cpuid(1, 0).c & 1u << 26)
        test_xsave();
    else
        skip("XSAVE", "not offered");
    test_exceptions();
}
