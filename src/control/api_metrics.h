/*
 * Metrics: one JSON object a line, into a file or named pipe, each minute, on FlushMetrics and at the end. Counters are written as their increase since the
 * line before; latencies and start times as they are.
 * Threading: any thread, but create and destroy.
 */
#ifndef DOPPEL_CONTROL_API_METRICS_H
#define DOPPEL_CONTROL_API_METRICS_H

#include <stdint.h>

#include <jansson.h>

#include "machine/machine.h"
#include "util/error.h"

enum api_counter {
    COUNTER_NONE,
#define COUNTER(identifier, group, name) COUNTER_##identifier,
#include "control/api_counters.def"
#undef COUNTER
    COUNTERS,
};

enum api_latency { LATENCY_PAUSE, LATENCY_RESUME, LATENCY_FULL_SNAPSHOT, LATENCY_DIFF_SNAPSHOT, LATENCY_LOAD_SNAPSHOT, LATENCIES };

struct api_options;
struct api_metrics;

struct api_metrics *api_metrics_create(const struct api_options *options);
void api_metrics_destroy(struct api_metrics *metrics);
/* From now on its counters are in the lines. */
void api_metrics_attach(struct api_metrics *metrics, struct machine *machine);
/* Writes the last line; the machine is not looked at afterwards. */
void api_metrics_end(struct api_metrics *metrics);

/* Once. `properties` may be NULL. */
int api_metrics_open(struct api_metrics *metrics, const char *path, bool emit_id, const json_t *properties, struct error *err)
    __attribute__((warn_unused_result));
int api_metrics_flush(struct api_metrics *metrics, struct error *err) __attribute__((warn_unused_result));

void api_count(struct api_metrics *metrics, enum api_counter counter);
void api_metrics_answered(struct api_metrics *metrics, unsigned status, uint64_t duration_ns);
void api_metrics_latency(struct api_metrics *metrics, enum api_latency latency, uint64_t duration_ns);

#endif
