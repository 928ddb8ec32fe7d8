/*
 * Raw images: the disk's bytes are a file's or a block device's.
 *
 * A request becomes one task after another: short transfers are continued, and writing zeroes tries cheaper ways first. A flush that failed stays failed: the
 * kernel forgets the dirty pages that it could not write, so a later fdatasync that succeeds would be a lie (fsync(2), NOTES).
 * Invariant: the lock (an open file description lock on the whole file) is held as long as the descriptor is open.
 * Threading: with the device lock held.
 */
#include "block/block_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW_IF(IN_LOOP, fcntl, ARG_IS(1, F_OFD_SETLK)); /* images that come and go while a machine runs */
/* Overlays that are not used after all. */
SANDBOX_ALLOW(IN_LOOP, close);

#define SECTOR_BYTES 512u
#define RETRIES_MAX 16u
#define ZERO_VECTORS 16u

struct raw {
    int fd;
    int flush_error; /* sticky */
    bool full_logged, error_logged;
    bool no_punch, no_zero_range; /* the host's file system cannot do it */
};

struct raw_request {
    struct block_task task; /* first */
    struct block *block;
    struct block_request *request;
    uint64_t done_bytes;
    unsigned retries;
    struct iovec *iov; /* own vectors, when the request's do not fit any more */
};

static const uint8_t zeroes[65536];

/* ---- requests ---- */

static void raw_task_done(struct block_task *task, int64_t result);

static void finish(struct raw_request *r, int result)
{
    struct block *block = r->block;
    struct block_request *request = r->request;

    free(r->iov);
    free(r);
    block_complete(block, request, result);
}

static void log_failure(struct block *block, const struct block_request *request, int result)
{
    static const char *const verbs[] = {
        [BLOCK_READ] = "reading", [BLOCK_WRITE] = "writing", [BLOCK_FLUSH] = "flushing", [BLOCK_DISCARD] = "discarding", [BLOCK_WRITE_ZEROES] = "zeroing",
    };
    struct raw *raw = block->private;
    bool full = result == -ENOSPC || result == -EDQUOT || result == -EFBIG;
    bool *logged = full ? &raw->full_logged : &raw->error_logged;

    if (*logged)
        return;
    *logged = true;
    if (full)
        log_error("disk %s: %s failed: %s; make room on the host", block->path, verbs[request->op], strerror(-result));
    else
        log_error("disk %s: %s failed at byte %llu: %s; the guest sees I/O errors", block->path, verbs[request->op],
                  (unsigned long long)request->offset_bytes, strerror(-result));
}

/* Vectors for what is left of a read or a write. */
static int remaining_vectors(struct raw_request *r)
{
    const struct block_request *request = r->request;
    uint64_t skip = r->done_bytes;
    unsigned count = 0;

    if (skip == 0) {
        r->task.iov = request->iov;
        r->task.iov_count = request->iov_count < BLOCK_TASK_IOV_MAX ? request->iov_count : BLOCK_TASK_IOV_MAX;
        return 0;
    }
    if (!r->iov)
        r->iov = malloc(BLOCK_TASK_IOV_MAX * sizeof(*r->iov));
    if (!r->iov)
        return -ENOMEM;
    for (unsigned i = 0; i < request->iov_count && count < BLOCK_TASK_IOV_MAX; i++) {
        if (skip >= request->iov[i].iov_len) {
            skip -= request->iov[i].iov_len;
            continue;
        }
        r->iov[count++] = (struct iovec){(uint8_t *)request->iov[i].iov_base + skip, request->iov[i].iov_len - skip};
        skip = 0;
    }
    r->task.iov = r->iov;
    r->task.iov_count = count;
    return 0;
}

static int zero_vectors(struct raw_request *r)
{
    uint64_t left = r->request->length_bytes - r->done_bytes;
    unsigned count = 0;

    if (!r->iov)
        r->iov = malloc(ZERO_VECTORS * sizeof(*r->iov));
    if (!r->iov)
        return -ENOMEM;
    for (; left && count < ZERO_VECTORS; count++) {
        r->iov[count] = (struct iovec){(void *)(uintptr_t)zeroes, left < sizeof(zeroes) ? left : sizeof(zeroes)};
        left -= r->iov[count].iov_len;
    }
    r->task.iov = r->iov;
    r->task.iov_count = count;
    return 0;
}

