/*
 * Vector and x87 operands at wild addresses: SSE, AVX and AVX-512 loads, stores and arithmetic of 1 to 64 bytes across page boundaries, masked ones whose disabled
 * elements lie in pages that are not there, gathers and scatters, MASKMOVDQU, the FXSAVE and XSAVE families. Exact faults; all vector registers compared.
 * SDM vol. 1, 15.6.4 and 13; vol. 2, each instruction; what is left to processors (see README.md) is accepted either way.
 */
#include "runtime/areas.h"

#define PLAIN 10000u
#define MASKED 6000u
#define GATHERS 1500u
#define SAVES 1500u

enum kind { V_LOAD, V_MERGE, V_READ, V_STORE, V_UPDATE, V_GPR, V_X87 }; /* V_MERGE: a load that keeps the rest of the register */

#define L LEGACY
#define S66 0x66
#define SF2 0xf2
#define SF3 0xf3
static const struct form forms[] = {
    {"movups x, m", L, 0, 1, 0x10, -1, 0, 0, 0, 16, V_MERGE, 0},
    {"movaps x, m", L, 0, 1, 0x28, -1, 0, 0, 0, 16, V_MERGE, 16},
    {"movdqu x, m", L, SF3, 1, 0x6f, -1, 0, 0, 0, 16, V_MERGE, 0},
    {"movdqa x, m", L, S66, 1, 0x6f, -1, 0, 0, 0, 16, V_MERGE, 16},
    {"lddqu x, m", L, SF2, 1, 0xf0, -1, 0, 0, 0, 16, V_MERGE, 0},
    {"movntdqa x, m", L, S66, 2, 0x2a, -1, 0, 0, 0, 16, V_MERGE, 16},
    {"movss x, m", L, SF3, 1, 0x10, -1, 0, 0, 0, 4, V_READ, 0},
    {"movsd x, m", L, SF2, 1, 0x10, -1, 0, 0, 0, 8, V_READ, 0},
    {"movq x, m", L, SF3, 1, 0x7e, -1, 0, 0, 0, 8, V_READ, 0},
    {"movd x, m32", L, S66, 1, 0x6e, -1, 0, 0, 0, 4, V_READ, 0},
    {"movlps x, m", L, 0, 1, 0x12, -1, 0, 0, 0, 8, V_MERGE, 0},
    {"movhps x, m", L, 0, 1, 0x16, -1, 0, 0, 0, 8, V_READ, 0},
    {"paddd x, m", L, S66, 1, 0xfe, -1, 0, 0, 0, 16, V_READ, 16},
    {"pshufd x, m", L, S66, 1, 0x70, -1, 0, 0, 1, 16, V_READ, 16},
    {"pshufb x, m", L, S66, 2, 0x00, -1, 0, 0, 0, 16, V_READ, 16},
    {"pinsrw x, m", L, S66, 1, 0xc4, -1, 0, 0, 1, 2, V_READ, 0},
    {"pmovzxbw x, m", L, S66, 2, 0x30, -1, 0, 0, 0, 8, V_READ, 0},
    {"pmovsxbq x, m", L, S66, 2, 0x22, -1, 0, 0, 0, 2, V_READ, 0},
    {"insertps x, m", L, S66, 3, 0x21, -1, 0, 0, 1, 4, V_READ, 0},
    {"ucomisd x, m", L, S66, 1, 0x2e, -1, 0, 0, 0, 8, V_READ, 0},
    {"movups m, x", L, 0, 1, 0x11, -1, 0, 0, 0, 16, V_STORE, 0},
    {"movaps m, x", L, 0, 1, 0x29, -1, 0, 0, 0, 16, V_STORE, 16},
    {"movdqu m, x", L, SF3, 1, 0x7f, -1, 0, 0, 0, 16, V_STORE, 0},
    {"movntps m, x", L, 0, 1, 0x2b, -1, 0, 0, 0, 16, V_STORE, 16},
    {"movntdq m, x", L, S66, 1, 0xe7, -1, 0, 0, 0, 16, V_STORE, 16},
    {"movss m, x", L, SF3, 1, 0x11, -1, 0, 0, 0, 4, V_STORE, 0},
    {"movsd m, x", L, SF2, 1, 0x11, -1, 0, 0, 0, 8, V_STORE, 0},
    {"movq m, x", L, S66, 1, 0xd6, -1, 0, 0, 0, 8, V_STORE, 0},
    {"movd m, x", L, S66, 1, 0x7e, -1, 0, 0, 0, 4, V_STORE, 0},
    {"movlps m, x", L, 0, 1, 0x13, -1, 0, 0, 0, 8, V_STORE, 0},
    {"movhps m, x", L, 0, 1, 0x17, -1, 0, 0, 0, 8, V_UPDATE, 0},
    {"pextrb m, x", L, S66, 3, 0x14, -1, 0, 0, 1, 1, V_UPDATE, 0},
    {"pextrw m, x", L, S66, 3, 0x15, -1, 0, 0, 1, 2, V_UPDATE, 0},
    {"stmxcsr", L, 0, 1, 0xae, 3, 0, 0, 0, 4, V_UPDATE, 0},
    {"cvttsd2si r, m", L, SF2, 1, 0x2c, -1, 1, 0, 0, 8, V_GPR, 0},
    {"fld m32", L, 0, 0, 0xd9, 0, 0, 0, 0, 4, V_X87, 0},
    {"fld m64", L, 0, 0, 0xdd, 0, 0, 0, 0, 8, V_X87, 0},
    {"fld m80", L, 0, 0, 0xdb, 5, 0, 0, 0, 10, V_X87, 0},
    {"fild m64", L, 0, 0, 0xdf, 5, 0, 0, 0, 8, V_X87, 0},
    {"fstp m80", L, 0, 0, 0xdb, 7, 0, 0, 0, 10, V_X87, 0},
    {"fst m64", L, 0, 0, 0xdd, 2, 0, 0, 0, 8, V_X87, 0},
    {"fnstcw", L, 0, 0, 0xd9, 7, 0, 0, 0, 2, V_X87, 0},
    {"vmovups x, m", VEX, 0, 1, 0x10, -1, 0, 0, 0, 16, V_LOAD, 0},
    {"vmovups y, m", VEX, 0, 1, 0x10, -1, 0, 1, 0, 32, V_LOAD, 0},
    {"vmovaps y, m", VEX, 0, 1, 0x28, -1, 0, 1, 0, 32, V_LOAD, 32},
    {"vmovdqu y, m", VEX, SF3, 1, 0x6f, -1, 0, 1, 0, 32, V_LOAD, 0},
    {"vlddqu y, m", VEX, SF2, 1, 0xf0, -1, 0, 1, 0, 32, V_LOAD, 0},
    {"vmovss x, m", VEX, SF3, 1, 0x10, -1, 0, 0, 0, 4, V_LOAD, 0},
    {"vmovsd x, m", VEX, SF2, 1, 0x10, -1, 0, 0, 0, 8, V_LOAD, 0},
    {"vbroadcastss y, m", VEX, S66, 2, 0x18, -1, 0, 1, 0, 4, V_READ, 0},
    {"vbroadcastf128 y, m", VEX, S66, 2, 0x1a, -1, 0, 1, 0, 16, V_READ, 0},
    {"vmovups m, y", VEX, 0, 1, 0x11, -1, 0, 1, 0, 32, V_STORE, 0},
    {"vmovaps m, y", VEX, 0, 1, 0x29, -1, 0, 1, 0, 32, V_STORE, 32},
    {"vmovdqu m, x", VEX, SF3, 1, 0x7f, -1, 0, 0, 0, 16, V_STORE, 0},
    {"vmovntdq m, y", VEX, S66, 1, 0xe7, -1, 0, 1, 0, 32, V_STORE, 32},
    {"vextractf128 m, y", VEX, S66, 3, 0x19, -1, 0, 1, 1, 16, V_STORE, 0},
    {"vmovdqu8 z, m", EVEX, SF2, 1, 0x6f, -1, 0, 2, 0, 64, V_LOAD, 0},
    {"vmovdqu16 y, m", EVEX, SF2, 1, 0x6f, -1, 1, 1, 0, 32, V_LOAD, 0},
    {"vmovups z, m", EVEX, 0, 1, 0x10, -1, 0, 2, 0, 64, V_LOAD, 0},
    {"vmovaps z, m", EVEX, 0, 1, 0x28, -1, 0, 2, 0, 64, V_LOAD, 64},
    {"vmovdqa64 y, m", EVEX, S66, 1, 0x6f, -1, 1, 1, 0, 32, V_LOAD, 32},
    {"vmovdqu64 x, m", EVEX, SF3, 1, 0x6f, -1, 1, 0, 0, 16, V_LOAD, 0},
    {"vbroadcasti64x4 z, m", EVEX, S66, 2, 0x5b, -1, 1, 2, 0, 32, V_READ, 0},
    {"vpbroadcastq z, m", EVEX, S66, 2, 0x59, -1, 1, 2, 0, 8, V_READ, 0},
    {"vpmovzxbd z, m", EVEX, S66, 2, 0x31, -1, 0, 2, 0, 16, V_READ, 0},
    {"vmovups m, z", EVEX, 0, 1, 0x11, -1, 0, 2, 0, 64, V_STORE, 0},
    {"vmovdqa32 m, z", EVEX, S66, 1, 0x7f, -1, 0, 2, 0, 64, V_STORE, 64},
    {"vmovdqu8 m, y", EVEX, SF2, 1, 0x7f, -1, 0, 1, 0, 32, V_STORE, 0},
    {"vmovntps m, z", EVEX, 0, 1, 0x2b, -1, 0, 2, 0, 64, V_STORE, 64},
    {"vpmovdb m, z", EVEX, SF3, 2, 0x31, -1, 0, 2, 0, 16, V_UPDATE, 0},
    {"vpaddd y, y, m", VEX, S66, 1, 0xfe, -1, 0, 1, 0, 32, V_READ, 0},
    {"vaddps x, x, m", VEX, 0, 1, 0x58, -1, 0, 0, 0, 16, V_READ, 0},
    {"vpshufb y, y, m", VEX, S66, 2, 0x00, -1, 0, 1, 0, 32, V_READ, 0},
    {"vinsertf128 y, y, m", VEX, S66, 3, 0x18, -1, 0, 1, 1, 16, V_READ, 0},
    {"vpaddd z, z, m", EVEX, S66, 1, 0xfe, -1, 0, 2, 0, 64, V_READ, 0},
    {"vpermd z, z, m", EVEX, S66, 2, 0x36, -1, 0, 2, 0, 64, V_READ, 0},
};
/* Kind: bytes of an element. Loads and stores under an opmask. */
static const struct form opmask_forms[] = {
    {"vmovdqu8 z{k}, m", EVEX, SF2, 1, 0x6f, -1, 0, 2, 0, 64, 1, 0},
    {"vmovdqu16 z{k}, m", EVEX, SF2, 1, 0x6f, -1, 1, 2, 0, 64, 2, 0},
    {"vmovdqu32 y{k}, m", EVEX, SF3, 1, 0x6f, -1, 0, 1, 0, 32, 4, 0},
    {"vmovups z{k}, m", EVEX, 0, 1, 0x10, -1, 0, 2, 0, 64, 4, 0},
    {"vmovupd x{k}, m", EVEX, S66, 1, 0x10, -1, 1, 0, 0, 16, 8, 0},
    {"vmovdqa64 z{k}, m", EVEX, S66, 1, 0x6f, -1, 1, 2, 0, 64, 8, 64},
    {"vmovdqu8 m{k}, z", EVEX, SF2, 1, 0x7f, -1, 0, 2, 0, 64, 1, 0},
    {"vmovdqu16 m{k}, y", EVEX, SF2, 1, 0x7f, -1, 1, 1, 0, 32, 2, 0},
    {"vmovups m{k}, z", EVEX, 0, 1, 0x11, -1, 0, 2, 0, 64, 4, 0},
    {"vmovdqu64 m{k}, z", EVEX, SF3, 1, 0x7f, -1, 1, 2, 0, 64, 8, 0},
    {"vmovaps m{k}, y", EVEX, 0, 1, 0x29, -1, 0, 1, 0, 32, 4, 32},
};
/* The same under the signs of a vector register: VMASKMOVPS and so on. */
static const struct form sign_forms[] = {
    {"vmaskmovps y, y, m", VEX, S66, 2, 0x2c, -1, 0, 1, 0, 32, 4, 0},
    {"vmaskmovpd x, x, m", VEX, S66, 2, 0x2d, -1, 0, 0, 0, 16, 8, 0},
    {"vpmaskmovd x, x, m", VEX, S66, 2, 0x8c, -1, 0, 0, 0, 16, 4, 0},
    {"vpmaskmovq y, y, m", VEX, S66, 2, 0x8c, -1, 1, 1, 0, 32, 8, 0},
    {"vmaskmovps m, y, y", VEX, S66, 2, 0x2e, -1, 0, 1, 0, 32, 4, 0},
    {"vpmaskmovq m, y, y", VEX, S66, 2, 0x8e, -1, 1, 1, 0, 32, 8, 0},
};
/* Kind: bytes of an element; size: of an index. 32-bit elements with 32-bit indices, 64 with 64, and mixed. Register and index of the same length here. */
static const struct form gather_forms[] = {
    {"vpgatherdd y", VEX, S66, 2, 0x90, -1, 0, 1, 0, 4, 4, 0},
    {"vgatherqpd y", VEX, S66, 2, 0x93, -1, 1, 1, 0, 8, 8, 0},
    {"vpgatherdd z{k}", EVEX, S66, 2, 0x90, -1, 0, 2, 0, 4, 4, 0},
    {"vpgatherqq z{k}", EVEX, S66, 2, 0x91, -1, 1, 2, 0, 8, 8, 0},
    {"vscatterdps z{k}", EVEX, S66, 2, 0xa2, -1, 0, 2, 0, 4, 4, 0},
    {"vpscatterqq z{k}", EVEX, S66, 2, 0xa1, -1, 1, 2, 0, 8, 8, 0},
};
#undef L
#define COUNT(table) (sizeof(table) / sizeof *(table))

