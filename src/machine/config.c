/*
 * Options and configuration files. Each key of options.def has a setter in one table; everything else (help, completion, JSON) is generic.
 */
#include "machine/config_priv.h"

#include <ctype.h>
#include <errno.h>
#include <jansson.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine/engine.h"
#include "machine/config_priv.h"
#include "machine/cpu_template.h"

const struct option_info option_table[] = {
#define OPTION(key, argument, flags, help) {key, argument, help, flags},
#include "machine/options.def"
#undef OPTION
    {NULL, NULL, NULL, 0},
};

const struct option_info *option_find(const char *key)
{
    for (const struct option_info *option = option_table; option->key; option++)
        if (strcmp(option->key, key) == 0)
            return option;
    return NULL;
}

void machine_config_init(struct machine_config *config)
{
    memset(config, 0, sizeof *config);
    config->memory_bytes = 512ull << 20;
    config->cpus = 1;
    config->broker = -1;
    config->input_fd = STDIN_FILENO;
    config->output_fd = STDOUT_FILENO;
}

/* Every text that the configuration owns. */
static void each_text(struct machine_config *config, void (*visit)(char **text, void *ctx), void *ctx)
{
    char **const texts[] = {&config->kernel, &config->initrd, &config->append, &config->engine, &config->console,
                       &config->virtio_console, &config->debug_console, &config->trace, &config->pid_file, &config->sandbox_omit};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        visit(texts[i], ctx);
    for (unsigned i = 0; i < config->disk_count; i++) {
        visit(&config->disk[i].path, ctx);
        visit(&config->disk[i].format, ctx);
        visit(&config->disk[i].origin, ctx);
        visit(&config->disk[i].serial, ctx);
        visit(&config->disk[i].id, ctx);
        visit(&config->disk[i].partuuid, ctx);
    }
    for (unsigned i = 0; i < config->net_count; i++) {
        visit(&config->net[i], ctx);
        visit(&config->net_card[i].id, ctx);
    }
    for (unsigned i = 0; i < config->pmem_count; i++) {
        visit(&config->pmem[i].id, ctx);
        visit(&config->pmem[i].path, ctx);
    }
    for (unsigned i = 0; i < config->share_count; i++) {
        visit(&config->share[i].path, ctx);
        visit(&config->share[i].tag, ctx);
    }
    visit(&config->vsock.path, ctx);
    visit(&config->metadata.address, ctx);
    visit(&config->metadata.path, ctx);
}

static void free_text(char **text, void *ctx)
{
    free(*text);
}

void machine_config_clear(struct machine_config *config)
{
    each_text(config, free_text, NULL);
    machine_config_init(config);
}

static void copy_text(char **text, void *ctx)
{
    bool *failed = ctx;
    if (!*text)
        return;
    *text = *failed ? NULL : strdup(*text);
    *failed |= !*text;
}

int machine_config_copy(struct machine_config *to, const struct machine_config *from)
{
    bool failed = false;
    *to = *from;
    each_text(to, copy_text, &failed);
    if (failed)
        machine_config_clear(to);
    return failed ? -ENOMEM : 0;
}

int parse_size(const char *text, uint64_t *bytes)
{
    char *end;
    if (!isdigit((unsigned char)text[0]))
        return -EINVAL;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    if (errno)
        return -ERANGE;
    unsigned shift = 20;
    static const char units[] = "KMGT";
    if (*end) {
        const char *unit = strchr(units, toupper((unsigned char)*end));
        if (!unit)
            return -EINVAL;
        shift = 10 * (unsigned)(unit - units + 1);
        end++;
        if (*end == 'i')
            end++;
        if (*end == 'B' || *end == 'b')
            end++;
        if (*end)
            return -EINVAL;
    }
    if (number > UINT64_MAX >> shift)
        return -ERANGE;
    *bytes = (uint64_t)number << shift;
    return 0;
}

/* One word of a list such as "restart|exit": its index goes to *choice. */
static int choose(const char *key, const char *value, const char *const *words, unsigned *choice, struct error *err)
{
    char list[160] = "";
    for (unsigned i = 0; words[i]; i++) {
        if (strcmp(words[i], value) == 0) {
            *choice = i;
            return 0;
        }
        strncat(list, i ? ", " : "", sizeof list - strlen(list) - 1);
        strncat(list, words[i], sizeof list - strlen(list) - 1);
    }
    return error_set(err, -EINVAL, "--%s: \"%s\" is not one of %s", key, value, list);
}

