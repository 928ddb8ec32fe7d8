/*
 * Disks and network cards, which come and go while the machine runs: making them, changing their limits and media, plugging and unplugging (PCI hot-plug).
 *
 * Invariants: machine->disk[i] and machine->net[i] belong to own_config.disk[i] and .net[i]; a slot's number is in the configuration, so that a snapshot makes the same machine.
 * Disks are the last of the parts and cards come before them, in the configuration's order, whenever they were made: the order of sections in a snapshot.
 * What changes a list runs on the loop's thread with the device lock. A function that the guest has let go is taken away once nothing of it is in flight.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "device/virtio_blk.h"
#include "device/virtio_net.h"
#include "device/virtio_pmem.h"
#include "machine/machine_priv.h"
#include "net/net.h"

enum { RANK_NET = 1, RANK_DISK = 2 };
#define EJECT_RETRY_NS 1000000ull

/* ---- names and places ---- */

/* Of any kind when `kind` is NULL: a disk, a card and persistent memory may have one name. NULL: nothing has it. */
static struct machine_device *find_device(const struct machine *machine, const char *kind, const char *name)
{
    char its[MACHINE_DEVICE_NAME_BYTES];
    for (unsigned i = 0; i < machine->device_count; i++) {
        const char *own = machine->device[i]->kind;
        machine_device_name(machine, i, its);
        if (strcmp(its, name) == 0 && (!kind || (own && strcmp(own, kind) == 0)))
            return machine->device[i];
    }
    return NULL;
}

/* Index in the configuration; -1: no disk has that name. */
static int find_disk(const struct machine *machine, const char *name)
{
    const struct machine_device *device = find_device(machine, "block", name);
    for (unsigned i = 0; device && i < machine->own_config.disk_count; i++)
        if (machine->disk[i].device == device)
            return (int)i;
    return -1;
}

static int find_net(const struct machine *machine, const char *name)
{
    const struct machine_device *device = find_device(machine, "net", name);
    for (unsigned i = 0; device && i < machine->own_config.net_count; i++)
        if (machine->net[i] == device)
            return (int)i;
    return -1;
}

static void tell(struct machine *machine, enum machine_event event, const struct machine_device *device)
{
    char name[MACHINE_DEVICE_NAME_BYTES];
    for (unsigned i = 0; i < machine->device_count; i++)
        if (machine->device[i] == device) {
            machine_device_name(machine, i, name);
            machine_tell(machine, event, name);
        }
}

static int check_staying(const struct machine *machine, struct error *err)
{
    return machine->disks_leaving ? error_set(err, -EBUSY, "the disks are being copied to another host") : 0;
}

/* The first free one of `count` slots from `first` on, or of all that can be plugged. Without PCI it does not matter. */
static unsigned choose_slot(const struct machine *machine, unsigned first, unsigned count)
{
    if (!machine->pci)
        return 0;
    for (unsigned slot = first; slot < first + count; slot++)
        if (pci_slot_is_free(machine->pci, slot))
            return slot;
    for (unsigned slot = SLOT_NET; slot < SLOT_DISK + CONFIG_DISKS_MAX; slot++)
        if (pci_slot_is_free(machine->pci, slot))
            return slot;
    return 0;
}

/* ---- making them ---- */

/* In the sandbox threads do the I/O of what is opened late: making an io_uring would open more than files. */
static struct block_config disk_file(const struct machine *machine, const struct disk_config *disk, const char *path)
{
    return (struct block_config){.path = path, .format = disk->format, .readonly = disk->readonly, .backing = disk->backing, .io = machine->loop_started && machine->sandbox ? "threads" : NULL,
                                 .later = machine->config->incoming && !disk->readonly && !disk->fresh};
}

static int open_disk(struct machine *machine, const struct disk_config *disk, const char *path, struct block **block, struct error *err)
{
    const struct block_config file = disk_file(machine, disk, path);
    int r = block_open(block, &file, machine->loop, err);
    if (r == 0)
        machine_watch_disk(machine, disk, *block);
    return r;
}

