/*
 * The broker (broker.h): one thread, which waits for messages of its maker and for calls that the kernel holds up.
 *
 * Invariants: names come from `take_names` alone, whose bytes were received here from a connection that was accepted at a control socket and made by another process. A file is opened
 * for a name as it is, or for one with mkstemp's six characters behind it when it is made anew; what was made so may be renamed to a name, or removed. What is not named goes on
 * in the caller, where the caller's own limits hold; without such limits (no Landlock) it is refused.
 * A tap descriptor is attached to an interface that exists and was named. /dev/net/tun is opened whoever asks: such a descriptor can do nothing but wait for that.
 * Everything is bounded: names by NAMES and NAME_BYTES, the oldest goes first.
 */
#include "sandbox/broker.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "sandbox/broker_names.h"
#include "sandbox/sandbox_priv.h"

SANDBOX_ALLOW(IN_BROKER, poll);
SANDBOX_ALLOW(IN_BROKER, recvmsg);
SANDBOX_ALLOW(IN_BROKER, recvfrom);
SANDBOX_ALLOW(IN_BROKER, sendto);
SANDBOX_ALLOW(IN_BROKER, getsockname);
SANDBOX_ALLOW(IN_BROKER, getsockopt);
SANDBOX_ALLOW(IN_BROKER, close);
SANDBOX_ALLOW(IN_BROKER, pidfd_getfd);
SANDBOX_ALLOW(IN_BROKER, process_vm_readv);
SANDBOX_ALLOW(IN_BROKER, process_vm_writev);
SANDBOX_ALLOW(IN_BROKER, openat);
SANDBOX_ALLOW_IF(IN_BROKER, fcntl, ARG_IS(1, F_SETFL));
SANDBOX_ALLOW(IN_BROKER, newfstatat);
SANDBOX_ALLOW(IN_BROKER, fstat);
SANDBOX_ALLOW(IN_BROKER, rename);
SANDBOX_ALLOW(IN_BROKER, unlink);
SANDBOX_ALLOW_IF(IN_BROKER, ioctl, ARG_IS(1, SECCOMP_IOCTL_NOTIF_RECV));
SANDBOX_ALLOW_IF(IN_BROKER, ioctl, ARG_IS(1, SECCOMP_IOCTL_NOTIF_SEND));
SANDBOX_ALLOW_IF(IN_BROKER, ioctl, ARG_IS(1, SECCOMP_IOCTL_NOTIF_ADDFD));
SANDBOX_ALLOW_IF(IN_BROKER, ioctl, ARG_IS(1, SIOCGIFINDEX));
SANDBOX_ALLOW_IF(IN_BROKER, ioctl, ARG_IS(1, TUNSETIFF));

#define SOCKETS_MAX 4
#define LISTENERS_MAX 16
#define PATH_BYTES 4096
#define PIECE_BYTES 65536
#define FILTER_MAX 1024u /* instructions */
#define TUN_PATH "/dev/net/tun"
#define TUN_DEVICE makedev(10, 200)
#define TAP_FLAGS (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR)

enum message { MESSAGE_SOCKET = 1, MESSAGE_DOORS, MESSAGE_LISTENER };

struct message_packet {
    int kind;
    uint32_t length;
    uintptr_t probe;
    struct sockaddr_un name;
};

struct broker {
    int control, pidfd, query; /* query: a socket to ask for interfaces by */
    pid_t program;
    bool closed, confined;
    struct sockaddr_un socket[SOCKETS_MAX];
    unsigned socket_count;
    struct pollfd wait[1 + LISTENERS_MAX];
    unsigned wait_count;
    struct broker_names *names;
    char path[2][PATH_BYTES];
    char piece[PIECE_BYTES];
};

/* ---- the program's memory ---- */

static int get_path(const struct broker *broker, uint64_t at, char path[PATH_BYTES])
{
    size_t got = 0;
    while (got < PATH_BYTES) { /* page by page: what is behind the text may not be mapped */
        size_t part = 4096 - (at + got) % 4096;
        part = part > PATH_BYTES - got ? PATH_BYTES - got : part;
        struct iovec here = {path + got, part}, there = {(void *)(uintptr_t)(at + got), part};
        if (process_vm_readv(broker->program, &here, 1, &there, 1, 0) != (ssize_t)part)
            return -EFAULT;
        if (memchr(path + got, '\0', part))
            return 0;
        got += part;
    }
    return -ENAMETOOLONG;
}

