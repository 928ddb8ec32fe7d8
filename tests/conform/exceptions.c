/*
 * Exceptions in 64-bit mode: every vector that a program can raise, its error code, the RIP and RF pushed, priorities, double faults, IST, single steps and
 * hardware breakpoints. SDM vol. 3, ch. 6 and 17.2, 17.3.
 */
#include "runtime/conform.h"

#define DR6_BS (1u << 14)
#define DR6_BD (1u << 13)
#define DR7_GD (1u << 13)
#define IDT_ERROR(vector) ((vector) << 3 | 2)

static volatile uint64_t cell, cells[4] __attribute__((aligned(16)));

/* ---- vectors ---- */

extern uint8_t ud_at[], div_at[], int3_at[], int1_at[], mov_cr_at[];

static __attribute__((noinline, noclone)) void do_ud(void) { asm_volatile(".globl ud_at\nud_at: ud2"); }
static __attribute__((noinline, noclone)) void do_div(void) { asm_volatile("xor %%ecx, %%ecx\n.globl div_at\ndiv_at: div %%ecx" ::: "rax", "rcx", "rdx"); }
static __attribute__((noinline, noclone)) void do_int3(void) { asm_volatile(".globl int3_at\nint3_at: int3"); }
static __attribute__((noinline, noclone)) void do_int1(void) { asm_volatile(".globl int1_at\nint1_at: .byte 0xf1"); }

static void user_ud(reg_t arg) { asm_volatile("ud2"); }
static void user_cli(reg_t arg) { cli(); }
static void user_hlt(reg_t arg) { asm_volatile("hlt"); }
static void user_in(reg_t arg) { (void)inb(0x80); }
static void user_cr(reg_t arg) { (void)read_cr0(); }
static void user_int40(reg_t arg) { asm_volatile("int $0x40"); }
static void user_int3(reg_t arg) { asm_volatile("int3"); }
static void user_wrmsr(reg_t arg) { wrmsr(0x10, 0); }
static void user_lgdt(reg_t arg) { lgdt(&gdt_pointer); }
static void user_iopl(reg_t arg) { flags_write(2 | 3 << 12 | (FLAG_IF ^ user_flags)); cells[0] = flags_read(); }
static void user_invd(reg_t arg) { asm_volatile("wbinvd"); }
static void user_clts(reg_t arg) { asm_volatile("clts"); }
static void user_dr(reg_t arg) { (void)read_dr0(); }

static __attribute__((noinline)) void test_vectors(void)
{
    expect_fault(DE, 0, "#DE by DIV", do_div());
    check(trap.ip == (reg_t)div_at, "#DE points at the instruction");
    check(trap.flags & FLAG_RF, "a fault pushes RF");
    expect_fault(DE, 0, "#DE by IDIV overflow", asm_volatile("idivl %2" ::"a"(0), "d"(0x80000000), "r"(1)));
    expect_fault(DE, 0, "#DE by IDIV of the least by -1", asm_volatile("idivq %2" ::"a"(0), "d"(1ull << 63), "r"(-1ll)));
    expect_fault(BP, 0, "#BP", do_int3());
    check(trap.ip == (reg_t)int3_at + 1, "#BP points after the instruction");
    check(!(trap.flags & FLAG_RF), "a trap pushes no RF");
    expect_fault(DB, 0, "#DB by INT1", do_int1());
    check(trap.ip == (reg_t)int1_at + 1, "INT1 points after the instruction");
    expect_fault(UD, 0, "#UD by UD2", do_ud());
    check(trap.ip == (reg_t)ud_at, "#UD points at the instruction");
    expect_fault(UD, 0, "#UD by UD1", asm_volatile(".byte 0x0f, 0xb9, 0xc0"));
    expect_fault(UD, 0, "#UD by UD0", asm_volatile(".byte 0x0f, 0xff, 0xc0"));
    expect_fault(UD, 0, "#UD by LOCK MOV", asm_volatile(".byte 0xf0, 0x89, 0x00"));
    expect_fault(UD, 0, "#UD by LOCK ADD to a register", asm_volatile(".byte 0xf0, 0x01, 0xc0"));
    expect_fault(UD, 0, "#UD by LOCK CMP to memory", asm_volatile(".byte 0xf0, 0x39, 0x00" ::"a"(&cell)));
    expect_fault(UD, 0, "#UD by PUSH ES in 64-bit mode", asm_volatile(".byte 0x06"));
    expect_fault(UD, 0, "#UD by INTO in 64-bit mode", asm_volatile(".byte 0xce"));
    expect_fault(UD, 0, "#UD by AAA in 64-bit mode", asm_volatile(".byte 0x37"));
    expect_fault(UD, 0, "#UD by a far call to a register", asm_volatile(".byte 0xff, 0xd8"));
    expect_fault(UD, 0, "#UD by MOV to CS", asm_volatile(".byte 0x8e, 0xc8"));
    expect_fault(UD, 0, "#UD by MOV from CR1", asm_volatile(".byte 0x0f, 0x20, 0xc8" ::: "rax"));
    expect_fault(UD, 0, "#UD by LEA of a register", asm_volatile(".byte 0x8d, 0xc0"));
    expect_fault(GP, 0, "#GP by 16 bytes of instruction",
                 asm_volatile(".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90"));
    expect_ok("15 bytes of instruction", asm_volatile(".byte 0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x66,0x90"));
    expect_fault(GP, 0, "#GP by WRMSR of EFER's reserved bits", wrmsr(0xc0000080, 1ull << 40));
    expect_fault(0x40, 0, "INT n from ring 0 through a gate of DPL 0", asm_volatile("int $0x40"));
}

