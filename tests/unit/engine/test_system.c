/* The system side of the interpreter: events, gates, far transfers, tasks, segments, control registers, MSRs, system calls, ports. */
#include "arch/host.h"
#include "tiny_test.h"

#include <string.h>

/* Descriptors that tests add behind tiny_vm's own, from here on. */
#define FREE_SELECTOR 0x50u
#define TSS2 0x6800u

static struct cpu_state *cpu_of(struct tiny_vm *vm)
{
    return &vm->vcpu->cpu;
}

static void put(struct tiny_vm *vm, gpa_t gpa, const void *data, size_t size)
{
    memcpy(tiny_vm_at(vm, gpa), data, size);
}

static void descriptor_put(struct tiny_vm *vm, unsigned selector, uint64_t value)
{
    quad_put(vm, TINY_GDT + (selector & ~7u), value);
    cpu_of(vm)->gdtr.limit = 0xff;
}

static uint64_t descriptor(uint32_t base, uint32_t limit, unsigned access, unsigned flags)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)access << 40 |
           (uint64_t)(limit >> 16 & 0xf) << 48 | (uint64_t)flags << 52 | (uint64_t)(base >> 24) << 56;
}

static uint64_t gate(uint16_t selector, uint32_t offset, unsigned access, unsigned parameters)
{
    return (offset & 0xffff) | (uint64_t)selector << 16 | (uint64_t)parameters << 32 | (uint64_t)access << 40 |
           (uint64_t)(offset >> 16) << 48;
}

/* Runs into the handler and checks error code and pushed rip, relative to the code's start. */
static void expect_fault64(struct tiny_vm *vm, unsigned vector, int64_t error, uint64_t offset)
{
    run_to_vector(vm, vector);
    assert_frame64(vm, TINY_CODE + offset, error);
}

static void expect_fault32(struct tiny_vm *vm, unsigned vector, int64_t error, uint64_t offset)
{
    run_to_vector(vm, vector);
    gpa_t frame = reg(vm, GPR_RSP);
    if (error >= 0) {
        assert_int_equal(long_at(vm, frame), error);
        frame += 4;
    }
    assert_int_equal(long_at(vm, frame), TINY_CODE + offset);
}

static void enter_user32(struct tiny_vm *vm)
{
    tiny_vm_enter_user(vm, false);
}

/* ---- events in long mode ---- */

FRAGMENT(int_80, 64, "nop\n int $0x80\n hlt");
static void user_interrupt_switches_stack(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, int_80);
    tiny_vm_enter_user(vm, true);
    cpu_of(vm)->rflags |= RFLAGS_IF | RFLAGS_CF;
    run_to_vector(vm, 0x80);
    gpa_t frame = reg(vm, GPR_RSP);
    assert_int_equal(frame, TINY_STACK - 40);
    assert_int_equal(quad_at(vm, frame), TINY_CODE + 3);
    assert_int_equal(quad_at(vm, frame + 8), TINY_USER_CS64);
    assert_int_equal(quad_at(vm, frame + 16), RFLAGS_FIXED | RFLAGS_IF | RFLAGS_CF);
    assert_int_equal(quad_at(vm, frame + 24), TINY_USER_STACK);
    assert_int_equal(quad_at(vm, frame + 32), TINY_USER_DS);
    assert_int_equal(cpu_of(vm)->seg[SEG_SS].selector, 0);
    assert_true(cpu_of(vm)->seg[SEG_SS].unusable);
    assert_int_equal(cpu_cpl(cpu_of(vm)), 0);
    assert_int_equal(cpu_of(vm)->rflags & RFLAGS_IF, 0);
}

static void gate_privilege_is_checked(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, int_80);
    quad_put(vm, TINY_IDT + 16 * 0x80, gate(TINY_CS64, TINY_HANDLER, 0x8e, 0));
    tiny_vm_enter_user(vm, true);
    expect_fault64(vm, VECTOR_GP, 0x80 * 8 + 2, 1);

    LOAD(vm, TINY_LONG, int_80);
    quad_put(vm, TINY_IDT + 16 * 0x80, gate(TINY_CS64, TINY_HANDLER, 0x6e, 0));
    expect_fault64(vm, VECTOR_NP, 0x80 * 8 + 2, 1);

    LOAD(vm, TINY_LONG, int_80);
    cpu_of(vm)->idtr.limit = 0x7ff;
    expect_fault64(vm, VECTOR_GP, 0x80 * 8 + 2, 1);
}

static void interrupt_stack_table(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, int_80);
    quad_put(vm, TINY_IDT + 16 * 0x80, gate(TINY_CS64, TINY_HANDLER + 16 * 0x80, 0x8e, 3));
    quad_put(vm, TINY_TSS + 36 + 8 * 2, 0x2800b);
    run_to_vector(vm, 0x80);
    assert_int_equal(reg(vm, GPR_RSP), 0x28000 - 40); /* aligned to 16 bytes */
    assert_int_equal(quad_at(vm, 0x28000 - 16), TINY_STACK);
    assert_int_equal(quad_at(vm, 0x28000 - 8), TINY_DS);
}

