/*
 * `doppel run` for tests that change a machine while it runs: control run --key value ...; commands come as lines from the Unix socket in DOPPEL_CONTROL, where the test
 * listens, and each is answered by one line: "ok ..." or "error ...". With DOPPEL_LOAD=FOLDER the machine goes on from the snapshot there, and options come on top of its own.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "machine/machine_priv.h"

static int answer_balloon(struct machine *machine, FILE *out, struct error *err)
{
    struct machine_balloon balloon;
    int r = machine_balloon_get(machine, &balloon, err);
    if (r)
        return r;
    fprintf(out, "ok target=%" PRIu64 " actual=%" PRIu64 " discarded=%" PRIu64 " interval=%u host=%u guest=%u", balloon.target_pages,
            balloon.actual_pages, balloon.discarded_bytes, balloon.statistics_interval_s, balloon.host_command, balloon.guest_command);
    for (unsigned tag = 0; tag < MACHINE_BALLOON_STATISTICS; tag++)
        if (balloon.known[tag])
            fprintf(out, " %s=%" PRIu64, machine_balloon_statistic_names[tag], balloon.statistic[tag]);
    fprintf(out, "\n");
    return 0;
}

static int answer_memory(struct machine *machine, FILE *out, struct error *err)
{
    struct machine_memory memory;
    int r = machine_memory_get(machine, &memory, err);
    if (r == 0)
        fprintf(out, "ok plugged=%" PRIu64 " requested=%" PRIu64 "\n", memory.plugged_mib, memory.requested_mib);
    return r;
}

#define PATH_BYTES 300

static struct snapshot_files files_in(const char *folder, char state[PATH_BYTES], char memory[PATH_BYTES])
{
    snprintf(state, PATH_BYTES, "%.250s/state", folder);
    snprintf(memory, PATH_BYTES, "%.250s/memory", folder);
    return (struct snapshot_files){.state = state, .memory = memory};
}

/* The machine stays paused, so that what it does to disks afterwards is nothing. */
static int save(struct machine *machine, const char *line, bool differential, struct error *err)
{
    char folder[256] = "", state[PATH_BYTES], memory[PATH_BYTES];
    sscanf(line, "%*s %255s", folder);
    struct snapshot_files files = files_in(folder, state, memory);
    files.differential = differential;
    int r = machine_pause(machine, err);
    return r ? r : machine_snapshot_save(machine, &files, err);
}

static void obey(struct machine *machine, const char *line, FILE *out)
{
    struct error err = {0};
    unsigned long long number = 0;
    char word[32] = "";
    int r = 0;
    sscanf(line, "%31s %llu", word, &number);
    bool whole = strcmp(word, "save") == 0, differential = strcmp(word, "save-changes") == 0;
    if ((whole || differential) && !(r = save(machine, line, differential, &err)))
        fprintf(out, "ok\n");
    else if (strcmp(word, "resident") == 0)
        fprintf(out, "ok bytes=%" PRIu64 "\n", physmap_resident_bytes(machine->memory));
    else if (strcmp(word, "balloon") == 0)
        r = answer_balloon(machine, out, &err);
    else if (strcmp(word, "memory") == 0)
        r = answer_memory(machine, out, &err);
    else if (strcmp(word, "request") == 0 && !(r = machine_memory_request(machine, number, &err)))
        fprintf(out, "ok\n");
    else if (strcmp(word, "inflate") == 0 && !(r = machine_balloon_resize(machine, number, &err)))
        fprintf(out, "ok\n");
    else if (strcmp(word, "interval") == 0 && !(r = machine_balloon_set_interval(machine, (uint32_t)number, &err)))
        fprintf(out, "ok\n");
    else if (strcmp(word, "hint") == 0 && !(r = machine_balloon_hint_start(machine, number, &err)))
        fprintf(out, "ok\n");
    else if (strcmp(word, "hint-stop") == 0 && !(r = machine_balloon_hint_stop(machine, &err)))
        fprintf(out, "ok\n");
    else if (!r)
        fprintf(out, "error unknown command\n");
    if (r)
        fprintf(out, "error %s\n", err.text);
    fflush(out);
}

struct client {
    struct machine *machine;
    int fd;
};

static void *commands(void *ctx)
{
    const struct client *client = ctx;
    char line[256];
    FILE *in = fdopen(client->fd, "r"), *out = fdopen(dup(client->fd), "w");
    while (in && out && fgets(line, sizeof line, in))
        obey(client->machine, line, out);
    return NULL;
}

static int client_connect(void)
{
    const char *path = getenv("DOPPEL_CONTROL");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(address.sun_path, path ? path : "", sizeof address.sun_path - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return -1;
    return fd;
}

int main(int argc, char **argv)
{
    struct machine_config config;
    struct machine *machine;
    struct error err = {0};
    const char *from = getenv("DOPPEL_LOAD");
    char state[PATH_BYTES], memory[PATH_BYTES];
    struct snapshot_files files = files_in(from ? from : "", state, memory);
    machine_config_init(&config);
    if (from && machine_snapshot_config(&files, &config, &err))
        goto fail;
    for (int i = 2; i < argc; i++) {
        const char *key = argv[i] + 2;
        const struct option_info *option = option_find(key);
        const char *value = option && option->argument && i + 1 < argc ? argv[++i] : NULL;
        if (machine_config_set(&config, key, value, &err))
            goto fail;
    }
    if ((from ? machine_snapshot_load(&machine, &config, &files, &err) : machine_create(&machine, &config, &err)) || machine_start(machine, &err))
        goto fail;
    struct client client = {machine, client_connect()};
    pthread_t thread;
    if (client.fd < 0 || pthread_create(&thread, NULL, commands, &client)) {
        perror("control");
        return 1;
    }
    enum machine_end end = machine_wait(machine);
    shutdown(client.fd, SHUT_RDWR); /* a command that is being obeyed ends first */
    pthread_join(thread, NULL);
    if (config.stats)
        machine_stats(machine, stderr);
    machine_destroy(machine);
    return end == MACHINE_SHUTDOWN ? 0 : 1;

fail:
    fprintf(stderr, "control: %s\n", err.text);
    return 1;
}
