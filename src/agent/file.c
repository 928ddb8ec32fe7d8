/* doppel-agent: copying files and telling about the guest (protocol.h). Blocking, a session a process. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "agent/agent.h"

/* A path of a request: text that ends, and ends where the body does. */
static const char *path_of(const uint8_t *at, uint32_t size_bytes)
{
    const char *path = (const char *)at;
    return size_bytes >= 2 && strnlen(path, size_bytes) == size_bytes - 1 ? path : NULL;
}

static int write_all(int fd, const uint8_t *data, size_t size_bytes)
{
    while (size_bytes) {
        ssize_t n = write(fd, data, size_bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        data += n;
        size_bytes -= (size_t)n;
    }
    return 0;
}

/* Takes DATA until END. 0; -errno of writing; 1: the peer has gone or makes no sense. */
static int receive_file(struct session *session, int fd)
{
    struct agent_frame frame;
    int result = 0;
    while (session_receive(session, &frame) == 1) {
        if (frame.type == AGENT_END)
            return result;
        if (frame.type != AGENT_DATA)
            return 1;
        if (result == 0) /* what follows a failure is still taken, so that the peer reads the answer */
            result = write_all(fd, frame.body, frame.size_bytes);
    }
    return 1;
}

void serve_put(struct session *session, const struct agent_frame *frame)
{
    const char *path = frame->size_bytes > 4 ? path_of(frame->body + 4, frame->size_bytes - 4) : NULL;
    char name[4096];
    if (!path || strlen(path) >= sizeof name)
        return;
    strcpy(name, path); /* the frame goes with the next one */
    mode_t mode = agent_get_u32(frame->body) & 07777;
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY, mode & 0777);
    if (fd < 0) {
        session_fail(session, 1, "%s: %s", name, strerror(errno));
        return;
    }
    int result = receive_file(session, fd);
    if (result == 0 && (fchmod(fd, mode) && errno != EPERM && errno != EINVAL))
        result = -errno;
    if (close(fd) && result == 0)
        result = -errno;
    if (result < 0)
        session_fail(session, 1, "%s: %s", name, strerror(-result));
    else if (result == 0)
        session_send(session, AGENT_DONE, NULL, 0);
}

void serve_get(struct session *session, const struct agent_frame *frame)
{
    const char *path = path_of(frame->body, frame->size_bytes);
    static uint8_t data[AGENT_BODY_MAX];
    uint8_t about[12];
    struct stat st;
    ssize_t n = 0;
    if (!path)
        return;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &st) || S_ISDIR(st.st_mode)) {
        session_fail(session, 1, "%s: %s", path, fd < 0 ? strerror(errno) : strerror(EISDIR));
    } else {
        agent_put_u32(about, st.st_mode & 07777);
        agent_put_u64(about + 4, (uint64_t)st.st_size);
        bool there = session_send(session, AGENT_FILE, about, sizeof about);
        while (there && (n = read(fd, data, sizeof data)) > 0)
            there = session_send(session, AGENT_DATA, data, (size_t)n);
        if (there && n < 0)
            session_fail(session, 1, "reading: %s", strerror(errno));
        else if (there)
            session_send(session, AGENT_DONE, NULL, 0);
    }
    if (fd >= 0)
        close(fd);
}

static void print_addresses(FILE *out)
{
    struct ifaddrs *list;
    char text[INET6_ADDRSTRLEN];
    if (getifaddrs(&list))
        return;
    for (struct ifaddrs *one = list; one; one = one->ifa_next) {
        const void *address = NULL;
        if (!one->ifa_addr || one->ifa_flags & IFF_LOOPBACK)
            continue;
        if (one->ifa_addr->sa_family == AF_INET)
            address = &((struct sockaddr_in *)one->ifa_addr)->sin_addr;
        else if (one->ifa_addr->sa_family == AF_INET6)
            address = &((struct sockaddr_in6 *)one->ifa_addr)->sin6_addr;
        if (address && inet_ntop(one->ifa_addr->sa_family, address, text, sizeof text))
            fprintf(out, "address=%s %s\n", one->ifa_name, text);
    }
    freeifaddrs(list);
}

void serve_info(struct session *session, const struct agent_frame *frame)
{
    char text[8192] = "";
    struct utsname names;
    struct sysinfo system;
    FILE *out = fmemopen(text, sizeof text, "w");
    if (!out || uname(&names) || sysinfo(&system)) {
        session_fail(session, 1, "%s", strerror(errno));
        return;
    }
    fprintf(out, "agent=%u\nhostname=%s\nkernel=%s %s\nuptime=%ld\nprocesses=%u\n", AGENT_VERSION, names.nodename, names.sysname, names.release, system.uptime,
            system.procs);
    fprintf(out, "memory-total=%llu\nmemory-free=%llu\n", (unsigned long long)system.totalram * system.mem_unit,
            (unsigned long long)system.freeram * system.mem_unit);
    print_addresses(out);
    fclose(out);
    if (session_send(session, AGENT_DATA, text, strnlen(text, sizeof text)))
        session_send(session, AGENT_DONE, NULL, 0);
}
