/*
 * The architectural state of one x86-64 processor, as every engine keeps it and as snapshots save it.
 *
 * Register numbers are the instruction encoding's (RAX 0, RCX 1, ... R15 15). `gpr` has two more slots, so that decoded operands can
 * name RIP and a constant zero by index like any other register. Sources: Intel SDM vol. 3, ch. 2, 3 and 8 to 11.
 * Threading: owned by the vCPU's thread; others touch it only while the vCPU is paused.
 */
#ifndef DOPPEL_ARCH_CPU_H
#define DOPPEL_ARCH_CPU_H

#include <stdbool.h>
#include <stdint.h>

#include "memory/memory.h"

enum gpr_index {
    GPR_RAX, GPR_RCX, GPR_RDX, GPR_RBX, GPR_RSP, GPR_RBP, GPR_RSI, GPR_RDI,
    GPR_R8, GPR_R9, GPR_R10, GPR_R11, GPR_R12, GPR_R13, GPR_R14, GPR_R15,
    GPR_RIP,  /* address of the next instruction while one executes; of the current one at boundaries */
    GPR_ZERO, /* always 0 */
    GPR_SLOTS
};

enum segment_index { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_COUNT };

/* A segment register with its hidden part. `attributes` is the layout of descriptor bits 40..55: type 3:0, S 4, DPL 6:5,
 * P 7, AVL 12, L 13, D/B 14, G 15 (limit bits in 11:8 are zero here). `limit` is in bytes, expanded by G. */
struct segment {
    uint64_t base;
    uint32_t limit;
    uint16_t selector;
    uint16_t attributes;
    bool unusable; /* null selector in protected mode */
};

#define SEG_ATTR_TYPE(a) ((a) & 0xf)
#define SEG_ATTR_ACCESSED 0x0001u
#define SEG_ATTR_RW 0x0002u /* data: writable; code: readable */
#define SEG_ATTR_DC 0x0004u /* data: expand down; code: conforming */
#define SEG_ATTR_CODE 0x0008u
#define SEG_ATTR_S 0x0010u
#define SEG_ATTR_DPL(a) (((a) >> 5) & 3)
#define SEG_ATTR_P 0x0080u
#define SEG_ATTR_AVL 0x1000u
#define SEG_ATTR_L 0x2000u
#define SEG_ATTR_DB 0x4000u
#define SEG_ATTR_G 0x8000u

struct descriptor_table {
    uint64_t base;
    uint16_t limit;
};

#define RFLAGS_CF (1ull << 0)
#define RFLAGS_FIXED (1ull << 1) /* reads as one */
#define RFLAGS_PF (1ull << 2)
#define RFLAGS_AF (1ull << 4)
#define RFLAGS_ZF (1ull << 6)
#define RFLAGS_SF (1ull << 7)
#define RFLAGS_TF (1ull << 8)
#define RFLAGS_IF (1ull << 9)
#define RFLAGS_DF (1ull << 10)
#define RFLAGS_OF (1ull << 11)
#define RFLAGS_IOPL (3ull << 12)
#define RFLAGS_NT (1ull << 14)
#define RFLAGS_RF (1ull << 16)
#define RFLAGS_VM (1ull << 17)
#define RFLAGS_AC (1ull << 18)
#define RFLAGS_VIF (1ull << 19)
#define RFLAGS_VIP (1ull << 20)
#define RFLAGS_ID (1ull << 21)
#define RFLAGS_OSZAPC (RFLAGS_OF | RFLAGS_SF | RFLAGS_ZF | RFLAGS_AF | RFLAGS_PF | RFLAGS_CF)

#define CR0_PE (1ull << 0)
#define CR0_MP (1ull << 1)
#define CR0_EM (1ull << 2)
#define CR0_TS (1ull << 3)
#define CR0_ET (1ull << 4)
#define CR0_NE (1ull << 5)
#define CR0_WP (1ull << 16)
#define CR0_AM (1ull << 18)
#define CR0_NW (1ull << 29)
#define CR0_CD (1ull << 30)
#define CR0_PG (1ull << 31)

#define CR4_VME (1ull << 0)
#define CR4_PVI (1ull << 1)
#define CR4_TSD (1ull << 2)
#define CR4_DE (1ull << 3)
#define CR4_PSE (1ull << 4)
#define CR4_PAE (1ull << 5)
#define CR4_MCE (1ull << 6)
#define CR4_PGE (1ull << 7)
#define CR4_PCE (1ull << 8)
#define CR4_OSFXSR (1ull << 9)
#define CR4_OSXMMEXCPT (1ull << 10)
#define CR4_UMIP (1ull << 11)
#define CR4_LA57 (1ull << 12)
#define CR4_FSGSBASE (1ull << 16)
#define CR4_PCIDE (1ull << 17)
#define CR4_OSXSAVE (1ull << 18)
#define CR4_SMEP (1ull << 20)
#define CR4_SMAP (1ull << 21)
#define CR4_PKE (1ull << 22)

