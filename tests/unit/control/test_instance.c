/* The directory of virtual machines: names, life and death, and contents that nobody sane wrote. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "control/instance.h"

#define RACERS 12

static char runtime[64];

static int set_up(void **state)
{
    snprintf(runtime, sizeof runtime, "/tmp/doppel-instance-XXXXXX");
    return mkdtemp(runtime) && setenv("XDG_RUNTIME_DIR", runtime, 1) == 0 ? 0 : -1;
}

static int tear_down(void **state)
{
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", runtime);
    return system(command);
}

static struct instance *make(const char *name)
{
    struct error err = {0};
    struct instance *instance = NULL;
    json_t *vm = json_pack("{s:i}", "cpus", 1);
    if (instance_create(&instance, name, vm, &err))
        fail_msg("%s", err.text);
    json_decref(vm);
    return instance;
}

static int try(const char *name)
{
    struct error err = {0};
    struct instance *instance = NULL;
    json_t *vm = json_object();
    int r = instance_create(&instance, name, vm, &err);
    json_decref(vm);
    assert_true(r == 0 || strlen(err.text) > 0);
    instance_close(instance, true);
    return r;
}

static struct instance_info look(const char *name)
{
    struct error err = {0};
    struct instance_info info;
    if (instance_find(name, &info, &err))
        fail_msg("%s", err.text);
    return info;
}

static void put(const char *name, const char *file, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/doppel/%s/%s", runtime, name, file);
    unlink(path);
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    fputs(text, out);
    fclose(out);
}

static unsigned count(void)
{
    struct instance_info *list;
    unsigned n;
    assert_int_equal(instance_list(&list, &n, NULL), 0);
    instance_list_free(list, n);
    return n;
}

/* ---- names ---- */

static void names(void **state)
{
    static const char *const bad[] = {"", ".", "..", "-x", ".x", "a/b", "a b", "ä", "x\n", "0123456789012345678901234567890123456789012345678"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(instance_name_valid(bad[i]));
        assert_int_equal(try(bad[i]), -EINVAL);
    }
    assert_true(instance_name_valid("a"));
    assert_true(instance_name_valid("web-1.b_C"));
    struct instance *one = make(NULL), *two = make(NULL);
    assert_true(instance_name_valid(instance_name(one)));
    assert_string_not_equal(instance_name(one), instance_name(two));
    instance_close(one, false);
    instance_close(two, false);
    assert_int_equal(count(), 0);
}

static void found_by_beginning(void **state)
{
    struct instance_info info;
    struct instance *web = make("web"), *web1 = make("web-1"), *db = make("db");
    info = look("web");
    assert_string_equal(info.name, "web");
    instance_info_clear(&info);
    info = look("d");
    assert_string_equal(info.name, "db");
    instance_info_clear(&info);
    assert_int_equal(instance_find("we", &info, NULL), -ENOENT);
    assert_int_equal(instance_find("", &info, NULL), -ENOENT);
    assert_int_equal(instance_find("web-10", &info, NULL), -ENOENT);
    assert_int_equal(instance_find("../doppel/web", &info, NULL), -ENOENT);
    assert_int_equal(instance_read("we", &info, NULL), -ENOENT);
    assert_int_equal(count(), 3);
    instance_close(web, false);
    instance_close(web1, false);
    instance_close(db, false);
}

/* ---- life ---- */

static void lives_and_ends(void **state)
{
    struct instance *vm = make("vm");
    assert_int_equal(try("vm"), -EEXIST);
    assert_int_equal(instance_remove("vm", NULL), -EBUSY);
    struct instance_info info = look("vm");
    assert_int_equal(info.life, INSTANCE_ALIVE);
    assert_string_equal(info.state, "starting");
    instance_info_clear(&info);

    json_t *status = json_pack("{s:s}", "state", "ended");
    assert_int_equal(instance_write(vm, "state.json", status), 0);
    json_decref(status);
    instance_close(vm, true);
    info = look("vm");
    assert_int_equal(info.life, INSTANCE_ENDED);
    assert_string_equal(info.state, "ended");
    assert_int_equal(instance_wait(&info, -1), 0);
    instance_info_clear(&info);
    assert_int_equal(try("vm"), 0); /* replaces it */
    info = look("vm");
    assert_int_equal(info.life, INSTANCE_DIED); /* the new one said nothing */
    instance_info_clear(&info);
    assert_int_equal(instance_remove("vm", NULL), 0);
    assert_int_equal(instance_remove("vm", NULL), -ENOENT);
}

