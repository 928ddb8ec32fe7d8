/* The interpreter as a whole: code fragments in every mode, faults, self-modification, events, breakpoints. */
#include "tiny_test.h"

#include <string.h>

#define PAGE_P 1ull
#define PAGE_RW 2ull
#define PAGE_US 4ull

/* ---- modes ---- */

FRAGMENT(long_mix, 64,
         "mov $10, %ecx\n xor %eax, %eax\n xor %edx, %edx\n"
         "1: add %rcx, %rax\n push %rax\n call 2f\n pop %rbx\n dec %ecx\n jnz 1b\n hlt\n"
         "2: lea 1(%rdx,%rcx,4), %rdx\n ret");
static void long_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, long_mix);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 55);
    assert_int_equal(reg(vm, GPR_RBX), 55);
    assert_int_equal(reg(vm, GPR_RDX), 10 + 4 * 55);
    assert_int_equal(reg(vm, GPR_RSP), TINY_STACK);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + (uint64_t)(long_mix_end - long_mix_start) - 6 /* HLT is before the called LEA and RET */);
    assert_int_equal(vm->vcpu->counters[COUNTER_instructions], 3 + 10 * 8 + 1);
}

FRAGMENT(real_mix, 16,
         "mov $0x1234, %ax\n mov %ax, 0x10\n push %cs\n pop %es\n xor %si, %si\n mov $0x20, %di\n"
         "movw $4, %cx\n cld\n rep movsb %es:(%si), %es:(%di)\n mov $0x8000, %bp\n movw $0x55aa, (%bp)\n"
         "int $0x21\n hlt");
static void real_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_REAL, real_mix);
    memcpy(tiny_vm_at(vm, TINY_HANDLER + 16 * 0x21), "\xb3\x77\xcf", 3); /* mov $0x77, %bl; iret */
    run_to_halt(vm);
    assert_int_equal(*(uint16_t *)tiny_vm_at(vm, TINY_DATA + 0x10), 0x1234);
    assert_memory_equal(tiny_vm_at(vm, TINY_CODE + 0x20), real_mix_start, 4);
    assert_int_equal(*(uint16_t *)tiny_vm_at(vm, 0x8000), 0x55aa);
    assert_int_equal(reg(vm, GPR_RBX) & 0xff, 0x77);
    assert_int_equal(reg(vm, GPR_RSP), TINY_STACK);
}

FRAGMENT(protected_mix, 32,
         "mov $0x20000, %esi\n movl $0xfffffff0, (%esi)\n addl $0x20, (%esi)\n adc $0, %eax\n"
         "mov %esp, %ebp\n push $7\n push $8\n pop %ebx\n leave\n"
         "mov $0xffffffff, %edx\n incl %edx\n setz %cl\n hlt");
static void protected_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, protected_mix);
    vm->vcpu->cpu.gpr[GPR_RBP] = 0;
    quad_put(vm, TINY_STACK, 0x4444);
    run_to_halt(vm);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, TINY_DATA), 0x10);
    assert_int_equal(reg(vm, GPR_RAX), 1);
    assert_int_equal(reg(vm, GPR_RBX), 8);
    assert_int_equal(reg(vm, GPR_RBP), 0x4444);
    assert_int_equal(reg(vm, GPR_RCX) & 0xff, 1);
}

FRAGMENT(mode_switch, 16,
         "cli\n data32 addr32 lgdt %cs:(6f - mode_switch_start)\n mov %cr0, %eax\n or $1, %al\n mov %eax, %cr0\n"
         "ljmpl $0x18, $(0x10000 + 1f - mode_switch_start)\n"
         ".code32\n1: mov $0x10, %eax\n mov %eax, %ds\n mov %eax, %ss\n mov $0x7ff0, %esp\n"
         "mov $0x20, %eax\n mov %eax, %cr4\n mov $0x1000, %eax\n mov %eax, %cr3\n"
         "mov $0xc0000080, %ecx\n rdmsr\n or $0x100, %eax\n wrmsr\n mov %cr0, %eax\n or $0x80000000, %eax\n mov %eax, %cr0\n"
         "ljmp $0x08, $(0x10000 + 2f - mode_switch_start)\n"
         ".code64\n2: mov $0x123456789abcdef0, %rax\n push %rax\n pop %rbx\n hlt\n"
         "6: .word 0x4f\n .long 0x4000");
