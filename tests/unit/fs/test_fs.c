/* The file server by itself: operations, limits, saving and loading. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "fuse_client.h"

#define ROOT FUSE_ROOT_ID
#define HOST_IDS .uid = FS_ID_AS_ON_HOST, .gid = FS_ID_AS_ON_HOST
static const struct fs_config plain = {HOST_IDS};

static struct client c;
static unsigned descriptors_before;

static int start(void **state)
{
    umask(022);
    descriptors_before = host_descriptors();
    client_start(&c, plain);
    return 0;
}

static int stop(void **state)
{
    client_stop(&c);
    assert_int_equal(host_descriptors(), descriptors_before);
    return 0;
}

static void restart(struct fs_config config)
{
    fs_destroy(c.fs);
    client_connect(&c, config);
    assert_int_equal(client_init(&c, ~0u), 0);
}

static void test_init(void **state)
{
    struct fuse_init_in in = {.major = 8, .minor = 0};
    const struct request request = {.opcode = FUSE_INIT, .arg = &in, .arg_bytes = sizeof(in)};

    assert_int_equal(c.reply.init.major, 7);
    assert_true(c.reply.init.minor >= 31);
    assert_true(c.reply.init.flags & FUSE_DO_READDIRPLUS);
    assert_false(c.reply.init.flags & (FUSE_WRITEBACK_CACHE | FUSE_POSIX_LOCKS | FUSE_EXPORT_SUPPORT));
    assert_int_equal(client_send(&c, &request), 0);
    assert_int_equal(c.reply.init.major, 7);
    in = (struct fuse_init_in){.major = 7, .minor = 12};
    assert_int_equal(client_send(&c, &request), -EPROTO);
    assert_int_equal(client_init(&c, 0), 0);
    assert_int_equal(c.reply.init.flags, 0);
    /* Nothing before INIT. */
    fs_reset(c.fs);
    assert_int_equal(client_getattr(&c, ROOT), -EIO);
    assert_int_equal(client_send(&c, &(struct request){.opcode = 4096}), -ENOSYS);
    assert_int_equal(client_init(&c, 0), 0);
    assert_int_equal(client_getattr(&c, ROOT), 0);
    assert_true(S_ISDIR(c.reply.attr.attr.mode));
}

static void test_files(void **state)
{
    uint64_t node, handle, again, other;
    struct stat st;
    char path[128];

    assert_int_equal(client_lookup(&c, ROOT, "a", &node), -ENOENT);
    assert_int_equal(c.reply.entry.entry_valid, 1); /* that there is none may be remembered */
    assert_int_equal(client_create(&c, ROOT, "a", O_RDWR | O_CREAT, 0640, &node, &handle), 0);
    assert_int_equal(client_write(&c, node, handle, 3, "hello", 5, 0), 5);
    assert_int_equal(client_read(&c, node, handle, 2, 100), 6);
    assert_memory_equal(c.reply.bytes, "\0hello", 6);
    assert_int_equal(client_read(&c, node, handle, 100, 100), 0);
    assert_int_equal(client_read(&c, node, handle, UINT64_MAX, 1), -EINVAL);
    assert_int_equal(client_release(&c, node, handle), 0);
    assert_int_equal(client_read(&c, node, handle, 2, 100), -EBADF);
    assert_int_equal(client_release(&c, node, handle), -EBADF);
    snprintf(path, sizeof(path), "%s/a", c.share);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_size, 8);
    assert_int_equal(st.st_mode & 07777, 0640);
    assert_int_equal(client_lookup(&c, ROOT, "a", &again), 0);
    assert_int_equal(again, node);
    assert_int_equal(c.reply.entry.attr.ino, st.st_ino);
    assert_int_equal(c.reply.entry.attr.size, 8);
    assert_int_equal(client_link(&c, node, ROOT, "b"), 0);
    assert_int_equal(c.reply.entry.nodeid, node);
    assert_int_equal(c.reply.entry.attr.nlink, 2);
    assert_int_equal(client_rename(&c, ROOT, "b", ROOT, "d", RENAME_NOREPLACE), 0);
    assert_int_equal(client_rename(&c, ROOT, "d", ROOT, "a", RENAME_NOREPLACE), -EEXIST);
    assert_int_equal(client_rename(&c, ROOT, "d", ROOT, "e", 1u << 2), -EINVAL);
    assert_int_equal(client_lookup(&c, ROOT, "d", &other), 0);
    assert_int_equal(other, node);
    /* Removed, it is still there for who has it. */
    assert_int_equal(client_open(&c, node, O_RDONLY, &handle), 0);
    assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, "a"), 0);
    assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, "d"), 0);
    assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, "d"), -ENOENT);
    assert_int_equal(client_getattr(&c, node), 0);
    assert_int_equal(c.reply.attr.attr.nlink, 0);
    assert_int_equal(client_read(&c, node, handle, 3, 5), 5);
    assert_int_equal(client_release(&c, node, handle), 0);
    client_forget(&c, node, 4);
    assert_int_equal(client_getattr(&c, node), -ESTALE);
    assert_int_equal(fs_count(c.fs).nodes, 1);
}

