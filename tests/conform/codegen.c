/*
 * What JIT compilers, loaders and kernels do to code: immediates patched ahead of and behind the running instruction, data beside code, functions made at one
 * address and at ever new ones, W^X by page tables, two and a thousand mappings of one page, pages remapped under the same address, address spaces with
 * different code at one address (with PCIDs and without), every kind of store as the writer, jumps between pages that are written, another processor as the writer, also of loops that
 * it ends so. Run with two processors.
 * SDM vol. 3, 4.10 (what must be invalidated) and 8.1.3, 11.6 (self- and cross-modifying code).
 */
#include "runtime/probe.h"
#include "runtime/processors.h"

#define AREA 0x9000000000ull
#define OTHER_AREA 0xffffb00000000000ull
#define RWX (PG_P | PG_W | PG_U)

static uint8_t *code; /* 4 pages, one to one */
/* Pairs of pages that take turns: one that is written too often may not be run like code any more. */
#define PAIRS 1024u
static uint8_t *pairs;

static uint8_t *fresh_pair(void)
{
    static unsigned next;
    return pairs + next++ % PAIRS * 2 * PAGE;
}

static uint64_t physical(const void *p)
{
    return (uintptr_t)p;
}

static uint64_t call_at(uint64_t va)
{
    uint64_t value;
    asm_volatile("call *%1" : "=a"(value) : "r"(va) : "memory", "cc", "rcx", "rdx", "rsi", "rdi", "r8");
    return value;
}

/* mov eax, value; ret */
static void put_function(uint8_t *at, uint32_t value)
{
    at[0] = 0xb8;
    memcpy(at + 1, &value, 4);
    at[5] = 0xc3;
}

/* ---- random programs that patch themselves ---- */

#define SLOTS 24u
#define SLOT_BYTES 8u

/*
 * Slots of 8 bytes: add eax, imm32 and no-operations; or movb $v, into an immediate byte of any slot. The model runs the same on its own copy of the immediates.
 * The whole is a loop, so that patches go backwards too.
 */
struct patching {
    bool patches[SLOTS];
    uint8_t target[SLOTS], byte[SLOTS], value[SLOTS];
    uint8_t immediate[SLOTS][4];
};

static void patching_make(struct patching *p, uint8_t *at, unsigned rounds)
{
    static const uint8_t head[] = {0x31, 0xc0, 0xb9}, tail[] = {0xff, 0xc9, 0x0f, 0x85}, add[] = {0x05, 0, 0, 0, 0, 0x90, 0x90, 0x90},
                         store[] = {0xc6, 0x05, 0, 0, 0, 0, 0, 0x90};
    memcpy(at, head, sizeof head); /* xor eax, eax; mov ecx, rounds */
    memcpy(at + 3, &rounds, 4);
    uint8_t *slots = at + 7;
    for (unsigned n = 0; n < SLOTS; n++) {
        uint8_t *s = slots + n * SLOT_BYTES;
        p->patches[n] = random_below(3) == 0;
        if (p->patches[n]) {
            do
                p->target[n] = (uint8_t)(random_below(3) ? (n + 1 + random_below(3)) % SLOTS : random_below(SLOTS));
            while (p->target[n] == n);
            p->byte[n] = (uint8_t)random_below(4);
            p->value[n] = (uint8_t)random64();
            int32_t displacement = (int32_t)(((int)p->target[n] - (int)n) * (int)SLOT_BYTES + 1 + p->byte[n] - 7);
            memcpy(s, store, sizeof store);
            memcpy(s + 2, &displacement, 4);
            s[6] = p->value[n];
        } else {
            uint32_t immediate = (uint32_t)random64();
            memcpy(s, add, sizeof add);
            memcpy(s + 1, &immediate, 4);
            memcpy(p->immediate[n], &immediate, 4);
        }
    }
    for (unsigned n = 0; n < SLOTS; n++) /* only additions may be patched */
        if (p->patches[n] && p->patches[p->target[n]]) {
            static const uint8_t nop[] = {0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0};
            memcpy(slots + n * SLOT_BYTES, nop, sizeof nop);
            p->target[n] = 0xff;
        }
    uint8_t *end = slots + SLOTS * SLOT_BYTES;
    int32_t back = -(int32_t)(SLOTS * SLOT_BYTES + sizeof tail + 4);
    memcpy(end, tail, sizeof tail); /* dec ecx; jnz; ret */
    memcpy(end + sizeof tail, &back, 4);
    end[sizeof tail + 4] = 0xc3;
}

