/* Code that can tell that it does not run on the guest's processor. Threading: pure functions. */
#ifndef DOPPEL_ENGINE_BT_DIRECT_CODE_H
#define DOPPEL_ENGINE_BT_DIRECT_CODE_H

#include <stdint.h>

/*
 * Where the page of 64-bit code seems to have instructions whose result is the host's where the guest has its own, and that do not fault: CPUID, RDPID, LSL and others. Offsets of
 * the first `max` of them to offset[]; returns how many there are, or more than max.
 */
unsigned direct_code_tells(const uint8_t page[4096], uint16_t *offset, unsigned max);

#endif
