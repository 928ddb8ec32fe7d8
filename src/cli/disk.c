/*
 * doppel disk: images of disks. Making them and telling what they are is done here; checking, committing and converting by qemu-img, where the host has it.
 * A backing file's format is told by the user or its name, never by its contents: a guest wrote those. Single-threaded.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <jansson.h>

#include "block/image.h"
#include "cli/arguments.h"
#include "cli/report.h"
#include "machine/config.h"

/* ---- what an image is ---- */

static json_t *describe(const char *path, const struct block_image_info *info)
{
    json_t *all = json_pack("{s:o, s:s, s:I, s:I, s:I}", "file", report_text(path), "format", info->qcow2 ? "qcow2" : "raw", "size_bytes", (json_int_t)info->size_bytes, "file_bytes",
                            (json_int_t)info->file_bytes, "allocated_bytes", (json_int_t)info->allocated_bytes);
    if (info->qcow2)
        json_object_update_new(all, json_pack("{s:i, s:i, s:i, s:b, s:b}", "version", (int)info->version, "cluster_bytes", (int)info->cluster_bytes, "snapshots",
                                              (int)info->snapshots, "dirty", info->dirty, "corrupt", info->corrupt));
    if (info->backing)
        json_object_set_new(all, "backing", report_text(info->backing));
    if (info->backing_format)
        json_object_set_new(all, "backing_format", report_text(info->backing_format));
    return all;
}

/* As info does, of what another action has left. */
static int report_image(const char *path, const char *format)
{
    struct block_image_info info;
    struct error err = {0};
    if (!report_is_json())
        return 0;
    if (strcmp(format, "raw") != 0 && strcmp(format, "qcow2") != 0) {
        report_value(json_pack("{s:o, s:s}", "file", report_text(path), "format", format));
        return 0;
    }
    if (block_image_info(path, format, &info, &err))
        return complain(STATUS_ERROR, "%s", err.text);
    report_value(describe(path, &info));
    block_image_info_clear(&info);
    return 0;
}

/* ---- create ---- */

/* As run --disk guesses. */
static const char *format_of(const char *path)
{
    size_t length = strlen(path);
    return length > 6 && strcasecmp(path + length - 6, ".qcow2") == 0 ? "qcow2" : "raw";
}

/* The backing file's path from here: its name is from the image's directory. */
static char *from_image(const char *image, const char *name)
{
    const char *slash = strrchr(image, '/');
    char *path;
    if (name[0] == '/' || !slash)
        return strdup(name);
    return asprintf(&path, "%.*s/%s", (int)(slash - image), image, name) < 0 ? NULL : path;
}

static int backing_bytes(const char *image, const char *backing, const char *format, uint64_t *bytes)
{
    struct block_image_info info;
    struct error err = {0};
    char *path = from_image(image, backing);
    int r = !path ? complain(STATUS_ERROR, "out of memory") : block_image_info(path, format, &info, &err) ? complain(STATUS_USAGE, "%s", err.text) : 0;
    free(path);
    if (r)
        return r;
    *bytes = (info.size_bytes + 511) / 512 * 512;
    block_image_info_clear(&info);
    return 0;
}

static int create(const struct arguments *arguments)
{
    const char *path = arguments->names[1], *size = arguments->name_count > 2 ? arguments->names[2] : NULL, *backing = arguments->value[DISK_BACKING];
    const char *format = arguments->value[DISK_BACKING_FORMAT] ? arguments->value[DISK_BACKING_FORMAT] : backing ? format_of(backing) : NULL;
    struct error err = {0};
    uint64_t bytes = 0;
    int r = 0;
    if (format && (!backing || (strcmp(format, "raw") != 0 && strcmp(format, "qcow2") != 0)))
        return complain(STATUS_USAGE, "disk: --backing-format is raw or qcow2, and goes with --backing");
    if (size && (parse_size(size, &bytes) || bytes == 0 || bytes % 512))
        return complain(STATUS_USAGE, "disk: \"%s\" is no size of a disk: 512M, 10G; a bare number is MiB", size);
    if (!size && !backing)
        return complain(STATUS_USAGE, "disk: a new image needs a size, or a backing file to have it from");
    if (backing) {
        uint64_t below;
        r = backing_bytes(path, backing, format, &below);
        bytes = size ? bytes : below;
    }
    int fd = r == 0 ? open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644) : -1;
    if (r == 0 && fd < 0)
        return complain(STATUS_ERROR, "cannot make %s: %s", path, strerror(errno));
    if (r == 0 && block_image_format(fd, path, bytes, backing, format, &err)) {
        r = complain(STATUS_ERROR, "%s", err.text);
        unlink(path);
    }
    if (fd >= 0)
        close(fd);
    if (r == 0 && strcmp(format_of(path), "qcow2") != 0)
        complain(0, "%s: to use it: --disk %s,format=qcow2", path, path);
    return r ? r : report_image(path, "qcow2");
}

/* ---- info ---- */

static void print_info(const char *path, const struct block_image_info *info)
{
    printf("%s: %s, %.1f MiB, %.1f MiB on the host's disk", path, info->qcow2 ? "qcow2" : "raw", (double)info->size_bytes / 1048576, (double)info->allocated_bytes / 1048576);
    if (info->qcow2)
        printf(", version %u, clusters of %u KiB%s%s%s", info->version, info->cluster_bytes / 1024, info->snapshots ? ", snapshots inside" : "", info->dirty ? ", not closed" : "",
               info->corrupt ? ", damaged" : "");
    if (info->backing)
        printf("\n  on %s (%s)", info->backing, info->backing_format ? info->backing_format : "it does not tell its format");
    putchar('\n');
}