static uint32_t patching_model(struct patching *p, unsigned rounds)
{
    uint32_t sum = 0;
    for (; rounds; rounds--)
        for (unsigned n = 0; n < SLOTS; n++) {
            uint32_t immediate;
            memcpy(&immediate, p->immediate[n], 4);
            if (!p->patches[n])
                sum += immediate;
            else if (p->target[n] != 0xff)
                p->immediate[p->target[n]][p->byte[n]] = p->value[n];
        }
    return sum;
}

static void test_patching(void)
{
    static struct patching p;
    unsigned good = 0, count = 0;
    for (unsigned n = 0; n < 1500; n++) {
        unsigned rounds = 1 + random_below(4);
        uint8_t *at = fresh_pair() + (n % 3 == 0 ? 4096 - 100 : random_below(4096)); /* across two pages now and then */
        patching_make(&p, at, rounds);
        for (unsigned again = 0; again < 3; again++, count++)
            good += call_at(physical(at)) == patching_model(&p, rounds);
    }
    expect_eq(good, count, "1500 random programs that patch themselves, three times each");
}

/* ---- data beside code ---- */

extern uint8_t beside[], beside_data[], beside_end[];
__asm__(".pushsection .text\n"
        "beside: mov $50000, %ecx\n lea beside_data(%rip), %rdx\n"
        "1: incq beside_data(%rip)\n addl %ecx, 8(%rdx)\n mov %cl, 16(%rdx)\n push 16(%rdx)\n pop 24(%rdx)\n dec %ecx\n jnz 1b\n"
        " mov beside_data(%rip), %rax\n add 8(%rdx), %rax\n add 24(%rdx), %rax\n ret\n"
        "beside_data: .quad 0, 0, 0, 0\n beside_end:\n"
        ".popsection\n");

static void test_data_beside(void)
{
    uint8_t *at = code + 2048;
    memcpy(at, beside, (size_t)(beside_end - beside));
    uint64_t first = call_at(physical(at)), second = call_at(physical(at));
    /* The counter, the sum of 1 to 50000 modulo 2^32, the last byte. */
    expect_eq(first, 50000 + 1250025000u + 1, "200,000 stores right behind the loop that makes them");
    expect_eq(second, 100000 + 2500050000u + 1, "and again");
    /* The other way round: code is called, data beside it is written from elsewhere. */
    put_function(code + 100, 77);
    volatile uint64_t *counter = (volatile uint64_t *)(code + 128);
    *counter = 0;
    unsigned good = 0;
    for (unsigned n = 0; n < 20000; n++) {
        ++*counter;
        good += call_at(physical(code + 100)) == 77;
    }
    check(good == 20000 && *counter == 20000, "calls and stores to their page in turn (%u)", good);
}

/* ---- many functions ---- */

static void test_generations(void)
{
    unsigned good = 0;
    for (unsigned n = 0; n < 10000; n++) {
        uint8_t *p = code + 512;
        switch (n % 4) { /* of different lengths and shapes */
        case 0:
            put_function(p, n);
            break;
        case 1: /* xor eax, eax; add eax, n; ret */
            p[0] = 0x31, p[1] = 0xc0, p[2] = 0x05;
            memcpy(p + 3, &n, 4);
            p[7] = 0xc3;
            break;
        case 2: /* push n; pop rax; ret */
            p[0] = 0x68;
            memcpy(p + 1, &n, 4);
            p[5] = 0x58, p[6] = 0xc3;
            break;
        default: /* jmp over; mov eax, n; ret */
            p[0] = 0xeb, p[1] = 3, p[2] = p[3] = p[4] = 0xcc;
            put_function(p + 5, n);
        }
        good += call_at(physical(p)) == n;
    }
    expect_eq(good, 10000, "10,000 functions at one address");
    uint8_t *area = pages_allocate(512);
    good = 0;
    for (unsigned n = 0; n < 30000; n++) {
        uint8_t *p = area + n * 64 + (n * 7) % 48;
        put_function(p, n);
        good += call_at(physical(p)) == n;
    }
    for (unsigned n = 0; n < 30000; n += 13)
        good += call_at(physical(area + n * 64 + (n * 7) % 48)) == n;
    expect_eq(good, 30000 + 30000 / 13 + 1, "30,000 functions at new addresses, and some of them again");
    /* Freed, data, code again. */
    good = 0;
    for (unsigned n = 0; n < 300; n++) {
        uint8_t *p = area + n % 5 * PAGE;
        memset(p, (int)(n & 0xff), PAGE);
        uint64_t sum = 0;
        for (unsigned k = 0; k < PAGE / 8; k += 16)
            sum += ((volatile uint64_t *)p)[k]++;
        put_function(p + n, n + 9);
        good += call_at(physical(p + n)) == n + 9 && sum == 32 * 0x0101010101010101ull * (n & 0xff);
    }
    expect_eq(good, 300, "pages used as data and as code in turn");
}

