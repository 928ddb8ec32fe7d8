/*
 * Memory operands under a mask: fault suppression, gathers and scatters.
 *
 * A masked access that lies in a page which the TLB has runs directly. Otherwise only the enabled elements are read into the bounce buffer before, or written from
 * it after, the stub: what is disabled is never touched (SDM vol. 1, 15.6.4). Gathers and scatters are done here element by element on the saved
 * state; a fault leaves the elements before it done and their mask bits clear, so that the instruction can be restarted (SDM vol. 2C, VGATHERDPS).
 * Threading: the vCPU's thread.
 */
#include <string.h>

#include "engine/interp/native_priv.h"

static uint64_t low_bits(unsigned count)
{
    return count >= 64 ? ~0ull : (1ull << count) - 1;
}

static uint8_t *vector_at(struct icpu *c, unsigned number, unsigned offset)
{
    return native_vector_part(c, number, offset / 16) + offset % 16;
}

static uint64_t sign_bits(struct icpu *c, unsigned number, unsigned element_size, unsigned count)
{
    uint64_t bits = 0;
    for (unsigned n = 0; n < count; n++)
        bits |= (uint64_t)(vector_at(c, number, (n + 1) * element_size - 1)[0] >> 7) << n;
    return bits;
}

/* Which elements in memory are enabled. The state has been saved. */
static uint64_t enabled_elements(struct icpu *c, const struct native_code *n)
{
    unsigned count = n->size / n->element_size;
    if (n->mask_kind == MASK_SIGNS) {
        native_state_materialize(c, XCR0_SSE | XCR0_AVX);
        return sign_bits(c, n->mask_register, n->element_size, n->mask_bits);
    }
    native_state_materialize(c, XCR0_OPMASK);
    uint64_t mask = native_opmask_get(c, n->mask_register) & low_bits(n->mask_bits);
    if (n->mask_kind == MASK_PACKED) {
        unsigned bits = 0;
        for (; mask; mask &= mask - 1)
            bits++;
        return low_bits(bits);
    }
    uint64_t elements = 0; /* a broadcast element is read when any of its copies is wanted */
    for (unsigned from = 0; from < n->mask_bits; from += count)
        elements |= mask >> from & low_bits(count);
    return elements;
}

static __attribute__((noinline)) void run_elements(struct icpu *c, const struct native_code *n, gva_t gva)
{
    uint8_t *bounce = c->native->bounce + (gva & 63);
    unsigned size = n->element_size, count = n->size / size;
    simd_save(c);
    uint64_t enabled = enabled_elements(c, n);
    if (gva & n->align_mask && enabled) /* nothing enabled, nothing checked: as processors do it */
        raise_gp0(c);

    memset(bounce, 0, n->size);
    for (unsigned k = 0; k < count; k++) {
        if (!(enabled >> k & 1))
            continue;
        if (n->flags & NATIVE_WRITE)
            mem_probe_write(c, c->view, gva + k * size, size);
        else
            mem_read_bytes(c, c->view, gva + k * size, bounce + k * size, size);
    }
    native_run(c, n, bounce);
    if (!(n->flags & NATIVE_WRITE))
        return;
    for (unsigned k = 0; k < count; k++)
        if (enabled >> k & 1)
            mem_write_bytes(c, c->view, gva + k * size, bounce + k * size, size);
}

/* In legacy modes the segment limit is checked for the whole operand, enabled or not. */
void native_masked(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    bool write = n->flags & NATIVE_WRITE;
    native_check(c, n);
    gva_t gva = ea_linear(c, i, n->size, write);
    void *host = native_host_fast(c, gva, n->size, write);
    if (unlikely(!host)) {
        run_elements(c, n, gva);
        return;
    }
    native_run(c, n, host);
    if (write)
        native_stored(c, host, n->size);
}

/* ---- gather and scatter ---- */