FRAGMENT(bad_read, 64, "mov -0x80000000, %eax\n hlt");
static void double_and_triple_fault(void **state)
{
    struct tiny_vm *vm = *state;
    uint64_t not_present = gate(TINY_CS64, TINY_HANDLER, 0x0e, 0);
    LOAD(vm, TINY_LONG, bad_read);
    quad_put(vm, TINY_IDT + 16 * VECTOR_PF, not_present);
    expect_fault64(vm, VECTOR_DF, 0, 0);
    assert_int_equal(cpu_of(vm)->cr2, 0xffffffff80000000);

    LOAD(vm, TINY_LONG, bad_read);
    quad_put(vm, TINY_IDT + 16 * VECTOR_PF, not_present);
    quad_put(vm, TINY_IDT + 16 * VECTOR_DF, not_present);
    assert_int_equal(interp_engine.run(vm->vcpu), ENGINE_EXIT_SHUTDOWN);
    assert_int_equal(cpu_of(vm)->activity, CPU_SHUTDOWN);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE);
}

FRAGMENT(undefined, 64, "ud2");
static void benign_then_contributory_is_serial(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, undefined);
    quad_put(vm, TINY_IDT + 16 * VECTOR_UD, gate(TINY_CS64, TINY_HANDLER, 0x0e, 0));
    expect_fault64(vm, VECTOR_NP, VECTOR_UD * 8 + 3, 0); /* EXT: while delivering an exception */
    assert_int_equal(quad_at(vm, reg(vm, GPR_RSP) + 24) & RFLAGS_RF, RFLAGS_RF);
}

FRAGMENT(iret_user, 64,
         "push $0x23\n push $0x30000\n push $0x3202\n push $0x2b\n push $(0x10000 + 1f - iret_user_start)\n iretq\n"
         "1: pushfq\n pop %rbx\n mov %cs, %ecx\n int $0x80");
static void iret_to_user_and_back(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, iret_user);
    run_to_vector(vm, 0x80);
    assert_int_equal(reg(vm, GPR_RBX), 0x3202);
    assert_int_equal(reg(vm, GPR_RCX), TINY_USER_CS64);
    assert_int_equal(quad_at(vm, reg(vm, GPR_RSP) + 24), TINY_USER_STACK);
    assert_true(cpu_of(vm)->seg[SEG_DS].unusable); /* a ring 0 data segment is not taken to ring 3 */
}

FRAGMENT(iret_compat, 64,
         "push $0x23\n push $0x30000\n push $2\n push $0x33\n push $(0x10000 + 1f - iret_compat_start)\n iretq\n"
         ".code32\n1: mov $0x12345678, %eax\n push %eax\n mov %cs, %ecx\n int $0x80");
static void iret_to_compatibility_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, iret_compat);
    run_to_vector(vm, 0x80);
    assert_int_equal(reg(vm, GPR_RCX), TINY_USER_CS32);
    assert_int_equal(quad_at(vm, reg(vm, GPR_RSP) + 24), TINY_USER_STACK - 4);
    assert_int_equal(long_at(vm, TINY_USER_STACK - 4), 0x12345678);
}

FRAGMENT(iret_null_ss, 64, "pushq $0\n mov %rsp, %rax\n push %rax\n push $2\n push $8\n push $(0x10000 + 1f - iret_null_ss_start)\n iretq\n 1: hlt");
FRAGMENT(iret_bad_cs, 64, "pushq $0x10\n push %rsp\n push $2\n push $0x10\n push $0\n 1: iretq");
FRAGMENT(iret_nested, 64, "pushf\n orl $0x4000, (%rsp)\n popf\n 1: iretq");
static void iret_checks(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, iret_null_ss);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RSP), reg(vm, GPR_RAX));
    assert_int_equal(cpu_of(vm)->seg[SEG_SS].selector, 0);

    LOAD(vm, TINY_LONG, iret_bad_cs); /* CS names a data segment */
    expect_fault64(vm, VECTOR_GP, 0x10, (uint64_t)(iret_bad_cs_end - iret_bad_cs_start) - 2);
    LOAD(vm, TINY_LONG, iret_nested); /* no task switches in long mode */
    expect_fault64(vm, VECTOR_GP, 0, (uint64_t)(iret_nested_end - iret_nested_start) - 2);
}

/* ---- system calls ---- */

FRAGMENT(call_system, 64, "mov $0x55, %eax\n syscall\n 1: mov %r11, %rbx\n int $0x80");
FRAGMENT(system_entry, 64, "mov %rcx, %r15\n pushf\n pop %r14\n mov %cs, %r13d\n mov %ss, %r12d\n sysretq");
static void syscall_and_sysret(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, call_system);
    put(vm, 0x18000, system_entry_start, (size_t)(system_entry_end - system_entry_start));
    tiny_vm_enter_user(vm, true);
    struct cpu_state *cpu = cpu_of(vm);
    cpu->gpr[GPR_RSP] = TINY_STACK;
    cpu->rflags |= RFLAGS_IF | RFLAGS_DF;
    cpu->msr_lstar = 0x18000;
    cpu->msr_sfmask = RFLAGS_IF | RFLAGS_DF;
    cpu->msr_star = 0x1bull << 48 | 8ull << 32;
    interp_engine.state_changed(vm->vcpu);
    run_to_vector(vm, 0x80);
    assert_int_equal(reg(vm, GPR_R15), TINY_CODE + 7);
    assert_int_equal(reg(vm, GPR_R14), RFLAGS_FIXED);
    assert_int_equal(reg(vm, GPR_R13), 8);
    assert_int_equal(reg(vm, GPR_R12), 0x10);
    assert_int_equal(reg(vm, GPR_RBX), RFLAGS_FIXED | RFLAGS_IF | RFLAGS_DF);
    gpa_t frame = reg(vm, GPR_RSP);
    assert_int_equal(quad_at(vm, frame + 8), TINY_USER_CS64);
    assert_int_equal(quad_at(vm, frame + 16), RFLAGS_FIXED | RFLAGS_IF | RFLAGS_DF);
    assert_int_equal(quad_at(vm, frame + 32), TINY_USER_DS);

    LOAD(vm, TINY_LONG, call_system);
    cpu->efer &= ~EFER_SCE;
    expect_fault64(vm, VECTOR_UD, -1, 5);
}

