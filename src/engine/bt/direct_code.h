/* Code that can tell that it does not run on the guest's processor. Threading: pure functions. */
#ifndef DOPPEL_ENGINE_BT_DIRECT_CODE_H
#define DOPPEL_ENGINE_BT_DIRECT_CODE_H

#include <stdbool.h>
#include <stdint.h>

/* Does the page of 64-bit code seem to have an instruction whose result is the host's where the guest has its own, and that does not fault: CPUID, RDPID, LSL? */
bool direct_code_tells(const uint8_t page[4096]);

#endif
