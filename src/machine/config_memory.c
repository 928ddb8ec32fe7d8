/* Options about memory that comes and goes. A value is something first (a size, a file) and properties behind it, with commas between. Threading: none. */
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "machine/config_priv.h"

/* "name" or "name=on|off". */
static bool is_flag(const char *word, const char *name, bool *flag)
{
    size_t length = strlen(name);
    if (strncmp(word, name, length) != 0)
        return false;
    *flag = strcmp(word + length, "=off") != 0;
    return !word[length] || !*flag || strcmp(word + length, "=on") == 0;
}

static bool is_number(const char *word, const char *name, uint32_t most, uint32_t *number)
{
    size_t length = strlen(name);
    char *end;
    if (strncmp(word, name, length) != 0 || word[length] != '=' || !isdigit((unsigned char)word[length + 1]))
        return false;
    unsigned long long value = strtoull(word + length + 1, &end, 10);
    *number = (uint32_t)value;
    return !*end && value <= most;
}

static int set_pmem_property(struct pmem_config *pmem, const char *key, const char *word, struct error *err)
{
    if (strncmp(word, "id=", 3) == 0)
        return config_set_id(&pmem->id, key, word + 3, err);
    if (is_flag(word, "readonly", &pmem->readonly) || is_flag(word, "root", &pmem->root))
        return 0;
    return error_set(err, -EINVAL, "--%s: unknown property \"%s\"; known are readonly, root, id= (a comma in a file name is written twice)", key, word);
}

/* FILE[,readonly][,root][,id=I] */
int config_set_pmem(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    struct pmem_config pmem = {0};
    char *text = strdup(value);
    if (config->pmem_count == CONFIG_PMEMS_MAX || !text) {
        free(text);
        return error_set(err, -E2BIG, "--%s: more than %d", key, CONFIG_PMEMS_MAX);
    }
    char *rest = config_cut_path(text);
    int r = *text ? config_replace(&pmem.path, text, err) : error_set(err, -EINVAL, "--%s: no file name in \"%s\"", key, value);
    for (char *word; r == 0 && (word = strsep(&rest, ","));)
        r = set_pmem_property(&pmem, key, word, err);
    if (r == 0) {
        config->pmem[config->pmem_count++] = pmem;
    } else {
        free(pmem.path);
        free(pmem.id);
    }
    free(text);
    return r;
}

/* SIZE[,deflate-on-oom][,reporting][,hinting][,stats=SECONDS] */
int config_set_balloon(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    struct balloon_config balloon = {.present = true};
    char *text = strdup(value), *rest = text;
    uint64_t bytes;
    int r = 0;
    if (!text)
        return error_set(err, -ENOMEM, "out of memory");
    const char *word = strsep(&rest, ",");
    if (parse_size(word, &bytes) || bytes % (1u << 20) || bytes > CONFIG_MEMORY_MAX_BYTES)
        r = error_set(err, -EINVAL, "--%s: \"%s\" is not a size in MiB; write 0 for a balloon to be inflated later, or for example 256M", key, word);
    else
        balloon.amount_mib = (uint32_t)(bytes >> 20);
    while (r == 0 && (word = strsep(&rest, ","))) {
        bool known = is_flag(word, "deflate-on-oom", &balloon.deflate_on_oom) || is_flag(word, "reporting", &balloon.reporting) ||
                     is_flag(word, "hinting", &balloon.hinting) || is_number(word, "stats", 86400, &balloon.statistics_interval_s);
        if (!known)
            r = error_set(err, -EINVAL, "--%s: unknown property \"%s\"; known are deflate-on-oom, reporting, hinting, stats=SECONDS (up to 86400)", key, word);
    }
    free(text);
    if (r == 0)
        config->balloon = balloon;
    return r;
}

/* total=SIZE[,slot=SIZE][,block=SIZE] */
int config_set_memory_hotplug(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    struct memory_hotplug_config memory = {.present = true, .slot_mib = 128, .block_mib = 2};
    const struct {
        const char *name;
        uint64_t *mebibytes;
    } sizes[] = {{"total=", &memory.total_mib}, {"slot=", &memory.slot_mib}, {"block=", &memory.block_mib}};
    char *text = strdup(value), *rest = text;
    int r = text ? 0 : error_set(err, -ENOMEM, "out of memory");
    for (char *word; r == 0 && (word = strsep(&rest, ","));) {
        uint64_t bytes, *field = NULL;
        for (size_t n = 0; n < sizeof sizes / sizeof *sizes; n++) {
            size_t length = strlen(sizes[n].name);
            if (strncmp(word, sizes[n].name, length) == 0 && !parse_size(word + length, &bytes) && bytes % (1u << 20) == 0)
                field = sizes[n].mebibytes;
        }
        if (field)
            *field = bytes >> 20;
        else
            r = error_set(err, -EINVAL, "--%s: \"%s\" is not one of total=SIZE, slot=SIZE, block=SIZE, in whole MiB", key, word);
    }
    free(text);
    if (r == 0)
        config->memory_hotplug = memory;
    return r;
}
