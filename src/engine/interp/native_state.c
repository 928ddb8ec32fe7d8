/*
 * Moving the guest's x87/SSE/AVX state between the host's registers and v.cpu.xsave.
 *
 * While simd_live, the registers hold the guest's state including its MXCSR and x87 control word, and the image is stale. simd_save makes the image true and
 * gives the host clean registers: everything initial, but the MXCSR and x87 control word that it had at simd_load. The image is always in the standard XSAVE
 * form, and a component whose XSTATE_BV bit is clear is in its initial state whatever its bytes say (SDM vol. 1, ch. 13).
 * x87 instruction and data pointers that stubs left behind are replaced by the guest's on saving: no host address reaches an image.
 * Threading: the vCPU's thread.
 */
#include <cpuid.h>
#include <errno.h>
#include <string.h>

#include "arch/host.h"
#include "engine/interp/native_priv.h"

int native_state_create(struct icpu *c)
{
    struct native_arena *a = c->native;
    unsigned eax, ebx, ecx, edx;

    a->xsave_mask = host_xcr0();
    if (a->xsave_mask && __get_cpuid_count(0xd, 1, &eax, &ebx, &ecx, &edx))
        a->has_xsaveopt = eax & 1;
    for (unsigned n = 2; n < XSAVE_COMPONENTS; n++) {
        if (!(a->xsave_mask >> n & 1))
            continue;
        __cpuid_count(0xd, n, eax, ebx, ecx, edx);
        if (eax > CPU_XSAVE_BYTES || ebx > CPU_XSAVE_BYTES - eax)
            return -EOPNOTSUPP;
        a->component[n] = (struct native_component){(uint16_t)ebx, (uint16_t)eax, ecx >> 1 & 1};
    }

    a->mxcsr_mask = host_mxcsr_mask();
    memset(a->idle_image, 0, sizeof(a->idle_image));
    put16(a->idle_image + XSAVE_FCW, FCW_DEFAULT);
    put32(a->idle_image + XSAVE_MXCSR, MXCSR_DEFAULT);
    return 0;
}

static void image_restore(const struct native_arena *a, const uint8_t *image)
{
    if (likely(a->xsave_mask))
        __asm__ volatile("xrstor64 %0"
                         :
                         : "m"(*(const uint8_t(*)[CPU_XSAVE_BYTES])image), "a"((uint32_t)a->xsave_mask),
                           "d"((uint32_t)(a->xsave_mask >> 32)));
    else
        __asm__ volatile("fxrstor64 %0" : : "m"(*(const uint8_t(*)[IMAGE_BYTES])image));
}

static void image_save(const struct native_arena *a, uint8_t *image)
{
    uint32_t low = (uint32_t)a->xsave_mask, high = (uint32_t)(a->xsave_mask >> 32);
    if (likely(a->has_xsaveopt)) {
        __asm__ volatile("xsaveopt64 %0" : "+m"(*(uint8_t(*)[CPU_XSAVE_BYTES])image) : "a"(low), "d"(high));
    } else if (a->xsave_mask) {
        __asm__ volatile("xsave64 %0" : "+m"(*(uint8_t(*)[CPU_XSAVE_BYTES])image) : "a"(low), "d"(high));
    } else {
        __asm__ volatile("fxsave64 %0" : "+m"(*(uint8_t(*)[IMAGE_BYTES])image));
        put64(image + XSAVE_BV, XCR0_X87 | XCR0_SSE);
    }
    /* The optimised forms may leave it out together with the XMM registers. */
    __asm__ volatile("stmxcsr %0" : "=m"(*(uint32_t *)(image + XSAVE_MXCSR)));
}

static void registers_take(struct icpu *c)
{
    struct native_arena *a = c->native;
    const uint8_t *image = c->v.cpu.xsave;
    if (unlikely(!a->xsave_mask))
        native_state_materialize(c, XCR0_X87 | XCR0_SSE);
    bool x87 = get64(image + XSAVE_BV) & XCR0_X87;
    image_restore(a, image);
    a->x87_ran = a->translated = a->fdp_known = false;
    a->fip = x87 ? get64(image + XSAVE_FIP) : 0;
    a->loaded_fdp = x87 ? get64(image + XSAVE_FDP) : 0;
    a->fop = a->loaded_fop = x87 ? get16(image + XSAVE_FOP) : 0;
}

void simd_load(struct icpu *c)
{
    struct native_arena *a = c->native;
    uint8_t *image = c->v.cpu.xsave;

    if (c->simd_live)
        return;
    /* What XRSTOR would refuse never gets here from guests (op_xsave.c checks); this holds whatever else wrote the image. */
    uint64_t bv = get64(image + XSAVE_BV) & (a->xsave_mask ? a->xsave_mask : XCR0_X87 | XCR0_SSE);
    put64(image + XSAVE_BV, bv);
    put64(image + XSAVE_COMP_BV, 0);
    put64(image + XSAVE_COMP_BV + 8, 0);
    put32(image + XSAVE_MXCSR, get32(image + XSAVE_MXCSR) & a->mxcsr_mask);

    __asm__ volatile("stmxcsr %0" : "=m"(a->host_mxcsr));
    __asm__ volatile("fnstcw %0" : "=m"(a->host_fcw));
    registers_take(c);
    c->simd_live = true;
}

/*
 * Zero is what FNINIT leaves. Where processors have not changed FDP and FOP (CPUID FDP_EXCPTN_ONLY) they are what was loaded. Pointers of translations are not even compared: one that
 * was loaded would tell whether it had been guessed.
 */
