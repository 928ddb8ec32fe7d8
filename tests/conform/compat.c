/*
 * Compatibility mode: 32-bit programs of a 64-bit system. Far transfers between the two widths in one ring, INT from 32-bit code, thread segments, segments that are not flat, code that changes
 * itself, pushes over pages' ends, addresses that wrap around at 4 GiB, encodings that 64-bit mode does not have.
 * The top of 4 GiB, what 64-bit code leaves in registers.
 * SDM vol. 1, 3.2.1; vol. 3, 3.2.4 (segment bases and limits apply), 5.3.1.
 */
#include "runtime/conform.h"

#define GATE 0x81
#define THREAD (FREE_SELECTOR | 3)
#define LIMITED (FREE_SELECTOR + 8 + 3)
#define READ_ONLY (FREE_SELECTOR + 16 + 3)
#define AREA 0x40000000u /* linear, 16 pages of our own; the runtime's map has nothing else there that matters */

extern uint64_t boot_pd[2048];
static uint64_t table[512] __attribute__((aligned(4096)));
static uint8_t data[16 * 4096] __attribute__((aligned(4096)));
static uint8_t code[2 * 4096] __attribute__((aligned(4096)));
static struct {
    uint32_t offset;
    uint16_t selector;
} to_wide __attribute__((used)), to_narrow __attribute__((used));
static uint64_t wide_seen[8] __attribute__((used));

/* Each ends with a trap, what it found in EAX, EBX, ECX and EDX. */
#define CODE32(name, text) __asm__(".code32\n" #name ": " text "\n int $0x30\n .code64"); extern uint8_t name[]

static int run_with(const void *start, uint16_t cs, const struct entry *given)
{
    struct entry entry = *given;
    entry.ip = (reg_t)start;
    entry.cs = cs;
    entry.flags |= 2;
    entry.ss = cs & 3 ? UDATA : KDATA;
    if (!entry.sp)
        entry.sp = (reg_t)user_stack - 64;
    asm_volatile("mov %0, %%ds; mov %0, %%es" ::"r"(UDATA)); /* what does not matter in 64-bit mode */
    return TRY(enter(&entry));
}

static int run(const void *start, uint16_t cs)
{
    return run_with(start, cs, &(struct entry){.ax = 0});
}

/* ---- system calls by INT ---- */

static volatile unsigned gate_calls;

static void on_gate(struct frame *frame)
{
    gate_calls++;
    frame->ax = (uint32_t)(frame->ax * 3 + frame->bx);
}

CODE32(gate_loop, "mov $500, %ecx\n xor %eax, %eax\n1: mov %ecx, %ebx\n push %ecx\n int $0x81\n pop %ecx\n dec %ecx\n jnz 1b\n mov %esp, %edx");

static void test_gate(void)
{
    gate_reset(GATE);
    idt[GATE].type = 0xee;
    trap_handlers[GATE] = on_gate;
    uint32_t want = 0;
    for (uint32_t n = 500; n; n--)
        want = want * 3 + n;
    for (unsigned user = 0; user < 2; user++) {
        gate_calls = 0;
        run(gate_loop, user ? UCODE32 : KCODE32);
        check(trap.vector == USER_DONE && gate_calls == 500 && trap.ax == want, "INT from 32-bit code in ring %u, 500 times (%u, %lx)", user ? 3 : 0, gate_calls, trap.ax);
        check(trap.dx == (uint32_t)(reg_t)(user_stack - 64), "the stack is where it was");
    }
}

/* ---- from one width to the other ---- */

