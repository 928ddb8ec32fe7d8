/*
 * SYSCALL, SYSRET, SYSENTER, SYSEXIT in all widths, SWAPGS, FS and GS bases, IRET's widths. SDM vol. 2 under each name, vol. 3, 5.8.7 and 5.8.8; where the
 * vendors differ (SYSCALL in compatibility mode, SYSENTER in long mode, the null SS) the vendor of CPUID decides.
 */
#include "runtime/conform.h"

#define EFER 0xc0000080
#define STAR 0xc0000081
#define LSTAR 0xc0000082
#define CSTAR 0xc0000083
#define SFMASK 0xc0000084
#define FS_BASE 0xc0000100
#define GS_BASE 0xc0000101
#define KERNEL_GS_BASE 0xc0000102
#define SYSENTER_CS 0x174
#define SYSENTER_ESP 0x175
#define SYSENTER_EIP 0x176

static bool amd;

/* What an entry point saw. */
volatile reg_t seen_cs, seen_ss, seen_flags, seen_rcx, seen_r11, seen_rsp;
extern uint8_t entry_point[], user_syscall[], user_syscall_after[], user_syscall32[], user_syscall32_after[], user_sysenter[], user_sysenter32[], user_done[],
    user_done32[], sysret64[], sysret32[], sysexit64[], sysexit32[];

__asm__("entry_point:\n" /* on no stack of its own: registers to memory, then a trap */
        "mov %rsp, seen_rsp\n mov %rcx, seen_rcx\n mov %r11, seen_r11\n"
        "mov %cs, %eax\n mov %rax, seen_cs\n mov %ss, %eax\n mov %rax, seen_ss\n"
        "mov $kernel_stack_bytes + 16384, %rsp\n pushf\n pop seen_flags\n ud2\n"
        "user_syscall: syscall\nuser_syscall_after: int $0x30\n"
        "user_sysenter: sysenter\n int $0x30\n"
        "user_done: mov %cs, %eax\n mov %ss, %ebx\n pushf\n pop %rcx\n mov %rsp, %rdx\n int $0x30\n"
        "sysret64: mov %rdi, %rsp\n .byte 0x48\n sysretl\n"
        "sysret32: mov %rdi, %rsp\n sysretl\n"
        "sysexit64: mov %rdi, %r8\n .byte 0x48\n sysexitl\n"
        "sysexit32: sysexitl\n"
        ".code32\n"
        "user_syscall32: syscall\nuser_syscall32_after: int $0x30\n"
        "user_sysenter32: sysenter\n int $0x30\n"
        "user_done32: mov %cs, %eax\n mov %ss, %ebx\n pushf\n pop %ecx\n mov %esp, %edx\n int $0x30\n"
        ".code64");

static void start_user(uint8_t *code, uint16_t cs, reg_t flags)
{
    struct entry entry = {.ip = (reg_t)code, .cs = cs, .flags = flags, .sp = (reg_t)user_stack - 64, .ss = UDATA, .cx = 0x1234567800001111, .dx = 1};
    enter(&entry);
}