/* ---- page tables ---- */

static void test_rights(void)
{
    unsigned good = 0;
    uint8_t *at = (uint8_t *)AREA;
    for (unsigned n = 0; n < 500; n++) {
        page_map(AREA, physical(code) | PG_P | PG_W | PG_NX);
        put_function(at + 40, n);
        if (n % 16 == 0)
            good += TRY(call_at(AREA + 40)) == PF && trap.error == (PF_P | PF_I);
        page_map(AREA, physical(code) | PG_P);
        good += call_at(AREA + 40) == n;
        if (n % 16 == 0)
            good += TRY(*(volatile uint8_t *)(at + 41) = 1) == PF && trap.error == (PF_P | PF_W);
    }
    expect_eq(good, 500 + 2 * 32, "500 flips between writable and executable");
}

/* Returns the address that it runs at, by LEA and by CALL, plus what lies in the page after it: three numbers added. */
extern uint8_t where[], where_end[];
__asm__(".pushsection .text\n"
        "where: lea where(%rip), %rax\n call 1f\n1: pop %rdx\n add %rdx, %rax\n add where + 4096(%rip), %rax\n incq where + 4096 + 8(%rip)\n ret\n where_end:\n"
        ".popsection\n");
#define WHERE_CALL 12u /* offset of the return address of its CALL */

static void test_mappings(void)
{
    enum { COUNT = 1000 };
    uint8_t *data = pages_allocate(16);
    memcpy(code, where, (size_t)(where_end - where));
    for (unsigned n = 0; n < 16; n++)
        *(uint64_t *)(data + n * PAGE) = n * 1000;
    for (unsigned n = 0; n < COUNT; n++) {
        uint64_t va = AREA + 0x10000000ull + n * 2 * PAGE;
        page_map(va, physical(code) | RWX);
        page_map(va + PAGE, physical(data + n % 16 * PAGE) | RWX);
    }
    unsigned good = 0;
    for (unsigned n = 0; n < 4 * COUNT; n++) {
        unsigned k = n < COUNT ? n : random_below(COUNT);
        uint64_t va = AREA + 0x10000000ull + k * 2 * PAGE;
        good += call_at(va) == 2 * va + WHERE_CALL + k % 16 * 1000;
    }
    expect_eq(good, 4 * COUNT, "one page run at 1000 addresses, with its data behind each");
    uint64_t runs = 0;
    for (unsigned n = 0; n < 16; n++)
        runs += *(uint64_t *)(data + n * PAGE + 8);
    expect_eq(runs, 4 * COUNT, "and its stores went there");
    good = 0;
    for (unsigned n = 0; n < 2000; n++) { /* changed by way of one address, run at two others */
        uint64_t writer = AREA + 0x10000000ull + random_below(COUNT) * 2 * PAGE, runner = AREA + 0x10000000ull + random_below(COUNT) * 2 * PAGE;
        put_function((uint8_t *)writer + 1024, n);
        good += call_at(runner + 1024) == n;
        good += call_at(physical(code) + 1024) == n;
    }
    expect_eq(good, 4000, "written at one address, run at another");
}

static void test_second_page(void)
{
    static const uint8_t head[] = {0x48, 0xb8}; /* mov rax, imm64; ret */
    unsigned good = 0;
    for (unsigned inside = 1; inside <= 10; inside++) { /* bytes in the first page */
        uint8_t *pages = pages_allocate(3);
        uint8_t function[11];
        memcpy(function, head, 2);
        memset(function + 2, 0x11, 8);
        function[10] = 0xc3;
        memcpy(pages + PAGE - inside, function, inside);
        for (unsigned k = 1; k <= 2; k++) {
            memset(function + 2, (int)(k * 0x11), 8);
            memcpy(pages + k * PAGE, function + inside, sizeof function - inside);
        }
        page_map(AREA, physical(pages) | RWX);
        for (unsigned n = 0; n < 50; n++) {
            unsigned k = 1 + (n & 1), mixed = inside > 2 ? inside - 2 : 0;
            page_map(AREA + PAGE, (physical(pages) + k * PAGE) | RWX);
            uint64_t want = k * 0x1111111111111111ull;
            for (unsigned byte = 0; byte < mixed && byte < 8; byte++)
                want = (want & ~(0xffull << 8 * byte)) | 0x11ull << 8 * byte;
            good += call_at(AREA + PAGE - inside) == want;
        }
        for (unsigned n = 0; inside < 10 && n < 30; n++) { /* only its end is written */
            pages[2 * PAGE + 9 - inside] = (uint8_t)(n / 3);
            good += call_at(AREA + PAGE - inside) >> 56 == n / 3;
        }
        page_map(AREA + PAGE, 0);
        good += TRY(call_at(AREA + PAGE - inside)) == PF && trap.cr2 == AREA + PAGE && trap.ip == AREA + PAGE - (inside == 10 ? 0 : inside);
    }
    expect_eq(good, 10 * 51 + 9 * 30, "an instruction across two pages, the second one remapped and written");
}

