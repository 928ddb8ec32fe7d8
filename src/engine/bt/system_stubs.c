/*
 * SYSCALL and SYSRET by translated code, written at the start of TC after the ways in and out.
 *
 * They change privilege by changing the view in GS; CS, SS and the interpreter's idea of the CPL follow when translated code is left (bt_settle). What is not the common case leaves
 * at the instruction, with nothing changed.
 * Both are jumped to by way of the context, from canonical state. Threading: written once, before any vCPU runs.
 */
#include "engine/bt/emit.h"

#define FLAGS_KEPT (RFLAGS_OSZAPC | RFLAGS_DF) /* in the host's flags, not in cpu.rflags */
#define SYSRET_SLOW (RFLAGS_TF | RFLAGS_IOPL | RFLAGS_NT | RFLAGS_AC | RFLAGS_VIF | RFLAGS_VIP | RFLAGS_DF)
#define OVERFLOW_BIT 11

/* Opcode extensions and opcodes (SDM vol. 2). */
enum { EXT_ADD = 0, EXT_OR = 1, EXT_AND = 4, EXT_CMP = 7 };
enum { OP_OR = 0x09, OP_AND = 0x21, OP_XOR = 0x31, OP_CMP = 0x3b };
enum { JZ = 4, JNZ = 5, JA = 7 };

static uint32_t here(const struct bt_engine *b, const struct emitter *e)
{
    return (uint32_t)(e->at - b->layout.tc_write);
}

static void emit_jump(struct emitter *e, const uint8_t *target)
{
    emit8(e, 0xe9);
    emit32(e, (uint32_t)(target - (e->at + 4)));
}

static void emit_jcc_back(struct emitter *e, unsigned condition, const uint8_t *target)
{
    emit8(e, 0x0f);
    emit8(e, 0x80 | condition);
    emit32(e, (uint32_t)(target - (e->at + 4)));
}

static void emit_op_imm32(struct emitter *e, unsigned extension, unsigned reg, uint32_t value) /* 32-bit register */
{
    emit_op_reg(e, false, 0x81, extension, reg);
    emit32(e, value);
}

static void emit_test_imm32(struct emitter *e, unsigned reg, uint32_t value)
{
    emit_op_reg(e, false, 0xf7, 0, reg);
    emit32(e, value);
}

/* The host's flags into R10, by way of the host's stack. */
static void emit_flags_read(struct emitter *e)
{
    emit_store_gs(e, GPR_RSP, BT_CTX(scratch[0]));
    emit_load_gs(e, GPR_RSP, BT_CTX(host_rsp));
    emit8(e, 0x9c);                  /* pushfq */
    emit8(e, 0x41), emit8(e, 0x5a); /* pop r10 */
    emit_load_gs(e, GPR_RSP, BT_CTX(scratch[0]));
}

static void emit_flags_write(struct emitter *e)
{
    emit_store_gs(e, GPR_RSP, BT_CTX(scratch[0]));
    emit_load_gs(e, GPR_RSP, BT_CTX(host_rsp));
    emit8(e, 0x41), emit8(e, 0x52); /* push r10 */
    emit8(e, 0x9d);                  /* popfq */
    emit_load_gs(e, GPR_RSP, BT_CTX(scratch[0]));
}

/* SDM vol. 2, SYSCALL. RFLAGS.AC is clear in user mode (bt_usable), and the arithmetic flags and DF are among those that are cleared. */
static void syscall_emit(struct emitter *e, uint32_t tc_base)
{
    emit_lea(e, GPR_RCX, GPR_R11, GPR_R10, 0, 0);
    emit_load_gs(e, GPR_R11, BT_CTX(page_va));
    emit_lea(e, GPR_RCX, GPR_RCX, GPR_R11, 0, 0);
    emit_flags_read(e);
    emit_op_imm32(e, EXT_AND, GPR_R10, FLAGS_KEPT);
    emit_test_imm32(e, GPR_R10, RFLAGS_DF);
    emit8(e, 0x70 | JZ), emit8(e, 1);
    emit8(e, 0xfc); /* cld */
    emit_load_gs(e, GPR_R11, BT_CTX(c.v.cpu.rflags));
    emit_op_reg(e, true, OP_OR, GPR_R11, GPR_R10);
    emit_op_imm32(e, EXT_OR, GPR_R10, RFLAGS_FIXED);
    emit_store_gs(e, GPR_R10, BT_CTX_GPR(GPR_R11));
    emit_load_gs(e, GPR_R10, BT_CTX(c.v.cpu.msr_sfmask));
    emit_op_reg(e, true, 0xf7, 2, GPR_R10); /* not */
    emit_op_reg(e, true, OP_AND, GPR_R10, GPR_R11);
    emit_op_imm32(e, EXT_OR, GPR_R11, RFLAGS_FIXED);
    emit_store_gs(e, GPR_R11, BT_CTX(c.v.cpu.rflags));
    emit_op_gs(e, true, 0xff, 0, BT_CTX(c.v.counters[COUNTER_system_calls])); /* inc */
    emit_load_gs(e, GPR_R10, BT_CTX(syscall_ss));
    emit8(e, 0x66);
    emit_op_gs(e, false, 0x89, GPR_R10, BT_CTX(c.v.cpu.seg[SEG_SS].selector));
    emit_store_gs_imm32(e, BT_CTX(transition), BT_TO_SUPERVISOR);
    emit_load_gs(e, GPR_R10, BT_CTX(table_of[VIEW_SUPERVISOR]));
    emit_wrgsbase(e, GPR_R10);
    emit_op_reg(e, false, OP_XOR, GPR_R10, GPR_R10);
    emit_op_imm32(e, EXT_ADD, GPR_R10, 1); /* all arithmetic flags clear */
    emit_load_gs(e, GPR_R11, BT_CTX(c.v.cpu.msr_lstar));
    emit_transfer(e, tc_base);
}

