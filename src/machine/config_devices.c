/*
 * The options --disk, --net and --share: a list of properties after the file, the back end or the directory, each with a setter in a table. Threading: none.
 */
#include <ctype.h>
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio_fs.h"
#include "machine/config_priv.h"
#include "net/net.h"

#define SERIAL_CHARACTERS_MAX 20
#define ID_CHARACTERS_MAX 64
#define RATE_MAX (1ull << 50)

int config_replace(char **field, const char *value, struct error *err)
{
    char *copy = strdup(value);
    if (!copy)
        return error_set(err, -ENOMEM, "out of memory");
    free(*field);
    *field = copy;
    return 0;
}

/* Letters, digits, '_' and '-': what an HTTP path can name. */
int config_set_id(char **field, const char *option, const char *value, struct error *err)
{
    size_t length = strlen(value);
    for (size_t i = 0; i < length; i++)
        if (!isalnum((unsigned char)value[i]) && !strchr("_-", value[i]))
            return error_set(err, -EINVAL, "--%s: id \"%s\" has other characters than letters, digits, _ and -", option, value);
    if (!length || length > ID_CHARACTERS_MAX)
        return error_set(err, -EINVAL, "--%s: id \"%s\" does not have 1 to %d characters", option, value, ID_CHARACTERS_MAX);
    return config_replace(field, value, err);
}

/* So many a second: 500, 10K, 8M (powers of 1024). Tenths of seconds make bursts short where they come out even, or nearly. */
static int set_rate(struct bucket_config *bucket, const char *option, const char *name, const char *value, struct error *err)
{
    char *end = NULL;
    uint64_t rate = 0, bytes = 0;
    if (isdigit((unsigned char)*value))
        rate = strtoull(value, &end, 10);
    if (end && *end && parse_size(value, &bytes) == 0)
        rate = bytes;
    else if (!end || *end)
        rate = 0;
    if (rate == 0 || rate > RATE_MAX)
        return error_set(err, -EINVAL, "--%s: %s=%s is not a number a second such as 500, 64K or 10M", option, name, value);
    bool even = rate % 10 == 0 || rate >= 1000;
    *bucket = (struct bucket_config){.size = even ? rate / 10 : rate, .refill_ms = even ? 100 : 1000};
    return 0;
}

/* ---- disks ---- */

static int disk_readonly(struct disk_config *disk, const char *value, struct error *err)
{
    disk->readonly = strcmp(value, "off") != 0;
    if (*value && disk->readonly && strcmp(value, "on") != 0)
        return error_set(err, -EINVAL, "--disk: readonly=%s is neither on nor off", value);
    return 0;
}

static int disk_format(struct disk_config *disk, const char *value, struct error *err)
{
    if (strcmp(value, "raw") != 0 && strcmp(value, "qcow2") != 0 && strcmp(value, "auto") != 0)
        return error_set(err, -EINVAL, "--disk: format \"%s\" is none of raw, qcow2 and auto; convert the image: qemu-img convert -O qcow2 %s disk.qcow2", value, disk->path);
    return config_replace(&disk->format, value, err);
}

