/*
 * Entry by PVH (32-bit protected mode, paging off), the way into 64-bit mode for 64-bit programs, the 256 trap stubs, and what catches a trap: trap_save
 * is like setjmp and trap_jump goes back to it.
 */
    .section .note.pvh, "a"
    .balign 4
    .long 4, 4, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_start

    .bss
    .balign 4096
#ifdef __x86_64__
    .globl boot_pml4, boot_pdpt, boot_pd
boot_pml4: .skip 4096
boot_pdpt: .skip 4096
boot_pd:   .skip 4 * 4096 /* the first 4 GiB one to one, 2 MiB pages, open to ring 3 */
#endif
    .globl boot_stack_top, start_info
    .skip 65536
boot_stack_top:
    .skip 16
start_info: .skip 8

    .data
    .balign 16
    .globl gdt, gdt_pointer
gdt:
    .quad 0
#ifdef __x86_64__
    .quad 0x00af9b000000ffff /* 08 ring 0 code, 64-bit */
#else
    .quad 0x00cf9b000000ffff /* 08 ring 0 code, 32-bit */
#endif
    .quad 0x00cf93000000ffff /* 10 ring 0 data */
    .quad 0x00cf9b000000ffff /* 18 ring 0 code, 32-bit */
    .quad 0x00cffb000000ffff /* 20 ring 3 code, 32-bit; ring 3 as with Linux */
    .quad 0x00cff3000000ffff /* 28 ring 3 data */
#ifdef __x86_64__
    .quad 0x00affb000000ffff /* 30 ring 3 code, 64-bit */
#else
    .quad 0x00cffb000000ffff
#endif
    .quad 0x000f9b000000ffff /* 38 ring 0 code, 16-bit, byte limit 0xfffff */
    .quad 0x000093000000ffff /* 40 ring 0 data, 16-bit, limit 0xffff */
    .quad 0x000ffb000000ffff /* 48 ring 3 code, 16-bit */
    .quad 0, 0               /* 50 TSS */
    .skip 8 * 52             /* 60.. the program's own */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
#ifdef __x86_64__
    .quad gdt
#else
    .long gdt
#endif

    .text
    .code32
    .globl pvh_start
pvh_start:
    cli
    cld
    lgdt gdt_pointer
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $boot_stack_top, %esp
    movl %ebx, start_info
#ifdef __x86_64__
    movl $boot_pdpt + 7, boot_pml4
    movl $boot_pd + 7, %eax
    xorl %edi, %edi
1:  movl %eax, boot_pdpt(, %edi, 8)
    addl $4096, %eax
    incl %edi
    cmpl $4, %edi
    jne 1b
    movl $0x87, %eax /* present, writable, user, large */
    xorl %edi, %edi
1:  movl %eax, boot_pd(, %edi, 8)
    addl $0x200000, %eax
    incl %edi
    cmpl $2048, %edi
    jne 1b
    call long_mode_on
    ljmp $0x08, $1f
    .code64
1:
    movl $boot_stack_top, %esp
    xorl %ebp, %ebp
    call runtime_start
    .code32
    /* Also for other processors: turns 64-bit mode on with boot_pml4; the caller jumps far. */
    .globl long_mode_on
long_mode_on:
    movl $0x6a0, %eax /* PAE, PGE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x901, %eax /* NXE, LME, SCE */
    wrmsr
    movl $0x80010033, %eax /* PG, WP, NE, ET, MP, PE */
    movl %eax, %cr0
    ret
    .code64
#else
    ljmp $0x08, $1f
1:
    movl $0x610, %eax /* PSE, OSFXSR, OSXMMEXCPT */
    movl %eax, %cr4
    movl $0x33, %eax
    movl %eax, %cr0
    xorl %ebp, %ebp
    call runtime_start
#endif

/* ---- traps ---- */

    .balign 16
    .globl trap_stubs
trap_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    push $0
    .endif
    push $vector
    jmp trap_common
    .set vector, vector + 1
    .endr

trap_common:
#ifdef __x86_64__
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    mov %rsp, %rdi
    mov %rsp, %rbx
    and $-16, %rsp
    call trap_dispatch
    mov %rbx, %rsp
    .globl trap_return
trap_return:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

    .globl trap_save, trap_jump
trap_save:
    mov (%rsp), %rax
    mov %rax, trap_context
    mov %rsp, trap_context + 8
    mov %rbx, trap_context + 16
    mov %rbp, trap_context + 24
    mov %r12, trap_context + 32
    mov %r13, trap_context + 40
    mov %r14, trap_context + 48
    mov %r15, trap_context + 56
    xor %eax, %eax
    ret
trap_jump:
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov trap_context + 8, %rsp
    mov trap_context + 16, %rbx
    mov trap_context + 24, %rbp
    mov trap_context + 32, %r12
    mov trap_context + 40, %r13
    mov trap_context + 48, %r14
    mov trap_context + 56, %r15
    push $2
    popf
    mov trap_context, %rax
    mov %rax, (%rsp)
    mov $1, %eax
    ret

    /* void enter(const struct entry *): loads every register in it and IRETs. */
    .globl enter
enter:
    push 32(%rdi) /* ss */
    push 24(%rdi) /* sp */
    push 16(%rdi) /* flags */
    push 8(%rdi)  /* cs */
    push (%rdi)   /* ip */
    mov 40(%rdi), %rax
    mov 48(%rdi), %rbx
    mov 56(%rdi), %rcx
    mov 64(%rdi), %rdx
    mov 72(%rdi), %rsi
    mov 80(%rdi), %rdi
    iretq
#else
    pushal
    push %ds
    push %es
    cld
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %esp, %ebx
    pushl %ebx
    call trap_dispatch
    movl %ebx, %esp
    pop %es
    pop %ds
    popal
    addl $8, %esp
    iretl

    .globl trap_save, trap_jump
trap_save:
    movl (%esp), %eax
    movl %eax, trap_context
    movl %esp, trap_context + 4
    movl %ebx, trap_context + 8
    movl %ebp, trap_context + 12
    movl %esi, trap_context + 16
    movl %edi, trap_context + 20
    xorl %eax, %eax
    ret
trap_jump:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl trap_context + 4, %esp
    movl trap_context + 8, %ebx
    movl trap_context + 12, %ebp
    movl trap_context + 16, %esi
    movl trap_context + 20, %edi
    pushl $2
    popfl
    movl trap_context, %eax
    movl %eax, (%esp)
    movl $1, %eax
    ret

    .globl enter
enter:
    movl 4(%esp), %edi
    pushl 16(%edi) /* ss */
    pushl 12(%edi) /* sp */
    pushl 8(%edi)  /* flags */
    pushl 4(%edi)  /* cs */
    pushl (%edi)   /* ip */
    movl 20(%edi), %eax
    movl 24(%edi), %ebx
    movl 28(%edi), %ecx
    movl 32(%edi), %edx
    movl 36(%edi), %esi
    pushl %eax
    movl $0x2b, %eax
    movl %eax, %ds
    movl %eax, %es
    popl %eax
    movl %ss:40(%edi), %edi
    iretl
#endif

    .globl leave_user
leave_user:
    int $0x30
    .section .note.GNU-stack, "", @progbits