/* A process that has one and says so through a pipe. */
static pid_t start(const char *name, bool *won)
{
    int ready[2];
    char byte = 0;
    assert_int_equal(pipe2(ready, O_CLOEXEC), 0);
    pid_t pid = fork();
    if (pid == 0) {
        struct instance *instance;
        json_t *vm = json_object();
        byte = instance_create(&instance, name, vm, NULL) == 0 ? 'y' : 'n';
        struct process self = process_self();
        json_t *status = json_pack("{s:s, s:{s:i, s:I}}", "state", "running", "process", "pid", (int)self.pid, "start_time", (json_int_t)self.start_time);
        if (byte == 'y' && instance_write(instance, "state.json", status))
            byte = 'n';
        if (write(ready[1], &byte, 1) == 1)
            pause();
        _exit(0);
    }
    close(ready[1]);
    *won = read(ready[0], &byte, 1) == 1 && byte == 'y';
    close(ready[0]);
    return pid;
}

static void killed(void **state)
{
    bool won;
    pid_t pid = start("vm", &won);
    assert_true(won);
    struct instance_info info = look("vm");
    assert_int_equal(info.life, INSTANCE_ALIVE);
    assert_string_equal(info.state, "running");
    assert_int_equal(info.process.pid, pid);
    assert_true(process_is(&info.process));
    assert_int_equal(instance_wait(&info, 10), -ETIMEDOUT);

    /* Its process id belongs to another by now, which is not to be touched. */
    struct process other = {.pid = pid, .start_time = info.process.start_time + 1};
    assert_false(process_is(&other));
    assert_int_equal(process_signal(&other, SIGKILL), -ESRCH);
    assert_true(process_is(&info.process));

    assert_int_equal(process_signal(&info.process, SIGKILL), 0);
    assert_int_equal(instance_wait(&info, 10000), 0);
    assert_false(process_is(&info.process)); /* not waited for, but dead */
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(process_signal(&info.process, SIGKILL), -ESRCH);
    instance_info_clear(&info);
    info = look("vm");
    assert_int_equal(info.life, INSTANCE_DIED);
    assert_string_equal(info.state, "died");
    instance_info_clear(&info);
    assert_int_equal(instance_remove("vm", NULL), 0);
}

static void race(void **state)
{
    pid_t pid[RACERS];
    int go[2], results[2];
    assert_int_equal(pipe2(go, O_CLOEXEC), 0);
    assert_int_equal(pipe2(results, O_CLOEXEC), 0);
    for (unsigned i = 0; i < RACERS; i++) {
        pid[i] = fork();
        if (pid[i] == 0) {
            char byte;
            struct instance *instance;
            json_t *vm = json_object();
            close(go[1]);
            if (read(go[0], &byte, 1) != 0)
                _exit(1);
            byte = instance_create(&instance, "prize", vm, NULL) == 0 ? 'y' : 'n';
            if (write(results[1], &byte, 1) == 1)
                pause(); /* keeps it until all have tried */
            _exit(0);
        }
    }
    close(go[0]);
    close(go[1]);
    unsigned winners = 0;
    for (unsigned i = 0; i < RACERS; i++) {
        char byte = 0;
        assert_int_equal(read(results[0], &byte, 1), 1);
        winners += byte == 'y';
    }
    assert_int_equal(winners, 1);
    for (unsigned i = 0; i < RACERS; i++) {
        kill(pid[i], SIGKILL);
        waitpid(pid[i], NULL, 0);
    }
    close(results[0]);
    close(results[1]);
    assert_int_equal(instance_remove("prize", NULL), 0);
}

