/* The processor that a guest of the API sees: templates by name (custom ones: machine/cpu_template.h). Stateless; any thread. */
#ifndef DOPPEL_CONTROL_API_CPU_H
#define DOPPEL_CONTROL_API_CPU_H

#include "machine/config.h"
#include "util/error.h"

/* Fills `processor` (zeroed); checks everything that can be wrong with it on this host. */
int api_cpu_template(const char *name, struct processor_config *processor, struct error *err) __attribute__((warn_unused_result));

#endif