static struct probe probe;
static struct outcome outcome;
static unsigned mistakes, faults[32], done_count;
static uint8_t wanted[SIMD_BYTES] __attribute__((aligned(64))); /* vector state */
static unsigned max_encoding;

static void mistake(const char *name, uint64_t va, const char *what, uint64_t have, uint64_t want)
{
    if (mistakes++ < 12)
        print("# %s at %llx, %s, flags %lx: %s %llx instead of %llx\n", name, (unsigned long long)va, probe.user ? "ring 3" : "ring 0", probe.flags, what,
              (unsigned long long)have, (unsigned long long)want);
}

static void verdict(const char *name)
{
    if (!areas_intact())
        mistake("all pages", 0, "memory", 1, 0);
    check(mistakes == 0, "%s (%u wrong; done %u, #PF %u, #GP %u, #SS %u, #AC %u)", name, mistakes, done_count, faults[PF], faults[GP], faults[SS], faults[AC]);
    mistakes = done_count = 0;
    memset(faults, 0, sizeof faults);
}

static void begin(void)
{
    static unsigned age;
    probe_random(&probe);
    probe.user = random_below(2);
    probe.flags |= random_below(2) ? FLAG_IF : 0;
    probe.flags |= random_below(2) ? FLAG_AC : 0;
    if (age++ % 16 == 0)
        simd_random();
    probe.simd = simd_before;
}