static void real_to_long_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_REAL, mode_switch);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RBX), 0x123456789abcdef0);
    assert_true(cpu_in_64bit_mode(&vm->vcpu->cpu));
}

/* ---- faults ---- */

FRAGMENT(fault_write, 64, "mov $0x40000ffc, %rdi\n mov $-1, %rax\n nop\n1: mov %rax, (%rdi)\n hlt");
static void page_fault_of_crossing_write(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, fault_write);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    tiny_vm_map(vm, 1, 0x52000 | PAGE_P);
    run_to_vector(vm, VECTOR_PF);
    assert_int_equal(vm->vcpu->cpu.cr2, TINY_PAGES + 0x1000);
    assert_frame64(vm, TINY_CODE + (uint64_t)(fault_write_end - fault_write_start) - 4, PF_P | PF_W);
    assert_int_equal(quad_at(vm, 0x50ff8), 0); /* nothing was written to the first page */
}

FRAGMENT(jump_to_page, 64, "mov $0x40000ffe, %rax\n jmp *%rax");
static void fetch_across_pages(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, jump_to_page);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    tiny_vm_map(vm, 1, 0);
    memcpy(tiny_vm_at(vm, 0x50ff8) + 6, "\x48\xc7", 2); /* mov $0x11223344, %rbx, in two pages */
    memcpy(tiny_vm_at(vm, 0x60000), "\xc3\x44\x33\x22\x11\xff\xe0", 7); /* ...; jmp *%rax */
    run_to_vector(vm, VECTOR_PF);
    assert_int_equal(vm->vcpu->cpu.cr2, TINY_PAGES + 0x1000);
    assert_frame64(vm, TINY_PAGES + 0xffe, PF_I);

    LOAD(vm, TINY_LONG, jump_to_page);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    tiny_vm_map(vm, 1, 0x60000 | PAGE_P | PAGE_RW);
    memcpy(tiny_vm_at(vm, 0x50ff8) + 6, "\x48\xc7", 2);
    memcpy(tiny_vm_at(vm, 0x60000), "\xc3\x44\x33\x22\x11\xf4", 6);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RBX), 0x11223344);
    *(uint8_t *)tiny_vm_at(vm, 0x60001) = 0x45; /* the second part alone changes */
    vm->vcpu->cpu.gpr[GPR_RIP] = TINY_CODE;
    vm->vcpu->cpu.activity = CPU_RUNNING;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RBX), 0x11223345);
}

static void fetch_fault_after_straight_run(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, jump_to_page);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    memcpy(tiny_vm_at(vm, 0x50ff8) + 6, "\x90\x90", 2);
    run_to_vector(vm, VECTOR_PF);
    assert_int_equal(vm->vcpu->cpu.cr2, TINY_PAGES + 0x1000);
    assert_frame64(vm, TINY_PAGES + 0x1000, PF_I);
}

FRAGMENT(noncanonical_ds, 64, "mov $0x8000000000000000, %rax\n1: mov (%rax), %rcx");
FRAGMENT(noncanonical_ss, 64, "mov $0x8000000000000000, %rbp\n1: mov 8(%rbp), %rcx");
FRAGMENT(noncanonical_push, 64, "mov $0x800000000000, %rsp\n push %rax");
FRAGMENT(noncanonical_jump, 64, "mov $0x800000000000, %rax\n jmp *%rax");
static void noncanonical_addresses(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, noncanonical_ds);
    run_to_vector(vm, VECTOR_GP);
    assert_frame64(vm, TINY_CODE + 10, 0);
    LOAD(vm, TINY_LONG, noncanonical_ss);
    run_to_vector(vm, VECTOR_SS);
    LOAD(vm, TINY_LONG, noncanonical_jump);
    run_to_vector(vm, VECTOR_GP);
    assert_frame64(vm, TINY_CODE + 10, 0);
}