static void test_syscall(void)
{
    wrmsr(STAR, (uint64_t)(UCODE32 & ~3) << 48 | (uint64_t)KCODE << 32);
    wrmsr(LSTAR, (reg_t)entry_point);
    wrmsr(CSTAR, (reg_t)entry_point);
    wrmsr(SFMASK, FLAG_DF | FLAG_TF | FLAG_CF);
    expect_fault(UD, 0, "SYSCALL from 64-bit ring 3", start_user(user_syscall, UCODE, 2 | FLAG_DF | FLAG_CF | FLAG_ZF));
    check(trap.ip == (reg_t)entry_point + ((uint8_t *)trap.ip - entry_point) && (trap.cs & 0xffff) == KCODE, "arrives at LSTAR");
    check(seen_cs == KCODE && seen_ss == KDATA, "CS and SS from STAR[47:32]");
    expect_eq(seen_rcx, (reg_t)user_syscall_after, "RCX holds the return address");
    check((seen_r11 & 0xfff) == (2 | FLAG_DF | FLAG_CF | FLAG_ZF), "R11 holds RFLAGS (%lx)", seen_r11);
    check(!(seen_flags & (FLAG_DF | FLAG_CF)) && (seen_flags & FLAG_ZF), "SFMASK clears flags (%lx)", seen_flags);
    expect_eq(seen_rsp, (reg_t)user_stack - 64, "RSP stays");
    wrmsr(SFMASK, 0x47fd5); /* what kernels clear: all arithmetic flags among it */
    expect_fault(UD, 0, "SYSCALL with a kernel's SFMASK", start_user(user_syscall, UCODE, 2 | FLAG_CF | FLAG_ZF));
    check(seen_cs == KCODE && seen_ss == KDATA && seen_flags == 2 && (seen_r11 & 0xfff) == (2 | FLAG_CF | FLAG_ZF),
          "selectors and flags as soon as it has arrived (cs %lx ss %lx flags %lx r11 %lx)", seen_cs, seen_ss, seen_flags, seen_r11);
    wrmsr(SFMASK, FLAG_DF | FLAG_TF | FLAG_CF);

    wrmsr(STAR, rdmsr(STAR) & ~0xffffffffull);
    (void)TRY(start_user(user_syscall32, UCODE32, 2));
    if (amd) {
        check(trap.vector == UD && seen_rcx == (reg_t)user_syscall32_after && (trap.cs & 0xffff) == KCODE, "SYSCALL from compatibility mode arrives at CSTAR");
    } else {
        check(trap.vector == UD && trap.ip == (reg_t)user_syscall32, "SYSCALL in compatibility mode is #UD");
    }
    wrmsr(EFER, rdmsr(EFER) & ~1ull);
    expect_fault(UD, 0, "SYSCALL without EFER.SCE", start_user(user_syscall, UCODE, 2));
    check(trap.ip == (reg_t)user_syscall, "#UD at it");
    expect_fault(UD, 0, "SYSRET without EFER.SCE", asm_volatile("sysretl"));
    wrmsr(EFER, rdmsr(EFER) | 1);
    expect_fault(GP, 0, "LSTAR that is not canonical", wrmsr(LSTAR, 1ull << 63));
    expect_fault(GP, 0, "CSTAR that is not canonical", wrmsr(CSTAR, 1ull << 63));
    wrmsr(SFMASK, 0);
}

#define do_sysret(label, target, flags)                                                                                                              \
    asm_volatile("mov %0, %%rcx; mov %1, %%r11; mov %2, %%rdi; jmp " label ::"r"((reg_t)(target)), "r"((reg_t)(flags)), "r"((reg_t)user_stack - 64)      \
                 : "rcx", "r11", "rdi", "memory")

static void test_sysret(void)
{
    expect_fault(USER_DONE, 0, "SYSRET to 64-bit code", do_sysret("sysret64", user_done, 2 | FLAG_DF));
    check(trap.ax == UCODE && trap.bx == UDATA, "CS and SS from STAR[63:48] (%lx %lx)", trap.ax, trap.bx);
    check(trap.cx & FLAG_DF, "RFLAGS from R11");
    expect_eq(trap.dx, (reg_t)user_stack - 64, "RSP stays");
    expect_fault(USER_DONE, 0, "SYSRET to compatibility mode", do_sysret("sysret32", user_done32, 2));
    check(trap.ax == UCODE32 && trap.bx == UDATA, "CS and SS from STAR[63:48] (%lx %lx)", trap.ax, trap.bx);
    expect_fault(USER_DONE, 0, "SYSRET ignores RF and VM", do_sysret("sysret64", user_done, 2 | FLAG_RF | FLAG_VM | 0x8000));
    check(!(trap.cx & (FLAG_RF | FLAG_VM | 0x8000)), "and reserved flags (%lx)", trap.cx);
    idt[GP].ist = idt[PF].ist = 1;
    tss.ist[0] = (reg_t)kernel_stack;
    if (amd) {
        (void)TRY(do_sysret("sysret64", 1ull << 63, 2));
        check(trap.vector == GP && (trap.cs & 3) == 3, "SYSRET to an address that is not canonical: #GP in ring 3");
    } else {
        (void)TRY(do_sysret("sysret64", 1ull << 63, 2));
        check(trap.vector == GP && trap.error == 0 && (trap.cs & 3) == 0, "SYSRET to an address that is not canonical: #GP in ring 0");
    }
    idt[GP].ist = idt[PF].ist = 0;
}

