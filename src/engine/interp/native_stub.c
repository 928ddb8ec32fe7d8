/*
 * Machine code of stubs: the guest's instruction, rewritten byte by byte, between loads and stores of what it uses of struct icpu.
 *
 * Rewritten are the ModRM byte and the register bits of REX, VEX, XOP or EVEX: a memory operand becomes [register] without displacement, and general
 * registers that a stub may not touch (RSP and those that the caller wants kept) become others. Segment and address-size prefixes are dropped; opcode, mask,
 * broadcast, rounding, length and immediate bytes stay. Explicit prefixes are rebuilt with their fixed bits, so that no bit that the decoder does not know gets to the host.
 * Safety: every memory operand is the one rewritten here; the caller (native_select.c) has made sure that there is at most one. The result is decoded again.
 */
#include <string.h>

#include "engine/interp/native_priv.h"

#define BINDINGS_MAX 6
#define HOST_NONE 0xff

/* Host registers that a stub may use freely, in the order in which they are given away. */
static const uint8_t pool[] = {8, 9, 10, 11, 6, 7, 2, 1, 0};
#define CALLER_SAVED 0x0fc7u /* RAX RCX RDX RSI RDI R8-R11 */

struct binding {
    uint8_t guest; /* offset into gpr, as in struct insn */
    uint8_t host;
    bool written;
};

struct builder {
    const struct decode *d;
    const ZydisDecodedOperand *memory;
    struct stub_code *out;
    struct binding binding[BINDINGS_MAX];
    unsigned bindings;
    uint16_t used; /* host registers */
    uint8_t context, pointer;
    uint8_t field_reg, field_rm, field_vvvv; /* host register, HOST_NONE: not a general register */
    bool byte_register, gpr_operand;
    bool reads_flags, writes_flags;
};

/* ---- emission ---- */

static void emit(struct builder *b, unsigned byte)
{
    if (b->out->length < STUB_BYTES_MAX)
        b->out->bytes[b->out->length] = (uint8_t)byte;
    b->out->length++;
}

static void emit32(struct builder *b, uint32_t value)
{
    for (unsigned n = 0; n < 4; n++)
        emit(b, value >> n * 8 & 0xff);
}

/* op reg, [context + offset] with REX.W as given. */
static void emit_context(struct builder *b, bool wide, unsigned opcode, unsigned reg, uint32_t offset)
{
    emit(b, 0x40 | wide << 3 | (reg >> 3) << 2 | b->context >> 3);
    if (opcode > 0xff)
        emit(b, opcode >> 8);
    emit(b, opcode & 0xff);
    bool small = offset < 128;
    emit(b, (small ? 0x40 : 0x80) | (reg & 7) << 3 | (b->context & 7));
    if (small)
        emit(b, offset);
    else
        emit32(b, offset);
}

static void emit_move(struct builder *b, unsigned to, unsigned from)
{
    emit(b, 0x48 | (from >> 3) << 2 | to >> 3);
    emit(b, 0x89);
    emit(b, 0xc0 | (from & 7) << 3 | (to & 7));
}

/* ---- register assignment ---- */

static uint8_t take(struct builder *b, uint16_t allowed)
{
    for (unsigned n = 0; n < sizeof(pool); n++)
        if (allowed & ~b->used & 1u << pool[n]) {
            b->used |= (uint16_t)(1u << pool[n]);
            return pool[n];
        }
    return HOST_NONE;
}

/* Gives the guest's register a host register, the same one when `fixed`. */
static uint8_t bind(struct builder *b, unsigned guest, bool fixed, bool written)
{
    for (unsigned n = 0; n < b->bindings; n++)
        if (b->binding[n].guest == guest) {
            b->binding[n].written |= written;
            return fixed && b->binding[n].host != guest / 8 ? HOST_NONE : b->binding[n].host;
        }
    if (b->bindings == BINDINGS_MAX)
        return HOST_NONE;
    unsigned same = guest / 8;
    bool can_keep = guest % 8 == 0 && CALLER_SAVED >> same & 1 && !(b->used >> same & 1);
    uint8_t host;
    if (can_keep) {
        b->used |= (uint16_t)(1u << same);
        host = (uint8_t)same;
    } else {
        host = fixed ? HOST_NONE : take(b, CALLER_SAVED);
    }
    if (host != HOST_NONE)
        b->binding[b->bindings++] = (struct binding){(uint8_t)guest, host, written};
    return host;
}

