/*
 * doppel import of appliances in the Open Virtualization Format: a descriptor with images beside it, or both in one tar file (.ova); and of images alone. They become raw ones by qemu-img,
 * where the host has it.
 * The machine's firmware is not imported: Doppel starts kernels, so the user has to name one. Single-threaded.
 */
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/archive_files.h"
#include "cli/import.h"
#include "control/bundle.h"
#include "control/ovf.h"
#include "util/gnutls_library.h"

#define MANIFEST_BYTES_MAX (64u << 10)
#define DIGEST_BYTES_MAX 64u
#define BLOCK_BYTES (256u << 10)
#define MEMORY_USUAL_BYTES (512ull << 20)

#define SOURCE ".source"

extern char **environ;

struct appliance {
    const struct import *import;
    struct ovf ovf;
    char *text, *manifest; /* NULL: none */
    size_t text_bytes;
    char file[OVF_TEXT_BYTES]; /* the descriptor's name */
    int source;                /* directory of the images: one in the draft, or the descriptor's; -1: none */
    bool unpacked;             /* it is the former, and is to go */
    char source_path[STORE_PATH_BYTES];
    bool taken[OVF_DISKS_MAX];
    struct machine_directory directory;
};

bool import_is_ovf(const char *path)
{
    size_t length = path ? strlen(path) : 0;
    return length > 4 && strcasecmp(path + length - 4, ".ovf") == 0;
}

static int bad(const struct appliance *appliance, const char *what)
{
    return complain(STATUS_ERROR, "%s cannot be imported: %s", appliance->import->path, what);
}

/* ---- the manifest ---- */

static int digest_file(int fd, gnutls_hash_hd_t hash)
{
    uint8_t *block = malloc(BLOCK_BYTES);
    ssize_t n = block ? 1 : -1;
    for (off_t at = 0; n > 0; at += n) {
        n = pread(fd, block, BLOCK_BYTES, at);
        if (n > 0)
            gnutls_hash(hash, block, (size_t)n);
    }
    free(block);
    return n < 0 ? -1 : 0;
}

/* Whether the file (or the descriptor) is what the manifest says. What is not used is not looked at. */
static int check_line(const struct appliance *appliance, const char *name, gnutls_digest_algorithm_t kind, const char *wanted)
{
    uint8_t digest[DIGEST_BYTES_MAX];
    char text[2 * DIGEST_BYTES_MAX + 1] = "";
    bool own = strcmp(name, appliance->file) == 0, used = own;
    for (unsigned i = 0; i < appliance->ovf.disk_count; i++)
        used = used || strcmp(name, appliance->ovf.disk[i].file) == 0;
    if (!used)
        return 0;
    gnutls_hash_hd_t hash = NULL;
    int fd = own ? -1 : openat(appliance->source, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC), r = 0;
    if (gnutls_hash_init(&hash, kind) || (!own && (fd < 0 || digest_file(fd, hash))))
        r = complain(STATUS_ERROR, "cannot read %s of %s", name, appliance->import->path);
    if (r == 0 && own)
        gnutls_hash(hash, appliance->text, appliance->text_bytes);
    if (hash)
        gnutls_hash_deinit(hash, digest);
    for (unsigned i = 0; r == 0 && i < gnutls_hash_get_len(kind); i++)
        snprintf(text + 2 * i, 3, "%02x", digest[i]);
    if (r == 0 && strcasecmp(text, wanted) != 0)
        r = complain(STATUS_ERROR, "%s is damaged: %s is not what its manifest says", appliance->import->path, name);
    if (fd >= 0)
        close(fd);
    return r;
}

/* Lines such as SHA256(disk.vmdk)= 1234 */
static int check_manifest(struct appliance *appliance)
{
    struct error err = {0};
    int r = appliance->manifest && library_load(&gnutls_library_file, &err) ? bad(appliance, err.text) : 0;
    for (char *rest = appliance->manifest, *line; r == 0 && rest && (line = strsep(&rest, "\n"));) {
        char *open = strchr(line, '('), *close = strrchr(line, ')'), *equals = close ? strchr(close, '=') : NULL;
        if (!open || !equals)
            continue;
        *open = *close = '\0';
        gnutls_digest_algorithm_t kind = strcmp(line, "SHA1") == 0     ? GNUTLS_DIG_SHA1
                                         : strcmp(line, "SHA256") == 0 ? GNUTLS_DIG_SHA256
                                         : strcmp(line, "SHA512") == 0 ? GNUTLS_DIG_SHA512
                                                                       : GNUTLS_DIG_UNKNOWN;
        char *wanted = equals + 1 + strspn(equals + 1, " \t");
        wanted[strcspn(wanted, " \t\r")] = '\0';
        r = kind != GNUTLS_DIG_UNKNOWN ? check_line(appliance, open + 1, kind, wanted) : bad(appliance, "its manifest has sums of an unknown kind");
    }
    return r;
}

