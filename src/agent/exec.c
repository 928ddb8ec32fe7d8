/*
 * doppel-agent: running a command for the other end (protocol.h, AGENT_EXEC).
 *
 * One loop moves bytes between connection and command, nothing in it waits: input is bounded by the window that the client keeps to, output is read only when what
 * was read before has been sent. After the command's end its pipes are read as far as they are filled; what processes it left behind write later is lost.
 * When the connection ends first, the command's process group gets SIGHUP.
 */
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent/agent.h"

#define INPUT_BYTES AGENT_INPUT_WINDOW
#define OUT_BYTES (AGENT_HEADER_BYTES + AGENT_BODY_MAX + 64) /* one full frame and the small ones */

struct command {
    struct session *session;
    pid_t pid;
    int input, output, errors, children; /* -1: closed; children: signalfd for SIGCHLD */
    bool terminal, exited, ended;        /* ended: EXITED is among what is to be sent */
    int status;
    uint8_t data[INPUT_BYTES]; /* of standard input, a ring */
    uint32_t data_start, data_count, taken;
    bool input_end;
    uint8_t out[OUT_BYTES]; /* to be sent */
    size_t out_start, out_count;
};

/* ---- starting ---- */

struct pipes {
    int input[2], output[2], errors[2], failure[2];
};

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void close_pipes(struct pipes *pipes)
{
    int *const ends[] = {pipes->input, pipes->output, pipes->errors, pipes->failure};
    for (unsigned i = 0; i < sizeof ends / sizeof *ends; i++) {
        close_fd(&ends[i][0]);
        close_fd(&ends[i][1]);
    }
}

static int open_terminal(struct pipes *pipes, const struct agent_exec *exec)
{
    struct winsize size = {.ws_row = exec->rows, .ws_col = exec->columns};
    char name[64];
    int master = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0)
        return -errno;
    pipes->output[0] = master;
    if (grantpt(master) || unlockpt(master) || ptsname_r(master, name, sizeof name))
        return -errno;
    pipes->input[0] = open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
    pipes->input[1] = fcntl(master, F_DUPFD_CLOEXEC, 0);
    if (pipes->input[0] < 0 || pipes->input[1] < 0)
        return -errno;
    ioctl(master, TIOCSWINSZ, &size);
    return 0;
}

