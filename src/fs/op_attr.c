/*
 * Operations on attributes: what a file is like, and changing it.
 *
 * Owners: the VMM's user may be shown under another number. Set-user-ID and set-group-ID bits are never put on files: on the host they would give away
 * the rights of whoever owns them.
 * Threading: any.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_SHARE, fchmodat);
SANDBOX_ALLOW(IN_SHARE, fchownat);
SANDBOX_ALLOW(IN_SHARE, utimensat);
SANDBOX_ALLOW(IN_SHARE, ftruncate);
SANDBOX_ALLOW(IN_SHARE, faccessat); /* other C libraries, and older kernels */
SANDBOX_ALLOW(IN_SHARE, faccessat2);
SANDBOX_ALLOW(IN_SHARE, fgetxattr);
SANDBOX_ALLOW(IN_SHARE, flistxattr);
SANDBOX_ALLOW(IN_SHARE, fsetxattr);
SANDBOX_ALLOW(IN_SHARE, fremovexattr);

#define ALWAYS_SECONDS (24u * 3600u)
#define XATTR_PREFIX "user."

/* ---- what the guest is told ---- */

struct fs_timeout fs_timeout(const struct fs *fs)
{
    static const struct fs_timeout timeouts[] = {[FS_CACHE_AUTO] = {1, 0}, [FS_CACHE_NONE] = {0, 0}, [FS_CACHE_ALWAYS] = {ALWAYS_SECONDS, 0}};

    return timeouts[fs->config.cache];
}

static uint32_t shown_id(uint32_t id, uint32_t own, int64_t shown)
{
    return shown != FS_ID_AS_ON_HOST && id == own ? (uint32_t)shown : id;
}

static uint32_t host_id(uint32_t id, uint32_t own, int64_t shown)
{
    return shown != FS_ID_AS_ON_HOST && id == (uint32_t)shown ? own : id;
}

void fs_fill_attr(const struct fs *fs, const struct statx *stat, struct fuse_attr *attr)
{
    struct fs_identity identity = fs_identity_of(stat);

    *attr = (struct fuse_attr){
        .ino = fs_shown_inode(fs, &identity),
        .size = stat->stx_size,
        .blocks = stat->stx_blocks,
        .atime = (uint64_t)stat->stx_atime.tv_sec,
        .mtime = (uint64_t)stat->stx_mtime.tv_sec,
        .ctime = (uint64_t)stat->stx_ctime.tv_sec,
        .atimensec = stat->stx_atime.tv_nsec,
        .mtimensec = stat->stx_mtime.tv_nsec,
        .ctimensec = stat->stx_ctime.tv_nsec,
        .mode = stat->stx_mode,
        .nlink = stat->stx_nlink,
        .uid = shown_id(stat->stx_uid, fs->own_uid, fs->config.uid),
        .gid = shown_id(stat->stx_gid, fs->own_gid, fs->config.gid),
        .rdev = (uint32_t)makedev(stat->stx_rdev_major, stat->stx_rdev_minor),
        .blksize = stat->stx_blksize,
    };
}

void fs_fill_entry(const struct fs *fs, const struct fs_node *node, const struct statx *stat, struct fuse_entry_out *entry)
{
    struct fs_timeout timeout = fs_timeout(fs);

    *entry = (struct fuse_entry_out){
        .nodeid = node->id,
        .entry_valid = timeout.seconds,
        .attr_valid = timeout.seconds,
        .entry_valid_nsec = timeout.ns,
        .attr_valid_nsec = timeout.ns,
    };
    fs_fill_attr(fs, stat, &entry->attr);
}

/*
 * True when the file has not changed since the guest was last told its state at an open, so that data the guest has cached is good. Changes within one tick of
 * the host's clock look alike; a state younger than that is no evidence.
 */
