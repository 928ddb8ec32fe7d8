/*
 * What CPUID tells the guest: the host's features cut down to what an engine supports, the machine's topology, and the
 * hypervisor leaves 0x40000000.. (KVM-compatible signature, so that guests use their paravirtual clock and skip calibration).
 * The table is built once for each VM and is read-only afterwards; the few live bits (OSXSAVE, OSPKE, APIC id, XSAVE size by XCR0)
 * are filled in by cpuid_query from the asking processor's state.
 */
#ifndef DOPPEL_ARCH_CPUID_H
#define DOPPEL_ARCH_CPUID_H

#include <stdbool.h>
#include <stdint.h>

#include "arch/cpu.h"
#include "util/error.h"

#define CPUID_MSR_MASKS_MAX 32

/* The bits in `mask` of one register of a leaf are those of `value`. */
struct cpuid_mask {
    uint32_t leaf, subleaf;
    unsigned reg; /* 0 EAX, 1 EBX, 2 ECX, 3 EDX */
    uint32_t mask, value;
};

/* What a guest reads from an MSR has these bits, whatever it wrote. An MSR that the machine has not stays absent. */
struct msr_mask {
    uint32_t index;
    uint64_t mask, value;
};

struct cpuid_config {
    unsigned cpu_count;      /* 1..255; one package, one thread a core */
    uint64_t tsc_khz;        /* for leaves 0x15, 0x16 and 0x40000010 */
    uint64_t apic_bus_hz;    /* local APIC timer's input frequency */
    bool no_random;          /* RDRAND and RDSEED are not offered: a guest must do the same each time */
    uint64_t xcr0_supported; /* out of cpuid_table_build: what the guest may put in XCR0 */
};

struct cpuid_regs {
    uint32_t eax, ebx, ecx, edx;
};

struct cpuid_table;

/* NULL: no memory. Fills config->xcr0_supported. */
struct cpuid_table *cpuid_table_build(struct cpuid_config *config);
void cpuid_table_destroy(struct cpuid_table *table);

/*
 * Before the table is used. A leaf that is not there: -ENOENT. Setting a feature that this host or the engines lack, or another vendor: -ENOTSUP. The registers that switch features on
 * (CR4, EFER, XCR0) follow at cpuid_table_seal.
 */
int cpuid_table_mask(struct cpuid_table *table, const struct cpuid_mask *mask, struct error *err) __attribute__((warn_unused_result));
int cpuid_table_mask_msr(struct cpuid_table *table, const struct msr_mask *mask, struct error *err) __attribute__((warn_unused_result));
/* -EINVAL: what is left of XCR0 is not a state that XSETBV takes. */
int cpuid_table_seal(struct cpuid_table *table, struct error *err) __attribute__((warn_unused_result));
uint64_t cpuid_msr_value(const struct cpuid_table *table, uint32_t index, uint64_t value);

struct cpuid_regs cpuid_query(const struct cpuid_table *table, const struct cpu_state *cpu, unsigned apic_id, uint32_t leaf, uint32_t subleaf);

/* The table's entries, for engines that hand them to somebody else. False: there are no more. *subleaf is CPUID_ANY_SUBLEAF where it does not matter. */
#define CPUID_ANY_SUBLEAF (~0u)
bool cpuid_entry(const struct cpuid_table *table, unsigned n, uint32_t *leaf, uint32_t *subleaf);

/*
 * Takes away what an engine cannot give: every register that is a set of features is cut down to what `allowed` answers for its leaf. Before the first
 * processor runs.
 */
int cpuid_limit(struct cpuid_table *table, struct cpuid_regs (*allowed)(void *ctx, uint32_t leaf, uint32_t subleaf), void *ctx, struct error *err);

/* The register that says by whom the processor is. */
struct cpuid_mask cpuid_vendor(const struct cpuid_table *table);
/* Appends the names of these bits of a feature register (0 EAX to 3 EDX) to a text, "avx2, bmi2"; what has none is told by its place. */
void cpuid_feature_names(uint32_t leaf, uint32_t subleaf, unsigned reg, uint32_t bits, char *text, size_t text_bytes);
/* The n-th register that is a set of features, all of its bits (0 where there is no such leaf). False: there are no more. */
bool cpuid_feature(const struct cpuid_table *table, unsigned n, struct cpuid_mask *feature);

struct state_io;
/*
 * Section "cpuid". Loading replaces the table, so that a guest goes on seeing what it saw; refused, with the leaf's name, when the saved one
 * offers what this table (the host's) does not.
 */
int cpuid_state(struct cpuid_table *table, struct state_io *io);

/* Feature bits as the guest sees them, for checks such as "may CR4.PCIDE be set". */
uint64_t cpuid_cr4_allowed(const struct cpuid_table *table);
uint64_t cpuid_efer_allowed(const struct cpuid_table *table);
uint64_t cpuid_xcr0_allowed(const struct cpuid_table *table);
unsigned cpuid_physical_address_bits(const struct cpuid_table *table);

#endif
