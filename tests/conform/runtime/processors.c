/* See processors.h. */
#include "processors.h"

#ifdef __x86_64__

#define APIC_ID 0x20
#define APIC_SVR 0xf0
#define APIC_ICR 0x300
#define APIC_ICR_HIGH 0x310
#define TRAMPOLINE 0x8000u
#define APIC_EOI 0xb0
#define WAKE 0xf0
#define SPINS 200u
#define OTHER_STACK_BYTES 16384u

extern uint8_t other_start[], other_start_end[];
uint8_t other_stacks[PROCESSORS_MAX][OTHER_STACK_BYTES] __attribute__((aligned(16)));
volatile unsigned others_started; /* also gives out numbers, in the order of arrival */
static volatile unsigned others_ready, work_number[PROCESSORS_MAX], work_done[PROCESSORS_MAX];
static uint8_t apic_ids[PROCESSORS_MAX];
static void (*volatile work[PROCESSORS_MAX])(unsigned);

/* Real mode at TRAMPOLINE, then as the runtime's own start. */
__asm__(".code16\n"
        "other_start: cli\n xor %ax, %ax\n mov %ax, %ds\n lgdtl 0x8000 + other_gdtr - other_start\n mov $0x11, %eax\n mov %eax, %cr0\n ljmpl $0x18, $other_32\n"
        "other_gdtr: .word 0x1ff\n .long gdt\n other_start_end:\n"
        ".code32\n"
        "other_32: mov $0x10, %eax\n mov %eax, %ds\n mov %eax, %es\n mov %eax, %ss\n"
        " mov $1, %edi\n lock xadd %edi, others_started\n inc %edi\n"
        " mov %edi, %esp\n inc %esp\n shl $14, %esp\n add $other_stacks, %esp\n call long_mode_on\n ljmp $0x08, $other_64\n"
        ".code64\n"
        "other_64: mov %esp, %esp\n xor %ebp, %ebp\n mov %edi, %edi\n call other_main\n");

void other_main(unsigned number);

void other_main(unsigned number)
{
    lgdt(&gdt_pointer);
    lidt(&idt_pointer);
    lapic_write(APIC_SVR, 0x1ff);
    apic_ids[number] = (uint8_t)(lapic_read(APIC_ID) >> 24);
    asm_volatile("lock incl %0" : "+m"(others_ready)::"memory");
    for (unsigned done = 0;;) {
        for (unsigned n = 0; work_number[number] == done; n++) {
            if (n < SPINS)
                cpu_pause();
            else
                halt();
            cli();
        }
        done = work_number[number];
        work[number](number);
        work_done[number] = done;
    }
}

unsigned processor_number(void)
{
    uint8_t id = (uint8_t)(lapic_read(APIC_ID) >> 24);
    for (unsigned n = 1; n <= others_ready && n < PROCESSORS_MAX; n++)
        if (apic_ids[n] == id)
            return n;
    return 0;
}

static void send(uint8_t apic_id, uint32_t command)
{
    lapic_write(APIC_ICR_HIGH, (uint32_t)apic_id << 24);
    lapic_write(APIC_ICR, command);
}

void processor_send(unsigned number, uint32_t command)
{
    send(number ? apic_ids[number] : 0, command);
}

static void on_wake(struct frame *frame)
{
    lapic_write(APIC_EOI, 0);
}

unsigned processors_start(unsigned wanted)
{
    trap_handlers[WAKE] = on_wake;
    memcpy((void *)(uintptr_t)TRAMPOLINE, other_start, (size_t)(other_start_end - other_start));
    lapic_write(APIC_SVR, 0x1ff);
    for (unsigned id = 1; id < wanted && id < PROCESSORS_MAX; id++) {
        send((uint8_t)id, 0x4500);
        delay_us(10000);
        send((uint8_t)id, 0x4600 | TRAMPOLINE >> 12);
        if (!wait_for(&others_ready, id, 1000))
            break;
    }
    return others_ready + 1;
}

void processor_begin(unsigned number, void (*fn)(unsigned number))
{
    work[number] = fn;
    work_number[number]++;
    processor_send(number, 0x4000 | WAKE);
}

bool processor_wait(unsigned number, unsigned ms)
{
    return wait_for(&work_done[number], work_number[number], ms);
}

bool processors_run(void (*fn)(unsigned number), unsigned count, unsigned ms)
{
    bool good = true;
    for (unsigned n = 1; n < count; n++)
        processor_begin(n, fn);
    fn(0);
    for (unsigned n = 1; n < count; n++)
        good &= processor_wait(n, ms);
    return good;
}

void processors_meet(unsigned count)
{
    static volatile unsigned arrived, meeting;
    unsigned now = meeting, before = 1;
    asm_volatile("lock xaddl %0, %1" : "+r"(before), "+m"(arrived)::"memory");
    if (before + 1 == count) {
        arrived = 0;
        meeting++;
    } else {
        while (meeting == now)
            cpu_pause();
    }
}

#endif
