/*
 * MSRs. The filter denies all but those that KVM itself keeps for the guest; each denied access, and each that KVM does not know or refuses, comes here
 * (KVM_CAP_X86_USER_SPACE_MSR). First the table: registers that are fields of cpu_state or constants, the same that the interpreter has; then the machine (local
 * APIC, paravirtual clock). The paravirtual clock is the machine's and not KVM's, so that it is one clock under every engine.
 * x2APIC's MSRs cannot be filtered: with the local APIC in the machine KVM refuses them itself, and they come here as invalid.
 * Threading: the vCPU's thread; the filter before the first vCPU is made.
 */
#include <stddef.h>
#include <string.h>

#include "engine/kvm/kvm_priv.h"
#include "state/inputs.h"

#define MTRR_VARIABLE 8u
#define MTRRCAP (MTRR_VARIABLE | 1u << 8 /* fixed */ | 1u << 10 /* write combining */)
#define MISC_ENABLE_FIXED 0x1800ull    /* no BTS, no PEBS */
#define MISC_ENABLE_WRITABLE 0x9ull    /* fast strings, thermal control */
#define MISC_ENABLE_KNOWN (MISC_ENABLE_FIXED | MISC_ENABLE_WRITABLE | 1ull << 7 | 1ull << 16 | 1ull << 18 | 1ull << 22 | 1ull << 34)

/* ---- the filter ---- */

/* One bit a register, 1: KVM's. */
#define READ KVM_MSR_FILTER_READ
#define WRITE KVM_MSR_FILTER_WRITE
static const struct {
    uint32_t flags, base, count;
    bool split_only;
} kvm_keeps[] = {
    {READ, 0x10, 1, false},                 /* TSC; a write moves TSC_ADJUST, which is ours */
    {READ | WRITE, 0x48, 2, false},         /* SPEC_CTRL, PRED_CMD */
    {WRITE, 0x10B, 1, false},               /* FLUSH_CMD */
    {READ | WRITE, 0x174, 3, false},        /* SYSENTER */
    {READ | WRITE, 0x277, 1, false},        /* PAT */
    {READ | WRITE, 0xC0000080, 5, false},   /* EFER, STAR, LSTAR, CSTAR, SFMASK */
    {READ | WRITE, 0xC0000100, 4, false},   /* FS, GS, kernel GS bases, TSC_AUX */
    {READ | WRITE, 0x1B, 1, true},          /* APIC_BASE */
    {READ | WRITE, 0x6E0, 1, true},         /* TSC_DEADLINE */
};

int kvm_msr_filter_set(struct engine *e, struct error *err)
{
    static const uint8_t all[] = {0xff};
    struct kvm_msr_filter filter = {.flags = KVM_MSR_FILTER_DEFAULT_DENY};
    struct kvm_enable_cap user = {.cap = KVM_CAP_X86_USER_SPACE_MSR,
                                  .args = {KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER}};
    unsigned n = 0;
    for (unsigned i = 0; i < sizeof kvm_keeps / sizeof *kvm_keeps; i++)
        if (e->split || !kvm_keeps[i].split_only)
            filter.ranges[n++] = (struct kvm_msr_filter_range){
                .flags = kvm_keeps[i].flags, .base = kvm_keeps[i].base, .nmsrs = kvm_keeps[i].count, .bitmap = (uint8_t *)(uintptr_t)all};
    int r = kvm_call(e->vm, KVM_ENABLE_CAP, &user);
    r = r ? r : kvm_call(e->vm, KVM_X86_SET_MSR_FILTER, &filter);
    return r ? error_set(err, r, "/dev/kvm refuses the filter of MSRs: %s", strerror(-r)) : 0;
}

/* ---- the table ---- */

struct msr;
typedef bool msr_write_fn(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value);

struct msr {
    uint32_t index, count;
    uint32_t offset;     /* of the first in struct cpu_state, `constant` otherwise */
    msr_write_fn *write; /* NULL: read-only */
    uint64_t bits;       /* writable bits, or the constant */
    bool constant;
};

