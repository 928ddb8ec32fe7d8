/*
 * See guest_driver.h.
 */
#include "guest_driver.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include <string.h>

static void msi_arrived(void *ctx, uint64_t address, uint32_t data)
{
    struct guest *g = ctx;

    g->messages[data % 64]++;
}

static void intx_changed(void *ctx, unsigned pin, bool level)
{
    ((struct guest *)ctx)->intx[pin] = level;
}

static void init_machine(struct guest *g)
{
    memset(g, 0, sizeof(*g));
    g->bus = bus_create();
    assert_int_equal(physmap_create(&g->memory, GUEST_RAM_BYTES, NULL), 0);
    assert_int_equal(loop_create(&g->loop, NULL), 0);
    g->host = (struct device_host){.bus = g->bus, .memory = g->memory, .loop = g->loop};
    g->next_page = 0x10000;
}

void guest_init(struct guest *g)
{
    struct pci_host_config config = {
        .ecam_base = CHIPSET_ECAM_BASE,
        .mem32_base = CHIPSET_PCI_MEM32_BASE,
        .mem32_size_bytes = CHIPSET_PCI_MEM32_BYTES,
        .mem64_base = CHIPSET_PCI_MEM64_BASE,
        .mem64_size_bytes = CHIPSET_PCI_MEM64_BYTES,
        .port_base = CHIPSET_PCI_PORT_BASE,
        .port_size_bytes = CHIPSET_PCI_PORT_BYTES,
    };

    init_machine(g);
    g->msi = (struct msi_target){msi_arrived, g};
    config.bus = g->bus;
    config.msi = &g->msi;
    for (unsigned i = 0; i < 4; i++)
        config.intx[i] = (struct irq_line){.set = intx_changed, .ctx = g, .pin = i};
    assert_int_equal(pci_host_create(&g->pci, &config), 0);
    g->host.pci = g->pci;
}

void guest_init_mmio(struct guest *g)
{
    init_machine(g);
    g->mmio = true;
    g->mmio_host = (struct virtio_mmio_host){
        .bus = g->bus, .base = GUEST_MMIO_BASE, .places = GUEST_MMIO_PLACES, .line_count = 3, .shared_first = 2};
    for (unsigned i = 0; i < 3; i++)
        g->mmio_host.line[i] = (struct irq_line){.set = intx_changed, .ctx = g, .pin = i};
    g->host.mmio = &g->mmio_host;
}

void guest_fini(struct guest *g)
{
    loop_destroy(g->loop);
    if (!g->mmio)
        pci_host_destroy(g->pci);
    physmap_destroy(g->memory);
    bus_destroy(g->bus);
}

uint32_t guest_config_read(struct guest *g, unsigned offset, unsigned size)
{
    return (uint32_t)bus_read(g->bus, BUS_MMIO, CHIPSET_ECAM_BASE + (g->slot << 15) + offset, size);
}

void guest_config_write(struct guest *g, unsigned offset, unsigned size, uint32_t value)
{
    bus_write(g->bus, BUS_MMIO, CHIPSET_ECAM_BASE + (g->slot << 15) + offset, size, value);
}

/* Where a register of the PCI transport's common structure is among the memory-mapped ones; 0: there is none. Registers that a driver only writes read as zero there. */
static unsigned mmio_register(unsigned offset)
{
    static const uint16_t registers[] = {
        [C_DEVICE_FEATURE_SELECT] = 0x014, [C_DEVICE_FEATURE] = 0x010, [C_DRIVER_FEATURE_SELECT] = 0x024, [C_DRIVER_FEATURE] = 0x020,
        [C_STATUS] = 0x070,                [C_GENERATION] = 0x0FC,     [C_QUEUE_SELECT] = 0x030,         [C_QUEUE_SIZE] = 0x034,
        [C_QUEUE_ENABLE] = 0x044,          [C_QUEUE_DESC] = 0x080,     [C_QUEUE_DESC + 4] = 0x084,       [C_QUEUE_DRIVER] = 0x090,
        [C_QUEUE_DRIVER + 4] = 0x094,      [C_QUEUE_DEVICE] = 0x0A0,   [C_QUEUE_DEVICE + 4] = 0x0A4,     [C_QUEUE_RESET] = 0x0C0,
    };

    return offset < sizeof(registers) / sizeof(registers[0]) ? registers[offset] : 0;
}

