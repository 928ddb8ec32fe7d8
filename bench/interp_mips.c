/*
 * Guest instructions per second of the interpreter: a loop of mixed integer code (loads, stores, arithmetic, shifts, a call, branches)
 * in 64-bit mode. Usage: interp_mips [iterations]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tiny_vm.h"

/* rcx: iterations. rsi: a table of 4096 quadwords. */
__asm__(".pushsection .rodata\n"
        "mixed_start:\n"
        "1:  mov %ecx, %eax\n"
        "    imul $0x9e3779b1, %eax, %eax\n"
        "    shr $20, %eax\n"
        "    and $4095, %eax\n"
        "    mov (%rsi,%rax,8), %rdx\n"
        "    add %rcx, %rdx\n"
        "    mov %rdx, (%rsi,%rax,8)\n"
        "    test $7, %dl\n"
        "    jne 2f\n"
        "    lea 5(%rdx,%rax,2), %rbx\n"
        "    xor %rbx, %rdi\n"
        "2:  call 4f\n"
        "    movzbl %dl, %ebx\n"
        "    add %rbx, %rdi\n"
        "    push %rdi\n"
        "    pop %r8\n"
        "    cmp %r8, %r9\n"
        "    jb 3f\n"
        "    inc %r9\n"
        "3:  sub $1, %rcx\n"
        "    jne 1b\n"
        "    hlt\n"
        "4:  ror $3, %rdi\n"
        "    xor %edx, %r10d\n"
        "    ret\n"
        "mixed_end:\n"
        ".popsection");
extern const char mixed_start[], mixed_end[];

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char **argv)
{
    unsigned long iterations = argc > 1 ? strtoul(argv[1], NULL, 0) : 5000000;
    struct tiny_vm vm;
    if (tiny_vm_create(&vm)) {
        fprintf(stderr, "interp_mips: cannot create the machine\n");
        return 1;
    }
    tiny_vm_load(&vm, TINY_LONG, mixed_start, (uint64_t)(mixed_end - mixed_start));
    vm.vcpu->cpu.gpr[GPR_RCX] = iterations;
    vm.vcpu->cpu.gpr[GPR_RSI] = TINY_DATA;
    double start = seconds();
    enum engine_exit exit = interp_engine.run(vm.vcpu);
    double elapsed = seconds() - start;
    uint64_t instructions = vm.vcpu->counters[COUNTER_instructions];
    printf("%llu instructions in %.3f s: %.1f MIPS%s\n", (unsigned long long)instructions, elapsed, (double)instructions / elapsed * 1e-6,
           exit == ENGINE_EXIT_HALT ? "" : " (did not reach its end)");
    tiny_vm_destroy(&vm);
    return exit == ENGINE_EXIT_HALT ? 0 : 1;
}
