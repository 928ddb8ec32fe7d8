/*
 * Interrupts and exceptions at instruction boundaries: a timer and another processor's IPIs interrupt known code (live flags, string instructions, calls, windows of
 * CLI, STI and POPF, shadows), which must come out as when nobody interrupts, in both rings; every interrupt finds RIP at a boundary where IF was 1. Exceptions in the
 * middle of random straight-line code, single steps through it, breakpoints in it: exact states. SDM vol. 3, 6.7, 6.8 and ch. 17. Run with two processors.
 */
#include "runtime/areas.h"
#include "runtime/processors.h"

#define APIC_EOI 0xb0
#define APIC_ICR 0x300
#define APIC_LVT_TIMER 0x320
#define APIC_INITIAL 0x380
#define APIC_DIVIDE 0x3e0
#define MASKED (1u << 16)
#define TIMER 0x60
#define IPI 0x61

/* ---- known code: I is an instruction before which an interrupt may come, C one before which it may not ---- */

__asm__(".macro bound section, instruction:vararg\n"
        ".Lbound\\@: .pushsection \\section, \"a\"\n .quad .Lbound\\@\n .popsection\n \\instruction\n .endm\n"
        ".macro I instruction:vararg\n bound .rodata.open, \\instruction\n .endm\n"
        ".macro C instruction:vararg\n bound .rodata.closed, \\instruction\n .endm\n"
        ".pushsection .rodata.open, \"a\"\n .balign 8\n open_start:\n .popsection\n"
        ".pushsection .rodata.closed, \"a\"\n .balign 8\n closed_start:\n .popsection\n"
        ".pushsection .text\n .balign 64\n known_start:\n"
        /* R14 rounds. Carry lives across everything but the last two. */
        "alu_code:\n"
        "1: I adc %rax, %rbx\n I adc %rbx, %rdx\n I sbb %rsi, %rdi\n I rcl $3, %r8\n I inc %r9\n I adc %r10, %r11\n I xor %rdx, %rax\n I bt $7, %r11\n"
        " I rcr $1, %r12\n I lea 1(%rbp, %r11, 2), %rbp\n I imul %rbp, %r13\n I test %r13, %r13\n I cmovs %rbx, %r15\n I ror %cl, %r10\n I bt $11, %rbx\n I dec %r14\n I jnz 1b\n"
        " I int $0x30\n"
        /* R12: memory, R14: rounds. */
        "mixed_code:\n"
        "1: I push %rax\n I push %rbx\n I add 8(%r12), %rax\n I adc %rax, 16(%r12)\n I setc %bl\n I lea 256(%r12), %rdi\n I lea 64(%r12), %rsi\n"
        " I mov $37, %ecx\n I rep movsb\n I std\n I lea 640(%r12), %rdi\n I mov $90, %ecx\n I rep stosb\n I lea 300(%r12), %rsi\n I mov $5, %ecx\n"
        " I rep lodsw\n I cld\n I lea 550(%r12), %rdi\n I mov $91, %ecx\n I repe scasb\n I pushfq\n I andq $~0x300, (%rsp)\n I pop %r9\n I xor %r9, %r13\n"
        " I call 5f\n I pop %rbx\n I pop %rax\n I lea 6f(%rip), %r10\n I jmp *%r10\n I ud2\n"
        "5: I enter $32, $1\n I add %rdi, -8(%rbp)\n I leave\n I ret\n"
        "6: I lock xadd %rdx, 24(%r12)\n I cmpxchg %rbx, 32(%r12)\n I mul %rdx\n I movq %rax, %xmm0\n I paddq %xmm0, %xmm1\n I pshufd $0x1b, %xmm1, %xmm2\n"
        " I pxor %xmm2, %xmm3\n I fildll 40(%r12)\n I fistpll 48(%r12)\n I addq $77, 40(%r12)\n I mov $3, %ecx\n"
        "7: I rol $7, %rbx\n I loop 7b\n I xor %eax, %eax\n I cpuid\n I jrcxz 8f\n I bswap %rcx\n"
        "8: I movdqu 72(%r12), %xmm4\n I movdqu %xmm3, 72(%r12)\n I lea 4090(%r12), %rsi\n I mov %r13, (%rsi)\n I xchg %r11, (%rsi)\n I dec %r14\n I jnz 1b\n"
        " I int $0x30\n"
        /* Ring 0 only. */
        "windows_code:\n"
        "1: I cli\n C add %rax, %rdx\n C adc %rdx, %rbx\n C lea 128(%r12), %rdi\n C mov $20, %ecx\n C rep stosb\n C sti\n C nop\n I adc %rbx, %rsi\n I pushfq\n I cli\n"
        " C add %rsi, %rax\n C popfq\n I adc $5, %rax\n I sti\n I mov %ss, %ecx\n I mov %ecx, %ss\n C add $3, %rbx\n I nop\n"
        " I cli\n C push %rax\n C sti\n C pop %rdi\n I add %rdi, %rbx\n I cli\n C sti\n C cli\n C add %rax, %rdi\n C mov %cr8, %rcx\n C sti\n C mov %rcx, %cr8\n I nop\n"
        " I mov %ds, %ecx\n I mov %ecx, %es\n I pushfq\n I pop %rcx\n I push %rcx\n I popfq\n I inc %rdx\n I dec %r14\n I jnz 1b\n"
        " I int $0x30\n"
        "known_end:\n .popsection\n"
        ".pushsection .rodata.open, \"a\"\n open_end:\n .popsection\n"
        ".pushsection .rodata.closed, \"a\"\n closed_end:\n .popsection\n");

