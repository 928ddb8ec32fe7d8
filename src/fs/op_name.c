/*
 * Operations on names: looking up, making, removing, moving.
 *
 * Every name is one component in a directory that is open, and is never followed. What a removed name leads to is held before, so that the guest can go on using
 * the file. Device files are not made. A privileged VMM makes files as the guest's user who asks.
 * Threading: any; file-system ids are the thread's own.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fsuid.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_SHARE, readlinkat);
SANDBOX_ALLOW(IN_SHARE, mknodat);
SANDBOX_ALLOW(IN_SHARE, mkdirat);
SANDBOX_ALLOW(IN_SHARE, symlinkat);
SANDBOX_ALLOW(IN_SHARE, linkat);
SANDBOX_ALLOW(IN_SHARE, unlinkat);
SANDBOX_ALLOW(IN_SHARE, renameat); /* the C library's renameat2() without flags */
SANDBOX_ALLOW(IN_SHARE, renameat2);

/* ---- as the guest's user ---- */

static bool become_needed(const struct fs_call *call)
{
    return call->fs->privileged && (call->header.uid != call->fs->own_uid || call->header.gid != call->fs->own_gid);
}

static void become_user(const struct fs_call *call)
{
    if (!become_needed(call))
        return;
    setfsgid(call->header.gid);
    setfsuid(call->header.uid);
}

/* Keeps errno. */
static void become_self(const struct fs_call *call)
{
    int error = errno;

    if (become_needed(call)) {
        setfsuid(call->fs->own_uid);
        setfsgid(call->fs->own_gid);
    }
    errno = error;
}

/* ---- looking up ---- */

static int reply_entry(struct fs_call *call, const struct fs_ref *parent, const char *name)
{
    struct fuse_entry_out entry;
    struct fs_node *node;
    struct statx stat;
    int ret = fs_node_lookup(call->fs, parent, name, call->epoch, &node, &stat);

    if (ret < 0)
        return ret;
    fs_fill_entry(call->fs, node, &stat, &entry);
    fs_reply(call, &entry, sizeof(entry));
    return 0;
}

/* The process's mask is not the guest's: what it took away from a file just made is given back. On threads without a mask nothing was. */
static int restore_mode(struct fs_call *call, struct fs_node *node, uint32_t mode, struct statx *stat)
{
    struct fs_ref ref;
    int ret;

    if (!(mode & call->fs->umask) || (stat->stx_mode & 07777) != (mode & ~call->fs->umask))
        return 0;
    ret = fs_ref_take(call->fs, node, &ref);
    if (ret < 0)
        return ret;
    ret = fs_change_mode(call->fs, &ref, mode);
    if (ret == 0)
        ret = fs_statx(ref.fd, "", stat);
    fs_ref_put(call->fs, &ref);
    return ret;
}

static int reply_made(struct fs_call *call, const struct fs_ref *parent, uint32_t mode)
{
    struct fuse_entry_out entry;
    struct fs_node *node;
    struct statx stat;
    int ret = fs_node_lookup(call->fs, parent, call->name, call->epoch, &node, &stat);

    if (ret < 0)
        return ret;
    if (!S_ISLNK(stat.stx_mode))
        ret = restore_mode(call, node, mode, &stat);
    if (ret < 0) {
        fs_node_forget(call->fs, node->id, 1);
        return ret;
    }
    fs_fill_entry(call->fs, node, &stat, &entry);
    fs_reply(call, &entry, sizeof(entry));
    return 0;
}

static int directory_get(struct fs_call *call, uint64_t id, struct fs_ref *directory)
{
    int ret = fs_ref_get(call->fs, id, directory);

    if (ret == 0 && directory->node->type != S_IFDIR) {
        fs_ref_put(call->fs, directory);
        ret = -ENOTDIR;
    }
    return ret;
}

/* That a name is not there may be remembered like anything else. */
int fs_op_lookup(struct fs_call *call)
{
    struct fs_timeout timeout = fs_timeout(call->fs);
    struct fuse_entry_out nothing = {.entry_valid = timeout.seconds, .entry_valid_nsec = timeout.ns};
    struct fs_ref parent;
    int ret = directory_get(call, call->header.nodeid, &parent);

    if (ret < 0)
        return ret;
    ret = reply_entry(call, &parent, call->name);
    if (ret == -ENOENT && (timeout.seconds || timeout.ns)) {
        fs_reply(call, &nothing, sizeof(nothing));
        ret = 0;
    }
    fs_ref_put(call->fs, &parent);
    return ret;
}

