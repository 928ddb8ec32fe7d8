/* See conform.h. */
#include "conform.h"

#include <stdarg.h>

#define COM1 0x3f8
#define PM_CONTROL 0x604
#define PM_TIMER 0x608
#define PM_TIMER_HZ 3579545u
#define GATE_INTERRUPT 0x8e

volatile struct trap trap;
trap_handler *volatile trap_handlers[256];
volatile unsigned trap_counts[256];
reg_t trap_context[8];
reg_t user_flags;
static bool armed;
static unsigned failures, checks;

struct gate idt[256] __attribute__((aligned(16)));
struct tss tss __attribute__((aligned(256)));
struct table_pointer idt_pointer;
uint8_t kernel_stack_bytes[STACK_BYTES] __attribute__((aligned(4096)));
uint8_t user_stack_bytes[STACK_BYTES] __attribute__((aligned(4096)));

extern uint8_t trap_stubs[256][16];
_Noreturn void trap_jump(void);
_Noreturn void runtime_start(void);
void trap_dispatch(struct frame *frame);

/* ---- memory ---- */

void *memset(void *to, int byte, size_t length)
{
    void *p = to;
    asm_volatile("rep stosb" : "+D"(p), "+c"(length) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t length)
{
    void *p = to;
    asm_volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(length)::"memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t length)
{
    const uint8_t *x = a, *y = b;
    for (size_t n = 0; n < length; n++)
        if (x[n] != y[n])
            return x[n] - y[n];
    return 0;
}

/* ---- printing ---- */

static void put(char c)
{
    while (!(inb(COM1 + 5) & 0x20))
        ;
    outb(COM1, (uint8_t)c);
}

static void put_text(const char *text)
{
    while (*text)
        put(*text++);
}

static void put_hex(uint64_t value)
{
    int shift = 60;
    while (shift && !(value >> shift & 15))
        shift -= 4;
    for (; shift >= 0; shift -= 4)
        put("0123456789abcdef"[value >> shift & 15]);
}

static void put_decimal(uint32_t value)
{
    char digits[10];
    unsigned n = 0;
    do {
        digits[n++] = (char)('0' + value % 10);
        value /= 10;
    } while (value);
    while (n)
        put(digits[--n]);
}

/* %s %d %u %x, with l and ll on %x only. */
static void print_list(const char *format, va_list arguments)
{
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        unsigned longs = 0;
        while (*++format == 'l' || *format == '#')
            longs += *format == 'l';
        if (*format == 's') {
            put_text(va_arg(arguments, const char *));
        } else if (*format == 'x') {
            put_text("0x");
            put_hex(longs == 2 ? va_arg(arguments, unsigned long long) : longs ? va_arg(arguments, unsigned long) : va_arg(arguments, unsigned));
        } else {
            int value = va_arg(arguments, int);
            if (*format == 'd' && value < 0) {
                put('-');
                value = -value;
            }
            put_decimal((uint32_t)value);
        }
    }
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_list(format, arguments);
    va_end(arguments);
}

bool check(bool good, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    checks++;
    failures += !good;
    put_text(good ? "ok " : "not ok ");
    print_list(format, arguments);
    put('\n');
    va_end(arguments);
    return good;
}

void skip(const char *name, const char *why)
{
    print("ok %s # SKIP %s\n", name, why);
}

_Noreturn void finish(void)
{
    print("DONE %u failures\n", failures);
    while (!(inb(COM1 + 5) & 0x40))
        ;
    outw(PM_CONTROL, 5 << 10 | 1 << 13); /* this machine's S5 */
    outw(PM_CONTROL, 1 << 13);           /* other machines' */
    for (;;)
        asm_volatile("cli; hlt");
}

/* ---- expectations ---- */

void trap_begin(void)
{
    trap.vector = NO_TRAP;
    trap.error = 0;
    armed = true;
}

void trap_end(void)
{
    armed = false;
}

bool expect_trap(int vector, reg_t error, const char *name)
{
    if (trap.vector == vector && trap.error == error)
        return check(true, "%s", name);
    return check(false, "%s: vector %d error %lx instead of vector %d error %lx (ip %lx cr2 %lx)", name, trap.vector, trap.error, vector, error, trap.ip,
                 trap.cr2);
}

bool expect_eq(uint64_t got, uint64_t want, const char *name)
{
    if (got == want)
        return check(true, "%s", name);
    return check(false, "%s: %llx instead of %llx", name, (unsigned long long)got, (unsigned long long)want);
}

/* ---- traps ---- */

void trap_dispatch(struct frame *frame)
{
    unsigned vector = (unsigned)frame->vector;
    trap_counts[vector]++;
    if (trap_handlers[vector]) {
        trap_handlers[vector](frame);
        return;
    }
    trap.vector = (int)vector;
    trap.error = frame->error;
    trap.ip = frame->ip;
    trap.cs = frame->cs;
    trap.flags = frame->flags;
    trap.cr2 = read_cr2();
    trap.ax = frame->ax;
    trap.bx = frame->bx;
    trap.cx = frame->cx;
    trap.dx = frame->dx;
    bool has_stack = sizeof(reg_t) == 8 || (frame->cs & 3);
    trap.sp = has_stack ? frame->sp : (reg_t)&frame->sp;
    trap.ss = has_stack ? frame->ss : KDATA;
    if (armed) {
        armed = false;
        trap_jump();
    }
    failures++;
    print("not ok unexpected trap: vector %u error %lx at %lx:%lx cr2 %lx\n", vector, trap.error, trap.cs, trap.ip, trap.cr2);
    finish();
}

void gate_set(unsigned vector, void *target, uint16_t selector, uint8_t type, uint8_t ist)
{
    uintptr_t address = (uintptr_t)target;
    idt[vector] = (struct gate){
        .offset0 = (uint16_t)address, .selector = selector, .ist = ist, .type = type, .offset1 = (uint16_t)(address >> 16),
#ifdef __x86_64__
        .offset2 = (uint32_t)(address >> 32),
#endif
    };
}

void gate_reset(unsigned vector)
{
    gate_set(vector, trap_stubs[vector], KCODE, GATE_INTERRUPT | (vector == USER_DONE || vector == BP || vector == OF ? 0x60 : 0), 0);
}

uint64_t descriptor(uint32_t base, uint32_t limit, unsigned attributes)
{
    return (limit & 0xffff) | (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(attributes & 0xf0ff) << 40 | (uint64_t)(limit & 0xf0000) << 32 |
           (uint64_t)(base & 0xff000000) << 32;
}

void user_call(void (*fn)(reg_t), reg_t arg)
{
    reg_t *stack = (reg_t *)(user_stack - 256);
    struct entry entry = {.ip = (reg_t)fn, .cs = UCODE, .flags = 2 | user_flags, .ss = UDATA, .di = arg};
    *--stack = arg;
    *--stack = (reg_t)leave_user;
    entry.sp = (reg_t)stack;
    enter(&entry);
}

/* In PVH's command line. */
const char *command_line(const char *word)
{
    const uint64_t *info = (const uint64_t *)(uintptr_t)start_info[0];
    const char *p = info && *(const uint32_t *)info == 0x336ec578 ? (const char *)(uintptr_t)info[3] : NULL;
    size_t length = 0;
    while (word[length])
        length++;
    for (; p && *p; p++)
        if (!memcmp(p, word, length))
            return p + length;
    return NULL;
}

#ifdef __x86_64__
void user_like_linux(void)
{
    const unsigned fsgsbase = 1u << 16, osxsave = 1u << 18;
    if (!command_line("direct"))
        return;
    user_flags = FLAG_IF;
    write_cr4(read_cr4() | fsgsbase | osxsave);
    asm_volatile("xsetbv" ::"c"(0), "a"(cpuid(0xd, 0).a), "d"(0));
}
#else
void user_like_linux(void) {}
#endif

/* ---- time ---- */

uint32_t pm_timer(void)
{
    return inl(PM_TIMER);
}

void delay_us(unsigned us)
{
    for (; us > 1000; us -= 1000) {
        uint32_t start = pm_timer();
        while (((pm_timer() - start) & 0xffffff) < PM_TIMER_HZ / 1000)
            cpu_pause();
    }
    uint32_t start = pm_timer();
    while (((pm_timer() - start) & 0xffffff) < us * 358 / 100)
        cpu_pause();
}

bool wait_for(const volatile unsigned *value, unsigned least, unsigned ms)
{
    for (unsigned n = 0; n < ms * 10 && *value < least; n++)
        delay_us(100);
    return *value >= least;
}

/* ---- start ---- */

static void tss_load(void)
{
    uint32_t base = (uint32_t)(uintptr_t)&tss;
#ifdef __x86_64__
    tss.rsp[0] = (reg_t)kernel_stack;
#else
    tss.esp0 = (reg_t)kernel_stack;
    tss.ss0 = KDATA;
#endif
    tss.io_map = sizeof(tss);
    gdt[TSS_SELECTOR / 8] = descriptor(base, sizeof(tss) - 1, 0x89);
    gdt[TSS_SELECTOR / 8 + 1] = 0;
    ltr(TSS_SELECTOR);
}

_Noreturn void runtime_start(void)
{
    outb(COM1 + 1, 0);
    outb(COM1 + 3, 3);
    outb(COM1 + 2, 1);
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
    for (unsigned n = 0; n < 256; n++)
        gate_reset(n);
    idt_pointer = (struct table_pointer){sizeof(idt) - 1, (reg_t)idt};
    lidt(&idt_pointer);
    tss_load();
    user_like_linux();
    test_main();
    finish();
}
