/*
 * doppel export: a virtual machine in one file (docs/bundles.md): configuration, kernel, disks; of a snapshot also the state, and what the snapshot needs.
 * Images are locked as a reader's, as long as they are read: what a running machine writes to cannot be exported. Single-threaded.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cli/archive_files.h"
#include "cli/snapshot.h"
#include "control/bundle.h"
#include "doppel/doppel.h"

#define ZSTD_LEVEL_DEFAULT "3"
#define ZSTD_LEVEL_MAX 19ul

struct export {
    char vm[STORE_NAME_BYTES];
    struct bundle bundle;
    int fd[BUNDLE_FILES_MAX]; /* of its files; -1: not open */
    struct stat st[BUNDLE_FILES_MAX];
    uint64_t size[BUNDLE_FILES_MAX];
    /* A snapshot's. */
    struct stored_snapshot *list;
    unsigned count;
    const struct stored_snapshot *snapshot; /* NULL: of the machine itself */
    int lock;
    struct archive_progress progress;
};

/* Without the options that are the command's own. */
static json_t *machine_arguments(const json_t *arguments)
{
    const struct subcommand *run = command_find("run");
    json_t *left = json_array();
    for (size_t i = 0; i < json_array_size(arguments);) {
        char *pair[] = {(char *)json_string_value(json_array_get(arguments, i)), (char *)json_string_value(json_array_get(arguments, i + 1)), NULL};
        struct arguments own = {0};
        int used = pair[0] && knows_option(run, pair[0]) ? take_option(run, pair, &own) : 0;
        if (!used)
            json_array_append(left, json_array_get(arguments, i));
        i += used ? (size_t)used : 1;
    }
    return left;
}

static int collect(struct export *export, const json_t *from)
{
    struct error err = {0};
    const json_t *given = json_object_get(from, "arguments");
    const char *directory = json_string_value(json_object_get(from, "directory"));
    if (!json_is_array(given) || !directory)
        return complain(STATUS_ERROR, "what %s was started with is not known", export->vm);
    json_t *arguments = machine_arguments(given);
    int r = bundle_collect(&export->bundle, arguments, directory, &err) ? complain(STATUS_ERROR, "%s: %s", export->vm, err.text) : 0;
    json_decref(arguments);
    return r;
}

