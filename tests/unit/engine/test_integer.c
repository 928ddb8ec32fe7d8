/*
 * Integer instructions against the host processor: random operands, every size, register and memory forms, and operands that run off the
 * mapped memory, where both must fault and leave registers and flags alone.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "native_compare.h"

#define ROUNDS 160u

#define M 0x01u        /* has ModRM */
#define BYTES 0x02u    /* opcode with the low bit clear is the byte form */
#define MEMORY 0x04u   /* memory only */
#define REGISTER 0x08u /* register only */
#define LOCKABLE 0x10u /* LOCK is allowed with memory */
#define BITS 0x20u     /* register operand is a bit index: keep it small */
#define DIVIDES 0x40u  /* faults unless operands are kind */
#define STRING 0x80u
#define NO16 0x100u      /* no operand-size prefix */
#define WIDE 0x200u      /* operand size 64 or 16 only (stack) */
#define IMM8 0x400u
#define IMMZ 0x800u      /* 16 or 32 bits by operand size */
#define NO_REX_W 0x1000u
#define ONLY_W 0x2000u   /* REX.W required */
#define ALIGNED16 0x4000u
#define ACCUMULATOR 0x8000u /* make the accumulator match memory half of the time */
#define PLUS_REG 0x10000u   /* register in the opcode's low bits */

struct pattern {
    const char *name;
    uint8_t opcode[4];
    uint8_t length;
    int8_t extension; /* of /digit, -1: /r */
    uint32_t flags;
};

#define ALU(name, base, digit)                                                                     \
    {name " r/m8, r8", {base}, 1, -1, M | BYTES | LOCKABLE}, {name " r/m, r", {base + 1}, 1, -1, M | LOCKABLE},      \
    {name " r8, r/m8", {base + 2}, 1, -1, M | BYTES}, {name " r, r/m", {base + 3}, 1, -1, M},      \
    {name " al, imm", {base + 4}, 1, -1, BYTES | IMM8}, {name " eax, imm", {base + 5}, 1, -1, IMMZ}, \
    {name " r/m8, imm", {0x80}, 1, digit, M | BYTES | IMM8 | LOCKABLE}, {name " r/m, imm", {0x81}, 1, digit, M | IMMZ | LOCKABLE}, \
    {name " r/m, imm8", {0x83}, 1, digit, M | IMM8 | LOCKABLE}
#define SHIFT(name, digit)                                                                         \
    {name " r/m8, imm", {0xc0}, 1, digit, M | BYTES | IMM8}, {name " r/m, imm", {0xc1}, 1, digit, M | IMM8}, \
    {name " r/m8, 1", {0xd0}, 1, digit, M | BYTES}, {name " r/m, 1", {0xd1}, 1, digit, M},         \
    {name " r/m8, cl", {0xd2}, 1, digit, M | BYTES}, {name " r/m, cl", {0xd3}, 1, digit, M}
