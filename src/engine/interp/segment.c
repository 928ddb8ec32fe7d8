/*
 * Segment registers, descriptors, limits, and the stacks that gates and events switch to.
 *
 * Invariants: the CPL is SS.DPL in every mode (SS of a null selector keeps its DPL); a segment that is not usable has `unusable` set;
 * a segment register's hidden part changes only after every check has passed.
 * Sources: SDM vol. 3, ch. 3 and 5; vol. 2, MOV, LDS, POP. Threading: as interp_priv.h.
 */
#include "engine/interp/interp_core.h"
#include "engine/interp/system_priv.h"

#include <string.h>

/* ---- descriptors ---- */

gva_t table_address(const struct icpu *c, uint64_t base, uint64_t offset)
{
    return is_long(c) ? base + offset : (uint32_t)(base + offset);
}

static bool table_of(const struct icpu *c, uint16_t selector, uint64_t *base, uint32_t *limit)
{
    const struct cpu_state *s = &c->v.cpu;
    if (selector & SELECTOR_TI) {
        *base = s->ldtr.base;
        *limit = s->ldtr.limit;
        return !s->ldtr.unusable;
    }
    *base = s->gdtr.base;
    *limit = s->gdtr.limit;
    return true;
}

bool descriptor_read(struct icpu *c, uint16_t selector, struct descriptor *d)
{
    uint64_t base;
    uint32_t limit;
    if (!table_of(c, selector, &base, &limit) || (selector | 7u) > limit)
        return false;
    d->selector = selector;
    d->address = table_address(c, base, selector & 0xFFF8u);
    d->low = table_read(c, d->address, 8);
    d->high = 0;
    d->attributes = (uint16_t)(d->low >> 40 & 0xF0FF);
    d->base = (d->low >> 16 & 0xFFFFFF) | (d->low >> 56) << 24;
    d->limit = (uint32_t)((d->low & 0xFFFF) | (d->low >> 32 & 0xF0000));
    if (d->attributes & SEG_ATTR_G)
        d->limit = d->limit << 12 | 0xFFF;
    return true;
}

bool descriptor_extend(struct icpu *c, struct descriptor *d)
{
    uint64_t base;
    uint32_t limit;
    if (!table_of(c, d->selector, &base, &limit) || (d->selector & 0xFFF8u) + 15 > limit)
        return false;
    d->high = table_read(c, table_address(c, d->address, 8), 8);
    if (d->high >> 40 & 0x1F)
        return false;
    d->base |= d->high << 32;
    d->high &= 0xFFFFFFFF;
    return true;
}

/* Descriptors are shared with other processors: the access byte is changed with a locked operation where it is RAM. */
static void access_byte_update(struct icpu *c, const struct descriptor *d, uint8_t set, uint8_t clear)
{
    gva_t address = table_address(c, d->address, 5);
    uint8_t *host = mem_host(c, VIEW_SUPERVISOR, address, 1, true);
    if (host) {
        if (set)
            __atomic_fetch_or(host, set, __ATOMIC_SEQ_CST);
        if (clear)
            __atomic_fetch_and(host, (uint8_t)~clear, __ATOMIC_SEQ_CST);
    } else {
        uint64_t byte = table_read(c, address, 1);
        mem_write_slow(c, VIEW_SUPERVISOR, address, 1, (byte | set) & (uint8_t)~clear);
    }
}

void descriptor_set_accessed(struct icpu *c, struct descriptor *d)
{
    if (d->attributes & SEG_ATTR_ACCESSED)
        return;
    access_byte_update(c, d, SEG_ATTR_ACCESSED, 0);
    d->attributes |= SEG_ATTR_ACCESSED;
}

void descriptor_set_busy(struct icpu *c, struct descriptor *d, bool busy)
{
    access_byte_update(c, d, busy ? SYSTEM_BUSY : 0, busy ? 0 : SYSTEM_BUSY);
    d->attributes = (uint16_t)(busy ? d->attributes | SYSTEM_BUSY : d->attributes & ~SYSTEM_BUSY);
}

struct segment descriptor_segment(const struct descriptor *d, uint16_t selector)
{
    return (struct segment){
        .base = d->base, .limit = d->limit, .selector = selector, .attributes = d->attributes};
}

struct segment segment_null(uint16_t selector, unsigned dpl)
{
    return (struct segment){.selector = selector, .attributes = (uint16_t)(dpl << 5), .unusable = true};
}

/* Real mode keeps limit and size of what protected mode had loaded ("unreal mode"); virtual-8086 mode does not. */
struct segment segment_real(const struct icpu *c, unsigned segment, uint16_t selector)
{
    const struct segment *old = &c->v.cpu.seg[segment];
    struct segment s = {.base = (uint64_t)selector << 4, .limit = 0xFFFF, .selector = selector};
    s.attributes = SEG_ATTR_P | SEG_ATTR_S | SEG_ATTR_RW | SEG_ATTR_ACCESSED;
    if (c->v.cpu.rflags & RFLAGS_VM) {
        s.attributes |= 3 << 5;
    } else if (!old->unusable) {
        s.limit = old->limit;
        s.attributes |= old->attributes & (SEG_ATTR_DB | SEG_ATTR_G);
    }
    return s;
}

