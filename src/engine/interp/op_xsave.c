/*
 * Saving and restoring x87/SSE/AVX state: FXSAVE, XSAVE and XRSTOR families. (FNSAVE and its kind are in op_x87_env.c.)
 *
 * They work on the guest's image v.cpu.xsave, which registers that are live are saved to before and loaded from after, and copy between it and guest memory under the guest's XCR0 and requested
 * mask. All of memory is read, or probed for writing, before anything changes. Outside 64-bit mode registers 8 and up do not take part. The image keeps x87 pointers in
 * the 64-bit form; FCS and FDS read as zero. What is written is described by a list of pieces, as what is read.
 * SDM vol. 1, 10.5 and 13.4 to 13.11.
 * Threading: the vCPU's thread.
 */
#include <string.h>

#include "engine/interp/native_priv.h"

#define EXTRA_WIDE 1u    /* the 64-bit form of instruction and data pointers */
#define EXTRA_COMPACT 2u /* XSAVEC is offered to the guest, so XRSTOR takes its form */

/* CPUID.(EAX=0DH,ECX=1):EAX */
#define OFFERED_XSAVEOPT 1u
#define OFFERED_XSAVEC 2u

#define PIECES_MAX 12
#define COMPACT (1ull << 63)
#define CHUNK_BYTES 256u /* of mem_read_bytes and mem_write_bytes */
#define LEGACY_MXCSR_BYTES 8

/* `length` bytes at offset `memory` of the area belong at offset `image` of the image. */
struct piece {
    uint16_t memory, image, length;
};

struct pieces {
    struct piece piece[PIECES_MAX];
    unsigned count;
    unsigned extent; /* bytes from the area's start to the last piece's end */
};

static void piece_add(struct pieces *list, unsigned memory, unsigned image, unsigned length)
{
    if (!length || list->count == PIECES_MAX)
        return;
    list->piece[list->count++] = (struct piece){(uint16_t)memory, (uint16_t)image, (uint16_t)length};
    if (memory + length > list->extent)
        list->extent = memory + length;
}

/* Bytes of a component that take part: outside 64-bit mode those of registers 0 to 7. */
static unsigned component_bytes(const struct icpu *c, unsigned n)
{
    const struct native_component *component = &c->native->component[n];
    if (c->code_bits == 64 || n == 5)
        return component->size;
    return n == 7 ? 0 : component->size / 2;
}

static unsigned xmm_bytes(const struct icpu *c)
{
    return c->code_bits == 64 ? 256 : 128;
}

/* Pieces of the components in `wanted`; MXCSR apart. xcomp: of the compacted form, 0 for the standard one. */
static void pieces_of(const struct icpu *c, struct pieces *list, uint64_t wanted, uint64_t xcomp)
{
    const struct native_component *component = c->native->component;
    if (wanted & XCR0_X87) {
        piece_add(list, 0, 0, XSAVE_MXCSR);
        piece_add(list, XSAVE_ST, XSAVE_ST, XSAVE_XMM - XSAVE_ST);
    }
    if (wanted & XCR0_SSE)
        piece_add(list, XSAVE_XMM, XSAVE_XMM, xmm_bytes(c));
    unsigned compact = XSAVE_DATA;
    for (unsigned n = 2; n < XSAVE_COMPONENTS; n++) {
        unsigned offset = component[n].offset;
        if (xcomp) {
            if (!(xcomp >> n & 1))
                continue;
            if (component[n].align64)
                compact = (compact + 63) & ~63u;
            offset = compact;
            compact += component[n].size;
        }
        if (wanted >> n & 1)
            piece_add(list, offset, component[n].offset, component_bytes(c, n));
    }
}

static void pieces_probe_write(struct icpu *c, const struct pieces *list, gva_t gva)
{
    for (unsigned n = 0; n < list->count; n++)
        mem_probe_write(c, c->view, gva + list->piece[n].memory, list->piece[n].length);
}