typedef int setter_fn(struct machine_config *config, const char *key, const char *value, struct error *err);

static int set_memory(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    uint64_t bytes;
    if (parse_size(value, &bytes))
        return error_set(err, -EINVAL, "--memory: \"%s\" is not a size; write for example 512M or 2G", value);
    if (bytes < CONFIG_MEMORY_MIN_BYTES)
        return error_set(err, -EINVAL, "--memory: %s is too small; the least is 1M, and a Linux guest wants 64M or more", value);
    if (bytes > CONFIG_MEMORY_MAX_BYTES)
        return error_set(err, -EINVAL, "--memory: %s is more than this host or a guest of this version can have (the most is 240G)", value);
    if (bytes % 4096)
        return error_set(err, -EINVAL, "--memory: %s is not a multiple of 4K", value);
    config->memory_bytes = bytes;
    return 0;
}

static int set_cpus(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    char *end;
    long count = strtol(value, &end, 10);
    if (end == value || *end || count < 1 || count > CONFIG_CPUS_MAX)
        return error_set(err, -EINVAL, "--cpus: \"%s\" is not a number from 1 to %d", value, CONFIG_CPUS_MAX);
    config->cpus = (unsigned)count;
    return 0;
}

static int set_engine(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"auto", "bt", "kvm", "interp", NULL};
    unsigned choice;
    int r = choose(key, value, words, &choice, err);
    return r ? r : config_replace(&config->engine, value, err);
}

static int set_transport(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"pci", "mmio", NULL}; /* enum virtio_transport */
    unsigned choice = 0;
    int r = choose(key, value, words, &choice, err);
    if (r == 0)
        config->transport = (enum virtio_transport)choice;
    return r;
}

static int set_generation_id(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    config->has_generation_id = strcmp(value, "auto") != 0;
    if (config->has_generation_id && vmgenid_parse(value, &config->generation_id))
        return error_set(err, -EINVAL, "--%s: \"%s\" is neither auto nor a GUID such as 324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87", key, value);
    return 0;
}

static int set_irqchip(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"auto", "user", "split", NULL}; /* enum engine_irqchip */
    unsigned choice = 0;
    int r = choose(key, value, words, &choice, err);
    config->irqchip = (enum engine_irqchip)choice;
    return r;
}

static int set_direct(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"auto", "off", "always", NULL}; /* enum engine_direct */
    unsigned choice = 0;
    int r = choose(key, value, words, &choice, err);
    config->direct = (enum engine_direct)choice;
    return r;
}

static int set_any_console(char **field, const char *key, const char *value, struct error *err)
{
    bool known = strcmp(value, "stdio") == 0 || strcmp(value, "none") == 0 || strcmp(value, "pty") == 0 ||
                 (strncmp(value, "file:", 5) == 0 && value[5]) || (strncmp(value, "unix:", 5) == 0 && value[5]);
    if (!known)
        return error_set(err, -EINVAL, "--%s: \"%s\" is not one of stdio, none, pty, file:PATH, unix:PATH", key, value);
    return config_replace(field, value, err);
}

static int set_console(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return set_any_console(&config->console, key, value, err);
}

static int set_virtio_console(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return set_any_console(&config->virtio_console, key, value, err);
}

static int set_debug_console(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return set_any_console(&config->debug_console, key, value, err);
}

static int set_boot(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"fast", "kernel", NULL};
    unsigned choice = 0;
    int r = choose(key, value, words, &choice, err);
    config->boot_in_guest = choice == 1;
    return r;
}

static int set_on_reset(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"restart", "exit", NULL};
    unsigned choice = 0;
    int r = choose(key, value, words, &choice, err);
    if (r == 0)
        config->on_reset = (enum on_reset)choice;
    return r;
}

static int set_on_panic(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"exit", "restart", "ignore", NULL};
    unsigned choice = 0;
    int r = choose(key, value, words, &choice, err);
    if (r == 0)
        config->on_panic = (enum on_panic)choice;
    return r;
}

static int set_sandbox(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"off", "on", NULL};
    unsigned choice = 0;
    if (strncmp(value, "omit=", 5) == 0) { /* not for users */
        config->sandbox = true;
        return config_replace(&config->sandbox_omit, value + 5, err);
    }
    int r = choose(key, value, words, &choice, err);
    if (r == 0)
        config->sandbox = choice == 1;
    return r;
}