bool segment_contains(const struct segment *s, uint64_t offset, uint64_t size)
{
    uint64_t last = offset + size - 1;
    if ((s->attributes & (SEG_ATTR_CODE | SEG_ATTR_DC)) == SEG_ATTR_DC)
        return offset > s->limit && last <= (s->attributes & SEG_ATTR_DB ? 0xFFFFFFFFull : 0xFFFFull);
    return last <= s->limit || s->limit == 0xFFFFFFFF; /* 4 GiB: there is no end to exceed, accesses wrap to offset 0 */
}

gva_t segment_linear(struct icpu *c, unsigned segment, uint64_t offset, unsigned size, bool write)
{
    const struct segment *s = &c->v.cpu.seg[segment];
    bool allowed = !s->unusable && segment_contains(s, offset, size);
    if (allowed && is_protected(c)) {
        bool code = s->attributes & SEG_ATTR_CODE, rw = s->attributes & SEG_ATTR_RW;
        allowed = write ? !code && rw : !code || rw;
        /* CS keeps its data type between setting CR0.PE and the first far jump: fetching is fine, so is reading. */
    }
    if (!allowed)
        raise_error(c, segment == SEG_SS ? VECTOR_SS : VECTOR_GP, 0);
    return (uint32_t)(s->base + offset);
}

_Noreturn void branch_fault(struct icpu *c)
{
    raise_gp0(c);
}

void code_offset_check(struct icpu *c, const struct descriptor *d, uint64_t rip, uint32_t error)
{
    bool valid = descriptor_is_64bit(c, d) ? gva_is_canonical(rip) : rip <= d->limit;
    if (!valid)
        raise_error(c, VECTOR_GP, error);
}

/* ---- loading data segment registers ---- */

static void load_ss(struct icpu *c, uint16_t selector)
{
    struct segment *ss = &c->v.cpu.seg[SEG_SS];
    if (SELECTOR_IS_NULL(selector)) {
        if (c->code_bits != 64 || c->cpl == 3 || SELECTOR_RPL(selector) != c->cpl)
            raise_gp0(c);
        *ss = segment_null(selector, c->cpl);
        return;
    }
    struct descriptor d;
    if (!descriptor_read(c, selector, &d) || SELECTOR_RPL(selector) != c->cpl ||
        !descriptor_is_writable_data(&d) || descriptor_dpl(&d) != c->cpl)
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_SS, SELECTOR_ERROR(selector));
    descriptor_set_accessed(c, &d);
    *ss = descriptor_segment(&d, selector);
}

static void load_data(struct icpu *c, unsigned segment, uint16_t selector)
{
    if (SELECTOR_IS_NULL(selector)) {
        c->v.cpu.seg[segment] = segment_null(selector, 0);
        return;
    }
    struct descriptor d;
    if (!descriptor_read(c, selector, &d) || !descriptor_is_readable(&d))
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
    bool conforming = descriptor_is_code(&d) && descriptor_is_conforming(&d);
    if (!conforming && (SELECTOR_RPL(selector) > descriptor_dpl(&d) || c->cpl > descriptor_dpl(&d)))
        raise_error(c, VECTOR_GP, SELECTOR_ERROR(selector));
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_NP, SELECTOR_ERROR(selector));
    descriptor_set_accessed(c, &d);
    c->v.cpu.seg[segment] = descriptor_segment(&d, selector);
}

void segment_load(struct icpu *c, unsigned segment, uint16_t selector)
{
    if (!is_protected(c))
        c->v.cpu.seg[segment] = segment_real(c, segment, selector);
    else if (segment == SEG_SS)
        load_ss(c, selector);
    else
        load_data(c, segment, selector);
    interp_mode_changed(c);
}

void segments_drop_inner(struct icpu *c, unsigned new_cpl)
{
    static const uint8_t data[] = {SEG_ES, SEG_DS, SEG_FS, SEG_GS};
    for (unsigned n = 0; n < sizeof(data); n++) {
        struct segment *s = &c->v.cpu.seg[data[n]];
        bool conforming = (s->attributes & (SEG_ATTR_CODE | SEG_ATTR_DC)) == (SEG_ATTR_CODE | SEG_ATTR_DC);
        if (!s->unusable && !conforming && SEG_ATTR_DPL(s->attributes) < new_cpl)
            *s = segment_null(0, 0);
    }
}

/* ---- stacks ---- */

