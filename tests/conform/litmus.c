/*
 * Memory order and atomicity between processors: litmus tests of total store order run over thousands of cells without handshakes, single accesses that must not
 * tear, locked read-modify-writes of every kind and alignment from all processors at once, locks built on them. SDM vol. 3, 8.1 and 8.2. Run with four processors;
 * two are enough for most.
 */
#include "runtime/probe.h"
#include "runtime/processors.h"

#define CELLS 2048u
#define BATCHES 10u
#define COUNTS 3000u
#define SPLIT_COUNTS 300u /* hosts make them slow on purpose */

static struct cell {
    volatile uint32_t x __attribute__((aligned(64)));
    volatile uint32_t y __attribute__((aligned(64)));
} cells[CELLS];
static uint32_t results[PROCESSORS_MAX][CELLS][2];
static unsigned processors;

/* ---- litmus tests ---- */

#define STRIDE 16u
static struct {
    volatile unsigned cells __attribute__((aligned(64)));
} progress[PROCESSORS_MAX];
static unsigned parts;

/* Two processors go through the cells side by side, unless one of them is not running for long. More may have to share the host's. */
static inline void keep_step(unsigned number, unsigned n)
{
    if (parts != 2)
        return;
    progress[number].cells = n + 1;
    for (unsigned spins = 0; progress[number ^ 1].cells < n + 1 && spins < 3000; spins++)
        ;
}

/* One processor's part: `code` for each cell, with registers a and b kept. */
#define PART(name, code, ...)                                                                                                                        \
    static void name(unsigned number, uint32_t (*r)[2])                                                                                                               \
    {                                                                                                                                                \
        for (unsigned n = 0; n < CELLS; n++) {                                                                                                       \
            uint32_t a = 0, b = 0;                                                                                                                   \
            if (n % STRIDE == 0)                                                                                                                     \
                keep_step(number, n);                                                                                                                      \
            struct cell *c = &cells[n];                                                                                                              \
            asm_volatile(code : "+&r"(a), "+&r"(b) : "r"(&c->x), "r"(&c->y) : "memory", "cc" __VA_ARGS__);                                           \
            r[n][0] = a;                                                                                                                             \
            r[n][1] = b;                                                                                                                             \
        }                                                                                                                                            \
    }
PART(x_then_read_y, "movl $1, (%2); movl (%3), %0")
PART(y_then_read_x, "movl $1, (%3); movl (%2), %0")
PART(x_mfence_read_y, "movl $1, (%2); mfence; movl (%3), %0")
PART(y_mfence_read_x, "movl $1, (%3); mfence; movl (%2), %0")
PART(x_locked_read_y, "movl $1, (%2); lock orl $0, -64(%%rsp); movl (%3), %0")
PART(y_locked_read_x, "movl $1, (%3); lock addq $0, (%%rsp); movl (%2), %0")
PART(x_xchg_read_y, "movl $1, %1; xchgl %1, (%2); movl (%3), %0")
PART(y_xchg_read_x, "movl $1, %1; xchgl %1, (%3); movl (%2), %0")
PART(x_cpuid_read_y, "movl $1, (%2); push %%rbx; xor %%eax, %%eax; cpuid; pop %%rbx; movl (%3), %0", , "rax", "rcx", "rdx")
PART(y_cpuid_read_x, "movl $1, (%3); push %%rbx; xor %%eax, %%eax; cpuid; pop %%rbx; movl (%2), %0", , "rax", "rcx", "rdx")
PART(x_forward_read_y, "movl $1, (%2); movl (%2), %1; movl (%3), %0")
PART(y_forward_read_x, "movl $1, (%3); movl (%3), %1; movl (%2), %0")
PART(x_then_y, "movl $1, (%2); movl $1, (%3)")
PART(read_y_then_x, "movl (%3), %0; movl (%2), %1")
PART(push_x_then_y, "mov %%rsp, %%rcx; lea 8(%2), %%rsp; push $1; lea 4(%3), %%rsp; mov %%rcx, %%rsp; addl $1, (%3)", , "rcx")
PART(vector_x_then_y, "movd %2, %%xmm1; movl $1, %%eax; movd %%eax, %%xmm0; movups %%xmm0, (%2); movd %%xmm0, (%3)", , "rax")
PART(vector_read_y_then_x, "movd (%3), %%xmm0; movups (%2), %%xmm1; movd %%xmm0, %0; movd %%xmm1, %1")
PART(string_x_then_y, "mov %2, %%rdi; mov $1, %%eax; stosl; mov %3, %%rdi; stosl", , "rax", "rdi")
PART(string_read_y_then_x, "mov %3, %%rsi; lodsl; mov %%eax, %0; mov %2, %%rsi; lodsl; mov %%eax, %1", , "rax", "rsi")
PART(locked_x_then_y, "lock incl (%2); incl (%3)")
PART(read_x_write_y, "movl (%2), %0; movl $1, (%3)")
PART(read_y_write_x, "movl (%3), %0; movl $1, (%2)")
PART(x_twice, "movl $1, (%2); movl $2, (%2)")
PART(read_x_twice, "movl (%2), %0; movl (%2), %1")
PART(x_is_1, "movl $1, (%2)")
PART(y_is_1, "movl $1, (%3)")
PART(read_x_then_y, "movl (%2), %0; movl (%3), %1")
PART(x1_y2, "movl $1, (%2); movl $2, (%3)")
PART(y1_x2, "movl $1, (%3); movl $2, (%2)")
PART(x2_y1, "movl $2, (%2); movl $1, (%3)")
PART(write_1_read, "movl $1, (%2); movl (%2), %0")
PART(write_2_read, "movl $2, (%2); movl (%2), %0")