extern uint8_t known_start[], known_end[], alu_code[], mixed_code[], windows_code[];
extern const uint64_t open_start[], open_end[], closed_start[], closed_end[];

static const struct fragment {
    const char *name;
    uint8_t *code;
    unsigned rounds;
    bool ring0_only;
} fragments[] = {{"arithmetic", alu_code, 200000, false}, {"mixed code", mixed_code, 3000, false}, {"interrupt windows", windows_code, 10000, true}};

enum { OPEN = 1, CLOSED = 2, HIT = 4 };
static uint8_t bounds[4096]; /* of known_start.. */
static volatile unsigned interrupts, off_boundary, while_closed, while_disabled;
static volatile uint64_t bad_ip;
static uint8_t *memory, *stack_memory;
static struct probe probe;
static struct outcome outcome, reference;
static uint8_t memory_start[2 * PAGE], memory_reference[2 * PAGE], simd_reference[SIMD_BYTES] __attribute__((aligned(64)));
static volatile bool storm_stop;

static void on_interrupt(struct frame *frame)
{
    static uint32_t state = 1;
    interrupts++;
    uint64_t offset = frame->ip - (reg_t)known_start;
    if (offset < (uint64_t)(known_end - known_start)) {
        if (!(bounds[offset] & (OPEN | CLOSED)))
            off_boundary++, bad_ip = frame->ip;
        if (bounds[offset] & CLOSED)
            while_closed++, bad_ip = frame->ip;
        bounds[offset] |= HIT;
    }
    while_disabled += !(frame->flags & FLAG_IF);
    if (frame->vector == TIMER) {
        state = state * 1664525 + 1013904223;
        lapic_write(APIC_INITIAL, 500 + (state >> 8) % 30000);
    }
    lapic_write(APIC_EOI, 0);
}

static bool equal(const void *a, const void *b, unsigned bytes)
{
    reg_t count = bytes / 8;
    bool same;
    asm_volatile("repe cmpsq" : "+S"(a), "+D"(b), "+c"(count), "=@ccz"(same)::"memory");
    return same;
}

static void bounds_create(void)
{
    for (const uint64_t *p = open_start; p < open_end; p++)
        bounds[*p - (reg_t)known_start] = OPEN;
    for (const uint64_t *p = closed_start; p < closed_end; p++)
        bounds[*p - (reg_t)known_start] = CLOSED;
}

static void timer_on(void)
{
    lapic_write(APIC_DIVIDE, 0xb);
    lapic_write(APIC_LVT_TIMER, TIMER);
    lapic_write(APIC_INITIAL, 10000);
}

static void timer_off(void)
{
    lapic_write(APIC_LVT_TIMER, MASKED);
    lapic_write(APIC_INITIAL, 0);
    asm_volatile("sti; nop; nop; cli");
}

