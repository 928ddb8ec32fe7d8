/* A machine's configuration as JSON, for people and programs that ask what a machine is. */
#include "control/vm_control_priv.h"
#include "metadata/metadata.h"

static void set_text(json_t *object, const char *key, const char *value)
{
    if (value)
        json_object_set_new(object, key, json_string(value));
}

static json_t *disks_json(const struct machine_config *config)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < config->disk_count; i++) {
        const struct disk_config *disk = &config->disk[i];
        json_t *object = json_pack("{s:b}", "readonly", disk->readonly);
        set_text(object, "path", disk->path);
        set_text(object, "format", disk->format ? disk->format : "raw");
        set_text(object, "serial", disk->serial);
        set_text(object, "id", disk->id);
        json_array_append_new(list, object);
    }
    return list;
}

static json_t *nets_json(const struct machine_config *config)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < config->net_count; i++)
        json_array_append_new(list, json_string(config->net[i]));
    if (!config->net_count)
        json_array_append_new(list, json_string("user"));
    return list;
}

static json_t *shares_json(const struct machine_config *config)
{
    json_t *list = json_array();
    for (unsigned i = 0; i < config->share_count; i++) {
        const struct share_config *share = &config->share[i];
        json_array_append_new(list, json_pack("{s:s?, s:s?, s:b}", "path", share->path, "tag", share->tag, "readonly", share->readonly));
    }
    return list;
}

json_t *vm_config_json(const struct machine_config *config)
{
    json_t *object = json_pack("{s:I, s:i, s:s, s:s, s:s, s:s}", "memory_bytes", (json_int_t)config->memory_bytes, "cpus", (int)config->cpus, "engine",
                               config->engine ? config->engine : "auto", "console", config->console ? config->console : "stdio", "on_reset",
                               config->on_reset == ON_RESET_EXIT ? "exit" : "restart", "on_panic",
                               config->on_panic == ON_PANIC_EXIT ? "exit" : config->on_panic == ON_PANIC_RESTART ? "restart" : "ignore");
    set_text(object, "kernel", config->kernel);
    set_text(object, "initrd", config->initrd);
    set_text(object, "append", config->append);
    set_text(object, "virtio_console", config->virtio_console);
    set_text(object, "debug_console", config->debug_console);
    json_object_set_new(object, "disks", disks_json(config));
    json_object_set_new(object, "nets", nets_json(config));
    json_object_set_new(object, "shares", shares_json(config));
    if (config->vsock.present)
        json_object_set_new(object, "vsock", json_pack("{s:I, s:s?}", "cid", (json_int_t)config->vsock.cid, "path", config->vsock.path));
    if (config->metadata.present)
        json_object_set_new(object, "metadata", json_pack("{s:i, s:b, s:s}", "version", config->metadata.version_2 ? 2 : 1, "imds", config->metadata.imds_compatible, "address",
                                                          config->metadata.address ? config->metadata.address : METADATA_ADDRESS_DEFAULT));
    return object;
}