/* Arithmetic flags from R10D, not DF. */
static void emit_flags_set(struct emitter *e)
{
    emit_store_gs(e, GPR_RAX, BT_CTX(scratch[0]));
    emit_op_reg(e, false, 0x89, GPR_R10, GPR_RAX);
    emit_op_reg(e, false, 0xc1, 4, GPR_RAX), emit8(e, 8); /* shl: the low byte goes to AH */
    emit_rex(e, 1), emit8(e, 0x0f), emit8(e, 0xba), emit8(e, 0xe0 | (GPR_R10 & 7)), emit8(e, OVERFLOW_BIT); /* bt */
    emit8(e, 0x0f), emit8(e, 0x92), emit8(e, 0xc0); /* setc al */
    emit8(e, 0x04), emit8(e, 0x7f);                 /* add al, 0x7f: OF */
    emit8(e, 0x9e);                                 /* sahf: the others */
    emit_load_gs(e, GPR_RAX, BT_CTX(scratch[0]));
}

/* SDM vol. 2, SYSRET, with a 64-bit operand: to `slow` with the host's flags in scratch[2] when the target is not canonical, flags are asked for that translated code does not run
 * with, or an interrupt waits for IF. */
static void sysret_emit(struct emitter *e, uint32_t tc_base, const uint8_t *slow)
{
    emit_store_gs(e, GPR_R11, BT_CTX(scratch[1]));
    emit_flags_read(e);
    emit_store_gs(e, GPR_R10, BT_CTX(scratch[2]));
    emit_test_imm32(e, GPR_R10, RFLAGS_DF);
    emit_jcc_back(e, JNZ, slow);
    emit_load_gs(e, GPR_R10, BT_CTX_GPR(GPR_R11));
    emit_test_imm32(e, GPR_R10, SYSRET_SLOW);
    emit_jcc_back(e, JNZ, slow);
    emit_mov(e, GPR_R11, GPR_RCX);
    emit_op_reg(e, true, 0xc1, 7, GPR_R11), emit8(e, 47); /* sar: bits 63..47 of a canonical address are equal */
    emit_op_reg(e, true, 0xff, 0, GPR_R11);               /* inc */
    emit_op_reg(e, true, 0x83, EXT_CMP, GPR_R11), emit8(e, 1);
    emit_jcc_back(e, JA, slow);
    emit_load_gs(e, GPR_R11, BT_CTX(poll_sti));
    emit_op_gs(e, true, OP_CMP, GPR_R11, BT_CTX(poll_quiet));
    emit_jcc_back(e, JNZ, slow);
    emit_op_reg(e, false, 0x89, GPR_R10, GPR_R11);
    emit_op_imm32(e, EXT_AND, GPR_R11, RFLAGS_IF | RFLAGS_ID);
    emit_op_imm32(e, EXT_OR, GPR_R11, RFLAGS_FIXED);
    emit_store_gs(e, GPR_R11, BT_CTX(c.v.cpu.rflags));
    emit_flags_set(e);
    emit_store_gs_imm32(e, BT_CTX(transition), BT_TO_USER);
    emit_store_gs_imm32(e, BT_CTX(ac), 0);
    emit_load_gs(e, GPR_R10, BT_CTX(table_of[VIEW_USER]));
    emit_wrgsbase(e, GPR_R10);
    emit_mov(e, GPR_R11, GPR_RCX);
    emit_transfer(e, tc_base);
}

static void emit_slow(struct emitter *e, const struct bt_engine *b, enum bt_exit why)
{
    emit_mov_imm32(e, GPR_R10, why);
    emit_jump(e, b->layout.tc_write + b->stubs.leave_in_page);
}

void system_stubs_create(struct bt_engine *b, struct emitter *e)
{
    uint32_t tc_base = (uint32_t)(uintptr_t)b->layout.tc_exec;
    b->stubs.syscall_slow = here(b, e);
    emit_slow(e, b, BT_EXIT_syscall);
    b->stubs.syscall = here(b, e);
    syscall_emit(e, tc_base);

    const uint8_t *restore = e->at;
    emit_load_gs(e, GPR_R10, BT_CTX(scratch[2]));
    emit_flags_write(e);
    emit_load_gs(e, GPR_R11, BT_CTX(scratch[1]));
    b->stubs.sysret_slow = here(b, e);
    emit_slow(e, b, BT_EXIT_sysret);
    b->stubs.sysret = here(b, e);
    sysret_emit(e, tc_base, restore);
}
