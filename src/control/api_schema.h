/*
 * The shapes of the API's bodies: tables of fields that check a JSON object, say what is wrong with it, and complete it with defaults. Stateless; any thread.
 */
#ifndef DOPPEL_CONTROL_API_SCHEMA_H
#define DOPPEL_CONTROL_API_SCHEMA_H

#include <stdbool.h>
#include <stdint.h>

#include <jansson.h>

#include "util/error.h"

enum field_type {
    FIELD_STRING,
    FIELD_BOOLEAN,
    FIELD_INTEGER, /* from `min` to `max` */
    FIELD_WORD,    /* one of `words` */
    FIELD_OBJECT,  /* of `fields` */
    FIELD_OBJECTS, /* an array of such */
    FIELD_STRINGS, /* an array of strings */
    FIELD_TEXTS,   /* an object whose values are strings */
};

struct field {
    const char *name;
    enum field_type type;
    bool required;
    bool any_case;       /* a word's */
    bool absent;         /* left out of complete objects when not given, instead of null */
    int64_t min, max;    /* both 0: anything from 0 */
    const char *const *words;
    const struct field *fields;
    const char *initial; /* JSON of what counts when it is not given; NULL: null */
};

/* `fields` ends with a NULL name. Null counts as not given, where that is allowed. The message is one that clients of this API know. */
int schema_check(const struct field *fields, const json_t *object, struct error *err) __attribute__((warn_unused_result));
/* A new object with every field, in the table's order. NULL: no memory. */
json_t *schema_complete(const struct field *fields, const json_t *object);

/* The description's definitions. */
extern const struct field schema_action[], schema_balloon[], schema_balloon_update[], schema_balloon_statistics[], schema_hinting_start[],
    schema_boot_source[], schema_cpu_config[], schema_drive[], schema_drive_patch[], schema_entropy[], schema_logger[], schema_machine[], schema_machine_patch[],
    schema_memory_hotplug[], schema_memory_hotplug_update[], schema_metrics[], schema_mmds_config[], schema_network[], schema_network_patch[], schema_pmem[],
    schema_pmem_patch[], schema_serial[], schema_snapshot_create[], schema_snapshot_load[], schema_vm[], schema_vsock[];

#endif