static uint64_t *field(struct kvm_cpu *c, const struct msr *m, uint32_t index)
{
    return (uint64_t *)((char *)&c->v.cpu + m->offset) + (index - m->index);
}

static bool write_masked(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (value & ~m->bits)
        return false;
    *field(c, m, index) = value;
    return true;
}

static bool write_ignored(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return true;
}

static bool write_zero(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return value == 0;
}

/* DEBUGCTL: last branch records and branch stepping can be asked for and do nothing. */
static bool write_debugctl(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return !(value & ~3ull);
}

/* A write moves IA32_TSC_ADJUST by the same amount, and the other way round (SDM vol. 3, 17.17.3). */
static bool write_tsc(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    uint64_t delta = value - (inputs_tsc() + c->v.cpu.tsc_offset);
    c->v.cpu.tsc_offset += delta;
    c->v.cpu.msr_tsc_adjust += delta;
    return kvm_push_tsc_offset(c) == 0;
}

static bool write_tsc_adjust(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    c->v.cpu.tsc_offset += value - c->v.cpu.msr_tsc_adjust;
    c->v.cpu.msr_tsc_adjust = value;
    return kvm_push_tsc_offset(c) == 0;
}

static bool memory_types_valid(uint64_t value)
{
    for (unsigned n = 0; n < 64; n += 8) {
        unsigned type = value >> n & 0xFF;
        if (type > 6 || type == 2 || type == 3)
            return false;
    }
    return true;
}

static bool write_mtrr_fixed(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return memory_types_valid(value) && write_masked(c, m, index, value);
}

static bool write_mtrr_variable(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    uint64_t physical = (1ull << cpuid_physical_address_bits(c->v.cpuid)) - 1;
    unsigned n = (index - m->index) / 2;
    bool mask = index & 1;
    if (value & ~(physical & (mask ? ~0x7FFull : ~0xF00ull)) || (!mask && !memory_types_valid(value & 0xFF)))
        return false;
    *(mask ? &c->v.cpu.msr_mtrr_mask[n] : &c->v.cpu.msr_mtrr_base[n]) = value;
    return true;
}

static bool write_misc_enable(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    if (value & ~MISC_ENABLE_KNOWN)
        return false;
    *field(c, m, index) = (value & MISC_ENABLE_WRITABLE) | MISC_ENABLE_FIXED;
    return true;
}

static bool write_all_or_nothing(struct kvm_cpu *c, const struct msr *m, uint32_t index, uint64_t value)
{
    return (value == 0 || value == ~0ull) && write_masked(c, m, index, value);
}

#define AT(name) offsetof(struct cpu_state, name)
#define FIELD(number, n, name, writer, mask) {.index = number, .count = n, .offset = AT(name), .write = writer, .bits = mask}
#define CONSTANT(number, value, writer) {.index = number, .count = 1, .write = writer, .bits = value, .constant = true}
#define MSR_TSC 0x10
#define MSR_ARCH_CAPABILITIES 0x10A
#define MSR_MTRR_VARIABLE 0x200

