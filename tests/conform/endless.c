/*
 * Loops of every kind that never end by themselves, in both rings: a timer's interrupts must come through each of them, or nothing could stop such a guest, not even
 * the user. SDM vol. 3, 6.2. The loops need no memory but their own pages, so that nothing else ends them.
 */
#include "runtime/areas.h"

#define EFER 0xc0000080
#define STAR 0xc0000081
#define LSTAR 0xc0000082
#define SFMASK 0xc0000084
#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_LVT_TIMER 0x320
#define APIC_INITIAL 0x380
#define APIC_DIVIDE 0x3e0
#define TIMER 0xe0
#define INTERVAL 20000
#define INTERRUPTS 5

/* Each begins at a label loop_NAME and may go anywhere in its two pages. RSP: the middle of a page of their own, R12 the same; R13: the loop's address; R14: the address of its second page. */
__asm__(".pushsection .text\n"
        ".macro begin name\n .balign 8192\n loop_\\name:\n .endm\n"
        "begin jump\n jmp loop_jump\n"
        "begin pair\n nop\n jmp 2f\n1: jmp loop_pair\n2: jmp 1b\n"
        "begin condition\n xor %eax, %eax\n1: jz 1b\n"
        "begin condition_far\n xor %eax, %eax\n jz 1f\n.fill 200, 1, 0x90\n1: jz loop_condition_far\n"
        "begin loop\n mov $-1, %rcx\n1: loop 1b\n jmp loop_loop\n"
        "begin jrcxz\n xor %ecx, %ecx\n1: jrcxz 1b\n"
        "begin call\n add $8, %rsp\n call loop_call\n"
        "begin call_moved\n mov %r12, %rsp\n call loop_call_moved\n"
        "begin call_ahead\n mov %r12, %rsp\n call 1f\n nop\n1: call loop_call_ahead\n"
        "begin call_next\n mov %r12, %rsp\n call loop_call_next + 4096\n .org loop_call_next + 4096\n add $8, %rsp\n call loop_call_next\n"
        "begin return\n call 1f\n jmp loop_return\n1: ret\n"
        "begin push_return\n mov %r12, %rsp\n push %r13\n ret\n"
        "begin register\n jmp *%r13\n"
        "begin memory\n mov %r13, (%r12)\n jmp *(%r12)\n"
        "begin indirect_call\n mov %r12, %rsp\n call *%r13\n"
        "begin pages\n jmp loop_pages + 4096\n .org loop_pages + 4096\n jmp loop_pages\n"
        "begin condition_pages\n xor %eax, %eax\n jz loop_condition_pages + 4096\n .org loop_condition_pages + 4096\n jz loop_condition_pages\n"
        "begin through\n .fill 4096, 1, 0x90\n jmp loop_through\n"
        "begin long\n .fill 300, 1, 0x90\n jmp loop_long\n"
        "begin group\n mov %r12, %rsp\n mov %rax, 8(%r12)\n mov %rbx, 16(%r12)\n mov 24(%r12), %rax\n push %rax\n push %rbx\n pop %rbx\n pop %rax\n add %rax, 32(%r12)\n"
        " jmp loop_group\n"
        "begin careful\n lea 4090(%r12), %rdi\n andq $-4096, %rdi\n sub $4, %rdi\n1: mov (%rdi), %rax\n mov 1(%rdi), %rbx\n mov 2(%rdi), %rdx\n mov 3(%rdi), %rsi\n jmp 1b\n"
        "begin string\n mov %r12, %rdi\n mov $64, %ecx\n rep stosb\n jmp loop_string\n"
        "begin long_string\n mov $0x2000000, %ecx\n mov $0x1000000, %esi\n rep lodsb\n jmp loop_long_string\n"
        "begin patching\n incb 1f+1(%rip)\n1: mov $1, %al\n jmp loop_patching\n"
        "begin division\n mov $7, %ecx\n xor %edx, %edx\n mov $100, %eax\n div %ecx\n jmp loop_division\n"
        "begin vector\n paddd %xmm0, %xmm1\n movdqu %xmm1, (%r12)\n jmp loop_vector\n"
        "begin system_call\n syscall\n jmp loop_system_call\n"
        "begin user_end\n"
        "begin crossing\n mov $200, %ecx\n1: jmp 2f\n cpuid\n cpuid\n cpuid\n .org loop_crossing + 4091\n2: movabs $0x1122334455667788, %rax\n dec %ecx\n jnz 1b\n int $0x30\n cpuid\n cpuid\n cpuid\n"
        "begin enabled\n sti\n nop\n jmp loop_enabled\n"
        "begin window\n cli\n sti\n nop\n jmp loop_window\n"
        "begin popf\n pushf\n popf\n jmp loop_popf\n"
        "begin access\n stac\n clac\n jmp loop_access\n"
        "begin invlpg\n invlpg (%r12)\n jmp loop_invlpg\n"
        "begin cr3\n mov %cr3, %rax\n mov %rax, %cr3\n jmp loop_cr3\n"
        "begin iret\n mov %ss, %ecx\n push %rcx\n push %r12\n pushf\n mov %cs, %ecx\n push %rcx\n push %r13\n iretq\n"
        "begin halt\n sti\n hlt\n jmp loop_halt\n"
        "begin end\n"
        "endless_return: .byte 0x48\n sysretl\n"
        "endless_done: int $0x30\n .balign 4096\n"
        ".popsection\n");

