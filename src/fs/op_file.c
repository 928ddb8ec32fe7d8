/*
 * Operations on open files. Data goes between guest memory and the file directly, by the message's own vectors.
 *
 * Only regular files are opened: opening a device file or a FIFO of the host would act on something else than the directory. Descriptors are never O_APPEND,
 * because the guest's kernel also writes back cached pages through them; appending is asked for write by write.
 * Threading: any.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_IF(IN_SHARE, fcntl, ARG_IS(1, F_DUPFD_CLOEXEC));
SANDBOX_ALLOW(IN_SHARE, preadv);
SANDBOX_ALLOW(IN_SHARE, pwritev2);
SANDBOX_ALLOW(IN_SHARE, fsync);
SANDBOX_ALLOW(IN_SHARE, fdatasync);
SANDBOX_ALLOW(IN_SHARE, syncfs);
SANDBOX_ALLOW(IN_SHARE, fallocate);
SANDBOX_ALLOW(IN_SHARE, lseek);
SANDBOX_ALLOW(IN_SHARE, copy_file_range);

#define COPY_BYTES_MAX (64u << 20) /* in one copy_file_range; the guest asks again */

uint32_t fs_open_flags(const struct fs *fs, uint32_t guest_flags)
{
    uint32_t access = guest_flags & O_ACCMODE;

    if (fs->config.writeback && access == O_WRONLY)
        access = O_RDWR; /* the guest's cache reads what it writes parts of */
    return access | (guest_flags & (O_TRUNC | O_SYNC | O_DSYNC)) | O_NOCTTY | O_CLOEXEC;
}

int fs_open_file(struct fs *fs, const struct fs_node *node, int fd, uint32_t guest_flags)
{
    char name[FS_PROC_NAME_BYTES];
    int opened;

    if (node->type != S_IFREG)
        return node->type == S_IFDIR ? -EISDIR : node->type == S_IFLNK ? -ELOOP : -EACCES;
    if ((guest_flags & O_ACCMODE) == O_ACCMODE)
        return -EINVAL;
    if (fs->config.readonly && ((guest_flags & O_ACCMODE) != O_RDONLY || guest_flags & O_TRUNC))
        return -EROFS;
    fs_proc_name(fd, name);
    opened = openat(fs->proc_fd, name, (int)fs_open_flags(fs, guest_flags));
    return opened < 0 ? -errno : opened;
}

int fs_op_open(struct fs_call *call)
{
    const struct fuse_open_in *in = call->arg;
    struct fs *fs = call->fs;
    struct fuse_open_out out = {0};
    struct statx stat;
    struct fs_ref ref;
    int fd = fs_ref_get(fs, call->header.nodeid, &ref), ret;

    if (fd < 0)
        return fd;
    fd = fs_open_file(fs, ref.node, ref.fd, in->flags);
    ret = fd < 0 ? fd : fs_statx(fd, "", &stat);
    if (fd >= 0 && ret < 0)
        close(fd);
    if (ret == 0)
        ret = fs_handle_add(fs, ref.node, fd, in->flags, false, call->epoch, &out.fh);
    if (ret == 0) {
        if (fs->config.cache == FS_CACHE_NONE)
            out.open_flags = FOPEN_DIRECT_IO;
        else if (fs_keep_data(fs, ref.node, &stat))
            out.open_flags = FOPEN_KEEP_CACHE;
        fs_reply(call, &out, sizeof(out));
    }
    fs_ref_put(fs, &ref);
    return ret;
}

int fs_op_release(struct fs_call *call)
{
    return fs_handle_close(call->fs, ((const struct fuse_release_in *)call->arg)->fh, false);
}

/* Local file systems have nothing to say at a close, so the guest's kernel need not ask again. Others may have errors for us. */
int fs_op_flush(struct fs_call *call)
{
    const struct fuse_flush_in *in = call->arg;
    struct fs_handle *handle;
    int fd, ret;

    if (call->fs->local)
        return -ENOSYS;
    ret = fs_handle_get(call->fs, in->fh, false, &handle);
    if (ret < 0)
        return ret;
    fd = fcntl(handle->fd, F_DUPFD_CLOEXEC, 0);
    ret = fd < 0 || close(fd) < 0 ? -errno : 0;
    fs_handle_put(call->fs, handle);
    return ret;
}

int fs_op_read(struct fs_call *call)
{
    const struct fuse_read_in *in = call->arg;
    uint64_t room = fs_reply_room(call), length = in->size < room ? in->size : room;
    struct iovec iov[FS_VECTORS_MAX];
    struct fs_handle *handle;
    unsigned count;
    ssize_t got;
    int ret = fs_handle_get(call->fs, in->fh, false, &handle);

    if (ret < 0)
        return ret;
    count = fs_slice(call->message->out, call->message->out_count, sizeof(struct fuse_out_header), length, iov);
    got = preadv(handle->fd, iov, (int)count, (off_t)in->offset);
    if (got < 0)
        ret = -errno;
    else
        call->reply_bytes = (uint64_t)got;
    fs_handle_put(call->fs, handle);
    return ret;
}

