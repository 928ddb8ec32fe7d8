/*
 * Two processors: INIT and startup, IPIs both ways, locked counters, the store buffer's reordering and its fences, TLB shootdown, code modified by the other.
 * SDM vol. 3, 8.1 to 8.4. Run with two processors.
 */
#include "runtime/conform.h"

#define APIC_ID 0x20
#define APIC_EOI 0xb0
#define APIC_SVR 0xf0
#define APIC_ICR 0x300
#define APIC_ICR_HIGH 0x310
#define TRAMPOLINE 0x8000u
#define ROUNDS 20000u
#define HANDSHAKES 500u /* each may cost a time slice on a busy host */

extern uint8_t ap_start[], ap_start_end[];
volatile unsigned ap_started;
static uint8_t ap_stack[16384] __attribute__((aligned(16)));
reg_t ap_stack_top = (reg_t)(ap_stack + 16384);
static volatile unsigned ap_apic_id, ap_ready, work_number, work_done, ipis_on_ap, ipis_on_bsp;
static void (*volatile work)(void);

/* Real mode at TRAMPOLINE, then as the runtime's own start. */
__asm__(".code16\n"
        "ap_start: cli\n xor %ax, %ax\n mov %ax, %ds\n lgdtl 0x8000 + ap_gdtr - ap_start\n mov $0x11, %eax\n mov %eax, %cr0\n ljmpl $0x18, $ap_32\n"
        "ap_gdtr: .word 0x1ff\n .long gdt\n ap_start_end:\n"
        ".code32\n"
        "ap_32: mov $0x10, %eax\n mov %eax, %ds\n mov %eax, %es\n mov %eax, %ss\n mov ap_stack_top, %esp\n call long_mode_on\n ljmp $0x08, $ap_64\n"
        ".code64\n"
        "ap_64: mov ap_stack_top, %rsp\n xor %ebp, %ebp\n call ap_main\n");

void ap_main(void);

static void on_ipi(struct frame *frame)
{
    if (lapic_read(APIC_ID) >> 24 == 0)
        ipis_on_bsp++;
    else
        ipis_on_ap++;
    lapic_write(APIC_EOI, 0);
}

void ap_main(void)
{
    lgdt(&gdt_pointer);
    lidt(&idt_pointer);
    lapic_write(APIC_SVR, 0x1ff);
    ap_apic_id = lapic_read(APIC_ID) >> 24;
    ap_started++;
    for (unsigned done = 0;;) {
        sti();
        while (work_number == done)
            cpu_pause();
        cli();
        done = work_number;
        work();
        work_done = done;
    }
}

static void start_work(void (*fn)(void))
{
    work = fn;
    work_number++;
}
static bool finish_work(void)
{
    return wait_for(&work_done, work_number, 5000);
}
static void send(uint32_t command)
{
    lapic_write(APIC_ICR_HIGH, 1u << 24);
    lapic_write(APIC_ICR, command);
}

static bool start(void)
{
    memcpy((void *)TRAMPOLINE, ap_start, (size_t)(ap_start_end - ap_start));
    lapic_write(APIC_SVR, 0x1ff);
    send(0x4500);
    delay_us(10000);
    send(0x4600 | TRAMPOLINE >> 12);
    if (!wait_for(&ap_started, 1, 1000))
        return check(false, "INIT and SIPI start the second processor");
    check(true, "INIT and SIPI start the second processor");
    expect_eq(ap_apic_id, 1, "its APIC ID");
    send(0x4600 | TRAMPOLINE >> 12);
    delay_us(2000);
    expect_eq(ap_started, 1, "a second SIPI is ignored");
    return true;
}

/* ---- IPIs ---- */

static void send_to_bsp(void)
{
    lapic_write(APIC_ICR_HIGH, 0);
    lapic_write(APIC_ICR, 0x4000 | 0x61);
}

static void test_ipis(void)
{
    trap_handlers[0x61] = on_ipi;
    send(0x4000 | 0x61);
    check(wait_for(&ipis_on_ap, 1, 1000) && !ipis_on_bsp, "an IPI to the other");
    sti();
    start_work(send_to_bsp);
    check(wait_for(&ipis_on_bsp, 1, 1000) && finish_work(), "an IPI back");
    lapic_write(APIC_ICR, 3u << 18 | 0x4000 | 0x61);
    check(wait_for(&ipis_on_ap, 2, 1000), "all but self");
    delay_us(1000);
    expect_eq(ipis_on_bsp, 1, "not self");
    lapic_write(APIC_ICR, 2u << 18 | 0x4000 | 0x61);
    check(wait_for(&ipis_on_ap, 3, 1000) && wait_for(&ipis_on_bsp, 2, 1000), "all with self");
    for (unsigned n = 0; n < 200; n++) {
        unsigned want = ipis_on_ap + 1;
        send(0x4000 | 0x61);
        if (!wait_for(&ipis_on_ap, want, 1000))
            break;
    }
    expect_eq(ipis_on_ap, 203, "200 more, each arrives");
    cli();
}