int machine_take_over_disks(struct machine *machine, struct error *err)
{
    struct machine_config *config = &machine->own_config;
    int r = 0;
    config->incoming = false;
    for (unsigned i = 0; r == 0 && i < config->disk_count; i++) {
        const struct block_config file = disk_file(machine, &config->disk[i], config->disk[i].path);
        if (machine->disk[i].block && !file.readonly && !config->disk[i].fresh)
            r = block_take_over(machine->disk[i].block, &file, err);
    }
    for (unsigned i = 0; r == 0 && i < config->pmem_count; i++) {
        const struct block_config file = machine_pmem_file(machine, i);
        if (machine->pmem[i] && !file.readonly)
            r = block_take_over(machine->pmem[i], &file, err);
    }
    return r;
}

int machine_give_disks(struct machine *machine, bool away, struct error *err)
{
    int r = 0;
    for (unsigned i = 0; r == 0 && i < CONFIG_DISKS_MAX; i++)
        r = machine->disk[i].block ? block_give(machine->disk[i].block, away, err) : 0;
    for (unsigned i = 0; r == 0 && i < CONFIG_PMEMS_MAX; i++)
        r = machine->pmem[i] ? block_give(machine->pmem[i], away, err) : 0;
    return r;
}

/* `opened` is taken over on success; NULL: the file is opened here. */
static int create_disk(struct machine *machine, unsigned index, struct block *opened, struct error *err)
{
    struct disk_config *disk = &machine->own_config.disk[index];
    struct machine_disk *made = &machine->disk[index];
    int r = opened ? 0 : open_disk(machine, disk, disk->path, &made->block, err);
    if (r)
        return r;
    made->block = opened ? opened : made->block;
    if (!disk->slot)
        disk->slot = choose_slot(machine, SLOT_DISK, CONFIG_DISKS_MAX);
    struct virtio_blk_config config = {.block = made->block,
                                       .serial = disk->serial,
                                       .unsafe = !disk->writeback,
                                       .queues = machine->cpu_count,
                                       .limit = &disk->limit,
                                       .slot = disk->slot ? (int)disk->slot : -1};
    r = machine_make_device(machine, "virtio-blk", RANK_DISK, &config, &made->device, err);
    if (r) {
        if (!opened)
            block_close(made->block);
        *made = (struct machine_disk){0};
        return r;
    }
    made->device->kind = "block";
    made->device->id = disk->id;
    return 0;
}

/* `given`: struct net_client's. */
static int create_net(struct machine *machine, unsigned index, int *given, struct error *err)
{
    struct machine_config *config = &machine->own_config;
    struct net_card_config *card = &config->net_card[index];
    if (strcmp(config->net[index], "none") == 0)
        return 0;
    if (!card->slot)
        card->slot = choose_slot(machine, SLOT_NET, CONFIG_NETS_MAX);
    struct virtio_net_config net = {.net = config->net[index],
                                    .machine = config->kernel,
                                    .mtu = card->mtu,
                                    .index = card->slot >= SLOT_NET ? card->slot - SLOT_NET : index,
                                    .receive = &card->receive,
                                    .transmit = &card->transmit,
                                    .server = machine_metadata_server(machine, card),
                                    .given = given,
                                    .slot = card->slot ? (int)card->slot : -1};
    int r = machine_make_device(machine, "virtio-net", RANK_NET, &net, &machine->net[index], err);
    if (r)
        return r;
    machine->net[index]->kind = "net";
    machine->net[index]->id = card->id;
    return 0;
}

/* The root disk first: its name in the guest is known then. */
int machine_create_disks(struct machine *machine, struct error *err)
{
    for (int root = 1; root >= 0; root--)
        for (unsigned i = 0; i < machine->own_config.disk_count; i++) {
            int r = machine->own_config.disk[i].root == root ? create_disk(machine, i, NULL, err) : 0;
            if (r)
                return r;
        }
    return 0;
}