FRAGMENT(sysret_bad, 64, "mov $0x800000000000, %rcx\n sysretq");
static void sysret_checks_rcx(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, sysret_bad);
    if (host_is_amd()) { /* arrives in ring 3, and faults there */
        run_to_vector(vm, VECTOR_GP);
        gpa_t frame = reg(vm, GPR_RSP) + 8;
        assert_int_equal(quad_at(vm, frame), 1ull << 47);
        assert_int_equal(quad_at(vm, frame + 8) & 3, 3);
        return;
    }
    expect_fault64(vm, VECTOR_GP, 0, 10);
    assert_int_equal(cpu_cpl(cpu_of(vm)), 0);
}

FRAGMENT(fast_call, 32, "mov $0x1234, %eax\n sysenter");
FRAGMENT(fast_entry, 32, "mov $(0x10000 + 0x80), %edx\n mov $0x30000, %ecx\n sysexit");
static void sysenter_and_sysexit(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, fast_call);
    put(vm, 0x18000, fast_entry_start, (size_t)(fast_entry_end - fast_entry_start));
    put(vm, TINY_CODE + 0x80, "\xcd\x80", 2);
    enter_user32(vm);
    cpu_of(vm)->msr_sysenter_cs = TINY_CS32;
    cpu_of(vm)->msr_sysenter_eip = 0x18000;
    cpu_of(vm)->msr_sysenter_esp = TINY_STACK;
    run_to_vector(vm, 0x80);
    gpa_t frame = reg(vm, GPR_RSP);
    assert_int_equal(long_at(vm, frame), TINY_CODE + 0x82);
    assert_int_equal(long_at(vm, frame + 4), (TINY_CS32 + 16) | 3);
    assert_int_equal(long_at(vm, frame + 12), 0x30000);
    assert_int_equal(long_at(vm, frame + 16), (TINY_CS32 + 24) | 3);
}

FRAGMENT(swap_gs, 64, "swapgs\n mov %gs:0, %rax\n rdgsbase %rbx\n wrfsbase %rcx\n mov %fs:8, %rdx\n swapgs\n hlt");
static void segment_bases(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, swap_gs);
    quad_put(vm, TINY_DATA, 0x1111);
    quad_put(vm, TINY_DATA + 0x108, 0x2222);
    cpu_of(vm)->msr_kernel_gs_base = TINY_DATA;
    cpu_of(vm)->gpr[GPR_RCX] = TINY_DATA + 0x100;
    cpu_of(vm)->cr4 |= CR4_FSGSBASE;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x1111);
    assert_int_equal(reg(vm, GPR_RBX), TINY_DATA);
    assert_int_equal(reg(vm, GPR_RDX), 0x2222);
    assert_int_equal(cpu_of(vm)->msr_kernel_gs_base, TINY_DATA);
    assert_int_equal(cpu_of(vm)->seg[SEG_GS].base, 0);
}

/* ---- segments ---- */

FRAGMENT(load_ds, 32, "mov %eax, %ds\n hlt");
FRAGMENT(load_ss, 32, "mov %eax, %ss\n hlt");
static void load_ds_expect(struct tiny_vm *vm, unsigned selector, int vector, unsigned error)
{
    cpu_of(vm)->gpr[GPR_RAX] = selector;
    if (vector < 0) {
        run_to_halt(vm);
        assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 3);
    } else {
        expect_fault32(vm, (unsigned)vector, error, 0);
    }
}

static void segment_load_faults(void **state)
{
    struct tiny_vm *vm = *state;
    static const struct {
        unsigned selector;
        uint64_t descriptor;
        int vector;
        unsigned error;
    } cases[] = {
        {FREE_SELECTOR, 0x00cf13000000ffff, VECTOR_NP, FREE_SELECTOR},     /* not present */
        {FREE_SELECTOR, 0x00cf99000000ffff, VECTOR_GP, FREE_SELECTOR},     /* execute only */
        {FREE_SELECTOR, 0x00cf9b000000ffff, -1, 0},                        /* readable code */
        {FREE_SELECTOR | 3, 0x00cf93000000ffff, VECTOR_GP, FREE_SELECTOR}, /* RPL 3, DPL 0 */
        {FREE_SELECTOR | 3, 0x00cf9f000000ffff, -1, 0},                    /* conforming code: any RPL */
        {FREE_SELECTOR, 0x0000890000000067, VECTOR_GP, FREE_SELECTOR},     /* a TSS */
        {0x1000, 0, VECTOR_GP, 0x1000},                                    /* outside the GDT */
        {FREE_SELECTOR | 4, 0, VECTOR_GP, FREE_SELECTOR | 4},              /* in an empty LDT */
        {3, 0, -1, 0},                                                     /* null */
    };
    for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
        LOAD(vm, TINY_PROTECTED, load_ds);
        descriptor_put(vm, FREE_SELECTOR, cases[n].descriptor);
        cpu_of(vm)->ldtr.limit = 0;
        load_ds_expect(vm, cases[n].selector, cases[n].vector, cases[n].error);
    }
    LOAD(vm, TINY_PROTECTED, load_ds);
    descriptor_put(vm, FREE_SELECTOR, 0x00cf92000000ffff);
    load_ds_expect(vm, FREE_SELECTOR, -1, 0);
    assert_int_equal(quad_at(vm, TINY_GDT + FREE_SELECTOR), 0x00cf93000000ffff); /* accessed */
}

