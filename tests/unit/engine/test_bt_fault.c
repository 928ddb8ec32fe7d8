/*
 * The fault handler alone: made-up signal frames go in, and what becomes of registers and guest state is compared. The rest of the translator is stand-ins that
 * record what they are asked. And a thread's signals while it runs translated code.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "engine/bt/bt_priv.h"

#define TC 0x20000000u
#define TC_BYTES 0x100000u
#define BLOCK 0x4000u /* TC offset */
#define POISON 0x700000000000u
#define WINDOW_W 0x710000000000u
#define RAM_BYTES 0x10000u
#define TABLE ((uintptr_t)t.v)
#define HOST_RSP 0x7ffffff0u
#define PAGE_VA 0xffffffff81234000u
#define LEAVE_SAVED 0x40u
#define STUBS_END 0x100u
#define SCRATCH (1u << GPR_R10 | 1u << GPR_R11)
#define ERROR_WRITE 2

static struct {
    native_fault_fn *handler;
    struct bt_engine e;
    struct bt_vcpu b;
    struct bt_page page;
    struct bt_block block;
    struct bt_site site;
    uint8_t ram[RAM_BYTES];
    uint64_t v[4]; /* the start of the data table */
    uint8_t code_flags[RAM_BYTES / PAGE_SIZE_BYTES];
    /* what stand-ins answer and were asked */
    int accesses;
    struct bt_access access[4];
    enum bt_fill fill;
    unsigned fills, drops;
    uint8_t bytes[15];
    unsigned available;
    uintptr_t committed; /* this address is one of a table */
    ucontext_t frame;
} t;

/* ---- stand-ins ---- */

void native_fault_first(native_fault_fn *fn)
{
    t.handler = fn;
}

int native_install_handlers(void)
{
    return 0;
}

struct bt_block *cache_find(struct bt_engine *e, uintptr_t tc_address)
{
    return tc_address - TC - BLOCK < t.block.tc_end - BLOCK ? &t.block : NULL;
}

const struct bt_site *cache_site(const struct bt_engine *e, const struct bt_block *block, uintptr_t tc_address)
{
    return tc_address - TC - BLOCK >= t.site.tc_offset ? &t.site : NULL;
}

void cache_page_drop(struct bt_engine *e, uint64_t ram_offset)
{
    e->code_flags[ram_offset / PAGE_SIZE_BYTES] = 0;
    t.drops++;
}

int translate_accesses(struct bt_vcpu *b, const uint8_t *bytes, unsigned available, struct bt_access access[4])
{
    assert_false(b->c.simd_live); /* the registers are in the frame */
    memcpy(t.bytes, bytes, available);
    t.available = available;
    memcpy(access, t.access, sizeof(t.access));
    return t.accesses;
}

enum bt_fill tables_fill(struct bt_vcpu *b, gva_t gva, unsigned size, bool write)
{
    assert_true(gva == t.access[t.fills % 4].gva);
    t.fills++;
    return t.fill;
}

uint64_t tables_v(const struct bt_vcpu *b, gva_t gva)
{
    return t.v[gva / PAGE_SIZE_BYTES % 4];
}

void bt_settle(struct bt_vcpu *b)
{
}

bool tables_commit(struct bt_vcpu *b, uintptr_t address, gva_t gva_hint, bool exec)
{
    return address == t.committed;
}

/* ---- rig ---- */

static const int greg_of[16] = {
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
    REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
};

