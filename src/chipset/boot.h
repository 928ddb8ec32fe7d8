/*
 * Starting a kernel without firmware: loads it, its initial RAM disk and its parameters into guest RAM and says how the first processor starts.
 *
 * Understood: bzImage by Linux's 64-bit protocol (2.12 and later; the compressed kernel inside is unpacked here on the host
 * when its format is known, else the guest unpacks it), ELF with a Xen PVH note (32-bit entry), plain ELF64 Linux kernels (64-bit entry).
 * Files are hostile: all sizes and offsets are checked. Stateless. Threading: no vCPU runs.
 */
#ifndef DOPPEL_CHIPSET_BOOT_H
#define DOPPEL_CHIPSET_BOOT_H

#include <stdbool.h>
#include <stdint.h>

#include "arch/cpu.h"
#include "memory/memory.h"
#include "util/error.h"

struct boot_config {
    const char *kernel_path;
    const char *initrd_path;  /* NULL: none */
    int *kernel_fd, *initrd_fd; /* -1 at first; opened by the first load and kept by the caller, for those that come when paths lead nowhere any more. NULL: each time */
    const char *command_line; /* NULL: empty */
    gpa_t rsdp;               /* from acpi_build; 0: none */
    bool unpack_in_guest;     /* leave a bzImage's payload to its own decompressor */
};

enum boot_protocol { BOOT_LINUX64, BOOT_PVH };

struct boot_entry {
    enum boot_protocol protocol;
    gpa_t entry;      /* first instruction */
    gpa_t parameters; /* Linux: boot_params in RSI; PVH: hvm_start_info in EBX */
    gpa_t page_tables; /* CR3; Linux only */
    gpa_t gdt;
    uint16_t gdt_limit;
};

/* Errors name the file and the remedy. Guest RAM may have been written on failure. */
int boot_load(struct physmap *memory, const struct boot_config *config, struct boot_entry *entry, struct error *err)
    __attribute__((warn_unused_result));

/* Changes a processor that is in its power-on state (cpu_reset) to the state the protocol wants at its entry. */
void boot_cpu_setup(struct cpu_state *cpu, const struct boot_entry *entry);

#endif
