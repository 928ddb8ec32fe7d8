/*
 * Snapshots by released versions can still be gone on with. `test_golden DIRECTORY` lets each in it (files state and memory, compressed) compute to its end under both engines;
 * `test_golden --make DIRECTORY` makes one by the present version, for the release.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>

#define ROUNDS 60000000u /* those of the files */
#include "computing_guest.h"

#define DISK_BYTES (1 << 20)

static const char *directory;

static void make_disk(const struct files *f, char path[160])
{
    snprintf(path, 160, "%s/disk", f->directory);
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, DISK_BYTES), 0);
    close(fd);
}

static int new_file(const char *name)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        fail_msg("cannot make %s: %s", path, strerror(errno));
    return fd;
}

static void make(void **state)
{
    struct files f;
    struct machine_config config;
    struct machine *machine;
    struct error err = {0};
    char disk[160];
    files_make(&f);
    make_disk(&f, disk);
    make_config(&config, &f, "interp");
    set(&config, "disk", disk);
    set(&config, "cpus", "2");
    must(machine_create(&machine, &config, &err), &err);
    must(machine_start(machine, &err), &err);
    run_for_ms(20);
    struct machine_snapshot made = {.state_fd = new_file("state"), .memory_fd = new_file("memory"), .state_name = "state", .memory_name = "memory", .zstd_level = 19,
                                    .without_disks = true};
    must(machine_snapshot_live(machine, &made, &err), &err);
    machine_destroy(machine);
    machine_config_clear(&config);
    unlink(disk);
    files_remove(&f);
}

static void go_on(const char *name, const char *engine)
{
    struct files f;
    struct machine_config config;
    struct machine *machine;
    struct error err = {0};
    char state_path[512], memory_path[512], disk[160], output[160];
    snprintf(state_path, sizeof state_path, "%s/%s/state", directory, name);
    snprintf(memory_path, sizeof memory_path, "%s/%s/memory", directory, name);
    const struct snapshot_files files = {.state = state_path, .memory = memory_path};
    files_make(&f);
    make_disk(&f, disk);
    machine_config_init(&config);
    must(machine_snapshot_check(&files, &err), &err);
    must(machine_snapshot_config(&files, &config, &err), &err);
    assert_int_equal(config.cpus, 2);
    assert_int_equal(config.disk_count, 1);
    free(config.disk[0].path); /* files are elsewhere now */
    config.disk[0].path = strdup(disk);
    snprintf(output, sizeof output, "file:%s", f.output);
    set(&config, "kernel", f.kernel);
    set(&config, "debug-console", output);
    set(&config, "engine", usable(engine));
    bool loaded = machine_snapshot_load(&machine, &config, &files, &err) == 0;
    if (!loaded && (strstr(err.text, "this host lacks") || strstr(err.text, "vendor differs"))) { /* it was made on one with more features, or of the other vendor */
        print_message("%s\n", err.text);
        machine_config_clear(&config);
        unlink(disk);
        files_remove(&f);
        return;
    }
    must(loaded ? 0 : -1, &err);
    must(machine_start(machine, &err), &err);
    assert_int_equal(machine_wait(machine), MACHINE_SHUTDOWN);
    machine_destroy(machine);
    machine_config_clear(&config);
    assert_int_equal(result(&f), expected());
    unlink(disk);
    files_remove(&f);
}

static void each(void **state)
{
    unsigned count = 0;
    DIR *entries = opendir(directory);
    assert_non_null(entries);
    for (struct dirent *entry; (entry = readdir(entries));) {
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9')
            continue;
        print_message("%s\n", entry->d_name);
        go_on(entry->d_name, "interp");
        if (strcmp(usable("bt"), "bt") == 0)
            go_on(entry->d_name, "bt");
        count++;
    }
    closedir(entries);
    assert_true(count > 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest made[] = {cmocka_unit_test(make)}, read[] = {cmocka_unit_test(each)};
    if (argc < 2)
        return 2;
    directory = argv[argc - 1];
    return argc > 2 ? cmocka_run_group_tests(made, NULL, NULL) : cmocka_run_group_tests(read, NULL, NULL);
}
