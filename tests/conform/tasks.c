/*
 * Hardware task switches: by JMP, CALL, through task gates by INT and by faults, IRET with NT, busy bits, links, CR0.TS, the saved image, the debug trap, and
 * virtual-8086 mode entered and left. SDM vol. 3, ch. 7 and 20.
 */
#include "runtime/conform.h"

#define TASK_A 0x60 /* TSS selectors */
#define TASK_B 0x68
#define TASK_GATE 0x70
#define ABSENT 0x78
#define BUSY (2ull << 40)

static struct tss task_a, task_b;
static uint8_t stack_a[4096], stack_b[4096];
static volatile unsigned runs_a, runs_b;
static volatile reg_t in_task_flags, in_task_tr, in_task_cr0, in_task_error;
extern uint8_t task_a_entry[], task_a_again[], task_b_entry[], task_fault_entry[];

/* Task A counts, notes its state and goes back by IRET; entered once more it goes on after it. */
__asm__("task_a_entry:\n"
        "task_a_again: incl runs_a\n pushf\n popl in_task_flags\n str %eax\n mov %eax, in_task_tr\n mov %cr0, %eax\n mov %eax, in_task_cr0\n iret\n jmp task_a_again\n"
        /* Task B goes back by a jump to the runtime's task. */
        "task_b_entry: incl runs_b\n pushf\n popl in_task_flags\n ljmp $0x50, $0\n jmp task_b_entry\n"
        /* Takes a fault of another task: pops the error code, goes to the runtime's task. */
        "task_fault_entry: popl in_task_error\n incl runs_b\n ljmp $0x50, $0\n jmp task_fault_entry\n");

static void task_set(struct tss *t, unsigned selector, void *entry, uint8_t *stack)
{
    memset(t, 0, sizeof *t);
    t->eip = (reg_t)entry;
    t->eflags = 2;
    t->esp = (reg_t)stack + 4096;
    t->cs = KCODE;
    t->ss = t->ds = t->es = KDATA;
    t->ecx = 0xc0ffee;
    t->io_map = sizeof *t;
    gdt[selector / 8] = descriptor((reg_t)t, sizeof *t - 1, 0x89);
}

static bool busy(unsigned selector)
{
    return gdt[selector / 8] & BUSY;
}

static void test_call_and_jump(void)
{
    task_set(&task_a, TASK_A, task_a_entry, stack_a);
    task_set(&task_b, TASK_B, task_b_entry, stack_b);
    runs_a = runs_b = 0;
    reg_t cr0 = read_cr0();
    check(busy(TSS_SELECTOR), "LTR marks the TSS busy");
    expect_ok("CALL to a TSS and IRET", asm_volatile("lcall $0x60, $0" ::: "memory"));
    expect_eq(runs_a, 1, "the task ran");
    expect_eq(in_task_tr & 0xffff, TASK_A, "TR in the task");
    check(in_task_flags & FLAG_NT, "NT in the nested task");
    check(in_task_cr0 & 8, "CR0.TS is set by the switch");
    expect_eq(task_a.link, TSS_SELECTOR, "its back link");
    check(!busy(TASK_A) && busy(TSS_SELECTOR), "IRET clears its busy bit");
    check(!(task_a.eflags & FLAG_NT), "and NT in its image");
    expect_eq(task_a.ecx, 0xc0ffee, "ECX saved in its image");
    check(read_cr0() & 8, "CR0.TS after the way back");
    asm_volatile("clts");
    check(!(flags_read() & FLAG_NT), "NT is clear in the first task");
    write_cr0(cr0);
    expect_ok("CALL again: goes on after the IRET", asm_volatile("lcall $0x60, $0" ::: "memory"));
    expect_eq(runs_a, 2, "the task ran again");
    reg_t ebx = 0x1234, esi = 0x5678;
    expect_ok("JMP to a TSS and JMP back", asm_volatile("ljmp $0x68, $0" : "+b"(ebx), "+S"(esi)::"memory"));
    expect_eq(runs_b, 1, "the task ran");
    check(ebx == 0x1234 && esi == 0x5678, "registers come back");
    check(!(in_task_flags & FLAG_NT), "no NT after JMP");
    check(!busy(TASK_B) && busy(TSS_SELECTOR), "busy bits after JMPs");
    write_cr0(cr0);
    gdt[TASK_GATE / 8] = (uint64_t)TASK_A << 16 | 0x8500ull << 32;
    expect_ok("CALL through a task gate", asm_volatile("lcall $0x70, $0" ::: "memory"));
    expect_eq(runs_a, 3, "the task ran");
    idt[0x44] = (struct gate){.selector = TASK_A, .type = 0x85};
    expect_ok("INT through a task gate", asm_volatile("int $0x44" ::: "memory"));
    expect_eq(runs_a, 4, "the task ran");
    write_cr0(cr0);
}