static int setup(void **state)
{
    memset(&t, 0, sizeof(t));
    t.e.layout = (struct bt_layout){.poison = POISON, .window_w = (uint8_t *)WINDOW_W, .window_r = t.ram, .ram_bytes = RAM_BYTES,
                                    .tc_exec = (uint8_t *)(uintptr_t)TC, .tc_bytes = TC_BYTES};
    t.e.stubs.leave_saved = LEAVE_SAVED;
    t.e.stubs.end = STUBS_END;
    t.e.code_flags = t.code_flags;
    pthread_mutex_init(&t.e.lock, NULL);
    t.b.engine = &t.e;
    t.b.table = (uint8_t *)TABLE;
    t.b.mode.code_bits = 64;
    t.b.page_va = PAGE_VA;
    t.b.host_rsp = HOST_RSP;
    t.b.c.simd_live = true;
    atomic_store(&t.b.exec_mask, BT_EXEC_MASK);
    for (unsigned n = 0; n < RAM_BYTES; n++)
        t.ram[n] = (uint8_t)(n * 7 + (n >> 8));
    t.page = (struct bt_page){.offset = 0x5000};
    t.block = (struct bt_block){.page = &t.page, .tc_start = BLOCK, .tc_chain = BLOCK + 8, .tc_end = BLOCK + 0x200};
    t.site = (struct bt_site){.tc_offset = 0x20, .page_offset = 0x123, .spilled = SCRATCH, .v_memory = BT_NO_REGISTER, .v_stack = BT_NO_REGISTER};
    assert_int_equal(fault_install(NULL), 0);
    assert_int_equal(fault_engine_add(&t.e), 0);
    assert_int_equal(fault_vcpu_create(&t.b), 0);
    assert_int_equal(fault_thread_enter(&t.b), 0);
    return 0;
}

static int teardown(void **state)
{
    fault_thread_leave(&t.b);
    fault_vcpu_destroy(&t.b);
    fault_engine_remove(&t.e);
    pthread_mutex_destroy(&t.e.lock);
    return 0;
}

/* A signal at TC offset `at`. Register n holds 1000 + n, its guest value in memory is 2000 + n. */
static bool signal_at(uintptr_t rip, unsigned trap, unsigned error, uintptr_t address)
{
    siginfo_t info = {.si_signo = SIGSEGV, .si_code = SEGV_MAPERR};
    greg_t *regs = t.frame.uc_mcontext.gregs;
    info.si_addr = (void *)address;
    for (int n = 0; n < 16; n++) {
        regs[greg_of[n]] = 1000 + n;
        t.b.c.v.cpu.gpr[n] = 2000 + (uint64_t)n;
    }
    t.b.c.v.cpu.gpr[GPR_RIP] = 0;
    regs[REG_RIP] = (greg_t)rip;
    regs[REG_EFL] = RFLAGS_CF | RFLAGS_DF | RFLAGS_OF | RFLAGS_IF | RFLAGS_FIXED;
    regs[REG_TRAPNO] = trap;
    regs[REG_ERR] = error;
    return t.handler(SIGSEGV, &info, &t.frame);
}

static greg_t reg(int n)
{
    return t.frame.uc_mcontext.gregs[n];
}

static void expect_left(enum bt_exit why, uint64_t rip, uint64_t rsp)
{
    assert_int_equal(reg(REG_RIP), TC + LEAVE_SAVED);
    assert_int_equal(reg(REG_RSP), HOST_RSP);
    assert_int_equal(reg(REG_RAX), why);
    assert_int_equal(reg(REG_EFL), RFLAGS_IF | RFLAGS_FIXED);
    assert_int_equal(t.b.host_flags, RFLAGS_CF | RFLAGS_DF | RFLAGS_OF | RFLAGS_IF | RFLAGS_FIXED);
    assert_true(t.b.c.v.cpu.gpr[GPR_RIP] == rip);
    for (unsigned n = 0; n < 16; n++) {
        bool spilled = t.site.spilled >> n & 1;
        assert_int_equal(t.b.c.v.cpu.gpr[n], n == GPR_RSP ? rsp : (spilled ? 2000 : 1000) + n);
    }
    assert_true(t.b.c.simd_live);
}

static void expect_started_again(greg_t rsp)
{
    assert_int_equal(reg(REG_RIP), TC + BLOCK + t.site.tc_offset);
    assert_int_equal(reg(REG_RSP), rsp);
    assert_int_equal(reg(REG_RAX), 1000);
    assert_true(t.b.c.simd_live);
}

#define INSN_RIP (PAGE_VA + 0x123)
#define RSP0 (1000 + GPR_RSP)

/* ---- tests ---- */

