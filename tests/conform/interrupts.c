/*
 * Interrupts: PIC and PIT, I/O APIC edge and level, the local APIC's timer in its modes, self IPIs, priorities, TPR and CR8, the shadows of STI and MOV SS, NMI
 * blocking, waking from HLT. SDM vol. 3, 6.6 to 6.8 and ch. 10; 8259A, 82C54, 82093AA data sheets.
 */
#include "runtime/conform.h"

#define IOAPIC 0xfec00000u
#define APIC_ID 0x20
#define APIC_TPR 0x80
#define APIC_PPR 0xa0
#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_ISR 0x100
#define APIC_IRR 0x200
#define APIC_ESR 0x280
#define APIC_ICR 0x300
#define APIC_ICR_HIGH 0x310
#define APIC_LVT_TIMER 0x320
#define APIC_LVT_LINT0 0x350
#define APIC_INITIAL 0x380
#define APIC_CURRENT 0x390
#define APIC_DIVIDE 0x3e0
#define MASKED (1u << 16)
#define PERIODIC (1u << 17)
#define DEADLINE (2u << 17)
#define TSC_DEADLINE 0x6e0
#define PIC_VECTOR 0x20

static volatile unsigned count, order_length;
static volatile uint8_t order[32];
static volatile reg_t last_ip;

static uint32_t ioapic_read(unsigned index)
{
    *(volatile uint32_t *)(uintptr_t)IOAPIC = index;
    return *(volatile uint32_t *)(uintptr_t)(IOAPIC + 0x10);
}
static void ioapic_write(unsigned index, uint32_t value)
{
    *(volatile uint32_t *)(uintptr_t)IOAPIC = index;
    *(volatile uint32_t *)(uintptr_t)(IOAPIC + 0x10) = value;
}
static void redirect(unsigned pin, uint32_t low)
{
    ioapic_write(0x10 + 2 * pin, MASKED);
    ioapic_write(0x11 + 2 * pin, lapic_read(APIC_ID) & 0xff000000);
    ioapic_write(0x10 + 2 * pin, low);
}
static void note(struct frame *frame)
{
    if (order_length < sizeof order)
        order[order_length++] = (uint8_t)frame->vector;
    last_ip = frame->ip;
    count++;
}
static void on_pic(struct frame *frame)
{
    note(frame);
    if (frame->vector >= PIC_VECTOR + 8)
        outb(0xa0, 0x20);
    outb(0x20, 0x20);
}
static void on_apic(struct frame *frame)
{
    note(frame);
    lapic_write(APIC_EOI, 0);
}
/* The UART's, which is let go after a few. */
static void on_uart(struct frame *frame)
{
    note(frame);
    if (count >= 5)
        outb(0x3f9, 0);
    lapic_write(APIC_EOI, 0);
}
static void on_nothing(struct frame *frame)
{
    note(frame);
}
static void clear(void)
{
    count = order_length = 0;
}
static void self_ipi(unsigned vector)
{
    lapic_write(APIC_ICR, 1u << 18 | vector);
}
static bool bit_set(unsigned base, unsigned vector)
{
    return lapic_read(base + vector / 32 * 16) >> (vector % 32) & 1;
}

static void pit_rate(unsigned channel, unsigned mode, uint16_t value)
{
    outb(0x43, (uint8_t)(channel << 6 | 3 << 4 | mode << 1));
    outb((uint16_t)(0x40 + channel), (uint8_t)value);
    outb((uint16_t)(0x40 + channel), (uint8_t)(value >> 8));
}

