/* The processor that a guest of the API sees: templates by name and custom masks over CPUID and MSRs. Stateless; any thread. */
#ifndef DOPPEL_CONTROL_API_CPU_H
#define DOPPEL_CONTROL_API_CPU_H

#include <jansson.h>

#include "machine/config.h"
#include "util/error.h"

int api_cpu_check_template(const char *name, struct error *err) __attribute__((warn_unused_result));
/* Of a body that fits its schema: numbers, bitmaps, and that nothing is asked that cannot be. */
int api_cpu_check(const json_t *cpu_config, struct error *err) __attribute__((warn_unused_result));

#endif