static void test_append(void **state)
{
    uint64_t node, handle;

    assert_int_equal(client_create(&c, ROOT, "log", O_WRONLY | O_APPEND | O_CREAT, 0644, &node, &handle), 0);
    assert_int_equal(client_write(&c, node, handle, 0, "one ", 4, O_APPEND | O_WRONLY), 4);
    /* The host appends, then the guest with its old idea of the end. */
    host_write(c.share, "log", "one host ");
    assert_int_equal(client_write(&c, node, handle, 4, "two", 3, O_APPEND | O_WRONLY), 3);
    assert_true(host_is(c.share, "log", "one host two"));
    /* The kernel's writing back of mapped pages has a place. */
    struct fuse_write_in in = {.fh = handle, .offset = 0, .size = 3, .flags = O_APPEND | O_WRONLY, .write_flags = FUSE_WRITE_CACHE};
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_WRITE, .node = node, .arg = &in, .arg_bytes = sizeof(in), .data = "ONE", .data_bytes = 3}), 0);
    assert_true(host_is(c.share, "log", "ONE host two"));
    assert_int_equal(client_release(&c, node, handle), 0);
}

static void setattr(uint64_t node, const struct fuse_setattr_in *in, int expected)
{
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SETATTR, .node = node, .arg = in, .arg_bytes = sizeof(*in)}), expected);
}

/* Calls of the host that little else makes. */
static void test_rarer(void **state)
{
    uint64_t node, handle, pipe;
    struct fuse_access_in access = {.mask = R_OK | W_OK};

    assert_int_equal(client_create(&c, ROOT, "f", O_RDWR | O_CREAT, 0600, &node, &handle), 0);
    for (uint32_t flags = 0; flags <= FUSE_FSYNC_FDATASYNC; flags++) {
        struct fuse_fsync_in sync = {.fh = handle, .fsync_flags = flags};
        assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_FSYNC, .node = node, .arg = &sync, .arg_bytes = sizeof(sync)}), 0);
    }
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_ACCESS, .node = node, .arg = &access, .arg_bytes = sizeof(access)}), 0);
    assert_int_equal(client_mknod(&c, ROOT, "pipe", S_IFIFO | 0600, &pipe), 0);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_GID, .gid = c.gid + 1}, geteuid() == 0 ? 0 : -EPERM);
    assert_int_equal(client_release(&c, node, handle), 0);
}

static void test_attributes(void **state)
{
    uint64_t node, handle, link;

    assert_int_equal(client_create(&c, ROOT, "f", O_RDONLY | O_CREAT, 06755, &node, &handle), 0);
    assert_int_equal(c.reply.created.entry.attr.mode & 07777, 0755); /* no set-ID bits */
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_MODE, .mode = 04711}, 0);
    assert_int_equal(c.reply.attr.attr.mode & 07777, 0711);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_SIZE, .size = 5ull << 30}, 0);
    assert_int_equal(c.reply.attr.attr.size, 5ull << 30);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_SIZE | FATTR_FH, .fh = handle, .size = 10}, 0); /* not open for writing: by the node */
    assert_int_equal(c.reply.attr.attr.size, 10);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_SIZE, .size = UINT64_MAX}, -EFBIG);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_ATIME | FATTR_MTIME, .atime = 1000, .mtime = 2000, .mtimensec = 7}, 0);
    assert_int_equal(c.reply.attr.attr.atime, 1000);
    assert_int_equal(c.reply.attr.attr.mtime, 2000);
    assert_int_equal(c.reply.attr.attr.mtimensec, 7);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_MTIME | FATTR_MTIME_NOW}, 0);
    assert_true(c.reply.attr.attr.mtime > 2000);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_UID, .uid = c.uid}, 0);
    assert_int_equal(client_symlink(&c, ROOT, "l", "f", &link), 0);
    setattr(link, &(struct fuse_setattr_in){.valid = FATTR_MTIME, .mtime = 3000}, 0);
    assert_int_equal(c.reply.attr.attr.mtime, 3000);
    setattr(link, &(struct fuse_setattr_in){.valid = FATTR_MODE, .mode = 0}, -EOPNOTSUPP);
    setattr(link, &(struct fuse_setattr_in){.valid = FATTR_SIZE}, -ELOOP);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_READLINK, .node = link}), 0);
    assert_int_equal(c.reply_bytes, 1);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_READLINK, .node = node}), -EINVAL);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_STATFS, .node = ROOT}), 0);
    assert_int_equal(c.reply.statfs.st.namelen, 255);
}

