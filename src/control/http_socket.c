/*
 * The listening Unix socket of a server: mode 0600 from its first moment, and never in place of something that is not a dead socket. Stateless; any thread.
 */
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "control/http_priv.h"

#define BACKLOG 128

/* A socket that refuses connections is left over from a process that was killed. */
static void remove_dead(const char *path, const struct sockaddr_un *address)
{
    struct stat st;
    if (lstat(path, &st) || !S_ISSOCK(st.st_mode))
        return;
    int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (probe < 0)
        return;
    if (connect(probe, (const struct sockaddr *)address, sizeof *address) && errno == ECONNREFUSED)
        unlink(path);
    close(probe);
}

int http_listen(const char *path, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return error_set(err, -ENAMETOOLONG, "socket path %s is longer than %zu characters", path, sizeof address.sun_path - 1);
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_set(err, -errno, "cannot make a socket: %s", strerror(errno));
    remove_dead(path, &address);
    /* bind gives the file the mode that the socket has. */
    if (fchmod(fd, 0600) || bind(fd, (const struct sockaddr *)&address, sizeof address) || listen(fd, BACKLOG)) {
        int code = errno;
        close(fd);
        return error_set(err, -code, "cannot open the API socket at %s: %s", path,
                         code == EADDRINUSE ? "it is used already, or something else is there; remove it or choose another path" : strerror(code));
    }
    return fd;
}
