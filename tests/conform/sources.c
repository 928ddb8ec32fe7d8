/*
 * Every source of interrupts at once, asked for the next interrupt only by the handler of the last: one that is lost is the last of its source, which is then named. What comes
 * at once when asked for (UART, keyboard, IPIs) is asked for by the first processor's timer. `rounds=N` on the command line: how many of each. Run with two processors.
 * tests/conform/saved takes snapshots of this program at random moments.
 */
#include "runtime/processors.h"

#define IOAPIC 0xfec00000u
#define HPET 0xfed00000u
#define APIC_ID 0x20
#define APIC_EOI 0xb0
#define APIC_LVT_TIMER 0x320
#define APIC_LVT_LINT0 0x350
#define APIC_INITIAL 0x380
#define APIC_DIVIDE 0x3e0
#define DEADLINE (2u << 17)
#define TSC_DEADLINE 0x6e0
#define MASKED (1u << 16)
#define LEVEL (1u << 15)

#define PIT_COUNT 358        /* 300 us */
#define HPET_TICKS 30000     /* 300 us */
#define APIC_COUNTS 300000   /* of a nanosecond */
#define CYCLES 500000        /* a few hundred us */
#define SILENT_CYCLES (8ull << 30)
#define ROUNDS 300u

enum source { TIMER, TIMER_OTHER, PIT_PIN, PIT_8259, HPET_EDGE, HPET_LEVEL, HPET_REPEATS, RTC, UART, KEYBOARD, IPI, IPI_OTHER, SOURCES };
static const char *const names[] = {"the TSC deadline", "the other processor's timer", "the 8254 on the I/O APIC", "the 8254 on the 8259s", "the HPET, edge",
                                    "the HPET, level", "the HPET, repeating", "the clock", "the UART", "the keyboard", "IPIs", "the other processor's IPIs"};
static volatile unsigned counts[SOURCES];
static volatile uint64_t last[SOURCES];
static volatile bool over;

static void came(enum source source)
{
    counts[source]++;
    last[source] = rdtsc();
}
static void eoi(void)
{
    lapic_write(APIC_EOI, 0);
}
static void redirect(unsigned pin, uint32_t low)
{
    volatile uint32_t *select = (void *)(uintptr_t)IOAPIC, *window = (void *)(uintptr_t)(IOAPIC + 0x10);
    *select = 0x11 + 2 * pin;
    *window = 0; /* to the first processor */
    *select = 0x10 + 2 * pin;
    *window = low;
}

/* ---- sources that need time ---- */

static void pit_next(void)
{
    outb(0x43, 0x30); /* both bytes, mode 0 */
    outb(0x40, PIT_COUNT & 0xff);
    outb(0x40, PIT_COUNT >> 8);
}
static void on_pit_pin(struct frame *frame)
{
    came(PIT_PIN);
    pit_next();
    eoi();
}
static void on_pit_8259(struct frame *frame)
{
    came(PIT_8259);
    outb(0x20, 0x20);
}
/* The 8254's output may have fallen again: the 8259 then says 7, and wants no EOI. */
static void on_spurious(struct frame *frame)
{
}

static volatile uint64_t *hpet(unsigned offset)
{
    return (volatile uint64_t *)(uintptr_t)(HPET + offset);
}
/* A match that went by while it was being written is none. */
static void hpet_next(unsigned comparator)
{
    uint64_t at;
    do {
        at = *hpet(0xf0) + HPET_TICKS;
        *hpet(0x108 + 0x20 * comparator) = at;
    } while (*hpet(0xf0) >= at);
}
static void on_hpet_edge(struct frame *frame)
{
    came(HPET_EDGE);
    hpet_next(0);
    eoi();
}
static void on_hpet_level(struct frame *frame)
{
    came(HPET_LEVEL);
    *hpet(0x20) = 2;
    hpet_next(1);
    eoi();
}
static void on_hpet_repeats(struct frame *frame)
{
    came(HPET_REPEATS);
    eoi();
}

static uint8_t cmos_read(uint8_t index)
{
    outb(0x70, index);
    return inb(0x71);
}
static void cmos_write(uint8_t index, uint8_t value)
{
    outb(0x70, index);
    outb(0x71, value);
}
static void on_rtc(struct frame *frame)
{
    came(RTC);
    (void)cmos_read(0xc);
    eoi();
}

/* ---- sources that answer at once ---- */

static volatile bool uart_idle = true, keyboard_idle = true, ipi_idle = true;

static void on_uart(struct frame *frame)
{
    if ((inb(0x3fa) & 0xf) == 2)
        uart_idle = true;
    came(UART);
    eoi();
}
static void on_keyboard(struct frame *frame)
{
    if (inb(0x64) & 1 && inb(0x60) == 0x55)
        keyboard_idle = true;
    came(KEYBOARD);
    eoi();
}
static void on_ipi(struct frame *frame)
{
    came(IPI);
    ipi_idle = true;
    eoi();
}
static void on_ipi_other(struct frame *frame)
{
    came(IPI_OTHER);
    eoi();
}
static void ask_those_that_answer_at_once(void)
{
    if (uart_idle) {
        uart_idle = false;
        outb(0x3f8, '\r'); /* what reads the report skips it */
    }
    if (keyboard_idle) {
        keyboard_idle = false;
        outb(0x64, 0xd2); /* as if it came from the keyboard */
        outb(0x60, 0x55);
    }
    if (ipi_idle) {
        ipi_idle = false;
        processor_send(1, 0x4000 | 0x49);
    }
}

