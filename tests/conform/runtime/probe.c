/* See probe.h. */
#include "probe.h"

#ifdef __x86_64__

#define POOL_START 0x4000000ull /* behind the program, below 256 MiB */
#define POOL_END 0xf000000ull
#define FS_BASE 0xc0000100
#define GS_BASE 0xc0000101

/* ---- random numbers ---- */

static uint64_t random_state = 0x9e3779b97f4a7c15ull;

uint64_t random64(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545f4914f6cdd1dull;
}

/* seed=N, decimal. */
void random_seed(void)
{
    const char *p = command_line("seed=");
    uint64_t seed = 0;
    for (; p && *p >= '0' && *p <= '9'; p++)
        seed = seed * 10 + (uint64_t)(*p - '0');
    random_state += seed * 0xbf58476d1ce4e5b9ull;
    for (unsigned n = 0; n < 8; n++)
        random64();
    print("seed %u\n", (unsigned)seed);
}

/* ---- page tables ---- */

void *pages_allocate(unsigned count)
{
    static uint64_t next = POOL_START;
    void *p = (void *)next;
    next += count * PAGE;
    if (next > POOL_END) {
        check(false, "the pool of pages is large enough");
        finish();
    }
    return memset(p, 0, count * PAGE);
}

uint64_t *page_entry(uint64_t *pml4, uint64_t va)
{
    uint64_t *table = pml4;
    for (unsigned shift = 39; shift > 12; shift -= 9) {
        uint64_t *entry = &table[va >> shift & 511];
        if (!(*entry & PG_P)) {
            *entry = (uintptr_t)pages_allocate(1) | PG_P | PG_W | PG_U;
        } else if (*entry & PG_LARGE) { /* split: 2 MiB only */
            uint64_t large = *entry & ~PG_LARGE, *small = pages_allocate(1);
            for (unsigned n = 0; n < 512; n++)
                small[n] = large + n * PAGE;
            *entry = (uintptr_t)small | PG_P | PG_W | PG_U;
        }
        table = (uint64_t *)(*entry & PG_ADDRESS);
    }
    return &table[va >> 12 & 511];
}

void page_map(uint64_t va, uint64_t entry)
{
    *page_entry(boot_pml4, va) = entry;
    invlpg((void *)va);
}

void identity_map_restrict(void)
{
    uint64_t *pdpt = (uint64_t *)(boot_pml4[0] & PG_ADDRESS);
    for (unsigned g = 0; g < 4; g++) {
        uint64_t *pd = (uint64_t *)(pdpt[g] & PG_ADDRESS);
        for (unsigned n = 0; n < 512; n++) {
            uint64_t address = g * (1ull << 30) + n * 0x200000ull;
            bool keep = address < 0x10000000 || address == (LAPIC & ~0x1fffffu);
            pd[n] = keep ? pd[n] & ~PG_U : 0;
        }
    }
    page_map(0, 0);
    write_cr3(read_cr3());
}

/* Error code of the walk for one page, or -1. */
static int walk(const struct access *a, uint64_t va)
{
    const uint64_t *table = (const uint64_t *)(read_cr3() & PG_ADDRESS);
    reg_t cr4 = read_cr4();
    int error = (a->write ? PF_W : 0) | (a->user ? PF_U : 0) | (a->fetch ? PF_I : 0);
    uint64_t allowed = PG_W | PG_U, nx = 0;
    for (unsigned shift = 39;; shift -= 9) {
        uint64_t entry = table[va >> shift & 511];
        if (!(entry & PG_P))
            return error;
        allowed &= entry;
        nx |= entry & PG_NX;
        if (shift == 12 || (entry & PG_LARGE))
            break;
        table = (const uint64_t *)(entry & PG_ADDRESS);
    }
    bool bad = a->user && !(allowed & PG_U);
    bad |= a->write && !(allowed & PG_W) && (a->user || (read_cr0() & CR0_WP));
    bad |= a->fetch && nx;
    bad |= !a->user && a->fetch && (allowed & PG_U) && (cr4 & CR4_SMEP);
    bad |= !a->user && !a->fetch && (allowed & PG_U) && (cr4 & CR4_SMAP) && !a->ac;
    return bad ? error | PF_P : -1;
}

