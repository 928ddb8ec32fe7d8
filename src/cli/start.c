/* doppel start: what an ended virtual machine was started with is in its directory; `doppel run` is given that once more, where it was given it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cli/arguments.h"
#include "cli/report.h"

#define ARGUMENTS_MAX 1024u

static void become_run(const struct instance_info *vm)
{
    static char *const first[] = {"doppel", "run", "--detach", "--name"};
    const json_t *stored = json_object_get(vm->vm, "arguments");
    const char *directory = json_string_value(json_object_get(vm->vm, "directory"));
    size_t count = json_array_size(stored), n = sizeof first / sizeof *first;
    char *argv[ARGUMENTS_MAX + 8];
    memcpy(argv, first, sizeof first);
    argv[n++] = (char *)vm->name;
    for (size_t i = 0; i < count && i < ARGUMENTS_MAX; i++) {
        const char *argument = json_string_value(json_array_get(stored, i));
        argv[n++] = (char *)(argument ? argument : "");
    }
    argv[n] = NULL;
    if (directory && chdir(directory))
        _exit(complain(STATUS_ERROR, "%s was started in %s, where one cannot go: %s", vm->name, directory, strerror(errno)));
    if (freopen("/dev/null", "w", stdout) == NULL) /* the name is printed by our caller */
        _exit(STATUS_ERROR);
    execv("/proc/self/exe", argv);
    _exit(complain(STATUS_ERROR, "cannot start %s: %s", vm->name, strerror(errno)));
}

int start_again(const struct instance_info *vm)
{
    int status;
    const json_t *stored = json_object_get(vm->vm, "arguments");
    if (!json_is_array(stored) || json_array_size(stored) > ARGUMENTS_MAX)
        return complain(STATUS_ERROR, "what %s was started with is not known", vm->name);
    fflush(NULL);
    pid_t pid = fork();
    if (pid < 0)
        return complain(STATUS_ERROR, "cannot start %s: %s", vm->name, strerror(errno));
    if (pid == 0)
        become_run(vm);
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return complain(STATUS_ERROR, "cannot wait for %s: %s", vm->name, strerror(errno));
    return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : STATUS_ERROR;
}

static int start_one(struct instance_info *vm, void *ctx)
{
    if (vm->life == INSTANCE_ALIVE)
        return complain(STATUS_ERROR, "%s is running", vm->name);
    if (start_again(vm))
        return STATUS_ERROR;
    report_machine(vm->name);
    return 0;
}

int start_main(int argc, char **argv)
{
    struct arguments arguments;
    int r = parse_arguments(argc, argv, &arguments);
    if (r)
        return r < 0 ? 0 : r;
    report_list();
    return for_each_vm(&arguments, start_one, NULL);
}
