/* doppel cp and doppel guest: files into and out of a guest, and small questions to its agent (docs/agent.md). Blocking. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "cli/agent_client.h"
#include "cli/report.h"

#define INFO_BYTES_MAX 65536u

static struct agent_client client; /* large */
static uint64_t copied_bytes;

/* ---- cp ---- */

static int say_errno(const char *path)
{
    return complain(STATUS_ERROR, "cp: %s: %s", path, strerror(errno));
}

/* Where the answer is DONE or a reason. */
static int finish(const char *command)
{
    struct agent_frame frame;
    if (!agent_client_receive(&client, &frame))
        return complain(AGENT_CLIENT_TROUBLE, "%s: the connection to the guest ended", command);
    return frame.type == AGENT_DONE ? 0 : agent_client_failed(&frame, command);
}

static int copy_in(const char *from, const char *to)
{
    static uint8_t data[AGENT_BODY_MAX];
    struct stat st;
    ssize_t n;
    size_t length = strlen(to) + 1;
    int fd = strcmp(from, "-") == 0 ? STDIN_FILENO : open(from, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st))
        return say_errno(from);
    if (S_ISDIR(st.st_mode)) {
        errno = EISDIR;
        return say_errno(from);
    }
    if (length > sizeof data - 4) {
        errno = ENAMETOOLONG;
        return say_errno(to);
    }
    agent_put_u32(data, S_ISREG(st.st_mode) ? st.st_mode & 07777 : 0644);
    memcpy(data + 4, to, length);
    bool there = agent_client_send(&client, AGENT_PUT, data, 4 + length);
    for (; there && (n = read(fd, data, sizeof data)) > 0; copied_bytes += (uint64_t)n)
        there = agent_client_send(&client, AGENT_DATA, data, (size_t)n);
    if (there && n < 0)
        return say_errno(from); /* without END the guest knows that it is not complete */
    if (there)
        there = agent_client_send(&client, AGENT_END, NULL, 0);
    return finish("cp");
}

static int write_all(int fd, const uint8_t *data, size_t size_bytes)
{
    while (size_bytes) {
        ssize_t n = write(fd, data, size_bytes);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        data += n;
        size_bytes -= (size_t)n;
    }
    return 0;
}

static int copy_out(const char *from, const char *to)
{
    struct agent_frame frame;
    bool to_stdout = strcmp(to, "-") == 0;
    if (!agent_client_send(&client, AGENT_GET, from, strlen(from) + 1) || !agent_client_receive(&client, &frame))
        return finish("cp");
    if (frame.type != AGENT_FILE || frame.size_bytes != 12)
        return agent_client_failed(&frame, "cp");
    mode_t mode = agent_get_u32(frame.body) & 0777; /* set-id bits are not the guest's to give */
    int fd = to_stdout ? STDOUT_FILENO : open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);
    if (fd < 0)
        return say_errno(to);
    for (; agent_client_receive(&client, &frame) && frame.type == AGENT_DATA; copied_bytes += frame.size_bytes)
        if (write_all(fd, frame.body, frame.size_bytes))
            return say_errno(to);
    int status = frame.type == AGENT_DONE ? 0 : agent_client_failed(&frame, "cp");
    if (!to_stdout && close(fd))
        return say_errno(to);
    return status;
}

/* "VM:PATH", or ":PATH" with --vsock; NULL: a path of this host. */
static char *guest_path(struct agent_address *address, char *argument)
{
    char *colon = strchr(argument, ':'), *slash = strchr(argument, '/');
    if (!colon || (slash && slash < colon))
        return NULL;
    *colon = '\0';
    if (*argument)
        address->vm = argument;
    return colon + 1;
}

static void report_copy(const struct agent_address *address, const char *file, const char *guest_file, bool out)
{
    report_value(json_pack("{s:s?, s:s, s:o, s:o, s:I}", "name", address->vm, "direction", out ? "out" : "in", "file", report_text(file), "guest_file", report_text(guest_file), "bytes",
                           (json_int_t)copied_bytes));
}

int cp_main(int argc, char **argv)
{
    struct agent_address address = {0};
    struct arguments arguments;
    int status = parse_arguments(argc, argv, &arguments);
    if (status)
        return status == ARGUMENTS_HELP ? 0 : status;
    char **path = arguments.names, *in_guest[2] = {NULL, NULL};
    for (unsigned i = 0; i < 2 && arguments.name_count == 2; i++)
        in_guest[i] = guest_path(&address, path[i]);
    if (!in_guest[0] == !in_guest[1] || (!address.vm && !arguments.value[AGENT_VSOCK]))
        return complain(STATUS_USAGE, "cp: one file here and one NAME:PATH in a guest (:PATH with --vsock); usage: doppel cp %s", command_find("cp")->argument);
    if (in_guest[0] && strcmp(path[1], "-") == 0 && report_is_json())
        return complain(STATUS_USAGE, "cp: standard output has either the file or --json");
    status = agent_address_set(&address, &arguments, "cp");
    if (status)
        return status;
    if (!agent_client_open(&client, &address, "cp"))
        return AGENT_CLIENT_TROUBLE;
    status = in_guest[0] ? copy_out(in_guest[0], path[1]) : copy_in(path[0], in_guest[1]);
    agent_client_close(&client);
    if (status == 0 && report_is_json())
        report_copy(&address, path[in_guest[0] ? 1 : 0], in_guest[in_guest[0] ? 0 : 1], in_guest[0]);
    return status;
}

