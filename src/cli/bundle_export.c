/*
 * doppel export: a virtual machine in one file (docs/bundles.md): configuration, kernel, disks; of a snapshot also the state, and what the snapshot needs.
 * Images are locked as a reader's, as long as they are read: what a running machine writes to cannot be exported. Those that lie upon others are copied into one first. Single-threaded.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cli/archive_files.h"
#include "cli/report.h"
#include "cli/snapshot.h"
#include "control/bundle.h"
#include "control/image_reader.h"
#include "control/snapshot_disks.h"
#include "doppel/doppel.h"

#define ZSTD_LEVEL_DEFAULT "3"
#define ZSTD_LEVEL_MAX 19ul
#define FLATTEN_BYTES (1u << 20)

struct export {
    const char *path; /* the bundle */
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

/* ---- images ---- */

/* What a disk's image is now: of a snapshot, or of a machine that had some, another file than the user named. */
struct source {
    char *path;
    const char *format;
    enum block_backing backing;
};

static int source_of_snapshot(const struct export *export, const struct bundle_file *file, struct source *source)
{
    size_t i;
    const json_t *entry;
    json_array_foreach(json_object_get(export->snapshot->meta, "disk_files"), i, entry) {
        const char *origin = json_string_value(json_object_get(entry, "origin")), *path = json_string_value(json_object_get(entry, "file"));
        const char *format = json_string_value(json_object_get(entry, "format"));
        if (!origin || strcmp(origin, file->path) != 0 || !path || !format)
            continue;
        *source = (struct source){strdup(path), strcmp(format, "raw") == 0 ? "raw" : "qcow2", BLOCK_BACKING_ANY};
        return source->path ? 0 : complain(STATUS_ERROR, "out of memory");
    }
    return complain(STATUS_ERROR, "%s/%s has no copy of %s, which its guest can write to: export the machine %s itself, when it has ended", export->vm, export->snapshot->name,
                    file->path, export->vm);
}

static int source_of_machine(const struct export *export, const struct bundle_file *file, struct source *source)
{
    char directory[STORE_PATH_BYTES];
    struct machine_config config;
    struct error err = {0};
    machine_config_init(&config);
    config.disk[0].path = strdup(file->path);
    config.disk_count = 1;
    int r = !config.disk[0].path || snapshot_store_directory(export->vm, directory, &err) || snapshot_disks_apply(directory, &config, &err)
                ? complain(STATUS_ERROR, "%s", err.text[0] ? err.text : "out of memory")
                : 0;
    if (r == 0) {
        *source = (struct source){strdup(config.disk[0].path), file->format, file->backing};
        if (config.disk[0].origin) { /* an overlay */
            source->format = "qcow2";
            source->backing = BLOCK_BACKING_ANY;
        }
        r = source->path ? 0 : complain(STATUS_ERROR, "out of memory");
    }
    machine_config_clear(&config);
    return r;
}

/* A file without a name that is as large as the images may be: beside the bundle. */
static int open_nameless(const char *beside)
{
    char directory[STORE_PATH_BYTES], draft[STORE_PATH_BYTES + 32];
    const char *slash = strrchr(beside, '/'), *temporary = getenv("TMPDIR");
    if (strcmp(beside, "-") == 0)
        snprintf(directory, sizeof directory, "%s", temporary && *temporary ? temporary : "/var/tmp");
    else
        snprintf(directory, sizeof directory, "%.*s", slash ? (int)(slash - beside + 1) : 1, slash ? beside : ".");
    int fd = open(directory, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd >= 0)
        return fd;
    snprintf(draft, sizeof draft, "%s/.doppel-XXXXXX", directory);
    fd = mkostemp(draft, O_CLOEXEC);
    if (fd >= 0)
        unlink(draft);
    return fd;
}

/* All that an image and those below it say, as one raw image. A descriptor, or -1 after a message. */
static int flatten(const struct source *source, const char *beside)
{
    struct image_reader *reader;
    struct error err = {0};
    uint8_t *block = malloc(FLATTEN_BYTES);
    int fd = block ? open_nameless(beside) : -1;
    if (fd < 0 || image_reader_open(&reader, source->path, source->format, source->backing, &err)) {
        complain(0, "%s", fd < 0 ? "cannot make a copy of a disk: there is no place for it" : err.text);
        if (fd >= 0)
            close(fd);
        free(block);
        return -1;
    }
    uint64_t size = image_reader_size(reader);
    int r = ftruncate(fd, (off_t)size) ? -errno : 0;
    for (uint64_t at = 0; r == 0 && at < size; at += FLATTEN_BYTES) {
        size_t bytes = size - at < FLATTEN_BYTES ? (size_t)(size - at) : FLATTEN_BYTES;
        r = image_reader_read(reader, block, bytes, at);
        if (r == 0)
            r = archive_write_sparse(fd, block, bytes, at);
    }
    if (r)
        complain(0, "cannot make a copy of %s: %s", source->path, strerror(-r));
    image_reader_close(reader);
    free(block);
    if (r == 0)
        return fd;
    close(fd);
    return -1;
}