/* The VMM's user under another number. */
static void test_owners(void **state)
{
    struct fs_config config = {.uid = 4321, .gid = 8765};
    uint64_t node, handle;

    restart(config);
    c.uid = 4321;
    c.gid = 8765;
    assert_int_equal(client_create(&c, ROOT, "f", O_RDONLY | O_CREAT, 0644, &node, &handle), 0);
    assert_int_equal(c.reply.created.entry.attr.uid, 4321);
    assert_int_equal(c.reply.created.entry.attr.gid, 8765);
    setattr(node, &(struct fuse_setattr_in){.valid = FATTR_UID | FATTR_GID, .uid = 4321, .gid = 8765}, 0);
    assert_int_equal(c.reply.attr.attr.uid, 4321);
}

static void *make_as_user(void *ctx)
{
    uint64_t node, handle;
    int *wrong = ctx;

    fs_thread_prepare(c.fs);
    *wrong = client_create(&c, ROOT, "mine", O_RDWR | O_CREAT, 0666, &node, &handle);
    *wrong |= c.reply.created.entry.attr.uid != 1000 || c.reply.created.entry.attr.gid != 1001 || (c.reply.created.entry.attr.mode & 07777) != 0666;
    *wrong |= client_mkdir(&c, ROOT, "dir", 0777, &node);
    *wrong |= c.reply.entry.attr.uid != 1000 || (c.reply.entry.attr.mode & 07777) != 0777;
    *wrong |= geteuid() != 0;
    return NULL;
}

/* A privileged server makes files as the guest's users, whose rights the guest's kernel has checked, and without a mask. */
static void test_privileged(void **state)
{
    pthread_t thread;
    int wrong = 1;

    if (geteuid() != 0)
        skip();
    c.uid = 1000;
    c.gid = 1001;
    assert_int_equal(chmod(c.share, 0700), 0);
    assert_int_equal(pthread_create(&thread, NULL, make_as_user, &wrong), 0);
    assert_int_equal(pthread_join(thread, NULL), 0);
    assert_int_equal(wrong, 0);
    assert_int_equal(umask(022), 022);
}

static unsigned count_entries(uint64_t node, bool plus, uint32_t size, uint64_t *nodes)
{
    uint64_t handle, offset = 0;
    unsigned count = 0;

    assert_int_equal(client_opendir(&c, node, &handle), 0);
    for (;;) {
        assert_int_equal(client_readdir(&c, node, handle, plus, offset, size), 0);
        assert_true(c.reply_bytes <= size);
        if (c.reply_bytes == 0)
            break;
        for (unsigned at = 0; at < c.reply_bytes;) {
            const struct fuse_entry_out *entry = (const void *)(c.reply.bytes + at);
            const struct fuse_dirent *dirent = plus ? (const void *)(entry + 1) : (const void *)entry;
            bool dots = dirent->namelen <= 2 && !memcmp(dirent->name, "..", dirent->namelen);

            if (plus && !dots) {
                assert_true(entry->nodeid > 1);
                nodes[count] = entry->nodeid;
            } else if (plus) {
                assert_int_equal(entry->nodeid, 0);
            }
            count += !dots;
            offset = dirent->off;
            at += (unsigned)(FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + dirent->namelen) + (plus ? sizeof(*entry) : 0));
        }
    }
    assert_int_equal(client_readdir(&c, node, handle, plus, 0, 30), -EINVAL); /* not even one fits */
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_RELEASEDIR, .node = node, .arg = &(struct fuse_release_in){.fh = handle},
                                                       .arg_bytes = sizeof(struct fuse_release_in)}), 0);
    return count;
}