/* What a killed VM left goes with the next one, if it wanted nothing kept. */
static void passing(void **state)
{
    json_t *vm = json_pack("{s:b}", "passing", 1);
    struct instance *one;
    assert_int_equal(instance_create(&one, "one", vm, NULL), 0);
    json_decref(vm);
    assert_int_equal(try("two"), 0);
    assert_int_equal(count(), 2);
    instance_close(one, true);
    assert_int_equal(count(), 2);
    assert_int_equal(try("three"), 0);
    assert_int_equal(count(), 2);
    assert_int_equal(instance_remove("one", NULL), -ENOENT);
    assert_int_equal(instance_remove("two", NULL), 0);
    assert_int_equal(instance_remove("three", NULL), 0);
}

/* The lock outlives the process that took it while a child has it: a supervisor and its VM. */
static void two_processes(void **state)
{
    int hold[2];
    struct instance *vm = make("pair");
    assert_int_equal(pipe2(hold, O_CLOEXEC), 0);
    pid_t pid = fork();
    if (pid == 0) {
        char byte;
        close(hold[1]);
        _exit(read(hold[0], &byte, 1) == 0 ? 0 : 1);
    }
    instance_close(vm, true);
    struct instance_info info = look("pair");
    assert_int_equal(info.life, INSTANCE_ALIVE);
    instance_info_clear(&info);
    close(hold[0]);
    close(hold[1]);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_int_equal(instance_remove("pair", NULL), 0);
}

static void unwanted(void **state)
{
    struct instance *vm = make("vm");
    assert_false(instance_unwanted(vm));
    assert_int_equal(instance_want("vm", false), 0);
    assert_true(instance_unwanted(vm));
    assert_int_equal(instance_want("vm", true), 0);
    assert_int_equal(instance_want("vm", true), 0);
    assert_false(instance_unwanted(vm));
    assert_int_equal(instance_want("no", false), -ENOENT);
    instance_close(vm, false);
}

static void sockets(void **state)
{
    struct error err = {0};
    char deep[300] = "";
    for (unsigned i = 0; i < 6; i++)
        strcat(deep, "/a-directory-with-a-rather-long-name");
    char path[512], command[600];
    snprintf(path, sizeof path, "%s%s", runtime, deep);
    snprintf(command, sizeof command, "mkdir -p %s", path);
    assert_int_equal(system(command), 0);
    setenv("XDG_RUNTIME_DIR", path, 1); /* longer than a socket's path may be */
    struct instance *vm = make("vm");
    assert_int_equal(instance_connect("vm", "api.sock"), -ENOENT);
    int server = instance_listen(vm, "api.sock", &err);
    assert_true(server >= 0);
    int client = instance_connect("vm", "api.sock");
    assert_true(client >= 0);
    close(client);
    close(server);
    assert_int_equal(instance_connect("vm", "api.sock"), -ECONNREFUSED);
    server = instance_listen(vm, "api.sock", &err); /* after a restart */
    assert_true(server >= 0);
    close(server);
    instance_close(vm, false);
    setenv("XDG_RUNTIME_DIR", runtime, 1);
}

/* ---- hostile ---- */