static __attribute__((noinline)) void test_user(void)
{
    expect_fault(UD, 0, "user UD2", user_call(user_ud, 0));
    check((trap.cs & 0xffff) == UCODE && (trap.ss & 0xffff) == UDATA, "CS and SS of ring 3 are pushed");
    expect_fault(GP, 0, "user CLI", user_call(user_cli, 0));
    expect_fault(GP, 0, "user HLT", user_call(user_hlt, 0));
    expect_fault(GP, 0, "user IN", user_call(user_in, 0));
    expect_fault(GP, 0, "user MOV from CR0", user_call(user_cr, 0));
    expect_fault(GP, 0, "user MOV from DR0", user_call(user_dr, 0));
    expect_fault(GP, 0, "user WRMSR", user_call(user_wrmsr, 0));
    expect_fault(GP, 0, "user LGDT", user_call(user_lgdt, 0));
    expect_fault(GP, 0, "user WBINVD", user_call(user_invd, 0));
    expect_fault(GP, 0, "user CLTS", user_call(user_clts, 0));
    expect_fault(GP, IDT_ERROR(0x40), "user INT n through a gate of DPL 0", user_call(user_int40, 0));
    expect_fault(BP, 0, "user INT3 through a gate of DPL 3", user_call(user_int3, 0));
    expect_fault(USER_DONE, 0, "user POPF", user_call(user_iopl, 0));
    check(!(cells[0] & 3 << 12) && (cells[0] & FLAG_IF) == user_flags, "which changes neither IOPL nor IF");
    tss.io_map = offsetof(struct tss, io);
    memset(tss.io, 0xff, sizeof tss.io);
    tss.io[0x80 / 8] = 0xfe;
    gdt[TSS_SELECTOR / 8] = descriptor((uint32_t)(uintptr_t)&tss, offsetof(struct tss, io) + 0x80 / 8, 0x89);
    ltr(TSS_SELECTOR);
    expect_fault(GP, 0, "I/O map whose second byte is beyond the TSS's limit", user_call(user_in, 0));
    gdt[TSS_SELECTOR / 8] = descriptor((uint32_t)(uintptr_t)&tss, sizeof tss + 200, 0x89);
    ltr(TSS_SELECTOR);
    expect_fault(USER_DONE, 0, "I/O map allows the port", user_call(user_in, 0));
    tss.io[0x80 / 8] = 0xff;
    expect_fault(GP, 0, "I/O map refuses the port", user_call(user_in, 0));
    tss.io_map = sizeof tss;
}

static __attribute__((noinline)) void test_gates(void)
{
    idt[0x41].type = 0x0e; /* not present */
    expect_fault(NP, IDT_ERROR(0x41), "#NP by a gate that is not present", asm_volatile("int $0x41"));
    idt[0x41].type = 0x86; /* 16-bit gate: invalid in long mode */
    expect_fault(GP, IDT_ERROR(0x41), "#GP by a 16-bit gate", asm_volatile("int $0x41"));
    gate_reset(0x41);
    idt[0x41].selector = KDATA;
    expect_fault(GP, KDATA, "#GP by a gate to data", asm_volatile("int $0x41"));
    idt[0x41].selector = KCODE32;
    expect_fault(GP, KCODE32, "#GP by a gate to 32-bit code", asm_volatile("int $0x41"));
    idt[0x41].selector = UCODE;
    expect_fault(GP, UCODE & ~3, "#GP by a gate to an outer ring", asm_volatile("int $0x41"));
    idt[0x41].selector = 0;
    expect_fault(GP, 0, "#GP by a gate with a null selector", asm_volatile("int $0x41"));
    idt[0x41].selector = 0x208;
    expect_fault(GP, 0x208, "#GP by a gate beyond the GDT", asm_volatile("int $0x41"));
    gate_reset(0x41);
    idt[0x41].offset2 = 0x8000;
    expect_fault(GP, 0, "#GP by a gate's offset that is not canonical", asm_volatile("int $0x41"));
    gate_reset(0x41);
    struct table_pointer small = {0x41 * 16 - 1, (reg_t)idt};
    lidt(&small);
    expect_fault(GP, IDT_ERROR(0x41), "#GP beyond the IDT's limit", asm_volatile("int $0x41"));
    lidt(&idt_pointer);
}

