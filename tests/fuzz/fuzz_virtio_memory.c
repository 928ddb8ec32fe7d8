/*
 * Fuzz target: the virtio devices about memory (balloon, persistent and pluggable memory) under a hostile driver with proper rings: what is in requests is foreign.
 *
 * The input is a list of 8-byte steps {op, a, b, c}. Rings and descriptors themselves are fuzz_virtqueue's; here every chain is well-formed, so that requests get
 * through. After each step memory that was not given away must be there.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "chipset/chipset.h"
#include "device/virtio_balloon.h"
#include "device/virtio_mem.h"
#include "device/virtio_pmem.h"
#include "util/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

extern const struct device_class virtio_balloon_class, virtio_pmem_class, virtio_mem_class;

#define RAM_BYTES (1ull << 20)
#define BLOCK_BYTES (2ull << 20)
#define PLUG_BYTES (8 * BLOCK_BYTES)
#define FILE_BYTES 12288u
#define DEVICES 3u
#define QUEUES 5u
#define QUEUE_SIZE 16u
#define REQUEST_AT 0x40000ull
#define ANSWER_AT 0x50000ull

struct step {
    uint8_t op, a;
    uint16_t b;
    uint32_t c;
};

struct target {
    struct bus *bus;
    struct pci_host *pci;
    struct physmap *memory;
    struct loop *loop;
    struct msi_target msi;
    struct block *block;
    int file_fd;
    const struct device_class *class[DEVICES];
    struct device *device[DEVICES];
    uint64_t bar[DEVICES];
    bool unplug_wanted;
};

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void msi_arrived(void *ctx, uint64_t address, uint32_t message)
{
}

static void unplug(void *ctx)
{
    ((struct target *)ctx)->unplug_wanted = true;
}

static void plug(struct target *t)
{
    char path[64];
    uint64_t length;
    t->file_fd = memfd_create("pmem", MFD_CLOEXEC);
    must(t->file_fd >= 0 && ftruncate(t->file_fd, FILE_BYTES) == 0);
    snprintf(path, sizeof path, "/proc/self/fd/%d", t->file_fd);
    const struct physmap_file file = {.fd = t->file_fd, .bytes = FILE_BYTES};
    const struct physmap_config memory = {.ram_bytes = RAM_BYTES, .plug_bytes = PLUG_BYTES, .block_bytes = BLOCK_BYTES, .file = &file, .file_count = 1};
    must(physmap_create_with(&t->memory, &memory, NULL) == 0);
    must(block_open(&t->block, &(struct block_config){.path = path}, t->loop, NULL) == 0);
    const struct device_host host = {.bus = t->bus, .pci = t->pci, .memory = t->memory, .loop = t->loop};
    const struct virtio_balloon_config balloon = {.hinting = true, .reporting = true, .statistics = true, .statistics_interval_s = 1000, .slot = 1};
    const struct virtio_pmem_config pmem = {.block = t->block, .start = physmap_file_base(t->memory, 0, &length), .size_bytes = length, .slot = 2};
    const struct virtio_mem_config mem = {
        .start = physmap_plug_base(t->memory), .region_bytes = PLUG_BYTES, .block_bytes = BLOCK_BYTES, .unplug = unplug, .ctx = t, .slot = 3};
    const void *config[DEVICES] = {&balloon, &pmem, &mem};
    const struct device_class *class[DEVICES] = {&virtio_balloon_class, &virtio_pmem_class, &virtio_mem_class};
    for (unsigned n = 0; n < DEVICES; n++) {
        t->class[n] = class[n];
        must(class[n]->create(&t->device[n], &host, config[n], NULL) == 0);
    }
}

static uint64_t ecam(unsigned device, unsigned offset)
{
    return CHIPSET_ECAM_BASE + ((device + 1) << 15) + offset;
}

static gpa_t ring_base(unsigned device, unsigned queue)
{
    return 0x1000 + (device * QUEUES + queue) * 0x1000;
}

static void settle(struct target *t)
{
    for (unsigned n = 0; n < 4 || !t->class[1]->quiesce(t->device[1]); n++) {
        must(n < 100000);
        must(loop_run_once(t->loop, n < 4 ? 0 : 100) >= 0);
    }
    if (t->unplug_wanted)
        (void)virtio_mem_unplug(t->device[2]);
    t->unplug_wanted = false;
}

static void set_up(struct target *t, unsigned device, uint32_t features)
{
    uint64_t base = t->bar[device];
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 0);
    settle(t);
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 3);
    for (unsigned half = 0; half < 2; half++) {
        bus_write(t->bus, BUS_MMIO, base, 4, half);
        uint32_t offered = (uint32_t)bus_read(t->bus, BUS_MMIO, base + 4, 4);
        bus_write(t->bus, BUS_MMIO, base + 8, 4, half);
        bus_write(t->bus, BUS_MMIO, base + 12, 4, half ? offered : offered & features & 0xFF);
    }
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 0xB);
    for (unsigned queue = 0; queue < QUEUES; queue++) {
        gpa_t rings = ring_base(device, queue);
        memset(physmap_get(t->memory, rings, 4096, PHYSMAP_WRITE), 0, 4096);
        bus_write(t->bus, BUS_MMIO, base + 0x16, 2, queue);
        bus_write(t->bus, BUS_MMIO, base + 0x18, 2, QUEUE_SIZE);
        bus_write(t->bus, BUS_MMIO, base + 0x20, 8, rings);
        bus_write(t->bus, BUS_MMIO, base + 0x28, 8, rings + 0x400);
        bus_write(t->bus, BUS_MMIO, base + 0x30, 8, rings + 0x800);
        bus_write(t->bus, BUS_MMIO, base + 0x1C, 2, 1);
    }
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 0xF);
}

/* A chain of a readable and a writable buffer. The second is anywhere for the balloon, whose driver gives memory away that way. */
static void post(struct target *t, unsigned device, const struct step *s)
{
    unsigned queue = s->a >> 2 & 7;
    gpa_t rings = ring_base(device, queue % QUEUES);
    uint16_t *available = physmap_get(t->memory, rings + 0x400, 64, PHYSMAP_WRITE);
    unsigned head = available[1] % (QUEUE_SIZE / 2) * 2, first = s->b & 0x8000 ? 0 : 1, second = s->b & 0x4000 ? 0 : 1;
    const struct {
        uint64_t address;
        uint32_t length;
        uint16_t flags, next;
    } chain[2] = {
        {REQUEST_AT + (s->b & 0xF000), s->b & 0x0FFF, (uint16_t)second, (uint16_t)(head + 1)},
        {device == 0 ? (uint64_t)s->c << (s->b & 15) : ANSWER_AT, device == 0 ? s->c >> 8 : s->c & 63, 2, 0},
    };
    if (!first && !second)
        return;
    if (first)
        physmap_write(t->memory, rings + 16 * head, chain, second ? 32 : 16) == 0 ? (void)0 : abort();
    else
        physmap_write(t->memory, rings + 16 * head, &chain[1], 16) == 0 ? (void)0 : abort();
    available[2 + available[1] % QUEUE_SIZE] = (uint16_t)head;
    available[1]++;
    bus_write(t->bus, BUS_MMIO, t->bar[device] + 0x3000 + 4 * queue, 2, queue);
}

