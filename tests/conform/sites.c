/*
 * One instruction that meets everything: the same code with aligned, misaligned and page-crossing operands, device registers, pages of code, read-only and missing
 * pages and addresses that are not canonical, in bursts and mixed, from both rings. What an engine has learnt about an instruction from one of them must not
 * be wrong for the next. Results, faults and memory are compared with a model each time.
 */
#include "runtime/areas.h"

#define COPIES 256u
#define ROUNDS 3000u
#define DEVICE_AREA 0x0000000068000000ull /* the local APIC's page between two pages of RAM */
#define ICR_HIGH 0x310u                   /* keeps bits 31:24 of what is written */

enum kind { LOAD, STORE, ADD, XCHG, XADD, PUSH, POP, VECTOR_LOAD, VECTOR_STORE, MOVS, REP_MOVS, CALL, KINDS };
enum target { ALIGNED, MISALIGNED, CROSSING, DEVICE, CODE, READ_ONLY, MISSING, SUPERVISOR, NOT_CANONICAL, ALIAS, TARGETS };

static const struct site {
    const char *name;
    uint8_t bytes[12], length, size;
    bool reads, writes, device;
} sites[KINDS] = {
    [LOAD] = {"mov eax, [rbx]", {0x8b, 0x03}, 2, 4, true, false, true},
    [STORE] = {"mov [rbx + r10], eax", {0x42, 0x89, 0x04, 0x13}, 4, 4, false, true, true},
    [ADD] = {"add [r11], rax", {0x49, 0x01, 0x03}, 3, 8, true, true, false},
    [XCHG] = {"xchg [rbx], eax", {0x87, 0x03}, 2, 4, true, true, true},
    [XADD] = {"lock xadd [rbx], rax", {0xf0, 0x48, 0x0f, 0xc1, 0x03}, 5, 8, true, true, false},
    [PUSH] = {"push rax", {0x50}, 1, 8, false, true, false},
    [POP] = {"pop rax", {0x58}, 1, 8, true, false, false},
    [VECTOR_LOAD] = {"movups xmm0, [rbx]", {0x0f, 0x10, 0x03}, 3, 16, true, false, false},
    [VECTOR_STORE] = {"movups [r10 + rbx], xmm0", {0x42, 0x0f, 0x11, 0x04, 0x13}, 5, 16, false, true, false},
    [MOVS] = {"movsd", {0xa5}, 1, 4, false, true, true},
    [REP_MOVS] = {"rep movsb", {0xf3, 0xa4}, 2, 12, false, true, false},
    [CALL] = {"call rax", {0xff, 0xd0}, 2, 8, false, true, false},
};

static struct probe probe;
static struct outcome outcome;
static unsigned mistakes, met[TARGETS];
static uint8_t *source; /* for MOVS: open to all */
static uint8_t *codes;  /* open to all, at its own address: sites and, on the same page, data */
static uint8_t *copies; /* `codes` is one of these pages after the other: a page that is written too often is not run like code any more */
static uint8_t device[4];

static void mistake(const struct site *s, enum target t, uint64_t va, const char *what, uint64_t have, uint64_t want)
{
    if (mistakes++ < 8)
        print("# %s, target %u at %llx, %s: %s %llx instead of %llx\n", s->name, t, (unsigned long long)va, probe.user ? "ring 3" : "ring 0", what,
              (unsigned long long)have, (unsigned long long)want);
}

static uint64_t target_address(enum target t, unsigned size)
{
    uint64_t base = area_bases[random_below(AREAS)], word = base + 2 * PAGE + 16 * random_below(500); /* "ww" in the pattern of areas.c */
    switch (t) {
    case ALIGNED:
        return word;
    case MISALIGNED:
        return word + 1 + random_below(15);
    case CROSSING:
        return size == 1 ? word : base + 3 * PAGE - 1 - random_below(size - 1);
    case DEVICE:
        return DEVICE_AREA + PAGE + ICR_HIGH;
    case CODE:
        return (uintptr_t)codes + PAGE / 2 + random_below(PAGE / 2 - 64);
    case READ_ONLY:
        return base + 5 * PAGE + random_below(PAGE - 64); /* r */
    case MISSING:
        return base + PAGE + random_below(PAGE - 64);
    case SUPERVISOR:
        return base + 7 * PAGE + random_below(PAGE - 64); /* k */
    case NOT_CANONICAL:
        return word ^ 1ull << (48 + random_below(15));
    default:
        return word ^ 1ull << (36 + random_below(11));
    }
}