/* ---- double faults, IST ---- */

static uint8_t ist_stack[3][4096] __attribute__((aligned(16)));

static __attribute__((noinline)) void test_double(void)
{
    idt[DF].ist = 1;
    tss.ist[0] = (reg_t)ist_stack[1];
    idt[GP].type = 0x0e;
    expect_fault(DF, 0, "#GP, then #NP for its gate: #DF", wrmsr(0xc0000080, 1ull << 40));
    idt[UD].type = 0x0e;
    expect_fault(NP, IDT_ERROR(UD) | 1, "#UD (benign), then #NP for its gate: #NP with EXT", do_ud());
    gate_reset(UD);
    gate_reset(GP);
    idt[PF].type = 0x0e;
    expect_fault(DF, 0, "#PF, then #NP for its gate: #DF", *(volatile int *)0x8000000000ull);
    gate_reset(PF);
    expect_fault(DF, 0, "#PF while pushing a #PF's frame: #DF",
                 asm_volatile("mov %0, %%rsp; mov (%0), %%al" ::"r"(0x8000001000ull) : "rax"));
    check(trap.sp == 0x8000001000ull, "#DF's frame holds RSP as it was");
    idt[DE].type = 0x0e;
    expect_fault(DF, 0, "#DE, then #NP for its gate: #DF", do_div());
    gate_reset(DE);
    idt[DE].selector = 0x208;
    expect_fault(DF, 0, "#DE, then #GP for its selector: #DF", do_div());
    gate_reset(DE);

    idt[0x42].ist = 2;
    tss.ist[1] = (reg_t)ist_stack[2] - 8; /* the processor aligns it */
    reg_t seen = 0;
    expect_fault(0x42, 0, "INT through IST", asm_volatile("int $0x42"));
    reg_t *top = (reg_t *)(((reg_t)ist_stack[2] - 8) & ~15ul);
    seen = top[-2];
    expect_eq(seen, trap.sp, "the frame is at the stack's aligned top");
    expect_eq(top[-1], KDATA, "with SS above");
    idt[0x42].ist = 3;
    tss.ist[2] = 0x8000000000000000ull;
    expect_fault(SS, 0, "an IST that is not canonical", asm_volatile("int $0x42"));
    gate_reset(0x42);
    gate_reset(DF);
}

/* ---- #DB ---- */

static volatile unsigned db_count;
static volatile reg_t db_ip[16], db_dr6[16], db_flags[16];
static volatile bool db_stop, db_resume;

static void on_db(struct frame *f)
{
    if (db_count < 16) {
        db_ip[db_count] = f->ip;
        db_dr6[db_count] = read_dr6();
        db_flags[db_count] = f->flags;
    }
    db_count++;
    write_dr6(0xffff0ff0);
    if (db_stop)
        f->flags &= ~(reg_t)FLAG_TF;
    if (db_resume)
        f->flags |= FLAG_RF;
}

extern uint8_t step_1[], step_2[], step_3[], step_4[], shadow_1[], shadow_2[], bp_at[], bp_after[], rep_at[], rep_after[], gd_at[];

