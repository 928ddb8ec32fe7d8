/*
 * doppel import: what another host's machine needs becomes a directory here (machine_directory.h): from a bundle (docs/bundles.md), or from an appliance in the Open Virtualization Format
 * (ovf_import.c). All of it is foreign: names and options are checked, contents held against their sums, and nothing counts before all of it is there. Single-threaded.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/archive_files.h"
#include "cli/import.h"
#include "cli/report.h"
#include "cli/snapshot.h"
#include "control/bundle.h"

#define BLOCK_BYTES (256u << 10)
#define META_BYTES_MAX (256u << 10)

struct bundle_import {
    const struct import *import;
    json_t *root; /* bundle.json */
    struct bundle bundle;
    bool taken[BUNDLE_FILES_MAX];
    struct machine_directory directory;
    json_t *changes, *changes_last; /* of snapshots that come along, of the last of them; NULL: the machine is not complete yet */
    struct snapshot_import *snapshots;
};

static int bad(const struct import *import, const char *what)
{
    return complain(STATUS_ERROR, "%s is no bundle: %s", import->path, what);
}

static int read_description(struct bundle_import *bundle, struct archive *in)
{
    const struct import *import = bundle->import;
    struct error err = {0};
    char *text = malloc(META_BYTES_MAX);
    la_ssize_t n = text ? archive_read_data(in, text, META_BYTES_MAX) : -1;
    bundle->root = n > 0 && n < (la_ssize_t)META_BYTES_MAX ? json_loadb(text, (size_t)n, JSON_REJECT_DUPLICATES, NULL) : NULL;
    free(text);
    const char *name = import->name ? import->name : json_string_value(json_object_get(bundle->root, "name"));
    if (json_integer_value(json_object_get(bundle->root, "format")) != 1)
        return bad(import, json_is_integer(json_object_get(bundle->root, "format")) ? "it has a format that this version does not know" : "its description is damaged");
    if (!name || !instance_name_valid(name))
        return bad(import, "it names no machine; give a name");
    if (bundle_check(&bundle->bundle, json_object_get(bundle->root, "config"), &err))
        return bad(import, err.text);
    return machine_directory_begin(&bundle->directory, name, import->directory);
}

/* What bundle.json says of a file. */
static const json_t *described(const struct bundle_import *bundle, const char *name)
{
    size_t index;
    const json_t *file;
    json_array_foreach(json_object_get(bundle->root, "files"), index, file) {
        const char *there = json_string_value(json_object_get(file, "name"));
        if (there && strcmp(there, name) == 0)
            return file;
    }
    return NULL;
}

static int take_file(struct bundle_import *bundle, struct archive *in, struct archive_entry *entry, const char *name)
{
    const struct bundle_file *file = bundle_find(&bundle->bundle, name);
    const json_t *said = described(bundle, name);
    const char *wanted = json_string_value(json_object_get(said, "xxh3"));
    char sum[ARCHIVE_SUM_BYTES];
    if (!file || bundle->changes || bundle->taken[file - bundle->bundle.file])
        return bad(bundle->import, "an entry that does not belong there");
    if (!wanted || json_integer_value(json_object_get(said, "bytes")) != archive_entry_size(entry))
        return bad(bundle->import, "a file has another size than its description says");
    int fd = archive_take_file(in, entry, bundle->directory.fd, name, bundle->import->path, bundle->import->progress);
    if (fd < 0)
        return STATUS_ERROR;
    int r = archive_sum(fd, (uint64_t)archive_entry_size(entry), name, sum, NULL);
    if (r == 0 && strcmp(sum, wanted) != 0)
        r = complain(STATUS_ERROR, "%s is damaged: %s is not what was exported", bundle->import->path, name);
    if (r == 0 && file->image && strcmp(file->format, "raw") != 0 && bundle_needs_others(fd))
        r = complain(STATUS_ERROR, "%s: the image %s needs another file", bundle->import->path, name);
    close(fd);
    bundle->taken[file - bundle->bundle.file] = true;
    return r;
}

/* The disks of the snapshot that the bundle is of are frozen here; those that it needs have none. */
static int describe_disks(struct bundle_import *bundle)
{
    const json_t *name;
    json_t *frozen = json_array();
    size_t i;
    json_array_foreach(json_object_get(bundle->root, "disk_files"), i, name) {
        const struct bundle_file *file = json_is_string(name) ? bundle_find(&bundle->bundle, json_string_value(name)) : NULL;
        json_int_t bytes = file ? json_integer_value(json_object_get(described(bundle, file->name), "bytes")) : 0;
        if (!file || !file->image || file->readonly || strcmp(file->format, "raw") != 0 || bytes % 512) {
            json_decref(frozen);
            return bad(bundle->import, "its snapshot has disks that are not among its disks");
        }
        char path[STORE_PATH_BYTES + BUNDLE_NAME_BYTES];
        snprintf(path, sizeof path, "%s/%s", bundle->directory.path, file->name);
        json_array_append_new(frozen, json_pack("{s:s, s:s, s:s, s:I}", "origin", path, "file", path, "format", file->format, "size_bytes", bytes));
    }
    bool any = json_array_size(frozen);
    json_object_set_new(bundle->changes, "without_disks", json_boolean(any));
    json_object_set_new(bundle->changes, "disk_files", json_array());
    json_object_set_new(bundle->changes_last, "disk_files", frozen);
    json_object_set_new(bundle->changes_last, "without_disks", json_false());
    return 0;
}