FRAGMENT(too_long, 64, ".fill 15, 1, 0x66\n nop\n hlt");
FRAGMENT(bad_lock, 64, ".byte 0xf0\n add %eax, %ebx\n hlt");
FRAGMENT(undefined, 64, "nop\n ud2");
static void invalid_encodings(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, too_long);
    run_to_vector(vm, VECTOR_GP);
    assert_frame64(vm, TINY_CODE, 0);
    LOAD(vm, TINY_LONG, bad_lock);
    run_to_vector(vm, VECTOR_UD);
    assert_frame64(vm, TINY_CODE, -1);
    LOAD(vm, TINY_LONG, undefined);
    run_to_vector(vm, VECTOR_UD);
    assert_frame64(vm, TINY_CODE + 1, -1);
}

static void triple_fault(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, undefined);
    vm->vcpu->cpu.idtr.limit = 0;
    assert_int_equal(interp_engine.run(vm->vcpu), ENGINE_EXIT_SHUTDOWN);
    assert_int_equal(vm->vcpu->cpu.activity, CPU_SHUTDOWN);
}

FRAGMENT(limit_code, 32, "nop\n nop\n mov $1, %eax\n hlt");
static void code_segment_limit(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, limit_code);
    vm->vcpu->cpu.seg[SEG_CS].limit = TINY_CODE + 4; /* in the middle of the MOV */
    run_to_vector(vm, VECTOR_GP);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, reg(vm, GPR_RSP) + 4), TINY_CODE + 2);
}

/* ---- code that changes ---- */

FRAGMENT(self_next, 64, "movb $5, 1f + 1(%rip)\n1: mov $1, %al\n hlt");
FRAGMENT(self_loop, 64, "mov $3, %ecx\n1: mov $1, %eax\n add %eax, %ebx\n incl 1b + 1(%rip)\n loop 1b\n hlt");
static void self_modification(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, self_next);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 5);
    assert_int_equal(vm->vcpu->counters[COUNTER_instructions], 3);
    assert_int_equal(vm->vcpu->counters[COUNTER_self_modified], 1);
    LOAD(vm, TINY_LONG, self_loop);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RBX), 1 + 2 + 3);
}

static void code_changed_from_outside(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, long_mix);
    run_to_halt(vm);
    *(uint8_t *)tiny_vm_at(vm, TINY_CODE + 1) = 4; /* the loop count */
    vm->vcpu->cpu.gpr[GPR_RIP] = TINY_CODE;
    vm->vcpu->cpu.activity = CPU_RUNNING;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 10);
}

FRAGMENT(many_blocks, 64,
         "mov $0x20000, %edi\n mov $60000, %ecx\n"
         "1: movl $0xc3c3c3c3, (%rdi)\n movb $0x90, (%rdi)\n call *%rdi\n add $3, %rdi\n cmp $0x200000, %rdi\n jb 2f\n mov $0x20000, %edi\n"
         "2: inc %rax\n dec %ecx\n jnz 1b\n hlt");
static void block_cache_turns_over(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, many_blocks);
    run_to_halt(vm);
    for (unsigned n = 0; n < 2; n++) {
        vm->vcpu->cpu.gpr[GPR_RIP] = TINY_CODE + 5;
        vm->vcpu->cpu.activity = CPU_RUNNING;
        run_to_halt(vm);
    }
    assert_int_equal(reg(vm, GPR_RAX), 180000);
    assert_true(vm->vcpu->counters[COUNTER_block_cache_flushes] >= 1);
}

