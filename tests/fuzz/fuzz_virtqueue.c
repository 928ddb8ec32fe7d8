/*
 * Fuzz target: three virtio devices (disk, console, entropy) under a hostile driver.
 *
 * The input is a list of 8-byte steps {op, a, b, c}: register writes, ring and descriptor contents, notifications, saves and loads. Every address and length
 * in it reaches the devices unfiltered. One step sets a device up properly, so that the interesting states are not out of reach. The devices are PCI functions, and
 * memory-mapped when the input's length is odd.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "chipset/chipset.h"
#include "device/virtio_blk.h"
#include "device/virtio.h"
#include "device/virtio_console.h"
#include "device/virtio_mmio.h"
#include "device/virtio_rng.h"
#include "util/log.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

extern const struct device_class virtio_blk_class, virtio_console_class, virtio_rng_class;

#define RAM_BYTES (1ull << 20)
#define DISK_BYTES (64u << 10)
#define STEPS_MAX 4096u
#define DEVICES 3u
#define QUEUE_SIZE 16u

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
    int disk_fd;
    const struct device_class *class[DEVICES];
    struct device *device[DEVICES];
    uint64_t bar[DEVICES]; /* or window */
    bool mmio;
    struct virtio_mmio_host mmio_host;
};

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void msi_arrived(void *ctx, uint64_t address, uint32_t message)
{
}

static void console_output(void *ctx, const uint8_t *bytes, size_t size_bytes)
{
}

static void console_ready(void *ctx)
{
    struct target *t = ctx;

    (void)virtio_console_receive(t->device[1], (const uint8_t *)"input", 5);
}

static void plug(struct target *t)
{
    const struct device_host host = {.bus = t->bus, .pci = t->pci, .mmio = t->mmio ? &t->mmio_host : NULL, .memory = t->memory, .loop = t->loop};
    char path[64];
    struct error err = {0};
    const struct block_config block_config = {.path = path};
    const struct virtio_rng_config rng_config = {.slot = 3};
    const struct virtio_console_config console_config = {
        .sink = {.write = console_output}, .ready = console_ready, .ready_ctx = t, .slot = 2};
    struct virtio_blk_config blk_config = {.serial = "fuzz", .queues = 2, .slot = 1};

    t->disk_fd = memfd_create("disk", MFD_CLOEXEC);
    must(t->disk_fd >= 0 && ftruncate(t->disk_fd, DISK_BYTES) == 0);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", t->disk_fd);
    must(block_open(&t->block, &block_config, t->loop, &err) == 0);
    blk_config.block = t->block;
    t->class[0] = &virtio_blk_class;
    t->class[1] = &virtio_console_class;
    t->class[2] = &virtio_rng_class;
    must(t->class[0]->create(&t->device[0], &host, &blk_config, &err) == 0);
    must(t->class[1]->create(&t->device[1], &host, &console_config, &err) == 0);
    must(t->class[2]->create(&t->device[2], &host, &rng_config, &err) == 0);
}

static uint64_t ecam(unsigned device, unsigned offset)
{
    return CHIPSET_ECAM_BASE + ((device + 1) << 15) + offset;
}

static void find_bars(struct target *t)
{
    for (unsigned i = 0; t->mmio && i < DEVICES; i++)
        t->bar[i] = virtio_mmio_address(&t->mmio_host, i);
    if (t->mmio)
        return;
    pci_host_assign(t->pci);
    for (unsigned i = 0; i < DEVICES; i++) {
        bus_write(t->bus, BUS_MMIO, ecam(i, 4), 2, 6);
        t->bar[i] = bus_read(t->bus, BUS_MMIO, ecam(i, 0x20), 4) & ~15ull;
        t->bar[i] |= bus_read(t->bus, BUS_MMIO, ecam(i, 0x24), 4) << 32;
    }
}

static void build(struct target *t)
{
    struct pci_host_config config = {
        .ecam_base = CHIPSET_ECAM_BASE,
        .mem32_base = CHIPSET_PCI_MEM32_BASE,
        .mem32_size_bytes = CHIPSET_PCI_MEM32_BYTES,
        .mem64_base = CHIPSET_PCI_MEM64_BASE,
        .mem64_size_bytes = CHIPSET_PCI_MEM64_BYTES,
    };

    t->bus = bus_create();
    t->msi = (struct msi_target){msi_arrived, t};
    config.bus = t->bus;
    config.msi = &t->msi;
    must(t->bus && pci_host_create(&t->pci, &config) == 0 && physmap_create(&t->memory, RAM_BYTES, NULL) == 0);
    must(loop_create(&t->loop, NULL) == 0);
    t->mmio_host = (struct virtio_mmio_host){.bus = t->bus, .base = 0xD0000000, .places = DEVICES, .line_count = 2, .shared_first = 1};
    plug(t);
    find_bars(t);
}

/* Everything that was started must end, whatever the driver did. */
static void settle(struct target *t)
{
    for (unsigned i = 0; !virtio_blk_class.quiesce(t->device[0]); i++) {
        must(i < 100000);
        must(loop_run_once(t->loop, 100) >= 0);
    }
}

