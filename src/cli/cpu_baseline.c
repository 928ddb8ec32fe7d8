/*
 * `doppel cpu-baseline`: the processor features that guests can have here, or on all of several hosts, as a file for `run --cpu-baseline` (machine/cpu_template.h).
 */
#include <jansson.h>
#include <stdio.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "machine/cpu_template.h"
#include "machine/machine.h"

static int read_baseline(const char *path, struct processor_config *baseline)
{
    json_error_t why;
    struct error err = {0};
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    *baseline = (struct processor_config){0};
    if (!root)
        return complain(STATUS_ERROR, "cpu-baseline: %s: line %d: %s", path, why.line, why.text);
    int r = cpu_template_masks(root, baseline, &err);
    json_decref(root);
    return r ? complain(STATUS_ERROR, "cpu-baseline: %s: %s", path, err.text) : 0;
}

static const struct cpuid_mask *find_mask(const struct processor_config *baseline, const struct cpuid_mask *wanted)
{
    for (unsigned i = 0; i < baseline->cpuid_count; i++) {
        const struct cpuid_mask *mask = &baseline->cpuid[i];
        if (mask->leaf == wanted->leaf && mask->subleaf == wanted->subleaf && mask->reg == wanted->reg && mask->mask == ~0u)
            return mask;
    }
    return NULL;
}

/* Leaves in `common` what the host of this file has, too. */
static int keep_common(struct processor_config *common, const char *path, bool first)
{
    struct processor_config baseline;
    int r = read_baseline(path, &baseline);
    for (unsigned i = 0; i < common->cpuid_count && r == 0; i++) {
        const struct cpuid_mask *mask = find_mask(&baseline, &common->cpuid[i]);
        if (!mask)
            return complain(STATUS_ERROR, "cpu-baseline: %s does not say all bits of CPUID leaf %#x.%#x; was it made by doppel cpu-baseline?", path, common->cpuid[i].leaf,
                            common->cpuid[i].subleaf);
        if (mask->leaf == 0 && !first && mask->value != common->cpuid[i].value)
            return complain(STATUS_ERROR, "cpu-baseline: %s is of processors of another vendor than the files before it: guests cannot move between them", path);
        common->cpuid[i].value = first ? mask->value : common->cpuid[i].value & mask->value;
    }
    return r;
}

int cpu_baseline_main(int argc, char **argv)
{
    struct arguments arguments;
    struct processor_config common;
    struct error err = {0};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (machine_host_features(&common, &err))
        return complain(STATUS_ERROR, "cpu-baseline: %s", err.text);
    for (unsigned i = 0; i < arguments.name_count; i++)
        if ((r = keep_common(&common, arguments.names[i], i == 0)) != 0)
            return r;
    report_value(cpu_template_write(&common));
    return 0;
}
