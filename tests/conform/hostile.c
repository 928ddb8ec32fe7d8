/*
 * Wild pointers: loads, stores and read-modify-writes of every size and addressing mode, string and stack instructions, jumps, at addresses all over the 64-bit
 * range, from ring 0 and ring 3, with SMEP, SMAP and alignment checks on and off, while a timer interrupts. Each must give exactly the fault that the page tables say
 * (SDM vol. 3, 4.7 and 6.15) with CR2 and error code, or do its work on exactly the bytes meant; a fault leaves every register and all memory as they were.
 * Processors agree on the order of checks that runtime/probe.c states (tried in ring 3 of one).
 */
#include "runtime/areas.h"

#define SCALARS 12000u
#define STRINGS 2500u
#define STACKS 2500u
#define JUMPS 2500u
#define FETCHES 600u

enum kind { K_LOAD, K_EXTEND, K_STORE, K_UPDATE, K_READ, K_XCHG, K_NONE };

#define L LEGACY
static const struct form forms[] = {
    {"mov r8, m", L, 0, 0, 0x8a, -1, 0, 0, 0, 1, K_LOAD, 0},
    {"mov r16, m", L, 0x66, 0, 0x8b, -1, 0, 0, 0, 2, K_LOAD, 0},
    {"mov r32, m", L, 0, 0, 0x8b, -1, 0, 0, 0, 4, K_LOAD, 0},
    {"mov r64, m", L, 0, 0, 0x8b, -1, 1, 0, 0, 8, K_LOAD, 0},
    {"movzx r64, m16", L, 0, 1, 0xb7, -1, 1, 0, 0, 2, K_EXTEND, 0},
    {"movzx r32, m8", L, 0, 1, 0xb6, -1, 0, 0, 0, 1, K_EXTEND, 0},
    {"movsxd r64, m32", L, 0, 0, 0x63, -1, 1, 0, 0, 4, K_READ, 0},
    {"movsx r32, m8", L, 0, 1, 0xbe, -1, 0, 0, 0, 1, K_READ, 0},
    {"mov m, r8", L, 0, 0, 0x88, -1, 0, 0, 0, 1, K_STORE, 0},
    {"mov m, r16", L, 0x66, 0, 0x89, -1, 0, 0, 0, 2, K_STORE, 0},
    {"mov m, r32", L, 0, 0, 0x89, -1, 0, 0, 0, 4, K_STORE, 0},
    {"mov m, r64", L, 0, 0, 0x89, -1, 1, 0, 0, 8, K_STORE, 0},
    {"movnti m, r64", L, 0, 1, 0xc3, -1, 1, 0, 0, 8, K_STORE, 0},
    {"mov m8, imm", L, 0, 0, 0xc6, 0, 0, 0, 1, 1, K_UPDATE, 0},
    {"mov m64, imm", L, 0, 0, 0xc7, 0, 1, 0, 4, 8, K_UPDATE, 0},
    {"add m8, r", L, 0, 0, 0x00, -1, 0, 0, 0, 1, K_UPDATE, 0},
    {"add m16, r", L, 0x66, 0, 0x01, -1, 0, 0, 0, 2, K_UPDATE, 0},
    {"adc m32, r", L, 0, 0, 0x11, -1, 0, 0, 0, 4, K_UPDATE, 0},
    {"xor m64, r", L, 0, 0, 0x31, -1, 1, 0, 0, 8, K_UPDATE, 0},
    {"or m64, imm", L, 0, 0, 0x83, 1, 1, 0, 1, 8, K_UPDATE, 0},
    {"sub r64, m", L, 0, 0, 0x2b, -1, 1, 0, 0, 8, K_READ, 0},
    {"cmp m64, r", L, 0, 0, 0x39, -1, 1, 0, 0, 8, K_READ, 0},
    {"test m32, imm", L, 0, 0, 0xf7, 0, 0, 0, 4, 4, K_READ, 0},
    {"not m64", L, 0, 0, 0xf7, 2, 1, 0, 0, 8, K_UPDATE, 0},
    {"neg m16", L, 0x66, 0, 0xf7, 3, 0, 0, 0, 2, K_UPDATE, 0},
    {"mul m64", L, 0, 0, 0xf7, 4, 1, 0, 0, 8, K_READ, 0},
    {"inc m32", L, 0, 0, 0xff, 0, 0, 0, 0, 4, K_UPDATE, 0},
    {"shl m64, imm", L, 0, 0, 0xc1, 4, 1, 0, 1, 8, K_UPDATE, 0},
    {"imul r64, m", L, 0, 1, 0xaf, -1, 1, 0, 0, 8, K_READ, 0},
    {"cmovc r64, m", L, 0, 1, 0x42, -1, 1, 0, 0, 8, K_READ, 0},
    {"setz m8", L, 0, 1, 0x94, 0, 0, 0, 0, 1, K_UPDATE, 0},
    {"bt m64, imm", L, 0, 1, 0xba, 4, 1, 0, 1, 8, K_READ, 0},
    {"bts m32, imm", L, 0, 1, 0xba, 5, 0, 0, 1, 4, K_UPDATE, 0},
    {"shld m64, r, imm", L, 0, 1, 0xa4, -1, 1, 0, 1, 8, K_UPDATE, 0},
    {"xadd m64, r", L, 0, 1, 0xc1, -1, 1, 0, 0, 8, K_UPDATE, 0},
    {"cmpxchg m64, r", L, 0, 1, 0xb1, -1, 1, 0, 0, 8, K_UPDATE, 0},
    {"xchg m8, r", L, 0, 0, 0x86, -1, 0, 0, 0, 1, K_XCHG, 0},
    {"xchg m64, r", L, 0, 0, 0x87, -1, 1, 0, 0, 8, K_XCHG, 0},
    {"lock add m32, r", L, 0xf0, 0, 0x01, -1, 0, 0, 0, 4, K_UPDATE, 0},
    {"lock inc m64", L, 0xf0, 0, 0xff, 0, 1, 0, 0, 8, K_UPDATE, 0},
    {"lock xadd m64, r", L, 0xf0, 1, 0xc1, -1, 1, 0, 0, 8, K_UPDATE, 0},
    {"lock cmpxchg m32, r", L, 0xf0, 1, 0xb1, -1, 0, 0, 0, 4, K_UPDATE, 0},
    {"lock btc m64, imm", L, 0xf0, 1, 0xba, 7, 1, 0, 1, 8, K_UPDATE, 0},
    {"cmpxchg8b", L, 0, 1, 0xc7, 1, 0, 0, 0, 8, K_UPDATE, 0},
    {"lock cmpxchg16b", L, 0xf0, 1, 0xc7, 1, 1, 0, 0, 16, K_UPDATE, 16},
    {"cmpxchg16b", L, 0, 1, 0xc7, 1, 1, 0, 0, 16, K_UPDATE, 16},
    {"lea r64, m", L, 0, 0, 0x8d, -1, 1, 0, 0, 8, K_NONE, 0},
    {"nop m", L, 0, 1, 0x1f, 0, 0, 0, 0, 4, K_NONE, 0},
    {"prefetcht0", L, 0, 1, 0x18, 1, 0, 0, 0, 1, K_NONE, 0},
    {"clflush", L, 0, 1, 0xae, 7, 0, 0, 0, 1, K_READ, 0},
};
#undef L
#define FORMS (sizeof forms / sizeof *forms)