static void pic_init(void)
{
    outb(0x20, 0x11);
    outb(0x21, PIC_VECTOR);
    outb(0x21, 4);
    outb(0x21, 1);
    outb(0xa0, 0x11);
    outb(0xa1, PIC_VECTOR + 8);
    outb(0xa1, 2);
    outb(0xa1, 1);
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

static void test_pic_pit(void)
{
    pic_init();
    lapic_write(APIC_SVR, 0x1ff);
    lapic_write(APIC_LVT_LINT0, 0x700); /* ExtINT */
    for (unsigned n = 0; n < 16; n++)
        trap_handlers[PIC_VECTOR + n] = on_pic;
    outb(0x21, 0xa5);
    expect_eq(inb(0x21), 0xa5, "the PIC's mask reads back");
    outb(0x21, 0xfe);
    pit_rate(0, 2, 11932); /* 100 Hz */
    clear();
    uint32_t start = pm_timer();
    while (count < 10 && ((pm_timer() - start) & 0xffffff) < 3579545 * 2)
        halt();
    uint32_t ticks = (pm_timer() - start) & 0xffffff;
    cli();
    check(count >= 10, "PIT interrupts through the PIC (%u)", count);
    check(ticks > 3579545 / 10 * 8 / 10 && ticks < 3579545 / 10 * 3, "ten of them take 100 ms (%u PM ticks)", ticks);
    check(order[0] == PIC_VECTOR, "at IRQ 0's vector");
    outb(0x21, 0xff);
    clear();
    sti();
    delay_us(30000);
    cli();
    expect_eq(count, 0, "none while masked");
    outb(0x20, 0x0a); /* IRR next */
    check(inb(0x20) & 1, "IRR holds the request");
    pit_rate(0, 0, 0xffff);
    /* Latch and read-back. */
    pit_rate(0, 2, 1000);
    outb(0x43, 0);
    unsigned low = inb(0x40), value = low | (unsigned)inb(0x40) << 8;
    check(value <= 1000, "a latched count is below the reload value (%u)", value);
    outb(0x43, 0xe2); /* read back status of channel 0 */
    expect_eq(inb(0x40) & 0x3f, 0x34, "read-back of the status: both bytes, mode 2");
    pit_rate(0, 4, 0xffff);
}

static void test_ioapic(void)
{
    check(((ioapic_read(1) >> 16) & 0xff) == 23, "24 pins");
    outb(0x21, 0xff);
    lapic_write(APIC_LVT_LINT0, MASKED);
    trap_handlers[0x50] = on_apic;
    trap_handlers[0x51] = on_uart;
    pit_rate(0, 2, 11932);
    redirect(2, 0x50);
    clear();
    sti();
    bool came = wait_for(&count, 3, 500);
    cli();
    check(came, "PIT on pin 2, edge");
    redirect(2, 0x50 | MASKED);
    pit_rate(0, 4, 0xffff);
    ioapic_write(0x10 + 2 * 5, 0xfffe0000 | MASKED | 0xa0ff);
    uint32_t value = ioapic_read(0x10 + 2 * 5);
    check((value & 0xfffe0000) == 0, "reserved bits of a redirection entry read as zero (%x)", value);
    check(!(value & 0x5000), "delivery status and remote IRR cannot be written");
    redirect(5, MASKED);
    /* Level: the UART's interrupt for an empty transmitter on pin 4 is a line that stays. */
    redirect(4, 0x51 | 1u << 15);
    clear();
    outb(0x3f9, 2); /* THRE */
    outb(0x3fc, 0xb);
    sti();
    delay_us(1000);
    unsigned level = count;
    cli();
    outb(0x3f9, 0);
    check(level >= 5, "a level that stays asserted interrupts again after EOI (%u)", level);
    sti();
    clear();
    delay_us(1000);
    cli();
    expect_eq(count, 0, "and stops when it is deasserted");
    redirect(4, 0x51);
    clear();
    sti();
    outb(0x3f9, 2);
    delay_us(1000);
    cli();
    outb(0x3f9, 0);
    expect_eq(count, 1, "the same line as edge: once");
    redirect(4, MASKED);
    outb(0x3fc, 0);
}

/* Counts in a million cycles of the time stamp counter. */
static uint32_t timer_rate(uint32_t divide)
{
    lapic_write(APIC_DIVIDE, divide);
    lapic_write(APIC_INITIAL, 0xffffffff);
    uint32_t before = lapic_read(APIC_CURRENT);
    uint64_t start = rdtsc();
    delay_us(5000);
    uint32_t counts = before - lapic_read(APIC_CURRENT);
    return (uint32_t)((uint64_t)counts * 1000000 / (rdtsc() - start));
}

static void test_timer(void)
{
    trap_handlers[0x60] = on_apic;
    lapic_write(APIC_LVT_TIMER, MASKED);
    uint32_t fast = 0, slow = 0;
    for (unsigned n = 0; n < 20 && !(slow > fast / 16 * 9 / 10 && slow < fast / 16 * 11 / 10); n++) { /* the host may take the processor away between two readings */
        fast = timer_rate(0xb /* by 1 */);
        slow = timer_rate(0x3 /* by 16 */);
    }
    check(slow > fast / 16 * 9 / 10 && slow < fast / 16 * 11 / 10, "divided by 16: %u, not %u", slow, fast);
    uint32_t rate = 0xffffffff; /* in a millisecond: the least of several, because what the host takes away makes it more */
    for (unsigned n = 0; n < 5; n++) {
        lapic_write(APIC_DIVIDE, 0xb);
        lapic_write(APIC_INITIAL, 0xffffffff);
        uint32_t before = lapic_read(APIC_CURRENT);
        delay_us(4000);
        uint32_t counts = (before - lapic_read(APIC_CURRENT)) / 4;
        rate = counts < rate ? counts : rate;
    }
    check(rate > 1000, "the timer counts down (%u in a millisecond)", rate);
    lapic_write(APIC_DIVIDE, 0xb);

    lapic_write(APIC_LVT_TIMER, 0x60);
    clear();
    lapic_write(APIC_INITIAL, rate * 5);
    sti();
    wait_for(&count, 1, 200);
    delay_us(15000);
    cli();
    expect_eq(count, 1, "one-shot: once");
    expect_eq(lapic_read(APIC_CURRENT), 0, "and the count stays at zero");
    lapic_write(APIC_LVT_TIMER, 0x60 | PERIODIC);
    clear();
    lapic_write(APIC_INITIAL, rate * 5);
    uint32_t start = pm_timer();
    sti();
    while (count < 10 && ((pm_timer() - start) & 0xffffff) < 3579545)
        cpu_pause();
    uint32_t ticks = (pm_timer() - start) & 0xffffff;
    cli();
    check(count >= 10 && ticks > 3579545 / 20 * 7 / 10 && ticks < 3579545 / 20 * 3, "periodic: ten in 50 ms (%u, %u PM ticks)", count, ticks);
    lapic_write(APIC_INITIAL, 0);
    clear();
    sti();
    delay_us(10000);
    cli();
    check(count <= 1, "an initial count of zero stops it (%u)", count);

    if (!(cpuid(1, 0).c & 1u << 24)) {
        skip("TSC deadline", "not offered");
        return;
    }
    uint64_t t0 = rdtsc();
    delay_us(10000);
    uint64_t per_ms = (rdtsc() - t0) / 10;
    lapic_write(APIC_LVT_TIMER, 0x60 | DEADLINE);
    clear();
    uint64_t deadline = rdtsc() + per_ms * 5;
    wrmsr(TSC_DEADLINE, deadline);
    expect_eq(rdmsr(TSC_DEADLINE), deadline, "TSC deadline reads back");
    sti();
    bool came = wait_for(&count, 1, 500);
    uint64_t late = rdtsc() - deadline;
    cli();
    check(came && (int64_t)late >= 0 && late < per_ms * 200, "TSC deadline: not early (late by %llx)", (unsigned long long)late);
    expect_eq(rdmsr(TSC_DEADLINE), 0, "TSC deadline is zero afterwards");
    clear();
    wrmsr(TSC_DEADLINE, 1);
    sti();
    came = wait_for(&count, 1, 100);
    cli();
    check(came && count == 1, "TSC deadline in the past: at once");
    wrmsr(TSC_DEADLINE, rdtsc() + per_ms * 5);
    wrmsr(TSC_DEADLINE, 0);
    clear();
    sti();
    delay_us(10000);
    cli();
    expect_eq(count, 0, "TSC deadline of zero disarms");
    lapic_write(APIC_INITIAL, 1000);
    expect_eq(lapic_read(APIC_CURRENT), 0, "the initial count is ignored in deadline mode");
    lapic_write(APIC_LVT_TIMER, MASKED);
    expect_eq(rdmsr(TSC_DEADLINE), 0, "TSC deadline reads zero in other modes");
}

static void test_priorities(void)
{
    static const uint8_t vectors[] = {0x71, 0x93, 0x72, 0xa1};
    for (unsigned n = 0; n < sizeof vectors; n++) {
        trap_handlers[vectors[n]] = on_apic;
        self_ipi(vectors[n]);
    }
    clear();
    check(bit_set(APIC_IRR, 0x93) && bit_set(APIC_IRR, 0x71), "IRR holds what waits");
    asm_volatile("sti; nop; nop; nop; nop; nop; cli");
    check(count == 4 && order[0] == 0xa1 && order[1] == 0x93 && order[2] == 0x72 && order[3] == 0x71, "highest vector first");

    lapic_write(APIC_TPR, 0x90);
    clear();
    self_ipi(0x93);
    self_ipi(0xa1);
    asm_volatile("sti; nop; nop; nop; cli");
    check(count == 1 && order[0] == 0xa1, "TPR holds its class back");
    expect_eq(read_cr8(), 9, "CR8 is TPR[7:4]");
    asm_volatile("sti");
    write_cr8(8);
    asm_volatile("nop; nop; cli");
    check(count == 2 && order[1] == 0x93, "lowering CR8 lets it in");
    expect_eq(lapic_read(APIC_TPR), 0x80, "TPR after writing CR8");
    write_cr8(0);

    /* In service: only higher classes nest. */
    trap_handlers[0x80] = on_nothing;
    clear();
    self_ipi(0x80);
    asm_volatile("sti; nop; nop; cli");
    check(bit_set(APIC_ISR, 0x80), "ISR until EOI");
    expect_eq(lapic_read(APIC_PPR), 0x80, "PPR follows ISR");
    self_ipi(0x71);
    asm_volatile("sti; nop; nop; cli");
    expect_eq(count, 1, "a lower class waits for EOI");
    self_ipi(0xa1);
    asm_volatile("sti; nop; nop; cli");
    expect_eq(count, 2, "a higher class nests");
    lapic_write(APIC_EOI, 0);
    asm_volatile("sti; nop; nop; cli");
    check(count == 3 && order[2] == 0x71, "EOI lets the lower one in");

    /* Once pending and once in service, further requests merge. */
    clear();
    self_ipi(0x71);
    self_ipi(0x71);
    asm_volatile("sti; nop; nop; nop; nop; cli");
    expect_eq(count, 1, "the same vector twice before delivery is one interrupt");
    /* Illegal vectors. */
    lapic_write(APIC_ESR, 0);
    lapic_write(APIC_ESR, 0);
    self_ipi(5);
    lapic_write(APIC_ESR, 0);
    check(lapic_read(APIC_ESR) & 0x60, "a vector below 16 is an error in ESR (%x)", lapic_read(APIC_ESR));
    lapic_write(APIC_ESR, 0);
    lapic_write(APIC_ESR, 0);
    lapic_write(APIC_SVR, 0xff);
    clear();
    expect_eq(lapic_read(APIC_LVT_TIMER) >> 16 & 1, 1, "a disabled APIC masks the LVT");
    lapic_write(APIC_SVR, 0x1ff);
}

extern uint8_t sti_1[], sti_2[], ss_1[], ss_2[], sti_hlt[];

static void test_shadows(void)
{
    trap_handlers[0x71] = on_apic;
    clear();
    self_ipi(0x71);
    asm_volatile("sti\nsti_1: nop\nsti_2: nop\ncli" ::: "memory");
    check(count == 1 && last_ip == (reg_t)sti_2, "STI: one instruction later");
    clear();
    self_ipi(0x71);
    asm_volatile("sti; cli; nop; nop" ::: "memory");
    expect_eq(count, 0, "STI, CLI: none between");
    asm_volatile("mov %%ss, %%eax; sti; mov %%eax, %%ss\nss_1: nop\nss_2: nop; cli" ::: "rax", "memory");
    check(count == 1 && (last_ip == (reg_t)ss_1 || last_ip == (reg_t)ss_2), "STI, MOV SS");
    clear();
    self_ipi(0x71);
    asm_volatile("pushf; orl $0x200, (%%rsp); popf\n1: nop; cli" ::: "memory", "cc");
    expect_eq(count, 1, "POPF enables at once");
    clear();
    self_ipi(0x71);
    asm_volatile("sti; hlt\nsti_hlt: cli" ::: "memory");
    check(count == 1 && last_ip == (reg_t)sti_hlt, "STI, HLT: wakes after it");
    clear();
    lapic_write(APIC_LVT_TIMER, 0x60);
    lapic_write(APIC_INITIAL, 100000);
    halt();
    cli();
    expect_eq(count, 1, "the timer wakes HLT");
}

/* ---- NMI ---- */

static volatile unsigned nmis, nmi_depth, nmi_nested;

static void send_nmi(void)
{
    lapic_write(APIC_ICR_HIGH, lapic_read(APIC_ID) & 0xff000000);
    lapic_write(APIC_ICR, 4u << 8 | 1u << 14);
}

static void on_nmi(struct frame *frame)
{
    nmis++;
    if (nmi_depth)
        nmi_nested++;
    nmi_depth++;
    if (nmis == 1) {
        send_nmi();
        for (unsigned n = 0; n < 100; n++)
            cpu_pause();
    }
    nmi_depth--;
}

static void on_nmi_with_exception(struct frame *frame)
{
    nmis++;
    if (nmis > 1)
        return;
    send_nmi();
    for (unsigned n = 0; n < 100; n++)
        cpu_pause();
    nmi_nested = nmis; /* still 1: blocked */
    asm_volatile("int3");  /* its IRET unblocks */
    for (unsigned n = 0; n < 100; n++)
        cpu_pause();
    nmi_depth = nmis; /* 2 */
}

static void test_nmi(void)
{
    trap_handlers[NMI] = on_nmi;
    send_nmi();
    for (volatile unsigned n = 0; n < 1000; n++)
        cpu_pause();
    check(nmis == 2 && nmi_nested == 0, "an NMI inside an NMI waits for IRET (%u, %u)", nmis, nmi_nested);
    trap_handlers[NMI] = on_nmi_with_exception;
    trap_handlers[BP] = on_nothing;
    nmis = nmi_depth = nmi_nested = 0;
    send_nmi();
    for (volatile unsigned n = 0; n < 1000; n++)
        cpu_pause();
    check(nmis == 2 && nmi_nested == 1 && nmi_depth == 2, "an exception's IRET inside the handler unblocks NMIs (%u %u %u)", nmis, nmi_nested, nmi_depth);
    trap_handlers[BP] = 0;
    trap_handlers[NMI] = on_nothing;
    clear();
    cli();
    lapic_write(APIC_ICR_HIGH, lapic_read(APIC_ID) & 0xff000000);
    lapic_write(APIC_ICR, 4u << 8 | 1u << 14);
    for (volatile unsigned n = 0; n < 1000; n++)
        cpu_pause();
    expect_eq(count, 1, "an NMI comes with IF clear");
    trap_handlers[NMI] = 0;
}

static void test_x2apic(void)
{
    if (!(cpuid(1, 0).c & 1u << 21)) {
        skip("x2APIC", "not offered");
        return;
    }
    uint32_t id = lapic_read(APIC_ID) >> 24, version = lapic_read(0x30);
    uint64_t base = rdmsr(0x1b);
    expect_fault(GP, 0, "x2APIC registers before x2APIC mode", (void)rdmsr(0x802));
    wrmsr(0x1b, base | 1u << 10);
    expect_eq(rdmsr(0x802), id, "x2APIC: the ID");
    expect_eq(rdmsr(0x803), version, "x2APIC: the version");
    trap_handlers[0x71] = 0;
    clear();
    expect_fault(GP, 0, "x2APIC: a reserved register", (void)rdmsr(0x800));
    expect_fault(GP, 0, "x2APIC: reading EOI", (void)rdmsr(0x80b));
    expect_fault(GP, 0, "x2APIC: EOI of another value", wrmsr(0x80b, 1));
    expect_fault(GP, 0, "x2APIC: TPR with reserved bits", wrmsr(0x808, 0x100));
    expect_fault(GP, 0, "x2APIC: writing the ID", wrmsr(0x802, 0));
    expect_fault(0x72, 0, "x2APIC: self IPI register", trap_handlers[0x72] = 0; wrmsr(0x83f, 0x72); asm_volatile("sti; nop; nop; cli"));
    wrmsr(0x80b, 0);
    expect_fault(0x73, 0, "x2APIC: ICR in one write", wrmsr(0x830, (uint64_t)id << 32 | 0x73); asm_volatile("sti; nop; nop; cli"));
    wrmsr(0x80b, 0);
    expect_fault(GP, 0, "from x2APIC to xAPIC", wrmsr(0x1b, base));
    wrmsr(0x1b, base & ~0xc00ull);
    expect_fault(GP, 0, "from disabled to x2APIC", wrmsr(0x1b, base | 0xc00));
    check(!(cpuid(1, 0).d & 1u << 9), "CPUID's APIC bit follows the enable bit");
    wrmsr(0x1b, base);
    check(cpuid(1, 0).d & 1u << 9, "and comes back");
}

void test_main(void)
{
    test_pic_pit();
    test_ioapic();
    test_timer();
    test_priorities();
    test_shadows();
    test_nmi();
    test_x2apic();
}
