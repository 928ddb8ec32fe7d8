/* The balloon at run time. Threading: any thread; the device lock is taken here. */
#include <errno.h>

#include "device/virtio_balloon.h"
#include "machine/machine_priv.h"

_Static_assert(MACHINE_BALLOON_STATISTICS == VIRTIO_BALLOON_STATS, "one name a tag");

const char *const machine_balloon_statistic_names[MACHINE_BALLOON_STATISTICS] = {
    "swap_in",          "swap_out",    "major_faults",        "minor_faults",     "free_memory",   "total_memory",
    "available_memory", "disk_caches", "hugetlb_allocations", "hugetlb_failures", "oom_kill",      "alloc_stall",
    "async_scan",       "direct_scan", "async_reclaim",       "direct_reclaim",
};

static int balloon_lock(struct machine *machine, bool offered, const char *what, struct error *err)
{
    if (!machine->balloon)
        return error_set(err, -ENODEV, "the virtual machine has no balloon");
    if (!offered)
        return error_set(err, -ENODEV, "the balloon was made without %s", what);
    pthread_mutex_lock(&machine->device_lock);
    return 0;
}

int machine_balloon_get(struct machine *machine, struct machine_balloon *balloon, struct error *err)
{
    const struct balloon_config *config = &machine->config->balloon;
    struct virtio_balloon_status status;
    int r = balloon_lock(machine, true, NULL, err);
    if (r)
        return r;
    virtio_balloon_status(machine->balloon, &status);
    pthread_mutex_unlock(&machine->device_lock);
    *balloon = (struct machine_balloon){.target_pages = status.target_pages,
                                        .actual_pages = status.actual_pages,
                                        .discarded_bytes = status.discarded_bytes,
                                        .statistics_interval_s = status.statistics_interval_s,
                                        .deflate_on_oom = config->deflate_on_oom,
                                        .hinting = config->hinting,
                                        .reporting = config->reporting,
                                        .statistics = config->statistics_interval_s != 0,
                                        .host_command = status.host_command,
                                        .guest_command = status.guest_command};
    for (unsigned tag = 0; tag < MACHINE_BALLOON_STATISTICS; tag++) {
        balloon->known[tag] = status.known >> tag & 1;
        balloon->statistic[tag] = status.statistic[tag];
    }
    return 0;
}

int machine_balloon_resize(struct machine *machine, uint64_t mebibytes, struct error *err)
{
    uint64_t most = machine->config->memory_bytes >> 20;
    if (mebibytes > most)
        return error_set(err, -EINVAL, "a balloon of %llu MiB is more than the guest's memory (%llu MiB)", (unsigned long long)mebibytes,
                         (unsigned long long)most);
    int r = balloon_lock(machine, true, NULL, err);
    if (r)
        return r;
    machine->own_config.balloon.amount_mib = (uint32_t)mebibytes; /* what a snapshot's machine says it was asked for */
    virtio_balloon_resize(machine->balloon, (uint32_t)(mebibytes << 8));
    pthread_mutex_unlock(&machine->device_lock);
    return 0;
}

int machine_balloon_set_interval(struct machine *machine, uint32_t seconds, struct error *err)
{
    bool offered = machine->config->balloon.statistics_interval_s != 0;
    if (machine->balloon && offered != (seconds != 0))
        return error_set(err, -EINVAL, "statistics cannot be turned on or off while the virtual machine runs");
    int r = balloon_lock(machine, true, NULL, err);
    if (r)
        return r;
    if (offered) {
        machine->own_config.balloon.statistics_interval_s = seconds;
        virtio_balloon_set_interval(machine->balloon, seconds);
    }
    pthread_mutex_unlock(&machine->device_lock);
    return 0;
}

int machine_balloon_hint_start(struct machine *machine, bool acknowledge, struct error *err)
{
    int r = balloon_lock(machine, machine->config->balloon.hinting, "free page hinting", err);
    if (r)
        return r;
    virtio_balloon_hint(machine->balloon, acknowledge);
    pthread_mutex_unlock(&machine->device_lock);
    return 0;
}

int machine_balloon_hint_stop(struct machine *machine, struct error *err)
{
    int r = balloon_lock(machine, machine->config->balloon.hinting, "free page hinting", err);
    if (r)
        return r;
    virtio_balloon_hint_done(machine->balloon);
    pthread_mutex_unlock(&machine->device_lock);
    return 0;
}
