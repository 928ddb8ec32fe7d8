/*
 * Inside the fs folder. serve.c takes a message apart and calls an operation of op_*.c; these work on nodes (node.c: what the guest knows by number) and
 * handles (handle.c: what it has open).
 *
 * Locks: fs->lock guards nodes, handles and the table of devices, and is never held over a system call that may wait. A handle's directory lock comes before it.
 */
#ifndef DOPPEL_FS_FS_PRIV_H
#define DOPPEL_FS_FS_PRIV_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>
#include <sys/stat.h>

#include "fs/fs.h"

#define FS_NAME_BYTES_MAX 255u
#define FS_ARGUMENTS_MAX ((64u << 10) + 1024u) /* the largest is an extended attribute's value */
#define FS_NODE_BYTES_MAX (128ull << 20)       /* memory for all nodes and their names */
#define FS_DIRECTORIES_MAX 4096u               /* open at a time; each has a buffer */
#define FS_DEVICES_MAX 256u
#define FS_WRITE_BYTES_MAX (1u << 20)

/* ---- numbered objects ---- */

/* Objects by number: the low bits are an index, the rest tells its users apart. An object begins with its number. */
#define FS_SLOT_BITS 20
struct fs_slots {
    uint64_t **item;
    uint32_t *free;
    uint32_t capacity, free_count;
    uint64_t sequence;
};

int fs_slots_add(struct fs_slots *slots, uint64_t *object);                   /* gives it a number; -ENFILE, -ENOMEM */
int fs_slots_add_as(struct fs_slots *slots, uint64_t *object, uint64_t id);   /* one that it had; -EEXIST, -EINVAL, -ENOMEM */
void fs_slots_settle(struct fs_slots *slots);                                 /* after the last add_as */
void *fs_slots_find(const struct fs_slots *slots, uint64_t id);
void fs_slots_remove(struct fs_slots *slots, uint64_t id);
void fs_slots_clear(struct fs_slots *slots);

/* ---- nodes ---- */

/* What makes a file the same one: inode numbers are used again, times of birth are not. */
struct fs_identity {
    uint64_t device, inode, birth_ns;
};

struct fs_node {
    uint64_t id; /* first */
    struct fs_identity identity;
    uint32_t type;    /* S_IFMT */
    uint64_t lookups; /* what the guest holds */
    uint32_t uses;    /* calls, children and handles that need this structure */
    uint32_t pins;    /* calls that need `fd` */
    int fd;           /* O_PATH, or -1: reopened by parent and name */
    struct fs_node *parent; /* NULL: the root, or a file whose name is gone and which is its `fd` only */
    char *name;
    struct fs_node *hash_next;
    TAILQ_ENTRY(fs_node) recent; /* while fd may be closed */
    bool in_recent;
    bool saved; /* while the state is saved: written; while it is loaded: kept for those who need it */
    /* The file's last known change, when it is certain that a later one shows; for keeping the guest's cached data. */
    bool stamped;
    int64_t stamp_ns;
    uint64_t stamp_bytes;
    int64_t listed_ns; /* of a directory: when the guest was last told to read it anew, CLOCK_MONOTONIC */
};

/* A file system that is in the shared directory. */
struct fs_device {
    uint64_t device;
    bool refused; /* the kernel's own (/proc ...): not entered */
    bool local;
};

struct fs_handle {
    uint64_t id; /* first */
    struct fs_node *node;
    int fd; /* -1: could not be opened again after loading */
    uint32_t flags;
    unsigned uses;
    bool directory;
    /* Of directories, guarded by `lock`. */
    pthread_mutex_t lock;
    uint64_t position; /* of the entry at `begin` */
    unsigned begin, end;
    uint8_t *buffer;
};

struct fs {
    struct fs_config config;
    char *path;
    int proc_fd; /* /proc/self/fd: how an O_PATH descriptor becomes another */
    bool privileged;
    bool local; /* the directory's file system needs no network */
    uint32_t own_uid, own_gid;
    uint64_t clock_tick_ns;
    uint32_t umask; /* of the process */

    pthread_mutex_t lock; /* all below */
    bool initialized;
    uint32_t epoch; /* of resets */
    struct fs_node *root;
    struct fs_slots nodes, handles;
    struct fs_node **hash;
    unsigned hash_size, node_count, handle_count, directory_count;
    uint64_t node_bytes;
    unsigned fd_count, fd_max, handles_max; /* descriptors of nodes, limits */
    TAILQ_HEAD(fs_node_list, fs_node) recent;
    struct fs_device device[FS_DEVICES_MAX];
    _Atomic unsigned device_count;
};

/* A node during a call. */
struct fs_ref {
    struct fs_node *node;
    int fd;
};

int fs_nodes_create(struct fs *fs, int root_fd, const struct statx *stat);
void fs_nodes_drop(struct fs *fs); /* all that the guest holds, but for the root */
void fs_nodes_destroy(struct fs *fs);

/* By number, without or with its descriptor. -ESTALE: no such node. */
int fs_node_get(struct fs *fs, uint64_t id, struct fs_node **node);
void fs_node_put(struct fs *fs, struct fs_node *node);
int fs_ref_get(struct fs *fs, uint64_t id, struct fs_ref *ref);
int fs_ref_take(struct fs *fs, struct fs_node *node, struct fs_ref *ref); /* for a node in use */
void fs_ref_put(struct fs *fs, struct fs_ref *ref);