/* In the order that processors have: operands that must be aligned, canonical form, alignment checks, then pages from the lowest. */
struct expectation access_expect(const struct access *a)
{
    uint64_t last = a->va + a->size - 1;
    if (a->alignment && a->va & (a->alignment - 1))
        return (struct expectation){GP, 0, 0};
    if (!canonical(a->va) || !canonical(last))
        return (struct expectation){a->stack ? SS : GP, 0, 0};
    if (a->checked && a->user && a->ac && (read_cr0() & CR0_AM) && a->va & (a->size == 10 ? 7 : a->size - 1))
        return (struct expectation){AC, 0, 0};
    int error = walk(a, a->va);
    if (error >= 0)
        return (struct expectation){PF, (uint64_t)error, a->va};
    if ((last ^ a->va) & ~(PAGE - 1)) {
        error = walk(a, last & ~(PAGE - 1));
        if (error >= 0)
            return (struct expectation){PF, (uint64_t)error, last & ~(PAGE - 1)};
    }
    return (struct expectation){NO_TRAP, 0, 0};
}

uint64_t page_physical(uint64_t va)
{
    const uint64_t *table = (const uint64_t *)(read_cr3() & PG_ADDRESS);
    if (!canonical(va))
        return 0;
    for (unsigned shift = 39;; shift -= 9) {
        uint64_t entry = table[va >> shift & 511];
        if (!(entry & PG_P))
            return 0;
        uint64_t below = (1ull << shift) - 1;
        if (shift == 12 || (entry & PG_LARGE))
            return (entry & PG_ADDRESS & ~below) | (va & below);
        table = (const uint64_t *)(entry & PG_ADDRESS);
    }
}

/* ---- running ---- */

uint64_t probe_sp;
void *probe_simd_out;
uint8_t simd_before[SIMD_BYTES] __attribute__((aligned(64)));
uint8_t simd_after[SIMD_BYTES] __attribute__((aligned(64)));
static uint8_t probe_stack[16384] __attribute__((aligned(16)));
static struct outcome *probe_outcome;
static bool probe_active;
static reg_t probe_flags; /* set beyond what was asked for */

extern uint8_t probe_leave[];
/* gpr[16], ip, flags, cs, ss, simd */
void probe_enter(const uint64_t *image);
__asm__(".text\n"
        "probe_enter: push %rbx\n push %rbp\n push %r12\n push %r13\n push %r14\n push %r15\n"
        " mov %rsp, probe_sp\n mov 160(%rdi), %rcx\n jrcxz 1f\n mov $-1, %eax\n mov $-1, %edx\n xrstor64 (%rcx)\n"
        "1: push 152(%rdi)\n push 32(%rdi)\n push 136(%rdi)\n push 144(%rdi)\n push 128(%rdi)\n"
        " mov (%rdi), %rax\n mov 8(%rdi), %rcx\n mov 16(%rdi), %rdx\n mov 24(%rdi), %rbx\n mov 40(%rdi), %rbp\n mov 48(%rdi), %rsi\n"
        " mov 64(%rdi), %r8\n mov 72(%rdi), %r9\n mov 80(%rdi), %r10\n mov 88(%rdi), %r11\n mov 96(%rdi), %r12\n mov 104(%rdi), %r13\n"
        " mov 112(%rdi), %r14\n mov 120(%rdi), %r15\n mov 56(%rdi), %rdi\n iretq\n"
        "probe_leave: mov probe_simd_out, %rcx\n jrcxz 1f\n mov $-1, %eax\n mov $-1, %edx\n xsave64 (%rcx)\n"
        "1: pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbp\n pop %rbx\n ret\n");

static void on_probe(struct frame *frame)
{
    if (!probe_active) {
        check(false, "no trap between probes: vector %u error %lx at %lx cr2 %lx", (unsigned)frame->vector, frame->error, frame->ip, read_cr2());
        finish();
    }
    probe_active = false;
    *probe_outcome = (struct outcome){
        .gpr = {frame->ax, frame->cx, frame->dx, frame->bx, frame->sp, frame->bp, frame->si, frame->di, frame->r8, frame->r9, frame->r10, frame->r11,
                frame->r12, frame->r13, frame->r14, frame->r15},
        .ip = frame->ip, .flags = frame->flags & ~(frame->cs & 3 ? probe_flags : 0), .cs = frame->cs, .error = frame->error, .cr2 = read_cr2(), .vector = (int)frame->vector,
    };
    frame->ip = (reg_t)probe_leave;
    frame->cs = KCODE;
    frame->ss = KDATA;
    frame->sp = probe_sp;
    frame->flags = 2;
}

void probe_begin(void)
{
    tss.ist[0] = (reg_t)(probe_stack + sizeof probe_stack);
    asm_volatile("mov %0, %%fs; mov %0, %%gs" ::"r"(0)); /* else the first way to ring 3 does that, and takes their bases */
    for (unsigned n = 0; n < 0xf0; n++) { /* above: what wakes processors that have no TSS */
        idt[n].ist = 1;
        if (n < 32 || n == USER_DONE)
            trap_handlers[n] = on_probe;
    }
}

