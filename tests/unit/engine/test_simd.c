/* x87, SSE and AVX in the whole interpreter: computations beside the processor's own, faults, MMIO, code written by vector stores, 32-bit code. */
#include "engine/interp/interp_priv.h"
#include "tiny_test.h"

#include <string.h>

#define DATA_BYTES 4096u

static void simd_on(struct tiny_vm *vm)
{
    struct cpu_state *cpu = &vm->vcpu->cpu;
    cpu->cr0 = (cpu->cr0 & ~(CR0_EM | CR0_TS)) | CR0_MP | CR0_NE;
    cpu->cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT;
    if (cpuid_cr4_allowed(vm->cpuid) & CR4_OSXSAVE) {
        cpu->cr4 |= CR4_OSXSAVE;
        cpu->xcr0 = cpuid_xcr0_allowed(vm->cpuid);
    }
    cpu->gpr[GPR_RDI] = TINY_DATA;
    assert_int_equal(native_install_handlers(), 0); /* cmocka has put its own in place since */
    vm->vcpu->ops->state_changed(vm->vcpu);
}

/* ---- computations that the processor repeats ---- */

/* RDI: 4096 bytes, the first half input. Ends with RET; nothing position-dependent. */
FRAGMENT(work, 64,
         "fninit\n movl $0x1f80, -8(%rsp)\n ldmxcsr -8(%rsp)\n"
         "mov $500, %ecx\n fldz\n xorps %xmm3, %xmm3\n"
         "1: mov %ecx, %eax\n and $127, %eax\n"
         "cvtsi2sd %eax, %xmm0\n sqrtsd %xmm0, %xmm1\n addsd (%rdi,%rax,8), %xmm1\n mulsd %xmm0, %xmm1\n"
         "addsd %xmm1, %xmm3\n movupd %xmm3, 2048(%rdi,%rax,8)\n"
         "movd %eax, %mm0\n paddd (%rdi,%rax,8), %mm0\n movq %mm0, 3100(%rdi)\n emms\n"
         "fldl 2048(%rdi,%rax,8)\n fsin\n fldpi\n fmulp\n fstpt 3200(%rdi)\n fldt 3200(%rdi)\n fstpl 3220(%rdi)\n"
         "movdqu 1(%rdi,%rax,2), %xmm4\n pmaddwd %xmm1, %xmm4\n pshufd $0x1b, %xmm4, %xmm5\n pxor %xmm5, %xmm6\n"
         "ptest %xmm6, %xmm5\n setc 3300(%rdi,%rax)\n ucomisd %xmm1, %xmm0\n seta 3301(%rdi,%rax)\n"
         "popcnt (%rdi,%rax,8), %r8\n add %r8, 3600(%rdi)\n push %rax\n pop %r9\n"
         "dec %ecx\n jnz 1b\n"
         "movdqu %xmm6, 3700(%rdi)\n fnstcw 3720(%rdi)\n fnstsw 3722(%rdi)\n stmxcsr 3724(%rdi)\n fninit\n ret");
FRAGMENT(guest, 64, "mov $0x50000, %eax\n call *%rax\n hlt");

FRAGMENT(work_avx, 64,
         "mov $300, %ecx\n vpxor %ymm7, %ymm7, %ymm7\n"
         "1: mov %ecx, %eax\n and $63, %eax\n"
         "vmovups 4060(%rdi,%rax), %xmm0\n vcvtdq2pd %xmm0, %ymm1\n vfmadd213pd (%rdi), %ymm1, %ymm1\n"
         "vpaddd (%rdi,%rax,4), %ymm7, %ymm7\n vpermq $0x4e, %ymm7, %ymm6\n vmovdqu %ymm6, 2050(%rdi,%rax,4)\n"
         "vpcmpeqd %ymm5, %ymm5, %ymm5\n vpxor %xmm8, %xmm8, %xmm8\n vpgatherdd %ymm5, 128(%rdi,%ymm8,4), %ymm9\n"
         "vpaddd %ymm9, %ymm7, %ymm7\n andn %rax, %rcx, %r8\n bextr %eax, %ecx, %r9d\n mulx %rcx, %r10, %r11\n pdep %rcx, %rax, %r10\n add %r10, 3600(%rdi)\n"
         "vpmaskmovd %ymm7, %ymm9, 3000(%rdi,%rax,4)\n vmaskmovps 4080(%rdi), %ymm6, %ymm4\n vmovups %ymm4, 3800(%rdi)\n"
         "dec %ecx\n jnz 1b\n vmovups %ymm7, 3900(%rdi)\n vzeroupper\n ret");

