/* Checking snapshots (snapshot_check.h). */
#include "control/snapshot_check.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "block/image.h"
#include "control/instance.h"
#include "control/snapshot_disks.h"
#include "control/snapshot_store_priv.h"

#define PATH_BYTES (STORE_PATH_BYTES + STORE_NAME_BYTES)

static enum check_result say(enum check_result result, char *text, const char *why)
{
    snprintf(text, CHECK_TEXT_BYTES, "%s", why);
    return result;
}

static enum check_result failed(int code, char *text, const struct error *err)
{
    return code == -ENOKEY ? say(CHECK_UNKNOWN, text, "it is encrypted, and no key was given") : say(CHECK_DAMAGED, text, err->text);
}

static const char *sum_of(const struct stored_snapshot *snapshot, const char *key)
{
    return json_string_value(json_object_get(snapshot->meta, key));
}

static bool has_id(const struct chunk_id *id, const char *wanted)
{
    char text[33];
    snapshot_id_text(id, text);
    return strcmp(text, wanted) == 0;
}

/* ---- state ---- */

/* Also what is between sections, which have checksums of their own. */
static int check_state_sum(const char *path, const char *wanted, struct error *err)
{
    char sum[PAGE_SUM_TEXT_BYTES];
    struct stat st;
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC), r = 0;
    char *data = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) ? malloc((size_t)st.st_size + 1) : NULL;
    ssize_t size = data ? read(fd, data, (size_t)st.st_size) : -1;
    if (size < 0)
        r = error_set(err, -errno, "cannot read %s: %s", path, strerror(errno));
    else
        page_sum_bytes(data, (size_t)size, sum);
    if (r == 0 && strcmp(sum, wanted) != 0)
        r = error_set(err, -EBADMSG, "%s is not what was written (checksum)", path);
    free(data);
    if (fd >= 0)
        close(fd);
    return r;
}

static int read_state(const struct stored_snapshot *snapshot, const struct chunk_secret *secret, struct snapshot_state *state, struct error *err)
{
    char path[PATH_BYTES];
    const struct snapshot_files files = {.state = path, .secret = secret};
    snprintf(path, sizeof path, "%s/state", snapshot->path);
    int r = machine_snapshot_check_state(&files, state, err);
    const char *wanted = sum_of(snapshot, "state_xxh3");
    if (r == 0 && wanted)
        r = check_state_sum(path, wanted, err);
    if (r == 0 && !has_id(&state->id, snapshot->id))
        r = error_set(err, -EBADMSG, "%s is another snapshot's", path);
    return r;
}

enum check_result snapshot_check_state(const struct stored_snapshot *snapshot, const struct chunk_secret *secret, char *text)
{
    struct snapshot_state state;
    struct error err = {0};
    int r = read_state(snapshot, secret, &state, &err);
    return r ? failed(r, text, &err) : say(CHECK_SOUND, text, "");
}

/* ---- memory ---- */

static int check_chunks(const struct stored_snapshot *snapshot, struct chunk_reader *reader, const char *path, struct error *err)
{
    const struct chunk_info *info = chunk_reader_info(reader);
    uint8_t *data = malloc(CHUNK_BYTES);
    int r = data ? 0 : error_set(err, -ENOMEM, "out of memory");
    if (r == 0 && (!has_id(&info->id, snapshot->id) || info->layer != (snapshot->base_id[0] != '\0') || (info->layer && !has_id(&info->base, snapshot->base_id))))
        r = error_set(err, -EBADMSG, "%s is another snapshot's", path);
    for (uint64_t chunk = 0; r == 0 && chunk * CHUNK_BYTES < info->size_bytes; chunk++)
        r = chunk_reader_read(reader, chunk, chunk_reader_present(reader, chunk, NULL), data, err);
    free(data);
    return r;
}

static enum check_result check_raw(const struct stored_snapshot *snapshot, int fd, uint64_t size_bytes, const char *path, char *text)
{
    char sum[PAGE_SUM_TEXT_BYTES];
    struct error err = {0};
    const char *wanted = sum_of(snapshot, "memory_xxh3");
    if (snapshot->base_id[0])
        return say(CHECK_DAMAGED, text, "it is whole, and should have only what changed since the snapshot before");
    if (!wanted)
        return say(CHECK_UNKNOWN, text, "it has no checksum");
    int r = page_sum_file(fd, path, size_bytes, sum, &err);
    if (r == 0 && strcmp(sum, wanted) != 0)
        r = error_set(&err, -EBADMSG, "%s is not what was written (checksum)", path);
    return r ? failed(r, text, &err) : say(CHECK_SOUND, text, "");
}