static void user_run_sysret(reg_t arg)
{
    asm_volatile("sysretl");
}
static void user_run_sysexit(reg_t arg)
{
    asm_volatile("sysexitl");
}
static void user_run_swapgs(reg_t arg)
{
    asm_volatile("swapgs");
}

static void test_sysenter(void)
{
    if (amd) {
        expect_fault(UD, 0, "SYSENTER in long mode is #UD", start_user(user_sysenter, UCODE, 2));
        expect_fault(UD, 0, "SYSENTER in compatibility mode is #UD", start_user(user_sysenter32, UCODE32, 2));
        expect_fault(UD, 0, "SYSEXIT in long mode is #UD", asm_volatile("sysexitl"));
        return;
    }
    wrmsr(SYSENTER_CS, 0);
    expect_fault(GP, 0, "SYSENTER with a null SYSENTER_CS", start_user(user_sysenter, UCODE, 2));
    expect_fault(GP, 0, "SYSEXIT with a null SYSENTER_CS", asm_volatile("sysexitl"));
    wrmsr(SYSENTER_CS, KCODE);
    wrmsr(SYSENTER_ESP, (reg_t)kernel_stack - 512);
    wrmsr(SYSENTER_EIP, (reg_t)entry_point);
    expect_fault(UD, 0, "SYSENTER from 64-bit ring 3", start_user(user_sysenter, UCODE, 2 | FLAG_DF));
    check(seen_cs == KCODE && seen_ss == KCODE + 8, "CS and SS from SYSENTER_CS");
    expect_eq(seen_rsp, (reg_t)kernel_stack - 512, "RSP from SYSENTER_ESP");
    check((seen_flags & FLAG_DF) && !(seen_flags & FLAG_IF), "only IF (and VM) are cleared");
    expect_fault(UD, 0, "SYSENTER from compatibility mode", start_user(user_sysenter32, UCODE32, 2));
    check(seen_cs == KCODE && seen_rsp == (reg_t)kernel_stack - 512, "arrives in 64-bit mode");
    expect_fault(GP, 0, "SYSEXIT in ring 3", user_call(user_run_sysexit, 0));
    expect_fault(USER_DONE, 0, "SYSEXIT to 64-bit code", asm_volatile("jmp sysexit64" ::"c"((reg_t)user_stack - 64), "d"(user_done)));
    check(trap.ax == (KCODE + 32) + 3 && trap.bx == (KCODE + 40) + 3 && trap.dx == (reg_t)user_stack - 64, "CS SS RSP (%lx %lx)", trap.ax, trap.bx);
    expect_fault(USER_DONE, 0, "SYSEXIT to compatibility mode",
                 asm_volatile("jmp sysexit32" ::"c"((reg_t)user_stack - 64), "d"(user_done32)));
    check(trap.ax == (KCODE + 16) + 3 && trap.bx == (KCODE + 24) + 3, "CS SS (%lx %lx)", trap.ax, trap.bx);
    expect_fault(GP, 0, "SYSENTER_EIP that is not canonical", wrmsr(SYSENTER_EIP, 1ull << 63));
    idt[GP].ist = 1;
    expect_fault(GP, 0, "SYSEXIT to an address that is not canonical",
                 asm_volatile(".byte 0x48; sysexitl" ::"c"((reg_t)user_stack - 64), "d"(1ull << 63)));
    idt[GP].ist = 0;
}

static volatile uint64_t words[4];

