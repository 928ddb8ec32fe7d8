/*
 * Code that changes itself: the next instruction, the running block, other pages, through another mapping, by REP MOVS, data beside code.
 * SDM vol. 3, 11.6: a jump or a serializing instruction follows where the manual asks for it, and on newer processors nothing is needed on one linear address.
 */
#include "runtime/conform.h"

#define AREA 0x8000000000ull
static uint64_t pdpt[512] __attribute__((aligned(4096)));
static uint64_t pd[512] __attribute__((aligned(4096)));
static uint64_t pt[512] __attribute__((aligned(4096)));
static uint8_t code[3 * 4096] __attribute__((aligned(4096)));
extern uint64_t boot_pml4[512];

static unsigned call_at(volatile void *p)
{
    unsigned value;
    asm_volatile("call *%1" : "=a"(value) : "r"(p) : "memory", "rcx", "rdx");
    return value;
}

/* mov eax, value; ret */
static void put_function(uint8_t *at, unsigned value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

static void test_between_calls(void)
{
    unsigned good = 0;
    for (unsigned n = 0; n < 1000; n++) {
        put_function(code + 100, n);
        good += call_at(code + 100) == n;
    }
    expect_eq(good, 1000, "a function rewritten before each call");
    good = 0;
    for (unsigned n = 0; n < 1000; n++) {
        put_function(code + 4093, n); /* across two pages */
        good += call_at(code + 4093) == n;
    }
    expect_eq(good, 1000, "the same across two pages");
    good = 0;
    put_function(code + 4093, 0);
    for (unsigned n = 0; n < 256; n++) {
        code[4093 + 4] = (uint8_t)n; /* its last immediate byte, in the second page */
        good += call_at(code + 4093) == n << 24;
    }
    expect_eq(good, 256, "only its byte in the second page");
}

extern uint8_t next_patch[], block_patch[], back_patch[], loop_patch[], loop_count[], rep_patch[], push_patch[], lock_patch[];

static void test_within_block(void)
{
    unsigned value;
    asm_volatile("movb $7, next_patch + 1\nnext_patch: mov $1, %%eax" : "=a"(value)::"memory");
    expect_eq(value, 7, "the very next instruction");
    asm_volatile("movb $9, block_patch + 1\n nop\n nop\n add $0, %%eax\nblock_patch: mov $1, %%eax" : "=a"(value)::"memory", "cc");
    expect_eq(value, 9, "a few instructions later in the block");
    asm_volatile("movb $11, back_patch + 1\n jmp back_patch\n nop\nback_patch: mov $1, %%eax" : "=a"(value)::"memory");
    expect_eq(value, 11, "after a jump");
    unsigned sum = 0, rounds = 10;
    asm_volatile("1: \nloop_patch: mov $1, %%eax\n add %%eax, %0\n incb loop_patch + 1\n dec %1\n jnz 1b" : "+r"(sum), "+r"(rounds)::"rax", "memory", "cc");
    expect_eq(sum, 55, "a loop that counts in its own immediate");
    static const uint8_t immediate[1] = {21};
    asm_volatile("lea rep_patch + 1, %%rdi\n mov $1, %%ecx\n rep movsb\nrep_patch: mov $1, %%eax" : "=a"(value) : "S"(immediate) : "rdi", "rcx", "memory");
    expect_eq(value, 21, "the next instruction, by REP MOVSB");
    asm_volatile("mov %%rsp, %%rcx\n lea push_patch + 10, %%rsp\n mov $0x1122334455667788, %%rax\n push %%rax\n mov %%rcx, %%rsp\n"
                 " jmp push_patch\n nop\npush_patch: movabs $0, %%rax; mov $0, %%edx"
                 : "=a"(value)::"rcx", "rdx", "memory");
    expect_eq(value, 0x55667788, "by PUSH");
    asm_volatile("lock addl $2, lock_patch + 1\nlock_patch: mov $1, %%eax" : "=a"(value)::"memory", "cc");
    expect_eq(value, 3, "the next instruction, by a locked one");
    /* It changes itself while it runs: the old one completes. */
    memset(code, 0x90, 64);
    static const uint8_t self[] = {0xc6, 0x07, 0xc3, 0xb8, 1, 0, 0, 0, 0xc3}; /* movb $0xc3, (rdi); mov eax, 1; ret */
    memcpy(code, self, sizeof self);
    asm_volatile("call *%2" : "=a"(value) : "D"(code), "r"(code), "0"(5) : "memory");
    expect_eq(value, 1, "an instruction that overwrites itself completes");
    asm_volatile("call *%1" : "=a"(value) : "r"(code), "0"(5) : "memory");
    expect_eq(value, 5, "and is another one the next time");
}

static void test_alias(void)
{
    boot_pml4[1] = (uintptr_t)pdpt | 3;
    pdpt[0] = (uintptr_t)pd | 3;
    pd[0] = (uintptr_t)pt | 3;
    for (unsigned n = 0; n < 3; n++)
        pt[n] = (uintptr_t)(code + n * 4096) | 3;
    pt[3] = (uintptr_t)code | 3;
    uint8_t *alias = (uint8_t *)AREA;
    unsigned good = 0;
    for (unsigned n = 0; n < 1000; n++) {
        put_function(alias + 200, n);
        cpuid(0, 0);
        good += call_at(code + 200) == n;
        put_function(code + 200, n + 5000);
        cpuid(0, 0);
        good += call_at(alias + 200) == n + 5000;
        good += call_at(alias + 3 * 4096 + 200) == n + 5000;
    }
    expect_eq(good, 3000, "through another mapping");
    /* The same linear address, another page. */
    put_function(code, 111);
    put_function(code + 4096, 222);
    check(call_at(alias) == 111, "a page of code");
    pt[0] = (uintptr_t)(code + 4096) | 3;
    invlpg(alias);
    check(call_at(alias) == 222, "another page at its address after INVLPG");
    pt[0] = (uintptr_t)code | 3;
    write_cr3(read_cr3());
    check(call_at(alias) == 111, "and back after a CR3 load");
    pt[0] |= 1ull << 63;
    invlpg(alias);
    expect_fault(PF, 0x11, "NX set on code that has run", call_at(alias));
    pt[0] = (uintptr_t)code | 3;
    invlpg(alias);
}

static void test_data_beside_code(void)
{
    /* Data on the page of running code, as a JIT has it. */
    static const uint8_t loop[] = {0xb9, 0, 0, 0, 0, 0x48, 0xff, 0x07, 0x48, 0xff, 0x07, 0xff, 0xc9, 0x75, 0xf6, 0xc3}; /* mov ecx, n; 1: inc qword (rdi) twice; dec ecx; jnz */
    memset(code, 0, 4096);
    memcpy(code + 512, loop, sizeof loop);
    unsigned rounds = 5000;
    memcpy(code + 513, &rounds, 4);
    asm_volatile("call *%1" ::"D"(code + 1024), "r"(code + 512) : "rcx", "memory", "cc");
    uint64_t count;
    memcpy(&count, code + 1024, 8);
    expect_eq(count, 10000, "a counter on the page of the loop that counts");
    asm_volatile("call *%1" ::"D"(code + 512 + sizeof loop), "r"(code + 512) : "rcx", "memory", "cc");
    memcpy(&count, code + 512 + sizeof loop, 8);
    expect_eq(count, 10000, "right behind it");
}

void test_main(void)
{
    test_between_calls();
    test_within_block();
    test_alias();
    test_data_beside_code();
}