/* ---- memory ---- */

FRAGMENT(mmio, 64,
         "mov $0x3f000010, %edi\n mov (%rdi), %rax\n mov %al, 1(%rdi)\n lock addl $1, 4(%rdi)\n hlt");
static void mmio_accesses(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, mmio);
    vm->mmio_value = 0x1122334455667788;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x1122334455667788);
    assert_int_equal(vm->mmio_reads, 2);
    assert_int_equal(vm->mmio_writes, 2);
    assert_int_equal(vm->mmio_gpa, TINY_MMIO + 0x14);
    assert_int_equal(vm->mmio_size, 4);
    assert_int_equal(vm->mmio_value, 0x89);
}

FRAGMENT(run_mmio, 64, "mov $0x3f000000, %eax\n jmp *%rax");
static void code_in_mmio(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, run_mmio);
    vm->mmio_value = 0xf4f4f4f4f4f4f4f4; /* hlt */
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RIP), TINY_MMIO + 1);
}

FRAGMENT(rom_write, 64, "mov $0x80000, %edi\n mov (%rdi), %rax\n movq $1, (%rdi)\n incq (%rdi)\n mov (%rdi), %rbx\n hlt");
static void rom_ignores_writes(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, rom_write);
    quad_put(vm, 0x80000, 0x77);
    assert_int_equal(physmap_set_rom(vm->memory, 0x80000, 4096), 0);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x77);
    assert_int_equal(reg(vm, GPR_RBX), 0x77);
    assert_int_equal(vm->mmio_writes, 0);
}

FRAGMENT(split_lock, 64, "mov $0x40000ffc, %edi\n mov $0x100000001, %rax\n lock xadd %rax, (%rdi)\n mov (%rdi), %rbx\n hlt");
static void locked_access_across_pages(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, split_lock);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    tiny_vm_map(vm, 1, 0x60000 | PAGE_P | PAGE_RW);
    *(uint32_t *)tiny_vm_at(vm, 0x50ff8 + 4) = 0xffffffff;
    *(uint32_t *)tiny_vm_at(vm, 0x60000) = 5;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x5ffffffff);
    assert_int_equal(reg(vm, GPR_RBX), 0x700000000);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, 0x60000), 7);
    assert_int_equal(quad_at(vm, 0xa0000), 0x50000 | PAGE_P | PAGE_RW | 0x60);
}

FRAGMENT(stale, 64,
         "mov $0x40000000, %edi\n mov (%rdi), %rax\n mov $0x60003, %ecx\n mov %rcx, 0xa0000\n mov (%rdi), %rbx\n"
         "invlpg (%rdi)\n mov (%rdi), %rdx\n mov $0x50003, %ecx\n mov %rcx, 0xa0000\n mov %cr3, %rcx\n mov %rcx, %cr3\n mov (%rdi), %rsi\n hlt");
static void tlb_invalidation(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, stale);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    quad_put(vm, 0x50000, 0x11);
    quad_put(vm, 0x60000, 0x22);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x11);
    assert_int_equal(reg(vm, GPR_RBX), 0x11);
    assert_int_equal(reg(vm, GPR_RDX), 0x22);
    assert_int_equal(reg(vm, GPR_RSI), 0x11);
}

FRAGMENT(large, 64,
         "mov $0x200000, %edi\n mov 0x5000(%rdi), %rax\n movl $0x000083, 0x3008\n invlpg (%rdi)\n mov 0x5000(%rdi), %rbx\n hlt");
static void invlpg_drops_all_of_a_large_page(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, large);
    quad_put(vm, 0x205000, 0x99);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 0x99);
    assert_int_equal(reg(vm, GPR_RBX), quad_at(vm, TINY_IDT));
}

