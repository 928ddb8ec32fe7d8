/*
 * Segmentation in protected mode: limits, expand-down, types and privileges of loads, call gates with parameters and a change of stacks, conforming code, far returns to an
 * outer ring, LAR, LSL, VERR, VERW, ARPL, BOUND, INTO; real mode with its 64 KiB wrap and with large limits. SDM vol. 3, ch. 3, 5 and 20.
 */
#include "runtime/conform.h"

#define SEL(n) (FREE_SELECTOR + 8 * (n))
static uint8_t memory[8192] __attribute__((aligned(4096)));
#define BASE ((reg_t)memory)

static void set(unsigned n, uint64_t value)
{
    gdt[SEL(n) / 8] = value;
}
static void load_fs(uint16_t selector)
{
    asm_volatile("mov %w0, %%fs" ::"r"(selector));
}
static uint32_t read_fs(uint32_t offset)
{
    uint32_t v;
    asm_volatile("movl %%fs:(%1), %0" : "=r"(v) : "r"(offset));
    return v;
}
static void write_fs(uint32_t offset, uint32_t value)
{
    asm_volatile("movl %1, %%fs:(%0)" ::"r"(offset), "r"(value) : "memory");
}

static void test_limits(void)
{
    set(0, descriptor(BASE, 99, 0x92 | 0x4000));
    load_fs(SEL(0));
    memory[96] = 1, memory[97] = 2, memory[98] = 3, memory[99] = 4;
    expect_eq(read_fs(96), 0x04030201, "the last four bytes below the limit");
    check(gdt[SEL(0) / 8] >> 40 & 1, "loading sets the accessed bit");
    expect_fault(GP, 0, "one byte above the limit", read_fs(97));
    expect_fault(GP, 0, "a write above the limit", write_fs(100, 0));
    expect_fault(GP, 0, "an access that wraps at 4 GiB", read_fs(0xfffffffe));
    set(0, descriptor(BASE, 0, 0x92 | 0xc000));
    load_fs(SEL(0));
    expect_ok("granularity: limit 0 is 4095", read_fs(4092));
    expect_fault(GP, 0, "and not more", read_fs(4093));
    set(0, descriptor(BASE, 99, 0x96 | 0x4000));
    load_fs(SEL(0));
    expect_fault(GP, 0, "expand-down: below the limit", read_fs(96));
    expect_fault(GP, 0, "expand-down: at the limit", read_fs(99));
    expect_ok("expand-down: above the limit", read_fs(100));
    expect_fault(GP, 0, "expand-down, 32 bits: wraps at 4 GiB", read_fs(0xfffffffd));
    set(0, descriptor(BASE, 99, 0x96));
    load_fs(SEL(0));
    expect_ok("expand-down, 16 bits: up to 0xffff", read_fs(0xfffc));
    expect_fault(GP, 0, "expand-down, 16 bits: not above", read_fs(0xfffd));
    set(0, descriptor(BASE, 99, 0x90 | 0x4000));
    load_fs(SEL(0));
    expect_ok("read-only: a read", read_fs(0));
    expect_fault(GP, 0, "read-only: a write", write_fs(0, 0));
    set(0, descriptor(BASE, 99, 0x9a | 0x4000));
    load_fs(SEL(0));
    expect_ok("readable code: a read", read_fs(0));
    expect_fault(GP, 0, "readable code: a write", write_fs(0, 0));
    load_fs(0);
    expect_fault(GP, 0, "through a null selector", read_fs(0));
}

/* A #SS on an unusable stack would be fatal: the handler of vector 12 runs by a task gate here. */
static struct tss ss_task;
static uint8_t ss_stack[4096];
extern uint8_t ss_task_entry[];
volatile reg_t ss_error, ss_taken;
__asm__("ss_task_entry: popl ss_error\n incl ss_taken\n mov kept_esp, %eax\n mov %eax, tss + 56\n movl $0x10, tss + 80\n movl $ss_after, tss + 32\n iret\n jmp ss_task_entry\n");
volatile reg_t kept_esp;

