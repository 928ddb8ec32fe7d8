/*
 * Fuzz target: the file server of shared directories under a hostile guest.
 *
 * The input is a list of 16-byte steps {operation, flags, node, other node, name, number}: messages with some sense in them, so that files are made, moved, opened and removed, and with
 * whatever else the bytes say in the places of sizes, offsets and flags. Other steps reset the server, or save it, change a byte of what was saved, and load that. The
 * directory lies beside one that must not change, and whose content must not be in any answer.
 */
#include <dirent.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fs/fs.h"
#include "util/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define STEPS_MAX 600u
#define NODES 8u
#define HANDLES 8u
#define ROOM_BYTES 8192u
static const char secret[] = "this is outside of the share";

struct step {
    uint8_t op, flags, node, other;
    uint16_t name, more;
    uint64_t number;
};

struct target {
    char folder[48];
    struct fs *fs;
    uint64_t node[NODES], handle[HANDLES];
    uint8_t answer[ROOM_BYTES];
};

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC | O_CLOEXEC, 0644);

    must(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

static void build(struct target *t, uint8_t options)
{
    char path[96];
    struct fs_config config = {.path = path,
                               .readonly = (options & 7) == 7,
                               .cache = options >> 3 & 1 ? FS_CACHE_ALWAYS : FS_CACHE_AUTO,
                               .writeback = options >> 4 & 1,
                               .xattr = true,
                               .uid = options >> 5 & 1 ? 0 : FS_ID_AS_ON_HOST,
                               .gid = FS_ID_AS_ON_HOST};

    strcpy(t->folder, access("/dev/shm", W_OK) == 0 ? "/dev/shm/fuzz-fs-XXXXXX" : "/tmp/fuzz-fs-XXXXXX");
    must(mkdtemp(t->folder) != NULL);
    snprintf(path, sizeof(path), "%s/outside", t->folder);
    write_file(path, secret);
    snprintf(path, sizeof(path), "%s/share", t->folder);
    must(mkdir(path, 0755) == 0);
    must(fs_create(&t->fs, &config, NULL) == 0);
    fs_limit(t->fs, 4 + (options & 31), 8);
    for (unsigned i = 0; i < NODES; i++)
        t->node[i] = FUSE_ROOT_ID;
    snprintf(path, sizeof(path), "%s/share/out", t->folder);
    must(symlink("../outside", path) == 0);
    snprintf(path, sizeof(path), "%s/share/up", t->folder);
    must(symlink("..", path) == 0);
}

static void remove_tree(int parent, const char *name)
{
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    struct dirent *entry;

    if (dir)
        (void)!fchmod(fd, 0700);
    while (dir && (entry = readdir(dir))) {
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            remove_tree(fd, entry->d_name);
    }
    (void)!unlinkat(parent, name, dir ? AT_REMOVEDIR : 0);
    if (dir)
        closedir(dir);
}

static void tear_down(struct target *t)
{
    char path[96], content[64] = "";
    struct stat st;
    int fd;

    fs_destroy(t->fs);
    snprintf(path, sizeof(path), "%s/outside", t->folder);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    must(fd >= 0 && read(fd, content, sizeof(content)) == sizeof(secret) - 1 && !memcmp(content, secret, sizeof(secret) - 1));
    must(fstat(fd, &st) == 0 && st.st_nlink == 1 && (st.st_mode & 07777) == 0644);
    close(fd);
    must(stat(t->folder, &st) == 0 && st.st_nlink == 3);
    remove_tree(AT_FDCWD, t->folder);
}

static const char *name_of(uint16_t choice)
{
    static const char *const names[] = {"a", "b", "c", "d", "e", "out", "up", "..", ".", "", "a/b", "/", "../outside", "user.x", "security.y", "f"};

    return names[choice % 16 < 7 || choice % 5 == 0 ? choice % 16 : choice % 5];
}

/* The operation's structure with everything in its place that can be, and bytes of the input elsewhere. */
static unsigned fill(const struct target *t, const struct step *s, uint32_t opcode, uint8_t *arg)
{
    uint64_t words[16];
    uint32_t flags = (uint32_t)s->number;

    for (unsigned i = 0; i < 16; i++)
        words[i] = s->number >> (i * 8 % 57) << (s->more % 29);
    memcpy(arg, words, sizeof(words));
    memcpy(arg, &t->handle[s->other % HANDLES], 8); /* most structures begin with a handle */
    switch (opcode) {
    case FUSE_CREATE:
        memcpy(arg, &(struct fuse_create_in){.flags = flags & 0x7FFFFF, .mode = S_IFREG | (flags >> 7 & 07777) | 0600}, sizeof(struct fuse_create_in));
        return sizeof(struct fuse_create_in);
    case FUSE_OPEN:
    case FUSE_OPENDIR:
        memcpy(arg, &(struct fuse_open_in){.flags = flags & 0x7FFFFF}, sizeof(struct fuse_open_in));
        return sizeof(struct fuse_open_in);
    case FUSE_MKNOD:
        memcpy(arg, &(struct fuse_mknod_in){.mode = flags & 0xFFFF}, sizeof(struct fuse_mknod_in));
        return sizeof(struct fuse_mknod_in);
    case FUSE_MKDIR:
        memcpy(arg, &(struct fuse_mkdir_in){.mode = 0700 | (flags & 07777)}, sizeof(struct fuse_mkdir_in));
        return sizeof(struct fuse_mkdir_in);
    case FUSE_RENAME:
    case FUSE_LINK:
        memcpy(arg, &t->node[s->other % NODES], 8);
        return 8;
    case FUSE_RENAME2:
        memcpy(arg, &(struct fuse_rename2_in){.newdir = t->node[s->other % NODES], .flags = flags & 7}, sizeof(struct fuse_rename2_in));
        return sizeof(struct fuse_rename2_in);
    case FUSE_READ:
    case FUSE_READDIR:
    case FUSE_READDIRPLUS:
        memcpy(arg + 8, &(struct {uint64_t offset; uint32_t size; }){s->more % 3 ? s->more : s->number, flags >> 16}, 12);
        return sizeof(struct fuse_read_in);
    case FUSE_WRITE:
        memcpy(arg, &(struct fuse_write_in){.fh = t->handle[s->other % HANDLES], .offset = s->number & 0xFFFFF, .size = s->more % 600, .write_flags = flags >> 29, .flags = flags},
               sizeof(struct fuse_write_in));
        return sizeof(struct fuse_write_in);
    case FUSE_SETATTR: {
        struct fuse_setattr_in in = {.valid = s->more & 0xFFF, .fh = t->handle[s->other % HANDLES], .size = s->number & 0xFFFFF, .mode = flags >> 7, .uid = flags >> 30, .gid = flags >> 31,
                                     .mtime = s->number, .atime = flags, .mtimensec = flags};

        memcpy(arg, &in, sizeof(in));
        return sizeof(in);
    }
    case FUSE_FALLOCATE: {
        struct fuse_fallocate_in in = {.fh = t->handle[s->other % HANDLES], .offset = s->more, .length = s->number & 0xFFFFF, .mode = flags >> 20 & 0x7F};

        memcpy(arg, &in, sizeof(in));
        return sizeof(in);
    }
    case FUSE_COPY_FILE_RANGE: {
        struct fuse_copy_file_range_in in = {.fh_in = t->handle[s->node % HANDLES], .fh_out = t->handle[s->other % HANDLES], .off_out = s->more, .len = s->number & 0xFFFF};

        memcpy(arg, &in, sizeof(in));
        return sizeof(in);
    }
    case FUSE_INIT:
        memcpy(arg, &(struct fuse_init_in){.major = 7, .minor = 31 + (flags & 7), .flags = ~0u}, sizeof(struct fuse_init_in));
        return sizeof(struct fuse_init_in);
    case FUSE_FORGET:
        memcpy(arg, &s->number, 8);
        return 8;
    case FUSE_LOOKUP:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_SYMLINK:
    case FUSE_READLINK:
    case FUSE_REMOVEXATTR:
        return 0;
    case FUSE_SETXATTR:
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
        memcpy(arg, &(uint64_t){s->more % 300}, 8);
        return 8;
    case FUSE_RELEASE:
        return sizeof(struct fuse_release_in);
    default:
        return s->more % 128;
    }
}

/* Files stay small enough to look through. */
static bool is_large(uint32_t opcode, const struct step *s)
{
    return opcode == FUSE_SYNCFS || (opcode == FUSE_SETATTR && s->number >> 40 == 0xFF);
}

static void remember(struct target *t, const struct step *s, uint32_t opcode, uint64_t got)
{
    const uint8_t *body = t->answer + sizeof(struct fuse_out_header);
    uint64_t first;

    if (got < sizeof(struct fuse_out_header) + 16)
        return;
    memcpy(&first, body, 8);
    if (opcode == FUSE_LOOKUP || opcode == FUSE_MKDIR || opcode == FUSE_MKNOD || opcode == FUSE_SYMLINK || opcode == FUSE_CREATE)
        t->node[s->flags % NODES] = first;
    if (opcode == FUSE_OPEN || opcode == FUSE_OPENDIR)
        t->handle[s->flags % HANDLES] = first;
    if (opcode == FUSE_CREATE)
        memcpy(&t->handle[s->flags % HANDLES], body + sizeof(struct fuse_entry_out), 8);
}

static void send(struct target *t, const struct step *s)
{
    static const uint8_t opcodes[] = {1, 1, 1, 2, 3, 4, 5, 6, 8, 9, 9, 10, 11, 12, 13, 14, 14, 15, 15, 16, 16, 17, 18, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 34, 35, 35, 35, 36,
                                      39, 42, 43, 44, 44, 45, 46, 47, 48, 51, 255};
    uint32_t opcode = opcodes[s->op % sizeof(opcodes)];
    uint8_t bytes[2048] = {0}, *end = bytes + sizeof(struct fuse_in_header);
    struct fuse_in_header header = {.opcode = opcode, .unique = 9, .nodeid = t->node[s->node % NODES]};
    const size_t first = s->flags & 64 ? s->more % 200 : 100;
    struct iovec in, out[2] = {{t->answer, first}, {t->answer + first, s->flags & 128 ? s->more % 2000 : 7900}};
    struct fs_message message = {.in = &in, .out = out, .in_count = 1, .out_count = 2, .out_bytes = out[0].iov_len + out[1].iov_len};
    uint64_t got;

    if (is_large(opcode, s))
        return;
    end += fill(t, s, opcode, end);
    for (unsigned i = 0; i < 2 && opcode != FUSE_WRITE; i++)
        end = (uint8_t *)stpcpy((char *)end, name_of(i ? s->more : s->name)) + 1;
    end += 600 * (opcode == FUSE_WRITE || opcode == FUSE_SETXATTR);
    header.len = (uint32_t)(end - bytes) - (s->flags % 32 == 31 ? s->more % 40 : 0);
    memcpy(bytes, &header, sizeof(header));
    in = (struct iovec){bytes, (size_t)(end - bytes)};
    message.in_bytes = in.iov_len;
    memset(t->answer, 0, sizeof(t->answer));
    (void)fs_is_quick(t->fs, &message);
    got = fs_serve(t->fs, &message);
    must(got <= message.out_bytes && got <= sizeof(t->answer));
    must(!memmem(t->answer, sizeof(t->answer), secret, sizeof(secret) - 1));
    remember(t, s, opcode, got);
}

static uint32_t crc32_of(const uint8_t *bytes, size_t count)
{
    uint32_t crc = ~0u;

    for (size_t i = 0; i < count; i++) {
        crc ^= bytes[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
    }
    return ~crc;
}

/* Saves, and loads with a byte changed behind the checksum's back. */
static void save_and_load(struct target *t, const struct step *s)
{
    struct state_io *io = state_writer_create(), *reader;
    const size_t header_bytes = 4 + 1 + 5 + 4 + 8; /* of a section named "share" */
    const void *saved;
    uint8_t *copy;
    size_t size;
    uint32_t crc;

    state_begin(io, "share", 1);
    fs_state(t->fs, io);
    must(state_end(io) == 0);
    saved = state_writer_data(io, &size);
    copy = malloc(size);
    must(copy != NULL);
    memcpy(copy, saved, size);
    if (s->flags & 1)
        copy[header_bytes + s->number % (size - header_bytes - 4)] ^= (uint8_t)(s->more | 1);
    crc = crc32_of(copy + header_bytes, size - header_bytes - 4);
    memcpy(copy + size - 4, &crc, 4);
    reader = state_reader_create(copy, size);
    state_begin(reader, "share", 1);
    fs_state(t->fs, reader);
    must(state_end(reader) == 0 || s->flags & 1);
    state_io_destroy(reader);
    state_io_destroy(io);
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct target t = {0};
    struct step step = {.op = 29}; /* INIT */

    log_set_level(LOG_ERROR);
    if (size == 0)
        return 0;
    build(&t, data[0]);
    send(&t, &step);
    for (size_t i = 0; 1 + (i + 1) * sizeof(step) <= size && i < STEPS_MAX; i++) {
        memcpy(&step, data + 1 + i * sizeof(step), sizeof(step));
        if (step.op == 255)
            fs_reset(t.fs);
        else if (step.op >= 250)
            save_and_load(&t, &step);
        else
            send(&t, &step);
    }
    tear_down(&t);
    return 0;
}
