/*
 * Before the start: what a body must have beyond its schema, and the configuration it becomes part of. The configuration is kept as the JSON of GET /vm/config; a
 * refused call has not touched it. On the HTTP server's thread, or before that runs.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/api_cpu.h"
#include "control/api_priv.h"
#include "machine/cpu_template.h"
#include "util/log.h"

#define COMMAND_LINE_BYTES_MAX 2048u

/* ---- keeping ---- */

json_t *api_default_configuration(void)
{
    static const char *const empty[] = {"balloon", "boot-source", "cpu-config", "entropy", "logger", "memory-hotplug", "metrics", "mmds-config", "serial", "vsock"};
    json_t *configuration = json_pack("{s:[], s:[], s:[]}", "drives", "network-interfaces", "pmem");
    json_t *machine = json_pack("{s:i, s:i}", "vcpu_count", 1, "mem_size_mib", 128);
    json_object_set_new(configuration, "machine-config", schema_complete(schema_machine, machine));
    json_decref(machine);
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++)
        json_object_set_new(configuration, empty[i], json_null());
    return configuration;
}

static int keep(struct api *api, const char *section, const struct field *fields, const json_t *body, struct error *err)
{
    json_t *complete = schema_complete(fields, body);
    if (!complete || json_object_set_new(api->configuration, section, complete))
        return error_set(err, -ENOMEM, "out of memory");
    return 0;
}

int api_put_section(struct api_request *request, struct error *err)
{
    const struct api_endpoint *endpoint = request->endpoint;
    return keep(request->api, endpoint->section, endpoint->fields, request->body, err);
}

/* The root drive comes first, so that it is the guest's first disk whatever the order of the calls. */
int api_put_element(struct api_request *request, struct error *err)
{
    const struct api_endpoint *endpoint = request->endpoint;
    json_t *array = json_object_get(request->api->configuration, endpoint->section), *element;
    json_t *complete = schema_complete(endpoint->fields, request->body);
    size_t index;
    if (!complete)
        return error_set(err, -ENOMEM, "out of memory");
    json_array_foreach(array, index, element)
        if (strcmp(api_text(element, endpoint->id_field), request->id) == 0)
            break;
    bool root = api_flag(complete, "is_root_device");
    int r;
    if (root) {
        json_array_remove(array, index);
        r = json_array_insert_new(array, 0, complete);
    } else if (index < json_array_size(array)) {
        r = json_array_set_new(array, index, complete);
    } else {
        r = json_array_append_new(array, complete);
    }
    return r ? error_set(err, -ENOMEM, "out of memory") : 0;
}

int api_get_configuration(struct api_request *request, struct error *err)
{
    request->answer = json_deep_copy(request->api->configuration);
    return request->answer ? 0 : -ENOMEM;
}

/* ---- machine and processor ---- */

int api_check_machine_config(struct api *api, const json_t *body, struct error *err)
{
    int64_t cpus = api_integer(body, "vcpu_count");
    const char *pages = api_text(body, "huge_pages");
    if (api_flag(body, "smt") && cpus > 1 && cpus % 2)
        return error_set(err, -EINVAL, "The vCPU count is invalid: with SMT it must be 1 or an even number.");
    if ((uint64_t)api_integer(body, "mem_size_mib") > CONFIG_MEMORY_MAX_BYTES >> 20)
        return error_set(err, -EINVAL, "The memory size (MiB) is invalid: the most is %llu.", CONFIG_MEMORY_MAX_BYTES >> 20);
    if (api_integer(body, "mem_size_mib") < api_integer(api_section(api, "balloon"), "amount_mib"))
        return error_set(err, -EINVAL, "The memory size (MiB) is smaller than the previously set balloon device target size.");
    if (strcmp(pages, "2M") == 0)
        return error_set(err, -ENOTSUP, "huge_pages 2M is not available in Doppel, whose guest memory is shared page by page; use None or Transparent.");
    struct processor_config processor = {0};
    return api_cpu_template(api_text(body, "cpu_template"), &processor, err);
}