void probe_end(void)
{
    for (unsigned n = 0; n < 32; n++)
        trap_handlers[n] = NULL;
    trap_handlers[USER_DONE] = NULL;
}

void probe_run(const struct probe *p, struct outcome *outcome)
{
    uint64_t image[21];
    memcpy(image, p->gpr, sizeof p->gpr);
    image[16] = p->ip;
    probe_flags = p->user ? user_flags & ~p->flags : 0;
    image[17] = p->flags | probe_flags | 2;
    image[18] = p->user ? UCODE : KCODE;
    image[19] = p->user ? UDATA : KDATA;
    image[20] = (uintptr_t)p->simd;
    probe_simd_out = p->simd ? simd_after : NULL;
    probe_outcome = outcome;
    probe_active = true;
    probe_enter(image);
}

void probe_random(struct probe *p)
{
    for (unsigned n = 0; n < 16; n++)
        p->gpr[n] = random64();
    p->flags = (random64() & 0x8d5) | 2;
}

/* ---- vector state ---- */

static unsigned simd_bytes, simd_offsets[8];
static uint64_t simd_xcr0;

bool simd_enable(void)
{
    if (!(cpuid(1, 0).c & 1u << 26))
        return false;
    write_cr4(read_cr4() | CR4_OSXSAVE);
    simd_xcr0 = cpuid(0xd, 0).a & 0xe7;
    asm_volatile("xsetbv" ::"c"(0), "a"((uint32_t)simd_xcr0), "d"(0));
    simd_bytes = cpuid(0xd, 0).b;
    for (unsigned n = 2; n < 8; n++)
        simd_offsets[n] = simd_xcr0 >> n & 1 ? cpuid(0xd, n).b : 0;
    return simd_bytes <= SIMD_BYTES;
}

uint64_t simd_features(void)
{
    return simd_xcr0;
}

uint8_t *simd_part(uint8_t *area, unsigned number, unsigned part)
{
    if (number >= 16)
        return area + simd_offsets[7] + (number - 16) * 64 + part * 16;
    if (part == 0)
        return area + 160 + number * 16;
    if (part == 1)
        return area + simd_offsets[2] + number * 16;
    return area + simd_offsets[6] + number * 32 + (part - 2) * 16;
}

uint64_t *simd_mask(uint8_t *area, unsigned number)
{
    return (uint64_t *)(area + simd_offsets[5]) + number;
}

static void fill(uint8_t *at, unsigned bytes)
{
    for (unsigned n = 0; n < bytes; n += 8) {
        uint64_t v = random64();
        memcpy(at + n, &v, 8);
    }
}

void simd_random(void)
{
    static const uint16_t fcw = 0x37f;
    static const uint32_t mxcsr = 0x1f80;
    memset(simd_before, 0, sizeof simd_before);
    memcpy(simd_before, &fcw, 2);
    memcpy(simd_before + 24, &mxcsr, 4);
    memcpy(simd_before + 512, &simd_xcr0, 8);
    fill(simd_before + 160, 256);
    for (unsigned n = 2; n < 8; n++)
        if (simd_xcr0 >> n & 1)
            fill(simd_before + simd_offsets[n], cpuid(0xd, n).a);
    memset(simd_after, 0, sizeof simd_after);
}

static bool same(const uint8_t *a, const uint8_t *b, unsigned from, unsigned to)
{
    const uint64_t *x = (const uint64_t *)(a + from), *y = (const uint64_t *)(b + from);
    for (unsigned n = 0; n < (to - from) / 8; n++)
        if (x[n] != y[n])
            return false;
    return true;
}

bool simd_same(const uint8_t *a, const uint8_t *b)
{
    return same(a, b, 0, 8) && same(a, b, 160, 416) && same(a, b, 576, simd_bytes) && !memcmp(a + 24, b + 24, 4);
}

/* ---- emitting ---- */

void put_done(uint8_t *at)
{
    at[0] = 0xcd;
    at[1] = USER_DONE;
}

