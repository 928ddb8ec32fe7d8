/*
 * The AML writer (acpi_aml.c) and the DSDT built with it (acpi_dsdt.c), for acpi.c. AML: ACPI 6.4, chapter 20; resource descriptors: 6.4.
 *
 * A writer has a fixed buffer; running out of it sets `overflow`, later writes do nothing, and the caller looks once at the end.
 * Objects with a length (scope, device, method, package, buffer) are opened and closed; the length is put in at closing.
 * Never included outside this folder.
 */
#ifndef DOPPEL_CHIPSET_ACPI_PRIV_H
#define DOPPEL_CHIPSET_ACPI_PRIV_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "chipset/acpi.h"

#define AML_DEPTH 8

struct aml {
    uint8_t *bytes;
    size_t size_bytes, capacity_bytes;
    size_t open[AML_DEPTH]; /* where the bodies of open objects start */
    unsigned depth;
    bool overflow;
};

void aml_byte(struct aml *aml, uint8_t value);
void aml_raw(struct aml *aml, const void *data, size_t size_bytes);
void aml_u16(struct aml *aml, uint16_t value);
void aml_u32(struct aml *aml, uint32_t value);
void aml_u64(struct aml *aml, uint64_t value);

/* `path` is "\\_SB", "PCI0" or "\\_SB.PCI0.S01": segments of four characters, shorter ones are filled with '_'. */
void aml_scope(struct aml *aml, const char *path);
void aml_device(struct aml *aml, const char *name);
void aml_method(struct aml *aml, const char *name, unsigned arguments);
void aml_package(struct aml *aml, uint8_t elements);
void aml_close(struct aml *aml);

/* Name (name, ...): the object comes next. */
void aml_name(struct aml *aml, const char *name);
void aml_integer(struct aml *aml, uint64_t value);
void aml_reference(struct aml *aml, const char *path); /* a name as an operand */
void aml_port_region(struct aml *aml, const char *name, uint16_t port, uint8_t length_bytes);
/* Doublewords of a region, from its start, one for each name. */
void aml_fields(struct aml *aml, const char *region, const char *const *names, unsigned count);
void aml_string(struct aml *aml, const char *text);
void aml_eisa_id(struct aml *aml, const char id[7]); /* "PNP0A08" */

/* Name (_CRS, ResourceTemplate () {...}), closed by aml_resources_end. */
void aml_resources(struct aml *aml);
void aml_resources_end(struct aml *aml);
void aml_io(struct aml *aml, uint16_t port, uint8_t length_bytes);
void aml_irq(struct aml *aml, unsigned irq); /* edge, high, exclusive */
void aml_gsi(struct aml *aml, uint32_t gsi);  /* level, high, shared; any number */
void aml_memory32_fixed(struct aml *aml, uint32_t base, uint32_t length_bytes);
/* Windows that a bridge passes on. */
void aml_bus_window(struct aml *aml, uint16_t first, uint16_t last);
void aml_io_window(struct aml *aml, uint16_t first, uint16_t last);
void aml_memory_window(struct aml *aml, uint64_t base, uint64_t length_bytes);

/* In methods. Operands follow: aml_integer, aml_reference, aml_byte with one of these. */
#define AML_LOCAL0 0x60
#define AML_LOCAL1 0x61
#define AML_ARG0 0x68
void aml_store(struct aml *aml); /* value, where to */
void aml_if(struct aml *aml);    /* condition, then what is done; aml_close */
void aml_and(struct aml *aml, uint8_t operand, uint64_t mask);
void aml_notify(struct aml *aml, const char *device, uint8_t value);

/* The body of the DSDT, after its header. */
void acpi_write_dsdt(struct aml *aml, const struct acpi_config *config);

#endif
