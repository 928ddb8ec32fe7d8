/*
 * Disks for which the host has no more room: the guest's requests wait in the block layer (block.h), the machine is paused, and resuming it begins them again. Nobody can save or move such a machine,
 * because its requests are part of it; a reset and the end of the machine let them fail.
 * Threading: with the device lock.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "machine/machine_priv.h"
#include "util/log.h"

static void full(void *ctx, const char *path, int result)
{
    struct machine *machine = ctx;
    const char *slash = strrchr(path, '/');
    char why[64];
    snprintf(why, sizeof why, "disk full: %s", slash ? slash + 1 : path); /* events are short */
    if (machine_pause_now(machine, why))
        log_warning("disk %s: %s; the virtual machine is paused: make room, then resume it", path, strerror(-result));
}

void machine_watch_disk(struct machine *machine, const struct disk_config *disk, struct block *block)
{
    if (!disk->report_full && !disk->readonly)
        block_wait_when_full(block, full, machine);
}

const char *machine_full_disk(const struct machine *machine)
{
    for (unsigned i = 0; i < CONFIG_DISKS_MAX; i++)
        if (machine->disk[i].block && block_waits(machine->disk[i].block))
            return machine->own_config.disk[i].path;
    return NULL;
}

void machine_retry_disks(struct machine *machine, bool for_good)
{
    for (unsigned i = 0; i < CONFIG_DISKS_MAX; i++)
        if (machine->disk[i].block)
            block_retry(machine->disk[i].block, for_good);
}