/* What of [gva, +length) can be moved at once: all that lies in the page, on host memory; else what mem_read_bytes and mem_write_bytes take, *host NULL. */
static unsigned part_find(struct icpu *c, gva_t gva, unsigned length, bool write, void **host)
{
    unsigned left = (unsigned)(PAGE_SIZE_BYTES - (gva & PAGE_MASK_BITS)), part = length < left ? length : left;
    *host = mem_host(c, c->view, gva, part, write);
    if (*host)
        return part;
    return length < CHUNK_BYTES ? length : CHUNK_BYTES;
}

static void piece_write(struct icpu *c, gva_t gva, const uint8_t *from, unsigned length)
{
    void *host;
    for (unsigned done = 0, part; done < length; done += part) {
        part = part_find(c, gva + done, length - done, true, &host);
        if (host) {
            memcpy(host, from + done, part);
            native_stored(c, host, part);
        } else {
            mem_write_bytes(c, c->view, gva + done, from + done, part);
        }
    }
}

static void pieces_write(struct icpu *c, const struct pieces *list, gva_t gva, const uint8_t *image)
{
    for (unsigned n = 0; n < list->count; n++)
        piece_write(c, gva + list->piece[n].memory, image + list->piece[n].image, list->piece[n].length);
}

static void piece_read(struct icpu *c, gva_t gva, uint8_t *to, unsigned length)
{
    void *host;
    for (unsigned done = 0, part; done < length; done += part) {
        part = part_find(c, gva + done, length - done, false, &host);
        if (host)
            memcpy(to + done, host, part);
        else
            mem_read_bytes(c, c->view, gva + done, to + done, part);
    }
}

static void pieces_read(struct icpu *c, const struct pieces *list, gva_t gva, uint8_t *image)
{
    for (unsigned n = 0; n < list->count; n++)
        piece_read(c, gva + list->piece[n].memory, image + list->piece[n].image, list->piece[n].length);
}

static void pieces_copy(const struct pieces *list, uint8_t *to, const uint8_t *from)
{
    for (unsigned n = 0; n < list->count; n++)
        memcpy(to + list->piece[n].image, from + list->piece[n].image, list->piece[n].length);
}

/* ---- x87 and MXCSR ---- */

/* Bytes 0 to 31 as the guest sees them. */
static void legacy_header(const struct icpu *c, bool wide, uint8_t out[32])
{
    memcpy(out, c->v.cpu.xsave, 32);
    out[5] = 0;
    if (c->amd && !(get16(out + XSAVE_FSW) & FSW_ES)) { /* AMD's have pointers for who handles an exception (APM vol. 2, 11.4.4) */
        put16(out + XSAVE_FOP, 0);
        put64(out + XSAVE_FIP, 0);
        put64(out + XSAVE_FDP, 0);
    }
    if (!wide) { /* 32-bit offsets, selectors deprecated */
        put32(out + XSAVE_FIP + 4, 0);
        put32(out + XSAVE_FDP + 4, 0);
    }
    put32(out + XSAVE_MXCSR_MASK, c->native->mxcsr_mask);
}

/* What was read from memory, as the image keeps it. */
static void x87_normalize(uint8_t *image, bool wide)
{
    uint16_t fcw = get16(image + XSAVE_FCW), fsw = get16(image + XSAVE_FSW);
    fcw = (uint16_t)((fcw & 0x1f3f) | 0x40);
    put16(image + XSAVE_FCW, fcw);
    put16(image + XSAVE_FSW, native_fsw_summary(fsw, fcw));
    image[5] = 0;
    put16(image + XSAVE_FOP, get16(image + XSAVE_FOP) & 0x7ff);
    if (!wide) {
        put32(image + XSAVE_FIP + 4, 0);
        put32(image + XSAVE_FDP + 4, 0);
    }
}

static void mxcsr_check(struct icpu *c, uint32_t mxcsr)
{
    if (mxcsr & ~c->native->mxcsr_mask)
        raise_gp0(c);
}

/* The manual has no order for these faults; processors look at the address of the first byte, then at its alignment, then at the rest. */
static void area_check(struct icpu *c, const struct insn *i, gva_t gva, unsigned alignment)
{
    if (!gva_is_canonical(gva))
        raise_error(c, i->segment == SEG_SS ? VECTOR_SS : VECTOR_GP, 0);
    if (gva & (alignment - 1))
        raise_gp0(c);
}