static void test_remapping(void)
{
    unsigned good = 0;
    for (unsigned n = 0; n < 4; n++) {
        put_function(code + n * PAGE, n + 100);
        put_function(code + n * PAGE + 64, n + 200);
    }
    for (unsigned n = 0; n < 4000; n++) {
        unsigned k = random_below(4);
        page_map(AREA, physical(code + k * PAGE) | RWX);
        good += call_at(AREA) == k + 100 && call_at(AREA + 64) == k + 200;
    }
    expect_eq(good, 4000, "another page of code at one address after INVLPG");
    /* By way of the page directory, and a loop that remaps itself: what follows the INVLPG comes from the new page. */
    static const uint8_t self[] = {0x48, 0x89, 0x37, 0x0f, 0x01, 0x3a, 0xb8, 0, 0, 0, 0, 0xc3}; /* mov [rdi], rsi; invlpg [rdx]; mov eax, n; ret */
    for (unsigned n = 0; n < 2; n++) {
        memcpy(code + n * PAGE, self, sizeof self);
        code[n * PAGE + 7] = (uint8_t)(n + 50);
    }
    good = 0;
    for (unsigned n = 0; n < 1000; n++) {
        page_map(AREA, physical(code + (n & 1) * PAGE) | RWX);
        uint64_t value, next = physical(code + (~n & 1) * PAGE) | RWX;
        asm_volatile("call *%1" : "=a"(value) : "r"(AREA), "D"(page_entry(boot_pml4, AREA)), "S"(next), "d"(AREA) : "memory");
        good += value == 50 + (~n & 1);
    }
    expect_eq(good, 1000, "code that remaps its own page goes on in the new one");
}

/* ---- address spaces ---- */

static uint64_t space_make(unsigned n)
{
    uint64_t *pml4 = pages_allocate(1);
    memcpy(pml4, boot_pml4, PAGE);
    pml4[AREA >> 39 & 511] = pml4[OTHER_AREA >> 39 & 511] = 0;
    uint8_t *page = pages_allocate(1);
    put_function(page, n + 1000);
    *page_entry(pml4, AREA) = physical(page) | RWX;
    *page_entry(pml4, OTHER_AREA) = physical(page) | RWX;
    return physical(pml4);
}

static void test_spaces(void)
{
    enum { SPACES = 6 };
    uint64_t spaces[SPACES], keep = read_cr3();
    for (unsigned n = 0; n < SPACES; n++)
        spaces[n] = space_make(n);
    unsigned good = 0;
    for (unsigned n = 0; n < 3000; n++) {
        unsigned k = random_below(SPACES);
        write_cr3(spaces[k]);
        good += call_at(AREA) == k + 1000 && call_at(OTHER_AREA) == k + 1000;
    }
    expect_eq(good, 3000, "six address spaces with different code at one address");
    write_cr3(keep);
    if (!(cpuid(1, 0).c & 1u << 17)) {
        skip("the same with PCIDs", "not offered");
        return;
    }
    write_cr4(read_cr4() | CR4_PCIDE);
    good = 0;
    for (unsigned n = 0; n < 3000; n++) {
        unsigned k = random_below(SPACES);
        bool keep_entries = n >= 100 && random_below(4);
        write_cr3(spaces[k] | (k + 1) | (uint64_t)keep_entries << 63);
        good += call_at(AREA) == k + 1000 && call_at(OTHER_AREA) == k + 1000;
        if (n % 64 == 0) { /* its code changes meanwhile */
            put_function((uint8_t *)AREA, k + 1000);
            put_function((uint8_t *)AREA + 32, n);
            good += call_at(OTHER_AREA + 32) == n;
        }
    }
    write_cr3(keep);
    write_cr4(read_cr4() & ~CR4_PCIDE);
    expect_eq(good, 3000 + 3000 / 64 + 1, "the same with PCIDs, without flushing");
}

