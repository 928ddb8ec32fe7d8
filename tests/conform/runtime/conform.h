/*
 * The runtime of the conformance programs: freestanding, ring 0, 64-bit with the first 4 GiB mapped one to one, or 32-bit without paging (-m32).
 *
 * A program is one test_main(). It states what it expects by check and the expect_* macros, each of which prints a line "ok NAME" or "not ok NAME: why"; the runtime
 * ends with "DONE n failures" and powers off. TRY runs a statement and tells which vector it trapped with; what went before it in memory stays as it was, and
 * registers that C relies on come back. Handlers in trap_handlers run instead of that and return to the interrupted code.
 */
#ifndef DOPPEL_CONFORM_H
#define DOPPEL_CONFORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef unsigned long reg_t;

enum { DE = 0, DB, NMI, BP, OF, BR, UD, NM, DF, TS = 10, NP, SS, GP, PF, MF = 16, AC, MC, XM };
#define NO_TRAP (-1)
#define USER_DONE 0x30 /* INT that ends ring 3 code */

enum {
    KCODE = 0x08, KDATA = 0x10, KCODE32 = 0x18, UCODE32 = 0x23, UDATA = 0x2b, UCODE = 0x33, KCODE16 = 0x38, KDATA16 = 0x40, UCODE16 = 0x4b,
    TSS_SELECTOR = 0x50, FREE_SELECTOR = 0x60, /* from here: the program's own, up to 0x200 */
};

#define FLAG_CF 1u
#define FLAG_ZF (1u << 6)
#define FLAG_TF (1u << 8)
#define FLAG_IF (1u << 9)
#define FLAG_DF (1u << 10)
#define FLAG_NT (1u << 14)
#define FLAG_RF (1u << 16)
#define FLAG_VM (1u << 17)
#define FLAG_AC (1u << 18)

#ifdef __x86_64__
struct frame {
    reg_t r15, r14, r13, r12, r11, r10, r9, r8, di, si, bp, bx, dx, cx, ax, vector, error, ip, cs, flags, sp, ss;
};
struct gate {
    uint16_t offset0, selector;
    uint8_t ist, type;
    uint16_t offset1;
    uint32_t offset2, zero;
};
struct tss {
    uint32_t reserved0;
    uint64_t rsp[3], reserved1, ist[7], reserved2;
    uint16_t reserved3, io_map;
    uint8_t io[32];
} __attribute__((packed));
#else
struct frame {
    reg_t es, ds, di, si, bp, own_sp, bx, dx, cx, ax, vector, error, ip, cs, flags, sp, ss; /* sp and ss: from an outer ring only */
};
struct gate {
    uint16_t offset0, selector;
    uint8_t ist, type;
    uint16_t offset1;
};
struct tss {
    uint32_t link, esp0, ss0, esp1, ss1, esp2, ss2, cr3, eip, eflags, eax, ecx, edx, ebx, esp, ebp, esi, edi, es, cs, ss, ds, fs, gs, ldt;
    uint16_t trap, io_map;
    uint8_t io[32];
} __attribute__((packed));
#endif

/* What the trap that ended the last TRY was. */
struct trap {
    int vector;
    reg_t error, ip, cs, flags, sp, ss, cr2, ax, bx, cx, dx;
};
extern volatile struct trap trap;
typedef void trap_handler(struct frame *frame);
extern trap_handler *volatile trap_handlers[256];
extern volatile unsigned trap_counts[256];

extern uint64_t gdt[64];
extern struct gate idt[256];
extern struct tss tss;
extern uint32_t start_info[2];
extern uint8_t image_end[];
struct table_pointer {
    uint16_t limit;
    reg_t base;
} __attribute__((packed));
extern struct table_pointer gdt_pointer, idt_pointer;
#define STACK_BYTES 32768
extern uint8_t kernel_stack_bytes[STACK_BYTES], user_stack_bytes[STACK_BYTES];
#define kernel_stack (kernel_stack_bytes + STACK_BYTES) /* after a change to ring 0 */
#define user_stack (user_stack_bytes + STACK_BYTES)

void test_main(void);

void print(const char *format, ...) __attribute__((format(printf, 1, 2)));
bool check(bool good, const char *format, ...) __attribute__((format(printf, 2, 3)));
void skip(const char *name, const char *why);
_Noreturn void finish(void);

int trap_save(void) __attribute__((returns_twice));
void trap_begin(void);
void trap_end(void);

#define TRY(...)                                                                                                                                     \
    ({                                                                                                                                               \
        trap_begin();                                                                                                                                \
        if (!trap_save()) {                                                                                                                          \
            __VA_ARGS__;                                                                                                                             \
        }                                                                                                                                            \
        trap_end();                                                                                                                                  \
        trap.vector;                                                                                                                                 \
    })

bool expect_trap(int vector, reg_t error, const char *name);
#define expect_fault(vector, error, name, ...)                                                                                                       \
    ({                                                                                                                                               \
        (void)TRY(__VA_ARGS__);                                                                                                                      \
        expect_trap(vector, error, name);                                                                                                            \
    })
#define expect_ok(name, ...) expect_fault(NO_TRAP, 0, name, __VA_ARGS__)
bool expect_eq(uint64_t got, uint64_t want, const char *name);

