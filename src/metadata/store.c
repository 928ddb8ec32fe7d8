/*
 * The data of the metadata service (metadata.h): kept as JSON, changed as a whole under the lock, written as text for a guest under it, too.
 */
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "metadata/metadata_priv.h"

#define SEGMENT_BYTES 1024

struct metadata *metadata_create(size_t bytes_max)
{
    struct metadata *metadata = calloc(1, sizeof *metadata);
    if (!metadata)
        return NULL;
    if (token_draw_key(metadata->key)) {
        free(metadata);
        return NULL;
    }
    pthread_mutex_init(&metadata->lock, NULL);
    metadata->bytes_max = bytes_max ? bytes_max : METADATA_BYTES_DEFAULT;
    metadata->nothing = json_object(); /* made now: the library draws its random numbers with the first */
    if (!metadata->nothing) {
        metadata_destroy(metadata);
        return NULL;
    }
    return metadata;
}

void metadata_destroy(struct metadata *metadata)
{
    if (!metadata)
        return;
    json_decref(metadata->value);
    json_decref(metadata->nothing);
    pthread_mutex_destroy(&metadata->lock);
    explicit_bzero(metadata->key, sizeof metadata->key);
    free(metadata);
}

void metadata_set(struct metadata *metadata, const struct metadata_settings *settings)
{
    pthread_mutex_lock(&metadata->lock);
    metadata->settings = *settings;
    pthread_mutex_unlock(&metadata->lock);
}

void metadata_get_counters(struct metadata *metadata, struct metadata_counters *counters)
{
    pthread_mutex_lock(&metadata->lock);
    *counters = metadata->counters;
    pthread_mutex_unlock(&metadata->lock);
}

bool metadata_parse_address(const char *text, uint8_t address[4])
{
    struct in_addr parsed;
    if (inet_pton(AF_INET, text, &parsed) != 1)
        return false;
    memcpy(address, &parsed, 4);
    return address[0] == 169 && address[1] == 254 && address[2] != 0 && address[2] != 255; /* RFC 3927, section 2.1 */
}

/* ---- changing it ---- */

/* Takes `value` over when it fits. With the lock held. */
static int replace(struct metadata *metadata, json_t *value, struct error *err)
{
    if (!value)
        return error_set(err, -ENOMEM, "out of memory");
    if (json_dumpb(value, NULL, 0, JSON_COMPACT) > metadata->bytes_max) {
        json_decref(value);
        return error_set(err, -EFBIG, "The MMDS data store is limited to %zu bytes; this would be larger.", metadata->bytes_max);
    }
    json_decref(metadata->value);
    metadata->value = value;
    return 0;
}

int metadata_put(struct metadata *metadata, const json_t *value, struct error *err)
{
    if (!json_is_object(value))
        return error_set(err, -EINVAL, "The MMDS data store must be a JSON object.");
    json_t *copy = json_deep_copy(value);
    pthread_mutex_lock(&metadata->lock);
    int r = replace(metadata, copy, err);
    pthread_mutex_unlock(&metadata->lock);
    return r;
}

/* RFC 7396, section 2. Takes `target` over and returns the result. The depth is that of the patch, which the parser bounds. */
static json_t *merge(json_t *target, const json_t *patch)
{
    const char *key;
    json_t *value;
    if (!json_is_object(patch)) {
        json_decref(target);
        return json_deep_copy(patch);
    }
    if (!json_is_object(target)) {
        json_decref(target);
        target = json_object();
    }
    json_object_foreach((json_t *)patch, key, value)
    {
        if (json_is_null(value))
            json_object_del(target, key);
        else
            json_object_set_new(target, key, merge(json_incref(json_object_get(target, key)), value));
    }
    return target;
}

int metadata_patch(struct metadata *metadata, const json_t *patch, struct error *err)
{
    int r;
    if (!json_is_object(patch))
        return error_set(err, -EINVAL, "The MMDS patch must be a JSON object.");
    pthread_mutex_lock(&metadata->lock);
    json_t *copy = metadata->value ? json_deep_copy(metadata->value) : NULL;
    if (metadata->value)
        r = replace(metadata, copy ? merge(copy, patch) : NULL, err);
    else
        r = error_set(err, -ENODATA, "The MMDS data store is not initialized.");
    pthread_mutex_unlock(&metadata->lock);
    return r;
}