int machine_create_nets(struct machine *machine, struct error *err)
{
    struct machine_config *config = &machine->own_config;
    if (config->net_count == 0) {
        config->net[0] = strdup("user");
        if (!config->net[0])
            return error_set(err, -ENOMEM, "out of memory");
        config->net_count = 1;
    }
    for (unsigned i = 0; i < config->net_count; i++) {
        int r = create_net(machine, i, NULL, err);
        if (r)
            return r;
    }
    return 0;
}

/* ---- limits and media ---- */

int machine_disk_limit(struct machine *machine, const char *id, const struct bucket_config *bandwidth, const struct bucket_config *ops, struct error *err)
{
    pthread_mutex_lock(&machine->device_lock);
    int index = find_disk(machine, id), r = 0;
    if (index < 0) {
        r = error_set(err, -ENODEV, "there is no disk \"%s\"", id);
    } else {
        struct rate_limit_config *limit = &machine->own_config.disk[index].limit;
        limit->bandwidth = bandwidth ? *bandwidth : limit->bandwidth;
        limit->ops = ops ? *ops : limit->ops;
        virtio_blk_set_limit(machine->disk[index].device->device, bandwidth, ops);
    }
    pthread_mutex_unlock(&machine->device_lock);
    return r;
}

int machine_net_limit(struct machine *machine, const char *id, bool receive, const struct bucket_config *bandwidth, const struct bucket_config *ops,
                      struct error *err)
{
    pthread_mutex_lock(&machine->device_lock);
    int index = find_net(machine, id), r = 0;
    if (index < 0) {
        r = error_set(err, -ENODEV, "there is no network card \"%s\"", id);
    } else {
        struct net_card_config *card = &machine->own_config.net_card[index];
        struct rate_limit_config *limit = receive ? &card->receive : &card->transmit;
        limit->bandwidth = bandwidth ? *bandwidth : limit->bandwidth;
        limit->ops = ops ? *ops : limit->ops;
        virtio_net_set_limit(machine->net[index]->device, receive, bandwidth, ops);
    }
    pthread_mutex_unlock(&machine->device_lock);
    return r;
}

void machine_announce_nets(void *ctx)
{
    const struct machine *machine = ctx;
    for (unsigned i = 0; i < CONFIG_NETS_MAX; i++)
        if (machine->net[i])
            virtio_net_announce(machine->net[i]->device);
}

int machine_pmem_limit(struct machine *machine, const char *id, const struct bucket_config *bandwidth, const struct bucket_config *ops, struct error *err)
{
    pthread_mutex_lock(&machine->device_lock);
    struct machine_device *device = find_device(machine, "pmem", id);
    int r = -ENODEV;
    for (unsigned i = 0; device && i < machine->own_config.pmem_count; i++) {
        struct pmem_config *pmem = &machine->own_config.pmem[i];
        if (device->id != pmem->id)
            continue;
        pmem->limit.bandwidth = bandwidth ? *bandwidth : pmem->limit.bandwidth;
        pmem->limit.ops = ops ? *ops : pmem->limit.ops;
        virtio_pmem_set_limit(device->device, bandwidth, ops);
        r = 0;
    }
    pthread_mutex_unlock(&machine->device_lock);
    return r ? error_set(err, r, "there is no persistent memory \"%s\"", id) : 0;
}

/* Files are opened on the thread that asks, which a broker helps (sandbox/broker.h); the loop's opens nothing once it has begun. */
struct plug_request {
    const char *id, *text;
    struct block *block; /* opened; NULL: the same file again. Taken over when all is well */
    int fd;              /* of a network card; -1: none, or taken over */
};