static struct probe probe;
static struct outcome outcome;
static unsigned mistakes, faults[32], done_count;

static void mistake(const char *name, uint64_t va, const char *what, uint64_t have, uint64_t want)
{
    if (mistakes++ < 12)
        print("# %s at %llx, %s, cr4 %lx, flags %lx: %s %llx instead of %llx\n", name, (unsigned long long)va, probe.user ? "ring 3" : "ring 0", read_cr4(),
              probe.flags, what, (unsigned long long)have, (unsigned long long)want);
}

static void verdict(const char *name)
{
    check(mistakes == 0, "%s (%u wrong; done %u, #PF %u, #GP %u, #SS %u, #AC %u)", name, mistakes, done_count, faults[PF], faults[GP], faults[SS], faults[AC]);
    mistakes = done_count = 0;
    memset(faults, 0, sizeof faults);
}

/* The outcome is the fault expected, or the end at `end`; after a fault all registers are as they were but those in `changed`. */
static void judge(const char *name, uint64_t va, const struct expectation *want, uint64_t fault_ip, uint64_t end, unsigned changed)
{
    int vector = want->vector == NO_TRAP ? USER_DONE : want->vector;
    if (outcome.vector != vector) {
        mistake(name, va, "vector", (uint64_t)outcome.vector, (uint64_t)vector);
        return;
    }
    if (outcome.ip != (want->vector == NO_TRAP ? end : fault_ip))
        mistake(name, va, "RIP", outcome.ip, want->vector == NO_TRAP ? end : fault_ip);
    if (want->vector == NO_TRAP) {
        done_count++;
    } else {
        faults[want->vector]++;
        if (outcome.error != want->error)
            mistake(name, va, "error code", outcome.error, want->error);
        if (want->vector == PF && outcome.cr2 != want->cr2)
            mistake(name, va, "CR2", outcome.cr2, want->cr2);
        if ((outcome.flags ^ probe.flags) & ~(reg_t)FLAG_RF & ~2ul)
            mistake(name, va, "flags", outcome.flags, probe.flags);
    }
    for (unsigned n = 0; n < 16; n++)
        if (!(changed >> n & 1) && outcome.gpr[n] != probe.gpr[n])
            mistake(name, va, "register", outcome.gpr[n], probe.gpr[n]);
}

/* Room for one probe's code at a place of its own, across page boundaries now and then. */
static uint8_t *next_code(void)
{
    unsigned offset = code_next();
    probe.ip = code_va(probe.user, random_below(CODE_VIEWS)) + offset;
    return code_bytes() + offset;
}

static void begin(void)
{
    probe_random(&probe);
    probe.user = random_below(2);
    if (random_below(2))
        probe.flags |= FLAG_AC;
    if (random_below(2) || (probe.user && user_flags))
        probe.flags |= FLAG_IF;
}

/* The access may be done for real: its bytes are test pages. */
static bool harmless(uint64_t va, unsigned size)
{
    return area_shadow(va) && area_shadow(va + size - 1);
}

static struct expectation expect(uint64_t va, unsigned size, bool write, bool stack, unsigned alignment, bool checked)
{
    struct access a = {.va = va, .size = size, .write = write, .user = probe.user, .ac = probe.flags & FLAG_AC, .stack = stack,
                       .alignment = (uint8_t)alignment, .checked = checked};
    return access_expect(&a);
}

/* An address at which nothing but test pages can be reached. */
static uint64_t choose(unsigned size, bool write)
{
    for (;;) {
        uint64_t va = wild_address(size);
        if (expect(va, size, write, false, 0, false).vector != NO_TRAP || harmless(va, size))
            return va;
    }
}

