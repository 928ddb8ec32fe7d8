/*
 * CPUID for guests.
 *
 * The table is the host's CPUID with every feature that an engine does not handle masked out (allow lists below: a bit not named is absent), what the
 * engines implement themselves forced on, topology rewritten for one package of cpu_count cores with one thread each, and hypervisor leaves added.
 * Features that need state the host's XCR0 does not enable are dropped with it.
 * Sources: SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst for 0x4000xxxx.
 * Threading: immutable once vCPUs run.
 */
#include "arch/cpuid.h"

#include <cpuid.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arch/host.h"
#include "state/state.h"

#define TABLE_ENTRIES 160
#define BIT(n) (1u << (n))
#define ANY_SUBLEAF CPUID_ANY_SUBLEAF

struct entry {
    uint32_t leaf, subleaf;
    struct cpuid_regs regs;
};

struct cpuid_table {
    struct entry entries[TABLE_ENTRIES];
    unsigned count;
    bool intel;
    unsigned cpu_count, core_bits;
    uint32_t max_basic, max_extended;
    uint64_t xcr0, cr4, efer;
    unsigned physical_bits;
    struct msr_mask msr[CPUID_MSR_MASKS_MAX];
    unsigned msr_count;
};

#define MAX_HYPERVISOR 0x40000010u

/* Leaf 1. Absent on purpose: MONITOR, VMX, SMX, EIST, thermal, PDCM, VME (no virtual interrupts in virtual-8086 mode), PSN, DS. */
#define L1_ECX_HOST                                                                                \
    (BIT(0) | BIT(1) | BIT(9) | BIT(12) | BIT(13) | BIT(19) | BIT(20) | BIT(22) | BIT(23) |        \
     BIT(25) | BIT(26) | BIT(28) | BIT(29) | BIT(30))
#define L1_ECX_FORCED (BIT(17) /* PCID */ | BIT(21) /* x2APIC */ | BIT(24) /* deadline */ | BIT(31))
#define L1_ECX_OSXSAVE BIT(27)
#define L1_EDX_HOST (BIT(0) | BIT(8) | BIT(15) | BIT(19) | BIT(23) | BIT(24) | BIT(25) | BIT(26) | BIT(27))
#define L1_EDX_FORCED                                                                              \
    (BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(7) | BIT(9) | BIT(11) | BIT(12) | BIT(13) |  \
     BIT(14) | BIT(16) | BIT(17))
#define L1_EDX_HTT BIT(28)
#define L1_ECX_XSAVE BIT(26)
#define L1_ECX_RDRAND BIT(30)
#define L1_ECX_NEEDS_AVX (BIT(12) | BIT(28) | BIT(29))

/* Leaf 7.0. */
#define L7_EBX_HOST                                                                                \
    (BIT(3) | BIT(5) | BIT(6) | BIT(8) | BIT(9) | BIT(13) | L7_EBX_AVX512 | BIT(18) | BIT(19) |    \
     BIT(23) | BIT(24) | BIT(29))
#define L7_EBX_AVX512 (BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31))
#define L7_EBX_RDSEED BIT(18)
#define L7_EBX_FORCED                                                                              \
    (BIT(0) /* FSGSBASE */ | BIT(1) /* TSC_ADJUST */ | BIT(7) /* SMEP */ | BIT(10) /* INVPCID */ | \
     BIT(20) /* SMAP */)
#define L7_ECX_AVX512 (BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14))
#define L7_ECX_AVX (BIT(9) | BIT(10)) /* VAES, VPCLMULQDQ */
#define L7_ECX_HOST (L7_ECX_AVX512 | L7_ECX_AVX | BIT(8) | BIT(27)) /* GFNI, MOVDIRI */
#define L7_ECX_FORCED (BIT(2) /* UMIP */ | BIT(22) /* RDPID */)
#define L7_EDX_AVX512 (BIT(8) | BIT(23))
#define L7_EDX_HOST (L7_EDX_AVX512 | BIT(4))
#define L7_EDX_FORCED BIT(14) /* SERIALIZE */
/* Speculation control is shown to Intel guests only, together with IA32_ARCH_CAPABILITIES saying that nothing is needed. */
#define L7_EDX_INTEL (BIT(26) /* IBRS, IBPB */ | BIT(27) /* STIBP */ | BIT(29) | BIT(31) /* SSBD */)
#define AUTOMATIC_IBRS BIT(8) /* 0x80000021.EAX */
#define L7_1_EAX_HOST (BIT(4) | BIT(5)) /* AVX-VNNI, AVX512_BF16 */
#define L7_1_EAX_AVX BIT(4)
#define L7_1_EAX_AVX512 BIT(5)
/* BHI_CTRL, MCDT_NO. Linux ignores BHI_NO, and without BHI_CTRL clears the branch history in software at each system call. */
#define L7_2_EDX (BIT(4) | BIT(5))