bool fs_keep_data(struct fs *fs, struct fs_node *node, const struct statx *stat)
{
    int64_t changed_ns = stat->stx_ctime.tv_sec * 1000000000ll + stat->stx_ctime.tv_nsec;
    const struct fs_device *device;
    struct timespec now;
    bool same;

    if (fs->config.cache == FS_CACHE_ALWAYS)
        return true;
    device = fs_device_of(fs, -1, node->identity.device);
    clock_gettime(CLOCK_REALTIME, &now);
    pthread_mutex_lock(&fs->lock);
    same = node->stamped && node->stamp_ns == changed_ns && node->stamp_bytes == stat->stx_size;
    node->stamped = device && device->local && now.tv_sec * 1000000000ll + now.tv_nsec - changed_ns > (int64_t)(4 * fs->clock_tick_ns);
    node->stamp_ns = changed_ns;
    node->stamp_bytes = stat->stx_size;
    pthread_mutex_unlock(&fs->lock);
    return same && fs->config.cache == FS_CACHE_AUTO;
}

static int reply_attr(struct fs_call *call, const struct statx *stat)
{
    struct fs_timeout timeout = fs_timeout(call->fs);
    struct fuse_attr_out out = {.attr_valid = timeout.seconds, .attr_valid_nsec = timeout.ns};

    fs_fill_attr(call->fs, stat, &out.attr);
    fs_reply(call, &out, sizeof(out));
    return 0;
}

/* By the handle where the guest has one: that works also for files that are gone. */
int fs_op_getattr(struct fs_call *call)
{
    const struct fuse_getattr_in *in = call->arg;
    struct fs *fs = call->fs;
    struct fs_handle *handle = NULL;
    struct fs_node *node;
    struct statx stat;
    int ret;

    if (in->getattr_flags & FUSE_GETATTR_FH && fs_handle_get(fs, in->fh, false, &handle) == 0) {
        ret = fs_statx(handle->fd, "", &stat);
        fs_handle_put(fs, handle);
    } else {
        ret = fs_node_get(fs, call->header.nodeid, &node);
        if (ret < 0)
            return ret;
        ret = fs_node_stat(fs, node, &stat);
        fs_node_put(fs, node);
    }
    return ret < 0 ? ret : reply_attr(call, &stat);
}

/* ---- changing them ---- */

void fs_proc_name(int fd, char name[FS_PROC_NAME_BYTES])
{
    snprintf(name, FS_PROC_NAME_BYTES, "%d", fd);
}

uint32_t fs_safe_mode(uint32_t mode, uint32_t type)
{
    return mode & (type == S_IFDIR ? 07777u : 01777u);
}

int fs_change_mode(struct fs *fs, const struct fs_ref *ref, uint32_t mode)
{
    char name[FS_PROC_NAME_BYTES];

    if (ref->node->type == S_IFLNK)
        return -EOPNOTSUPP;
    fs_proc_name(ref->fd, name);
    return fchmodat(fs->proc_fd, name, fs_safe_mode(mode, ref->node->type), 0) < 0 ? -errno : 0;
}

/* An owner that is already there needs no right. */
static int change_owner(struct fs *fs, const struct fs_ref *ref, const struct fuse_setattr_in *in)
{
    uint32_t uid = host_id(in->uid, fs->own_uid, fs->config.uid), gid = host_id(in->gid, fs->own_gid, fs->config.gid);
    struct statx stat;
    int ret = fs_statx(ref->fd, "", &stat);

    if (ret < 0)
        return ret;
    if (!(in->valid & FATTR_UID) || uid == stat.stx_uid)
        uid = UINT32_MAX;
    if (!(in->valid & FATTR_GID) || gid == stat.stx_gid)
        gid = UINT32_MAX;
    if (uid == UINT32_MAX && gid == UINT32_MAX)
        return 0;
    return fchownat(ref->fd, "", uid, gid, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
}

static int change_size(struct fs *fs, const struct fs_ref *ref, const struct fuse_setattr_in *in)
{
    struct fs_handle *handle = NULL;
    int fd, ret;

    if (in->size > INT64_MAX)
        return -EFBIG;
    if (in->valid & FATTR_FH && fs_handle_get(fs, in->fh, false, &handle) == 0 && handle->node == ref->node) {
        ret = ftruncate(handle->fd, (off_t)in->size) < 0 ? -errno : 0;
        fs_handle_put(fs, handle);
        if (ret != -EINVAL && ret != -EBADF) /* not open for writing */
            return ret;
    } else {
        fs_handle_put(fs, handle);
    }
    fd = fs_open_file(fs, ref->node, ref->fd, O_WRONLY);
    if (fd < 0)
        return fd;
    ret = ftruncate(fd, (off_t)in->size) < 0 ? -errno : 0;
    close(fd);
    return ret;
}

static int change_times(const struct fs_ref *ref, const struct fuse_setattr_in *in)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_OMIT}};

    if (in->valid & FATTR_ATIME_NOW)
        times[0].tv_nsec = UTIME_NOW;
    else if (in->valid & FATTR_ATIME)
        times[0] = (struct timespec){(time_t)in->atime, in->atimensec < 1000000000u ? in->atimensec : 0};
    if (in->valid & FATTR_MTIME_NOW)
        times[1].tv_nsec = UTIME_NOW;
    else if (in->valid & FATTR_MTIME)
        times[1] = (struct timespec){(time_t)in->mtime, in->mtimensec < 1000000000u ? in->mtimensec : 0};
    return utimensat(ref->fd, "", times, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
}