static struct expectation expect(uint64_t va, unsigned size, bool write, bool stack, unsigned alignment, bool checked)
{
    struct access a = {.va = va, .size = size, .write = write, .user = probe.user, .ac = probe.flags & FLAG_AC, .stack = stack,
                       .alignment = (uint8_t)alignment, .checked = checked};
    return access_expect(&a);
}

/* Mapped bytes of [va, +size) are test pages. */
static bool harmless(uint64_t va, unsigned size)
{
    for (unsigned n = 0; n < size; n += 8)
        if (page_physical(va + n) && !area_shadow(va + n))
            return false;
    return !page_physical(va + size - 1) || area_shadow(va + size - 1);
}

static uint64_t choose(unsigned size)
{
    for (;;) {
        uint64_t va = wild_address(size);
        if (random_below(4) == 0)
            va &= ~(uint64_t)(size - 1);
        if (harmless(va, size))
            return va;
    }
}

static uint8_t *next_code(void)
{
    unsigned offset = code_next();
    probe.ip = code_va(probe.user, random_below(CODE_VIEWS)) + offset;
    return code_bytes() + offset;
}

/* Emits and runs; false when it ended as a fault (or wrongly). Registers in `changed` may be others afterwards. */
static bool run(const struct form *f, const struct operand *o, uint64_t va, unsigned reg, unsigned vvvv, unsigned opmask, bool zeroing,
                const struct expectation *want, unsigned changed)
{
    uint8_t *code = next_code();
    unsigned length = emit(code, f, o, reg, vvvv, opmask, zeroing);
    put_done(code + length);
    probe_run(&probe, &outcome);
    int vector = want->vector == NO_TRAP ? USER_DONE : want->vector;
    if (outcome.vector != vector) {
        mistake(f->name, va, "vector", (uint64_t)outcome.vector, (uint64_t)vector);
        return false;
    }
    for (unsigned n = 0; n < 16; n++)
        if (outcome.gpr[n] != probe.gpr[n] && !(vector == USER_DONE && changed >> n & 1))
            mistake(f->name, va, "register", outcome.gpr[n], probe.gpr[n]);
    if (vector == USER_DONE) {
        done_count++;
        return true;
    }
    faults[vector]++;
    if (outcome.ip != probe.ip)
        mistake(f->name, va, "RIP", outcome.ip, probe.ip);
    if (outcome.error != want->error)
        mistake(f->name, va, "error code", outcome.error, want->error);
    if (vector == PF && outcome.cr2 != want->cr2)
        mistake(f->name, va, "CR2", outcome.cr2, want->cr2);
    if ((outcome.flags ^ probe.flags) & ~(reg_t)FLAG_RF & ~2ul)
        mistake(f->name, va, "flags", outcome.flags, probe.flags);
    return false;
}

