/*
 * One instruction from bytes to `struct insn`: Zydis decodes, this file fills the fields that do not depend on what the instruction does, and the
 * select functions choose the handler.
 *
 * Encodings that Zydis refuses, LOCK where it is not allowed among them, raise #UD; over 15 bytes #GP(0) (SDM vol. 3, 6.15). MPX and CET are not offered to
 * guests, so their encodings are the NOPs that they are on processors without them.
 * Threading: the vCPU's own thread; no state beyond the arguments.
 */
#include <string.h>

#include "engine/interp/interp_core.h"
#include "util/log.h"

#define INSN_BYTES_MAX 15u

void op_undefined(struct icpu *c, const struct insn *i)
{
    simd_save(c);
    vcpu_count(&c->v, COUNTER_unimplemented);
    vcpu_count_missing(&c->v, ZydisMnemonicGetString(i->mnemonic));
    LOG_GUEST(LOG_WARNING, "instruction %s at %#llx is not implemented: #UD", ZydisMnemonicGetString(i->mnemonic),
              (unsigned long long)(c->v.cpu.gpr[GPR_RIP] - i->length));
    raise_fault(c, VECTOR_UD);
}

static void op_invalid(struct icpu *c, const struct insn *i)
{
    raise_fault(c, VECTOR_UD);
}

static void op_too_long(struct icpu *c, const struct insn *i)
{
    raise_gp0(c);
}

void decoder_init(ZydisDecoder *decoder, unsigned code_bits, bool amd)
{
    static const struct {
        ZydisMachineMode mode;
        ZydisStackWidth stack;
    } modes[] = {
        {ZYDIS_MACHINE_MODE_LEGACY_16, ZYDIS_STACK_WIDTH_16},
        {ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_STACK_WIDTH_32},
        {ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64},
    };
    unsigned n = code_bits == 64 ? 2 : code_bits == 32 ? 1 : 0;
    ZydisDecoderInit(decoder, modes[n].mode, modes[n].stack);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
    ZydisDecoderEnableMode(decoder, ZYDIS_DECODER_MODE_AMD_BRANCHES, amd);
}

/* Byte offset into cpu_state.gpr, or that of the zero register when it is not a general register. */
static uint8_t register_offset(ZydisRegister reg)
{
    if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_BL)
        return REG_OFFSET(reg - ZYDIS_REGISTER_AL);
    if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH)
        return (uint8_t)(REG_OFFSET(reg - ZYDIS_REGISTER_AH) + 1);
    if (reg >= ZYDIS_REGISTER_SPL && reg <= ZYDIS_REGISTER_R15B)
        return REG_OFFSET(reg - ZYDIS_REGISTER_SPL + GPR_RSP);
    if (reg >= ZYDIS_REGISTER_AX && reg <= ZYDIS_REGISTER_R15W)
        return REG_OFFSET(reg - ZYDIS_REGISTER_AX);
    if (reg >= ZYDIS_REGISTER_EAX && reg <= ZYDIS_REGISTER_R15D)
        return REG_OFFSET(reg - ZYDIS_REGISTER_EAX);
    if (reg >= ZYDIS_REGISTER_RAX && reg <= ZYDIS_REGISTER_R15)
        return REG_OFFSET(reg - ZYDIS_REGISTER_RAX);
    if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP || reg == ZYDIS_REGISTER_IP)
        return REG_OFFSET(GPR_RIP);
    return REG_OFFSET(GPR_ZERO);
}

static uint8_t segment_number(ZydisRegister reg)
{
    switch (reg) {
    case ZYDIS_REGISTER_ES:
        return SEG_ES;
    case ZYDIS_REGISTER_CS:
        return SEG_CS;
    case ZYDIS_REGISTER_SS:
        return SEG_SS;
    case ZYDIS_REGISTER_FS:
        return SEG_FS;
    case ZYDIS_REGISTER_GS:
        return SEG_GS;
    default:
        return SEG_DS;
    }
}

static void fill_memory(struct insn *i, const ZydisDecodedOperand *op)
{
    i->base = register_offset(op->mem.base);
    i->index = register_offset(op->mem.index);
    i->scale = op->mem.scale >= 8 ? 3 : op->mem.scale >= 4 ? 2 : op->mem.scale >= 2 ? 1 : 0;
    i->displacement = (int32_t)op->mem.disp.value;
    i->segment = segment_number(op->mem.segment);
    if (op->encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64)
        i->imm = (uint64_t)op->mem.disp.value & i->address_mask;
}

/*
 * Zydis 4.0 takes R13D for the base of a SIB byte with base field 5 and mod 0, and loses the displacement, when REX.B and an address-size prefix come together. There is
 * no base then, but 32 bits of displacement, whatever REX.B says (SDM vol. 2A, table 2-5).
 */
static void drop_false_base(struct decode *d)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    if (!(zi->attributes & ZYDIS_ATTRIB_HAS_SIB) || zi->raw.modrm.mod != 0 || zi->raw.sib.base != 5)
        return;
    for (unsigned n = 0; n < zi->operand_count; n++)
        if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && d->op[n].encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM) {
            d->op[n].mem.base = ZYDIS_REGISTER_NONE;
            d->op[n].mem.disp.has_displacement = true;
            d->op[n].mem.disp.value = zi->raw.disp.value;
        }
}

