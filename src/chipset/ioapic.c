/*
 * The I/O APIC. Intel 82093AA data sheet, chapter 3; version 0x20 adds the EOI register at offset 0x40.
 *
 * A rising pin (edge entries) or a high one (level entries) is sent as a message when its entry is not masked; an edge on a masked pin is
 * lost. For level entries "remote IRR" blocks the next message until a processor's EOI comes back, broadcast or directed through the EOI
 * register. Polarity is kept but ignored: pins are told "asserted", not volts. Threading: with the device lock held.
 */
#include "chipset/ioapic.h"

#include <errno.h>
#include <stdlib.h>

#include "chipset/chipset.h"

#define PINS CHIPSET_IOAPIC_PINS
#define WINDOW_BYTES 0x1000

#define OFFSET_IOREGSEL 0x00
#define OFFSET_IOWIN 0x10
#define OFFSET_EOI 0x40

#define REG_ID 0x00
#define REG_VERSION 0x01
#define REG_ARBITRATION 0x02
#define REG_REDIRECTION 0x10

#define VERSION_VALUE (0x20u | (PINS - 1) << 16)

/* Redirection entry, 3.2.4. */
#define RTE_VECTOR 0xffull
#define RTE_DELIVERY_SHIFT 8
#define RTE_LOGICAL (1ull << 11)
#define RTE_REMOTE_IRR (1ull << 14)
#define RTE_LEVEL (1ull << 15)
#define RTE_MASKED (1ull << 16)
#define RTE_DESTINATION_SHIFT 56
#define RTE_WRITABLE 0xff0000000001afffull /* all that exists but delivery status (12) and remote IRR (14) */

#define DELIVERY_FIXED 0
#define DELIVERY_LOWEST 1

struct ioapic {
    struct bus *bus;
    struct msi_target msi;
    void (*level_pin)(void *ctx, unsigned pin, uint64_t address, uint32_t data);
    void *level_ctx;
    uint8_t select;
    uint32_t id;    /* bits 27:24 */
    uint32_t level; /* one bit a pin: asserted now */
    uint64_t rte[PINS];
};

static uint64_t entry_address(uint64_t rte)
{
    return 0xFEE00000ull | (rte >> RTE_DESTINATION_SHIFT) << 12 | ((rte & RTE_LOGICAL) ? 1u << 2 : 0);
}

static uint32_t entry_data(uint64_t rte)
{
    return (uint32_t)(rte & 0x7ff) | 1u << 14 | (uint32_t)(rte & RTE_LEVEL);
}

static void entry_send(const struct ioapic *ioapic, uint64_t rte)
{
    msi_send(&ioapic->msi, entry_address(rte), entry_data(rte));
}

/* Level mode means something for vectored interrupts only; NMI, INIT and ExtINT are edges whatever the entry says (3.2.4). */
static bool entry_is_level(uint64_t rte)
{
    unsigned mode = rte >> RTE_DELIVERY_SHIFT & 7;
    return (rte & RTE_LEVEL) && (mode == DELIVERY_FIXED || mode == DELIVERY_LOWEST);
}

/* A masked pin's interrupt may still be in service. */
static void entry_tell(const struct ioapic *ioapic, unsigned pin)
{
    uint64_t rte = ioapic->rte[pin];
    if (ioapic->level_pin)
        ioapic->level_pin(ioapic->level_ctx, pin, entry_is_level(rte) ? entry_address(rte) : 0, entry_is_level(rte) ? entry_data(rte) : 0);
}

/* A level entry whose pin is high and which waits for no EOI speaks. */
static void pin_service_level(struct ioapic *ioapic, unsigned pin)
{
    uint64_t rte = ioapic->rte[pin];
    if ((rte & (RTE_MASKED | RTE_REMOTE_IRR)) || !entry_is_level(rte) || !(ioapic->level >> pin & 1))
        return;
    ioapic->rte[pin] |= RTE_REMOTE_IRR;
    entry_send(ioapic, rte);
}

void ioapic_set_pin(void *ctx, unsigned pin, bool level)
{
    struct ioapic *ioapic = ctx;
    if (pin >= PINS)
        return;
    uint32_t bit = 1u << pin;
    bool rising = level && !(ioapic->level & bit);
    ioapic->level = level ? ioapic->level | bit : ioapic->level & ~bit;

    uint64_t rte = ioapic->rte[pin];
    if (entry_is_level(rte))
        pin_service_level(ioapic, pin);
    else if (rising && !(rte & RTE_MASKED))
        entry_send(ioapic, rte & ~RTE_LEVEL);
}

void ioapic_eoi(struct ioapic *ioapic, uint8_t vector)
{
    for (unsigned pin = 0; pin < PINS; pin++) {
        uint64_t rte = ioapic->rte[pin];
        if ((rte & RTE_VECTOR) != vector || !(rte & RTE_REMOTE_IRR))
            continue;
        ioapic->rte[pin] &= ~RTE_REMOTE_IRR;
        pin_service_level(ioapic, pin);
    }
}

void ioapic_end_unserved(struct ioapic *ioapic, bool (*served)(void *ctx, uint8_t vector), void *ctx)
{
    for (unsigned pin = 0; pin < PINS; pin++) {
        uint8_t vector = ioapic->rte[pin] & RTE_VECTOR;
        if ((ioapic->rte[pin] & RTE_REMOTE_IRR) && !served(ctx, vector))
            ioapic_eoi(ioapic, vector);
    }
}

/* ---- Registers ---- */