/* Leaf 0x80000001. */
#define E1_ECX_HOST (BIT(5) | BIT(6) | BIT(7) | BIT(8) | E1_ECX_AVX)
#define E1_ECX_AVX (BIT(11) | BIT(16)) /* XOP, FMA4 */
#define E1_ECX_FORCED BIT(0)           /* LAHF in 64-bit mode */
#define E1_ECX_TOPOEXT BIT(22)
#define E1_EDX_HOST BIT(22) /* MMXEXT */
#define E1_EDX_FORCED (BIT(11) | BIT(20) | BIT(26) | BIT(27) | BIT(29))
#define E1_EDX_LEAF1_COPY 0x0183F3FFu /* AMD repeats these bits of leaf 1 */

static struct cpuid_regs host_cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct cpuid_regs r;
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
    return r;
}

static struct cpuid_regs *add(struct cpuid_table *t, uint32_t leaf, uint32_t subleaf, struct cpuid_regs regs)
{
    if (t->count == TABLE_ENTRIES)
        abort(); /* the builders below are bounded: a host invariant */
    struct entry *e = &t->entries[t->count++];
    *e = (struct entry){leaf, subleaf, regs};
    return &e->regs;
}

static const struct cpuid_regs *find(const struct cpuid_table *t, uint32_t leaf, uint32_t subleaf)
{
    for (unsigned n = 0; n < t->count; n++)
        if (t->entries[n].leaf == leaf &&
            (t->entries[n].subleaf == subleaf || t->entries[n].subleaf == ANY_SUBLEAF))
            return &t->entries[n].regs;
    return NULL;
}

static bool has_avx(const struct cpuid_table *t)
{
    return t->xcr0 & XCR0_AVX;
}

static bool has_avx512(const struct cpuid_table *t)
{
    return (t->xcr0 & XCR0_AVX512) == XCR0_AVX512;
}

/* ---- basic leaves ---- */

static void build_features(struct cpuid_table *t, const struct cpuid_config *config)
{
    struct cpuid_regs h = host_cpuid(1, 0), r;
    r.eax = h.eax;
    r.ebx = (h.ebx & 0xFF00) | t->cpu_count << 16; /* CLFLUSH line size, logical processors */
    r.ecx = (h.ecx & L1_ECX_HOST) | L1_ECX_FORCED;
    r.edx = (h.edx & L1_EDX_HOST) | L1_EDX_FORCED;
    if (!t->xcr0)
        r.ecx &= ~L1_ECX_XSAVE;
    if (!has_avx(t))
        r.ecx &= ~L1_ECX_NEEDS_AVX;
    if (config->no_random)
        r.ecx &= ~L1_ECX_RDRAND;
    if (t->cpu_count > 1)
        r.edx |= L1_EDX_HTT;
    add(t, 1, ANY_SUBLEAF, r);

    bool present = host_cpuid(0, 0).eax >= 7;
    h = present ? host_cpuid(7, 0) : (struct cpuid_regs){0};
    uint32_t subleaves = h.eax;
    r.eax = t->intel ? 2 : present && subleaves >= 1 ? 1 : 0;
    r.ebx = (h.ebx & L7_EBX_HOST) | L7_EBX_FORCED;
    r.ecx = (h.ecx & L7_ECX_HOST) | L7_ECX_FORCED;
    r.edx = (h.edx & L7_EDX_HOST) | L7_EDX_FORCED | (t->intel ? L7_EDX_INTEL : 0);
    if (!has_avx(t)) {
        r.ebx &= ~BIT(5);
        r.ecx &= ~L7_ECX_AVX;
    }
    if (!has_avx512(t)) {
        r.ebx &= ~L7_EBX_AVX512;
        r.ecx &= ~L7_ECX_AVX512;
        r.edx &= ~L7_EDX_AVX512;
    }
    if (config->no_random)
        r.ebx &= ~L7_EBX_RDSEED;
    add(t, 7, 0, r);
    if (subleaves >= 1) {
        r = (struct cpuid_regs){.eax = host_cpuid(7, 1).eax & L7_1_EAX_HOST};
        if (!has_avx(t))
            r.eax &= ~L7_1_EAX_AVX;
        if (!has_avx512(t))
            r.eax &= ~L7_1_EAX_AVX512;
        add(t, 7, 1, r);
    }
    if (t->intel)
        add(t, 7, 2, (struct cpuid_regs){.edx = L7_2_EDX});
}

