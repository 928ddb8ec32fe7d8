/*
 * doppel exec: runs a command in a guest through its agent, with this process's standard streams, signals and terminal (docs/agent.md).
 *
 * One loop moves bytes, and nothing in it waits but poll. Input is sent as far ahead as the agent's window allows, so that signals get through whatever the
 * command does; the connection is read only when what came before has been written. Signals are blocked and come as bytes of a signalfd.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "cli/agent_client.h"
#include "cli/report.h"

#define KEPT_BYTES_MAX (16u << 20)
#define WRITE_BYTES 4096u /* a pipe that polls as writable takes as many without blocking */

/* Output for --json. */
struct kept {
    uint8_t *data;
    size_t size_bytes;
    bool cut; /* there was more */
};

struct exec {
    struct agent_address address;
    struct agent_client client;
    struct agent_exec request;
    bool interactive, terminal;
    struct termios saved;
    int signals;
    bool input_open;
    uint32_t window; /* bytes of input that may be sent */
    struct agent_frame frame; /* being written: the rest of it; body NULL: none */
    bool deaf; /* the agent takes nothing more */
    struct kept out_kept, err_kept;
    bool ended;
    int status, signal; /* the signal that ended the command, or 0 */
    bool exited;        /* the command has, and was not just refused */
    uint8_t out[AGENT_HEADER_BYTES + AGENT_BODY_MAX + 256]; /* to be sent */
    size_t out_start, out_count;
};

/* ---- options ---- */

static bool add_variable(struct exec *exec, const char *text)
{
    const char *value = strchr(text, '=') ? NULL : getenv(text);
    char *both;
    if (value && asprintf(&both, "%s=%s", text, value) >= 0)
        text = both;
    if (!strchr(text, '=') || *text == '=' || exec->request.variable_count == AGENT_ARGUMENTS_MAX)
        return false;
    exec->request.variable[exec->request.variable_count++] = text;
    return true;
}

/* Options end with the first argument of the command. Returns the place of that, 0 after a message, ARGUMENTS_HELP after the help. */
static int parse_options(struct exec *exec, const struct subcommand *command, int argc, char **argv, struct arguments *own)
{
    int i = 1;
    while (i < argc && strcmp(argv[i], "--") != 0) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            print_command_help(stdout, command);
            return ARGUMENTS_HELP;
        }
        if (argv[i][0] != '-') {
            if (exec->address.vm || own->value[AGENT_VSOCK])
                return i;
            exec->address.vm = argv[i++];
            continue;
        }
        int used = take_option(command, argv + i, own);
        const char *variable = own->value[EXEC_VARIABLE];
        if (used && variable && !add_variable(exec, variable))
            return complain(0, "exec: --env: \"%s\" is neither NAME=VALUE nor the name of a variable that is set here", variable);
        own->value[EXEC_VARIABLE] = NULL;
        if (!used)
            return 0;
        i += used;
    }
    return i + (i < argc);
}

/* 0, ARGUMENTS_HELP, or an exit status after a message. */
static int parse(struct exec *exec, int argc, char **argv)
{
    const struct subcommand *command = command_find("exec");
    struct arguments own = {0};
    int at = parse_options(exec, command, argc, argv, &own);
    if (at <= 0)
        return at ? at : STATUS_USAGE;
    exec->interactive = own.value[EXEC_INTERACTIVE];
    exec->terminal = own.value[EXEC_TERMINAL];
    exec->request.user = own.value[EXEC_USER] ? own.value[EXEC_USER] : "";
    exec->request.directory = own.value[EXEC_DIRECTORY] ? own.value[EXEC_DIRECTORY] : "";
    if (argc - at > (int)AGENT_ARGUMENTS_MAX)
        return complain(STATUS_USAGE, "exec: more than %u arguments", AGENT_ARGUMENTS_MAX);
    for (; at < argc; at++)
        exec->request.argument[exec->request.argument_count++] = argv[at];
    if (exec->terminal && report_is_json())
        return complain(STATUS_USAGE, "exec: give either --tty or --json");
    if (!exec->request.argument_count || (!exec->address.vm && !own.value[AGENT_VSOCK]))
        return complain(STATUS_USAGE, "exec: which command, and where? usage: doppel exec %s", command->argument);
    return agent_address_set(&exec->address, &own, "exec");
}

/* ---- the terminal ---- */

static void read_size(uint16_t *rows, uint16_t *columns)
{
    struct winsize size = {.ws_row = 24, .ws_col = 80};
    (void)ioctl(STDIN_FILENO, TIOCGWINSZ, &size);
    *rows = size.ws_row;
    *columns = size.ws_col;
}

