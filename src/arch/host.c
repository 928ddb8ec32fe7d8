/* See host.h. Threading: asks the processor each time and keeps nothing; any thread. */
#include "arch/host.h"

#include <cpuid.h>
#include <string.h>
#include <sys/auxv.h>
#undef PF_W /* of a program header; cpu.h's is of a page fault */

#include "arch/cpu.h"

#define HWCAP2_FSGSBASE_BIT 2ul
#define FXSAVE_BYTES 512
#define FXSAVE_MXCSR_MASK 28

bool host_is_amd(void)
{
    unsigned eax, ebx = 0, ecx, edx;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && (ebx == signature_AMD_ebx || ebx == 0x6F677948 /* "Hygo" */);
}

uint64_t host_xcr0(void)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE))
        return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    uint64_t xcr0 = ((uint64_t)high << 32 | low) & XCR0_SUPPORTED;
    if (!(xcr0 & XCR0_AVX) || (xcr0 & XCR0_AVX512) != XCR0_AVX512)
        xcr0 &= ~XCR0_AVX512;
    return xcr0;
}

uint32_t host_mxcsr_mask(void)
{
    _Alignas(16) uint8_t image[FXSAVE_BYTES] = {0};
    uint32_t mask;
    __asm__ volatile("fxsave %0" : "=m"(image));
    memcpy(&mask, image + FXSAVE_MXCSR_MASK, sizeof(mask));
    return mask ? mask : 0xFFBF; /* SDM vol. 1, 11.6.6 */
}

bool host_fsgsbase(void)
{
    return getauxval(AT_HWCAP2) & HWCAP2_FSGSBASE_BIT;
}
