/*
 * Metadata operations of small files in a directory: metadata DIRECTORY [FILES]. Prints microseconds per operation, one line each. Static, so that the same program runs on the
 * host and in a guest (bench/share/run).
 */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <time.h>
#include <unistd.h>

static double now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static void must(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static const char *name_of(unsigned i)
{
    static char name[32];

    snprintf(name, sizeof(name), "d%u/file%u", i % 10, i);
    return name;
}

static void create_one(unsigned i)
{
    char data[1000];
    int fd = open(name_of(i), O_CREAT | O_EXCL | O_WRONLY, 0644);

    must(fd, "open");
    memset(data, (int)i, sizeof(data));
    must((int)write(fd, data, sizeof(data)), "write");
    must(close(fd), "close");
}

static void stat_one(unsigned i)
{
    struct stat st;

    must(stat(name_of(i), &st), "stat");
}

/* As little as a request can be: its ratio is that of asking at all. */
static void statfs_one(unsigned i)
{
    struct statfs fs;

    must(statfs(".", &fs), "statfs");
}

static void read_one(unsigned i)
{
    char data[4096];
    int fd = open(name_of(i), O_RDONLY);

    must(fd, "open");
    must((int)read(fd, data, sizeof(data)), "read");
    must(close(fd), "close");
}

static void missing_one(unsigned i)
{
    char name[64];

    snprintf(name, sizeof(name), "%s.missing", name_of(i));
    if (access(name, F_OK) == 0)
        must(-1, "a file that is not there");
}

static void rename_one(unsigned i)
{
    char to[64];

    snprintf(to, sizeof(to), "%s.new", name_of(i));
    must(rename(name_of(i), to), "rename");
    must(rename(to, name_of(i)), "rename");
}

static void chmod_one(unsigned i)
{
    must(chmod(name_of(i), 0600), "chmod");
}

static void unlink_one(unsigned i)
{
    must(unlink(name_of(i)), "unlink");
}

/* As find and ls -l do: names, then attributes. Per file. */
static void list(unsigned files)
{
    for (unsigned d = 0; d < 10; d++) {
        char directory[8], name[300];
        struct dirent *entry;
        struct stat st;
        DIR *dir;

        snprintf(directory, sizeof(directory), "d%u", d);
        dir = opendir(directory);
        must(dir ? 0 : -1, "opendir");
        while ((entry = readdir(dir))) {
            snprintf(name, sizeof(name), "%s/%s", directory, entry->d_name);
            must(lstat(name, &st), "lstat");
        }
        closedir(dir);
    }
}

/* New look-ups: what the guest remembers is given up. Needs root, and does nothing without. */
static void forget(void)
{
    int fd = open("/proc/sys/vm/drop_caches", O_WRONLY);

    if (fd >= 0)
        (void)!write(fd, "2", 1);
    if (fd >= 0)
        close(fd);
}

static void report(const char *what, double started_us, unsigned count)
{
    printf("%-14s %8.2f\n", what, (now_us() - started_us) / count);
    fflush(stdout);
}

static void each(const char *what, void (*one)(unsigned), unsigned files)
{
    double started_us = now_us();

    for (unsigned i = 0; i < files; i++)
        one(i);
    report(what, started_us, files);
}

int main(int argc, char **argv)
{
    unsigned files = argc > 2 ? (unsigned)atoi(argv[2]) : 1000;
    double started_us;

    if (argc < 2 || chdir(argv[1]) < 0 || files == 0) {
        fprintf(stderr, "metadata DIRECTORY [FILES]\n");
        return 2;
    }
    for (unsigned d = 0; d < 10; d++) {
        char directory[8];

        snprintf(directory, sizeof(directory), "d%u", d);
        must(mkdir(directory, 0755), "mkdir");
    }
    each("create", create_one, files);
    each("statfs", statfs_one, files);
    each("stat", stat_one, files);
    each("stat-again", stat_one, files);
    each("missing", missing_one, files);
    each("read", read_one, files);
    each("chmod", chmod_one, files);
    each("rename-twice", rename_one, files);
    started_us = now_us();
    list(files);
    report("list", started_us, files);
    started_us = now_us();
    list(files);
    report("list-again", started_us, files);
    forget();
    started_us = now_us();
    list(files);
    report("list-cold", started_us, files);
    forget();
    each("stat-cold", stat_one, files);
    each("unlink", unlink_one, files);
    for (unsigned d = 0; d < 10; d++) {
        char directory[8];

        snprintf(directory, sizeof(directory), "d%u", d);
        must(rmdir(directory), "rmdir");
    }
    return 0;
}