static int set_flag(bool *field, const char *key, const char *value, struct error *err)
{
    static const char *const words[] = {"false", "true", NULL};
    unsigned choice = 1;
    int r = value ? choose(key, value, words, &choice, err) : 0;
    if (r == 0)
        *field = choice == 1;
    return r;
}

static int set_stats(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return set_flag(&config->stats, key, value, err);
}

static int set_perf_map(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return set_flag(&config->perf_map, key, value, err);
}

/* [phys:]ADDRESS, hexadecimal. */
static int set_dump_code(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    struct code_address address = {.physical = strncmp(value, "phys:", 5) == 0};
    const char *digits = value + (address.physical ? 5 : 0);
    char *end;
    errno = 0;
    address.address = strtoull(digits, &end, 16);
    if (!isxdigit((unsigned char)*digits) || *end || errno)
        return error_set(err, -EINVAL, "--dump-code: \"%s\" is not a hexadecimal address such as ffffffff81001230 or phys:1001230", value);
    if (config->dump_code_count == CONFIG_DUMPS_MAX)
        return error_set(err, -E2BIG, "--dump-code: more than %d addresses", CONFIG_DUMPS_MAX);
    config->dump_code[config->dump_code_count++] = address;
    config->stats = true;
    return 0;
}

static int set_config(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return machine_config_load(config, value, err);
}

static int set_cpu_baseline(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    return cpu_template_load(value, &config->processor, err) ? error_prefix(err, "--%s", key) : 0;
}

static const struct {
    const char *key;
    setter_fn *set;
} setters[] = {
    {"memory", set_memory},
    {"cpus", set_cpus},
    {"cpu-baseline", set_cpu_baseline},
    {"disk", config_set_disk},
    {"net", config_set_net},
    {"share", config_set_share},
    {"vsock", config_set_vsock},
    {"metadata", config_set_metadata},
    {"transport", set_transport},
    {"balloon", config_set_balloon},
    {"pmem", config_set_pmem},
    {"memory-hotplug", config_set_memory_hotplug},
    {"vm-generation-id", set_generation_id},
    {"engine", set_engine},
    {"direct", set_direct},
    {"kvm-irqchip", set_irqchip},
    {"console", set_console},
    {"virtio-console", set_virtio_console},
    {"debug-console", set_debug_console},
    {"boot", set_boot},
    {"on-reset", set_on_reset},
    {"on-panic", set_on_panic},
    {"stats", set_stats},
    {"sandbox", set_sandbox},
    {"perf-map", set_perf_map},
    {"dump-code", set_dump_code},
    {"config", set_config},
};

/* Options that are kept as they are. */
static const struct {
    const char *key;
    size_t offset;
} texts[] = {
    {"kernel", offsetof(struct machine_config, kernel)},   {"initrd", offsetof(struct machine_config, initrd)},
    {"append", offsetof(struct machine_config, append)},   {"trace", offsetof(struct machine_config, trace)},
    {"pid-file", offsetof(struct machine_config, pid_file)},
};

static char **text_field(const struct machine_config *config, const char *key)
{
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (strcmp(texts[i].key, key) == 0)
            return (char **)((char *)config + texts[i].offset);
    return NULL;
}

const char *machine_config_text(const struct machine_config *config, const char *key)
{
    if (strcmp(key, "stats") == 0)
        return config->stats ? "true" : "false";
    if (strcmp(key, "sandbox") == 0)
        return config->sandbox ? "on" : "off";
    char **field = text_field(config, key);
    return field ? *field : NULL;
}

int machine_config_set(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    const struct option_info *option = option_find(key);
    if (!option)
        return error_set(err, -EINVAL, "unknown option \"%s\"; see doppel run --help", key);
    if (!value && !(option->flags & OPT_FLAG))
        return error_set(err, -EINVAL, "--%s needs a value: --%s %s", key, key, option->argument);
    char **field = text_field(config, key);
    if (field)
        return config_replace(field, value, err);
    for (size_t i = 0; i < sizeof setters / sizeof *setters; i++)
        if (strcmp(setters[i].key, key) == 0)
            return setters[i].set(config, key, value, err);
    return error_set(err, -EINVAL, "option \"%s\" has no setter", key);
}