/* ---- images ---- */

/* On a terminal it shows how far it is, on our standard error. */
static int run_convert(const char *format, const char *from, const char *to)
{
    char *argv[] = {"qemu-img", "convert", isatty(STDERR_FILENO) ? "-p" : "-q", "-f", (char *)format, "-O", "raw", "--", (char *)from, (char *)to, NULL};
    posix_spawn_file_actions_t actions;
    pid_t pid;
    int status, code = posix_spawn_file_actions_init(&actions);
    if (code == 0) {
        code = posix_spawn_file_actions_adddup2(&actions, STDERR_FILENO, STDOUT_FILENO);
        code = code ? code : posix_spawnp(&pid, argv[0], &actions, NULL, argv, environ);
        posix_spawn_file_actions_destroy(&actions);
    }
    if (code)
        return complain(STATUS_ERROR, "qemu-img, which reads such images, cannot be started: %s; it is in the package qemu-utils", strerror(code));
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return complain(STATUS_ERROR, "cannot wait for qemu-img: %s", strerror(errno));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : complain(STATUS_ERROR, "qemu-img could not convert %s", from);
}

static int convert(const struct appliance *appliance, unsigned i)
{
    const struct ovf_disk *disk = &appliance->ovf.disk[i];
    char from[STORE_PATH_BYTES + OVF_TEXT_BYTES], to[STORE_PATH_BYTES + 16];
    struct error err = {0};
    struct stat st;
    snprintf(from, sizeof from, "%s/%s", appliance->source_path, disk->file);
    snprintf(to, sizeof to, "%s/disk%u", appliance->directory.draft, i);
    int fd = open(from, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        if (fd >= 0)
            close(fd);
        return complain(STATUS_ERROR, "cannot read %s: %s", from, fd < 0 ? strerror(errno) : "it is no file");
    }
    const char *format = ovf_image_format(fd, disk->file, &err);
    if (format && strcmp(format, "qcow2") == 0 && bundle_needs_others(fd)) {
        error_set(&err, -EINVAL, "the image %s is refused: it needs another file", disk->file);
        format = NULL;
    }
    close(fd);
    return format ? run_convert(format, from, to) : complain(STATUS_ERROR, "%s: %s", appliance->import->path, err.text);
}