/* Of a template and a custom configuration the later one counts. */
static void drop_custom_processor(struct api *api, const json_t *body)
{
    if (api_has(body, "cpu_template") && strcmp(api_text(body, "cpu_template"), "None") != 0)
        json_object_set_new(api->configuration, "cpu-config", json_null());
}

int api_put_machine_config(struct api_request *request, struct error *err)
{
    int r = api_put_section(request, err);
    if (r == 0)
        drop_custom_processor(request->api, request->body);
    return r;
}

int api_get_machine_config(struct api_request *request, struct error *err)
{
    request->answer = json_deep_copy(api_section(request->api, "machine-config"));
    return request->answer ? 0 : -ENOMEM;
}

int api_patch_machine_config(struct api_request *request, struct error *err)
{
    const char *key;
    json_t *value, *now = json_deep_copy(api_section(request->api, "machine-config"));
    bool empty = true;
    json_object_foreach((json_t *)request->body, key, value)
    {
        if (json_is_null(value))
            continue;
        json_object_set(now, key, value);
        empty = false;
    }
    int r = empty ? error_set(err, -EINVAL, "Empty PATCH request.") : api_check_machine_config(request->api, now, err);
    if (r == 0) {
        json_object_set(request->api->configuration, "machine-config", now);
        drop_custom_processor(request->api, request->body);
    }
    json_decref(now);
    return r;
}

int api_check_cpu_config(struct api *api, const json_t *body, struct error *err)
{
    struct processor_config processor = {0};
    return cpu_template_read(body, &processor, err);
}

int api_put_cpu_config(struct api_request *request, struct error *err)
{
    int r = api_put_section(request, err);
    if (r == 0)
        json_object_set_new(api_section(request->api, "machine-config"), "cpu_template", json_string("None"));
    return r;
}

/* ---- files ---- */

static int check_readable(const char *path, const char *what, struct error *err)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return error_set(err, -errno, "The %s file cannot be opened: %s: %s", what, path, strerror(errno));
    bool regular = fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    close(fd);
    return regular ? 0 : error_set(err, -EINVAL, "The %s file cannot be opened: %s is not a regular file", what, path);
}

int api_check_boot_source(struct api *api, const json_t *body, struct error *err)
{
    const char *arguments = api_text(body, "boot_args");
    int r = check_readable(api_text(body, "kernel_image_path"), "kernel", err);
    if (r == 0 && api_has(body, "initrd_path"))
        r = check_readable(api_text(body, "initrd_path"), "initrd", err);
    if (r == 0 && arguments && strlen(arguments) >= COMMAND_LINE_BYTES_MAX)
        r = error_set(err, -EINVAL, "The kernel command line is invalid: it has more than %u characters.", COMMAND_LINE_BYTES_MAX - 1);
    for (const char *c = arguments; r == 0 && c && *c; c++)
        if (*c < ' ' || *c > '~')
            r = error_set(err, -EINVAL, "The kernel command line is invalid: it has a character that is not printable ASCII.");
    return r;
}

static int check_backing(const char *path, bool read_only, struct error *err)
{
    struct stat st;
    int fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    if (fd < 0)
        return error_set(err, -errno, "Error manipulating the backing file: %s: %s", strerror(errno), path);
    bool usable = fstat(fd, &st) == 0 && (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode));
    close(fd);
    return usable ? 0 : error_set(err, -EINVAL, "Error manipulating the backing file: %s is neither a file nor a block device", path);
}

/* Another drive or pmem device than `own` that is the root. */
static bool other_root(struct api *api, const char *own)
{
    size_t index;
    json_t *element;
    json_array_foreach(api_section(api, "drives"), index, element)
        if (api_flag(element, "is_root_device") && strcmp(api_text(element, "drive_id"), own) != 0)
            return true;
    json_array_foreach(api_section(api, "pmem"), index, element)
        if (api_flag(element, "root_device") && strcmp(api_text(element, "id"), own) != 0)
            return true;
    return false;
}

