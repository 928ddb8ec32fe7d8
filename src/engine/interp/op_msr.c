/*
 * RDMSR and WRMSR.
 *
 * Registers that are plain fields of cpu_state are rows of a table: where, which bits may be written, what a valid value looks like. The few with behaviour have functions. What is not in
 * the table belongs to the machine (local APIC, paravirtual clock) and is asked for through host_ops; what the machine does not know either raises #GP(0).
 * IA32_ARCH_CAPABILITIES says that no speculation mitigation is needed: an interpreted guest's branches and loads are not the host's.
 * Sources: SDM vol. 4. Threading: as interp_priv.h.
 */
#include "engine/interp/system_priv.h"

#include "state/inputs.h"
#include "util/log.h"

#define MSR_TSC_DEADLINE 0x6e0
#define MSR_X2APIC 0x800u
#define MSR_X2APIC_COUNT 0x100u
#define VARIABLE_MTRRS 8
#define MTRRCAP (VARIABLE_MTRRS | 1u << 8 /* fixed */ | 1u << 10 /* write combining */)
#define MICROCODE_REVISION (1ull << 32) /* IA32_BIOS_SIGN_ID keeps it in the upper half */
#define MCG_CAP (1ull << 8)             /* MCG_CTL_P, no banks */
#define MISC_ENABLE_FIXED 0x1800ull     /* no BTS, no PEBS */
#define MISC_ENABLE_WRITABLE 0x9ull     /* fast strings, thermal control */
#define MISC_ENABLE_KNOWN (MISC_ENABLE_FIXED | MISC_ENABLE_WRITABLE | 1ull << 7 | 1ull << 16 | 1ull << 18 | 1ull << 22 | 1ull << 34)
#define SPEC_CTRL_WRITABLE 0x407ull /* IBRS, STIBP, SSBD, BHI_DIS_S: remembered, without effect */

#define ARCH_CAPABILITIES                                                                          \
    (1ull << 0 /* RDCL_NO */ | 1ull << 1 /* IBRS_ALL */ | 1ull << 3 /* SKIP_L1DFL_VMENTRY */ |     \
     1ull << 4 /* SSB_NO */ | 1ull << 5 /* MDS_NO */ | 1ull << 6 /* IF_PSCHANGE_MC_NO */ |         \
     1ull << 8 /* TAA_NO */ | 1ull << 13 /* SBDR_SSDP_NO */ | 1ull << 14 /* FBSDP_NO */ |          \
     1ull << 15 /* PSDP_NO */ | 1ull << 20 /* BHI_NO */ | 1ull << 24 /* PBRSB_NO */ |              \
     1ull << 26 /* GDS_NO */ | 1ull << 27 /* RFDS_NO */ | 1ull << 62 /* ITS_NO */)

struct msr;
typedef bool msr_read_fn(struct icpu *c, const struct msr *m, uint32_t index, uint64_t *value);
typedef bool msr_write_fn(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value);

enum msr_owner { MSR_ANY, MSR_INTEL, MSR_AMD };

struct msr {
    uint32_t index, count;
    msr_read_fn *read; /* NULL: write-only */
    msr_write_fn *write; /* NULL: read-only */
    uint32_t offset; /* of the first in struct cpu_state, uint64_t each */
    uint64_t bits;   /* writable bits, or the constant */
    enum msr_owner owner;
};

/* ---- accessors ---- */

static uint64_t *field(struct icpu *c, const struct msr *m, uint32_t index)
{
    return (uint64_t *)((char *)&c->v.cpu + m->offset) + (index - m->index);
}

static bool read_field(struct icpu *c, const struct msr *m, uint32_t index, uint64_t *value)
{
    *value = *field(c, m, index);
    return true;
}

static bool write_masked(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (value & ~m->bits)
        return false;
    *field(c, m, index) = value;
    return true;
}

static bool write_canonical(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (!gva_is_canonical(value))
        return false;
    *field(c, m, index) = value;
    return true;
}

static bool read_constant(struct icpu *c, const struct msr *m, uint32_t index, uint64_t *value)
{
    *value = m->bits;
    return true;
}

static bool write_ignored(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return true;
}

