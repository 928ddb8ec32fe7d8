/* From the configuration's JSON, whose every part has been checked when it came, to a struct machine_config. On the HTTP server's thread, or before that runs. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "control/api_cpu.h"
#include "control/api_priv.h"
#include "machine/cpu_template.h"

/* What the description gives a guest that names no arguments. */
#define DEFAULT_ARGUMENTS "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
#define COMMAND_LINE_ROOM 4096

/* Copies what is given; false: no memory. */
static bool copy(char **field, const json_t *object, const char *name)
{
    if (!api_has(object, name))
        return true;
    free(*field);
    *field = strdup(api_text(object, name));
    return *field != NULL;
}

static bool has_word(const char *text, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = text; (at = strstr(at, word)); at += length)
        if ((at == text || at[-1] == ' ') && (at[length] == '\0' || at[length] == ' '))
            return true;
    return false;
}

/* A root that is a disk is the machine's to name. */
static void add_pmem_root(struct api *api, char *line, size_t room)
{
    size_t index, length = strlen(line);
    json_t *element;
    json_array_foreach(api_section(api, "pmem"), index, element)
    {
        if (!api_flag(element, "root_device"))
            continue;
        snprintf(line + length, room - length, " root=/dev/pmem%zu %s", index, api_flag(element, "read_only") ? "ro" : "rw");
        return;
    }
}

static int build_boot(struct api *api, struct machine_config *config, struct error *err)
{
    char line[COMMAND_LINE_ROOM];
    const json_t *source = api_section(api, "boot-source");
    if (!source)
        return error_set(err, -EINVAL, "Cannot start microvm without kernel configuration.");
    const char *arguments = api_has(source, "boot_args") ? api_text(source, "boot_args") : DEFAULT_ARGUMENTS;
    snprintf(line, sizeof line, "%s%s", arguments, api->options.pci || has_word(arguments, "pci=off") ? "" : " pci=off");
    add_pmem_root(api, line, sizeof line);
    config->append = strdup(line);
    return config->append && copy(&config->kernel, source, "kernel_image_path") && copy(&config->initrd, source, "initrd_path")
               ? 0
               : error_set(err, -ENOMEM, "out of memory");
}

static int build_drives(struct api *api, struct machine_config *config)
{
    size_t index;
    json_t *drive;
    json_array_foreach(api_section(api, "drives"), index, drive)
    {
        struct disk_config *disk = &config->disk[config->disk_count++];
        disk->readonly = api_flag(drive, "is_read_only");
        disk->root = api_flag(drive, "is_root_device");
        disk->report_full = true; /* as clients of that API expect */
        disk->writeback = strcmp(api_text(drive, "cache_type"), "Writeback") == 0;
        api_rate_limit(json_object_get(drive, "rate_limiter"), &disk->limit);
        if (!copy(&disk->path, drive, "path_on_host") || !copy(&disk->id, drive, "drive_id") || !copy(&disk->partuuid, drive, "partuuid"))
            return -ENOMEM;
    }
    json_array_foreach(api_section(api, "pmem"), index, drive)
    {
        struct pmem_config *pmem = &config->pmem[config->pmem_count++];
        pmem->readonly = api_flag(drive, "read_only");
        pmem->root = api_flag(drive, "root_device");
        api_rate_limit(json_object_get(drive, "rate_limiter"), &pmem->limit);
        if (!copy(&pmem->path, drive, "path_on_host") || !copy(&pmem->id, drive, "id"))
            return -ENOMEM;
    }
    return 0;
}

static bool answers_metadata(struct api *api, const char *id)
{
    size_t index;
    json_t *element;
    json_array_foreach(json_object_get(api_section(api, "mmds-config"), "network_interfaces"), index, element)
        if (strcmp(json_string_value(element), id) == 0)
            return true;
    return false;
}

static int build_network(struct api *api, struct machine_config *config, struct error *err)
{
    size_t index;
    json_t *card;
    json_array_foreach(api_section(api, "network-interfaces"), index, card)
    {
        char spec[512];
        struct net_card_config *net = &config->net_card[config->net_count];
        int r = api_network_spec(card, spec, sizeof spec, err);
        if (r == 0 && !(config->net[config->net_count++] = strdup(spec)))
            r = -ENOMEM;
        if (r || !copy(&net->id, card, "iface_id"))
            return r ? r : -ENOMEM;
        api_rate_limit(json_object_get(card, "rx_rate_limiter"), &net->receive);
        api_rate_limit(json_object_get(card, "tx_rate_limiter"), &net->transmit);
        net->mtu = (unsigned)api_integer(card, "mtu");
        net->metadata = answers_metadata(api, net->id);
    }
    /* A machine without any would get one. */
    return config->net_count ? 0 : machine_config_set(config, "net", "none", err);
}

