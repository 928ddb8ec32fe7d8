/* The file server against a guest that wants out: nothing outside of the share is read, changed, made or named. docs/security.md, "Shared directories". */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cmocka.h>

#include "fuse_client.h"

#define ROOT FUSE_ROOT_ID
#define TRIES 4000u
#define ROUNDS 8000u /* of the other thread */
static const struct fs_config plain = {.uid = FS_ID_AS_ON_HOST, .gid = FS_ID_AS_ON_HOST, .xattr = true};

static struct client c;
static unsigned descriptors_before;

static int start(void **state)
{
    umask(022);
    descriptors_before = host_descriptors();
    client_start(&c, plain);
    return 0;
}

/* Outside is as it was, whatever happened. */
static int stop(void **state)
{
    DIR *dir = opendir(c.outside);
    unsigned entries = 0;

    assert_non_null(dir);
    while (readdir(dir))
        entries++;
    closedir(dir);
    assert_int_equal(entries, 3);
    assert_true(host_is(c.outside, "secret", "SECRET"));
    client_stop(&c);
    assert_int_equal(host_descriptors(), descriptors_before);
    return 0;
}

static const char *in_share(const char *name)
{
    static char path[512];

    snprintf(path, sizeof(path), "%s/%s", c.share, name);
    return path;
}

/* Names that are paths, for every operation that takes one. */
static void test_names(void **state)
{
    static const char *const names[] = {"..", ".", "", "/", "../outside/secret", "/etc/passwd", "dir/..", "dir/../..", "a/b", "..//", "dir/"};
    static char longer[300];
    uint64_t node, handle, directory, good;

    memset(longer, 'x', sizeof(longer) - 1);
    assert_int_equal(client_mkdir(&c, ROOT, "dir", 0755, &directory), 0);
    assert_int_equal(client_mknod(&c, ROOT, "good", S_IFREG | 0644, &good), 0);
    for (unsigned i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        assert_int_equal(client_lookup(&c, ROOT, names[i], &node), -EINVAL);
        assert_int_equal(client_lookup(&c, directory, names[i], &node), -EINVAL);
        assert_int_equal(client_mkdir(&c, ROOT, names[i], 0755, &node), -EINVAL);
        assert_int_equal(client_mknod(&c, ROOT, names[i], S_IFREG | 0644, &node), -EINVAL);
        assert_int_equal(client_create(&c, ROOT, names[i], O_RDWR | O_CREAT, 0644, &node, &handle), -EINVAL);
        assert_int_equal(client_symlink(&c, ROOT, names[i], "x", &node), -EINVAL);
        assert_int_equal(client_link(&c, good, ROOT, names[i]), -EINVAL);
        assert_int_equal(client_rename(&c, ROOT, names[i], ROOT, "b", 0), -EINVAL);
        assert_int_equal(client_rename(&c, ROOT, "good", ROOT, names[i], 0), -EINVAL);
        assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, names[i]), -EINVAL);
        assert_int_equal(client_name(&c, FUSE_RMDIR, ROOT, names[i]), -EINVAL);
    }
    assert_int_equal(client_lookup(&c, ROOT, longer, &node), -ENAMETOOLONG);
    assert_int_equal(client_mkdir(&c, ROOT, longer, 0755, &node), -ENAMETOOLONG);
    /* Names that do not end, and none at all. */
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_LOOKUP, .node = ROOT, .data = "good", .data_bytes = 4}), -EINVAL);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_LOOKUP, .node = ROOT}), -EINVAL);
    assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SYMLINK, .node = ROOT, .name = "l", .data = "target", .data_bytes = 6}), -EINVAL);
}