int fs_op_forget(struct fs_call *call)
{
    const struct fuse_forget_in *in = call->arg;

    fs_node_forget(call->fs, call->header.nodeid, in->nlookup);
    return 0;
}

int fs_op_batch_forget(struct fs_call *call)
{
    const struct fuse_batch_forget_in *in = call->arg;
    const struct fuse_forget_one *one = (const struct fuse_forget_one *)(in + 1);
    uint64_t there = (call->arg_bytes - sizeof(*in)) / sizeof(*one);

    for (uint64_t i = 0; i < in->count && i < there; i++)
        fs_node_forget(call->fs, one[i].nodeid, one[i].nlookup);
    return 0;
}

int fs_op_readlink(struct fs_call *call)
{
    char target[PATH_MAX];
    struct fs_ref ref;
    ssize_t length;
    int ret = fs_ref_get(call->fs, call->header.nodeid, &ref);

    if (ret < 0)
        return ret;
    length = ref.node->type == S_IFLNK ? readlinkat(ref.fd, "", target, sizeof(target)) : -1;
    if (ref.node->type != S_IFLNK)
        ret = -EINVAL;
    else if (length < 0)
        ret = -errno;
    else if ((uint64_t)length > fs_reply_room(call))
        ret = -ENAMETOOLONG;
    else
        fs_reply(call, target, (uint64_t)length);
    fs_ref_put(call->fs, &ref);
    return ret;
}

/* ---- making ---- */

enum making { MAKE_NODE, MAKE_DIRECTORY, MAKE_LINK };

static int make_node(const struct fs_ref *parent, const char *name, uint32_t mode)
{
    int fd;

    switch (mode & S_IFMT) {
    case 0:
    case S_IFREG:
        fd = openat(parent->fd, name, O_CREAT | O_EXCL | O_NOFOLLOW | O_WRONLY | O_CLOEXEC, fs_safe_mode(mode, S_IFREG));
        return fd < 0 ? -1 : close(fd);
    case S_IFIFO:
    case S_IFSOCK: /* nothing to the host but a name; the guest's kernel does the rest */
        return mknodat(parent->fd, name, (mode & S_IFMT) | fs_safe_mode(mode, S_IFREG), 0);
    default:
        errno = EPERM;
        return -1;
    }
}

static int make(struct fs_call *call, enum making what, uint32_t mode)
{
    struct fs_ref parent;
    int ret = directory_get(call, call->header.nodeid, &parent);

    if (ret < 0)
        return ret;
    become_user(call);
    switch (what) {
    case MAKE_NODE:
        ret = make_node(&parent, call->name, mode);
        break;
    case MAKE_DIRECTORY:
        ret = mkdirat(parent.fd, call->name, fs_safe_mode(mode, S_IFDIR));
        break;
    case MAKE_LINK:
        ret = symlinkat(call->name2, parent.fd, call->name);
        break;
    }
    become_self(call);
    ret = ret < 0 ? -errno : reply_made(call, &parent, fs_safe_mode(mode, what == MAKE_DIRECTORY ? S_IFDIR : S_IFREG));
    fs_ref_put(call->fs, &parent);
    return ret;
}

int fs_op_mknod(struct fs_call *call)
{
    return make(call, MAKE_NODE, ((const struct fuse_mknod_in *)call->arg)->mode);
}

int fs_op_mkdir(struct fs_call *call)
{
    return make(call, MAKE_DIRECTORY, ((const struct fuse_mkdir_in *)call->arg)->mode);
}

int fs_op_symlink(struct fs_call *call)
{
    if (strlen(call->name2) >= PATH_MAX)
        return -ENAMETOOLONG;
    return make(call, MAKE_LINK, 0);
}