/* ---- FXSAVE, FXRSTOR ---- */

static gva_t fx_address(struct icpu *c, const struct insn *i, bool write)
{
    if (c->v.cpu.cr0 & (CR0_EM | CR0_TS))
        raise_fault(c, VECTOR_NM);
    gva_t gva = ea_linear(c, i, IMAGE_BYTES, write);
    area_check(c, i, gva, 16);
    return gva;
}

static void op_fxsave(struct icpu *c, const struct insn *i)
{
    gva_t gva = fx_address(c, i, true);
    uint8_t header[32];
    native_state_snapshot(c);
    native_state_materialize(c, XCR0_X87 | XCR0_SSE);
    legacy_header(c, i->extra & EXTRA_WIDE, header);
    struct pieces list = {.count = 0};
    piece_add(&list, XSAVE_ST, XSAVE_ST, XSAVE_XMM - XSAVE_ST + xmm_bytes(c));
    mem_probe_write(c, c->view, gva, XSAVE_XMM + xmm_bytes(c));
    mem_write_bytes(c, c->view, gva, header, sizeof(header));
    pieces_write(c, &list, gva, c->v.cpu.xsave);
}

static void op_fxrstor(struct icpu *c, const struct insn *i)
{
    gva_t gva = fx_address(c, i, false);
    uint8_t image[IMAGE_BYTES];
    struct pieces list = {.count = 0};
    piece_add(&list, 0, 0, XSAVE_MXCSR_MASK);
    piece_add(&list, XSAVE_ST, XSAVE_ST, XSAVE_XMM - XSAVE_ST + xmm_bytes(c));
    native_state_snapshot(c);
    pieces_read(c, &list, gva, image);
    mxcsr_check(c, get32(image + XSAVE_MXCSR));
    x87_normalize(image, i->extra & EXTRA_WIDE);
    native_state_materialize(c, XCR0_X87 | XCR0_SSE);
    pieces_copy(&list, c->v.cpu.xsave, image);
    native_state_reload(c);
}

/* ---- XSAVE ---- */

static gva_t xsave_address(struct icpu *c, const struct insn *i, bool write)
{
    if (!(c->v.cpu.cr4 & CR4_OSXSAVE))
        raise_fault(c, VECTOR_UD);
    if (c->v.cpu.cr0 & CR0_TS)
        raise_fault(c, VECTOR_NM);
    gva_t gva = ea_linear(c, i, XSAVE_DATA, write);
    area_check(c, i, gva, 64);
    return gva;
}

/* Requested-feature bitmap. */
static uint64_t requested(const struct icpu *c)
{
    uint64_t mask = (c->v.cpu.gpr[GPR_RDX] << 32) | (uint32_t)c->v.cpu.gpr[GPR_RAX];
    return mask & c->v.cpu.xcr0 & (c->native->xsave_mask | XCR0_X87 | XCR0_SSE);
}

static void write_legacy_header(struct icpu *c, const struct insn *i, gva_t gva, bool x87, bool mxcsr)
{
    uint8_t header[32];
    legacy_header(c, i->extra & EXTRA_WIDE, header);
    if (x87)
        mem_write_bytes(c, c->view, gva, header, XSAVE_MXCSR);
    if (mxcsr)
        mem_write_bytes(c, c->view, gva + XSAVE_MXCSR, header + XSAVE_MXCSR, LEGACY_MXCSR_BYTES);
}

