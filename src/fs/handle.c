/*
 * Handles: the files and directories that the guest has open.
 *
 * A handle holds its node, and is closed when the guest has released it and no call uses it any more.
 * Threading: fs->lock; a directory's buffer has a lock of its own.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "fs/fs_priv.h"
#include "util/log.h"

static void handle_free(struct fs *fs, struct fs_handle *handle)
{
    if (handle->fd >= 0)
        close(handle->fd);
    pthread_mutex_destroy(&handle->lock);
    free(handle->buffer);
    fs_node_put(fs, handle->node);
    free(handle);
}

/* With the lock: true when the caller has to free it afterwards, without the lock. */
static bool unuse(struct fs *fs, struct fs_handle *handle)
{
    if (--handle->uses)
        return false;
    fs->handle_count--;
    fs->directory_count -= handle->directory;
    return true;
}

static struct fs_handle *handle_create(struct fs *fs, struct fs_node *node, int fd, uint32_t flags, bool directory)
{
    struct fs_handle *handle = NULL;

    if (fs->handle_count < fs->handles_max && (!directory || fs->directory_count < FS_DIRECTORIES_MAX))
        handle = calloc(1, sizeof(*handle));
    if (!handle)
        return NULL;
    handle->node = node;
    handle->fd = fd;
    handle->flags = flags;
    handle->directory = directory;
    handle->uses = 1; /* the guest's */
    pthread_mutex_init(&handle->lock, NULL);
    node->uses++;
    fs->handle_count++;
    fs->directory_count += directory;
    return handle;
}

int fs_handle_add(struct fs *fs, struct fs_node *node, int fd, uint32_t flags, bool directory, uint32_t epoch, uint64_t *id)
{
    struct fs_handle *handle = NULL;

    pthread_mutex_lock(&fs->lock);
    if (fs->epoch == epoch)
        handle = handle_create(fs, node, fd, flags, directory);
    if (handle && fs_slots_add(&fs->handles, &handle->id) < 0) {
        unuse(fs, handle);
        pthread_mutex_unlock(&fs->lock);
        handle_free(fs, handle);
        return -ENFILE;
    }
    if (handle)
        *id = handle->id;
    pthread_mutex_unlock(&fs->lock);
    if (!handle)
        close(fd);
    return handle ? 0 : -ENFILE;
}

int fs_handle_get(struct fs *fs, uint64_t id, bool directory, struct fs_handle **out)
{
    struct fs_handle *handle;
    int ret = 0;

    *out = NULL;
    pthread_mutex_lock(&fs->lock);
    handle = fs_slots_find(&fs->handles, id);
    if (!handle || handle->directory != directory)
        ret = -EBADF;
    else if (handle->fd < 0)
        ret = -ESTALE;
    if (ret == 0) {
        handle->uses++;
        *out = handle;
    }
    pthread_mutex_unlock(&fs->lock);
    return ret;
}

void fs_handle_put(struct fs *fs, struct fs_handle *handle)
{
    bool last;

    if (!handle)
        return;
    pthread_mutex_lock(&fs->lock);
    last = unuse(fs, handle);
    pthread_mutex_unlock(&fs->lock);
    if (last)
        handle_free(fs, handle);
}

int fs_handle_close(struct fs *fs, uint64_t id, bool directory)
{
    struct fs_handle *handle;

    pthread_mutex_lock(&fs->lock);
    handle = fs_slots_find(&fs->handles, id);
    if (handle && handle->directory == directory)
        fs_slots_remove(&fs->handles, id);
    else
        handle = NULL;
    pthread_mutex_unlock(&fs->lock);
    if (!handle)
        return -EBADF;
    fs_handle_put(fs, handle);
    return 0;
}

void fs_handles_drop(struct fs *fs)
{
    for (uint32_t i = 1;; i++) {
        struct fs_handle *handle;

        pthread_mutex_lock(&fs->lock);
        if (i >= fs->handles.capacity) {
            pthread_mutex_unlock(&fs->lock);
            return;
        }
        handle = (struct fs_handle *)fs->handles.item[i];
        if (handle)
            fs_slots_remove(&fs->handles, handle->id);
        pthread_mutex_unlock(&fs->lock);
        fs_handle_put(fs, handle);
    }
}

/* ---- state ---- */

/* Opens it again; what cannot be opened stays a handle that answers ESTALE. */
static int reopen(struct fs *fs, struct fs_node *node, uint32_t flags, bool directory)
{
    struct fs_ref ref;
    int fd = fs_ref_take(fs, node, &ref);

    if (fd < 0)
        return fd;
    fd = directory ? fs_open_directory(ref.fd) : fs_open_file(fs, node, ref.fd, flags & ~(uint32_t)O_TRUNC);
    fs_ref_put(fs, &ref);
    return fd;
}

static void load_handle(struct fs *fs, struct state_io *io, unsigned *lost)
{
    uint64_t id, node_id;
    uint32_t flags;
    bool directory;
    struct fs_node *node;
    struct fs_handle *handle;
    int fd;

    state_u64(io, &id);
    state_u64(io, &node_id);
    state_u32(io, &flags);
    state_bool(io, &directory);
    if (state_failed(io))
        return;
    node = fs_slots_find(&fs->nodes, node_id);
    if (!node || directory != S_ISDIR(node->type)) {
        state_fail(io, "an open file is none that the guest knows");
        return;
    }
    fd = reopen(fs, node, flags, directory);
    pthread_mutex_lock(&fs->lock);
    handle = handle_create(fs, node, fd < 0 ? -1 : fd, flags, directory);
    if (!handle || fs_slots_add_as(&fs->handles, &handle->id, id) < 0)
        state_fail(io, "too many open files, or one twice");
    pthread_mutex_unlock(&fs->lock);
    if (!handle && fd >= 0)
        close(fd);
    else if (handle && handle->id == 0)
        fs_handle_put(fs, handle);
    *lost += fd < 0;
}

static void save_handle(struct fs_handle *handle, struct state_io *io)
{
    state_u64(io, &handle->id);
    state_u64(io, &handle->node->id);
    state_u32(io, &handle->flags);
    state_bool(io, &handle->directory);
}

void fs_handles_state(struct fs *fs, struct state_io *io)
{
    uint32_t count = fs->handle_count;
    unsigned lost = 0;

    state_u64(io, &fs->handles.sequence);
    state_u32(io, &count);
    if (state_loading(io)) {
        for (uint32_t i = 0; i < count && !state_failed(io); i++)
            load_handle(fs, io, &lost);
        fs_slots_settle(&fs->handles);
        if (lost)
            log_warning("share %s: %u files that the guest has open cannot be opened again; it will see ESTALE", fs->path, lost);
        return;
    }
    for (uint32_t i = 1; i < fs->handles.capacity; i++) {
        if (fs->handles.item[i])
            save_handle((struct fs_handle *)fs->handles.item[i], io);
    }
}