static void fix_pointers(const struct native_arena *a, uint8_t *image)
{
    uint64_t fip = get64(image + XSAVE_FIP), fdp = get64(image + XSAVE_FDP);
    uint16_t fop = get16(image + XSAVE_FOP);
    bool known = !a->pointers_forgotten && !a->pointers_hidden;
    if (fip)
        put64(image + XSAVE_FIP, known ? a->fip : 0);
    if (fdp && (a->translated || a->pointers_hidden || fdp != a->loaded_fdp))
        put64(image + XSAVE_FDP, known && a->fdp_known ? a->fdp : 0);
    if (fop && fop != a->loaded_fop)
        put16(image + XSAVE_FOP, known ? a->fop : 0);
}

void native_pointers_hide(struct icpu *c)
{
    c->native->pointers_hidden = true;
}

void native_pointers_show(struct icpu *c)
{
    struct native_arena *a = c->native;
    a->pointers_hidden = false;
    a->x87_ran = a->translated = true; /* as far as one knows */
}

void native_pointers_set(struct icpu *c, uint64_t fip, unsigned fop)
{
    struct native_arena *a = c->native;
    a->fip = fip;
    a->fop = (uint16_t)fop;
    a->fdp_known = false;
}

void native_pointers_forget(struct icpu *c)
{
    c->native->pointers_forgotten = true;
}

static void image_take(struct icpu *c)
{
    struct native_arena *a = c->native;
    uint8_t *image = c->v.cpu.xsave;
    image_save(a, image);
    if ((a->x87_ran || a->pointers_hidden) && get64(image + XSAVE_BV) & XCR0_X87)
        fix_pointers(a, image);
}

void native_state_snapshot(struct icpu *c)
{
    if (c->simd_live)
        image_take(c);
}

void native_state_reload(struct icpu *c)
{
    if (c->simd_live)
        registers_take(c);
}

void simd_save_slow(struct icpu *c)
{
    struct native_arena *a = c->native;
    image_take(c);
    c->simd_live = false;

    put32(a->idle_image + XSAVE_MXCSR, a->host_mxcsr);
    image_restore(a, a->idle_image);
    if (unlikely(a->host_fcw != FCW_DEFAULT))
        __asm__ volatile("fldcw %0" : : "m"(a->host_fcw));
}

/* ---- the image ---- */

static bool is_zero(const uint8_t *bytes, unsigned length)
{
    for (unsigned n = 0; n < length; n += 8)
        if (get64(bytes + n))
            return false;
    return true;
}

static bool is_initial(const struct native_arena *a, const uint8_t *image, unsigned component)
{
    if (component == 0)
        return get64(image) == FCW_DEFAULT && is_zero(image + 8, XSAVE_MXCSR - 8) && is_zero(image + XSAVE_ST, XSAVE_XMM - XSAVE_ST);
    if (component == 1)
        return is_zero(image + XSAVE_XMM, 256);
    return is_zero(image + a->component[component].offset, a->component[component].size);
}

/*
 * Processors may call initial state used or not (SDM vol. 1, 13.6), and Linux makes x87 and SSE state used with each signal that its handler returns from. What guests see depends on
 * the state alone, so that it is the same each time.
 */
uint64_t native_state_in_use(const struct icpu *c)
{
    const uint8_t *image = c->v.cpu.xsave;
    uint64_t bv = get64(image + XSAVE_BV);
    for (unsigned n = 0; n < XSAVE_COMPONENTS; n++)
        if (bv >> n & 1 && is_initial(c->native, image, n))
            bv &= ~(1ull << n);
    return bv;
}

void native_state_materialize(struct icpu *c, uint64_t components)
{
    uint8_t *image = c->v.cpu.xsave;
    uint64_t bv = get64(image + XSAVE_BV), missing = components & ~bv;
    if (likely(!missing))
        return;
    if (missing & XCR0_X87) {
        memset(image, 0, XSAVE_MXCSR);
        put16(image + XSAVE_FCW, FCW_DEFAULT);
        memset(image + XSAVE_ST, 0, XSAVE_XMM - XSAVE_ST);
    }
    if (missing & XCR0_SSE)
        memset(image + XSAVE_XMM, 0, 256);
    for (unsigned n = 2; n < XSAVE_COMPONENTS; n++)
        if (missing >> n & 1)
            memset(image + c->native->component[n].offset, 0, c->native->component[n].size);
    put64(image + XSAVE_BV, bv | missing);
}

uint8_t *native_vector_part(struct icpu *c, unsigned number, unsigned part)
{
    uint8_t *image = c->v.cpu.xsave;
    const struct native_component *component = c->native->component;
    if (number >= 16)
        return image + component[7].offset + (number - 16) * 64 + part * 16;
    if (part == 0)
        return image + XSAVE_XMM + number * 16;
    if (part == 1)
        return image + component[2].offset + number * 16;
    return image + component[6].offset + number * 32 + (part - 2) * 16;
}

void native_vector_zero_above(struct icpu *c, unsigned number, unsigned bytes)
{
    unsigned parts = c->native->xsave_mask & XCR0_ZMM_HI256 ? 4 : c->native->xsave_mask & XCR0_AVX ? 2 : 1;
    for (unsigned part = bytes / 16; part < parts; part++)
        memset(native_vector_part(c, number, part), 0, 16);
}

uint64_t native_opmask_get(struct icpu *c, unsigned number)
{
    return get64(c->v.cpu.xsave + c->native->component[5].offset + number * 8);
}

void native_opmask_set(struct icpu *c, unsigned number, uint64_t value)
{
    put64(c->v.cpu.xsave + c->native->component[5].offset + number * 8, value);
}