typedef uint32_t outcomes[PROCESSORS_MAX][2];
typedef bool verdict_fn(const struct cell *c, const outcomes r);
static bool both_zero(const struct cell *c, const outcomes r) { return !r[0][0] && !r[1][0]; }
static bool not_forwarded(const struct cell *c, const outcomes r) { return r[0][1] != 1 || r[1][1] != 1; }
static bool message_lost(const struct cell *c, const outcomes r) { return r[1][0] && !r[1][1]; }
static bool both_one(const struct cell *c, const outcomes r) { return r[0][0] && r[1][0]; }
static bool backwards(const struct cell *c, const outcomes r) { return r[1][0] > r[1][1]; }
static bool different_orders(const struct cell *c, const outcomes r) { return r[2][0] && !r[2][1] && r[3][0] && !r[3][1]; }
static bool not_causal(const struct cell *c, const outcomes r) { return r[1][0] && r[2][0] && !r[2][1]; }
static bool crossed(const struct cell *c, const outcomes r) { return c->x == 1 && c->y == 1; }
static bool overtaken(const struct cell *c, const outcomes r) { return r[1][0] == 1 && c->x == 2; }
static bool swapped(const struct cell *c, const outcomes r) { return r[0][0] == 2 && r[1][0] == 1; }

static const struct litmus {
    const char *name;
    verdict_fn *forbidden;
    bool allowed; /* may happen: counted only */
    void (*part[PROCESSORS_MAX])(unsigned number, uint32_t (*r)[2]);
} tests[] = {
    {"store buffering", both_zero, true, {x_then_read_y, y_then_read_x}},
    {"store buffering, MFENCE", both_zero, false, {x_mfence_read_y, y_mfence_read_x}},
    {"store buffering, locked instructions", both_zero, false, {x_locked_read_y, y_locked_read_x}},
    {"store buffering, XCHG", both_zero, false, {x_xchg_read_y, y_xchg_read_x}},
    {"store buffering, CPUID", both_zero, false, {x_cpuid_read_y, y_cpuid_read_x}},
    {"a processor sees its own stores", not_forwarded, false, {x_forward_read_y, y_forward_read_x}},
    {"message passing", message_lost, false, {x_then_y, read_y_then_x}},
    {"message passing, PUSH and ADD", message_lost, false, {push_x_then_y, read_y_then_x}},
    {"message passing, vectors", message_lost, false, {vector_x_then_y, vector_read_y_then_x}},
    {"message passing, string instructions", message_lost, false, {string_x_then_y, string_read_y_then_x}},
    {"message passing, read-modify-writes", message_lost, false, {locked_x_then_y, read_y_then_x}},
    {"load buffering", both_one, false, {read_x_write_y, read_y_write_x}},
    {"reads of one place in order", backwards, false, {x_twice, read_x_twice}},
    {"writes across each other (2+2W)", crossed, false, {x1_y2, y1_x2}},
    {"a read and a write after it (S)", overtaken, false, {x2_y1, read_y_write_x}},
    {"writes of one place, read back", swapped, false, {write_1_read, write_2_read}},
    {"causality over three processors (WRC)", not_causal, false, {x_is_1, read_x_write_y, read_y_then_x}},
    {"independent writes are seen in one order (IRIW)", different_orders, false, {x_is_1, y_is_1, read_x_then_y, read_y_then_x}},
};
static const struct litmus *litmus;

static void litmus_part(unsigned number)
{
    processors_meet(parts);
    litmus->part[number](number, results[number]);
}

