/*
 * A configuration inside a snapshot: what it takes to make the same machine again. What is the host's affair (where counters, traces and the
 * process id go, descriptors) is not saved. Loaded values are checked like a user's; paths are taken as they are, and opening them is the caller's decision.
 */
#include <string.h>

#include "device/virtio_vsock.h"
#include "machine/config.h"

static void choice_state(struct state_io *io, unsigned *value, unsigned count)
{
    uint32_t number = *value;
    state_u32(io, &number);
    if (state_loading(io) && number >= count)
        state_fail(io, "a choice that there is not");
    *value = number < count ? number : 0;
}

static void count_state(struct state_io *io, unsigned *count, unsigned most)
{
    uint32_t number = *count;
    state_u32(io, &number);
    if (number > most)
        state_fail(io, "more devices of a kind than there can be");
    *count = state_failed(io) && state_loading(io) ? 0 : number;
}

static void bucket_state(struct state_io *io, struct bucket_config *bucket)
{
    state_u64(io, &bucket->size);
    state_u64(io, &bucket->one_time_burst);
    state_u64(io, &bucket->refill_ms);
}

static void limit_state(struct state_io *io, struct rate_limit_config *limit)
{
    bucket_state(io, &limit->bandwidth);
    bucket_state(io, &limit->ops);
}

static void slot_state(struct state_io *io, unsigned *slot)
{
    uint32_t number = *slot;
    state_u32(io, &number);
    if (state_loading(io) && number >= 32)
        state_fail(io, "a PCI slot that there is not");
    *slot = number;
}

static void disks_state(struct machine_config *config, struct state_io *io)
{
    count_state(io, &config->disk_count, CONFIG_DISKS_MAX);
    for (unsigned i = 0; i < config->disk_count; i++) {
        struct disk_config *disk = &config->disk[i];
        char **const texts[] = {&disk->path, &disk->format, &disk->serial, &disk->id, &disk->partuuid};
        bool *const flags[] = {&disk->readonly, &disk->root, &disk->writeback};
        for (unsigned n = 0; n < sizeof texts / sizeof *texts; n++)
            state_string(io, texts[n]);
        for (unsigned n = 0; n < sizeof flags / sizeof *flags; n++)
            state_bool(io, flags[n]);
        slot_state(io, &disk->slot);
        limit_state(io, &disk->limit);
        if (state_loading(io) && !disk->path)
            state_fail(io, "a disk without a file");
    }
}

/* What was added to disks later. */
static void disk_files_state(struct machine_config *config, struct state_io *io)
{
    if (!state_begin_optional(io, "disk-files", 1))
        return;
    for (unsigned i = 0; i < config->disk_count; i++) {
        unsigned backing = config->disk[i].backing;
        choice_state(io, &backing, BLOCK_BACKING_NONE + 1);
        state_string(io, &config->disk[i].origin);
        config->disk[i].backing = (enum block_backing)backing;
    }
    (void)!state_end(io); /* the section around it fails, too */
}

/* Likewise. */
static void disk_errors_state(struct machine_config *config, struct state_io *io)
{
    if (!state_begin_optional(io, "disk-errors", 1))
        return;
    for (unsigned i = 0; i < config->disk_count; i++)
        state_bool(io, &config->disk[i].report_full);
    (void)!state_end(io);
}

static void nets_state(struct machine_config *config, struct state_io *io)
{
    count_state(io, &config->net_count, CONFIG_NETS_MAX);
    for (unsigned i = 0; i < config->net_count; i++) {
        struct net_card_config *card = &config->net_card[i];
        uint32_t mtu = card->mtu;
        state_string(io, &config->net[i]);
        state_string(io, &card->id);
        limit_state(io, &card->receive);
        limit_state(io, &card->transmit);
        slot_state(io, &card->slot);
        state_u32(io, &mtu);
        state_bool(io, &card->metadata);
        card->mtu = mtu;
        if (state_loading(io) && (!config->net[i] || mtu > 65535))
            state_fail(io, "a network card that there cannot be");
    }
}