/* Leaf 4 and 0x8000001D have one layout. Levels 1 and 2 belong to a core, the rest to the package. */
static void build_caches(struct cpuid_table *t, uint32_t leaf)
{
    for (uint32_t n = 0; n < 8; n++) {
        struct cpuid_regs r = host_cpuid(leaf, n);
        unsigned type = r.eax & 0x1F, level = r.eax >> 5 & 7;
        if (type == 0)
            break;
        uint32_t sharing = level >= 3 ? (1u << t->core_bits) - 1 : 0;
        r.eax = (r.eax & 0x3FFF) | sharing << 14;
        if (leaf == 4) /* 6-bit field: cores in the package, rounded up to a power of two */
            r.eax |= ((t->core_bits > 6 ? 64u : 1u << t->core_bits) - 1) << 26;
        add(t, leaf, n, r);
    }
}

static void build_topology(struct cpuid_table *t)
{
    static const uint32_t leaves[] = {0xB, 0x1F};
    for (unsigned n = 0; n < 2; n++) {
        if (leaves[n] > t->max_basic)
            continue;
        add(t, leaves[n], 0, (struct cpuid_regs){0, 1, 1 << 8, 0});
        add(t, leaves[n], 1, (struct cpuid_regs){t->core_bits, t->cpu_count, 2 << 8 | 1, 0});
    }
}

static void build_xsave(struct cpuid_table *t)
{
    if (!t->xcr0)
        return;
    add(t, 0xD, 0, (struct cpuid_regs){.eax = (uint32_t)t->xcr0, .edx = (uint32_t)(t->xcr0 >> 32)});
    /* XSAVEOPT, XSAVEC, XGETBV with ECX = 1; no XSAVES. */
    add(t, 0xD, 1, (struct cpuid_regs){.eax = host_cpuid(0xD, 1).eax & 7});
    for (unsigned n = 2; n < 63; n++)
        if (t->xcr0 >> n & 1) {
            struct cpuid_regs r = host_cpuid(0xD, n);
            r.ecx &= 2; /* alignment in the compacted form */
            r.edx = 0;
            add(t, 0xD, n, r);
        }
}

/* The best fraction ebx/eax for tsc/crystal whose numerator times the crystal's kHz stays within 32 bits, as Linux multiplies
 * them (continued fractions). */
static void build_frequencies(struct cpuid_table *t, const struct cpuid_config *config)
{
    uint64_t crystal_khz = config->apic_bus_hz / 1000, tsc_khz = config->tsc_khz;
    if (!crystal_khz || !tsc_khz || config->apic_bus_hz >> 32)
        return;
    uint64_t limit = 0xFFFFFFFFull / crystal_khz;
    uint64_t a = tsc_khz, b = crystal_khz, n0 = 0, d0 = 1, n1 = 1, d1 = 0;
    while (b) {
        uint64_t q = a / b, rest = a % b, n2 = q * n1 + n0, d2 = q * d1 + d0;
        if (n2 > limit)
            break;
        n0 = n1, d0 = d1, n1 = n2, d1 = d2, a = b, b = rest;
    }
    if (d1 && n1)
        add(t, 0x15, ANY_SUBLEAF,
            (struct cpuid_regs){(uint32_t)d1, (uint32_t)n1, (uint32_t)config->apic_bus_hz, 0});
    uint32_t mhz = (uint32_t)(tsc_khz / 1000) & 0xFFFF;
    add(t, 0x16, ANY_SUBLEAF, (struct cpuid_regs){mhz, mhz, 100, 0});
}

static void build_basic(struct cpuid_table *t, const struct cpuid_config *config)
{
    struct cpuid_regs r = host_cpuid(0, 0);
    uint32_t least = t->intel ? 0x16 : 0xD;
    t->max_basic = r.eax < least ? least : r.eax > 0x1F ? 0x1F : r.eax;
    uint32_t host_max = r.eax;
    r.eax = t->max_basic;
    add(t, 0, ANY_SUBLEAF, r);
    build_features(t, config);
    if (host_max >= 2)
        add(t, 2, ANY_SUBLEAF, host_cpuid(2, 0));
    if (t->intel && host_max >= 4)
        build_caches(t, 4);
    add(t, 6, ANY_SUBLEAF, (struct cpuid_regs){.eax = BIT(2)}); /* ARAT: the APIC timer always runs */
    build_topology(t);
    build_xsave(t);
    build_frequencies(t, config);
}

