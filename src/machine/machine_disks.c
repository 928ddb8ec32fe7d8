/*
 * Overlays on the disks of a running machine: what the guest writes goes to new images from one moment on, and the files before stay as they are.
 *
 * Everything that opens or makes a file, or takes long, happens before, on the thread that asks. At the moment itself, with nothing in flight, all disks change or none.
 * Invariant: a disk's configuration names the file that is on top, so that what is saved with the state is what the state belongs to.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/virtio_blk.h"
#include "machine/machine_priv.h"
#include "util/log.h"
#include "util/sandbox_rules.h"

SANDBOX_ALLOW(IN_API | IN_LOOP, getcwd); /* names of disks may be relative */
SANDBOX_ALLOW(IN_API, fdatasync);

/* ---- what there is ---- */

static char *absolute(const char *path)
{
    char *whole, *directory = path[0] == '/' ? NULL : getcwd(NULL, 0);
    if (path[0] == '/')
        return strdup(path);
    if (!directory || asprintf(&whole, "%s/%s", directory, path) < 0)
        whole = NULL;
    free(directory);
    return whole;
}

void machine_disks_free(struct machine_disk_info *disks, unsigned count)
{
    for (unsigned i = 0; disks && i < count; i++) {
        char *const texts[] = {disks[i].path, disks[i].format, disks[i].origin, disks[i].id};
        for (size_t n = 0; n < sizeof texts / sizeof *texts; n++)
            free(texts[n]);
    }
    free(disks);
}

static int describe(const struct machine *machine, unsigned index, struct machine_disk_info *info)
{
    const struct disk_config *disk = &machine->config->disk[index];
    char name[MACHINE_DEVICE_NAME_BYTES] = "";
    for (unsigned i = 0; i < machine->device_count; i++)
        if (machine->device[i] == machine->disk[index].device)
            machine_device_name(machine, i, name);
    *info = (struct machine_disk_info){.path = absolute(disk->path),
                                       .format = strdup(block_format(machine->disk[index].block)),
                                       .origin = absolute(disk->origin ? disk->origin : disk->path),
                                       .id = strdup(name),
                                       .size_bytes = block_size_bytes(machine->disk[index].block)};
    return info->path && info->format && info->origin && info->id ? 0 : -ENOMEM;
}

int machine_disks(struct machine *machine, struct machine_disk_info **disks, unsigned *count, struct error *err)
{
    int r = 0;
    *count = 0;
    *disks = calloc(CONFIG_DISKS_MAX, sizeof **disks);
    if (!*disks)
        return error_set(err, -ENOMEM, "out of memory");
    pthread_mutex_lock(&machine->device_lock);
    for (unsigned i = 0; r == 0 && i < machine->config->disk_count; i++)
        if (!machine->config->disk[i].readonly)
            r = describe(machine, i, &(*disks)[(*count)++]);
    pthread_mutex_unlock(&machine->device_lock);
    if (r == 0)
        return 0;
    machine_disks_free(*disks, *count);
    *disks = NULL;
    return error_set(err, r, "out of memory");
}

void machine_disks_write_back(struct machine *machine)
{
    for (unsigned i = 0; i < CONFIG_DISKS_MAX; i++) {
        pthread_mutex_lock(&machine->device_lock);
        bool there = i < machine->config->disk_count && !machine->config->disk[i].readonly;
        int fd = there ? block_dup(machine->disk[i].block) : -1;
        pthread_mutex_unlock(&machine->device_lock);
        if (fd < 0)
            continue;
        (void)!fdatasync(fd); /* if it fails, it does so again when it matters */
        close(fd);
    }
}

/* ---- the moment ---- */

/* -ESTALE: the guest has no such disk any more. */
static int find(const struct machine *machine, const struct machine_overlay *overlay, unsigned *index, struct error *err)
{
    for (*index = 0; *index < machine->config->disk_count; ++*index) {
        const struct disk_config *disk = &machine->config->disk[*index];
        char *path = disk->readonly ? NULL : absolute(disk->path);
        bool same = path && strcmp(path, overlay->below) == 0;
        free(path);
        if (same)
            return 0;
    }
    return error_set(err, -ESTALE, "disk %s is not there any more; try again", overlay->below);
}

struct change {
    unsigned index;
    struct block *overlay;
    char *path, *format, *origin;
};