static uint64_t shadow_read(uint64_t va, unsigned size)
{
    uint64_t value = 0;
    for (unsigned n = 0; n < size; n++)
        value |= (uint64_t)*area_shadow(va + n) << 8 * n;
    return value;
}

static void shadow_write(uint64_t va, unsigned size, uint64_t value)
{
    for (unsigned n = 0; n < size; n++)
        *area_shadow(va + n) = (uint8_t)(value >> 8 * n);
}

static uint64_t low_bytes(uint64_t value, unsigned size)
{
    return size == 8 ? value : value & ((1ull << 8 * size) - 1);
}

static uint64_t merged(uint64_t old, uint64_t value, unsigned size)
{
    return size >= 4 ? value : (old & ~((1ull << 8 * size) - 1)) | value;
}

/* ---- one memory operand ---- */

static void check_value(const struct form *f, uint64_t va, unsigned reg, const struct operand *o)
{
    uint64_t have = outcome.gpr[reg];
    if (f->kind == K_LOAD || f->kind == K_XCHG) {
        uint64_t want = merged(probe.gpr[reg], shadow_read(va, f->size), f->size);
        if (have != want)
            mistake(f->name, va, "value", have, want);
    } else if (f->kind == K_EXTEND && have != shadow_read(va, f->size)) {
        mistake(f->name, va, "value", have, shadow_read(va, f->size));
    }
    if (f->kind == K_STORE || f->kind == K_XCHG)
        shadow_write(va, f->size, low_bytes(probe.gpr[reg], f->size));
    else if (f->kind == K_UPDATE)
        area_learn(va, f->size);
    if (!areas_intact_near(va, f->size))
        mistake(f->name, va, "memory, after", 1, 0);
}

static void scalar(void)
{
    const struct form *f = &forms[random_below(FORMS)];
    struct operand o;
    begin();
    bool write = f->kind == K_STORE || f->kind == K_UPDATE || f->kind == K_XCHG;
    uint64_t va = choose(f->size, write);
    unsigned reg = f->reg >= 0 ? (unsigned)f->reg : random_below(16);
    operand_random(&o, &probe, va, 0);
    uint8_t *code = next_code();
    unsigned length = emit(code, f, &o, reg, 0, 0, false);
    put_done(code + length);
    uint64_t end = probe.ip + length + 2;
    bool stack = !o.segment && (o.base == RSP || o.base == RBP);
    struct expectation want = {NO_TRAP, 0, 0};
    if (f->kind != K_NONE)
        want = expect(va, f->size, write, stack, f->alignment, f->opcode != 0xae && !(f->alignment));
    probe_run(&probe, &outcome);
    unsigned changed = 0;
    if (want.vector == NO_TRAP) {
        bool result_in_memory = write && f->kind != K_XCHG && f->opcode != 0xc1;
        if (f->reg < 0 && !result_in_memory)
            changed |= 1u << reg;
        if (f->opcode == 0xc1 && f->map == 1)
            changed |= 1u << reg;
        if (f->opcode == 0xb1 || f->opcode == 0xc7 || f->opcode == 0xf7)
            changed |= 1u << RAX | 1u << RDX;
    }
    judge(f->name, va, &want, probe.ip, end, changed);
    if (f->kind == K_NONE)
        return;
    if (want.vector == NO_TRAP && outcome.vector == USER_DONE)
        check_value(f, va, reg, &o);
    else if (!areas_intact_near(va, f->size))
        mistake(f->name, va, "memory", 1, 0);
}

static void scalars(unsigned count, const char *name)
{
    for (unsigned n = 0; n < count; n++)
        scalar();
    if (!areas_intact())
        mistake("all pages", 0, "memory", 1, 0);
    verdict(name);
}

/* ---- string instructions ---- */

/* How far the instruction gets, on the shadow; *want is the fault that stops it. */
static void string_model(uint8_t opcode, unsigned size, uint8_t repeat, uint64_t gpr[16], bool *equal, struct expectation *want)
{
    int64_t step = probe.flags & FLAG_DF ? -(int64_t)size : (int64_t)size;
    bool source = (opcode & 0xfe) == 0xa4 || (opcode & 0xfe) == 0xa6 || (opcode & 0xfe) == 0xac;
    bool destination = (opcode & 0xfe) != 0xac, writes = (opcode & 0xfe) == 0xa4 || (opcode & 0xfe) == 0xaa;
    bool compares = (opcode & 0xfe) == 0xa6 || (opcode & 0xfe) == 0xae;
    *want = (struct expectation){NO_TRAP, 0, 0};
    while (!repeat || gpr[RCX]) {
        uint64_t a = gpr[RAX], b = 0;
        if (source)
            *want = expect(gpr[RSI], size, false, false, 0, true);
        if (want->vector == NO_TRAP && destination)
            *want = expect(gpr[RDI], size, writes, false, 0, true);
        if (want->vector != NO_TRAP)
            return;
        if (source)
            a = shadow_read(gpr[RSI], size);
        if (writes)
            shadow_write(gpr[RDI], size, a);
        else if (destination)
            b = shadow_read(gpr[RDI], size);
        else
            gpr[RAX] = merged(gpr[RAX], low_bytes(a, size), size);
        if (source)
            gpr[RSI] += (uint64_t)step;
        if (destination)
            gpr[RDI] += (uint64_t)step;
        *equal = low_bytes(a, size) == low_bytes(b, size);
        if (!repeat)
            return;
        gpr[RCX]--;
        if (compares && *equal != (repeat == 0xf3))
            return;
    }
}