static void test_directories(void **state)
{
    uint64_t directory, node, handle, nodes[400];
    char name[32];

    assert_int_equal(client_mkdir(&c, ROOT, "many", 0755, &directory), 0);
    for (unsigned i = 0; i < 300; i++) {
        snprintf(name, sizeof(name), "%.*s%u", (int)(i % 20), "aaaaaaaaaaaaaaaaaaaa", i);
        assert_int_equal(client_create(&c, directory, name, O_RDONLY | O_CREAT, 0644, &node, &handle), 0);
        assert_int_equal(client_release(&c, node, handle), 0);
        client_forget(&c, node, 1);
    }
    assert_int_equal(count_entries(directory, false, 4096, NULL), 300);
    assert_int_equal(count_entries(directory, false, 100, NULL), 300);
    assert_int_equal(fs_count(c.fs).nodes, 2);
    assert_int_equal(count_entries(directory, true, 4096, nodes), 300);
    assert_int_equal(fs_count(c.fs).nodes, 302);
    assert_true(fs_count(c.fs).node_descriptors <= 3); /* attributes need none */
    for (unsigned i = 0; i < 300; i++)
        assert_int_equal(client_getattr(&c, nodes[i]), 0);
    /* Entries removed while it is read. */
    assert_int_equal(client_opendir(&c, directory, &handle), 0);
    assert_int_equal(client_readdir(&c, directory, handle, true, 0, 4096), 0);
    assert_int_equal(client_name(&c, FUSE_RMDIR, ROOT, "many"), -ENOTEMPTY);
    assert_int_equal(client_readdir(&c, ROOT, handle, true, UINT64_MAX, 4096), -EINVAL);
    assert_int_equal(client_read(&c, directory, handle, 0, 10), -EBADF); /* a directory's handle is no file's */
    assert_int_equal(client_opendir(&c, nodes[0], &handle), -ENOTDIR);
    assert_int_equal(client_open(&c, directory, O_RDONLY, &handle), -EISDIR);
}

/* More nodes than descriptors: they are closed and found again, also deep down and renamed. */
static void test_few_descriptors(void **state)
{
    uint64_t node = ROOT, deep[60], handle;

    fs_limit(c.fs, 8, 8);
    for (unsigned i = 0; i < 60; i++) {
        assert_int_equal(client_mkdir(&c, node, "d", 0755, &deep[i]), 0);
        node = deep[i];
    }
    assert_int_equal(client_create(&c, deep[59], "end", O_WRONLY | O_CREAT, 0644, &node, &handle), 0);
    assert_int_equal(client_write(&c, node, handle, 0, "deep", 4, 0), 4);
    assert_true(fs_count(c.fs).node_descriptors <= 8);
    for (unsigned i = 0; i < 60; i++)
        assert_int_equal(client_getattr(&c, deep[i]), 0);
    assert_int_equal(client_rename(&c, ROOT, "d", ROOT, "renamed", 0), 0);
    for (unsigned i = 0; i < 7; i++) {
        assert_int_equal(client_getattr(&c, deep[59 - i]), 0);
        assert_int_equal(client_open(&c, node, O_RDONLY, &handle), 0);
        assert_int_equal(client_read(&c, node, handle, 0, 4), 4);
    }
    assert_int_equal(client_open(&c, node, O_RDONLY, &handle), -ENFILE); /* eight handles are open */
    /* Files without names keep their descriptors; there are no more than allowed of those either. */
    unsigned removed = 0;
    for (unsigned i = 0; i < 20; i++) {
        uint64_t file;
        char name[16];

        snprintf(name, sizeof(name), "f%u", i);
        assert_int_equal(client_mknod(&c, ROOT, name, S_IFREG | 0644, &file), 0);
        assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, name), 0);
        removed += client_getattr(&c, file) == 0;
    }
    assert_true(removed >= 6 && removed < 8);
    assert_true(fs_count(c.fs).node_descriptors <= 8);
    assert_int_equal(client_getattr(&c, ROOT), 0);
}