#define CC(cc)                                                                                     \
    {"setcc " #cc, {0x0f, 0x90 + cc}, 2, 0, M | BYTES}, {"cmovcc " #cc, {0x0f, 0x40 + cc}, 2, -1, M}

static const struct pattern patterns[] = {
    ALU("add", 0x00, 0), ALU("or", 0x08, 1), ALU("adc", 0x10, 2), ALU("sbb", 0x18, 3),
    ALU("and", 0x20, 4), ALU("sub", 0x28, 5), ALU("xor", 0x30, 6),
    {"cmp r/m8, r8", {0x38}, 1, -1, M | BYTES}, {"cmp r/m, r", {0x39}, 1, -1, M}, {"cmp r8, r/m8", {0x3a}, 1, -1, M | BYTES},
    {"cmp r, r/m", {0x3b}, 1, -1, M}, {"cmp al, imm", {0x3c}, 1, -1, BYTES | IMM8}, {"cmp eax, imm", {0x3d}, 1, -1, IMMZ},
    {"cmp r/m8, imm", {0x80}, 1, 7, M | BYTES | IMM8}, {"cmp r/m, imm", {0x81}, 1, 7, M | IMMZ}, {"cmp r/m, imm8", {0x83}, 1, 7, M | IMM8},
    {"test r/m8, r8", {0x84}, 1, -1, M | BYTES}, {"test r/m, r", {0x85}, 1, -1, M}, {"test al, imm", {0xa8}, 1, -1, BYTES | IMM8},
    {"test eax, imm", {0xa9}, 1, -1, IMMZ}, {"test r/m8, imm", {0xf6}, 1, 0, M | BYTES | IMM8}, {"test r/m, imm", {0xf7}, 1, 0, M | IMMZ},
    {"inc r/m8", {0xfe}, 1, 0, M | BYTES | LOCKABLE}, {"inc r/m", {0xff}, 1, 0, M | LOCKABLE},
    {"dec r/m8", {0xfe}, 1, 1, M | BYTES | LOCKABLE}, {"dec r/m", {0xff}, 1, 1, M | LOCKABLE},
    {"not r/m8", {0xf6}, 1, 2, M | BYTES | LOCKABLE}, {"not r/m", {0xf7}, 1, 2, M | LOCKABLE},
    {"neg r/m8", {0xf6}, 1, 3, M | BYTES | LOCKABLE}, {"neg r/m", {0xf7}, 1, 3, M | LOCKABLE},
    SHIFT("rol", 0), SHIFT("ror", 1), SHIFT("rcl", 2), SHIFT("rcr", 3), SHIFT("shl", 4), SHIFT("shr", 5), SHIFT("sal", 6), SHIFT("sar", 7),
    {"shld imm", {0x0f, 0xa4}, 2, -1, M | IMM8}, {"shld cl", {0x0f, 0xa5}, 2, -1, M},
    {"shrd imm", {0x0f, 0xac}, 2, -1, M | IMM8}, {"shrd cl", {0x0f, 0xad}, 2, -1, M},
    {"mul r/m8", {0xf6}, 1, 4, M | BYTES}, {"mul r/m", {0xf7}, 1, 4, M}, {"imul r/m8", {0xf6}, 1, 5, M | BYTES}, {"imul r/m", {0xf7}, 1, 5, M},
    {"imul r, r/m", {0x0f, 0xaf}, 2, -1, M}, {"imul r, r/m, imm", {0x69}, 1, -1, M | IMMZ}, {"imul r, r/m, imm8", {0x6b}, 1, -1, M | IMM8},
    {"div r/m8", {0xf6}, 1, 6, M | BYTES | DIVIDES}, {"div r/m", {0xf7}, 1, 6, M | DIVIDES},
    {"idiv r/m8", {0xf6}, 1, 7, M | BYTES | DIVIDES}, {"idiv r/m", {0xf7}, 1, 7, M | DIVIDES},
    {"mov r/m8, r8", {0x88}, 1, -1, M | BYTES}, {"mov r/m, r", {0x89}, 1, -1, M}, {"mov r8, r/m8", {0x8a}, 1, -1, M | BYTES},
    {"mov r, r/m", {0x8b}, 1, -1, M}, {"mov r/m8, imm", {0xc6}, 1, 0, M | BYTES | IMM8}, {"mov r/m, imm", {0xc7}, 1, 0, M | IMMZ},
    {"mov r8, imm", {0xb0}, 1, -1, BYTES | IMM8 | PLUS_REG}, {"mov r, imm", {0xb8}, 1, -1, IMMZ | PLUS_REG | NO_REX_W},
    {"movzx r, r/m8", {0x0f, 0xb6}, 2, -1, M}, {"movzx r, r/m16", {0x0f, 0xb7}, 2, -1, M},
    {"movsx r, r/m8", {0x0f, 0xbe}, 2, -1, M}, {"movsx r, r/m16", {0x0f, 0xbf}, 2, -1, M}, {"movsxd", {0x63}, 1, -1, M},
    {"movbe r, m", {0x0f, 0x38, 0xf0}, 3, -1, M | MEMORY}, {"movbe m, r", {0x0f, 0x38, 0xf1}, 3, -1, M | MEMORY},
    {"bswap", {0x0f, 0xc8}, 2, -1, PLUS_REG}, {"lea", {0x8d}, 1, -1, M | MEMORY},
    {"xchg r/m8, r8", {0x86}, 1, -1, M | BYTES | LOCKABLE}, {"xchg r/m, r", {0x87}, 1, -1, M | LOCKABLE}, {"xchg rax, r", {0x90}, 1, -1, PLUS_REG},
    {"xadd r/m8, r8", {0x0f, 0xc0}, 2, -1, M | BYTES | LOCKABLE}, {"xadd r/m, r", {0x0f, 0xc1}, 2, -1, M | LOCKABLE},
    {"cmpxchg r/m8, r8", {0x0f, 0xb0}, 2, -1, M | BYTES | LOCKABLE | ACCUMULATOR}, {"cmpxchg r/m, r", {0x0f, 0xb1}, 2, -1, M | LOCKABLE | ACCUMULATOR},
    {"cmpxchg8b", {0x0f, 0xc7}, 2, 1, M | MEMORY | LOCKABLE | NO_REX_W | NO16 | ACCUMULATOR},
    {"cmpxchg16b", {0x0f, 0xc7}, 2, 1, M | MEMORY | LOCKABLE | ONLY_W | NO16 | ALIGNED16 | ACCUMULATOR},
    {"bt r", {0x0f, 0xa3}, 2, -1, M | BITS}, {"bts r", {0x0f, 0xab}, 2, -1, M | BITS | LOCKABLE}, {"btr r", {0x0f, 0xb3}, 2, -1, M | BITS | LOCKABLE},
    {"btc r", {0x0f, 0xbb}, 2, -1, M | BITS | LOCKABLE}, {"bt imm", {0x0f, 0xba}, 2, 4, M | IMM8}, {"bts imm", {0x0f, 0xba}, 2, 5, M | IMM8 | LOCKABLE},
    {"btr imm", {0x0f, 0xba}, 2, 6, M | IMM8 | LOCKABLE}, {"btc imm", {0x0f, 0xba}, 2, 7, M | IMM8 | LOCKABLE},
    {"bsf", {0x0f, 0xbc}, 2, -1, M}, {"bsr", {0x0f, 0xbd}, 2, -1, M},
    CC(0), CC(1), CC(2), CC(3), CC(4), CC(5), CC(6), CC(7), CC(8), CC(9), CC(10), CC(11), CC(12), CC(13), CC(14), CC(15),
    {"push r", {0x50}, 1, -1, PLUS_REG | WIDE}, {"pop r", {0x58}, 1, -1, PLUS_REG | WIDE}, {"push imm", {0x68}, 1, -1, IMMZ | WIDE},
    {"push imm8", {0x6a}, 1, -1, IMM8 | WIDE}, {"push r/m", {0xff}, 1, 6, M | WIDE}, {"pop r/m", {0x8f}, 1, 0, M | WIDE},
    {"leave", {0xc9}, 1, -1, WIDE}, {"cbw", {0x98}, 1, -1, 0}, {"cwd", {0x99}, 1, -1, 0}, {"lahf", {0x9f}, 1, -1, 0}, {"sahf", {0x9e}, 1, -1, 0},
    {"xlat", {0xd7}, 1, -1, NO16 | NO_REX_W}, {"clc", {0xf8}, 1, -1, 0}, {"stc", {0xf9}, 1, -1, 0}, {"cmc", {0xf5}, 1, -1, 0},
    {"cld", {0xfc}, 1, -1, 0}, {"std", {0xfd}, 1, -1, 0}, {"nop r/m", {0x0f, 0x1f}, 2, 0, M}, {"prefetcht0", {0x0f, 0x18}, 2, 1, M | MEMORY},
    {"endbr64", {0xf3, 0x0f, 0x1e, 0xfa}, 4, -1, NO16 | NO_REX_W},
    {"movsb", {0xa4}, 1, -1, STRING | BYTES}, {"movs", {0xa5}, 1, -1, STRING}, {"cmpsb", {0xa6}, 1, -1, STRING | BYTES}, {"cmps", {0xa7}, 1, -1, STRING},
    {"stosb", {0xaa}, 1, -1, STRING | BYTES}, {"stos", {0xab}, 1, -1, STRING}, {"lodsb", {0xac}, 1, -1, STRING | BYTES}, {"lods", {0xad}, 1, -1, STRING},
    {"scasb", {0xae}, 1, -1, STRING | BYTES}, {"scas", {0xaf}, 1, -1, STRING},
};

/* With a mandatory prefix in front: POPCNT, TZCNT, LZCNT share the generator through `mandatory`. */
static const struct pattern counts[] = {
    {"popcnt", {0x0f, 0xb8}, 2, -1, M}, {"tzcnt", {0x0f, 0xbc}, 2, -1, M}, {"lzcnt", {0x0f, 0xbd}, 2, -1, M},
};

static struct compare *compare;
static uint64_t seed = 0x9e3779b97f4a7c15ull;

static uint64_t random64(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed * 0x2545f4914f6cdd1dull;
}

/* Values at the edges are as likely as others. */
static uint64_t random_operand(void)
{
    static const uint64_t edges[] = {0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0x7fffffffffffffff,
                                     0x8000000000000000, ~0ull};
    uint64_t value = random64();
    if (value & 1)
        return edges[(value >> 8) % (sizeof edges / sizeof edges[0])];
    return value >> (value >> 1 & 3 ? 0 : random64() & 63);
}

struct generated {
    uint8_t bytes[16];
    unsigned length;
    bool memory, edge;
};

static void put(struct generated *g, unsigned byte)
{
    g->bytes[g->length++] = (uint8_t)byte;
}

/* Memory operands: [rdi + disp8], [rdi + rsi * scale + disp8] or, now and then with 32-bit addresses, the same. */
static void generate_modrm(struct generated *g, const struct pattern *p)
{
    unsigned reg = p->extension >= 0 ? (unsigned)p->extension : (unsigned)random64() & 7;
    unsigned disp = p->flags & ALIGNED16 ? (unsigned)random64() & 0xf0 : (unsigned)random64() & 0xff;
    if (!g->memory) {
        put(g, 0xc0 | reg << 3 | (random64() & 7));
    } else if ((random64() & 1) || (p->flags & ALIGNED16)) {
        put(g, 0x47 | reg << 3);
        put(g, disp);
    } else {
        put(g, 0x44 | reg << 3);
        put(g, (random64() & 3) << 6 | GPR_RSI << 3 | GPR_RDI);
        put(g, disp);
    }
}

static unsigned generate_rex(const struct pattern *p, bool memory, bool wide)
{
    unsigned rex = wide ? 0x48 : 0;
    if ((p->flags & M) && (random64() & 1))
        rex |= 0x40 | (p->extension < 0 && (random64() & 1) ? 4 : 0) | (!memory && (random64() & 1) ? 1 : 0);
    if ((p->flags & PLUS_REG) && (random64() & 1))
        rex |= 0x41;
    return rex;
}

static void generate(struct generated *g, const struct pattern *p, unsigned mandatory)
{
    memset(g, 0, sizeof *g);
    g->memory = (p->flags & M) && ((p->flags & MEMORY) || (!(p->flags & REGISTER) && (random64() & 1)));
    bool word = !(p->flags & (BYTES | NO16)) && random64() % 3 == 0;
    bool wide = (p->flags & ONLY_W) || (!word && !(p->flags & (BYTES | NO_REX_W | WIDE)) && (random64() & 1));
    if (g->memory && (p->flags & LOCKABLE) && (random64() & 1))
        put(g, 0xf0);
    if (p->flags & STRING && random64() % 3)
        put(g, random64() & 1 ? 0xf2 : 0xf3);
    if (g->memory && random64() % 8 == 0)
        put(g, 0x67);
    if (word)
        put(g, 0x66);
    if (mandatory)
        put(g, mandatory);
    unsigned rex = generate_rex(p, g->memory, wide);
    if (rex)
        put(g, rex);
    for (unsigned n = 0; n < p->length; n++)
        put(g, p->opcode[n] + (p->flags & PLUS_REG && n == p->length - 1u ? random64() & 7 : 0));
    if (p->flags & M)
        generate_modrm(g, p);
    unsigned immediate = p->flags & IMM8 ? 1 : p->flags & IMMZ ? (word ? 2 : 4) : 0;
    for (unsigned n = 0; n < immediate; n++)
        put(g, (unsigned)random64() & 0xff);
}

static uint64_t random_address(void)
{
    return COMPARE_AREA + 0x4000 + (random64() & 0x7fff);
}

static void accumulator_match(const struct pattern *p, struct compare_state *s)
{
    if (!(p->flags & ACCUMULATOR) || (random64() & 1))
        return;
    uint64_t value = random_operand();
    memset((void *)(COMPARE_AREA + COMPARE_BYTES / 2), (int)value & 0xff, 0x1000);
    memset(compare_guest_memory(compare) + COMPARE_BYTES / 2, (int)value & 0xff, 0x1000);
    s->gpr[GPR_RAX] = s->gpr[GPR_RDX] = 0x0101010101010101ull * (value & 0xff);
    s->gpr[GPR_RDI] = COMPARE_AREA + COMPARE_BYTES / 2 + 0x400;
}

static void random_state(const struct pattern *p, struct compare_state *s, bool edge)
{
    memset(s, 0, sizeof *s);
    for (unsigned n = 0; n < 16; n++)
        s->gpr[n] = p->flags & BITS ? (uint64_t)((int64_t)random64() >> 50) : random_operand();
    s->rflags = random64() & (RFLAGS_OSZAPC | RFLAGS_DF);
    s->gpr[GPR_RDI] = random_address();
    s->gpr[GPR_RSI] = random64() & 0x3ff;
    s->gpr[GPR_RSP] = random_address() & ~7ull;
    s->gpr[GPR_RBP] = random_address();
    s->gpr[GPR_RBX] = p->flags & M ? s->gpr[GPR_RBX] : random_address();
    if (p->flags & STRING) {
        s->gpr[GPR_RSI] = random_address();
        s->gpr[GPR_RCX] = random64() & (random64() & 1 ? 0x7ff : 15);
        if (random64() & 1)
            s->gpr[GPR_RSI] = s->gpr[GPR_RDI] + (random64() & 31) - 16; /* overlapping */
    }
    if (p->flags & ALIGNED16)
        s->gpr[GPR_RDI] &= ~15ull;
    if (p->flags & DIVIDES && random64() % 4)
        s->gpr[GPR_RDX] = random64() & 1 ? 0 : (s->gpr[GPR_RAX] & 1 ? ~0ull : 3);
    accumulator_match(p, s);
    if (edge) { /* the last mapped bytes: some of these run into the page that is not there */
        s->gpr[GPR_RDI] = COMPARE_AREA + COMPARE_BYTES - 64 - (random64() & 63);
        s->gpr[GPR_RSP] = COMPARE_AREA + COMPARE_BYTES - (random64() & 1 ? 0 : 8);
    }
}

static void describe(const struct pattern *p, const struct generated *g, const struct compare_state *in, const struct compare_state *host,
                     const struct compare_state *guest)
{
    fprintf(stderr, "%s:", p->name);
    for (unsigned n = 0; n < g->length; n++)
        fprintf(stderr, " %02x", g->bytes[n]);
    fprintf(stderr, "\nrflags %#llx: host %#llx%s, guest %#llx%s\n", (unsigned long long)in->rflags, (unsigned long long)host->rflags,
            host->faulted ? " fault" : "", (unsigned long long)guest->rflags, guest->faulted ? " fault" : "");
    for (unsigned n = 0; n < 16; n++)
        fprintf(stderr, "%2u: %016llx host %016llx guest %016llx%s\n", n, (unsigned long long)in->gpr[n], (unsigned long long)host->gpr[n],
                (unsigned long long)guest->gpr[n], host->gpr[n] != guest->gpr[n] ? " <" : "");
}

/* Runs one on both sides; fails the test on any difference. Returns whether it faulted. */
static bool compare_one(const struct pattern *p, unsigned mandatory, bool edge)
{
    struct generated g;
    struct compare_state in, host, guest;
    generate(&g, p, mandatory);
    random_state(p, &in, edge);
    host = guest = in;
    compare_run_native(compare, g.bytes, g.length, &host);
    compare_run_guest(compare, g.bytes, g.length, &guest);
    /* What the manual leaves undefined is the host's on both sides. After a fault all are as before, except that a string compare may have got some way. */
    uint64_t flags = (host.faulted || guest.faulted) && p->flags & STRING ? ~RFLAGS_OSZAPC : ~0ull;
    bool same = host.faulted == guest.faulted && !memcmp(host.gpr, guest.gpr, sizeof host.gpr) && !((host.rflags ^ guest.rflags) & flags) &&
                !memcmp((void *)COMPARE_AREA, compare_guest_memory(compare), COMPARE_BYTES);
    if (!same) {
        describe(p, &g, &in, &host, &guest);
        for (unsigned n = 0; n < COMPARE_BYTES; n++)
            if (((uint8_t *)COMPARE_AREA)[n] != compare_guest_memory(compare)[n]) {
                fprintf(stderr, "memory differs first at %#llx\n", (unsigned long long)(COMPARE_AREA + n));
                break;
            }
        fail();
    }
    return host.faulted;
}

static void test_against_host(void **state)
{
    for (unsigned n = 0; n < sizeof patterns / sizeof patterns[0]; n++)
        for (unsigned round = 0; round < ROUNDS; round++)
            compare_one(&patterns[n], 0, false);
    for (unsigned n = 0; n < sizeof counts / sizeof counts[0]; n++)
        for (unsigned round = 0; round < ROUNDS; round++)
            compare_one(&counts[n], 0xf3, false);
}

static void test_faults_change_nothing(void **state)
{
    unsigned faults = 0;
    for (unsigned n = 0; n < sizeof patterns / sizeof patterns[0]; n++)
        for (unsigned round = 0; round < ROUNDS; round++)
            faults += compare_one(&patterns[n], 0, true);
    assert_true(faults > 1000);
}

static int setup(void **state)
{
    compare = compare_create();
    if (!compare)
        return -1;
    for (unsigned n = 0; n < COMPARE_BYTES; n += 8) {
        uint64_t value = random_operand();
        memcpy((void *)(COMPARE_AREA + n), &value, 8);
        memcpy(compare_guest_memory(compare) + n, &value, 8);
    }
    return 0;
}

static int teardown(void **state)
{
    compare_destroy(compare);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_host),
        cmocka_unit_test(test_faults_change_nothing),
    };
    return cmocka_run_group_tests_name("integer", tests, setup, teardown);
}