/* Implicit memory operands (strings, XLAT, MASKMOV): the one that a segment override applies to; not the stack. */
static const ZydisDecodedOperand *hidden_memory(const struct decode *d)
{
    const ZydisDecodedOperand *found = NULL;
    for (unsigned n = 0; n < d->zi.operand_count; n++) {
        const ZydisDecodedOperand *op = &d->op[n];
        if (op->type != ZYDIS_OPERAND_TYPE_MEMORY || op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT)
            continue;
        uint8_t base = register_offset(op->mem.base);
        if (base == REG_OFFSET(GPR_RSI) || base == REG_OFFSET(GPR_RBX))
            return op;
        if (base == REG_OFFSET(GPR_RDI))
            found = op;
    }
    return found;
}

static unsigned operand_bytes(const struct decode *d, unsigned n)
{
    unsigned fallback = d->zi.operand_width / 8;
    if (n >= d->zi.operand_count_visible)
        return fallback;
    const ZydisDecodedOperand *op = &d->op[n];
    bool general = op->type == ZYDIS_OPERAND_TYPE_REGISTER && register_offset(op->reg.value) != REG_OFFSET(GPR_ZERO);
    bool memory = op->type == ZYDIS_OPERAND_TYPE_MEMORY && op->mem.type == ZYDIS_MEMOP_TYPE_MEM;
    if ((general || memory) && (op->size == 8 || op->size == 16 || op->size == 32 || op->size == 64))
        return op->size / 8;
    return fallback;
}

static void fill_operands(const struct decode *d, struct insn *i)
{
    bool have_immediate = false, have_memory = false;
    for (unsigned n = 0; n < d->zi.operand_count_visible; n++) {
        const ZydisDecodedOperand *op = &d->op[n];
        switch (op->type) {
        case ZYDIS_OPERAND_TYPE_REGISTER:
            if (n == 0)
                i->dst = register_offset(op->reg.value);
            else if (n == 1)
                i->src = register_offset(op->reg.value);
            break;
        case ZYDIS_OPERAND_TYPE_MEMORY:
            if (op->mem.type == ZYDIS_MEMOP_TYPE_MEM || op->mem.type == ZYDIS_MEMOP_TYPE_VSIB)
                i->flags |= n == 0 ? INSN_MEM_DST : INSN_MEM_SRC;
            fill_memory(i, op);
            have_memory = true;
            break;
        case ZYDIS_OPERAND_TYPE_IMMEDIATE:
            if (!have_immediate)
                i->imm = op->imm.is_signed ? (uint64_t)op->imm.value.s : op->imm.value.u;
            have_immediate = true;
            break;
        case ZYDIS_OPERAND_TYPE_POINTER:
            i->imm = (uint64_t)op->ptr.segment << 32 | op->ptr.offset;
            break;
        default:
            break;
        }
    }
    if (!have_memory) {
        const ZydisDecodedOperand *hidden = hidden_memory(d);
        if (hidden)
            i->segment = segment_number(hidden->mem.segment);
    }
}

/* What transfers control, changes the mode or opens an interrupt window ends a block; so does a repeated string instruction, which is left and resumed. */
static bool ends_block(const struct decode *d)
{
    switch (d->zi.meta.category) {
    case ZYDIS_CATEGORY_COND_BR:
    case ZYDIS_CATEGORY_UNCOND_BR:
    case ZYDIS_CATEGORY_CALL:
    case ZYDIS_CATEGORY_RET:
    case ZYDIS_CATEGORY_INTERRUPT:
    case ZYDIS_CATEGORY_SYSCALL:
    case ZYDIS_CATEGORY_SYSRET:
    case ZYDIS_CATEGORY_SYSTEM:
    case ZYDIS_CATEGORY_IO:
    case ZYDIS_CATEGORY_IOSTRINGOP:
    case ZYDIS_CATEGORY_SEGOP:
        return true;
    default:
        break;
    }
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_STI:
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_HLT:
    case ZYDIS_MNEMONIC_XSETBV:
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
        return true;
    default:
        break;
    }
    if (d->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER && d->zi.operand_count_visible &&
        ZydisRegisterGetClass(d->op[0].reg.value) == ZYDIS_REGCLASS_SEGMENT)
        return true; /* MOV and POP to a segment register, and a few that only read it */
    return d->zi.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE);
}

static void fill_generic(const struct decode *d, struct insn *i)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    i->length = zi->length;
    i->mnemonic = (uint16_t)zi->mnemonic;
    i->address_mask = zi->address_width == 16 ? 0xffffu : zi->address_width == 32 ? 0xffffffffu : ~0ull;
    i->condition = zi->opcode & 0xf;
    i->dst = i->src = i->base = i->index = REG_OFFSET(GPR_ZERO);
    i->segment = SEG_DS;
    if (d->code_bits != 64)
        i->flags |= INSN_LEGACY;
    if (zi->attributes & ZYDIS_ATTRIB_HAS_LOCK)
        i->flags |= INSN_LOCK;
    if (zi->attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE))
        i->flags |= INSN_REP;
    if (zi->attributes & ZYDIS_ATTRIB_HAS_REPNE)
        i->flags |= INSN_REPNE;
    if (ends_block(d))
        i->flags |= INSN_ENDS_BLOCK;
    fill_operands(d, i);
    i->op_size = (uint8_t)operand_bytes(d, 0);
    i->src_size = (uint8_t)operand_bytes(d, 1);
}