int fs_op_link(struct fs_call *call)
{
    const struct fuse_link_in *in = call->arg;
    char from[FS_PROC_NAME_BYTES];
    struct fs_ref file, parent;
    int ret = directory_get(call, call->header.nodeid, &parent);

    if (ret < 0)
        return ret;
    ret = fs_ref_get(call->fs, in->oldnodeid, &file);
    if (ret == 0) {
        fs_proc_name(file.fd, from);
        if (file.node->type == S_IFDIR)
            ret = -EPERM;
        else if (linkat(call->fs->proc_fd, from, parent.fd, call->name, AT_SYMLINK_FOLLOW) < 0) /* what is followed is our descriptor */
            ret = -errno;
        else
            ret = reply_entry(call, &parent, call->name);
        fs_ref_put(call->fs, &file);
    }
    fs_ref_put(call->fs, &parent);
    return ret;
}

/* ---- making and opening ---- */

static int open_existing(struct fs_call *call, struct fs_node *node, uint32_t flags)
{
    struct fs_ref ref;
    int fd = fs_ref_take(call->fs, node, &ref);

    if (fd < 0)
        return fd;
    fd = fs_open_file(call->fs, node, ref.fd, flags);
    fs_ref_put(call->fs, &ref);
    return fd;
}

/* Opens or makes it: a descriptor, and the node in the guest's hands. */
static int create_node(struct fs_call *call, const struct fs_ref *parent, const char *name, const struct fuse_create_in *in, struct fs_node **node, struct statx *stat)
{
    struct fs *fs = call->fs;
    int fd, ret;

    become_user(call);
    fd = openat(parent->fd, name, (int)(fs_open_flags(fs, in->flags) | O_CREAT | O_EXCL | O_NOFOLLOW), fs_safe_mode(in->mode, S_IFREG));
    become_self(call);
    if (fd < 0 && (errno != EEXIST || in->flags & O_EXCL))
        return -errno;
    if (fd < 0) { /* somebody was faster: it is opened like any other file */
        ret = fs_node_lookup(fs, parent, name, call->epoch, node, stat);
        if (ret < 0)
            return ret;
        fd = open_existing(call, *node, in->flags);
        if (fd < 0)
            fs_node_forget(fs, (*node)->id, 1);
        return fd;
    }
    ret = fs_statx(fd, "", stat);
    if (ret == 0 && stat->stx_mask & STATX_BTIME)
        ret = fs_node_enter(fs, parent->node, name, call->epoch, stat, -1, node);
    else if (ret == 0)
        ret = fs_node_lookup(fs, parent, name, call->epoch, node, stat);
    if (ret == 0 && (ret = restore_mode(call, *node, fs_safe_mode(in->mode, S_IFREG), stat)) < 0)
        fs_node_forget(fs, (*node)->id, 1);
    if (ret < 0) {
        close(fd);
        return ret;
    }
    return fd;
}

static void reply_created(struct fs_call *call, const struct fs_node *node, const struct statx *stat, uint64_t handle)
{
    struct fuse_open_out opened = {.fh = handle, .open_flags = call->fs->config.cache == FS_CACHE_NONE ? FOPEN_DIRECT_IO : FOPEN_KEEP_CACHE};
    struct fuse_entry_out entry;

    fs_fill_entry(call->fs, node, stat, &entry);
    fs_reply(call, &entry, sizeof(entry));
    fs_reply(call, &opened, sizeof(opened));
}

int fs_op_create(struct fs_call *call)
{
    const struct fuse_create_in *in = call->arg;
    struct fs_node *node;
    struct fs_ref parent;
    struct statx stat;
    uint64_t handle;
    int fd, ret;

    if ((in->flags & O_ACCMODE) == O_ACCMODE)
        return -EINVAL;
    ret = directory_get(call, call->header.nodeid, &parent);
    if (ret < 0)
        return ret;
    fd = create_node(call, &parent, call->name, in, &node, &stat);
    ret = fd < 0 ? fd : fs_handle_add(call->fs, node, fd, in->flags, false, call->epoch, &handle);
    if (fd >= 0 && ret < 0)
        fs_node_forget(call->fs, node->id, 1);
    if (ret == 0)
        reply_created(call, node, &stat, handle);
    fs_ref_put(call->fs, &parent);
    return ret;
}

