/*
 * The machine's memory, and the devices that bring or take some of it. Files of persistent memory are opened twice: by the block layer, which locks and flushes them,
 * and for mapping.
 * Threading: making them has none; machine_memory_* from any thread, and they take the device lock.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "device/virtio_balloon.h"
#include "device/virtio_mem.h"
#include "device/virtio_pmem.h"
#include "machine/machine_priv.h"
#include "util/log.h"

struct block_config machine_pmem_file(const struct machine *machine, unsigned index)
{
    const struct pmem_config *pmem = &machine->config->pmem[index];
    return (struct block_config){.path = pmem->path, .format = "raw", .readonly = pmem->readonly, .later = machine->config->incoming && !pmem->readonly};
}

/* Whether the file system has what allocating all of a file would take: it would be filled before that fails. */
static bool has_room(int fd, uint64_t bytes)
{
    struct statfs system;
    struct stat st;
    if (fstatfs(fd, &system) || fstat(fd, &st) || !S_ISREG(st.st_mode) || !system.f_blocks)
        return true; /* allocation will tell */
    uint64_t there = (uint64_t)st.st_blocks * 512;
    return bytes <= there || (bytes - there) / (uint64_t)system.f_bsize <= system.f_bavail;
}

static int open_pmem(struct machine *machine, unsigned index, struct physmap_file *file, struct error *err)
{
    const struct pmem_config *pmem = &machine->config->pmem[index];
    const struct block_config block = machine_pmem_file(machine, index);
    int r = block_open(&machine->pmem[index], &block, machine->loop, err);
    if (r)
        return r;
    *file = (struct physmap_file){.fd = open(pmem->path, (pmem->readonly ? O_RDONLY : O_RDWR) | O_CLOEXEC),
                                  .bytes = block_size_bytes(machine->pmem[index]),
                                  .readonly = pmem->readonly};
    if (file->fd < 0)
        return error_set(err, -errno, "persistent memory %s: %s", pmem->path, strerror(errno));
    if (!file->bytes)
        return error_set(err, -EINVAL, "persistent memory %s: it is empty; give it a size: truncate -s 64M %s", pmem->path, pmem->path);
    if (file->bytes % PHYSMAP_FILE_ALIGNMENT)
        log_warning("persistent memory %s: its size is not a multiple of 2 MiB; what the guest has behind its end is lost when it ends", pmem->path);
    /* Stores cannot fail for want of room: it is taken now, where the file system can. */
    int code = pmem->readonly ? 0 : !has_room(file->fd, file->bytes) ? ENOSPC : fallocate(file->fd, 0, 0, (off_t)file->bytes) < 0 ? errno : 0;
    return code != ENOSPC && code != EDQUOT ? 0
                                            : error_set(err, -code, "persistent memory %s: the host has no room for all of its %llu MiB (%s)", pmem->path,
                                                        (unsigned long long)file->bytes >> 20, strerror(code));
}

/* On the thread that wanted it; the guest's processors stop before they have done much with what they got instead. */
static void memory_lost(void *ctx, const char *text)
{
    log_error("the guest's memory cannot be read, and the virtual machine ends: %s", text);
    machine_stop(ctx, MACHINE_ERROR);
}

int machine_create_memory(struct machine *machine, struct error *err)
{
    const struct machine_config *config = machine->config;
    struct physmap_file file[PHYSMAP_FILES_MAX];
    struct physmap_config memory = {.ram_bytes = config->memory_bytes, .file = file};
    int r = 0;
    if (config->memory_hotplug.present) {
        memory.plug_bytes = config->memory_hotplug.total_mib << 20;
        memory.block_bytes = config->memory_hotplug.block_mib << 20;
    }
    for (unsigned i = 0; r == 0 && i < config->pmem_count; i++) {
        file[i].fd = -1;
        memory.file_count++;
        r = open_pmem(machine, i, &file[i], err);
    }
    if (r == 0)
        r = physmap_create_with(&machine->memory, &memory, err);
    if (r == 0)
        physmap_on_failure(machine->memory, memory_lost, machine);
    for (unsigned i = 0; i < memory.file_count; i++)
        if (file[i].fd >= 0)
            close(file[i].fd);
    return r;
}

int machine_check_memory(const struct machine *machine, struct error *err)
{
    unsigned bits = cpuid_physical_address_bits(machine->cpuid);
    gpa_t end = physmap_end(machine->memory);
    if ((end - 1) >> bits)
        return error_set(err, -E2BIG, "memory, pluggable and persistent memory included, would end at %llu GiB, and the processor has %u address bits",
                         (unsigned long long)(end >> 30), bits);
    return 0;
}