static bool open_terminal(struct exec *exec)
{
    struct termios raw;
    if (tcgetattr(STDIN_FILENO, &exec->saved)) {
        complain(0, "exec: -t needs a terminal as standard input");
        return false;
    }
    raw = exec->saved;
    cfmakeraw(&raw);
    tcsetattr(STDIN_FILENO, TCSADRAIN, &raw);
    return true;
}

/* ---- sending ---- */

/* Small frames always fit: input is only added to what is empty, and signals that come faster than they can be sent are few enough to lose. */
static void queue_frame(struct exec *exec, enum agent_type type, const void *body, uint32_t size_bytes)
{
    if (exec->out_start) {
        memmove(exec->out, exec->out + exec->out_start, exec->out_count);
        exec->out_start = 0;
    }
    if (exec->deaf || sizeof exec->out - exec->out_count < AGENT_HEADER_BYTES + size_bytes)
        return;
    agent_header(exec->out + exec->out_count, type, size_bytes);
    if (size_bytes)
        memcpy(exec->out + exec->out_count + AGENT_HEADER_BYTES, body, size_bytes);
    exec->out_count += AGENT_HEADER_BYTES + size_bytes;
}

/* An agent that takes nothing more may still have said how the command ended: then only reading goes on. */
static void send_out(struct exec *exec)
{
    ssize_t n = send(exec->client.fd, exec->out + exec->out_start, exec->out_count, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n < 0) {
        exec->deaf = true;
        exec->input_open = false;
        n = (ssize_t)exec->out_count;
    }
    exec->out_start += (size_t)n;
    exec->out_count -= (size_t)n;
}

static void take_input(struct exec *exec)
{
    static uint8_t data[AGENT_BODY_MAX];
    static const uint8_t end_of_file = 4; /* what a terminal sends for it */
    ssize_t n = read(STDIN_FILENO, data, exec->window < sizeof data ? exec->window : sizeof data);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (n <= 0) {
        exec->input_open = false;
        exec->window -= exec->terminal;
        queue_frame(exec, AGENT_INPUT, &end_of_file, exec->terminal ? 1 : 0);
        return;
    }
    exec->window -= (uint32_t)n;
    queue_frame(exec, AGENT_INPUT, data, (uint32_t)n);
}

static void take_signal(struct exec *exec)
{
    struct signalfd_siginfo info;
    uint16_t rows, columns;
    if (read(exec->signals, &info, sizeof info) != sizeof info)
        return;
    if (info.ssi_signo != SIGWINCH) {
        const uint8_t number = (uint8_t)info.ssi_signo;
        queue_frame(exec, AGENT_SIGNAL, &number, 1);
    } else if (exec->terminal) {
        read_size(&rows, &columns);
        const uint8_t size[4] = {rows & 0xFF, (uint8_t)(rows >> 8), columns & 0xFF, (uint8_t)(columns >> 8)};
        queue_frame(exec, AGENT_SIZE, size, sizeof size);
    }
}

/* ---- receiving ---- */

static void keep(struct kept *kept, const struct agent_frame *frame)
{
    size_t room = KEPT_BYTES_MAX - kept->size_bytes, size = frame->size_bytes < room ? frame->size_bytes : room;
    uint8_t *more = size ? realloc(kept->data, kept->size_bytes + size) : NULL;
    kept->cut |= size < frame->size_bytes || (size && !more);
    if (!more)
        return;
    kept->data = memcpy(more + kept->size_bytes, frame->body, size) - kept->size_bytes;
    kept->size_bytes += size;
}

/* Takes frames until one is to be written. False: the connection is of no use any more. */
static bool take_frames(struct exec *exec)
{
    struct agent_frame frame;
    int result = 0;
    while (!exec->ended && !exec->frame.body && (result = agent_reader_next(&exec->client.reader, &frame)) == 1) {
        switch (frame.type) {
        case AGENT_OUTPUT:
        case AGENT_ERRORS:
            if (report_is_json())
                keep(frame.type == AGENT_OUTPUT ? &exec->out_kept : &exec->err_kept, &frame);
            else if (frame.size_bytes)
                exec->frame = frame;
            break;
        case AGENT_TAKEN:
            if (frame.size_bytes != 4 || agent_get_u32(frame.body) > AGENT_INPUT_WINDOW - exec->window)
                return false;
            exec->window += agent_get_u32(frame.body);
            break;
        case AGENT_EXITED:
            if (frame.size_bytes != 2)
                return false;
            exec->status = frame.body[0] ? 128 + frame.body[1] : frame.body[1];
            exec->signal = frame.body[0] ? frame.body[1] : 0;
            exec->ended = exec->exited = true;
            break;
        default:
            exec->status = agent_client_failed(&frame, "exec");
            exec->ended = true;
        }
    }
    return result >= 0;
}