static int get(const struct broker *broker, uint64_t at, void *data, size_t size)
{
    struct iovec here = {data, size}, there = {(void *)(uintptr_t)at, size};
    return process_vm_readv(broker->program, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static int put(const struct broker *broker, uint64_t at, const void *data, size_t size)
{
    struct iovec here = {(void *)(uintptr_t)data, size}, there = {(void *)(uintptr_t)at, size};
    return size == 0 || process_vm_writev(broker->program, &here, 1, &there, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

/* ---- calls: a result, -errno, or GO_ON ---- */

#define GO_ON INT64_MIN /* the caller's own affair */

static bool is_client(const struct broker *broker, int fd, uint64_t *inode)
{
    struct sockaddr_un name = {0};
    struct ucred peer;
    struct stat st;
    socklen_t size = sizeof name, peer_size = sizeof peer;
    if (getsockname(fd, (struct sockaddr *)&name, &size) || name.sun_family != AF_UNIX || size <= offsetof(struct sockaddr_un, sun_path))
        return false;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &peer_size) || peer.pid == broker->program || fstat(fd, &st))
        return false;
    *inode = st.st_ino;
    for (unsigned i = 0; i < broker->socket_count; i++)
        if (strncmp(broker->socket[i].sun_path, name.sun_path, sizeof name.sun_path) == 0)
            return true;
    return false;
}

static int64_t do_recv(struct broker *broker, const struct seccomp_data *call)
{
    uint64_t inode;
    size_t room = call->args[2] < PIECE_BYTES ? call->args[2] : PIECE_BYTES;
    int flags = (int)call->args[3];
    int fd = flags & MSG_PEEK || call->args[4] ? -1 : (int)syscall(SYS_pidfd_getfd, broker->pidfd, (int)call->args[0], 0);
    if (fd < 0)
        return GO_ON;
    int64_t r = GO_ON;
    if (is_client(broker, fd, &inode)) {
        ssize_t n = recv(fd, broker->piece, room, MSG_DONTWAIT);
        r = n < 0 ? -errno : n;
        if (n >= 0)
            broker_names_take(broker->names, inode, broker->piece, (size_t)n);
        if (n > 0 && put(broker, call->args[1], broker->piece, (size_t)n))
            r = -EFAULT;
    }
    close(fd);
    return r;
}

static int64_t do_open(struct broker *broker, int listener, const struct seccomp_notif *notice)
{
    const struct seccomp_data *call = &notice->data;
    int flags = (int)call->args[2];
    bool makes = (flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL);
    int r = get_path(broker, call->args[1], broker->path[0]);
    if (r)
        return r;
    bool named = broker_names_has(broker->names, broker->path[0]), draft = !named && makes && broker_names_has_draft(broker->names, broker->path[0]);
    if (!named && !draft && strcmp(broker->path[0], TUN_PATH) != 0)
        return GO_ON;
    int fd = open(broker->path[0], flags | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, (mode_t)call->args[3]); /* nobody makes it wait for a pipe's other end */
    if (fd < 0)
        return -errno;
    if (!(flags & (O_NONBLOCK | O_PATH)) && fcntl(fd, F_SETFL, flags & (O_APPEND | O_DIRECT | O_NOATIME))) {
        r = -errno;
        close(fd);
        return r;
    }
    struct seccomp_notif_addfd add = {.id = notice->id, .srcfd = (uint32_t)fd, .newfd_flags = (uint32_t)flags & O_CLOEXEC};
    int given = ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
    r = given < 0 ? -errno : given;
    close(fd);
    if (draft)
        broker_names_made(broker->names, broker->path[0]);
    return r;
}

static int64_t do_rename(struct broker *broker, const struct seccomp_data *call)
{
    int r = get_path(broker, call->args[0], broker->path[0]);
    if (r == 0)
        r = get_path(broker, call->args[1], broker->path[1]);
    if (r)
        return r;
    if (!broker_names_is_made(broker->names, broker->path[0]) || !broker_names_has(broker->names, broker->path[1]))
        return GO_ON;
    return rename(broker->path[0], broker->path[1]) ? -errno : 0;
}

static int64_t do_unlink(struct broker *broker, const struct seccomp_data *call)
{
    int r = get_path(broker, call->args[0], broker->path[0]);
    if (r)
        return r;
    if (!broker_names_is_made(broker->names, broker->path[0]))
        return GO_ON;
    return unlink(broker->path[0]) ? -errno : 0;
}

static int64_t do_stat(struct broker *broker, const struct seccomp_data *call)
{
    struct stat st;
    int r = get_path(broker, call->args[1], broker->path[0]);
    if (r)
        return r;
    if (!broker_names_has(broker->names, broker->path[0]))
        return GO_ON;
    return fstatat(AT_FDCWD, broker->path[0], &st, (int)call->args[3] & AT_SYMLINK_NOFOLLOW) ? -errno : put(broker, call->args[2], &st, sizeof st);
}

/* The caller does not go on by itself: interfaces that nobody owns are everybody's. */
static int64_t do_attach(const struct broker *broker, const struct seccomp_data *call)
{
    struct ifreq request = {0}, found;
    struct stat st;
    if (get(broker, call->args[2], &request, sizeof request))
        return -EFAULT;
    request.ifr_name[IFNAMSIZ - 1] = '\0';
    if ((request.ifr_flags & 0xffff) != TAP_FLAGS || !broker_names_has(broker->names, request.ifr_name))
        return -EACCES;
    found = request;
    if (ioctl(broker->query, SIOCGIFINDEX, &found))
        return -errno;
    int fd = (int)syscall(SYS_pidfd_getfd, broker->pidfd, (int)call->args[0], 0);
    if (fd < 0)
        return -errno;
    bool tun = fstat(fd, &st) == 0 && S_ISCHR(st.st_mode) && st.st_rdev == TUN_DEVICE;
    int64_t r = !tun ? -ENOTTY : ioctl(fd, TUNSETIFF, &request) ? -errno : 0;
    close(fd);
    return r;
}

static int64_t perform(struct broker *broker, int listener, const struct seccomp_notif *notice)
{
    const struct seccomp_data *call = &notice->data;
    bool from_here = (int)call->args[0] == AT_FDCWD;
    switch (call->nr) {
    case SYS_recvfrom:
        return do_recv(broker, call);
    case SYS_openat:
        return from_here ? do_open(broker, listener, notice) : GO_ON;
    case SYS_newfstatat:
        return from_here ? do_stat(broker, call) : GO_ON;
    case SYS_rename:
        return do_rename(broker, call);
    case SYS_unlink:
        return do_unlink(broker, call);
    case SYS_ioctl:
        return do_attach(broker, call);
    }
    return GO_ON;
}

/* ---- waiting ---- */

/* False: this is not what calls come from. */
static bool take_call(struct broker *broker, int listener)
{
    struct seccomp_notif notice = {0};
    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &notice))
        return errno == ENOENT || errno == EINTR; /* the thread was gone before */
    int64_t r = perform(broker, listener, &notice);
    struct seccomp_notif_resp answer = {.id = notice.id};
    if (r == GO_ON && (broker->confined || notice.data.nr == SYS_recvfrom))
        answer.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    else if (r == GO_ON)
        answer.error = -EACCES;
    else if (r < 0)
        answer.error = (int)r;
    else
        answer.val = r;
    (void)ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    return true;
}

