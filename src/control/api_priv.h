/* The API, inside: api.c (life, dispatch), api_endpoints.def (the table), api_configure.c (before the start), api_build.c (JSON to struct machine_config), api_run.c. */
#ifndef DOPPEL_CONTROL_API_PRIV_H
#define DOPPEL_CONTROL_API_PRIV_H

#include <pthread.h>
#include <stdatomic.h>

#include "control/api.h"
#include "control/api_metrics.h"
#include "control/api_schema.h"
#include "machine/config.h"
#include "metadata/metadata.h"

enum api_when { API_ANY_TIME, API_BEFORE_START, API_AFTER_START };
enum api_body { API_NO_BODY, API_BODY, API_BODY_OPTIONAL };

/* What the table says about an endpoint; http_route.data. */
struct api_endpoint {
    enum api_when when;
    enum api_body body;
    const struct field *fields; /* NULL: any JSON */
    const char *id_field;       /* of the body, must equal the path's */
    api_handler *handler;
    const char *section; /* where api_put_section and api_put_element keep the body */
    /* What the schema cannot say. `body` is complete. NULL: nothing. */
    int (*check)(struct api *api, const json_t *body, struct error *err);
    enum api_counter counter, failures; /* 0: none */
};

struct api {
    struct api_options options;
    json_t *configuration; /* as GET /vm/config */
    struct metadata *mmds;
    struct api_metrics *metrics;
    struct machine_config config; /* from the start on */
    pthread_mutex_t lock; /* guards machine and stopped */
    pthread_cond_t changed;
    struct machine *machine;
    bool stopped;
};

/* What is checked and done for each call, whoever makes it. `id` is "" without one in the path. */
int api_execute(struct api *api, const struct api_endpoint *endpoint, const char *id, const json_t *body, json_t **answer, struct error *err);
/* A machine was started: calls and api_wait_started know it from now on. */
void api_set_machine(struct api *api, struct machine *machine);
/* The endpoint that PUTs a section of the full configuration; NULL: there is none of that name. */
const struct api_endpoint *api_endpoint_of_section(const char *section);

/* api_configure.c */
json_t *api_default_configuration(void);
api_handler api_put_section, api_put_element, api_get_configuration, api_get_machine_config, api_put_machine_config, api_patch_machine_config, api_put_cpu_config,
    api_put_logger, api_put_metrics;
/* A card's back end as --net takes it. */
int api_network_spec(const json_t *card, char *spec, size_t room, struct error *err);
int api_check_boot_source(struct api *api, const json_t *body, struct error *err);
int api_check_drive(struct api *api, const json_t *body, struct error *err);
int api_check_network(struct api *api, const json_t *body, struct error *err);
int api_check_pmem(struct api *api, const json_t *body, struct error *err);
int api_check_machine_config(struct api *api, const json_t *body, struct error *err);
int api_check_memory_hotplug(struct api *api, const json_t *body, struct error *err);
int api_check_balloon(struct api *api, const json_t *body, struct error *err);
int api_check_vsock(struct api *api, const json_t *body, struct error *err);
int api_check_serial(struct api *api, const json_t *body, struct error *err);
int api_check_mmds_config(struct api *api, const json_t *body, struct error *err);
int api_check_cpu_config(struct api *api, const json_t *body, struct error *err);

/* api_build.c */
int api_build_config(struct api *api, struct machine_config *config, struct error *err);

/* api_devices.c */
api_handler api_patch_drive, api_patch_network, api_patch_pmem;

/* api_run.c */
api_handler api_get_instance, api_get_version, api_put_action, api_patch_vm, api_put_mmds, api_patch_mmds, api_get_mmds, api_get_balloon;

/* api_memory.c */
api_handler api_patch_balloon, api_get_balloon_statistics, api_patch_balloon_statistics, api_start_hinting, api_stop_hinting, api_get_hinting,
    api_get_memory_hotplug, api_patch_memory_hotplug;

/* api_snapshot.c */
api_handler api_put_snapshot_create, api_put_snapshot_load;

#endif