static bool read_connection(struct exec *exec)
{
    size_t room;
    uint8_t *at = agent_reader_room(&exec->client.reader, &room);
    ssize_t n = recv(exec->client.fd, at, room, MSG_DONTWAIT);
    if (n <= 0)
        return n < 0 && (errno == EAGAIN || errno == EINTR);
    agent_reader_add(&exec->client.reader, (size_t)n);
    return take_frames(exec);
}

/* Writes some of the frame. A reader that has gone ends everything, as it would a command of this host. */
static bool write_frame(struct exec *exec, int fd)
{
    uint32_t part = exec->frame.size_bytes < WRITE_BYTES ? exec->frame.size_bytes : WRITE_BYTES;
    ssize_t n = write(fd, exec->frame.body, part);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    exec->frame.body += n;
    exec->frame.size_bytes -= (uint32_t)n;
    if (exec->frame.size_bytes == 0)
        exec->frame.body = NULL;
    return exec->frame.body || take_frames(exec);
}

static int run(struct exec *exec)
{
    while (!exec->ended) {
        if (exec->out_count)
            send_out(exec);
        int sink = !exec->frame.body ? -1 : exec->frame.type == AGENT_OUTPUT ? STDOUT_FILENO : STDERR_FILENO;
        bool wants_input = exec->input_open && exec->window && exec->out_count == 0;
        struct pollfd fds[] = {
            {.fd = exec->client.fd, .events = (short)((sink < 0 ? POLLIN : 0) | (exec->out_count ? POLLOUT : 0))},
            {.fd = exec->signals, .events = POLLIN},
            {.fd = wants_input ? STDIN_FILENO : -1, .events = POLLIN},
            {.fd = sink, .events = POLLOUT},
        };
        if (!fds[0].events)
            fds[0].fd = -1; /* a hang-up would end every wait */
        if (poll(fds, sizeof fds / sizeof *fds, -1) < 0 && errno != EINTR)
            break;
        if (fds[1].revents)
            take_signal(exec);
        if (fds[2].revents)
            take_input(exec);
        if (fds[3].revents && !write_frame(exec, sink))
            break;
        if (fds[0].revents && !exec->frame.body && sink < 0 && !read_connection(exec))
            break;
    }
    if (exec->ended)
        return exec->status;
    if (exec->terminal)
        tcsetattr(STDIN_FILENO, TCSADRAIN, &exec->saved);
    return complain(AGENT_CLIENT_TROUBLE, "exec: the connection to the guest ended");
}

static int block_signals(void)
{
    static const int taken[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH};
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        sigaddset(&set, taken[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

static void report_end_of_command(struct exec *exec)
{
    json_t *object = json_pack("{s:i, s:o, s:b}", "exit_status", exec->status, "signal", exec->signal ? json_integer(exec->signal) : json_null(), "truncated",
                               exec->out_kept.cut || exec->err_kept.cut);
    report_set_bytes(object, "stdout", exec->out_kept.data, exec->out_kept.size_bytes);
    report_set_bytes(object, "stderr", exec->err_kept.data, exec->err_kept.size_bytes);
    report_value(object);
}

int exec_main(int argc, char **argv)
{
    static struct exec exec;
    static uint8_t body[AGENT_BODY_MAX];
    exec.window = AGENT_INPUT_WINDOW;
    int status = parse(&exec, argc, argv);
    if (status)
        return status == ARGUMENTS_HELP ? 0 : status;
    if (exec.terminal) {
        const char *term = getenv("TERM");
        exec.request.flags |= AGENT_EXEC_TERMINAL;
        read_size(&exec.request.rows, &exec.request.columns);
        if (term)
            (void)add_variable(&exec, "TERM");
    }
    int size = agent_exec_format(&exec.request, body);
    if (size < 0)
        return complain(STATUS_USAGE, "exec: the command is too long");
    if (!agent_client_open(&exec.client, &exec.address, "exec"))
        return AGENT_CLIENT_TROUBLE;
    exec.signals = block_signals();
    if (exec.terminal && !open_terminal(&exec))
        return STATUS_USAGE;
    exec.input_open = exec.interactive;
    bool sent = agent_client_send(&exec.client, AGENT_EXEC, body, (size_t)size);
    if (sent && !exec.interactive)
        queue_frame(&exec, AGENT_INPUT, NULL, 0);
    status = sent ? run(&exec) : AGENT_CLIENT_TROUBLE;
    if (exec.terminal)
        tcsetattr(STDIN_FILENO, TCSADRAIN, &exec.saved);
    agent_client_close(&exec.client);
    if (report_is_json() && exec.exited)
        report_end_of_command(&exec);
    free(exec.out_kept.data);
    free(exec.err_kept.data);
    return status;
}