/* 64-bit code with all its registers set goes through 32-bit code that works hard, and looks at R8 to R15 afterwards. */
__asm__("wide_start: mov $0x8888888800000008, %r8\n mov $0x9999999900000009, %r9\n mov $0xaaaaaaaa0000000a, %r10\n mov $0xbbbbbbbb0000000b, %r11\n"
        "mov $0xcccccccc0000000c, %r12\n mov $0xdddddddd0000000d, %r13\n mov $0xeeeeeeee0000000e, %r14\n mov $0xffffffff0000000f, %r15\n xor %eax, %eax\n mov $200, %ecx\n"
        "wide_again: ljmp *to_narrow\n"
        ".code32\n"
        "narrow_part: push %ecx\n push %eax\n mov %esp, %ebx\n mov 4(%ebx), %edx\n add (%ebx), %edx\n mov %edx, -4(%ebx)\n mov -4(%ebx), %eax\n pop %edx\n pop %ecx\n"
        " call narrow_function\n ljmp *to_wide\n"
        "narrow_function: push %ebp\n mov %esp, %ebp\n sub $16, %esp\n mov %eax, -4(%ebp)\n incl -4(%ebp)\n mov -4(%ebp), %eax\n mov %eax, -8(%ebp)\n leave\n ret\n"
        ".code64\n"
        "wide_back: dec %ecx\n jnz wide_again\n"
        "mov %r8, wide_seen\n mov %r9, wide_seen + 8\n mov %r10, wide_seen + 16\n mov %r11, wide_seen + 24\n mov %r12, wide_seen + 32\n mov %r13, wide_seen + 40\n"
        "mov %r14, wide_seen + 48\n mov %r15, wide_seen + 56\n int $0x30");
extern uint8_t wide_start[], narrow_part[], wide_back[];

static void test_widths(void)
{
    to_wide.offset = (uint32_t)(reg_t)wide_back;
    to_narrow.offset = (uint32_t)(reg_t)narrow_part;
    for (unsigned user = 0; user < 2; user++) {
        to_wide.selector = user ? UCODE : KCODE;
        to_narrow.selector = user ? UCODE32 : KCODE32;
        memset(wide_seen, 0, sizeof wide_seen);
        run(wide_start, user ? UCODE : KCODE);
        check(trap.vector == USER_DONE && trap.ax == 200 * 201 / 2 + 200, "64-bit and 32-bit code in turns, ring %u (%d, %lu)", user ? 3 : 0, trap.vector, trap.ax);
        bool same = true;
        for (unsigned n = 0; n < 8; n++)
            same &= wide_seen[n] == (0x1111111100000000ull * (n + 8) | (n + 8));
        check(same, "R8 to R15 are what they were");
    }
}

/* ---- segments ---- */

CODE32(thread_loop, "mov $0x63, %eax\n mov %eax, %gs\n mov $100, %ecx\n xor %eax, %eax\n"
                    "1: mov %gs:0, %ebx\n add %gs:-4, %ebx\n mov $0xfffffff8, %edx\n add %gs:(%edx), %ebx\n add %ebx, %eax\n incl %gs:0\n add %ecx, %gs:4(,%ecx,4)\n loop 1b\n mov $0, %ebx");
CODE32(limited_segment, "mov $0x6b, %eax\n mov %eax, %fs\n mov %fs:12, %eax\n movl $5, %fs:4\n mov %fs:13, %ebx");
CODE32(limited_data, "mov $0x6b, %eax\n mov %eax, %ds\n mov 8, %eax\n mov %eax, 12\n mov 16, %ebx");
CODE32(read_only_data, "mov $0x73, %eax\n mov %eax, %ds\n mov 8, %eax\n mov %eax, 12");
CODE32(null_data, "xor %eax, %eax\n mov %eax, %ds\n push %ebx\n pop %ebx\n mov 8(%esp), %eax\n mov %cs:gate_loop, %ecx\n mov 8, %ebx");