static void on_timer(struct frame *frame)
{
    came(TIMER);
    ask_those_that_answer_at_once();
    wrmsr(TSC_DEADLINE, rdtsc() + CYCLES);
    eoi();
}
static void on_timer_other(struct frame *frame)
{
    came(TIMER_OTHER);
    lapic_write(APIC_INITIAL, APIC_COUNTS);
    processor_send(0, 0x4000 | 0x48);
    eoi();
}

/* ---- all together ---- */

static void other(unsigned number)
{
    lapic_write(APIC_DIVIDE, 0xb);
    lapic_write(APIC_LVT_TIMER, 0x41);
    lapic_write(APIC_INITIAL, APIC_COUNTS);
    while (!over) {
        halt();
        cli();
    }
    lapic_write(APIC_LVT_TIMER, MASKED);
}

static void begin_8259(void)
{
    static const uint8_t first[] = {0x11, 0x20, 4, 1}, second[] = {0x11, 0x28, 2, 1};
    for (unsigned n = 0; n < 4; n++) {
        outb(n ? 0x21 : 0x20, first[n]);
        outb(n ? 0xa1 : 0xa0, second[n]);
    }
    outb(0xa1, 0xff);
    outb(0x21, 0xfe);
    lapic_write(APIC_LVT_LINT0, 0x700); /* ExtINT */
}

static void begin(void)
{
    static const struct {
        uint8_t vector;
        trap_handler *handler;
    } handlers[] = {{0x20, on_pit_8259}, {0x27, on_spurious}, {0x40, on_timer},  {0x41, on_timer_other}, {0x42, on_pit_pin},     {0x43, on_hpet_edge}, {0x44, on_hpet_level},
                    {0x45, on_rtc},      {0x46, on_uart},     {0x47, on_keyboard}, {0x48, on_ipi},         {0x49, on_ipi_other}, {0x4a, on_hpet_repeats}};
    for (unsigned n = 0; n < sizeof handlers / sizeof *handlers; n++)
        trap_handlers[handlers[n].vector] = handlers[n].handler;
    begin_8259();
    redirect(2, 0x42);
    pit_next();
    redirect(20, 0x43);
    redirect(21, 0x44 | LEVEL);
    redirect(22, 0x4a);
    *hpet(0x100) = 20 << 9 | 4;
    *hpet(0x120) = 21 << 9 | 4 | 2;
    *hpet(0x140) = 22 << 9 | 4 | 8 | 0x40;
    *hpet(0x10) = 1;
    hpet_next(0);
    hpet_next(1);
    *hpet(0x148) = *hpet(0xf0) + HPET_TICKS;
    *hpet(0x148) = HPET_TICKS;
    redirect(8, 0x45);
    cmos_write(0xa, 0x26); /* 1024 Hz */
    cmos_write(0xb, cmos_read(0xb) | 0x40);
    (void)cmos_read(0xc);
    redirect(4, 0x46);
    outb(0x3fc, 0xb);
    redirect(1, 0x47);
    outb(0x64, 0x60);
    outb(0x60, 0x45); /* interrupt on, keyboard on, translated */
    lapic_write(APIC_LVT_TIMER, DEADLINE | 0x40);
    wrmsr(TSC_DEADLINE, rdtsc() + CYCLES);
    outb(0x3f9, 2); /* transmitter empty: the first interrupt */
    uart_idle = false;
}

static unsigned rounds_wanted(void)
{
    unsigned wanted = 0;
    for (const char *p = command_line("rounds="); p && *p >= '0' && *p <= '9'; p++)
        wanted = wanted * 10 + (unsigned)(*p - '0');
    return wanted ? wanted : ROUNDS;
}

/* Of an interrupt that the other processor has just got, the time may be later. */
static uint64_t age(unsigned source, uint64_t now)
{
    uint64_t then = last[source];
    return then > now ? 0 : now - then;
}

/* The first source that has been silent for long, or SOURCES. */
static unsigned silent(uint64_t now)
{
    unsigned n = 0;
    while (n < SOURCES && age(n, now) < SILENT_CYCLES)
        n++;
    return n;
}

static bool all_have(unsigned rounds)
{
    for (unsigned n = 0; n < SOURCES; n++)
        if (counts[n] < rounds)
            return false;
    return true;
}

void test_main(void)
{
    unsigned rounds = rounds_wanted(), dead = SOURCES;
    if (!check(processors_start(2) == 2, "the second processor comes"))
        return;
    begin();
    for (unsigned n = 0; n < SOURCES; n++)
        last[n] = rdtsc();
    processor_begin(1, other);
    while (dead == SOURCES && !all_have(rounds)) {
        halt();
        cli();
        dead = silent(rdtsc());
    }
    uint64_t now = rdtsc();
    over = true;
    outb(0x3f9, 0);
    for (unsigned n = 0; n < SOURCES; n++)
        check(n != dead, "%s: %u interrupts, the last one %u million cycles ago", names[n], counts[n], (unsigned)(age(n, now) / 1000000));
}
