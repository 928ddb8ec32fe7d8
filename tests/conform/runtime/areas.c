/* See areas.h. */
#include "areas.h"

#ifdef __x86_64__

#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_LVT_TIMER 0x320
#define APIC_INITIAL 0x380
#define APIC_DIVIDE 0x3e0
#define MASKED (1u << 16)
#define TIMER_VECTOR 0xe0
#define MARGIN 128u

const uint64_t area_bases[AREAS] = {
    0x0000000040000000, 0x000000006ffff000, 0x0000008000000000, 0x0000555555550000,
    0x00007fffffff0000, 0xffff800000000000, 0xffffffff80000000, 0xffffffffffff0000,
};
/* w: writable, r: read-only, both for ring 3; k and K: the same for ring 0 only; n: writable, no execution; -: nothing. */
static const char pattern[AREA_PAGES + 1] = "w-ww-rwkw-kKr-nw";
static uint8_t *frames, *shadow;

/* 5 is prime to 16: pages next to each other are not so in memory. */
static unsigned frame_of(unsigned area, unsigned page)
{
    return area * AREA_PAGES + page * 5 % AREA_PAGES;
}

void areas_create(void)
{
    frames = pages_allocate(AREAS * AREA_PAGES);
    shadow = pages_allocate(AREAS * AREA_PAGES);
    for (unsigned n = 0; n < AREAS * AREA_PAGES * 512; n++)
        ((uint64_t *)frames)[n] = random64();
    memcpy(shadow, frames, AREAS * AREA_PAGES * PAGE);
    for (unsigned a = 0; a < AREAS; a++)
        for (unsigned n = 0; n < AREA_PAGES; n++) {
            uint64_t entry = (uintptr_t)(frames + frame_of(a, n) * PAGE) | PG_P;
            char kind = pattern[n];
            entry |= kind == 'w' || kind == 'k' || kind == 'n' ? PG_W : 0;
            entry |= kind == 'k' || kind == 'K' ? 0 : PG_U;
            entry |= kind == 'n' ? PG_NX : 0;
            page_map(area_bases[a] + n * PAGE, kind == '-' ? 0 : entry);
        }
}

uint8_t *area_shadow(uint64_t va)
{
    uint64_t physical = page_physical(va);
    if (physical - (uintptr_t)frames >= AREAS * AREA_PAGES * PAGE)
        return NULL;
    return shadow + (physical - (uintptr_t)frames);
}

void area_learn(uint64_t va, unsigned size)
{
    for (unsigned n = 0; n < size; n++) {
        uint8_t *s = area_shadow(va + n);
        if (s)
            *s = frames[s - shadow];
    }
}

static bool page_intact(uint64_t va, unsigned from, unsigned to)
{
    const uint8_t *s = area_shadow(va & ~(PAGE - 1));
    if (!s)
        return true;
    const uint64_t *want = (const uint64_t *)s, *have = (const uint64_t *)(frames + (s - shadow));
    for (unsigned n = from / 8; n < (to + 7) / 8; n++)
        if (want[n] != have[n])
            return false;
    return true;
}

bool areas_intact_near(uint64_t va, unsigned size)
{
    uint64_t first = va - MARGIN, last = va + size + MARGIN - 1, end = last & ~(PAGE - 1);
    if ((first ^ last) & ~(PAGE - 1))
        return page_intact(first, first & (PAGE - 1), PAGE) && page_intact(end, 0, (last & (PAGE - 1)) + 1);
    return page_intact(first, first & (PAGE - 1), (last & (PAGE - 1)) + 1);
}

bool areas_intact(void)
{
    reg_t count = AREAS * AREA_PAGES * PAGE / 8;
    const uint8_t *a = frames, *b = shadow;
    bool equal;
    asm_volatile("repe cmpsq" : "+S"(a), "+D"(b), "+c"(count), "=@ccz"(equal)::"memory");
    return equal;
}