static void storm(unsigned number)
{
    while (!storm_stop) {
        processor_send(0, 0x4000 | IPI);
        for (unsigned n = 0; n < 100; n++)
            cpu_pause();
    }
}

static void fragment_run(const struct fragment *f, bool user, bool interrupted, struct outcome *to)
{
    memcpy(memory, memory_start, 2 * PAGE);
    memset(stack_memory, 0, PAGE);
    for (unsigned n = 0; n < 16; n++)
        probe.gpr[n] = 0x9e3779b97f4a7c15ull * (n + 1);
    probe.gpr[R12] = (reg_t)memory;
    probe.gpr[R14] = f->rounds;
    probe.gpr[RSP] = (reg_t)stack_memory + PAGE;
    probe.ip = (reg_t)f->code;
    probe.flags = 2 | (interrupted ? FLAG_IF : 0);
    probe.user = user;
    probe.simd = simd_before;
    memset(simd_after, 0, sizeof simd_after);
    probe_run(&probe, to);
}

/* As often as it takes to have been interrupted: well, and at all when the one that sends has no processor of the host for a while. */
static void interrupted_runs(const struct fragment *f, bool user, const char *what)
{
    unsigned wrong = 0, runs = 0, registers = 0;
    bool rest = true;
    do {
        fragment_run(f, user, true, &outcome);
        for (unsigned n = 0; n < 16; n++)
            registers += outcome.gpr[n] != reference.gpr[n];
        wrong += outcome.vector != USER_DONE || outcome.ip != reference.ip || (outcome.flags ^ reference.flags) & ~(reg_t)FLAG_IF;
        rest &= equal(memory, memory_reference, 2 * PAGE) && simd_same(simd_after, simd_reference);
    } while (++runs < (interrupts ? 8 : 10000) && interrupts < 50 && !registers && !wrong);
    check(!wrong && !registers && rest && interrupts && !off_boundary && !while_closed && !while_disabled,
          "%s, %s, %s: as if nobody had interrupted (%u interrupts; %u wrong, registers %u, flags %lx for %lx, %s; off boundary %u, closed %u, disabled %u, at %lx)",
          f->name, user ? "ring 3" : "ring 0", what, interrupts, wrong, registers, outcome.flags, reference.flags,
          rest ? "memory good" : "memory or vectors wrong", off_boundary, while_closed, while_disabled, bad_ip);
    off_boundary = while_closed = while_disabled = 0;
}

static void test_fragments(bool two)
{
    trap_handlers[TIMER] = trap_handlers[IPI] = on_interrupt;
    for (unsigned n = 0; n < sizeof fragments / sizeof *fragments; n++)
        for (unsigned user = 0; user < (fragments[n].ring0_only ? 1 : 2); user++) {
            const struct fragment *f = &fragments[n];
            fragment_run(f, user, false, &reference);
            memcpy(memory_reference, memory, 2 * PAGE);
            memcpy(simd_reference, simd_after, SIMD_BYTES);
            interrupts = 0;
            timer_on();
            interrupted_runs(f, user, "timer");
            timer_off();
            interrupts = 0;
            if (!two)
                continue;
            storm_stop = false;
            processor_begin(1, storm);
            interrupted_runs(f, user, "IPIs");
            storm_stop = true;
            bool stopped = processor_wait(1, 5000);
            asm_volatile("sti; nop; nop; cli");
            if (!stopped)
                check(false, "the other processor stops sending");
        }
    unsigned open = 0, hit = 0;
    for (unsigned n = 0; n < sizeof bounds; n++) {
        open += bounds[n] & OPEN;
        hit += bounds[n] == (OPEN | HIT);
    }
    print("# interrupts at %u of %u boundaries\n", hit, open);
}

/* ---- exactly where an interrupt that waits comes in ---- */

static volatile uint64_t came_at;
static volatile unsigned came;

static void on_self(struct frame *frame)
{
    came++;
    came_at = frame->ip;
    lapic_write(APIC_EOI, 0);
}