/* Root's writes leave set-ID bits where they are; the guest asks for their end (FUSE_HANDLE_KILLPRIV_V2). */
static int drop_set_id(struct fs *fs, const struct fs_ref *ref)
{
    struct statx stat;
    int ret = fs_statx(ref->fd, "", &stat);

    if (ret == 0 && ref->node->type == S_IFREG && stat.stx_mode & (S_ISUID | S_ISGID))
        ret = fs_change_mode(fs, ref, stat.stx_mode);
    return ret;
}

int fs_op_setattr(struct fs_call *call)
{
    const struct fuse_setattr_in *in = call->arg;
    struct fs *fs = call->fs;
    struct statx stat;
    struct fs_ref ref;
    int ret = fs_ref_get(fs, call->header.nodeid, &ref);

    if (ret < 0)
        return ret;
    if (in->valid & (FATTR_UID | FATTR_GID))
        ret = change_owner(fs, &ref, in);
    if (ret == 0 && in->valid & FATTR_KILL_SUIDGID)
        ret = drop_set_id(fs, &ref);
    if (ret == 0 && in->valid & FATTR_MODE)
        ret = fs_change_mode(fs, &ref, in->mode);
    if (ret == 0 && in->valid & FATTR_SIZE)
        ret = change_size(fs, &ref, in);
    if (ret == 0 && in->valid & (FATTR_ATIME | FATTR_MTIME))
        ret = change_times(&ref, in);
    if (ret == 0)
        ret = fs_statx(ref.fd, "", &stat);
    fs_ref_put(fs, &ref);
    return ret < 0 ? ret : reply_attr(call, &stat);
}

int fs_op_access(struct fs_call *call)
{
    const struct fuse_access_in *in = call->arg;
    struct fs_ref ref;
    char name[FS_PROC_NAME_BYTES];
    int ret = fs_ref_get(call->fs, call->header.nodeid, &ref);

    if (ret < 0)
        return ret;
    fs_proc_name(ref.fd, name);
    if (ref.node->type != S_IFLNK && faccessat(call->fs->proc_fd, name, (int)(in->mask & 7), 0) < 0)
        ret = -errno;
    if (ret == 0 && in->mask & W_OK && call->fs->config.readonly)
        ret = -EROFS;
    fs_ref_put(call->fs, &ref);
    return ret;
}

int fs_op_statfs(struct fs_call *call)
{
    struct fuse_statfs_out out = {0};
    struct statfs about;
    struct fs_ref ref;
    int ret = fs_ref_get(call->fs, call->header.nodeid, &ref);

    if (ret < 0)
        return ret;
    if (fstatfs(ref.fd, &about) < 0)
        ret = -errno;
    fs_ref_put(call->fs, &ref);
    if (ret < 0)
        return ret;
    out.st = (struct fuse_kstatfs){
        .blocks = about.f_blocks,
        .bfree = about.f_bfree,
        .bavail = about.f_bavail,
        .files = about.f_files,
        .ffree = about.f_ffree,
        .bsize = (uint32_t)about.f_bsize,
        .namelen = FS_NAME_BYTES_MAX,
        .frsize = (uint32_t)about.f_frsize,
    };
    fs_reply(call, &out, sizeof(out));
    return 0;
}

/* ---- extended attributes: those of users, of files and directories ---- */

