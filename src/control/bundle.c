/*
 * Bundles (bundle.h): options of a machine that can go to another host, and the files that they name.
 *
 * Invariant: bundle.config has only what the table below lets through, with every path replaced by the name of one of bundle.file.
 * Threading: none.
 */
#include "control/bundle.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PROPERTIES_MAX 10
#define VALUE_BYTES_MAX 8192

enum kind {
    AS_IT_IS,
    FILE_ALONE, /* all of the value is a path */
    FILE_FIRST, /* a path, in which commas are doubled, then properties */
    NETWORK,    /* the user's own: no names of devices of the host */
    CONSOLE,    /* no files or sockets of the host */
};

/* Options that go along; all others are the host's. A property's name ends with "=" when it has a value. */
static const struct portable {
    const char *key;
    enum kind kind;
    const char *properties[PROPERTIES_MAX];
} portable[] = {
    {"kernel", FILE_ALONE},
    {"initrd", FILE_ALONE},
    {"append", AS_IT_IS},
    {"memory", AS_IT_IS},
    {"cpus", AS_IT_IS},
    {"cpu-baseline", FILE_ALONE},
    {"disk", FILE_FIRST, {"readonly", "readonly=", "serial=", "id=", "root", "cache=", "bps=", "iops=", "format=", "werror="}},
    {"net", NETWORK},
    {"metadata", FILE_FIRST, {"version=", "address=", "imds"}},
    {"transport", AS_IT_IS},
    {"balloon", AS_IT_IS},
    {"pmem", FILE_FIRST, {"readonly", "root", "id="}},
    {"memory-hotplug", AS_IT_IS},
    {"engine", AS_IT_IS},
    {"console", CONSOLE},
    {"virtio-console", CONSOLE},
    {"debug-console", CONSOLE},
    {"boot", AS_IT_IS},
    {"on-reset", AS_IT_IS},
    {"on-panic", AS_IT_IS},
};

static const struct portable *find_portable(const char *key)
{
    for (size_t i = 0; i < sizeof portable / sizeof *portable; i++)
        if (strcmp(portable[i].key, key) == 0)
            return &portable[i];
    return NULL;
}

/* ---- values ---- */

/* Copies the path in front, commas as they are meant; what follows the comma after it, or NULL. */
static const char *cut_path(const char *value, char *path)
{
    while (*value && !(value[0] == ',' && value[1] != ',')) {
        value += *value == ',';
        *path++ = *value++;
    }
    *path = '\0';
    return *value ? value + 1 : NULL;
}

static void double_commas(const char *path, char *out, size_t size)
{
    size_t n = 0;
    for (; *path && n + 3 < size; path++) {
        out[n++] = *path;
        if (*path == ',')
            out[n++] = ',';
    }
    out[n] = '\0';
}

static bool knows_property(const struct portable *option, const char *word, size_t length)
{
    for (unsigned i = 0; i < PROPERTIES_MAX && option->properties[i]; i++) {
        const char *name = option->properties[i];
        size_t name_length = strlen(name);
        if (name[name_length - 1] == '=' ? length > name_length && memcmp(word, name, name_length) == 0 : length == name_length && memcmp(word, name, length) == 0)
            return true;
    }
    return false;
}

static bool has_word(const char *rest, const char *word)
{
    size_t length = strlen(word);
    for (; rest; rest = strchr(rest, ',') ? strchr(rest, ',') + 1 : NULL)
        if (strncmp(rest, word, length) == 0 && (!rest[length] || rest[length] == ','))
            return true;
    return false;
}

/* What a disk's image is read as: what the properties say, else by the end of its name, as block_config says. */
static const char *image_format(const char *name, const char *rest)
{
    size_t length = strlen(name);
    if (has_word(rest, "format=qcow2"))
        return "qcow2";
    if (has_word(rest, "format=auto"))
        return "auto";
    return !has_word(rest, "format=raw") && length > 6 && strcasecmp(name + length - 6, ".qcow2") == 0 ? "qcow2" : "raw";
}