void gate_set(unsigned vector, void *target, uint16_t selector, uint8_t type, uint8_t ist);
void gate_reset(unsigned vector); /* the runtime's own handler */
uint64_t descriptor(uint32_t base, uint32_t limit, unsigned attributes); /* attributes: bits 40..47 in 7:0, G D L AVL in 15:12 */

/* Code in any ring and mode, on the given stack; comes back by a trap only: use inside TRY. */
struct entry {
    reg_t ip, cs, flags, sp, ss, ax, bx, cx, dx, si, di;
};
void enter(const struct entry *entry);
void leave_user(void);
/*
 * With the word "direct" on the command line ring 3 is as Linux has it, so that an engine may execute it on the processor itself: FSGSBASE, all of XCR0, and interrupts on,
 * though none comes. user_flags is then EFLAGS.IF. Of the first processor; the others have no TSS.
 */
extern reg_t user_flags;
void user_like_linux(void);
const char *command_line(const char *word); /* what follows it there, or NULL */
/* Runs fn(arg) in ring 3, ending in USER_DONE when it returns: use inside TRY. */
void user_call(void (*fn)(reg_t), reg_t arg);

#define asm_volatile __asm__ volatile
static inline void outb(uint16_t port, uint8_t value) { asm_volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outw(uint16_t port, uint16_t value) { asm_volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outl(uint16_t port, uint32_t value) { asm_volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port) { uint8_t v; asm_volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint16_t inw(uint16_t port) { uint16_t v; asm_volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline uint32_t inl(uint16_t port) { uint32_t v; asm_volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

#define CONTROL_REGISTER(n)                                                                                                                          \
    static inline reg_t read_cr##n(void) { reg_t v; asm_volatile("mov %%cr" #n ", %0" : "=r"(v)::"memory"); return v; }                             \
    static inline void write_cr##n(reg_t v) { asm_volatile("mov %0, %%cr" #n ::"r"(v) : "memory"); }
CONTROL_REGISTER(0)
CONTROL_REGISTER(2)
CONTROL_REGISTER(3)
CONTROL_REGISTER(4)
#ifdef __x86_64__
CONTROL_REGISTER(8)
#endif
#define DEBUG_REGISTER(n)                                                                                                                            \
    static inline reg_t read_dr##n(void) { reg_t v; asm_volatile("mov %%db" #n ", %0" : "=r"(v)::"memory"); return v; }                             \
    static inline void write_dr##n(reg_t v) { asm_volatile("mov %0, %%db" #n ::"r"(v) : "memory"); }
DEBUG_REGISTER(0)
DEBUG_REGISTER(1)
DEBUG_REGISTER(2)
DEBUG_REGISTER(3)
DEBUG_REGISTER(6)
DEBUG_REGISTER(7)

static inline uint64_t rdmsr(uint32_t index)
{
    uint32_t low, high;
    asm_volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(index));
    return (uint64_t)high << 32 | low;
}
static inline void wrmsr(uint32_t index, uint64_t value)
{
    asm_volatile("wrmsr" ::"c"(index), "a"((uint32_t)value), "d"((uint32_t)(value >> 32)) : "memory");
}
struct cpuid {
    uint32_t a, b, c, d;
};
static inline struct cpuid cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid r;
    asm_volatile("cpuid" : "=a"(r.a), "=b"(r.b), "=c"(r.c), "=d"(r.d) : "a"(leaf), "c"(subleaf));
    return r;
}
static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    asm_volatile("lfence; rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}
static inline void invlpg(const void *address) { asm_volatile("invlpg (%0)" ::"r"(address) : "memory"); }
static inline reg_t flags_read(void) { reg_t v; asm_volatile("pushf; pop %0" : "=r"(v)); return v; }
static inline void flags_write(reg_t v) { asm_volatile("push %0; popf" ::"r"(v) : "memory", "cc"); }
static inline void cpu_pause(void) { asm_volatile("pause" ::: "memory"); }
static inline void sti(void) { asm_volatile("sti" ::: "memory"); }
static inline void cli(void) { asm_volatile("cli" ::: "memory"); }
static inline void halt(void) { asm_volatile("sti; hlt" ::: "memory"); }
static inline void lgdt(const struct table_pointer *p) { asm_volatile("lgdt %0" ::"m"(*p) : "memory"); }
static inline void lidt(const struct table_pointer *p) { asm_volatile("lidt %0" ::"m"(*p) : "memory"); }
static inline void ltr(uint16_t selector) { asm_volatile("ltr %0" ::"r"(selector) : "memory"); }

void *memset(void *to, int byte, size_t length);
void *memcpy(void *to, const void *from, size_t length);
int memcmp(const void *a, const void *b, size_t length);

/* Local APIC, by its page. */
#define LAPIC 0xfee00000u
static inline uint32_t lapic_read(uint32_t offset) { return *(volatile uint32_t *)(uintptr_t)(LAPIC + offset); }
static inline void lapic_write(uint32_t offset, uint32_t value) { *(volatile uint32_t *)(uintptr_t)(LAPIC + offset) = value; }
/* Busy waiting by the PM timer. */
uint32_t pm_timer(void);
void delay_us(unsigned us);
/* Waits until *value reaches least, at most ms; true when it did. */
bool wait_for(const volatile unsigned *value, unsigned least, unsigned ms);

#endif
