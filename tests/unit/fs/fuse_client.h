/*
 * A guest's FUSE client for tests: builds messages, sends them to a server over a scratch directory, and takes the answers apart.
 */
#ifndef DOPPEL_TESTS_FUSE_CLIENT_H
#define DOPPEL_TESTS_FUSE_CLIENT_H

#include <linux/fuse.h>
#include <stdbool.h>
#include <stdint.h>

#include "fs/fs.h"

struct client {
    char folder[64]; /* has `share` (what is shared) and `outside` */
    char share[80], outside[80];
    struct fs *fs;
    uint32_t uid, gid;
    union {
        uint8_t bytes[1 << 17];
        struct fuse_entry_out entry;
        struct fuse_attr_out attr;
        struct fuse_open_out open;
        struct fuse_write_out write;
        struct fuse_init_out init;
        struct fuse_lseek_out lseek;
        struct fuse_getxattr_out xattr;
        struct fuse_statfs_out statfs;
        struct {
            struct fuse_entry_out entry;
            struct fuse_open_out open;
        } created;
    } reply; /* of the last message, without its header */
    unsigned reply_bytes;
};

/* A folder of its own under $TMPDIR; the server with these settings (path NULL: the share), and INIT done. */
void client_start(struct client *c, struct fs_config config);
void client_connect(struct client *c, struct fs_config config); /* another server on the same folder */
void client_stop(struct client *c);                             /* and removes the folder */

/* Sends: the structure, then up to two strings, then data. Returns 0 or -errno of the answer. */
struct request {
    uint32_t opcode;
    uint64_t node;
    const void *arg;
    unsigned arg_bytes;
    const char *name, *name2;
    const void *data;
    unsigned data_bytes, room; /* room for the answer's body, 0: plenty */
};
int client_send(struct client *c, const struct request *request);

int client_init(struct client *c, uint32_t flags);
int client_lookup(struct client *c, uint64_t parent, const char *name, uint64_t *node);
int client_forget(struct client *c, uint64_t node, uint64_t count);
int client_getattr(struct client *c, uint64_t node);
int client_mkdir(struct client *c, uint64_t parent, const char *name, uint32_t mode, uint64_t *node);
int client_mknod(struct client *c, uint64_t parent, const char *name, uint32_t mode, uint64_t *node);
int client_create(struct client *c, uint64_t parent, const char *name, uint32_t flags, uint32_t mode, uint64_t *node, uint64_t *handle);
int client_open(struct client *c, uint64_t node, uint32_t flags, uint64_t *handle);
int client_release(struct client *c, uint64_t node, uint64_t handle);
int client_read(struct client *c, uint64_t node, uint64_t handle, uint64_t offset, uint32_t size); /* bytes or -errno */
int client_write(struct client *c, uint64_t node, uint64_t handle, uint64_t offset, const void *data, uint32_t size, uint32_t flags);
int client_name(struct client *c, uint32_t opcode, uint64_t parent, const char *name); /* UNLINK, RMDIR */
int client_symlink(struct client *c, uint64_t parent, const char *name, const char *target, uint64_t *node);
int client_rename(struct client *c, uint64_t parent, const char *name, uint64_t new_parent, const char *new_name, uint32_t flags);
int client_link(struct client *c, uint64_t node, uint64_t parent, const char *name);
int client_opendir(struct client *c, uint64_t node, uint64_t *handle);
int client_readdir(struct client *c, uint64_t node, uint64_t handle, bool plus, uint64_t offset, uint32_t size);

/* On the host. */
void host_write(const char *directory, const char *name, const char *text);
bool host_is(const char *directory, const char *name, const char *text);
unsigned host_descriptors(void);

#endif
