/*
 * What a guest's processor is to be, as JSON: the custom templates of the API (PUT /cpu-config), bits of CPUID and MSRs that are 1, 0 or the host's. A baseline is one that says all
 * bits of features: what guests may use, and what every host has to have. Stateless; any thread.
 */
#ifndef DOPPEL_MACHINE_CPU_TEMPLATE_H
#define DOPPEL_MACHINE_CPU_TEMPLATE_H

#include <jansson.h>

#include "machine/config.h"
#include "util/error.h"

/* Fills `processor` (zeroed) with what it says, whatever this host has. */
int cpu_template_masks(const json_t *config, struct processor_config *processor, struct error *err) __attribute__((warn_unused_result));
/* The same, and checks everything that can be wrong with it on this host. */
int cpu_template_read(const json_t *config, struct processor_config *processor, struct error *err) __attribute__((warn_unused_result));
/* A baseline from a file: leaves that are not here are passed over where nothing is wanted of them. */
int cpu_template_load(const char *path, struct processor_config *processor, struct error *err) __attribute__((warn_unused_result));
/* The masks of CPUID, those of a leaf together. NULL: no memory. */
json_t *cpu_template_write(const struct processor_config *processor);

#endif
