/*
 * Instructions about the processor's own state that need not leave translated code.
 *
 * Inside, the host's flags hold the arithmetic flags and DF; cpu.rflags has the rest, with these clear.
 * Threading: e->lock held, like all of a translation.
 */
#include "engine/bt/translate_priv.h"

static void emit_pushf(struct translation *t, struct bt_site *site)
{
    struct emitter *out = &t->out;
    emit_store_gs(out, GPR_RSP, BT_CTX(scratch[0]));
    emit_load_gs(out, GPR_RSP, BT_CTX(host_rsp));
    emit8(out, 0x9c); /* pushfq, on the host's stack */
    emit_rex(out, t->s[1] > 7 ? 1 : 0);
    emit8(out, 0x58 | (t->s[1] & 7)); /* pop */
    emit_load_gs(out, GPR_RSP, BT_CTX(scratch[0]));
    emit_pext_gs(out, t->s[1], t->s[1], BT_CTX(mask_arith));
    emit_pdep_gs(out, t->s[1], t->s[1], BT_CTX(mask_arith));
    emit_load_gs(out, t->s[0], BT_CTX(c.v.cpu.rflags));
    emit_lea(out, t->s[1], t->s[1], t->s[0], 0, 0);
    emit_load_gs(out, t->s[0], BT_CTX(ac));
    emit_lea(out, t->s[1], t->s[1], t->s[0], 0, 0);
    emit_store_gs(out, t->s[1], BT_CTX(scratch[0]));
    struct address a = emit_push_access(t, site);
    emit_load_gs(out, t->s[2], BT_CTX(scratch[0]));
    emit_at(t, 0x89, t->s[2], a);
    emit_push_done(t);
}

/* ---- interrupts ---- */

/* With an interrupt waiting it is the interpreter's, which minds the shadow of one instruction. Without, an interrupt that comes in the shadow cannot be told from one that
 * comes later: nobody looks before the next poll or jump, which is after the instruction that follows. */
static void emit_sti(struct translation *t)
{
    emit_poll(t, BT_CTX(poll_sti));
    emit_mov_gs_imm8(&t->out, BT_CTX(c.v.cpu.rflags) + 1, RFLAGS_IF >> 8);
}

/* ---- time ---- */

/* EDX:EAX is the host's counter, as inputs_tsc() gives it (inputs_tsc_is_host), plus the offset. */
static void emit_rdtsc(struct translation *t, const struct tinsn *i)
{
    struct emitter *out = &t->out;
    if (i->kind == TI_RDTSCP) {
        emit8(out, 0x0f), emit8(out, 0xae), emit8(out, 0xe8); /* lfence: everything before it is done (SDM vol. 2, RDTSCP) */
        emit_op_gs(out, false, 0x8b, GPR_RCX, BT_CTX(c.v.cpu.msr_tsc_aux));
    }
    emit8(out, 0x0f), emit8(out, 0x31);
    emit_rorx(out, GPR_RDX, GPR_RDX, 32);
    emit_lea(out, GPR_RAX, GPR_RAX, GPR_RDX, 0, 0);
    emit_load_gs(out, t->s[0], BT_CTX(c.v.cpu.tsc_offset));
    emit_lea(out, GPR_RAX, GPR_RAX, t->s[0], 0, 0);
    emit_rorx(out, GPR_RDX, GPR_RAX, 32);
    emit_op_reg(out, false, 0x89, GPR_RDX, GPR_RDX);
    emit_op_reg(out, false, 0x89, GPR_RAX, GPR_RAX);
}

/* ---- privilege ---- */

/* SMAP's rights change: what is known of pages was looked up in the other view. */
static void emit_ac(struct translation *t, bool set)
{
    struct emitter *out = &t->out;
    emit_store_gs_imm32(out, BT_CTX(ac), set ? RFLAGS_AC : 0);
    emit_load_gs(out, t->s[0], set ? BT_CTX(table_of[VIEW_SUPERVISOR_AC]) : BT_CTX(table_of[VIEW_SUPERVISOR]));
    emit_wrgsbase(out, t->s[0]);
    groups_forget(t);
}

static void emit_jump_gs(struct emitter *out, int32_t gs)
{
    emit8(out, 0x65), emit8(out, 0xff);
    emit_address(out, 4, EMIT_NONE, EMIT_NONE, 0, gs, false);
}

/* ---- segment bases ---- */

