/*
 * Templates of processors, as JSON (cpu_template.h). What the machine can show of them is for the tables of arch/cpuid.h to say.
 */
#include "machine/cpu_template.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "machine/machine.h"

/* "" where there is none, which is no number, bitmap or register. */
static const char *text(const json_t *object, const char *name)
{
    const char *value = json_string_value(json_object_get(object, name));
    return value ? value : "";
}

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
    int r = parse_number(text(modifier, "leaf"), "leaf", &mask.leaf, err);
    if (r == 0)
        r = parse_number(text(modifier, "subleaf"), "subleaf", &mask.subleaf, err);
    json_array_foreach(json_object_get(modifier, "modifiers"), index, element)
    {
        uint64_t bits, value;
        if (r == 0)
            r = parse_bitmap(text(element, "bitmap"), 32, &bits, &value, err);
        if (r == 0 && processor->cpuid_count == CONFIG_CPUID_MASKS_MAX)
            r = error_set(err, -E2BIG, "CPU configuration: more than %d registers of CPUID are modified", CONFIG_CPUID_MASKS_MAX);
        if (r)
            return r;
        mask.mask = (uint32_t)bits;
        mask.value = (uint32_t)value;
        for (mask.reg = 0; mask.reg < 4 && strcmp(registers[mask.reg], text(element, "register")) != 0;)
            mask.reg++;
        if (mask.reg == 4)
            return error_set(err, -EINVAL, "CPU configuration: \"%.40s\" is not one of eax, ebx, ecx, edx", text(element, "register"));
        processor->cpuid[processor->cpuid_count++] = mask;
    }
    return r;
}

static int add_msr(const json_t *modifier, struct processor_config *processor, struct error *err)
{
    struct msr_mask *mask = &processor->msr[processor->msr_count];
    if (processor->msr_count == CPUID_MSR_MASKS_MAX)
        return error_set(err, -E2BIG, "CPU configuration: more than %d MSRs are modified", CPUID_MSR_MASKS_MAX);
    int r = parse_number(text(modifier, "addr"), "addr", &mask->index, err);
    if (r == 0)
        r = parse_bitmap(text(modifier, "bitmap"), 64, &mask->mask, &mask->value, err);
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

int cpu_template_masks(const json_t *config, struct processor_config *processor, struct error *err)
{
    size_t index;
    json_t *element;
    int r = 0;
    if (json_array_size(json_object_get(config, "reg_modifiers")) || json_array_size(json_object_get(config, "vcpu_features")))
        return error_set(err, -ENOTSUP, "CPU configuration: `reg_modifiers` and `vcpu_features` are for another architecture");
    json_array_foreach(json_object_get(config, "kvm_capabilities"), index, element)
        r = r ? r : check_capability(json_is_string(element) ? json_string_value(element) : "", err);
    json_array_foreach(json_object_get(config, "cpuid_modifiers"), index, element)
        r = r ? r : add_leaf(element, processor, err);
    json_array_foreach(json_object_get(config, "msr_modifiers"), index, element)
        r = r ? r : add_msr(element, processor, err);
    return r;
}

int cpu_template_read(const json_t *config, struct processor_config *processor, struct error *err)
{
    int r = cpu_template_masks(config, processor, err);
    if (r)
        return r;
    return machine_check_processor(processor, err) ? error_prefix(err, "CPU configuration") : 0;
}

int cpu_template_load(const char *path, struct processor_config *processor, struct error *err)
{
    json_error_t why;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    int r;
    *processor = (struct processor_config){.cpuid_optional = true};
    if (!root)
        return error_set(err, -EINVAL, "%s: line %d: %s", path, why.line, why.text);
    if (!json_array_size(json_object_get(root, "cpuid_modifiers")))
        r = error_set(err, -EINVAL, "%s has no \"cpuid_modifiers\": a file as doppel cpu-baseline prints it is wanted", path);
    else if ((r = cpu_template_read(root, processor, err)) < 0)
        error_prefix(err, "%s", path);
    json_decref(root);
    return r;
}

static json_t *register_modifier(const struct cpuid_mask *mask)
{
    static const char *const registers[] = {"eax", "ebx", "ecx", "edx"};
    char bitmap[2 + 32 + 1] = "0b";
    for (unsigned bit = 0; bit < 32; bit++)
        bitmap[2 + bit] = !(mask->mask << bit >> 31) ? 'x' : mask->value << bit >> 31 ? '1' : '0';
    return json_pack("{s:s, s:s}", "register", registers[mask->reg], "bitmap", bitmap);
}

json_t *cpu_template_write(const struct processor_config *processor)
{
    json_t *leaves = json_array(), *registers = NULL;
    for (unsigned i = 0; i < processor->cpuid_count; i++) {
        const struct cpuid_mask *mask = &processor->cpuid[i];
        char leaf[16], subleaf[16];
        if (i == 0 || mask->leaf != mask[-1].leaf || mask->subleaf != mask[-1].subleaf) {
            snprintf(leaf, sizeof leaf, "%#x", mask->leaf);
            snprintf(subleaf, sizeof subleaf, "%#x", mask->subleaf);
            registers = json_array();
            json_array_append_new(leaves, json_pack("{s:s, s:s, s:i, s:o}", "leaf", leaf, "subleaf", subleaf, "flags", 0, "modifiers", registers));
        }
        json_array_append_new(registers, register_modifier(mask));
    }
    return json_pack("{s:o}", "cpuid_modifiers", leaves);
}