/* ---- guest ---- */

/* Lines of name=value; of addresses there may be several. */
static json_t *info_json(char *text)
{
    json_t *addresses = json_array(), *object = json_pack("{s:o}", "addresses", addresses);
    char *saved = NULL;
    for (char *line = strtok_r(text, "\n", &saved); line; line = strtok_r(NULL, "\n", &saved)) {
        char *equals = strchr(line, '=');
        if (equals)
            *equals = '\0';
        json_t *value = json_string(equals ? equals + 1 : "");
        if (strcmp(line, "address") == 0)
            json_array_append_new(addresses, value);
        else
            json_object_set_new(object, line, value);
    }
    return object;
}

static int print_info(void)
{
    static char text[INFO_BYTES_MAX + 1];
    size_t size = 0;
    struct agent_frame frame;
    bool sent = agent_client_send(&client, AGENT_INFO, NULL, 0), received = false;
    while (sent && (received = agent_client_receive(&client, &frame)) && frame.type == AGENT_DATA)
        for (uint32_t i = 0; i < frame.size_bytes && size < INFO_BYTES_MAX; i++)
            text[size++] = (char)(frame.body[i] == '\n' || (frame.body[i] >= ' ' && frame.body[i] < 0x7F) ? frame.body[i] : '?');
    if (!received)
        return complain(AGENT_CLIENT_TROUBLE, "guest: the connection to the guest ended");
    if (frame.type != AGENT_DONE)
        return agent_client_failed(&frame, "guest");
    if (report_is_json())
        report_value(info_json(text));
    else
        fputs(text, stdout);
    return 0;
}

static int ping(void)
{
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    if (!agent_client_send(&client, AGENT_PING, "doppel", 6))
        return AGENT_CLIENT_TROUBLE;
    int status = finish("guest");
    clock_gettime(CLOCK_MONOTONIC, &after);
    double us = (double)(after.tv_sec - before.tv_sec) * 1e6 + (double)(after.tv_nsec - before.tv_nsec) / 1e3;
    if (status == 0)
        report(json_pack("{s:f}", "round_trip_us", us), "%.0f us", us);
    return status;
}

static int set_clock(void)
{
    struct timespec now;
    uint8_t body[8];
    clock_gettime(CLOCK_REALTIME, &now);
    agent_put_u64(body, (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec);
    return agent_client_send(&client, AGENT_CLOCK, body, sizeof body) ? finish("guest") : AGENT_CLIENT_TROUBLE;
}

static int power(uint8_t how)
{
    return agent_client_send(&client, AGENT_SHUTDOWN, &how, 1) ? finish("guest") : AGENT_CLIENT_TROUBLE;
}

static int power_off(void)
{
    return power(0);
}

static int restart(void)
{
    return power(1);
}

int guest_main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(void);
        bool asks; /* and prints the answer itself */
    } questions[] = {{"info", print_info, true}, {"ping", ping, true}, {"set-clock", set_clock}, {"poweroff", power_off}, {"reboot", restart}};
    struct agent_address address = {0};
    struct arguments arguments;
    int status = parse_arguments(argc, argv, &arguments);
    if (status)
        return status == ARGUMENTS_HELP ? 0 : status;
    unsigned names = arguments.value[AGENT_VSOCK] ? 0 : 1;
    if (names && arguments.name_count)
        address.vm = arguments.names[0];
    status = agent_address_set(&address, &arguments, "guest");
    if (status)
        return status;
    for (size_t i = 0; arguments.name_count == names + 1 && i < sizeof questions / sizeof *questions; i++) {
        if (strcmp(questions[i].name, arguments.names[names]) != 0)
            continue;
        if (!agent_client_open(&client, &address, "guest"))
            return AGENT_CLIENT_TROUBLE;
        status = questions[i].run();
        agent_client_close(&client);
        if (status == 0 && !questions[i].asks && report_is_json())
            report_value(json_pack("{s:s?, s:s}", "name", address.vm, "done", questions[i].name));
        return status;
    }
    return complain(STATUS_USAGE, "guest: usage: doppel guest %s", command_find("guest")->argument);
}