static void test_bases(void)
{
    words[0] = 11;
    words[1] = 22;
    wrmsr(GS_BASE, (reg_t)&words[0]);
    wrmsr(KERNEL_GS_BASE, (reg_t)&words[1]);
    uint64_t value;
    asm_volatile("mov %%gs:0, %0" : "=r"(value));
    expect_eq(value, 11, "GS base by MSR");
    asm_volatile("swapgs; mov %%gs:0, %0" : "=r"(value));
    expect_eq(value, 22, "SWAPGS");
    expect_eq(rdmsr(KERNEL_GS_BASE), (reg_t)&words[0], "KERNEL_GS_BASE after SWAPGS");
    asm_volatile("swapgs");
    expect_fault(GP, 0, "SWAPGS in ring 3", user_call(user_run_swapgs, 0));
    expect_fault(GP, 0, "SYSRET in ring 3", user_call(user_run_sysret, 0));
    expect_fault(GP, 0, "GS_BASE that is not canonical", wrmsr(GS_BASE, 1ull << 48));
    expect_fault(GP, 0, "KERNEL_GS_BASE that is not canonical", wrmsr(KERNEL_GS_BASE, 1ull << 48));
    wrmsr(FS_BASE, (reg_t)&words[1] + (1ull << 32));
    asm_volatile("mov %1, %%rbx; neg %%rbx; mov %%fs:(%%rbx), %0" : "=r"(value) : "r"(1ull << 32) : "rbx");
    expect_eq(value, 22, "a 64-bit FS base");
    asm_volatile("mov %0, %%fs" ::"r"(KDATA));
    expect_eq(rdmsr(FS_BASE), 0, "loading FS loads the descriptor's base");
    wrmsr(FS_BASE, 0x1234);
    asm_volatile("mov %0, %%fs" ::"r"(0));
    bool may_keep = amd && !(cpuid(0x80000000, 0).a >= 0x80000021 && cpuid(0x80000021, 0).a & 1u << 6);
    check(rdmsr(FS_BASE) == 0 || may_keep, "a null selector clears the base, but by some of AMD's (%llx)", (unsigned long long)rdmsr(FS_BASE));

    uint64_t big = 0x123456789000ull;
    expect_fault(UD, 0, "WRFSBASE without CR4.FSGSBASE", write_cr4(read_cr4() & ~(1ul << 16)); asm_volatile("wrfsbase %0" ::"r"(big)));
    if (cpuid(7, 0).b & 1) {
        write_cr4(read_cr4() | 1ul << 16);
        asm_volatile("wrfsbase %1; rdfsbase %0" : "=r"(value) : "r"(big));
        check(value == big && rdmsr(FS_BASE) == big, "WRFSBASE, RDFSBASE");
        asm_volatile("wrgsbase %k1; rdgsbase %0" : "=r"(value) : "r"(0x80000001u));
        expect_eq(value, 0x80000001u, "WRGSBASE of 32 bits");
        expect_fault(GP, 0, "WRGSBASE of an address that is not canonical", asm_volatile("wrgsbase %0" ::"r"(1ull << 50)));
        write_cr4(read_cr4() & ~(1ul << 16));
    }
    wrmsr(FS_BASE, 0);
    wrmsr(GS_BASE, 0);
}

/* ---- IRET ---- */

extern uint8_t iret_target[], iret_target32[], iret_target16[];
__asm__("iret_target: mov %cs, %eax; mov %ss, %ebx; mov %rsp, %rdx; int $0x30\n"
        ".code32\niret_target32: mov %cs, %eax; mov %ss, %ebx; mov %esp, %edx; int $0x30\n.code64");