/* ---- atomics ---- */

static volatile unsigned counters[4] __attribute__((aligned(64)));
static volatile uint64_t wide[2] __attribute__((aligned(16)));
static uint8_t split_area[8192] __attribute__((aligned(4096)));

static void count_locked(void)
{
    for (unsigned n = 0; n < ROUNDS; n++) {
        asm_volatile("lock incl %0" : "+m"(counters[0])::"cc", "memory");
        unsigned one = 1;
        asm_volatile("lock xaddl %1, %0" : "+m"(counters[1]), "+r"(one)::"cc", "memory");
        unsigned old = counters[2], seen;
        do {
            seen = old;
            asm_volatile("lock cmpxchgl %2, %1" : "+a"(old), "+m"(counters[2]) : "r"(seen + 1) : "cc", "memory");
        } while (old != seen);
        asm_volatile("lock incl (%0)" ::"r"(split_area + 4094) : "cc", "memory"); /* across two pages */
    }
}

static void count_wide(void)
{
    for (unsigned n = 0; n < ROUNDS / 2; n++) {
        uint64_t low = wide[0], high = wide[1];
        bool done;
        do {
            uint64_t new_low = low + 1, new_high = high + 2;
            asm_volatile("lock cmpxchg16b %1" : "+a"(low), "+m"(wide), "+d"(high), "=@ccz"(done) : "b"(new_low), "c"(new_high) : "memory");
        } while (!done);
    }
}

static void spin_count(void)
{
    for (unsigned n = 0; n < ROUNDS / 4; n++) {
        unsigned taken = 1;
        do
            asm_volatile("xchgl %0, %1" : "+r"(taken), "+m"(counters[3])::"memory");
        while (taken && (cpu_pause(), true));
        wide[1]++;
        asm_volatile("" ::: "memory");
        counters[3] = 0;
    }
}

static void test_atomics(void)
{
    start_work(count_locked);
    count_locked();
    check(finish_work(), "both processors count");
    check(counters[0] == 2 * ROUNDS && counters[1] == 2 * ROUNDS && counters[2] == 2 * ROUNDS, "LOCK INC, XADD, CMPXCHG (%u %u %u)", counters[0], counters[1],
          counters[2]);
    uint32_t split;
    memcpy(&split, split_area + 4094, 4);
    expect_eq(split, 2 * ROUNDS, "LOCK INC across two pages");
    start_work(count_wide);
    count_wide();
    check(finish_work() && wide[0] == ROUNDS && wide[1] == 2 * ROUNDS, "LOCK CMPXCHG16B");
    wide[1] = 0;
    start_work(spin_count);
    spin_count();
    check(finish_work() && wide[1] == ROUNDS / 2, "a spin lock by XCHG (%x)", (unsigned)wide[1]);
}

/* ---- memory order ---- */

static volatile unsigned litmus_x __attribute__((aligned(64))), litmus_y __attribute__((aligned(64))), litmus_a __attribute__((aligned(64))),
    litmus_b __attribute__((aligned(64))), turn __attribute__((aligned(64))), turn_done __attribute__((aligned(64)));

/* Store then load with MFENCE: both zero is impossible. */
static void litmus_other(void)
{
    for (unsigned n = 1; n <= HANDSHAKES; n++) {
        while (turn != n)
            ;
        litmus_y = 1;
        asm_volatile("mfence" ::: "memory");
        litmus_b = litmus_x;
        asm_volatile("" ::: "memory");
        turn_done = n;
    }
}

/* Message passing: y is written after x. */
static void message_other(void)
{
    for (unsigned n = 1; n <= ROUNDS; n++) {
        litmus_x = n;
        litmus_y = n;
    }
}

static void test_order(void)
{
    unsigned both_zero = 0;
    start_work(litmus_other);
    for (unsigned n = 1; n <= HANDSHAKES; n++) {
        litmus_x = litmus_y = 0;
        turn = n;
        litmus_x = 1;
        asm_volatile("mfence" ::: "memory");
        litmus_a = litmus_y;
        while (turn_done != n)
            ;
        both_zero += !litmus_a && !litmus_b;
    }
    check(finish_work() && both_zero == 0, "stores are seen before later loads with MFENCE (%u)", both_zero);
    unsigned backwards = 0;
    litmus_x = litmus_y = 0;
    start_work(message_other);
    while (litmus_y != ROUNDS) {
        unsigned y = litmus_y;
        unsigned x = litmus_x;
        backwards += x < y;
    }
    check(finish_work() && backwards == 0, "stores and loads keep their order (%u)", backwards);
}