static void test_trap(void **state)
{
    assert_true(signal_at(TC + BLOCK + 0x30, VECTOR_DE, 0, 0));
    expect_left(BT_EXIT_trap, INSN_RIP, RSP0);
    assert_int_equal(t.b.fault_tc, BLOCK + 0x30);
    t.site.spilled = 1u << GPR_RBX | 1u << GPR_RSI | 1u << GPR_R11;
    assert_true(signal_at(TC + BLOCK + 0x30, VECTOR_XM, 0, 0));
    expect_left(BT_EXIT_trap, INSN_RIP, RSP0);
    t.b.mode.code_bits = 32;
    assert_true(signal_at(TC + BLOCK + 0x30, VECTOR_UD, 0, 0));
    expect_left(BT_EXIT_trap, INSN_RIP, RSP0); /* the code address; the run loop makes a linear one of it */
}

static void test_fill(void **state)
{
    t.accesses = 2;
    t.access[0].gva = 0x1000;
    t.access[1].gva = 0x2000;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    expect_started_again(RSP0);
    assert_int_equal(t.fills, 2);
    assert_int_equal(t.available, 15);
    assert_memory_equal(t.bytes, t.ram + 0x5123, 15);
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_GP, 0, 0)); /* another page's entry, which made the address not canonical */
    expect_started_again(RSP0);
    t.fills = 0;
    t.access[1].stack = true; /* registers that hold what was looked up before */
    t.site.v_memory = GPR_RCX;
    t.site.v_stack = GPR_R9;
    t.v[1] = 7777;
    t.v[2] = 8888;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x1ff8 + 1000 + GPR_RCX));
    expect_started_again(RSP0);
    assert_int_equal(reg(REG_RCX), 7777);
    assert_int_equal(reg(REG_R9), 1000 + GPR_R9); /* that page was not what faulted */
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x2000 + 1000 + GPR_R9));
    expect_started_again(RSP0);
    assert_int_equal(reg(REG_RCX), 1000 + GPR_RCX);
    assert_int_equal(reg(REG_R9), 8888);
    t.fills = 0;
    t.fill = BT_FILL_SLOW;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_SS, 0, 0));
    expect_left(BT_EXIT_data, INSN_RIP, RSP0);
}

/* Of 32-bit code such a register holds a host address in the page: 1000 + n here. */
static void test_fill_legacy(void **state)
{
    t.b.mode.code_bits = 32;
    t.accesses = 2;
    t.access[0].gva = 0x1123;
    t.access[1].gva = 0x2040;
    t.access[1].stack = true;
    t.site.v_memory = GPR_R9;
    t.site.v_stack = GPR_R12;
    t.v[1] = 0x700000;
    t.v[2] = 0x800000;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 1000 + GPR_R9 + 8));
    expect_started_again(RSP0);
    assert_int_equal(reg(REG_R9), 0x701000 + 1000 + GPR_R9); /* the same offset in the page that was filled in */
    assert_int_equal(reg(REG_R12), 0x802000 + 1000 + GPR_R12);
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x5000)); /* another page than theirs */
    expect_started_again(RSP0);
    assert_int_equal(reg(REG_R9), 1000 + GPR_R9);
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_GP, 0, 0));
    expect_started_again(RSP0);
    assert_int_equal(reg(REG_R12), 1000 + GPR_R12);
}

/* The instruction's bytes were changed by a device that has not said so yet: what they name now is not what was accessed. */
static void test_fill_changed(void **state)
{
    t.accesses = 1;
    t.access[0].gva = 0x1000;
    t.site.v_memory = GPR_RCX;
    t.v[1] = 7777;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x2000 + 1000 + GPR_RCX));
    expect_started_again(RSP0);
    assert_int_equal(reg(REG_RCX), 1000 + GPR_RCX);
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0xfff + 1000 + GPR_RCX));
    assert_int_equal(reg(REG_RCX), 1000 + GPR_RCX);
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_GP, 0, 0)); /* no address is known */
    assert_int_equal(reg(REG_RCX), 1000 + GPR_RCX);
}