static uint64_t mask_get(struct icpu *c, const struct native_code *n)
{
    if (n->opmask)
        return native_opmask_get(c, n->mask_register) & low_bits(n->mask_bits);
    return sign_bits(c, n->mask_register, n->element_size, n->mask_bits);
}

static void mask_clear(struct icpu *c, const struct native_code *n, unsigned element)
{
    if (n->opmask)
        native_opmask_set(c, n->mask_register, native_opmask_get(c, n->mask_register) & ~(1ull << element));
    else
        memset(vector_at(c, n->mask_register, element * n->element_size), 0, n->element_size);
}

/* Of the operation (VEX.L, EVEX.L'L): the data or the indices may fill half of it. */
static unsigned gather_bytes(const struct native_code *n)
{
    return n->mask_bits * (n->index_size > n->element_size ? n->index_size : n->element_size);
}

/* AVX2: each element of the mask, used or not, becomes all ones or zero, and what lies above them zero, before anything is read by Intel's: seen when a read faults (SDM vol. 2C, VGATHERDPD, VGATHERQPS). */
static void mask_extend(struct icpu *c, const struct native_code *n)
{
    unsigned bytes = gather_bytes(n), size = n->element_size;
    for (unsigned at = 0; at < bytes; at += size) {
        uint8_t *element = vector_at(c, n->mask_register, at);
        memset(element, element[size - 1] & 0x80 ? 0xff : 0, size);
    }
    native_vector_zero_above(c, n->mask_register, bytes);
}

static gva_t element_address(struct icpu *c, const struct insn *i, const struct native_code *n, unsigned element, bool write)
{
    const uint8_t *p = vector_at(c, n->index, element * n->index_size);
    uint64_t index = n->index_size == 8 ? get64(p) : (uint64_t)(int64_t)(int32_t)get32(p);
    uint64_t offset = (reg64(c, i->base) + (index << i->scale) + (uint64_t)(int64_t)i->displacement) & i->address_mask;
    return linear_address(c, i->flags & INSN_LEGACY, i->segment, offset, n->element_size, write);
}

static void prepare(struct icpu *c, const struct native_code *n)
{
    native_check(c, n);
    simd_save(c);
    native_state_materialize(c, n->opmask ? c->native->xsave_mask & ~XCR0_X87 : XCR0_SSE | XCR0_AVX);
}

void native_gather(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    prepare(c, n);
    uint64_t mask = mask_get(c, n);
    if (!n->opmask && !c->amd)
        mask_extend(c, n);
    for (unsigned k = 0; k < n->mask_bits; k++) {
        if (!(mask >> k & 1))
            continue;
        uint64_t value = mem_read(c, element_address(c, i, n, k, false), n->element_size);
        if (!(mask & low_bits(k))) /* open in the manual; processors write the register with its first element, and no part above the operation survives that */
            native_vector_zero_above(c, n->vector, gather_bytes(n));
        memcpy(vector_at(c, n->vector, k * n->element_size), &value, n->element_size);
        mask_clear(c, n, k);
    }
    if (n->opmask)
        native_opmask_set(c, n->mask_register, 0);
    else
        native_vector_zero_above(c, n->mask_register, 0);
    if (n->vector_bytes == 8)
        memset(vector_at(c, n->vector, 8), 0, 8);
    native_vector_zero_above(c, n->vector, n->vector_bytes < 16 ? 16 : n->vector_bytes);
}

void native_scatter(struct icpu *c, const struct insn *i)
{
    const struct native_code *n = i->native;
    prepare(c, n);
    uint64_t mask = mask_get(c, n);
    for (unsigned k = 0; k < n->mask_bits; k++) {
        if (!(mask >> k & 1))
            continue;
        const uint8_t *p = vector_at(c, n->vector, k * n->element_size);
        mem_write(c, element_address(c, i, n, k, true), n->element_size, n->element_size == 8 ? get64(p) : get32(p));
        mask_clear(c, n, k);
    }
    native_opmask_set(c, n->mask_register, 0);
}