/* saved: components written; header: the first `header_bytes` of the XSAVE header. */
static void xsave_write(struct icpu *c, const struct insn *i, gva_t gva, uint64_t saved, bool mxcsr, const uint64_t header[2],
                        uint64_t xcomp)
{
    struct pieces list = {.count = 0};
    unsigned header_bytes = xcomp ? 16 : 8;
    bool x87 = saved & XCR0_X87;
    native_state_materialize(c, saved);
    pieces_of(c, &list, saved & ~XCR0_X87, xcomp);
    if (x87)
        piece_add(&list, XSAVE_ST, XSAVE_ST, XSAVE_XMM - XSAVE_ST);
    if (list.extent > XSAVE_DATA)
        ea_linear(c, i, list.extent, true); /* the segment's limit */
    mem_probe_write(c, c->view, gva, XSAVE_XMM);
    mem_probe_write(c, c->view, gva + XSAVE_BV, header_bytes);
    pieces_probe_write(c, &list, gva);
    write_legacy_header(c, i, gva, x87, mxcsr);
    mem_write_bytes(c, c->view, gva + XSAVE_BV, header, header_bytes);
    pieces_write(c, &list, gva, c->v.cpu.xsave);
}

static void xsave_standard(struct icpu *c, const struct insn *i, bool optimized)
{
    gva_t gva = xsave_address(c, i, true);
    uint64_t wanted = requested(c), old;
    native_state_snapshot(c);
    mem_probe_write(c, c->view, gva + XSAVE_BV, sizeof(old)); /* its faults are a write's */
    mem_read_bytes(c, c->view, gva + XSAVE_BV, &old, sizeof(old));
    uint64_t used = native_state_in_use(c); /* before materialize makes everything look used */
    uint64_t header[2] = {(old & ~wanted) | (wanted & used), 0};
    xsave_write(c, i, gva, optimized ? wanted & used : wanted, wanted & (XCR0_SSE | XCR0_AVX), header, 0);
}

static void op_xsave(struct icpu *c, const struct insn *i)
{
    xsave_standard(c, i, false);
}

static void op_xsaveopt(struct icpu *c, const struct insn *i)
{
    xsave_standard(c, i, true);
}

static void op_xsavec(struct icpu *c, const struct insn *i)
{
    gva_t gva = xsave_address(c, i, true);
    uint64_t wanted = requested(c);
    native_state_snapshot(c);
    uint64_t used = native_state_in_use(c);
    if (get32(c->v.cpu.xsave + XSAVE_MXCSR) != MXCSR_DEFAULT)
        used |= XCR0_SSE;
    uint64_t header[2] = {wanted & used, wanted | COMPACT};
    xsave_write(c, i, gva, wanted & used, wanted & used & XCR0_SSE, header, header[1]);
}

/* ---- XRSTOR ---- */

/* #GP for everything in the header that must be zero (SDM vol. 1, 13.8). Returns XCOMP_BV. */
static uint64_t header_check(struct icpu *c, const uint64_t header[8], bool compact_offered)
{
    uint64_t bv = header[0], xcomp = header[1], xcr0 = c->v.cpu.xcr0, rest = header[2];
    bool bad;
    if (xcomp & COMPACT) {
        for (unsigned n = 3; n < 8; n++)
            rest |= header[n];
        bad = !compact_offered || (xcomp & ~COMPACT & ~xcr0) || (bv & ~(xcomp & ~COMPACT));
    } else {
        bad = xcomp || (bv & ~xcr0);
    }
    if (bad || rest)
        raise_gp0(c);
    return xcomp;
}

/* Puts components into their initial state. */
static void components_initialize(struct icpu *c, uint64_t components)
{
    uint8_t *image = c->v.cpu.xsave;
    if (c->code_bits != 64) {
        /* Registers 8 and up keep what they have. */
        uint64_t partial = components & ~(XCR0_X87 | XCR0_OPMASK);
        struct pieces list = {.count = 0};
        native_state_materialize(c, partial);
        pieces_of(c, &list, partial, 0);
        for (unsigned n = 0; n < list.count; n++)
            memset(image + list.piece[n].image, 0, list.piece[n].length);
        components &= ~partial;
    }
    put64(image + XSAVE_BV, get64(image + XSAVE_BV) & ~components);
}

