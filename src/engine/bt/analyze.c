/*
 * Decoding of guest instructions for the translator: which registers and memory each names, and which of the few ways of translation is its own.
 *
 * Zydis takes most of a translation's time, so what it said is remembered by form: the bytes up to ModRM and SIB, which determine all but the values of displacement and immediate.
 * This is a safety boundary: an instruction is copied only when its mnemonic or instruction set is on a list, its registers are ordinary ones and its one memory operand is
 * described by ModRM. Everything else is TI_EXIT, which the interpreter executes.
 * Threading: pure.
 */
#include <stdlib.h>
#include <string.h>

#include "engine/bt/translate_priv.h"
#include "engine/interp/native_priv.h"
#include "state/inputs.h"

#define RET_RELEASE_MAX 96
#define NEAR_OVERFLOW (INT32_MAX - 8192) /* displacements beyond may leave 32 bits when offsets in the page are added */

/* Number of the general register, 0..15, or TI_NONE. *high: AH CH DH BH. */
static unsigned gpr_number(ZydisRegister reg, bool *high)
{
    if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_BL)
        return reg - ZYDIS_REGISTER_AL;
    if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH) {
        *high = true;
        return reg - ZYDIS_REGISTER_AH;
    }
    if (reg >= ZYDIS_REGISTER_SPL && reg <= ZYDIS_REGISTER_R15B)
        return reg - ZYDIS_REGISTER_SPL + GPR_RSP;
    if (reg >= ZYDIS_REGISTER_AX && reg <= ZYDIS_REGISTER_R15W)
        return reg - ZYDIS_REGISTER_AX;
    if (reg >= ZYDIS_REGISTER_EAX && reg <= ZYDIS_REGISTER_R15D)
        return reg - ZYDIS_REGISTER_EAX;
    if (reg >= ZYDIS_REGISTER_RAX && reg <= ZYDIS_REGISTER_R15)
        return reg - ZYDIS_REGISTER_RAX;
    return TI_NONE;
}

static uint16_t bit(unsigned reg)
{
    return reg == TI_NONE ? 0 : (uint16_t)(1u << reg);
}

static void note_register(struct tinsn *t, const ZydisDecodedOperand *op)
{
    unsigned n = gpr_number(op->reg.value, &t->high_byte);
    if (n == TI_NONE)
        return;
    bool read = op->actions & ZYDIS_OPERAND_ACTION_MASK_READ;
    bool write = op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    bool whole = write && !(op->actions & ZYDIS_OPERAND_ACTION_CONDWRITE) && op->size >= 32;
    if (write)
        t->writes |= bit(n);
    if (read || !whole)
        t->reads |= bit(n);
}

/* 32-bit code: whether the segment is one that translated code may use; FS and GS are looked at when it runs. In 64-bit code these alone matter. */
static bool note_segment(struct tinsn *t, const ZydisDecodedOperand *op, unsigned flat)
{
    t->segment = op->mem.segment == ZYDIS_REGISTER_FS ? TI_FS : op->mem.segment == ZYDIS_REGISTER_GS ? TI_GS : TI_FLAT;
    if (!t->legacy || op->mem.type == ZYDIS_MEMOP_TYPE_AGEN)
        return true;
    switch (op->mem.segment) {
    case ZYDIS_REGISTER_ES:
        return flat >> SEG_ES & 1;
    case ZYDIS_REGISTER_SS:
        return flat >> SEG_SS & 1;
    case ZYDIS_REGISTER_DS:
        return flat >> SEG_DS & 1;
    default:
        return t->segment != TI_FLAT; /* CS: rare */
    }
}

/* False: an address that is not computed from general registers. */
/* MOV between rAX and an address that is in the instruction, as wide as addresses are. */
static bool is_moffs(const ZydisDecodedOperand *op)
{
    return op->encoding == ZYDIS_OPERAND_ENCODING_DISP16_32_64;
}