static void ss_task_set(void)
{
    memset(&ss_task, 0, sizeof ss_task);
    ss_task.eip = (reg_t)ss_task_entry;
    ss_task.eflags = 2;
    ss_task.esp = (reg_t)ss_stack + 4096;
    ss_task.cs = KCODE;
    ss_task.ss = ss_task.ds = ss_task.es = KDATA;
    ss_task.io_map = sizeof ss_task;
    gdt[0x1f0 / 8] = descriptor((reg_t)&ss_task, sizeof ss_task - 1, 0x89);
    idt[SS] = (struct gate){.selector = 0x1f0, .type = 0x85};
}

static void test_stack_limit(void)
{
    ss_task_set();
    set(0, descriptor(BASE, 4095, 0x92 | 0x4000));
    asm_volatile("pushal; mov %%esp, kept_esp; mov %w0, %%ss; mov $0x1003, %%esp; push %%eax\nss_after: popal" ::"r"(SEL(0)) : "memory");
    check(ss_taken == 1 && (ss_error & ~1u) == 0, "a push above SS's limit is #SS(0) (%lx)", ss_error);
    gate_reset(SS);
    asm_volatile("clts");
}

static void test_loads(void)
{
    static const struct {
        const char *name;
        unsigned attributes;
        uint16_t rpl;
        int vector;
    } data[] = {
        {"data", 0x92, 0, NO_TRAP},         {"readable code", 0x9a, 0, NO_TRAP},     {"execute-only code", 0x98, 0, GP}, {"not present", 0x12, 0, NP},
        {"a TSS", 0x89, 0, GP},             {"a call gate", 0x8c, 0, GP},            {"DPL 0 with RPL 3", 0x92, 3, GP},  {"DPL 3 with RPL 3", 0xf2, 3, NO_TRAP},
        {"conforming code with RPL 3", 0x9e, 3, NO_TRAP}, {"type 0", 0x80, 0, GP},
    };
    for (volatile unsigned n = 0; n < sizeof data / sizeof *data; n++) {
        set(0, descriptor(BASE, 4095, data[n].attributes | 0x4000));
        (void)TRY(load_fs((uint16_t)(SEL(0) | data[n].rpl)));
        check(trap.vector == data[n].vector && (trap.vector == NO_TRAP || trap.error == SEL(0)), "loading FS with %s (%d)", data[n].name, trap.vector);
    }
    expect_fault(GP, 0x208, "loading FS beyond the GDT", load_fs(0x208));
    expect_fault(GP, 4, "loading FS from an LDT that is none", load_fs(4));
    expect_ok("null selectors with any RPL", load_fs(3));
    expect_fault(GP, 0, "a null SS", asm_volatile("mov %w0, %%ss" ::"r"(0)));
    set(0, descriptor(0, 0xfffff, 0x90 | 0xc000));
    expect_fault(GP, SEL(0), "a read-only SS", asm_volatile("mov %w0, %%ss" ::"r"(SEL(0))));
    set(0, descriptor(0, 0xfffff, 0xf2 | 0xc000));
    expect_fault(GP, SEL(0), "SS of another DPL", asm_volatile("mov %w0, %%ss" ::"r"(SEL(0))));
    set(0, descriptor(0, 0xfffff, 0x12 | 0xc000));
    expect_fault(SS, SEL(0), "SS that is not present", asm_volatile("mov %w0, %%ss" ::"r"(SEL(0))));
    load_fs(0);
    /* An LDT. */
    static uint64_t ldt[4];
    ldt[1] = descriptor(BASE, 99, 0x92 | 0x4000);
    set(1, descriptor((reg_t)ldt, sizeof ldt - 1, 0x82));
    asm_volatile("lldt %w0" ::"r"(SEL(1)));
    expect_ok("loading FS from the LDT", load_fs(0x0c));
    expect_fault(GP, 0x24, "beyond the LDT", load_fs(0x24));
    expect_fault(GP, SEL(0), "LLDT of data", asm_volatile("lldt %w0" ::"r"(SEL(0))));
    load_fs(0);
    asm_volatile("lldt %w0" ::"r"(0));
}

