/*
 * The virtual machine generation ID: 16 bytes in memory that no OS uses, another number whenever the machine is not the one it was (it goes on from a snapshot, or is a copy), and a
 * general purpose event that says so. Guests draw new random numbers then. Source: Microsoft, "Virtual Machine Generation ID" (2012); the DSDT has the device (acpi_dsdt.c).
 * Threading: with the device lock held.
 */
#ifndef DOPPEL_CHIPSET_VMGENID_H
#define DOPPEL_CHIPSET_VMGENID_H

#include <stdint.h>

#include "chipset/pm.h"
#include "memory/memory.h"
#include "state/state.h"

#define VMGENID_TEXT_BYTES 37 /* with the NUL */

/* As in memory: the first three fields little endian. */
struct vmgenid_guid {
    uint8_t bytes[16];
};

struct vmgenid;

struct vmgenid_config {
    struct physmap *memory;
    struct pm *pm;
    struct vmgenid_guid guid;
};

int vmgenid_create(struct vmgenid **vmgenid, const struct vmgenid_config *config) __attribute__((warn_unused_result));
void vmgenid_destroy(struct vmgenid *vmgenid);
int vmgenid_state(struct vmgenid *vmgenid, struct state_io *io) __attribute__((warn_unused_result));

/* For the tables, which have the bytes in them. A reset changes nothing. */
const struct vmgenid_guid *vmgenid_get(const struct vmgenid *vmgenid);
/* The machine is another one from now on. In memory first, then the event. 0 or -errno. */
int vmgenid_renew(struct vmgenid *vmgenid, const struct vmgenid_guid *guid) __attribute__((warn_unused_result));

/* "01234567-89ab-cdef-0123-456789abcdef"; 0 or -EINVAL. */
int vmgenid_parse(const char *text, struct vmgenid_guid *guid) __attribute__((warn_unused_result));
void vmgenid_format(const struct vmgenid_guid *guid, char text[VMGENID_TEXT_BYTES]);
/* A random one (version 4 of RFC 4122). 0 or -errno. */
int vmgenid_draw(struct vmgenid_guid *guid) __attribute__((warn_unused_result));

#endif
