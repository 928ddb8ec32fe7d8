/*
 * What cannot be compared with the host instruction by instruction: branches, the flags register and its privileges, 16-bit and 32-bit modes,
 * repeated strings that are interrupted or fault half-way, string I/O. Decimal adjustment is compared with the host in a 32-bit code segment.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cmocka.h>

#include "native_compare.h"

#define LOW_ADDRESS 0x7f000000ull /* for 32-bit code */

static struct compare *compare;
static struct compare_state s;

#define RUN(...) \
    compare_run_guest(compare, (const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}), &s)

static struct icpu *cpu(void)
{
    return compare_cpu(compare);
}

static uint64_t rip(void)
{
    return cpu()->v.cpu.gpr[GPR_RIP];
}

static void fresh(unsigned code_bits)
{
    memset(&s, 0, sizeof s);
    s.gpr[GPR_RSP] = COMPARE_AREA + 0x800;
    s.rflags = 0;
    compare_set_mode(compare, code_bits);
    cpu()->cpl = 0;
    cpu()->slow = false;
    cpu()->v.cpu.interrupt_shadow = false;
    atomic_store(&cpu()->v.attention, 0);
    memset(compare_guest_memory(compare), 0, COMPARE_BYTES);
}

static void *at(uint64_t gva)
{
    return compare_guest_memory(compare) + (gva - COMPARE_AREA);
}

static uint64_t load64(uint64_t gva)
{
    uint64_t value;
    memcpy(&value, at(gva), 8);
    return value;
}

/* ---- branches ---- */

static void test_jcc(void **state)
{
    /* rflags that make the even condition of each pair true */
    static const uint64_t holds[8] = {RFLAGS_OF, RFLAGS_CF, RFLAGS_ZF, RFLAGS_ZF, RFLAGS_SF, RFLAGS_PF, RFLAGS_OF, RFLAGS_ZF};
    fresh(64);
    for (unsigned cc = 0; cc < 16; cc++) {
        for (unsigned on = 0; on < 2; on++) {
            s.rflags = on ? holds[cc / 2] : 0;
            bool taken = on != (cc & 1);
            assert_true(RUN(0x70 + cc, 0x20));
            assert_int_equal(rip(), 0x1002 + (taken ? 0x20 : 0));
            s.rflags = on ? holds[cc / 2] : 0;
            assert_true(RUN(0x0f, 0x80 + cc, 0xf0, 0xff, 0xff, 0xff));
            assert_int_equal(rip(), 0x1006 - (taken ? 0x10 : 0));
        }
    }
}

static void test_call_and_return(void **state)
{
    fresh(64);
    assert_true(RUN(0xe8, 0x00, 0x01, 0x00, 0x00));
    assert_int_equal(rip(), 0x1105);
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x7f8);
    assert_int_equal(load64(COMPARE_AREA + 0x7f8), 0x1005);
    assert_true(RUN(0xc2, 0x10, 0x00));
    assert_int_equal(rip(), 0x1005);
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x810);

    s.gpr[GPR_RAX] = 0x8000000000000000; /* not canonical: nothing is pushed */
    assert_false(RUN(0xff, 0xd0));
    assert_int_equal(cpu()->fault.vector, VECTOR_GP);
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x810);
    s.gpr[GPR_RAX] = 0x12345678;
    assert_true(RUN(0xff, 0xd0));
    assert_int_equal(rip(), 0x12345678);
    s.gpr[GPR_RSP] = COMPARE_AREA + COMPARE_BYTES; /* return from unmapped memory */
    assert_false(RUN(0xc3));
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + COMPARE_BYTES);
}

