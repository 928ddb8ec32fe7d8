/* Reaching the agent of a guest: the Unix socket of its vsock device, "CONNECT <port>", then frames (agent/protocol.h). What comes from there is foreign. */
#include "cli/agent_client.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define RETRY_MS 100

int agent_address_set(struct agent_address *address, const struct arguments *arguments, const char *command)
{
    unsigned long port = AGENT_PORT, wait_s = 0;
    int status = parse_number(command, "--port", arguments->value[AGENT_PORT_NUMBER], 0xFFFFFFFEul, &port);
    if (status == 0)
        status = parse_number(command, "--wait", arguments->value[AGENT_WAIT], 1000000, &wait_s);
    address->socket = arguments->value[AGENT_VSOCK];
    address->port = (unsigned)port;
    address->wait_s = (unsigned)wait_s;
    return status;
}

static int connect_socket(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        return -ENAMETOOLONG;
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        int code = -errno;
        close(fd);
        return code;
    }
    return fd;
}

/* Asks for the guest's port. 0, or -ECONNREFUSED when nobody listens there. */
static int ask_for_port(int fd, unsigned port)
{
    char line[32];
    int length = snprintf(line, sizeof line, "CONNECT %u\n", port);
    if (send(fd, line, (size_t)length, MSG_NOSIGNAL) != length)
        return -ECONNREFUSED;
    for (size_t i = 0; i < sizeof line; i++) {
        if (read(fd, &line[i], 1) != 1)
            return -ECONNREFUSED;
        if (line[i] == '\n')
            return strncmp(line, "OK ", 3) == 0 ? 0 : -EPROTO;
    }
    return -EPROTO;
}

/* By its whole name, or one that is shortened: to find whose that is, all machines are read. */
static int connect_vm(const char *vm, bool whole_name)
{
    struct instance_info info;
    struct error err;
    int result = instance_connect(vm, "vsock.sock");
    if (result >= 0 || whole_name)
        return result;
    result = instance_find(vm, &info, &err);
    if (result)
        return result;
    result = instance_connect(info.name, "vsock.sock");
    instance_info_clear(&info);
    return result;
}

static int try_open(const struct agent_address *address)
{
    int fd = address->socket ? connect_socket(address->socket) : connect_vm(address->vm, address->whole_name);
    int result = fd < 0 ? fd : ask_for_port(fd, address->port);
    if (fd >= 0 && result < 0)
        close(fd);
    return result < 0 ? result : fd;
}

bool agent_client_try(struct agent_client *client, const struct agent_address *address)
{
    client->reader.start = client->reader.end = 0;
    client->fd = try_open(address);
    return client->fd >= 0;
}

bool agent_client_open(struct agent_client *client, const struct agent_address *address, const char *command)
{
    const struct timespec pause = {.tv_nsec = RETRY_MS * 1000000l};
    unsigned tries = address->wait_s * (1000 / RETRY_MS);
    client->reader.start = client->reader.end = 0;
    while ((client->fd = try_open(address)) < 0 && tries--)
        nanosleep(&pause, NULL);
    if (client->fd >= 0)
        return true;
    const char *where = address->socket ? address->socket : address->vm;
    if (client->fd == -ECONNREFUSED)
        complain(0, "%s: %s: no agent answers in the guest; it runs doppel-agent when it has one (--wait N waits for it)", command, where);
    else
        complain(0, "%s: cannot reach the guest of %s: %s%s", command, where, strerror(-client->fd),
                 client->fd == -ENOENT ? " (is there such a machine, and has it a vsock device?)" : "");
    return false;
}

void agent_client_close(struct agent_client *client)
{
    if (client->fd >= 0)
        close(client->fd);
    client->fd = -1;
}

bool agent_client_send(struct agent_client *client, enum agent_type type, const void *body, size_t size_bytes)
{
    uint8_t header[AGENT_HEADER_BYTES];
    struct iovec iov[2] = {{header, sizeof header}, {(void *)(uintptr_t)body, size_bytes}};
    struct msghdr message = {.msg_iov = iov, .msg_iovlen = size_bytes ? 2 : 1};
    agent_header(header, type, (uint32_t)size_bytes);
    while (message.msg_iovlen) {
        ssize_t n = sendmsg(client->fd, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return false;
        while (message.msg_iovlen && (size_t)n >= message.msg_iov->iov_len) {
            n -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + n;
            message.msg_iov->iov_len -= (size_t)n;
        }
    }
    return true;
}

bool agent_client_receive(struct agent_client *client, struct agent_frame *frame)
{
    int result;
    while ((result = agent_reader_next(&client->reader, frame)) == 0) {
        size_t room;
        uint8_t *at = agent_reader_room(&client->reader, &room);
        ssize_t n = read(client->fd, at, room);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        agent_reader_add(&client->reader, (size_t)n);
    }
    return result == 1;
}

int agent_client_failed(const struct agent_frame *frame, const char *command)
{
    char text[512];
    size_t size = 0;
    if (frame->type != AGENT_FAILED || frame->size_bytes == 0)
        return complain(AGENT_CLIENT_TROUBLE, "%s: the guest's agent makes no sense", command);
    for (uint32_t i = 1; i < frame->size_bytes && size < sizeof text - 1; i++) /* the guest's text must not do anything to a terminal */
        text[size++] = (char)(frame->body[i] >= ' ' && frame->body[i] != 0x7F ? frame->body[i] : '?');
    return complain(frame->body[0] ? frame->body[0] : AGENT_CLIENT_TROUBLE, "%s: %.*s", command, (int)size, text);
}