static bool note_memory(struct tinsn *t, const ZydisDecodedInstruction *zi, const ZydisDecodedOperand *op, unsigned flat)
{
    bool high = false;
    t->memory = true;
    t->mem_read = op->actions & ZYDIS_OPERAND_ACTION_MASK_READ;
    t->mem_write = op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    t->mem_size = op->size / 8;
    t->address32 = zi->address_width == 32 && !t->legacy;
    t->scale = op->mem.scale >= 8 ? 3 : op->mem.scale >= 4 ? 2 : op->mem.scale >= 2 ? 1 : 0;
    t->base = t->index = TI_NONE;
    if (t->disp_bytes == sizeof(t->absolute))
        t->absolute = (uint64_t)op->mem.disp.value;
    else
        t->disp = (int32_t)op->mem.disp.value;
    if (zi->address_width == 16 || (!t->legacy && !is_moffs(op) && op->mem.disp.value != t->disp))
        return false;
    if (op->mem.base == ZYDIS_REGISTER_RIP)
        t->rip_relative = true;
    else if (op->mem.base != ZYDIS_REGISTER_NONE)
        t->base = (uint8_t)gpr_number(op->mem.base, &high);
    if (op->mem.base != ZYDIS_REGISTER_NONE && !t->rip_relative && t->base == TI_NONE)
        return false;
    if (op->mem.index != ZYDIS_REGISTER_NONE) {
        t->index = (uint8_t)gpr_number(op->mem.index, &high);
        if (t->index == TI_NONE)
            return false;
    }
    /* Zydis 4.0 invents a base of R13D, see drop_false_base in the interpreter's decode.c. */
    if (zi->attributes & ZYDIS_ATTRIB_HAS_SIB && zi->raw.modrm.mod == 0 && zi->raw.sib.base == 5)
        t->base = TI_NONE, t->disp = (int32_t)zi->raw.disp.value;
    t->reads |= (uint16_t)(bit(t->base) | bit(t->index));
    return note_segment(t, op, flat) && !(t->rip_relative && t->address32);
}

static bool operands_note(struct tinsn *t, const struct decode *d, unsigned flat, const ZydisDecodedOperand **memory)
{
    *memory = NULL;
    for (unsigned n = 0; n < d->zi.operand_count; n++) {
        const ZydisDecodedOperand *op = &d->op[n];
        if (op->type == ZYDIS_OPERAND_TYPE_REGISTER) {
            note_register(t, op);
        } else if (op->type == ZYDIS_OPERAND_TYPE_MEMORY && (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM || is_moffs(op)) &&
                   (op->mem.type == ZYDIS_MEMOP_TYPE_MEM || op->mem.type == ZYDIS_MEMOP_TYPE_AGEN)) {
            if (*memory || !note_memory(t, &d->zi, op, flat))
                return false;
            *memory = op;
        }
    }
    return true;
}

static void encoding_note(struct tinsn *t, const struct decode *d)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    unsigned at = 0;
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY) {
        for (;; at++) {
            uint8_t byte = d->bytes[at];
            if ((byte & 0xf0) == 0x40 && d->code_bits == 64)
                t->rex = byte;
            else if (byte == 0x66 || byte == 0x67 || byte == 0xf0 || byte == 0xf2 || byte == 0xf3 || byte == 0x26 || byte == 0x2e ||
                     byte == 0x36 || byte == 0x3e || byte == 0x64 || byte == 0x65)
                t->rex = 0;
            else
                break;
        }
    } else {
        at = zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX ? zi->raw.evex.offset : zi->raw.vex.offset;
    }
    t->opcode_at = (uint8_t)at;
    if (zi->attributes & ZYDIS_ATTRIB_HAS_MODRM) {
        t->modrm_at = zi->raw.modrm.offset;
        t->tail_at = (uint8_t)(t->modrm_at + 1 + (zi->attributes & ZYDIS_ATTRIB_HAS_SIB ? 1 : 0) + zi->raw.disp.size / 8);
    }
}

/* ---- classes ---- */