/* A value that names no thing of the host. */
static bool is_portable_text(const struct portable *option, const char *value)
{
    switch (option->kind) {
    case NETWORK:
        return strcmp(value, "none") == 0 || strcmp(value, "user") == 0 || strncmp(value, "user,", 5) == 0;
    case CONSOLE:
        return strcmp(value, "stdio") == 0 || strcmp(value, "none") == 0 || strcmp(value, "pty") == 0;
    default:
        return true;
    }
}

/* ---- collecting ---- */

static void note_left(struct bundle *bundle, const char *what)
{
    size_t length = strlen(bundle->left);
    if (!strstr(bundle->left, what))
        snprintf(bundle->left + length, sizeof bundle->left - length, "%s%s", length ? ", " : "", what);
}

static struct bundle_file *new_file(struct bundle *bundle, const char *name, struct error *err)
{
    struct bundle_file *file = (struct bundle_file *)bundle_find(bundle, name);
    if (!file && bundle->file_count == BUNDLE_FILES_MAX) {
        error_set(err, -E2BIG, "more than %d files", BUNDLE_FILES_MAX);
        return NULL;
    }
    if (!file)
        file = &bundle->file[bundle->file_count++];
    free(file->path);
    *file = (struct bundle_file){0};
    snprintf(file->name, sizeof file->name, "%s", name);
    return file;
}

/* A file of this host gets its name in the bundle. `value` becomes what the option is there. */
static int take_file(struct bundle *bundle, const struct portable *option, const char *given, const char *directory, char value[VALUE_BYTES_MAX], struct error *err)
{
    char path[VALUE_BYTES_MAX], name[BUNDLE_NAME_BYTES];
    const char *rest = NULL;
    if (option->kind == FILE_FIRST)
        rest = cut_path(given, path);
    else
        strcpy(path, given);
    size_t length = strlen(path), number = json_array_size(json_object_get(bundle->config, option->key));
    const char *end = length > 6 && strcasecmp(path + length - 6, ".qcow2") == 0 ? ".qcow2" : ""; /* tells the format */
    bool many = option_find(option->key)->flags & OPT_MANY;
    if (many)
        snprintf(name, sizeof name, "%s%zu%s", option->key, number, strcmp(option->key, "disk") == 0 ? end : "");
    else
        snprintf(name, sizeof name, "%s", option->key);
    struct bundle_file *file = new_file(bundle, name, err);
    if (!file)
        return -E2BIG;
    file->image = many;
    file->format = strcmp(option->key, "disk") == 0 ? image_format(path, rest) : "raw";
    file->backing = has_word(rest, "backing=any") ? BLOCK_BACKING_ANY : has_word(rest, "backing=none") ? BLOCK_BACKING_NONE : BLOCK_BACKING_NEAR;
    file->readonly = has_word(rest, "readonly") || has_word(rest, "readonly=on");
    if (path[0] == '/' ? !(file->path = strdup(path)) : asprintf(&file->path, "%s/%s", directory, path) < 0) {
        file->path = NULL;
        return error_set(err, -ENOMEM, "out of memory");
    }
    strcpy(value, name);
    for (const char *word = rest; word; word = word[strcspn(word, ",")] ? word + strcspn(word, ",") + 1 : NULL) {
        int word_length = (int)strcspn(word, ",");
        if (knows_property(option, word, (size_t)word_length))
            snprintf(value + strlen(value), VALUE_BYTES_MAX - strlen(value), ",%.*s", word_length, word);
        else if (word_length && strncmp(word, "backing=", 8) != 0) /* backing files are none any more */
            note_left(bundle, option->key);
    }
    return 0;
}

static int put_value(struct bundle *bundle, const char *key, const char *value)
{
    if (!(option_find(key)->flags & OPT_MANY))
        return json_object_set_new(bundle->config, key, json_string(value));
    json_t *array = json_object_get(bundle->config, key);
    if (!array) {
        array = json_array();
        if (json_object_set_new(bundle->config, key, array))
            return -1;
    }
    return json_array_append_new(array, json_string(value));
}

static int read_file(struct bundle *bundle, const char *path, const char *directory, struct error *err);