void machine_close_pmems(struct machine *machine)
{
    for (unsigned i = 0; i < CONFIG_PMEMS_MAX; i++)
        if (machine->pmem[i])
            block_close(machine->pmem[i]);
}

static int create_balloon(struct machine *machine, struct error *err)
{
    const struct balloon_config *balloon = &machine->config->balloon;
    struct virtio_balloon_config config = {.target_pages = balloon->amount_mib << 8,
                                           .deflate_on_oom = balloon->deflate_on_oom,
                                           .hinting = balloon->hinting,
                                           .reporting = balloon->reporting,
                                           .statistics = balloon->statistics_interval_s != 0,
                                           .statistics_interval_s = balloon->statistics_interval_s,
                                           .slot = machine_spare_slot(machine)};
    return machine_add_device(machine, "virtio-balloon", &config, &machine->balloon, err);
}

static int create_pmem(struct machine *machine, unsigned index, struct error *err)
{
    struct virtio_pmem_config config = {.block = machine->pmem[index], .limit = &machine->config->pmem[index].limit, .slot = machine_spare_slot(machine)};
    config.start = physmap_file_base(machine->memory, index, &config.size_bytes);
    return machine_add_device(machine, "virtio-pmem", &config, NULL, err);
}

static int create_pluggable(struct machine *machine, struct error *err)
{
    const struct memory_hotplug_config *memory = &machine->config->memory_hotplug;
    struct virtio_mem_config config = {.start = physmap_plug_base(machine->memory),
                                       .region_bytes = memory->total_mib << 20,
                                       .block_bytes = memory->block_mib << 20,
                                       .unplug = machine_want_unplug,
                                       .ctx = machine,
                                       .slot = machine_spare_slot(machine)};
    int r = machine_add_device(machine, "virtio-mem", &config, &machine->pluggable, err);
    if (r == 0)
        machine_name_device(machine, "memory_hotplug", NULL);
    return r;
}

int machine_create_memory_devices(struct machine *machine, struct error *err)
{
    int r = machine->config->balloon.present ? create_balloon(machine, err) : 0;
    if (r == 0 && machine->config->memory_hotplug.present)
        r = create_pluggable(machine, err);
    /* Linux numbers them as it finds them, and spare slots are given from the last one down. */
    unsigned count = machine->config->pmem_count;
    for (unsigned n = 0; r == 0 && n < count; n++) {
        unsigned index = machine->pci ? count - 1 - n : n;
        r = create_pmem(machine, index, err);
        if (r == 0)
            machine_name_device(machine, "pmem", machine->config->pmem[index].id);
    }
    return r;
}

/* ---- pluggable memory at run time ---- */

void machine_unplug(struct machine *machine)
{
    bool changed = machine->pluggable && virtio_mem_unplug(machine->pluggable);
    for (unsigned i = 0; changed && i < machine->cpu_count; i++)
        machine->engine_ops->state_changed(machine->vcpu[i].vcpu);
}

int machine_memory_get(struct machine *machine, struct machine_memory *memory, struct error *err)
{
    struct virtio_mem_status status;
    if (!machine->pluggable)
        return error_set(err, -ENODEV, "the virtual machine has no memory that can be plugged");
    pthread_mutex_lock(&machine->device_lock);
    virtio_mem_status(machine->pluggable, &status);
    pthread_mutex_unlock(&machine->device_lock);
    *memory = (struct machine_memory){.plugged_mib = status.plugged_bytes >> 20, .requested_mib = status.requested_bytes >> 20};
    return 0;
}

int machine_memory_request(struct machine *machine, uint64_t mebibytes, struct error *err)
{
    const struct memory_hotplug_config *memory = &machine->config->memory_hotplug;
    if (!machine->pluggable)
        return error_set(err, -ENODEV, "the virtual machine has no memory that can be plugged");
    if (mebibytes > memory->total_mib)
        return error_set(err, -EINVAL, "%llu MiB of plugged memory are more than can be had (%llu MiB)", (unsigned long long)mebibytes,
                         (unsigned long long)memory->total_mib);
    if (mebibytes % memory->block_mib)
        return error_set(err, -EINVAL, "%llu MiB of plugged memory are no whole blocks of %llu MiB", (unsigned long long)mebibytes,
                         (unsigned long long)memory->block_mib);
    pthread_mutex_lock(&machine->device_lock);
    virtio_mem_request(machine->pluggable, mebibytes << 20);
    pthread_mutex_unlock(&machine->device_lock);
    return 0;
}