int metadata_load(struct metadata *metadata, const char *path, struct error *err)
{
    json_error_t why;
    struct stat st;
    if (stat(path, &st) == 0 && S_ISDIR(st.st_mode))
        return error_set(err, -EISDIR, "%s is a directory; name a JSON file", path);
    json_t *root = json_load_file(path, JSON_REJECT_DUPLICATES, &why);
    if (!root && why.line < 0)
        return error_set(err, -EINVAL, "cannot read %s: %s", path, why.text);
    if (!root)
        return error_set(err, -EINVAL, "%s:%d:%d: %s", path, why.line, why.column, why.text);
    int r = metadata_put(metadata, root, err);
    json_decref(root);
    if (r)
        error_prefix(err, "%s", path);
    return r;
}

json_t *metadata_get(struct metadata *metadata)
{
    pthread_mutex_lock(&metadata->lock);
    json_t *copy = metadata->value ? json_deep_copy(metadata->value) : json_object();
    pthread_mutex_unlock(&metadata->lock);
    return copy;
}

/* ---- reading it ---- */

static int hex_digit(char c)
{
    return isdigit((unsigned char)c) ? c - '0' : isxdigit((unsigned char)c) ? tolower((unsigned char)c) - 'a' + 10 : -1;
}

/* One segment, percent-decoded, and then as in RFC 6901 (~1 is "/", ~0 is "~"). False: it is longer than any name that can be asked for. */
static bool decode_segment(const char *text, size_t length, char segment[SEGMENT_BYTES])
{
    size_t out = 0;
    if (length >= SEGMENT_BYTES)
        return false;
    for (size_t i = 0; i < length; i++) {
        int high = text[i] == '%' && i + 2 < length ? hex_digit(text[i + 1]) : -1, low = high >= 0 ? hex_digit(text[i + 2]) : -1;
        segment[out] = text[i];
        if (low >= 0 && high + low > 0) {
            segment[out] = (char)(high << 4 | low);
            i += 2;
        }
        out++;
    }
    segment[out] = '\0';
    for (char *c = segment; (c = strchr(c, '~')); c++)
        if (c[1] == '0' || c[1] == '1') {
            *c = c[1] == '1' ? '/' : '~';
            memmove(c + 1, c + 2, strlen(c + 1));
        }
    return true;
}

static const json_t *step(const json_t *at, const char *segment)
{
    char *end;
    if (json_is_object(at))
        return json_object_get(at, segment);
    unsigned long index = strtoul(segment, &end, 10);
    return json_is_array(at) && isdigit((unsigned char)*segment) && !*end && (*segment != '0' || !segment[1]) ? json_array_get(at, index) : NULL;
}

/* With the lock held. */
static const json_t *find(const struct metadata *metadata, const char *path)
{
    char segment[SEGMENT_BYTES];
    const json_t *at = metadata->value ? metadata->value : metadata->nothing;
    while (at && *(path += strspn(path, "/"))) {
        size_t length = strcspn(path, "/");
        at = decode_segment(path, length, segment) ? step(at, segment) : NULL;
        path += length;
    }
    return at;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static char *list_names(const json_t *object)
{
    size_t count = 0, bytes = 1;
    const char *key;
    json_t *value;
    const char **names = calloc(json_object_size(object) + 1, sizeof *names);
    json_object_foreach((json_t *)object, key, value)
    {
        bytes += strlen(key) + 2;
        if (names)
            names[count++] = key;
    }
    char *text = names ? malloc(bytes) : NULL, *end = text;
    if (text) {
        *text = '\0';
        qsort(names, count, sizeof *names, compare_names);
    }
    for (size_t i = 0; text && i < count; i++) {
        end = stpcpy(end, i ? "\n" : "");
        end = stpcpy(end, names[i]);
        end = stpcpy(end, json_is_object(json_object_get(object, names[i])) ? "/" : "");
    }
    free(names);
    return text;
}

int metadata_text(struct metadata *metadata, const char *path, bool json, char **text)
{
    int r = 0;
    pthread_mutex_lock(&metadata->lock);
    const json_t *at = find(metadata, path);
    if (!at)
        r = -ENOENT;
    else if (json)
        *text = json_dumps(at, JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY);
    else if (json_is_object(at))
        *text = list_names(at);
    else if (json_is_string(at))
        *text = strdup(json_string_value(at));
    else
        r = -EDOM;
    pthread_mutex_unlock(&metadata->lock);
    return r || *text ? r : -ENOMEM;
}
