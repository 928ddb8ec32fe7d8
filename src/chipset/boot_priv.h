/*
 * Shared by the boot loaders: boot.c (files, layout, the processor's first state), boot_linux.c (bzImage, boot_params), boot_elf.c
 * (ELF, PVH) and boot_unpack.c (compressed kernels). Never included outside this folder.
 *
 * Layout of low memory, below E820_LOW_RAM_END: what the kernel needs at its entry and copies away early.
 */
#ifndef DOPPEL_CHIPSET_BOOT_PRIV_H
#define DOPPEL_CHIPSET_BOOT_PRIV_H

#include <stddef.h>
#include <string.h>

#include "chipset/boot.h"

#define BOOT_GDT 0x5000ull
#define BOOT_PVH_INFO 0x6000ull
#define BOOT_PARAMS 0x7000ull      /* Linux's zero page */
#define BOOT_PAGE_TABLES 0x9000ull /* PML4, PDPT, four page directories */
#define BOOT_COMMAND_LINE 0x20000ull
#define BOOT_COMMAND_LINE_BYTES 0x10000ull
#define BOOT_LOW_END 0x100000ull /* kernels go at or above it */

/* A file, or part of one, in memory. */
struct image {
    const uint8_t *bytes;
    uint64_t size_bytes;
};

struct boot_context {
    struct physmap *memory;
    const struct boot_config *config;
    struct boot_entry *entry;
    struct error *err;
    /* Found by the format's loader. */
    uint64_t kernel_end;       /* first address after everything that the kernel occupies at start */
    uint64_t initrd_limit;     /* the initial RAM disk must end at or below it */
    uint64_t initrd_base, initrd_bytes;
};

static inline uint16_t image_u16(const struct image *image, uint64_t offset)
{
    uint16_t value = 0;

    if (offset <= image->size_bytes && image->size_bytes - offset >= sizeof(value))
        memcpy(&value, image->bytes + offset, sizeof(value));
    return value;
}

static inline uint32_t image_u32(const struct image *image, uint64_t offset)
{
    uint32_t value = 0;

    if (offset <= image->size_bytes && image->size_bytes - offset >= sizeof(value))
        memcpy(&value, image->bytes + offset, sizeof(value));
    return value;
}

static inline uint64_t image_u64(const struct image *image, uint64_t offset)
{
    return image_u32(image, offset) | (uint64_t)image_u32(image, offset + 4) << 32;
}

static inline bool image_has(const struct image *image, uint64_t offset, uint64_t length_bytes)
{
    return offset <= image->size_bytes && length_bytes <= image->size_bytes - offset;
}

/* Error for a kernel that is understood but does not fit. */
int boot_too_small(struct boot_context *boot, const char *what, uint64_t end);

/* Steps that all protocols share, in this order, after kernel_end and initrd_limit are known. */
int boot_load_initrd(struct boot_context *boot);
int boot_write_command_line(struct boot_context *boot, uint64_t size_max);
int boot_write_linux_tables(struct boot_context *boot); /* page tables and GDT for the 64-bit entry */
int boot_write_pvh_gdt(struct boot_context *boot);

/* bzImage; -ENOEXEC (no message) when it is something else. */
int boot_linux(struct boot_context *boot, const struct image *image);
/* Fills boot_params for a kernel without setup header of its own, or with one (`header`, may be NULL), and finishes the entry. */
int boot_linux_start(struct boot_context *boot, const struct image *header, uint64_t entry, uint64_t command_line_max);

/* ELF; -ENOEXEC (no message) when it is something else. */
int boot_elf(struct boot_context *boot, const struct image *image);
/* Loads the segments of an ELF64 executable at their physical addresses; sets kernel_end. */
int boot_elf_load(struct boot_context *boot, const struct image *image, uint64_t *entry);
bool boot_is_elf64(const struct image *image);

/*
 * Unpacks a bzImage's payload, whose last four bytes are its unpacked size (gzip's own trailer is the same thing).
 * -ENOTSUP: a format that is not known here, or whose library is missing. -EBADMSG: damaged. -EFBIG: more than limit_bytes. The result is the caller's, to free.
 */
int boot_unpack(const struct image *payload, uint64_t limit_bytes, uint8_t **bytes, uint64_t *size_bytes);

#endif
