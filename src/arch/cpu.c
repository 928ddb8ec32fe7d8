/*
 * Reset, startup and saved form of a virtual processor.
 *
 * Reset values are those of SDM vol. 3, table 10-1 ("IA-32 and Intel 64 Processor States Following Power-up, Reset, or INIT").
 * cpu_state_state treats what it loads as hostile: everything an engine relies on without looking again (canonical bases, mode
 * bits that agree with each other, an XSAVE image that the host's XRSTOR accepts) is checked here and nowhere else.
 * Threading: none of its own; the caller owns the state.
 */
#include "arch/cpu.h"

#include <cpuid.h>
#include <string.h>

#include "arch/host.h"
#include "state/state.h"

#define DR6_FIXED 0xFFFF0FF0ull
#define DR7_FIXED 0x400ull
#define PAT_RESET 0x0007040600070406ull
#define MISC_ENABLE_RESET 0x1801ull /* fast strings; no BTS, no PEBS */

/* Byte offsets in the XSAVE image (SDM vol. 1, 13.4). */
#define XSAVE_FCW 0
#define XSAVE_FTW 4
#define XSAVE_MXCSR 24
#define XSAVE_MXCSR_MASK 28
#define XSAVE_BV 512
#define XSAVE_COMP_BV 520
#define XSAVE_HEADER_END 576

#define RFLAGS_DEFINED                                                                             \
    (RFLAGS_OSZAPC | RFLAGS_FIXED | RFLAGS_TF | RFLAGS_IF | RFLAGS_DF | RFLAGS_IOPL | RFLAGS_NT |  \
     RFLAGS_RF | RFLAGS_VM | RFLAGS_AC | RFLAGS_VIF | RFLAGS_VIP | RFLAGS_ID)
#define CR0_DEFINED                                                                                \
    (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD |     \
     CR0_PG)
#define CR4_DEFINED                                                                                \
    (CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR |             \
     CR4_OSXMMEXCPT | CR4_UMIP | CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP)
#define EFER_DEFINED (EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AIBRSE)
#define SEG_ATTR_DEFINED 0xF0FFu
#define PHYSICAL_MASK ((1ull << 52) - 1)
#define LOWER_HALF_END (1ull << 47)

static void put16(uint8_t *area, unsigned offset, uint16_t value)
{
    memcpy(area + offset, &value, sizeof(value));
}

static void put32(uint8_t *area, unsigned offset, uint32_t value)
{
    memcpy(area + offset, &value, sizeof(value));
}

static void put64(uint8_t *area, unsigned offset, uint64_t value)
{
    memcpy(area + offset, &value, sizeof(value));
}

static uint32_t get32(const uint8_t *area, unsigned offset)
{
    uint32_t value;
    memcpy(&value, area + offset, sizeof(value));
    return value;
}

static uint64_t get64(const uint8_t *area, unsigned offset)
{
    uint64_t value;
    memcpy(&value, area + offset, sizeof(value));
    return value;
}

static void reset_segments(struct cpu_state *cpu)
{
    for (unsigned s = 0; s < SEG_COUNT; s++)
        cpu->seg[s] = (struct segment){
            .limit = 0xFFFF, .attributes = SEG_ATTR_P | SEG_ATTR_S | SEG_ATTR_RW | SEG_ATTR_ACCESSED};
    cpu->seg[SEG_CS].selector = 0xF000;
    cpu->seg[SEG_CS].base = 0xFFFF0000;
    cpu->ldtr = (struct segment){.limit = 0xFFFF, .attributes = SEG_ATTR_P | 2};
    cpu->tr = (struct segment){.limit = 0xFFFF, .attributes = SEG_ATTR_P | 11};
    cpu->gdtr = cpu->idtr = (struct descriptor_table){.limit = 0xFFFF};
}

static void reset_simd(struct cpu_state *cpu)
{
    memset(cpu->xsave, 0, sizeof(cpu->xsave));
    put16(cpu->xsave, XSAVE_FCW, 0x40);
    cpu->xsave[XSAVE_FTW] = 0xFF; /* tag word 5555H: every register valid and zero */
    put32(cpu->xsave, XSAVE_MXCSR, 0x1F80);
    put32(cpu->xsave, XSAVE_MXCSR_MASK, host_mxcsr_mask());
    put64(cpu->xsave, XSAVE_BV, XCR0_X87 | XCR0_SSE);
}