static int build_memory_devices(struct api *api, struct machine_config *config)
{
    const json_t *balloon = api_section(api, "balloon"), *hotplug = api_section(api, "memory-hotplug");
    if (balloon)
        config->balloon = (struct balloon_config){.present = true,
                                                  .amount_mib = (uint32_t)api_integer(balloon, "amount_mib"),
                                                  .deflate_on_oom = api_flag(balloon, "deflate_on_oom"),
                                                  .hinting = api_flag(balloon, "free_page_hinting"),
                                                  .reporting = api_flag(balloon, "free_page_reporting"),
                                                  .statistics_interval_s = (uint32_t)api_integer(balloon, "stats_polling_interval_s")};
    if (hotplug)
        config->memory_hotplug = (struct memory_hotplug_config){.present = true,
                                                                .total_mib = (uint64_t)api_integer(hotplug, "total_size_mib"),
                                                                .slot_mib = (uint64_t)api_integer(hotplug, "slot_size_mib"),
                                                                .block_mib = (uint64_t)api_integer(hotplug, "block_size_mib")};
    return 0;
}

static int build_others(struct api *api, struct machine_config *config, struct error *err)
{
    const json_t *vsock = api_section(api, "vsock"), *mmds = api_section(api, "mmds-config"), *serial = api_section(api, "serial");
    int r = build_memory_devices(api, config);
    if (vsock) {
        config->vsock.present = true;
        config->vsock.cid = (uint32_t)api_integer(vsock, "guest_cid");
        r = copy(&config->vsock.path, vsock, "uds_path") ? r : -ENOMEM;
    }
    if (mmds) {
        config->metadata.present = true;
        config->metadata.service = api->mmds;
        config->metadata.version_2 = strcmp(api_text(mmds, "version"), "V2") == 0;
        config->metadata.imds_compatible = api_flag(mmds, "imds_compat");
        r = copy(&config->metadata.address, mmds, "ipv4_address") ? r : -ENOMEM;
    }
    api_rate_limit(json_object_get(api_section(api, "entropy"), "rate_limiter"), &config->entropy_limit);
    api_bucket(json_object_get(serial, "rate_limiter"), &config->serial_limit);
    if (r == 0 && serial && api_has(serial, "serial_out_path")) {
        char console[4200];
        snprintf(console, sizeof console, "file:%s", api_text(serial, "serial_out_path"));
        r = machine_config_set(config, "console", console, err);
    }
    return r;
}

int api_build_config(struct api *api, struct machine_config *config, struct error *err)
{
    const json_t *machine = api_section(api, "machine-config");
    config->memory_bytes = (uint64_t)api_integer(machine, "mem_size_mib") << 20;
    config->cpus = (unsigned)api_integer(machine, "vcpu_count");
    config->transport = api->options.pci ? TRANSPORT_PCI : TRANSPORT_MMIO;
    config->sandbox = api->options.sandbox;
    if (api->options.sandbox_omit && !(config->sandbox_omit = strdup(api->options.sandbox_omit)))
        return error_set(err, -ENOMEM, "out of memory");
    config->own_directory = api->options.own_directory;
    config->broker = api->options.broker;
    config->api_socket = api->options.api_socket;
    config->boot_timer = api->options.boot_timer;
    config->on_reset = ON_RESET_EXIT;
    config->on_panic = ON_PANIC_IGNORE; /* it resets by itself, or stays for a look, as its command line says */
    const json_t *custom = api_section(api, "cpu-config");
    int r = custom ? cpu_template_read(custom, &config->processor, err) : api_cpu_template(api_text(machine, "cpu_template"), &config->processor, err);
    if (r == 0)
        r = build_boot(api, config, err);
    if (r == 0)
        r = build_drives(api, config);
    if (r == 0)
        r = build_network(api, config, err);
    if (r == 0)
        r = build_others(api, config, err);
    if (r == 0 && api->options.engine)
        r = machine_config_set(config, "engine", api->options.engine, err);
    if (r && err && !err->code)
        return error_set(err, r, "out of memory");
    return r;
}
