/* The virtual machines of this user, seen from outside (instance.h). Nothing here trusts what it reads. Stateless; any thread. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/instance_priv.h"
#include "util/loop.h"

#define RETRY_MS 20 /* between the end of a process and that of its lock, which another may hold for a moment more */

/* ---- files ---- */

/* Regular, this user's; no link. */
static int open_file(int dir, const char *file, int flags)
{
    struct stat st;
    int fd = openat(dir, file, flags | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600);
    if (fd < 0)
        return -errno;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_uid == geteuid())
        return fd;
    close(fd);
    return -EPERM;
}

static json_t *read_json(int dir, const char *file)
{
    struct stat st;
    json_t *value = NULL;
    char *text = NULL;
    int fd = open_file(dir, file, O_RDONLY);
    if (fd >= 0 && fstat(fd, &st) == 0 && st.st_size <= (off_t)INSTANCE_FILE_BYTES_MAX)
        text = malloc((size_t)st.st_size + 1);
    ssize_t size = text ? read(fd, text, (size_t)st.st_size) : -1; /* at once: json_loadfd reads by the byte */
    if (size >= 0)
        value = json_loadb(text, (size_t)size, JSON_REJECT_DUPLICATES, NULL);
    free(text);
    if (fd >= 0)
        close(fd);
    if (json_is_object(value))
        return value;
    json_decref(value);
    return json_object();
}

static struct process read_process(const json_t *status, const char *key)
{
    const json_t *object = json_object_get(status, key);
    json_int_t pid = json_integer_value(json_object_get(object, "pid")), start = json_integer_value(json_object_get(object, "start_time"));
    if (pid <= 1 || pid > INT32_MAX || start <= 0)
        return (struct process){0};
    return (struct process){.pid = (pid_t)pid, .start_time = (uint64_t)start};
}

static void read_info(int dir, const char *name, struct instance_info *info)
{
    snprintf(info->name, sizeof info->name, "%s", name);
    bool alive = instance_dir_alive(dir);
    info->vm = read_json(dir, "vm.json");
    info->status = read_json(dir, "state.json");
    const char *state = json_string_value(json_object_get(info->status, "state"));
    bool ended = state && strcmp(state, "ended") == 0;
    info->life = alive ? INSTANCE_ALIVE : ended ? INSTANCE_ENDED : INSTANCE_DIED;
    if (!alive)
        state = ended ? "ended" : "died";
    else if (!state || strlen(state) >= sizeof info->state)
        state = "starting";
    else if (ended)
        state = "ending";
    snprintf(info->state, sizeof info->state, "%s", state);
    if (!alive)
        return;
    info->process = read_process(info->status, "process");
    info->supervisor = read_process(info->status, "supervisor");
}

int instance_read(const char *name, struct instance_info *info, struct error *err)
{
    *info = (struct instance_info){0};
    int root = instance_root_open(err), r = 0;
    if (root < 0)
        return root;
    int dir = instance_name_valid(name) ? instance_dir_open(root, name) : -ENOENT;
    if (dir >= 0)
        read_info(dir, name, info);
    else
        r = error_set(err, dir, "there is no virtual machine \"%s\"; doppel ps --all lists them", name);
    if (dir >= 0)
        close(dir);
    close(root);
    return r;
}

void instance_info_clear(struct instance_info *info)
{
    json_decref(info->vm);
    json_decref(info->status);
    *info = (struct instance_info){0};
}

/* ---- the list ---- */

static int compare(const void *a, const void *b)
{
    return strcmp(((const struct instance_info *)a)->name, ((const struct instance_info *)b)->name);
}

static int add_entry(int root, const char *name, struct instance_info **list, unsigned *count)
{
    int dir = instance_name_valid(name) ? instance_dir_open(root, name) : -ENOENT;
    if (dir < 0)
        return 0; /* not one of ours, or gone since */
    struct instance_info *larger = *count % 16 ? *list : realloc(*list, (*count + 16) * sizeof **list);
    if (larger) {
        *list = larger;
        larger[*count] = (struct instance_info){0};
        read_info(dir, name, &larger[(*count)++]);
    }
    close(dir);
    return larger ? 0 : -ENOMEM;
}