/* The broker gives up what it does not need either. */
static bool confine(const struct sock_fprog *filter)
{
    if (!filter->len || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        return false;
    int listener = filter_load(filter, true); /* can there be one on this host? */
    if (listener >= 0)
        close(listener);
    else
        (void)filter_load(filter, false);
    return listener >= 0;
}

/* The program is not confined yet, and asks whether all is well. */
static bool can_work(struct broker *broker, uintptr_t probe)
{
    uint64_t here = 0;
    struct iovec to = {&here, sizeof here}, from = {(void *)probe, sizeof here};
    int fd = (int)syscall(SYS_pidfd_getfd, broker->pidfd, 0, 0); /* whether there is a descriptor 0 does not matter */
    bool gets = fd >= 0 || errno == EBADF;
    if (fd >= 0)
        close(fd);
    return gets && process_vm_readv(broker->program, &to, 1, &from, 1, 0) == sizeof here;
}

static void take_message(struct broker *broker)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } room;
    struct message_packet packet = {0};
    struct sock_filter instruction[FILTER_MAX];
    struct iovec iov[] = {{&packet, sizeof packet}, {instruction, sizeof instruction}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2, .msg_control = room.bytes, .msg_controllen = CMSG_LEN(sizeof(int))}; /* one */
    ssize_t n = recvmsg(broker->control, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (n <= 0 && broker->wait[0].revents & (POLLHUP | POLLERR))
        _exit(0); /* nobody is left; without that, a message of no bytes */
    struct cmsghdr *header = n > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    int fd = -1;
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof fd))
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
    size_t filter_bytes = n > (ssize_t)sizeof packet ? (size_t)n - sizeof packet : 0;
    if (n < (ssize_t)sizeof packet || (filter_bytes && packet.kind != MESSAGE_DOORS)) {
        if (fd >= 0)
            close(fd);
        return;
    }
    if (packet.kind == MESSAGE_SOCKET && !broker->closed && broker->socket_count < SOCKETS_MAX) {
        broker->socket[broker->socket_count++] = packet.name;
    } else if (packet.kind == MESSAGE_DOORS && !broker->closed) {
        const struct sock_fprog filter = {.len = (unsigned short)(filter_bytes / sizeof *instruction), .filter = instruction};
        char answer = confine(&filter) && can_work(broker, packet.probe);
        broker->closed = true;
        broker->confined = packet.length;
        (void)!send(broker->control, &answer, 1, MSG_NOSIGNAL);
    } else if (packet.kind == MESSAGE_LISTENER && fd >= 0 && broker->wait_count <= LISTENERS_MAX) {
        broker->wait[broker->wait_count++] = (struct pollfd){.fd = fd, .events = POLLIN};
        fd = -1;
    }
    if (fd >= 0)
        close(fd);
}