/* ---- extended leaves ---- */

static void build_extended_features(struct cpuid_table *t)
{
    struct cpuid_regs h = host_cpuid(0x80000001, 0), r;
    r.eax = h.eax;
    r.ebx = h.ebx;
    r.ecx = (h.ecx & E1_ECX_HOST) | E1_ECX_FORCED;
    r.edx = (h.edx & E1_EDX_HOST) | E1_EDX_FORCED;
    if (!has_avx(t))
        r.ecx &= ~E1_ECX_AVX;
    if (!t->intel) {
        r.edx |= find(t, 1, 0)->edx & E1_EDX_LEAF1_COPY;
        if (t->max_extended >= 0x8000001E)
            r.ecx |= E1_ECX_TOPOEXT;
        if (t->cpu_count > 1)
            r.ecx |= BIT(1); /* CmpLegacy: HTT means cores */
    }
    add(t, 0x80000001, ANY_SUBLEAF, r);
}

static void build_address_sizes(struct cpuid_table *t)
{
    struct cpuid_regs h = host_cpuid(0x80000008, 0), r = {0};
    t->physical_bits = h.eax & 0xFF;
    if (t->physical_bits < 36 || t->physical_bits > 52)
        t->physical_bits = 40;
    r.eax = t->physical_bits | 48 << 8;
    if (!t->intel) {
        /* XSAVEERPTR as on the host; not affected by speculative store bypass (26) and branch type confusion (29). */
        r.ebx = (h.ebx & BIT(2)) | BIT(26) | BIT(29);
        r.ecx = (t->cpu_count - 1) | t->core_bits << 12;
    }
    add(t, 0x80000008, ANY_SUBLEAF, r);
}

static void build_amd(struct cpuid_table *t)
{
    if (t->max_extended >= 0x80000019)
        add(t, 0x80000019, ANY_SUBLEAF, host_cpuid(0x80000019, 0));
    if (t->max_extended >= 0x8000001A)
        add(t, 0x8000001A, ANY_SUBLEAF, host_cpuid(0x8000001A, 0));
    if (t->max_extended >= 0x8000001E) {
        build_caches(t, 0x8000001D);
        add(t, 0x8000001E, ANY_SUBLEAF, (struct cpuid_regs){0}); /* filled by fill_live */
    }
    /* LFENCE serialises; null selector clears base; automatic IBRS, without which Linux replaces its indirect jumps; not affected by SRSO, nor (ECX) by TSA, against which it would clear
     * buffers at each return to user mode. Translated code does what guests would do against these no more than it does on Intel. */
    if (t->max_extended >= 0x80000021)
        add(t, 0x80000021, ANY_SUBLEAF,
            (struct cpuid_regs){.eax = (host_cpuid(0x80000021, 0).eax & BIT(2)) | BIT(6) | AUTOMATIC_IBRS | BIT(29), .ecx = BIT(1) | BIT(2)});
}

static void build_extended(struct cpuid_table *t)
{
    struct cpuid_regs r = host_cpuid(0x80000000, 0);
    uint32_t most = t->intel ? 0x80000008 : 0x80000021;
    t->max_extended = r.eax < 0x80000008 ? 0x80000008 : r.eax > most ? most : r.eax;
    r.eax = t->max_extended;
    add(t, 0x80000000, ANY_SUBLEAF, r);
    build_extended_features(t);
    for (uint32_t leaf = 0x80000002; leaf <= 0x80000006; leaf++)
        add(t, leaf, ANY_SUBLEAF, host_cpuid(leaf, 0));
    add(t, 0x80000007, ANY_SUBLEAF, (struct cpuid_regs){.edx = BIT(8)}); /* invariant TSC */
    build_address_sizes(t);
    if (!t->intel)
        build_amd(t);
}