static int make_empty(const struct appliance *appliance, unsigned i)
{
    char name[16];
    snprintf(name, sizeof name, "disk%u", i);
    int fd = openat(appliance->directory.fd, name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    int r = fd < 0 || ftruncate(fd, (off_t)appliance->ovf.disk[i].capacity_bytes) ? complain(STATUS_ERROR, "cannot make %s: %s", name, strerror(errno)) : 0;
    if (fd >= 0)
        close(fd);
    return r;
}

/* ---- the machine ---- */

static json_t *make_config(const struct appliance *appliance)
{
    const struct ovf *ovf = &appliance->ovf;
    uint64_t memory = ovf->memory_bytes ? ovf->memory_bytes : MEMORY_USUAL_BYTES;
    json_t *disks = json_array(), *nets = json_array();
    struct bundle bundle = {.config = json_pack("{s:o, s:o, s:o, s:o}", "memory", json_sprintf("%lluK", (unsigned long long)memory >> 10), "cpus",
                                                json_sprintf("%u", ovf->cpus ? ovf->cpus : 1), "disk", disks, "net", nets)};
    for (unsigned i = 0; i < ovf->disk_count; i++)
        json_array_append_new(disks, json_sprintf("disk%u", i));
    for (unsigned i = 0; i < ovf->net_count; i++)
        json_array_append_new(nets, json_string("user"));
    if (!ovf->net_count)
        json_array_append_new(nets, json_string("none"));
    json_t *placed = bundle.config ? bundle_place(&bundle, appliance->directory.path) : NULL;
    bundle_clear(&bundle);
    return placed;
}

/* What was unpacked to be converted. */
static void drop_source(struct appliance *appliance)
{
    for (unsigned i = 0; i < appliance->ovf.disk_count; i++)
        if (appliance->taken[i])
            unlinkat(appliance->source, appliance->ovf.disk[i].file, 0);
    unlinkat(appliance->directory.fd, SOURCE, AT_REMOVEDIR);
    appliance->unpacked = false;
}

/* Everything is there. */
static int finish(struct appliance *appliance)
{
    archive_progress_end(appliance->import->progress);
    int r = check_manifest(appliance);
    for (unsigned i = 0; r == 0 && i < appliance->ovf.disk_count; i++)
        r = appliance->ovf.disk[i].file[0] ? convert(appliance, i) : make_empty(appliance, i);
    if (appliance->unpacked)
        drop_source(appliance);
    json_t *config = r ? NULL : make_config(appliance);
    if (r == 0)
        r = config ? machine_directory_commit(&appliance->directory, config) : complain(STATUS_ERROR, "out of memory");
    json_decref(config);
    if (r == 0)
        complain(0, "it started from its disk, which is not possible here: name a kernel with --kernel, or as \"kernel\" in that file%s",
                 appliance->ovf.others ? "; drives for removable media were left out" : "");
    return r;
}

/* A name for a machine out of one for people. */
static void make_name(const struct appliance *appliance, char name[STORE_NAME_BYTES])
{
    size_t n = 0;
    for (const char *c = appliance->ovf.name; *c && n < STORE_NAME_BYTES - 1; c++)
        if ((*c >= 'a' && *c <= 'z') || (*c >= 'A' && *c <= 'Z') || (*c >= '0' && *c <= '9') || (n && strchr("-_.", *c)))
            name[n++] = *c;
    name[n] = '\0';
    if (!n)
        strcpy(name, "imported");
}

static int begin(struct appliance *appliance)
{
    char name[STORE_NAME_BYTES];
    struct error err = {0};
    if (ovf_parse(&appliance->ovf, appliance->text, appliance->text_bytes, &err))
        return bad(appliance, err.text);
    make_name(appliance, name);
    return machine_directory_begin(&appliance->directory, appliance->import->name ? appliance->import->name : name, appliance->import->directory);
}

static int end(struct appliance *appliance, int r)
{
    if (appliance->unpacked)
        drop_source(appliance);
    machine_directory_end(&appliance->directory, r == 0);
    if (appliance->source >= 0)
        close(appliance->source);
    free(appliance->text);
    free(appliance->manifest);
    return r;
}

/* ---- in one file ---- */

static char *read_entry(struct archive *in, size_t most, size_t *bytes)
{
    char *text = malloc(most + 1);
    la_ssize_t n = text ? archive_read_data(in, text, most + 1) : -1;
    if (n < 0 || (size_t)n > most) {
        free(text);
        return NULL;
    }
    text[n] = '\0';
    *bytes = (size_t)n;
    return text;
}

static int take_entry(struct appliance *appliance, struct archive *in, struct archive_entry *entry)
{
    const char *name = archive_entry_pathname(entry);
    size_t length = name ? strlen(name) : 0, bytes;
    if (!name || archive_entry_filetype(entry) != AE_IFREG || archive_entry_hardlink(entry) || !archive_entry_size_is_set(entry) || archive_entry_size(entry) < 0)
        return bad(appliance, "an entry that does not belong there");
    if (length > 3 && strcasecmp(name + length - 3, ".mf") == 0 && !appliance->manifest) {
        appliance->manifest = read_entry(in, MANIFEST_BYTES_MAX, &bytes);
        return appliance->manifest ? 0 : bad(appliance, "its manifest cannot be read");
    }
    for (unsigned i = 0; i < appliance->ovf.disk_count; i++) {
        if (appliance->taken[i] || strcmp(appliance->ovf.disk[i].file, name) != 0)
            continue;
        int fd = archive_take_file(in, entry, appliance->source, name, appliance->import->path, appliance->import->progress);
        if (fd < 0)
            return STATUS_ERROR;
        close(fd);
        for (unsigned n = i; n < appliance->ovf.disk_count; n++) /* two disks may be of one image */
            appliance->taken[n] = appliance->taken[n] || strcmp(appliance->ovf.disk[n].file, name) == 0;
        return 0;
    }
    return 0; /* certificates, texts in other languages */
}

/* A directory for images as they come, whose names are not ours. */
static int open_source(struct appliance *appliance)
{
    snprintf(appliance->source_path, sizeof appliance->source_path, "%.*s/" SOURCE, (int)(sizeof appliance->source_path - sizeof SOURCE - 1), appliance->directory.draft);
    appliance->unpacked = mkdirat(appliance->directory.fd, SOURCE, 0700) == 0;
    appliance->source = openat(appliance->directory.fd, SOURCE, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return appliance->source >= 0 ? 0 : complain(STATUS_ERROR, "cannot make the directory %s: %s", appliance->source_path, strerror(errno));
}

int import_ova(const struct import *import, struct archive *in, struct archive_entry *entry)
{
    struct appliance appliance = {.import = import, .source = -1, .directory.fd = -1};
    int r = 0, code;
    snprintf(appliance.file, sizeof appliance.file, "%s", archive_entry_pathname(entry));
    appliance.text = read_entry(in, OVF_BYTES_MAX, &appliance.text_bytes);
    if (!appliance.text)
        return bad(&appliance, "its description cannot be read, or is too large");
    r = begin(&appliance);
    if (r == 0)
        r = open_source(&appliance);
    while (r == 0 && (code = archive_read_next_header(in, &entry)) != ARCHIVE_EOF)
        r = code == ARCHIVE_OK ? take_entry(&appliance, in, entry) : complain(STATUS_ERROR, "cannot read %s: %s", import->path, archive_error_string(in));
    for (unsigned i = 0; r == 0 && i < appliance.ovf.disk_count; i++)
        if (appliance.ovf.disk[i].file[0] && !appliance.taken[i])
            r = bad(&appliance, "files are missing");
    return end(&appliance, r ? r : finish(&appliance));
}

/* ---- files in a directory ---- */

static char *read_text(int directory, const char *name, size_t most, size_t *bytes)
{
    struct stat st;
    int fd = openat(directory, name, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    char *text = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && (uint64_t)st.st_size <= most ? calloc(1, (size_t)st.st_size + 1) : NULL;
    ssize_t n = text ? pread(fd, text, (size_t)st.st_size, 0) : -1;
    if (fd >= 0)
        close(fd);
    if (n < 0) {
        free(text);
        return NULL;
    }
    *bytes = (size_t)n;
    return text;
}

int import_ovf(const struct import *import)
{
    struct appliance appliance = {.import = import, .source = -1, .directory.fd = -1};
    const char *slash = strrchr(import->path, '/'), *name = slash ? slash + 1 : import->path;
    char *here = import->path[0] == '/' ? NULL : get_current_dir_name(), manifest[OVF_TEXT_BYTES];
    size_t bytes;
    int r = strlen(name) < sizeof appliance.file && snprintf(appliance.source_path, sizeof appliance.source_path, "%s%s%.*s", here ? here : "", here ? "/" : "",
                                                             (int)(name - import->path), import->path) < (int)sizeof appliance.source_path
                ? 0
                : complain(STATUS_USAGE, "the name %s is too long", import->path);
    free(here);
    appliance.source = r ? -1 : open(appliance.source_path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (r == 0 && appliance.source < 0)
        return complain(STATUS_ERROR, "cannot open %s: %s", appliance.source_path, strerror(errno));
    if (r == 0) {
        snprintf(appliance.file, sizeof appliance.file, "%s", name);
        snprintf(manifest, sizeof manifest, "%.*s.mf", (int)strlen(name) - 4, name);
        appliance.text = read_text(appliance.source, name, OVF_BYTES_MAX, &appliance.text_bytes);
        appliance.manifest = read_text(appliance.source, manifest, MANIFEST_BYTES_MAX, &bytes);
        r = appliance.text ? begin(&appliance) : complain(STATUS_ERROR, "cannot read %s: there is no such file, or it is too large", import->path);
    }
    return end(&appliance, r ? r : finish(&appliance));
}

/* ---- an image alone ---- */

bool import_is_image(const char *path)
{
    struct stat st;
    struct error err = {0};
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    bool is_file = fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
    const char *format = is_file ? ovf_image_format(fd, path, &err) : "raw";
    if (fd >= 0)
        close(fd);
    return !format || strcmp(format, "raw") != 0; /* one that is refused is an image, too */
}

int import_image(const struct import *import)
{
    struct appliance appliance = {.import = import, .source = -1, .directory.fd = -1, .ovf = {.disk_count = 1, .net_count = 1}};
    const char *slash = strrchr(import->path, '/'), *name = slash ? slash + 1 : import->path, *point = strrchr(name, '.');
    char *here = import->path[0] == '/' ? NULL : get_current_dir_name(), own[STORE_NAME_BYTES];
    bool fits = strlen(name) < OVF_TEXT_BYTES && snprintf(appliance.source_path, sizeof appliance.source_path, "%s%s%.*s", here ? here : "", here ? "/" : "",
                                                          (int)(name - import->path), import->path) < (int)sizeof appliance.source_path;
    free(here);
    if (!fits)
        return complain(STATUS_USAGE, "the name %s is too long", import->path);
    snprintf(appliance.ovf.name, sizeof appliance.ovf.name, "%.*s", point && point > name ? (int)(point - name) : (int)strlen(name), name);
    strcpy(appliance.ovf.disk[0].file, name);
    make_name(&appliance, own);
    int r = machine_directory_begin(&appliance.directory, import->name ? import->name : own, import->directory);
    return end(&appliance, r ? r : finish(&appliance));
}