/* IF is 0 and an interrupt waits; it must come at the label NAME_at, or not at all when that is 0. */
#define WINDOW(name, code) "window_" #name ": " code "\n cli\n ret\n"
__asm__(".pushsection .text\n"
        WINDOW(nop, "sti\n nop\nnop_at: nop")
        WINDOW(add, "sti\n add %rax, %rcx\nadd_at: nop")
        WINDOW(push, "sti\n push %rax\npush_at: pop %rax")
        WINDOW(call, "sti\n call 1f\n jmp 2f\n1: \ncall_at: ret\n2:")
        WINDOW(jump, "sti\n jmp 1f\n nop\n1: \njump_at: nop")
        WINDOW(store, "sti\n mov %eax, -64(%rsp)\nstore_at: nop")
        WINDOW(cpuid, "push %rbx\n xor %eax, %eax\n sti\n cpuid\ncpuid_at: pop %rbx")
        WINDOW(vector, "sti\n paddd %xmm0, %xmm1\nvector_at: nop")
        WINDOW(halt, "sti\n hlt\nhalt_at: nop")
        WINDOW(twice, "sti\n sti\ntwice_at: nop")
        WINDOW(popf, "pushf\n orl $0x200, (%rsp)\n popf\npopf_at: nop")
        WINDOW(iret, "mov %rsp, %rax\n push $0x10\n push %rax\n pushf\n orl $0x200, (%rsp)\n push $8\n push $iret_at\n iretq\niret_at: nop")
        WINDOW(ret, "push $ret_at\n sti\n ret\nret_at: nop")
        WINDOW(branch, "xor %eax, %eax\n sti\n jz branch_at\n nop\nbranch_at: nop")
        WINDOW(tpr, "mov $15, %eax\n mov %rax, %cr8\n sti\n nop\n nop\n xor %eax, %eax\n mov %rax, %cr8\ntpr_at: nop")
        WINDOW(closed, "sti\n cli\n nop\n .set closed_at, 0")
        ".popsection\n");
#define WINDOW_ENTRY(name) extern uint8_t window_##name[], name##_at[];
#define WINDOWS(X)                                                                                                                                   \
    X(nop) X(add) X(push) X(call) X(jump) X(store) X(cpuid) X(vector) X(halt) X(twice) X(popf) X(iret) X(ret) X(branch) X(tpr) X(closed)
WINDOWS(WINDOW_ENTRY)
#undef WINDOW_ENTRY
#define WINDOW_ENTRY(name) {#name, window_##name, name##_at},
static const struct window {
    const char *name;
    uint8_t *code, *at;
} windows[] = {WINDOWS(WINDOW_ENTRY)};

static void test_windows(void)
{
    trap_handlers[IPI] = on_self;
    for (unsigned n = 0; n < sizeof windows / sizeof *windows; n++) {
        const struct window *w = &windows[n];
        unsigned good = 0, rounds = 200;
        uint64_t elsewhere = 0;
        for (unsigned k = 0; k < rounds; k++) {
            came = 0;
            lapic_write(APIC_ICR, 1u << 18 | IPI);
            asm_volatile("call *%0" ::"r"(w->code) : "rax", "rcx", "rdx", "rdi", "memory", "cc");
            bool here = w->at ? came == 1 && came_at == (reg_t)w->at : !came;
            good += here;
            if (!here)
                elsewhere = came ? came_at : 1;
            asm_volatile("sti; nop; nop; cli");
        }
        check(good == rounds, "an interrupt that waits comes at once after %s (%u of %u; else at %lx, not %lx)", w->name, good, rounds, elsewhere, (reg_t)w->at);
    }
}

static void wake(unsigned number)
{
    while (!storm_stop) {
        processor_send(0, 0x4000 | IPI);
        for (unsigned n = 0; n < 200; n++)
            cpu_pause();
    }
}