static bool is_plain(const struct decode *d)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
        for (unsigned n = 0; n < 2; n++)
            if (d->op[n].type == ZYDIS_OPERAND_TYPE_REGISTER) {
                ZydisRegisterClass class = ZydisRegisterGetClass(d->op[n].reg.value);
                if (class != ZYDIS_REGCLASS_GPR8 && class != ZYDIS_REGCLASS_GPR16 && class != ZYDIS_REGCLASS_GPR32 && class != ZYDIS_REGCLASS_GPR64)
                    return false;
            }
        return true;
    case ZYDIS_MNEMONIC_MOVZX: case ZYDIS_MNEMONIC_MOVSX: case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_ADD: case ZYDIS_MNEMONIC_OR: case ZYDIS_MNEMONIC_ADC: case ZYDIS_MNEMONIC_SBB:
    case ZYDIS_MNEMONIC_AND: case ZYDIS_MNEMONIC_SUB: case ZYDIS_MNEMONIC_XOR: case ZYDIS_MNEMONIC_CMP: case ZYDIS_MNEMONIC_TEST:
    case ZYDIS_MNEMONIC_INC: case ZYDIS_MNEMONIC_DEC: case ZYDIS_MNEMONIC_NEG: case ZYDIS_MNEMONIC_NOT:
    case ZYDIS_MNEMONIC_SHL: case ZYDIS_MNEMONIC_SHR: case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_ROL: case ZYDIS_MNEMONIC_ROR: case ZYDIS_MNEMONIC_RCL: case ZYDIS_MNEMONIC_RCR:
    case ZYDIS_MNEMONIC_SHLD: case ZYDIS_MNEMONIC_SHRD:
    case ZYDIS_MNEMONIC_IMUL: case ZYDIS_MNEMONIC_MUL: case ZYDIS_MNEMONIC_DIV: case ZYDIS_MNEMONIC_IDIV:
    case ZYDIS_MNEMONIC_BSF: case ZYDIS_MNEMONIC_BSR: case ZYDIS_MNEMONIC_BSWAP:
    case ZYDIS_MNEMONIC_XCHG: case ZYDIS_MNEMONIC_XADD:
    case ZYDIS_MNEMONIC_CMPXCHG: case ZYDIS_MNEMONIC_CMPXCHG8B: case ZYDIS_MNEMONIC_CMPXCHG16B:
    case ZYDIS_MNEMONIC_CBW: case ZYDIS_MNEMONIC_CWDE: case ZYDIS_MNEMONIC_CDQE:
    case ZYDIS_MNEMONIC_CWD: case ZYDIS_MNEMONIC_CDQ: case ZYDIS_MNEMONIC_CQO:
    case ZYDIS_MNEMONIC_CLC: case ZYDIS_MNEMONIC_STC: case ZYDIS_MNEMONIC_CMC:
    case ZYDIS_MNEMONIC_LAHF: case ZYDIS_MNEMONIC_SAHF:
    case ZYDIS_MNEMONIC_LEA: case ZYDIS_MNEMONIC_PAUSE:
        return true;
    case ZYDIS_MNEMONIC_BT: case ZYDIS_MNEMONIC_BTS: case ZYDIS_MNEMONIC_BTR: case ZYDIS_MNEMONIC_BTC:
        /* With a bit offset in a register the operand reaches beyond its address. */
        return d->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER || d->op[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
    default:
        return d->zi.meta.category == ZYDIS_CATEGORY_CMOV || d->zi.meta.category == ZYDIS_CATEGORY_SETCC;
    }
}

static bool is_skipped(const struct decode *d)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_CLD: /* translated code runs with DF clear */
    case ZYDIS_MNEMONIC_NOP:
    case ZYDIS_MNEMONIC_PREFETCHNTA:
    case ZYDIS_MNEMONIC_PREFETCHT0:
    case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2:
    case ZYDIS_MNEMONIC_PREFETCHW:
        return true;
    default:
        return false;
    }
}

static void exit_with(struct tinsn *t, enum bt_exit reason)
{
    t->kind = TI_EXIT;
    t->exit = (uint8_t)reason;
}

static void branch(struct tinsn *t, const struct decode *d, enum tinsn_kind direct, enum tinsn_kind by_register, enum tinsn_kind by_memory)
{
    const ZydisDecodedOperand *op = &d->op[0];
    bool high = false;
    if (d->zi.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || d->zi.operand_width == 16 || (d->zi.operand_width != d->code_bits && op->type != ZYDIS_OPERAND_TYPE_IMMEDIATE)) {
        exit_with(t, BT_EXIT_interp);
        return;
    }
    switch (op->type) {
    case ZYDIS_OPERAND_TYPE_IMMEDIATE:
        t->imm = (int32_t)op->imm.value.s;
        t->target = t->offset + t->length + t->imm;
        t->kind = (uint8_t)direct;
        return;
    case ZYDIS_OPERAND_TYPE_REGISTER:
        t->reg = (uint8_t)gpr_number(op->reg.value, &high);
        t->kind = (uint8_t)by_register;
        if (t->reg == GPR_RSP)
            exit_with(t, BT_EXIT_interp);
        return;
    case ZYDIS_OPERAND_TYPE_MEMORY:
        t->kind = (uint8_t)by_memory;
        return;
    default:
        exit_with(t, BT_EXIT_interp);
    }
}

/* A general register as wide as the code's own. */
static bool is_whole(const struct decode *d, const ZydisDecodedOperand *op)
{
    return op->type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(op->reg.value) == (d->code_bits == 64 ? ZYDIS_REGCLASS_GPR64 : ZYDIS_REGCLASS_GPR32);
}

static void push(struct tinsn *t, const struct decode *d)
{
    const ZydisDecodedOperand *op = &d->op[0];
    exit_with(t, BT_EXIT_interp);
    if (d->zi.operand_width != d->code_bits)
        return;
    if (op->type == ZYDIS_OPERAND_TYPE_MEMORY) {
        t->kind = TI_PUSH_MEM;
    } else if (op->type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
        t->imm = (int32_t)op->imm.value.s;
        t->kind = TI_PUSH_IMM;
    } else if (is_whole(d, op)) {
        t->reg = (uint8_t)ZydisRegisterGetId(op->reg.value);
        t->kind = TI_PUSH_REG;
    } else if (t->legacy && op->type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_SEGMENT) {
        t->imm = BT_CTX(c.v.cpu.seg[SEG_ES].selector) + (op->reg.value - ZYDIS_REGISTER_ES) * (int32_t)sizeof(struct segment);
        t->kind = TI_PUSH_SELECTOR;
    }
}