void frame_init(struct icpu *c, struct frame *f, const struct segment *ss, uint64_t sp, bool flat, unsigned cpl, unsigned size)
{
    f->ss = *ss;
    f->sp = sp;
    f->flat = flat;
    f->mask = flat ? ~0ull : ss->attributes & SEG_ATTR_DB ? 0xFFFFFFFFull : 0xFFFFull;
    f->view = cpl == c->cpl ? c->view : cpl == 3 ? VIEW_USER : VIEW_SUPERVISOR;
    f->size = size;
    f->count = 0;
}

static gva_t frame_linear(struct icpu *c, const struct frame *f, uint64_t offset, unsigned size, uint32_t ss_error)
{
    if (f->flat) {
        if (!gva_is_canonical(offset) || !gva_is_canonical(offset + size - 1))
            raise_error(c, VECTOR_SS, ss_error);
        return offset;
    }
    if (f->ss.unusable || !segment_contains(&f->ss, offset, size))
        raise_error(c, VECTOR_SS, ss_error);
    return (uint32_t)(f->ss.base + offset);
}

/* The stack pointer wraps around inside the frame: item by item, all checked before the first is written. */
static void frame_write_wrapped(struct icpu *c, const struct frame *f, uint32_t ss_error)
{
    gva_t address[FRAME_VALUES];
    for (unsigned n = 0; n < f->count; n++) {
        address[n] = frame_linear(c, f, (f->sp - (n + 1ull) * f->size) & f->mask, f->size, ss_error);
        mem_probe_write(c, f->view, address[n], f->size);
    }
    for (unsigned n = 0; n < f->count; n++)
        mem_write_slow(c, f->view, address[n], f->size, f->values[n]);
}

/* The most frequent one: of 64-bit mode, in one page of RAM. */
static bool frame_write_flat(struct icpu *c, struct frame *f)
{
    unsigned total = 8 * f->count;
    uint64_t low = f->sp - total;
    if (!f->flat || f->size != 8 || (low & 7) || !gva_is_canonical(low))
        return false;
    uint64_t *host = mem_host(c, f->view, low, total, true);
    if (!host)
        return false;
    for (unsigned n = 0; n < f->count; n++)
        host[f->count - 1 - n] = f->values[n];
    block_note_store(c, (uintptr_t)host, total);
    f->sp = low;
    return true;
}

void frame_write(struct icpu *c, struct frame *f, uint32_t ss_error)
{
    unsigned total = f->size * f->count;
    uint64_t low = (f->sp - total) & f->mask;
    if (frame_write_flat(c, f))
        return;
    if (((low + total - 1) & f->mask) >= low) {
        uint8_t image[FRAME_VALUES * 8];
        for (unsigned n = 0; n < f->count; n++)
            memcpy(image + total - (n + 1) * f->size, &f->values[n], f->size);
        gva_t address = frame_linear(c, f, low, total, ss_error);
        mem_check_alignment(c, f->view, address, f->size);
        mem_write_bytes(c, f->view, address, image, total);
    } else {
        frame_write_wrapped(c, f, ss_error);
    }
    /* 16-bit stacks leave the rest of the register as it was. */
    f->sp = f->mask == 0xFFFF ? (f->sp & ~0xFFFFull) | low : low;
}

void tss_inner_stack(struct icpu *c, unsigned cpl, uint32_t ext, struct segment *ss, uint64_t *sp)
{
    const struct segment *tr = &c->v.cpu.tr;
    bool wide = tr->attributes & 8;
    unsigned offset = wide ? 4 + 8 * cpl : 2 + 4 * cpl;
    if (tr->unusable || offset + (wide ? 5 : 3) > tr->limit)
        raise_error(c, VECTOR_TS, SELECTOR_ERROR(tr->selector) | ext);
    *sp = table_read(c, table_address(c, tr->base, offset), wide ? 4 : 2);
    uint16_t selector = (uint16_t)table_read(c, table_address(c, tr->base, offset + (wide ? 4 : 2)), 2);

    struct descriptor d;
    uint32_t error = SELECTOR_ERROR(selector) | ext;
    if (SELECTOR_IS_NULL(selector))
        raise_error(c, VECTOR_TS, ext);
    if (!descriptor_read(c, selector, &d) || SELECTOR_RPL(selector) != cpl || descriptor_dpl(&d) != cpl ||
        !descriptor_is_writable_data(&d))
        raise_error(c, VECTOR_TS, error);
    if (!descriptor_is_present(&d))
        raise_error(c, VECTOR_SS, error);
    descriptor_set_accessed(c, &d);
    *ss = descriptor_segment(&d, selector);
}

uint64_t tss_stack_pointer64(struct icpu *c, unsigned offset, uint32_t ext)
{
    const struct segment *tr = &c->v.cpu.tr;
    if (tr->unusable || offset + 7 > tr->limit)
        raise_error(c, VECTOR_TS, SELECTOR_ERROR(tr->selector) | ext);
    uint64_t sp = table_read(c, table_address(c, tr->base, offset), 8);
    if (!gva_is_canonical(sp))
        raise_error(c, VECTOR_SS, ext);
    return sp;
}