static void test_loops(void **state)
{
    fresh(64);
    s.gpr[GPR_RCX] = 0x100000001;
    assert_true(RUN(0xe2, 0x10));
    assert_int_equal(rip(), 0x1012);
    assert_int_equal(s.gpr[GPR_RCX], 0x100000000);
    s.gpr[GPR_RCX] = 0xff00000001;
    assert_true(RUN(0x67, 0xe2, 0x10)); /* ECX: reaches zero */
    assert_int_equal(rip(), 0x1003);
    assert_int_equal(s.gpr[GPR_RCX], 0);
    s.gpr[GPR_RCX] = 5;
    s.rflags = RFLAGS_ZF;
    assert_true(RUN(0xe0, 0x10)); /* loopne */
    assert_int_equal(rip(), 0x1002);
    assert_int_equal(s.gpr[GPR_RCX], 4);
    assert_true(RUN(0xe1, 0x10)); /* loope */
    assert_int_equal(rip(), 0x1012);
    s.gpr[GPR_RCX] = 0x100000000;
    assert_true(RUN(0xe3, 0x10));
    assert_int_equal(rip(), 0x1002);
    assert_true(RUN(0x67, 0xe3, 0x10));
    assert_int_equal(rip(), 0x1013);
    fresh(16);
    s.gpr[GPR_RCX] = 0x10000;
    assert_true(RUN(0xe2, 0x10)); /* CX wraps, the rest stays */
    assert_int_equal(rip(), 0x1012);
    assert_int_equal(s.gpr[GPR_RCX], 0x1ffff);
}

static void test_code_limit(void **state)
{
    fresh(32);
    cpu()->v.cpu.seg[SEG_CS].limit = 0x1fff;
    assert_true(RUN(0xe9, 0x00, 0x08, 0x00, 0x00));
    assert_int_equal(rip(), 0x1805);
    assert_false(RUN(0xe8, 0x00, 0x20, 0x00, 0x00));
    assert_int_equal(cpu()->fault.vector, VECTOR_GP);
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x800);
    fresh(16);
    assert_true(RUN(0xe9, 0x00, 0xf0)); /* IP wraps at 64 KiB */
    assert_int_equal(rip(), 0x0003);
}

/* ---- the stack in legacy modes ---- */

static void test_stack_sizes(void **state)
{
    fresh(16);
    cpu()->v.cpu.seg[SEG_SS].base = COMPARE_AREA;
    interp_mode_changed(cpu());
    s.gpr[GPR_RSP] = 0xabcd0002;
    s.gpr[GPR_RAX] = 0x11112222;
    assert_true(RUN(0x50)); /* push ax */
    assert_int_equal(s.gpr[GPR_RSP], 0xabcd0000);
    assert_true(RUN(0x66, 0x50)); /* push eax: SP wraps, ESP's upper half stays */
    assert_int_equal(s.gpr[GPR_RSP], 0xabcdfffc);
    uint32_t pushed;
    memcpy(&pushed, at(COMPARE_AREA + 0xfffc), 4);
    assert_int_equal(pushed, 0x11112222);

    fresh(32);
    for (unsigned n = 0; n < 8; n++)
        if (n != GPR_RSP)
            s.gpr[n] = 0x1000 + n;
    assert_true(RUN(0x60)); /* pushad */
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x7e0);
    for (unsigned n = 0; n < 8; n++) {
        memcpy(&pushed, at(COMPARE_AREA + 0x800 - 4 - 4 * n), 4);
        assert_int_equal(pushed, n == GPR_RSP ? COMPARE_AREA + 0x800 : 0x1000 + n);
        if (n != GPR_RSP)
            s.gpr[n] = 0;
    }
    assert_true(RUN(0x61)); /* popad */
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x800);
    assert_int_equal(s.gpr[GPR_RDI], 0x1007);
    assert_int_equal(s.gpr[GPR_RAX], 0x1000);
}

/* POP into memory addressed by RSP: with RSP as it is after the pop. */
static void test_pop_to_stack(void **state)
{
    fresh(64);
    uint64_t value = 0x77;
    memcpy(at(COMPARE_AREA + 0x800), &value, 8);
    assert_true(RUN(0x8f, 0x44, 0x24, 0x10));
    assert_int_equal(load64(COMPARE_AREA + 0x818), 0x77);
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x808);
    s.gpr[GPR_RSP] = COMPARE_AREA + COMPARE_BYTES - 8; /* reads the last quadword, would write beyond it */
    assert_false(RUN(0x8f, 0x04, 0x24));
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + COMPARE_BYTES - 8);
}