static void test_halts(bool two)
{
    trap_handlers[TIMER] = trap_handlers[IPI] = on_self;
    unsigned good = 0;
    extern uint8_t halted[];
    lapic_write(APIC_LVT_TIMER, TIMER);
    for (unsigned n = 0; n < 300; n++) {
        came = 0;
        lapic_write(APIC_INITIAL, 1 + n * 300);
        asm_volatile("sti; hlt\nhalted: cli" ::: "memory");
        good += came == 1 && came_at == (reg_t)halted;
    }
    expect_eq(good, 300, "the timer wakes HLT right behind it");
    timer_off();
    if (!two)
        return;
    storm_stop = false;
    processor_begin(1, wake);
    for (unsigned n = 0; n < 500; n++)
        halt();
    cli();
    storm_stop = true;
    check(processor_wait(1, 5000), "500 HLTs end by another processor's IPIs");
    asm_volatile("sti; nop; nop; cli");
}

/* ---- random straight-line code ---- */

#define GENERATED 200u
static uint8_t *generated;
static uint16_t bounds_of[GENERATED + 1];
static uint16_t undefined_of[GENERATED + 1]; /* flags that are undefined there: they may differ between ways of running the same */
static unsigned depth, undefined;

#define FLAG_AF 0x10u
#define FLAGS_SHIFT 0x810u
#define FLAGS_BIT 0x894u
#define FLAGS_MULTIPLY 0xd4u

static unsigned any_register(void)
{
    unsigned n;
    do
        n = random_below(16);
    while (n == RSP || n == RBP);
    return n;
}

static uint8_t *put_modrm(uint8_t *p, bool wide, unsigned map, unsigned opcode, unsigned reg, unsigned rm)
{
    *p++ = (uint8_t)(0x40 | wide << 3 | (reg >> 3) << 2 | rm >> 3);
    if (map)
        *p++ = 0x0f;
    *p++ = (uint8_t)opcode;
    *p++ = (uint8_t)(0xc0 | (reg & 7) << 3 | (rm & 7));
    return p;
}

/* Keeps `undefined` for AF, which logical operations leave so until the next addition; other flags are defined again by a comparison at once (see generate). */
static void flags_note(unsigned opcode)
{
    switch (opcode & 0x3f) {
    case 0x01: /* add, adc, sbb, sub, cmp */
    case 0x03:
    case 0x11:
    case 0x13:
    case 0x19:
    case 0x29:
    case 0x39:
        undefined &= ~FLAG_AF;
        break;
    case 0x09: /* or, and, xor */
    case 0x21:
    case 0x31:
        undefined |= FLAG_AF;
        break;
    default:
        break;
    }
    if (opcode == 0x85)
        undefined |= FLAG_AF;
}

/* [rbp + displacement] */
static uint8_t *put_memory(uint8_t *p, unsigned opcode, unsigned reg)
{
    uint32_t displacement = random_below(2 * PAGE - 72);
    if (opcode < 0x40)
        flags_note(opcode);
    *p++ = (uint8_t)(0x48 | (reg >> 3) << 2);
    *p++ = (uint8_t)opcode;
    *p++ = (uint8_t)(0x85 | (reg & 7) << 3);
    memcpy(p, &displacement, 4);
    return p + 4;
}

static uint8_t *put_binary(uint8_t *p, bool wide, unsigned opcode, unsigned a, unsigned b)
{
    if (opcode < 0x40 || opcode == 0x85)
        flags_note(opcode);
    return put_modrm(p, wide, 0, opcode, a, b);
}

static uint8_t *put_unary(uint8_t *p, bool wide, unsigned b)
{
    unsigned n = random_below(4);
    if (n != 2)
        undefined &= ~FLAG_AF;
    return put_modrm(p, wide, 0, n < 2 ? 0xff : 0xf7, n, b); /* inc, dec, not, neg */
}

/* What leaves flags undefined. */
static uint8_t *put_vague(uint8_t *p, bool wide, unsigned a, unsigned b)
{
    static const uint8_t shifts[] = {0, 1, 2, 3, 4, 5, 7}, bits[] = {0xa3, 0xab, 0xb3, 0xbb};
    switch (random_below(5)) {
    case 0:
        undefined |= FLAGS_MULTIPLY;
        return put_modrm(p, wide, 1, 0xaf, a, b);
    case 1:
        undefined |= FLAGS_MULTIPLY;
        return put_modrm(p, wide, 0, 0xf7, 4 + random_below(2), b); /* mul, imul */
    case 2:
        undefined |= FLAGS_SHIFT;
        p = put_modrm(p, wide, 0, 0xc1, shifts[random_below(sizeof shifts)], b);
        *p++ = (uint8_t)random_below(64);
        return p;
    case 3:
        undefined |= FLAGS_SHIFT;
        return put_modrm(p, wide, 0, 0xd3, shifts[random_below(sizeof shifts)], b);
    default:
        undefined |= FLAGS_BIT;
        return put_modrm(p, wide, 1, bits[random_below(sizeof bits)], a, b);
    }
}