static void pop(struct tinsn *t, const struct decode *d)
{
    const ZydisDecodedOperand *op = &d->op[0];
    exit_with(t, BT_EXIT_interp);
    if (is_whole(d, op)) {
        t->reg = (uint8_t)ZydisRegisterGetId(op->reg.value);
        t->kind = TI_POP_REG;
    }
}

static bool is_jcc(const ZydisDecodedInstruction *zi)
{
    if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || zi->operand_width == 16)
        return false;
    return (zi->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (zi->opcode & 0xf0) == 0x70) ||
           (zi->opcode_map == ZYDIS_OPCODE_MAP_0F && (zi->opcode & 0xf0) == 0x80);
}

/* ---- strings ---- */

static bool string_op_of(const struct decode *d, enum string_op *op)
{
    if (d->zi.encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY || d->zi.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT)
        return false;
    switch (d->zi.opcode & 0xfe) {
    case 0xa4:
        *op = STRING_MOVS;
        return true;
    case 0xa6:
        *op = STRING_CMPS;
        return true;
    case 0xaa:
        *op = STRING_STOS;
        return true;
    case 0xac:
        *op = STRING_LODS;
        return true;
    case 0xae:
        *op = STRING_SCAS;
        return true;
    default:
        return false;
    }
}

/* F2, and FS and GS, are rare enough for the interpreter. */
static bool string_prefixes(const struct decode *d, bool *repeated)
{
    *repeated = false;
    for (unsigned n = 0; n < d->zi.raw.prefix_count; n++)
        switch (d->zi.raw.prefixes[n].value) {
        case 0xf3:
            *repeated = true;
            break;
        case 0xf2:
        case 0x64:
        case 0x65:
            return false;
        default:
            break;
        }
    return true;
}

/* The segments of a string instruction's operands, ES and perhaps another than DS. */
static bool string_segments(const struct decode *d, const struct bt_mode *mode)
{
    if (mode->code_bits == 64)
        return true;
    struct tinsn t = {.legacy = true};
    for (unsigned n = 0; n < d->zi.operand_count; n++)
        if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY && !note_segment(&t, &d->op[n], mode->flat))
            return false;
    return true;
}

/* True: a string instruction, translated or not. */
static bool string_insn(struct tinsn *t, const struct decode *d, const struct bt_mode *mode)
{
    static const uint16_t named[] = {
        [STRING_MOVS] = 1u << GPR_RSI | 1u << GPR_RDI, [STRING_STOS] = 1u << GPR_RAX | 1u << GPR_RDI, [STRING_LODS] = 1u << GPR_RAX | 1u << GPR_RSI,
        [STRING_SCAS] = 1u << GPR_RAX | 1u << GPR_RDI, [STRING_CMPS] = 1u << GPR_RSI | 1u << GPR_RDI,
    };
    enum string_op op;
    if (!string_op_of(d, &op))
        return false;
    if (!string_prefixes(d, &t->repeated) || d->zi.address_width != d->code_bits || (t->repeated && op != STRING_MOVS && op != STRING_STOS))
        return true;
    if (!string_segments(d, mode))
        return true;
    t->kind = TI_STRING;
    t->condition = (uint8_t)op;
    t->mem_size = d->zi.opcode & 1 ? d->zi.operand_width / 8 : 1;
    t->reads = named[op] | (t->repeated ? 1u << GPR_RCX : 0);
    t->writes = t->reads & (uint16_t)~(op == STRING_LODS ? 0 : 1u << GPR_RAX);
    return true;
}

/* What of the processor's state MOV, RDFSBASE and RDGSBASE read: its place in the context, 0: not translated. Not CS: after SYSCALL and SYSRET it is what
 * bt_settle makes it. So is SS after SYSRET; SYSCALL sets its selector. */
static int32_t state_field(ZydisRegister reg, enum tinsn_kind *kind)
{
    static const struct {
        uint16_t reg;
        uint8_t kind;
        int32_t field;
    } fields[] = {
        {ZYDIS_REGISTER_ES, TI_LOAD_SELECTOR, BT_CTX(c.v.cpu.seg[SEG_ES].selector)}, {ZYDIS_REGISTER_DS, TI_LOAD_SELECTOR, BT_CTX(c.v.cpu.seg[SEG_DS].selector)},
        {ZYDIS_REGISTER_FS, TI_LOAD_SELECTOR, BT_CTX(c.v.cpu.seg[SEG_FS].selector)}, {ZYDIS_REGISTER_GS, TI_LOAD_SELECTOR, BT_CTX(c.v.cpu.seg[SEG_GS].selector)},
        {ZYDIS_REGISTER_SS, TI_LOAD_SELECTOR, BT_CTX(c.v.cpu.seg[SEG_SS].selector)},
        {ZYDIS_REGISTER_CR0, TI_LOAD_STATE, BT_CTX(c.v.cpu.cr0)},                    {ZYDIS_REGISTER_CR2, TI_LOAD_STATE, BT_CTX(c.v.cpu.cr2)},
        {ZYDIS_REGISTER_CR3, TI_LOAD_STATE, BT_CTX(c.v.cpu.cr3)},                    {ZYDIS_REGISTER_CR4, TI_LOAD_STATE, BT_CTX(c.v.cpu.cr4)},
    };
    for (unsigned n = 0; n < sizeof(fields) / sizeof(fields[0]); n++)
        if (fields[n].reg == reg) {
            *kind = (enum tinsn_kind)fields[n].kind;
            return fields[n].field;
        }
    return 0;
}

