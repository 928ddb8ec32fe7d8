/*
 * Processor templates (api_cpu.h). A template by name says which features instances of that type do not have, and the signature they show; it only takes away, so what
 * the host lacks stays absent.
 */
#include "control/api_cpu.h"

#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "control/api.h"

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

/* ---- custom ---- */

/* "0x7", "0b111", "7". */
static int parse_number(const char *text, const char *what, uint32_t *value, struct error *err)
{
    char *end;
    bool binary = strncmp(text, "0b", 2) == 0, hexadecimal = strncmp(text, "0x", 2) == 0;
    const char *digits = text + (binary || hexadecimal ? 2 : 0);
    errno = 0;
    unsigned long long number = strtoull(digits, &end, binary ? 2 : hexadecimal ? 16 : 10);
    if (!strchr("0123456789abcdefABCDEF", *digits) || !*digits || *end || errno || number > UINT32_MAX)
        return error_set(err, -EINVAL, "CPU configuration: %s \"%.40s\" is not a 32-bit number such as 0x10a, 0b100 or 266", what, text);
    *value = (uint32_t)number;
    return 0;
}

/* "0b" and up to `bits` of 0, 1 and x, the lowest last. */
static int parse_bitmap(const char *text, unsigned bits, uint64_t *mask, uint64_t *value, struct error *err)
{
    unsigned count = 0;
    *mask = *value = 0;
    bool valid = strncmp(text, "0b", 2) == 0;
    for (const char *c = text + 2; valid && *c; c++) {
        if (*c == '_')
            continue;
        valid = strchr("01x", *c) != NULL && ++count <= bits;
        *mask = *mask << 1 | (*c != 'x');
        *value = *value << 1 | (*c == '1');
    }
    return valid && count ? 0 : error_set(err, -EINVAL, "CPU configuration: \"%.80s\" is not 0b and up to %u of 0, 1 and x", text, bits);
}

static int add_leaf(const json_t *modifier, struct processor_config *processor, struct error *err)
{
    static const char *const registers[] = {"eax", "ebx", "ecx", "edx"};
    struct cpuid_mask mask;
    size_t index;
    json_t *element;
    int r = parse_number(api_text(modifier, "leaf"), "leaf", &mask.leaf, err);
    if (r == 0)
        r = parse_number(api_text(modifier, "subleaf"), "subleaf", &mask.subleaf, err);
    json_array_foreach(json_object_get(modifier, "modifiers"), index, element)
    {
        uint64_t bits, value;
        if (r == 0)
            r = parse_bitmap(api_text(element, "bitmap"), 32, &bits, &value, err);
        if (r == 0 && processor->cpuid_count == CONFIG_CPUID_MASKS_MAX)
            r = error_set(err, -E2BIG, "CPU configuration: more than %d registers of CPUID are modified", CONFIG_CPUID_MASKS_MAX);
        if (r)
            return r;
        mask.mask = (uint32_t)bits;
        mask.value = (uint32_t)value;
        for (mask.reg = 0; mask.reg < 3 && strcmp(registers[mask.reg], api_text(element, "register")) != 0;)
            mask.reg++;
        processor->cpuid[processor->cpuid_count++] = mask;
    }
    return r;
}

static int add_msr(const json_t *modifier, struct processor_config *processor, struct error *err)
{
    struct msr_mask *mask = &processor->msr[processor->msr_count];
    if (processor->msr_count == CPUID_MSR_MASKS_MAX)
        return error_set(err, -E2BIG, "CPU configuration: more than %d MSRs are modified", CPUID_MSR_MASKS_MAX);
    int r = parse_number(api_text(modifier, "addr"), "addr", &mask->index, err);
    if (r == 0)
        r = parse_bitmap(api_text(modifier, "bitmap"), 64, &mask->mask, &mask->value, err);
    if (r == 0)
        processor->msr_count++;
    return r;
}

/* Taking one away is nothing to do here. */
static int check_capability(const char *text, struct error *err)
{
    uint32_t number;
    if (*text != '!')
        return error_set(err, -ENOTSUP, "CPU configuration: the capability %.20s cannot be required: Doppel runs without KVM, too", text);
    return parse_number(text + 1, "capability", &number, err);
}

int api_cpu_custom(const json_t *config, struct processor_config *processor, struct error *err)
{
    size_t index;
    json_t *element;
    int r = 0;
    if (json_array_size(json_object_get(config, "reg_modifiers")) || json_array_size(json_object_get(config, "vcpu_features")))
        return error_set(err, -ENOTSUP, "CPU configuration: `reg_modifiers` and `vcpu_features` are for another architecture");
    json_array_foreach(json_object_get(config, "kvm_capabilities"), index, element)
        r = r ? r : check_capability(json_string_value(element), err);
    json_array_foreach(json_object_get(config, "cpuid_modifiers"), index, element)
        r = r ? r : add_leaf(element, processor, err);
    json_array_foreach(json_object_get(config, "msr_modifiers"), index, element)
        r = r ? r : add_msr(element, processor, err);
    if (r)
        return r;
    return machine_check_processor(processor, err) ? error_prefix(err, "CPU configuration") : 0;
}