/* Root's writes do not end set-ID bits by themselves. */
static void drop_set_id(struct fs *fs, int fd)
{
    struct statx stat;

    if (fs->privileged && fs_statx(fd, "", &stat) == 0 && stat.stx_mode & (S_ISUID | S_ISGID))
        (void)!fchmod(fd, stat.stx_mode & 01777u);
}

int fs_op_write(struct fs_call *call)
{
    const struct fuse_write_in *in = call->arg;
    const uint64_t header_bytes = sizeof(struct fuse_in_header) + sizeof(*in);
    uint64_t there = call->header.len - header_bytes;
    struct fuse_write_out out = {0};
    struct iovec iov[FS_VECTORS_MAX];
    struct fs_handle *handle;
    bool append = in->flags & O_APPEND && !(in->write_flags & FUSE_WRITE_CACHE) && !call->fs->config.writeback;
    unsigned count;
    ssize_t written;
    int ret;

    if (in->size > there)
        return -EINVAL;
    ret = fs_handle_get(call->fs, in->fh, false, &handle);
    if (ret < 0)
        return ret;
    count = fs_slice(call->message->in, call->message->in_count, header_bytes, in->size, iov);
    written = pwritev2(handle->fd, iov, (int)count, (off_t)in->offset, append ? RWF_APPEND : 0);
    if (written < 0) {
        ret = -errno;
    } else {
        if (in->write_flags & FUSE_WRITE_KILL_SUIDGID)
            drop_set_id(call->fs, handle->fd);
        out.size = (uint32_t)written;
        fs_reply(call, &out, sizeof(out));
    }
    fs_handle_put(call->fs, handle);
    return ret;
}

static int sync_handle(struct fs_call *call, bool directory)
{
    const struct fuse_fsync_in *in = call->arg;
    struct fs_handle *handle;
    int ret = fs_handle_get(call->fs, in->fh, directory, &handle);

    if (ret < 0)
        return ret;
    if ((in->fsync_flags & FUSE_FSYNC_FDATASYNC ? fdatasync(handle->fd) : fsync(handle->fd)) < 0)
        ret = -errno;
    fs_handle_put(call->fs, handle);
    return ret;
}

int fs_op_fsync(struct fs_call *call)
{
    return sync_handle(call, false);
}

int fs_op_fsyncdir(struct fs_call *call)
{
    return sync_handle(call, true);
}

/* The guest's sync(2). */
int fs_op_syncfs(struct fs_call *call)
{
    int fd = fs_open_directory(call->fs->root->fd), ret;

    if (fd < 0)
        return fd;
    ret = syncfs(fd) < 0 ? -errno : 0;
    close(fd);
    return ret;
}

int fs_op_fallocate(struct fs_call *call)
{
    const struct fuse_fallocate_in *in = call->arg;
    struct fs_handle *handle;
    int ret;

    if (in->mode & ~(uint32_t)(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE))
        return -EOPNOTSUPP;
    ret = fs_handle_get(call->fs, in->fh, false, &handle);
    if (ret < 0)
        return ret;
    if (fallocate(handle->fd, (int)in->mode, (off_t)in->offset, (off_t)in->length) < 0)
        ret = -errno;
    fs_handle_put(call->fs, handle);
    return ret;
}

/* The kernel asks for data and holes only; it knows the rest itself. */
int fs_op_lseek(struct fs_call *call)
{
    const struct fuse_lseek_in *in = call->arg;
    struct fuse_lseek_out out;
    struct fs_handle *handle;
    off_t found;
    int ret;

    if (in->whence != SEEK_DATA && in->whence != SEEK_HOLE)
        return -EINVAL;
    ret = fs_handle_get(call->fs, in->fh, false, &handle);
    if (ret < 0)
        return ret;
    found = lseek(handle->fd, (off_t)in->offset, (int)in->whence);
    if (found < 0) {
        ret = -errno;
    } else {
        out.offset = (uint64_t)found;
        fs_reply(call, &out, sizeof(out));
    }
    fs_handle_put(call->fs, handle);
    return ret;
}

int fs_op_copy_file_range(struct fs_call *call)
{
    const struct fuse_copy_file_range_in *in = call->arg;
    off_t from_offset = (off_t)in->off_in, to_offset = (off_t)in->off_out;
    struct fuse_write_out out = {0};
    struct fs_handle *from, *to = NULL;
    ssize_t copied;
    int ret = fs_handle_get(call->fs, in->fh_in, false, &from);

    if (ret < 0)
        return ret;
    ret = fs_handle_get(call->fs, in->fh_out, false, &to);
    if (ret == 0) {
        copied = copy_file_range(from->fd, &from_offset, to->fd, &to_offset, in->len < COPY_BYTES_MAX ? in->len : COPY_BYTES_MAX, 0);
        if (copied < 0) {
            ret = -errno;
        } else {
            out.size = (uint32_t)copied;
            fs_reply(call, &out, sizeof(out));
        }
    }
    fs_handle_put(call->fs, to);
    fs_handle_put(call->fs, from);
    return ret;
}

/* Controls reach into file systems in ways that nobody has looked at. */
int fs_op_ioctl(struct fs_call *call)
{
    return -ENOTTY;
}