/* Requests as virtio-mem's driver makes them, with an address near its blocks. */
static void mem_request(struct target *t, const struct step *s)
{
    const struct {
        uint16_t type, padding[3];
        uint64_t address;
        uint16_t blocks, padding2[3];
    } request = {.type = s->a >> 2 & 7, .address = PHYSMAP_EXTRA_BASE + (int32_t)s->c / 16 * (uint64_t)(s->c & 1 ? 1 : 0x20000), .blocks = s->b & 15};
    if (physmap_write(t->memory, REQUEST_AT, &request, sizeof request))
        return;
    post(t, 2, &(struct step){.a = 0, .b = 24, .c = 10});
}

static void save_and_load(struct target *t, unsigned device, const struct step *s)
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t size = 0;
    settle(t);
    must(writer && t->class[device]->state(t->device[device], writer) == 0);
    const void *saved = state_writer_data(writer, &size);
    uint8_t *copy = malloc(size);
    must(copy);
    memcpy(copy, saved, size);
    if (s->a & 0x20)
        copy[s->c % size] ^= 1u << (s->b % 8);
    reader = state_reader_create(copy, s->a & 0x40 ? s->c % size : size);
    must(reader);
    (void)!t->class[device]->state(t->device[device], reader);
    state_io_destroy(reader);
    state_io_destroy(writer);
    free(copy);
}