static void tear_down(struct target *t)
{
    settle(t);
    for (unsigned i = 0; i < DEVICES; i++)
        t->class[i]->destroy(t->device[i]);
    block_close(t->block);
    close(t->disk_fd);
    loop_destroy(t->loop);
    pci_host_destroy(t->pci);
    physmap_destroy(t->memory);
    bus_destroy(t->bus);
}

/* Where queue `queue` of a device has its rings after set_up. */
static gpa_t ring_base(unsigned device, unsigned queue)
{
    return 0x1000 + (device * 2 + queue % 2) * 0x1000;
}

static void notify(struct target *t, unsigned device, unsigned queue)
{
    bus_write(t->bus, BUS_MMIO, t->bar[device] + (t->mmio ? 0x50 : 0x3000 + 4 * queue), t->mmio ? 4 : 2, queue);
}

static void set_up_mmio(struct target *t, unsigned device, uint32_t features)
{
    static const uint16_t addresses[3] = {0x080, 0x090, 0x0A0};
    uint64_t base = t->bar[device];

    bus_write(t->bus, BUS_MMIO, base + 0x070, 4, 0);
    settle(t);
    (void)bus_read(t->bus, BUS_MMIO, base + 0x070, 4);
    bus_write(t->bus, BUS_MMIO, base + 0x070, 4, 3);
    for (unsigned half = 0; half < 2; half++) {
        bus_write(t->bus, BUS_MMIO, base + 0x014, 4, half);
        uint32_t offered = (uint32_t)bus_read(t->bus, BUS_MMIO, base + 0x010, 4);
        bus_write(t->bus, BUS_MMIO, base + 0x024, 4, half);
        bus_write(t->bus, BUS_MMIO, base + 0x020, 4, half ? offered : offered & features);
    }
    bus_write(t->bus, BUS_MMIO, base + 0x070, 4, 0xB);
    for (unsigned queue = 0; queue < 2; queue++) {
        gpa_t rings = ring_base(device, queue);

        memset(physmap_get(t->memory, rings, 4096, PHYSMAP_WRITE), 0, 4096);
        bus_write(t->bus, BUS_MMIO, base + 0x030, 4, queue);
        bus_write(t->bus, BUS_MMIO, base + 0x038, 4, QUEUE_SIZE);
        for (unsigned i = 0; i < 3; i++) {
            bus_write(t->bus, BUS_MMIO, base + addresses[i], 4, rings + 0x400 * i);
            bus_write(t->bus, BUS_MMIO, base + addresses[i] + 4, 4, 0);
        }
        bus_write(t->bus, BUS_MMIO, base + 0x044, 4, 1);
    }
    bus_write(t->bus, BUS_MMIO, base + 0x070, 4, 0xF);
}