int instance_list(struct instance_info **list, unsigned *count, struct error *err)
{
    *list = NULL;
    *count = 0;
    int root = instance_root_open(err), r = 0;
    if (root < 0)
        return root;
    int copy = openat(root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *entries = copy >= 0 ? fdopendir(copy) : NULL;
    for (struct dirent *entry; r == 0 && entries && (entry = readdir(entries));)
        r = add_entry(root, entry->d_name, list, count);
    if (entries)
        closedir(entries);
    else
        r = -errno;
    close(root);
    if (r) {
        instance_list_free(*list, *count);
        return error_set(err, r, "cannot read the directory of virtual machines: %s", strerror(-r));
    }
    if (*count)
        qsort(*list, *count, sizeof **list, compare);
    return 0;
}

void instance_list_free(struct instance_info *list, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        instance_info_clear(&list[i]);
    free(list);
}

int instance_find(const char *name, struct instance_info *info, struct error *err)
{
    struct instance_info *list;
    unsigned count, found = 0, which = 0;
    int r = instance_list(&list, &count, err);
    if (r)
        return r;
    for (unsigned i = 0; i < count; i++) {
        if (strncmp(list[i].name, name, strlen(name)) != 0)
            continue;
        which = i;
        found++;
        if (!list[i].name[strlen(name)]) { /* sorted: the whole name comes first */
            found = 1;
            break;
        }
    }
    if (found == 1 && *name) {
        *info = list[which];
        list[which] = (struct instance_info){0};
    } else if (found == 0 || !*name) {
        r = error_set(err, -ENOENT, "there is no virtual machine \"%s\"; doppel ps --all lists them", name);
    } else {
        r = error_set(err, -ENOENT, "\"%s\" is the beginning of %u names, %s among them; give more of it", name, found, list[which].name);
    }
    instance_list_free(list, count);
    return r;
}

/* ---- one of them ---- */

static int open_dir(const char *name)
{
    int root = instance_root_open(NULL);
    if (root < 0)
        return root;
    int dir = instance_name_valid(name) ? instance_dir_open(root, name) : -ENOENT;
    close(root);
    return dir;
}

int instance_open(const char *name, const char *file, int flags)
{
    int dir = open_dir(name);
    if (dir < 0)
        return dir;
    int fd = open_file(dir, file, flags);
    close(dir);
    return fd;
}

int instance_path_of(const char *name, const char *file, char path[INSTANCE_PATH_BYTES], struct error *err)
{
    char root[INSTANCE_PATH_BYTES];
    int r = instance_root(root, err);
    if (r == 0 && snprintf(path, INSTANCE_PATH_BYTES, "%s/%s%s%s", root, name, *file ? "/" : "", file) >= INSTANCE_PATH_BYTES)
        r = error_set(err, -ENAMETOOLONG, "the path of %s is too long", name);
    return r;
}

int instance_connect(const char *name, const char *file)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int dir = open_dir(name), r = 0;
    if (dir < 0)
        return dir;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", dir, file);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        r = -errno;
    close(dir);
    if (r && fd >= 0)
        close(fd);
    return r ? r : fd;
}

int instance_want(const char *name, bool wanted)
{
    int dir = open_dir(name), r = 0;
    if (dir < 0)
        return dir;
    if (wanted) {
        r = unlinkat(dir, "unwanted", 0) && errno != ENOENT ? -errno : 0;
    } else {
        int fd = open_file(dir, "unwanted", O_WRONLY | O_CREAT);
        r = fd < 0 ? fd : 0;
        if (fd >= 0)
            close(fd);
    }
    close(dir);
    return r;
}

static int wait_for_process(const struct process *process, int timeout_ms)
{
    int fd = process_open(process);
    if (fd < 0)
        return 0;
    struct pollfd ended = {.fd = fd, .events = POLLIN};
    int r = poll(&ended, 1, timeout_ms);
    close(fd);
    return r > 0 || (r < 0 && errno == EINTR) ? 0 : -ETIMEDOUT;
}

int instance_wait(const struct instance_info *info, int timeout_ms)
{
    uint64_t deadline = loop_now_ns() + (uint64_t)(timeout_ms < 0 ? 0 : timeout_ms) * 1000000;
    int dir = open_dir(info->name);
    if (dir < 0)
        return 0;
    int r = 0;
    while (r == 0 && instance_dir_alive(dir)) {
        uint64_t now = loop_now_ns();
        int left = timeout_ms < 0 ? -1 : now < deadline ? (int)((deadline - now) / 1000000) + 1 : 0;
        const struct process *last = process_is(&info->supervisor) ? &info->supervisor : &info->process;
        if (timeout_ms >= 0 && now >= deadline)
            r = -ETIMEDOUT;
        else if (process_is(last))
            r = wait_for_process(last, left);
        else
            poll(NULL, 0, RETRY_MS);
    }
    close(dir);
    return r;
}

int instance_remove(const char *name, struct error *err)
{
    int root = instance_root_open(err), r = 0;
    int lock = root < 0 ? root : instance_root_lock(root, err);
    if (lock < 0) {
        if (root >= 0)
            close(root);
        return lock;
    }
    int dir = instance_name_valid(name) ? instance_dir_open(root, name) : -ENOENT;
    if (dir < 0)
        r = error_set(err, dir, "there is no virtual machine \"%s\"; doppel ps --all lists them", name);
    else if (instance_dir_alive(dir))
        r = error_set(err, -EBUSY, "%s is running; stop it first, or use doppel rm --force", name);
    else if ((r = instance_dir_remove(root, name)))
        error_set(err, r, "cannot remove the directory of %s: %s", name, strerror(-r));
    if (dir >= 0)
        close(dir);
    close(lock);
    close(root);
    return r;
}