/* MOV from segment and control registers. */
static bool state_move(struct tinsn *t, const struct decode *d, bool user)
{
    enum tinsn_kind kind = TI_EXIT;
    if (d->op[0].type != ZYDIS_OPERAND_TYPE_REGISTER || d->op[1].type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    int32_t field = state_field(d->op[1].reg.value, &kind);
    if (!field || (user && (kind != TI_LOAD_SELECTOR || d->op[1].reg.value == ZYDIS_REGISTER_SS)))
        return false;
    if (d->op[0].size == 16)
        kind = TI_LOAD_SELECTOR16;
    else if (kind == TI_LOAD_STATE && t->legacy)
        kind = TI_LOAD_STATE32;
    bool high = false;
    t->reg = (uint8_t)gpr_number(d->op[0].reg.value, &high);
    t->imm = field;
    t->kind = (uint8_t)kind;
    return true;
}

static bool base_move(struct tinsn *t, const struct decode *d, bool exists)
{
    bool high = false, write = d->zi.mnemonic == ZYDIS_MNEMONIC_WRFSBASE || d->zi.mnemonic == ZYDIS_MNEMONIC_WRGSBASE;
    bool fs = d->zi.mnemonic == ZYDIS_MNEMONIC_RDFSBASE || d->zi.mnemonic == ZYDIS_MNEMONIC_WRFSBASE;
    if (!exists)
        return false;
    t->reg = (uint8_t)gpr_number(d->op[0].reg.value, &high);
    t->mem_size = d->op[0].size / 8;
    if (write) {
        t->kind = TI_WRITE_BASE;
        t->imm = fs ? SEG_FS : SEG_GS;
    } else {
        t->kind = t->mem_size == 4 ? TI_LOAD_STATE32 : TI_LOAD_STATE;
        t->imm = fs ? BT_CTX(c.v.cpu.seg[SEG_FS].base) : BT_CTX(c.v.cpu.seg[SEG_GS].base);
    }
    return true;
}

static bool bit_string(struct tinsn *t, const struct decode *d)
{
    bool high = false;
    if (!t->memory || t->address32 || d->op[0].type != ZYDIS_OPERAND_TYPE_MEMORY || d->op[1].type != ZYDIS_OPERAND_TYPE_REGISTER)
        return false;
    if (t->rip_relative && t->segment != TI_FLAT) /* one summand too many for emit_bit_string_access */
        return false;
    t->reg = (uint8_t)gpr_number(d->op[1].reg.value, &high);
    t->kind = TI_BIT_STRING;
    return t->mem_size == 2 || t->mem_size == 4 || t->mem_size == 8;
}

/* Instructions about the processor's own state. */
static bool system_state(struct tinsn *t, const struct decode *d, const struct bt_mode *mode)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
        t->kind = d->zi.mnemonic == ZYDIS_MNEMONIC_CLI ? TI_CLI : TI_STI;
        return !mode->user;
    case ZYDIS_MNEMONIC_SWAPGS:
        t->kind = TI_SWAPGS;
        return !mode->user && mode->code_bits == 64;
    case ZYDIS_MNEMONIC_STAC:
    case ZYDIS_MNEMONIC_CLAC:
        t->kind = d->zi.mnemonic == ZYDIS_MNEMONIC_STAC ? TI_STAC : TI_CLAC;
        return !mode->user;
    case ZYDIS_MNEMONIC_SERIALIZE:
        t->kind = TI_SERIALIZE;
        return true;
    case ZYDIS_MNEMONIC_SYSCALL:
        t->kind = TI_SYSCALL;
        if (!mode->user || mode->code_bits != 64)
            exit_with(t, BT_EXIT_syscall);
        return true;
    case ZYDIS_MNEMONIC_SYSRET:
        t->kind = TI_SYSRET;
        if (mode->user || mode->code_bits != 64 || !d->zi.raw.rex.W)
            exit_with(t, BT_EXIT_sysret);
        return true;
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP:
        t->kind = d->zi.mnemonic == ZYDIS_MNEMONIC_RDTSC ? TI_RDTSC : TI_RDTSCP;
        return !(mode->cr4 & BT_MODE_TSD) && inputs_tsc_is_host();
    case ZYDIS_MNEMONIC_RDFSBASE:
    case ZYDIS_MNEMONIC_RDGSBASE:
    case ZYDIS_MNEMONIC_WRFSBASE:
    case ZYDIS_MNEMONIC_WRGSBASE:
        return base_move(t, d, mode->cr4 & BT_MODE_FSGSBASE && mode->code_bits == 64);
    case ZYDIS_MNEMONIC_MOV:
        return state_move(t, d, mode->user);
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
        return bit_string(t, d);
    default:
        return false;
    }
}