static __attribute__((noinline)) void test_single_step(void)
{
    trap_handlers[DB] = on_db;
    write_dr6(0xffff0ff0);
    db_count = 0;
    db_stop = db_resume = false;
    asm_volatile("pushf; orl $0x100, (%%rsp); popf\n"
                 "step_1: nop\n"
                 "step_2: add $1, %%eax\n"
                 "step_3: pushf; andl $~0x100, (%%rsp)\n"
                 "popf\n"
                 "step_4: nop" ::: "rax", "cc", "memory");
    /* After each instruction that began with TF set: nop, add, pushf, andl, popf. */
    expect_eq(db_count, 5, "single step: five traps");
    check(db_ip[0] == (reg_t)step_2 && db_ip[1] == (reg_t)step_3 && db_ip[4] == (reg_t)step_4, "single step: each after an instruction");
    check((db_dr6[0] & 0xffff) == (0xff0 | DR6_BS), "single step: DR6.BS");
    check((db_flags[0] & FLAG_TF) && !(db_flags[0] & FLAG_RF), "single step: TF pushed, RF not");

    db_count = 0;
    asm_volatile("mov %%ss, %%eax\n"
                 "pushf; orl $0x100, (%%rsp); popf\n"
                 "mov %%eax, %%ss\n"
                 "shadow_1: nop\n"
                 "shadow_2: pushf; andl $~0x100, (%%rsp); popf" ::: "rax", "cc", "memory");
    check(db_ip[0] == (reg_t)shadow_2, "single step: none right after MOV SS (at %lx, %lx expected)", db_ip[0], (reg_t)shadow_2);

    db_count = 0;
    static uint8_t from[4], to[4];
    reg_t c = 3;
    const void *s = from;
    void *d = to;
    asm_volatile("pushf; orl $0x100, (%%rsp); popf\n"
                 "rep_at: rep movsb\n"
                 "rep_after: pushf; andl $~0x100, (%%rsp); popf"
                 : "+c"(c), "+S"(s), "+D"(d)::"cc", "memory");
    check(db_count == 6 && db_ip[0] == (reg_t)rep_at && db_ip[1] == (reg_t)rep_at && db_ip[2] == (reg_t)rep_after, "single step: each round of REP (%u)",
          db_count);

    db_count = 0;
    db_stop = true;
    asm_volatile("pushf; orl $0x100, (%%rsp); popf; ud2; nop" : : : "cc", "memory");
    trap_handlers[DB] = 0;
}

static void skip_ud(struct frame *f)
{
    f->ip += 2;
}

static void user_step(reg_t arg)
{
    asm_volatile("pushf; orl $0x100, (%%rsp); popf; nop" ::: "memory", "cc");
}

static __attribute__((noinline)) void test_breakpoints(void)
{
    trap_handlers[DB] = on_db;
    db_stop = false;
    db_resume = true;
    db_count = 0;
    write_dr6(0xffff0ff0);
    write_dr0((reg_t)bp_at);
    write_dr7(0x402); /* G0, execution */
    asm_volatile(".globl bp_at\nbp_at: nop\nbp_after: nop" ::: "memory");
    expect_eq(db_count, 1, "execution breakpoint: once, RF skips it");
    check(db_ip[0] == (reg_t)bp_at && (db_dr6[0] & 0xf) == 1, "execution breakpoint: a fault, B0");
    check(!(db_flags[0] & FLAG_RF), "execution breakpoint: RF pushed as it was");

    static const struct {
        const char *name;
        unsigned rw, len, offset, size;
        bool read, write;
    } cases[] = {
        {"write, 1 byte", 1, 0, 0, 1, false, true},   {"write, 4 bytes", 1, 3, 0, 4, false, true},   {"write, 8 bytes", 1, 2, 0, 8, false, true},
        {"access, 4 bytes", 3, 3, 0, 4, true, true},  {"access, last byte of 4", 3, 3, 3, 1, true, true}, {"access beyond", 3, 3, 4, 1, false, false},
        {"access from before", 3, 0, -3, 4, true, true},
    };
    for (unsigned n = 0; n < sizeof cases / sizeof *cases; n++) {
        volatile uint8_t *p = (volatile uint8_t *)&cells[1];
        write_dr1((reg_t)p);
        write_dr7(0x400 | 1 << 3 | cases[n].rw << 20 | cases[n].len << 22);
        p += (int)cases[n].offset;
        for (unsigned write = 0; write < 2; write++) {
            db_count = 0;
            if (cases[n].size == 1)
                write ? (void)(*p = 1) : (void)*p;
            else if (cases[n].size == 4)
                write ? (void)(*(volatile uint32_t *)p = 1) : (void)*(volatile uint32_t *)p;
            else
                write ? (void)(*(volatile uint64_t *)p = 1) : (void)*(volatile uint64_t *)p;
            bool want = write ? cases[n].write : cases[n].read;
            check(db_count == want && (!want || (db_dr6[0] & 0xf) == 2), "data breakpoint: %s, %s (%u)", cases[n].name, write ? "writing" : "reading", db_count);
        }
    }
    write_dr7(0x400 | 1 << 3 | 1 << 20);
    db_count = 0;
    asm_volatile("lock incb %0" : "+m"(*(volatile uint8_t *)&cells[1])::"cc");
    expect_eq(db_count, 1, "data breakpoint: read-modify-write");
    db_count = 0;
    {
        void *d = (void *)&cells[0];
        reg_t c = 16;
        asm_volatile("rep stosb" : "+D"(d), "+c"(c) : "a"(0) : "memory");
    }
    expect_eq(db_count, 1, "data breakpoint: in REP STOSB");
    db_count = 0;
    asm_volatile("push %%rbx; mov %%rsp, %%rbx; lea 8(%0), %%rsp; push %%rax; mov %%rbx, %%rsp; pop %%rbx" ::"r"(&cells[1]) : "memory");
    expect_eq(db_count, 1, "data breakpoint: by PUSH");
    write_dr7(0x400);
    trap_handlers[DB] = 0;

    expect_fault(DB, 0, "DR7.GD", write_dr7(0x400 | DR7_GD); asm_volatile("gd_at: mov %%db0, %%rax" ::: "rax"));
    check(trap.ip == (reg_t)gd_at && (read_dr6() & DR6_BD), "a fault, DR6.BD");
    check(!(read_dr7() & DR7_GD), "GD is clear in the handler");
    write_dr6(0xffff0ff0);
    expect_fault(GP, 0, "DR7 with high bits", write_dr7(1ull << 32));
    expect_fault(GP, 0, "DR6 with high bits", write_dr6(1ull << 32));
    asm_volatile("mov %0, %%db4" ::"r"((reg_t)0xffff0ff1));
    expect_eq(read_dr6() & 0xf, 1, "DR4 is DR6 without CR4.DE");
    write_cr4(read_cr4() | 8);
    expect_fault(UD, 0, "DR4 with CR4.DE", asm_volatile("mov %%db4, %%rax" ::: "rax"));
    write_cr4(read_cr4() & ~8ul);
    write_dr6(0xffff0ff0);
    expect_fault(DB, 0, "single step in ring 3", user_call(user_step, 0));
    check((trap.cs & 3) == 3 && (read_dr6() & DR6_BS), "DR6.BS and ring 3");
}

