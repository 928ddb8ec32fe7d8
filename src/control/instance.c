/*
 * One's own place in the directory of virtual machines (instance.h): making it, writing into it, leaving it. A new directory is made as ".new-NAME", locked and
 * filled before it gets its name, all under the root's lock; one that was left half made is not locked and goes with the next VM.
 */
#include "control/instance.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/instance_priv.h"
#include "util/sandbox_rules.h"

/* Files of the machine's own directory (Landlock), and its removal at the end. */
SANDBOX_ALLOW(IN_API | IN_MAIN, openat);
SANDBOX_ALLOW(IN_API | IN_MAIN, newfstatat);
SANDBOX_ALLOW(IN_API, renameat);
SANDBOX_ALLOW(IN_API | IN_MAIN, unlinkat);
SANDBOX_ALLOW(IN_API | IN_MAIN, fcntl);
SANDBOX_ALLOW(IN_MAIN, flock);
SANDBOX_ALLOW(IN_API | IN_MAIN, lseek);
SANDBOX_ALLOW(IN_API | IN_MAIN, getdents64);
SANDBOX_ALLOW(IN_MAIN, geteuid);

#define NEW_PREFIX ".new-"
#define BACKLOG 128
#define PASSES_MAX 8

struct instance {
    char name[INSTANCE_NAME_BYTES];
    char path[INSTANCE_PATH_BYTES];
    int root, dir, lock;
};

bool instance_name_valid(const char *name)
{
    size_t length = strlen(name);
    if (length == 0 || length >= INSTANCE_NAME_BYTES || !isalnum((unsigned char)name[0]))
        return false;
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c >= 0x80 || !(isalnum((unsigned char)*c) || strchr("-_.", *c)))
            return false;
    return true;
}

/* ---- the root ---- */

static bool is_own_directory(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == geteuid();
}

static void root_path(char path[INSTANCE_PATH_BYTES])
{
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    if (runtime && runtime[0] == '/' && is_own_directory(runtime) && strlen(runtime) < INSTANCE_PATH_BYTES - 2 * INSTANCE_NAME_BYTES)
        snprintf(path, INSTANCE_PATH_BYTES, "%s/doppel", runtime);
    else if (geteuid() == 0 && access("/run", W_OK) == 0)
        snprintf(path, INSTANCE_PATH_BYTES, "/run/doppel");
    else
        snprintf(path, INSTANCE_PATH_BYTES, "/tmp/doppel-%u", (unsigned)geteuid());
}

/* Whoever may write there could put links in our way. */
static int check_root(int root, const char *path, struct error *err)
{
    struct stat st;
    if (fstat(root, &st))
        return error_set(err, -errno, "cannot look at %s: %s", path, strerror(errno));
    if (st.st_uid != geteuid())
        return error_set(err, -EPERM, "%s belongs to another user; set XDG_RUNTIME_DIR to a directory of your own", path);
    if ((st.st_mode & 0077) && fchmod(root, 0700))
        return error_set(err, -errno, "cannot make %s private: %s", path, strerror(errno));
    return 0;
}

int instance_root_open(struct error *err)
{
    char path[INSTANCE_PATH_BYTES];
    root_path(path);
    if (mkdir(path, 0700) && errno != EEXIST)
        return error_set(err, -errno, "cannot make the directory %s: %s", path, strerror(errno));
    int root = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (root < 0)
        return error_set(err, -errno, "cannot use the directory %s: %s", path, errno == ELOOP || errno == ENOTDIR ? "it is a link or a file" : strerror(errno));
    int r = check_root(root, path, err);
    if (r)
        close(root);
    return r ? r : root;
}

int instance_root(char path[INSTANCE_PATH_BYTES], struct error *err)
{
    int root = instance_root_open(err);
    if (root < 0)
        return root;
    close(root);
    root_path(path);
    return 0;
}