/* ---- wild addresses ---- */

static uint64_t near_edge(unsigned size)
{
    uint64_t va = area_bases[random_below(AREAS)] + random_below(AREA_PAGES + 1) * PAGE;
    return va + random_below(size + 8) - size - 3;
}

static uint64_t in_page(void)
{
    return area_bases[random_below(AREAS)] + random_below(AREA_PAGES * PAGE);
}

uint64_t wild_address(unsigned size)
{
    static const uint64_t edges[] = {0, 0x800000000000, 0xffff800000000000, 1ull << 63, 0x100000000, 0x80000000, 0x10000000, 0x8000000000, 0x20000000000};
    switch (random_below(16)) {
    case 0:
        return random64();
    case 1:
        return random64() & 0x7fffffffffff;
    case 2:
        return random64() | 0xffff800000000000;
    case 3: /* where a monitor that is itself a process may have its own things */
        return 0x10000000 + random_below(0x70000000);
    case 4:
        return 0x550000000000 + (random64() & 0x1ffffffffff);
    case 5:
        return 0x7f0000000000 + (random64() & 0xffffffffff);
    case 6:
        return edges[random_below(sizeof edges / sizeof *edges)] + random_below(2 * size + 16) - size - 8;
    case 7: /* another page that agrees in the low bits */
        return in_page() + (random64() << (random_below(2) ? 41 : 44));
    case 8:
    case 9:
        return in_page() ^ 1ull << (12 + random_below(52));
    case 10:
        return (random_below(2) ? in_page() : near_edge(size)) ^ (uint64_t)random_below(0x10000) << 48;
    case 11:
        return in_page();
    default:
        return near_edge(size);
    }
}

/* ---- code ---- */

static uint8_t *code;

uint8_t *code_bytes(void)
{
    return code;
}

uint64_t code_va(bool user, unsigned view)
{
    static const uint64_t bases[2][CODE_VIEWS] = {{0x0000000050000000, 0xffffffff90000000, 0x0000600000000000, 0xffff888012340000},
                                                  {0x0000000058000000, 0xffffffff98000000, 0x00007f1234560000, 0x0000561200000000}};
    if (!code) {
        code = pages_allocate(CODE_BYTES / PAGE);
        for (unsigned u = 0; u < 2; u++)
            for (unsigned v = 0; v < CODE_VIEWS; v++)
                for (unsigned n = 0; n < CODE_BYTES / PAGE; n++)
                    page_map(bases[u][v] + n * PAGE, (uintptr_t)(code + n * PAGE) | PG_P | PG_W | (u ? PG_U : 0));
    }
    return bases[user][view];
}

unsigned code_next(void)
{
    static unsigned offset;
    offset += (unsigned)PAGE + 64 + random_below(64);
    if (offset + 128 > CODE_BYTES)
        offset = random_below(PAGE);
    return offset;
}

/* ---- the timer ---- */

volatile unsigned timer_interrupts;

/* Numbers of its own: those of the program stay the same from run to run. */
static void on_timer(struct frame *frame)
{
    static uint32_t state = 1;
    timer_interrupts++;
    state = state * 1664525 + 1013904223;
    lapic_write(APIC_INITIAL, 2000 + (state >> 8) % 200000);
    lapic_write(APIC_EOI, 0);
}

void timer_begin(void)
{
    idt[TIMER_VECTOR].ist = 1;
    trap_handlers[TIMER_VECTOR] = on_timer;
    lapic_write(APIC_SVR, 0x1ff);
    lapic_write(APIC_DIVIDE, 0xb);
    lapic_write(APIC_LVT_TIMER, TIMER_VECTOR);
    lapic_write(APIC_INITIAL, 100000);
}

void timer_end(void)
{
    lapic_write(APIC_LVT_TIMER, MASKED);
    lapic_write(APIC_INITIAL, 0);
    asm_volatile("sti; nop; nop; cli");
}

#endif