static void set_up(struct target *t, unsigned device, uint32_t features)
{
    uint64_t base = t->bar[device];

    if (t->mmio) {
        set_up_mmio(t, device, features);
        return;
    }

    bus_write(t->bus, BUS_MMIO, ecam(device, 4), 2, 6);
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 0);
    settle(t);
    (void)bus_read(t->bus, BUS_MMIO, base + 0x14, 1);
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 3);
    for (unsigned half = 0; half < 2; half++) {
        bus_write(t->bus, BUS_MMIO, base, 4, half);
        uint32_t offered = (uint32_t)bus_read(t->bus, BUS_MMIO, base + 4, 4);
        bus_write(t->bus, BUS_MMIO, base + 8, 4, half);
        bus_write(t->bus, BUS_MMIO, base + 12, 4, half ? offered : offered & features);
    }
    bus_write(t->bus, BUS_MMIO, base + 0x14, 1, 0xB);
    for (unsigned queue = 0; queue < 2; queue++) {
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

static void poke(struct target *t, gpa_t gpa, const void *bytes, unsigned count)
{
    (void)!physmap_write(t->memory, gpa, bytes, count);
}

static void put_descriptor(struct target *t, unsigned device, const struct step *s)
{
    struct {
        uint64_t address;
        uint32_t length;
        uint16_t flags, next;
    } descriptor = {
        .address = s->c >> 12,
        .length = s->c & 0xFFF,
        .flags = s->a >> 2 & 7,
        .next = s->b >> 4 & 0x1F,
    };

    if (s->b & 0x8000)
        descriptor.address |= (uint64_t)s->c << 32;
    if (s->b & 0x4000)
        descriptor.length <<= s->c & 31;
    poke(t, ring_base(device, s->a >> 5) + 16 * (s->b & 0xF), &descriptor, sizeof(descriptor));
}

static void publish(struct target *t, unsigned device, const struct step *s)
{
    uint16_t *available = physmap_get(t->memory, ring_base(device, s->a >> 5) + 0x400, 64, PHYSMAP_WRITE);

    available[2 + available[1] % QUEUE_SIZE] = s->b & 0x1F;
    available[1]++;
    if (s->c % 16 == 0)
        available[2 + QUEUE_SIZE] = (uint16_t)(s->c >> 16); /* used_event */
    if (s->c % 64 == 1)
        available[1] += s->c >> 16;
}

/* A disk request in good form: header, data, status. Sector, length and type may still be wrong. */
static void post_request(struct target *t, const struct step *s)
{
    static const uint8_t types[8] = {0, 1, 4, 8, 11, 13, 0, 1};
    const gpa_t at = 0x10000 + (s->a & 0xFC) * 0x100ull;
    const gpa_t rings = ring_base(0, s->a & 1);
    const uint32_t header[4] = {types[s->c & 7], 0, s->b, 0}, segment[4] = {s->b & 0xFF, 0, s->c >> 20 & 0xFF, s->c >> 3 & 1};
    const bool writable = header[0] == 0 || header[0] == 8;
    const bool segments = header[0] == 11 || header[0] == 13;
    const struct {
        uint64_t address;
        uint32_t length;
        uint16_t flags, next;
    } chain[3] = {
        {at, 16, 1, 1},
        {at + 0x200, segments ? 16 * (s->c >> 4 & 3) : (s->c >> 4 & 0xF) * 512, writable ? 3 : 1, 2},
        {at + 0x100, 1, 2, 0},
    };
    const struct step head = {.a = (uint8_t)(s->a << 5), .c = 2};

    poke(t, at, header, sizeof(header));
    if (segments)
        poke(t, at + 0x200, segment, sizeof(segment));
    poke(t, rings, chain, sizeof(chain));
    publish(t, 0, &head);
    notify(t, 0, s->a & 1);
    must(loop_run_once(t->loop, 0) >= 0);
}

static void save_and_load(struct target *t, unsigned device, const struct step *s)
{
    struct state_io *writer = state_writer_create(), *reader;
    size_t size = 0;
    const void *saved;
    uint8_t *copy;

    settle(t);
    must(writer && t->class[device]->state(t->device[device], writer) == 0);
    saved = state_writer_data(writer, &size);
    copy = malloc(size);
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

static void read_everything(struct target *t, unsigned device, const struct step *s)
{
    unsigned size = 1u << (s->a >> 2 & 3);

    (void)bus_read(t->bus, BUS_MMIO, t->bar[device] + s->b % 0x4000, size);
    (void)bus_read(t->bus, BUS_MMIO, t->bar[device] + s->c % 0x40, size);
    (void)bus_read(t->bus, BUS_MMIO, t->bar[device] + 0x1000, 1);
    (void)bus_read(t->bus, BUS_MMIO, ecam(device, (s->b & 0xFF) & ~(size - 1)), size > 4 ? 4 : size);
}

static void run_step(struct target *t, const struct step *s)
{
    unsigned device = (s->a & 3) % DEVICES, size = 1u << (s->a >> 2 & 3);
    uint32_t header[4] = {s->c % 16, 0, s->b, s->c & 0x10000 ? s->c : 0};

    switch (s->op % 15) {
    case 0:
        if (t->mmio)
            bus_write(t->bus, BUS_MMIO, t->bar[device] + s->b % 0x44 * 4 + (s->b >> 13 == 0), s->b >> 12 & 1 ? size : 4, s->c);
        else
            bus_write(t->bus, BUS_MMIO, t->bar[device] + s->b % 0x40, size, s->c);
        break;
    case 1: /* not the BARs nor the command register: set_up mends the latter only */
        if (s->b % 256 >= 0x28 || s->b % 256 == 4)
            bus_write(t->bus, BUS_MMIO, ecam(device, s->b % 256), size > 4 ? 4 : size, s->c);
        break;
    case 2:
        bus_write(t->bus, BUS_MMIO, t->bar[device] + 0x3000 + s->b % 0x100, 2, s->c);
        break;
    case 3:
        for (unsigned i = 0; i < 4; i++)
            must(loop_run_once(t->loop, 0) >= 0);
        break;
    case 4:
        poke(t, s->b * 4ull, &s->c, 4);
        break;
    case 5:
    case 6:
        put_descriptor(t, device, s);
        break;
    case 7:
    case 8:
        publish(t, device, s);
        notify(t, device, s->a >> 5 & 1);
        break;
    case 9:
        set_up(t, device, s->c);
        break;
    case 10:
        read_everything(t, device, s);
        break;
    case 11:
        bus_write(t->bus, BUS_MMIO, t->bar[device] + (t->mmio ? 0x100 : 0x2000) + s->b % 0x100, size, s->c);
        virtio_console_resize(t->device[1], s->b, (uint16_t)s->c);
        (void)virtio_console_receive(t->device[1], (const uint8_t *)s, sizeof(*s));
        break;
    case 12:
        save_and_load(t, device, s);
        break;
    case 13: /* a disk request's header */
        poke(t, s->a * 16ull, header, sizeof(header));
        break;
    case 14:
        post_request(t, s);
        break;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct target target = {.mmio = size % 2};

    log_set_level(LOG_ERROR);
    build(&target);
    for (size_t i = 0; i < STEPS_MAX && size - i * sizeof(struct step) >= sizeof(struct step); i++) {
        struct step step;

        memcpy(&step, data + i * sizeof(step), sizeof(step));
        run_step(&target, &step);
        if ((i + 1) * sizeof(step) >= size)
            break;
    }
    tear_down(&target);
    return 0;
}
