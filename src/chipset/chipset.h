/*
 * The chipset: every part of the PC that is not an optional device, put together, with its fixed addresses.
 * Each part has its own header beside this one; this one names what the machine folder and the firmware tables share.
 */
#ifndef DOPPEL_CHIPSET_CHIPSET_H
#define DOPPEL_CHIPSET_CHIPSET_H

#define CHIPSET_ECAM_BASE 0xE0000000ull /* 256 MiB: bus 0..255 */
#define CHIPSET_ECAM_BYTES 0x10000000ull
#define CHIPSET_PCI_MEM32_BASE 0xC0000000ull
#define CHIPSET_PCI_MEM32_BYTES 0x20000000ull
#define CHIPSET_PCI_MEM64_BASE 0x4000000000ull /* 256 GiB */
#define CHIPSET_PCI_MEM64_BYTES 0x1000000000ull
#define CHIPSET_PCI_PORT_BASE 0xC000
#define CHIPSET_PCI_PORT_BYTES 0x4000
#define CHIPSET_VIRTIO_MMIO_BASE 0xD0000000ull /* in machines without PCI: a page for each virtio device */
#define CHIPSET_VIRTIO_MMIO_PLACES 64
#define CHIPSET_IOAPIC_BASE 0xFEC00000ull
#define CHIPSET_IOAPIC_PINS 24
#define CHIPSET_LAPIC_BASE 0xFEE00000ull
#define CHIPSET_HPET_BASE 0xFED00000ull

/* ACPI fixed hardware. */
#define CHIPSET_PM_EVENT_PORT 0x600   /* PM1a event block, 4 bytes */
#define CHIPSET_PM_CONTROL_PORT 0x604 /* PM1a control block, 2 bytes */
#define CHIPSET_PM_TIMER_PORT 0x608   /* 4 bytes */
#define CHIPSET_GPE_PORT 0x620        /* GPE0 block: a byte of status, a byte of enable */
#define CHIPSET_GPE_BYTES 2
#define CHIPSET_GPE_HOTPLUG 1         /* its bit for the PCI hot-plug controller */
#define CHIPSET_GPE_GENERATION 2      /* its bit for another generation ID, see vmgenid.h */
#define CHIPSET_HOTPLUG_PORT 0x640    /* pci_hotplug.h */
#define CHIPSET_HOTPLUG_BYTES 12
#define CHIPSET_RESET_PORT 0xCF9
#define CHIPSET_SCI_IRQ 9
#define CHIPSET_SLEEP_TYPE_S5 5

/* ISA interrupts; on the IOAPIC, IRQ 0 arrives at pin 2 and the rest at the pin of their number. PCI INTA..D: pins 16..19. */
#define CHIPSET_IRQ_PIT 0
#define CHIPSET_IRQ_KEYBOARD 1
#define CHIPSET_IRQ_COM1 4
#define CHIPSET_IRQ_COM2 3
#define CHIPSET_IRQ_RTC 8
#define CHIPSET_GSI_PCI 16

#endif