static void call_native(const char *code, void *data)
{
    __asm__ volatile("sub $128, %%rsp\n\tcall *%1\n\tadd $128, %%rsp"
                     : "+D"(data)
                     : "r"(code)
                     : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",
                       "xmm8", "xmm9", "st", "st(1)", "st(2)", "mm0", "memory", "cc");
}

static void compare_work(struct tiny_vm *vm, const char *start, const char *end)
{
    static uint8_t data[DATA_BYTES * 2];
    uint32_t seed = 12345;
    for (unsigned n = 0; n < DATA_BYTES * 2; n++)
        data[n] = (uint8_t)((seed = seed * 1103515245 + 12345) >> 16);
    LOAD(vm, TINY_LONG, guest);
    simd_on(vm);
    memcpy(tiny_vm_at(vm, 0x50000), start, (size_t)(end - start));
    memcpy(tiny_vm_at(vm, TINY_DATA), data, sizeof(data));
    run_to_halt(vm);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RIP], TINY_CODE + (uint64_t)(guest_end - guest_start));
    call_native(start, data);
    assert_memory_equal(tiny_vm_at(vm, TINY_DATA), data, sizeof(data));
}

static void computation(void **state)
{
    compare_work(*state, work_start, work_end);
}

static void computation_avx(void **state)
{
    struct tiny_vm *vm = *state;
    if (!(cpuid_xcr0_allowed(vm->cpuid) & XCR0_AVX) || !__builtin_cpu_supports("avx2"))
        skip();
    compare_work(vm, work_avx_start, work_avx_end);
}

/* ---- faults ---- */

FRAGMENT(divide, 64, "movl $0x1d80, (%rdi)\n ldmxcsr (%rdi)\n mov $1, %eax\n cvtsi2sd %eax, %xmm1\n xorps %xmm0, %xmm0\n divsd %xmm0, %xmm1\n hlt");
static void unmasked_sse(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, divide);
    simd_on(vm);
    run_to_vector(vm, VECTOR_XM);
    assert_frame64(vm, TINY_CODE + (uint64_t)(divide_end - divide_start) - 5, -1);
    uint32_t mxcsr;
    memcpy(&mxcsr, vm->vcpu->cpu.xsave + 24, 4);
    assert_int_equal(mxcsr, 0x1d84);
    LOAD(vm, TINY_LONG, divide);
    simd_on(vm);
    vm->vcpu->cpu.cr4 &= ~CR4_OSXMMEXCPT;
    vm->vcpu->ops->state_changed(vm->vcpu);
    run_to_vector(vm, VECTOR_UD);
}

FRAGMENT(divide_x87, 64, "fninit\n movw $0x37b, (%rdi)\n fldcw (%rdi)\n fld1\n fldz\n 1: fdivrp\n nop\n fnstsw %ax\n fwait\n hlt");
static void unmasked_x87(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, divide_x87);
    simd_on(vm);
    uint64_t end = TINY_CODE + (uint64_t)(divide_x87_end - divide_x87_start);
    run_to_vector(vm, VECTOR_MF);
    assert_frame64(vm, end - 2, -1);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RAX] & 0x84, 0x84);
    uint64_t fip;
    memcpy(&fip, vm->vcpu->cpu.xsave + 8, 8);
    assert_int_equal(fip, end - 7);
}

FRAGMENT(misaligned, 64, "movaps 8(%rdi), %xmm0\n hlt");
FRAGMENT(reserved, 64, "movl $0x10000, (%rdi)\n ldmxcsr (%rdi)\n hlt");
FRAGMENT(missing_page, 64, "mov $0x40000ff8, %esi\n movups %xmm0, (%rsi)\n hlt");
/* A store that raises an unmasked exception stores nothing, also where the operand goes through a buffer. */
FRAGMENT(withheld, 64, "fninit\n fldcw (%rdi)\n fistps 4095(%rdi)\n hlt");

static void withheld_store(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, withheld);
    simd_on(vm);
    quad_put(vm, TINY_DATA, 0x37e); /* #I unmasked; the stack is empty */
    quad_put(vm, TINY_DATA + 4092, 0x1122334455667788);
    run_to_halt(vm);
    assert_int_equal(quad_at(vm, TINY_DATA + 4092), 0x1122334455667788);
    assert_int_equal(vm->vcpu->cpu.xsave[2] & 0x81, 0x81); /* ES, IE */
}