static bool by_stack(const struct operand *o)
{
    return !o->segment && (o->base == RSP || o->base == RBP);
}

static uint8_t *vector_byte(uint8_t *area, unsigned number, unsigned byte)
{
    return simd_part(area, number, byte / 16) + byte % 16;
}

static unsigned register_bytes(void)
{
    return max_encoding == EVEX ? 64 : max_encoding == VEX ? 32 : 16;
}

static unsigned any_register(const struct form *f)
{
    return random_below(f->encoding == EVEX ? 32 : 16);
}

static const struct form *any_form(const struct form *table, unsigned count)
{
    const struct form *f;
    do
        f = &table[random_below(count)];
    while (f->encoding > max_encoding);
    return f;
}

/* ---- plain operands ---- */

static void plain_done(const struct form *f, uint64_t va, unsigned reg)
{
    switch (f->kind) {
    case V_LOAD:
    case V_MERGE:
        for (unsigned n = 0; n < (f->kind == V_LOAD ? register_bytes() : f->size); n++)
            *vector_byte(wanted, reg, n) = n < f->size ? *area_shadow(va + n) : 0;
        break;
    case V_READ:
        for (unsigned n = 0; n < register_bytes(); n++)
            *vector_byte(wanted, reg, n) = *vector_byte(simd_after, reg, n);
        memcpy(wanted + 24, simd_after + 24, 4); /* MXCSR's flags */
        break;
    case V_STORE:
        for (unsigned n = 0; n < f->size; n++)
            *area_shadow(va + n) = *vector_byte(simd_before, reg, n);
        break;
    case V_X87:
        memcpy(wanted, simd_after, 8);
        area_learn(va, f->size);
        break;
    case V_GPR:
        memcpy(wanted + 24, simd_after + 24, 4);
        break;
    default:
        area_learn(va, f->size);
    }
}