static void stack_segment_load(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, load_ss);
    descriptor_put(vm, FREE_SELECTOR, 0x00cf13000000ffff);
    load_ds_expect(vm, FREE_SELECTOR, VECTOR_SS, FREE_SELECTOR);
    LOAD(vm, TINY_PROTECTED, load_ss);
    load_ds_expect(vm, 0, VECTOR_GP, 0);
    LOAD(vm, TINY_PROTECTED, load_ss);
    load_ds_expect(vm, TINY_USER_DS, VECTOR_GP, TINY_USER_DS & ~3u);
}

FRAGMENT(read_limit, 32, "mov %eax, %ds\n 1: mov (%ebx), %ecx\n hlt");
static void limits(void **state)
{
    struct tiny_vm *vm = *state;
    static const struct {
        uint32_t limit, offset;
        unsigned access, flags;
        bool ok;
    } cases[] = {
        {0xfff, 0xffc, 0x93, 4, true},   {0xfff, 0xffd, 0x93, 4, false},
        {0, 0xffc, 0x93, 0xc, true},     {0, 0x1000, 0x93, 0xc, false},
        {0xfff, 0x1000, 0x97, 4, true},  {0xfff, 0xfff, 0x97, 4, false}, /* expand down */
        {0xfff, 0xfffc, 0x97, 0, true},  {0xfff, 0xfffd, 0x97, 0, false},
    };
    for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
        LOAD(vm, TINY_PROTECTED, read_limit);
        descriptor_put(vm, FREE_SELECTOR, descriptor(TINY_DATA, cases[n].limit, cases[n].access, cases[n].flags));
        long_put(vm, TINY_DATA + cases[n].offset, 0xabcd);
        cpu_of(vm)->gpr[GPR_RAX] = FREE_SELECTOR;
        cpu_of(vm)->gpr[GPR_RBX] = cases[n].offset;
        if (!cases[n].ok) {
            expect_fault32(vm, VECTOR_GP, 0, 2);
            continue;
        }
        run_to_halt(vm);
        assert_int_equal(reg(vm, GPR_RCX), 0xabcd);
    }
}

FRAGMENT(ask, 32,
         "mov $0x10, %ebx\n lar %ebx, %eax\n setz %cl\n lsl %ebx, %edx\n verr %bx\n setz %ch\n verw %bx\n setz %bh\n"
         "mov $0x18, %esi\n verw %si\n setz %bl\n mov $0x40, %di\n mov $3, %bp\n arpl %bp, %di\n hlt");
static void descriptor_questions(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, ask);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x00c09300);
    assert_int_equal(reg(vm, GPR_RDX), 0xffffffff);
    assert_int_equal(reg(vm, GPR_RCX) & 0xffff, 0x0101);
    assert_int_equal(reg(vm, GPR_RBX) & 0xffff, 0x0100);
    assert_int_equal(reg(vm, GPR_RDI) & 0xffff, 0x43);
}

FRAGMENT(far_pointer, 32, "lds 0x20000, %ebx\n les 0x20008, %ecx\n hlt");
static void far_pointer_loads(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, far_pointer);
    quad_put(vm, TINY_DATA, (uint64_t)TINY_DS << 32 | 0x1234);
    quad_put(vm, TINY_DATA + 8, 0x777ull << 32 | 0x1234);
    cpu_of(vm)->gpr[GPR_RCX] = 5;
    run_to_vector(vm, VECTOR_GP);
    assert_int_equal(reg(vm, GPR_RBX), 0x1234);
    assert_int_equal(reg(vm, GPR_RCX), 5); /* untouched: the selector was refused */
    assert_int_equal(long_at(vm, reg(vm, GPR_RSP)), 0x774);
}

/* ---- far transfers ---- */

FRAGMENT(call_far, 32, "lcall $0x18, $(0x10000 + 1f - call_far_start)\n hlt\n 1: mov %cs, %eax\n mov (%esp), %ebx\n lret");
static void far_call_and_return(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, call_far);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 8);
    assert_int_equal(reg(vm, GPR_RAX), TINY_CS32);
    assert_int_equal(reg(vm, GPR_RBX), TINY_CODE + 7);
    assert_int_equal(reg(vm, GPR_RSP), TINY_STACK);
}

FRAGMENT(call_through_gate, 32, "push $0x11\n push $0x22\n lcall $0x53, $0\n mov %esp, %ecx\n int $0x80");
FRAGMENT(gate_target, 32, "mov 8(%esp), %eax\n mov 12(%esp), %ebx\n mov %cs, %edx\n mov %esp, %esi\n lret $8");
static void call_gate_to_inner_level(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, call_through_gate);
    put(vm, 0x18000, gate_target_start, (size_t)(gate_target_end - gate_target_start));
    descriptor_put(vm, FREE_SELECTOR, gate(TINY_CS32, 0x18000, 0xec, 2));
    enter_user32(vm);
    run_to_vector(vm, 0x80);
    assert_int_equal(reg(vm, GPR_RAX), 0x22);
    assert_int_equal(reg(vm, GPR_RBX), 0x11);
    assert_int_equal(reg(vm, GPR_RDX), TINY_CS32);
    assert_int_equal(reg(vm, GPR_RSI), TINY_STACK - 6 * 4);
    assert_int_equal(reg(vm, GPR_RCX), TINY_USER_STACK);
    assert_int_equal(long_at(vm, reg(vm, GPR_RSP) + 4), TINY_USER_CS32);
}