/* Errors that come at a close are those of storage in the network (where FILTER_REMOTE has this directory be: tests/unit/filtered); elsewhere there is nothing to ask. */
static void test_close(void **state)
{
    uint64_t node, handle;
    assert_int_equal(client_create(&c, ROOT, "f", O_RDWR, 0644, &node, &handle), 0);
    const struct fuse_flush_in in = {.fh = handle};
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_FLUSH, .node = node, .arg = &in, .arg_bytes = sizeof(in)}), getenv("FILTER_REMOTE") ? 0 : -ENOSYS);
    assert_int_equal(client_release(&c, node, handle), 0);
}

static void test_readonly(void **state)
{
    struct fs_config config = {HOST_IDS, .readonly = true};
    struct fuse_setattr_in in = {.valid = FATTR_MODE, .mode = 0600};
    uint64_t node, handle;

    host_write(c.share, "f", "text");
    restart(config);
    assert_int_equal(client_lookup(&c, ROOT, "f", &node), 0);
    assert_int_equal(client_open(&c, node, O_RDONLY, &handle), 0);
    assert_int_equal(client_read(&c, node, handle, 0, 10), 4);
    assert_int_equal(client_write(&c, node, handle, 0, "x", 1, 0), -EROFS);
    assert_int_equal(client_open(&c, node, O_RDWR, &handle), -EROFS);
    assert_int_equal(client_open(&c, node, O_RDONLY | O_TRUNC, &handle), -EROFS);
    assert_int_equal(client_create(&c, ROOT, "g", O_RDONLY | O_CREAT, 0644, &node, &handle), -EROFS);
    assert_int_equal(client_mkdir(&c, ROOT, "g", 0755, &handle), -EROFS);
    assert_int_equal(client_mknod(&c, ROOT, "g", S_IFREG, &handle), -EROFS);
    assert_int_equal(client_symlink(&c, ROOT, "g", "f", &handle), -EROFS);
    assert_int_equal(client_link(&c, node, ROOT, "g"), -EROFS);
    assert_int_equal(client_rename(&c, ROOT, "f", ROOT, "g", 0), -EROFS);
    assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, "f"), -EROFS);
    assert_int_equal(client_name(&c, FUSE_RMDIR, ROOT, "f"), -EROFS);
    setattr(node, &in, -EROFS);
    assert_true(host_is(c.share, "f", "text"));
}

static int xattr(uint32_t opcode, uint64_t node, const char *name, uint32_t size, const char *value)
{
    struct fuse_getxattr_in in = {.size = size}; /* SETXATTR's has the same size, and flags in the second half */

    return client_send(&c, &(struct request){.opcode = opcode, .node = node, .arg = &in, .arg_bytes = opcode == FUSE_REMOVEXATTR ? 0 : sizeof(in), .name = name,
                                             .data = value, .data_bytes = value ? size : 0});
}

static void test_xattr(void **state)
{
    struct fs_config config = {HOST_IDS, .xattr = true};
    uint64_t node;

    host_write(c.share, "f", "text");
    assert_int_equal(xattr(FUSE_GETXATTR, ROOT, "user.a", 0, NULL), -ENOSYS);
    restart(config);
    assert_int_equal(client_lookup(&c, ROOT, "f", &node), 0);
    if (xattr(FUSE_SETXATTR, node, "user.a", 5, "value") == -EOPNOTSUPP)
        skip();
    assert_int_equal(xattr(FUSE_GETXATTR, node, "user.a", 0, NULL), 0);
    assert_int_equal(c.reply.xattr.size, 5);
    assert_int_equal(xattr(FUSE_GETXATTR, node, "user.a", 100, NULL), 0);
    assert_memory_equal(c.reply.bytes, "value", 5);
    assert_int_equal(xattr(FUSE_GETXATTR, node, "user.a", 3, NULL), -ERANGE);
    assert_int_equal(xattr(FUSE_LISTXATTR, node, NULL, 100, NULL), 0);
    assert_int_equal(c.reply_bytes, 7);
    assert_int_equal(xattr(FUSE_SETXATTR, node, "security.capability", 5, "value"), -EOPNOTSUPP);
    assert_int_equal(xattr(FUSE_SETXATTR, node, "trusted.x", 5, "value"), -EOPNOTSUPP);
    assert_int_equal(xattr(FUSE_GETXATTR, node, "system.posix_acl_access", 100, NULL), -EOPNOTSUPP);
    assert_int_equal(xattr(FUSE_REMOVEXATTR, node, "user.a", 0, NULL), 0);
    assert_int_equal(xattr(FUSE_GETXATTR, node, "user.a", 0, NULL), -ENODATA);
    /* A value that is not there. */
    struct fuse_getxattr_in in = {.size = 1000};
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SETXATTR, .node = node, .arg = &in, .arg_bytes = 8, .name = "user.b", .data = "x", .data_bytes = 1}),
                     -EINVAL);
}

