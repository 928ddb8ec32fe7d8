#include "fuse_client.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *where)
{
    if (S_ISDIR(st->st_mode))
        chmod(path, 0700);
    return remove(path);
}

void client_connect(struct client *c, struct fs_config config)
{
    struct error err = {0};

    if (!config.path)
        config.path = c->share;
    assert_int_equal(fs_create(&c->fs, &config, &err), 0);
}

void client_start(struct client *c, struct fs_config config)
{
    const char *base = getenv("TMPDIR");

    memset(c, 0, sizeof(*c));
    c->uid = geteuid();
    c->gid = getegid();
    snprintf(c->folder, sizeof(c->folder), "%s/doppel-fs-XXXXXX", base && strlen(base) < 32 ? base : "/tmp");
    assert_non_null(mkdtemp(c->folder));
    snprintf(c->share, sizeof(c->share), "%s/share", c->folder);
    snprintf(c->outside, sizeof(c->outside), "%s/outside", c->folder);
    assert_int_equal(mkdir(c->share, 0755), 0);
    assert_int_equal(mkdir(c->outside, 0755), 0);
    host_write(c->outside, "secret", "SECRET");
    client_connect(c, config);
    assert_int_equal(client_init(c, ~0u), 0);
}

void client_stop(struct client *c)
{
    fs_destroy(c->fs);
    nftw(c->folder, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}

int client_send(struct client *c, const struct request *r)
{
    struct fuse_out_header out = {0};
    struct fuse_in_header in = {.opcode = r->opcode, .unique = 77, .nodeid = r->node, .uid = c->uid, .gid = c->gid};
    struct iovec request[] = {
        {&in, sizeof(in)},
        {(void *)r->arg, r->arg_bytes},
        {(void *)r->name, r->name ? strlen(r->name) + 1 : 0},
        {(void *)r->name2, r->name2 ? strlen(r->name2) + 1 : 0},
        {(void *)r->data, r->data_bytes},
    };
    struct iovec answer[] = {{&out, sizeof(out)}, {c->reply.bytes, r->room ? r->room : sizeof(c->reply)}};
    struct fs_message message = {.in = request, .in_count = 5, .out = answer, .out_count = 2};
    uint64_t got;

    for (unsigned i = 0; i < 5; i++)
        message.in_bytes += request[i].iov_len;
    message.out_bytes = answer[0].iov_len + answer[1].iov_len;
    in.len = (uint32_t)message.in_bytes;
    memset(c->reply.bytes, 0xEE, 4096);
    got = fs_serve(c->fs, &message);
    c->reply_bytes = 0;
    if (got == 0)
        return 0;
    assert_true(got >= sizeof(out) && got <= message.out_bytes);
    assert_int_equal(out.len, got);
    assert_int_equal(out.unique, 77);
    assert_true(out.error <= 0 && out.error > -4096);
    c->reply_bytes = (unsigned)(got - sizeof(out));
    if (out.error)
        assert_int_equal(c->reply_bytes, 0);
    return out.error;
}

int client_init(struct client *c, uint32_t flags)
{
    struct fuse_init_in in = {.major = 7, .minor = 36, .max_readahead = 131072, .flags = flags};

    return client_send(c, &(struct request){.opcode = FUSE_INIT, .arg = &in, .arg_bytes = sizeof(in)});
}

static int entry(struct client *c, int ret, uint64_t *node)
{
    if (ret == 0 && node)
        *node = c->reply.entry.nodeid;
    if (ret == 0 && c->reply.entry.nodeid == 0)
        return -ENOENT;
    return ret;
}

int client_lookup(struct client *c, uint64_t parent, const char *name, uint64_t *node)
{
    return entry(c, client_send(c, &(struct request){.opcode = FUSE_LOOKUP, .node = parent, .name = name}), node);
}

int client_forget(struct client *c, uint64_t node, uint64_t count)
{
    return client_send(c, &(struct request){.opcode = FUSE_FORGET, .node = node, .arg = &(struct fuse_forget_in){count}, .arg_bytes = 8});
}

int client_getattr(struct client *c, uint64_t node)
{
    struct fuse_getattr_in in = {0};

    return client_send(c, &(struct request){.opcode = FUSE_GETATTR, .node = node, .arg = &in, .arg_bytes = sizeof(in)});
}

int client_mkdir(struct client *c, uint64_t parent, const char *name, uint32_t mode, uint64_t *node)
{
    struct fuse_mkdir_in in = {.mode = mode};

    return entry(c, client_send(c, &(struct request){.opcode = FUSE_MKDIR, .node = parent, .arg = &in, .arg_bytes = sizeof(in), .name = name}), node);
}

int client_mknod(struct client *c, uint64_t parent, const char *name, uint32_t mode, uint64_t *node)
{
    struct fuse_mknod_in in = {.mode = mode, .rdev = 0x103};

    return entry(c, client_send(c, &(struct request){.opcode = FUSE_MKNOD, .node = parent, .arg = &in, .arg_bytes = sizeof(in), .name = name}), node);
}

int client_create(struct client *c, uint64_t parent, const char *name, uint32_t flags, uint32_t mode, uint64_t *node, uint64_t *handle)
{
    struct fuse_create_in in = {.flags = flags, .mode = mode};
    int ret = client_send(c, &(struct request){.opcode = FUSE_CREATE, .node = parent, .arg = &in, .arg_bytes = sizeof(in), .name = name});

    if (ret == 0) {
        *node = c->reply.created.entry.nodeid;
        *handle = c->reply.created.open.fh;
    }
    return ret;
}

static int open_any(struct client *c, uint32_t opcode, uint64_t node, uint32_t flags, uint64_t *handle)
{
    struct fuse_open_in in = {.flags = flags};
    int ret = client_send(c, &(struct request){.opcode = opcode, .node = node, .arg = &in, .arg_bytes = sizeof(in)});

    if (ret == 0)
        *handle = c->reply.open.fh;
    return ret;
}

int client_open(struct client *c, uint64_t node, uint32_t flags, uint64_t *handle)
{
    return open_any(c, FUSE_OPEN, node, flags, handle);
}

int client_opendir(struct client *c, uint64_t node, uint64_t *handle)
{
    return open_any(c, FUSE_OPENDIR, node, 0, handle);
}

int client_release(struct client *c, uint64_t node, uint64_t handle)
{
    struct fuse_release_in in = {.fh = handle};

    return client_send(c, &(struct request){.opcode = FUSE_RELEASE, .node = node, .arg = &in, .arg_bytes = sizeof(in)});
}

int client_read(struct client *c, uint64_t node, uint64_t handle, uint64_t offset, uint32_t size)
{
    struct fuse_read_in in = {.fh = handle, .offset = offset, .size = size};
    int ret = client_send(c, &(struct request){.opcode = FUSE_READ, .node = node, .arg = &in, .arg_bytes = sizeof(in)});

    return ret < 0 ? ret : (int)c->reply_bytes;
}

int client_write(struct client *c, uint64_t node, uint64_t handle, uint64_t offset, const void *data, uint32_t size, uint32_t flags)
{
    struct fuse_write_in in = {.fh = handle, .offset = offset, .size = size, .flags = flags};
    int ret = client_send(c, &(struct request){.opcode = FUSE_WRITE, .node = node, .arg = &in, .arg_bytes = sizeof(in), .data = data, .data_bytes = size});

    return ret < 0 ? ret : (int)c->reply.write.size;
}

int client_name(struct client *c, uint32_t opcode, uint64_t parent, const char *name)
{
    return client_send(c, &(struct request){.opcode = opcode, .node = parent, .name = name});
}

int client_symlink(struct client *c, uint64_t parent, const char *name, const char *target, uint64_t *node)
{
    return entry(c, client_send(c, &(struct request){.opcode = FUSE_SYMLINK, .node = parent, .name = name, .name2 = target}), node);
}

int client_rename(struct client *c, uint64_t parent, const char *name, uint64_t new_parent, const char *new_name, uint32_t flags)
{
    struct fuse_rename2_in in = {.newdir = new_parent, .flags = flags};

    return client_send(c, &(struct request){.opcode = FUSE_RENAME2, .node = parent, .arg = &in, .arg_bytes = sizeof(in), .name = name, .name2 = new_name});
}

int client_link(struct client *c, uint64_t node, uint64_t parent, const char *name)
{
    struct fuse_link_in in = {.oldnodeid = node};

    return client_send(c, &(struct request){.opcode = FUSE_LINK, .node = parent, .arg = &in, .arg_bytes = sizeof(in), .name = name});
}

int client_readdir(struct client *c, uint64_t node, uint64_t handle, bool plus, uint64_t offset, uint32_t size)
{
    struct fuse_read_in in = {.fh = handle, .offset = offset, .size = size};

    return client_send(c, &(struct request){.opcode = plus ? FUSE_READDIRPLUS : FUSE_READDIR, .node = node, .arg = &in, .arg_bytes = sizeof(in)});
}

/* ---- the host ---- */

void host_write(const char *directory, const char *name, const char *text)
{
    char path[512];
    int fd;

    snprintf(path, sizeof(path), "%s/%s", directory, name);
    fd = open(path, O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0644);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    close(fd);
}

bool host_is(const char *directory, const char *name, const char *text)
{
    char path[512], content[256];
    ssize_t got;
    int fd;

    snprintf(path, sizeof(path), "%s/%s", directory, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    got = read(fd, content, sizeof(content));
    close(fd);
    return got == (ssize_t)strlen(text) && !memcmp(content, text, strlen(text));
}

unsigned host_descriptors(void)
{
    DIR *dir = opendir("/proc/self/fd");
    unsigned count = 0;

    assert_non_null(dir);
    while (readdir(dir))
        count++;
    closedir(dir);
    return count;
}
