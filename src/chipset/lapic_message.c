/*
 * Messages between local APICs: interprocessor interrupts and MSIs, their destinations and what they do on arrival.
 * SDM vol. 3, 11.6 (IPIs, destinations), 11.11 (MSI), 11.12.10 (x2APIC logical ids).
 *
 * A sender holds no lock while it delivers; each target is locked for the moment of acceptance only.
 */
#include "chipset/lapic_priv.h"
#include "util/log.h"

#define ICR_LOGICAL (1u << 11)
#define ICR_ASSERT (1u << 14)
#define ICR_LEVEL (1u << 15)

enum shorthand { SHORTHAND_NONE, SHORTHAND_SELF, SHORTHAND_ALL, SHORTHAND_OTHERS };

#define MSI_ADDRESS_MASK 0xfffffffffff00000ull
#define MSI_LOGICAL (1u << 2)
#define MSI_REDIRECTION_HINT (1u << 3)

struct message {
    uint32_t destination;
    bool logical;
    bool everybody;
    uint8_t vector;
    enum delivery_mode mode;
    bool level_triggered;
};

uint32_t lapic_logical_id(const struct lapic *apic)
{
    if (lapic_is_x2apic(apic))
        return (apic->cpu >> 4) << 16 | 1u << (apic->cpu & 15);
    return apic->ldr;
}

/* Lock held. */
static bool destination_matches(const struct lapic *apic, const struct message *message)
{
    if (!lapic_is_enabled(apic))
        return false;
    if (message->everybody)
        return true;
    uint32_t destination = message->destination;
    if (!message->logical)
        return destination == apic->cpu;

    uint32_t id = lapic_logical_id(apic);
    if (lapic_is_x2apic(apic))
        return destination >> 16 == id >> 16 && (destination & id & 0xffff);
    if (destination > 0xff)
        return false;
    if (apic->dfr >> 28 == 0xf) /* flat model */
        return destination & id >> 24;
    bool cluster = destination >> 4 == 0xf || destination >> 4 == id >> 28;
    return cluster && (destination & id >> 24 & 0xf);
}

static bool is_vectored(const struct message *message)
{
    return message->mode == DELIVERY_FIXED || message->mode == DELIVERY_LOWEST;
}

/* Takes a message that is addressed to this APIC. Lock held; INIT and startup are left to the caller. */
static void accept(struct lapic *apic, const struct message *message)
{
    switch (message->mode) {
    case DELIVERY_FIXED:
    case DELIVERY_LOWEST:
        if (apic->svr & SVR_ENABLED)
            lapic_accept_fixed(apic, message->vector, message->level_triggered);
        break;
    case DELIVERY_NMI:
        lapic_raise_nmi(apic);
        break;
    case DELIVERY_EXTINT:
        apic->extint_latched = true;
        break;
    case DELIVERY_SMI: /* there is no system management mode */
    case DELIVERY_INIT:
    case DELIVERY_STARTUP:
        break;
    }
}

static void deliver_to(struct lapic_set *set, unsigned cpu, const struct message *message)
{
    struct lapic *apic = &set->apics[cpu];
    lapic_lock(apic);
    bool mine = destination_matches(apic, message);
    if (mine)
        accept(apic, message);
    lapic_unlock(apic);
    if (!mine)
        return;
    if (message->mode == DELIVERY_INIT)
        set->ops->init(set->ctx, cpu);
    else if (message->mode == DELIVERY_STARTUP)
        set->ops->startup(set->ctx, cpu, message->vector);
}

/* The range of processors that can match at all, so that one target costs one lock. */
static void candidates(const struct lapic_set *set, const struct message *message, unsigned *first, unsigned *end)
{
    *first = 0;
    *end = set->cpu_count;
    if (message->everybody || message->logical)
        return;
    *first = message->destination < set->cpu_count ? message->destination : set->cpu_count;
    *end = *first < set->cpu_count ? *first + 1 : *first;
}