static const struct msr msr_table[] = {
    {MSR_TSC, 1, .write = write_tsc},
    CONSTANT(0x17, 0, NULL),          /* PLATFORM_ID */
    CONSTANT(0x34, 0, NULL),          /* SMI_COUNT */
    CONSTANT(0x3A, 1, NULL),          /* FEATURE_CONTROL: locked */
    FIELD(0x3B, 1, msr_tsc_adjust, write_tsc_adjust, 0),
    CONSTANT(0x79, 0, write_ignored), /* BIOS_UPDT_TRIG */
    CONSTANT(0x8B, 1ull << 32, write_zero), /* BIOS_SIGN_ID: a microcode revision */
    CONSTANT(0xCE, 0, NULL),          /* PLATFORM_INFO */
    CONSTANT(0xFE, MTRRCAP, NULL),
    {MSR_ARCH_CAPABILITIES, 1},       /* the truth about this processor, which runs the guest */
    CONSTANT(0x179, 1ull << 8, NULL), /* MCG_CAP: MCG_CTL, no banks */
    FIELD(0x17A, 1, msr_mcg_status, write_masked, 7),
    FIELD(0x17B, 1, msr_mcg_ctl, write_all_or_nothing, ~0ull),
    CONSTANT(0x198, 0, NULL),         /* PERF_STATUS */
    FIELD(0x1A0, 1, msr_misc_enable, write_misc_enable, 0),
    CONSTANT(0x1D9, 0, write_debugctl),
    {MSR_MTRR_VARIABLE, 2 * MTRR_VARIABLE, .write = write_mtrr_variable},
    FIELD(0x250, 1, msr_mtrr_fixed[0], write_mtrr_fixed, ~0ull),
    FIELD(0x258, 2, msr_mtrr_fixed[1], write_mtrr_fixed, ~0ull),
    FIELD(0x268, 8, msr_mtrr_fixed[3], write_mtrr_fixed, ~0ull),
    FIELD(0x2FF, 1, msr_mtrr_def_type, write_mtrr_fixed, 0xCFF),
    /* AMD's configuration registers that operating systems look at. */
    CONSTANT(0xC0010010, 0, write_ignored),
    CONSTANT(0xC0010015, 1u << 24, write_ignored), /* HWCR: TscFreqSel */
    CONSTANT(0xC001001F, 0, write_ignored),
    CONSTANT(0xC0010055, 0, write_ignored),
    CONSTANT(0xC0010114, 1u << 4, write_ignored), /* VM_CR: SVMDIS */
    CONSTANT(0xC0011029, 2, write_ignored),       /* DE_CFG: LFENCE serialises */
};

/* Which processor's they are: AMD's are above 0xC0010000. */
static const struct msr *msr_find(struct kvm_cpu *c, uint32_t index)
{
    bool amd = cpuid_query(c->v.cpuid, &c->v.cpu, 0, 0, 0).ebx == 0x68747541; /* "Auth" */
    if (index >= 0xC0010000 && !amd)
        return NULL;
    for (unsigned n = 0; n < sizeof msr_table / sizeof *msr_table; n++)
        if (index - msr_table[n].index < msr_table[n].count)
            return &msr_table[n];
    return NULL;
}

static uint64_t msr_value(struct kvm_cpu *c, const struct msr *m, uint32_t index)
{
    unsigned n = (index - m->index) / 2;
    if (m->constant)
        return m->bits;
    if (m->index == MSR_TSC)
        return inputs_tsc() + c->v.cpu.tsc_offset;
    if (m->index == MSR_ARCH_CAPABILITIES)
        return c->engine->arch_capabilities;
    if (m->index == MSR_MTRR_VARIABLE)
        return (index & 1) ? c->v.cpu.msr_mtrr_mask[n] : c->v.cpu.msr_mtrr_base[n];
    return *field(c, m, index);
}

void kvm_msr_exit(struct kvm_cpu *c)
{
    bool write = c->run->exit_reason == KVM_EXIT_X86_WRMSR, known;
    uint32_t index = c->run->msr.index;
    uint64_t value = c->run->msr.data;
    const struct msr *m = msr_find(c, index);
    vcpu_count(&c->v, write ? COUNTER_msr_writes : COUNTER_msr_reads);
    if (write) {
        known = m ? m->write && m->write(c, m, index, value) : c->v.host_ops->msr_write(c->v.host, index, value) == 0;
    } else if (m) {
        value = msr_value(c, m, index);
        known = true;
    } else {
        known = c->v.host_ops->msr_read(c->v.host, index, &value) == 0;
    }
    if (!write && known)
        value = cpuid_msr_value(c->v.cpuid, index, value);
    if (!known) {
        char name[28];
        snprintf(name, sizeof name, "%s %#x", write ? "write" : "read", index);
        vcpu_count_missing(&c->v, name);
    }
    c->run->msr.data = value;
    c->run->msr.error = !known;
}
