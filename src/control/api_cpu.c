/*
 * Processor templates by name (api_cpu.h). A template by name says which features instances of that type do not have, and the signature they show; it only takes away, so what
 * the host lacks stays absent.
 */
#include "control/api_cpu.h"

#include <cpuid.h>
#include <errno.h>
#include <string.h>

#include "machine/machine.h"

#define BIT(n) (1u << (n))
enum { EAX, EBX, ECX, EDX };

/* Intel SDM vol. 2A, CPUID. Debug store, MONITOR, virtualization, power management and counters are no features of instances. */
#define BASE_1_ECX (BIT(2) | BIT(3) | BIT(4) | BIT(5) | BIT(6) | BIT(7) | BIT(8) | BIT(10) | BIT(11) | BIT(14) | BIT(15) | BIT(18))
#define BASE_1_EDX (BIT(18) | BIT(21) | BIT(22) | BIT(27) | BIT(29) | BIT(31))
/* SGX, HLE, RTM, MPX, AVX-512, RDSEED, ADX, CLFLUSHOPT, CLWB, trace, SHA. */
#define T2_7_EBX                                                                                                                                 \
    (BIT(2) | BIT(4) | BIT(11) | BIT(12) | BIT(14) | BIT(15) | BIT(16) | BIT(17) | BIT(18) | BIT(19) | BIT(21) | BIT(22) | BIT(23) | BIT(24) |   \
     BIT(25) | BIT(26) | BIT(27) | BIT(28) | BIT(29) | BIT(30) | BIT(31))
/* All of it: AVX-512's later parts, UMIP, protection keys, GFNI, VAES, RDPID, MOVDIRI ... */
#define T2_7_ECX 0xFFFFFFFFu
/* AVX-512's, SERIALIZE, FSRM; speculation control stays. */
#define T2_7_EDX (BIT(2) | BIT(3) | BIT(4) | BIT(8) | BIT(14) | BIT(23))
#define XCR0_AVX512_PKRU 0x2E0u
#define XCR0_MPX 0x18u
/* Haswell added MOVBE, FMA (leaf 1), BMI1, AVX2, BMI2, INVPCID (leaf 7), LZCNT. */
#define C3_1_ECX (BASE_1_ECX | BIT(12) | BIT(22))
#define C3_7_EBX (T2_7_EBX | BIT(3) | BIT(5) | BIT(8) | BIT(10))
#define SIGNATURE_HASWELL 0x000306F2u
#define SIGNATURE_IVY_BRIDGE 0x000306E4u
#define SIGNATURE_MASK 0x0FFF3FFFu
/* AMD APM vol. 3, appendix E. */
#define T2A_7_EBX (BIT(10) | BIT(12) | BIT(15) | BIT(18) | BIT(19) | BIT(23) | BIT(24) | BIT(29) | BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31))
#define T2A_81_ECX (BIT(5) | BIT(6) | BIT(7) | BIT(8) | BIT(11) | BIT(16) | BIT(29))

#define CLEAR(leaf, subleaf, reg, bits) {leaf, subleaf, reg, bits, 0}
#define T2_REST                                                                                                                                  \
    CLEAR(7, 0, ECX, T2_7_ECX), CLEAR(7, 0, EDX, T2_7_EDX), CLEAR(7, 1, EAX, ~0u), CLEAR(0xD, 0, EAX, XCR0_AVX512_PKRU | XCR0_MPX),             \
        CLEAR(0xD, 1, EAX, BIT(3)), CLEAR(0x80000001, 0, ECX, BIT(8) | BIT(29)), CLEAR(0x80000008, 0, EBX, BIT(9))

static const struct cpuid_mask c3[] = {
    {1, 0, EAX, SIGNATURE_MASK, SIGNATURE_IVY_BRIDGE}, CLEAR(1, 0, ECX, C3_1_ECX), CLEAR(1, 0, EDX, BASE_1_EDX), CLEAR(7, 0, EBX, C3_7_EBX),
    CLEAR(0x80000001, 0, EDX, BIT(26)), CLEAR(0x80000001, 0, ECX, BIT(5)), T2_REST,
};
static const struct cpuid_mask t2[] = {
    {1, 0, EAX, SIGNATURE_MASK, SIGNATURE_HASWELL}, CLEAR(1, 0, ECX, BASE_1_ECX), CLEAR(1, 0, EDX, BASE_1_EDX), CLEAR(7, 0, EBX, T2_7_EBX),
    CLEAR(0x80000001, 0, EDX, BIT(26)), T2_REST,
};
static const struct cpuid_mask t2a[] = {
    CLEAR(1, 0, ECX, BASE_1_ECX), CLEAR(1, 0, EDX, BASE_1_EDX), CLEAR(7, 0, EBX, T2A_7_EBX), CLEAR(7, 0, ECX, T2_7_ECX), CLEAR(7, 0, EDX, T2_7_EDX),
    CLEAR(7, 1, EAX, ~0u), CLEAR(0xD, 0, EAX, XCR0_AVX512_PKRU), CLEAR(0xD, 1, EAX, BIT(3)), CLEAR(0x80000001, 0, ECX, T2A_81_ECX),
    CLEAR(0x80000001, 0, EDX, BIT(26)), CLEAR(0x80000008, 0, EBX, BIT(2) | BIT(9)),
};

static const struct {
    const char *name;
    bool amd;
    const struct cpuid_mask *masks;
    size_t count;
} templates[] = {
#define TEMPLATE(name, amd, masks) {name, amd, masks, sizeof masks / sizeof *masks}
    TEMPLATE("C3", false, c3), TEMPLATE("T2", false, t2), TEMPLATE("T2S", false, t2), TEMPLATE("T2CL", false, t2), TEMPLATE("T2A", true, t2a),
};

int api_cpu_template(const char *name, struct processor_config *processor, struct error *err)
{
    unsigned eax, ebx, ecx, edx;
    if (strcmp(name, "None") == 0)
        return 0;
    __cpuid(0, eax, ebx, ecx, edx);
    bool amd = ebx == signature_AMD_ebx;
    for (size_t i = 0; i < sizeof templates / sizeof *templates; i++) {
        if (strcmp(templates[i].name, name) != 0)
            continue;
        if (templates[i].amd != amd)
            return error_set(err, -ENOTSUP, "The CPU template %s is for processors of another vendor than this host's.", name);
        memcpy(processor->cpuid, templates[i].masks, templates[i].count * sizeof *processor->cpuid);
        processor->cpuid_count = (unsigned)templates[i].count;
        processor->cpuid_optional = true;
        return machine_check_processor(processor, err) ? error_prefix(err, "CPU template %s", name) : 0;
    }
    return error_set(err, -ENOTSUP, "The CPU template %s is for processors of another architecture.", name);
}