/* False: not an instruction with a translation of its own. */
static bool special(struct tinsn *t, const struct decode *d)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
        push(t, d);
        return true;
    case ZYDIS_MNEMONIC_POP:
        pop(t, d);
        return true;
    case ZYDIS_MNEMONIC_LEAVE:
        t->kind = TI_LEAVE;
        if (d->zi.operand_width != d->code_bits)
            exit_with(t, BT_EXIT_interp);
        return true;
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_PUSHFD:
        t->kind = TI_PUSHF;
        if (d->zi.operand_width != d->code_bits)
            exit_with(t, BT_EXIT_interp);
        t->flags_read = RFLAGS_OSZAPC;
        return true;
    case ZYDIS_MNEMONIC_JMP:
        branch(t, d, TI_JMP, TI_JMP_REG, TI_JMP_MEM);
        return true;
    case ZYDIS_MNEMONIC_CALL:
        branch(t, d, TI_CALL, TI_CALL_REG, TI_CALL_MEM);
        return true;
    case ZYDIS_MNEMONIC_RET:
        t->kind = TI_RET;
        t->imm = d->op[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE ? (int32_t)(d->op[0].imm.value.u & 0xffff) : 0;
        if (d->zi.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR || d->zi.operand_width != d->code_bits)
            exit_with(t, BT_EXIT_interp);
        return true;
    case ZYDIS_MNEMONIC_LOOP:
    case ZYDIS_MNEMONIC_LOOPE:
    case ZYDIS_MNEMONIC_LOOPNE:
    case ZYDIS_MNEMONIC_JRCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
        branch(t, d, TI_LOOP, TI_EXIT, TI_EXIT);
        if (d->zi.address_width == 16)
            exit_with(t, BT_EXIT_interp);
        return true;
    case ZYDIS_MNEMONIC_IRETQ:
        exit_with(t, BT_EXIT_iret);
        return true;
    case ZYDIS_MNEMONIC_HLT:
        exit_with(t, BT_EXIT_halt);
        return true;
    default:
        if (!is_jcc(&d->zi))
            return false;
        branch(t, d, TI_JCC, TI_EXIT, TI_EXIT);
        t->condition = d->zi.opcode & 15;
        return true;
    }
}

/* Vector and other instructions that the interpreter runs in stubs: the same list decides here. */
static bool is_native(const struct analyze_context *a, struct tinsn *t, const struct decode *d)
{
    unsigned alignment, classes = native_classes(a->c, d, &alignment, &t->x87_pointers);
    if (!classes || (classes & a->mode.simd_blocked))
        return false;
    t->aligned = t->memory && alignment >= t->mem_size && alignment > 8;
    return true;
}

static void flags_note(struct tinsn *t, const struct decode *d)
{
    const ZydisAccessedFlags *flags = d->zi.cpu_flags;
    if (!flags)
        return;
    t->flags_read |= flags->tested & RFLAGS_OSZAPC;
    t->flags_written = (flags->modified | flags->set_0 | flags->set_1 | flags->undefined) & RFLAGS_OSZAPC;
}

/* Instructions that move a pointer by a constant: what was known about the page it points into stays known. */
static void adjustment_note(struct tinsn *t, const struct decode *d)
{
    bool high = false;
    if (d->op[0].type != ZYDIS_OPERAND_TYPE_REGISTER || d->op[0].size != d->code_bits)
        return;
    unsigned reg = gpr_number(d->op[0].reg.value, &high);
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_SUB:
        if (d->op[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE)
            return;
        t->adjust = (int32_t)d->op[1].imm.value.s;
        t->adjust_sign = d->zi.mnemonic == ZYDIS_MNEMONIC_SUB ? -1 : 1;
        t->adjust *= t->adjust_sign;
        break;
    case ZYDIS_MNEMONIC_INC:
    case ZYDIS_MNEMONIC_DEC:
        t->adjust = d->zi.mnemonic == ZYDIS_MNEMONIC_INC ? 1 : -1;
        break;
    case ZYDIS_MNEMONIC_LEA:
        if (t->base != reg || t->index != TI_NONE || t->address32)
            return;
        t->adjust = t->disp;
        break;
    default:
        return;
    }
    t->adjusts = (uint8_t)reg;
}