static void test_segments(void)
{
    uint32_t *thread = (uint32_t *)(data + 4096);
    gdt[FREE_SELECTOR / 8] = descriptor((uint32_t)(reg_t)thread, 0xfffff, 0xc0f3);
    gdt[FREE_SELECTOR / 8 + 1] = descriptor((uint32_t)(reg_t)thread, 15, 0x40f3);
    gdt[FREE_SELECTOR / 8 + 2] = descriptor((uint32_t)(reg_t)thread, 0xfffff, 0xc0f1);
    memset(data, 0, sizeof data);
    thread[0] = 10, thread[-1] = 1000, thread[-2] = 100000;
    run(thread_loop, UCODE32);
    uint32_t want = 0;
    for (uint32_t n = 0; n < 100; n++)
        want += 10 + n + 101000;
    check(trap.vector == USER_DONE && trap.ax == want && thread[0] == 110, "a thread segment with offsets below its base (%d, %lx)", trap.vector, trap.ax);
    check(thread[1 + 100] == 100 && thread[1 + 57] == 57, "and scaled ones");
    thread[3] = 0x12345678;
    for (unsigned n = 0; n < 2; n++) {
        run(limited_segment, UCODE32);
        check(trap.vector == GP && trap.error == 0 && trap.ax == 0x12345678 && thread[1] == 5, "FS with a limit: #GP beyond (%d)", trap.vector);
        thread[2] = 0x777;
        run(limited_data, UCODE32);
        check(trap.vector == GP && thread[3] == 0x777 && trap.ax == 0x777, "DS with a base and a limit (%d, %x)", trap.vector, thread[3]);
        thread[3] = 0x12345678;
        run(read_only_data, UCODE32);
        check(trap.vector == GP && trap.ax == 0x777 && thread[3] == 0x12345678, "DS that is read-only (%d)", trap.vector);
        run(null_data, UCODE32);
        check(trap.vector == GP && trap.cx == *(uint32_t *)(uintptr_t)gate_loop, "DS null, SS and CS work (%d)", trap.vector);
    }
    asm_volatile("mov %0, %%ds; mov %0, %%es; mov %0, %%fs; mov %0, %%gs" ::"r"(KDATA));
}

/* ---- code that changes ---- */

CODE32(smc_loop, "xor %eax, %eax\n mov $100, %ecx\n1: \nsmc_patch: mov $1, %edx\n add %edx, %eax\n incb smc_patch + 1\n dec %ecx\n jnz 1b\n movb $1, smc_patch + 1\n mov smc_patch, %ebx");
CODE32(smc_calls, "mov $300, %ecx\n xor %eax, %eax\n1: mov %ecx, 1(%esi)\n call *%esi\n add %edx, %eax\n dec %ecx\n jnz 1b");

static void test_changes(void)
{
    for (unsigned n = 0; n < 3; n++) {
        run(smc_loop, UCODE32);
        check(trap.vector == USER_DONE && trap.ax == 5050, "a loop that counts in its own immediate (%d, %lu)", trap.vector, trap.ax);
    }
    static const uint8_t function[] = {0xba, 0, 0, 0, 0, 0xc3}; /* mov edx, 0; ret */
    static const unsigned places[] = {64, 4093};
    for (unsigned n = 0; n < 2; n++) {
        memcpy(code + places[n], function, sizeof function);
        run_with(smc_calls, UCODE32, &(struct entry){.si = (reg_t)(code + places[n])});
        check(trap.vector == USER_DONE && trap.ax == 300 * 301 / 2, "a function rewritten before each call, at %u (%d, %lu)", places[n], trap.vector, trap.ax);
    }
}

/* ---- the stack and pages' ends ---- */

CODE32(push_all, "push $0x11111111\n push %eax\n push $2\n push %ebx\n pusha\n pushf\n pop %ecx\n mov %esp, %edx\n mov 32(%edx), %ebx");
CODE32(call_deep, "mov $40, %ecx\n call 1f\n jmp 2f\n1: dec %ecx\n jz 3f\n push %ecx\n call 1b\n pop %ecx\n inc %eax\n3: ret\n2: mov %esp, %edx\n");

static void pages_map(unsigned absent)
{
    for (unsigned n = 0; n < 16; n++)
        table[n] = n == absent ? 0 : (reg_t)(data + n * 4096) | 7;
    boot_pd[AREA >> 21] = (reg_t)table | 7;
    write_cr3(read_cr3());
}