static void files_state(struct machine_config *config, struct state_io *io)
{
    count_state(io, &config->pmem_count, CONFIG_PMEMS_MAX);
    for (unsigned i = 0; i < config->pmem_count; i++) {
        state_string(io, &config->pmem[i].id);
        state_string(io, &config->pmem[i].path);
        state_bool(io, &config->pmem[i].root);
        state_bool(io, &config->pmem[i].readonly);
        limit_state(io, &config->pmem[i].limit);
    }
    count_state(io, &config->share_count, CONFIG_SHARES_MAX);
    for (unsigned i = 0; i < config->share_count; i++) {
        state_string(io, &config->share[i].path);
        state_string(io, &config->share[i].tag);
        state_bool(io, &config->share[i].readonly);
        unsigned cache = config->share[i].cache;
        choice_state(io, &cache, FS_CACHE_ALWAYS + 1);
        config->share[i].cache = (enum fs_cache)cache;
        state_bool(io, &config->share[i].writeback);
        state_bool(io, &config->share[i].xattr);
        state_i64(io, &config->share[i].uid);
        state_i64(io, &config->share[i].gid);
        if (state_loading(io) && (!config->share[i].path || !config->share[i].tag))
            state_fail(io, "a share without a directory or a tag");
    }
}

static void others_state(struct machine_config *config, struct state_io *io)
{
    struct vsock_config *vsock = &config->vsock;
    state_bool(io, &vsock->present);
    state_u32(io, &vsock->cid);
    state_string(io, &vsock->path);
    if (state_loading(io) && vsock->present &&
        (!vsock->path || strlen(vsock->path) > VIRTIO_VSOCK_PATH_MAX || vsock->cid < VIRTIO_VSOCK_CID_MIN || vsock->cid > VIRTIO_VSOCK_CID_MAX))
        state_fail(io, "a vsock device that there cannot be");

    struct balloon_config *balloon = &config->balloon;
    bool *const flags[] = {&balloon->present, &balloon->deflate_on_oom, &balloon->hinting, &balloon->reporting};
    for (unsigned n = 0; n < sizeof flags / sizeof *flags; n++)
        state_bool(io, flags[n]);
    state_u32(io, &balloon->amount_mib);
    state_u32(io, &balloon->statistics_interval_s);

    struct memory_hotplug_config *hotplug = &config->memory_hotplug;
    state_bool(io, &hotplug->present);
    state_u64(io, &hotplug->total_mib);
    state_u64(io, &hotplug->slot_mib);
    state_u64(io, &hotplug->block_mib);

    struct metadata_config *metadata = &config->metadata;
    state_bool(io, &metadata->present);
    state_bool(io, &metadata->version_2);
    state_bool(io, &metadata->imds_compatible);
    state_string(io, &metadata->address);

    limit_state(io, &config->entropy_limit);
    bucket_state(io, &config->serial_limit);
}

int machine_config_state(struct machine_config *config, struct state_io *io)
{
    uint32_t cpus = config->cpus;
    unsigned on_reset = config->on_reset, on_panic = config->on_panic, direct = config->direct, transport = config->transport;
    state_begin(io, "config", 1);
    char **const texts[] = {&config->kernel, &config->initrd, &config->append, &config->engine,
                            &config->console, &config->virtio_console, &config->debug_console};
    for (unsigned n = 0; n < sizeof texts / sizeof *texts; n++)
        state_string(io, texts[n]);
    state_u64(io, &config->memory_bytes);
    state_u32(io, &cpus);
    state_bool(io, &config->boot_in_guest);
    choice_state(io, &on_reset, ON_RESET_EXIT + 1);
    choice_state(io, &on_panic, ON_PANIC_IGNORE + 1);
    choice_state(io, &direct, DIRECT_ALWAYS + 1);
    choice_state(io, &transport, TRANSPORT_MMIO + 1);
    disks_state(config, io);
    nets_state(config, io);
    files_state(config, io);
    others_state(config, io);
    disk_files_state(config, io);
    disk_errors_state(config, io);
    if (state_loading(io)) {
        if (cpus < 1 || cpus > CONFIG_CPUS_MAX || config->memory_bytes < CONFIG_MEMORY_MIN_BYTES || config->memory_bytes > CONFIG_MEMORY_MAX_BYTES ||
            config->memory_bytes % 4096)
            state_fail(io, "memory or processors that there cannot be");
        config->cpus = cpus;
        config->on_reset = (enum on_reset)on_reset;
        config->on_panic = (enum on_panic)on_panic;
        config->direct = (enum engine_direct)direct;
        config->transport = (enum virtio_transport)transport;
    }
    return state_end(io);
}