static void plain(void)
{
    const struct form *f = any_form(forms, COUNT(forms));
    struct operand o;
    begin();
    bool write = f->kind == V_STORE || f->kind == V_UPDATE || (f->kind == V_X87 && (f->reg == 7 || f->reg == 2));
    bool two_sources = f >= &forms[COUNT(forms) - 6] || f->kind == V_GPR;
    uint64_t va = choose(f->size);
    unsigned reg = f->reg >= 0 ? (unsigned)f->reg : f->kind == V_GPR ? random_below(16) : any_register(f);
    operand_random(&o, &probe, va, 0);
    struct expectation want = expect(va, f->size, write, by_stack(&o), f->alignment, f->size <= 10);
    memcpy(wanted, simd_before, sizeof wanted);
    unsigned vvvv = f->encoding != LEGACY && two_sources ? any_register(f) : 0;
    if (run(f, &o, va, reg, vvvv, 0, false, &want, f->kind == V_GPR ? 1u << reg : 0))
        plain_done(f, va, reg);
    if (f->kind == V_X87)
        memcpy(wanted + 6, simd_after + 6, 2); /* FOP */
    if (!simd_same(wanted, simd_after))
        mistake(f->name, va, "vector registers", 1, 0);
    if (!areas_intact_near(va, f->size))
        mistake(f->name, va, "memory", 1, 0);
}

/* ---- masked operands ---- */

/* What enabled elements do, lowest first. *mixed: some would fault in another way, and processors may differ about which comes first. */
static struct expectation expect_masked(const struct form *f, uint64_t va, bool write, bool stack, uint64_t mask, bool *mixed)
{
    struct expectation first = {NO_TRAP, 0, 0};
    *mixed = false;
    if (!mask)
        return first;
    if (f->alignment && va & (f->alignment - 1u))
        return (struct expectation){GP, 0, 0};
    for (unsigned n = 0; n < f->size / f->kind; n++) {
        if (!(mask >> n & 1))
            continue;
        struct expectation e = expect(va + n * f->kind, f->kind, write, stack, 0, false);
        if (first.vector == NO_TRAP)
            first = e;
        else if (e.vector != NO_TRAP && e.vector != first.vector)
            *mixed = true;
    }
    return first;
}