static void test_stack(void)
{
    uint64_t keep = boot_pd[AREA >> 21];
    pages_map(~0u);
    for (unsigned low = 0; low < 8; low++) {
        struct entry entry = {.sp = AREA + 2 * 4096 + 20 + low, .ax = 0x22222222, .bx = 0x33333333};
        run_with(push_all, UCODE32, &entry);
        check(trap.vector == USER_DONE && trap.dx == entry.sp - 48 && trap.bx == 0x33333333, "pushes over a page's end, ESP %x (%d, %lx)", (unsigned)entry.sp & 0xfff, trap.vector, trap.bx);
        entry.sp = AREA + 2 * 4096 + 60 + low;
        run_with(call_deep, UCODE32, &entry);
        check(trap.vector == USER_DONE && trap.dx == entry.sp && trap.ax == 0x22222222 + 39, "calls over it (%d, %lx)", trap.vector, trap.ax);
    }
    pages_map(1);
    for (unsigned low = 0; low < 8; low++) {
        struct entry entry = {.sp = AREA + 2 * 4096 + 12 + low, .ax = 0x22222222, .bx = 0x33333333};
        int vector = run_with(push_all, UCODE32, &entry);
        reg_t at = entry.sp, address;
        do
            at -= 4;
        while (at >= AREA + 2 * 4096);
        address = at + 3 >= AREA + 2 * 4096 ? trap.cr2 : at; /* of an access across pages any byte there may be told */
        check(vector == PF && trap.error == 6 && trap.cr2 == address && trap.cr2 < AREA + 2 * 4096 && trap.sp == at + 4, "a push into an absent page: #PF at %lx, ESP %lx", trap.cr2, trap.sp);
    }
    boot_pd[AREA >> 21] = keep;
    write_cr3(read_cr3());
}

/* ---- addresses and encodings ---- */

CODE32(wraps, "mov $0x80000000, %ebx\n lea (%ebx), %ecx\n mov data + 0x80000000(%ebx), %eax\n mov $0xfffffff0, %esi\n mov data + 0x20(%esi), %edx\n"
              "mov $0x40000000, %ecx\n mov data + 0x20(,%ecx,4), %ebx\n lea 0x7fffffff(%esi), %ecx\n");
CODE32(old_ones, "mov $0xff, %al\n inc %eax\n dec %ecx\n inc %ebp\n dec %bp\n mov data, %eax\n mov %al, data + 8\n mov data + 4, %ax\n mov %eax, data + 12\n"
                 "mov $0x1234, %edx\n aam\n daa\n das\n aaa\n push %ds\n pop %es\n sub %ecx, %ecx\n inc %ecx\n mov $3, %ebx\n bound %ecx, data + 16\n mov %ecx, %edx\n xchg %ebx, %ecx\n cwtl");
CODE32(strings, "mov $data + 4000, %esi\n mov $data + 12000, %edi\n mov $300, %ecx\n rep movsb\n mov %esi, %eax\n mov %edi, %ebx\n mov $data + 20000, %edi\n mov $500, %ecx\n push %eax\n"
                "mov $0x5a5a5a5a, %eax\n rep stosl\n pop %eax\n mov %edi, %edx\n");
CODE32(zero_loop, "xor %eax, %eax\n mov $70000, %ecx\n1: inc %eax\n loop 1b\n jecxz 2f\n ud2\n2: mov $3, %ecx\n3: inc %eax\n cmp $70002, %eax\n loopne 3b\n");

