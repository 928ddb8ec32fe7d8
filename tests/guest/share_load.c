/*
 * Runs in the guest of share.py, statically linked.
 *
 *     share_load compare A B SEED STEPS   the same random operations in both directories; every result, errno, attribute and byte must agree
 *     share_load mmap FILE                writes through a shared mapping
 *     share_load locks FILE               record locks between two processes
 */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define FILES 12u /* names in each directory */
#define OPEN_MAX_PAIRS 10u
#define SIZE_MAX_BYTES 300000u

static uint64_t random_state;

static uint32_t rnd(uint32_t below)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % below;
}

static const char *base[2];
static struct pair {
    int fd[2];
    bool used;
} pairs[OPEN_MAX_PAIRS];
static unsigned step, succeeded;

static void fail(const char *what, long a, long b)
{
    printf("step %u: %s: %ld in %s, %ld in %s\n", step, what, a, base[0], b, base[1]);
    exit(1);
}

/* A random path: "dN/..." at most three deep. The same for both sides but for the base. */
static void make_path(char out[2][256])
{
    char tail[128] = "";
    unsigned depth = rnd(3);

    for (unsigned i = 0; i < depth; i++)
        snprintf(tail + strlen(tail), sizeof(tail) - strlen(tail), "/d%u", rnd(3));
    snprintf(tail + strlen(tail), sizeof(tail) - strlen(tail), "/%c%u", "fffdl"[rnd(5)], rnd(rnd(2) ? 3 : FILES));
    for (unsigned s = 0; s < 2; s++)
        snprintf(out[s], 256, "%s%s", base[s], tail);
}

static void same(const char *what, const long result[2], const int error[2])
{
    succeeded += result[0] >= 0;
    if ((result[0] < 0) != (result[1] < 0) || (result[0] < 0 && error[0] != error[1]))
        fail(what, result[0] < 0 ? -error[0] : result[0], result[1] < 0 ? -error[1] : result[1]);
}

#define BOTH(what, expression)                                                                                                                                \
    do {                                                                                                                                                      \
        long result_[2];                                                                                                                                      \
        int error_[2];                                                                                                                                        \
        for (unsigned s = 0; s < 2; s++) {                                                                                                                    \
            errno = 0;                                                                                                                                        \
            result_[s] = (expression);                                                                                                                        \
            error_[s] = errno;                                                                                                                                \
        }                                                                                                                                                     \
        same(what, result_, error_);                                                                                                                          \
    } while (0)

static void compare_stat(char path[2][256])
{
    struct stat st[2];
    long result[2];
    int error[2];

    for (unsigned s = 0; s < 2; s++) {
        result[s] = lstat(path[s], &st[s]);
        error[s] = errno;
    }
    same("lstat", result, error);
    if (result[0] < 0)
        return;
    if (st[0].st_mode != st[1].st_mode)
        fail("mode", st[0].st_mode, st[1].st_mode);
    if (!S_ISDIR(st[0].st_mode) && st[0].st_nlink != st[1].st_nlink)
        fail("links", (long)st[0].st_nlink, (long)st[1].st_nlink);
    if (!S_ISDIR(st[0].st_mode) && st[0].st_size != st[1].st_size)
        fail("size", (long)st[0].st_size, (long)st[1].st_size);
    if (st[0].st_uid != st[1].st_uid)
        fail("owner", (long)st[0].st_uid, (long)st[1].st_uid);
}

static void compare_content(int a, int b)
{
    static uint8_t data[2][SIZE_MAX_BYTES * 2];
    const int fd[2] = {a, b};
    long got[2];

    for (unsigned s = 0; s < 2; s++)
        got[s] = pread(fd[s], data[s], sizeof(data[s]), 0);
    if (got[0] != got[1])
        fail("bytes", got[0], got[1]);
    for (long i = 0; i < got[0]; i++) {
        if (data[0][i] != data[1][i]) {
            printf("step %u: byte %ld of %ld: %#x, %#x\n", step, i, got[0], data[0][i], data[1][i]);
            exit(1);
        }
    }
}

static int by_name(const void *a, const void *b)
{
    return strcmp(a, b);
}

static unsigned read_names(const char *path, char names[64][32])
{
    unsigned count = 0;
    DIR *dir = opendir(path);
    struct dirent *entry;

    if (!dir)
        return ~0u;
    while ((entry = readdir(dir)) && count < 64)
        snprintf(names[count++], 32, "%.30s", entry->d_name);
    closedir(dir);
    qsort(names, count, 32, by_name);
    return count;
}

