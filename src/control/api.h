/*
 * The API that tools for micro VMs speak, over one virtual machine: first one in the making (a configuration, kept as the JSON that GET /vm/config shows),
 * after InstanceStart a machine that runs. docs/api.md says what of the description is answered how.
 *
 * Threading: api_create, api_load_file and api_start before the HTTP server runs, on any one thread; the handlers on the server's thread, one at a time. api_wait_started and
 * api_stop from any thread.
 *
 * A handler of a device is one function and one line in api_endpoints.def:
 *
 *     int api_patch_balloon(struct api_request *request, struct error *err)
 *     {
 *         return machine_balloon_set(request->machine, (uint32_t)api_integer(request->body, "amount_mib"), err);
 *     }
 *
 * By then the body has been checked against its schema, an id in it equals that of the path, and the endpoint's "when" holds. 0: 204, or 200 with request->answer.
 * Negative: 400 with the message, and nothing may have changed. Where the call changes what GET /vm/config shows, api_section and friends give the JSON to change.
 */
#ifndef DOPPEL_CONTROL_API_H
#define DOPPEL_CONTROL_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "control/http.h"
#include "machine/machine.h"
#include "util/error.h"

#define API_VERSION "1.17.0" /* of the description */

struct api;
struct metadata;
struct vm_control;

struct api_options {
    const char *id;        /* of the instance */
    const char *app_name;
    const char *engine;    /* NULL: auto */
    bool pci;              /* virtio over PCI, else over memory-mapped registers */
    bool boot_timer;       /* log how long the guest took to its init */
    bool sandbox;          /* the machine's threads shut themselves in */
    const char *sandbox_omit; /* machine_config.sandbox_omit */
    int broker;            /* machine_config.broker; without a sandbox -1 */
    const char *api_socket;    /* machine_config.api_socket */
    void (*started)(void *ctx, struct machine *machine); /* the machine was, on the thread that did it. Optional */
    void *started_ctx;
    const char *own_directory; /* that stays writable then (machine_config.own_directory); NULL: none */
    struct vm_control *control; /* looks after the machine; detached by its owner before api_destroy. NULL: nobody does */
    size_t mmds_bytes_max; /* 0: METADATA_BYTES_DEFAULT */
    uint64_t start_time_us, start_time_cpu_us, parent_cpu_time_us; /* told by whoever started the process; for metrics */
};

/* Strings of `options` are borrowed. */
int api_create(struct api **api, const struct api_options *options, struct error *err) __attribute__((warn_unused_result));
/* The HTTP server must be gone. Ends the machine. */
void api_destroy(struct api *api);

/* For http_server_add_routes, with the api as ctx; and http_options.answered. */
extern const struct http_route api_routes[];
void api_answered(void *api, const char *method, const char *path, unsigned status, uint64_t duration_ns);

/* A file with the JSON of GET /vm/config; and one with metadata. */
int api_load_file(struct api *api, const char *path, struct error *err) __attribute__((warn_unused_result));
int api_load_metadata(struct api *api, const char *path, struct error *err) __attribute__((warn_unused_result));
/* One section of the full configuration ("logger"), as its PUT would. */
int api_configure(struct api *api, const char *section, const json_t *body, struct error *err) __attribute__((warn_unused_result));
/* InstanceStart. */
int api_start(struct api *api, struct error *err) __attribute__((warn_unused_result));

/* Waits until a machine was started and has ended, or api_stop. MACHINE_STOPPED: nothing was started. */
struct machine *api_wait_started(struct api *api);
/* Ends the machine, or the waiting for one. */
void api_stop(struct api *api);
/* NULL before the start. Stays until api_destroy. */
struct machine *api_machine(struct api *api);
struct metadata *api_mmds(struct api *api);

/* ---- for handlers ---- */

struct api_endpoint;

struct api_request {
    struct api *api;
    const struct api_endpoint *endpoint;
    struct machine *machine; /* NULL before the start */
    const json_t *body;      /* borrowed; NULL: none was sent */
    const char *id;          /* of the path; "": none */
    json_t *answer;          /* to be set for 200; taken over */
};

typedef int api_handler(struct api_request *request, struct error *err);

/* The JSON of GET /vm/config below `name` ("balloon"; for arrays the element whose `id_field` is `id`); NULL: was not configured. Borrowed, may be changed. */
json_t *api_section(struct api *api, const char *name);
json_t *api_section_element(struct api *api, const char *name, const char *id_field, const char *id);

/* Members of a checked body; "not given" is NULL, false or 0. */
bool api_has(const json_t *object, const char *name); /* given, and not null */
const char *api_text(const json_t *object, const char *name);
bool api_flag(const json_t *object, const char *name);
int64_t api_integer(const json_t *object, const char *name);
/* {"bandwidth": {...}, "ops": {...}} and one bucket. What is not given stays as it is, as PATCH wants it; a bucket with size or refill_time 0 is no limit. */
void api_rate_limit(const json_t *object, struct rate_limit_config *limit);
void api_bucket(const json_t *object, struct bucket_config *bucket);

/* For a device or function that does not exist (yet): 400. */
int api_not_available(struct api_request *request, struct error *err);

#endif