/* ---- time stamp counter ---- */

static uint64_t tsc_now(struct icpu *c)
{
    simd_save(c);
    return inputs_tsc() + c->v.cpu.tsc_offset;
}

static bool read_tsc(struct icpu *c, const struct msr *m, uint32_t index, uint64_t *value)
{
    *value = tsc_now(c);
    return true;
}

/* A write moves IA32_TSC_ADJUST by the same amount, and the other way round (SDM vol. 3, 17.17.3). */
static bool write_tsc(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    uint64_t delta = value - tsc_now(c);
    c->v.cpu.tsc_offset += delta;
    c->v.cpu.msr_tsc_adjust += delta;
    return true;
}

static bool write_tsc_adjust(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    c->v.cpu.tsc_offset += value - c->v.cpu.msr_tsc_adjust;
    c->v.cpu.msr_tsc_adjust = value;
    return true;
}

/* ---- modes and bases ---- */

static bool write_efer(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    struct cpu_state *s = &c->v.cpu;
    simd_save(c);
    if (value & ~cpuid_efer_allowed(c->v.cpuid))
        return false;
    if (((value ^ s->efer) & EFER_LME) && (s->cr0 & CR0_PG))
        return false;
    s->efer = (value & ~EFER_LMA) | (s->efer & EFER_LMA);
    interp_mode_changed(c);
    return true;
}

static bool write_segment_base(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (!write_canonical(c, m, m->index, value))
        return false;
    interp_mode_changed(c);
    return true;
}

/* ---- memory types ---- */

static bool memory_type_valid(uint64_t type, unsigned highest)
{
    return type <= highest && type != 2 && type != 3;
}

static bool memory_types_valid(uint64_t value, unsigned highest)
{
    for (unsigned n = 0; n < 64; n += 8)
        if (!memory_type_valid(value >> n & 0xFF, highest))
            return false;
    return true;
}

static bool write_pat(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (!memory_types_valid(value, 7))
        return false;
    c->v.cpu.msr_pat = value;
    return true;
}

static bool write_mtrr_fixed(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (!memory_types_valid(value, 6))
        return false;
    *field(c, m, index) = value;
    return true;
}

/* The eleven fixed ranges' numbers are not consecutive; each row of the table says which field is its first. */
static bool write_mtrr_def_type(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if ((value & ~0xCFFull) || !memory_type_valid(value & 0xFF, 6))
        return false;
    c->v.cpu.msr_mtrr_def_type = value;
    return true;
}

static bool read_mtrr_variable(struct icpu *c, const struct msr *m, uint32_t index, uint64_t *value)
{
    unsigned n = (index - m->index) / 2;
    *value = (index & 1) ? c->v.cpu.msr_mtrr_mask[n] : c->v.cpu.msr_mtrr_base[n];
    return true;
}

static bool write_mtrr_variable(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    unsigned n = (index - m->index) / 2;
    simd_save(c);
    uint64_t physical = (1ull << cpuid_physical_address_bits(c->v.cpuid)) - 1;
    if (index & 1) {
        if (value & ~(physical & ~0x7FFull))
            return false;
        c->v.cpu.msr_mtrr_mask[n] = value;
    } else {
        if ((value & ~(physical & ~0xF00ull)) || !memory_type_valid(value & 0xFF, 6))
            return false;
        c->v.cpu.msr_mtrr_base[n] = value;
    }
    return true;
}

/* ---- the rest ---- */

static bool write_misc_enable(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (value & ~MISC_ENABLE_KNOWN)
        return false;
    c->v.cpu.msr_misc_enable = (value & MISC_ENABLE_WRITABLE) | MISC_ENABLE_FIXED;
    return true;
}

static bool write_pred_cmd(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return !(value & ~1ull); /* IBPB: no predictor to clear */
}

static bool write_all_or_nothing(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (value != 0 && value != ~0ull)
        return false;
    *field(c, m, index) = value;
    return true;
}

static bool write_zero(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return value == 0;
}

