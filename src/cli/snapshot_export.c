/*
 * doppel snapshot export and import: a snapshot, and those that it needs, in one tar file (docs/formats.md), lowest first; of each snapshot.json, state, memory.
 * What is imported is foreign: names of entries are looked at, sizes are bounded by the disk, and each snapshot counts when it is complete, as one that is made here.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/image.h"
#include "cli/archive_files.h"
#include "cli/report.h"
#include "cli/snapshot.h"
#include "control/checked_json.h"
#include "control/snapshot_disks.h"

#define BLOCK_BYTES (256u << 10)

static bool is_standard(const char *path)
{
    return strcmp(path, "-") == 0;
}

/* ---- export ---- */

static int put_file(struct archive *out, const struct stored_snapshot *snapshot, const char *file)
{
    char path[STORE_PATH_BYTES + STORE_NAME_BYTES], name[2 * STORE_NAME_BYTES];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", snapshot->path, file);
    snprintf(name, sizeof name, "%s/%s", snapshot->name, file);
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    int r = fd < 0 || fstat(fd, &st) ? complain(STATUS_ERROR, "cannot read %s: %s", path, strerror(errno)) : archive_put_file(out, fd, (uint64_t)st.st_size, st.st_mtime, name, path, NULL);
    if (fd >= 0)
        close(fd);
    return r;
}

/* What it needs first. */
static int put_snapshot(struct archive *out, const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, unsigned depth)
{
    int r = 0;
    if (snapshot->base_id[0]) {
        const struct stored_snapshot *base = snapshot_store_by_id(list, count, snapshot->base_id);
        if (!base || depth == STORE_DEPTH_MAX)
            return complain(STATUS_ERROR, "%s/%s needs a snapshot that is not there", snapshot->vm, snapshot->name);
        r = put_snapshot(out, list, count, base, depth + 1);
    }
    const char *const files[] = {"snapshot.json", "state", snapshot->memory};
    for (unsigned i = 0; r == 0 && i < 3; i++)
        r = put_file(out, snapshot, files[i]);
    return r;
}

/* ---- disks of it ---- */

