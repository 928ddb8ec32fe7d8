/*
 * /snapshot/create and /snapshot/load, and the configuration's JSON as a snapshot's machine has it (the way back of api_build.c). On the HTTP server's thread.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "control/api_priv.h"
#include "control/vm_control.h"
#include "util/loop.h"

int api_put_snapshot_create(struct api_request *request, struct error *err)
{
    const char *type = api_text(request->body, "snapshot_type");
    struct snapshot_files files = {.state = api_text(request->body, "snapshot_path"),
                                   .memory = api_text(request->body, "mem_file_path"),
                                   .differential = type && strcmp(type, "Diff") == 0};
    uint64_t begin_ns = loop_now_ns();
    if (!machine_is_paused(request->machine))
        return error_set(err, -EBUSY, "Create snapshot error: the microVM is not paused; pause it first.");
    int r = machine_snapshot_save(request->machine, &files, err);
    if (r)
        return error_prefix(err, "Create snapshot error");
    api_metrics_latency(request->api->metrics, files.differential ? LATENCY_DIFF_SNAPSHOT : LATENCY_FULL_SNAPSHOT, loop_now_ns() - begin_ns);
    return 0;
}

/* ---- the configuration's JSON ---- */

static json_t *describe_bucket(const struct bucket_config *bucket)
{
    if (!bucket->size || !bucket->refill_ms)
        return json_null();
    return json_pack("{s:I, s:I, s:I}", "size", (json_int_t)bucket->size, "one_time_burst", (json_int_t)bucket->one_time_burst, "refill_time",
                     (json_int_t)bucket->refill_ms);
}

static json_t *describe_limit(const struct rate_limit_config *limit)
{
    json_t *bandwidth = describe_bucket(&limit->bandwidth), *ops = describe_bucket(&limit->ops);
    if (!json_is_null(bandwidth) || !json_is_null(ops))
        return json_pack("{s:o, s:o}", "bandwidth", bandwidth, "ops", ops);
    json_decref(bandwidth);
    json_decref(ops);
    return json_null();
}

/* Takes `value` over and keeps it as the section's PUT would: complete, and in an array when the section is one. */
static bool keep(json_t *configuration, const char *section, json_t *value)
{
    json_t *complete = value ? schema_complete(api_endpoint_of_section(section)->fields, value) : NULL;
    json_t *array = json_object_get(configuration, section);
    json_decref(value);
    if (!complete)
        return false;
    return (json_is_array(array) ? json_array_append_new(array, complete) : json_object_set_new(configuration, section, complete)) == 0;
}

/* In a snapshot of a machine that was made otherwise, devices have no names. */
static const char *name(const char *id, const char *otherwise)
{
    return id ? id : otherwise;
}

/* Where the address and the MTU begin that api_network_spec added; the end when it added none. */
static const char *own_options(const char *spec)
{
    const char *mac = strstr(spec, ",mac="), *mtu = strstr(spec, ",mtu=");
    return mac ? mac : mtu ? mtu : spec + strlen(spec);
}

/* Undoes api_network_spec. */
static json_t *describe_card(const char *spec, const struct net_card_config *card)
{
    const char *mac = strstr(spec, ",mac="), *end = own_options(spec);
    spec += strncmp(spec, "tap:", 4) == 0 ? 4 : 0;
    json_t *value = json_pack("{s:s, s:s%, s:o, s:o}", "iface_id", card->id, "host_dev_name", spec, (size_t)(end - spec), "rx_rate_limiter",
                              describe_limit(&card->receive), "tx_rate_limiter", describe_limit(&card->transmit));
    if (mac)
        json_object_set_new(value, "guest_mac", json_stringn(mac + 5, strcspn(mac + 5, ",")));
    if (card->mtu)
        json_object_set_new(value, "mtu", json_integer(card->mtu));
    return value;
}

