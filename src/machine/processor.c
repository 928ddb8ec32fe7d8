/* The processor that a configuration asks for: the host's and the engine's features, less what is masked. Stateless; any thread. */
#include <errno.h>

#include "machine/machine_priv.h"

static int apply(struct cpuid_table *table, const struct processor_config *config, struct error *err)
{
    int r = 0;
    for (unsigned i = 0; i < config->cpuid_count && r == 0; i++) {
        r = cpuid_table_mask(table, &config->cpuid[i], err);
        if (r == -ENOENT && config->cpuid_optional)
            r = config->cpuid[i].value & config->cpuid[i].mask ? error_set(err, -ENOTSUP, "CPUID leaf %#x.%#x has features that this host or the engine lacks",
                                                                           config->cpuid[i].leaf, config->cpuid[i].subleaf) : 0;
    }
    for (unsigned i = 0; i < config->msr_count && r == 0; i++)
        r = cpuid_table_mask_msr(table, &config->msr[i], err);
    return r ? r : cpuid_table_seal(table, err);
}

struct cpuid_table *processor_table(struct cpuid_config *cpuid, const struct processor_config *config, struct error *err)
{
    struct cpuid_table *table = cpuid_table_build(cpuid);
    if (!table) {
        error_set(err, -ENOMEM, "out of memory");
        return NULL;
    }
    if (apply(table, config, err)) {
        cpuid_table_destroy(table);
        return NULL;
    }
    return table;
}

int machine_check_processor(const struct processor_config *config, struct error *err)
{
    struct cpuid_config cpuid = {.cpu_count = 1, .tsc_khz = 1000000, .apic_bus_hz = LAPIC_TIMER_HZ};
    struct error why = {0};
    struct cpuid_table *table = processor_table(&cpuid, config, &why);
    cpuid_table_destroy(table);
    return table ? 0 : error_set(err, why.code, "%s", why.text);
}

int machine_host_features(struct processor_config *features, struct error *err)
{
    struct cpuid_config cpuid = {.cpu_count = 1, .tsc_khz = 1000000, .apic_bus_hz = LAPIC_TIMER_HZ};
    struct cpuid_table *table = cpuid_table_build(&cpuid);
    *features = (struct processor_config){0};
    if (!table)
        return error_set(err, -ENOMEM, "out of memory");
    features->cpuid[features->cpuid_count++] = cpuid_vendor(table);
    while (features->cpuid_count < CONFIG_CPUID_MASKS_MAX && cpuid_feature(table, features->cpuid_count - 1, &features->cpuid[features->cpuid_count]))
        features->cpuid_count++;
    cpuid_table_destroy(table);
    return 0;
}