static void call_gate_faults(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, call_through_gate);
    descriptor_put(vm, FREE_SELECTOR, gate(TINY_CS32, 0x18000, 0x8c, 0)); /* DPL 0 */
    enter_user32(vm);
    expect_fault32(vm, VECTOR_GP, FREE_SELECTOR, 4);

    LOAD(vm, TINY_PROTECTED, call_through_gate);
    descriptor_put(vm, FREE_SELECTOR, gate(TINY_CS32, 0x18000, 0x6c, 0)); /* not present */
    enter_user32(vm);
    expect_fault32(vm, VECTOR_NP, FREE_SELECTOR, 4);

    LOAD(vm, TINY_PROTECTED, call_through_gate);
    descriptor_put(vm, FREE_SELECTOR, gate(TINY_DS, 0x18000, 0xec, 0)); /* to data */
    enter_user32(vm);
    expect_fault32(vm, VECTOR_GP, TINY_DS, 4);
}

FRAGMENT(call_through_gate64, 64, "lcall *0x20000\n int $0x80");
FRAGMENT(gate_target64, 64, "mov 24(%rsp), %rbx\n mov %ss, %edx\n lretq");
static void call_gate_in_long_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, call_through_gate64);
    put(vm, 0x18000, gate_target64_start, (size_t)(gate_target64_end - gate_target64_start));
    descriptor_put(vm, FREE_SELECTOR, gate(TINY_CS64, 0x18000, 0xec, 0));
    descriptor_put(vm, FREE_SELECTOR + 8, 0);
    quad_put(vm, TINY_DATA, (uint64_t)(FREE_SELECTOR | 3) << 32);
    tiny_vm_enter_user(vm, true);
    run_to_vector(vm, 0x80);
    assert_int_equal(reg(vm, GPR_RBX), TINY_USER_DS);
    assert_int_equal(reg(vm, GPR_RDX), 0);
    assert_int_equal(quad_at(vm, reg(vm, GPR_RSP) + 24), TINY_USER_STACK);
}

/* ---- virtual-8086 mode ---- */

FRAGMENT(enter_v86, 32,
         "push $0x1111\n push $0x2222\n push $0x2000\n push $0x3333\n push $0x3000\n push $0x100\n"
         "push $0x23202\n push $0x1800\n push $0x10\n iretl");
FRAGMENT(v86_code, 16, "mov %ds, %ax\n movw $0x77, 0x40\n push %ax\n int $0x21\n nop\n hlt");
static void virtual_8086_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, enter_v86);
    put(vm, 0x18010, v86_code_start, (size_t)(v86_code_end - v86_code_start));
    run_to_vector(vm, 0x21);
    gpa_t frame = reg(vm, GPR_RSP);
    assert_int_equal(frame, TINY_STACK - 36);
    assert_int_equal(long_at(vm, frame + 4), 0x1800);
    assert_int_equal(long_at(vm, frame + 8) & (RFLAGS_VM | RFLAGS_IOPL), RFLAGS_VM | RFLAGS_IOPL);
    assert_int_equal(long_at(vm, frame + 12), 0xfe);
    assert_int_equal(long_at(vm, frame + 16), 0x3000);
    assert_int_equal(long_at(vm, frame + 20), 0x3333);
    assert_int_equal(long_at(vm, frame + 24), 0x2000);
    assert_int_equal(long_at(vm, frame + 28), 0x2222);
    assert_int_equal(long_at(vm, frame + 32), 0x1111);
    assert_int_equal(reg(vm, GPR_RAX) & 0xffff, 0x2000);
    assert_int_equal(long_at(vm, 0x20040) & 0xffff, 0x77);
    assert_int_equal(long_at(vm, 0x300fe) & 0xffff, 0x2000);
    assert_true(cpu_of(vm)->seg[SEG_DS].unusable);
    assert_int_equal(cpu_of(vm)->rflags & RFLAGS_VM, 0);
}

static void virtual_8086_iopl(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, enter_v86);
    put(vm, 0x18010, v86_code_start, (size_t)(v86_code_end - v86_code_start));
    /* "push $0x23202": the same with IOPL 0. */
    const char *at = memmem(enter_v86_start, (size_t)(enter_v86_end - enter_v86_start), "\x02\x32\x02", 3);
    *(uint8_t *)tiny_vm_at(vm, TINY_CODE + (uint64_t)(at - enter_v86_start) + 1) = 0x02;
    run_to_vector(vm, VECTOR_GP);
    assert_int_equal(long_at(vm, reg(vm, GPR_RSP)), 0);
    assert_int_equal(long_at(vm, reg(vm, GPR_RSP) + 8), 0x1800);
}

/* ---- hardware tasks ---- */