static int disk_backing(struct disk_config *disk, const char *value, struct error *err)
{
    static const char *const names[] = {[BLOCK_BACKING_NEAR] = "near", [BLOCK_BACKING_ANY] = "any", [BLOCK_BACKING_NONE] = "none"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (strcmp(value, names[i]) == 0) {
            disk->backing = (enum block_backing)i;
            return 0;
        }
    return error_set(err, -EINVAL, "--disk: backing=%s is none of near (files in the image's directory), any and none", value);
}

static int disk_werror(struct disk_config *disk, const char *value, struct error *err)
{
    disk->report_full = strcmp(value, "report") == 0;
    if (!disk->report_full && strcmp(value, "enospc") != 0)
        return error_set(err, -EINVAL, "--disk: werror=%s is neither enospc (a full host pauses the machine) nor report", value);
    return 0;
}

static int disk_serial(struct disk_config *disk, const char *value, struct error *err)
{
    if (strlen(value) > SERIAL_CHARACTERS_MAX)
        return error_set(err, -EINVAL, "--disk: serial \"%s\" is longer than %d characters", value, SERIAL_CHARACTERS_MAX);
    return config_replace(&disk->serial, value, err);
}

static int disk_id(struct disk_config *disk, const char *value, struct error *err)
{
    return config_set_id(&disk->id, "disk", value, err);
}

static int disk_root(struct disk_config *disk, const char *value, struct error *err)
{
    if (*value)
        return error_set(err, -EINVAL, "--disk: root takes no value");
    disk->root = true;
    return 0;
}

static int disk_cache(struct disk_config *disk, const char *value, struct error *err)
{
    disk->writeback = strcmp(value, "writeback") == 0;
    if (!disk->writeback && strcmp(value, "unsafe") != 0)
        return error_set(err, -EINVAL, "--disk: cache=%s is neither writeback nor unsafe", value);
    return 0;
}

static int disk_bps(struct disk_config *disk, const char *value, struct error *err)
{
    return set_rate(&disk->limit.bandwidth, "disk", "bps", value, err);
}

static int disk_iops(struct disk_config *disk, const char *value, struct error *err)
{
    return set_rate(&disk->limit.ops, "disk", "iops", value, err);
}

static const struct {
    const char *name;
    int (*set)(struct disk_config *disk, const char *value, struct error *err);
} disk_properties[] = {
    {"readonly", disk_readonly}, {"format", disk_format}, {"serial", disk_serial}, {"id", disk_id},
    {"root", disk_root},         {"cache", disk_cache},   {"bps", disk_bps},       {"iops", disk_iops},
    {"backing", disk_backing},   {"werror", disk_werror},
};

static int set_disk_property(struct disk_config *disk, char *word, struct error *err)
{
    char *value = strchr(word, '=');
    size_t length = value ? (size_t)(value - word) : strlen(word);
    for (size_t i = 0; i < sizeof disk_properties / sizeof *disk_properties; i++)
        if (strlen(disk_properties[i].name) == length && memcmp(disk_properties[i].name, word, length) == 0)
            return disk_properties[i].set(disk, value ? value + 1 : "", err);
    return error_set(err, -EINVAL, "--disk: unknown property \"%s\"; known are readonly, format=, backing=, serial=, id=, root, cache=, bps=, iops=, werror= "
                     "(a comma in a file name is written twice)", word);
}

char *config_cut_path(char *text)
{
    char *out = text, *in = text;
    while (*in && !(in[0] == ',' && in[1] != ',')) {
        if (in[0] == ',')
            in++;
        *out++ = *in++;
    }
    char *rest = *in ? in + 1 : NULL;
    *out = '\0';
    return rest;
}

static int check_disk(const struct machine_config *config, const struct disk_config *disk, struct error *err)
{
    for (unsigned i = 0; i < config->disk_count; i++) {
        if (disk->id && config->disk[i].id && strcmp(disk->id, config->disk[i].id) == 0)
            return error_set(err, -EEXIST, "--disk: two disks have the id \"%s\"", disk->id);
        if (disk->root && config->disk[i].root)
            return error_set(err, -EEXIST, "--disk: only one disk can be the root");
    }
    return 0;
}

int config_set_disk(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    if (config->disk_count == CONFIG_DISKS_MAX)
        return error_set(err, -E2BIG, "--disk: more than %d disks", CONFIG_DISKS_MAX);
    struct disk_config disk = {.writeback = true};
    char *text = strdup(value);
    if (!text)
        return error_set(err, -ENOMEM, "out of memory");
    char *rest = config_cut_path(text);
    int r = *text ? config_replace(&disk.path, text, err) : error_set(err, -EINVAL, "--disk: no file name in \"%s\"", value);
    for (char *word; r == 0 && (word = strsep(&rest, ","));)
        r = set_disk_property(&disk, word, err);
    if (r == 0)
        r = check_disk(config, &disk, err);
    if (r == 0) {
        config->disk[config->disk_count++] = disk;
    } else {
        free(disk.path);
        free(disk.format);
        free(disk.serial);
        free(disk.id);
    }
    free(text);
    return r;
}

/* ---- network cards ---- */

static const struct {
    const char *name;
    bool receive, transmit, ops;
} net_limits[] = {
    {"bps", true, true, false},     {"pps", true, true, true},      {"rx-bps", true, false, false},
    {"rx-pps", true, false, true},  {"tx-bps", false, true, false}, {"tx-pps", false, true, true},
};

/* 1: the property is the card's and was taken; 0: it is the back end's. */
static int set_card_property(struct net_card_config *card, const char *word, struct error *err)
{
    const char *value = strchr(word, '=');
    size_t length = value ? (size_t)(value - word) : 0;
    if (length == 2 && memcmp(word, "id", 2) == 0) {
        int r = config_set_id(&card->id, "net", value + 1, err);
        return r ? r : 1;
    }
    for (size_t i = 0; i < sizeof net_limits / sizeof *net_limits; i++) {
        struct bucket_config bucket;
        if (strlen(net_limits[i].name) != length || memcmp(net_limits[i].name, word, length) != 0)
            continue;
        int r = set_rate(&bucket, "net", net_limits[i].name, value + 1, err);
        if (r)
            return r;
        if (net_limits[i].receive)
            *(net_limits[i].ops ? &card->receive.ops : &card->receive.bandwidth) = bucket;
        if (net_limits[i].transmit)
            *(net_limits[i].ops ? &card->transmit.ops : &card->transmit.bandwidth) = bucket;
        return 1;
    }
    return 0;
}

/* The card's properties are taken out, what is left is the back end's specification. */
static int split_net(char *text, struct net_card_config *card, struct error *err)
{
    char *out = text, *rest = text;
    for (char *word; (word = strsep(&rest, ","));) {
        int r = word == text ? 0 : set_card_property(card, word, err);
        size_t length = strlen(word);
        if (r < 0)
            return r;
        if (r)
            continue;
        if (out != text)
            *out++ = ',';
        memmove(out, word, length);
        out += length;
    }
    *out = '\0';
    return 0;
}

static int check_card(const struct machine_config *config, const struct net_card_config *card, struct error *err)
{
    for (unsigned i = 0; i < config->net_count; i++)
        if (card->id && config->net_card[i].id && strcmp(card->id, config->net_card[i].id) == 0)
            return error_set(err, -EEXIST, "--net: two network cards have the id \"%s\"", card->id);
    return 0;
}

int config_set_net(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    if (config->net_count == CONFIG_NETS_MAX)
        return error_set(err, -E2BIG, "--net: more than %d network cards", CONFIG_NETS_MAX);
    struct net_card_config card = {0};
    char *text = strdup(value);
    if (!text)
        return error_set(err, -ENOMEM, "out of memory");
    int r = split_net(text, &card, err);
    if (r == 0)
        r = net_check(text, err);
    if (r == 0)
        r = check_card(config, &card, err);
    if (r == 0) {
        config->net[config->net_count] = text;
        config->net_card[config->net_count++] = card;
        return 0;
    }
    free(card.id);
    free(text);
    return r;
}

/* ---- shares ---- */

static int set_share_id(int64_t *id, const char *name, const char *value, struct error *err)
{
    char *end;
    errno = 0;
    unsigned long long number = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end || errno || number >= UINT32_MAX)
        return error_set(err, -EINVAL, "--share: %s=%s is not a number of a user or group", name, value);
    *id = (int64_t)number;
    return 0;
}