static void test_inspection(void)
{
    uint32_t value = 0;
    bool ok;
    set(0, descriptor(BASE, 0x12, 0xf2 | 0xc000));
    asm_volatile("lar %2, %0" : "+r"(value), "=@ccz"(ok) : "r"(SEL(0)));
    check(ok && value == 0x00c0f200, "LAR (%x)", value);
    asm_volatile("lsl %2, %0" : "+r"(value), "=@ccz"(ok) : "r"(SEL(0)));
    check(ok && value == 0x12fff, "LSL with granularity (%x)", value);
    set(0, 0x00008c0000080000ull);
    asm_volatile("lar %2, %0" : "+r"(value), "=@ccz"(ok) : "r"(SEL(0)));
    check(ok, "LAR of a call gate");
    asm_volatile("lsl %2, %0" : "+r"(value), "=@ccz"(ok) : "r"(SEL(0)));
    check(!ok, "LSL of a call gate clears ZF");
    set(0, 0x00008e0000080000ull);
    asm_volatile("lar %2, %0" : "+r"(value), "=@ccz"(ok) : "r"(SEL(0)));
    check(!ok, "LAR of an interrupt gate clears ZF");
    asm_volatile("lar %2, %0" : "+r"(value), "=@ccz"(ok) : "r"(0));
    check(!ok, "LAR of a null selector");
    set(0, descriptor(0, 1, 0x90));
    asm_volatile("verr %w1" : "=@ccz"(ok) : "r"(SEL(0)));
    check(ok, "VERR of read-only data");
    asm_volatile("verw %w1" : "=@ccz"(ok) : "r"(SEL(0)));
    check(!ok, "VERW of read-only data");
    asm_volatile("verr %w1" : "=@ccz"(ok) : "r"(SEL(0) | 3));
    check(!ok, "VERR with RPL 3 of DPL 0");
    set(0, descriptor(0, 1, 0x98));
    asm_volatile("verr %w1" : "=@ccz"(ok) : "r"(SEL(0)));
    check(!ok, "VERR of execute-only code");
    value = 0x20;
    asm_volatile("arpl %w2, %w0" : "+r"(value), "=@ccz"(ok) : "r"(3));
    check(ok && value == 0x23, "ARPL");
    int32_t bounds[2] = {-5, 10};
    expect_ok("BOUND inside", asm_volatile("bound %0, %1" ::"r"(10), "m"(bounds)));
    expect_fault(BR, 0, "BOUND above", asm_volatile("bound %0, %1" ::"r"(11), "m"(bounds)));
    expect_fault(BR, 0, "BOUND below", asm_volatile("bound %0, %1" ::"r"(-6), "m"(bounds)));
    expect_fault(OF, 0, "INTO", asm_volatile("mov $0x7fffffff, %%eax; inc %%eax; into" ::: "eax"));
    expect_ok("INTO without overflow", asm_volatile("xor %%eax, %%eax; into" ::: "eax"));
}

/* ---- gates and rings ---- */

extern uint8_t gate_target[], user_gate[], user_gate_back[], conforming_target[], outer_target[], ring_code[];
volatile reg_t gate_seen[8];
__asm__("gate_target: mov %ss, %eax\n mov %eax, gate_seen\n mov %cs, %eax\n mov %eax, gate_seen + 4\n mov 8(%esp), %eax\n mov %eax, gate_seen + 8\n"
        " mov 12(%esp), %eax\n mov %eax, gate_seen + 12\n mov 4(%esp), %eax\n mov %eax, gate_seen + 16\n mov %esp, gate_seen + 20\n mov 20(%esp), %eax\n mov %eax, gate_seen + 24\n lret $8\n"
        "user_gate: pushl $0x1111\n pushl $0x2222\n mov %esp, %ebx\n lcall $0x6b, $0\nuser_gate_back: mov %esp, %ecx\n mov %cs, %eax\n mov %ss, %edx\n int $0x30\n"
        "outer_target: mov %cs, %eax\n mov %ss, %ebx\n mov %esp, %ecx\n mov %ds, %edx\n int $0x30\n"
        "conforming_target: mov %cs, %eax\n mov %eax, gate_seen + 4\n lret\n"
        "ring_code: lcall $0x73, $conforming_target\n int $0x30\n");