/* The same file is only looked at again: it is locked by us. */
static int replace_medium(struct machine *machine, void *ctx, struct error *err)
{
    const struct plug_request *request = ctx;
    int index = find_disk(machine, request->id);
    if (index < 0)
        return error_set(err, -ENODEV, "there is no disk \"%s\"", request->id);
    struct disk_config *disk = &machine->own_config.disk[index];
    struct machine_disk *made = &machine->disk[index];
    struct block *block = request->block ? request->block : made->block;
    char *path = strdup(request->text);
    if (!path)
        return error_set(err, -ENOMEM, "out of memory");
    int r = request->block ? 0 : block_refresh(block, err);
    if (r) {
        free(path);
        return r;
    }
    virtio_blk_set_block(made->device->device, block);
    if (block != made->block)
        block_close(made->block);
    made->block = block;
    free(disk->path);
    disk->path = path;
    if (request->block) {
        free(disk->origin);
        disk->origin = NULL;
    }
    return 0;
}

static int finish_plug(struct machine *machine, int (*run)(struct machine *machine, void *ctx, struct error *err), struct plug_request *request, struct error *err)
{
    int r = machine_call_still(machine, run, request, err);
    if (r && request->block) {
        pthread_mutex_lock(&machine->device_lock);
        block_close(request->block);
        pthread_mutex_unlock(&machine->device_lock);
    }
    return r;
}

int machine_disk_replace(struct machine *machine, const char *id, const char *path, struct error *err)
{
    struct plug_request request = {.id = id, .text = path};
    pthread_mutex_lock(&machine->device_lock);
    int index = find_disk(machine, id), r = check_staying(machine, err);
    if (r == 0 && index < 0)
        r = error_set(err, -ENODEV, "there is no disk \"%s\"", id);
    else if (r == 0 && !block_holds(machine->disk[index].block, path))
        r = open_disk(machine, &machine->own_config.disk[index], path, &request.block, err);
    pthread_mutex_unlock(&machine->device_lock);
    return r ? r : finish_plug(machine, replace_medium, &request, err);
}

/* ---- plugging ---- */

static int can_plug(const struct machine *machine, struct error *err)
{
    if (machine->disks_leaving)
        return check_staying(machine, err);
    return machine->hotplug ? 0 : error_set(err, -ENOTSUP, "devices are plugged into a running machine by PCI, which this one does not have");
}

/* Frees a disk's texts and closes the gap that it leaves. */
static void drop_disk_config(struct machine *machine, unsigned index)
{
    struct machine_config *config = &machine->own_config;
    struct disk_config *disk = &config->disk[index];
    char *const texts[] = {disk->path, disk->format, disk->serial, disk->id, disk->partuuid, disk->origin};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        free(texts[i]);
    unsigned after = --config->disk_count - index;
    memmove(disk, disk + 1, after * sizeof *disk);
    memmove(&machine->disk[index], &machine->disk[index + 1], after * sizeof machine->disk[0]);
    memset(&config->disk[config->disk_count], 0, sizeof *disk);
    machine->disk[config->disk_count] = (struct machine_disk){0};
}

/* The last card's place stays, with nothing in it: none at all would mean the default one. */
static void drop_net_config(struct machine *machine, unsigned index)
{
    struct machine_config *config = &machine->own_config;
    free(config->net_card[index].id);
    config->net_card[index] = (struct net_card_config){0};
    machine->net[index] = NULL;
    if (config->net_count == 1) {
        strcpy(config->net[0], "none"); /* no specification is shorter */
        return;
    }
    free(config->net[index]);
    unsigned after = --config->net_count - index;
    memmove(&config->net[index], &config->net[index + 1], after * sizeof config->net[0]);
    memmove(&config->net_card[index], &config->net_card[index + 1], after * sizeof config->net_card[0]);
    memmove(&machine->net[index], &machine->net[index + 1], after * sizeof machine->net[0]);
    config->net[config->net_count] = NULL;
    config->net_card[config->net_count] = (struct net_card_config){0};
    machine->net[config->net_count] = NULL;
}