int fs_node_stat(struct fs *fs, struct fs_node *node, struct statx *stat);
/* The node of this name, one more time in the guest's hands. */
int fs_node_lookup(struct fs *fs, const struct fs_ref *parent, const char *name, uint32_t epoch, struct fs_node **node, struct statx *stat);
/* The same for a file just made, whose `stat` has a time of birth. Takes `fd` over: its O_PATH descriptor, or -1. */
int fs_node_enter(struct fs *fs, struct fs_node *parent, const char *name, uint32_t epoch, const struct statx *stat, int fd, struct fs_node **node);
/* The node that this name leads to, if the guest knows it, in use and with its descriptor: it will be there when the name is not. `node` NULL otherwise. */
void fs_node_hold(struct fs *fs, const struct fs_ref *parent, const char *name, struct fs_ref *held);
void fs_node_unnamed(struct fs *fs, struct fs_node *node, const struct fs_node *parent, const char *name);
void fs_node_named(struct fs *fs, struct fs_node *node, struct fs_node *parent, const char *name);
void fs_node_forget(struct fs *fs, uint64_t id, uint64_t count);
/* The device's entry; NULL: too many. `fd` is any O_PATH descriptor on it. */
const struct fs_device *fs_device_of(struct fs *fs, int fd, uint64_t device);
uint64_t fs_shown_inode(const struct fs *fs, const struct fs_identity *identity);
struct fs_identity fs_identity_of(const struct statx *stat);
int fs_statx(int fd, const char *name, struct statx *stat);
void fs_nodes_state(struct fs *fs, struct state_io *io);
void fs_nodes_loaded(struct fs *fs); /* also the handles */

/* ---- handles ---- */

int fs_handle_add(struct fs *fs, struct fs_node *node, int fd, uint32_t flags, bool directory, uint32_t epoch, uint64_t *id); /* takes fd over, also when it fails */
int fs_handle_get(struct fs *fs, uint64_t id, bool directory, struct fs_handle **handle);
void fs_handle_put(struct fs *fs, struct fs_handle *handle);
int fs_handle_close(struct fs *fs, uint64_t id, bool directory);
void fs_handles_drop(struct fs *fs);
void fs_handles_state(struct fs *fs, struct state_io *io);

/* ---- calls ---- */

struct fs_call {
    struct fs *fs;
    const struct fs_message *message;
    struct fuse_in_header header;
    const void *arg;       /* the operation's structure, followed by its names; our copy */
    uint64_t arg_bytes;    /* of all of it */
    const char *name, *name2;
    uint64_t reply_bytes;  /* written behind the header so far */
    uint32_t epoch;        /* of when it began */
};

/* Operations return 0 or -errno (their answer then has no body) and add to the answer by these. */
typedef int fs_op_fn(struct fs_call *call);
void fs_reply(struct fs_call *call, const void *data, uint64_t size_bytes);
uint64_t fs_reply_room(const struct fs_call *call);
/* Vectors of the answer's body (or, `in`, of the request behind `offset`); `iov` has room for FS_VECTORS_MAX. */
unsigned fs_slice(const struct iovec *from, unsigned from_count, uint64_t offset, uint64_t length_bytes, struct iovec *iov);
bool fs_name_valid(const char *name);

#define FS_PROC_NAME_BYTES 16
/* The name under proc_fd of a descriptor. */
void fs_proc_name(int fd, char name[FS_PROC_NAME_BYTES]);
/* op_file.c: opens a regular file that is an O_PATH descriptor. */
int fs_open_file(struct fs *fs, const struct fs_node *node, int fd, uint32_t guest_flags);
uint32_t fs_open_flags(const struct fs *fs, uint32_t guest_flags);
int fs_open_directory(int fd);

/* op_attr.c */
void fs_fill_attr(const struct fs *fs, const struct statx *stat, struct fuse_attr *attr);
void fs_fill_entry(const struct fs *fs, const struct fs_node *node, const struct statx *stat, struct fuse_entry_out *entry);
bool fs_keep_data(struct fs *fs, struct fs_node *node, const struct statx *stat);
struct fs_timeout {
    uint64_t seconds;
    uint32_t ns;
};
struct fs_timeout fs_timeout(const struct fs *fs);
int fs_change_mode(struct fs *fs, const struct fs_ref *ref, uint32_t mode);
uint32_t fs_safe_mode(uint32_t mode, uint32_t type);

#define FS_OP(name) fs_op_fn fs_op_##name;
FS_OP(lookup) FS_OP(forget) FS_OP(batch_forget) FS_OP(getattr) FS_OP(setattr) FS_OP(readlink) FS_OP(symlink) FS_OP(mknod) FS_OP(mkdir)
FS_OP(unlink) FS_OP(rmdir) FS_OP(rename) FS_OP(rename2) FS_OP(link) FS_OP(open) FS_OP(create) FS_OP(tmpfile) FS_OP(read) FS_OP(write) FS_OP(statfs)
FS_OP(release) FS_OP(fsync) FS_OP(setxattr) FS_OP(getxattr) FS_OP(listxattr) FS_OP(removexattr) FS_OP(flush) FS_OP(opendir) FS_OP(readdir)
FS_OP(readdirplus) FS_OP(releasedir) FS_OP(fsyncdir) FS_OP(access) FS_OP(fallocate) FS_OP(lseek) FS_OP(copy_file_range) FS_OP(syncfs) FS_OP(ioctl)
#undef FS_OP

#endif