static void op_xrstor(struct icpu *c, const struct insn *i)
{
    gva_t gva = xsave_address(c, i, false);
    _Alignas(64) uint8_t image[CPU_XSAVE_BYTES];
    uint64_t header[8], wanted = requested(c);
    bool whole = wanted == c->v.cpu.xcr0 && wanted & XCR0_SSE && c->code_bits == 64; /* nothing of the old state stays, nor of MXCSR */
    if (!whole)
        native_state_snapshot(c);
    mem_read_bytes(c, c->view, gva + XSAVE_BV, header, sizeof(header));
    uint64_t xcomp = header_check(c, header, i->extra & EXTRA_COMPACT);
    uint64_t loaded = wanted & header[0];

    /* MXCSR belongs to SSE in the compacted form, and to SSE and AVX whatever XSTATE_BV says in the standard one. */
    struct pieces list = {.count = 0};
    uint32_t mxcsr = xcomp && wanted & XCR0_SSE ? MXCSR_DEFAULT : get32(c->v.cpu.xsave + XSAVE_MXCSR);
    bool mxcsr_loaded = xcomp ? loaded & XCR0_SSE : wanted & (XCR0_SSE | XCR0_AVX);
    pieces_of(c, &list, loaded, xcomp);
    if (list.extent > XSAVE_DATA)
        ea_linear(c, i, list.extent, false);
    pieces_read(c, &list, gva, image);
    if (mxcsr_loaded) {
        mem_read_bytes(c, c->view, gva + XSAVE_MXCSR, &mxcsr, sizeof(mxcsr));
        mxcsr_check(c, mxcsr);
    }

    if (loaded & XCR0_X87)
        x87_normalize(image, i->extra & EXTRA_WIDE);
    if (whole) {
        put64(c->v.cpu.xsave + XSAVE_BV, loaded);
    } else {
        components_initialize(c, wanted & ~loaded);
        native_state_materialize(c, loaded);
    }
    pieces_copy(&list, c->v.cpu.xsave, image);
    put32(c->v.cpu.xsave + XSAVE_MXCSR, mxcsr);
    native_state_reload(c);
}

/* ---- selection ---- */

bool op_xsave_select(struct icpu *c, const struct decode *d, struct insn *i)
{
    static const struct {
        uint16_t mnemonic;
        uint8_t extra;
        uint8_t needs; /* OFFERED_* */
        insn_fn *fn;
    } table[] = {
        {ZYDIS_MNEMONIC_FXSAVE, 0, 0, op_fxsave},
        {ZYDIS_MNEMONIC_FXSAVE64, EXTRA_WIDE, 0, op_fxsave},
        {ZYDIS_MNEMONIC_FXRSTOR, 0, 0, op_fxrstor},
        {ZYDIS_MNEMONIC_FXRSTOR64, EXTRA_WIDE, 0, op_fxrstor},
        {ZYDIS_MNEMONIC_XSAVE, 0, 0, op_xsave},
        {ZYDIS_MNEMONIC_XSAVE64, EXTRA_WIDE, 0, op_xsave},
        {ZYDIS_MNEMONIC_XSAVEOPT, 0, OFFERED_XSAVEOPT, op_xsaveopt},
        {ZYDIS_MNEMONIC_XSAVEOPT64, EXTRA_WIDE, OFFERED_XSAVEOPT, op_xsaveopt},
        {ZYDIS_MNEMONIC_XSAVEC, 0, OFFERED_XSAVEC, op_xsavec},
        {ZYDIS_MNEMONIC_XSAVEC64, EXTRA_WIDE, OFFERED_XSAVEC, op_xsavec},
        {ZYDIS_MNEMONIC_XRSTOR, 0, 0, op_xrstor},
        {ZYDIS_MNEMONIC_XRSTOR64, EXTRA_WIDE, 0, op_xrstor},
    };
    for (unsigned n = 0; n < sizeof(table) / sizeof(table[0]); n++) {
        if (table[n].mnemonic != d->zi.mnemonic)
            continue;
        uint32_t offered = cpuid_query(c->v.cpuid, &c->v.cpu, c->v.index, 0xd, 1).eax;
        if (table[n].needs & ~offered)
            return false;
        i->fn = table[n].fn;
        i->extra = table[n].extra | (offered & OFFERED_XSAVEC ? EXTRA_COMPACT : 0);
        return true;
    }
    return x87_environment_select(d, i);
}