static void drop_listener(struct broker *broker, unsigned i)
{
    close(broker->wait[i].fd);
    broker->wait[i] = broker->wait[--broker->wait_count];
}

/* Signals of the terminal are not for this process, and nothing of the program's is kept open by it. */
static struct broker *settle(int control, pid_t program, const char *omit)
{
    bool says = omit && strncmp(omit, "broker:", 7) == 0;
    int fd = dup2(control, 0);
    struct broker *broker = calloc(1, sizeof *broker);
    setsid();
    if (fd < 0 || close_range(says ? STDERR_FILENO + 1 : 1, ~0u, 0) || !broker || !(broker->names = broker_names_create()))
        return NULL;
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL);
    filter_note_kind(IN_BROKER);
    (void)filter_catch();
    broker->program = program;
    broker->query = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    broker->pidfd = (int)syscall(SYS_pidfd_open, program, 0);
    broker->wait[broker->wait_count++] = (struct pollfd){.fd = broker->control = 0, .events = POLLIN};
    prctl(PR_SET_NAME, "doppel-broker");
    return broker->pidfd < 0 ? NULL : broker;
}

static _Noreturn void broker_main(int control, pid_t program, const char *omit)
{
    struct broker *broker = settle(control, program, omit);
    pid_t own = getpid();
    if (broker && send(broker->control, &own, sizeof own, MSG_NOSIGNAL) < 0)
        _exit(1);
    while (broker) {
        if (poll(broker->wait, broker->wait_count, -1) < 0)
            continue;
        for (unsigned i = broker->wait_count; --i > 0;) {
            const struct pollfd *listener = &broker->wait[i];
            if (listener->revents && !(listener->revents & POLLIN && take_call(broker, listener->fd)))
                drop_listener(broker, i);
        }
        if (broker->wait[0].revents)
            take_message(broker);
    }
    _exit(1);
}

/* ---- the program's side ---- */

/* With a filter behind the packet, or NULL; with a descriptor, or -1. */
static int tell(int broker, const struct message_packet *packet, const struct sock_fprog *filter, int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } room = {{0}};
    struct iovec iov[] = {{(void *)(uintptr_t)packet, sizeof *packet}, {filter ? filter->filter : NULL, filter ? filter->len * sizeof *filter->filter : 0}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = 2};
    if (fd >= 0) {
        message.msg_control = room.bytes;
        message.msg_controllen = sizeof room.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        *header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    return sendmsg(broker, &message, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

int broker_start(const char *omit)
{
    int pair[2], status;
    pid_t program = getpid();
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
        return -errno;
    /* Twice, so that it is nobody's child: the program's children are guest processes. The one between lives on this memory, which is copied once only: a millisecond less until
       the API answers. */
    pid_t pid = vfork();
    if (pid == 0) {
        if (_Fork() == 0)
            broker_main(pair[1], program, omit);
        _exit(0);
    }
    close(pair[1]);
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        close(pair[0]);
        return -EAGAIN;
    }
    return pair[0];
}

int broker_add_socket(int broker, int listener)
{
    struct message_packet packet = {.kind = MESSAGE_SOCKET};
    socklen_t size = sizeof packet.name;
    if (broker < 0)
        return 0;
    return getsockname(listener, (struct sockaddr *)&packet.name, &size) ? -errno : tell(broker, &packet, NULL, -1);
}

bool broker_close_doors(int broker, const struct sock_fprog *filter, bool confined)
{
    const uint64_t probe = 0;
    struct message_packet packet = {.kind = MESSAGE_DOORS, .length = confined, .probe = (uintptr_t)&probe};
    pid_t pid;
    char answer = 0;
    if (broker < 0 || filter->len > FILTER_MAX || recv(broker, &pid, sizeof pid, 0) != sizeof pid)
        return false;
    (void)prctl(PR_SET_PTRACER, (unsigned long)pid, 0, 0, 0); /* for Yama, where it is; others may not */
    return tell(broker, &packet, filter, -1) == 0 && recv(broker, &answer, 1, 0) == 1 && answer;
}

int broker_serve(int broker, int notifications)
{
    struct message_packet packet = {.kind = MESSAGE_LISTENER};
    int r = tell(broker, &packet, NULL, notifications);
    close(notifications);
    return r;
}