/* A place in or near test pages such that 300 elements either way meet nothing else that is mapped. */
static uint64_t string_place(void)
{
    uint64_t va = area_bases[random_below(AREAS)] + (1 + random_below(AREA_PAGES - 2)) * PAGE;
    return random_below(4) ? va + random_below(160) - 80 : random_below(8) ? va + random_below(PAGE) : random64();
}

static void string(void)
{
    static const uint8_t opcodes[] = {0xa4, 0xa6, 0xaa, 0xac, 0xae};
    static const char *const names[] = {"movs", "cmps", "stos", "lods", "scas"};
    begin();
    unsigned which = random_below(5), log2 = random_below(4), size = 1u << log2;
    uint8_t opcode = (uint8_t)(opcodes[which] | (log2 > 0)), repeat = (uint8_t)(random_below(4) ? 0xf3 - random_below(2) : 0);
    if (random_below(3) == 0)
        probe.flags |= FLAG_DF;
    probe.flags &= ~(reg_t)FLAG_AC | (random_below(2) ? FLAG_AC : 0);
    probe.gpr[RSI] = string_place();
    probe.gpr[RDI] = which == 0 && random_below(4) == 0 ? probe.gpr[RSI] + random_below(64) - 32 : string_place();
    probe.gpr[RCX] = random_below(300);
    if (repeat && random_below(2)) { /* ends at a page's end, almost */
        uint64_t left = PAGE - (probe.gpr[random_below(2) ? RSI : RDI] & (PAGE - 1));
        if (left < 300)
            probe.gpr[RCX] = (left + random_below(2 * size + 1)) / size - (left >= size ? random_below(2) : 0);
    } else if (repeat && random_below(3) == 0) { /* no end, and lengths in bytes that lose their upper bits */
        probe.gpr[RCX] |= log2 && random_below(4) ? 1ull << (64 - log2) : random64();
    }
    if (which == 1 || which == 4) { /* make runs that are equal */
        uint64_t from = probe.gpr[RDI];
        for (unsigned n = 0; n < 64; n++, from++)
            if (expect(from, 1, true, false, 0, false).vector == NO_TRAP && area_shadow(from)) {
                uint8_t byte = (uint8_t)(which == 4 || !area_shadow(probe.gpr[RSI] + n) ? probe.gpr[RAX] >> 8 * (n % size) : *area_shadow(probe.gpr[RSI] + n));
                *area_shadow(from) = byte;
                *(uint8_t *)page_physical(from) = byte;
            }
    }
    uint8_t *code = next_code();
    unsigned at = 0;
    if (log2 == 1)
        code[at++] = 0x66;
    if (repeat)
        code[at++] = repeat;
    if (log2 == 3)
        code[at++] = 0x48;
    code[at++] = opcode;
    put_done(code + at);
    uint64_t gpr[16];
    bool equal = false;
    struct expectation want;
    memcpy(gpr, probe.gpr, sizeof gpr);
    struct probe before = probe;
    string_model(opcode, size, repeat, gpr, &equal, &want);
    bool bad_both = which == 1 && want.vector != NO_TRAP && expect(gpr[RSI], size, false, false, 0, true).vector != NO_TRAP &&
                    expect(gpr[RDI], size, false, false, 0, true).vector != NO_TRAP; /* whose fault comes is the processor's affair */
    if (bad_both)
        return;
    probe_run(&probe, &outcome);
    memcpy(probe.gpr, gpr, sizeof gpr); /* what must be in them now */
    bool compared = memcmp(gpr, before.gpr, sizeof gpr) && (which == 1 || which == 4);
    /* A fault puts the flags back to what they were when the instruction was begun (SDM vol. 2B, REP), which an interrupt may have made it be in the middle. */
    if (compared && want.vector == NO_TRAP && ((outcome.flags & FLAG_ZF) != 0) != equal)
        mistake(names[which], before.gpr[RDI], "ZF", outcome.flags, equal);
    if (compared)
        probe.flags = outcome.flags & ~(reg_t)FLAG_RF;
    judge(names[which], before.gpr[which == 3 ? RSI : RDI], &want, before.ip, before.ip + at + 2, 0);
    if (!areas_intact_near(gpr[RDI], size) || !areas_intact_near(before.gpr[RDI], size))
        mistake(names[which], before.gpr[RDI], "memory", 1, 0);
}

static void strings(void)
{
    for (unsigned n = 0; n < STRINGS; n++)
        string();
    if (!areas_intact())
        mistake("all pages", 0, "memory", 1, 0);
    verdict("string instructions stop exactly where the fault is");
}

/* ---- the stack ---- */

static const struct stack_case {
    const char *name;
    uint8_t bytes[8], length;
    uint8_t size;
    int8_t change;  /* of RSP; negative: writes there */
    uint8_t target; /* register that a pop changes, or 0xff */
} stack_cases[] = {
    {"push rax", {0x50}, 1, 8, -8, 0xff},
    {"push r11", {0x41, 0x53}, 2, 8, -8, 0xff},
    {"push ax", {0x66, 0x50}, 2, 2, -2, 0xff},
    {"push imm32", {0x68, 1, 2, 3, 0x84}, 5, 8, -8, 0xff},
    {"push imm8", {0x6a, 0x85}, 2, 8, -8, 0xff},
    {"push rsp", {0x54}, 1, 8, -8, 0xff},
    {"pop rcx", {0x59}, 1, 8, 8, RCX},
    {"pop r10", {0x41, 0x5a}, 2, 8, 8, R10},
    {"pop dx", {0x66, 0x5a}, 2, 2, 2, RDX},
    {"call rel32", {0xe8, 0, 0, 0, 0}, 5, 8, -8, 0xff},
    {"call rax", {0xff, 0xd0}, 2, 8, -8, 0xff},
    {"pushf", {0x9c}, 1, 8, -8, 0xff},
    {"enter 16, 0", {0xc8, 16, 0, 0}, 4, 8, 0, 0xff},
    {"leave", {0xc9}, 1, 8, 0, 0xff},
};

