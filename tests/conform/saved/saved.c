/*
 * Takes a machine that lives on interrupts (sources.c) through snapshots at random moments, each loaded into a new machine under one engine after the other. An interrupt that gets
 * lost between being raised and being delivered is missed by the guest, which says so.
 *
 *     conform_saved KERNEL [--hops N] [--rounds N] [--seed S] [--engines bt,interp] [--verbose]
 */
#include <errno.h>
#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine/engine.h"
#include "machine/machine.h"
#include "util/log.h"

#define ENGINES_MAX 4u
#define HOP_US_MAX 3000u

struct run {
    const char *kernel;
    unsigned hops, rounds, engine_count;
    uint64_t seed;
    const char *engine[ENGINES_MAX];
    bool verbose;
    char folder[64], state[96], memory[96], console[96];
};

static _Noreturn void die(const char *what, const struct error *err)
{
    printf("%s: %s\n", what, err->text);
    exit(1);
}

static uint64_t random_next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static void set(struct machine_config *config, const char *key, const char *value)
{
    struct error err = {0};
    if (machine_config_set(config, key, value, &err))
        die(key, &err);
}

static void configure(const struct run *run, struct machine_config *config)
{
    char text[128];
    machine_config_init(config);
    set(config, "kernel", run->kernel);
    set(config, "memory", "16M");
    set(config, "cpus", "2");
    set(config, "net", "none");
    set(config, "engine", run->engine[0]);
    snprintf(text, sizeof text, "rounds=%u", run->rounds);
    set(config, "append", text);
    snprintf(text, sizeof text, "file:%s", run->console);
    set(config, "console", text);
}

/* Each console begins its file anew, so what came before the last load is not in it. */
static bool report(const struct run *run)
{
    char *line = NULL;
    size_t room = 0;
    bool good = false;
    FILE *console = fopen(run->console, "re");
    while (console && getline(&line, &room, console) >= 0) {
        char *text = line + strspn(line, "\r\n");
        if (!*text)
            continue;
        good = good || strncmp(text, "DONE 0 failures", 15) == 0;
        if (run->verbose || strncmp(text, "ok", 2) != 0)
            fputs(text, stdout);
    }
    free(line);
    if (console)
        fclose(console);
    return good;
}

/* One machine's life between two snapshots. Null: it ended by itself. */
static struct machine *hop(struct run *run, unsigned number, struct machine *machine, struct machine_config *config)
{
    struct snapshot_files files = {.state = run->state, .memory = run->memory, .differential = number % 4 != 0};
    struct timespec time = {.tv_nsec = (long)(random_next(&run->seed) % HOP_US_MAX) * 1000};
    struct error err = {0};
    nanosleep(&time, NULL);
    if (number % 2 && machine_pause(machine, &err) && err.code != -ESRCH)
        die("pause", &err);
    int r = machine_snapshot_save(machine, &files, &err);
    if (r == -ESRCH) {
        machine_wait(machine);
        machine_destroy(machine);
        return NULL;
    }
    if (r)
        die("save", &err);
    machine_destroy(machine);
    machine_config_clear(config);
    machine_config_init(config);
    if (machine_snapshot_config(&files, config, &err))
        die("configuration", &err);
    set(config, "engine", run->engine[(number + 1) % run->engine_count]);
    if (machine_snapshot_load(&machine, config, &files, &err) || machine_start(machine, &err))
        die("load", &err);
    return machine;
}

static bool take_through(struct run *run)
{
    struct machine_config config;
    struct machine *machine = NULL;
    struct error err = {0};
    configure(run, &config);
    if (machine_create(&machine, &config, &err) || machine_start(machine, &err))
        die("start", &err);
    unsigned done = 0;
    while (machine && done < run->hops)
        machine = hop(run, done++, machine, &config);
    if (machine) {
        machine_wait(machine);
        machine_destroy(machine);
    }
    machine_config_clear(&config);
    printf("%u snapshots\n", done);
    return report(run);
}

static bool parse(struct run *run, int argc, char **argv)
{
    static const struct option options[] = {{"hops", 1, NULL, 'h'},    {"rounds", 1, NULL, 'r'},  {"seed", 1, NULL, 's'},
                                            {"engines", 1, NULL, 'e'}, {"verbose", 0, NULL, 'v'}, {0}};
    int option;
    *run = (struct run){.hops = 100, .rounds = 300, .seed = 1, .engine_count = 2, .engine = {"bt", "interp"}};
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'h': run->hops = (unsigned)strtoul(optarg, NULL, 10); break;
        case 'r': run->rounds = (unsigned)strtoul(optarg, NULL, 10); break;
        case 's': run->seed = strtoull(optarg, NULL, 10); break;
        case 'v': run->verbose = true; break;
        case 'e':
            run->engine_count = 0;
            for (char *name = strtok(optarg, ","); name && run->engine_count < ENGINES_MAX; name = strtok(NULL, ","))
                run->engine[run->engine_count++] = name;
            break;
        default: return false;
        }
    }
    run->kernel = argv[optind];
    run->seed = run->seed * 0x9E3779B97F4A7C15ull + 1;
    return run->kernel && run->engine_count;
}

#define SKIPPED 77

static bool have_engines(const struct run *run)
{
    struct error err = {0};
    for (unsigned i = 0; i < run->engine_count; i++) {
        const struct engine_ops *ops = engine_find(run->engine[i], NULL, &err);
        if (!ops || ops->probe(&err)) {
            printf("skipped: %s\n", err.text);
            return false;
        }
    }
    return true;
}

int main(int argc, char **argv)
{
    struct run run;
    if (!parse(&run, argc, argv)) {
        fprintf(stderr, "conform_saved KERNEL [--hops N] [--rounds N] [--seed S] [--engines bt,interp] [--verbose]\n");
        return 2;
    }
    if (!have_engines(&run))
        return SKIPPED;
    log_set_level(LOG_ERROR);
    snprintf(run.folder, sizeof run.folder, "%s/doppel-saved-XXXXXX", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    if (!mkdtemp(run.folder))
        return 1;
    snprintf(run.state, sizeof run.state, "%s/state", run.folder);
    snprintf(run.memory, sizeof run.memory, "%s/memory", run.folder);
    snprintf(run.console, sizeof run.console, "%s/console", run.folder);
    bool good = take_through(&run);
    unlink(run.state);
    unlink(run.memory);
    unlink(run.console);
    rmdir(run.folder);
    return good ? 0 : 1;
}