static int set_share_cache(struct share_config *share, const char *value, struct error *err)
{
    static const char *const names[] = {[FS_CACHE_AUTO] = "auto", [FS_CACHE_NONE] = "none", [FS_CACHE_ALWAYS] = "always"};
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], value) == 0) {
            share->cache = (enum fs_cache)i;
            return 0;
        }
    }
    return error_set(err, -EINVAL, "--share: cache=%s is not one of auto, none, always", value);
}

static int set_share_property(struct share_config *share, const char *word, struct error *err)
{
    if (strcmp(word, "ro") == 0)
        share->readonly = true;
    else if (strcmp(word, "writeback") == 0)
        share->writeback = true;
    else if (strcmp(word, "xattr") == 0)
        share->xattr = true;
    else if (strncmp(word, "cache=", 6) == 0)
        return set_share_cache(share, word + 6, err);
    else if (strncmp(word, "uid=", 4) == 0)
        return set_share_id(&share->uid, "uid", word + 4, err);
    else if (strncmp(word, "gid=", 4) == 0)
        return set_share_id(&share->gid, "gid", word + 4, err);
    else
        return error_set(err, -EINVAL, "--share: unknown property \"%s\"; known are ro, cache=, writeback, xattr, uid=, gid= (a comma in a path is written twice)", word);
    return 0;
}

static int check_share(const struct machine_config *config, const struct share_config *share, const char *tag, struct error *err)
{
    if (strlen(tag) > VIRTIO_FS_TAG_BYTES)
        return error_set(err, -EINVAL, "--share: the tag \"%s\" is longer than %d characters", tag, VIRTIO_FS_TAG_BYTES);
    for (unsigned i = 0; i < config->share_count; i++)
        if (strcmp(config->share[i].tag, tag) == 0)
            return error_set(err, -EEXIST, "--share: two shares have the tag \"%s\"", tag);
    if (share->writeback && (share->readonly || share->cache == FS_CACHE_NONE))
        return error_set(err, -EINVAL, "--share: writeback needs a share that is written and cached, not %s", share->readonly ? "ro" : "cache=none");
    return 0;
}

/* DIR:TAG, then properties; the last colon is the one that counts. */
int config_set_share(struct machine_config *config, const char *key, const char *value, struct error *err)
{
    if (config->share_count == CONFIG_SHARES_MAX)
        return error_set(err, -E2BIG, "--share: more than %d shares", CONFIG_SHARES_MAX);
    struct share_config share = {.uid = FS_ID_AS_ON_HOST, .gid = FS_ID_AS_ON_HOST};
    char *text = strdup(value);
    if (!text)
        return error_set(err, -ENOMEM, "out of memory");
    char *rest = config_cut_path(text), *colon = strrchr(text, ':');
    int r = colon && colon != text && colon[1] ? 0 : error_set(err, -EINVAL, "--share: \"%s\" is not DIR:TAG, such as /home/me/src:src", value);
    for (char *word; r == 0 && (word = strsep(&rest, ","));)
        r = set_share_property(&share, word, err);
    if (r == 0)
        r = check_share(config, &share, colon + 1, err);
    if (r == 0) {
        *colon = '\0';
        r = config_replace(&share.path, text, err);
    }
    if (r == 0)
        r = config_replace(&share.tag, colon + 1, err);
    if (r == 0) {
        config->share[config->share_count++] = share;
    } else {
        free(share.path);
        free(share.tag);
    }
    free(text);
    return r;
}