/* The next task of a request. */
static int prepare(struct raw_request *r)
{
    const struct block_request *request = r->request;
    struct raw *raw = r->block->private;
    struct block_task *task = &r->task;

    task->fd = raw->fd;
    task->done = raw_task_done;
    task->offset_bytes = request->offset_bytes + r->done_bytes;
    task->length_bytes = request->length_bytes - r->done_bytes;
    switch (request->op) {
    case BLOCK_READ:
        task->kind = TASK_READ;
        return remaining_vectors(r);
    case BLOCK_WRITE:
        task->kind = TASK_WRITE;
        return remaining_vectors(r);
    case BLOCK_FLUSH:
        task->kind = TASK_SYNC;
        return 0;
    case BLOCK_DISCARD:
        task->kind = TASK_FALLOCATE;
        task->mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        return 0;
    case BLOCK_WRITE_ZEROES:
        task->kind = TASK_FALLOCATE;
        if (request->may_unmap && !raw->no_punch) {
            task->mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
            return 0;
        }
        if (!raw->no_zero_range) {
            task->mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
            return 0;
        }
        task->kind = TASK_WRITE;
        return zero_vectors(r);
    }
    return -EINVAL;
}

static void go_on(struct raw_request *r)
{
    int ret = prepare(r);

    if (ret < 0)
        finish(r, ret);
    else
        r->block->io->ops->submit(r->block->io, &r->task);
}

/* fallocate said no: true when there is another way, which go_on will take. */
static bool fall_back(struct raw *raw, const struct block_task *task, int64_t result)
{
    if (task->kind != TASK_FALLOCATE || (result != -EOPNOTSUPP && result != -EINVAL && result != -ENOSYS && result != -ENODEV))
        return false;
    if (task->mode & FALLOC_FL_PUNCH_HOLE)
        raw->no_punch = true;
    else
        raw->no_zero_range = true;
    return true;
}

/* Behind the end of the file. */
static int clear_rest(struct raw_request *r)
{
    while (r->done_bytes < r->request->length_bytes) {
        uint64_t bytes = 0;
        int ret = remaining_vectors(r);

        if (ret < 0)
            return ret;
        for (unsigned i = 0; i < r->task.iov_count; i++) {
            memset(r->task.iov[i].iov_base, 0, r->task.iov[i].iov_len);
            bytes += r->task.iov[i].iov_len;
        }
        r->done_bytes += bytes;
    }
    return 0;
}

static void raw_task_done(struct block_task *task, int64_t result)
{
    struct raw_request *r = (struct raw_request *)task;
    const struct block_request *request = r->request;
    struct raw *raw = r->block->private;

    if ((result == -EINTR || result == -EAGAIN) && r->retries++ < RETRIES_MAX) {
        go_on(r);
        return;
    }
    if (result < 0 && fall_back(raw, task, result)) {
        if (request->op == BLOCK_DISCARD)
            finish(r, 0); /* discarding is advice */
        else
            go_on(r);
        return;
    }
    if ((task->kind == TASK_READ || task->kind == TASK_WRITE) && result >= 0) {
        r->done_bytes += (uint64_t)result;
        if (result > 0 && r->done_bytes < request->length_bytes) {
            r->retries = 0;
            go_on(r);
            return;
        }
        if (r->done_bytes < request->length_bytes && task->kind == TASK_READ && r->block->beneath && clear_rest(r) == 0)
            result = 0;
        else if (r->done_bytes < request->length_bytes)
            result = task->kind == TASK_READ ? -EIO : -ENOSPC; /* the file was cut; the device is full */
    }
    if (result < 0) {
        log_failure(r->block, request, (int)result);
        if (request->op == BLOCK_FLUSH)
            raw->flush_error = (int)result;
    }
    finish(r, result < 0 ? (int)result : 0);
}

static void raw_submit(struct block *block, struct block_request *request)
{
    struct raw *raw = block->private;
    struct raw_request *r;

    if (request->op == BLOCK_FLUSH && raw->flush_error) {
        block_complete_later(block, request, raw->flush_error);
        return;
    }
    if (request->op == BLOCK_DISCARD && raw->no_punch) {
        block_complete_later(block, request, 0);
        return;
    }
    r = calloc(1, sizeof(*r));
    if (r) {
        r->block = block;
        r->request = request;
    }
    if (!r || prepare(r) < 0) {
        free(r);
        block_complete_later(block, request, -ENOMEM);
        return;
    }
    block->io->ops->submit(block->io, &r->task);
}

/* ---- opening ---- */