static void foreign_roots(void **state)
{
    char root[128], path[INSTANCE_PATH_BYTES];
    struct error err = {0};
    snprintf(root, sizeof root, "%s/doppel", runtime);
    tear_down(NULL);
    set_up(NULL);
    snprintf(root, sizeof root, "%s/doppel", runtime);
    assert_int_equal(symlink("/tmp", root), 0);
    assert_true(instance_root(path, &err) < 0);
    assert_true(try("vm") < 0);
    unlink(root);
    assert_int_equal(mkdir(root, 0777), 0);
    assert_int_equal(chmod(root, 0777), 0);
    struct stat st;
    assert_int_equal(instance_root(path, &err), 0);
    assert_int_equal(stat(root, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
    if (geteuid() == 0) {
        assert_int_equal(chown(root, 1, 1), 0);
        assert_int_equal(instance_root(path, &err), -EPERM);
        assert_int_equal(chown(root, 0, 0), 0);
    }
    setenv("XDG_RUNTIME_DIR", "relative", 1); /* and such are passed over */
    assert_int_equal(instance_root(path, &err), 0);
    assert_int_equal(path[0], '/');
    setenv("XDG_RUNTIME_DIR", runtime, 1);
}

static void foreign_entries(void **state)
{
    char path[256];
    struct instance *vm = make("vm");
    snprintf(path, sizeof path, "%s/doppel/link", runtime);
    assert_int_equal(symlink("vm", path), 0);
    snprintf(path, sizeof path, "%s/doppel/file", runtime);
    close(open(path, O_CREAT | O_WRONLY, 0600));
    snprintf(path, sizeof path, "%s/doppel/.new-half", runtime);
    mkdir(path, 0700);
    snprintf(path, sizeof path, "%s/doppel/odd name", runtime);
    mkdir(path, 0700);
    if (geteuid() == 0) {
        snprintf(path, sizeof path, "%s/doppel/others", runtime);
        assert_int_equal(mkdir(path, 0755), 0);
        assert_int_equal(chown(path, 1, 1), 0);
    }
    assert_int_equal(count(), 1);
    assert_true(instance_remove("link", NULL) < 0);
    assert_int_equal(instance_open("link", "vm.json", O_RDONLY), -ENOTDIR);
    /* A name under which something else is gets free, not followed. */
    assert_int_equal(try("link"), 0);
    assert_int_equal(try("file"), 0);
    assert_int_equal(count(), 3);
    snprintf(path, sizeof path, "%s/doppel/.new-half", runtime);
    assert_int_equal(access(path, F_OK), -1);
    struct instance_info info = look("vm");
    assert_int_equal(info.life, INSTANCE_ALIVE);
    instance_info_clear(&info);
    instance_close(vm, false);
    assert_int_equal(instance_remove("link", NULL), 0);
    assert_int_equal(instance_remove("file", NULL), 0);
}

static void foreign_contents(void **state)
{
    static const char *const texts[] = {"", "nonsense", "[]", "{\"state\": 5, \"process\": 7}", "{\"state\": \"running\", \"process\": {\"pid\": -1, \"start_time\": 1}}",
                                        "{\"process\": {\"pid\": 99999999999999, \"start_time\": 1}}", "{\"process\": {\"pid\": 1, \"start_time\": 1}}",
                                        "{\"process\": {\"pid\": \"self\"}}", "{\"state\": \"a state whose name is longer than any\"}",
                                        "{\"state\": \"running\", \"state\": \"ended\"}"};
    char path[256], *huge = malloc(1 << 20);
    struct instance *vm = make("vm");
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        put("vm", "state.json", texts[i]);
        put("vm", "vm.json", texts[i]);
        struct instance_info info = look("vm");
        assert_int_equal(info.life, INSTANCE_ALIVE);
        assert_int_equal(info.process.pid, 0);
        assert_true(json_is_object(info.vm) && json_is_object(info.status));
        assert_true(strlen(info.state) > 0);
        instance_info_clear(&info);
    }
    memset(huge, '[', (1 << 20) - 1);
    huge[(1 << 20) - 1] = '\0';
    put("vm", "vm.json", huge);
    huge[100000] = '\0';
    put("vm", "state.json", huge);
    struct instance_info info = look("vm");
    assert_int_equal(json_object_size(info.vm), 0);
    assert_int_equal(json_object_size(info.status), 0);
    instance_info_clear(&info);
    free(huge);

    snprintf(path, sizeof path, "%s/doppel/vm/vm.json", runtime);
    unlink(path);
    assert_int_equal(symlink("/etc/passwd", path), 0);
    assert_true(instance_open("vm", "vm.json", O_RDONLY) < 0);
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(instance_open("vm", "vm.json", O_RDONLY), -EPERM); /* and nobody waits for a writer */
    info = look("vm");
    instance_info_clear(&info);
    instance_close(vm, true);

    snprintf(path, sizeof path, "%s/doppel/vm/lock", runtime);
    unlink(path);
    assert_int_equal(mkfifo(path, 0600), 0);
    info = look("vm");
    assert_int_equal(info.life, INSTANCE_DIED);
    instance_info_clear(&info);
    assert_int_equal(instance_remove("vm", NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names),          cmocka_unit_test(found_by_beginning), cmocka_unit_test(lives_and_ends), cmocka_unit_test(killed),
        cmocka_unit_test(race),           cmocka_unit_test(two_processes),      cmocka_unit_test(unwanted), cmocka_unit_test(passing),       cmocka_unit_test(sockets),
        cmocka_unit_test(foreign_roots),  cmocka_unit_test(foreign_entries),    cmocka_unit_test(foreign_contents),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