static int prepare_one(struct machine *machine, struct machine_overlay *overlay, struct change *change, struct error *err)
{
    int fd = overlay->fd, r = find(machine, overlay, &change->index, err);
    if (r)
        return r;
    change->path = strdup(overlay->path);
    change->format = strdup("qcow2");
    change->origin = strdup(machine->config->disk[change->index].origin ? machine->config->disk[change->index].origin : overlay->below);
    if (!change->path || !change->format || !change->origin)
        return error_set(err, -ENOMEM, "out of memory");
    overlay->fd = -1;
    return block_overlay(&change->overlay, machine->disk[change->index].block, overlay->path, fd, err);
}

static void take(struct machine *machine, struct change *change)
{
    struct disk_config *disk = &machine->own_config.disk[change->index];
    char **const old[] = {&disk->path, &disk->format, &disk->origin};
    char *const new[] = {change->path, change->format, change->origin};
    virtio_blk_exchange(machine->disk[change->index].device->device, change->overlay);
    machine->disk[change->index].block = change->overlay;
    for (unsigned i = 0; i < sizeof old / sizeof *old; i++) {
        free(*old[i]);
        *old[i] = new[i];
    }
    disk->backing = BLOCK_BACKING_ANY; /* the names in it are ours */
}

int machine_overlay_still(struct machine *machine, struct machine_overlay *overlays, unsigned count, struct error *err)
{
    struct change change[CONFIG_DISKS_MAX] = {0};
    int r = count > CONFIG_DISKS_MAX ? error_set(err, -E2BIG, "more than %d disks", CONFIG_DISKS_MAX) : 0;
    if (r == 0 && machine->disks_leaving)
        r = error_set(err, -EBUSY, "the disks are being copied to another host");
    unsigned prepared = 0;
    while (r == 0 && prepared < count) {
        r = prepare_one(machine, &overlays[prepared], &change[prepared], err);
        prepared++;
    }
    for (unsigned i = 0; i < prepared; i++) {
        if (r == 0) {
            take(machine, &change[i]);
            continue;
        }
        if (change[i].overlay)
            block_overlay_undo(change[i].overlay);
        free(change[i].path);
        free(change[i].format);
        free(change[i].origin);
    }
    return r;
}

void machine_overlays_close(struct machine_overlay *overlays, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        if (overlays[i].fd >= 0)
            close(overlays[i].fd);
        overlays[i].fd = -1;
    }
}

/* ---- by themselves ---- */

struct request {
    struct machine_overlay *overlays;
    unsigned count;
};

static int run(struct machine *machine, void *ctx, struct error *err)
{
    struct request *request = ctx;
    return machine_overlay_still(machine, request->overlays, request->count, err);
}

int machine_disks_overlay(struct machine *machine, struct machine_overlay *overlays, unsigned count, struct error *err)
{
    struct request request = {overlays, count};
    int r = pthread_mutex_trylock(&machine->snapshot_lock) ? error_set(err, -EBUSY, "a snapshot is being made") : 0;
    if (r == 0) {
        machine_disks_write_back(machine);
        r = machine_call_still(machine, run, &request, err);
        pthread_mutex_unlock(&machine->snapshot_lock);
    }
    machine_overlays_close(overlays, count);
    return r;
}

static int one_disk(struct machine *machine, const char *path, const struct machine_disk_info *disk, struct error *err)
{
    struct machine_overlay overlay = {.below = disk->path, .path = path, .fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600)};
    if (overlay.fd < 0)
        return error_set(err, -errno, "cannot make %s: %s", path, strerror(errno));
    int fd = overlay.fd, r = block_image_format(fd, path, disk->size_bytes, disk->path, disk->format, err);
    if (r)
        close(fd);
    else
        r = machine_disks_overlay(machine, &overlay, 1, err);
    if (r)
        unlink(path);
    return r;
}

int machine_disk_snapshot(struct machine *machine, const char *id, const char *path, struct error *err)
{
    struct machine_disk_info *disks;
    unsigned count, i = 0;
    int r = machine_disks(machine, &disks, &count, err);
    char *whole = absolute(path);
    if (r == 0 && !whole)
        r = error_set(err, -ENOMEM, "out of memory");
    while (r == 0 && i < count && strcmp(disks[i].id, id) != 0)
        i++;
    if (r == 0)
        r = i < count ? one_disk(machine, whole, &disks[i], err) : error_set(err, -ENODEV, "there is no disk \"%s\" that the guest can write", id);
    if (disks)
        machine_disks_free(disks, count);
    free(whole);
    return r;
}
