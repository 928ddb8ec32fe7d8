/*
 * The disks of snapshots (snapshot_disks.h): overlays, the map of what is on top, and what is to be removed. Files count as foreign: names are built here, or checked to be in the directory of
 * snapshots before anything is removed.
 * Threading: stateless; the locks of snapshot_store.h are for processes.
 */
#include "control/snapshot_disks.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/image.h"
#include "control/checked_json.h"
#include "control/instance.h"
#include "control/snapshot_store_priv.h"
#include "state/inputs.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, openat);
SANDBOX_ALLOW(IN_API, mkdirat);
SANDBOX_ALLOW(IN_API, unlinkat);
SANDBOX_ALLOW(IN_API, getrandom);

#define DISKS ".disks"
#define MAP "map.json"
#define BACKING_BYTES_MAX 1024u /* a backing file's name in an image, with its end */

/* ---- the map ---- */

static int open_disks(int directory, bool make)
{
    if (make && mkdirat(directory, DISKS, 0700) && errno != EEXIST)
        return -errno;
    int fd = openat(directory, DISKS, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* Names and what is on top, all of them paths. */
static bool is_map(const json_t *map)
{
    const char *origin;
    json_t *top;
    json_object_foreach((json_t *)(uintptr_t)map, origin, top)
        if (origin[0] != '/' || !json_is_string(top) || json_string_value(top)[0] != '/')
            return false;
    return true;
}

/* Empty when there is none. One that is damaged is no empty one: what guests have written would count as nobody's. */
static int read_map(int disks, const char *directory, json_t **map, struct error *err)
{
    int r = checked_json_read(disks, MAP, map);
    if (r == 0 && is_map(*map))
        return 0;
    json_decref(*map);
    *map = r == -ENOENT ? json_object() : NULL;
    if (*map)
        return 0;
    return error_set(err, r ? r : -EBADMSG, "%s/" DISKS "/" MAP ", which tells what is on top of each disk, %s%s", directory, r == 0 || r == -EBADMSG ? "is damaged: repair it, or remove it and restore a snapshot" : "cannot be read: ",
                     r == 0 || r == -EBADMSG ? "" : strerror(-r));
}

/* ---- overlays ---- */

/* The path of a new image in a machine's directory. 0 or an error. */
static int new_path(const char *directory, char path[STORE_PATH_BYTES], struct error *err)
{
    uint64_t number;
    int r = inputs_random(&number, sizeof number);
    if (r)
        return error_set(err, r, "no random numbers: %s", strerror(-r));
    if (snprintf(path, STORE_PATH_BYTES, "%s/" DISKS "/%016llx.qcow2", directory, (unsigned long long)number) >= STORE_PATH_BYTES)
        return error_set(err, -ENAMETOOLONG, "the path of %s is too long", directory);
    return 0;
}

int snapshot_disks_place(const char *vm, char directory[STORE_PATH_BYTES], char path[STORE_PATH_BYTES], struct error *err)
{
    int vm_fd = snapshot_store_open(vm, err), r = vm_fd < 0 ? vm_fd : snapshot_store_directory(vm, directory, err), fd = r == 0 ? open_disks(vm_fd, true) : -1;
    if (vm_fd >= 0)
        close(vm_fd);
    if (r == 0 && fd < 0)
        r = error_set(err, fd, "cannot make a directory in %s: %s", directory, strerror(-fd));
    if (r == 0)
        r = new_path(directory, path, err);
    if (r == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return r;
}

/* A new image on `below`; its path, and a descriptor, or -errno. */
static int make_overlay(int disks, const char *directory, const char *below, const char *format, uint64_t size_bytes, char path[STORE_PATH_BYTES], struct error *err)
{
    int r = new_path(directory, path, err);
    if (r)
        return r;
    if (strlen(below) >= BACKING_BYTES_MAX)
        return error_set(err, -ENOTSUP, "the path of disk %s is too long", below);
    const char *name = strrchr(path, '/') + 1;
    int fd = openat(disks, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return error_set(err, -errno, "cannot make %s: %s", path, strerror(errno));
    r = block_image_format(fd, path, size_bytes, below, format, err);
    if (r == 0)
        return fd;
    close(fd);
    unlinkat(disks, name, 0);
    return r;
}

static int make_all(struct disks_under_way *disks, int fd, const char *directory, struct error *err)
{
    json_t *map = json_deep_copy(disks->map_before);
    int r = map ? 0 : error_set(err, -ENOMEM, "out of memory");
    for (unsigned i = 0; r >= 0 && i < disks->count; i++) {
        const struct machine_disk_info *disk = &disks->disk[i];
        r = make_overlay(fd, directory, disk->path, disk->format, disk->size_bytes, disks->path[i], err);
        disks->overlay[i] = (struct machine_overlay){.below = disk->path, .path = disks->path[i], .fd = r};
        if (r >= 0 && json_object_set_new(map, disk->origin, json_string(disks->path[i])))
            r = error_set(err, -EINVAL, "the path of disk %s is not UTF-8", disk->origin);
    }
    if (r >= 0 && (r = checked_json_write(fd, MAP, map, true)) < 0)
        error_set(err, r, "cannot write %s/" DISKS "/" MAP ": %s", directory, strerror(-r));
    json_decref(map);
    return r < 0 ? r : 0;
}

int snapshot_disks_begin(struct disks_under_way *disks, struct machine *machine, int directory_fd, const char *directory, struct error *err)
{
    *disks = (struct disks_under_way){.directory_fd = directory_fd};
    int r = machine_disks(machine, &disks->disk, &disks->count, err);
    if (r || !disks->count)
        return r;
    for (unsigned i = 0; i < disks->count; i++)
        disks->overlay[i].fd = -1;
    int fd = open_disks(directory_fd, true);
    if (fd < 0)
        return error_set(err, fd, "cannot make a directory in %s: %s", directory, strerror(-fd));
    r = read_map(fd, directory, &disks->map_before, err);
    if (r == 0)
        r = make_all(disks, fd, directory, err);
    close(fd);
    return r;
}

json_t *snapshot_disks_describe(const struct disks_under_way *disks)
{
    json_t *all = json_array();
    for (unsigned i = 0; i < disks->count; i++)
        json_array_append_new(all, json_pack("{s:s, s:s, s:s, s:I}", "origin", disks->disk[i].origin, "file", disks->disk[i].path, "format", disks->disk[i].format,
                                             "size_bytes", (json_int_t)disks->disk[i].size_bytes));
    return all;
}

void snapshot_disks_end(struct disks_under_way *disks, bool in_use)
{
    int fd = in_use || !disks->map_before ? -1 : open_disks(disks->directory_fd, false);
    if (fd >= 0) {
        bool back = checked_json_write(fd, MAP, disks->map_before, true) == 0;
        for (unsigned i = 0; back && i < disks->count; i++)
            if (disks->path[i][0])
                unlinkat(fd, strrchr(disks->path[i], '/') + 1, 0);
        close(fd);
    }
    for (unsigned i = 0; i < disks->count; i++)
        if (disks->map_before && disks->overlay[i].fd >= 0)
            close(disks->overlay[i].fd);
    json_decref(disks->map_before);
    machine_disks_free(disks->disk, disks->count);
    *disks = (struct disks_under_way){0};
}

/* ---- machines that start ---- */

static char *absolute(const char *path)
{
    char *whole, *directory = path[0] == '/' ? NULL : get_current_dir_name();
    if (path[0] == '/')
        return strdup(path);
    if (!directory || asprintf(&whole, "%s/%s", directory, path) < 0)
        whole = NULL;
    free(directory);
    return whole;
}

static int replace(struct disk_config *disk, const json_t *map, struct error *err)
{
    char *origin = absolute(disk->origin ? disk->origin : disk->path);
    const char *top = origin ? json_string_value(json_object_get(map, origin)) : NULL;
    if (!top && origin) {
        free(origin);
        return 0;
    }
    char *path = origin ? strdup(top) : NULL, *format = strdup("qcow2");
    if (!path || !format) {
        free(origin);
        free(path);
        free(format);
        return error_set(err, -ENOMEM, "out of memory");
    }
    log_info("disk %s goes on in %s: snapshots have what was before", origin, path);
    free(disk->path);
    free(disk->format);
    free(disk->origin);
    disk->path = path;
    disk->format = format;
    disk->origin = origin;
    disk->backing = BLOCK_BACKING_ANY; /* the names in it are ours */
    return 0;
}

int snapshot_disks_map(const char *directory, json_t **map, struct error *err)
{
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), disks = fd >= 0 ? open_disks(fd, false) : -errno, r;
    if (disks >= 0)
        r = read_map(disks, directory, map, err);
    else if (disks == -ENOENT)
        r = (*map = json_object()) ? 0 : error_set(err, -ENOMEM, "out of memory");
    else
        r = error_set(err, disks, "cannot read %s/" DISKS ": %s", directory, strerror(-disks));
    if (disks >= 0)
        close(disks);
    if (fd >= 0)
        close(fd);
    return r;
}

int snapshot_disks_apply(const char *directory, struct machine_config *config, struct error *err)
{
    json_t *map = NULL;
    int r = snapshot_disks_map(directory, &map, err);
    for (unsigned i = 0; r == 0 && i < config->disk_count; i++)
        if (!config->disk[i].readonly)
            r = replace(&config->disk[i], map, err);
    json_decref(map);
    return r;
}

/* One of "disk_files". */
static int understand(const struct stored_snapshot *snapshot, const json_t *entry, const char **origin, const char **file, const char **format, uint64_t *size_bytes, struct error *err)
{
    *origin = json_string_value(json_object_get(entry, "origin"));
    *file = json_string_value(json_object_get(entry, "file"));
    *format = json_string_value(json_object_get(entry, "format"));
    json_int_t size = json_integer_value(json_object_get(entry, "size_bytes"));
    *size_bytes = size > 0 ? (uint64_t)size : 0;
    if (*origin && *file && (*file)[0] == '/' && *format && (strcmp(*format, "raw") == 0 || strcmp(*format, "qcow2") == 0) && size > 0 && size % 512 == 0)
        return 0;
    return error_set(err, -EBADMSG, "%s/%s: its snapshot.json names no files of disks", snapshot->vm, snapshot->name);
}

int snapshot_disks_open(const struct stored_snapshot *snapshot, const json_t *entry, struct block_image **image, struct error *err)
{
    const char *origin, *file, *format;
    uint64_t size_bytes, found;
    *image = NULL;
    int r = understand(snapshot, entry, &origin, &file, &format, &size_bytes, err);
    if (r == 0)
        r = block_image_open(image, file, format, err);
    if (r)
        return r;
    found = block_image_bytes(*image);
    if (found == size_bytes)
        return 0;
    block_image_close(*image);
    *image = NULL;
    return error_set(err, -EBADMSG, "%s has %llu bytes, and was frozen with %llu", file, (unsigned long long)found, (unsigned long long)size_bytes);
}

int snapshot_disks_check(const struct stored_snapshot *snapshot, const char *vm, struct error *err)
{
    char directory[STORE_PATH_BYTES];
    const json_t *entry, *files = json_object_get(snapshot->meta, "disk_files");
    json_t *map = NULL;
    size_t i;
    int r = json_array_size(files) ? snapshot_store_directory(vm, directory, err) : 0;
    if (r == 0 && json_array_size(files))
        r = snapshot_disks_map(directory, &map, err);
    json_decref(map);
    json_array_foreach(r ? NULL : files, i, entry)
    {
        struct block_image *image;
        r = snapshot_disks_open(snapshot, entry, &image, err);
        if (r)
            return r;
        block_image_close(image);
    }
    return r;
}

int snapshot_disks_restore(const struct stored_snapshot *snapshot, const char *vm, struct error *err)
{
    const json_t *files = json_object_get(snapshot->meta, "disk_files"), *entry;
    char directory[STORE_PATH_BYTES], path[STORE_PATH_BYTES];
    const char *origin, *file, *format;
    uint64_t size_bytes;
    size_t i;
    if (!json_array_size(files))
        return 0;
    int fd = snapshot_disks_place(vm, directory, path, err), r = 0;
    if (fd < 0)
        return fd;
    json_t *map = NULL;
    r = read_map(fd, directory, &map, err);
    json_array_foreach(r ? NULL : files, i, entry)
    {
        r = understand(snapshot, entry, &origin, &file, &format, &size_bytes, err);
        int made = r ? r : make_overlay(fd, directory, file, format, size_bytes, path, err);
        r = made < 0 ? made : 0;
        if (r)
            break;
        close(made);
        json_object_set_new(map, origin, json_string(path));
    }
    if (r == 0 && (r = checked_json_write(fd, MAP, map, true)) < 0)
        error_set(err, r, "cannot write %s/" DISKS "/" MAP ": %s", directory, strerror(-r));
    json_decref(map);
    close(fd);
    return r;
}