static void test_ranges(void **state)
{
    struct fuse_copy_file_range_in copy = {.off_in = 0, .off_out = 2, .len = 4};
    struct fuse_fallocate_in hole = {.offset = 0, .length = 4096, .mode = 3 /* punch, keep size */};
    struct fuse_lseek_in seek = {.offset = 0, .whence = SEEK_HOLE};
    uint64_t a, b;

    assert_int_equal(client_create(&c, ROOT, "a", O_RDWR | O_CREAT, 0644, &a, &copy.fh_in), 0);
    assert_int_equal(client_create(&c, ROOT, "b", O_RDWR | O_CREAT, 0644, &b, &copy.fh_out), 0);
    assert_int_equal(client_write(&c, a, copy.fh_in, 0, "abcdef", 6, 0), 6);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_COPY_FILE_RANGE, .node = a, .arg = &copy, .arg_bytes = sizeof(copy)}), 0);
    assert_int_equal(c.reply.write.size, 4);
    assert_int_equal(client_read(&c, b, copy.fh_out, 2, 4), 4);
    assert_memory_equal(c.reply.bytes, "abcd", 4);
    seek.fh = copy.fh_in;
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_LSEEK, .node = a, .arg = &seek, .arg_bytes = sizeof(seek)}), 0);
    assert_int_equal(c.reply.lseek.offset, 6);
    hole.fh = copy.fh_in;
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_FALLOCATE, .node = a, .arg = &hole, .arg_bytes = sizeof(hole)}), 0);
    assert_int_equal(client_read(&c, a, copy.fh_in, 0, 6), 6);
    assert_memory_equal(c.reply.bytes, "\0\0\0\0\0\0", 6);
    hole.mode = 8; /* collapse */
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_FALLOCATE, .node = a, .arg = &hole, .arg_bytes = sizeof(hole)}), -EOPNOTSUPP);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SYNCFS, .node = ROOT, .arg = &hole, .arg_bytes = 8}), 0);
}

/* What an open of the directory tells the guest about the names that it has read. */
static uint32_t opendir_flags(uint64_t node)
{
    uint64_t handle;

    assert_int_equal(client_opendir(&c, node, &handle), 0);
    uint32_t flags = c.reply.open.open_flags;
    struct fuse_release_in in = {.fh = handle};
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_RELEASEDIR, .node = node, .arg = &in, .arg_bytes = sizeof(in)}), 0);
    return flags;
}

static void test_kept_names(void **state)
{
    struct fs_config config = plain;
    uint64_t node;

    assert_int_equal(client_mkdir(&c, ROOT, "d", 0755, &node), 0);
    assert_int_equal(opendir_flags(node), FOPEN_CACHE_DIR);
    if (getenv("FILTER_REMOTE")) /* played by filtered/other_host.c: times of change are other machines' */
        return;
    /* Good as soon as the directory's last change is so old that a later one shows. */
    while (opendir_flags(node) == FOPEN_CACHE_DIR)
        ;
    assert_int_equal(opendir_flags(node), FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE);
    /* A name that the host makes or removes is seen. */
    host_write(c.share, "d/by-host", "");
    assert_int_equal(opendir_flags(node), FOPEN_CACHE_DIR);
    while (opendir_flags(node) == FOPEN_CACHE_DIR)
        ;
    char path[128];
    snprintf(path, sizeof(path), "%s/d/by-host", c.share);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(opendir_flags(node), FOPEN_CACHE_DIR);
    /* Attributes get old, and come with the names. */
    while (opendir_flags(node) == FOPEN_CACHE_DIR)
        ;
    while (opendir_flags(node) & FOPEN_KEEP_CACHE)
        ;
    fs_destroy(c.fs);
    config.cache = FS_CACHE_NONE;
    client_connect(&c, config);
    assert_int_equal(client_init(&c, 0), 0);
    assert_int_equal(opendir_flags(ROOT), 0);
    fs_destroy(c.fs);
    config.cache = FS_CACHE_ALWAYS;
    client_connect(&c, config);
    assert_int_equal(client_init(&c, 0), 0);
    assert_int_equal(opendir_flags(ROOT), FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE);
}