/* VM or VM/SNAPSHOT. */
static int find(struct export *export, const char *what)
{
    const char *slash = strchr(what, '/');
    struct instance_info vm;
    struct error err = {0};
    if (!slash) {
        if (instance_find(what, &vm, &err))
            return complain(STATUS_ERROR, "%s", err.text);
        strcpy(export->vm, vm.name);
        int r = collect(export, vm.vm);
        instance_info_clear(&vm);
        return r;
    }
    snprintf(export->vm, sizeof export->vm, "%.*s", (int)(slash - what), what);
    if ((size_t)(slash - what) >= sizeof export->vm || !instance_name_valid(export->vm))
        return complain(STATUS_USAGE, "export: \"%s\" is neither VM nor VM/SNAPSHOT", what);
    export->lock = snapshot_store_lock(export->vm, false, &err);
    if (export->lock < 0 || snapshot_store_list(export->vm, &export->list, &export->count, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    export->snapshot = snapshot_store_by_name(export->list, export->count, slash + 1);
    if (!export->snapshot)
        return complain(STATUS_ERROR, "%s has no snapshot named %s", export->vm, slash + 1);
    return collect(export, export->snapshot->meta);
}

static int lock_image(int fd, const char *path)
{
    struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET};
    if (fcntl(fd, F_OFD_SETLK, &lock) == 0 || (errno != EAGAIN && errno != EACCES))
        return 0;
    return complain(STATUS_ERROR, "%s is in use by a running machine that may write to it: stop that one first", path);
}

static int open_file(struct export *export, unsigned i)
{
    const struct bundle_file *file = &export->bundle.file[i];
    struct error err = {0};
    if (export->snapshot && file->image && !file->readonly)
        return complain(STATUS_ERROR, "%s/%s has no copy of %s, which its guest can write to: export the machine %s itself, when it has ended", export->vm, export->snapshot->name,
                        file->path, export->vm);
    int fd = export->fd[i] = open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &export->st[i]))
        return complain(STATUS_ERROR, "cannot read %s: %s", file->path, strerror(errno));
    off_t end = lseek(fd, 0, SEEK_END); /* a block device's, too */
    if ((!S_ISREG(export->st[i].st_mode) && !S_ISBLK(export->st[i].st_mode)) || end < 0)
        return complain(STATUS_ERROR, "%s is neither a file nor a block device", file->path);
    export->size[i] = (uint64_t)end;
    if (file->image && bundle_check_image(fd, file->path, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    return file->image ? lock_image(fd, file->path) : 0;
}

/* bundle.json: what it is, with sizes and sums of the files that follow. */
static int put_description(struct export *export, struct archive *out)
{
    char sum[ARCHIVE_SUM_BYTES];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    json_t *files = json_array();
    json_t *root = json_pack("{s:i, s:s, s:s, s:I, s:s, s:O, s:o}", "format", 1, "name", export->vm, "version", doppel_version(), "created_ms",
                             (json_int_t)now.tv_sec * 1000 + now.tv_nsec / 1000000, "snapshot", export->snapshot ? export->snapshot->name : "", "config", export->bundle.config, "files",
                             files);
    int r = root ? 0 : complain(STATUS_ERROR, "out of memory");
    for (unsigned i = 0; r == 0 && i < export->bundle.file_count; i++) {
        r = archive_sum(export->fd[i], export->size[i], export->bundle.file[i].path, sum, &export->progress);
        if (r == 0)
            json_array_append_new(files, json_pack("{s:s, s:I, s:s}", "name", export->bundle.file[i].name, "bytes", (json_int_t)export->size[i], "xxh3", sum));
    }
    char *text = r ? NULL : json_dumps(root, JSON_INDENT(2));
    if (r == 0)
        r = text ? archive_put_text(out, text, ".bundle/bundle.json") : complain(STATUS_ERROR, "out of memory");
    free(text);
    json_decref(root);
    return r;
}

static int put_all(struct export *export, struct archive *out)
{
    char name[2 * BUNDLE_NAME_BYTES];
    uint64_t all = 0;
    for (unsigned i = 0; i < export->bundle.file_count; i++)
        all += 2 * export->size[i]; /* read for the sum, and again */
    archive_progress_begin(&export->progress, export->vm, all);
    int r = put_description(export, out);
    for (unsigned i = 0; r == 0 && i < export->bundle.file_count; i++) {
        snprintf(name, sizeof name, ".bundle/%s", export->bundle.file[i].name);
        r = archive_put_file(out, export->fd[i], export->size[i], export->st[i].st_mtime, name, export->bundle.file[i].path, &export->progress);
    }
    archive_progress_end(&export->progress);
    if (r == 0 && export->snapshot)
        r = snapshot_put(out, export->list, export->count, export->snapshot);
    return r;
}

/* zstd or zstd=LEVEL, as for snapshots. */
static int set_compression(struct archive *out, const char *text)
{
    unsigned long level = 0;
    const char *number = text && strncmp(text, "zstd=", 5) == 0 ? text + 5 : ZSTD_LEVEL_DEFAULT;
    if (!text)
        return 0;
    if ((strcmp(text, "zstd") != 0 && strncmp(text, "zstd=", 5) != 0) || number[0] == '0')
        return complain(STATUS_USAGE, "export: --compress: \"%s\" is not zstd or zstd=LEVEL, LEVEL from 1 to %lu", text, ZSTD_LEVEL_MAX);
    int r = parse_number("export", "--compress", number, ZSTD_LEVEL_MAX, &level);
    if (r == 0 && (archive_write_add_filter_zstd(out) != ARCHIVE_OK || archive_write_set_filter_option(out, "zstd", "compression-level", number) != ARCHIVE_OK))
        r = complain(STATUS_ERROR, "export: cannot compress: %s", archive_error_string(out));
    return r;
}

static int write_bundle(struct export *export, const char *path, const char *compress)
{
    char draft[STORE_PATH_BYTES];
    bool standard = strcmp(path, "-") == 0;
    if (standard && isatty(STDOUT_FILENO))
        return complain(STATUS_USAGE, "export: standard output is a terminal; give a file");
    if (snprintf(draft, sizeof draft, "%s.part", path) >= (int)sizeof draft)
        return complain(STATUS_USAGE, "the name %s is too long", path);
    struct archive *out = archive_write_new();
    if (out)
        archive_write_set_bytes_in_last_block(out, 1); /* also into pipes: zeroes after the end are no part of a compressed file */
    int r = out ? set_compression(out, compress) : complain(STATUS_ERROR, "out of memory");
    int fd = r ? -1 : standard ? STDOUT_FILENO : open(draft, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (r == 0 && fd < 0)
        r = complain(STATUS_ERROR, "cannot write %s: %s", draft, strerror(errno));
    if (r == 0 && (archive_write_set_format_pax_restricted(out) != ARCHIVE_OK || archive_write_open_fd(out, fd) != ARCHIVE_OK))
        r = complain(STATUS_ERROR, "cannot write %s: %s", path, archive_error_string(out));
    if (r == 0)
        r = put_all(export, out);
    if (r == 0 && archive_write_close(out) != ARCHIVE_OK)
        r = complain(STATUS_ERROR, "cannot write %s: %s", path, archive_error_string(out));
    archive_write_free(out);
    if (fd >= 0 && !standard) {
        if (r == 0 && (fsync(fd) || rename(draft, path)))
            r = complain(STATUS_ERROR, "cannot write %s: %s", path, strerror(errno));
        close(fd);
        if (r)
            unlink(draft);
    }
    return r;
}

int export_main(int argc, char **argv)
{
    struct arguments arguments;
    struct export export = {.lock = -1};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (arguments.name_count != 2)
        return complain(STATUS_USAGE, "export: usage: doppel export [OPTIONS] VM|VM/SNAPSHOT FILE|-");
    for (unsigned i = 0; i < BUNDLE_FILES_MAX; i++)
        export.fd[i] = -1;
    r = find(&export, arguments.names[0]);
    for (unsigned i = 0; r == 0 && i < export.bundle.file_count; i++)
        r = open_file(&export, i);
    if (r == 0)
        r = write_bundle(&export, arguments.names[1], arguments.value[EXPORT_COMPRESS]);
    if (r == 0 && export.bundle.left[0])
        fprintf(stderr, "doppel: left out, because it is this host's: %s\n", export.bundle.left);
    for (unsigned i = 0; i < BUNDLE_FILES_MAX; i++)
        if (export.fd[i] >= 0)
            close(export.fd[i]);
    bundle_clear(&export.bundle);
    snapshot_store_free(export.list, export.count);
    if (export.lock >= 0)
        close(export.lock);
    return r;
}