static void start(void *code, reg_t flags)
{
    struct entry entry = {.ip = (reg_t)code, .cs = UCODE32, .flags = 2 | flags, .sp = (reg_t)user_stack - 64, .ss = UDATA};
    enter(&entry);
}

static void test_gates(void)
{
    uint32_t target = (uint32_t)(uintptr_t)gate_target;
    uint64_t gate = (target & 0xffff) | (uint64_t)KCODE << 16 | 0xec02ull << 32 | (uint64_t)(target & 0xffff0000) << 32; /* two parameters, DPL 3 */
    set(1, gate);
    expect_fault(USER_DONE, 0, "a call gate to ring 0 and back", start(user_gate, 0));
    check(gate_seen[0] == KDATA && gate_seen[1] == KCODE, "SS0 and CS in ring 0");
    check(gate_seen[2] == 0x2222 && gate_seen[3] == 0x1111, "parameters are copied (%lx %lx)", gate_seen[2], gate_seen[3]);
    check(gate_seen[4] == UCODE32 && gate_seen[6] == UDATA, "the frame holds CS and SS of ring 3");
    expect_eq(gate_seen[5], (reg_t)kernel_stack - 24, "on ESP0's stack");
    check(trap.cx == trap.bx + 8 && (trap.ax & 0xffff) == UCODE32 && (trap.dx & 0xffff) == UDATA, "RET 8 releases the parameters of both stacks");
    set(1, gate & ~(3ull << 45));
    expect_fault(GP, SEL(1), "a gate of DPL 0", start(user_gate, 0));
    set(1, gate & ~(1ull << 47));
    expect_fault(NP, SEL(1), "a gate that is not present", start(user_gate, 0));
    set(1, (gate & ~0xffff0000ull) | (uint64_t)KDATA << 16);
    expect_fault(GP, KDATA, "a gate to data", start(user_gate, 0));
    set(1, gate & ~0xffff0000ull);
    expect_fault(GP, 0, "a gate with a null selector", start(user_gate, 0));
    set(1, gate);
    set(2, descriptor(0, 0xfffff, 0x9e | 0xc000)); /* conforming, DPL 0 */
    expect_fault(USER_DONE, 0, "a far call to conforming code", start(ring_code, 0));
    expect_eq(gate_seen[1] & 3, 3, "keeps CPL 3");
    set(2, descriptor(0, 0xfffff, 0x9a | 0xc000));
    expect_fault(GP, SEL(2), "a far call to inner code that does not conform", start(ring_code, 0));
    set(3, descriptor(0, 0xfffff, 0xfa | 0xc000));
    expect_fault(GP, SEL(3), "a far jump to outer code", asm_volatile("ljmp $0x78, $outer_target"));
    expect_fault(USER_DONE, 0, "a far return to ring 3",
                 asm_volatile("push %0; push %1; push %2; push $outer_target; lret" ::"i"(UDATA), "r"(user_stack - 64), "i"(UCODE32)));
    check((trap.ax & 0xffff) == UCODE32 && (trap.bx & 0xffff) == UDATA && trap.cx == (reg_t)user_stack - 64, "CS SS ESP");
    check((trap.dx & 0xffff) == 0, "DS of ring 0 becomes null (%lx)", trap.dx);
    expect_fault(GP, UCODE32 & ~3, "a far return to an inner ring's wrong RPL", asm_volatile("push %0; push $outer_target; lret" ::"i"(UCODE32 & ~3)));
    expect_fault(USER_DONE, 0, "RET n to ring 3 releases on both stacks",
                 asm_volatile("push %0; push %1; push $0; push %2; push $outer_target; lret $4" ::"i"(UDATA), "r"(user_stack - 64), "i"(UCODE32)));
    expect_eq(trap.cx, (reg_t)user_stack - 60, "ESP");
}

/* ---- real mode ---- */

#define REAL 0x8000u
extern uint8_t real_code[], real_end[];
struct real_results {
    uint16_t wrapped, gp_taken, below, flags;
    uint32_t big;
    uint16_t ud_cs, ud_ip;
};
#define RESULTS ((volatile struct real_results *)0x9000)