static void our_side(struct target *t, const struct step *s)
{
    switch (s->a >> 2 & 7) {
    case 0:
        virtio_balloon_resize(t->device[0], s->c);
        break;
    case 1:
        virtio_balloon_hint(t->device[0], s->b & 1);
        break;
    case 2:
        virtio_balloon_hint_done(t->device[0]);
        break;
    case 3:
        virtio_balloon_set_interval(t->device[0], s->c);
        break;
    case 4:
        virtio_mem_request(t->device[2], s->b % 9 * BLOCK_BYTES);
        break;
    default:
        if (t->unplug_wanted)
            (void)virtio_mem_unplug(t->device[2]);
        t->unplug_wanted = false;
    }
}

static void check(struct target *t)
{
    struct virtio_mem_status status;
    uint64_t plugged = 0;
    virtio_mem_status(t->device[2], &status);
    for (gpa_t gpa = PHYSMAP_EXTRA_BASE; gpa < PHYSMAP_EXTRA_BASE + PLUG_BYTES; gpa += BLOCK_BYTES)
        plugged += physmap_get(t->memory, gpa, BLOCK_BYTES, PHYSMAP_WRITE) ? BLOCK_BYTES : 0;
    must(plugged == status.plugged_bytes && physmap_get(t->memory, 0, RAM_BYTES, PHYSMAP_WRITE));
}

static void run_step(struct target *t, const struct step *s)
{
    unsigned device = (s->a & 3) % DEVICES, size = 1u << (s->a >> 2 & 3);
    switch (s->op % 9) {
    case 0:
        set_up(t, device, s->c);
        break;
    case 1:
        (void)!physmap_write(t->memory, REQUEST_AT + s->b, &s->c, 4);
        break;
    case 2:
    case 3:
        post(t, device, s);
        break;
    case 4:
        mem_request(t, s);
        break;
    case 5:
        settle(t);
        break;
    case 6:
        our_side(t, s);
        break;
    case 7:
        save_and_load(t, device, s);
        break;
    case 8:
        bus_write(t->bus, BUS_MMIO, t->bar[device] + 0x2000 + s->b % 0x40, size, s->c);
        (void)bus_read(t->bus, BUS_MMIO, t->bar[device] + 0x2000 + s->c % 0x48, size);
        if (s->b == 77)
            t->class[device]->reset(t->device[device]);
        bus_write(t->bus, BUS_MMIO, ecam(device, 4), 2, 6);
        break;
    }
    check(t);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct target t = {0};
    struct pci_host_config config = {.ecam_base = CHIPSET_ECAM_BASE,
                                     .mem32_base = CHIPSET_PCI_MEM32_BASE,
                                     .mem32_size_bytes = CHIPSET_PCI_MEM32_BYTES,
                                     .mem64_base = CHIPSET_PCI_MEM64_BASE,
                                     .mem64_size_bytes = CHIPSET_PCI_MEM64_BYTES};
    log_set_level(LOG_ERROR);
    t.bus = config.bus = bus_create();
    t.msi = (struct msi_target){msi_arrived, &t};
    config.msi = &t.msi;
    must(t.bus && pci_host_create(&t.pci, &config) == 0 && loop_create(&t.loop, NULL) == 0);
    plug(&t);
    pci_host_assign(t.pci);
    for (unsigned n = 0; n < DEVICES; n++) {
        bus_write(t.bus, BUS_MMIO, ecam(n, 4), 2, 6);
        t.bar[n] = bus_read(t.bus, BUS_MMIO, ecam(n, 0x20), 4) & ~15ull;
        t.bar[n] |= bus_read(t.bus, BUS_MMIO, ecam(n, 0x24), 4) << 32;
        set_up(&t, n, ~0u);
    }
    for (size_t at = 0; at + sizeof(struct step) <= size && at < 2048 * sizeof(struct step); at += sizeof(struct step)) {
        struct step step;
        memcpy(&step, data + at, sizeof step);
        run_step(&t, &step);
    }
    settle(&t);
    for (unsigned n = 0; n < DEVICES; n++)
        t.class[n]->destroy(t.device[n]);
    block_close(t.block);
    close(t.file_fd);
    loop_destroy(t.loop);
    pci_host_destroy(t.pci);
    physmap_destroy(t.memory);
    bus_destroy(t.bus);
    return 0;
}