static int take_option(struct bundle *bundle, const char *key, const char *value, const char *directory, bool nested, struct error *err)
{
    const struct portable *option = find_portable(key);
    char placed[VALUE_BYTES_MAX];
    if (strcmp(key, "config") == 0 && !nested)
        return read_file(bundle, value, directory, err);
    if (!option || !is_portable_text(option, value)) {
        note_left(bundle, key);
        return 0;
    }
    if (strlen(value) >= sizeof placed / 2)
        return error_set(err, -E2BIG, "--%s: too long", key);
    int r = 0;
    if (option->kind == FILE_ALONE || option->kind == FILE_FIRST)
        r = take_file(bundle, option, value, directory, placed, err);
    else
        strcpy(placed, value);
    if (r == 0 && put_value(bundle, key, placed))
        r = error_set(err, -EINVAL, "--%s: is not UTF-8", key);
    return r;
}

static int take_json(struct bundle *bundle, const char *key, const json_t *value, const char *directory, struct error *err)
{
    char number[32];
    size_t index;
    json_t *element;
    int r = 0;
    json_array_foreach(value, index, element)
        if (r == 0 && json_is_string(element))
            r = take_option(bundle, key, json_string_value(element), directory, true, err);
    if (json_is_string(value))
        r = take_option(bundle, key, json_string_value(value), directory, true, err);
    snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
    if (json_is_integer(value))
        r = take_option(bundle, key, number, directory, true, err);
    if (json_is_boolean(value))
        note_left(bundle, key);
    return r;
}

/* --config; it was good when the machine was started. */
static int read_file(struct bundle *bundle, const char *path, const char *directory, struct error *err)
{
    json_error_t why;
    char *full = NULL;
    if (asprintf(&full, "%s%s%s", path[0] == '/' ? "" : directory, path[0] == '/' ? "" : "/", path) < 0)
        return error_set(err, -ENOMEM, "out of memory");
    json_t *root = json_load_file(full, JSON_REJECT_DUPLICATES, &why), *value;
    int r = json_is_object(root) ? 0 : error_set(err, -EINVAL, "cannot read %s: %s", full, root ? "it is no JSON object" : why.text);
    const char *key;
    if (r == 0)
        json_object_foreach(root, key, value)
            if (r == 0 && option_find(key))
                r = take_json(bundle, key, value, directory, err);
    json_decref(root);
    free(full);
    return r;
}

int bundle_collect(struct bundle *bundle, const json_t *arguments, const char *directory, struct error *err)
{
    size_t count = json_array_size(arguments);
    int r = 0;
    *bundle = (struct bundle){.config = json_object()};
    if (!bundle->config)
        return error_set(err, -ENOMEM, "out of memory");
    for (size_t i = 0; r == 0 && i < count;) {
        const char *argument = json_string_value(json_array_get(arguments, i++)), *equals = argument ? strchr(argument, '=') : NULL, *value = NULL;
        char key[64] = "";
        size_t length = argument ? equals ? (size_t)(equals - argument) : strlen(argument) : 0;
        if (length > 2 && length - 2 < sizeof key && strncmp(argument, "--", 2) == 0)
            memcpy(key, argument + 2, length - 2);
        const struct option_info *option = option_find(key);
        if (!option)
            r = error_set(err, -EINVAL, "what it was started with is damaged: \"%s\"", argument ? argument : "?");
        else if (equals)
            value = equals + 1;
        else if (!(option->flags & OPT_FLAG))
            value = json_string_value(json_array_get(arguments, i++));
        if (r == 0)
            r = take_option(bundle, key, value ? value : "", directory, false, err);
    }
    if (r)
        bundle_clear(bundle);
    return r;
}

void bundle_clear(struct bundle *bundle)
{
    for (unsigned i = 0; i < bundle->file_count; i++)
        free(bundle->file[i].path);
    json_decref(bundle->config);
    *bundle = (struct bundle){0};
}

const struct bundle_file *bundle_find(const struct bundle *bundle, const char *name)
{
    for (unsigned i = 0; i < bundle->file_count; i++)
        if (strcmp(bundle->file[i].name, name) == 0)
            return &bundle->file[i];
    return NULL;
}

/* ---- what comes from a bundle ---- */

static bool is_name(const char *name)
{
    size_t length = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789");
    return length && length + 6 < BUNDLE_NAME_BYTES && name[0] >= 'a' && (!name[length] || strcmp(name + length, ".qcow2") == 0);
}

