/*
 * See native_compare.h. The host side is a code page: load every register, the instruction, store every register; a signal handler skips an
 * instruction that faults. The guest side is an icpu with page tables that map COMPARE_AREA and nothing after it.
 * Test-only; one thread.
 */
#include <assert.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "native_compare.h"

#define GUEST_RAM (1ull << 20)
#define GUEST_AREA_GPA 0x20000ull
#define CODE_BYTES 4096u

struct compare {
    struct icpu cpu;
    struct physmap *memory;
    uint8_t *code;
};

/* Shared with the code page and the signal handler. */
static struct {
    uint64_t gpr[16], rflags, host_rsp;
} slot;
static uintptr_t resume_at;
static volatile bool host_faulted;

static void on_signal(int number, siginfo_t *info, void *context)
{
    ucontext_t *uc = context;
    host_faulted = true;
    uc->uc_mcontext.gregs[REG_RIP] = (greg_t)resume_at;
}

static void signals_install(void)
{
    static uint8_t stack[65536];
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigaltstack(&alternate, NULL);
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    sigaction(SIGFPE, &action, NULL);
    sigaction(SIGILL, &action, NULL);
}

/* ---- the host side ---- */

static uint8_t *emit(uint8_t *p, const void *bytes, unsigned length)
{
    memcpy(p, bytes, length);
    return p + length;
}
#define EMIT(p, ...) emit(p, (const uint8_t[]){__VA_ARGS__}, sizeof((const uint8_t[]){__VA_ARGS__}))

static uint8_t *emit_slot_to_rax(uint8_t *p)
{
    uint64_t address = (uintptr_t)&slot;
    p = EMIT(p, 0x48, 0xb8); /* mov rax, &slot */
    return emit(p, &address, 8);
}

/* mov between register n and [rax + n * 8] */
static uint8_t *emit_register(uint8_t *p, unsigned n, uint8_t opcode)
{
    return EMIT(p, 0x48 | (n & 8 ? 4 : 0), opcode, 0x40 | (n & 7) << 3, n * 8);
}

void compare_run_native(struct compare *compare, const uint8_t *code, unsigned length, struct compare_state *state)
{
    uint8_t *p = compare->code;
    uint64_t rax_slot = (uintptr_t)&slot.gpr[0];
    p = EMIT(p, 0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57); /* push rbx rbp r12..r15 */
    p = emit_slot_to_rax(p);
    p = EMIT(p, 0x48, 0x89, 0xa0, 136, 0, 0, 0);          /* mov [rax + 136], rsp */
    p = EMIT(p, 0xff, 0xb0, 128, 0, 0, 0, 0x9d);          /* push [rax + 128]; popfq */
    for (unsigned n = 1; n < 16; n++)
        p = emit_register(p, n, 0x8b);
    p = emit_register(p, 0, 0x8b);
    p = emit(p, code, length);
    resume_at = (uintptr_t)p;
    p = EMIT(p, 0x48, 0xa3); /* mov [&slot.gpr[0]], rax */
    p = emit(p, &rax_slot, 8);
    p = emit_slot_to_rax(p);
    for (unsigned n = 1; n < 16; n++)
        p = emit_register(p, n, 0x89);
    p = EMIT(p, 0x48, 0x8b, 0xa0, 136, 0, 0, 0);          /* mov rsp, [rax + 136] */
    p = EMIT(p, 0x9c, 0x8f, 0x80, 128, 0, 0, 0, 0xfc);    /* pushfq; pop [rax + 128]; cld */
    p = EMIT(p, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3);

    memcpy(slot.gpr, state->gpr, sizeof slot.gpr);
    slot.rflags = (state->rflags & (RFLAGS_OSZAPC | RFLAGS_DF)) | RFLAGS_FIXED | RFLAGS_IF;
    host_faulted = false;
    signals_install(); /* each time: the test runner puts its own handlers in place before every test */
    ((void (*)(void))(uintptr_t)compare->code)();
    memcpy(state->gpr, slot.gpr, sizeof slot.gpr);
    state->rflags = slot.rflags & (RFLAGS_OSZAPC | RFLAGS_DF);
    state->faulted = host_faulted;
}

/* ---- the guest side ---- */

static uint32_t no_port_read(void *host, uint16_t port, unsigned size)
{
    return 0x11223344u + port;
}

static void no_port_write(void *host, uint16_t port, unsigned size, uint32_t value)
{
}