static void faults(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, misaligned);
    simd_on(vm);
    run_to_vector(vm, VECTOR_GP);
    assert_frame64(vm, TINY_CODE, 0);
    LOAD(vm, TINY_LONG, reserved);
    simd_on(vm);
    run_to_vector(vm, VECTOR_GP);
    assert_frame64(vm, TINY_CODE + (uint64_t)(reserved_end - reserved_start) - 4, 0);
    LOAD(vm, TINY_LONG, missing_page);
    simd_on(vm);
    tiny_vm_map(vm, 0, 0x70000 | 3);
    memset(tiny_vm_at(vm, 0x70ff8), 0x5a, 8);
    memset(vm->vcpu->cpu.xsave + 160, 0x77, 16);
    run_to_vector(vm, VECTOR_PF);
    assert_int_equal(vm->vcpu->cpu.cr2, TINY_PAGES + 4096);
    assert_int_equal(*(uint8_t *)tiny_vm_at(vm, 0x70ff8), 0x5a);
    LOAD(vm, TINY_LONG, missing_page);
    simd_on(vm);
    tiny_vm_map(vm, 0, 0x70000 | 3);
    tiny_vm_map(vm, 1, 0x90000 | 3);
    memset(vm->vcpu->cpu.xsave + 160, 0x77, 16);
    run_to_halt(vm);
    assert_int_equal(*(uint8_t *)tiny_vm_at(vm, 0x70fff), 0x77);
    assert_int_equal(*(uint8_t *)tiny_vm_at(vm, 0x90007), 0x77);
}

/* ---- devices, code, modes ---- */

FRAGMENT(device, 64, "fninit\n mov $0x3f000000, %esi\n mov $0x1122334455667788, %rax\n movq %rax, %xmm0\n punpcklqdq %xmm0, %xmm0\n"
                     "movups %xmm0, (%rsi)\n movq 8(%rsi), %xmm1\n movq %xmm1, %rbx\n fildl (%rsi)\n fistpll (%rdi)\n movq %xmm0, %rcx\n hlt");
static void mmio(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, device);
    simd_on(vm);
    vm->mmio_value = 0x12345678;
    run_to_halt(vm);
    assert_int_equal(vm->mmio_writes, 2);
    assert_int_equal(vm->mmio_reads, 2);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RCX], 0x1122334455667788);
}

/* Sixteen bytes of NOPs are stored over the INCs that follow in the same block. */
FRAGMENT(patch, 64, "xor %eax, %eax\n movups 2f(%rip), %xmm0\n movups %xmm0, 1f(%rip)\n"
                    "1: .rept 8\n inc %eax\n .endr\n hlt\n 2: .fill 16, 1, 0x90");
static void self_modifying(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_LONG, patch);
    simd_on(vm);
    run_to_halt(vm);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RAX], 0);
}

FRAGMENT(protected, 32, "movups (%edi), %xmm0\n paddd %xmm0, %xmm0\n movups %xmm0, 16(%edi)\n fildl (%edi)\n fistpl 32(%edi)\n"
                        "fxsave 512(%edi)\n popcnt (%edi), %eax\n cvtsi2sd %eax, %xmm1\n cvttsd2si %xmm1, %ebx\n hlt");
static void protected_mode(void **state)
{
    struct tiny_vm *vm = *state;
    LOAD(vm, TINY_PROTECTED, protected);
    simd_on(vm);
    memset(tiny_vm_at(vm, TINY_DATA), 3, 16);
    vm->vcpu->cpu.xsave[4] = 0; /* empty the x87 stack: reset leaves it full */
    run_to_halt(vm);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, TINY_DATA + 16), 0x06060606);
    assert_int_equal(*(uint32_t *)tiny_vm_at(vm, TINY_DATA + 32), 0x03030303);
    assert_int_equal(*(uint8_t *)tiny_vm_at(vm, TINY_DATA + 512 + 160), 6);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RAX], 8);
    assert_int_equal(vm->vcpu->cpu.gpr[GPR_RBX], 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(computation, setup, teardown),
        cmocka_unit_test_setup_teardown(computation_avx, setup, teardown),
        cmocka_unit_test_setup_teardown(mmio, setup, teardown),
        cmocka_unit_test_setup_teardown(self_modifying, setup, teardown),
        cmocka_unit_test_setup_teardown(protected_mode, setup, teardown),
        cmocka_unit_test_setup_teardown(unmasked_sse, setup, teardown),
        cmocka_unit_test_setup_teardown(unmasked_x87, setup, teardown),
        cmocka_unit_test_setup_teardown(withheld_store, setup, teardown),
        cmocka_unit_test_setup_teardown(faults, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