static uint64_t pushed(const struct stack_case *c)
{
    switch (c->bytes[0]) {
    case 0x68:
        return 0xffffffff84030201;
    case 0x6a:
        return 0xffffffffffffff85;
    case 0x41:
        return probe.gpr[R11];
    case 0x54:
        return probe.gpr[RSP];
    case 0xe8:
    case 0xff:
        return probe.ip + c->length;
    case 0x9c:
        return probe.flags;
    case 0xc8:
        return probe.gpr[RBP];
    default:
        return probe.gpr[RAX];
    }
}

static void stack(void)
{
    const struct stack_case *c = &stack_cases[random_below(sizeof stack_cases / sizeof *stack_cases)];
    bool enter = c->bytes[0] == 0xc8, leave = c->bytes[0] == 0xc9, push = c->change < 0 || enter;
    begin();
    uint64_t va = choose(c->size, true);
    if (expect(va, c->size, false, false, 0, false).vector == NO_TRAP && !harmless(va, c->size))
        return;
    uint8_t *code = next_code();
    memcpy(code, c->bytes, c->length);
    put_done(code + c->length);
    probe.gpr[RSP] = push ? va + c->size : va;
    if (leave)
        probe.gpr[RBP] = va;
    if (c->bytes[0] == 0xff)
        probe.gpr[RAX] = probe.ip + c->length;
    struct expectation want = expect(va, c->size, push, true, 0, true);
    if (enter && want.vector == NO_TRAP)
        want = expect(va - 16, 8, true, true, 0, true);
    struct probe before = probe;
    probe_run(&probe, &outcome);
    if (want.vector == NO_TRAP) {
        uint64_t read = push ? 0 : shadow_read(va, c->size);
        if (push)
            shadow_write(va, c->size, pushed(c));
        if (leave) {
            probe.gpr[RBP] = read;
            probe.gpr[RSP] = va + 8;
        } else if (enter) {
            probe.gpr[RBP] = va;
            probe.gpr[RSP] = va - 16;
        } else {
            probe.gpr[RSP] += (uint64_t)(int64_t)c->change;
            if (c->target != 0xff)
                probe.gpr[c->target] = merged(probe.gpr[c->target], read, c->size);
        }
    }
    judge(c->name, va, &want, before.ip, before.ip + c->length + 2, 0);
    if (enter && want.vector != NO_TRAP)
        area_learn(va, 8); /* ENTER may have written what it pushes before it fails */
    if (!areas_intact_near(va, c->size))
        mistake(c->name, va, "memory", 1, 0);
}

static void stacks(void)
{
    for (unsigned n = 0; n < STACKS; n++)
        stack();
    if (!areas_intact())
        mistake("all pages", 0, "memory", 1, 0);
    verdict("stack instructions with RSP anywhere");
}

/* PUSH and POP of memory: two accesses, in that order. */
static void stack_memory(void)
{
    static const struct form push_form = {"push m", LEGACY, 0, 0, 0xff, 6, 0, 0, 0, 8, 0, 0}, pop_form = {"pop m", LEGACY, 0, 0, 0x8f, 0, 0, 0, 0, 8, 0, 0};
    for (unsigned n = 0; n < STACKS / 2; n++) {
        begin();
        bool push = random_below(2);
        uint64_t at = choose(8, true), va = choose(8, true);
        if ((at - va + 16) < 32 || (!harmless(va, 8) && expect(va, 8, false, false, 0, false).vector == NO_TRAP) ||
            (!harmless(at, 8) && expect(at, 8, false, false, 0, false).vector == NO_TRAP))
            continue;
        struct operand o;
        operand_random(&o, &probe, va, 1u << RSP);
        if (o.base == RSP || o.index == RSP)
            continue;
        probe.gpr[RSP] = push ? at + 8 : at;
        bool ss = !o.segment && o.base == RBP;
        const struct form *f = push ? &push_form : &pop_form;
        uint8_t *code = next_code();
        unsigned length = emit(code, f, &o, (unsigned)f->reg, 0, 0, false);
        put_done(code + length);
        struct expectation first = push ? expect(va, 8, false, ss, 0, true) : expect(at, 8, false, true, 0, true);
        struct expectation second = push ? expect(at, 8, true, true, 0, true) : expect(va, 8, true, ss, 0, true);
        struct expectation want = first.vector != NO_TRAP ? first : second;
        struct probe before = probe;
        probe_run(&probe, &outcome);
        if (want.vector == NO_TRAP) {
            shadow_write(push ? at : va, 8, shadow_read(push ? va : at, 8));
            probe.gpr[RSP] += push ? -8ull : 8;
        }
        judge(f->name, va, &want, before.ip, before.ip + length + 2, 0);
        if (!areas_intact_near(va, 8) || !areas_intact_near(at, 8))
            mistake(f->name, va, "memory", 1, 0);
    }
    verdict("PUSH and POP of memory");
}