static uint8_t *put_prefixes(uint8_t *p, const struct form *f, const struct operand *o, unsigned reg, unsigned vvvv, unsigned opmask, bool zeroing)
{
    static const uint8_t pps[] = {[1] = 0x66, [2] = 0xf3, [3] = 0xf2};
    unsigned r = reg >> 3 & 1, x = o->index != NONE ? (unsigned)o->index >> 3 & 1 : 0, b = o->base != NONE ? (unsigned)o->base >> 3 & 1 : 0;
    unsigned pp = 0;
    while (f->encoding != LEGACY && f->prefix && pps[pp] != f->prefix)
        pp++;
    if (o->segment)
        *p++ = o->segment;
    if (o->narrow)
        *p++ = 0x67;
    switch (f->encoding) {
    case VEX:
        *p++ = 0xc4;
        *p++ = (uint8_t)(!r << 7 | !x << 6 | !b << 5 | f->map);
        *p++ = (uint8_t)(f->w << 7 | (~vvvv & 15) << 3 | f->length << 2 | pp);
        break;
    case EVEX:
        *p++ = 0x62;
        *p++ = (uint8_t)(!r << 7 | !x << 6 | !b << 5 | !(reg >> 4 & 1) << 4 | f->map);
        *p++ = (uint8_t)(f->w << 7 | (~vvvv & 15) << 3 | 4 | pp);
        *p++ = (uint8_t)(zeroing << 7 | f->length << 5 | !(vvvv >> 4 & 1) << 3 | opmask);
        break;
    default:
        if (f->prefix)
            *p++ = f->prefix;
        *p++ = (uint8_t)(0x40 | f->w << 3 | r << 2 | x << 1 | b);
        if (f->map)
            *p++ = 0x0f;
        if (f->map >= 2)
            *p++ = f->map == 2 ? 0x38 : 0x3a;
    }
    *p++ = f->opcode;
    return p;
}

unsigned emit(uint8_t *at, const struct form *f, const struct operand *o, unsigned reg, unsigned vvvv, unsigned opmask, bool zeroing)
{
    uint8_t *p = put_prefixes(at, f, o, reg, vvvv, opmask, zeroing);
    bool absolute = o->base == NONE;
    unsigned mod = absolute ? 0 : 2; /* always 32 bits of displacement: EVEX scales shorter ones */
    if (o->index == NONE && !absolute && (o->base & 7) != RSP) {
        *p++ = (uint8_t)(mod << 6 | (reg & 7) << 3 | (o->base & 7));
    } else {
        *p++ = (uint8_t)(mod << 6 | (reg & 7) << 3 | 4);
        *p++ = (uint8_t)(o->scale << 6 | (o->index == NONE ? 4 : o->index & 7) << 3 | (absolute ? 5 : o->base & 7));
    }
    memcpy(p, &o->displacement, 4);
    p += 4;
    for (unsigned n = 0; n < f->immediate_bytes; n++)
        *p++ = (uint8_t)(n ? 0 : 0x5a);
    return (unsigned)(p - at);
}

void operand_random(struct operand *o, struct probe *probe, uint64_t va, unsigned keep)
{
    *o = (struct operand){.base = NONE, .index = NONE, .displacement = (int32_t)random64()};
    uint64_t offset = va;
    if (random_below(8) == 0) {
        uint64_t base = random64() & 0x7fffffffffffull;
        if (random_below(2))
            base = ~base; /* canonical, upper half */
        o->segment = random_below(2) ? 0x64 : 0x65;
        wrmsr(o->segment == 0x64 ? FS_BASE : GS_BASE, base);
        offset -= base;
    }
    if ((uint64_t)(int64_t)(int32_t)offset == offset && random_below(4) == 0) {
        o->displacement = (int32_t)offset; /* absolute */
        return;
    }
    o->narrow = !(offset >> 32) && random_below(2);
    if (random_below(2))
        o->displacement = (int8_t)o->displacement;
    if (random_below(3) == 0) {
        do
            o->index = (int)random_below(16);
        while (o->index == RSP || keep >> o->index & 1);
        o->scale = random_below(4);
    }
    do
        o->base = (int)random_below(16);
    while (keep >> o->base & 1 || (o->base == o->index && o->scale));
    uint64_t rest = offset - (uint64_t)(int64_t)o->displacement;
    if (o->base == o->index) { /* twice the same register needs an even rest */
        o->displacement ^= (int32_t)(rest & 1);
        rest = offset - (uint64_t)(int64_t)o->displacement;
        probe->gpr[o->base] = rest >> 1;
        if (o->narrow)
            probe->gpr[o->base] = (probe->gpr[o->base] & 0x7fffffff) | random64() << 32;
        return;
    }
    if (o->index != NONE)
        rest -= probe->gpr[o->index] << o->scale;
    probe->gpr[o->base] = o->narrow ? (rest & 0xffffffff) | random64() << 32 : rest;
}

#endif