uint64_t common_read(struct guest *g, unsigned offset, unsigned size)
{
    if (!g->mmio)
        return bus_read(g->bus, BUS_MMIO, g->common + offset, size);
    return mmio_register(offset) ? bus_read(g->bus, BUS_MMIO, g->common + mmio_register(offset), 4) : 0;
}

void common_write(struct guest *g, unsigned offset, unsigned size, uint64_t value)
{
    if (!g->mmio) {
        bus_write(g->bus, BUS_MMIO, g->common + offset, size, value);
        return;
    }
    if (!mmio_register(offset))
        return;
    if (offset == C_QUEUE_SIZE)
        bus_write(g->bus, BUS_MMIO, g->common + 0x038, 4, value); /* the largest is a register of its own */
    else
        bus_write(g->bus, BUS_MMIO, g->common + mmio_register(offset), 4, (uint32_t)value);
    if (size == 8)
        bus_write(g->bus, BUS_MMIO, g->common + mmio_register(offset + 4), 4, value >> 32);
}

static uint64_t bar_base(struct guest *g, unsigned bar)
{
    uint32_t low = guest_config_read(g, 0x10 + bar * 4, 4);
    uint64_t base = low & ~15u;

    if ((low & 6) == 4)
        base |= (uint64_t)guest_config_read(g, 0x14 + bar * 4, 4) << 32;
    return base;
}

static unsigned find_capability(struct guest *g, uint8_t id, uint8_t type)
{
    unsigned at = guest_config_read(g, 0x34, 1);

    for (unsigned i = 0; at && i < 48; i++) {
        if (guest_config_read(g, at, 1) == id && (id != 9 || guest_config_read(g, at + 3, 1) == type))
            return at;
        at = guest_config_read(g, at + 1, 1);
    }
    return 0;
}

static uint64_t structure_base(struct guest *g, uint8_t type)
{
    unsigned at = find_capability(g, 9, type);

    return at ? bar_base(g, guest_config_read(g, at + 4, 1)) + guest_config_read(g, at + 8, 4) : 0;
}

static void attach_mmio(struct guest *g)
{
    g->slot = g->mmio_host.device_count - 1;
    g->common = virtio_mmio_address(&g->mmio_host, g->slot);
    g->notify = g->common + 0x050;
    g->isr = g->common + 0x060;
    g->config = g->common + 0x100;
    g->multiplier = 0;
    assert_int_equal(bus_read(g->bus, BUS_MMIO, g->common, 4), 0x74726976);
    assert_int_equal(bus_read(g->bus, BUS_MMIO, g->common + 4, 4), 2);
}

uint8_t guest_take_isr(struct guest *g)
{
    uint8_t isr = (uint8_t)bus_read(g->bus, BUS_MMIO, g->isr, g->mmio ? 4 : 1);

    if (g->mmio)
        bus_write(g->bus, BUS_MMIO, g->common + 0x064, 4, isr);
    return isr;
}

void guest_attach(struct guest *g, unsigned slot)
{
    if (g->mmio) {
        attach_mmio(g);
        return;
    }
    g->slot = slot;
    pci_host_assign(g->pci);
    assert_int_equal(guest_config_read(g, 0, 2), 0x1AF4);
    guest_config_write(g, 4, 2, guest_config_read(g, 4, 2) | 6);
    g->common = structure_base(g, 1);
    g->notify = structure_base(g, 2);
    g->isr = structure_base(g, 3);
    g->config = structure_base(g, 4);
    g->multiplier = guest_config_read(g, find_capability(g, 9, 2) + 16, 4);
    assert_true(g->common && g->notify && g->isr && g->multiplier);
}