/* ---- writers ---- */

static uint8_t image[4096] __attribute__((aligned(64))); /* what is to be written */

static void by_byte(uint8_t *to) { for (unsigned n = 0; n < 16; n++) asm_volatile("movb %1, %0" : "=m"(to[n]) : "q"(image[n])); }
static void by_word(uint8_t *to) { for (unsigned n = 0; n < 16; n += 8) *(volatile uint64_t *)(to + n) = *(uint64_t *)(image + n); }
static void by_xchg(uint8_t *to) { uint64_t v; for (unsigned n = 0; n < 16; n += 8) { v = *(uint64_t *)(image + n); asm_volatile("xchg %0, (%1)" : "+r"(v) : "r"(to + n) : "memory"); } }
static void by_lock_add(uint8_t *to) { for (unsigned n = 0; n < 16; n += 4) asm_volatile("lock addl %0, (%1)" ::"r"(*(uint32_t *)(image + n) - *(uint32_t *)(to + n)), "r"(to + n) : "memory", "cc"); }
static void by_xor(uint8_t *to) { for (unsigned n = 0; n < 16; n += 4) asm_volatile("xorl %0, (%1)" ::"r"(*(uint32_t *)(image + n) ^ *(uint32_t *)(to + n)), "r"(to + n) : "memory", "cc"); }
static void by_cmpxchg(uint8_t *to) { for (unsigned n = 0; n < 16; n += 8) { uint64_t old = *(uint64_t *)(to + n); asm_volatile("lock cmpxchg %1, (%2)" : "+a"(old) : "r"(*(uint64_t *)(image + n)), "r"(to + n) : "memory", "cc"); } }
static void by_cmpxchg16b(uint8_t *to)
{
    uint64_t low = *(uint64_t *)to, high = *(uint64_t *)(to + 8);
    asm_volatile("lock cmpxchg16b (%2)" : "+a"(low), "+d"(high) : "D"(to), "b"(*(uint64_t *)image), "c"(*(uint64_t *)(image + 8)) : "memory", "cc");
}
static void by_movs(uint8_t *to) { memcpy(to, image, 16); }
static void by_movsq(uint8_t *to) { uint8_t *from = image; reg_t count = 2; asm_volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(count)::"memory"); }
static void by_movs_down(uint8_t *to) { uint8_t *from = image + 15; reg_t count = 16; to += 15; asm_volatile("std; rep movsb; cld" : "+D"(to), "+S"(from), "+c"(count)::"memory"); }
static void by_stos(uint8_t *to) { for (unsigned n = 0; n < 16; n++) { uint8_t *p = to + n; reg_t one = 1; asm_volatile("rep stosb" : "+D"(p), "+c"(one) : "a"(image[n]) : "memory"); } }
static void by_push(uint8_t *to) { asm_volatile("mov %%rsp, %%rcx; lea 16(%0), %%rsp; push %1; push %2; mov %%rcx, %%rsp" ::"r"(to), "r"(*(uint64_t *)(image + 8)), "r"(*(uint64_t *)image) : "rcx", "memory"); }
static void by_pop(uint8_t *to) { asm_volatile("push %1; push %2; popq (%0); popq 8(%0)" ::"r"(to), "r"(*(uint64_t *)(image + 8)), "r"(*(uint64_t *)image) : "memory"); }
static void by_movnti(uint8_t *to) { for (unsigned n = 0; n < 16; n += 8) asm_volatile("movnti %0, (%1)" ::"r"(*(uint64_t *)(image + n)), "r"(to + n) : "memory"); }
static void by_movups(uint8_t *to) { asm_volatile("movups (%0), %%xmm0; movups %%xmm0, (%1)" ::"r"(image), "r"(to) : "memory"); }
static void by_movaps(uint8_t *to) { asm_volatile("movaps (%0), %%xmm9; movaps %%xmm9, (%1)" ::"r"(image), "r"(to) : "memory"); }
static void by_movhps(uint8_t *to) { asm_volatile("movups (%0), %%xmm0; movhps %%xmm0, 8(%1); movlps %%xmm0, (%1)" ::"r"(image), "r"(to) : "memory"); }
static void by_movntdq(uint8_t *to) { asm_volatile("movups (%0), %%xmm0; movntdq %%xmm0, (%1); sfence" ::"r"(image), "r"(to) : "memory"); }
static void by_maskmov(uint8_t *to) { asm_volatile("movups (%0), %%xmm0; pcmpeqb %%xmm1, %%xmm1; maskmovdqu %%xmm1, %%xmm0; sfence" ::"r"(image), "D"(to) : "memory"); }
static void by_mmx(uint8_t *to) { asm_volatile("movq (%0), %%mm0; movq %%mm0, (%1); movq 8(%0), %%mm1; movntq %%mm1, 8(%1); emms; sfence" ::"r"(image), "r"(to) : "memory"); }
static void by_x87(uint8_t *to) { asm_volatile("fninit; fildll (%0); fistpll (%1); fildll 8(%0); fistpll 8(%1)" ::"r"(image), "r"(to) : "memory"); }
static void by_ymm(uint8_t *to) { asm_volatile("vmovups (%0), %%ymm3; vmovups %%ymm3, (%1)" ::"r"(image), "r"(to) : "memory"); }
static void by_zmm(uint8_t *to) { asm_volatile("vmovups (%0), %%zmm3; vmovups %%zmm3, (%1)" ::"r"(image), "r"(to) : "memory"); }
static void by_fxsave(uint8_t *to)
{
    static uint8_t keep[512] __attribute__((aligned(16)));
    asm_volatile("fxsave (%1); movups (%0), %%xmm0; fxsave (%2)" ::"r"(image), "r"(keep), "r"(to - 160) : "memory");
}
static void by_call(uint8_t *to) /* a return address over code */
{
    by_movs(to);
    asm_volatile("mov %%rsp, %%rcx; lea 16(%0), %%rsp; call 1f; 1: mov %%rcx, %%rsp; movups (%1), %%xmm0; movups %%xmm0, (%0)" ::"r"(to), "r"(image) : "rcx", "memory");
}