bool decode_amd_branch(struct decode *d)
{
    ZydisDecodedInstruction *zi = &d->zi;
    bool near = zi->meta.branch_type == ZYDIS_BRANCH_TYPE_SHORT || zi->meta.branch_type == ZYDIS_BRANCH_TYPE_NEAR;
    bool narrow = near && d->code_bits == 64 && zi->attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE && !zi->raw.rex.W;
    ZydisMnemonic before = zi->mnemonic;
    if (narrow)
        zi->operand_width = 16;
    for (unsigned n = 0; (before == ZYDIS_MNEMONIC_LOOPE || before == ZYDIS_MNEMONIC_LOOPNE) && n < zi->raw.prefix_count; n++) {
        uint8_t prefix = zi->raw.prefixes[n].value;
        zi->mnemonic = prefix == 0xf3 ? ZYDIS_MNEMONIC_LOOPE : prefix == 0xf2 ? ZYDIS_MNEMONIC_LOOPNE : zi->mnemonic;
    }
    return narrow || zi->mnemonic != before;
}

bool decode_is_hint_of_intel(const struct decode *d)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    if (zi->mnemonic == ZYDIS_MNEMONIC_PAUSE)
        return zi->raw.rex.B;
    return zi->mnemonic == ZYDIS_MNEMONIC_NOP && zi->opcode_map == ZYDIS_OPCODE_MAP_0F && zi->opcode == 0x0d && zi->raw.modrm.mod == 3;
}

/* F3 REX.B 90 */
static void op_exchange_r8(struct icpu *c, const struct insn *i)
{
    uint64_t rax = reg_read(c, REG_OFFSET(GPR_RAX), i->op_size), r8 = reg_read(c, REG_OFFSET(GPR_R8), i->op_size);
    reg_write(c, REG_OFFSET(GPR_RAX), i->op_size, r8);
    reg_write(c, REG_OFFSET(GPR_R8), i->op_size, rax);
}

static void select_handler(struct icpu *c, const struct decode *d, struct insn *i)
{
    static bool (*const select[])(struct icpu *, const struct decode *, struct insn *) = {
        op_integer_select, op_control_select, op_string_select, op_system_select, op_xsave_select, native_select,
    };
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2:
        i->fn = op_invalid;
        i->flags |= INSN_ENDS_BLOCK;
        return;
    default:
        break;
    }
    if (c->amd && decode_is_hint_of_intel(d)) {
        bool exchange = d->zi.mnemonic == ZYDIS_MNEMONIC_PAUSE;
        i->fn = exchange ? op_exchange_r8 : op_invalid;
        i->flags |= exchange ? 0 : INSN_ENDS_BLOCK;
        i->op_size = d->zi.raw.rex.W ? 8 : d->zi.attributes & ZYDIS_ATTRIB_HAS_OPERANDSIZE ? 2 : 4;
        return;
    }
    for (unsigned n = 0; n < sizeof(select) / sizeof(select[0]); n++)
        if (select[n](c, d, i))
            return;
    i->fn = op_undefined;
    i->flags |= INSN_ENDS_BLOCK;
}

/* As long as all the bytes that the decoder may have looked at: the block is good as long as none of them changes. The fault puts rip back by the length,
 * whatever it is. */
static unsigned refuse(struct insn *out, insn_fn *fn, unsigned examined)
{
    out->fn = fn;
    out->length = (uint8_t)examined;
    out->flags = INSN_ENDS_BLOCK;
    return examined;
}

unsigned decode_insn(struct icpu *c, const uint8_t *bytes, unsigned available, unsigned code_bits, struct insn *out)
{
    struct decode d;
    ZydisDecoder decoder;
    unsigned length = available < INSN_BYTES_MAX ? available : INSN_BYTES_MAX;

    simd_save(c);
    memset(out, 0, sizeof(*out));
    decoder_init(&decoder, code_bits, c->amd);
    ZyanStatus status = ZydisDecoderDecodeFull(&decoder, bytes, length, &d.zi, d.op);
    if (status == ZYDIS_STATUS_NO_MORE_DATA)
        return available < INSN_BYTES_MAX ? 0 : refuse(out, op_too_long, length);
    if (status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG)
        return refuse(out, op_too_long, length);
    if (!ZYAN_SUCCESS(status))
        return refuse(out, op_invalid, length);
    d.code_bits = code_bits;
    d.bytes = bytes;
    drop_false_base(&d);
    if (c->amd)
        decode_amd_branch(&d);
    fill_generic(&d, out);
    select_handler(c, &d, out);
    return out->length;
}