static bool describe_devices(json_t *all, const struct machine_config *config)
{
    bool done = true;
    json_t *interfaces = json_array();
    for (unsigned i = 0; i < config->disk_count; i++) {
        const struct disk_config *disk = &config->disk[i];
        done &= keep(all, "drives", json_pack("{s:s, s:s, s:b, s:b, s:s, s:s?, s:o}", "drive_id", name(disk->id, "drive"), "path_on_host", disk->path,
                                              "is_root_device", disk->root, "is_read_only", disk->readonly, "cache_type",
                                              disk->writeback ? "Writeback" : "Unsafe", "partuuid", disk->partuuid, "rate_limiter",
                                              describe_limit(&disk->limit)));
    }
    for (unsigned i = 0; i < config->net_count; i++) {
        const struct net_card_config *card = &config->net_card[i];
        if (!card->id)
            continue;
        if (card->metadata)
            json_array_append_new(interfaces, json_string(card->id));
        done &= keep(all, "network-interfaces", describe_card(config->net[i], card));
    }
    for (unsigned i = 0; i < config->pmem_count; i++) {
        const struct pmem_config *pmem = &config->pmem[i];
        done &= keep(all, "pmem", json_pack("{s:s, s:s, s:b, s:b, s:o}", "id", name(pmem->id, "pmem"), "path_on_host", pmem->path, "root_device",
                                            pmem->root, "read_only", pmem->readonly, "rate_limiter", describe_limit(&pmem->limit)));
    }
    if (config->metadata.present)
        done &= keep(all, "mmds-config", json_pack("{s:s, s:O, s:s?, s:b}", "version", config->metadata.version_2 ? "V2" : "V1", "network_interfaces",
                                                   interfaces, "ipv4_address", config->metadata.address, "imds_compat",
                                                   config->metadata.imds_compatible));
    json_decref(interfaces);
    return done;
}

static bool describe_others(json_t *all, const struct machine_config *config)
{
    bool done = keep(all, "machine-config", json_pack("{s:i, s:I}", "vcpu_count", (int)config->cpus, "mem_size_mib", (json_int_t)(config->memory_bytes >> 20)));
    if (config->vsock.present)
        done &= keep(all, "vsock", json_pack("{s:I, s:s}", "guest_cid", (json_int_t)config->vsock.cid, "uds_path", config->vsock.path));
    if (config->balloon.present)
        done &= keep(all, "balloon", json_pack("{s:I, s:b, s:I, s:b, s:b}", "amount_mib", (json_int_t)config->balloon.amount_mib, "deflate_on_oom",
                                               config->balloon.deflate_on_oom, "stats_polling_interval_s",
                                               (json_int_t)config->balloon.statistics_interval_s, "free_page_hinting", config->balloon.hinting,
                                               "free_page_reporting", config->balloon.reporting));
    if (config->memory_hotplug.present)
        done &= keep(all, "memory-hotplug", json_pack("{s:I, s:I, s:I}", "total_size_mib", (json_int_t)config->memory_hotplug.total_mib, "slot_size_mib",
                                                      (json_int_t)config->memory_hotplug.slot_mib, "block_size_mib",
                                                      (json_int_t)config->memory_hotplug.block_mib));
    if (config->entropy_limit.bandwidth.size || config->entropy_limit.ops.size)
        done &= keep(all, "entropy", json_pack("{s:o}", "rate_limiter", describe_limit(&config->entropy_limit)));
    const char *output = config->console && strncmp(config->console, "file:", 5) == 0 ? config->console + 5 : NULL;
    if (output || config->serial_limit.size)
        done &= keep(all, "serial", json_pack("{s:s?, s:o}", "serial_out_path", output, "rate_limiter", describe_bucket(&config->serial_limit)));
    return done;
}

/* Logger and metrics are the process's own, dirty pages and huge ones the call's. */
static json_t *describe(struct api *api, const json_t *body, const struct machine_config *config)
{
    json_t *all = api_default_configuration();
    const char *pages = api_has(body, "huge_pages") ? api_text(body, "huge_pages") : "Snapshot";
    json_object_set(all, "logger", json_object_get(api->configuration, "logger"));
    json_object_set(all, "metrics", json_object_get(api->configuration, "metrics"));
    if (describe_devices(all, config) && describe_others(all, config)) {
        json_t *machine = json_object_get(all, "machine-config");
        if (api_flag(body, "track_dirty_pages") || api_flag(body, "enable_diff_snapshots"))
            json_object_set_new(machine, "track_dirty_pages", json_true());
        if (strcmp(pages, "Snapshot") != 0)
            json_object_set_new(machine, "huge_pages", json_string(pages));
        return all;
    }
    json_decref(all);
    return NULL;
}

/* ---- loading ---- */

static int replace(char **field, const char *value)
{
    char *copy = strdup(value);
    if (!copy)
        return -ENOMEM;
    free(*field);
    *field = copy;
    return 0;
}