static const struct writer {
    const char *name;
    void (*write)(uint8_t *to);
    uint64_t needs; /* XCR0 */
    bool aligned;
} writers[] = {
    {"bytes", by_byte, 0, false},           {"quadwords", by_word, 0, false},        {"XCHG", by_xchg, 0, false},       {"LOCK ADD", by_lock_add, 0, false},
    {"XOR", by_xor, 0, false},              {"CMPXCHG", by_cmpxchg, 0, false},       {"CMPXCHG16B", by_cmpxchg16b, 0, true}, {"REP MOVSB", by_movs, 0, false},
    {"REP MOVSQ", by_movsq, 0, false},      {"REP MOVSB downwards", by_movs_down, 0, false}, {"REP STOSB", by_stos, 0, false}, {"PUSH", by_push, 0, false},
    {"POP to memory", by_pop, 0, false},    {"MOVNTI", by_movnti, 0, false},         {"MOVUPS", by_movups, 0, false},   {"MOVAPS", by_movaps, 0, true},
    {"MOVHPS, MOVLPS", by_movhps, 0, false}, {"MOVNTDQ", by_movntdq, 0, true},       {"MASKMOVDQU", by_maskmov, 0, false}, {"MMX", by_mmx, 0, false},
    {"x87", by_x87, 0, false},              {"YMM", by_ymm, 4, false},               {"ZMM", by_zmm, 0xe0, false},      {"FXSAVE", by_fxsave, 0, true},
    {"CALL", by_call, 0, false},
};

static void test_writers(void)
{
    bool wide = simd_enable();
    for (unsigned n = 0; n < sizeof writers / sizeof *writers; n++) {
        const struct writer *w = &writers[n];
        if (w->needs && (!wide || (simd_features() & w->needs) != w->needs))
            continue;
        unsigned good = 0, count = 0;
        for (unsigned k = 0; k < 300; k++, count++) {
            uint8_t *to = fresh_pair() + (w->aligned ? 1024 + 16 * (k % 32) : k & 1 ? PAGE - 1 - k % 15 : 1024 + k); /* also across two pages */
            put_function(to + 4 * (k & 1), 0);
            call_at(physical(to) + 4 * (k & 1));
            memset(image, 0x90, 64);
            put_function(image + k % 8, k * 0x01010101);
            memset(image + 16, 0xcc, 48); /* behind it, for the wide ones */
            w->write(to);
            good += call_at(physical(to)) == (uint32_t)(k * 0x01010101);
        }
        check(good == count, "code written by %s (%u of %u)", w->name, good, count);
    }
}

/* ---- patched into a fault ---- */