static uint8_t *actual(uint64_t va)
{
    return (uint8_t *)page_physical(va);
}

static uint64_t read_bytes(uint64_t va, unsigned size)
{
    uint64_t value = 0;
    for (unsigned n = 0; n < size && n < 8; n++)
        value |= (uint64_t)*actual(va + n) << 8 * n;
    return value;
}

/* What the site writes there. */
static void expected_bytes(enum kind k, uint64_t va, uint8_t *to)
{
    uint64_t value = probe.gpr[RAX];
    if (k == ADD || k == XADD)
        value += read_bytes(va, 8);
    if (k == CALL)
        value = probe.ip + sites[k].length;
    memcpy(to, &value, 8);
    if (k == VECTOR_STORE)
        memcpy(to, simd_part(simd_before, 0, 0), 16);
    if (k == MOVS || k == REP_MOVS)
        memcpy(to, source, sites[k].size);
}

static void registers(enum kind k, uint64_t va)
{
    probe.gpr[RBX] = va;
    probe.gpr[R11] = va;
    probe.gpr[R10] = random64();
    if (k == STORE || k == VECTOR_STORE)
        probe.gpr[RBX] = va - probe.gpr[R10];
    if (k == PUSH || k == CALL)
        probe.gpr[RSP] = va + 8;
    if (k == POP)
        probe.gpr[RSP] = va;
    if (k == CALL)
        probe.gpr[RAX] = probe.ip + sites[k].length;
    probe.gpr[RDI] = va;
    probe.gpr[RSI] = (uintptr_t)source;
    probe.gpr[RCX] = sites[k].size;
}

/* Registers as they must be after the site has done its work. */
static void registers_after(enum kind k, uint64_t value)
{
    switch (k) {
    case LOAD:
    case XCHG:
        probe.gpr[RAX] = (uint32_t)value;
        break;
    case XADD:
        probe.gpr[RAX] = value;
        break;
    case POP:
        probe.gpr[RAX] = value;
        probe.gpr[RSP] += 8;
        break;
    case PUSH:
    case CALL:
        probe.gpr[RSP] -= 8;
        break;
    case MOVS:
    case REP_MOVS:
        probe.gpr[RSI] += sites[k].size;
        probe.gpr[RDI] += sites[k].size;
        probe.gpr[RCX] -= k == REP_MOVS ? sites[k].size : 0;
        break;
    default:
        break;
    }
}

/* REP MOVSB does what it can before the fault. */
static unsigned partial(enum kind k, uint64_t va, const struct expectation *want)
{
    if (k != REP_MOVS || want->vector != PF || want->cr2 <= va)
        return 0;
    unsigned done = (unsigned)(want->cr2 - va);
    probe.gpr[RSI] += done;
    probe.gpr[RDI] += done;
    probe.gpr[RCX] -= done;
    return done;
}

static void meet(enum kind k, enum target t)
{
    const struct site *s = &sites[k];
    uint8_t after[16];
    probe_random(&probe);
    probe.user = random_below(2);
    probe.flags |= random_below(2) ? FLAG_IF : 0;
    probe.ip = (uintptr_t)codes + k * 64;
    probe.simd = k == VECTOR_LOAD || k == VECTOR_STORE ? simd_before : NULL;
    uint64_t va = target_address(t, s->size);
    registers(k, va);
    struct access a = {.va = va, .size = s->size, .write = s->writes, .user = probe.user, .stack = k == PUSH || k == POP || k == CALL};
    struct expectation want = access_expect(&a);
    if (k == REP_MOVS && want.vector == GP && canonical(va))
        return;
    if (t == ALIAS && want.vector == NO_TRAP)
        return; /* another area */
    uint64_t value = 0;
    memset(after, 0, sizeof after);
    bool done = want.vector == NO_TRAP;
    if (done && t == DEVICE) {
        memcpy(&value, device, 4);
        if (s->writes) {
            expected_bytes(k, va, after);
            device[3] = after[3];
        }
    } else if (done) {
        value = read_bytes(va, s->size);
        if (s->writes)
            expected_bytes(k, va, after);
    }
    probe_run(&probe, &outcome);
    met[t]++;
    uint64_t ip = probe.ip;
    unsigned part = partial(k, va, &want);
    if (done)
        registers_after(k, value);
    if (outcome.vector != (done ? USER_DONE : want.vector) || outcome.ip != (done ? ip + s->length + 2 : ip) || (!done && outcome.error != want.error) ||
        (want.vector == PF && outcome.cr2 != want.cr2)) {
        mistake(s, t, va, "vector", (uint64_t)outcome.vector, (uint64_t)want.vector);
        return;
    }
    for (unsigned n = 0; n < 16; n++)
        if (outcome.gpr[n] != probe.gpr[n])
            mistake(s, t, va, "register", outcome.gpr[n], probe.gpr[n]);
    if (t == DEVICE) {
        if (lapic_read(ICR_HIGH) != (uint32_t)device[3] << 24)
            mistake(s, t, va, "device", lapic_read(ICR_HIGH), (uint32_t)device[3] << 24);
        return;
    }
    for (unsigned n = 0; done && n < s->size; n++) {
        if (s->writes && *actual(va + n) != after[n])
            mistake(s, t, va, "memory", *actual(va + n), after[n]);
        if (k == VECTOR_LOAD && simd_part(simd_after, 0, 0)[n] != *actual(va + n))
            mistake(s, t, va, "vector", simd_part(simd_after, 0, 0)[n], *actual(va + n));
    }
    if (s->writes)
        area_learn(va, done ? s->size : part);
    if (!areas_intact_near(va, s->size))
        mistake(s, t, va, "memory around it", 1, 0);
}