/* The machine is complete. Snapshots that follow are its. */
static int finish_machine(struct bundle_import *bundle)
{
    for (unsigned i = 0; i < bundle->bundle.file_count || !bundle->root; i++)
        if (!bundle->root || !bundle->taken[i])
            return bad(bundle->import, "files are missing");
    json_t *placed = bundle_place(&bundle->bundle, bundle->directory.path);
    if (!placed)
        return complain(STATUS_ERROR, "out of memory");
    int r = machine_directory_commit(&bundle->directory, placed);
    bundle->changes = json_pack("{s:[s,o], s:s, s:o}", "arguments", "--config", json_sprintf("%s/machine.json", bundle->directory.path), "directory", bundle->directory.path, "files",
                                bundle_paths(placed));
    json_decref(placed);
    bundle->changes_last = json_deep_copy(bundle->changes);
    if (r == 0 && !bundle->changes_last)
        return complain(STATUS_ERROR, "out of memory");
    return r ? r : describe_disks(bundle);
}

/* Its snapshot's name, "" without one. */
static const char *snapshot_of(const struct bundle_import *bundle)
{
    const char *name = json_string_value(json_object_get(bundle->root, "snapshot"));
    return name ? name : "";
}

static int take_entry(struct bundle_import *bundle, struct archive *in, struct archive_entry *entry)
{
    static const char prefix[] = ".bundle/";
    const char *path = archive_entry_pathname(entry);
    if (!path || archive_entry_filetype(entry) != AE_IFREG || archive_entry_hardlink(entry) || !archive_entry_size_is_set(entry) || archive_entry_size(entry) < 0)
        return bad(bundle->import, "an entry that does not belong there");
    if (strcmp(path, IMPORT_BUNDLE_FIRST) == 0)
        return bundle->root ? bad(bundle->import, "two descriptions") : read_description(bundle, in);
    if (strncmp(path, prefix, sizeof prefix - 1) == 0)
        return take_file(bundle, in, entry, path + sizeof prefix - 1);
    int r = bundle->changes ? 0 : finish_machine(bundle);
    if (r == 0 && !bundle->snapshots)
        bundle->snapshots = snapshot_import_begin(in, bundle->import->path, bundle->import->name ? bundle->import->name : json_string_value(json_object_get(bundle->root, "name")),
                                                  snapshot_of(bundle), bundle->changes, bundle->changes_last);
    if (r == 0 && !bundle->snapshots)
        r = complain(STATUS_ERROR, "out of memory");
    return r ? r : snapshot_import_entry(bundle->snapshots, entry);
}

static int import_bundle(const struct import *import, struct archive *in, struct archive_entry *entry)
{
    struct bundle_import bundle = {.import = import, .directory.fd = -1};
    unsigned count = 0;
    int r, code = ARCHIVE_OK;
    do
        r = take_entry(&bundle, in, entry);
    while (r == 0 && (code = archive_read_next_header(in, &entry)) == ARCHIVE_OK);
    if (r == 0 && code != ARCHIVE_EOF)
        r = complain(STATUS_ERROR, "cannot read %s: %s", import->path, archive_error_string(in));
    if (r == 0 && snapshot_of(&bundle)[0] && !bundle.snapshots)
        r = bad(import, "the snapshot is missing");
    if (r == 0 && !bundle.changes)
        r = finish_machine(&bundle);
    if (bundle.snapshots) {
        int end = snapshot_import_end(bundle.snapshots, r == 0, &count);
        r = r ? r : end;
    }
    machine_directory_end(&bundle.directory, r == 0 || count);
    bundle_clear(&bundle.bundle);
    json_decref(bundle.changes);
    json_decref(bundle.changes_last);
    json_decref(bundle.root);
    return r;
}

/* By what is in it. */
static int import_archive(const struct import *import)
{
    struct archive *in = archive_read_new();
    struct archive_entry *entry;
    struct stat st;
    if (!in)
        return complain(STATUS_ERROR, "out of memory");
    archive_read_support_format_tar(in);
    archive_read_support_filter_zstd(in);
    archive_progress_begin(import->progress, import->path, stat(import->path, &st) == 0 ? (uint64_t)st.st_size : 0);
    int r;
    if (archive_read_open_filename(in, strcmp(import->path, "-") == 0 ? NULL : import->path, BLOCK_BYTES) != ARCHIVE_OK || archive_read_next_header(in, &entry) != ARCHIVE_OK)
        r = complain(STATUS_ERROR, "cannot read %s: %s", import->path, archive_error_string(in) ? archive_error_string(in) : "there is nothing in it");
    else if (archive_entry_pathname(entry) && strcmp(archive_entry_pathname(entry), IMPORT_BUNDLE_FIRST) == 0)
        r = import_bundle(import, in, entry);
    else if (import_is_ovf(archive_entry_pathname(entry)))
        r = import_ova(import, in, entry);
    else
        r = complain(STATUS_ERROR, "%s is neither a bundle nor an OVF appliance; doppel snapshot import reads exported snapshots", import->path);
    archive_progress_end(import->progress);
    archive_read_free(in);
    return r;
}

int import_main(int argc, char **argv)
{
    struct arguments arguments;
    struct archive_progress progress = {0};
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    if (!arguments.name_count || arguments.name_count > 2)
        return complain(STATUS_USAGE, "import: usage: doppel import [OPTIONS] FILE|- [NAME]");
    const struct import import = {.path = arguments.names[0], .name = arguments.name_count > 1 ? arguments.names[1] : NULL, .directory = arguments.value[IMPORT_DIRECTORY],
                                  .progress = &progress};
    if (import.name && !instance_name_valid(import.name))
        return complain(STATUS_USAGE, "import: \"%s\" is no name for a virtual machine", import.name);
    if (archive_library_load())
        return STATUS_ERROR;
    report_list();
    if (import_is_ovf(import.path))
        return import_ovf(&import);
    return import_is_image(import.path) ? import_image(&import) : import_archive(&import);
}