static void test_enter_leave(void **state)
{
    fresh(64);
    s.gpr[GPR_RBP] = COMPARE_AREA + 0x900;
    uint64_t outer = 0x5555;
    memcpy(at(COMPARE_AREA + 0x8f8), &outer, 8);
    assert_true(RUN(0xc8, 0x20, 0x00, 0x02));
    assert_int_equal(s.gpr[GPR_RBP], COMPARE_AREA + 0x7f8);
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x7f8 - 16 - 0x20);
    assert_int_equal(load64(COMPARE_AREA + 0x7f8), COMPARE_AREA + 0x900);
    assert_int_equal(load64(COMPARE_AREA + 0x7f0), 0x5555);
    assert_int_equal(load64(COMPARE_AREA + 0x7e8), COMPARE_AREA + 0x7f8);
    assert_true(RUN(0xc9));
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x800);
    assert_int_equal(s.gpr[GPR_RBP], COMPARE_AREA + 0x900);
    s.gpr[GPR_RSP] = COMPARE_AREA + 0x20; /* the locals would be on the unmapped page below */
    assert_false(RUN(0xc8, 0x40, 0x00, 0x00));
    assert_int_equal(s.gpr[GPR_RSP], COMPARE_AREA + 0x20);
    assert_int_equal(s.gpr[GPR_RBP], COMPARE_AREA + 0x900);
}

/* ---- the flags register ---- */

static uint64_t popf(uint64_t value, uint64_t before, unsigned cpl)
{
    s.rflags = before;
    s.gpr[GPR_RSP] = COMPARE_AREA + 0x800;
    memcpy(at(COMPARE_AREA + 0x800), &value, 8);
    cpu()->cpl = cpl;
    bool ran = RUN(0x9d);
    assert_true(ran);
    return s.rflags;
}

static void test_popf_privilege(void **state)
{
    uint64_t iopl1 = 1 << 12;
    fresh(64);
    uint64_t everything = RFLAGS_OSZAPC | RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_AC | RFLAGS_ID;
    assert_int_equal(popf(~0ull, 0, 0), everything);
    fresh(64);
    assert_int_equal(popf(~0ull, 0, 3), everything & ~(RFLAGS_IF | RFLAGS_IOPL));
    fresh(64);
    assert_int_equal(popf(0, RFLAGS_IF | iopl1, 3), RFLAGS_IF | iopl1);
    fresh(64);
    assert_int_equal(popf(~0ull, iopl1, 1) & (RFLAGS_IF | RFLAGS_IOPL), RFLAGS_IF | iopl1);
    fresh(64);
    assert_int_equal(popf(0, RFLAGS_VIP | RFLAGS_RF, 0), RFLAGS_VIP);
}

static void test_pushf(void **state)
{
    fresh(64);
    s.rflags = RFLAGS_CF | RFLAGS_OF | RFLAGS_IF | RFLAGS_RF;
    assert_true(RUN(0x9c));
    assert_int_equal(load64(COMPARE_AREA + 0x7f8), RFLAGS_CF | RFLAGS_OF | RFLAGS_IF | RFLAGS_FIXED);
}

static void test_cli_sti(void **state)
{
    fresh(64);
    assert_true(RUN(0xfb));
    assert_true(s.rflags & RFLAGS_IF);
    assert_true(cpu()->v.cpu.interrupt_shadow);
    assert_true(cpu()->slow);
    fresh(64);
    s.rflags = RFLAGS_IF;
    assert_true(RUN(0xfb));
    assert_false(cpu()->v.cpu.interrupt_shadow);
    cpu()->cpl = 3;
    assert_false(RUN(0xfa));
    assert_int_equal(cpu()->fault.vector, VECTOR_GP);
    assert_true(s.rflags & RFLAGS_IF);
    s.rflags |= RFLAGS_IOPL;
    assert_true(RUN(0xfa));
    assert_false(s.rflags & RFLAGS_IF);
    assert_false(RUN(0xf4)); /* hlt outside CPL 0 */
    fresh(64);
    cpu()->interrupt_waiting = true;
    assert_true(RUN(0xfb));
    assert_int_equal(atomic_load(&cpu()->v.attention), 1);
    cpu()->interrupt_waiting = false;
    assert_true(RUN(0xf4));
    assert_int_equal(cpu()->v.cpu.activity, CPU_HALTED);
    cpu()->v.cpu.activity = CPU_RUNNING;
}

static void test_bound(void **state)
{
    fresh(32);
    int32_t bounds[2] = {-5, 7};
    memcpy(at(COMPARE_AREA + 0x100), bounds, sizeof bounds);
    s.gpr[GPR_RBX] = COMPARE_AREA + 0x100;
    for (int32_t index = -7; index < 10; index++) {
        s.gpr[GPR_RAX] = (uint32_t)index;
        assert_int_equal(RUN(0x62, 0x03), index >= -5 && index <= 7);
        if (index < -5 || index > 7)
            assert_int_equal(cpu()->fault.vector, VECTOR_BR);
    }
}