/* A descriptor of the file, opened for reading; attributes ask for no more. */
static int xattr_open(struct fs_call *call, const char *name)
{
    struct fs_ref ref;
    int fd;

    if (!call->fs->config.xattr)
        return -ENOSYS; /* and it never asks again */
    if (name && strncmp(name, XATTR_PREFIX, strlen(XATTR_PREFIX)))
        return -EOPNOTSUPP;
    if (name && strlen(name) > XATTR_NAME_MAX)
        return -ERANGE;
    fd = fs_ref_get(call->fs, call->header.nodeid, &ref);
    if (fd < 0)
        return fd;
    if (ref.node->type == S_IFREG)
        fd = fs_open_file(call->fs, ref.node, ref.fd, O_RDONLY);
    else
        fd = ref.node->type == S_IFDIR ? fs_open_directory(ref.fd) : -EOPNOTSUPP;
    fs_ref_put(call->fs, &ref);
    return fd;
}

static int reply_xattr(struct fs_call *call, const void *data, size_t size_bytes, uint32_t wanted_bytes)
{
    struct fuse_getxattr_out out = {.size = (uint32_t)size_bytes};

    if (wanted_bytes == 0) {
        if (fs_reply_room(call) < sizeof(out))
            return -EINVAL;
        fs_reply(call, &out, sizeof(out));
        return 0;
    }
    if (size_bytes > wanted_bytes || size_bytes > fs_reply_room(call))
        return -ERANGE;
    fs_reply(call, data, size_bytes);
    return 0;
}

int fs_op_getxattr(struct fs_call *call)
{
    const struct fuse_getxattr_in *in = call->arg;
    int fd = xattr_open(call, call->name), ret;
    ssize_t got;
    char *value;

    if (fd < 0)
        return fd;
    value = malloc(XATTR_SIZE_MAX);
    got = value ? fgetxattr(fd, call->name, value, XATTR_SIZE_MAX) : -1;
    if (!value)
        ret = -ENOMEM;
    else
        ret = got < 0 ? -errno : reply_xattr(call, value, (size_t)got, in->size);
    free(value);
    close(fd);
    return ret;
}

int fs_op_listxattr(struct fs_call *call)
{
    const struct fuse_getxattr_in *in = call->arg;
    int fd = xattr_open(call, NULL), ret = 0;
    size_t kept = 0;
    ssize_t got;
    char *list;

    if (fd < 0)
        return fd == -EOPNOTSUPP ? reply_xattr(call, NULL, 0, in->size) : fd;
    list = malloc(XATTR_LIST_MAX);
    got = list ? flistxattr(fd, list, XATTR_LIST_MAX) : -1;
    if (!list || got < 0) {
        ret = list ? -errno : -ENOMEM;
        got = 0;
    }
    for (size_t at = 0, length; at < (size_t)got; at += length) {
        length = strnlen(list + at, (size_t)got - at) + 1;
        if (strncmp(list + at, XATTR_PREFIX, strlen(XATTR_PREFIX)) == 0) {
            memmove(list + kept, list + at, length);
            kept += length;
        }
    }
    if (ret == 0)
        ret = reply_xattr(call, list, kept, in->size);
    free(list);
    close(fd);
    return ret;
}

int fs_op_setxattr(struct fs_call *call)
{
    const struct fuse_setxattr_in *in = call->arg; /* the first two fields only */
    uint64_t used = FUSE_COMPAT_SETXATTR_IN_SIZE + strlen(call->name) + 1;
    int fd, ret;

    if (in->size > XATTR_SIZE_MAX)
        return -E2BIG;
    if (in->size > call->arg_bytes - used)
        return -EINVAL;
    fd = xattr_open(call, call->name);
    if (fd < 0)
        return fd;
    ret = fsetxattr(fd, call->name, (const uint8_t *)call->arg + used, in->size, (int)(in->flags & (XATTR_CREATE | XATTR_REPLACE))) < 0 ? -errno : 0;
    close(fd);
    return ret;
}

int fs_op_removexattr(struct fs_call *call)
{
    int fd = xattr_open(call, call->name), ret;

    if (fd < 0)
        return fd;
    ret = fremovexattr(fd, call->name) < 0 ? -errno : 0;
    close(fd);
    return ret;
}
