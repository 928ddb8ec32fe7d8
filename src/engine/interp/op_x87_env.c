/*
 * The x87 environment in memory: FNSTENV, FLDENV, FNSAVE, FRSTOR; and FWAIT.
 *
 * They work on the guest's image v.cpu.xsave, where tags are abridged to one bit a register and registers lie in stack order, so that a change of TOP rotates them.
 * Layouts: SDM vol. 1, figures 8-9 to 8-12. FCS and FDS read as zero.
 * Threading: the vCPU's thread.
 */
#include <string.h>

#include "engine/interp/native_priv.h"

#define FSW_B 0x8000u
#define FSW_EXCEPTIONS 0x3fu
#define FSW_TOP(fsw) ((fsw) >> 11 & 7)

#define EXTRA_SHORT 1u /* 16-bit layout */
#define EXTRA_REGISTERS 2u /* FNSAVE, FRSTOR: the stack follows */

#define ENVIRONMENT_MAX 28
#define STACK_BYTES 80

uint16_t native_fsw_summary(uint16_t fsw, uint16_t fcw)
{
    fsw &= (uint16_t)~(FSW_ES | FSW_B);
    return fsw & ~fcw & FSW_EXCEPTIONS ? fsw | FSW_ES | FSW_B : fsw;
}

static bool real_layout(const struct icpu *c)
{
    return !(c->v.cpu.cr0 & CR0_PE) || c->v.cpu.rflags & RFLAGS_VM;
}

static unsigned environment_bytes(const struct insn *i)
{
    return i->extra & EXTRA_SHORT ? 14 : 28;
}

static unsigned environment_alignment(const struct insn *i)
{
    return i->extra & EXTRA_SHORT ? 2 : 4;
}

/* ---- tags and stack order ---- */

/* 0 valid, 1 zero, 2 special (SDM vol. 1, 8.1.7). */
static unsigned tag_of(const uint8_t *st)
{
    uint64_t significand = get64(st);
    unsigned exponent = get16(st + 8) & 0x7fff;
    if (!exponent && !significand)
        return 1;
    return !exponent || exponent == 0x7fff || !(significand >> 63) ? 2 : 0;
}

static uint16_t tags_expand(const uint8_t *image)
{
    unsigned top = FSW_TOP(get16(image + XSAVE_FSW)), tags = 0;
    for (unsigned n = 0; n < 8; n++) {
        bool used = image[XSAVE_FTW] >> n & 1;
        tags |= (used ? tag_of(image + XSAVE_ST + ((n - top) & 7) * 16) : 3u) << 2 * n;
    }
    return (uint16_t)tags;
}

static uint8_t tags_abridge(uint16_t tags)
{
    unsigned used = 0;
    for (unsigned n = 0; n < 8; n++)
        used |= (unsigned)((tags >> 2 * n & 3) != 3) << n;
    return (uint8_t)used;
}

static void top_set(uint8_t *image, unsigned from, unsigned to)
{
    uint8_t old[128];
    memcpy(old, image + XSAVE_ST, sizeof(old));
    for (unsigned n = 0; n < 8; n++)
        memcpy(image + XSAVE_ST + n * 16, old + ((n + to - from) & 7) * 16, 16);
}

/* ---- the environment's layouts ---- */

static void environment_build(const struct icpu *c, const struct insn *i, uint8_t *out)
{
    const uint8_t *image = c->v.cpu.xsave;
    uint16_t words[3] = {get16(image + XSAVE_FCW), get16(image + XSAVE_FSW), tags_expand(image)};
    uint32_t fip = get32(image + XSAVE_FIP), fdp = get32(image + XSAVE_FDP);
    uint16_t fop = get16(image + XSAVE_FOP) & 0x7ff;
    bool real = real_layout(c);
    if (i->extra & EXTRA_SHORT) {
        for (unsigned n = 0; n < 3; n++)
            put16(out + n * 2, words[n]);
        put16(out + 6, (uint16_t)fip);
        put16(out + 8, real ? (uint16_t)(fop | (fip >> 16 & 0xf) << 12) : 0);
        put16(out + 10, (uint16_t)fdp);
        put16(out + 12, real ? (uint16_t)((fdp >> 16 & 0xf) << 12) : 0);
        return;
    }
    for (unsigned n = 0; n < 3; n++)
        put32(out + n * 4, 0xffff0000u | words[n]);
    put32(out + 12, real ? 0xffff0000u | (fip & 0xffff) : fip);
    put32(out + 16, real ? fop | (fip >> 16) << 12 : (uint32_t)fop << 16);
    put32(out + 20, real ? 0xffff0000u | (fdp & 0xffff) : fdp);
    put32(out + 24, real ? (fdp >> 16) << 12 : 0xffff0000u);
}