/* Changes on the host are noticed. */
static void test_host_changes(void **state)
{
    uint64_t node, again, handle;
    char from[128], to[128];

    host_write(c.share, "f", "first");
    assert_int_equal(client_lookup(&c, ROOT, "f", &node), 0);
    host_write(c.share, "new", "second");
    snprintf(from, sizeof(from), "%s/new", c.share);
    snprintf(to, sizeof(to), "%s/f", c.share);
    assert_int_equal(rename(from, to), 0);
    assert_int_equal(client_getattr(&c, node), -ESTALE); /* its name is another file's; the kernel looks it up again */
    assert_int_equal(client_open(&c, node, O_RDONLY, &handle), -ESTALE);
    assert_int_equal(client_lookup(&c, ROOT, "f", &again), 0);
    assert_int_not_equal(again, node);
    assert_int_equal(client_open(&c, again, O_RDONLY, &handle), 0);
    assert_int_equal(client_read(&c, again, handle, 0, 10), 6);
}

static void test_state(void **state)
{
    uint64_t directory, node, gone, handle, lost, before, added;
    struct state_io *io = state_writer_create();
    const void *data;
    size_t size;

    assert_int_equal(client_mkdir(&c, ROOT, "dir", 0755, &directory), 0);
    assert_int_equal(client_create(&c, directory, "f", O_RDWR | O_CREAT, 0644, &node, &handle), 0);
    assert_int_equal(client_write(&c, node, handle, 0, "kept", 4, 0), 4);
    assert_int_equal(client_create(&c, directory, "gone", O_RDWR | O_CREAT, 0644, &gone, &lost), 0);
    assert_int_equal(client_name(&c, FUSE_UNLINK, directory, "gone"), 0);
    state_begin(io, "share", 1);
    fs_state(c.fs, io);
    assert_int_equal(state_end(io), 0);
    data = state_writer_data(io, &size);
    fs_destroy(c.fs);
    client_connect(&c, plain);
    for (unsigned round = 0; round < 2; round++) { /* also over one that has something */
        struct state_io *reader = state_reader_create(data, size);

        state_begin(reader, "share", 1);
        fs_state(c.fs, reader);
        assert_int_equal(state_end(reader), 0);
        state_io_destroy(reader);
        assert_int_equal(client_read(&c, node, handle, 0, 10), 4);
        assert_memory_equal(c.reply.bytes, "kept", 4);
        assert_int_equal(client_write(&c, node, handle, 0, "k", 1, 0), 1);
        assert_int_equal(client_read(&c, gone, lost, 0, 10), -ESTALE);
        assert_int_equal(client_getattr(&c, gone), -ESTALE);
        assert_int_equal(client_lookup(&c, directory, "f", &before), 0);
        assert_int_equal(before, node);
        assert_int_equal(client_mkdir(&c, ROOT, round ? "x" : "y", 0755, &added), 0);
        assert_int_not_equal(added, gone);
    }
    /* Damaged in any place: refused or harmless. */
    uint8_t *bad = malloc(size);
    for (size_t i = 0; i + 4 < size; i++) {
        memcpy(bad, data, size);
        bad[i] ^= 1u << i % 8;
        struct state_io *reader = state_reader_create(bad, size);
        state_begin(reader, "share", 1);
        fs_state(c.fs, reader);
        (void)!state_end(reader);
        state_io_destroy(reader);
        (void)client_getattr(&c, node);
    }
    free(bad);
    state_io_destroy(io);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, start, stop)
        TEST(test_init), TEST(test_files), TEST(test_append), TEST(test_attributes), TEST(test_rarer), TEST(test_owners), TEST(test_privileged), TEST(test_directories),
        TEST(test_few_descriptors), TEST(test_close), TEST(test_readonly), TEST(test_xattr), TEST(test_ranges), TEST(test_host_changes), TEST(test_kept_names), TEST(test_state),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
