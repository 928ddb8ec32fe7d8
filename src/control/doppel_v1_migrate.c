/*
 * Requests about live migration under /doppel/v1. The machine opens no connections: whoever asks connects to the other side, and hands the connection over through the socket migrate.sock in the
 * machine's directory (one byte that comes with a descriptor), before the request. So keys and names of hosts stay outside of the process that runs a guest.
 * Threading: a migration has a thread of its own, and the reply comes from there. `migration_lock` guards `migration`, which others look at and cancel.
 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "control/vm_control_priv.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API, accept4);
SANDBOX_ALLOW(IN_API, recvmsg);
SANDBOX_ALLOW(IN_API, fstat);
SANDBOX_ALLOW(IN_API, poll);

#define DOWNTIME_MS_DEFAULT 50
#define DOWNTIME_MS_MAX 60000
#define ZSTD_LEVEL_MAX 19
#define CONNECTION_MS 10000
#define ABOUT_BYTES_MAX 60000u

struct moving {
    struct vm_control *control;
    struct http_call *call;
    char *about;
    struct machine_migration migration;
};

/* ---- the connection ---- */

/* The descriptor that comes first, a socket's; -1: none did. */
static int take_descriptor(int from)
{
    char byte;
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control;
    struct iovec part = {.iov_base = &byte, .iov_len = 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct stat st;
    int fd = -1;
    if (recvmsg(from, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT) != 1)
        return -1;
    const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof fd))
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
    if (fd >= 0 && (fstat(fd, &st) || !S_ISSOCK(st.st_mode))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* Of those who connected the first who is still there: others were given up before they asked. */
static int take_connection(int listen_fd)
{
    for (;;) {
        struct pollfd poll_fd = {.fd = listen_fd, .events = POLLIN};
        int from = poll(&poll_fd, 1, CONNECTION_MS) > 0 ? accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC) : -1;
        if (from < 0)
            return -1;
        poll_fd = (struct pollfd){.fd = from, .events = POLLIN | POLLRDHUP};
        bool there = poll(&poll_fd, 1, CONNECTION_MS) > 0 && !(poll_fd.revents & (POLLRDHUP | POLLHUP));
        int fd = there ? take_descriptor(from) : -1;
        close(from);
        if (fd >= 0)
            return fd;
    }
}

/* ---- one migration ---- */

static void set_current(struct vm_control *control, struct machine_migration *migration)
{
    pthread_mutex_lock(&control->migration_lock);
    control->migration = migration;
    pthread_mutex_unlock(&control->migration_lock);
}

static json_t *describe(struct machine_migration *migration)
{
    return json_pack("{s:I, s:I, s:i, s:i, s:I, s:I}", "downtime_ns", (json_int_t)migration->downtime_ns, "duration_ns", (json_int_t)migration->duration_ns, "rounds", (int)migration->rounds, "throttle", (int)atomic_load(&migration->throttle), "pages",
                     (json_int_t)atomic_load(&migration->pages_sent), "bytes", (json_int_t)atomic_load(&migration->bytes_sent));
}

static void *move(void *arg)
{
    struct moving *moving = arg;
    struct vm_control *control = moving->control;
    struct error err = {0};
    int r = 0, fd = take_connection(control->migrate_fd);
    struct machine *machine = vm_machine_get(control);
    if (fd < 0)
        r = error_set(&err, -ENOTCONN, "no connection to the other side came through migrate.sock");
    else if (machine_migration_open(&moving->migration, fd))
        r = error_set(&err, -ENOMEM, "out of memory");
    else if (!machine)
        r = error_set(&err, -ESRCH, "the virtual machine has ended");
    if (r == 0) {
        set_current(control, &moving->migration);
        r = machine_migrate(machine, &moving->migration, &err);
        set_current(control, NULL);
    }
    atomic_store(&control->snapshot_under_way, false);
    if (r)
        http_reply_error(moving->call, 400, "%s", err.text);
    else
        http_reply_json(moving->call, 200, describe(&moving->migration));
    if (machine)
        vm_machine_put(control);
    machine_migration_close(&moving->migration);
    free(moving->about);
    free(moving);
    return NULL;
}

/* ---- what is asked for ---- */