static void compare_tree(const char *a, const char *b)
{
    char names[2][64][32], path[2][256];
    unsigned count[2] = {read_names(a, names[0]), read_names(b, names[1])};

    if (count[0] != count[1])
        fail("entries", count[0], count[1]);
    for (unsigned i = 0; count[0] != ~0u && i < count[0]; i++) {
        struct stat st;
        int fd[2];

        if (strcmp(names[0][i], names[1][i])) {
            printf("step %u: %s and %s in %s\n", step, names[0][i], names[1][i], a);
            exit(1);
        }
        if (names[0][i][0] == '.')
            continue;
        snprintf(path[0], 256, "%.200s/%.31s", a, names[0][i]);
        snprintf(path[1], 256, "%.200s/%.31s", b, names[1][i]);
        compare_stat(path);
        lstat(path[0], &st);
        if (S_ISDIR(st.st_mode))
            compare_tree(path[0], path[1]);
        if (!S_ISREG(st.st_mode))
            continue;
        fd[0] = open(path[0], O_RDONLY);
        fd[1] = open(path[1], O_RDONLY);
        if (fd[0] >= 0 && fd[1] >= 0)
            compare_content(fd[0], fd[1]);
        close(fd[0]);
        close(fd[1]);
    }
}

static void open_pair(char path[2][256])
{
    static const int accesses[] = {O_RDONLY, O_WRONLY, O_RDWR, O_RDWR};
    struct pair *pair = &pairs[rnd(OPEN_MAX_PAIRS)];
    int flags = accesses[rnd(4)] | (rnd(2) ? O_CREAT : 0) | (rnd(6) ? 0 : O_TRUNC) | (rnd(6) ? 0 : O_EXCL) | (rnd(4) ? 0 : O_APPEND) | (rnd(8) ? 0 : O_NOFOLLOW);
    mode_t mode = (mode_t)(0600 | rnd(0200));

    for (unsigned s = 0; s < 2 && pair->used; s++)
        close(pair->fd[s]);
    pair->used = false;
    BOTH("open", pair->fd[s] = open(path[s], flags, mode));
    pair->used = pair->fd[0] >= 0;
}

static void map_pair(const struct pair *pair)
{
    struct stat st;
    uint32_t value = rnd(256), at;
    uint8_t *map[2];

    if (fstat(pair->fd[0], &st) < 0 || !S_ISREG(st.st_mode) || st.st_size == 0)
        return;
    at = rnd((uint32_t)st.st_size);
    for (unsigned s = 0; s < 2; s++)
        map[s] = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, pair->fd[s], 0);
    for (unsigned s = 0; s < 2; s++) {
        if (map[0] == MAP_FAILED || map[1] == MAP_FAILED)
            break; /* a share without a cache has no such mappings */
        map[s][at] = (uint8_t)value;
        msync(map[s], (size_t)st.st_size, value % 2 ? MS_SYNC : MS_ASYNC);
    }
    for (unsigned s = 0; s < 2; s++) {
        if (map[s] != MAP_FAILED)
            munmap(map[s], (size_t)st.st_size);
    }
}

static void use_pair(void)
{
    static uint8_t data[SIZE_MAX_BYTES];
    const struct pair *pair = &pairs[rnd(OPEN_MAX_PAIRS)];
    uint32_t size = 1 + rnd(rnd(3) ? 5000 : SIZE_MAX_BYTES - 1), at = rnd(rnd(3) ? 10000 : SIZE_MAX_BYTES), fill = rnd(256);
    struct stat st[2];

    if (!pair->used)
        return;
    switch (rnd(9)) {
    case 0:
    case 1:
        for (uint32_t i = 0; i < size; i++)
            data[i] = (uint8_t)(fill + i * 7);
        BOTH("pwrite", pwrite(pair->fd[s], data, size, at));
        break;
    case 2:
        BOTH("write", write(pair->fd[s], "some text", 9));
        break;
    case 3:
        if ((fcntl(pair->fd[0], F_GETFL) & O_ACCMODE) != O_WRONLY && fstat(pair->fd[0], st) == 0 && S_ISREG(st[0].st_mode))
            compare_content(pair->fd[0], pair->fd[1]);
        break;
    case 4:
        BOTH("ftruncate", ftruncate(pair->fd[s], at));
        break;
    case 5:
        BOTH("fstat", fstat(pair->fd[s], &st[s]));
        if (S_ISREG(st[0].st_mode) && (st[0].st_size != st[1].st_size || st[0].st_nlink != st[1].st_nlink))
            fail("size or links of an open file", (long)st[0].st_size * 100 + (long)st[0].st_nlink, (long)st[1].st_size * 100 + (long)st[1].st_nlink);
        break;
    case 6:
        map_pair(pair);
        break;
    case 7:
        BOTH("fallocate", fallocate(pair->fd[s], 3, at & ~4095u, 4096 + (size & ~4095u))); /* punch a hole */
        break;
    case 8:
        BOTH("fsync", fsync(pair->fd[s]));
        break;
    }
}

