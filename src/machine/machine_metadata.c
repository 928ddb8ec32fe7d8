/*
 * The metadata service of a machine: its own, with the data of a file, or one that whoever made the machine has, and its place in front of network cards. The data goes into
 * snapshots, and comes back from them into a service of the machine's own; who has one puts there what this machine is to know. Tokens are in none.
 */
#include <errno.h>

#include "machine/machine_priv.h"
#include "metadata/metadata.h"

static int service_state(void *object, struct state_io *io)
{
    struct machine *machine = object;
    return metadata_state(machine->metadata, !machine->config->metadata.service, io);
}

int machine_create_metadata(struct machine *machine, struct error *err)
{
    const struct metadata_config *config = &machine->config->metadata;
    if (!config->present)
        return 0;
    const char *address = config->address ? config->address : METADATA_ADDRESS_DEFAULT;
    machine->metadata = config->service ? config->service : metadata_create(0);
    if (!machine->metadata)
        return error_set(err, -ENOMEM, "out of memory");
    int r = config->path && !config->service ? metadata_load(machine->metadata, config->path, err) : 0;
    if (r)
        return error_prefix(err, "--metadata");
    machine->metadata_server = (struct net_server){
        .port = METADATA_PORT, .serve = metadata_serve, .ctx = machine->metadata, .counters = &machine->metadata_counters};
    if (!metadata_parse_address(address, machine->metadata_server.address))
        return error_set(err, -EINVAL, "metadata: %s is not an address from 169.254.1.0 to 169.254.254.255", address);
    machine_add_part(machine, &(struct machine_part){.name = "metadata", .object = machine, .state = service_state});
    metadata_set(machine->metadata, &(struct metadata_settings){.version_2 = config->version_2, .imds_compatible = config->imds_compatible});
    return 0;
}

void machine_destroy_metadata(struct machine *machine)
{
    if (machine->metadata != machine->config->metadata.service)
        metadata_destroy(machine->metadata);
    machine->metadata = NULL;
}

struct metadata *machine_metadata(struct machine *machine)
{
    return machine->metadata;
}

const struct net_server *machine_metadata_server(struct machine *machine, struct net_card_config *card)
{
    card->metadata |= machine->config->metadata.everywhere;
    return machine->metadata && card->metadata ? &machine->metadata_server : NULL;
}

void machine_count_metadata(struct machine *machine, machine_counter_fn *emit, void *ctx)
{
    struct metadata_counters requests;
    if (!machine->metadata)
        return;
    metadata_get_counters(machine->metadata, &requests);
    emit(ctx, "mmds", "rx_no_token", requests.rx_no_token);
    emit(ctx, "mmds", "rx_invalid_token", requests.rx_invalid_token);
#define NET_SERVER_COUNTER(name) emit(ctx, "mmds", #name, machine->metadata_counters.name);
    NET_SERVER_COUNTERS(NET_SERVER_COUNTER)
#undef NET_SERVER_COUNTER
}