static void test_patched_fault(void)
{
    unsigned good = 0;
    for (unsigned n = 0; n < 300; n++) {
        uint8_t *p = fresh_pair() + 300 + n;
        memset(p, 0x90, 40);
        put_function(p + 40, n);
        good += call_at(physical(p)) == n;
        p[20] = 0x0f, p[21] = 0x0b; /* ud2 */
        good += TRY(call_at(physical(p))) == UD && trap.ip == physical(p + 20);
        p[20] = 0xcc, p[21] = 0x90;
        good += TRY(call_at(physical(p))) == BP && trap.ip == physical(p + 21);
        p[20] = 0x90;
        good += call_at(physical(p)) == n;
    }
    expect_eq(good, 1200, "UD2 and INT3 patched in and out");
}

/* ---- jumps from page to page ---- */

/* Code with one direct transfer to `target`, which returns. */
static void put_transfer(uint8_t *at, unsigned kind, const uint8_t *target)
{
    static const uint8_t codes[][8] = {{0xe8}, {0xe9}, {0x39, 0xc0, 0x0f, 0x84}, {0x31, 0xc9, 0xff, 0xc1, 0x0f, 0x85}}; /* call; jmp; cmp, jz; xor, inc, jnz */
    static const uint8_t lengths[] = {1, 1, 4, 6};
    int32_t displacement = (int32_t)(target - (at + lengths[kind] + 4));
    memcpy(at, codes[kind], lengths[kind]);
    memcpy(at + lengths[kind], &displacement, 4);
    at[lengths[kind] + 4] = 0xc3;
}

/* Such a jump knows its target's code by heart sooner or later. */
static void test_other_page(void)
{
    unsigned good = 0;
    for (unsigned n = 0; n < 400; n++) {
        uint8_t *from = fresh_pair() + 512 + n, *to = fresh_pair() + 256;
        put_transfer(from, n % 4, to);
        page_map(AREA + n * PAGE, physical(to - 256) | RWX);
        for (unsigned k = 0; k < 6; k++) {
            put_function(k & 1 ? to : (uint8_t *)AREA + n * PAGE + 256, k * 1000 + n);
            for (unsigned again = 0; again < 1 + k % 3; again++)
                good += call_at(physical(from)) == k * 1000 + n;
        }
    }
    expect_eq(good, 400 * 12, "direct jumps into another page, whose code changes");
}

/* ---- one page in two modes ---- */

static void test_modes(void)
{
    /* 64-bit: inc rax twice. 32-bit: dec eax, inc eax, twice. */
    static const uint8_t bytes[] = {0x48, 0xff, 0xc0, 0x48, 0xff, 0xc0, 0xcd, USER_DONE};
    uint8_t *p = NULL;
    uint64_t keep = 0;
    unsigned good = 0;
    for (unsigned n = 0; n < 1000; n++) {
        if (n % 100 == 0) {
            if (p)
                page_map(physical(p), keep);
            p = fresh_pair() + 700;
            memcpy(p, bytes, sizeof bytes);
            keep = *page_entry(boot_pml4, physical(p));
            page_map(physical(p), keep | PG_U);
        }
        bool wide = random_below(2), user = random_below(2);
        struct entry entry = {.ip = physical(p), .cs = wide ? (user ? UCODE : KCODE) : user ? UCODE32 : KCODE32, .flags = 2 | (user ? user_flags : 0), .ss = user ? UDATA : KDATA,
                              .sp = (reg_t)user_stack, .ax = 1000};
        if (n % 10 == 0) { /* and changed in between */
            p[2] ^= 8;     /* inc and dec */
            p[5] ^= 8;
        }
        bool down = p[2] == 0xc8;
        (void)TRY(enter(&entry));
        uint64_t want = wide ? (down ? 998 : 1002) : down ? 996 : 1000;
        good += trap.vector == USER_DONE && trap.ax == want;
    }
    page_map(physical(p), keep);
    expect_eq(good, 1000, "the same bytes in 32-bit and 64-bit mode, ring 0 and ring 3");
}

static void test_end_of_ram(void)
{
    uint8_t *last = (uint8_t *)0x0ffff000, *keep = pages_allocate(1);
    memcpy(keep, last, PAGE);
    page_map(OTHER_AREA, physical(last) | RWX);
    page_map(OTHER_AREA + PAGE, 0);
    unsigned good = 0;
    for (unsigned n = 0; n < 100; n++) {
        put_function(last + PAGE - 6, n);
        good += call_at(OTHER_AREA + PAGE - 6) == n && call_at(physical(last) + PAGE - 6) == n;
        last[PAGE - 1] = 0x90;
        good += TRY(call_at(OTHER_AREA + PAGE - 6)) == PF && trap.cr2 == OTHER_AREA + PAGE && trap.ip == OTHER_AREA + PAGE;
    }
    memcpy(last, keep, PAGE);
    expect_eq(good, 200, "code in the last bytes of RAM");
}