static void build_hypervisor(struct cpuid_table *t, const struct cpuid_config *config)
{
    static const char signature[12] = "KVMKVMKVM\0\0";
    struct cpuid_regs r = {.eax = MAX_HYPERVISOR};
    memcpy(&r.ebx, signature, 4);
    memcpy(&r.ecx, signature + 4, 4);
    memcpy(&r.edx, signature + 8, 4);
    add(t, 0x40000000, ANY_SUBLEAF, r);
    /* NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE_BIT */
    add(t, 0x40000001, ANY_SUBLEAF, (struct cpuid_regs){.eax = BIT(1) | BIT(3) | BIT(24)});
    add(t, 0x40000010, ANY_SUBLEAF,
        (struct cpuid_regs){.eax = (uint32_t)config->tsc_khz, .ebx = (uint32_t)(config->apic_bus_hz / 1000)});
}

/* ---- what may be switched on ---- */

static void derive_allowed(struct cpuid_table *t)
{
    t->cr4 = CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR |
             CR4_OSXMMEXCPT | CR4_UMIP | CR4_FSGSBASE | CR4_PCIDE | CR4_SMEP | CR4_SMAP;
    if (find(t, 1, 0)->ecx & L1_ECX_XSAVE)
        t->cr4 |= CR4_OSXSAVE;
    t->efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AIBRSE;
}

struct cpuid_table *cpuid_table_build(struct cpuid_config *config)
{
    struct cpuid_table *t = calloc(1, sizeof(*t));
    if (!t)
        return NULL;
    t->cpu_count = config->cpu_count < 1 ? 1 : config->cpu_count > 255 ? 255 : config->cpu_count;
    while ((1u << t->core_bits) < t->cpu_count)
        t->core_bits++;
    t->intel = !host_is_amd();
    t->xcr0 = host_xcr0();
    config->xcr0_supported = t->xcr0;
    build_basic(t, config);
    build_extended(t);
    build_hypervisor(t, config);
    derive_allowed(t);
    return t;
}

/* ---- masks ---- */

#define MISSING_BYTES 150

static const char *const register_names[] = {"EAX", "EBX", "ECX", "EDX"};

/* Leaves whose registers are sets of features, by register: those of a saved table must all be here. */
static const struct {
    uint32_t leaf, subleaf;
    bool eax, ebx, ecx, edx;
} feature_leaves[] = {
    {1, ANY_SUBLEAF, .ecx = true, .edx = true},
    {7, 0, .ebx = true, .ecx = true, .edx = true},
    {7, 1, .eax = true},
    {7, 2, .edx = true},
    {0xD, 0, .eax = true, .edx = true},
    {0xD, 1, .eax = true},
    {0x80000001, ANY_SUBLEAF, .ecx = true, .edx = true},
    {0x80000008, ANY_SUBLEAF, .ebx = true},
    {0x80000021, ANY_SUBLEAF, .eax = true, .ecx = true},
};

static bool is_feature_register(const struct entry *entry, unsigned reg)
{
    for (unsigned n = 0; n < sizeof(feature_leaves) / sizeof(feature_leaves[0]); n++) {
        const bool features[] = {feature_leaves[n].eax, feature_leaves[n].ebx, feature_leaves[n].ecx, feature_leaves[n].edx};
        if (feature_leaves[n].leaf == entry->leaf && feature_leaves[n].subleaf == entry->subleaf)
            return features[reg];
    }
    return false;
}

int cpuid_table_mask(struct cpuid_table *t, const struct cpuid_mask *mask, struct error *err)
{
    const struct cpuid_regs *found = find(t, mask->leaf, mask->subleaf);
    if (!found || mask->reg > 3)
        return error_set(err, -ENOENT, "there is no CPUID leaf %#x.%#x", mask->leaf, mask->subleaf);
    struct entry *entry = &t->entries[0];
    while (&entry->regs != found)
        entry++;
    uint32_t *const registers[] = {&entry->regs.eax, &entry->regs.ebx, &entry->regs.ecx, &entry->regs.edx};
    uint32_t *value = registers[mask->reg], after = (*value & ~mask->mask) | (mask->value & mask->mask);
    if (mask->leaf == 0 && mask->reg != 0 && after != *value)
        return error_set(err, -ENOTSUP, "it is for processors of another vendor than this host's");
    if (is_feature_register(entry, mask->reg) && after & ~*value) {
        char names[MISSING_BYTES] = "";
        cpuid_feature_names(mask->leaf, mask->subleaf, mask->reg, after & ~*value, names, sizeof(names));
        return error_set(err, -ENOTSUP, "CPUID leaf %#x.%#x %s: this host or the engine lacks %s", mask->leaf, mask->subleaf, register_names[mask->reg], names);
    }
    *value = after;
    return 0;
}

