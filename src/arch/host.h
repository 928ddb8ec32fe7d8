/* What the processor that this program runs on can do. */
#ifndef DOPPEL_ARCH_HOST_H
#define DOPPEL_ARCH_HOST_H

#include <stdbool.h>
#include <stdint.h>

/* By AMD, or Hygon, whose processors are the same in all that matters here; everybody else is taken for Intel. */
bool host_is_amd(void);
/* The host's XCR0 as far as a guest may have it: AVX-512 whole and with AVX, or not at all. 0 without XSAVE. */
uint64_t host_xcr0(void);
/* The bits that may be set in MXCSR. */
uint32_t host_mxcsr_mask(void);
/* RDGSBASE, WRGSBASE and their like work in user mode (Linux 5.9 and later). */
bool host_fsgsbase(void);

#endif