#define LOOPS(X)                                                                                                                                     \
    X(jump) X(pair) X(condition) X(condition_far) X(loop) X(jrcxz) X(call) X(call_moved) X(call_ahead) X(call_next) X(return) X(push_return)         \
    X(register) X(memory) X(indirect_call) X(pages) X(condition_pages) X(through) X(long) X(group) X(careful) X(string) X(long_string) X(patching)   \
    X(division) X(vector) X(system_call)                                                                                                             \
    X(enabled) X(window) X(popf) X(access) X(invlpg) X(cr3) X(iret) X(halt)
#define DECLARE(name) extern uint8_t loop_##name[];
LOOPS(DECLARE)
extern uint8_t loop_user_end[], loop_crossing[], endless_return[], endless_done[];

static const struct {
    const char *name;
    uint8_t *code;
} loops[] = {
#define NAME(name) {#name, loop_##name},
    LOOPS(NAME)
};

static unsigned interrupts;
static struct probe probe;
static struct outcome outcome;

static void on_timer(struct frame *frame)
{
    if (++interrupts < INTERRUPTS)
        lapic_write(APIC_INITIAL, INTERVAL);
    else
        frame->ip = (reg_t)endless_done;
    lapic_write(APIC_EOI, 0);
}

static void run(const char *name, uint8_t *code, uint8_t *stack, bool user)
{
    probe_random(&probe);
    probe.user = user;
    probe.flags = FLAG_IF;
    probe.ip = (reg_t)code;
    probe.gpr[RSP] = probe.gpr[R12] = (reg_t)stack + 2048;
    probe.gpr[R13] = (reg_t)code;
    probe.gpr[R14] = (reg_t)code + PAGE;
    interrupts = 0;
    lapic_write(APIC_INITIAL, INTERVAL);
    probe_run(&probe, &outcome);
    check(outcome.vector == USER_DONE && interrupts == INTERRUPTS, "%s in ring %u is interrupted (vector %u at %lx, error %lx, cr2 %lx)", name, user ? 3u : 0u,
          (unsigned)outcome.vector, outcome.ip, outcome.error, outcome.cr2);
}

/* One that ends: an instruction in two pages, in each of which are more that a monitor may have to stop before than the processor has breakpoints for both. */
static void run_crossing(void)
{
    probe_random(&probe);
    probe.user = true;
    probe.ip = (reg_t)loop_crossing;
    probe_run(&probe, &outcome);
    check(outcome.vector == USER_DONE, "crossing comes to its end (vector %u at %lx, error %lx, cr2 %lx)", (unsigned)outcome.vector, outcome.ip, outcome.error, outcome.cr2);
}

static void rights_open(uint64_t from, uint64_t to)
{
    for (uint64_t va = from; va < to; va += PAGE)
        page_map(va, va | PG_P | PG_W | PG_U);
}

void test_main(void)
{
    random_seed();
    uint8_t *stack = pages_allocate(2);
    rights_open((uint64_t)loop_jump, ((uint64_t)endless_done & ~(PAGE - 1)) + PAGE);
    rights_open((uint64_t)stack, (uint64_t)stack + 2 * PAGE);
    simd_enable();
    asm_volatile("mov %0, %%cr4" ::"r"(read_cr4() | 1u << 9)); /* OSFXSR */
    wrmsr(EFER, rdmsr(EFER) | 1);
    wrmsr(STAR, (uint64_t)(UCODE32 & ~3) << 48 | (uint64_t)KCODE << 32);
    wrmsr(LSTAR, (reg_t)endless_return);
    wrmsr(SFMASK, 0x47fd5);
    probe_begin();
    run_crossing();
    idt[TIMER].ist = 1;
    trap_handlers[TIMER] = on_timer;
    lapic_write(APIC_SVR, 0x1ff);
    lapic_write(APIC_DIVIDE, 0xb);
    lapic_write(APIC_LVT_TIMER, TIMER);
    for (unsigned user = 0; user < 2; user++)
        for (unsigned n = 0; n < sizeof loops / sizeof *loops; n++) {
            bool ring3 = loops[n].code < loop_user_end;
            bool offered = loops[n].code != loop_access || cpuid(7, 0).b & 1u << 20;
            if ((user ? !ring3 : loops[n].code == loop_system_call) || !offered)
                continue;
            run(loops[n].name, loops[n].code, stack, user);
        }
    probe_end();
}