static void second_task(struct tiny_vm *vm, unsigned access)
{
    descriptor_put(vm, FREE_SELECTOR, descriptor(TSS2, 0x67, access, 0));
    long_put(vm, TSS2 + 0x1c, 0);
    long_put(vm, TSS2 + 0x20, 0x18000);
    long_put(vm, TSS2 + 0x24, 2);
    long_put(vm, TSS2 + 0x28 + 4 * GPR_RDX, 0x4321);
    long_put(vm, TSS2 + 0x28 + 4 * GPR_RSP, 0x28000);
    static const uint32_t segments[] = {TINY_DS, TINY_CS32, TINY_DS, TINY_DS, 0, 0};
    for (unsigned n = 0; n < 6; n++)
        long_put(vm, TSS2 + 0x48 + 4 * n, segments[n]);
}

FRAGMENT(call_task, 32, "mov $7, %edx\n lcall $0x50, $0\n mov %edx, %ebx\n hlt");
FRAGMENT(task_code, 32, "mov %edx, 0x20000\n pushf\n popl 0x20004\n str 0x20008\n clts\n mov $9, %edx\n iret\n hlt");
static void task_call_and_return(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, call_task);
    put(vm, 0x18000, task_code_start, (size_t)(task_code_end - task_code_start));
    second_task(vm, 0x89);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 15);
    assert_int_equal(reg(vm, GPR_RBX), 7);
    assert_int_equal(long_at(vm, TINY_DATA), 0x4321);
    assert_int_equal(long_at(vm, TINY_DATA + 4) & RFLAGS_NT, RFLAGS_NT);
    assert_int_equal(long_at(vm, TINY_DATA + 8) & 0xffff, FREE_SELECTOR);
    assert_int_equal(long_at(vm, TSS2) & 0xffff, TINY_TR);
    assert_int_equal(long_at(vm, TSS2 + 0x28 + 4 * GPR_RDX), 9);
    assert_int_equal(quad_at(vm, TINY_GDT + FREE_SELECTOR) >> 40 & 0xff, 0x89); /* no longer busy */
    assert_int_equal(cpu_of(vm)->tr.selector, TINY_TR);
    assert_int_equal(cpu_of(vm)->cr0 & CR0_TS, CR0_TS);
    assert_int_equal(cpu_of(vm)->rflags & RFLAGS_NT, 0);
}

static void task_checks(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, call_task);
    second_task(vm, 0x8b); /* busy */
    expect_fault32(vm, VECTOR_GP, FREE_SELECTOR, 5);
    LOAD(vm, TINY_PROTECTED, call_task);
    second_task(vm, 0x09); /* not present */
    expect_fault32(vm, VECTOR_NP, FREE_SELECTOR, 5);
    LOAD(vm, TINY_PROTECTED, call_task);
    second_task(vm, 0x89);
    descriptor_put(vm, FREE_SELECTOR, descriptor(TSS2, 0x66, 0x89, 0)); /* too small */
    expect_fault32(vm, VECTOR_TS, FREE_SELECTOR, 5);

    /* A bad segment is the new task's fault: its own rip is pushed, on its own stack once SS was good. */
    LOAD(vm, TINY_PROTECTED, call_task);
    second_task(vm, 0x89);
    long_put(vm, TSS2 + 0x48 + 4 * 3, 0x1000);
    run_to_vector(vm, VECTOR_TS);
    assert_int_equal(reg(vm, GPR_RSP), 0x28000 - 16);
    assert_int_equal(long_at(vm, 0x28000 - 16), 0x1000);
    assert_int_equal(long_at(vm, 0x28000 - 12), 0x18000);
    assert_int_equal(cpu_of(vm)->tr.selector, FREE_SELECTOR);
}

FRAGMENT(to_task_gate, 32, "int $0x30\n hlt");
static void task_gate_for_interrupts(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, to_task_gate);
    put(vm, 0x18000, task_code_start, (size_t)(task_code_end - task_code_start));
    second_task(vm, 0x89);
    quad_put(vm, TINY_IDT + 8 * 0x30, gate(FREE_SELECTOR, 0, 0x85, 0));
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 3);
    assert_int_equal(long_at(vm, TINY_DATA), 0x4321);

    /* With an error code, for an exception. */
    LOAD(vm, TINY_PROTECTED, load_ds);
    put(vm, 0x18000, "\xf4", 1);
    second_task(vm, 0x89);
    quad_put(vm, TINY_IDT + 8 * VECTOR_GP, gate(FREE_SELECTOR, 0, 0x85, 0));
    cpu_of(vm)->gpr[GPR_RAX] = 0x1000;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RIP), 0x18001);
    assert_int_equal(reg(vm, GPR_RSP), 0x28000 - 4);
    assert_int_equal(long_at(vm, 0x28000 - 4), 0x1000);
    assert_int_equal(long_at(vm, TINY_TSS + 0x20), TINY_CODE); /* the faulting instruction */
}

/* ---- control registers and MSRs ---- */

