/* The directory of snapshots (snapshot_store.h): places, locks, reading what is there, and giving names. Merging is in snapshot_merge.c. */
#include "control/snapshot_store.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/checked_json.h"
#include "control/instance.h"
#include "control/snapshot_disks.h"
#include "control/snapshot_store_priv.h"
#include "util/log.h"

/* ---- places ---- */

static int root_path(char path[STORE_PATH_BYTES], struct error *err)
{
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    int n = -1;
    if (data && data[0] == '/')
        n = snprintf(path, STORE_PATH_BYTES, "%s/doppel/snapshots", data);
    else if (geteuid() == 0)
        n = snprintf(path, STORE_PATH_BYTES, "/var/lib/doppel/snapshots");
    else if (home && home[0] == '/')
        n = snprintf(path, STORE_PATH_BYTES, "%s/.local/share/doppel/snapshots", home);
    if (n < 0 || n > STORE_PATH_BYTES - 4 * STORE_NAME_BYTES)
        return error_set(err, -EINVAL, "there is no place for snapshots: set XDG_DATA_HOME to a directory");
    return 0;
}

static int make_path(const char *path, struct error *err)
{
    char part[STORE_PATH_BYTES];
    for (const char *slash = strchr(path + 1, '/');; slash = strchr(slash + 1, '/')) {
        snprintf(part, sizeof part, "%.*s", slash ? (int)(slash - path) : STORE_PATH_BYTES - 1, path);
        if (mkdir(part, 0700) && errno != EEXIST)
            return error_set(err, -errno, "cannot make the directory %s: %s", part, strerror(errno));
        if (!slash)
            return 0;
    }
}

int snapshot_store_root(char path[STORE_PATH_BYTES], struct error *err)
{
    struct stat st;
    int r = root_path(path, err);
    if (r == 0)
        r = make_path(path, err);
    if (r == 0 && (stat(path, &st) || st.st_uid != geteuid()))
        r = error_set(err, -EPERM, "%s belongs to another user", path);
    return r;
}

int snapshot_store_directory(const char *vm, char path[STORE_PATH_BYTES], struct error *err)
{
    int r = instance_name_valid(vm) ? snapshot_store_root(path, err) : error_set(err, -EINVAL, "\"%s\" is no name of a virtual machine", vm);
    if (r)
        return r;
    size_t length = strlen(path);
    snprintf(path + length, STORE_PATH_BYTES - length, "/%s", vm);
    return mkdir(path, 0700) && errno != EEXIST ? error_set(err, -errno, "cannot make the directory %s: %s", path, strerror(errno)) : 0;
}

/* The lock that its processes hold as long as one lives (instance.h), which a new machine has before its directory here is made. */
static bool is_alive(const char *vm)
{
    int lock = instance_open(vm, "lock", O_RDONLY);
    bool alive = lock >= 0 && flock(lock, LOCK_SH | LOCK_NB) && errno == EWOULDBLOCK;
    if (lock >= 0)
        close(lock);
    return alive;
}