/* What power-on clears and INIT keeps. */
static void reset_power_on(struct cpu_state *cpu)
{
    memset(cpu, 0, sizeof(*cpu));
    cpu->cr0 = CR0_CD | CR0_NW;
    cpu->xcr0 = XCR0_X87;
    cpu->msr_pat = PAT_RESET;
    cpu->msr_misc_enable = MISC_ENABLE_RESET;
    reset_simd(cpu);
}

void cpu_reset(struct cpu_state *cpu, enum cpu_reset_kind kind)
{
    if (kind == CPU_RESET_POWER_ON)
        reset_power_on(cpu);

    unsigned eax = 0x600, ebx, ecx, edx;
    __get_cpuid(1, &eax, &ebx, &ecx, &edx);
    memset(cpu->gpr, 0, sizeof(cpu->gpr));
    cpu->gpr[GPR_RDX] = eax; /* family, model, stepping */
    cpu->gpr[GPR_RIP] = 0xFFF0;
    cpu->rflags = RFLAGS_FIXED;
    reset_segments(cpu);
    cpu->cr0 = (cpu->cr0 & (CR0_CD | CR0_NW)) | CR0_ET;
    cpu->cr2 = cpu->cr3 = cpu->cr4 = 0;
    cpu->efer = 0;
    memset(cpu->dr, 0, sizeof(cpu->dr));
    cpu->dr[6] = DR6_FIXED;
    cpu->dr[7] = DR7_FIXED;
    memset(cpu->pdpte, 0, sizeof(cpu->pdpte));
    cpu->activity = CPU_RUNNING;
    cpu->interrupt_shadow = false;
    cpu->nmi_blocked = false;
}

void cpu_start_at(struct cpu_state *cpu, uint8_t sipi_vector)
{
    cpu->seg[SEG_CS].selector = (uint16_t)(sipi_vector << 8);
    cpu->seg[SEG_CS].base = (uint64_t)sipi_vector << 12;
    cpu->gpr[GPR_RIP] = 0;
    cpu->activity = CPU_RUNNING;
}

/* ---- validation of a loaded state ---- */

static bool is_canonical(uint64_t address)
{
    return (uint64_t)((int64_t)(address << 16) >> 16) == address;
}

/* Bytes 0 to 7 each a memory type; 2 and 3 are reserved, 7 (UC-) exists in the PAT only (SDM vol. 3, 12.11.2.1, 12.12.2). */
static bool memory_types_valid(uint64_t types, unsigned highest)
{
    for (unsigned n = 0; n < 8; n++, types >>= 8) {
        unsigned type = types & 0xFF;
        if (type > highest || type == 2 || type == 3)
            return false;
    }
    return true;
}

static const char *check_control(const struct cpu_state *cpu)
{
    if (cpu->gpr[GPR_ZERO] || (cpu->rflags & ~RFLAGS_DEFINED) || !(cpu->rflags & RFLAGS_FIXED))
        return "registers or RFLAGS malformed";
    if ((cpu->cr0 & ~CR0_DEFINED) || !(cpu->cr0 & CR0_ET))
        return "CR0 has reserved bits";
    if ((cpu->cr0 & (CR0_PG | CR0_PE)) == CR0_PG || (cpu->cr0 & (CR0_NW | CR0_CD)) == CR0_NW)
        return "CR0 bits disagree";
    if ((cpu->cr4 & ~CR4_DEFINED) || (cpu->efer & ~EFER_DEFINED) || (cpu->cr3 & ~PHYSICAL_MASK))
        return "CR3, CR4 or EFER has reserved bits";
    bool lma = (cpu->cr0 & CR0_PG) && (cpu->efer & EFER_LME);
    if (lma != !!(cpu->efer & EFER_LMA) || (lma && !(cpu->cr4 & CR4_PAE)))
        return "EFER, CR0 and CR4 disagree about long mode";
    if ((cpu->cr4 & CR4_PCIDE) && !lma)
        return "CR4.PCIDE outside long mode";
    if (cpu->rflags & RFLAGS_VM && (lma || !(cpu->cr0 & CR0_PE)))
        return "virtual-8086 mode impossible here";
    for (unsigned n = 0; n < 4; n++)
        if (cpu->pdpte[n] & 1 && (cpu->pdpte[n] & ~PHYSICAL_MASK || cpu->pdpte[n] & 0x1E6))
            return "PDPTE has reserved bits";
    if (cpu->dr[4] || cpu->dr[5] || cpu->dr[6] >> 32 || cpu->dr[7] >> 32)
        return "debug registers malformed";
    if (cpu->activity > CPU_SHUTDOWN)
        return "unknown activity";
    return NULL;
}

