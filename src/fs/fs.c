/*
 * A shared directory: made, reset, saved and loaded.
 *
 * Descriptors are bounded: nodes and open files each have a share of what the host grants the process.
 * Threading: see fs_priv.h; create, destroy and state are called alone.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/securebits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/log.h"

/* Of the process's descriptors, those left to everything else; an eighth of the rest is one share's. */
#define DESCRIPTORS_KEPT 256u
#define DESCRIPTORS_MIN 64u
#define DESCRIPTORS_MAX (1u << 17)
#define DESCRIPTORS_RESERVED 8192u

/* The hard limit is what the administrator meant to allow; soft limits are low for programs that use select(). */
static unsigned descriptors_granted(void)
{
    struct rlimit limit;
    uint64_t granted;

    if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
        return DESCRIPTORS_MIN;
    if (limit.rlim_cur < limit.rlim_max) {
        struct rlimit raised = {limit.rlim_max, limit.rlim_max};

        if (setrlimit(RLIMIT_NOFILE, &raised) == 0)
            limit = raised;
    }
    granted = limit.rlim_cur > DESCRIPTORS_KEPT ? (limit.rlim_cur - DESCRIPTORS_KEPT) / 8 : 0;
    return granted < DESCRIPTORS_MIN ? DESCRIPTORS_MIN : granted > DESCRIPTORS_MAX ? DESCRIPTORS_MAX : (unsigned)granted;
}

/* A table of descriptors that grows in a process with threads waits for all processors to notice, many milliseconds long; so it grows now. */
static void reserve_descriptors(int fd, unsigned granted)
{
    int last = fcntl(fd, F_DUPFD_CLOEXEC, (int)(granted < DESCRIPTORS_RESERVED ? granted : DESCRIPTORS_RESERVED) - 1);

    if (last >= 0)
        close(last);
}

void fs_limit(struct fs *fs, unsigned node_descriptors, unsigned handles)
{
    pthread_mutex_lock(&fs->lock);
    fs->fd_max = node_descriptors;
    fs->handles_max = handles;
    pthread_mutex_unlock(&fs->lock);
}

/* umask(2) cannot look without changing. */
static uint32_t process_umask(void)
{
    FILE *status = fopen("/proc/self/status", "re");
    char line[128];
    unsigned mask = 0;

    while (status && fgets(line, sizeof(line), status)) {
        if (sscanf(line, "Umask: %o", &mask) == 1)
            break;
    }
    if (status)
        fclose(status);
    return mask;
}

static int open_root(struct fs *fs, struct error *err)
{
    int fd = open(fs->path, O_PATH | O_DIRECTORY | O_CLOEXEC), ret;
    const struct fs_device *device;
    struct statx stat;

    if (fd < 0)
        return error_set(err, -errno, "cannot share %s: %s", fs->path, strerror(errno));
    ret = fs_statx(fd, "", &stat);
    device = ret == 0 ? fs_device_of(fs, fd, fs_identity_of(&stat).device) : NULL;
    if (device && device->refused)
        ret = error_set(err, -EINVAL, "cannot share %s: it belongs to the kernel, not to a disk", fs->path);
    else if (device)
        fs->local = device->local;
    if (ret == 0 && device)
        ret = fs_nodes_create(fs, fd, &stat);
    else if (ret == 0)
        ret = -EIO;
    if (ret < 0) {
        close(fd);
        return err && err->code ? ret : error_set(err, ret, "cannot share %s: %s", fs->path, strerror(-ret));
    }
    return 0;
}

int fs_create(struct fs **out, const struct fs_config *config, struct error *err)
{
    struct fs *fs = calloc(1, sizeof(*fs));
    struct timespec tick = {0};
    int ret;

    *out = NULL;
    if (!fs)
        return error_set(err, -ENOMEM, "cannot share %s: no memory", config->path);
    pthread_mutex_init(&fs->lock, NULL);
    fs->proc_fd = -1;
    fs->config = *config;
    fs->own_uid = geteuid();
    fs->own_gid = getegid();
    fs->privileged = fs->own_uid == 0 && !config->no_capabilities && config->uid == FS_ID_AS_ON_HOST && config->gid == FS_ID_AS_ON_HOST;
    clock_getres(CLOCK_REALTIME_COARSE, &tick);
    fs->clock_tick_ns = (uint64_t)tick.tv_sec * 1000000000u + (uint64_t)tick.tv_nsec;
    fs_limit(fs, descriptors_granted() / 2, descriptors_granted() / 2);
    fs->umask = process_umask();
    fs->path = strdup(config->path);
    fs->proc_fd = open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (!fs->path)
        ret = error_set(err, -ENOMEM, "cannot share %s: no memory", config->path);
    else if (fs->proc_fd < 0)
        ret = error_set(err, -errno, "cannot share %s: /proc is needed for it: %s", config->path, strerror(errno));
    else
        ret = open_root(fs, err);
    if (ret == 0)
        reserve_descriptors(fs->proc_fd, descriptors_granted());
    if (ret < 0) {
        fs_destroy(fs);
        return ret;
    }
    *out = fs;
    return 0;
}

void fs_destroy(struct fs *fs)
{
    if (!fs)
        return;
    fs_handles_drop(fs);
    fs_slots_clear(&fs->handles);
    fs_nodes_destroy(fs);
    if (fs->proc_fd >= 0)
        close(fs->proc_fd);
    pthread_mutex_destroy(&fs->lock);
    free(fs->path);
    free(fs);
}

void fs_thread_prepare(const struct fs *fs)
{
    if (unshare(CLONE_FS) == 0)
        umask(0);
    else
        log_warning("share %s: files that the guest makes have this process's umask: %s", fs->path, strerror(errno));
    /* Root makes files as the guest's users without being held back by their rights: the guest's kernel has looked at those. */
    if (fs->privileged && prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP) < 0)
        log_debug("share %s: the guest's users make files with their own rights only: %s", fs->path, strerror(errno));
}

void fs_reset(struct fs *fs)
{
    pthread_mutex_lock(&fs->lock);
    fs->epoch++;
    fs->initialized = false;
    pthread_mutex_unlock(&fs->lock);
    fs_handles_drop(fs);
    pthread_mutex_lock(&fs->lock);
    fs_nodes_drop(fs);
    pthread_mutex_unlock(&fs->lock);
}

struct fs_counts fs_count(struct fs *fs)
{
    struct fs_counts counts;

    pthread_mutex_lock(&fs->lock);
    counts = (struct fs_counts){fs->node_count, fs->fd_count, fs->handle_count, fs->node_bytes};
    pthread_mutex_unlock(&fs->lock);
    return counts;
}

void fs_state(struct fs *fs, struct state_io *io)
{
    bool initialized = fs->initialized;

    if (state_loading(io))
        fs_reset(fs);
    state_bool(io, &initialized);
    fs_nodes_state(fs, io);
    fs_handles_state(fs, io);
    if (!state_loading(io))
        return;
    fs_nodes_loaded(fs);
    if (state_failed(io))
        fs_reset(fs);
    else
        fs->initialized = initialized;
}