/* ---- jumps ---- */

static uint64_t jump_target(void)
{
    unsigned view = random_below(CODE_VIEWS);
    switch (random_below(4)) {
    case 0: /* code, by an address that agrees in some of its bits */
        return (code_va(random_below(2), view) + random_below(CODE_BYTES)) ^ 1ull << (12 + random_below(52));
    case 1:
        return code_va(random_below(2), view) + random_below(CODE_BYTES) + (random64() << 39);
    default:
        return wild_address(1);
    }
}

static void jump(void)
{
    static const char *const names[] = {"jmp r", "jmp r11", "jmp m", "call r", "call m", "ret", "ret n"};
    static const struct {
        uint8_t bytes[8], length;
    } codes[] = {{{0xff, 0xe0}, 2}, {{0x41, 0xff, 0xe3}, 3}, {{0xff, 0x23}, 2}, {{0xff, 0xd0}, 2}, {{0xff, 0x13}, 2}, {{0xc3}, 1}, {{0xc2, 16, 0}, 3}};
    unsigned which = random_below(7);
    uint64_t cell = area_bases[2] + 2 * PAGE + 2048, old = shadow_read(cell, 8), old_below = shadow_read(cell - 8, 8);
    begin();
    probe.flags |= FLAG_AC; /* for SMAP */
    uint64_t target = jump_target();
    struct access fetch = {.va = target, .size = 1, .fetch = true, .user = probe.user};
    struct expectation want = access_expect(&fetch);
    if (want.vector == NO_TRAP || want.vector == SS)
        return; /* there is something there */
    uint8_t *code = next_code();
    memcpy(code, codes[which].bytes, codes[which].length);
    probe.gpr[RAX] = probe.gpr[R11] = target;
    probe.gpr[RBX] = cell;
    bool by_memory = which == 2 || which >= 4, call = which == 3 || which == 4, ret = which >= 5;
    if (by_memory) {
        shadow_write(cell, 8, target);
        *(uint64_t *)page_physical(cell) = target;
    }
    if (call || ret)
        probe.gpr[RSP] = cell;
    struct probe before = probe;
    probe_run(&probe, &outcome);
    if (want.vector == PF) {
        probe.gpr[RSP] += call ? -8ull : which == 5 ? 8 : which == 6 ? 24 : 0;
        if (call)
            shadow_write(cell - 8, 8, before.ip + codes[which].length);
    }
    if (call && want.vector == GP)
        area_learn(cell - 8, 8); /* some processors have written it */
    judge(names[which], target, &want, want.vector == PF ? target : before.ip, 0, 0);
    if (!areas_intact_near(cell, 8))
        mistake(names[which], target, "memory", 1, 0);
    shadow_write(cell, 8, old);
    shadow_write(cell - 8, 8, old_below);
    *(uint64_t *)page_physical(cell) = old;
    *(uint64_t *)page_physical(cell - 8) = old_below;
}

static void jumps(const char *name)
{
    for (unsigned n = 0; n < JUMPS; n++)
        jump();
    verdict(name);
}

/* Code that has run at its right address, then by way of addresses that differ in one of the bits above, or in two. */
static void top_bits(void)
{
    static const struct {
        const char *name;
        uint8_t bytes[3], length;
    } ways[] = {{"jmp rax", {0xff, 0xe0}, 2}, {"jmp r11", {0x41, 0xff, 0xe3}, 3}, {"call rax", {0xff, 0xd0}, 2}, {"ret", {0xc3}, 1}, {"jmp m", {0xff, 0x23}, 2}};
    static const uint64_t views[2][2] = {{0x0000000059000000, 0xffffffffa1230000}, {0x000000005a000000, 0x00005a0000001000}};
    static const uint8_t there[] = {0x90, 0x0f, 0x1f, 0x40, 0x11, 0xcd, USER_DONE};
    uint64_t cell = area_bases[2] + 2 * PAGE + 2048;
    uint64_t keep[2] = {shadow_read(cell - 8, 8), shadow_read(cell, 8)};
    uint8_t *page = pages_allocate(1); /* written once, so that its code lasts */
    for (unsigned n = 0; n < 5; n++)
        memcpy(page + n * 16, ways[n].bytes, ways[n].length);
    for (unsigned n = 0; n < 3; n++)
        memcpy(page + PAGE - 128 + n * 16, there, sizeof there);
    for (unsigned n = 0; n < 4; n++)
        page_map(views[n / 2][n % 2], (uintptr_t)page | PG_P | (n / 2 ? PG_U : 0));
    for (unsigned n = 0; n < 30 * 64; n++) {
        begin();
        probe.flags &= ~(reg_t)(FLAG_IF | FLAG_AC);
        unsigned way = n % 5, bit = 39 + n / 5 % 25;
        uint64_t base = views[probe.user][random_below(2)], right = base + PAGE - 128 + n % 3 * 16;
        uint64_t wrong = right ^ 1ull << bit ^ (random_below(2) ? 1ull << (39 + random_below(25)) : 0);
        struct access fetch = {.va = wrong, .size = 1, .fetch = true, .user = probe.user};
        struct expectation want = access_expect(&fetch);
        if (want.vector == NO_TRAP)
            continue;
        for (unsigned again = 0; again < 3; again++) { /* twice where it belongs */
            uint64_t target = again < 2 ? right : wrong;
            probe.ip = base + way * 16;
            probe.gpr[RAX] = probe.gpr[R11] = target;
            probe.gpr[RBX] = probe.gpr[RSP] = cell;
            shadow_write(cell, 8, target);
            *(uint64_t *)page_physical(cell) = target;
            probe_run(&probe, &outcome);
        }
        uint64_t ip = probe.ip;
        if (want.vector == PF)
            probe.gpr[RSP] += way == 2 ? -8ull : way == 3 ? 8 : 0;
        area_learn(cell - 8, 8);
        judge(ways[way].name, wrong, &want, want.vector == PF ? wrong : ip, 0, 0);
    }
    for (unsigned k = 0; k < 2; k++) {
        shadow_write(cell - 8 + 8 * k, 8, keep[k]);
        *(uint64_t *)page_physical(cell - 8 + 8 * k) = keep[k];
    }
    verdict("code by addresses with other bits on top");
}