static int check_id(const struct machine *machine, const char *id, struct error *err)
{
    return id && find_device(machine, NULL, id) ? error_set(err, -EEXIST, "there is a device with the id \"%s\" already", id) : 0;
}

static int plug_disk(struct machine *machine, void *ctx, struct error *err)
{
    const struct plug_request *request = ctx;
    struct machine_config *config = &machine->own_config;
    unsigned index = config->disk_count;
    int r = can_plug(machine, err);
    if (r == 0)
        r = machine_config_set(config, "disk", request->text, err);
    if (r)
        return r;
    config->disk[index].root = false; /* too late to be that */
    r = check_id(machine, config->disk[index].id, err);
    if (r == 0)
        r = create_disk(machine, index, request->block, err);
    if (r) {
        drop_disk_config(machine, index);
        return r;
    }
    tell(machine, MACHINE_EVENT_DEVICE_ADDED, machine->disk[index].device);
    pci_hotplug_inserted(machine->hotplug, config->disk[index].slot);
    return 0;
}

static int plug_net(struct machine *machine, void *ctx, struct error *err)
{
    struct plug_request *request = ctx;
    struct machine_config *config = &machine->own_config;
    unsigned index = config->net_count;
    int r = can_plug(machine, err);
    if (r == 0)
        r = machine_config_set(config, "net", request->text, err);
    if (r)
        return r;
    if (strcmp(config->net[index], "none") == 0)
        r = error_set(err, -EINVAL, "no network card was named");
    else
        r = check_id(machine, config->net_card[index].id, err);
    if (r == 0)
        r = create_net(machine, index, &request->fd, err);
    if (r) {
        drop_net_config(machine, index);
        return r;
    }
    tell(machine, MACHINE_EVENT_DEVICE_ADDED, machine->net[index]);
    pci_hotplug_inserted(machine->hotplug, config->net_card[index].slot);
    return 0;
}

int machine_disk_add(struct machine *machine, const char *text, struct error *err)
{
    struct plug_request request = {.text = text};
    struct machine_config config;
    machine_config_init(&config);
    int r = can_plug(machine, err);
    if (r == 0)
        r = machine_config_set(&config, "disk", text, err);
    pthread_mutex_lock(&machine->device_lock);
    if (r == 0)
        r = open_disk(machine, &config.disk[0], config.disk[0].path, &request.block, err);
    pthread_mutex_unlock(&machine->device_lock);
    machine_config_clear(&config);
    return r ? r : finish_plug(machine, plug_disk, &request, err);
}

/* What opening needs, by the broker. */
static int acquire_card(const char *text, int *fd, struct error *err)
{
    struct machine_config config;
    machine_config_init(&config);
    int r = machine_config_set(&config, "net", text, err);
    if (r == 0)
        r = net_acquire(config.net[0], fd, err);
    machine_config_clear(&config);
    return r;
}

int machine_net_add(struct machine *machine, const char *text, struct error *err)
{
    struct plug_request request = {.text = text, .fd = -1};
    bool user = strncmp(text, "user", 4) == 0;
    int r = can_plug(machine, err);
    if (r)
        return r;
    if (machine->sandbox && user && !machine->user_network)
        return error_set(err, -EPERM, "in the sandbox user networking can only be plugged where there was some at the start; --sandbox off does without");
    if (machine->sandbox && !user && !sandbox_has_broker(machine->sandbox))
        return error_set(err, -EPERM, "in the sandbox only user networking can be plugged on this host, which has no broker for interfaces; --sandbox off does without");
    if (machine->sandbox)
        r = acquire_card(text, &request.fd, err);
    if (r == 0)
        r = machine_call_still(machine, plug_net, &request, err);
    if (request.fd >= 0)
        close(request.fd);
    return r;
}