static int open_error(const char *path, bool readonly, int code, struct error *err)
{
    switch (-code) {
    case ENOENT:
        return error_set(err, code, "disk %s: no such file; an empty one is made by: truncate -s 10G %s", path, path);
    case EISDIR:
        return error_set(err, code, "disk %s: is a directory; name an image file or a block device", path);
    case EACCES:
    case EPERM:
    case EROFS:
        if (readonly)
            return error_set(err, code, "disk %s: no permission to read it; change its mode or owner", path);
        return error_set(err, code, "disk %s: no permission to write it (%s); change its mode or owner, or add \",readonly\"", path,
                         strerror(-code));
    default:
        return error_set(err, code, "disk %s: cannot be opened: %s", path, strerror(-code));
    }
}

static int find_size(int fd, const char *path, bool beneath, uint64_t *size_bytes, struct error *err)
{
    struct stat st;

    if (fstat(fd, &st) < 0)
        return open_error(path, false, -errno, err);
    if (S_ISDIR(st.st_mode))
        return open_error(path, false, -EISDIR, err);
    if (S_ISREG(st.st_mode)) {
        *size_bytes = (uint64_t)st.st_size;
    } else if (!S_ISBLK(st.st_mode)) {
        return error_set(err, -EINVAL, "disk %s: is neither a file nor a block device", path);
    } else if (ioctl(fd, BLKGETSIZE64, size_bytes) < 0) {
        int ret = -errno;
        return error_set(err, ret, "disk %s: cannot find the device's size: %s", path, strerror(-ret));
    }
    if (beneath && *size_bytes <= INT64_MAX - SECTOR_BYTES) { /* its last bytes may be less than a sector */
        *size_bytes = (*size_bytes + SECTOR_BYTES - 1) / SECTOR_BYTES * SECTOR_BYTES;
        return 0;
    }
    if (*size_bytes == 0)
        return error_set(err, -EINVAL, "disk %s: is empty; give it a size with: truncate -s 10G %s", path, path);
    if (*size_bytes % SECTOR_BYTES)
        return error_set(err, -EINVAL, "disk %s: its size of %llu bytes is not a multiple of 512; round it up with: truncate -s %%512 %s",
                         path, (unsigned long long)*size_bytes, path);
    return 0;
}

/*
 * A writer has the whole file. Readers lock two bytes of it only, which keeps writers away; they are those that mean "I read" and "nobody may write" to qemu-img and its relatives, which can
 * look at what is not written meanwhile, then.
 */
static int set_lock(int fd, bool readonly)
{
    static const struct {
        short type;
        off_t start, length; /* 0: to the end */
    } steps[] = {{F_WRLCK, 0, 0}, {F_RDLCK, 0, 0}, {F_UNLCK, 0, 100}, {F_UNLCK, 101, 100}, {F_UNLCK, 202, 0}};
    unsigned count = readonly ? sizeof(steps) / sizeof(steps[0]) : 1;

    for (unsigned i = readonly ? 1 : 0; i < count; i++) {
        struct flock lock = {.l_type = steps[i].type, .l_whence = SEEK_SET, .l_start = steps[i].start, .l_len = steps[i].length};

        if (fcntl(fd, F_OFD_SETLK, &lock) < 0)
            return -errno;
    }
    return 0;
}

static int lock_image(int fd, const char *path, bool readonly, struct error *err)
{
    int ret = set_lock(fd, readonly);

    if (ret == 0)
        return 0;
    if (ret == -EAGAIN || ret == -EACCES)
        return error_set(err, -EBUSY, "disk %s: in use by another virtual machine or program; stop that one, %s", path,
                         readonly ? "or make it use the image readonly too" : "use a copy, or add \",readonly\" to both");
    log_warning("disk %s: cannot be locked (%s): make sure that nothing else uses it", path, strerror(-ret));
    return 0;
}

/* Whoever has it yet holds a lock, and if this is the same file, it can be seen here. */
static int look_for_lock(int fd, const char *path, struct error *err)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};

    if (fcntl(fd, F_OFD_GETLK, &lock) < 0 || lock.l_type != F_UNLCK)
        return 0;
    return error_set(err, -ESTALE, "disk %s: the machine that is to come does not use this file: it has to be the same one on both sides, on storage that both share", path);
}

static int raw_give(struct block *block, bool away, struct error *err)
{
    const struct raw *raw = block->private;
    struct flock lock = {.l_type = F_UNLCK, .l_whence = SEEK_SET};

    if (!away)
        return lock_image(raw->fd, block->path, false, err);
    return fcntl(raw->fd, F_OFD_SETLK, &lock) == 0 ? 0 : error_set(err, -errno, "disk %s: cannot be unlocked: %s", block->path, strerror(errno));
}

