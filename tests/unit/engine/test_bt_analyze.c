/*
 * What the translator believes of instructions, against the processor: random instructions that it would copy or rewrite run here, in this process. Registers that are not
 * said to be written stay as they are; those that are not said to be named have no influence; no byte beyond the operand's size is touched; operands that are said to be aligned by
 * the instruction itself fault when they are not; only what is said to trap does. All this is what bt_verify takes from the decoder, and what translations' safety rests on.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "arch/host.h"
#include "bt_random.h"
#include "engine/bt/translate_priv.h"
#include "tiny_vm.h"

#define COUNT 4000000u
#define PAGE 4096u

/* Code and what it loads and stores, within reach of RIP. */
struct arena {
    uint8_t code[PAGE];
    uint64_t in[16], out[16], flags_in, flags_out, host_rsp;
};

static struct tiny_vm vm;
static struct arena *arena;
static uint8_t *operand; /* two pages, the second is never mapped; before them another one that is not */
static struct translation t;
static sigjmp_buf away;
static volatile int trapped;
static volatile bool running;
static void *volatile trapped_at;
static uint64_t simd_seed[64] __attribute__((aligned(64)));
static bool masks;

/* ---- running one instruction ---- */

static void on_signal(int number, siginfo_t *info, void *context)
{
    if (!running)
        _exit(number); /* this program's own */
    trapped = number;
    trapped_at = info->si_addr;
    siglongjmp(away, 1);
}

static uint8_t *rip_put(uint8_t *p, unsigned opcode, unsigned reg, const void *field) /* opcode reg, [rip + ...] */
{
    *p++ = (uint8_t)(0x48 | (reg > 7) << 2);
    *p++ = (uint8_t)opcode;
    *p++ = (uint8_t)((reg & 7) << 3 | 5);
    int32_t distance = (int32_t)((const uint8_t *)field - (p + 4));
    memcpy(p, &distance, 4);
    return p + 4;
}

static void code_make(const uint8_t *insn, unsigned length)
{
    static const uint8_t saved[] = {0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57}, restored[] = {0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b};
    uint8_t *p = arena->code;
    memcpy(p, saved, sizeof(saved));
    p = rip_put(p + sizeof(saved), 0x89, GPR_RSP, &arena->host_rsp);
    p = rip_put(p, 0x8b, GPR_RAX, &arena->flags_in);
    *p++ = 0x50; /* push rax; popfq */
    *p++ = 0x9d;
    for (unsigned r = 0; r < 16; r++)
        p = rip_put(p, 0x8b, r, &arena->in[r]);
    memcpy(p, insn, length);
    p += length;
    for (unsigned r = 0; r < 16; r++)
        p = rip_put(p, 0x89, r, &arena->out[r]);
    p = rip_put(p, 0x8b, GPR_RSP, &arena->host_rsp);
    *p++ = 0x9c; /* pushfq; pop rax */
    *p++ = 0x58;
    p = rip_put(p, 0x89, GPR_RAX, &arena->flags_out);
    *p++ = 0xfc;
    memcpy(p, restored, sizeof(restored));
    p[sizeof(restored)] = 0xc3;
}

static void simd_reset(void)
{
    static const uint32_t mxcsr = 0x1f80;
    __asm__ volatile("emms\n ldmxcsr %0" : : "m"(mxcsr));
    __asm__ volatile("movdqu (%0), %%xmm0\n movdqu 16(%0), %%xmm1\n movdqu 32(%0), %%xmm2\n movdqu 48(%0), %%xmm3\n movdqu 64(%0), %%xmm4\n movdqu 80(%0), %%xmm5\n"
                     " movdqu 96(%0), %%xmm6\n movdqu 112(%0), %%xmm7\n movdqu 128(%0), %%xmm8\n movdqu 144(%0), %%xmm9\n movdqu 160(%0), %%xmm10\n"
                     : : "r"(simd_seed) : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "memory");
    if (masks) /* all elements take part */
        __asm__ volatile(".irp n, 1, 2, 3, 4, 5, 6, 7\n kxnorq %%k\\n, %%k\\n, %%k\\n\n .endr" : : : "memory");
}

/* 0, or the signal. */
static int run(void)
{
    trapped = 0;
    simd_reset();
    if (!sigsetjmp(away, 1)) {
        running = true;
        ((void (*)(void))(uintptr_t)arena->code)();
    }
    running = false;
    __asm__ volatile("cld" : : : "cc");
    simd_reset();
    return trapped;
}

/* ---- one case ---- */

static void registers_random(void)
{
    for (unsigned r = 0; r < 16; r++)
        arena->in[r] = bt_below(4) ? bt_random64() : bt_below(64);
    arena->flags_in = (bt_random64() & RFLAGS_OSZAPC) | RFLAGS_FIXED | RFLAGS_IF;
}

static void complain(const struct tinsn *i, const uint8_t *bytes, const char *what, unsigned detail)
{
    print_error("%s (%u), kind %u, reads %04x, writes %04x, %u bytes%s:", what, detail, i->kind, i->reads, i->writes, i->mem_size, i->aligned ? " aligned" : "");
    for (unsigned n = 0; n < i->length; n++)
        print_error(" %02x", bytes[n]);
    print_error("\n");
    fail();
}

static bool nondeterministic(const uint8_t *bytes)
{
    ZydisDecoder decoder;
    ZydisDecodedInstruction zi;
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    return !ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, NULL, bytes, 15, &zi)) || zi.meta.category == ZYDIS_CATEGORY_RDRAND ||
           zi.meta.category == ZYDIS_CATEGORY_RDSEED;
}