void guest_enable_msix(struct guest *g, unsigned vectors)
{
    unsigned at = find_capability(g, 0x11, 0);
    uint64_t table;

    assert_int_not_equal(at, 0);
    assert_true((guest_config_read(g, at + 2, 2) & 0x7FF) + 1 >= vectors);
    table = bar_base(g, guest_config_read(g, at + 4, 4) & 7);
    for (unsigned i = 0; i < vectors; i++) {
        bus_write(g->bus, BUS_MMIO, table + 16 * i, 4, 0xFEE00000);
        bus_write(g->bus, BUS_MMIO, table + 16 * i + 8, 4, i);
        bus_write(g->bus, BUS_MMIO, table + 16 * i + 12, 4, 0);
    }
    guest_config_write(g, at + 2, 2, 0x8000);
}

uint64_t guest_offered(struct guest *g)
{
    uint64_t features;

    common_write(g, C_DEVICE_FEATURE_SELECT, 4, 0);
    features = common_read(g, C_DEVICE_FEATURE, 4);
    common_write(g, C_DEVICE_FEATURE_SELECT, 4, 1);
    return features | common_read(g, C_DEVICE_FEATURE, 4) << 32;
}

bool guest_negotiate(struct guest *g, uint64_t features)
{
    g->features = features;
    common_write(g, C_STATUS, 1, STATUS_ACK);
    common_write(g, C_STATUS, 1, STATUS_ACK | STATUS_DRIVER);
    common_write(g, C_DRIVER_FEATURE_SELECT, 4, 0);
    common_write(g, C_DRIVER_FEATURE, 4, (uint32_t)features);
    common_write(g, C_DRIVER_FEATURE_SELECT, 4, 1);
    common_write(g, C_DRIVER_FEATURE, 4, (uint32_t)(features >> 32));
    common_write(g, C_STATUS, 1, STATUS_ACK | STATUS_DRIVER | STATUS_FEATURES_OK);
    return common_read(g, C_STATUS, 1) & STATUS_FEATURES_OK;
}

gpa_t guest_alloc(struct guest *g, uint64_t bytes)
{
    gpa_t gpa = g->next_page;

    bytes = (bytes + 4095) & ~4095ull;
    if (gpa + bytes > GUEST_RAM_BYTES)
        gpa = 0x10000;
    g->next_page = gpa + bytes;
    memset(guest_at(g, gpa, bytes), 0, bytes);
    return gpa;
}

void *guest_at(struct guest *g, gpa_t gpa, uint64_t bytes)
{
    void *host = physmap_get(g->memory, gpa, bytes, PHYSMAP_WRITE);

    assert_non_null(host);
    return host;
}

void guest_queue_setup(struct guest *g, unsigned index, unsigned size, unsigned vector)
{
    struct guest_queue *q = &g->queue[index];

    *q = (struct guest_queue){.guest = g, .index = index, .size = size};
    q->desc_gpa = guest_alloc(g, 16 * size);
    q->avail_gpa = guest_alloc(g, 6 + 2 * size);
    q->used_gpa = guest_alloc(g, 6 + 8 * size);
    q->desc = guest_at(g, q->desc_gpa, 16 * size);
    q->avail = guest_at(g, q->avail_gpa, 6 + 2 * size);
    q->used = guest_at(g, q->used_gpa, 6 + 8 * size);
    q->event_index = g->features & F_EVENT_IDX;
    common_write(g, C_QUEUE_SELECT, 2, index);
    assert_true(common_read(g, C_QUEUE_SIZE, 2) >= size);
    common_write(g, C_QUEUE_SIZE, 2, size);
    common_write(g, C_QUEUE_VECTOR, 2, vector);
    common_write(g, C_QUEUE_DESC, 4, (uint32_t)q->desc_gpa);
    common_write(g, C_QUEUE_DESC + 4, 4, 0);
    common_write(g, C_QUEUE_DRIVER, 8, q->avail_gpa);
    common_write(g, C_QUEUE_DEVICE, 8, q->used_gpa);
    common_write(g, C_QUEUE_ENABLE, 2, 1);
    assert_int_equal(common_read(g, C_QUEUE_ENABLE, 2), 1);
}