static void test_commit(void **state)
{
    t.committed = TABLE + 0x1000;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, t.committed));
    expect_started_again(RSP0);
    assert_int_equal(t.fills, 0);
}

static void test_next_page(void **state)
{
    struct bt_page next = {.offset = 0x9000};
    t.accesses = -1;
    t.site.page_offset = 0xffe;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    assert_int_equal(t.available, 2);
    t.page.crosses = &next;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    assert_int_equal(t.available, 15);
    assert_memory_equal(t.bytes, t.ram + 0x5ffe, 2);
    assert_memory_equal(t.bytes + 2, t.ram + 0x9000, 13);
    expect_left(BT_EXIT_data, PAGE_VA + 0xffe, RSP0);
    t.site.kind = SITE_NEXT_PAGE;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    expect_left(BT_EXIT_interp, PAGE_VA + 0xffe, RSP0);
    atomic_store(&t.b.exec_mask, 0);
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    expect_left(BT_EXIT_attention, PAGE_VA + 0xffe, RSP0);
}

static void test_retries(void **state)
{
    t.accesses = 1;
    for (unsigned n = 0; n < 100; n++) { /* getting on is no repetition */
        t.fills = 0;
        t.access[0].gva = n * PAGE_SIZE_BYTES;
        assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
        expect_started_again(RSP0);
    }
    unsigned again = 0;
    do {
        t.fills = 0;
        assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
        again++;
    } while (reg(REG_RIP) != TC + LEAVE_SAVED && again < 100);
    assert_in_range(again, 2, 10);
    expect_left(BT_EXIT_data, INSN_RIP, RSP0);
}

static void test_jump(void **state)
{
    t.site.kind = SITE_JUMP;
    t.site.rsp_adjust = 8;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x4000));
    expect_left(BT_EXIT_miss, 1000 + GPR_R11, RSP0);
    t.committed = 0x7300001000;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, t.committed));
    expect_left(BT_EXIT_miss, 1000 + GPR_R11, RSP0);
    assert_true(signal_at(TC + STUBS_END - 1, VECTOR_GP, 0, 0)); /* in the lookup stub */
    expect_left(BT_EXIT_miss, 1000 + GPR_R11, RSP0);
    atomic_store(&t.b.exec_mask, 0);
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x4000));
    expect_left(BT_EXIT_attention, 1000 + GPR_R11, RSP0);
}

static void test_polls(void **state)
{
    t.accesses = 1;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    expect_started_again(RSP0);
    t.b.c.interrupt_waiting = true; /* but IF is clear: an empty entry is filled, or nothing would ever get on */
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    expect_started_again(RSP0);
    t.b.c.v.cpu.rflags = RFLAGS_IF;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON));
    expect_left(BT_EXIT_attention, INSN_RIP, RSP0);
    t.b.c.interrupt_waiting = false;
    atomic_store(&t.b.exec_mask, 0);
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON + 0x800));
    expect_left(BT_EXIT_attention, INSN_RIP, RSP0);
    t.fills = 0;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x4000)); /* a kicked processor's other faults are faults */
    expect_started_again(RSP0);
}

static void test_crossing(void **state)
{
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, TABLE + (uintptr_t)(intptr_t)BT_CHECK + PAGE_SIZE_BYTES + 2));
    expect_left(BT_EXIT_data, INSN_RIP, RSP0);
    assert_true(t.b.fault_crossing);
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, 0x4000));
    assert_false(t.b.fault_crossing);
}

static void test_code_written(void **state)
{
    t.code_flags[3] = BT_CODE_PRESENT;
    assert_true(signal_at(TC + BLOCK + 0x40, VECTOR_PF, ERROR_WRITE, WINDOW_W + 0x3008));
    expect_left(BT_EXIT_code_write, INSN_RIP, RSP0);
    assert_int_equal(t.drops, 1);
    /* From C code: the store happens again. */
    t.code_flags[3] = BT_CODE_PRESENT;
    assert_true(signal_at(0x555555550000, VECTOR_PF, ERROR_WRITE, WINDOW_W + 0x3008));
    assert_int_equal(reg(REG_RIP), 0x555555550000);
    assert_int_equal(t.drops, 2);
    assert_true(signal_at(0x555555550000, VECTOR_PF, ERROR_WRITE, WINDOW_W + 0x3008)); /* somebody else was faster */
    assert_int_equal(t.drops, 2);
}