static void test_encodings(void)
{
    memset(data, 0, sizeof data);
    uint32_t *words = (uint32_t *)data;
    words[0] = 0x11223344, words[1] = 0xabcd, words[4] = 0x55667788, words[8] = 0x99aabbcc;
    for (unsigned n = 0; n < 2; n++) {
        run(wraps, n ? UCODE32 : KCODE32);
        check(trap.vector == USER_DONE && trap.ax == 0x11223344 && trap.dx == 0x55667788 && trap.bx == 0x99aabbcc, "sums wrap around at 4 GiB (%d, %lx %lx %lx)", trap.vector,
              trap.ax, trap.dx, trap.bx);
        check(trap.cx == 0x7fffffef, "LEA's, too");
    }
    words[4] = 0, words[5] = 10;
    run(old_ones, UCODE32);
    check(trap.vector == USER_DONE && data[8] == 0x44 && words[3] == 0x1122abcd, "MOV with an offset (%d, %x %x)", trap.vector, data[8], words[3]);
    check(trap.cx == 3 && trap.bx == 1 && trap.dx == 1, "INC, BOUND, XCHG");
    for (unsigned n = 0; n < 300; n++)
        data[4000 + n] = (uint8_t)(n * 7 + 1);
    run(strings, UCODE32);
    check(trap.ax == (uint32_t)(reg_t)data + 4300 && trap.bx == (uint32_t)(reg_t)data + 12300 && trap.dx == (uint32_t)(reg_t)data + 22000, "REP MOVS and STOS over pages' ends: registers");
    check(!memcmp(data + 4000, data + 12000, 300) && data[19999] == 0 && data[20000] == 0x5a && data[21999] == 0x5a && data[22000] == 0, "and memory");
    run(zero_loop, UCODE32);
    check(trap.vector == USER_DONE && trap.ax == 70002 && trap.cx == 1, "LOOP, JECXZ, LOOPNE (%d, %lu, %lu)", trap.vector, trap.ax, trap.cx);
}

/* ---- the top of 4 GiB ---- */

#define TOP 0xfffff000u
static uint64_t low_table[512] __attribute__((aligned(4096))), high_table[512] __attribute__((aligned(4096)));

/* The last page of 4 GiB and the first are pages of `data`, next to each other. */
static void top_map(uint64_t keep[2])
{
    keep[0] = boot_pd[0], keep[1] = boot_pd[TOP >> 21];
    for (unsigned n = 1; n < 512; n++)
        low_table[n] = n * 4096ul | 7;
    low_table[0] = (reg_t)(data + 4096) | 7;
    high_table[511] = (reg_t)data | 7;
    boot_pd[0] = (reg_t)low_table | 7;
    boot_pd[TOP >> 21] = (reg_t)high_table | 7;
    write_cr3(read_cr3());
}

static void test_top_code(void)
{
    static const uint8_t high[] = {0x40, 0xe8, 0x1a, 1, 0, 0, 0x43, 0xeb, 0x14}; /* inc eax; call 0x100; inc ebx; jmp +0x14 */
    static const uint8_t end[] = {0x83, 0xc2, 1};                               /* add edx, 1; and on at 0 */
    static const uint8_t low[] = {0x49, 0x0f, 0x84, 0x39, 0, 0, 0, 0xe9, 0xd4, 0xff, 0xff, 0xff}; /* dec ecx; jz 0x40; jmp 0xffffffe0 */
    static const uint8_t done[] = {0xcd, 0x30}, function[] = {0x42, 0xc3};      /* int 0x30; inc edx; ret */
    memset(data, 0xcc, 2 * 4096);
    memcpy(data + 0xfe0, high, sizeof high);
    memcpy(data + 0xffd, end, sizeof end);
    memcpy(data + 4096, low, sizeof low);
    memcpy(data + 4096 + 0x40, done, sizeof done);
    memcpy(data + 4096 + 0x100, function, sizeof function);
    for (unsigned user = 0; user < 2; user++) {
        run_with((void *)0xffffffe0, user ? UCODE32 : KCODE32, &(struct entry){.cx = 1000});
        check(trap.vector == USER_DONE && trap.ax == 1000 && trap.bx == 1000 && trap.dx == 2000 && trap.ip == 0x42, "code around the top of 4 GiB, ring %u (%d, %lu %lu %lu)",
              user ? 3 : 0, trap.vector, trap.ax, trap.bx, trap.dx);
    }
}

CODE32(top_data, "xor %eax, %eax\n mov $300, %ecx\n1: mov (%ebx), %edx\n add 4(%ebx), %edx\n add 8(%ebx), %edx\n add 12(%ebx), %edx\n add %edx, %eax\n add $8, %ebx\n incl -8(%ebx)\n incl (%ebx)\n"
                 "incl 4(%ebx)\n sub $8, %ebx\n loop 1b");