void guest_driver_ok(struct guest *g)
{
    common_write(g, C_STATUS, 1, STATUS_ACK | STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK);
}

void guest_start(struct guest *g, uint64_t features, unsigned queues)
{
    if (!g->mmio)
        guest_enable_msix(g, queues + 1);
    guest_device_reset(g);
    assert_true(guest_negotiate(g, features | F_VERSION_1));
    common_write(g, C_CONFIG_VECTOR, 2, 0);
    for (unsigned i = 0; i < queues; i++)
        guest_queue_setup(g, i, 64, i + 1);
    guest_driver_ok(g);
    guest_run(g);
}

void guest_device_reset(struct guest *g)
{
    common_write(g, C_STATUS, 1, 0);
    for (unsigned i = 0; common_read(g, C_STATUS, 1) != 0; i++) {
        assert_true(i < 10000);
        assert_true(loop_run_once(g->loop, 100) >= 0);
    }
}

void guest_run(struct guest *g)
{
    for (unsigned i = 0; i < 8; i++)
        assert_true(loop_run_once(g->loop, 0) >= 0);
}

void guest_publish(struct guest_queue *q, uint16_t head)
{
    uint16_t index = q->avail[1];

    q->avail[2 + index % q->size] = head;
    __atomic_store_n(&q->avail[1], index + 1, __ATOMIC_RELEASE);
}

uint16_t guest_add(struct guest_queue *q, const struct guest_buffer *buffers, unsigned count)
{
    uint16_t head = q->next_desc % q->size;
    struct guest_desc *table = q->desc;
    unsigned mask = q->size, first = head;

    if (q->indirect) {
        gpa_t gpa = guest_alloc(q->guest, 16 * count);

        table = guest_at(q->guest, gpa, 16 * count);
        q->desc[head] = (struct guest_desc){gpa, 16 * count, DESC_INDIRECT, 0};
        q->next_desc++;
        first = 0;
        mask = count;
    } else {
        q->next_desc += count;
    }
    for (unsigned i = 0; i < count; i++) {
        uint16_t flags = (buffers[i].writable ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0);

        table[(first + i) % mask] =
            (struct guest_desc){buffers[i].gpa, buffers[i].length, flags, (uint16_t)((first + i + 1) % mask)};
    }
    guest_publish(q, head);
    return head;
}

void guest_kick(struct guest_queue *q)
{
    bus_write(q->guest->bus, BUS_MMIO, q->guest->notify + q->index * q->guest->multiplier, q->guest->mmio ? 4 : 2, q->index);
}

bool guest_kick_is_wanted(const struct guest_queue *q)
{
    if (q->event_index)
        return __atomic_load_n(&q->used[2 + 4 * q->size], __ATOMIC_ACQUIRE) == (uint16_t)(q->avail[1] - 1);
    return !(__atomic_load_n(&q->used[0], __ATOMIC_ACQUIRE) & 1);
}

bool guest_has_used(struct guest_queue *q)
{
    return __atomic_load_n(&q->used[1], __ATOMIC_ACQUIRE) != q->next_used;
}

void guest_wait_used(struct guest_queue *q)
{
    for (unsigned i = 0; !guest_has_used(q); i++) {
        assert_true(i < 10000);
        assert_true(loop_run_once(q->guest->loop, 100) >= 0);
    }
}

uint32_t guest_take_used(struct guest_queue *q, uint16_t *head)
{
    const uint32_t *ring = (const uint32_t *)(q->used + 2);
    unsigned slot = q->next_used % q->size;

    assert_true(guest_has_used(q));
    if (head)
        *head = (uint16_t)ring[2 * slot];
    q->next_used++;
    if (q->event_index)
        q->avail[2 + q->size] = q->next_used; /* used_event: the next one interrupts */
    return ring[2 * slot + 1];
}