static uint8_t *put_stack(uint8_t *p, unsigned b)
{
    static const uint8_t call[] = {0xe8, 0, 0, 0, 0};
    bool pop = depth && random_below(2);
    depth += pop ? -1u : 1;
    if (!pop && random_below(4) == 0) {
        memcpy(p, call, sizeof call);
        return p + sizeof call;
    }
    *p++ = (uint8_t)(0x40 | b >> 3);
    *p++ = (uint8_t)((pop ? 0x58 : 0x50) | (b & 7));
    return p;
}

static uint8_t *put_vector(uint8_t *p, unsigned a, unsigned b)
{
    static const uint8_t opcodes[] = {0xfe, 0xef, 0xd4, 0xdb};
    *p++ = 0x66;
    unsigned which = random_below(3); /* movq x, r; movq r, x; between vectors */
    return put_modrm(p, which < 2, 1, which == 0 ? 0x6e : which == 1 ? 0x7e : opcodes[random_below(sizeof opcodes)], a, b);
}

static uint8_t *put_simple(uint8_t *p)
{
    static const uint8_t opcodes[] = {0x99, 0x9f, 0x9e, 0xf8, 0xf9, 0xf5, 0xfc, 0xfd, 0x90};
    uint8_t opcode = opcodes[random_below(sizeof opcodes)];
    if (opcode == 0x9f && undefined)
        opcode = 0x98; /* LAHF would see it */
    if (opcode == 0x9e)
        undefined = 0;
    *p++ = opcode;
    return p;
}

static uint8_t *put_instruction(uint8_t *p)
{
    static const uint8_t binary[] = {0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x39, 0x85, 0x89, 0x87}, memory_opcodes[] = {0x01, 0x03, 0x89, 0x8b, 0x31, 0x13, 0x39};
    unsigned a = any_register(), b = any_register(), wide = random_below(2);
    if (undefined & ~FLAG_AF)
        return put_binary(p, wide, 0x39, a, b);
    switch (random_below(16)) {
    case 0:
    case 1:
    case 2:
        return put_binary(p, wide, binary[random_below(sizeof binary)], a, b);
    case 3:
    case 4:
    case 5:
        return put_vague(p, wide, a, b);
    case 6:
        return put_unary(p, wide, b);
    case 7:
        return put_modrm(p, wide, 1, 0x40 + random_below(16), a, b); /* cmov */
    case 8:
        return put_modrm(p, wide, 1, 0x90 + random_below(16), 0, b); /* set */
    case 9:
    case 10:
    case 11:
        return put_memory(p, memory_opcodes[random_below(sizeof memory_opcodes)], a);
    case 12:
        return put_stack(p, b);
    case 13:
        return put_vector(p, a, b);
    case 14:
        *p++ = (uint8_t)(0x70 + random_below(16)); /* a conditional jump to the next instruction */
        *p++ = 0;
        return p;
    default:
        return put_simple(p);
    }
}

static void generate(uint8_t *at)
{
    uint8_t *p = at;
    depth = undefined = 0;
    for (unsigned n = 0; n < GENERATED; n++) {
        bounds_of[n] = (uint16_t)(p - at);
        undefined_of[n] = (uint16_t)undefined;
        p = put_instruction(p);
        if (undefined_of[n] & ~FLAG_AF)
            undefined = 0; /* that was the comparison */
    }
    bounds_of[GENERATED] = (uint16_t)(p - at);
    undefined_of[GENERATED] = (uint16_t)undefined;
    put_done(p);
}