static void test_litmus(void)
{
    for (unsigned t = 0; t < sizeof tests / sizeof *tests; t++) {
        litmus = &tests[t];
        unsigned seen = 0;
        parts = 0;
        while (parts < PROCESSORS_MAX && litmus->part[parts])
            parts++;
        if (parts > processors) {
            skip(litmus->name, "too few processors");
            continue;
        }
        bool finished = true;
        for (unsigned batch = 0; batch < BATCHES && finished; batch++) {
            for (unsigned n = 0; n < CELLS; n++)
                cells[n].x = cells[n].y = 0;
            for (unsigned n = 0; n < parts; n++)
                progress[n].cells = 0;
            finished = processors_run(litmus_part, parts, 5000);
            for (unsigned n = 0; n < CELLS; n++) {
                outcomes r;
                for (unsigned p = 0; p < parts; p++)
                    memcpy(r[p], results[p][n], sizeof r[p]);
                seen += litmus->forbidden(&cells[n], (const uint32_t(*)[2])r);
            }
        }
        check(finished && (litmus->allowed || !seen), "%s (%u)", litmus->name, seen);
    }
}

/* ---- accesses in one piece ---- */

static uint8_t pieces[256] __attribute__((aligned(64)));
static volatile unsigned torn;
static volatile bool stop;
static unsigned piece_bytes, piece_at;

static void write_pieces(void)
{
    uint8_t *p = pieces + piece_at;
    for (unsigned n = 0; n < 20000; n++) {
        uint64_t v = n & 1 ? ~0ull : 0;
        switch (piece_bytes) {
        case 2:
            *(volatile uint16_t *)p = (uint16_t)v;
            break;
        case 4:
            *(volatile uint32_t *)p = (uint32_t)v;
            break;
        case 8:
            *(volatile uint64_t *)p = v;
            break;
        default:
            asm_volatile("movq %0, %%xmm0; punpcklqdq %%xmm0, %%xmm0; movaps %%xmm0, (%1)" ::"r"(v), "r"(p) : "memory");
        }
    }
    stop = true;
}

static void read_pieces(void)
{
    uint8_t *p = pieces + piece_at;
    while (!stop) {
        uint64_t low = 0, high = 0, all = piece_bytes >= 8 ? ~0ull : (1ull << 8 * piece_bytes) - 1;
        switch (piece_bytes) {
        case 2:
            low = *(volatile uint16_t *)p;
            break;
        case 4:
            low = *(volatile uint32_t *)p;
            break;
        case 8:
            low = *(volatile uint64_t *)p;
            break;
        default:
            asm_volatile("movaps (%2), %%xmm0; movq %%xmm0, %0; psrldq $8, %%xmm0; movq %%xmm0, %1" : "=r"(low), "=r"(high) : "r"(p) : "memory");
            torn += low != high;
        }
        torn += low != 0 && low != all;
    }
}

static void pieces_part(unsigned number)
{
    processors_meet(2);
    if (number)
        read_pieces();
    else
        write_pieces();
}

static void test_pieces(void)
{
    static const struct {
        uint8_t bytes, at;
        const char *name;
    } cases[] = {{2, 2, "2 bytes"}, {4, 4, "4 bytes"}, {8, 8, "8 bytes"}, {2, 1, "2 bytes, misaligned in a cache line"}, {4, 61 - 2, "4 bytes, the same"},
                 {8, 50, "8 bytes, the same"}, {16, 16, "16 bytes, aligned"}};
    for (unsigned n = 0; n < sizeof cases / sizeof *cases; n++) {
        if (cases[n].bytes == 16 && !(cpuid(1, 0).c & 1u << 28))
            continue; /* promised with AVX only: SDM vol. 3, 8.1.1 */
        piece_bytes = cases[n].bytes;
        piece_at = cases[n].at;
        torn = 0;
        stop = false;
        memset(pieces, 0, sizeof pieces);
        bool finished = processors_run(pieces_part, 2, 5000);
        check(finished && !torn, "in one piece: %s (%u torn)", cases[n].name, torn);
    }
}

/* ---- locked read-modify-writes ---- */

#define SPLIT_AREA 0xb000000000ull
static uint8_t counters[1024] __attribute__((aligned(64)));
static uint8_t *counter;
static unsigned counts;
static void (*bump)(uint8_t *at);