static uint64_t random_mask(unsigned count)
{
    uint64_t mask = random64();
    switch (random_below(6)) {
    case 0:
        return 0;
    case 1:
        mask = ~0ull << random_below(count);
        break;
    case 2:
        mask = ~(~0ull << random_below(count));
        break;
    case 3:
        mask = 1ull << random_below(count);
        break;
    default:
        mask &= random64();
    }
    return count == 64 ? mask : mask & ((1ull << count) - 1);
}

static void masked_done(const struct form *f, uint64_t va, unsigned reg, bool write, uint64_t mask, bool zeroing)
{
    for (unsigned n = 0; n < (write ? f->size : register_bytes()); n++) {
        bool enabled = n < f->size && mask >> n / f->kind & 1;
        if (write && enabled)
            *area_shadow(va + n) = *vector_byte(simd_before, reg, n);
        else if (!write && (enabled || zeroing || n >= f->size))
            *vector_byte(wanted, reg, n) = enabled ? *area_shadow(va + n) : 0;
    }
}

static void masked(bool signs)
{
    const struct form *f = signs ? &sign_forms[random_below(COUNT(sign_forms))] : &opmask_forms[random_below(COUNT(opmask_forms))];
    struct operand o;
    begin();
    unsigned count = f->size / f->kind, reg = any_register(f), k = signs ? random_below(16) : 1 + random_below(7);
    bool write = signs ? (f->opcode & 3) >= 2 && f->opcode != 0x8c : f->opcode == 0x7f || f->opcode == 0x11 || f->opcode == 0x29;
    bool zeroing = signs ? !write : !write && random_below(2), mixed;
    uint64_t mask = random_mask(count), va = choose(f->size);
    operand_random(&o, &probe, va, 0);
    if (signs)
        for (unsigned n = 0; n < count; n++) {
            uint8_t *sign = vector_byte(simd_before, k, (n + 1) * f->kind - 1);
            *sign = (uint8_t)((*sign & 0x7f) | (mask >> n & 1) << 7);
        }
    else
        *simd_mask(simd_before, k) = mask;
    struct expectation want = expect_masked(f, va, write, by_stack(&o), mask, &mixed);
    if (mixed)
        return;
    memcpy(wanted, simd_before, sizeof wanted);
    if (run(f, &o, va, reg, signs ? k : 0, signs ? 0 : k, !signs && zeroing, &want, 0))
        masked_done(f, va, reg, write, mask, zeroing);
    if (!simd_same(wanted, simd_after))
        mistake(f->name, va, "vector registers", 1, 0);
    if (!areas_intact_near(va, f->size))
        mistake(f->name, va, "memory", 1, 0);
}

/* ---- gathers and scatters ---- */

/* Elements below the fault are done and their mask bits clear; those above may be. */
static void gather_check(const struct form *f, const uint64_t *vas, bool scatter, unsigned reg, unsigned k, uint64_t mask, unsigned stop, unsigned count)
{
    uint64_t left = f->encoding == EVEX ? *simd_mask(simd_after, k) : 0;
    for (unsigned n = 0; n < count && f->encoding == VEX; n++)
        left |= (uint64_t)(*vector_byte(simd_after, k, (n + 1) * f->kind - 1) >> 7) << n;
    for (unsigned n = 0; n < count; n++) {
        bool was = mask >> n & 1, is = left >> n & 1;
        if ((n < stop && is) || (n >= stop && is && !was) || (n == stop && !is))
            mistake(f->name, vas[n], "mask", left, mask);
        if (scatter)
            continue;
        for (unsigned byte = 0; byte < f->kind; byte++) {
            uint8_t have = *vector_byte(simd_after, reg, n * f->kind + byte), old = *vector_byte(simd_before, reg, n * f->kind + byte);
            uint8_t want = was && !is ? *area_shadow(vas[n] + byte) : old;
            if (have != want)
                mistake(f->name, vas[n], "element", have, want);
        }
    }
}