static void generated_run(uint8_t *code, bool user, reg_t flags, struct outcome *to)
{
    memcpy(memory, memory_start, 2 * PAGE);
    memset(stack_memory, 0, PAGE);
    for (unsigned n = 0; n < 16; n++)
        probe.gpr[n] = 0x9e3779b97f4a7c15ull * (n + 1);
    probe.gpr[RBP] = (reg_t)memory;
    probe.gpr[RSP] = (reg_t)stack_memory + PAGE;
    probe.ip = (reg_t)code;
    probe.flags = 2 | flags;
    probe.user = user;
    probe.simd = simd_before;
    probe_run(&probe, to);
}

static const struct breaker {
    const char *name;
    uint8_t bytes[12], length;
    int vector;
    uint8_t error, advance; /* RIP: this many bytes behind its start */
    bool user_only;
} breakers[] = {
    {"ud2", {0x0f, 0x0b}, 2, UD, 0, 0, false},
    {"int3", {0xcc}, 1, BP, 0, 1, false},
    {"int1", {0xf1}, 1, DB, 0, 1, false},
    {"int n", {0xcd, USER_DONE}, 2, USER_DONE, 0, 2, false},
    {"div by zero", {0x48, 0xf7, 0xb5, 0xf8, 0x1f, 0, 0}, 7, DE, 0, 0, false}, /* div qword [rbp + 8184] */
    {"idiv by zero", {0xf7, 0xbd, 0xf8, 0x1f, 0, 0}, 6, DE, 0, 0, false},
    {"load, not canonical", {0x48, 0xa1, 0, 0, 0, 0, 0, 0, 0, 0x80}, 10, GP, 0, 0, false},
    {"store, not present", {0x48, 0xa3, 0, 0, 0, 0, 0, 0x60, 0, 0}, 10, PF, PF_W, 0, false},
    {"lock without memory", {0xf0, 0x01, 0xc0}, 3, UD, 0, 0, false},
    {"into", {0xce}, 1, UD, 0, 0, false},
    {"movaps, misaligned", {0x0f, 0x28, 0x85, 1, 0, 0, 0}, 7, GP, 0, 0, false},
    {"hlt", {0xf4}, 1, GP, 0, 0, true},
    {"cli", {0xfa}, 1, GP, 0, 0, true},
    {"in", {0xec}, 1, GP, 0, 0, true},
    {"mov cr3", {0x0f, 0x22, 0xd8}, 3, GP, 0, 0, true},
    {"rdmsr", {0x0f, 0x32}, 2, GP, 0, 0, true},
    {"int 3 of CD", {0xcd, 3}, 2, BP, 0, 2, false},
    {"invalid opcode", {0x0f, 0xff, 0xc0}, 3, UD, 0, 0, false},
};

/* The state before instruction k by running up to there; then the same with something that traps in k's place, more code behind it. */
static void test_breakers(void)
{
    unsigned wrong[sizeof breakers / sizeof *breakers] = {0}, noted = 0;
    static uint8_t simd_there[SIMD_BYTES] __attribute__((aligned(64))), memory_there[2 * PAGE];
    for (unsigned round = 0; round < 40; round++) {
        uint8_t *code = generated + random_below(4096);
        generate(code);
        for (unsigned n = 0; n < sizeof breakers / sizeof *breakers; n++) {
            const struct breaker *b = &breakers[n];
            bool user = b->user_only || random_below(2);
            unsigned place = random_below(GENERATED + 1), at = bounds_of[place];
            uint8_t keep[12];
            memcpy(keep, code + at, sizeof keep);
            put_done(code + at);
            generated_run(code, user, 0, &reference);
            memcpy(simd_there, simd_after, SIMD_BYTES);
            memcpy(memory_there, memory, 2 * PAGE);
            memcpy(code + at, b->bytes, b->length);
            generated_run(code, user, 0, &outcome);
            memcpy(code + at, keep, sizeof keep);
            uint64_t error = b->error | (b->vector == PF && user ? PF_U : 0);
            bool good = outcome.vector == b->vector && outcome.error == error && outcome.ip == (reg_t)code + at + b->advance &&
                        reference.vector == USER_DONE && equal(outcome.gpr, reference.gpr, sizeof outcome.gpr) &&
                        !((outcome.flags ^ reference.flags) & ~(reg_t)(FLAG_RF | undefined_of[place])) && simd_same(simd_there, simd_after) && equal(memory, memory_there, 2 * PAGE);
            wrong[n] += !good;
            if (!good && !noted++) {
                print("# %s, seeded round %u, %s, at %x: vector %d, error %lx, ip %lx, flags %lx for %lx; %s, %s\n", b->name, round, user ? "ring 3" : "ring 0", at,
                      outcome.vector, outcome.error, outcome.ip, outcome.flags, reference.flags, simd_same(simd_there, simd_after) ? "vectors good" : "vectors wrong",
                      equal(memory, memory_there, 2 * PAGE) ? "memory good" : "memory wrong");
                for (unsigned r = 0; r < 16; r++)
                    if (outcome.gpr[r] != reference.gpr[r])
                        print("# register %u: %lx instead of %lx\n", r, outcome.gpr[r], reference.gpr[r]);
            }
        }
    }
    for (unsigned n = 0; n < sizeof breakers / sizeof *breakers; n++)
        check(!wrong[n], "%s in straight-line code: exact state (%u wrong)", breakers[n].name, wrong[n]);
}