/* ---- others ---- */

static void user_misaligned(reg_t arg)
{
    flags_write(flags_read() | FLAG_AC);
    (void)*(volatile uint32_t *)(arg + 1);
}
static void user_misaligned_quiet(reg_t arg)
{
    (void)*(volatile uint32_t *)(arg + 1);
}

static __attribute__((noinline)) void test_alignment(void)
{
    write_cr0(read_cr0() | 1u << 18);
    expect_fault(AC, 0, "#AC in ring 3 with AC and AM", user_call(user_misaligned, (reg_t)cells));
    expect_fault(USER_DONE, 0, "no #AC without EFLAGS.AC", user_call(user_misaligned_quiet, (reg_t)cells));
    expect_ok("no #AC in ring 0", flags_write(2 | FLAG_AC); (void)*(volatile uint32_t *)((uintptr_t)cells + 1); flags_write(2));
    write_cr0(read_cr0() & ~(1ul << 18));
    expect_fault(USER_DONE, 0, "no #AC without CR0.AM", user_call(user_misaligned, (reg_t)cells));
}

static __attribute__((noinline)) void test_flags(void)
{
    /* POPF of TF, NT and reserved bits. */
    flags_write(0x3f7fd5 & ~(reg_t)(FLAG_TF | FLAG_IF | FLAG_AC));
    reg_t seen = flags_read();
    flags_write(2);
    check((seen & 2) && !(seen & 0x8028) && !(seen & (FLAG_RF | FLAG_VM)), "POPF: reserved bits, RF and VM (%lx)", seen);
    check(seen & FLAG_NT, "POPF sets NT");
    /* A conditional branch that is not canonical cannot be made; RET can. */
    expect_fault(GP, 0, "RET to an address that is not canonical", asm_volatile("push %0; ret" ::"r"(0x800000000000ull)));
    expect_fault(GP, 0, "IRET to an address that is not canonical",
                 asm_volatile("push %1; push %2; pushf; push %3; push %0; iretq" ::"r"(0x800000000000ull), "r"((reg_t)KDATA), "r"((reg_t)kernel_stack),
                              "r"((reg_t)KCODE)));
}

void test_main(void)
{
    test_vectors();
    test_user();
    test_gates();
    test_double();
    trap_handlers[UD] = skip_ud;
    test_single_step();
    trap_handlers[UD] = 0;
    test_breakpoints();
    test_alignment();
    test_flags();
}
