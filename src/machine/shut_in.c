/*
 * The machine's sandbox: what this configuration needs of the host once it runs, put together from its parts. Threads that cannot enter it do not run, and the machine ends.
 */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "machine/machine_priv.h"
#include "sandbox/broker.h"
#include "util/log.h"

static bool uses_user_network(const struct machine_config *config)
{
    for (unsigned i = 0; i < config->net_count; i++)
        if (strncmp(config->net[i], "user", 4) == 0)
            return true;
    return config->net_count == 0;
}

/* The directory of a file that is removed at the end; "" where there is none. */
static void directory_of(const char *file, char *directory, size_t size)
{
    snprintf(directory, size, "%s", file ? file : "");
    char *slash = strrchr(directory, '/');
    if (slash)
        slash[slash == directory] = '\0';
    else if (file)
        snprintf(directory, size, ".");
}

static const char *socket_path(const char *console)
{
    return console && strncmp(console, "unix:", 5) == 0 ? console + 5 : NULL;
}

static bool enter(void *ctx, unsigned kind)
{
    return machine_enter_sandbox(ctx, kind);
}

/* SANDBOX_NET_USER and the like, once the engine is known. */
static unsigned needs(const struct machine *machine)
{
    const struct machine_config *config = machine->config;
    const char *engine = machine->engine_ops->name;
    return (uses_user_network(config) ? SANDBOX_NET_USER : 0) | (config->vsock.present ? SANDBOX_VSOCK : 0) |
           (config->direct != DIRECT_OFF && strcmp(engine, "bt") == 0 ? SANDBOX_DIRECT : 0) | (strcmp(engine, "kvm") == 0 ? SANDBOX_KVM : 0);
}

void machine_begin_sandbox(struct machine *machine)
{
    const struct machine_config *config = machine->config;
    if (config->sandbox)
        machine->sandbox_begun = sandbox_compile(needs(machine), config->sandbox_omit, config->broker >= 0);
}

int machine_make_sandbox(struct machine *machine, struct error *err)
{
    const struct machine_config *config = machine->config;
    const char *const removed[] = {config->own_directory, config->pid_file, config->api_socket, config->vsock.path, socket_path(config->console), socket_path(config->virtio_console),
                                   socket_path(config->debug_console)};
    char directory[sizeof removed / sizeof *removed][PATH_MAX];
    struct sandbox_path paths[sizeof removed / sizeof *removed + 4 + CONFIG_SHARES_MAX];
    struct sandbox_config sandbox = {.paths = paths, .broker = config->broker, .omit = config->sandbox_omit};
    if (!config->sandbox)
        return 0;
    sandbox.needs = needs(machine);
    for (unsigned i = 0; i < sizeof removed / sizeof *removed; i++) {
        directory_of(removed[i], directory[i], sizeof directory[i]);
        if (*directory[i])
            paths[sandbox.path_count++] = (struct sandbox_path){directory[i], true, IN_MAIN};
    }
    paths[sandbox.path_count++] = (struct sandbox_path){"/proc", false, IN_API}; /* statistics; what is another process's needs more than a path */
    if (config->own_directory)
        paths[sandbox.path_count++] = (struct sandbox_path){config->own_directory, true, IN_API};
    if (config->snapshots_directory)
        paths[sandbox.path_count++] = (struct sandbox_path){config->snapshots_directory, true, IN_API};
    if (uses_user_network(config)) {
        machine->user_network = true;
        sandbox.host_network = true;
        paths[sandbox.path_count++] = (struct sandbox_path){"/etc/resolv.conf", false, IN_LOOP};
    }
    for (unsigned i = 0; i < config->share_count; i++)
        paths[sandbox.path_count++] = (struct sandbox_path){config->share[i].path, !config->share[i].readonly, IN_SHARE};
    int r = sandbox_create(&machine->sandbox_begun, &sandbox, err);
    machine->sandbox = machine->sandbox_begun;
    machine->sandbox_begun = NULL;
    if (r == 0)
        loop_set_thread_enter(machine->loop, enter, machine);
    return r;
}

bool machine_enter_sandbox(struct machine *machine, unsigned kind)
{
    struct error err = {0};
    if (!machine->sandbox || sandbox_enter(machine->sandbox, kind, &err) == 0)
        return true;
    log_error("%s", err.text);
    machine_stop(machine, MACHINE_ERROR);
    return false;
}

int machine_start_broker(struct machine_config *config)
{
    if (!config->sandbox)
        return -1;
    int broker = broker_start(config->sandbox_omit);
    return config->broker = broker < 0 ? -1 : broker;
}

void machine_load_ahead(const struct machine_config *config)
{
    if (uses_user_network(config))
        net_load_ahead();
}

void machine_broker_socket(int broker, int listener)
{
    if (broker >= 0 && broker_add_socket(broker, listener))
        log_warning("sandbox: files that this socket's clients name cannot be opened later");
}

int machine_shut_in(struct machine *machine, unsigned kind, struct error *err)
{
    return machine->sandbox ? sandbox_enter(machine->sandbox, kind, err) : 0;
}

void machine_shut_in_or_stop(struct machine *machine, unsigned kind)
{
    (void)!machine_enter_sandbox(machine, kind);
}

void machine_print_sandbox_rules(void)
{
    unsigned count;
    const struct sandbox_rule *rules = sandbox_rules(&count);
    char name[SANDBOX_RULE_NAME_BYTES];
    for (unsigned n = 0; n < count; n++)
        for (unsigned kind = 1; kind < 1u << SANDBOX_KINDS; kind <<= 1)
            if (rules[n].threads & kind) {
                sandbox_rule_name(name, &rules[n], kind);
                puts(name);
            }
}
