/*
 * MSI-X (PCI Local Bus 3.0, 6.8.2): the vector table and the pending bits in a BAR of their own, message control in the capability.
 *
 * Invariants: enabled and masked are copies of the message control word's bits; a pending bit is set only while its vector or the function
 * is masked. Messages are sent with the lock released.
 * Threading: pci_msix_notify and pci_msix_enabled from any thread, the rest with the device lock held. `lock` guards everything
 * in struct pci_msix; rank below the device lock, nothing is taken under it.
 */
#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "chipset/pci_priv.h"

#define MSIX_VECTORS_MAX 2048
#define MSIX_ENTRY_BYTES 16
#define MSIX_ENTRY_MASKED 1u

#define MSIX_CONTROL_ENABLE 0x8000u
#define MSIX_CONTROL_MASK 0x4000u

struct msix_entry {
    uint64_t address;
    uint32_t data;
    uint32_t control;
};

struct pci_msix {
    pthread_mutex_t lock;
    const struct msi_target *target;
    unsigned capability; /* offset in configuration space */
    unsigned vectors;
    uint32_t pba_offset, pba_bytes;
    bool enabled, masked;
    uint8_t *pending; /* one bit a vector */
    struct msix_entry entries[];
};

static bool is_pending(const struct pci_msix *msix, unsigned vector)
{
    return msix->pending[vector / 8] >> (vector % 8) & 1;
}

/* Under the lock: whether the vector's pending message may leave now; then it is no longer pending. */
static bool take_pending(struct pci_msix *msix, unsigned vector, struct msix_entry *message)
{
    *message = msix->entries[vector];
    if (!msix->enabled || msix->masked || (message->control & MSIX_ENTRY_MASKED) || !is_pending(msix, vector))
        return false;
    msix->pending[vector / 8] &= ~(1u << (vector % 8));
    return true;
}

static void send_pending(struct pci_msix *msix, unsigned vector)
{
    struct msix_entry message;
    bool send;

    pthread_mutex_lock(&msix->lock);
    send = take_pending(msix, vector, &message);
    pthread_mutex_unlock(&msix->lock);
    if (send)
        msi_send(msix->target, message.address, message.data);
}

void pci_msix_notify(struct pci_function *function, unsigned vector)
{
    struct pci_msix *msix = function->msix;
    struct msix_entry message;
    bool send = false;

    if (!msix || vector >= msix->vectors)
        return;
    pthread_mutex_lock(&msix->lock);
    if (msix->enabled) {
        msix->pending[vector / 8] |= 1u << (vector % 8);
        send = take_pending(msix, vector, &message);
    }
    pthread_mutex_unlock(&msix->lock);
    if (send)
        msi_send(msix->target, message.address, message.data);
}

bool pci_msix_enabled(const struct pci_function *function)
{
    bool enabled;

    if (!function->msix)
        return false;
    pthread_mutex_lock(&function->msix->lock);
    enabled = function->msix->enabled;
    pthread_mutex_unlock(&function->msix->lock);
    return enabled;
}

static uint64_t table_read(void *ctx, uint64_t offset, unsigned size_bytes)
{
    struct pci_msix *msix = ctx;
    uint32_t value = 0;

    pthread_mutex_lock(&msix->lock);
    if (offset < (uint64_t)msix->vectors * MSIX_ENTRY_BYTES)
        memcpy(&value, (uint8_t *)msix->entries + offset, sizeof(value));
    else if (offset >= msix->pba_offset && offset - msix->pba_offset < msix->pba_bytes)
        memcpy(&value, msix->pending + (offset - msix->pba_offset), sizeof(value));
    pthread_mutex_unlock(&msix->lock);
    return value;
}

static void table_write(void *ctx, uint64_t offset, unsigned size_bytes, uint64_t value)
{
    struct pci_msix *msix = ctx;
    unsigned vector = (unsigned)(offset / MSIX_ENTRY_BYTES);
    uint32_t word = (uint32_t)value;

    if (offset >= (uint64_t)msix->vectors * MSIX_ENTRY_BYTES)
        return;
    if (offset % MSIX_ENTRY_BYTES == offsetof(struct msix_entry, control))
        word &= MSIX_ENTRY_MASKED;
    else if (offset % MSIX_ENTRY_BYTES == 0)
        word &= ~3u;
    pthread_mutex_lock(&msix->lock);
    memcpy((uint8_t *)msix->entries + offset, &word, sizeof(word));
    pthread_mutex_unlock(&msix->lock);
    send_pending(msix, vector);
}