/* Each becomes an image by itself, with what is below it. */
static int put_disk(struct archive *out, const struct stored_snapshot *snapshot, size_t index, const json_t *entry)
{
    char directory[STORE_PATH_BYTES], draft[STORE_PATH_BYTES + 64], name[2 * STORE_NAME_BYTES];
    const char *file = json_string_value(json_object_get(entry, "file")), *format = json_string_value(json_object_get(entry, "format"));
    struct error err = {0};
    struct stat st;
    if (!file || !format || snapshot_store_directory(snapshot->vm, directory, &err))
        return complain(STATUS_ERROR, "%s/%s: its snapshot.json names no files of disks", snapshot->vm, snapshot->name);
    snprintf(draft, sizeof draft, "%s/.disks/export-%d.qcow2", directory, (int)getpid()); /* goes with the next snapshot, when we are killed */
    snprintf(name, sizeof name, "%s/disk%zu", snapshot->name, index);
    unlink(draft);
    if (block_image_copy(file, format, draft, BLOCK_ALL_LAYERS, NULL, NULL, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    int fd = open(draft, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    unlink(draft);
    int r = fd < 0 || fstat(fd, &st) ? complain(STATUS_ERROR, "cannot read %s: %s", draft, strerror(errno)) : archive_put_file(out, fd, (uint64_t)st.st_size, st.st_mtime, name, draft, NULL);
    if (fd >= 0)
        close(fd);
    return r;
}

static int put_with_disks(struct archive *out, const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, unsigned depth)
{
    const json_t *entry, *disks = json_object_get(snapshot->meta, "disk_files");
    const char *const files[] = {"snapshot.json", "state", snapshot->memory};
    size_t n;
    int r = 0;
    if (snapshot->base_id[0]) {
        const struct stored_snapshot *base = snapshot_store_by_id(list, count, snapshot->base_id);
        if (!base || depth == STORE_DEPTH_MAX)
            return complain(STATUS_ERROR, "%s/%s needs a snapshot that is not there", snapshot->vm, snapshot->name);
        r = put_with_disks(out, list, count, base, depth + 1);
    }
    for (unsigned i = 0; r == 0 && i < 3; i++)
        r = put_file(out, snapshot, files[i]);
    json_array_foreach(disks, n, entry)
        r = r ? r : put_disk(out, snapshot, n, entry);
    return r;
}

int snapshot_put(struct archive *out, const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot)
{
    return put_snapshot(out, list, count, snapshot, 0);
}

static int write_archive(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, const char *path)
{
    char draft[STORE_PATH_BYTES];
    if (snprintf(draft, sizeof draft, "%s.part", path) >= (int)sizeof draft)
        return complain(STATUS_ERROR, "the name %s is too long", path);
    int fd = is_standard(path) ? STDOUT_FILENO : open(draft, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600), r = 0;
    struct archive *out = archive_write_new();
    if (fd < 0 || !out)
        r = complain(STATUS_ERROR, "cannot write %s: %s", draft, strerror(errno));
    else if (archive_write_set_format_pax_restricted(out) != ARCHIVE_OK || archive_write_open_fd(out, fd) != ARCHIVE_OK)
        r = complain(STATUS_ERROR, "cannot write %s: %s", path, archive_error_string(out));
    if (r == 0)
        r = put_with_disks(out, list, count, snapshot, 0);
    if (r == 0 && archive_write_close(out) != ARCHIVE_OK)
        r = complain(STATUS_ERROR, "cannot write %s: %s", path, archive_error_string(out));
    archive_write_free(out);
    if (fd >= 0 && fd != STDOUT_FILENO) {
        if (r == 0 && (fsync(fd) || rename(draft, path)))
            r = complain(STATUS_ERROR, "cannot write %s: %s", path, strerror(errno));
        close(fd);
        if (r)
            unlink(draft);
    }
    return r;
}

int snapshot_export(const struct arguments *arguments)
{
    const char *vm = arguments->names[1], *name = arguments->names[2], *path = arguments->names[3];
    struct stored_snapshot *list = NULL;
    unsigned count = 0;
    struct error err = {0};
    if (archive_library_load())
        return STATUS_ERROR;
    int lock = snapshot_store_lock(vm, false, &err);
    int r = lock < 0 || snapshot_store_list(vm, &list, &count, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    const struct stored_snapshot *snapshot = r == 0 ? snapshot_store_by_name(list, count, name) : NULL;
    if (r == 0 && !snapshot)
        r = complain(STATUS_ERROR, "%s has no snapshot named %s", vm, name);
    if (r == 0 && is_standard(path) && isatty(STDOUT_FILENO))
        r = complain(STATUS_USAGE, "snapshot: standard output is a terminal; give a file");
    if (r == 0 && is_standard(path) && report_is_json())
        r = complain(STATUS_USAGE, "snapshot: standard output has either the archive or --json");
    if (r == 0)
        r = write_archive(list, count, snapshot, path);
    if (r == 0 && report_is_json())
        report_file(path, json_pack("{s:s, s:s}", "vm", vm, "name", name));
    if (lock >= 0)
        close(lock);
    snapshot_store_free(list, count);
    return r;
}

/* ---- import ---- */

struct snapshot_import {
    struct archive *in;
    const char *path, *wanted_vm; /* NULL: the machine's own name */
    char vm[STORE_NAME_BYTES], name[STORE_NAME_BYTES], memory[STORE_NAME_BYTES];
    json_t *meta; /* of the one under way; NULL: none is */
    bool known;   /* it is there already: its files are passed over */
    bool has_state, has_memory;
    unsigned disks, disks_taken; /* in the archive; sets */
    int lock;
    unsigned count;
    const json_t *changes, *changes_last; /* members that snapshot.json gets; NULL: none. Of the last one others */
    const char *last;
};

static int bad(const struct snapshot_import *import, const char *what)
{
    return complain(STATUS_ERROR, "%s is no exported snapshot: %s", import->path, what);
}

/* The one under way is complete. */
static int finish_one(struct snapshot_import *import)
{
    struct error err = {0};
    int r = 0;
    if (!import->meta)
        return 0;
    if (!import->known && (!import->has_state || !import->has_memory || import->disks_taken != import->disks))
        r = bad(import, "files are missing");
    else if (!import->known && snapshot_store_commit(import->vm, import->name, import->meta, &err))
        r = complain(STATUS_ERROR, "%s", err.text);
    if (r == 0)
        report(json_pack("{s:s, s:s, s:b}", "vm", import->vm, "name", import->name, "known", import->known), "%s/%s%s", import->vm, import->name, import->known ? " (there already)" : "");
    json_decref(import->meta);
    import->meta = NULL;
    import->count++;
    return r;
}

static json_t *read_meta(struct snapshot_import *import)
{
    char *text = malloc(CHECKED_JSON_BYTES_MAX);
    ssize_t n = text ? archive_read_data(import->in, text, CHECKED_JSON_BYTES_MAX) : -1;
    json_t *meta = n > 0 && n < (ssize_t)CHECKED_JSON_BYTES_MAX ? checked_json_parse(text, (size_t)n) : NULL;
    free(text);
    return meta;
}

static int take_lock(struct snapshot_import *import, const char *vm)
{
    struct error err = {0};
    if (import->lock >= 0)
        return strcmp(vm, import->vm) == 0 ? 0 : bad(import, "snapshots of several machines");
    snprintf(import->vm, sizeof import->vm, "%s", vm);
    import->lock = snapshot_store_lock(vm, true, &err);
    return import->lock < 0 ? complain(STATUS_ERROR, "%s", err.text) : 0;
}

/* snapshot.json begins a snapshot. */
static int begin_one(struct snapshot_import *import, const char *name)
{
    struct stored_snapshot *list;
    unsigned count;
    struct error err = {0};
    int r = finish_one(import);
    json_t *meta = r ? NULL : read_meta(import);
    const char *vm = import->wanted_vm ? import->wanted_vm : json_string_value(json_object_get(meta, "vm")), *id = json_string_value(json_object_get(meta, "id"));
    const char *memory = json_string_value(json_object_get(meta, "memory"));
    if (r)
        return r;
    import->meta = meta;
    if (!vm || !instance_name_valid(vm) || !id || !memory || !instance_name_valid(memory) || strcmp(memory, "state") == 0)
        return bad(import, "its description is damaged");
    r = take_lock(import, vm);
    if (r)
        return r;
    strcpy(import->name, name);
    strcpy(import->memory, memory);
    import->has_state = import->has_memory = false;
    size_t disks = import->changes ? 0 : json_array_size(json_object_get(meta, "disk_files"));
    if (disks > CONFIG_DISKS_MAX)
        return bad(import, "too many disks");
    import->disks = (1u << disks) - 1;
    import->disks_taken = 0;
    vm = import->vm; /* the other one goes */
    json_object_set_new(meta, "vm", json_string(vm));
    json_object_set_new(meta, "name", json_string(name));
    if (import->changes)
        json_object_update(meta, (json_t *)(strcmp(name, import->last) == 0 ? import->changes_last : import->changes));
    if (snapshot_store_list(vm, &list, &count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    const struct stored_snapshot *there = snapshot_store_by_name(list, count, name);
    import->known = there && strcmp(there->id, id) == 0;
    snapshot_store_free(list, count);
    return !import->known && snapshot_store_begin(vm, name, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
}

static int take_file(struct snapshot_import *import, const char *file, int64_t size)
{
    char path[STORE_PATH_BYTES + 4 * STORE_NAME_BYTES];
    struct error err = {0};
    bool *has = strcmp(file, "state") == 0 ? &import->has_state : &import->has_memory;
    if (import->known)
        return 0;
    if (*has)
        return bad(import, "a file comes twice");
    *has = true;
    if (snapshot_store_directory(import->vm, path, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    size_t length = strlen(path);
    snprintf(path + length, sizeof path - length, "/.new-%s/%s", import->name, file);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    int r = fd < 0 ? complain(STATUS_ERROR, "cannot write %s: %s", path, strerror(errno)) : 0;
    if (r == 0 && archive_read_data_into_fd(import->in, fd) != ARCHIVE_OK)
        r = complain(STATUS_ERROR, "cannot read %s or write %s: %s", import->path, path, archive_error_string(import->in));
    if (r == 0 && ftruncate(fd, size)) /* the hole at the end */
        r = complain(STATUS_ERROR, "cannot write %s: %s", path, strerror(errno));
    if (fd >= 0)
        close(fd);
    return r;
}

/* An image that must be one by itself: what it names as its backing file would be opened here. */
static int take_disk(struct snapshot_import *import, struct archive_entry *entry, unsigned index)
{
    char path[STORE_PATH_BYTES], directory[STORE_PATH_BYTES];
    json_t *disk = json_array_get(json_object_get(import->meta, "disk_files"), index);
    struct block_image_info info = {0};
    struct error err = {0};
    if (import->known)
        return 0;
    if (import->disks_taken >> index & 1)
        return bad(import, "a file comes twice");
    import->disks_taken |= 1u << index;
    int dir = snapshot_disks_place(import->vm, directory, path, &err);
    if (dir < 0)
        return complain(STATUS_ERROR, "%s", err.text);
    int fd = archive_take_file(import->in, entry, dir, strrchr(path, '/') + 1, import->path, NULL), r = fd < 0 ? STATUS_ERROR : 0;
    if (r == 0 && fsync(fd))
        r = complain(STATUS_ERROR, "cannot write %s: %s", path, strerror(errno));
    if (r == 0 && (block_image_info(path, "qcow2", &info, &err) || info.backing || info.size_bytes != (uint64_t)json_integer_value(json_object_get(disk, "size_bytes"))))
        r = bad(import, "a disk that is no image by itself, or of another size");
    block_image_info_clear(&info);
    if (fd >= 0)
        close(fd);
    if (r == 0 && fsync(dir))
        r = complain(STATUS_ERROR, "cannot write %s: %s", directory, strerror(errno));
    if (r && fd >= 0)
        unlinkat(dir, strrchr(path, '/') + 1, 0);
    close(dir);
    json_object_set_new(disk, "file", json_string(path));
    json_object_set_new(disk, "format", json_string("qcow2"));
    return r;
}

/* "disk0" and so on, of those that there are; else CONFIG_DISKS_MAX. */
static unsigned disk_number(const struct snapshot_import *import, const char *file)
{
    char name[16];
    for (unsigned i = 0; i < CONFIG_DISKS_MAX; i++) {
        snprintf(name, sizeof name, "disk%u", i);
        if (import->meta && import->disks >> i & 1 && strcmp(file, name) == 0)
            return i;
    }
    return CONFIG_DISKS_MAX;
}

/* NAME/FILE */
int snapshot_import_entry(struct snapshot_import *import, struct archive_entry *entry)
{
    char name[STORE_NAME_BYTES];
    const char *path = archive_entry_pathname(entry), *slash = path ? strchr(path, '/') : NULL;
    if (!slash || (size_t)(slash - path) >= sizeof name || archive_entry_filetype(entry) != AE_IFREG || archive_entry_hardlink(entry) || !archive_entry_size_is_set(entry) || archive_entry_size(entry) < 0)
        return bad(import, "an entry that does not belong there");
    snprintf(name, sizeof name, "%.*s", (int)(slash - path), path);
    if (!instance_name_valid(name))
        return bad(import, "an entry that does not belong there");
    if (strcmp(slash + 1, "snapshot.json") == 0)
        return begin_one(import, name);
    unsigned disk = disk_number(import, slash + 1);
    if (disk < CONFIG_DISKS_MAX && strcmp(name, import->name) == 0)
        return take_disk(import, entry, disk);
    if (!import->meta || strcmp(name, import->name) != 0 || (strcmp(slash + 1, "state") != 0 && strcmp(slash + 1, import->memory) != 0))
        return bad(import, "an entry that does not belong there");
    return take_file(import, slash + 1, archive_entry_size(entry));
}

static int read_archive(struct snapshot_import *import)
{
    struct archive_entry *entry;
    int r = 0, code = ARCHIVE_OK;
    while (r == 0 && (code = archive_read_next_header(import->in, &entry)) == ARCHIVE_OK)
        r = snapshot_import_entry(import, entry);
    if (r == 0 && code != ARCHIVE_EOF)
        r = complain(STATUS_ERROR, "cannot read %s: %s", import->path, archive_error_string(import->in));
    if (r == 0)
        r = finish_one(import);
    if (r == 0 && !import->count)
        r = bad(import, "there is nothing in it");
    return r;
}

struct snapshot_import *snapshot_import_begin(struct archive *in, const char *path, const char *vm, const char *last, const json_t *changes, const json_t *changes_last)
{
    struct snapshot_import *import = malloc(sizeof *import);
    if (import)
        *import = (struct snapshot_import){.in = in, .path = path, .wanted_vm = vm, .changes = changes, .changes_last = changes_last, .last = last, .lock = -1};
    return import;
}

int snapshot_import_end(struct snapshot_import *import, bool good, unsigned *count)
{
    int r = good ? finish_one(import) : 0;
    if (good && r == 0 && strcmp(import->name, import->last) != 0)
        r = bad(import, "the last snapshot is missing");
    if (import->meta && !import->known && import->lock >= 0)
        snapshot_store_abort(import->vm, import->name);
    json_decref(import->meta);
    if (import->lock >= 0)
        close(import->lock);
    *count = import->count;
    free(import);
    return r;
}

int snapshot_import(const struct arguments *arguments)
{
    if (archive_library_load())
        return STATUS_ERROR;
    report_list();
    struct snapshot_import import = {.in = archive_read_new(), .path = arguments->names[1], .wanted_vm = arguments->name_count > 2 ? arguments->names[2] : NULL, .lock = -1};
    if (!import.in)
        return complain(STATUS_ERROR, "out of memory");
    archive_read_support_format_tar(import.in);
    int r = 0;
    if (archive_read_open_filename(import.in, is_standard(import.path) ? NULL : import.path, BLOCK_BYTES) != ARCHIVE_OK)
        r = complain(STATUS_ERROR, "cannot read %s: %s", import.path, archive_error_string(import.in));
    if (r == 0)
        r = read_archive(&import);
    if (import.meta && !import.known && import.lock >= 0)
        snapshot_store_abort(import.vm, import.name);
    json_decref(import.meta);
    archive_read_free(import.in);
    if (import.lock >= 0)
        close(import.lock);
    return r;
}