/* What the snapshot's machine finds elsewhere on this host. */
static int override(const json_t *body, struct machine_config *config, struct error *err)
{
    size_t index;
    json_t *element;
    const json_t *vsock = json_object_get(body, "vsock_override");
    json_array_foreach(json_object_get(body, "network_overrides"), index, element)
    {
        char spec[512];
        unsigned i = 0;
        while (i < config->net_count && (!config->net_card[i].id || strcmp(config->net_card[i].id, api_text(element, "iface_id")) != 0))
            i++;
        if (i == config->net_count)
            return error_set(err, -ENODEV, "Load snapshot error: unknown network interface `%.64s`", api_text(element, "iface_id"));
        const char *options = own_options(config->net[i]);
        int r = api_network_spec(element, spec, sizeof spec, err);
        if (r)
            return r;
        if (strlen(spec) + strlen(options) >= sizeof spec)
            return error_set(err, -ENAMETOOLONG, "Load snapshot error: `host_dev_name` is too long.");
        strcat(spec, options); /* what the guest knows stays */
        if (replace(&config->net[i], spec))
            return error_set(err, -ENOMEM, "out of memory");
    }
    if (vsock && !json_is_null(vsock)) {
        if (!config->vsock.present)
            return error_set(err, -ENODEV, "Load snapshot error: there is no vsock device to override");
        int r = api_check_vsock(NULL, vsock, err);
        if (r)
            return r;
        if (replace(&config->vsock.path, api_text(vsock, "uds_path")))
            return error_set(err, -ENOMEM, "out of memory");
    }
    return 0;
}

/* The memory file's path; NULL with a message. */
static const char *memory_file(const json_t *body, struct error *err)
{
    const json_t *backend = json_object_get(body, "mem_backend");
    bool old = api_has(body, "mem_file_path"), new = json_is_object(backend);
    if (old == new) {
        error_set(err, -EINVAL, "%s", old ? "too many fields: either `mem_backend` or `mem_file_path` exclusively is required."
                                          : "missing field: either `mem_backend` or `mem_file_path` is required");
        return NULL;
    }
    if (old)
        return api_text(body, "mem_file_path");
    if (strcmp(api_text(backend, "backend_type"), "File") == 0)
        return api_text(backend, "backend_path");
    error_set(err, -ENOTSUP, "The memory backend Uffd is not available in Doppel; use File.");
    return NULL;
}

static bool is_fresh(struct api *api)
{
    json_t *fresh = api_default_configuration();
    json_object_set(fresh, "logger", json_object_get(api->configuration, "logger"));
    json_object_set(fresh, "metrics", json_object_get(api->configuration, "metrics"));
    bool equal = fresh && json_equal(fresh, api->configuration);
    json_decref(fresh);
    return equal;
}

static int check(struct api *api, const json_t *body, struct error *err)
{
    const char *pages = api_text(body, "huge_pages");
    if (!is_fresh(api))
        return error_set(err, -EBUSY, "Loading a microVM snapshot not allowed after configuring boot-specific resources.");
    if (pages && strcmp(pages, "2M") == 0)
        return error_set(err, -ENOTSUP, "huge_pages 2M is not available in Doppel.");
    return 0;
}

int api_put_snapshot_load(struct api_request *request, struct error *err)
{
    struct api *api = request->api;
    struct snapshot_files files = {.state = api_text(request->body, "snapshot_path"), .catch_up = api_flag(request->body, "clock_realtime")};
    struct machine *machine = NULL;
    json_t *configuration = NULL;
    uint64_t begin_ns = loop_now_ns();
    int r = check(api, request->body, err);
    if (r == 0 && !(files.memory = memory_file(request->body, err)))
        r = err->code;
    if (r)
        return r;
    r = machine_snapshot_config(&files, &api->config, err);
    if (r == 0)
        r = override(request->body, &api->config, err);
    if (r == 0 && api->options.engine)
        r = machine_config_set(&api->config, "engine", api->options.engine, err);
    api->config.sandbox = api->options.sandbox;
    if (api->options.sandbox_omit && !(api->config.sandbox_omit = strdup(api->options.sandbox_omit)))
        r = error_set(err, -ENOMEM, "out of memory");
    api->config.own_directory = api->options.own_directory;
    api->config.broker = api->options.broker;
    api->config.api_socket = api->options.api_socket;
    api->config.metadata.service = api->mmds; /* of no concern to a machine without metadata */
    if (r == 0 && !(configuration = describe(api, request->body, &api->config)))
        r = error_set(err, -ENOMEM, "out of memory");
    if (r == 0)
        r = machine_snapshot_load(&machine, &api->config, &files, err);
    if (r == 0 && !api_flag(request->body, "resume_vm"))
        r = machine_pause(machine, err); /* not started yet: it will start so */
    if (r == 0) {
        vm_control_attach(api->options.control, machine, &api->config);
        r = machine_start(machine, err);
    }
    if (r) {
        vm_control_detach(api->options.control, false);
        machine_destroy(machine);
        machine_config_clear(&api->config);
        json_decref(configuration);
        return error_prefix(err, "Load snapshot error");
    }
    json_decref(api->configuration);
    api->configuration = configuration;
    api_set_machine(api, machine);
    api_metrics_latency(api->metrics, LATENCY_LOAD_SNAPSHOT, loop_now_ns() - begin_ns);
    return 0;
}