/* Offset of a general register into gpr; false for other classes. */
static bool gpr_offset(ZydisRegister reg, unsigned *offset)
{
    int id = ZydisRegisterGetId(reg);
    switch (ZydisRegisterGetClass(reg)) {
    case ZYDIS_REGCLASS_GPR8:
        /* Ids: AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8B ... */
        *offset = id < 4 ? (unsigned)id * 8 : id < 8 ? (unsigned)(id - 4) * 8 + 1 : (unsigned)(id - 4) * 8;
        return true;
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64:
        *offset = (unsigned)id * 8;
        return true;
    default:
        return false;
    }
}

static bool bind_operand(struct builder *b, const ZydisDecodedOperand *op)
{
    unsigned guest;
    if (!gpr_offset(op->reg.value, &guest))
        return true;
    bool written = op->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE;
    bool byte = op->size == 8;
    if (written && byte)
        return false; /* no such instruction in the classes that come here */
    bool explicit_field = op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG || op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM ||
                          op->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD;
    uint8_t host = bind(b, guest, !explicit_field, written);
    if (host == HOST_NONE)
        return false;
    b->byte_register |= byte;
    b->gpr_operand |= explicit_field;
    if (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG)
        b->field_reg = host;
    else if (op->encoding == ZYDIS_OPERAND_ENCODING_MODRM_RM)
        b->field_rm = host;
    else if (op->encoding == ZYDIS_OPERAND_ENCODING_NDSNDD)
        b->field_vvvv = host;
    return true;
}

static bool assign(struct builder *b)
{
    const ZydisDecodedInstruction *zi = &b->d->zi;
    /* Implicit registers first: they cannot move. */
    for (unsigned pass = 0; pass < 2; pass++)
        for (unsigned n = 0; n < zi->operand_count; n++) {
            const ZydisDecodedOperand *op = &b->d->op[n];
            if (op->type == ZYDIS_OPERAND_TYPE_REGISTER &&
                (op->encoding == ZYDIS_OPERAND_ENCODING_NONE) == (pass == 0) && !bind_operand(b, op))
                return false;
        }
    if (b->memory) {
        if (b->memory->encoding == ZYDIS_OPERAND_ENCODING_NONE) { /* MASKMOVQ, MASKMOVDQU: [RDI] */
            if (b->used >> 7 & 1)
                return false;
            b->pointer = 7;
            b->used |= 1u << 7;
        } else {
            /* RSI is where it arrives. Not RAX, which the flags are loaded through. */
            b->pointer = b->used >> 6 & 1 ? take(b, CALLER_SAVED & ~1u) : 6;
            if (b->pointer == HOST_NONE)
                return false;
            b->used |= (uint16_t)(1u << b->pointer);
        }
    }
    b->context = b->used >> 7 & 1 ? take(b, CALLER_SAVED & ~1u) : 7;
    return b->context != HOST_NONE;
}

/* ---- the instruction ---- */

static bool is_legacy_prefix(uint8_t byte)
{
    switch (byte) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x66: case 0x67: case 0xf0: case 0xf2: case 0xf3:
        return true;
    default:
        return false;
    }
}

/* Instructions whose general registers follow the operand size, which defaults to 16 bits in 16-bit code. */
static bool scales_with_operand_size(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_POPCNT:
    case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_TZCNT:
    case ZYDIS_MNEMONIC_CRC32:
    case ZYDIS_MNEMONIC_MOVBE:
    case ZYDIS_MNEMONIC_RDRAND:
    case ZYDIS_MNEMONIC_RDSEED:
        return true;
    default:
        return false;
    }
}

