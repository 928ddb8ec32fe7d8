/*
 * The state of one local APIC as engines and the machine hand it to each other. Registers are those of SDM vol. 3, table 11-1, number n at offset n * 16 of the APIC's page
 * (x2APIC: MSR 0x800 + n), as a driver in xAPIC mode would see them, but for the id and the logical id in x2APIC mode.
 */
#ifndef DOPPEL_ARCH_APIC_H
#define DOPPEL_ARCH_APIC_H

#include <stdint.h>

#define APIC_REGISTERS 64

struct apic_state {
    uint64_t base;         /* IA32_APIC_BASE */
    uint64_t tsc_deadline; /* IA32_TSC_DEADLINE; 0: disarmed */
    uint32_t reg[APIC_REGISTERS];
};

#endif