static const char *check_segments(const struct cpu_state *cpu)
{
    bool lma = cpu->efer & EFER_LMA;
    bool real = !(cpu->cr0 & CR0_PE), v86 = cpu->rflags & RFLAGS_VM;
    unsigned cpl = cpu_cpl(cpu);

    for (unsigned s = 0; s < SEG_COUNT; s++) {
        const struct segment *seg = &cpu->seg[s];
        if (seg->attributes & ~SEG_ATTR_DEFINED)
            return "segment attributes malformed";
        if (lma ? !is_canonical(seg->base) : s != SEG_FS && s != SEG_GS && seg->base >> 32)
            return "segment base out of range";
        if (v86 && (seg->base != (uint64_t)seg->selector << 4 || seg->limit != 0xFFFF ||
                    seg->attributes != 0xF3 || seg->unusable))
            return "segment is not a virtual-8086 one";
    }
    const struct segment *cs = &cpu->seg[SEG_CS];
    if (real && cpl)
        return "privilege level in real mode";
    if (real || v86)
        return NULL;
    /* A task switch that cannot load CS may have ended in a shutdown. */
    if (cpu->activity != CPU_SHUTDOWN && (cs->unusable || !(cs->attributes & SEG_ATTR_P) || !(cs->attributes & SEG_ATTR_S)))
        return "CS is not a code segment";
    if (lma && (cs->attributes & SEG_ATTR_L) && (cs->attributes & SEG_ATTR_DB))
        return "CS.L and CS.D are both set";
    return NULL;
}

static const char *check_addresses(const struct cpu_state *cpu)
{
    const uint64_t canonical[] = {
        cpu->gdtr.base,           cpu->idtr.base,      cpu->ldtr.base,      cpu->tr.base,
        cpu->msr_lstar,           cpu->msr_cstar,      cpu->msr_sysenter_esp,
        cpu->msr_sysenter_eip,    cpu->msr_kernel_gs_base,
        cpu->seg[SEG_FS].base,    cpu->seg[SEG_GS].base,
    };
    for (unsigned n = 0; n < sizeof(canonical) / sizeof(canonical[0]); n++)
        if (!is_canonical(canonical[n]))
            return "address is not canonical";
    /* Execution may have come to the end of the lower half: the next fetch faults. */
    uint64_t rip = cpu->gpr[GPR_RIP];
    if (cpu_in_64bit_mode(cpu) ? !is_canonical(rip) && rip != LOWER_HALF_END : rip >> 32 != 0)
        return "RIP out of range";
    if ((cpu->ldtr.attributes | cpu->tr.attributes) & ~SEG_ATTR_DEFINED)
        return "LDTR or TR attributes malformed";
    return NULL;
}

static const char *check_msrs(const struct cpu_state *cpu)
{
    if (!memory_types_valid(cpu->msr_pat, 7))
        return "PAT has a reserved memory type";
    if (cpu->msr_mtrr_def_type & ~0xCFFull || !memory_types_valid(cpu->msr_mtrr_def_type & 0xFF, 6))
        return "MTRRdefType malformed";
    for (unsigned n = 0; n < 11; n++)
        if (!memory_types_valid(cpu->msr_mtrr_fixed[n], 6))
            return "fixed MTRR has a reserved memory type";
    for (unsigned n = 0; n < 8; n++)
        if (!memory_types_valid(cpu->msr_mtrr_base[n] & 0xFF, 6) ||
            cpu->msr_mtrr_base[n] & ~(PHYSICAL_MASK ^ 0xF00) ||
            cpu->msr_mtrr_mask[n] & ~(PHYSICAL_MASK ^ 0x7FF))
            return "variable MTRR malformed";
    return NULL;
}