FRAGMENT(write_cr4, 64, "mov %rax, %cr4\n hlt");
FRAGMENT(write_cr0, 64, "mov %rax, %cr0\n hlt");
FRAGMENT(write_cr3, 64, "mov %rax, %cr3\n hlt");
static void control_register_checks(void **state)
{
    struct tiny_vm *vm = *state;
    static const uint64_t bad_cr4[] = {CR4_PAE | CR4_LA57, CR4_PAE | CR4_PKE, 1ull << 40 | CR4_PAE, 0, CR4_PAE | CR4_VME};
    for (unsigned n = 0; n < sizeof(bad_cr4) / 8; n++) {
        LOAD(vm, TINY_LONG, write_cr4);
        cpu_of(vm)->gpr[GPR_RAX] = bad_cr4[n];
        expect_fault64(vm, VECTOR_GP, 0, 0);
    }
    static const uint64_t bad_cr0[] = {CR0_PG, CR0_PG | CR0_PE | CR0_NW, 1ull << 32 | CR0_PG | CR0_PE, CR0_PE};
    for (unsigned n = 0; n < sizeof(bad_cr0) / 8; n++) {
        LOAD(vm, TINY_LONG, write_cr0);
        cpu_of(vm)->gpr[GPR_RAX] = bad_cr0[n];
        expect_fault64(vm, VECTOR_GP, 0, 0);
    }
    LOAD(vm, TINY_LONG, write_cr3);
    cpu_of(vm)->gpr[GPR_RAX] = 1ull << 63 | TINY_PML4;
    expect_fault64(vm, VECTOR_GP, 0, 0);
    LOAD(vm, TINY_LONG, write_cr3);
    cpu_of(vm)->cr4 |= CR4_PCIDE;
    cpu_of(vm)->gpr[GPR_RAX] = 1ull << 63 | TINY_PML4 | 5;
    run_to_halt(vm);
    assert_int_equal(cpu_of(vm)->cr3, TINY_PML4 | 5);
    LOAD(vm, TINY_LONG, write_cr3);
    tiny_vm_enter_user(vm, true);
    expect_fault64(vm, VECTOR_GP, 0, 0);
}

FRAGMENT(pae, 32,
         "mov $0x20, %eax\n mov %eax, %cr4\n mov $0x2000, %eax\n mov %eax, %cr3\n mov %cr0, %eax\n"
         "or $0x80000000, %eax\n 1: mov %eax, %cr0\n mov $0x5555, %edx\n mov %edx, 0x20000\n hlt");
static void pae_pointers(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, pae);
    quad_put(vm, 0x2000, 0x3001);
    run_to_halt(vm);
    assert_int_equal(long_at(vm, TINY_DATA), 0x5555);
    assert_int_equal(cpu_of(vm)->pdpte[0], 0x3001);
    LOAD(vm, TINY_PROTECTED, pae); /* tiny_vm's entry has R/W set, which is reserved here */
    run_to_vector(vm, VECTOR_GP);
    assert_int_equal(cpu_of(vm)->cr0 & CR0_PG, 0);
}

FRAGMENT(write_msr, 64, "wrmsr\n rdmsr\n hlt");
static void msr_checks(void **state)
{
    struct tiny_vm *vm = *state;
    static const struct {
        uint32_t index;
        uint64_t value, read;
        bool ok;
    } cases[] = {
        {0x277, 0x0007040600070406, 0x0007040600070406, true},
        {0x277, 0x0007040600070402, 0, false},
        {0xC0000080, EFER_SCE | EFER_LME | EFER_NXE, EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE, true},
        {0xC0000080, EFER_SCE | EFER_NXE, 0, false}, /* LME with paging on */
        {0xC0000080, 1ull << 12 | EFER_LME, 0, false},
        {0xC0000082, 1ull << 47, 0, false},
        {0xC0000101, 0xffff888000000000, 0xffff888000000000, true},
        {0xC0000103, 1ull << 32, 0, false},
        {0x200, 0x80000006, 0x80000006, true},
        {0x200, 0x80000002, 0, false},
        {0x201, 0x80000800, 0x80000800, true},
        {0x26F, 0x0606060606060606, 0x0606060606060606, true},
        {0x26F, 0xff, 0, false},
        {0x2FF, 0xc06, 0xc06, true},
        {0xFE, 0, 0, false},
        {0x174, 0x10, 0x10, true},
        {0x3B, 0x1000, 0x1000, true},
        {0x12345, 0, 0, false},
    };
    for (unsigned n = 0; n < sizeof(cases) / sizeof(cases[0]); n++) {
        LOAD(vm, TINY_LONG, write_msr);
        cpu_of(vm)->gpr[GPR_RCX] = cases[n].index;
        cpu_of(vm)->gpr[GPR_RAX] = (uint32_t)cases[n].value;
        cpu_of(vm)->gpr[GPR_RDX] = cases[n].value >> 32;
        if (!cases[n].ok) {
            expect_fault64(vm, VECTOR_GP, 0, 0);
            continue;
        }
        run_to_halt(vm);
        assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 5);
        assert_int_equal(reg(vm, GPR_RAX) | reg(vm, GPR_RDX) << 32, cases[n].read);
    }
}

FRAGMENT(tsc, 64,
         "rdtsc\n mov %eax, %esi\n mov $0x10, %ecx\n xor %edx, %edx\n xor %eax, %eax\n wrmsr\n rdtscp\n"
         "mov %edx, %edi\n mov %ecx, %ebx\n rdpid %rbp\n hlt");
static void time_stamps(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, tsc);
    cpu_of(vm)->msr_tsc_aux = 0x42;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RDI), 0); /* restarted from zero */
    assert_int_equal(reg(vm, GPR_RBX), 0x42);
    assert_int_equal(reg(vm, GPR_RBP), 0x42);
    assert_int_equal(cpu_of(vm)->msr_tsc_adjust, cpu_of(vm)->tsc_offset);
}