/* Maximum non-turbo ratio, in units of 100 MHz. */
static bool read_platform_info(struct icpu *c, const struct msr *m, uint32_t index, uint64_t *value)
{
    simd_save(c);
    uint32_t mhz = cpuid_query(c->v.cpuid, &c->v.cpu, c->v.index, 0x16, 0).eax;
    *value = (uint64_t)(mhz / 100 & 0xFF) << 8;
    return true;
}

/* DEBUGCTL: last branch records and branch stepping can be asked for and do nothing. */
static bool write_debugctl(struct icpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return !(value & ~3ull);
}

#define AT(name) ((uint32_t)offsetof(struct cpu_state, name))
#define FIELD(number, n, name, writer, mask)                                                       \
    {.index = number, .count = n, .read = read_field, .write = writer, .offset = AT(name), .bits = mask}
#define CONSTANT(number, n, value, writer)                                                         \
    {.index = number, .count = n, .read = read_constant, .write = writer, .bits = value}

static const struct msr msr_table[] = {
    {0x10, 1, read_tsc, write_tsc},
    CONSTANT(0x17, 1, 0, NULL),                       /* PLATFORM_ID */
    CONSTANT(0x34, 1, 0, NULL),                       /* SMI_COUNT */
    CONSTANT(0x3A, 1, 1, NULL),                       /* FEATURE_CONTROL: locked */
    FIELD(0x3B, 1, msr_tsc_adjust, write_tsc_adjust, 0),
    {0x48, 1, read_field, write_masked, AT(msr_spec_ctrl), SPEC_CTRL_WRITABLE, MSR_INTEL},
    {0x49, 1, NULL, write_pred_cmd, .owner = MSR_INTEL},
    {0x79, 1, NULL, write_ignored}, /* BIOS_UPDT_TRIG */
    CONSTANT(0x8B, 1, MICROCODE_REVISION, write_zero), /* BIOS_SIGN_ID */
    {0xCE, 1, read_platform_info, NULL, .owner = MSR_INTEL},
    CONSTANT(0xFE, 1, MTRRCAP, NULL),
    {0x10A, 1, read_constant, NULL, .bits = ARCH_CAPABILITIES, .owner = MSR_INTEL},
    FIELD(0x174, 1, msr_sysenter_cs, write_masked, 0xFFFFFFFF),
    FIELD(0x175, 1, msr_sysenter_esp, write_canonical, 0),
    FIELD(0x176, 1, msr_sysenter_eip, write_canonical, 0),
    CONSTANT(0x179, 1, MCG_CAP, NULL),
    FIELD(0x17A, 1, msr_mcg_status, write_masked, 7),
    FIELD(0x17B, 1, msr_mcg_ctl, write_all_or_nothing, 0),
    CONSTANT(0x198, 1, 0, NULL), /* PERF_STATUS */
    FIELD(0x1A0, 1, msr_misc_enable, write_misc_enable, 0),
    CONSTANT(0x1D9, 1, 0, write_debugctl),
    {0x200, 2 * VARIABLE_MTRRS, read_mtrr_variable, write_mtrr_variable},
    FIELD(0x250, 1, msr_mtrr_fixed[0], write_mtrr_fixed, 0),
    FIELD(0x258, 2, msr_mtrr_fixed[1], write_mtrr_fixed, 0),
    FIELD(0x268, 8, msr_mtrr_fixed[3], write_mtrr_fixed, 0),
    FIELD(0x277, 1, msr_pat, write_pat, 0),
    FIELD(0x2FF, 1, msr_mtrr_def_type, write_mtrr_def_type, 0),
    FIELD(0xC0000080, 1, efer, write_efer, 0),
    FIELD(0xC0000081, 1, msr_star, write_masked, ~0ull),
    FIELD(0xC0000082, 1, msr_lstar, write_canonical, 0),
    FIELD(0xC0000083, 1, msr_cstar, write_canonical, 0),
    FIELD(0xC0000084, 1, msr_sfmask, write_masked, 0xFFFFFFFF),
    FIELD(0xC0000100, 1, seg[SEG_FS].base, write_segment_base, 0),
    FIELD(0xC0000101, 1, seg[SEG_GS].base, write_segment_base, 0),
    FIELD(0xC0000102, 1, msr_kernel_gs_base, write_canonical, 0),
    FIELD(0xC0000103, 1, msr_tsc_aux, write_masked, 0xFFFFFFFF),
    /* AMD's configuration registers that operating systems look at; see the BIOS and Kernel Developer's Guides. */
    {0xC0010010, 1, read_constant, write_ignored, .owner = MSR_AMD},                   /* SYSCFG */
    {0xC0010015, 1, read_constant, write_ignored, .bits = 1u << 24, .owner = MSR_AMD}, /* HWCR: TscFreqSel */
    {0xC001001A, 1, read_constant, write_ignored, .owner = MSR_AMD},                   /* TOP_MEM */
    {0xC001001D, 1, read_constant, write_ignored, .owner = MSR_AMD},                   /* TOP_MEM2 */
    {0xC001001F, 1, read_constant, write_ignored, .owner = MSR_AMD},                   /* NB_CFG */
    {0xC0010055, 1, read_constant, write_ignored, .owner = MSR_AMD},                   /* INT_PENDING */
    {0xC0010114, 1, read_constant, write_ignored, .bits = 1u << 4, .owner = MSR_AMD},  /* VM_CR: SVMDIS */
    {0xC0011020, 1, read_constant, write_ignored, .owner = MSR_AMD},                   /* LS_CFG */
    {0xC0011022, 2, read_constant, write_ignored, .owner = MSR_AMD},                   /* DC_CFG, TW_CFG */
    {0xC0011029, 2, read_constant, write_ignored, .bits = 2, .owner = MSR_AMD},        /* DE_CFG: LFENCE serialises */
};