/* IRET and far RET to the same privilege, their frames in a test page. */
static void far_returns(void)
{
    uint64_t cell = area_bases[2] + 2 * PAGE + 2048;
    uint8_t keep[40];
    memcpy(keep, (void *)page_physical(cell), sizeof keep);
    for (unsigned n = 0; n < JUMPS / 4; n++) {
        begin();
        probe.flags &= ~(reg_t)FLAG_AC;
        bool iret = n & 1;
        uint64_t target = jump_target(), sp = random64(), frame[5] = {target, probe.user ? UCODE : KCODE, probe.flags, sp, probe.user ? UDATA : KDATA};
        struct access fetch = {.va = target, .size = 1, .fetch = true, .user = probe.user};
        struct expectation want = access_expect(&fetch);
        if (want.vector == NO_TRAP)
            continue;
        static const uint8_t codes[2][2] = {{0x48, 0xcb}, {0x48, 0xcf}};
        memcpy((void *)page_physical(cell), frame, sizeof frame);
        memcpy(area_shadow(cell), frame, sizeof frame);
        memcpy(next_code(), codes[iret], 2);
        probe.gpr[RSP] = cell;
        uint64_t ip = probe.ip;
        probe_run(&probe, &outcome);
        if (want.vector == PF)
            probe.gpr[RSP] = iret ? sp : cell + 16;
        judge(iret ? "iretq" : "lretq", target, &want, want.vector == PF ? target : ip, 0, 0);
        if (!areas_intact_near(cell, 40))
            mistake("far return", target, "memory", 1, 0);
    }
    memcpy((void *)page_physical(cell), keep, sizeof keep);
    memcpy(area_shadow(cell), keep, sizeof keep);
    verdict("IRET and far RET to wild addresses");
}

/* Every canonical address that agrees with a test page, or with code, in the bits below 41, and below 39. */
static void multiples(void)
{
    static const struct form load = {"mov r64, [rbx]", LEGACY, 0, 0, 0x8b, RAX, 1, 0, 0, 8, 0, 0}, save = {"mov [rbx], r64", LEGACY, 0, 0, 0x89, RAX, 1, 0, 0, 8, 0, 0};
    static const struct operand operand = {.base = RBX, .index = NONE};
    for (unsigned n = 0; n < 3 * 512; n++) {
        unsigned shift = n % 3 == 0 ? 39 : 41, k = n / 3 & ((1u << (48 - shift)) - 1);
        bool jump = n % 3 == 0;
        begin();
        uint64_t page = jump ? code_va(probe.user, n / 7 % CODE_VIEWS) : area_bases[n / 5 % AREAS] + 2 * PAGE + random_below(PAGE);
        uint64_t va = (page & ((1ull << shift) - 1)) | (uint64_t)k << shift;
        va = (uint64_t)((int64_t)(va << 16) >> 16);
        struct access access = {.va = va, .size = jump ? 1 : 8, .fetch = jump, .write = n % 3 == 1, .user = probe.user};
        struct expectation want = access_expect(&access);
        if (want.vector == NO_TRAP)
            continue;
        uint8_t *code = next_code();
        probe.gpr[RBX] = va;
        if (jump)
            code[0] = 0xff, code[1] = 0xe3;
        else
            emit(code, n % 3 == 1 ? &save : &load, &operand, RAX, 0, 0, false);
        probe_run(&probe, &outcome);
        judge(jump ? "jmp rbx" : "mov", va, &want, jump && want.vector == PF ? va : probe.ip, 0, 0);
    }
    verdict("all addresses that agree with a page in their lower bits");
}

/* An instruction whose bytes go on in a page that may not be executed. */
static void fetches(void)
{
    static const uint8_t instruction[] = {0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8}; /* mov rax, imm64 */
    uint8_t *pages = pages_allocate(2);
    for (unsigned n = 0; n < FETCHES; n++) {
        begin();
        uint64_t va = (n & 1 ? 0x700000000000 : 0xffffa00000000000) + n % 7 * 0x200000;
        static const uint64_t rights[] = {0, PG_P | PG_U | PG_NX, PG_P, PG_P | PG_U, PG_U | PG_W};
        uint64_t first = PG_P | (probe.user ? PG_U : 0), second = rights[random_below(5)];
        page_map(va, (uintptr_t)pages | first);
        page_map(va + PAGE, ((uintptr_t)pages + PAGE) | second);
        unsigned inside = random_below(sizeof instruction + 1); /* bytes in the first page */
        uint8_t *at = pages + PAGE - inside;
        memset(pages + PAGE - 16, 0x90, 16);
        memcpy(at, instruction, sizeof instruction);
        put_done(at + sizeof instruction);
        probe.ip = va + PAGE - inside - (inside < 8 ? 3 : 0); /* some no-operations before it */
        struct access fetch = {.va = va + PAGE, .size = 1, .fetch = true, .user = probe.user};
        struct expectation want = access_expect(&fetch);
        uint64_t start = va + PAGE - inside;
        struct probe before = probe;
        if (inside == sizeof instruction || want.vector == NO_TRAP)
            probe.gpr[RAX] = 0x0807060504030201;
        uint64_t ip = inside == sizeof instruction ? va + PAGE : start, gpr = probe.gpr[RAX];
        probe.gpr[RAX] = before.gpr[RAX];
        probe_run(&probe, &outcome);
        probe.gpr[RAX] = gpr;
        judge("fetch", va, &want, ip, start + sizeof instruction + 2, 0);
        page_map(va, 0);
        page_map(va + PAGE, 0);
    }
    verdict("instructions that go on in a page without rights");
}

