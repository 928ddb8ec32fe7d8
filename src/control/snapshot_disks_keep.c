/*
 * The disks of snapshots, kept and compared (snapshot_disks.h): overlays that nobody needs go, and one that only another one needs becomes part of that.
 *
 * Needed is what a snapshot or a map names, and what lies below something needed, in the directories of all machines. When something cannot be read, nothing is removed. A merged file
 * takes the upper one's name in one step; both have the same contents, so it does not matter who has which open.
 * Threading: none; with the exclusive lock of the machine's snapshots.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "block/image.h"
#include "control/instance.h"
#include "control/snapshot_disks.h"
#include "control/snapshot_store_priv.h"
#include "util/log.h"

#define CLUSTER_BYTES 65536u
#define MANY_FILES 24u /* chains become too long some time */

/* ---- sets of files ---- */

struct file {
    char *path, *backing, *backing_format;
    bool root; /* a snapshot or a map names it */
};

struct files {
    struct file *file;
    unsigned count;
};

static struct file *find(const struct files *files, const char *path)
{
    for (unsigned i = 0; i < files->count; i++)
        if (strcmp(files->file[i].path, path) == 0)
            return &files->file[i];
    return NULL;
}

static int add(struct files *files, const char *path, bool root)
{
    struct file *there = find(files, path), *grown = there ? files->file : realloc(files->file, (files->count + 1) * sizeof *grown);
    char *copy = there || !grown ? NULL : strdup(path);
    if (grown)
        files->file = grown;
    if (there)
        there->root |= root;
    else if (copy)
        files->file[files->count++] = (struct file){.path = copy, .root = root};
    return there || copy ? 0 : -ENOMEM;
}

static void clear(struct files *files)
{
    for (unsigned i = 0; i < files->count; i++) {
        free(files->file[i].path);
        free(files->file[i].backing);
        free(files->file[i].backing_format);
    }
    free(files->file);
    *files = (struct files){0};
}

static int add_named(struct files *files)
{
    struct stored_snapshot *list;
    unsigned count;
    const json_t *entry;
    size_t n;
    int r = snapshot_store_list(NULL, &list, &count, NULL);
    for (unsigned i = 0; r == 0 && i < count; i++)
        json_array_foreach(json_object_get(list[i].meta, "disk_files"), n, entry)
        {
            const char *path = json_string_value(json_object_get(entry, "file"));
            r = r == 0 && path ? add(files, path, true) : r;
        }
    snapshot_store_free(list, count);
    return r;
}

static int add_mapped(struct files *files)
{
    char root[STORE_PATH_BYTES], path[STORE_PATH_BYTES + 320];
    int r = snapshot_store_root(root, NULL);
    DIR *entries = r == 0 ? opendir(root) : NULL;
    for (struct dirent *entry; r == 0 && entries && (entry = readdir(entries));) {
        const char *key;
        json_t *value;
        if (!instance_name_valid(entry->d_name))
            continue;
        snprintf(path, sizeof path, "%s/%s", root, entry->d_name);
        r = snapshot_store_all_readable(entry->d_name, NULL);
        json_t *map = NULL;
        r = r ? r : snapshot_disks_map(path, &map, NULL);
        json_object_foreach(map, key, value)
            r = r == 0 && json_is_string(value) ? add(files, json_string_value(value), true) : r;
        json_decref(map);
    }
    if (entries)
        closedir(entries);
    return r;
}

/* What is needed below what is needed. Only images of ours are looked into: others lie at the bottom. */
static int add_below(struct files *files)
{
    char root[STORE_PATH_BYTES];
    struct error err;
    int r = snapshot_store_root(root, NULL);
    for (unsigned i = 0; r == 0 && i < files->count; i++) {
        struct block_image_info info;
        if (strncmp(files->file[i].path, root, strlen(root)) != 0)
            continue;
        r = block_image_info(files->file[i].path, "qcow2", &info, &err);
        if (r == 0 && info.backing)
            r = add(files, info.backing, false);
        if (r)
            break;
        files->file[i].backing = info.backing;
        files->file[i].backing_format = info.backing_format;
    }
    return r;
}

static int find_needed(struct files *files)
{
    int r = add_named(files);
    if (r == 0)
        r = add_mapped(files);
    return r ? r : add_below(files);
}

/* ---- removing and merging ---- */

/* How many are left. */
static unsigned remove_unneeded(const char *directory, const struct files *needed)
{
    char path[STORE_PATH_BYTES + 300];
    unsigned count = 0;
    DIR *entries = opendir(directory);
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        size_t length = strlen(entry->d_name);
        snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        if (length <= 6 || strcmp(entry->d_name + length - 6, ".qcow2") != 0)
            continue;
        if (find(needed, path) || unlink(path))
            count++;
    }
    if (entries)
        closedir(entries);
    return count;
}

/* The only one that needs it, and NULL when there are several, or none. */
static const struct file *only_above(const struct files *files, const struct file *file)
{
    const struct file *above = NULL;
    for (unsigned i = 0; i < files->count; i++) {
        if (!files->file[i].backing || strcmp(files->file[i].backing, file->path) != 0)
            continue;
        if (above)
            return NULL;
        above = &files->file[i];
    }
    return above;
}