static int info(const struct arguments *arguments)
{
    report_list();
    for (unsigned i = 1; i < arguments->name_count; i++) {
        struct block_image_info info;
        struct error err = {0};
        if (block_image_info(arguments->names[i], NULL, &info, &err))
            return complain(STATUS_ERROR, "%s", err.text);
        if (report_is_json())
            report(describe(arguments->names[i], &info), "%s", "");
        else
            print_info(arguments->names[i], &info);
        block_image_info_clear(&info);
    }
    return 0;
}

/* ---- what qemu-img does ---- */

/* Passes on its messages, up to their end. */
static void pass_messages(int fd)
{
    char *line = NULL;
    size_t room = 0;
    FILE *messages = fdopen(fd, "r");
    while (messages && getline(&line, &room, messages) > 0) {
        line[strcspn(line, "\n")] = '\0';
        complain(0, "%s", line);
    }
    free(line);
    if (messages)
        fclose(messages);
    else
        close(fd);
}

/* With --json its messages become ours, and what it prints must be wanted to be seen. */
static int run_qemu_img(const char *const *argv, bool prints_json)
{
    pid_t pid;
    int pipe_fd[2] = {-1, -1};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    if (report_is_json() && pipe2(pipe_fd, O_CLOEXEC) == 0)
        posix_spawn_file_actions_adddup2(&actions, pipe_fd[1], STDERR_FILENO);
    if (report_is_json() && !prints_json)
        posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    int status = 0, code = posix_spawnp(&pid, argv[0], &actions, NULL, (char *const *)argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (pipe_fd[1] >= 0)
        close(pipe_fd[1]);
    if (pipe_fd[0] >= 0)
        pass_messages(pipe_fd[0]);
    if (code)
        return complain(STATUS_ERROR, "qemu-img, which does this, cannot be started: %s; it is in the package qemu-utils", strerror(code));
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return complain(STATUS_ERROR, "cannot wait for qemu-img: %s", strerror(errno));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : STATUS_ERROR;
}

static int check(const struct arguments *arguments)
{
    const char *path = arguments->names[1], *output = report_is_json() ? "--output=json" : "--output=human";
    if (arguments->value[DISK_REPAIR])
        return run_qemu_img((const char *const[]){"qemu-img", "check", output, "-f", "qcow2", "-r", "all", "--", path, NULL}, true);
    return run_qemu_img((const char *const[]){"qemu-img", "check", output, "-f", "qcow2", "--", path, NULL}, true);
}

static int commit(const struct arguments *arguments)
{
    int r = run_qemu_img((const char *const[]){"qemu-img", "commit", "-f", "qcow2", "--", arguments->names[1], NULL}, false);
    return r ? r : report_image(arguments->names[1], "qcow2");
}

static int convert(const struct arguments *arguments)
{
    const char *from = arguments->value[DISK_FROM], *to = arguments->value[DISK_TO] ? arguments->value[DISK_TO] : format_of(arguments->names[2]);
    from = from ? from : format_of(arguments->names[1]);
    if (access(arguments->names[2], F_OK) == 0)
        return complain(STATUS_ERROR, "%s is there already", arguments->names[2]);
    bool shows = isatty(STDERR_FILENO) && !report_is_json();
    int r = run_qemu_img((const char *const[]){"qemu-img", "convert", shows ? "-p" : "-q", "-f", from, "-O", to, "--", arguments->names[1], arguments->names[2], NULL}, false);
    return r ? r : report_image(arguments->names[2], to);
}

/* ---- the command ---- */

#define BIT(option) (1u << (option))

static const struct {
    const char *name, *usage;
    int (*act)(const struct arguments *arguments);
    unsigned names_min, names_max, options;
} actions[] = {
    {"create", "[--backing FILE [--backing-format raw|qcow2]] FILE [SIZE]", create, 1, 2, BIT(DISK_BACKING) | BIT(DISK_BACKING_FORMAT)},
    {"info", "FILE...", info, 1, 64, 0},
    {"check", "[--repair] FILE", check, 1, 1, BIT(DISK_REPAIR)},
    {"commit", "FILE", commit, 1, 1, 0},
    {"convert", "[--from FORMAT] [--to FORMAT] FILE NEW", convert, 2, 2, BIT(DISK_FROM) | BIT(DISK_TO)},
};

int disk_main(int argc, char **argv)
{
    struct arguments arguments;
    const struct subcommand *command = command_find(argv[0]);
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    for (size_t i = 0; arguments.name_count && i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(actions[i].name, arguments.names[0]) != 0)
            continue;
        if (arguments.name_count - 1 < actions[i].names_min || arguments.name_count - 1 > actions[i].names_max)
            return complain(STATUS_USAGE, "disk: usage: doppel disk %s %s", actions[i].name, actions[i].usage);
        for (unsigned n = 0; command->options[n].name; n++)
            if (arguments.value[n] && !((actions[i].options | BIT(DISK_JSON)) & BIT(n)))
                return complain(STATUS_USAGE, "disk: --%s is not for %s", command->options[n].name, actions[i].name);
        return actions[i].act(&arguments);
    }
    return complain(STATUS_USAGE, "disk: usage: doppel disk %s", command->argument);
}