static int open_pipes(struct pipes *pipes, const struct agent_exec *exec)
{
    *pipes = (struct pipes){{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};
    if (pipe2(pipes->failure, O_CLOEXEC))
        return -errno;
    if (exec->flags & AGENT_EXEC_TERMINAL)
        return open_terminal(pipes, exec);
    if (pipe2(pipes->input, O_CLOEXEC) || pipe2(pipes->output, O_CLOEXEC) || pipe2(pipes->errors, O_CLOEXEC))
        return -errno;
    return 0;
}

static bool become(const struct user *user)
{
    gid_t groups[sizeof user->group / sizeof *user->group];
    for (unsigned i = 0; i < user->group_count; i++)
        groups[i] = user->group[i];
    return setgroups(user->group_count, groups) == 0 && setgid(user->gid) == 0 && setuid(user->uid) == 0;
}

/* In the child: what is wrong is written to the pipe as status and text. Never returns. */
static void fail_child(int fd, uint8_t status, const char *what)
{
    char text[512];
    int length = snprintf(text, sizeof text, "%c%s: %s", status, what, strerror(errno));
    ssize_t ignored = write(fd, text, (size_t)length < sizeof text ? (size_t)length : sizeof text - 1);
    (void)ignored;
    _exit(status);
}

static void set_environment(const struct agent_exec *exec, const struct user *user)
{
    clearenv();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", user->home, 1);
    setenv("USER", user->name, 1);
    setenv("LOGNAME", user->name, 1);
    setenv("SHELL", user->shell, 1);
    for (unsigned i = 0; i < exec->variable_count; i++)
        putenv((char *)(uintptr_t)exec->variable[i]);
}

static void run_child(const struct agent_exec *exec, const struct user *user, struct pipes *pipes)
{
    bool terminal = exec->flags & AGENT_EXEC_TERMINAL;
    int failure = pipes->failure[1];
    sigset_t none;
    setsid();
    if (terminal && ioctl(pipes->input[0], TIOCSCTTY, 0))
        fail_child(failure, AGENT_STATUS_TROUBLE, "terminal");
    if (dup2(pipes->input[0], 0) < 0 || dup2(terminal ? pipes->input[0] : pipes->output[1], 1) < 0 || dup2(terminal ? pipes->input[0] : pipes->errors[1], 2) < 0)
        fail_child(failure, AGENT_STATUS_TROUBLE, "standard streams");
    if (terminal && user->uid != 0 && fchown(0, user->uid, (gid_t)-1)) {
        /* it can be used all the same */
    }
    if (geteuid() == 0 ? !become(user) : user->uid != geteuid())
        fail_child(failure, AGENT_STATUS_TROUBLE, user->name);
    set_environment(exec, user);
    if (chdir(*exec->directory ? exec->directory : user->home) && (*exec->directory || chdir("/")))
        fail_child(failure, AGENT_STATUS_TROUBLE, exec->directory);
    for (int number = 1; number < NSIG; number++) /* what was ignored where the agent was started stays so otherwise */
        signal(number, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    execvp(exec->argument[0], (char **)(uintptr_t)exec->argument);
    fail_child(failure, errno == ENOENT || errno == ENOTDIR ? AGENT_STATUS_NOT_FOUND : AGENT_STATUS_NOT_EXECUTABLE, exec->argument[0]);
}

/* False, with the peer told, when the command could not be started. */
static bool start(struct command *command, const struct agent_exec *exec, const struct user *user)
{
    struct pipes pipes;
    char text[512];
    int code = open_pipes(&pipes, exec);
    command->pid = code ? -1 : fork();
    if (command->pid == 0)
        run_child(exec, user, &pipes);
    if (command->pid < 0) {
        close_pipes(&pipes);
        return session_fail(command->session, AGENT_STATUS_TROUBLE, "cannot start a process: %s", strerror(code ? -code : errno));
    }
    command->terminal = exec->flags & AGENT_EXEC_TERMINAL;
    close_fd(&pipes.failure[1]);
    ssize_t n = read(pipes.failure[0], text, sizeof text - 1); /* until exec closes it */
    if (n > 1) {
        close_pipes(&pipes);
        waitpid(command->pid, NULL, 0);
        text[n] = '\0';
        return session_fail(command->session, (uint8_t)text[0], "%s", text + 1);
    }
    int *const ours[] = {&pipes.input[1], &pipes.output[0], &pipes.errors[0]};
    int *const fds[] = {&command->input, &command->output, &command->errors};
    for (unsigned i = 0; i < 3; i++) {
        *fds[i] = *ours[i];
        *ours[i] = -1;
        if (*fds[i] >= 0)
            fcntl(*fds[i], F_SETFL, O_NONBLOCK);
    }
    close_pipes(&pipes);
    return true;
}

/* ---- running ---- */

static size_t out_room(const struct command *command)
{
    return OUT_BYTES - command->out_count;
}

/* There is room: small frames are sent only where out_room says so. */
static void queue_frame(struct command *command, enum agent_type type, const void *body, uint32_t size_bytes)
{
    if (command->out_start) {
        memmove(command->out, command->out + command->out_start, command->out_count);
        command->out_start = 0;
    }
    agent_header(command->out + command->out_count, type, size_bytes);
    memcpy(command->out + command->out_count + AGENT_HEADER_BYTES, body, size_bytes);
    command->out_count += AGENT_HEADER_BYTES + size_bytes;
}

static bool send_out(struct command *command)
{
    ssize_t n = send(command->session->fd, command->out + command->out_start, command->out_count, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    command->out_start += (size_t)n;
    command->out_count -= (size_t)n;
    if (command->out_count == 0)
        command->out_start = 0;
    return true;
}

/* Reads what there is for one frame; false: nothing now, or nothing ever (the descriptor is closed then). */
static bool read_output(struct command *command, int *fd, enum agent_type type)
{
    static uint8_t body[AGENT_BODY_MAX];
    ssize_t n = *fd < 0 ? 0 : read(*fd, body, sizeof body);
    if (n > 0) {
        queue_frame(command, type, body, (uint32_t)n);
        return true;
    }
    if (n == 0 || (errno != EAGAIN && errno != EINTR))
        close_fd(fd);
    return false;
}

static void write_input(struct command *command)
{
    while (command->data_count && command->input >= 0) {
        uint32_t part = INPUT_BYTES - command->data_start < command->data_count ? INPUT_BYTES - command->data_start : command->data_count;
        ssize_t n = write(command->input, command->data + command->data_start, part);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            return;
        if (n < 0) { /* the command does not want it: as good as taken */
            n = command->data_count;
            close_fd(&command->input);
        }
        command->data_start = (command->data_start + (uint32_t)n) % INPUT_BYTES;
        command->data_count -= (uint32_t)n;
        command->taken += (uint32_t)n;
    }
    if (command->input_end && command->data_count == 0)
        close_fd(&command->input);
}

static bool take_input(struct command *command, const struct agent_frame *frame)
{
    const uint8_t *from = frame->body;
    uint32_t size = frame->size_bytes;
    if (size == 0 && !command->terminal)
        command->input_end = true;
    if (size > INPUT_BYTES - command->data_count)
        return false;
    if (command->input < 0) {
        command->taken += size;
        return true;
    }
    for (uint32_t at = (command->data_start + command->data_count) % INPUT_BYTES; size;) {
        uint32_t part = INPUT_BYTES - at < size ? INPUT_BYTES - at : size;
        memcpy(command->data + at, from, part);
        at = (at + part) % INPUT_BYTES;
        from += part;
        size -= part;
        command->data_count += part;
    }
    write_input(command);
    return true;
}

/* False: the peer makes no sense. */
static bool take_frame(struct command *command, const struct agent_frame *frame)
{
    const uint8_t *body = frame->body;
    switch (frame->type) {
    case AGENT_INPUT:
        return take_input(command, frame);
    case AGENT_SIGNAL:
        if (frame->size_bytes != 1 || body[0] == 0 || body[0] >= NSIG)
            return false;
        if (!command->exited)
            kill(-command->pid, body[0]);
        return true;
    case AGENT_SIZE: {
        if (frame->size_bytes != 4)
            return false;
        struct winsize size = {.ws_row = (unsigned short)(body[0] | body[1] << 8), .ws_col = (unsigned short)(body[2] | body[3] << 8)};
        if (command->terminal && command->output >= 0)
            ioctl(command->output, TIOCSWINSZ, &size);
        return true;
    }
    default:
        return false;
    }
}

/* False: the peer makes no sense. */
static bool take_frames(struct command *command)
{
    struct agent_frame frame;
    int result;
    while ((result = agent_reader_next(&command->session->reader, &frame)) == 1)
        if (!take_frame(command, &frame))
            return false;
    return result == 0;
}

/* Takes what has come. False: the connection has ended or the peer makes no sense. */
static bool read_connection(struct command *command)
{
    struct session *session = command->session;
    size_t room;
    uint8_t *at = agent_reader_room(&session->reader, &room);
    ssize_t n = recv(session->fd, at, room, MSG_DONTWAIT);
    if (n <= 0)
        return n < 0 && (errno == EAGAIN || errno == EINTR);
    agent_reader_add(&session->reader, (size_t)n);
    return take_frames(command);
}

static void reap(struct command *command)
{
    struct signalfd_siginfo info;
    ssize_t ignored = read(command->children, &info, sizeof info);
    (void)ignored;
    if (!command->exited && waitpid(command->pid, &command->status, WNOHANG) == command->pid)
        command->exited = true;
}

/* Puts what is to be sent next into the empty buffer. */
static void produce(struct command *command)
{
    uint8_t taken[4];
    if (command->taken && (command->taken >= AGENT_INPUT_WINDOW / 4 || command->data_count == 0)) {
        agent_put_u32(taken, command->taken);
        queue_frame(command, AGENT_TAKEN, taken, sizeof taken);
        command->taken = 0;
    }
    if (read_output(command, &command->output, AGENT_OUTPUT) || out_room(command) < AGENT_HEADER_BYTES + AGENT_BODY_MAX ||
        read_output(command, &command->errors, AGENT_ERRORS))
        return;
    if (command->exited && !command->ended) {
        const uint8_t how[2] = {WIFSIGNALED(command->status), (uint8_t)(WIFSIGNALED(command->status) ? WTERMSIG(command->status) : WEXITSTATUS(command->status))};
        queue_frame(command, AGENT_EXITED, how, sizeof how);
        command->ended = true;
    }
}

/* Until the command has ended and all is sent (true), or the connection is over. */
static bool run(struct command *command)
{
    if (!take_frames(command)) /* what came with the request */
        return false;
    for (;;) {
        if (command->out_count == 0)
            produce(command);
        if (command->out_count && !send_out(command))
            return false;
        if (command->out_count == 0 && command->ended)
            return true;
        bool idle = command->out_count == 0;
        struct pollfd fds[] = {
            {.fd = command->session->fd, .events = (short)(POLLIN | (idle ? 0 : POLLOUT))},
            {.fd = command->children, .events = POLLIN},
            {.fd = command->data_count ? command->input : -1, .events = POLLOUT},
            {.fd = idle ? command->output : -1, .events = POLLIN},
            {.fd = idle ? command->errors : -1, .events = POLLIN},
        };
        if (poll(fds, sizeof fds / sizeof *fds, command->exited && idle ? 0 : -1) < 0 && errno != EINTR)
            return false;
        if (fds[0].revents & (POLLIN | POLLHUP | POLLERR) && !read_connection(command))
            return false;
        if (fds[1].revents)
            reap(command);
        if (fds[2].revents)
            write_input(command);
    }
}

void serve_exec(struct session *session, const struct agent_frame *frame)
{
    static struct command command;
    static struct agent_exec exec;
    static uint8_t body[AGENT_BODY_MAX];
    struct user user;
    sigset_t children;
    if (frame->size_bytes)
        memcpy(body, frame->body, frame->size_bytes); /* the texts are needed until the command has started */
    if (agent_exec_parse(&exec, body, frame->size_bytes) < 0) {
        session_fail(session, AGENT_STATUS_TROUBLE, "a request of another version than this agent's (%u), or none at all", AGENT_VERSION);
        return;
    }
    char own[16];
    snprintf(own, sizeof own, "%u", (unsigned)geteuid());
    if (user_find(&user, *exec.user ? exec.user : own)) {
        session_fail(session, AGENT_STATUS_TROUBLE, "there is no user \"%s\"", exec.user);
        return;
    }
    command = (struct command){.session = session, .input = -1, .output = -1, .errors = -1, .children = -1};
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    command.children = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    if (start(&command, &exec, &user) && !run(&command) && !command.exited)
        kill(-command.pid, SIGHUP);
    int *const fds[] = {&command.input, &command.output, &command.errors, &command.children};
    for (unsigned i = 0; i < 4; i++)
        close_fd(fds[i]);
}