int machine_device_remove(struct machine *machine, const char *id, struct error *err)
{
    pthread_mutex_lock(&machine->device_lock);
    int disk = find_disk(machine, id), net = disk < 0 ? find_net(machine, id) : -1;
    int r = can_plug(machine, err);
    if (r == 0 && disk < 0 && net < 0)
        r = error_set(err, -ENODEV, "there is no disk or network card \"%s\"", id);
    if (r == 0)
        pci_hotplug_leaving(machine->hotplug, disk >= 0 ? machine->own_config.disk[disk].slot : machine->own_config.net_card[net].slot);
    pthread_mutex_unlock(&machine->device_lock);
    return r;
}

bool machine_has_device(struct machine *machine, const char *id)
{
    pthread_mutex_lock(&machine->device_lock);
    bool found = find_disk(machine, id) >= 0 || find_net(machine, id) >= 0;
    pthread_mutex_unlock(&machine->device_lock);
    return found;
}

/* ---- what the guest has let go ---- */

/* True when nothing of it is in flight. */
static bool stop_device(struct machine_device *device)
{
    device->class->reset(device->device);
    return !device->class->quiesce || device->class->quiesce(device->device);
}

/* False: there is something in flight still. */
static bool eject_slot(struct machine *machine, unsigned slot)
{
    for (unsigned i = 0; i < machine->own_config.disk_count; i++) {
        struct block *block = machine->disk[i].block;
        if (machine->own_config.disk[i].slot != slot)
            continue;
        if (!stop_device(machine->disk[i].device))
            return false;
        tell(machine, MACHINE_EVENT_DEVICE_REMOVED, machine->disk[i].device);
        machine_drop_device(machine, machine->disk[i].device);
        block_close(block);
        drop_disk_config(machine, i);
        return true;
    }
    for (unsigned i = 0; i < machine->own_config.net_count; i++) {
        if (!machine->net[i] || machine->own_config.net_card[i].slot != slot)
            continue;
        if (!stop_device(machine->net[i]))
            return false;
        tell(machine, MACHINE_EVENT_DEVICE_REMOVED, machine->net[i]);
        machine_drop_device(machine, machine->net[i]);
        drop_net_config(machine, i);
        return true;
    }
    return true; /* nothing that can be unplugged is there */
}

static void eject_due(void *ctx)
{
    struct machine *machine = ctx;
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++)
        if (machine->ejecting >> slot & 1 && eject_slot(machine, slot))
            machine->ejecting &= ~(1u << slot);
    if (machine->ejecting)
        loop_timer_arm(machine->eject_timer, loop_now_ns() + EJECT_RETRY_NS);
}

static void ejected(void *ctx, uint32_t slots)
{
    struct machine *machine = ctx;
    machine->ejecting |= slots & machine_hotplug_slots();
    loop_timer_arm(machine->eject_timer, loop_now_ns());
}

uint32_t machine_hotplug_slots(void)
{
    return ((1ull << (SLOT_DISK + CONFIG_DISKS_MAX)) - 1) & ~((1u << SLOT_NET) - 1);
}

static void hotplug_reset(void *object)
{
    pci_hotplug_reset(object);
}

static int hotplug_state(void *object, struct state_io *io)
{
    return pci_hotplug_state(object, io);
}

static void hotplug_destroy(void *object)
{
    pci_hotplug_destroy(object);
}

int machine_create_hotplug(struct machine *machine)
{
    struct pci_hotplug_config config = {.bus = machine->bus, .pm = machine->pm, .eject = ejected, .ctx = machine};
    machine->eject_timer = loop_timer_create(machine->loop, eject_due, machine);
    int r = machine->eject_timer ? pci_hotplug_create(&machine->hotplug, &config) : -ENOMEM;
    if (r == 0)
        machine_add_part(machine, &(struct machine_part){.name = "pci-hotplug",
                                                         .object = machine->hotplug,
                                                         .reset = hotplug_reset,
                                                         .state = hotplug_state,
                                                         .destroy = hotplug_destroy});
    return r;
}
