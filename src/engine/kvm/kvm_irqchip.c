/*
 * Local APICs in the host's kernel (KVM_CAP_SPLIT_IRQCHIP): IOAPIC, 8259 pair and timers stay the machine's, and their messages go to KVM_SIGNAL_MSI.
 *
 * KVM tells of the end of an interrupt (KVM_EXIT_IOAPIC_EOI) when one of the first KVM_IOAPIC_PINS routes is a level-triggered message with its vector; so the routes
 * mirror the level-triggered inputs of the IOAPIC, and do nothing else.
 * The APIC's page is the same in KVM's structure and in ours. An armed one-shot or periodic timer goes on from its current count, a deadline from its MSR.
 * Threading: messages from any thread; routes under the engine's lock; state while vCPUs stand still.
 */
#include <string.h>

#include "engine/kvm/kvm_priv.h"
#include "util/log.h"

#define MSR_TSC_DEADLINE 0x6E0
#define APIC_BASE_EXTD (1ull << 10)
#define REG_ID 2

int kvm_irqchip_split(struct engine *e)
{
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {KVM_IOAPIC_PINS}};
    struct kvm_enable_cap x2apic = {.cap = KVM_CAP_X2APIC_API, .args = {KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK}};
    if (ioctl(e->vm, KVM_CHECK_EXTENSION, KVM_CAP_SPLIT_IRQCHIP) <= 0 || ioctl(e->vm, KVM_CHECK_EXTENSION, KVM_CAP_SIGNAL_MSI) <= 0)
        return -ENOTSUP;
    int r = kvm_call(e->vm, KVM_ENABLE_CAP, &x2apic);
    r = r ? r : kvm_call(e->vm, KVM_ENABLE_CAP, &split);
    e->split = r == 0;
    return r;
}

static void message(struct engine *e, uint64_t address, uint32_t data)
{
    struct kvm_msi msi = {.address_lo = (uint32_t)address, .address_hi = (uint32_t)(address >> 32), .data = data};
    (void)ioctl(e->vm, KVM_SIGNAL_MSI, &msi); /* nobody there, or blocked: as on the bus */
}

static void routes_tell(struct engine *e)
{
    struct {
        struct kvm_irq_routing header;
        struct kvm_irq_routing_entry entry[KVM_IOAPIC_PINS];
    } routes = {.header.nr = 0};
    for (unsigned pin = 0; pin < KVM_IOAPIC_PINS; pin++) {
        if (!e->level_pin[pin].data)
            continue;
        routes.entry[routes.header.nr++] = (struct kvm_irq_routing_entry){
            .gsi = pin,
            .type = KVM_IRQ_ROUTING_MSI,
            .u.msi = {.address_lo = (uint32_t)e->level_pin[pin].address,
                      .address_hi = (uint32_t)(e->level_pin[pin].address >> 32),
                      .data = e->level_pin[pin].data},
        };
    }
    int r = kvm_call(e->vm, KVM_SET_GSI_ROUTING, &routes);
    if (r)
        log_error("kvm: interrupt routes were refused: %s", strerror(-r));
}

static void level_pin(struct engine *e, unsigned pin, uint64_t address, uint32_t data)
{
    if (pin >= KVM_IOAPIC_PINS)
        return;
    pthread_mutex_lock(&e->lock);
    if (e->level_pin[pin].address != address || e->level_pin[pin].data != data) {
        e->level_pin[pin].address = address;
        e->level_pin[pin].data = data;
        routes_tell(e);
    }
    pthread_mutex_unlock(&e->lock);
}

/* ---- state ---- */

struct one_msr {
    struct kvm_msrs header;
    struct kvm_msr_entry entry;
};

static int apic_get(struct vcpu *v, struct apic_state *state)
{
    struct kvm_cpu *c = (struct kvm_cpu *)v;
    struct kvm_lapic_state page;
    struct kvm_sregs2 sregs;
    struct one_msr deadline = {.header.nmsrs = 1, .entry.index = MSR_TSC_DEADLINE};
    /* The deadline first: one that passes now is seen twice, the other way round it would not be seen at all. */
    int r = ioctl(c->fd, KVM_GET_MSRS, &deadline) == 1 ? 0 : -EIO;
    r = r ? r : kvm_call(c->fd, KVM_GET_LAPIC, &page);
    r = r ? r : kvm_call(c->fd, KVM_GET_SREGS2, &sregs);
    if (r)
        return r;
    *state = (struct apic_state){.base = sregs.apic_base, .tsc_deadline = deadline.entry.data};
    for (unsigned n = 0; n < APIC_REGISTERS; n++)
        memcpy(&state->reg[n], page.regs + n * 16, sizeof state->reg[n]);
    return 0;
}

/* The base decides how the page is read, and the TSC's offset when a deadline comes; the page clears the deadline. */
static int apic_set(struct vcpu *v, const struct apic_state *state)
{
    struct kvm_cpu *c = (struct kvm_cpu *)v;
    struct kvm_lapic_state page;
    struct kvm_sregs2 sregs;
    struct one_msr deadline = {.header.nmsrs = 1, .entry = {.index = MSR_TSC_DEADLINE, .data = state->tsc_deadline}};
    memset(&page, 0, sizeof page);
    for (unsigned n = 0; n < APIC_REGISTERS; n++)
        memcpy(page.regs + n * 16, &state->reg[n], sizeof state->reg[n]);
    if (!c->has_cpuid) { /* x2APIC mode and deadline timers are CPUID's to allow */
        int r = kvm_cpuid_push(c);
        if (r)
            return r;
        c->has_cpuid = true;
    }
    int r = kvm_push_tsc_offset(c);
    r = r ? r : kvm_call(c->fd, KVM_GET_SREGS2, &sregs);
    if (r == 0) {
        sregs.apic_base = state->base;
        r = kvm_call(c->fd, KVM_SET_SREGS2, &sregs);
    }
    r = r ? r : kvm_call(c->fd, KVM_SET_LAPIC, &page);
    if (r == 0 && ioctl(c->fd, KVM_SET_MSRS, &deadline) != 1)
        r = -EIO;
    return r;
}

/* KVM keeps INIT and startup until the processor runs or is asked for its state. Registers changed from outside are yet to go in, and win. */
static int arrive(struct vcpu *v)
{
    struct kvm_cpu *c = (struct kvm_cpu *)v;
    return c->stale ? 0 : kvm_state_pull(c);
}

static const struct engine_irqchip_ops split_ops = {
    .message = message,
    .level_pin = level_pin,
    .get = apic_get,
    .set = apic_set,
    .arrive = arrive,
};

const struct engine_irqchip_ops *kvm_irqchip(struct engine *e)
{
    return e->split ? &split_ops : NULL;
}
