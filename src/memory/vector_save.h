/*
 * Keeps the processor's vector and x87 registers over code that may use them. PhysMap's look-ups come from engines while the guest's own values are in them
 * (engine/interp/interp_priv.h); only the rare look-up that has to do something pays for it. The state between is the one that the ABI promises to functions.
 */
#ifndef DOPPEL_MEMORY_VECTOR_SAVE_H
#define DOPPEL_MEMORY_VECTOR_SAVE_H

#include <cpuid.h>
#include <stdbool.h>
#include <stdint.h>

#define VECTOR_SAVE_COMPONENTS 0xe7u /* x87, SSE, AVX, AVX-512: all that guests can have (SDM volume 1, 13.1) */
#define VECTOR_SAVE_BYTES 4096u      /* these end below 2.7 KiB on all processors that there are */

struct vector_save {
    uint8_t area[VECTOR_SAVE_BYTES] __attribute__((aligned(64)));
    uint32_t components; /* 0: by FXSAVE */
};

/* SDM volume 1, 13.3: what the system has enabled; 0 without XSAVE. */
static inline uint32_t vector_save_components(void)
{
    uint32_t a, b, c, d;
    __cpuid(1, a, b, c, d);
    if (!(c & bit_OSXSAVE))
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return a & VECTOR_SAVE_COMPONENTS;
}

/* `components`: vector_save_components(), which is slow in virtual machines. */
static inline void vector_save(struct vector_save *save, uint32_t components)
{
    static const uint32_t mxcsr = 0x1f80;
    save->components = components;
    if (save->components) {
        for (unsigned i = 512; i < 576; i++) /* the header must be clean (13.4.2) */
            save->area[i] = 0;
        __asm__ volatile("xsave64 %0" : "+m"(save->area) : "a"(save->components), "d"(0) : "memory");
    } else {
        __asm__ volatile("fxsave64 %0" : "=m"(save->area) : : "memory");
    }
    __asm__ volatile("fninit; ldmxcsr %0" : : "m"(mxcsr));
}

static inline void vector_restore(struct vector_save *save)
{
    if (save->components)
        __asm__ volatile("xrstor64 %0" : : "m"(save->area), "a"(save->components), "d"(0) : "memory");
    else
        __asm__ volatile("fxrstor64 %0" : : "m"(save->area) : "memory");
}

#endif