FRAGMENT(set_xcr0, 64, "xor %ecx, %ecx\n xor %edx, %edx\n xsetbv\n xgetbv\n hlt");
static void extended_control(void **state)
{
    struct tiny_vm *vm = *state;
    static const uint64_t bad[] = {0, XCR0_SSE, XCR0_X87 | XCR0_AVX, XCR0_X87 | XCR0_SSE | XCR0_OPMASK, XCR0_X87 | 1u << 9};
    for (unsigned n = 0; n < sizeof(bad) / sizeof(bad[0]); n++) {
        LOAD(vm, TINY_LONG, set_xcr0);
        cpu_of(vm)->gpr[GPR_RAX] = bad[n];
        expect_fault64(vm, VECTOR_GP, 0, 4);
    }
    LOAD(vm, TINY_LONG, set_xcr0);
    cpu_of(vm)->gpr[GPR_RAX] = XCR0_X87 | XCR0_SSE;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), XCR0_X87 | XCR0_SSE);
    LOAD(vm, TINY_LONG, set_xcr0);
    cpu_of(vm)->cr4 &= ~CR4_OSXSAVE;
    expect_fault64(vm, VECTOR_UD, -1, 4);
}

FRAGMENT(debug_access, 64, "mov %dr7, %rax\n hlt");
FRAGMENT(debug_alias, 64, "mov %db4, %rax\n hlt");
static void debug_registers(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, debug_access);
    cpu_of(vm)->dr[7] |= 1u << 13; /* GD */
    expect_fault64(vm, VECTOR_DB, -1, 0);
    assert_int_equal(cpu_of(vm)->dr[6] & 1u << 13, 1u << 13);
    assert_int_equal(cpu_of(vm)->dr[7] & 1u << 13, 0);
    LOAD(vm, TINY_LONG, debug_alias);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0xffff0ff0);
    LOAD(vm, TINY_LONG, debug_alias);
    cpu_of(vm)->cr4 |= CR4_DE;
    expect_fault64(vm, VECTOR_UD, -1, 0);
}

FRAGMENT(tables, 64, "sgdt 0x20000\n sidt 0x20010\n smsw %eax\n sldt %ebx\n str %ecx\n hlt");
static void table_stores_and_umip(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, tables);
    tiny_vm_enter_user(vm, true);
    run_to_vector(vm, VECTOR_GP); /* HLT in ring 3 */
    assert_int_equal(quad_at(vm, TINY_DATA + 2), TINY_GDT);
    assert_int_equal(quad_at(vm, TINY_DATA + 0x12), TINY_IDT);
    assert_int_equal(reg(vm, GPR_RAX), cpu_of(vm)->cr0);
    assert_int_equal(reg(vm, GPR_RCX), TINY_TR);
    LOAD(vm, TINY_LONG, tables);
    cpu_of(vm)->cr4 |= CR4_UMIP;
    tiny_vm_enter_user(vm, true);
    expect_fault64(vm, VECTOR_GP, 0, 0);
}

FRAGMENT(hypercall, 64, "vmcall\n mov %rax, %rbx\n mov $0x40000000, %eax\n cpuid\n hlt");
static void hypercalls_and_cpuid(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, hypercall);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x40000010);
    assert_int_equal(reg(vm, GPR_RBX), 0x4b4d564b);
}

/* ---- ports ---- */

FRAGMENT(port_write, 32, "mov $0x3f9, %edx\n mov $0x41, %al\n out %al, %dx\n out %ax, %dx\n hlt");
static void port_permissions(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, port_write);
    enter_user32(vm);
    expect_fault32(vm, VECTOR_GP, 0, 7); /* no bitmap inside the limit */
    vm->port_writes = 0;

    LOAD(vm, TINY_PROTECTED, port_write);
    enter_user32(vm);
    cpu_of(vm)->tr.limit = 0x67 + 0x82;
    quad_put(vm, TINY_TSS + 0x60, 0x68ull << 48);
    *(uint8_t *)tiny_vm_at(vm, TINY_TSS + 0x68 + 0x7f) = 0x04; /* 0x3fa is closed, 0x3f9 open */
    expect_fault32(vm, VECTOR_GP, 0, 8);
    assert_int_equal(vm->port_writes, 1);
    assert_int_equal(vm->port, 0x3f9);
    assert_int_equal(vm->port_value, 0x41);

    LOAD(vm, TINY_PROTECTED, port_write);
    enter_user32(vm);
    cpu_of(vm)->rflags |= RFLAGS_IOPL;
    run_to_vector(vm, VECTOR_GP); /* HLT */
    assert_int_equal(vm->port_writes, 3);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(user_interrupt_switches_stack), TEST(gate_privilege_is_checked), TEST(interrupt_stack_table),
        TEST(double_and_triple_fault), TEST(benign_then_contributory_is_serial), TEST(iret_to_user_and_back),
        TEST(iret_to_compatibility_mode), TEST(iret_checks), TEST(syscall_and_sysret), TEST(sysret_checks_rcx),
        TEST(sysenter_and_sysexit), TEST(segment_bases), TEST(segment_load_faults), TEST(stack_segment_load),
        TEST(limits), TEST(descriptor_questions), TEST(far_pointer_loads), TEST(far_call_and_return),
        TEST(call_gate_to_inner_level), TEST(call_gate_faults), TEST(call_gate_in_long_mode),
        TEST(virtual_8086_mode), TEST(virtual_8086_iopl), TEST(task_call_and_return), TEST(task_checks),
        TEST(task_gate_for_interrupts), TEST(control_register_checks), TEST(pae_pointers), TEST(msr_checks),
        TEST(time_stamps), TEST(extended_control), TEST(debug_registers), TEST(table_stores_and_umip),
        TEST(hypercalls_and_cpuid), TEST(port_permissions),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