FRAGMENT(user_code, 64, "mov $0x40000000, %edi\n mov (%rdi), %rax\n hlt");
static void user_cannot_read_supervisor(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, user_code);
    tiny_vm_map(vm, 0, 0x50000 | PAGE_P | PAGE_RW);
    tiny_vm_enter_user(vm, true);
    run_to_vector(vm, VECTOR_PF);
    assert_frame64(vm, TINY_CODE + 5, PF_P | PF_U);
    assert_int_equal(vm->vcpu->cpu.cr2, TINY_PAGES);
    assert_int_equal(cpu_cpl(&vm->vcpu->cpu), 0);
}

FRAGMENT(smap_code, 64, "mov $0x20000, %edi\n stac\n mov (%rdi), %rax\n clac\n1: mov (%rdi), %rbx\n hlt");
static void smap(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, smap_code);
    /* Supervisor pages where the stack and tables are; user only the 64 KiB from TINY_DATA, through a page table. */
    quad_put(vm, TINY_PD, 0xb0000 | PAGE_P | PAGE_RW | PAGE_US);
    for (uint64_t n = 0; n < 512; n++)
        quad_put(vm, 0xb0000 + 8 * n, n << 12 | PAGE_P | PAGE_RW | (n >= 0x20 && n < 0x30 ? PAGE_US : 0));
    quad_put(vm, TINY_DATA, 0x55);
    vm->vcpu->cpu.cr4 |= CR4_SMAP;
    interp_engine.state_changed(vm->vcpu);
    run_to_vector(vm, VECTOR_PF);
    assert_int_equal(reg(vm, GPR_RAX), 0x55);
    assert_frame64(vm, TINY_CODE + 5 + 3 + 3 + 3, PF_P);
}

FRAGMENT(misaligned, 64, "mov $0x20001, %edi\n mov (%rdi), %al\n pushf\n orl $0x40000, (%rsp)\n popf\n mov (%rdi), %al\n mov (%rdi), %cx\n hlt");
static void alignment_check(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, misaligned);
    vm->vcpu->cpu.cr0 |= CR0_AM;
    tiny_vm_enter_user(vm, true);
    run_to_vector(vm, VECTOR_AC);
    assert_frame64(vm, TINY_CODE + (uint64_t)(misaligned_end - misaligned_start) - 4, 0);
}

/* ---- events ---- */

FRAGMENT(spin, 64, "1: inc %rax\n jmp 1b");
FRAGMENT(sti_hlt, 64, "mov $1, %eax\n sti\n hlt\n mov $2, %eax\n cli\n hlt");
FRAGMENT(sti_shadow, 64, "sti\n inc %eax\n inc %eax\n cli\n hlt");
static void interrupts(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, spin);
    vm->vcpu->cpu.rflags |= RFLAGS_IF;
    vm->pending_vector = 0x40;
    run_to_vector(vm, 0x40);
    assert_false(vm->vcpu->cpu.rflags & RFLAGS_IF);
    assert_int_equal(vm->pending_vector, -1);

    LOAD(vm, TINY_LONG, sti_hlt);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 1);
    run_to_halt(vm); /* nothing deliverable: still halted */
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 7);
    memcpy(tiny_vm_at(vm, TINY_HANDLER + 16 * 0x41), "\x48\xcf", 2); /* iretq */
    vm->pending_vector = 0x41;
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 2);

    LOAD(vm, TINY_LONG, sti_shadow);
    vm->pending_vector = 0x42; /* waits from the start; comes after the instruction that follows STI */
    run_to_vector(vm, 0x42);
    assert_int_equal(reg(vm, GPR_RAX), 1);
}

static void nmi(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, spin);
    vm->pending_nmi = true;
    run_to_vector(vm, VECTOR_NMI);
    assert_true(vm->vcpu->cpu.nmi_blocked);
    vm->pending_nmi = true;
    run_to_halt(vm); /* blocked until IRET */
    assert_true(vm->pending_nmi);
}

static void requests_to_leave(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, spin);
    vm->exit_wanted = true;
    assert_int_equal(interp_engine.run(vm->vcpu), ENGINE_EXIT_ATTENTION);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE);
    vm->exit_wanted = false;
}