static void test_faults(void)
{
    expect_fault(GP, TSS_SELECTOR, "JMP to the busy TSS", asm_volatile("ljmp $0x50, $0"));
    expect_fault(GP, TSS_SELECTOR, "LTR of a busy TSS", ltr(TSS_SELECTOR));
    gdt[TASK_A / 8] &= ~(1ull << 47);
    expect_fault(NP, TASK_A, "CALL to a TSS that is not present", asm_volatile("lcall $0x60, $0"));
    gdt[TASK_A / 8] = descriptor((reg_t)&task_a, 0x66, 0x89);
    expect_fault(TS, TASK_A, "CALL to a TSS that is too short", asm_volatile("lcall $0x60, $0"));
    check((trap.cs & 0xffff) == KCODE, "before the switch");

    /* After the switch the fault belongs to the new task, whose stack may be unusable: a task of its own takes it, and jumps back to ours. */
    static const struct {
        const char *name;
        unsigned offset;
        uint16_t selector, error;
        uint8_t vector;
    } bad[] = {
        {"CS null", offsetof(struct tss, cs), 0, 0, TS},
        {"CS data", offsetof(struct tss, cs), KDATA, KDATA, TS},
        {"CS of DPL 3 with RPL 0", offsetof(struct tss, cs), UCODE & ~3, UCODE & ~3, TS},
        {"CS not present", offsetof(struct tss, cs), ABSENT, ABSENT, NP},
        {"SS null", offsetof(struct tss, ss), 0, 0, TS},
        {"SS code", offsetof(struct tss, ss), KCODE, KCODE, TS},
        {"SS beyond the GDT", offsetof(struct tss, ss), 0x208, 0x208, TS},
        {"SS of DPL 3", offsetof(struct tss, ss), UDATA, UDATA & ~3, TS},
        {"DS beyond the GDT", offsetof(struct tss, ds), 0x208, 0x208, TS},
        {"FS a system segment", offsetof(struct tss, fs), TASK_B, TASK_B, TS},
        {"LDT that is none", offsetof(struct tss, ldt), KDATA, KDATA, TS},
    };
    gdt[ABSENT / 8] = gdt[KCODE / 8] & ~(1ull << 47);
    for (volatile unsigned n = 0; n < sizeof bad / sizeof *bad; n++) {
        task_set(&task_a, TASK_A, task_a_entry, stack_a);
        task_set(&task_b, TASK_B, task_fault_entry, stack_b);
        memcpy((uint8_t *)&task_a + bad[n].offset, &bad[n].selector, 2);
        idt[bad[n].vector] = (struct gate){.selector = TASK_B, .type = 0x85};
        in_task_error = 0xdead;
        runs_a = runs_b = 0;
        (void)TRY(asm_volatile("ljmp $0x60, $0"));
        check(trap.vector == NO_TRAP && runs_a == 0 && runs_b == 1 && (in_task_error & ~1u) == bad[n].error && task_b.link == TASK_A,
              "a new task with %s (runs %u %u error %lx link %x)", bad[n].name, runs_a, runs_b, in_task_error, task_b.link);
        gate_reset(bad[n].vector);
    }
    asm_volatile("clts");
}

/* Tasks that mend what faulted, in our own image, and return to it. */
extern uint8_t task_de_entry[], task_gp_entry[];
__asm__("task_de_entry: movl $1, tss + 44\n incl runs_a\n iret\n jmp task_de_entry\n"
        "task_gp_entry: popl in_task_error\n movl $0x10, tss + 40\n incl runs_b\n iret\n jmp task_gp_entry\n");

static void test_fault_gates(void)
{
    runs_a = runs_b = 0;
    task_set(&task_a, TASK_A, task_de_entry, stack_a);
    idt[DE] = (struct gate){.selector = TASK_A, .type = 0x85};
    uint32_t quotient = 0, zero = 0, rest = 0;
    asm_volatile("divl %%ecx" : "=a"(quotient), "+c"(zero), "+d"(rest) : "0"(42) : "memory", "cc");
    check(quotient == 42 && runs_a == 1, "#DE through a task gate, which sets ECX in our image and returns");
    check(tss.eflags & FLAG_RF, "RF is in our image");
    gate_reset(DE);

    task_set(&task_b, TASK_B, task_gp_entry, stack_b);
    idt[GP] = (struct gate){.selector = TASK_B, .type = 0x85};
    reg_t selector = 0x208;
    asm_volatile("mov %%ax, %%fs" : "+a"(selector)::"memory");
    check(runs_b == 1 && in_task_error == 0x208 && selector == KDATA, "#GP through a task gate: the error code is on its stack");
    gate_reset(GP);
    asm_volatile("mov %w0, %%fs" ::"r"(0));
    asm_volatile("clts");
}