static void by_inc(uint8_t *at) { asm_volatile("lock incl (%0)" ::"r"(at) : "memory", "cc"); }
static void by_inc64(uint8_t *at) { asm_volatile("lock incq (%0)" ::"r"(at) : "memory", "cc"); }
static void by_inc16(uint8_t *at) { asm_volatile("lock incw (%0)" ::"r"(at) : "memory", "cc"); }
static void by_add(uint8_t *at) { asm_volatile("lock addl $1, (%0)" ::"r"(at) : "memory", "cc"); }
static void by_sub(uint8_t *at) { asm_volatile("lock subq %1, (%0)" ::"r"(at), "r"(-1l) : "memory", "cc"); }
static void by_adc(uint8_t *at) { asm_volatile("stc; lock adcl $0, (%0)" ::"r"(at) : "memory", "cc"); }
static void by_xadd(uint8_t *at) { uint32_t one = 1; asm_volatile("lock xaddl %0, (%1)" : "+r"(one) : "r"(at) : "memory", "cc"); }
static void by_xadd64(uint8_t *at) { uint64_t one = 1; asm_volatile("lock xaddq %0, (%1)" : "+r"(one) : "r"(at) : "memory", "cc"); }
static void by_cmpxchg(uint8_t *at)
{
    uint32_t old = *(volatile uint32_t *)at, seen;
    do {
        seen = old;
        asm_volatile("lock cmpxchgl %2, (%1)" : "+a"(old) : "r"(at), "r"(seen + 1) : "memory", "cc");
    } while (old != seen);
}
static void by_cmpxchg8b(uint8_t *at)
{
    uint32_t low = ((volatile uint32_t *)at)[0], high = ((volatile uint32_t *)at)[1];
    bool done;
    do {
        uint64_t sum = ((uint64_t)high << 32 | low) + 1;
        asm_volatile("lock cmpxchg8b (%3)" : "+a"(low), "+d"(high), "=@ccz"(done) : "D"(at), "b"((uint32_t)sum), "c"((uint32_t)(sum >> 32)) : "memory");
    } while (!done);
}
static void by_cmpxchg16b(uint8_t *at)
{
    uint64_t low = ((volatile uint64_t *)at)[0], high = ((volatile uint64_t *)at)[1];
    bool done;
    do {
        uint64_t new_low = low + 1, new_high = high - 1;
        asm_volatile("lock cmpxchg16b (%3)" : "+a"(low), "+d"(high), "=@ccz"(done) : "D"(at), "b"(new_low), "c"(new_high) : "memory");
    } while (!done);
}
static void by_neg(uint8_t *at) /* -(-n) + 1 by the complement: ~(-n) is n - 1 */
{
    asm_volatile("lock subl $-1, (%0); lock notl 64(%0); lock negl 128(%0)" ::"r"(at) : "memory", "cc");
}
static void by_xchg(uint8_t *at) /* a lock at 64, held while the counter is changed */
{
    uint32_t taken = 1;
    do
        asm_volatile("xchgl %0, 64(%1)" : "+r"(taken) : "r"(at) : "memory");
    while (taken && (cpu_pause(), true));
    ++*(volatile uint32_t *)at;
    asm_volatile("movl $0, 64(%0)" ::"r"(at) : "memory");
}
static void by_bts(uint8_t *at) /* a lock of one bit, far from the operand */
{
    bool was;
    do
        asm_volatile("lock btsl %2, (%1)" : "=@ccc"(was) : "r"(at), "r"(64 * 8 + 5) : "memory");
    while (was && (cpu_pause(), true));
    ++*(volatile uint32_t *)at;
    asm_volatile("lock btrl %1, (%0)" ::"r"(at), "r"(64 * 8 + 5) : "memory", "cc");
}

static const struct counting {
    const char *name;
    void (*bump)(uint8_t *at);
    unsigned bytes, alignment;
} countings[] = {
    {"LOCK INC", by_inc, 4, 1},         {"LOCK INC of 8 bytes", by_inc64, 8, 1}, {"LOCK INC of 2 bytes", by_inc16, 2, 1}, {"LOCK ADD", by_add, 4, 1},
    {"LOCK SUB", by_sub, 8, 1},         {"LOCK ADC", by_adc, 4, 1},              {"LOCK XADD", by_xadd, 4, 1},           {"LOCK XADD of 8 bytes", by_xadd64, 8, 1},
    {"LOCK CMPXCHG", by_cmpxchg, 4, 1}, {"LOCK CMPXCHG8B", by_cmpxchg8b, 8, 1},  {"LOCK CMPXCHG16B", by_cmpxchg16b, 8, 16}, {"LOCK NOT, NEG", by_neg, 4, 4},
    {"a lock by XCHG", by_xchg, 4, 4},  {"a lock by LOCK BTS", by_bts, 4, 4},
};