static const char *check_simd(const struct cpu_state *cpu)
{
    uint64_t xcr0 = cpu->xcr0, possible = host_xcr0() | XCR0_X87 | XCR0_SSE;
    if (!(xcr0 & XCR0_X87) || (xcr0 & ~possible))
        return "XCR0 is not one that this host can run";
    if (((xcr0 & XCR0_AVX) && !(xcr0 & XCR0_SSE)) ||
        ((xcr0 & XCR0_AVX512) && ((xcr0 & XCR0_AVX512) != XCR0_AVX512 || !(xcr0 & XCR0_AVX))))
        return "XCR0 bits disagree";
    if (get64(cpu->xsave, XSAVE_BV) & ~possible)
        return "XSAVE image holds state that this host lacks";
    for (unsigned offset = XSAVE_COMP_BV; offset < XSAVE_HEADER_END; offset += 8)
        if (get64(cpu->xsave, offset))
            return "XSAVE header malformed";
    if (get32(cpu->xsave, XSAVE_MXCSR) & ~host_mxcsr_mask())
        return "MXCSR has reserved bits";
    return NULL;
}

static const char *check_loaded(const struct cpu_state *cpu)
{
    const char *(*const checks[])(const struct cpu_state *) = {
        check_control, check_segments, check_addresses, check_msrs, check_simd,
    };
    for (unsigned n = 0; n < sizeof(checks) / sizeof(checks[0]); n++) {
        const char *reason = checks[n](cpu);
        if (reason)
            return reason;
    }
    return NULL;
}

/* ---- the saved form ---- */

static void segment_state(struct segment *seg, struct state_io *io)
{
    state_u16(io, &seg->selector);
    state_u64(io, &seg->base);
    state_u32(io, &seg->limit);
    state_u16(io, &seg->attributes);
    state_bool(io, &seg->unusable);
}

static void u64s_state(uint64_t *values, unsigned count, struct state_io *io)
{
    for (unsigned n = 0; n < count; n++)
        state_u64(io, &values[n]);
}

static void msrs_state(struct cpu_state *cpu, struct state_io *io)
{
    uint64_t *const single[] = {
        &cpu->msr_star,         &cpu->msr_lstar,       &cpu->msr_cstar,
        &cpu->msr_sfmask,       &cpu->msr_kernel_gs_base, &cpu->msr_sysenter_cs,
        &cpu->msr_sysenter_esp, &cpu->msr_sysenter_eip, &cpu->msr_pat,
        &cpu->msr_tsc_aux,      &cpu->msr_tsc_adjust,  &cpu->msr_misc_enable,
        &cpu->msr_spec_ctrl,    &cpu->msr_mtrr_def_type, &cpu->msr_mcg_status,
        &cpu->msr_mcg_ctl,      &cpu->tsc_offset,
    };
    for (unsigned n = 0; n < sizeof(single) / sizeof(single[0]); n++)
        state_u64(io, single[n]);
    u64s_state(cpu->msr_mtrr_fixed, 11, io);
    u64s_state(cpu->msr_mtrr_base, 8, io);
    u64s_state(cpu->msr_mtrr_mask, 8, io);
}

int cpu_state_state(struct cpu_state *cpu, struct state_io *io)
{
    state_begin(io, "cpu", 1);
    u64s_state(cpu->gpr, GPR_SLOTS, io);
    state_u64(io, &cpu->rflags);
    for (unsigned s = 0; s < SEG_COUNT; s++)
        segment_state(&cpu->seg[s], io);
    segment_state(&cpu->ldtr, io);
    segment_state(&cpu->tr, io);
    state_u64(io, &cpu->gdtr.base);
    state_u16(io, &cpu->gdtr.limit);
    state_u64(io, &cpu->idtr.base);
    state_u16(io, &cpu->idtr.limit);
    uint64_t *const control[] = {&cpu->cr0, &cpu->cr2, &cpu->cr3, &cpu->cr4, &cpu->efer, &cpu->xcr0};
    for (unsigned n = 0; n < sizeof(control) / sizeof(control[0]); n++)
        state_u64(io, control[n]);
    u64s_state(cpu->dr, 8, io);
    u64s_state(cpu->pdpte, 4, io);
    msrs_state(cpu, io);
    uint8_t activity = (uint8_t)cpu->activity;
    state_u8(io, &activity);
    cpu->activity = activity;
    state_bool(io, &cpu->interrupt_shadow);
    state_bool(io, &cpu->nmi_blocked);
    state_bytes(io, cpu->xsave, sizeof(cpu->xsave));

    if (state_loading(io) && !state_failed(io)) {
        const char *reason = check_loaded(cpu);
        if (reason)
            state_fail(io, reason);
    }
    int result = state_end(io);
    if (state_loading(io) && result < 0)
        cpu_reset(cpu, CPU_RESET_POWER_ON); /* never leave a state that was refused */
    return result;
}