static void operand_fill(void)
{
    for (unsigned n = PAGE - 256; n < PAGE; n += 8)
        memset(operand + n, (int)(n * 37 >> 3), 8);
}

/* The rewritten instruction, its operand at [base + index] in registers that it does not name. Returns its length, 0: no registers left. */
static unsigned rewrite(const struct tinsn *i, uint8_t *to, unsigned *base, unsigned *index)
{
    unsigned found[2], count = 0;
    for (unsigned r = i->high_byte ? 7 : 15; count < 2 && r < 16; r--)
        if (!((i->reads | i->writes) >> r & 1) && r != GPR_RSP)
            found[count++] = r;
    if (count < 2)
        return 0;
    *base = found[0];
    *index = found[1];
    t.out.at = to;
    emit_rewritten(&t, i, (struct address){*base, *index, 0});
    return (unsigned)(t.out.at - to);
}

/* `kept`: registers with the operand's address. Memory is as it was before. */
static void registers_judge(const struct tinsn *i, const uint8_t *bytes, unsigned kept)
{
    uint64_t out[16], flags = arena->flags_out;
    for (unsigned r = 0; r < 16; r++)
        if (!(i->writes >> r & 1) && arena->out[r] != arena->in[r])
            complain(i, bytes, "register written", r);
    if (nondeterministic(bytes))
        return;
    if (i->memory)
        operand_fill();
    memcpy(out, arena->out, sizeof(out));
    for (unsigned r = 0; r < 16; r++)
        if (!((i->reads | i->writes | kept) >> r & 1))
            arena->in[r] = bt_random64();
    if (run())
        complain(i, bytes, "unnamed registers make it trap", (unsigned)trapped);
    for (unsigned r = 0; r < 16; r++)
        if (i->writes >> r & 1 && arena->out[r] != out[r])
            complain(i, bytes, "register depends on others than named", r);
    if (flags != arena->flags_out)
        complain(i, bytes, "flags depend on registers that are not named", 0);
}

static void memory_judge(const struct tinsn *i, const uint8_t *bytes, unsigned base, unsigned index)
{
    uint8_t before[256];
    memcpy(before, operand + PAGE - 256, sizeof(before));
    int number = run();
    uintptr_t address = (uintptr_t)trapped_at;
    if (number == SIGSEGV && address - (uintptr_t)operand < 2 * PAGE && address)
        complain(i, bytes, "touches what is not its operand", (unsigned)(address - (uintptr_t)operand));
    unsigned kept = sizeof(before) - (i->mem_write ? i->mem_size : 0);
    if (memcmp(before, operand + PAGE - 256, kept))
        complain(i, bytes, "writes beyond its operand", 0);
    if (!number)
        registers_judge(i, bytes, 1u << base | 1u << index);
    if (!i->aligned || number == SIGILL)
        return;
    arena->in[base] -= 1;
    if (run() != SIGSEGV)
        complain(i, bytes, "does not mind alignment", 0);
    arena->in[base] += 1;
}

static unsigned copies, memories, traps;

static void one(const struct analyze_context *a)
{
    uint8_t bytes[BT_INSN_ROOM], insn[32];
    struct tinsn i;
    bt_insn_put(bytes, false);
    analyze_insn(a, bytes, 15, 0, &i);
    if (i.kind != TI_COPY && i.kind != TI_MEMORY)
        return;
    registers_random();
    memcpy(t.code, bytes, 15);
    if (i.kind == TI_COPY) {
        code_make(bytes, i.length);
        copies++;
        if (!run())
            registers_judge(&i, bytes, 0);
        else if (i.traps)
            traps++;
        else
            complain(&i, bytes, "traps", (unsigned)trapped);
        return;
    }
    unsigned base, index, length = rewrite(&i, insn, &base, &index);
    if (!length)
        return;
    memories++;
    operand_fill();
    arena->in[index] = bt_random64();
    arena->in[base] = (uintptr_t)operand + PAGE - i.mem_size - arena->in[index];
    code_make(insn, length);
    memory_judge(&i, bytes, base, index);
}

/* In the test itself: cmocka has handlers of its own around each. */
static void handlers_install(void)
{
    static const int numbers[] = {SIGSEGV, SIGILL, SIGFPE, SIGBUS};
    static uint8_t stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof(stack)};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    assert_int_equal(sigaltstack(&alternate, NULL), 0);
    for (unsigned n = 0; n < sizeof(numbers) / sizeof(numbers[0]); n++)
        assert_int_equal(sigaction(numbers[n], &action, NULL), 0);
}

static void random_instructions(void **state)
{
    handlers_install();
    struct analyze_context a = {.c = (struct icpu *)vm.vcpu, .mode = {.code_bits = 64}};
    for (unsigned n = 0; n < COUNT; n++)
        one(&a);
    print_message("%u copied, %u of them trapped, %u with memory\n", copies, traps, memories);
    assert_true(copies > COUNT / 20 && memories > COUNT / 20);
}

/* ---- setup ---- */

static int setup(void **state)
{
    unsigned eax, ebx = 0, ecx, edx;
    if (tiny_vm_create_with(&vm, &bt_engine_ops))
        return -1;
    t.e = (struct bt_engine *)vm.engine;
    arena = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *pages = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED || pages == MAP_FAILED || mprotect(pages + PAGE, PAGE, PROT_READ | PROT_WRITE))
        return -1;
    operand = pages + PAGE;
    for (unsigned n = 0; n < 64; n++)
        simd_seed[n] = bt_random64();
    __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    masks = ebx & bit_AVX512BW && host_xcr0() >> 5 & 1;
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_instructions)};
    return cmocka_run_group_tests(tests, setup, NULL);
}