static void entry_write(struct ioapic *ioapic, unsigned pin, bool high, uint32_t value)
{
    uint64_t old = ioapic->rte[pin];
    uint64_t wanted = high ? (old & 0xffffffffu) | (uint64_t)value << 32 : (old & ~0xffffffffull) | value;
    uint64_t rte = (wanted & RTE_WRITABLE) | (old & RTE_REMOTE_IRR);
    /* Switching an entry to edge drops its remote IRR: systems use that as a poor man's EOI. */
    if (!entry_is_level(rte))
        rte &= ~RTE_REMOTE_IRR;
    ioapic->rte[pin] = rte;
    entry_tell(ioapic, pin);
    pin_service_level(ioapic, pin);
}

static uint32_t register_read(const struct ioapic *ioapic)
{
    switch (ioapic->select) {
    case REG_ID:
    case REG_ARBITRATION:
        return ioapic->id;
    case REG_VERSION:
        return VERSION_VALUE;
    case REG_REDIRECTION ... REG_REDIRECTION + 2 * PINS - 1: {
        uint64_t rte = ioapic->rte[(ioapic->select - REG_REDIRECTION) / 2];
        return (uint32_t)((ioapic->select & 1) ? rte >> 32 : rte);
    }
    default:
        return 0;
    }
}

static void register_write(struct ioapic *ioapic, uint32_t value)
{
    switch (ioapic->select) {
    case REG_ID:
        ioapic->id = value & 0x0f000000;
        break;
    case REG_REDIRECTION ... REG_REDIRECTION + 2 * PINS - 1:
        entry_write(ioapic, (ioapic->select - REG_REDIRECTION) / 2, ioapic->select & 1, value);
        break;
    }
}

static uint64_t window_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct ioapic *ioapic = ctx;
    uint32_t value = 0;
    if ((offset & ~3ull) == OFFSET_IOREGSEL)
        value = ioapic->select;
    else if ((offset & ~3ull) == OFFSET_IOWIN)
        value = register_read(ioapic);
    return value >> (offset & 3) * 8;
}

/* The select register takes a byte; the others whole double words only. */
static void window_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct ioapic *ioapic = ctx;
    if (offset == OFFSET_IOREGSEL)
        ioapic->select = (uint8_t)value;
    else if (offset == OFFSET_IOWIN && size_bytes == 4)
        register_write(ioapic, (uint32_t)value);
    else if (offset == OFFSET_EOI)
        ioapic_eoi(ioapic, (uint8_t)value);
}

static const struct region_ops window_ops = {
    .name = "ioapic",
    .read = window_read,
    .write = window_write,
    .size_min = 1,
    .size_max = 4,
};

/* ---- Life ---- */

void ioapic_reset(struct ioapic *ioapic)
{
    ioapic->select = 0;
    ioapic->id = 0;
    for (unsigned pin = 0; pin < PINS; pin++)
        ioapic->rte[pin] = RTE_MASKED;
    for (unsigned pin = 0; pin < PINS; pin++)
        entry_tell(ioapic, pin);
}

int ioapic_create(struct ioapic **out, const struct ioapic_config *config)
{
    *out = NULL;
    struct ioapic *ioapic = calloc(1, sizeof(*ioapic));
    if (!ioapic)
        return -ENOMEM;
    ioapic->bus = config->bus;
    ioapic->msi = config->msi;
    ioapic->level_pin = config->level_pin;
    ioapic->level_ctx = config->level_ctx;
    ioapic_reset(ioapic);
    int rc = bus_add(ioapic->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE, WINDOW_BYTES, &window_ops, ioapic);
    if (rc < 0) {
        free(ioapic);
        return rc;
    }
    *out = ioapic;
    return 0;
}

void ioapic_destroy(struct ioapic *ioapic)
{
    if (!ioapic)
        return;
    bus_remove(ioapic->bus, BUS_MMIO, CHIPSET_IOAPIC_BASE, ioapic);
    free(ioapic);
}

int ioapic_state(struct ioapic *ioapic, struct state_io *io)
{
    const uint32_t all_pins = (1u << PINS) - 1;
    state_begin(io, "ioapic", 1);
    state_u8(io, &ioapic->select);
    state_u32(io, &ioapic->id);
    state_u32(io, &ioapic->level);
    bool fits = !(ioapic->id & ~0x0f000000u) && !(ioapic->level & ~all_pins);
    for (unsigned pin = 0; pin < PINS; pin++) {
        state_u64(io, &ioapic->rte[pin]);
        fits = fits && !(ioapic->rte[pin] & ~(RTE_WRITABLE | RTE_REMOTE_IRR));
    }
    if (state_loading(io) && !fits)
        state_fail(io, "reserved bits set");
    int rc = state_end(io);
    if (rc < 0 && state_loading(io)) {
        ioapic->level = 0;
        ioapic_reset(ioapic);
    }
    for (unsigned pin = 0; state_loading(io) && pin < PINS; pin++)
        entry_tell(ioapic, pin);
    return rc;
}

void ioapic_dump(const struct ioapic *ioapic, FILE *out)
{
    fprintf(out, "ioapic: id %u level %06x\n", ioapic->id >> 24, ioapic->level);
    for (unsigned pin = 0; pin < PINS; pin++) {
        uint64_t rte = ioapic->rte[pin];
        if (rte & RTE_MASKED)
            continue;
        fprintf(out, "  pin %2u: vector %02x mode %u %s %s destination %02x%s\n", pin, (unsigned)(rte & RTE_VECTOR),
                (unsigned)(rte >> RTE_DELIVERY_SHIFT & 7), (rte & RTE_LEVEL) ? "level" : "edge",
                (rte & RTE_LOGICAL) ? "logical" : "physical", (unsigned)(rte >> RTE_DESTINATION_SHIFT),
                (rte & RTE_REMOTE_IRR) ? " remote-irr" : "");
    }
}