/* ---- strings ---- */

static void test_string_stops_at_fault(void **state)
{
    fresh(64);
    s.gpr[GPR_RAX] = 0x5a;
    s.gpr[GPR_RDI] = COMPARE_AREA + COMPARE_BYTES - 0x1800;
    s.gpr[GPR_RCX] = 0x2000;
    assert_false(RUN(0xf3, 0xaa));
    assert_int_equal(cpu()->fault.vector, VECTOR_PF);
    assert_int_equal(cpu()->fault.address, COMPARE_AREA + COMPARE_BYTES);
    assert_int_equal(s.gpr[GPR_RDI], COMPARE_AREA + COMPARE_BYTES);
    assert_int_equal(s.gpr[GPR_RCX], 0x800);
    assert_int_equal(*(uint8_t *)at(COMPARE_AREA + COMPARE_BYTES - 1), 0x5a);
}

static void test_string_lets_interrupts_in(void **state)
{
    fresh(64);
    s.gpr[GPR_RSI] = COMPARE_AREA;
    s.gpr[GPR_RDI] = COMPARE_AREA + 0x8000;
    s.gpr[GPR_RCX] = 0x4000;
    unsigned turns = 0;
    do {
        atomic_store(&cpu()->v.attention, 1);
        assert_true(RUN(0xf3, 0xa4));
        turns++;
    } while (rip() == 0x1000 && turns < 100);
    assert_int_equal(rip(), 0x1002);
    assert_int_equal(s.gpr[GPR_RCX], 0);
    assert_int_equal(turns, 4);

    fresh(64);
    cpu()->slow = true; /* single steps: one element each */
    s.gpr[GPR_RDI] = COMPARE_AREA;
    s.gpr[GPR_RCX] = 3;
    assert_true(RUN(0xf3, 0xab));
    assert_int_equal(rip(), 0x1000);
    assert_int_equal(s.gpr[GPR_RCX], 2);
    assert_int_equal(s.gpr[GPR_RDI], COMPARE_AREA + 4);
}

static void test_string_16_bit(void **state)
{
    fresh(16);
    for (unsigned n = SEG_ES; n <= SEG_DS; n++)
        if (n != SEG_CS)
            cpu()->v.cpu.seg[n].base = COMPARE_AREA, cpu()->v.cpu.seg[n].limit = 0xffff;
    interp_mode_changed(cpu());
    memcpy(at(COMPARE_AREA + 0xfffe), "xy", 2);
    memcpy(at(COMPARE_AREA), "z", 1);
    s.gpr[GPR_RSI] = 0x1111fffe;
    s.gpr[GPR_RDI] = 0x22220100;
    s.gpr[GPR_RCX] = 0x33330003;
    assert_true(RUN(0xf3, 0xa4)); /* SI wraps; upper halves stay */
    assert_memory_equal(at(COMPARE_AREA + 0x100), "xyz", 3);
    assert_int_equal(s.gpr[GPR_RSI], 0x11110001);
    assert_int_equal(s.gpr[GPR_RDI], 0x22220103);
    assert_int_equal(s.gpr[GPR_RCX], 0x33330000);

    cpu()->v.cpu.seg[SEG_ES].limit = 0x1ff; /* stops exactly at the limit */
    s.gpr[GPR_RDI] = 0x1f0;
    s.gpr[GPR_RCX] = 0x20;
    assert_false(RUN(0xf3, 0xaa));
    assert_int_equal(cpu()->fault.vector, VECTOR_GP);
    assert_int_equal(s.gpr[GPR_RDI], 0x200);
    assert_int_equal(s.gpr[GPR_RCX], 0x10);
}

static void test_string_segment_override(void **state)
{
    fresh(64);
    cpu()->segment_base[SEG_FS] = 0x1000;
    uint64_t value = 0x0123456789abcdef;
    memcpy(at(COMPARE_AREA + 0x1100), &value, 8);
    s.gpr[GPR_RSI] = COMPARE_AREA + 0x100;
    s.gpr[GPR_RDI] = COMPARE_AREA + 0x200;
    assert_true(RUN(0x64, 0x48, 0xa5)); /* FS for the source only */
    assert_int_equal(load64(COMPARE_AREA + 0x200), value);
    s.gpr[GPR_RBX] = COMPARE_AREA + 0x100;
    s.gpr[GPR_RAX] = 2;
    assert_true(RUN(0x64, 0xd7));
    assert_int_equal(s.gpr[GPR_RAX], 0xab);
}