static const struct msr *msr_find(struct icpu *c, uint32_t index)
{
    if (index == MSR_TSC_DEADLINE || index - MSR_X2APIC < MSR_X2APIC_COUNT) /* the most frequent ones, the machine's */
        return NULL;
    for (unsigned n = 0; n < sizeof(msr_table) / sizeof(msr_table[0]); n++) {
        const struct msr *m = &msr_table[n];
        if (index - m->index >= m->count)
            continue;
        return m->owner == MSR_ANY || (m->owner == MSR_AMD) == c->amd ? m : NULL;
    }
    return NULL;
}

static _Noreturn void msr_fault(struct icpu *c, const char *what, uint32_t index)
{
    char name[28];
    simd_save(c);
    snprintf(name, sizeof(name), "%s %#x", what, index);
    vcpu_count_missing(&c->v, name);
    TRACE(c, "%s %#x: #GP\n", what, index);
    raise_gp0(c);
}

void op_rdmsr(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    uint32_t index = (uint32_t)s->gpr[GPR_RCX];
    uint64_t value = 0;
    bool valid;
    require_cpl0(c);
    vcpu_count(&c->v, COUNTER_msr_reads);
    const struct msr *m = msr_find(c, index);
    if (m) {
        valid = m->read && m->read(c, m, index, &value);
    } else {
        simd_save(c);
        valid = c->v.host_ops->msr_read(c->v.host, index, &value) == 0;
    }
    if (!valid)
        msr_fault(c, "read", index);
    value = cpuid_msr_value(c->v.cpuid, index, value);
    TRACE(c, "rdmsr %#x = %#llx\n", index, (unsigned long long)value);
    s->gpr[GPR_RAX] = (uint32_t)value;
    s->gpr[GPR_RDX] = value >> 32;
}

void op_wrmsr(struct icpu *c, const struct insn *i)
{
    struct cpu_state *s = &c->v.cpu;
    uint32_t index = (uint32_t)s->gpr[GPR_RCX];
    uint64_t value = (uint32_t)s->gpr[GPR_RAX] | s->gpr[GPR_RDX] << 32;
    bool valid;
    require_cpl0(c);
    vcpu_count(&c->v, COUNTER_msr_writes);
    const struct msr *m = msr_find(c, index);
    TRACE(c, "wrmsr %#x = %#llx\n", index, (unsigned long long)value);
    if (m) {
        valid = m->write && m->write(c, m, index, value);
    } else {
        simd_save(c);
        valid = c->v.host_ops->msr_write(c->v.host, index, value) == 0;
    }
    if (!valid)
        msr_fault(c, "write", index);
}