CODE32(top_stack, "mov $300, %ecx\n xor %eax, %eax\n1: push $1\n push $2\n push $3\n push $4\n call 2f\n pop %ebx\n add %ebx, %eax\n pop %ebx\n add %ebx, %eax\n pop %ebx\n add %ebx, %eax\n pop %ebx\n"
                  "add %ebx, %eax\n loop 1b\n mov %esp, %edx\n int $0x30\n2: push %ebp\n mov %esp, %ebp\n incl 12(%ebp)\n decl 16(%ebp)\n leave\n ret");

static void test_top_data(void)
{
    for (unsigned n = 0; n < 2; n++) {
        memset(data, 0, 2 * 4096);
        uint32_t *at = (uint32_t *)(data + 4096 - 8);
        at[0] = 10, at[1] = 200, at[2] = 3000, at[3] = 40000;
        run_with(top_data, n ? UCODE32 : KCODE32, &(struct entry){.bx = 0xfffffff8});
        check(trap.vector == USER_DONE && trap.ax == 300 * 43210 + 3 * 300 * 299 / 2 && at[0] == 310 && at[1] == 200 && at[2] == 3300 && at[3] == 40300,
              "a base that moves over the top (%d, %lu)", trap.vector, trap.ax);
        for (unsigned sp = 0; sp <= 24; sp += 4) {
            run_with(top_stack, UCODE32, &(struct entry){.sp = sp ? sp : 4096 - 64});
            check(trap.vector == USER_DONE && trap.ax == 3000 && trap.dx == (sp ? sp : 4096 - 64), "the stack over it, ESP %u (%d, %lu)", sp, trap.vector, trap.ax);
        }
    }
}

static void test_top(void)
{
    uint64_t keep[2];
    top_map(keep);
    test_top_code();
    test_top_data();
    boot_pd[0] = keep[0], boot_pd[TOP >> 21] = keep[1];
    write_cr3(read_cr3());
}

/* ---- what 64-bit code leaves ---- */

CODE32(wide_base, "mov $100, %ecx\n xor %eax, %eax\n1: add %fs:0, %eax\n add %fs:4, %eax\n loop 1b");
/* The fourth register's number has three bits here; VBLENDVPS xmm0, xmm1, xmm2, then xmm3 with bit 7 clear and set. */
CODE32(blends, "mov $20, %ecx\n1: .byte 0xc4, 0xe3, 0x71, 0x4a, 0xc2, 0x30\n movd %xmm0, %eax\n.byte 0xc4, 0xe3, 0x71, 0x4a, 0xc2, 0xb0\n movd %xmm0, %ebx\n loop 1b");

static void test_leftovers(void)
{
    uint32_t *thread = (uint32_t *)(data + 4096);
    thread[0] = 5, thread[1] = 37;
    asm_volatile("mov %0, %%fs" ::"r"(UDATA));
    wrmsr(0xc0000100, 0x1200000000ul + (reg_t)thread);
    run(wide_base, UCODE32);
    check(trap.vector == USER_DONE && trap.ax == 4200, "of FS's base 32 bits count (%d, %lu)", trap.vector, trap.ax);
    asm_volatile("mov %0, %%fs" ::"r"(KDATA));
    if (!(cpuid(1, 0).c >> 28 & 1))
        return;
    write_cr4(read_cr4() | 1u << 18);
    asm_volatile("xsetbv" ::"c"(0), "a"(7), "d"(0));
    uint32_t one = 0x11111111, two = 0x22222222, select = 0x80000000;
    asm_volatile("vmovd %0, %%xmm1\n vmovd %1, %%xmm2\n vmovd %2, %%xmm3\n vpxor %%xmm11, %%xmm11, %%xmm11" ::"r"(one), "r"(two), "r"(select));
    run(blends, UCODE32);
    check(trap.vector == USER_DONE && trap.ax == two && trap.bx == two, "a fourth register's number has three bits (%d, %lx, %lx)", trap.vector, trap.ax, trap.bx);
}

void test_main(void)
{
    test_gate();
    test_widths();
    test_segments();
    test_changes();
    test_stack();
    test_encodings();
    test_top();
    test_leftovers();
}