static int check_value(struct bundle *bundle, const struct portable *option, const json_t *json, struct error *err)
{
    char name[VALUE_BYTES_MAX];
    const char *value = json_string_value(json), *rest = NULL;
    if (!value || strlen(value) != json_string_length(json) || strlen(value) >= sizeof name || !is_portable_text(option, value))
        return error_set(err, -EINVAL, "a value of \"%s\" that a bundle cannot have", option->key);
    if (option->kind == FILE_FIRST)
        rest = cut_path(value, name);
    else if (option->kind == FILE_ALONE)
        strcpy(name, value);
    else
        return 0;
    if (!is_name(name) || bundle_find(bundle, name))
        return error_set(err, -EINVAL, "\"%s\" of \"%s\" is no name of a file in a bundle, or comes twice", name, option->key);
    for (const char *word = rest; word; word = word[strcspn(word, ",")] ? word + strcspn(word, ",") + 1 : NULL)
        if (!knows_property(option, word, strcspn(word, ",")))
            return error_set(err, -EINVAL, "a property of \"%s\" that a bundle cannot have: %s", option->key, word);
    struct bundle_file *file = new_file(bundle, name, err);
    if (!file)
        return -E2BIG;
    file->image = option_find(option->key)->flags & OPT_MANY;
    file->format = strcmp(option->key, "disk") == 0 ? image_format(name, rest) : "raw";
    file->readonly = has_word(rest, "readonly") || has_word(rest, "readonly=on");
    return 0;
}

int bundle_check(struct bundle *bundle, json_t *config, struct error *err)
{
    const char *key;
    json_t *value, *element;
    size_t index;
    int r = json_is_object(config) ? 0 : error_set(err, -EINVAL, "it has no configuration");
    *bundle = (struct bundle){.config = json_incref(config)};
    json_object_foreach(config, key, value) {
        const struct portable *option = find_portable(key);
        if (r)
            break;
        if (!option)
            r = error_set(err, -EINVAL, "an option that a bundle cannot have: \"%s\"", key);
        else if (json_is_array(value) != !!(option_find(key)->flags & OPT_MANY))
            r = error_set(err, -EINVAL, "\"%s\" has to be %s", key, json_is_array(value) ? "a text" : "an array");
        else if (!json_is_array(value))
            r = check_value(bundle, option, value, err);
        json_array_foreach(value, index, element)
            if (r == 0)
                r = check_value(bundle, option, element, err);
    }
    if (r)
        bundle_clear(bundle);
    return r;
}

/* ---- places ---- */

static json_t *place_value(const struct portable *option, const char *value, const char *directory)
{
    char name[VALUE_BYTES_MAX], quoted[2 * 4096];
    if (option->kind == FILE_ALONE)
        return json_sprintf("%s/%s", directory, value);
    if (option->kind != FILE_FIRST)
        return json_string(value);
    const char *rest = cut_path(value, name);
    double_commas(directory, quoted, sizeof quoted);
    return json_sprintf("%s/%s%s%s", quoted, name, rest ? "," : "", rest ? rest : "");
}

json_t *bundle_place(const struct bundle *bundle, const char *directory)
{
    json_t *placed = json_object(), *value, *element;
    const char *key;
    size_t index;
    bool failed = !placed;
    json_object_foreach(bundle->config, key, value) {
        const struct portable *option = find_portable(key);
        json_t *array = json_is_array(value) ? json_array() : NULL;
        json_array_foreach(value, index, element)
            failed |= json_array_append_new(array, place_value(option, json_string_value(element), directory)) != 0;
        failed |= json_object_set_new(placed, key, array ? array : place_value(option, json_string_value(value), directory)) != 0;
    }
    if (!failed)
        return placed;
    json_decref(placed);
    return NULL;
}

/* A qcow2 header: magic, version (4 bytes), place of the backing file's name (8); from version 3 on, at 72, what a reader must know, bit 2 an external data file. */
int bundle_needs_others(int fd)
{
    uint8_t header[80] = {0};
    static const uint8_t magic[4] = {'Q', 'F', 'I', 0xfb}, zeroes[8];
    if (pread(fd, header, sizeof header, 0) < 0)
        return -errno;
    return memcmp(header, magic, sizeof magic) == 0 && (memcmp(header + 8, zeroes, 8) != 0 || (header[7] >= 3 && header[79] & 4));
}