static void one_step(void)
{
    char a[2][256], b[2][256];
    uint32_t number = rnd(256);

    make_path(a);
    make_path(b);
    switch (rnd(20)) {
    case 0:
    case 1:
    case 2:
    case 3:
        open_pair(a);
        break;
    case 4:
        BOTH("mkdir", mkdir(a[s], 0700 | number % 64));
        break;
    case 5:
        BOTH("rmdir", rmdir(a[s]));
        break;
    case 6:
        BOTH("unlink", unlink(a[s]));
        break;
    case 7:
    case 8:
        BOTH("rename", rename(a[s], b[s]));
        break;
    case 9:
        BOTH("renameat2", renameat2(AT_FDCWD, a[s], AT_FDCWD, b[s], number % 2 ? RENAME_EXCHANGE : RENAME_NOREPLACE));
        break;
    case 10:
        BOTH("link", link(a[s], b[s]));
        break;
    case 11:
        BOTH("symlink", symlink(strrchr(b[s], '/') + 1, a[s]));
        break;
    case 12:
        compare_stat(a);
        break;
    case 13:
        BOTH("chmod", chmod(a[s], 0700 | number % 64)); /* the owner needs all: on the host he may be an ordinary user */
        break;
    case 14:
        BOTH("truncate", truncate(a[s], (off_t)number * 100));
        break;
    case 15: {
        char target[2][256] = {"", ""};

        BOTH("readlink", readlink(a[s], target[s], 255));
        if (strcmp(target[0], target[1]))
            fail("the link's target", 0, 1);
        break;
    }
    default:
        use_pair();
        break;
    }
}

static int compare(const char *a, const char *b, uint64_t seed, unsigned steps)
{
    base[0] = a;
    base[1] = b;
    random_state = seed * 2 + 1;
    umask(022);
    for (step = 0; step < steps; step++) {
        one_step();
        if (step % 500 == 499)
            compare_tree(a, b);
    }
    compare_tree(a, b);
    printf("agree, %u of %u succeeded\n", succeeded, steps);
    return 0;
}

static int write_mapped(const char *path)
{
    const size_t size = 1 << 20;
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    uint8_t *map;

    if (fd < 0 || ftruncate(fd, (off_t)size) < 0)
        return 1;
    map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        perror("mmap");
        return 1;
    }
    for (size_t i = 0; i < size; i++)
        map[i] = (uint8_t)(i * 31 >> 8);
    return msync(map, size, MS_SYNC) < 0;
}

/* The child must be refused what the parent has locked, and get the rest. */
static int locks(const char *path)
{
    struct flock mine = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 10};
    int fd = open(path, O_RDWR | O_CREAT, 0644), status;

    if (fd < 0 || fcntl(fd, F_SETLK, &mine) < 0)
        return 1;
    if (fork() == 0) {
        struct flock other = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 15, .l_len = 1}, beside = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 10};
        int again = open(path, O_RDWR);

        _exit(!(fcntl(again, F_SETLK, &other) < 0 && (errno == EAGAIN || errno == EACCES) && fcntl(again, F_SETLK, &beside) == 0 && flock(again, LOCK_EX) == 0));
    }
    return wait(&status) < 0 || status != 0;
}

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "compare"))
        return compare(argv[2], argv[3], strtoull(argv[4], NULL, 0), (unsigned)atoi(argv[5]));
    if (argc == 3 && !strcmp(argv[1], "mmap"))
        return write_mapped(argv[2]);
    if (argc == 3 && !strcmp(argv[1], "locks"))
        return locks(argv[2]);
    return 2;
}