/* ModRM and what follows the address. */
static void emit_tail(struct builder *b)
{
    const ZydisDecodedInstruction *zi = &b->d->zi;
    unsigned from = zi->raw.modrm.offset + 1u;
    unsigned reg = b->field_reg != HOST_NONE ? b->field_reg : zi->raw.modrm.reg;
    unsigned rm = b->field_rm != HOST_NONE ? b->field_rm : zi->raw.modrm.rm;

    if (b->memory && b->memory->encoding != ZYDIS_OPERAND_ENCODING_NONE) {
        if (zi->attributes & ZYDIS_ATTRIB_HAS_SIB)
            from++;
        from += zi->raw.disp.size / 8u;
        emit(b, (reg & 7) << 3 | (b->pointer & 7));
    } else {
        emit(b, 0xc0 | (reg & 7) << 3 | (rm & 7));
    }
    bool legacy_is4 = b->d->code_bits != 64 && zi->encoding != ZYDIS_INSTRUCTION_ENCODING_LEGACY;
    for (; from < zi->length; from++) {
        uint8_t byte = b->d->bytes[from];
        for (unsigned n = 0; legacy_is4 && n < zi->operand_count; n++)
            if (b->d->op[n].encoding == ZYDIS_OPERAND_ENCODING_IS4)
                byte &= 0x7f; /* bit 7 is ignored outside 64-bit mode (SDM vol. 2A, 2.3.9) */
        emit(b, byte);
    }
}

static void emit_legacy(struct builder *b)
{
    const ZydisDecodedInstruction *zi = &b->d->zi;
    const uint8_t *bytes = b->d->bytes;
    bool long_mode = b->d->code_bits == 64, toggles = b->d->code_bits == 16 && scales_with_operand_size(zi->mnemonic);
    unsigned at = 0, rex = 0;

    if (toggles && zi->operand_width == 16)
        emit(b, 0x66);
    for (; at < zi->length; at++) {
        uint8_t byte = bytes[at];
        if (long_mode && (byte & 0xf0) == 0x40) {
            rex = byte;
            continue;
        }
        if (!is_legacy_prefix(byte))
            break;
        rex = 0; /* REX counts only right before the opcode */
        if (byte == 0xf2 || byte == 0xf3 || (byte == 0x66 && !toggles))
            emit(b, byte);
    }

    bool modrm = zi->attributes & ZYDIS_ATTRIB_HAS_MODRM;
    unsigned keep_b = 1;
    if (b->field_reg != HOST_NONE)
        rex = (rex & ~4u) | (b->field_reg >> 3) << 2;
    if (b->field_rm != HOST_NONE)
        keep_b = 0, rex = (rex & ~1u) | b->field_rm >> 3;
    if (b->memory && b->memory->encoding != ZYDIS_OPERAND_ENCODING_NONE)
        keep_b = 0, rex = (rex & ~1u) | b->pointer >> 3;
    if (modrm)
        rex &= keep_b ? 0x0d : ~2u;
    if (rex || b->byte_register)
        emit(b, 0x40 | (rex & 0x0d));
    unsigned stop = modrm ? zi->raw.modrm.offset : zi->length;
    while (at < stop)
        emit(b, bytes[at++]);
    if (modrm)
        emit_tail(b);
}

/* Sets bit `shift` and up of an inverted register extension. */
static unsigned with_extension(unsigned byte, unsigned bit, unsigned host)
{
    return (byte & ~(1u << bit)) | (~host >> 3 & 1) << bit;
}