/* Links to the outside, made by the guest or there before, lead nowhere here. */
static void test_symlinks(void **state)
{
    static const char *const targets[] = {"../outside", "../outside/secret", "/etc/passwd", "/proc/self/root", "/proc/self/fd/3", "/proc/self/mem", ".", "..", "/"};
    uint64_t link, node, handle;

    for (unsigned i = 0; i < sizeof(targets) / sizeof(targets[0]); i++) {
        if (i % 2)
            assert_int_equal(symlink(targets[i], in_share("link")), 0);
        else
            assert_int_equal(client_symlink(&c, ROOT, "link", targets[i], NULL), 0);
        assert_int_equal(client_lookup(&c, ROOT, "link", &link), 0);
        assert_true(S_ISLNK(c.reply.entry.attr.mode));
        assert_int_equal(client_open(&c, link, O_RDONLY, &handle), -ELOOP);
        assert_int_equal(client_open(&c, link, O_RDWR | O_TRUNC, &handle), -ELOOP);
        assert_int_equal(client_opendir(&c, link, &handle), -ENOTDIR);
        assert_int_equal(client_lookup(&c, link, "secret", &node), -ENOTDIR);
        assert_int_equal(client_create(&c, link, "new", O_RDWR | O_CREAT, 0644, &node, &handle), -ENOTDIR);
        assert_int_equal(client_mkdir(&c, link, "new", 0755, &node), -ENOTDIR);
        assert_int_equal(client_name(&c, FUSE_UNLINK, link, "secret"), -ENOTDIR);
        assert_int_equal(client_rename(&c, ROOT, "link", link, "moved", 0), -ENOTDIR);
        /* Through the name: CREATE of what is there opens it like any other file. */
        assert_int_equal(client_create(&c, ROOT, "link", O_RDWR | O_CREAT, 0644, &node, &handle), -ELOOP);
        assert_int_equal(client_create(&c, ROOT, "link", O_RDWR | O_CREAT | O_EXCL, 0644, &node, &handle), -EEXIST);
        struct fuse_setattr_in size = {.valid = FATTR_SIZE}, owner = {.valid = FATTR_UID | FATTR_GID, .uid = c.uid, .gid = c.gid},
                               times = {.valid = FATTR_MTIME, .mtime = 5};
        assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SETATTR, .node = link, .arg = &size, .arg_bytes = sizeof(size)}), -ELOOP);
        assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SETATTR, .node = link, .arg = &owner, .arg_bytes = sizeof(owner)}), 0);
        assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SETATTR, .node = link, .arg = &times, .arg_bytes = sizeof(times)}), 0);
        assert_int_equal(client_send(&c, &(struct request){.opcode = FUSE_SETXATTR, .node = link, .arg = &(struct fuse_getxattr_in){1}, .arg_bytes = 8, .name = "user.x",
                                                           .data = "y", .data_bytes = 1}), -EOPNOTSUPP);
        /* A hard link of a symbolic link is that link once more. */
        assert_int_equal(client_link(&c, link, ROOT, "again"), 0);
        assert_true(S_ISLNK(c.reply.entry.attr.mode));
        assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, "again"), 0);
        assert_int_equal(client_name(&c, FUSE_UNLINK, ROOT, "link"), 0);
    }
}

/* A directory that turns into a link between two messages, or while it is known: by the host, or by the guest's other processor. */
static atomic_bool stop_racing;
static atomic_uint rounds;

static void *race_host(void *ctx)
{
    char dir[512], aside[512], link[512];

    snprintf(dir, sizeof(dir), "%s", in_share("dir"));
    snprintf(aside, sizeof(aside), "%s", in_share("aside"));
    snprintf(link, sizeof(link), "%s", in_share("evil"));
    while (!atomic_load(&stop_racing)) {
        (void)!rename(dir, aside);
        (void)!rename(link, dir);
        (void)!rename(dir, link);
        (void)!rename(aside, dir);
        atomic_fetch_add(&rounds, 1);
    }
    return NULL;
}

static void *race_guest(void *ctx)
{
    struct client *mine = malloc(sizeof(*mine));

    *mine = c; /* the same server, another vCPU */
    while (!atomic_load(&stop_racing)) {
        (void)client_rename(mine, ROOT, "dir", ROOT, "evil", RENAME_EXCHANGE);
        atomic_fetch_add(&rounds, 1);
    }
    free(mine);
    return NULL;
}

static void try_all(void)
{
    uint64_t directory, node, handle;

    if (client_lookup(&c, ROOT, "dir", &directory) < 0)
        return;
    if (client_lookup(&c, directory, "secret", &node) == 0) { /* the share has a file of that name, too */
        if (client_open(&c, node, O_RDWR, &handle) == 0) {
            int got = client_read(&c, node, handle, 0, 16);

            assert_true(got < 0 || (got == 6 && !memcmp(c.reply.bytes, "inside", 6)));
            (void)!client_write(&c, node, handle, 0, "inside", 6, 0);
            assert_int_equal(client_release(&c, node, handle), 0);
        }
        client_forget(&c, node, 1);
    }
    if (client_create(&c, directory, "made", O_RDWR | O_CREAT, 0644, &node, &handle) == 0) {
        assert_int_equal(client_release(&c, node, handle), 0);
        client_forget(&c, node, 1);
        (void)client_name(&c, FUSE_UNLINK, directory, "made");
    }
    (void)client_rename(&c, directory, "secret", directory, "secret", 0);
    client_forget(&c, directory, 1);
}