/* ---- 32-bit code ---- */

/* Bits of VEX and EVEX that mean nothing there but do in 64-bit mode (SDM vol. 2A, 2.3 and 2.7): as assemblers leave them? */
static bool extension_is_usual(const struct tinsn *t, const struct decode *d)
{
    const uint8_t *p = d->bytes + t->opcode_at;
    bool evex = d->zi.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX, w = p[0] != 0xc5 && p[2] & 0x80;
    if (p[0] != 0xc5 && ((p[1] & 0x20) == 0 || (evex && ((p[1] & 0x10) == 0 || (p[3] & 8) == 0))))
        return false;
    if ((p[p[0] == 0xc5 ? 1 : 2] & 0x40) == 0)
        return false;
    for (unsigned n = 0; n < d->zi.operand_count; n++) {
        const ZydisDecodedOperand *op = &d->op[n];
        if (op->encoding == ZYDIS_OPERAND_ENCODING_IS4) /* bit 7 of the immediate, too, and forms do not tell that */
            return false;
        if (w && op->type == ZYDIS_OPERAND_TYPE_REGISTER && op->visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT && ZydisRegisterGetClass(op->reg.value) == ZYDIS_REGCLASS_GPR32)
            return false;
    }
    return !w || !native_w_is_width(d->zi.mnemonic);
}

/* False: what is encoded otherwise in 64-bit mode, and has no kind of its own. */
static bool has_encoding(struct tinsn *t, const struct decode *d)
{
    const ZydisDecodedInstruction *zi = &d->zi;
    if (zi->encoding == ZYDIS_INSTRUCTION_ENCODING_3DNOW || zi->encoding == ZYDIS_INSTRUCTION_ENCODING_XOP)
        return false;
    if (zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY)
        return extension_is_usual(t, d);
    bool one_byte = zi->opcode_map == ZYDIS_OPCODE_MAP_DEFAULT;
    if (one_byte && (zi->opcode & 0xf0) == 0x40) {
        t->kind = TI_COUNT;
        t->condition = zi->opcode >> 3 & 1;
        t->reg = zi->opcode & 7;
        t->mem_size = zi->operand_width / 8;
    }
    bool absolute = zi->attributes & ZYDIS_ATTRIB_HAS_MODRM && zi->raw.modrm.mod == 0 && zi->raw.modrm.rm == 5; /* relative to RIP there */
    return !(one_byte && zi->opcode == 0x82) && !(absolute && zi->mnemonic == ZYDIS_MNEMONIC_LEA);
}

static void classify(const struct analyze_context *a, struct tinsn *t, const struct decode *d)
{
    const ZydisDecodedOperand *memory;
    exit_with(t, BT_EXIT_interp);
    if (a->c->amd && decode_is_hint_of_intel(d))
        return;
    if (is_skipped(d)) {
        t->kind = TI_SKIP;
        return;
    }
    if (string_insn(t, d, &a->mode)) {
        flags_note(t, d);
        return;
    }
    if (d->zi.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE | ZYDIS_ATTRIB_HAS_XACQUIRE | ZYDIS_ATTRIB_HAS_XRELEASE))
        return; /* lock elision is not offered, and the host must not begin a transaction */
    if (!operands_note(t, d, a->mode.flat, &memory))
        return;
    encoding_note(t, d);
    flags_note(t, d);
    adjustment_note(t, d);
    if (special(t, d) || system_state(t, d, &a->mode))
        return;
    exit_with(t, BT_EXIT_interp);
    if (t->legacy && (!has_encoding(t, d) || t->kind != TI_EXIT))
        return;
    t->traps = !is_plain(d) || d->zi.mnemonic == ZYDIS_MNEMONIC_DIV || d->zi.mnemonic == ZYDIS_MNEMONIC_IDIV;
    if (!is_plain(d) && !is_native(a, t, d))
        return;
    if (d->zi.mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B)
        t->aligned = true;
    if (d->zi.mnemonic == ZYDIS_MNEMONIC_LEA) {
        t->kind = t->rip_relative ? TI_LEA_RIP : TI_COPY;
        t->memory = false;
        bool high = false;
        t->reg = (uint8_t)gpr_number(d->op[0].reg.value, &high);
        if (t->rip_relative && d->zi.operand_width != 64)
            exit_with(t, BT_EXIT_interp);
    } else if (t->memory) {
        t->kind = is_moffs(memory) ? TI_MOFFS : TI_MEMORY;
        if (!t->mem_size || t->mem_size > 64)
            exit_with(t, BT_EXIT_interp);
    } else if (d->zi.attributes & ZYDIS_ATTRIB_HAS_MODRM && d->zi.raw.modrm.mod != 3) {
        return; /* a memory operand that was not understood */
    } else {
        for (unsigned n = 0; n < d->zi.operand_count; n++)
            if (d->op[n].type == ZYDIS_OPERAND_TYPE_MEMORY)
                return;
        t->kind = TI_COPY;
    }
}