/* Lowest priority among those addressed; -1: none. Ties go round, so that interrupts spread (11.6.2.4). */
static int arbitrate(struct lapic_set *set, const struct message *message)
{
    unsigned start = atomic_fetch_add_explicit(&set->arbitration, 1, memory_order_relaxed) % set->cpu_count;
    int winner = -1;
    uint32_t lowest = UINT32_MAX;
    for (unsigned i = 0; i < set->cpu_count; i++) {
        unsigned cpu = (start + i) % set->cpu_count;
        struct lapic *apic = &set->apics[cpu];
        lapic_lock(apic);
        if (destination_matches(apic, message) && (apic->svr & SVR_ENABLED) && lapic_ppr(apic) < lowest) {
            lowest = lapic_ppr(apic);
            winner = (int)cpu;
        }
        lapic_unlock(apic);
    }
    return winner;
}

static void deliver(struct lapic_set *set, const struct message *message)
{
    unsigned first, end;
    candidates(set, message, &first, &end);
    if (message->mode == DELIVERY_LOWEST && end - first > 1) {
        int winner = arbitrate(set, message);
        if (winner >= 0)
            deliver_to(set, (unsigned)winner, message);
        return;
    }
    for (unsigned cpu = first; cpu < end; cpu++)
        deliver_to(set, cpu, message);
}

static void deliver_shorthand(struct lapic *from, enum shorthand shorthand, struct message *message)
{
    struct lapic_set *set = from->set;
    bool restart = message->mode == DELIVERY_INIT || message->mode == DELIVERY_STARTUP;
    message->everybody = true;
    if (shorthand == SHORTHAND_SELF) {
        if (!restart) /* not a valid combination (table 11-3) */
            deliver_to(set, from->cpu, message);
        return;
    }
    for (unsigned cpu = 0; cpu < set->cpu_count; cpu++) {
        if (cpu != from->cpu || (shorthand == SHORTHAND_ALL && !restart))
            deliver_to(set, cpu, message);
    }
}

void lapic_send_ipi(struct lapic *from, uint32_t icr_low, uint32_t destination, bool x2apic)
{
    struct message message = {
        .destination = destination,
        .logical = icr_low & ICR_LOGICAL,
        .everybody = destination == (x2apic ? UINT32_MAX : 0xffu),
        .vector = icr_low & 0xff,
        .mode = (enum delivery_mode)(icr_low >> 8 & 7),
    };
    /* "INIT level de-assert" only resets arbitration ids, which nothing has had for long (11.6.1). */
    if (message.mode == DELIVERY_INIT && (icr_low & ICR_LEVEL) && !(icr_low & ICR_ASSERT))
        return;
    if (is_vectored(&message) && message.vector < 16) {
        lapic_lock(from);
        lapic_error(from, ESR_SEND_ILLEGAL_VECTOR);
        lapic_unlock(from);
        return;
    }
    if (message.mode == 3 || message.mode == DELIVERY_EXTINT) {
        LOG_GUEST(LOG_WARNING, "local APIC %u: IPI with reserved delivery mode %u", from->cpu, message.mode);
        return;
    }
    enum shorthand shorthand = (enum shorthand)(icr_low >> 18 & 3);
    if (shorthand == SHORTHAND_NONE)
        deliver(from->set, &message);
    else
        deliver_shorthand(from, shorthand, &message);
}

void lapic_send_msi(void *ctx, uint64_t address, uint32_t data)
{
    struct lapic_set *set = ctx;
    if ((address & MSI_ADDRESS_MASK) != LAPIC_BASE_DEFAULT) {
        LOG_GUEST(LOG_WARNING, "interrupt message to 0x%llx, which is no local APIC", (unsigned long long)address);
        return;
    }
    struct message message = {
        .destination = address >> 12 & 0xff,
        .logical = address & MSI_LOGICAL,
        .vector = data & 0xff,
        .mode = (enum delivery_mode)(data >> 8 & 7),
        .level_triggered = data & ICR_LEVEL,
    };
    message.everybody = message.destination == 0xff;
    if (message.level_triggered && !(data & ICR_ASSERT))
        return;
    if (message.mode == 3 || message.mode == DELIVERY_STARTUP) /* reserved in messages */
        return;
    /* The redirection hint asks for one of those addressed. */
    if (message.mode == DELIVERY_FIXED && (address & MSI_REDIRECTION_HINT))
        message.mode = DELIVERY_LOWEST;
    deliver(set, &message);
}
