/*
 * Interrupts' ways out of a device: a level line to the PIC and the IOAPIC, or a message (MSI) to the local APICs.
 * A line remembers its level, so setting it twice costs nothing. Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_IRQ_H
#define DOPPEL_CHIPSET_IRQ_H

#include <stdbool.h>
#include <stdint.h>

/* An input pin somewhere; `set` is called on changes only. Copy freely: it owns nothing. */
struct irq_line {
    void (*set)(void *ctx, unsigned pin, bool level);
    void *ctx;
    unsigned pin;
    bool level; /* the last level set by the owner of this line */
};

static inline void irq_line_set(struct irq_line *line, bool level)
{
    if (line->level == level)
        return;
    line->level = level;
    if (line->set)
        line->set(line->ctx, line->pin, level);
}

static inline void irq_line_pulse(struct irq_line *line)
{
    irq_line_set(line, true);
    irq_line_set(line, false);
}

/* Where messages (MSI, MSI-X, IOAPIC entries) go. `address` is 0xFEExxxxx, `data` as in SDM vol. 3, 11.11. */
struct msi_target {
    void (*send)(void *ctx, uint64_t address, uint32_t data);
    void *ctx;
};

static inline void msi_send(const struct msi_target *target, uint64_t address, uint32_t data)
{
    if (target && target->send)
        target->send(target->ctx, address, data);
}

#endif