bool native_w_is_width(ZydisMnemonic mnemonic)
{
    switch (mnemonic) {
    case ZYDIS_MNEMONIC_VMOVD:
    case ZYDIS_MNEMONIC_VPEXTRD:
    case ZYDIS_MNEMONIC_VPINSRD:
    case ZYDIS_MNEMONIC_VCVTSI2SD:
    case ZYDIS_MNEMONIC_VCVTSI2SH:
    case ZYDIS_MNEMONIC_VCVTSI2SS:
    case ZYDIS_MNEMONIC_VCVTUSI2SD:
    case ZYDIS_MNEMONIC_VCVTUSI2SH:
    case ZYDIS_MNEMONIC_VCVTUSI2SS:
        return true;
    default:
        return false;
    }
}

static unsigned with_vvvv(const struct builder *b, unsigned byte)
{
    if (b->field_vvvv != HOST_NONE)
        byte = (byte & ~0x78u) | (~b->field_vvvv & 15u) << 3;
    else if (b->d->code_bits != 64)
        byte |= 0x40; /* bit 3 of the register number is ignored */
    if (b->d->code_bits != 64 && (b->gpr_operand || native_w_is_width(b->d->zi.mnemonic)))
        byte &= 0x7f;
    return byte;
}

/* First payload byte: R X B, and for EVEX R' in bit 4. */
static unsigned with_registers(const struct builder *b, unsigned byte, bool evex)
{
    if (b->d->code_bits != 64)
        byte |= evex ? 0xf0 : 0xe0;
    if (b->field_reg != HOST_NONE)
        byte = with_extension(byte, 7, b->field_reg) | (evex ? 0x10 : 0);
    if (b->field_rm != HOST_NONE)
        byte = with_extension(byte, 5, b->field_rm) | 0x40;
    if (b->memory && b->memory->encoding != ZYDIS_OPERAND_ENCODING_NONE)
        byte = with_extension(byte, 5, b->pointer) | 0x40;
    return byte;
}

static bool emit_extended(struct builder *b)
{
    const ZydisDecodedInstruction *zi = &b->d->zi;
    bool evex = zi->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
    unsigned at = zi->encoding == ZYDIS_INSTRUCTION_ENCODING_XOP ? zi->raw.xop.offset : evex ? zi->raw.evex.offset : zi->raw.vex.offset;
    const uint8_t *p = b->d->bytes + at;
    unsigned payload, second;

    if (p[0] == 0xc5) {
        payload = (p[1] & 0x80) | 0x60 | 1;
        second = p[1] & 0x7f;
        emit(b, 0xc4);
        at += 2;
    } else {
        payload = p[1];
        second = p[2];
        emit(b, p[0]);
        at += 3;
    }
    if (evex) {
        payload &= 0xf7;
        second |= 4;
    }
    emit(b, with_registers(b, payload, evex));
    emit(b, with_vvvv(b, second));
    if (evex) {
        emit(b, p[3] | (b->d->code_bits != 64 ? 8 : 0));
        at++;
    }
    emit(b, b->d->bytes[at++]); /* opcode */
    if (!(zi->attributes & ZYDIS_ATTRIB_HAS_MODRM))
        return at == zi->length; /* VZEROUPPER, VZEROALL */
    if (zi->raw.modrm.offset != at)
        return false;
    emit_tail(b);
    return true;
}

/* ---- around it ---- */

static void emit_prologue(struct builder *b)
{
    /* Arrive: context in RDI, pointer in RSI. */
    if (b->memory && b->pointer == 7) {
        emit_move(b, b->context, 7);
        emit_move(b, 7, 6);
    } else {
        if (b->memory && b->pointer != 6)
            emit_move(b, b->pointer, 6);
        if (b->context != 7)
            emit_move(b, b->context, 7);
    }
    if (b->reads_flags) {
        emit_context(b, false, 0x8b, 0, offsetof(struct icpu, oszapc));
        emit(b, 0x04), emit(b, 0x7f); /* add al, 0x7f: OF = AL */
        emit(b, 0x9e);                /* sahf */
    }
    for (unsigned n = 0; n < b->bindings; n++) {
        uint32_t offset = (uint32_t)offsetof(struct icpu, v.cpu.gpr) + b->binding[n].guest;
        bool high = b->binding[n].guest % 8;
        emit_context(b, !high, high ? 0x0fb6 : 0x8b, b->binding[n].host, offset);
    }
}

