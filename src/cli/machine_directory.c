/* Directories of imported machines (machine_directory.h). */
#include "cli/machine_directory.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"
#include "machine/config.h"

static int usual_place(const char *name, char path[STORE_PATH_BYTES])
{
    struct error err = {0};
    if (snapshot_store_root(path, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    char *last = strrchr(path, '/'); /* machines are beside the snapshots */
    strcpy(last, "/machines");
    if (mkdir(path, 0700) && errno != EEXIST)
        return complain(STATUS_ERROR, "cannot make the directory %s: %s", path, strerror(errno));
    snprintf(last + strlen(last), STORE_PATH_BYTES - (size_t)(last - path) - strlen(last), "/%s", name);
    return 0;
}

#define DRAFT ".importing-"

/* What we put into it: files, and one directory with files. */
static void empty(int directory, bool deeper)
{
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), inner;
    DIR *entries = fd >= 0 ? fdopendir(fd) : NULL;
    for (struct dirent *entry; entries && (entry = readdir(entries));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 || unlinkat(directory, entry->d_name, 0) == 0)
            continue;
        inner = !deeper ? -1 : openat(directory, entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (inner < 0)
            continue;
        empty(inner, false);
        close(inner);
        unlinkat(directory, entry->d_name, AT_REMOVEDIR);
    }
    if (entries)
        closedir(entries);
}

/* The draft is locked as long as it is worked on; without a lock it is what a crash left. */
static int open_draft(struct machine_directory *directory)
{
    const char *slash = strrchr(directory->path, '/');
    struct stat ours, there;
    if (snprintf(directory->draft, sizeof directory->draft, "%.*s" DRAFT "%s", (int)(slash + 1 - directory->path), directory->path, slash + 1) >= (int)sizeof directory->draft)
        return complain(STATUS_USAGE, "the name %s is too long", directory->path);
    if (mkdir(directory->draft, 0700) && errno != EEXIST)
        return complain(STATUS_ERROR, "cannot make the directory %s: %s", directory->draft, strerror(errno));
    directory->fd = open(directory->draft, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (directory->fd < 0)
        return complain(STATUS_ERROR, "cannot open %s: %s", directory->draft, strerror(errno));
    if (flock(directory->fd, LOCK_EX | LOCK_NB) || fstat(directory->fd, &ours) || lstat(directory->draft, &there) || ours.st_ino != there.st_ino || ours.st_dev != there.st_dev) {
        close(directory->fd);
        directory->fd = -1;
        return complain(STATUS_ERROR, "%s is being imported by another command", directory->path);
    }
    empty(directory->fd, true);
    return 0;
}

int machine_directory_begin(struct machine_directory *directory, const char *name, const char *wanted)
{
    struct stat st;
    *directory = (struct machine_directory){.fd = -1};
    int r = wanted ? 0 : usual_place(name, directory->path);
    char *here = wanted && wanted[0] != '/' ? get_current_dir_name() : NULL;
    if (r == 0 && wanted && snprintf(directory->path, sizeof directory->path, "%s%s%s", here ? here : "", here ? "/" : "", wanted) >= (int)sizeof directory->path - 16)
        r = complain(STATUS_USAGE, "the name %s is too long", wanted);
    free(here);
    for (size_t n = strlen(directory->path); n > 1 && directory->path[n - 1] == '/'; n--)
        directory->path[n - 1] = '\0';
    if (r == 0 && lstat(directory->path, &st) == 0)
        r = complain(STATUS_ERROR, "%s is there already: remove it, or give another name or --directory", directory->path);
    return r ? r : open_draft(directory);
}

static int write_config(const struct machine_directory *directory, const json_t *config)
{
    char path[STORE_PATH_BYTES + 16];
    struct error err = {0};
    struct machine_config check;
    snprintf(path, sizeof path, "%s/machine.json", directory->draft);
    if (json_dump_file(config, path, JSON_INDENT(2)))
        return complain(STATUS_ERROR, "cannot write %s", path);
    machine_config_init(&check);
    int r = machine_config_load(&check, path, &err) ? complain(STATUS_ERROR, "%s", err.text) : 0;
    machine_config_clear(&check);
    return r;
}

int machine_directory_commit(struct machine_directory *directory, const json_t *config)
{
    char path[STORE_PATH_BYTES + 16];
    int r = write_config(directory, config);
    if (r)
        return r;
    if (syncfs(directory->fd) || renameat2(AT_FDCWD, directory->draft, AT_FDCWD, directory->path, RENAME_NOREPLACE))
        return complain(STATUS_ERROR, "cannot write %s: %s", directory->path, strerror(errno));
    strcpy(directory->draft, directory->path);
    snprintf(path, sizeof path, "%s/machine.json", directory->path);
    report(json_pack("{s:o, s:O}", "machine", report_text(path), "config", config), "%s", path);
    return 0;
}

void machine_directory_end(struct machine_directory *directory, bool keep)
{
    if (directory->fd >= 0 && !keep) {
        empty(directory->fd, true);
        rmdir(directory->draft);
    }
    if (directory->fd >= 0)
        close(directory->fd);
    directory->fd = -1;
}
