/* Preloaded: the C library as other hosts have it, whose calls are others. */
#undef _FILE_OFFSET_BITS /* both names of each function */
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

/* glibc from 2.39 on, musl: not newfstatat. */
int fstat(int fd, struct stat *st)
{
    return (int)syscall(SYS_fstat, fd, st);
}

int fstat64(int fd, struct stat64 *st)
{
    return (int)syscall(SYS_fstat, fd, st);
}

/* Every directory is on storage in the network, where FILTER_REMOTE says so. */
int fstatfs64(int fd, struct statfs64 *about)
{
    int result = (int)syscall(SYS_fstatfs, fd, about);
    if (result == 0 && getenv("FILTER_REMOTE"))
        about->f_type = NFS_SUPER_MAGIC;
    return result;
}

int fstatfs(int fd, struct statfs *about)
{
    return fstatfs64(fd, (struct statfs64 *)about);
}