static void raw_close(struct block *block)
{
    struct raw *raw = block->private;

    if (!raw)
        return;
    if (raw->fd >= 0)
        close(raw->fd);
    free(raw);
    block->private = NULL;
}

/* Between opening and locking: images of snapshots that are merged get their place in one step (image.h). */
static bool was_replaced(int fd, const char *path)
{
    struct stat ours, theirs;

    return fstat(fd, &ours) == 0 && stat(path, &theirs) == 0 && (ours.st_dev != theirs.st_dev || ours.st_ino != theirs.st_ino);
}

static int raw_open_fd(struct block *block, const struct block_config *config, int fd, struct error *err)
{
    struct raw *raw = calloc(1, sizeof(*raw));
    int ret;

    if (!raw) {
        if (fd >= 0)
            close(fd);
        return error_set(err, -ENOMEM, "disk %s: no memory", config->path);
    }
    block->private = raw;
    raw->fd = fd;
    if (fd < 0) /* O_NONBLOCK: somebody may name a pipe */
        raw->fd = open(config->path, (config->readonly || config->later ? O_RDONLY : O_RDWR) | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (raw->fd < 0)
        ret = open_error(config->path, config->readonly, -errno, err);
    else
        ret = find_size(raw->fd, config->path, block->beneath, &block->size_bytes, err);
    if (ret == 0)
        ret = config->later ? (config->beside ? 0 : look_for_lock(raw->fd, config->path, err)) : lock_image(raw->fd, config->path, config->readonly, err);
    if (ret == 0 && fd < 0 && !config->readonly && was_replaced(raw->fd, config->path))
        ret = error_set(err, -EBUSY, "disk %s: was replaced by another file just now; try again", config->path);
    if (ret == 0 && fd < 0 && fcntl(raw->fd, F_SETFL, 0) < 0) /* with O_NONBLOCK io_uring gives up instead of waiting */
        ret = open_error(config->path, config->readonly, -errno, err);
    if (ret == 0 && !block->io)
        ret = block_io_create(&block->io, config->io, block->loop, err);
    if (ret < 0) {
        raw_close(block);
        return ret;
    }
    block->readonly = config->readonly;
    block->can_discard = !config->readonly;
    return 0;
}

static int raw_open(struct block *block, const struct block_config *config, struct error *err)
{
    return raw_open_fd(block, config, -1, err);
}

int block_open_file(struct block **out, const struct block_config *config, int fd, struct block_io *io, struct loop *loop, struct error *err)
{
    struct block *block = block_create(config->path, loop);
    int ret;

    *out = NULL;
    if (!block) {
        if (fd >= 0)
            close(fd);
        return error_set(err, -ENOMEM, "disk %s: no memory", config->path);
    }
    block->beneath = true;
    block->io = io;
    if (io)
        io->users++;
    ret = raw_open_fd(block, config, fd, err);
    if (ret < 0) {
        block_close(block);
        return ret;
    }
    block->ops = &block_raw_ops;
    *out = block;
    return 0;
}

int block_raw_fd(const struct block *block)
{
    const struct raw *raw = block->private;

    return raw->fd;
}

static int raw_freeze(struct block *block, bool freeze, struct error *err)
{
    const struct raw *raw = block->private;
    int ret = lock_image(raw->fd, block->path, freeze, err);

    if (ret == 0) {
        block->readonly = freeze;
        block->can_discard = !freeze;
    }
    return ret;
}

static int raw_settle(struct block *block)
{
    const struct raw *raw = block->private;

    return raw->flush_error ? raw->flush_error : fdatasync(raw->fd) < 0 ? -errno : 0;
}

static bool raw_holds(const struct block *block, const char *path)
{
    const struct raw *raw = block->private;
    struct stat ours, theirs;

    return fstat(raw->fd, &ours) == 0 && stat(path, &theirs) == 0 && ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino;
}

static int raw_refresh(struct block *block, struct error *err)
{
    const struct raw *raw = block->private;
    uint64_t size_bytes;
    int ret = find_size(raw->fd, block->path, block->beneath, &size_bytes, err);

    if (ret == 0)
        block->size_bytes = size_bytes;
    return ret;
}

const struct block_ops block_raw_ops = {
    .name = "raw",
    .open = raw_open,
    .close = raw_close,
    .holds = raw_holds,
    .refresh = raw_refresh,
    .submit = raw_submit,
    .settle = raw_settle,
    .freeze = raw_freeze,
    .give = raw_give,
};