int cpuid_table_mask_msr(struct cpuid_table *t, const struct msr_mask *mask, struct error *err)
{
    if (t->msr_count == CPUID_MSR_MASKS_MAX)
        return error_set(err, -E2BIG, "more than %d MSRs are modified", CPUID_MSR_MASKS_MAX);
    t->msr[t->msr_count++] = *mask;
    return 0;
}

uint64_t cpuid_msr_value(const struct cpuid_table *table, uint32_t index, uint64_t value)
{
    for (unsigned n = 0; n < table->msr_count; n++)
        if (table->msr[n].index == index)
            value = (value & ~table->msr[n].mask) | (table->msr[n].value & table->msr[n].mask);
    return value;
}

int cpuid_table_seal(struct cpuid_table *t, struct error *err)
{
    const struct cpuid_regs *xsave = find(t, 0xD, 0), *one = find(t, 1, 0), *seven = find(t, 7, 0), *amd = find(t, 0x80000021, 0);
    if (xsave)
        t->xcr0 = xsave->eax | (uint64_t)xsave->edx << 32;
    /* SDM vol. 1, section 13.3: AVX needs SSE, the three parts of AVX-512 go together and need AVX. */
    uint64_t avx512 = t->xcr0 & XCR0_AVX512;
    if (t->xcr0 && ((t->xcr0 & 3) != 3 || (avx512 && (avx512 != XCR0_AVX512 || !has_avx(t)))))
        return error_set(err, -EINVAL, "CPUID leaf 0xd.0 would offer an XCR0 of %#llx, which XSETBV does not take", (unsigned long long)t->xcr0);
    const struct {
        bool offered;
        uint64_t cr4;
    } switches[] = {{one->ecx & BIT(17), CR4_PCIDE},   {one->ecx & L1_ECX_XSAVE, CR4_OSXSAVE}, {seven->ebx & BIT(0), CR4_FSGSBASE},
                    {seven->ebx & BIT(7), CR4_SMEP},   {seven->ebx & BIT(20), CR4_SMAP},       {seven->ecx & BIT(2), CR4_UMIP}};
    for (unsigned n = 0; n < sizeof(switches) / sizeof(switches[0]); n++)
        if (!switches[n].offered)
            t->cr4 &= ~switches[n].cr4;
    if (!(find(t, 0x80000001, 0)->edx & BIT(20)))
        t->efer &= ~(uint64_t)EFER_NXE;
    if (!amd || !(amd->eax & AUTOMATIC_IBRS))
        t->efer &= ~(uint64_t)EFER_AIBRSE;
    return 0;
}

static struct cpuid_regs *feature_entry(struct cpuid_table *t, unsigned n)
{
    for (unsigned i = 0; i < t->count; i++)
        if (t->entries[i].leaf == feature_leaves[n].leaf && t->entries[i].subleaf == feature_leaves[n].subleaf)
            return &t->entries[i].regs;
    return NULL;
}

/* The XSAVE leaves follow XCR0, and XCR0 the feature. */
static void limit_xsave(struct cpuid_table *t)
{
    const struct cpuid_regs *sizes = find(t, 0xD, 0);
    bool offered = find(t, 1, 0)->ecx & L1_ECX_XSAVE;
    unsigned kept = 0;
    t->xcr0 &= offered && sizes ? sizes->eax | (uint64_t)sizes->edx << 32 : 0;
    for (unsigned n = 0; n < t->count; n++) {
        const struct entry *e = &t->entries[n];
        bool gone = e->leaf == 0xD && (!t->xcr0 || (e->subleaf >= 2 && !(t->xcr0 >> e->subleaf & 1)));
        if (!gone)
            t->entries[kept++] = *e;
    }
    t->count = kept;
}

int cpuid_limit(struct cpuid_table *t, struct cpuid_regs (*allowed)(void *ctx, uint32_t leaf, uint32_t subleaf), void *ctx, struct error *err)
{
    for (unsigned n = 0; n < sizeof(feature_leaves) / sizeof(feature_leaves[0]); n++) {
        struct cpuid_regs *r = feature_entry(t, n);
        if (!r)
            continue;
        struct cpuid_regs most = allowed(ctx, feature_leaves[n].leaf, feature_leaves[n].subleaf == ANY_SUBLEAF ? 0 : feature_leaves[n].subleaf);
        r->eax &= feature_leaves[n].eax ? most.eax : ~0u;
        r->ebx &= feature_leaves[n].ebx ? most.ebx : ~0u;
        r->ecx &= feature_leaves[n].ecx ? most.ecx : ~0u;
        r->edx &= feature_leaves[n].edx ? most.edx : ~0u;
    }
    limit_xsave(t);
    return cpuid_table_seal(t, err);
}

