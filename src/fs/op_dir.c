/*
 * Operations on open directories.
 *
 * A directory's entries are read ahead into its handle's buffer; offsets are the host's own, and one that does not go on where the buffer is seeks.
 * READDIRPLUS looks every entry up, which gives the guest names, attributes and nodes in one message. The guest's kernel keeps what it has read; whether it may use that again is said at each open.
 * Threading: any; a handle's lock lets one call at a time read it.
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_SHARE, getdents64);

#define BUFFER_BYTES 4096u

int fs_open_directory(int fd)
{
    int opened = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

    return opened < 0 ? -errno : opened;
}

/*
 * True when the names that the guest has read are those that are there. Names that are kept are listed without READDIRPLUS, so each attribute that is too old is asked for alone: after half of
 * the time that attributes are good for, reading all again is cheaper.
 */
static bool keep_names(struct fs *fs, struct fs_node *node, int fd)
{
    int64_t now_ns, good_ns = fs_timeout(fs).seconds * 1000000000ll / 2;
    struct timespec now;
    struct statx stat;
    bool keep;

    if (fs->config.cache == FS_CACHE_ALWAYS)
        return true;
    keep = fs_statx(fd, "", &stat) == 0 && fs_keep_data(fs, node, &stat);
    clock_gettime(CLOCK_MONOTONIC, &now);
    now_ns = now.tv_sec * 1000000000ll + now.tv_nsec;
    pthread_mutex_lock(&fs->lock);
    keep = keep && now_ns - node->listed_ns < good_ns;
    if (!keep)
        node->listed_ns = now_ns;
    pthread_mutex_unlock(&fs->lock);
    return keep;
}

int fs_op_opendir(struct fs_call *call)
{
    struct fs *fs = call->fs;
    struct fuse_open_out out = {0};
    struct fs_ref ref;
    int ret = fs_ref_get(fs, call->header.nodeid, &ref);

    if (ret < 0)
        return ret;
    ret = ref.node->type == S_IFDIR ? fs_open_directory(ref.fd) : -ENOTDIR;
    if (ret >= 0 && fs->config.cache != FS_CACHE_NONE)
        out.open_flags = FOPEN_CACHE_DIR | (keep_names(fs, ref.node, ret) ? FOPEN_KEEP_CACHE : 0);
    if (ret >= 0)
        ret = fs_handle_add(fs, ref.node, ret, O_RDONLY, true, call->epoch, &out.fh);
    if (ret == 0)
        fs_reply(call, &out, sizeof(out));
    fs_ref_put(fs, &ref);
    return ret;
}

int fs_op_releasedir(struct fs_call *call)
{
    return fs_handle_close(call->fs, ((const struct fuse_release_in *)call->arg)->fh, true);
}

/* The next entry, NULL at the end or with *ret < 0. */
static const struct dirent64 *next_entry(struct fs_handle *handle, int *ret)
{
    ssize_t got;

    if (handle->begin == handle->end) {
        got = getdents64(handle->fd, handle->buffer, BUFFER_BYTES);
        if (got <= 0) {
            *ret = got < 0 ? -errno : 0;
            return NULL;
        }
        handle->begin = 0;
        handle->end = (unsigned)got;
    }
    return (const struct dirent64 *)(handle->buffer + handle->begin);
}

static void entry_done(struct fs_handle *handle, const struct dirent64 *entry)
{
    handle->position = (uint64_t)entry->d_off;
    handle->begin += entry->d_reclen;
}

/* Makes the next entry the one at `offset`. */
static int go_to(struct fs_handle *handle, uint64_t offset)
{
    if (!handle->buffer) {
        handle->buffer = malloc(BUFFER_BYTES);
        if (!handle->buffer)
            return -ENOMEM;
    } else if (handle->position == offset && offset) {
        return 0; /* a rewinding reader wants to see what is new */
    }
    if (lseek(handle->fd, (off_t)offset, SEEK_SET) < 0)
        return -errno;
    handle->position = offset;
    handle->begin = handle->end = 0;
    return 0;
}

static bool is_dots(const char *name)
{
    return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

static void reply_dirent(struct fs_call *call, const struct fs_handle *handle, const struct dirent64 *entry, size_t name_bytes)
{
    static const char zeros[FUSE_REC_ALIGN(1)];
    bool root_parent = handle->node == call->fs->root && !strcmp(entry->d_name, "..");
    struct fuse_dirent dirent = {
        .ino = root_parent ? handle->node->identity.inode : entry->d_ino, /* what is outside is nobody's business */
        .off = (uint64_t)entry->d_off,
        .namelen = (uint32_t)name_bytes,
        .type = entry->d_type,
    };
    uint64_t bytes = FUSE_NAME_OFFSET + name_bytes;

    fs_reply(call, &dirent, FUSE_NAME_OFFSET);
    fs_reply(call, entry->d_name, name_bytes);
    fs_reply(call, zeros, FUSE_DIRENT_ALIGN(bytes) - bytes);
}

/* The entry's attributes, or a node number of 0: the guest looks it up itself if it wants to. */
static void reply_plus(struct fs_call *call, const struct fs_ref *directory, const char *name)
{
    struct fuse_entry_out out = {0};
    struct fs_node *node;
    struct statx stat;

    if (!is_dots(name) && fs_node_lookup(call->fs, directory, name, call->epoch, &node, &stat) == 0)
        fs_fill_entry(call->fs, node, &stat, &out);
    fs_reply(call, &out, sizeof(out));
}

static int reply_entries(struct fs_call *call, struct fs_handle *handle, const struct fs_ref *plus, uint64_t limit)
{
    const struct dirent64 *entry;
    int ret = 0;

    while ((entry = next_entry(handle, &ret))) {
        size_t name_bytes = strlen(entry->d_name);
        uint64_t bytes = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + name_bytes) + (plus ? sizeof(struct fuse_entry_out) : 0);

        if (call->reply_bytes + bytes > limit) {
            ret = -EINVAL;
            break;
        }
        if (plus)
            reply_plus(call, plus, entry->d_name);
        reply_dirent(call, handle, entry, name_bytes);
        entry_done(handle, entry);
    }
    return call->reply_bytes ? 0 : ret;
}

static int read_directory(struct fs_call *call, bool plus)
{
    const struct fuse_read_in *in = call->arg;
    uint64_t room = fs_reply_room(call), limit = in->size < room ? in->size : room;
    struct fs_ref directory = {NULL, -1};
    struct fs_handle *handle;
    int ret = fs_handle_get(call->fs, in->fh, true, &handle);

    if (ret < 0)
        return ret;
    if (plus)
        ret = fs_ref_take(call->fs, handle->node, &directory);
    if (ret == 0) {
        pthread_mutex_lock(&handle->lock);
        ret = go_to(handle, in->offset);
        if (ret == 0)
            ret = reply_entries(call, handle, plus ? &directory : NULL, limit);
        pthread_mutex_unlock(&handle->lock);
    }
    fs_ref_put(call->fs, &directory);
    fs_handle_put(call->fs, handle);
    return ret;
}

int fs_op_readdir(struct fs_call *call)
{
    return read_directory(call, false);
}

int fs_op_readdirplus(struct fs_call *call)
{
    return read_directory(call, true);
}