static void test_string_io(void **state)
{
    fresh(64);
    s.gpr[GPR_RDX] = 0x1f0;
    s.gpr[GPR_RDI] = COMPARE_AREA + 0xffe;
    s.gpr[GPR_RCX] = 300;
    uint64_t before = cpu()->v.counters[COUNTER_port_reads];
    assert_true(RUN(0xf3, 0x66, 0x6d)); /* rep insw */
    assert_int_equal(cpu()->v.counters[COUNTER_port_reads] - before, 300);
    assert_int_equal(s.gpr[GPR_RCX], 0);
    assert_int_equal(s.gpr[GPR_RDI], COMPARE_AREA + 0xffe + 600);
    assert_int_equal(*(uint16_t *)at(COMPARE_AREA + 0xffe + 598), 0x3344 + 0x1f0);
    s.gpr[GPR_RDI] = COMPARE_AREA + COMPARE_BYTES; /* the fault comes before the port is read */
    before = cpu()->v.counters[COUNTER_port_reads];
    assert_false(RUN(0x6c));
    assert_int_equal(cpu()->v.counters[COUNTER_port_reads], before);
    s.gpr[GPR_RSI] = COMPARE_AREA + 0x10;
    before = cpu()->v.counters[COUNTER_port_writes];
    assert_true(RUN(0x6f));
    assert_int_equal(cpu()->v.counters[COUNTER_port_writes], before + 1);
    assert_int_equal(s.gpr[GPR_RSI], COMPARE_AREA + 0x14);
}

/* ---- odd ones ---- */

static void test_moffs(void **state)
{
    fresh(64);
    uint64_t value = 0x1122334455667788;
    memcpy(at(COMPARE_AREA + 8), &value, 8);
    assert_true(RUN(0x48, 0xa1, 0x08, 0x00, 0x00, 0x10, 0, 0, 0, 0));
    assert_int_equal(s.gpr[GPR_RAX], value);
    s.gpr[GPR_RAX] = 0xaabb;
    assert_true(RUN(0x66, 0xa3, 0x10, 0x00, 0x00, 0x10, 0, 0, 0, 0));
    assert_int_equal(load64(COMPARE_AREA + 16), 0xaabb);
    assert_false(RUN(0xa2, 0x08, 0x00, 0x00, 0x10, 0, 0, 0, 0x12));
    assert_int_equal(cpu()->fault.vector, VECTOR_GP);
}

static void test_salc(void **state)
{
    fresh(32);
    s.rflags = RFLAGS_CF;
    s.gpr[GPR_RAX] = 0x1200;
    assert_true(RUN(0xd6));
    assert_int_equal(s.gpr[GPR_RAX], 0x12ff);
}

static void test_misaligned_cmpxchg16b(void **state)
{
    fresh(64);
    s.gpr[GPR_RDI] = COMPARE_AREA + 8;
    assert_false(RUN(0xf0, 0x48, 0x0f, 0xc7, 0x0f));
    assert_int_equal(cpu()->fault.vector, VECTOR_GP);
}

/* ---- decimal adjustment, natively in a 32-bit code segment ---- */

/*
 * At LOW_ADDRESS: 64-bit entry that takes EAX and EFLAGS from rdi[0..1], far-returns into 32-bit code with the instruction, jumps back, stores.
 * The 32-bit part uses no stack.
 */
static void decimal_code(uint8_t *page, const uint8_t *code, unsigned length)
{
    static const uint8_t enter[] = {
        0x49, 0x89, 0xe2,                         /* mov r10, rsp: 32-bit code may lose its upper half */
        0x48, 0x8d, 0x05, 0x10, 0x00, 0x00, 0x00, /* lea rax, [rip + 16]: the 32-bit code */
        0x6a, 0x23,                               /* push 0x23: the kernel's 32-bit user code segment */
        0x50,                                     /* push rax */
        0x8b, 0x07,                               /* mov eax, [rdi] */
        0xff, 0x77, 0x08,                         /* push [rdi + 8] */
        0x9d,                                     /* popfq */
        0x48, 0xcb,                               /* retfq */
        0x90, 0x90, 0x90, 0x90, 0x90,
    };
    uint8_t *p = page + sizeof enter;
    memcpy(page, enter, sizeof enter);
    memcpy(p, code, length);
    p += length;
    uint32_t back = (uint32_t)(uintptr_t)(p + 7);
    *p++ = 0xea; /* jmp 0x33:back */
    memcpy(p, &back, 4);
    p += 4;
    *p++ = 0x33;
    *p++ = 0;
    /* mov rsp, r10; mov [rdi], eax; pushfq; pop [rdi + 8]; ret */
    static const uint8_t leave[] = {0x4c, 0x89, 0xd4, 0x89, 0x07, 0x9c, 0x8f, 0x47, 0x08, 0xc3};
    memcpy(p, leave, sizeof leave);
}