/* ---- single steps and breakpoints ---- */

static volatile unsigned steps, step_wrong;
static volatile uint64_t step_code;

static void on_step(struct frame *frame)
{
    unsigned n = ++steps;
    if (n > GENERATED || frame->ip != step_code + bounds_of[n])
        step_wrong++;
    step_wrong += !(read_dr6() & 1u << 14);
    write_dr6(0);
}

static void on_breakpoint(struct frame *frame)
{
    steps++;
    step_wrong += frame->ip != step_code || !(read_dr6() & 1);
    frame->flags |= FLAG_RF;
    write_dr6(0);
}

static void test_steps(void)
{
    unsigned good = 0, stops = 0, rounds = 20;
    trap_handler *keep = trap_handlers[DB];
    for (unsigned round = 0; round < rounds; round++) {
        uint8_t *code = generated + random_below(4096);
        bool user = round & 1;
        generate(code);
        generated_run(code, user, 0, &reference);
        memcpy(memory_reference, memory, 2 * PAGE);
        memcpy(simd_reference, simd_after, SIMD_BYTES);
        trap_handlers[DB] = on_step;
        step_code = (reg_t)code;
        steps = step_wrong = 0;
        generated_run(code, user, FLAG_TF, &outcome);
        bool same = equal(outcome.gpr, reference.gpr, sizeof outcome.gpr) && !((outcome.flags ^ reference.flags ^ FLAG_TF) & ~(reg_t)undefined_of[GENERATED]) &&
                    equal(memory, memory_reference, 2 * PAGE) && simd_same(simd_after, simd_reference);
        good += same && steps == GENERATED && !step_wrong;
        /* A breakpoint somewhere in it. */
        trap_handlers[DB] = on_breakpoint;
        step_code = (reg_t)code + bounds_of[random_below(GENERATED)];
        steps = step_wrong = 0;
        write_dr0(step_code);
        write_dr7(0x402);
        generated_run(code, user, 0, &outcome);
        write_dr7(0x400);
        stops += steps == 1 && !step_wrong && equal(outcome.gpr, reference.gpr, sizeof outcome.gpr) && equal(memory, memory_reference, 2 * PAGE);
        trap_handlers[DB] = keep;
    }
    expect_eq(good, rounds, "single steps through 200 instructions, 20 times");
    expect_eq(stops, rounds, "a breakpoint in the middle of them");
}

void test_main(void)
{
    random_seed();
    generated = pages_allocate(3);
    memory = pages_allocate(3);
    stack_memory = pages_allocate(1);
    for (unsigned n = 0; n < 2 * PAGE; n++)
        memory_start[n] = (uint8_t)random64();
    memset(memory_start + 8184, 0, 8);
    page_map(0x600000000000, 0);
    bounds_create();
    bool two = processors_start(2) == 2;
    if (!simd_enable()) {
        skip("boundaries", "no XSAVE");
        return;
    }
    simd_random();
    test_windows();
    test_halts(two);
    probe_begin();
    test_fragments(two);
    test_breakers();
    test_steps();
    probe_end();
}
