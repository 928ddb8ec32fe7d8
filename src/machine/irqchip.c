/*
 * Where the local APICs are: the machine's own (chipset/lapic.h), or the engine's, in the host's kernel. Messages, the 8259 pair's output and state go to whoever has them; virtio's doorbells come from there, too. While
 * the engine has them ours are at rest, and serve as the form in which they are saved. The local APICs are loaded last, because of their timers: what is sent to them before is held until they are there.
 * Threading: messages from any thread; the rest with the device lock, states while vCPUs stand still.
 */
#include <string.h>

#include "machine/machine_priv.h"
#include "util/log.h"

static void deliver(struct machine *machine, const struct machine_message *message)
{
    struct msi_target own = lapic_msi_target(machine->lapics);
    if (machine->irqchip)
        machine->irqchip->message(machine->engine, message->address, message->data);
    else
        msi_send(&own, message->address, message->data);
}

/* Devices that are being loaded have one interrupt each to tell of at most: a link that is down now, for one. */
static void hold(struct machine *machine, const struct machine_message *message)
{
    if (machine->held_count < MACHINE_PARTS_MAX)
        machine->held[machine->held_count++] = *message;
}

static void message_send(void *ctx, uint64_t address, uint32_t data)
{
    struct machine *machine = ctx;
    const struct machine_message message = {address, data};
    if (machine->holds_messages)
        hold(machine, &message);
    else
        deliver(machine, &message);
}

void machine_hold_messages(struct machine *machine)
{
    machine->holds_messages = true;
}

void machine_release_messages(struct machine *machine)
{
    machine->holds_messages = false;
    lapic_set_extint(machine->lapics, atomic_load(&machine->extint));
    for (unsigned i = 0; i < machine->held_count; i++)
        deliver(machine, &machine->held[i]);
    machine->held_count = 0;
}

struct msi_target machine_msi_target(struct machine *machine)
{
    return (struct msi_target){.send = message_send, .ctx = machine};
}

void machine_level_pin(void *ctx, unsigned pin, uint64_t address, uint32_t data)
{
    struct machine *machine = ctx;
    if (machine->irqchip)
        machine->irqchip->level_pin(machine->engine, pin, address, data);
}

void machine_extint(void *ctx, unsigned pin, bool level)
{
    struct machine *machine = ctx;
    lapic_set_extint(machine->lapics, level);
    atomic_store(&machine->extint, level);
    for (unsigned i = 0; machine->irqchip && machine->vcpu && level && i < machine->cpu_count; i++)
        vcpu_thread_wake(&machine->vcpu[i]);
}

/* ---- doorbells: the other way ---- */

/* One that the engine refuses goes on coming through the bus. */
static void doorbell(void *ctx, uint64_t address, const struct bus_doorbell *bell, bool on)
{
    struct machine *machine = ctx;
    struct engine_doorbell there = {.gpa = address, .size_bytes = bell->size_bytes, .match = bell->match, .value = bell->value, .fd = bell->fd};
    int r = machine->engine_ops->doorbell(machine->engine, &there, on);
    if (r && on)
        log_debug("doorbell at 0x%llx: %s", (unsigned long long)address, strerror(-r));
}

void machine_connect_doorbells(struct machine *machine)
{
    bool can = machine->engine && machine->engine_ops->doorbell;
    bus_set_doorbells(machine->bus, can ? doorbell : NULL, machine);
}

/* ---- state ---- */

int machine_apics_give(struct machine *machine)
{
    int r = 0;
    for (unsigned i = 0; machine->irqchip && i < machine->cpu_count && r == 0; i++) {
        struct apic_state state;
        lapic_give(machine->lapics, i, &state);
        r = machine->irqchip->set(machine->vcpu[i].vcpu, &state);
        if (r)
            log_error("engine %s refuses the state of local APIC %u: %s", machine->engine_ops->name, i, strerror(-r));
    }
    return r;
}

int machine_apics_arrive(struct machine *machine)
{
    int r = 0;
    for (unsigned i = 0; machine->irqchip && i < machine->cpu_count && r == 0; i++)
        r = machine->irqchip->arrive(machine->vcpu[i].vcpu);
    return r;
}

int machine_apics_take(struct machine *machine)
{
    int r = 0;
    for (unsigned i = 0; machine->irqchip && i < machine->cpu_count && r == 0; i++) {
        struct apic_state state;
        r = machine->irqchip->get(machine->vcpu[i].vcpu, &state);
        if (r == 0)
            lapic_take(machine->lapics, i, &state);
    }
    return r;
}

void machine_apics_rest(struct machine *machine)
{
    for (unsigned i = 0; machine->irqchip && i < machine->cpu_count; i++)
        lapic_rest(machine->lapics, i);
}