void cpuid_table_destroy(struct cpuid_table *table)
{
    free(table);
}

/* ---- queries ---- */

static uint32_t xsave_bytes(const struct cpuid_table *t, uint64_t features, bool compacted)
{
    uint32_t end = 576; /* legacy region and header */
    for (unsigned n = 2; n < 63; n++) {
        const struct cpuid_regs *r = features >> n & 1 ? find(t, 0xD, n) : NULL;
        if (!r)
            continue;
        uint32_t start = compacted ? (r->ecx & 2 ? (end + 63) & ~63u : end) : r->ebx;
        if (compacted || start + r->eax > end)
            end = start + r->eax;
    }
    return end;
}

static void fill_live(const struct cpuid_table *t, const struct cpu_state *cpu, unsigned apic_id, uint32_t leaf, uint32_t subleaf,
                      struct cpuid_regs *r)
{
    switch (leaf) {
    case 1:
        r->ebx |= apic_id << 24;
        if (cpu->cr4 & CR4_OSXSAVE)
            r->ecx |= L1_ECX_OSXSAVE;
        break;
    case 0xB:
    case 0x1F:
        r->ecx = (r->ecx & 0xFF00) | (subleaf & 0xFF);
        r->edx = apic_id;
        break;
    case 0xD:
        if (subleaf == 0) {
            r->ebx = xsave_bytes(t, cpu->xcr0, false);
            r->ecx = xsave_bytes(t, t->xcr0, false);
        } else if (subleaf == 1 && r->eax & 2) {
            r->ebx = xsave_bytes(t, cpu->xcr0, true);
        }
        break;
    case 0x8000001E:
        r->eax = apic_id;
        r->ebx = apic_id & 0xFF; /* core id, one thread a core */
        break;
    }
}

struct cpuid_regs cpuid_query(const struct cpuid_table *table, const struct cpu_state *cpu, unsigned apic_id, uint32_t leaf, uint32_t subleaf)
{
    struct cpuid_regs r = {0};
    bool extended = leaf >> 31, hypervisor = leaf >= 0x40000000 && leaf < 0x80000000;
    /* Intel processors answer leaves above the highest with the highest basic leaf's data; AMD's with zero. */
    if ((extended && leaf > table->max_extended) || (!extended && !hypervisor && leaf > table->max_basic)) {
        if (!table->intel)
            return r;
        leaf = table->max_basic;
    }
    const struct cpuid_regs *found = find(table, leaf, subleaf);
    if (found)
        r = *found;
    if (found || leaf == 0xB || (leaf == 0x1F && leaf <= table->max_basic))
        fill_live(table, cpu, apic_id, leaf, subleaf, &r);
    return r;
}

bool cpuid_entry(const struct cpuid_table *table, unsigned n, uint32_t *leaf, uint32_t *subleaf)
{
    if (n >= table->count)
        return false;
    *leaf = table->entries[n].leaf;
    *subleaf = table->entries[n].subleaf;
    return true;
}

uint64_t cpuid_cr4_allowed(const struct cpuid_table *table)
{
    return table->cr4;
}

uint64_t cpuid_efer_allowed(const struct cpuid_table *table)
{
    return table->efer;
}

uint64_t cpuid_xcr0_allowed(const struct cpuid_table *table)
{
    return table->xcr0;
}

unsigned cpuid_physical_address_bits(const struct cpuid_table *table)
{
    return table->physical_bits;
}

/* ---- saving ---- */

static struct cpuid_regs features_of(const struct cpuid_table *t, unsigned n)
{
    const struct cpuid_regs *r = feature_entry((struct cpuid_table *)t, n);
    if (!r)
        return (struct cpuid_regs){0};
    return (struct cpuid_regs){feature_leaves[n].eax ? r->eax : 0, feature_leaves[n].ebx ? r->ebx : 0, feature_leaves[n].ecx ? r->ecx : 0,
                               feature_leaves[n].edx ? r->edx : 0};
}

struct cpuid_mask cpuid_vendor(const struct cpuid_table *table)
{
    return (struct cpuid_mask){.leaf = 0, .reg = 1, .mask = ~0u, .value = find(table, 0, 0)->ebx};
}