enum check_result snapshot_check_memory(const struct stored_snapshot *snapshot, const struct chunk_secret *secret, char *text)
{
    char path[PATH_BYTES];
    struct chunk_reader *reader = NULL;
    struct snapshot_state state;
    struct error err = {0}, ignored = {0};
    struct stat st;
    enum check_result result;
    bool known = read_state(snapshot, secret, &state, &ignored) == 0; /* a damaged one is told elsewhere */
    snprintf(path, sizeof path, "%s/%s", snapshot->path, snapshot->memory);
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK), r = 0;
    if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode))
        r = error_set(&err, -EIO, "cannot read %s: %s", path, fd < 0 ? strerror(errno) : "it is no file");
    bool raw = r == 0 && !chunk_file_is(fd);
    if (r == 0 && !raw && (r = chunk_reader_open(&reader, fd, path, secret, CHUNK_FILE_BYTES_MAX, &err)) == 0)
        fd = -1; /* the reader's */
    uint64_t size = r ? 0 : raw ? (uint64_t)st.st_size : chunk_reader_info(reader)->size_bytes;
    if (r == 0 && known && size != state.ram_bytes)
        r = error_set(&err, -EBADMSG, "%s is of %llu bytes of memory, and the guest has %llu", path, (unsigned long long)size, (unsigned long long)state.ram_bytes);
    if (r == 0 && !raw)
        r = check_chunks(snapshot, reader, path, &err);
    if (r)
        result = failed(r, text, &err);
    else
        result = raw ? check_raw(snapshot, fd, size, path, text) : say(CHECK_SOUND, text, "");
    chunk_reader_close(reader);
    if (fd >= 0)
        close(fd);
    return result;
}

/* ---- disks ---- */

static enum check_result check_disk(const struct stored_snapshot *snapshot, const json_t *entry, char *text)
{
    struct block_image *image = NULL;
    struct error err = {0};
    unsigned images;
    int r = snapshot_disks_open(snapshot, entry, &image, &err);
    if (r == 0)
        r = block_image_check(image, &images, &err);
    block_image_close(image);
    return r ? failed(r, text, &err) : say(CHECK_SOUND, text, "");
}

/* ---- all of it ---- */

void snapshot_check(const struct stored_snapshot *list, unsigned count, const struct stored_snapshot *snapshot, const struct chunk_secret *secret, const struct check_report *report)
{
    char text[CHECK_TEXT_BYTES], item[32];
    const json_t *entry;
    size_t i;
    report->item(report->ctx, snapshot->name, "snapshot.json", CHECK_SOUND, ""); /* it is in the list */
    enum check_result result = snapshot_check_state(snapshot, secret, text);
    report->item(report->ctx, snapshot->name, "state", result, text);
    result = snapshot_check_memory(snapshot, secret, text);
    report->item(report->ctx, snapshot->name, "memory", result, text);
    if (snapshot->base_id[0]) {
        bool there = snapshot_store_by_id(list, count, snapshot->base_id);
        snprintf(text, sizeof text, "the snapshot with the identifier %s is not there", snapshot->base_id);
        report->item(report->ctx, snapshot->name, "base", there ? CHECK_SOUND : CHECK_DAMAGED, there ? "" : text);
    }
    json_array_foreach(json_object_get(snapshot->meta, "disk_files"), i, entry)
    {
        snprintf(item, sizeof item, "disk%zu", i);
        result = check_disk(snapshot, entry, text);
        report->item(report->ctx, snapshot->name, item, result, text);
    }
}

void snapshot_check_rest(const char *vm, const struct stored_snapshot *list, unsigned count, const struct check_report *report)
{
    char path[STORE_PATH_BYTES];
    struct error err = {0};
    struct stat st;
    json_t *map = NULL;
    int dir = snapshot_store_open(vm, &err), r = dir < 0 ? dir : 0;
    DIR *entries = r == 0 ? fdopendir(dir) : NULL;
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        struct stored_snapshot snapshot;
        if (!instance_name_valid(entry->d_name) || fstatat(dir, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) || !S_ISDIR(st.st_mode) || snapshot_store_by_name(list, count, entry->d_name))
            continue;
        if (stored_snapshot_read(dir, vm, entry->d_name, &snapshot))
            stored_snapshot_clear(&snapshot); /* of clones, and passed */
        else
            report->item(report->ctx, entry->d_name, "snapshot.json", CHECK_DAMAGED, "it is missing, damaged or of a later version");
    }
    if (entries)
        closedir(entries);
    if (r == 0)
        r = snapshot_store_directory(vm, path, &err);
    if (r == 0)
        r = snapshot_disks_map(path, &map, &err);
    if (r || json_object_size(map))
        report->item(report->ctx, "", "map of disks", r ? CHECK_DAMAGED : CHECK_SOUND, r ? err.text : "");
    json_decref(map);
}