static void gather(void)
{
    const struct form *f = any_form(gather_forms, COUNT(gather_forms));
    uint64_t vas[16];
    begin();
    unsigned count = (f->length == 2 ? 64u : 32u) / f->kind, reg = random_below(5), index = 5 + random_below(5), vector_mask = 10 + random_below(6);
    unsigned k = f->encoding == EVEX ? 1 + random_below(7) : vector_mask;
    bool scatter = f->opcode >= 0xa0;
    struct operand o = {.base = (int)random_below(16), .index = (int)index, .scale = random_below(f->size == 4 ? 3 : 1), .displacement = (int8_t)random64()};
    uint64_t mask = random_mask(count), base = choose(f->kind) + (uint64_t)random_below(256) * f->kind;
    probe.gpr[o.base] = base;
    bool bad_first = random_below(2);
    unsigned stop = count;
    struct expectation want = {NO_TRAP, 0, 0};
    uint64_t near = area_bases[random_below(AREAS)] + 2 * PAGE + 64;
    if (!bad_first)
        probe.gpr[o.base] = base = near;
    for (unsigned n = 0; n < count; n++) {
        uint64_t target = random_below(4) ? near + random_below(2 * PAGE - 200) : choose(f->kind);
        int64_t i = f->size == 8 ? (int64_t)(target - base - (uint64_t)(int64_t)o.displacement) : (int32_t)random_below(3 * PAGE) - (int32_t)PAGE;
        memcpy(vector_byte(simd_before, index, n * f->size), &i, f->size);
        vas[n] = base + ((uint64_t)i << o.scale) + (uint64_t)(int64_t)o.displacement;
        if (!harmless(vas[n], f->kind))
            return;
        for (unsigned other = 0; scatter && other < n; other++)
            if (vas[n] - vas[other] + f->kind < 2u * f->kind)
                return; /* overlapping elements: the order is another matter */
        uint8_t *sign = vector_byte(simd_before, vector_mask, (n + 1) * f->kind - 1);
        if (f->encoding == VEX)
            *sign = (uint8_t)((*sign & 0x7f) | (mask >> n & 1) << 7);
        if (mask >> n & 1 && want.vector == NO_TRAP) {
            want = expect(vas[n], f->kind, scatter, by_stack(&o), 0, false);
            stop = want.vector == NO_TRAP ? count : n;
        }
    }
    if (f->encoding == EVEX)
        *simd_mask(simd_before, k) = mask;
    if (scatter)
        for (unsigned n = 0; n < stop; n++)
            for (unsigned byte = 0; mask >> n & 1 && byte < f->kind; byte++)
                *area_shadow(vas[n] + byte) = *vector_byte(simd_before, reg, n * f->kind + byte);
    run(f, &o, vas[stop < count ? stop : 0], reg, f->encoding == VEX ? vector_mask : 0, f->encoding == EVEX ? k : 0, false, &want, 0);
    if (outcome.vector != (want.vector == NO_TRAP ? USER_DONE : want.vector))
        return;
    for (unsigned n = stop + 1; scatter && n < count; n++)
        area_learn(vas[n], f->kind);
    gather_check(f, vas, scatter, reg, k, mask, stop, count);
    for (unsigned n = 0; n < count; n++)
        if (!areas_intact_near(vas[n], f->kind))
            mistake(f->name, vas[n], "memory", 1, 0);
}

/* ---- MASKMOVDQU ---- */

static void maskmov(void)
{
    static const struct form form = {"maskmovdqu", LEGACY, S66, 1, 0xf7, -1, 0, 0, 0, 16, 0, 0};
    begin();
    uint64_t va = choose(16), mask = random_mask(16);
    probe.gpr[RDI] = va;
    for (unsigned n = 0; n < 16; n++)
        *vector_byte(simd_before, 1, n) = (uint8_t)(mask >> n & 1) << 7;
    struct expectation want = expect(va, 16, true, false, 0, false), enabled = {NO_TRAP, 0, 0};
    for (unsigned n = 0; n < 16 && enabled.vector == NO_TRAP; n++)
        if (mask >> n & 1)
            enabled = expect(va + n, 1, true, false, 0, false);
    if (enabled.vector == NO_TRAP && want.vector != NO_TRAP)
        return; /* whether disabled bytes fault is the processor's affair */
    static const uint8_t bytes[] = {0x66, 0x0f, 0xf7, 0xc1}; /* maskmovdqu xmm0, xmm1 */
    uint8_t *code = next_code();
    memcpy(code, bytes, sizeof bytes);
    put_done(code + sizeof bytes);
    probe_run(&probe, &outcome);
    if (outcome.vector != (want.vector == NO_TRAP ? USER_DONE : want.vector))
        mistake(form.name, va, "vector", (uint64_t)outcome.vector, (uint64_t)want.vector);
    else if (outcome.vector == PF && (outcome.error != want.error || (outcome.cr2 ^ want.cr2) & ~(PAGE - 1)))
        mistake(form.name, va, "CR2", outcome.cr2, want.cr2);
    if (outcome.vector == USER_DONE) {
        done_count++;
        for (unsigned n = 0; n < 16; n++)
            if (mask >> n & 1)
                *area_shadow(va + n) = *vector_byte(simd_before, 0, n);
    } else {
        faults[outcome.vector]++;
    }
    if (memcmp(outcome.gpr, probe.gpr, sizeof probe.gpr) || !simd_same(simd_before, simd_after) || !areas_intact_near(va, 16))
        mistake(form.name, va, "registers or memory", 1, 0);
}