static void test_iret(void)
{
    tss.link = TASK_A;
    task_set(&task_a, TASK_A, task_a_entry, stack_a);
    expect_fault(TS, TASK_A, "IRET with NT to a TSS that is not busy", flags_write(2 | FLAG_NT); asm_volatile("iret"));
    tss.link = 0x208;
    expect_fault(TS, 0x208, "IRET with NT to a TSS beyond the GDT", flags_write(2 | FLAG_NT); asm_volatile("iret"));
    tss.link = 0;
    expect_fault(TS, 0, "IRET with NT to a null link", flags_write(2 | FLAG_NT); asm_volatile("iret"));
}

static void test_debug_trap(void)
{
    task_set(&task_a, TASK_A, task_a_entry, stack_a);
    task_a.trap = 1;
    write_dr6(0xffff0ff0);
    runs_a = 0;
    expect_fault(DB, 0, "the T bit of a TSS", asm_volatile("lcall $0x60, $0" ::: "memory"));
    check((read_dr6() & 0x8000) && trap.ip == (reg_t)task_a_entry && runs_a == 0, "#DB before the task's first instruction, DR6.BT");
    write_dr6(0xffff0ff0);
    gdt[TSS_SELECTOR / 8] &= ~BUSY;
    gdt[TASK_A / 8] &= ~BUSY;
    ltr(TSS_SELECTOR);
    asm_volatile("clts");
}

/* ---- virtual-8086 mode ---- */

/* 16-bit code copied below 1 MiB. */
#define V86_CODE 0x20000u
extern uint8_t v86_code[], v86_end[];
__asm__(".code16\n"
        "v86_code: mov $0x3000, %ax\n mov %ax, %ds\n movw $0xbeef, 0x10\n mov %cs, %bx\n mov %ss, %cx\n pushf\n popw %dx\n int3\n"
        " cli\n v86_end: .code32");

struct v86_frame {
    reg_t ip, cs, flags, sp, ss, es, ds, fs, gs;
};

static void v86_enter(reg_t ip, reg_t flags)
{
    struct v86_frame f = {.ip = ip, .cs = V86_CODE >> 4, .flags = flags | FLAG_VM | 2, .sp = 0x1000, .ss = 0x4000, .es = 0x1111, .ds = 0x2222, .fs = 0x3333,
                          .gs = 0x4444};
    asm_volatile("sub $36, %%esp; mov %%esp, %%edi; mov $9, %%ecx; rep movsl; iretl" ::"S"(&f) : "edi", "ecx", "memory");
}

static void test_v86(void)
{
    memcpy((void *)V86_CODE, v86_code, (size_t)(v86_end - v86_code));
    *(volatile uint16_t *)0x30010 = 0;
    expect_fault(BP, 0, "virtual-8086 mode, left by INT3", v86_enter(0, 3u << 12));
    check(trap.flags & FLAG_VM, "VM is pushed");
    check((trap.bx & 0xffff) == V86_CODE >> 4 && (trap.cx & 0xffff) == 0x4000 && (trap.cs & 0xffff) == V86_CODE >> 4, "segments by 8086 rules");
    expect_eq(*(volatile uint16_t *)0x30010, 0xbeef, "DS is 16 times its selector");
    reg_t *frame = (reg_t *)kernel_stack;
    check((frame[-1] & 0xffff) == 0x4444 && (frame[-2] & 0xffff) == 0x3333 && (frame[-3] & 0xffff) == 0x3000 && (frame[-4] & 0xffff) == 0x1111,
          "GS FS DS ES are pushed");
    uint32_t ds, fs;
    expect_fault(GP, 0, "CLI with IOPL 0", v86_enter((reg_t)(v86_end - v86_code) - 1, 0));
    expect_fault(GP, 0, "PUSHF with IOPL 0", v86_enter(0, 0));
    check(*(uint8_t *)(V86_CODE + trap.ip) == 0x9c, "points at PUSHF");
    asm_volatile("mov %%ds, %0; mov %%fs, %1" : "=r"(ds), "=r"(fs));
    expect_eq(fs, 0, "data segments are null in the handler");
}

void test_main(void)
{
    test_call_and_jump();
    test_faults();
    test_fault_gates();
    test_iret();
    test_debug_trap();
    test_v86();
}