/* Straight on across the end of the lower half. Without the timer: an interrupt may come before the last fetch, and cannot return. */
static void code_at_the_edge(void)
{
    uint64_t va = 0x7ffffffff000, keep = *page_entry(boot_pml4, va);
    uint8_t *page = pages_allocate(1);
    memset(page, 0x90, PAGE);
    page_map(va, (uintptr_t)page | PG_P | PG_U);
    begin();
    probe.user = true;
    probe.ip = va + PAGE - 20;
    probe_run(&probe, &outcome);
    struct expectation want = {GP, 0, 0};
    judge("straight on", va, &want, 0x800000000000, 0, 0);
    static const uint8_t ahead[] = {0xeb, 0x10}; /* jmp +16 */
    memcpy(page + PAGE - 2, ahead, 2);
    probe.ip = va + PAGE - 2;
    probe_run(&probe, &outcome);
    judge("jump ahead", va, &want, probe.ip, 0, 0);
    page[PAGE - 2] = 0x48; /* goes on beyond */
    page[PAGE - 1] = 0xb8;
    probe_run(&probe, &outcome);
    judge("instruction across", va, &want, probe.ip, 0, 0);
    page_map(va, keep);
    verdict("code at the end of the lower half");
}

/* ---- all pages that a table indexed by some bits of the address may confuse, mapped at once ---- */

static void aliases(void)
{
    static const uint64_t start = 0x123456000;
    uint64_t vas[64];
    uint8_t *pages = pages_allocate(64);
    unsigned count = 0, good = 0, ran = 0;
    for (unsigned bit = 12; bit < 47; bit++)
        vas[count++] = start ^ 1ull << bit;
    for (unsigned n = 3; n < 24; n += 2) {
        vas[count++] = start + n * (1ull << 41);
        vas[count++] = start + n * (1ull << 39);
    }
    for (unsigned n = 0; n < count; n++) {
        uint8_t *p = pages + n * PAGE;
        static const uint8_t function[] = {0xb8, 0, 0, 0, 0, 0xc3}; /* mov eax, n; ret */
        memcpy(p, function, sizeof function);
        p[1] = (uint8_t)n;
        *(uint64_t *)(p + 256) = n;
        page_map(vas[n], (uintptr_t)p | PG_P | PG_W);
    }
    for (unsigned n = 0; n < 20000; n++) {
        unsigned k = random_below(count);
        volatile uint64_t *word = (volatile uint64_t *)(vas[k] + 256);
        good += *word % 64 == k;
        *word += 64;
        if (n % 4 == 0) {
            unsigned value;
            asm_volatile("call *%1" : "=a"(value) : "r"(vas[k]) : "memory");
            good += value == k;
            ran++;
        }
    }
    expect_eq(good, 20000 + ran, "57 pages whose addresses differ in one bit or by multiples of 2^39 and 2^41");
    for (unsigned n = 0; n < count; n++)
        page_map(vas[n], 0);
    unsigned gone = 0;
    for (unsigned n = 0; n < count; n++)
        gone += TRY((void)*(volatile uint64_t *)(vas[n] + 256)) == PF && trap.cr2 == vas[n] + 256;
    expect_eq(gone, count, "and each is gone after its INVLPG");
}

void test_main(void)
{
    random_seed();
    identity_map_restrict();
    areas_create();
    code_va(false, 0);
    aliases();
    probe_begin();
    timer_begin();
    scalars(SCALARS, "wild accesses");
    strings();
    stacks();
    stack_memory();
    jumps("wild jumps");
    top_bits();
    far_returns();
    multiples();
    fetches();
    timer_end();
    code_at_the_edge();
    timer_begin();
    reg_t cr4 = read_cr4();
    struct cpuid features = cpuid(7, 0);
    write_cr4(cr4 | (features.b & 1u << 7 ? CR4_SMEP : 0) | (features.b & 1u << 20 ? CR4_SMAP : 0));
    scalars(SCALARS / 3, "wild accesses with SMAP");
    stacks();
    jumps("wild jumps with SMEP");
    write_cr0(read_cr0() | CR0_AM);
    scalars(SCALARS / 3, "wild accesses with SMAP and alignment checks");
    strings();
    stacks();
    write_cr0((read_cr0() & ~CR0_AM) & ~CR0_WP);
    write_cr4(cr4);
    scalars(SCALARS / 4, "wild accesses without CR0.WP");
    timer_end();
    check(timer_interrupts > 20, "interrupts came with RSP anywhere (%u)", timer_interrupts);
    probe_end();
}