static int check_room(struct api *api, const char *section, const char *id_field, const char *id, size_t max, struct error *err)
{
    if (json_array_size(api_section(api, section)) < max || api_section_element(api, section, id_field, id))
        return 0;
    return error_set(err, -E2BIG, "There cannot be more than %zu %s.", max, section);
}

int api_check_drive(struct api *api, const json_t *body, struct error *err)
{
    const char *id = api_text(body, "drive_id"), *partuuid = api_text(body, "partuuid");
    if (api_has(body, "socket"))
        return error_set(err, -ENOTSUP, "Unable to create the drive: vhost-user-block (`socket`) is not available in Doppel; give `path_on_host`.");
    if (!api_has(body, "path_on_host") || !api_has(body, "is_read_only"))
        return error_set(err, -EINVAL, "Unable to create the drive: missing field `%s`", api_has(body, "path_on_host") ? "is_read_only" : "path_on_host");
    if (api_flag(body, "is_root_device") && other_root(api, id))
        return error_set(err, -EEXIST, "A root block device already exists!");
    for (const char *c = partuuid; c && *c; c++)
        if (!strchr("0123456789abcdefABCDEF-", *c))
            return error_set(err, -EINVAL, "Unable to create the drive: `partuuid` is not a UUID.");
    int r = check_room(api, "drives", "drive_id", id, CONFIG_DISKS_MAX, err);
    return r ? r : check_backing(api_text(body, "path_on_host"), api_flag(body, "is_read_only"), err);
}

int api_check_pmem(struct api *api, const json_t *body, struct error *err)
{
    const char *id = api_text(body, "id");
    if (api_flag(body, "root_device") && other_root(api, id))
        return error_set(err, -EEXIST, "A root device already exists!");
    int r = check_room(api, "pmem", "id", id, CONFIG_PMEMS_MAX, err);
    return r ? r : check_backing(api_text(body, "path_on_host"), api_flag(body, "read_only"), err);
}

/* ---- network ---- */

/* host_dev_name is a tap device's name, or one of Doppel's own specifications. */
int api_network_spec(const json_t *card, char *spec, size_t room, struct error *err)
{
    const char *name = api_text(card, "host_dev_name");
    bool own = strcmp(name, "user") == 0 || strncmp(name, "user,", 5) == 0 || strncmp(name, "tap:", 4) == 0 || strcmp(name, "none") == 0;
    if (!own && (!*name || strchr(name, ',')))
        return error_set(err, -EINVAL, "Could not create the network device: \"%.64s\" is not the name of a tap device.", name);
    int length = snprintf(spec, room, "%s%s", own ? "" : "tap:", name);
    if (length >= 0 && (size_t)length < room && api_has(card, "guest_mac") && strcmp(name, "none") != 0)
        length += snprintf(spec + length, room - (size_t)length, ",mac=%s", api_text(card, "guest_mac"));
    if (length >= 0 && (size_t)length < room && api_has(card, "mtu") && strcmp(name, "none") != 0)
        length += snprintf(spec + length, room - (size_t)length, ",mtu=%d", (int)api_integer(card, "mtu"));
    return length >= 0 && (size_t)length < room ? 0 : error_set(err, -ENAMETOOLONG, "Could not create the network device: `host_dev_name` is too long.");
}

static int check_mac(struct api *api, const json_t *body, struct error *err)
{
    unsigned byte[6];
    char rest;
    size_t index;
    json_t *other;
    const char *mac = api_text(body, "guest_mac");
    if (!mac)
        return 0;
    if (strlen(mac) != 17 || sscanf(mac, "%2x:%2x:%2x:%2x:%2x:%2x%c", &byte[0], &byte[1], &byte[2], &byte[3], &byte[4], &byte[5], &rest) != 6)
        return error_set(err, -EINVAL, "The MAC address is not valid: %.32s", mac);
    json_array_foreach(api_section(api, "network-interfaces"), index, other)
        if (api_has(other, "guest_mac") && strcasecmp(api_text(other, "guest_mac"), mac) == 0 &&
            strcmp(api_text(other, "iface_id"), api_text(body, "iface_id")) != 0)
            return error_set(err, -EADDRINUSE, "The MAC address is already in use: %s", mac);
    return 0;
}