static const struct vcpu_host_ops host_ops = {.port_read = no_port_read, .port_write = no_port_write};

static void page_tables_build(struct physmap *memory)
{
    uint64_t *table = physmap_get(memory, 0x1000, 0x4000, PHYSMAP_WRITE); /* PML4, PDPT, PD, PT */
    assert(table);
    table[0] = 0x2000 | 7;
    table[512] = 0x3000 | 7;
    table[1024 + (COMPARE_AREA >> 21 & 511)] = 0x4000 | 7;
    for (unsigned n = 0; n < COMPARE_BYTES / PAGE_SIZE_BYTES; n++)
        table[1536 + (COMPARE_AREA >> 12 & 511) + n] = (GUEST_AREA_GPA + n * PAGE_SIZE_BYTES) | 7;
}

void compare_set_mode(struct compare *compare, unsigned code_bits)
{
    struct cpu_state *cpu = &compare->cpu.v.cpu;
    bool big = code_bits == 32;
    for (unsigned n = 0; n < SEG_COUNT; n++)
        cpu->seg[n] = (struct segment){.limit = 0xffffffff, .selector = 0x10, .attributes = big ? 0xc093 : 0x8093};
    cpu->seg[SEG_CS].attributes = code_bits == 64 ? 0xa09b : big ? 0xc09b : 0x809b;
    cpu->cr0 = CR0_PE | CR0_PG | CR0_WP | CR0_ET;
    cpu->cr3 = 0x1000;
    cpu->cr4 = CR4_PAE;
    cpu->efer = EFER_LME | EFER_LMA;
    interp_mode_changed(&compare->cpu);
}

struct compare *compare_create(void)
{
    struct compare *compare;
    if (posix_memalign((void **)&compare, 64, sizeof *compare))
        return NULL;
    memset(compare, 0, sizeof *compare);
    int rc = physmap_create(&compare->memory, GUEST_RAM, NULL);
    assert(!rc);
    page_tables_build(compare->memory);
    struct icpu *c = &compare->cpu;
    c->v.memory = compare->memory;
    c->v.host_ops = &host_ops;
    c->max_phys_bits = 40;
    c->delivering = -1;
    rc = tlb_create(c);
    assert(!rc);
    compare_set_mode(compare, 64);
    compare->code = mmap(NULL, CODE_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert(compare->code != MAP_FAILED);
    void *area = mmap((void *)COMPARE_AREA, COMPARE_BYTES + PAGE_SIZE_BYTES, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    assert(area == (void *)COMPARE_AREA);
    rc = mprotect(area, COMPARE_BYTES, PROT_READ | PROT_WRITE);
    assert(!rc);
    return compare;
}

void compare_destroy(struct compare *compare)
{
    munmap((void *)COMPARE_AREA, COMPARE_BYTES + PAGE_SIZE_BYTES);
    munmap(compare->code, CODE_BYTES);
    tlb_destroy(&compare->cpu);
    physmap_destroy(compare->memory);
    free(compare);
}

struct icpu *compare_cpu(struct compare *compare)
{
    return &compare->cpu;
}

uint8_t *compare_guest_memory(struct compare *compare)
{
    return physmap_get(compare->memory, GUEST_AREA_GPA, COMPARE_BYTES, PHYSMAP_WRITE);
}

bool compare_run_guest(struct compare *compare, const uint8_t *code, unsigned length, struct compare_state *state)
{
    struct icpu *c = &compare->cpu;
    struct insn insn;
    memcpy(c->v.cpu.gpr, state->gpr, sizeof state->gpr);
    c->v.cpu.gpr[GPR_ZERO] = 0;
    c->v.cpu.rflags = state->rflags | RFLAGS_FIXED;
    flags_set_arithmetic(c, state->rflags);
    unsigned decoded = decode_insn(c, code, length, c->code_bits, &insn);
    assert(decoded == length);
    c->v.cpu.gpr[GPR_RIP] = 0x1000 + length;
    c->block_guard_span = 0;
    c->current = &insn;
    state->faulted = setjmp(c->escape) != 0;
    if (!state->faulted)
        insn.fn(c, &insn);
    c->current = NULL;
    memcpy(state->gpr, c->v.cpu.gpr, sizeof state->gpr);
    state->rflags = flags_get(c) & ~RFLAGS_FIXED;
    return !state->faulted;
}