static void remove_tree(int parent, const char *name)
{
    int dir = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *entries = dir >= 0 ? fdopendir(dir) : NULL;
    for (struct dirent *entry; entries && (entry = readdir(entries));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            unlinkat(dir, entry->d_name, 0);
    if (entries)
        closedir(entries);
    else if (dir >= 0)
        close(dir);
    unlinkat(parent, name, AT_REMOVEDIR);
}

/* What clones of a machine that is no more were made from. They have its files open. */
static void remove_passing(int root, const char *vm)
{
    int dir = openat(root, vm, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *entries = dir >= 0 ? fdopendir(dir) : NULL;
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        struct stored_snapshot snapshot;
        if (strncmp(entry->d_name, STORE_CLONES, strlen(STORE_CLONES)) != 0 || !stored_snapshot_read(dir, vm, entry->d_name, &snapshot))
            continue;
        if (snapshot.passing)
            remove_tree(dir, entry->d_name);
        stored_snapshot_clear(&snapshot);
    }
    if (entries)
        closedir(entries);
}

void snapshot_store_tidy(void)
{
    char root[STORE_PATH_BYTES];
    DIR *entries = snapshot_store_root(root, NULL) == 0 ? opendir(root) : NULL;
    for (struct dirent *entry; entries && (entry = readdir(entries));)
        if (instance_name_valid(entry->d_name) && !is_alive(entry->d_name)) {
            remove_passing(dirfd(entries), entry->d_name);
            unlinkat(dirfd(entries), entry->d_name, AT_REMOVEDIR); /* if nothing is in it */
        }
    if (entries)
        closedir(entries);
}

int snapshot_store_open(const char *vm, struct error *err)
{
    char path[STORE_PATH_BYTES];
    int r = snapshot_store_directory(vm, path, err);
    if (r)
        return r;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return fd >= 0 ? fd : error_set(err, -errno, "cannot use the directory %s: %s", path, strerror(errno));
}

int snapshot_store_lock(const char *vm, bool exclusive, struct error *err)
{
    int dir = snapshot_store_open(vm, err);
    if (dir < 0)
        return dir;
    int fd = openat(dir, ".lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0600);
    close(dir);
    if (fd >= 0 && flock(fd, (exclusive ? LOCK_EX : LOCK_SH) | LOCK_NB) == 0)
        return fd;
    int code = errno;
    if (fd >= 0)
        close(fd);
    return code == EWOULDBLOCK ? error_set(err, -EBUSY, "snapshots of %s are in use by another command; try again when it is through", vm)
                               : error_set(err, -code, "cannot lock the snapshots of %s: %s", vm, strerror(code));
}

/* ---- identifiers ---- */

void snapshot_id_text(const struct chunk_id *id, char text[33])
{
    for (unsigned i = 0; i < 16; i++)
        snprintf(text + 2 * i, 3, "%02x", id->bytes[i]);
}

bool snapshot_id_parse(const char *text, struct chunk_id *id)
{
    if (strlen(text) != 32 || strspn(text, "0123456789abcdef") != 32)
        return false;
    for (unsigned i = 0; i < 16; i++) {
        char two[3] = {text[2 * i], text[2 * i + 1], 0};
        id->bytes[i] = (uint8_t)strtoul(two, NULL, 16);
    }
    return true;
}

/* ---- reading ---- */

bool snapshot_store_boot_id(char text[64])
{
    int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    ssize_t size = fd >= 0 ? read(fd, text, 63) : -1;
    if (fd >= 0)
        close(fd);
    text[size > 0 ? size : 0] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return text[0];
}

/* Files that nobody waited for to be on the disk may be anything after the host's next start. */
static bool has_passed(const struct stored_snapshot *snapshot)
{
    char now[64];
    return snapshot->passing && (!snapshot_store_boot_id(now) || strcmp(now, json_string_value(json_object_get(snapshot->meta, "boot_id"))) != 0);
}

static json_t *read_meta(int dir)
{
    json_t *meta;
    return checked_json_read(dir, "snapshot.json", &meta) ? NULL : meta;
}

/* An identifier, or "". False: neither. */
static bool take_id(const json_t *meta, const char *key, char out[33], bool needed)
{
    struct chunk_id id;
    const char *text = json_string_value(json_object_get(meta, key));
    out[0] = '\0';
    if (!text || !*text)
        return !needed;
    if (!snapshot_id_parse(text, &id))
        return false;
    strcpy(out, text);
    return true;
}

bool stored_snapshot_read(int vm_dir, const char *vm, const char *name, struct stored_snapshot *out)
{
    *out = (struct stored_snapshot){0};
    int dir = openat(vm_dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    json_t *meta = dir >= 0 ? read_meta(dir) : NULL;
    if (dir >= 0)
        close(dir);
    const char *memory = json_string_value(json_object_get(meta, "memory"));
    bool good = json_integer_value(json_object_get(meta, "format")) == STORE_FORMAT && memory && instance_name_valid(memory) &&
                take_id(meta, "id", out->id, true) && take_id(meta, "base_id", out->base_id, false) && take_id(meta, "parent_id", out->parent_id, false);
    if (!good || snapshot_store_directory(vm, out->path, NULL)) {
        json_decref(meta);
        return false;
    }
    size_t length = strlen(out->path);
    snprintf(out->path + length, sizeof out->path - length, "/%s", name);
    snprintf(out->vm, sizeof out->vm, "%s", vm);
    snprintf(out->name, sizeof out->name, "%s", name);
    snprintf(out->memory, sizeof out->memory, "%s", memory);
    out->passing = json_is_string(json_object_get(meta, "boot_id"));
    out->encrypted = json_is_true(json_object_get(meta, "encrypted"));
    json_int_t level = json_integer_value(json_object_get(meta, "zstd_level"));
    out->zstd_level = level < 0 ? 0 : level > 19 ? 19 : (int)level;
    out->created_ms = (uint64_t)json_integer_value(json_object_get(meta, "created_ms"));
    out->meta = meta;
    return true;
}

void stored_snapshot_clear(struct stored_snapshot *snapshot)
{
    json_decref(snapshot->meta);
    snapshot->meta = NULL;
}

void snapshot_store_free(struct stored_snapshot *list, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        stored_snapshot_clear(&list[i]);
    free(list);
}

static int list_vm(const char *vm, struct stored_snapshot **list, unsigned *count, struct error *err)
{
    int dir = snapshot_store_open(vm, err), r = 0;
    DIR *entries = dir >= 0 ? fdopendir(dir) : NULL;
    if (!entries)
        return dir < 0 ? dir : error_set(err, -ENOMEM, "out of memory");
    for (struct dirent *entry; r == 0 && (entry = readdir(entries));) {
        if (!instance_name_valid(entry->d_name))
            continue;
        struct stored_snapshot *grown = realloc(*list, (*count + 1) * sizeof *grown);
        if (!grown) {
            r = error_set(err, -ENOMEM, "out of memory");
            break;
        }
        *list = grown;
        if (stored_snapshot_read(dirfd(entries), vm, entry->d_name, &grown[*count])) {
            if (has_passed(&grown[*count]))
                stored_snapshot_clear(&grown[*count]);
            else
                ++*count;
        } else {
            log_warning("%s/%s is no snapshot that this program can read: its snapshot.json is missing, damaged or of a later version", vm, entry->d_name);
        }
    }
    closedir(entries);
    return r;
}

int snapshot_store_all_readable(const char *vm, struct error *err)
{
    struct stat st;
    int dir = snapshot_store_open(vm, err), r = 0;
    DIR *entries = dir >= 0 ? fdopendir(dir) : NULL;
    if (!entries)
        return dir < 0 ? dir : error_set(err, -ENOMEM, "out of memory");
    for (struct dirent *entry; r == 0 && (entry = readdir(entries));) {
        struct stored_snapshot snapshot;
        if (!instance_name_valid(entry->d_name) || fstatat(dir, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISDIR(st.st_mode))
            continue;
        if (stored_snapshot_read(dir, vm, entry->d_name, &snapshot))
            stored_snapshot_clear(&snapshot);
        else
            r = error_set(err, -EBADMSG, "%s/%s cannot be read, and may need what is removed: its snapshot.json is missing, damaged or of a later version; repair it, or remove its directory", vm,
                          entry->d_name);
    }
    closedir(entries);
    return r;
}

static int by_age(const void *a, const void *b)
{
    const struct stored_snapshot *one = a, *other = b;
    int names = strcmp(one->vm, other->vm);
    if (names)
        return names;
    return one->created_ms != other->created_ms ? one->created_ms < other->created_ms ? -1 : 1 : strcmp(one->name, other->name);
}

int snapshot_store_list(const char *vm, struct stored_snapshot **list, unsigned *count, struct error *err)
{
    char root[STORE_PATH_BYTES];
    int r = snapshot_store_root(root, err);
    DIR *entries = NULL;
    *list = NULL;
    *count = 0;
    if (r == 0 && vm)
        r = list_vm(vm, list, count, err);
    else if (r == 0 && !(entries = opendir(root)))
        r = error_set(err, -errno, "cannot read %s: %s", root, strerror(errno));
    for (struct dirent *entry; r == 0 && entries && (entry = readdir(entries));)
        if (instance_name_valid(entry->d_name))
            r = list_vm(entry->d_name, list, count, err);
    if (entries)
        closedir(entries);
    if (r == 0 && *count)
        qsort(*list, *count, sizeof **list, by_age);
    if (r) {
        snapshot_store_free(*list, *count);
        *list = NULL;
        *count = 0;
    }
    return r;
}

const struct stored_snapshot *snapshot_store_by_id(const struct stored_snapshot *list, unsigned count, const char *id)
{
    for (unsigned i = 0; i < count; i++)
        if (strcmp(list[i].id, id) == 0)
            return &list[i];
    return NULL;
}

const struct stored_snapshot *snapshot_store_by_name(const struct stored_snapshot *list, unsigned count, const char *name)
{
    for (unsigned i = 0; i < count; i++)
        if (strcmp(list[i].name, name) == 0)
            return &list[i];
    return NULL;
}

uint64_t snapshot_store_bytes(const struct stored_snapshot *snapshot)
{
    const char *const files[] = {"state", snapshot->memory};
    char path[STORE_PATH_BYTES + STORE_NAME_BYTES];
    uint64_t bytes = 0;
    struct stat st;
    for (unsigned i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", snapshot->path, files[i]);
        if (stat(path, &st) == 0)
            bytes += (uint64_t)st.st_blocks * 512;
    }
    return bytes;
}

int snapshot_store_chain(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, struct snapshot_chain *chain, struct error *err)
{
    unsigned depth = 0;
    if (snprintf(chain->state, sizeof chain->state, "%s/state", snapshot->path) >= (int)sizeof chain->state ||
        snprintf(chain->working_set, sizeof chain->working_set, "%s/working-set", snapshot->path) >= (int)sizeof chain->working_set)
        return error_set(err, -ENAMETOOLONG, "the path of %s is too long", snapshot->name);
    for (const struct stored_snapshot *at = snapshot;; depth++) {
        if (depth == STORE_DEPTH_MAX)
            return error_set(err, -ELOOP, "%s needs more than %u others", snapshot->name, STORE_DEPTH_MAX);
        if (snprintf(chain->memory[depth], STORE_PATH_BYTES, "%s/%s", at->path, at->memory) >= STORE_PATH_BYTES)
            return error_set(err, -ENAMETOOLONG, "the path of %s is too long", at->name);
        chain->below[depth] = chain->memory[depth];
        if (!at->base_id[0])
            break;
        const char *needed_by = at->name, *base = at->base_id;
        at = snapshot_store_by_id(list, count, base);
        if (!at)
            return error_set(err, -ENOENT, "%s needs the snapshot with the identifier %s, which is not there", needed_by, base);
    }
    chain->files = (struct snapshot_files){.state = chain->state, .memory = chain->memory[0], .below = chain->below + 1, .below_count = depth, .working_set = chain->working_set};
    return 0;
}

/* ---- making ---- */

static void hidden_name(char out[STORE_NAME_BYTES + 8], const char *prefix, const char *name)
{
    snprintf(out, STORE_NAME_BYTES + 8, "%s%s", prefix, name);
}

/* In a snapshot that is one, what its description does not name: a merge that was killed leaves a memory file, before its end the new one, after it the old one. */
static void sweep_files(int vm_dir, const char *name)
{
    int dir = openat(vm_dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    json_t *meta = dir >= 0 ? read_meta(dir) : NULL;
    const char *memory = json_string_value(json_object_get(meta, "memory"));
    DIR *entries = memory ? fdopendir(dir) : NULL;
    for (struct dirent *entry; entries && (entry = readdir(entries));)
        if (strncmp(entry->d_name, "memory", 6) == 0 && strcmp(entry->d_name, memory) != 0)
            unlinkat(dir, entry->d_name, 0);
    if (entries)
        closedir(entries);
    else if (dir >= 0)
        close(dir);
    json_decref(meta);
}

/* Of commands that were killed: with the exclusive lock, nobody works on them. */
void snapshot_store_sweep(int vm_dir)
{
    int copy = openat(vm_dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = copy >= 0 ? fdopendir(copy) : NULL;
    if (!entries && copy >= 0)
        close(copy);
    for (struct dirent *entry; entries && (entry = readdir(entries));)
        if (strncmp(entry->d_name, STORE_NEW, strlen(STORE_NEW)) == 0 || strncmp(entry->d_name, STORE_OLD, strlen(STORE_OLD)) == 0)
            remove_tree(vm_dir, entry->d_name);
        else if (instance_name_valid(entry->d_name))
            sweep_files(vm_dir, entry->d_name);
    if (entries)
        closedir(entries);
}

int snapshot_store_begin(const char *vm, const char *name, struct error *err)
{
    char draft[STORE_NAME_BYTES + 8];
    struct stat st;
    if (!instance_name_valid(name))
        return error_set(err, -EINVAL, "\"%s\" is no name for a snapshot: use up to %d letters, digits, \"-\", \"_\" and \".\", beginning with a letter or digit", name,
                         STORE_NAME_BYTES - 1);
    int dir = snapshot_store_open(vm, err);
    if (dir < 0)
        return dir;
    snapshot_store_sweep(dir);
    snapshot_disks_sweep(vm, false);
    int r = fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) == 0 ? error_set(err, -EEXIST, "%s has a snapshot named %s already", vm, name) : 0;
    hidden_name(draft, STORE_NEW, name);
    if (r == 0 && mkdirat(dir, draft, 0700))
        r = error_set(err, -errno, "cannot make a directory for %s/%s: %s", vm, name, strerror(errno));
    close(dir);
    return r;
}

void snapshot_store_abort(const char *vm, const char *name)
{
    char draft[STORE_NAME_BYTES + 8];
    int dir = snapshot_store_open(vm, NULL);
    if (dir < 0)
        return;
    hidden_name(draft, STORE_NEW, name);
    remove_tree(dir, draft);
    close(dir);
}

int snapshot_store_write_meta(int dir, const json_t *meta)
{
    return checked_json_write(dir, "snapshot.json", meta, !json_object_get(meta, "boot_id"));
}

static int sync_file(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), r = 0;
    if (fd < 0 || fsync(fd))
        r = -errno;
    if (fd >= 0)
        close(fd);
    return r;
}

int snapshot_store_commit(const char *vm, const char *name, const json_t *meta, struct error *err)
{
    char draft[STORE_NAME_BYTES + 8];
    const char *memory = json_string_value(json_object_get(meta, "memory"));
    int vm_dir = snapshot_store_open(vm, err);
    if (vm_dir < 0)
        return vm_dir;
    hidden_name(draft, STORE_NEW, name);
    int dir = openat(vm_dir, draft, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), r = dir < 0 ? -errno : 0;
    bool passing = json_object_get(meta, "boot_id");
    if (r == 0 && !passing)
        r = sync_file(dir, "state");
    if (r == 0 && !passing)
        r = sync_file(dir, memory ? memory : "memory");
    if (r == 0)
        r = snapshot_store_write_meta(dir, meta);
    if (r == 0 && (renameat(vm_dir, draft, vm_dir, name) || (!passing && fsync(vm_dir))))
        r = -errno;
    if (dir >= 0)
        close(dir);
    close(vm_dir);
    return r ? error_set(err, r, "cannot write the snapshot %s/%s: %s", vm, name, strerror(-r)) : 0;
}

/* ---- removing ---- */

int snapshot_store_drop(const char *vm, const char *name, struct error *err)
{
    char doomed[STORE_NAME_BYTES + 8];
    int dir = snapshot_store_open(vm, err);
    if (dir < 0)
        return dir;
    hidden_name(doomed, STORE_OLD, name);
    int r = renameat(dir, name, dir, doomed) || fsync(dir) ? error_set(err, -errno, "cannot remove %s/%s: %s", vm, name, strerror(errno)) : 0;
    if (r == 0)
        remove_tree(dir, doomed);
    close(dir);
    return r;
}