/* ---- TLB shootdown ---- */

#define AREA 0x8000000000ull
static uint64_t pdpt[512] __attribute__((aligned(4096)));
static uint64_t pd[512] __attribute__((aligned(4096)));
static uint64_t pt[512] __attribute__((aligned(4096)));
static volatile uint64_t pages[2][512] __attribute__((aligned(4096)));
extern uint64_t boot_pml4[512];
static volatile unsigned shot, old_seen;

static void on_shootdown(struct frame *frame)
{
    invlpg((void *)AREA);
    shot++;
    lapic_write(APIC_EOI, 0);
}

static volatile bool reader_stop;

static void reader(void)
{
    sti();
    while (!reader_stop) {
        unsigned generation = shot;
        uint64_t value = *(volatile uint64_t *)AREA;
        if (value < generation && shot == generation)
            old_seen++;
    }
    cli();
}

static void test_shootdown(void)
{
    boot_pml4[1] = (uintptr_t)pdpt | 3;
    pdpt[0] = (uintptr_t)pd | 3;
    pd[0] = (uintptr_t)pt | 3;
    pt[0] = (uintptr_t)pages[0] | 3;
    trap_handlers[0x62] = on_shootdown;
    shot = old_seen = 0;
    reader_stop = false;
    start_work(reader);
    unsigned n;
    for (n = 1; n <= 500; n++) {
        pages[n & 1][0] = n;
        pt[0] = (uintptr_t)pages[n & 1] | 3;
        send(0x4000 | 0x62);
        if (!wait_for(&shot, n, 1000))
            break;
    }
    reader_stop = true;
    check(finish_work() && n == 501, "500 shootdowns are answered (%u)", n);
    expect_eq(old_seen, 0, "after its INVLPG the other sees the new page");
}

/* ---- code modified by the other processor ---- */

static uint8_t patch[4096] __attribute__((aligned(4096)));
static volatile unsigned patch_go, patch_seen;

static void run_patched(void)
{
    for (unsigned n = 1; n <= HANDSHAKES; n++) {
        while (patch_go != n)
            ;
        asm_volatile("cpuid" : : "a"(0) : "rbx", "rcx", "rdx", "memory"); /* serialize: SDM vol. 3, 8.1.3 */
        unsigned value;
        asm_volatile("call *%1" : "=a"(value) : "r"(patch) : "memory");
        patch_seen += value == n;
        asm_volatile("" ::: "memory");
        turn_done = n;
    }
}

static void test_cross_modifying(void)
{
    turn_done = 0;
    patch[0] = 0xb8; /* mov eax, n; ret */
    patch[5] = 0xc3;
    start_work(run_patched);
    for (unsigned n = 1; n <= HANDSHAKES; n++) {
        memcpy(patch + 1, (const void *)&n, 4);
        patch_go = n;
        while (turn_done != n)
            ;
    }
    check(finish_work() && patch_seen == HANDSHAKES, "code written by the other processor (%u)", patch_seen);
    /* Without agreement, aligned and in one piece: old or new, never torn. */
}

static volatile unsigned torn;
static volatile bool torn_stop;

static void run_unsynchronized(void)
{
    while (!torn_stop) {
        unsigned value;
        asm_volatile("call *%1" : "=a"(value) : "r"(patch + 64 + 3) : "memory"); /* the immediate is aligned */
        torn += value != 0x11111111 && value != 0x22222222;
    }
}

static void test_torn(void)
{
    patch[67] = 0xb8;
    *(volatile uint32_t *)(patch + 68) = 0x11111111;
    patch[72] = 0xc3;
    torn_stop = false;
    start_work(run_unsynchronized);
    for (unsigned n = 0; n < ROUNDS; n++)
        *(volatile uint32_t *)(patch + 68) = n & 1 ? 0x11111111 : 0x22222222;
    torn_stop = true;
    check(finish_work() && torn == 0, "an aligned immediate changes in one piece (%u)", torn);
}

static void halt_forever(void)
{
    for (;;)
        asm_volatile("cli; hlt");
}

static void test_nmi_and_init(void)
{
    start_work(halt_forever);
    delay_us(2000);
    trap_handlers[NMI] = on_ipi;
    unsigned before = ipis_on_ap;
    send(0x4400);
    check(wait_for(&ipis_on_ap, before + 1, 1000), "an NMI wakes the other from CLI, HLT");
    send(0x4500);
    delay_us(1000);
    send(0x4600 | TRAMPOLINE >> 12);
    check(wait_for(&ap_started, 2, 1000), "INIT and SIPI once more");
}

void test_main(void)
{
    if (!start())
        return;
    test_ipis();
    test_atomics();
    test_order();
    test_shootdown();
    test_cross_modifying();
    test_torn();
    test_nmi_and_init();
}