int instance_root_lock(int root, struct error *err)
{
    int fd = openat(root, ".lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
    while (fd >= 0 && flock(fd, LOCK_EX)) {
        if (errno != EINTR) {
            close(fd);
            fd = -1;
        }
    }
    return fd >= 0 ? fd : error_set(err, -errno, "cannot lock the directory of virtual machines: %s", strerror(errno));
}

/* ---- directories ---- */

int instance_dir_open(int root, const char *name)
{
    struct stat st;
    int dir = openat(root, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir < 0)
        return -errno;
    if (fstat(dir, &st) == 0 && st.st_uid == geteuid())
        return dir;
    close(dir);
    return -EPERM;
}

bool instance_dir_alive(int dir)
{
    struct stat st;
    int fd = openat(dir, "lock", O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return false;
    bool alive = fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && flock(fd, LOCK_SH | LOCK_NB) && errno == EWOULDBLOCK;
    close(fd);
    return alive;
}

int instance_dir_remove(int root, const char *name)
{
    int dir = instance_dir_open(root, name);
    if (dir < 0) /* a link or a file: it goes itself */
        return unlinkat(root, name, 0) ? -errno : 0;
    DIR *entries = fdopendir(dir);
    if (!entries) {
        int code = -errno;
        close(dir);
        return code;
    }
    bool removed = true;
    for (unsigned pass = 0; removed && pass < PASSES_MAX; pass++, rewinddir(entries)) { /* what readdir shows of a directory that changes is not certain */
        removed = false;
        for (struct dirent *entry; (entry = readdir(entries));)
            if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 && unlinkat(dir, entry->d_name, 0) == 0)
                removed = true;
    }
    closedir(entries);
    return unlinkat(root, name, AT_REMOVEDIR) ? -errno : 0;
}

/* Of a machine that wanted nothing kept, and could not see to that itself. */
static bool is_leftover(int root, const char *name)
{
    int dir = instance_name_valid(name) ? instance_dir_open(root, name) : -1;
    bool leftover = dir >= 0 && faccessat(dir, "passing", F_OK, AT_SYMLINK_NOFOLLOW) == 0 && !instance_dir_alive(dir);
    if (dir >= 0)
        close(dir);
    return leftover;
}

/* And ".new-*" of a process that was killed while it made one: with the root's lock held there is nobody who makes one now. */
static void sweep(int root)
{
    int copy = openat(root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = copy >= 0 ? fdopendir(copy) : NULL;
    if (!entries && copy >= 0)
        close(copy);
    for (struct dirent *entry; entries && (entry = readdir(entries));)
        if (strncmp(entry->d_name, NEW_PREFIX, strlen(NEW_PREFIX)) == 0 || is_leftover(root, entry->d_name))
            instance_dir_remove(root, entry->d_name);
    if (entries)
        closedir(entries);
}

/* ---- names ---- */

static void make_up_name(char name[INSTANCE_NAME_BYTES])
{
    static const char consonants[] = "bdfgklmnprstvz", vowels[] = "aeiou";
    uint8_t random[6];
    if (getrandom(random, sizeof random, 0) != sizeof random)
        memset(random, getpid(), sizeof random);
    for (unsigned i = 0; i < 6; i++)
        name[i] = i % 2 ? vowels[random[i] % (sizeof vowels - 1)] : consonants[random[i] % (sizeof consonants - 1)];
    name[6] = '\0';
}

static bool exists(int root, const char *name)
{
    struct stat st;
    return fstatat(root, name, &st, AT_SYMLINK_NOFOLLOW) == 0;
}

static int take_name(struct instance *instance, const char *name, struct error *err)
{
    if (!name) {
        do
            make_up_name(instance->name);
        while (exists(instance->root, instance->name));
        return 0;
    }
    if (!instance_name_valid(name))
        return error_set(err, -EINVAL, "\"%s\" is no name for a virtual machine: use up to %d letters, digits, \"-\", \"_\" and \".\", beginning with a letter or digit", name,
                         INSTANCE_NAME_BYTES - 1);
    strcpy(instance->name, name);
    if (!exists(instance->root, name))
        return 0;
    int dir = instance_dir_open(instance->root, name);
    bool alive = dir >= 0 && instance_dir_alive(dir);
    if (dir >= 0)
        close(dir);
    if (alive)
        return error_set(err, -EEXIST, "a virtual machine named %s is there already; choose another name, or end it: doppel kill %s", name, name);
    int r = instance_dir_remove(instance->root, name);
    return r ? error_set(err, r, "cannot remove what the ended virtual machine %s left: %s", name, strerror(-r)) : 0;
}

/* ---- making one ---- */

static int fill(struct instance *instance, const char *draft, json_t *vm, struct error *err)
{
    if (mkdirat(instance->root, draft, 0700))
        return error_set(err, -errno, "cannot make a directory in %s: %s", instance->path, strerror(errno));
    instance->dir = instance_dir_open(instance->root, draft);
    if (instance->dir >= 0)
        instance->lock = openat(instance->dir, "lock", O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (instance->lock < 0 || flock(instance->lock, LOCK_EX | LOCK_NB))
        return error_set(err, -errno, "cannot lock the directory of %s: %s", instance->name, strerror(errno));
    json_object_set_new(vm, "name", json_string(instance->name));
    int r = instance_write(instance, "vm.json", vm);
    if (r == 0 && json_is_true(json_object_get(vm, "passing")))
        r = instance_write(instance, "passing", vm);
    if (r == 0 && renameat(instance->root, draft, instance->root, instance->name))
        r = -errno;
    return r ? error_set(err, r, "cannot write in the directory of %s: %s", instance->name, strerror(-r)) : 0;
}

static int create_locked(struct instance *instance, const char *name, json_t *vm, struct error *err)
{
    char draft[sizeof NEW_PREFIX + INSTANCE_NAME_BYTES];
    sweep(instance->root);
    int r = take_name(instance, name, err);
    if (r)
        return r;
    snprintf(draft, sizeof draft, NEW_PREFIX "%s", instance->name);
    r = fill(instance, draft, vm, err);
    if (r)
        instance_dir_remove(instance->root, draft);
    return r;
}

int instance_create(struct instance **out, const char *name, json_t *vm, struct error *err)
{
    struct instance *instance = calloc(1, sizeof *instance);
    if (!instance)
        return error_set(err, -ENOMEM, "out of memory");
    instance->dir = instance->lock = -1;
    root_path(instance->path);
    int r = instance->root = instance_root_open(err);
    int lock = r >= 0 ? instance_root_lock(instance->root, err) : r;
    r = lock < 0 ? lock : create_locked(instance, name, vm, err);
    if (lock >= 0)
        close(lock);
    if (r) {
        if (instance->lock >= 0)
            close(instance->lock);
        if (instance->dir >= 0)
            close(instance->dir);
        if (instance->root >= 0)
            close(instance->root);
        free(instance);
        return r;
    }
    size_t length = strlen(instance->path);
    snprintf(instance->path + length, sizeof instance->path - length, "/%s", instance->name);
    *out = instance;
    return 0;
}

const char *instance_name(const struct instance *instance)
{
    return instance->name;
}

const char *instance_path(const struct instance *instance)
{
    return instance->path;
}

int instance_dir(const struct instance *instance)
{
    return instance->dir;
}

int instance_write(const struct instance *instance, const char *file, const json_t *value)
{
    char draft[64];
    snprintf(draft, sizeof draft, ".%s.%d", file, (int)gettid()); /* threads may write the same file */
    char *text = json_dumps(value, JSON_COMPACT | JSON_PRESERVE_ORDER);
    if (!text)
        return -ENOMEM;
    size_t size = strlen(text);
    text[size++] = '\n'; /* in the place of the zero; at once: json_dumpfd writes each word by itself */
    int r = 0, fd = openat(instance->dir, draft, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        r = -errno;
    ssize_t n = r ? 0 : write(fd, text, size);
    if (r == 0 && n != (ssize_t)size)
        r = n < 0 ? -errno : -ENOSPC;
    free(text);
    if (fd < 0)
        return r;
    close(fd);
    if (r == 0 && renameat(instance->dir, draft, instance->dir, file))
        r = -errno;
    if (r)
        unlinkat(instance->dir, draft, 0);
    return r;
}

/* Through /proc, because the directory's path may be longer than a socket's may be. */
int instance_listen(const struct instance *instance, const char *file, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", instance->dir, file);
    unlinkat(instance->dir, file, 0); /* of the run before a restart: the directory is ours */
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && fchmod(fd, 0600) == 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, BACKLOG) == 0)
        return fd;
    int code = errno;
    if (fd >= 0)
        close(fd);
    return error_set(err, -code, "cannot listen on %s/%s: %s", instance->path, file, strerror(code));
}

bool instance_unwanted(const struct instance *instance)
{
    return exists(instance->dir, "unwanted");
}

void instance_close(struct instance *instance, bool keep)
{
    if (!instance)
        return;
    if (!keep) {
        int lock = instance_root_lock(instance->root, NULL);
        instance_dir_remove(instance->root, instance->name);
        if (lock >= 0)
            close(lock);
    }
    close(instance->lock);
    close(instance->dir);
    close(instance->root);
    free(instance);
}