static void test_iret(void)
{
    expect_fault(USER_DONE, 0, "IRETQ within ring 0",
                 asm_volatile("mov %%ss, %%eax; push %%rax; push %0; pushf; mov %%cs, %%eax; push %%rax; lea iret_target, %%rax; push %%rax; iretq" ::"r"(
                                  (reg_t)kernel_stack - 64)
                              : "rax"));
    expect_eq(trap.dx, (reg_t)kernel_stack - 64, "pops RSP even so");
    expect_fault(USER_DONE, 0, "IRETQ to compatibility mode in ring 0",
                 asm_volatile("push %1; push %0; pushf; push %2; lea iret_target32, %%rax; push %%rax; iretq" ::"r"((reg_t)kernel_stack - 64),
                              "r"((reg_t)KDATA), "r"((reg_t)KCODE32)
                              : "rax"));
    check((trap.ax & 0xffff) == KCODE32, "CS is the 32-bit one");
    expect_fault(USER_DONE, 0, "IRETQ to compatibility mode in ring 3", start_user(iret_target32, UCODE32, 2));
    check((trap.ax & 0xffff) == UCODE32 && (trap.bx & 0xffff) == UDATA, "CS and SS");
    expect_fault(USER_DONE, 0, "IRETL in 64-bit mode",
                 asm_volatile("mov %0, %%ecx; sub $20, %%rsp; movl $iret_target, (%%rsp); movl %1, 4(%%rsp); movl $2, 8(%%rsp); movl %%ecx, 12(%%rsp);"
                              "movl %2, 16(%%rsp); iretl" ::"r"((uint32_t)(uintptr_t)kernel_stack - 128),
                              "i"(KCODE), "i"(KDATA)
                              : "rcx"));
    expect_eq(trap.dx, (reg_t)kernel_stack - 128, "pops ESP and SS");
    /* A null SS in ring 0 and 64-bit mode is legal, in ring 3 and in compatibility mode not. */
    expect_fault(USER_DONE, 0, "IRETQ with a null SS in ring 0",
                 asm_volatile("push $0; push %0; pushf; push %1; lea iret_target, %%rax; push %%rax; iretq" ::"r"((reg_t)kernel_stack - 64), "r"((reg_t)KCODE)
                              : "rax"));
    struct entry bad = {.ip = (reg_t)iret_target, .cs = UCODE, .flags = 2, .sp = (reg_t)user_stack - 64, .ss = 3};
    expect_fault(GP, 0, "IRETQ with a null SS in ring 3", enter(&bad));
    bad.ss = KDATA;
    expect_fault(GP, KDATA, "IRETQ with SS of another DPL", enter(&bad));
    bad.ss = UCODE;
    expect_fault(GP, UCODE & ~3, "IRETQ with code in SS", enter(&bad));
    bad.ss = UDATA;
    bad.cs = 3;
    expect_fault(GP, 0, "IRETQ with a null CS", enter(&bad));
    bad.cs = UDATA;
    expect_fault(GP, UDATA & ~3, "IRETQ with data in CS", enter(&bad));
    bad.cs = KCODE | 3;
    expect_fault(GP, KCODE, "IRETQ with CS of another DPL", enter(&bad));
    bad.cs = 0x20b;
    expect_fault(GP, 0x208, "IRETQ with CS beyond the GDT", enter(&bad));
    gdt[FREE_SELECTOR / 8] = gdt[UCODE / 8] & ~(1ull << 47);
    bad.cs = FREE_SELECTOR | 3;
    expect_fault(NP, FREE_SELECTOR, "IRETQ with CS that is not present", enter(&bad));
    gdt[FREE_SELECTOR / 8] = gdt[UDATA / 8] & ~(1ull << 47);
    bad.cs = UCODE;
    bad.ss = FREE_SELECTOR | 3;
    expect_fault(SS, FREE_SELECTOR, "IRETQ with SS that is not present", enter(&bad));
    gdt[FREE_SELECTOR / 8] = gdt[KCODE / 8] | 1ull << 54; /* L and D */
    expect_fault(GP, FREE_SELECTOR, "IRETQ to code with L and D",
                 asm_volatile("push %1; push %0; pushf; push %2; lea iret_target, %%rax; push %%rax; iretq" ::"r"((reg_t)kernel_stack - 64),
                              "r"((reg_t)KDATA), "r"((reg_t)FREE_SELECTOR)
                              : "rax"));
    struct entry nt = {.ip = (reg_t)iret_target, .cs = UCODE, .flags = 2, .sp = (reg_t)user_stack - 64, .ss = UDATA};
    expect_fault(GP, 0, "IRET with NT in long mode", flags_write(2 | FLAG_NT); enter(&nt));
}

void test_main(void)
{
    amd = cpuid(0, 0).b == 0x68747541;
    test_syscall();
    test_sysret();
    test_sysenter();
    test_bases();
    test_iret();
}