/* What groups of accesses are made of. */
static void bases_note(struct tinsn *t)
{
    t->plain_base = t->memory && t->kind != TI_BIT_STRING && t->base != TI_NONE && t->index == TI_NONE && !t->address32 && t->segment == TI_FLAT && !t->rip_relative;
    switch (t->kind) {
    case TI_PUSH_REG:
    case TI_PUSH_IMM:
    case TI_PUSH_MEM:
    case TI_PUSH_SELECTOR:
    case TI_PUSHF:
    case TI_CALL:
    case TI_CALL_REG:
    case TI_CALL_MEM:
        t->implied_disp = (int8_t)-(int)stack_bytes(t);
        t->implied = GPR_RSP;
        break;
    case TI_POP_REG:
    case TI_RET:
        t->implied = GPR_RSP;
        break;
    case TI_LEAVE:
        t->implied = GPR_RBP;
        break;
    default:
        break;
    }
}

/* ---- forms ---- */

static int32_t value_at(const uint8_t *p, unsigned bytes)
{
    return bytes == 1 ? *(const int8_t *)p : bytes == 2 ? *(const int16_t *)p : bytes == 4 ? *(const int32_t *)p : 0;
}

static void values_set(struct tinsn *t, const uint8_t *bytes)
{
    if (t->disp_bytes == sizeof(t->absolute)) {
        memcpy(&t->absolute, bytes + t->disp_at, sizeof(t->absolute));
    } else if (t->disp_bytes) {
        t->disp = value_at(bytes + t->disp_at, t->disp_bytes);
        if (t->adjusts != TI_NONE && t->disp_bytes && !t->imm_bytes && t->kind == TI_COPY)
            t->adjust = t->disp;
    }
    if (!t->imm_bytes)
        return;
    int32_t value = value_at(bytes + t->imm_at, t->imm_bytes);
    t->imm = t->kind == TI_RET ? (uint16_t)value : value;
    t->target = t->offset + t->length + value;
    if (t->adjust_sign)
        t->adjust = t->adjust_sign * value;
}

static bool form_find(const struct analyze_context *a, const uint8_t *bytes, unsigned available, unsigned offset, struct tinsn *out)
{
    uint8_t padded[FORM_WINDOW];
    if (available < FORM_WINDOW) {
        memset(padded, 0, sizeof(padded));
        memcpy(padded, bytes, available);
        bytes = padded;
    }
    const struct tinsn *form = forms_find(a->forms, &a->mode, bytes);
    if (!form || form->length > available)
        return false;
    *out = *form;
    out->offset = (uint16_t)offset;
    values_set(out, bytes);
    return true;
}

/* What depends on the values. */
static void values_check(struct tinsn *t)
{
    bool far = (t->rip_relative && t->disp > NEAR_OVERFLOW) || (t->imm_bytes == 4 && t->imm > NEAR_OVERFLOW && t->kind >= TI_JCC);
    if (far || (t->kind == TI_RET && t->imm > RET_RELEASE_MAX)) {
        exit_with(t, BT_EXIT_interp);
        t->implied = TI_NONE;
    }
}

void analyze_insn(const struct analyze_context *a, const uint8_t *bytes, unsigned available, unsigned offset, struct tinsn *out)
{
    struct decode d;
    ZydisDecoder decoder;
    if (a->forms && form_find(a, bytes, available, offset, out)) {
        values_check(out);
        return;
    }
    memset(out, 0, sizeof(*out));
    out->offset = (uint16_t)offset;
    out->base = out->index = out->reg = out->adjusts = out->implied = TI_NONE;
    out->legacy = a->mode.code_bits == 32;
    exit_with(out, BT_EXIT_interp);
    decoder_init(&decoder, a->mode.code_bits, a->c->amd);
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, bytes, available < 15 ? available : 15, &d.zi, d.op)))
        return;
    d.code_bits = a->mode.code_bits;
    d.bytes = bytes;
    out->length = d.zi.length;
    if (a->c->amd && decode_amd_branch(&d))
        return;
    out->encoding = (uint8_t)d.zi.encoding;
    out->disp_at = d.zi.raw.disp.offset;
    out->disp_bytes = d.zi.raw.disp.size / 8;
    out->imm_at = d.zi.raw.imm[0].offset;
    out->imm_bytes = d.zi.raw.imm[0].size / 8;
    classify(a, out, &d);
    bases_note(out);
    if (a->forms && available >= FORM_WINDOW)
        forms_store(a->forms, &a->mode, bytes, out);
    values_check(out);
}