static void sites_create(void)
{
    copies = pages_allocate(COPIES);
    source = pages_allocate(1);
    for (unsigned n = 0; n < PAGE; n++)
        source[n] = (uint8_t)random64();
    for (codes = copies; codes < copies + COPIES * PAGE; codes += PAGE) {
        for (unsigned k = 0; k < KINDS; k++) {
            memcpy(codes + k * 64, sites[k].bytes, sites[k].length);
            put_done(codes + k * 64 + sites[k].length);
        }
        page_map((uintptr_t)codes, (uintptr_t)codes | PG_P | PG_W | PG_U);
    }
    page_map((uintptr_t)source, (uintptr_t)source | PG_P | PG_W | PG_U);
    page_map(DEVICE_AREA + PAGE, LAPIC | PG_P | PG_W | PG_U | 0x10); /* uncached */
}

/* A loop whose pointer runs from RAM into the device and back: the same two instructions. */
static void test_loop(void)
{
    uint8_t *page = pages_allocate(1);
    uint64_t pointers[64];
    unsigned wrong = 0;
    for (unsigned round = 0; round < 200; round++) {
        for (unsigned n = 0; n < 64; n++) {
            bool to_device = round % 3 == 0 ? false : round % 3 == 1 ? n % 16 == 15 : random_below(2);
            pointers[n] = to_device ? LAPIC + ICR_HIGH : (uintptr_t)page + random_below(PAGE - 4);
        }
        for (unsigned n = 0; n < 64; n++) {
            uint32_t v = (uint32_t)random64() & 0xff000000, back;
            asm_volatile("mov %2, (%1)\n mov (%1), %0" : "=r"(back) : "r"(pointers[n]), "r"(v) : "memory");
            wrong += back != v;
        }
    }
    check(!wrong, "a loop over RAM and a device register (%u wrong)", wrong);
}

void test_main(void)
{
    random_seed();
    if (!simd_enable()) {
        skip("sites", "no XSAVE");
        return;
    }
    simd_random();
    identity_map_restrict();
    areas_create();
    sites_create();
    probe_begin();
    timer_begin();
    for (unsigned k = 0; k < KINDS; k++) {
        enum target t = ALIGNED;
        unsigned burst = 0;
        mistakes = 0;
        lapic_write(ICR_HIGH, 0);
        memset(device, 0, sizeof device);
        for (unsigned n = 0; n < ROUNDS; n++) {
            if (!burst--) {
                t = random_below(TARGETS);
                burst = random_below(4) ? random_below(3) : random_below(60);
            }
            if (t == DEVICE && !sites[k].device)
                continue;
            codes = copies + (k * ROUNDS + n) / 64 % COPIES * PAGE;
            meet(k, t);
        }
        if (!areas_intact())
            mistake(&sites[k], 0, 0, "all pages", 1, 0);
        check(!mistakes, "%s meets everything (%u wrong)", sites[k].name, mistakes);
    }
    timer_end();
    probe_end();
    unsigned least = ~0u;
    for (unsigned t = 0; t < TARGETS; t++)
        least = met[t] < least ? met[t] : least;
    check(least > 300, "each kind of operand was met (%u times or more)", least);
    test_loop();
}
