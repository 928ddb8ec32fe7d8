/*
 * Messages: taken apart, checked, handed to an operation, answered.
 *
 * A request's header, structure and names are copied out of guest memory once, before anything is looked at; only the data of a write is used where it lies.
 * Answers are written in place. The table says of each operation how long its structure is, which names follow, what an answer needs, and whether
 * a read-only share has it.
 * Threading: any number of threads; a call's structure is its thread's.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/fs_priv.h"

#define IN_HEADER_BYTES ((uint32_t)sizeof(struct fuse_in_header))
#define OUT_HEADER_BYTES ((uint32_t)sizeof(struct fuse_out_header))
#define COPY_BYTES 1024u /* on the stack; longer ones are allocated */
#define MINOR_MIN 31u
#define PAGE_BYTES 4096u
#define QUICK_BYTES (256u << 10) /* of data */

enum {
    WRITES = 1,    /* changes the directory or its files */
    NAME = 2,      /* a file's name follows the structure */
    NAME2 = 4,     /* and another one */
    TEXT = 8,      /* text follows, as the last of the names */
    DATA = 16,     /* what follows the structure is left where it is */
    NO_ANSWER = 32,
    BEFORE_INIT = 64,
    QUICK = 128,   /* a few microseconds of the host's time as a rule */
    MAKES = 256,   /* a file, whose owner is the guest's user */
};

struct operation {
    const char *name;
    fs_op_fn *run;
    uint16_t arg_bytes;   /* at least */
    uint16_t reply_bytes; /* the room it needs for its answer, without the header; more if it asks for it */
    uint16_t flags;
};

static fs_op_fn op_init, op_destroy;