static bool understand(struct moving *moving, json_t *body)
{
    const char *key;
    json_t *value;
    json_object_foreach(body, key, value)
    {
        json_int_t number = json_integer_value(value);
        if (strcmp(key, "downtime_ms") == 0 && json_is_integer(value) && number > 0 && number <= DOWNTIME_MS_MAX)
            moving->migration.downtime_ns = (uint64_t)number * 1000000;
        else if (strcmp(key, "zstd_level") == 0 && json_is_integer(value) && number >= 0 && number <= ZSTD_LEVEL_MAX)
            moving->migration.zstd_level = (int)number;
        else if (strcmp(key, "bandwidth_bytes") == 0 && json_is_integer(value) && number >= 0)
            moving->migration.bandwidth_bytes = (uint64_t)number;
        else if (strcmp(key, "post_copy") == 0 && json_is_boolean(value))
            moving->migration.post_copy = json_is_true(value);
        else if (strcmp(key, "disks") == 0 && json_is_boolean(value))
            moving->migration.disks = json_is_true(value);
        else if (strcmp(key, "recover") == 0 && json_is_boolean(value))
            moving->migration.recover = json_is_true(value);
        else if (strcmp(key, "about") == 0 && json_is_object(value) && !moving->about)
            moving->about = json_dumps(value, JSON_COMPACT);
        else
            return false;
    }
    return json_is_object(body) && (!moving->about || strlen(moving->about) <= ABOUT_BYTES_MAX);
}

static struct moving *prepare(struct http_call *call, struct vm_control *control)
{
    json_t *body = http_body_json(call);
    if (!body)
        return NULL;
    struct moving *moving = calloc(1, sizeof *moving);
    bool good = false;
    if (moving) {
        moving->control = control;
        moving->call = call;
        moving->migration.downtime_ns = DOWNTIME_MS_DEFAULT * 1000000ull;
        good = understand(moving, body);
        moving->migration.about = moving->about;
    }
    json_decref(body);
    if (good)
        return moving;
    http_reply_error(call, 400, "The body may have \"downtime_ms\" (1 to %d), \"zstd_level\" (0 to %d), \"bandwidth_bytes\", \"post_copy\", \"disks\", \"recover\" and \"about\" (an object).", DOWNTIME_MS_MAX, ZSTD_LEVEL_MAX);
    if (moving)
        free(moving->about);
    free(moving);
    return NULL;
}

void vm_post_migration(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    pthread_t thread;
    if (control->migrate_fd < 0) {
        http_reply_error(call, 400, "This machine has no directory, and so no migrate.sock.");
        return;
    }
    if (atomic_exchange(&control->snapshot_under_way, true)) {
        http_reply_error(call, 400, "A snapshot is being made, or a migration is under way.");
        return;
    }
    struct moving *moving = prepare(call, control);
    if (!moving) {
        atomic_store(&control->snapshot_under_way, false);
        return;
    }
    http_defer(call);
    if (pthread_create(&thread, NULL, move, moving) == 0) {
        pthread_detach(thread);
        return;
    }
    atomic_store(&control->snapshot_under_way, false);
    http_reply_error(call, 500, "cannot start a thread");
    free(moving->about);
    free(moving);
}

void vm_get_migration(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    pthread_mutex_lock(&control->migration_lock);
    struct machine_migration *migration = control->migration;
    json_t *answer = json_pack("{s:b, s:b, s:i, s:I, s:I, s:I, s:I}", "under_way", migration != NULL, "following", migration && atomic_load(&migration->following), "throttle", migration ? (int)atomic_load(&migration->throttle) : 0, "pages", migration ? (json_int_t)atomic_load(&migration->pages_sent) : 0, "pages_left",
                               migration ? (json_int_t)atomic_load(&migration->pages_left) : 0, "disk_bytes_left", migration ? (json_int_t)atomic_load(&migration->disk_bytes_left) : 0, "bytes", migration ? (json_int_t)atomic_load(&migration->bytes_sent) : 0);
    pthread_mutex_unlock(&control->migration_lock);
    http_reply_json(call, 200, answer);
}

void vm_cancel_migration(struct http_call *call, void *ctx)
{
    struct vm_control *control = ctx;
    pthread_mutex_lock(&control->migration_lock);
    int r = control->migration ? machine_migration_cancel(control->migration) : -ESRCH;
    pthread_mutex_unlock(&control->migration_lock);
    if (r)
        http_reply_error(call, 400, r == -ESRCH ? "No migration is under way." : "The guest has been handed over already.");
    else
        http_reply_empty(call, 204);
}