static void race(void *(*racer)(void *), bool few)
{
    uint64_t directory, node;
    pthread_t thread;

    assert_int_equal(client_mkdir(&c, ROOT, "dir", 0755, &directory), 0);
    host_write(in_share("dir"), "secret", "inside");
    assert_int_equal(client_symlink(&c, ROOT, "evil", "../outside", &node), 0);
    if (few)
        fs_limit(c.fs, 2, 4); /* everything is opened anew each time */
    atomic_store(&stop_racing, false);
    assert_int_equal(pthread_create(&thread, NULL, racer, NULL), 0);
    atomic_store(&rounds, 0);
    for (unsigned tries = 0; tries < TRIES || atomic_load(&rounds) < ROUNDS; tries++)
        try_all();
    atomic_store(&stop_racing, true);
    assert_int_equal(pthread_join(thread, NULL), 0);
}

static void test_race_host(void **state)
{
    race(race_host, false);
}

static void test_race_host_reopening(void **state)
{
    race(race_host, true);
}

static void test_race_guest(void **state)
{
    race(race_guest, false);
}

static void test_race_guest_reopening(void **state)
{
    race(race_guest, true);
}

/* A directory that the host moves out of the share: what was not open is not found there; the root's parent never is. */
static void test_moved_out(void **state)
{
    uint64_t directory, node, handle;
    char to[512];

    assert_int_equal(client_mkdir(&c, ROOT, "dir", 0755, &directory), 0);
    assert_int_equal(client_mkdir(&c, directory, "inner", 0755, &node), 0);
    fs_limit(c.fs, 2, 4);
    snprintf(to, sizeof(to), "%s/moved", c.folder);
    assert_int_equal(client_getattr(&c, node), 0);
    assert_int_equal(rename(in_share("dir"), to), 0);
    assert_int_equal(client_create(&c, ROOT, "other", O_RDONLY | O_CREAT, 0644, &handle, &handle), 0);
    assert_int_equal(client_lookup(&c, node, "..", &handle), -EINVAL);
    /* READDIR's dots are names and numbers only, and the root's parent is the root. */
    assert_int_equal(client_opendir(&c, ROOT, &handle), 0);
    assert_int_equal(client_readdir(&c, ROOT, handle, false, 0, 4096), 0);
    struct stat root, outer;
    assert_int_equal(stat(c.share, &root), 0);
    assert_int_equal(stat(c.folder, &outer), 0);
    for (unsigned at = 0; at < c.reply_bytes;) {
        const struct fuse_dirent *dirent = (const void *)(c.reply.bytes + at);

        assert_int_not_equal(dirent->ino, outer.st_ino);
        at += (unsigned)FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + dirent->namelen);
    }
}

/* Devices and FIFOs: not made, not opened. A FIFO without a writer would hold the server up for good. */
static void test_special_files(void **state)
{
    uint64_t node, handle;

    assert_int_equal(client_mknod(&c, ROOT, "chr", S_IFCHR | 0600, &node), -EPERM);
    assert_int_equal(client_mknod(&c, ROOT, "blk", S_IFBLK | 0600, &node), -EPERM);
    assert_int_equal(client_mknod(&c, ROOT, "odd", 0170000 | 0600, &node), -EPERM);
    assert_int_equal(client_rename(&c, ROOT, "a", ROOT, "b", 1u << 2 /* RENAME_WHITEOUT */), -EINVAL);
    assert_int_equal(client_mknod(&c, ROOT, "fifo", S_IFIFO | 0600, &node), 0);
    assert_int_equal(client_open(&c, node, O_RDONLY, &handle), -EACCES);
    assert_int_equal(client_create(&c, ROOT, "fifo", O_RDWR | O_CREAT, 0600, &node, &handle), -EACCES);
    if (mknod(in_share("null"), S_IFCHR | 0666, makedev(1, 3)) == 0) {
        assert_int_equal(client_lookup(&c, ROOT, "null", &node), 0);
        assert_int_equal(client_open(&c, node, O_RDWR, &handle), -EACCES);
        assert_int_equal(client_create(&c, ROOT, "null", O_RDWR | O_CREAT, 0600, &node, &handle), -EACCES);
    }
}