#define ENTRY_BYTES sizeof(struct fuse_entry_out)
static const struct operation operations[] = {
    [FUSE_LOOKUP] = {"lookup", fs_op_lookup, 0, ENTRY_BYTES, NAME | QUICK},
    [FUSE_FORGET] = {"forget", fs_op_forget, sizeof(struct fuse_forget_in), 0, NO_ANSWER | QUICK},
    [FUSE_GETATTR] = {"getattr", fs_op_getattr, sizeof(struct fuse_getattr_in), sizeof(struct fuse_attr_out), QUICK},
    [FUSE_SETATTR] = {"setattr", fs_op_setattr, sizeof(struct fuse_setattr_in), sizeof(struct fuse_attr_out), WRITES | QUICK},
    [FUSE_READLINK] = {"readlink", fs_op_readlink, 0, 0, QUICK},
    [FUSE_SYMLINK] = {"symlink", fs_op_symlink, 0, ENTRY_BYTES, WRITES | NAME | TEXT | QUICK | MAKES},
    [FUSE_MKNOD] = {"mknod", fs_op_mknod, sizeof(struct fuse_mknod_in), ENTRY_BYTES, WRITES | NAME | QUICK | MAKES},
    [FUSE_MKDIR] = {"mkdir", fs_op_mkdir, sizeof(struct fuse_mkdir_in), ENTRY_BYTES, WRITES | NAME | QUICK | MAKES},
    [FUSE_UNLINK] = {"unlink", fs_op_unlink, 0, 0, WRITES | NAME | QUICK},
    [FUSE_RMDIR] = {"rmdir", fs_op_rmdir, 0, 0, WRITES | NAME | QUICK},
    [FUSE_RENAME] = {"rename", fs_op_rename, sizeof(struct fuse_rename_in), 0, WRITES | NAME | NAME2 | QUICK},
    [FUSE_LINK] = {"link", fs_op_link, sizeof(struct fuse_link_in), ENTRY_BYTES, WRITES | NAME | QUICK},
    [FUSE_OPEN] = {"open", fs_op_open, sizeof(struct fuse_open_in), sizeof(struct fuse_open_out), QUICK},
    [FUSE_READ] = {"read", fs_op_read, sizeof(struct fuse_read_in), 0, QUICK},
    [FUSE_WRITE] = {"write", fs_op_write, sizeof(struct fuse_write_in), sizeof(struct fuse_write_out), WRITES | DATA | QUICK},
    [FUSE_STATFS] = {"statfs", fs_op_statfs, 0, sizeof(struct fuse_statfs_out), QUICK},
    [FUSE_RELEASE] = {"release", fs_op_release, sizeof(struct fuse_release_in), 0, QUICK},
    [FUSE_FSYNC] = {"fsync", fs_op_fsync, sizeof(struct fuse_fsync_in), 0, 0},
    [FUSE_SETXATTR] = {"setxattr", fs_op_setxattr, FUSE_COMPAT_SETXATTR_IN_SIZE, 0, WRITES | TEXT | QUICK},
    [FUSE_GETXATTR] = {"getxattr", fs_op_getxattr, sizeof(struct fuse_getxattr_in), 0, TEXT | QUICK},
    [FUSE_LISTXATTR] = {"listxattr", fs_op_listxattr, sizeof(struct fuse_getxattr_in), 0, QUICK},
    [FUSE_REMOVEXATTR] = {"removexattr", fs_op_removexattr, 0, 0, WRITES | TEXT | QUICK},
    [FUSE_FLUSH] = {"flush", fs_op_flush, sizeof(struct fuse_flush_in), 0, QUICK},
    [FUSE_INIT] = {"init", op_init, offsetof(struct fuse_init_in, flags2), sizeof(struct fuse_init_out), BEFORE_INIT | QUICK},
    [FUSE_OPENDIR] = {"opendir", fs_op_opendir, sizeof(struct fuse_open_in), sizeof(struct fuse_open_out), QUICK},
    [FUSE_READDIR] = {"readdir", fs_op_readdir, sizeof(struct fuse_read_in), 0, QUICK},
    [FUSE_RELEASEDIR] = {"releasedir", fs_op_releasedir, sizeof(struct fuse_release_in), 0, QUICK},
    [FUSE_FSYNCDIR] = {"fsyncdir", fs_op_fsyncdir, sizeof(struct fuse_fsync_in), 0, 0},
    [FUSE_ACCESS] = {"access", fs_op_access, sizeof(struct fuse_access_in), 0, QUICK},
    [FUSE_CREATE] = {"create", fs_op_create, sizeof(struct fuse_create_in), ENTRY_BYTES + sizeof(struct fuse_open_out), WRITES | NAME | QUICK | MAKES},
    [FUSE_INTERRUPT] = {"interrupt", NULL, 0, 0, NO_ANSWER | QUICK}, /* nothing here waits for other guests' doings */
    [FUSE_DESTROY] = {"destroy", op_destroy, 0, 0, 0},
    [FUSE_IOCTL] = {"ioctl", fs_op_ioctl, 0, 0, QUICK},
    [FUSE_BATCH_FORGET] = {"batch_forget", fs_op_batch_forget, sizeof(struct fuse_batch_forget_in), 0, NO_ANSWER | QUICK},
    [FUSE_FALLOCATE] = {"fallocate", fs_op_fallocate, sizeof(struct fuse_fallocate_in), 0, WRITES},
    [FUSE_READDIRPLUS] = {"readdirplus", fs_op_readdirplus, sizeof(struct fuse_read_in), 0, QUICK},
    [FUSE_RENAME2] = {"rename2", fs_op_rename2, sizeof(struct fuse_rename2_in), 0, WRITES | NAME | NAME2 | QUICK},
    [FUSE_LSEEK] = {"lseek", fs_op_lseek, sizeof(struct fuse_lseek_in), sizeof(struct fuse_lseek_out), 0},
    [FUSE_COPY_FILE_RANGE] = {"copy_file_range", fs_op_copy_file_range, sizeof(struct fuse_copy_file_range_in), sizeof(struct fuse_write_out), WRITES},
    [FUSE_SYNCFS] = {"syncfs", fs_op_syncfs, sizeof(struct fuse_syncfs_in), 0, 0},
    [FUSE_TMPFILE] = {"tmpfile", fs_op_tmpfile, sizeof(struct fuse_create_in), ENTRY_BYTES + sizeof(struct fuse_open_out), WRITES | TEXT | QUICK | MAKES},
};
#define OPERATIONS (sizeof(operations) / sizeof(operations[0]))

/* ---- bytes of a message ---- */

unsigned fs_slice(const struct iovec *from, unsigned from_count, uint64_t offset, uint64_t length_bytes, struct iovec *iov)
{
    unsigned count = 0;

    for (unsigned i = 0; i < from_count && length_bytes; i++) {
        uint64_t part;

        if (offset >= from[i].iov_len) {
            offset -= from[i].iov_len;
            continue;
        }
        part = from[i].iov_len - offset;
        if (part > length_bytes)
            part = length_bytes;
        iov[count++] = (struct iovec){(uint8_t *)from[i].iov_base + offset, part};
        length_bytes -= part;
        offset = 0;
    }
    return count;
}