/* A descriptor of what goes into the bundle, or -1 after a message. */
static int open_image(struct export *export, unsigned i)
{
    struct bundle_file *file = &export->bundle.file[i];
    struct source source = {0};
    struct error err = {0};
    bool overlaid = strncmp(file->name, "disk", 4) == 0 && !file->readonly, whole = true;
    if (export->snapshot && !file->readonly ? source_of_snapshot(export, file, &source) : overlaid && source_of_machine(export, file, &source))
        return -1;
    if (!source.path)
        source = (struct source){strdup(file->path), file->format, file->backing};
    int fd = source.path ? open(source.path, O_RDONLY | O_NONBLOCK | O_CLOEXEC) : -1;
    if (fd < 0)
        complain(0, "cannot read %s: %s", file->path, strerror(errno));
    else
        whole = strcmp(source.format, "raw") == 0 || !bundle_needs_others(fd);
    /* The configuration tells the format of the disk's own file; what is frozen in a snapshot has to have the size of the disk. */
    bool frozen = export->snapshot && !file->readonly;
    if (fd >= 0 && (!whole || strcmp(source.format, file->format) != 0 || (frozen && strcmp(file->format, "raw") != 0))) {
        close(fd);
        fd = flatten(&source, export->path);
        if (fd >= 0 && strcmp(file->format, "raw") != 0 && bundle_make_raw(&export->bundle, i, &err)) {
            complain(0, "%s", err.text);
            close(fd);
            fd = -1;
        }
    } else if (fd >= 0 && lock_image(fd, source.path)) {
        close(fd);
        fd = -1;
    }
    free(source.path);
    return fd;
}

static int open_file(struct export *export, unsigned i)
{
    const struct bundle_file *file = &export->bundle.file[i];
    int fd = export->fd[i] = file->image ? open_image(export, i) : open(file->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 && file->image)
        return STATUS_ERROR;
    if (fd < 0 || fstat(fd, &export->st[i]))
        return complain(STATUS_ERROR, "cannot read %s: %s", file->path, strerror(errno));
    off_t end = lseek(fd, 0, SEEK_END); /* a block device's, too */
    if ((!S_ISREG(export->st[i].st_mode) && !S_ISBLK(export->st[i].st_mode)) || end < 0)
        return complain(STATUS_ERROR, "%s is neither a file nor a block device", file->path);
    export->size[i] = (uint64_t)end;
    return 0;
}

/* Names of the disks that the snapshot froze, in its order. */
static int describe_disks(const struct export *export, json_t *names)
{
    size_t index;
    const json_t *entry;
    json_array_foreach(json_object_get(export->snapshot ? export->snapshot->meta : NULL, "disk_files"), index, entry) {
        const char *origin = json_string_value(json_object_get(entry, "origin"));
        unsigned i = 0;
        while (i < export->bundle.file_count && (!origin || strcmp(origin, export->bundle.file[i].path) != 0))
            i++;
        if (i == export->bundle.file_count)
            return complain(STATUS_ERROR, "%s/%s: %s was plugged later and is no part of the machine's configuration", export->vm, export->snapshot->name, origin ? origin : "a disk");
        json_array_append_new(names, json_string(export->bundle.file[i].name));
    }
    return 0;
}

/* bundle.json: what it is, with sizes and sums of the files that follow. */
static int put_description(struct export *export, struct archive *out)
{
    char sum[ARCHIVE_SUM_BYTES];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    json_t *files = json_array(), *disks = json_array();
    json_t *root = json_pack("{s:i, s:s, s:s, s:I, s:s, s:O, s:o, s:o}", "format", 1, "name", export->vm, "version", doppel_version(), "created_ms",
                             (json_int_t)now.tv_sec * 1000 + now.tv_nsec / 1000000, "snapshot", export->snapshot ? export->snapshot->name : "", "config", export->bundle.config, "files",
                             files, "disk_files", disks);
    int r = root ? describe_disks(export, disks) : complain(STATUS_ERROR, "out of memory");
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
    if (standard && report_is_json())
        return complain(STATUS_USAGE, "export: standard output has either the bundle or --json");
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
    if (archive_library_load())
        return STATUS_ERROR;
    for (unsigned i = 0; i < BUNDLE_FILES_MAX; i++)
        export.fd[i] = -1;
    export.path = arguments.names[1];
    r = find(&export, arguments.names[0]);
    for (unsigned i = 0; r == 0 && i < export.bundle.file_count; i++)
        r = open_file(&export, i);
    if (r == 0)
        r = write_bundle(&export, arguments.names[1], arguments.value[EXPORT_COMPRESS]);
    if (r == 0 && export.bundle.left[0])
        complain(0, "left out, because it is this host's: %s", export.bundle.left);
    if (r == 0 && report_is_json())
        report_file(arguments.names[1], json_pack("{s:s, s:s?, s:s}", "name", export.vm, "snapshot", export.snapshot ? export.snapshot->name : NULL, "left_out", export.bundle.left));
    for (unsigned i = 0; i < BUNDLE_FILES_MAX; i++)
        if (export.fd[i] >= 0)
            close(export.fd[i]);
    bundle_clear(&export.bundle);
    snapshot_store_free(export.list, export.count);
    if (export.lock >= 0)
        close(export.lock);
    return r;
}