/* Runs at REAL:0 and comes back to back_32. SS:SP 0x0000:0x7000. */
__asm__(".code16\n"
        "real_code:\n"
        " mov %cr0, %eax\n and $~1, %al\n mov %eax, %cr0\n ljmp $0x800, $1f - real_code\n"
        "1: xor %ax, %ax\n mov %ax, %ds\n mov %ax, %ss\n mov $0x7000, %sp\n"
        " lidtl %cs:real_idt - real_code\n"
        " movw $real_gp - real_code, 13 * 4\n movw $0x800, 13 * 4 + 2\n"
        " movw $real_ud - real_code, 6 * 4\n movw $0x800, 6 * 4 + 2\n"
        " mov $0x2000, %ax\n mov %ax, %es\n movb $0x34, %es:0\n movb $0x12, %es:0xffff\n"
        /* a word at offset 0xffff: beyond the limit */
        " mov $0xffff, %bx\n movw %es:(%bx), %ax\n"
        "real_after_gp: mov %ax, 0x9000\n"
        /* ES kept its large limit from protected mode in FS */
        " mov $0x300000, %ebx\n movl %fs:(%ebx), %eax\n mov %eax, 0x9008\n"
        /* a stack that wraps */
        " mov $0, %sp\n push $0x5678\n mov %ss:0xfffe, %ax\n mov %ax, 0x9004\n mov $0x7000, %sp\n"
        " pushf\n pop %ax\n mov %ax, 0x9006\n"
        " .byte 0x0f, 0x0b\n"
        "real_after_ud:\n"
        " lgdtl %cs:real_gdt - real_code\n mov %cr0, %eax\n or $1, %al\n mov %eax, %cr0\n ljmpl $0x08, $back_32\n"
        "real_gp: movw $1, %ss:0x9002\n mov %sp, %bp\n movw $real_after_gp - real_code, (%bp)\n iret\n"
        "real_ud: mov %sp, %bp\n mov (%bp), %ax\n mov %ax, %ss:0x900e\n mov 2(%bp), %ax\n mov %ax, %ss:0x900c\n addw $2, (%bp)\n iret\n"
        "real_idt: .word 0x3ff\n .long 0\n"
        "real_gdt: .word 0x1ff\n .long gdt\n"
        "real_end:\n.code32\n");

static void test_real(void)
{
    memcpy((void *)REAL, real_code, (size_t)(real_end - real_code));
    memset((void *)0x9000, 0, 64);
    *(volatile uint32_t *)0x300000 = 0xcafef00d;
    set(4, descriptor(REAL, 0xffff, 0x9a)); /* 16-bit code at REAL */
    set(5, descriptor(0, 0xffff, 0x92));
    load_fs(KDATA);
    asm_volatile("pushal\n mov %%esp, kept_esp\n mov %0, %%eax\n mov %%eax, %%ds\n mov %%eax, %%es\n mov %%eax, %%ss\n mov $0x7000, %%esp\n ljmp $0x80, $0\n"
                 "back_32: mov $0x10, %%eax\n mov %%eax, %%ds\n mov %%eax, %%es\n mov %%eax, %%ss\n mov %%eax, %%fs\n mov kept_esp, %%esp\n popal" ::"i"(SEL(5))
                 : "memory");
    lidt(&idt_pointer);
    check(true, "to real mode and back");
    check(RESULTS->gp_taken == 1, "a word at offset 0xffff is #GP through vector 13");
    expect_eq(RESULTS->big, 0xcafef00d, "limits of protected mode stay in real mode (FS)");
    expect_eq(RESULTS->below, 0x5678, "SP wraps from 0 to 0xfffe");
    check(RESULTS->ud_cs == REAL >> 4 && memcmp((void *)(REAL + RESULTS->ud_ip), "\x0f\x0b", 2) == 0, "#UD's frame points at the instruction");
}

void test_main(void)
{
    test_limits();
    test_stack_limit();
    test_loads();
    test_inspection();
    test_gates();
    test_real();
}