#define EFER_SCE (1ull << 0)
#define EFER_LME (1ull << 8)
#define EFER_LMA (1ull << 10)
#define EFER_NXE (1ull << 11)
#define EFER_FFXSR (1ull << 14)
#define EFER_AIBRSE (1ull << 21) /* automatic IBRS (AMD): nothing to do */

#define XCR0_X87 (1ull << 0)
#define XCR0_SSE (1ull << 1)
#define XCR0_AVX (1ull << 2)
#define XCR0_OPMASK (1ull << 5)
#define XCR0_ZMM_HI256 (1ull << 6)
#define XCR0_HI16_ZMM (1ull << 7)
#define XCR0_AVX512 (XCR0_OPMASK | XCR0_ZMM_HI256 | XCR0_HI16_ZMM)
/* What an engine may offer a guest at most; further limited by the host's own XCR0. */
#define XCR0_SUPPORTED (XCR0_X87 | XCR0_SSE | XCR0_AVX | XCR0_AVX512)

enum x86_vector {
    VECTOR_DE = 0, VECTOR_DB = 1, VECTOR_NMI = 2, VECTOR_BP = 3, VECTOR_OF = 4, VECTOR_BR = 5, VECTOR_UD = 6, VECTOR_NM = 7,
    VECTOR_DF = 8, VECTOR_TS = 10, VECTOR_NP = 11, VECTOR_SS = 12, VECTOR_GP = 13, VECTOR_PF = 14, VECTOR_MF = 16,
    VECTOR_AC = 17, VECTOR_MC = 18, VECTOR_XM = 19,
};

/* Page-fault error code bits. */
#define PF_P 1u
#define PF_W 2u
#define PF_U 4u
#define PF_RSVD 8u
#define PF_I 16u

enum cpu_activity {
    CPU_RUNNING,
    CPU_HALTED,        /* HLT; wakes on interrupt, NMI, INIT */
    CPU_WAIT_FOR_SIPI, /* after INIT on an application processor */
    CPU_SHUTDOWN,      /* triple fault */
};

/* The x87/SSE/AVX state in the standard (not compacted) XSAVE layout of the host. */
#define CPU_XSAVE_BYTES 4096

struct cpu_state {
    uint64_t gpr[GPR_SLOTS];
    uint64_t rflags; /* always complete outside an engine's run function */

    struct segment seg[SEG_COUNT];
    struct segment ldtr, tr;
    struct descriptor_table gdtr, idtr;

    uint64_t cr0, cr2, cr3, cr4;
    uint64_t efer;
    uint64_t dr[8]; /* 4 and 5 unused */
    uint64_t xcr0;
    uint64_t pdpte[4]; /* PAE paging's registers, loaded with CR3 */

    /* MSRs that belong to the processor core; the local APIC's are the APIC's own. */
    uint64_t msr_star, msr_lstar, msr_cstar, msr_sfmask, msr_kernel_gs_base;
    uint64_t msr_sysenter_cs, msr_sysenter_esp, msr_sysenter_eip;
    uint64_t msr_pat, msr_tsc_aux, msr_tsc_adjust, msr_misc_enable, msr_spec_ctrl;
    uint64_t msr_mtrr_def_type, msr_mtrr_fixed[11], msr_mtrr_base[8], msr_mtrr_mask[8];
    uint64_t msr_mcg_status, msr_mcg_ctl;

    uint64_t tsc_offset; /* guest TSC = inputs_tsc() + tsc_offset */

    enum cpu_activity activity;
    bool interrupt_shadow; /* after STI or MOV SS: no interrupt before the next instruction ends */
    bool nmi_blocked;      /* until IRET */

    _Alignas(64) uint8_t xsave[CPU_XSAVE_BYTES];
};

enum cpu_reset_kind { CPU_RESET_POWER_ON, CPU_RESET_INIT };

/* Puts the processor in its state after power-on or INIT (SDM vol. 3, 10.1.1, table 10-1). INIT keeps x87/SSE state, TSC, MTRRs and most MSRs.
 * Does not choose between running and waiting for SIPI: activity becomes CPU_RUNNING. */
void cpu_reset(struct cpu_state *cpu, enum cpu_reset_kind kind);

/* Startup IPI: real mode at vector * 0x1000. */
void cpu_start_at(struct cpu_state *cpu, uint8_t sipi_vector);

struct state_io;
/* Section "cpu": everything above. Values loaded are checked to be a state that a processor can be in. */
int cpu_state_state(struct cpu_state *cpu, struct state_io *io);

static inline unsigned cpu_cpl(const struct cpu_state *cpu)
{
    return cpu->seg[SEG_SS].attributes >> 5 & 3;
}
static inline bool cpu_in_long_mode(const struct cpu_state *cpu) /* EFER.LMA: 64-bit or compatibility */
{
    return cpu->efer & EFER_LMA;
}
static inline bool cpu_in_64bit_mode(const struct cpu_state *cpu)
{
    return (cpu->efer & EFER_LMA) && (cpu->seg[SEG_CS].attributes & SEG_ATTR_L);
}

#endif