static void count_part(unsigned number)
{
    processors_meet(processors);
    for (unsigned n = 0; n < counts; n++)
        bump(counter);
}

static void test_counting(void)
{
    /* Two pages that are not neighbours in memory. */
    uint8_t *pages = pages_allocate(3), *split = (uint8_t *)SPLIT_AREA;
    page_map(SPLIT_AREA, (uintptr_t)pages | PG_P | PG_W);
    page_map(SPLIT_AREA + PAGE, ((uintptr_t)pages + 2 * PAGE) | PG_P | PG_W);
    for (unsigned n = 0; n < sizeof countings / sizeof *countings; n++) {
        const struct counting *c = &countings[n];
        const struct place {
            const char *name;
            uint8_t *at;
            unsigned alignment;
        } places[] = {{"aligned", counters + 64, 64}, {"misaligned", counters + 65, 1}, {"across a cache line", counters + 127, 1},
                      {"across pages", split + PAGE - 1, 1}};
        for (unsigned k = 0; k < sizeof places / sizeof *places; k++) {
            if (places[k].alignment < c->alignment)
                continue;
            memset(counters, 0, sizeof counters);
            memset(split + PAGE - 16, 0, 32);
            counter = places[k].at;
            bump = c->bump;
            counts = k < 2 ? COUNTS : SPLIT_COUNTS;
            bool finished = processors_run(count_part, processors, 10000);
            uint64_t value = 0;
            memcpy(&value, counter, c->bytes);
            check(finished && value == counts * processors, "%s, %s: %u processors count (%llx)", c->name, places[k].name, processors, (unsigned long long)value);
        }
    }
}

/* ---- locks ---- */

static volatile unsigned ticket_next __attribute__((aligned(64))), ticket_now __attribute__((aligned(64)));
static volatile unsigned sequence __attribute__((aligned(64)));
static volatile uint64_t guarded[8] __attribute__((aligned(64)));
static volatile unsigned inconsistent, wants[2], turn;

static void ticket_part(unsigned number)
{
    processors_meet(processors);
    for (unsigned n = 0; n < 300; n++) {
        unsigned mine = 1;
        asm_volatile("lock xaddl %0, %1" : "+r"(mine), "+m"(ticket_next)::"memory", "cc");
        while (ticket_now != mine)
            cpu_pause();
        for (unsigned k = 0; k < 8; k++)
            guarded[k]++;
        asm_volatile("" ::: "memory");
        ticket_now++;
    }
}

/* Needs stores to be seen before later loads. */
static void peterson_part(unsigned number)
{
    unsigned other = number ^ 1;
    processors_meet(2);
    for (unsigned n = 0; n < 3000; n++) {
        wants[number] = 1;
        turn = other;
        asm_volatile("mfence" ::: "memory");
        while (wants[other] && turn == other)
            cpu_pause();
        guarded[0]++;
        guarded[1]++;
        asm_volatile("" ::: "memory");
        wants[number] = 0;
    }
}

static void sequence_part(unsigned number)
{
    processors_meet(processors);
    if (number == 0) {
        for (unsigned n = 0; n < 20000; n++) {
            sequence++;
            for (unsigned k = 0; k < 8; k++)
                guarded[k] = n * 3 + k;
            sequence++;
        }
        stop = true;
        return;
    }
    while (!stop) {
        unsigned before = sequence;
        uint64_t value[8];
        for (unsigned k = 0; k < 8; k++)
            value[k] = guarded[k];
        if (before & 1 || sequence != before)
            continue;
        for (unsigned k = 1; k < 8; k++)
            inconsistent += value[k] != value[0] + k;
    }
}

static void test_locks(void)
{
    bool finished = processors_run(ticket_part, processors, 10000);
    check(finished && guarded[0] == 300 * processors && guarded[7] == 300 * processors, "a ticket lock (%u)", (unsigned)guarded[0]);
    memset((void *)guarded, 0, sizeof guarded);
    finished = processors_run(peterson_part, 2, 10000);
    check(finished && guarded[0] == 6000 && guarded[1] == 6000, "Peterson's lock (%u)", (unsigned)guarded[0]);
    stop = false;
    for (unsigned k = 0; k < 8; k++)
        guarded[k] = k;
    finished = processors_run(sequence_part, processors, 10000);
    check(finished && !inconsistent, "a sequence lock (%u)", inconsistent);
}

void test_main(void)
{
    random_seed();
    processors = processors_start(4);
    if (processors < 2) {
        skip("memory order", "one processor");
        return;
    }
    print("# %u processors\n", processors);
    test_litmus();
    test_pieces();
    test_counting();
    test_locks();
}