/* One JSON value: a string, number or boolean as on the command line; an array of them for a repeatable key. */
static int set_json(struct machine_config *config, const char *key, const json_t *value, bool in_array, struct error *err)
{
    char number[32];
    const struct option_info *option = option_find(key);
    if (!option || strcmp(key, "config") == 0)
        return error_set(err, -EINVAL, "unknown key \"%s\"; the keys are the options of doppel run", key);
    if (json_is_string(value))
        return machine_config_set(config, key, json_string_value(value), err);
    if (json_is_integer(value)) {
        snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        return machine_config_set(config, key, number, err);
    }
    if (json_is_boolean(value) && (option->flags & OPT_FLAG))
        return machine_config_set(config, key, json_is_true(value) ? "true" : "false", err);
    if (json_is_array(value) && !in_array && (option->flags & OPT_MANY)) {
        size_t index;
        json_t *element;
        json_array_foreach(value, index, element)
        {
            int r = set_json(config, key, element, true, err);
            if (r)
                return r;
        }
        return 0;
    }
    return error_set(err, -EINVAL, "key \"%s\" has a value of the wrong type%s", key,
                     option->flags & OPT_MANY ? "; give a string or an array of strings" : "; give a string or a number");
}

int machine_config_load(struct machine_config *config, const char *path, struct error *err)
{
    json_error_t why;
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return error_set(err, -EISDIR, "--config: %s is a directory; name a JSON file", path);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    int r = 0;
    if (!root) {
        if (why.line < 0)
            return error_set(err, -EINVAL, "--config: cannot read %s: %s", path, why.text);
        return error_set(err, -EINVAL, "--config: %s:%d:%d: %s", path, why.line, why.column, why.text);
    }
    if (!json_is_object(root)) {
        r = error_set(err, -EINVAL, "--config: %s is not a JSON object such as {\"kernel\": \"vmlinuz\", \"memory\": \"512M\"}", path);
    } else {
        const char *key;
        json_t *value;
        json_object_foreach(root, key, value)
        {
            r = set_json(config, key, value, false, err);
            if (r) {
                error_prefix(err, "--config: %s", path);
                break;
            }
        }
    }
    json_decref(root);
    return r;
}

int machine_config_check(const struct machine_config *config, struct error *err)
{
    if (!config->kernel)
        return error_set(err, -EINVAL, "no kernel: give one with --kernel FILE (./demo shows a complete example)");
    uint64_t host = (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    if (config->memory_bytes > host)
        return error_set(err, -EINVAL, "--memory: %llu MiB is more than this host has (%llu MiB)",
                         (unsigned long long)(config->memory_bytes >> 20), (unsigned long long)(host >> 20));
    if (config->balloon.present && config->balloon.amount_mib > config->memory_bytes >> 20)
        return error_set(err, -EINVAL, "--balloon: %u MiB is more than the guest's memory (%llu MiB)", config->balloon.amount_mib,
                         (unsigned long long)(config->memory_bytes >> 20));
    const struct memory_hotplug_config *hotplug = &config->memory_hotplug;
    if (hotplug->present && hotplug->total_mib > CONFIG_MEMORY_MAX_BYTES >> 20)
        return error_set(err, -EINVAL, "--memory-hotplug: a total of %llu MiB is too much; the most is %llu MiB", (unsigned long long)hotplug->total_mib,
                         CONFIG_MEMORY_MAX_BYTES >> 20);
    bool blocks_ok = hotplug->block_mib >= 2 && !(hotplug->block_mib & (hotplug->block_mib - 1));
    if (hotplug->present && (!blocks_ok || hotplug->slot_mib < 128 || hotplug->slot_mib % hotplug->block_mib || !hotplug->total_mib ||
                             hotplug->total_mib % hotplug->slot_mib))
        return error_set(err, -EINVAL, "--memory-hotplug: total must be whole slots (128M or more), a slot whole blocks, and a block a power of two from 2M");
    unsigned roots = 0;
    for (unsigned i = 0; i < config->disk_count; i++)
        roots += config->disk[i].root;
    for (unsigned i = 0; i < config->pmem_count; i++)
        roots += config->pmem[i].root;
    if (roots > 1)
        return error_set(err, -EINVAL, "more than one of --disk and --pmem is the kernel's root");
    const char *consoles[] = {config->console ? config->console : "stdio", config->virtio_console, config->debug_console};
    unsigned on_stdio = 0;
    for (unsigned i = 0; i < 3; i++)
        on_stdio += consoles[i] && strcmp(consoles[i], "stdio") == 0;
    if (on_stdio > 1)
        return error_set(err, -EINVAL, "only one of --console, --virtio-console and --debug-console can be stdio; put \"none\" for another");
    return 0;
}