static void emit_base_store(struct emitter *out, unsigned from, unsigned segment)
{
    emit_store_gs(out, from, segment == SEG_FS ? BT_CTX(c.segment_base[SEG_FS]) : BT_CTX(c.segment_base[SEG_GS]));
    emit_store_gs(out, from, segment == SEG_FS ? BT_CTX(c.v.cpu.seg[SEG_FS].base) : BT_CTX(c.v.cpu.seg[SEG_GS].base));
}

static void emit_swapgs(struct translation *t)
{
    struct emitter *out = &t->out;
    emit_load_gs(out, t->s[0], BT_CTX(c.segment_base[SEG_GS]));
    emit_load_gs(out, t->s[1], BT_CTX(c.v.cpu.msr_kernel_gs_base));
    emit_store_gs(out, t->s[0], BT_CTX(c.v.cpu.msr_kernel_gs_base));
    emit_base_store(out, t->s[1], SEG_GS);
}

/* Bits 63..47 of a canonical address are equal: their value less the sign is 0. Anything else, turned to the top, makes an address that faults. */
static void emit_canonical_check(struct translation *t, unsigned reg)
{
    struct emitter *out = &t->out;
    unsigned top = t->s[0], sign = t->s[1];
    emit_mov_imm32(out, sign, 47);
    emit_sarx(out, top, reg, sign);
    emit_mov_imm32(out, sign, 63);
    emit_sarx(out, sign, reg, sign);
    emit_op_reg(out, true, 0xf7, 2, sign); /* not */
    emit_lea(out, top, top, sign, 0, 1);
    emit_rorx(out, top, top, 16);
    emit_check_byte(out, top, top, BT_CHECK);
}

static void emit_write_base(struct translation *t, const struct tinsn *i)
{
    unsigned value = i->reg;
    if (i->mem_size == 4) {
        value = t->s[0];
        emit_op_reg(&t->out, false, 0x89, i->reg, value);
    } else {
        emit_canonical_check(t, i->reg);
    }
    emit_base_store(&t->out, value, (unsigned)i->imm);
}

/* ---- all ---- */

int64_t bit_string_distance(const struct bt_vcpu *b, const struct tinsn *i)
{
    uint64_t offset = b->c.v.cpu.gpr[i->reg];
    int64_t bits = i->mem_size == 8 ? (int64_t)offset : i->mem_size == 4 ? (int32_t)offset : (int16_t)offset;
    return (bits >> (__builtin_ctz(i->mem_size) + 3)) * i->mem_size;
}

void emit_system(struct translation *t, const struct tinsn *i, struct bt_site *site)
{
    struct emitter *out = &t->out;
    switch (i->kind) {
    case TI_PUSHF:
        emit_pushf(t, site);
        break;
    case TI_CLI:
        emit_mov_gs_imm8(out, BT_CTX(c.v.cpu.rflags) + 1, 0);
        break;
    case TI_STI:
        emit_sti(t);
        break;
    case TI_STRING:
        emit_string(t, i);
        break;
    case TI_BIT_STRING:
        emit_rewritten(t, i, emit_bit_string_access(t, i));
        break;
    case TI_RDTSC:
    case TI_RDTSCP:
        emit_rdtsc(t, i);
        break;
    case TI_SERIALIZE: /* hosts may lack it. Code that changes is seen to by the cache; what is left are the stores before it */
        emit8(out, 0x0f), emit8(out, 0xae), emit8(out, 0xf0); /* mfence */
        break;
    case TI_SWAPGS:
        emit_swapgs(t);
        break;
    case TI_STAC:
    case TI_CLAC:
        emit_ac(t, i->kind == TI_STAC);
        break;
    case TI_SYSCALL:
    case TI_SYSRET:
        canonicalize(t);
        emit_mov_imm32(out, GPR_R11, i->offset);
        emit_mov_imm32(out, GPR_R10, i->length);
        emit_jump_gs(out, i->kind == TI_SYSCALL ? BT_CTX(syscall_stub) : BT_CTX(sysret_stub));
        break;
    case TI_LOAD_SELECTOR:
        emit_movzx16_gs(out, i->reg, i->imm);
        break;
    case TI_LOAD_SELECTOR16:
        emit8(out, 0x66);
        emit_op_gs(out, false, 0x8b, i->reg, i->imm);
        break;
    case TI_LOAD_STATE:
        emit_load_gs(out, i->reg, i->imm);
        break;
    case TI_LOAD_STATE32:
        emit_op_gs(out, false, 0x8b, i->reg, i->imm);
        break;
    case TI_WRITE_BASE:
        emit_write_base(t, i);
        break;
    default:
        __builtin_unreachable();
    }
}