/* disk1.qcow2,serial=x,format=qcow2 becomes disk1,serial=x. */
int bundle_make_raw(struct bundle *bundle, unsigned index, struct error *err)
{
    struct bundle_file *file = &bundle->file[index];
    char path[VALUE_BYTES_MAX], value[VALUE_BYTES_MAX];
    json_t *array = json_object_get(bundle->config, "disk"), *element;
    size_t i;
    json_array_foreach(array, i, element) {
        const char *rest = cut_path(json_string_value(element), path);
        if (strcmp(path, file->name) != 0)
            continue;
        file->name[strcspn(file->name, ".")] = '\0';
        strcpy(value, file->name);
        for (const char *word = rest; word; word = word[strcspn(word, ",")] ? word + strcspn(word, ",") + 1 : NULL)
            if (strncmp(word, "format=", 7) != 0)
                snprintf(value + strlen(value), sizeof value - strlen(value), ",%.*s", (int)strcspn(word, ","), word);
        file->format = "raw";
        return json_array_set_new(array, i, json_string(value)) ? error_set(err, -ENOMEM, "out of memory") : 0;
    }
    return error_set(err, -EINVAL, "%s is no image of a disk", file->name);
}

/* ---- the machine of a snapshot ---- */

json_t *bundle_paths(const json_t *placed)
{
    char path[2 * VALUE_BYTES_MAX];
    json_t *paths = json_pack("{s:[]}", "disk_format"), *element;
    size_t index;
    for (size_t i = 0; paths && i < sizeof portable / sizeof *portable; i++) {
        const json_t *value = json_object_get(placed, portable[i].key);
        if (!value || (portable[i].kind != FILE_ALONE && portable[i].kind != FILE_FIRST))
            continue;
        json_t *array = json_is_array(value) ? json_array() : NULL;
        json_array_foreach(value, index, element) {
            const char *rest = cut_path(json_string_value(element), path);
            json_array_append_new(array, json_string(path));
            if (strcmp(portable[i].key, "disk") == 0)
                json_array_append_new(json_object_get(paths, "disk_format"), json_string(image_format(path, rest)));
        }
        if (json_is_string(value) && portable[i].kind == FILE_FIRST)
            cut_path(json_string_value(value), path);
        json_object_set_new(paths, portable[i].key, array ? array : json_string(portable[i].kind == FILE_FIRST ? path : json_string_value(value)));
    }
    return paths;
}

static int set_path(char **field, const json_t *value, struct error *err)
{
    char *copy = json_is_string(value) ? strdup(json_string_value(value)) : NULL;
    if (!copy)
        return error_set(err, -EINVAL, "the places of its files are damaged");
    free(*field);
    *field = copy;
    return 0;
}

int bundle_set_paths(struct machine_config *config, const json_t *paths, struct error *err)
{
    const struct {
        const char *key;
        char **field;
    } singles[] = {{"kernel", &config->kernel}, {"initrd", &config->initrd}, {"metadata", &config->metadata.path}};
    const json_t *disks = json_object_get(paths, "disk"), *pmems = json_object_get(paths, "pmem");
    int r = 0;
    if (json_array_size(disks) != config->disk_count || json_array_size(pmems) != config->pmem_count)
        return error_set(err, -EINVAL, "the snapshot's machine has other disks than the bundle that it came in");
    for (size_t i = 0; r == 0 && i < sizeof singles / sizeof *singles; i++)
        if (json_object_get(paths, singles[i].key))
            r = set_path(singles[i].field, json_object_get(paths, singles[i].key), err);
    for (unsigned i = 0; r == 0 && i < config->disk_count; i++) {
        struct disk_config *disk = &config->disk[i];
        r = set_path(&disk->path, json_array_get(disks, i), err);
        if (r == 0)
            r = set_path(&disk->format, json_array_get(json_object_get(paths, "disk_format"), i), err);
        free(disk->origin); /* there it was an overlay of another file */
        disk->origin = NULL;
        disk->backing = BLOCK_BACKING_NEAR;
    }
    for (unsigned i = 0; r == 0 && i < config->pmem_count; i++)
        r = set_path(&config->pmem[i].path, json_array_get(pmems, i), err);
    return r;
}