static void emit_epilogue(struct builder *b)
{
    for (unsigned n = 0; n < b->bindings; n++)
        if (b->binding[n].written)
            emit_context(b, true, 0x89, b->binding[n].host,
                         (uint32_t)offsetof(struct icpu, v.cpu.gpr) + b->binding[n].guest);
    if (b->writes_flags) {
        static const uint8_t capture[] = {
            0x9f,             /* lahf */
            0x0f, 0x90, 0xc0, /* seto al */
            0x0f, 0xb7, 0xc0, /* movzx eax, ax */
        };
        for (unsigned n = 0; n < sizeof(capture); n++)
            emit(b, capture[n]);
        emit_context(b, false, 0x89, 0, offsetof(struct icpu, oszapc));
    }
    emit(b, 0x31), emit(b, 0xc0); /* xor eax, eax */
    emit(b, 0xc3);
}

/*
 * Reads the rewritten instruction as the processor will: it must be the guest's, with the memory operand of the size that the guest's has, at [pointer].
 * The handlers' bounds checks rest on this.
 */
static bool is_faithful(const struct builder *b, unsigned start)
{
    ZydisDecoder decoder;
    ZydisDecodedInstruction zi;
    ZydisDecodedOperand op[ZYDIS_MAX_OPERAND_COUNT];
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    unsigned length = b->out->length - start;
    if (b->out->length > STUB_BYTES_MAX || !ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, b->out->bytes + start, length, &zi, op)) ||
        zi.length != length || zi.mnemonic != b->d->zi.mnemonic)
        return false;
    bool found = false;
    for (unsigned n = 0; n < zi.operand_count; n++) {
        if (op[n].type != ZYDIS_OPERAND_TYPE_MEMORY)
            continue;
        bool here = b->memory && op[n].size == b->memory->size && (int)op[n].mem.base == ZYDIS_REGISTER_RAX + b->pointer &&
                    op[n].mem.index == ZYDIS_REGISTER_NONE && !op[n].mem.disp.value && op[n].mem.segment == ZYDIS_REGISTER_DS;
        if (found || !here)
            return false;
        found = true;
    }
    return found == (b->memory != NULL);
}

bool native_stub_build(const struct decode *d, int memory, struct stub_code *out)
{
    struct builder b = {
        .d = d, .memory = memory < 0 ? NULL : &d->op[memory], .out = out,
        .field_reg = HOST_NONE, .field_rm = HOST_NONE, .field_vvvv = HOST_NONE,
        .pointer = HOST_NONE,
    };
    const ZydisAccessedFlags *flags = d->zi.cpu_flags;
    if (flags) {
        uint32_t defined = flags->modified | flags->set_0 | flags->set_1;
        b.writes_flags = (defined | flags->undefined) & RFLAGS_OSZAPC;
        b.reads_flags = flags->tested & RFLAGS_OSZAPC || (b.writes_flags && (defined & RFLAGS_OSZAPC) != RFLAGS_OSZAPC);
    }
    /* The rewritten ModRM byte says "memory" exactly when the original does. */
    bool addresses = d->zi.attributes & ZYDIS_ATTRIB_HAS_MODRM && d->zi.raw.modrm.mod != 3;
    if (addresses != (b.memory && b.memory->encoding != ZYDIS_OPERAND_ENCODING_NONE))
        return false;
    out->length = 0;
    if (!assign(&b))
        return false;
    emit_prologue(&b);
    unsigned start = out->length;
    if (d->zi.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY)
        emit_legacy(&b);
    else if (!emit_extended(&b))
        return false;
    if (!is_faithful(&b, start))
        return false;
    emit_epilogue(&b);
    return out->length <= STUB_BYTES_MAX;
}