static void environment_apply(struct icpu *c, const struct insn *i, const uint8_t *in, bool rotate)
{
    uint8_t *image = c->v.cpu.xsave;
    bool real = real_layout(c), small = i->extra & EXTRA_SHORT;
    unsigned step = small ? 2 : 4, old_top = FSW_TOP(get16(image + XSAVE_FSW));
    uint16_t fcw = (uint16_t)((get16(in) & 0x1f3f) | 0x40);
    uint16_t fsw = native_fsw_summary(get16(in + step), fcw);
    uint32_t fip, fdp;
    uint16_t fop;
    if (small) {
        fip = get16(in + 6) | (real ? (uint32_t)(get16(in + 8) & 0xf000) << 4 : 0);
        fdp = get16(in + 10) | (real ? (uint32_t)(get16(in + 12) & 0xf000) << 4 : 0);
        fop = real ? get16(in + 8) & 0x7ff : 0;
    } else if (real) {
        fip = get16(in + 12) | (get32(in + 16) >> 12 & 0xffff) << 16;
        fdp = get16(in + 20) | (get32(in + 24) >> 12 & 0xffff) << 16;
        fop = get16(in + 16) & 0x7ff;
    } else {
        fip = get32(in + 12);
        fdp = get32(in + 20);
        fop = get16(in + 18) & 0x7ff;
    }
    if (rotate)
        top_set(image, old_top, FSW_TOP(fsw));
    put16(image + XSAVE_FCW, fcw);
    put16(image + XSAVE_FSW, fsw);
    put16(image + XSAVE_FTW, tags_abridge(get16(in + 2 * step)));
    put16(image + XSAVE_FOP, fop);
    put64(image + XSAVE_FIP, fip);
    put64(image + XSAVE_FDP, fdp);
}

/* ---- the instructions ---- */

static void check_available(struct icpu *c)
{
    if (c->v.cpu.cr0 & (CR0_EM | CR0_TS))
        raise_fault(c, VECTOR_NM);
}

/* An unmasked exception that waits for the next waiting instruction. */
static void check_pending(struct icpu *c)
{
    const uint8_t *image = c->v.cpu.xsave;
    uint16_t fsw = get64(image + XSAVE_BV) & XCR0_X87 ? get16(image + XSAVE_FSW) : 0;
    if (c->simd_live)
        __asm__ volatile("fnstsw %0" : "=a"(fsw));
    if (fsw & FSW_ES) {
        simd_save(c);
        raise_fault(c, VECTOR_MF);
    }
}

static void op_fwait(struct icpu *c, const struct insn *i)
{
    if ((c->v.cpu.cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        raise_fault(c, VECTOR_NM);
    check_pending(c);
}

static void x87_initialize(uint8_t *image)
{
    top_set(image, FSW_TOP(get16(image + XSAVE_FSW)), 0);
    memset(image, 0, XSAVE_MXCSR);
    put16(image + XSAVE_FCW, FCW_DEFAULT);
}

/* FNSTENV masks all exceptions afterwards, FNSAVE initialises. */
static void op_x87_store(struct icpu *c, const struct insn *i)
{
    check_available(c);
    bool registers = i->extra & EXTRA_REGISTERS;
    unsigned environment = environment_bytes(i), size = environment + (registers ? STACK_BYTES : 0);
    uint8_t out[ENVIRONMENT_MAX + STACK_BYTES], *image = c->v.cpu.xsave;
    gva_t gva = ea_linear(c, i, size, true);
    mem_check_alignment(c, c->view, gva, environment_alignment(i));
    simd_save(c);
    native_state_materialize(c, XCR0_X87);
    environment_build(c, i, out);
    for (unsigned n = 0; registers && n < 8; n++)
        memcpy(out + environment + n * 10, image + XSAVE_ST + n * 16, 10);
    mem_probe_write(c, c->view, gva, size);
    mem_write_bytes(c, c->view, gva, out, size);
    if (registers) {
        x87_initialize(image);
        return;
    }
    uint16_t fcw = get16(image + XSAVE_FCW) | FSW_EXCEPTIONS;
    put16(image + XSAVE_FCW, fcw);
    put16(image + XSAVE_FSW, native_fsw_summary(get16(image + XSAVE_FSW), fcw));
}

static void op_x87_load(struct icpu *c, const struct insn *i)
{
    check_available(c);
    check_pending(c);
    bool registers = i->extra & EXTRA_REGISTERS;
    unsigned environment = environment_bytes(i), size = environment + (registers ? STACK_BYTES : 0);
    uint8_t in[ENVIRONMENT_MAX + STACK_BYTES], *image = c->v.cpu.xsave;
    gva_t gva = ea_linear(c, i, size, false);
    mem_check_alignment(c, c->view, gva, environment_alignment(i));
    simd_save(c);
    mem_read_bytes(c, c->view, gva, in, size);
    native_state_materialize(c, XCR0_X87);
    environment_apply(c, i, in, !registers);
    for (unsigned n = 0; registers && n < 8; n++) {
        memcpy(image + XSAVE_ST + n * 16, in + environment + n * 10, 10);
        memset(image + XSAVE_ST + n * 16 + 10, 0, 6);
    }
}

bool x87_environment_select(const struct decode *d, struct insn *i)
{
    switch (d->zi.mnemonic) {
    case ZYDIS_MNEMONIC_FWAIT:
        i->fn = op_fwait;
        return true;
    case ZYDIS_MNEMONIC_FNSTENV:
        i->fn = op_x87_store;
        break;
    case ZYDIS_MNEMONIC_FNSAVE:
        i->fn = op_x87_store;
        i->extra = EXTRA_REGISTERS;
        break;
    case ZYDIS_MNEMONIC_FLDENV:
        i->fn = op_x87_load;
        break;
    case ZYDIS_MNEMONIC_FRSTOR:
        i->fn = op_x87_load;
        i->extra = EXTRA_REGISTERS;
        break;
    default:
        return false;
    }
    if (d->zi.operand_width == 16)
        i->extra |= EXTRA_SHORT;
    return true;
}
