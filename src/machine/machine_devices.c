/*
 * The optional devices of a machine, made from its configuration: disks, network cards, shares, the virtio console, the entropy source, vsock. Slots are fixed by kind and
 * order, so that the same configuration gives the same machine.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device/virtio_console.h"
#include "device/virtio_fs.h"
#include "device/virtio_rng.h"
#include "device/virtio_vsock.h"
#include "machine/machine_priv.h"

static void device_reset(void *object)
{
    struct machine_device *device = object;
    device->class->reset(device->device);
}

static int device_state(void *object, struct state_io *io)
{
    struct machine_device *device = object;
    return device->class->state(device->device, io);
}

static bool device_quiesce(void *object)
{
    struct machine_device *device = object;
    return !device->class->quiesce || device->class->quiesce(device->device);
}

static void device_destroy(void *object)
{
    struct machine_device *device = object;
    device->class->destroy(device->device);
}

int machine_make_device(struct machine *machine, const char *class_name, unsigned rank, const void *config, struct machine_device **out, struct error *err)
{
    struct device_host host = {.bus = machine->bus, .pci = machine->pci, .mmio = machine->pci ? NULL : &machine->mmio, .memory = machine->memory, .loop = machine->loop};
    struct machine_device *made = calloc(1, sizeof *made);
    if (!made)
        return error_set(err, -ENOMEM, "out of memory");
    made->class = device_class_find(class_name);
    machine->device_host = host;
    int r = made->class ? made->class->create(&made->device, &machine->device_host, config, err) : error_set(err, -ENODEV, "there is no device \"%s\"", class_name);
    if (r) {
        free(made);
        return r;
    }
    made->kind = strncmp(class_name, "virtio-", 7) == 0 ? class_name + 7 : class_name;
    machine->device[machine->device_count++] = made;
    if (out)
        *out = made;
    machine_add_part(machine, &(struct machine_part){.name = class_name,
                                                     .object = made,
                                                     .reset = device_reset,
                                                     .state = device_state,
                                                     .quiesce = device_quiesce,
                                                     .destroy = device_destroy,
                                                     .rank = rank});
    return 0;
}

void machine_drop_device(struct machine *machine, struct machine_device *device)
{
    machine_remove_part(machine, device);
    device->class->destroy(device->device);
    for (unsigned i = 0; i < machine->device_count; i++)
        if (machine->device[i] == device) {
            machine->device_count--;
            memmove(&machine->device[i], &machine->device[i + 1], (machine->device_count - i) * sizeof machine->device[0]);
            break;
        }
    free(device);
}

int machine_add_device(struct machine *machine, const char *class_name, const void *config, struct device **out, struct error *err)
{
    struct machine_device *made;
    int r = machine_make_device(machine, class_name, 0, config, &made, err);
    if (r == 0 && out)
        *out = made->device;
    return r;
}

void machine_name_device(struct machine *machine, const char *kind, const char *id)
{
    struct machine_device *device = machine->device[machine->device_count - 1];
    device->kind = kind;
    device->id = id;
}

int machine_spare_slot(const struct machine *machine)
{
    int slot = PCI_SLOTS - 1;
    while (machine->pci && slot > 0 && !pci_slot_is_free(machine->pci, (unsigned)slot))
        slot--;
    return slot;
}

static int create_share(struct machine *machine, unsigned index, struct error *err)
{
    const struct share_config *share = &machine->config->share[index];
    struct virtio_fs_config config = {
        .fs = {.path = share->path,
               .readonly = share->readonly,
               .cache = share->cache,
               .writeback = share->writeback,
               .xattr = share->xattr,
               .no_capabilities = machine->config->sandbox,
               .uid = share->uid,
               .gid = share->gid},
        .tag = share->tag,
        .at_once = !machine->config->sandbox,
        .queues = machine->cpu_count,
        .slot = machine_spare_slot(machine),
    };
    return machine_add_device(machine, "virtio-fs", &config, NULL, err);
}

/* ---- virtio console ---- */

static void virtio_console_output(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct machine *machine = ctx;
    console_write(machine->virtio_console_backend, data, size_bytes);
}

static void virtio_console_ready(void *ctx)
{
    struct machine *machine = ctx;
    console_resume(machine->virtio_console_backend);
}

static size_t virtio_console_input(void *ctx, const uint8_t *data, size_t size_bytes)
{
    struct machine *machine = ctx;
    return virtio_console_receive(machine->virtio_console, data, size_bytes);
}

static int create_virtio_console(struct machine *machine, struct error *err)
{
    struct virtio_console_config config = {
        .sink = {virtio_console_output, machine}, .ready = virtio_console_ready, .ready_ctx = machine, .slot = SLOT_CONSOLE};
    return machine_add_device(machine, "virtio-console", &config, &machine->virtio_console, err);
}

int machine_open_virtio_console(struct machine *machine, struct error *err)
{
    const struct machine_config *config = machine->config;
    struct console_ops ops = {.receive = virtio_console_input, .command = machine_console_command, .ctx = machine};
    return console_open(&machine->virtio_console_backend, config->virtio_console, "--virtio-console", machine->loop, config->input_fd,
                        config->output_fd, &ops, err);
}

static int create_vsock(struct machine *machine, struct error *err)
{
    const struct vsock_config *vsock = &machine->config->vsock;
    struct virtio_vsock_config config = {.cid = vsock->cid, .path = vsock->path, .slot = SLOT_VSOCK};
    return machine_add_device(machine, "virtio-vsock", &config, NULL, err);
}

int machine_create_devices(struct machine *machine, struct error *err)
{
    struct virtio_rng_config rng = {.limit = &machine->config->entropy_limit, .slot = SLOT_RNG};
    int r = machine_add_device(machine, "virtio-rng", &rng, NULL, err);
    if (r == 0 && machine->config->virtio_console)
        r = create_virtio_console(machine, err);
    if (r == 0)
        r = machine_create_metadata(machine, err);
    if (r == 0)
        r = machine_create_nets(machine, err);
    if (r == 0)
        r = machine_create_disks(machine, err);
    if (r == 0 && machine->config->vsock.present)
        r = create_vsock(machine, err);
    for (unsigned i = 0; r == 0 && i < machine->config->share_count; i++)
        r = create_share(machine, i, err);
    if (r == 0)
        r = machine_create_memory_devices(machine, err);
    return r;
}