/* A file without a name. It is known by its descriptor alone. */
int fs_op_tmpfile(struct fs_call *call)
{
    const struct fuse_create_in *in = call->arg;
    struct fs *fs = call->fs;
    char name[FS_PROC_NAME_BYTES];
    struct fs_node *node;
    struct fs_ref parent;
    struct statx stat;
    uint64_t handle;
    int fd, path_fd = -1, ret;

    if ((in->flags & O_ACCMODE) != O_WRONLY && (in->flags & O_ACCMODE) != O_RDWR)
        return -EINVAL;
    ret = directory_get(call, call->header.nodeid, &parent);
    if (ret < 0)
        return ret;
    become_user(call);
    fd = openat(parent.fd, ".", (int)((fs_open_flags(fs, in->flags) & ~(uint32_t)(O_CREAT | O_TRUNC)) | O_TMPFILE | (in->flags & O_EXCL)),
                fs_safe_mode(in->mode, S_IFREG));
    become_self(call);
    ret = fd < 0 ? -errno : fs_statx(fd, "", &stat);
    fs_ref_put(fs, &parent);
    if (ret == 0) {
        fs_proc_name(fd, name);
        path_fd = openat(fs->proc_fd, name, O_PATH | O_CLOEXEC);
        ret = path_fd < 0 ? -errno : fs_node_enter(fs, NULL, NULL, call->epoch, &stat, path_fd, &node);
    }
    if (ret < 0) {
        if (fd >= 0)
            close(fd);
        return ret;
    }
    ret = fs_handle_add(fs, node, fd, in->flags, false, call->epoch, &handle);
    if (ret < 0)
        fs_node_forget(fs, node->id, 1);
    else
        reply_created(call, node, &stat, handle);
    return ret;
}

/* ---- removing and moving ---- */

static int remove_name(struct fs_call *call, int flags)
{
    struct fs_ref parent, held;
    int ret = directory_get(call, call->header.nodeid, &parent);

    if (ret < 0)
        return ret;
    fs_node_hold(call->fs, &parent, call->name, &held);
    if (unlinkat(parent.fd, call->name, flags) < 0)
        ret = -errno;
    else if (held.node)
        fs_node_unnamed(call->fs, held.node, parent.node, call->name);
    fs_ref_put(call->fs, &held);
    fs_ref_put(call->fs, &parent);
    return ret;
}

int fs_op_unlink(struct fs_call *call)
{
    return remove_name(call, 0);
}

int fs_op_rmdir(struct fs_call *call)
{
    return remove_name(call, AT_REMOVEDIR);
}

static void moved(struct fs_call *call, const struct fs_ref *from, const struct fs_ref *to, struct fs_ref *source, struct fs_ref *target, bool exchanged)
{
    if (target->node && exchanged)
        fs_node_named(call->fs, target->node, from->node, call->name);
    else if (target->node && target->node != source->node)
        fs_node_unnamed(call->fs, target->node, to->node, call->name2);
    if (source->node)
        fs_node_named(call->fs, source->node, to->node, call->name2);
}

static int move(struct fs_call *call, uint64_t new_directory, uint32_t flags)
{
    struct fs_ref from, to, source, target;
    int ret = directory_get(call, call->header.nodeid, &from);

    if (ret < 0)
        return ret;
    ret = directory_get(call, new_directory, &to);
    if (ret < 0) {
        fs_ref_put(call->fs, &from);
        return ret;
    }
    fs_node_hold(call->fs, &from, call->name, &source);
    fs_node_hold(call->fs, &to, call->name2, &target);
    if (renameat2(from.fd, call->name, to.fd, call->name2, flags) < 0)
        ret = -errno;
    else
        moved(call, &from, &to, &source, &target, flags & RENAME_EXCHANGE);
    fs_ref_put(call->fs, &target);
    fs_ref_put(call->fs, &source);
    fs_ref_put(call->fs, &to);
    fs_ref_put(call->fs, &from);
    return ret;
}

int fs_op_rename(struct fs_call *call)
{
    return move(call, ((const struct fuse_rename_in *)call->arg)->newdir, 0);
}

/* A whiteout would be a device file. */
int fs_op_rename2(struct fs_call *call)
{
    const struct fuse_rename2_in *in = call->arg;

    if (in->flags & ~(uint32_t)(RENAME_NOREPLACE | RENAME_EXCHANGE))
        return -EINVAL;
    return move(call, in->newdir, in->flags);
}