static void test_decimal(void **state)
{
    static const struct {
        uint8_t code[2];
        uint8_t length;
        uint64_t defined;
    } insns[] = {
        {{0x27}, 1, RFLAGS_OSZAPC & ~RFLAGS_OF},
        {{0x2f}, 1, RFLAGS_OSZAPC & ~RFLAGS_OF},
        {{0x37}, 1, RFLAGS_AF | RFLAGS_CF},
        {{0x3f}, 1, RFLAGS_AF | RFLAGS_CF},
        {{0xd4, 10}, 2, RFLAGS_SF | RFLAGS_ZF | RFLAGS_PF},
        {{0xd4, 16}, 2, RFLAGS_SF | RFLAGS_ZF | RFLAGS_PF},
        {{0xd5, 10}, 2, RFLAGS_SF | RFLAGS_ZF | RFLAGS_PF},
        {{0xd5, 7}, 2, RFLAGS_SF | RFLAGS_ZF | RFLAGS_PF},
    };
    uint8_t *page = mmap((void *)LOW_ADDRESS, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    assert_ptr_equal(page, LOW_ADDRESS);
    fresh(32);
    for (unsigned n = 0; n < sizeof insns / sizeof insns[0]; n++) {
        decimal_code(page, insns[n].code, insns[n].length);
        for (unsigned k = 0; k < 256 * 4 * 4; k++) {
            static const uint8_t highs[4] = {0, 1, 0x80, 0xff};
            uint64_t flags = (k & 0x100 ? RFLAGS_CF : 0) | (k & 0x200 ? RFLAGS_AF : 0);
            uint64_t host[2] = {0x12340000u | highs[k >> 10] << 8 | (k & 0xff), flags | RFLAGS_FIXED | RFLAGS_IF};
            s.gpr[GPR_RAX] = host[0];
            s.rflags = flags;
            ((void (*)(uint64_t *))(uintptr_t)page)(host);
            assert_true(compare_run_guest(compare, insns[n].code, insns[n].length, &s));
            assert_int_equal(s.gpr[GPR_RAX], (uint32_t)host[0]);
            assert_int_equal(s.rflags & insns[n].defined, host[1] & insns[n].defined);
        }
    }
    assert_false(RUN(0xd4, 0x00)); /* AAM 0 divides by zero */
    assert_int_equal(cpu()->fault.vector, VECTOR_DE);
    munmap(page, 4096);
}

static int setup(void **state)
{
    compare = compare_create();
    return compare ? 0 : -1;
}

static int teardown(void **state)
{
    compare_destroy(compare);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_jcc),
        cmocka_unit_test(test_call_and_return),
        cmocka_unit_test(test_loops),
        cmocka_unit_test(test_code_limit),
        cmocka_unit_test(test_stack_sizes),
        cmocka_unit_test(test_pop_to_stack),
        cmocka_unit_test(test_enter_leave),
        cmocka_unit_test(test_popf_privilege),
        cmocka_unit_test(test_pushf),
        cmocka_unit_test(test_cli_sti),
        cmocka_unit_test(test_bound),
        cmocka_unit_test(test_string_stops_at_fault),
        cmocka_unit_test(test_string_lets_interrupts_in),
        cmocka_unit_test(test_string_16_bit),
        cmocka_unit_test(test_string_segment_override),
        cmocka_unit_test(test_string_io),
        cmocka_unit_test(test_moffs),
        cmocka_unit_test(test_salc),
        cmocka_unit_test(test_misaligned_cmpxchg16b),
        cmocka_unit_test(test_decimal),
    };
    return cmocka_run_group_tests_name("control", tests, setup, teardown);
}