static void copy_out(const struct fs_message *message, uint64_t offset, void *data, uint64_t size_bytes)
{
    uint64_t done = 0;

    for (unsigned i = 0; i < message->in_count && done < size_bytes; i++) {
        uint64_t part;

        if (offset >= message->in[i].iov_len) {
            offset -= message->in[i].iov_len;
            continue;
        }
        part = message->in[i].iov_len - offset;
        if (part > size_bytes - done)
            part = size_bytes - done;
        memcpy((uint8_t *)data + done, (const uint8_t *)message->in[i].iov_base + offset, part);
        done += part;
        offset = 0;
    }
    /* The guest may be writing there: what was copied is what is looked at. */
    __asm__ volatile("" : : : "memory");
}

static void copy_in(const struct fs_message *message, uint64_t offset, const void *data, uint64_t size_bytes)
{
    uint64_t done = 0;

    for (unsigned i = 0; i < message->out_count && done < size_bytes; i++) {
        uint64_t part;

        if (offset >= message->out[i].iov_len) {
            offset -= message->out[i].iov_len;
            continue;
        }
        part = message->out[i].iov_len - offset;
        if (part > size_bytes - done)
            part = size_bytes - done;
        memcpy((uint8_t *)message->out[i].iov_base + offset, (const uint8_t *)data + done, part);
        done += part;
        offset = 0;
    }
}

uint64_t fs_reply_room(const struct fs_call *call)
{
    return call->message->out_bytes - OUT_HEADER_BYTES - call->reply_bytes;
}

void fs_reply(struct fs_call *call, const void *data, uint64_t size_bytes)
{
    copy_in(call->message, OUT_HEADER_BYTES + call->reply_bytes, data, size_bytes);
    call->reply_bytes += size_bytes;
}

/* ---- the connection ---- */

/* What is accepted if the guest's kernel offers it. Flags that say what a server wants of the kernel's caches are chosen by `cache`. */
static uint32_t wanted_flags(const struct fs *fs)
{
    uint32_t flags = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES | FUSE_ASYNC_DIO | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES | FUSE_HANDLE_KILLPRIV_V2 |
                     FUSE_INIT_EXT;

    if (fs->config.cache != FS_CACHE_ALWAYS)
        flags |= FUSE_AUTO_INVAL_DATA;
    if (fs->config.cache != FS_CACHE_NONE)
        flags |= FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO | FUSE_CACHE_SYMLINKS;
    if (fs->config.writeback && !fs->config.readonly && fs->config.cache != FS_CACHE_NONE)
        flags |= FUSE_WRITEBACK_CACHE;
    return flags;
}

static int op_init(struct fs_call *call)
{
    const struct fuse_init_in *in = call->arg;
    struct fs *fs = call->fs;
    struct fuse_init_out out = {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION};

    if (in->major > FUSE_KERNEL_VERSION) { /* the kernel asks again, with ours */
        fs_reply(call, &out, sizeof(out));
        return 0;
    }
    if (in->major < FUSE_KERNEL_VERSION || in->minor < MINOR_MIN)
        return -EPROTO;
    fs_reset(fs);
    out.max_readahead = in->max_readahead < FS_WRITE_BYTES_MAX ? in->max_readahead : FS_WRITE_BYTES_MAX;
    out.flags = wanted_flags(fs) & in->flags;
    out.max_background = 64;
    out.congestion_threshold = 48;
    out.max_write = FS_WRITE_BYTES_MAX;
    out.max_pages = FS_WRITE_BYTES_MAX / 4096;
    out.time_gran = 1;
    fs_reply(call, &out, sizeof(out));
    pthread_mutex_lock(&fs->lock);
    fs->initialized = true;
    pthread_mutex_unlock(&fs->lock);
    return 0;
}

static int op_destroy(struct fs_call *call)
{
    fs_reset(call->fs);
    return 0;
}

/* ---- calls ---- */