int api_check_network(struct api *api, const json_t *body, struct error *err)
{
    char spec[512];
    struct machine_config config;
    int r = check_room(api, "network-interfaces", "iface_id", api_text(body, "iface_id"), CONFIG_NETS_MAX, err);
    if (r == 0)
        r = check_mac(api, body, err);
    if (r == 0)
        r = api_network_spec(body, spec, sizeof spec, err);
    if (r)
        return r;
    machine_config_init(&config);
    r = machine_config_set(&config, "net", spec, err);
    machine_config_clear(&config);
    return r ? error_prefix(err, "Could not create the network device") : 0;
}

int api_check_mmds_config(struct api *api, const json_t *body, struct error *err)
{
    size_t index;
    json_t *id;
    uint8_t address[4];
    const json_t *interfaces = json_object_get(body, "network_interfaces");
    if (json_array_size(interfaces) == 0)
        return error_set(err, -EINVAL, "The list of network interface IDs that allow MMDS requests is empty.");
    json_array_foreach(interfaces, index, id)
        if (!api_section_element(api, "network-interfaces", "iface_id", json_string_value(id)))
            return error_set(err, -EINVAL, "The list of network interface IDs provided contains at least one ID that does not correspond to any existing "
                                           "network interface.");
    if (!metadata_parse_address(api_text(body, "ipv4_address"), address))
        return error_set(err, -EINVAL, "The MMDS IPv4 address is not link local.");
    return 0;
}

/* ---- other devices ---- */

int api_check_balloon(struct api *api, const json_t *body, struct error *err)
{
    if (api_integer(body, "amount_mib") > api_integer(api_section(api, "machine-config"), "mem_size_mib"))
        return error_set(err, -EINVAL, "Amount of pages requested cannot be satisfied: the balloon is larger than the memory.");
    return 0;
}

int api_check_vsock(struct api *api, const json_t *body, struct error *err)
{
    const char *path = api_text(body, "uds_path");
    return *path && strlen(path) < 108 - 11 ? 0 : error_set(err, -EINVAL, "Cannot create vsock device: `uds_path` is empty or too long."); /* PATH_PORT */
}

int api_check_serial(struct api *api, const json_t *body, struct error *err)
{
    const char *path = api_text(body, "serial_out_path");
    if (!path)
        return 0;
    int fd = open(path, O_RDWR | O_CREAT | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0600);
    if (fd < 0)
        return error_set(err, -errno, "Cannot open the serial output %s: %s", path, strerror(errno));
    close(fd);
    return 0;
}

int api_check_memory_hotplug(struct api *api, const json_t *body, struct error *err)
{
    int64_t total = api_integer(body, "total_size_mib"), slot = api_integer(body, "slot_size_mib"), block = api_integer(body, "block_size_mib");
    if (!api_has(body, "total_size_mib"))
        return error_set(err, -EINVAL, "An error occurred when deserializing the json body of a request: missing field `total_size_mib`");
    if (block & (block - 1))
        return error_set(err, -EINVAL, "Block size must be a power of 2.");
    if (slot % block)
        return error_set(err, -EINVAL, "Slot size must be a multiple of block size.");
    if (total < slot || total % slot)
        return error_set(err, -EINVAL, "Total size must be a multiple of slot size, and not smaller.");
    if ((uint64_t)total > CONFIG_MEMORY_MAX_BYTES >> 20)
        return error_set(err, -EINVAL, "Total size (MiB) is invalid: the most is %llu.", CONFIG_MEMORY_MAX_BYTES >> 20);
    return 0;
}

/* ---- logger, metrics ---- */