static void test_not_ours(void **state)
{
    siginfo_t info = {.si_code = SI_USER};
    assert_false(signal_at(0x555555550000, VECTOR_PF, ERROR_WRITE, WINDOW_W + RAM_BYTES));
    assert_false(signal_at(0x555555550000, VECTOR_PF, 0, WINDOW_W));
    assert_false(signal_at(0x555555550000, VECTOR_GP, 0, 0));
    assert_false(signal_at(TC + BLOCK + 0x200, VECTOR_PF, 0, 0)); /* no block is there */
    assert_false(signal_at(TC + STUBS_END - 1, VECTOR_DE, 0, 0));
    assert_false(t.handler(SIGSEGV, &info, &t.frame));
}

static uint64_t mask_now(void)
{
    uint64_t mask = 0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, NULL, &mask, sizeof(mask));
    return mask;
}

static void test_thread(void **state)
{
    const uint64_t faults = 1ull << (SIGSEGV - 1) | 1ull << (SIGBUS - 1) | 1ull << (SIGFPE - 1) | 1ull << (SIGILL - 1) | 1ull << (SIGTRAP - 1) |
                            1ull << (SIGSYS - 1);
    const uint64_t never = 1ull << (SIGKILL - 1) | 1ull << (SIGSTOP - 1);
    stack_t inside, stack;
    assert_true(mask_now() == ~(faults | never));
    sigaltstack(NULL, &inside);
    assert_true(inside.ss_size >= 0x10000 && !(inside.ss_flags & SS_DISABLE));
    assert_true((unsigned)inside.ss_flags & 1u << 31); /* SS_AUTODISARM: the guest's RSP may lie in it */
    fault_thread_leave(&t.b);
    assert_true(mask_now() == 0);
    sigaltstack(NULL, &stack);
    assert_true(stack.ss_flags & SS_DISABLE || stack.ss_sp != inside.ss_sp); /* the sanitizer has one of its own */
    assert_false(signal_at(TC + BLOCK + 0x40, VECTOR_PF, 0, POISON)); /* this thread runs no translated code */
    assert_int_equal(fault_thread_enter(&t.b), 0);
}

static void test_jump_not_canonical(void **state)
{
    t.site.kind = SITE_JUMP;
    t.site.rsp_adjust = 8;
    siginfo_t info = {.si_code = SI_KERNEL};
    greg_t *regs = t.frame.uc_mcontext.gregs;
    regs[REG_RIP] = TC + BLOCK + 0x40;
    regs[REG_TRAPNO] = VECTOR_GP;
    regs[REG_R11] = 0x0000800000000000;
    regs[REG_RSP] = 5000;
    assert_true(t.handler(SIGSEGV, &info, &t.frame));
    assert_int_equal(reg(REG_RAX), BT_EXIT_interp);
    assert_true(t.b.c.v.cpu.gpr[GPR_RIP] == INSN_RIP);
    assert_int_equal(t.b.c.v.cpu.gpr[GPR_RSP], 4992);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_trap, setup, teardown),
        cmocka_unit_test_setup_teardown(test_commit, setup, teardown),
        cmocka_unit_test_setup_teardown(test_next_page, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fill, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fill_legacy, setup, teardown),
        cmocka_unit_test_setup_teardown(test_fill_changed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_retries, setup, teardown),
        cmocka_unit_test_setup_teardown(test_jump, setup, teardown),
        cmocka_unit_test_setup_teardown(test_jump_not_canonical, setup, teardown),
        cmocka_unit_test_setup_teardown(test_polls, setup, teardown),
        cmocka_unit_test_setup_teardown(test_crossing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_code_written, setup, teardown),
        cmocka_unit_test_setup_teardown(test_not_ours, setup, teardown),
        cmocka_unit_test_setup_teardown(test_thread, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