/* Doublewords and quadwords only are defined (6.8.2); the bus splits the latter. */
static const struct region_ops table_ops = {"msix", table_read, table_write, 4, 4};

int pci_msix_create(struct pci_function *function, unsigned vectors, unsigned bar_index)
{
    static const uint8_t control_mask[10] = {0, (MSIX_CONTROL_ENABLE | MSIX_CONTROL_MASK) >> 8};
    uint32_t table_bytes = vectors * MSIX_ENTRY_BYTES, bar_bytes = 4096;
    uint8_t body[10] = {0};
    struct pci_msix *msix;

    assert(!function->msix);
    if (!vectors || vectors > MSIX_VECTORS_MAX || bar_index >= PCI_BARS)
        return -EINVAL;
    msix = calloc(1, sizeof(*msix) + table_bytes);
    if (!msix)
        return -ENOMEM;
    msix->vectors = vectors;
    msix->target = function->host->config.msi;
    msix->pba_offset = (table_bytes + 0x7FF) & ~0x7FFu;
    msix->pba_bytes = (vectors + 63) / 64 * 8;
    msix->pending = calloc(1, msix->pba_bytes);
    pci_set16(body, 0, (uint16_t)(vectors - 1));
    pci_set32(body, 2, bar_index);
    pci_set32(body, 6, msix->pba_offset | bar_index);
    if (msix->pending)
        msix->capability = pci_function_add_capability(function, PCI_CAPABILITY_MSIX, 12, body, control_mask);
    if (!msix->capability) {
        int rc = msix->pending ? -ENOSPC : -ENOMEM;

        free(msix->pending);
        free(msix);
        return rc;
    }
    pthread_mutex_init(&msix->lock, NULL);
    while (bar_bytes < msix->pba_offset + msix->pba_bytes)
        bar_bytes *= 2;
    function->msix = msix;
    pci_function_set_bar(function, bar_index, PCI_BAR_MEM32, bar_bytes, &table_ops, msix);
    pci_msix_reset(function);
    return 0;
}

void pci_msix_destroy(struct pci_function *function)
{
    if (!function->msix)
        return;
    pthread_mutex_destroy(&function->msix->lock);
    free(function->msix->pending);
    free(function->msix);
    function->msix = NULL;
}

void pci_msix_reset(struct pci_function *function)
{
    struct pci_msix *msix = function->msix;

    if (!msix)
        return;
    pci_set16(function->config, msix->capability + 2, (uint16_t)(msix->vectors - 1));
    pthread_mutex_lock(&msix->lock);
    msix->enabled = msix->masked = false;
    memset(msix->pending, 0, msix->pba_bytes);
    for (unsigned i = 0; i < msix->vectors; i++)
        msix->entries[i] = (struct msix_entry){.control = MSIX_ENTRY_MASKED};
    pthread_mutex_unlock(&msix->lock);
}

void pci_msix_control_changed(struct pci_function *function)
{
    struct pci_msix *msix = function->msix;
    uint16_t control;
    bool changed;

    if (!msix)
        return;
    control = pci_get16(function, msix->capability + 2);
    pthread_mutex_lock(&msix->lock);
    changed = msix->enabled != !!(control & MSIX_CONTROL_ENABLE) || msix->masked != !!(control & MSIX_CONTROL_MASK);
    msix->enabled = control & MSIX_CONTROL_ENABLE;
    msix->masked = control & MSIX_CONTROL_MASK;
    pthread_mutex_unlock(&msix->lock);
    for (unsigned i = 0; changed && i < msix->vectors; i++)
        send_pending(msix, i);
}

void pci_msix_state(struct pci_function *function, struct state_io *io)
{
    struct pci_msix *msix = function->msix;

    if (!msix)
        return;
    pthread_mutex_lock(&msix->lock);
    for (unsigned i = 0; i < msix->vectors; i++) {
        struct msix_entry *entry = &msix->entries[i];

        state_u64(io, &entry->address);
        state_u32(io, &entry->data);
        state_u32(io, &entry->control);
        if (state_loading(io)) {
            entry->address &= ~3ull;
            entry->control &= MSIX_ENTRY_MASKED;
        }
    }
    state_bytes(io, msix->pending, msix->pba_bytes);
    for (unsigned i = msix->vectors; state_loading(io) && i < msix->pba_bytes * 8; i++)
        msix->pending[i / 8] &= ~(1u << (i % 8));
    pthread_mutex_unlock(&msix->lock);
}