bool cpuid_feature(const struct cpuid_table *table, unsigned n, struct cpuid_mask *feature)
{
    for (unsigned i = 0; i < sizeof(feature_leaves) / sizeof(feature_leaves[0]); i++) {
        const bool is_set[] = {feature_leaves[i].eax, feature_leaves[i].ebx, feature_leaves[i].ecx, feature_leaves[i].edx};
        const struct cpuid_regs r = features_of(table, i);
        const uint32_t values[] = {r.eax, r.ebx, r.ecx, r.edx};
        for (unsigned reg = 0; reg < 4; reg++)
            if (is_set[reg] && n-- == 0) {
                *feature = (struct cpuid_mask){.leaf = feature_leaves[i].leaf, .subleaf = feature_leaves[i].subleaf == ANY_SUBLEAF ? 0 : feature_leaves[i].subleaf, .reg = reg,
                                               .mask = ~0u, .value = values[reg]};
                return true;
            }
    }
    return false;
}

/* What `saved` offers and `host` lacks. False: nothing. */
static bool find_missing(const struct cpuid_table *saved, const struct cpuid_table *host, char *reason, size_t reason_bytes)
{
    char names[MISSING_BYTES] = "";
    for (unsigned n = 0; n < sizeof(feature_leaves) / sizeof(feature_leaves[0]); n++) {
        struct cpuid_regs s = features_of(saved, n), h = features_of(host, n);
        const uint32_t missing[] = {s.eax & ~h.eax, s.ebx & ~h.ebx, s.ecx & ~h.ecx, s.edx & ~h.edx};
        uint32_t subleaf = feature_leaves[n].subleaf == ANY_SUBLEAF ? 0 : feature_leaves[n].subleaf;
        for (unsigned i = 0; i < 4; i++)
            cpuid_feature_names(feature_leaves[n].leaf, subleaf, i, missing[i], names, sizeof(names));
    }
    snprintf(reason, reason_bytes, "the guest uses features of a processor that this host lacks: %s", names);
    return names[0];
}

int cpuid_state(struct cpuid_table *table, struct state_io *io)
{
    struct cpuid_table t = *table;
    uint32_t count = t.count;
    char reason[230];
    state_begin(io, "cpuid", 2);
    state_u32(io, &count);
    if (state_loading(io) && count > TABLE_ENTRIES) {
        state_fail(io, "more leaves than there can be");
        count = 0;
    }
    t.count = count;
    for (unsigned n = 0; n < t.count; n++) {
        struct entry *e = &t.entries[n];
        uint32_t *const fields[] = {&e->leaf, &e->subleaf, &e->regs.eax, &e->regs.ebx, &e->regs.ecx, &e->regs.edx};
        for (unsigned i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
            state_u32(io, fields[i]);
    }
    uint32_t *const fields[] = {&t.max_basic, &t.max_extended};
    for (unsigned i = 0; i < sizeof(fields) / sizeof(fields[0]); i++)
        state_u32(io, fields[i]);
    uint32_t msr_count = t.msr_count;
    state_u32(io, &msr_count);
    if (state_loading(io) && msr_count > CPUID_MSR_MASKS_MAX) {
        state_fail(io, "more modified MSRs than there can be");
        msr_count = 0;
    }
    t.msr_count = msr_count;
    for (unsigned n = 0; n < t.msr_count; n++) {
        state_u32(io, &t.msr[n].index);
        state_u64(io, &t.msr[n].mask);
        state_u64(io, &t.msr[n].value);
    }
    uint64_t *const masks[] = {&t.xcr0, &t.cr4, &t.efer};
    const uint64_t most[] = {table->xcr0, table->cr4, table->efer};
    bool more = false;
    for (unsigned i = 0; i < sizeof(masks) / sizeof(masks[0]); i++) {
        state_u64(io, masks[i]);
        more |= (*masks[i] & ~most[i]) != 0;
    }
    if (state_loading(io) && !state_failed(io)) {
        const struct cpuid_regs *vendor = find(&t, 0, 0), *own = find(table, 0, 0);
        if (!vendor || vendor->ebx != own->ebx || !find(&t, 1, 0) || !find(&t, 0x80000008, 0))
            state_fail(io, "the processor's vendor differs from this host's");
        else if (find_missing(&t, table, reason, sizeof(reason)))
            state_fail(io, reason);
        else if (more)
            state_fail(io, "the guest's processor allows what this host's does not");
        else
            *table = t;
    }
    return state_end(io);
}