/* ---- another processor ---- */

static volatile unsigned go, seen;
#define HANDSHAKES 300u
#define PATCHED 32u /* pages, also at AREA */
static uint8_t *patched;

static void run_patched(unsigned number)
{
    for (unsigned n = 1; n <= HANDSHAKES; n++) {
        while (go != n)
            cpu_pause();
        asm_volatile("cpuid" : : "a"(0) : "rbx", "rcx", "rdx", "memory"); /* serialize: SDM vol. 3, 8.1.3 */
        uint64_t at = n % PATCHED * PAGE + n % 64;
        seen += call_at(physical(patched) + at) == n && call_at(AREA + at) == n;
        asm_volatile("" ::: "memory");
        go = 0;
    }
}

static void test_other_processor(void)
{
    patched = pages_allocate(PATCHED);
    for (unsigned n = 0; n < PATCHED; n++)
        page_map(AREA + n * PAGE, physical(patched + n * PAGE) | RWX);
    processor_begin(1, run_patched);
    for (unsigned n = 1; n <= HANDSHAKES; n++) {
        uint8_t *page = patched + n % PATCHED * PAGE;
        memset(page, 0x90, 64);
        if (n & 1)
            put_function(page + 64, n);
        else
            put_function((uint8_t *)AREA + n % PATCHED * PAGE + 64, n);
        asm_volatile("" ::: "memory");
        go = n;
        while (go)
            cpu_pause();
    }
    check(processor_wait(1, 5000) && seen == HANDSHAKES, "code written by another processor, run at two addresses (%u)", seen);
}

/* Loops that nothing ends but a byte that the other processor writes over one of their own. */
static const struct endless {
    const char *name;
    uint8_t bytes[16], patched; /* where RET goes */
} endless[] = {
    {"a jump to itself", {0xeb, 0xfe}, 0},
    {"a conditional jump", {0x31, 0xc0, 0x90, 0x74, 0xfd}, 2},
    {"two jumps", {0xeb, 0x04, 0x90, 0x90, 0x90, 0x90, 0xeb, 0xf8}, 6},
    {"calls", {0xe8, 0x02, 0, 0, 0, 0xeb, 0xf9, 0xc3}, 5},
    {"LOOP", {0x48, 0xc7, 0xc1, 0xff, 0xff, 0xff, 0x7f, 0x90, 0xe2, 0xfd}, 7},
    {"a jump through a register", {0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0x90, 0xff, 0xe0}, 7},
};
static volatile unsigned running;
static uint8_t *volatile ended; /* two pages */

static void run_endless(unsigned number)
{
    running++;
    call_at(physical(ended) + PAGE - 4); /* by way of another page, and over its end */
}

static void test_ended_by_other(void)
{
    for (unsigned k = 0; k < sizeof endless / sizeof *endless; k++) {
        unsigned done = 0, rounds = 20;
        for (unsigned n = 0; n < rounds; n++) {
            uint8_t *pair = ended = fresh_pair();
            memset(pair, 0x90, 2 * PAGE);
            memcpy(pair + PAGE, endless[k].bytes, sizeof endless[k].bytes);
            unsigned before = running;
            processor_begin(1, run_endless);
            if (!wait_for(&running, before + 1, 2000))
                break;
            delay_us(n * 300);
            *(volatile uint8_t *)(pair + PAGE + endless[k].patched) = 0xc3;
            if (!processor_wait(1, 3000))
                break;
            done++;
        }
        check(done == rounds, "%s, ended by the other processor's store (%u of %u)", endless[k].name, done, rounds);
        if (done < rounds)
            return; /* it runs for ever */
    }
}

void test_main(void)
{
    random_seed();
    code = pages_allocate(5);
    pairs = pages_allocate(2 * PAIRS);
    test_patching();
    test_data_beside();
    test_generations();
    test_rights();
    test_mappings();
    test_second_page();
    test_remapping();
    test_spaces();
    test_writers();
    test_patched_fault();
    test_other_page();
    test_modes();
    test_end_of_ram();
    if (processors_start(2) < 2) {
        skip("code written by another processor", "one processor");
        return;
    }
    test_other_processor();
    test_ended_by_other();
}