/* ---- FXSAVE, XSAVE and their restores ---- */

static void save(void)
{
    static const struct form save_forms[] = {
        {"fxsave64", LEGACY, 0, 1, 0xae, 0, 1, 0, 0, 0, 1, 16}, {"fxrstor64", LEGACY, 0, 1, 0xae, 1, 1, 0, 0, 0, 0, 16},
        {"xsave64", LEGACY, 0, 1, 0xae, 4, 1, 0, 0, 0, 1, 64},  {"xrstor64", LEGACY, 0, 1, 0xae, 5, 1, 0, 0, 0, 0, 64},
    };
    const struct form *f = &save_forms[random_below(4)];
    unsigned size = f->alignment == 16 ? 416 : 576;
    struct operand o;
    begin();
    probe.flags &= ~(reg_t)FLAG_AC;
    uint64_t va = choose(64) - (random_below(2) ? random_below(size) : 0);
    if (random_below(8))
        va &= ~(uint64_t)(f->alignment - 1);
    if (!harmless(va, size))
        return;
    operand_random(&o, &probe, va, 1u << RAX | 1u << RDX);
    probe.gpr[RAX] = 3; /* x87 and SSE */
    probe.gpr[RDX] = 0;
    bool misaligned = va & (f->alignment - 1u), write = f->kind;
    struct expectation whole = expect(va, size, write, by_stack(&o), 0, false);
    int vector = whole.vector == NO_TRAP ? (write ? USER_DONE : GP) : whole.vector;
    if (!canonical(va)) /* the first byte's address comes before the alignment, the others' after it */
        vector = by_stack(&o) ? SS : GP;
    else if (misaligned)
        vector = GP;
    uint8_t *code = next_code();
    unsigned length = emit(code, f, &o, (unsigned)f->reg, 0, 0, false);
    put_done(code + length);
    probe_run(&probe, &outcome);
    /* What is restored is random or was saved before: good or bad. */
    bool free = !write && !misaligned && canonical(va) && (outcome.vector == GP || outcome.vector == PF || outcome.vector == USER_DONE);
    if (outcome.vector != vector && !free)
        mistake(f->name, va, "vector", (uint64_t)outcome.vector, (uint64_t)vector);
    if (outcome.vector == PF) {
        struct expectation e = expect(outcome.cr2, 1, write, false, 0, false);
        if (outcome.cr2 - va >= size || e.vector != PF || e.error != outcome.error)
            mistake(f->name, va, "CR2", outcome.cr2, whole.cr2);
    }
    if (outcome.vector == USER_DONE)
        done_count++;
    else
        faults[outcome.vector]++;
    if (write && (outcome.vector == PF || outcome.vector == USER_DONE))
        area_learn(va, size);
    if (memcmp(outcome.gpr, probe.gpr, sizeof probe.gpr) || !areas_intact_near(va, size))
        mistake(f->name, va, "registers or memory", 1, 0);
    if (write && !simd_same(simd_before, simd_after))
        mistake(f->name, va, "vector registers", 1, 0);
}

static void all(const char *plain_name)
{
    for (unsigned n = 0; n < PLAIN; n++)
        plain();
    verdict(plain_name);
}

void test_main(void)
{
    random_seed();
    if (!simd_enable()) {
        skip("vectors", "no XSAVE");
        return;
    }
    max_encoding = (simd_features() & 0xe0) == 0xe0 ? EVEX : simd_features() & 4 ? VEX : LEGACY;
    identity_map_restrict();
    areas_create();
    code_va(false, 0);
    probe_begin();
    timer_begin();
    simd_random();
    all("vector and x87 operands");
    for (unsigned n = 0; n < MASKED && max_encoding >= VEX; n++)
        masked(max_encoding < EVEX || n % 3 == 0);
    verdict("masked operands touch enabled elements only");
    for (unsigned n = 0; n < GATHERS && max_encoding >= VEX; n++)
        gather();
    verdict("gathers and scatters");
    for (unsigned n = 0; n < MASKED / 4; n++)
        maskmov();
    verdict("MASKMOVDQU");
    for (unsigned n = 0; n < SAVES; n++)
        save();
    verdict("FXSAVE, XSAVE and their restores");
    write_cr4(read_cr4() | (cpuid(7, 0).b & 1u << 20 ? CR4_SMAP : 0));
    write_cr0(read_cr0() | CR0_AM);
    all("vector and x87 operands with SMAP and alignment checks");
    timer_end();
    probe_end();
}