/* A component that can be looked up in a directory. */
bool fs_name_valid(const char *name)
{
    return *name && strlen(name) <= FS_NAME_BYTES_MAX && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

/* The text at *offset of the arguments; NULL: it does not end. */
static const char *take_text(const struct fs_call *call, uint64_t *offset)
{
    const char *text = (const char *)call->arg + *offset;
    uint64_t rest = call->arg_bytes - *offset, length = strnlen(text, rest);

    if (length == rest)
        return NULL;
    *offset += length + 1;
    return text;
}

static int take_names(struct fs_call *call, const struct operation *operation)
{
    uint64_t offset = operation->arg_bytes;
    unsigned names = (operation->flags & NAME ? 1 : 0) + (operation->flags & NAME2 ? 1 : 0);
    const char **place[] = {&call->name, &call->name2, NULL};
    unsigned used = 0;

    for (; used < names; used++) {
        *place[used] = take_text(call, &offset);
        if (!*place[used])
            return -EINVAL;
        if (strlen(*place[used]) > FS_NAME_BYTES_MAX)
            return -ENAMETOOLONG;
        if (!fs_name_valid(*place[used]))
            return -EINVAL;
    }
    if (operation->flags & TEXT) {
        *place[used] = take_text(call, &offset);
        if (!*place[used])
            return -EINVAL;
    }
    return 0;
}

static int run(struct fs_call *call, const struct operation *operation)
{
    uint64_t wanted = call->header.len - IN_HEADER_BYTES;
    uint8_t small[COPY_BYTES] __attribute__((aligned(8)));
    uint8_t *copy = small;
    int ret;

    if (wanted < operation->arg_bytes)
        return -EINVAL;
    if (operation->flags & DATA)
        wanted = operation->arg_bytes;
    if (wanted > FS_ARGUMENTS_MAX)
        return -E2BIG;
    if (wanted > sizeof(small)) {
        copy = malloc(wanted);
        if (!copy)
            return -ENOMEM;
    }
    copy_out(call->message, IN_HEADER_BYTES, copy, wanted);
    call->arg = copy;
    call->arg_bytes = wanted;
    ret = take_names(call, operation);
    if (ret == 0)
        ret = operation->run(call);
    if (copy != small)
        free(copy);
    return ret;
}

static int check_and_run(struct fs_call *call, const struct operation *operation)
{
    struct fs *fs = call->fs;
    bool initialized;

    pthread_mutex_lock(&fs->lock);
    initialized = fs->initialized;
    call->epoch = fs->epoch;
    pthread_mutex_unlock(&fs->lock);
    if (!operation || !operation->name)
        return -ENOSYS;
    if (!operation->run)
        return 0;
    if (!initialized && !(operation->flags & BEFORE_INIT))
        return -EIO;
    if (fs->config.readonly && (operation->flags & WRITES))
        return -EROFS;
    if (!(operation->flags & NO_ANSWER) && fs_reply_room(call) < operation->reply_bytes)
        return -EINVAL;
    return run(call, operation);
}

bool fs_is_quick(const struct fs *fs, const struct fs_message *message)
{
    const struct operation *operation;
    struct fuse_in_header header;
    uint32_t valid;

    if (message->in_bytes < IN_HEADER_BYTES || message->in_bytes > QUICK_BYTES + PAGE_BYTES || message->out_bytes > QUICK_BYTES + PAGE_BYTES)
        return false;
    copy_out(message, 0, &header, sizeof(header));
    operation = header.opcode < OPERATIONS ? &operations[header.opcode] : NULL;
    if (!operation || !(operation->flags & QUICK) || !fs->local)
        return false;
    if (operation->flags & MAKES && fs->privileged && (header.uid != fs->own_uid || header.gid != fs->own_gid))
        return false; /* such calls change who the thread is */
    if (header.opcode == FUSE_SETATTR) {
        copy_out(message, IN_HEADER_BYTES, &valid, sizeof(valid));
        return !(valid & FATTR_SIZE);
    }
    return true;
}

bool fs_serve_forget(struct fs *fs, const struct fs_message *message)
{
    struct fs_call call = {.fs = fs, .message = message};

    if (message->in_bytes < IN_HEADER_BYTES)
        return false;
    copy_out(message, 0, &call.header, IN_HEADER_BYTES);
    if (call.header.opcode != FUSE_FORGET)
        return false;
    if (call.header.len >= IN_HEADER_BYTES && call.header.len <= message->in_bytes)
        (void)check_and_run(&call, &operations[FUSE_FORGET]);
    return true;
}

uint64_t fs_serve(struct fs *fs, const struct fs_message *message)
{
    struct fs_call call = {.fs = fs, .message = message};
    const struct operation *operation = NULL;
    struct fuse_out_header answer;
    int ret;

    if (message->in_bytes < IN_HEADER_BYTES)
        return 0;
    copy_out(message, 0, &call.header, IN_HEADER_BYTES);
    if (call.header.opcode < OPERATIONS)
        operation = &operations[call.header.opcode];
    if (!(operation && operation->flags & NO_ANSWER) && message->out_bytes < OUT_HEADER_BYTES)
        return 0;
    if (call.header.len < IN_HEADER_BYTES || call.header.len > message->in_bytes)
        ret = -EINVAL;
    else
        ret = check_and_run(&call, operation);
    if (operation && operation->flags & NO_ANSWER)
        return 0;
    answer = (struct fuse_out_header){
        .len = OUT_HEADER_BYTES + (ret < 0 ? 0 : (uint32_t)call.reply_bytes),
        .error = ret,
        .unique = call.header.unique,
    };
    copy_in(message, 0, &answer, sizeof(answer));
    return answer.len;
}