static void stepping(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, spin);
    assert_int_equal(interp_engine.step(vm->vcpu), ENGINE_EXIT_ATTENTION);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE + 3);
    assert_int_equal(reg(vm, GPR_RAX), 1);
    assert_int_equal(interp_engine.step(vm->vcpu), ENGINE_EXIT_ATTENTION);
    assert_int_equal(reg(vm, GPR_RIP), TINY_CODE);
    LOAD(vm, TINY_LONG, undefined);
    interp_engine.step(vm->vcpu);
    interp_engine.step(vm->vcpu);
    assert_int_equal(reg(vm, GPR_RIP), TINY_HANDLER + 16 * VECTOR_UD);
}

/* ---- debugging ---- */

FRAGMENT(trap_flag, 64, "pushf\n orl $0x100, (%rsp)\n popf\n nop\n nop\n hlt");
static void single_step_trap(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, trap_flag);
    run_to_vector(vm, VECTOR_DB);
    /* POPF itself does not trap, the first NOP does. */
    assert_frame64(vm, TINY_CODE + (uint64_t)(trap_flag_end - trap_flag_start) - 2, -1);
    assert_true(vm->vcpu->cpu.dr[6] & 1 << 14);
    assert_false(vm->vcpu->cpu.rflags & RFLAGS_TF);
}

FRAGMENT(breakpoints, 64, "nop\n inc %eax\n mov %eax, 0x20004\n nop\n hlt");
static void instruction_breakpoint(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, breakpoints);
    memcpy(tiny_vm_at(vm, TINY_HANDLER + 16 * VECTOR_DB), "\xff\xc3\x81\x4c\x24\x10\x00\x00\x01\x00\x48\xcf", 12); /* inc %ebx; orl $RF, 16(%rsp); iretq */
    vm->vcpu->cpu.dr[1] = TINY_CODE + 1;
    vm->vcpu->cpu.dr[7] |= 1 << 2;
    interp_engine.state_changed(vm->vcpu);
    run_to_halt(vm);
    assert_int_equal(reg(vm, GPR_RAX), 1);
    assert_int_equal(reg(vm, GPR_RBX), 1);
    assert_int_equal(vm->vcpu->cpu.dr[6] & 0xf, 2);
    assert_false(vm->vcpu->cpu.rflags & RFLAGS_RF);
}

static void data_breakpoint(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, breakpoints);
    vm->vcpu->cpu.dr[0] = 0x20006;
    vm->vcpu->cpu.dr[7] |= 1 | 1 << 16; /* one byte, writes */
    interp_engine.state_changed(vm->vcpu);
    run_to_vector(vm, VECTOR_DB);
    assert_frame64(vm, TINY_CODE + (uint64_t)(breakpoints_end - breakpoints_start) - 2, -1);
    assert_int_equal(vm->vcpu->cpu.dr[6] & 0xf, 1);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, 0x20004), 1);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(long_mode), T(real_mode), T(protected_mode), T(real_to_long_mode),
        T(page_fault_of_crossing_write), T(fetch_across_pages), T(fetch_fault_after_straight_run), T(noncanonical_addresses), T(invalid_encodings),
        T(triple_fault), T(code_segment_limit),
        T(self_modification), T(code_changed_from_outside), T(block_cache_turns_over),
        T(mmio_accesses), T(code_in_mmio), T(rom_ignores_writes), T(locked_access_across_pages), T(tlb_invalidation), T(invlpg_drops_all_of_a_large_page),
        T(user_cannot_read_supervisor), T(smap), T(alignment_check),
        T(interrupts), T(nmi), T(requests_to_leave), T(stepping),
        T(single_step_trap), T(instruction_breakpoint), T(data_breakpoint),
    };
    return cmocka_run_group_tests_name("interp", tests, NULL, NULL);
}
