/*
 * The device contract. A device is one file with one `const struct device_class` and one line in devices.def.
 *
 * A device belongs to one machine, reached through `struct device_host`; it holds no global state. All its functions, and the callbacks it
 * registers, run with the machine's device lock held. It registers its regions itself (usually through a PCI function) in create
 * and takes them away in destroy.
 */
#ifndef DOPPEL_DEVICE_DEVICE_H
#define DOPPEL_DEVICE_DEVICE_H

#include "chipset/bus.h"
#include "chipset/irq.h"
#include "chipset/pci.h"
#include "memory/memory.h"
#include "state/state.h"
#include "util/error.h"
#include "util/loop.h"

struct virtio_mmio_host;

/* What a machine gives its devices. Outlives them. */
struct device_host {
    struct bus *bus;
    struct pci_host *pci;          /* NULL: the machine has no PCI */
    struct virtio_mmio_host *mmio; /* set: virtio devices are memory-mapped (virtio_mmio.h), not PCI functions */
    struct physmap *memory;
    struct loop *loop;
};

struct device; /* each class's own structure */

typedef void device_counter_fn(void *ctx, const char *name, uint64_t value);

struct device_class {
    const char *name; /* "virtio-blk"; also the state section's name */
    const char *help;
    /* `config` is the class's own configuration structure, declared in its header (virtio_blk.h ...); borrowed. */
    int (*create)(struct device **device, const struct device_host *host, const void *config, struct error *err);
    void (*reset)(struct device *device);
    /* Saves or loads, see state/state.h. Nothing is in flight: quiesce ran before. */
    int (*state)(struct device *device, struct state_io *io);
    /* Starts finishing what is in flight; true when nothing is left. The machine calls it from the loop until it is true. NULL: always quiet. */
    bool (*quiesce)(struct device *device);
    void (*destroy)(struct device *device);
    /* What it has counted since it was made. Optional. */
    void (*counters)(struct device *device, device_counter_fn *emit, void *ctx);
};

extern const struct device_class *const device_classes[]; /* NULL-terminated, from devices.def */
const struct device_class *device_class_find(const char *name);

#endif