/* Numbers that were never given out, were given back, or are of another kind. */
static void test_numbers(void **state)
{
    uint64_t node, handle, directory;

    assert_int_equal(client_create(&c, ROOT, "f", O_RDWR | O_CREAT, 0644, &node, &handle), 0);
    assert_int_equal(client_mkdir(&c, ROOT, "d", 0755, &directory), 0);
    for (unsigned bit = 0; bit < 64; bit++) {
        uint64_t wrong = node ^ 1ull << bit;

        if (wrong != ROOT && wrong != directory)
            assert_int_equal(client_getattr(&c, wrong), -ESTALE);
        assert_int_equal(client_read(&c, node, handle ^ 1ull << bit, 0, 1), -EBADF);
    }
    assert_int_equal(client_getattr(&c, 0), -ESTALE);
    assert_int_equal(client_link(&c, 12345, ROOT, "x"), -ESTALE);
    assert_int_equal(client_rename(&c, ROOT, "f", 12345, "x", 0), -ESTALE);
    assert_int_equal(client_link(&c, directory, ROOT, "x"), -EPERM);
    client_forget(&c, ROOT, UINT64_MAX);
    assert_int_equal(client_getattr(&c, ROOT), 0);
    client_forget(&c, node, UINT64_MAX);
    assert_int_equal(client_getattr(&c, node), -ESTALE);
    assert_int_equal(client_read(&c, node, handle, 0, 1), 0); /* a handle keeps its file */
    assert_int_equal(client_release(&c, node, handle), 0);
}

/* Far deeper than a path can be long, and up again. */
static void test_deep(void **state)
{
    uint64_t node = ROOT, next, handle;
    char name[201];

    memset(name, 'd', 200);
    name[200] = '\0';
    fs_limit(c.fs, 16, 16);
    for (unsigned i = 0; i < 100; i++) {
        assert_int_equal(client_mkdir(&c, node, name, 0755, &next), 0);
        node = next;
    }
    assert_int_equal(client_create(&c, node, "end", O_RDWR | O_CREAT, 0644, &next, &handle), 0);
    assert_int_equal(client_write(&c, next, handle, 0, "deep", 4, 0), 4);
    for (unsigned i = 0; i < 20; i++) /* pushes the others' descriptors out */
        assert_int_equal(client_lookup(&c, ROOT, name, &next), 0);
    assert_int_equal(client_lookup(&c, node, "end", &next), 0);
    assert_int_equal(client_getattr(&c, next), 0);
    assert_int_equal(c.reply.attr.attr.size, 4);
}

/* The kernel's own file systems are not there, whether shared or found below. */
static void test_kernel_files(void **state)
{
    struct fs_config config = plain;
    struct error err = {0};
    struct fs *fs;
    uint64_t node;

    config.path = "/proc";
    assert_true(fs_create(&fs, &config, &err) < 0);
    config.path = "/proc/self";
    assert_true(fs_create(&fs, &config, &err) < 0);
    config.path = "/etc/passwd";
    assert_true(fs_create(&fs, &config, &err) < 0);
    fs_destroy(c.fs);
    config.path = "/";
    config.readonly = true;
    client_connect(&c, config);
    assert_int_equal(client_init(&c, ~0u), 0);
    assert_int_equal(client_lookup(&c, ROOT, "proc", &node), -EACCES);
    assert_int_equal(client_lookup(&c, ROOT, "sys", &node), -EACCES);
    assert_int_equal(client_lookup(&c, ROOT, "etc", &node), 0);
}

/* Messages whose lengths lie. */
static void test_lengths(void **state)
{
    static const uint32_t lengths[] = {0, 1, 39, 40, 41, 4096, 1u << 20, UINT32_MAX};
    uint8_t answer[256];

    for (uint32_t opcode = 0; opcode < 60; opcode++) {
        for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
            for (unsigned room = 0; room < 200; room += 15) {
                uint8_t bytes[512] = {0};
                struct fuse_in_header header = {.len = lengths[i], .opcode = opcode, .unique = 5, .nodeid = ROOT};
                struct iovec in[] = {{bytes, 100}, {bytes + 100, 28}}, out = {answer, room};
                struct fs_message message = {.in = in, .out = &out, .in_count = 2, .out_count = 1, .in_bytes = i < 4 ? lengths[i] : 128, .out_bytes = room};

                memcpy(bytes, &header, sizeof(header));
                if (message.in_bytes < 100)
                    in[0].iov_len = message.in_bytes;
                message.in_count = message.in_bytes < 100 ? 1 : 2;
                if (message.in_count == 2)
                    message.in_bytes = 128;
                assert_true(fs_serve(c.fs, &message) <= room);
                (void)fs_is_quick(c.fs, &message);
            }
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, start, stop)
        TEST(test_names), TEST(test_symlinks), TEST(test_race_host), TEST(test_race_host_reopening), TEST(test_race_guest), TEST(test_race_guest_reopening),
        TEST(test_moved_out), TEST(test_special_files), TEST(test_numbers), TEST(test_deep), TEST(test_kernel_files), TEST(test_lengths),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
