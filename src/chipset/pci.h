/*
 * PCI: one host bridge, one bus (0), 32 slots, configuration space by ports 0xCF8/0xCFC and by ECAM, BARs, capabilities, INTx,
 * MSI and MSI-X. Functions of devices embed `struct pci_function` and describe themselves by `struct pci_identity`.
 *
 * Configuration writes by the guest are masked by pci_function.write_mask; a function sees them only through ops->config_written. BARs are moved and
 * mapped on the bus by this file as the guest programs them. PCI Local Bus 3.0 and PCI Express Base 4.0, chapter 7.
 * Threading: with the device lock held, except pci_msix_notify, which may be called from any thread.
 */
#ifndef DOPPEL_CHIPSET_PCI_H
#define DOPPEL_CHIPSET_PCI_H

#include <stdbool.h>
#include <stdint.h>

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "state/state.h"
#include "util/error.h"

#define PCI_CONFIG_BYTES 4096 /* extended configuration space, reached by ECAM */
#define PCI_BARS 6
#define PCI_SLOTS 32

struct pci_host;
struct pci_function;

struct pci_identity {
    uint16_t vendor, device, subsystem_vendor, subsystem;
    uint32_t class_code; /* 24 bits: base class, subclass, interface */
    uint8_t revision;
    bool has_intx; /* interrupt pin A */
};

struct pci_function_ops {
    const char *name;
    /* After a guest write to configuration space took effect. Optional. */
    void (*config_written)(void *device, unsigned offset, unsigned size_bytes);
    /* Before a guest read, so that a window register (virtio's PCI configuration capability) can be filled. Optional. */
    void (*config_reading)(void *device, unsigned offset, unsigned size_bytes);
};

enum pci_bar_kind { PCI_BAR_NONE, PCI_BAR_PORT, PCI_BAR_MEM32, PCI_BAR_MEM64 };

struct pci_bar {
    enum pci_bar_kind kind;
    uint64_t size_bytes; /* power of two */
    const struct region_ops *ops;
    void *ctx;
    uint64_t mapped_at; /* current bus address; UINT64_MAX when not decoded */
};

struct pci_msix; /* table and pending bits; owned by the function */

struct pci_function {
    struct pci_host *host;
    uint8_t slot;
    void *device;
    const struct pci_function_ops *ops;
    uint8_t config[PCI_CONFIG_BYTES];
    uint8_t write_mask[PCI_CONFIG_BYTES];
    struct pci_bar bar[PCI_BARS];
    uint8_t capability_end; /* first free byte after the capabilities */
    struct pci_msix *msix;
    struct irq_line intx;
};

/* Takes a slot (-1: the next free one) and fills the header. -EBUSY, -ENOSPC. The function must stay where it is in memory. */
int pci_function_register(struct pci_host *host, struct pci_function *function, int slot, const struct pci_identity *identity,
                          const struct pci_function_ops *ops, void *device) __attribute__((warn_unused_result));
void pci_function_unregister(struct pci_function *function); /* unmaps BARs, frees MSI-X */

/* Declares a BAR; the region becomes reachable when the guest enables decoding. */
void pci_function_set_bar(struct pci_function *function, unsigned index, enum pci_bar_kind kind, uint64_t size_bytes,
                          const struct region_ops *ops, void *ctx);

/* Appends a capability of `size_bytes` including id and next pointer; returns its offset, 0 when there is no room. `body` starts after the two header bytes; may be NULL.
 * write_mask likewise; NULL: read-only. */
unsigned pci_function_add_capability(struct pci_function *function, uint8_t id, unsigned size_bytes, const void *body, const void *write_mask);

/* MSI-X with `vectors` entries; table and PBA live in BAR `bar_index`, which this call declares (MEM32). */
int pci_msix_create(struct pci_function *function, unsigned vectors, unsigned bar_index) __attribute__((warn_unused_result));
bool pci_msix_enabled(const struct pci_function *function);
/* Sends vector's message, or sets its pending bit while masked. Nothing when out of range or MSI-X is off. Any thread. */
void pci_msix_notify(struct pci_function *function, unsigned vector);

/* Level of INTA#; ignored by the guest's choice when INTx is disabled in the command register. */
void pci_function_set_intx(struct pci_function *function, bool level);

/* Bus mastering allowed by the command register: devices must not touch memory without it. */
bool pci_function_bus_master(const struct pci_function *function);

/* Back to the state after power-on: command, BARs, MSI-X. */
void pci_function_reset(struct pci_function *function);
/* Fields of this function inside the caller's section. Remaps BARs when loading. */
void pci_function_state(struct pci_function *function, struct state_io *io);

bool pci_slot_is_free(const struct pci_host *host, unsigned slot);

/* The host bridge. `intx[4]` are the lines that INTA..INTD of the slots swizzle to ((slot + pin) % 4): GSI 16..19 of the IOAPIC. */
struct pci_host_config {
    struct bus *bus;
    const struct msi_target *msi;
    struct irq_line intx[4];
    uint64_t ecam_base;                       /* 0: none */
    uint64_t mem32_base, mem32_size_bytes;    /* where BARs are placed at reset, so that guests without a PCI allocator work */
    uint64_t mem64_base, mem64_size_bytes;
    uint16_t port_base, port_size_bytes;
    const struct region_ops *cf9; /* byte accesses to port 0xCF9, the reset register; NULL: nobody (pm_reset_port_ops) */
    void *cf9_ctx;
};

int pci_host_create(struct pci_host **host, const struct pci_host_config *config) __attribute__((warn_unused_result));
void pci_host_destroy(struct pci_host *host);
/* Assigns addresses to all BARs and enables decoding, as firmware would. Called after reset when there is no firmware. */
void pci_host_assign(struct pci_host *host);
void pci_host_reset(struct pci_host *host); /* the bridge itself */
int pci_host_state(struct pci_host *host, struct state_io *io) __attribute__((warn_unused_result));

#endif
