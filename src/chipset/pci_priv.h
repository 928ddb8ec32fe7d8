/*
 * Shared by the files of the PCI bus: registers of the type 0 header, and the calls between pci.c (functions), pci_host.c (the bridge)
 * and pci_msix.c. Register names as in PCI Local Bus 3.0, chapter 6. Never included outside this folder.
 */
#ifndef DOPPEL_CHIPSET_PCI_PRIV_H
#define DOPPEL_CHIPSET_PCI_PRIV_H

#include <string.h>

#include "chipset/pci.h"

enum pci_register {
    PCI_VENDOR_ID = 0x00,
    PCI_DEVICE_ID = 0x02,
    PCI_COMMAND = 0x04,
    PCI_STATUS = 0x06,
    PCI_REVISION_ID = 0x08,
    PCI_CLASS_CODE = 0x09,
    PCI_CACHE_LINE_SIZE = 0x0C,
    PCI_BASE_ADDRESS = 0x10,
    PCI_SUBSYSTEM_VENDOR_ID = 0x2C,
    PCI_SUBSYSTEM_ID = 0x2E,
    PCI_CAPABILITIES_POINTER = 0x34,
    PCI_INTERRUPT_LINE = 0x3C,
    PCI_INTERRUPT_PIN = 0x3D,
    PCI_HEADER_END = 0x40,
    PCI_CAPABILITIES_END = 0x100,
};

#define PCI_COMMAND_IO 0x0001u
#define PCI_COMMAND_MEMORY 0x0002u
#define PCI_COMMAND_BUS_MASTER 0x0004u
#define PCI_COMMAND_PARITY 0x0040u
#define PCI_COMMAND_SERR 0x0100u
#define PCI_COMMAND_INTX_DISABLE 0x0400u
#define PCI_STATUS_INTERRUPT 0x0008u
#define PCI_STATUS_CAPABILITIES 0x0010u

#define PCI_CAPABILITY_MSIX 0x11

#define PCI_NOT_MAPPED UINT64_MAX

struct pci_host {
    struct pci_host_config config;
    struct pci_function bridge;
    struct pci_function *slots[PCI_SLOTS];
    unsigned intx_asserted[4]; /* how many functions pull each line */
    uint32_t address;          /* CONFIG_ADDRESS, port 0xCF8 */
};

static inline uint16_t pci_get16(const struct pci_function *function, unsigned offset)
{
    uint16_t value;

    memcpy(&value, function->config + offset, sizeof(value));
    return value;
}

static inline uint32_t pci_get32(const struct pci_function *function, unsigned offset)
{
    uint32_t value;

    memcpy(&value, function->config + offset, sizeof(value));
    return value;
}

static inline void pci_set16(uint8_t *bytes, unsigned offset, uint16_t value)
{
    memcpy(bytes + offset, &value, sizeof(value));
}

static inline void pci_set32(uint8_t *bytes, unsigned offset, uint32_t value)
{
    memcpy(bytes + offset, &value, sizeof(value));
}

/* A guest's access to configuration space: aligned, size_bytes 1, 2 or 4, within the space. */
uint32_t pci_function_config_read(struct pci_function *function, unsigned offset, unsigned size_bytes);
void pci_function_config_write(struct pci_function *function, unsigned offset, unsigned size_bytes, uint32_t value);

void pci_function_write_bar(struct pci_function *function, unsigned index, uint64_t address);

/* Maps and unmaps BARs of all functions until the bus shows what their registers say. */
void pci_host_remap(struct pci_host *host);
void pci_host_set_intx(void *host, unsigned pin, bool level);

void pci_msix_destroy(struct pci_function *function);
void pci_msix_reset(struct pci_function *function);
/* The message control word may have changed: sends what was pending and is free to go now. */
void pci_msix_control_changed(struct pci_function *function);
void pci_msix_state(struct pci_function *function, struct state_io *io);

#endif
