/* Names of the bits of CPUID's feature registers, as Linux shows them in /proc/cpuinfo (SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E). Constant. */
#include "arch/cpuid.h"

#include <stdio.h>
#include <string.h>

static const struct {
    uint32_t leaf, subleaf;
    unsigned reg;
    const char *names; /* from bit 0 on; "-": none */
} registers[] = {
    {1, 0, 2, "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"},
    {1, 0, 3, "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
    {7, 0, 1, "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"},
    {7, 0, 2, "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"},
    {7, 0, 3, "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd"},
    {7, 1, 0, "- - - - avx_vnni avx512_bf16 lass cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs - - amx_fp16 hreset avx_ifma - - lam"},
    {0xD, 0, 0, "x87 sse avx mpx-bndregs mpx-bndcsr avx512-opmask avx512-zmm-hi256 avx512-hi16-zmm pt pkru - - - - - - - amx-tilecfg amx-tiledata"},
    {0xD, 1, 0, "xsaveopt xsavec xgetbv1 xsaves xfd"},
    {0x80000001, 0, 2, "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"},
    {0x80000001, 0, 3, "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"},
    {0x80000008, 0, 1, "clzero irperf xsaveerptr invlpgb rdpru - mba - mcommit wbnoinvd - - ibpb - ibrs amd_stibp ibrs_always stibp_always ibrs_prefer ibrs_same_mode - - - - amd_ssbd virt_ssbd ssb_no cppc - btc_no"},
    {0x80000021, 0, 0, "no_nested_data_bp fsgsbase_not_serializing lfence_rdtsc smm_page_cfg_lock - verw_clear null_sel_clr_base uaia autoibrs no_smm_ctl_msr"},
};

static bool name_of(uint32_t leaf, uint32_t subleaf, unsigned reg, unsigned bit, char *name, size_t name_bytes)
{
    for (unsigned i = 0; i < sizeof registers / sizeof registers[0]; i++) {
        if (registers[i].leaf != leaf || registers[i].subleaf != subleaf || registers[i].reg != reg)
            continue;
        const char *at = registers[i].names;
        for (unsigned n = 0; n < bit && at; n++)
            at = strchr(at, ' ') ? strchr(at, ' ') + 1 : NULL;
        size_t length = at ? strcspn(at, " ") : 0;
        if (!length || length >= name_bytes || *at == '-')
            return false;
        memcpy(name, at, length);
        name[length] = '\0';
        return true;
    }
    return false;
}

void cpuid_feature_names(uint32_t leaf, uint32_t subleaf, unsigned reg, uint32_t bits, char *text, size_t text_bytes)
{
    static const char *const register_names[] = {"eax", "ebx", "ecx", "edx"};
    for (size_t length = strlen(text); bits && length + 1 < text_bytes; bits &= bits - 1, length = strlen(text)) {
        unsigned bit = (unsigned)__builtin_ctz(bits);
        char name[40];
        if (!name_of(leaf, subleaf, reg, bit, name, sizeof name))
            snprintf(name, sizeof name, "cpuid.%x.%x:%s[%u]", leaf, subleaf, register_names[reg & 3], bit);
        if (length + strlen(name) + 6 >= text_bytes) {
            snprintf(text + length, text_bytes - length, ", ...");
            return;
        }
        snprintf(text + length, text_bytes - length, "%s%s", length ? ", " : "", name);
    }
}