static bool is_in(const char *path, const char *directory)
{
    size_t length = strlen(directory);
    return strncmp(path, directory, length) == 0 && path[length] == '/' && !strchr(path + length + 1, '/');
}

/* True: a file is gone. */
static bool merge_one(const char *directory, const struct files *files)
{
    char draft[STORE_PATH_BYTES + 32];
    struct error err;
    snprintf(draft, sizeof draft, "%s/merging.qcow2", directory);
    for (unsigned i = 0; i < files->count; i++) {
        const struct file *lower = &files->file[i], *upper = only_above(files, lower);
        if (lower->root || !upper || !lower->backing || !is_in(lower->path, directory) || !is_in(upper->path, directory))
            continue;
        if (block_image_merge(upper->path, draft, lower->backing, lower->backing_format, &err) == 0) /* -EBUSY: a running machine writes it; another time */
            return true;
    }
    return false;
}

void snapshot_disks_sweep(const char *vm, bool merge)
{
    char directory[STORE_PATH_BYTES];
    bool again = snapshot_store_directory(vm, directory, NULL) == 0;
    size_t length = strlen(directory);
    snprintf(directory + length, sizeof directory - length, "/.disks");
    while (again) {
        struct files needed = {0};
        int fd = open(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        again = false;
        if (fd >= 0 && find_needed(&needed) == 0) {
            bool many = remove_unneeded(directory, &needed) > MANY_FILES;
            again = (merge || many) && merge_one(directory, &needed) && fsync(fd) == 0;
        }
        if (fd >= 0)
            close(fd);
        clear(&needed);
    }
}

/* ---- comparing ---- */

struct pair {
    struct block_image *a, *b;
    uint8_t *data; /* two clusters */
};

/* How many bytes from there on are the same for sure. */
static int same_bytes(const struct pair *pair, uint64_t offset, uint64_t most, uint64_t *bytes)
{
    struct block_where a, b;
    *bytes = most;
    int r = block_image_where(pair->a, offset, bytes, &a);
    if (r == 0)
        r = block_image_where(pair->b, offset, bytes, &b);
    bool same = r == 0 && a.kind == b.kind && (a.kind == WHERE_ZERO || (a.device == b.device && a.inode == b.inode && a.at == b.at));
    *bytes = same ? *bytes : 0;
    return r;
}

static int compare_pair(const struct pair *pair, uint64_t *different, uint64_t *all, struct error *err)
{
    uint64_t size = block_image_bytes(pair->a), bytes;
    int r = size == block_image_bytes(pair->b) ? 0 : error_set(err, -EINVAL, "a disk has different sizes: %llu and %llu bytes", (unsigned long long)size,
                                                               (unsigned long long)block_image_bytes(pair->b));
    *all += (size + CLUSTER_BYTES - 1) / CLUSTER_BYTES;
    for (uint64_t offset = 0; r == 0 && offset < size;) {
        r = same_bytes(pair, offset, size - offset, &bytes);
        if (r == 0 && (bytes >= CLUSTER_BYTES || bytes == size - offset)) {
            offset += bytes / CLUSTER_BYTES * CLUSTER_BYTES + (bytes == size - offset ? bytes % CLUSTER_BYTES : 0);
            continue;
        }
        bytes = size - offset < CLUSTER_BYTES ? size - offset : CLUSTER_BYTES;
        if (r == 0)
            r = block_image_read(pair->a, offset, pair->data, bytes);
        if (r == 0)
            r = block_image_read(pair->b, offset, pair->data + CLUSTER_BYTES, bytes);
        if (r)
            return error_set(err, r, "cannot read a disk: %s", strerror(-r));
        *different += memcmp(pair->data, pair->data + CLUSTER_BYTES, bytes) != 0;
        offset += bytes;
    }
    return r;
}

int snapshot_disks_compare(const struct stored_snapshot *a, const struct stored_snapshot *b, uint64_t *different, uint64_t *all, struct error *err)
{
    size_t count = json_array_size(json_object_get(a->meta, "disk_files"));
    struct pair pair = {.data = malloc(2 * CLUSTER_BYTES)};
    int r = pair.data ? 0 : error_set(err, -ENOMEM, "out of memory");
    *different = *all = 0;
    if (r == 0 && count != json_array_size(json_object_get(b->meta, "disk_files")))
        r = error_set(err, -EINVAL, "%s has other disks than %s", a->name, b->name);
    for (size_t i = 0; r == 0 && i < count; i++) {
        r = snapshot_disks_open(a, json_array_get(json_object_get(a->meta, "disk_files"), i), &pair.a, err);
        if (r == 0)
            r = snapshot_disks_open(b, json_array_get(json_object_get(b->meta, "disk_files"), i), &pair.b, err);
        if (r == 0)
            r = compare_pair(&pair, different, all, err);
        block_image_close(pair.a);
        block_image_close(pair.b);
        pair.a = pair.b = NULL;
    }
    free(pair.data);
    return r;
}