static const char *or_null(const json_t *body, const char *name)
{
    return api_has(body, name) ? api_text(body, name) : NULL;
}

static int configure_logger(struct api *api, const json_t *body, struct error *err)
{
    struct log_format format = {.instance = api->options.id,
                                .level = api_flag(body, "show_level"),
                                .origin = api_flag(body, "show_log_origin"),
                                .module = or_null(body, "module")};
    const char *path = or_null(body, "log_path"), *level = or_null(body, "level");
    static const struct {
        const char *word;
        enum log_level level;
    } levels[] = {{"off", LOG_OFF},     {"error", LOG_ERROR}, {"warning", LOG_WARNING}, {"warn", LOG_WARNING},
                  {"info", LOG_INFO},   {"debug", LOG_DEBUG}, {"trace", LOG_DEBUG}};
    if (path) {
        int r = log_open(path, &format);
        if (r)
            return error_set(err, r, "Cannot open the log file %s: %s", path, strerror(-r));
    }
    for (size_t i = 0; i < sizeof levels / sizeof *levels; i++)
        if (level && strcasecmp(levels[i].word, level) == 0)
            log_set_level(levels[i].level);
    return 0;
}

int api_put_logger(struct api_request *request, struct error *err)
{
    int r = configure_logger(request->api, request->body, err);
    return r ? r : api_put_section(request, err);
}

int api_put_metrics(struct api_request *request, struct error *err)
{
    const json_t *body = request->body;
    int r = api_metrics_open(request->api->metrics, api_text(body, "metrics_path"), api_flag(body, "emit_id"), json_object_get(body, "properties"), err);
    return r ? r : api_put_section(request, err);
}

/* ---- a file ---- */

int api_configure(struct api *api, const char *name, const json_t *value, struct error *err)
{
    const struct api_endpoint *endpoint = api_endpoint_of_section(name);
    json_t *answer = NULL;
    if (!json_is_object(value) && !json_is_array(value))
        return error_set(err, -EINVAL, "%s is not an object", name);
    if (!endpoint->id_field)
        return api_execute(api, endpoint, "", value, &answer, err);
    size_t index;
    json_t *element;
    json_array_foreach(value, index, element)
    {
        const char *id = api_text(element, endpoint->id_field);
        int r = api_execute(api, endpoint, id ? id : "", element, &answer, err);
        if (r)
            return r;
    }
    return 0;
}

static json_t *read_json(const char *path, struct error *err)
{
    json_error_t why;
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    if (!root && why.line < 0)
        error_set(err, -EINVAL, "cannot read %s: %s", path, why.text);
    else if (!root)
        error_set(err, -EINVAL, "%s:%d:%d: %s", path, why.line, why.column, why.text);
    return root;
}

int api_load_file(struct api *api, const char *path, struct error *err)
{
    /* An order in which what refers to something comes after it. */
    static const char *const sections[] = {"logger",  "metrics", "machine-config", "cpu-config", "boot-source", "drives",        "pmem", "network-interfaces",
                                           "balloon", "vsock",   "entropy",        "serial",     "memory-hotplug", "mmds-config", NULL};
    json_t *root = read_json(path, err), *value;
    const char *key;
    int r = root ? 0 : err->code;
    json_object_foreach(root, key, value)
    {
        unsigned i = 0;
        while (sections[i] && strcmp(sections[i], key) != 0)
            i++;
        if (!sections[i] && r == 0)
            r = error_set(err, -EINVAL, "unknown field `%.60s`", key);
    }
    for (unsigned i = 0; r == 0 && sections[i]; i++) {
        value = json_object_get(root, sections[i]);
        r = value && !json_is_null(value) ? api_configure(api, sections[i], value, err) : 0;
    }
    json_decref(root);
    return r ? error_prefix(err, "Configuration for VMM from one single json failed") : 0;
}

int api_load_metadata(struct api *api, const char *path, struct error *err)
{
    return metadata_load(api->mmds, path, err);
}
